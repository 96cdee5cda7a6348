//! What the programs know of names: the maps that the agent writes, those that they write themselves, what they give
//! the agent to read, and what it gives them.

use std::collections::BTreeMap;

use aya::Ebpf;
use aya::maps::{Array, Map, MapData, PerCpuArray, RingBuf};
use aya::programs::{TestRun as _, TestRunOptions};
use datapath::addr::Ip;
use datapath::keys::{
    Asked, AskedKey, Credit, Held, HeldKey, Learnt, LearntKey, NameEvent, NameKey, Ruleset, Segment,
};
use datapath::memory::Memory;

use super::{Kernel, Table, classifier};

/// The program that enters what the agent has learnt.
const CREDIT: &str = "credit";
/// Length of an Ethernet header.
const ETHERNET: usize = 14;

/// LRU maps among them; small, as [`super::ENTRIES`].
pub(super) const LRU: [&str; 3] = ["ASKED", "HELD", "LEARNT"];

/// The maps. Handles of their own, so that others may have theirs.
pub(super) struct Names {
    firewalls: Array<MapData, u32>,
    rulesets: Table<u32, Ruleset>,
    ids: Table<NameKey, u32>,
    resolvers: Table<Ip, u32>,
    asked: Table<AskedKey, Asked>,
    held: Table<HeldKey, Held>,
    learnt: Table<LearntKey, Learnt>,
    events: PerCpuArray<MapData, u64>,
    segments: RingBuf<MapData>,
}

impl Names {
    /// Before anybody takes maps out of the object.
    pub(super) fn new(ebpf: &mut Ebpf) -> Self {
        classifier(ebpf, CREDIT).load().unwrap_or_else(|error| panic!("{CREDIT}: {error}"));
        let e = &*ebpf;
        Self {
            firewalls: Array::try_from(handle(e, "FIREWALLS")).expect("FIREWALLS"),
            rulesets: table(e, "RULESETS"),
            ids: table(e, "NAMES"),
            resolvers: table(e, "RESOLVERS"),
            asked: table(e, "ASKED"),
            held: table(e, "HELD"),
            learnt: table(e, "LEARNT"),
            events: PerCpuArray::try_from(handle(e, "NAME_EVENTS")).expect("NAME_EVENTS"),
            segments: RingBuf::try_from(handle(e, "SEGMENTS")).expect("SEGMENTS"),
        }
    }
}

/// A second handle of a map.
fn handle(ebpf: &Ebpf, name: &str) -> Map {
    let map = ebpf.map(name).unwrap_or_else(|| panic!("no map {name} in the object"));
    let (Map::Array(data)
    | Map::HashMap(data)
    | Map::LruHashMap(data)
    | Map::PerCpuArray(data)
    | Map::RingBuf(data)) = map
    else {
        panic!("{name} is of another kind");
    };
    let id = data.info().expect(name).id();
    MapData::from_id(id).and_then(Map::from_map_data).expect(name)
}

fn table<K, V>(ebpf: &Ebpf, name: &str) -> Table<K, V>
where
    K: datapath::keys::MapData + Ord,
    V: datapath::keys::MapData,
{
    Table { map: aya::maps::HashMap::try_from(handle(ebpf, name)).expect(name) }
}

impl Kernel {
    /// Makes the maps of firewalls that have to do with names equal to tables in memory, and forgets what was learnt,
    /// asked and held.
    pub fn write_names(&mut self, tables: &Memory) {
        let names = &mut self.names;
        for firewall in 0..names.firewalls.len() {
            let ruleset = tables.firewalls.get(&firewall).copied().unwrap_or(0);
            if names.firewalls.get(&firewall, 0).expect("FIREWALLS") != ruleset {
                names.firewalls.set(firewall, ruleset, 0).expect("FIREWALLS");
            }
        }
        names.rulesets.set(&tables.rulesets);
        names.ids.set(&tables.names);
        names.asked.set(&tables.asked.borrow());
        self.write_learnt(tables);
        self.names.held.set(&BTreeMap::new());
        let _ = self.segments();
    }

    /// Makes `RESOLVERS` and `LEARNT` equal to tables in memory: what packets are judged with, beside the rules.
    pub fn write_learnt(&mut self, tables: &Memory) {
        self.names.resolvers.set(&tables.resolvers);
        self.names.learnt.set(&tables.learnt.borrow());
    }

    /// The questions that were noted.
    #[must_use]
    pub fn asked(&self) -> BTreeMap<AskedKey, Asked> {
        self.names.asked.read()
    }

    /// What was learnt.
    #[must_use]
    pub fn learnt(&self) -> BTreeMap<LearntKey, Learnt> {
        self.names.learnt.read()
    }

    /// What is held, and how far connections were read.
    #[must_use]
    pub fn held(&self) -> BTreeMap<HeldKey, Held> {
        self.names.held.read()
    }

    /// Sets what is held, as the agent does.
    pub fn set_held(&mut self, held: &BTreeMap<HeldKey, Held>) {
        self.names.held.set(held);
    }

    /// How often something happened to names.
    #[must_use]
    pub fn name_events(&self, event: NameEvent) -> u64 {
        self.names.events.get(&(event as u32), 0).expect("NAME_EVENTS").iter().sum()
    }

    /// What the programs have given the agent since the last time: each record's head, and its bytes.
    pub fn segments(&mut self) -> Vec<(Segment, Vec<u8>)> {
        let mut all = vec![];
        while let Some(record) = self.names.segments.next() {
            let (head, bytes) = record.split_at(size_of::<Segment>());
            all.push((segment_of(head), bytes.to_vec()));
        }
        all
    }

    /// Runs the program that enters what the agent has learnt. Gives the number of entries.
    pub fn credit(&mut self, credits: &[Credit]) -> u32 {
        let mut frame = vec![0; ETHERNET];
        for credit in credits {
            frame.extend(credit.key.firewall.to_ne_bytes());
            frame.extend(credit.key.ip.octets);
            for word in [credit.name, credit.ttl, credit.action] {
                frame.extend(word.to_ne_bytes());
            }
        }
        let options = TestRunOptions { data_in: Some(&frame), repeat: 1, ..TestRunOptions::default() };
        classifier(&mut self.programs.1, CREDIT).test_run(options).expect("a test run").return_value
    }

    /// Sets what was asked.
    pub fn set_asked(&mut self, asked: &BTreeMap<AskedKey, Asked>) {
        self.names.asked.set(asked);
    }
}

/// As [`Segment`] is laid out.
fn segment_of(head: &[u8]) -> Segment {
    let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let half = |at: usize| u16::from_ne_bytes([head[at], head[at + 1]]);
    let ip = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&head[at..at + 16]);
        Ip { octets }
    };
    Segment {
        held: HeldKey {
            pod: word(0),
            resolver: ip(4),
            port: half(20),
            resolver_port: half(22),
            seq: word(24),
        },
        firewall: word(28),
        pod_ip: ip(32),
        payload: word(48),
        offset: word(52),
        len: word(56),
        flags: word(60),
    }
}
