//! The lab's life: made by [`Lab::new`], removed when dropped or by the reaper, described when a test fails.

use std::env;
use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio, id as own_pid};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::cgroup;
use crate::cni::Cni;
use crate::command::{self, eventually, keep_failed, signal};
use crate::netns::{Netns, identity};
use crate::objects::Objects;

/// The prefix length and router of the nodes' network.
const UNDERLAY: (&str, &str) = ("172.18.0", "172.18.0.1");
/// The network outside.
const OUTSIDE: &str = "203.0.113";

/// What to make.
#[derive(Debug, Clone)]
pub struct LabSpec {
    nodes: usize,
    cni: Cni,
    rp_filter: u8,
    routed_pods: bool,
}

impl Default for LabSpec {
    fn default() -> Self {
        Self { nodes: 3, cni: Cni::Ptp, rp_filter: 1, routed_pods: false }
    }
}

impl LabSpec {
    /// How many nodes: `node-a`, `node-b`, … (3).
    #[must_use]
    pub fn nodes(mut self, nodes: usize) -> Self {
        assert!((1..=8).contains(&nodes), "the lab has names and addresses for 1 to 8 nodes");
        self.nodes = nodes;
        self
    }

    /// Which plugin connects the pods (ptp).
    #[must_use]
    pub fn cni(mut self, cni: Cni) -> Self {
        self.cni = cni;
        self
    }

    /// The nodes' reverse-path filter: 0 off, 1 strict, 2 loose (1, as most distributions set it).
    #[must_use]
    pub fn rp_filter(mut self, mode: u8) -> Self {
        self.rp_filter = mode;
        self
    }

    /// Whether the router knows the way to the pods' addresses (no).
    #[must_use]
    pub fn routed_pods(mut self) -> Self {
        self.routed_pods = true;
        self
    }
}

/// One node.
#[derive(Debug, Clone)]
pub struct Node {
    /// `node-a`, `node-b`, …
    pub name: String,
    /// Its own network namespace.
    pub netns: Netns,
    /// Its address on `eth0`.
    pub address: String,
    /// Its pods' addresses, without the last number: `10.244.1`.
    pub pod_prefix: String,
    /// Which plugin connects its pods.
    pub cni: Cni,
}

/// A host that is no part of the cluster.
#[derive(Debug, Clone)]
pub struct Host {
    /// Its network namespace.
    pub netns: Netns,
    /// Its address on `eth0`.
    pub address: String,
}

/// A small network of nodes, a router and outside hosts.
#[derive(Debug)]
pub struct Lab {
    /// The nodes, `node-a` first.
    pub nodes: Vec<Node>,
    /// Routes between the nodes' network and the outside.
    pub router: Netns,
    /// An outside host behind the router, for servers: 203.0.113.10.
    pub web: Host,
    /// Another outside host behind the router: 203.0.113.20.
    pub other: Host,
    /// An outside host on the nodes' own network: 172.18.0.250. It asks for egress IPs by ARP itself.
    pub neighbour: Host,
    /// The directory of Kubernetes objects that the agents read.
    pub objects: Objects,
    pub(crate) home: Home,
    tolerated: Mutex<Vec<String>>,
}

impl Lab {
    /// Three nodes whose pods are connected by `ptp`.
    #[track_caller]
    #[must_use]
    pub fn new() -> Self {
        Self::with(&LabSpec::default())
    }

    /// Makes the lab that is asked for.
    #[track_caller]
    #[must_use]
    pub fn with(spec: &LabSpec) -> Self {
        assert!(rustix::process::geteuid().is_root(), "the lab makes network namespaces: run it as root");
        let home = Home::create();
        let netns = |name: &str| Netns::create(&format!("{}-{name}", home.id), &home.dir);

        // The wire between the nodes is a namespace of its own: no node sees another's bridge.
        let wire = netns("wire");
        wire.ip(&["link add br0 type bridge forward_delay 0", "link set br0 up"]);
        let bridge_calls = "net.bridge.bridge-nf-call-iptables";
        if Path::new("/proc/sys/net/bridge").exists() {
            wire.sysctl(&[&format!("{bridge_calls}=0")]);
        }

        let router = netns("router");
        router.sysctl(&["net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"]);
        plug(&router, "eth0", &wire, "router", "br0", &format!("{}/24", UNDERLAY.1));
        router.ip(&[
            "link add br1 type bridge forward_delay 0",
            &format!("addr add {OUTSIDE}.1/24 dev br1"),
            "link set br1 up",
        ]);
        if Path::new("/proc/sys/net/bridge").exists() {
            router.sysctl(&[&format!("{bridge_calls}=0")]);
        }
        let outside = |name: &str, last: u8| {
            let host = Host { netns: netns(name), address: format!("{OUTSIDE}.{last}") };
            plug(&host.netns, "eth0", &router, name, "br1", &format!("{}/24", host.address));
            host.netns.ip(&[&format!("route add default via {OUTSIDE}.1")]);
            host
        };
        let (web, other) = (outside("web", 10), outside("other", 20));

        let neighbour = Host { netns: netns("neighbour"), address: format!("{}.250", UNDERLAY.0) };
        plug(&neighbour.netns, "eth0", &wire, "neighbour", "br0", &format!("{}/24", neighbour.address));
        neighbour.netns.ip(&[&format!("route add default via {}", UNDERLAY.1)]);

        let nodes: Vec<Node> = (0..spec.nodes)
            .map(|index| {
                let name = format!("node-{}", char::from(b'a' + index as u8));
                Node {
                    netns: netns(&name),
                    name,
                    address: format!("{}.{}", UNDERLAY.0, 11 + index),
                    pod_prefix: format!("10.244.{}", 1 + index),
                    cni: spec.cni,
                }
            })
            .collect();
        for node in &nodes {
            let mode = spec.rp_filter;
            node.netns.sysctl(&[
                "net.ipv4.ip_forward=1",
                &format!("net.ipv4.conf.all.rp_filter={mode}"),
                &format!("net.ipv4.conf.default.rp_filter={mode}"),
            ]);
            if Path::new("/proc/sys/net/bridge").exists() {
                // As kubeadm asks for.
                node.netns.sysctl(&[&format!("{bridge_calls}=1")]);
            }
            plug(&node.netns, "eth0", &wire, &node.name, "br0", &format!("{}/24", node.address));
            let mut ways = vec![format!("route add default via {}", UNDERLAY.1)];
            let others = nodes.iter().filter(|other| other.name != node.name);
            ways.extend(others.map(|o| format!("route add {}.0/24 via {}", o.pod_prefix, o.address)));
            node.netns.ip(&ways.iter().map(String::as_str).collect::<Vec<_>>());
            node.proxy_rules();
            if spec.routed_pods {
                let (prefix, via) = (&node.pod_prefix, &node.address);
                router.ip(&[&format!("route add {prefix}.0/24 via {via}")]);
                neighbour.netns.ip(&[&format!("route add {prefix}.0/24 via {via}")]);
            }
        }

        let objects = Objects::new(&home.dir.join("objects"));
        Self { nodes, router, web, other, neighbour, objects, home, tolerated: Mutex::default() }
    }

    /// The lab's short name: every namespace of it begins with this and a dash.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.home.id
    }

    /// Where its files are: logs, objects, a BPF filesystem under `bpf`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.home.dir
    }

    /// A node by its name.
    #[track_caller]
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.name == name).unwrap_or_else(|| panic!("the lab has no {name}"))
    }

    /// Which node has this address on `eth0`.
    #[must_use]
    pub fn node_with_address(&self, address: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.address == address)
    }

    /// Every other warning or error in an agent's log fails the test; a line with this text does not.
    pub fn tolerate(&self, text: &str) {
        self.tolerated.lock().unwrap_or_else(PoisonError::into_inner).push(text.to_owned());
    }

    /// Leaves the lab where it is, for a person to look into. Gives the command that removes it.
    #[must_use]
    pub fn keep(mut self) -> String {
        fs::write(self.home.dir.join("keep"), "").expect("the lab's directory can be written");
        self.home.kept = true;
        format!("{} remove {}", helper_path("peer").display(), self.home.id)
    }

    /// The state of every namespace, with the line that enters it.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = String::new();
        let look = |text: &mut String, netns: &Netns, commands: &[&str]| {
            let _ = writeln!(text, "\n=== {}", netns.enter());
            for command in commands {
                let output = netns.try_exec(&["sh", "-c", command]);
                let shown = [output.stdout.trim_end(), output.stderr.trim_end()].concat();
                if !shown.is_empty() {
                    let _ = writeln!(text, "--- {command}\n{shown}");
                }
            }
        };
        for node in &self.nodes {
            look(
                &mut text,
                &node.netns,
                &[
                    "ip -br addr",
                    "ip route",
                    "ip neigh",
                    "iptables-save -c | grep -v '^[#:]'",
                    "conntrack -L 2>/dev/null | head -12",
                ],
            );
        }
        for node in &self.nodes {
            let _ = writeln!(text, "=== drops of {}: {:?}", node.name, self.drops(&node.name));
        }
        let outside = [&self.router, &self.web.netns, &self.other.netns, &self.neighbour.netns];
        for netns in outside {
            look(&mut text, netns, &["ip -br addr", "ip route", "ip neigh", "nft list ruleset"]);
        }
        let described = self.nodes.iter().map(|node| &node.netns).chain(outside);
        let described: Vec<_> = described.map(Netns::name).collect();
        for name in namespaces(&self.home.id).iter().filter(|name| !described.contains(&name.as_str())) {
            let _ = writeln!(text, "=== nsenter --net=/run/netns/{name}");
        }
        text
    }

    /// Warnings and errors in the agents' logs that no one announced with [`Lab::tolerate`].
    fn complaints(&self) -> Vec<String> {
        let tolerated = self.tolerated.lock().unwrap_or_else(PoisonError::into_inner);
        let mut complaints = Vec::new();
        for (name, log) in self.agent_logs() {
            let bad = log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR"));
            let bad = bad.filter(|line| !tolerated.iter().any(|text| line.contains(text)));
            complaints.extend(bad.map(|line| format!("{name}: {line}")));
        }
        complaints
    }

    fn agent_logs(&self) -> Vec<(String, String)> {
        let entries = fs::read_dir(&self.home.dir).into_iter().flatten().flatten();
        let mut logs: Vec<_> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.contains("-agent-").then(|| (name, fs::read(entry.path()).unwrap_or_default()))
            })
            .map(|(name, bytes)| (name, String::from_utf8_lossy(&bytes).into_owned()))
            .collect();
        logs.sort();
        logs
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Lab {
    /// Tells what a failed test needs, then lets [`Home`] remove everything.
    #[expect(clippy::print_stderr, reason = "a failed test's output is its standard error")]
    fn drop(&mut self) {
        if self.home.kept {
            return;
        }
        if thread::panicking() {
            eprintln!("{}", self.describe());
            for (name, log) in self.agent_logs().iter().filter(|(_, log)| !log.is_empty()) {
                let skip = log.lines().count().saturating_sub(60);
                eprintln!("\n=== {name}, the last lines");
                log.lines().skip(skip).for_each(|line| eprintln!("{line}"));
            }
            if keep_failed() {
                let _ = fs::write(self.home.dir.join("keep"), "");
                self.home.kept = true;
                let peer = helper_path("peer");
                eprintln!("\nkept; to remove it: {} remove {}", peer.display(), self.home.id);
            }
            return;
        }
        let complaints = self.complaints();
        self.home.remove();
        assert!(complaints.is_empty(), "agents complained:\n{}", complaints.join("\n"));
    }
}

/// Connects a namespace's interface to a bridge in another one.
fn plug(netns: &Netns, interface: &str, at: &Netns, port: &str, bridge: &str, address: &str) {
    netns.ip(&[
        &format!("link add {interface} type veth peer name {port} netns {}", at.name()),
        &format!("addr add {address} dev {interface}"),
    ]);
    at.ip(&[&format!("link set {port} master {bridge} up")]);
    netns.ip(&[&format!("link set {interface} up")]);
}

/// The lab's name and directory, and who removes them.
///
/// The owner holds a lock on `<dir>/lock`. The reaper, a process of its own, waits for that lock: whatever ends
/// the owner, the kernel gives the lock away, and the reaper removes the lab. There is no other way of removal,
/// so the one for accidents is tried by every test.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    lock: Option<File>,
    reaper: Option<Child>,
    kept: bool,
}

impl Home {
    fn create() -> Self {
        let helper = helper_path("peer");
        let root = labs_dir();
        fs::create_dir_all(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
        // One lab is made or swept at a time: between its directory's birth and its lock no other may look.
        let registry = open_lock(&root.join("lock"));
        registry.lock().expect("a lock on the registry");
        sweep(&root);
        let names = (0..100).map(|number| match number {
            0 => format!("og{}", own_pid()),
            _ => format!("og{}x{number}", own_pid()),
        });
        let mut places = names.map(|id| (id.clone(), root.join(id)));
        let place = places.find(|(_, dir)| fs::create_dir(dir).is_ok());
        let (id, dir) = place.unwrap_or_else(|| panic!("{} takes no directory", root.display()));
        let lock = open_lock(&dir.join("lock"));
        lock.lock().expect("a lock on the lab");
        drop(registry);

        let reaper = {
            use std::os::unix::process::CommandExt as _;
            let mut command = Command::new(&helper);
            let command = command.args(["reap", &id]).stdin(Stdio::null()).stdout(Stdio::null());
            // Its own process group: Ctrl-C and a test runner's signals are for the owner.
            let child = command.stderr(Stdio::null()).process_group(0).spawn();
            child.unwrap_or_else(|error| panic!("{}: {error}", helper.display()))
        };
        let mut home = Self { id, dir, lock: Some(lock), reaper: Some(reaper), kept: false };
        // Should the reaper not come up, this process still removes what it made.
        let ready = eventually(Duration::from_secs(10), || home.dir.join("reaper").exists().then_some(()));
        if ready.is_none() {
            home.remove();
            panic!("{} reap: not running after 10 s", helper.display());
        }
        let bpf = home.dir.join("bpf");
        fs::create_dir(&bpf).expect("the lab's directory can be written");
        // A BPF filesystem of the lab's own: what is pinned there is gone with it.
        let _ = command::run(&["mount", "-t", "bpf", "bpf", utf8(&bpf)], &[], "").expect_success();
        home
    }

    fn remove(&mut self) {
        let Some(lock) = self.lock.take() else { return };
        drop(lock);
        if let Some(mut reaper) = self.reaper.take() {
            let _ = reaper.wait();
        }
        if !self.kept && self.dir.exists() {
            // Again, here, to say why.
            remove(&self.id).unwrap_or_else(|error| panic!("lab {} stays behind: {error}", self.id));
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Waits for the end of a lab's owner, then removes the lab. What `peer reap` runs.
pub fn reap(id: &str) -> io::Result<()> {
    let dir = labs_dir().join(id);
    let lock = open_lock(&dir.join("lock"));
    File::create(dir.join("reaper"))?;
    lock.lock()?;
    if dir.join("keep").exists() { Ok(()) } else { remove(id) }
}

/// Removes everything of one lab: its programs, its BPF filesystem, its namespaces, its directory.
pub fn remove(id: &str) -> io::Result<()> {
    let names = namespaces(id);

    // Programs first. One that is just starting another may slip through a look at /proc while its child has
    // not shown there yet: only the second look in a row that finds none is believed.
    let mut empty_looks = 0;
    let gone = eventually(Duration::from_secs(10), || {
        let pids = pids_in(&names);
        for pid in &pids {
            signal(*pid, Signal::KILL);
        }
        empty_looks = if pids.is_empty() { empty_looks + 1 } else { 0 };
        (empty_looks >= 2).then_some(())
    });
    if gone.is_none() {
        return Err(io::Error::other(format!("processes survive: {:?}", pids_in(&names))));
    }
    cgroup::remove(id)?;
    let dir = labs_dir().join(id);
    let bpf = dir.join("bpf");
    while is_mount(&bpf) {
        let output = command::run(&["umount", utf8(&bpf)], &[], "");
        if !output.success() {
            return Err(io::Error::other(output.explain()));
        }
    }
    for name in &names {
        let output = command::run(&["ip", "netns", "del", name], &[], "");
        if !output.success() {
            return Err(io::Error::other(output.explain()));
        }
    }
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The names of a lab's network namespaces.
fn namespaces(id: &str) -> Vec<String> {
    let prefix = format!("{id}-");
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.starts_with(&prefix)).collect();
    names.sort();
    names
}

/// Every lab's directory that exists now, with whether it was kept on purpose.
#[must_use]
pub fn existing() -> Vec<(String, bool)> {
    let entries = fs::read_dir(labs_dir()).into_iter().flatten().flatten();
    let dirs = entries.filter(|entry| entry.path().is_dir());
    let mut labs: Vec<_> = dirs
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path().join("keep").exists())))
        .collect();
    labs.sort();
    labs
}

/// Removes labs whose owner and reaper are both dead.
fn sweep(root: &Path) {
    for (id, kept) in existing() {
        let path = root.join(&id).join("lock");
        let Ok(lock) = File::open(&path) else { continue };
        match lock.try_lock() {
            // A lab that cannot be removed is that lab's failure, not this one's.
            Ok(()) if !kept => drop(remove(&id)),
            Ok(()) | Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

fn open_lock(path: &Path) -> File {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Where all labs live.
fn labs_dir() -> PathBuf {
    env::temp_dir().join("outgate-lab")
}

fn is_mount(path: &Path) -> bool {
    match (identity(path), path.parent().and_then(identity)) {
        (Some((device, _)), Some((parent, _))) => device != parent,
        _ => false,
    }
}

/// The processes whose network namespace is one of these.
fn pids_in(names: &[String]) -> Vec<u32> {
    let own = identity(Path::new("/proc/self/ns/net"));
    let wanted: Vec<_> = names
        .iter()
        .filter_map(|name| identity(&Path::new("/run/netns").join(name)))
        // A namespace file that lost its mount must not stand for this one.
        .filter(|namespace| Some(*namespace) != own)
        .collect();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        identity(&path).is_some_and(|namespace| wanted.contains(&namespace))
    })
    .collect()
}

/// A program of this package, which cargo puts beside or above the one that runs.
#[must_use]
pub fn helper_path(name: &str) -> PathBuf {
    let own = env::current_exe().expect("the running program has a path");
    let mut places = own.ancestors().skip(1).take(2).map(|dir| dir.join(name));
    places
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("`{name}` is not built: cargo build -p lab --bins"))
}

pub(crate) fn utf8(path: &Path) -> &str {
    path.to_str().expect("the lab's paths are UTF-8")
}
