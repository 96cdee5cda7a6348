//! Which of the rules for addresses wins: static search trees in `RULES`, an array of cache lines.
//!
//! The rules of one version, one port class and one family are compiled to *spans*: the whole address space cut up
//! into stretches with one winner each ([`Winner::NONE`]: no rule is for them). Longest prefixes, nesting and order are
//! resolved by then, so a look-up is one search for the span that holds the address: the first whose last address is
//! not below it.
//!
//! The spans of a table are the leaves of a B+ tree whose nodes are one [`Line`] of 64 bytes each, so that a level
//! costs one line of the CPU's caches, and all levels but the lowest are few enough to stay there: 8,000 single IPv4
//! addresses are 16,001 spans on 2,001 leaves, below 126, 8 and 1 nodes. The children of a node stand side by side, so
//! one number leads to all of them:
//!
//! | line | words |
//! |---|---|
//! | IPv4 leaf | last addresses of 8 spans, ascending; their winners |
//! | IPv4 node | last addresses of the first 15 of up to 16 children, ascending; the first child's line |
//! | IPv6 leaf | last addresses of 3 spans, of 4 words each, the lowest first; their winners; zero |
//! | IPv6 node | last addresses of the first 3 of up to 4 children; three times zero; the first child's line |
//!
//! What is not needed of a line repeats the highest address and its winner. The last span of a table ends with the
//! highest address of its family: the number of last addresses that are *below* the one looked up is therefore always
//! that of a child, or span, that is there. It is counted without branches, which random addresses would have
//! mispredicted.
//!
//! The classes of ports are found the same way, in a tree as for IPv4: its numbers are those of [`port_number`], its winners
//! are classes; 0: no rule with ports is for the port.
//!
//! A tree is named by its *root*: the line of its highest node, with the number of levels below it in the upper bits; 0:
//! there is no rule. The root of the ports and the two of class 0 stand in [`crate::keys::Ruleset`]; those of the other
//! classes in a *directory*: up to 16 lines of the first lines of blocks, in blocks of 128 classes, with 8 classes a line. It has all classes of its
//! version, also those with rules for names only; the place of class 0 has the number of the highest.
//!
//! Lines are given out by blocks of [`BLOCK_LINES`]; the children of a node, and a directory's blocks, stand within
//! one. So there is room as long as there are enough blocks, wherever they are.

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
/// Addresses in an IPv6 node, one fewer than children.
pub const NODE_V6: usize = 3;
/// The most levels below a root. IPv6's take the spans of [`crate::limits::FIREWALL_ENTRIES`] prefixes with 9.
pub const MOST_LEVELS: u32 = 10;
/// Where the number of levels stands in a root.
pub const LEVELS_SHIFT: u32 = 28;
/// A root's line.
pub const LINE_MASK: u32 = (1 << LEVELS_SHIFT) - 1;
/// The word of a node that has the first child's line.
pub const CHILD: usize = 15;
/// The first word of a leaf's winners.
pub const WINNERS_V4: usize = LEAF_V4;
/// As above, of IPv6.
pub const WINNERS_V6: usize = 4 * LEAF_V6;

const _: () = {
    // Two spans a prefix and one more, and after `MOST_LEVELS` a single node is left.
    let mut lines = (2 * crate::limits::FIREWALL_ENTRIES + 1).div_ceil(LEAF_V6);
    let mut levels = 0;
    while lines > 1 {
        lines = lines.div_ceil(NODE_V6 + 1);
        levels += 1;
    }
    assert!(levels <= MOST_LEVELS);
    assert!(crate::limits::RULES <= LINE_MASK + 1);
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

/// As [`find_v4`], of an IPv6 address in two halves.
#[inline(always)]
pub fn find_v6<B: Borrow<Line>>(root: u32, high: u64, low: u64, line: impl Fn(u32) -> Option<B>) -> u32 {
    let mut at = root & LINE_MASK;
    let levels = root >> LEVELS_SHIFT;
    let mut level = 0;
    while level < MOST_LEVELS {
        if level == levels {
            break;
        }
        let Some(node) = line(at) else { return Winner::NOT_READY };
        let words = &node.borrow().word;
        at = words[CHILD].wrapping_add(below_v6(words, high, low));
        level += 1;
    }
    let Some(leaf) = line(at) else { return Winner::NOT_READY };
    let words = &leaf.borrow().word;
    words[WINNERS_V6 + (below_v6(words, high, low) as usize & 3)]
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

/// A protocol's port as one number, in the order of both.
#[inline(always)]
#[must_use]
pub const fn port_number(protocol: u8, port: u16) -> u32 {
    (protocol as u32) << 16 | port as u32
}

/// The root of a port class' tree; 0 if there is none. `classes` is the directory's first line; 0: no class has one.
#[inline(always)]
pub fn root_of<B: Borrow<Line>>(
    classes: u32,
    class: u16,
    v4: bool,
    line: impl Fn(u32) -> Option<B>,
) -> Option<u32> {
    if classes == 0 {
        return Some(0);
    }
    let class = u32::from(class);
    let of_blocks = line(classes + (class >> 11))?;
    let block = of_blocks.borrow().word[(class >> 7) as usize & 15];
    let of_classes = line(block + (class >> 3 & 15))?;
    let first = (class as usize & 7) * 2;
    Some(of_classes.borrow().word[if v4 { first } else { first + 1 }])
}
