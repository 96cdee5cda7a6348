//! What the agent knows of its own node's network, read from netlink: an input of `compile`.

mod fresh;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use datapath::keys::IfIndex;
use ipnet::IpNet;

pub use self::fresh::{Ended, Fresh, Requests, fresh};

/// The node's interfaces and addresses at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// Interfaces that lead out of the node, by index.
    pub uplinks: BTreeMap<IfIndex, Uplink>,
    /// Interfaces that lead to pods, by index.
    pub pod_interfaces: BTreeMap<IfIndex, PodInterface>,
    /// Bridges that have a pod interface as a port, or may get one, by index.
    pub bridges: BTreeMap<IfIndex, Bridge>,
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
    /// The uplink that the best IPv4 default route leaves by, if it is one.
    pub default_v4: Option<IfIndex>,
    /// The same for IPv6.
    pub default_v6: Option<IfIndex>,
    /// IPv6 proxy-neighbour entries of the uplinks, ours and others'.
    pub proxies: BTreeMap<(IfIndex, Ipv6Addr), Proxy>,
    /// Nameservers of the node's resolv.conf.
    pub nameservers: Vec<IpAddr>,
    /// Index of the tunnel device `outgate0`; 0 until it exists.
    pub tunnel_ifindex: IfIndex,
}

impl Facts {
    /// The uplink of the default route of an address's family.
    #[must_use]
    pub const fn default_uplink(&self, ip: &IpAddr) -> Option<IfIndex> {
        if ip.is_ipv4() { self.default_v4 } else { self.default_v6 }
    }

    /// Whether the node has an interface.
    #[must_use]
    pub fn has(&self, index: IfIndex) -> bool {
        self.pod_interfaces.contains_key(&index)
            || self.bridges.contains_key(&index)
            || self.uplinks.contains_key(&index)
            || self.others.contains(&index)
    }

    /// Forgets pod interfaces that are not there any more, and what leads to them.
    pub fn forget(&mut self, gone: &BTreeSet<IfIndex>) {
        self.pod_interfaces.retain(|index, _| !gone.contains(index));
        self.host_routes.retain(|_, index| !gone.contains(index));
        self.bridge_ports.retain(|_, index| !gone.contains(index));
    }
}

/// Whose a proxy-neighbour entry is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proxy {
    /// An agent made it.
    Ours,
    /// The node's operator or another program did: left alone.
    Foreign,
}

/// An interface that leads out of the node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its addresses with their networks, as configured (`192.0.2.7/24`: host bits kept); no link-local ones.
    pub networks: Vec<IpNet>,
    /// IPv6 prefixes that routers advertise as on the link: an address that DHCP gave is a /128 and
    /// has no network of its own (RFC 5942, 4).
    pub on_link: Vec<IpNet>,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up and has carrier.
    pub up: bool,
}

impl Uplink {
    /// Length of the longest prefix of its networks that contains an address.
    #[must_use]
    pub fn prefix_of(&self, ip: &IpAddr) -> Option<u8> {
        self.networks.iter().chain(&self.on_link).filter(|n| n.contains(ip)).map(IpNet::prefix_len).max()
    }
}

/// A bridge that has a pod interface as a port, or may get one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bridge {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its MTU.
    pub mtu: u32,
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
    /// Its MTU.
    pub mtu: u32,
}
