//! What an agent keeps of the cluster's objects. A cluster has thousands of nodes and an agent hears of all of them: of
//! others' objects it keeps what it decides by, and what only a leader decides by it does not. What is kept is no object to
//! be written.

use std::collections::BTreeSet;
use std::mem::take;

use ipnet::IpNet;

use crate::model::{self, Checked};
use crate::objects::{EgressAllocation, EgressNode, EgressNodeStatus, EgressUplink, Meta, Namespace};
use crate::text::Text;

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
    let mut seen = BTreeSet::new();
    let working = uplinks.iter().filter(|u| u.up).flat_map(|u| &u.networks);
    let networks = working.filter_map(|n| n.parse::<IpNet>().ok()).map(|n| n.trunc());
    networks.filter(|n| seen.insert(*n)).map(|n| n.to_string()).collect()
}

/// Keeps of an allocation all but what its leases say of time and of boots: as the model has it, so that it is not held
/// twice. One that makes no sense is kept as an object, for the model to say why.
pub fn of_an_allocation(allocation: &mut EgressAllocation) -> Option<Checked> {
    allocation.api_version = String::new();
    allocation.kind = String::new();
    for lease in &mut allocation.spec.leases {
        lease.boot_id = Text::default();
        lease.since = Text::default();
    }
    model::allocation(allocation).ok()
}

/// Keeps of a namespace its labels.
pub fn of_a_namespace(namespace: &mut Namespace) {
    let Meta { name, labels, .. } = take(&mut namespace.metadata);
    namespace.metadata = Meta { name, labels, ..Meta::default() };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::agent::{Identity, egress_node};
    use crate::compile::compile;
    use crate::digest;
    use crate::facts::{Facts, Uplink};
    use crate::ids::Ids;
    use crate::model::{desired, tests::objects};
    use crate::objects::{EgressNodeSpec, Objects};
    use crate::ports::Ports;

    const NODES: usize = 4;
    /// What every cluster here has; addresses of EgressIPs are of the networks that nodes may have.
    const USERS: &str = "kind: Namespace
metadata: {name: shop, uid: n, resourceVersion: '7', creationTimestamp: '2026-01-01T00:00:00Z', labels: {env: prod}}
---
kind: Pod
metadata: {name: p, namespace: shop}
spec: {nodeName: n0}
status: {phase: Running, podIP: 10.1.0.8}
---
kind: EgressFirewall
metadata: {name: default, namespace: shop, uid: f}
spec: {egress: [{type: Allow, to: {nodeSelector: {matchLabels: {role: db}}}}, {type: Deny, to: {cidrSelector: 0.0.0.0/0}}]}
---
kind: EgressIP
metadata: {name: e, uid: e}
spec:
  egressIPs: [192.0.2.0, 192.0.2.1, 192.0.2.2, 192.0.2.127, 192.0.2.200, 198.51.100.1, '2001:db8::', '2001:db8::1']
  namespaceSelector: {matchLabels: {env: prod}}";

    fn one_of(all: &'static [&'static str]) -> impl Strategy<Value = String> {
        prop::sample::select(all).prop_map(str::to_owned)
    }

    fn addresses() -> impl Strategy<Value = Vec<String>> {
        let pool = &["192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "2001:db8::2", "", "bad"];
        prop::collection::vec(one_of(pool), 0..4)
    }

    fn networks() -> impl Strategy<Value = Vec<String>> {
        let pool =
            &["192.0.2.3/24", "192.0.2.9/25", "192.0.2.1/32", "2001:db8::2/64", "10.1.0.0/24", "bad", ""];
        prop::collection::vec(one_of(pool), 0..4)
    }

    fn uplink() -> impl Strategy<Value = EgressUplink> {
        (networks(), any::<bool>(), any::<bool>()).prop_map(|(networks, up, default)| EgressUplink {
            name: "eth0".into(),
            mac: "02:00:00:00:00:01".into(),
            networks,
            default_route: if default { vec!["IPv4".into()] } else { vec![] },
            up,
        })
    }

    fn spec() -> impl Strategy<Value = EgressNodeSpec> {
        (any::<bool>(), one_of(&["db", "web"]), addresses(), addresses(), networks()).prop_map(
            |(exists, role, internal_ips, external_ips, pod_cidrs)| EgressNodeSpec {
                node_uid: if exists { "u".into() } else { String::new() },
                labels: [("role", role.as_str()), ("k8s.ovn.org/egress-assignable", "")].into(),
                internal_ips,
                external_ips,
                pod_cidrs,
                ranges: serde_json::from_str(
                    r#"[{"egressIP": "192.0.2.200", "uid": "a", "generation": 2, "owner": "n1",
                         "ranges": [{"first": 0, "count": 8, "generation": 2}]}]"#,
                )
                .unwrap(),
            },
        )
    }

    fn status() -> impl Strategy<Value = EgressNodeStatus> {
        let said = (
            one_of(&["u", "old", ""]),
            one_of(&["", "192.0.2.1", "192.0.2.2", "2001:db8::2", "bad"]),
            addresses(),
            addresses(),
            prop::collection::vec(uplink(), 0..3),
            prop::option::of(0_u64..4),
        )
            .prop_map(|(node_uid, tunnel_address, tunnel_addresses, addresses, uplinks, loaded)| {
                let rest = r#"{"bootID": "b", "demand": [{"egressIP": "192.0.2.200", "granules": 7}],
                    "returned": [{"egressIP": "192.0.2.200", "uid": "a", "ranges": []}],
                    "firewalls": [{"namespace": "shop", "version": "1"}],
                    "shadowed": [{"egressIP": "e", "by": "d", "pods": 1}]}"#;
                let mut status: EgressNodeStatus = serde_json::from_str(rest).unwrap();
                (status.node_uid, status.tunnel_address) = (node_uid, tunnel_address);
                (status.tunnel_addresses, status.addresses, status.uplinks) =
                    (tunnel_addresses, addresses, uplinks);
                status.loaded = loaded
                    .map(|generation| crate::objects::LoadedAllocation {
                        egress_ip: "192.0.2.200".into(),
                        uid: "a".into(),
                        generation,
                    })
                    .into_iter()
                    .collect();
                status
            });
        let silent = Just(EgressNodeStatus::default());
        let hardly = Just(EgressNodeStatus { boot_id: "b".into(), ..EgressNodeStatus::default() });
        prop_oneof![6 => said, 1 => silent, 1 => hardly]
    }

    fn allocation() -> impl Strategy<Value = String> {
        let lease = |n: usize, uid: &str| {
            format!(
                "{{node: n{n}, nodeUID: {uid:?}, bootID: b, since: '2026-01-01T00:00:00Z', generation: {n}, ranges: [{{first: {}, count: 8}}]}}",
                n * 8
            )
        };
        let uid = || one_of(&["u", "old", ""]);
        let leases = prop::collection::vec(uid(), NODES);
        (leases, 0..=NODES, one_of(&["2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "bad"]), 1_u16..100).prop_map(
            move |(uids, owner, until, first)| {
                let leases: Vec<_> = uids.iter().zip(0..).map(|(uid, n)| lease(n, uid)).collect();
                format!(
                    "kind: EgressAllocation
metadata: {{name: 192.0.2.200, uid: a, generation: 5}}
spec: {{egressIP: 192.0.2.200, owner: n{owner}, standbys: [n2], leases: [{}], resting: [{{first: {first}, count: 1, generation: 4, until: {until}}}]}}",
                    leases.join(", ")
                )
            },
        )
    }

    fn facts() -> Facts {
        let uplink = Uplink {
            name: "eth0".into(),
            mac: [2, 0, 0, 0, 0, 1],
            networks: vec!["192.0.2.1/24".parse().unwrap(), "2001:db8::1/64".parse().unwrap()],
            on_link: vec![],
            mtu: 1500,
            up: true,
        };
        let addresses = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        Facts { uplinks: BTreeMap::from([(2, uplink)]), addresses, ..Facts::default() }
    }

    /// The objects as a watch's view has them, of the agent of n0: of others' whole EgressNodes, or of what is kept.
    fn view(users: &Objects, nodes: &[(EgressNodeSpec, EgressNodeStatus)], cut: bool) -> Objects {
        let mut o = users.clone();
        for (n, (spec, status)) in nodes.iter().enumerate() {
            let name = format!("n{n}");
            let mut node = EgressNode {
                metadata: Meta { name: name.clone(), uid: "e".into(), ..Meta::default() },
                spec: spec.clone(),
                status: status.clone(),
                ..EgressNode::default()
            };
            if n > 0 && cut {
                of_another_node(&mut node);
            }
            if let Some(object) = digest::node(&name, &node.spec) {
                o.nodes.insert(name.clone(), object);
            }
            if n > 0 && cut {
                node.spec = EgressNodeSpec::default();
            }
            o.egress_nodes.insert(name, node);
        }
        if cut {
            for (name, mut allocation) in take(&mut o.egress_allocations) {
                match of_an_allocation(&mut allocation) {
                    Some(checked) => drop(o.checked_allocations.insert(name, checked)),
                    None => drop(o.egress_allocations.insert(name, allocation)),
                }
            }
            o.namespaces.values_mut().for_each(of_a_namespace);
        }
        o
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn an_agent_decides_the_same_by_what_it_keeps(
            nodes in prop::collection::vec((spec(), status()), NODES),
            allocation in prop::option::of(allocation()),
        ) {
            let users = objects(&[USERS.to_owned()].into_iter().chain(allocation).collect::<Vec<_>>().join("\n---\n"));
            let [whole, kept] = [false, true].map(|cut| {
                let desired = desired(&view(&users, &nodes, cut), "n0");
                let compiled = compile(&desired, &facts(), &mut Ids::default());
                let identity = Identity { node: "n0".into(), boot_id: "b".into() };
                let ports = Ports::recover(&nodes[0].1);
                let said =
                    egress_node(&identity, &desired, &facts(), &compiled.loaded, &compiled.firewalls, &ports);
                (compiled, said, desired)
            });
            prop_assert_eq!(&whole.0.problems, &kept.0.problems);
            prop_assert_eq!(&whole.0.loaded, &kept.0.loaded);
            // Too long to be printed.
            prop_assert!(whole.0 == kept.0, "other maps");
            prop_assert_eq!(whole.1, kept.1);
            let (whole, kept) = (whole.2, kept.2);
            prop_assert_eq!(whole.problems, kept.problems);
            prop_assert_eq!(whole.egress_ips, kept.egress_ips);
            prop_assert_eq!(whole.pods, kept.pods);
            prop_assert_eq!(whole.firewalls, kept.firewalls);
            prop_assert_eq!(whole.grants, kept.grants);
            prop_assert_eq!(whole.nodes.keys().collect::<Vec<_>>(), kept.nodes.keys().collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_only_a_leader_needs_is_not_kept() {
        let mut node: EgressNode = serde_json::from_str(
            r#"{"metadata": {"name": "b", "uid": "u", "generation": 3},
                "spec": {"nodeUID": "n", "labels": {"a": "b"}, "ranges": [{"egressIP": "192.0.2.1"}]},
                "status": {"nodeUID": "n", "bootID": "b", "tunnelAddress": "192.0.2.2", "tunnelAddresses": ["192.0.2.2"],
                    "addresses": ["192.0.2.2"], "demand": [{"egressIP": "192.0.2.1"}],
                    "uplinks": [{"name": "eth0", "mac": "x", "networks": ["192.0.2.2/24", "192.0.2.3/24"], "up": true},
                        {"name": "eth1", "networks": ["198.51.100.1/24"]}]}}"#,
        )
        .unwrap();
        of_another_node(&mut node);
        assert_eq!(node.metadata, Meta { name: "b".into(), ..Meta::default() });
        assert!(node.spec.ranges.is_empty() && node.spec.labels.contains_key("a"));
        let networks = vec!["192.0.2.0/24".to_owned()];
        let expected = EgressNodeStatus {
            node_uid: "n".into(),
            tunnel_addresses: vec!["192.0.2.2".into()],
            addresses: vec!["192.0.2.2".into()],
            uplinks: vec![EgressUplink { networks, up: true, ..EgressUplink::default() }],
            ..EgressNodeStatus::default()
        };
        assert_eq!(node.status, expected);
        let again = node.clone();
        of_another_node(&mut node);
        assert_eq!(node, again, "nothing is left to take");
    }
}
