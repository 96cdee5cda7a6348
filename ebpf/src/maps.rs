//! Every map. Policy maps are written by the agent only (`apply`), flow maps by programs only; both are read
//! by all. Capacities and what happens when they are reached: `datapath::limits`.

use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf};
use aya_ebpf::macros::btf_map;
use datapath::addr::Ip;
use datapath::keys::{
    Asked, AskedKey, Delivery, Denial, DenialKey, DropCount, EgressIp, Flow, FlowKey, FragmentHead,
    FragmentKey, GranuleTable, Held, HeldKey, Interface, Learnt, LearntKey, Lease, Line, NameEvent, NameKey,
    NameRuleKey, Network, Node, Opener, Pod, PodName, Policy, Reply, ReplyKey, RuleCount, RuleCountKey,
    Ruleset, Settings, Swept, Token, Winner,
};
use datapath::limits;
use datapath::verdict::DropReason;

use crate::ctx::Request;
use crate::learn::Learning;
use crate::packet::Headers;
use crate::tables::Keys;

/// `BPF_F_NO_PREALLOC`: memory follows use. For maps that only the agent fills.
const ON_DEMAND: usize = 1;
/// `BPF_F_MMAPABLE`.
const MAPPABLE: usize = 1 << 10;

/// One entry: what the programs need to know of the node and of EgressConfig.
#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();

/// Local pods by address.
#[btf_map]
pub static PODS: HashMap<Ip, Pod, { limits::PODS as usize }, ON_DEMAND> = HashMap::new();

/// Where replies to a pod go, by pod id.
#[btf_map]
pub static DELIVERY: HashMap<u32, Delivery, { limits::PODS as usize }, ON_DEMAND> = HashMap::new();

/// Names of pods, by pod id, for people.
#[btf_map]
pub static POD_NAMES: HashMap<u32, PodName, { limits::PODS as usize }, ON_DEMAND> = HashMap::new();

/// EgressIP objects by id.
#[btf_map]
pub static POLICIES: HashMap<u32, Policy, { limits::POLICIES as usize }, ON_DEMAND> = HashMap::new();

/// Egress addresses by id.
#[btf_map]
pub static EGRESS_IPS: HashMap<u32, EgressIp, { limits::EGRESS_IPS as usize }, ON_DEMAND> = HashMap::new();

/// Ids of egress addresses.
#[btf_map]
pub static EGRESS_ADDRS: HashMap<Ip, u32, { limits::EGRESS_IPS as usize }, ON_DEMAND> = HashMap::new();

/// Which node leases which granule of an egress address.
#[btf_map]
pub static GRANULES: HashMap<u32, GranuleTable, { limits::EGRESS_IPS as usize }, ON_DEMAND> = HashMap::new();

/// Granules this node takes ports from, by egress address.
#[btf_map]
pub static LEASES: HashMap<u32, Lease, { limits::EGRESS_IPS as usize }, ON_DEMAND> = HashMap::new();

/// Nodes by id.
#[btf_map]
pub static NODES: HashMap<u32, Node, { limits::NODES as usize }, ON_DEMAND> = HashMap::new();

/// Ids of nodes by tunnel address.
#[btf_map]
pub static NODE_ADDRS: HashMap<Ip, u32, { limits::NODES as usize }, ON_DEMAND> = HashMap::new();

/// Interfaces by index.
#[btf_map]
pub static INTERFACES: HashMap<u32, Interface, { limits::INTERFACES as usize }, ON_DEMAND> = HashMap::new();

/// The cluster's prefixes. What is in none of them is outside.
#[btf_map]
pub static NETWORKS: LpmTrie<Ip, Network, { limits::NETWORKS as usize }> = LpmTrie::new();

/// The version in force of each firewall. One aligned word each, which the agent writes in place: whoever reads it sees
/// the old or the new.
#[btf_map]
pub static FIREWALLS: Array<u32, { limits::FIREWALLS as usize }, MAPPABLE> = Array::new();

/// Versions of firewalls.
#[btf_map]
pub static RULESETS: HashMap<u32, Ruleset, { limits::RULESETS as usize }, ON_DEMAND> = HashMap::new();

/// The classes of ports and the winning rules by address, as search trees: see `datapath::rules`. Mapped by nobody, but only arrays that may be
/// begin with a page, so that each line is one of the CPU's caches (`array_map_alloc`, kernel/bpf/arraymap.c).
#[btf_map]
pub static RULES: Array<Line, { limits::RULES as usize }, MAPPABLE> = Array::new();

/// Names that firewalls have rules for.
#[btf_map]
pub static NAMES: HashMap<NameKey, u32, { limits::NAMES as usize }, ON_DEMAND> = HashMap::new();

/// The winning rules for names, by version and port class.
#[btf_map]
pub static NAME_RULES: HashMap<NameRuleKey, Winner, { limits::NAME_RULES as usize }, ON_DEMAND> =
    HashMap::new();

/// Whose answers count.
#[btf_map]
pub static RESOLVERS: HashMap<Ip, u32, { limits::RESOLVERS as usize }, ON_DEMAND> = HashMap::new();

/// Which names an address was learnt for.
#[btf_map]
pub static LEARNT: LruHashMap<LearntKey, Learnt, { limits::LEARNT as usize }> = LruHashMap::new();

/// Questions under way.
#[btf_map]
pub static ASKED: LruHashMap<AskedKey, Asked, { limits::ASKED as usize }> = LruHashMap::new();

/// Answers over TCP that wait for the agent to read them.
#[btf_map]
pub static HELD: LruHashMap<HeldKey, Held, { limits::HELD as usize }> = LruHashMap::new();

/// These answers, on their way to the agent.
#[btf_map]
pub static SEGMENTS: RingBuf<(), { limits::SEGMENTS as usize }> = RingBuf::new();

/// What happened to names, by [`NameEvent`].
#[btf_map]
pub static NAME_EVENTS: PerCpuArray<u64, { NameEvent::ALL.len() }> = PerCpuArray::new();

/// What rules have decided.
#[btf_map]
pub static RULE_COUNTS: HashMap<RuleCountKey, RuleCount, { limits::RULE_COUNTS as usize }, ON_DEMAND> =
    HashMap::new();

/// What was denied lately.
#[btf_map]
pub static DENIALS: LruHashMap<DenialKey, Denial, { limits::DENIALS as usize }> = LruHashMap::new();

/// Where a CPU puts keys together that the stack has no room for.
#[btf_map]
pub static KEYS: PerCpuArray<Keys, 1> = PerCpuArray::new();

/// The answer of a resolver that a CPU reads.
#[btf_map]
pub static LEARNING: PerCpuArray<Learning, 1> = PerCpuArray::new();

/// Packets between `from_pod` and `to_uplink`. Both run on the same CPU for one packet, unless it is queued.
#[btf_map]
pub static TOKENS: LruHashMap<u32, Token, { limits::TOKENS as usize }> = LruHashMap::new();

/// The token that a CPU works on: copied here because the stack's 512 bytes are needed elsewhere.
#[btf_map]
pub static TAKEN_TOKEN: PerCpuArray<Token, 1> = PerCpuArray::new();

/// What a CPU asks helpers with.
#[btf_map]
pub static REQUEST: PerCpuArray<Request, 1> = PerCpuArray::new();

/// The packet that a CPU works on.
#[btf_map]
pub static HEADERS: PerCpuArray<Headers, 1> = PerCpuArray::new();

/// The answer that a CPU makes to a packet.
#[btf_map]
pub static ANSWER: PerCpuArray<[u8; limits::ANSWER], 1> = PerCpuArray::new();

/// Who opened a connection. Racing writers write the same, or the later one of two openings.
#[btf_map]
pub static OPENERS: LruHashMap<FlowKey, Opener, { limits::OPENERS as usize }> = LruHashMap::new();

/// Flows, seen from the pod. Two CPUs may update one at once: `seen` and `state` are single stores of equal
/// worth, a lost increment of a counter is accepted (a flow mostly stays on one CPU).
#[btf_map]
pub static FLOWS: HashMap<FlowKey, Flow, { limits::FLOWS as usize }> = HashMap::new();

/// Flows, seen from outside. Inserting an entry claims its port; entries do not change afterwards.
#[btf_map]
pub static REPLIES: HashMap<ReplyKey, Reply, { limits::FLOWS as usize }> = HashMap::new();

/// Destinations towards which every port of this node is taken: reply keys with port 0, until when.
#[btf_map]
pub static FULL: LruHashMap<ReplyKey, u32, { limits::FULL as usize }> = LruHashMap::new();

/// Datagrams that are coming in fragments.
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentHead, { limits::FRAGMENTS as usize }> =
    LruHashMap::new();

/// How many flows each pod has. Pods that are gone go first; a count is approximate when its entry was new.
#[btf_map]
pub static POD_FLOWS: LruHashMap<u32, u64, { 2 * limits::PODS as usize }> = LruHashMap::new();

/// What the last sweep of the flow table did.
#[btf_map]
pub static SWEPT: Array<Swept, 1> = Array::new();

/// Programs that others go on with.
#[btf_map]
pub static PROGRAMS: ProgramArray<1> = ProgramArray::new();

/// Drops by reason.
#[btf_map]
pub static DROPS: PerCpuArray<DropCount, { DropReason::ALL.len() }> = PerCpuArray::new();
