//! Outgate's agents and command line in the lab.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use datapath::verdict::DropReason;
use rustix::process::Signal;
use serde_json::Value;

use crate::command::{Output, Process, eventually, eventually_ok, signal};
use crate::lab::{Lab, Node, utf8};
use crate::netns::Netns;
use crate::objects::Labels;

/// Where every agent serves its metrics, each in its own node.
const METRICS: &str = "127.0.0.1:9090";

/// How long an agent may take until it is ready, on a busy machine.
const READY: Duration = Duration::from_mins(1);

/// One node's running agent. Dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    /// The node it works for.
    pub node: String,
    netns: Netns,
    process: Process,
    /// Where it serves metrics and the probes.
    metrics: String,
}

impl Lab {
    /// Describes every node, the lab's networks and two namespaces: `prod` (`env: prod`) and `dev` (`env: dev`).
    pub fn describe_cluster(&self, assignable: &[&str]) {
        self.objects.config("");
        self.objects.namespace("prod", &[("env", "prod")]);
        self.objects.namespace("dev", &[("env", "dev")]);
        for node in &self.nodes {
            self.describe_node(node, assignable.contains(&node.name.as_str()), true);
        }
    }

    /// Writes one node's object.
    pub fn describe_node(&self, node: &Node, assignable: bool, ready: bool) {
        self.objects.node(&node.name, &node.addresses(), &node.pod_networks(), assignable, ready);
    }

    /// Writes one ready node's object with further labels.
    pub fn label_node(&self, node: &Node, assignable: bool, labels: Labels) {
        let networks = node.pod_networks();
        self.objects.labelled_node(&node.name, &node.addresses(), &networks, assignable, true, labels);
    }

    /// Starts the agents of all nodes and waits until they are ready.
    #[track_caller]
    #[must_use]
    pub fn start_agents(&self) -> Vec<Agent> {
        self.start_agents_with(&[])
    }

    /// The same with further options.
    #[track_caller]
    #[must_use]
    pub fn start_agents_with(&self, options: &[&str]) -> Vec<Agent> {
        let nodes = self.nodes.iter();
        let mut agents: Vec<_> = nodes.map(|node| self.start_agent_with(&node.name, options)).collect();
        agents.iter_mut().for_each(Agent::wait_ready);
        agents
    }

    /// Starts one node's agent.
    #[track_caller]
    #[must_use]
    pub fn start_agent(&self, node: &str) -> Agent {
        self.start_agent_with(node, &[])
    }

    /// The same with further options.
    #[track_caller]
    #[must_use]
    pub fn start_agent_with(&self, node: &str, options: &[&str]) -> Agent {
        let node = self.node(node);
        let arguments = self.agent_arguments(&node.name);
        let words: Vec<&str> = arguments.iter().map(String::as_str).chain(options.iter().copied()).collect();
        let process = node.netns.spawn(&format!("agent-{}", node.name), &words, &[("NO_COLOR", "1")]);
        Agent::new(&node.name, &node.netns, process, METRICS)
    }

    /// The command line of a node's agent.
    #[must_use]
    pub fn agent_arguments(&self, node: &str) -> Vec<String> {
        let program = outgate();
        let bpffs = self.bpffs(node);
        let words =
            [utf8(&program), "agent", "--node", node, "--source", &self.source(), "--bpffs", utf8(&bpffs)];
        // All nodes of a lab have one file system.
        let (results, socket) = (self.cni_results(node), self.cni_socket(node));
        let cni = ["--cni-results", utf8(&results), "--cni-socket", utf8(&socket)];
        words.into_iter().chain(cni).chain(["--metrics", METRICS]).map(str::to_owned).collect()
    }

    /// Where a node's programs and maps are pinned.
    #[must_use]
    pub fn bpffs(&self, node: &str) -> PathBuf {
        self.dir().join("bpf").join(node)
    }

    /// A node's attached programs, as its pinned links say: by the link's name, the program's id and name.
    #[track_caller]
    #[must_use]
    pub fn programs(&self, node: &str) -> BTreeMap<String, (u64, String)> {
        let netns = &self.node(node).netns;
        let show = |words: &[&str]| -> Value {
            let text = netns.exec(&[&["bpftool", "-j"], words].concat());
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("bpftool: {error}: {text}"))
        };
        let links = self.pins(node).unwrap_or_else(|| panic!("{node} has no pins")).join("links");
        let entries = fs::read_dir(&links).unwrap_or_else(|error| panic!("{}: {error}", links.display()));
        entries
            .flatten()
            .map(|entry| {
                let link = show(&["link", "show", "pinned", utf8(&entry.path())]);
                let id = link["prog_id"].as_u64().expect("a link has a program");
                let program = show(&["prog", "show", "id", &id.to_string()]);
                let name = program["name"].as_str().unwrap_or_default().to_owned();
                (entry.file_name().to_string_lossy().into_owned(), (id, name))
            })
            .collect()
    }

    /// The entries of a node's pinned map as `bpftool` shows them, with the fields' names.
    #[track_caller]
    #[must_use]
    pub fn map(&self, node: &str, map: &str) -> Vec<Value> {
        self.try_map(node, map).unwrap_or_else(|| panic!("{node} has no map {map}"))
    }

    fn try_map(&self, node: &str, map: &str) -> Option<Vec<Value>> {
        let path = self.pins(node)?.join("maps").join(map);
        let output = self.node(node).netns.try_exec(&["bpftool", "-j", "map", "dump", "pinned", utf8(&path)]);
        let entries: Vec<Value> = serde_json::from_str(&output.stdout).ok()?;
        Some(entries.iter().map(|entry| entry["formatted"].clone()).collect())
    }

    /// How many packets a node's programs dropped, by reason, from the map: it is there without an agent as well.
    #[must_use]
    pub fn drops(&self, node: &str) -> BTreeMap<&'static str, u64> {
        let mut drops = BTreeMap::new();
        let entries = self.try_map(node, "DROPS").unwrap_or_default();
        for (entry, reason) in entries.iter().zip(DropReason::ALL) {
            let cpus = entry["values"].as_array().into_iter().flatten();
            let packets: u64 = cpus.filter_map(|cpu| cpu["value"]["packets"].as_u64()).sum();
            if packets > 0 {
                drops.insert(reason.name(), packets);
            }
        }
        drops
    }

    /// The one versioned directory of a node's pins.
    fn pins(&self, node: &str) -> Option<PathBuf> {
        let entries = fs::read_dir(self.bpffs(node)).ok()?;
        let versions: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        let [version] = &versions[..] else { return None };
        Some(version.clone())
    }

    /// The agents' source of objects.
    #[must_use]
    pub fn source(&self) -> String {
        format!("dir:{}", self.objects.dir().display())
    }

    /// Runs `outgate` on a node.
    #[track_caller]
    #[must_use]
    pub fn outgate(&self, node: &str, arguments: &[&str]) -> Output {
        let program = outgate();
        let mut words = vec![utf8(&program)];
        words.extend(arguments);
        self.node(node).netns.try_exec(&words)
    }

    /// `outgate status -o json`.
    #[track_caller]
    #[must_use]
    pub fn status(&self) -> Value {
        let output = self.outgate("node-a", &["status", "--source", &self.source(), "-o", "json"]);
        let text = output.expect_success();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("status is not JSON: {error}: {text}"))
    }

    /// The node that owns an egress IP, if one does.
    #[track_caller]
    #[must_use]
    pub fn owner(&self, address: &str) -> Option<String> {
        let status = self.status();
        let objects = status["egressIPs"].as_array().into_iter().flatten();
        let mut items = objects.filter_map(|object| object["items"].as_array()).flatten();
        let item = items.find(|item| item["egressIP"] == address)?;
        item["node"].as_str().filter(|node| !node.is_empty()).map(str::to_owned)
    }

    /// Waits until an egress IP has an owner.
    #[track_caller]
    #[must_use]
    pub fn wait_owner(&self, address: &str) -> String {
        eventually_ok(&format!("an owner of {address}"), Duration::from_secs(10), || {
            self.owner(address).ok_or_else(|| self.status().to_string())
        })
    }

    /// Waits until a server sees the pod's (or any namespace's) TCP connections with this source.
    #[track_caller]
    pub fn wait_source(&self, netns: &Netns, destination: &str, source: &str) {
        let what = format!("{destination} sees {} as {source}", netns.name());
        eventually_ok(&what, Duration::from_secs(10), || {
            match netns.tcp_source(destination, Duration::from_millis(300)) {
                Ok(seen) if seen == source => Ok(()),
                Ok(other) => Err(format!("it sees {other}")),
                Err(error) => Err(error),
            }
        });
    }
}

impl Agent {
    /// A started agent.
    pub(crate) fn new(node: &str, netns: &Netns, process: Process, metrics: &str) -> Self {
        Self { node: node.to_owned(), netns: netns.clone(), process, metrics: metrics.to_owned() }
    }

    /// Waits until it says it is ready.
    #[track_caller]
    pub fn wait_ready(&mut self) {
        let ready = eventually(READY, || {
            if let Some(status) = self.process.try_wait() {
                panic!("the agent of {} ended: {status}\n{}", self.node, self.log());
            }
            self.get("/readyz").success().then_some(())
        });
        let answer = ready.is_none().then(|| self.get("/readyz").explain());
        assert!(ready.is_some(), "{} is not ready after {READY:?}: {answer:?}\n{}", self.node, self.log());
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        format!("{}{}", self.process.stdout(), self.process.stderr())
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its metrics page.
    #[track_caller]
    #[must_use]
    pub fn metrics(&self) -> String {
        self.get("/metrics").expect_success()
    }

    /// The sum of a metric over those of its series whose line contains `text`.
    #[track_caller]
    #[must_use]
    pub fn metric(&self, name: &str, text: &str) -> u64 {
        let metrics = self.metrics();
        let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(text));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// Stops it as a rollout update does.
    #[track_caller]
    pub fn stop(self) {
        let output = self.process.terminate(Duration::from_secs(10));
        assert!(output.success(), "SIGTERM must end the agent with exit code 0: {}", output.explain());
    }

    /// Kills it as a crash does.
    pub fn kill(self) {
        self.process.kill();
    }

    /// Stops it where it is, as a machine that is out of memory or suspended does.
    pub fn pause(&self) {
        signal(self.pid(), Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        signal(self.pid(), Signal::CONT);
    }

    /// Leaves it running when the value is dropped.
    pub fn detach(&mut self) {
        self.process.detach();
    }

    /// What it answers on a path: its metrics or its probes.
    #[track_caller]
    #[must_use]
    pub fn get(&self, path: &str) -> Output {
        let url = format!("http://{}{path}", self.metrics);
        self.netns.try_exec(&["curl", "--silent", "--show-error", "--fail", "--max-time", "2", &url])
    }
}

/// The `outgate` program under test: `OUTGATE_BIN`, or the one cargo built beside this package's programs.
#[must_use]
pub fn outgate() -> PathBuf {
    if let Some(path) = env::var_os("OUTGATE_BIN") {
        return path.into();
    }
    crate::lab::helper_path("outgate")
}
