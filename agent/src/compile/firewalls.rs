//! Firewalls of namespaces that have pods on this node: the version of each that is to be in force.
//!
//! A version has a number of its own and never changes. What is refused, by the model, by the compiler or for want
//! of room, leaves the version before in force; where there is none, one that denies everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use datapath::keys::{FirewallId, NameId, Ruleset};
use datapath::limits;
use datapath::rules::BLOCK_LINES;

use super::{Compiler, capacity};
use crate::firewall::compile::compile;
use crate::firewall::{Firewall, FirewallState, Name, Rule};
use crate::ids::{KnownFirewall, Next, give, identity};
use crate::image::Rules;

/// What a refused object has in force when nothing was before.
const REFUSED: Ruleset = Ruleset {
    identity: 0,
    content: 0,
    firewall: 0,
    rules: 0,
    parts: Ruleset::REFUSED,
    roots: [0; 2],
    ports: [0; 3],
};

impl Compiler<'_> {
    /// `FIREWALLS`, `RULESETS` with all that hangs on them, and `NAMES`.
    pub(super) fn firewalls(&mut self) {
        let desired = self.desired;
        let namespaces: BTreeSet<&String> = desired.pods.keys().map(|(namespace, _)| namespace).collect();
        // All that stands now stands until what comes in its place is in force.
        let mut room = Room::default();
        let mut before = Vec::new();
        for (id, rules) in self.ids.firewalls().filter_map(|f| f.version.as_ref()) {
            room.take(rules);
            before.push(*id);
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
        let leaves = before.iter().any(|id| !self.out.image.rulesets.contains_key(id));
        self.out.waits = room.was_short && leaves;
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
        let mut number = |name: &Name| {
            if let Some(id) = names.get(name) {
                return *id;
            }
            let id = give(&mut next.name);
            names.insert(name.clone(), id);
            id
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
struct Room {
    taken: BTreeMap<&'static str, usize>,
    /// Whether something found none.
    was_short: bool,
}

impl Room {
    fn take(&mut self, rules: &Rules) {
        for (map, _, entries) in needs(rules) {
            *self.taken.entry(map).or_default() += entries;
        }
    }

    fn take_if_free(&mut self, rules: &Rules) -> Result<(), String> {
        for (map, limit, entries) in needs(rules) {
            if self.taken.get(map).unwrap_or(&0) + entries > capacity(limit) {
                self.was_short = true;
                return Err(no_room(map, limit));
            }
        }
        self.take(rules);
        Ok(())
    }
}

/// What rules take of each map. Names that two versions have count twice, which errs on the safe side.
fn needs(rules: &Rules) -> [(&'static str, u32, usize); 4] {
    [
        ("RULESETS", limits::RULESETS, 1),
        ("RULES", limits::RULES - BLOCK_LINES, (rules.blocks * BLOCK_LINES) as usize),
        ("NAME_RULES", limits::NAME_RULES, rules.names.len()),
        ("NAMES", limits::NAMES, used_names(rules).len()),
    ]
}

fn no_room(map: &str, limit: u32) -> String {
    format!("there is no room for it: map {map} of {limit} entries is too full")
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use datapath::keys::{Guard, NameKey, RulesetId, Winner};
    use datapath::rules_build::Span;
    use ipnet::IpNet;

    use super::*;
    use crate::compile::{self, Compiled};
    use crate::facts::{Facts, PodInterface};
    use crate::firewall::Destination;
    use crate::ids::Ids;
    use crate::model::{Desired, Pod};

    /// What one agent sees, change after change.
    struct World {
        desired: Desired,
        facts: Facts,
        ids: Ids,
    }

    impl World {
        /// A node with a pod in each of these namespaces.
        fn new(namespaces: &[&str]) -> Self {
            let mut world =
                Self { desired: Desired::default(), facts: Facts::default(), ids: Ids::default() };
            let cluster: IpNet = "10.0.0.0/8".parse().unwrap();
            world.desired.config.cluster_networks = vec![cluster];
            for (i, namespace) in (1..).zip(namespaces) {
                world.pod(namespace, i);
            }
            world
        }

        fn pod(&mut self, namespace: &str, i: u32) {
            let pod = Pod { version: 1, addresses: vec![address(i).into()], ..Pod::default() };
            self.desired.pods.insert((namespace.to_owned(), "p".to_owned()), pod);
        }

        fn set(&mut self, namespace: &str, rules: Result<Vec<Rule>, &str>) {
            let rules = rules.map(Arc::new).map_err(str::to_owned);
            let version = self.desired.firewalls.get(namespace).map_or(1, |f| f.version + 1);
            let firewall = Firewall { uid: "u".to_owned(), version, rules, notes: Vec::new() };
            self.desired.firewalls.insert(namespace.to_owned(), firewall);
        }

        fn compile(&mut self) -> Compiled {
            let c = compile::compile(&self.desired, &self.facts, &mut self.ids);
            let next = c.image.settings;
            assert!(
                c.image.rulesets.keys().all(|id| *id < next.next_ruleset),
                "a restart would give it again"
            );
            assert!(c.image.names.values().all(|id| *id < next.next_name));
            assert_eq!(
                c.image.firewalls.values().copied().collect::<BTreeSet<_>>(),
                c.image.rulesets.keys().copied().collect(),
                "what is there is in force, and what is in force is there"
            );
            c
        }
    }

    fn address(i: u32) -> Ipv4Addr {
        Ipv4Addr::from(0x0a00_0000 + i)
    }

    fn to(net: &str, allows: bool) -> Rule {
        Rule { allows, to: Destination::Network(net.parse().unwrap()), ports: Vec::new() }
    }

    fn named(name: &str) -> Rule {
        let name = Name { wildcard: false, name: name.to_owned() };
        Rule { allows: true, to: Destination::Name(name), ports: Vec::new() }
    }

    fn deny_all() -> Rule {
        to("0.0.0.0/0", false)
    }

    /// Place and version of the only firewall, and what came of it.
    fn only(c: &Compiled) -> (FirewallId, RulesetId, Option<String>) {
        let [(place, id)] = c.image.firewalls.iter().collect::<Vec<_>>()[..] else {
            panic!("{:?}", c.image.firewalls)
        };
        let (_, state) = c.firewalls.first_key_value().unwrap();
        (*place, *id, state.error.clone())
    }

    #[test]
    fn pods_of_the_namespace_get_it_and_no_others() {
        let mut w = World::new(&["a", "b"]);
        w.set("a", Ok(vec![deny_all()]));
        w.set("elsewhere", Ok(vec![deny_all()]));
        let c = w.compile();
        let (place, id, error) = only(&c);
        assert_eq!(error, None);
        let firewalls: Vec<_> = c.image.pods.values().map(|p| p.firewall).collect();
        assert_eq!(firewalls, [place, 0]);
        let rules = &c.image.rulesets[&id];
        assert_eq!(rules.ruleset.firewall, place);
        let all = Span { class: 0, last: u32::MAX, winner: Winner::new(0, false).order };
        assert_eq!((&rules.v4[..], rules.v6.len()), (&[all][..], 0));
        assert_eq!(c.firewalls.len(), 1, "nothing is said of a namespace without pods here");
    }

    #[test]
    fn interfaces_of_pods_with_a_firewall_are_guarded_and_such_pods_are_held_as_selected_ones_are() {
        let mut w = World::new(&["a", "b"]);
        let veth = |bridge| PodInterface {
            name: "veth".to_owned(),
            mac: [2; 6],
            bridge,
            peer_elsewhere: true,
            mtu: 1500,
        };
        w.facts.pod_interfaces = [(10, veth(0)), (11, veth(0))].into();
        w.facts.host_routes = [(address(1).into(), 10), (address(2).into(), 11)].into();
        w.set("a", Ok(vec![deny_all()]));
        let c = w.compile();
        let guards: Vec<_> = c.image.interfaces.values().map(|i| i.guarded).collect();
        assert_eq!(guards, [Guard::Own as u8, Guard::None as u8]);
        // The addresses turn up behind another interface.
        w.facts.pod_interfaces = [(12, veth(0))].into();
        w.facts.host_routes = [(address(1).into(), 12), (address(2).into(), 12)].into();
        let c = w.compile();
        let pods: Vec<_> = c.image.pods.iter().map(|(ip, pod)| (*ip, pod.ifindex)).collect();
        assert_eq!(pods, [(address(1).into(), 10)]);
    }

    #[test]
    fn a_version_has_a_number_of_its_own_for_good() {
        let mut w = World::new(&["a", "b"]);
        w.set("a", Ok(vec![deny_all()]));
        let (place, first, _) = only(&w.compile());
        let rules = Arc::clone(&w.compile().image.rulesets[&first]);
        // Written again, and something else changes.
        w.set("a", Ok(vec![deny_all()]));
        w.pod("b", 7);
        assert!(Arc::ptr_eq(&w.compile().image.rulesets[&first], &rules));
        w.set("a", Ok(vec![to("0.0.0.0/0", true)]));
        assert_eq!(only(&w.compile()), (place, first + 1, None));
        w.set("a", Ok(vec![deny_all()]));
        assert_eq!(only(&w.compile()), (place, first + 2, None), "not the first again: flows may name that");
    }

    #[test]
    fn what_is_refused_leaves_the_version_before_in_force() {
        let mut w = World::new(&["a"]);
        w.set("a", Ok(vec![deny_all()]));
        let (place, first, _) = only(&w.compile());
        w.set("a", Err("spec.egress[0]: wrong"));
        let c = w.compile();
        assert_eq!(only(&c), (place, first, Some("spec.egress[0]: wrong".to_owned())));
        assert_eq!((c.firewalls["a"].kept, c.firewalls["a"].version), (true, 2));
        // A restarted agent too.
        w.ids = Ids::recover(&c.image);
        let c = w.compile();
        assert_eq!((only(&c).1, c.firewalls["a"].kept), (first, true));
        w.set("a", Ok(vec![to("0.0.0.0/0", true)]));
        assert_eq!(only(&w.compile()), (place, first + 1, None));
    }

    #[test]
    fn what_is_refused_from_the_start_denies_everything() {
        let mut w = World::new(&["a"]);
        w.set("a", Err("spec.egress[0]: wrong"));
        let c = w.compile();
        let (place, id, error) = only(&c);
        assert!(error.is_some() && !c.firewalls["a"].kept);
        assert_eq!(c.image.rulesets[&id].ruleset.parts, Ruleset::REFUSED);
        assert_eq!(c.image.pods.values().next().unwrap().firewall, place);
        assert_eq!(only(&w.compile()), (place, id, error.clone()), "again");
        w.ids = Ids::recover(&c.image);
        let c = w.compile();
        assert_eq!((only(&c), c.firewalls["a"].kept), ((place, id, error), false), "after a restart");
        w.set("a", Ok(Vec::new()));
        let (_, next, error) = only(&w.compile());
        assert_eq!((next, error), (id + 1, None), "no rules at all are in force");
    }

    #[test]
    fn a_restarted_agent_knows_all_numbers_again() {
        let mut w = World::new(&["a", "b"]);
        w.set("a", Ok(vec![named("www.example.com"), named("example.org"), deny_all()]));
        w.set("b", Ok(vec![named("www.example.com"), deny_all()]));
        let c = w.compile();
        let numbers: BTreeSet<_> = c.image.names.values().collect();
        assert_eq!(numbers.len(), 3, "each namespace learns for itself");
        w.ids = Ids::recover(&c.image);
        let after = w.compile().image;
        assert_eq!((&after.firewalls, &after.rulesets), (&c.image.firewalls, &c.image.rulesets));
        assert!(after.names == c.image.names && after.pods == c.image.pods);
        assert_eq!(after.settings.next_name, c.image.settings.next_name);
        w.ids = Ids::recover(&c.image);
        w.set("a", Ok(vec![named("example.org"), named("example.net")]));
        let after = w.compile().image;
        let id = |names: &BTreeMap<NameKey, NameId>, name: &str| {
            names.get(&Name { wildcard: false, name: name.to_owned() }.key(1)).copied()
        };
        assert_eq!(
            id(&after.names, "example.org"),
            id(&c.image.names, "example.org"),
            "a name keeps its number"
        );
        assert_eq!(id(&after.names, "example.net"), Some(4));
        assert_eq!(id(&after.names, "www.example.com"), None);
        w.set("a", Ok(vec![named("www.example.com")]));
        assert_eq!(
            id(&w.compile().image.names, "www.example.com"),
            Some(5),
            "gone and back is something new"
        );
    }

    #[test]
    fn a_place_rests_before_another_namespace_has_it() {
        let mut w = World::new(&["a", "b", "c"]);
        w.set("a", Ok(vec![deny_all()]));
        assert_eq!(only(&w.compile()).0, 1);
        w.desired.firewalls.clear();
        w.set("b", Ok(vec![deny_all()]));
        let c = w.compile();
        assert_eq!(only(&c).0, 2);
        assert_eq!(c.image.pods.values().map(|p| p.firewall).collect::<Vec<_>>(), [0, 2, 0]);
        w.set("c", Ok(vec![deny_all()]));
        assert_eq!(w.compile().image.firewalls.keys().copied().collect::<Vec<_>>(), [2, 3]);
        // Round once: the one that rests longest comes first.
        let ids = &mut w.ids;
        for n in 4..u64::from(limits::FIREWALLS) {
            assert_eq!(ids.firewall(n).map(|(f, _)| u64::from(f.place)), Some(n));
        }
        assert_eq!(ids.firewall(7_000).map(|(f, _)| f.place), Some(1));
        assert_eq!(ids.firewall(7_001), None);
    }

    #[test]
    fn pods_without_a_place_for_their_firewall_are_held() {
        let mut w = World::new(&["a"]);
        while w.ids.firewall(u64::from(w.ids.next().name) + w.ids.firewalls().count() as u64).is_some() {}
        w.set("a", Ok(vec![deny_all()]));
        let c = w.compile();
        assert_eq!((c.image.pods.len(), c.image.firewalls.len()), (0, 0));
        let about: Vec<_> = c.problems.iter().map(|p| p.about.as_str()).collect();
        assert_eq!(about, ["EgressFirewall a/default", "Pod a/p"]);
        assert!(c.firewalls["a"].error.as_ref().unwrap().contains("map FIREWALLS of 2048"));
    }

    #[test]
    fn there_is_room_for_two_versions_side_by_side_or_the_old_one_stays() {
        let many = |from: u32| {
            // Each alone with its first word: a line for each, and what leads there.
            let ip = |i| Ipv6Addr::from(u128::from(from + 2 * i) << 96 | 5).into();
            let ips = (0..limits::FIREWALL_ENTRIES as u32).map(ip).collect();
            Ok(vec![Rule { allows: true, to: Destination::Nodes(ips), ports: Vec::new() }])
        };
        let mut w = World::new(&["a", "b", "c", "d"]);
        for (i, namespace) in (0..).zip(["a", "b", "c", "d"]) {
            w.set(namespace, many(0x0100_0000 * (20 + i)));
        }
        let c = w.compile();
        let said = c.firewalls["d"].error.clone().unwrap();
        assert!(said.contains("map RULES of 524272 entries is too full"), "{said}");
        assert_eq!(c.firewalls.values().filter(|s| s.error.is_some()).count(), 1);
        assert!(!c.waits, "nothing leaves");
        let before = c.image.firewalls.clone();
        w.desired.firewalls.remove("d");
        w.set("a", many(0x0100_0000 * 40));
        let c = w.compile();
        assert_eq!(c.firewalls["a"].error.as_deref(), Some(said.as_str()));
        assert_eq!((c.firewalls["a"].kept, c.image.firewalls[&1]), (true, before[&1]));
        assert!(c.waits, "d leaves");
        w.desired.firewalls.remove("b");
        let c = w.compile();
        assert!(c.firewalls["a"].error.is_some() && c.waits, "b stands until it is gone");
        let c = w.compile();
        assert_eq!(c.firewalls["a"].error, None);
        assert!(c.image.firewalls[&1] > before[&1] && !c.waits);
    }
}
