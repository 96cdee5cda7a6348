//! Tables in memory: what the decisions are tested with, and an oracle for the kernel's maps.

use core::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use crate::addr::Ip;
use crate::conntrack::Ticks;
use crate::firewall::{self, ByAddress, Judgement};
use crate::keys::{
    Asked, AskedKey, Delivery, Denial, DenialKey, EgressId, EgressIp, FirewallId, Flow, FlowKey,
    FragmentHead, FragmentKey, GranuleTable, IfIndex, Interface, Learnt, LearntKey, Lease, NameId, NameKey,
    NameRuleKey, NetworkKey, Node, NodeId, Opener, Pod, PodId, Policy, PolicyId, PortPage, PortPageKey,
    PortTable, PortsKey, Reply, ReplyKey, RuleCount, RuleCountKey, RuleKey, RulePlace, Ruleset, RulesetId,
    Settings, Token, Tuple, Winner,
};
use crate::names::{Place, lives_longer, place_of, word};
use crate::packet::Packet;
use crate::tables::{InsertError, Tables};

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
    /// `RULES`.
    pub rules: BTreeMap<RuleKey, Winner>,
    /// `PORTS`.
    pub ports: BTreeMap<PortsKey, PortTable>,
    /// `PORT_PAGES`.
    pub port_pages: BTreeMap<PortPageKey, PortPage>,
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
}

/// The key of a prefix of `len` bits of an address, an IPv4 one's counted from 96 on.
#[must_use]
pub fn rule_key(ruleset: RulesetId, class: u16, ip: &Ip, len: u32) -> RuleKey {
    let bits = u128::from_be_bytes(ip.octets) & u128::MAX.checked_shl(128 - len).unwrap_or(0);
    let family = if ip.is_v4() { 4 } else { 6 };
    let place = RulePlace { ruleset, class, family, ip: Ip { octets: bits.to_be_bytes() } };
    RuleKey { prefix_len: RuleKey::FIXED_BITS + len, place }
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

    fn rule(&self, id: RulesetId, class: u16, ip: &Ip) -> u32 {
        // The longest prefix first: what the kernel's trie finds in one walk. IPv4's begin at 96.
        let shortest = if ip.is_v4() { 96 } else { 0 };
        (shortest..=128u32)
            .rev()
            .find_map(|len| self.rules.get(&rule_key(id, class, ip, len)))
            .map_or(Winner::NONE, |winner| winner.order)
    }

    fn ports(&self, key: &PortsKey) -> Option<&PortTable> {
        self.ports.get(key)
    }

    fn port_page(&self, key: &PortPageKey) -> Option<&PortPage> {
        self.port_pages.get(key)
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
        match place_of(learnt, name, self.now.get()) {
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
            self.count_rule(flow.ruleset, flow.rule, 0, flow.bytes);
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
