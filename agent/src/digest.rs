//! What nodes are told of one another's Node objects. Those change with every heartbeat of a kubelet, and a cluster has
//! thousands: the leader watches them, and puts what matters to other nodes into their EgressNodes, which change seldom.

use crate::objects::{EgressNodeSpec, Meta, Node, NodeAddress, NodeSpec, NodeStatus};

const INTERNAL: &str = "InternalIP";
const EXTERNAL: &str = "ExternalIP";

/// The digest of a Node, without any ports granted to it.
#[must_use]
pub fn digest(node: &Node) -> EgressNodeSpec {
    let addresses = |kind: &str| {
        node.status.addresses.iter().filter(|a| a.kind == kind).map(|a| a.address.clone()).collect()
    };
    let pod_cidrs = if node.spec.pod_cidrs.is_empty() && !node.spec.pod_cidr.is_empty() {
        vec![node.spec.pod_cidr.clone()]
    } else {
        node.spec.pod_cidrs.clone()
    };
    EgressNodeSpec {
        node_uid: node.metadata.uid.clone(),
        labels: node.metadata.labels.clone(),
        internal_ips: addresses(INTERNAL),
        external_ips: addresses(EXTERNAL),
        pod_cidrs,
        ranges: Vec::new(),
    }
}

/// The Node object that a digest is of, as far as the digest tells; none if it is of no node.
#[must_use]
pub fn node(name: &str, digest: &EgressNodeSpec) -> Option<Node> {
    if digest.node_uid.is_empty() {
        return None;
    }
    let address =
        |kind: &str, address: &String| NodeAddress { kind: kind.to_owned(), address: address.clone() };
    let internal = digest.internal_ips.iter().map(|a| address(INTERNAL, a));
    let external = digest.external_ips.iter().map(|a| address(EXTERNAL, a));
    Some(Node {
        metadata: Meta {
            name: name.to_owned(),
            uid: digest.node_uid.clone(),
            labels: digest.labels.clone(),
            ..Meta::default()
        },
        spec: NodeSpec { pod_cidrs: digest.pod_cidrs.clone(), ..NodeSpec::default() },
        status: NodeStatus { addresses: internal.chain(external).collect(), ..NodeStatus::default() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(spec: &str) -> Node {
        serde_saphyr::from_str(&format!(
            "metadata: {{name: a, uid: u, labels: {{zone: x}}, annotations: {{often: changed}}}}
spec: {{{spec}}}
status:
  conditions: [{{type: Ready, status: 'True', lastTransitionTime: now}}]
  addresses: [{{type: InternalIP, address: 10.0.0.1}}, {{type: Hostname, address: a}}, {{type: ExternalIP, address: 198.51.100.1}}, {{type: InternalIP, address: 'fd00::1'}}]"
        ))
        .unwrap()
    }

    #[test]
    fn what_other_nodes_read_of_a_node_survives_and_nothing_that_changes_often() {
        let d = digest(&read("podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, 'fd01::/64']"));
        assert_eq!(d.internal_ips, ["10.0.0.1", "fd00::1"]);
        assert_eq!(d.external_ips, ["198.51.100.1"]);
        assert_eq!((d.node_uid.as_str(), d.labels["zone"].as_str()), ("u", "x"));
        let again = node("a", &d).unwrap();
        assert_eq!(digest(&again), d);
        assert_eq!(again.metadata.name, "a");
        assert!(again.metadata.annotations.is_empty() && again.status.conditions.is_empty());
    }

    #[test]
    fn an_old_servers_only_pod_network_counts() {
        assert_eq!(digest(&read("podCIDR: 10.1.0.0/24")).pod_cidrs, ["10.1.0.0/24"]);
    }

    #[test]
    fn an_egress_node_that_the_leader_has_not_filled_in_is_no_node() {
        assert_eq!(node("a", &EgressNodeSpec::default()), None);
    }
}
