//! Port ranges pass from the leader to gateways to source nodes and back, in that order, whatever each of them has seen
//! of the others: random histories of users, agents that read each kind of object when they like and die anywhere on
//! their way, two leaders that do not know of each other, and nodes that are made anew.
#![expect(clippy::unwrap_used, reason = "a test, whose helpers clippy does not take for one")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, UNIX_EPOCH};

use datapath::addr::Ip;
use outgate::agent::{Identity, egress_node, still_loaded};
use outgate::compile::{Compiled, compile};
use outgate::facts::{Facts, Uplink};
use outgate::ids::Ids;
use outgate::image::MapImage;
use outgate::keep;
use outgate::leader::{Plan, Surroundings, plan};
use outgate::model::{self, Desired};
use outgate::objects::{
    EGRESS_ASSIGNABLE, EgressIp, EgressIpReport, EgressIpSpec, EgressNodeStatus, LabelSelector, Meta,
    Namespace, Node, Objects, Pod, PodSpec, PodStatus,
};
use outgate::ports::{IDLE, Ports, Use};
use outgate::status::rfc3339;
use outgate::watch::Write;
use proptest::prelude::*;

const NODES: usize = 4;
const ADDRESSES: usize = 3;
const LEADERS: usize = 2;
/// How long ports rest if no EgressConfig says otherwise, in seconds: as long as a TCP connection that ends.
const REST: u32 = 240;

/// Objects that are read apart from each other, as watches of an API are.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Nodes, pods, and what users write.
    Users,
    EgressNodes,
    Allocations,
}

#[derive(Clone, Debug)]
enum Step {
    /// An agent reads some of what there is.
    Look(usize, Kind),
    /// An agent goes its way once, on what it has read, as far as it gets: it dies before step 1, 2 or 3 of the way.
    Reconcile(usize, usize),
    /// An agent stops what is idle, and sees whether flows are left.
    Sweep(usize),
    /// An agent finds an address's ports in use.
    Busy(usize, usize),
    /// A leader reads some of what there is.
    LeaderLook(usize, Kind),
    /// A leader works on what it has read, and writes the first so many of what it has decided on.
    Lead(usize, usize),
    /// A node's label comes or goes.
    Label(usize),
    /// A node is ready, or not any more.
    Ready(usize),
    /// A node's pod comes or goes.
    Pod(usize),
    /// The object's addresses change.
    Addresses(u8),
    /// A node is made anew under its name.
    Replace(usize),
    /// Time passes, in seconds.
    Wait(u64),
    /// Everybody reads and does everything, some rounds.
    Settle,
    /// Everybody but one agent does, which has not read and done anything since before.
    Lag(usize),
    /// A node's pod goes, and the node gives its ports back as far as its own part goes.
    GiveBack(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = 0..NODES;
    let (lagging, giving) = (node.clone(), node.clone());
    let leader = 0..LEADERS;
    let kind = prop_oneof![Just(Kind::Users), Just(Kind::EgressNodes), Just(Kind::Allocations)];
    let step = prop_oneof![
        10 => (node.clone(), kind.clone()).prop_map(|(n, k)| Step::Look(n, k)),
        8 => (node.clone(), prop_oneof![3 => Just(4), 1 => 1_usize..4]).prop_map(|(n, s)| Step::Reconcile(n, s)),
        3 => node.clone().prop_map(Step::Sweep),
        2 => (node.clone(), 0..ADDRESSES).prop_map(|(n, a)| Step::Busy(n, a)),
        9 => (leader.clone(), kind).prop_map(|(l, k)| Step::LeaderLook(l, k)),
        8 => (leader, prop_oneof![3 => Just(99), 1 => 0_usize..4]).prop_map(|(l, w)| Step::Lead(l, w)),
        1 => node.clone().prop_map(Step::Label),
        1 => node.clone().prop_map(Step::Ready),
        3 => node.clone().prop_map(Step::Pod),
        1 => (1_u8..1 << ADDRESSES).prop_map(Step::Addresses),
        1 => node.prop_map(Step::Replace),
        3 => prop_oneof![1_u64..20, 200_u64..700].prop_map(Step::Wait),
        2 => Just(Step::Settle),
        4 => lagging.prop_map(Step::Lag),
        3 => giving.prop_map(Step::GiveBack),
    ];
    proptest::collection::vec(step, 1..100)
}

/// A granule of one incarnation of an egress IP's allocation.
type Granule = (IpAddr, u64, usize);

/// A node's kernel, and the agent that works on it.
#[derive(Default)]
struct Agent {
    /// Which name it has.
    node: usize,
    /// UID of its Node object: another machine has another.
    uid: String,
    view: Objects,
    /// What is lost with the process.
    ids: Ids,
    ports: Ports,
    loaded: BTreeMap<IpAddr, (String, u64)>,
    /// What the kernel has.
    image: MapImage,
    /// Of which lease each granule is that it was granted, as the image was made.
    leases: BTreeMap<(IpAddr, usize), u64>,
    /// Every granule that it has said it gives back: allocation, granule, generation of the lease.
    given: BTreeSet<(Granule, u64)>,
    /// The allocations of which it was granted ports, as the image was made.
    granted: BTreeMap<IpAddr, u64>,
    /// The same of its port tables.
    tables: BTreeMap<IpAddr, u64>,
    /// Every granule that its kernel has ever let a machine use.
    passed: BTreeSet<(Granule, Ip)>,
}

/// A leader. There should be one; there are two, each with a view of its own.
#[derive(Default)]
struct Leader {
    view: Objects,
    statuses: BTreeMap<String, EgressIpReport>,
}

struct World {
    objects: Objects,
    agents: Vec<Agent>,
    /// Machines that have been replaced, and run on.
    gone: Vec<Agent>,
    leaders: Vec<Leader>,
    versions: u64,
    seed: u64,
    uid: u64,
    now: u64,
    /// Who has last been able to use a granule on a living node, and when.
    last: BTreeMap<Granule, (String, u64)>,
    /// How often something of interest has happened, so that the test shows something.
    grown: usize,
    returned: usize,
    freed: usize,
}

fn name(node: usize) -> String {
    format!("n{node}")
}

/// Machines have addresses of their own.
fn tunnel(uid: &str) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 3, uid[1..].parse().unwrap())
}

/// The UID of an allocation, which is a number.
fn number(uid: &str) -> u64 {
    u64::from_str_radix(uid, 16).unwrap()
}

fn egress(n: usize) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, u8::try_from(n).unwrap() + 100).into()
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            objects: Objects::default(),
            agents: (0..NODES).map(|_| Agent::default()).collect(),
            gone: Vec::new(),
            leaders: (0..LEADERS).map(|_| Leader::default()).collect(),
            versions: 0,
            seed: 0,
            uid: 0,
            now: 1_000_000,
            last: BTreeMap::new(),
            grown: 0,
            returned: 0,
            freed: 0,
        };
        let namespace = Namespace { metadata: Meta { name: "ns".into(), ..Meta::default() } };
        world.objects.namespaces.insert("ns".into(), namespace);
        for n in 0..NODES {
            world.make(n);
        }
        world.addresses(0b11);
        // Three gateways; pods everywhere; everybody has seen everything.
        for step in (0..3).map(Step::Label).chain((0..NODES).map(Step::Pod)) {
            world.step(&step);
        }
        world.step(&Step::Settle);
        world
    }

    /// A machine of a name, with an empty kernel and an agent that has seen nothing.
    fn make(&mut self, n: usize) {
        self.uid += 1;
        let uid = format!("u{}", self.uid);
        let metadata = Meta { name: name(n), uid: uid.clone(), ..Meta::default() };
        let labels = self.objects.nodes.get(&name(n)).map(|o| o.metadata.labels.clone());
        let metadata = Meta { labels: labels.unwrap_or_default(), ..metadata };
        self.objects.nodes.insert(name(n), Node { metadata, ..Node::default() });
        let old = std::mem::replace(&mut self.agents[n], Agent { node: n, uid, ..Agent::default() });
        if !old.uid.is_empty() {
            self.gone.push(old);
        }
        // It begins with what there is.
        self.agents[n].view = self.objects.clone();
        self.start(n);
    }

    /// An agent starts on its node's kernel, as `Agent::new` does.
    fn start(&mut self, n: usize) {
        let agent = &mut self.agents[n];
        agent.view = self.objects.clone();
        agent.ids = Ids::recover(&agent.image);
        let identity = Identity { node: name(n), boot_id: agent.uid.clone() };
        agent.loaded = still_loaded(&identity, &agent.view, &agent.image);
        let own = agent.view.egress_nodes.get(&name(n));
        agent.ports = own.map(|own| Ports::recover(&own.status)).unwrap_or_default();
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
            Step::Look(n, kind) => read(&self.objects, &mut self.agents[n].view, kind),
            Step::Reconcile(n, steps) => self.reconcile(n, steps),
            Step::Sweep(n) => self.sweep(n),
            Step::Busy(n, address) => self.busy(n, address),
            Step::LeaderLook(l, kind) => read(&self.objects, &mut self.leaders[l].view, kind),
            Step::Lead(l, writes) => drop(self.lead(l, writes)),
            Step::Label(n) => {
                let labels = &mut self.objects.nodes.get_mut(&name(n)).unwrap().metadata.labels;
                *labels = if labels.contains_key(EGRESS_ASSIGNABLE) {
                    labels.without(EGRESS_ASSIGNABLE)
                } else {
                    labels.with(EGRESS_ASSIGNABLE, "")
                };
            }
            Step::Ready(n) => {
                let conditions = &mut self.objects.nodes.get_mut(&name(n)).unwrap().status.conditions;
                if conditions.pop().is_none() {
                    let not = outgate::objects::Condition {
                        kind: "Ready".into(),
                        status: "False".into(),
                        ..Default::default()
                    };
                    conditions.push(not);
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
            Step::Replace(n) if self.uid < 250 => self.make(n),
            Step::Replace(_) => {}
            Step::Wait(seconds) => self.now += seconds,
            Step::Settle => self.settle(None),
            Step::Lag(n) => self.settle(Some(n)),
            Step::GiveBack(n) => self.give_back(n),
        }
    }

    /// A node's way from its last pod to the word that its ports are free of flows.
    fn give_back(&mut self, n: usize) {
        let steps = [Step::Look(n, Kind::Users), Step::Reconcile(n, 4), Step::Wait(IDLE), Step::Sweep(n)];
        let steps = steps.into_iter().chain([Step::Reconcile(n, 4), Step::Wait(2), Step::Sweep(n)]);
        self.objects.pods.remove(&("ns".to_owned(), name(n)));
        for step in steps.chain([Step::Reconcile(n, 2)]) {
            self.step(&step);
        }
    }

    fn settle(&mut self, without: Option<usize>) {
        let all = [Kind::Users, Kind::EgressNodes, Kind::Allocations];
        // Three hand-overs, one after the other, for those who wait for nobody.
        let rounds = if without.is_some() { 3 } else { 6 };
        for _ in 0..rounds {
            for n in (0..NODES).filter(|n| Some(*n) != without) {
                for kind in all {
                    read(&self.objects, &mut self.agents[n].view, kind);
                }
                self.reconcile(n, 4);
            }
            for kind in all {
                read(&self.objects, &mut self.leaders[0].view, kind);
            }
            self.lead(0, 99);
        }
    }

    /// A leader works on what it has read. Objects that have changed since refuse to be written, as an API server makes
    /// them, and what follows is not written then.
    fn lead(&mut self, l: usize, most: usize) -> Plan {
        let Leader { view, statuses } = &self.leaders[l];
        let desired = model::desired(view, "");
        let now = rfc3339(UNIX_EPOCH + Duration::from_secs(self.now));
        let around = Surroundings {
            objects: view,
            statuses,
            firewall_statuses: &BTreeMap::new(),
            unreadable: &BTreeSet::new(),
            complete: true,
            now: &now,
            reachable: &|_| true,
        };
        let seed = &mut self.seed;
        let plan = plan(&desired, &around, &mut || {
            *seed += 1;
            *seed
        });
        for write in plan.writes.iter().take(most) {
            if !self.write(l, write.clone()) {
                break;
            }
        }
        plan
    }

    fn write(&mut self, l: usize, write: Write) -> bool {
        self.versions += 1;
        let version = self.versions.to_string();
        let view = &mut self.leaders[l].view;
        let real = &mut self.objects;
        match write {
            Write::Cluster(c) => {
                (real.cluster, view.cluster) = (Some(c), Some(c));
            }
            Write::Allocation(mut a) => {
                let name = a.metadata.name.clone();
                let of = |o: &Objects| {
                    o.egress_allocations.get(&name).map(|a| a.metadata.resource_version.clone())
                };
                if of(view) != of(real) {
                    return false;
                }
                if let Some(old) = real.egress_allocations.get(&name) {
                    self.grown += usize::from(
                        a.spec.leases.len() > old.spec.leases.len()
                            && a.spec.leases.iter().any(|l| {
                                old.spec
                                    .leases
                                    .iter()
                                    .any(|o| o.node_uid == l.node_uid && o != l && o.ranges != l.ranges)
                            }),
                    );
                    self.freed += usize::from(a.spec.resting.len() < old.spec.resting.len());
                }
                a.metadata.resource_version = version;
                real.egress_allocations.insert(name.clone(), a.clone());
                view.egress_allocations.insert(name, a);
            }
            Write::RemoveAllocation(name) => {
                let of = |o: &Objects| {
                    o.egress_allocations.get(&name).map(|a| a.metadata.resource_version.clone())
                };
                if of(view) != of(real) {
                    return false;
                }
                real.egress_allocations.remove(&name);
                view.egress_allocations.remove(&name);
            }
            Write::Status(s) => drop(self.leaders[l].statuses.insert(s.metadata.name.clone(), s)),
            Write::RemoveStatus(name) => drop(self.leaders[l].statuses.remove(&name)),
            Write::NodeSpec(name, spec) => {
                let of = |o: &Objects| o.egress_nodes.get(&name).map(|e| e.metadata.resource_version.clone());
                if of(view) != of(real) {
                    return false;
                }
                let node = real.egress_nodes.entry(name.clone()).or_default();
                (node.metadata.name, node.metadata.resource_version, node.spec) =
                    (name.clone(), version, spec);
                let node = node.clone();
                view.egress_nodes.insert(name, node);
            }
            Write::RemoveEgressNode(name) => {
                real.egress_nodes.remove(&name);
                view.egress_nodes.remove(&name);
            }
            Write::FirewallStatus(_) | Write::RemoveFirewallStatus(_) | Write::Event(_) => {}
            Write::EgressNode(_) => panic!("not the leader's"),
        }
        true
    }

    fn desired(&mut self, n: usize) -> Desired {
        let agent = &mut self.agents[n];
        let mut desired = model::desired(&agent.view, &name(n));
        agent.ports.observe(&mut desired, self.now);
        desired
    }

    fn facts(&self, n: usize) -> Facts {
        let address = tunnel(&self.agents[n].uid);
        // The last has no link with the egress IPs: it is never a gateway, and knows of an address what it is granted.
        let length = if n == NODES - 1 { 32 } else { 23 };
        let uplink = Uplink {
            name: "eth0".into(),
            mac: [1; 6],
            networks: vec![format!("{address}/{length}").parse().unwrap()],
            on_link: Vec::new(),
            mtu: 1500,
            up: true,
        };
        Facts { uplinks: BTreeMap::from([(2, uplink)]), addresses: vec![address.into()], ..Facts::default() }
    }

    /// The way of `Agent::reconcile`, `steps` steps of it: to say, to apply, to say again. An agent that gets no further
    /// has died, and starts anew.
    fn reconcile(&mut self, n: usize, steps: usize) {
        let facts = self.facts(n);
        if steps >= 2 {
            self.publish(n, &facts);
        }
        if steps >= 3 {
            self.compare_kept(n, &facts);
            let desired = self.desired(n);
            let agent = &mut self.agents[n];
            let Compiled { image, loaded, .. } = compile(&desired, &facts, &mut agent.ids);
            agent.image = image;
            agent.leases.clear();
            for (ip, grant) in desired.grants.iter().flatten() {
                for r in &grant.ranges {
                    let granules = r.range.first..r.range.first + r.range.count;
                    agent.leases.extend(granules.map(|g| ((*ip, usize::from(g)), r.generation)));
                }
            }
            let uids = desired.grants.iter().flatten();
            agent.granted = uids.map(|(ip, g)| (*ip, number(&g.uid))).collect();
            agent.tables = desired.allocations.iter().map(|(ip, a)| (*ip, number(&a.uid))).collect();
            for (ip, uid) in &agent.tables {
                let id = agent.image.egress_addrs.get(&Ip::from(*ip));
                let Some(table) = id.and_then(|id| agent.image.granules.get(id)) else { continue };
                for (granule, node) in table.node.iter().enumerate().filter(|(_, node)| **node != 0) {
                    let tunnel = agent.image.nodes[node].tunnel_ip;
                    agent.passed.insert(((*ip, *uid, granule), tunnel));
                }
            }
            if steps >= 4 {
                agent.loaded = loaded;
                agent.ports.applied(self.now);
                self.publish(n, &facts);
            }
        }
        if steps < 4 {
            self.start(n);
        }
    }

    /// What an agent of a cluster keeps of the objects makes the same of its kernel as the whole of them.
    fn compare_kept(&self, n: usize, facts: &Facts) {
        let agent = &self.agents[n];
        let mut kept = agent.view.clone();
        for (_, node) in kept.egress_nodes.iter_mut().filter(|(other, _)| **other != name(n)) {
            keep::of_another_node(node);
        }
        for (name, allocation) in &mut std::mem::take(&mut kept.egress_allocations) {
            let checked = keep::of_an_allocation(allocation).expect("it makes sense");
            kept.checked_allocations.insert(name.clone(), checked);
        }
        kept.namespaces.values_mut().for_each(keep::of_a_namespace);
        let [whole, part] = [&agent.view, &kept].map(|objects| {
            let compiled = compile(&model::desired(objects, &name(n)), facts, &mut agent.ids.clone());
            (compiled.image, compiled.loaded)
        });
        assert_eq!(whole, part, "it decides by something that it does not keep");
    }

    fn publish(&mut self, n: usize, facts: &Facts) {
        let desired = self.desired(n);
        let agent = &mut self.agents[n];
        let identity = Identity { node: name(n), boot_id: agent.uid.clone() };
        let own = egress_node(&identity, &desired, facts, &agent.loaded, &BTreeMap::new(), &agent.ports);
        agent.view.egress_nodes.entry(name(n)).or_default().status = own.status.clone();
        for back in &own.status.returned {
            for r in &back.ranges {
                let ip: IpAddr = back.egress_ip.parse().unwrap();
                let granules = usize::from(r.first)..usize::from(r.first + r.count);
                agent.given.extend(granules.map(|g| ((ip, number(&back.uid), g), r.generation)));
            }
        }
        let node = self.objects.egress_nodes.entry(name(n)).or_default();
        let returned = |s: &EgressNodeStatus| s.returned.len();
        self.returned += usize::from(returned(&own.status) > returned(&node.status));
        self.versions += 1;
        (node.status, node.metadata.resource_version) = (own.status, self.versions.to_string());
    }

    /// What `Agent::look_at_ports` does, on a node that has no flows.
    fn sweep(&mut self, n: usize) {
        let agent = &mut self.agents[n];
        for ip in agent.ports.draining(self.now) {
            agent.ports.drained(&ip);
        }
        agent.ports.stop_idle(self.now, IDLE);
    }

    fn busy(&mut self, n: usize, address: usize) {
        self.agents[n].ports.used(&egress(address), Use::default(), true);
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        let rest = u64::from(REST);
        for agent in &self.agents {
            for granule in usable(agent) {
                let lease = agent.leases[&(granule.0, granule.2)];
                let given = agent.given.contains(&(granule, lease));
                // Whether or not somebody has read it yet.
                prop_assert!(!given, "{} uses {:?}, which it has given back", agent.uid, granule);
                if let Some((user, at)) = self.last.insert(granule, (agent.uid.clone(), self.now)) {
                    prop_assert!(
                        user == agent.uid || at + rest <= self.now,
                        "{} uses {:?} {} s after {}",
                        agent.uid,
                        granule,
                        self.now - at,
                        user
                    );
                }
            }
        }
        let mut users: BTreeMap<Granule, &str> = BTreeMap::new();
        // A machine that is gone may run on: what it uses no gateway passes that passes it to another. So living ones
        // first.
        for agent in &self.agents {
            for granule in usable(agent) {
                if let Some(other) = users.insert(granule, &agent.uid) {
                    prop_assert!(false, "{:?} is usable by {} and {}", granule, other, agent.uid);
                }
            }
        }
        for machine in self.agents.iter().chain(&self.gone) {
            for granule in usable(machine) {
                let image = &machine.image;
                let holder = image.egress_ips[&image.egress_addrs[&granule.0.into()]].holder;
                let Some(holder) = image.nodes.get(&holder) else { continue };
                let all = self.agents.iter().chain(&self.gone);
                let Some(gateway) =
                    all.into_iter().find(|a| Ip::from(IpAddr::from(tunnel(&a.uid))) == holder.tunnel_ip)
                else {
                    continue;
                };
                // Whoever this node sends by has let its packets pass before it sends.
                // A machine made anew under its name is sent to as well, and drops it until it has the table.
                let tunnel = Ip::from(IpAddr::from(tunnel(&machine.uid)));
                let before = self.agents.iter().chain(&self.gone);
                let before =
                    before.filter(|a| a.node == gateway.node).any(|a| a.passed.contains(&(granule, tunnel)));
                prop_assert!(
                    before,
                    "{} uses {:?} by {}, which never knew",
                    machine.uid,
                    granule,
                    gateway.uid
                );
                let passes = Self::passes(gateway, &granule, &machine.uid);
                if let Some(user) = users.get(&granule).filter(|user| **user != machine.uid) {
                    let alive = self.agents.iter().any(|a| a.uid == gateway.uid);
                    prop_assert!(
                        !(passes && alive),
                        "{} passes {:?} of {}, which is {}'s now",
                        gateway.uid,
                        granule,
                        machine.uid,
                        user
                    );
                }
            }
        }
        Ok(())
    }

    /// Whether a gateway's kernel passes what a machine sends with a port of the granule.
    fn passes(gateway: &Agent, granule: &Granule, sender: &str) -> bool {
        let (ip, uid, number) = granule;
        let image = &gateway.image;
        let node = image.node_addrs.get(&IpAddr::from(tunnel(sender)).into()).copied().unwrap_or(0);
        let table = image.egress_addrs.get(&Ip::from(*ip)).and_then(|id| image.granules.get(id));
        gateway.tables.get(ip) == Some(uid) && node != 0 && table.is_some_and(|t| t.node[*number] == node)
    }

    /// When everybody knows everything: who may take ports gets them out.
    fn check_settled(&self) -> Result<(), TestCaseError> {
        for machine in &self.agents {
            for granule in usable(machine) {
                let image = &machine.image;
                let holder = image.egress_ips[&image.egress_addrs[&granule.0.into()]].holder;
                let Some(holder) = image.nodes.get(&holder) else { continue };
                let is_it = |a: &&Agent| Ip::from(IpAddr::from(tunnel(&a.uid))) == holder.tunnel_ip;
                let gateway = self.agents.iter().find(is_it);
                let passes = gateway.is_some_and(|g| Self::passes(g, &granule, &machine.uid));
                prop_assert!(passes, "{} uses {:?} and its gateway does not know", machine.uid, granule);
            }
        }
        Ok(())
    }
}

fn read(objects: &Objects, view: &mut Objects, kind: Kind) {
    match kind {
        Kind::Users => {
            let (egress_nodes, allocations) =
                (std::mem::take(&mut view.egress_nodes), std::mem::take(&mut view.egress_allocations));
            *view = Objects { egress_nodes, egress_allocations: allocations, ..objects.clone() };
        }
        Kind::EgressNodes => view.egress_nodes = objects.egress_nodes.clone(),
        Kind::Allocations => view.egress_allocations = objects.egress_allocations.clone(),
    }
}

/// The granules that a node may take ports from.
fn usable(agent: &Agent) -> Vec<Granule> {
    let mut granules = Vec::new();
    for (ip, id) in &agent.image.egress_addrs {
        let (Some(lease), ip) = (agent.image.leases.get(id), IpAddr::from(*ip)) else { continue };
        for granule in &lease.granule[..lease.granules as usize] {
            granules.push((ip, agent.granted[&ip], usize::from(*granule)));
        }
    }
    granules
}

/// Runs a history, and counts what has happened in it.
fn run(steps: &[Step]) -> Result<[usize; 3], TestCaseError> {
    let mut world = World::new();
    prop_assert!((0..NODES).all(|n| !usable(&world.agents[n]).is_empty()), "the test shows nothing");
    world.check()?;
    world.check_settled()?;
    for step in steps {
        world.step(step);
        // Nothing else changes a kernel.
        if !matches!(
            step,
            Step::Look(..) | Step::LeaderLook(..) | Step::Lead(..) | Step::Sweep(_) | Step::Busy(..)
        ) {
            world.check()?;
        }
        if matches!(step, Step::Settle) {
            world.check_settled()?;
        }
    }
    Ok([world.grown, world.returned, world.freed])
}

/// How many histories: few, or what is asked for, which a number in `cases` would hide.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(48)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_port_is_usable_by_two_nodes_and_none_of_a_node_that_is_gone_passes(steps in steps()) {
        run(&steps)?;
    }
}

/// What the histories have to show is in them.
#[test]
fn ports_grow_come_back_and_serve_again() {
    let idle = [
        Step::Settle,
        Step::Wait(IDLE),
        Step::Sweep(3),
        Step::Settle,
        Step::Wait(5),
        Step::Sweep(3),
        Step::Settle,
    ];
    let rest = [Step::Wait(700), Step::Settle, Step::Pod(3), Step::Settle];
    let steps: Vec<_> =
        [Step::Busy(3, 0), Step::Settle, Step::Pod(3)].into_iter().chain(idle).chain(rest).collect();
    let [grown, returned, freed] = run(&steps).unwrap();
    assert!(grown > 0 && returned > 0 && freed > 0, "{grown} {returned} {freed}");
    let replaced = [Step::Replace(3), Step::Settle, Step::Wait(700), Step::Settle];
    assert!(run(&replaced).unwrap()[2] > 0, "a gone node's ports are free again");
}

/// A leader that has not read the Nodes removes every EgressNode, and with them what was given back. A node must not use
/// it again when it is granted again.
#[test]
fn what_is_given_back_is_not_used_after_its_egress_node_was_removed() {
    let steps = [
        Step::LeaderLook(1, Kind::EgressNodes),
        Step::Replace(2),
        Step::GiveBack(1),
        Step::Lead(1, 99),
        Step::Pod(1),
        Step::Lag(1),
        Step::Settle,
    ];
    assert!(run(&steps).unwrap()[1] > 0, "something was given back");
}
