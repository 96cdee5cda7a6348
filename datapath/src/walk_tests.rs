//! Packets walked through the decisions of two nodes in memory: out and back, and everything that must not
//! leave.

#![expect(clippy::wildcard_enum_match_arm, reason = "what is not the verdict looked for fails the test")]

use std::vec::Vec;

use crate::addr::Ip;
use crate::conntrack::seconds;
use crate::fragments::{Place, recall};
use crate::from_tunnel::from_tunnel;
use crate::from_uplink::{claims, from_uplink};
use crate::keys::{
    Delivery, DeliveryMode, EgressIp, FlowPath, GranuleRange, GranuleTable, Guard, Interface, InterfaceKind,
    Lease, NetworkKey, NetworkKind, Node, OpenedBy, Pod, Policy, Settings, Tuple, Unassigned,
};
use crate::limits::{FIRST_PORT, FRAGMENT_SECONDS, GRANULE_PORTS};
use crate::memory::Memory;
use crate::packet::{ACK, FIN, ICMP, Kind, Packet, Part, RST, SCTP, SYN, TCP, UDP};
use crate::tables::Tables as _;
use crate::to_pod::to_pod;
use crate::verdict::{DropReason, FromOutside, FromPod, Keep, ReverseSnat, Snat, ToUplink, Way};

pub(crate) const POD: Ip = Ip::v4([10, 244, 1, 10]);
pub(crate) const OTHER_POD: Ip = Ip::v4([10, 244, 1, 11]);
pub(crate) const REMOTE_POD: Ip = Ip::v4([10, 244, 2, 10]);
pub(crate) const SERVICE: Ip = Ip::v4([10, 96, 0, 10]);
pub(crate) const NODE_A: Ip = Ip::v4([172, 18, 0, 11]);
pub(crate) const NODE_B: Ip = Ip::v4([172, 18, 0, 12]);
const EGRESS: Ip = Ip::v4([172, 18, 0, 100]);
const EGRESS_2: Ip = Ip::v4([172, 18, 0, 101]);
pub(crate) const SERVER: Ip = Ip::v4([203, 0, 113, 5]);
pub(crate) const SERVER_2: Ip = Ip::v4([203, 0, 113, 6]);

pub(crate) const POD_IF: u32 = 10;
pub(crate) const OTHER_IF: u32 = 11;
pub(crate) const UPLINK: u32 = 2;
const VNI: u32 = 4711;
const POLICY: u32 = 1;
const EGRESS_ID: u32 = 1;
pub(crate) const A: u16 = 1;
pub(crate) const B: u16 = 2;

pub(crate) fn from_pod(t: &Memory, ifindex: u32, packet: &Packet) -> FromPod {
    crate::from_pod::from_pod(t, ifindex, packet, &Keep)
}

pub(crate) fn to_uplink(t: &Memory, uplink: u32, ingress: u32, hash: u32, packet: &Packet) -> ToUplink {
    crate::to_uplink::to_uplink(t, uplink, ingress, hash, packet, &Keep)
}

/// A node: `POD` is selected, `OTHER_POD` is not; the egress IP is held by `holder`; A leases granules 0-9,
/// B 10-19.
pub(crate) fn node(me: u16, holder: u16) -> Memory {
    let mut t = Memory::new(1, 1000);
    t.settings = Settings {
        node: me,
        tunnel_port: 4795,
        tunnel_vni: VNI,
        tunnel_ifindex: 3,
        pass_token: 0xfeed_f00d,
        hold_unknown: 1,
        spread: 1,
        tcp_established: 7440,
        tcp_transitory: 240,
        udp: 300,
        icmp: 60,
        rest: 65,
        ..Settings::default()
    };
    for (ip, id, policy, ifindex) in [(POD, 1, POLICY, POD_IF), (OTHER_POD, 2, 0, OTHER_IF)] {
        t.pods.insert(ip, Pod { id, policy, ifindex, firewall: 0 });
        t.delivery
            .insert(id, Delivery { ip, ifindex, mode: DeliveryMode::Peer as u8, ..Delivery::default() });
    }
    let interface = |kind, guarded| Interface { kind: kind as u8, guarded, mac: [2; 6], bridge: 0 };
    t.interfaces.insert(POD_IF, interface(InterfaceKind::Pod, Guard::Own as u8));
    t.interfaces.insert(OTHER_IF, interface(InterfaceKind::Pod, 0));
    t.interfaces.insert(UPLINK, interface(InterfaceKind::Uplink, 0));
    for (ip, len, kind) in [
        (Ip::v4([10, 244, 0, 0]), 16, NetworkKind::Pods),
        (Ip::v4([10, 96, 0, 0]), 16, NetworkKind::Services),
        (NODE_A, 32, NetworkKind::Node),
        (NODE_B, 32, NetworkKind::Node),
    ] {
        t.networks.insert(NetworkKey { prefix_len: 96 + len, ip }, kind as u32);
    }
    t.nodes.insert(A, Node { tunnel_ip: NODE_A });
    t.nodes.insert(B, Node { tunnel_ip: NODE_B });
    add_egress(&mut t, EGRESS_ID, EGRESS, holder);
    let mut policy = Policy { len: 1, ..Policy::default() };
    policy.egress[0] = EGRESS_ID;
    t.policies.insert(POLICY, policy);
    t
}

fn add_egress(t: &mut Memory, id: u32, ip: Ip, holder: u16) {
    t.egress_addrs.insert(ip, id);
    t.egress_ips.insert(id, EgressIp { ip, policy: POLICY, uplink: UPLINK, holder, ..EgressIp::default() });
    let mut table = GranuleTable::default();
    table.node[..10].fill(A);
    table.node[10..20].fill(B);
    t.granules.insert(id, table);
    let first = if t.settings.node == A { 0 } else { 10 };
    t.leases.insert(id, Lease::of(&[GranuleRange { first, count: 10 }]));
}

pub(crate) fn packet(kind: Kind, from: (Ip, u16), to: (Ip, u16), tcp_flags: u8) -> Packet {
    let protocol = match kind {
        Kind::Tcp => TCP,
        // The tuple of an error is the quoted packet's.
        Kind::Udp | Kind::IcmpError => UDP,
        Kind::EchoRequest | Kind::EchoReply | Kind::OtherIcmp => ICMP,
        Kind::Sctp => SCTP,
        Kind::Fragment | Kind::Other | Kind::Malformed => 47,
    };
    let tuple = Tuple {
        source: from.0,
        destination: to.0,
        source_port: from.1,
        destination_port: to.1,
        protocol,
        pad: [0; 3],
    };
    Packet {
        tuple,
        len: 60,
        wire_len: 60,
        fragment_id: 0,
        kind,
        tcp_flags,
        ttl: 64,
        part: Part::Whole,
        options: false,
        dont_fragment: true,
        by_router: false,
    }
}

/// A packet, where any does.
pub(crate) fn any_packet() -> Packet {
    tcp((POD, 40000), (SERVER, 80), SYN)
}

pub(crate) fn tcp(from: (Ip, u16), to: (Ip, u16), flags: u8) -> Packet {
    packet(Kind::Tcp, from, to, flags)
}

pub(crate) fn udp(from: (Ip, u16), to: (Ip, u16)) -> Packet {
    packet(Kind::Udp, from, to, 0)
}

/// The first packet of a flow: token, then the uplink, where it may have another tuple by then.
fn walk_up(t: &Memory, sent: &Packet, at_uplink: &Packet) -> ToUplink {
    let FromPod::Identify(token, _) = from_pod(t, POD_IF, sent) else { panic!("no token for {sent:?}") };
    to_uplink(t, UPLINK, POD_IF, token, at_uplink)
}

pub(crate) fn translated(verdict: ToUplink) -> Snat {
    match verdict {
        ToUplink::Translate(snat) => snat,
        other => panic!("not translated: {other:?}"),
    }
}

fn masqueraded(sent: &Packet) -> Packet {
    let mut packet = *sent;
    (packet.tuple.source, packet.tuple.source_port) = (NODE_A, 61000);
    packet
}

#[test]
fn out_through_a_remote_holder_and_back() {
    let (a, b) = (node(A, B), node(B, B));
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);

    // First packet: up the stack, where the CNI masquerades it; the decision does not care.
    let snat = translated(walk_up(&a, &syn, &masqueraded(&syn)));
    assert_eq!(snat.source, EGRESS);
    assert_eq!(snat.way, Way::Tunnel(NODE_B));
    assert!((1024..1024 + 640).contains(&snat.source_port), "of A's lease: {}", snat.source_port);
    assert!(a.tokens.borrow().is_empty());

    // Later packets are offloaded, with the same port.
    assert_eq!(from_pod(&a, POD_IF, &tcp((POD, 40000), (SERVER, 80), ACK)), FromPod::Translate(snat));

    // At the gateway: forwarded by the range of the sender, without state.
    let out = tcp((EGRESS, snat.source_port), (SERVER, 80), SYN);
    assert_eq!(from_tunnel(&b, &NODE_A, VNI, &out, &Keep), FromOutside::Forward(UPLINK));
    assert!(b.flows.borrow().is_empty() && b.replies.borrow().is_empty());

    // The answer: steered to A by its port's granule, there to the pod.
    let back = tcp((SERVER, 80), (EGRESS, snat.source_port), SYN | ACK);
    assert_eq!(from_uplink(&b, &back, &Keep), FromOutside::Tunnel(NODE_A));
    let FromOutside::Deliver(to, delivery) = from_tunnel(&a, &NODE_B, VNI, &back, &Keep) else { panic!() };
    assert_eq!(to, ReverseSnat { destination: POD, destination_port: 40000 });
    assert_eq!(delivery.ifindex, POD_IF);
}

#[test]
fn out_through_this_node_and_back() {
    let a = node(A, A);
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    let snat = translated(walk_up(&a, &syn, &syn));
    assert_eq!(snat.way, Way::Here, "the packet is on the holder's uplink already");
    let FromPod::Translate(again) = from_pod(&a, POD_IF, &tcp((POD, 40000), (SERVER, 80), ACK)) else {
        panic!()
    };
    assert_eq!(again.way, Way::Uplink(UPLINK));
    let back = tcp((SERVER, 80), (EGRESS, snat.source_port), SYN | ACK);
    assert!(matches!(from_uplink(&a, &back, &Keep), FromOutside::Deliver(..)));
}

#[test]
fn udp_and_echo_walk_alike() {
    let a = node(A, B);
    for (out, back) in [
        (udp((POD, 5000), (SERVER, 53)), Kind::Udp),
        (packet(Kind::EchoRequest, (POD, 77), (SERVER, 0), 0), Kind::EchoReply),
    ] {
        let snat = translated(walk_up(&a, &out, &out));
        let reply = packet(back, (SERVER, out.tuple.destination_port), (EGRESS, snat.source_port), 0);
        let FromOutside::Deliver(to, _) = from_tunnel(&a, &NODE_B, VNI, &reply, &Keep) else { panic!() };
        assert_eq!(to, ReverseSnat { destination: POD, destination_port: out.tuple.source_port });
    }
}

#[test]
fn icmp_errors_follow_the_flow_they_are_about() {
    let a = node(A, B);
    let b = node(B, B);
    let out = udp((POD, 5000), (SERVER, 53));
    let snat = translated(walk_up(&a, &out, &out));
    let seen = |t: &Memory| t.flows.borrow().values().map(|f| (f.seen, f.state)).collect::<Vec<_>>();
    let before = seen(&a);
    a.now.set(seconds(20));
    // A router's about a packet of the pod: steered and delivered like an answer.
    let error = packet(Kind::IcmpError, (SERVER, 53), (EGRESS, snat.source_port), 0);
    assert_eq!(from_uplink(&b, &error, &Keep), FromOutside::Tunnel(NODE_A));
    let FromOutside::Deliver(to, _) = from_tunnel(&a, &NODE_B, VNI, &error, &Keep) else { panic!() };
    assert_eq!(to, ReverseSnat { destination: POD, destination_port: 5000 });
    // The pod's about an answer: leaves like the flow's own packets.
    let error = packet(Kind::IcmpError, (POD, 5000), (SERVER, 53), 0);
    assert_eq!(from_pod(&a, POD_IF, &error), FromPod::Translate(snat));
    let out = packet(Kind::IcmpError, (EGRESS, snat.source_port), (SERVER, 53), 0);
    assert_eq!(from_tunnel(&b, &NODE_A, VNI, &out, &Keep), FromOutside::Forward(UPLINK));
    assert_eq!(seen(&a), before, "errors keep no flow alive");
    // A router's error has no business coming out of a source node's tunnel.
    let routers = Packet { by_router: true, ..out };
    assert_eq!(
        from_tunnel(&b, &NODE_A, VNI, &routers, &Keep),
        FromOutside::Drop(DropReason::TunnelNotAllowed)
    );
    // About no flow of ours.
    let error = packet(Kind::IcmpError, (POD, 5001), (SERVER, 53), 0);
    assert_eq!(from_pod(&a, POD_IF, &error), FromPod::Drop(DropReason::IcmpType));
    let error = packet(Kind::IcmpError, (SERVER_2, 53), (EGRESS, snat.source_port), 0);
    assert_eq!(from_tunnel(&a, &NODE_B, VNI, &error, &Keep), FromOutside::Drop(DropReason::NoReplyFlow));
    // About a connection that came in: let go.
    to_pod(&a, &udp((SERVER_2, 3333), (POD, 53)));
    let error = packet(Kind::IcmpError, (POD, 53), (SERVER_2, 3333), 0);
    assert_eq!(from_pod(&a, POD_IF, &error), FromPod::Pass);
}

#[test]
fn a_time_to_live_that_ends_here() {
    let a = node(A, B);
    let mut out = udp((POD, 5000), (SERVER, 53));
    let snat = translated(walk_up(&a, &out, &out));
    out.ttl = 1;
    assert!(matches!(from_pod(&a, POD_IF, &out), FromPod::Identify(..)), "the host's stack answers it");
    let mut error = packet(Kind::IcmpError, (POD, 5000), (SERVER, 53), 0);
    for ttl in [0, 1] {
        error.ttl = ttl;
        assert_eq!(from_pod(&a, POD_IF, &error), FromPod::Drop(DropReason::TtlExpired));
    }
    let mut reply = udp((SERVER, 53), (EGRESS, snat.source_port));
    reply.ttl = 1;
    assert_eq!(from_tunnel(&a, &NODE_B, VNI, &reply, &Keep), FromOutside::Drop(DropReason::TtlExpired));
}

#[test]
fn inside_the_cluster_is_left_alone() {
    let a = node(A, B);
    assert_eq!(from_pod(&a, POD_IF, &tcp((POD, 1), (REMOTE_POD, 80), SYN)), FromPod::Unmarked);
    assert_eq!(from_pod(&a, POD_IF, &udp((POD, 1), (Ip::v4([224, 0, 0, 1]), 5353))), FromPod::Unmarked);
    // Services and nodes: only the host's DNAT knows where they lead to.
    for (sent, reached) in [(SERVICE, REMOTE_POD), (SERVICE, NODE_B), (NODE_B, NODE_B), (SERVICE, SERVICE)] {
        let packet = tcp((POD, 1), (sent, 80), SYN);
        let mut dnatted = packet;
        dnatted.tuple.destination = reached;
        assert_eq!(walk_up(&a, &packet, &dnatted), ToUplink::Pass, "{sent} to {reached}");
    }
    assert!(a.flows.borrow().is_empty());
}

#[test]
fn a_service_that_leads_outside_stays_on_the_hosts_path() {
    let a = node(A, B);
    let syn = tcp((POD, 40000), (SERVICE, 80), SYN);
    let mut at_uplink = masqueraded(&syn);
    (at_uplink.tuple.destination, at_uplink.tuple.destination_port) = (SERVER, 8080);
    let snat = translated(walk_up(&a, &syn, &at_uplink));
    assert_eq!(snat.source, EGRESS);
    // The next packet is no offloaded flow's: it walks up again and finds its flow at the uplink.
    let ack = tcp((POD, 40000), (SERVICE, 80), ACK);
    at_uplink.tcp_flags = ACK;
    assert_eq!(translated(walk_up(&a, &ack, &at_uplink)), snat);
    // Its answers go back into the host's stack as what the stack sent: the masqueraded source.
    let back = tcp((SERVER, 8080), (EGRESS, snat.source_port), SYN | ACK);
    assert_eq!(
        from_tunnel(&a, &NODE_B, VNI, &back, &Keep),
        FromOutside::Host(ReverseSnat { destination: NODE_A, destination_port: 61000 })
    );
    // The same with a node's port that leads outside.
    let syn = tcp((POD, 40001), (NODE_B, 30080), SYN);
    let mut at_uplink = masqueraded(&syn);
    (at_uplink.tuple.source_port, at_uplink.tuple.destination) = (61001, SERVER);
    assert_eq!(translated(walk_up(&a, &syn, &at_uplink)).source, EGRESS);
}

#[test]
fn unselected_pods_are_left_alone() {
    let mut a = node(A, B);
    let syn = tcp((OTHER_POD, 40000), (SERVER, 80), SYN);
    assert_eq!(from_pod(&a, OTHER_IF, &syn), FromPod::NotOurs);
    assert_eq!(to_uplink(&a, UPLINK, OTHER_IF, 0, &masqueraded(&syn)), ToUplink::NotOurs);
    // On a bridge with a selected pod, all carry a mark.
    a.interfaces.get_mut(&OTHER_IF).unwrap().guarded = 1;
    assert_eq!(from_pod(&a, OTHER_IF, &syn), FromPod::Pass);
    let marked = to_uplink(&a, UPLINK, OTHER_IF, a.settings.pass_token, &masqueraded(&syn));
    assert_eq!(marked, ToUplink::Pass);
    let lost = to_uplink(&a, UPLINK, OTHER_IF, 0, &masqueraded(&syn));
    assert_eq!(lost, ToUplink::Drop(DropReason::TokenLost));
}

/// Of a bridge's pod the bridge is known first, then its port: whenever that is, it loses nothing by it.
#[test]
fn an_unselected_pods_entry_may_move_while_its_packets_are_under_way() {
    const BRIDGE: u32 = 60;
    let mut a = node(A, B);
    let guarded = |kind: InterfaceKind, bridge| Interface {
        kind: kind as u8,
        guarded: Guard::Guarded as u8,
        mac: [2; 6],
        bridge,
    };
    a.interfaces.insert(BRIDGE, guarded(InterfaceKind::Bridge, 0));
    a.interfaces.insert(OTHER_IF, guarded(InterfaceKind::Pod, BRIDGE));
    let syn = tcp((OTHER_POD, 40000), (SERVER, 80), SYN);
    for (before, after) in [(BRIDGE, OTHER_IF), (OTHER_IF, BRIDGE), (0, BRIDGE), (0, OTHER_IF)] {
        for up in [syn, masqueraded(&syn)] {
            a.pods.get_mut(&OTHER_POD).unwrap().ifindex = before;
            assert_eq!(from_pod(&a, OTHER_IF, &syn), FromPod::Pass);
            a.pods.get_mut(&OTHER_POD).unwrap().ifindex = after;
            assert_eq!(to_uplink(&a, UPLINK, BRIDGE, a.settings.pass_token, &up), ToUplink::Pass);
            // A selected pod's would have a token, wherever its entry is.
            assert_eq!(to_uplink(&a, UPLINK, BRIDGE, 0, &up), ToUplink::Drop(DropReason::TokenLost));
        }
    }
}

#[test]
fn a_new_interface_is_held_until_it_is_known() {
    let mut a = node(A, B);
    let syn = masqueraded(&tcp((OTHER_POD, 40000), (SERVER, 80), SYN));
    let new = POD_IF + 50;
    assert_eq!(to_uplink(&a, UPLINK, new, 0, &syn), ToUplink::Drop(DropReason::UnknownInterface));
    let inside = tcp((NODE_A, 61000), (REMOTE_POD, 80), SYN);
    assert_eq!(to_uplink(&a, UPLINK, new, 0, &inside), ToUplink::NotOurs);
    a.interfaces.insert(new, Interface { kind: InterfaceKind::Other as u8, ..Interface::default() });
    assert_eq!(to_uplink(&a, UPLINK, new, 0, &syn), ToUplink::NotOurs);
    a.interfaces.clear();
    a.settings.hold_unknown = 0;
    assert_eq!(to_uplink(&a, UPLINK, new, 0, &syn), ToUplink::NotOurs);
}

#[test]
fn connections_that_came_in_are_answered_untranslated() {
    let a = node(A, B);
    for client in [SERVER, NODE_B] {
        to_pod(&a, &tcp((client, 3333), (POD, 80), SYN));
        assert_eq!(from_pod(&a, POD_IF, &tcp((POD, 80), (client, 3333), SYN | ACK)), FromPod::Pass);
        to_pod(&a, &udp((client, 3333), (POD, 53)));
        assert_eq!(from_pod(&a, POD_IF, &udp((POD, 53), (client, 3333))), FromPod::Pass);
        to_pod(&a, &packet(Kind::EchoRequest, (client, 9), (POD, 0), 0));
        let reply = packet(Kind::EchoReply, (POD, 0), (client, 9), 0);
        assert_eq!(from_pod(&a, POD_IF, &reply), FromPod::Pass);
    }
    // The uplink lets them go, whatever the host's stack made of them.
    let answer = tcp((NODE_A, 30080), (SERVER, 3333), SYN | ACK);
    assert_eq!(to_uplink(&a, UPLINK, POD_IF, a.settings.pass_token, &answer), ToUplink::Pass);
    // A SYN of the pod's own between the same ports is egress.
    assert!(matches!(from_pod(&a, POD_IF, &tcp((POD, 80), (SERVER, 3333), SYN)), FromPod::Identify(..)));
    // Without a note, an answer is no egress either.
    let stray = packet(Kind::EchoReply, (POD, 0), (SERVER, 10), 0);
    assert_eq!(from_pod(&a, POD_IF, &stray), FromPod::Drop(DropReason::NoFlow));
}

#[test]
fn an_answer_through_the_hosts_stack_is_no_opening() {
    // A pod asks by UDP through a load balancer address that the host translates: the answer reaches it
    // through `to_pod`, from an address outside.
    let a = node(A, B);
    let question = udp((POD, 5000), (SERVER_2, 53));
    assert!(matches!(from_pod(&a, POD_IF, &question), FromPod::Identify(..)));
    to_pod(&a, &udp((SERVER_2, 53), (POD, 5000)));
    assert!(matches!(from_pod(&a, POD_IF, &question), FromPod::Identify(..)));
    let by: Vec<u8> = a.openers.borrow().values().map(|o| o.by).collect();
    assert_eq!(by, [OpenedBy::Pod as u8]);
}

#[test]
fn nothing_leaves_without_an_owner() {
    let mut a = node(A, 0);
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    assert_eq!(walk_up(&a, &syn, &masqueraded(&syn)), ToUplink::Drop(DropReason::NoOwner));
    a.settings.unassigned = Unassigned::NodeIp as u8;
    assert_eq!(walk_up(&a, &syn, &masqueraded(&syn)), ToUplink::Pass);
    // A flow that was translated is never continued with the node's address.
    let mut a = node(A, B);
    a.settings.unassigned = Unassigned::NodeIp as u8;
    translated(walk_up(&a, &syn, &syn));
    a.egress_ips.get_mut(&EGRESS_ID).unwrap().holder = 0;
    let ack = tcp((POD, 40000), (SERVER, 80), ACK);
    assert_eq!(from_pod(&a, POD_IF, &ack), FromPod::Drop(DropReason::NoOwner));
}

#[test]
fn nothing_leaves_without_a_lease() {
    let mut a = node(A, B);
    a.leases.clear();
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    assert_eq!(walk_up(&a, &syn, &syn), ToUplink::Drop(DropReason::NoPortRange));
    assert!(a.flows.borrow().is_empty() && a.replies.borrow().is_empty());
}

#[test]
fn what_belongs_to_no_flow_is_dropped() {
    let a = node(A, B);
    let ack = tcp((POD, 40000), (SERVER, 80), ACK);
    assert_eq!(walk_up(&a, &ack, &masqueraded(&ack)), ToUplink::Reset);
    for (kind, reason) in [
        (Kind::Other, DropReason::Protocol),
        (Kind::OtherIcmp, DropReason::IcmpType),
        (Kind::Malformed, DropReason::Malformed),
    ] {
        let outside = packet(kind, (POD, 0), (SERVER, 0), 0);
        assert_eq!(from_pod(&a, POD_IF, &outside), FromPod::Drop(reason));
    }
    let inside = packet(Kind::Other, (POD, 0), (REMOTE_POD, 0), 0);
    assert_eq!(from_pod(&a, POD_IF, &inside), FromPod::Unmarked);
}

/// The fragments of a packet, as they are parsed: the first has all but its length, the later one no ports.
fn fragments_of(whole: &Packet, id: u32) -> (Packet, Packet) {
    let first = Packet { part: Part::First, fragment_id: id, dont_fragment: false, ..*whole };
    let mut later = Packet { part: Part::Later, kind: Kind::Fragment, tcp_flags: 0, ..first };
    (later.tuple.source_port, later.tuple.destination_port) = (0, 0);
    (first, later)
}

fn recalled(t: &Memory, place: Place, packet: &Packet) -> Packet {
    let mut packet = *packet;
    recall(t, place, &mut packet);
    packet
}

#[test]
fn fragments_follow_their_first_out_and_back() {
    let (a, b) = (node(A, B), node(B, B));
    let sent = udp((POD, 5000), (SERVER, 53));
    let (first, later) = fragments_of(&sent, 7);
    // A new flow's go up one by one: no connection tracking puts them together here.
    let ToUplink::Translate(snat) = walk_up(&a, &first, &first) else { panic!() };
    assert_eq!(from_pod(&a, POD_IF, &recalled(&a, Place::FromPod, &later)), FromPod::Unmarked);
    let behind = recalled(&a, Place::ToUplink, &later);
    assert_eq!(to_uplink(&a, UPLINK, POD_IF, 0, &behind), ToUplink::Translate(snat));
    // The next datagram is offloaded; a fragment before its first goes up, and ends at the uplink.
    let (first, later) = fragments_of(&sent, 8);
    assert_eq!(from_pod(&a, POD_IF, &recalled(&a, Place::FromPod, &later)), FromPod::Unmarked);
    let behind = recalled(&a, Place::ToUplink, &later);
    assert_eq!(to_uplink(&a, UPLINK, POD_IF, 0, &behind), ToUplink::Drop(DropReason::Fragment));
    assert_eq!(from_pod(&a, POD_IF, &first), FromPod::Translate(snat));
    assert_eq!(from_pod(&a, POD_IF, &recalled(&a, Place::FromPod, &later)), FromPod::Translate(snat));
    // At the gateway, out and back.
    let out = udp((EGRESS, snat.source_port), (SERVER, 53));
    let (first, later) = fragments_of(&out, 8);
    let tunnelled = |later| from_tunnel(&b, &NODE_A, VNI, &recalled(&b, Place::FromOutside, later), &Keep);
    assert_eq!(
        tunnelled(&later),
        FromOutside::Drop(DropReason::TunnelNotAllowed),
        "its first is not there yet"
    );
    assert_eq!(tunnelled(&first), FromOutside::Forward(UPLINK));
    assert_eq!(tunnelled(&later), FromOutside::Forward(UPLINK));
    let (first, later) = fragments_of(&udp((SERVER, 53), (EGRESS, snat.source_port)), 9);
    let at_gateway = |p| from_uplink(&b, &recalled(&b, Place::FromOutside, p), &Keep);
    assert_eq!(at_gateway(&later), FromOutside::Drop(DropReason::Fragment));
    assert_eq!(at_gateway(&first), FromOutside::Tunnel(NODE_A));
    assert_eq!(at_gateway(&later), FromOutside::Tunnel(NODE_A));
    let delivered = |p| match from_tunnel(&a, &NODE_B, VNI, &recalled(&a, Place::FromOutside, p), &Keep) {
        FromOutside::Deliver(reverse, _) => reverse,
        other => panic!("{other:?}"),
    };
    let to = ReverseSnat { destination: POD, destination_port: 5000 };
    assert_eq!(delivered(&first), to);
    assert_eq!(delivered(&later), to);
    // Long after, the identification is another datagram's.
    b.now.set(b.now.get() + seconds(FRAGMENT_SECONDS) + 2);
    assert_eq!(at_gateway(&later), FromOutside::Drop(DropReason::Fragment));
}

#[test]
fn what_is_too_big_is_said_to_its_sender() {
    let mut a = node(A, B);
    a.settings.mtu = 1450;
    let sized = |wire_len, dont_fragment| {
        let whole = udp((POD, 5000), (SERVER, 53));
        Packet { len: 9000, wire_len, dont_fragment, ..whole }
    };
    let fits = sized(1450, true);
    assert!(matches!(walk_up(&a, &fits, &fits), ToUplink::Translate(_)));
    assert_eq!(from_pod(&a, POD_IF, &sized(1451, true)), FromPod::TooBig(1450));
    assert!(matches!(from_pod(&a, POD_IF, &sized(1451, false)), FromPod::Translate(_)), "fragmented outside");
    let (first, later) = fragments_of(&sized(1451, true), 3);
    assert!(matches!(from_pod(&a, POD_IF, &first), FromPod::Translate(_)));
    assert!(matches!(from_pod(&a, POD_IF, &recalled(&a, Place::FromPod, &later)), FromPod::Translate(_)));
    let inside = Packet { wire_len: 9000, ..udp((POD, 5000), (REMOTE_POD, 53)) };
    assert_eq!(from_pod(&a, POD_IF, &inside), FromPod::Unmarked, "the cluster's own sizes are not ours");
    // Out of an uplink of this node the host's stack fragments.
    let mut b = node(B, B);
    b.egress_ips.values_mut().for_each(|egress| egress.uplink_mtu = 1500);
    let fits = sized(1500, false);
    assert!(matches!(walk_up(&b, &fits, &fits), ToUplink::Translate(_)));
    assert!(matches!(from_pod(&b, POD_IF, &fits), FromPod::Translate(_)));
    assert!(matches!(from_pod(&b, POD_IF, &sized(1501, false)), FromPod::Identify(..)));
}

#[test]
fn a_tunnel_that_does_not_fragment_is_given_nothing_too_big() {
    let mut b = node(B, B);
    b.settings.tunnel_max = 1430;
    let reply = |wire_len, dont_fragment| {
        let reply = udp((SERVER, 53), (EGRESS, FIRST_PORT));
        from_uplink(&b, &Packet { wire_len, dont_fragment, ..reply }, &Keep)
    };
    assert_eq!(reply(1430, true), FromOutside::Tunnel(NODE_A));
    assert_eq!(reply(1431, true), FromOutside::TooBig(1430));
    assert_eq!(reply(1431, false), FromOutside::Drop(DropReason::TooBig));
    let mut a = node(A, B);
    a.settings.tunnel_max = 1430;
    let sized = |wire_len| Packet { wire_len, dont_fragment: false, ..udp((POD, 5000), (SERVER, 53)) };
    assert!(matches!(walk_up(&a, &sized(1430), &sized(1430)), ToUplink::Translate(_)));
    assert_eq!(from_pod(&a, POD_IF, &sized(1431)), FromPod::Drop(DropReason::TooBig));
    let FromPod::Identify(token, _) = from_pod(&a, POD_IF, &Packet { ttl: 1, ..sized(1431) }) else {
        panic!()
    };
    assert_eq!(to_uplink(&a, UPLINK, POD_IF, token, &sized(1431)), ToUplink::Drop(DropReason::TooBig));
}

#[test]
fn a_reply_that_the_way_to_the_pod_does_not_carry_is_the_hosts_to_fragment() {
    let mut a = node(A, B);
    let sent = udp((POD, 5000), (SERVER, 53));
    let ToUplink::Translate(snat) = walk_up(&a, &sent, &sent) else { panic!() };
    let delivery = a.delivery.get_mut(&1).unwrap();
    (delivery.mode, delivery.mtu) = (DeliveryMode::Neighbour as u8, 1400);
    let reply = |wire_len, dont_fragment| {
        let reply = udp((SERVER, 53), (EGRESS, snat.source_port));
        from_tunnel(&a, &NODE_B, VNI, &Packet { wire_len, dont_fragment, ..reply }, &Keep)
    };
    assert!(matches!(reply(1400, true), FromOutside::Deliver(..)));
    assert!(matches!(reply(1401, false), FromOutside::Host(_)));
    assert_eq!(reply(1401, true), FromOutside::Drop(DropReason::TooBig));
    let mut b = a.clone();
    b.delivery.get_mut(&1).unwrap().mode = DeliveryMode::Peer as u8;
    let whole = Packet { wire_len: 9000, ..udp((SERVER, 53), (EGRESS, snat.source_port)) };
    assert!(matches!(from_tunnel(&b, &NODE_B, VNI, &whole, &Keep), FromOutside::Deliver(..)));
}

#[test]
fn sources_that_a_pod_may_not_use() {
    let a = node(A, B);
    let drop = |source, ifindex| from_pod(&a, ifindex, &tcp((source, 1), (SERVER, 80), SYN));
    assert_eq!(drop(POD, OTHER_IF), FromPod::Drop(DropReason::SpoofedSource));
    assert_eq!(drop(EGRESS, OTHER_IF), FromPod::Drop(DropReason::SpoofedSource));
    assert_eq!(drop(EGRESS, POD_IF), FromPod::Drop(DropReason::SpoofedSource));
    assert_eq!(drop(SERVER_2, POD_IF), FromPod::Drop(DropReason::SpoofedSource));
    assert_eq!(drop(OTHER_POD, POD_IF), FromPod::Drop(DropReason::SpoofedSource), "an unselected pod's");
    assert_eq!(drop(NODE_B, OTHER_IF), FromPod::Drop(DropReason::SpoofedSource), "a node's");
    assert_eq!(drop(Ip::v4([10, 244, 1, 99]), OTHER_IF), FromPod::Drop(DropReason::UnknownPod));
    assert_eq!(drop(SERVER_2, OTHER_IF), FromPod::NotOurs);
    let inside = tcp((Ip::v4([10, 244, 1, 99]), 1), (REMOTE_POD, 80), SYN);
    assert_eq!(from_pod(&a, OTHER_IF, &inside), FromPod::NotOurs, "held towards outside only");
}

#[test]
fn the_tunnel_accepts_only_what_its_sender_may_send() {
    let b = node(B, B);
    let out = |port| tcp((EGRESS, port), (SERVER, 80), ACK);
    let of = |sender, vni, packet: &Packet| match from_tunnel(&b, sender, vni, packet, &Keep) {
        FromOutside::Drop(reason) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(of(&SERVER, VNI, &out(1024)), DropReason::UnknownTunnelPeer);
    assert_eq!(of(&NODE_B, VNI, &out(1024)), DropReason::UnknownTunnelPeer, "its own address");
    assert_eq!(of(&NODE_A, VNI + 1, &out(1024)), DropReason::UnknownTunnelPeer);
    assert_eq!(of(&NODE_A, VNI, &out(1024 + 640)), DropReason::TunnelNotAllowed, "B's own range");
    assert_eq!(of(&NODE_A, VNI, &out(80)), DropReason::TunnelNotAllowed);
    assert_eq!(of(&NODE_A, VNI, &tcp((POD, 1), (SERVER, 80), SYN)), DropReason::TunnelNotAllowed);
    let to_a = tcp((SERVER, 80), (EGRESS, 1024), ACK);
    assert_eq!(of(&NODE_A, VNI, &to_a), DropReason::TunnelNotAllowed, "a reply for A, from A");
}

#[test]
fn a_pod_cannot_reach_a_tunnel_port() {
    let a = node(A, B);
    let forged = udp((NODE_A, 61000), (NODE_B, 4795));
    assert_eq!(to_uplink(&a, UPLINK, OTHER_IF, 0, &forged), ToUplink::Drop(DropReason::TunnelForged));
    assert_eq!(to_uplink(&a, UPLINK, 0, 0, &forged), ToUplink::NotOurs, "the node's own");
}

#[test]
fn an_egress_ip_is_no_way_into_the_node() {
    let b = node(B, B);
    let of = |packet: Packet| match from_uplink(&b, &packet, &Keep) {
        FromOutside::Drop(reason) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(of(tcp((SERVER, 1), (EGRESS, 22), SYN)), DropReason::NoRange);
    assert_eq!(of(tcp((SERVER, 1), (EGRESS, 1024 + 640), SYN)), DropReason::NoReplyFlow);
    assert_eq!(of(tcp((SERVER, 1), (EGRESS, 40000), SYN)), DropReason::NoRange);
    assert_eq!(of(packet(Kind::EchoRequest, (SERVER, 1), (EGRESS, 0), 0)), DropReason::NoReplyFlow);
    assert_eq!(of(packet(Kind::Other, (SERVER, 0), (EGRESS, 0), 0)), DropReason::Protocol);
    assert_eq!(from_uplink(&b, &tcp((SERVER, 1), (NODE_B, 22), SYN), &Keep), FromOutside::NotOurs);
}

#[test]
fn only_the_holder_claims_an_address() {
    assert!(claims(&node(B, B), UPLINK, &EGRESS));
    assert!(!claims(&node(B, B), UPLINK + 1, &EGRESS));
    assert!(!claims(&node(A, B), UPLINK, &EGRESS));
    assert!(!claims(&node(A, 0), UPLINK, &EGRESS));
    assert!(!claims(&node(B, B), UPLINK, &NODE_A));
}

#[test]
fn a_flow_ends_with_its_policy_pod_and_address() {
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    let ack = tcp((POD, 40000), (SERVER, 80), ACK);
    let opened = || {
        let a = node(A, B);
        let port = translated(walk_up(&a, &syn, &syn)).source_port;
        (a, port)
    };
    let reply = |port| tcp((SERVER, 80), (EGRESS, port), ACK);

    // Another policy: the flow is void, and no other address continues it.
    let (mut a, _) = opened();
    a.pods.get_mut(&POD).unwrap().policy = 2;
    a.policies.insert(2, a.policies[&POLICY]);
    assert_eq!(walk_up(&a, &ack, &masqueraded(&ack)), ToUplink::Reset);
    assert_eq!(
        walk_up(&a, &syn, &masqueraded(&syn)),
        ToUplink::Drop(DropReason::NoOwner),
        "not its addresses"
    );

    // Another pod with the same address: neither its packets nor the answers find the old flow.
    let (mut a, port) = opened();
    a.pods.get_mut(&POD).unwrap().id = 3;
    a.delivery.remove(&1);
    assert!(matches!(from_pod(&a, POD_IF, &ack), FromPod::Identify(..)));
    assert_eq!(from_tunnel(&a, &NODE_B, VNI, &reply(port), &Keep), FromOutside::Drop(DropReason::PodGone));

    // The address left the object.
    let (mut a, port) = opened();
    a.egress_ips.remove(&EGRESS_ID);
    a.egress_addrs.remove(&EGRESS);
    assert!(matches!(from_pod(&a, POD_IF, &ack), FromPod::Identify(..)));
    assert_eq!(
        from_tunnel(&a, &NODE_B, VNI, &reply(port), &Keep),
        FromOutside::Drop(DropReason::TunnelNotAllowed)
    );
}

#[test]
fn a_connection_opened_anew_meets_the_hosts_netfilter_again() {
    let a = node(A, B);
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    let port = translated(walk_up(&a, &syn, &syn)).source_port;
    assert_eq!(translated(walk_up(&a, &syn, &syn)).source_port, port, "a retransmission does, too");
    let back = |flags| tcp((SERVER, 80), (EGRESS, port), flags);
    assert!(matches!(from_tunnel(&a, &NODE_B, VNI, &back(SYN | ACK), &Keep), FromOutside::Deliver(..)));
    from_pod(&a, POD_IF, &tcp((POD, 40000), (SERVER, 80), FIN | ACK));
    from_tunnel(&a, &NODE_B, VNI, &back(FIN | ACK), &Keep);
    let again = translated(walk_up(&a, &syn, &syn));
    assert_eq!(again.source_port, port);
}

#[test]
fn udp_and_echo_walk_through_the_stack_again_every_30_s() {
    let a = node(A, B);
    for out in [udp((POD, 5000), (SERVER, 53)), packet(Kind::EchoRequest, (POD, 77), (SERVER, 0), 0)] {
        a.now.set(0);
        let snat = translated(walk_up(&a, &out, &out));
        a.now.set(seconds(30));
        assert_eq!(from_pod(&a, POD_IF, &out), FromPod::Translate(snat));
        // What netfilter drops then stays dropped; what it lets go keeps its port, masqueraded anew or not.
        a.now.set(seconds(31));
        assert!(matches!(from_pod(&a, POD_IF, &out), FromPod::Identify(..)));
        assert_eq!(translated(walk_up(&a, &out, &masqueraded(&out))), snat);
        assert_eq!(from_pod(&a, POD_IF, &out), FromPod::Translate(snat));
    }
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    let snat = translated(walk_up(&a, &syn, &syn));
    a.now.set(a.now.get() + seconds(100));
    assert_eq!(from_pod(&a, POD_IF, &tcp((POD, 40000), (SERVER, 80), ACK)), FromPod::Translate(snat));
}

#[test]
fn idle_flows_count_as_absent() {
    let a = node(A, B);
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    let ack = tcp((POD, 40000), (SERVER, 80), ACK);
    let port = translated(walk_up(&a, &syn, &syn)).source_port;
    let back = |flags| tcp((SERVER, 80), (EGRESS, port), flags);
    from_tunnel(&a, &NODE_B, VNI, &back(SYN | ACK), &Keep);
    a.now.set(seconds(7440));
    assert!(matches!(from_pod(&a, POD_IF, &ack), FromPod::Translate(_)), "within 2 h 4 min");
    a.now.set(a.now.get() + seconds(7441));
    assert!(matches!(from_pod(&a, POD_IF, &ack), FromPod::Identify(..)));
    assert_eq!(from_tunnel(&a, &NODE_B, VNI, &back(ACK), &Keep), FromOutside::Drop(DropReason::NoReplyFlow));
    // A reset leaves the port to rest, then it is anybody's.
    let port = translated(walk_up(&a, &syn, &syn)).source_port;
    from_tunnel(&a, &NODE_B, VNI, &tcp((SERVER, 80), (EGRESS, port), RST), &Keep);
    a.now.set(a.now.get() + seconds(66));
    assert_eq!(
        from_tunnel(&a, &NODE_B, VNI, &tcp((SERVER, 80), (EGRESS, port), ACK), &Keep),
        FromOutside::Drop(DropReason::NoReplyFlow)
    );
}

#[test]
fn one_granule_carries_64_connections_to_one_destination() {
    let mut a = node(A, B);
    a.leases.insert(EGRESS_ID, Lease::of(&[GranuleRange { first: 0, count: 1 }]));
    let open = |pod_port, server| {
        let syn = tcp((POD, pod_port), (server, 80), SYN);
        walk_up(&a, &syn, &syn)
    };
    let mut ports: Vec<u16> = (0..64).map(|n| translated(open(40000 + n, SERVER)).source_port).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 64, "every connection has its own port");
    assert!(ports.iter().all(|p| (FIRST_PORT..FIRST_PORT + GRANULE_PORTS).contains(p)));
    assert_eq!(open(40064, SERVER), ToUplink::Drop(DropReason::NoPortFree));
    // Another destination has all ports for itself.
    assert_eq!(translated(open(50000, SERVER_2)).source, EGRESS);
    // Full is answered at once for a second, even when a port has come free meanwhile.
    let (freed, _) = a.flows.borrow().iter().next().map(|(k, f)| (*k, *f)).unwrap();
    a.remove_flow(&freed);
    assert_eq!(open(40064, SERVER), ToUplink::Drop(DropReason::NoPortFree));
    a.now.set(seconds(1) + 1);
    translated(open(40064, SERVER));
    // When the first connections are past their time, their ports serve again.
    a.now.set(seconds(241));
    for n in 0..63 {
        translated(open(50001 + n, SERVER));
    }
}

#[test]
fn a_second_address_helps_out() {
    let mut a = node(A, B);
    add_egress(&mut a, 2, EGRESS_2, B);
    let policy = a.policies.get_mut(&POLICY).unwrap();
    (policy.len, policy.egress[1]) = (2, 2);
    let syn = |port| tcp((POD, port), (SERVER, 80), SYN);
    let first = translated(walk_up(&a, &syn(1), &syn(1))).source;
    for port in 2..50 {
        assert_eq!(translated(walk_up(&a, &syn(port), &syn(port))).source, first, "one pod, one address");
    }
    a.leases.remove(&a.egress_id(&first).unwrap());
    let other = translated(walk_up(&a, &syn(60), &syn(60))).source;
    assert_ne!(other, first);
    // By connection, both are used.
    let mut a = a.clone();
    a.settings.spread = 2;
    add_egress(&mut a, 1, EGRESS, B);
    add_egress(&mut a, 2, EGRESS_2, B);
    let used: std::collections::BTreeSet<Ip> =
        (100..200).map(|port| translated(walk_up(&a, &syn(port), &syn(port))).source).collect();
    assert_eq!(used.len(), 2);
}

#[test]
fn a_full_table_drops_the_new_connection_only() {
    let mut a = node(A, B);
    a.flow_capacity = 1;
    let syn = |port| tcp((POD, port), (SERVER, 80), SYN);
    translated(walk_up(&a, &syn(1), &syn(1)));
    assert_eq!(walk_up(&a, &syn(2), &syn(2)), ToUplink::Full);
    let next = tcp((POD, 1), (SERVER, 80), ACK);
    assert!(matches!(from_pod(&a, POD_IF, &next), FromPod::Translate(_)));
    assert_eq!(a.replies.borrow().len(), 1, "nothing is left of the refused one");
}

#[test]
fn before_the_settings_nothing_is_ours() {
    let a = node(0, B);
    let syn = tcp((POD, 1), (SERVER, 80), SYN);
    assert_eq!(from_pod(&a, POD_IF, &syn), FromPod::NotOurs);
    assert_eq!(from_tunnel(&a, &NODE_B, VNI, &syn, &Keep), FromOutside::Drop(DropReason::NotReady));
}

#[test]
fn only_connections_with_outside_are_noted() {
    let a = node(A, B);
    // Asked of the cluster by a pod, or by the cluster of a pod.
    from_pod(&a, POD_IF, &udp((POD, 5000), (SERVICE, 53)));
    from_pod(&a, POD_IF, &udp((POD, 5000), (REMOTE_POD, 53)));
    for source in [REMOTE_POD, SERVICE] {
        to_pod(&a, &udp((source, 53), (POD, 5000)));
        to_pod(&a, &tcp((source, 53), (POD, 5000), SYN));
    }
    // Unselected pods: only what a later selection would break.
    to_pod(&a, &udp((SERVER, 53), (OTHER_POD, 5000)));
    to_pod(&a, &packet(Kind::EchoRequest, (SERVER, 1), (OTHER_POD, 0), 0));
    assert!(a.openers.borrow().is_empty());
    to_pod(&a, &tcp((SERVER, 53), (OTHER_POD, 5000), SYN));
    assert_eq!(a.openers.borrow().len(), 1);
}

#[test]
fn a_guarded_interface_may_send_inside_without_a_mark() {
    let a = node(A, B);
    let inside = tcp((POD, 40000), (REMOTE_POD, 80), SYN);
    assert_eq!(to_uplink(&a, UPLINK, POD_IF, 0, &inside), ToUplink::NotOurs);
    let outside = tcp((NODE_A, 61000), (SERVER, 80), SYN);
    assert_eq!(to_uplink(&a, UPLINK, POD_IF, 0, &outside), ToUplink::Drop(DropReason::TokenLost));
}

#[test]
fn a_service_on_the_servers_own_port_is_on_the_hosts_path_too() {
    let a = node(A, B);
    let syn = tcp((POD, 40000), (SERVICE, 80), SYN);
    let mut at_uplink = masqueraded(&syn);
    at_uplink.tuple.destination = SERVER;
    translated(walk_up(&a, &syn, &at_uplink));
    assert!(a.flows.borrow().keys().all(|key| key.path == FlowPath::Host as u8));
    assert!(matches!(from_pod(&a, POD_IF, &tcp((POD, 40000), (SERVER, 80), ACK)), FromPod::Identify(..)));
}

#[test]
fn a_flow_is_decided_anew_under_another_policy() {
    let mut a = node(A, B);
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    let at_service = tcp((POD, 40001), (SERVICE, 80), SYN);
    let mut from_service = masqueraded(&at_service);
    from_service.tuple.destination = SERVER;
    assert_eq!(translated(walk_up(&a, &syn, &syn)).source, EGRESS);
    assert_eq!(translated(walk_up(&a, &at_service, &from_service)).source, EGRESS);
    // Another object selects the pod: neither path continues with the old object's address.
    add_egress(&mut a, 2, EGRESS_2, B);
    a.egress_ips.get_mut(&2).unwrap().policy = 2;
    let mut policy = Policy { len: 1, ..Policy::default() };
    policy.egress[0] = 2;
    a.policies.insert(2, policy);
    a.pods.get_mut(&POD).unwrap().policy = 2;
    assert_eq!(translated(walk_up(&a, &syn, &syn)).source, EGRESS_2);
    assert_eq!(translated(walk_up(&a, &at_service, &from_service)).source, EGRESS_2);
    assert_eq!(
        a.replies.borrow().keys().map(|key| key.egress).collect::<Vec<_>>(),
        [2, 2],
        "the old are gone"
    );
}

#[test]
fn an_address_of_another_object_continues_no_flow() {
    // An entry of a BPF map may be reused for another key while a program reads it: what was read is checked.
    let mut a = node(A, B);
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    translated(walk_up(&a, &syn, &syn));
    a.egress_ips.get_mut(&EGRESS_ID).unwrap().policy = 9;
    assert!(matches!(from_pod(&a, POD_IF, &tcp((POD, 40000), (SERVER, 80), ACK)), FromPod::Identify(..)));
    assert_eq!(walk_up(&a, &syn, &syn), ToUplink::Drop(DropReason::NoOwner));
}

#[test]
fn a_reply_entry_serves_its_own_flow_only() {
    let a = node(A, B);
    let syn = tcp((POD, 40000), (SERVER, 80), SYN);
    let port = translated(walk_up(&a, &syn, &syn)).source_port;
    for flow in a.flows.borrow_mut().values_mut() {
        flow.egress_port += 1;
    }
    let back = tcp((SERVER, 80), (EGRESS, port), SYN | ACK);
    assert_eq!(from_tunnel(&a, &NODE_B, VNI, &back, &Keep), FromOutside::Drop(DropReason::NoReplyFlow));
}

#[test]
fn a_flow_that_finds_no_room_gives_its_port_back() {
    let mut a = node(A, B);
    a.flow_capacity = 1;
    let syn = |port| tcp((POD, port), (SERVER, 80), SYN);
    translated(walk_up(&a, &syn(1), &syn(1)));
    a.replies.borrow_mut().clear();
    assert_eq!(walk_up(&a, &syn(2), &syn(2)), ToUplink::Full);
    assert!(a.replies.borrow().is_empty());
}

#[test]
fn the_ports_of_a_pod_that_is_gone_serve_at_once() {
    let mut a = node(A, B);
    a.leases.insert(EGRESS_ID, Lease::of(&[GranuleRange { first: 0, count: 1 }]));
    let syn = |port| tcp((POD, port), (SERVER, 80), SYN);
    for port in 0..64 {
        translated(walk_up(&a, &syn(port), &syn(port)));
    }
    let delivery = a.delivery.remove(&1).unwrap();
    a.delivery.insert(3, delivery);
    a.pods.get_mut(&POD).unwrap().id = 3;
    for port in 0..64 {
        translated(walk_up(&a, &syn(port), &syn(port)));
    }
    assert!(a.flows.borrow().keys().all(|key| key.pod == 3));
}

#[test]
fn ports_are_not_handed_out_in_order() {
    let a = node(A, B);
    let syn = |port| tcp((POD, port), (SERVER, 80), SYN);
    let ports: Vec<u16> = (0..32).map(|p| translated(walk_up(&a, &syn(p), &syn(p))).source_port).collect();
    assert!(ports.windows(2).filter(|w| w[1] == w[0] + 1).count() < 4, "{ports:?}");
}
