//! The chained CNI plugin: a pod starts when its node's agent has programmed it, and not before.

use std::fs;
use std::thread;
use std::time::Duration;

use lab::hostile::Outside;
use lab::scene::{EGRESS, Scene};
use lab::{Agent, Cni, Lab, LabSpec, Output, Pod, PodSpec, eventually_ok};
use serde_json::{Value, json};

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
    let scene = Scene::new(cni);
    let (lab, server) = (&scene.lab, scene.server.as_str());
    let warm = scene.warm("node-a");
    let node = lab.node("node-a").address.clone();
    let outside = Outside::watch(lab);
    for number in 0..5 {
        let pod = lab.run_pod("node-a", &spec(lab, "prod", &format!("p{number}")));
        assert_eq!(first_datagram(&pod, server), EGRESS);
        let other = lab.run_pod("node-a", &spec(lab, "dev", &format!("p{number}")));
        assert_eq!(first_datagram(&other, server), node);
        assert!(pod.call_outgate("CHECK").success(), "{}", pod.call_outgate("CHECK").explain());
    }
    outside.expect_at_most(&[EGRESS, &node]);
    let _ = warm.netns.tcp(server, 1, 1);
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
    let mut scene = Scene::laid_out(Cni::Ptp);
    let (lab, server) = (&scene.lab, scene.server.as_str());
    let outside = Outside::watch(lab);
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
    let mut first = lab.prepare_pod("node-a", &spec(lab, "prod", "first"));
    refused(&mut first);
    let (code, _) = refusal(&first.call_outgate("STATUS"));
    assert_eq!(code, 50);
    assert!(first.call_outgate("VERSION").expect_success().contains("1.1.0"));

    scene.agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    if let Err(output) = first.connect() {
        panic!("{}", output.explain());
    }
    let _ = first.call_outgate("STATUS").expect_success();
    lab.wait_source(&first.netns, server, EGRESS);

    // Killed: the socket is left behind.
    Agent::kill(scene.agents.remove(0));
    let mut second = lab.prepare_pod("node-a", &spec(lab, "prod", "second"));
    refused(&mut second);
    let (code, _) = refusal(&first.call_outgate("CHECK"));
    assert_eq!(code, 11);
    first.delete();

    let mut agent = lab.start_agent("node-a");
    agent.wait_ready();
    if let Err(output) = second.connect() {
        panic!("{}", output.explain());
    }
    assert_eq!(first_datagram(&second, server), EGRESS);
    agent.stop();
    assert!(!lab.cni_socket("node-a").exists(), "its own socket goes with it");
    outside.expect_at_most(&[EGRESS]);
}

/// From an image that has nothing but the one program.
#[test]
fn the_program_installs_itself_as_a_plugin() {
    let lab = Lab::with(&LabSpec::default().nodes(1));
    let bin = lab.dir().join("bin");
    let install = || lab.outgate("node-a", &["cni", "--install", bin.to_str().expect("UTF-8")]);
    let output = install();
    assert!(!output.success() && output.explain().contains("is the directory there"), "{}", output.explain());
    fs::create_dir(&bin).expect("a directory");
    // Again, as when a node's pod starts anew.
    for _ in 0..2 {
        let _ = install().expect_success();
    }
    let names: Vec<_> =
        fs::read_dir(&bin).expect("a directory").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["outgate-cni"]);
    let plugin = bin.join("outgate-cni");
    let words = [plugin.to_str().expect("UTF-8")];
    let output = lab.node("node-a").netns.exec_input(&words, &[("CNI_COMMAND", "VERSION")], "{}");
    assert!(output.expect_success().contains("supportedVersions"));
}

#[test]
fn a_pod_that_the_api_does_not_know_yet_is_waited_for() {
    let scene = Scene::new(Cni::Bridge);
    let (lab, server) = (&scene.lab, scene.server.as_str());
    lab.tolerate("there is no Namespace odd");
    let _warm = scene.warm("node-a");
    let outside = Outside::watch(lab);
    let mut vain = lab.prepare_pod("node-a", &hasty(lab, "prod", "vain").unannounced());
    let (code, message) = refusal(&vain.connect().expect_err("nobody knows it"));
    assert_eq!(code, 11);
    assert!(
        message.contains("not programmed after 1 s") && message.contains("knows no Pod prod/vain"),
        "{message}"
    );
    // Its namespace's labels are not known, so neither is whether it is selected.
    let mut odd = lab.prepare_pod("node-a", &hasty(lab, "odd", "pod"));
    let (_, message) = refusal(&odd.connect().expect_err("nobody knows its namespace"));
    assert!(message.contains("no Namespace odd"), "{message}");

    let mut late = lab.prepare_pod("node-a", &spec(lab, "prod", "late").unannounced());
    let veths = |lab: &Lab| {
        lab.node("node-a").netns.exec(&["ip", "-o", "link", "show", "master", "cni0"]).lines().count()
    };
    let before = veths(lab);
    let early = late.announcer();
    thread::scope(|scope| {
        let late = &mut late;
        let connecting = scope.spawn(move || late.connect().map_err(|output| output.explain()));
        eventually_ok("its network", Duration::from_secs(10), || {
            if veths(lab) > before { Ok(()) } else { Err("no interface".to_owned()) }
        });
        assert!(!connecting.is_finished(), "it waits");
        early();
        connecting.join().expect("it does not panic").expect("the plugin lets it start");
    });
    assert_eq!(first_datagram(&late, server), EGRESS);
    outside.expect_at_most(&[EGRESS]);
}

/// The object's status is still of the sandbox before, and stays so until the new one's containers run.
#[test]
fn a_pods_new_sandbox_counts_at_once() {
    let scene = Scene::new(Cni::Ptp);
    let (lab, server) = (&scene.lab, scene.server.as_str());
    // So it is, from when its network is made until Outgate's plugin asks.
    lab.tolerate("held: its interface is gone");
    let outside = Outside::watch(lab);
    for spec in [spec(lab, "prod", "any"), spec(lab, "prod", "same").ip("10.244.1.77")] {
        let mut pod = lab.run_pod("node-a", &spec);
        pod.announce();
        lab.wait_source(&pod.netns, server, EGRESS);
        let before = pod.ip.clone();
        pod.new_sandbox();
        if let Err(output) = pod.connect() {
            panic!("{}", output.explain());
        }
        assert_eq!(pod.ip == before, before == "10.244.1.77");
        assert_eq!(first_datagram(&pod, server), EGRESS);
    }
    outside.expect_at_most(&[EGRESS]);
}
