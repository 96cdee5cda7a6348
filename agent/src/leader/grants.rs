//! What the leader tells each node, in the spec of its EgressNode: the digest of its Node object, and the ports that it
//! may use.
//!
//! A source node takes ports only from what stands here, and sends by the node that is named here. So the order of
//! hand-over is kept here: a lease is granted once the kernels of the address's owner and standbys are known to have it,
//! and another owner is named once its kernel has all that the node was granted before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::{Known, Plan};
use crate::addresses;
use crate::digest::digest;
use crate::hashed::Hashed;
use crate::model::{Allocation, Lease};
use crate::objects::{EgressNodeSpec, GrantedGranules, GrantedPorts};
use crate::watch::Write;

/// Writes the spec of every node's EgressNode, and removes those of nodes that are gone and lease nothing any more.
pub(super) fn node_specs(
    known: &Known<'_>,
    allocations: &BTreeMap<IpAddr, Arc<Allocation>>,
    plan: &mut Plan,
) {
    let around = known.around;
    // Looked up for each of perhaps a hundred thousand leases.
    let mut leases: Hashed<&str, BTreeMap<IpAddr, Vec<&Lease>>> = Hashed::new();
    let uids: Hashed<_, _> =
        around.objects.nodes.iter().map(|(name, n)| (name.as_str(), n.metadata.uid.as_str())).collect();
    let is_of = |lease: &Lease| uids.get(lease.node.as_str()).is_some_and(|uid| lease.node_uid == *uid);
    let mut lessees: Hashed<&str, ()> = Hashed::new();
    for (ip, a) in allocations {
        for lease in &a.leases {
            lessees.insert(lease.node.as_str(), ());
            if !is_of(lease) {
                continue;
            }
            leases.or_default(lease.node.as_str()).entry(*ip).or_default().push(lease);
        }
    }
    let nothing = BTreeMap::new();
    for (name, node) in &around.objects.nodes {
        let before = around.objects.egress_nodes.get(name).map(|e| &e.spec);
        let mut spec = digest(node);
        let leases = leases.get(name.as_str()).unwrap_or(&nothing);
        // What another node of the name was granted is nothing to this one.
        let granted = before.filter(|b| b.node_uid == spec.node_uid);
        spec.ranges = ranges(known, allocations, name, &spec.node_uid, leases, granted);
        if before != Some(&spec) {
            plan.writes.push(Write::NodeSpec(name.clone(), spec));
        }
    }
    if !around.complete {
        return;
    }
    for (name, node) in &around.objects.egress_nodes {
        let gone = !around.objects.nodes.contains_key(name) && lessees.get(name.as_str()).is_none();
        // An agent that runs where there never was a Node would only write it again.
        if gone && (!node.spec.node_uid.is_empty() || !(around.reachable)(name)) {
            plan.writes.push(Write::RemoveEgressNode(name.clone()));
        }
    }
}

fn ranges(
    known: &Known<'_>,
    allocations: &BTreeMap<IpAddr, Arc<Allocation>>,
    name: &str,
    uid: &str,
    leases: &BTreeMap<IpAddr, Vec<&Lease>>,
    granted: Option<&EgressNodeSpec>,
) -> Vec<GrantedPorts> {
    let Known { desired, around, tables, .. } = *known;
    let before: BTreeMap<IpAddr, &GrantedPorts> = granted
        .into_iter()
        .flat_map(|s| &s.ranges)
        .filter_map(|g| Some((addresses::address(&g.egress_ip).ok()?, g)))
        .collect();
    let agent = desired.nodes.get(name).and_then(|n| n.agent.as_ref()).filter(|a| a.node_uid == uid);
    let wanted = agent.into_iter().flat_map(|a| a.demand.keys());
    let addresses: BTreeSet<&IpAddr> = before.keys().chain(leases.keys()).chain(wanted).collect();
    let nothing = Vec::new();
    let entries = addresses.into_iter().filter_map(|ip| {
        let before = before.get(ip).copied();
        let Some(a) = allocations.get(ip) else {
            // Not known is not gone.
            return before.filter(|_| around.unknown(desired, ip)).cloned();
        };
        let before = before.filter(|b| b.uid == a.uid);
        // Somebody has led who knew more.
        if let Some(before) = before.filter(|b| b.generation > a.generation) {
            return Some(before.clone());
        }
        let leases = leases.get(ip).unwrap_or(&nothing);
        let (owner, ranges) = entry(a, leases, before, |node| tables.loaded(node, ip, &a.uid));
        match before {
            Some(b) if b.owner == owner && b.ranges == ranges => before.cloned(),
            _ => Some(GrantedPorts {
                egress_ip: ip.to_string(),
                uid: a.uid.clone(),
                generation: a.generation,
                owner,
                ranges,
            }),
        }
    });
    entries.collect()
}

/// What one node may use of one address, and by which node it sends.
fn entry(
    a: &Allocation,
    mine: &[&Lease],
    before: Option<&GrantedPorts>,
    loaded: impl Fn(&str) -> Option<u64>,
) -> (String, Vec<GrantedGranules>) {
    let all = mine.iter().flat_map(|l| {
        l.ranges.iter().map(|r| GrantedGranules { first: r.first, count: r.count, generation: l.generation })
    });
    let had = |r: &GrantedGranules| {
        before.is_some_and(|b| {
            b.ranges.iter().any(|o| {
                o.generation == r.generation && o.first <= r.first && r.first + r.count <= o.first + o.count
            })
        })
    };
    let (mut ranges, new): (Vec<_>, Vec<_>) = all.partition(had);
    let Some(owner) = &a.owner else {
        ranges.sort_unstable();
        return (String::new(), ranges);
    };
    let by_owner = loaded(owner);
    if ranges.iter().any(|r| by_owner.is_none_or(|generation| generation < r.generation)) {
        // The one that was named goes on forwarding until the new owner can.
        ranges.sort_unstable();
        return (before.map(|b| b.owner.clone()).unwrap_or_default(), ranges);
    }
    let by_all = a.standbys.iter().map(|s| loaded(s)).fold(by_owner, Option::min);
    ranges.extend(new.into_iter().filter(|r| by_all.is_some_and(|generation| generation >= r.generation)));
    ranges.sort_unstable();
    (owner.clone(), ranges)
}
