//! The sweep of the flow table, in the kernel: the agent starts it now and then, and a packet that finds the
//! table full does, so that no agent is needed for it.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{bpf_for_each_map_elem, bpf_redirect};
use datapath::conntrack::{Ticks, seconds};
use datapath::keys::{Flow, FlowKey, Settings, Swept};
use datapath::sweep::is_due;
use datapath::tables::Tables as _;

use crate::ctx::Skb;
use crate::maps;
use crate::tables::Maps;

/// Place of the program `make_room` in `PROGRAMS`.
const MAKE_ROOM: u32 = 0;

/// What a sweep is said to have taken while it runs: no other CPU starts one.
const RUNS: Ticks = seconds(60);

/// Sweeps a full table, and has the packet at `to_uplink` come again. Returns if that is of no use: it has been
/// swept just now, or the agent has not put the program in its place.
///
/// A tail call: a loop over the table needs stack that `to_uplink` does not have to spare.
#[inline(always)]
pub fn make_room(skb: &Skb) {
    if maps::SWEPT.get(0).is_none_or(|swept| is_due(swept, Maps.now())) {
        // SAFETY: the context is this program's own.
        unsafe { maps::PROGRAMS.tail_call(skb.context(), MAKE_ROOM) };
    }
}

struct Sweep<'a> {
    settings: &'a Settings,
    now: Ticks,
    full: bool,
    removed: u32,
    left: u32,
}

extern "C" fn look(_map: *mut c_void, key: *const FlowKey, flow: *mut Flow, sweep: *mut Sweep<'_>) -> i64 {
    // SAFETY: the helper gives an entry of FLOWS and what it was called with, all valid during the call.
    let (key, flow, sweep) = unsafe { (&*key, &mut *flow, &mut *sweep) };
    if datapath::sweep::sweep(&Maps, sweep.settings, sweep.now, sweep.full, key, flow) {
        sweep.removed += 1;
    } else {
        sweep.left += 1;
    }
    0
}

/// Looks at every flow. `full`: there is no room for a new one.
#[inline(always)]
pub fn run(full: bool) {
    let Some(settings) = Maps.settings() else { return };
    let Some(swept) = maps::SWEPT.get_ptr_mut(0) else { return };
    let now = Maps.now();
    if full {
        // SAFETY: aligned words; two CPUs may write at once: either is right.
        unsafe { ((*swept).when, (*swept).took) = (now, RUNS) };
    }
    let mut sweep = Sweep { settings, now, full, removed: 0, left: 0 };
    // SAFETY: the callback has the signature of the helper's for this map, and its context outlives the call.
    unsafe {
        bpf_for_each_map_elem(
            (&raw const maps::FLOWS).cast_mut().cast(),
            look as *mut c_void,
            (&raw mut sweep).cast(),
            0,
        );
    }
    let end = Maps.now();
    let took = if full { end.wrapping_sub(now) } else { 0 };
    // SAFETY: as above.
    unsafe { *swept = Swept { when: end, removed: sweep.removed, left: sweep.left, took } };
}

/// Sweeps for a packet at `to_uplink`, which then goes there again with the token that it brought.
#[inline(always)]
pub fn come_again(skb: &Skb) -> i32 {
    run(true);
    Maps.give_token_back(skb.hash());
    // SAFETY: plain integers.
    unsafe { bpf_redirect(skb.ifindex(), 0) as i32 }
}
