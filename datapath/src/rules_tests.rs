//! Trees of rules beside a plain search of the spans that they were made of.

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use crate::keys::{Line, Ruleset, Winner};
use crate::limits::FIREWALL_CLASSES;
use crate::memory::Memory;
use crate::rules::{BLOCK_LINES, LEVELS_SHIFT, root_of};
use crate::rules_build::{Address, Room, Roots, Span, blocks, build, naive, read};
use crate::tables::Tables as _;

/// Numbers of spans around all sizes at which a tree of either family gets another level, or a line is full.
const SIZES: [usize; 25] =
    [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 23, 24, 25, 47, 49, 127, 128, 129, 191, 193, 2048, 2049];

/// Addresses as numbers, and as the tables are asked for them.
trait Number: Address + From<u8> + core::ops::Add<Output = Self> + core::ops::Sub<Output = Self> {
    fn random(t: &Memory) -> Self;
    fn ask(self, t: &Memory, root: u32) -> u32;
}

impl Number for u32 {
    fn random(t: &Memory) -> Self {
        t.random()
    }
    fn ask(self, t: &Memory, root: u32) -> u32 {
        t.rule_v4(root, self)
    }
}

impl Number for u128 {
    fn random(t: &Memory) -> Self {
        // Each half often the same, and at its edges.
        let half = || match t.random() % 4 {
            0 => 0,
            1 => u64::MAX,
            2 => u64::from(t.random() % 8),
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
    lasts.into_iter().map(|last| Span { class, last, winner: t.random() }).collect()
}

/// Compares a table at the edges of all its spans and elsewhere.
fn compare<A: Number>(t: &Memory, spans: &[Span<A>], class: u16, root: u32) {
    let edges = spans.iter().filter(|span| span.class == class).flat_map(|span| {
        let after = if span.last == A::HIGHEST { span.last } else { span.last + A::from(1) };
        [span.last, after, span.last - A::from(u8::from(span.last > A::from(0)))]
    });
    let random = (0..50).map(|_| A::random(t));
    for address in edges.chain(random).chain([A::from(0), A::HIGHEST]) {
        assert_eq!(address.ask(t, root), naive(spans, class, address));
    }
}

#[test]
fn trees_of_all_sizes_say_what_their_spans_say() {
    let mut t = Memory::new(1, 0);
    for (size, id) in SIZES.into_iter().zip(1..) {
        let (v4, v6) = (spans::<u32>(&t, 0, size), spans::<u128>(&t, 0, size));
        t.put_rules(id, Ruleset::default(), (&v4, &v6, &[]));
        let [root_v4, root_v6] = t.rulesets[&id].roots;
        compare(&t, &v4, 0, root_v4);
        compare(&t, &v6, 0, root_v6);
    }
    let levels = |id| t.rulesets[&id].roots.map(|root| root >> LEVELS_SHIFT);
    assert_eq!((levels(1), levels(SIZES.len() as u32)), ([0, 0], [3, 5]));
}

#[test]
fn each_class_and_family_has_its_own_tree() {
    let mut t = Memory::new(2, 0);
    for highest in [1, 6, 7, 8, 127, 128, 2047, 2048, 5000] {
        let mut v4: Vec<Span<u32>> = Vec::new();
        let mut v6: Vec<Span<u128>> = Vec::new();
        for class in 0..=highest {
            // Some have one family only.
            if !t.random().is_multiple_of(4) || class == highest {
                v4.extend(spans(&t, class, 1 + t.random() as usize % 3));
            }
            if !t.random().is_multiple_of(4) {
                v6.extend(spans(&t, class, 1 + t.random() as usize % 6));
            }
        }
        // Classes above have rules for names only.
        let of_port = |n: u16| Span { class: 0, last: u32::from(n) * 3, winner: n.into() };
        let mut of_ports: Vec<_> = (0..=highest + 200).map(of_port).collect();
        of_ports.push(Span { class: 0, last: u32::MAX, winner: 0 });
        t.put_rules(7, Ruleset::default(), (&v4, &v6, &of_ports));
        let Ruleset { roots, classes, ports, .. } = t.rulesets[&7];
        compare(&t, &of_ports, 0, ports);
        for class in (0..highest).step_by(1 + usize::from(highest) / 50).chain(highest..=highest + 200) {
            let root = |v4: bool| match class {
                0 => roots[usize::from(!v4)],
                _ => root_of(classes, class, v4, |line| t.rule_line(line)).unwrap(),
            };
            assert_eq!(root(true) == 0, v4.iter().all(|span| span.class != class), "class {class}");
            assert_eq!(root(false) == 0, v6.iter().all(|span| span.class != class), "class {class}");
            if root(true) != 0 {
                compare(&t, &v4, class, root(true));
            }
            if root(false) != 0 {
                compare(&t, &v6, class, root(false));
            }
        }
        let line = |n: u32| t.rules.get(n as usize).copied().ok_or(());
        assert_eq!(read(&Roots { roots, classes, ports }, line), Ok(Some((v4, v6, of_ports))), "read back");
    }
    assert_eq!(root_of(0, 5, true, |line| t.rule_line(line)), Some(0), "no class has rules for addresses");
}

#[test]
fn as_many_classes_as_an_object_may_have_find_their_place() {
    let mut t = Memory::new(3, 0);
    let span = |class| Span { class, last: u32::MAX, winner: class.into() };
    let v4: Vec<_> = (1..=FIREWALL_CLASSES as u16).map(span).collect();
    t.put_rules(1, Ruleset::default(), (&v4, &[], &[]));
    let Ruleset { roots, classes, .. } = t.rulesets[&1];
    for class in [1, 2, 127, 128, 2047, 2048, 32_766, 32_767] {
        let root = root_of(classes, class, true, |line| t.rule_line(line)).unwrap();
        assert_eq!(t.rule_v4(root, 5), u32::from(class));
        assert_eq!(root_of(classes, class, false, |line| t.rule_line(line)), Some(0));
    }
    let line = |n: u32| t.rules.get(n as usize).copied().ok_or(());
    assert_eq!(read(&Roots { roots, classes, ports: 0 }, line), Ok(Some((v4, vec![], vec![]))), "read back");
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
        v4.extend(spans::<u32>(&t, 9, 40));
        v6.extend(spans::<u128>(&t, 3, 9));
        let ports = spans::<u32>(&t, 0, 1 + size / 3);
        let ports: Vec<_> = ports.into_iter().map(|s| Span { winner: s.winner % 300, ..s }).collect();
        let needed = blocks(&v4, &v6, &ports);
        let free: Vec<u32> = (0..needed).map(|n| 1 + (n * 7919) % 10_007).collect();
        let mut few = Few { blocks: free.clone(), lines: BTreeMap::new() };
        let roots = build(&v4, &v6, &ports, &mut few).expect("there is room");
        assert!(few.blocks.is_empty(), "all are needed");
        assert!(few.lines.keys().all(|line| free.contains(&(line / BLOCK_LINES))));
        let line = |n: u32| few.lines.get(&n).copied().ok_or(n);
        assert_eq!(read(&roots, line), Ok(Some((v4.clone(), v6.clone(), ports.clone()))));
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
    assert_eq!(root_of(beyond, 1, true, |line| t.rule_line(line)), None);
    // Two lines of the lowest level are the same.
    t.rules[17] = t.rules[16];
    assert_eq!(look(&t, root), Ok(None));
}
