//! What all nodes need to know of a Node object: the leader copies it into the spec of the node's EgressNode, so that
//! in a cluster nobody else watches Nodes, whose status changes all the time.

use std::collections::BTreeSet;

use crate::objects::{EgressNodeSpec, Node};

/// The digest of a Node object: an EgressNode's spec without ports.
#[must_use]
pub fn digest(node: &Node) -> EgressNodeSpec {
    let addresses = |kind: &str| {
        let of_kind = node.status.addresses.iter().filter(|a| a.kind == kind);
        of_kind.map(|a| a.address.clone()).collect()
    };
    // The first is also among all of them, where there is more than one.
    let cidrs: BTreeSet<_> =
        node.spec.pod_cidrs.iter().chain([&node.spec.pod_cidr]).filter(|c| !c.is_empty()).cloned().collect();
    EgressNodeSpec {
        node_uid: node.metadata.uid.clone(),
        labels: node.metadata.labels.clone(),
        internal_ips: addresses("InternalIP"),
        external_ips: addresses("ExternalIP"),
        pod_cidrs: cidrs.into_iter().collect(),
        ranges: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_matters_of_a_node() {
        let node: Node = serde_saphyr::from_str(
            "metadata: {name: a, uid: u, labels: {x: y}, annotations: {much: more}}
spec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, 'fd00::/64']}
status:
  addresses:
  - {type: Hostname, address: a}
  - {type: InternalIP, address: 192.0.2.9}
  - {type: InternalIP, address: 192.0.2.1}
  - {type: ExternalIP, address: 198.51.100.1}
  conditions: [{type: Ready, status: 'True', lastHeartbeatTime: now}]",
        )
        .unwrap();
        let d = digest(&node);
        assert_eq!((d.node_uid.as_str(), d.labels["x"].as_str()), ("u", "y"));
        assert_eq!(d.internal_ips, ["192.0.2.9", "192.0.2.1"], "in their order");
        assert_eq!(d.external_ips, ["198.51.100.1"]);
        assert_eq!(d.pod_cidrs, ["10.1.0.0/24", "fd00::/64"]);
        assert!(d.ranges.is_empty());
    }
}
