//! The guard on the pods' cgroup: pinned, so that a pod that starts while no agent runs is held all the same.
//!
//! It sees what processes in pods send by their own sockets, before the pod's interface does. It does not see what
//! they send by packet sockets, or forward.

use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::{SkBuffContext, TcContext};
use datapath::addr::Ip;

use crate::ctx::{Refused, Skb};
use crate::report;
use crate::tables::Maps;

/// What egress programs return (`__cgroup_bpf_run_filter_skb`, kernel/bpf/cgroup.c): keep.
const KEEP: i32 = 1;
/// Drop as a full queue does: senders see no error. A plain drop, 0, is `EPERM` to a UDP sender, and programs take
/// that for final.
const DROP_QUIETLY: i32 = 2;

/// Egress of the pods' cgroup.
#[cgroup_skb(egress)]
pub fn from_cgroup(ctx: SkBuffContext) -> i32 {
    let skb = Skb::new(TcContext::new(ctx.skb.skb));
    // What is no IP packet is none of ours.
    let Ok((source, destination)) = addresses(&skb) else { return KEEP };
    match datapath::guard::from_cgroup(&Maps, &source, &destination) {
        Ok(()) => KEEP,
        Err(reason) => {
            // A TC program of this CPU may come in between and its count be lost: the target has no atomic
            // addition in stable Rust, and a count is not worth more.
            report::drop(&skb, reason);
            DROP_QUIETLY
        }
    }
}

/// Source and destination. At this hook a packet begins with its IP header.
#[inline(always)]
fn addresses(skb: &Skb) -> Result<(Ip, Ip), Refused> {
    let [first] = skb.load::<[u8; 1]>(0)?;
    match first >> 4 {
        4 => Ok((Ip::v4(skb.load(12)?), Ip::v4(skb.load(16)?))),
        6 => Ok((Ip { octets: skb.load(8)? }, Ip { octets: skb.load(24)? })),
        _ => Err(Refused),
    }
}
