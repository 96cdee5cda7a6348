//! `EgressFirewall` objects as people write them.

use std::fmt::Write as _;

use crate::objects::Objects;
use crate::{Agent, Lab, LabSpec, Pod, PodSpec, Process};

/// Two nodes with agents, and the lab's own servers at the outside hosts.
#[derive(Debug)]
pub struct Cluster {
    /// The lab.
    pub lab: Lab,
    /// An agent on each node.
    pub agents: Vec<Agent>,
    /// Its servers, which end with it.
    pub servers: Vec<Process>,
}

impl Cluster {
    /// Brings it up.
    #[must_use]
    pub fn new(spec: LabSpec) -> Self {
        let lab = Lab::with(&spec.nodes(2));
        lab.describe_cluster(&["node-b"]);
        let agents = lab.start_agents();
        Self::serve(lab, agents)
    }

    /// Starts the servers in a lab whose agents are there.
    #[must_use]
    pub fn serve(lab: Lab, agents: Vec<Agent>) -> Self {
        let servers = [&lab.web, &lab.other].map(|host| lab.echo(&host.netns)).into();
        Self { lab, agents, servers }
    }

    /// A pod of its node's name.
    #[must_use]
    pub fn pod(&self, node: &str, namespace: &str) -> Pod {
        self.lab.run_pod(node, &PodSpec::new(namespace, node))
    }

    /// A pod of namespace `prod` on each node.
    #[must_use]
    pub fn pods(&self) -> [Pod; 2] {
        ["node-a", "node-b"].map(|node| self.pod(node, "prod"))
    }

    /// Gives namespace `prod` a firewall.
    pub fn firewall(&self, rules: &[Rule]) {
        self.lab.objects.firewall("prod", rules);
    }
}

/// One rule of `spec.egress`.
#[derive(Debug, Clone)]
pub struct Rule {
    to: String,
    kind: &'static str,
    ports: Vec<String>,
}

/// `type: Allow`.
#[must_use]
pub fn allow(to: &str) -> Rule {
    Rule::new("Allow", to)
}

/// `type: Deny`.
#[must_use]
pub fn deny(to: &str) -> Rule {
    Rule::new("Deny", to)
}

impl Rule {
    /// `key=value` is a node selector, what has a slash or a colon or ends in a digit a `cidrSelector`, all else a
    /// `dnsName`.
    fn new(kind: &'static str, to: &str) -> Self {
        let to = match to.split_once('=') {
            Some((key, value)) => format!("nodeSelector: {{matchLabels: {{\"{key}\": \"{value}\"}}}}"),
            None if to.contains(['/', ':']) || to.ends_with(|c: char| c.is_ascii_digit()) => {
                format!("cidrSelector: \"{to}\"")
            }
            None => format!("dnsName: \"{to}\""),
        };
        Self { to, kind, ports: Vec::new() }
    }

    /// For a protocol's port.
    #[must_use]
    pub fn port(self, protocol: &str, port: u16) -> Self {
        self.with(format!("protocol: {protocol}, port: {port}"))
    }

    /// For a protocol's ports from one to another.
    #[must_use]
    pub fn ports(self, protocol: &str, first: u16, last: u16) -> Self {
        self.with(format!("protocol: {protocol}, port: {first}, endPort: {last}"))
    }

    fn with(mut self, ports: String) -> Self {
        self.ports.push(ports);
        self
    }
}

/// An `EgressFirewall`'s manifest.
#[must_use]
pub fn manifest(namespace: &str, rules: &[Rule]) -> String {
    let mut text = format!(
        "apiVersion: k8s.ovn.org/v1
kind: EgressFirewall
metadata:
  name: default
  namespace: {namespace}
spec:
  egress:{}
",
        if rules.is_empty() { " []" } else { "" }
    );
    for Rule { to, kind, ports } in rules {
        let _ = writeln!(text, "  - type: {kind}\n    to: {{{to}}}");
        if !ports.is_empty() {
            let _ = writeln!(text, "    ports:");
        }
        for ports in ports {
            let _ = writeln!(text, "    - {{{ports}}}");
        }
    }
    text
}

impl Objects {
    /// A namespace's `EgressFirewall`.
    pub fn firewall(&self, namespace: &str, rules: &[Rule]) {
        self.write(&file(namespace), &manifest(namespace, rules));
    }

    /// Removes it.
    pub fn remove_firewall(&self, namespace: &str) {
        self.remove(&file(namespace));
    }
}

fn file(namespace: &str) -> String {
    format!("firewall-{namespace}.yaml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_firewall_reads_like_the_documentation() {
        let rules = [
            allow("1.2.3.0/24").port("TCP", 80),
            allow("www.example.com"),
            allow("role=db").ports("UDP", 1, 9),
            deny("::/0"),
        ];
        let text = manifest("prod", &rules);
        let wanted = "apiVersion: k8s.ovn.org/v1
kind: EgressFirewall
metadata:
  name: default
  namespace: prod
spec:
  egress:
  - type: Allow
    to: {cidrSelector: \"1.2.3.0/24\"}
    ports:
    - {protocol: TCP, port: 80}
  - type: Allow
    to: {dnsName: \"www.example.com\"}
  - type: Allow
    to: {nodeSelector: {matchLabels: {\"role\": \"db\"}}}
    ports:
    - {protocol: UDP, port: 1, endPort: 9}
  - type: Deny
    to: {cidrSelector: \"::/0\"}
";
        assert_eq!(text, wanted);
    }
}
