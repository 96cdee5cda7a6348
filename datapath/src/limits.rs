//! Capacities. Each says why it is what it is, and what happens when it is reached.

/// First port that a granule covers; below are the well-known ports, which no NAT hands out (RFC 6056, 3.2).
pub const FIRST_PORT: u16 = 1024;
/// Ports in a granule, the smallest lease: one machine word of a bitmap, and Google Cloud NAT's own minimum.
pub const GRANULE_PORTS: u16 = 64;
/// Granules of one egress IP: ports 1024-65535 in 64s. It bounds the source nodes of one address.
pub const GRANULES: usize = 1008;
/// Addresses of one EgressIP object. A new flow scores every one of them; the object is refused beyond.
pub const POLICY_ADDRESSES: usize = 32;
/// Pods with an address on one node: eight times the kubelet's recommended 110 and room for dual stack.
/// Beyond, a pod is not programmed: its traffic is held as an unknown pod's, and its status says so.
pub const PODS: u32 = 2048;
/// EgressIP objects that one node's pods use, or whose addresses it may hold.
pub const POLICIES: u32 = 4096;
/// Egress addresses a node knows. With 2 KiB of granule table each this is 8 MiB when full.
pub const EGRESS_IPS: u32 = 4096;
/// Nodes of the cluster, Kubernetes' own limit being 5,000. Node ids are 16 bits wide in granule tables.
pub const NODES: u32 = 8192;
/// Prefixes of the cluster: pod and service networks, and every node's addresses.
pub const NETWORKS: u32 = 32_768;
/// Interfaces of a node: one a pod, and the rest.
pub const INTERFACES: u32 = 8192;
/// Flows of a node, both directions. Full: `FlowTableFull`, a counted drop of the new connection only.
pub const FLOWS: u32 = 262_144;
/// Flows of one pod: it may fill a quarter of its node's table, not all of it. Beyond: `PodFlowLimit`, a counted
/// drop of its new connections only.
pub const POD_FLOWS: u32 = FLOWS / 4;
/// Packets between `from_pod` and `to_uplink`, which one CPU walks one after another; the rest is for those
/// that netfilter dropped or queued. Least recently used goes first; its packet is then `TokenLost`.
pub const TOKENS: u32 = 65_536;
/// Connections of selected pods whose packets do not tell who opened them. Least recently used goes first: a
/// connection from outside that idles while 262,144 others come is then answered no more.
pub const OPENERS: u32 = 262_144;
/// Ports that a new flow draws at random before it scans the lease: with half of it in use towards a
/// destination, one flow in four thousand scans.
pub const PORT_DRAWS: u32 = 12;
/// How long a UDP or ICMP flow skips the host's stack before one of its packets walks through it again, in
/// seconds: what the node's netfilter forbids meanwhile is in force for them this long after at the latest.
/// TCP shows its openings.
pub const WALK_AGAIN_SECONDS: u32 = 30;
/// How long a destination that a scan found full is answered "full" without another, in seconds. It bounds
/// what a pod that sprays a full destination can cost: one scan a second.
pub const FULL_SECONDS: u32 = 1;
/// Destinations remembered as full. Least recently used goes first and is scanned again.
pub const FULL: u32 = 4096;
/// Datagrams that are coming in fragments. Least recently used goes first: the rest of its fragments are dropped.
pub const FRAGMENTS: u32 = 8192;
/// How long a first fragment is remembered, in seconds. Fragments of one datagram follow each other closely; an
/// identification comes round again after 65,536 datagrams (RFC 4963), which must not be by then.
pub const FRAGMENT_SECONDS: u32 = 2;
/// Bytes of memory that a CPU has to make an answer in: the longest, 1,280 bytes of IPv6 (RFC 4443, 3.2), and
/// what bounds that the verifier can follow need beyond.
pub const ANSWER: usize = 1600;
/// Firewalls of a node: one a namespace that has pods here, of which there are at most [`PODS`]. Place 0 is none.
pub const FIREWALLS: u32 = PODS;
/// Rules of one EgressFirewall object, OVN-Kubernetes' own bound. It is refused whole beyond.
pub const FIREWALL_RULES: usize = 8000;
/// Blocks of 16 lines in `RULES`, the first of which is not given out. See [`RULES`].
pub const RULE_BLOCKS: u32 = 32_768;
/// Lines of `RULES`, 64 bytes each: 32 MiB, all of it from the start, for it is an array.
///
/// A network or address that a rule is for takes a quarter of a line where there are many in a port class, and up to two
/// where there are two of IPv6 that share three words of four; a class of ports takes a quarter of a line or one, and ports
/// a quarter of a line each for the 256 beside them. 100,000 of the worst are 220,000 lines. The largest object
/// ([`FIREWALL_ENTRIES`], four in each of [`FIREWALL_CLASSES`], and each port of each protocol by itself) has up to 250,000, and
/// stands there twice during a change. Full: the object is refused, its version in force stays.
pub const RULES: u32 = RULE_BLOCKS * crate::rules::BLOCK_LINES;
/// Networks and addresses by port class that one object may need: it bounds what it takes of `RULES` to less than half,
/// so that one namespace leaves room for others even while its old version stands beside the new. It is refused whole
/// beyond.
pub const FIREWALL_ENTRIES: usize = 131_072;
/// Destinations of an object's rules, each address of a selected node counted for each rule: 5,000 nodes, Kubernetes'
/// own limit, with an address of each family, for 26 rules. It is refused whole beyond.
pub const FIREWALL_TARGETS: usize = 1 << 18;
/// Destinations and entries that are gone through while an object's ports are compiled: it bounds how long the agent
/// is busy with one object, to some 30 ms. It is refused whole beyond.
pub const FIREWALL_STEPS: usize = 1 << 21;
/// Port classes of one object: each takes up to a line of [`RULES`] besides its rules. It is refused whole beyond.
pub const FIREWALL_CLASSES: usize = 0x7fff;
/// Versions of firewalls at once: two of each.
pub const RULESETS: u32 = 2 * FIREWALLS;
/// Names of one EgressFirewall object. It is refused whole beyond: each is looked up by the agent at its TTL.
pub const FIREWALL_NAMES: usize = 1024;
/// Names of a node's firewalls. Full: as [`RULES`].
pub const NAMES: u32 = 16_384;
/// Rules for names, by class.
pub const NAME_RULES: u32 = 131_072;
/// Of these, what one object may need. It is refused whole beyond.
pub const FIREWALL_NAME_ENTRIES: usize = NAME_RULES as usize / 4;
/// Names of one firewall that one address is known for. Beyond, the one that is to be forgotten first goes, counted
/// as [`crate::keys::NameEvent::Displaced`].
pub const NAMES_PER_ADDRESS: usize = 16;
/// Addresses learnt on a node. Least recently used goes first, and is learnt again by the next look-up.
pub const LEARNT: u32 = 65_536;
/// Addresses of one name. Beyond, the agent takes out those to be forgotten first, counted.
pub const NAME_ADDRESSES: usize = 1024;
/// How long an address outlives its TTL, in seconds: clients look up, think, and connect.
pub const NAME_GRACE_SECONDS: u32 = 60;
/// The longest that an address is remembered without being learnt again, in seconds: a day.
pub const NAME_TTL_SECONDS: u32 = 86_400;
/// Resolvers that pods are given.
pub const RESOLVERS: u32 = 4096;
/// Questions under way. Least recently used goes first; its answer is then learnt by no one.
pub const ASKED: u32 = 65_536;
/// How long an answer is waited for, in seconds: resolvers' clients give up after 5, and ask anew.
pub const ASKED_SECONDS: u32 = 15;
/// Segments of answers over TCP that are held. Least recently used goes first, and is held anew.
pub const HELD: u32 = 4096;
/// After this many seconds a held segment passes, read or not: the agent is dead.
pub const HELD_SECONDS: u32 = 1;
/// Bytes of the way to the agent for segments over TCP. Full: the segment passes late, unread.
pub const SEGMENTS: u32 = 1 << 20;
/// Bytes of a segment in one record of it. The largest segment of a path with an MTU of 1,500 bytes, and some more.
pub const SEGMENT_BYTES: usize = 2048;
/// Records of one segment, which is then 128 KiB at most; one that is longer passes late, unread.
pub const SEGMENT_RECORDS: u32 = 64;
/// Bytes of an answer over UDP that are read, a power of two: what resolvers send by default at most (RFC 6891, 6.2.5).
/// One that is longer is asked for again over TCP.
pub const ANSWER_BYTES: usize = 4096;
/// Entries of `LEARNT` that one run of the program `credit` is told.
pub const CREDITS: usize = 64;
/// Rules with counts, on a node. Full: rules that have not decided anything yet are not counted.
pub const RULE_COUNTS: u32 = 262_144;
/// Connections that were denied lately. Least recently used goes first.
pub const DENIALS: u32 = 16_384;
/// Ports that NodePort services have unless a cluster says otherwise: to an address of the pod's own node they lead to
/// pods, which no rule is for (Kubernetes' `--service-node-port-range`).
pub const NODE_PORTS: core::ops::RangeInclusive<u16> = 30_000..=32_767;
