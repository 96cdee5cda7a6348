//! Services as kube-proxy's iptables mode writes them, on one node.

use crate::family::Family;
use crate::lab::{Node, POD_NETWORKS};

/// The address a service is called by.
#[derive(Debug, Clone, Copy)]
pub enum Front<'a> {
    /// A `ClusterIP` or load-balancer address, by its port.
    Address(&'a str, u16),
    /// A port on every address of the node.
    NodePort(u16),
}

/// Whether the node puts its own address in for the client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masquerade {
    /// `externalTrafficPolicy: Cluster`: clients outside the cluster are masqueraded.
    Cluster,
    /// `externalTrafficPolicy: Local`: the pod sees its client.
    Local,
}

impl Node {
    /// The rules kube-proxy has for all services: the mark that asks for masquerade, and the drop of what
    /// conntrack calls invalid.
    pub(crate) fn proxy_rules(&self) {
        let rules = [
            "nat POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully",
            "filter FORWARD -m conntrack --ctstate INVALID -j DROP",
            "filter FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
            "filter FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        ];
        self.netns.iptables(&rules);
        if !self.address6.is_empty() {
            self.netns.ip6tables(&rules);
        }
    }

    /// Translates a service's address to `target` (`address:port`) for what is forwarded and for the node's own.
    pub fn service(&self, front: Front, protocol: &str, target: &str, masquerade: Masquerade) {
        let family = if target.starts_with('[') { Family::V6 } else { Family::V4 };
        let append = |rule: &str| match family {
            Family::V4 => self.netns.iptables(&[rule]),
            Family::V6 => self.netns.ip6tables(&[rule]),
        };
        let pods = POD_NETWORKS[family as usize];
        let matching = match front {
            Front::Address(address, port) => format!("-d {address} -p {protocol} --dport {port}"),
            Front::NodePort(port) => format!("-p {protocol} --dport {port} -m addrtype --dst-type LOCAL"),
        };
        for chain in ["PREROUTING", "OUTPUT"] {
            if masquerade == Masquerade::Cluster {
                append(&format!("nat {chain} {matching} ! -s {pods} -j MARK --set-xmark 0x4000/0x4000"));
            }
            append(&format!("nat {chain} {matching} -j DNAT --to-destination {target}"));
        }
    }
}
