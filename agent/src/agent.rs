//! The node's agent: whatever changes, the whole way is gone again, from objects and facts to maps and status.
//!
//! | file | has |
//! |---|---|
//! | `agent.rs` | the loop, and the way that an event goes |
//! | `agent/kernel.rs` | what it needs of the node's kernel |
//! | `agent/own_node.rs` | what it says of its node in the EgressNode |
//! | `agent/port_use.rs` | the sweep, and which ports are asked for and given back |
//! | `agent/report.rs` | what it says in log and metrics |

mod kernel;
mod own_node;
mod port_use;
mod report;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch::Receiver;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

pub use self::kernel::Kernel;
use self::own_node::still_in_force;
pub use self::own_node::{Identity, egress_node, still_loaded};
use self::report::Said;
use crate::cni;
use crate::compile::{Compiled, compile};
use crate::facts::Facts;
use crate::firewall::FirewallState;
use crate::ids::Ids;
use crate::image::MapImage;
use crate::leadership::Leadership;
use crate::metrics;
use crate::model::{self, Desired};
use crate::names::resolv_conf::ResolvConf;
use crate::ports::{self, Ports};
use crate::told::Told;
use crate::watch::{Problem, Source, Write};

/// How often one that does not lead asks to, and failed work is tried again.
const TICK: Duration = Duration::from_millis(500);
/// How often dead flows are looked for. Their ports serve again earlier: the programs take over what is dead.
const SWEEP: Duration = Duration::from_secs(15);
/// After a failed apply, try again not before.
const RETRY: Duration = Duration::from_secs(1);

/// Why a node is not ready at first.
const NOTHING_APPLIED: &str = "nothing is applied yet";

/// An agent at work.
pub struct Agent<S, K> {
    identity: Identity,
    source: S,
    kernel: K,
    facts: Receiver<Facts>,
    /// What the container runtime says of pods before their objects do.
    runtime: cni::Runtime,
    /// The node's resolv.conf, which pods may have been given.
    resolv_conf: ResolvConf,
    state: Rc<RefCell<metrics::State>>,
    ids: Ids,
    /// What was last applied, and with which facts.
    applied: Option<(MapImage, Facts)>,
    /// Allocations whose port tables are applied.
    loaded: BTreeMap<IpAddr, (String, u64)>,
    /// What has come of firewalls in the kernel, by namespace.
    firewalls: BTreeMap<String, FirewallState>,
    /// Ports that are asked for and given back.
    ports: Ports,
    /// How long no pod has to need an address until its ports are given back, in seconds.
    idle: u64,
    /// What its times are counted from.
    start: Instant,
    leadership: Leadership,
    tunnel_port: Option<u16>,
    retry_at: Option<Instant>,
    /// What the node is waiting for before it is ready.
    waiting: Option<&'static str>,
    /// Failures of the agent's own work, which is then tried again.
    failures: BTreeSet<Problem>,
    /// What looks wrong, and trying again does not help.
    notes: BTreeSet<Problem>,
    told: Told,
    said: Said,
}

impl<S: Source, K: Kernel> Agent<S, K> {
    /// An agent that has done nothing yet.
    pub fn new(
        identity: Identity,
        source: S,
        kernel: K,
        facts: Receiver<Facts>,
        resolv_conf: ResolvConf,
        state: Rc<RefCell<metrics::State>>,
    ) -> Self {
        let ids = Ids::recover(kernel.recovered());
        let loaded = still_loaded(&identity, source.objects(), kernel.recovered());
        let firewalls = still_in_force(&identity, source.objects(), kernel.recovered());
        let own = source.objects().egress_nodes.get(&identity.node);
        let ports = own.map(|own| Ports::recover(&own.status)).unwrap_or_default();
        state.borrow_mut().not_ready = Some(NOTHING_APPLIED.to_owned());
        let leadership = Leadership::new("agent", Rc::clone(&state));
        Self {
            identity,
            source,
            kernel,
            facts,
            runtime: cni::Runtime::default(),
            resolv_conf,
            state,
            ids,
            applied: None,
            loaded,
            firewalls,
            ports,
            idle: ports::IDLE,
            start: Instant::now(),
            leadership,
            tunnel_port: None,
            retry_at: None,
            waiting: Some(NOTHING_APPLIED),
            failures: BTreeSet::new(),
            notes: BTreeSet::new(),
            told: Told::default(),
            said: Said::default(),
        }
    }

    /// The same agent, which also hears the node's container runtime.
    #[must_use]
    pub fn with_runtime(self, runtime: cni::Runtime) -> Self {
        Self { runtime, ..self }
    }

    /// The same agent, whose source's problems the log was told of already.
    #[must_use]
    pub fn with_told(self, told: Told) -> Self {
        Self { told, ..self }
    }

    /// Works until it is cancelled, and leaves everything in the kernel as it is then.
    pub async fn run(&mut self) -> Result<(), S::Error> {
        let mut tick = interval(TICK);
        let mut sweep = interval(SWEEP);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.leadership.begin(&mut self.source)?;
        self.reconcile().await;
        loop {
            let work = tokio::select! {
                changed = self.source.changed() => { changed?; true }
                () = self.runtime.changed() => true,
                changed = self.facts.changed() => {
                    if changed.is_err() {
                        // The task that reads netlink never ends by itself.
                        error!("the node's interfaces are not watched any more");
                        std::future::pending::<()>().await;
                    }
                    true
                }
                _ = tick.tick() => {
                    self.retire();
                    let leadership = self.leadership.look(&mut self.source) || self.leadership.is_due();
                    let news = [leadership, self.kernel.has_news(), self.look_for_exhaustion()];
                    news.contains(&true) || self.retry_at.is_some_and(|at| at <= Instant::now())
                }
                _ = sweep.tick() => {
                    let left = self.sweep();
                    [self.resolv_conf.reread(), self.look_at_ports(left)].contains(&true)
                }
            };
            if work {
                self.reconcile().await;
            }
        }
    }

    /// Goes the whole way once.
    async fn reconcile(&mut self) {
        self.failures.clear();
        self.notes.clear();
        self.retry_at = None;
        if let Some(door) = &self.runtime.door {
            door.begin();
        }
        let mut facts = self.facts.borrow_and_update().clone();
        let mut desired = self.desired();
        // Objects and interfaces are told of apart: a new pod must not be found behind what was an earlier one's.
        facts.forget(&self.kernel.gone(facts.pod_interfaces.keys().copied()));
        facts.nameservers = self.resolv_conf.nameservers().to_vec();
        if self.publish(&desired, &facts).await {
            // In a large cluster it is large: never two at once.
            drop(desired);
            desired = self.desired();
        }
        if self.leadership.work(&mut self.source, &desired, &mut self.failures).await {
            drop(desired);
            desired = self.desired();
        }
        let node = &self.identity.node;
        if !desired.nodes.get(node).is_some_and(|n| n.exists) {
            let message = "there is no such object, so this node cannot own egress IPs; is --node its name?";
            self.notes.insert(Problem::new(format_args!("Node {node}"), message));
        }
        let compiled = compile(&desired, &facts, &mut self.ids);
        self.apply(&desired, &compiled, &facts).await;
        self.look_whether_ready();
        // The holder confirms what its kernel has; other nodes wait for it.
        self.publish(&desired, &facts).await;
        if !self.failures.is_empty() || compiled.waits {
            self.retry_at = Some(Instant::now() + RETRY);
        }
        self.report(&desired, &compiled);
        self.answer(&desired, &facts);
    }

    /// Tells those who wait for a pod that it is programmed, or what is missing.
    fn answer(&self, desired: &Desired, facts: &Facts) {
        let Some(door) = &self.runtime.door else { return };
        let objects = self.source.objects();
        let image = self.applied.as_ref().filter(|(_, f)| f == facts).map(|(image, _)| image);
        door.set_not_ready(self.state.borrow().not_ready.clone());
        door.answer(|a| cni::programmed(a, objects, desired, image, self.told.problems()));
        door.forget(objects);
    }

    /// Seconds since the agent has started.
    fn now(&self) -> u64 {
        self.start.elapsed().as_secs()
    }

    fn desired(&mut self) -> Desired {
        let (objects, node, now) = (self.source.objects(), &self.identity.node, self.now());
        let mut desired = model::desired_with(objects, node, &self.runtime.known(objects, node));
        self.ports.observe(&mut desired, now);
        desired
    }

    async fn write(&mut self, what: &str, write: Write) {
        if let Err(error) = self.source.write(write).await {
            self.failures.insert(Problem::new(what, error));
        }
    }

    /// Writes this node's EgressNode, if it has changed.
    async fn publish(&mut self, desired: &Desired, facts: &Facts) -> bool {
        let own = egress_node(&self.identity, desired, facts, &self.loaded, &self.firewalls, &self.ports);
        let name = &self.identity.node;
        if self.source.objects().egress_nodes.get(name).is_some_and(|o| o.status == own.status) {
            return false;
        }
        if own.status.tunnel_address.is_empty() {
            warn!("node {name} has no address on an uplink: other nodes cannot reach it by the tunnel");
        }
        self.write("this node's EgressNode", Write::EgressNode(own)).await;
        true
    }

    async fn apply(&mut self, desired: &Desired, compiled: &Compiled, facts: &Facts) {
        let Some(tunnel) = desired.tunnel else {
            self.waiting = Some("the leader has not chosen the nodes' tunnel yet");
            return;
        };
        if compiled.image.settings.node == 0 {
            self.waiting = Some("the node has no address for its tunnel yet");
            return;
        }
        if facts.tunnel_ifindex == 0 || self.tunnel_port != Some(tunnel.port) {
            match self.kernel.ensure_tunnel(tunnel.port).await {
                Ok(()) => self.tunnel_port = Some(tunnel.port),
                Err(message) => drop(self.failures.insert(Problem::new("tunnel", message))),
            }
        }
        if self.applied.as_ref().is_some_and(|(i, f)| *i == compiled.image && f == facts) {
            // An object that was refused, or whose rules come to the same, changes no map; what is said of it does.
            self.firewalls.clone_from(&compiled.firewalls);
            self.loaded.clone_from(&compiled.loaded);
            self.ports.applied(self.now());
            self.wait_for_tunnel(facts);
            return;
        }
        match self.kernel.apply(&compiled.image, facts) {
            Ok(unattached) => {
                self.applied = Some((compiled.image.clone(), facts.clone()));
                self.kernel.learn(&compiled.image, &desired.config.resolvers, &facts.nameservers);
                if let Err(message) = self.kernel.settle(&compiled.image, facts).await {
                    self.applied = None;
                    self.failures.insert(Problem::new("this node's proxy neighbours", message));
                }
                self.loaded.clone_from(&compiled.loaded);
                self.firewalls.clone_from(&compiled.firewalls);
                self.ports.applied(self.now());
                self.state.borrow_mut().applies += 1;
                if let Some(message) = unattached {
                    // The port tables are there all the same: other nodes need not wait.
                    self.applied = None;
                    self.failures.insert(Problem::new("this node's interfaces", message));
                } else {
                    self.wait_for_tunnel(facts);
                }
            }
            Err(error) => {
                self.applied = None;
                self.state.borrow_mut().apply_failures += 1;
                self.failures.insert(Problem::new("this node's maps", error));
            }
        }
    }

    /// All is applied, and whole once the tunnel's device is there.
    fn wait_for_tunnel(&mut self, facts: &Facts) {
        self.waiting = (facts.tunnel_ifindex == 0).then_some("the tunnel's device is not there yet");
    }

    /// Says whether the node is ready: what is wanted is applied, and what changes will be heard of.
    fn look_whether_ready(&self) {
        let grows_old = || self.source.stale().map(ToString::to_string);
        let why = self.waiting.map(str::to_owned).or_else(grows_old);
        let mut state = self.state.borrow_mut();
        match (&state.not_ready, &why) {
            (Some(_), None) => info!("ready"),
            (before, Some(now)) if before.as_ref() != Some(now) => debug!("not ready: {now}"),
            _ => {}
        }
        state.not_ready = why;
    }

    fn retire(&mut self) {
        if let Err(error) = self.kernel.retire() {
            warn!("cannot remove rules of firewalls that are not in force any more: {error}");
        }
    }
}

/// 64 random bits.
#[must_use]
pub fn random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    // The standard library takes its keys from the kernel's random numbers, once a thread, and counts on.
    RandomState::new().hash_one(SystemTime::now())
}

#[cfg(test)]
mod tests;
