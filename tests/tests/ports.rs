//! A lease of one granule: 64 connections to a destination and not one more, and nobody else is the worse for it. Where
//! there are more ports, a node that runs out of them gets some.

use std::fs;
use std::thread;
use std::time::Duration;

use lab::hostile::Outside;
use lab::servers::ECHO;
use lab::{Agent, Lab, LabSpec, Pod, PodSpec, Process, eventually_ok};
use serde_json::Value;

const EGRESS: &str = "172.18.0.101";
/// Ports of a granule.
const PORTS: u64 = 64;
/// Source nodes among which the leader divides three quarters of 1,008 granules: one each.
const SOURCE_NODES: usize = 500;

/// A cluster of so many source nodes that each has one granule of the egress IP, and none can have more: one of them has
/// asked for all that is left. Two of them run; what the others' agents would have written is there, as in a cluster.
fn one_granule(config: &str) -> (Lab, Vec<Agent>) {
    cluster(config, 1008)
}

/// The same, of whose other nodes the first asks for so many granules.
fn cluster(config: &str, asks: u16) -> (Lab, Vec<Agent>) {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.config(config);
    let dir = lab.objects.dir().join(".outgate/egressnodes");
    fs::create_dir_all(&dir).expect("the lab's directory can be written");
    let mut nodes = String::new();
    for number in 0..SOURCE_NODES {
        let name = format!("far-{number:03}");
        let granules = if number == 0 { asks } else { 0 };
        let text = format!(
            "apiVersion: outgate.dev/v1alpha1\nkind: EgressNode\nmetadata: {{name: {name}}}\n\
             status: {{nodeUID: uid-{name}, bootID: boot, demand: [{{egressIP: {EGRESS}, granules: {granules}}}]}}\n"
        );
        fs::write(dir.join(format!("{name}.yaml")), text).expect("the lab's directory can be written");
        for line in
            ["---", "apiVersion: v1", "kind: Node", &format!("metadata: {{name: {name}, uid: uid-{name}}}")]
        {
            nodes.extend([line, "\n"]);
        }
    }
    fs::write(lab.objects.dir().join("far.yaml"), nodes).expect("the lab's directory can be written");
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    (lab, agents)
}

/// A pod of a node whose lease is one granule, as the node's kernel has it.
fn pod_with_one_granule(lab: &Lab, name: &str) -> Pod {
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", name));
    let server = format!("{}:{ECHO}", lab.neighbour.address);
    lab.wait_source(&pod.netns, &server, EGRESS);
    let leases = lab.map("node-a", "LEASES");
    let [lease] = &leases[..] else { panic!("one lease: {leases:?}") };
    assert_eq!(lease["value"]["granules"], 1, "{lease}");
    pod
}

/// Connections that stay open until the value is dropped, and how many more there were to be.
struct Held {
    process: Process,
    failed: u64,
    open: u64,
}

fn hold(pod: &Pod, protocol: &str, destination: &str, count: u64) -> Held {
    let helper = lab::lab::helper_path("bulk");
    let count = count.to_string();
    let words = [helper.to_str().expect("UTF-8"), "hold", protocol, destination, "--count", &count];
    let mut process = pod.spawn("hold", &words);
    process.wait_stdout("held", Duration::from_secs(10));
    let report: Value = eventually_ok("a report", Duration::from_secs(1), || {
        serde_json::from_str(process.stdout().trim()).map_err(|error| error.to_string())
    });
    let sources = report["answers"].as_object().expect("answers");
    assert!(sources.keys().all(|source| source == EGRESS), "{report}");
    let number = |name: &str| report[name].as_u64().expect("a number");
    Held { failed: number("failed"), open: number("held"), process }
}

fn no_port_free(lab: &Lab) -> u64 {
    lab.drops("node-a").get("NoPortFree").copied().unwrap_or_default()
}

/// Waits until as many connections as there are ports work. Each try uses the ports that it finds, so the next
/// must not come before those have rested.
#[track_caller]
fn all_ports_come_back(pod: &Pod, protocol: &str, destination: &str) {
    let _ = eventually_ok("all ports", Duration::from_secs(25), || {
        thread::sleep(Duration::from_millis(4500));
        let again = hold(pod, protocol, destination, PORTS);
        if again.open == PORTS { Ok(again) } else { Err(format!("{} of {PORTS}", again.open)) }
    });
}

const SHORT: &str = "  timeouts: {tcpTransitorySeconds: 3, portRestSeconds: 2, udpSeconds: 4}\n";

#[test]
fn the_65th_connection_fails_and_the_64th_works() {
    let (lab, _agents) = one_granule(SHORT);
    let hosts = [&lab.web, &lab.other, &lab.neighbour];
    let _servers = hosts.map(|host| lab.echo(&host.netns));
    let _nginx = lab.nginx(&lab.web.netns);
    let pod = pod_with_one_granule(&lab, "client");
    let neighbour_pod = lab.run_pod("node-a", &PodSpec::new("prod", "neighbour"));
    lab.wait_source(&neighbour_pod.netns, &format!("{}:{ECHO}", lab.neighbour.address), EGRESS);
    let outside = Outside::watch(&lab);
    let [web, other, _] = hosts.map(|host| format!("{}:{ECHO}", host.address));

    for protocol in ["tcp", "udp"] {
        let before = no_port_free(&lab);
        let full = hold(&pod, protocol, &web, PORTS);
        assert_eq!((full.open, full.failed), (PORTS, 0), "{protocol}");
        assert_eq!(no_port_free(&lab), before, "{protocol}");
        // One more, of this pod and of another on the node.
        for netns in [&pod.netns, &neighbour_pod.netns] {
            let limit = Duration::from_millis(500);
            let more = match protocol {
                "tcp" => netns.tcp_source(&web, limit),
                _ => netns.udp_source(&web, limit),
            };
            assert!(more.is_err(), "{protocol}: the 65th: {more:?}");
        }
        assert!(no_port_free(&lab) >= before + 2, "{protocol}: {:?}", lab.drops("node-a"));
        // Another address and another port have all of their ports.
        let elsewhere = hold(&pod, protocol, &other, PORTS);
        assert_eq!((elsewhere.open, elsewhere.failed), (PORTS, 0), "{protocol}");
        let seen = pod.exec(&["curl", "-sS", "--fail", "--max-time", "5", "http://203.0.113.10/[1-20]"]);
        assert_eq!(seen.lines().filter(|line| line.starts_with(EGRESS)).count(), 20, "{seen}");
        assert_eq!(pod.netns.ping(&lab.web.address, 3, "0.01"), 3);

        // Closed, they rest for 2 s, and UDP is forgotten after 4: then they are all there again.
        let _ = full.process.finish(Duration::from_secs(5)).expect_success();
        all_ports_come_back(&pod, protocol, &web);
    }
    outside.expect_at_most(&[EGRESS]);
}

#[test]
fn a_node_that_runs_out_of_ports_gets_more_at_once() {
    let (lab, _agents) = cluster(SHORT, 0);
    let hosts = [&lab.web, &lab.neighbour];
    let _servers = hosts.map(|host| lab.echo(&host.netns));
    let pod = pod_with_one_granule(&lab, "client");
    let outside = Outside::watch(&lab);
    let web = format!("{}:{ECHO}", lab.web.address);
    let full = hold(&pod, "tcp", &web, PORTS);
    assert_eq!((full.open, full.failed), (PORTS, 0));
    eventually_ok("more ports", Duration::from_secs(5), || {
        pod.netns.tcp_source(&web, Duration::from_millis(500)).map_err(|error| error.clone())
    });
    let leases = lab.map("node-a", "LEASES");
    assert!(leases[0]["value"]["granules"].as_u64() >= Some(2), "{leases:?}");
    let more = hold(&pod, "tcp", &web, PORTS / 2);
    assert_eq!((more.open, more.failed), (PORTS / 2, 0), "those before are held still");
    drop(full);
    outside.expect_at_most(&[EGRESS]);
}

/// A SYN that nobody answers keeps its port for the time of an opening connection, and no longer.
#[test]
fn ports_of_connections_that_never_opened_come_back() {
    let (lab, _agents) = one_granule(SHORT);
    let hosts = [&lab.web, &lab.neighbour];
    let _servers = hosts.map(|host| lab.echo(&host.netns));
    let pod = pod_with_one_granule(&lab, "client");
    let outside = Outside::watch(&lab);
    let web = format!("{}:{ECHO}", lab.web.address);
    let silence =
        "table ip silent {\n chain in {\n type filter hook input priority 0; tcp dport 7777 drop; }\n}";
    let nft = |rules: &str| drop(lab.web.netns.exec_input(&["nft", "-f", "-"], &[], rules).expect_success());
    nft(silence);
    let before = no_port_free(&lab);
    let silent = hold(&pod, "tcp", &web, PORTS);
    assert_eq!((silent.open, silent.failed), (0, PORTS));
    assert_eq!(no_port_free(&lab), before);
    nft("delete table ip silent");
    let more = pod.netns.tcp_source(&web, Duration::from_millis(500));
    assert!(more.is_err(), "the 65th: {more:?}");
    assert!(no_port_free(&lab) > before, "{:?}", lab.drops("node-a"));
    all_ports_come_back(&pod, "tcp", &web);
    outside.expect_at_most(&[EGRESS]);
}

/// A pod that opens connections to a full destination as fast as it can harms nobody but itself.
#[test]
fn a_pod_that_sprays_a_full_destination_harms_nobody() {
    let (lab, _agents) = one_granule("");
    let hosts = [&lab.web, &lab.other, &lab.neighbour];
    let _servers = hosts.map(|host| lab.echo(&host.netns));
    let sprayer = pod_with_one_granule(&lab, "sprayer");
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let [web, other, neighbour] = hosts.map(|host| format!("{}:{ECHO}", host.address));
    lab.wait_source(&pod.netns, &neighbour, EGRESS);
    let outside = Outside::watch(&lab);
    // Flows of the other pod towards the full destination, from before.
    let interval = Duration::from_millis(20);
    let old = ["tcp", "udp"].map(|protocol| pod.netns.stream(protocol, &web, interval));
    let before = no_port_free(&lab);
    let helper = lab::lab::helper_path("bulk");
    let mut flood = sprayer.spawn("flood", &[helper.to_str().expect("UTF-8"), "flood", &web]);
    flood.wait_stdout("running", Duration::from_secs(5));
    eventually_ok("the destination is full", Duration::from_secs(10), || {
        let refused = no_port_free(&lab) - before;
        if refused > 1000 { Ok(()) } else { Err(format!("{refused} drops")) }
    });
    // New connections elsewhere, of both pods, fewer than there are ports (they rest); TCP to the very same address and port is another destination.
    for netns in [&pod.netns, &sprayer.netns] {
        netns.tcp(&other, 20, 10).expect_all_from(20, EGRESS);
        netns.udp(&other, 20).expect_all_from(20, EGRESS);
        netns.tcp(&web, 10, 5).expect_all_from(10, EGRESS);
        netns.tcp(&neighbour, 10, 5).expect_all_from(10, EGRESS);
        assert_eq!(netns.ping(&lab.web.address, 5, "0.01"), 5);
    }
    let report = flood.finish(Duration::from_secs(10)).expect_success();
    let report = report.lines().last().unwrap_or_default().to_owned();
    let sent = serde_json::from_str::<Value>(&report).expect("a report")["sent"].as_u64().unwrap_or_default();
    assert!(sent > 2000, "{report}");
    for stream in old {
        stream.finish().expect_lossless_from(EGRESS);
    }
    outside.expect_at_most(&[EGRESS]);
}
