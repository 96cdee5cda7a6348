//! A cluster of 5,000 nodes, as its API server would have it.

use std::collections::{BTreeMap, BTreeSet};

use datapath::keys::IfIndex;
use outgate::addresses::{address, object_name};
use outgate::digest;
use outgate::facts::{Facts, PodInterface, Uplink};
use outgate::leader::{Plan, Surroundings, plan};
use outgate::model;
use outgate::objects::{
    EgressAllocation, EgressIp, EgressIpReport, EgressIpSpec, EgressNode, EgressUplink, LabelSelector,
    LoadedAllocation, Meta, Namespace, Node, NodeAddress, Objects, Pod, PodIp, PortDemand,
};
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
/// EgressIPs with an address each; each is for as many namespaces.
pub(crate) const EGRESS_IPS: usize = 1_000;
/// The time.
const NOW: &str = "2026-11-22T12:00:00Z";

/// The cluster.
#[derive(Clone)]
pub(crate) struct Cluster {
    /// Its objects, without pods.
    pub(crate) objects: Objects,
    /// Statuses of EgressIPs.
    pub(crate) statuses: BTreeMap<String, EgressIpReport>,
    random: u64,
}

fn meta(name: String, labels: &[(&str, String)]) -> Meta {
    Meta {
        uid: uid(&name),
        name,
        generation: 1,
        resource_version: "123456789".to_owned(),
        creation_timestamp: Some("2026-01-01T00:00:00Z".to_owned()),
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect(),
        ..Meta::default()
    }
}

/// As long as a real one.
fn uid(name: &str) -> String {
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
fn egress_ip(n: usize) -> String {
    format!("172.20.{}.{}", n / 250, n % 250 + 1)
}

fn team(namespace: usize) -> usize {
    namespace % EGRESS_IPS
}

/// The namespaces of a node's pods.
fn namespaces_on(node: usize) -> impl Iterator<Item = usize> {
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
    node.status.conditions = vec![outgate::objects::Condition {
        kind: "Ready".to_owned(),
        status: "True".to_owned(),
        ..outgate::objects::Condition::default()
    }];
    node
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

/// A pod of a node.
pub(crate) fn pod(node: usize, n: usize, namespace: usize) -> Pod {
    let mut pod = Pod {
        metadata: meta(format!("web-6d4cf56db6-{node:04}{n:02}"), &[("app", "web".to_owned())]),
        ..Pod::default()
    };
    pod.metadata.namespace = format!("namespace-{namespace:04}");
    pod.spec.node_name = node_name(node);
    "Running".clone_into(&mut pod.status.phase);
    let network = pod_network(node);
    let ip = network.replace(".0/24", &format!(".{}", n + 2));
    pod.status.pod_ips = vec![PodIp { ip: ip.clone() }];
    pod.status.pod_ip = ip;
    pod
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
        Self { objects, statuses: BTreeMap::new(), random: 1 }
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
            now: NOW,
            reachable: &|_| true,
        };
        let random = &mut self.random;
        let plan = plan(&desired, &around, &mut || {
            *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *random >> 11
        });
        (desired, plan)
    }

    /// Writes what is in a plan, and has the agents of owners and standbys load it. Writes by kind.
    pub(crate) fn write(&mut self, plan: Plan) -> BTreeMap<&'static str, usize> {
        let mut count = BTreeMap::new();
        for write in plan.writes {
            let kind = match write {
                Write::Allocation(allocation) => {
                    self.load(&allocation);
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
        count
    }

    fn load(&mut self, allocation: &EgressAllocation) {
        let loaded = LoadedAllocation {
            egress_ip: allocation.spec.egress_ip.clone(),
            uid: allocation.metadata.uid.clone(),
            generation: allocation.metadata.generation,
        };
        for name in allocation.spec.standbys.iter().chain([&allocation.spec.owner]) {
            if let Some(node) = self.objects.egress_nodes.get_mut(name) {
                node.status.loaded.retain(|l| l.egress_ip != loaded.egress_ip);
                node.status.loaded.push(loaded.clone());
            }
        }
    }

    /// The objects that the agent of a node watches.
    pub(crate) fn seen_by(&self, n: usize) -> Objects {
        let mut objects = self.objects.clone();
        let name = node_name(n);
        // Other nodes are what their EgressNodes say.
        for (other, node) in &mut objects.nodes {
            if *other != name {
                let known = objects.egress_nodes.get(other).and_then(|e| digest::node(other, &e.spec));
                *node = known.expect("a digest");
            }
        }
        if n >= GATEWAYS {
            objects.egress_allocations.clear();
        }
        for (place, namespace) in namespaces_on(n).enumerate() {
            let pod = pod(n, place, namespace);
            objects.pods.insert((pod.metadata.namespace.clone(), pod.metadata.name.clone()), pod);
        }
        objects
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
    for place in 0..=PODS_PER_NODE {
        let index = IfIndex::try_from(100 + place).expect("an index");
        let interface = PodInterface {
            name: format!("veth{place}"),
            mac: [2, 1, 0, 0, 0, 1],
            bridge: 0,
            peer_elsewhere: true,
            mtu: 1450,
        };
        facts.pod_interfaces.insert(index, interface);
        let ip = pod(n, place, 0).status.pod_ip;
        facts.host_routes.insert(address(&ip).expect("an address"), index);
    }
    facts
}

/// The name of an address's allocation.
pub(crate) fn allocation_name(n: usize) -> String {
    object_name(&address(&egress_ip(n)).expect("an address"))
}
