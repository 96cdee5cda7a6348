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
use crate::command::{self, eventually, eventually_ok, keep_failed, signal};
use crate::family::{Family, solicited_node};
use crate::netns::{Netns, identity};
use crate::objects::Objects;
use crate::record;

/// The prefixes of the lab's networks: IPv4 /24, IPv6 /64.
struct Network {
    v4: &'static str,
    v6: &'static str,
}

impl Network {
    /// An address in each family; in IPv6 the digits of `last` are read as hexadecimal.
    fn host(&self, last: usize) -> [String; 2] {
        [format!("{}.{last}", self.v4), format!("{}::{last}", self.v6)]
    }
}

/// Between the nodes.
const UNDERLAY: Network = Network { v4: "172.18.0", v6: "2001:db8:172:18" };
/// The nodes' second network.
const SECOND: Network = Network { v4: "172.19.0", v6: "fd00:172:19" };
/// Outside.
const OUTSIDE: Network = Network { v4: "203.0.113", v6: "2001:db8:203" };
/// The pods' networks, all nodes' together.
pub(crate) const POD_NETWORKS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];
/// The services' networks.
pub(crate) const SERVICE_NETWORKS: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
/// Whether iptables sees what a namespace's bridges forward.
const BRIDGE_CALLS: &str = "net.bridge.bridge-nf-call-iptables";
/// The table of a node's routes by its second uplink.
const SECOND_TABLE: u32 = 119;

/// How a node is connected to its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uplink {
    /// `eth0` is the interface, and has the addresses.
    Plain,
    /// `eth0` is a port of the bridge `br-ex`, which has the addresses.
    Bridge,
    /// `eth0` is a macvlan on an interface in a namespace outside the node.
    Macvlan,
    /// `eth0` is a macvlan on the node's own interface `under0`: every packet passes both, as with a VLAN on a
    /// bond.
    Stacked,
}

/// Who has addresses of which families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Families {
    /// Everybody has IPv4 only.
    V4,
    /// Everybody has both.
    Both,
    /// Everybody has both, but the nodes' network, which has IPv6 only.
    BothOverV6,
}

/// What to make.
#[derive(Debug, Clone)]
pub struct LabSpec {
    nodes: usize,
    cni: Cni,
    rp_filter: u8,
    routed_pods: bool,
    families: Families,
    mtu: Option<u32>,
    pod_mtu: Option<u32>,
    uplink: Uplink,
    second_uplink: bool,
    snooping: bool,
}

impl Default for LabSpec {
    fn default() -> Self {
        Self {
            nodes: 3,
            cni: Cni::Ptp,
            rp_filter: 1,
            routed_pods: false,
            families: Families::V4,
            mtu: None,
            pod_mtu: None,
            uplink: Uplink::Plain,
            second_uplink: false,
            snooping: false,
        }
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

    /// Nodes, pods and hosts have IPv6 addresses too (no).
    #[must_use]
    pub fn dual_stack(mut self) -> Self {
        if self.families == Families::V4 {
            self.families = Families::Both;
        }
        self
    }

    /// Dual-stack pods and outside hosts, but the nodes' network has IPv6 only.
    #[must_use]
    pub fn ipv6_only_underlay(mut self) -> Self {
        self.families = Families::BothOverV6;
        self
    }

    /// The MTU of the nodes' networks (1500). Pods and outside keep 1500.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// The MTU that the CNI plugin gives the pods (1500).
    #[must_use]
    pub fn pod_mtu(mut self, mtu: u32) -> Self {
        self.pod_mtu = Some(mtu);
        self
    }

    /// How the nodes are connected to their network (plainly).
    #[must_use]
    pub fn uplink(mut self, uplink: Uplink) -> Self {
        self.uplink = uplink;
        self
    }

    /// Each node's `eth1` is on a second network, with a router that leads outside as well. Routes by it are in
    /// a table of their own, which packets from that network's addresses ask, and those bound to `eth1`.
    #[must_use]
    pub fn second_uplink(mut self) -> Self {
        self.second_uplink = true;
        self
    }

    /// The wire between the nodes snoops multicast and has a querier: it takes groups to members only, as
    /// switches do. [`Lab::wait_snooping`] waits until it does.
    #[must_use]
    pub fn snooping(mut self) -> Self {
        self.snooping = true;
        self
    }

    fn v6(&self) -> bool {
        self.families != Families::V4
    }

    /// Those of a pair of IPv4 and IPv6 that the nodes' network has.
    fn on_underlay<T>(&self, [v4, v6]: [T; 2]) -> Vec<T> {
        match self.families {
            Families::V4 => vec![v4],
            Families::Both => vec![v4, v6],
            Families::BothOverV6 => vec![v6],
        }
    }

    /// Those of a pair of IPv4 and IPv6 that pods and outside hosts have.
    fn on_others<T>(&self, [v4, v6]: [T; 2]) -> Vec<T> {
        match self.families {
            Families::V4 => vec![v4],
            Families::Both | Families::BothOverV6 => vec![v4, v6],
        }
    }
}

/// One node.
#[derive(Debug, Clone)]
pub struct Node {
    /// `node-a`, `node-b`, …
    pub name: String,
    /// Its own network namespace.
    pub netns: Netns,
    /// Its IPv4 address; empty where the nodes' network has IPv6 only.
    pub address: String,
    /// Its IPv6 address; empty in a lab of IPv4.
    pub address6: String,
    /// The interface that has its addresses.
    pub uplink: String,
    /// Its pods' IPv4 addresses, without the last number: `10.244.1`.
    pub pod_prefix: String,
    /// Its pods' IPv6 addresses, without the last number: `fd00:10:244:1`; empty in a lab of IPv4.
    pub pod_prefix6: String,
    /// Which plugin connects its pods.
    pub cni: Cni,
    pub(crate) pod_mtu: Option<u32>,
}

impl Node {
    fn new(spec: &LabSpec, index: usize, netns: impl Fn(&str) -> Netns) -> Self {
        let name = format!("node-{}", char::from(b'a' + index as u8));
        let addresses = spec.on_underlay(UNDERLAY.host(11 + index));
        let of = |family| addresses.iter().find(|a| Family::of(a) == family).cloned().unwrap_or_default();
        Self {
            netns: netns(&name),
            name,
            address: of(Family::V4),
            address6: of(Family::V6),
            uplink: if spec.uplink == Uplink::Bridge { "br-ex" } else { "eth0" }.into(),
            pod_prefix: format!("10.244.{}", 1 + index),
            pod_prefix6: if spec.v6() { format!("fd00:10:244:{}", 1 + index) } else { String::new() },
            cni: spec.cni,
            pod_mtu: spec.pod_mtu,
        }
    }

    /// Sets the kernel's parameters as a kubelet and a distribution do.
    fn settle(&self, spec: &LabSpec) {
        let mode = spec.rp_filter;
        let mut settings = vec![
            "net.ipv4.ip_forward=1".to_owned(),
            format!("net.ipv4.conf.all.rp_filter={mode}"),
            format!("net.ipv4.conf.default.rp_filter={mode}"),
        ];
        let bridges = Path::new("/proc/sys/net/bridge").exists();
        // As kubeadm asks for.
        settings.extend(bridges.then(|| format!("{BRIDGE_CALLS}=1")));
        if spec.v6() {
            settings.push("net.ipv6.conf.all.forwarding=1".to_owned());
            settings.extend(bridges.then(|| "net.bridge.bridge-nf-call-ip6tables=1".to_owned()));
        }
        self.netns.sysctl(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Makes its uplink.
    fn connect(&self, spec: &LabSpec, wire: &Netns, netns: impl Fn(&str) -> Netns) {
        let plug = |netns: &Netns, name: &str| plug(netns, name, wire, &self.name, "br0", spec.mtu);
        match spec.uplink {
            Uplink::Plain => plug(&self.netns, "eth0"),
            Uplink::Bridge => {
                plug(&self.netns, "eth0");
                self.netns.ip(&[
                    "link add br-ex type bridge forward_delay 0 mcast_snooping 0",
                    "link set eth0 master br-ex",
                    "link set br-ex up",
                ]);
            }
            Uplink::Macvlan => {
                let machine = netns(&format!("{}-machine", self.name));
                plug(&machine, "eth0");
                let to = self.netns.name();
                machine.ip(&[&format!("link add link eth0 name eth0 netns {to} type macvlan mode bridge")]);
                self.netns.ip(&["link set eth0 up"]);
            }
            Uplink::Stacked => {
                plug(&self.netns, "under0");
                let add = "link add link under0 name eth0 type macvlan mode bridge";
                self.netns.ip(&[add, "link set eth0 up"]);
            }
        }
    }

    /// Its address of a family, which it must have.
    #[track_caller]
    #[must_use]
    pub fn address_of(&self, family: Family) -> &str {
        choose(&self.name, family, &self.address, &self.address6)
    }

    /// Its addresses: IPv4, IPv6.
    pub(crate) fn addresses(&self) -> Vec<&str> {
        [&*self.address, &*self.address6].into_iter().filter(|address| !address.is_empty()).collect()
    }

    /// The routes by which others reach its pods, in the families that both pods and nodes have.
    fn ways_to_pods(&self) -> Vec<String> {
        let networks = self.pod_networks();
        let pairs = networks.iter().filter_map(|network| {
            let via = self.addresses().into_iter().find(|via| Family::of(via) == Family::of(network))?;
            Some(format!("route add {network} via {via}"))
        });
        pairs.collect()
    }

    /// Its pods' networks: IPv4, IPv6.
    pub(crate) fn pod_networks(&self) -> Vec<String> {
        let v6 = (!self.pod_prefix6.is_empty()).then(|| format!("{}::/64", self.pod_prefix6));
        [format!("{}.0/24", self.pod_prefix)].into_iter().chain(v6).collect()
    }
}

/// A host that is no part of the cluster.
#[derive(Debug, Clone)]
pub struct Host {
    /// Its network namespace.
    pub netns: Netns,
    /// Its IPv4 address on `eth0`; empty for the neighbour where the nodes' network has IPv6 only.
    pub address: String,
    /// Its IPv6 address on `eth0`; empty in a lab of IPv4.
    pub address6: String,
}

impl Host {
    fn new(netns: Netns, addresses: Vec<String>, via: &[String]) -> Self {
        give(&netns, "eth0", &addresses);
        let ways: Vec<_> = via.iter().map(|via| format!("route add default via {via}")).collect();
        netns.ip(&ways.iter().map(String::as_str).collect::<Vec<_>>());
        let mut host = Self { netns, address: String::new(), address6: String::new() };
        for address in addresses {
            match Family::of(&address) {
                Family::V4 => host.address = address,
                Family::V6 => host.address6 = address,
            }
        }
        host
    }

    /// Its address of a family, which it must have.
    #[track_caller]
    #[must_use]
    pub fn address_of(&self, family: Family) -> &str {
        choose(self.netns.name(), family, &self.address, &self.address6)
    }
}

/// The address of a family among two, which must be there.
#[track_caller]
pub(crate) fn choose<'a>(who: &str, family: Family, v4: &'a str, v6: &'a str) -> &'a str {
    let address = match family {
        Family::V4 => v4,
        Family::V6 => v6,
    };
    assert!(!address.is_empty(), "{who} has no {family:?} address in this lab");
    address
}

/// A small network of nodes, a router and outside hosts.
#[derive(Debug)]
pub struct Lab {
    /// The nodes, `node-a` first.
    pub nodes: Vec<Node>,
    /// Routes between the nodes' network and the outside.
    pub router: Netns,
    /// An outside host behind the router, for servers: 203.0.113.10, `2001:db8:203::10`.
    pub web: Host,
    /// Another outside host behind the router: 203.0.113.20, `2001:db8:203::20`.
    pub other: Host,
    /// An outside host on the nodes' own network: 172.18.0.250, `2001:db8:172:18::250`. It asks for egress IPs by
    /// ARP and neighbour discovery itself.
    pub neighbour: Host,
    /// The directory of Kubernetes objects that the agents read.
    pub objects: Objects,
    /// The switch between the nodes, as a namespace with the bridge `br0`.
    wire: Netns,
    mtu: Option<u32>,
    underlay: Families,
    /// Whether nodes, pods and hosts have IPv6 addresses.
    pub(crate) v6: bool,
    /// Whether outside hosts know the way to pods, and so may see their addresses.
    routed_pods: bool,
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
        let netns = |name: &str| {
            let netns = Netns::create(&format!("{}-{name}", home.id), &home.dir);
            if spec.v6() {
                netns.without_dad();
            }
            netns
        };

        // The wire between the nodes is a namespace of its own: no node sees another's bridge.
        let wire = netns("wire");
        wire.ip(&["link add br0 type bridge forward_delay 0", "link set br0 up"]);
        if spec.snooping {
            // A querier is believed once the time for answers to its first question is over: in hundredths.
            wire.ip(&["link set br0 type bridge mcast_snooping 1 mcast_query_response_interval 50"]);
            wire.ip(&["link set br0 type bridge mcast_querier 1"]);
        }
        if Path::new("/proc/sys/net/bridge").exists() {
            wire.sysctl(&[&format!("{BRIDGE_CALLS}=0")]);
        }

        let router = netns("router");
        router.sysctl(&["net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"]);
        if spec.v6() {
            router.sysctl(&["net.ipv6.conf.all.forwarding=1"]);
        }
        let gateways = UNDERLAY.host(1);
        plug(&router, "eth0", &wire, "router", "br0", spec.mtu);
        give(&router, "eth0", &spec.on_underlay(gateways.clone()));
        router.ip(&["link add br1 type bridge forward_delay 0", "link set br1 up"]);
        give(&router, "br1", &spec.on_others(OUTSIDE.host(1)));
        if Path::new("/proc/sys/net/bridge").exists() {
            router.sysctl(&[&format!("{BRIDGE_CALLS}=0")]);
        }
        let outside = |name: &str, last: usize| {
            let netns = netns(name);
            plug(&netns, "eth0", &router, name, "br1", None);
            Host::new(netns, spec.on_others(OUTSIDE.host(last)), &spec.on_others(OUTSIDE.host(1)))
        };
        let (web, other) = (outside("web", 10), outside("other", 20));

        let neighbour = netns("neighbour");
        plug(&neighbour, "eth0", &wire, "neighbour", "br0", spec.mtu);
        let neighbour =
            Host::new(neighbour, spec.on_underlay(UNDERLAY.host(250)), &spec.on_underlay(gateways.clone()));

        let nodes: Vec<Node> = (0..spec.nodes).map(|index| Node::new(spec, index, netns)).collect();
        for (index, node) in nodes.iter().enumerate() {
            node.settle(spec);
            node.connect(spec, &wire, netns);
            give(&node.netns, &node.uplink, &spec.on_underlay(UNDERLAY.host(11 + index)));
            let mut ways: Vec<_> = spec
                .on_underlay(gateways.clone())
                .iter()
                .map(|via| format!("route add default via {via}"))
                .collect();
            for other in nodes.iter().filter(|other| other.name != node.name) {
                ways.extend(other.ways_to_pods());
            }
            node.netns.ip(&ways.iter().map(String::as_str).collect::<Vec<_>>());
            node.proxy_rules();
            if spec.routed_pods {
                let ways = node.ways_to_pods();
                let ways: Vec<_> = ways.iter().map(String::as_str).collect();
                router.ip(&ways);
                neighbour.netns.ip(&ways);
            }
        }
        if spec.second_uplink {
            second_network(spec, &wire, &router, &nodes);
        }

        for host in [&web, &other, &neighbour] {
            record::watch_foreign_sources(&host.netns, &POD_NETWORKS);
        }

        let objects = Objects::new(&home.dir.join("objects"), spec.v6());
        Self {
            nodes,
            router,
            web,
            other,
            neighbour,
            objects,
            wire,
            mtu: spec.mtu,
            underlay: spec.families,
            v6: spec.v6(),
            routed_pods: spec.routed_pods,
            home,
            tolerated: Mutex::default(),
        }
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

    /// Makes a further host on the nodes' network, for what is beside the nodes in a cluster. `last` is the last
    /// number of its addresses, 200 to 249.
    #[track_caller]
    #[must_use]
    pub fn host_beside_nodes(&self, name: &str, last: usize) -> Host {
        assert!((200..250).contains(&last), "egress IPs and the lab's own hosts have the other addresses");
        let netns = Netns::create(&format!("{}-{name}", self.home.id), &self.home.dir);
        if self.v6 {
            netns.without_dad();
        }
        plug(&netns, "eth0", &self.wire, name, "br0", self.mtu);
        let spec = LabSpec { families: self.underlay, ..LabSpec::default() };
        Host::new(netns, spec.on_underlay(UNDERLAY.host(last)), &spec.on_underlay(UNDERLAY.host(1)))
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
        self.nodes.iter().find(|node| node.addresses().contains(&address))
    }

    /// Waits until the wire takes multicast to members only ([`LabSpec::snooping`]): a question for an address
    /// that nobody has reaches nobody any more.
    #[track_caller]
    pub fn wait_snooping(&self) {
        let nobody = format!("{}::dead", UNDERLAY.v6);
        let group = solicited_node(&nobody);
        let rules = format!(
            "table ip6 snooping {{
                counter asked {{}}
                chain in {{
                    type filter hook prerouting priority -500;
                    ip6 daddr {group} counter name asked
                }}
                chain out {{
                    type filter hook postrouting priority 500;
                    ip6 daddr {group} counter name asked
                }}
            }}"
        );
        let ends = [&self.neighbour.netns, &self.router];
        for netns in ends {
            let _ = netns.exec_input(&["nft", "-f", "-"], &[], &rules).expect_success();
        }
        eventually_ok("the wire snoops", Duration::from_secs(20), || {
            // The kernel repeats its question: one between two of these commands must count as heard, not as sent.
            for netns in ends.iter().rev() {
                let _ = netns.exec(&["nft", "reset", "counter", "ip6", "snooping", "asked"]);
            }
            let _ = self.neighbour.netns.try_exec(&["ping", "-6", "-c", "1", "-W", "0.2", &nobody]);
            let [sent, heard] = ends.map(|netns| {
                let text = netns.exec(&["nft", "list", "counter", "ip6", "snooping", "asked"]);
                !text.contains("packets 0 ")
            });
            if sent && !heard { Ok(()) } else { Err(format!("asked: {sent}, heard by others: {heard}")) }
        });
        for netns in ends {
            let _ = netns.exec(&["nft", "delete", "table", "ip6", "snooping"]);
        }
    }

    /// Warnings and errors in an agent's log, bad checksums and foreign sources fail the test when it ends; a
    /// line about them with this text does not.
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
                    "ip -6 route | grep -v ' fe80::/64 '",
                    "ip neigh",
                    "iptables-save -c | grep -v '^[#:]'",
                    "ip6tables-save -c | grep -v '^[#:]'",
                    "conntrack -L 2>/dev/null | head -12",
                ],
            );
        }
        for node in &self.nodes {
            let _ = writeln!(text, "=== drops of {}: {:?}", node.name, self.drops(&node.name));
        }
        let outside = [&self.router, &self.web.netns, &self.other.netns, &self.neighbour.netns];
        for netns in outside {
            look(&mut text, netns, &["ip -br addr", "ip route; ip -6 route", "ip neigh", "nft list ruleset"]);
        }
        let described = self.nodes.iter().map(|node| &node.netns).chain(outside);
        let described: Vec<_> = described.map(Netns::name).collect();
        for name in namespaces(&self.home.id).iter().filter(|name| !described.contains(&name.as_str())) {
            let _ = writeln!(text, "=== nsenter --net=/run/netns/{name}");
        }
        text
    }

    /// What no test may leave behind and no one announced with [`Lab::tolerate`]: warnings and errors in the
    /// agents' logs, packets with bad checksums anywhere, pods' addresses at outside hosts.
    fn complaints(&self) -> Vec<String> {
        let tolerated = self.tolerated.lock().unwrap_or_else(PoisonError::into_inner);
        let mut complaints = Vec::new();
        for (name, log) in self.agent_logs() {
            let bad = log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR"));
            complaints.extend(bad.map(|line| format!("{name}: {line}")));
        }
        let names = namespaces(&self.home.id);
        complaints.extend(names.iter().flat_map(|name| record::bad_checksums(name)));
        if !self.routed_pods {
            let outside = [&self.web, &self.other, &self.neighbour];
            complaints.extend(outside.iter().flat_map(|host| record::foreign_sources(&host.netns)));
        }
        complaints.retain(|line| !tolerated.iter().any(|text| line.contains(text)));
        complaints
    }

    fn agent_logs(&self) -> Vec<(String, String)> {
        let entries = fs::read_dir(&self.home.dir).into_iter().flatten().flatten();
        let mut logs: Vec<_> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let one_of_ours = name.contains("-agent-") || name.contains("-controller-");
                one_of_ours.then(|| (name, fs::read(entry.path()).unwrap_or_default()))
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
        assert!(complaints.is_empty(), "what no test may leave behind:\n{}", complaints.join("\n"));
    }
}

/// Connects a namespace's new interface to a bridge in another one.
fn plug(netns: &Netns, interface: &str, at: &Netns, port: &str, bridge: &str, mtu: Option<u32>) {
    let mtu = mtu.map(|mtu| format!("mtu {mtu}")).unwrap_or_default();
    netns.ip(&[&format!("link add {interface} {mtu} type veth peer name {port} {mtu} netns {}", at.name())]);
    at.ip(&[&format!("link set {port} master {bridge} up")]);
    netns.ip(&[&format!("link set {interface} up")]);
}

/// Adds addresses to an interface, usable at once.
fn give(netns: &Netns, interface: &str, addresses: &[String]) {
    let commands = addresses.iter().map(|address| match Family::of(address) {
        Family::V4 => format!("addr add {address}/24 dev {interface}"),
        Family::V6 => format!("addr add {address}/64 dev {interface} nodad"),
    });
    netns.ip(&commands.collect::<Vec<_>>().iter().map(String::as_str).collect::<Vec<_>>());
}

/// Connects the nodes and the router by a second network ([`LabSpec::second_uplink`]).
fn second_network(spec: &LabSpec, wire: &Netns, router: &Netns, nodes: &[Node]) {
    wire.ip(&["link add br1 type bridge forward_delay 0", "link set br1 up"]);
    plug(router, "eth1", wire, "router1", "br1", spec.mtu);
    let gateways = spec.on_others(SECOND.host(1));
    give(router, "eth1", &gateways);
    for (index, node) in nodes.iter().enumerate() {
        plug(&node.netns, "eth1", wire, &format!("{}1", node.name), "br1", spec.mtu);
        give(&node.netns, "eth1", &spec.on_others(SECOND.host(11 + index)));
        for gateway in &gateways {
            let (family, network) = match Family::of(gateway) {
                Family::V4 => (Family::V4, format!("{}.0/24", SECOND.v4)),
                Family::V6 => (Family::V6, format!("{}::/64", SECOND.v6)),
            };
            node.netns.ip(&[
                &format!("route add {network} dev eth1 table {SECOND_TABLE}"),
                &format!("route add default via {gateway} dev eth1 table {SECOND_TABLE}"),
            ]);
            for chooser in [["from", &network], ["oif", "eth1"]] {
                let table = SECOND_TABLE.to_string();
                // In a batch `ip rule` takes every rule for one of IPv4.
                let words = [&["ip", family.option(), "rule", "add"], &chooser[..], &["lookup", &table]];
                let _ = node.netns.exec(&words.concat());
            }
        }
    }
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
