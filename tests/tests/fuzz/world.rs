//! The node that fuzzed packets meet: selected pods of both families, egress addresses that this node and another
//! hold, and flows through all of them.

use datapath::addr::Ip;
use datapath::conntrack::{FlowState, Ticks};
use datapath::keys::{
    Delivery, DeliveryMode, EgressIp, Flow, FlowKey, GranuleRange, GranuleTable, Guard, Interface,
    InterfaceKind, Lease, NetworkKey, NetworkKind, Node, NodeId, Pod, Policy, Reply, ReplyKey, Settings,
};
use datapath::limits::{FIRST_PORT, GRANULE_PORTS};
use datapath::memory::Memory;
use datapath::tables::Tables as _;
use lab::kernel::interfaces::{OTHER_POD, POD, PORT, SECOND_UPLINK, TUNNEL, UPLINK};

use crate::rng::Rng;
use crate::walk::{ICMP, ICMP6, SCTP, TCP, UDP};

/// The bridge that [`PORT`] is a port of; no program is attached to it.
pub(crate) const BRIDGE: u32 = 13;
pub(crate) const VNI: u32 = 4711;
pub(crate) const PASS: u32 = 0xfeed_f00d;
/// This node and the other.
const SELF: NodeId = 1;
const OTHER: NodeId = 2;

/// An IPv6 address of a network, by its last group.
const fn v6(network: u16, last: u16) -> Ip {
    let ([a, b], [c, d]) = (network.to_be_bytes(), last.to_be_bytes());
    Ip { octets: [0xfd, 0, a, b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, c, d] }
}

/// What fits a packet's way, in bytes of IP.
pub(crate) const MTU: u16 = 1450;
/// Where IPv6 errors come from; IPv4's come from the first of [`NODES`].
pub(crate) const ROUTER6: Ip = v6(0x18, 0x11);
/// A prefix of every IPv6 address here but groups.
pub(crate) const PREFIX6: &str = "fd00::/16";
pub(crate) const NODES: [Ip; 2] = [Ip::v4([172, 18, 0, 11]), Ip::v4([172, 18, 0, 12])];
/// Address, whether selected, the interface that it may speak by, and the one that it is known by.
pub(crate) const PODS: [(Ip, bool, u32, u32); 6] = [
    (Ip::v4([10, 244, 1, 10]), true, POD, POD),
    (Ip::v4([10, 244, 1, 11]), false, OTHER_POD, OTHER_POD),
    (Ip::v4([10, 244, 1, 12]), true, PORT, BRIDGE),
    (v6(0x244, 0x10), true, POD, POD),
    (v6(0x244, 0x11), false, OTHER_POD, OTHER_POD),
    (v6(0x244, 0x12), true, PORT, BRIDGE),
];
/// The first of each family is held here, the second elsewhere, the third here on the second uplink.
pub(crate) const EGRESS: [Ip; 6] = [
    Ip::v4([172, 18, 0, 100]),
    Ip::v4([172, 18, 0, 101]),
    Ip::v4([192, 0, 2, 100]),
    v6(0x18, 0x100),
    v6(0x18, 0x101),
    v6(0x2, 0x100),
];
pub(crate) const OUTSIDE: [Ip; 6] = [
    Ip::v4([203, 0, 113, 5]),
    Ip::v4([198, 51, 100, 9]),
    Ip::v4([8, 8, 8, 8]),
    v6(0x113, 5),
    v6(0x51, 9),
    v6(0x888, 0x888),
];
pub(crate) const INSIDE: [Ip; 6] = [
    Ip::v4([10, 244, 2, 10]),
    Ip::v4([10, 96, 0, 10]),
    NODES[1],
    v6(0x244, 0x210),
    v6(0x96, 0x10),
    Ip { octets: [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] },
];

/// The link-layer address of an interface.
pub(crate) const fn mac_of(ifindex: u32) -> [u8; 6] {
    [2, 0, 0, 0, 0xa, ifindex as u8]
}

pub(crate) fn is_egress(address: Ip) -> bool {
    EGRESS.contains(&address)
}

pub(crate) fn is_selected(address: Ip) -> bool {
    PODS.iter().any(|(ip, selected, ..)| *selected && *ip == address)
}

/// Of the cluster's networks, or a node.
pub(crate) fn is_inside(address: Ip) -> bool {
    let networks = [Ip::v4([10, 244, 0, 0]), Ip::v4([10, 96, 0, 0]), v6(0x244, 0), v6(0x96, 0)];
    let len = if address.is_v4() { 14 } else { 4 };
    NODES.contains(&address) || networks.iter().any(|network| network.octets[..len] == address.octets[..len])
}

pub(crate) fn is_outside(address: Ip) -> bool {
    OUTSIDE.contains(&address)
}

/// One of a list, of this family.
pub(crate) fn of_family(rng: &mut Rng, list: &[Ip], v6: bool) -> Ip {
    let family: Vec<Ip> = list.iter().copied().filter(|ip| ip.is_v4() != v6).collect();
    rng.pick(&family)
}

/// A port of a granule that this node leases, or that the other does.
pub(crate) fn port_of(rng: &mut Rng, own: bool) -> u16 {
    let granule = rng.below(4) as u16 + if own { 0 } else { 10 };
    FIRST_PORT + granule * GRANULE_PORTS + rng.below(usize::from(GRANULE_PORTS)) as u16
}

/// Everything but flows.
pub(crate) fn policy_tables(capacity: usize) -> Memory {
    let mut t = Memory::new(1, capacity);
    t.settings = Settings {
        node: SELF,
        tunnel_port: 4795,
        tunnel_vni: VNI,
        tunnel_ifindex: TUNNEL,
        mtu: MTU,
        pass_token: PASS,
        hold_unknown: 1,
        spread: 2, // by connection: all addresses of the object are used
        tcp_established: 7440,
        tcp_transitory: 240,
        udp: 300,
        icmp: 60,
        rest: 65,
        uplink: UPLINK,
        router_v4: NODES[0],
        router_v6: ROUTER6,
        ..Settings::default()
    };
    for (id, (ip, selected, port, ifindex)) in (1..).zip(PODS) {
        t.pods.insert(ip, Pod { id, policy: u32::from(selected), ifindex, firewall: 0 });
        let mode = if port == PORT { DeliveryMode::Neighbour } else { DeliveryMode::Peer } as u8;
        t.delivery.insert(id, Delivery { ip, ifindex: port, mode, mtu: 1500, ..Delivery::default() });
    }
    for (ifindex, kind, guard, bridge) in [
        (POD, InterfaceKind::Pod, Guard::Own, 0),
        (OTHER_POD, InterfaceKind::Pod, Guard::None, 0),
        (PORT, InterfaceKind::Pod, Guard::Guarded, BRIDGE),
        (BRIDGE, InterfaceKind::Bridge, Guard::Guarded, 0),
        (UPLINK, InterfaceKind::Uplink, Guard::None, 0),
        (SECOND_UPLINK, InterfaceKind::Uplink, Guard::None, 0),
    ] {
        let (mac, guarded) = (mac_of(ifindex), guard as u8);
        t.interfaces.insert(ifindex, Interface { kind: kind as u8, guarded, mac, bridge });
    }
    for (ip, len, kind) in [
        (Ip::v4([10, 244, 0, 0]), 96 + 16, NetworkKind::Pods),
        (v6(0x244, 0), 32, NetworkKind::Pods),
        (Ip::v4([10, 96, 0, 0]), 96 + 16, NetworkKind::Services),
        (v6(0x96, 0), 32, NetworkKind::Services),
        (NODES[0], 128, NetworkKind::Node),
        (NODES[1], 128, NetworkKind::Node),
    ] {
        t.networks.insert(NetworkKey { prefix_len: len, ip }, kind as u32);
    }
    for (id, tunnel_ip) in [(SELF, NODES[0]), (OTHER, NODES[1])] {
        t.nodes.insert(id, Node { tunnel_ip });
    }
    let mut policy = Policy { len: EGRESS.len() as u32, ..Policy::default() };
    for (id, ip) in (1..).zip(EGRESS) {
        policy.egress[id as usize - 1] = id;
        t.egress_addrs.insert(ip, id);
        let uplink = if id % 3 == 0 { SECOND_UPLINK } else { UPLINK };
        let holder = if id % 3 == 2 { OTHER } else { SELF };
        let egress = EgressIp { ip, policy: 1, uplink, holder, uplink_mtu: 1500, ..EgressIp::default() };
        t.egress_ips.insert(id, egress);
        let mut table = GranuleTable::default();
        table.node[..4].fill(SELF);
        table.node[10..14].fill(OTHER);
        t.granules.insert(id, table);
        t.leases.insert(id, Lease::of(&[GranuleRange { first: 0, count: 4 }]));
    }
    t.policies.insert(1, policy);
    t
}

/// Fills the tables with this many flows, all of them alive.
pub(crate) fn fill(rng: &mut Rng, t: &Memory, flows: usize, now: Ticks) -> Vec<(FlowKey, Flow)> {
    t.flows.borrow_mut().clear();
    t.replies.borrow_mut().clear();
    (0..flows).filter_map(|_| add(rng, t, now)).collect()
}

fn add(rng: &mut Rng, t: &Memory, now: Ticks) -> Option<(FlowKey, Flow)> {
    let v6 = rng.percent(40);
    let pod = loop {
        let pod = rng.below(PODS.len());
        if PODS[pod].1 && PODS[pod].0.is_v4() != v6 {
            break pod;
        }
    };
    let protocol = rng.pick(&[TCP, TCP, UDP, UDP, if v6 { ICMP6 } else { ICMP }, SCTP]);
    let echo = matches!(protocol, ICMP | ICMP6);
    let egress_ip = of_family(rng, &EGRESS, v6);
    let egress = t.egress_addrs[&egress_ip];
    let path = u8::from(rng.percent(20));
    let key = FlowKey {
        pod: pod as u32 + 1,
        remote: of_family(rng, &OUTSIDE, v6),
        local_port: rng.pick(&[40000, 40001, 40002, 40003]),
        remote_port: if echo { 0 } else { rng.pick(&[80, 443, 53]) },
        protocol,
        path,
        pad: 0,
    };
    let flow = Flow {
        egress,
        policy: 1,
        egress_port: port_of(rng, true),
        state: FlowState::Established as u8,
        seen: now,
        walked: now,
        packets: 1,
        bytes: 100,
        ..Flow::default()
    };
    let local = if path == 1 && !v6 { NODES[0] } else { PODS[pod].0 };
    let reply = Reply { pod: key.pod, local_port: key.local_port, path, pad: 0, local };
    let reply_key = ReplyKey {
        egress,
        remote: key.remote,
        egress_port: flow.egress_port,
        remote_port: key.remote_port,
        protocol,
        pad: [0; 3],
    };
    // Two flows do not share an entry: then there is one less.
    t.insert_reply(&reply_key, &reply).ok()?;
    if t.insert_flow(&key, &flow).is_err() {
        t.remove_reply(&reply_key);
        return None;
    }
    Some((key, flow))
}
