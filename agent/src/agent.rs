//! The node's agent: whatever changes, the whole way is gone again, from objects and facts to maps and status.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use datapath::limits::GRANULE_PORTS;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

use crate::compile::{Compiled, compile};
use crate::facts::Facts;
use crate::ids::Ids;
use crate::image::MapImage;
use crate::leader::{Surroundings, plan};
use crate::metrics;
use crate::model::{self, Desired};
use crate::objects::{EgressNode, EgressNodeStatus, EgressUplink, LoadedAllocation, Meta};
use crate::status::rfc3339;
use crate::watch::{Problem, Source, Write};

/// How often one that does not lead asks to, and failed work is tried again.
const TICK: Duration = Duration::from_millis(500);
/// How often dead flows are looked for. Their ports serve again earlier: the programs take over what is dead.
const SWEEP: Duration = Duration::from_secs(15);
/// After a failed apply, try again not before.
const RETRY: Duration = Duration::from_secs(1);

/// The kernel side, as the run loop needs it.
pub trait Kernel {
    /// What can go wrong.
    type Error: std::error::Error;

    /// What the maps held at the start.
    fn recovered(&self) -> &MapImage;

    /// Makes the tunnel's device be there, with this UDP port.
    fn ensure_tunnel(&mut self, port: u16) -> impl Future<Output = Result<(), String>>;

    /// Makes maps and attachments be as the image and the facts say.
    fn apply(&mut self, image: &MapImage, facts: &Facts) -> Result<(), Self::Error>;

    /// Removes dead flows; how many were removed, and how many are left.
    fn sweep(&mut self) -> Result<(usize, usize), Self::Error>;
}

/// Who and where the agent is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    /// The node's name.
    pub node: String,
    /// The kernel's boot id.
    pub boot_id: String,
}

/// An agent at work.
pub struct Agent<S, K> {
    identity: Identity,
    source: S,
    kernel: K,
    facts: Receiver<Facts>,
    state: Rc<RefCell<metrics::State>>,
    ids: Ids,
    /// What was last applied, and with which facts.
    applied: Option<(MapImage, Facts)>,
    /// Allocations whose port tables are applied.
    loaded: BTreeMap<IpAddr, (String, u64)>,
    leading: bool,
    tunnel_port: Option<u16>,
    retry_at: Option<Instant>,
    /// Failures of the agent's own work, by what failed.
    failures: BTreeSet<Problem>,
    said: Said,
}

/// What was last said in the log, so that it is said once.
#[derive(Default)]
struct Said {
    problems: BTreeSet<Problem>,
    /// Which EgressIP serves which pod.
    pods: BTreeMap<(String, String), Option<String>>,
    /// Addresses that this node holds.
    held: BTreeSet<IpAddr>,
    waiting: Option<&'static str>,
}

impl<S: Source, K: Kernel> Agent<S, K> {
    /// An agent that has done nothing yet.
    pub fn new(
        identity: Identity,
        source: S,
        kernel: K,
        facts: Receiver<Facts>,
        state: Rc<RefCell<metrics::State>>,
    ) -> Self {
        let ids = Ids::recover(kernel.recovered());
        state.borrow_mut().not_ready = Some("nothing is applied yet".to_owned());
        Self {
            identity,
            source,
            kernel,
            facts,
            state,
            ids,
            applied: None,
            loaded: BTreeMap::new(),
            leading: false,
            tunnel_port: None,
            retry_at: None,
            failures: BTreeSet::new(),
            said: Said::default(),
        }
    }

    /// Works until it is cancelled, and leaves everything in the kernel as it is then.
    pub async fn run(&mut self) -> Result<(), S::Error> {
        let mut tick = interval(TICK);
        let mut sweep = interval(SWEEP);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.lead()?;
        self.reconcile().await;
        loop {
            let work = tokio::select! {
                changed = self.source.changed() => { changed?; true }
                changed = self.facts.changed() => {
                    if changed.is_err() {
                        // The task that reads netlink never ends by itself.
                        error!("the node's interfaces are not watched any more");
                        std::future::pending::<()>().await;
                    }
                    true
                }
                _ = tick.tick() => self.lead()? || self.retry_at.is_some_and(|at| at <= Instant::now()),
                _ = sweep.tick() => { self.sweep(); false }
            };
            if work {
                self.reconcile().await;
            }
        }
    }

    /// Asks to lead. Whether that is news.
    fn lead(&mut self) -> Result<bool, S::Error> {
        if self.leading || !self.source.lead()? {
            return Ok(false);
        }
        self.leading = true;
        self.state.borrow_mut().leading = true;
        info!("this agent leads: it assigns egress IPs and leases their ports");
        Ok(true)
    }

    /// Goes the whole way once.
    async fn reconcile(&mut self) {
        self.failures.clear();
        self.retry_at = None;
        let facts = self.facts.borrow_and_update().clone();
        let mut desired = self.desired();
        if self.publish(&desired, &facts).await {
            desired = self.desired();
        }
        if self.leading && self.plan(&desired).await {
            desired = self.desired();
        }
        let compiled = compile(&desired, &facts, &mut self.ids);
        self.apply(&desired, &compiled, &facts).await;
        // The holder confirms what its kernel has; other nodes wait for it.
        self.publish(&desired, &facts).await;
        if !self.failures.is_empty() {
            self.retry_at = Some(Instant::now() + RETRY);
        }
        self.report(&desired, &compiled);
    }

    fn desired(&self) -> Desired {
        model::desired(self.source.objects(), &self.identity.node)
    }

    async fn write(&mut self, what: &str, write: Write) {
        if let Err(error) = self.source.write(write).await {
            self.failures.insert(Problem::new(what, error));
        }
    }

    /// Writes this node's EgressNode, if it has changed.
    async fn publish(&mut self, desired: &Desired, facts: &Facts) -> bool {
        let own = egress_node(&self.identity, desired, facts, &self.loaded);
        let name = &self.identity.node;
        if self.source.objects().egress_nodes.get(name) == Some(&own) {
            return false;
        }
        if own.status.tunnel_address.is_empty() {
            warn!("node {name} has no IPv4 address on an uplink: other nodes cannot reach it by the tunnel");
        }
        self.write("this node's EgressNode", Write::EgressNode(own)).await;
        true
    }

    /// Does the leader's work. Whether anything was written.
    async fn plan(&mut self, desired: &Desired) -> bool {
        let now = rfc3339(SystemTime::now());
        let around = Surroundings {
            statuses: self.source.statuses(),
            unreadable: self.source.unreadable_allocations(),
            complete: self.source.complete(),
            now: &now,
            // Probes come with failover; until then the kubelet's word stands.
            reachable: &|_| true,
        };
        let plan = plan(desired, &around, &mut random);
        let worked = !plan.writes.is_empty();
        for line in plan.log {
            info!("{line}");
        }
        for write in plan.writes {
            self.write("the leader's objects", write).await;
        }
        worked
    }

    async fn apply(&mut self, desired: &Desired, compiled: &Compiled, facts: &Facts) {
        let Some(tunnel) = desired.tunnel else {
            self.wait("the leader has not chosen the nodes' tunnel yet");
            return;
        };
        if compiled.image.settings.node == 0 {
            self.wait("the node has no address for its tunnel yet");
            return;
        }
        if facts.tunnel_ifindex == 0 || self.tunnel_port != Some(tunnel.port) {
            match self.kernel.ensure_tunnel(tunnel.port).await {
                Ok(()) => self.tunnel_port = Some(tunnel.port),
                Err(message) => drop(self.failures.insert(Problem::new("tunnel", message))),
            }
        }
        if self.applied.as_ref().is_some_and(|(i, f)| *i == compiled.image && f == facts) {
            return;
        }
        match self.kernel.apply(&compiled.image, facts) {
            Ok(()) => {
                self.applied = Some((compiled.image.clone(), facts.clone()));
                self.loaded.clone_from(&compiled.loaded);
                self.state.borrow_mut().applies += 1;
                if facts.tunnel_ifindex == 0 {
                    self.wait("the tunnel's device is not there yet");
                } else {
                    self.said.waiting = None;
                    if self.state.borrow_mut().not_ready.take().is_some() {
                        info!("ready");
                    }
                }
            }
            Err(error) => {
                self.applied = None;
                self.state.borrow_mut().apply_failures += 1;
                self.failures.insert(Problem::new("this node's maps and programs", error));
            }
        }
    }

    /// The node is not ready because it waits for something.
    fn wait(&mut self, why: &'static str) {
        if self.said.waiting != Some(why) {
            debug!("waiting: {why}");
            self.said.waiting = Some(why);
        }
        self.state.borrow_mut().not_ready = Some(why.to_owned());
    }

    fn sweep(&mut self) {
        match self.kernel.sweep() {
            Ok((removed, left)) => {
                let mut state = self.state.borrow_mut();
                state.flows_swept += removed as u64;
                state.flows = left;
            }
            Err(error) => warn!("cannot look for dead flows: {error}"),
        }
    }

    /// Says in log and metrics what has changed.
    fn report(&mut self, desired: &Desired, compiled: &Compiled) {
        let problems: BTreeSet<_> = self
            .source
            .problems()
            .iter()
            .chain(&desired.problems)
            .chain(&compiled.problems)
            .chain(&self.failures)
            .cloned()
            .collect();
        for problem in problems.difference(&self.said.problems) {
            match self.source.place(&problem.about) {
                Some(place) => warn!("{place}: {problem}"),
                None => warn!("{problem}"),
            }
        }
        for problem in self.said.problems.difference(&problems) {
            if !problems.iter().any(|p| p.about == problem.about) {
                info!("{}: mended", problem.about);
            }
        }
        let pods: BTreeMap<_, _> =
            desired.pods.iter().map(|(name, pod)| (name.clone(), pod.egress_ip.clone())).collect();
        for ((namespace, name), egress_ip) in &pods {
            match (self.said.pods.get(&(namespace.clone(), name.clone())), egress_ip) {
                (old, Some(e)) if old != Some(egress_ip) => {
                    info!("pod {namespace}/{name} leaves by EgressIP {e}")
                }
                (Some(Some(e)), None) => {
                    info!("pod {namespace}/{name} is not selected by EgressIP {e} any more")
                }
                _ => {}
            }
        }
        for ((namespace, name), egress_ip) in &self.said.pods {
            if egress_ip.is_some() && !pods.contains_key(&(namespace.clone(), name.clone())) {
                info!("pod {namespace}/{name} is gone");
            }
        }
        let held: BTreeSet<_> = desired
            .addresses()
            .into_keys()
            .filter(|ip| {
                desired.allocations.get(ip).is_some_and(|a| a.owner.as_ref() == Some(&self.identity.node))
            })
            .collect();
        for ip in held.difference(&self.said.held) {
            info!("this node holds egress IP {ip}");
        }
        for ip in self.said.held.difference(&held) {
            info!("this node holds egress IP {ip} no more");
        }
        let image = &compiled.image;
        let mut state = self.state.borrow_mut();
        state.problems = problems.len();
        state.egress_ips_held = held.len();
        state.pods = pods.len();
        state.pods_selected = pods.values().flatten().count();
        state.nodes = image.nodes.len();
        state.ports_leased =
            image.leases.values().map(|l| u64::from(l.granules) * u64::from(GRANULE_PORTS)).sum();
        self.said = Said { problems, pods, held, waiting: self.said.waiting };
    }
}

/// 64 random bits.
fn random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    // The standard library takes its keys from the kernel's random numbers, once a thread, and counts on.
    RandomState::new().hash_one(SystemTime::now())
}

/// What the agent says about its node.
#[must_use]
pub fn egress_node(
    identity: &Identity,
    desired: &Desired,
    facts: &Facts,
    loaded: &BTreeMap<IpAddr, (String, u64)>,
) -> EgressNode {
    let node = desired.nodes.get(&identity.node);
    // An egress IP that somebody has put on an interface is the node's own: the model then refuses it, and
    // says so.
    let addresses: BTreeSet<_> = facts.addresses.iter().collect();
    let mac = |m: &[u8; 6]| m.map(|b| format!("{b:02x}")).join(":");
    EgressNode {
        metadata: Meta { name: identity.node.clone(), ..Meta::default() },
        status: EgressNodeStatus {
            node_uid: node.map(|n| n.uid.clone()).unwrap_or_default(),
            boot_id: identity.boot_id.clone(),
            tunnel_address: tunnel_address(node, facts).map(|a| a.to_string()).unwrap_or_default(),
            addresses: addresses.into_iter().map(ToString::to_string).collect(),
            uplinks: facts
                .uplinks
                .values()
                .map(|u| EgressUplink {
                    name: u.name.clone(),
                    mac: mac(&u.mac),
                    networks: u.networks.iter().map(ToString::to_string).collect(),
                    up: u.up,
                })
                .collect(),
            demand: desired.demand().into_iter().map(|ip| ip.to_string()).collect(),
            loaded: loaded
                .iter()
                .map(|(ip, (uid, generation))| LoadedAllocation {
                    egress_ip: ip.to_string(),
                    uid: uid.clone(),
                    generation: *generation,
                })
                .collect(),
        },
        ..EgressNode::default()
    }
}

/// Where the node's tunnel ends: its internal address, which other nodes know it by, if it is there; else the
/// one it had, while an uplink has it; else the first IPv4 address of an uplink.
fn tunnel_address(node: Option<&model::Node>, facts: &Facts) -> Option<IpAddr> {
    let internal = node.into_iter().flat_map(|n| &n.internal_addresses).copied();
    let before = node.and_then(|n| n.agent.as_ref()).and_then(|a| a.tunnel_address);
    let uplinks: Vec<_> = facts.uplinks.values().flat_map(|u| &u.networks).map(ipnet::IpNet::addr).collect();
    internal
        .filter(|a| facts.addresses.contains(a))
        .chain(before.filter(|a| uplinks.contains(a)))
        .chain(uplinks.iter().copied())
        .find(IpAddr::is_ipv4)
}
