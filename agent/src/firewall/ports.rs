//! Port classes: ports for which the same rules win everywhere share a number, whatever their protocol.

use std::collections::{BTreeMap, BTreeSet};

use datapath::keys::Winner;
use datapath::limits::FIREWALL_STEPS;
use datapath::rules::port_number;
use datapath::rules_build::{self, up_to};

use super::places::{Line, Lowest, Places};
use super::{Ports, Rule, TooMuch};

/// Lists of ports that are together in force, up to which it is remembered what their class is. Ports of more lists
/// have their table made anew to see it.
const REMEMBERED: usize = 16;

/// The classes of an object's rules.
#[derive(Default)]
pub(super) struct Classes {
    /// Each class' table, from class 1 on.
    pub(super) tables: Vec<Vec<Line>>,
    /// Ports that have a class, sorted.
    spans: Vec<Span>,
}

/// Consecutive ports of one class.
struct Span {
    protocol: u8,
    first: usize,
    end: usize,
    class: u32,
}

/// Rules that have the same ports.
#[derive(Default)]
struct Group {
    /// Places and rules.
    uses: Vec<Line>,
    /// Whether they are in [`Sweep::at`].
    on: bool,
}

/// Where a list of ports begins or ends: protocol, port, list.
type Edge = (u8, u32, u32);

impl Classes {
    /// Goes through the ports of all rules, and makes a table wherever the rules for them change. `lowest` is, by
    /// place, the lowest rule without ports that contains it: what stands behind that never wins.
    pub(super) fn of(rules: &[Rule], places: &Places, lowest: &[u32]) -> Result<Self, TooMuch> {
        let mut lists: BTreeMap<Vec<Ports>, u32> = BTreeMap::new();
        let mut groups: Vec<Group> = Vec::new();
        let mut rule_and_list = (u32::MAX, 0);
        for (rule, place) in &places.uses {
            let ports = &rules[*rule as usize].ports;
            if ports.is_empty() || *rule > lowest[*place as usize] {
                continue;
            }
            if rule_and_list.0 != *rule {
                let next = groups.len() as u32;
                rule_and_list = (*rule, *lists.entry(merged(ports)).or_insert(next));
                groups.resize_with(lists.len(), Group::default);
            }
            groups[rule_and_list.1 as usize].uses.push((*place, *rule));
        }
        let edge = |ports: &Ports, list| {
            let (first, last) = (u32::from(ports.first), u32::from(ports.last));
            [(ports.protocol, first, list), (ports.protocol, last + 1, list)]
        };
        let mut edges: Vec<Edge> =
            lists.iter().flat_map(|(ports, list)| ports.iter().flat_map(|p| edge(p, *list))).collect();
        edges.sort_unstable();
        Sweep::new(groups, places).run(&edges)
    }

    /// The spans of port numbers ([`port_number`]), with their class for winner.
    pub(super) fn ports(&self) -> Vec<rules_build::Span<u32>> {
        let mut ports = Vec::new();
        let mut put = |last, class| up_to(&mut ports, 0, last, class);
        for span in &self.spans {
            // No protocol with ports is 0.
            put(port_number(span.protocol, 0) + span.first as u32 - 1, 0);
            put(port_number(span.protocol, 0) + span.end as u32 - 1, span.class);
        }
        if !self.spans.is_empty() {
            put(u32::MAX, 0);
        }
        ports
    }
}

/// The same ports, sorted and without overlaps.
fn merged(ports: &[Ports]) -> Vec<Ports> {
    let mut sorted = ports.to_vec();
    sorted.sort_unstable();
    sorted.dedup_by(|next, kept| {
        let meet = kept.protocol == next.protocol && u32::from(next.first) <= u32::from(kept.last) + 1;
        if meet {
            kept.last = kept.last.max(next.last);
        }
        meet
    });
    sorted
}

/// A walk through all ports.
struct Sweep<'a> {
    groups: Vec<Group>,
    ends: &'a [u32],
    /// By place: the rules of the groups that are on.
    at: Vec<BTreeSet<u32>>,
    /// By place: the first of them.
    lowest: Lowest,
    /// Lists that have the port at hand.
    now: BTreeSet<u32>,
    /// Lists that came or went since the last table was made.
    changed: Vec<u32>,
    /// Classes of few lists together.
    remembered: BTreeMap<Vec<u32>, u32>,
    /// Classes by table.
    classes: BTreeMap<Vec<Line>, u32>,
    /// Work done, in destinations and lines gone through.
    steps: usize,
}

impl<'a> Sweep<'a> {
    fn new(groups: Vec<Group>, places: &'a Places) -> Self {
        let count = places.list.len();
        Self {
            groups,
            ends: &places.ends,
            at: vec![BTreeSet::new(); count],
            lowest: Lowest::new(count),
            now: BTreeSet::new(),
            changed: Vec::new(),
            remembered: BTreeMap::new(),
            classes: BTreeMap::new(),
            steps: 0,
        }
    }

    fn run(mut self, edges: &[Edge]) -> Result<Classes, TooMuch> {
        let mut spans: Vec<Span> = Vec::new();
        let mut edges = edges.chunk_by(|a, b| a.0 == b.0 && a.1 == b.1).peekable();
        while let Some(here) = edges.next() {
            for (_, _, list) in here {
                if !self.now.remove(list) {
                    self.now.insert(*list);
                }
                self.changed.push(*list);
            }
            // After a protocol's last edge nothing is left, so every span ends at an edge of its protocol.
            let (protocol, first) = (here[0].0, here[0].1);
            if self.now.is_empty() {
                continue;
            }
            let Some(next) = edges.peek() else { break };
            let class = self.class()?;
            spans.push(Span { protocol, first: first as usize, end: next[0].1 as usize, class });
        }
        let mut tables: Vec<_> = self.classes.into_iter().collect();
        tables.sort_unstable_by_key(|(_, class)| *class);
        Ok(Classes { tables: tables.into_iter().map(|(table, _)| table).collect(), spans })
    }

    /// The class of the lists at hand.
    fn class(&mut self) -> Result<u32, TooMuch> {
        let few = (self.now.len() <= REMEMBERED).then(|| self.now.iter().copied().collect::<Vec<_>>());
        if let Some(class) = few.as_ref().and_then(|few| self.remembered.get(few)) {
            return Ok(*class);
        }
        for list in std::mem::take(&mut self.changed) {
            self.turn(list);
        }
        let table = self.lowest.table(self.ends);
        self.steps += table.len();
        if self.steps > FIREWALL_STEPS {
            return Err(TooMuch::Steps);
        }
        let next = self.classes.len() as u32 + 1;
        let class = *self.classes.entry(table).or_insert(next);
        if let Some(few) = few {
            self.remembered.insert(few, class);
        }
        Ok(class)
    }

    /// Brings the places of a list's rules in line with whether it has the port at hand.
    fn turn(&mut self, list: u32) {
        let group = &mut self.groups[list as usize];
        let on = self.now.contains(&list);
        if group.on == on {
            return;
        }
        group.on = on;
        self.steps += group.uses.len();
        for (place, rule) in &group.uses {
            let rules = &mut self.at[*place as usize];
            if on {
                rules.insert(*rule);
            } else {
                rules.remove(rule);
            }
            self.lowest.set(*place, rules.first().copied().unwrap_or(Winner::NONE));
        }
    }
}
