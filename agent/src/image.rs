//! The desired content of every policy map: what `compile` makes and `apply` writes.

use std::collections::BTreeMap;
use std::sync::Arc;

use datapath::addr::Ip;
use datapath::keys::{
    Delivery, EgressId, EgressIp, FirewallId, GranuleTable, IfIndex, Interface, Lease, NameId, NameKey,
    Network, NetworkKey, Node, NodeId, Pod, PodId, PodName, Policy, PolicyId, PortPage, PortTable, Ruleset,
    RulesetId, Settings, Winner,
};
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
