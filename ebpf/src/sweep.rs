//! The sweep of the flow table, in the kernel: the agent starts it now and then, and a packet that finds the
//! table full does, so that no agent is needed for it.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{bpf_for_each_map_elem, bpf_redirect};
use datapath::conntrack::{Ticks, older_than};
use datapath::keys::{Flow, FlowKey, Settings, Swept};
use datapath::tables::Tables as _;

use crate::NEXT;
use crate::ctx::Skb;
use crate::maps;
use crate::tables::Maps;

/// Place of the program `sweep` in `PROGRAMS`.
const SWEEP: u32 = 0;

/// Whether a full table may be swept now: at most once a tick of 17 ms, or packets would do nothing else.
#[inline(always)]
fn is_due(now: Ticks) -> bool {
    maps::SWEPT.get(0).is_none_or(|swept| older_than(now, swept.when, 0))
}

/// Sweeps a full table, and has the packet at `to_uplink` come again. Returns if that is of no use: it has been
/// swept just now, or the agent has not put the program in its place.
///
/// A tail call: a loop over the table needs stack that `to_uplink` does not have to spare.
#[inline(always)]
pub fn make_room(skb: &Skb) {
    if is_due(Maps.now()) {
        // SAFETY: the context is this program's own.
        unsafe { maps::PROGRAMS.tail_call(skb.context(), SWEEP) };
    }
}

struct Sweep<'a> {
    settings: &'a Settings,
    now: Ticks,
    full: bool,
    removed: u32,
    left: u32,
}

extern "C" fn look(_map: *mut c_void, key: *const FlowKey, flow: *const Flow, sweep: *mut Sweep<'_>) -> i64 {
    // SAFETY: the helper gives an entry of FLOWS and what it was called with, all valid during the call.
    let (key, flow, sweep) = unsafe { (&*key, &*flow, &mut *sweep) };
    if datapath::sweep::sweep(&Maps, sweep.settings, sweep.now, sweep.full, key, flow) {
        sweep.removed += 1;
    } else {
        sweep.left += 1;
    }
    0
}

/// Looks at every flow. A packet at `to_uplink` brought it here if its token is still taken: it goes there again.
#[inline(always)]
pub fn run(skb: &Skb) -> i32 {
    let Some(settings) = Maps.settings() else { return NEXT };
    let again = Maps.give_token_back(skb.hash());
    let now = Maps.now();
    let mut sweep = Sweep { settings, now, full: again, removed: 0, left: 0 };
    // SAFETY: the callback has the signature of the helper's for this map, and its context outlives the call.
    unsafe {
        bpf_for_each_map_elem(
            (&raw const maps::FLOWS).cast_mut().cast(),
            look as *mut c_void,
            (&raw mut sweep).cast(),
            0,
        );
    }
    if let Some(swept) = maps::SWEPT.get_ptr_mut(0) {
        // SAFETY: two CPUs may write at once: either is right.
        unsafe { *swept = Swept { when: now, removed: sweep.removed, left: sweep.left, pad: 0 } };
    }
    if again {
        // SAFETY: plain integers.
        return unsafe { bpf_redirect(skb.ifindex(), 0) as i32 };
    }
    NEXT
}
