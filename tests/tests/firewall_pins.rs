//! What a starting agent makes of the rules that it finds pinned: those of one that was killed while it wrote, of one
//! with maps of another shape, and such as no agent leaves behind.
#![expect(clippy::unwrap_used, reason = "a test, whose helpers clippy does not take for one")]

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use aya::maps::{Array, HashMap, Map, MapData};
use datapath::keys::{Ruleset, RulesetId};
use datapath::limits::RULES;
use datapath::rules::{BLOCK_LINES, LINE_MASK};
use outgate::bpf::{self, Datapath};
use outgate::compile::compile;
use outgate::facts::Facts;
use outgate::firewall::{Destination, Firewall, Rule};
use outgate::ids::Ids;
use outgate::image::MapImage;
use outgate::model::{Desired, Pod};

/// Maps of this test alone.
struct Pins(PathBuf);

impl Pins {
    fn new(name: &str) -> Self {
        Self(PathBuf::from(format!("/sys/fs/bpf/og{}-firewall-{name}", std::process::id())))
    }

    fn maps(&self) -> PathBuf {
        bpf::pin_dir(&self.0).join("maps")
    }

    fn map(&self, name: &str) -> Map {
        Map::from_map_data(MapData::from_pin(self.maps().join(name)).unwrap()).unwrap()
    }

    fn lines(&self) -> Array<MapData, [u32; 16]> {
        self.map("RULES").try_into().unwrap()
    }

    fn rulesets(&self) -> HashMap<MapData, u32, [u8; size_of::<Ruleset>()]> {
        self.map("RULESETS").try_into().unwrap()
    }

    fn words(&self) -> Array<MapData, u32> {
        self.map("FIREWALLS").try_into().unwrap()
    }

    /// The line of the highest node of a version's tree for IPv4.
    fn root(&self, id: RulesetId) -> u32 {
        let ruleset = self.rulesets().get(&id, 0).unwrap();
        ruleset.as_chunks().0.iter().map(|word| u32::from_ne_bytes(*word)).nth(7).unwrap() & LINE_MASK
    }

    fn open(&self) -> Result<Datapath, String> {
        Datapath::open(&self.0).map_err(|error| error.to_string())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        bpf::cleanup(&self.0).unwrap();
    }
}

/// What an agent makes of so many rules in a namespace, from `10.0.0.0` plus this number on.
fn put(datapath: &mut Datapath, first: u32) -> MapImage {
    let rule = |n: u32| Rule {
        allows: n.is_multiple_of(2),
        to: Destination::Network(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + first + 2 * n)).into()),
        ports: Vec::new(),
    };
    let rules = Ok(Arc::new((0..1000).map(rule).collect()));
    let mut desired = Desired::default();
    let pod = Pod { version: 1, addresses: vec![Ipv4Addr::new(10, 0, 0, 1).into()], ..Pod::default() };
    desired.pods.insert(("prod".into(), "client".into()), pod);
    let firewall = Firewall { uid: "u".into(), version: 1, rules, notes: Vec::new() };
    desired.firewalls.insert("prod".into(), firewall);
    let mut ids = Ids::recover(datapath.recovered());
    let compiled = compile(&desired, &Facts::default(), &mut ids);
    assert_eq!(compiled.firewalls["prod"].error, None);
    datapath.apply(&compiled.image, &Facts::default()).unwrap();
    compiled.image
}

/// The version of the only firewall.
fn only(image: &MapImage) -> RulesetId {
    assert_eq!(image.firewalls.len(), 1);
    *image.firewalls.first_key_value().unwrap().1
}

#[track_caller]
fn expect_found(datapath: &Datapath, put: &MapImage) {
    let found = datapath.recovered();
    assert_eq!(found.firewalls, put.firewalls);
    let id = only(put);
    assert!(found.rulesets[&id] == put.rulesets[&id], "the rules are as they were put");
}

#[test]
fn what_a_killed_agent_had_begun_to_write_is_in_nobodys_way() {
    let pins = Pins::new("begun");
    let first = put(&mut pins.open().unwrap(), 0);
    // Half a tree beside the one in force, in all lines that the next version may be given; no entry says whose it is.
    let mut lines = pins.lines();
    let is_free = |lines: &Array<_, _>, block| {
        (block..block + BLOCK_LINES).all(|line| lines.get(&line, 0).unwrap() == [0; 16])
    };
    let blocks: Vec<u32> = (BLOCK_LINES..64 * BLOCK_LINES).step_by(BLOCK_LINES as usize).collect();
    let (free, taken): (Vec<u32>, Vec<u32>) = blocks.iter().partition(|block| is_free(&lines, **block));
    assert!(
        taken.len() < free.len() && taken.contains(&(pins.root(only(&first)) / BLOCK_LINES * BLOCK_LINES))
    );
    for line in free.iter().flat_map(|block| *block..block + BLOCK_LINES) {
        lines.set(line, [0xffff_fff0; 16], 0).unwrap();
    }
    let mut datapath = pins.open().unwrap();
    expect_found(&datapath, &first);
    let second = put(&mut datapath, 50_000);
    assert_ne!(only(&second), only(&first));
    drop(datapath);
    expect_found(&pins.open().unwrap(), &second);
}

#[test]
fn a_version_in_force_whose_trees_are_broken_stops_the_agent_which_says_so() {
    let pins = Pins::new("broken");
    let image = put(&mut pins.open().unwrap(), 0);
    let id = only(&image);
    let root = pins.root(id);
    let mut lines = pins.lines();
    let whole = lines.get(&root, 0).unwrap();
    // Nothing, another number of levels' line, and a number beyond all lines.
    let mut beyond = whole;
    beyond[15] = RULES;
    for broken in [[0; 16], [u32::MAX - 1; 16], beyond] {
        lines.set(root, broken, 0).unwrap();
        let error = pins.open().map(drop).unwrap_err();
        let says = format!("no trees where version {id} of a firewall should have them");
        assert!(error.contains(&says) && error.contains("maps/RULES"), "{error}");
        assert_eq!(pins.words().get(&1, 0).unwrap(), id, "and it leaves all as it was");
    }
    lines.set(root, whole, 0).unwrap();
    expect_found(&pins.open().unwrap(), &image);

    // What no pod has in force any more is only removed.
    lines.set(root, [0; 16], 0).unwrap();
    pins.words().set(1, 0, 0).unwrap();
    let mut datapath = pins.open().unwrap();
    assert!(datapath.recovered().firewalls.is_empty());
    let next = put(&mut datapath, 50_000);
    drop(datapath);
    expect_found(&pins.open().unwrap(), &next);
}

#[test]
fn maps_of_another_shape_are_not_taken_and_stay_as_they_are() {
    let pins = Pins::new("shape");
    fs::create_dir_all(pins.maps()).unwrap();
    let path = pins.maps().join("RULES");
    // As an earlier build had it.
    let words =
        ["type", "lpm_trie", "key", "24", "value", "4", "entries", "4096", "name", "RULES", "flags", "1"];
    let made = Command::new("bpftool").args(["map", "create"]).arg(&path).args(words).status().unwrap();
    assert!(made.success());
    let error = pins.open().map(drop).unwrap_err();
    assert!(
        error.contains("maps/RULES") && error.contains("LpmTrie") && error.contains("64 byte values"),
        "{error}"
    );
    let left: Vec<_> = fs::read_dir(pins.maps()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [path], "nothing is pinned beside it");
}
