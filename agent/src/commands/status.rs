//! `outgate status`: what the objects ask for, and what has come of it, from the source alone.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::net::IpAddr;
use std::time::Duration;

use datapath::limits::{GRANULE_PORTS, GRANULES};
use serde::Serialize;
use tokio::time::{Instant, timeout, timeout_at};

use crate::cli::{SourceArg, StatusArgs};
use crate::leader;
use crate::lease;
use crate::model::{self, Desired};
use crate::objects::{Condition, EgressIpItem, EgressIpStatus, Tunnel};
use crate::print::{self, Table};
use crate::status::{ADDRESS_ASSIGNED, ASSIGNED, firewall};
use crate::watch::Source;
use crate::watch::dir::DirSource;
use crate::watch::kube::{KubeSource, Role};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    #[serde(rename = "egressIPs")]
    egress_ips: Vec<EgressIp>,
    egress_firewalls: Vec<EgressFirewall>,
    nodes: Vec<Node>,
    tunnel: Option<Tunnel>,
    problems: Vec<Problem>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EgressIp {
    name: String,
    items: Vec<EgressIpItem>,
    conditions: Vec<Condition>,
    addresses: Vec<Address>,
}

#[derive(Serialize, Default)]
#[serde(rename_all = "camelCase")]
struct Address {
    #[serde(rename = "egressIP")]
    egress_ip: String,
    owner: Option<String>,
    /// Nodes that are ready to take it over, best first.
    standbys: Vec<String>,
    state: String,
    ports_leased: usize,
    /// Ports that were given back, or were a node's that is gone, and that nobody may use yet.
    ports_resting: usize,
    leases: Vec<Lease>,
}

#[derive(Serialize)]
struct EgressFirewall {
    namespace: String,
    /// None if the object is refused.
    rules: Option<usize>,
    /// As OVN-Kubernetes has it.
    status: String,
    messages: Vec<String>,
    conditions: Vec<Condition>,
    /// Nodes that have pods of the namespace.
    nodes: Vec<String>,
    state: String,
}

#[derive(Serialize)]
struct Lease {
    node: String,
    ports: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    name: String,
    ready: bool,
    assignable: bool,
    agent: bool,
    /// The address that the nodes' tunnel uses.
    tunnel_address: Option<IpAddr>,
    addresses: Vec<IpAddr>,
    networks: Vec<String>,
    #[serde(rename = "egressIPs")]
    egress_ips: Vec<IpAddr>,
}

#[derive(Serialize)]
struct Problem {
    about: String,
    place: Option<String>,
    message: String,
}

pub(super) fn run(args: &StatusArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let status = match &args.source.source {
        SourceArg::Dir(path) => status(&DirSource::read(path)?),
        SourceArg::Kube => super::block_on(from_cluster(args))?,
    };
    print::print_into(out, args.output, &status, |out| status.print_into(out))
}

/// An API server that has not answered by then is away, for a command.
const PATIENCE: Duration = Duration::from_secs(15);
/// Who looks on is told after so long what is waited for.
const SILENCE: Duration = Duration::from_secs(2);

async fn from_cluster(args: &StatusArgs) -> anyhow::Result<Status> {
    let s = &args.source;
    let mut source = KubeSource::open(Role::Command, s.kubeconfig.as_deref(), &s.namespace).await?;
    let end = Instant::now() + PATIENCE;
    let mut ready = timeout(SILENCE, source.ready(|_| ())).await;
    if ready.is_err() {
        eprintln!("waiting for the API server's objects, up to {} s ...", PATIENCE.as_secs());
        ready = timeout_at(end, source.ready(|_| ())).await;
    }
    match ready {
        Ok(ready) => ready?,
        Err(_) if source.problems().is_empty() => {
            anyhow::bail!("the API server has not sent everything within {} s", PATIENCE.as_secs())
        }
        Err(_) => {
            let problems: Vec<_> = source.problems().iter().map(ToString::to_string).collect();
            anyhow::bail!("{}", problems.join("; "));
        }
    }
    Ok(status(&source))
}

fn status<S: Source>(source: &S) -> Status {
    let desired = model::desired(source.objects(), "");
    let egress_ips = desired
        .by_age()
        .into_iter()
        .map(|e| {
            let reported = source.statuses().get(&e.name).map(|r| r.status.clone()).unwrap_or_default();
            let accepted = e.addresses.iter().map(|ip| address(&desired, &reported, *ip));
            let refused = e.refused.iter().map(|(text, refusal)| Address {
                egress_ip: text.clone(),
                state: format!("refused: {refusal}"),
                ..Address::default()
            });
            let rejected = e
                .rejected
                .iter()
                .map(|message| Address { state: format!("object refused: {message}"), ..Address::default() });
            EgressIp {
                name: e.name.clone(),
                addresses: accepted.chain(refused).chain(rejected).collect(),
                items: reported.items,
                conditions: reported.conditions,
            }
        })
        .collect();
    let v6 = desired.tunnel_over_v6();
    let nodes = desired
        .nodes
        .iter()
        .map(|(name, n)| {
            let agent = n.agent.as_ref();
            let mut addresses: Vec<_> = n.addresses().collect();
            addresses.sort_unstable();
            addresses.dedup();
            Node {
                name: name.clone(),
                ready: n.exists && n.ready,
                assignable: n.assignable,
                agent: agent.is_some(),
                tunnel_address: agent.and_then(|a| a.tunnel_address(v6)),
                addresses,
                networks: agent.iter().flat_map(|a| &a.networks).map(ToString::to_string).collect(),
                egress_ips: desired
                    .allocations
                    .iter()
                    .filter(|(_, a)| a.owner.as_ref() == Some(name))
                    .map(|(ip, _)| *ip)
                    .collect(),
            }
        })
        .collect();
    let problems = source
        .problems()
        .iter()
        .chain(&desired.problems)
        .map(|p| Problem {
            about: p.about.clone(),
            place: source.place(&p.about).map(str::to_owned),
            message: p.message.clone(),
        })
        .collect();
    let egress_firewalls =
        desired.firewalls.keys().map(|namespace| egress_firewall(source, &desired, namespace)).collect();
    Status { egress_ips, egress_firewalls, nodes, tunnel: desired.tunnel, problems }
}

fn egress_firewall<S: Source>(source: &S, desired: &Desired, namespace: &str) -> EgressFirewall {
    let firewall = &desired.firewalls[namespace];
    let nodes = desired.firewall_nodes.get(namespace).cloned().unwrap_or_default();
    // What the nodes say is here; who leads has the same from them, and only the times are its own.
    let reported = source.firewall_statuses().get(namespace);
    let previous = reported.map(|r| r.status.conditions.as_slice()).unwrap_or_default();
    let status = firewall::status(namespace, firewall, &nodes, &desired.nodes, previous, "");
    let state = status.conditions.iter().map(|c| {
        let word = match (c.kind.as_str(), c.status.as_str(), c.reason.as_str()) {
            (firewall::CONDITION, "True", _) => return format!("applied: {}", c.message),
            (firewall::CONDITION, _, "Refused") => "refused",
            (firewall::CONDITION, _, "NotApplied") => "not applied",
            (firewall::CONDITION, ..) => "waiting",
            _ => "note",
        };
        format!("{word}: {}", c.message)
    });
    EgressFirewall {
        namespace: namespace.to_owned(),
        rules: firewall.rules.as_ref().ok().map(|rules| rules.len()),
        state: state.collect::<Vec<_>>().join("; "),
        status: status.status,
        messages: status.messages,
        conditions: status.conditions,
        nodes: nodes.into_iter().collect(),
    }
}

fn address(desired: &Desired, reported: &EgressIpStatus, ip: IpAddr) -> Address {
    let text = ip.to_string();
    let allocation = desired.allocations.get(&ip).map(|a| &**a);
    let owner = reported.items.iter().find(|i| i.egress_ip == text).map(|i| i.node.clone());
    let why = reported.conditions.iter().find(|c| c.kind == ADDRESS_ASSIGNED && c.egress_ip == text);
    // Held for other nodes only once the owner's kernel has the port table.
    let confirmed = |owner: &str| {
        let loaded = desired.nodes.get(owner)?.agent.as_ref()?.loaded.get(&ip)?;
        allocation.map(|a| loaded.0 == a.uid && loaded.1 >= a.generation)
    };
    let state = match (&owner, why) {
        (Some(node), _) if confirmed(node) == Some(true) => "held".to_owned(),
        (Some(_), _) => "assigned: the owner has not taken it over yet".to_owned(),
        (None, Some(condition)) => format!("unassigned: {}", condition.message),
        (None, None) => match reported.conditions.iter().find(|c| c.kind == ASSIGNED) {
            Some(_) => "unassigned".to_owned(),
            None => "unassigned: nobody leads, or the leader has not got to it yet".to_owned(),
        },
    };
    Address {
        egress_ip: text,
        owner,
        state,
        standbys: allocation.map(|a| a.standbys.clone()).unwrap_or_default(),
        ports_leased: allocation.map_or(0, lease::leased) * usize::from(GRANULE_PORTS),
        ports_resting: allocation
            .iter()
            .flat_map(|a| &a.resting)
            .map(|r| usize::from(r.range.count) * usize::from(GRANULE_PORTS))
            .sum(),
        leases: allocation
            .iter()
            .flat_map(|a| &a.leases)
            .map(|l| Lease { node: l.node.to_string(), ports: leader::ports(&l.ranges) })
            .collect(),
    }
}

impl Status {
    fn print_into(&self, out: &mut impl Write) -> io::Result<()> {
        let mut table = Table::new(&["EGRESS IP", "OBJECT", "OWNER", "STANDBYS", "PORTS LEASED", "STATE"]);
        for e in &self.egress_ips {
            for a in &e.addresses {
                let all = GRANULES * usize::from(GRANULE_PORTS);
                // A node that has grown has several leases.
                let nodes: BTreeSet<_> = a.leases.iter().map(|l| &l.node).collect();
                let ports = format!("{} of {all} ({} nodes)", a.ports_leased, nodes.len());
                let ports = if a.ports_leased == 0 { String::new() } else { ports };
                table.row([
                    a.egress_ip.clone(),
                    e.name.clone(),
                    a.owner.clone().unwrap_or_default(),
                    a.standbys.join(","),
                    ports,
                    a.state.clone(),
                ]);
            }
        }
        table.print_into(out)?;
        writeln!(out)?;
        if !self.egress_firewalls.is_empty() {
            let mut table = Table::new(&["EGRESS FIREWALL", "RULES", "NODES", "STATE"]);
            for f in &self.egress_firewalls {
                let rules = f.rules.map(|n| n.to_string()).unwrap_or_default();
                let name = format!("{}/default", f.namespace);
                table.row([name, rules, f.nodes.len().to_string(), f.state.clone()]);
            }
            table.print_into(out)?;
            writeln!(out)?;
        }
        let yes = |b: bool| if b { "yes" } else { "no" }.to_owned();
        let list = |items: Vec<String>| items.join(",");
        let mut table = Table::new(&[
            "NODE",
            "READY",
            "EGRESS",
            "AGENT",
            "TUNNEL",
            "EGRESS IPS",
            "ADDRESSES",
            "UPLINK NETWORKS",
        ]);
        for n in &self.nodes {
            table.row([
                n.name.clone(),
                yes(n.ready),
                yes(n.assignable),
                yes(n.agent),
                n.tunnel_address.map(|a| a.to_string()).unwrap_or_default(),
                list(n.egress_ips.iter().map(ToString::to_string).collect()),
                list(n.addresses.iter().map(ToString::to_string).collect()),
                list(n.networks.clone()),
            ]);
        }
        table.print_into(out)?;
        if !self.problems.is_empty() {
            writeln!(out)?;
            let mut table = Table::new(&["PROBLEM", "WHERE", "WHAT"]);
            for p in &self.problems {
                table.row([p.about.clone(), p.place.clone().unwrap_or_default(), p.message.clone()]);
            }
            table.print_into(out)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser as _;
    use std::fs;
    use std::path::PathBuf;

    struct Temp(PathBuf);

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn cluster(test: &str) -> Temp {
        let dir = std::env::temp_dir().join(format!("outgate-status-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        for (file, text) in [
            (
                "all.yaml",
                "apiVersion: v1
kind: Node
metadata: {name: a, labels: {k8s.ovn.org/egress-assignable: ''}}
---
apiVersion: k8s.ovn.org/v1
kind: EgressIP
metadata: {name: e}
spec: {egressIPs: [192.0.2.100, 192.0.2.101, '2001:DB8:0::1', 'ff02::1'], namespaceSelector: {}}
---
apiVersion: k8s.ovn.org/v1
kind: EgressIP
metadata: {name: wrong}
spec: {egressIPs: [192.0.2.x], namespaceSelector: {}}
",
            ),
            (
                ".outgate/egressnodes/a.yaml",
                "metadata: {name: a}
status:
  tunnelAddress: 192.0.2.5
  tunnelAddresses: [192.0.2.5, '2001:db8:5::5']
  addresses: [192.0.2.5, '2001:db8:5::5']
  uplinks: [{name: eth0, up: true, networks: [192.0.2.5/24, '2001:db8:5::5/64']}]
  loaded: [{egressIP: 192.0.2.100, uid: x, generation: 2}]
",
            ),
            (
                ".outgate/egressallocations/192.0.2.100.yaml",
                "metadata: {name: 192.0.2.100, uid: x, generation: 2}
spec: {egressIP: 192.0.2.100, owner: a, standbys: [b, c], leases: [{node: a, generation: 1, ranges: [{first: 0, count: 2}]}]}
",
            ),
            (
                ".outgate/status/egressips/e.yaml",
                "metadata: {name: e}
status:
  items: [{node: a, egressIP: 192.0.2.100}]
  conditions:
  - {type: Assigned, status: 'False', reason: PartlyAssigned}
  - {type: AddressAssigned, egressIP: 192.0.2.101, status: 'False', reason: NodeTaken, message: no room}
  - {type: AddressAssigned, egressIP: '2001:db8::1', status: 'False', reason: NoUplink, message: no uplink}
",
            ),
        ] {
            let path = dir.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Temp(dir)
    }

    fn shown(dir: &Temp, arguments: &str) -> String {
        let line = format!("outgate status --source dir:{} {arguments}", dir.0.display());
        let Command::Status(args) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!()
        };
        let mut out = Vec::new();
        run(&args, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn tables() {
        let text = shown(&cluster("table"), "");
        let lines: Vec<_> =
            text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for line in [
            "EGRESS IP OBJECT OWNER STANDBYS PORTS LEASED STATE",
            "192.0.2.100 e a b,c 128 of 64512 (1 nodes) held",
            "192.0.2.101 e - - - unassigned: no room",
            "2001:db8::1 e - - - unassigned: no uplink",
            "ff02::1 e - - - refused: not an address that a host can have on a network",
            "- wrong - - - object refused: spec.egressIPs[0]: \"192.0.2.x\" is not an IP address",
            "a yes yes yes 192.0.2.5 192.0.2.100 192.0.2.5,2001:db8:5::5 192.0.2.0/24,2001:db8:5::/64",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line} in\n{text}");
        }
        assert!(text.contains("EgressIP wrong   all.yaml:10"), "{text}");
    }

    #[test]
    fn json_and_yaml_for_programs() {
        let dir = cluster("json");
        let json: serde_json::Value = serde_json::from_str(&shown(&dir, "-o json")).unwrap();
        let e = &json["egressIPs"][0];
        assert_eq!(e["name"], "e");
        assert_eq!(e["items"][0]["node"], "a");
        assert_eq!(e["items"][0]["egressIP"], "192.0.2.100");
        assert_eq!(e["conditions"][0]["type"], "Assigned");
        assert_eq!(e["addresses"][0]["leases"][0]["ports"], "1024-1151");
        assert_eq!(json["nodes"][0]["name"], "a");
        let yaml: serde_json::Value = serde_saphyr::from_str(&shown(&dir, "-o yaml")).unwrap();
        assert_eq!(yaml, json);
    }

    #[test]
    fn firewalls_and_what_has_come_of_them() {
        let dir = cluster("firewalls");
        fs::write(
            dir.0.join("firewalls.yaml"),
            "apiVersion: k8s.ovn.org/v1
kind: EgressFirewall
metadata: {name: default, namespace: shop}
spec: {egress: [{type: Allow, to: {cidrSelector: 10.0.0.0/8}}, {type: Deny, to: {nodeSelector: {matchLabels: {a: b}}}}]}
---
apiVersion: k8s.ovn.org/v1
kind: EgressFirewall
metadata: {name: default, namespace: slip}
spec: {egress: [{type: Deny, to: {cidrSelector: 10.0.0.1}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: shop}
spec: {nodeName: a}
status: {podIP: 10.1.0.1}
",
        )
        .unwrap();
        let waiting = shown(&dir, "");
        let line = |text: &str, start: &str| {
            let words = |l: &str| l.split_whitespace().collect::<Vec<_>>().join(" ");
            text.lines()
                .map(words)
                .find(|l| l.starts_with(start))
                .unwrap_or_else(|| panic!("{start} in\n{text}"))
        };
        let note = "note: nodeSelector of spec.egress[1] matches no node: the rule matches nothing";
        assert_eq!(
            line(&waiting, "shop/default"),
            format!("shop/default 2 1 waiting: node a has not confirmed it yet; {note}")
        );
        assert_eq!(
            line(&waiting, "slip/default"),
            "slip/default - 0 refused: spec.egress[0].to.cidrSelector: \"10.0.0.1\" is an address, not a network: write 10.0.0.1/32"
        );
        assert!(line(&waiting, "EgressFirewall slip/default").contains("firewalls.yaml:6"), "{waiting}");
        let source = DirSource::read(&dir.0).unwrap();
        let version = model::desired(source.objects(), "").firewalls["shop"].version;
        let path = dir.0.join(".outgate/egressnodes/a.yaml");
        let text = fs::read_to_string(&path).unwrap();
        let version = crate::firewall::version_text(version);
        fs::write(&path, format!("{text}  firewalls: [{{namespace: shop, version: '{version}'}}]\n"))
            .unwrap();
        let applied = line(&shown(&dir, ""), "shop/default");
        assert_eq!(applied, format!("shop/default 2 1 applied: 2 rules in force on 1 node; {note}"));
        let json: serde_json::Value = serde_json::from_str(&shown(&dir, "-o json")).unwrap();
        let f = &json["egressFirewalls"][0];
        assert_eq!((&f["namespace"], &f["rules"]), (&"shop".into(), &2.into()));
        assert_eq!(f["status"], "EgressFirewall Rules applied");
        assert_eq!(f["messages"][0], "a: EgressFirewall Rules applied");
        assert_eq!(json["egressFirewalls"][1]["rules"], serde_json::Value::Null);
    }

    #[test]
    fn an_owner_that_has_not_loaded_the_ports_does_not_hold_yet() {
        let dir = cluster("late");
        let path = dir.0.join(".outgate/egressnodes/a.yaml");
        let text = fs::read_to_string(&path).unwrap().replace("generation: 2", "generation: 1");
        fs::write(path, text).unwrap();
        assert!(shown(&dir, "").contains("assigned: the owner has not taken it over yet"));
    }
}
