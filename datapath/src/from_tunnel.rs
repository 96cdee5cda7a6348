//! A packet comes out of the tunnel: at a gateway to leave by its uplink, at a source node as a reply. Only
//! what the sending node may send is accepted; a gateway keeps no state.

use crate::addr::Ip;
use crate::fragments::{self, Fate, Place};
use crate::from_uplink::steer;
use crate::keys::{NetworkKind, Settings};
use crate::packet::{Kind, Packet};
use crate::ports::granule_of;
use crate::tables::Tables;
use crate::verdict::{Act, DropReason, FromOutside};

/// Whether a packet is addressed to a node's end of the tunnel: only nodes send such, themselves.
#[inline(always)]
pub(crate) fn is_for_a_tunnel<T: Tables>(t: &T, settings: &Settings, packet: &Packet) -> bool {
    packet.kind == Kind::Udp
        && packet.tuple.destination_port == settings.tunnel_port
        && NetworkKind::is_node(t.network(&packet.tuple.destination))
}

/// Decides on a packet that node `sender` (its tunnel address) sent with `vni`.
#[inline(always)]
pub fn from_tunnel<'t, T: Tables, A: Act<FromOutside<'t>>>(
    t: &'t T,
    sender: &Ip,
    vni: u32,
    packet: &Packet,
    to: &A,
) -> A::Done {
    let drop = |reason| to.act(FromOutside::Drop(reason));
    let Some(settings) = t.settings() else { return drop(DropReason::NotReady) };
    let Some(node) = t.node_id(sender) else { return drop(DropReason::UnknownTunnelPeer) };
    if vni != settings.tunnel_vni || node == settings.node {
        return drop(DropReason::UnknownTunnelPeer);
    }
    // Outwards: the source is an egress IP, and the sender leases the source port.
    let tuple = &packet.tuple;
    if let Some(egress) = t.egress_id(&tuple.source)
        && matches!(packet.kind, Kind::Tcp | Kind::Udp | Kind::Sctp | Kind::EchoRequest | Kind::IcmpError)
        && !packet.by_router
        && granule_of(tuple.source_port).is_some_and(|granule| t.granule(egress, granule) == node)
    {
        fragments::remember(t, Place::FromOutside, packet, Fate::Flow, None);
        return match t.egress_ip(egress) {
            Some(egress) if egress.uplink != 0 => to.act(FromOutside::Forward(egress.uplink)),
            _ => drop(DropReason::NotAGateway),
        };
    }
    match t.egress_id(&tuple.destination) {
        Some(egress) => steer(t, settings, egress, packet, false, to),
        None => drop(DropReason::TunnelNotAllowed),
    }
}
