//! Fragments follow their datagram's first fragment, which alone has ports: what the first is stays in a table
//! for some seconds, under the datagram's addresses and identification.
//!
//! A fragment that comes before its first, or long after it, is dropped where it could not be told apart. The
//! host's stack puts datagrams together before netfilter, where connection tracking runs; where it does not,
//! fragments are forwarded one by one, and [`Place::ToUplink`] keeps the token for the later ones.

use crate::conntrack::{older_than, seconds};
use crate::keys::{FragmentHead, FragmentKey, Token};
use crate::limits::FRAGMENT_SECONDS;
use crate::packet::{Kind, Packet, Part, SCTP, TCP};
use crate::tables::Tables;

/// Where a fragment is seen: the same datagram is another thing in each place.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// As the pod sent it.
    FromPod = 1,
    /// Behind the host's stack.
    ToUplink = 2,
    /// At an uplink or out of the tunnel.
    FromOutside = 3,
}

/// What became of a first fragment at [`Place::FromPod`], and is to become of the later ones.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Goes by its flow.
    Flow = 0,
    /// Goes up the host's stack.
    Up = 1,
    /// Answers a connection that came in.
    Pass = 2,
}

#[inline(always)]
const fn key_of(place: Place, packet: &Packet) -> FragmentKey {
    FragmentKey {
        source: packet.tuple.source,
        destination: packet.tuple.destination,
        id: packet.fragment_id,
        place: place as u8,
        pad: [0; 3],
    }
}

/// Keeps what a first fragment is. `token`: whose it is, behind the host's stack.
#[inline(always)]
pub fn remember<T: Tables>(t: &T, place: Place, packet: &Packet, fate: Fate, token: Option<&Token>) {
    if packet.part != Part::First {
        return;
    }
    let head = FragmentHead {
        seen: t.now(),
        source_port: packet.tuple.source_port,
        destination_port: packet.tuple.destination_port,
        protocol: packet.tuple.protocol,
        echo: u8::from(packet.kind == Kind::EchoRequest) + 2 * u8::from(packet.kind == Kind::EchoReply),
        fate: fate as u8,
        pad: 0,
        token: token.copied().unwrap_or_default(),
    };
    t.put_fragment(&key_of(place, packet), &head);
}

/// What the first fragment of a later one is, if it was seen lately.
#[inline(always)]
pub fn head<'t, T: Tables>(t: &'t T, place: Place, packet: &Packet) -> Option<&'t FragmentHead> {
    t.fragment(&key_of(place, packet))
        .filter(|head| !older_than(t.now(), head.seen, seconds(FRAGMENT_SECONDS)))
}

/// Gives a later fragment the ports and the kind of its first, if that is known: what every program does
/// before it decides.
#[inline(always)]
pub fn recall<T: Tables>(t: &T, place: Place, packet: &mut Packet) {
    if packet.kind != Kind::Fragment {
        return;
    }
    let Some(head) = head(t, place, packet) else { return };
    packet.tuple.source_port = head.source_port;
    packet.tuple.destination_port = head.destination_port;
    packet.tuple.protocol = head.protocol;
    packet.kind = match (head.echo, head.protocol) {
        (1, _) => Kind::EchoRequest,
        (2, _) => Kind::EchoReply,
        (_, TCP) => Kind::Tcp,
        (_, SCTP) => Kind::Sctp,
        _ => Kind::Udp,
    };
}
