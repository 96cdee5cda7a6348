//! Which of the rules for addresses wins: static search trees in `RULES`, an array of cache lines.
//!
//! The rules of one version, one port class and one family are compiled to *spans*: the whole address space cut up
//! into stretches with one winner each ([`Winner::NONE`]: no rule is for them). Longest prefixes, nesting and order are
//! resolved by then, so a look-up is one search for the span that holds the address: the first whose last address is
//! not below it.
//!
//! The spans of an IPv4 table are the leaves of a B+ tree whose nodes are one [`Line`] of 64 bytes each, so that a level
//! costs one line of the CPU's caches, and all levels but the lowest are few enough to stay there: 8,000 single addresses
//! are 16,001 spans on 2,001 leaves, below 126, 8 and 1 nodes. The children of a node stand side by side, so one number leads to
//! all of them:
//!
//! | line | words |
//! |---|---|
//! | leaf | last addresses of 8 spans, ascending; their winners |
//! | node | last addresses of the first 15 of up to 16 children, ascending; the first child's line |
//! | IPv6 leaf | last addresses of 3 spans, of 4 words each, the lowest first; their winners; zero |
//!
//! What is not needed of a line repeats the highest address and its winner. The last span of a table ends with the
//! highest address of its family: the number of last addresses that are *below* the one looked up is therefore always
//! that of a child, or span, that is there. It is counted without branches, which random addresses would have
//! mispredicted.
//!
//! An IPv6 address is looked up by its words of 32 bits, in up to four such trees one after another: where spans end
//! within the addresses that share their first words, the tree of these words has in place of a winner a [`LINK`] to the tree of the
//! next; where no more than three spans share the addresses, to an IPv6 leaf. Networks of one cluster or company share all but
//! one or two words, and a tree of words takes 16 ways a line where whole addresses take 4.
//!
//! A tree is named by its *root*: the line of its highest node, with the number of levels below it in the upper bits, or
//! with [`LEAF_V6_LEVELS`] there if it is an IPv6 leaf; 0: there is no rule. Those of class 0 stand in [`crate::keys::Ruleset`].
//!
//! The class of a port stands in a table of two levels for each protocol, as page tables of memory have them: a root of
//! 256 words for 256 ports each, which is a block of lines, and where these are not all of one class a block with a word for each
//! of them. Such a word is a *place*: where the class' [`ClassRecord`] is, as four times a line and which quarter of it; 0:
//! no rule with ports is for the port. A record has the roots of a class, or instead of them the few networks that its
//! rules come to: with thousands of classes each line that need not be read is one that the CPU's caches need not have.
//!
//! Lines are given out by blocks of [`BLOCK_LINES`]; the children of a node stand within one. So there is room as long as
//! there are enough blocks, wherever they are.

use core::borrow::Borrow;

use crate::keys::{Line, Winner};

/// Lines of a block.
pub const BLOCK_LINES: u32 = 16;
/// Spans of an IPv4 leaf.
pub const LEAF_V4: usize = 8;
/// Addresses in an IPv4 node, one fewer than children.
pub const NODE_V4: usize = 15;
/// Spans of an IPv6 leaf.
pub const LEAF_V6: usize = 3;
/// The most levels below a root.
pub const MOST_LEVELS: u32 = 6;
/// In place of the number of levels: the root is an IPv6 leaf.
pub const LEAF_V6_LEVELS: u32 = 15;
/// Where the number of levels stands in a root.
pub const LEVELS_SHIFT: u32 = 28;
/// In place of a winner among the words of IPv6 addresses: with it the word is the root of what the next words are looked up
/// in. Winners are below it, but for those that are no rule's.
pub const LINK: u32 = 1 << 27;
/// A root's line.
pub const LINE_MASK: u32 = LINK - 1;
/// Words of an IPv6 address.
pub const WORDS_V6: u32 = 4;
/// The word of a node that has the first child's line.
pub const CHILD: usize = 15;
/// The first word of a leaf's winners.
pub const WINNERS_V4: usize = LEAF_V4;
/// As above, of IPv6.
pub const WINNERS_V6: usize = 4 * LEAF_V6;

const _: () = {
    // Two spans a prefix and one more, and after `MOST_LEVELS` a single node is left.
    let mut lines = (2 * crate::limits::FIREWALL_ENTRIES + 1).div_ceil(LEAF_V4);
    let mut levels = 0;
    while lines > 1 {
        lines = lines.div_ceil(NODE_V4 + 1);
        levels += 1;
    }
    assert!(levels <= MOST_LEVELS);
    assert!(crate::limits::RULES <= LINE_MASK + 1);
    assert!(Winner::new(crate::limits::FIREWALL_RULES as u32, true).order < LINK);
};

/// The winner for an IPv4 address, in host byte order, as [`Winner::order`]. `line` gives lines by number; where there
/// is none, which only a broken tree asks for, nothing is allowed.
#[inline(always)]
pub fn find_v4<B: Borrow<Line>>(root: u32, address: u32, line: impl Fn(u32) -> Option<B>) -> u32 {
    let mut at = root & LINE_MASK;
    let levels = root >> LEVELS_SHIFT;
    let mut level = 0;
    while level < MOST_LEVELS {
        if level == levels {
            break;
        }
        let Some(node) = line(at) else { return Winner::NOT_READY };
        let words = &node.borrow().word;
        at = words[CHILD].wrapping_add(below_v4::<{ NODE_V4 + 1 }>(words, address));
        level += 1;
    }
    let Some(leaf) = line(at) else { return Winner::NOT_READY };
    let words = &leaf.borrow().word;
    words[WINNERS_V4 + (below_v4::<LEAF_V4>(words, address) as usize & (LEAF_V4 - 1))]
}

/// As [`find_v4`], of an IPv6 address in two halves. `search` is [`find_v4`].
#[inline(always)]
pub fn find_v6<B: Borrow<Line>>(
    root: u32,
    high: u64,
    low: u64,
    search: impl Fn(u32, u32) -> u32,
    line: impl Fn(u32) -> Option<B>,
) -> u32 {
    let mut root = root;
    let mut nth = 0;
    while nth < WORDS_V6 {
        if root >> LEVELS_SHIFT == LEAF_V6_LEVELS {
            let Some(leaf) = line(root & LINE_MASK) else { return Winner::NOT_READY };
            let words = &leaf.borrow().word;
            return words[WINNERS_V6 + (below_v6(words, high, low) as usize & 3)];
        }
        let half = if nth < 2 { high } else { low };
        let found = search(root, (half >> (32 - nth % 2 * 32)) as u32);
        if found >= Winner::NOT_READY || found & LINK == 0 {
            return found;
        }
        root = found & !LINK;
        nth += 1;
    }
    Winner::NOT_READY
}

/// How many of the first addresses of a line, one fewer than `SIZE`, a power of two, are below one. The middle one says in
/// which half to count.
#[inline(always)]
fn below_v4<const SIZE: usize>(words: &[u32; 16], address: u32) -> u32 {
    let half = SIZE / 2;
    // What is borrowed stands in all upper bits. (As the highest bit alone, LLVM makes branches of it.)
    let borrowed = |word: u32| u64::from(word).wrapping_sub(u64::from(address)) >> 32;
    let begin = borrowed(words[half - 1]) as usize & half;
    let mut count = 0_u64;
    let mut i = 0;
    while i < half - 1 {
        // In 32 bits, -1.
        count = count.wrapping_add(borrowed(words[begin + i]));
        i += 1;
    }
    (begin as u32).wrapping_sub(count as u32)
}

/// As above, of the three addresses of an IPv6 line.
#[inline(always)]
fn below_v6(words: &[u32; 16], high: u64, low: u64) -> u32 {
    let mut count = 0;
    let mut i = 0;
    while i < 3 {
        let half = |first: usize| u64::from(words[first]) | u64::from(words[first + 1]) << 32;
        count += is_below_128((half(4 * i + 2), half(4 * i)), (high, low));
        i += 1;
    }
    count as u32
}

/// 1 if `a` is below `b`, numbers of 128 bits in two halves: what is borrowed in the end when they are subtracted
/// (Warren, Hacker's Delight, 2-13).
#[inline(always)]
const fn is_below_128(a: (u64, u64), b: (u64, u64)) -> u64 {
    let borrow = borrows(a.1, b.1, a.1.wrapping_sub(b.1));
    borrows(a.0, b.0, a.0.wrapping_sub(b.0).wrapping_sub(borrow))
}

/// What is borrowed where `a - b`, less perhaps 1, is `difference`.
#[inline(always)]
const fn borrows(a: u64, b: u64, difference: u64) -> u64 {
    ((!a & b) | (!(a ^ b) & difference)) >> 63
}

/// A protocol's port as one number, in the order of both: what spans of ports are counted in.
#[inline(always)]
#[must_use]
pub const fn port_number(protocol: u8, port: u16) -> u32 {
    (protocol as u32) << 16 | port as u32
}

/// A word of a port table's root that leads to a page.
pub const PAGE: u32 = 1 << 31;
/// Ports of a page, and pages of a protocol.
pub const PAGE_PORTS: usize = 256;

/// The place of a port's class; 0: no rule with ports is for it. `root` is the first line of its protocol's table; 0: no
/// rule is for the protocol. `None`: the table is broken.
#[inline(always)]
pub fn class_place<B: Borrow<Line>>(root: u32, port: u16, line: impl Fn(u32) -> Option<B>) -> Option<u32> {
    if root == 0 {
        return Some(0);
    }
    let port = u32::from(port);
    let of_page = line(root + (port >> 12))?.borrow().word[(port >> 8) as usize & 15];
    if of_page & PAGE == 0 {
        return Some(of_page);
    }
    Some(line((of_page & !PAGE) + (port >> 4 & 15))?.borrow().word[port as usize & 15])
}

/// What a port class has for rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClassRecord {
    /// The class, above 0.
    pub class: u16,
    /// Its rules for addresses.
    pub rules: ClassRules,
}

/// The rules for addresses of a port class.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClassRules {
    /// The roots of trees for IPv4 and IPv6; 0: there are none.
    Trees([u32; 2]),
    /// One stretch of IPv4 addresses, and no rule for IPv6.
    One(Stretch),
    /// Several, apart from each other; what is not needed has no addresses.
    Few([Stretch; FEW]),
    /// All addresses of both families have this winner.
    All(u32),
}

/// IPv4 addresses with one winner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    /// The first address, in host byte order.
    pub first: u32,
    /// The last.
    pub last: u32,
    /// The winner, as [`Winner::order`].
    pub winner: u32,
}

impl Stretch {
    /// Without addresses.
    pub const EMPTY: Self = Self { first: 1, last: 0, winner: Winner::NONE };
}

/// The most stretches of [`ClassRules::Few`].
pub const FEW: usize = 4;
/// Words of a record, and records of a line.
pub const RECORD_WORDS: usize = 4;
/// What the last word of a record says of its form, above the class; 0 is none, so that a line that was not written is no
/// record. The words before it: the roots; the stretch; nothing and a winner. What is [`ClassRules::Few`] is the last
/// quarter of a line, before which stand the first addresses, the last addresses, and the winners.
const TREES: u32 = 1;
const ONE: u32 = 2;
const FEW_FORM: u32 = 3;
const ALL: u32 = 4;

/// What a class' record says of a destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClassSays {
    /// The class.
    pub class: u16,
    /// The root of the tree to be asked; 0: there is none.
    pub root: u32,
    /// Without a root: the winner.
    pub rule: u32,
}

impl ClassSays {
    /// There is no record.
    pub const NOTHING: Self = Self { class: 0, root: 0, rule: Winner::NOT_READY };

    /// As one word: a function of the kernel programs returns nothing larger.
    #[inline(always)]
    #[must_use]
    pub const fn to_word(self) -> u64 {
        let above = (self.class as u64) << 48 | ((self.root != 0) as u64) << 32;
        above | if self.root == 0 { self.rule } else { self.root } as u64
    }

    /// From [`ClassSays::to_word`].
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        let (class, value) = ((word >> 48) as u16, word as u32);
        if word >> 32 & 1 == 0 {
            return Self { class, root: 0, rule: value };
        }
        Self { class, root: value, rule: Winner::NONE }
    }
}

/// Asks the record at a place about an IPv4 address in host byte order, or, without `v4`, about one of IPv6.
#[inline(always)]
pub fn ask_class<B: Borrow<Line>>(
    place: u32,
    v4: bool,
    address: u32,
    line: impl Fn(u32) -> Option<B>,
) -> ClassSays {
    let Some(line) = line(place / RECORD_WORDS as u32) else { return ClassSays::NOTHING };
    let words = &line.borrow().word;
    let at = place as usize % RECORD_WORDS * RECORD_WORDS;
    let class = words[at + 3] as u16;
    let rule = |rule| ClassSays { class, root: 0, rule };
    match words[at + 3] >> 16 {
        TREES => match words[at + usize::from(!v4)] {
            0 => rule(Winner::NONE),
            root => ClassSays { class, root, rule: Winner::NONE },
        },
        ONE if v4 && words[at] <= address && address <= words[at + 1] => rule(words[at + 2]),
        FEW_FORM if v4 => rule(find_few(words, address)),
        ONE | FEW_FORM => rule(Winner::NONE),
        ALL => rule(words[at + 2]),
        _ => ClassSays::NOTHING,
    }
}

/// The winner for an address among the stretches of [`ClassRules::Few`].
#[inline(always)]
fn find_few(words: &[u32; 16], address: u32) -> u32 {
    let mut found = Winner::NONE;
    let mut n = 0;
    while n < FEW {
        if words[n] <= address && address <= words[FEW + n] {
            found = words[2 * FEW + n];
        }
        n += 1;
    }
    found
}

impl ClassRecord {
    /// Reads the record at a place. `None`: there is none.
    pub fn find<B: Borrow<Line>>(place: u32, line: impl Fn(u32) -> Option<B>) -> Option<Self> {
        let line = line(place / RECORD_WORDS as u32)?;
        let quarters = line.borrow().word.as_chunks::<RECORD_WORDS>().0;
        let [a, b, c, d] = quarters[place as usize % RECORD_WORDS];
        let rules = match d >> 16 {
            TREES => ClassRules::Trees([a, b]),
            ONE => ClassRules::One(Stretch { first: a, last: b, winner: c }),
            FEW_FORM => ClassRules::Few([0, 1, 2, 3].map(|n| Stretch {
                first: quarters[0][n],
                last: quarters[1][n],
                winner: quarters[2][n],
            })),
            ALL => ClassRules::All(c),
            _ => return None,
        };
        Some(Self { class: d as u16, rules })
    }

    /// Its words, of which those before the last [`RECORD_WORDS`] may be nothing.
    #[must_use]
    pub fn words(&self) -> ([u32; 3 * FEW], [u32; RECORD_WORDS]) {
        let mut before = [0; 3 * FEW];
        let ([a, b, c], form) = match self.rules {
            ClassRules::Trees([v4, v6]) => ([v4, v6, 0], TREES),
            ClassRules::One(Stretch { first, last, winner }) => ([first, last, winner], ONE),
            ClassRules::Few(stretches) => {
                for (n, Stretch { first, last, winner }) in stretches.into_iter().enumerate() {
                    (before[n], before[FEW + n], before[2 * FEW + n]) = (first, last, winner);
                }
                ([0; 3], FEW_FORM)
            }
            ClassRules::All(winner) => ([0, 0, winner], ALL),
        };
        (before, [a, b, c, form << 16 | u32::from(self.class)])
    }
}
