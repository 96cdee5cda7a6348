//! What the agent knows of its own node's network, read from netlink: an input of `compile`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use datapath::keys::IfIndex;
use ipnet::IpNet;

/// The node's interfaces and addresses at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// Interfaces that lead out of the node, by index.
    pub uplinks: BTreeMap<IfIndex, Uplink>,
    /// Interfaces that lead to pods, by index.
    pub pod_interfaces: BTreeMap<IfIndex, PodInterface>,
    /// Bridges that have a pod interface as a port, with their hardware address.
    pub bridges: BTreeMap<IfIndex, [u8; 6]>,
    /// All other interfaces. What is in none of these has not been looked at.
    pub others: BTreeSet<IfIndex>,
    /// Host routes to single addresses (`10.1.2.3 dev vethX`), by address.
    pub host_routes: BTreeMap<IpAddr, IfIndex>,
    /// Connected networks on bridges of `bridges` (`10.1.2.0/24 dev cni0`).
    pub bridge_networks: BTreeMap<IpNet, IfIndex>,
    /// Where a bridge learnt an address: pod address to the bridge's port (neighbour and forwarding tables).
    pub bridge_ports: BTreeMap<IpAddr, IfIndex>,
    /// Every address of the node, on any interface, without loopback and link-local.
    pub addresses: Vec<IpAddr>,
    /// Index of the tunnel device `outgate0`; 0 until it exists.
    pub tunnel_ifindex: IfIndex,
}

/// An interface that leads out of the node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The networks of its addresses, as configured (`192.0.2.7/24`: host bits kept).
    pub networks: Vec<IpNet>,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up and has carrier.
    pub up: bool,
}

/// An interface that leads to a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodInterface {
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The bridge it is a port of; 0 for none.
    pub bridge: IfIndex,
    /// Whether it is a veth whose peer is in another network namespace (`bpf_redirect_peer` works).
    pub peer_elsewhere: bool,
}
