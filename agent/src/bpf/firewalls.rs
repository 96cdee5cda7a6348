//! Versions of firewalls in the kernel: written beside those in force, put in force by one word, removed later.
//!
//! A version is never changed: under its number everything is written first, then its entry of `RULESETS`, then the
//! word of `FIREWALLS` that names it. Whatever stops the agent in between, the version in force is whole. A packet
//! under way judges by the version that it has read, so what no word names any more stays for a while ([`REST`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::maps::{IterableMap as _, LpmTrie, Map, MapData, MapError};
use datapath::keys::{
    FirewallId, NameKey, NameRuleKey, PortPage, PortPageKey, PortTable, PortsKey, RuleCount, RuleCountKey,
    RuleKey, RulePlace, Ruleset, RulesetId, Winner,
};
use datapath::limits;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustix::thread::{MembarrierCommand, membarrier};

use super::Error;
use super::maps::{Plain, Table, open, put_all, put_changed, remove_all, remove_gone};
use super::words::Words;
use crate::image::{MapImage, Rules};

/// The one trie.
const RULES: &str = "RULES";
/// How long a version stays after the last word that named it.
const REST: Duration = Duration::from_secs(1);

/// The maps of firewalls, and what is in them.
pub(super) struct Firewalls {
    words: Words,
    rulesets: Table<u32, Ruleset>,
    rules: LpmTrie<MapData, Plain<RulePlace>, Plain<Winner>>,
    ports: Table<PortsKey, PortTable>,
    pages: Table<PortPageKey, PortPage>,
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
            rules: LpmTrie::try_from(open(dir, RULES)?)
                .map_err(|source| Error::Map { name: RULES, source })?,
            ports: Table::open(dir, "PORTS")?,
            pages: Table::open(dir, "PORT_PAGES")?,
            names: Table::open(dir, "NAMES")?,
            name_rules: Table::open(dir, "NAME_RULES")?,
            counts: Table::open(dir, "RULE_COUNTS")?,
            standing: BTreeMap::new(),
            leaving: BTreeMap::new(),
            counts_checked: false,
        };
        firewalls.read()?;
        Ok(firewalls)
    }

    /// Reads what is standing. What has no entry of `RULESETS` is of an agent that was stopped.
    fn read(&mut self) -> Result<(), Error> {
        let mut found: BTreeMap<RulesetId, Rules> = BTreeMap::new();
        for entry in &self.rules {
            let (key, winner) = entry.map_err(|source| Error::Map { name: RULES, source })?;
            let place = key.data().0;
            // No rule of ours has another family or a shorter prefix.
            if let Some(net) = network(&RuleKey { prefix_len: key.prefix_len(), place }) {
                found.entry(place.ruleset).or_default().rules.push((place.class, net, winner.0));
            }
        }
        for (key, table) in self.ports.read()? {
            found.entry(key.ruleset).or_default().ports.push((key.protocol as u8, table));
        }
        // In the order of their numbers, which count from 0.
        for (key, page) in self.pages.read()? {
            found.entry(key.ruleset).or_default().pages.push(page);
        }
        for (key, winner) in self.name_rules.read()? {
            found.entry(key.ruleset).or_default().names.push((key.name, key.class as u16, winner));
        }
        let rulesets = self.rulesets.read()?;
        for (id, ruleset) in &rulesets {
            found.entry(*id).or_default().ruleset = *ruleset;
        }
        self.standing = found
            .into_iter()
            .map(|(id, mut rules)| {
                rules.rules.sort_unstable();
                let whole = rulesets.contains_key(&id);
                (id, Standing { rules: Arc::new(rules), whole, unnamed: None })
            })
            .collect();
        self.note_unnamed();
        Ok(())
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
        let standing = Standing { rules: Arc::clone(rules), whole: false, unnamed: Some(Instant::now()) };
        self.standing.insert(id, standing);
        put_all(RULES, self.rules.map(), rules.rules_entries(id))?;
        self.ports.put_all(rules.ports_entries(id).map(|(key, table)| (key, *table)))?;
        self.pages.put_all(rules.page_entries(id).map(|(key, page)| (key, *page)))?;
        self.name_rules.put_all(rules.name_entries(id))?;
        self.rulesets.put(id, rules.ruleset)?;
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
            self.standing.remove(&id);
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
        remove_all(RULES, self.rules.map(), rules.rules_entries(id).map(|(key, _)| key))?;
        self.ports.remove_all(rules.ports_entries(id).map(|(key, _)| key))?;
        self.pages.remove_all(rules.page_entries(id).map(|(key, _)| key))?;
        self.name_rules.remove_all(rules.name_entries(id).map(|(key, _)| key))?;
        let winners = rules.rules.iter().map(|(_, _, w)| w).chain(rules.names.iter().map(|(_, _, w)| w));
        let orders: BTreeSet<u32> = winners.map(|w| w.order).chain([Winner::NOT_READY]).collect();
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

/// The network that a key of `RULES` stands for.
fn network(key: &RuleKey) -> Option<IpNet> {
    let len = key.prefix_len.checked_sub(RuleKey::FIXED_BITS)?;
    let ip = key.place.ip;
    match key.place.family {
        4 => {
            let len = len.checked_sub(96)?;
            Some(Ipv4Net::new(ip.v4_octets().into(), len as u8).ok()?.into())
        }
        6 => Some(Ipv6Net::new(ip.octets.into(), len as u8).ok()?.into()),
        _ => None,
    }
}
