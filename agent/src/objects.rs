//! The Kubernetes objects that Outgate reads and writes, as they stand in YAML and JSON.
//!
//! These types take whatever a real cluster has: unknown fields are ignored and `null` is the same as absent.
//! What a field means, and whether it is right, is [`crate::model`]'s business.
//!
//! The CRDs' schemas are made from the types that are `JsonSchema` ([`crate::crd`]): the words on their fields are what
//! `kubectl explain` says, and their bounds are attributes beside the fields.

use std::collections::BTreeMap;
use std::fmt;

use datapath::limits::{GRANULES, POLICY_ADDRESSES};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use crate::crd::{self, Address, Network};
use crate::firewall::check::Spec as FirewallSpec;
use crate::model::Checked;
use crate::text::{Labels, Text};

/// The label key that lets a node own egress IPs; its value is ignored.
pub const EGRESS_ASSIGNABLE: &str = "k8s.ovn.org/egress-assignable";
/// The node annotation that says how many addresses the node may hold (clouds bound it).
pub const EGRESS_CAPACITY: &str = "cloud.network.openshift.io/egress-ipconfig";
/// The label that the API server puts on every namespace: its own name.
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";
/// API version of Outgate's own objects.
pub const OUTGATE_API: &str = "outgate.dev/v1alpha1";
/// API version of EgressIP and EgressFirewall.
pub const OVN_API: &str = "k8s.ovn.org/v1";

/// The last granule of an egress IP.
const LAST_GRANULE: usize = GRANULES - 1;

/// `metadata` of any object.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    /// Name.
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    /// Namespace; empty for cluster-scoped objects.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// UID; files written by hand have none.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// Counts the changes of the spec.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_zero")]
    pub generation: u64,
    /// Version of the whole object, opaque.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub resource_version: String,
    /// RFC 3339, UTC; so order of text is order of time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
    /// Set while the object is going away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deletion_timestamp: Option<String>,
    /// Labels.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Annotations.
    #[serde(deserialize_with = "text_map", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Meta {
    /// Orders objects by age, oldest first; an object without a creation time is the youngest, and names
    /// decide between equals.
    #[must_use]
    pub fn age(&self) -> (bool, &str, &str, &str) {
        let created = self.creation_timestamp.as_deref();
        (created.is_none(), created.unwrap_or_default(), &self.namespace, &self.name)
    }
}

/// `v1` Node.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Metadata.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Spec.
    #[serde(deserialize_with = "or_default")]
    pub spec: NodeSpec,
    /// Status.
    #[serde(deserialize_with = "or_default")]
    pub status: NodeStatus,
}

/// `spec` of a Node.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    /// The first of the networks its pods are in.
    #[serde(rename = "podCIDR", deserialize_with = "or_default")]
    pub pod_cidr: String,
    /// All of them.
    #[serde(rename = "podCIDRs", deserialize_with = "or_default")]
    pub pod_cidrs: Vec<String>,
}

/// `status` of a Node.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Its addresses.
    #[serde(deserialize_with = "or_default")]
    pub addresses: Vec<NodeAddress>,
    /// Its conditions; `Ready` is the one that matters.
    #[serde(deserialize_with = "or_default")]
    pub conditions: Vec<Condition>,
}

/// One of a Node's addresses.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname` and others.
    #[serde(rename = "type", deserialize_with = "or_default")]
    pub kind: String,
    /// The address.
    #[serde(deserialize_with = "or_default")]
    pub address: String,
}

/// Whether something holds, and why or why not.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// What it is about: one word for programs.
    #[serde(rename = "type", deserialize_with = "or_default")]
    pub kind: String,
    /// The egress IP that it is about, if it is about one.
    #[serde(rename = "egressIP", deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub egress_ip: String,
    /// `True`, `False` or `Unknown`.
    #[serde(deserialize_with = "or_default")]
    pub status: String,
    /// One word for programs.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// A sentence for people.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// When `status` last changed, RFC 3339.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub last_transition_time: String,
}

/// `v1` Namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// Metadata.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
}

/// `v1` Pod.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// Metadata.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Spec.
    #[serde(deserialize_with = "or_default")]
    pub spec: PodSpec,
    /// Status.
    #[serde(deserialize_with = "or_default")]
    pub status: PodStatus,
}

/// `spec` of a Pod.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// The node it runs on; empty until it is scheduled.
    #[serde(deserialize_with = "or_default")]
    pub node_name: String,
    /// Whether it uses the node's own network.
    #[serde(deserialize_with = "or_default")]
    pub host_network: bool,
}

/// `status` of a Pod.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    /// Its first address.
    #[serde(rename = "podIP", deserialize_with = "or_default")]
    pub pod_ip: String,
    /// All its addresses.
    #[serde(rename = "podIPs", deserialize_with = "or_default")]
    pub pod_ips: Vec<PodIp>,
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
    #[serde(deserialize_with = "or_default")]
    pub phase: String,
}

/// `v1` Service: only that of the cluster's DNS is looked at.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    /// Metadata.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Spec.
    #[serde(deserialize_with = "or_default")]
    pub spec: ServiceSpec,
}

/// `spec` of a Service.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ServiceSpec {
    /// Its first address; `None` if it has none.
    #[serde(rename = "clusterIP", deserialize_with = "or_default")]
    pub cluster_ip: String,
    /// All its addresses.
    #[serde(rename = "clusterIPs", deserialize_with = "or_default")]
    pub cluster_ips: Vec<String>,
}

/// One of a Pod's addresses.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodIp {
    /// The address.
    #[serde(deserialize_with = "or_default")]
    pub ip: String,
}

/// A label selector. The empty one selects everything.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
pub struct LabelSelector {
    /// Labels that must be there with these values.
    #[serde(deserialize_with = "text_map")]
    #[schemars(extend("maxProperties" = crd::SELECTOR_LABELS, "additionalProperties" = crd::label_value()))]
    pub match_labels: BTreeMap<String, String>,
    /// Further demands; all must hold.
    #[serde(deserialize_with = "or_default")]
    #[schemars(length(max = crd::SELECTOR_EXPRESSIONS), extend("x-kubernetes-list-type" = "atomic"))]
    pub match_expressions: Vec<LabelRequirement>,
}

/// A demand on a label.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("required" = ["key", "operator"], "x-kubernetes-validations" = crd::rules(&[crd::rules::SELECTOR_VALUES])))]
pub struct LabelRequirement {
    /// The label.
    #[serde(deserialize_with = "or_default")]
    #[schemars(length(min = 1, max = 317), regex(pattern = crd::LABEL_KEY))]
    pub key: String,
    /// `In`, `NotIn`, `Exists` or `DoesNotExist`.
    #[serde(deserialize_with = "or_default")]
    #[schemars(extend("enum" = ["In", "NotIn", "Exists", "DoesNotExist"]))]
    pub operator: String,
    /// Values for `In` and `NotIn`, at least one; none for `Exists` and `DoesNotExist`.
    #[serde(deserialize_with = "or_default")]
    #[schemars(with = "Vec<crd::LabelValue>", length(max = crd::SELECTOR_VALUES), extend("x-kubernetes-list-type" = "atomic"))]
    pub values: Vec<String>,
}

/// `k8s.ovn.org/v1` EgressIP.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EgressIp {
    /// Metadata.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Spec.
    #[serde(deserialize_with = "or_default")]
    pub spec: EgressIpSpec,
}

/// What is wanted: which pods leave the cluster by which addresses.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["egressIPs", "namespaceSelector"]))]
pub struct EgressIpSpec {
    /// The addresses, IPv4 or IPv6: free ones, which no host has. Each is held by one egress node at a time.
    #[serde(rename = "egressIPs", deserialize_with = "or_default")]
    #[schemars(with = "Vec<Address>", length(min = 1, max = POLICY_ADDRESSES), extend("x-kubernetes-list-type" = "atomic"))]
    pub egress_ips: Vec<String>,
    /// Namespaces it is for, by their labels. Required; the empty selector `{}` selects all namespaces.
    #[schemars(with = "LabelSelector")]
    pub namespace_selector: Option<LabelSelector>,
    /// Pods of these namespaces, by their labels; absent or empty: all.
    #[serde(deserialize_with = "or_default")]
    pub pod_selector: LabelSelector,
}

/// What has come of it: which node holds each address, and why one is not in force.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("required" = ["items"]))]
pub struct EgressIpStatus {
    /// Addresses that a node holds.
    #[serde(deserialize_with = "or_default")]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub items: Vec<EgressIpItem>,
    /// Why an address is or is not in force.
    #[serde(deserialize_with = "or_default")]
    pub conditions: Vec<Condition>,
}

/// One address and the node that holds it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("required" = ["egressIP", "node"]))]
pub struct EgressIpItem {
    /// The node that holds it.
    #[serde(deserialize_with = "or_default")]
    pub node: String,
    /// The address.
    #[serde(rename = "egressIP", deserialize_with = "or_default")]
    pub egress_ip: String,
}

/// An EgressIP's status as a file.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressIpReport {
    /// `k8s.ovn.org/v1`.
    pub api_version: String,
    /// `EgressIP`.
    pub kind: String,
    /// Metadata.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Status.
    #[serde(deserialize_with = "or_default")]
    pub status: EgressIpStatus,
}

/// `k8s.ovn.org/v1` EgressFirewall.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EgressFirewall {
    /// Metadata.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Spec, checked as it is read: an object is looked at far more often than it changes, and may have thousands
    /// of rules. Whatever stands there is read; mistakes refuse the object, not its file.
    pub spec: FirewallSpec,
}

/// What has come of it on the nodes that have pods of the namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct EgressFirewallStatus {
    /// `EgressFirewall Rules applied` or `EgressFirewall Rules not correctly applied`; empty until all nodes that it concerns
    /// have said so.
    #[serde(deserialize_with = "or_default")]
    pub status: String,
    /// The same of each node, after its name.
    #[serde(deserialize_with = "or_default")]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub messages: Vec<String>,
    /// Why it is or is not in force.
    #[serde(deserialize_with = "or_default")]
    pub conditions: Vec<Condition>,
}

/// An EgressFirewall's status as a file.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressFirewallReport {
    /// `k8s.ovn.org/v1`.
    pub api_version: String,
    /// `EgressFirewall`.
    pub kind: String,
    /// Metadata.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Status.
    #[serde(deserialize_with = "or_default")]
    pub status: EgressFirewallStatus,
}

/// `outgate.dev/v1alpha1` EgressConfig.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EgressConfig {
    /// Metadata.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Spec.
    #[serde(deserialize_with = "or_default")]
    pub spec: EgressConfigSpec,
}

/// Settings of the whole cluster. What is left out has the default that its field says.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressConfigSpec {
    /// Pod networks, where they cannot be read from the nodes: traffic to them never leaves by an egress IP.
    #[serde(rename = "clusterCIDRs", deserialize_with = "or_default")]
    #[schemars(with = "Vec<Network>", length(max = 1000), extend("x-kubernetes-list-type" = "atomic"))]
    pub cluster_cidrs: Vec<String>,
    /// Service networks: traffic to them never leaves by an egress IP.
    #[serde(rename = "serviceCIDRs", deserialize_with = "or_default")]
    #[schemars(with = "Vec<Network>", length(max = 1000), extend("x-kubernetes-list-type" = "atomic"))]
    pub service_cidrs: Vec<String>,
    /// What becomes of a selected pod's traffic while no node holds its address: `Drop` (the default), or `NodeIP`: it leaves by
    /// the node's own address, as with OVN-Kubernetes.
    #[schemars(extend("enum" = ["Drop", "NodeIP"]))]
    pub unassigned: Option<String>,
    /// What becomes of the packets of a pod that is not known yet: `Hold` (the default), or `Allow`: they leave by the node's
    /// own address.
    #[schemars(extend("enum" = ["Hold", "Allow"]))]
    pub unknown_pods: Option<String>,
    /// How flows spread over an object's addresses: by `Pod` (the default: one pod, one address) or by `Connection`.
    #[schemars(extend("enum" = ["Pod", "Connection"]))]
    pub spread: Option<String>,
    /// Whether packets skip the node's own network stack: `Auto` (the default), `Never`, or `Always`: the nodes have no
    /// netfilter rules to honour.
    #[schemars(extend("enum" = ["Auto", "Never", "Always"]))]
    pub offload: Option<String>,
    /// Networks of egress IPs that routers outside send to the egress nodes by a route. Such an address needs
    /// no interface in its network: it leaves by the uplink of the node's default route, and is not announced.
    #[serde(rename = "routedCIDRs", deserialize_with = "or_default")]
    #[schemars(with = "Vec<Network>", length(max = 1000), extend("x-kubernetes-list-type" = "atomic"))]
    pub routed_cidrs: Vec<String>,
    /// The tunnel between the nodes.
    #[serde(deserialize_with = "or_default")]
    pub tunnel: TunnelSpec,
    /// How long flows may be idle.
    #[serde(deserialize_with = "or_default")]
    pub timeouts: TimeoutsSpec,
    /// Whether what an EgressFirewall denies is answered: `Drop` (the default: it is not) or `Reject`.
    #[schemars(extend("enum" = ["Drop", "Reject"]))]
    pub deny_action: Option<String>,
    /// Addresses of resolvers that pods ask, besides the cluster's DNS service and the nodes.
    #[serde(deserialize_with = "or_default")]
    #[schemars(with = "Vec<Address>", length(max = 1000), extend("x-kubernetes-list-type" = "atomic"))]
    pub resolvers: Vec<String>,
}

/// The tunnel between the nodes. Nodes need one port of one protocol open between them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TunnelSpec {
    /// UDP port; 4795 unless it is set.
    #[schemars(range(min = 1, max = 65_535))]
    pub port: Option<i64>,
    /// VXLAN network identifier; chosen by the leader unless it is set.
    #[schemars(range(min = 1, max = 16_777_215))]
    pub vni: Option<i64>,
}

/// How long flows may be idle, in seconds.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TimeoutsSpec {
    /// An established TCP connection; 7440 (RFC 5382).
    #[schemars(range(min = 1, max = crd::LONGEST_TIMEOUT))]
    pub tcp_established_seconds: Option<i64>,
    /// A TCP connection that opens or closes; 240 (RFC 5382).
    #[schemars(range(min = 1, max = crd::LONGEST_TIMEOUT))]
    pub tcp_transitory_seconds: Option<i64>,
    /// UDP; 300 (RFC 4787).
    #[schemars(range(min = 1, max = crd::LONGEST_TIMEOUT))]
    pub udp_seconds: Option<i64>,
    /// ICMP echo; 60 (RFC 5508).
    #[schemars(range(min = 1, max = crd::LONGEST_TIMEOUT))]
    pub icmp_seconds: Option<i64>,
    /// How long a port rests after its connection was closed; 65.
    #[schemars(range(min = 1, max = crd::LONGEST_TIMEOUT))]
    pub port_rest_seconds: Option<i64>,
}

/// `outgate.dev/v1alpha1` EgressNode: what the leader tells a node (`spec`), and what the node's agent says about it
/// (`status`). Each is written by that one only.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressNode {
    /// `outgate.dev/v1alpha1`.
    pub api_version: String,
    /// `EgressNode`.
    pub kind: String,
    /// Metadata; the name is the node's.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Spec.
    #[serde(deserialize_with = "or_default")]
    pub spec: EgressNodeSpec,
    /// Status.
    #[serde(deserialize_with = "or_default")]
    pub status: EgressNodeStatus,
}

impl Default for EgressNode {
    fn default() -> Self {
        Self {
            api_version: OUTGATE_API.to_owned(),
            kind: "EgressNode".to_owned(),
            metadata: Meta::default(),
            spec: EgressNodeSpec::default(),
            status: EgressNodeStatus::default(),
        }
    }
}

/// What the leader tells this node and others about it. It holds what agents need of the Node object, which changes far too
/// often to be watched by every node.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressNodeSpec {
    /// UID of the Node object.
    #[serde(rename = "nodeUID", deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub node_uid: String,
    /// The Node object's labels.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The Node object's internal addresses, in its order.
    #[serde(rename = "internalIPs", deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub internal_ips: Vec<String>,
    /// The Node object's external addresses.
    #[serde(rename = "externalIPs", deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub external_ips: Vec<String>,
    /// Networks of the node's pods.
    #[serde(rename = "podCIDRs", deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<String>,
    /// Ports that the node may use, all confirmed by the kernels of the addresses' gateways.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<GrantedPorts>,
}

/// Ports of one egress IP that a node may use.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GrantedPorts {
    /// The address.
    #[serde(rename = "egressIP", deserialize_with = "or_default")]
    pub egress_ip: String,
    /// `metadata.uid` of the EgressAllocation: an address given up and taken again is another allocation.
    #[serde(deserialize_with = "or_default")]
    pub uid: String,
    /// `metadata.generation` of the EgressAllocation that this was last changed for. A leader that knows only an earlier
    /// one leaves this alone, so an entry stays, without ranges, while the allocation does.
    #[serde(deserialize_with = "or_default")]
    pub generation: u64,
    /// The node to send by: that which holds the address, once it has the table; empty for none.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub owner: String,
    /// The ports, each range with the generation of the lease that it is of.
    #[serde(deserialize_with = "or_default")]
    pub ranges: Vec<GrantedGranules>,
}

/// A contiguous range of granules of one lease: 64 ports each, granule 0 begins at port 1024. The lease's generation tells
/// them from the same granules leased again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct GrantedGranules {
    /// The first.
    #[schemars(range(max = LAST_GRANULE))]
    pub first: u16,
    /// How many.
    #[schemars(range(max = GRANULES))]
    pub count: u16,
    /// `generation` of the lease.
    pub generation: u64,
}

/// What the node's agent says about its node.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressNodeStatus {
    /// UID of the Node object: a node made anew under an old name is another node.
    #[serde(rename = "nodeUID", deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub node_uid: String,
    /// The kernel's boot id: a node that has restarted has forgotten its flows.
    #[serde(rename = "bootID", deserialize_with = "or_default")]
    pub boot_id: String,
    /// Where its tunnel sends from and receives at, the first of `tunnelAddresses`; empty while it has no address.
    #[serde(deserialize_with = "or_default")]
    pub tunnel_address: String,
    /// The same of each family that it has, IPv4 first. All nodes use one family: IPv4 if all have it.
    #[serde(deserialize_with = "or_default")]
    pub tunnel_addresses: Vec<String>,
    /// Every address of the node.
    #[serde(deserialize_with = "or_default")]
    pub addresses: Vec<String>,
    /// Interfaces that lead out.
    #[serde(deserialize_with = "or_default")]
    pub uplinks: Vec<EgressUplink>,
    /// Egress IPs that the node's pods need ports of.
    #[serde(deserialize_with = "or_default")]
    pub demand: Vec<PortDemand>,
    /// Ports that the node's kernel has stopped using, with no flow left on them: the leader may take them back.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub returned: Vec<ReturnedPorts>,
    /// Allocations whose whole port table the node's kernel has.
    #[serde(deserialize_with = "or_default")]
    pub loaded: Vec<LoadedAllocation>,
    /// What has come of each EgressFirewall whose namespace has pods on the node.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub firewalls: Vec<AppliedFirewall>,
    /// EgressIPs that select pods of the node which older ones serve.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub shadowed: Vec<ShadowedPods>,
}

/// Pods of a node that an EgressIP selects and an older one serves.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ShadowedPods {
    /// Name of the object.
    #[serde(rename = "egressIP", deserialize_with = "or_default")]
    pub egress_ip: String,
    /// Name of the older one.
    #[serde(deserialize_with = "or_default")]
    pub by: String,
    /// How many pods.
    pub pods: u32,
}

/// An egress IP that a node's pods need ports of.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PortDemand {
    /// The address.
    #[serde(rename = "egressIP", deserialize_with = "or_default")]
    pub egress_ip: String,
    /// How many granules in all the node wants; 0: whatever the leader gives at first.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_zero16")]
    #[schemars(range(max = GRANULES))]
    pub granules: u16,
}

/// Ports of one egress IP that a node gives back.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReturnedPorts {
    /// The address.
    #[serde(rename = "egressIP", deserialize_with = "or_default")]
    pub egress_ip: String,
    /// `metadata.uid` of the EgressAllocation.
    #[serde(deserialize_with = "or_default")]
    pub uid: String,
    /// The ports, as they were granted.
    #[serde(deserialize_with = "or_default")]
    pub ranges: Vec<GrantedGranules>,
}

/// What has come of one EgressFirewall in a node's kernel.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct AppliedFirewall {
    /// Its namespace.
    #[serde(deserialize_with = "or_default")]
    pub namespace: String,
    /// `metadata.uid` of the object.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The version of it that was last taken up: a digest of its spec.
    #[serde(deserialize_with = "or_default")]
    pub version: String,
    /// Why that is not in force; empty: it is.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// With a message: whether the version before is in force still.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "std::ops::Not::not")]
    pub kept: bool,
}

/// An uplink of an EgressNode.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressUplink {
    /// Interface name.
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    /// Hardware address.
    #[serde(deserialize_with = "or_default")]
    pub mac: String,
    /// Its addresses with their prefix lengths, and IPv6 prefixes that are on the link.
    #[serde(deserialize_with = "or_default")]
    pub networks: Vec<String>,
    /// Families whose default route leaves by it: `IPv4`, `IPv6`.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub default_route: Vec<String>,
    /// Whether it is up and has carrier.
    #[serde(deserialize_with = "or_default")]
    pub up: bool,
}

/// That a node's kernel has an allocation's port table.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadedAllocation {
    /// The address.
    #[serde(rename = "egressIP", deserialize_with = "or_default")]
    pub egress_ip: Text,
    /// `metadata.uid` of the EgressAllocation: an address given up and taken again is another allocation.
    #[serde(deserialize_with = "or_default")]
    pub uid: Text,
    /// `metadata.generation` of the EgressAllocation.
    #[serde(deserialize_with = "or_default")]
    pub generation: u64,
}

/// `outgate.dev/v1alpha1` EgressAllocation: who holds one egress IP and who leases which of its ports.
/// Written by the leader only.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressAllocation {
    /// `outgate.dev/v1alpha1`.
    pub api_version: String,
    /// `EgressAllocation`.
    pub kind: String,
    /// Metadata; the name is [`crate::addresses::object_name`] of the address.
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    /// Spec.
    #[serde(deserialize_with = "or_default")]
    pub spec: EgressAllocationSpec,
}

impl Default for EgressAllocation {
    fn default() -> Self {
        Self {
            api_version: OUTGATE_API.to_owned(),
            kind: "EgressAllocation".to_owned(),
            metadata: Meta::default(),
            spec: EgressAllocationSpec::default(),
        }
    }
}

/// Who holds an egress IP, who may hold it next, and who leases which of its ports.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["egressIP"]))]
pub struct EgressAllocationSpec {
    /// The address.
    #[serde(rename = "egressIP", deserialize_with = "or_default")]
    #[schemars(length(max = 45))]
    pub egress_ip: String,
    /// The node that holds it; empty for none.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub owner: String,
    /// Nodes that may hold it next, best first; their kernels have its port table.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub standbys: Vec<String>,
    /// Who leases which ports.
    #[serde(deserialize_with = "or_default")]
    pub leases: Vec<PortLease>,
    /// Ports taken back that nobody may use yet.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub resting: Vec<RestingPorts>,
}

/// Ports of an egress IP that were given back, or were a node's that is gone. They are free once the kernels of holder and
/// standbys have dropped them and their rest is over.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RestingPorts {
    /// The first granule.
    #[schemars(range(max = LAST_GRANULE))]
    pub first: u16,
    /// How many.
    #[schemars(range(max = GRANULES))]
    pub count: u16,
    /// `metadata.generation` of the allocation that first had no lease on them.
    pub generation: u64,
    /// Not before this time, RFC 3339, UTC.
    #[serde(deserialize_with = "or_default")]
    pub until: String,
}

/// One node's ports of an egress IP.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PortLease {
    /// Name of the node.
    #[serde(deserialize_with = "or_default")]
    pub node: Text,
    /// UID of the node.
    #[serde(rename = "nodeUID", deserialize_with = "or_default", skip_serializing_if = "is_empty")]
    pub node_uid: Text,
    /// Boot id of the node.
    #[serde(rename = "bootID", deserialize_with = "or_default", skip_serializing_if = "is_empty")]
    pub boot_id: Text,
    /// Since when it is as it is, RFC 3339, UTC.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_empty")]
    pub since: Text,
    /// `metadata.generation` of the allocation that first had this lease as it is.
    #[serde(deserialize_with = "or_default")]
    pub generation: u64,
    /// The ports, as ranges of granules.
    #[serde(deserialize_with = "or_default")]
    pub ranges: Vec<Granules>,
}

/// A contiguous range of granules: 64 ports each, granule 0 begins at port 1024.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Granules {
    /// The first.
    #[schemars(range(max = LAST_GRANULE))]
    pub first: u16,
    /// How many.
    #[schemars(range(max = GRANULES))]
    pub count: u16,
}

/// What all agents of a directory agree on, chosen once by the leader.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Cluster {
    /// The tunnel.
    pub tunnel: Tunnel,
}

/// The tunnel between the nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Tunnel {
    /// UDP port.
    pub port: u16,
    /// VXLAN network identifier.
    pub vni: u32,
}

/// What an object is called: kind, namespace (empty if it is cluster-scoped) and name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ObjectName {
    /// Kind.
    pub kind: &'static str,
    /// Namespace or nothing.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// Every object that a source has, each kind by name (pods, services and firewalls by namespace and name).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Objects {
    /// Nodes.
    pub nodes: BTreeMap<String, Node>,
    /// Namespaces.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Pods.
    pub pods: BTreeMap<(String, String), Pod>,
    /// Services.
    pub services: BTreeMap<(String, String), Service>,
    /// EgressIPs.
    pub egress_ips: BTreeMap<String, EgressIp>,
    /// `EgressFirewall` objects.
    pub egress_firewalls: BTreeMap<(String, String), EgressFirewall>,
    /// `EgressConfig` objects; only the one named `default` counts.
    pub egress_configs: BTreeMap<String, EgressConfig>,
    /// `EgressNode` objects.
    pub egress_nodes: BTreeMap<String, EgressNode>,
    /// `EgressAllocation` objects, by name.
    pub egress_allocations: BTreeMap<String, EgressAllocation>,
    /// Those that were checked as they were read, and are not kept as objects: as the model has them, by name.
    pub checked_allocations: BTreeMap<String, Checked>,
    /// What the leader has chosen for all; none until it has.
    pub cluster: Option<Cluster>,
}

/// `null` is the same as absent.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(d).map(Option::unwrap_or_default)
}

/// Labels and annotations: a value left out (`key:`) is the empty text.
fn text_map<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, String>, D::Error> {
    let map = Option::<BTreeMap<String, Option<String>>>::deserialize(d)?.unwrap_or_default();
    Ok(map.into_iter().map(|(k, v)| (k, v.unwrap_or_default())).collect())
}

fn is_empty(text: &Text) -> bool {
    text.is_empty()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero16(n: &u16) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_pod_is_read_and_null_is_absent() {
        let pod: Pod = serde_saphyr::from_str(
            "apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: shop
  creationTimestamp: null
  labels: {app: web, marked: }
  ownerReferences: [{kind: ReplicaSet}]
spec:
  nodeName: node-a
  hostNetwork: null
  containers: [{name: c, ports: [{containerPort: 80}]}]
status: {phase: Running, podIP: 10.1.0.5, podIPs: [{ip: 10.1.0.5}, {ip: 'fd00::5'}]}
",
        )
        .unwrap();
        assert_eq!(pod.metadata.labels["marked"], "");
        assert_eq!(pod.status.pod_ips[1].ip, "fd00::5");
        assert!(!pod.spec.host_network);
    }

    #[test]
    fn what_is_written_is_read_again() {
        let allocation = EgressAllocation {
            metadata: Meta { name: "192.0.2.1".into(), uid: "0123".into(), generation: 3, ..Meta::default() },
            spec: EgressAllocationSpec {
                egress_ip: "192.0.2.1".into(),
                owner: "true".into(),
                leases: vec![PortLease {
                    node: "1e3".into(),
                    generation: 2,
                    ranges: vec![Granules { first: 0, count: 94 }],
                    ..PortLease::default()
                }],
                standbys: vec!["b".into()],
                resting: vec![RestingPorts { first: 94, count: 1, generation: 3, ..RestingPorts::default() }],
            },
            ..EgressAllocation::default()
        };
        let text = serde_saphyr::to_string(&allocation).unwrap();
        assert_eq!(serde_saphyr::from_str::<EgressAllocation>(&text).unwrap(), allocation, "{text}");
    }

    #[test]
    fn age_puts_the_oldest_first_and_the_undated_last() {
        let meta = |name: &str, at: Option<&str>| Meta {
            name: name.into(),
            creation_timestamp: at.map(Into::into),
            ..Meta::default()
        };
        let mut all = [
            meta("a", None),
            meta("c", Some("2026-01-02T00:00:00Z")),
            meta("b", Some("2026-01-02T00:00:00Z")),
        ];
        all.sort_by(|x, y| x.age().cmp(&y.age()));
        assert_eq!(all.map(|m| m.name), ["b", "c", "a"]);
    }
}
