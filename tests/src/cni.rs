//! Pods, made by the CNI plugins that clusters use, in the order and with the words that a container runtime does.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::agent::outgate;
use crate::command::{Output, Process, eventually};
use crate::family::Family;
use crate::lab::{Lab, Node, choose, helper_path, utf8};
use crate::netns::Netns;
use crate::objects::{Objects, PodObject};

/// Where Debian's containernetworking-plugins are.
const PLUGINS: &str = "/usr/lib/cni";

/// Which plugin connects a node's pods. Both masquerade what leaves the node's pod network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cni {
    /// A veth pair and a host route for each pod.
    Ptp,
    /// A bridge `cni0` for all pods of a node.
    Bridge,
}

impl Cni {
    /// The network configuration that a kubelet's `/etc/cni/net.d` would hold.
    fn config(self, node: &Node, data: &str) -> Value {
        let networks = node.pod_networks();
        let ranges: Vec<_> = networks.iter().map(|network| json!([{ "subnet": network }])).collect();
        let everything = ["0.0.0.0/0", "::/0"].map(|all| json!({ "dst": all }));
        let ipam = json!({
            "type": "host-local",
            "dataDir": data,
            "ranges": ranges,
            "routes": everything[..networks.len()],
        });
        let mut config = match self {
            Self::Ptp => json!({
                "cniVersion": "1.0.0", "name": "lab", "type": "ptp", "ipMasq": true, "ipam": ipam,
            }),
            Self::Bridge => json!({
                "cniVersion": "1.0.0", "name": "lab", "type": "bridge", "ipMasq": true, "ipam": ipam,
                "bridge": "cni0", "isGateway": true, "hairpinMode": true,
            }),
        };
        if let Some(mtu) = node.pod_mtu {
            config["mtu"] = json!(mtu);
        }
        config
    }

    fn plugin(self) -> &'static str {
        match self {
            Self::Ptp => "/usr/lib/cni/ptp",
            Self::Bridge => "/usr/lib/cni/bridge",
        }
    }
}

/// A pod to be made.
#[derive(Debug, Clone)]
pub struct PodSpec {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) labels: Vec<(String, String)>,
    ip: Option<String>,
    unannounced: bool,
    pending: bool,
    cached: bool,
    chained: Option<Value>,
    early: Vec<String>,
}

impl PodSpec {
    /// A pod by namespace and name.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            labels: Vec::new(),
            ip: None,
            unannounced: false,
            pending: false,
            cached: false,
            chained: None,
            early: Vec::new(),
        }
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.push((key.into(), value.into()));
        self
    }

    /// Asks the plugin for this address.
    #[must_use]
    pub fn ip(mut self, ip: &str) -> Self {
        self.ip = Some(ip.into());
        self
    }

    /// Starts one of this package's programs in the pod before its network is made, and waits until it says
    /// `running`: it can speak from the interface's first moment.
    #[must_use]
    pub fn early(mut self, words: &[&str]) -> Self {
        self.early = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Leaves the pod's object without an address, as it is until the kubelet has reported the pod's status.
    #[must_use]
    pub fn pending(mut self) -> Self {
        self.pending = true;
        self
    }

    /// Keeps the result in libcni's cache, where the node's agent looks.
    #[must_use]
    pub fn cached(mut self) -> Self {
        self.cached = true;
        self
    }

    /// Chains Outgate's CNI plugin behind the one that makes the network, with further fields of its
    /// configuration.
    #[must_use]
    pub fn chained(mut self, more: Value) -> Self {
        self.chained = Some(more);
        self
    }

    /// Makes the pod without any object: the agents have never heard of it.
    #[must_use]
    pub fn unannounced(mut self) -> Self {
        self.unannounced = true;
        self
    }
}

/// A running pod.
#[derive(Debug)]
pub struct Pod {
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The node it runs on.
    pub node: String,
    /// Its IPv4 address.
    pub ip: String,
    /// Its IPv6 address; empty in a lab of IPv4.
    pub ip6: String,
    /// Its network namespace.
    pub netns: Netns,
    /// Its interface's other end, in the node's namespace.
    pub host_interface: String,
    /// The program that was there before the network ([`PodSpec::early`]).
    pub early: Option<Process>,
    spec: PodSpec,
    object: PodObject,
    objects: Objects,
    node_netns: Netns,
    dual_stack: bool,
    config: Value,
    cni: Cni,
    /// Outgate's plugin, under its name.
    outgate_cni: PathBuf,
    /// libcni's directory of results.
    results: PathBuf,
    /// Counts its sandboxes.
    sandbox: u32,
    /// What the last ADD gave.
    result: Value,
    /// How long Outgate's plugin took in the last ADD, its start included.
    pub held: Duration,
    /// When the runtime had done its part, the writing of its cache included: by the machine's monotonic clock, in
    /// nanoseconds.
    pub ready_at: i64,
}

impl Lab {
    /// Runs a pod in the order a kubelet does: the object without an address, the network, the address.
    #[track_caller]
    #[must_use]
    pub fn run_pod(&self, node: &str, spec: &PodSpec) -> Pod {
        let mut pod = self.prepare_pod(node, spec);
        if let Err(output) = pod.connect() {
            panic!("{}", output.explain());
        }
        pod
    }

    /// The first half of [`Lab::run_pod`]: the object and a sandbox without a network.
    #[track_caller]
    #[must_use]
    pub fn prepare_pod(&self, node: &str, spec: &PodSpec) -> Pod {
        let node = self.node(node);
        let object = PodObject::new(&spec.namespace, &spec.name, &node.name, &spec.labels);
        if !spec.unannounced {
            self.objects.write_pod(&object, &[]);
        }
        let data: PathBuf = self.dir().join("ipam").join(&node.name);
        let mut pod = Pod {
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            node: node.name.clone(),
            ip: String::new(),
            ip6: String::new(),
            netns: Netns::create(&format!("{}-{}-{}", self.id(), spec.namespace, spec.name), self.dir()),
            host_interface: String::new(),
            early: None,
            spec: spec.clone(),
            object,
            objects: self.objects.clone(),
            node_netns: node.netns.clone(),
            dual_stack: !node.pod_prefix6.is_empty(),
            config: node.cni.config(node, utf8(&data)),
            cni: node.cni,
            outgate_cni: self.outgate_cni(),
            results: self.cni_results(&node.name),
            sandbox: 0,
            result: Value::Null,
            held: Duration::ZERO,
            ready_at: 0,
        };
        pod.begin_sandbox();
        pod
    }

    /// Where a node's runtime keeps libcni's results.
    #[must_use]
    pub fn cni_results(&self, node: &str) -> PathBuf {
        self.dir().join("cni").join(node).join("results")
    }

    /// Where a node's agent serves Outgate's CNI plugin.
    #[must_use]
    pub fn cni_socket(&self, node: &str) -> PathBuf {
        self.dir().join("cni").join(format!("{node}.sock"))
    }

    /// `outgate` by the name that makes it a CNI plugin.
    fn outgate_cni(&self) -> PathBuf {
        let path = self.dir().join("outgate-cni");
        match symlink(outgate(), &path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                panic!("{}: {error}", path.display())
            }
            _ => path,
        }
    }
}

impl Pod {
    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Runs a command in the pod that must succeed; gives its standard output.
    #[track_caller]
    #[expect(clippy::must_use_candidate, reason = "commands are run for their effect as often")]
    pub fn exec(&self, words: &[&str]) -> String {
        self.netns.exec(words)
    }

    /// Runs a command in the pod to its end.
    #[track_caller]
    #[must_use]
    pub fn try_exec(&self, words: &[&str]) -> Output {
        self.netns.try_exec(words)
    }

    /// Starts a program in the pod.
    #[track_caller]
    #[must_use]
    pub fn spawn(&self, label: &str, words: &[&str]) -> Process {
        self.netns.spawn(label, words, &[])
    }

    /// Replaces the pod's labels.
    pub fn set_labels(&mut self, labels: &[(&str, &str)]) {
        self.object.labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.announce();
    }

    /// Tells the agents of a pod that was made unannounced.
    pub fn announce(&self) {
        let ips = [&*self.ip, &*self.ip6];
        self.objects.write_pod(&self.object, if self.ip6.is_empty() { &ips[..1] } else { &ips });
    }

    /// Tells the agents of a pod that was made unannounced, without its address.
    pub fn announce_pending(&self) {
        self.objects.write_pod(&self.object, &[]);
    }

    /// [`Pod::announce_pending`], to be called while the pod itself is lent.
    #[must_use]
    pub fn announcer(&self) -> impl Fn() + use<> {
        let (objects, object) = (self.objects.clone(), self.object.clone());
        move || objects.write_pod(&object, &[])
    }

    /// Writes a file into libcni's cache that gives this pod the network of another: what is left of a sandbox
    /// whose address is given again.
    #[track_caller]
    pub fn write_result_of(&mut self, other: &Self) {
        self.result = other.result.clone();
        self.write_result();
    }

    /// Its address of a family, which it must have.
    #[track_caller]
    #[must_use]
    pub fn ip_of(&self, family: Family) -> &str {
        choose(&self.name, family, &self.ip, &self.ip6)
    }

    /// Ends the pod as a kubelet does: its network first, then its object.
    #[track_caller]
    pub fn delete(self) {
        self.end_network();
        self.remove_object();
    }

    /// The first half of [`Pod::delete`]: the network is gone, the object is not yet.
    #[track_caller]
    pub fn end_network(&self) {
        self.del();
        // The plugin has taken the interface; the namespace may still have processes, as a slow container has.
        let (name, path) = (self.netns.name(), self.netns.path());
        let _ = crate::command::run(&["ip", "netns", "del", name], &[], "").expect_success();
        let gone = eventually(Duration::from_secs(2), || (!path.exists()).then_some(()));
        assert!(gone.is_some(), "{} is still there", path.display());
    }

    /// The second half of [`Pod::delete`].
    pub fn remove_object(&self) {
        self.objects.remove_pod(&self.object);
    }

    /// The second half of [`Lab::run_pod`]: the network, and what the kubelet reports of it. If a plugin refuses,
    /// its output; the network is then removed again, and may be tried anew, as runtimes do.
    #[track_caller]
    pub fn connect(&mut self) -> Result<(), Output> {
        self.sandbox += 1;
        let added = self.add();
        match added {
            Ok(result) => self.take_up(result),
            Err(output) => {
                self.del();
                return Err(output);
            }
        }
        if self.spec.cached {
            self.write_result();
        }
        let now = clock_gettime(ClockId::Monotonic);
        self.ready_at = now.tv_sec * 1_000_000_000 + now.tv_nsec;
        if !self.spec.unannounced && !self.spec.pending {
            self.announce();
        }
        Ok(())
    }

    /// Ends the sandbox and makes another for the same pod, without a network yet, as when it has crashed.
    #[track_caller]
    pub fn new_sandbox(&mut self) {
        self.end_network();
        self.netns = self.netns.again();
        self.begin_sandbox();
    }

    /// What was there before the network.
    fn begin_sandbox(&mut self) {
        if self.dual_stack {
            self.netns.without_dad();
        }
        self.early = self.spec.early.split_first().map(|(program, words)| {
            let program = helper_path(program);
            let words: Vec<_> =
                [utf8(&program)].into_iter().chain(words.iter().map(String::as_str)).collect();
            let mut process = self.netns.spawn("early", &words, &[]);
            process.wait_stdout("running", Duration::from_secs(10));
            process
        });
    }

    fn take_up(&mut self, result: Value) {
        (self.ip, self.ip6) = (String::new(), String::new());
        for ip in result["ips"].as_array().expect("addresses") {
            let address = ip["address"].as_str().expect("an address");
            let address = address.split('/').next().expect("a part");
            let place = if Family::of(address) == Family::V4 { &mut self.ip } else { &mut self.ip6 };
            address.clone_into(place);
        }
        // Both plugins report the pod's interface with its sandbox, the host's without.
        let interfaces = result["interfaces"].as_array().expect("interfaces");
        let host_side = interfaces.iter().filter(|interface| {
            interface["sandbox"].as_str().unwrap_or_default().is_empty() && interface["name"] != "cni0"
        });
        let names: Vec<_> = host_side.filter_map(|interface| interface["name"].as_str()).collect();
        assert_eq!(names.len(), 1, "one interface at the host's side: {result}");
        names[0].clone_into(&mut self.host_interface);
        self.result = result;
    }

    /// Calls the chain's plugins in order, each with the result of the one before (libcni, `AddNetworkList`).
    #[track_caller]
    fn add(&mut self) -> Result<Value, Output> {
        let parse = |text: &str| serde_json::from_str(text).expect("the plugin's result is JSON");
        let result: Value = parse(&self.call_plugin("ADD", self.cni.plugin(), &self.config).expect_success());
        let Some(config) = self.chained(&result) else { return Ok(result) };
        let began = Instant::now();
        let output = self.call_plugin("ADD", utf8(&self.outgate_cni), &config);
        self.held = began.elapsed();
        if !output.success() {
            return Err(output);
        }
        let printed: Value = parse(&output.stdout);
        assert_eq!(printed, result, "the plugin prints prevResult unchanged");
        Ok(printed)
    }

    /// The same backwards (libcni, `DelNetworkList`).
    #[track_caller]
    fn del(&self) {
        if let Some(config) = self.chained(&self.result) {
            let _ = self.call_plugin("DEL", utf8(&self.outgate_cni), &config).expect_success();
        }
        let _ = self.call_plugin("DEL", self.cni.plugin(), &self.config).expect_success();
        match fs::remove_file(self.result_file()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
            _ => {}
        }
    }

    /// The configuration of Outgate's plugin, if it is in the chain.
    #[must_use]
    pub fn chained(&self, result: &Value) -> Option<Value> {
        let mut config = self.spec.chained.clone()?;
        config["cniVersion"] = self.config["cniVersion"].clone();
        config["name"] = self.config["name"].clone();
        config["type"] = json!("outgate-cni");
        if !result.is_null() {
            config["prevResult"] = result.clone();
        }
        Some(config)
    }

    /// Calls Outgate's plugin alone, with the last result.
    #[track_caller]
    #[must_use]
    pub fn call_outgate(&self, command: &str) -> Output {
        let config = self.chained(&self.result).expect("the plugin is in the chain");
        self.call_plugin(command, utf8(&self.outgate_cni), &config)
    }

    /// The sandbox's identifier: a runtime gives each another.
    fn container(&self) -> String {
        format!("{}-{}", self.netns.name(), self.sandbox)
    }

    /// What runtimes say of a pod (containerd, `cniNamespaceOpts`; cri-o/ocicni, `newRuntimeConfig`).
    fn arguments(&self) -> Vec<(&str, String)> {
        let mut arguments = vec![
            ("IgnoreUnknown", "1".to_owned()),
            ("K8S_POD_NAMESPACE", self.namespace.clone()),
            ("K8S_POD_NAME", self.name.clone()),
            ("K8S_POD_INFRA_CONTAINER_ID", self.container()),
            ("K8S_POD_UID", self.object.uid.clone()),
        ];
        arguments.extend(self.spec.ip.clone().map(|ip| ("IP", ip)));
        arguments
    }

    fn result_file(&self) -> PathBuf {
        let network = self.config["name"].as_str().expect("a name");
        self.results.join(format!("{network}-{}-eth0", self.container()))
    }

    /// Writes the last result as libcni does: `cachedInfo` and `cacheAdd` in containernetworking/cni,
    /// libcni/api.go. `config` is base64 there; nobody reads it here.
    #[track_caller]
    pub fn write_result(&self) {
        let info = json!({
            "kind": "cniCacheV1",
            "containerId": self.container(),
            "config": "",
            "ifName": "eth0",
            "networkName": self.config["name"],
            "netns": self.netns.path(),
            "cniArgs": self.arguments(),
            "result": self.result,
        });
        let path = self.result_file();
        let written = path.parent().map_or(Ok(()), fs::create_dir_all);
        let written = written.and_then(|()| fs::write(&path, info.to_string()));
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// Calls a plugin in the node's namespace.
    #[track_caller]
    fn call_plugin(&self, command: &str, plugin: &str, config: &Value) -> Output {
        let (path, container) = (self.netns.path(), self.container());
        let arguments: Vec<_> = self.arguments().iter().map(|(k, v)| format!("{k}={v}")).collect();
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", &container),
            ("CNI_NETNS", utf8(&path)),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", PLUGINS),
            ("CNI_ARGS", &arguments.join(";")),
        ];
        self.node_netns.exec_input(&[plugin], &environment, &config.to_string())
    }
}
