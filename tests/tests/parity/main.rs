//! The decisions in memory against the loaded programs: random tables, firewalls, flows and packets of both
//! families, whole and in fragments, compared in verdict, drop counters, bytes, skb hash, tunnel metadata, and what
//! the maps hold afterwards, counts of rules and denials too. Of answers that a program makes itself the bytes are `answers.rs`'s to compare.
//!
//! `OUTGATE_PARITY_CASES` sets how many cases run, `OUTGATE_PARITY_SEED` where the generator starts. The kernel
//! draws its own ports and tokens: the decisions in memory are handed what it drew ([`Replay`]), and fail to
//! agree if it could not have been drawn.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "verdicts that two programs share are handed on together"
)]

mod firewalls;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use datapath::addr::Ip;
use datapath::conntrack::{Ticks, seconds};
use datapath::departure::{Departure, Route, asks, depart};
use datapath::firewall::{ByAddress, Judgement};
use datapath::fragments::{Place, recall};
use datapath::from_uplink::claims;
use datapath::keys::{
    Asked, AskedKey, Delivery, DenialKey, DropCount, EgressId, EgressIp, FirewallId, Flow, FlowKey,
    FragmentHead, FragmentKey, GranuleRange, GranuleTable, IfIndex, Interface, InterfaceKind, Learnt,
    LearntKey, Lease, Line, NameId, NameKey, NameRuleKey, NetworkKey, NetworkKind, Node, NodeId, Opener, Pod,
    PodId, Policy, PolicyId, Reply, ReplyKey, Ruleset, RulesetId, Settings, Token, Tuple,
};
use datapath::limits::{FIRST_PORT, GRANULE_PORTS};
use datapath::memory::Memory;
use datapath::names;
use datapath::packet::{ACK, FIN, ICMP, ICMPV6, Kind, Packet, Part, RST, SCTP, SYN, TCP, UDP};
use datapath::ports::nth_port;
use datapath::rules::ClassSays;
use datapath::tables::{InsertError, Tables};
use datapath::verdict::{DropReason, FromOutside, FromPod, HostStack, Keep, ReverseSnat, ToUplink, Way};
use lab::kernel::{
    self, Input, Kernel, Observed, Output, Program, State, Tunnel, Verdict, enter_node_network,
    interfaces::{OTHER_POD, POD, PORT, SECOND_UPLINK, TUNNEL, UPLINK},
};
use lab::packet::{
    ABORT, Built, DATA, DESTINATION_OPTIONS, Decoded, End, HOP_BY_HOP, INIT, INIT_ACK, ROUTING,
    SHUTDOWN_COMPLETE, Side, Transport, arp, echo, hop, icmp, raw, sctp, tcp, translate, udp, v6,
};

/// The bridge that [`PORT`] is a port of; no program is attached to it, so it need not be there.
const BRIDGE: u32 = 13;
/// An interface that nobody knows.
const UNKNOWN: u32 = 99;
/// This node; 2 and 3 are others.
const SELF: NodeId = 1;
const VNI: u32 = 4711;
const TUNNEL_PORT: u16 = 4795;

/// The addresses of one family.
struct Family {
    /// Pods: address, id, where they speak.
    pods: [(Ip, u32, u32); 4],
    egress: [Ip; 4],
    /// The id of the first of `egress`.
    first_egress: EgressId,
    nodes: [Ip; 3],
    /// Servers outside; the first is the crowded one.
    outside: [Ip; 6],
    inside: [Ip; 8],
    /// Nobody's, of the pods' network and of elsewhere.
    strangers: [Ip; 2],
    icmp: u8,
    /// Prefixes: length and kind. The first ones are nearly always there, the others seldom.
    networks: [(Ip, u32, NetworkKind); 7],
}

static V4: Family = {
    let nodes = [Ip::v4([172, 18, 0, 11]), Ip::v4([172, 18, 0, 12]), Ip::v4([172, 18, 0, 13])];
    Family {
        pods: [
            (Ip::v4([10, 244, 1, 10]), 1, POD),
            (Ip::v4([10, 244, 1, 11]), 2, OTHER_POD),
            (Ip::v4([10, 244, 1, 12]), 3, BRIDGE),
            (Ip::v4([10, 244, 1, 13]), 4, POD),
        ],
        egress: [
            Ip::v4([172, 18, 0, 100]),
            Ip::v4([172, 18, 0, 101]),
            Ip::v4([192, 0, 2, 100]),
            Ip::v4([203, 0, 113, 200]),
        ],
        first_egress: 1,
        nodes,
        outside: [
            Ip::v4([203, 0, 113, 5]),
            Ip::v4([203, 0, 113, 6]),
            Ip::v4([198, 51, 100, 9]),
            Ip::v4([192, 0, 2, 9]),
            Ip::v4([172, 18, 0, 50]),
            Ip::v4([8, 8, 8, 8]),
        ],
        inside: [
            Ip::v4([10, 244, 2, 10]),
            Ip::v4([10, 244, 1, 99]),
            Ip::v4([10, 96, 0, 10]),
            nodes[0],
            nodes[1],
            Ip::v4([169, 254, 1, 1]),
            Ip::v4([224, 0, 0, 1]),
            Ip::v4([255, 255, 255, 255]),
        ],
        strangers: [Ip::v4([10, 244, 1, 99]), Ip::v4([8, 8, 4, 4])],
        icmp: ICMP,
        networks: [
            (Ip::v4([10, 244, 0, 0]), 96 + 16, NetworkKind::Pods),
            (Ip::v4([10, 244, 2, 0]), 96 + 24, NetworkKind::Pods),
            (Ip::v4([10, 96, 0, 0]), 96 + 16, NetworkKind::Services),
            (nodes[0], 128, NetworkKind::OwnNode),
            (nodes[1], 128, NetworkKind::Node),
            (Ip::v4([10, 0, 0, 0]), 96 + 8, NetworkKind::Services),
            (Ip::v4([8, 8, 8, 8]), 127, NetworkKind::Node),
        ],
    }
};

static V6: Family = {
    let nodes = [
        v6([0x2001, 0xdb8, 0x18, 0, 0x11]),
        v6([0x2001, 0xdb8, 0x18, 0, 0x12]),
        v6([0x2001, 0xdb8, 0x18, 0, 0x13]),
    ];
    Family {
        pods: [
            (v6([0xfd00, 0x10, 0x244, 1, 0x10]), 5, POD),
            (v6([0xfd00, 0x10, 0x244, 1, 0x11]), 6, OTHER_POD),
            (v6([0xfd00, 0x10, 0x244, 1, 0x12]), 7, BRIDGE),
            (v6([0xfd00, 0x10, 0x244, 1, 0x13]), 8, POD),
        ],
        egress: [
            v6([0x2001, 0xdb8, 0x18, 0, 0x100]),
            v6([0x2001, 0xdb8, 0x18, 0, 0x101]),
            v6([0x2001, 0xdb8, 0x19, 0, 0x100]),
            v6([0x2001, 0xdb8, 0xcb, 0, 0x200]),
        ],
        first_egress: 5,
        nodes,
        outside: [
            v6([0x2001, 0xdb8, 0xcb, 0, 5]),
            v6([0x2001, 0xdb8, 0xcb, 0, 6]),
            v6([0x2001, 0xdb8, 0x51, 0, 9]),
            v6([0x2001, 0xdb8, 0x19, 0, 9]),
            v6([0x2001, 0xdb8, 0x18, 0, 0x50]),
            v6([0x2001, 0x4860, 0, 0, 0x8888]),
        ],
        inside: [
            v6([0xfd00, 0x10, 0x244, 2, 0x10]),
            v6([0xfd00, 0x10, 0x244, 1, 0x99]),
            v6([0xfd00, 0x10, 0x96, 0, 0x10]),
            nodes[0],
            nodes[1],
            v6([0xfe80, 0, 0, 0, 1]),
            v6([0xff02, 0, 0, 0, 1]),
            v6([0xff05, 0, 0, 0, 2]),
        ],
        strangers: [v6([0xfd00, 0x10, 0x244, 1, 0x99]), v6([0x2001, 0x4860, 0, 0, 0x4444])],
        icmp: ICMPV6,
        networks: [
            (v6([0xfd00, 0x10, 0x244, 0, 0]), 48, NetworkKind::Pods),
            (v6([0xfd00, 0x10, 0x244, 2, 0]), 64, NetworkKind::Pods),
            (v6([0xfd00, 0x10, 0x96, 0, 0]), 48, NetworkKind::Services),
            (nodes[0], 128, NetworkKind::OwnNode),
            (nodes[1], 128, NetworkKind::Node),
            (v6([0xfd00, 0, 0, 0, 0]), 8, NetworkKind::Services),
            (v6([0x2001, 0x4860, 0, 0, 0x8888]), 127, NetworkKind::Node),
        ],
    }
};

/// The family of an address.
const fn family(ip: &Ip) -> &'static Family {
    if ip.is_v4() { &V4 } else { &V6 }
}

/// A pod by its id: address, id, where it speaks.
fn pod(id: PodId) -> (Ip, u32, u32) {
    *V4.pods.iter().chain(&V6.pods).find(|(_, of, _)| *of == id).expect("a pod of these")
}

/// An egress address by its id.
fn egress(id: EgressId) -> Ip {
    if id < V6.first_egress { V4.egress[id as usize - 1] } else { V6.egress[(id - V6.first_egress) as usize] }
}

/// One of each: a resolver's, a resolver pod's, a NodePort.
const PORTS: [u16; 7] = [80, 53, 5353, 40000, 40001, 30080, TUNNEL_PORT];
/// Ages in seconds, none of them so near below an idle time that a machine's pause could make it one.
const AGES: [u32; 13] = [0, 0, 5, 20, 40, 50, 61, 70, 200, 250, 280, 310, 8000];

/// Random numbers: splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn bytes(&mut self, at_most: usize) -> Vec<u8> {
        (0..self.below(at_most + 1)).map(|_| self.next() as u8).collect()
    }
}

/// What the kernel drew, as far as its maps tell.
#[derive(Clone, Copy, Debug)]
enum Draw {
    /// Nothing that shows.
    Any,
    /// A token's number.
    Token(u32),
    /// A port of an egress IP.
    Port(EgressId, u16),
    /// Some port that nobody has.
    FreePort,
}

/// Tables in memory that draw what the kernel drew.
struct Replay<'a> {
    memory: &'a Memory,
    draw: Draw,
    /// Whose port is looked for.
    wanted: Cell<ReplyKey>,
}

impl Tables for Replay<'_> {
    fn random(&self) -> u32 {
        let key = self.wanted.get();
        let fits = |port| match self.draw {
            Draw::Port(egress, drawn) => egress == key.egress && port == drawn,
            Draw::FreePort => self.memory.reply(&ReplyKey { egress_port: port, ..key }).is_none(),
            Draw::Any | Draw::Token(_) => false,
        };
        if let Draw::Token(number) = self.draw {
            return number;
        }
        let Some(lease) = self.memory.lease(key.egress) else { return 0 };
        let ports = lease.granules * u32::from(GRANULE_PORTS);
        let nth = (0..ports).find(|nth| nth_port(lease, *nth).is_some_and(fits)).unwrap_or(0);
        // The smallest word that is scaled to `nth`.
        (u64::from(nth) << 32).div_ceil(u64::from(ports.max(1))) as u32
    }
    fn full_until(&self, destination: &ReplyKey) -> Option<Ticks> {
        self.wanted.set(*destination);
        self.memory.full_until(destination)
    }
    fn settings(&self) -> Option<&Settings> {
        self.memory.settings()
    }
    fn pod(&self, ip: &Ip) -> Option<Pod> {
        self.memory.pod(ip)
    }
    fn delivery(&self, pod: PodId) -> Option<&Delivery> {
        self.memory.delivery(pod)
    }
    fn interface(&self, ifindex: IfIndex) -> Option<Interface> {
        self.memory.interface(ifindex)
    }
    fn network(&self, ip: &Ip) -> u32 {
        self.memory.network(ip)
    }
    fn policy(&self, id: PolicyId) -> Option<&Policy> {
        self.memory.policy(id)
    }
    fn egress_id(&self, ip: &Ip) -> Option<EgressId> {
        self.memory.egress_id(ip)
    }
    fn egress_ip(&self, id: EgressId) -> Option<&EgressIp> {
        self.memory.egress_ip(id)
    }
    fn granule(&self, egress: EgressId, granule: u16) -> NodeId {
        self.memory.granule(egress, granule)
    }
    fn lease(&self, egress: EgressId) -> Option<&Lease> {
        self.memory.lease(egress)
    }
    fn node(&self, id: NodeId) -> Option<Node> {
        self.memory.node(id)
    }
    fn node_id(&self, tunnel_ip: &Ip) -> Option<NodeId> {
        self.memory.node_id(tunnel_ip)
    }
    fn ruleset_of(&self, firewall: FirewallId) -> RulesetId {
        self.memory.ruleset_of(firewall)
    }
    fn ruleset(&self, id: RulesetId) -> Option<Ruleset> {
        self.memory.ruleset(id)
    }
    fn rule_line(&self, line: u32) -> Option<&Line> {
        self.memory.rule_line(line)
    }
    fn ask_class(&self, place: u32, address: &Ip) -> ClassSays {
        self.memory.ask_class(place, address)
    }
    fn rule_v4(&self, root: u32, address: u32) -> u32 {
        self.memory.rule_v4(root, address)
    }
    fn rule_v6(&self, root: u32, high: u64, low: u64) -> u32 {
        self.memory.rule_v6(root, high, low)
    }
    fn name_rule(&self, key: &NameRuleKey) -> u32 {
        self.memory.name_rule(key)
    }
    fn judge(&self, id: RulesetId, tuple: &Tuple) -> Judgement {
        self.memory.judge(id, tuple)
    }
    fn judge_address(&self, id: RulesetId, tuple: &Tuple) -> ByAddress {
        self.memory.judge_address(id, tuple)
    }
    fn judge_names(&self, id: RulesetId, tuple: &Tuple, by_address: ByAddress) -> Judgement {
        self.memory.judge_names(id, tuple, by_address)
    }
    fn note(&self, id: RulesetId, pod: PodId, packet: &Packet, kept: bool, rule: u32) {
        self.memory.note(id, pod, packet, kept, rule);
    }
    fn settle(&self, id: RulesetId, key: &FlowKey, judgement: Judgement) {
        self.memory.settle(id, key, judgement);
    }
    fn offloaded_flow(
        &self,
        pod: &Pod,
        ruleset: RulesetId,
        key: &FlowKey,
        packet: &Packet,
    ) -> datapath::to_uplink::Known {
        datapath::from_pod::offloaded_flow(self, pod, ruleset, key, packet)
    }
    fn known_flow(
        &self,
        token: &Token,
        key: &FlowKey,
        packet: &Packet,
        translates: bool,
    ) -> datapath::to_uplink::Known {
        datapath::to_uplink::known_flow(self, token, key, packet, translates)
    }
    fn let_go(&self, id: RulesetId, key: &FlowKey, policy: PolicyId, len: u32, judgement: Judgement) {
        self.memory.let_go(id, key, policy, len, judgement);
    }
    fn count_rule(&self, id: RulesetId, rule: u32, hits: u64, bytes: u64) {
        self.memory.count_rule(id, rule, hits, bytes);
    }
    fn put_denial(&self, key: &DenialKey, id: RulesetId, rule: u32) {
        self.memory.put_denial(key, id, rule);
    }
    fn resolver(&self, ip: &Ip) -> u32 {
        self.memory.resolver(ip)
    }
    fn name(&self, key: &NameKey) -> Option<NameId> {
        self.memory.name(key)
    }
    fn learnt(&self, key: &LearntKey) -> Option<&Learnt> {
        self.memory.learnt(key)
    }
    fn credit(&self, key: &LearntKey, name: NameId, until: Ticks) {
        self.memory.credit(key, name, until);
    }
    fn asked(&self, key: &AskedKey) -> Option<Asked> {
        self.memory.asked(key)
    }
    fn put_asked(&self, key: &AskedKey, asked: &Asked) {
        self.memory.put_asked(key, asked);
    }
    fn flow<R>(&self, key: &FlowKey, look: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        self.memory.flow(key, look)
    }
    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> Result<(), InsertError> {
        self.memory.insert_flow(key, flow)
    }
    fn flows_of(&self, pod: PodId) -> u32 {
        self.memory.flows_of(pod)
    }
    fn remove_flow(&self, key: &FlowKey) {
        self.memory.remove_flow(key);
    }
    fn reply(&self, key: &ReplyKey) -> Option<Reply> {
        self.memory.reply(key)
    }
    fn insert_reply(&self, key: &ReplyKey, reply: &Reply) -> Result<(), InsertError> {
        self.memory.insert_reply(key, reply)
    }
    fn remove_reply(&self, key: &ReplyKey) {
        self.memory.remove_reply(key);
    }
    fn put_full(&self, destination: &ReplyKey, until: Ticks) {
        self.memory.put_full(destination, until);
    }
    fn opener(&self, key: &FlowKey) -> Option<Opener> {
        self.memory.opener(key)
    }
    fn put_opener(&self, key: &FlowKey, opener: &Opener) {
        self.memory.put_opener(key, opener);
    }
    fn fragment(&self, key: &FragmentKey) -> Option<&FragmentHead> {
        self.memory.fragment(key)
    }
    fn put_fragment(&self, key: &FragmentKey, head: &FragmentHead) {
        self.memory.put_fragment(key, head);
    }
    fn insert_token(&self, hash: u32, token: &Token) -> Result<(), InsertError> {
        self.memory.insert_token(hash, token)
    }
    fn take_token(&self, hash: u32) -> Option<&Token> {
        self.memory.take_token(hash)
    }
    fn now(&self) -> Ticks {
        self.memory.now()
    }
    fn repeat<F: FnMut(u32) -> bool>(&self, times: u32, step: F) {
        self.memory.repeat(times, step);
    }
}

/// What should become of a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Fate {
    Drop(DropReason),
    /// Counted as dropped, and answered; a run that shows no verdict cannot tell.
    Answer(DropReason),
    /// Not dropped.
    Goes {
        verdict: Verdict,
        output: Output,
        observed: Observed,
    },
}

/// Works out what should become of a packet, from the verdict of the decision in memory.
struct Oracle<'a> {
    memory: &'a Memory,
    input: &'a Input,
    /// The packet, where it is IP.
    packet: Option<Packet>,
    /// It asks for a neighbour; what is asked here is answered by nobody.
    solicitation: bool,
}

impl Oracle<'_> {
    fn fate(&self, program: Program, draw: Draw) -> Fate {
        let wanted = Cell::new(ReplyKey::default());
        let tables = &Replay { memory: self.memory, draw, wanted };
        let input = self.input;
        let outside = matches!(program, Program::FromUplink | Program::FromTunnel);
        let mut packet = self.packet.filter(|_| !(outside && self.solicitation));
        let place = match program {
            Program::FromPod => Some(Place::FromPod),
            Program::ToUplink => (input.ingress != 0).then_some(Place::ToUplink),
            Program::FromUplink | Program::FromTunnel => Some(Place::FromOutside),
            Program::ToPod => None,
        };
        if let (Some(place), Some(packet)) = (place, &mut packet) {
            recall(tables, place, packet);
        }
        if let (Program::FromPod, Some(packet)) = (program, packet) {
            self.note_question(tables, &packet);
        }
        match (program, packet) {
            (Program::FromTunnel, None) => Fate::Drop(DropReason::TunnelNotAllowed),
            (Program::FromUplink, None) => self.arp(),
            (_, None) => self.untouched(),
            (Program::FromPod, Some(packet)) => {
                self.after_pod(datapath::from_pod::from_pod(tables, input.ifindex, &packet, &Keep))
            }
            (Program::ToPod, Some(packet)) => {
                datapath::to_pod::to_pod(tables, &packet);
                self.untouched()
            }
            (Program::ToUplink, Some(packet)) => {
                // What came past the host's stack is answered past it.
                let direct =
                    self.memory.tokens.borrow().get(&input.hash).is_some_and(|token| token.direct != 0);
                let (uplink, hash) = (input.ifindex, input.hash);
                let verdict =
                    datapath::to_uplink::to_uplink(tables, uplink, input.ingress, hash, &packet, &Keep);
                match verdict {
                    // Nothing is in the place of the program that would make room.
                    ToUplink::Full => Fate::Drop(DropReason::FlowTableFull),
                    ToUplink::NotOurs => self.untouched(),
                    ToUplink::Pass => self.next(input.frame.clone(), 0),
                    ToUplink::Translate(snat) => {
                        self.translated(&input.frame, (snat.source, snat.source_port), snat.way, 0)
                    }
                    ToUplink::Reset => match Decoded::of(&input.frame) {
                        // No RST goes to a segment that is deep in extension headers, which nobody sends.
                        Some(decoded)
                            if decoded.l4 <= 256 && (direct || self.memory.interface(uplink).is_some()) =>
                        {
                            Fate::Answer(DropReason::NoFlow)
                        }
                        _ => Fate::Drop(DropReason::NoFlow),
                    },
                    ToUplink::Reject if !direct && self.memory.interface(uplink).is_none() => {
                        Fate::Drop(DropReason::FirewallDenied)
                    }
                    ToUplink::Reject => self.rejected(),
                    ToUplink::Drop(reason) => Fate::Drop(reason),
                }
            }
            (Program::FromUplink, Some(packet)) => {
                match datapath::from_uplink::from_uplink(tables, &packet, &Keep) {
                    FromOutside::Host(reverse) => {
                        self.reversed(&input.frame, &reverse, |frame| self.next(frame, input.hash))
                    }
                    verdict => self.after_outside(&verdict),
                }
            }
            (Program::FromTunnel, Some(packet)) => {
                let Some((sender, vni)) = input.tunnel else {
                    return Fate::Drop(DropReason::UnknownTunnelPeer);
                };
                match datapath::from_tunnel::from_tunnel(tables, &sender, vni, &packet, &Keep) {
                    FromOutside::NotOurs | FromOutside::Tunnel(_) => Fate::Drop(DropReason::TunnelNotAllowed),
                    FromOutside::Host(reverse) => {
                        self.reversed(&input.frame, &reverse, |frame| self.up_by_uplink(frame, &packet))
                    }
                    verdict => self.after_outside(&verdict),
                }
            }
        }
    }

    /// What `from_pod` does before it decides.
    fn note_question(&self, tables: &Replay<'_>, packet: &Packet) {
        let Some(decoded) = Decoded::of(&self.input.frame) else { return };
        let at = decoded.l4 + 8;
        // RFC 1035, 4.1.1: a header of twelve bytes, the id first.
        if names::may_ask(packet) && at + 12 <= decoded.end {
            let id = u16::from_be_bytes([self.input.frame[at], self.input.frame[at + 1]]);
            names::asks(tables, self.input.ifindex, &packet.tuple, id);
        }
    }

    /// A denied packet that is to be answered, if it may be: no error is, no RST, nothing without a header of its own.
    fn rejected(&self) -> Fate {
        let denied = DropReason::FirewallDenied;
        let (Some(packet), Some(decoded)) = (self.packet, Decoded::of(&self.input.frame)) else {
            return Fate::Drop(denied);
        };
        let header = if packet.tuple.source.is_v4() { 20 } else { 40 };
        let answered = match packet.kind {
            _ if packet.part == Part::Later => false,
            // None goes to a segment that is deep in extension headers, which nobody sends.
            Kind::Tcp => packet.tcp_flags & RST == 0 && decoded.l4 <= 256,
            Kind::Udp | Kind::Sctp | Kind::EchoRequest => true,
            // As much is quoted at least (RFC 792).
            Kind::Other => decoded.end - 14 >= header + 8,
            _ => false,
        };
        if answered { Fate::Answer(denied) } else { Fate::Drop(denied) }
    }

    fn after_pod(&self, verdict: FromPod) -> Fate {
        let frame = self.input.frame.clone();
        match verdict {
            FromPod::NotOurs => self.untouched(),
            FromPod::Pass => self.next(frame, self.memory.settings.pass_token),
            FromPod::Unmarked => self.next(frame, 0),
            FromPod::Identify(token, stack) => self.departs(token, stack),
            FromPod::Translate(snat) => {
                let mut frame = frame;
                hop(&mut frame);
                self.translated(&frame, (snat.source, snat.source_port), snat.way, self.input.hash)
            }
            FromPod::TooBig(_) => {
                let settings = &self.memory.settings;
                let v4 = self.packet.is_some_and(|packet| packet.tuple.source.is_v4());
                let router = if v4 { settings.router_v4 } else { settings.router_v6 };
                let known = router != Ip::UNSPECIFIED;
                if known { Fate::Answer(DropReason::TooBig) } else { Fate::Drop(DropReason::TooBig) }
            }
            FromPod::Reject => self.rejected(),
            FromPod::Drop(reason) => Fate::Drop(reason),
        }
    }

    /// The packet of a new flow, by the routes of [`enter_node_network`].
    fn departs(&self, token: u32, stack: HostStack) -> Fate {
        let mut frame = self.input.frame.clone();
        let (memory, packet) = (self.memory, self.packet.expect("a packet"));
        if !asks(memory, &packet) {
            return self.next(frame, token);
        }
        let destination = &packet.tuple.destination;
        let port = memory.interface(self.input.ifindex).unwrap_or_default();
        let route = match network_of(destination) {
            // There is no such bridge.
            _ if port.bridge != 0 => Route::Host,
            // With an IPv4-mapped address, which the stack refuses later: the families are taken for one.
            _ if packet.tuple.source.is_v4() != destination.is_v4() => Route::By(UPLINK),
            _ if is_on_interface(destination) => Route::None,
            SECOND_NETWORK | BEHIND_SECOND => Route::By(SECOND_UPLINK),
            _ => Route::By(UPLINK),
        };
        match depart(memory, &memory.settings, &packet, stack, route) {
            Departure::Up => self.next(frame, token),
            Departure::Direct(_) => {
                if let Some(token) = memory.tokens.borrow_mut().get_mut(&token) {
                    token.direct = 1;
                }
                hop(&mut frame);
                self.redirect(frame, token, None)
            }
            Departure::Drop(reason) => Fate::Drop(reason),
        }
    }

    fn after_outside(&self, verdict: &FromOutside<'_>) -> Fate {
        let frame = self.input.frame.clone();
        match verdict {
            FromOutside::NotOurs => self.untouched(),
            FromOutside::Forward(uplink) => self.out_of(frame, *uplink, self.input.hash),
            FromOutside::Tunnel(node) => self.tunnel(frame, *node),
            FromOutside::Deliver(reverse, _) => {
                let mut frame = frame;
                hop(&mut frame);
                self.reversed(&frame, reverse, |frame| self.redirect(frame, self.input.hash, None))
            }
            FromOutside::Drop(reason) => Fate::Drop(*reason),
            FromOutside::TooBig(_) => Fate::Answer(DropReason::TooBig),
            FromOutside::Host(_) => unreachable!("each program has its own way up"),
        }
    }

    /// The MSS of a packet that takes all of the MTU: less an IP header and a TCP header.
    fn mss(&self, address: &Ip) -> u16 {
        self.memory.settings.mtu.saturating_sub(if address.is_v4() { 20 + 20 } else { 40 + 20 })
    }

    fn translated(&self, frame: &[u8], (source, port): End, way: Way, hash: u32) -> Fate {
        let Some(frame) = translate(frame, Side::Source, (source, port), self.mss(&source)) else {
            return Fate::Drop(DropReason::Rewrite);
        };
        match way {
            Way::Here => self.next(frame, hash),
            Way::Uplink(uplink) => self.out_of(frame, uplink, hash),
            Way::Tunnel(node) => self.tunnel(frame, node),
        }
    }

    fn reversed(&self, frame: &[u8], to: &ReverseSnat, then: impl FnOnce(Vec<u8>) -> Fate) -> Fate {
        let end = (to.destination, to.destination_port);
        let mss = self.mss(&to.destination);
        translate(frame, Side::Destination, end, mss).map_or(Fate::Drop(DropReason::Rewrite), then)
    }

    fn tunnel(&self, frame: Vec<u8>, node: Ip) -> Fate {
        let Some(own) = self.memory.node(self.memory.settings.node) else {
            return Fate::Drop(DropReason::NotReady);
        };
        let vni = self.memory.settings.tunnel_vni;
        self.redirect(frame, 0, Some(Tunnel { source: own.tunnel_ip, destination: node, vni }))
    }

    /// The routes of [`enter_node_network`], by output interface.
    fn out_of(&self, frame: Vec<u8>, uplink: u32, hash: u32) -> Fate {
        let destination = Decoded::of(&frame).expect("it was IP before").destination();
        let by_itself = match network_of(&destination) {
            SECOND_NETWORK | BEHIND_SECOND => SECOND_UPLINK,
            _ => UPLINK,
        };
        let default = uplink == UPLINK && network_of(&destination) != OWN_NETWORK;
        // To IPv6 the interface asked for is a wish: the route is the best one, wherever it leads.
        let known = matches!(uplink, UPLINK | SECOND_UPLINK);
        let found = known && (by_itself == uplink || default || !destination.is_v4());
        // IPv4 asks for another interface's own address by the default route.
        let own = is_on_interface(&destination) && (by_itself == uplink || !destination.is_v4());
        match () {
            () if !found || own => Fate::Drop(DropReason::NoRoute),
            () if self.is_too_long() => Fate::Drop(DropReason::TooBig),
            () if by_itself != uplink && !destination.is_v4() => Fate::Drop(DropReason::NoRoute),
            () => self.redirect(frame, hash, None),
        }
    }

    /// The same routes, by the way back to who sent the packet.
    fn up_by_uplink(&self, mut frame: Vec<u8>, packet: &Packet) -> Fate {
        let source = &packet.tuple.source;
        let interface = match network_of(source) {
            _ if is_on_interface(source) => None,
            SECOND_NETWORK | BEHIND_SECOND => Some(SECOND_UPLINK),
            _ => Some(UPLINK),
        };
        let Some(interface) = interface else { return Fate::Drop(DropReason::NoRoute) };
        if self.is_too_long() {
            return Fate::Drop(DropReason::TooBig);
        }
        let Some(interface) = self.memory.interface(interface) else {
            return Fate::Drop(DropReason::NoRoute);
        };
        frame[..6].copy_from_slice(&interface.mac);
        self.redirect(frame, self.input.hash, None)
    }

    /// Longer than the uplinks carry: 1,500 bytes, an Ethernet header and a VLAN tag (`is_skb_forwardable`,
    /// net/core/dev.c), unless it is to be cut into segments.
    fn is_too_long(&self) -> bool {
        self.input.gso == 0 && self.input.frame.len() > 1500 + 14 + 4
    }

    fn arp(&self) -> Fate {
        let frame = &self.input.frame;
        let field = |at: usize| [frame[at], frame[at + 1], frame[at + 2], frame[at + 3]];
        if frame.len() < 42 || frame[12..14] != [8, 6] || frame[14..22] != [0, 1, 8, 0, 6, 4, 0, 1] {
            return self.untouched();
        }
        let (sender, target) = (field(28), field(38));
        let held = claims(self.memory, self.input.ifindex, &Ip::v4(target)) && sender != target;
        let Some(interface) = self.memory.interface(self.input.ifindex).filter(|_| held) else {
            return self.untouched();
        };
        let mut mac = [0; 6];
        mac.copy_from_slice(&frame[22..28]);
        let mut answer = arp(2, (interface.mac, target), (mac, sender));
        answer.extend(&frame[42..]);
        Fate::Goes {
            verdict: Verdict::Redirect,
            output: Output { frame: answer, mark: self.input.mark },
            observed: Observed { hash: self.input.hash, tunnel: None },
        }
    }

    fn untouched(&self) -> Fate {
        self.next(self.input.frame.clone(), self.input.hash)
    }

    fn next(&self, frame: Vec<u8>, hash: u32) -> Fate {
        let output = Output { frame, mark: self.input.mark };
        Fate::Goes { verdict: Verdict::Next, output, observed: Observed { hash, tunnel: None } }
    }

    #[expect(clippy::unused_self, reason = "reads like its siblings")]
    fn redirect(&self, frame: Vec<u8>, hash: u32, tunnel: Option<Tunnel>) -> Fate {
        let output = Output { frame, mark: 0 };
        Fate::Goes { verdict: Verdict::Redirect, output, observed: Observed { hash, tunnel } }
    }
}

/// Where the routes of [`enter_node_network`] tell addresses apart: the first uplink's network, the second's, and
/// the one behind the second.
const OWN_NETWORK: u8 = 1;
const SECOND_NETWORK: u8 = 2;
const BEHIND_SECOND: u8 = 3;

fn network_of(ip: &Ip) -> u8 {
    match (ip.is_v4(), ip.octets) {
        (true, [.., 172, 18, 0, _]) | (false, [0x20, 1, 0xd, 0xb8, 0, 0x18, 0, 0, ..]) => OWN_NETWORK,
        (true, [.., 192, 0, 2, _]) | (false, [0x20, 1, 0xd, 0xb8, 0, 0x19, 0, 0, ..]) => SECOND_NETWORK,
        (true, [.., 198, 51, 100, _]) | (false, [0x20, 1, 0xd, 0xb8, 0, 0x51, 0, 0, ..]) => BEHIND_SECOND,
        _ => 0,
    }
}

/// The node's own address there, or the network's broadcast or "any router" address.
fn is_on_interface(ip: &Ip) -> bool {
    let local = matches!(network_of(ip), OWN_NETWORK | SECOND_NETWORK);
    let last = &ip.octets[8..];
    local
        && if ip.is_v4() {
            matches!(last[7], 11 | 255)
        } else {
            matches!(last, [0, 0, 0, 0, 0, 0, 0, 0x11 | 0])
        }
}

/// Random tables: all that a decision asks for is there, or not, or odd.
fn tables(rng: &mut Rng, now: Ticks, capacity: usize) -> Memory {
    let mut t = Memory::new(1, capacity);
    t.now.set(now);
    t.settings = Settings {
        node: if rng.percent(3) { 0 } else { SELF },
        tunnel_port: TUNNEL_PORT,
        tunnel_vni: VNI,
        tunnel_ifindex: TUNNEL,
        mtu: rng.pick(&[0, 576, 1450]),
        offload: rng.pick(&[1, 1, 1, 2, 3]),
        uplink: rng.pick(&[0, UPLINK, UPLINK]),
        pass_token: rng.next() as u32 | 1,
        unassigned: u8::from(rng.percent(30)),
        spread: rng.pick(&[1, 2]),
        hold_unknown: u8::from(rng.percent(60)),
        tcp_established: 7440,
        tcp_transitory: 240,
        udp: 300,
        icmp: 60,
        rest: 65,
        router_v4: if rng.percent(70) { V4.nodes[0] } else { Ip::UNSPECIFIED },
        router_v6: if rng.percent(70) { V6.nodes[0] } else { Ip::UNSPECIFIED },
        reject: u8::from(rng.percent(60)),
        ..Settings::default()
    };
    for (ip, id, ifindex) in V4.pods.into_iter().chain(V6.pods) {
        let firewall = firewalls::place(rng);
        let policy = if firewall == 0 { rng.pick(&[0, 1, 1, 1, 1, 2]) } else { rng.pick(&[0, 0, 1, 1, 2]) };
        if rng.percent(93) {
            t.pods.insert(ip, Pod { id, policy, ifindex, firewall });
        }
        let ifindex = if rng.percent(10) { 0 } else { ifindex };
        if rng.percent(93) {
            t.delivery.insert(
                id,
                Delivery {
                    ip,
                    ifindex,
                    mode: rng.pick(&[1, 2]),
                    mtu: rng.pick(&[0, 60, 1400]),
                    ..Delivery::default()
                },
            );
        }
    }
    for (ifindex, kind, bridge) in [
        (POD, InterfaceKind::Pod, 0),
        (OTHER_POD, InterfaceKind::Pod, 0),
        (PORT, InterfaceKind::Pod, BRIDGE),
        (BRIDGE, InterfaceKind::Bridge, 0),
        (UPLINK, InterfaceKind::Uplink, 0),
        (SECOND_UPLINK, InterfaceKind::Uplink, 0),
        (TUNNEL, InterfaceKind::Other, 0),
    ] {
        let guarded = u8::from(rng.percent(60));
        if rng.percent(95) {
            let mac = [2, 0, 0, 0, rng.next() as u8, ifindex as u8];
            t.interfaces.insert(ifindex, Interface { kind: kind as u8, guarded, mac, bridge });
        }
    }
    for family in [&V4, &V6] {
        for (nth, (ip, prefix_len, kind)) in family.networks.into_iter().enumerate() {
            if rng.percent(if nth < 5 { 95 } else { 10 }) {
                t.networks.insert(NetworkKey { prefix_len, ip }, kind as u32);
            }
        }
    }
    let tunnels = if rng.percent(60) { &V4 } else { &V6 };
    for (id, tunnel_ip) in (1..).zip(tunnels.nodes) {
        if rng.percent(97) {
            t.nodes.insert(id, Node { tunnel_ip });
        }
    }
    for (id, ip) in (1..).zip(V4.egress.into_iter().chain(V6.egress)) {
        egress_tables(rng, &mut t, id, ip);
    }
    for id in 1..=2 {
        let mut policy = Policy { len: rng.below(8) as u32 + 1, ..Policy::default() };
        for slot in &mut policy.egress[..8] {
            *slot = rng.below(9) as u32;
        }
        if rng.percent(95) {
            t.policies.insert(id, policy);
        }
    }
    firewalls::fill(rng, &mut t);
    flow_tables(rng, &t);
    t
}

fn egress_tables(rng: &mut Rng, t: &mut Memory, id: EgressId, ip: Ip) {
    if rng.percent(95) {
        t.egress_addrs.insert(ip, id);
    }
    let uplink = rng.pick(&[UPLINK, UPLINK, UPLINK, UPLINK, SECOND_UPLINK, SECOND_UPLINK, 0, 77]);
    let uplink_mtu = rng.pick(&[0, 0, 1400, 1500]);
    let holder = rng.pick(&[1, 1, 1, 1, 2, 2, 2, 3, 0, 9]);
    let policy = rng.pick(&[1, 1, 1, 2]);
    if rng.percent(95) {
        t.egress_ips.insert(id, EgressIp { ip, policy, uplink, holder, uplink_mtu, pad: 0 });
    }
    let mut table = GranuleTable::default();
    for node in &mut table.node[..10] {
        *node = rng.pick(&[0, 1, 1, 1, 2, 3, 9]);
    }
    table.node[1007] = 1;
    let first = rng.below(9) as u16;
    let mut ranges = vec![GranuleRange { first, count: 1 }];
    if rng.percent(20) {
        ranges.push(GranuleRange { first: 1007, count: 1 });
    }
    for range in &ranges {
        table.node[usize::from(range.first)] = SELF;
    }
    if rng.percent(95) {
        t.granules.insert(id, table);
    }
    if rng.percent(90) {
        t.leases.insert(id, if rng.percent(5) { Lease::default() } else { Lease::of(&ranges) });
    }
}

/// Flows, most of them sound, and tokens under way. In some worlds few ports are left towards one destination.
fn flow_tables(rng: &mut Rng, t: &Memory) {
    let now = t.now.get();
    for i in 0..rng.below(24).min(t.flow_capacity) {
        let (key, flow) = random_flow(rng, t);
        add_flow(rng, t, key, flow, 95);
        if i % 4 == 0 {
            let by = rng.pick(&[1, 2, 2]);
            t.openers.borrow_mut().insert(key, Opener { seen: ago(rng, now), by, pad: [0; 3] });
        }
    }
    let crowded = rng.percent(25) && t.flow_capacity > 100;
    let crowd = if rng.percent(50) { &V4 } else { &V6 };
    if crowded {
        let left = rng.pick(&[0, 0, 1]);
        for (egress, lease) in t.leases.iter().filter(|(id, _)| crowd.egress.contains(&self::egress(**id))) {
            for nth in left..lease.granules * u32::from(GRANULE_PORTS) {
                let (key, flow) = random_flow(rng, t);
                let (remote, local_port) = (crowd.outside[0], 20000 + 200 * *egress as u16 + nth as u16);
                let pods = t.delivery.keys().filter(|id| crowd.pods.contains(&pod(**id)));
                let pod = pods.min().copied().unwrap_or(crowd.pods[0].1);
                let key = FlowKey { pod, remote, remote_port: 80, local_port, protocol: TCP, path: 0, ..key };
                let egress_port = nth_port(lease, nth).expect("it is in the lease");
                let seen = if rng.below(300) > 0 { now } else { flow.seen };
                add_flow(rng, t, key, Flow { egress: *egress, egress_port, seen, state: 2, ..flow }, 100);
            }
            let destination = ReplyKey {
                egress: *egress,
                remote: crowd.outside[1],
                remote_port: 80,
                protocol: TCP,
                ..ReplyKey::default()
            };
            let until = if rng.percent(50) { now.wrapping_add(seconds(9)) } else { ago(rng, now) };
            if rng.percent(20) {
                t.full.borrow_mut().insert(destination, until);
            }
        }
    }
    for _ in 0..16 {
        let known = {
            let flows = t.flows.borrow();
            let nth = rng.below(flows.len().max(1));
            flows.keys().nth(nth).filter(|_| rng.percent(40)).copied()
        };
        let crowded = crowded && rng.percent(70);
        let family = if crowded { crowd } else { either(rng) };
        let (source, pod, _) = rng.pick(&family.pods);
        let tuple = Tuple {
            source,
            destination: match rng.below(10) {
                _ if crowded => family.outside[0],
                0 => family.nodes[1],
                1 => family.inside[5],
                _ => rng.pick(&family.outside),
            },
            source_port: rng.pick(&PORTS),
            destination_port: if crowded { 80 } else { rng.pick(&PORTS) },
            protocol: if crowded { TCP } else { rng.pick(&[TCP, UDP, SCTP, family.icmp]) },
            pad: [0; 3],
        };
        // The next packet of a flow, or any.
        let (pod, tuple) = known.map_or((pod, tuple), |key| {
            let tuple = Tuple {
                source: self::pod(key.pod).0,
                destination: key.remote,
                source_port: key.local_port,
                destination_port: key.remote_port,
                protocol: key.protocol,
                pad: [0; 3],
            };
            (key.pod, tuple)
        });
        let sender = t.pods.get(&tuple.source);
        let policy = sender.map_or(1, |pod| pod.policy);
        let policy = if rng.percent(92) { policy } else { rng.pick(&[0, 1, 2, 3]) };
        let firewall = sender.map_or(0, |pod| pod.firewall);
        let firewall = if rng.percent(95) { firewall } else { firewalls::place(rng) };
        t.tokens.borrow_mut().insert(
            rng.next() as u32 | 1,
            Token { pod, policy, firewall, tuple, direct: u32::from(rng.percent(20)) },
        );
    }
    for _ in 0..12 {
        fragment_head(rng, t);
    }
}

fn either(rng: &mut Rng) -> &'static Family {
    if rng.percent(50) { &V4 } else { &V6 }
}

/// A datagram whose first fragment was seen, of a flow or of a token.
fn fragment_head(rng: &mut Rng, t: &Memory) {
    let (key, flow) = {
        let flows = t.flows.borrow();
        let nth = rng.below(flows.len().max(1));
        let Some((key, flow)) = flows.iter().nth(nth) else { return };
        (*key, *flow)
    };
    let place = rng.pick(&[Place::FromPod, Place::ToUplink, Place::FromOutside]);
    let family = family(&key.remote);
    let mut token = Token::default();
    let (source, destination, source_port, destination_port, mut protocol) = match place {
        Place::FromPod => (pod(key.pod).0, key.remote, key.local_port, key.remote_port, key.protocol),
        Place::FromOutside if flow.egress == 0 => return,
        Place::FromOutside => {
            (key.remote, egress(flow.egress), key.remote_port, flow.egress_port, key.protocol)
        }
        Place::ToUplink => {
            let tokens = t.tokens.borrow();
            let nth = rng.below(tokens.len());
            token = *tokens.values().nth(nth).expect("there are some");
            let tuple = token.tuple;
            let source = if rng.percent(50) { tuple.source } else { self::family(&tuple.source).nodes[0] };
            (source, tuple.destination, 61000, tuple.destination_port, tuple.protocol)
        }
    };
    if rng.percent(5) {
        protocol = 47;
    }
    let id = rng.below(4) as u32 | if source.is_v4() { u32::from(protocol) << 16 } else { 0x00ab_0000 };
    let key = FragmentKey { source, destination, id, place: place as u8, pad: [0; 3] };
    let head = FragmentHead {
        seen: t.now.get().wrapping_sub(seconds(rng.pick(&[0, 0, 0, 0, 5, 300]))),
        source_port,
        destination_port,
        protocol,
        echo: if protocol == family.icmp { rng.pick(&[1, 2]) } else { 0 },
        fate: rng.pick(&[0, 0, 0, 1, 2]),
        pad: 0,
        token,
    };
    t.fragments.borrow_mut().insert(key, head);
}

fn ago(rng: &mut Rng, now: Ticks) -> Ticks {
    now.wrapping_sub(seconds(rng.pick(&AGES)))
}

fn own_port(rng: &mut Rng, t: &Memory, egress: EgressId) -> u16 {
    let ports = t.lease(egress).map_or(0, |lease| lease.granules) * u32::from(GRANULE_PORTS);
    let nth = rng.next() as u32 % ports.max(1);
    t.lease(egress).and_then(|lease| nth_port(lease, nth)).unwrap_or(FIRST_PORT)
}

/// A flow of a pod with an address of its policy; sometimes of another.
fn random_flow(rng: &mut Rng, t: &Memory) -> (FlowKey, Flow) {
    let now = t.now.get();
    let family = either(rng);
    let (ip, pod, _) = rng.pick(&family.pods);
    let sender = t.pods.get(&ip).copied().unwrap_or_default();
    let policy = sender.policy.max(1);
    let policy = if rng.percent(92) { policy } else { rng.pick(&[1, 2]) };
    let fitting: Vec<_> = t
        .egress_ips
        .iter()
        .filter(|(_, e)| e.policy == policy && family.egress.contains(&e.ip))
        .map(|(id, _)| *id)
        .collect();
    let egress = if fitting.is_empty() || rng.percent(8) {
        family.first_egress + rng.below(4) as u32
    } else {
        rng.pick(&fitting)
    };
    let protocol = rng.pick(&[TCP, TCP, TCP, UDP, UDP, SCTP, family.icmp]);
    let untranslated = sender.firewall != 0 && rng.percent(if sender.policy == 0 { 90 } else { 15 });
    let key = FlowKey {
        pod,
        remote: if untranslated {
            firewalls::untranslated_remote(rng, family, sender.policy == 0)
        } else {
            rng.pick(&family.outside)
        },
        local_port: rng.pick(&PORTS),
        remote_port: if protocol == family.icmp { 0 } else { rng.pick(&PORTS) },
        protocol,
        path: u8::from(rng.percent(15)),
        pad: 0,
    };
    let mut flow = Flow {
        egress,
        policy,
        egress_port: own_port(rng, t, egress),
        state: rng.pick(&[1, 2, 2, 2, 3, 4, 5]),
        seen: if rng.percent(50) { now } else { ago(rng, now) },
        walked: if rng.percent(50) { now } else { ago(rng, now) },
        packets: 3,
        bytes: 300,
        ..Flow::default()
    };
    if untranslated {
        (flow.egress, flow.egress_port, flow.policy) = (0, 0, sender.policy);
    }
    firewalls::judge(rng, t, &ip, &key, &mut flow);
    (key, flow)
}

/// Adds a flow's two entries, each as likely as `complete` percent.
fn add_flow(rng: &mut Rng, t: &Memory, key: FlowKey, flow: Flow, complete: usize) {
    let reply_key = ReplyKey {
        egress: flow.egress,
        remote: key.remote,
        egress_port: flow.egress_port,
        remote_port: key.remote_port,
        protocol: key.protocol,
        pad: [0; 3],
    };
    let (pod, ..) = pod(key.pod);
    let local = if key.path == 1 { family(&pod).nodes[0] } else { pod };
    let reply = Reply { pod: key.pod, local_port: key.local_port, path: key.path, pad: 0, local };
    if rng.percent(complete) {
        let _ = t.insert_flow(&key, &flow); // there may be one, or no room
    }
    if flow.egress == 0 {
        return;
    }
    if rng.percent(complete) {
        let _ = t.insert_reply(&reply_key, &reply);
    }
    // What an older flow of the same key left behind, under another port.
    if rng.percent(20) && complete < 100 {
        let _ = t.insert_reply(&ReplyKey { egress_port: flow.egress_port ^ 1, ..reply_key }, &reply);
    }
}

/// A random program and a packet for it, one that it may know as often as not.
fn case(rng: &mut Rng, t: &Memory) -> (Program, Input) {
    let program = rng.pick(&[
        Program::FromPod,
        Program::FromPod,
        Program::ToUplink,
        Program::ToUplink,
        Program::FromUplink,
        Program::FromTunnel,
        Program::ToPod,
    ]);
    let flow = {
        let flows = t.flows.borrow();
        let nth = rng.below(flows.len().max(1));
        let known = flows.iter().nth(nth).filter(|_| rng.percent(75));
        // A fragment under a token that is not its own may have made one of both families.
        known.filter(|(key, _)| pod(key.pod).0.is_v4() == key.remote.is_v4()).map(|(key, flow)| (*key, *flow))
    };
    let mut input = Input { mark: rng.pick(&[0, 7]), ..Input::default() };
    if rng.percent(20) {
        input.hash = rng.next() as u32;
    }
    if rng.percent(4) {
        input.gso = rng.pick(&[20, 400, 500, 1378, 1400, 1500]);
    }
    let family = either(rng);
    let mut frame = match program {
        Program::FromPod => {
            input.ifindex = rng.pick(&[POD, POD, POD, OTHER_POD, PORT]);
            outward(rng, family, flow, &mut input)
        }
        Program::ToPod => {
            input.ifindex = rng.pick(&[POD, OTHER_POD, PORT]);
            let f = family;
            // What resolvers say is `names_run.rs`'s to compare.
            let mut senders = vec![f.outside[0], f.outside[1], f.inside[0], f.nodes[1], f.inside[5]];
            senders.retain(|ip| t.resolver(ip) == 0);
            let from = end(rng, &senders);
            let to = end(rng, &f.pods.map(|(ip, ..)| ip));
            any_packet(rng, from, to)
        }
        Program::ToUplink => at_uplink(rng, family, t, &mut input),
        Program::FromUplink => {
            input.ifindex = rng.pick(&[UPLINK, UPLINK, SECOND_UPLINK]);
            if rng.percent(12) { question(rng, family) } else { inward(rng, family, t, flow) }
        }
        Program::FromTunnel => {
            input.ifindex = TUNNEL;
            let tunnels = t.nodes.values().next().map_or(&V4, |node| self::family(&node.tunnel_ip));
            let sender = match rng.below(16) {
                0 => tunnels.nodes[0],
                1 => rng.pick(&[V4.outside[0], V6.outside[0]]),
                2 | 3 => tunnels.nodes[2],
                _ => tunnels.nodes[1],
            };
            let vni = if rng.percent(97) { VNI } else { 1 };
            input.tunnel = rng.percent(98).then_some((sender, vni));
            if rng.percent(40) { steered_out(rng, family, t) } else { inward(rng, family, t, flow) }
        }
    };
    if rng.percent(12)
        && let Some(later) = later_fragment(rng, t, program)
    {
        frame = later;
    }
    // A packet with an IPv4-mapped address, which nobody may send.
    if frame[12..14] == [0x86, 0xdd] && rng.percent(2) {
        let at = rng.pick(&[22, 38]);
        frame[at..at + 16].copy_from_slice(&Ip::v4([10, 244, 1, 10]).octets);
    }
    input.frame = frame;
    if rng.percent(8) {
        damage(rng, &mut input.frame);
    }
    (program, input)
}

/// A later fragment of a datagram that is known where the program stands.
fn later_fragment(rng: &mut Rng, t: &Memory, program: Program) -> Option<Vec<u8>> {
    let place = match program {
        Program::FromPod => Place::FromPod,
        Program::ToUplink => Place::ToUplink,
        Program::FromUplink | Program::FromTunnel => Place::FromOutside,
        Program::ToPod => return None,
    };
    let heads = t.fragments.borrow();
    let fitting: Vec<_> = heads.iter().filter(|(key, _)| key.place == place as u8).collect();
    let (key, head) = *fitting.get(rng.below(fitting.len().max(1)))?;
    let mut data = b"the first ".to_vec();
    data.extend(rng.bytes(30));
    let mut built = raw(key.source, key.destination, head.protocol, &data);
    built.id = if rng.percent(90) { key.id } else { key.id ^ 1 };
    built.ttl = rng.pick(&[64, 64, 64, 2, 1]);
    built.fragments(&[8]).pop()
}

/// One of these addresses, with a port.
fn end(rng: &mut Rng, addresses: &[Ip]) -> End {
    (rng.pick(addresses), rng.pick(&PORTS))
}

/// Somebody outside, or inside.
fn anybody(rng: &mut Rng, family: &Family) -> End {
    if rng.percent(70) { end(rng, &family.outside) } else { end(rng, &family.inside) }
}

/// A packet of a pod, as it sends it: of a flow, or anything.
fn outward(rng: &mut Rng, family: &Family, flow: Option<(FlowKey, Flow)>, input: &mut Input) -> Vec<u8> {
    let ifindex = input.ifindex;
    if let Some((key, _)) = flow {
        let (pod, _, own) = pod(key.pod);
        if rng.percent(92) {
            input.ifindex = if own == BRIDGE { PORT } else { own };
        }
        let (from, to) = ((pod, key.local_port), (key.remote, key.remote_port));
        return of_flow(rng, key.protocol, from, to, true);
    }
    let own: Vec<_> = family
        .pods
        .iter()
        .filter(|(_, _, of)| *of == ifindex || (ifindex == PORT && *of == BRIDGE))
        .map(|(ip, ..)| *ip)
        .collect();
    let source = match rng.below(10) {
        0 => rng.pick(&family.egress),
        1 => rng.pick(&[family.strangers[0], family.strangers[1], family.pods[0].0, family.pods[1].0]),
        _ => rng.pick(&own),
    };
    let from = end(rng, &[source]);
    match rng.below(8) {
        // A question.
        0 => {
            let to = (firewalls::resolver(rng, family), rng.pick(&[53, 53, 5353]));
            of_flow(rng, UDP, from, to, true)
        }
        // What the firewall judges here.
        1 => {
            let to = end(rng, &[family.nodes[0]]);
            any_packet(rng, from, to)
        }
        _ => {
            let to = anybody(rng, family);
            any_packet(rng, from, to)
        }
    }
}

/// A packet at an uplink: what a token says, rewritten by the host or not; or anything.
fn at_uplink(rng: &mut Rng, family: &Family, t: &Memory, input: &mut Input) -> Vec<u8> {
    input.ifindex = rng.pick(&[UPLINK, UPLINK, SECOND_UPLINK]);
    input.ingress = rng.pick(&[POD, POD, POD, OTHER_POD, PORT, BRIDGE, UPLINK, UNKNOWN, 0]);
    let token = {
        let tokens = t.tokens.borrow();
        let nth = rng.below(tokens.len().max(1));
        tokens.iter().nth(nth).filter(|_| rng.percent(70)).map(|(number, token)| (*number, *token))
    };
    let Some((number, token)) = token else {
        if rng.percent(30) {
            input.hash = t.settings.pass_token;
        }
        let sources = [family.nodes[0], family.pods[0].0, family.pods[1].0, family.egress[0]];
        let (from, to) = (end(rng, &sources), anybody(rng, family));
        return any_packet(rng, from, to);
    };
    input.hash = number;
    let tuple = &token.tuple;
    let family = self::family(&tuple.source);
    let mut from = (tuple.source, tuple.source_port);
    let mut to = (tuple.destination, tuple.destination_port);
    if rng.percent(50) {
        from = (family.nodes[0], rng.pick(&[61000, 61001]));
    }
    if rng.percent(25) {
        to = anybody(rng, family);
    }
    of_flow(rng, tuple.protocol, from, to, true)
}

/// A packet from outside, or from the tunnel to a source node: an answer to a flow, or anything.
fn inward(rng: &mut Rng, family: &Family, t: &Memory, flow: Option<(FlowKey, Flow)>) -> Vec<u8> {
    if let Some((key, flow)) = flow.filter(|(_, flow)| flow.egress != 0) {
        let port = if rng.percent(15) { flow.egress_port ^ 1 } else { flow.egress_port };
        let (from, to) = ((key.remote, key.remote_port), (egress(flow.egress), port));
        return of_flow(rng, key.protocol, from, to, false);
    }
    let egress = rng.below(4);
    let to = if rng.percent(85) { family.egress[egress] } else { family.nodes[0] };
    let port = match rng.below(4) {
        0 => own_port(rng, t, family.first_egress + egress as u32),
        1 => rng.pick(&[80, 1023, 1024, 65535]),
        _ => FIRST_PORT + rng.below(12 * 64) as u16,
    };
    let from = end(rng, &family.outside);
    any_packet(rng, from, (to, port))
}

/// What another node sends to this one as a gateway.
fn steered_out(rng: &mut Rng, family: &Family, t: &Memory) -> Vec<u8> {
    let egress = rng.below(4);
    let theirs = |node: &NodeId| *node == 2;
    let table = t.granules.get(&(family.first_egress + egress as u32));
    let granule = table.and_then(|table| table.node.iter().position(theirs));
    let port = match granule {
        Some(granule) if rng.percent(85) => FIRST_PORT + granule as u16 * 64 + rng.below(64) as u16,
        _ => FIRST_PORT + rng.below(12 * 64) as u16,
    };
    let protocol = rng.pick(&[TCP, UDP, SCTP, family.icmp]);
    let (from, to) = ((family.egress[egress], port), end(rng, &family.outside));
    if rng.percent(90) { of_flow(rng, protocol, from, to, true) } else { any_packet(rng, from, to) }
}

/// An ARP question, or what looks like one; over IPv6 something that looks like a solicitation.
fn question(rng: &mut Rng, family: &Family) -> Vec<u8> {
    let target = if rng.percent(80) { rng.pick(&family.egress) } else { rng.pick(&family.nodes) };
    if !target.is_v4() {
        return icmp(family.nodes[1], target, 135, 0).payload(&target.octets[..12]).frame();
    }
    let (target, router) = (target.v4_octets(), [172, 18, 0, 1]);
    let sender = if rng.percent(10) { target } else { router };
    let operation = if rng.percent(90) { 1 } else { 2 };
    let mut frame = arp(operation, ([2, 9, 9, 9, 9, rng.next() as u8], sender), ([0; 6], target));
    if rng.percent(30) {
        frame.resize(60, 0);
    }
    frame
}

/// A packet of a protocol between two ends; `asks`: from the side that opens connections.
fn of_flow(rng: &mut Rng, protocol: u8, from: End, to: End, asks: bool) -> Vec<u8> {
    if rng.percent(13) {
        return error_about(rng, protocol, from, to, asks);
    }
    let built = match protocol {
        TCP | SCTP if rng.percent(3) => {
            let whole = tcp(from, to, rng.pick(&[SYN, ACK])).frame();
            raw(from.0, to.0, protocol, &whole[whole.len() - 20..][..rng.below(21)])
        }
        TCP => {
            let flags = if rng.percent(if asks { 25 } else { 0 }) {
                SYN
            } else {
                rng.pick(&[SYN, SYN | ACK, SYN | ACK, ACK, ACK, ACK, FIN | ACK, FIN | ACK, RST, 0, 0xff])
            };
            let options = tcp_options(rng);
            tcp(from, to, flags).tcp_options(&options)
        }
        UDP => {
            let built = udp(from, to);
            if rng.percent(20) { built.no_checksum() } else { built }
        }
        SCTP => {
            let chunk = if asks && rng.percent(25) {
                INIT
            } else {
                rng.pick(&[DATA, DATA, DATA, INIT, INIT_ACK, ABORT, SHUTDOWN_COMPLETE, 3, 200])
            };
            sctp(from, to, chunk)
        }
        _ => echo(from.0, to.0, asks, if asks { from.1 } else { to.1 }),
    };
    if matches!(built.transport, Transport::Raw { .. }) {
        return dressed(rng, built);
    }
    let mut built = built.payload(&rng.bytes(30));
    if rng.percent(9) {
        // About as large as one MTU or another.
        let wanted = rng.pick(&[576, 577, 1400, 1401, 1450, 1451, 1500, 1504, 1505, 1600]);
        let headers = built.clone().payload(&[]).frame().len() - 14;
        built = built.payload(&vec![0x5a; wanted - headers]);
    }
    if rng.percent(50) && built.source.is_v4() {
        built = built.fragment(0x4000);
    }
    dressed(rng, built)
}

/// An ICMP error from one end to the other, about a packet of the other.
fn error_about(rng: &mut Rng, protocol: u8, from: End, to: End, asks: bool) -> Vec<u8> {
    let family = family(&to.0);
    let mut about = match protocol {
        TCP => tcp(to, from, ACK).payload(b"quoted"),
        UDP if rng.percent(20) => udp(to, from).no_checksum(),
        UDP => udp(to, from).payload(&rng.bytes(9)),
        SCTP => sctp(to, from, DATA),
        _ => echo(to.0, from.0, !asks, if asks { from.1 } else { to.1 }),
    };
    let v4 = to.0.is_v4();
    if v4 && rng.percent(10) {
        about = about.ip_options(&[1, 1, 1, 0]);
    }
    if v4 && rng.percent(10) {
        about = about.fragment(rng.pick(&[0x2000, 0x2010, 0x0010]));
    }
    if !v4 && rng.percent(10) {
        about = about.extension(DESTINATION_OPTIONS, &[0, 1, 4, 0, 0, 0, 0]);
    }
    let frame = about.frame();
    let quoted = if v4 { rng.pick(&[8, 20, 27, 28, 32, 60]) } else { rng.pick(&[8, 40, 47, 48, 52, 90]) };
    let quoted = quoted.min(frame.len() - 14);
    let sender = if asks || rng.percent(50) { from.0 } else { rng.pick(&family.outside) };
    let kind = if v4 { rng.pick(&[3, 11, 12, 5]) } else { rng.pick(&[1, 2, 3, 4, 100]) };
    let built = icmp(sender, to.0, kind, 0).payload(&frame[14..14 + quoted]);
    dressed(rng, built)
}

/// Any packet between two ends.
fn any_packet(rng: &mut Rng, from: End, to: End) -> Vec<u8> {
    let v4 = from.0.is_v4();
    let own = family(&from.0).icmp;
    let built = match rng.below(12) {
        0 if v4 => icmp(from.0, to.0, rng.pick(&[0, 3, 5, 8, 11, 13]), from.1),
        0 => icmp(from.0, to.0, rng.pick(&[128, 129, 1, 2, 3, 4, 133, 135, 160]), from.1),
        1 => raw(from.0, to.0, rng.pick(&[47, 50, ICMP, ICMPV6]), &rng.bytes(20)),
        2 => raw(from.0, to.0, rng.pick(&[TCP, UDP, SCTP, own]), &rng.bytes(24)),
        3 if v4 => udp(from, to).fragment(rng.pick(&[0x2000, 0x00b9, 0x4000])),
        n => return of_flow(rng, [TCP, UDP, own, SCTP][n % 4], from, to, n < 8),
    };
    dressed(rng, built)
}

fn tcp_options(rng: &mut Rng) -> Vec<u8> {
    let mut options = vec![];
    for _ in 0..rng.below(4) {
        match rng.below(6) {
            0 => options.push(1),
            1 => options.extend([3, 3, 7]),
            2 => options.extend([8, 10, 0, 0, 0, 1, 0, 0, 0, 0]),
            3 => options.extend(rng.bytes(4)),
            _ => options.extend([2, 4, rng.next() as u8, rng.next() as u8]),
        }
    }
    options.truncate(40);
    options
}

/// With a random time to live, options, extension headers, padding; sometimes one of its fragments.
fn dressed(rng: &mut Rng, mut built: Built) -> Vec<u8> {
    built.ttl = rng.pick(&[64, 64, 64, 64, 64, 64, 64, 64, 64, 255, 2, 1, 0]);
    if rng.percent(5) {
        built.padding = rng.below(20);
    }
    if !built.source.is_v4() && rng.percent(15) {
        for _ in 0..rng.pick(&[1, 1, 2, 3, 4, 5]) {
            let (kind, mut bytes) = match rng.below(4) {
                0 => (HOP_BY_HOP, vec![0, 1, 4, 0, 0, 0, 0]),
                1 => (ROUTING, vec![0, 4, 0, 0, 0, 0, 0]),
                2 => (ROUTING, vec![0, 4, rng.pick(&[0, 0, 1]), 0, 0, 0, 0]),
                _ => (DESTINATION_OPTIONS, vec![0, 1, 4, 0, 0, 0, 0]),
            };
            if rng.percent(20) {
                bytes[0] = 1;
                bytes.extend([1, 6, 0, 0, 0, 0, 0, 0]);
            }
            built = built.extension(kind, &bytes);
        }
    }
    if built.source.is_v4() && rng.percent(5) {
        built = built.ip_options(&[1, 1, 1, 0, 1, 1, 1, 0]);
    }
    if rng.percent(15) && matches!(built.fragment, 0 | 0x4000) {
        built.id = rng.below(4) as u32 | if built.source.is_v4() { 0 } else { 0x00ab_0000 };
        let len = built.frame().len() - built.padding;
        let bare = built.clone().payload(&[]).frame().len() - built.padding;
        let transport = match built.transport {
            Transport::Raw { .. } => len - bare,
            _ => len - bare + 8,
        };
        // An IPv6 datagram may consist of one fragment (RFC 6946).
        let cuts: Vec<usize> = [rng.pick(&[8, 16, 24])].into_iter().filter(|cut| *cut < transport).collect();
        let frames = built.fragments(&cuts);
        return frames[rng.below(frames.len())].clone();
    }
    built.frame()
}

/// Breaks a frame somewhere behind its Ethernet header. The kernel takes no frame with less than an IP header.
fn damage(rng: &mut Rng, frame: &mut Vec<u8>) {
    let least = if frame[12..14] == [0x86, 0xdd] { 54 } else { 34 };
    if rng.percent(40) {
        frame.truncate(least + rng.below(frame.len() + 1 - least));
    } else {
        let at = 14 + rng.below((frame.len() - 14).min(60));
        frame[at] ^= 1 << rng.below(8);
    }
}

/// What the kernel drew, told by what changed in its maps.
fn drawn(before: &State, after: &State, dropped: Option<DropReason>) -> Draw {
    if let Some(number) = after.tokens.keys().find(|number| !before.tokens.contains_key(number)) {
        return Draw::Token(*number);
    }
    let made = after.flows.iter().find(|(key, flow)| {
        before
            .flows
            .get(key)
            .is_none_or(|old| (old.egress, old.egress_port) != (flow.egress, flow.egress_port))
    });
    let remade = after
        .flows
        .iter()
        .find(|(key, flow)| before.flows.get(key).is_some_and(|old| flow.packets < old.packets));
    if let Some((_, flow)) = made.or(remade) {
        return Draw::Port(flow.egress, flow.egress_port);
    }
    if let Some(key) = before.replies.keys().find(|key| !after.replies.contains_key(key)) {
        return Draw::Port(key.egress, key.egress_port);
    }
    if dropped == Some(DropReason::FlowTableFull) { Draw::FreePort } else { Draw::Any }
}

/// The clock may tick while a case runs: then both readings count as one.
fn at_one_time(mut state: State, [before, after]: [Ticks; 2]) -> State {
    let settle = |ticks: &mut Ticks| {
        if *ticks == after {
            *ticks = before;
        }
    };
    for flow in state.flows.values_mut() {
        settle(&mut flow.seen);
        settle(&mut flow.walked);
    }
    state.fragments.values_mut().for_each(|head| settle(&mut head.seen));
    state.openers.values_mut().for_each(|opener| settle(&mut opener.seen));
    state.asked.values_mut().for_each(|asked| settle(&mut asked.seen));
    for denial in state.denials.values_mut() {
        settle(&mut denial.first);
        settle(&mut denial.last);
    }
    for until in state.full.values_mut() {
        if *until == after.wrapping_add(seconds(1)) {
            *until = before.wrapping_add(seconds(1));
        }
    }
    state
}

/// The one reason that was counted, if any.
fn dropped(before: &[DropCount], after: &[DropCount], bytes: usize) -> Result<Option<DropReason>, String> {
    let mut found = None;
    for (reason, (old, new)) in DropReason::ALL.iter().zip(before.iter().zip(after)) {
        if old == new {
            continue;
        }
        let once = new.packets == old.packets + 1 && new.bytes == old.bytes + bytes as u64;
        if found.is_some() || !once {
            return Err(format!("{}: counted {old:?}, then {new:?}", reason.name()));
        }
        found = Some(*reason);
    }
    Ok(found)
}

/// How often each outcome was met.
type Met = BTreeMap<String, u32>;

/// Runs one case in the kernel and in memory. Gives what differs; the tables are then as they were.
fn compare(
    kernel: &mut Kernel,
    t: &mut Memory,
    program: Program,
    input: &Input,
    observe: bool,
    met: &mut Met,
) -> Result<(), String> {
    let before = State::of(t);
    let counts = kernel.drops();
    let start = kernel::now();
    let (verdict, observed, output) = if observe {
        let (observed, output) = kernel.observe(program, input);
        (None, Some(observed), output)
    } else {
        let (verdict, output) = kernel.run(program, input);
        (Some(verdict), None, output)
    };
    let times = [start, kernel::now()];
    let after = kernel.state();
    let reason = dropped(&counts, &kernel.drops(), input.frame.len())?;
    let draw = drawn(&before, &after, reason);
    let routers = matches!(program, Program::FromUplink | Program::FromTunnel);
    let decoded = Decoded::of(&input.frame);
    let packet = decoded.map(|decoded| {
        let packet = decoded.packet(routers);
        let wire_len = if input.gso == 0 { packet.len } else { decoded.wire_len(input.gso) };
        Packet { wire_len, ..packet }
    });
    let solicitation = decoded.is_some_and(|decoded| decoded.is_solicitation());
    let mut problem = None;
    for now in times {
        let memory = t.clone();
        memory.now.set(now);
        let expected = Oracle { memory: &memory, input, packet, solicitation }.fate(program, draw);
        let found = match reason {
            Some(reason) => match (verdict, &expected) {
                (Some(Verdict::Redirect), _) | (None, Fate::Answer(_)) => Fate::Answer(reason),
                (Some(Verdict::Drop) | None, _) => Fate::Drop(reason),
                (Some(Verdict::Next), _) => return Err(format!("goes on, counted as {reason:?}")),
            },
            None if verdict == Some(Verdict::Drop) => return Err("dropped, and not counted".to_owned()),
            None => match &expected {
                // What this run does not show is taken as expected.
                Fate::Goes { verdict: v, observed: o, .. } => Fate::Goes {
                    verdict: verdict.unwrap_or(*v),
                    output: output.clone(),
                    observed: observed.unwrap_or(*o),
                },
                Fate::Drop(_) | Fate::Answer(_) => Fate::Goes {
                    verdict: verdict.unwrap_or(Verdict::Drop),
                    output: output.clone(),
                    observed: observed.unwrap_or(Observed { hash: 0, tunnel: None }),
                },
            },
        };
        let states = (at_one_time(State::of(&memory), times), at_one_time(after.clone(), times));
        if expected == found && states.0 == states.1 {
            *met.entry(label(program, packet.as_ref(), &expected)).or_default() += 1;
            for event in firewalls::events(&before, &states.0) {
                *met.entry(format!("{program:?}: {event}")).or_default() += 1;
            }
            problem = None;
            break;
        }
        let difference = format!(
            "memory: {expected:x?}\nkernel: {found:x?}\ndrawn: {draw:?}\nmaps agree: {}\nmemory: {:#?}\nkernel: {:#?}",
            states.0 == states.1,
            changes(&before, &states.0),
            changes(&before, &states.1),
        );
        problem = Some(difference);
    }
    // The tables are shown as they were before.
    if let Some(problem) = problem {
        return Err(problem);
    }
    t.flows.replace(after.flows);
    t.replies.replace(after.replies);
    t.full.replace(after.full);
    t.openers.replace(after.openers);
    t.fragments.replace(after.fragments);
    t.tokens.replace(after.tokens);
    t.asked.replace(after.asked);
    t.rule_counts.replace(after.rule_counts);
    t.denials.replace(after.denials);
    Ok(())
}

/// Entries that are not in both.
fn changes(before: &State, after: &State) -> Vec<String> {
    fn of<K: Ord + std::fmt::Debug, V: PartialEq + std::fmt::Debug>(
        name: &str,
        before: &BTreeMap<K, V>,
        after: &BTreeMap<K, V>,
    ) -> Vec<String> {
        let gone =
            before.iter().filter(|(k, _)| !after.contains_key(k)).map(|(k, _)| format!("{name} - {k:?}"));
        let set = after
            .iter()
            .filter(|(k, v)| before.get(k) != Some(v))
            .map(|(k, v)| format!("{name} + {k:?}: {v:?}, was {:?}", before.get(k)));
        gone.chain(set).collect()
    }
    [
        of("FLOWS", &before.flows, &after.flows),
        of("REPLIES", &before.replies, &after.replies),
        of("FULL", &before.full, &after.full),
        of("OPENERS", &before.openers, &after.openers),
        of("FRAGMENTS", &before.fragments, &after.fragments),
        of("TOKENS", &before.tokens, &after.tokens),
        of("ASKED", &before.asked, &after.asked),
        of("RULE_COUNTS", &before.rule_counts, &after.rule_counts),
        of("DENIALS", &before.denials, &after.denials),
    ]
    .concat()
}

fn label(program: Program, packet: Option<&Packet>, fate: &Fate) -> String {
    let what = packet.map_or_else(
        || "no IP".to_owned(),
        |packet| {
            let family = if packet.tuple.source.is_v4() { "IPv4" } else { "IPv6" };
            match (fate, packet.part) {
                (Fate::Goes { verdict: Verdict::Redirect, .. }, Part::Whole) => {
                    format!("{family} {:?}", packet.kind)
                }
                (Fate::Goes { verdict: Verdict::Redirect, .. }, part) => {
                    format!("{family} {part:?} fragment")
                }
                _ => family.to_owned(),
            }
        },
    );
    match fate {
        Fate::Drop(reason) => format!("{program:?}: {what}: {}", reason.name()),
        Fate::Answer(reason) => format!("{program:?}: {what}: answered, {}", reason.name()),
        Fate::Goes { verdict, observed, .. } => {
            let tunnel = match observed.tunnel {
                Some(tunnel) if tunnel.source.is_v4() => " to the tunnel",
                Some(_) => " to the tunnel over IPv6",
                None => "",
            };
            format!("{program:?}: {what}: {verdict:?}{tunnel}")
        }
    }
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

/// What some case must have met, beside the drops.
const OUTCOMES: [&str; 36] = [
    "FromPod: IPv4 Tcp: Redirect",
    "FromPod: IPv4 Udp: Redirect",
    "FromPod: IPv4 Sctp: Redirect",
    "FromPod: IPv4 EchoRequest: Redirect",
    "FromPod: IPv4 IcmpError: Redirect",
    "FromPod: IPv4 Later fragment: Redirect",
    "FromPod: IPv4: answered, TooBig",
    "FromPod: IPv4: answered, FirewallDenied",
    "FromPod: IPv6 Tcp: Redirect",
    "FromPod: IPv6 Udp: Redirect",
    "FromPod: IPv6 Sctp: Redirect",
    "FromPod: IPv6 EchoRequest: Redirect",
    "FromPod: IPv6 IcmpError: Redirect",
    "FromPod: IPv6 Later fragment: Redirect",
    "FromPod: IPv6: answered, TooBig",
    "FromPod: IPv6: answered, FirewallDenied",
    "ToUplink: IPv4 Tcp: Redirect",
    "ToUplink: IPv4 Udp: Redirect",
    "ToUplink: IPv4: answered, NoFlow",
    "ToUplink: IPv4: answered, FirewallDenied",
    "ToUplink: IPv6 Tcp: Redirect",
    "ToUplink: IPv6 Udp: Redirect",
    "ToUplink: IPv6: answered, NoFlow",
    "ToUplink: IPv6: answered, FirewallDenied",
    "FromUplink: IPv4 Later fragment: Redirect",
    "FromUplink: IPv6 Tcp: Redirect",
    "FromUplink: IPv6 Udp: Redirect",
    "FromUplink: IPv6 Sctp: Redirect",
    "FromUplink: IPv6 EchoReply: Redirect",
    "FromUplink: IPv6 Later fragment: Redirect",
    "FromTunnel: IPv4 Later fragment: Redirect",
    "FromTunnel: IPv6 Tcp: Redirect",
    "FromTunnel: IPv6 Udp: Redirect",
    "FromTunnel: IPv6 Sctp: Redirect",
    "FromTunnel: IPv6 Later fragment: Redirect",
    "Redirect to the tunnel over IPv6",
];

/// Cases of one set of tables.
const CASES_PER_WORLD: u64 = 60;

#[test]
fn kernel_and_memory_agree() {
    let cases = environment("OUTGATE_PARITY_CASES").unwrap_or(21_000);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    let seed = environment("OUTGATE_PARITY_SEED").unwrap_or(u64::from(clock.subsec_nanos()));
    println!("OUTGATE_PARITY_SEED={seed} OUTGATE_PARITY_CASES={cases}");
    enter_node_network();
    // One with room, one that is soon full.
    let kernel = |capacity| (Kernel::load(capacity), capacity as usize, Memory::default());
    let mut kernels = [kernel(600), kernel(12)];
    let begin = Instant::now();
    let mut met = Met::new();
    let mut done = 0;
    while done < cases {
        let world = done / CASES_PER_WORLD;
        let mut rng = Rng(seed.wrapping_add(world.wrapping_mul(0x1234_5678_9abc_def1)));
        let (kernel, capacity, before) = &mut kernels[usize::from(world % 5 == 4)];
        let mut t = tables(&mut rng, kernel::now(), *capacity);
        kernel.take_firewalls(before);
        kernel.put_firewalls(&t);
        before.clone_from(&t);
        kernel.write_learnt(&t);
        kernel.write(&t);
        for _ in 0..CASES_PER_WORLD {
            let (program, input) = case(&mut rng, &t);
            let observe = rng.percent(50);
            if let Err(problem) = compare(kernel, &mut t, program, &input, observe, &mut met) {
                panic!(
                    "{program:?} on {input:x?}, {}\n{problem}\ncase {done} of OUTGATE_PARITY_SEED={seed}\ntables: {t:?}",
                    if observe { "observed" } else { "run" }
                );
            }
            done += 1;
        }
    }
    for (outcome, count) in &met {
        println!("{count:>8} {outcome}");
    }
    println!("{done} cases agree, {:.1} s, seed {seed}", begin.elapsed().as_secs_f32());
    if cases >= 20_000 {
        // What the parser lets by the kernel rewrites, or all but; the others need a table of their own.
        let rare = [
            DropReason::TokenTableFull,
            DropReason::UnknownInterface,
            DropReason::NotReady,
            DropReason::Rewrite,
            DropReason::NotAnUplink,
            DropReason::PodFlowLimit,
            // `to_pod`'s own, which asks no decision in memory.
            DropReason::AnswerHeld,
        ];
        let reasons = DropReason::ALL.iter().filter(|reason| !rare.contains(reason));
        let drops = reasons.map(|reason| format!(": {}", reason.name()));
        for outcome in drops.chain(OUTCOMES.into_iter().chain(firewalls::EVENTS).map(str::to_owned)) {
            assert!(met.keys().any(|met| met.contains(&outcome)), "no case met \"{outcome}\"");
        }
    }
}
