//! Tables in memory: what the decisions are tested with, and an oracle for the kernel's maps.

use core::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::vec::Vec;

use crate::addr::Ip;
use crate::conntrack::Ticks;
use crate::firewall::{self, ByAddress, Judgement};
use crate::from_pod::offloaded_flow;
use crate::keys::{
    Asked, AskedKey, Delivery, Denial, DenialKey, EgressId, EgressIp, FirewallId, Flow, FlowKey,
    FragmentHead, FragmentKey, GranuleTable, IfIndex, Interface, Learnt, LearntKey, Lease, Line, NameId,
    NameKey, NameRuleKey, NetworkKey, Node, NodeId, Opener, Pod, PodId, Policy, PolicyId, Reply, ReplyKey,
    RuleCount, RuleCountKey, Ruleset, RulesetId, Settings, Token, Tuple, Winner,
};
use crate::names::{Place, lives_longer, place_of, word};
use crate::packet::Packet;
use crate::rules::{BLOCK_LINES, ClassSays, ask_class, find_v4, find_v6};
use crate::rules_build::{Room, Roots, Span, build};
use crate::tables::{InsertError, Tables};
use crate::to_uplink::{Known, known_flow};

/// Every table as a `BTreeMap`. Policy tables are plain fields, flow tables change under `&self`.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// `SETTINGS`.
    pub settings: Settings,
    /// `PODS`.
    pub pods: BTreeMap<Ip, Pod>,
    /// `DELIVERY`.
    pub delivery: BTreeMap<PodId, Delivery>,
    /// `INTERFACES`.
    pub interfaces: BTreeMap<IfIndex, Interface>,
    /// `NETWORKS`; kinds only.
    pub networks: BTreeMap<NetworkKey, u32>,
    /// `POLICIES`.
    pub policies: BTreeMap<PolicyId, Policy>,
    /// `EGRESS_IPS`.
    pub egress_ips: BTreeMap<EgressId, EgressIp>,
    /// `EGRESS_ADDRS`.
    pub egress_addrs: BTreeMap<Ip, EgressId>,
    /// `GRANULES`.
    pub granules: BTreeMap<EgressId, GranuleTable>,
    /// `LEASES`.
    pub leases: BTreeMap<EgressId, Lease>,
    /// `NODES`.
    pub nodes: BTreeMap<NodeId, Node>,
    /// `FIREWALLS`.
    pub firewalls: BTreeMap<FirewallId, RulesetId>,
    /// `RULESETS`.
    pub rulesets: BTreeMap<RulesetId, Ruleset>,
    /// `RULES`, as far as it is used; see [`Memory::put_rules`].
    pub rules: Vec<Line>,
    /// `NAMES`.
    pub names: BTreeMap<NameKey, NameId>,
    /// `NAME_RULES`.
    pub name_rules: BTreeMap<NameRuleKey, Winner>,
    /// `RESOLVERS`.
    pub resolvers: BTreeMap<Ip, u32>,
    /// `LEARNT`. Entries that are looked at are leaked, as tokens are.
    pub learnt: RefCell<BTreeMap<LearntKey, Learnt>>,
    /// `ASKED`.
    pub asked: RefCell<BTreeMap<AskedKey, Asked>>,
    /// `RULE_COUNTS`.
    pub rule_counts: RefCell<BTreeMap<RuleCountKey, RuleCount>>,
    /// `DENIALS`.
    pub denials: RefCell<BTreeMap<DenialKey, Denial>>,
    /// `FLOWS`.
    pub flows: RefCell<BTreeMap<FlowKey, Flow>>,
    /// `REPLIES`.
    pub replies: RefCell<BTreeMap<ReplyKey, Reply>>,
    /// `FULL`.
    pub full: RefCell<BTreeMap<ReplyKey, Ticks>>,
    /// `OPENERS`.
    pub openers: RefCell<BTreeMap<FlowKey, Opener>>,
    /// `FRAGMENTS`. Heads that are looked at are leaked, as tokens are.
    pub fragments: RefCell<BTreeMap<FragmentKey, FragmentHead>>,
    /// `TOKENS`. Taken tokens are leaked: they are lent for as long as the tables live, and tests are short.
    pub tokens: RefCell<BTreeMap<u32, Token>>,
    /// Capacity of `FLOWS` and of `REPLIES`.
    pub flow_capacity: usize,
    /// The clock.
    pub now: Cell<Ticks>,
    /// The state of [`Tables::random`]; xorshift32, so never 0.
    pub seed: Cell<u32>,
}

impl Memory {
    /// Empty tables with room for `flow_capacity` flows.
    #[must_use]
    pub fn new(seed: u32, flow_capacity: usize) -> Self {
        Self { seed: Cell::new(seed.max(1)), flow_capacity, ..Self::default() }
    }

    /// Adds a version with these rules for addresses, as [`build`] takes them. What was there of a version with this number
    /// stays in [`Memory::rules`], but nothing leads there.
    #[expect(clippy::type_complexity, reason = "as the function that makes them has them")]
    pub fn put_rules(
        &mut self,
        id: RulesetId,
        ruleset: Ruleset,
        (v4, v6, ports): (&[Span<u32>], &[Span<u128>], &[Span<u32>]),
    ) {
        let Roots { roots, ports } = build(v4, v6, ports, &mut self.rules).unwrap_or_default();
        self.rulesets.insert(id, Ruleset { roots, ports, ..ruleset });
    }
}

/// Without end; block 0 is not given out, so that no root is 0.
impl Room for Vec<Line> {
    fn block(&mut self) -> Option<u32> {
        let number = (self.len() as u32 / BLOCK_LINES).max(1);
        self.resize(((number + 1) * BLOCK_LINES) as usize, Line { word: [0; 16] });
        Some(number)
    }

    fn put(&mut self, line: u32, content: &Line) {
        self[line as usize] = *content;
    }
}

fn insert<K: Ord, V>(
    map: &RefCell<BTreeMap<K, V>>,
    capacity: usize,
    key: K,
    value: V,
) -> Result<(), InsertError> {
    let mut map = map.borrow_mut();
    if map.contains_key(&key) {
        Err(InsertError::Exists)
    } else if map.len() >= capacity {
        Err(InsertError::Full)
    } else {
        map.insert(key, value);
        Ok(())
    }
}

impl Tables for Memory {
    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings).filter(|s| s.node != 0)
    }

    fn pod(&self, ip: &Ip) -> Option<Pod> {
        self.pods.get(ip).copied()
    }

    fn delivery(&self, pod: PodId) -> Option<&Delivery> {
        self.delivery.get(&pod)
    }

    fn interface(&self, ifindex: IfIndex) -> Option<Interface> {
        self.interfaces.get(&ifindex).copied()
    }

    fn network(&self, ip: &Ip) -> u32 {
        let contains = |key: &NetworkKey| {
            let shift = 128 - key.prefix_len;
            let bits = u128::from_be_bytes(key.ip.octets) ^ u128::from_be_bytes(ip.octets);
            shift == 128 || bits >> shift == 0
        };
        let longest =
            self.networks.iter().filter(|(key, _)| contains(key)).max_by_key(|(key, _)| key.prefix_len);
        longest.map_or(0, |(_, kind)| *kind)
    }

    fn policy(&self, id: PolicyId) -> Option<&Policy> {
        self.policies.get(&id)
    }

    fn egress_id(&self, ip: &Ip) -> Option<EgressId> {
        self.egress_addrs.get(ip).copied()
    }

    fn egress_ip(&self, id: EgressId) -> Option<&EgressIp> {
        self.egress_ips.get(&id)
    }

    fn granule(&self, egress: EgressId, granule: u16) -> NodeId {
        self.granules.get(&egress).and_then(|t| t.node.get(usize::from(granule))).copied().unwrap_or(0)
    }

    fn lease(&self, egress: EgressId) -> Option<&Lease> {
        self.leases.get(&egress)
    }

    fn node(&self, id: NodeId) -> Option<Node> {
        self.nodes.get(&id).copied()
    }

    fn node_id(&self, tunnel_ip: &Ip) -> Option<NodeId> {
        self.nodes.iter().find(|(_, node)| node.tunnel_ip == *tunnel_ip).map(|(id, _)| *id)
    }

    fn ruleset_of(&self, firewall: FirewallId) -> RulesetId {
        self.firewalls.get(&firewall).copied().unwrap_or(0)
    }

    fn ruleset(&self, id: RulesetId) -> Option<Ruleset> {
        self.rulesets.get(&id).copied()
    }

    fn rule_line(&self, line: u32) -> Option<&Line> {
        self.rules.get(line as usize)
    }

    fn ask_class(&self, place: u32, address: &Ip) -> ClassSays {
        let says = ask_class(place, address.is_v4(), address.halves().1 as u32, |line| self.rule_line(line));
        ClassSays::from_word(says.to_word())
    }

    fn rule_v4(&self, root: u32, address: u32) -> u32 {
        find_v4(root, address, |line| self.rule_line(line))
    }

    fn rule_v6(&self, root: u32, high: u64, low: u64) -> u32 {
        find_v6(root, high, low, |root, word| self.rule_v4(root, word), |line| self.rule_line(line))
    }

    fn name_rule(&self, key: &NameRuleKey) -> u32 {
        self.name_rules.get(key).map_or(Winner::NONE, |winner| winner.order)
    }

    fn judge(&self, id: RulesetId, tuple: &Tuple) -> Judgement {
        firewall::judge(self, id, tuple)
    }

    fn judge_address(&self, id: RulesetId, tuple: &Tuple) -> ByAddress {
        firewall::judge_address(self, id, tuple)
    }

    fn judge_names(&self, id: RulesetId, tuple: &Tuple, by_address: ByAddress) -> Judgement {
        firewall::judge_names(self, id, tuple, by_address)
    }

    fn note(&self, id: RulesetId, pod: PodId, packet: &Packet, kept: bool, rule: u32) {
        firewall::note(self, id, pod, packet, kept, rule);
    }

    fn settle(&self, id: RulesetId, key: &FlowKey, judgement: Judgement) {
        firewall::settle(self, id, key, judgement);
    }

    fn offloaded_flow(&self, pod: &Pod, ruleset: RulesetId, key: &FlowKey, packet: &Packet) -> Known {
        offloaded_flow(self, pod, ruleset, key, packet)
    }

    fn known_flow(&self, token: &Token, key: &FlowKey, packet: &Packet, translates: bool) -> Known {
        known_flow(self, token, key, packet, translates)
    }

    fn let_go(&self, id: RulesetId, key: &FlowKey, policy: PolicyId, len: u32, judgement: Judgement) {
        firewall::let_go(self, id, key, policy, len, judgement);
    }

    fn count_rule(&self, id: RulesetId, rule: u32, hits: u64, bytes: u64) {
        let mut counts = self.rule_counts.borrow_mut();
        let count = counts.entry(RuleCountKey { ruleset: id, rule }).or_default();
        count.hits += hits;
        count.bytes += bytes;
    }

    fn put_denial(&self, key: &DenialKey, id: RulesetId, rule: u32) {
        let now = self.now.get();
        let mut denials = self.denials.borrow_mut();
        let denial = denials.entry(*key).or_insert(Denial { first: now, ..Denial::default() });
        *denial = Denial { last: now, packets: denial.packets + 1, ruleset: id, rule, ..*denial };
    }

    fn resolver(&self, ip: &Ip) -> u32 {
        self.resolvers.get(ip).copied().unwrap_or(0)
    }

    fn name(&self, key: &NameKey) -> Option<NameId> {
        self.names.get(key).copied()
    }

    fn learnt(&self, key: &LearntKey) -> Option<&Learnt> {
        let learnt = *self.learnt.borrow().get(key)?;
        Some(std::boxed::Box::leak(std::boxed::Box::new(learnt)))
    }

    fn credit(&self, key: &LearntKey, name: NameId, until: Ticks) {
        let mut learnt = self.learnt.borrow_mut();
        let learnt = learnt.entry(*key).or_default();
        match place_of(self, learnt, name, self.now.get()) {
            Place::There(i) if !lives_longer(learnt.names[i], until) => {}
            Place::There(i) | Place::Free(i) | Place::Others(i) => learnt.names[i] = word(name, until),
        }
    }

    fn asked(&self, key: &AskedKey) -> Option<Asked> {
        self.asked.borrow().get(key).copied()
    }

    fn put_asked(&self, key: &AskedKey, asked: &Asked) {
        self.asked.borrow_mut().insert(*key, *asked);
    }

    fn flow<R>(&self, key: &FlowKey, look: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        self.flows.borrow_mut().get_mut(key).map(look)
    }

    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> Result<(), InsertError> {
        insert(&self.flows, self.flow_capacity, *key, *flow)
    }

    fn remove_flow(&self, key: &FlowKey) {
        let removed = self.flows.borrow_mut().remove(key);
        if let Some(flow) = removed
            && (Judgement { rule: flow.rule, name: flow.name }).by_rule()
        {
            self.count_rule(flow.ruleset, flow.rule, 1, flow.bytes);
        }
    }

    fn flows_of(&self, pod: PodId) -> u32 {
        self.flows.borrow().keys().filter(|key| key.pod == pod).count() as u32
    }

    fn reply(&self, key: &ReplyKey) -> Option<Reply> {
        self.replies.borrow().get(key).copied()
    }

    fn insert_reply(&self, key: &ReplyKey, reply: &Reply) -> Result<(), InsertError> {
        insert(&self.replies, self.flow_capacity, *key, *reply)
    }

    fn remove_reply(&self, key: &ReplyKey) {
        self.replies.borrow_mut().remove(key);
    }

    fn full_until(&self, destination: &ReplyKey) -> Option<Ticks> {
        self.full.borrow().get(destination).copied()
    }

    fn put_full(&self, destination: &ReplyKey, until: Ticks) {
        self.full.borrow_mut().insert(*destination, until);
    }

    fn opener(&self, key: &FlowKey) -> Option<Opener> {
        self.openers.borrow().get(key).copied()
    }

    fn put_opener(&self, key: &FlowKey, opener: &Opener) {
        self.openers.borrow_mut().insert(*key, *opener);
    }

    fn fragment(&self, key: &FragmentKey) -> Option<&FragmentHead> {
        let head = *self.fragments.borrow().get(key)?;
        Some(std::boxed::Box::leak(std::boxed::Box::new(head)))
    }

    fn put_fragment(&self, key: &FragmentKey, head: &FragmentHead) {
        self.fragments.borrow_mut().insert(*key, *head);
    }

    fn insert_token(&self, hash: u32, token: &Token) -> Result<(), InsertError> {
        insert(&self.tokens, usize::MAX, hash, *token)
    }

    fn take_token(&self, hash: u32) -> Option<&Token> {
        let token = self.tokens.borrow_mut().remove(&hash)?;
        Some(std::boxed::Box::leak(std::boxed::Box::new(token)))
    }

    fn random(&self) -> u32 {
        let mut x = self.seed.get();
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.seed.set(x);
        x
    }

    fn now(&self) -> Ticks {
        self.now.get()
    }

    fn repeat<F: FnMut(u32) -> bool>(&self, times: u32, mut step: F) {
        for i in 0..times {
            if step(i) {
                return;
            }
        }
    }
}
