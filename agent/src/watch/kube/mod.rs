//! The Kubernetes API as the source of objects.
//!
//! Every kind is listed and watched ([`follow`]), each watch's objects count as a whole ([`set`]), and all of them are the
//! [`view`] that the rest of the program sees. What fails goes on with what was known, says why, and mends itself.
//!
//! | who | watches | writes |
//! |---|---|---|
//! | an agent | its Node and its pods; namespaces; EgressNodes, policies, the cluster's DNS | the status of its EgressNode; its heartbeat |
//! | a controller | Nodes, EgressNodes, policies, allocations, heartbeats | as the leader: allocations, specs of EgressNodes, statuses |
//! | a command | the same, and pods and namespaces | nothing |

mod client;
mod election;
mod events;
mod fence;
mod firewalls;
mod follow;
mod heartbeat;
mod kinds;
mod mirror;
mod publish;
mod set;
mod trouble;
mod view;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kube::api::DynamicObject;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep_until};
use tracing::info;

use self::client::Connection;
use self::firewalls::{Firewalls, Got};
use self::follow::{Change, Message, Outlet, Scope, follow};
use self::heartbeat::Judge;
pub use self::kinds::Kind;
use self::kinds::{Key, read};
pub use self::mirror::Mirror;
use self::set::{Set, Step};
use self::trouble::{SERVER, Trouble};
use self::view::View;
use self::write::{Done, Outcome, Writer};
use super::{Event, Problem, Source, Write};
use crate::agent::random;
use crate::firewall::check::Spec;
use crate::objects::{
    EGRESS_ASSIGNABLE, EgressAllocation, EgressFirewall, EgressFirewallReport, EgressIpReport,
    EgressNodeStatus, Meta, ObjectName, Objects,
};

/// From the first sign of a change to telling of it: long enough to see a burst as one change.
const DEBOUNCE: Duration = Duration::from_millis(15);
/// The namespace of OpenShift's DNS, where there is one.
const OPENSHIFT_DNS: &str = "openshift-dns";
/// A server that has just started knows no roles, and refuses for some seconds what it will grant.
const PASSING: Duration = Duration::from_secs(10);
/// Messages of watches that wait to be read.
const QUEUE: usize = 1024;

/// Why the cluster cannot be used, or not be written to.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Error {
    #[error(
        "cannot use the Kubernetes API: {error}; --kubeconfig names a file, else it is KUBECONFIG or the pod's ServiceAccount"
    )]
    Configuration { error: String },
    #[error("{0}")]
    Write(String),
    /// An object is not the one any more that was planned for. It has been read again.
    #[error("{0} has changed meanwhile; it is planned for again")]
    Conflict(String),
    /// This process does not lead any more.
    #[error("this controller does not lead any more")]
    NotLeader,
    #[error(
        "OVN-Kubernetes runs node {node} and serves EgressIP and EgressFirewall itself; outgate would do it twice. Give --adopt to use outgate all the same, once OVN-Kubernetes' own egress is switched off"
    )]
    OvnKubernetes { node: String },
    #[error("{0}")]
    Incomplete(String),
}

/// Who uses the source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Role {
    /// The agent of a node.
    Agent {
        /// The node's name.
        node: String,
    },
    /// A controller.
    Controller,
    /// A command that looks once.
    Command,
}

/// What a background task has to say: a problem, or that there is none any more.
#[derive(Debug)]
struct Note {
    about: &'static str,
    problem: Option<Problem>,
    /// Whether that is because the server is away, which watches say as well.
    away: bool,
}

/// A task that ends with its owner.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Task {
    fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task).abort_handle())
    }
}

/// One watch.
struct Watch {
    scope: Scope,
    /// Whether nothing is complete without it.
    required: bool,
    set: Set,
    run: u64,
    /// None: it is not needed now.
    task: Option<Task>,
    /// Whether it has followed changes, and has not been refused them since.
    follows: bool,
    /// Since when it is refused what it needs, as last heard.
    refused: Option<Refused>,
    /// What is wrong with it, and since when.
    trouble: Option<(Trouble, String)>,
}

/// A right that is missing.
struct Refused {
    since: Instant,
    problem: Problem,
    /// Whether it has been for so long that it is no passing trouble.
    lasts: bool,
}

impl Watch {
    /// Takes up whether changes come: a list alone is soon out of date.
    fn hear(&mut self, change: &Change, connection: &Connection) {
        match change {
            // What is said before a list has ended is said by the list.
            Change::Alive | Change::Put(_) | Change::Gone(..) if self.set.complete() => {
                self.follows = true;
                self.refused = None;
            }
            Change::Failed(trouble @ Trouble::Forbidden(..), since) => {
                self.follows = false;
                let problem = trouble.problem(self.scope.kind, since, connection);
                let since = self.refused.take().map_or_else(Instant::now, |refused| refused.since);
                self.refused = Some(Refused { since, problem, lasts: since.elapsed() >= PASSING });
            }
            Change::Begin
            | Change::Page(_)
            | Change::End(_)
            | Change::Put(_)
            | Change::Gone(..)
            | Change::Alive
            | Change::Failed(..) => {}
        }
    }

    /// Why what is known of it will be out of date, and for long.
    fn stale(&self) -> Option<&Problem> {
        self.refused.as_ref().filter(|refused| self.required && refused.lasts).map(|refused| &refused.problem)
    }

    /// Whether something that is needed is missing.
    fn lacks(&self, to_follow: bool) -> bool {
        self.required && self.task.is_some() && !(self.set.complete() && (self.follows || !to_follow))
    }
}

/// The election, on a controller.
struct Election {
    leads: watch::Receiver<bool>,
    look: Arc<Notify>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    identity: String,
    /// Whether lists have been made anew since this process was elected.
    elected: bool,
}

/// The Kubernetes API.
pub struct KubeSource {
    connection: Connection,
    role: Role,
    namespace: String,
    watches: Vec<Watch>,
    sender: mpsc::Sender<Message>,
    messages: mpsc::Receiver<Message>,
    view: View,
    judge: Judge,
    problems: BTreeSet<Problem>,
    /// Which of them keeps changes from coming.
    stale: Option<Problem>,
    notes: mpsc::UnboundedReceiver<Note>,
    /// Problems of background tasks.
    noted: BTreeMap<&'static str, (Problem, bool)>,
    /// When to tell of what has changed.
    due: Option<Instant>,
    writer: Writer,
    election: Option<Election>,
    /// An agent's own status, to be written.
    status: watch::Sender<Option<EgressNodeStatus>>,
    /// Whether that has changed since it was given to be written.
    unsent: bool,
    /// An agent's heartbeat: the UID of its Node, if that has the label.
    heartbeat: watch::Sender<Option<String>>,
    events: mpsc::Sender<(Event, String)>,
    /// The firewalls that an agent has to get.
    firewalls: Firewalls,
    got: mpsc::UnboundedReceiver<Got>,
    got_sender: mpsc::UnboundedSender<Got>,
    noter: mpsc::UnboundedSender<Note>,
    /// Whether OpenShift's DNS is watched.
    openshift: bool,
    _tasks: Vec<Task>,
}

impl KubeSource {
    /// Begins to watch. Nothing is known yet: see [`ready`](Self::ready).
    pub async fn open(role: Role, kubeconfig: Option<&Path>, namespace: &str) -> Result<Self, Error> {
        let connection = client::connect(kubeconfig).await?;
        let (sender, messages) = mpsc::channel(QUEUE);
        let (noter, note_queue) = mpsc::unbounded_channel();
        let (status, said) = watch::channel(None);
        let (heartbeat, wanted) = watch::channel(None);
        let (events, event_queue) = mpsc::channel(events::QUEUE);
        let (got_sender, got) = mpsc::unbounded_channel();
        let client = connection.client.clone();
        let mut tasks = Vec::new();
        let mut election = None;
        let identity = format!("{}-{:08x}", hostname(), random() >> 32);
        match &role {
            Role::Agent { node } => {
                tasks.push(Task::spawn(publish::publish(
                    connection.clone(),
                    client.clone(),
                    node.clone(),
                    said,
                    noter.clone(),
                )));
                tasks.push(Task::spawn(heartbeat::renew(
                    connection.clone(),
                    client.clone(),
                    namespace.to_owned(),
                    node.clone(),
                    wanted,
                    noter.clone(),
                )));
            }
            Role::Controller => {
                let (leads, leading) = watch::channel(false);
                let (stop, ended) = watch::channel(false);
                let look = Arc::new(Notify::new());
                let stand = election::stand(
                    client.clone(),
                    namespace.to_owned(),
                    identity.clone(),
                    leads,
                    Arc::clone(&look),
                    ended,
                    noter.clone(),
                );
                let task = tokio::spawn(stand);
                let identity = identity.clone();
                election = Some(Election { leads: leading, look, stop, task, identity, elected: false });
            }
            Role::Command => {}
        }
        tasks.push(Task::spawn(events::record(client.clone(), identity, event_queue)));
        let own = match &role {
            Role::Agent { node } => Some(node.as_str()),
            Role::Controller | Role::Command => None,
        };
        let mut source = Self {
            writer: Writer::new(client, namespace),
            view: View::new(own),
            connection,
            namespace: namespace.to_owned(),
            watches: Vec::new(),
            sender,
            messages,
            judge: Judge::default(),
            problems: BTreeSet::new(),
            stale: None,
            notes: note_queue,
            noted: BTreeMap::new(),
            due: None,
            election,
            status,
            unsent: false,
            heartbeat,
            events,
            openshift: false,
            firewalls: Firewalls::default(),
            got,
            got_sender,
            noter,
            _tasks: tasks,
            role,
        };
        for (scope, required) in scopes(&source.role, namespace) {
            source.start(scope, required);
        }
        Ok(source)
    }

    /// What is used and how, for the log.
    #[must_use]
    pub fn describe(&self) -> String {
        let kinds: BTreeSet<_> = self.watches.iter().map(|w| w.scope.kind.plural()).collect();
        let kinds: Vec<_> = kinds.into_iter().collect();
        format!("{:?}; it watches {}", self.connection, kinds.join(", "))
    }

    fn start(&mut self, scope: Scope, required: bool) {
        let scope = scope.read_for(self.view.own());
        let outlet = Outlet { watch: self.watches.len(), run: 0, sender: self.sender.clone() };
        let task = Task::spawn(follow(self.connection.client.clone(), scope.clone(), outlet));
        self.watches.push(Watch {
            scope,
            required,
            set: Set::default(),
            run: 0,
            task: Some(task),
            follows: false,
            refused: None,
            trouble: None,
        });
    }

    /// Lists everything anew; what was known stays until it has come.
    fn restart(&mut self) {
        for index in 0..self.watches.len() {
            if self.watches[index].task.is_some() {
                self.run(index);
            }
        }
    }

    /// Runs a watch from its list on.
    fn run(&mut self, index: usize) {
        let watch = &mut self.watches[index];
        watch.run += 1;
        watch.set.forget_lists();
        let outlet = Outlet { watch: index, run: watch.run, sender: self.sender.clone() };
        watch.task = Some(Task::spawn(follow(self.connection.client.clone(), watch.scope.clone(), outlet)));
    }

    /// Ends a watch, and forgets its objects.
    fn stop(&mut self, index: usize) {
        let watch = &mut self.watches[index];
        watch.run += 1;
        watch.task = None;
        watch.follows = false;
        watch.refused = None;
        watch.trouble = None;
        let kind = watch.scope.kind;
        for key in watch.set.clear() {
            self.view.remove(kind, &key);
        }
    }

    /// Waits until everything is known for the first time and changes would come, and tells whenever it has something else to say about why it
    /// is not yet. An API server that is away is waited for.
    pub async fn ready(&mut self, mut tell: impl FnMut(&Self)) -> Result<(), Error> {
        let mut told = None;
        while !self.is_known() {
            self.changed().await?;
            if told.as_ref() != Some(&self.problems) {
                tell(self);
                told = Some(self.problems.clone());
            }
        }
        Ok(())
    }

    /// Whether every object is known, good or bad, and will be: a command looks once.
    fn is_known(&self) -> bool {
        let firewalls = match &self.role {
            Role::Agent { node } => self.firewalls.is_complete(&own_namespaces(&self.view.objects, node)),
            Role::Controller | Role::Command => true,
        };
        let to_follow = self.role != Role::Command;
        firewalls && !self.watches.iter().any(|w| w.lacks(to_follow))
    }

    /// Refuses a cluster that OVN-Kubernetes serves.
    pub fn refuse_ovn(&self) -> Result<(), Error> {
        match self.view.ovn_nodes.first() {
            Some(node) => Err(Error::OvnKubernetes { node: node.clone() }),
            None => Ok(()),
        }
    }

    /// Gives leadership back, so that another may take it at once.
    pub async fn resign(&mut self) {
        if let Some(election) = &mut self.election {
            election.stop.send_replace(true);
            // It has said what went wrong, if anything did.
            let _ = tokio::time::timeout(Duration::from_secs(3), &mut election.task).await;
        }
    }

    /// Takes up a message of a watch; whether anything is different now.
    fn take(&mut self, message: Message) -> bool {
        let Some(watch) = self.watches.get_mut(message.watch).filter(|w| w.run == message.run) else {
            return false;
        };
        let kind = watch.scope.kind;
        let was = watch.set.complete();
        let trouble = match &message.change {
            Change::Failed(trouble, since) => Some((trouble.clone(), since.clone())),
            Change::Begin => watch.trouble.clone(),
            Change::Page(_) | Change::End(_) | Change::Put(_) | Change::Gone(..) | Change::Alive => None,
        };
        let heard = !matches!(message.change, Change::Begin | Change::Page(_) | Change::Failed(..));
        let mut changed = trouble != watch.trouble;
        watch.trouble = trouble;
        let before = (watch.follows, watch.stale().is_some());
        watch.hear(&message.change, &self.connection);
        changed |= (watch.follows, watch.stale().is_some()) != before;
        let steps = match message.change {
            Change::Begin => {
                watch.set.begin();
                Vec::new()
            }
            Change::Page(seen) => {
                watch.set.page(seen);
                Vec::new()
            }
            Change::End(of) => watch.set.end(of),
            Change::Put(seen) => Vec::from_iter(watch.set.put(*seen)),
            Change::Gone(key, uid, version) => Vec::from_iter(watch.set.gone(&key, &uid, version)),
            Change::Alive | Change::Failed(..) => Vec::new(),
        };
        changed |= was != watch.set.complete();
        for step in steps {
            changed |= self.step(message.watch, kind, step);
        }
        if heard && kind == Kind::Heartbeat {
            changed |= self.judge.hear(&self.view.heartbeats, Instant::now());
        }
        changed
    }

    fn step(&mut self, watch: usize, kind: Kind, step: Step) -> bool {
        if kind == Kind::EgressFirewall && self.watches[watch].scope.metadata {
            // See `settle_firewalls`.
            match step {
                Step::Put(seen) => self.firewalls.note(&seen),
                Step::Remove(key) => self.firewalls.forget(&key),
            }
            return true;
        }
        // Two watches may show the same object, as a node's own pods and those of the cluster's DNS.
        let other = |key: &Key| {
            let mut others =
                self.watches.iter().enumerate().filter(|(i, w)| *i != watch && w.scope.kind == kind);
            others.find_map(|(_, w)| w.set.head(key)).map(|(_, version)| version)
        };
        match step {
            Step::Put(seen) => {
                let newer = other(&seen.key).is_some_and(|known| known > seen.version);
                !newer && self.put(kind, *seen)
            }
            Step::Remove(key) => other(&key).is_none() && self.view.remove(kind, &key),
        }
    }

    fn put(&mut self, kind: Kind, seen: kinds::Seen) -> bool {
        let changed = self.view.put(kind, seen);
        if let (Some(election), Kind::Leader) = (&self.election, kind)
            && self.view.leader.as_ref().is_none_or(|l| l.holder.is_empty())
        {
            election.look.notify_one();
        }
        changed && kind != Kind::Leader
    }

    /// After changes: what they come to.
    fn settle(&mut self) {
        let mut problems: BTreeSet<Problem> = self
            .watches
            .iter()
            .filter_map(|w| {
                let (trouble, since) = w.trouble.as_ref()?;
                Some(trouble.problem(w.scope.kind, since, &self.connection))
            })
            .collect();
        // A server that is away comes back; a right that is missing does not come by itself.
        let refused = self.watches.iter().find_map(Watch::stale).cloned();
        // A firewall that was not got is one that is known to have changed.
        let unread = || self.noted.get(firewalls::NOTE).filter(|(_, away)| !away).map(|(p, _)| p.clone());
        self.stale = refused.or_else(unread);
        one_of_each_server(&mut problems);
        // One that is away is one problem, whatever else wants something of it.
        let away = problems.iter().any(|p| p.about.starts_with(SERVER));
        let noted = self.noted.values().filter(|(_, because)| !(away && *because));
        problems.extend(noted.map(|(problem, _)| problem.clone()));
        for ((kind, key), error) in &self.view.bad {
            let name = ObjectName { kind: name_of(*kind), namespace: key.0.clone(), name: key.1.clone() };
            problems.insert(Problem::new(
                name,
                format_args!(
                    "cannot be read: {error}; its last good version, if there was one, stays in force"
                ),
            ));
        }
        self.problems = problems;
        if let Role::Agent { node } = &self.role {
            let node = node.clone();
            self.settle_agent(&node);
        }
    }

    /// After changes: what an agent of a node needs now.
    fn settle_agent(&mut self, node: &str) {
        if !self.openshift && self.view.objects.namespaces.contains_key(OPENSHIFT_DNS) {
            self.openshift = true;
            let service =
                Scope::all(Kind::Service).within(OPENSHIFT_DNS).with("metadata.name=dns-default".to_owned());
            let pods = Scope::all(Kind::Pod).within(OPENSHIFT_DNS);
            self.start(service, false);
            self.start(pods.labelled("dns.operator.openshift.io/daemonset-dns=default"), false);
        }
        let own = self.view.objects.nodes.get(node);
        let label = own.filter(|n| n.metadata.labels.contains_key(EGRESS_ASSIGNABLE));
        let uid = label.map(|n| n.metadata.uid.clone());
        let assignable = uid.is_some();
        self.heartbeat.send_if_modified(|wanted| {
            let differs = *wanted != uid;
            *wanted = uid;
            differs
        });
        self.send_status();
        self.settle_firewalls(node);
        // Who uses which ports of an address concerns who holds it or may; all others have their own in their EgressNode.
        if let Some(index) = self.watch_of(Kind::EgressAllocation) {
            let o = &self.view.objects;
            let whole = o.egress_allocations.values().map(|a| (a.spec.owner.as_str(), &a.spec.standbys));
            let checked = o.checked_allocations.values();
            let checked = checked.map(|(_, a)| (a.owner.as_deref().unwrap_or_default(), &a.standbys));
            let named = whole
                .chain(checked)
                .any(|(owner, standbys)| owner == node || standbys.iter().any(|s| s == node));
            let watch = &self.watches[index];
            match (&watch.task, assignable || named) {
                (None, true) => self.run(index),
                // Only a whole list tells that it is not named.
                (Some(_), false) if watch.set.complete() => self.stop(index),
                _ => {}
            }
        }
    }

    /// Gets the firewalls of an agent's own pods. Until one is there, nothing that it could be about is let through.
    fn settle_firewalls(&mut self, node: &str) {
        let namespaces = own_namespaces(&self.view.objects, node);
        let errands = self.firewalls.errands(&namespaces);
        for key in &errands.drop {
            self.view.remove(Kind::EgressFirewall, key);
        }
        for key in &errands.get {
            let unread = || EgressFirewall {
                metadata: Meta { name: key.1.clone(), namespace: key.0.clone(), ..Meta::default() },
                spec: Spec::unread(),
            };
            self.view.objects.egress_firewalls.entry(key.clone()).or_insert_with(unread);
            self.firewalls.fetch(key, &self.connection, &self.got_sender, &self.noter);
        }
    }

    /// Takes up a firewall that was got.
    fn got(&mut self, (_, object): Got) -> bool {
        let seen = read(Kind::EgressFirewall, object, self.view.own());
        self.firewalls.got(&seen);
        self.view.put(Kind::EgressFirewall, seen)
    }

    fn note(&mut self, note: Note) -> bool {
        match note.problem {
            Some(problem) => {
                let noted = (problem, note.away);
                self.noted.insert(note.about, noted.clone()) != Some(noted)
            }
            None => self.noted.remove(note.about).is_some(),
        }
    }

    /// Has an agent's status written, while there is a Node: else the leader would remove it, again and again.
    fn send_status(&mut self) {
        if let Role::Agent { node } = &self.role
            && self.unsent
            && self.view.objects.nodes.contains_key(node)
        {
            self.unsent = false;
            self.status.send_replace(self.view.said.clone());
        }
    }

    /// Whether this process is the leader by its own clock: it wrote the time in the Lease, and has not waited longer than
    /// that is good for.
    fn holds_lease(&self) -> bool {
        let Some(election) = &self.election else { return false };
        self.view.leader.as_ref().is_some_and(|l| l.is_valid(&election.identity, jiff::Timestamp::now()))
    }

    fn watch_of(&mut self, kind: Kind) -> Option<usize> {
        self.watches.iter().position(|w| w.scope.kind == kind)
    }

    /// UID and version of an object that is known.
    fn head(&self, kind: Kind, namespace: &str, name: &str) -> Option<(String, Option<u64>)> {
        let key = (namespace.to_owned(), name.to_owned());
        let watch = self.watches.iter().find(|w| w.scope.kind == kind)?;
        watch.set.head(&key).map(|(uid, version)| (uid.to_owned(), version))
    }

    /// Takes up an object that a request has brought.
    fn absorb(&mut self, kind: Kind, object: DynamicObject) {
        if let Some(index) = self.watch_of(kind)
            && let Some(Step::Put(seen)) =
                self.watches[index].set.written(read(kind, object, self.view.own()))
        {
            self.view.put(kind, *seen);
        }
    }

    fn forget(&mut self, kind: Kind, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        if let Some(index) = self.watch_of(kind)
            && self.watches[index].set.remove(&key).is_some()
        {
            self.view.remove(kind, &key);
        }
    }

    /// Takes up what has come of a write.
    async fn conclude(
        &mut self,
        verb: &str,
        kind: Kind,
        namespace: &str,
        name: &str,
        outcome: Outcome,
    ) -> Result<(), Error> {
        let about =
            ObjectName { kind: name_of(kind), namespace: namespace.to_owned(), name: name.to_owned() };
        match outcome {
            Ok(Done::Now(object)) => self.absorb(kind, *object),
            Ok(Done::Removed) => self.forget(kind, namespace, name),
            Ok(Done::NotFound) => {}
            Err(Trouble::Conflict) => {
                // What is there now is what the next plan is made from, whether or not the watch has come to it.
                let place = if kind == Kind::Cluster { self.namespace.clone() } else { namespace.to_owned() };
                match self.writer.get(kind, &place, name).await {
                    Ok(Done::Now(object)) => self.absorb(kind, *object),
                    Ok(Done::Removed | Done::NotFound) => {}
                    Err(trouble) => {
                        let text =
                            trouble::request(&trouble, &about.to_string(), "get", kind, &self.connection);
                        return Err(Error::Write(text));
                    }
                }
                return Err(Error::Conflict(about.to_string()));
            }
            Err(trouble) => {
                return Err(Error::Write(trouble::request(
                    &trouble,
                    &about.to_string(),
                    verb,
                    kind,
                    &self.connection,
                )));
            }
        }
        Ok(())
    }
}

/// What is watched, and whether nothing is complete without it.
fn scopes(role: &Role, namespace: &str) -> Vec<(Scope, bool)> {
    let cluster =
        Scope::all(Kind::Cluster).within(namespace).with(format!("metadata.name={}", write::CLUSTER));
    let mut scopes = vec![
        (Scope::all(Kind::EgressNode), true),
        (Scope::all(Kind::EgressIp), true),
        (Scope::all(Kind::EgressConfig), true),
        (Scope::all(Kind::EgressAllocation), true),
        (cluster, true),
    ];
    let heartbeats = Scope::all(Kind::Heartbeat).within(namespace).labelled(heartbeat::LABEL);
    match role {
        Role::Agent { node } => {
            scopes.push((Scope::all(Kind::Node).with(format!("metadata.name={node}")), true));
            scopes.push((Scope::all(Kind::Pod).with(format!("spec.nodeName={node}")), true));
            scopes.push((Scope::all(Kind::Namespace).metadata(), true));
            scopes.push((Scope::all(Kind::EgressFirewall).metadata(), true));
            // The cluster's own DNS: without it names are not learnt, and all else works.
            let dns = "k8s-app=kube-dns";
            scopes.push((Scope::all(Kind::Service).within("kube-system").labelled(dns), false));
            scopes.push((Scope::all(Kind::Pod).within("kube-system").labelled(dns), false));
        }
        Role::Controller => {
            scopes.push((Scope::all(Kind::Node), true));
            scopes.push((Scope::all(Kind::EgressFirewall), true));
            scopes.push((heartbeats, true));
            let lease =
                Scope::all(Kind::Leader).within(namespace).with(format!("metadata.name={}", election::LEASE));
            scopes.push((lease, true));
        }
        Role::Command => {
            scopes.push((Scope::all(Kind::Node), true));
            scopes.push((Scope::all(Kind::EgressFirewall), true));
        }
    }
    scopes
}

/// Namespaces that have pods on a node.
fn own_namespaces<'a>(objects: &'a Objects, node: &str) -> BTreeSet<&'a str> {
    objects
        .pods
        .values()
        .filter(|p| p.spec.node_name == node)
        .map(|p| p.metadata.namespace.as_str())
        .collect()
}

/// A server that cannot be reached is one problem, however many watches there are: that which has it longest.
fn one_of_each_server(problems: &mut BTreeSet<Problem>) {
    let mut seen = BTreeSet::new();
    problems.retain(|p| !p.about.starts_with(SERVER) || seen.insert(p.about.clone()));
}

fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Node => "Node",
        Kind::Namespace => "Namespace",
        Kind::Pod => "Pod",
        Kind::Service => "Service",
        Kind::EgressIp => "EgressIP",
        Kind::EgressFirewall => "EgressFirewall",
        Kind::EgressConfig => "EgressConfig",
        Kind::EgressNode => "EgressNode",
        Kind::EgressAllocation => "EgressAllocation",
        Kind::Heartbeat | Kind::Leader => "Lease",
        Kind::Cluster => "ConfigMap",
    }
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

impl Source for KubeSource {
    type Error = Error;

    async fn changed(&mut self) -> Result<(), Error> {
        loop {
            let due = self.due;
            let news = tokio::select! {
                message = self.messages.recv() => message.is_some_and(|m| self.take(m)),
                got = self.got.recv() => got.is_some_and(|g| self.got(g)),
                note = self.notes.recv() => note.is_some_and(|n| self.note(n)),
                () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                    self.due = None;
                    self.settle();
                    return Ok(());
                }
            };
            if news {
                // Not later than already planned, so that steady news cannot put it off.
                self.due.get_or_insert_with(|| Instant::now() + DEBOUNCE);
            }
        }
    }

    fn objects(&self) -> &Objects {
        &self.view.objects
    }

    fn statuses(&self) -> &BTreeMap<String, EgressIpReport> {
        &self.view.statuses
    }

    fn firewall_statuses(&self) -> &BTreeMap<String, EgressFirewallReport> {
        &self.view.firewall_statuses
    }

    fn is_alive(&self, node: &str) -> bool {
        self.role != Role::Controller || self.judge.is_alive(node)
    }

    fn unreadable_allocations(&self) -> &BTreeSet<String> {
        &self.view.unreadable
    }

    fn place(&self, _object: &str) -> Option<&str> {
        None
    }

    fn complete(&self) -> bool {
        // Which addresses an EgressIP has that never could be read, nobody knows.
        self.is_known() && self.view.partial.is_empty()
    }

    fn problems(&self) -> &BTreeSet<Problem> {
        &self.problems
    }

    fn stale(&self) -> Option<&Problem> {
        self.stale.as_ref()
    }

    fn lead(&mut self) -> Result<bool, Error> {
        let Some(election) = &mut self.election else { return Ok(false) };
        let elected = *election.leads.borrow();
        let newly = elected && !election.elected;
        election.elected = elected;
        if newly {
            info!("elected; everything is listed anew before anything is decided");
            self.restart();
        }
        let listed = self.watches.iter().all(|w| !w.required || w.set.is_listed());
        Ok(elected && listed && self.holds_lease())
    }

    fn is_conflict(error: &Error) -> bool {
        matches!(error, Error::Conflict(_))
    }

    async fn write(&mut self, write: Write) -> Result<(), Error> {
        match write {
            Write::EgressNode(node) => {
                self.view.say(node.status);
                self.unsent = true;
                self.send_status();
                Ok(())
            }
            Write::Event(event) => {
                let uid = self.uid_of(&event.about);
                // Full: news that nobody could read anyway.
                let _ = self.events.try_send((event, uid));
                Ok(())
            }
            _ if !self.holds_lease() => Err(Error::NotLeader),
            Write::NodeSpec(name, spec) => {
                let old = self.head(Kind::EgressNode, "", &name).and_then(|(_, version)| version);
                let outcome = self.writer.node_spec(&name, &spec, old).await;
                self.conclude("patch", Kind::EgressNode, "", &name, outcome).await
            }
            Write::RemoveEgressNode(name) => self.remove(Kind::EgressNode, &name).await,
            Write::Allocation(new) => {
                let name = new.metadata.name.clone();
                self.rob_nobody(&new).await?;
                let outcome = self.writer.allocation(&new, self.view.originals.get(&name)).await;
                self.conclude("update", Kind::EgressAllocation, "", &name, outcome).await
            }
            Write::RemoveAllocation(name) => self.remove(Kind::EgressAllocation, &name).await,
            Write::Status(report) => {
                let name = report.metadata.name.clone();
                let Some((uid, _)) = self.head(Kind::EgressIp, "", &name) else { return Ok(()) };
                let outcome = self.writer.status(Kind::EgressIp, "", &name, &uid, &report.status).await;
                self.conclude("patch", Kind::EgressIp, "", &name, outcome).await?;
                self.view.wrote(report);
                Ok(())
            }
            Write::FirewallStatus(report) => {
                let (namespace, name) = (report.metadata.namespace.clone(), report.metadata.name.clone());
                let Some((uid, _)) = self.head(Kind::EgressFirewall, &namespace, &name) else {
                    return Ok(());
                };
                let outcome =
                    self.writer.status(Kind::EgressFirewall, &namespace, &name, &uid, &report.status).await;
                self.conclude("patch", Kind::EgressFirewall, &namespace, &name, outcome).await?;
                self.view.wrote_firewall(report);
                Ok(())
            }
            // With its object it is gone.
            Write::RemoveStatus(name) => {
                self.view.statuses.remove(&name);
                Ok(())
            }
            Write::RemoveFirewallStatus(namespace) => {
                self.view.firewall_statuses.remove(&namespace);
                Ok(())
            }
            Write::Cluster(cluster) => {
                let namespace = self.namespace.clone();
                let old =
                    self.head(Kind::Cluster, &namespace, write::CLUSTER).and_then(|(_, version)| version);
                let outcome = self.writer.cluster(&cluster, old).await;
                self.conclude("create or patch", Kind::Cluster, &namespace, write::CLUSTER, outcome).await
            }
        }
    }
}

impl KubeSource {
    /// Refuses an allocation that takes ports from a node which has not given them back and which is there, whatever
    /// the watch of Nodes says.
    async fn rob_nobody(&mut self, new: &EgressAllocation) -> Result<(), Error> {
        let objects = &self.view.objects;
        let Some(old) = objects.egress_allocations.get(&new.metadata.name) else { return Ok(()) };
        let fenced = fence::fenced(old, new, &objects.egress_nodes);
        let about = |name: &str| {
            ObjectName { kind: "Node", namespace: String::new(), name: name.to_owned() }.to_string()
        };
        match fence::living(&self.writer, &fenced).await {
            Ok(None) => Ok(()),
            Ok(Some(node)) => {
                let about = about(node.metadata.name.as_deref().unwrap_or_default());
                // The next plan knows it, whether or not the watch has come to it.
                self.absorb(Kind::Node, node);
                Err(Error::Conflict(about))
            }
            Err((name, trouble)) => Err(Error::Write(trouble::request(
                &trouble,
                &about(&name),
                "get",
                Kind::Node,
                &self.connection,
            ))),
        }
    }

    async fn remove(&mut self, kind: Kind, name: &str) -> Result<(), Error> {
        let Some((uid, version)) = self.head(kind, "", name) else { return Ok(()) };
        let outcome = self.writer.remove(kind, name, &uid, version).await;
        self.conclude("delete", kind, "", name, outcome).await
    }

    fn uid_of(&self, about: &ObjectName) -> String {
        let kind = [
            Kind::EgressIp,
            Kind::EgressFirewall,
            Kind::EgressNode,
            Kind::EgressAllocation,
            Kind::EgressConfig,
            Kind::Node,
        ]
        .into_iter()
        .find(|k| name_of(*k) == about.kind);
        kind.and_then(|k| self.head(k, &about.namespace, &about.name)).map(|(uid, _)| uid).unwrap_or_default()
    }
}
