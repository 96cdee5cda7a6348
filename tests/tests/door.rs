//! The agent's door to names in this kernel: what it has the program `credit` enter is in the map, and what it reads
//! there is all of it.
#![expect(clippy::unwrap_used, reason = "a test, whose helpers clippy does not take for one")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use aya::maps::{HashMap, Map, MapData};
use datapath::addr::Ip;
use datapath::conntrack::Ticks;
use datapath::keys::{Credit, Held, HeldKey, Learnt, LearntKey, NameEvent, NameId};
use datapath::names::until;
use outgate::bpf::{self, Datapath, maps};
use outgate::names::Door;

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

fn open_held(pins: &Pins) -> Map {
    let path = bpf::pin_dir(&pins.0).join("maps/HELD");
    Map::from_map_data(MapData::from_pin(path).unwrap()).unwrap()
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
    let mut table: HashMap<_, [u8; 28], [u8; 8]> = HashMap::try_from(open_held(&pins)).unwrap();
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
