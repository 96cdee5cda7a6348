//! Versions of firewalls in the kernel: written beside those in force, put in force by one word, removed later.
//!
//! A version is never changed: under its number everything is written first, then its entry of `RULESETS`, then the
//! word of `FIREWALLS` that names it. Whatever stops the agent in between, the version in force is whole. A packet
//! under way judges by the version that it has read, so what no word names any more stays for a while ([`REST`]).
//!
//! Its trees stand in blocks of `RULES` that no other version has. Which these are the trees themselves say: a starting
//! agent reads those of every entry of `RULESETS`, and all else is free.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::maps::{Array, IterableMap as _, Map, MapData, MapError};
use datapath::keys::{
    FirewallId, Line, NameKey, NameRuleKey, RuleCount, RuleCountKey, Ruleset, RulesetId, Winner,
};
use datapath::limits;
use datapath::rules::BLOCK_LINES;
use datapath::rules_build::{self, Roots};
use rustix::thread::{MembarrierCommand, membarrier};

use super::Error;
use super::blocks::{Blocks, Given};
use super::maps::{Plain, Table, open, put_all, put_changed, remove_gone};
use super::words::Words;
use crate::image::{MapImage, Rules};

/// The one with the trees.
const RULES: &str = "RULES";
/// How long a version stays after the last word that named it.
const REST: Duration = Duration::from_secs(1);

/// The maps of firewalls, and what is in them.
pub(super) struct Firewalls {
    words: Words,
    rulesets: Table<u32, Ruleset>,
    rules: Array<MapData, Plain<Line>>,
    /// What of `rules` is free.
    blocks: Blocks,
    names: Table<NameKey, u32>,
    name_rules: Table<NameRuleKey, Winner>,
    counts: Table<RuleCountKey, RuleCount>,
    /// All that is in the maps, in force or not.
    standing: BTreeMap<RulesetId, Standing>,
    /// Places that no pod has any more, and since when. Packets under way may still ask there.
    leaving: BTreeMap<FirewallId, Instant>,
    /// Whether counts of versions that nobody knows any more have been looked for.
    counts_checked: bool,
}

/// A version in the maps.
struct Standing {
    rules: Arc<Rules>,
    /// Whether all of it is there: `RULESETS` has it.
    whole: bool,
    /// Its blocks of `RULES`.
    blocks: Vec<u32>,
    /// Since when no word names it.
    unnamed: Option<Instant>,
}

impl Firewalls {
    /// Opens the maps and reads them.
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        let name = "FIREWALLS";
        let words = if let Map::Array(map) = open(dir, name)? {
            Words::map(map.fd().as_fd(), limits::FIREWALLS as usize)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        };
        let words = words.map_err(|error| Error::Map { name, source: MapError::from(error) })?;
        let mut firewalls = Self {
            words,
            rulesets: Table::open(dir, "RULESETS")?,
            rules: Array::try_from(open(dir, RULES)?).map_err(|source| Error::Map { name: RULES, source })?,
            blocks: Blocks::but([]),
            names: Table::open(dir, "NAMES")?,
            name_rules: Table::open(dir, "NAME_RULES")?,
            counts: Table::open(dir, "RULE_COUNTS")?,
            standing: BTreeMap::new(),
            leaving: BTreeMap::new(),
            counts_checked: false,
        };
        firewalls.read(dir)?;
        Ok(firewalls)
    }

    /// Reads what is standing. What has no entry of `RULESETS` is of an agent that was stopped.
    fn read(&mut self, dir: &Path) -> Result<(), Error> {
        let mut found: BTreeMap<RulesetId, Rules> = BTreeMap::new();
        for (key, winner) in self.name_rules.read()? {
            found.entry(key.ruleset).or_default().names.push((key.name, key.class as u16, winner));
        }
        let rulesets = self.rulesets.read()?;
        for id in rulesets.keys() {
            found.entry(*id).or_default();
        }
        for (id, mut rules) in found {
            let (mut whole, mut blocks) = (false, Vec::new());
            if let Some(ruleset) = rulesets.get(&id) {
                let trees = self.trees(&Roots { roots: ruleset.roots, ports: ruleset.ports })?;
                // Whose trees are not there was removed while this was reading, which is a command's fate; an
                // agent is alone, and must not write where those in force may be.
                if trees.is_none()
                    && self.words.all().contains(&id)
                    && self.rulesets.read()?.contains_key(&id)
                {
                    return Err(Error::Shape {
                        path: dir.join("maps").join(RULES),
                        found: format!("no trees where version {id} of a firewall should have them"),
                        expected: "trees of lines".to_owned(),
                    });
                }
                whole = trees.is_some();
                rules.ruleset = Ruleset { roots: [0; 2], ports: [0; 3], ..*ruleset };
                ((rules.v4, rules.v6, rules.ports), blocks) = trees.unwrap_or_default();
                rules = rules.count_blocks();
            }
            self.standing.insert(id, Standing { rules: Arc::new(rules), whole, blocks, unnamed: None });
        }
        self.blocks = Blocks::but(self.standing.values().flat_map(|s| &s.blocks).copied());
        self.note_unnamed();
        Ok(())
    }

    /// Reads the trees of a version, and in which blocks they are. `None`: there are none.
    fn trees(&self, roots: &Roots) -> Result<Option<(rules_build::Spans, Vec<u32>)>, Error> {
        let mut blocks = BTreeSet::new();
        let spans = rules_build::read(roots, |line| {
            blocks.insert(line / BLOCK_LINES);
            self.rules.get(&line, 0).map(|line| line.0)
        });
        match spans {
            Ok(spans) => Ok(spans.map(|spans| (spans, blocks.into_iter().collect()))),
            // A number beyond all lines.
            Err(MapError::OutOfBounds { .. }) => Ok(None),
            Err(source) => Err(Error::Map { name: RULES, source }),
        }
    }

    /// Reads the part of an image that is kept here.
    pub(super) fn fill(&self, image: &mut MapImage) -> Result<(), Error> {
        for (place, id) in (0..).zip(self.words.all()) {
            if let Some(standing) = self.standing.get(&id).filter(|s| s.whole)
                && !self.leaving.contains_key(&place)
            {
                image.firewalls.insert(place, id);
                image.rulesets.insert(id, Arc::clone(&standing.rules));
            }
        }
        image.names = self.names.read()?;
        Ok(())
    }

    /// Puts new versions in force. Pods may be given their firewalls afterwards.
    pub(super) fn put(&mut self, old: &MapImage, new: &MapImage) -> Result<(), Error> {
        let result = self.write(old, new);
        self.note_unnamed();
        result
    }

    fn write(&mut self, old: &MapImage, new: &MapImage) -> Result<(), Error> {
        // Names first: an address that is learnt before the rule is in force does no harm.
        put_changed(&mut self.names, &old.names, &new.names)?;
        for (id, rules) in &new.rulesets {
            self.stand(*id, rules)?;
        }
        for (place, id) in &new.firewalls {
            self.leaving.remove(place);
            if self.words.get(*place) != *id {
                self.words.set(*place, *id);
            }
        }
        Ok(())
    }

    /// Writes a version, if it is not there.
    fn stand(&mut self, id: RulesetId, rules: &Arc<Rules>) -> Result<(), Error> {
        if self.standing.get(&id).is_some_and(|s| s.whole) {
            return Ok(());
        }
        // What was written of it before something failed has not been seen by anybody.
        if let Some(part) = self.standing.get_mut(&id) {
            self.blocks.give_back(std::mem::take(&mut part.blocks));
        }
        let given = self.blocks.take(rules);
        let full = Error::MapFull { name: RULES, entries: limits::RULES };
        let Given { roots: Roots { roots, ports }, blocks, lines } = given.ok_or(full)?;
        let unnamed = Some(Instant::now());
        self.standing.insert(id, Standing { rules: Arc::clone(rules), whole: false, blocks, unnamed });
        put_all(RULES, self.rules.map(), lines.into_iter())?;
        self.name_rules.put_all(rules.name_entries(id))?;
        self.rulesets.put(id, Ruleset { roots, ports, ..rules.ruleset })?;
        if let Some(standing) = self.standing.get_mut(&id) {
            standing.whole = true;
        }
        Ok(())
    }

    /// Takes leave of what an image has not. No pod may have one of these firewalls any more.
    pub(super) fn leave(&mut self, old: &MapImage, new: &MapImage) -> Result<(), Error> {
        for (place, _) in (0..).zip(self.words.all()).filter(|(_, id)| *id != 0) {
            if !new.firewalls.contains_key(&place) {
                self.leaving.entry(place).or_insert_with(Instant::now);
            }
        }
        remove_gone(&mut self.names, &old.names, &new.names)
    }

    /// Removes what nobody can be using any more. Called now and then.
    pub(super) fn retire(&mut self) -> Result<(), Error> {
        let resting = !self.leaving.is_empty() || self.standing.values().any(|s| s.unnamed.is_some());
        if self.counts_checked && !resting {
            return Ok(());
        }
        let now = Instant::now();
        let rested = |since: Instant| now.duration_since(since) >= REST;
        for (place, _) in self.leaving.extract_if(.., |_, since| rested(*since)) {
            self.words.set(place, 0);
        }
        self.note_unnamed();
        let due: Vec<_> = self
            .standing
            .iter()
            .filter(|(_, s)| s.unnamed.is_some_and(rested))
            .map(|(id, s)| (*id, Arc::clone(&s.rules)))
            .collect();
        if !due.is_empty() {
            // Waits until every program that ran has ended (membarrier(2): it synchronizes RCU). Where the kernel has
            // no such thing, the rest has been long enough: a program runs for microseconds.
            let _ = membarrier(MembarrierCommand::Global);
        }
        for (id, rules) in due {
            self.remove(id, &rules)?;
            if let Some(gone) = self.standing.remove(&id) {
                self.blocks.give_back(gone.blocks);
            }
        }
        if !self.counts_checked {
            let counted = self.counts.keys()?;
            let unknown = counted.into_iter().filter(|key| !self.standing.contains_key(&key.ruleset));
            self.counts.remove_all(unknown)?;
            self.counts_checked = true;
        }
        Ok(())
    }

    /// Removes a version. Its entry of `RULESETS` first: what is stopped half-way is known by that.
    fn remove(&mut self, id: RulesetId, rules: &Rules) -> Result<(), Error> {
        if let Some(standing) = self.standing.get_mut(&id) {
            standing.whole = false;
        }
        self.rulesets.remove(&id)?;
        self.name_rules.remove_all(rules.name_entries(id).map(|(key, _)| key))?;
        let orders: BTreeSet<u32> = rules.winners().chain([Winner::NOT_READY]).collect();
        self.counts.remove_all(orders.into_iter().map(|rule| RuleCountKey { ruleset: id, rule }))
    }

    /// Notes since when each version is named by no word.
    fn note_unnamed(&mut self) {
        let named: BTreeSet<RulesetId> = self.words.all().into_iter().collect();
        let now = Instant::now();
        for (id, standing) in &mut self.standing {
            if named.contains(id) {
                standing.unnamed = None;
            } else {
                standing.unnamed.get_or_insert(now);
            }
        }
    }
}
