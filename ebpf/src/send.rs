//! Ways a packet takes: out of an uplink, through the tunnel, to a pod, into the host's stack.

use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
    BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT, BPF_FIB_LOOKUP_SKIP_NEIGH, TC_ACT_SHOT,
    bpf_fib_lookup as FibLookup, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::{bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer};
use datapath::addr::Ip;
use datapath::departure::{self, Departure, Route};
use datapath::keys::{Delivery, DeliveryMode, Tuple};
use datapath::packet::{Kind, Part};
use datapath::tables::Tables as _;
use datapath::verdict::{DropReason, HostStack, ReverseSnat, Snat, Way};

use crate::NEXT;
use crate::answer;
use crate::ctx::{Refused, Request, Skb, from_words, request, words};
use crate::packet::Headers;
use crate::report::{count, drop};
use crate::tables::Maps;
use crate::{icmp_error, reset, rewrite};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Translates an egress packet and sends it on its way.
#[inline(always)]
pub fn translated(skb: &Skb, headers: &Headers, snat: &Snat) -> i32 {
    if rewrite::snat(skb, headers, &snat.source, snat.source_port).is_err()
        || clamp_mss(skb, headers).is_err()
    {
        return drop(skb, DropReason::Rewrite);
    }
    match snat.way {
        Way::Here => NEXT,
        Way::Uplink(uplink) => out_of(skb, &snat.source, headers, uplink),
        Way::Tunnel(node) => through_tunnel(skb, &node),
    }
}

/// Sends the packet of a new flow on its way, with its token.
#[inline(always)]
pub fn depart(skb: &Skb, headers: &Headers, token: u32, stack: HostStack) -> i32 {
    skb.set_hash(token);
    if !departure::asks(&Maps, &headers.packet) {
        return NEXT;
    }
    let Some(settings) = Maps.settings() else { return drop(skb, DropReason::NotReady) };
    match departure::depart(&Maps, settings, &headers.packet, stack, route_of(skb, headers)) {
        Departure::Up => NEXT,
        Departure::Direct(uplink) => {
            Maps.set_direct(token);
            skb.clear_mark();
            match rewrite::hop(skb, headers) {
                // SAFETY: plain integers.
                Ok(()) => unsafe { bpf_redirect(uplink, 0) as i32 },
                Err(Refused) => drop(skb, DropReason::Rewrite),
            }
        }
        Departure::Drop(reason) => drop(skb, reason),
    }
}

/// What the node's routes say of a packet that came in by a pod's interface.
#[inline(never)]
fn route_of(skb: &Skb, headers: &Headers) -> Route {
    let tuple = &headers.packet.tuple;
    let port = Maps.interface(skb.ifindex()).unwrap_or_default();
    let input = if port.bridge != 0 { port.bridge } else { skb.ifindex() };
    match look_up(skb, (&tuple.source, &tuple.destination), tuple, input, 0) {
        (SUCCESS | NO_NEIGH | FRAG_NEEDED, Some(fib)) => Route::By(fib.ifindex),
        // Neither a route nor a refusal (bpf_ipv4_fib_lookup, net/core/filter.c).
        (NOT_FWDED, _) => Route::None,
        _ => Route::Host,
    }
}

/// Translates a packet that skips the host's stack, and with it the hop that the node is.
#[inline(always)]
pub fn offloaded(skb: &Skb, headers: &Headers, snat: &Snat) -> i32 {
    match rewrite::hop(skb, headers) {
        Ok(()) => translated(skb, headers, snat),
        Err(_) => drop(skb, DropReason::Rewrite),
    }
}

/// Sends a packet through the tunnel to a node.
#[inline(never)]
pub fn through_tunnel(skb: &Skb, node: &Ip) -> i32 {
    let Some(settings) = Maps.settings() else { return drop(skb, DropReason::NotReady) };
    let Some(own) = Maps.node(settings.node) else { return drop(skb, DropReason::NotReady) };
    if skb.set_tunnel(&own.tunnel_ip, node, settings.tunnel_vni).is_err() {
        return drop(skb, DropReason::Rewrite);
    }
    skb.clear_hash();
    skb.clear_mark();
    // SAFETY: plain integers.
    unsafe { bpf_redirect(settings.tunnel_ifindex, 0) as i32 }
}

/// Sends a packet out of an uplink, to the next hop that the node's routes give for it there.
#[inline(never)]
pub fn out_of(skb: &Skb, source: &Ip, headers: &Headers, uplink: u32) -> i32 {
    let tuple = &headers.packet.tuple;
    match route(skb, (source, &tuple.destination), tuple, uplink, BPF_FIB_LOOKUP_OUTPUT) {
        // For IPv6 the interface is a wish only (bpf_ipv6_fib_lookup, net/core/filter.c).
        Ok((ifindex, _)) if ifindex != uplink => drop(skb, DropReason::NoRoute),
        Ok((_, next_hop)) => {
            skb.clear_mark();
            to_neighbour(uplink, next_hop)
        }
        Err(reason) => drop(skb, reason),
    }
}

#[inline(always)]
fn to_neighbour(ifindex: u32, next_hop: &mut bpf_redir_neigh) -> i32 {
    // SAFETY: the helper reads the struct at its full size.
    unsafe { bpf_redirect_neigh(ifindex, &raw mut *next_hop, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
}

/// Delivers a reply to a pod of this node, past the host's stack.
#[inline(never)]
pub fn to_pod(skb: &Skb, headers: &Headers, reverse: &ReverseSnat, delivery: &Delivery) -> i32 {
    if rewrite::hop(skb, headers).is_err() || reverse_snat(skb, headers, reverse).is_err() {
        return drop(skb, DropReason::Rewrite);
    }
    skb.clear_mark();
    if delivery.mode == DeliveryMode::Peer as u8 {
        // The packet does not pass the pod's link-layer check, its MAC address being the uplink's.
        skb.set_type_host();
        // SAFETY: plain integers.
        return unsafe { bpf_redirect_peer(delivery.ifindex, 0) as i32 };
    }
    match request() {
        Ok(Request { next_hop, .. }) => {
            set_next_hop(next_hop, &delivery.ip);
            to_neighbour(delivery.ifindex, next_hop)
        }
        Err(Refused) => drop(skb, DropReason::Rewrite),
    }
}

/// Tells a pod that its packet is too big for the way out: `mtu` bytes of IP fit.
#[inline(always)]
pub fn too_big(skb: &Skb, headers: &Headers, mtu: u16) -> i32 {
    let Some(settings) = Maps.settings() else { return drop(skb, DropReason::NotReady) };
    let v4 = headers.packet.tuple.source.is_v4();
    let router = if v4 { &settings.router_v4 } else { &settings.router_v6 };
    if *router == Ip::UNSPECIFIED {
        return drop(skb, DropReason::TooBig);
    }
    count(skb, DropReason::TooBig);
    sent_back(skb, icmp_error::too_big(skb, mtu, router))
}

/// Tells a server that its packet is too big for the tunnel, as the egress IP that it wrote to.
#[inline(always)]
pub fn too_big_reply(skb: &Skb, headers: &Headers, mtu: u16) -> i32 {
    count(skb, DropReason::TooBig);
    // An error is answered by none (RFC 4443, 2.4).
    if headers.packet.kind == Kind::IcmpError {
        return TC_ACT_SHOT;
    }
    sent_back(skb, icmp_error::too_big(skb, mtu, &headers.packet.tuple.destination))
}

/// Sends an answer back out of the interface that the packet came by.
#[inline(always)]
fn sent_back(skb: &Skb, made: Result<(), Refused>) -> i32 {
    match made {
        Ok(()) => answer::send_back(skb),
        Err(Refused) => TC_ACT_SHOT,
    }
}

/// Tells a pod, at its interface, that the firewall denies its packet.
#[inline(always)]
pub fn reject_to_pod(skb: &Skb, headers: &Headers) -> i32 {
    count(skb, DropReason::FirewallDenied);
    sent_back(skb, refuse(skb, headers))
}

/// Tells a pod that the firewall denies its packet, as if the destination had: see [`reset`].
#[inline(always)]
pub fn reject(skb: &Skb, headers: &Headers) -> i32 {
    count(skb, DropReason::FirewallDenied);
    turned_round(skb, refuse(skb, headers))
}

/// Turns a denied packet into RST or an ICMP error, from whom it was for: a node's own address would not be believed
/// where it comes in by an uplink. Whoever sends errors gets none (RFC 1122, 3.2.2), nor do later fragments, which have
/// no header to answer.
#[inline(always)]
fn refuse(skb: &Skb, headers: &Headers) -> Result<(), Refused> {
    let packet = &headers.packet;
    match packet.kind {
        _ if packet.part == Part::Later => Err(Refused),
        Kind::Tcp => reset::turn(skb, headers),
        Kind::Udp | Kind::Sctp | Kind::EchoRequest | Kind::Other => {
            icmp_error::prohibited(skb, &packet.tuple.destination)
        }
        Kind::EchoReply | Kind::IcmpError | Kind::OtherIcmp | Kind::Fragment | Kind::Malformed => {
            Err(Refused)
        }
    }
}

/// Answers a TCP packet of no flow with RST, as if the server had sent it: it comes in by the uplink that the
/// packet was to leave by, so that the host's stack undoes what it had done to the packet.
#[inline(always)]
pub fn reset(skb: &Skb, headers: &Headers) -> i32 {
    count(skb, DropReason::NoFlow);
    turned_round(skb, reset::turn(skb, headers))
}

/// Has an answer come in by the uplink that the packet was to leave by. One that came past the host's stack is answered
/// past it, out of the interface that it came by: the stack's connection tracking would call the answer invalid.
#[inline(always)]
fn turned_round(skb: &Skb, made: Result<(), Refused>) -> i32 {
    if made.is_ok() && Maps.took_direct() {
        skb.clear_hash();
        skb.clear_mark();
        // SAFETY: plain integers.
        return unsafe { bpf_redirect(skb.ingress_ifindex(), 0) as i32 };
    }
    let Some(interface) = Maps.interface(skb.ifindex()) else { return TC_ACT_SHOT };
    // The stack takes what is addressed to the interface's own hardware address.
    if made.is_err() || skb.store(0, &interface.mac).is_err() {
        return TC_ACT_SHOT;
    }
    skb.clear_hash();
    skb.clear_mark();
    // SAFETY: plain integers.
    unsafe { bpf_redirect(skb.ifindex(), u64::from(BPF_F_INGRESS)) as i32 }
}

/// Lets a reply go on up the host's stack from the uplink that it came by.
#[inline(always)]
pub fn up(skb: &Skb, headers: &Headers, reverse: &ReverseSnat) -> i32 {
    match reverse_snat(skb, headers, reverse) {
        Ok(()) => NEXT,
        Err(_) => drop(skb, DropReason::Rewrite),
    }
}

/// Lets a reply that came through the tunnel enter the host's stack by the interface that the node's route to
/// the server leads out of: reverse-path filters drop it on any other.
#[inline(never)]
pub fn into_uplink(skb: &Skb, headers: &Headers, reverse: &ReverseSnat) -> i32 {
    if reverse_snat(skb, headers, reverse).is_err() {
        return drop(skb, DropReason::Rewrite);
    }
    let tuple = &headers.packet.tuple;
    let ifindex = match route(skb, (&reverse.destination, &tuple.source), tuple, skb.ifindex(), 0) {
        Ok((ifindex, _)) => ifindex,
        Err(reason) => return drop(skb, reason),
    };
    let Some(interface) = Maps.interface(ifindex) else { return drop(skb, DropReason::NoRoute) };
    // The stack takes what is addressed to the interface's own hardware address.
    if skb.store(0, &interface.mac).is_err() {
        return drop(skb, DropReason::Rewrite);
    }
    skb.clear_mark();
    // SAFETY: plain integers.
    unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) as i32 }
}

#[inline(always)]
fn reverse_snat(skb: &Skb, headers: &Headers, reverse: &ReverseSnat) -> Result<(), Refused> {
    rewrite::reverse_snat(skb, headers, reverse)?;
    clamp_mss(skb, headers)
}

/// Every SYN and SYN-ACK is clamped, through the tunnel or not: the holder may move while the flow lives.
#[inline(always)]
fn clamp_mss(skb: &Skb, headers: &Headers) -> Result<(), Refused> {
    rewrite::clamp_mss(skb, headers, Maps.settings().map_or(0, |s| s.mtu))
}

const SUCCESS: i64 = BPF_FIB_LKUP_RET_SUCCESS as i64;
const NO_NEIGH: i64 = BPF_FIB_LKUP_RET_NO_NEIGH as i64;
const FRAG_NEEDED: i64 = BPF_FIB_LKUP_RET_FRAG_NEEDED as i64;
const NOT_FWDED: i64 = BPF_FIB_LKUP_RET_NOT_FWDED as i64;

/// Asks the node's routes, all tables and rules, for the way between two addresses. `ifindex` is the interface to
/// leave by with `BPF_FIB_LOOKUP_OUTPUT`, else the one the packet came in by. Gives the helper's answer.
#[inline(always)]
fn look_up(
    skb: &Skb,
    (source, destination): (&Ip, &Ip),
    tuple: &Tuple,
    ifindex: u32,
    flags: u32,
) -> (i64, Option<&'static mut FibLookup>) {
    let Ok(Request { fib, .. }) = request() else { return (-1, None) };
    // SAFETY: all zeros is a value of this plain struct.
    unsafe { core::ptr::write_bytes(&raw mut *fib, 0, 1) };
    fib.ifindex = ifindex;
    fib.l4_protocol = tuple.protocol;
    fib.sport = tuple.source_port.to_be();
    fib.dport = tuple.destination_port.to_be();
    if source.is_v4() {
        fib.family = AF_INET;
        fib.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(source.v4_octets());
        fib.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(destination.v4_octets());
    } else {
        fib.family = AF_INET6;
        fib.__bindgen_anon_3.ipv6_src = words(source);
        fib.__bindgen_anon_4.ipv6_dst = words(destination);
    }
    let flags = flags | BPF_FIB_LOOKUP_SKIP_NEIGH;
    let size = size_of::<FibLookup>() as i32;
    // SAFETY: the helper reads and writes the struct at its full size.
    let result = unsafe { bpf_fib_lookup(skb.as_ptr(), &raw mut *fib, size, flags) };
    (result, Some(fib))
}

/// Interface and next hop for [`look_up`].
#[inline(always)]
fn route(
    skb: &Skb,
    addresses: (&Ip, &Ip),
    tuple: &Tuple,
    ifindex: u32,
    flags: u32,
) -> Result<(u32, &'static mut bpf_redir_neigh), DropReason> {
    let (result, fib) = look_up(skb, addresses, tuple, ifindex, flags);
    let (Some(fib), Ok(Request { next_hop, .. })) = (fib, request()) else { return Err(DropReason::NoRoute) };
    match result {
        SUCCESS | NO_NEIGH => {}
        // The helper compares the packet with the device's MTU (bpf_ipv4_fib_lookup, net/core/filter.c).
        FRAG_NEEDED => return Err(DropReason::TooBig),
        _ => return Err(DropReason::NoRoute),
    }
    // An IPv4 destination may have an IPv6 next hop (RFC 5549).
    if fib.family == AF_INET6 {
        // SAFETY: the helper wrote the IPv6 member, as the family says.
        set_next_hop(next_hop, &from_words(unsafe { fib.__bindgen_anon_4.ipv6_dst }));
    } else {
        // SAFETY: the helper wrote the IPv4 member, as the family says.
        set_next_hop(next_hop, &Ip::v4(unsafe { fib.__bindgen_anon_4.ipv4_dst }.to_ne_bytes()));
    }
    Ok((fib.ifindex, next_hop))
}

#[inline(always)]
fn set_next_hop(hop: &mut bpf_redir_neigh, address: &Ip) {
    if address.is_v4() {
        hop.nh_family = u32::from(AF_INET);
        hop.__bindgen_anon_1.ipv4_nh = u32::from_ne_bytes(address.v4_octets());
    } else {
        hop.nh_family = u32::from(AF_INET6);
        hop.__bindgen_anon_1.ipv6_nh = words(address);
    }
}
