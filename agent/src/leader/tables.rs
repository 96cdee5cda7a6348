//! Who has the port table of an address: what the leader knows of gateways' kernels, and the nodes that it keeps ready
//! to take an address over.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::Known;
use crate::hashed::Hashed;
use crate::model::{Allocation, Desired, EgressIp};
use crate::text::Text;

/// How many nodes are kept ready to take an address over.
const STANDBYS: usize = 2;
/// How long new leases wait for a standby that does not load them, in seconds: then it is none any more.
const PATIENCE: u64 = 10;

/// The generations of allocations that nodes' kernels are known to have whole.
pub(super) struct Tables<'a> {
    /// What each node has, of those that have anything.
    by_node: Hashed<&'a str, &'a BTreeMap<IpAddr, (Text, u64)>>,
    /// Nodes that have anything of an address: name, UID of the allocation, generation.
    by_address: BTreeMap<IpAddr, Vec<(&'a str, &'a str, u64)>>,
}

impl<'a> Tables<'a> {
    pub(super) fn new(desired: &'a Desired) -> Self {
        let mut by_address: BTreeMap<IpAddr, Vec<_>> = BTreeMap::new();
        let mut by_node = Hashed::new();
        for (name, node) in desired.nodes.iter().filter(|(_, n)| n.exists) {
            // Nothing that an earlier node of the name has said counts.
            let agent = node.agent.as_ref().filter(|a| a.node_uid == node.uid);
            let Some(agent) = agent.filter(|a| !a.loaded.is_empty()) else { continue };
            by_node.insert(name.as_str(), &agent.loaded);
            for (ip, (uid, generation)) in &agent.loaded {
                by_address.entry(*ip).or_default().push((name.as_str(), uid.as_str(), *generation));
            }
        }
        Self { by_node, by_address }
    }

    /// The generation of an address's allocation, of this UID, that a node has.
    pub(super) fn loaded(&self, node: &str, ip: &IpAddr, uid: &str) -> Option<u64> {
        self.by_node.get(node)?.get(ip).filter(|(of, _)| of == uid).map(|(_, generation)| *generation)
    }

    /// The generation that everybody has: those that must have it, and whoever else has any, for they steer as well.
    pub(super) fn by_all<'n>(
        &self,
        ip: &IpAddr,
        uid: &str,
        must: impl Iterator<Item = &'n String>,
    ) -> Option<u64> {
        let must = must.map(|node| self.loaded(node, ip, uid));
        let others = self.by_address.get(ip).into_iter().flatten().filter(|(_, of, _)| *of == uid);
        must.chain(others.map(|(.., generation)| Some(*generation))).fold(Some(u64::MAX), Option::min)
    }

    /// Whether a node has all that an allocation says of ports.
    pub(super) fn is_current(&self, ip: &IpAddr, a: &Allocation, node: &str) -> bool {
        let newest =
            || a.leases.iter().map(|l| l.generation).chain(a.resting.iter().map(|r| r.generation)).max();
        self.loaded(node, ip, &a.uid).is_some_and(|generation| Some(generation) >= newest())
    }

    /// Since when the standbys of an allocation are waited for, each.
    fn waits(&self, ip: &IpAddr, a: &Allocation, node: &str) -> Option<u64> {
        let loaded = self.loaded(node, ip, &a.uid);
        a.leases.iter().filter(|l| loaded.is_none_or(|g| g < l.generation)).map(|l| l.since).min()
    }

    /// When standbys will be waited for no more.
    pub(super) fn patience(&self, ip: &IpAddr, a: &Allocation) -> impl Iterator<Item = u64> {
        a.standbys.iter().filter_map(|s| self.waits(ip, a, s)).map(|since| since + PATIENCE)
    }
}

/// The choice of standbys.
pub(super) struct Standbys<'a> {
    known: &'a Known<'a>,
    now: u64,
    /// Of how many addresses each node is one.
    roles: BTreeMap<&'a str, usize>,
    healthy: Vec<&'a String>,
}

impl<'a> Standbys<'a> {
    pub(super) fn new(known: &'a Known<'a>, now: u64) -> Self {
        let mut roles = BTreeMap::new();
        for name in known.desired.allocations.values().flat_map(|a| &a.standbys) {
            *roles.entry(name.as_str()).or_default() += 1;
        }
        let healthy = known.candidates.iter().filter(|(_, c)| c.healthy()).map(|(name, _)| name).collect();
        Self { known, now, roles, healthy }
    }

    /// The standbys of an address: those that it has, while they may be, and others that have its table already.
    /// One that does not load what is new is not waited for long: nobody would get ports.
    pub(super) fn of(
        &mut self,
        ip: &IpAddr,
        e: &EgressIp,
        a: &'a Allocation,
        owner: Option<&String>,
    ) -> Vec<String> {
        let Known { tables, candidates, assignment, .. } = *self.known;
        let may = |node: &String| {
            owner != Some(node) && candidates.get(node).is_some_and(|c| c.healthy() && c.has_network_of(ip))
        };
        let waits =
            |node: &String| tables.waits(ip, a, node).is_some_and(|since| self.now < since + PATIENCE);
        let mut standbys: Vec<String> = a
            .standbys
            .iter()
            .filter(|node| may(node) && (tables.is_current(ip, a, node) || waits(node)))
            .take(STANDBYS)
            .cloned()
            .collect();
        if standbys.len() < STANDBYS && owner.is_some() {
            // A node that holds another address of the object cannot take this one as well.
            let siblings = e.addresses.iter().filter(|o| o.is_ipv6() == ip.is_ipv6());
            let busy: BTreeSet<_> = siblings.filter_map(|o| assignment.owners.get(o)).collect();
            let able = self.healthy.iter().copied();
            let mut more: Vec<&String> = able
                .filter(|node| !standbys.contains(node) && may(node) && tables.is_current(ip, a, node))
                .collect();
            more.sort_by_key(|node| {
                (busy.contains(*node), self.roles.get(node.as_str()).copied().unwrap_or(0), *node)
            });
            for node in more.into_iter().take(STANDBYS - standbys.len()) {
                *self.roles.entry(node.as_str()).or_default() += 1;
                standbys.push(node.clone());
            }
        }
        standbys
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Node, NodeAgent};

    const UID: &str = "allocation";

    fn ip() -> IpAddr {
        "192.0.2.1".parse().unwrap()
    }

    /// A node whose agent says this of the address's allocation, as that of a Node object of its own UID.
    fn node(uid: &str, generation: u64) -> Node {
        let loaded = BTreeMap::from([(ip(), (uid.into(), generation))]);
        let agent = NodeAgent { node_uid: "machine".into(), loaded, ..NodeAgent::default() };
        Node { exists: true, uid: "machine".into(), agent: Some(agent), ..Node::default() }
    }

    fn desired<const N: usize>(nodes: [(&str, Node); N]) -> Desired {
        let nodes = nodes.map(|(name, node)| (name.to_owned(), node)).into();
        Desired { nodes, ..Desired::default() }
    }

    /// What everybody has, those of these names for certain.
    fn by_all(desired: &Desired, must: &[&str]) -> Option<u64> {
        let must: Vec<_> = must.iter().map(|name| (*name).to_owned()).collect();
        Tables::new(desired).by_all(&ip(), UID, must.iter())
    }

    #[test]
    fn a_nodes_word_counts_for_its_own_object_and_for_the_very_allocation() {
        let earlier = Node { uid: "another".into(), ..node(UID, 3) };
        let gone = Node { exists: false, ..node(UID, 3) };
        let silent = Node { agent: None, ..node(UID, 3) };
        let d = desired([
            ("a", node(UID, 7)),
            ("anew", node("before", 3)),
            ("earlier", earlier),
            ("gone", gone),
            ("silent", silent),
        ]);
        let tables = Tables::new(&d);
        assert_eq!(tables.loaded("a", &ip(), UID), Some(7));
        assert_eq!(tables.loaded("a", &"192.0.2.2".parse().unwrap(), UID), None);
        for name in ["anew", "earlier", "gone", "silent", "nobody"] {
            assert_eq!(tables.loaded(name, &ip(), UID), None, "{name}");
            assert_eq!(by_all(&d, &["a", name]), None, "{name} must have it");
        }
        assert_eq!(by_all(&d, &["a"]), Some(7), "what the others say is of nothing that there is");
    }

    #[test]
    fn everybody_has_what_the_slowest_has() {
        let d = desired([("a", node(UID, 9)), ("b", node(UID, 8)), ("steers", node(UID, 3))]);
        assert_eq!(by_all(&d, &["a", "b"]), Some(3), "it need not have any, but has, and steers by it");
        let d = desired([("a", node(UID, 9)), ("b", node(UID, 8)), ("other", node("before", 3))]);
        assert_eq!(by_all(&d, &["a", "b"]), Some(8));
        assert_eq!(by_all(&d, &["a"]), Some(8), "whoever has any counts");
        let none = Node { agent: Some(NodeAgent::default()), ..node(UID, 0) };
        let d = desired([("a", node(UID, 9)), ("b", none)]);
        assert_eq!(by_all(&d, &["a", "b"]), None, "the standby has nothing yet");
        assert_eq!(by_all(&d, &["a"]), Some(9));
        assert_eq!(by_all(&Desired::default(), &[]), Some(u64::MAX), "nobody steers by it");
    }
}
