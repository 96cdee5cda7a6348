//! The desired content of every policy map: what `compile` makes and `apply` writes.

use std::collections::BTreeMap;

use datapath::addr::Ip;
use datapath::keys::{
    Delivery, EgressId, EgressIp, GranuleTable, IfIndex, Interface, Lease, Network, NetworkKey, Node, NodeId,
    Pod, PodId, PodName, Policy, PolicyId, Settings,
};

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
}
