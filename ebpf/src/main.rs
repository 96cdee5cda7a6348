//! Outgate's TC programs. Each one parses, lets `datapath` decide, and acts on the decision.
//!
//! A packet's way out: [`from_pod`], the host's stack, [`to_uplink`], the tunnel, [`from_tunnel`] at the
//! gateway. Back: [`from_uplink`] at the gateway, [`from_tunnel`] at the pod's node.

#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "atomic addition: see `tables.rs`")]

mod answer;
mod arp;
mod credit;
mod ctx;
mod guard;
mod hold;
mod icmp_error;
mod learn;
mod maps;
mod nd;
mod packet;
mod report;
mod reset;
mod rewrite;
mod send;
mod sweep;
mod tables;

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use datapath::fragments::{Place, recall};
use datapath::names;
use datapath::verdict::{Act, DropReason, FromOutside, FromPod, ToUplink};

use crate::ctx::Skb;
use crate::packet::{Headers, Parsed};
use crate::report::drop;
use crate::tables::Maps;

/// "Next": the following program, or none. The value of both `TC_ACT_UNSPEC` and `TCX_NEXT`.
const NEXT: i32 = TC_ACT_UNSPEC;

/// TC ingress of a pod-facing interface.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let Parsed::Ip(parsed) = packet::parse_pods(&skb) else { return NEXT };
    recall(&Maps, Place::FromPod, &mut parsed.packet);
    if names::may_ask(&parsed.packet) {
        learn::note(&skb, parsed);
    }
    let at = AfterPod { skb: &skb, headers: parsed };
    datapath::from_pod::from_pod(&Maps, skb.ifindex(), &parsed.packet, &at)
}

/// A packet at `from_pod`.
struct AfterPod<'a> {
    skb: &'a Skb,
    headers: &'a Headers,
}

impl Act<FromPod> for AfterPod<'_> {
    type Done = i32;
    #[inline(always)]
    fn act(&self, verdict: FromPod) -> i32 {
        let Self { skb, headers } = self;
        match verdict {
            FromPod::NotOurs => NEXT,
            FromPod::Pass => {
                skb.set_hash(tables::pass_token());
                NEXT
            }
            FromPod::Unmarked => {
                skb.clear_hash();
                NEXT
            }
            FromPod::Identify(token, stack) => send::depart(skb, headers, token, stack),
            FromPod::Translate(snat) => send::offloaded(skb, headers, &snat),
            FromPod::TooBig(mtu) => send::too_big(skb, headers, mtu),
            FromPod::Reject => send::reject_to_pod(skb, headers),
            FromPod::Drop(reason) => drop(skb, reason),
        }
    }
}

/// TC egress of a pod-facing interface.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    if let Parsed::Ip(parsed) = packet::parse_pods(&skb) {
        datapath::to_pod::to_pod(&Maps, &parsed.packet);
        if names::may_answer(&parsed.packet) {
            return learn::answer(&skb, parsed);
        }
    }
    NEXT
}

/// TC egress of an uplink.
#[classifier]
pub fn to_uplink(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let ingress = skb.ingress_ifindex();
    // The node's own packets, and the outer packets of tunnels: before any parsing.
    if ingress == 0 {
        return NEXT;
    }
    let Parsed::Ip(parsed) = packet::parse_pods(&skb) else { return NEXT };
    recall(&Maps, Place::ToUplink, &mut parsed.packet);
    let at = BeforeUplink { skb: &skb, headers: parsed };
    datapath::to_uplink::to_uplink(&Maps, skb.ifindex(), ingress, skb.hash(), &parsed.packet, &at)
}

/// A packet at `to_uplink`.
struct BeforeUplink<'a> {
    skb: &'a Skb,
    headers: &'a Headers,
}

impl Act<ToUplink> for BeforeUplink<'_> {
    type Done = i32;
    #[inline(always)]
    fn act(&self, verdict: ToUplink) -> i32 {
        let Self { skb, headers } = self;
        match verdict {
            ToUplink::NotOurs => NEXT,
            ToUplink::Pass => {
                skb.clear_hash();
                NEXT
            }
            ToUplink::Translate(snat) => {
                // Without this the tunnel's outer packet would inherit the token.
                skb.clear_hash();
                send::translated(skb, headers, &snat)
            }
            ToUplink::Reset => send::reset(skb, headers),
            ToUplink::Full => {
                sweep::make_room(skb);
                drop(skb, DropReason::FlowTableFull)
            }
            ToUplink::Reject => send::reject(skb, headers),
            ToUplink::Drop(reason) => drop(skb, reason),
        }
    }
}

/// Run by the agent, on no packet.
#[classifier]
pub fn sweep(_ctx: TcContext) -> i32 {
    sweep::run(false);
    NEXT
}

/// Called by `to_uplink` where the flow table is full.
#[classifier]
pub fn make_room(ctx: TcContext) -> i32 {
    sweep::come_again(&Skb::new(ctx))
}

/// Run by the agent, on what it has learnt itself. Gives the number of entries.
#[classifier]
pub fn credit(ctx: TcContext) -> i32 {
    credit::run(&Skb::new(ctx))
}

/// TC ingress of an uplink.
#[classifier]
pub fn from_uplink(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let parsed = match packet::parse(&skb) {
        Parsed::Ip(parsed) => parsed,
        Parsed::Arp => return arp::answer(&skb),
        Parsed::Solicitation => return nd::answer(&skb),
        Parsed::Other => return NEXT,
    };
    recall(&Maps, Place::FromOutside, &mut parsed.packet);
    datapath::from_uplink::from_uplink(&Maps, &parsed.packet, &AfterUplink { skb: &skb, headers: parsed })
}

/// TC ingress of the tunnel's device.
#[classifier]
pub fn from_tunnel(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let Parsed::Ip(parsed) = packet::parse(&skb) else {
        return drop(&skb, DropReason::TunnelNotAllowed);
    };
    recall(&Maps, Place::FromOutside, &mut parsed.packet);
    let Ok((sender, vni)) = skb.tunnel_sender() else { return drop(&skb, DropReason::UnknownTunnelPeer) };
    let at = AfterTunnel { skb: &skb, headers: parsed };
    datapath::from_tunnel::from_tunnel(&Maps, &sender, vni, &parsed.packet, &at)
}

/// A packet at `from_uplink`.
struct AfterUplink<'a> {
    skb: &'a Skb,
    headers: &'a Headers,
}

impl Act<FromOutside<'_>> for AfterUplink<'_> {
    type Done = i32;
    #[inline(always)]
    fn act(&self, verdict: FromOutside<'_>) -> i32 {
        let Self { skb, headers } = self;
        match verdict {
            FromOutside::NotOurs => NEXT,
            FromOutside::Forward(uplink) => send::out_of(skb, &headers.packet.tuple.source, headers, uplink),
            FromOutside::Tunnel(node) => send::through_tunnel(skb, &node),
            FromOutside::Deliver(reverse, delivery) => send::to_pod(skb, headers, &reverse, delivery),
            FromOutside::Host(reverse) => send::up(skb, headers, &reverse),
            FromOutside::TooBig(mtu) => send::too_big_reply(skb, headers, mtu),
            FromOutside::Drop(reason) => drop(skb, reason),
        }
    }
}

/// A packet at `from_tunnel`.
struct AfterTunnel<'a> {
    skb: &'a Skb,
    headers: &'a Headers,
}

impl Act<FromOutside<'_>> for AfterTunnel<'_> {
    type Done = i32;
    #[inline(always)]
    fn act(&self, verdict: FromOutside<'_>) -> i32 {
        let Self { skb, headers } = self;
        match verdict {
            FromOutside::Forward(uplink) => send::out_of(skb, &headers.packet.tuple.source, headers, uplink),
            FromOutside::Deliver(reverse, delivery) => send::to_pod(skb, headers, &reverse, delivery),
            FromOutside::Host(reverse) => send::into_uplink(skb, headers, &reverse),
            FromOutside::Drop(reason) => drop(skb, reason),
            // What came through the tunnel goes into no tunnel and to no other program.
            FromOutside::Tunnel(_) | FromOutside::NotOurs | FromOutside::TooBig(_) => {
                drop(skb, DropReason::TunnelNotAllowed)
            }
        }
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Most helpers are only for programs that declare a GPL-compatible licence; the source is Apache-2.0.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
