//! Answers of resolvers, on their way to pods whose firewalls have names: what they say is learnt before they arrive.

use datapath::dns::{HEADER, MESSAGE, Reader, TRUNCATED};
use datapath::keys::{NameEvent, Pod, Segment};
use datapath::names;
use datapath::packet::{Kind, Part};

use crate::NEXT;
use crate::ctx::{Refused, Skb};
use crate::hold;
use crate::maps;
use crate::packet::Headers;
use crate::rewrite;
use crate::tables::{Maps, count_name};

/// Length of a UDP header (RFC 768).
const UDP_LEN: usize = 8;

/// What a CPU reads: the stack's 512 bytes are needed elsewhere.
#[repr(C)]
pub struct Learning {
    /// Stands before the message, where this is part of one over TCP.
    pub segment: Segment,
    /// The message.
    pub reader: Reader,
}

/// This CPU's own [`Learning`], as it was left.
#[inline(always)]
pub fn learning() -> Option<&'static mut Learning> {
    let learning = maps::LEARNING.get_ptr_mut(0)?;
    // SAFETY: programs of one CPU do not interrupt each other at TC.
    Some(unsafe { &mut *learning })
}

/// Notes a question over UDP. A function of its own, as the other: they need stack that their callers do not have.
#[inline(never)]
pub fn note(skb: &Skb, headers: &Headers) {
    let at = headers.l4 + UDP_LEN;
    if at + HEADER as usize > headers.end {
        return;
    }
    let Ok(id) = skb.load::<[u8; 2]>(at) else { return };
    names::asks(&Maps, skb.ifindex(), &headers.packet.tuple, u16::from_be_bytes(id));
}

/// Learns from an answer. Gives the TC action.
#[inline(never)]
pub fn answer(skb: &Skb, headers: &Headers) -> i32 {
    let Some(pod) = names::learns(&Maps, &headers.packet.tuple) else { return NEXT };
    match headers.packet.kind {
        Kind::Udp => datagram(skb, headers, &pod),
        _ => hold::segment(skb, headers, &pod),
    }
}

#[inline(always)]
fn datagram(skb: &Skb, headers: &Headers, pod: &Pod) -> i32 {
    let Some(Learning { reader, .. }) = learning() else { return NEXT };
    let (l4, end) = (headers.l4, headers.end);
    let at = l4 + UDP_LEN;
    let payload = end.saturating_sub(at);
    // Too short for any message.
    if payload < HEADER as usize {
        return NEXT;
    }
    let len = if payload > MESSAGE { MESSAGE } else { payload };
    if skb.load_some(at, &mut reader.message, len).is_err() {
        return NEXT;
    }
    reader.len = len as u32;
    let Ok(says) = skb.load::<[u8; 2]>(l4 + 4) else { return NEXT };
    let whole = headers.packet.part == Part::Whole
        && payload <= MESSAGE
        && skb.gso_size() == 0
        && usize::from(u16::from_be_bytes(says)) == payload + UDP_LEN;
    let tuple = &headers.packet.tuple;
    match names::learn(&Maps, pod, &tuple.source, tuple.destination_port, whole, reader) {
        names::Learning::Pass => {}
        names::Learning::Unasked => count_name(NameEvent::Unasked),
        names::Learning::Truncate => {
            count_name(NameEvent::Truncated);
            let _: Result<(), Refused> = truncate(skb, l4);
        }
    }
    NEXT
}

/// Sets "truncated" in a message over UDP.
#[inline(always)]
fn truncate(skb: &Skb, l4: usize) -> Result<(), Refused> {
    let at = l4 + UDP_LEN + 2;
    let [first, second] = skb.load::<[u8; 2]>(at)?;
    rewrite::udp_word(skb, l4, at, [first, second], [first | TRUNCATED, second])
}
