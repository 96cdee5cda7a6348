//! A packet comes to the node (TC ingress of an uplink): what is addressed to an egress IP is steered to the
//! node that leases its port, and there to the pod.

use crate::addr::Ip;
use crate::conntrack::{Sender, expired, next_state};
use crate::fragments::{self, Fate, Place};
use crate::keys::{DeliveryMode, EgressId, FlowPath, IfIndex, ReplyKey, Settings};
use crate::packet::{Kind, Packet, Part};
use crate::ports::{flow_key_of, granule_of};
use crate::tables::Tables;
use crate::verdict::{Act, DropReason, FromOutside, ReverseSnat};

/// Decides on a packet that came in by an uplink.
#[inline(always)]
pub fn from_uplink<'t, T: Tables, A: Act<FromOutside<'t>>>(t: &'t T, packet: &Packet, to: &A) -> A::Done {
    let Some(egress) = t.egress_id(&packet.tuple.destination) else { return to.act(FromOutside::NotOurs) };
    let Some(settings) = t.settings() else { return to.act(FromOutside::Drop(DropReason::NotReady)) };
    steer(t, settings, egress, packet, true, to)
}

/// Whether this node answers ARP and neighbour discovery for an address that is asked for on `uplink`: only
/// the holder claims it, and only where its network is.
#[inline(always)]
pub fn claims<T: Tables>(t: &T, uplink: IfIndex, target: &Ip) -> bool {
    let Some(settings) = t.settings() else { return false };
    t.egress_id(target)
        .and_then(|id| t.egress_ip(id))
        .is_some_and(|egress| egress.holder == settings.node && egress.uplink == uplink)
}

/// Steers a packet to an egress IP by its destination port's granule. An egress IP never reaches the node's
/// own services: what answers no flow is dropped. `may_tunnel`: it did not come through the tunnel itself.
#[inline(always)]
pub(crate) fn steer<'t, T: Tables, A: Act<FromOutside<'t>>>(
    t: &'t T,
    settings: &Settings,
    egress: EgressId,
    packet: &Packet,
    may_tunnel: bool,
    to: &A,
) -> A::Done {
    let drop = |reason| to.act(FromOutside::Drop(reason));
    fragments::remember(t, Place::FromOutside, packet, Fate::Flow, None);
    match packet.kind {
        Kind::Sctp if packet.part != Part::Whole => return drop(DropReason::Fragment),
        Kind::Tcp | Kind::Udp | Kind::Sctp | Kind::EchoReply | Kind::IcmpError => {}
        Kind::EchoRequest => return drop(DropReason::NoReplyFlow),
        Kind::OtherIcmp => return drop(DropReason::IcmpType),
        Kind::Fragment => return drop(DropReason::Fragment),
        Kind::Other => return drop(DropReason::Protocol),
        Kind::Malformed => return drop(DropReason::Malformed),
    }
    let Some(granule) = granule_of(packet.tuple.destination_port) else { return drop(DropReason::NoRange) };
    let node = t.granule(egress, granule);
    if node == 0 {
        return drop(DropReason::NoRange);
    }
    if node == settings.node {
        return deliver(t, settings, egress, packet, to);
    }
    if !may_tunnel {
        return drop(DropReason::TunnelNotAllowed);
    }
    // Who sent it may send less; nobody else can fragment it.
    if packet.larger_than(settings.tunnel_max) {
        return if packet.dont_fragment {
            to.act(FromOutside::TooBig(settings.tunnel_max))
        } else {
            drop(DropReason::TooBig)
        };
    }
    match t.node(node) {
        Some(node) => to.act(FromOutside::Tunnel(node.tunnel_ip)),
        None => drop(DropReason::NoRange),
    }
}

/// Reverse SNAT on the node that leases the port.
#[inline(always)]
fn deliver<'t, T: Tables, A: Act<FromOutside<'t>>>(
    t: &'t T,
    settings: &Settings,
    egress: EgressId,
    packet: &Packet,
    to: &A,
) -> A::Done {
    let tuple = &packet.tuple;
    let key = ReplyKey {
        egress,
        remote: tuple.source,
        egress_port: tuple.destination_port,
        remote_port: tuple.source_port,
        protocol: tuple.protocol,
        pad: [0; 3],
    };
    let Some(reply) = t.reply(&key) else { return to.act(FromOutside::Drop(DropReason::NoReplyFlow)) };
    let now = t.now();
    let alive = t.flow(&flow_key_of(&key, &reply), |flow| {
        let own = flow.egress == egress && flow.egress_port == key.egress_port;
        if !own || expired(settings, now, flow, key.protocol) {
            return false;
        }
        // An error proves nothing about the other end, and does not keep the flow alive (RFC 5508, REQ-10).
        if packet.kind != Kind::IcmpError {
            flow.state = next_state(flow.state, Sender::Server, key.protocol, packet.tcp_flags);
            flow.seen = now;
        }
        true
    });
    if alive != Some(true) {
        return to.act(FromOutside::Drop(DropReason::NoReplyFlow));
    }
    let reverse = ReverseSnat { destination: reply.local, destination_port: reply.local_port };
    match t.delivery(reply.pod) {
        None => to.act(FromOutside::Drop(DropReason::PodGone)),
        // The host's stack looks at options.
        Some(_) if reply.path == FlowPath::Host as u8 || packet.options => to.act(FromOutside::Host(reverse)),
        Some(_) if packet.ttl <= 1 => to.act(FromOutside::Drop(DropReason::TtlExpired)),
        Some(delivery) if delivery.ifindex == 0 => to.act(FromOutside::Drop(DropReason::PodGone)),
        // Into a pod's namespace anything goes; a device on the way drops what it does not carry (`is_skb_forwardable`,
        // net/core/dev.c), uncounted. The host's stack fragments.
        Some(delivery)
            if delivery.mode == DeliveryMode::Neighbour as u8 && packet.larger_than(delivery.mtu) =>
        {
            if packet.dont_fragment {
                to.act(FromOutside::Drop(DropReason::TooBig))
            } else {
                to.act(FromOutside::Host(reverse))
            }
        }
        Some(delivery) => to.act(FromOutside::Deliver(reverse, delivery)),
    }
}
