//! The chained CNI plugin: a pod starts when its node's agent has programmed it, and not before.

use std::thread;
use std::time::Duration;

use lab::hostile::Outside;
use lab::servers::ECHO;
use lab::{Agent, Cni, Lab, LabSpec, Output, Pod, PodSpec, eventually_ok};
use serde_json::{Value, json};

const EGRESS: &str = "172.18.0.101";

fn two_nodes(cni: Cni) -> Lab {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    lab
}

/// A pod of node-a behind Outgate's plugin, whose object never says its address.
fn spec(lab: &Lab, namespace: &str, name: &str) -> PodSpec {
    let more = json!({"socket": lab.cni_socket("node-a"), "timeoutSeconds": 30});
    PodSpec::new(namespace, name).pending().chained(more)
}

/// The same for one that waits in vain.
fn hasty(lab: &Lab, namespace: &str, name: &str) -> PodSpec {
    let more = json!({"socket": lab.cni_socket("node-a"), "timeoutSeconds": 1});
    PodSpec::new(namespace, name).pending().chained(more)
}

/// The error that a plugin has printed.
fn refusal(output: &Output) -> (u64, String) {
    assert!(!output.success(), "{}", output.explain());
    let error: Value = serde_json::from_str(&output.stdout).expect("an error is JSON");
    assert_eq!(error["cniVersion"], "1.0.0");
    (error["code"].as_u64().expect("a code"), format!("{}: {}", error["msg"], error["details"]))
}

/// What the server sees of the first datagram that is sent at all.
#[track_caller]
fn first_datagram(pod: &Pod, server: &str) -> String {
    let seen = pod.netns.udp_source(server, Duration::from_secs(5));
    seen.unwrap_or_else(|error| panic!("{}: {error}", pod.full_name()))
}

fn first_packets_after_add(cni: Cni) {
    let lab = two_nodes(cni);
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let warm = lab.run_pod("node-a", &PodSpec::new("prod", "warm"));
    lab.wait_source(&warm.netns, &server, EGRESS);
    let node = lab.node("node-a").address.clone();
    let outside = Outside::watch(&lab);
    for number in 0..5 {
        let pod = lab.run_pod("node-a", &spec(&lab, "prod", &format!("p{number}")));
        assert_eq!(first_datagram(&pod, &server), EGRESS);
        let other = lab.run_pod("node-a", &spec(&lab, "dev", &format!("p{number}")));
        assert_eq!(first_datagram(&other, &server), node);
        assert!(pod.call_outgate("CHECK").success(), "{}", pod.call_outgate("CHECK").explain());
    }
    outside.expect_at_most(&[EGRESS, &node]);
    let _ = warm.netns.tcp(&server, 1, 1);
}

#[test]
fn a_ptp_pods_first_packet_after_add_leaves_by_its_egress_ip() {
    first_packets_after_add(Cni::Ptp);
}

#[test]
fn a_bridge_pods_first_packet_after_add_leaves_by_its_egress_ip() {
    first_packets_after_add(Cni::Bridge);
}

/// Whether it was never there or is away, without an agent no pod starts, and every pod ends.
#[test]
fn without_an_agent_pods_do_not_start_but_end() {
    let lab = two_nodes(Cni::Ptp);
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let outside = Outside::watch(&lab);
    let refused = |pod: &mut Pod| {
        let (code, message) = refusal(&pod.connect().expect_err("there is no agent"));
        assert_eq!(code, 11, "to be tried again: {message}");
        assert!(
            message.contains("agent does not answer") && message.contains("take outgate-cni out"),
            "{message}"
        );
        assert!(message.contains(lab.cni_socket("node-a").to_str().expect("UTF-8")), "{message}");
    };
    // Not yet installed: nothing on the node would hold what leaves it.
    let mut first = lab.prepare_pod("node-a", &spec(&lab, "prod", "first"));
    refused(&mut first);
    let (code, _) = refusal(&first.call_outgate("STATUS"));
    assert_eq!(code, 50);
    assert!(first.call_outgate("VERSION").expect_success().contains("1.1.0"));

    let mut agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    if let Err(output) = first.connect() {
        panic!("{}", output.explain());
    }
    let _ = first.call_outgate("STATUS").expect_success();
    lab.wait_source(&first.netns, &server, EGRESS);

    // Killed: the socket is left behind.
    Agent::kill(agents.remove(0));
    let mut second = lab.prepare_pod("node-a", &spec(&lab, "prod", "second"));
    refused(&mut second);
    let (code, _) = refusal(&first.call_outgate("CHECK"));
    assert_eq!(code, 11);
    first.delete();

    let mut agent = lab.start_agent("node-a");
    agent.wait_ready();
    if let Err(output) = second.connect() {
        panic!("{}", output.explain());
    }
    assert_eq!(first_datagram(&second, &server), EGRESS);
    agent.stop();
    assert!(!lab.cni_socket("node-a").exists(), "its own socket goes with it");
    outside.expect_at_most(&[EGRESS]);
}

#[test]
fn a_pod_that_the_api_does_not_know_yet_is_waited_for() {
    let lab = two_nodes(Cni::Bridge);
    lab.tolerate("there is no Namespace odd");
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let warm = lab.run_pod("node-a", &PodSpec::new("prod", "warm"));
    lab.wait_source(&warm.netns, &server, EGRESS);
    let outside = Outside::watch(&lab);
    let mut vain = lab.prepare_pod("node-a", &hasty(&lab, "prod", "vain").unannounced());
    let (code, message) = refusal(&vain.connect().expect_err("nobody knows it"));
    assert_eq!(code, 11);
    assert!(
        message.contains("not programmed after 1 s") && message.contains("knows no Pod prod/vain"),
        "{message}"
    );
    // Its namespace's labels are not known, so neither is whether it is selected.
    let mut odd = lab.prepare_pod("node-a", &hasty(&lab, "odd", "pod"));
    let (_, message) = refusal(&odd.connect().expect_err("nobody knows its namespace"));
    assert!(message.contains("no Namespace odd"), "{message}");

    let mut late = lab.prepare_pod("node-a", &spec(&lab, "prod", "late").unannounced());
    let veths = |lab: &Lab| {
        lab.node("node-a").netns.exec(&["ip", "-o", "link", "show", "master", "cni0"]).lines().count()
    };
    let before = veths(&lab);
    let early = late.announcer();
    thread::scope(|scope| {
        let late = &mut late;
        let connecting = scope.spawn(move || late.connect().map_err(|output| output.explain()));
        eventually_ok("its network", Duration::from_secs(10), || {
            if veths(&lab) > before { Ok(()) } else { Err("no interface".to_owned()) }
        });
        assert!(!connecting.is_finished(), "it waits");
        early();
        connecting.join().expect("it does not panic").expect("the plugin lets it start");
    });
    assert_eq!(first_datagram(&late, &server), EGRESS);
    outside.expect_at_most(&[EGRESS]);
}

/// The object's status is still of the sandbox before, and stays so until the new one's containers run.
#[test]
fn a_pods_new_sandbox_counts_at_once() {
    let lab = two_nodes(Cni::Ptp);
    // So it is, from when its network is made until Outgate's plugin asks.
    lab.tolerate("held: its interface is gone");
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let outside = Outside::watch(&lab);
    for spec in [spec(&lab, "prod", "any"), spec(&lab, "prod", "same").ip("10.244.1.77")] {
        let mut pod = lab.run_pod("node-a", &spec);
        pod.announce();
        lab.wait_source(&pod.netns, &server, EGRESS);
        let before = pod.ip.clone();
        pod.new_sandbox();
        if let Err(output) = pod.connect() {
            panic!("{}", output.explain());
        }
        assert_eq!(pod.ip == before, before == "10.244.1.77");
        assert_eq!(first_datagram(&pod, &server), EGRESS);
    }
    outside.expect_at_most(&[EGRESS]);
}
