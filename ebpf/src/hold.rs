//! Segments of answers over TCP: each is dropped once and given to the agent, who reads the message that they are parts
//! of. The resolver's kernel sends it again.

use aya_ebpf::bindings::TC_ACT_SHOT;
use datapath::keys::{Held, HeldKey, NameEvent, Pod, Segment};
use datapath::limits::{SEGMENT_BYTES, SEGMENT_RECORDS};
use datapath::names::{self, Holding};
use datapath::packet::{Part, SYN};
use datapath::tables::Tables as _;
use datapath::verdict::DropReason;

use crate::NEXT;
use crate::ctx::{Refused, Skb};
use crate::learn::learning;
use crate::maps;
use crate::packet::Headers;
use crate::report::count;
use crate::tables::{Maps, count_name};

/// `BPF_ANY` (include/uapi/linux/bpf.h).
const ANY: u64 = 0;

/// Holds a segment to a pod, if it has to. Gives the TC action. A function of its own: others need the stack.
#[inline(never)]
pub fn segment(skb: &Skb, headers: &Headers, pod: &Pod) -> i32 {
    let Some(learning) = learning() else { return NEXT };
    // The parser has seen that there is a header of twenty bytes (RFC 9293, 3.1).
    let Ok(header) = skb.load::<[u8; 14]>(headers.l4) else { return NEXT };
    let at = headers.l4 + usize::from(header[12] >> 4) * 4;
    let payload = headers.end.saturating_sub(at) as u32;
    let flags = header[13];
    let seq = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    let tuple = &headers.packet.tuple;
    learning.segment = Segment {
        held: HeldKey {
            pod: pod.id,
            resolver: tuple.source,
            port: tuple.destination_port,
            resolver_port: tuple.source_port,
            // A SYN counts as a byte.
            seq: if flags & SYN != 0 { seq.wrapping_add(1) } else { seq },
        },
        firewall: pod.firewall,
        pod_ip: tuple.destination,
        payload,
        offset: 0,
        len: 0,
        flags: u32::from(flags),
    };
    let key = &mut learning.segment.held;
    let seq = key.seq;
    if flags & SYN != 0 {
        key.seq = HeldKey::CONNECTION;
        let _ = maps::HELD.remove(&*key); // of an earlier connection, if there was one
        key.seq = seq;
    }
    if payload == 0 {
        if flags & SYN != 0 {
            let _: Result<(), Refused> = give(0); // the agent does without, if it must
        }
        return NEXT;
    }
    key.seq = HeldKey::CONNECTION;
    // SAFETY: an entry of the map, copied out at once.
    let connection = unsafe { maps::HELD.get(&*key).copied() };
    key.seq = seq;
    // SAFETY: as above.
    let held = unsafe { maps::HELD.get(&*key).copied() };
    let now = Maps.now();
    match names::hold(connection, held, now, seq, payload) {
        Holding::Pass => return NEXT,
        Holding::Late => {
            count_name(NameEvent::Unread);
            return NEXT;
        }
        Holding::Drop => {}
        Holding::Copy => {
            let since = held.map_or(now, |held| held.since);
            let _ = maps::HELD.insert(&*key, &Held { since, read: 0 }, ANY); // an LRU map makes room
            count_name(NameEvent::Held);
            // What is not whole, or too long, the agent cannot read. It passes late.
            if headers.packet.part == Part::Whole && payload <= SEGMENT_RECORDS * SEGMENT_BYTES as u32 {
                copy(skb, at as u32, payload);
            }
        }
    }
    count(skb, DropReason::AnswerHeld);
    TC_ACT_SHOT
}

/// Gives the agent a segment's payload, piece by piece. Where a piece is refused the rest is of no use.
#[inline(always)]
fn copy(skb: &Skb, at: u32, payload: u32) {
    Maps.repeat(SEGMENT_RECORDS, |i| {
        let offset = i * SEGMENT_BYTES as u32;
        if offset >= payload {
            return true;
        }
        let Some(learning) = learning() else { return true };
        let left = (payload - offset) as usize;
        let len = if left > SEGMENT_BYTES { SEGMENT_BYTES } else { left };
        if skb.load_some((at + offset) as usize, &mut learning.reader.message, len).is_err() {
            return true;
        }
        (learning.segment.offset, learning.segment.len) = (offset, len as u32);
        give(len).is_err()
    });
}

/// Gives the agent a record: the segment's head, and so many bytes behind it.
#[inline(always)]
fn give(len: usize) -> Result<(), Refused> {
    let learning = learning().ok_or(Refused)?;
    // The verifier has to see the bound, though callers have seen to it.
    let len = core::hint::black_box(len);
    if len > SEGMENT_BYTES {
        return Err(Refused);
    }
    let record = (&raw const *learning).cast::<u8>();
    // SAFETY: the reader's message stands right behind the segment's head, and is longer.
    let record = unsafe { core::slice::from_raw_parts(record, size_of::<Segment>() + len) };
    maps::SEGMENTS.output_untyped::<[u8]>(record, 0).map_err(|_| Refused)
}
