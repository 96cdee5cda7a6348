//! Compiles an object's rules to what the programs look up: pure, and the same for the same rules.
//!
//! A packet's destination is looked up among rules without ports (class 0) and among those that have its port (the
//! class of its port); a line holds the lowest index of all rules of its class that are for all of its prefix. Lines that
//! could never decide are left out: what a shorter prefix of the class says already, and rules with ports behind a rule
//! without ports that is for their whole destination. In the end the prefixes of a class, which contain one another, are
//! cut up into stretches of addresses with one winner each, of which the programs' search trees are made.

use datapath::keys::{NameId, Ruleset, Winner};
use datapath::limits::{
    FIREWALL_CLASSES, FIREWALL_ENTRIES, FIREWALL_NAME_ENTRIES, FIREWALL_STEPS, FIREWALL_TARGETS,
};

use super::places::{Line, Places, Target};
use super::ports::Classes;
use super::spans::Spans;
use super::{Destination, Name, Rule};
use crate::image::Rules;

/// Why rules that are right by themselves cannot be compiled.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TooMuch {
    /// Too many destinations: nodes count once for each rule that selects them.
    #[error(
        "its rules have {0} destinations, each address of a selected node counted for each rule, of which {FIREWALL_TARGETS} \
         are possible: let fewer rules select nodes, or join rules that select the same ones"
    )]
    Targets(usize),
    /// Too many lines.
    #[error(
        "its rules need {0} table entries of {FIREWALL_ENTRIES}: ranges of ports that overlap in part need the rules \
         of both again for each part, so give such rules the same ranges, or leave their ports out"
    )]
    Entries(usize),
    /// Too many lines for names.
    #[error(
        "its rules for names need {0} table entries of {FIREWALL_NAME_ENTRIES}: ranges of ports that overlap in part \
         need the rules of both again for each part, so give such rules the same ranges, or leave their ports out"
    )]
    Names(usize),
    /// Too many port classes.
    #[error(
        "the ports of its rules fall into {0} classes, one for all ports that have the same rules, of which \
         {FIREWALL_CLASSES} are possible: use fewer different ranges, or split the namespace"
    )]
    Classes(usize),
    /// Too much work.
    #[error(
        "its rules need more than {FIREWALL_STEPS} steps to be compiled: ranges of ports that overlap in part need the \
         rules of both again for each part, so give such rules the same ranges, or leave their ports out"
    )]
    Steps,
}

/// Compiles. [`Ruleset::identity`] and [`Ruleset::firewall`] are the caller's to set. Each rule's name is asked for its
/// id, also one that is never looked up.
///
/// # Errors
/// What is too much, how much it is, and what to do.
pub fn compile(rules: &[Rule], name_id: &mut dyn FnMut(&Name) -> NameId) -> Result<Rules, TooMuch> {
    let targets = rules.iter().map(targets).sum();
    if targets > FIREWALL_TARGETS {
        return Err(TooMuch::Targets(targets));
    }
    let places = Places::of(rules, name_id);
    let mut own = vec![Winner::NONE; places.list.len()];
    for (rule, place) in places.uses.iter().rev() {
        if rules[*rule as usize].ports.is_empty() {
            own[*place as usize] = *rule;
        }
    }
    let (portless, lowest) = places.table(&own);
    let classes = Classes::of(rules, &places, &lowest)?;
    if classes.tables.len() > FIREWALL_CLASSES {
        return Err(TooMuch::Classes(classes.tables.len()));
    }

    let mut out = Rules::default();
    let mut entries = 0;
    for (table, class) in std::iter::once(&portless).chain(&classes.tables).zip(0u16..) {
        entries += put(table, class, rules, &places, &mut out);
    }
    out.names.sort_unstable();
    if entries > FIREWALL_ENTRIES {
        return Err(TooMuch::Entries(entries));
    }
    if out.names.len() > FIREWALL_NAME_ENTRIES {
        return Err(TooMuch::Names(out.names.len()));
    }
    out.ports = classes.ports();
    let mut parts = 0;
    if out.v4.first().is_some_and(|s| s.class == 0) || out.v6.first().is_some_and(|s| s.class == 0) {
        parts |= Ruleset::ADDRESSES;
    }
    if !out.ports.is_empty() {
        parts |= Ruleset::PORTS;
    }
    if !out.names.is_empty() {
        parts |= Ruleset::NAMES;
    }
    out.ruleset = Ruleset { rules: rules.len() as u32, parts, ..Ruleset::default() };
    out.ruleset.content = content(&out);
    Ok(out.count_blocks())
}

/// How many destinations a rule has.
fn targets(rule: &Rule) -> usize {
    match &rule.to {
        Destination::Network(_) | Destination::Name(_) => 1,
        Destination::Nodes(ips) => ips.len(),
    }
}

/// Adds a class' table. How many networks it has.
fn put(table: &[Line], class: u16, rules: &[Rule], places: &Places, out: &mut Rules) -> usize {
    let (mut v4, mut v6) = (Spans::new(class, &mut out.v4), Spans::new(class, &mut out.v6));
    let mut networks = 0;
    for (place, rule) in table {
        let winner = Winner::new(*rule, rules[*rule as usize].allows);
        match places.list[*place as usize].target() {
            Target::V4(first, last) => v4.network(first, last, winner.order),
            Target::V6(first, last) => v6.network(first, last, winner.order),
            Target::Name(name) => {
                out.names.push((name, class, winner));
                continue;
            }
        }
        networks += 1;
    }
    v4.end();
    v6.end();
    networks
}

/// A hash of all that is in the maps, the same in every version of the agent.
fn content(rules: &Rules) -> u64 {
    let mut hash = Hash(0xcbf2_9ce4_8422_2325);
    hash.words(&[rules.ruleset.rules, rules.ruleset.parts]);
    for len in [rules.v4.len(), rules.v6.len(), rules.ports.len(), rules.names.len()] {
        hash.words(&[len as u32]);
    }
    for span in rules.v4.iter().chain(&rules.ports) {
        hash.words(&[span.class.into(), span.last, span.winner]);
    }
    for span in &rules.v6 {
        hash.words(&[span.class.into(), span.winner]);
        hash.words(&[0, 32, 64, 96].map(|shift| (span.last >> shift) as u32));
    }
    for (key, winner) in rules.name_entries(0) {
        hash.words(&[key.name, key.class, winner.order]);
    }
    hash.0
}

/// A hash of 64 bits that takes a word at a time, for a version has hundreds of thousands of them: multiplied, which
/// takes each bit to all above it, and folded, which takes it below. It is for accidents, not for enemies: a namespace
/// has itself to harm.
struct Hash(u64);

impl Hash {
    fn words(&mut self, words: &[u32]) {
        for word in words {
            let product = (self.0 ^ u64::from(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.0 = product ^ product >> 32;
        }
    }
}

#[cfg(test)]
mod tests;
