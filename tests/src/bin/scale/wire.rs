//! The cluster's objects as the API server sends them.

use outgate::objects::{Condition, EgressIp, EgressIpReport, Meta, Node, Objects};
use outgate::watch::kube::{Kind, Mirror};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::cluster::{GATEWAYS, egress_ip_object, meta, namespaces_on, node_name, pod_ip};

/// Bytes of a Pod and of a Node that Outgate does not read, so that they are as long as real ones.
const POD: usize = 6_000;
const NODE: usize = 11_000;

/// One kind's list: the texts of its pages.
pub(crate) type List = (Kind, Vec<String>);

/// Metadata, with who wrote which field, as the server keeps it.
fn metadata(meta: &Meta, managers: &[&str]) -> Value {
    let fields = json!({
        "f:metadata": {"f:labels": {".": {}, "f:team": {}}, "f:annotations": {}},
        "f:spec": {".": {}, "f:first": {}, "f:second": {}, "f:third": {}, "f:fourth": {}},
        "f:status": {".": {}, "f:first": {}, "f:second": {}, "f:third": {}},
    });
    let managed: Vec<_> = managers
        .iter()
        .map(|manager| {
            json!({
                "manager": manager, "operation": "Update", "apiVersion": "outgate.dev/v1alpha1",
                "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": fields,
            })
        })
        .collect();
    let mut metadata = json!(meta);
    metadata["managedFields"] = json!(managed);
    metadata
}

fn conditions(all: &[Condition]) -> Value {
    json!(all)
}

/// A Node.
pub(crate) fn node(node: &Node) -> Value {
    json!({
        "metadata": metadata(&node.metadata, &["kubelet"]),
        "spec": {"podCIDR": node.spec.pod_cidrs[0], "podCIDRs": node.spec.pod_cidrs},
        "status": {
            "addresses": node.status.addresses.iter()
                .map(|a| json!({"type": a.kind, "address": a.address})).collect::<Vec<_>>(),
            "conditions": conditions(&node.status.conditions),
            "images": "x".repeat(NODE),
        },
    })
}

/// An EgressIP and its status.
pub(crate) fn egress_ip(e: &EgressIp, status: Option<&EgressIpReport>) -> Value {
    let selector = e.spec.namespace_selector.as_ref().map(|s| &s.match_labels);
    let mut object = json!({
        "apiVersion": "k8s.ovn.org/v1", "kind": "EgressIP",
        "metadata": metadata(&e.metadata, &["kubectl"]),
        "spec": {"egressIPs": e.spec.egress_ips, "namespaceSelector": {"matchLabels": selector}},
    });
    if let Some(report) = status {
        object["status"] = json!(report.status);
    }
    object
}

/// A pod of a node, in a namespace.
pub(crate) fn pod(node: usize, n: usize, namespace: usize) -> Value {
    let mut meta = meta(format!("web-6d4cf56db6-{node:04}{n:02}"), &[("app", "web".to_owned())]);
    meta.namespace = format!("namespace-{namespace:04}");
    let ip = pod_ip(node, n);
    json!({
        "metadata": metadata(&meta, &["kubelet"]),
        "spec": {"nodeName": node_name(node), "containers": "x".repeat(POD)},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    })
}

/// An EgressNode.
pub(crate) fn egress_node(objects: &Objects, n: usize) -> Value {
    let node = &objects.egress_nodes[&node_name(n)];
    let mut value = json!(node);
    value["metadata"] = metadata(&node.metadata, &["outgate-controller", "outgate-agent"]);
    value
}

/// An allocation.
pub(crate) fn allocation(objects: &Objects, name: &str) -> Value {
    let allocation = &objects.egress_allocations[name];
    let mut value = json!(allocation);
    value["metadata"] = metadata(&allocation.metadata, &["outgate-controller"]);
    value
}

fn list(kind: Kind, items: &[Value]) -> List {
    let page = |items: &[Value]| {
        json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": items})
            .to_string()
    };
    (kind, items.chunks(Mirror::page(kind)).map(page).collect())
}

impl Cluster {
    /// What everybody lists.
    fn common(&self) -> Vec<List> {
        let o = &self.objects;
        let egress_ips: Vec<_> =
            o.egress_ips.iter().map(|(name, e)| egress_ip(e, self.statuses.get(name))).collect();
        let nodes: Vec<_> = (0..o.egress_nodes.len()).map(|n| egress_node(o, n)).collect();
        vec![list(Kind::EgressNode, &nodes), list(Kind::EgressIp, &egress_ips)]
    }

    fn allocations(&self) -> List {
        let o = &self.objects;
        let all: Vec<_> = o.egress_allocations.keys().map(|name| allocation(o, name)).collect();
        list(Kind::EgressAllocation, &all)
    }

    /// What the agent of a node lists at its start.
    pub(crate) fn listed_by_agent(&self, n: usize) -> Vec<List> {
        let mut lists = self.common();
        let namespaces: Vec<_> = self
            .objects
            .namespaces
            .values()
            .map(|n| json!({"metadata": metadata(&n.metadata, &["kubectl"])}))
            .collect();
        lists.push(list(Kind::Namespace, &namespaces));
        lists.push(list(Kind::Node, &[node(&self.objects.nodes[&node_name(n)])]));
        let pods: Vec<_> =
            namespaces_on(n).enumerate().map(|(place, namespace)| pod(n, place, namespace)).collect();
        lists.push(list(Kind::Pod, &pods));
        if n < GATEWAYS {
            lists.push(self.allocations());
        }
        lists
    }

    /// What the controller lists.
    pub(crate) fn listed_by_controller(&self) -> Vec<List> {
        let mut lists = self.common();
        lists.push(list(Kind::Node, &self.objects.nodes.values().map(node).collect::<Vec<_>>()));
        lists.push(self.allocations());
        lists
    }
}

/// A new EgressIP.
pub(crate) fn new_egress_ip(n: usize) -> Value {
    egress_ip(&egress_ip_object(n), None)
}
