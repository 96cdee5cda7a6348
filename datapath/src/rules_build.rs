//! Makes the trees that [`crate::rules`] describes, and reads them back: for the agent, for tests and for oracles.

use std::boxed::Box;
use std::collections::BTreeMap;
use std::vec::Vec;

use crate::keys::{Line, Winner};
use crate::packet::{SCTP, TCP, UDP};
use crate::rules::{
    BLOCK_LINES, CHILD, ClassRecord, ClassRules, FEW, LEAF_V4, LEAF_V6, LEAF_V6_LEVELS, LEVELS_SHIFT,
    LINE_MASK, LINK, MOST_LEVELS, NODE_V4, PAGE, PAGE_PORTS, RECORD_WORDS, Stretch, WINNERS_V4, WINNERS_V6,
    WORDS_V6, port_number,
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
    /// The first word of a leaf's winners.
    const WINNERS: usize;
    /// The nth address of a line.
    fn of(line: &Line, nth: usize) -> Self;
    /// Puts it there.
    fn put(self, line: &mut Line, nth: usize);
}

impl Address for u32 {
    const LOWEST: Self = 0;
    const HIGHEST: Self = Self::MAX;
    const LEAF: usize = LEAF_V4;
    const WINNERS: usize = WINNERS_V4;
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
    const WINNERS: usize = WINNERS_V6;
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
    /// Of the tables of ports, by [`PORT_PROTOCOLS`].
    pub ports: [u32; 3],
}

/// The protocols whose ports rules can name, as roots of tables of ports stand.
pub const PORT_PROTOCOLS: [u8; 3] = [TCP, UDP, SCTP];

/// Where lines are put.
pub trait Room {
    /// Gives a block that is free, by its number; `None`: there is none. Line numbers begin with 16 times that.
    fn block(&mut self) -> Option<u32>;
    /// Puts a line.
    fn put(&mut self, line: u32, content: &Line);
}

/// Makes the trees of a version from its spans, which are sorted, and whose classes each end with the highest address.
/// `ports` are the spans of port numbers, with their class for winner and no class of their own: all classes above 0 are
/// there. `None`: there is no room; some lines may have been put by then.
pub fn build(
    v4: &[Span<u32>],
    v6: &[Span<u128>],
    ports: &[Span<u32>],
    room: &mut impl Room,
) -> Option<Roots> {
    let mut writer = Writer { room, next: 0, left: 0 };
    let mut found = Roots::default();
    let mut records = Vec::new();
    for (class, v4, v6) in classes(v4, v6, ports) {
        let rules = match form(class, v4, v6) {
            Some(rules) => rules,
            None => ClassRules::Trees([writer.root_v4(v4)?, writer.root_v6(v6)?]),
        };
        if let (0, ClassRules::Trees(roots)) = (class, rules) {
            found.roots = roots;
        } else {
            records.push(ClassRecord { class, rules });
        }
    }
    let places = writer.records(&records)?;
    let place = |class: &u32| if *class == 0 { 0 } else { places[*class as usize - 1] };
    for (root, protocol) in found.ports.iter_mut().zip(PORT_PROTOCOLS) {
        if let Some(pages) = pages(ports, protocol) {
            let words = pages.iter().map(|page| match page {
                Page::Same(class) => Some(place(class)),
                Page::Each(classes) => Some(writer.block(classes.iter().map(place))? | PAGE),
            });
            let words = words.collect::<Option<Vec<_>>>()?;
            *root = writer.block(words.into_iter())?;
        }
    }
    Some(found)
}

/// How many blocks [`build`] takes.
#[must_use]
pub fn blocks(v4: &[Span<u32>], v6: &[Span<u128>], ports: &[Span<u32>]) -> u32 {
    struct Count(u32);
    impl Room for Count {
        fn block(&mut self) -> Option<u32> {
            self.0 += 1;
            Some(self.0)
        }
        fn put(&mut self, _: u32, _: &Line) {}
    }
    let mut count = Count(0);
    // Where there is always room, it does not end early.
    let _ = build(v4, v6, ports, &mut count);
    count.0
}

/// The classes of a page's ports.
enum Page {
    /// All have one, or none (0).
    Same(u32),
    /// The class of each.
    Each(Box<[u32; PAGE_PORTS]>),
}

/// A protocol's pages; `None`: no port of it has a class.
fn pages(ports: &[Span<u32>], protocol: u8) -> Option<Vec<Page>> {
    let (first, last) = (port_number(protocol, 0), port_number(protocol, u16::MAX));
    let mut at = ports.partition_point(|span| span.last < first);
    let end = ports.partition_point(|span| span.last < last);
    if ports.get(at..=end)?.iter().all(|span| span.winner == 0) {
        return None;
    }
    let mut class = |number: u32| {
        while ports[at].last < number {
            at += 1;
        }
        ports[at]
    };
    let pages = (first..=last).step_by(PAGE_PORTS).map(|first| {
        let span = class(first);
        if span.last - first >= PAGE_PORTS as u32 - 1 {
            return Page::Same(span.winner);
        }
        let mut classes = Box::new([0; PAGE_PORTS]);
        for (n, place) in (first..).zip(classes.iter_mut()) {
            *place = class(n).winner;
        }
        Page::Each(classes)
    });
    Some(pages.collect())
}

/// All classes of a version, 0 too, and the spans of each.
fn classes<'a>(
    v4: &'a [Span<u32>],
    v6: &'a [Span<u128>],
    ports: &[Span<u32>],
) -> impl Iterator<Item = (u16, &'a [Span<u32>], &'a [Span<u128>])> {
    let (mut v4, mut v6) = (v4, v6);
    let highest = ports.iter().map(|span| span.winner as u16).max().unwrap_or(0);
    (0..=highest).map(move |class| (class, split(&mut v4, class), split(&mut v6, class)))
}

/// Takes a class' spans from the front.
fn split<'a, A>(spans: &mut &'a [Span<A>], class: u16) -> &'a [Span<A>] {
    let (table, rest) = spans.split_at(spans.iter().take_while(|span| span.class == class).count());
    *spans = rest;
    table
}

/// The rules of a class that needs no trees.
fn form(class: u16, v4: &[Span<u32>], v6: &[Span<u128>]) -> Option<ClassRules> {
    if class == 0 {
        return None;
    }
    if let ([v4], [v6]) = (v4, v6)
        && v4.winner == v6.winner
    {
        return Some(ClassRules::All(v4.winner));
    }
    if v4.is_empty() || !v6.is_empty() {
        return None;
    }
    let (mut stretches, mut count, mut first) = ([Stretch::EMPTY; FEW], 0, 0);
    for Span { last, winner, .. } in v4 {
        if *winner != Winner::NONE {
            *stretches.get_mut(count)? = Stretch { first, last: *last, winner: *winner };
            count += 1;
        }
        first = last.wrapping_add(1);
    }
    Some(if count == 1 { ClassRules::One(stretches[0]) } else { ClassRules::Few(stretches) })
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

    /// Puts an IPv4 table's tree. Gives its root; 0: it has no spans.
    fn root_v4(&mut self, spans: &[Span<u32>]) -> Option<u32> {
        if spans.is_empty() { Some(0) } else { self.tree(spans) }
    }

    /// As above, of IPv6.
    fn root_v6(&mut self, spans: &[Span<u128>]) -> Option<u32> {
        if spans.is_empty() { Some(0) } else { self.tree_v6(spans, 0, 0) }
    }

    /// Puts what the nth words of addresses are looked up in, and what hangs on it. The spans are those from `first` to
    /// the last address with the same words before.
    fn tree_v6(&mut self, spans: &[Span<u128>], first: u128, nth: u32) -> Option<u32> {
        if spans.len() <= LEAF_V6 {
            return Some(self.put(&[leaf(spans).1])? | LEAF_V6_LEVELS << LEVELS_SHIFT);
        }
        let end = end(first, nth);
        let mut words = Vec::new();
        let (mut begin, mut at) = (first, 0);
        loop {
            let word = (begin >> shift(nth)) as u32;
            // The last address that shares the word.
            let last = begin | behind(nth);
            let count = spans[at..].iter().take_while(|span| span.last < last).count();
            let next = if count == 0 {
                // All addresses up to the last whole word have one winner.
                let span = spans[at];
                let whole = match span.last.checked_add(1) {
                    Some(after) if span.last < end => (after & !behind(nth)) - 1,
                    _ => end,
                };
                up_to(&mut words, 0, (whole >> shift(nth)) as u32, span.winner);
                at += usize::from(span.last == whole);
                whole
            } else {
                let mut inner = spans[at..=at + count].to_vec();
                inner[count].last = last;
                let link = self.tree_v6(&inner, begin, nth + 1)? | LINK;
                up_to(&mut words, 0, word, link);
                at += count + usize::from(spans[at + count].last == last);
                last
            };
            if next == end {
                break;
            }
            begin = next + 1;
        }
        self.tree(&words)
    }

    /// Puts a tree. Gives its root.
    fn tree(&mut self, spans: &[Span<u32>]) -> Option<u32> {
        let mut level: Vec<(u32, Line)> = spans.chunks(LEAF_V4).map(leaf).collect();
        let mut levels = 0;
        while level.len() > 1 {
            let mut above = Vec::with_capacity(level.len().div_ceil(NODE_V4 + 1));
            for children in level.chunks(NODE_V4 + 1) {
                let lines: Vec<Line> = children.iter().map(|(_, line)| *line).collect();
                let lasts = children.iter().map(|(last, _)| *last).chain(std::iter::repeat(u32::MAX));
                let mut node = words_of(lasts.take(NODE_V4));
                node.word[CHILD] = self.put(&lines)?;
                above.push((children[children.len() - 1].0, node));
            }
            level = above;
            levels += 1;
        }
        let root = self.put(&[level[0].1])?;
        Some(root | levels << LEVELS_SHIFT)
    }

    /// Puts a block's words. Gives its first line.
    fn block(&mut self, words: impl Iterator<Item = u32>) -> Option<u32> {
        let words: Vec<u32> = words.collect();
        let lines: Vec<Line> = words.chunks(16).map(|words| words_of(words.iter().copied())).collect();
        self.put(&lines)
    }

    /// Puts records, and gives the place of each.
    fn records(&mut self, records: &[ClassRecord]) -> Option<Vec<u32>> {
        let mut places = std::vec![0; records.len()];
        let last = RECORD_WORDS as u32 - 1;
        let (lines, quarters): (Vec<usize>, Vec<usize>) =
            (0..records.len()).partition(|n| matches!(records[*n].rules, ClassRules::Few(_)));
        for n in lines {
            let (before, words) = records[n].words();
            places[n] = self.put(&[words_of(before.into_iter().chain(words))])? * RECORD_WORDS as u32 + last;
        }
        for some in quarters.chunks(RECORD_WORDS) {
            let line = self.put(&[words_of(some.iter().flat_map(|n| records[*n].words().1))])?;
            for (n, place) in some.iter().zip(line * RECORD_WORDS as u32..) {
                places[*n] = place;
            }
        }
        Some(places)
    }
}

/// A line of at most 16 words.
fn words_of(words: impl Iterator<Item = u32>) -> Line {
    let mut line = Line { word: [0; 16] };
    for (to, word) in line.word.iter_mut().zip(words) {
        *to = word;
    }
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
    for (protocol, root) in PORT_PROTOCOLS.into_iter().zip(roots.ports).filter(|(_, root)| *root != 0) {
        for page in 0..PAGE_PORTS as u32 {
            let first = port_number(protocol, (page * PAGE_PORTS as u32) as u16);
            let word = line(root.wrapping_add(page / 16))?.word[page as usize % 16];
            up_to(&mut ports, 0, first - 1, 0);
            if word & PAGE == 0 {
                up_to(&mut ports, 0, first + PAGE_PORTS as u32 - 1, word);
                continue;
            }
            for at in 0..BLOCK_LINES {
                for (n, place) in (first + at * 16..).zip(line((word & !PAGE).wrapping_add(at))?.word) {
                    up_to(&mut ports, 0, n, place);
                }
            }
        }
    }
    if !ports.is_empty() {
        up_to(&mut ports, 0, u32::MAX, 0);
    }
    let mut records = BTreeMap::from([(0, ClassRules::Trees(roots.roots))]);
    for span in ports.iter_mut().filter(|span| span.winner != 0) {
        let content = line(span.winner / RECORD_WORDS as u32)?;
        let Some(record) = ClassRecord::find(span.winner, |_| Some(&content)) else { return Ok(None) };
        span.winner = record.class.into();
        records.insert(record.class, record.rules);
    }
    for (class, rules) in records {
        match rules {
            ClassRules::Trees([root_v4, root_v6]) => {
                if !read_tree(class, root_v4, &mut line, &mut v4)?
                    || root_v6 != 0 && !read_v6(class, root_v6, 0, 0, &mut line, &mut v6)?
                {
                    return Ok(None);
                }
            }
            ClassRules::One(stretch) => put_stretches(class, &[stretch], &mut v4),
            ClassRules::Few(stretches) => put_stretches(class, &stretches, &mut v4),
            ClassRules::All(winner) => {
                v4.push(Span { class, last: u32::MAX, winner });
                v6.push(Span { class, last: u128::MAX, winner });
            }
        }
    }
    Ok(Some((v4, v6, ports)))
}

/// How far the nth word of an IPv6 address is from its lowest bit.
const fn shift(nth: u32) -> u32 {
    32 * (WORDS_V6 - 1 - nth)
}

/// All bits behind the nth word.
const fn behind(nth: u32) -> u128 {
    (1 << shift(nth)) - 1
}

/// The last of the addresses that share the words before the nth with one.
const fn end(first: u128, nth: u32) -> u128 {
    if nth == 0 { u128::MAX } else { first | behind(nth - 1) }
}

/// Adds the spans of a class from its stretches.
fn put_stretches(class: u16, stretches: &[Stretch], v4: &mut Vec<Span<u32>>) {
    for Stretch { first, last, winner } in stretches.iter().filter(|s| s.first <= s.last) {
        if let Some(before) = first.checked_sub(1) {
            up_to(v4, class, before, Winner::NONE);
        }
        up_to(v4, class, *last, *winner);
    }
    up_to(v4, class, u32::MAX, Winner::NONE);
}

/// Adds what a class has not yet up to an address, or a number of a port, with one winner: to the span before if that has
/// the same, else as a span of its own.
pub fn up_to<A: Address>(spans: &mut Vec<Span<A>>, class: u16, last: A, winner: u32) {
    match spans.last_mut().filter(|span| span.class == class) {
        Some(before) if before.last >= last => {}
        Some(before) if before.winner == winner => before.last = last,
        _ => spans.push(Span { class, last, winner }),
    }
}

/// Adds an IPv4 tree's spans. Whether it is one.
fn read_tree<E>(
    class: u16,
    root: u32,
    line: &mut impl FnMut(u32) -> Result<Line, E>,
    spans: &mut Vec<Span<u32>>,
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
    let mut next = std::vec![(levels, root & LINE_MASK, u32::MAX)];
    while let Some((levels, at, end)) = next.pop() {
        let content = line(at)?;
        if levels > 0 {
            let lasts = &content.word[..NODE_V4];
            let inner = lasts.iter().take_while(|last| **last < end).count();
            next.push((levels - 1, content.word[CHILD].wrapping_add(inner as u32), end));
            for nth in (0..inner).rev() {
                next.push((levels - 1, content.word[CHILD].wrapping_add(nth as u32), lasts[nth]));
            }
        } else if !read_leaf(class, &content, end, begin, spans) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Adds the spans of what the nth words of IPv6 addresses from `first` on are looked up in. Whether they are there.
fn read_v6<E>(
    class: u16,
    root: u32,
    first: u128,
    nth: u32,
    line: &mut impl FnMut(u32) -> Result<Line, E>,
    spans: &mut Vec<Span<u128>>,
) -> Result<bool, E> {
    if root >> LEVELS_SHIFT == LEAF_V6_LEVELS {
        let mut of_leaf = Vec::new();
        let is_whole = read_leaf(class, &line(root & LINE_MASK)?, end(first, nth), 0, &mut of_leaf);
        for Span { last, winner, .. } in of_leaf {
            up_to(spans, class, last, winner);
        }
        return Ok(is_whole);
    }
    let mut words = Vec::new();
    if root == 0 || !read_tree(class, root, line, &mut words)? {
        return Ok(false);
    }
    let mut before = None;
    for Span { last: word, winner, .. } in words {
        let at = first | u128::from(word) << shift(nth);
        if winner >= Winner::NOT_READY || winner & LINK == 0 {
            // Joined with the one before, from which another tree may have parted it.
            up_to(spans, class, at | behind(nth), winner);
        } else if word != before.map_or(0, |before: u32| before + 1)
            || nth + 1 == WORDS_V6
            || !read_v6(class, winner & !LINK, at, nth + 1, line, spans)?
        {
            return Ok(false);
        }
        before = Some(word);
    }
    Ok(true)
}

/// Adds a leaf's spans up to one that ends at `end`. `begin` is where those of its tree begin. Whether there are such.
fn read_leaf<A: Address>(class: u16, leaf: &Line, end: A, begin: usize, spans: &mut Vec<Span<A>>) -> bool {
    for nth in 0..A::LEAF {
        let last = A::of(leaf, nth);
        let before = spans[begin..].last().map(|span| span.last);
        if before.is_some_and(|before| before >= last) || last > end {
            return false;
        }
        spans.push(Span { class, last, winner: leaf.word[A::WINNERS + nth] });
        if last == end {
            return true;
        }
    }
    false
}

/// The winner for an address, found the plainest way: the oracle of the trees.
#[must_use]
pub fn naive<A: Address>(spans: &[Span<A>], class: u16, address: A) -> u32 {
    let of_class = spans.iter().filter(|span| span.class == class);
    of_class.filter(|span| span.last >= address).map(|span| span.winner).next().unwrap_or(Winner::NONE)
}
