//! `outgate flows`: the flow table, read from the pinned maps.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use datapath::conntrack::{FlowState, Ticks};
use datapath::keys::{Delivery, EgressId, EgressIp, Flow, FlowKey, FlowPath, PodId, PodName};
use datapath::packet;
use serde::Serialize;

use crate::bpf::maps;
use crate::cli::FlowsArgs;
use crate::firewall::show;
use crate::print::{self, Table};

/// One flow, for people.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
struct Row {
    protocol: String,
    pod: String,
    source: String,
    destination: String,
    #[serde(rename = "egressIP")]
    egress_ip: String,
    egress_port: u16,
    state: String,
    path: String,
    idle_seconds: u64,
    packets: u64,
    bytes: u64,
    /// The rule of the namespace's firewall that has let it go.
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
}

/// The maps that make up the picture.
#[derive(Default)]
struct Picture {
    flows: BTreeMap<FlowKey, Flow>,
    egress_ips: BTreeMap<EgressId, EgressIp>,
    delivery: BTreeMap<PodId, Delivery>,
    names: BTreeMap<PodId, PodName>,
    now: Ticks,
}

pub(super) fn run(args: &FlowsArgs, out: &mut impl Write) -> anyhow::Result<()> {
    loop {
        let bpffs = &args.bpffs.bpffs;
        let picture = Picture {
            flows: maps::read_map(bpffs, "FLOWS")?,
            egress_ips: maps::read_map(bpffs, "EGRESS_IPS")?,
            delivery: maps::read_map(bpffs, "DELIVERY")?,
            names: maps::read_map(bpffs, "POD_NAMES")?,
            now: maps::now(),
        };
        if args.watch && io::stdout().is_terminal() {
            // Home, and clear what follows.
            write!(out, "\x1b[H\x1b[J")?;
        }
        let rows = rows(&picture, args);
        print::print_into(out, args.output, &rows, |out| table(&rows).print_into(out))?;
        out.flush()?;
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn rows(picture: &Picture, args: &FlowsArgs) -> Vec<Row> {
    let wanted = args.pod.as_ref().map(|p| format!("{}/{}", p.namespace, p.name));
    let mut rows = Vec::new();
    for (key, flow) in &picture.flows {
        let egress = picture.egress_ips.get(&flow.egress).map(|e| IpAddr::from(e.ip));
        if args.egress_ip.is_some() && args.egress_ip != egress {
            continue;
        }
        // A flow whose pod is gone is removed with the next sweep.
        let pod = picture.names.get(&key.pod).map_or_else(|| format!("gone ({})", key.pod), show::pod);
        if wanted.as_ref().is_some_and(|w| *w != pod) {
            continue;
        }
        let source = picture.delivery.get(&key.pod).map(|d| IpAddr::from(d.ip));
        let end = |ip: Option<IpAddr>, port: u16| match ip {
            None => String::new(),
            // An ICMP identifier stands where the port would, on the pod's side only.
            Some(ip) if matches!(key.protocol, packet::ICMP | packet::ICMPV6) => ip.to_string(),
            Some(ip) => SocketAddr::new(ip, port).to_string(),
        };
        rows.push(Row {
            protocol: show::protocol(key.protocol),
            source: end(source, key.local_port),
            destination: end(Some(key.remote.into()), key.remote_port),
            egress_ip: egress.map(|ip| ip.to_string()).unwrap_or_default(),
            egress_port: flow.egress_port,
            state: FlowState::from_u8(flow.state)
                .map_or_else(|| flow.state.to_string(), |s| state(s).to_owned()),
            path: if key.path == FlowPath::Host as u8 { "host" } else { "offloaded" }.to_owned(),
            // One tick is 2^24 ns; the counter may have wrapped.
            idle_seconds: (u64::from(idle(picture.now, flow.seen)) << 24) / 1_000_000_000,
            packets: flow.packets,
            bytes: flow.bytes,
            rule: show::place(flow.rule).filter(|_| flow.ruleset != 0),
            pod,
        });
    }
    rows.sort_by(|a, b| {
        (&a.pod, &a.protocol, &a.destination, &a.source).cmp(&(
            &b.pod,
            &b.protocol,
            &b.destination,
            &b.source,
        ))
    });
    rows
}

/// A packet may have come after the clock was read: then it is not idle at all.
fn idle(now: Ticks, seen: Ticks) -> Ticks {
    let idle = now.wrapping_sub(seen);
    if idle > Ticks::MAX / 2 { 0 } else { idle }
}

const fn state(state: FlowState) -> &'static str {
    match state {
        FlowState::Opening => "opening",
        FlowState::Established => "established",
        FlowState::PodClosed => "pod-closed",
        FlowState::ServerClosed => "server-closed",
        FlowState::Closed => "closed",
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        "PROTOCOL",
        "POD",
        "SOURCE",
        "DESTINATION",
        "EGRESS IP:PORT",
        "STATE",
        "PATH",
        "IDLE",
        "PACKETS",
        "BYTES",
    ]);
    for r in rows {
        table.row([
            r.protocol.clone(),
            r.pod.clone(),
            r.source.clone(),
            r.destination.clone(),
            match r.egress_ip.parse() {
                // In brackets if it is IPv6.
                Ok(ip) => SocketAddr::new(ip, r.egress_port).to_string(),
                // Not translated.
                Err(_) if r.egress_port == 0 => String::new(),
                // Unknown once it is gone from the maps.
                Err(_) => format!(":{}", r.egress_port),
            },
            r.state.clone(),
            r.path.clone(),
            format!("{} s", r.idle_seconds),
            r.packets.to_string(),
            r.bytes.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use datapath::addr::Ip;

    fn picture() -> Picture {
        let mut names = PodName::default();
        names.namespace[..4].copy_from_slice(b"shop");
        names.name[..3].copy_from_slice(b"web");
        let key = FlowKey {
            pod: 7,
            remote: Ip::v4([203, 0, 113, 1]),
            local_port: 4000,
            remote_port: 443,
            protocol: packet::TCP,
            ..FlowKey::default()
        };
        let flow = Flow {
            egress: 3,
            egress_port: 2000,
            state: 2,
            seen: 100,
            packets: 5,
            bytes: 600,
            ..Flow::default()
        };
        let icmp = FlowKey { protocol: packet::ICMP, remote_port: 0, pod: 8, ..key };
        let v6 = |text: &str| Ip::from(text.parse::<IpAddr>().unwrap());
        let key6 = FlowKey { remote: v6("2001:db8::9"), pod: 9, protocol: packet::UDP, ..key };
        let echo6 = FlowKey { protocol: packet::ICMPV6, remote_port: 0, ..key6 };
        let flow6 = Flow { egress: 4, ..flow };
        let (pod6, egress6) = (v6("fd00::1"), v6("2001:db8::100"));
        names.name[..3].copy_from_slice(b"six");
        let six = names;
        names.name[..3].copy_from_slice(b"web");
        Picture {
            flows: BTreeMap::from([(key, flow), (icmp, flow), (key6, flow6), (echo6, flow6)]),
            egress_ips: BTreeMap::from([
                (3, EgressIp { ip: Ip::v4([192, 0, 2, 1]), ..EgressIp::default() }),
                (4, EgressIp { ip: egress6, ..EgressIp::default() }),
            ]),
            delivery: BTreeMap::from([
                (7, Delivery { ip: Ip::v4([10, 1, 0, 1]), ..Delivery::default() }),
                (9, Delivery { ip: pod6, ..Delivery::default() }),
            ]),
            names: BTreeMap::from([(7, names), (9, six)]),
            now: 100 + datapath::conntrack::seconds(12) + 1,
        }
    }

    fn shown(arguments: &str) -> Vec<String> {
        let cli =
            crate::cli::Cli::try_parse_from(format!("outgate flows {arguments}").split_whitespace()).unwrap();
        let crate::cli::Command::Flows(args) = cli.command else { panic!() };
        let mut out = Vec::new();
        table(&rows(&picture(), &args)).print_into(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        text.lines().skip(1).map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    #[test]
    fn flows_are_shown_by_name_and_filtered() {
        let web =
            "tcp shop/web 10.1.0.1:4000 203.0.113.1:443 192.0.2.1:2000 established offloaded 12 s 5 600";
        let six = [
            "icmpv6 shop/six fd00::1 2001:db8::9 [2001:db8::100]:2000 established offloaded 12 s 5 600",
            "udp shop/six [fd00::1]:4000 [2001:db8::9]:443 [2001:db8::100]:2000 established offloaded 12 s 5 600",
        ];
        assert_eq!(
            shown(""),
            [
                "icmp gone (8) - 203.0.113.1 192.0.2.1:2000 established offloaded 12 s 5 600",
                six[0],
                six[1],
                web
            ]
        );
        assert_eq!(shown("--egress-ip 2001:DB8::0:100"), six);
        assert_eq!(shown("--pod shop/web"), [web]);
        assert_eq!(shown("--pod shop/other"), Vec::<String>::new());
        assert_eq!(shown("--egress-ip 192.0.2.1").len(), 2);
        assert!(shown("--egress-ip 192.0.2.2").is_empty());
    }

    #[test]
    fn flows_that_a_firewall_has_let_go_untranslated() {
        let mut picture = picture();
        let (key, flow) = picture.flows.iter().find(|(key, _)| key.pod == 7).map(|(k, f)| (*k, *f)).unwrap();
        let passed = Flow { egress: 0, egress_port: 0, ruleset: 1, rule: 3, ..flow };
        picture.flows = BTreeMap::from([(key, passed)]);
        let cli = crate::cli::Cli::try_parse_from(["outgate", "flows"]).unwrap();
        let crate::cli::Command::Flows(args) = cli.command else { panic!() };
        let rows = rows(&picture, &args);
        assert_eq!(rows[0].rule.as_deref(), Some("spec.egress[1]"));
        let mut out = Vec::new();
        table(&rows).print_into(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let line = text.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(line, "tcp shop/web 10.1.0.1:4000 203.0.113.1:443 - established offloaded 12 s 5 600");
    }

    #[test]
    fn a_packet_after_the_look_at_the_clock_is_not_idle_for_years() {
        assert_eq!(idle(5, 6), 0);
        assert_eq!(idle(2, u32::MAX), 3);
    }
}
