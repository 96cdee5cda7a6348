//! The agent's door to names in this kernel: what it has the program `credit` enter is in the map, and what it reads
//! there is all of it.
#![expect(clippy::unwrap_used, reason = "a test, whose helpers clippy does not take for one")]

use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;
use std::path::PathBuf;

use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use datapath::addr::Ip;
use datapath::conntrack::Ticks;
use datapath::keys::{
    Credit, Held, HeldKey, Learnt, LearntKey, NameEvent, NameId, Pod, RESOLVER, Ruleset, Segment,
};
use datapath::names::until;
use datapath::packet::{ACK, SYN};
use lab::packet;
use outgate::bpf::{self, Datapath, maps};
use outgate::names::Door;
use outgate::names::stream::{Streams, Taken};

/// Maps of this test alone.
struct Pins(PathBuf);

impl Pins {
    fn new(name: &str) -> Self {
        Self(PathBuf::from(format!("/sys/fs/bpf/og{}-door-{name}", std::process::id())))
    }

    fn held(&self) -> BTreeMap<HeldKey, Held> {
        maps::read_map(&self.0, "HELD").unwrap()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        bpf::cleanup(&self.0).unwrap();
    }
}

fn credit(ip: Ip, name: NameId, ttl: u32, action: u32) -> Credit {
    Credit { key: LearntKey { firewall: 1, ip }, name, ttl, action }
}

/// What is learnt, by firewall's address and name: until when.
fn learnt(door: &impl Door) -> BTreeMap<(LearntKey, NameId), Ticks> {
    let mut found = BTreeMap::new();
    for (key, Learnt { names }) in door.learnt().unwrap() {
        for word in names.into_iter().filter(|word| *word != 0) {
            assert_eq!(found.insert((key, (word >> 32) as NameId), word as Ticks), None, "given twice");
        }
    }
    found
}

#[tokio::test]
async fn addresses_are_entered_and_forgotten() {
    let pins = Pins::new("credit");
    let mut datapath = Datapath::open(&pins.0).unwrap();
    let door = datapath.names().unwrap();
    let (v4, v6) = (Ip::v4([192, 0, 2, 1]), Ip { octets: [0x20; 16] });
    let before = door.now();
    door.credit(&[
        credit(v4, 5, 30, Credit::ENTER),
        credit(v6, 5, 300, Credit::ENTER),
        credit(v4, 6, 0, Credit::ENTER),
    ])
    .unwrap();
    let after = door.now();
    let found = learnt(&door);
    let expected = [(v4, 5, 30), (v4, 6, 0), (v6, 5, 300)];
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for (ip, name, ttl) in expected {
        let word = found[&(LearntKey { firewall: 1, ip }, name)];
        // The programs' clock is the agent's.
        assert!((until(before, ttl)..=until(after, ttl)).contains(&word), "{ip} {name}");
    }
    // Never shorter, and longer if it is longer.
    door.credit(&[credit(v6, 5, 10, Credit::ENTER), credit(v4, 5, 60, Credit::ENTER)]).unwrap();
    let (old, found) = (found, learnt(&door));
    assert_eq!(found[&(LearntKey { firewall: 1, ip: v6 }, 5)], old[&(LearntKey { firewall: 1, ip: v6 }, 5)]);
    assert!(found[&(LearntKey { firewall: 1, ip: v4 }, 5)] >= until(before, 60));
    let events = door.events().unwrap();
    assert_eq!((events[&NameEvent::Learnt], events[&NameEvent::Renewed]), (3, 1));
    door.credit(&[credit(v4, 5, 0, Credit::FORGET), credit(v4, 9, 0, Credit::FORGET)]).unwrap();
    let left: BTreeSet<_> = learnt(&door).into_keys().map(|(key, name)| (key.ip, name)).collect();
    assert_eq!(left, BTreeSet::from([(v4, 6), (v6, 5)]));
}

#[tokio::test]
async fn all_that_is_learnt_is_seen() {
    let pins = Pins::new("learnt");
    let mut datapath = Datapath::open(&pins.0).unwrap();
    let door = datapath.names().unwrap();
    assert_eq!(learnt(&door), BTreeMap::new());
    // More than one system call takes or gives.
    let credits: Vec<_> = (0..10_000_u32)
        .map(|i| credit(Ip::v4((0x0a00_0000 + i).to_be_bytes()), 1 + i % 7, 60, Credit::ENTER))
        .collect();
    door.credit(&credits).unwrap();
    let expected: BTreeSet<_> = credits.iter().map(|c| (c.key, c.name)).collect();
    assert!(learnt(&door).into_keys().eq(expected));
    assert_eq!(door.events().unwrap()[&NameEvent::Learnt], 10_000);
}

#[tokio::test]
async fn what_is_held_is_marked() {
    let pins = Pins::new("held");
    let mut datapath = Datapath::open(&pins.0).unwrap();
    let mut door = datapath.names().unwrap();
    let held = HeldKey { pod: 1, resolver: Ip::v4([10, 96, 0, 10]), port: 4000, resolver_port: 53, seq: 9 };
    // Nothing is made of what is not held.
    door.mark_read(&held, 100).unwrap();
    assert_eq!(pins.held(), BTreeMap::new());
    let connection = HeldKey { seq: HeldKey::CONNECTION, ..held };
    door.mark_read_to(&held, 109).unwrap();
    door.mark_read_to(&held, 209).unwrap();
    assert_eq!(pins.held(), [(connection, Held { since: 0, read: 209 })].into());
    // A segment that the programs hold, as they would enter it.
    let mut table: HashMap<_, [u8; 28], [u8; 8]> = HashMap::try_from(pinned(&pins, "HELD")).unwrap();
    let mut key = [0; 28];
    key[..4].copy_from_slice(&1_u32.to_ne_bytes());
    key[4..20].copy_from_slice(&held.resolver.octets);
    key[20..22].copy_from_slice(&4000_u16.to_ne_bytes());
    key[22..24].copy_from_slice(&53_u16.to_ne_bytes());
    key[24..].copy_from_slice(&9_u32.to_ne_bytes());
    table.insert(key, [77, 0, 0, 0, 0, 0, 0, 0], 0).unwrap();
    assert_eq!(pins.held()[&held], Held { since: 77, read: 0 });
    door.mark_read(&held, 100).unwrap();
    assert_eq!(pins.held()[&held], Held { since: 77, read: 100 });
    // An entry for a connection is no segment's.
    door.mark_read(&connection, 5).unwrap();
    assert_eq!(pins.held()[&connection].read, 209);
}

/// A pinned map whose keys and values are seen as bytes.
fn pinned(pins: &Pins, name: &str) -> Map {
    let path = bpf::pin_dir(&pins.0).join("maps").join(name);
    Map::from_map_data(MapData::from_pin(path).unwrap()).unwrap()
}

/// `to_pod`, on the maps of the agent.
struct ToPod(Ebpf);

impl ToPod {
    fn load(pins: &Pins) -> Self {
        let object = std::fs::read(lab::kernel::object_path()).unwrap();
        let dir = bpf::pin_dir(&pins.0).join("maps");
        let paths: Vec<_> = maps::SPECS.iter().map(|spec| (spec.name, dir.join(spec.name))).collect();
        let mut loader = EbpfLoader::new();
        for (name, path) in &paths {
            loader.map_pin_path(name, path);
        }
        let mut ebpf = loader.load(&object).unwrap();
        let program: &mut SchedClassifier = ebpf.program_mut("to_pod").unwrap().try_into().unwrap();
        program.load().unwrap();
        Self(ebpf)
    }

    /// Whether a segment of a resolver passes.
    fn passes(&mut self, flags: u8, seq: u32, payload: &[u8]) -> bool {
        const SEQ: usize = 14 + 20 + 4;
        let mut frame = packet::tcp((RESOLVER_IP, 53), (POD_IP, 4000), flags).payload(payload).frame();
        frame[SEQ..SEQ + 4].copy_from_slice(&seq.to_be_bytes());
        let program: &mut SchedClassifier = self.0.program_mut("to_pod").unwrap().try_into().unwrap();
        let options = TestRunOptions { data_in: Some(&frame), repeat: 1, ..TestRunOptions::default() };
        program.test_run(options).unwrap().return_value.cast_signed() != TC_ACT_SHOT
    }
}

const TC_ACT_SHOT: i32 = 2;
const POD_IP: [u8; 4] = [10, 1, 0, 5];
const RESOLVER_IP: [u8; 4] = [10, 96, 0, 10];

#[tokio::test]
async fn held_segments_come_through_the_door_and_pass_once_read() {
    let pins = Pins::new("segments");
    let mut datapath = Datapath::open(&pins.0).unwrap();
    let mut door = datapath.names().unwrap();
    let mut to_pod = ToPod::load(&pins);
    // A pod with a firewall that has names, and a resolver.
    let mut pod = [0_u8; 16];
    for (offset, value) in
        [(offset_of!(Pod, id), 7), (offset_of!(Pod, ifindex), 9), (offset_of!(Pod, firewall), 3_u32)]
    {
        pod[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
    }
    let mut ruleset = [0_u8; size_of::<Ruleset>()];
    for (offset, value) in [(offset_of!(Ruleset, firewall), 3), (offset_of!(Ruleset, parts), Ruleset::NAMES)]
    {
        ruleset[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
    }
    let mut pods: HashMap<_, [u8; 16], [u8; 16]> = HashMap::try_from(pinned(&pins, "PODS")).unwrap();
    pods.insert(Ip::v4(POD_IP).octets, pod, 0).unwrap();
    let mut firewalls: Array<_, u32> = Array::try_from(pinned(&pins, "FIREWALLS")).unwrap();
    firewalls.set(3, 5, 0).unwrap();
    let mut rulesets: HashMap<_, u32, [u8; size_of::<Ruleset>()]> =
        HashMap::try_from(pinned(&pins, "RULESETS")).unwrap();
    rulesets.insert(5, ruleset, 0).unwrap();
    let mut resolvers: HashMap<_, [u8; 16], u32> = HashMap::try_from(pinned(&pins, "RESOLVERS")).unwrap();
    resolvers.insert(Ip::v4(RESOLVER_IP).octets, RESOLVER, 0).unwrap();

    assert!(to_pod.passes(SYN | ACK, 999, &[]), "the beginning passes");
    let begins = door.segments().await.unwrap();
    let held = HeldKey { pod: 7, resolver: Ip::v4(RESOLVER_IP), port: 4000, resolver_port: 53, seq: 1000 };
    assert_eq!(begins.len(), 1);
    assert_eq!((begins[0].0.held, begins[0].0.payload, begins[0].0.firewall), (held, 0, 3));
    assert_ne!(begins[0].0.flags & u32::from(SYN), 0);

    // One message in two segments (a test run takes less than a page); the door is waited at before they come.
    let mut streams = Streams::default();
    let mut take =
        |segment: &Segment, bytes: &[u8]| streams.take(segment, bytes, tokio::time::Instant::now());
    assert_eq!(take(&begins[0].0, &begins[0].1), Taken::default());
    let message = vec![0x55; 3000];
    let stream = [&3000_u16.to_be_bytes()[..], &message].concat();
    let (first, last) = stream.split_at(1000);
    let wait = async {
        let mut found = Vec::new();
        while found.len() < 2 {
            found.extend(door.segments().await.unwrap());
        }
        found
    };
    let (found, ()) = tokio::join!(wait, async {
        assert!(!to_pod.passes(ACK, 1000, first), "it is held");
        assert!(!to_pod.passes(ACK, 1000, first), "and held, until it is read");
        assert!(!to_pod.passes(ACK, 2000, last));
    });
    let mut messages = Vec::new();
    for (segment, bytes) in &found {
        assert_eq!(bytes.len(), segment.len as usize);
        let taken = take(segment, bytes);
        messages.extend(taken.messages);
        if let Some((held, bytes)) = taken.read {
            door.mark_read(&held, bytes).unwrap();
        }
        if let Some(seq) = taken.read_to {
            door.mark_read_to(&segment.held, seq).unwrap();
        }
    }
    assert_eq!(messages, [message]);
    assert!(to_pod.passes(ACK, 1000, first), "it comes again");
    assert!(to_pod.passes(ACK, 1500, &stream[500..3000]), "cut otherwise");
    assert!(!to_pod.passes(ACK, 1000 + stream.len() as u32, b"more"), "what has not been read is held");
    let events = door.events().unwrap();
    assert_eq!((events[&NameEvent::Held], events[&NameEvent::Unread]), (3, 0));
}
