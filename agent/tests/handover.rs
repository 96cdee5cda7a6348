//! Port ranges pass from the leader to gateways to source nodes, in that order, whatever each of them has seen
//! of the others: random histories of users, agents with old views, and leaders that come and go.
#![expect(clippy::unwrap_used, reason = "a test, whose helpers clippy does not take for one")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use datapath::addr::Ip;
use outgate::agent::{Identity, egress_node};
use outgate::compile::compile;
use outgate::facts::{Facts, Uplink};
use outgate::ids::Ids;
use outgate::image::MapImage;
use outgate::leader::{Surroundings, plan};
use outgate::model;
use outgate::objects::{
    EGRESS_ASSIGNABLE, EgressIp, EgressIpSpec, LabelSelector, Meta, Namespace, Node, Objects, Pod, PodSpec,
    PodStatus,
};
use outgate::watch::Write;
use proptest::prelude::*;

const NODES: usize = 4;
const ADDRESSES: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    /// An agent reads all there is.
    Look(usize),
    /// An agent goes its way once, on what it has read.
    Reconcile(usize),
    /// The leader works, on what it has read.
    Lead,
    /// Another leads; it reads first.
    Elect(usize),
    /// A node's label comes or goes.
    Label(usize),
    /// A node's pod comes or goes.
    Pod(usize),
    /// The object's addresses change.
    Addresses(u8),
    /// A node is made anew under its name.
    Replace(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = 0..NODES;
    let step = prop_oneof![
        6 => node.clone().prop_map(Step::Look),
        6 => node.clone().prop_map(Step::Reconcile),
        6 => Just(Step::Lead),
        1 => node.clone().prop_map(Step::Elect),
        1 => node.clone().prop_map(Step::Label),
        2 => node.clone().prop_map(Step::Pod),
        1 => (0_u8..1 << ADDRESSES).prop_map(Step::Addresses),
        1 => node.prop_map(Step::Replace),
    ];
    proptest::collection::vec(step, 1..120)
}

/// A granule of one incarnation of an egress IP's allocation.
type Granule = (IpAddr, String, usize);

#[derive(Default)]
struct Agent {
    view: Objects,
    ids: Ids,
    image: MapImage,
    loaded: BTreeMap<IpAddr, (String, u64)>,
    /// The allocations that the image was made from.
    uids: BTreeMap<IpAddr, String>,
    /// The allocations of which it was granted ports, as the image was made.
    granted: BTreeMap<IpAddr, String>,
    /// Every granule that its kernel has ever let another node use: the node, with its UID.
    passed: BTreeSet<(Granule, String)>,
}

struct World {
    /// What is written in the directory.
    objects: Objects,
    agents: Vec<Agent>,
    leader: usize,
    seed: u64,
    uid: u64,
}

fn name(node: usize) -> String {
    format!("n{node}")
}

fn tunnel(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, u8::try_from(node).unwrap() + 1)
}

fn egress(n: usize) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, u8::try_from(n).unwrap() + 100).into()
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            objects: Objects::default(),
            agents: (0..NODES).map(|_| Agent::default()).collect(),
            leader: 0,
            seed: 0,
            uid: 0,
        };
        let namespace = Namespace { metadata: Meta { name: "ns".into(), ..Meta::default() } };
        world.objects.namespaces.insert("ns".into(), namespace);
        for n in 0..NODES {
            let metadata = Meta { name: name(n), uid: format!("u{n}"), ..Meta::default() };
            world.objects.nodes.insert(name(n), Node { metadata, ..Node::default() });
        }
        world.addresses(0b11);
        // Two gateways; pods everywhere; everybody has seen everything.
        for step in [Step::Label(0), Step::Label(1)].into_iter().chain((0..NODES).map(Step::Pod)) {
            world.step(&step);
        }
        for _ in 0..4 {
            for n in 0..NODES {
                world.step(&Step::Look(n));
                world.step(&Step::Reconcile(n));
            }
            world.step(&Step::Look(0));
            world.step(&Step::Lead);
        }
        world
    }

    fn addresses(&mut self, set: u8) {
        let egress_ips =
            (0..ADDRESSES).filter(|n| set & (1 << n) != 0).map(|n| egress(n).to_string()).collect();
        let o = EgressIp {
            metadata: Meta { name: "e".into(), ..Meta::default() },
            spec: EgressIpSpec {
                egress_ips,
                namespace_selector: Some(LabelSelector::default()),
                pod_selector: LabelSelector::default(),
            },
        };
        self.objects.egress_ips.insert("e".into(), o);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Look(n) => self.look(n),
            Step::Reconcile(n) => self.reconcile(n),
            Step::Lead => self.lead(),
            Step::Elect(n) => {
                self.leader = n;
                self.look(n);
            }
            Step::Label(n) => {
                let labels = &mut self.objects.nodes.get_mut(&name(n)).unwrap().metadata.labels;
                if labels.remove(EGRESS_ASSIGNABLE).is_none() {
                    labels.insert(EGRESS_ASSIGNABLE.into(), String::new());
                }
            }
            Step::Pod(n) => {
                let key = ("ns".to_owned(), name(n));
                if self.objects.pods.remove(&key).is_none() {
                    let pod = Pod {
                        metadata: Meta { name: name(n), namespace: "ns".into(), ..Meta::default() },
                        spec: PodSpec { node_name: name(n), host_network: false },
                        status: PodStatus {
                            pod_ip: Ipv4Addr::new(10, 0, 0, u8::try_from(n).unwrap() + 1).to_string(),
                            ..PodStatus::default()
                        },
                    };
                    self.objects.pods.insert(key, pod);
                }
            }
            Step::Addresses(set) => self.addresses(set),
            Step::Replace(n) => {
                self.uid += 1;
                self.objects.nodes.get_mut(&name(n)).unwrap().metadata.uid = format!("u{n}-{}", self.uid);
                // A new machine: an empty kernel, and an agent that has seen nothing.
                let passed = std::mem::take(&mut self.agents[n].passed);
                self.agents[n] = Agent { passed, ..Agent::default() };
            }
        }
    }

    fn look(&mut self, n: usize) {
        self.agents[n].view = self.objects.clone();
    }

    /// The leader's own objects are as it wrote them: only it writes them, and it read them when it was elected.
    fn lead(&mut self) {
        let mut view = self.agents[self.leader].view.clone();
        view.egress_allocations = self.objects.egress_allocations.clone();
        view.cluster = self.objects.cluster;
        let desired = model::desired(&view, "");
        let around = Surroundings {
            objects: &view,
            statuses: &BTreeMap::new(),
            firewall_statuses: &BTreeMap::new(),
            unreadable: &BTreeSet::new(),
            complete: true,
            now: "",
            reachable: &|_| true,
        };
        let seed = &mut self.seed;
        let plan = plan(&desired, &around, &mut || {
            *seed += 1;
            *seed
        });
        for write in plan.writes {
            match write {
                Write::Cluster(c) => self.objects.cluster = Some(c),
                Write::Allocation(a) => {
                    self.objects.egress_allocations.insert(a.metadata.name.clone(), a);
                }
                Write::RemoveAllocation(name) => {
                    self.objects.egress_allocations.remove(&name);
                }
                Write::Status(_)
                | Write::RemoveStatus(_)
                | Write::FirewallStatus(_)
                | Write::RemoveFirewallStatus(_) => {}
                Write::NodeSpec(name, spec) => {
                    self.objects.egress_nodes.entry(name).or_default().spec = spec;
                }
                Write::RemoveEgressNode(name) => drop(self.objects.egress_nodes.remove(&name)),
                Write::Event(_) => {}
                Write::EgressNode(_) => panic!("not the leader's"),
            }
        }
    }

    fn reconcile(&mut self, n: usize) {
        let agent = &mut self.agents[n];
        let address = tunnel(n);
        let facts = Facts {
            uplinks: BTreeMap::from([(
                2,
                Uplink {
                    name: "eth0".into(),
                    mac: [1; 6],
                    networks: vec![format!("{address}/24").parse().unwrap()],
                    on_link: Vec::new(),
                    mtu: 1500,
                    up: true,
                },
            )]),
            addresses: vec![address.into()],
            ..Facts::default()
        };
        let identity = Identity { node: name(n), boot_id: "b".into() };
        let mut desired = model::desired(&agent.view, &name(n));
        let own = egress_node(&identity, &desired, &facts, &agent.loaded, &BTreeMap::new());
        agent.view.egress_nodes.entry(name(n)).or_default().status = own.status;
        desired = model::desired(&agent.view, &name(n));
        let compiled = compile(&desired, &facts, &mut agent.ids);
        agent.image = compiled.image;
        agent.loaded = compiled.loaded;
        agent.uids = desired.allocations.iter().map(|(ip, a)| (*ip, a.uid.clone())).collect();
        agent.granted = desired.grants.iter().map(|(ip, g)| (*ip, g.uid.clone())).collect();
        for (ip, id) in &agent.image.egress_addrs {
            let Some(table) = agent.image.granules.get(id) else { continue };
            let ip = IpAddr::from(*ip);
            let Some(uid) = agent.uids.get(&ip) else { continue };
            for (granule, node) in table.node.iter().enumerate().filter(|(_, node)| **node != 0) {
                let tunnel = agent.image.nodes[node].tunnel_ip;
                agent.passed.insert(((ip, uid.clone(), granule), tunnel.to_string()));
            }
        }
        let own = egress_node(&identity, &desired, &facts, &agent.loaded, &BTreeMap::new());
        agent.view.egress_nodes.entry(name(n)).or_default().status = own.status.clone();
        self.objects.egress_nodes.entry(name(n)).or_default().status = own.status;
    }

    /// The granules that a node may take ports from.
    fn usable(&self, n: usize) -> BTreeSet<Granule> {
        let agent = &self.agents[n];
        let mut granules = BTreeSet::new();
        for (ip, id) in &agent.image.egress_addrs {
            let (Some(lease), ip) = (agent.image.leases.get(id), IpAddr::from(*ip)) else { continue };
            for granule in &lease.granule[..lease.granules as usize] {
                granules.insert((ip, agent.granted[&ip].clone(), usize::from(*granule)));
            }
        }
        granules
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let mut users: BTreeMap<Granule, usize> = BTreeMap::new();
        for n in 0..NODES {
            let tunnel = Ip::from(tunnel(n)).to_string();
            for granule in self.usable(n) {
                // At most one node at a time uses a port of an address.
                if let Some(other) = users.insert(granule.clone(), n) {
                    prop_assert!(false, "{:?} is usable by n{} and n{}", granule, other, n);
                }
                // Whoever this node sends by has let its packets pass before it sends.
                let image = &self.agents[n].image;
                let holder = image.egress_ips[&image.egress_addrs[&granule.0.into()]].holder;
                if let Some(owner) = image.nodes.get(&holder) {
                    let owner = (0..NODES)
                        .find(|o| Ip::from(IpAddr::from(self::tunnel(*o))) == owner.tunnel_ip)
                        .unwrap();
                    let passes = self.agents[owner].passed.contains(&(granule.clone(), tunnel.clone()));
                    prop_assert!(passes, "n{} uses {:?} by n{}, which does not know", n, granule, owner);
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_port_is_usable_by_two_nodes_and_none_before_its_gateway_knows(steps in steps()) {
        let mut world = World::new();
        prop_assert!((0..NODES).any(|n| !world.usable(n).is_empty()), "the test shows nothing");
        world.check()?;
        for step in &steps {
            world.step(step);
            world.check()?;
        }
    }
}
