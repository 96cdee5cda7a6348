//! `outgate monitor`: what happens on this node while one looks, as the difference between two looks at the maps.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, SystemTime};

use datapath::keys::{
    Delivery, Denial, DenialKey, DropCount, EgressId, EgressIp, Flow, FlowKey, PodId, PodName,
};
use datapath::packet::{ICMP, ICMPV6};
use datapath::verdict::DropReason;
use serde::Serialize;

use crate::bpf::{self, firewall_counts, maps};
use crate::cli::{MonitorArgs, Output};
use crate::firewall::{audit, show};
use crate::status::rfc3339;

/// How often the maps are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// The maps at one moment; those only that are asked for.
#[derive(Default)]
struct Look {
    denials: BTreeMap<DenialKey, Denial>,
    drops: Vec<(DropReason, DropCount)>,
    flows: BTreeMap<FlowKey, Flow>,
    pods: BTreeMap<PodId, PodName>,
    delivery: BTreeMap<PodId, Delivery>,
    egress_ips: BTreeMap<EgressId, EgressIp>,
}

/// Something that has happened.
#[derive(Serialize, Debug, PartialEq, Eq)]
#[serde(tag = "event", rename_all = "kebab-case", rename_all_fields = "camelCase")]
enum Event {
    /// A firewall has denied packets of a pod.
    Denied {
        pod: String,
        destination: String,
        /// None: no rules are in force.
        #[serde(skip_serializing_if = "Option::is_none")]
        rule: Option<String>,
        packets: u32,
    },
    /// Packets were dropped for another reason.
    Dropped { reason: &'static str, packets: u64, bytes: u64 },
    /// A flow is new.
    FlowOpened(FlowLine),
    /// A flow is gone, closed or past its time.
    FlowEnded(FlowLine),
}

/// A flow, as it is told.
#[derive(Serialize, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
struct FlowLine {
    pod: String,
    source: String,
    destination: String,
    protocol: String,
    /// Empty: not translated.
    #[serde(rename = "egressIP", skip_serializing_if = "String::is_empty")]
    egress: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    packets: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Timed<'a> {
    time: &'a str,
    #[serde(flatten)]
    event: &'a Event,
}

pub(super) fn run(args: &MonitorArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let dir = bpf::pin_dir(&args.bpffs.bpffs);
    let mut before = look(&dir, args)?;
    loop {
        std::thread::sleep(LOOK);
        let now = look(&dir, args)?;
        let time = rfc3339(SystemTime::now());
        for event in events(&before, &now) {
            print(out, args.output, &time, &event)?;
        }
        out.flush()?;
        before = now;
    }
}

fn look(dir: &Path, args: &MonitorArgs) -> Result<Look, bpf::Error> {
    let all = !args.drops && !args.flows;
    let mut look = Look { pods: firewall_counts::pod_names(dir)?, ..Look::default() };
    if args.drops || all {
        look.denials = firewall_counts::denials(dir)?;
        look.drops = maps::drops(dir)?;
    }
    if args.flows || all {
        look.flows = firewall_counts::read(dir, "FLOWS")?;
        look.delivery = firewall_counts::read(dir, "DELIVERY")?;
        look.egress_ips = firewall_counts::read(dir, "EGRESS_IPS")?;
    }
    Ok(look)
}

fn events(before: &Look, now: &Look) -> Vec<Event> {
    let pod = |id: &PodId| {
        let name = now.pods.get(id).or_else(|| before.pods.get(id));
        name.map_or_else(|| format!("gone ({id})"), show::pod)
    };
    let mut events = Vec::new();
    for denied in audit::news(&before.denials, &now.denials) {
        let rule = show::place(denied.denial.rule);
        events.push(Event::Denied {
            pod: pod(&denied.key.pod),
            destination: show::destination(&denied.key),
            rule,
            packets: denied.packets,
        });
    }
    for ((reason, old), (_, new)) in before.drops.iter().zip(&now.drops) {
        // What firewalls deny has been told.
        if matches!(reason, DropReason::FirewallDenied | DropReason::FirewallNotReady) {
            continue;
        }
        let (packets, bytes) = (new.packets.saturating_sub(old.packets), new.bytes.saturating_sub(old.bytes));
        if packets > 0 {
            events.push(Event::Dropped { reason: reason.name(), packets, bytes });
        }
    }
    for (key, flow) in before.flows.iter().filter(|(key, _)| !now.flows.contains_key(*key)) {
        events.push(Event::FlowEnded(flow_line(before, pod(&key.pod), key, flow)));
    }
    for (key, flow) in now.flows.iter().filter(|(key, _)| !before.flows.contains_key(*key)) {
        events.push(Event::FlowOpened(flow_line(now, pod(&key.pod), key, flow)));
    }
    events
}

fn flow_line(look: &Look, pod: String, key: &FlowKey, flow: &Flow) -> FlowLine {
    // An ICMP identifier stands where the port would, on the pod's side only.
    let end = |ip: IpAddr, port: u16| match key.protocol {
        ICMP | ICMPV6 => ip.to_string(),
        _ => SocketAddr::new(ip, port).to_string(),
    };
    let source = look.delivery.get(&key.pod).map(|d| end(d.ip.into(), key.local_port));
    let egress = look.egress_ips.get(&flow.egress).map(|e| SocketAddr::new(e.ip.into(), flow.egress_port));
    FlowLine {
        pod,
        source: source.unwrap_or_default(),
        destination: end(key.remote.into(), key.remote_port),
        protocol: show::protocol(key.protocol),
        egress: egress.map(|e| e.to_string()).unwrap_or_default(),
        rule: show::place(flow.rule).filter(|_| flow.ruleset != 0),
        packets: flow.packets,
        bytes: flow.bytes,
    }
}

/// A line for people or for programs; in YAML, a document.
fn print(out: &mut impl Write, output: Output, time: &str, event: &Event) -> anyhow::Result<()> {
    let timed = Timed { time, event };
    match output {
        Output::Table => writeln!(out, "{time}  {}", text(event))?,
        Output::Json => writeln!(out, "{}", serde_json::to_string(&timed)?)?,
        Output::Yaml => write!(out, "---\n{}", serde_saphyr::to_string(&timed)?)?,
    }
    Ok(())
}

fn text(event: &Event) -> String {
    match event {
        Event::Denied { pod, destination, rule, packets } => {
            let rule = rule
                .as_ref()
                .map_or_else(|| "no rules are in force".to_owned(), |rule| format!("EgressFirewall {rule}"));
            format!("{:<11}  {pod}  {destination}  {rule}  packets {packets}", "denied")
        }
        Event::Dropped { reason, packets, bytes } => {
            format!("{:<11}  {reason}  packets {packets}  bytes {bytes}", "dropped")
        }
        Event::FlowOpened(flow) => format!("{:<11}  {}", "flow-opened", flow_text(flow)),
        Event::FlowEnded(flow) => {
            format!(
                "{:<11}  {}  packets {}  bytes {}",
                "flow-ended",
                flow_text(flow),
                flow.packets,
                flow.bytes
            )
        }
    }
}

fn flow_text(flow: &FlowLine) -> String {
    let by = match (&flow.rule, flow.egress.as_str()) {
        (None, "") => String::new(),
        (None, egress) => format!("  as {egress}"),
        (Some(rule), "") => format!("  by {rule}"),
        (Some(rule), egress) => format!("  as {egress}  by {rule}"),
    };
    format!("{}  {} {} -> {}{by}", flow.pod, flow.protocol, flow.source, flow.destination)
}

#[cfg(test)]
mod tests {
    use super::*;
    use datapath::addr::Ip;
    use datapath::keys::Winner;
    use datapath::packet::TCP;

    /// A pod with one flow and one denial, and packets without an owner.
    fn later() -> Look {
        let mut name = PodName::default();
        name.namespace[..4].copy_from_slice(b"prod");
        name.name[..3].copy_from_slice(b"web");
        let remote = Ip::v4([203, 0, 113, 9]);
        let denied = DenialKey { pod: 1, remote, remote_port: 443, protocol: TCP, ..DenialKey::default() };
        let denial = Denial { first: 1, last: 2, packets: 3, ruleset: 5, rule: Winner::new(2, false).order };
        let key = FlowKey {
            pod: 1,
            remote,
            local_port: 4000,
            remote_port: 80,
            protocol: TCP,
            ..FlowKey::default()
        };
        let rule = Winner::new(0, true).order;
        let flow = Flow {
            egress: 3,
            egress_port: 2000,
            ruleset: 5,
            rule,
            packets: 2,
            bytes: 120,
            ..Flow::default()
        };
        Look {
            denials: BTreeMap::from([(denied, denial)]),
            drops: vec![
                (DropReason::NoOwner, DropCount { packets: 5, bytes: 300 }),
                (DropReason::FirewallDenied, DropCount { packets: 3, bytes: 180 }),
            ],
            flows: BTreeMap::from([(key, flow)]),
            pods: BTreeMap::from([(1, name)]),
            delivery: BTreeMap::from([(1, Delivery { ip: Ip::v4([10, 1, 0, 1]), ..Delivery::default() })]),
            egress_ips: BTreeMap::from([(3, EgressIp { ip: Ip::v4([192, 0, 2, 1]), ..EgressIp::default() })]),
        }
    }

    fn before() -> Look {
        let drops = vec![
            (DropReason::NoOwner, DropCount { packets: 1, bytes: 60 }),
            (DropReason::FirewallDenied, DropCount::default()),
        ];
        Look { drops, ..Look::default() }
    }

    fn lines(events: &[Event], output: Output) -> Vec<String> {
        let mut out = Vec::new();
        for event in events {
            print(&mut out, output, "now", event).unwrap();
        }
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn each_event_is_a_line() {
        let opened = events(&before(), &later());
        assert_eq!(
            lines(&opened, Output::Table),
            [
                "now  denied       prod/web  203.0.113.9:443/tcp  EgressFirewall spec.egress[2]  packets 3",
                "now  dropped      NoOwner  packets 4  bytes 240",
                "now  flow-opened  prod/web  tcp 10.1.0.1:4000 -> 203.0.113.9:80  as 192.0.2.1:2000  by spec.egress[0]",
            ]
        );
        let ended = events(&later(), &Look { flows: BTreeMap::new(), ..later() });
        assert_eq!(
            lines(&ended, Output::Table),
            [
                "now  flow-ended   prod/web  tcp 10.1.0.1:4000 -> 203.0.113.9:80  as 192.0.2.1:2000  by spec.egress[0]  packets 2  bytes 120",
            ]
        );
        assert_eq!(events(&later(), &later()), []);
    }

    #[test]
    fn events_for_programs() {
        let events = events(&before(), &later());
        let json: Vec<serde_json::Value> =
            lines(&events, Output::Json).iter().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(
            json[0],
            serde_json::json!({
                "time": "now", "event": "denied", "pod": "prod/web", "destination": "203.0.113.9:443/tcp",
                "rule": "spec.egress[2]", "packets": 3
            })
        );
        assert_eq!((&json[1]["event"], &json[1]["reason"]), (&"dropped".into(), &"NoOwner".into()));
        assert_eq!(
            (&json[2]["event"], &json[2]["egressIP"]),
            (&"flow-opened".into(), &"192.0.2.1:2000".into())
        );
        let yaml = lines(&events[..1], Output::Yaml).join("\n");
        assert_eq!(serde_saphyr::from_str::<serde_json::Value>(&yaml).unwrap(), json[0]);
    }
}
