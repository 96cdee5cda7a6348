//! The only door to state: BPF maps in the kernel, `BTreeMap`s in tests, pinned maps in `outgate trace`.

use crate::addr::Ip;
use crate::conntrack::Ticks;
use crate::firewall::{ByAddress, Judgement};
use crate::keys::{
    Asked, AskedKey, Delivery, DenialKey, EgressId, EgressIp, FirewallId, Flow, FlowKey, FragmentHead,
    FragmentKey, IfIndex, Interface, Learnt, LearntKey, Lease, Line, NameId, NameKey, NameRuleKey, Node,
    NodeId, Opener, Pod, PodId, Policy, PolicyId, Reply, ReplyKey, Ruleset, RulesetId, Settings, Token,
    Tuple,
};
use crate::packet::Packet;
use crate::rules::ClassSays;
use crate::to_uplink::Known;

/// Why an entry was not inserted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InsertError {
    /// The key is there already.
    Exists,
    /// The table is full.
    Full,
}

/// Everything a decision may look at or change.
///
/// Small values are returned as copies, large ones by reference. Either way an entry of a BPF hash map may be
/// reused for another key while it is read; whoever depends on it checks what it read against a second entry.
pub trait Tables {
    /// The settings; `None` until the agent has written them.
    fn settings(&self) -> Option<&Settings>;
    /// The pod with this address.
    fn pod(&self, ip: &Ip) -> Option<Pod>;
    /// Where replies of this pod go.
    fn delivery(&self, pod: PodId) -> Option<&Delivery>;
    /// What an interface is.
    fn interface(&self, ifindex: IfIndex) -> Option<Interface>;
    /// The [`crate::keys::NetworkKind`] of the longest prefix that contains the address; 0 outside the cluster.
    fn network(&self, ip: &Ip) -> u32;
    /// An EgressIP object's addresses.
    fn policy(&self, id: PolicyId) -> Option<&Policy>;
    /// The id of an egress address.
    fn egress_id(&self, ip: &Ip) -> Option<EgressId>;
    /// An egress address.
    fn egress_ip(&self, id: EgressId) -> Option<&EgressIp>;
    /// The node that leases a granule; 0 for none.
    fn granule(&self, egress: EgressId, granule: u16) -> NodeId;
    /// The granules this node may use.
    fn lease(&self, egress: EgressId) -> Option<&Lease>;
    /// A node.
    fn node(&self, id: NodeId) -> Option<Node>;
    /// The node with this tunnel address.
    fn node_id(&self, tunnel_ip: &Ip) -> Option<NodeId>;

    /// The version of a firewall's rules that is in force; 0: none.
    fn ruleset_of(&self, firewall: FirewallId) -> RulesetId;
    /// What a version has.
    fn ruleset(&self, id: RulesetId) -> Option<Ruleset>;
    /// A line of `RULES`.
    fn rule_line(&self, line: u32) -> Option<&Line>;
    /// What a port class says of an address: [`crate::rules::ask_class`]. A method, so that the kernel programs make a
    /// function of it.
    fn ask_class(&self, place: u32, address: &Ip) -> ClassSays;
    /// The winner for an IPv4 address: [`crate::rules::find_v4`], for the same reason.
    fn rule_v4(&self, root: u32, address: u32) -> u32;
    /// The winner for an IPv6 address: [`crate::rules::find_v6`], for the same reason.
    fn rule_v6(&self, root: u32, high: u64, low: u64) -> u32;
    /// The winner, as [`crate::keys::Winner::order`], among the rules for a name.
    fn name_rule(&self, key: &NameRuleKey) -> u32;
    /// [`crate::firewall::judge`].
    fn judge(&self, id: RulesetId, tuple: &Tuple) -> Judgement;
    /// [`crate::firewall::judge_address`]. A method, so that the kernel programs make a function of it.
    fn judge_address(&self, id: RulesetId, tuple: &Tuple) -> ByAddress;
    /// [`crate::firewall::judge_names`], for the same reason.
    fn judge_names(&self, id: RulesetId, tuple: &Tuple, by_address: ByAddress) -> Judgement;
    /// [`crate::firewall::note`], for the same reason.
    fn note(&self, id: RulesetId, pod: PodId, packet: &Packet, kept: bool, rule: u32);
    /// [`crate::firewall::settle`], for the same reason.
    fn settle(&self, id: RulesetId, key: &FlowKey, judgement: Judgement);
    /// [`crate::from_pod::offloaded_flow`], likewise.
    fn offloaded_flow(&self, pod: &Pod, ruleset: RulesetId, key: &FlowKey, packet: &Packet) -> Known;
    /// [`crate::to_uplink::known_flow`], likewise.
    fn known_flow(&self, token: &Token, key: &FlowKey, packet: &Packet, translates: bool) -> Known;
    /// [`crate::firewall::let_go`], for the same reason.
    fn let_go(&self, id: RulesetId, key: &FlowKey, policy: PolicyId, len: u32, judgement: Judgement);
    /// Counts what a rule has decided; `rule` as [`crate::keys::Winner::order`].
    fn count_rule(&self, id: RulesetId, rule: u32, hits: u64, bytes: u64);
    /// Notes that a pod was denied something.
    fn put_denial(&self, key: &DenialKey, id: RulesetId, rule: u32);

    /// What an address is as a resolver: bits, 0 for none.
    fn resolver(&self, ip: &Ip) -> u32;
    /// The id of a name that a firewall has rules for.
    fn name(&self, key: &NameKey) -> Option<NameId>;
    /// The names that an address was learnt for.
    fn learnt(&self, key: &LearntKey) -> Option<&Learnt>;
    /// Enters an address for a name, or lets it live longer; never shorter.
    fn credit(&self, key: &LearntKey, name: NameId, until: Ticks);
    /// A question that a pod has asked.
    fn asked(&self, key: &AskedKey) -> Option<Asked>;
    /// Notes a question.
    fn put_asked(&self, key: &AskedKey, asked: &Asked);

    /// Looks at a flow, and may change it in place.
    fn flow<R>(&self, key: &FlowKey, look: impl FnOnce(&mut Flow) -> R) -> Option<R>;
    /// Makes a flow; `Exists` if another CPU was quicker.
    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> Result<(), InsertError>;
    /// Removes a flow, if it is there, and counts it and its bytes for the rule that has let it go.
    fn remove_flow(&self, key: &FlowKey);
    /// How many flows a pod has.
    fn flows_of(&self, pod: PodId) -> u32;
    /// A flow seen from outside.
    fn reply(&self, key: &ReplyKey) -> Option<Reply>;
    /// Claims a reply key; `Exists` if somebody has it.
    fn insert_reply(&self, key: &ReplyKey, reply: &Reply) -> Result<(), InsertError>;
    /// Gives a reply key back.
    fn remove_reply(&self, key: &ReplyKey);

    /// Until when every port of this node is taken towards a destination: a reply key with port 0.
    fn full_until(&self, destination: &ReplyKey) -> Option<Ticks>;
    /// Notes that a destination is full.
    fn put_full(&self, destination: &ReplyKey, until: Ticks);

    /// Who opened a connection.
    fn opener(&self, key: &FlowKey) -> Option<Opener>;
    /// Notes who opened a connection.
    fn put_opener(&self, key: &FlowKey, opener: &Opener);

    /// What the first fragment of a datagram is.
    fn fragment(&self, key: &FragmentKey) -> Option<&FragmentHead>;
    /// Notes what the first fragment of a datagram is.
    fn put_fragment(&self, key: &FragmentKey, head: &FragmentHead);

    /// Keeps a token; `Exists` if its number is taken.
    fn insert_token(&self, hash: u32, token: &Token) -> Result<(), InsertError>;
    /// Takes a token out. What it refers to is the caller's until its next call.
    fn take_token(&self, hash: u32) -> Option<&Token>;

    /// A random number.
    fn random(&self) -> u32;
    /// Time since boot.
    fn now(&self) -> Ticks;
    /// Calls `step` with 0, 1, … until it returns true or `times` calls are made.
    fn repeat<F: FnMut(u32) -> bool>(&self, times: u32, step: F);
}
