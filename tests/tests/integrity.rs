//! Every byte through a gateway on another node is the byte that was sent, whoever computes checksums and segments.
//!
//! By default the sizes fit a test run; `OUTGATE_LAB_BYTES` and `OUTGATE_LAB_DATAGRAMS` ask for others:
//! `OUTGATE_LAB_BYTES=10000000000 OUTGATE_LAB_DATAGRAMS=1000000`.

use std::env;
use std::time::Duration;

use lab::hostile::Outside;
use lab::servers::ECHO;
use lab::{Agent, Cni, Lab, LabSpec, Netns, Pod, PodSpec, Process};
use serde_json::Value;

const EGRESS: &str = "172.18.0.101";
const BULK: u16 = 7000;

/// A number from the environment.
fn size(variable: &str, default: u64) -> u64 {
    let text = env::var(variable);
    text.map_or(default, |text| text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

struct Cluster {
    lab: Lab,
    _agents: Vec<Agent>,
    _servers: [Process; 2],
    pod: Pod,
    bulk: String,
}

/// A pod whose egress IP another node holds.
fn cluster(cni: Cni) -> Cluster {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let bulk = format!("{}:{BULK}", lab.web.address);
    let helper = lab::lab::helper_path("bulk");
    let mut server = lab.web.netns.spawn("bulk", &[helper.to_str().expect("UTF-8"), "serve", &bulk], &[]);
    server.wait_stdout("ready", Duration::from_secs(10));
    let servers = [server, lab.echo(&lab.web.netns)];
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &format!("{}:{ECHO}", lab.web.address), EGRESS);
    Cluster { lab, _agents: agents, _servers: servers, pod, bulk }
}

impl Cluster {
    /// Runs a client in the pod; gives its report.
    #[track_caller]
    fn client(&self, words: &[&str]) -> Value {
        let helper = lab::lab::helper_path("bulk");
        let output = self.pod.exec(&[&[helper.to_str().expect("UTF-8")], words].concat());
        serde_json::from_str(output.trim()).unwrap_or_else(|error| panic!("{error}: {output}"))
    }

    #[track_caller]
    fn stream(&self, bytes: u64, direction: &str) {
        let report =
            self.client(&["tcp", &self.bulk, "--bytes", &bytes.to_string(), "--direction", direction]);
        assert_eq!(
            (&report["bytes"], &report["wrong"]),
            (&bytes.into(), &Value::Null),
            "{direction}: {report}"
        );
    }

    /// Loss is no corruption, but most must have arrived for the rest to show anything.
    #[track_caller]
    fn datagrams(&self, count: u64) {
        let report = self.client(&["udp", &self.bulk, "--count", &count.to_string()]);
        assert_eq!(report["wrong"], 0, "{report}");
        let answered = report["answered"].as_u64().unwrap_or_default();
        assert!(answered > count / 2, "most were lost: {report}");
    }

    /// A receiver that sums itself finds what was updated wrongly; one that is told "not needed" does not.
    #[track_caller]
    fn expect_right_checksums(&self) {
        for netns in [&self.pod.netns, &self.lab.web.netns] {
            for protocol in ["Tcp", "Udp", "Icmp"] {
                assert_eq!(netns.snmp(protocol, "InCsumErrors"), 0, "{protocol} in {}", netns.name());
            }
        }
    }

    /// Every interface on the way, by namespace: the pod's, both ends of it, the nodes', the server's.
    fn interfaces(&self) -> Vec<Place<'_>> {
        let [a, b] = ["node-a", "node-b"].map(|node| &self.lab.node(node).netns);
        vec![
            (&self.pod.netns, "eth0"),
            (a, &self.pod.host_interface),
            (a, "eth0"),
            (b, "eth0"),
            (&self.lab.router, "eth0"),
            (&self.lab.router, "web"),
            (&self.lab.web.netns, "eth0"),
        ]
    }
}

/// An interface in its namespace.
type Place<'a> = (&'a Netns, &'a str);

fn set_offloads(interfaces: &[Place], settings: &[&str]) {
    for (netns, interface) in interfaces {
        let _ = netns.exec(&[&["ethtool", "-K", interface], settings].concat());
    }
}

/// All of it with everything as it is; then the same, less of it, in every way that a machine may be set up.
/// `part` of the sizes asked for.
fn every_byte_arrives(cni: Cni, part: u64) {
    let cluster = cluster(cni);
    let outside = Outside::watch(&cluster.lab);
    let bytes = size("OUTGATE_LAB_BYTES", 1_000_000_000) / part;
    let datagrams = size("OUTGATE_LAB_DATAGRAMS", 1_000_000) / part;
    for direction in ["up", "down"] {
        cluster.stream(bytes, direction);
    }
    cluster.datagrams(datagrams);

    let all = cluster.interfaces();
    let ends = [all[0], all[6]];
    let off = ["tso", "off", "gso", "off", "gro", "off"];
    let ways: [(&[Place], &[&str]); 4] = [
        // The ends compute checksums, and with them segment themselves.
        (&ends, &["tx", "off"]),
        (&all, &["gro", "on", "rx-udp-gro-forwarding", "on"]),
        (&all, &off),
        (&all, &["tx", "off", "rx", "off"]),
    ];
    for (interfaces, settings) in ways {
        set_offloads(interfaces, settings);
        for direction in ["up", "down"] {
            cluster.stream((bytes / 40).max(1), direction);
        }
        cluster.datagrams((datagrams / 40).max(1000));
    }
    cluster.expect_right_checksums();
    outside.expect_at_most(&[EGRESS]);
}

#[test]
fn every_byte_of_a_ptp_pod_arrives() {
    every_byte_arrives(Cni::Ptp, 1);
}

#[test]
fn every_byte_of_a_bridge_pod_arrives() {
    every_byte_arrives(Cni::Bridge, 5);
}
