//! The leader's division of an egress IP's ports among the nodes that need them: a pure function from an allocation,
//! and what is known of its nodes, to the next one.
//!
//! A node's first share is large, so that most never ask again; it grows when the node says that it needs more. A
//! living node never loses what it has not given back. What was given back, or was a node's that is gone (known by
//! its UID, so that a node made anew under its name has no right to it), rests: until every gateway's kernel is known
//! to have dropped it, and nothing outside can take a new connection for an old one any more.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use datapath::keys::GranuleRange;
use datapath::limits::GRANULES;

use crate::hashed::Hashed;
use crate::model::{Allocation, Desired, Lease, Resting};
use crate::text::Text;

/// A node that needs ports of an address.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Demander {
    /// Name.
    pub node: Text,
    /// UID of its Node object.
    pub node_uid: Text,
    /// Its boot id.
    pub boot_id: Text,
    /// How many granules it wants in all; 0: whatever comes first.
    pub granules: u16,
}

/// Ports that a node has given back: its kernel has stopped, and no flow is left.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Returned {
    /// Name.
    pub node: Text,
    /// UID of its Node object.
    pub node_uid: Text,
    /// Generation of the lease that the ports are of: the same ports leased again are not given back.
    pub generation: u64,
    /// The ports.
    pub range: GranuleRange,
}

/// What is known of the nodes that an address concerns.
pub struct Situation<'a> {
    /// Nodes that need ports of it.
    pub demanders: &'a BTreeSet<Demander>,
    /// What is given back.
    pub returned: &'a [Returned],
    /// Whether the node of a name and UID is gone for good.
    pub gone: &'a dyn Fn(&str, &str) -> bool,
    /// The generation of the allocation that all nodes which have its port table have loaded; none if one that must
    /// have it has not, or is not heard of.
    pub loaded: Option<u64>,
    /// How many nodes the cluster has.
    pub nodes: usize,
    /// The time, in seconds since 1970.
    pub now: u64,
    /// How long ports rest before another node may use them, in seconds.
    pub rest: u64,
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// The leases, as they shall be.
    pub leases: Vec<Lease>,
    /// What rests.
    pub resting: Vec<Resting>,
    /// Nodes that got nothing, because nothing is left.
    pub refused: Vec<String>,
    /// Nodes that have some, want more, and got less than that.
    pub short: Vec<String>,
}

/// The nodes that need ports of each address, as their agents say. An agent that does not know its Node as it is now
/// is not heard.
#[must_use]
pub fn demands(desired: &Desired) -> BTreeMap<IpAddr, BTreeSet<Demander>> {
    let mut demands: BTreeMap<IpAddr, Vec<Demander>> = BTreeMap::new();
    for (name, node) in &desired.nodes {
        let Some(agent) = node.agent.as_ref().filter(|a| node.exists && a.node_uid == node.uid) else {
            continue;
        };
        let (name, uid, boot): (Text, Text, Text) =
            (name.into(), (&node.uid).into(), (&agent.boot_id).into());
        for (ip, granules) in &agent.demand {
            demands.entry(*ip).or_default().push(Demander {
                node: name.clone(),
                node_uid: uid.clone(),
                boot_id: boot.clone(),
                granules: *granules,
            });
        }
    }
    demands.into_iter().map(|(ip, demanders)| (ip, demanders.into_iter().collect())).collect()
}

/// The next leases of an allocation. If they differ from what it has, they are of the generation after its own.
#[must_use]
pub fn next(old: &Allocation, s: &Situation<'_>) -> Outcome {
    let generation = old.generation + 1;
    let mut leases = old.leases.clone();
    let mut resting = old.resting.clone();
    resting.retain(|r| s.now < r.until || s.loaded.is_none_or(|loaded| loaded < r.generation));
    let mut rest = |range| resting.push(Resting { range, generation, until: s.now + s.rest });
    leases.retain(|l| {
        let gone = (s.gone)(&l.node, &l.node_uid);
        if gone {
            l.ranges.iter().copied().for_each(&mut rest);
        }
        !gone
    });
    for r in s.returned {
        let of = leases.iter_mut().find(|l| {
            l.node == r.node && l.node_uid == r.node_uid && l.generation == r.generation && covers(l, r.range)
        });
        if let Some(lease) = of {
            lease.ranges = without(&lease.ranges, r.range);
            rest(r.range);
        }
    }
    leases.retain(|l| !l.ranges.is_empty());
    let mut free = Free::new(leases.iter().flat_map(|l| &l.ranges).chain(resting.iter().map(|r| &r.range)));
    // Where each demander's leases are, found once: a search for each would cost the square of their number.
    let places: Hashed<_, usize> =
        s.demanders.iter().map(|d| (d.node.as_str(), d.node_uid.as_str())).zip(0..).collect();
    let mut held = vec![Vec::new(); s.demanders.len()];
    for (position, l) in leases.iter().enumerate() {
        if let Some(place) = places.get(&(l.node.as_str(), l.node_uid.as_str())) {
            held[*place].push(position);
        }
    }
    let granules = |leases: &[Lease], held: &[usize]| -> usize {
        held.iter().flat_map(|l| &leases[*l].ranges).map(|r| usize::from(r.count)).sum()
    };
    let lease = |d: &Demander, ranges| Lease {
        node: d.node.clone(),
        node_uid: d.node_uid.clone(),
        boot_id: d.boot_id.clone(),
        since: s.now,
        generation,
        ranges,
    };
    let (mut refused, mut short) = (Vec::new(), Vec::new());
    for d in s.demanders {
        let held = &mut held[places[&(d.node.as_str(), d.node_uid.as_str())]];
        if !held.is_empty() {
            // It may have started anew; the ports are still its own.
            for l in held {
                leases[*l].boot_id.clone_from(&d.boot_id);
            }
            continue;
        }
        match free.hole(first_share(s.demanders.len(), s.nodes, free.count())) {
            None => refused.push(d.node.to_string()),
            Some(range) => {
                free.take(range);
                held.push(leases.len());
                leases.push(lease(d, vec![range]));
            }
        }
    }
    // Then who has some and needs more, but not what others are to begin with.
    let lessees: BTreeSet<_> = leases.iter().map(|l| l.node.as_str()).collect();
    let reserve = s.nodes.saturating_sub(lessees.len()).min(GRANULES / 16);
    for d in s.demanders {
        let held = &mut held[places[&(d.node.as_str(), d.node_uid.as_str())]];
        let has = granules(&leases, held);
        let wants = usize::from(d.granules).min(GRANULES).saturating_sub(has);
        if has == 0 || wants == 0 {
            continue;
        }
        let gets = wants.min(free.count().saturating_sub(reserve));
        if gets < wants {
            short.push(d.node.to_string());
        }
        let ends: Vec<_> = held.iter().flat_map(|l| &leases[*l].ranges).map(|r| r.first + r.count).collect();
        let ranges = free.several(&ends, gets);
        if !ranges.is_empty() {
            held.push(leases.len());
            leases.push(lease(d, ranges));
        }
    }
    Outcome { leases, resting, refused, short }
}

/// Three quarters of the space divided by the nodes in use, so that each can grow; where few are in use yet,
/// by the cluster's nodes up to eight, so that those to come find room. Of a scarce rest not more than three
/// quarters, so that the next finds something too.
fn first_share(demanders: usize, nodes: usize, free: usize) -> usize {
    let share = (GRANULES * 3 / 4 / demanders.max(nodes.min(8)).max(1)).max(1);
    if share > free { (free * 3 / 4).max(1) } else { share }
}

/// Granules that nobody leases and that do not rest.
struct Free([bool; GRANULES]);

impl Free {
    fn new<'a>(taken: impl Iterator<Item = &'a GranuleRange>) -> Self {
        let mut free = Self([true; GRANULES]);
        taken.for_each(|range| free.take(*range));
        free
    }

    fn take(&mut self, range: GranuleRange) {
        self.0[usize::from(range.first)..][..usize::from(range.count)].fill(false);
    }

    fn count(&self) -> usize {
        self.0.iter().filter(|free| **free).count()
    }

    /// How many are free from one on, without a gap.
    fn from(&self, first: usize) -> usize {
        self.0.iter().skip(first).take_while(|free| **free).count()
    }

    /// The first contiguous free range of `want` granules, or else the largest there is.
    fn hole(&self, want: usize) -> Option<GranuleRange> {
        let mut best: Option<(usize, usize)> = None;
        let mut first = 0;
        while let Some(taken) = self.0.get(first..).and_then(|rest| rest.iter().position(|free| *free)) {
            first += taken;
            let length = self.from(first);
            if length >= want {
                best = Some((first, want));
                break;
            }
            if length > best.map_or(0, |(_, length)| length) {
                best = Some((first, length));
            }
            first += length + 1;
        }
        let (first, count) = best.filter(|(_, count)| *count > 0)?;
        Some(GranuleRange { first: u16::try_from(first).ok()?, count: u16::try_from(count).ok()? })
    }

    /// Takes `want` granules, of which there are so many, in as few ranges as may be: behind what the node has, then
    /// the largest.
    fn several(&mut self, ends: &[u16], want: usize) -> Vec<GranuleRange> {
        let mut ranges = Vec::new();
        let mut left = want;
        for end in ends {
            let count = self.from(usize::from(*end)).min(left);
            if count > 0 {
                let range = GranuleRange { first: *end, count: u16::try_from(count).unwrap_or(u16::MAX) };
                self.take(range);
                ranges.push(range);
                left -= count;
            }
        }
        while left > 0
            && let Some(range) = self.hole(left)
        {
            self.take(range);
            ranges.push(range);
            left -= usize::from(range.count);
        }
        ranges.sort_unstable();
        ranges
    }
}

/// Whether all of a range is leased by a lease.
fn covers(lease: &Lease, range: GranuleRange) -> bool {
    lease.ranges.iter().any(|r| r.first <= range.first && range.first + range.count <= r.first + r.count)
}

/// Ranges without one that is within one of them.
fn without(ranges: &[GranuleRange], taken: GranuleRange) -> Vec<GranuleRange> {
    let end = |r: &GranuleRange| r.first + r.count;
    let pieces = ranges.iter().flat_map(|r| {
        if end(r) <= taken.first || end(&taken) <= r.first {
            return vec![*r];
        }
        let before = GranuleRange { first: r.first, count: taken.first.saturating_sub(r.first) };
        let after = GranuleRange { first: end(&taken), count: end(r).saturating_sub(end(&taken)) };
        vec![before, after]
    });
    pieces.filter(|r| r.count > 0).collect()
}

/// Granules that are leased.
#[must_use]
pub fn leased(allocation: &Allocation) -> usize {
    allocation.leases.iter().flat_map(|l| &l.ranges).map(|r| usize::from(r.count)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn demander(n: usize) -> Demander {
        Demander {
            node: format!("n{n:04}").into(),
            node_uid: format!("u{n}").into(),
            boot_id: "b".into(),
            granules: 0,
        }
    }

    fn demanders(n: usize) -> BTreeSet<Demander> {
        (0..n).map(demander).collect()
    }

    fn counts(leases: &[Lease]) -> Vec<u16> {
        leases.iter().map(|l| l.ranges.iter().map(|r| r.count).sum()).collect()
    }

    fn situation(demanders: &BTreeSet<Demander>, nodes: usize) -> Situation<'_> {
        Situation { demanders, returned: &[], gone: &|_, _| false, loaded: None, nodes, now: 1000, rest: 240 }
    }

    /// The allocation as it is after a step.
    fn after(old: &Allocation, o: Outcome) -> Allocation {
        let changed = old.leases != o.leases || old.resting != o.resting;
        Allocation {
            generation: old.generation + u64::from(changed),
            leases: o.leases,
            resting: o.resting,
            ..old.clone()
        }
    }

    fn first(n: usize, nodes: usize) -> Outcome {
        next(&Allocation::default(), &situation(&demanders(n), nodes))
    }

    fn range(first: u16, count: u16) -> GranuleRange {
        GranuleRange { first, count }
    }

    #[test]
    fn the_first_share() {
        assert_eq!(counts(&first(3, 3).leases), [252, 252, 252]);
        assert_eq!(counts(&first(1, 1).leases), [756]);
        assert_eq!(counts(&first(1, 5000).leases), [94]);
        let many = first(1100, 1100);
        assert_eq!(many.leases.len(), GRANULES, "at least one granule, while there are any");
        assert_eq!(many.refused.len(), 1100 - GRANULES);
    }

    #[test]
    fn a_scarce_rest_is_shared() {
        let a = after(&Allocation::default(), first(1, 1));
        let second = next(&a, &situation(&demanders(2), 1)).leases;
        // 504 would be the share; 252 are free.
        assert_eq!(counts(&second), [756, 189]);
        assert_eq!(second[1].generation, 2);
        assert_eq!(second[0], a.leases[0]);
    }

    #[test]
    fn a_node_made_anew_gets_ports_of_its_own_and_a_rebooted_one_keeps_its() {
        let a = after(&Allocation::default(), first(1, 3));
        let mut d = demander(0);
        d.boot_id = "c".into();
        let rebooted = next(&a, &situation(&BTreeSet::from([d.clone()]), 3)).leases;
        assert_eq!((rebooted.len(), rebooted[0].boot_id.as_str(), rebooted[0].generation), (1, "c", 1));
        d.node_uid = "another".into();
        let wanting = BTreeSet::from([d]);
        let anew = next(&a, &situation(&wanting, 3));
        assert_eq!(anew.leases.len(), 2);
        assert_eq!(anew.leases[0], a.leases[0], "while it may be there still");
        let gone = Situation { gone: &|_, uid| uid == "u0", ..situation(&wanting, 3) };
        let fenced = next(&a, &gone);
        assert_eq!(fenced.leases.len(), 1);
        assert_eq!(fenced.leases[0].node_uid, "another");
        assert_eq!(fenced.resting, [Resting { range: range(0, 252), generation: 2, until: 1240 }]);
        assert!(fenced.leases[0].ranges[0].first >= 252, "not what rests");
    }

    #[test]
    fn a_node_grows_behind_what_it_has_and_then_where_there_is_room() {
        let a = after(&Allocation::default(), first(3, 3));
        let asks = |n: usize, granules| Demander { granules, ..demander(n) };
        let of = |d: Demander| {
            let mut all = demanders(3);
            all.retain(|x| x.node != d.node);
            all.insert(d);
            all
        };
        let last = next(&a, &situation(&of(asks(2, 300)), 3));
        assert_eq!(last.leases[3].ranges, [range(756, 48)]);
        assert_eq!((last.leases[3].generation, last.leases[3].node.as_str()), (2, "n0002"));
        assert_eq!(last.leases[..3], a.leases[..], "what it had is as it was");
        // In the middle: nothing is free behind it.
        let b = after(&a, last);
        let middle = next(&b, &situation(&of(asks(0, 504)), 3));
        assert_eq!(middle.leases[4].ranges, [range(804, 204)], "all that is free");
        assert_eq!(middle.short, ["n0000"]);
        let again = after(&b, middle.clone());
        assert_eq!(next(&again, &situation(&of(asks(0, 504)), 3)), middle, "nothing more to do");
        // A cluster with nodes that have none yet keeps some for them.
        let kept = next(&a, &situation(&of(asks(0, 1008)), 40));
        assert_eq!(counts(&kept.leases), [252, 252, 252, 252 - 37]);
    }

    #[test]
    fn what_is_given_back_rests_until_time_and_gateways_let_it() {
        let a = after(&Allocation::default(), first(2, 3));
        let given =
            |generation, range| Returned { node: "n0000".into(), node_uid: "u0".into(), generation, range };
        let one: BTreeSet<_> = [demander(1)].into();
        let returned =
            |a: &Allocation, r: Returned| next(a, &Situation { returned: &[r], ..situation(&one, 3) });
        assert_eq!(returned(&a, given(2, range(0, 252))).leases, a.leases, "of another lease");
        assert_eq!(returned(&a, given(1, range(0, 253))).leases, a.leases, "not its own");
        let part = after(&a, returned(&a, given(1, range(10, 20))));
        assert_eq!(part.leases[0].ranges, [range(0, 10), range(30, 222)]);
        assert_eq!(part.resting, [Resting { range: range(10, 20), generation: 2, until: 1240 }]);
        assert_eq!(returned(&part, given(1, range(10, 20))), returned(&part, given(7, range(0, 1))), "once");
        let at = |now, loaded| next(&part, &Situation { loaded, now, ..situation(&one, 3) }).resting.len();
        assert_eq!([at(1239, Some(2)), at(1240, Some(1)), at(1240, None), at(1240, Some(2))], [1, 1, 1, 0]);
    }

    /// What a node has, and knows, in a history.
    #[derive(Default)]
    struct History {
        allocation: Allocation,
        incarnation: BTreeMap<usize, u32>,
        /// Generation when each granule last ceased to be leased, and the time.
        ended: BTreeMap<usize, (u64, u64)>,
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any history of demand, growth and returns: nodes come, go, and are made anew; what is given back is told
        /// late and twice; gateways load when they like.
        #[test]
        fn a_granule_has_one_lessee_and_another_only_after_its_rest(
            history in proptest::collection::vec(
                (
                    proptest::collection::btree_map(0_usize..40, 0_u16..600, 0..12),
                    proptest::option::of(0_usize..40),
                    proptest::collection::vec((0_usize..40, 0_u16..1008, 1_u16..300), 0..3),
                    proptest::option::of(0_u64..4),
                    1_u64..200,
                    1_usize..60,
                ),
                1..60,
            )
        ) {
            let mut h = History { allocation: Allocation { generation: 1, ..Allocation::default() }, ..History::default() };
            let mut now = 1000;
            let mut gone: BTreeSet<String> = BTreeSet::new();
            for (wanting, replaced, returns, lag, passed, nodes) in history {
                now += passed;
                if let Some(n) = replaced {
                    let i = h.incarnation.entry(n).or_default();
                    gone.insert(format!("u{n}-{i}"));
                    *i += 1;
                }
                let uid = |n: usize| format!("u{n}-{}", h.incarnation.get(&n).copied().unwrap_or(0));
                let demanders: BTreeSet<_> = wanting
                    .iter()
                    .map(|(n, granules)| Demander { node_uid: uid(*n).into(), granules: *granules, ..demander(*n) })
                    .collect();
                // Of ranges that are its own, and of others.
                let returned: Vec<_> = returns
                    .iter()
                    .map(|(n, first, count)| {
                        let own = h.allocation.leases.iter().find(|l| l.node == demander(*n).node);
                        let range = own.map_or(range(*first, *count), |l| l.ranges[usize::from(*first) % l.ranges.len()]);
                        Returned {
                            node: demander(*n).node,
                            node_uid: uid(*n).into(),
                            generation: own.map_or(1, |l| l.generation),
                            range,
                        }
                    })
                    .collect();
                let loaded = lag.map(|lag| h.allocation.generation.saturating_sub(lag));
                let s = Situation {
                    demanders: &demanders,
                    returned: &returned,
                    gone: &|_, uid| gone.contains(uid),
                    loaded,
                    nodes,
                    now,
                    rest: 240,
                };
                let old = h.allocation.clone();
                let outcome = next(&old, &s);
                prop_assert_eq!(&outcome, &next(&old, &s));
                let new = after(&old, outcome.clone());
                // What the state says about itself is accepted again, with nothing more to do but for what rests.
                let again = next(&new, &Situation { returned: &[], ..s });
                prop_assert_eq!(&again.leases, &new.leases);
                let owners = |a: &Allocation| {
                    let mut owners: Vec<Option<(Text, u64)>> = vec![None; GRANULES];
                    for l in &a.leases {
                        for r in &l.ranges {
                            for o in &mut owners[usize::from(r.first)..][..usize::from(r.count)] {
                                assert!(o.replace((l.node_uid.clone(), l.generation)).is_none(), "leased twice");
                            }
                        }
                    }
                    owners
                };
                let (was, is) = (owners(&old), owners(&new));
                for r in &new.resting {
                    prop_assert!(is[usize::from(r.range.first)..][..usize::from(r.range.count)].iter().all(Option::is_none));
                }
                for g in 0..GRANULES {
                    let at = u16::try_from(g).unwrap();
                    match (&was[g], &is[g]) {
                        (Some(before), now_owned) if now_owned.as_ref() != Some(before) => {
                            prop_assert!(now_owned.is_none(), "it rests first");
                            let back = returned.iter().any(|r| {
                                (&r.node_uid, r.generation) == (&before.0, before.1) && (r.range.first..r.range.first + r.range.count).contains(&at)
                            });
                            prop_assert!(back || gone.contains(before.0.as_str()), "a living node is robbed");
                            h.ended.insert(g, (new.generation, now));
                        }
                        _ => {}
                    }
                }
                for r in old.resting.iter().filter(|r| !new.resting.contains(r)) {
                    for g in r.range.first..r.range.first + r.range.count {
                        let (generation, since) = h.ended.remove(&usize::from(g)).unwrap();
                        prop_assert!(now >= since + 240 && loaded >= Some(generation), "too early");
                    }
                }
                for g in h.ended.keys() {
                    prop_assert!(is[*g].is_none(), "leased while it rests");
                }
                for d in &demanders {
                    let has = new.leases.iter().any(|l| l.node_uid == d.node_uid);
                    prop_assert!(has != outcome.refused.iter().any(|n| d.node == *n));
                }
                // Refused only when nothing is left.
                let free = is.iter().filter(|o| o.is_none()).count()
                    - new.resting.iter().map(|r| usize::from(r.range.count)).sum::<usize>();
                prop_assert!(outcome.refused.is_empty() || free == 0);
                prop_assert!(outcome.short.is_empty() || free <= GRANULES / 16);
                h.allocation = new;
            }
        }
    }
}
