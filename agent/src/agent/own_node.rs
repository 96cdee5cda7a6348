//! What an agent says of its own node, in its EgressNode, and what it may go on to say after a restart. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use datapath::addr::Ip;
use datapath::keys::IfIndex;

use crate::facts::Facts;
use crate::firewall::{self, FirewallState};
use crate::image::MapImage;
use crate::model::{self, Desired};
use crate::objects::{EgressNode, EgressNodeStatus, EgressUplink, LoadedAllocation, Meta, Objects};
use crate::ports::Ports;

/// Who and where the agent is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    /// The node's name.
    pub node: String,
    /// The kernel's boot id.
    pub boot_id: String,
}

/// What the agent before this one confirmed and the kernel still has. Taken back for the moment of a restart,
/// it would stop the nodes that wait for it from opening connections.
#[must_use]
pub fn still_loaded(
    identity: &Identity,
    objects: &Objects,
    kernel: &MapImage,
) -> BTreeMap<IpAddr, (String, u64)> {
    let Some(own) = objects.egress_nodes.get(&identity.node) else { return BTreeMap::new() };
    if own.status.boot_id != identity.boot_id {
        return BTreeMap::new();
    }
    own.status
        .loaded
        .iter()
        .filter_map(|l| Some((l.egress_ip.parse().ok()?, (l.uid.to_string(), l.generation))))
        .filter(|(ip, _)| {
            let id = kernel.egress_addrs.get(&Ip::from(*ip));
            id.is_some_and(|id| kernel.granules.contains_key(id))
        })
        .collect()
}

/// What the agent before this one said of firewalls, if the kernel still has any: until this one has looked at
/// them, no status is to change for a restart.
pub(super) fn still_in_force(
    identity: &Identity,
    objects: &Objects,
    kernel: &MapImage,
) -> BTreeMap<String, FirewallState> {
    match objects.egress_nodes.get(&identity.node) {
        Some(own) if own.status.boot_id == identity.boot_id && !kernel.firewalls.is_empty() => {
            firewall::reported(&own.status.firewalls)
        }
        _ => BTreeMap::new(),
    }
}

/// What the agent says about its node.
#[must_use]
pub fn egress_node(
    identity: &Identity,
    desired: &Desired,
    facts: &Facts,
    loaded: &BTreeMap<IpAddr, (String, u64)>,
    firewalls: &BTreeMap<String, FirewallState>,
    ports: &Ports,
) -> EgressNode {
    let node = desired.nodes.get(&identity.node);
    // An egress IP that somebody has put on an interface is the node's own: the model then refuses it, and
    // says so.
    let addresses: BTreeSet<_> = facts.addresses.iter().collect();
    let mac = |m: &[u8; 6]| m.map(|b| format!("{b:02x}")).join(":");
    let tunnels: Vec<_> = [false, true].iter().filter_map(|v6| tunnel_address(node, facts, *v6)).collect();
    let default_route = |index: &IfIndex| {
        let families = [(facts.default_v4, "IPv4"), (facts.default_v6, "IPv6")];
        families.iter().filter(|(i, _)| i.as_ref() == Some(index)).map(|(_, f)| (*f).to_owned()).collect()
    };
    EgressNode {
        metadata: Meta { name: identity.node.clone(), ..Meta::default() },
        status: EgressNodeStatus {
            node_uid: node.map(|n| n.uid.clone()).unwrap_or_default(),
            boot_id: identity.boot_id.clone(),
            tunnel_address: tunnels.first().map(ToString::to_string).unwrap_or_default(),
            tunnel_addresses: tunnels.iter().map(ToString::to_string).collect(),
            addresses: addresses.into_iter().map(ToString::to_string).collect(),
            uplinks: facts
                .uplinks
                .iter()
                .map(|(index, u)| EgressUplink {
                    name: u.name.clone(),
                    mac: mac(&u.mac),
                    networks: u.networks.iter().chain(&u.on_link).map(ToString::to_string).collect(),
                    default_route: default_route(index),
                    up: u.up,
                })
                .collect(),
            demand: ports.demand(),
            returned: ports.returned(),
            loaded: loaded
                .iter()
                .map(|(ip, (uid, generation))| LoadedAllocation {
                    egress_ip: ip.to_string().into(),
                    uid: uid.as_str().into(),
                    generation: *generation,
                })
                .collect(),
            firewalls: firewall::report(firewalls),
            shadowed: desired.shadowed.clone(),
        },
        ..EgressNode::default()
    }
}

/// Where the node's tunnel ends in a family: at an address that the Node object names, internal ones first, since
/// that is what other nodes and their firewalls know it by. Where it names none that is there, of either family:
/// at the address it had, while an uplink has it, else at the first address of an uplink.
fn tunnel_address(node: Option<&model::Node>, facts: &Facts, v6: bool) -> Option<IpAddr> {
    let is_there = |a: &IpAddr| facts.addresses.contains(a);
    let named = || {
        let internal = node.into_iter().flat_map(|n| &n.internal_addresses);
        internal.chain(node.into_iter().flat_map(|n| &n.object_addresses)).copied().filter(is_there)
    };
    if named().next().is_some() {
        return named().find(|a| a.is_ipv6() == v6);
    }
    let before = node.and_then(|n| n.agent.as_ref()).and_then(|a| a.tunnel_address(v6));
    let uplinks: Vec<_> = facts.uplinks.values().flat_map(|u| &u.networks).map(ipnet::IpNet::addr).collect();
    before
        .filter(|a| uplinks.contains(a))
        .into_iter()
        .chain(uplinks.iter().copied())
        .find(|a| a.is_ipv6() == v6)
}

#[cfg(test)]
mod tests {
    use datapath::keys::GranuleTable;
    use datapath::limits::GRANULES;

    use super::*;
    use crate::facts::Uplink;

    /// What agent a has said of its node, of this boot.
    fn said(boot: &str) -> Objects {
        let text = serde_json::json!({
            "apiVersion": "outgate.dev/v1alpha1", "kind": "EgressNode", "metadata": {"name": "a"},
            "status": {
                "nodeUID": "ua", "bootID": boot,
                "loaded": [
                    {"egressIP": "192.0.2.1", "uid": "x", "generation": 4},
                    {"egressIP": "192.0.2.2", "uid": "y", "generation": 5},
                    {"egressIP": "192.0.2.3", "uid": "z", "generation": 6},
                ],
                "firewalls": [{"namespace": "shop", "uid": "f", "generation": 1}],
            },
        });
        let node = serde_json::from_value(text).unwrap();
        Objects { egress_nodes: BTreeMap::from([("a".to_owned(), node)]), ..Objects::default() }
    }

    /// A kernel that has the table of the first address, and of the second only its name.
    fn kernel() -> MapImage {
        let key = |ip: &str| Ip::from(ip.parse::<IpAddr>().unwrap());
        MapImage {
            egress_addrs: [(key("192.0.2.1"), 1), (key("192.0.2.2"), 2)].into(),
            granules: [(1, GranuleTable { node: [0; GRANULES] }.into())].into(),
            firewalls: [(1, 1)].into(),
            ..MapImage::default()
        }
    }

    #[test]
    fn what_was_confirmed_is_only_while_the_very_kernel_has_it() {
        let of = |node: &str| Identity { node: node.into(), boot_id: "boot".into() };
        let loaded = |node: &str, boot: &str| still_loaded(&of(node), &said(boot), &kernel());
        let first = "192.0.2.1".parse().unwrap();
        assert_eq!(loaded("a", "boot"), BTreeMap::from([(first, ("x".to_owned(), 4))]));
        assert!(loaded("a", "before").is_empty(), "another kernel's word");
        assert!(loaded("b", "boot").is_empty());
        let firewalls = |boot: &str, kernel: &MapImage| still_in_force(&of("a"), &said(boot), kernel);
        assert_eq!(firewalls("boot", &kernel()).keys().collect::<Vec<_>>(), ["shop"]);
        assert!(firewalls("before", &kernel()).is_empty());
        assert!(firewalls("boot", &MapImage::default()).is_empty());
    }

    #[test]
    fn the_tunnel_ends_at_the_internal_address() {
        let facts = Facts {
            uplinks: BTreeMap::from([(
                2,
                Uplink {
                    name: "eth0".into(),
                    mac: [0; 6],
                    networks: vec![
                        "fd00::1/64".parse().unwrap(),
                        "192.0.2.5/24".parse().unwrap(),
                        "192.0.2.6/24".parse().unwrap(),
                    ],
                    on_link: Vec::new(),
                    mtu: 1500,
                    up: true,
                },
            )]),
            addresses: ["192.0.2.5", "10.9.0.1", "fd00::9"].iter().map(|a| a.parse().unwrap()).collect(),
            ..Facts::default()
        };
        let node = |internal: &[&str], before: &[&str]| model::Node {
            internal_addresses: internal.iter().map(|a| a.parse().unwrap()).collect(),
            agent: Some(model::NodeAgent {
                tunnel_addresses: before.iter().map(|a| a.parse().unwrap()).collect(),
                ..model::NodeAgent::default()
            }),
            ..model::Node::default()
        };
        let of = |n: &model::Node, v6| tunnel_address(Some(n), &facts, v6).unwrap().to_string();
        assert_eq!(of(&node(&["fd00::9", "10.9.0.1"], &[]), false), "10.9.0.1");
        assert_eq!(of(&node(&["fd00::9", "10.9.0.1"], &[]), true), "fd00::9");
        assert_eq!(of(&node(&["203.0.113.1"], &[]), false), "192.0.2.5", "another's view of the node");
        let other_family = tunnel_address(Some(&node(&["10.9.0.1"], &["fd00::1"])), &facts, true);
        assert_eq!(other_family, None, "peers expect none of it");
        let external = model::Node {
            object_addresses: ["10.9.0.1".parse().unwrap()].into(),
            ..node(&["203.0.113.1"], &["192.0.2.6"])
        };
        assert_eq!(of(&external, false), "10.9.0.1");
        assert_eq!(of(&node(&[], &["192.0.2.6", "fd00::1"]), false), "192.0.2.6");
        assert_eq!(of(&node(&[], &["192.0.2.9", "fd00::2"]), true), "fd00::1");
        assert_eq!(tunnel_address(None, &Facts::default(), false), None);
    }
}
