//! Firewalls of namespaces that have pods on this node: the version of each that is to be in force.
//!
//! A version has a number of its own and never changes. What is refused, by the model, by the compiler or for want
//! of room, leaves the version before in force; where there is none, one that denies everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use datapath::keys::{FirewallId, NameId, Ruleset};
use datapath::limits;

use super::{Compiler, capacity};
use crate::firewall::compile::compile;
use crate::firewall::{Firewall, FirewallState, Name, Rule};
use crate::ids::{KnownFirewall, Next, give, identity};
use crate::image::Rules;

/// What a refused object has in force when nothing was before.
const REFUSED: Ruleset =
    Ruleset { identity: 0, content: 0, firewall: 0, rules: 0, parts: Ruleset::REFUSED, pad: 0 };

impl Compiler<'_> {
    /// `FIREWALLS`, `RULESETS` with all that hangs on them, and `NAMES`.
    pub(super) fn firewalls(&mut self) {
        let desired = self.desired;
        let namespaces: BTreeSet<&String> = desired.pods.keys().map(|(namespace, _)| namespace).collect();
        // All that stands now stands until what comes in its place is in force.
        let mut room = Room::default();
        for (_, rules) in self.ids.firewalls().filter_map(|f| f.version.as_ref()) {
            room.take(rules);
        }
        for (namespace, firewall) in desired.firewalls.iter().filter(|(n, _)| namespaces.contains(n)) {
            let (place, state) = self.firewall(namespace, firewall, &mut room);
            self.firewalls.insert(namespace.clone(), place);
            // What the model has refused, it has said.
            if let Some(error) = state.error.as_ref().filter(|_| firewall.rules.is_ok()) {
                let so = if state.kept {
                    "the version before stays in force on this node"
                } else {
                    "on this node all that rules could be for is denied"
                };
                let about = format_args!("EgressFirewall {namespace}/default");
                self.problem(about, format_args!("{error}; {so}"));
            }
            self.out.firewalls.insert(namespace.clone(), state);
        }
    }

    /// One of them: its place, if there was one left, and what came of it.
    fn firewall(
        &mut self,
        namespace: &str,
        firewall: &Firewall,
        room: &mut Room,
    ) -> (Option<FirewallId>, FirewallState) {
        let identity = identity(&[namespace]);
        let mut state =
            FirewallState { uid: firewall.uid.clone(), version: firewall.version, error: None, kept: false };
        let Some((known, next)) = self.ids.firewall(identity) else {
            state.error = Some(no_room("FIREWALLS", limits::FIREWALLS));
            return (None, state);
        };
        let compiled = match &firewall.rules {
            Ok(rules) => known.compile(rules, next),
            Err(message) => Err(message.clone()),
        };
        let rules = compiled.and_then(|rules| match &known.version {
            // What the maps have is taken for the same by its hash: a restarted agent writes nothing again.
            Some((_, old)) if is_same(&old.ruleset, &rules.ruleset) => Ok(None),
            _ => room.take_if_free(&rules).map(|()| Some(rules)),
        });
        match rules {
            Ok(None) => {}
            Ok(Some(rules)) => known.replace(&rules, identity, next),
            Err(message) => {
                state.kept =
                    known.version.as_ref().is_some_and(|(_, old)| old.ruleset.parts & Ruleset::REFUSED == 0);
                state.error = Some(message);
                if known.version.is_none() {
                    known.replace(&Rules { ruleset: REFUSED, ..Rules::default() }, identity, next);
                }
            }
        }
        let image = &mut self.out.image;
        if let Some((id, rules)) = &known.version {
            image.firewalls.insert(known.place, *id);
            image.rulesets.insert(*id, Arc::clone(rules));
            let used = used_names(rules);
            let names = known.names.iter().filter(|(_, id)| used.contains(id));
            image.names.extend(names.map(|(name, id)| (name.key(known.place), *id)));
        }
        known.forget_names();
        (Some(known.place), state)
    }
}

impl KnownFirewall {
    /// Compiles rules, unless that was done last time.
    fn compile(&mut self, rules: &Arc<Vec<Rule>>, next: &mut Next) -> Result<Arc<Rules>, String> {
        if let Some((_, compiled)) = self.compiled.as_ref().filter(|(last, _)| last == rules) {
            return compiled.clone();
        }
        let names = &mut self.names;
        let mut number = |name: &Name| match names.get(name) {
            Some(id) => *id,
            None => {
                let id = give(&mut next.name);
                names.insert(name.clone(), id);
                id
            }
        };
        let compiled = compile(rules, &mut number).map(Arc::new).map_err(|error| error.to_string());
        self.compiled = Some((Arc::clone(rules), compiled.clone()));
        compiled
    }

    /// Makes rules the version that is to be in force.
    fn replace(&mut self, rules: &Rules, identity: u64, next: &mut Next) {
        let mut rules = rules.clone();
        rules.ruleset.identity = identity;
        rules.ruleset.firewall = self.place;
        self.version = Some((give(&mut next.ruleset), Arc::new(rules)));
    }

    /// Forgets names that are neither in the version in force nor in the rules that were looked at last.
    fn forget_names(&mut self) {
        let used = self.version.as_ref().map(|(_, rules)| used_names(rules)).unwrap_or_default();
        let written = self.compiled.iter().flat_map(|(rules, _)| rules.iter()).filter_map(Rule::name);
        let written: BTreeSet<&Name> = written.collect();
        self.names.retain(|name, id| used.contains(id) || written.contains(name));
    }
}

fn used_names(rules: &Rules) -> BTreeSet<NameId> {
    rules.names.iter().map(|(name, _, _)| *name).collect()
}

fn is_same(a: &Ruleset, b: &Ruleset) -> bool {
    (a.content, a.rules, a.parts) == (b.content, b.rules, b.parts)
}

/// How full the maps are.
#[derive(Clone, Debug, Default)]
struct Room(BTreeMap<&'static str, usize>);

impl Room {
    fn take(&mut self, rules: &Rules) {
        for (map, _, entries) in needs(rules) {
            *self.0.entry(map).or_default() += entries;
        }
    }

    fn take_if_free(&mut self, rules: &Rules) -> Result<(), String> {
        for (map, limit, entries) in needs(rules) {
            if self.0.get(map).unwrap_or(&0) + entries > capacity(limit) {
                return Err(no_room(map, limit));
            }
        }
        self.take(rules);
        Ok(())
    }
}

/// What rules take of each map. Names that two versions have count twice, which errs on the safe side.
fn needs(rules: &Rules) -> [(&'static str, u32, usize); 6] {
    [
        ("RULESETS", limits::RULESETS, 1),
        ("RULES", limits::RULES, rules.rules.len()),
        ("PORTS", limits::PORTS, rules.ports.len()),
        ("PORT_PAGES", limits::PORT_PAGES, rules.pages.len()),
        ("NAME_RULES", limits::NAME_RULES, rules.names.len()),
        ("NAMES", limits::NAMES, used_names(rules).len()),
    ]
}

fn no_room(map: &str, limit: u32) -> String {
    format!("there is no room for it: map {map} of {limit} entries is too full")
}
