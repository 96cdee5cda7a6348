//! The desired content of every policy map: what `compile` makes and `apply` writes.

use std::collections::BTreeMap;
use std::sync::Arc;

use datapath::addr::Ip;
use datapath::keys::{
    Delivery, EgressId, EgressIp, FirewallId, GranuleTable, IfIndex, Interface, Lease, NameId, NameKey,
    NameRuleKey, Network, NetworkKey, Node, NodeId, Pod, PodId, PodName, Policy, PolicyId, PortPage,
    PortPageKey, PortTable, PortsKey, RuleKey, RulePlace, Ruleset, RulesetId, Settings, Winner,
};
use datapath::memory::Memory;
use ipnet::IpNet;

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
    /// `GRANULES`.
    pub granules: BTreeMap<EgressId, GranuleTable>,
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
    /// `RULESETS`.
    pub ruleset: Ruleset,
    /// `RULES`, sorted: class, prefix, winner. A prefix of IPv4 has the length that IPv4 gives it.
    pub rules: Vec<(u16, IpNet, Winner)>,
    /// `PORTS`: protocol to table.
    pub ports: Vec<(u8, PortTable)>,
    /// `PORT_PAGES`, by number.
    pub pages: Vec<PortPage>,
    /// `NAME_RULES`: name and class to winner, sorted.
    pub names: Vec<(NameId, u16, Winner)>,
}

impl Rules {
    /// What `RULES` holds of them under a version's number, in the order of [`Rules::rules`].
    pub fn rules_entries(&self, id: RulesetId) -> impl ExactSizeIterator<Item = (RuleKey, Winner)> + '_ {
        self.rules.iter().map(move |(class, net, winner)| (rule_key(id, *class, net), *winner))
    }

    /// What `PORTS` holds of them.
    pub fn ports_entries(&self, id: RulesetId) -> impl ExactSizeIterator<Item = (PortsKey, &PortTable)> + '_ {
        self.ports
            .iter()
            .map(move |(protocol, table)| (PortsKey { ruleset: id, protocol: u32::from(*protocol) }, table))
    }

    /// What `PORT_PAGES` holds of them.
    pub fn page_entries(
        &self,
        id: RulesetId,
    ) -> impl ExactSizeIterator<Item = (PortPageKey, &PortPage)> + '_ {
        self.pages
            .iter()
            .enumerate()
            .map(move |(n, page)| (PortPageKey { ruleset: id, page: n as u32 }, page))
    }

    /// What `NAME_RULES` holds of them.
    pub fn name_entries(&self, id: RulesetId) -> impl ExactSizeIterator<Item = (NameRuleKey, Winner)> + '_ {
        self.names.iter().map(move |(name, class, winner)| {
            (NameRuleKey { ruleset: id, name: *name, class: u32::from(*class) }, *winner)
        })
    }

    /// Puts them into tables in memory, as the apply step puts them into the kernel's maps.
    pub fn fill(&self, id: RulesetId, memory: &mut Memory) {
        memory.rulesets.insert(id, self.ruleset);
        memory.rules.extend(self.rules_entries(id));
        memory.ports.extend(self.ports_entries(id).map(|(key, table)| (key, *table)));
        memory.port_pages.extend(self.page_entries(id).map(|(key, page)| (key, *page)));
        memory.name_rules.extend(self.name_entries(id));
    }
}

/// The key of a rule's prefix. Its family is the prefix' own: `::ffff:0:0/96` is IPv6, which no packet's address is.
fn rule_key(ruleset: RulesetId, class: u16, net: &IpNet) -> RuleKey {
    let (family, shorter) = match net {
        IpNet::V4(_) => (4, 96),
        IpNet::V6(_) => (6, 0),
    };
    let place = RulePlace { ruleset, class, family, ip: net.addr().into() };
    RuleKey { prefix_len: RuleKey::FIXED_BITS + shorter + u32::from(net.prefix_len()), place }
}
