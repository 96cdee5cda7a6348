//! The leader's work: from the objects to what it writes about them. A pure function; time and chance come in
//! as arguments.

mod grants;
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use datapath::keys::GranuleRange;
use datapath::limits::{FIRST_PORT, GRANULE_PORTS};

use self::tables::{Standbys, Tables};
use crate::addresses::object_name;
use crate::assign::{self, Assignment, Candidate};
use crate::hashed::Hashed;
use crate::lease::{self, Returned};
use crate::model::{Allocation, Desired, TUNNEL_PORT};
use crate::objects::{
    Cluster, EgressAllocation, EgressAllocationSpec, EgressFirewallReport, EgressIpReport, Granules, Meta,
    Objects, PortLease, RestingPorts, Tunnel,
};
use crate::status::{self, Outcomes, Ports, Shadow};
use crate::text::Text;
use crate::watch::Write;

/// What the leader knows besides what the objects ask for.
pub struct Surroundings<'a> {
    /// The objects that [`Desired`] was made from.
    pub objects: &'a Objects,
    /// EgressIP statuses as they are.
    pub statuses: &'a BTreeMap<String, EgressIpReport>,
    /// EgressFirewall statuses as they are, by namespace.
    pub firewall_statuses: &'a BTreeMap<String, EgressFirewallReport>,
    /// Allocations that exist and cannot be read: left alone, their addresses with nobody.
    pub unreadable: &'a BTreeSet<String>,
    /// Whether all objects are known. While one may be missing, nothing is given up.
    pub complete: bool,
    /// The time, as objects have it.
    pub now: &'a str,
    /// Whether other nodes reach a node.
    pub reachable: &'a dyn Fn(&str) -> bool,
}

impl Surroundings<'_> {
    /// Whether an address has an allocation that cannot be read, or makes no sense: nobody may write over it.
    fn unknown(&self, desired: &Desired, ip: &IpAddr) -> bool {
        let name = object_name(ip);
        self.unreadable.contains(&name)
            || (self.objects.egress_allocations.contains_key(&name) && !desired.allocations.contains_key(ip))
    }
}

/// What the leader does about the objects.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// To be written, in this order. If one fails, what follows must not be written: it was decided on what did not
    /// come to be.
    pub writes: Vec<Write>,
    /// What an operator may want to read later.
    pub log: Vec<String>,
    /// When to plan again although nothing has changed, in seconds since 1970.
    pub again: Option<u64>,
}

/// Decides what to write. `random` gives 64 random bits a call.
#[must_use]
pub fn plan(desired: &Desired, around: &Surroundings<'_>, random: &mut dyn FnMut() -> u64) -> Plan {
    let mut plan = Plan::default();
    tunnel(desired, random, &mut plan);
    let (requests, candidates) = assign::inputs(desired, around.reachable);
    let tables = Tables::new(desired);
    let requests: Vec<_> = requests
        .into_iter()
        .map(|mut r| {
            r.addresses.retain(|ip| !around.unknown(desired, ip));
            let allocations = r.addresses.iter().filter_map(|ip| Some((*ip, desired.allocations.get(ip)?)));
            r.standbys = allocations
                .map(|(ip, a)| {
                    let current = a.standbys.iter().filter(|s| tables.is_current(&ip, a, s));
                    (ip, current.cloned().collect())
                })
                .collect();
            r
        })
        .collect();
    let current = desired.allocations.iter().filter_map(|(ip, a)| Some((*ip, a.owner.clone()?))).collect();
    let assignment = assign::assign(&requests, &candidates, &current);
    let known = Known { desired, around, tables: &tables, assignment: &assignment, candidates: &candidates };
    let (allocations, ports) = allocations(&known, random, &mut plan);
    let shadowed = shadowed(desired);
    for e in desired.by_age() {
        let previous = around.statuses.get(&e.name);
        let status = status::egress_ip(
            e,
            &Outcomes {
                assignment: &assignment,
                ports: &ports,
                unreadable: &|ip| around.unknown(desired, ip),
                shadowed: shadowed.get(e.name.as_str()).map(Vec::as_slice).unwrap_or_default(),
            },
            previous.map(|p| p.status.conditions.as_slice()).unwrap_or_default(),
            around.now,
        );
        if previous.is_none_or(|p| p.status != status) {
            let events = status::events(&e.name, previous.map(|p| &p.status), &status);
            plan.writes.push(Write::Status(EgressIpReport {
                api_version: crate::objects::OVN_API.to_owned(),
                kind: "EgressIP".to_owned(),
                metadata: Meta { name: e.name.clone(), ..Meta::default() },
                status,
            }));
            // After the status: who reads that again says nothing twice.
            plan.writes.extend(events.into_iter().map(Write::Event));
        }
    }
    firewalls(desired, around, &mut plan);
    // After the allocations: what is granted is decided there, and only there.
    grants::node_specs(&known, &allocations, &mut plan);
    if around.complete {
        for name in around.statuses.keys().filter(|name| !desired.egress_ips.contains_key(*name)) {
            plan.writes.push(Write::RemoveStatus(name.clone()));
        }
    }
    plan
}

/// Statuses of firewalls.
fn firewalls(desired: &Desired, around: &Surroundings<'_>, plan: &mut Plan) {
    for (namespace, firewall) in &desired.firewalls {
        let previous = around.firewall_statuses.get(namespace);
        let nobody = BTreeSet::new();
        let nodes = desired.firewall_nodes.get(namespace).unwrap_or(&nobody);
        let conditions = previous.map(|p| p.status.conditions.as_slice()).unwrap_or_default();
        let status =
            status::firewall::status(namespace, firewall, nodes, &desired.nodes, conditions, around.now);
        if previous.is_none_or(|p| p.status != status) {
            let before = previous.map(|p| p.status.status.as_str()).unwrap_or_default();
            if status.status != before && !status.status.is_empty() {
                plan.log
                    .push(format!("EgressFirewall {namespace}/default: {}", status.conditions[0].message));
            }
            let events = status::firewall_events(namespace, conditions, &status.conditions);
            plan.writes.push(Write::FirewallStatus(EgressFirewallReport {
                api_version: crate::objects::OVN_API.to_owned(),
                kind: "EgressFirewall".to_owned(),
                metadata: Meta {
                    name: "default".to_owned(),
                    namespace: namespace.clone(),
                    ..Meta::default()
                },
                status,
            }));
            plan.writes.extend(events.into_iter().map(Write::Event));
        }
    }
    if around.complete {
        let gone = around.firewall_statuses.keys().filter(|n| !desired.firewalls.contains_key(*n));
        plan.writes.extend(gone.cloned().map(Write::RemoveFirewallStatus));
    }
}

/// Port and identifier are chosen once: nodes that differ in them cannot hear each other.
fn tunnel(desired: &Desired, random: &mut dyn FnMut() -> u64, plan: &mut Plan) {
    let config = &desired.config;
    let tunnel = Tunnel {
        port: config.tunnel_port.or(desired.tunnel.map(|t| t.port)).unwrap_or(TUNNEL_PORT),
        vni: config.tunnel_vni.or(desired.tunnel.map(|t| t.vni)).unwrap_or_else(|| {
            // 24 bits, not 0.
            u32::try_from(random() % ((1 << 24) - 1)).unwrap_or(0) + 1
        }),
    };
    if desired.tunnel != Some(tunnel) {
        plan.log.push(format!("the nodes' tunnel uses UDP port {} and VNI {}", tunnel.port, tunnel.vni));
        plan.writes.push(Write::Cluster(Cluster { tunnel }));
    }
}

/// What the leader knows, and has decided so far.
struct Known<'a> {
    desired: &'a Desired,
    around: &'a Surroundings<'a>,
    tables: &'a Tables<'a>,
    assignment: &'a Assignment,
    candidates: &'a BTreeMap<String, Candidate>,
}

/// Pods that an object selects and an older one serves, by object: the older one, how many, and on how many nodes.
fn shadowed(desired: &Desired) -> BTreeMap<&str, Vec<Shadow<'_>>> {
    let mut all: BTreeMap<&str, BTreeMap<&str, (u32, u32)>> = BTreeMap::new();
    for s in desired.nodes.values().filter_map(|n| n.agent.as_ref()).flat_map(|a| &a.shadowed) {
        let (pods, nodes) = all.entry(&s.egress_ip).or_default().entry(&s.by).or_default();
        (*pods, *nodes) = (*pods + s.pods, *nodes + 1);
    }
    let list = |(by, (pods, nodes))| Shadow { by, pods, nodes };
    all.into_iter().map(|(name, by)| (name, by.into_iter().map(list).collect())).collect()
}

/// Returns the allocations as they are then, and how the ports of each address are shared out.
fn allocations(
    known: &Known<'_>,
    random: &mut dyn FnMut() -> u64,
    plan: &mut Plan,
) -> (BTreeMap<IpAddr, Arc<Allocation>>, BTreeMap<IpAddr, Ports>) {
    let Known { desired, around, tables, assignment, .. } = *known;
    let demands = lease::demands(desired);
    let cluster_nodes = desired.nodes.values().filter(|n| n.exists).count();
    let now = status::seconds(around.now).unwrap_or(0);
    let timeouts = &desired.config.timeouts;
    let uids: Hashed<_, _> =
        around.objects.nodes.iter().map(|(name, n)| (name.as_str(), n.metadata.uid.as_str())).collect();
    let gone = |node: &str, uid: &str| around.complete && uids.get(node).is_none_or(|known| *known != uid);
    let mut returned = returned(desired);
    let nothing = Allocation::default();
    let mut standbys = Standbys::new(known, now);
    let mut ports = BTreeMap::new();
    let mut allocations = desired.allocations.clone();
    for (ip, e) in desired.addresses() {
        if around.unknown(desired, &ip) {
            continue;
        }
        let old = desired.allocations.get(&ip);
        let before = old.map_or(&nothing, |a| &**a);
        let owner = assignment.owners.get(&ip).cloned();
        let standbys = standbys.of(&ip, e, before, owner.as_ref());
        let nobody = BTreeSet::new();
        let situation = lease::Situation {
            demanders: demands.get(&ip).unwrap_or(&nobody),
            returned: &returned.remove(&(ip, before.uid.as_str())).unwrap_or_default(),
            gone: &gone,
            loaded: tables.by_all(&ip, &before.uid, owner.iter().chain(&standbys)),
            nodes: cluster_nodes,
            now,
            // No new connection may be taken for an old one, neither outside nor by what outlives it here.
            rest: u64::from(timeouts.rest.max(timeouts.tcp_transitory)),
        };
        let outcome = lease::next(before, &situation);
        let uid = if old.is_some() { before.uid.clone() } else { format!("{:016x}", random()) };
        let mut new = Allocation {
            uid,
            generation: before.generation,
            owner,
            standbys,
            leases: outcome.leases,
            resting: outcome.resting,
        };
        if old.is_none_or(|old| **old != new) {
            new.generation += 1;
            describe(&e.name, ip, old.map(|a| &**a), &new, known, &mut plan.log);
            plan.writes.push(Write::Allocation(object(ip, &new)));
        }
        // What only time changes: ports that have rested, and standbys that are waited for no more.
        let times = new.resting.iter().map(|r| r.until).chain(tables.patience(&ip, &new));
        plan.again = times.filter(|t| *t > now).chain(plan.again).min();
        let used = lease::leased(&new);
        ports.insert(ip, Ports { leased: used, refused: outcome.refused, short: outcome.short });
        if old.is_none_or(|old| **old != new) {
            allocations.insert(ip, Arc::new(new));
        }
    }
    if around.complete {
        let named: BTreeSet<_> = desired.egress_ips.values().flat_map(|e| &e.named).collect();
        for ip in desired.allocations.keys().filter(|ip| !named.contains(ip)) {
            plan.log.push(format!("egress IP {ip}: in no EgressIP any more, its port leases end"));
            plan.writes.push(Write::RemoveAllocation(object_name(ip)));
            allocations.remove(ip);
        }
    }
    (allocations, ports)
}

/// What nodes give back, by address and UID of the allocation.
fn returned(desired: &Desired) -> BTreeMap<(IpAddr, &str), Vec<Returned>> {
    let mut all: BTreeMap<(IpAddr, &str), Vec<Returned>> = BTreeMap::new();
    for (name, node) in desired.nodes.iter().filter(|(_, n)| n.exists) {
        let agent = node.agent.as_ref().filter(|a| a.node_uid == node.uid);
        for (ip, (uid, ranges)) in agent.into_iter().flat_map(|a| &a.returned) {
            let of = |r: &crate::model::Granted| Returned {
                node: name.into(),
                node_uid: (&node.uid).into(),
                generation: r.generation,
                range: r.range,
            };
            all.entry((*ip, uid)).or_default().extend(ranges.iter().map(of));
        }
    }
    all
}

fn describe(
    object: &str,
    ip: IpAddr,
    old: Option<&Allocation>,
    new: &Allocation,
    known: &Known<'_>,
    log: &mut Vec<String>,
) {
    let Known { desired, assignment, .. } = *known;
    let before = old.and_then(|a| a.owner.as_deref());
    if old.is_none() || before != new.owner.as_deref() {
        let came = before.map(|node| {
            let why = match desired.nodes.get(node) {
                None => "is gone",
                Some(n) if !n.exists => "has no Node object any more",
                Some(n) if !n.assignable => "is not labelled k8s.ovn.org/egress-assignable any more",
                Some(n) if !n.ready => "is not ready",
                Some(n) if n.agent.is_none() || !(known.around.reachable)(node) => {
                    "is not heard of: its agent does not run, or does not reach the API"
                }
                Some(_) => "has no working uplink for it, no room, or another address of the object",
            };
            format!(" (was on {node}, which {why})")
        });
        let came = came.unwrap_or_default();
        log.push(match (&new.owner, assignment.unassigned.get(&ip)) {
            (Some(node), _) => format!("egress IP {ip} of EgressIP {object}: assigned to node {node}{came}"),
            (None, Some(why)) => format!("egress IP {ip} of EgressIP {object}: held by no node, {why}{came}"),
            (None, None) => format!("egress IP {ip} of EgressIP {object}: held by no node{came}"),
        });
    }
    let had: BTreeSet<_> = old.into_iter().flat_map(|a| &a.leases).collect();
    for lease in &new.leases {
        if !had.contains(lease) {
            log.push(format!("egress IP {ip}: node {} leases ports {}", lease.node, ports(&lease.ranges)));
        }
    }
    let rest = |a: &Allocation| a.resting.iter().map(|r| r.range).collect::<BTreeSet<_>>();
    let (before, after) = (old.map(rest).unwrap_or_default(), rest(new));
    for range in after.iter().filter(|r| !before.contains(r)) {
        let of = old
            .into_iter()
            .flat_map(|a| &a.leases)
            .find(|l| l.ranges.iter().any(|r| (r.first..r.first + r.count).contains(&range.first)));
        let node = of.map_or("a node", |l| l.node.as_str());
        log.push(format!(
            "egress IP {ip}: ports {} of node {node} are taken back, and rest",
            ports(&[*range])
        ));
    }
    for range in before.iter().filter(|r| !after.contains(r)) {
        log.push(format!("egress IP {ip}: ports {} are free again", ports(&[*range])));
    }
}

/// Ranges of ports as text: `1024-17151, 20000-20063`.
#[must_use]
pub fn ports(ranges: &[GranuleRange]) -> String {
    let port = |granule: u16| u32::from(FIRST_PORT) + u32::from(granule) * u32::from(GRANULE_PORTS);
    let ranges: Vec<_> =
        ranges.iter().map(|r| format!("{}-{}", port(r.first), port(r.first + r.count) - 1)).collect();
    ranges.join(", ")
}

fn object(ip: IpAddr, a: &Allocation) -> EgressAllocation {
    let leases = a
        .leases
        .iter()
        .map(|l| PortLease {
            node: l.node.clone(),
            node_uid: l.node_uid.clone(),
            boot_id: l.boot_id.clone(),
            since: match l.since {
                0 => Text::default(),
                since => status::rfc3339(UNIX_EPOCH + Duration::from_secs(since)).into(),
            },
            generation: l.generation,
            ranges: l.ranges.iter().map(|r| Granules { first: r.first, count: r.count }).collect(),
        })
        .collect();
    EgressAllocation {
        metadata: Meta {
            name: object_name(&ip),
            uid: a.uid.clone(),
            generation: a.generation,
            ..Meta::default()
        },
        spec: EgressAllocationSpec {
            egress_ip: ip.to_string(),
            owner: a.owner.clone().unwrap_or_default(),
            standbys: a.standbys.clone(),
            leases,
            resting: a
                .resting
                .iter()
                .map(|r| RestingPorts {
                    first: r.range.first,
                    count: r.range.count,
                    generation: r.generation,
                    until: status::rfc3339(UNIX_EPOCH + Duration::from_secs(r.until)),
                })
                .collect(),
        },
        ..EgressAllocation::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{desired, tests::objects};
    use crate::objects::{LoadedAllocation, PortDemand, ShadowedPods};
    use crate::text::Labels;

    const CLUSTER: &str = "kind: Node
metadata: {name: a, uid: ua, labels: {k8s.ovn.org/egress-assignable: ''}}
---
kind: Node
metadata: {name: b, uid: ub, labels: {k8s.ovn.org/egress-assignable: ''}}
---
kind: EgressNode
metadata: {name: a}
status: {nodeUID: ua, tunnelAddress: 192.0.2.5, demand: [{egressIP: 192.0.2.100}], uplinks: [{name: eth0, up: true, networks: [192.0.2.5/24]}]}
---
kind: EgressNode
metadata: {name: b}
status: {nodeUID: ub, tunnelAddress: 192.0.2.6, uplinks: [{name: eth0, up: true, networks: [192.0.2.6/24]}]}
---
kind: EgressIP
metadata: {name: e, uid: ue}
spec: {egressIPs: [192.0.2.100, 192.0.2.101, 192.0.2.102, '2001:db8::1'], namespaceSelector: {}}";

    struct World {
        objects: Objects,
        statuses: BTreeMap<String, EgressIpReport>,
        firewall_statuses: BTreeMap<String, EgressFirewallReport>,
        unreadable: BTreeSet<String>,
        /// Nodes whose agents are not heard of.
        silent: BTreeSet<String>,
        complete: bool,
        seed: u64,
        now: u64,
    }

    impl World {
        fn new(yaml: &str) -> Self {
            Self {
                objects: objects(yaml),
                statuses: BTreeMap::new(),
                firewall_statuses: BTreeMap::new(),
                unreadable: BTreeSet::new(),
                silent: BTreeSet::new(),
                complete: true,
                seed: 41,
                now: 1_767_225_600,
            }
        }

        /// Plans, and does what was planned.
        fn step(&mut self) -> Plan {
            let d = desired(&self.objects, "a");
            let now = status::rfc3339(UNIX_EPOCH + Duration::from_secs(self.now));
            let around = Surroundings {
                objects: &self.objects,
                statuses: &self.statuses,
                firewall_statuses: &self.firewall_statuses,
                unreadable: &self.unreadable,
                complete: self.complete,
                now: &now,
                reachable: &|node| !self.silent.contains(node),
            };
            let seed = &mut self.seed;
            let p = plan(&d, &around, &mut || {
                *seed += 1;
                *seed
            });
            for w in p.writes.clone() {
                match w {
                    Write::Cluster(c) => self.objects.cluster = Some(c),
                    Write::Allocation(a) => {
                        self.objects.egress_allocations.insert(a.metadata.name.clone(), a);
                    }
                    Write::RemoveAllocation(n) => drop(self.objects.egress_allocations.remove(&n)),
                    Write::Status(s) => drop(self.statuses.insert(s.metadata.name.clone(), s)),
                    Write::RemoveStatus(n) => drop(self.statuses.remove(&n)),
                    Write::FirewallStatus(s) => {
                        self.firewall_statuses.insert(s.metadata.namespace.clone(), s);
                    }
                    Write::RemoveFirewallStatus(n) => drop(self.firewall_statuses.remove(&n)),
                    Write::NodeSpec(name, spec) => {
                        self.objects.egress_nodes.entry(name).or_default().spec = spec;
                    }
                    Write::RemoveEgressNode(name) => drop(self.objects.egress_nodes.remove(&name)),
                    Write::Event(_) => {}
                    Write::EgressNode(_) => panic!("not the leader's"),
                }
            }
            p
        }

        fn items(&self) -> Vec<(&str, &str)> {
            self.statuses["e"].status.items.iter().map(|i| (i.egress_ip.as_str(), i.node.as_str())).collect()
        }
    }

    #[test]
    fn everything_is_written_once() {
        let mut w = World::new(CLUSTER);
        let first = w.step();
        assert_eq!(w.objects.cluster, Some(Cluster { tunnel: Tunnel { port: 4795, vni: 43 } }));
        assert_eq!(w.items(), [("192.0.2.100", "a"), ("192.0.2.101", "b")]);
        let a = &w.objects.egress_allocations["192.0.2.100"];
        assert_eq!((a.metadata.generation, a.spec.leases.len()), (1, 1));
        assert_eq!(a.spec.leases[0].ranges, [Granules { first: 0, count: 378 }]);
        assert!(
            first.log.contains(&"egress IP 192.0.2.100: node a leases ports 1024-25215".to_owned()),
            "{:?}",
            first.log
        );
        assert!(
            first
                .log
                .iter()
                .any(|l| l.starts_with("egress IP 192.0.2.101 of EgressIP e: assigned to node b"))
        );
        assert_eq!(w.step(), Plan::default(), "nothing more to do");
    }

    #[test]
    fn conditions_say_why_each_address_is_not_in_force() {
        let mut w = World::new(CLUSTER);
        w.step();
        let c = &w.statuses["e"].status.conditions;
        let of =
            |ip: &str| c.iter().find(|c| c.egress_ip == ip).map(|c| (c.status.as_str(), c.reason.as_str()));
        assert_eq!(of("192.0.2.100"), None);
        assert_eq!(of("192.0.2.102"), Some(("False", "NodeTaken")));
        assert_eq!(of("2001:db8::1"), Some(("False", "NoUplink")));
        assert_eq!(
            (c[0].kind.as_str(), c[0].status.as_str(), c[0].reason.as_str()),
            ("Assigned", "False", "PartlyAssigned")
        );
    }

    #[test]
    fn an_ipv6_address_is_assigned_and_leased_as_an_ipv4_one() {
        let yaml = CLUSTER.replace("192.0.2.5/24]", "192.0.2.5/24, '2001:db8::5/64']");
        let mut w = World::new(&yaml.replace(
            "demand: [{egressIP: 192.0.2.100}]",
            "demand: [{egressIP: 192.0.2.100}, {egressIP: '2001:db8::1'}]",
        ));
        w.step();
        assert!(w.items().contains(&("2001:db8::1", "a")), "{:?}", w.items());
        let a = &w.objects.egress_allocations["2001-0db8-0000-0000-0000-0000-0000-0001"];
        assert_eq!((a.spec.egress_ip.as_str(), a.spec.leases.len()), ("2001:db8::1", 1));
        assert_eq!(w.step(), Plan::default(), "nothing more to do");
        w.objects.egress_ips.clear();
        w.step();
        assert!(w.objects.egress_allocations.is_empty());
        // One that cannot be read is left alone, by the same name.
        let mut w = World::new(&yaml);
        w.unreadable.insert("2001-0db8-0000-0000-0000-0000-0000-0001".into());
        w.step();
        assert_eq!(w.objects.egress_allocations.len(), 3, "the other three");
        let c = &w.statuses["e"].status.conditions;
        assert!(c.iter().any(|c| c.egress_ip == "2001:db8::1" && c.reason == "AllocationUnreadable"));
    }

    #[test]
    fn an_address_that_is_routed_to_the_nodes_needs_a_default_route_and_no_network() {
        let config = "---
kind: EgressConfig
metadata: {name: default}
spec: {routedCIDRs: ['2001:db8::/64']}";
        let yaml = format!("{CLUSTER}\n{config}");
        let reason = |yaml: &str| {
            let mut w = World::new(yaml);
            w.step();
            let c = &w.statuses["e"].status.conditions;
            c.iter().find(|c| c.egress_ip == "2001:db8::1").map(|c| c.reason.clone())
        };
        assert_eq!(reason(&yaml).as_deref(), Some("NoUplink"));
        let with = |family: &str| yaml.replace("up: true", &format!("up: true, defaultRoute: [{family}]"));
        assert_eq!(reason(&with("IPv4")).as_deref(), Some("NoUplink"), "of the other family");
        assert_eq!(reason(&with("IPv6")), None);
        assert_eq!(reason(&with("IPv6").replace("up: true", "up: false")).as_deref(), Some("NoUplink"));
    }

    #[test]
    fn demand_adds_a_lease_under_a_new_generation_and_a_move_keeps_them() {
        let mut w = World::new(CLUSTER);
        w.step();
        w.objects.egress_nodes.get_mut("b").unwrap().status.demand =
            vec![PortDemand { egress_ip: "192.0.2.100".into(), granules: 0 }];
        let p = w.step();
        let writes: Vec<_> =
            p.writes.iter().map(|w| matches!(w, Write::NodeSpec(n, _) if n == "b")).collect();
        assert_eq!(writes, [false, true], "the allocation, and whom to send by");
        let a = w.objects.egress_allocations["192.0.2.100"].clone();
        assert_eq!(a.spec.leases.iter().map(|l| l.generation).collect::<Vec<_>>(), [1, 2]);
        w.objects.nodes.get_mut("a").unwrap().metadata.labels = Labels::default();
        let p = w.step();
        let moved = &w.objects.egress_allocations["192.0.2.100"];
        assert_eq!((moved.spec.owner.as_str(), &moved.spec.leases), ("", &a.spec.leases), "b holds another");
        assert!(p.log[0].contains("was on a, which is not labelled"), "{:?}", p.log);
    }

    #[test]
    fn an_owner_whose_agent_is_silent_is_not_said_to_have_no_uplink() {
        let mut w = World::new(CLUSTER);
        w.step();
        w.silent.insert("a".into());
        let p = w.step();
        assert!(p.log[0].contains("was on a, which is not heard of: its agent"), "{:?}", p.log);
    }

    /// What a node is granted of 192.0.2.100: owner, generation, and the first granule and generation of each range.
    #[expect(clippy::type_complexity, reason = "compared with literals")]
    fn granted(w: &World, node: &str) -> Option<(String, u64, Vec<(u16, u64)>)> {
        let spec = &w.objects.egress_nodes[node].spec;
        let g = spec.ranges.iter().find(|g| g.egress_ip == "192.0.2.100")?;
        Some((g.owner.clone(), g.generation, g.ranges.iter().map(|r| (r.first, r.generation)).collect()))
    }

    /// A node's agent confirms the allocation of 192.0.2.100 as it is.
    fn confirm(w: &mut World, node: &str) {
        let m = &w.objects.egress_allocations["192.0.2.100"].metadata;
        let loaded = LoadedAllocation {
            egress_ip: "192.0.2.100".into(),
            uid: (&m.uid).into(),
            generation: m.generation,
        };
        w.objects.egress_nodes.get_mut(node).unwrap().status.loaded = vec![loaded];
    }

    #[test]
    fn ports_are_granted_once_the_owner_has_them() {
        let mut w = World::new(CLUSTER);
        w.step();
        assert_eq!(w.objects.egress_nodes["b"].spec.node_uid, "ub");
        let labels = &w.objects.egress_nodes["b"].spec.labels;
        assert!(labels.contains_key(crate::objects::EGRESS_ASSIGNABLE));
        assert_eq!(granted(&w, "b"), None, "it asks for none");
        let owner = || "a".to_owned();
        assert_eq!(granted(&w, "a"), Some((owner(), 1, vec![])));
        confirm(&mut w, "a");
        w.step();
        assert_eq!(granted(&w, "a"), Some((owner(), 1, vec![(0, 1)])));
        assert_eq!(w.step(), Plan::default(), "nothing more to do");
        // Another node's lease changes nothing for it.
        w.objects.egress_nodes.get_mut("b").unwrap().status.demand =
            vec![PortDemand { egress_ip: "192.0.2.100".into(), granules: 0 }];
        w.step();
        assert_eq!(granted(&w, "b"), Some((owner(), 2, vec![])));
        assert_eq!(granted(&w, "a"), Some((owner(), 1, vec![(0, 1)])));
        confirm(&mut w, "a");
        let p = w.step();
        assert_eq!(p.writes.len(), 1);
        assert_eq!(granted(&w, "b").unwrap().2, [(378, 2)]);
        // What another node of the name has said and was told counts for nothing.
        w.objects.nodes.get_mut("a").unwrap().metadata.uid = "anew".into();
        w.objects.egress_nodes.get_mut("b").unwrap().status.demand.clear();
        w.step();
        assert_eq!(granted(&w, "a"), None);
        assert_eq!(granted(&w, "b").unwrap().2, [(378, 2)], "b goes on as it is");
    }

    #[test]
    fn another_owner_is_named_once_it_has_what_was_granted() {
        let mut w = World::new(&CLUSTER.replace("192.0.2.100, 192.0.2.101, 192.0.2.102", "192.0.2.100"));
        w.step();
        confirm(&mut w, "a");
        w.step();
        w.objects.nodes.get_mut("a").unwrap().metadata.labels = Labels::default();
        w.step();
        let allocation = &w.objects.egress_allocations["192.0.2.100"];
        assert_eq!(allocation.spec.owner, "b");
        assert_eq!(granted(&w, "a"), Some(("a".into(), 1, vec![(0, 1)])), "the old one goes on forwarding");
        confirm(&mut w, "b");
        w.step();
        assert_eq!(granted(&w, "a"), Some(("b".into(), 2, vec![(0, 1)])));
    }

    #[test]
    fn a_leader_that_knows_less_grants_nothing_anew() {
        let mut w = World::new(CLUSTER);
        w.step();
        confirm(&mut w, "a");
        w.step();
        let known = w.objects.egress_allocations.clone();
        let spec = &mut w.objects.egress_nodes.get_mut("a").unwrap().spec;
        // Another leader has taken the ports back meanwhile.
        (spec.ranges[0].generation, spec.ranges[0].ranges) = (2, Vec::new());
        let told = spec.clone();
        w.objects.egress_allocations = known;
        w.step();
        assert_eq!(w.objects.egress_nodes["a"].spec, told);
    }

    /// One address, three nodes that may hold it; a, which does, needs ports.
    fn three() -> World {
        let third = "---
kind: Node
metadata: {name: c, uid: uc, labels: {k8s.ovn.org/egress-assignable: ''}}
---
kind: EgressNode
metadata: {name: c}
status: {nodeUID: uc, tunnelAddress: 192.0.2.7, uplinks: [{name: eth0, up: true, networks: [192.0.2.7/24]}]}";
        let one = CLUSTER.replace("192.0.2.100, 192.0.2.101, 192.0.2.102, '2001:db8::1'", "192.0.2.100");
        let mut w = World::new(&format!("{one}\n{third}"));
        w.step();
        w
    }

    fn standbys(w: &World) -> Vec<&str> {
        let a = &w.objects.egress_allocations["192.0.2.100"];
        a.spec.standbys.iter().map(String::as_str).collect()
    }

    fn asks(w: &mut World, node: &str, granules: u16) {
        w.objects.egress_nodes.get_mut(node).unwrap().status.demand =
            vec![PortDemand { egress_ip: "192.0.2.100".into(), granules }];
    }

    #[test]
    fn a_standby_has_the_ports_before_it_is_one_and_before_they_are_used() {
        let mut w = three();
        assert!(standbys(&w).is_empty());
        confirm(&mut w, "c");
        w.step();
        assert_eq!(standbys(&w), ["c"]);
        confirm(&mut w, "b");
        w.step();
        assert_eq!(standbys(&w), ["c", "b"], "first come, first to take over");
        for node in ["a", "b", "c"] {
            confirm(&mut w, node);
        }
        w.step();
        asks(&mut w, "b", 0);
        w.step();
        confirm(&mut w, "a");
        confirm(&mut w, "b");
        w.step();
        assert_eq!(granted(&w, "b").unwrap().2, [], "c has not got them yet");
        w.now += 9;
        let p = w.step();
        assert_eq!((p.writes.len(), p.again), (0, Some(w.now + 1)));
        w.now += 1;
        w.step();
        assert_eq!(standbys(&w), ["b"], "it is not waited for longer");
        assert_eq!(granted(&w, "b").unwrap().2.len(), 1);
        confirm(&mut w, "c");
        w.step();
        assert_eq!(standbys(&w), ["b", "c"]);
        // The owner is not ready any more: the first that is.
        w.objects.nodes.get_mut("b").unwrap().metadata.labels = Labels::default();
        let not =
            crate::objects::Condition { kind: "Ready".into(), status: "False".into(), ..Default::default() };
        w.objects.nodes.get_mut("a").unwrap().status.conditions = vec![not];
        w.step();
        assert_eq!((w.items(), standbys(&w)), (vec![("192.0.2.100", "c")], vec![]));
        assert_eq!(granted(&w, "a").unwrap().0, "c", "at once: it has the table");
    }

    #[test]
    fn more_ports_are_leased_on_demand_and_those_before_stay() {
        let mut w = three();
        confirm(&mut w, "a");
        w.step();
        asks(&mut w, "a", 600);
        let p = w.step();
        assert!(p.log.iter().any(|l| l.contains("node a leases ports")), "{:?}", p.log);
        let had = granted(&w, "a").unwrap().2;
        assert_eq!(had.len(), 1);
        confirm(&mut w, "a");
        w.step();
        let has = granted(&w, "a").unwrap().2;
        assert_eq!((has[0], has.len()), (had[0], 2));
        asks(&mut w, "a", 1008);
        w.step();
        let c = &w.statuses["e"].status.conditions;
        let of =
            |kind: &str| c.iter().find(|c| c.kind == kind).map(|c| (c.status.as_str(), c.reason.as_str()));
        assert_eq!(of("PortsScarce"), Some(("True", "MostLeased")));
        assert_eq!(of("PortsAvailable"), Some(("False", "AllLeased")));
    }

    #[test]
    fn what_is_given_back_rests_and_is_free_again() {
        let mut w = three();
        confirm(&mut w, "a");
        w.step();
        let lease = w.objects.egress_allocations["192.0.2.100"].clone();
        let range = lease.spec.leases[0].ranges[0];
        let status = &mut w.objects.egress_nodes.get_mut("a").unwrap().status;
        status.demand.clear();
        status.returned = vec![crate::objects::ReturnedPorts {
            egress_ip: "192.0.2.100".into(),
            uid: lease.metadata.uid.clone(),
            ranges: vec![crate::objects::GrantedGranules {
                first: range.first,
                count: range.count,
                generation: 1,
            }],
        }];
        let mut other = World::new(CLUSTER);
        other.objects = w.objects.clone();
        let back = &mut other.objects.egress_nodes.get_mut("a").unwrap().status.returned[0];
        back.uid = "another".into();
        other.step();
        assert_eq!(other.objects.egress_allocations["192.0.2.100"].spec.leases, lease.spec.leases);

        let p = w.step();
        assert!(p.log.iter().any(|l| l.contains("of node a are taken back")), "{:?}", p.log);
        assert_eq!(granted(&w, "a").unwrap().2, [], "an entry stays, and the generation with it");
        let a = &w.objects.egress_allocations["192.0.2.100"];
        assert!(a.spec.leases.is_empty());
        assert_eq!(a.spec.resting[0].until, "2026-01-01T00:04:00Z", "240 s, the longer of the two timers");
        w.objects.egress_nodes.get_mut("a").unwrap().status.returned.clear();
        w.now += 239;
        confirm(&mut w, "a");
        assert_eq!(w.step().again, Some(w.now + 1));
        assert_eq!(w.objects.egress_allocations["192.0.2.100"].spec.resting.len(), 1);
        w.now += 1;
        w.step();
        assert!(w.objects.egress_allocations["192.0.2.100"].spec.resting.is_empty());
    }

    #[test]
    fn the_ports_of_a_node_that_is_gone_are_fenced_before_they_are_free() {
        let mut w = three();
        asks(&mut w, "b", 0);
        w.step();
        for node in ["a", "b", "c"] {
            confirm(&mut w, node);
        }
        w.step();
        assert_eq!(granted(&w, "b").unwrap().2.len(), 1);
        w.objects.nodes.remove("b");
        w.complete = false;
        w.step();
        assert_eq!(
            w.objects.egress_allocations["192.0.2.100"].spec.leases.len(),
            2,
            "it may be in a file that is not read"
        );
        w.complete = true;
        w.step();
        assert_eq!(w.objects.egress_allocations["192.0.2.100"].spec.leases.len(), 1);
        assert!(!w.objects.egress_nodes.contains_key("b"));
        w.now += 1000;
        w.step();
        let resting = |w: &World| w.objects.egress_allocations["192.0.2.100"].spec.resting.len();
        assert_eq!(resting(&w), 1, "gateways have not dropped them");
        confirm(&mut w, "a");
        w.step();
        assert_eq!(resting(&w), 1, "c, which is a standby, neither");
        confirm(&mut w, "c");
        w.step();
        assert_eq!(resting(&w), 0);
    }

    #[test]
    fn an_object_that_selects_what_an_older_one_serves_says_so_once() {
        let mut w = three();
        for (node, pods) in [("a", 2), ("b", 1)] {
            w.objects.egress_nodes.get_mut(node).unwrap().status.shadowed =
                vec![ShadowedPods { egress_ip: "e".into(), by: "older".into(), pods }];
        }
        let p = w.step();
        let events = |p: &Plan| {
            let of = |w: &Write| if let Write::Event(e) = w { Some(e.clone()) } else { None };
            p.writes.iter().filter_map(of).collect::<Vec<_>>()
        };
        let said = events(&p);
        assert_eq!((said.len(), said[0].reason.as_str(), said[0].warning), (1, "UndefinedRequest", true));
        assert_eq!(
            said[0].message,
            "pods that it selects are served by older objects: 3 pods on 2 nodes by EgressIP older"
        );
        w.objects.egress_nodes.get_mut("b").unwrap().status.shadowed.clear();
        let p = w.step();
        assert_eq!((p.writes.len(), events(&p)), (1, vec![]), "another number is no event");
        w.objects.egress_nodes.get_mut("a").unwrap().status.shadowed.clear();
        w.step();
        assert!(!w.statuses["e"].status.conditions.iter().any(|c| c.kind == status::SHADOWED));
    }

    #[test]
    fn the_egress_node_goes_with_its_node() {
        let mut w = World::new(CLUSTER);
        w.step();
        w.objects.nodes.remove("b");
        w.complete = false;
        w.step();
        assert!(w.objects.egress_nodes.contains_key("b"));
        w.complete = true;
        w.step();
        assert!(!w.objects.egress_nodes.contains_key("b"));
        // One that never had a Node is its agent's, while that lives.
        w.objects.egress_nodes.insert("b".into(), crate::objects::EgressNode::default());
        w.step();
        assert!(w.objects.egress_nodes.contains_key("b"));
    }

    #[test]
    fn an_allocation_that_makes_no_sense_is_not_written_over() {
        let mut w = World::new(CLUSTER);
        w.step();
        confirm(&mut w, "a");
        w.step();
        let told = w.objects.egress_nodes["a"].spec.clone();
        let a = w.objects.egress_allocations.get_mut("192.0.2.100").unwrap();
        let twice = a.spec.leases[0].clone();
        a.spec.leases.push(twice);
        let before = a.clone();
        w.step();
        assert_eq!(w.objects.egress_allocations["192.0.2.100"], before);
        assert_eq!(w.objects.egress_nodes["a"].spec, told);
        let c = &w.statuses["e"].status.conditions;
        assert!(c.iter().any(|c| c.egress_ip == "192.0.2.100" && c.reason == "AllocationUnreadable"));
    }

    #[test]
    fn leases_end_when_the_address_leaves_all_objects_and_not_before() {
        let mut w = World::new(CLUSTER);
        w.step();
        let uid = w.objects.egress_allocations["192.0.2.100"].metadata.uid.clone();
        let spec = w.objects.egress_ips.clone();
        // A slip in another address: the object is refused, its allocations stay.
        w.objects.egress_ips.get_mut("e").unwrap().spec.egress_ips[1] = "192.0.2".into();
        w.step();
        assert!(w.objects.egress_allocations.contains_key("192.0.2.100"));
        assert!(!w.objects.egress_allocations.contains_key("192.0.2.101"));
        assert_eq!(w.statuses["e"].status.conditions[0].reason, "Refused");
        assert!(w.items().is_empty());
        // A file that cannot be read may have it.
        w.objects.egress_ips.clear();
        w.complete = false;
        assert_eq!(w.step(), Plan::default());
        w.complete = true;
        w.step();
        assert!(w.objects.egress_allocations.is_empty() && w.statuses.is_empty());
        // Taken again, it is another allocation: old confirmations do not count.
        w.objects.egress_ips = spec;
        w.objects.cluster = None;
        w.step();
        assert_ne!(w.objects.egress_allocations["192.0.2.100"].metadata.uid, uid);
    }

    #[test]
    fn an_unreadable_allocation_is_not_written_over() {
        let mut w = World::new(CLUSTER);
        w.unreadable.insert("192.0.2.100".into());
        w.step();
        assert!(!w.objects.egress_allocations.contains_key("192.0.2.100"));
        let c = &w.statuses["e"].status.conditions;
        assert!(c.iter().any(|c| c.egress_ip == "192.0.2.100" && c.reason == "AllocationUnreadable"));
    }

    #[test]
    fn the_config_decides_on_the_tunnel() {
        let mut w = World::new(
            "kind: EgressConfig
metadata: {name: default}
spec: {tunnel: {port: 5000}}",
        );
        w.step();
        let chosen = w.objects.cluster.unwrap().tunnel;
        assert_eq!((chosen.port, chosen.vni), (5000, 43));
        w.objects.egress_configs.get_mut("default").unwrap().spec.tunnel.vni = Some(7);
        w.step();
        assert_eq!(w.objects.cluster.unwrap().tunnel, Tunnel { port: 5000, vni: 7 });
        w.objects.egress_configs.clear();
        assert_eq!(w.step(), Plan::default(), "chosen once");
    }

    #[test]
    fn a_firewalls_status_is_of_the_nodes_that_have_its_pods() {
        let mut w = World::new(&format!(
            "{CLUSTER}
---
kind: EgressFirewall
metadata: {{name: default, namespace: shop, uid: u}}
spec: {{egress: [{{type: Deny, to: {{cidrSelector: 0.0.0.0/0}}}}]}}
---
kind: Pod
metadata: {{name: p, namespace: shop}}
spec: {{nodeName: b}}
status: {{podIP: 10.1.0.1}}"
        ));
        w.step();
        assert_eq!(w.firewall_statuses["shop"].status.status, "");
        let version = crate::firewall::version_text(desired(&w.objects, "a").firewalls["shop"].version);
        w.objects.egress_nodes.get_mut("b").unwrap().status.firewalls =
            vec![crate::objects::AppliedFirewall {
                namespace: "shop".into(),
                uid: "u".into(),
                version,
                ..Default::default()
            }];
        let p = w.step();
        let status = &w.firewall_statuses["shop"].status;
        assert_eq!(status.status, "EgressFirewall Rules applied");
        assert_eq!(status.messages, ["b: EgressFirewall Rules applied"]);
        assert_eq!(p.log, ["EgressFirewall shop/default: 1 rule in force on 1 node"]);
        assert_eq!(w.step(), Plan::default(), "nothing more to do");
        w.objects.egress_firewalls.clear();
        w.complete = false;
        assert_eq!(w.step(), Plan::default());
        w.complete = true;
        w.step();
        assert!(w.firewall_statuses.is_empty());
    }
}
