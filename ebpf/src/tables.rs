//! `datapath`'s door to state, opened by BPF maps.

use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_boot_ns, bpf_loop};
use core::ffi::c_void;
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};
use datapath::addr::Ip;
use datapath::conntrack::{Ticks, ticks};
use datapath::firewall::{ByAddress, Judgement};
use datapath::keys::{
    Asked, AskedKey, Delivery, Denial, DenialKey, EgressId, EgressIp, FirewallId, Flow, FlowKey,
    FragmentHead, FragmentKey, IfIndex, Interface, Learnt, LearntKey, Lease, Line, NameEvent, NameId,
    NameKey, NameRuleKey, Node, NodeId, Opener, Pod, PodId, Policy, PolicyId, Reply, ReplyKey, RuleCount,
    RuleCountKey, Ruleset, RulesetId, Settings, Token, Tuple, Winner,
};
use datapath::limits::{GRANULES as GRANULE_COUNT, NAMES_PER_ADDRESS};
use datapath::names::{Place, lives_longer, place_of, word};
use datapath::packet::Packet;
use datapath::rules::ClassSays;
use datapath::tables::{InsertError, Tables};
use datapath::to_uplink::Known;

use crate::maps;

/// `BPF_ANY`, `BPF_NOEXIST` (include/uapi/linux/bpf.h).
const ANY: u64 = 0;
const NOEXIST: u64 = 1;
/// `EEXIST`.
const EEXIST: i32 = 17;

/// How often a name's place is tried for, should other CPUs change the same address' names.
const CREDIT_TRIES: u32 = 4;

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

/// What a CPU puts together: the stack's 512 bytes are needed elsewhere.
#[repr(C)]
pub struct Keys {
    /// A new entry of `LEARNT`.
    learnt: Learnt,
}

/// This CPU's own [`Keys`], as they were left.
#[inline(always)]
fn keys() -> Option<&'static mut Keys> {
    let keys = maps::KEYS.get_ptr_mut(0)?;
    // SAFETY: programs of one CPU do not interrupt each other at TC, and a program uses one part at a time.
    Some(unsafe { &mut *keys })
}

/// Counts what happens to names.
#[inline(always)]
pub fn count_name(event: NameEvent) {
    if let Some(count) = maps::NAME_EVENTS.get_ptr_mut(event as u32) {
        // SAFETY: the entry is this CPU's own, and programs of one CPU do not interrupt each other at TC.
        unsafe { *count = (*count).wrapping_add(1) };
    }
}

/// [`datapath::firewall::judge_address`] as a function of its own: it stands in several places, which have no stack to
/// spare. Exported, so that the verifier looks at it once (`btf_prepare_func_args`, kernel/bpf/btf.c): then it takes
/// pointers that may be null, and returns a number.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_address(id: RulesetId, tuple: *const Tuple) -> u64 {
    // SAFETY: the verifier checks that it is null or points to a tuple.
    let Some(tuple) = (unsafe { tuple.as_ref() }) else { return Judgement::NOT_READY.to_word() };
    datapath::firewall::judge_address(&Maps, id, tuple).to_word()
}

/// [`datapath::rules::ask_class`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ask_class(place: u32, v4: u32, address: u32) -> u64 {
    datapath::rules::ask_class(place, v4 != 0, address, |line| Maps.rule_line(line)).to_word()
}

/// [`datapath::rules::find_v4`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rule_v4(root: u32, address: u32) -> u32 {
    datapath::rules::find_v4(root, address, |line| Maps.rule_line(line))
}

/// [`datapath::rules::find_v6`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rule_v6(root: u32, high: u64, low: u64) -> u32 {
    datapath::rules::find_v6(root, high, low, |root, word| rule_v4(root, word), |line| Maps.rule_line(line))
}

/// [`datapath::firewall::judge_names`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_names(id: RulesetId, tuple: *const Tuple, by_address: u64) -> u64 {
    // SAFETY: as above.
    let Some(tuple) = (unsafe { tuple.as_ref() }) else { return Judgement::NOT_READY.to_word() };
    datapath::firewall::judge_names(&Maps, id, tuple, ByAddress::from_word(by_address)).to_word()
}

/// [`datapath::firewall::note`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note(id: RulesetId, pod: PodId, packet: *const Packet, kept: u32, rule: u32) -> u32 {
    // SAFETY: as above.
    let Some(packet) = (unsafe { packet.as_ref() }) else { return 0 };
    datapath::firewall::note(&Maps, id, pod, packet, kept != 0, rule);
    0
}

/// [`datapath::firewall::settle`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn settle(id: RulesetId, key: *const FlowKey, judgement: u64) -> u32 {
    // SAFETY: as above.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    datapath::firewall::settle(&Maps, id, key, Judgement::from_word(judgement));
    0
}

/// [`datapath::firewall::let_go`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn let_go(id: RulesetId, key: *const FlowKey, policy: PolicyId, len: u32, judgement: u64) -> u32 {
    // SAFETY: as above.
    let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
    datapath::firewall::let_go(&Maps, id, key, policy, len, Judgement::from_word(judgement));
    0
}

/// [`datapath::from_pod::offloaded_flow`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn offloaded_flow(
    pod: *const Pod,
    id: RulesetId,
    key: *const FlowKey,
    packet: *const Packet,
) -> u64 {
    // SAFETY: the verifier checks that each is null or points to what it says.
    let (Some(pod), Some(key), Some(packet)) = (unsafe { (pod.as_ref(), key.as_ref(), packet.as_ref()) })
    else {
        return Known::NONE.0;
    };
    datapath::from_pod::offloaded_flow(&Maps, pod, id, key, packet).0
}

/// [`datapath::to_uplink::known_flow`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn known_flow(
    token: *const Token,
    key: *const FlowKey,
    packet: *const Packet,
    translates: u32,
) -> u64 {
    // SAFETY: the verifier checks that each is null or points to what it says.
    let (Some(token), Some(key), Some(packet)) = (unsafe { (token.as_ref(), key.as_ref(), packet.as_ref()) })
    else {
        return Known::NONE.0;
    };
    datapath::to_uplink::known_flow(&Maps, token, key, packet, translates != 0).0
}

/// [`Tables::count_rule`], likewise.
#[inline(never)]
fn count_rule(id: RulesetId, rule: u32, hits: u64, bytes: u64) {
    let key = RuleCountKey { ruleset: id, rule };
    let Some(count) = maps::RULE_COUNTS.get_ptr_mut(&key) else {
        // Another CPU may have made it meanwhile: one count is lost. So it is where the map is full.
        let _ = maps::RULE_COUNTS.insert(&key, &RuleCount { hits, bytes }, NOEXIST);
        return;
    };
    // SAFETY: aligned words, valid until the end of the RCU section.
    unsafe {
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*count).hits, hits);
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*count).bytes, bytes);
    }
}

/// [`Tables::remove_flow`], likewise.
#[inline(never)]
fn remove_flow(key: &FlowKey) {
    let Some(flow) = maps::FLOWS.get_ptr_mut(key) else { return };
    // SAFETY: valid until the end of the RCU section. Read before the entry may be another's.
    let (pod, id, rule, bytes) = unsafe { (key.pod, (*flow).ruleset, (*flow).rule, (*flow).bytes) };
    // Of two CPUs one removes it.
    if maps::FLOWS.remove(key).is_err() {
        return;
    }
    count_flow(pod, false);
    if (Judgement { rule, name: 0 }).by_rule() {
        count_rule(id, rule, 1, bytes);
    }
}

/// Enters an address for a name; exported as the functions above.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn enter_address(key: *const LearntKey, name: NameId, until: Ticks) -> u32 {
    // SAFETY: the verifier checks that it is null or points to a key.
    if let Some(key) = unsafe { key.as_ref() } {
        enter(key, name, until);
    }
    0
}

#[inline(always)]
fn enter(key: &LearntKey, name: NameId, until: Ticks) {
    let now = Maps.now();
    let entry = match maps::LEARNT.get_ptr_mut(key) {
        Some(entry) => entry,
        None => {
            let Some(keys) = keys() else { return };
            keys.learnt = Learnt { names: [0; NAMES_PER_ADDRESS] };
            let _ = maps::LEARNT.insert(key, &keys.learnt, NOEXIST); // another CPU may be quicker
            let Some(entry) = maps::LEARNT.get_ptr_mut(key) else { return };
            entry
        }
    };
    // Other CPUs may change it: the word is exchanged only if it is still what was decided on.
    for _ in 0..CREDIT_TRIES {
        // SAFETY: valid until the end of the RCU section; words are read one by one.
        let (i, event) = match place_of(&Maps, unsafe { &*entry }, name, now) {
            Place::There(i) => (i, NameEvent::Renewed),
            Place::Free(i) => (i, NameEvent::Learnt),
            Place::Others(i) => (i, NameEvent::Displaced),
        };
        // SAFETY: as above, and within the array, which the mask tells the verifier.
        let slot = unsafe { (&raw mut (*entry).names).cast::<u64>().add(i & (NAMES_PER_ADDRESS - 1)) };
        // SAFETY: as above.
        let old = unsafe { slot.read_volatile() };
        if event as u32 == NameEvent::Renewed as u32 && !lives_longer(old, until) {
            return;
        }
        // SAFETY: as above.
        let done = unsafe { exchange(slot, old, word(name, until)) };
        if done {
            count_name(event);
            return;
        }
    }
}

/// Stores a word where still the old one is; says whether it was.
///
/// # Safety
/// `slot` is an aligned word, and may be written.
#[inline(always)]
unsafe fn exchange(slot: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the caller says so.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(slot, old, new) }.1
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

    /// Takes a name away from an address.
    #[inline(always)]
    pub fn forget(&self, key: &LearntKey, name: NameId) {
        let Some(entry) = maps::LEARNT.get_ptr_mut(key) else { return };
        // SAFETY: valid until the end of the RCU section.
        let slots = unsafe { (&raw mut (*entry).names).cast::<u64>() };
        self.repeat(NAMES_PER_ADDRESS as u32, |i| {
            if i as usize >= NAMES_PER_ADDRESS {
                return true;
            }
            // SAFETY: as above, and within the array.
            unsafe {
                let slot = slots.add(i as usize);
                let old = slot.read_volatile();
                if (old >> 32) as NameId == name {
                    // Another CPU that learns it anew meanwhile is right.
                    exchange(slot, old, 0);
                }
            }
            false
        });
    }

    /// Whether the packet whose token this CPU has taken last came past the host's stack.
    #[inline(always)]
    pub fn took_direct(&self) -> bool {
        // SAFETY: this CPU's own entry; programs of one CPU do not interrupt each other at TC.
        maps::TAKEN_TOKEN.get(0).is_some_and(|token| token.direct != 0)
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
    fn ruleset_of(&self, firewall: FirewallId) -> RulesetId {
        match maps::FIREWALLS.get_ptr(firewall) {
            // SAFETY: a word of an array; volatile, for the agent writes it.
            Some(ruleset) => unsafe { ruleset.read_volatile() },
            None => 0,
        }
    }

    #[inline(always)]
    fn ruleset(&self, id: RulesetId) -> Option<Ruleset> {
        copied!(maps::RULESETS, &id)
    }

    #[inline(always)]
    fn rule_line(&self, line: u32) -> Option<&Line> {
        maps::RULES.get(line)
    }

    #[inline(always)]
    fn ask_class(&self, place: u32, address: &Ip) -> ClassSays {
        let low = address.halves().1 as u32;
        ClassSays::from_word(ask_class(place, u32::from(address.is_v4()), low))
    }

    #[inline(always)]
    fn rule_v4(&self, root: u32, address: u32) -> u32 {
        rule_v4(root, address)
    }

    #[inline(always)]
    fn rule_v6(&self, root: u32, high: u64, low: u64) -> u32 {
        rule_v6(root, high, low)
    }

    #[inline(always)]
    fn name_rule(&self, key: &NameRuleKey) -> u32 {
        copied!(maps::NAME_RULES, key).map_or(Winner::NONE, |winner| winner.order)
    }

    #[inline(always)]
    fn judge(&self, id: RulesetId, tuple: &Tuple) -> Judgement {
        datapath::firewall::judge(self, id, tuple)
    }

    #[inline(always)]
    fn judge_address(&self, id: RulesetId, tuple: &Tuple) -> ByAddress {
        ByAddress::from_word(judge_address(id, &raw const *tuple))
    }

    #[inline(always)]
    fn judge_names(&self, id: RulesetId, tuple: &Tuple, by_address: ByAddress) -> Judgement {
        Judgement::from_word(judge_names(id, &raw const *tuple, by_address.to_word()))
    }

    #[inline(always)]
    fn note(&self, id: RulesetId, pod: PodId, packet: &Packet, kept: bool, rule: u32) {
        note(id, pod, &raw const *packet, u32::from(kept), rule);
    }

    #[inline(always)]
    fn settle(&self, id: RulesetId, key: &FlowKey, judgement: Judgement) {
        settle(id, &raw const *key, judgement.to_word());
    }

    #[inline(always)]
    fn offloaded_flow(&self, pod: &Pod, ruleset: RulesetId, key: &FlowKey, packet: &Packet) -> Known {
        Known(offloaded_flow(pod, ruleset, key, packet))
    }

    #[inline(always)]
    fn known_flow(&self, token: &Token, key: &FlowKey, packet: &Packet, translates: bool) -> Known {
        Known(known_flow(token, key, packet, u32::from(translates)))
    }

    #[inline(always)]
    fn let_go(&self, id: RulesetId, key: &FlowKey, policy: PolicyId, len: u32, judgement: Judgement) {
        let_go(id, &raw const *key, policy, len, judgement.to_word());
    }

    #[inline(always)]
    fn count_rule(&self, id: RulesetId, rule: u32, hits: u64, bytes: u64) {
        count_rule(id, rule, hits, bytes);
    }

    #[inline(always)]
    fn put_denial(&self, key: &DenialKey, id: RulesetId, rule: u32) {
        let now = self.now();
        let Some(denial) = maps::DENIALS.get_ptr_mut(key) else {
            let denial = Denial { first: now, last: now, packets: 1, ruleset: id, rule };
            let _ = maps::DENIALS.insert(key, &denial, ANY); // an LRU map makes room
            return;
        };
        // SAFETY: valid until the end of the RCU section; a lost increment of two CPUs is accepted.
        unsafe {
            (*denial).last = now;
            (*denial).packets = (*denial).packets.wrapping_add(1);
            (*denial).ruleset = id;
            (*denial).rule = rule;
        }
    }

    #[inline(always)]
    fn resolver(&self, ip: &Ip) -> u32 {
        copied!(maps::RESOLVERS, ip).unwrap_or(0)
    }

    #[inline(always)]
    fn name(&self, key: &NameKey) -> Option<NameId> {
        copied!(maps::NAMES, key)
    }

    #[inline(always)]
    fn learnt(&self, key: &LearntKey) -> Option<&Learnt> {
        // SAFETY: as in `policy`; each name in it is checked by itself.
        unsafe { maps::LEARNT.get(key) }
    }

    #[inline(always)]
    fn credit(&self, key: &LearntKey, name: NameId, until: Ticks) {
        enter_address(key, name, until);
    }

    #[inline(always)]
    fn asked(&self, key: &AskedKey) -> Option<Asked> {
        copied!(maps::ASKED, key)
    }

    #[inline(always)]
    fn put_asked(&self, key: &AskedKey, asked: &Asked) {
        let _ = maps::ASKED.insert(key, asked, ANY); // an LRU map makes room
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
        remove_flow(key);
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
