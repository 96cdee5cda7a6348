//! How a new flow leaves its node: by the host's stack, past it, and not at all.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Cni, Family, Lab, LabSpec, PodSpec, endpoint};

const LIMIT: Duration = Duration::from_secs(10);
const PROD: &[(&str, &str)] = &[("env", "prod")];

/// Two nodes; the second holds an address of each family.
fn lab(cni: Cni) -> Lab {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni).dual_stack());
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &Family::ALL.map(Family::egress), PROD, &[]);
    lab
}

#[track_caller]
fn everything_leaves_by_the_egress_ip(lab: &Lab) {
    let _echo = lab.echo(&lab.web.netns);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    for family in Family::ALL {
        let (server, source) = (endpoint(lab.web.address_of(family), ECHO), family.egress());
        lab.wait_source(&pod.netns, &server, source);
        let recorder = Recorder::start(&lab.web.netns);
        pod.netns.tcp(&server, 50, 25).expect_all_from(50, source);
        pod.netns.udp(&server, 20).expect_all_from(20, source);
        assert_eq!(pod.netns.ping(lab.web.address_of(family), 5, "0.01"), 5);
        recorder.expect_none_but(&[source]);
    }
}

fn without_a_default_route(cni: Cni) {
    let lab = lab(cni);
    let node = &lab.node("node-a").netns;
    node.ip(&["route del default"]);
    node.exec(&["ip", "-6", "route", "del", "default"]);
    let _agents = lab.start_agents_with(&["--uplink", "eth0"]);
    everything_leaves_by_the_egress_ip(&lab);
}

#[test]
fn a_ptp_pods_node_needs_no_route_out() {
    without_a_default_route(Cni::Ptp);
}

#[test]
fn a_bridge_pods_node_needs_no_route_out() {
    without_a_default_route(Cni::Bridge);
}

#[test]
fn traffic_may_keep_to_the_hosts_stack() {
    let lab = lab(Cni::Ptp);
    lab.objects.config("  offload: Never");
    let _agents = lab.start_agents();
    everything_leaves_by_the_egress_ip(&lab);
    // Every packet meets netfilter: what it forbids stops in the middle of a flow.
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "other"));
    let _echo = lab.echo(&lab.other.netns);
    let server = endpoint(&lab.other.address, ECHO);
    lab.wait_source(&pod.netns, &server, Family::V4.egress());
    pod.netns.udp_from(40_000, &server, LIMIT).expect_all_from(1, Family::V4.egress());
    lab.node("node-a").netns.exec(&["iptables", "-I", "FORWARD", "-d", &lab.other.address, "-j", "DROP"]);
    let seen = Recorder::start(&lab.other.netns);
    assert_eq!(pod.netns.udp_from(40_000, &server, Duration::from_secs(1)).ok, 0);
    seen.expect_none_but(&[]);
}

#[test]
fn traffic_may_go_past_the_hosts_stack_from_its_first_packet() {
    let lab = lab(Cni::Ptp);
    lab.objects.config("  offload: Always");
    lab.node("node-a").netns.exec(&["iptables", "-P", "FORWARD", "DROP"]);
    lab.node("node-a").netns.exec(&["ip6tables", "-P", "FORWARD", "DROP"]);
    let _agents = lab.start_agents();
    everything_leaves_by_the_egress_ip(&lab);
}

#[test]
fn what_the_host_would_send_by_another_interface_is_dropped() {
    let lab = lab(Cni::Ptp);
    let node = lab.node("node-a");
    // A way to the outside that is no uplink: a second leg to the nodes' network.
    node.netns.ip(&[
        "link add link eth0 name side type macvlan mode bridge",
        "addr add 172.18.0.91/24 dev side",
        "link set side up",
        &format!("route add {} via 172.18.0.1 dev side", lab.other.address),
    ]);
    let _agents = lab.start_agents_with(&["--uplink", "eth0"]);
    let _echo = [lab.echo(&lab.web.netns), lab.echo(&lab.other.netns)];
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let source = Family::V4.egress();
    lab.wait_source(&pod.netns, &endpoint(&lab.web.address, ECHO), source);
    let seen = Recorder::start(&lab.other.netns);
    let server = endpoint(&lab.other.address, ECHO);
    pod.netns.tcp_source(&server, Duration::from_millis(500)).expect_err("there is no such way");
    pod.netns.udp_source(&server, Duration::from_millis(500)).expect_err("there is no such way");
    seen.expect_none_but(&[]);
    assert!(lab.drops("node-a")["NotAnUplink"] >= 2, "{:?}", lab.drops("node-a"));
    node.netns.ip(&[&format!("route del {}", lab.other.address)]);
    lab.wait_source(&pod.netns, &server, source);
}
