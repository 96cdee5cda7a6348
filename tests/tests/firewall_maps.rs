//! Versions of firewalls in the kernel's maps: one is in force at any moment, and it is whole.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData};
use datapath::keys::{Line, Winner};
use datapath::rules::find_v4;
use lab::{Agent, Lab, LabSpec, Pod, PodSpec, eventually_ok};

const FILE: &str = "firewall-prod.yaml";
/// As many as an object may have.
const RULES: u32 = 8000;
const SOON: Duration = Duration::from_secs(20);

struct Cluster {
    lab: Lab,
    agent: Option<Agent>,
    _pod: Pod,
}

impl Cluster {
    fn new() -> Self {
        let lab = Lab::with(&LabSpec::default().nodes(1));
        lab.describe_cluster(&[]);
        let agent = lab.start_agents().pop();
        let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
        Self { lab, agent, _pod: pod }
    }

    fn write(&self, rules: &str) {
        let spec = format!(
            "apiVersion: k8s.ovn.org/v1\nkind: EgressFirewall\nmetadata: {{name: default, namespace: prod}}\nspec:\n  egress:\n{rules}"
        );
        self.lab.objects.write(FILE, &spec);
    }

    fn maps(&self) -> Maps {
        let pins = self.lab.bpffs("node-a");
        let version = fs::read_dir(&pins).expect("pins").flatten().next().expect("a layout");
        Maps::open(&version.path().join("maps"))
    }

    fn restart(&mut self) {
        self.agent.take().expect("an agent").kill();
        let mut agent = self.lab.start_agent("node-a");
        agent.wait_ready();
        self.agent = Some(agent);
    }

    /// Waits until a version is in force, which it is, other than this one.
    fn wait_version(&self, maps: &Maps, other: u32) -> u32 {
        eventually_ok("another version", SOON, || match maps.in_force() {
            Some(id) if id != other => Ok(id),
            found => Err(format!(
                "{found:?} is in force, {other} was\n{}",
                self.agent.as_ref().expect("one").log()
            )),
        })
    }
}

/// The maps that a firewall is judged by.
struct Maps {
    words: Array<MapData, u32>,
    rulesets: HashMap<MapData, u32, [u8; 48]>,
    lines: Array<MapData, [u32; 16]>,
}

impl Maps {
    /// Waits until nothing but this version is in the maps.
    fn wait_only(&self, version: Option<u32>) {
        let wanted: BTreeSet<u32> = version.into_iter().collect();
        eventually_ok("old versions are removed", SOON, || {
            let found = self.standing();
            if found == wanted { Ok(()) } else { Err(format!("{found:?}, {wanted:?} is wanted")) }
        });
    }

    fn open(dir: &std::path::Path) -> Self {
        let open = |name: &str| {
            let path: PathBuf = dir.join(name);
            MapData::from_pin(&path).and_then(Map::from_map_data).expect("a pinned map")
        };
        Self {
            words: open("FIREWALLS").try_into().expect("an array"),
            rulesets: open("RULESETS").try_into().expect("a hash map"),
            lines: open("RULES").try_into().expect("an array"),
        }
    }

    /// The version of the only firewall.
    fn in_force(&self) -> Option<u32> {
        let mut words = self.words.iter().map(|word| word.expect("a word")).filter(|word| *word != 0);
        let first = words.next();
        assert_eq!(words.next(), None, "there is one firewall");
        first
    }

    /// How many rules a version has (`Ruleset::rules`).
    fn rules_of(&self, id: u32) -> Option<u32> {
        self.word(id, 5)
    }

    /// The root of its rules for IPv4 without ports (`Ruleset::roots`).
    fn root_of(&self, id: u32) -> Option<u32> {
        self.word(id, 7)
    }

    fn word(&self, id: u32, nth: usize) -> Option<u32> {
        let ruleset = self.rulesets.get(&id, 0).ok()?;
        Some(u32::from_ne_bytes(ruleset.as_chunks().0[nth]))
    }

    /// The winner for an address among rules without ports.
    fn winner(&self, id: u32, ip: Ipv4Addr) -> Option<u32> {
        let line = |n: u32| self.lines.get(&n, 0).ok().map(|word| Line { word });
        Some(find_v4(self.root_of(id)?, ip.to_bits(), line))
    }

    /// All versions that are there.
    fn standing(&self) -> BTreeSet<u32> {
        self.rulesets.keys().map(|id| id.expect("a key")).collect()
    }
}

/// A host rule of version A or B. All are in both networks' reach of each other: the same first bits.
fn host(version: char, i: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(198, if version == 'A' { 18 } else { 19 }, 0, 0)) + i)
}

fn rules(version: char, count: u32) -> String {
    (0..count).fold(String::new(), |mut text, i| {
        let kind = if version == 'A' { "Allow" } else { "Deny" };
        let _ = writeln!(text, "  - {{type: {kind}, to: {{cidrSelector: {}/32}}}}", host(version, i));
        text
    })
}

#[test]
fn whoever_looks_while_8000_rules_are_swapped_for_8000_others_finds_one_whole_version() {
    let cluster = Cluster::new();
    let versions = [('A', RULES), ('B', RULES - 1)];
    let texts = versions.map(|(version, count)| rules(version, count));
    cluster.write(&texts[0]);
    let maps = cluster.maps();
    let mut id = cluster.wait_version(&maps, 0);
    let (done, looks) = (AtomicBool::new(false), [AtomicU64::new(0), AtomicU64::new(0)]);
    thread::scope(|scope| {
        scope.spawn(|| {
            let maps = cluster.maps();
            let mut seed = 1_u32;
            while !done.load(Ordering::Relaxed) {
                let id = maps.in_force().expect("one is always in force");
                let count = maps.rules_of(id);
                let which = versions.iter().position(|(_, c)| Some(*c) == count);
                let which = which.unwrap_or_else(|| panic!("version {id} has {count:?} rules"));
                let (version, count) = versions[which];
                for i in (0..16).map(|_| next(&mut seed) % count).chain([0, count - 1]) {
                    let found = maps.winner(id, host(version, i));
                    let order = Winner::new(i, version == 'A').order;
                    assert_eq!(found, Some(order), "rule {i} of version {id}, which is {version}");
                }
                looks[which].fetch_add(1, Ordering::Relaxed);
            }
        });
        let stop = Stop(&done);
        let mut roots = vec![maps.root_of(id)];
        for swap in 0..4 {
            let before = looks.each_ref().map(|l| l.load(Ordering::Relaxed));
            cluster.write(&texts[(swap + 1) % 2]);
            let new = cluster.wait_version(&maps, id);
            assert!(new > id, "numbers are not given again");
            id = new;
            roots.push(maps.root_of(id));
            // Each version is looked at while it is in force, and the reader is alive.
            eventually_ok("the reader looks", SOON, || {
                let now = looks[(swap + 1) % 2].load(Ordering::Relaxed);
                if now > before[(swap + 1) % 2] { Ok(()) } else { Err(format!("{now} times")) }
            });
            maps.wait_only(Some(id));
        }
        drop(stop);
        // Two versions of nearly the same size have room side by side; what is gone leaves its room to the next.
        assert_eq!((roots[0], roots[1]), (roots[2], roots[3]), "{roots:?}");
        assert_eq!(roots[0], roots[4], "{roots:?}");
        assert_ne!(roots[0], roots[1], "{roots:?}");
    });
}

/// Stops the reader also when the writer panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// xorshift32.
fn next(seed: &mut u32) -> u32 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 17;
    *seed ^= *seed << 5;
    *seed
}

const NAMED: &str = "  - {type: Allow, to: {dnsName: www.example.com}, ports: [{protocol: TCP, port: 443}]}
  - {type: Deny, to: {cidrSelector: 0.0.0.0/0}}
";

#[test]
fn versions_and_names_keep_their_numbers_over_restarts() {
    let mut cluster = Cluster::new();
    cluster.write(NAMED);
    let maps = cluster.maps();
    let first = cluster.wait_version(&maps, 0);
    let all = ["RULESETS", "NAME_RULES", "NAMES", "FIREWALLS", "PODS"];
    let dump = |cluster: &Cluster| all.map(|map| cluster.lab.map("node-a", map));
    let before = dump(&cluster);
    cluster.restart();
    assert!(dump(&cluster) == before, "nothing is written again");
    // Changed while no agent runs: the old version is in force until the new one is.
    cluster.agent.take().expect("an agent").stop();
    cluster.write(&NAMED.replace("443", "444"));
    assert_eq!(maps.in_force(), Some(first));
    let mut agent = cluster.lab.start_agent("node-a");
    agent.wait_ready();
    cluster.agent = Some(agent);
    let second = cluster.wait_version(&maps, first);
    assert_eq!(second, first + 1);
    assert!(cluster.lab.map("node-a", "NAMES") == before[2], "the name is the same");
    maps.wait_only(Some(second));
}

#[test]
fn a_refused_update_leaves_the_version_before_in_force_and_a_removed_object_none() {
    let mut cluster = Cluster::new();
    cluster.write(NAMED);
    let maps = cluster.maps();
    let first = cluster.wait_version(&maps, 0);
    cluster.lab.tolerate("cidrSelector: \"10.0.0\" is not a network");
    cluster.write("  - {type: Allow, to: {cidrSelector: 10.0.0}}\n");
    let log = |cluster: &Cluster| cluster.agent.as_ref().expect("an agent").log();
    eventually_ok("the refusal is said", SOON, || {
        if log(&cluster).contains("cidrSelector") { Ok(()) } else { Err(log(&cluster)) }
    });
    assert_eq!(maps.in_force(), Some(first));
    cluster.restart();
    eventually_ok("the refusal is said again", SOON, || {
        if log(&cluster).contains("cidrSelector") { Ok(()) } else { Err(log(&cluster)) }
    });
    assert_eq!(maps.in_force(), Some(first));
    let pods = |cluster: &Cluster| {
        let pods = cluster.lab.map("node-a", "PODS");
        pods.iter().map(|entry| entry["value"]["firewall"].as_u64()).collect::<Vec<_>>()
    };
    assert_eq!(pods(&cluster), [Some(1)]);
    cluster.lab.objects.remove(FILE);
    maps.wait_only(None);
    assert_eq!(pods(&cluster), [Some(0)]);
    assert_eq!(maps.in_force(), None);
    assert!(cluster.lab.map("node-a", "NAMES").is_empty());
}
