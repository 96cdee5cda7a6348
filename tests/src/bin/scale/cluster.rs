//! A cluster of 5,000 nodes, as its API server would have it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, UNIX_EPOCH};

use datapath::keys::IfIndex;
use outgate::addresses::address;
use outgate::digest;
use outgate::facts::{Facts, PodInterface, Uplink};
use outgate::leader::{Plan, Surroundings, plan};
use outgate::model;
use outgate::objects::{
    Condition, EgressAllocation, EgressIp, EgressIpReport, EgressIpSpec, EgressNode, EgressUplink,
    LabelSelector, LoadedAllocation, Meta, Namespace, Node, NodeAddress, Objects, PortDemand,
};
use outgate::status::{rfc3339, seconds};
use outgate::text::Text;
use outgate::watch::Write;

/// Nodes.
pub(crate) const NODES: usize = 5_000;
/// Of these, nodes that may hold egress IPs.
pub(crate) const GATEWAYS: usize = 50;
/// Pods, all told.
pub(crate) const PODS: usize = 150_000;
/// Of these, on each node.
pub(crate) const PODS_PER_NODE: usize = PODS / NODES;
/// Namespaces. Each has pods on as many nodes as it has pods.
pub(crate) const NAMESPACES: usize = 5_000;
/// How often each thing is measured; told is the median.
pub(crate) const ROUNDS: usize = 3;
/// EgressIPs with an address each; each is for as many namespaces.
pub(crate) const EGRESS_IPS: usize = 1_000;
/// When it begins.
const BEGIN: &str = "2026-11-22T12:00:00Z";

/// The cluster.
#[derive(Clone)]
pub(crate) struct Cluster {
    /// Its objects, without pods.
    pub(crate) objects: Objects,
    /// Statuses of EgressIPs.
    pub(crate) statuses: BTreeMap<String, EgressIpReport>,
    /// Nodes that are not heard of: neither their kubelets nor their agents.
    silent: BTreeSet<String>,
    /// The time, in seconds since 1970.
    now: u64,
    /// When the leader wants to look again.
    again: Option<u64>,
    random: u64,
}

pub(crate) fn meta(name: String, labels: &[(&str, String)]) -> Meta {
    Meta {
        uid: uid(&name),
        name,
        generation: 1,
        resource_version: "123456789".to_owned(),
        creation_timestamp: Some("2026-01-01T00:00:00Z".to_owned()),
        labels: labels.iter().map(|(k, v)| ((*k).into(), v.into())).collect(),
        ..Meta::default()
    }
}

/// As long as a real one.
pub(crate) fn uid(name: &str) -> String {
    format!("{name:0>8.8}-1111-4222-8333-{name:0>12.12}")
}

/// A node's name.
pub(crate) fn node_name(n: usize) -> String {
    format!("worker-{n:04}.cluster.example.com")
}

fn node_ip(n: usize) -> String {
    format!("10.{}.{}.{}", 200 + n / 62_500, n / 250 % 250, n % 250 + 1)
}

fn pod_network(n: usize) -> String {
    format!("10.{}.{}.0/24", n / 250, n % 250)
}

/// An egress IP, of the network that the gateways' uplinks are in.
pub(crate) fn egress_ip(n: usize) -> String {
    format!("172.20.{}.{}", n / 250, n % 250 + 1)
}

fn team(namespace: usize) -> usize {
    namespace % EGRESS_IPS
}

/// The namespaces of a node's pods.
pub(crate) fn namespaces_on(node: usize) -> impl Iterator<Item = usize> {
    (0..PODS_PER_NODE).map(move |n| (node * PODS_PER_NODE + n) % NAMESPACES)
}

/// A node, with the labels that they have.
pub(crate) fn node(n: usize) -> Node {
    let name = node_name(n);
    let mut labels = vec![
        ("beta.kubernetes.io/arch", "amd64".to_owned()),
        ("beta.kubernetes.io/os", "linux".to_owned()),
        ("kubernetes.io/arch", "amd64".to_owned()),
        ("kubernetes.io/hostname", name.clone()),
        ("kubernetes.io/os", "linux".to_owned()),
        ("node.kubernetes.io/instance-type", "m6i.4xlarge".to_owned()),
        ("topology.kubernetes.io/region", "eu-central-1".to_owned()),
        ("topology.kubernetes.io/zone", format!("eu-central-1{}", ["a", "b", "c"][n % 3])),
    ];
    if n < GATEWAYS {
        labels.push(("k8s.ovn.org/egress-assignable", String::new()));
    }
    let mut node = Node { metadata: meta(name, &labels), ..Node::default() };
    node.spec.pod_cidrs = vec![pod_network(n)];
    node.status.addresses = vec![NodeAddress { kind: "InternalIP".to_owned(), address: node_ip(n) }];
    node.status.conditions = vec![ready("True")];
    node
}

fn ready(status: &str) -> Condition {
    Condition { kind: "Ready".to_owned(), status: status.to_owned(), ..Condition::default() }
}

/// What its agent says of a node.
fn egress_node(n: usize, node: &Node) -> EgressNode {
    let mut o = EgressNode { metadata: meta(node_name(n), &[]), ..EgressNode::default() };
    o.spec = digest::digest(node);
    let ip = node_ip(n);
    let mut uplinks = vec![EgressUplink {
        name: "ens5".to_owned(),
        mac: "02:00:00:00:00:01".to_owned(),
        networks: vec![format!("{ip}/8")],
        default_route: vec!["IPv4".to_owned()],
        up: true,
    }];
    if n < GATEWAYS {
        uplinks.push(EgressUplink {
            name: "ens6".to_owned(),
            mac: "02:00:00:00:00:02".to_owned(),
            networks: vec![format!("172.20.200.{}/16", n + 1)],
            up: true,
            ..EgressUplink::default()
        });
    }
    o.status.node_uid.clone_from(&node.metadata.uid);
    o.status.boot_id = uid("boot");
    o.status.tunnel_address.clone_from(&ip);
    o.status.tunnel_addresses = vec![ip.clone()];
    o.status.addresses = vec![ip];
    o.status.uplinks = uplinks;
    let teams: BTreeSet<_> = namespaces_on(n).map(team).collect();
    o.status.demand =
        teams.into_iter().map(|t| PortDemand { egress_ip: egress_ip(t), granules: 0 }).collect();
    o
}

/// A new EgressIP, of which the other 1,000 are like.
pub(crate) fn egress_ip_object(n: usize) -> EgressIp {
    let mut metadata = meta(format!("team-{n:04}"), &[]);
    metadata.creation_timestamp = Some("2026-02-01T00:00:00Z".to_owned());
    EgressIp {
        metadata,
        spec: EgressIpSpec {
            egress_ips: vec![egress_ip(n)],
            namespace_selector: Some(LabelSelector {
                match_labels: [("team".to_owned(), format!("team-{n:04}"))].into(),
                ..LabelSelector::default()
            }),
            ..EgressIpSpec::default()
        },
    }
}

/// The address of a pod of a node.
pub(crate) fn pod_ip(node: usize, n: usize) -> String {
    pod_network(node).replace(".0/24", &format!(".{}", n + 2))
}

impl Cluster {
    /// The cluster, before anybody has decided anything.
    pub(crate) fn new() -> Self {
        let mut objects = Objects::default();
        for n in 0..NODES {
            let node = node(n);
            objects.egress_nodes.insert(node_name(n), egress_node(n, &node));
            objects.nodes.insert(node_name(n), node);
        }
        for n in 0..NAMESPACES {
            let name = format!("namespace-{n:04}");
            let labels = [
                ("kubernetes.io/metadata.name", name.clone()),
                ("team", format!("team-{:04}", team(n))),
                ("pod-security.kubernetes.io/enforce", "restricted".to_owned()),
            ];
            objects.namespaces.insert(name.clone(), Namespace { metadata: meta(name, &labels) });
        }
        for n in 0..EGRESS_IPS {
            objects.egress_ips.insert(format!("team-{n:04}"), egress_ip_object(n));
        }
        Self {
            objects,
            statuses: BTreeMap::new(),
            silent: BTreeSet::new(),
            now: seconds(BEGIN).expect("a time"),
            again: None,
            random: 1,
        }
    }

    /// What the leader would write now.
    pub(crate) fn plan(&mut self) -> (model::Desired, Plan) {
        let desired = model::desired(&self.objects, "");
        let firewalls = BTreeMap::new();
        let around = Surroundings {
            objects: &self.objects,
            statuses: &self.statuses,
            firewall_statuses: &firewalls,
            unreadable: &BTreeSet::new(),
            complete: true,
            now: &rfc3339(UNIX_EPOCH + Duration::from_secs(self.now)),
            reachable: &|node| !self.silent.contains(node),
        };
        let random = &mut self.random;
        let plan = plan(&desired, &around, &mut || {
            *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *random >> 11
        });
        self.again = plan.again;
        (desired, plan)
    }

    /// A node is heard of no more: the node controller says so of its kubelet, and its agent's heartbeat is late.
    pub(crate) fn lose(&mut self, n: usize) {
        let node = self.objects.nodes.get_mut(&node_name(n)).expect("the node");
        node.status.conditions = vec![ready("Unknown")];
        self.silent.insert(node_name(n));
    }

    /// Whether a node is not heard of.
    pub(crate) fn is_silent(&self, node: &str) -> bool {
        self.silent.contains(node)
    }

    /// Whether the leader has asked to look again later; it is then.
    pub(crate) fn wait(&mut self) -> bool {
        let Some(again) = self.again.take() else { return false };
        self.now = again.max(self.now + 1);
        true
    }

    /// Writes what is in a plan, and has the agents of all egress nodes load it, for each may come to hold each address.
    /// Writes by kind.
    pub(crate) fn write(&mut self, plan: Plan) -> BTreeMap<&'static str, usize> {
        let mut count = BTreeMap::new();
        let mut confirmed = BTreeSet::new();
        for write in plan.writes {
            let kind = match write {
                Write::Allocation(allocation) => {
                    confirmed.extend(self.load(&allocation));
                    self.objects.egress_allocations.insert(allocation.metadata.name.clone(), allocation);
                    "EgressAllocation"
                }
                Write::NodeSpec(name, spec) => {
                    if let Some(node) = self.objects.egress_nodes.get_mut(&name) {
                        node.spec = spec;
                    }
                    "EgressNode"
                }
                Write::Status(report) => {
                    self.statuses.insert(report.metadata.name.clone(), report);
                    "EgressIP status"
                }
                Write::Cluster(cluster) => {
                    self.objects.cluster = Some(cluster);
                    "cluster"
                }
                Write::Event(_) => "event",
                other @ (Write::EgressNode(_)
                | Write::RemoveEgressNode(_)
                | Write::RemoveAllocation(_)
                | Write::RemoveStatus(_)
                | Write::FirewallStatus(_)
                | Write::RemoveFirewallStatus(_)) => panic!("not in this cluster: {other:?}"),
            };
            *count.entry(kind).or_default() += 1;
        }
        if !confirmed.is_empty() {
            // An agent confirms at once what it finds at once.
            count.insert("status of an egress node", confirmed.len());
        }
        count
    }

    /// The numbers of the nodes that do.
    fn load(&mut self, allocation: &EgressAllocation) -> Vec<usize> {
        let loaded = LoadedAllocation {
            egress_ip: Text::from(&allocation.spec.egress_ip),
            uid: Text::from(&allocation.metadata.uid),
            generation: allocation.metadata.generation,
        };
        let living: Vec<_> = (0..GATEWAYS).filter(|n| !self.silent.contains(&node_name(*n))).collect();
        for n in &living {
            let node = self.objects.egress_nodes.get_mut(&node_name(*n)).expect("the node");
            let all = &mut node.status.loaded;
            match all.iter_mut().find(|l| l.egress_ip == loaded.egress_ip) {
                Some(known) => *known = loaded.clone(),
                None => all.push(loaded.clone()),
            }
        }
        living
    }
}

/// What netlink shows on a node.
pub(crate) fn facts(n: usize) -> Facts {
    let uplink = |name: &str, network: String| Uplink {
        name: name.to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        networks: vec![network.parse().expect("a network")],
        on_link: vec![],
        mtu: 1500,
        up: true,
    };
    let mut facts = Facts {
        uplinks: [(2, uplink("ens5", format!("{}/8", node_ip(n))))].into(),
        addresses: vec![address(&node_ip(n)).expect("an address")],
        default_v4: Some(2),
        tunnel_ifindex: 4,
        ..Facts::default()
    };
    if n < GATEWAYS {
        facts.uplinks.insert(3, uplink("ens6", format!("172.20.200.{}/16", n + 1)));
    }
    for place in 0..PODS_PER_NODE + ROUNDS {
        let index = IfIndex::try_from(100 + place).expect("an index");
        let interface = PodInterface {
            name: format!("veth{place}"),
            mac: [2, 1, 0, 0, 0, 1],
            bridge: 0,
            peer_elsewhere: true,
            mtu: 1450,
        };
        facts.pod_interfaces.insert(index, interface);
        facts.host_routes.insert(address(&pod_ip(n, place)).expect("an address"), index);
    }
    facts
}
