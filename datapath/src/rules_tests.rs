//! Trees of rules beside a plain search of the spans that they were made of.

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use crate::keys::{Line, Ruleset, Winner};
use crate::limits::FIREWALL_CLASSES;
use crate::memory::Memory;
use crate::packet::{SCTP, TCP, UDP};
use crate::rules::{
    BLOCK_LINES, ClassRecord, ClassRules, ClassSays, LEAF_V6_LEVELS, LEVELS_SHIFT, LINK, RECORD_WORDS,
    Stretch, ask_class, class_place, port_number,
};
use crate::rules_build::{Address, PORT_PROTOCOLS, Room, Roots, Span, blocks, build, naive, read, up_to};
use crate::tables::Tables as _;

/// Numbers of spans around all sizes at which a tree of either family gets another level, or a line is full.
const SIZES: [usize; 25] =
    [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 23, 24, 25, 47, 49, 127, 128, 129, 191, 193, 2048, 2049];

/// Addresses as numbers, and as the tables are asked for them.
trait Number: Address + From<u8> + core::ops::Add<Output = Self> + core::ops::Sub<Output = Self> {
    const V4: bool;
    fn low(self) -> u32;
    fn random(t: &Memory) -> Self;
    fn ask(self, t: &Memory, root: u32) -> u32;
}

impl Number for u32 {
    const V4: bool = true;
    fn low(self) -> u32 {
        self
    }
    fn random(t: &Memory) -> Self {
        t.random()
    }
    fn ask(self, t: &Memory, root: u32) -> u32 {
        t.rule_v4(root, self)
    }
}

impl Number for u128 {
    const V4: bool = false;
    fn low(self) -> u32 {
        self as u32
    }
    fn random(t: &Memory) -> Self {
        // Each half often the same, and at its edges.
        let half = || match t.random() % 5 {
            0 => 0,
            1 => u64::MAX,
            2 => u64::from(t.random() % 8),
            3 => u64::from(t.random() % 2) << 32 | u64::from(t.random()),
            _ => u64::from(t.random()) << 32 | u64::from(t.random()),
        };
        Self::from(half()) << 64 | Self::from(half())
    }
    fn ask(self, t: &Memory, root: u32) -> u32 {
        t.rule_v6(root, (self >> 64) as u64, self as u64)
    }
}

/// So many spans, at random places.
fn spans<A: Number>(t: &Memory, class: u16, count: usize) -> Vec<Span<A>> {
    let mut lasts = vec![A::HIGHEST];
    while lasts.len() < count {
        while lasts.len() < count {
            let last = A::random(t);
            // Neighbours often.
            lasts.push(if t.random().is_multiple_of(2) { last } else { lasts[lasts.len() - 1] - A::from(1) });
            if lasts[lasts.len() - 1] == A::from(0) {
                lasts.pop();
            }
        }
        lasts.sort_unstable();
        lasts.dedup();
    }
    lasts.sort_unstable();
    let mut before = Winner::NONE;
    let spans = lasts.into_iter().map(|last| {
        let none = before != Winner::NONE && t.random().is_multiple_of(3);
        before = if none { Winner::NONE } else { t.random() % LINK };
        Span { class, last, winner: before }
    });
    spans.collect()
}

/// Compares what is said of a class' addresses with its spans: at the edges of all of them and elsewhere.
fn compare<A: Number>(t: &Memory, spans: &[Span<A>], class: u16, ask: impl Fn(A) -> u32) {
    let of_class: Vec<_> = spans.iter().filter(|span| span.class == class).copied().collect();
    let edges = of_class.iter().flat_map(|span| {
        let after = if span.last == A::HIGHEST { span.last } else { span.last + A::from(1) };
        [span.last, after, span.last - A::from(u8::from(span.last > A::from(0)))]
    });
    let random = (0..50).map(|_| A::random(t));
    for address in edges.chain(random).chain([A::from(0), A::HIGHEST]) {
        assert_eq!(ask(address), naive(&of_class, class, address));
    }
}

#[test]
fn trees_of_all_sizes_say_what_their_spans_say() {
    let mut t = Memory::new(1, 0);
    for (size, id) in SIZES.into_iter().zip(1..) {
        let (v4, v6) = (spans::<u32>(&t, 0, size), spans::<u128>(&t, 0, size));
        t.put_rules(id, Ruleset::default(), (&v4, &v6, &[]));
        let [root_v4, root_v6] = t.rulesets[&id].roots;
        compare(&t, &v4, 0, |address| address.ask(&t, root_v4));
        compare(&t, &v6, 0, |address| address.ask(&t, root_v6));
    }
    let levels = |id| t.rulesets[&id].roots.map(|root| root >> LEVELS_SHIFT);
    assert_eq!((levels(1), levels(SIZES.len() as u32)[0]), ([0, LEAF_V6_LEVELS], 3));
}

/// What the record at a place says of an address.
fn ask<A: Number>(t: &Memory, place: u32, address: A) -> u32 {
    let says = ask_class(place, A::V4, address.low(), |line| t.rule_line(line));
    assert_eq!(ClassSays::from_word(says.to_word()), says);
    if says.root == 0 { says.rule } else { address.ask(t, says.root) }
}

/// The spans of one class at random: also of one network, of the same rule for everything, of nothing.
fn class_spans(t: &Memory, class: u16) -> (Vec<Span<u32>>, Vec<Span<u128>>) {
    let all = Winner::new(t.random() % 9, true).order;
    let none = |last| Span { class, last, winner: Winner::NONE };
    let (v4, v6) = (t.random(), t.random());
    match t.random() % 8 {
        0 => (vec![], vec![]),
        1 => (
            vec![Span { class, last: u32::MAX, winner: all }],
            vec![Span { class, last: u128::MAX, winner: all }],
        ),
        // The same of either family alone, and not of one rule.
        2 => (vec![Span { class, last: u32::MAX, winner: all }], vec![]),
        3 => (vec![], vec![Span { class, last: u128::MAX, winner: all }]),
        4 => (
            vec![Span { class, last: u32::MAX, winner: all }],
            vec![Span { class, last: u128::MAX, winner: all + 1 }],
        ),
        // One network, at the edges too.
        5 => {
            let first = [0, 1, v4 / 2][v6 as usize % 3];
            let last = [first, u32::MAX, first + v4 / 4][v4 as usize % 3];
            let before = (first > 0).then(|| none(first.wrapping_sub(1)));
            let after = (last < u32::MAX).then(|| none(u32::MAX));
            let network = Span { class, last, winner: all };
            (before.into_iter().chain([network]).chain(after).collect(), vec![])
        }
        // A few networks, side by side and apart.
        6 => {
            let mut few = spans::<u32>(t, class, 1 + v4 as usize % 10);
            for span in few.iter_mut().filter(|_| t.random().is_multiple_of(2)) {
                span.winner = Winner::NONE;
            }
            few.dedup_by(|next, before| {
                let same = next.winner == before.winner;
                if same {
                    before.last = next.last;
                }
                same
            });
            if few.iter().all(|span| span.winner == Winner::NONE) { (vec![], vec![]) } else { (few, vec![]) }
        }
        _ => (spans(t, class, 1 + v4 as usize % 20), spans(t, class, 1 + v6 as usize % 9)),
    }
}

/// Spans of ports in which each class up to the highest stands, some more than once: whole pages, edges of pages and
/// protocols, single ports.
fn port_spans(t: &Memory, highest: u16, more: u16) -> Vec<Span<u32>> {
    let protocols = [TCP, UDP, SCTP].into_iter().filter(|_| !t.random().is_multiple_of(4));
    let protocols: Vec<_> = protocols.chain([TCP]).collect();
    let mut edges: Vec<u32> = Vec::new();
    while edges.len() < 4 * usize::from(highest + more) {
        for _ in 0..2 * (highest + more) {
            let port = match t.random() % 4 {
                0 => t.random() as u16 & 0xff00,
                1 => t.random() as u16 | 0xff,
                _ => t.random() as u16,
            };
            let number = port_number(protocols[t.random() as usize % protocols.len()], port);
            edges.extend([number, number + u32::from(port != u16::MAX)]);
        }
        edges.sort_unstable();
        edges.dedup();
    }
    let (mut spans, mut next) = (Vec::new(), 1);
    for last in edges {
        // What lies between protocols is no port.
        up_to(&mut spans, 0, port_number((last >> 16) as u8, 0) - 1, 0);
        let winner = match t.random() % 3 {
            0 => 0,
            _ if next <= highest => next,
            _ => t.random() as u16 % (highest + 1),
        };
        up_to(&mut spans, 0, last, winner.into());
        next += u16::from(winner == next);
    }
    assert!(next > highest, "a class has no port");
    up_to(&mut spans, 0, u32::MAX, 0);
    spans
}

#[test]
fn each_port_has_its_class() {
    let mut t = Memory::new(6, 0);
    let mut empty = 0;
    for (id, highest) in (1..).zip([1, 2, 5, 30, 400, 3000]) {
        let of_ports = port_spans(&t, highest, 3);
        t.put_rules(id, Ruleset::default(), (&[], &[], &of_ports));
        for (protocol, root) in PORT_PROTOCOLS.into_iter().zip(t.rulesets[&id].ports) {
            let mut at = 0;
            for port in 0..=u16::MAX {
                let number = port_number(protocol, port);
                while of_ports[at].last < number {
                    at += 1;
                }
                let class = of_ports[at].winner;
                let place = class_place(root, port, |line| t.rule_line(line)).expect("a place");
                let found = ClassRecord::find(place, |line| t.rule_line(line)).filter(|_| place != 0);
                assert_eq!(found.map_or(0, |r| r.class.into()), class, "protocol {protocol} port {port}");
            }
            empty += u32::from(root == 0);
        }
    }
    assert!(empty > 0, "a protocol without rules has no table");
    assert_eq!(class_place(5, 80, |line| t.rule_line(line)), Some(0), "block 0 is nobody's");
    assert_eq!(class_place(u32::MAX - 16, 80, |line| t.rule_line(line)), None);
}

#[test]
fn each_class_has_its_own_rules() {
    let mut t = Memory::new(2, 0);
    let mut forms = [0; 4];
    for highest in [1, 2, 3, 4, 5, 63, 64, 65, 1000, 5000] {
        let (mut v4, mut v6) = (spans(&t, 0, 5), spans(&t, 0, 7));
        for class in 1..=highest {
            let (of_class_v4, of_class_v6) = class_spans(&t, class);
            v4.extend(of_class_v4);
            v6.extend(of_class_v6);
        }
        let of_ports = port_spans(&t, highest, 50);
        t.put_rules(7, Ruleset::default(), (&v4, &v6, &of_ports));
        let Ruleset { roots, ports, .. } = t.rulesets[&7];
        compare(&t, &v4, 0, |address| address.ask(&t, roots[0]));
        compare(&t, &v6, 0, |address| address.ask(&t, roots[1]));
        for span in &of_ports {
            let table = PORT_PROTOCOLS.iter().position(|protocol| u32::from(*protocol) == span.last >> 16);
            let root = table.map_or(0, |n| ports[n]);
            let place = class_place(root, span.last as u16, |line| t.rule_line(line)).expect("a place");
            if span.winner == 0 {
                assert_eq!(place, 0);
                continue;
            }
            let record = ClassRecord::find(place, |line| t.rule_line(line)).expect("a record");
            assert_eq!(u32::from(record.class), span.winner);
            if !t.random().is_multiple_of(u32::from(highest / 100 + 1)) {
                continue;
            }
            match record.rules {
                ClassRules::Trees(_) => forms[0] += 1,
                ClassRules::One(_) => forms[1] += 1,
                ClassRules::Few(_) => forms[2] += 1,
                ClassRules::All(_) => forms[3] += 1,
            }
            compare(&t, &v4, record.class, |address| ask(&t, place, address));
            compare(&t, &v6, record.class, |address| ask(&t, place, address));
        }
        let line = |n: u32| t.rules.get(n as usize).copied().ok_or(());
        assert!(read(&Roots { roots, ports }, line) == Ok(Some((v4, v6, of_ports))), "read back");
    }
    assert!(forms.iter().all(|count| *count > 20), "{forms:?}");
}

#[test]
fn as_many_classes_as_an_object_may_have_find_their_place() {
    let mut t = Memory::new(3, 0);
    let winner = |class| Span { class, last: u32::MAX, winner: class.into() };
    let v4: Vec<_> = (1..=FIREWALL_CLASSES as u16).map(winner).collect();
    let mut of_ports = vec![Span { class: 0, last: port_number(UDP, 0), winner: 0 }];
    for class in 1..=FIREWALL_CLASSES as u16 {
        up_to(&mut of_ports, 0, port_number(UDP, class), class.into());
    }
    up_to(&mut of_ports, 0, u32::MAX, 0);
    t.put_rules(1, Ruleset::default(), (&v4, &[], &of_ports));
    let Ruleset { roots, ports, .. } = t.rulesets[&1];
    for class in [1_u16, 2, 127, 128, 2047, 2048, 32_766, 32_767] {
        let place = class_place(ports[1], class, |line| t.rule_line(line)).expect("a place");
        let record = ClassRecord::find(place, |line| t.rule_line(line));
        let rules = ClassRules::One(Stretch { first: 0, last: u32::MAX, winner: class.into() });
        assert_eq!(record, Some(ClassRecord { class, rules }));
    }
    let line = |n: u32| t.rules.get(n as usize).copied().ok_or(());
    assert!(read(&Roots { roots, ports }, line) == Ok(Some((v4, vec![], of_ports))), "read back");
}

/// Some blocks, given out in a wild order, and each line once.
struct Few {
    blocks: Vec<u32>,
    lines: BTreeMap<u32, Line>,
}

impl Room for Few {
    fn block(&mut self) -> Option<u32> {
        self.blocks.pop()
    }
    fn put(&mut self, line: u32, content: &Line) {
        assert_eq!(self.lines.insert(line, *content), None, "each line once");
    }
}

#[test]
fn blocks_may_be_anywhere_and_are_as_many_as_are_said() {
    let t = Memory::new(4, 0);
    for size in SIZES {
        let (mut v4, mut v6) = (spans::<u32>(&t, 0, size), spans::<u128>(&t, 0, size));
        let classes = 9 + size as u16 % 30;
        for class in 1..=classes {
            let (of_class_v4, of_class_v6) = class_spans(&t, class);
            v4.extend(of_class_v4);
            v6.extend(of_class_v6);
        }
        let ports = port_spans(&t, classes, size as u16 / 3);
        let needed = blocks(&v4, &v6, &ports);
        let free: Vec<u32> = (0..needed).map(|n| 1 + (n * 7919) % 10_007).collect();
        let mut few = Few { blocks: free.clone(), lines: BTreeMap::new() };
        let roots = build(&v4, &v6, &ports, &mut few).expect("there is room");
        assert!(few.blocks.is_empty(), "all are needed");
        assert!(few.lines.keys().all(|line| free.contains(&(line / BLOCK_LINES))));
        let line = |n: u32| few.lines.get(&n).copied().ok_or(n);
        assert!(read(&roots, line) == Ok(Some((v4.clone(), v6.clone(), ports.clone()))));
        let mut few = Few { blocks: free[1..].to_vec(), lines: BTreeMap::new() };
        assert_eq!(build(&v4, &v6, &ports, &mut few), None, "one too few");
    }
}

#[test]
fn what_is_no_tree_is_neither_read_nor_allows_anything() {
    let mut t = Memory::new(5, 0);
    let v4 = spans::<u32>(&t, 0, 200);
    t.put_rules(1, Ruleset::default(), (&v4, &[], &[]));
    let root = t.rulesets[&1].roots[0];
    let look = |t: &Memory, root| {
        let roots = Roots { roots: [root, 0], ..Roots::default() };
        read(&roots, |n: u32| t.rules.get(n as usize).copied().ok_or(()))
    };
    assert!(matches!(look(&t, root), Ok(Some(_))));
    assert_eq!(look(&t, root | 0xf << LEVELS_SHIFT), Ok(None), "too many levels");
    let beyond = t.rules.len() as u32;
    assert_eq!(look(&t, beyond), Err(()));
    assert_eq!(t.rule_v4(beyond, 5), Winner::NOT_READY);
    assert_eq!(t.rule_v6(beyond | 2 << LEVELS_SHIFT, 5, 5), Winner::NOT_READY);
    let no_records =
        [(beyond * RECORD_WORDS as u32, "beyond"), (Winner::NOT_READY, "no place"), (5, "not written")];
    for (place, why) in no_records {
        assert_eq!(ClassRecord::find(place, |line| t.rule_line(line)), None, "{why}");
        for v4 in [true, false] {
            assert_eq!(ask_class(place, v4, 5, |line| t.rule_line(line)), ClassSays::NOTHING, "{why}");
        }
    }
    // Two lines of the lowest level are the same.
    t.rules[17] = t.rules[16];
    assert_eq!(look(&t, root), Ok(None));
}
