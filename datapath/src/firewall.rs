//! What a namespace's egress firewall says of a packet: the first of its rules that matches.
//!
//! The agent compiles the rules so that the number of look-ups does not follow theirs: the protocol and port give a
//! class, the destination is looked up among the rules without ports and among those of the class, and what is found
//! there is the one winner of all rules that are for it. Of what was found the lowest index wins.

use crate::addr::Ip;
use crate::conntrack::{FlowState, older_than};
use crate::keys::{
    DenialKey, Flow, FlowKey, LearntKey, NameId, NameRuleKey, NetworkKind, PodId, PolicyId, RESOLVER_ON_NODE,
    Ruleset, RulesetId, Tuple, Winner,
};
use crate::limits::{NAMES_PER_ADDRESS, POD_FLOWS};
use crate::packet::{Packet, SCTP, TCP, UDP};
use crate::rules::class_place;
use crate::tables::{InsertError, Tables};
use crate::to_uplink::reply_key;

/// What the rules say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Judgement {
    /// The rule that decides, as [`Winner::order`]; or [`Winner::NONE`] or [`Winner::NOT_READY`].
    pub rule: u32,
    /// The name by which it does; 0: by address.
    pub name: NameId,
}

impl Judgement {
    /// No rule speaks of it.
    pub const NONE: Self = Self { rule: Winner::NONE, name: 0 };
    /// There are no rules that could be asked.
    pub const NOT_READY: Self = Self { rule: Winner::NOT_READY, name: 0 };

    /// Whether the packet may go.
    #[inline(always)]
    #[must_use]
    pub const fn allows(self) -> bool {
        self.rule & 1 == 1
    }

    /// Whether there are no rules that could be asked.
    #[inline(always)]
    #[must_use]
    pub const fn not_ready(self) -> bool {
        self.rule == Winner::NOT_READY
    }

    /// Whether a rule has decided, so that it is counted.
    #[inline(always)]
    #[must_use]
    pub const fn by_rule(self) -> bool {
        self.rule < Winner::NOT_READY
    }

    /// As one word: a function of the kernel programs returns nothing larger.
    #[inline(always)]
    #[must_use]
    pub const fn to_word(self) -> u64 {
        (self.name as u64) << 32 | self.rule as u64
    }

    /// From [`Judgement::to_word`].
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self { rule: word as u32, name: (word >> 32) as u32 }
    }
}

/// Whether rules are for a destination, of this [`Tables::network`], that the host's DNAT has decided: outside the
/// cluster or a node; link-local addresses too (metadata services), but no group's.
#[inline(always)]
#[must_use]
pub fn is_for(network: u32, tuple: &Tuple) -> bool {
    (network == 0 || NetworkKind::is_node(network)) && tuple.destination.can_be_ruled()
}

/// Ports that resolvers answer at: DNS' own, and the one that the resolver pods of `OpenShift` have behind it.
#[inline(always)]
#[must_use]
pub const fn is_dns_port(port: u16) -> bool {
    matches!(port, 53 | 5353)
}

/// Whether rules with ports are for a protocol.
#[inline(always)]
#[must_use]
pub const fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP)
}

/// Judges a pod's packet, counts what decides, and notes a denial. `kept`: a flow is going to stand for the packet,
/// and is counted when it is over, so that a new connection does not pay for a place among the counts of thousands of
/// rules; else the packet's own bytes are counted, and a hit if it opens something.
#[inline(always)]
pub fn ask<T: Tables>(t: &T, id: RulesetId, pod: PodId, packet: &Packet, kept: bool) -> Judgement {
    let judgement = t.judge(id, &packet.tuple);
    if judgement != Judgement::NONE {
        t.note(id, pod, packet, kept, judgement.rule);
    }
    judgement
}

/// Notes what was decided about a pod's packet; see [`ask`].
#[inline(always)]
pub fn note<T: Tables>(t: &T, id: RulesetId, pod: PodId, packet: &Packet, kept: bool, rule: u32) {
    let tuple = &packet.tuple;
    let judgement = Judgement { rule, name: 0 };
    let denied = !judgement.allows();
    if judgement.by_rule() && (denied || !kept) {
        t.count_rule(id, rule, u64::from(denied || packet.opens()), u64::from(packet.len));
    }
    if denied {
        let remote_port = if has_ports(tuple.protocol) { tuple.destination_port } else { 0 };
        let key = DenialKey { pod, remote: tuple.destination, remote_port, protocol: tuple.protocol, pad: 0 };
        t.put_denial(&key, id, rule);
    }
}

/// Judges a flow by another version than the one that has let it go, with a packet of it at hand: the flow goes on
/// under the new version, or is removed.
#[inline(always)]
pub fn ask_again<T: Tables>(t: &T, id: RulesetId, key: &FlowKey, packet: &Packet) -> Judgement {
    let judgement = ask(t, id, key.pod, packet, true);
    t.settle(id, key, judgement);
    judgement
}

/// Enters a judgement into its flow, or removes that.
#[inline(always)]
pub fn settle<T: Tables>(t: &T, id: RulesetId, key: &FlowKey, judgement: Judgement) {
    let denied = t.flow(key, |flow| {
        if judgement.allows() {
            (flow.ruleset, flow.rule, flow.name) = (id, judgement.rule, judgement.name);
            return None;
        }
        Some((flow.egress, flow.egress_port))
    });
    if let Some(Some((egress, egress_port))) = denied {
        // Forward entry first: while it is there, its reply entry counts as alive.
        t.remove_flow(key);
        if egress != 0 {
            t.remove_reply(&reply_key(egress, egress_port, key));
        }
    }
}

/// Keeps that a packet of a pod may go untranslated, if there is room: else the next is judged as this one was.
#[inline(always)]
pub fn let_go<T: Tables>(t: &T, id: RulesetId, key: &FlowKey, policy: PolicyId, len: u32, judged: Judgement) {
    // What no flow stands for is counted at once.
    let uncounted = || {
        if judged.by_rule() {
            t.count_rule(id, judged.rule, 1, u64::from(len));
        }
    };
    if t.flows_of(key.pod) >= POD_FLOWS {
        return uncounted();
    }
    let now = t.now();
    let flow = Flow {
        policy,
        state: FlowState::Opening as u8,
        seen: now,
        walked: now,
        ruleset: id,
        packets: 1,
        bytes: u64::from(len),
        rule: judged.rule,
        name: judged.name,
        ..Flow::default()
    };
    if t.insert_flow(key, &flow) == Err(InsertError::Full) {
        uncounted();
    }
}

/// Judges a packet of a pod by a version of its firewall's rules, on its destination after the host's DNAT.
///
/// In two steps, which are functions of their own in the kernel: neither has room for the other's stack.
#[inline(always)]
pub fn judge<T: Tables>(t: &T, id: RulesetId, tuple: &Tuple) -> Judgement {
    let by_address = t.judge_address(id, tuple);
    if by_address.names == 0 {
        return Judgement { rule: by_address.rule, name: 0 };
    }
    t.judge_names(id, tuple, by_address)
}

/// What the rules for addresses say, and what those for names have to be asked with.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ByAddress {
    /// As [`Judgement::rule`].
    pub rule: u32,
    /// The port's class.
    pub class: u16,
    /// 1: there are rules for names.
    pub names: u16,
}

impl ByAddress {
    const fn only(rule: u32) -> Self {
        Self { rule, class: 0, names: 0 }
    }

    /// As one word: a function of the kernel programs returns nothing larger.
    #[inline(always)]
    #[must_use]
    pub const fn to_word(self) -> u64 {
        (self.names as u64) << 48 | (self.class as u64) << 32 | self.rule as u64
    }

    /// From [`ByAddress::to_word`].
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self { rule: word as u32, class: (word >> 32) as u16, names: (word >> 48) as u16 }
    }
}

/// The first step of [`judge`].
#[inline(always)]
pub fn judge_address<T: Tables>(t: &T, id: RulesetId, tuple: &Tuple) -> ByAddress {
    if id == 0 {
        return ByAddress::only(Winner::NONE);
    }
    if has_ports(tuple.protocol)
        && is_dns_port(tuple.destination_port)
        && t.resolver(&tuple.destination) & RESOLVER_ON_NODE != 0
    {
        return ByAddress::only(Winner::NONE);
    }
    let Some(ruleset) = t.ruleset(id) else { return ByAddress::only(Winner::NOT_READY) };
    if ruleset.parts & Ruleset::REFUSED != 0 {
        return ByAddress::only(Winner::NOT_READY);
    }
    let [tcp, udp, sctp] = ruleset.ports;
    let table = match tuple.protocol {
        TCP => tcp,
        UDP => udp,
        SCTP => sctp,
        _ => 0,
    };
    let Some(place) = class_place(table, tuple.destination_port, |line| t.rule_line(line)) else {
        return ByAddress::only(Winner::NOT_READY);
    };
    let destination = &tuple.destination;
    let v4 = destination.is_v4();
    let mut found = rule(t, if v4 { ruleset.roots[0] } else { ruleset.roots[1] }, destination);
    let mut class = 0;
    if place != 0 {
        let says = t.ask_class(place, destination);
        class = says.class;
        let rule = if says.root == 0 { says.rule } else { rule(t, says.root, destination) };
        if rule < found {
            found = rule;
        }
    }
    ByAddress { rule: found, class, names: u16::from(ruleset.parts & Ruleset::NAMES != 0) }
}

/// The winner for an address among the rules of a root; 0: there are none.
#[inline(always)]
fn rule<T: Tables>(t: &T, root: u32, ip: &Ip) -> u32 {
    if root == 0 {
        return Winner::NONE;
    }
    let (high, low) = ip.halves();
    if ip.is_v4() { t.rule_v4(root, low as u32) } else { t.rule_v6(root, high, low) }
}

/// The second step of [`judge`]: the better of what was found and the best rule for one of the names that the
/// destination was learnt for.
#[inline(always)]
pub fn judge_names<T: Tables>(t: &T, id: RulesetId, tuple: &Tuple, by_address: ByAddress) -> Judgement {
    let ByAddress { rule, class, .. } = by_address;
    let mut found = Judgement { rule, name: 0 };
    let Some(ruleset) = t.ruleset(id) else { return Judgement::NOT_READY };
    let key = LearntKey { firewall: ruleset.firewall, ip: tuple.destination };
    let Some(learnt) = t.learnt(&key) else { return found };
    let now = t.now();
    t.repeat(NAMES_PER_ADDRESS as u32, |i| {
        let Some(word) = learnt.names.get(i as usize).copied() else { return true };
        let name = (word >> 32) as NameId;
        if name == 0 || older_than(now, word as u32, 0) {
            return false;
        }
        let rule = t.name_rule(&NameRuleKey { ruleset: id, name, class: 0 });
        if rule < found.rule {
            found = Judgement { rule, name };
        }
        if class != 0 {
            let rule = t.name_rule(&NameRuleKey { ruleset: id, name, class: u32::from(class) });
            if rule < found.rule {
                found = Judgement { rule, name };
            }
        }
        false
    });
    found
}
