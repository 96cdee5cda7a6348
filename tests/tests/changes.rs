//! What changes in the objects is in force within a second, and nothing of the old state outlives it.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Agent, Lab, LabSpec, Netns, PodSpec, eventually};

const EGRESS: &str = "172.18.0.101";
const OTHER_EGRESS: &str = "172.18.0.102";
const LIMIT: Duration = Duration::from_secs(1);
const PROD: &[(&str, &str)] = &[("env", "prod")];

/// A lab with an echo server outside, and agents; `node-b` may own egress IPs.
fn cluster() -> (Lab, Vec<Agent>, lab::Process, String) {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    let echo = lab.echo(&lab.web.netns);
    let agents = lab.start_agents();
    let server = format!("{}:{ECHO}", lab.web.address);
    (lab, agents, echo, server)
}

/// Panics unless the server sees the source within a second from now.
#[track_caller]
fn expect_soon(netns: &Netns, server: &str, source: &str) {
    let mut last = None;
    let found = eventually(LIMIT, || {
        let seen = netns.tcp_source(server, Duration::from_millis(100));
        last = Some(seen.clone());
        (seen.as_deref() == Ok(source)).then_some(())
    });
    assert!(found.is_some(), "not {source} within {LIMIT:?}: {last:?}");
    // Both protocols, and it stays so.
    netns.tcp(server, 5, 1).expect_all_from(5, source);
    netns.udp(server, 5).expect_all_from(5, source);
}

#[test]
fn labels_select_and_deselect_within_a_second() {
    let (lab, _agents, _echo, server) = cluster();
    let node = lab.node("node-a").address.clone();
    lab.objects.egress_ip("prod", &[EGRESS], PROD, &[("app", "web")]);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let mut pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    expect_soon(&pod.netns, &server, &node);

    for _ in 0..3 {
        pod.set_labels(&[("app", "web"), ("tier", "1")]);
        expect_soon(&pod.netns, &server, EGRESS);
        pod.set_labels(&[("app", "db")]);
        expect_soon(&pod.netns, &server, &node);
        pod.set_labels(&[("app", "web")]);
        expect_soon(&pod.netns, &server, EGRESS);
        lab.objects.namespace("prod", &[("env", "test")]);
        expect_soon(&pod.netns, &server, &node);
        lab.objects.namespace("prod", PROD);
        expect_soon(&pod.netns, &server, EGRESS);
    }
}

#[test]
fn egress_ips_are_edited_and_removed_within_a_second() {
    let (lab, _agents, _echo, server) = cluster();
    let node = lab.node("node-a").address.clone();
    let pods = ["node-a", "node-b"].map(|node| lab.run_pod(node, &PodSpec::new("prod", node)));
    let addresses = [node, lab.node("node-b").address.clone()];
    for _ in 0..2 {
        for egress in [EGRESS, OTHER_EGRESS] {
            lab.objects.egress_ip("prod", &[egress], PROD, &[]);
            for pod in &pods {
                expect_soon(&pod.netns, &server, egress);
            }
        }
        lab.objects.remove_egress_ip("prod");
        for (pod, address) in pods.iter().zip(&addresses) {
            expect_soon(&pod.netns, &server, address);
        }
        assert_eq!(lab.owner(OTHER_EGRESS), None);
    }
}

/// Has streams of a pod running that are seen as `before`, makes a change after which the pod is `now`, and
/// panics if anything is still seen as `before` a second later.
#[track_caller]
fn flows_do_not_outlive(
    lab: &Lab,
    pod: &Netns,
    server: &str,
    before: &str,
    now: &str,
    change: impl FnOnce(),
) {
    // What the server still sends to a node's address that stands for no connection any more is reset by the node.
    let recorder = Recorder::start_without_resets(&lab.web.netns);
    let seen =
        |address: &str| ["tcp", "udp"].map(|protocol| recorder.sources(protocol).contains_key(address));
    // Kept running: they are what must not be seen again.
    let _old = ["tcp", "udp"].map(|protocol| pod.stream(protocol, server, Duration::from_millis(10)));
    let flowing = eventually(LIMIT, || (seen(before) == [true; 2]).then_some(()));
    assert!(flowing.is_some(), "streams come from {before}");
    change();
    expect_soon(pod, server, now);
    recorder.reset();
    // Long enough for a retransmission, or for 50 datagrams.
    let leak = eventually(Duration::from_millis(500), || {
        let leaks = seen(before);
        (leaks != [false; 2]).then_some(leaks)
    });
    assert_eq!(leak, None, "[tcp, udp] of {before} are seen after the change to {now}");
}

#[test]
fn live_flows_do_not_outlive_a_change() {
    let (lab, _agents, _echo, server) = cluster();
    let node = lab.node("node-a").address.clone();
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    expect_soon(&pod.netns, &server, &node);
    flows_do_not_outlive(&lab, &pod.netns, &server, &node, EGRESS, || {
        lab.objects.egress_ip("prod", &[EGRESS], PROD, &[]);
    });
    flows_do_not_outlive(&lab, &pod.netns, &server, EGRESS, OTHER_EGRESS, || {
        lab.objects.egress_ip("prod", &[OTHER_EGRESS], PROD, &[]);
    });
    flows_do_not_outlive(&lab, &pod.netns, &server, OTHER_EGRESS, &node, || {
        lab.objects.remove_egress_ip("prod");
    });
}

/// Both addresses stay in force; only the pod goes from one object to the other.
#[test]
fn live_flows_do_not_follow_a_pod_to_another_object() {
    let (lab, _agents, _echo, server) = cluster();
    lab.objects.egress_ip("web", &[EGRESS], PROD, &[("app", "web")]);
    lab.objects.egress_ip("db", &[OTHER_EGRESS], PROD, &[("app", "db")]);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    assert_eq!(lab.wait_owner(OTHER_EGRESS), "node-b");
    // It keeps the old address in force on the node.
    let stays = lab.run_pod("node-a", &PodSpec::new("prod", "stays").label("app", "web"));
    expect_soon(&stays.netns, &server, EGRESS);
    let mut pod = lab.run_pod("node-a", &PodSpec::new("prod", "client").label("app", "web"));
    let netns = pod.netns.clone();
    expect_soon(&netns, &server, EGRESS);
    flows_do_not_outlive(&lab, &netns, &server, EGRESS, OTHER_EGRESS, || pod.set_labels(&[("app", "db")]));
}

#[test]
fn a_deleted_pods_address_serves_the_next_pod_at_once() {
    let (lab, _agents, _echo, server) = cluster();
    let node = lab.node("node-a").address.clone();
    lab.objects.egress_ip("prod", &[EGRESS], PROD, &[]);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let ip = "10.244.1.77";
    for (namespace, source) in [("prod", EGRESS), ("dev", &*node), ("prod", EGRESS)] {
        let pod = lab.run_pod("node-a", &PodSpec::new(namespace, "client").ip(ip));
        assert_eq!(pod.ip, ip);
        expect_soon(&pod.netns, &server, source);
        // From a port that every one of them uses.
        pod.netns.udp_from(40_000, &server, LIMIT).expect_all_from(1, source);
        pod.delete();
    }
}

/// Whoever the next pod with the address is, also one with the same EgressIP: what comes late for the old pod's
/// flow is not for it.
#[test]
fn a_deleted_pods_flows_do_not_serve_the_next_pod() {
    let (lab, _agents, echo, server) = cluster();
    lab.objects.egress_ip("prod", &[EGRESS], PROD, &[]);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let ip = "10.244.1.77";
    let old = lab.run_pod("node-a", &PodSpec::new("prod", "client").ip(ip));
    expect_soon(&old.netns, &server, EGRESS);
    let flow = old.netns.udp_from(40_000, &server, LIMIT);
    flow.expect_all_from(1, EGRESS);
    let other = old.netns.udp_from(40_001, &server, LIMIT);
    // From now on the server's port is for what it sends late.
    drop(echo);
    let inside = Recorder::start(&old.netns);
    let late = |port: u64| {
        let report = lab.web.netns.udp_from(ECHO, &format!("{EGRESS}:{port}"), Duration::from_millis(200));
        assert_eq!(report.ok, 0, "{report:?}");
    };
    late(other.port);
    assert_eq!(inside.sources("udp").get(&lab.web.address), Some(&1), "while the pod lives it is reached");
    old.delete();

    for namespace in ["prod", "dev"] {
        let next = lab.run_pod("node-a", &PodSpec::new(namespace, "client").ip(ip));
        let inside = Recorder::start(&next.netns);
        let echo = lab.echo(&lab.web.netns);
        // By TCP, so that it has no UDP flow of its own.
        let source = if namespace == "prod" { EGRESS } else { &lab.node("node-a").address };
        lab.wait_source(&next.netns, &server, source);
        drop(echo);
        late(flow.port);
        assert_eq!(
            inside.sources("udp").get(&lab.web.address),
            None,
            "{namespace} gets the old pod's answer"
        );
        next.delete();
    }
}

/// A pod's first packets wait for the agent to know it, instead of leaving by the node's address.
#[test]
fn a_new_pods_first_packets_never_leave_by_the_node() {
    let (lab, _agents, _echo, server) = cluster();
    lab.objects.egress_ip("prod", &[EGRESS], PROD, &[]);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let recorder = Recorder::start(&lab.web.netns);
    for number in 0..5 {
        let pod = lab.run_pod("node-a", &PodSpec::new("prod", &format!("client-{number}")).unannounced());
        let early = pod.netns.tcp_source(&server, Duration::from_millis(200));
        assert!(early.is_err(), "{early:?}");
        pod.announce();
        // The connection that was begun before is served by its next SYN.
        expect_soon(&pod.netns, &server, EGRESS);
    }
    recorder.expect_only("tcp", &[EGRESS]);
    recorder.expect_only("udp", &[EGRESS]);
}

/// Drops with this reason, of all agents.
fn drops(agents: &[Agent], reason: &str) -> u64 {
    agents.iter().map(|agent| agent.metric("outgate_drop", reason)).sum()
}

#[test]
fn without_an_owner_traffic_is_dropped_and_counted() {
    let (lab, agents, _echo, server) = cluster();
    let node = lab.node("node-a").address.clone();
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    expect_soon(&pod.netns, &server, &node);
    for node in &lab.nodes {
        lab.describe_node(node, false, true);
    }
    lab.objects.egress_ip("prod", &[EGRESS], PROD, &[]);
    // UDP: what a TCP connection sends again, caught half closed, would be counted below.
    let dropped = eventually(LIMIT, || pod.netns.udp_source(&server, Duration::from_millis(100)).err());
    assert!(dropped.is_some(), "traffic of a pod whose egress IP has no owner still leaves");
    assert_eq!(lab.owner(EGRESS), None);

    let recorder = Recorder::start(&lab.web.netns);
    let before = drops(&agents, "NoOwner");
    for _ in 0..10 {
        let report = pod.netns.udp_from(0, &server, Duration::from_millis(20));
        assert_eq!(report.ok, 0, "{report:?}");
    }
    assert_eq!(pod.netns.ping(&lab.web.address, 2, "0.01"), 0);
    assert_eq!(drops(&agents, "NoOwner") - before, 12, "{}", agents[0].metrics());
    for protocol in ["tcp", "udp", "icmp"] {
        recorder.expect_only(protocol, &[]);
    }
    // Inside the cluster nothing changes.
    assert_eq!(pod.netns.ping(&lab.node("node-b").address, 2, "0.01"), 2);

    // A node that may own it brings it back, and takes it away.
    lab.describe_node(lab.node("node-b"), true, true);
    expect_soon(&pod.netns, &server, EGRESS);
    lab.describe_node(lab.node("node-b"), true, false);
    let dropped = eventually(LIMIT, || pod.netns.tcp_source(&server, Duration::from_millis(100)).err());
    assert!(dropped.is_some(), "a node that is not ready goes on as owner");

    lab.objects.config("  unassigned: NodeIP\n");
    expect_soon(&pod.netns, &server, &node);
    lab.describe_node(lab.node("node-b"), true, true);
    expect_soon(&pod.netns, &server, EGRESS);
}

/// A connection that came in before its pod was selected is answered as before.
#[test]
fn an_incoming_connection_outlives_the_pods_selection() {
    let lab = Lab::with(&LabSpec::default().nodes(2).routed_pods());
    lab.describe_cluster(&["node-b"]);
    let _agents = lab.start_agents();
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "server"));
    let (_inside, _outside) = (lab.echo(&pod.netns), lab.echo(&lab.web.netns));
    let server = format!("{}:{ECHO}", lab.web.address);
    expect_soon(&pod.netns, &server, &lab.node("node-a").address);
    let called = format!("{}:{ECHO}", pod.ip);
    let incoming = lab.web.netns.stream("tcp", &called, Duration::from_millis(10));
    lab.objects.egress_ip("prod", &[EGRESS], PROD, &[]);
    expect_soon(&pod.netns, &server, EGRESS);
    lab.web.netns.tcp(&called, 10, 5).expect_all_from(10, &lab.web.address);
    lab.objects.remove_egress_ip("prod");
    expect_soon(&pod.netns, &server, &lab.node("node-a").address);
    let report = incoming.finish();
    report.expect_lossless_from(&lab.web.address);
}
