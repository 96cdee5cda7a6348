//! Names learnt by the programs from resolvers' answers, on built packets (`BPF_PROG_TEST_RUN`).

use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use datapath::addr::Ip;
use datapath::conntrack::{Ticks, seconds};
use datapath::dns_build::{A, Message, QUESTION, TXT, name, pointer};
use datapath::keys::{
    Asked, AskedKey, Credit, Held, HeldKey, Interface, InterfaceKind, Learnt, LearntKey, NameEvent, NameKey,
    NetworkKey, NetworkKind, Pod, RESOLVER, Ruleset, Segment, Settings,
};
use datapath::limits::{
    ASKED_SECONDS, CREDITS, HELD_SECONDS, NAME_GRACE_SECONDS, NAME_TTL_SECONDS, NAMES_PER_ADDRESS,
    SEGMENT_BYTES,
};
use datapath::memory::Memory;
use datapath::packet::{ACK, FIN, RST, SYN, TCP};
use datapath::verdict::DropReason;
use lab::kernel::{
    Input, Kernel, Output, Program, Verdict, enter_node_network,
    interfaces::{OTHER_POD as OTHER_IF, POD as POD_IF, PORT},
    now,
};
use lab::packet::{Built, tcp, udp, v6, verify_checksums};

/// One family: a pod with names, one whose firewall has none, one without a firewall; two resolvers, of which the
/// second is a pod here; and a server outside.
struct Family {
    pods: [Ip; 3],
    resolvers: [Ip; 2],
    outside: Ip,
}

const V4: Family = Family {
    pods: [Ip::v4([10, 244, 1, 10]), Ip::v4([10, 244, 1, 11]), Ip::v4([10, 244, 1, 12])],
    resolvers: [Ip::v4([10, 96, 0, 10]), Ip::v4([10, 244, 1, 53])],
    outside: Ip::v4([203, 0, 113, 5]),
};
const V6: Family = Family {
    pods: [
        v6([0xfd00, 0x10, 0x244, 1, 0x10]),
        v6([0xfd00, 0x10, 0x244, 1, 0x11]),
        v6([0xfd00, 0x10, 0x244, 1, 0x12]),
    ],
    resolvers: [v6([0xfd00, 0x10, 0x96, 0, 0x10]), v6([0xfd00, 0x10, 0x244, 1, 0x53])],
    outside: v6([0x2001, 0xdb8, 0xcb, 0, 5]),
};
const FAMILIES: [Family; 2] = [V4, V6];

const ADDRESS: Ip = Ip::v4([198, 51, 100, 7]);
const ADDRESS6: Ip = v6([0x2001, 0xdb8, 0x51, 0, 7]);
const BRIDGE: u32 = 99;

const FIREWALL: u32 = 1;
const NO_NAMES: u32 = 2;
const EXACT: u32 = 11;
const WILDCARD: u32 = 12;
const PORT_ASKED_FROM: u16 = 40000;
const ID: u16 = 0x1234;

fn tables() -> Memory {
    let mut t = Memory::new(1, 64);
    t.settings =
        Settings { node: 1, tunnel_port: 4795, tunnel_vni: 1, hold_unknown: 1, ..Settings::default() };
    for (nth, family) in FAMILIES.iter().enumerate() {
        let first = 1 + 10 * nth as u32;
        for (i, (ip, firewall)) in family.pods.iter().zip([FIREWALL, NO_NAMES, 0]).enumerate() {
            let ifindex = [POD_IF, OTHER_IF, OTHER_IF][i];
            t.pods.insert(*ip, Pod { id: first + i as u32, policy: 0, ifindex, firewall });
        }
        t.pods.insert(family.resolvers[1], Pod { id: first + 9, policy: 0, ifindex: BRIDGE, firewall: 0 });
        for resolver in family.resolvers {
            t.resolvers.insert(resolver, RESOLVER);
        }
        let (ip, prefix_len) =
            if nth == 0 { (Ip::v4([10, 0, 0, 0]), 96 + 8) } else { (v6([0xfd00, 0, 0, 0, 0]), 16) };
        t.networks.insert(NetworkKey { prefix_len, ip }, NetworkKind::Pods as u32);
    }
    for (ifindex, kind, bridge) in [
        (POD_IF, InterfaceKind::Pod, 0),
        (OTHER_IF, InterfaceKind::Pod, 0),
        (PORT, InterfaceKind::Pod, BRIDGE),
    ] {
        t.interfaces.insert(ifindex, Interface { kind: kind as u8, bridge, ..Interface::default() });
    }
    for (firewall, parts) in [(FIREWALL, Ruleset::NAMES), (NO_NAMES, Ruleset::ADDRESSES)] {
        t.firewalls.insert(firewall, firewall + 100);
        t.rulesets.insert(firewall + 100, Ruleset { firewall, parts, ..Ruleset::default() });
    }
    for (text, wildcard, id) in [("db.example.com", 0, EXACT), ("example.com", 1, WILDCARD)] {
        let mut wire = [0; 256];
        let bytes = name(text);
        wire[..bytes.len()].copy_from_slice(&bytes);
        t.names.insert(NameKey { firewall: FIREWALL, wildcard, name: wire }, id);
    }
    t
}

/// Loaded once: the verifier takes a second for it. Each test has its own tables, and its turn.
static KERNEL: LazyLock<Mutex<Kernel>> = LazyLock::new(|| Mutex::new(Kernel::load(64)));

struct Rig {
    kernel: MutexGuard<'static, Kernel>,
}

impl Rig {
    fn new() -> Self {
        Self::with(&tables())
    }

    fn with(tables: &Memory) -> Self {
        enter_node_network();
        let mut kernel = KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
        kernel.write(tables);
        kernel.write_names(tables);
        Self { kernel }
    }

    fn run(&mut self, program: Program, ifindex: u32, frame: &[u8]) -> (Verdict, Vec<u8>) {
        let input = Input { frame: frame.to_vec(), ifindex, ..Input::default() };
        let (verdict, Output { frame, .. }) = self.kernel.run(program, &input);
        (verdict, frame)
    }

    /// The pod asks.
    fn ask(&mut self, family: &Family) {
        let question = udp((family.pods[0], PORT_ASKED_FROM), (family.resolvers[0], 53));
        let question = question.payload(&Message::new(ID, "db.example.com", A).bytes);
        let (verdict, frame) = self.run(Program::FromPod, POD_IF, &question.frame());
        assert_eq!((verdict, frame), (Verdict::Next, question.frame()));
    }

    /// A packet passes to a pod, as it is.
    fn passes(&mut self, packet: &Built) {
        let frame = packet.frame();
        verify_checksums(&frame).expect("it is built right");
        assert_eq!(self.run(Program::ToPod, POD_IF, &frame), (Verdict::Next, frame));
    }

    /// A packet to a pod is dropped, as an answer that is held.
    fn held(&mut self, packet: &Built) {
        let drops = |rig: &Self| rig.kernel.drops()[DropReason::AnswerHeld as usize].packets;
        let before = drops(self);
        assert_eq!(self.run(Program::ToPod, POD_IF, &packet.frame()).0, Verdict::Drop);
        assert_eq!(drops(self), before + 1);
    }

    /// Runs something, and gives how often this happened meanwhile.
    fn counted(&mut self, event: NameEvent, run: impl FnOnce(&mut Self)) -> u64 {
        let before = self.kernel.name_events(event);
        run(self);
        self.kernel.name_events(event) - before
    }

    /// The names of an address, and how much longer it is theirs, in whole seconds.
    fn learnt(&self, ip: Ip) -> BTreeMap<u32, u32> {
        let learnt = self.kernel.learnt();
        let Some(learnt) = learnt.get(&LearntKey { firewall: FIREWALL, ip }) else { return BTreeMap::new() };
        let now = now();
        let left = |word: u64| {
            let ticks = (word as Ticks).wrapping_sub(now);
            let nanoseconds = u64::from(ticks) << 24;
            ((nanoseconds + 500_000_000) / 1_000_000_000) as u32
        };
        learnt
            .names
            .iter()
            .filter(|word| **word != 0)
            .map(|word| ((word >> 32) as u32, left(*word)))
            .collect()
    }
}

fn message(ttl: u32) -> Message {
    Message::new(ID, "dB.exAmple.com", A).address(&QUESTION, ttl, ADDRESS)
}

fn answer(family: &Family, message: &Message) -> Built {
    udp((family.resolvers[0], 53), (family.pods[0], PORT_ASKED_FROM)).payload(&message.bytes)
}

/// The same with "truncated" set, its checksum summed up anew.
fn truncated(packet: &Built, message: &Message) -> Built {
    let mut bytes = message.bytes.clone();
    bytes[2] |= 2;
    packet.clone().payload(&bytes)
}

#[test]
fn an_answer_is_learnt_from_before_the_pod_has_it() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        rig.ask(&family);
        let asked = rig.kernel.asked();
        let pod = tables().pods[&family.pods[0]].id;
        let key = AskedKey { pod, port: PORT_ASKED_FROM, id: ID };
        assert_eq!(asked.keys().collect::<Vec<_>>(), [&key]);
        assert_eq!(asked[&key].resolver, family.resolvers[0]);

        let (message, at) =
            Message::new(ID, "DB.example.com", A).alias(&QUESTION, 30, &name("cdn.example.net"));
        let message = message.address(&pointer(at), 300, ADDRESS).address(&pointer(at), 7, ADDRESS6).edns();
        let learnt = rig.counted(NameEvent::Learnt, |rig| rig.passes(&answer(&family, &message)));
        assert_eq!(learnt, 4);
        for (ip, ttl) in [(ADDRESS, 30), (ADDRESS6, 7)] {
            let until = ttl + NAME_GRACE_SECONDS;
            assert_eq!(rig.learnt(ip), BTreeMap::from([(EXACT, until), (WILDCARD, until)]));
        }
        assert_eq!(rig.kernel.learnt().len(), 2);

        // Again, for longer, for less long, and for ever.
        let again = Message::new(ID, "db.example.com", A);
        for (ttl, until) in [(500, 560), (5, 560), (u32::MAX >> 1, NAME_TTL_SECONDS + NAME_GRACE_SECONDS)] {
            rig.passes(&answer(&family, &again.clone().address(&QUESTION, ttl, ADDRESS)));
            assert_eq!(rig.learnt(ADDRESS), BTreeMap::from([(EXACT, until), (WILDCARD, until)]));
        }
        // Another name of the same wildcard.
        let mut other = Message::new(ID, "web.example.com", A).address(&QUESTION, 1, ADDRESS6);
        rig.passes(&answer(&family, &other));
        assert_eq!(rig.learnt(ADDRESS6)[&EXACT], 67);
        // One of two labels more is none of it.
        other = Message::new(ID, "a.web.example.com", A).address(&QUESTION, 900, ADDRESS6);
        rig.passes(&answer(&family, &other));
        assert_eq!(rig.learnt(ADDRESS6)[&WILDCARD], 67);
    }
}

#[test]
fn what_nobody_asked_is_not_learnt() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        let unasked = |rig: &mut Rig, packet: &Built| {
            assert_eq!(rig.counted(NameEvent::Unasked, |rig| rig.passes(packet)), 1);
            assert_eq!(rig.kernel.learnt(), BTreeMap::new());
        };
        let right = answer(&family, &message(300));
        unasked(&mut rig, &right);
        rig.ask(&family);
        let mut other_id = message(300);
        other_id.bytes[1] ^= 1;
        unasked(&mut rig, &answer(&family, &other_id));
        let (pod, resolver) = (family.pods[0], family.resolvers[0]);
        let from_to = |from, to| udp(from, to).payload(&message(300).bytes);
        unasked(&mut rig, &from_to((resolver, 53), (pod, PORT_ASKED_FROM + 1)));
        // Another resolver, at whom it did not ask.
        unasked(&mut rig, &from_to((family.resolvers[1], 53), (pod, PORT_ASKED_FROM)));
        // Long ago.
        let old = now().wrapping_sub(seconds(ASKED_SECONDS + 1));
        let asked: BTreeMap<_, _> =
            rig.kernel.asked().into_iter().map(|(key, asked)| (key, Asked { seen: old, ..asked })).collect();
        rig.kernel.set_asked(&asked);
        unasked(&mut rig, &right);
        rig.ask(&family);
        assert_eq!(rig.counted(NameEvent::Learnt, |rig| rig.passes(&right)), 2);
    }
}

#[test]
fn a_question_is_noted_only_for_who_asks_a_resolver() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        let payload = message(1).bytes;
        let resolver = family.resolvers[0];
        let mut ask = |pod: Ip, ifindex: u32, to: (Ip, u16), payload: &[u8]| {
            let frame = udp((pod, PORT_ASKED_FROM), to).payload(payload).frame();
            let _ = rig.run(Program::FromPod, ifindex, &frame);
            rig.kernel.asked().len()
        };
        let pod = family.pods[0];
        assert_eq!(ask(pod, POD_IF, (family.outside, 53), &payload), 0, "no resolver");
        assert_eq!(ask(pod, POD_IF, (resolver, 54), &payload), 0, "another port");
        assert_eq!(ask(pod, POD_IF, (resolver, 53), &payload[..11]), 0, "too short");
        assert_eq!(ask(family.pods[2], OTHER_IF, (resolver, 53), &payload), 0, "no firewall");
        assert_eq!(ask(pod, OTHER_IF, (resolver, 53), &payload), 0, "with another's address");
        assert_eq!(ask(pod, POD_IF, (resolver, 5353), &payload), 1);
    }
}

/// All that the programs could not take whole, each with its packet built, checksums and all, from nothing.
#[test]
fn what_is_not_understood_is_asked_for_again() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        rig.ask(&family);
        let poisoned = message(300).address(&name("bank.example.org"), 300, ADDRESS);
        let many = (0..65)
            .fold(message(300), |message, i| message.address(&QUESTION, 300, Ip::v4([198, 51, 100, i])));
        let mut cut = message(300);
        cut.bytes.pop();
        for message in [&poisoned, &many, &cut] {
            let packet = answer(&family, message);
            for packet in [packet.clone(), packet.clone().no_checksum(), Built { padding: 9, ..packet }] {
                let event = NameEvent::Truncated;
                let count = rig.counted(event, |rig| {
                    let passed = rig.run(Program::ToPod, POD_IF, &packet.frame());
                    assert_eq!(passed, (Verdict::Next, truncated(&packet, message).frame()));
                });
                assert_eq!(count, 1);
            }
            let input = Input { frame: packet_frame(&family, message), ifindex: POD_IF, ..Input::default() };
            assert!(rig.kernel.keeps_the_sum(Program::ToPod, &input));
            assert_eq!(rig.kernel.learnt(), BTreeMap::new());
        }
        // The same to a question that is of no interest, or in an answer that says so already.
        for text in ["db.example.org", "example.com", "a.db.example.com"] {
            let message = Message::new(ID, text, A).address(&name("bank.example.org"), 300, ADDRESS);
            rig.passes(&answer(&family, &message));
        }
        rig.passes(&truncated(&answer(&family, &poisoned), &poisoned));
        assert_eq!(rig.kernel.learnt(), BTreeMap::new());
    }
}

fn packet_frame(family: &Family, message: &Message) -> Vec<u8> {
    answer(family, message).frame()
}

#[test]
fn a_long_answer_is_read() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        rig.ask(&family);
        let long = Message::new(ID, "db.example.com", A).record(&QUESTION, TXT, 1, &[7; 2800]);
        rig.passes(&answer(&family, &long.address(&QUESTION, 300, ADDRESS)));
        assert_eq!(rig.learnt(ADDRESS).len(), 2);
    }
}

/// A first fragment says "truncated"; the others pass.
#[test]
fn fragments_are_not_whole() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        rig.ask(&family);
        let message = message(300).record(&QUESTION, TXT, 1, &[7; 200]);
        let packet = answer(&family, &message);
        let cut = [128];
        let expected = truncated(&packet, &message).fragments(&cut);
        for (frame, expected) in packet.fragments(&cut).into_iter().zip(expected) {
            assert_eq!(rig.run(Program::ToPod, POD_IF, &frame), (Verdict::Next, expected));
        }
        assert_eq!(rig.kernel.learnt(), BTreeMap::new());
    }
}

/// Several datagrams of the same length, as the kernel hands them on where it has put them together.
#[test]
fn datagrams_put_together_are_read_one_by_one() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        rig.ask(&family);
        let other = Message::new(ID, "db.example.com", A).address(&QUESTION, 300, Ip::v4([198, 51, 100, 8]));
        let last = Message::new(ID, "e.example.com", A).address(&QUESTION, 300, Ip::v4([198, 51, 100, 9]));
        let size = message(300).bytes.len();
        let together = Message { bytes: [message(300).bytes, other.bytes, last.bytes].concat() };
        let frame = answer(&family, &together).frame();
        let input = Input { frame, ifindex: POD_IF, gso: size as u32, ..Input::default() };
        let (verdict, Output { frame, .. }) = rig.kernel.run(Program::ToPod, &input);
        assert_eq!((verdict, frame), (Verdict::Next, input.frame));
        let (both, wildcard) =
            (BTreeMap::from([(EXACT, 360), (WILDCARD, 360)]), BTreeMap::from([(WILDCARD, 360)]));
        for (last, names) in [(7, &both), (8, &both), (9, &wildcard)] {
            assert_eq!(rig.learnt(Ip::v4([198, 51, 100, last])), *names);
        }
    }
}

/// Byte for byte, whatever it says.
#[test]
fn answers_to_others_are_not_touched() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        let poisoned = message(300).address(&name("bank.example.org"), 300, ADDRESS);
        let resolver = family.resolvers[0];
        for to in [family.pods[1], family.pods[2], family.outside] {
            for from in [53, 5353] {
                rig.passes(&udp((resolver, from), (to, PORT_ASKED_FROM)).payload(&poisoned.bytes));
                rig.passes(&tcp((resolver, from), (to, PORT_ASKED_FROM), ACK).payload(&poisoned.bytes));
            }
        }
        rig.ask(&family);
        let pod = family.pods[0];
        for (from, port) in [(family.outside, 53), (resolver, 54)] {
            rig.passes(&udp((from, port), (pod, PORT_ASKED_FROM)).payload(&poisoned.bytes));
            rig.passes(&tcp((from, port), (pod, PORT_ASKED_FROM), ACK).payload(&poisoned.bytes));
        }
        rig.passes(&udp((resolver, 53), (pod, PORT_ASKED_FROM)).payload(b"short"));
        assert_eq!(rig.kernel.learnt(), BTreeMap::new());
        assert_eq!(rig.kernel.held(), BTreeMap::new());
        assert_eq!(rig.kernel.segments(), []);
    }
}

/// A segment with these bytes, from this sequence number on.
fn segment(family: &Family, seq: u32, flags: u8, payload: &[u8]) -> Built {
    let (from, to) = ((family.resolvers[0], 53_u16), (family.pods[0], PORT_ASKED_FROM));
    let mut bytes = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    bytes.extend(seq.to_be_bytes());
    bytes.extend([9; 4]);
    // With an option: a timestamp's room.
    bytes.extend([0x80, flags, 0xff, 0xff, 0, 0, 0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
    bytes.extend(payload);
    lab::packet::summed(from.0, to.0, TCP, &bytes, 16)
}

fn held_key(family: &Family, seq: u32) -> HeldKey {
    let pod = tables().pods[&family.pods[0]].id;
    HeldKey { pod, resolver: family.resolvers[0], port: PORT_ASKED_FROM, resolver_port: 53, seq }
}

#[test]
fn a_segment_is_held_until_it_is_read() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        let packet = Built { padding: 5, ..segment(&family, 1000, ACK, b"an answer") };
        assert_eq!(rig.counted(NameEvent::Held, |rig| rig.held(&packet)), 1);
        let key = held_key(&family, 1000);
        let records = rig.kernel.segments();
        let head = Segment {
            held: key,
            firewall: FIREWALL,
            pod_ip: family.pods[0],
            payload: 9,
            offset: 0,
            len: 9,
            flags: u32::from(ACK),
        };
        assert_eq!(records, [(head, b"an answer".to_vec())]);
        // Sent again before the agent has read it: nothing new.
        rig.held(&packet);
        assert_eq!(rig.kernel.segments(), []);
        let waiting = rig.kernel.held();
        assert_eq!(waiting.keys().collect::<Vec<_>>(), [&key]);
        assert_eq!(waiting[&key].read, 0);
        // Read: it passes, and so does its beginning.
        rig.kernel.set_held(&BTreeMap::from([(key, Held { read: 9, ..waiting[&key] })]));
        rig.passes(&packet);
        rig.passes(&segment(&family, 1000, ACK, b"an answ"));
        // More behind it is read anew.
        let longer = segment(&family, 1000, ACK, b"an answer and more");
        rig.held(&longer);
        assert_eq!(rig.kernel.segments()[0].1, b"an answer and more");
        // Other segments are others.
        rig.held(&segment(&family, 1007, ACK, b"er"));
        assert_eq!(rig.kernel.segments().len(), 1);
    }
}

/// What is sent again is cut otherwise than it was.
#[test]
fn what_was_read_of_a_connection_passes_however_it_is_cut() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        let next = 500; // the sequence numbers have wrapped
        let connection = held_key(&family, HeldKey::CONNECTION);
        let read = BTreeMap::from([(connection, Held { since: 0, read: next })]);
        rig.kernel.set_held(&read);
        for (seq, len) in [(0_u32.wrapping_sub(100), 600), (490, 10), (499, 1)] {
            rig.passes(&segment(&family, seq, ACK, &vec![1; len]));
        }
        for (seq, len) in [(490, 11), (500, 1), (600, 5), (500_u32.wrapping_sub(2 << 20), 5)] {
            rig.held(&segment(&family, seq, ACK, &vec![1; len]));
        }
        // A new connection begins: what was read is of the old one.
        let _ = rig.kernel.segments();
        rig.passes(&segment(&family, 479, SYN | ACK, b""));
        assert!(!rig.kernel.held().contains_key(&connection));
        let records = rig.kernel.segments();
        assert_eq!((records.len(), records[0].0.payload, records[0].0.held.seq), (1, 0, 480));
        assert_eq!(records[0].0.flags, u32::from(SYN | ACK));
        rig.held(&segment(&family, 480, ACK, &[1; 10]));
    }
}

#[test]
fn a_segment_that_nobody_reads_passes_late() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        let packet = segment(&family, 1000, ACK, b"an answer");
        rig.held(&packet);
        let since = now().wrapping_sub(seconds(HELD_SECONDS) + 1);
        rig.kernel.set_held(&BTreeMap::from([(held_key(&family, 1000), Held { since, read: 0 })]));
        assert_eq!(rig.counted(NameEvent::Unread, |rig| rig.passes(&packet)), 1);
        let _ = rig.kernel.segments();
    }
}

#[test]
fn what_carries_nothing_is_not_held() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        for flags in [ACK, FIN | ACK, RST, SYN | ACK] {
            rig.passes(&Built { padding: 6, ..segment(&family, 1000, flags, b"") });
        }
        assert_eq!(rig.kernel.held(), BTreeMap::new());
        assert_eq!(rig.kernel.segments().len(), 1, "the SYN");
    }
}

/// A segment as the kernel hands it on: several of the wire's in one.
#[test]
fn a_large_segment_comes_in_pieces() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        let payload: Vec<u8> = (0..3000_u32).map(|i| (i % 251) as u8).collect();
        let frame = segment(&family, 1000, ACK, &payload).frame();
        let input = Input { frame, ifindex: POD_IF, gso: 1000, ..Input::default() };
        assert_eq!(rig.kernel.run(Program::ToPod, &input).0, Verdict::Drop);
        let records = rig.kernel.segments();
        let places: Vec<_> = records.iter().map(|(head, _)| (head.payload, head.offset, head.len)).collect();
        let piece = SEGMENT_BYTES as u32;
        assert_eq!(places, [(3000, 0, piece), (3000, piece, 3000 - piece)]);
        assert_eq!(records.into_iter().flat_map(|(_, bytes)| bytes).collect::<Vec<_>>(), payload);
    }
}

/// Nobody forges what would be believed.
#[test]
fn pods_do_not_send_in_a_resolvers_name() {
    for family in FAMILIES {
        let mut rig = Rig::new();
        let [service, local] = family.resolvers;
        let to = (family.pods[0], PORT_ASKED_FROM);
        let spoofed = |rig: &Rig| rig.kernel.drops()[DropReason::SpoofedSource as usize].packets;
        for from in [service, local] {
            for ifindex in [POD_IF, OTHER_IF] {
                for port in [53, 5353] {
                    for packet in [udp((from, port), to), tcp((from, port), to, ACK)] {
                        let before = spoofed(&rig);
                        let (verdict, _) = rig.run(Program::FromPod, ifindex, &packet.frame());
                        assert_eq!((verdict, spoofed(&rig)), (Verdict::Drop, before + 1), "{packet:?}");
                    }
                }
            }
        }
        // The resolver itself, by its bridge and by that bridge's port.
        for packet in [udp((local, 53), to), tcp((local, 5353), to, ACK)] {
            let frame = packet.frame();
            assert_eq!(rig.run(Program::FromPod, PORT, &frame), (Verdict::Next, frame));
        }
        // Others answer at these ports, too: they are no resolvers.
        let frame = udp((family.pods[2], 53), to).frame();
        assert_eq!(rig.run(Program::FromPod, OTHER_IF, &frame), (Verdict::Next, frame));
    }
}

#[test]
fn the_agents_own_look_ups_are_entered_by_the_kernel() {
    let mut rig = Rig::new();
    let credit = |name: u32, ttl: u32, action: u32| Credit {
        key: LearntKey { firewall: FIREWALL, ip: ADDRESS },
        name,
        ttl,
        action,
    };
    let (enter, forget) = (Credit::ENTER, Credit::FORGET);
    let other = Credit { key: LearntKey { firewall: FIREWALL, ip: ADDRESS6 }, ..credit(EXACT, 9, enter) };
    assert_eq!(rig.kernel.credit(&[credit(EXACT, 30, enter), other, credit(0, 30, enter)]), 2);
    assert_eq!(rig.learnt(ADDRESS), BTreeMap::from([(EXACT, 90)]));
    assert_eq!(rig.learnt(ADDRESS6), BTreeMap::from([(EXACT, 69)]));
    assert_eq!(rig.kernel.credit(&[credit(EXACT, 10, enter), credit(WILDCARD, 0, enter)]), 2);
    assert_eq!(rig.learnt(ADDRESS), BTreeMap::from([(EXACT, 90), (WILDCARD, 60)]));
    assert_eq!(rig.kernel.credit(&[credit(EXACT, 0, forget), credit(77, 0, forget)]), 2);
    assert_eq!(rig.learnt(ADDRESS), BTreeMap::from([(WILDCARD, 60)]));
    assert_eq!(rig.kernel.credit(&[]), 0);

    // As many as one run takes, and as many names as an address has: the one that would go first makes room.
    let many: Vec<Credit> = (0..CREDITS as u32).map(|i| credit(100 + i, 100 + i, enter)).collect();
    let displaced =
        rig.counted(NameEvent::Displaced, |rig| assert_eq!(rig.kernel.credit(&many), CREDITS as u32));
    assert_eq!(displaced, (CREDITS + 1 - NAMES_PER_ADDRESS) as u64);
    let last = CREDITS - NAMES_PER_ADDRESS..CREDITS;
    let names: Vec<u32> = last.map(|i| 100 + i as u32).collect();
    assert_eq!(rig.learnt(ADDRESS).into_keys().collect::<Vec<_>>(), names);

    // What is past its time is nobody's.
    let mut tables = tables();
    let learnt =
        Learnt { names: [u64::from(EXACT) << 32 | u64::from(now().wrapping_sub(10)); NAMES_PER_ADDRESS] };
    tables.learnt = BTreeMap::from([(LearntKey { firewall: FIREWALL, ip: ADDRESS }, learnt)]).into();
    rig.kernel.write_names(&tables);
    let learnt =
        rig.counted(NameEvent::Learnt, |rig| assert_eq!(rig.kernel.credit(&[credit(5, 1, enter)]), 1));
    assert_eq!((learnt, rig.learnt(ADDRESS)[&5]), (1, 61));
}
