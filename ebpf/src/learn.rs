//! Answers of resolvers, on their way to pods whose firewalls have names: what they say is learnt before they arrive.

use core::mem::offset_of;

use datapath::dns::{HEADER, MESSAGE, Reader, TRUNCATED};
use datapath::keys::{NameEvent, Pod, Segment};
use datapath::names;
use datapath::packet::{Kind, Part};
use datapath::tables::Tables as _;

use crate::NEXT;
use crate::ctx::{Refused, Skb};
use crate::hold;
use crate::maps;
use crate::packet::Headers;
use crate::rewrite;
use crate::tables::{Maps, count_name};

/// Length of a UDP header (RFC 768).
const UDP_LEN: usize = 8;

/// Datagrams in one (`UDP_MAX_SEGMENTS`, include/linux/udp.h).
const DATAGRAMS: u32 = 128;

const _: () =
    assert!(offset_of!(Learning, reader) == size_of::<Segment>() && offset_of!(Reader, message) == 0);

/// What a CPU reads: the stack's 512 bytes are needed elsewhere.
#[repr(C)]
pub struct Learning {
    /// Stands right before the reader's message, where that is part of one over TCP.
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
        Kind::Udp => datagrams(skb, headers, &pod),
        _ => hold::segment(skb, headers, &pod),
    }
}

/// Learns from a datagram's answer; or from those of the several datagrams that the kernel has put together into one
/// (`UDP_SEGMENT`, and what is received with `rx-udp-gro-forwarding`).
#[inline(always)]
fn datagrams(skb: &Skb, headers: &Headers, pod: &Pod) -> i32 {
    let (begin, end) = (headers.l4 + UDP_LEN, headers.end);
    let Ok(says) = skb.load::<[u8; 2]>(headers.l4 + 4) else { return NEXT };
    let whole = headers.packet.part == Part::Whole
        && headers.l4 + usize::from(u16::from_be_bytes(says)) == headers.end;
    let size = match skb.gso_size() {
        0 => end.saturating_sub(begin),
        size => size as usize,
    };
    Maps.repeat(DATAGRAMS, |i| {
        let at = begin + i as usize * size;
        if at >= end {
            return true;
        }
        let left = end - at;
        datagram(skb, headers, pod, whole, (at, if left > size { size } else { left }));
        false
    });
    NEXT
}

#[inline(always)]
fn datagram(skb: &Skb, headers: &Headers, pod: &Pod, whole: bool, (at, payload): (usize, usize)) {
    let Some(Learning { reader, .. }) = learning() else { return };
    // Too short for any message.
    if payload < HEADER as usize {
        return;
    }
    let len = if payload > MESSAGE { MESSAGE } else { payload };
    if skb.load_some(at, &mut reader.message, len).is_err() {
        return;
    }
    reader.len = len as u32;
    let whole = whole && payload <= MESSAGE;
    let tuple = &headers.packet.tuple;
    match names::learn(&Maps, pod, &tuple.source, tuple.destination_port, whole, reader) {
        names::Learning::Pass => {}
        names::Learning::Unasked => count_name(NameEvent::Unasked),
        names::Learning::Truncate => {
            count_name(NameEvent::Truncated);
            let _: Result<(), Refused> = truncate(skb, headers.l4, at + 2);
        }
    }
}

/// Sets "truncated" in a message over UDP. Of several datagrams in one the checksums are made when they are taken
/// apart: what stands in the header is the pseudo-header's sum (`CHECKSUM_PARTIAL`; udp_gro_complete_segment,
/// net/ipv4/udp_offload.c), which is left alone.
#[inline(always)]
fn truncate(skb: &Skb, l4: usize, at: usize) -> Result<(), Refused> {
    let [first, second] = skb.load::<[u8; 2]>(at)?;
    rewrite::udp_word(skb, l4, at, [first, second], [first | TRUNCATED, second])
}
