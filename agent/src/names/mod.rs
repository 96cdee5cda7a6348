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
use crate::watch::Problem;
use answer::Answer;
use client::Client;
use learnt::{Events, Ledger};
use lookups::{Lookups, Outcome, Place, Question};
use stream::Streams;
use wire::Wire;

/// How often what is learnt is looked at.
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
    seed: u64,
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
    /// Whom to ask.
    servers: Vec<SocketAddr>,
}

/// What it says.
#[derive(Debug, Default)]
struct Said {
    numbers: Numbers,
    troubles: BTreeMap<String, String>,
    news: bool,
}

impl Names {
    /// Begins the work. Call it in a `LocalSet`. The seed makes this node's look-ups differ from others'.
    #[must_use]
    pub fn start(door: impl Door + 'static, seed: u64) -> Self {
        let (wanted, receiver) = watch::channel(Wanted::default());
        let said = Rc::default();
        let work = Work {
            door,
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
        Self { seed, wanted, said, task: tokio::task::spawn_local(work.run()) }
    }

    /// Takes up an image that is in force, the resolvers that pods have, and the nameservers of the node.
    pub fn update(&self, image: &MapImage, resolvers: &BTreeSet<IpAddr>, nameservers: &[IpAddr]) {
        let pods = image.pods.values().filter(|pod| pod.firewall != 0).map(|pod| pod.id).collect();
        let servers = servers(resolvers, nameservers, self.seed);
        self.wanted.send_if_modified(|wanted| {
            let other_names = *wanted.names != image.names;
            if other_names {
                wanted.names = Rc::new(image.names.clone());
            }
            let other = wanted.pods != pods || wanted.servers != servers;
            (wanted.pods, wanted.servers) = (pods, servers);
            other_names || other
        });
    }

    /// Whether problems may have changed since this was last asked.
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
        if wanted.servers != self.client.servers() {
            debug!("names are asked of {:?}", wanted.servers);
            self.client = Rc::new(Client::new(wanted.servers));
            self.lookups.ask_anew(now);
        }
        self.report();
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

#[cfg(test)]
mod tests {
    use datapath::addr::Ip;
    use datapath::keys::{NameEvent, Pod};
    use datapath::packet::SYN;
    use hickory_proto::op::{Message, MessageType, OpCode, Query};
    use hickory_proto::rr::rdata::{A, CNAME};
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use tokio::sync::mpsc;
    use tokio::task::LocalSet;

    use super::*;

    const POD: PodId = 7;
    const FIREWALL: FirewallId = 3;
    /// The port of a stream whose beginning was not seen.
    const UNKNOWN: u16 = 4001;

    fn name(text: &str) -> Name {
        Name::from_ascii(format!("{text}.")).unwrap()
    }

    fn wire(text: &str) -> Wire {
        Wire::of(&name(text))
    }

    fn answer_to(kind: RecordType, asked: &str, records: &[(&str, RData)]) -> Vec<u8> {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        message.add_query(Query::query(name(asked), kind));
        message.add_answers(
            records.iter().map(|(owner, data)| Record::from_rdata(name(owner), 60, data.clone())),
        );
        message.to_vec().unwrap()
    }

    fn a(last: u8) -> RData {
        RData::A(A::new(192, 0, 2, last))
    }

    fn names() -> BTreeMap<NameKey, NameId> {
        [
            (wire("www.example.com").key(FIREWALL, false), 1),
            (wire("example.com").key(FIREWALL, true), 2),
            (wire("example.com").key(FIREWALL + 1, true), 3),
            (wire("example.com").key(FIREWALL + 1, false), 4),
            (wire("www.example.com").key(FIREWALL + 1, false), 5),
        ]
        .into()
    }

    fn credited(message: &[u8], firewall: FirewallId) -> Vec<(NameId, Ip)> {
        let found = credits(&answer::read(message).unwrap(), firewall, &names());
        assert!(found.iter().all(|c| c.key.firewall == firewall && c.ttl == 60 && c.action == Credit::ENTER));
        found.iter().map(|c| (c.name, c.key.ip)).collect()
    }

    fn v4(last: u8) -> Ip {
        Ip::v4([192, 0, 2, last])
    }

    #[test]
    fn an_answer_counts_for_its_name_and_for_its_kind() {
        let www = answer_to(
            RecordType::A,
            "WWW.Example.com",
            &[("www.example.com", a(1)), ("www.example.com", a(2))],
        );
        assert_eq!(credited(&www, FIREWALL), [(1, v4(1)), (1, v4(2)), (2, v4(1)), (2, v4(2))]);
        assert_eq!(credited(&www, FIREWALL + 1), [(5, v4(1)), (5, v4(2)), (3, v4(1)), (3, v4(2))]);
        assert_eq!(credited(&www, FIREWALL + 2), []);
        // One label more, and no other number of them.
        assert_eq!(
            credited(&answer_to(RecordType::A, "a.b.example.com", &[("a.b.example.com", a(1))]), FIREWALL),
            []
        );
        assert_eq!(
            credited(&answer_to(RecordType::A, "example.com", &[("example.com", a(1))]), FIREWALL),
            []
        );
        assert_eq!(
            credited(&answer_to(RecordType::A, "x.example.com", &[("x.example.com", a(1))]), FIREWALL),
            [(2, v4(1))]
        );
    }

    #[test]
    fn the_name_that_was_asked_for_counts_not_the_one_at_the_end() {
        let to_www =
            [("evil.test", RData::CNAME(CNAME(name("www.example.com")))), ("www.example.com", a(66))];
        assert_eq!(credited(&answer_to(RecordType::A, "evil.test", &to_www), FIREWALL), []);
        let from_www = [
            ("www.example.com", RData::CNAME(CNAME(name("cdn.test")))),
            ("cdn.test", a(1)),
            ("b.test", a(66)),
        ];
        assert_eq!(
            credited(&answer_to(RecordType::ANY, "www.example.com", &from_www), FIREWALL),
            [(1, v4(1)), (2, v4(1))]
        );
        assert_eq!(credited(&answer_to(RecordType::MX, "www.example.com", &from_www), FIREWALL), []);
    }

    #[test]
    fn wildcards_are_not_looked_up() {
        let places = |places: &[Place]| places.iter().copied().collect();
        let expected = [
            (wire("example.com"), places(&[(FIREWALL + 1, 4)])),
            (wire("www.example.com"), places(&[(FIREWALL, 1), (FIREWALL + 1, 5)])),
        ];
        assert_eq!(exact(&names()), expected.into());
    }

    #[test]
    fn whom_to_ask() {
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let ask = |pods: &[&str], node: &[&str], seed| {
            let servers = servers(&ips(pods).into_iter().collect(), &ips(node), seed);
            assert!(servers.iter().all(|server| server.port() == 53));
            servers.into_iter().map(|server| server.ip().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(ask(&[], &["10.0.0.1", "10.0.0.2"], 5), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(
            ask(&["10.0.0.3", "10.0.0.1"], &["10.0.0.1", "10.0.0.2"], 0),
            ["10.0.0.1", "10.0.0.3", "10.0.0.2"]
        );
        let many = ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"];
        assert_eq!(
            ask(&many, &["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"], 5),
            ["10.1.0.6", "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.0.0.1", "10.0.0.2", "10.0.0.3"]
        );
        assert_eq!(ask(&[], &[], 5), [] as [&str; 0]);
    }

    /// What the kernel side was told, in order.
    #[derive(PartialEq, Eq, Debug)]
    enum Told {
        Credit(Vec<(NameId, Ip, u32)>),
        Read(HeldKey, u32),
        ReadTo(u32),
    }

    struct FakeDoor {
        segments: mpsc::UnboundedReceiver<(Segment, Vec<u8>)>,
        told: mpsc::UnboundedSender<Told>,
        learnt: Vec<(LearntKey, Learnt)>,
        broken: bool,
    }

    impl FakeDoor {
        fn tell(&self, told: Told) -> io::Result<()> {
            if self.broken && matches!(told, Told::Credit(_)) {
                return Err(io::Error::other("broken"));
            }
            self.told.send(told).map_err(io::Error::other)
        }
    }

    impl Door for FakeDoor {
        async fn segments(&mut self) -> io::Result<Vec<(Segment, Vec<u8>)>> {
            match self.segments.recv().await {
                Some(segment) => Ok(vec![segment]),
                None => std::future::pending().await,
            }
        }

        fn credit(&self, credits: &[Credit]) -> io::Result<()> {
            if credits.is_empty() {
                return Ok(());
            }
            self.tell(Told::Credit(credits.iter().map(|c| (c.name, c.key.ip, c.action)).collect()))
        }

        fn mark_read(&mut self, held: &HeldKey, bytes: u32) -> io::Result<()> {
            self.tell(Told::Read(*held, bytes))
        }

        fn mark_read_to(&mut self, _: &HeldKey, seq: u32) -> io::Result<()> {
            self.tell(Told::ReadTo(seq))
        }

        fn learnt(&self) -> io::Result<Vec<(LearntKey, Learnt)>> {
            Ok(self.learnt.clone())
        }

        fn events(&self) -> io::Result<Events> {
            Ok([(NameEvent::Learnt, 0)].into())
        }

        fn now(&self) -> Ticks {
            0
        }
    }

    struct Lab {
        names: Names,
        segments: mpsc::UnboundedSender<(Segment, Vec<u8>)>,
        told: mpsc::UnboundedReceiver<Told>,
    }

    impl Lab {
        /// Nobody can be asked for names here.
        fn new(learnt: Vec<(LearntKey, Learnt)>, broken: bool) -> Self {
            let (segments, receiver) = mpsc::unbounded_channel();
            let (sender, told) = mpsc::unbounded_channel();
            let door = FakeDoor { segments: receiver, told: sender, learnt, broken };
            Self { names: Names::start(door, 1), segments, told }
        }

        fn update(&self) {
            let pod = Pod { id: POD, firewall: FIREWALL, ..Pod::default() };
            let image = MapImage { names: names(), pods: [(v4(100), pod)].into(), ..MapImage::default() };
            self.names.update(&image, &BTreeSet::new(), &[]);
        }

        fn segment(&self, seq: u32, bytes: &[u8]) -> HeldKey {
            let held = HeldKey { pod: POD, resolver: v4(53), port: 4000, resolver_port: 53, seq };
            let len = bytes.len() as u32;
            let segment = Segment { held, firewall: FIREWALL, payload: len, len, ..Segment::default() };
            self.segments.send((segment, bytes.to_vec())).unwrap();
            held
        }

        fn begin(&self, seq: u32) {
            let held = HeldKey { pod: POD, resolver: v4(53), port: 4000, resolver_port: 53, seq };
            let segment = Segment { held, firewall: FIREWALL, flags: SYN.into(), ..Segment::default() };
            self.segments.send((segment, vec![])).unwrap();
        }

        /// A segment of a stream whose beginning was not seen.
        fn unknown_stream(&self) -> HeldKey {
            let held = HeldKey { pod: POD, resolver: v4(53), port: UNKNOWN, resolver_port: 53, seq: 1 };
            let segment = Segment { held, firewall: FIREWALL, payload: 1, len: 1, ..Segment::default() };
            self.segments.send((segment, vec![0])).unwrap();
            held
        }
    }

    #[tokio::test]
    async fn an_answer_is_in_the_maps_before_its_last_segment_may_pass() {
        let work = LocalSet::new();
        let work = work.run_until(async {
            let mut lab = Lab::new(vec![], false);
            lab.update();
            // It has taken the names up when it says that it cannot look them up.
            while lab.names.numbers().names == 0 {
                tokio::task::yield_now().await;
            }
            let message = answer_to(RecordType::A, "www.example.com", &[("www.example.com", a(1))]);
            let stream = [&(message.len() as u16).to_be_bytes()[..], &message].concat();
            lab.begin(1000);
            let first = lab.segment(1000, &stream[..20]);
            let last = lab.segment(1020, &stream[20..]);
            let unknown = lab.unknown_stream();
            let mut told = Vec::new();
            for _ in 0..6 {
                told.push(lab.told.recv().await.unwrap());
            }
            let expected = [
                Told::Read(first, 20),
                Told::ReadTo(1020),
                Told::Credit(vec![(1, v4(1), Credit::ENTER), (2, v4(1), Credit::ENTER)]),
                Told::Read(last, stream.len() as u32 - 20),
                Told::ReadTo(1000 + stream.len() as u32),
                Told::Read(unknown, 1),
            ];
            assert_eq!(told, expected);
        });
        work.await;
    }

    #[tokio::test]
    async fn what_could_not_be_entered_does_not_pass_as_read() {
        let work = LocalSet::new();
        let work = work.run_until(async {
            let mut lab = Lab::new(vec![], true);
            lab.update();
            while lab.names.numbers().names == 0 {
                tokio::task::yield_now().await;
            }
            let message = answer_to(RecordType::A, "www.example.com", &[("www.example.com", a(1))]);
            lab.begin(1000);
            lab.segment(1000, &[&(message.len() as u16).to_be_bytes()[..], &message].concat());
            lab.unknown_stream();
            // The work goes on; nothing was told of the answer.
            let told = lab.told.recv().await.unwrap();
            assert!(matches!(told, Told::Read(held, 1) if held.port == UNKNOWN), "{told:?}");
        });
        work.await;
    }

    #[tokio::test(start_paused = true)]
    async fn names_that_cannot_be_looked_up_are_told() {
        let work = LocalSet::new();
        let work = work.run_until(async {
            let lab = Lab::new(vec![], false);
            assert!(lab.names.problems().is_empty());
            lab.update();
            // Twice is trouble, and the clock runs as fast as nothing happens.
            while !lab.names.take_news() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            let problems: Vec<_> = lab.names.problems().iter().map(ToString::to_string).collect();
            let why = "cannot be looked up: there is no resolver to ask";
            assert_eq!(
                problems,
                [format!("name example.com: {why}"), format!("name www.example.com: {why}")]
            );
            assert_eq!(lab.names.trouble("example.com").as_deref(), Some(why));
            assert!(lab.names.numbers().failed >= 8);
            // Unwanted names are no trouble.
            lab.names.update(&MapImage::default(), &BTreeSet::new(), &[]);
            while !lab.names.take_news() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            assert!(lab.names.problems().is_empty());
            assert_eq!(lab.names.numbers().names, 0);
        });
        work.await;
    }

    #[tokio::test]
    async fn what_is_too_much_is_forgotten() {
        let work = LocalSet::new();
        let work = work.run_until(async {
            let learnt = (0..=datapath::limits::NAME_ADDRESSES as u32).map(|i| {
                let mut entry = Learnt::default();
                entry.names[0] = datapath::names::word(1, if i == 5 { 10 } else { 1000 });
                (LearntKey { firewall: FIREWALL, ip: Ip::v4(i.to_be_bytes()) }, entry)
            });
            let mut lab = Lab::new(learnt.collect(), false);
            assert_eq!(
                lab.told.recv().await,
                Some(Told::Credit(vec![(1, Ip::v4([0, 0, 0, 5]), Credit::FORGET)]))
            );
        });
        work.await;
    }
}
