//! What firewalls have counted, denied and learnt, read from the pinned maps: for metrics, the audit log and
//! commands. `dir` is as of [`super::pin_dir`] everywhere.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, MapError, PerCpuArray};
use datapath::keys::{
    self, Denial, DenialKey, Flow, FlowKey, Learnt, LearntKey, NameEvent, Pod, PodId, PodName, RuleCount,
    RuleCountKey, Ruleset, RulesetId, Winner,
};

use super::maps::{Plain, open};
use super::{Error, batch};
use crate::firewall::show;

/// Reads a whole hash map.
pub fn read<K: keys::MapData + Ord, V: keys::MapData>(
    dir: &Path,
    name: &'static str,
) -> Result<BTreeMap<K, V>, Error> {
    let mut all = BTreeMap::new();
    each(dir, name, |key, value| {
        all.insert(*key, *value);
    })?;
    Ok(all)
}

/// What pods have been denied lately.
pub fn denials(dir: &Path) -> Result<BTreeMap<DenialKey, Denial>, Error> {
    read(dir, "DENIALS")
}

/// What rules have decided.
pub fn rule_counts(dir: &Path) -> Result<BTreeMap<RuleCountKey, RuleCount>, Error> {
    read(dir, "RULE_COUNTS")
}

/// The flows that rules have let go and that live, and their bytes, by rule.
pub fn alive(dir: &Path) -> Result<BTreeMap<RuleCountKey, RuleCount>, Error> {
    let mut all: BTreeMap<RuleCountKey, RuleCount> = BTreeMap::new();
    each(dir, "FLOWS", |_: &FlowKey, flow: &Flow| {
        if flow.ruleset != 0 && flow.rule < Winner::NOT_READY {
            let count = all.entry(RuleCountKey { ruleset: flow.ruleset, rule: flow.rule }).or_default();
            count.hits += 1;
            count.bytes += flow.bytes;
        }
    })?;
    Ok(all)
}

/// Names of this node's pods.
pub fn pod_names(dir: &Path) -> Result<BTreeMap<PodId, PodName>, Error> {
    read(dir, "POD_NAMES")
}

/// How often each thing has happened to names, over all CPUs.
pub fn name_events(dir: &Path) -> Result<Vec<(&'static str, u64)>, Error> {
    let name = "NAME_EVENTS";
    let of = |source| Error::Map { name, source };
    let map: PerCpuArray<_, u64> = PerCpuArray::try_from(open(dir, name)?).map_err(of)?;
    NameEvent::ALL
        .iter()
        .map(|(event, text)| Ok((*text, map.get(&(*event as u32), 0).map_err(of)?.iter().sum())))
        .collect()
}

/// The names that an address was learnt for.
pub fn learnt(dir: &Path, key: &LearntKey) -> Result<Option<Learnt>, Error> {
    let name = "LEARNT";
    let of = |source| Error::Map { name, source };
    let map: HashMap<_, Plain<LearntKey>, Plain<Learnt>> = HashMap::try_from(open(dir, name)?).map_err(of)?;
    match map.get(&Plain(*key), 0) {
        Ok(learnt) => Ok(Some(learnt.0)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(source) => Err(of(source)),
    }
}

/// The versions of rules that are in force, by namespace. Only of namespaces that have pods here.
pub fn in_force(dir: &Path) -> Result<BTreeMap<String, (RulesetId, Ruleset)>, Error> {
    let name = "FIREWALLS";
    let of = |source| Error::Map { name, source };
    let places: Array<_, u32> = Array::try_from(open(dir, name)?).map_err(of)?;
    let rulesets: BTreeMap<RulesetId, Ruleset> = read(dir, "RULESETS")?;
    let names = pod_names(dir)?;
    let mut of_namespaces: BTreeMap<String, u32> = BTreeMap::new();
    each(dir, "PODS", |_: &datapath::addr::Ip, pod: &Pod| {
        if let (1.., Some(name)) = (pod.firewall, names.get(&pod.id)) {
            of_namespaces.insert(show::namespace(name), pod.firewall);
        }
    })?;
    let mut all = BTreeMap::new();
    for (namespace, place) in of_namespaces {
        let id = places.get(&place, 0).map_err(of)?;
        if let Some(ruleset) = rulesets.get(&id) {
            all.insert(namespace, (id, *ruleset));
        }
    }
    Ok(all)
}

/// What one namespace's rules have decided since they are in force.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// The namespace.
    pub namespace: String,
    /// How many rules there are.
    pub rules: u32,
    /// What those that have decided anything have, by [`Winner::order`].
    pub decided: BTreeMap<u32, RuleCount>,
}

/// Reads what rules have decided, live flows and their bytes included. No count goes down while its version is in force,
/// though flows end between two looks.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    told: RefCell<BTreeMap<RuleCountKey, RuleCount>>,
}

impl Reader {
    /// A reader that has told nothing yet.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), told: RefCell::default() }
    }

    /// Reads.
    pub fn read(&self) -> Result<Vec<Counts>, Error> {
        let versions = in_force(&self.dir)?;
        if versions.is_empty() {
            return Ok(Vec::new());
        }
        // Flows last: one that ends in between is missed, and is there the next time.
        let counted = rule_counts(&self.dir)?;
        let alive = alive(&self.dir)?;
        let mut told = self.told.borrow_mut();
        let (counts, now) = merge(&versions, &counted, &alive, &told);
        *told = now;
        Ok(counts)
    }
}

/// Puts the counts of the versions in force together; and what is told by that.
fn merge(
    versions: &BTreeMap<String, (RulesetId, Ruleset)>,
    counted: &BTreeMap<RuleCountKey, RuleCount>,
    alive: &BTreeMap<RuleCountKey, RuleCount>,
    told: &BTreeMap<RuleCountKey, RuleCount>,
) -> (Vec<Counts>, BTreeMap<RuleCountKey, RuleCount>) {
    let mut now: BTreeMap<RuleCountKey, RuleCount> = counted.clone();
    for (key, flows) in alive {
        let count = now.entry(*key).or_default();
        count.hits += flows.hits;
        count.bytes += flows.bytes;
    }
    for (key, before) in told {
        let count = now.entry(*key).or_default();
        *count = RuleCount { hits: count.hits.max(before.hits), bytes: count.bytes.max(before.bytes) };
    }
    now.retain(|key, _| versions.values().any(|(id, _)| *id == key.ruleset));
    let of = |(namespace, (id, ruleset)): (&String, &(RulesetId, Ruleset))| {
        let from = RuleCountKey { ruleset: *id, rule: 0 };
        let to = RuleCountKey { ruleset: *id, rule: u32::MAX };
        Counts {
            namespace: namespace.clone(),
            rules: ruleset.rules,
            decided: now.range(from..=to).map(|(key, count)| (key.rule, *count)).collect(),
        }
    };
    (versions.iter().map(of).collect(), now)
}

/// Looks at every entry of a pinned hash map.
pub(super) fn each<K: keys::MapData, V: keys::MapData>(
    dir: &Path,
    name: &'static str,
    look: impl FnMut(&K, &V),
) -> Result<(), Error> {
    let path = dir.join("maps").join(name);
    if !path.exists() {
        return Err(Error::NoMap { name, dir: dir.to_path_buf() });
    }
    let map = aya::maps::MapData::from_pin(&path).map_err(|source| Error::Map { name, source })?;
    batch::each(map.fd().as_fd(), look)
        .map_err(|error: io::Error| Error::Map { name, source: MapError::from(error) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_those_of_the_version_in_force_and_never_go_down() {
        let key = |ruleset, rule| RuleCountKey { ruleset, rule };
        let count = |hits, bytes| RuleCount { hits, bytes };
        let versions = BTreeMap::from([
            ("a".to_owned(), (5, Ruleset { rules: 3, ..Ruleset::default() })),
            ("b".to_owned(), (7, Ruleset { rules: 1, ..Ruleset::default() })),
        ]);
        let counted = BTreeMap::from([
            (key(4, 1), count(9, 900)),
            (key(5, 1), count(2, 100)),
            (key(5, 4), count(3, 180)),
            (key(6, 0), count(9, 900)),
        ]);
        let alive = BTreeMap::from([(key(5, 1), count(1, 50)), (key(5, 3), count(1, 7))]);
        let (counts, told) = merge(&versions, &counted, &alive, &BTreeMap::new());
        let a = [(1, count(3, 150)), (3, count(1, 7)), (4, count(3, 180))];
        assert_eq!(
            counts,
            [
                Counts { namespace: "a".into(), rules: 3, decided: a.into() },
                Counts { namespace: "b".into(), rules: 1, decided: BTreeMap::new() }
            ]
        );
        // A flow has ended between the looks at counts and at flows.
        let (counts, told) = merge(&versions, &counted, &BTreeMap::new(), &told);
        assert_eq!(counts[0].decided, a.into());
        let counted = BTreeMap::from([(key(5, 1), count(3, 250))]);
        let (counts, _) = merge(&versions, &counted, &BTreeMap::new(), &told);
        assert_eq!(counts[0].decided[&1], count(3, 250));
        // A new version begins anew.
        let versions = BTreeMap::from([("a".to_owned(), (8, Ruleset::default()))]);
        let (counts, told) = merge(&versions, &BTreeMap::new(), &BTreeMap::new(), &told);
        assert!(counts[0].decided.is_empty() && told.is_empty());
    }
}
