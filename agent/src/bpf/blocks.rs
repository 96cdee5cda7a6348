//! Which blocks of `RULES` are free.

use std::collections::BTreeSet;

use datapath::keys::Line;
use datapath::limits::RULE_BLOCKS;
use datapath::rules::BLOCK_LINES;
use datapath::rules_build::{Room, Roots, build};

use crate::image::Rules;

/// The free blocks. The first is never given out, so that no root is 0.
pub(super) struct Blocks {
    free: BTreeSet<u32>,
}

/// What a version has been given.
#[derive(Debug, Default)]
pub(super) struct Given {
    /// Its places, as [`datapath::keys::Ruleset`] has them.
    pub(super) roots: Roots,
    /// Its blocks.
    pub(super) blocks: Vec<u32>,
    /// What is to be written there.
    pub(super) lines: Vec<(u32, Line)>,
}

impl Blocks {
    /// All free but these.
    pub(super) fn but(taken: impl IntoIterator<Item = u32>) -> Self {
        let mut free: BTreeSet<u32> = (1..RULE_BLOCKS).collect();
        for block in taken {
            free.remove(&block);
        }
        Self { free }
    }

    /// Gives room to a version, the lowest blocks first; `None`: there is not enough, and nothing is taken.
    pub(super) fn take(&mut self, rules: &Rules) -> Option<Given> {
        let mut taking = Taking { free: &mut self.free, given: Given::default() };
        let roots = build(&rules.v4, &rules.v6, &rules.ports, &mut taking);
        let mut given = taking.given;
        if let Some(roots) = roots {
            given.roots = roots;
            return Some(given);
        }
        self.give_back(given.blocks);
        None
    }

    /// Takes back what nobody looks at any more.
    pub(super) fn give_back(&mut self, blocks: Vec<u32>) {
        self.free.extend(blocks);
    }
}

/// Room being given.
struct Taking<'a> {
    free: &'a mut BTreeSet<u32>,
    given: Given,
}

impl Room for Taking<'_> {
    fn block(&mut self) -> Option<u32> {
        let block = self.free.pop_first()?;
        self.given.blocks.push(block);
        self.given.lines.reserve(BLOCK_LINES as usize);
        Some(block)
    }

    fn put(&mut self, line: u32, content: &Line) {
        self.given.lines.push((line, *content));
    }
}

#[cfg(test)]
mod tests {
    use datapath::rules_build::Span;

    use super::*;

    /// Rules that take so many blocks: all but one of them for leaves.
    fn rules(blocks: u32) -> Rules {
        let count = (blocks - 1) * BLOCK_LINES * 8;
        let last = |n| if n + 1 == count { u32::MAX } else { n };
        let v4 = (0..count).map(|n| Span { class: 0, last: last(n), winner: n }).collect();
        Rules { v4, ..Rules::default() }.count_blocks()
    }

    #[test]
    fn blocks_are_given_out_once_and_come_back() {
        let mut blocks = Blocks::but([1, 3, 9]);
        let first = blocks.take(&rules(4)).unwrap();
        assert_eq!(first.blocks, [2, 4, 5, 6], "not the first, nor what is taken");
        let second = blocks.take(&rules(4)).unwrap();
        assert!(second.blocks.iter().all(|block| !first.blocks.contains(block)));
        assert!(second.lines.iter().all(|(line, _)| second.blocks.contains(&(line / BLOCK_LINES))));
        let again = first.blocks.clone();
        blocks.give_back(first.blocks);
        assert_eq!(blocks.take(&rules(4)).unwrap().blocks, again);
    }

    #[test]
    fn what_finds_no_room_takes_none() {
        let mut blocks = Blocks::but(10..RULE_BLOCKS);
        assert!(blocks.take(&rules(10)).is_none());
        let given = blocks.take(&rules(9)).unwrap();
        assert_eq!(given.blocks.len(), 9, "as if nothing had been asked for");
    }
}
