//! The leader's division of an egress IP's ports among the nodes that need them: a pure function.
//!
//! A node's first share is large, so that most never ask again; a living node never loses ports. What a node
//! that has left the cluster held stays leased to it (by UID, so a node made anew under its name has no right
//! to it): giving it to another is safe only once the gateways have dropped it, which comes with growth and
//! return of leases. Until then only the address leaving all objects ends its leases.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use datapath::keys::GranuleRange;
use datapath::limits::GRANULES;

use crate::model::{Allocation, Desired, Lease};

/// A node that needs ports of an address.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Demander {
    /// Name.
    pub node: String,
    /// UID of its Node object.
    pub node_uid: String,
    /// Its boot id.
    pub boot_id: String,
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// The leases, as they shall be.
    pub leases: Vec<Lease>,
    /// Nodes that got nothing, because nothing is left.
    pub refused: Vec<String>,
}

/// The nodes that need ports of each address, as their agents say.
#[must_use]
pub fn demands(desired: &Desired) -> BTreeMap<IpAddr, BTreeSet<Demander>> {
    let mut demands: BTreeMap<IpAddr, BTreeSet<Demander>> = BTreeMap::new();
    for (name, node) in &desired.nodes {
        let Some(agent) = &node.agent else { continue };
        for ip in agent.demand.keys() {
            demands.entry(*ip).or_default().insert(Demander {
                node: name.clone(),
                node_uid: agent.node_uid.clone(),
                boot_id: agent.boot_id.clone(),
            });
        }
    }
    demands
}

/// Leases ports of one address to every node that needs some and has none. `generation` is the one that the
/// allocation will have if anything changes; `nodes` is the number of nodes in the cluster.
#[must_use]
pub fn lease(current: &[Lease], demanders: &BTreeSet<Demander>, nodes: usize, generation: u64) -> Outcome {
    let mut leases = current.to_vec();
    let mut used = [false; GRANULES];
    for range in leases.iter().flat_map(|l| &l.ranges) {
        used[usize::from(range.first)..][..usize::from(range.count)].fill(true);
    }
    let mut refused = Vec::new();
    for d in demanders {
        if let Some(mine) = leases.iter_mut().find(|l| l.node == d.node && l.node_uid == d.node_uid) {
            // It has started anew; the ports are still its own.
            mine.boot_id.clone_from(&d.boot_id);
            continue;
        }
        let free = used.iter().filter(|u| !**u).count();
        match hole(&used, first_share(demanders.len(), nodes, free)) {
            None => refused.push(d.node.clone()),
            Some(range) => {
                used[usize::from(range.first)..][..usize::from(range.count)].fill(true);
                leases.push(Lease {
                    node: d.node.clone(),
                    node_uid: d.node_uid.clone(),
                    boot_id: d.boot_id.clone(),
                    generation,
                    ranges: vec![range],
                });
            }
        }
    }
    Outcome { leases, refused }
}

/// Three quarters of the space divided by the nodes in use, so that each can grow; where few are in use yet,
/// by the cluster's nodes up to eight, so that those to come find room. Of a scarce rest not more than three
/// quarters, so that the next finds something too.
fn first_share(demanders: usize, nodes: usize, free: usize) -> usize {
    let share = (GRANULES * 3 / 4 / demanders.max(nodes.min(8)).max(1)).max(1);
    if share > free { (free * 3 / 4).max(1) } else { share }
}

/// The first contiguous free range of `want` granules, or else the largest there is.
fn hole(used: &[bool; GRANULES], want: usize) -> Option<GranuleRange> {
    let mut best: Option<(usize, usize)> = None;
    let mut first = 0;
    while first < GRANULES {
        let length = used[first..].iter().take_while(|u| !**u).count();
        if length >= want {
            best = Some((first, want));
            break;
        }
        if length > best.map_or(0, |(_, length)| length) {
            best = Some((first, length));
        }
        first += length + 1;
    }
    let (first, count) = best.filter(|(_, count)| *count > 0)?;
    Some(GranuleRange { first: u16::try_from(first).ok()?, count: u16::try_from(count).ok()? })
}

/// Granules that are leased.
#[must_use]
pub fn leased(allocation: &Allocation) -> usize {
    allocation.leases.iter().flat_map(|l| &l.ranges).map(|r| usize::from(r.count)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn demander(n: usize) -> Demander {
        Demander { node: format!("n{n:04}"), node_uid: format!("u{n}"), boot_id: "b".into() }
    }

    fn demanders(n: usize) -> BTreeSet<Demander> {
        (0..n).map(demander).collect()
    }

    fn counts(leases: &[Lease]) -> Vec<u16> {
        leases.iter().map(|l| l.ranges.iter().map(|r| r.count).sum()).collect()
    }

    #[test]
    fn the_first_share() {
        assert_eq!(counts(&lease(&[], &demanders(3), 3, 1).leases), [252, 252, 252]);
        assert_eq!(counts(&lease(&[], &demanders(1), 1, 1).leases), [756]);
        assert_eq!(counts(&lease(&[], &demanders(1), 5000, 1).leases), [94]);
        let many = lease(&[], &demanders(1100), 1100, 1);
        assert_eq!(many.leases.len(), GRANULES, "at least one granule, while there are any");
        assert_eq!(many.refused.len(), 1100 - GRANULES);
    }

    #[test]
    fn a_scarce_rest_is_shared() {
        let first = lease(&[], &demanders(1), 1, 1).leases;
        let second = lease(&first, &demanders(2), 1, 2).leases;
        // 504 would be the share; 252 are free.
        assert_eq!(counts(&second), [756, 189]);
        assert_eq!(second[1].generation, 2);
        assert_eq!(second[0], first[0]);
    }

    #[test]
    fn a_node_made_anew_gets_ports_of_its_own_and_a_rebooted_one_keeps_its() {
        let first = lease(&[], &demanders(1), 3, 1).leases;
        let mut d = demander(0);
        d.boot_id = "c".into();
        let rebooted = lease(&first, &BTreeSet::from([d.clone()]), 3, 2).leases;
        assert_eq!((rebooted.len(), rebooted[0].boot_id.as_str(), rebooted[0].generation), (1, "c", 1));
        d.node_uid = "another".into();
        let anew = lease(&first, &BTreeSet::from([d]), 3, 2).leases;
        assert_eq!(anew.len(), 2);
        assert_eq!(anew[0], first[0]);
    }

    proptest! {
        /// Any history of demand: nodes come, go, and are made anew.
        #[test]
        fn no_granule_is_leased_twice_and_no_lease_is_lost(
            history in proptest::collection::vec((proptest::collection::btree_set(0_usize..1500, 0..60), 1_usize..2000), 1..40)
        ) {
            let mut leases: Vec<Lease> = Vec::new();
            for (generation, (nodes, cluster)) in history.into_iter().enumerate() {
                let wanting: BTreeSet<_> = nodes.into_iter().map(demander).collect();
                let outcome = lease(&leases, &wanting, cluster, generation as u64);
                prop_assert_eq!(&outcome.leases[..leases.len()], &leases[..], "a lease changed");
                leases = outcome.leases;
                let mut owner = [None; GRANULES];
                for l in &leases {
                    prop_assert!(!l.ranges.is_empty());
                    for r in &l.ranges {
                        for g in &mut owner[usize::from(r.first)..][..usize::from(r.count)] {
                            prop_assert!(g.replace(&l.node).is_none(), "leased twice");
                        }
                    }
                }
                for d in &wanting {
                    let has = leases.iter().any(|l| l.node == d.node);
                    prop_assert!(has != outcome.refused.contains(&d.node));
                }
                // Refused only when nothing is left.
                prop_assert!(outcome.refused.is_empty() || owner.iter().all(Option::is_some));
            }
        }
    }
}
