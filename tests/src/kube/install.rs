//! Outgate installed in the lab's cluster: the manifests by kubectl, their pods' processes on the lab's nodes.
//!
//! No kubelet runs the DaemonSet's and the Deployment's pods. Their objects are made from the manifests' templates,
//! and what their containers would run is started in the nodes' namespaces ([`super::container`]), with the rights of the
//! same accounts, by tokens that are bound to these pods as a kubelet asks for them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::request::path;
use super::{KubeApi, write};
use crate::agent::Agent;
use crate::lab::{Lab, utf8};

/// The namespace that the manifests make.
pub const NAMESPACE: &str = "outgate-system";

/// A running controller; what can be asked of an agent can be asked of it.
pub type Controller = Agent;

/// The directory of the manifests.
#[must_use]
pub fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the checkout").join("deploy")
}

impl KubeApi {
    /// Installs as the README says: `kubectl apply -k deploy/`.
    #[track_caller]
    pub fn install(&self) {
        self.kubectl(&["apply", "-k", utf8(&manifests())]);
        for name in ["egressips.k8s.ovn.org", "egressnodes.outgate.dev", "egressallocations.outgate.dev"] {
            let name = format!("crd/{name}");
            self.kubectl(&["wait", "--for", "condition=Established", "--timeout", "20s", &name]);
        }
    }

    /// Starts what the DaemonSet's pod on a node runs.
    #[track_caller]
    #[must_use]
    pub fn start_agent(&self, lab: &Lab, node: &str) -> Agent {
        self.start_agent_with(lab, node, &[])
    }

    /// The same with further options.
    #[track_caller]
    #[must_use]
    pub fn start_agent_with(&self, lab: &Lab, node: &str, options: &[&str]) -> Agent {
        let set = self.get(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/outgate-agent"));
        self.start_pod(lab, node, &format!("outgate-agent-{node}"), &set, options)
    }

    /// Starts all nodes' agents and waits until they are ready.
    #[track_caller]
    #[must_use]
    pub fn start_agents(&self, lab: &Lab) -> Vec<Agent> {
        let mut agents: Vec<_> = lab.nodes.iter().map(|node| self.start_agent(lab, &node.name)).collect();
        agents.iter_mut().for_each(Agent::wait_ready);
        agents
    }

    /// Starts what one of the Deployment's pods runs, on a node's network.
    #[track_caller]
    #[must_use]
    pub fn start_controller(&self, lab: &Lab, node: &str) -> Controller {
        let set = self.get(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/outgate-controller"));
        self.start_pod(lab, node, &format!("outgate-controller-{node}"), &set, &[])
    }

    /// Makes a pod of a template, if it is not there yet, and starts its container's program on its node.
    #[track_caller]
    fn start_pod(&self, lab: &Lab, node: &str, name: &str, set: &Value, options: &[&str]) -> Agent {
        let template = &set["spec"]["template"];
        let container = &template["spec"]["containers"][0];
        let pod = path::pod(NAMESPACE, name);
        if self.try_get(&pod).is_none() {
            let mut spec = template["spec"].clone();
            spec["nodeName"] = json!(node);
            let metadata = json!({"name": name, "labels": template["metadata"]["labels"]});
            let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
            let _ = self.create(&format!("/api/v1/namespaces/{NAMESPACE}/pods"), &object);
            let address = &lab.node(node).address;
            let status =
                json!({"phase": "Running", "hostIP": address, "podIP": address, "podIPs": [{"ip": address}]});
            self.patch(&format!("{pod}/status"), &json!({"status": status}));
        }
        let account = template["spec"]["serviceAccountName"].as_str().expect("a ServiceAccount");
        self.write_token(account, name);
        let container = self.container(lab, (node, name), template, container, options);
        self.remember(name, &container);
        self.start_again(lab, name)
    }

    /// Starts a pod's program as it was started before.
    #[track_caller]
    pub(crate) fn start_again(&self, lab: &Lab, name: &str) -> Agent {
        let container = self.recall(name);
        let metrics = container.variable("OUTGATE_METRICS").expect("OUTGATE_METRICS, which the probes ask");
        let process = container.spawn(lab, name);
        Agent::new(&container.node, &lab.node(&container.node).netns, process, metrics)
    }

    /// Writes a kubeconfig, named after a pod, that reads a ServiceAccount's token from a file, as pods have it:
    /// bound to the pod, so that it ends with it.
    #[track_caller]
    pub fn write_token(&self, account: &str, pod: &str) {
        let uid = self.get(&path::pod(NAMESPACE, pod))["metadata"]["uid"].clone();
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "expirationSeconds": 3600,
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid},
            },
        });
        let place = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token");
        let answer = self.create(&place, &request);
        let token = answer["status"]["token"].as_str().expect("a token");
        let file = self.dir.join(format!("{pod}.token"));
        write(&file, token);
        self.write_kubeconfig(pod, &format!("tokenFile: {}", file.display()));
    }
}
