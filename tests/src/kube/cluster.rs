//! What kubelets and the scheduler would write: nodes, and pods with a node and addresses.

use serde_json::{Value, json};

use super::KubeApi;
use super::request::path;
use crate::cni::{Pod, PodSpec};
use crate::lab::{Lab, Node};
use crate::objects::Labels;

/// The label that makes a node able to own egress IPs.
pub const ASSIGNABLE: &str = "k8s.ovn.org/egress-assignable";

impl KubeApi {
    /// Makes the Node objects of the lab, ready, and two namespaces: `prod` (`env: prod`) and `dev` (`env: dev`).
    #[track_caller]
    pub fn describe_cluster(&self, lab: &Lab, assignable: &[&str]) {
        for node in &lab.nodes {
            let labels: Labels =
                if assignable.contains(&node.name.as_str()) { &[(ASSIGNABLE, "")] } else { &[] };
            self.create_node(node, labels);
        }
        self.create_namespace("prod", &[("env", "prod")]);
        self.create_namespace("dev", &[("env", "dev")]);
    }

    /// Makes one ready Node, as its kubelet registers it.
    #[track_caller]
    pub fn create_node(&self, node: &Node, labels: Labels) {
        let mut all = labels_of(labels);
        all["kubernetes.io/hostname"] = json!(node.name);
        let networks = node.pod_networks();
        let _ = self.create(
            "/api/v1/nodes",
            &json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node.name, "labels": all},
                "spec": {"podCIDR": networks[0], "podCIDRs": networks},
                "status": node_status(node, true),
            }),
        );
    }

    /// Says whether a node is ready, as its kubelet or the node controller does.
    #[track_caller]
    pub fn set_ready(&self, node: &Node, ready: bool) {
        let patch = json!({"status": node_status(node, ready)});
        self.patch(&format!("/api/v1/nodes/{}/status", node.name), &patch);
    }

    /// Makes a Namespace.
    #[track_caller]
    pub fn create_namespace(&self, name: &str, labels: Labels) {
        let _ = self.create(
            "/api/v1/namespaces",
            &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels_of(labels)}}),
        );
    }

    /// Runs a pod in the order of a real one: the object bound to its node, the network, the addresses in the
    /// status.
    #[track_caller]
    #[must_use]
    pub fn run_pod(&self, lab: &Lab, node: &str, spec: &PodSpec) -> Pod {
        let labels: Vec<_> = spec.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let labels = labels_of(&labels);
        let _ = self.create(
            &format!("/api/v1/namespaces/{}/pods", spec.namespace),
            &json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": spec.name, "labels": labels},
                "spec": {"nodeName": node, "containers": [{"name": "app", "image": "app"}]},
            }),
        );
        let pod = lab.run_pod(node, &spec.clone().unannounced());
        self.announce(&pod);
        pod
    }

    /// Writes a pod's addresses, as its kubelet does some time after it has started the containers.
    #[track_caller]
    pub fn announce(&self, pod: &Pod) {
        let ips: Vec<_> = [&pod.ip, &pod.ip6].into_iter().filter(|ip| !ip.is_empty()).collect();
        let ips_json: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        let patch = json!({"status": {"phase": "Running", "podIP": ips[0], "podIPs": ips_json}});
        self.patch(&format!("{}/status", path::pod(&pod.namespace, &pod.name)), &patch);
    }

    /// Ends a pod: its network, then its object.
    #[track_caller]
    pub fn delete_pod(&self, pod: &Pod) {
        pod.end_network();
        self.delete(&path::pod(&pod.namespace, &pod.name));
    }
}

/// What a kubelet says of its node.
fn node_status(node: &Node, ready: bool) -> Value {
    let mut addresses: Vec<_> =
        node.addresses().iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    addresses.push(json!({"type": "Hostname", "address": node.name}));
    let ready = if ready { "True" } else { "False" };
    json!({"addresses": addresses, "conditions": [{"type": "Ready", "status": ready, "reason": "Lab"}]})
}

fn labels_of(labels: Labels) -> Value {
    labels
        .iter()
        .map(|(key, value)| ((*key).to_owned(), json!(value)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}
