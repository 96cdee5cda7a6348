//! Agents come and go; packets do not care.

use std::fs;
use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Agent, Lab, LabSpec, Netns, PodSpec, eventually};

const EGRESS: &str = "172.18.0.101";

struct Cluster {
    lab: Lab,
    agents: Vec<Agent>,
    _echo: lab::Process,
    server: String,
}

fn cluster() -> Cluster {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    Cluster { lab, agents, _echo: echo, server }
}

/// Live flows and new ones, TCP, UDP and ping, of pods on the owner's node and another, while `disturb` works.
/// Nothing may be lost or sent twice, and nobody sees another source.
#[track_caller]
fn undisturbed(lab: &Lab, server: &str, pods: &[&Netns], disturb: impl FnOnce()) {
    let recorder = Recorder::start(&lab.web.netns);
    let interval = Duration::from_millis(5);
    let ends = || pods.iter().copied().chain([&lab.web.netns]);
    // Tail loss probes send again what was only late.
    ends().for_each(|netns| netns.sysctl(&["net.ipv4.tcp_early_retrans=0"]));
    let retransmitted = || ends().map(|netns| netns.snmp("Tcp", "RetransSegs")).collect::<Vec<_>>();
    let before = retransmitted();
    let mut streams = Vec::new();
    let mut pings = Vec::new();
    for netns in pods {
        for protocol in ["tcp", "udp"] {
            streams.push(netns.stream(protocol, server, interval));
            streams.push(netns.fresh(protocol, server, interval));
        }
        pings.push(netns.pings(&lab.web.address));
    }
    disturb();
    for stream in streams {
        stream.finish().expect_lossless_from(EGRESS);
    }
    for ping in pings {
        let (sent, received) = ping.finish();
        // The last request may be on its way when ping is ended.
        assert!(sent > 10 && received + 1 >= sent, "{received} of {sent} pings were answered");
    }
    assert_eq!(retransmitted(), before, "segments were sent again");
    for protocol in ["tcp", "udp", "icmp"] {
        recorder.expect_only(protocol, &[EGRESS]);
    }
}

/// Time in which every kind of traffic has happened many times over.
fn a_while() {
    std::thread::sleep(Duration::from_millis(300));
}

#[test]
fn traffic_goes_on_while_agents_stop_and_start() {
    let Cluster { lab, mut agents, _echo, server } = cluster();
    let pods = ["node-a", "node-b"].map(|node| lab.run_pod(node, &PodSpec::new("prod", node)));
    for pod in &pods {
        lab.wait_source(&pod.netns, &server, EGRESS);
    }
    let netnses = pods.each_ref().map(|pod| &pod.netns);
    undisturbed(&lab, &server, &netnses, || {
        a_while();
        agents.drain(..).for_each(Agent::stop);
        a_while();
        agents = lab.start_agents();
        a_while();
        // One at a time, without being asked.
        for agent in agents.drain(..) {
            let node = agent.node.clone();
            agent.kill();
            a_while();
            let mut again = lab.start_agent(&node);
            again.wait_ready();
            drop(again);
        }
        a_while();
        agents = lab.start_agents();
        a_while();
    });
}

/// What was decided while no agent ran is caught up with when one starts.
#[test]
fn changes_while_agents_are_stopped_take_effect_at_the_start() {
    let Cluster { lab, agents, _echo, server } = cluster();
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &server, EGRESS);
    agents.into_iter().for_each(Agent::stop);
    let gone = lab.run_pod("node-a", &PodSpec::new("prod", "gone"));
    gone.delete();
    lab.objects.egress_ip("prod", &["172.18.0.103"], &[("env", "prod")], &[]);
    pod.netns.tcp(&server, 20, 10).expect_all_from(20, EGRESS);
    let _agents = lab.start_agents();
    lab.wait_source(&pod.netns, &server, "172.18.0.103");
    let recorder = Recorder::start(&lab.web.netns);
    pod.netns.tcp(&server, 20, 10).expect_all_from(20, "172.18.0.103");
    recorder.expect_only("tcp", &["172.18.0.103"]);
}

#[test]
fn cleanup_leaves_nothing_and_pods_are_as_before() {
    let Cluster { lab, agents, _echo, server } = cluster();
    let pods = ["node-a", "node-b"].map(|node| lab.run_pod(node, &PodSpec::new("prod", node)));
    for pod in &pods {
        lab.wait_source(&pod.netns, &server, EGRESS);
    }
    let programs: Vec<_> = lab.nodes.iter().map(|node| lab.programs(&node.name)).collect();
    for (node, programs) in lab.nodes.iter().zip(&programs) {
        assert!(programs.len() >= 3, "{programs:?}");
        assert!(node.netns.exec(&["ip", "-br", "link"]).contains("outgate0"));
    }
    agents.into_iter().for_each(Agent::stop);
    for (node, programs) in lab.nodes.iter().zip(&programs) {
        let pins = lab.bpffs(&node.name);
        assert!(fs::read_dir(&pins).expect("pins").count() > 0, "the agent's end leaves its pins");
        // Twice: the second time there is nothing to do, and that is no failure.
        for _ in 0..2 {
            let output = lab.outgate(&node.name, &["cleanup", "--bpffs", pins.to_str().expect("UTF-8")]);
            let _ = output.expect_success();
        }
        for (link, (id, _)) in programs {
            // The kernel frees a program some moments after its last use.
            let show = || node.netns.try_exec(&["bpftool", "prog", "show", "id", &id.to_string()]);
            let gone = eventually(Duration::from_secs(5), || (!show().success()).then_some(()));
            assert!(gone.is_some(), "the program of {link} is still there: {}", show().stdout);
        }
        let links = node.netns.exec(&["ip", "-br", "link"]);
        assert!(!links.contains("outgate"), "{links}");
        let filters = node.netns.exec(&["tc", "qdisc", "show"]);
        assert!(!filters.contains("clsact"), "{filters}");
        let left = fs::read_dir(&pins).map(Iterator::count).unwrap_or_default();
        assert_eq!(left, 0, "{} is not empty", pins.display());
    }
    for pod in &pods {
        let node = lab.node(&pod.node);
        pod.netns.tcp(&server, 20, 10).expect_all_from(20, &node.address);
        pod.netns.udp(&server, 5).expect_all_from(5, &node.address);
    }
    // And all of it can come back.
    let _agents = lab.start_agents();
    for pod in &pods {
        lab.wait_source(&pod.netns, &server, EGRESS);
    }
}
