//! Agents of several nodes in one directory, over kernels in memory.

use std::fs;
use std::path::PathBuf;

use datapath::addr::Ip;
use datapath::keys::{EgressId, IfIndex};
use tokio::sync::watch::{Sender, channel};
use tokio::task::{JoinHandle, LocalSet, spawn_local};

use super::*;
use crate::facts::{PodInterface, Uplink};
use crate::ports::Use;
use crate::watch::dir::DirSource;

/// A kernel that keeps its image, and every image it ever had.
#[derive(Clone, Default)]
struct Memory {
    image: MapImage,
    history: Rc<RefCell<Vec<MapImage>>>,
    failing: Rc<RefCell<bool>>,
    unattached: Rc<RefCell<Option<String>>>,
    unsettled: Rc<RefCell<Option<String>>>,
    settles: Rc<RefCell<usize>>,
    gone: Rc<RefCell<BTreeSet<IfIndex>>>,
    exhausted: Rc<RefCell<BTreeSet<EgressId>>>,
    used: Rc<RefCell<BTreeMap<EgressId, Use>>>,
}

impl Kernel for Memory {
    type Error = std::io::Error;

    fn recovered(&self) -> &MapImage {
        &self.image
    }
    fn gone(&self, interfaces: impl Iterator<Item = IfIndex>) -> BTreeSet<IfIndex> {
        interfaces.filter(|index| self.gone.borrow().contains(index)).collect()
    }
    async fn ensure_tunnel(&mut self, _: u16) -> Result<(), String> {
        Ok(())
    }
    fn apply(&mut self, image: &MapImage, _: &Facts) -> Result<Option<String>, std::io::Error> {
        if *self.failing.borrow() {
            return Err(std::io::Error::other("no memory"));
        }
        self.image = image.clone();
        self.history.borrow_mut().push(image.clone());
        Ok(self.unattached.borrow().clone())
    }
    async fn settle(&mut self, image: &MapImage, _: &Facts) -> Result<(), String> {
        assert_eq!(*image, self.image, "after it is applied");
        *self.settles.borrow_mut() += 1;
        self.unsettled.borrow().clone().map_or(Ok(()), Err)
    }
    fn retire(&mut self) -> Result<(), std::io::Error> {
        Ok(())
    }
    fn sweep(&mut self) -> Result<(usize, usize), std::io::Error> {
        Ok((0, self.used.borrow().values().map(|u| u.flows as usize).sum()))
    }
    fn exhausted(&mut self) -> Result<BTreeSet<EgressId>, std::io::Error> {
        Ok(std::mem::take(&mut *self.exhausted.borrow_mut()))
    }
    fn ports_used(&mut self) -> Result<BTreeMap<EgressId, Use>, std::io::Error> {
        Ok(self.used.borrow().clone())
    }
}

struct Node {
    name: &'static str,
    kernel: Memory,
    state: Rc<RefCell<metrics::State>>,
    facts: Sender<Facts>,
    task: JoinHandle<()>,
}

impl Node {
    fn image(&self) -> MapImage {
        self.kernel.history.borrow().last().cloned().unwrap_or_default()
    }
    fn egress(&self, ip: &str) -> u32 {
        self.image().egress_addrs.get(&key(ip)).copied().unwrap_or(0)
    }
}

struct World {
    dir: PathBuf,
    nodes: Vec<Node>,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn key(ip: &str) -> Ip {
    ip.parse::<IpAddr>().unwrap().into()
}

impl World {
    fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("outgate-agent-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self { dir, nodes: Vec::new() }
    }

    fn put(&self, file: &str, text: &str) {
        fs::write(self.dir.join(".writing"), text).unwrap();
        fs::rename(self.dir.join(".writing"), self.dir.join(file)).unwrap();
    }

    fn node(&self, name: &str, labels: &str) {
        self.put(
            &format!("node-{name}.yaml"),
            &format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, uid: u{name}, labels: {{{labels}}}}}\n"
            ),
        );
    }

    fn pod(&self, node: &str, namespace: &str, ip: &str) {
        self.put(
            &format!("pod-{ip}.yaml"),
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{0}, namespace: {namespace}}}\nspec: {{nodeName: {node}}}\nstatus: {{podIP: {ip}}}\n",
                ip.replace('.', "-")
            ),
        );
    }

    /// Three nodes of which b and c may own egress IPs, one selected pod on a.
    fn usual(test: &str) -> Self {
        let world = Self::new(test);
        world.node("a", "");
        for name in ["b", "c"] {
            world.node(name, "k8s.ovn.org/egress-assignable: ''");
        }
        world.put(
            "cluster.yaml",
            "apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {env: prod}}
---
apiVersion: v1
kind: Namespace
metadata: {name: dev}
---
apiVersion: outgate.dev/v1alpha1
kind: EgressConfig
metadata: {name: default}
spec: {clusterCIDRs: [10.0.0.0/8]}
",
        );
        world.egress_ip("192.0.2.100");
        world.pod("a", "shop", "10.1.0.1");
        world
    }

    fn egress_ip(&self, addresses: &str) {
        self.put(
            "egressip.yaml",
            &format!(
                "apiVersion: k8s.ovn.org/v1
kind: EgressIP
metadata: {{name: e}}
spec: {{egressIPs: [{addresses}], namespaceSelector: {{matchLabels: {{env: prod}}}}}}
"
            ),
        );
    }

    fn start(&mut self, name: &'static str, kernel: Memory) {
        let (mut agent, state, facts) = self.make(name, &kernel);
        let task = spawn_local(async move { agent.run().await.unwrap() });
        self.nodes.push(Node { name, kernel, state, facts, task });
    }

    /// An agent that somebody else runs.
    fn agent(&self, name: &'static str, kernel: &Memory) -> Agent<DirSource, Memory> {
        self.make(name, kernel).0
    }

    fn make(
        &self,
        name: &'static str,
        kernel: &Memory,
    ) -> (Agent<DirSource, Memory>, Rc<RefCell<metrics::State>>, Sender<Facts>) {
        let address = format!("192.0.2.{}", name.as_bytes()[0]);
        let uplink = Uplink {
            name: "eth0".into(),
            mac: [name.as_bytes()[0]; 6],
            networks: [format!("{address}/24"), format!("2001:db8::{}/64", name.as_bytes()[0])]
                .map(|n| n.parse().unwrap())
                .to_vec(),
            on_link: Vec::new(),
            mtu: 1500,
            up: true,
        };
        let (sender, facts) = channel(Facts {
            uplinks: BTreeMap::from([(2, uplink)]),
            addresses: vec![address.parse().unwrap()],
            tunnel_ifindex: 9,
            ..Facts::default()
        });
        let state: Rc<RefCell<metrics::State>> = Rc::default();
        let identity = Identity { node: name.into(), boot_id: "boot".into() };
        let source = DirSource::open(&self.dir).unwrap();
        let resolv_conf = ResolvConf::open(&self.dir.join("resolv.conf"));
        let agent = Agent::new(identity, source, kernel.clone(), facts, resolv_conf, Rc::clone(&state));
        (agent, state, sender)
    }

    fn start_all(&mut self) {
        for name in ["a", "b", "c"] {
            self.start(name, Memory::default());
        }
    }

    fn get(&self, name: &str) -> &Node {
        self.nodes.iter().find(|n| n.name == name).unwrap()
    }

    /// The node that everybody takes for the holder.
    fn holder(&self, ip: &str) -> Option<String> {
        let mut holders: Vec<_> = self
            .nodes
            .iter()
            .filter_map(|n| {
                let image = n.image();
                let e = image.egress_ips.get(&n.egress(ip))?;
                let tunnel = image.nodes.get(&e.holder)?.tunnel_ip;
                Some(char::from(tunnel.v4_octets()[3]).to_string())
            })
            .collect();
        holders.dedup();
        if holders.len() == 1 { holders.pop() } else { None }
    }

    /// Whether pods of a node may leave by an address: the node has ports of it, and the holder knows.
    fn works(&self, node: &str, ip: &str) -> bool {
        let source = self.get(node);
        let image = source.image();
        let Some(lease) = image.leases.get(&source.egress(ip)) else { return false };
        let Some(holder) = self.holder(ip) else { return false };
        let gateway = self.get(&holder);
        let id = gateway.image().node_addrs[&key(&format!("192.0.2.{}", node.as_bytes()[0]))];
        let table = gateway.image().granules[&gateway.egress(ip)].clone();
        let granules = &lease.granule[..lease.granules as usize];
        granules.iter().all(|g| table.node[usize::from(*g)] == id)
    }

    async fn eventually(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < Duration::from_secs(1), "{what} takes longer than a second");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn in_a_world(test: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, test());
}

#[test]
fn a_pod_gets_an_egress_ip_and_ports_that_the_holder_knows() {
    in_a_world(async || {
        let mut w = World::usual("path");
        w.start_all();
        w.eventually("a way out", |w| w.works("a", "192.0.2.100")).await;
        let a = w.get("a").image();
        assert!(a.pods[&key("10.1.0.1")].policy != 0);
        assert!(a.egress_ips.values().all(|e| e.uplink == 0), "a may not own it");
        assert!(w.get("c").image().granules.len() == 1, "c is ready to take over");
        assert_eq!(w.get("a").state.borrow().not_ready, None);
        assert_eq!(w.nodes.iter().filter(|n| n.state.borrow().leading).count(), 1);
        // In every image that the source ever had, the holder had the ports first.
        for image in w.get("a").kernel.history.borrow().iter() {
            if image.leases.is_empty() {
                continue;
            }
            let holder = w.get("b").kernel.history.borrow();
            assert!(holder.iter().any(|h| h.granules.values().any(|t| t.node.iter().any(|n| *n != 0))));
        }
    });
}

#[test]
fn changes_take_effect_within_a_second() {
    in_a_world(async || {
        let mut w = World::usual("changes");
        w.start_all();
        w.eventually("a way out", |w| w.works("a", "192.0.2.100")).await;
        let before = w.get("a").image().pods[&key("10.1.0.1")];
        // Another pod at the address, unselected.
        w.pod("a", "dev", "10.1.0.1");
        w.eventually("reuse of an address", |w| w.get("a").image().pods[&key("10.1.0.1")].policy == 0).await;
        assert!(w.get("a").image().pods[&key("10.1.0.1")].id > before.id, "no flow of the old one is its");
        fs::remove_file(w.dir.join("pod-10.1.0.1.yaml")).unwrap();
        w.eventually("a pod's end", |w| w.get("a").image().pods.is_empty()).await;
        w.pod("b", "shop", "10.2.0.1");
        w.eventually("a pod on the holder", |w| w.works("b", "192.0.2.100")).await;
        // Another address.
        w.egress_ip("192.0.2.101");
        w.eventually("another address", |w| w.works("b", "192.0.2.101")).await;
        assert_eq!(w.get("b").egress("192.0.2.100"), 0);
        w.eventually("the end of the old allocation", |w| {
            !w.dir.join(".outgate/egressallocations/192.0.2.100.yaml").exists()
        })
        .await;
    });
}

#[test]
fn an_address_moves_with_its_leases_when_its_node_is_unlabelled() {
    in_a_world(async || {
        let mut w = World::usual("move");
        w.start_all();
        w.eventually("a way out", |w| w.works("a", "192.0.2.100")).await;
        let lease = w.get("a").image().leases.clone();
        let (old, new) =
            if w.holder("192.0.2.100").as_deref() == Some("b") { ("b", "c") } else { ("c", "b") };
        w.node(old, "");
        w.eventually("a move", |w| {
            w.holder("192.0.2.100").as_deref() == Some(new) && w.works("a", "192.0.2.100")
        })
        .await;
        assert_eq!(w.get("a").image().leases, lease, "the ports stay");
    });
}

fn granules(w: &World, node: &str, ip: &str) -> u32 {
    let n = w.get(node);
    n.image().leases.get(&n.egress(ip)).map_or(0, |l| l.granules)
}

#[test]
fn a_node_whose_ports_run_out_gets_more_within_a_second() {
    in_a_world(async || {
        let mut w = World::usual("growth");
        w.start_all();
        w.eventually("a way out", |w| w.works("a", "192.0.2.100")).await;
        let before = granules(&w, "a", "192.0.2.100");
        let a = w.get("a");
        a.kernel.exhausted.borrow_mut().insert(a.egress("192.0.2.100"));
        w.eventually("more ports", |w| granules(w, "a", "192.0.2.100") >= 2 * before).await;
        assert!(w.works("a", "192.0.2.100"));
    });
}

#[test]
fn ports_that_no_pod_needs_go_back_once_no_flow_is_on_them() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let mut w = World::usual("return");
        for name in ["b", "c"] {
            w.start(name, Memory::default());
        }
        w.pod("b", "shop", "10.2.0.1");
        w.eventually("a way out", |w| w.works("b", "192.0.2.100")).await;
        let mut b = w.nodes.remove(0);
        b.task.abort();
        assert!((&mut b.task).await.is_err(), "cancelled");
        let told = |w: &World| fs::read_to_string(w.dir.join(".outgate/egressnodes/b.yaml")).unwrap();
        let mut agent = w.agent("b", &b.kernel);
        agent.idle = 0;
        agent.reconcile().await;
        fs::remove_file(w.dir.join("pod-10.2.0.1.yaml")).unwrap();
        agent.source.changed().await.unwrap();
        agent.reconcile().await;
        let id = agent.applied.as_ref().unwrap().0.egress_addrs[&key("192.0.2.100")];
        assert!(agent.look_at_ports(Some(0)), "it stops");
        agent.reconcile().await;
        b.kernel.used.borrow_mut().insert(id, Use { flows: 1, busiest: 1 });
        tokio::time::sleep(Duration::from_millis(2100)).await;
        assert!(!agent.look_at_ports(Some(1)), "a flow is on them");
        assert!(!told(&w).contains("returned"));
        b.kernel.used.borrow_mut().clear();
        assert!(agent.look_at_ports(Some(0)));
        agent.reconcile().await;
        assert!(told(&w).contains("returned"), "{}", told(&w));
        drop(agent);
        // Another agent has the leader take them back, and says no more of it then. A pod gets others.
        w.pod("b", "shop", "10.2.0.1");
        w.start("b", b.kernel.clone());
        w.eventually("the ports' rest", |w| {
            let a = fs::read_to_string(w.dir.join(".outgate/egressallocations/192.0.2.100.yaml"));
            a.unwrap().contains("resting") && !told(w).contains("returned") && w.works("b", "192.0.2.100")
        })
        .await;
    });
}

#[test]
fn another_leads_when_the_leader_ends_and_a_restart_changes_nothing() {
    in_a_world(async || {
        let mut w = World::usual("restart");
        w.start_all();
        w.eventually("a way out", |w| w.works("a", "192.0.2.100")).await;
        let leader = w.nodes.iter().position(|n| n.state.borrow().leading).unwrap();
        let mut gone = w.nodes.remove(leader);
        gone.task.abort();
        assert!((&mut gone.task).await.is_err(), "cancelled");
        w.eventually("another leader", |w| w.nodes.iter().any(|n| n.state.borrow().leading)).await;
        let before = gone.image();
        let kernel = Memory { image: before.clone(), ..Memory::default() };
        w.start(gone.name, kernel);
        w.eventually("a restart", |w| w.get(gone.name).state.borrow().not_ready.is_none()).await;
        assert_eq!(*w.get(gone.name).kernel.history.borrow(), [before], "one image, the same");
    });
}

#[test]
fn who_cannot_ask_to_lead_does_not_start_and_goes_on_if_that_comes_later() {
    in_a_world(async || {
        let w = World::usual("unlockable");
        let (mut agent, state, _facts) = w.make("a", &Memory::default());
        let lock = w.dir.join(".outgate/leader.lock");
        let _ = fs::remove_file(&lock);
        fs::create_dir_all(&lock).unwrap();
        let error = agent.run().await.unwrap_err();
        assert!(error.to_string().contains("leader.lock"), "{error}");

        fs::remove_dir(&lock).unwrap();
        let work = spawn_local(async move { agent.run().await.unwrap() });
        w.eventually("a leader", |_| state.borrow().leading).await;
        fs::remove_file(&lock).unwrap();
        fs::create_dir(&lock).unwrap();
        w.eventually("none", |_| !state.borrow().leading && state.borrow().problems > 0).await;
        fs::remove_dir(&lock).unwrap();
        w.eventually("a leader again", |_| state.borrow().leading && state.borrow().problems == 0).await;
        work.abort();
        assert!(work.await.is_err(), "cancelled, and not ended before");
    });
}

#[test]
fn a_firewalls_status_follows_its_object_and_not_only_the_maps() {
    in_a_world(async || {
        let mut w = World::usual("firewall");
        let firewall = |w: &World, rules: &str| {
            let head = "apiVersion: k8s.ovn.org/v1\nkind: EgressFirewall\nmetadata: {name: default, namespace: shop}";
            w.put("firewall.yaml", &format!("{head}\nspec: {{egress: [{rules}]}}\n"));
        };
        firewall(&w, "{type: Deny, to: {cidrSelector: 0.0.0.0/0}}");
        w.start("a", Memory::default());
        let status = |w: &World| {
            fs::read_to_string(w.dir.join(".outgate/status/egressfirewalls/shop.yaml")).unwrap_or_default()
        };
        let applied = |w: &World| status(w).contains("status: EgressFirewall Rules applied");
        w.eventually("a firewall", applied).await;
        let rules = |w: &World| {
            w.get("a").state.borrow().rules.values().map(|r| r[0].to_string()).collect::<Vec<_>>()
        };
        assert_eq!(rules(&w), ["Deny 0.0.0.0/0"], "for the audit log");
        let image = w.get("a").image();
        // A slip changes no map.
        firewall(&w, "{type: Deny, to: {cidrSelector: 10.0.0.1}}");
        w.eventually("a refusal", |w| {
            status(w).contains("stays in force")
                && status(w).contains("not correctly applied: spec.egress[0].to")
        })
        .await;
        assert_eq!(w.get("a").image(), image);
        assert_eq!(rules(&w), Vec::<String>::new(), "those in force are not the object's");
        // Nor do host bits, which are cut off.
        firewall(&w, "{type: Deny, to: {cidrSelector: 10.0.0.1/0}}");
        w.eventually("a version with the same rules", applied).await;
        assert_eq!(w.get("a").image(), image);
        // Nor does a restart.
        let before = status(&w);
        let mut gone = w.nodes.pop().unwrap();
        gone.task.abort();
        assert!((&mut gone.task).await.is_err(), "cancelled");
        w.start("a", Memory { image, ..Memory::default() });
        w.eventually("a restart", |w| {
            assert_eq!(status(w), before);
            w.get("a").state.borrow().not_ready.is_none()
        })
        .await;
        fs::remove_file(w.dir.join("firewall.yaml")).unwrap();
        w.eventually("its end", |w| status(w).is_empty()).await;
    });
}

#[test]
fn what_the_kernel_still_has_stays_confirmed_over_a_restart() {
    in_a_world(async || {
        let mut w = World::usual("confirmed");
        w.start("a", Memory::default());
        w.start("b", Memory::default());
        w.eventually("a way out", |w| w.works("a", "192.0.2.100")).await;
        let confirmed = |w: &World| {
            fs::read_to_string(w.dir.join(".outgate/egressnodes/b.yaml")).unwrap().contains("generation: ")
        };
        for (image, stays) in [(w.get("b").image(), true), (MapImage::default(), false)] {
            let gone = w.nodes.pop().unwrap();
            gone.task.abort();
            assert!(gone.task.await.is_err(), "cancelled");
            // It gets no further than its first words.
            let kernel = Memory { image, ..Memory::default() };
            *kernel.failing.borrow_mut() = true;
            w.start("b", kernel);
            w.eventually("an attempt", |w| w.get("b").state.borrow().apply_failures > 0).await;
            assert_eq!(confirmed(&w), stays);
        }
    });
}

#[test]
fn a_failed_apply_is_not_confirmed_and_tried_again() {
    in_a_world(async || {
        let mut w = World::usual("failure");
        let kernel = Memory::default();
        *kernel.failing.borrow_mut() = true;
        w.start("b", kernel.clone());
        w.eventually("an attempt", |w| w.get("b").state.borrow().apply_failures > 0).await;
        w.eventually("an assignment", |w| w.dir.join(".outgate/egressallocations/192.0.2.100.yaml").exists())
            .await;
        let own = fs::read_to_string(w.dir.join(".outgate/egressnodes/b.yaml")).unwrap();
        assert!(own.contains("loaded: []"), "{own}");
        assert!(w.get("b").state.borrow().not_ready.is_some());
        *kernel.failing.borrow_mut() = false;
        tokio::time::sleep(RETRY).await;
        w.eventually("another attempt", |w| w.get("b").state.borrow().not_ready.is_none()).await;
        w.eventually("the confirmation", |w| {
            fs::read_to_string(w.dir.join(".outgate/egressnodes/b.yaml")).unwrap().contains("generation: 1")
        })
        .await;
    });
}

#[test]
fn an_interface_that_cannot_be_attached_to_keeps_nothing_from_others() {
    in_a_world(async || {
        let mut w = World::usual("unattached");
        let kernel = Memory::default();
        *kernel.unattached.borrow_mut() = Some("no".into());
        w.start("a", Memory::default());
        w.start("b", kernel.clone());
        w.eventually("a way out", |w| w.works("a", "192.0.2.100")).await;
        assert!(w.get("b").state.borrow().not_ready.is_some());
        *kernel.unattached.borrow_mut() = None;
        tokio::time::sleep(RETRY).await;
        w.eventually("readiness", |w| w.get("b").state.borrow().not_ready.is_none()).await;
    });
}

#[test]
fn an_ipv6_pod_gets_an_ipv6_egress_ip_as_an_ipv4_pod_does_ipv4() {
    in_a_world(async || {
        let mut w = World::usual("dual");
        w.egress_ip("192.0.2.100, '2001:db8::100'");
        w.put(
            "six.yaml",
            "apiVersion: v1
kind: Pod
metadata: {name: six, namespace: shop}
spec: {nodeName: a}
status: {podIPs: [{ip: 10.1.0.6}, {ip: 'fd00:1::6'}]}
",
        );
        w.start_all();
        for ip in ["192.0.2.100", "2001:db8::100"] {
            w.eventually("a way out", |w| w.works("a", ip)).await;
        }
        let image = w.get("a").image();
        let policy = image.pods[&key("10.1.0.6")].policy;
        assert!(policy != 0);
        assert_eq!(image.pods[&key("fd00:1::6")].policy, policy);
        assert_eq!(image.policies[&policy].len, 2);
        let gateway = w.get(&w.holder("2001:db8::100").unwrap());
        assert_eq!(gateway.image().egress_ips[&gateway.egress("2001:db8::100")].uplink, 2);
        let name = ".outgate/egressallocations/2001-0db8-0000-0000-0000-0000-0000-0100.yaml";
        assert!(w.dir.join(name).exists());
        w.egress_ip("192.0.2.100");
        w.eventually("its end", |w| !w.dir.join(name).exists()).await;
    });
}

#[test]
fn what_the_link_was_not_asked_for_is_asked_for_again() {
    in_a_world(async || {
        let mut w = World::usual("unsettled");
        let kernel = Memory::default();
        *kernel.unsettled.borrow_mut() = Some("no".into());
        w.start("b", kernel.clone());
        w.eventually("readiness", |w| w.get("b").state.borrow().not_ready.is_none()).await;
        let settles = || *kernel.settles.borrow();
        // Nothing else changes any more, so another attempt is because of the failure.
        for _ in 0..2 {
            let before = settles();
            tokio::time::sleep(RETRY).await;
            w.eventually("another attempt", |_| settles() > before).await;
        }
        *kernel.unsettled.borrow_mut() = None;
        let before = settles();
        tokio::time::sleep(RETRY).await;
        w.eventually("the last attempt", |_| settles() > before).await;
        assert_eq!(w.get("b").state.borrow().apply_failures, 0, "the maps were never wrong");
    });
}

/// The pod's address is routed to this interface.
fn behind(facts: &mut Facts, index: IfIndex) {
    let interface = PodInterface {
        name: format!("veth{index}"),
        mac: [0; 6],
        bridge: 0,
        peer_elsewhere: true,
        mtu: 1500,
    };
    facts.pod_interfaces.insert(index, interface);
    facts.host_routes.insert("10.1.0.1".parse().unwrap(), index);
}

#[test]
fn facts_reach_the_maps() {
    in_a_world(async || {
        let mut w = World::usual("facts");
        w.start("a", Memory::default());
        w.eventually("the pod", |w| w.get("a").image().pods.contains_key(&key("10.1.0.1"))).await;
        assert_eq!(w.get("a").image().pods[&key("10.1.0.1")].ifindex, 0);
        w.get("a").facts.send_modify(|f| behind(f, 10));
        w.eventually("its interface", |w| w.get("a").image().pods[&key("10.1.0.1")].ifindex == 10).await;
    });
}

#[test]
fn a_pod_is_not_found_behind_an_interface_that_went_meanwhile() {
    in_a_world(async || {
        let mut w = World::usual("gone");
        let kernel = Memory::default();
        kernel.gone.borrow_mut().insert(10);
        w.start("a", kernel);
        w.get("a").facts.send_modify(|f| behind(f, 10));
        w.eventually("the pod", |w| w.get("a").image().pods.contains_key(&key("10.1.0.1"))).await;
        assert_eq!(w.get("a").image().pods[&key("10.1.0.1")].ifindex, 0);
        w.get("a").facts.send_modify(|f| behind(f, 11));
        w.eventually("its interface", |w| w.get("a").image().pods[&key("10.1.0.1")].ifindex == 11).await;
    });
}
