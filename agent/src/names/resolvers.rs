//! Whose answers count: the resolvers that pods are given.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use datapath::addr::Ip;
use datapath::keys::{RESOLVER, RESOLVER_ON_NODE};
use datapath::limits;

use crate::facts::Facts;
use crate::model::Desired;

/// The address that Kubernetes' documentation gives `NodeLocal DNSCache`. Every node has it for itself, on an interface
/// whose addresses are not among [`Facts`].
const NODE_LOCAL_DNS: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);

/// `RESOLVERS`, and how many addresses it has no room for.
///
/// In the order in which room is given: what EgressConfig and the cluster's DNS name (`Config::resolvers`), the nodes'
/// resolv.conf, node-local DNS, this node's addresses, other nodes'. A node's address may be a resolver with the
/// host's network, and is asked whatever the rules say, as is a link-local one.
#[must_use]
pub fn resolvers(desired: &Desired, facts: &Facts, resolv_conf: &[IpAddr]) -> (BTreeMap<Ip, u32>, usize) {
    let nodes = || {
        let others = desired.nodes.values().flat_map(|node| {
            let agents = node.agent.iter().flat_map(|agent| &agent.addresses);
            node.object_addresses.iter().chain(agents)
        });
        facts.addresses.iter().chain(others)
    };
    let named = desired.config.resolvers.iter().chain(resolv_conf);
    let named = named.map(|ip| (*ip, if is_link_local(ip) { RESOLVER_ON_NODE } else { 0 }));
    let local = std::iter::once((IpAddr::from(NODE_LOCAL_DNS), RESOLVER_ON_NODE));
    let mut map = BTreeMap::new();
    let mut left_out = 0;
    for (ip, bits) in named.chain(local).chain(nodes().map(|ip| (*ip, RESOLVER_ON_NODE))) {
        if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
            continue; // no pod reaches it
        }
        let ip = Ip::from(ip);
        if map.len() < limits::RESOLVERS as usize || map.contains_key(&ip) {
            *map.entry(ip).or_insert(RESOLVER) |= bits;
        } else {
            left_out += 1;
        }
    }
    (map, left_out)
}

fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{self, Node, NodeAgent};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn node(addresses: &[&str], agents: &[&str]) -> Node {
        Node {
            object_addresses: addresses.iter().map(|a| ip(a)).collect(),
            agent: Some(NodeAgent {
                addresses: agents.iter().map(|a| ip(a)).collect(),
                ..NodeAgent::default()
            }),
            ..Node::default()
        }
    }

    fn desired(config: &[&str], nodes: Vec<Node>) -> Desired {
        Desired {
            config: model::Config {
                resolvers: config.iter().map(|a| ip(a)).collect(),
                ..model::Config::default()
            },
            nodes: nodes.into_iter().enumerate().map(|(i, node)| (format!("n{i}"), node)).collect(),
            ..Desired::default()
        }
    }

    #[test]
    fn every_kind_with_its_bits() {
        let desired = desired(
            &["10.96.0.10", "169.254.25.10", "192.0.2.2"],
            vec![node(&["192.0.2.2"], &["2001:db8::2"]), Node::default()],
        );
        let facts = Facts { addresses: vec![ip("192.0.2.1"), ip("2001:db8::1")], ..Facts::default() };
        let conf = ["198.51.100.53", "2001:db8::53", "127.0.0.1", "::1", "192.0.2.1"].map(ip);
        let (found, left_out) = resolvers(&desired, &facts, &conf);
        let both = RESOLVER | RESOLVER_ON_NODE;
        let expected = [
            ("10.96.0.10", RESOLVER),
            ("198.51.100.53", RESOLVER),
            ("2001:db8::53", RESOLVER),
            ("169.254.25.10", both),
            ("169.254.20.10", both),
            ("192.0.2.1", both),
            ("192.0.2.2", both),
            ("2001:db8::1", both),
            ("2001:db8::2", both),
        ];
        assert_eq!(found, expected.into_iter().map(|(text, bits)| (ip(text).into(), bits)).collect());
        assert_eq!(left_out, 0);
    }

    #[test]
    fn other_nodes_are_left_out_first() {
        let many: Vec<String> = (0..5000u32).map(|i| Ipv4Addr::from(0x0a00_0000 + i).to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let desired = desired(&["192.0.2.53"], vec![node(&many, &["10.0.0.1"])]);
        let facts = Facts { addresses: vec![ip("192.0.2.1")], ..Facts::default() };
        let (found, left_out) = resolvers(&desired, &facts, &[ip("192.0.2.54")]);
        assert_eq!((found.len(), left_out), (4096, 5000 + 4 - 4096));
        for kept in ["192.0.2.53", "192.0.2.54", "169.254.20.10", "192.0.2.1"] {
            assert!(found.contains_key(&ip(kept).into()), "{kept}");
        }
    }
}
