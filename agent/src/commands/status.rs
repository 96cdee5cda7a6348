//! `outgate status`: what the objects ask for, and what has come of it, from the source alone.

use std::io::{self, Write};
use std::net::IpAddr;

use datapath::limits::{GRANULE_PORTS, GRANULES};
use serde::Serialize;

use crate::cli::StatusArgs;
use crate::leader;
use crate::lease;
use crate::model::{self, Desired};
use crate::objects::{Condition, EgressIpItem, EgressIpStatus, Tunnel};
use crate::print::{self, Table};
use crate::status::{ADDRESS_ASSIGNED, ASSIGNED};
use crate::watch::Source as _;
use crate::watch::dir::DirSource;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    #[serde(rename = "egressIPs")]
    egress_ips: Vec<EgressIp>,
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

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Address {
    #[serde(rename = "egressIP")]
    egress_ip: String,
    owner: Option<String>,
    state: String,
    ports_leased: usize,
    leases: Vec<Lease>,
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
    let source = DirSource::read(args.source.dir())?;
    let status = status(&source);
    print::print_into(out, args.output, &status, |out| status.print_into(out))
}

fn status(source: &DirSource) -> Status {
    let desired = model::desired(source.objects(), "");
    let egress_ips = desired
        .by_age()
        .into_iter()
        .map(|e| {
            let reported = source.statuses().get(&e.name).map(|r| r.status.clone()).unwrap_or_default();
            let accepted = e.addresses.iter().map(|ip| address(&desired, &reported, *ip));
            let refused = e.refused.iter().map(|(text, refusal)| Address {
                egress_ip: text.clone(),
                owner: None,
                state: format!("refused: {refusal}"),
                ports_leased: 0,
                leases: Vec::new(),
            });
            let rejected = e.rejected.iter().map(|message| Address {
                egress_ip: String::new(),
                owner: None,
                state: format!("object refused: {message}"),
                ports_leased: 0,
                leases: Vec::new(),
            });
            EgressIp {
                name: e.name.clone(),
                addresses: accepted.chain(refused).chain(rejected).collect(),
                items: reported.items,
                conditions: reported.conditions,
            }
        })
        .collect();
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
                tunnel_address: agent.and_then(|a| a.tunnel_address),
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
    Status { egress_ips, nodes, tunnel: desired.tunnel, problems }
}

fn address(desired: &Desired, reported: &EgressIpStatus, ip: IpAddr) -> Address {
    let text = ip.to_string();
    let allocation = desired.allocations.get(&ip);
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
            None => "unassigned: no agent leads, or it has not got to it yet".to_owned(),
        },
    };
    Address {
        egress_ip: text,
        owner,
        state,
        ports_leased: allocation.map_or(0, lease::leased) * usize::from(GRANULE_PORTS),
        leases: allocation
            .iter()
            .flat_map(|a| &a.leases)
            .map(|l| Lease { node: l.node.clone(), ports: leader::ports(l) })
            .collect(),
    }
}

impl Status {
    fn print_into(&self, out: &mut impl Write) -> io::Result<()> {
        let mut table = Table::new(&["EGRESS IP", "OBJECT", "OWNER", "PORTS LEASED", "STATE"]);
        for e in &self.egress_ips {
            for a in &e.addresses {
                let all = GRANULES * usize::from(GRANULE_PORTS);
                let ports = format!("{} of {all} ({} nodes)", a.ports_leased, a.leases.len());
                let ports = if a.ports_leased == 0 { String::new() } else { ports };
                table.row([
                    a.egress_ip.clone(),
                    e.name.clone(),
                    a.owner.clone().unwrap_or_default(),
                    ports,
                    a.state.clone(),
                ]);
            }
        }
        table.print_into(out)?;
        writeln!(out)?;
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
