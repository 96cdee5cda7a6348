//! The node's agent: whatever changes, the whole way is gone again, from objects and facts to maps and status.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use datapath::addr::Ip;
use datapath::keys::{EgressId, IfIndex};
use datapath::limits::GRANULE_PORTS;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

use crate::cni;
use crate::compile::{Compiled, compile};
use crate::controller;
use crate::facts::Facts;
use crate::firewall::{self, FirewallState, audit};
use crate::ids::Ids;
use crate::image::MapImage;
use crate::metrics;
use crate::model::{self, Desired};
use crate::names::resolv_conf::ResolvConf;
use crate::objects::{EgressNode, EgressNodeStatus, EgressUplink, LoadedAllocation, Meta};
use crate::ports::{self, Ports, Use};
use crate::status;
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

    /// Whether the node has an interface at this moment.
    fn has_interface(&self, index: IfIndex) -> bool;

    /// Makes the tunnel's device be there, with this UDP port.
    fn ensure_tunnel(&mut self, port: u16) -> impl Future<Output = Result<(), String>>;

    /// Makes maps and attachments be as the image and the facts say. An error says that the maps are not;
    /// a text, that they are, and that some interface could not be attached to.
    fn apply(&mut self, image: &MapImage, facts: &Facts) -> Result<Option<String>, Self::Error>;

    /// Makes what is around this node fit the image, after it is applied: what the node asks its link to let
    /// through to it. An error is a text, and is tried again.
    fn settle(&mut self, image: &MapImage, facts: &Facts) -> impl Future<Output = Result<(), String>>;

    /// Learns the names of an image that is in force: from these resolvers of pods, and these nameservers of the node.
    fn learn(&mut self, _image: &MapImage, _resolvers: &BTreeSet<IpAddr>, _nameservers: &[IpAddr]) {}

    /// Whether what names say may have changed since this was last asked.
    fn has_news(&mut self) -> bool {
        false
    }

    /// What names say: those that do not exist, or cannot be looked up.
    fn problems(&self) -> BTreeSet<Problem> {
        BTreeSet::new()
    }

    /// Removes what firewalls had in force before, once nobody can be using it any more. Called at every tick.
    fn retire(&mut self) -> Result<(), Self::Error>;

    /// Removes dead flows; how many were removed, and how many are left.
    fn sweep(&mut self) -> Result<(usize, usize), Self::Error>;

    /// How the ports of each address are used by this node's flows.
    fn ports_used(&mut self) -> Result<BTreeMap<EgressId, Use>, Self::Error> {
        Ok(BTreeMap::new())
    }

    /// Addresses of which a flow has found no port in the last second. Called at every tick.
    fn exhausted(&mut self) -> Result<BTreeSet<EgressId>, Self::Error> {
        Ok(BTreeSet::new())
    }
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
    /// When the leader's work is to be done again although nothing has changed, in seconds since 1970.
    plan_at: Option<u64>,
    leading: bool,
    tunnel_port: Option<u16>,
    retry_at: Option<Instant>,
    /// Why nobody can be asked to lead.
    lead_error: Option<Problem>,
    /// Failures of the agent's own work, which is then tried again.
    failures: BTreeSet<Problem>,
    /// What looks wrong, and trying again does not help.
    notes: BTreeSet<Problem>,
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
        resolv_conf: ResolvConf,
        state: Rc<RefCell<metrics::State>>,
    ) -> Self {
        let ids = Ids::recover(kernel.recovered());
        let loaded = still_loaded(&identity, source.objects(), kernel.recovered());
        let firewalls = still_in_force(&identity, source.objects(), kernel.recovered());
        let own = source.objects().egress_nodes.get(&identity.node);
        let ports = own.map(|own| Ports::recover(&own.status)).unwrap_or_default();
        state.borrow_mut().not_ready = Some("nothing is applied yet".to_owned());
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
            plan_at: None,
            leading: false,
            tunnel_port: None,
            retry_at: None,
            lead_error: None,
            failures: BTreeSet::new(),
            notes: BTreeSet::new(),
            said: Said::default(),
        }
    }

    /// The same agent, which also hears the node's container runtime.
    #[must_use]
    pub fn with_runtime(self, runtime: cni::Runtime) -> Self {
        Self { runtime, ..self }
    }

    /// Works until it is cancelled, and leaves everything in the kernel as it is then.
    pub async fn run(&mut self) -> Result<(), S::Error> {
        let mut tick = interval(TICK);
        let mut sweep = interval(SWEEP);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let leads = self.source.lead()?;
        self.set_leading(leads);
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
                    let news = [self.lead(), self.kernel.has_news(), self.is_plan_due(), self.look_for_exhaustion()];
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

    /// Asks to lead, or whether it still does. Whether there is news. What worked at the start and fails later
    /// ends no agent: the node goes on with what it has.
    fn lead(&mut self) -> bool {
        let (leads, error) = match self.source.lead() {
            Ok(leads) => (leads, None),
            Err(error) => (false, Some(Problem::new("leadership", error))),
        };
        let news = leads != self.leading || error != self.lead_error;
        self.lead_error = error;
        self.set_leading(leads);
        news
    }

    fn set_leading(&mut self, leads: bool) {
        match (self.leading, leads) {
            (false, true) => info!("this agent leads: it assigns egress IPs and leases their ports"),
            (true, false) => info!("this agent leads no more"),
            _ => {}
        }
        self.leading = leads;
        self.state.borrow_mut().leading = leads;
    }

    /// Goes the whole way once.
    async fn reconcile(&mut self) {
        self.failures.clear();
        self.notes.clear();
        self.retry_at = None;
        let mut facts = self.facts.borrow_and_update().clone();
        let mut desired = self.desired();
        // Objects and interfaces are told of apart: a new pod must not be found behind what was an earlier one's.
        facts.forget_gone(|index| self.kernel.has_interface(index));
        facts.nameservers = self.resolv_conf.nameservers().to_vec();
        if self.publish(&desired, &facts).await {
            // In a large cluster it is large: never two at once.
            drop(desired);
            desired = self.desired();
        }
        if self.leading && self.plan(&desired).await {
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
        // The holder confirms what its kernel has; other nodes wait for it.
        self.publish(&desired, &facts).await;
        if !self.failures.is_empty() || compiled.waits {
            self.retry_at = Some(Instant::now() + RETRY);
        }
        self.report(&desired, &compiled);
        self.answer(&desired);
    }

    /// Tells those who wait for a pod that it is programmed, or what is missing.
    fn answer(&self, desired: &Desired) {
        let Some(door) = &self.runtime.door else { return };
        let objects = self.source.objects();
        let image = self.applied.as_ref().map(|(image, _)| image);
        door.set_not_ready(self.state.borrow().not_ready.clone());
        door.answer(|a| cni::programmed(a, objects, desired, image, &self.said.problems));
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

    /// Whether time has made work for the leader.
    fn is_plan_due(&self) -> bool {
        self.leading && self.plan_at.is_some_and(|at| status::seconds_of(SystemTime::now()) >= at)
    }

    /// Asks for more ports where a flow has found none. Whether there is news.
    fn look_for_exhaustion(&mut self) -> bool {
        match self.kernel.exhausted() {
            Ok(none) if none.is_empty() => false,
            Ok(some) => {
                let use_of = some.into_iter().map(|id| (id, Use::default())).collect();
                self.ask_for_more(&use_of, true)
            }
            Err(error) => {
                warn!("cannot see whether flows have found no port: {error}");
                false
            }
        }
    }

    fn ask_for_more(&mut self, use_of: &BTreeMap<EgressId, Use>, exhausted: bool) -> bool {
        let Some((image, _)) = &self.applied else { return false };
        let addresses: Vec<_> = use_of
            .iter()
            .filter_map(|(id, how)| Some((IpAddr::from(image.egress_ips.get(id)?.ip), *how)))
            .collect();
        let desired = self.desired();
        let mut news = false;
        for (ip, how) in addresses {
            if self.ports.used(&desired, &ip, how, exhausted) {
                info!("egress IP {ip}: this node asks for more ports");
                news = true;
            }
        }
        news
    }

    /// Looks how ports are used: asks for more, and gives back what pods have not needed for a while. `left` is how many
    /// flows there are after a sweep, none if that has failed. Whether there is news.
    fn look_at_ports(&mut self, left: Option<usize>) -> bool {
        let Some(left) = left else { return false };
        let Some((image, _)) = &self.applied else { return false };
        // So few flows are half of no lease: nothing has to be counted.
        let smallest = image.leases.values().map(|l| l.granules * u32::from(GRANULE_PORTS)).min();
        let busy = smallest.is_some_and(|ports| left >= ports as usize / 2);
        let mut news = false;
        let draining = self.ports.draining(self.now());
        if busy || !draining.is_empty() {
            let used = match self.kernel.ports_used() {
                Ok(used) => used,
                Err(error) => {
                    warn!("cannot see how ports are used: {error}");
                    return false;
                }
            };
            // An address that is not in the maps has no flow: the sweep has just removed them.
            let flows = |ip: &IpAddr| {
                let id = image.egress_addrs.get(&Ip::from(*ip));
                id.and_then(|id| used.get(id)).is_some_and(|u| u.flows > 0)
            };
            let drained: Vec<_> = draining.into_iter().filter(|ip| !flows(ip)).collect();
            for ip in drained {
                info!("egress IP {ip}: this node gives its ports back");
                self.ports.drained(&ip);
                news = true;
            }
            news |= self.ask_for_more(&used, false);
        }
        let desired = self.desired();
        news | self.ports.stop_idle(&desired, self.now(), self.idle)
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

    /// Does the leader's work. Whether anything was written.
    async fn plan(&mut self, desired: &Desired) -> bool {
        let led = controller::lead(&mut self.source, desired, &mut self.failures).await;
        self.plan_at = led.again;
        led.written
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
            // An object that was refused, or whose rules come to the same, changes no map; what is said of it does.
            self.firewalls.clone_from(&compiled.firewalls);
            self.loaded.clone_from(&compiled.loaded);
            self.ports.applied(self.now());
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
                } else if facts.tunnel_ifindex == 0 {
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
                self.failures.insert(Problem::new("this node's maps", error));
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

    fn retire(&mut self) {
        if let Err(error) = self.kernel.retire() {
            warn!("cannot remove rules of firewalls that are not in force any more: {error}");
        }
    }

    /// Returns how many flows are left.
    fn sweep(&mut self) -> Option<usize> {
        match self.kernel.sweep() {
            Ok((removed, left)) => {
                let mut state = self.state.borrow_mut();
                state.flows_swept += removed as u64;
                state.flows = left;
                Some(left)
            }
            Err(error) => {
                warn!("cannot look for dead flows: {error}");
                None
            }
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
            .chain(&self.kernel.problems())
            .chain(self.runtime.problems())
            .chain(&self.failures)
            .chain(&self.notes)
            .chain(&self.lead_error)
            .cloned()
            .collect();
        for problem in problems.difference(&self.said.problems) {
            if let Some(place) = self.source.place(&problem.about) {
                warn!("{place}: {problem}");
            } else {
                warn!("{problem}");
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
                    info!("pod {namespace}/{name} leaves by EgressIP {e}");
                }
                (Some(Some(e)), None) => {
                    info!("pod {namespace}/{name} is not selected by EgressIP {e} any more");
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
        state.rules = audit::rules_in_force(image, desired, &self.firewalls);
        state.ports_leased =
            image.leases.values().map(|l| u64::from(l.granules) * u64::from(GRANULE_PORTS)).sum();
        self.said = Said { problems, pods, held, waiting: self.said.waiting };
    }
}

/// What the agent before this one confirmed and the kernel still has. Taken back for the moment of a restart,
/// it would stop the nodes that wait for it from opening connections.
#[must_use]
pub fn still_loaded(
    identity: &Identity,
    objects: &crate::objects::Objects,
    kernel: &MapImage,
) -> BTreeMap<IpAddr, (String, u64)> {
    let Some(own) = objects.egress_nodes.get(&identity.node) else { return BTreeMap::new() };
    if own.status.boot_id != identity.boot_id {
        return BTreeMap::new();
    }
    own.status
        .loaded
        .iter()
        .filter_map(|l| Some((l.egress_ip.parse().ok()?, (l.uid.to_string(), l.generation))))
        .filter(|(ip, _)| {
            let id = kernel.egress_addrs.get(&Ip::from(*ip));
            id.is_some_and(|id| kernel.granules.contains_key(id))
        })
        .collect()
}

/// What the agent before this one said of firewalls, if the kernel still has any: until this one has looked at
/// them, no status is to change for a restart.
fn still_in_force(
    identity: &Identity,
    objects: &crate::objects::Objects,
    kernel: &MapImage,
) -> BTreeMap<String, FirewallState> {
    match objects.egress_nodes.get(&identity.node) {
        Some(own) if own.status.boot_id == identity.boot_id && !kernel.firewalls.is_empty() => {
            firewall::reported(&own.status.firewalls)
        }
        _ => BTreeMap::new(),
    }
}

/// 64 random bits.
#[must_use]
pub fn random() -> u64 {
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
    firewalls: &BTreeMap<String, FirewallState>,
    ports: &Ports,
) -> EgressNode {
    let node = desired.nodes.get(&identity.node);
    // An egress IP that somebody has put on an interface is the node's own: the model then refuses it, and
    // says so.
    let addresses: BTreeSet<_> = facts.addresses.iter().collect();
    let mac = |m: &[u8; 6]| m.map(|b| format!("{b:02x}")).join(":");
    let tunnels: Vec<_> = [false, true].iter().filter_map(|v6| tunnel_address(node, facts, *v6)).collect();
    let default_route = |index: &IfIndex| {
        let families = [(facts.default_v4, "IPv4"), (facts.default_v6, "IPv6")];
        families.iter().filter(|(i, _)| i.as_ref() == Some(index)).map(|(_, f)| (*f).to_owned()).collect()
    };
    EgressNode {
        metadata: Meta { name: identity.node.clone(), ..Meta::default() },
        status: EgressNodeStatus {
            node_uid: node.map(|n| n.uid.clone()).unwrap_or_default(),
            boot_id: identity.boot_id.clone(),
            tunnel_address: tunnels.first().map(ToString::to_string).unwrap_or_default(),
            tunnel_addresses: tunnels.iter().map(ToString::to_string).collect(),
            addresses: addresses.into_iter().map(ToString::to_string).collect(),
            uplinks: facts
                .uplinks
                .iter()
                .map(|(index, u)| EgressUplink {
                    name: u.name.clone(),
                    mac: mac(&u.mac),
                    networks: u.networks.iter().chain(&u.on_link).map(ToString::to_string).collect(),
                    default_route: default_route(index),
                    up: u.up,
                })
                .collect(),
            demand: ports.demand(),
            returned: ports.returned(),
            loaded: loaded
                .iter()
                .map(|(ip, (uid, generation))| LoadedAllocation {
                    egress_ip: ip.to_string().into(),
                    uid: uid.into(),
                    generation: *generation,
                })
                .collect(),
            firewalls: firewall::report(firewalls),
            shadowed: desired.shadowed.clone(),
        },
        ..EgressNode::default()
    }
}

/// Where the node's tunnel ends in a family: at an address that the Node object names, internal ones first, since
/// that is what other nodes and their firewalls know it by. Where it names none that is there, of either family:
/// at the address it had, while an uplink has it, else at the first address of an uplink.
fn tunnel_address(node: Option<&model::Node>, facts: &Facts, v6: bool) -> Option<IpAddr> {
    let is_there = |a: &IpAddr| facts.addresses.contains(a);
    let named = || {
        let internal = node.into_iter().flat_map(|n| &n.internal_addresses);
        internal.chain(node.into_iter().flat_map(|n| &n.object_addresses)).copied().filter(is_there)
    };
    if named().next().is_some() {
        return named().find(|a| a.is_ipv6() == v6);
    }
    let before = node.and_then(|n| n.agent.as_ref()).and_then(|a| a.tunnel_address(v6));
    let uplinks: Vec<_> = facts.uplinks.values().flat_map(|u| &u.networks).map(ipnet::IpNet::addr).collect();
    before
        .filter(|a| uplinks.contains(a))
        .into_iter()
        .chain(uplinks.iter().copied())
        .find(|a| a.is_ipv6() == v6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{PodInterface, Uplink};
    use crate::watch::dir::DirSource;
    use std::fs;
    use std::path::PathBuf;
    use tokio::sync::watch::{Sender, channel};
    use tokio::task::{JoinHandle, LocalSet, spawn_local};

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
        fn has_interface(&self, index: IfIndex) -> bool {
            !self.gone.borrow().contains(&index)
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
                &format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, uid: u{name}, labels: {{{labels}}}}}\n"),
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
            w.eventually("reuse of an address", |w| w.get("a").image().pods[&key("10.1.0.1")].policy == 0)
                .await;
            assert!(
                w.get("a").image().pods[&key("10.1.0.1")].id > before.id,
                "no flow of the old one is its"
            );
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
                fs::read_to_string(w.dir.join(".outgate/status/egressfirewalls/shop.yaml"))
                    .unwrap_or_default()
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
                fs::read_to_string(w.dir.join(".outgate/egressnodes/b.yaml"))
                    .unwrap()
                    .contains("generation: ")
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
            w.eventually("an assignment", |w| {
                w.dir.join(".outgate/egressallocations/192.0.2.100.yaml").exists()
            })
            .await;
            let own = fs::read_to_string(w.dir.join(".outgate/egressnodes/b.yaml")).unwrap();
            assert!(own.contains("loaded: []"), "{own}");
            assert!(w.get("b").state.borrow().not_ready.is_some());
            *kernel.failing.borrow_mut() = false;
            tokio::time::sleep(RETRY).await;
            w.eventually("another attempt", |w| w.get("b").state.borrow().not_ready.is_none()).await;
            w.eventually("the confirmation", |w| {
                fs::read_to_string(w.dir.join(".outgate/egressnodes/b.yaml"))
                    .unwrap()
                    .contains("generation: 1")
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

    #[test]
    fn the_tunnel_ends_at_the_internal_address() {
        let facts = Facts {
            uplinks: BTreeMap::from([(
                2,
                Uplink {
                    name: "eth0".into(),
                    mac: [0; 6],
                    networks: vec![
                        "fd00::1/64".parse().unwrap(),
                        "192.0.2.5/24".parse().unwrap(),
                        "192.0.2.6/24".parse().unwrap(),
                    ],
                    on_link: Vec::new(),
                    mtu: 1500,
                    up: true,
                },
            )]),
            addresses: ["192.0.2.5", "10.9.0.1", "fd00::9"].iter().map(|a| a.parse().unwrap()).collect(),
            ..Facts::default()
        };
        let node = |internal: &[&str], before: &[&str]| model::Node {
            internal_addresses: internal.iter().map(|a| a.parse().unwrap()).collect(),
            agent: Some(model::NodeAgent {
                tunnel_addresses: before.iter().map(|a| a.parse().unwrap()).collect(),
                ..model::NodeAgent::default()
            }),
            ..model::Node::default()
        };
        let of = |n: &model::Node, v6| tunnel_address(Some(n), &facts, v6).unwrap().to_string();
        assert_eq!(of(&node(&["fd00::9", "10.9.0.1"], &[]), false), "10.9.0.1");
        assert_eq!(of(&node(&["fd00::9", "10.9.0.1"], &[]), true), "fd00::9");
        assert_eq!(of(&node(&["203.0.113.1"], &[]), false), "192.0.2.5", "another's view of the node");
        let other_family = tunnel_address(Some(&node(&["10.9.0.1"], &["fd00::1"])), &facts, true);
        assert_eq!(other_family, None, "peers expect none of it");
        let external = model::Node {
            object_addresses: ["10.9.0.1".parse().unwrap()].into(),
            ..node(&["203.0.113.1"], &["192.0.2.6"])
        };
        assert_eq!(of(&external, false), "10.9.0.1");
        assert_eq!(of(&node(&[], &["192.0.2.6", "fd00::1"]), false), "192.0.2.6");
        assert_eq!(of(&node(&[], &["192.0.2.9", "fd00::2"]), true), "fd00::1");
        assert_eq!(tunnel_address(None, &Facts::default(), false), None);
    }
}
