//! The maps seen from user space: their shapes, reading them, and making the policy maps equal to an image.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::maps::lpm_trie::Key;
use aya::maps::{
    Array, HashMap, IterableMap as _, LpmTrie, Map, MapData, MapError, MapInfo, MapType, PerCpuArray,
};
use datapath::addr::Ip;
use datapath::conntrack::{self, Ticks};
use datapath::keys::{
    self, Asked, AskedKey, Delivery, Denial, DenialKey, DropCount, EgressIp, Flow, FlowKey, FragmentHead,
    FragmentKey, GranuleTable, Held, HeldKey, Interface, Learnt, LearntKey, Lease, Line, NameEvent, NameKey,
    NameRuleKey, Network, NetworkKey, Node, NodeId, OpenedBy, Opener, Pod, PodName, Policy, Reply, ReplyKey,
    RuleCount, RuleCountKey, Ruleset, Settings, Swept, Token, Winner,
};
use datapath::limits;
use datapath::verdict::DropReason;

use super::firewalls::Firewalls;
use super::{Error, batch, interfaces};
use crate::image::MapImage;

/// A type of `datapath` as it is copied to and from the kernel.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(super) struct Plain<T>(pub(super) T);

// SAFETY: `keys::MapData` promises plain bytes without unnamed padding, of which every pattern is a value.
#[expect(unsafe_code, reason = "aya's marker for types that may be copied to and from the kernel")]
unsafe impl<T: keys::MapData> aya::Pod for Plain<T> {}

/// A map's name and shape.
pub struct Spec {
    /// Name of the map and of its pin.
    pub name: &'static str,
    kind: MapType,
    key: usize,
    value: usize,
    entries: u32,
}

const fn spec<K, V>(name: &'static str, kind: MapType, entries: u32) -> Spec {
    assert!(name.len() <= 15, "the kernel keeps 15 characters of a map's name");
    Spec { name, kind, key: size_of::<K>(), value: size_of::<V>(), entries }
}

/// Every map of the object that is pinned (all but one program's scratch), as `ebpf/src/maps.rs` declares it. A test compares the two.
pub const SPECS: &[Spec] = &[
    spec::<u32, Settings>("SETTINGS", MapType::Array, 1),
    spec::<Ip, Pod>("PODS", MapType::Hash, limits::PODS),
    spec::<u32, Delivery>("DELIVERY", MapType::Hash, limits::PODS),
    spec::<u32, PodName>("POD_NAMES", MapType::Hash, limits::PODS),
    spec::<u32, Policy>("POLICIES", MapType::Hash, limits::POLICIES),
    spec::<u32, EgressIp>("EGRESS_IPS", MapType::Hash, limits::EGRESS_IPS),
    spec::<Ip, u32>("EGRESS_ADDRS", MapType::Hash, limits::EGRESS_IPS),
    spec::<u32, GranuleTable>("GRANULES", MapType::Hash, limits::EGRESS_IPS),
    spec::<u32, Lease>("LEASES", MapType::Hash, limits::EGRESS_IPS),
    spec::<u32, Node>("NODES", MapType::Hash, limits::NODES),
    spec::<Ip, u32>("NODE_ADDRS", MapType::Hash, limits::NODES),
    spec::<u32, Interface>("INTERFACES", MapType::Hash, limits::INTERFACES),
    spec::<NetworkKey, Network>("NETWORKS", MapType::LpmTrie, limits::NETWORKS),
    spec::<u32, u32>("FIREWALLS", MapType::Array, limits::FIREWALLS),
    spec::<u32, Ruleset>("RULESETS", MapType::Hash, limits::RULESETS),
    spec::<u32, Line>("RULES", MapType::Array, limits::RULES),
    spec::<NameKey, u32>("NAMES", MapType::Hash, limits::NAMES),
    spec::<NameRuleKey, Winner>("NAME_RULES", MapType::Hash, limits::NAME_RULES),
    spec::<Ip, u32>("RESOLVERS", MapType::Hash, limits::RESOLVERS),
    spec::<LearntKey, Learnt>("LEARNT", MapType::LruHash, limits::LEARNT),
    spec::<AskedKey, Asked>("ASKED", MapType::LruHash, limits::ASKED),
    spec::<HeldKey, Held>("HELD", MapType::LruHash, limits::HELD),
    Spec { name: "SEGMENTS", kind: MapType::RingBuf, key: 0, value: 0, entries: limits::SEGMENTS },
    spec::<u32, u64>("NAME_EVENTS", MapType::PerCpuArray, NameEvent::ALL.len() as u32),
    spec::<RuleCountKey, RuleCount>("RULE_COUNTS", MapType::Hash, limits::RULE_COUNTS),
    spec::<DenialKey, Denial>("DENIALS", MapType::LruHash, limits::DENIALS),
    spec::<u32, Token>("TOKENS", MapType::LruHash, limits::TOKENS),
    spec::<FlowKey, Opener>("OPENERS", MapType::LruHash, limits::OPENERS),
    spec::<FlowKey, Flow>("FLOWS", MapType::Hash, limits::FLOWS),
    spec::<ReplyKey, Reply>("REPLIES", MapType::Hash, limits::FLOWS),
    spec::<FragmentKey, FragmentHead>("FRAGMENTS", MapType::LruHash, limits::FRAGMENTS),
    spec::<ReplyKey, u32>("FULL", MapType::LruHash, limits::FULL),
    spec::<u32, u64>("POD_FLOWS", MapType::LruHash, 2 * limits::PODS),
    spec::<u32, Swept>("SWEPT", MapType::Array, 1),
    spec::<u32, u32>("PROGRAMS", MapType::ProgramArray, 1),
    spec::<u32, DropCount>("DROPS", MapType::PerCpuArray, DropReason::ALL.len() as u32),
];

/// Checks the shape of every map that is pinned already; aya would reuse it as it is.
pub(super) fn check_pinned(dir: &Path) -> Result<(), Error> {
    for spec in SPECS {
        let path = dir.join("maps").join(spec.name);
        if !path.exists() {
            continue;
        }
        let of = |source| Error::Map { name: spec.name, source };
        let info = MapInfo::from_pin(&path).map_err(of)?;
        let found = (info.map_type().map_err(of)?, info.key_size(), info.value_size(), info.max_entries());
        let expected = (spec.kind, spec.key as u32, spec.value as u32, spec.entries);
        if found != expected {
            let text = |(kind, key, value, entries): (MapType, u32, u32, u32)| {
                format!("type {kind:?}, {key} byte keys, {value} byte values, {entries} entries")
            };
            return Err(Error::Shape { path, found: text(found), expected: text(expected) });
        }
    }
    Ok(())
}

pub(super) fn open(dir: &Path, name: &'static str) -> Result<Map, Error> {
    let path = dir.join("maps").join(name);
    if !path.exists() {
        return Err(Error::NoMap { name, dir: dir.to_path_buf() });
    }
    MapData::from_pin(&path).and_then(Map::from_map_data).map_err(|source| Error::Map { name, source })
}

/// A hash map of known types.
pub(super) struct Table<K, V> {
    name: &'static str,
    map: HashMap<MapData, Plain<K>, Plain<V>>,
}

impl<K: keys::MapData + Ord, V: keys::MapData> Table<K, V> {
    pub(super) fn open(dir: &Path, name: &'static str) -> Result<Self, Error> {
        let map = HashMap::try_from(open(dir, name)?).map_err(|source| Error::Map { name, source })?;
        Ok(Self { name, map })
    }

    pub(super) fn read(&self) -> Result<BTreeMap<K, V>, Error> {
        self.map
            .iter()
            .map(|entry| entry.map(|(k, v)| (k.0, v.0)))
            .collect::<Result<_, _>>()
            .map_err(|source| self.error(source))
    }

    pub(super) fn keys(&self) -> Result<Vec<K>, Error> {
        let keys = self.map.keys().map(|key| key.map(|k| k.0));
        keys.collect::<Result<_, _>>().map_err(|source| self.error(source))
    }

    pub(super) fn put(&mut self, key: K, value: V) -> Result<(), Error> {
        self.map.insert(Plain(key), Plain(value), 0).map_err(|source| self.error(source))
    }

    /// Puts many entries. After an error some of them may be there.
    pub(super) fn put_all(&mut self, entries: impl Iterator<Item = (K, V)>) -> Result<(), Error> {
        put_all(self.name, self.map.map(), entries)
    }

    /// Removes many entries, those that are there.
    pub(super) fn remove_all(&mut self, keys: impl Iterator<Item = K>) -> Result<(), Error> {
        remove_all(self.name, self.map.map(), keys)
    }

    pub(super) fn remove(&mut self, key: &K) -> Result<(), Error> {
        match self.map.remove(&Plain(*key)) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(e)) if e.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(self.error(source)),
        }
    }

    fn error(&self, source: MapError) -> Error {
        full_or(self.name, source)
    }
}

/// Entries of a call: as many as take a few hundred microseconds.
const AT_ONCE: usize = 1024;

/// Puts many entries into a map of these types.
pub(super) fn put_all<K: keys::MapData, V: keys::MapData>(
    name: &'static str,
    map: &MapData,
    entries: impl Iterator<Item = (K, V)>,
) -> Result<(), Error> {
    let mut entries = entries.peekable();
    while entries.peek().is_some() {
        let (keys, values): (Vec<K>, Vec<V>) = entries.by_ref().take(AT_ONCE).unzip();
        batch::put(map.fd().as_fd(), &keys, &values).map_err(|error| full_or(name, error.into()))?;
    }
    Ok(())
}

/// Removes many entries of a map with such keys, those that are there.
pub(super) fn remove_all<K: keys::MapData>(
    name: &'static str,
    map: &MapData,
    keys: impl Iterator<Item = K>,
) -> Result<(), Error> {
    let mut keys = keys.peekable();
    while keys.peek().is_some() {
        let some: Vec<K> = keys.by_ref().take(AT_ONCE).collect();
        batch::remove(map.fd().as_fd(), &some).map_err(|error| full_or(name, error.into()))?;
    }
    Ok(())
}

/// What a map without room answers: `E2BIG`; a trie, `ENOSPC` (`trie_check_add_elem`, `kernel/bpf/lpm_trie.c`).
#[expect(clippy::wildcard_enum_match_arm, reason = "aya's errors are many")]
pub(super) fn full_or(name: &'static str, source: MapError) -> Error {
    let error = match &source {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        MapError::IoError(error) => error.raw_os_error(),
        _ => None,
    };
    if matches!(error, Some(libc::E2BIG | libc::ENOSPC)) {
        let entries = SPECS.iter().find(|spec| spec.name == name).map_or(0, |spec| spec.entries);
        return Error::MapFull { name, entries };
    }
    Error::Map { name, source }
}

/// Reads a pinned hash map.
pub fn read_map<K: keys::MapData + Ord, V: keys::MapData>(
    bpffs: &Path,
    name: &'static str,
) -> Result<BTreeMap<K, V>, Error> {
    Table::open(&super::pin_dir(bpffs), name)?.read()
}

/// Reads the drop counters, summed over CPUs. `dir` as of [`super::pin_dir`].
pub fn drops(dir: &Path) -> Result<Vec<(DropReason, DropCount)>, Error> {
    let name = "DROPS";
    let of = |source| Error::Map { name, source };
    let map: PerCpuArray<_, Plain<DropCount>> = PerCpuArray::try_from(open(dir, name)?).map_err(of)?;
    let mut found = Vec::new();
    for reason in DropReason::ALL {
        let mut sum = DropCount::default();
        for count in map.get(&(*reason as u32), 0).map_err(of)?.iter() {
            sum.packets += count.0.packets;
            sum.bytes += count.0.bytes;
        }
        found.push((*reason, sum));
    }
    Ok(found)
}

/// What the kernel has learnt of names, and who opened which connection.
pub struct LearntNames {
    learnt: HashMap<MapData, Plain<LearntKey>, Plain<Learnt>>,
    openers: std::cell::RefCell<HashMap<MapData, Plain<FlowKey>, Plain<Opener>>>,
}

impl LearntNames {
    /// Opens the map. `dir` as of [`super::pin_dir`].
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let of = |name| move |source| Error::Map { name, source };
        let learnt = HashMap::try_from(open(dir, "LEARNT")?).map_err(of("LEARNT"))?;
        let openers = HashMap::try_from(open(dir, "OPENERS")?).map_err(of("OPENERS"))?;
        Ok(Self { learnt, openers: openers.into() })
    }
}

impl crate::conntrack::Names for LearntNames {
    fn opened_by_pod(&self, key: &FlowKey) {
        let opener = Opener { seen: now(), by: OpenedBy::Pod as u8, pad: [0; 3] };
        // An LRU map makes room.
        let _ = self.openers.borrow_mut().insert(Plain(*key), Plain(opener), 0);
    }

    fn learnt(&self, key: &LearntKey) -> Option<Learnt> {
        // What cannot be read is not known.
        self.learnt.get(&Plain(*key), 0).ok().map(|learnt| learnt.0)
    }

    fn now(&self) -> Ticks {
        now()
    }
}

/// What the last sweep did.
pub(super) fn swept(dir: &Path) -> Result<Swept, Error> {
    let name = "SWEPT";
    let of = |source| Error::Map { name, source };
    let map: Array<_, Plain<Swept>> = Array::try_from(open(dir, name)?).map_err(of)?;
    Ok(map.get(&0, 0).map_err(of)?.0)
}

/// Time since boot, as the programs count it.
pub fn now() -> Ticks {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let nanoseconds = u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000;
    conntrack::ticks(nanoseconds + u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// The policy maps, and the image that they hold.
pub(super) struct Maps {
    dir: PathBuf,
    image: MapImage,
    pass_token: u32,
    settings: Array<MapData, Plain<Settings>>,
    networks: LpmTrie<MapData, Plain<Ip>, Plain<Network>>,
    pods: Table<Ip, Pod>,
    delivery: Table<u32, Delivery>,
    pod_names: Table<u32, PodName>,
    policies: Table<u32, Policy>,
    egress_ips: Table<u32, EgressIp>,
    egress_addrs: Table<Ip, u32>,
    granules: Table<u32, GranuleTable>,
    leases: Table<u32, Lease>,
    nodes: Table<u32, Node>,
    node_addrs: Table<Ip, u32>,
    interfaces: Table<u32, Interface>,
    resolvers: Table<Ip, u32>,
    firewalls: Firewalls,
}

impl Maps {
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        let settings = Array::try_from(open(dir, "SETTINGS")?)
            .map_err(|source| Error::Map { name: "SETTINGS", source })?;
        let networks = LpmTrie::try_from(open(dir, "NETWORKS")?)
            .map_err(|source| Error::Map { name: "NETWORKS", source })?;
        let mut maps = Self {
            dir: dir.to_path_buf(),
            image: MapImage::default(),
            pass_token: 0,
            settings,
            networks,
            pods: Table::open(dir, "PODS")?,
            delivery: Table::open(dir, "DELIVERY")?,
            pod_names: Table::open(dir, "POD_NAMES")?,
            policies: Table::open(dir, "POLICIES")?,
            egress_ips: Table::open(dir, "EGRESS_IPS")?,
            egress_addrs: Table::open(dir, "EGRESS_ADDRS")?,
            granules: Table::open(dir, "GRANULES")?,
            leases: Table::open(dir, "LEASES")?,
            nodes: Table::open(dir, "NODES")?,
            node_addrs: Table::open(dir, "NODE_ADDRS")?,
            interfaces: Table::open(dir, "INTERFACES")?,
            resolvers: Table::open(dir, "RESOLVERS")?,
            firewalls: Firewalls::open(dir)?,
        };
        maps.image = maps.read()?;
        maps.pass_token = match maps.image.settings.pass_token {
            0 => random_nonzero(),
            kept => kept, // packets under way carry it
        };
        Ok(maps)
    }

    pub(super) const fn image(&self) -> &MapImage {
        &self.image
    }

    pub(super) fn into_image(self) -> MapImage {
        self.image
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn read(&self) -> Result<MapImage, Error> {
        let of = |source| Error::Map { name: "NETWORKS", source };
        let mut networks = BTreeMap::new();
        for entry in &self.networks {
            let (key, value) = entry.map_err(of)?;
            networks.insert(NetworkKey { prefix_len: key.prefix_len(), ip: key.data().0 }, value.0);
        }
        let mut image = MapImage {
            settings: self.settings.get(&0, 0).map_err(|source| Error::Map { name: "SETTINGS", source })?.0,
            pods: self.pods.read()?,
            delivery: self.delivery.read()?,
            pod_names: self.pod_names.read()?,
            policies: self.policies.read()?,
            egress_ips: self.egress_ips.read()?,
            egress_addrs: self.egress_addrs.read()?,
            granules: self.granules.read()?.into_iter().map(|(k, v)| (k, Arc::new(v))).collect(),
            leases: self.leases.read()?,
            nodes: self.nodes.read()?.into_iter().map(|(k, v)| (k as NodeId, v)).collect(),
            node_addrs: self.node_addrs.read()?.into_iter().map(|(k, v)| (k, v as NodeId)).collect(),
            interfaces: self.interfaces.read()?,
            networks,
            resolvers: self.resolvers.read()?,
            ..MapImage::default()
        };
        self.firewalls.fill(&mut image)?;
        Ok(image)
    }

    /// Writes the difference. Order: what is referred to before what refers to it, pods last; removals the
    /// other way round. A lease is the right to send, so it goes before the tables that let it pass. Versions of
    /// firewalls that are in force no more are removed later, by [`Maps::retire`].
    pub(super) fn apply(&mut self, image: &MapImage) -> Result<(), Error> {
        let mut image = image.clone();
        image.settings.pass_token = self.pass_token;
        let old = std::mem::take(&mut self.image);
        let result = self.write(&old, &image);
        // After a failure the kernel's own content is the truth.
        self.image = if result.is_ok() { image } else { self.read()? };
        result
    }

    fn write(&mut self, old: &MapImage, new: &MapImage) -> Result<(), Error> {
        let (old_nodes, new_nodes) = (widen_keys(&old.nodes), widen_keys(&new.nodes));
        let (old_addrs, new_addrs) = (widen_values(&old.node_addrs), widen_values(&new.node_addrs));

        remove_gone(&mut self.pods, &old.pods, &new.pods)?;
        remove_gone(&mut self.leases, &old.leases, &new.leases)?;
        // Before the settings, which put the programs to work: an interface not in the map is held.
        for (index, interface) in interfaces::changes(&old.interfaces, &new.interfaces) {
            self.interfaces.put(index, interface)?;
        }
        // Before ids are used or freed, so that an agent that stops half-way leaves no id to be given twice.
        if old.settings != new.settings {
            self.settings
                .set(0, Plain(new.settings), 0)
                .map_err(|source| Error::Map { name: "SETTINGS", source })?;
        }

        self.write_networks(&old.networks, &new.networks)?;
        put_changed(&mut self.resolvers, &old.resolvers, &new.resolvers)?;
        self.firewalls.put(old, new)?;
        put_changed(&mut self.nodes, &old_nodes, &new_nodes)?;
        put_changed(&mut self.node_addrs, &old_addrs, &new_addrs)?;
        put_changed(&mut self.granules, &old.granules, &new.granules)?;
        put_changed(&mut self.egress_ips, &old.egress_ips, &new.egress_ips)?;
        put_changed(&mut self.egress_addrs, &old.egress_addrs, &new.egress_addrs)?;
        put_changed(&mut self.leases, &old.leases, &new.leases)?;
        put_changed(&mut self.policies, &old.policies, &new.policies)?;
        put_changed(&mut self.pod_names, &old.pod_names, &new.pod_names)?;
        put_changed(&mut self.delivery, &old.delivery, &new.delivery)?;
        put_changed(&mut self.pods, &old.pods, &new.pods)?;

        self.firewalls.leave(old, new)?;
        remove_gone(&mut self.resolvers, &old.resolvers, &new.resolvers)?;
        remove_gone(&mut self.delivery, &old.delivery, &new.delivery)?;
        remove_gone(&mut self.pod_names, &old.pod_names, &new.pod_names)?;
        remove_gone(&mut self.interfaces, &old.interfaces, &new.interfaces)?;
        remove_gone(&mut self.policies, &old.policies, &new.policies)?;
        remove_gone(&mut self.egress_addrs, &old.egress_addrs, &new.egress_addrs)?;
        remove_gone(&mut self.egress_ips, &old.egress_ips, &new.egress_ips)?;
        remove_gone(&mut self.granules, &old.granules, &new.granules)?;
        remove_gone(&mut self.node_addrs, &old_addrs, &new_addrs)?;
        remove_gone(&mut self.nodes, &old_nodes, &new_nodes)
    }

    /// Removes versions of firewalls that were in force a while ago.
    pub(super) fn retire(&mut self) -> Result<(), Error> {
        self.firewalls.retire()
    }

    fn write_networks(
        &mut self,
        old: &BTreeMap<NetworkKey, Network>,
        new: &BTreeMap<NetworkKey, Network>,
    ) -> Result<(), Error> {
        for (key, value) in new {
            if old.get(key) != Some(value) {
                let key = Key::new(key.prefix_len, Plain(key.ip));
                self.networks.insert(&key, Plain(*value), 0).map_err(|e| full_or("NETWORKS", e))?;
            }
        }
        for key in old.keys().filter(|key| !new.contains_key(key)) {
            let key = Key::new(key.prefix_len, Plain(key.ip));
            self.networks.remove(&key).map_err(|source| Error::Map { name: "NETWORKS", source })?;
        }
        Ok(())
    }
}

pub(super) fn put_changed<K: keys::MapData + Ord, V: keys::MapData, W: Borrow<V> + PartialEq>(
    table: &mut Table<K, V>,
    old: &BTreeMap<K, W>,
    new: &BTreeMap<K, W>,
) -> Result<(), Error> {
    for (key, value) in new {
        if old.get(key) != Some(value) {
            table.put(*key, *value.borrow())?;
        }
    }
    Ok(())
}

pub(super) fn remove_gone<K: keys::MapData + Ord, V: keys::MapData, W>(
    table: &mut Table<K, V>,
    old: &BTreeMap<K, W>,
    new: &BTreeMap<K, W>,
) -> Result<(), Error> {
    for key in old.keys().filter(|key| !new.contains_key(key)) {
        table.remove(key)?;
    }
    Ok(())
}

/// Node ids are 16 bits wide in tables of them, and 32 as keys and values of maps of their own.
fn widen_keys<V: Copy>(map: &BTreeMap<NodeId, V>) -> BTreeMap<u32, V> {
    map.iter().map(|(k, v)| (u32::from(*k), *v)).collect()
}

fn widen_values<K: Copy + Ord>(map: &BTreeMap<K, NodeId>) -> BTreeMap<K, u32> {
    map.iter().map(|(k, v)| (*k, u32::from(*v))).collect()
}

fn random_nonzero() -> u32 {
    use std::hash::{BuildHasher as _, RandomState};
    // The standard library's keys come from the kernel's random numbers.
    RandomState::new().hash_one(std::process::id()) as u32 | 1
}
