//! Names of egress firewalls: the agent's part of learning which addresses they stand for. The kernel programs read
//! answers over UDP by themselves; the agent reads those over TCP, looks every name up at its TTL, so that rules know
//! addresses that a pod has from elsewhere, and keeps what is learnt within its bounds. All that it learns it has the
//! program `credit` enter.

pub mod answer;
pub mod client;
pub mod learnt;
pub mod lookups;
pub mod resolv_conf;
pub mod resolvers;
pub mod stream;
pub mod wire;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use datapath::conntrack::Ticks;
use datapath::keys::{Credit, FirewallId, HeldKey, Learnt, LearntKey, NameId, NameKey, PodId, Segment};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tracing::{debug, warn};

use crate::image::MapImage;
use crate::model;
use crate::watch::Problem;
use answer::Answer;
use client::Client;
use learnt::{Events, Ledger};
use lookups::{Lookups, Outcome, Place, Question};
use resolv_conf::ResolvConf;
use stream::Streams;
use wire::Wire;

/// How often what is learnt, and resolv.conf, are looked at.
const TICK: Duration = Duration::from_secs(5);
/// What is learnt is looked at without a reason after so many of them: time passes.
const TICKS: u32 = 12;
/// Where resolvers are asked.
const PORT: u16 = 53;
/// Resolvers that are asked out of those that pods have: a cluster may have one a node.
const PODS_RESOLVERS: usize = 4;
/// Resolvers of resolv.conf that are asked besides (`MAXNS`, resolv.conf(5)).
const NODES_RESOLVERS: usize = 3;
/// Names whose problems are told one by one.
const PROBLEMS: usize = 50;

/// The kernel side, as names need it.
pub trait Door {
    /// Waits for segments of answers over TCP, as `SEGMENTS` has them. May be cancelled, and nothing is lost.
    fn segments(&mut self) -> impl Future<Output = io::Result<Vec<(Segment, Vec<u8>)>>>;
    /// Enters addresses for names, or takes them out.
    fn credit(&self, credits: &[Credit]) -> io::Result<()>;
    /// Lets a segment pass of which so many bytes are read.
    fn mark_read(&mut self, held: &HeldKey, bytes: u32) -> io::Result<()>;
    /// Lets all of a segment's connection pass up to a sequence number.
    fn mark_read_to(&mut self, held: &HeldKey, seq: u32) -> io::Result<()>;
    /// All that is learnt.
    fn learnt(&self) -> io::Result<Vec<(LearntKey, Learnt)>>;
    /// Counters of what happened to names.
    fn events(&self) -> io::Result<Events>;
    /// The programs' clock.
    fn now(&self) -> Ticks;
}

/// What names tell about themselves, for metrics.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Numbers {
    /// Names that are looked up.
    pub names: usize,
    /// Look-ups that found addresses, since the start; one a family.
    pub found: u64,
    /// Look-ups that found that there is no such name or address.
    pub not_found: u64,
    /// Look-ups that told nothing.
    pub failed: u64,
    /// Addresses that are learnt.
    pub learnt: learnt::Numbers,
    /// Answers over TCP.
    pub tcp: stream::Counts,
}

/// The work on names, for as long as this lives.
#[derive(Debug)]
pub struct Names {
    wanted: watch::Sender<Wanted>,
    said: Rc<RefCell<Said>>,
    task: JoinHandle<()>,
}

/// What is asked of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Wanted {
    /// `NAMES`.
    names: Rc<BTreeMap<NameKey, NameId>>,
    /// Pods with a firewall.
    pods: BTreeSet<PodId>,
    /// Resolvers that pods have.
    resolvers: BTreeSet<IpAddr>,
}

/// What it says.
#[derive(Debug, Default)]
struct Said {
    numbers: Numbers,
    nameservers: Vec<IpAddr>,
    troubles: BTreeMap<String, String>,
    news: bool,
}

impl Names {
    /// Begins the work. Call it in a `LocalSet`. The seed makes this node's look-ups differ from others'.
    #[must_use]
    pub fn start(door: impl Door + 'static, conf: ResolvConf, seed: u64) -> Self {
        let (wanted, receiver) = watch::channel(Wanted::default());
        let said =
            Rc::new(RefCell::new(Said { nameservers: conf.nameservers().to_vec(), ..Said::default() }));
        let work = Work {
            door,
            conf,
            seed,
            wanted: receiver,
            said: Rc::clone(&said),
            names: Rc::default(),
            pods: BTreeSet::new(),
            client: Rc::new(Client::new(Vec::new())),
            lookups: Lookups::new(seed),
            asking: JoinSet::new(),
            streams: Streams::default(),
            ledger: Ledger::default(),
            ticks: 0,
            failed: false,
        };
        Self { wanted, said, task: tokio::task::spawn_local(work.run()) }
    }

    /// Takes up an image that is in force, and the resolvers that pods have.
    pub fn update(&self, image: &MapImage, config: &model::Config) {
        let pods = image.pods.values().filter(|pod| pod.firewall != 0).map(|pod| pod.id).collect();
        self.wanted.send_if_modified(|wanted| {
            let same =
                *wanted.names == image.names && wanted.pods == pods && wanted.resolvers == config.resolvers;
            if *wanted.names != image.names {
                wanted.names = Rc::new(image.names.clone());
            }
            wanted.pods = pods;
            wanted.resolvers.clone_from(&config.resolvers);
            !same
        });
    }

    /// The nameservers of the node's resolv.conf, as last read.
    #[must_use]
    pub fn nameservers(&self) -> Vec<IpAddr> {
        self.said.borrow().nameservers.clone()
    }

    /// Whether nameservers or problems may have changed since this was last asked.
    pub fn take_news(&self) -> bool {
        std::mem::take(&mut self.said.borrow_mut().news)
    }

    /// Names that cannot be looked up, or do not exist.
    #[must_use]
    pub fn problems(&self) -> BTreeSet<Problem> {
        let troubles = &self.said.borrow().troubles;
        let mut problems: BTreeSet<_> = troubles
            .iter()
            .take(PROBLEMS)
            .map(|(name, trouble)| Problem::new(format_args!("name {name}"), trouble))
            .collect();
        if troubles.len() > PROBLEMS {
            let more = format!("{} more are not found", troubles.len() - PROBLEMS);
            problems.insert(Problem::new("names of egress firewalls", more));
        }
        problems
    }

    /// What is wrong with a name, as it is looked up (without `*.`, without a dot at the end).
    #[must_use]
    pub fn trouble(&self, name: &str) -> Option<String> {
        self.said.borrow().troubles.get(name).cloned()
    }

    /// Numbers for metrics.
    #[must_use]
    pub fn numbers(&self) -> Numbers {
        self.said.borrow().numbers.clone()
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The task.
struct Work<D> {
    door: D,
    conf: ResolvConf,
    seed: u64,
    wanted: watch::Receiver<Wanted>,
    said: Rc<RefCell<Said>>,
    names: Rc<BTreeMap<NameKey, NameId>>,
    pods: BTreeSet<PodId>,
    client: Rc<Client>,
    lookups: Lookups,
    asking: JoinSet<(Question, Outcome)>,
    streams: Streams,
    ledger: Ledger,
    ticks: u32,
    /// The kernel side has failed, which has been said.
    failed: bool,
}

impl<D: Door> Work<D> {
    async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut deaf = false;
        loop {
            let wake = self.lookups.wake();
            tokio::select! {
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return; // nobody wants anything any more
                    }
                    self.take_up();
                }
                segments = self.door.segments(), if !deaf => match segments {
                    Ok(segments) => segments.iter().for_each(|(segment, bytes)| self.read(segment, bytes)),
                    Err(error) => {
                        warn!("answers over TCP pass late from now on, they cannot be read: {error}");
                        deaf = true;
                    }
                },
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => self.ask(),
                Some(ended) = self.asking.join_next() => {
                    // It neither panics nor is cancelled; a question that did would stay under way.
                    if let Ok((question, outcome)) = ended {
                        self.answered(question, outcome);
                    }
                }
                _ = tick.tick() => self.tick(),
            }
        }
    }

    /// Takes up what is wanted now.
    fn take_up(&mut self) {
        let wanted = self.wanted.borrow_and_update().clone();
        let now = Instant::now();
        if !Rc::ptr_eq(&self.names, &wanted.names) {
            self.lookups.set(&exact(&wanted.names), now);
            self.names = wanted.names;
        }
        self.pods = wanted.pods;
        self.choose_servers(&wanted.resolvers, now);
        self.report();
    }

    fn choose_servers(&mut self, resolvers: &BTreeSet<IpAddr>, now: Instant) {
        let servers = servers(resolvers, self.conf.nameservers(), self.seed);
        if servers != self.client.servers() {
            debug!("names are asked of {servers:?}");
            self.client = Rc::new(Client::new(servers));
            self.lookups.ask_anew(now);
        }
    }

    fn ask(&mut self) {
        while let Some(question) = self.lookups.next(Instant::now()) {
            let client = Rc::clone(&self.client);
            self.asking.spawn_local(async move {
                let outcome = client.look_up(&question).await;
                (question, outcome)
            });
        }
    }

    fn answered(&mut self, question: Question, outcome: Outcome) {
        debug!("name {} ({}): {outcome:?}", question.name, question.family.kind());
        {
            let numbers = &mut self.said.borrow_mut().numbers;
            *match outcome {
                Outcome::Found(_) => &mut numbers.found,
                Outcome::NoName | Outcome::NoAddress(_) => &mut numbers.not_found,
                Outcome::Failed(_) => &mut numbers.failed,
            } += 1;
        }
        let credits = self.lookups.done(question, outcome, Instant::now());
        let result = self.door.credit(&credits);
        self.say(result);
    }

    /// Reads a segment of an answer over TCP. It passes when all that is whole with it is in the maps.
    fn read(&mut self, segment: &Segment, bytes: &[u8]) {
        let taken = self.streams.take(segment, bytes, Instant::now());
        let credits: Vec<_> = taken
            .messages
            .iter()
            .filter_map(|message| answer::read(message))
            .flat_map(|answer| credits(&answer, segment.firewall, &self.names))
            .collect();
        let result = self.door.credit(&credits).and_then(|()| {
            taken.read.map_or(Ok(()), |(held, bytes)| self.door.mark_read(&held, bytes))?;
            taken.read_to.map_or(Ok(()), |seq| self.door.mark_read_to(&segment.held, seq))
        });
        self.say(result);
    }

    fn tick(&mut self) {
        if self.conf.reread() {
            let mut said = self.said.borrow_mut();
            said.nameservers = self.conf.nameservers().to_vec();
            said.news = true;
            drop(said);
            let resolvers = self.wanted.borrow().resolvers.clone();
            self.choose_servers(&resolvers, Instant::now());
        }
        let pods = &self.pods;
        self.streams.forget(Instant::now(), |pod| pods.contains(&pod));
        let result = self.look();
        self.say(result);
        self.report();
    }

    /// Looks at what is learnt, and takes out what is too much.
    fn look(&mut self) -> io::Result<()> {
        self.ticks += 1;
        let events = self.door.events()?;
        if self.ledger.is_stale(&events) || self.ticks >= TICKS {
            self.ticks = 0;
            let forget = self.ledger.look(&self.door.learnt()?, &events, self.door.now());
            self.door.credit(&forget)?;
        }
        Ok(())
    }

    /// Says it when the kernel side begins to fail.
    fn say(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.failed = false,
            Err(error) if self.failed => debug!("names: {error}"),
            Err(error) => {
                self.failed = true;
                warn!("addresses of names cannot be entered: {error}");
            }
        }
    }

    fn report(&mut self) {
        let mut said = self.said.borrow_mut();
        said.numbers.names = self.lookups.names();
        said.numbers.learnt = self.ledger.numbers();
        said.numbers.tcp = self.streams.counts();
        if self.lookups.take_news() {
            let troubles = self.lookups.troubles().into_iter();
            let troubles = troubles.map(|(name, trouble)| (name.to_string(), trouble)).collect();
            said.news |= said.troubles != troubles;
            said.troubles = troubles;
        }
    }
}

/// The names that are looked up, and for whom: all but wildcards.
fn exact(names: &BTreeMap<NameKey, NameId>) -> BTreeMap<Wire, BTreeSet<Place>> {
    let mut wanted: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (key, name) in names.iter().filter(|(key, _)| key.wildcard == 0) {
        wanted.entry(Wire::of_key(key)).or_default().insert((key.firewall, *name));
    }
    wanted
}

/// Whom to ask: some of the resolvers that pods have, each node others, then those of the node.
fn servers(resolvers: &BTreeSet<IpAddr>, nameservers: &[IpAddr], seed: u64) -> Vec<SocketAddr> {
    let first = usize::try_from(seed).unwrap_or(0).checked_rem(resolvers.len()).unwrap_or(0);
    let pods = resolvers.iter().cycle().skip(first).take(resolvers.len().min(PODS_RESOLVERS));
    let mut servers: Vec<SocketAddr> = Vec::new();
    for ip in pods.chain(nameservers.iter().take(NODES_RESOLVERS)) {
        let server = SocketAddr::new(*ip, PORT);
        if !servers.contains(&server) {
            servers.push(server);
        }
    }
    servers
}

/// What an answer to a pod tells: the addresses of the name that it asked for, if its firewall has rules for that name or
/// for all names of its kind.
fn credits(answer: &Answer, firewall: FirewallId, names: &BTreeMap<NameKey, NameId>) -> Vec<Credit> {
    if !answer.has_addresses() {
        return Vec::new();
    }
    let exact = Some(answer.name.key(firewall, false));
    let wildcard = answer.name.parent().map(|parent| parent.key(firewall, true));
    let found: Vec<NameId> =
        [exact, wildcard].iter().flatten().filter_map(|key| names.get(key)).copied().collect();
    if found.is_empty() {
        return Vec::new();
    }
    let addresses = answer.chain().addresses;
    let credit = |name: NameId, (ip, ttl): &(_, u32)| Credit {
        key: LearntKey { firewall, ip: *ip },
        name,
        ttl: *ttl,
        action: Credit::ENTER,
    };
    found.into_iter().flat_map(|name| addresses.iter().map(move |address| credit(name, address))).collect()
}
