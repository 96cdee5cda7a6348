//! Objects, checked: desired state in types that cannot be wrong. What is wrong is refused singly, with a
//! reason, and the rest works on.
//!
//! Refusing fails closed. An EgressIP whose addresses are wrong still selects its pods, so that a slip in an
//! address does not let them out by the node's: they have no egress IP in force, and `unassigned` decides.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use datapath::addr::Ip;
use datapath::keys::{GranuleRange, Offload, Unassigned};
use datapath::limits::{GRANULES, POLICY_ADDRESSES};
use ipnet::IpNet;

use crate::addresses;
use crate::cni::known::Known;
use crate::firewall::Firewall;
use crate::ids::identity;
use crate::objects::{
    self, AppliedFirewall, EGRESS_ASSIGNABLE, EGRESS_CAPACITY, EgressAllocation, EgressConfig,
    EgressNodeStatus, Meta, Objects, ShadowedPods, TimeoutsSpec, Tunnel,
};
use crate::selector::{Match, Selector};
use crate::status;
use crate::text::{Labels, Text};
use crate::watch::Problem;

/// UDP port of the tunnel unless the EgressConfig says otherwise: near VXLAN's own 4789, which the CNI may use,
/// and none of its assigned neighbours (4790 is VXLAN-GPE, 4791 RoCE).
pub const TUNNEL_PORT: u16 = 4795;

/// What the cluster's objects ask of one node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Desired {
    /// The node.
    pub node: String,
    /// Cluster-wide settings.
    pub config: Config,
    /// The tunnel; none until the leader has chosen it.
    pub tunnel: Option<Tunnel>,
    /// Nodes, by name: those that have a Node object or an agent.
    pub nodes: BTreeMap<String, Node>,
    /// EgressIP objects, by name.
    pub egress_ips: BTreeMap<String, EgressIp>,
    /// This node's pods, by namespace and name.
    pub pods: BTreeMap<(String, String), Pod>,
    /// Egress firewalls, by namespace.
    pub firewalls: BTreeMap<String, Firewall>,
    /// Nodes that have pods which firewalls cover, by the namespaces that have one: of pods that are known, and as the
    /// nodes' agents say. Only nodes that are known.
    pub firewall_nodes: BTreeMap<String, BTreeSet<String>>,
    /// Who holds and leases what, by address.
    pub allocations: BTreeMap<IpAddr, Arc<Allocation>>,
    /// EgressIPs that select this node's pods which older ones serve.
    pub shadowed: Vec<ShadowedPods>,
    /// What the leader has granted to this node, by address; none: it has not told this very node anything.
    pub grants: Option<BTreeMap<IpAddr, Grant>>,
    /// What is wrong with objects.
    pub problems: BTreeSet<Problem>,
}

/// Cluster-wide settings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Pod networks.
    pub cluster_networks: Vec<IpNet>,
    /// Service networks.
    pub service_networks: Vec<IpNet>,
    /// What becomes of a selected pod's traffic while nobody holds its addresses.
    pub unassigned: Unassigned,
    /// Whether packets of pods that are not programmed yet are held.
    pub hold_unknown: bool,
    /// How flows spread over an object's addresses.
    pub spread: Spread,
    /// Which packets skip the host's stack.
    pub offload: Offload,
    /// Networks of egress IPs that are routed to the nodes.
    pub routed_networks: Vec<IpNet>,
    /// The tunnel's port, if it is set.
    pub tunnel_port: Option<u16>,
    /// The tunnel's identifier, if it is set.
    pub tunnel_vni: Option<u32>,
    /// Idle times.
    pub timeouts: Timeouts,
    /// Whether what a firewall denies is answered.
    pub reject: bool,
    /// Resolvers whose answers firewalls learn names' addresses from, besides the nodes' own.
    pub resolvers: BTreeSet<IpAddr>,
}

impl Config {
    /// Whether an address is one that is routed to the nodes.
    #[must_use]
    pub fn is_routed(&self, ip: &IpAddr) -> bool {
        self.routed_networks.iter().any(|n| n.contains(ip))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cluster_networks: Vec::new(),
            service_networks: Vec::new(),
            unassigned: Unassigned::Drop,
            hold_unknown: true,
            spread: Spread::Pod,
            offload: Offload::Auto,
            routed_networks: Vec::new(),
            tunnel_port: None,
            tunnel_vni: None,
            timeouts: Timeouts::default(),
            reject: false,
            resolvers: BTreeSet::new(),
        }
    }
}

/// How flows spread over an object's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spread {
    /// One pod, one address.
    Pod = 1,
    /// Every connection by itself.
    Connection = 2,
}

/// Idle times, in seconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// An established TCP connection (RFC 5382: not less than 2 h 4 min).
    pub tcp_established: u32,
    /// A TCP connection that opens or closes (RFC 5382: not less than 4 min).
    pub tcp_transitory: u32,
    /// UDP (RFC 4787: 5 min or more).
    pub udp: u32,
    /// ICMP echo (RFC 5508: not less than 60 s).
    pub icmp: u32,
    /// A port after its connection was closed: a server's TIME-WAIT state of 60 s and a margin.
    pub rest: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { tcp_established: 7440, tcp_transitory: 240, udp: 300, icmp: 60, rest: 65 }
    }
}

/// One EgressIP object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EgressIp {
    /// Name.
    pub name: String,
    /// UID, if it has one.
    pub uid: String,
    /// Its place among all objects, oldest first.
    pub age: usize,
    /// Generation of its spec.
    pub generation: u64,
    /// Addresses that may be assigned, in the object's order.
    pub addresses: Vec<IpAddr>,
    /// Every address that it names, in force or not: their allocations stay.
    pub named: BTreeSet<IpAddr>,
    /// Addresses that are refused, as they are written.
    pub refused: Vec<(String, Refusal)>,
    /// Why the whole object is refused, if it is.
    pub rejected: Option<String>,
    /// What it selects; nothing if its selectors cannot be understood.
    pub selectors: Option<Selectors>,
}

/// What an EgressIP selects.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Selectors {
    /// Namespaces.
    pub namespaces: Selector,
    /// Their pods.
    pub pods: Selector,
}

/// Why an address is refused.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, thiserror::Error)]
pub enum Refusal {
    /// Another object has it.
    #[error("also in EgressIP {older}, which is older and keeps it")]
    Duplicate {
        /// The other object.
        older: String,
    },
    /// It is a node's own.
    #[error("an address of node {node} itself; an egress IP must be free")]
    NodeAddress {
        /// The node.
        node: String,
    },
    /// It is in a network inside the cluster.
    #[error("inside the cluster's network {network}; an egress IP must be outside")]
    InsideCluster {
        /// The network.
        network: IpNet,
    },
    /// Loopback, link-local, multicast, broadcast or unspecified.
    #[error("not an address that a host can have on a network")]
    Unusable,
    /// The first address of an uplink's network, or the last of an IPv4 one.
    #[error("it stands for the whole network {network} or for all hosts in it; no host can have it")]
    NetworkItself {
        /// The network.
        network: IpNet,
    },
}

impl Refusal {
    /// One word for programs.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Duplicate { .. } => "Duplicate",
            Self::NodeAddress { .. } => "NodeAddress",
            Self::InsideCluster { .. } => "InsideCluster",
            Self::Unusable | Self::NetworkItself { .. } => "Unusable",
        }
    }
}

/// One of this node's pods that has an address of its own.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pod {
    /// UID, if it has one.
    pub uid: String,
    /// A number that changes with the object.
    pub version: u64,
    /// Whether the object is going away.
    pub ends: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Interfaces at the host's side, of which its own is one, if the container runtime names them.
    pub interfaces: Vec<String>,
    /// Whether its sandbox is being made at this moment, with these addresses and interfaces.
    pub asked: bool,
    /// The EgressIP that selects it.
    pub egress_ip: Option<String>,
}

/// One node of the cluster.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    /// Whether it has a Node object.
    pub exists: bool,
    /// UID of the Node object.
    pub uid: String,
    /// Its labels.
    pub labels: Labels,
    /// Whether it is labelled to own egress IPs.
    pub assignable: bool,
    /// Whether it is ready.
    pub ready: bool,
    /// How many addresses it may own.
    pub capacity: Capacity,
    /// Addresses of the Node object that its own traffic may have: internal and external.
    pub object_addresses: BTreeSet<IpAddr>,
    /// Its internal addresses, in the object's order: where its tunnel ends, if its agent finds them.
    pub internal_addresses: Vec<IpAddr>,
    /// Networks of its pods.
    pub pod_networks: Vec<IpNet>,
    /// What its agent says.
    pub agent: Option<NodeAgent>,
}

impl Node {
    /// Every address of the node.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.object_addresses.iter().chain(self.agent.iter().flat_map(|a| &a.addresses)).copied()
    }
}

/// How many addresses a node may own; `None` is no bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Capacity {
    /// Of both families together.
    pub ip: Option<u32>,
    /// IPv4.
    pub ipv4: Option<u32>,
    /// IPv6.
    pub ipv6: Option<u32>,
}

/// What a node's agent says about its node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeAgent {
    /// UID of the Node object, as the agent saw it.
    pub node_uid: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// Where its tunnel ends, one address of each family that it has.
    pub tunnel_addresses: Vec<IpAddr>,
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Networks of its uplinks that work.
    pub networks: Vec<IpNet>,
    /// Whether a working uplink has the IPv4 default route, and the IPv6 one.
    pub default_routes: [bool; 2],
    /// Egress IPs that it needs ports of, and how many granules of each it wants in all; 0: whatever comes first.
    pub demand: BTreeMap<IpAddr, u16>,
    /// Allocations whose whole port table its kernel has: address to UID and generation.
    pub loaded: BTreeMap<IpAddr, (Text, u64)>,
    /// Ports that it gives back, with the UID of the allocation.
    pub returned: BTreeMap<IpAddr, (String, Vec<Granted>)>,
    /// What has come of firewalls, by namespace.
    pub firewalls: BTreeMap<String, AppliedFirewall>,
    /// EgressIPs that select pods there which older ones serve.
    pub shadowed: Vec<ShadowedPods>,
}

/// Who holds an egress IP and who leases its ports.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Allocation {
    /// UID: an address given up and taken again is another allocation.
    pub uid: String,
    /// Counts its changes.
    pub generation: u64,
    /// The node that holds it.
    pub owner: Option<String>,
    /// Nodes that may hold it next, best first.
    pub standbys: Vec<String>,
    /// Who leases which ports.
    pub leases: Vec<Lease>,
    /// Ports taken back that nobody may use yet.
    pub resting: Vec<Resting>,
}

/// An allocation that makes sense, and its address. Shared: a node of an egress address has thousands of its leases.
pub type Checked = (IpAddr, Arc<Allocation>);

/// Ports taken back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Resting {
    /// The ports.
    pub range: GranuleRange,
    /// Generation of the allocation that first had no lease on them.
    pub generation: u64,
    /// Not free before this time, in seconds since 1970.
    pub until: u64,
}

/// What the leader has granted to a node of one egress IP.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Grant {
    /// UID of the allocation.
    pub uid: String,
    /// The node to send by, which has the port table.
    pub owner: Option<String>,
    /// The ports.
    pub ranges: Vec<Granted>,
}

/// Granted ports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Granted {
    /// The ports.
    pub range: GranuleRange,
    /// Generation of the lease that they are of.
    pub generation: u64,
    /// Whether no port of them may be taken any more: they are being given back.
    pub stopped: bool,
}

/// One node's ports.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Lease {
    /// Node.
    pub node: Text,
    /// Its UID: a node made anew under an old name has no right to the old one's ports.
    pub node_uid: Text,
    /// Its boot id when it last asked.
    pub boot_id: Text,
    /// Since when it is as it is, in seconds since 1970; 0: not known.
    pub since: u64,
    /// Generation of the allocation that first had this lease as it is.
    pub generation: u64,
    /// The ports, ascending.
    pub ranges: Vec<GranuleRange>,
}

impl NodeAgent {
    /// Where its tunnel ends in a family.
    #[must_use]
    pub fn tunnel_address(&self, v6: bool) -> Option<IpAddr> {
        self.tunnel_addresses.iter().copied().find(|a| a.is_ipv6() == v6)
    }
}

impl Desired {
    /// What the leader has granted to this node of an address.
    #[must_use]
    pub fn grant(&self, ip: &IpAddr) -> Option<&Grant> {
        self.grants.as_ref()?.get(ip)
    }

    /// Whether the nodes' tunnel runs over IPv6. All nodes use one family, for a packet's outer source is the
    /// address that its receiver knows the sender by: IPv4 if all have it, else IPv6 if all have that, else
    /// what more of them have.
    #[must_use]
    pub fn tunnel_over_v6(&self) -> bool {
        let agents: Vec<_> = self
            .nodes
            .values()
            .filter(|n| n.exists)
            .filter_map(|n| n.agent.as_ref())
            .filter(|a| !a.tunnel_addresses.is_empty())
            .collect();
        let with = |v6: bool| agents.iter().filter(|a| a.tunnel_address(v6).is_some()).count();
        with(false) < with(true)
    }

    /// Egress IPs that this node's pods need ports of.
    #[must_use]
    pub fn demand(&self) -> BTreeSet<IpAddr> {
        let used: BTreeSet<_> = self.pods.values().filter_map(|p| p.egress_ip.as_ref()).collect();
        used.into_iter().flat_map(|name| &self.egress_ips[name].addresses).copied().collect()
    }

    /// Every address that may be assigned, with its object.
    #[must_use]
    pub fn addresses(&self) -> BTreeMap<IpAddr, &EgressIp> {
        self.egress_ips.values().flat_map(|e| e.addresses.iter().map(move |a| (*a, e))).collect()
    }

    /// EgressIPs, oldest first.
    #[must_use]
    pub fn by_age(&self) -> Vec<&EgressIp> {
        let mut all: Vec<_> = self.egress_ips.values().collect();
        all.sort_by_key(|e| e.age);
        all
    }
}

/// Checks all objects, as seen from `node`.
#[must_use]
pub fn desired(objects: &Objects, node: &str) -> Desired {
    desired_with(objects, node, &Known::new())
}

/// The same, with what the container runtime says of the node's pods before their objects do.
#[must_use]
pub fn desired_with(objects: &Objects, node: &str, known: &Known) -> Desired {
    let mut problems = BTreeSet::new();
    let config = config(objects, &mut problems);
    let nodes = nodes(objects, &mut problems);
    let egress_ips = egress_ips(objects, &config, &nodes, &mut problems);
    let mut shadowed = BTreeMap::new();
    let pods = pods(objects, node, known, &egress_ips, &mut shadowed, &mut problems);
    let shadowed = shadowed.into_iter().map(|((egress_ip, by), pods)| ShadowedPods { egress_ip, by, pods });
    let firewalls = firewalls(objects, &nodes, &mut problems);
    let firewall_nodes = firewall_nodes(objects, &nodes, &firewalls);
    let allocations = objects
        .egress_allocations
        .iter()
        .filter_map(|(name, o)| match allocation(o) {
            Ok(a) => Some(a),
            Err(message) => {
                problems.insert(Problem::new(format_args!("EgressAllocation {name}"), message));
                None
            }
        })
        .chain(objects.checked_allocations.values().cloned())
        .collect();
    let grants = grants(objects, node);
    let tunnel = objects.cluster.map(|c| c.tunnel);
    Desired {
        node: node.to_owned(),
        config,
        tunnel,
        nodes,
        egress_ips,
        pods,
        firewalls,
        firewall_nodes,
        allocations,
        shadowed: shadowed.collect(),
        grants,
        problems,
    }
}

/// What the leader has granted to this very node: a node made anew has no right to the old one's ports.
fn grants(objects: &Objects, node: &str) -> Option<BTreeMap<IpAddr, Grant>> {
    let uid = &objects.nodes.get(node)?.metadata.uid;
    let spec = objects.egress_nodes.get(node).map(|e| &e.spec).filter(|s| s.node_uid == *uid)?;
    let all = spec.ranges.iter().filter_map(|g| {
        let grant = Grant {
            uid: g.uid.clone(),
            owner: Some(g.owner.clone()).filter(|o| !o.is_empty()),
            ranges: granted(&g.ranges),
        };
        Some((addresses::address(&g.egress_ip).ok()?, grant))
    });
    Some(all.collect())
}

/// Nothing writes ranges that do not fit.
fn granted(ranges: &[objects::GrantedGranules]) -> Vec<Granted> {
    let fits = |r: &&objects::GrantedGranules| {
        r.count > 0 && usize::from(r.first) + usize::from(r.count) <= GRANULES
    };
    let of = |r: &objects::GrantedGranules| Granted {
        range: GranuleRange { first: r.first, count: r.count },
        generation: r.generation,
        stopped: false,
    };
    ranges.iter().filter(fits).map(of).collect()
}

fn config(objects: &Objects, problems: &mut BTreeSet<Problem>) -> Config {
    for name in objects.egress_configs.keys().filter(|n| *n != "default") {
        problems.insert(Problem::new(
            format_args!("EgressConfig {name}"),
            "ignored: only the EgressConfig named default counts",
        ));
    }
    let mut config = Config { resolvers: cluster_resolvers(objects, problems), ..Config::default() };
    let Some(EgressConfig { spec, .. }) = objects.egress_configs.get("default") else { return config };
    let mut complain = |field: &str, message: String| {
        problems.insert(Problem::new("EgressConfig default", format_args!("spec.{field}: {message}")));
    };
    let mut networks = |field: &str, texts: &[String]| {
        let mut networks = Vec::new();
        for text in texts {
            match addresses::network(text) {
                Ok(network) => networks.push(network),
                Err(error) => complain(field, format!("{text:?} {error}; ignored")),
            }
        }
        networks
    };
    config.cluster_networks = networks("clusterCIDRs", &spec.cluster_cidrs);
    config.service_networks = networks("serviceCIDRs", &spec.service_cidrs);
    config.routed_networks = networks("routedCIDRs", &spec.routed_cidrs);
    match spec.unassigned.as_deref() {
        None | Some("Drop") => {}
        Some("NodeIP") => config.unassigned = Unassigned::NodeIp,
        Some(other) => complain("unassigned", format!("{other:?} is neither Drop nor NodeIP; Drop it is")),
    }
    match spec.unknown_pods.as_deref() {
        None | Some("Hold") => {}
        Some("Allow") => config.hold_unknown = false,
        Some(other) => complain("unknownPods", format!("{other:?} is neither Hold nor Allow; Hold it is")),
    }
    match spec.spread.as_deref() {
        None | Some("Pod") => {}
        Some("Connection") => config.spread = Spread::Connection,
        Some(other) => complain("spread", format!("{other:?} is neither Pod nor Connection; Pod it is")),
    }
    match spec.offload.as_deref() {
        None | Some("Auto") => {}
        Some("Never") => config.offload = Offload::Never,
        Some("Always") => config.offload = Offload::Always,
        Some(other) => {
            complain("offload", format!("{other:?} is neither Auto, Never nor Always; Auto it is"));
        }
    }
    if let Some(port) = spec.tunnel.port {
        match u16::try_from(port) {
            Ok(port) if port != 0 => config.tunnel_port = Some(port),
            _ => complain("tunnel.port", format!("{port} is not a port (1 to 65535); ignored")),
        }
    }
    if let Some(vni) = spec.tunnel.vni {
        match u32::try_from(vni) {
            Ok(vni) if (1..1 << 24).contains(&vni) => config.tunnel_vni = Some(vni),
            _ => complain("tunnel.vni", format!("{vni} is not a VNI (1 to 16777215); ignored")),
        }
    }
    match spec.deny_action.as_deref() {
        None | Some("Drop") => {}
        Some("Reject") => config.reject = true,
        Some(other) => complain("denyAction", format!("{other:?} is neither Drop nor Reject; Drop it is")),
    }
    for (index, text) in spec.resolvers.iter().enumerate() {
        match addresses::address(text) {
            Ok(ip) if can_answer(&ip) => drop(config.resolvers.insert(ip)),
            Ok(_) => complain(
                &format!("resolvers[{index}]"),
                format!("{text:?} is no address that pods ask a resolver at; ignored"),
            ),
            Err(error) => complain(&format!("resolvers[{index}]"), format!("{text:?} {error}; ignored")),
        }
    }
    config.timeouts = timeouts(&spec.timeouts, complain);
    config
}

/// Whether a resolver may be at an address: not at a pod's own loopback, and not everywhere.
fn can_answer(ip: &IpAddr) -> bool {
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast())
}

/// Namespace, label and its value of the cluster's DNS pods: Kubernetes' and `OpenShift`'s.
const DNS_PODS: [(&str, &str, &str); 2] = [
    ("kube-system", "k8s-app", "kube-dns"),
    ("openshift-dns", "dns.operator.openshift.io/daemonset-dns", "default"),
];

/// Addresses of the cluster's own DNS: its Service, and the pods behind it.
fn cluster_resolvers(objects: &Objects, problems: &mut BTreeSet<Problem>) -> BTreeSet<IpAddr> {
    let mut resolvers = BTreeSet::new();
    for ((namespace, name), o) in &objects.services {
        let labelled = o.metadata.labels.get("k8s-app").is_some_and(|app| app == "kube-dns");
        let dns = match namespace.as_str() {
            "kube-system" => labelled,
            "openshift-dns" => name == "dns-default",
            _ => false,
        };
        if !dns {
            continue;
        }
        let texts: BTreeSet<_> = o.spec.cluster_ips.iter().chain([&o.spec.cluster_ip]).collect();
        // `None`: a headless service, which is its pods.
        for text in texts.into_iter().filter(|t| !t.is_empty() && *t != "None") {
            match addresses::address(text) {
                Ok(ip) => drop(resolvers.insert(ip)),
                Err(error) => {
                    problems.insert(Problem::new(
                        format_args!("Service {namespace}/{name}"),
                        format_args!("spec.clusterIPs: {text:?} {error}; ignored"),
                    ));
                }
            }
        }
    }
    for ((namespace, _), o) in &objects.pods {
        let dns = DNS_PODS.iter().any(|(place, label, value)| {
            namespace == place && o.metadata.labels.get(label).is_some_and(|v| v == value)
        });
        if dns && has_network(o) {
            // What is wrong with addresses of pods is said where the pods are read, on their own node.
            let texts = o.status.pod_ips.iter().map(|p| &p.ip).chain([&o.status.pod_ip]);
            resolvers.extend(texts.filter_map(|text| addresses::address(text).ok()));
        }
    }
    resolvers
}

fn firewalls(
    objects: &Objects,
    nodes: &BTreeMap<String, Node>,
    problems: &mut BTreeSet<Problem>,
) -> BTreeMap<String, Firewall> {
    let mut firewalls = BTreeMap::new();
    for ((namespace, name), o) in &objects.egress_firewalls {
        let about = format!("EgressFirewall {namespace}/{name}");
        if name != "default" {
            problems.insert(Problem::new(
                about,
                "refused, its rules have no effect: the EgressFirewall of a namespace must be named default",
            ));
            continue;
        }
        let firewall = o.spec.firewall(&o.metadata, nodes);
        match &firewall.rules {
            // It is being read, and who cannot read it says so.
            Err(_) if o.spec.is_unread() => {}
            Err(mistakes) => drop(problems.insert(Problem::new(
                about,
                format_args!(
                    "{mistakes}; the object is refused: the version in force before stays, and where there is none all that rules could be for is denied"
                ),
            ))),
            Ok(_) => problems.extend(firewall.notes.iter().map(|note| Problem::new(&about, note))),
        }
        firewalls.insert(namespace.clone(), firewall);
    }
    firewalls
}

fn firewall_nodes(
    objects: &Objects,
    nodes: &BTreeMap<String, Node>,
    firewalls: &BTreeMap<String, Firewall>,
) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for ((namespace, _), pod) in &objects.pods {
        let has_address = !pod.status.pod_ip.is_empty() || !pod.status.pod_ips.is_empty();
        if firewalls.contains_key(namespace)
            && has_network(pod)
            && has_address
            && nodes.contains_key(&pod.spec.node_name)
        {
            found.entry(namespace.clone()).or_default().insert(pod.spec.node_name.clone());
        }
    }
    // Where not all pods are known, as to a cluster's leader, the nodes say themselves what they have pods of.
    for (name, node) in nodes {
        for namespace in node.agent.iter().flat_map(|a| a.firewalls.keys()) {
            if firewalls.contains_key(namespace) {
                found.entry(namespace.clone()).or_default().insert(name.clone());
            }
        }
    }
    found
}

fn timeouts(spec: &TimeoutsSpec, mut complain: impl FnMut(&str, String)) -> Timeouts {
    let mut t = Timeouts::default();
    for (field, value, slot) in [
        ("tcpEstablishedSeconds", spec.tcp_established_seconds, &mut t.tcp_established),
        ("tcpTransitorySeconds", spec.tcp_transitory_seconds, &mut t.tcp_transitory),
        ("udpSeconds", spec.udp_seconds, &mut t.udp),
        ("icmpSeconds", spec.icmp_seconds, &mut t.icmp),
        ("portRestSeconds", spec.port_rest_seconds, &mut t.rest),
    ] {
        // A week: the kernel's clock ticks wrap around far beyond it.
        match value.map(u32::try_from) {
            None => {}
            Some(Ok(seconds)) if (1..=604_800).contains(&seconds) => *slot = seconds,
            Some(_) => complain(
                &format!("timeouts.{field}"),
                format!("{} is not from 1 to 604800; the default {slot} it is", value.unwrap_or_default()),
            ),
        }
    }
    t
}

fn nodes(objects: &Objects, problems: &mut BTreeSet<Problem>) -> BTreeMap<String, Node> {
    let mut nodes: BTreeMap<String, Node> = BTreeMap::new();
    for (name, o) in &objects.nodes {
        let mut complain = |message: String| {
            problems.insert(Problem::new(format_args!("Node {name}"), message));
        };
        let mut node = Node {
            exists: true,
            uid: o.metadata.uid.clone(),
            labels: o.metadata.labels.clone(),
            assignable: o.metadata.labels.contains_key(EGRESS_ASSIGNABLE),
            // The kubelet always sets it; files written by hand may not.
            ready: o.status.conditions.iter().find(|c| c.kind == "Ready").is_none_or(|c| c.status == "True"),
            ..Node::default()
        };
        for address in &o.status.addresses {
            let internal = address.kind == "InternalIP";
            if !internal && address.kind != "ExternalIP" {
                continue;
            }
            match addresses::address(&address.address) {
                Ok(ip) => {
                    node.object_addresses.insert(ip);
                    if internal {
                        node.internal_addresses.push(ip);
                    }
                }
                Err(error) => {
                    complain(format!("status.addresses: {:?} {error}; ignored", address.address));
                }
            }
        }
        let cidrs: BTreeSet<_> =
            o.spec.pod_cidrs.iter().chain([&o.spec.pod_cidr]).filter(|c| !c.is_empty()).collect();
        for cidr in cidrs {
            match addresses::network(cidr) {
                Ok(network) => node.pod_networks.push(network),
                Err(error) => complain(format!("spec.podCIDRs: {cidr:?} {error}; ignored")),
            }
        }
        if let Some(text) = o.metadata.annotations.get(EGRESS_CAPACITY) {
            node.capacity = capacity(text).unwrap_or_else(|e| {
                complain(format!("annotation {EGRESS_CAPACITY}: {e}; taken as no room for egress IPs"));
                Capacity { ip: Some(0), ..Capacity::default() }
            });
        }
        nodes.insert(name.clone(), node);
    }
    for (name, o) in &objects.egress_nodes {
        let s = &o.status;
        // What the leader tells a node is there before its agent, and after it.
        if *s == EgressNodeStatus::default() {
            continue;
        }
        let texts = |texts: &[String]| texts.iter().filter_map(|t| addresses::address(t).ok()).collect();
        let working = || s.uplinks.iter().filter(|u| u.up);
        let default_route = |family: &str| working().any(|u| u.default_route.iter().any(|f| f == family));
        let mut tunnel_addresses: Vec<IpAddr> = Vec::new();
        for ip in s.tunnel_addresses.iter().chain([&s.tunnel_address]) {
            // One of a family.
            if let Ok(ip) = addresses::address(ip)
                && !tunnel_addresses.iter().any(|a| a.is_ipv6() == ip.is_ipv6())
            {
                tunnel_addresses.push(ip);
            }
        }
        nodes.entry(name.clone()).or_default().agent = Some(NodeAgent {
            node_uid: s.node_uid.clone(),
            boot_id: s.boot_id.clone(),
            tunnel_addresses,
            addresses: texts(&s.addresses),
            default_routes: [default_route("IPv4"), default_route("IPv6")],
            networks: working()
                .flat_map(|u| &u.networks)
                .filter_map(|n| n.parse::<IpNet>().ok())
                .map(|n| n.trunc())
                .collect(),
            demand: s
                .demand
                .iter()
                .filter_map(|d| Some((addresses::address(&d.egress_ip).ok()?, d.granules)))
                .collect(),
            loaded: s
                .loaded
                .iter()
                .filter_map(|l| Some((l.egress_ip.parse().ok()?, (l.uid.clone(), l.generation))))
                .collect(),
            returned: s
                .returned
                .iter()
                .filter_map(|r| {
                    Some((addresses::address(&r.egress_ip).ok()?, (r.uid.clone(), granted(&r.ranges))))
                })
                .collect(),
            firewalls: s.firewalls.iter().map(|f| (f.namespace.clone(), f.clone())).collect(),
            shadowed: s.shadowed.clone(),
        });
    }
    nodes
}

/// The annotation that `OpenShift`'s cloud network configuration sets:
/// `[{"interface": "eni-0", "ifaddr": {…}, "capacity": {"ipv4": 14, "ipv6": 15}}]` or `{"ip": 10}`.
fn capacity(text: &str) -> Result<Capacity, String> {
    #[derive(serde::Deserialize)]
    struct Interface {
        capacity: Numbers,
    }
    #[derive(serde::Deserialize)]
    struct Numbers {
        ip: Option<u32>,
        ipv4: Option<u32>,
        ipv6: Option<u32>,
    }
    let interfaces: Vec<Interface> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    // The cloud controller only ever describes the primary interface.
    let c = &interfaces.first().ok_or("no interface in it")?.capacity;
    Ok(Capacity { ip: c.ip, ipv4: c.ipv4, ipv6: c.ipv6 })
}

fn egress_ips(
    objects: &Objects,
    config: &Config,
    nodes: &BTreeMap<String, Node>,
    problems: &mut BTreeSet<Problem>,
) -> BTreeMap<String, EgressIp> {
    let reserved = Reserved::new(config, nodes);
    let mut by_age: Vec<_> = objects.egress_ips.values().collect();
    by_age.sort_by(|a, b| a.metadata.age().cmp(&b.metadata.age()));
    // Addresses in force, with the object that has each.
    let mut taken: BTreeMap<IpAddr, String> = BTreeMap::new();
    let mut egress_ips = BTreeMap::new();
    for (age, o) in by_age.into_iter().enumerate() {
        let Meta { name, uid, generation, .. } = &o.metadata;
        let mut e = EgressIp {
            name: name.clone(),
            uid: uid.clone(),
            age,
            generation: *generation,
            addresses: Vec::new(),
            named: BTreeSet::new(),
            refused: Vec::new(),
            rejected: None,
            selectors: None,
        };
        match selectors(&o.spec) {
            Ok(s) => e.selectors = Some(s),
            Err(message) => e.rejected = Some(message),
        }
        let mut parsed = Vec::new();
        for (index, text) in o.spec.egress_ips.iter().enumerate() {
            match addresses::address(text) {
                Ok(ip) => {
                    if e.named.insert(ip) {
                        parsed.push((text, ip));
                    }
                }
                Err(error) => {
                    e.rejected.get_or_insert(format!("spec.egressIPs[{index}]: {text:?} {error}"));
                }
            }
        }
        if parsed.len() > POLICY_ADDRESSES {
            e.rejected.get_or_insert(format!(
                "spec.egressIPs has {} addresses; an object may have {POLICY_ADDRESSES}",
                parsed.len()
            ));
        }
        if parsed.is_empty() {
            e.rejected.get_or_insert("spec.egressIPs is empty".to_owned());
        }
        if let Some(message) = &e.rejected {
            let pods = if e.selectors.is_some() {
                "the pods it selects have no egress IP"
            } else {
                "which pods it means is not known, so it has no effect"
            };
            problems.insert(Problem::new(
                format_args!("EgressIP {name}"),
                format_args!("{message}; the object is refused, {pods}"),
            ));
        } else {
            for (text, ip) in parsed {
                match refusal(ip, &reserved, &taken) {
                    None => {
                        taken.insert(ip, name.clone());
                        e.addresses.push(ip);
                    }
                    Some(refusal) => {
                        problems.insert(Problem::new(
                            format_args!("EgressIP {name}"),
                            format_args!("address {text} is refused: {refusal}"),
                        ));
                        e.refused.push((text.clone(), refusal));
                    }
                }
            }
        }
        egress_ips.insert(name.clone(), e);
    }
    egress_ips
}

fn selectors(spec: &objects::EgressIpSpec) -> Result<Selectors, String> {
    // Absent, it would select every pod of the cluster: not what somebody who left it out meant.
    let namespaces = spec.namespace_selector.as_ref().ok_or("spec.namespaceSelector is missing")?;
    Ok(Selectors {
        namespaces: Selector::new(namespaces).map_err(|e| format!("spec.namespaceSelector.{e}"))?,
        pods: Selector::new(&spec.pod_selector).map_err(|e| format!("spec.podSelector.{e}"))?,
    })
}

/// What cannot be an egress IP, looked up rather than searched for: a cluster has thousands of nodes and of addresses.
struct Reserved<'a> {
    /// Nodes' addresses, with the first node that has each.
    nodes: BTreeMap<IpAddr, &'a str>,
    /// Networks of pods and services.
    inside: BTreeSet<IpNet>,
    /// Lengths of their prefixes, shortest first.
    lengths: BTreeSet<u8>,
    /// Addresses that stand for a whole network, with the first network of each.
    networks: BTreeMap<IpAddr, IpNet>,
}

impl<'a> Reserved<'a> {
    fn new(config: &Config, nodes: &'a BTreeMap<String, Node>) -> Self {
        let mut addresses = BTreeMap::new();
        let mut networks = BTreeMap::new();
        for (name, node) in nodes {
            for ip in node.addresses() {
                addresses.entry(ip).or_insert(name.as_str());
            }
            for network in node.agent.iter().flat_map(|a| &a.networks) {
                let ends = [network.network(), network.broadcast()];
                for ip in ends.into_iter().filter(|ip| stands_for_network(ip, network)) {
                    networks.entry(ip).or_insert(*network);
                }
            }
        }
        let inside: BTreeSet<_> = config
            .cluster_networks
            .iter()
            .chain(&config.service_networks)
            .chain(nodes.values().flat_map(|n| &n.pod_networks))
            .map(IpNet::trunc)
            .collect();
        let lengths = inside.iter().map(IpNet::prefix_len).collect();
        Self { nodes: addresses, inside, lengths, networks }
    }

    /// The widest network of pods or services that contains an address.
    fn inside(&self, ip: IpAddr) -> Option<IpNet> {
        // A length that the address's family has not is no network.
        let networks = self.lengths.iter().filter_map(|length| Some(IpNet::new(ip, *length).ok()?.trunc()));
        networks.into_iter().find(|network| self.inside.contains(network))
    }
}

fn refusal(ip: IpAddr, reserved: &Reserved<'_>, taken: &BTreeMap<IpAddr, String>) -> Option<Refusal> {
    if Ip::from(ip).stays_on_link() || ip.is_loopback() {
        return Some(Refusal::Unusable);
    }
    if let Some(older) = taken.get(&ip) {
        return Some(Refusal::Duplicate { older: older.clone() });
    }
    if let Some(node) = reserved.nodes.get(&ip) {
        return Some(Refusal::NodeAddress { node: (*node).to_owned() });
    }
    if let Some(network) = reserved.inside(ip) {
        return Some(Refusal::InsideCluster { network });
    }
    reserved.networks.get(&ip).map(|network| Refusal::NetworkItself { network: *network })
}

/// Whether an address is a network's own, its broadcast address (RFC 1122, 3.2.1.3; none in a /31, RFC 3021),
/// or its subnet-router anycast address (RFC 4291, 2.6.1; none in a /127, RFC 6164), which every router answers.
fn stands_for_network(ip: &IpAddr, network: &IpNet) -> bool {
    network.max_prefix_len() - network.prefix_len() >= 2
        && (network.network() == *ip || (ip.is_ipv4() && network.broadcast() == *ip))
}

/// The pods of a node that have a network of their own, in the order in which an address is theirs.
fn local_pods<'a>(
    objects: &'a Objects,
    node: &str,
    known: &Known,
) -> Vec<(&'a (String, String), &'a objects::Pod)> {
    // Pods that are going away last, and the youngest first: an address that two have belongs to the one
    // that came later, the other is on its way out. Before all, those whose sandboxes are being made.
    let asked = |name: &(String, String)| known.get(name).is_some_and(|k| k.asked);
    let mut local: Vec<_> =
        objects.pods.iter().filter(|(_, p)| p.spec.node_name == node && has_network(p)).collect();
    local.sort_by(|(a_name, a), (b_name, b)| {
        let (a, b) = (&a.metadata, &b.metadata);
        asked(b_name)
            .cmp(&asked(a_name))
            .then_with(|| a.deletion_timestamp.is_some().cmp(&b.deletion_timestamp.is_some()))
            .then_with(|| b.age().cmp(&a.age()))
    });
    local
}

fn pods(
    objects: &Objects,
    node: &str,
    known: &Known,
    egress_ips: &BTreeMap<String, EgressIp>,
    shadowed: &mut BTreeMap<(String, String), u32>,
    problems: &mut BTreeSet<Problem>,
) -> BTreeMap<(String, String), Pod> {
    let mut by_age: Vec<_> = egress_ips.values().collect();
    by_age.sort_by_key(|e| e.age);
    let local = local_pods(objects, node, known);
    let mut owners: BTreeMap<IpAddr, String> = BTreeMap::new();
    let mut overlaps: BTreeMap<String, Problem> = BTreeMap::new();
    let mut pods = BTreeMap::new();
    for ((namespace, name), o) in local {
        let about = format!("Pod {namespace}/{name}");
        let mut addresses = Vec::new();
        let told = known.get(&(namespace.clone(), name.clone()));
        let written = o.status.pod_ips.iter().map(|p| &p.ip).chain([&o.status.pod_ip]);
        let texts: Vec<String> = match told {
            Some(told) => told.addresses.iter().map(ToString::to_string).collect(),
            None => written.filter(|t| !t.is_empty()).cloned().collect(),
        };
        for text in &texts {
            match addresses::address(text) {
                Err(error) => {
                    problems.insert(Problem::new(
                        &about,
                        format_args!("status.podIPs: {text:?} {error}; ignored"),
                    ));
                }
                Ok(ip) if addresses.contains(&ip) => {}
                Ok(ip) => {
                    if let Some(other) = owners.get(&ip) {
                        problems.insert(Problem::new(
                            &about,
                            format_args!("its address {ip} is also {other}'s, which is younger and counts"),
                        ));
                    } else {
                        owners.insert(ip, about.clone());
                        addresses.push(ip);
                    }
                }
            }
        }
        if addresses.is_empty() {
            continue;
        }
        let labels = objects.namespaces.get(namespace).map(|n| &n.metadata.labels);
        let mut chosen: Option<&EgressIp> = None;
        let mut uncertain = None;
        for e in &by_age {
            let Some(s) = e.selectors.as_ref().filter(|s| s.pods.matches(&o.metadata.labels)) else {
                continue;
            };
            match (s.namespaces.matches_namespace(namespace, labels), chosen) {
                (Match::No, _) => {}
                (Match::Unknown, None) => {
                    uncertain = Some(&e.name);
                    break;
                }
                (Match::Yes, None) => chosen = Some(e),
                (Match::Yes | Match::Unknown, Some(older)) => {
                    *shadowed.entry((e.name.clone(), older.name.clone())).or_default() += 1;
                    overlaps.entry(e.name.clone()).or_insert_with(|| {
                        Problem::new(
                            format_args!("EgressIP {}", e.name),
                            format_args!(
                                "pod {namespace}/{name} (and maybe more) is also selected by EgressIP {}, which is older and serves it",
                                older.name
                            ),
                        )
                    });
                }
            }
        }
        if let Some(egress_ip) = uncertain {
            problems.insert(Problem::new(
                about,
                format_args!(
                    "held: there is no Namespace {namespace}, so whether EgressIP {egress_ip} selects it is not known"
                ),
            ));
            continue;
        }
        let egress_ip = chosen.map(|e| e.name.clone());
        pods.insert(
            (namespace.clone(), name.clone()),
            Pod {
                uid: o.metadata.uid.clone(),
                version: version(o),
                ends: o.metadata.deletion_timestamp.is_some(),
                addresses,
                interfaces: told.map(|k| k.interfaces.clone()).unwrap_or_default(),
                asked: told.is_some_and(|k| k.asked),
                egress_ip,
            },
        );
    }
    problems.extend(overlaps.into_values());
    pods
}

/// A number that changes with an object. Where nothing counts its versions, as in a directory, all that the agent
/// reads of it does.
fn version(pod: &objects::Pod) -> u64 {
    match pod.metadata.resource_version.as_str() {
        "" => identity(&[&format!("{pod:?}")]),
        version => identity(&[version]),
    }
}

/// Whether a pod has a network of its own and still uses it.
pub(crate) fn has_network(pod: &objects::Pod) -> bool {
    !pod.spec.host_network && !matches!(pod.status.phase.as_str(), "Succeeded" | "Failed")
}

/// Checks an allocation; or why it is ignored.
pub fn allocation(o: &EgressAllocation) -> Result<Checked, String> {
    let ip = addresses::address(&o.spec.egress_ip)
        .map_err(|error| format!("spec.egressIP: {:?} {error}; ignored", o.spec.egress_ip))?;
    let mut used = [false; GRANULES];
    let mut take = |first: u16, count: u16, whose: &dyn fmt::Display| {
        let granules = used
            .get_mut(usize::from(first)..usize::from(first) + usize::from(count))
            .filter(|_| count > 0)
            .ok_or_else(|| format!("{whose}: no granules {first}+{count}; ignored"))?;
        if granules.iter().any(|g| *g) {
            return Err(format!("granules {first}+{count} are leased twice; ignored"));
        }
        granules.fill(true);
        Ok(GranuleRange { first, count })
    };
    let mut leases = Vec::with_capacity(o.spec.leases.len());
    // Many are of one moment.
    let unknown = Text::default();
    let mut since = (&unknown, 0);
    for lease in &o.spec.leases {
        if *since.0 != lease.since {
            since = (&lease.since, status::seconds(&lease.since).unwrap_or(0));
        }
        let mut ranges = Vec::with_capacity(lease.ranges.len());
        for range in &lease.ranges {
            ranges.push(take(range.first, range.count, &format_args!("node {}", lease.node))?);
        }
        ranges.sort_unstable();
        leases.push(Lease {
            node: lease.node.clone(),
            node_uid: lease.node_uid.clone(),
            boot_id: lease.boot_id.clone(),
            since: since.1,
            generation: lease.generation,
            ranges,
        });
    }
    let mut resting = Vec::new();
    for r in &o.spec.resting {
        resting.push(Resting {
            range: take(r.first, r.count, &"resting")?,
            generation: r.generation,
            until: status::seconds(&r.until)
                .ok_or_else(|| format!("spec.resting: {:?} is not a time; ignored", r.until))?,
        });
    }
    let allocation = Allocation {
        uid: o.metadata.uid.clone(),
        generation: o.metadata.generation,
        owner: Some(o.spec.owner.clone()).filter(|n| !n.is_empty()),
        standbys: o.spec.standbys.clone(),
        leases,
        resting,
    };
    Ok((ip, Arc::new(allocation)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn read<T: serde::de::DeserializeOwned>(text: &str) -> T {
        serde_saphyr::from_str(text).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Objects from YAML documents, for tests of everything downstream.
    pub(crate) fn objects(yaml: &str) -> Objects {
        let mut all = Objects::default();
        for text in yaml.split("\n---\n") {
            let kind: BTreeMap<String, serde_json::Value> = serde_saphyr::from_str(text).unwrap();
            macro_rules! insert {
                ($map:ident, $type:ty) => {{
                    let o: $type = read(text);
                    all.$map.insert(o.metadata.name.clone(), o);
                }};
            }
            match kind["kind"].as_str().unwrap() {
                "Node" => insert!(nodes, objects::Node),
                "Namespace" => insert!(namespaces, objects::Namespace),
                "Pod" => {
                    let o: objects::Pod = read(text);
                    all.pods.insert((o.metadata.namespace.clone(), o.metadata.name.clone()), o);
                }
                "Service" => {
                    let o: objects::Service = read(text);
                    all.services.insert((o.metadata.namespace.clone(), o.metadata.name.clone()), o);
                }
                "EgressFirewall" => {
                    let o: objects::EgressFirewall = read(text);
                    all.egress_firewalls.insert((o.metadata.namespace.clone(), o.metadata.name.clone()), o);
                }
                "EgressIP" => insert!(egress_ips, objects::EgressIp),
                "EgressConfig" => insert!(egress_configs, EgressConfig),
                "EgressNode" => insert!(egress_nodes, objects::EgressNode),
                "EgressAllocation" => insert!(egress_allocations, EgressAllocation),
                other => panic!("{other}"),
            }
        }
        all
    }

    fn of(yaml: &str) -> Desired {
        desired(&objects(yaml), "a")
    }

    fn said(d: &Desired, about: &str, part: &str) {
        let found = d.problems.iter().any(|p| p.about == about && p.message.contains(part));
        assert!(found, "{about}: {part} in {:#?}", d.problems);
    }

    const SHOP: &str = "kind: Namespace
metadata: {name: shop, labels: {env: prod}}";

    fn egress_ip(name: &str, created: &str, addresses: &str) -> String {
        format!(
            "kind: EgressIP
metadata: {{name: {name}, creationTimestamp: '2026-01-0{created}T00:00:00Z'}}
spec: {{egressIPs: [{addresses}], namespaceSelector: {{matchLabels: {{env: prod}}}}}}"
        )
    }

    fn pod(name: &str, more: &str) -> String {
        format!(
            "kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec: {{nodeName: a}}
status: {{phase: Running, podIP: 10.1.0.{}{more}}}",
            name.len()
        )
    }

    #[test]
    fn a_wrong_address_refuses_the_object_and_its_pods_get_no_egress_ip() {
        let d = of(&[
            SHOP,
            &egress_ip("bad", "1", "192.0.2.1, 192.0.2.300"),
            &egress_ip("good", "2", "192.0.2.2"),
            &pod("p", ""),
        ]
        .join("\n---\n"));
        said(&d, "EgressIP bad", "spec.egressIPs[1]: \"192.0.2.300\" is not an IP address");
        assert!(d.egress_ips["bad"].addresses.is_empty());
        assert_eq!(d.egress_ips["bad"].named.len(), 1, "its allocation stays until it is mended");
        assert_eq!(d.egress_ips["good"].addresses.len(), 1, "the rest works on");
        assert_eq!(d.pods[&("shop".into(), "p".into())].egress_ip.as_deref(), Some("bad"));
    }

    #[test]
    fn ipv4_in_ipv6_form_and_zones_are_refused_wherever_they_are_written() {
        let pod = |name: &str, ip: &str| {
            pod(name, &format!(", podIPs: [{{ip: '{ip}'}}]")).replace("podIP: 10.1.0.1,", "")
        };
        for (ip, why) in [
            ("::ffff:192.0.2.1", "is an IPv4 address in IPv6 form; write it as IPv4"),
            ("2001:db8::1%eth0", "has a zone (%)"),
        ] {
            let d = of(&[
                SHOP,
                &egress_ip("bad", "1", &format!("192.0.2.1, '{ip}'")),
                &pod("p", ip),
                &format!("kind: Node\nmetadata: {{name: a}}\nstatus: {{addresses: [{{type: InternalIP, address: '{ip}'}}]}}"),
                "kind: EgressConfig\nmetadata: {name: default}\nspec: {clusterCIDRs: ['::ffff:10.0.0.0/104'], routedCIDRs: [10.0.0.0/64]}",
            ]
            .join("\n---\n"));
            said(&d, "EgressIP bad", &format!("spec.egressIPs[1]: \"{ip}\" {why}"));
            said(&d, "Pod shop/p", &format!("status.podIPs: \"{ip}\" {why}"));
            said(&d, "Node a", &format!("status.addresses: \"{ip}\" {why}"));
            said(
                &d,
                "EgressConfig default",
                "spec.clusterCIDRs: \"::ffff:10.0.0.0/104\" is an IPv4 address in IPv6",
            );
            said(&d, "EgressConfig default", "spec.routedCIDRs: \"10.0.0.0/64\" is not a network");
            assert!(
                d.egress_ips["bad"].addresses.is_empty(),
                "the object is refused, as for any wrong address"
            );
            assert!(d.pods.is_empty() && d.nodes["a"].internal_addresses.is_empty());
        }
    }

    #[test]
    fn all_nodes_tunnel_over_one_family() {
        let over_v6 = |nodes: &[(&str, &str)]| {
            let yaml = nodes.iter().map(|(name, addresses)| {
                format!(
                    "kind: Node\nmetadata: {{name: {name}}}\n---\nkind: EgressNode\nmetadata: {{name: {name}}}\nstatus: {{tunnelAddresses: [{addresses}]}}"
                )
            });
            of(&yaml.collect::<Vec<_>>().join("\n---\n")).tunnel_over_v6()
        };
        let (v4, v6, both) = ("192.0.2.1", "'2001:db8::1'", "192.0.2.1, '2001:db8::1'");
        assert!(!over_v6(&[("a", both), ("b", both)]), "IPv4 where there is a choice");
        assert!(!over_v6(&[("a", both), ("b", v4)]));
        assert!(over_v6(&[("a", both), ("b", v6)]));
        assert!(over_v6(&[("a", v6), ("b", v6)]));
        assert!(!over_v6(&[("a", v4), ("b", v6)]), "as many of each: IPv4");
        assert!(over_v6(&[("a", v4), ("b", v6), ("c", v6)]), "what most have");
        assert!(!over_v6(&[("a", both), ("b", "")]), "one that has none yet is no reason");
        // What an agent before this version has written.
        let d = of("kind: EgressNode\nmetadata: {name: a}\nstatus: {tunnelAddress: 192.0.2.1}");
        assert_eq!(d.nodes["a"].agent.as_ref().unwrap().tunnel_addresses.len(), 1);
    }

    #[test]
    fn an_object_whose_selector_is_wrong_selects_nothing() {
        let d = of(&format!(
            "{SHOP}\n---\n{}\n---\nkind: EgressIP
metadata: {{name: e}}
spec: {{egressIPs: [192.0.2.1]}}",
            pod("p", "")
        ));
        said(&d, "EgressIP e", "spec.namespaceSelector is missing");
        assert_eq!(d.pods[&("shop".into(), "p".into())].egress_ip, None);
    }

    #[test]
    fn addresses_are_refused_singly() {
        let d = of(&[
            "kind: Node
metadata: {name: a}
spec: {podCIDR: 10.1.0.0/24}
status: {addresses: [{type: InternalIP, address: 192.0.2.10}]}",
            "kind: EgressNode
metadata: {name: a}
status: {addresses: [192.0.2.11, '2001:db8::11'], uplinks: [{name: eth0, up: true, networks: [192.0.2.11/24, '2001:db8::11/64']}]}",
            "kind: EgressConfig
metadata: {name: default}
spec: {clusterCIDRs: ['fd00:1::/48'], serviceCIDRs: [10.96.0.0/12, 'fd00:2::/112']}",
            &egress_ip("young", "2", "192.0.2.1, 192.0.2.2"),
            &egress_ip(
                "old",
                "1",
                "192.0.2.1, 192.0.2.1, '2001:db8::1', '2001:DB8:0::1', 192.0.2.10, 192.0.2.11, '2001:db8::11', \
                 10.1.0.9, 10.96.0.1, 'fd00:1:0:5::9', 'fd00:2::1', 127.0.0.1, 224.0.0.1, '::1', '::', 'fe80::1', \
                 'ff02::1', 192.0.2.0, 192.0.2.255, '2001:db8::'",
            ),
        ]
        .join("\n---\n"));
        let ip = |s: &str| s.parse::<IpAddr>().unwrap();
        assert_eq!(d.egress_ips["old"].addresses, [ip("192.0.2.1"), ip("2001:db8::1")]);
        assert_eq!(d.egress_ips["young"].addresses, [ip("192.0.2.2")]);
        let reasons: Vec<_> = d.egress_ips["old"].refused.iter().map(|(_, r)| r.reason()).collect();
        assert_eq!(
            reasons,
            [
                "NodeAddress",
                "NodeAddress",
                "NodeAddress",
                "InsideCluster",
                "InsideCluster",
                "InsideCluster",
                "InsideCluster",
                "Unusable",
                "Unusable",
                "Unusable",
                "Unusable",
                "Unusable",
                "Unusable",
                "Unusable",
                "Unusable",
                "Unusable",
            ]
        );
        said(
            &d,
            "EgressIP old",
            "address 2001:db8:: is refused: it stands for the whole network 2001:db8::/64",
        );
        said(&d, "EgressIP young", "192.0.2.1 is refused: also in EgressIP old");
    }

    #[test]
    fn the_older_of_two_objects_serves_a_pod() {
        let d =
            of(&[SHOP, &egress_ip("b", "2", "192.0.2.2"), &egress_ip("c", "1", "192.0.2.1"), &pod("p", "")]
                .join("\n---\n"));
        assert_eq!(d.pods[&("shop".into(), "p".into())].egress_ip.as_deref(), Some("c"));
        said(&d, "EgressIP b", "also selected by EgressIP c");
        assert_eq!(d.demand(), BTreeSet::from(["192.0.2.1".parse().unwrap()]));
    }

    #[test]
    fn which_pods_count() {
        let d = of(&[
            SHOP,
            &egress_ip("e", "1", "192.0.2.1"),
            &pod("p", ""),
            &pod("done", "").replace("Running", "Succeeded"),
            &pod("failed", "").replace("Running", "Failed"),
            &pod("host", "").replace("nodeName: a", "nodeName: a, hostNetwork: true"),
            &pod("elsewhere", "").replace("nodeName: a", "nodeName: b"),
            &pod("starting", "").replace("10.1.0.8", "''"),
            &pod("dual-stack", ", podIPs: [{ip: 10.1.0.10}, {ip: 'fd00::10'}]"),
        ]
        .join("\n---\n"));
        let names: Vec<_> = d.pods.keys().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["dual-stack", "p"]);
        assert_eq!(d.pods[&("shop".into(), "dual-stack".into())].addresses.len(), 2);
    }

    #[test]
    fn a_pod_is_held_while_its_namespace_is_not_known_and_matters() {
        let alone = of(&pod("p", ""));
        assert_eq!(alone.pods.len(), 1, "no EgressIP, nothing to know");
        let d = of(&format!("{}\n---\n{}", pod("p", ""), egress_ip("e", "1", "192.0.2.1")));
        assert!(d.pods.is_empty());
        said(&d, "Pod shop/p", "no Namespace shop");
    }

    #[test]
    fn an_address_belongs_to_the_pod_that_came_last() {
        let of = |first: &str, second: &str| {
            let pod = |name: &str, more: &str| {
                format!(
                    "kind: Pod
metadata: {{name: {name}, namespace: shop, {more}}}
spec: {{nodeName: a}}
status: {{podIP: 10.1.0.1}}"
                )
            };
            let d = of(&format!("{}\n---\n{}", pod("p", first), pod("q", second)));
            assert_eq!(d.problems.len(), 1);
            d.pods.keys().map(|k| k.1.clone()).collect::<Vec<_>>()
        };
        let (old, new) =
            ("creationTimestamp: '2026-01-01T00:00:00Z'", "creationTimestamp: '2026-01-02T00:00:00Z'");
        assert_eq!(of(old, new), ["q"]);
        assert_eq!(of(new, old), ["p"]);
        let going = format!("{new}, deletionTimestamp: '2026-01-03T00:00:00Z'");
        assert_eq!(of(&going, old), ["q"]);
    }

    #[test]
    fn wrong_settings_are_refused_field_by_field() {
        let d = of("kind: EgressConfig
metadata: {name: default}
spec:
  clusterCIDRs: [10.244.0.0/16, 10.244.0.0]
  unassigned: NodeIp
  unknownPods: Allow
  spread: Connection
  offload: never
  routedCIDRs: [198.51.100.0/24, '2001:db8:ff::1/64']
  tunnel: {port: 70000, vni: 77}
  timeouts: {udpSeconds: 30, icmpSeconds: 0}
---
kind: EgressConfig
metadata: {name: other}");
        assert_eq!(d.config.cluster_networks.len(), 1);
        assert_eq!(d.config.unassigned, Unassigned::Drop);
        assert!(!d.config.hold_unknown);
        assert_eq!(d.config.spread, Spread::Connection);
        assert_eq!(d.config.offload, Offload::Auto);
        let routed: Vec<_> = d.config.routed_networks.iter().map(ToString::to_string).collect();
        assert_eq!(routed, ["198.51.100.0/24", "2001:db8:ff::/64"]);
        assert_eq!((d.config.tunnel_port, d.config.tunnel_vni), (None, Some(77)));
        assert_eq!((d.config.timeouts.udp, d.config.timeouts.icmp), (30, 60));
        for part in ["clusterCIDRs", "unassigned", "offload", "tunnel.port", "timeouts.icmpSeconds"] {
            said(&d, "EgressConfig default", part);
        }
        said(&d, "EgressConfig other", "ignored");
    }

    #[test]
    fn nodes_are_ready_assignable_and_bounded() {
        let d = of("kind: Node
metadata:
  name: a
  labels: {k8s.ovn.org/egress-assignable: ''}
  annotations:
    cloud.network.openshift.io/egress-ipconfig: '[{\"interface\":\"eth0\",\"ifaddr\":{\"ipv4\":\"10.0.0.0/18\"},\"capacity\":{\"ipv4\":14,\"ipv6\":15}}]'
status: {conditions: [{type: Ready, status: Unknown}]}
---
kind: Node
metadata: {name: b, annotations: {cloud.network.openshift.io/egress-ipconfig: ten}}");
        let a = &d.nodes["a"];
        assert!(a.assignable && !a.ready);
        assert_eq!(a.capacity.ipv4, Some(14));
        let b = &d.nodes["b"];
        assert!(!b.assignable && b.ready, "no conditions: ready");
        assert_eq!(b.capacity.ip, Some(0));
        said(&d, "Node b", "egress-ipconfig");
    }

    #[test]
    fn an_allocation_that_leases_a_port_twice_is_ignored() {
        let of = |second: &str| {
            of(&format!(
                "kind: EgressAllocation
metadata: {{name: 192.0.2.1}}
spec: {{egressIP: 192.0.2.1, leases: [{{node: a, ranges: [{{first: 0, count: 10}}]}}, {{node: b, ranges: [{second}]}}]}}"
            ))
        };
        assert_eq!(of("{first: 10, count: 998}").allocations.len(), 1);
        for bad in [
            "{first: 9, count: 1}",
            "{first: 10, count: 999}",
            "{first: 2000, count: 1}",
            "{first: 20, count: 0}",
        ] {
            let d = of(bad);
            assert!(d.allocations.is_empty(), "{bad}");
            said(&d, "EgressAllocation 192.0.2.1", "ignored");
        }
    }

    #[test]
    fn the_firewall_of_a_namespace_is_named_default() {
        let d = of("kind: EgressFirewall
metadata: {name: default, namespace: shop, uid: u}
spec: {egress: [{type: Deny, to: {cidrSelector: 0.0.0.0/0}}]}
---
kind: EgressFirewall
metadata: {name: other, namespace: dev}
spec: {egress: [{type: Deny, to: {cidrSelector: 0.0.0.0/0}}]}
---
kind: EgressFirewall
metadata: {name: default, namespace: bad}
spec: {egress: [{type: Deny, to: {cidrSelector: 10.0.0.1}}]}
---
kind: EgressFirewall
metadata: {name: default, namespace: lost}
spec: {egress: [{type: Allow, to: {nodeSelector: {matchLabels: {a: b}}}}]}");
        assert_eq!(d.firewalls.keys().collect::<Vec<_>>(), ["bad", "lost", "shop"]);
        assert_eq!(
            (d.firewalls["shop"].uid.as_str(), d.firewalls["shop"].rules.as_ref().unwrap().len()),
            ("u", 1)
        );
        assert!(d.firewalls["bad"].rules.is_err());
        said(&d, "EgressFirewall dev/other", "must be named default");
        said(&d, "EgressFirewall bad/default", "spec.egress[0].to.cidrSelector: \"10.0.0.1\" is an address");
        said(&d, "EgressFirewall bad/default", "the object is refused");
        said(&d, "EgressFirewall lost/default", "nodeSelector of spec.egress[0] matches no node");
        assert_eq!(d.problems.len(), 3);
    }

    #[test]
    fn nodes_with_pods_that_a_firewall_covers() {
        let firewall = "kind: EgressFirewall\nmetadata: {name: default, namespace: shop}\nspec: {egress: []}";
        let on = |name: &str, node: &str| pod(name, "").replace("nodeName: a", &format!("nodeName: {node}"));
        let d = of(&[
            firewall,
            "kind: Node\nmetadata: {name: a}",
            "kind: Node\nmetadata: {name: b}",
            "kind: Node\nmetadata: {name: c}",
            &on("p", "a"),
            &on("pp", "b").replace("Running", "Succeeded"),
            &on("ppp", "c"),
            &on("pppp", "gone"),
            &on("ppppp", "b").replace("nodeName: b", "nodeName: b, hostNetwork: true"),
            &on("pppppp", "b").replace("10.1.0.6", "''"),
            &on("ppppppp", "b").replace("namespace: shop", "namespace: dev"),
        ]
        .join("\n---\n"));
        assert_eq!(
            d.firewall_nodes,
            BTreeMap::from([("shop".into(), BTreeSet::from(["a".into(), "c".into()]))])
        );
    }

    #[test]
    fn what_a_firewall_learns_names_from() {
        let d = of("kind: EgressConfig
metadata: {name: default}
spec: {denyAction: Reject, resolvers: [192.0.2.53, '2001:db8::53', 169.254.20.10, 127.0.0.53, 192.0.2.x]}
---
kind: Service
metadata: {name: kube-dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec: {clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10, 'fd00:2::a']}
---
kind: Service
metadata: {name: other, namespace: kube-system}
spec: {clusterIP: 10.96.0.11}
---
kind: Service
metadata: {name: kube-dns, namespace: mine, labels: {k8s-app: kube-dns}}
spec: {clusterIP: 10.96.0.12}
---
kind: Service
metadata: {name: dns-default, namespace: openshift-dns}
spec: {clusterIP: None}
---
kind: Pod
metadata: {name: coredns-a, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec: {nodeName: z}
status: {phase: Running, podIP: 10.1.0.53}
---
kind: Pod
metadata: {name: coredns-b, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec: {nodeName: z}
status: {phase: Failed, podIP: 10.1.0.54}
---
kind: Pod
metadata: {name: dns-default-a, namespace: openshift-dns, labels: {dns.operator.openshift.io/daemonset-dns: default}}
spec: {nodeName: z}
status: {podIPs: [{ip: 10.1.0.55}, {ip: 'fd00:1::55'}]}
---
kind: Pod
metadata: {name: fake, namespace: mine, labels: {k8s-app: kube-dns}}
spec: {nodeName: z}
status: {podIP: 10.1.0.66}");
        assert!(d.config.reject);
        let resolvers: Vec<_> = d.config.resolvers.iter().map(ToString::to_string).collect();
        assert_eq!(
            resolvers,
            [
                "10.1.0.53",
                "10.1.0.55",
                "10.96.0.10",
                "169.254.20.10",
                "192.0.2.53",
                "2001:db8::53",
                "fd00:1::55",
                "fd00:2::a"
            ]
        );
        said(&d, "EgressConfig default", "spec.resolvers[3]: \"127.0.0.53\" is no address that pods ask");
        said(&d, "EgressConfig default", "spec.resolvers[4]: \"192.0.2.x\" is not an IP address");
        let d = of("kind: EgressConfig\nmetadata: {name: default}\nspec: {denyAction: reject}");
        assert!(!d.config.reject);
        said(&d, "EgressConfig default", "spec.denyAction: \"reject\" is neither Drop nor Reject");
    }
}
