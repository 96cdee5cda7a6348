//! Keys and values of every map, as the kernel programs and the agent lay them out.
//!
//! Rules: `repr(C)`; padding is named and zero; ports, ids and indices are in host byte order, so that
//! `bpftool map dump` reads like a table; addresses are octets in network order; no `bool`, `Option` or enum
//! with data (any bit pattern must be a value).

use crate::addr::Ip;
use crate::limits::{GRANULES, NAMES_PER_ADDRESS, POLICY_ADDRESSES};

/// A pod's id: given by the agent to a pod's address, never given again. 0 is none.
pub type PodId = u32;
/// An EgressIP object's id on this node, never given again. 0 is none.
pub type PolicyId = u32;
/// The id of one address of one EgressIP object on this node, never given again. 0 is none.
pub type EgressId = u32;
/// A node's id on this node; 16 bits wide because granule tables hold 1,008 of them. 0 is none.
pub type NodeId = u16;
/// An interface's index. 0 is none.
pub type IfIndex = u32;
/// A namespace's place in `FIREWALLS`. 0 is none.
pub type FirewallId = u32;
/// One version of a firewall's rules on this node, never given again. 0 is none.
pub type RulesetId = u32;
/// The id of one name of one firewall on this node, never given again. 0 is none.
pub type NameId = u32;

/// `PODS`, by address: what `from_pod` needs to know of a packet's source.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pod {
    /// The pod.
    pub id: PodId,
    /// Its EgressIP object; 0: not selected, none of our business.
    pub policy: PolicyId,
    /// The pod-facing interface whose traffic may carry this address: the pod's own, or the bridge it is a
    /// port of. 0: not known yet, nothing is accepted.
    pub ifindex: IfIndex,
    /// Its namespace's firewall; 0: none.
    pub firewall: FirewallId,
}

impl Pod {
    /// Whether anything of it is our business: it has an EgressIP object or a firewall.
    #[inline(always)]
    #[must_use]
    pub const fn is_ours(&self) -> bool {
        self.policy != 0 || self.firewall != 0
    }
}

/// How a reply reaches a pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeliveryMode {
    /// `bpf_redirect_peer` into the pod's namespace: a veth whose peer is in another one.
    Peer = 1,
    /// `bpf_redirect_neigh` on the device of the host's route to the pod.
    Neighbour = 2,
}

/// `DELIVERY`, by pod id: where replies go. Absent: the pod is gone.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Delivery {
    /// The pod's address.
    pub ip: Ip,
    /// Interface to redirect to; 0: not known yet, nothing is delivered.
    pub ifindex: IfIndex,
    /// A [`DeliveryMode`]; 0: held, the address has turned up on another interface.
    pub mode: u8,
    /// Zero.
    pub pad: u8,
    /// The largest IP packet that the way to the pod carries, in bytes; 0: not known.
    pub mtu: u16,
    /// A hash of the pod's namespace, name and UID: by it a restarted agent knows the pod again.
    pub identity: u64,
}

/// `POD_NAMES`, by pod id: read by people and by `outgate flows`, never by a program.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PodName {
    /// Namespace, padded with zeros (at most 63 characters, RFC 1123).
    pub namespace: [u8; 64],
    /// Name, padded with zeros (at most 253 characters, RFC 1123).
    pub name: [u8; 256],
}

/// `POLICIES`, by id: the addresses of one EgressIP object.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// A hash of the object's name and UID: by it a restarted agent knows the object again.
    pub identity: u64,
    /// How many of `egress` are set.
    pub len: u32,
    /// The object's addresses.
    pub egress: [EgressId; POLICY_ADDRESSES],
    /// Zero.
    pub pad: u32,
}

/// `EGRESS_IPS`, by id: one address of one EgressIP object.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EgressIp {
    /// The address.
    pub ip: Ip,
    /// The policy it belongs to.
    pub policy: PolicyId,
    /// This node's uplink whose network contains it; 0: this node is no gateway for it.
    pub uplink: IfIndex,
    /// The node that holds it; 0: nobody does.
    pub holder: NodeId,
    /// The largest IP packet that `uplink` carries, in bytes; 0: not known.
    pub uplink_mtu: u16,
    /// Zero.
    pub pad: u32,
}

/// `GRANULES`, by egress id: the node that leases each granule, 0 for none.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GranuleTable {
    /// Indexed by granule.
    pub node: [NodeId; GRANULES],
}

/// A contiguous range of granules.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct GranuleRange {
    /// First granule.
    pub first: u16,
    /// Number of granules.
    pub count: u16,
}

/// `LEASES`, by egress id: the granules that this node may take ports from.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lease {
    /// How many of `granule` are set.
    pub granules: u32,
    /// The granules, ascending: a list, so that a port's place in the lease is one look away.
    pub granule: [u16; GRANULES],
}

/// `NODES`, by node id.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Node {
    /// The address its tunnel sends from and receives at.
    pub tunnel_ip: Ip,
}

/// What an interface is to Outgate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InterfaceKind {
    /// Leads to one pod.
    Pod = 1,
    /// A bridge that has pod-facing ports, or may get some.
    Bridge = 2,
    /// Leads out of the node.
    Uplink = 3,
    /// Known, and none of the above.
    Other = 4,
}

/// Who speaks through an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Guard {
    /// No selected pod.
    None = 0,
    /// Selected pods may, or pods not known yet: `to_uplink` wants a token or [`Settings::pass_token`] from all
    /// that it sends outside.
    Guarded = 1,
    /// Selected pods that are known, and nobody else: every other source is spoofed.
    Own = 2,
}

/// `INTERFACES`, by index.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Interface {
    /// An [`InterfaceKind`].
    pub kind: u8,
    /// A [`Guard`].
    pub guarded: u8,
    /// Hardware address.
    pub mac: [u8; 6],
    /// The bridge it is a port of; 0 for none.
    pub bridge: IfIndex,
}

/// What a prefix is to the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NetworkKind {
    /// Pod addresses.
    Pods = 1,
    /// Service (cluster) addresses: what they lead to is known only after the host's DNAT.
    Services = 2,
    /// Another node's address.
    Node = 3,
    /// An address of this node: what is sent to it reaches no uplink.
    OwnNode = 4,
}

impl NetworkKind {
    /// Whether a kind, as [`crate::tables::Tables::network`] gives it, is a node's address.
    #[inline(always)]
    #[must_use]
    pub const fn is_node(kind: u32) -> bool {
        kind == Self::Node as u32 || kind == Self::OwnNode as u32
    }
}

/// `NETWORKS`: longest-prefix key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct NetworkKey {
    /// Bits of `ip` that count; an IPv4 prefix length plus 96.
    pub prefix_len: u32,
    /// The network's address.
    pub ip: Ip,
}

/// `NETWORKS`: value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Network {
    /// A [`NetworkKind`].
    pub kind: u32,
}

/// A packet's addresses and ports. ICMP echo: the identifier is the source port of a request and the
/// destination port of a reply, the other port is 0.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Tuple {
    /// Source address.
    pub source: Ip,
    /// Destination address.
    pub destination: Ip,
    /// Source port, host order.
    pub source_port: u16,
    /// Destination port, host order.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// `TOKENS`, by the 32 bits put in the skb's hash: what a packet was before the host's stack had it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Token {
    /// Whose packet.
    pub pod: PodId,
    /// The pod's policy when it sent.
    pub policy: PolicyId,
    /// The pod's firewall when it sent.
    pub firewall: FirewallId,
    /// As the pod sent it.
    pub tuple: Tuple,
    /// 1: the packet comes to `to_uplink` past the host's stack, without a next hop.
    pub direct: u32,
}

/// `FRAGMENTS`: a datagram that came in fragments.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct FragmentKey {
    /// Source address.
    pub source: Ip,
    /// Destination address.
    pub destination: Ip,
    /// The identification, 16 bits of IPv4 or 32 of IPv6.
    pub id: u32,
    /// A [`crate::fragments::Place`].
    pub place: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// `FRAGMENTS`: what its first fragment is.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FragmentHead {
    /// When it came, in [`crate::conntrack::Ticks`].
    pub seen: u32,
    /// Source port, host order (echo request: identifier).
    pub source_port: u16,
    /// Destination port, host order (echo reply: identifier).
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// 1: an echo request; 2: an echo reply.
    pub echo: u8,
    /// A [`crate::fragments::Fate`].
    pub fate: u8,
    /// Zero.
    pub pad: u8,
    /// Behind the host's stack: whose it is, and what the pod sent.
    pub token: Token,
}

/// Which way a flow's packets take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowPath {
    /// Past the host's stack, both ways, after the first packet.
    Offloaded = 0,
    /// Through the host's stack both ways, because it rewrote the destination; translated at the uplink.
    Host = 1,
}

/// `FLOWS` (and `OPENERS`): one connection of a pod, seen from the pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct FlowKey {
    /// The pod.
    pub pod: PodId,
    /// The address outside.
    pub remote: Ip,
    /// The pod's port (ICMP: identifier); on the host's path the port the host's stack left in the packet.
    pub local_port: u16,
    /// The port outside (ICMP: 0).
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// A [`FlowPath`].
    pub path: u8,
    /// Zero.
    pub pad: u16,
}

/// `FLOWS`: value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flow {
    /// The egress address it is translated to; 0: it is not, the firewall has let it go.
    pub egress: EgressId,
    /// The policy that decided so; the flow is void once the pod has another.
    pub policy: PolicyId,
    /// The port it is translated to.
    pub egress_port: u16,
    /// A [`crate::conntrack::FlowState`].
    pub state: u8,
    /// Zero.
    pub pad: u8,
    /// When it last carried a packet, in [`crate::conntrack::Ticks`].
    pub seen: u32,
    /// When one of its packets last walked through the host's stack, in the same unit.
    pub walked: u32,
    /// The version of the rules that has let it go; 0: the pod had no firewall. It is judged again under another.
    pub ruleset: RulesetId,
    /// Packets the pod sent.
    pub packets: u64,
    /// Bytes the pod sent, IP headers included.
    pub bytes: u64,
    /// The rule that has let it go, as [`Winner::order`]; [`Winner::NONE`]: none did, and none forbade.
    pub rule: u32,
    /// The name by which it did; 0: by address.
    pub name: NameId,
}

/// `REPLIES`: the same connection, seen from outside.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct ReplyKey {
    /// The egress address it comes back to.
    pub egress: EgressId,
    /// The address outside.
    pub remote: Ip,
    /// The port it comes back to (ICMP: identifier).
    pub egress_port: u16,
    /// The port outside (ICMP: 0).
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// `REPLIES`: value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reply {
    /// The pod.
    pub pod: PodId,
    /// [`FlowKey::local_port`] of the connection.
    pub local_port: u16,
    /// A [`FlowPath`].
    pub path: u8,
    /// Zero.
    pub pad: u8,
    /// What the packet's source was before Outgate set it: the pod, or the node where it masqueraded.
    pub local: Ip,
}

/// Which end of a connection spoke first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenedBy {
    /// The pod: egress.
    Pod = 1,
    /// The outside: the pod's packets are answers, not egress.
    Remote = 2,
}

/// `OPENERS`: value. Who opened a connection of a selected pod, where a single packet does not tell.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Opener {
    /// When it last carried a packet that was looked up here, in [`crate::conntrack::Ticks`].
    pub seen: u32,
    /// An [`OpenedBy`].
    pub by: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// `DROPS`, per CPU, by [`crate::verdict::DropReason`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DropCount {
    /// Packets dropped.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// `SWEPT`, one entry: what the last sweep of the flow table did.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Swept {
    /// When it ended, in [`crate::conntrack::Ticks`].
    pub when: u32,
    /// Flows removed.
    pub removed: u32,
    /// Flows left.
    pub left: u32,
    /// How long it took, in the same unit, if it was started by a packet that found the table full; else 0.
    pub took: u32,
}

/// What happens to a selected pod's traffic while nobody holds any of its egress addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unassigned {
    /// Dropped and counted.
    Drop = 0,
    /// Leaves with the node's address, as in OVN-Kubernetes.
    NodeIp = 1,
}

/// `EgressConfig.offload`: which packets skip the host's stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Offload {
    /// All but a flow's first.
    Auto = 1,
    /// None.
    Never = 2,
    /// All: the node has no netfilter rules to honour.
    Always = 3,
}

/// `SETTINGS`, one entry.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// This node.
    pub node: NodeId,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// VNI of the tunnel.
    pub tunnel_vni: u32,
    /// The tunnel's device.
    pub tunnel_ifindex: IfIndex,
    /// The largest IP packet that an egress flow carries whole, in bytes: what the tunnel takes out of any
    /// uplink, for the holder may move. 0: not known, nothing is clamped or refused.
    pub mtu: u16,
    /// The largest IP packet that every uplink of this node carries, in bytes; 0: not known. What is larger, and
    /// may be fragmented, the host's stack fragments: the gateway could not.
    pub uplink_mtu: u16,
    /// The skb hash by which `from_pod` says "seen, let pass"; random, never 0.
    pub pass_token: u32,
    /// An [`Unassigned`].
    pub unassigned: u8,
    /// 1: egress address by pod; 2: by connection.
    pub spread: u8,
    /// 1: packets of unknown addresses of the cluster's pod networks, and of unknown interfaces, are held.
    pub hold_unknown: u8,
    /// An [`Offload`].
    pub offload: u8,
    /// Idle time of an established TCP flow, in seconds.
    pub tcp_established: u32,
    /// Idle time of a TCP flow that opens or closes, in seconds.
    pub tcp_transitory: u32,
    /// Idle time of a UDP flow, in seconds.
    pub udp: u32,
    /// Idle time of an ICMP echo flow, in seconds.
    pub icmp: u32,
    /// How long a port rests after its connection was closed, in seconds.
    pub rest: u32,
    /// The next pod id to give; read by a restarted agent, as those below, so that no id is given twice.
    pub next_pod: PodId,
    /// The next policy id to give.
    pub next_policy: PolicyId,
    /// The next egress id to give.
    pub next_egress: EgressId,
    /// The next number of a firewall's version to give.
    pub next_ruleset: RulesetId,
    /// The next number of a firewall's name to give.
    pub next_name: NameId,
    /// The largest IP packet that the tunnel takes, in bytes; 0: any, for the outer packet is fragmented. Over IPv6
    /// it is not (`ip6_fragment` wants `ignore_df`, which no tunnel sets).
    pub tunnel_max: u16,
    /// 1: what the firewall denies is answered, with RST or an ICMP error.
    pub reject: u8,
    /// Zero.
    pub pad_tunnel: u8,
    /// An uplink, for what goes to one past the host's stack; 0: there is none.
    pub uplink: IfIndex,
    /// This node's address that IPv4 errors made by the programs come from; unspecified: none are made.
    pub router_v4: Ip,
    /// The same for IPv6.
    pub router_v6: Ip,
}

/// `FIREWALLS`, by [`FirewallId`]: the [`RulesetId`] in force. An array that the agent writes word by word: the one
/// store that puts a new version in force. 0: no firewall.
///
/// `RULESETS`, by id: what is to be looked up of one version of a firewall's rules.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ruleset {
    /// A hash of the object's namespace and UID: by it a restarted agent knows the firewall again.
    pub identity: u64,
    /// A hash of the rules, as they were compiled: by it a restarted agent knows whether they are in force.
    pub content: u64,
    /// Whose it is.
    pub firewall: FirewallId,
    /// How many rules it has.
    pub rules: u32,
    /// [`Ruleset::ADDRESSES`], [`Ruleset::PORTS`], [`Ruleset::NAMES`] and [`Ruleset::REFUSED`].
    pub parts: u32,
    /// The roots of its rules without ports, for IPv4 and IPv6; 0: there are none. See [`crate::rules`].
    pub roots: [u32; 2],
    /// The tables of its ports, for TCP, UDP and SCTP; 0: there are none.
    pub ports: [u32; 3],
}

impl Ruleset {
    /// `RULES` has something of class 0.
    pub const ADDRESSES: u32 = 1;
    /// It has rules with ports.
    pub const PORTS: u32 = 2;
    /// It has rules for names.
    pub const NAMES: u32 = 4;
    /// The object was refused, and there is no earlier version: everything is denied.
    pub const REFUSED: u32 = 8;
}

/// `RULES`, by line: a node or leaf of a search tree, as [`crate::rules`] says. A line of the CPU's caches, and aligned as
/// such, so that its words may be read in pairs.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Line {
    /// Addresses, winners and lines, in host byte order.
    pub word: [u32; 16],
}

/// The one rule that wins among all that a stretch of addresses in `RULES`, or an entry of `NAME_RULES`, stands for.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Winner {
    /// Twice the rule's index in the object, plus 1 if it allows: the lowest wins.
    pub order: u32,
}

impl Winner {
    /// No rule. It allows, as does what no rule speaks of.
    pub const NONE: u32 = u32::MAX;
    /// Denied because no rules are in force that could be asked.
    pub const NOT_READY: u32 = u32::MAX - 1;

    /// Of a rule.
    #[must_use]
    pub const fn new(index: u32, allows: bool) -> Self {
        Self { order: index * 2 + allows as u32 }
    }
}

/// `NAMES`: a name that a firewall has rules for, to its [`NameId`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct NameKey {
    /// The firewall.
    pub firewall: FirewallId,
    /// 1: `name` stands for all names of one label more (`*.example.com`).
    pub wildcard: u32,
    /// As on the wire (RFC 1035, 3.1) without the root's length, in lower case, padded with zeros.
    pub name: [u8; 256],
}

/// `NAME_RULES`: key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct NameRuleKey {
    /// The version.
    pub ruleset: RulesetId,
    /// The name.
    pub name: NameId,
    /// The port class; 0: rules without ports.
    pub class: u32,
}

/// `LEARNT`: key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct LearntKey {
    /// Whose names.
    pub firewall: FirewallId,
    /// The address.
    pub ip: Ip,
}

/// `LEARNT`: the names that an address was learnt for.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Learnt {
    /// Each a [`NameId`] in the upper half and until when, in [`crate::conntrack::Ticks`], in the lower: a word, so
    /// that two CPUs change it in one step. 0: free.
    pub names: [u64; NAMES_PER_ADDRESS],
}

/// `RESOLVERS`, by address: bits of what it is.
pub const RESOLVER: u32 = 1;
/// A resolver on the pod's own node: it is asked whatever the rules say.
pub const RESOLVER_ON_NODE: u32 = 2;

/// `ASKED`: a question that a pod has asked.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct AskedKey {
    /// The pod.
    pub pod: PodId,
    /// The port it asked from.
    pub port: u16,
    /// The question's id.
    pub id: u16,
}

/// `ASKED`: value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Asked {
    /// Whom.
    pub resolver: Ip,
    /// When, in [`crate::conntrack::Ticks`].
    pub seen: u32,
}

/// `HELD`: a TCP segment from a resolver that was dropped, so that the agent reads it first.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct HeldKey {
    /// The pod it is for.
    pub pod: PodId,
    /// Who sent it.
    pub resolver: Ip,
    /// The pod's port.
    pub port: u16,
    /// The resolver's port.
    pub resolver_port: u16,
    /// Its sequence number; [`HeldKey::CONNECTION`]: an entry for the connection.
    pub seq: u32,
}

impl HeldKey {
    /// Of an entry whose [`Held::read`] is the sequence number up to which the agent has read all of the connection:
    /// what is sent again is cut otherwise than it was. A new connection removes it.
    pub const CONNECTION: u32 = 0;
}

/// `HELD`: value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// When it came first, in [`crate::conntrack::Ticks`].
    pub since: u32,
    /// How many of its bytes the agent has read, and learnt from: a segment of no more passes. 0: not read.
    pub read: u32,
}

/// `SEGMENTS`: the head of a record. [`Segment::len`] bytes of the segment's payload follow it. A segment may come in
/// several records, for a segment of the kernel's is up to 64 KiB long.
///
/// A record with [`Segment::payload`] 0 says that a connection begins: the resolver's SYN was let pass, and the first
/// byte of its answers has the sequence number `held.seq`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// What it is held under. Its `seq` is that of the first byte of the payload.
    pub held: HeldKey,
    /// The pod's firewall.
    pub firewall: FirewallId,
    /// The pod's address.
    pub pod_ip: Ip,
    /// How long the payload is, in bytes.
    pub payload: u32,
    /// Where in the payload this record's bytes begin.
    pub offset: u32,
    /// How many there are.
    pub len: u32,
    /// Its TCP flags.
    pub flags: u32,
}

/// What the program `credit` is told: its packet is an Ethernet header of zeros, then up to
/// [`crate::limits::CREDITS`] of these.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Credit {
    /// The address, and whose names.
    pub key: LearntKey,
    /// The name. 0: nothing is done.
    pub name: NameId,
    /// How long the address may be used, in seconds: [`crate::names::until`] is reckoned from it.
    pub ttl: u32,
    /// [`Credit::ENTER`] or [`Credit::FORGET`].
    pub action: u32,
}

impl Credit {
    /// The address is entered for the name, or lives longer.
    pub const ENTER: u32 = 0;
    /// The address is no longer the name's.
    pub const FORGET: u32 = 1;
}

/// `RULE_COUNTS`: key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct RuleCountKey {
    /// The version.
    pub ruleset: RulesetId,
    /// As [`Winner::order`].
    pub rule: u32,
}

/// `RULE_COUNTS`: what a rule has decided.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RuleCount {
    /// Flows that are over, or packets denied. Flows that live count themselves.
    pub hits: u64,
    /// Bytes of these. Flows that live count their own.
    pub bytes: u64,
}

/// `DENIALS`: key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct DenialKey {
    /// Who was denied.
    pub pod: PodId,
    /// What: the address, after the host's DNAT.
    pub remote: Ip,
    /// The port; 0 for what has none.
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

/// `DENIALS`: value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Denial {
    /// When first, in [`crate::conntrack::Ticks`].
    pub first: u32,
    /// When last.
    pub last: u32,
    /// How many packets.
    pub packets: u32,
    /// The version that denied the last one.
    pub ruleset: RulesetId,
    /// The rule, as [`Winner::order`].
    pub rule: u32,
}

/// `NAME_EVENTS`, per CPU: index.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum NameEvent {
    /// An address was entered for a name.
    Learnt = 0,
    /// One was there already, and lives longer now.
    Renewed = 1,
    /// One lost its place to another name of the same address.
    Displaced = 2,
    /// An answer over UDP was made to say "truncated", for it could not be read whole.
    Truncated = 3,
    /// An answer over UDP to no question that was seen.
    Unasked = 4,
    /// A segment over TCP was dropped once, for the agent to read.
    Held = 5,
    /// One could not be given to the agent: it passes late, unread.
    Unread = 6,
}

impl NameEvent {
    /// Every event, by number, with its name.
    pub const ALL: &'static [(Self, &'static str)] = &[
        (Self::Learnt, "learnt"),
        (Self::Renewed, "renewed"),
        (Self::Displaced, "displaced"),
        (Self::Truncated, "truncated"),
        (Self::Unasked, "unasked"),
        (Self::Held, "held"),
        (Self::Unread, "unread"),
    ];
}

/// Types that are plain bytes: `repr(C)`, no padding that is not named, every bit pattern a value.
///
/// # Safety
/// The implementor must be exactly that; the agent copies these to and from kernel memory.
#[expect(unsafe_code, reason = "the marker that lets the agent copy these types to the kernel")]
pub unsafe trait MapData: Copy + 'static {}

macro_rules! map_data {
    ($($type:ty = $size:literal),+ $(,)?) => {$(
        const _: () = assert!(size_of::<$type>() == $size, stringify!($type));
        // SAFETY: integers and arrays of integers only, `repr(C)`; the size above leaves no room for padding.
        #[expect(unsafe_code, reason = "see the trait")]
        unsafe impl MapData for $type {}
    )+};
}

map_data! {
    Ip = 16, Pod = 16, Delivery = 32, PodName = 320, Policy = 144, EgressIp = 32, GranuleTable = 2016,
    GranuleRange = 4, Lease = 2020, Node = 16, Interface = 12, NetworkKey = 20, Network = 4, Tuple = 40,
    Token = 56, FragmentKey = 40, FragmentHead = 68, FlowKey = 28, Flow = 48, ReplyKey = 28, Reply = 24, Opener = 8, Swept = 16, DropCount = 16, Settings = 104,
    Ruleset = 48, Line = 64, Winner = 4, NameKey = 264, NameRuleKey = 12, LearntKey = 20, Learnt = 128, AskedKey = 8, Asked = 20,
    HeldKey = 28, Held = 8, Segment = 64, Credit = 32, RuleCountKey = 8, RuleCount = 16, DenialKey = 24, Denial = 20,
    u32 = 4, u64 = 8,
}

impl Default for PodName {
    fn default() -> Self {
        Self { namespace: [0; 64], name: [0; 256] }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self { identity: 0, len: 0, egress: [0; POLICY_ADDRESSES], pad: 0 }
    }
}

impl Default for GranuleTable {
    fn default() -> Self {
        Self { node: [0; GRANULES] }
    }
}

impl Default for Lease {
    fn default() -> Self {
        Self { granules: 0, granule: [0; GRANULES] }
    }
}

impl Lease {
    /// The lease of these ranges, which do not overlap.
    #[must_use]
    pub fn of(ranges: &[GranuleRange]) -> Self {
        let mut lease = Self::default();
        let granules = ranges.iter().flat_map(|range| range.first..range.first + range.count);
        for (slot, granule) in lease.granule.iter_mut().zip(granules) {
            *slot = granule;
            lease.granules += 1;
        }
        lease
    }
}
