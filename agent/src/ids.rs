//! Numbers for pods, EgressIP objects, their addresses and nodes, as the maps have them.
//!
//! Flows name pods, policies and addresses by number. So a number is never given again while the maps live,
//! not even over a restart of the agent: whoever comes later must not inherit a connection. What else is known of
//! pods over changes and restarts, their interfaces, is kept beside ([`Pins`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use datapath::addr::Ip;
use datapath::keys::{EgressId, FirewallId, NameId, NodeId, PodId, PolicyId, RulesetId};
use datapath::limits;

use crate::firewall::{Name, Rule};
use crate::image::{MapImage, Rules};
use crate::pins::Pins;

/// Numbers in use, by what they stand for, and the next ones to give.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ids {
    /// By address and [`identity`].
    pods: BTreeMap<(Ip, u64), PodId>,
    /// By [`identity`].
    policies: BTreeMap<u64, PolicyId>,
    egress: BTreeMap<(PolicyId, Ip), EgressId>,
    /// By tunnel address, of either family. Flows do not name nodes, so these are few and may be given again.
    nodes: BTreeMap<Ip, NodeId>,
    /// By [`identity`] of the namespace.
    firewalls: BTreeMap<u64, KnownFirewall>,
    /// The place that was given last.
    last_place: FirewallId,
    next: Next,
    pub(crate) pins: Pins,
}

/// Rules as they were compiled, or why they could not be.
pub(crate) type Outcome = Result<Arc<Rules>, String>;

/// What is known of a namespace's firewall from one change to the next.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct KnownFirewall {
    /// Its place in `FIREWALLS`.
    pub(crate) place: FirewallId,
    /// The version that is to be in force.
    pub(crate) version: Option<(RulesetId, Arc<Rules>)>,
    /// What was compiled last, and what came of it: also what found no room and may do so later.
    pub(crate) compiled: Option<(Arc<Vec<Rule>>, Outcome)>,
    /// Numbers of its names.
    pub(crate) names: BTreeMap<Name, NameId>,
}

/// The next numbers to give.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Next {
    /// For a pod's address.
    pub pod: PodId,
    /// For an EgressIP object.
    pub policy: PolicyId,
    /// For one address of an EgressIP object.
    pub egress: EgressId,
    /// For a version of a firewall.
    pub ruleset: RulesetId,
    /// For a name of a firewall.
    pub name: NameId,
}

/// A stable hash of what identifies an object: FNV-1a, 64 bits. It has to be the same in every version of the
/// agent, which the standard library's does not promise.
#[must_use]
pub fn identity(parts: &[&str]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        // 0xff is in no UTF-8 text: it keeps the parts apart.
        for byte in part.bytes().chain([0xff]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash
}

impl Ids {
    /// What the kernel's maps say: numbers in use, and in `SETTINGS` the next ones to give.
    #[must_use]
    pub fn recover(image: &MapImage) -> Self {
        let after = |max: Option<&u32>, next: u32| max.map_or(1, |m| m + 1).max(next);
        let s = &image.settings;
        Self {
            pods: image.delivery.iter().map(|(id, d)| ((d.ip, d.identity), *id)).collect(),
            policies: image.policies.iter().map(|(id, p)| (p.identity, *id)).collect(),
            egress: image.egress_ips.iter().map(|(id, e)| ((e.policy, e.ip), *id)).collect(),
            nodes: image.node_addrs.clone(),
            firewalls: recover_firewalls(image),
            last_place: image.firewalls.keys().max().copied().unwrap_or(0),
            next: Next {
                pod: after(image.delivery.keys().chain(image.pods.values().map(|p| &p.id)).max(), s.next_pod),
                policy: after(image.policies.keys().max(), s.next_policy),
                egress: after(image.egress_ips.keys().max(), s.next_egress),
                ruleset: after(image.rulesets.keys().max(), s.next_ruleset),
                name: after(image.names.values().max(), s.next_name),
            },
            pins: Pins::recover(image),
        }
    }

    /// The next numbers to give.
    #[must_use]
    pub const fn next(&self) -> Next {
        self.next
    }

    pub(crate) fn pod(&mut self, ip: Ip, identity: u64) -> PodId {
        *self.pods.entry((ip, identity)).or_insert_with(|| give(&mut self.next.pod))
    }

    pub(crate) fn policy(&mut self, identity: u64) -> PolicyId {
        *self.policies.entry(identity).or_insert_with(|| give(&mut self.next.policy))
    }

    pub(crate) fn egress(&mut self, policy: PolicyId, ip: Ip) -> EgressId {
        *self.egress.entry((policy, ip)).or_insert_with(|| give(&mut self.next.egress))
    }

    /// Numbers nodes, each by its tunnel addresses, the smallest free number first; in the order given. A node
    /// keeps its number while it keeps one of its addresses. Numbers of nodes that are gone are free from the
    /// next call on, so that no entry ever means two nodes within one change. No address may be in two nodes.
    pub(crate) fn nodes(&mut self, nodes: &[Vec<Ip>]) -> Vec<Option<NodeId>> {
        let mut taken: BTreeSet<NodeId> = self.nodes.values().copied().collect();
        let old = std::mem::take(&mut self.nodes);
        let mut kept = BTreeSet::new();
        let mut ids = Vec::with_capacity(nodes.len());
        for addresses in nodes {
            // Addresses that were one node's may be two nodes' now.
            let id = addresses.iter().find_map(|ip| old.get(ip).copied()).filter(|id| kept.insert(*id));
            ids.push(id);
        }
        for (addresses, id) in nodes.iter().zip(&mut ids) {
            if id.is_none() {
                *id = (1..=NodeId::MAX).find(|id| !taken.contains(id));
                taken.extend(*id);
            }
            self.nodes.extend(addresses.iter().filter_map(|ip| Some((*ip, (*id)?))));
        }
        ids
    }

    /// What is known of the firewall of a namespace, by the namespace's [`identity`]; none if no place is free. A
    /// place that is given up is free from the next change on, and is given again after all others.
    pub(crate) fn firewall(&mut self, identity: u64) -> Option<(&mut KnownFirewall, &mut Next)> {
        if !self.firewalls.contains_key(&identity) {
            let taken: BTreeSet<_> = self.firewalls.values().map(|f| f.place).collect();
            let (before, after) = (1..=self.last_place, self.last_place + 1..limits::FIREWALLS);
            let place = after.chain(before).find(|place| !taken.contains(place))?;
            self.last_place = place;
            self.firewalls.insert(identity, KnownFirewall { place, ..KnownFirewall::default() });
        }
        Some((self.firewalls.get_mut(&identity)?, &mut self.next))
    }

    /// The firewalls that are known.
    pub(crate) fn firewalls(&self) -> impl Iterator<Item = &KnownFirewall> {
        self.firewalls.values()
    }

    /// Forgets all that the image has not: should it come back, it is something new.
    pub(crate) fn forget_others(&mut self, image: &MapImage) {
        self.firewalls.retain(|_, firewall| image.firewalls.contains_key(&firewall.place));
        self.pods.retain(|_, id| image.delivery.contains_key(id));
        self.policies.retain(|_, id| image.policies.contains_key(id));
        self.egress.retain(|_, id| image.egress_ips.contains_key(id));
        self.pins.forget_others(image);
    }
}

fn recover_firewalls(image: &MapImage) -> BTreeMap<u64, KnownFirewall> {
    let mut firewalls = BTreeMap::new();
    for (place, id) in &image.firewalls {
        let Some(rules) = image.rulesets.get(id) else { continue };
        let names = image.names.iter().filter(|(key, _)| key.firewall == *place);
        let firewall = KnownFirewall {
            place: *place,
            version: Some((*id, Arc::clone(rules))),
            compiled: None,
            names: names.map(|(key, name)| (Name::of_key(key), *name)).collect(),
        };
        firewalls.insert(rules.ruleset.identity, firewall);
    }
    firewalls
}

/// Numbers are 32 bits wide: a new pod every second for 136 years.
pub(crate) fn give(next: &mut u32) -> u32 {
    let id = (*next).max(1);
    *next = id + 1;
    id
}

#[cfg(test)]
mod tests {
    use super::*;
    use datapath::keys::{Delivery, Policy};

    fn ip(n: u8) -> Ip {
        Ip::v4([10, 0, 0, n])
    }

    #[test]
    fn numbers_are_never_given_again() {
        let mut ids = Ids::default();
        let mut image = MapImage::default();
        let a = ids.pod(ip(1), 7);
        assert_eq!((a, ids.pod(ip(1), 7)), (1, 1));
        image.delivery.insert(a, Delivery { ip: ip(1), identity: 7, ..Delivery::default() });
        image.policies.insert(4, Policy { identity: 9, ..Policy::default() });
        image.settings.next_egress = 50;
        let mut again = Ids::recover(&image);
        assert_eq!(again.pod(ip(1), 7), a);
        assert_eq!(again.pod(ip(1), 8), 2, "another pod at the address");
        assert_eq!((again.policy(9), again.policy(10)), (4, 5));
        assert_eq!(again.egress(4, ip(9)), 50);
        again.forget_others(&MapImage::default());
        assert_eq!(again.pod(ip(1), 7), 3, "gone and back is something new");
    }

    #[test]
    fn a_node_number_rests_for_one_change() {
        let mut ids = Ids::default();
        let of = |ns: &[u8]| ns.iter().map(|n| vec![ip(*n)]).collect::<Vec<_>>();
        assert_eq!(ids.nodes(&of(&[1, 2])), [Some(1), Some(2)]);
        assert_eq!(ids.nodes(&of(&[2, 3])), [Some(2), Some(3)]);
        assert_eq!(ids.nodes(&of(&[2, 3, 4])), [Some(2), Some(3), Some(1)]);
    }

    #[test]
    fn a_node_keeps_its_number_while_it_keeps_an_address() {
        let mut ids = Ids::default();
        assert_eq!(ids.nodes(&[vec![ip(1)], vec![ip(2), ip(12)]]), [Some(1), Some(2)]);
        let node_addrs = BTreeMap::from([(ip(1), 1), (ip(2), 2), (ip(12), 2)]);
        let image = MapImage { node_addrs, ..MapImage::default() };
        assert_eq!(Ids::recover(&image).nodes(&[vec![ip(12)]]), [Some(2)]);
        assert_eq!(ids.nodes(&[vec![ip(11), ip(1)], vec![ip(12)]]), [Some(1), Some(2)]);
        assert_eq!(ids.nodes(&[vec![ip(1)], vec![ip(11)]]), [Some(1), Some(3)], "two where one was");
    }

    #[test]
    fn parts_of_an_identity_do_not_run_together() {
        assert_ne!(identity(&["ab", "c"]), identity(&["a", "bc"]));
        assert_eq!(identity(&[]), 0xcbf2_9ce4_8422_2325);
    }
}
