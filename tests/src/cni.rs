//! Pods, made by the CNI plugins that clusters use.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

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
    object: PodObject,
    objects: Objects,
    node_netns: Netns,
    config: String,
    cni: Cni,
}

impl Lab {
    /// Runs a pod in the order a kubelet does: the object without an address, the network, the address.
    #[track_caller]
    #[must_use]
    pub fn run_pod(&self, node: &str, spec: &PodSpec) -> Pod {
        let node = self.node(node);
        let object = PodObject::new(&spec.namespace, &spec.name, &node.name, &spec.labels);
        if !spec.unannounced {
            self.objects.write_pod(&object, &[]);
        }
        let netns = Netns::create(&format!("{}-{}-{}", self.id(), spec.namespace, spec.name), self.dir());
        if !node.pod_prefix6.is_empty() {
            netns.without_dad();
        }
        let early = spec.early.split_first().map(|(program, words)| {
            let program = helper_path(program);
            let words: Vec<_> =
                [utf8(&program)].into_iter().chain(words.iter().map(String::as_str)).collect();
            let mut process = netns.spawn("early", &words, &[]);
            process.wait_stdout("running", Duration::from_secs(10));
            process
        });
        let data: PathBuf = self.dir().join("ipam").join(&node.name);
        let config = node.cni.config(node, utf8(&data)).to_string();
        let mut pod = Pod {
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            node: node.name.clone(),
            ip: String::new(),
            ip6: String::new(),
            netns,
            host_interface: String::new(),
            early,
            object,
            objects: self.objects.clone(),
            node_netns: node.netns.clone(),
            config,
            cni: node.cni,
        };
        let mut arguments = String::from("IgnoreUnknown=1");
        if let Some(ip) = &spec.ip {
            let _ = write!(arguments, ";IP={ip}");
        }
        let result = pod.call_plugin("ADD", &arguments).expect_success();
        let result: Value = serde_json::from_str(&result).expect("the plugin's result is JSON");
        for ip in result["ips"].as_array().expect("addresses") {
            let address = ip["address"].as_str().expect("an address");
            let address = address.split('/').next().expect("a part");
            let place = if Family::of(address) == Family::V4 { &mut pod.ip } else { &mut pod.ip6 };
            address.clone_into(place);
        }
        // Both plugins report the pod's interface with its sandbox, the host's without.
        let interfaces = result["interfaces"].as_array().expect("interfaces");
        let host_side = interfaces.iter().filter(|interface| {
            interface["sandbox"].as_str().unwrap_or_default().is_empty() && interface["name"] != "cni0"
        });
        let names: Vec<_> = host_side.filter_map(|interface| interface["name"].as_str()).collect();
        assert_eq!(names.len(), 1, "one interface at the host's side: {result}");
        names[0].clone_into(&mut pod.host_interface);
        if !spec.unannounced {
            pod.announce();
        }
        pod
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
        let _ = self.call_plugin("DEL", "IgnoreUnknown=1").expect_success();
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

    /// Calls the plugin in the node's namespace.
    #[track_caller]
    fn call_plugin(&self, command: &str, arguments: &str) -> Output {
        let path = self.netns.path();
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", self.netns.name()),
            ("CNI_NETNS", utf8(&path)),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", PLUGINS),
            ("CNI_ARGS", arguments),
        ];
        self.node_netns.exec_input(&[self.cni.plugin()], &environment, &self.config)
    }
}
