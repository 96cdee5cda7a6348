//! `datapath`'s door to state, opened by BPF maps.

use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_boot_ns, bpf_loop};
use core::ffi::c_void;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use datapath::addr::Ip;
use datapath::conntrack::{Ticks, ticks};
use datapath::keys::{
    Delivery, EgressId, EgressIp, Flow, FlowKey, FragmentHead, FragmentKey, IfIndex, Interface, Lease, Node,
    NodeId, Opener, Pod, PodId, Policy, PolicyId, Reply, ReplyKey, Settings, Token,
};
use datapath::limits::GRANULES as GRANULE_COUNT;
use datapath::tables::{InsertError, Tables};

use crate::maps;

/// `BPF_ANY`, `BPF_NOEXIST` (include/uapi/linux/bpf.h).
const ANY: u64 = 0;
const NOEXIST: u64 = 1;
/// `EEXIST`.
const EEXIST: i32 = 17;

/// The programs' maps.
pub struct Maps;

/// Copies an entry out at once: it may be reused for another key at any time.
macro_rules! copied {
    ($map:expr, $key:expr) => {
        // SAFETY: entries live until the end of the RCU section that the program runs in.
        unsafe { $map.get($key).copied() }
    };
}

const fn insert_error(errno: i32) -> InsertError {
    if errno == -EEXIST { InsertError::Exists } else { InsertError::Full }
}

/// The hash that says "seen, let pass".
#[inline(always)]
pub fn pass_token() -> u32 {
    Maps.settings().map_or(0, |s| s.pass_token)
}

/// Changes a pod's count of flows, which many CPUs do at once.
///
/// Rust's own atomic types offer no addition for this target, which has one, but no compare-and-swap in all its
/// versions.
#[inline(always)]
fn count_flow(pod: PodId, more: bool) {
    match maps::POD_FLOWS.get_ptr_mut(&pod) {
        // SAFETY: an aligned word, valid until the end of the RCU section.
        Some(count) if more => unsafe {
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(count, 1);
        },
        // SAFETY: as above.
        Some(count) if unsafe { *count } != 0 => unsafe {
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(count, u64::MAX);
        },
        None if more => {
            let _ = maps::POD_FLOWS.insert(&pod, &1, ANY); // an LRU map makes room
        }
        _ => {}
    }
}

impl Maps {
    /// Notes of a token that its packet comes past the host's stack.
    #[inline(always)]
    pub fn set_direct(&self, hash: u32) {
        if let Some(token) = maps::TOKENS.get_ptr_mut(&hash) {
            // SAFETY: valid until the end of the RCU section, and nobody else's: its number is not out yet.
            unsafe { (*token).direct = 1 };
        }
    }

    /// Puts the token back that this CPU has taken last, under its number.
    #[inline(always)]
    pub fn give_token_back(&self, hash: u32) {
        let Some(taken) = maps::TAKEN_TOKEN.get_ptr_mut(0) else { return };
        // SAFETY: this CPU's own entry; programs of one CPU do not interrupt each other at TC.
        let _ = self.insert_token(hash, unsafe { &*taken }); // without it the packet is dropped: `TokenLost`
    }
}

impl Tables for Maps {
    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        maps::SETTINGS.get(0).filter(|s| s.node != 0)
    }

    #[inline(always)]
    fn pod(&self, ip: &Ip) -> Option<Pod> {
        copied!(maps::PODS, ip)
    }

    #[inline(always)]
    fn delivery(&self, pod: PodId) -> Option<&Delivery> {
        // SAFETY: the memory stays the map's until the end of the RCU section; see the trait for reuse.
        unsafe { maps::DELIVERY.get(&pod) }
    }

    #[inline(always)]
    fn interface(&self, ifindex: IfIndex) -> Option<Interface> {
        copied!(maps::INTERFACES, &ifindex)
    }

    #[inline(always)]
    fn network(&self, ip: &Ip) -> u32 {
        maps::NETWORKS.get(&Key::new(128, *ip)).map_or(0, |n| n.kind)
    }

    #[inline(always)]
    fn policy(&self, id: PolicyId) -> Option<&Policy> {
        // SAFETY: the memory stays the map's until the end of the RCU section; see the trait for reuse.
        unsafe { maps::POLICIES.get(&id) }
    }

    #[inline(always)]
    fn egress_id(&self, ip: &Ip) -> Option<EgressId> {
        copied!(maps::EGRESS_ADDRS, ip)
    }

    #[inline(always)]
    fn egress_ip(&self, id: EgressId) -> Option<&EgressIp> {
        // SAFETY: as in `policy`.
        unsafe { maps::EGRESS_IPS.get(&id) }
    }

    #[inline(always)]
    fn granule(&self, egress: EgressId, granule: u16) -> NodeId {
        let index = granule as usize;
        // SAFETY: as in `policy`.
        match unsafe { maps::GRANULES.get(&egress) } {
            Some(table) if index < GRANULE_COUNT => table.node[index],
            _ => 0,
        }
    }

    #[inline(always)]
    fn lease(&self, egress: EgressId) -> Option<&Lease> {
        // SAFETY: as in `policy`.
        unsafe { maps::LEASES.get(&egress) }
    }

    #[inline(always)]
    fn node(&self, id: NodeId) -> Option<Node> {
        copied!(maps::NODES, &u32::from(id))
    }

    #[inline(always)]
    fn node_id(&self, tunnel_ip: &Ip) -> Option<NodeId> {
        copied!(maps::NODE_ADDRS, tunnel_ip).map(|id| id as NodeId)
    }

    #[inline(always)]
    fn flow<R>(&self, key: &FlowKey, look: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        let flow = maps::FLOWS.get_ptr_mut(key)?;
        // SAFETY: valid until the end of the RCU section; races are described at `FLOWS`.
        Some(look(unsafe { &mut *flow }))
    }

    #[inline(always)]
    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> Result<(), InsertError> {
        maps::FLOWS.insert(key, flow, NOEXIST).map_err(insert_error)?;
        count_flow(key.pod, true);
        Ok(())
    }

    #[inline(always)]
    fn remove_flow(&self, key: &FlowKey) {
        // Absent is as good as removed.
        if maps::FLOWS.remove(key).is_ok() {
            count_flow(key.pod, false);
        }
    }

    #[inline(always)]
    fn flows_of(&self, pod: PodId) -> u32 {
        copied!(maps::POD_FLOWS, &pod).map_or(0, |count: u64| count as u32)
    }

    #[inline(always)]
    fn reply(&self, key: &ReplyKey) -> Option<Reply> {
        copied!(maps::REPLIES, key)
    }

    #[inline(always)]
    fn insert_reply(&self, key: &ReplyKey, reply: &Reply) -> Result<(), InsertError> {
        maps::REPLIES.insert(key, reply, NOEXIST).map_err(insert_error)
    }

    #[inline(always)]
    fn remove_reply(&self, key: &ReplyKey) {
        let _ = maps::REPLIES.remove(key); // absent is as good as removed
    }

    #[inline(always)]
    fn full_until(&self, destination: &ReplyKey) -> Option<Ticks> {
        copied!(maps::FULL, destination)
    }

    #[inline(always)]
    fn put_full(&self, destination: &ReplyKey, until: Ticks) {
        let _ = maps::FULL.insert(destination, until, ANY); // an LRU map makes room
    }

    #[inline(always)]
    fn opener(&self, key: &FlowKey) -> Option<Opener> {
        copied!(maps::OPENERS, key)
    }

    #[inline(always)]
    fn put_opener(&self, key: &FlowKey, opener: &Opener) {
        let _ = maps::OPENERS.insert(key, opener, ANY); // an LRU map makes room
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<&FragmentHead> {
        // SAFETY: as in `policy`.
        unsafe { maps::FRAGMENTS.get(key) }
    }

    #[inline(always)]
    fn put_fragment(&self, key: &FragmentKey, head: &FragmentHead) {
        let _ = maps::FRAGMENTS.insert(key, head, ANY); // an LRU map makes room
    }

    #[inline(always)]
    fn insert_token(&self, hash: u32, token: &Token) -> Result<(), InsertError> {
        maps::TOKENS.insert(&hash, token, NOEXIST).map_err(insert_error)
    }

    #[inline(always)]
    fn take_token(&self, hash: u32) -> Option<&Token> {
        // SAFETY: the memory stays the map's until the end of the RCU section; copied out at once.
        let token = unsafe { maps::TOKENS.get(&hash) }?;
        let taken = maps::TAKEN_TOKEN.get_ptr_mut(0)?;
        // SAFETY: this CPU's own entry; programs of one CPU do not interrupt each other at TC.
        let taken = unsafe {
            *taken = *token;
            &*taken
        };
        let _ = maps::TOKENS.remove(&hash); // evicted meanwhile: as good
        Some(taken)
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now(&self) -> Ticks {
        // SAFETY: no arguments.
        ticks(unsafe { bpf_ktime_get_boot_ns() })
    }

    /// By `bpf_loop` (5.17): the body is verified once, whatever `times` is.
    #[inline(always)]
    fn repeat<F: FnMut(u32) -> bool>(&self, times: u32, mut step: F) {
        extern "C" fn call<F: FnMut(u32) -> bool>(index: u64, step: *mut c_void) -> i64 {
            // SAFETY: `bpf_loop` hands back the pointer it was given below, while it is borrowed.
            i64::from(unsafe { (*step.cast::<F>())(index as u32) })
        }
        // SAFETY: the callback has the signature of `bpf_loop`'s, and its context outlives the call.
        unsafe { bpf_loop(times, call::<F> as *mut c_void, (&raw mut step).cast(), 0) };
    }
}
