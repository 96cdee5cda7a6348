//! Ways a packet takes: out of an uplink, through the tunnel, to a pod, into the host's stack.

use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS,
    BPF_FIB_LOOKUP_OUTPUT, BPF_FIB_LOOKUP_SKIP_NEIGH, bpf_fib_lookup as FibLookup, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::{bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer};
use datapath::addr::Ip;
use datapath::keys::{Delivery, DeliveryMode, Tuple};
use datapath::tables::Tables as _;
use datapath::verdict::{DropReason, ReverseSnat, Snat, Way};

use crate::NEXT;
use crate::ctx::{Refused, Skb};
use crate::packet::Headers;
use crate::report::drop;
use crate::rewrite;
use crate::tables::Maps;

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
        Way::Uplink(uplink) => {
            let tuple = Tuple { source: snat.source, source_port: snat.source_port, ..headers.packet.tuple };
            out_of(skb, &tuple, uplink)
        }
        Way::Tunnel(node) => through_tunnel(skb, &node),
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
#[inline(always)]
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
#[inline(always)]
pub fn out_of(skb: &Skb, tuple: &Tuple, uplink: u32) -> i32 {
    match route(skb, tuple, uplink, BPF_FIB_LOOKUP_OUTPUT) {
        Ok((_, mut next_hop)) => {
            skb.clear_mark();
            // SAFETY: the helper reads the struct at its full size.
            unsafe {
                bpf_redirect_neigh(uplink, &raw mut next_hop, size_of::<bpf_redir_neigh>() as i32, 0) as i32
            }
        }
        Err(reason) => drop(skb, reason),
    }
}

/// Delivers a reply to a pod of this node, past the host's stack.
#[inline(always)]
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
    let mut next_hop = next_hop_v4(u32::from_ne_bytes(delivery.ip.v4_octets()));
    // SAFETY: the helper reads the struct at its full size.
    unsafe {
        bpf_redirect_neigh(delivery.ifindex, &raw mut next_hop, size_of::<bpf_redir_neigh>() as i32, 0) as i32
    }
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
#[inline(always)]
pub fn into_uplink(skb: &Skb, headers: &Headers, reverse: &ReverseSnat) -> i32 {
    if reverse_snat(skb, headers, reverse).is_err() {
        return drop(skb, DropReason::Rewrite);
    }
    let tuple = &headers.packet.tuple;
    let back = Tuple { source: reverse.destination, destination: tuple.source, ..*tuple };
    let ifindex = match route(skb, &back, skb.ifindex(), 0) {
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

/// Asks the node's routes, all tables and rules, for interface and next hop. `ifindex` is the interface to
/// leave by with `BPF_FIB_LOOKUP_OUTPUT`, else the one the packet came in by.
#[inline(always)]
fn route(skb: &Skb, tuple: &Tuple, ifindex: u32, flags: u32) -> Result<(u32, bpf_redir_neigh), DropReason> {
    // SAFETY: all zeros is a value of this plain struct.
    let mut fib: FibLookup = unsafe { core::mem::zeroed() };
    fib.family = AF_INET;
    fib.ifindex = ifindex;
    fib.l4_protocol = tuple.protocol;
    fib.sport = tuple.source_port.to_be();
    fib.dport = tuple.destination_port.to_be();
    fib.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(tuple.source.v4_octets());
    fib.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(tuple.destination.v4_octets());
    // SAFETY: the helper reads and writes the struct at its full size.
    let result = unsafe {
        bpf_fib_lookup(
            skb.as_ptr(),
            &raw mut fib,
            size_of::<FibLookup>() as i32,
            flags | BPF_FIB_LOOKUP_SKIP_NEIGH,
        )
    };
    const SUCCESS: i64 = BPF_FIB_LKUP_RET_SUCCESS as i64;
    const NO_NEIGH: i64 = BPF_FIB_LKUP_RET_NO_NEIGH as i64;
    const FRAG_NEEDED: i64 = BPF_FIB_LKUP_RET_FRAG_NEEDED as i64;
    match result {
        SUCCESS | NO_NEIGH => {}
        // The helper compares the packet with the device's MTU (bpf_ipv4_fib_lookup, net/core/filter.c).
        FRAG_NEEDED => return Err(DropReason::TooBig),
        _ => return Err(DropReason::NoRoute),
    }
    // An IPv4 destination may have an IPv6 next hop (RFC 5549).
    let next_hop = if fib.family == AF_INET6 {
        // SAFETY: all zeros is a value; the helper wrote the IPv6 member, as the family says.
        unsafe {
            let mut hop: bpf_redir_neigh = core::mem::zeroed();
            hop.nh_family = u32::from(AF_INET6);
            hop.__bindgen_anon_1.ipv6_nh = fib.__bindgen_anon_4.ipv6_dst;
            hop
        }
    } else {
        // SAFETY: the helper wrote the IPv4 member, as the family says.
        next_hop_v4(unsafe { fib.__bindgen_anon_4.ipv4_dst })
    };
    Ok((fib.ifindex, next_hop))
}

#[inline(always)]
fn next_hop_v4(address: u32) -> bpf_redir_neigh {
    // SAFETY: all zeros is a value of this plain struct.
    let mut hop: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    hop.nh_family = u32::from(AF_INET);
    hop.__bindgen_anon_1.ipv4_nh = address;
    hop
}
