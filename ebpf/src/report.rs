//! Drops, counted.

use aya_ebpf::bindings::TC_ACT_SHOT;
use datapath::verdict::DropReason;

use crate::ctx::Skb;
use crate::maps::DROPS;

/// Counts and drops.
#[inline(always)]
pub fn drop(skb: &Skb, reason: DropReason) -> i32 {
    count(skb, reason);
    TC_ACT_SHOT
}

/// Counts a packet that goes no further, but is answered.
#[inline(always)]
pub fn count(skb: &Skb, reason: DropReason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: the entry is this CPU's own, and programs of one CPU do not interrupt each other at TC.
        unsafe {
            (*count).packets = (*count).packets.wrapping_add(1);
            (*count).bytes = (*count).bytes.wrapping_add(u64::from(skb.len()));
        }
    }
}
