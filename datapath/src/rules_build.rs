//! Makes the trees that [`crate::rules`] describes, and reads them back: for the agent, for tests and for oracles.

use std::vec::Vec;

use crate::keys::{Line, Winner};
use crate::rules::{
    BLOCK_LINES, CHILD, LEAF_V4, LEAF_V6, LEVELS_SHIFT, LINE_MASK, MOST_LEVELS, NODE_V4, NODE_V6, WINNERS_V4,
    WINNERS_V6,
};

/// A stretch of addresses with one winner: from behind the span before it, or the lowest address, to `last`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Span<A> {
    /// The port class; 0: rules without ports.
    pub class: u16,
    /// Its last address.
    pub last: A,
    /// As [`Winner::order`]; [`Winner::NONE`]: no rule is for them.
    pub winner: u32,
}

/// Addresses of a family, as numbers.
pub trait Address: Copy + Ord {
    /// The lowest.
    const LOWEST: Self;
    /// The highest.
    const HIGHEST: Self;
    /// Spans of a leaf.
    const LEAF: usize;
    /// Addresses in a node, one fewer than children.
    const NODE: usize;
    /// The first word of a leaf's winners.
    const WINNERS: usize;
    /// Which root of two is a table's of this family.
    const FAMILY: usize;
    /// The nth address of a line.
    fn of(line: &Line, nth: usize) -> Self;
    /// Puts it there.
    fn put(self, line: &mut Line, nth: usize);
}

impl Address for u32 {
    const LOWEST: Self = 0;
    const HIGHEST: Self = Self::MAX;
    const LEAF: usize = LEAF_V4;
    const NODE: usize = NODE_V4;
    const WINNERS: usize = WINNERS_V4;
    const FAMILY: usize = 0;
    fn of(line: &Line, nth: usize) -> Self {
        line.word[nth]
    }
    fn put(self, line: &mut Line, nth: usize) {
        line.word[nth] = self;
    }
}

impl Address for u128 {
    const LOWEST: Self = 0;
    const HIGHEST: Self = Self::MAX;
    const LEAF: usize = LEAF_V6;
    const NODE: usize = NODE_V6;
    const WINNERS: usize = WINNERS_V6;
    const FAMILY: usize = 1;
    fn of(line: &Line, nth: usize) -> Self {
        (0..4).map(|i| Self::from(line.word[4 * nth + i]) << (32 * i)).sum()
    }
    fn put(self, line: &mut Line, nth: usize) {
        for i in 0..4 {
            line.word[4 * nth + i] = (self >> (32 * i)) as u32;
        }
    }
}

/// Where the tables of a version are: as in [`crate::keys::Ruleset`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Roots {
    /// Of class 0: IPv4, IPv6.
    pub roots: [u32; 2],
    /// The first line of the directory of the other classes; 0: there are none.
    pub classes: u32,
    /// Of the ports.
    pub ports: u32,
}

/// Where lines are put.
pub trait Room {
    /// Gives a block that is free, by its number; `None`: there is none. Line numbers begin with 16 times that.
    fn block(&mut self) -> Option<u32>;
    /// Puts a line.
    fn put(&mut self, line: u32, content: &Line);
}

/// Makes the trees of a version from its spans, which are sorted, and whose classes each end with the highest address.
/// `ports` are the spans of port numbers, with their class for winner and no class of their own: all classes are there.
/// `None`: there is no room; some lines may have been put by then.
pub fn build(
    v4: &[Span<u32>],
    v6: &[Span<u128>],
    ports: &[Span<u32>],
    room: &mut impl Room,
) -> Option<Roots> {
    let mut writer = Writer { room, next: 0, left: 0 };
    let mut found = Roots::default();
    let mut classes: Vec<[u32; 2]> = Vec::new();
    writer.tables(v4, &mut found, &mut classes)?;
    writer.tables(v6, &mut found, &mut classes)?;
    if !ports.is_empty() {
        found.ports = writer.tree(ports)?;
    }
    if !classes.is_empty() {
        classes.resize(classes.len().max(highest_class(ports) + 1), [0; 2]);
        classes[0] = [classes.len() as u32 - 1, 0];
        found.classes = writer.directory(&classes)?;
    }
    Some(found)
}

/// How many blocks [`build`] takes. It is told from the number of spans alone, without making the lines.
#[must_use]
pub fn blocks(v4: &[Span<u32>], v6: &[Span<u128>], ports: &[Span<u32>]) -> u32 {
    let mut count = Count { blocks: 0, left: 0 };
    let mut highest = None;
    for (class, spans) in tables(v4) {
        count.tree::<u32>(spans.len());
        highest = highest.max(Some(class));
    }
    for (class, spans) in tables(v6) {
        count.tree::<u128>(spans.len());
        highest = highest.max(Some(class));
    }
    if !ports.is_empty() {
        count.tree::<u32>(ports.len());
    }
    if let Some(highest @ 1..) = highest {
        count.directory(usize::from(highest).max(highest_class(ports)) + 1);
    }
    count.blocks
}

/// Counts blocks as [`Writer`] takes them.
struct Count {
    blocks: u32,
    left: usize,
}

impl Count {
    fn put(&mut self, lines: usize) {
        if lines > self.left {
            self.blocks += 1;
            self.left = BLOCK_LINES as usize;
        }
        self.left -= lines;
    }

    fn tree<A: Address>(&mut self, spans: usize) {
        let mut lines = spans.div_ceil(A::LEAF);
        while lines > 1 {
            let most = A::NODE + 1;
            for _ in 0..lines / most {
                self.put(most);
            }
            self.put(lines % most);
            lines = lines.div_ceil(most);
        }
        self.put(1);
    }

    fn directory(&mut self, classes: usize) {
        let in_block = 8 * BLOCK_LINES as usize;
        let blocks = classes.div_ceil(in_block);
        for n in 0..blocks {
            self.put((classes - n * in_block).min(in_block).div_ceil(8));
        }
        self.put(blocks.div_ceil(16));
    }
}

/// The tables of spans that are sorted: their classes and spans.
fn tables<A: Address>(spans: &[Span<A>]) -> impl Iterator<Item = (u16, &[Span<A>])> {
    let mut rest = spans;
    std::iter::from_fn(move || {
        let class = rest.first()?.class;
        let (table, after) = rest.split_at(rest.partition_point(|span| span.class <= class));
        rest = after;
        Some((class, table))
    })
}

/// The highest class of ports.
fn highest_class(ports: &[Span<u32>]) -> usize {
    ports.iter().map(|span| span.winner as usize).max().unwrap_or(0)
}

struct Writer<'a, R> {
    room: &'a mut R,
    /// The next line of the block at hand, and how many it has left.
    next: u32,
    left: u32,
}

impl<R: Room> Writer<'_, R> {
    /// Puts lines side by side, at most a block of them. Gives the number of the first.
    fn put(&mut self, lines: &[Line]) -> Option<u32> {
        let count = lines.len() as u32;
        if count > self.left {
            (self.next, self.left) = (self.room.block()? * BLOCK_LINES, BLOCK_LINES);
        }
        let first = self.next;
        for (line, n) in lines.iter().zip(first..) {
            self.room.put(n, line);
        }
        self.next += count;
        self.left -= count;
        Some(first)
    }

    /// Puts the tables of a family. Roots of other classes than 0 go to `classes`.
    fn tables<A: Address>(
        &mut self,
        spans: &[Span<A>],
        found: &mut Roots,
        classes: &mut Vec<[u32; 2]>,
    ) -> Option<()> {
        for (class, table) in tables(spans) {
            let root = self.tree(table)?;
            let class = usize::from(class);
            if class == 0 {
                found.roots[A::FAMILY] = root;
            } else {
                classes.resize(classes.len().max(class + 1), [0; 2]);
                classes[class][A::FAMILY] = root;
            }
        }
        Some(())
    }

    /// Puts a tree. Gives its root.
    fn tree<A: Address>(&mut self, spans: &[Span<A>]) -> Option<u32> {
        let mut level: Vec<(A, Line)> = spans.chunks(A::LEAF).map(leaf).collect();
        let mut levels = 0;
        while level.len() > 1 {
            let mut above = Vec::with_capacity(level.len().div_ceil(A::NODE + 1));
            for children in level.chunks(A::NODE + 1) {
                let lines: Vec<Line> = children.iter().map(|(_, line)| *line).collect();
                let mut node = Line { word: [0; 16] };
                for nth in 0..A::NODE {
                    children.get(nth).map_or(A::HIGHEST, |(last, _)| *last).put(&mut node, nth);
                }
                node.word[CHILD] = self.put(&lines)?;
                above.push((children[children.len() - 1].0, node));
            }
            level = above;
            levels += 1;
        }
        let root = self.put(&[level[0].1])?;
        Some(root | levels << LEVELS_SHIFT)
    }

    /// Puts the directory of classes. Gives its first line.
    fn directory(&mut self, classes: &[[u32; 2]]) -> Option<u32> {
        let mut blocks = Vec::new();
        for block in classes.chunks(8 * BLOCK_LINES as usize) {
            let lines: Vec<Line> = block.chunks(8).map(|roots| words(roots.as_flattened())).collect();
            blocks.push(self.put(&lines)?);
        }
        let lines: Vec<Line> = blocks.chunks(16).map(words).collect();
        self.put(&lines)
    }
}

/// A line of at most 16 words.
fn words(some: &[u32]) -> Line {
    let mut line = Line { word: [0; 16] };
    line.word[..some.len()].copy_from_slice(some);
    line
}

/// A leaf, and its last address.
fn leaf<A: Address>(spans: &[Span<A>]) -> (A, Line) {
    let mut line = Line { word: [0; 16] };
    let last = spans[spans.len() - 1];
    for nth in 0..A::LEAF {
        let (address, winner) = spans.get(nth).map_or((A::HIGHEST, last.winner), |s| (s.last, s.winner));
        address.put(&mut line, nth);
        line.word[A::WINNERS + nth] = winner;
    }
    (last.last, line)
}

/// The spans of a version: of IPv4, IPv6 and port numbers.
pub type Spans = (Vec<Span<u32>>, Vec<Span<u128>>, Vec<Span<u32>>);

/// Reads what [`build`] has made. `line` gives lines by number.
///
/// # Errors
/// Those of `line`; `Ok(None)`: there are no such trees.
pub fn read<E>(roots: &Roots, mut line: impl FnMut(u32) -> Result<Line, E>) -> Result<Option<Spans>, E> {
    let (mut v4, mut v6, mut ports) = (Vec::new(), Vec::new(), Vec::new());
    let mut all = std::vec![(0, roots.roots)];
    if roots.classes != 0 {
        let mut highest = None;
        for of_blocks in 0..BLOCK_LINES {
            let blocks = line(roots.classes.wrapping_add(of_blocks))?.word;
            for (block, first) in (of_blocks * 16..).zip(blocks) {
                for nth in 0..BLOCK_LINES {
                    let class = (block * BLOCK_LINES + nth) * 8;
                    if highest.is_some_and(|highest| class > highest) {
                        break;
                    }
                    let of_classes = line(first.wrapping_add(nth))?.word;
                    let highest = *highest.get_or_insert(of_classes[0]);
                    for (class, roots) in (class..=highest).zip(of_classes.as_chunks().0) {
                        if class != 0 {
                            all.push((class as u16, *roots));
                        }
                    }
                }
            }
            if highest.is_none_or(|highest| (of_blocks + 1) << 11 > highest) {
                break;
            }
        }
    }
    for (class, [root_v4, root_v6]) in &all {
        if !read_tree(*class, *root_v4, &mut line, &mut v4)?
            || !read_tree(*class, *root_v6, &mut line, &mut v6)?
        {
            return Ok(None);
        }
    }
    if !read_tree(0, roots.ports, &mut line, &mut ports)? {
        return Ok(None);
    }
    Ok(Some((v4, v6, ports)))
}

/// Adds a tree's spans. Whether it is one.
fn read_tree<A: Address, E>(
    class: u16,
    root: u32,
    line: &mut impl FnMut(u32) -> Result<Line, E>,
    spans: &mut Vec<Span<A>>,
) -> Result<bool, E> {
    if root == 0 {
        return Ok(true);
    }
    let levels = root >> LEVELS_SHIFT;
    if levels > MOST_LEVELS {
        return Ok(false);
    }
    let begin = spans.len();
    // Nodes that are to be looked at, the next one last: levels below it, line, last address.
    let mut next = std::vec![(levels, root & LINE_MASK, A::HIGHEST)];
    while let Some((levels, at, end)) = next.pop() {
        let content = line(at)?;
        if levels > 0 {
            let lasts: Vec<A> = (0..A::NODE).map(|nth| A::of(&content, nth)).collect();
            let inner = lasts.iter().take_while(|last| **last < end).count();
            next.push((levels - 1, content.word[CHILD].wrapping_add(inner as u32), end));
            for nth in (0..inner).rev() {
                next.push((levels - 1, content.word[CHILD].wrapping_add(nth as u32), lasts[nth]));
            }
            continue;
        }
        for nth in 0..A::LEAF {
            let last = A::of(&content, nth);
            let before = spans[begin..].last().map(|span| span.last);
            if before.is_some_and(|before| before >= last) || last > end {
                return Ok(false);
            }
            spans.push(Span { class, last, winner: content.word[A::WINNERS + nth] });
            if last == end {
                break;
            }
        }
        if spans[begin..].last().is_none_or(|span| span.last != end) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The winner for an address, found the plainest way: the oracle of the trees.
#[must_use]
pub fn naive<A: Address>(spans: &[Span<A>], class: u16, address: A) -> u32 {
    let of_class = spans.iter().filter(|span| span.class == class);
    of_class.filter(|span| span.last >= address).map(|span| span.winner).next().unwrap_or(Winner::NONE)
}
