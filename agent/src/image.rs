//! The desired content of every policy map: what `compile` makes and `apply` writes.

use std::collections::BTreeMap;
use std::sync::Arc;

use datapath::addr::Ip;
use datapath::keys::{
    Delivery, EgressId, EgressIp, FirewallId, GranuleTable, IfIndex, Interface, Lease, NameId, NameKey,
    NameRuleKey, Network, NetworkKey, Node, NodeId, Pod, PodId, PodName, Policy, PolicyId, Ruleset,
    RulesetId, Settings, Winner,
};
use datapath::memory::Memory;
use datapath::rules_build::{self, Span};

/// One map of the kernel a field, by the map's own key. Also what a starting agent reads back.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MapImage {
    /// `SETTINGS`.
    pub settings: Settings,
    /// `PODS`.
    pub pods: BTreeMap<Ip, Pod>,
    /// `DELIVERY`.
    pub delivery: BTreeMap<PodId, Delivery>,
    /// `POD_NAMES`.
    pub pod_names: BTreeMap<PodId, PodName>,
    /// `POLICIES`.
    pub policies: BTreeMap<PolicyId, Policy>,
    /// `EGRESS_IPS`.
    pub egress_ips: BTreeMap<EgressId, EgressIp>,
    /// `EGRESS_ADDRS`.
    pub egress_addrs: BTreeMap<Ip, EgressId>,
    /// `GRANULES`. Shared between copies: each has two kilobytes, and the agent keeps an image and the kernel's side another.
    pub granules: BTreeMap<EgressId, Arc<GranuleTable>>,
    /// `LEASES`.
    pub leases: BTreeMap<EgressId, Lease>,
    /// `NODES`.
    pub nodes: BTreeMap<NodeId, Node>,
    /// `NODE_ADDRS`.
    pub node_addrs: BTreeMap<Ip, NodeId>,
    /// `INTERFACES`.
    pub interfaces: BTreeMap<IfIndex, Interface>,
    /// `NETWORKS`.
    pub networks: BTreeMap<NetworkKey, Network>,
    /// `FIREWALLS`: the version that is to be in force.
    pub firewalls: BTreeMap<FirewallId, RulesetId>,
    /// `RULESETS`, and what hangs on each. Shared, for it is large and the same from one image to the next.
    pub rulesets: BTreeMap<RulesetId, Arc<Rules>>,
    /// `NAMES`.
    pub names: BTreeMap<NameKey, NameId>,
    /// `RESOLVERS`.
    pub resolvers: BTreeMap<Ip, u32>,
}

/// One version of a firewall's rules: what the maps hold under its number. Keys are without it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    /// `RULESETS`, without the places in `RULES`, which a version is given when it is written.
    pub ruleset: Ruleset,
    /// What the trees of `RULES` for IPv4 are made of, sorted by class and address. Each class ends with the highest.
    pub v4: Vec<Span<u32>>,
    /// As above, for IPv6.
    pub v6: Vec<Span<u128>>,
    /// How many blocks of `RULES` they take: [`Rules::count_blocks`].
    pub blocks: u32,
    /// The spans of port numbers, with their class for winner, that the tree of `RULES` for ports is made of; none: there
    /// are no rules with ports.
    pub ports: Vec<Span<u32>>,
    /// `NAME_RULES`: name and class to winner, sorted.
    pub names: Vec<(NameId, u16, Winner)>,
}

impl Rules {
    /// Says in [`Rules::blocks`] how many they are.
    #[must_use]
    pub fn count_blocks(self) -> Self {
        Self { blocks: rules_build::blocks(&self.v4, &self.v6, &self.ports), ..self }
    }

    /// The rules that decide something, as [`Winner::order`], often more than once.
    pub fn winners(&self) -> impl Iterator<Item = u32> + '_ {
        let spans = self.v4.iter().map(|s| s.winner).chain(self.v6.iter().map(|s| s.winner));
        spans.filter(|winner| *winner != Winner::NONE).chain(self.names.iter().map(|(_, _, w)| w.order))
    }

    /// What `NAME_RULES` holds of them.
    pub fn name_entries(&self, id: RulesetId) -> impl ExactSizeIterator<Item = (NameRuleKey, Winner)> + '_ {
        self.names.iter().map(move |(name, class, winner)| {
            (NameRuleKey { ruleset: id, name: *name, class: u32::from(*class) }, *winner)
        })
    }

    /// Puts them into tables in memory, as the apply step puts them into the kernel's maps.
    pub fn fill(&self, id: RulesetId, memory: &mut Memory) {
        memory.put_rules(id, self.ruleset, (&self.v4, &self.v6, &self.ports));
        memory.name_rules.extend(self.name_entries(id));
    }
}
