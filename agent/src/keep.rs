//! What an agent keeps of the cluster's objects. A cluster has thousands of nodes and an agent hears of all of them: of
//! others' objects it keeps what it decides by, and what only a leader decides by it does not. What is kept is no object to
//! be written.

use std::collections::HashSet;
use std::mem::take;

use ipnet::IpNet;

use crate::objects::{EgressAllocation, EgressNode, EgressNodeStatus, EgressUplink, Meta, Namespace};

/// Keeps of another node's EgressNode what the Node object says (the spec without the ports granted), where its tunnel
/// ends, its addresses, the networks of its uplinks (no egress IP may stand for one), and, for who knows allocations, whose
/// tables its kernel has.
pub fn of_another_node(node: &mut EgressNode) {
    let name = take(&mut node.metadata.name);
    node.metadata = Meta { name, ..Meta::default() };
    node.api_version = String::new();
    node.kind = String::new();
    node.spec.ranges = Vec::new();
    if node.status == EgressNodeStatus::default() {
        return;
    }
    let s = take(&mut node.status);
    let known = s.tunnel_addresses.contains(&s.tunnel_address);
    let networks = networks(&s.uplinks);
    let mut uplinks = Vec::new();
    if !networks.is_empty() {
        uplinks.push(EgressUplink { networks, up: true, ..EgressUplink::default() });
    }
    node.status = EgressNodeStatus {
        node_uid: s.node_uid,
        tunnel_address: if known { String::new() } else { s.tunnel_address },
        tunnel_addresses: s.tunnel_addresses,
        addresses: s.addresses,
        uplinks,
        loaded: s.loaded,
        ..EgressNodeStatus::default()
    };
    if node.status == EgressNodeStatus::default() {
        // Its agent has said something: a node whose agent has said nothing at all is another matter.
        node.status.uplinks.push(EgressUplink::default());
    }
}

/// Networks of uplinks that work, each once.
fn networks(uplinks: &[EgressUplink]) -> Vec<String> {
    let mut seen = HashSet::new();
    let working = uplinks.iter().filter(|u| u.up).flat_map(|u| &u.networks);
    let networks = working.filter_map(|n| n.parse::<IpNet>().ok()).map(|n| n.trunc());
    networks.filter(|n| seen.insert(*n)).map(|n| n.to_string()).collect()
}

/// Keeps of an allocation all but what its leases say of time and of boots.
pub fn of_an_allocation(allocation: &mut EgressAllocation) {
    allocation.api_version = String::new();
    allocation.kind = String::new();
    for lease in &mut allocation.spec.leases {
        lease.boot_id = Default::default();
        lease.since = Default::default();
    }
}

/// Keeps of a namespace its labels.
pub fn of_a_namespace(namespace: &mut Namespace) {
    let Meta { name, labels, .. } = take(&mut namespace.metadata);
    namespace.metadata = Meta { name, labels, ..Meta::default() };
}
