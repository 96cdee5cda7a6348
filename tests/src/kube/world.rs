//! A lab whose cluster has Outgate installed and running.

use std::time::Duration;

use serde_json::Value;

use super::KubeApi;
use super::install::Controller;
use super::request::path;
use crate::agent::Agent;
use crate::cni::{Pod, PodSpec};
use crate::command::{Process, eventually_ok};
use crate::lab::{Lab, LabSpec};
use crate::servers::ECHO;

/// For a change of an object to be in force everywhere, on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Nodes with agents, a controller on the first node, servers outside. Fields are dropped in this order.
#[derive(Debug)]
pub struct KubeLab {
    /// The nodes' agents.
    pub agents: Vec<Agent>,
    /// The controllers; the first one leads from the beginning.
    pub controllers: Vec<Controller>,
    /// The lab's own server at both outside hosts.
    pub servers: Vec<Process>,
    /// The API server.
    pub api: KubeApi,
    /// The lab.
    pub lab: Lab,
}

impl KubeLab {
    /// Installs Outgate and starts it, with some nodes labelled for egress IPs.
    #[track_caller]
    #[must_use]
    pub fn new(nodes: usize, assignable: &[&str]) -> Self {
        let mut this = Self::installed(nodes, assignable);
        this.controllers.push(this.api.start_controller(&this.lab, "node-a"));
        this.agents = this.api.start_agents(&this.lab);
        this
    }

    /// The same without any process of Outgate's.
    #[track_caller]
    #[must_use]
    pub fn installed(nodes: usize, assignable: &[&str]) -> Self {
        let lab = Lab::with(&LabSpec::default().nodes(nodes));
        let api = lab.kube_api();
        api.describe_cluster(&lab, assignable);
        api.install();
        let servers = [&lab.web, &lab.other].map(|host| lab.echo(&host.netns)).into();
        Self { agents: Vec::new(), controllers: Vec::new(), servers, api, lab }
    }

    /// Runs a pod.
    #[track_caller]
    #[must_use]
    pub fn pod(&self, node: &str, namespace: &str, name: &str) -> Pod {
        self.api.run_pod(&self.lab, node, &PodSpec::new(namespace, name))
    }

    /// The agent of a node.
    #[track_caller]
    #[must_use]
    pub fn agent(&self, node: &str) -> &Agent {
        self.agents.iter().find(|agent| agent.node == node).unwrap_or_else(|| panic!("no agent on {node}"))
    }

    /// Takes a node's agent out of the lab, to be killed or stopped.
    #[track_caller]
    #[must_use]
    pub fn take_agent(&mut self, node: &str) -> Agent {
        let at = self.agents.iter().position(|agent| agent.node == node);
        self.agents.remove(at.unwrap_or_else(|| panic!("no agent on {node}")))
    }

    /// Starts a node's agent again while the API server may be away: with the words and the token of the last time.
    #[track_caller]
    #[must_use]
    pub fn restart_agent(&self, node: &str) -> Agent {
        self.api.start_again(&self.lab, &format!("outgate-agent-{node}"))
    }

    /// The outside server, as pods dial it.
    #[must_use]
    pub fn web(&self) -> String {
        format!("{}:{ECHO}", self.lab.web.address)
    }

    /// Waits until the outside server sees a pod's connections with this source.
    #[track_caller]
    pub fn wait_source(&self, pod: &Pod, source: &str) {
        self.wait_source_of(pod, &[source]);
    }

    /// The same with one of several sources.
    #[track_caller]
    pub fn wait_source_of(&self, pod: &Pod, sources: &[&str]) {
        let what = format!("outside sees {} as one of {sources:?}", pod.full_name());
        eventually_ok(&what, LIMIT, || match pod.netns.tcp_source(&self.web(), Duration::from_millis(300)) {
            Ok(seen) if sources.contains(&seen.as_str()) => Ok(()),
            Ok(other) => Err(format!("it sees {other}")),
            Err(error) => Err(error),
        });
    }

    /// Waits until the status of an EgressIP says that these are its addresses' owners; gives them.
    #[track_caller]
    pub fn wait_items(
        &self,
        name: &str,
        mut wanted: impl FnMut(&[(String, String)]) -> bool,
    ) -> Vec<(String, String)> {
        self.api.wait(&format!("the owners of {name}"), &path::egress_ip(name), LIMIT, |object| {
            let items = items(object);
            wanted(&items).then_some(items)
        })
    }

    /// Waits until an address is held, and gives its owner.
    #[track_caller]
    #[must_use]
    pub fn wait_owner(&self, name: &str, address: &str) -> String {
        let items = self.wait_items(name, |items| items.iter().any(|(ip, _)| ip == address));
        items.into_iter().find(|(ip, _)| ip == address).expect("it was there").1
    }

    /// Waits until a condition of an object, in its status, has this status and reason; gives its message.
    #[track_caller]
    pub fn wait_condition(&self, path: &str, kind: &str, status: &str, reason: &str) -> String {
        self.api.wait(&format!("{kind}={status} because {reason}"), path, LIMIT, |object| {
            let conditions = object["status"]["conditions"].as_array()?;
            let found = conditions
                .iter()
                .find(|c| c["type"] == kind && c["status"] == status && c["reason"] == reason)?;
            Some(found["message"].as_str().unwrap_or_default().to_owned())
        })
    }
}

/// Addresses and owners in the status of an EgressIP.
#[must_use]
pub fn items(object: &Value) -> Vec<(String, String)> {
    let items = object["status"]["items"].as_array().into_iter().flatten();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    items.map(|item| (text(&item["egressIP"]), text(&item["node"]))).collect()
}
