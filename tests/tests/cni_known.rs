//! Pods are known from libcni's result cache on the node, before the API says their addresses.

use std::time::Duration;

use lab::hostile::Outside;
use lab::scene::{EGRESS, Scene};
use lab::{Agent, Cni, Pod, PodSpec};

/// Nobody listens there.
const CLOSED: &str = "9";

/// Ends the pod's early program, which must have been answered, and only ever as the egress IP.
fn finish(pod: &mut Pod) {
    let text = pod.early.take().expect("an early program").finish(Duration::from_mins(1)).expect_success();
    let line = text.lines().rfind(|line| line.starts_with('{')).unwrap_or_default();
    let report: serde_json::Value = serde_json::from_str(line).expect("a report");
    let answers = report["answers"].as_object().expect("answers");
    assert_eq!(answers.keys().collect::<Vec<_>>(), [EGRESS], "{}: {report}", pod.full_name());
}

/// They speak from their first microsecond; their objects never say an address.
fn pods_without_a_status(cni: Cni) {
    let scene = Scene::new(cni);
    let (lab, server) = (&scene.lab, scene.server.as_str());
    let _warm = ["node-a", "node-b"].map(|node| scene.warm(node));
    let outside = Outside::watch(lab);
    for number in 0..6 {
        let spec = PodSpec::new("prod", &format!("p{number}")).pending().cached();
        let spec = spec.early(&["bulk", "spray", server, "--syn", CLOSED]);
        finish(&mut lab.run_pod(&lab.nodes[number % 2].name, &spec));
    }
    let other = lab.run_pod("node-a", &PodSpec::new("dev", "other").pending().cached());
    lab.wait_source(&other.netns, server, &lab.node("node-a").address);
    outside.expect_at_most(&[EGRESS, &lab.node("node-a").address]);
}

#[test]
fn ptp_pods_are_known_from_the_runtimes_cache() {
    pods_without_a_status(Cni::Ptp);
}

#[test]
fn bridge_pods_are_known_from_the_runtimes_cache() {
    pods_without_a_status(Cni::Bridge);
}

/// What the cache says is kept until there is an object with labels, and over the agent's restart.
#[test]
fn the_cache_waits_for_the_object_and_outlives_the_agent() {
    let mut scene = Scene::new(Cni::Ptp);
    let (lab, server) = (&scene.lab, scene.server.as_str());
    let _warm = scene.warm("node-a");
    let outside = Outside::watch(lab);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "late").cached().unannounced());
    // Known after it was there: so is that there is no object for the other.
    let after = lab.run_pod("node-a", &PodSpec::new("prod", "after").cached().pending());
    lab.wait_source(&after.netns, server, EGRESS);
    assert!(pod.netns.udp_source(server, Duration::from_millis(300)).is_err(), "nobody knows it");
    pod.announce_pending();
    lab.wait_source(&pod.netns, server, EGRESS);

    Agent::stop(scene.agents.remove(0));
    let started = lab.run_pod("node-a", &PodSpec::new("prod", "meanwhile").cached().pending());
    assert!(started.netns.udp_source(server, Duration::from_millis(300)).is_err(), "no agent knows it");
    let mut agent = lab.start_agent("node-a");
    agent.wait_ready();
    for pod in [&pod, &after, &started] {
        lab.wait_source(&pod.netns, server, EGRESS);
    }
    // What the kubelet reports in the end changes nothing.
    pod.announce();
    pod.netns.tcp(server, 5, 1).expect_all_from(5, EGRESS);
    outside.expect_at_most(&[EGRESS]);
}

/// Files of sandboxes that are gone give nobody's address away.
#[test]
fn a_stale_file_takes_no_address() {
    let scene = Scene::new(Cni::Ptp);
    let (lab, server) = (&scene.lab, scene.server.as_str());
    let _warm = scene.warm("node-a");
    let node = &lab.node("node-a").address;
    let reported = lab.run_pod("node-a", &PodSpec::new("dev", "reported"));
    lab.wait_source(&reported.netns, server, node);
    let silent = lab.run_pod("node-a", &PodSpec::new("prod", "silent").cached().pending());
    lab.wait_source(&silent.netns, server, EGRESS);
    let outside = Outside::watch(lab);
    // Ghosts of each kind, and newer than what they would shadow.
    let mut selected = lab.prepare_pod("node-a", &PodSpec::new("prod", "selected"));
    selected.write_result_of(&reported);
    let mut unselected = lab.prepare_pod("node-a", &PodSpec::new("dev", "unselected"));
    // Of an interface that is gone.
    let gone = lab.run_pod("node-a", &PodSpec::new("prod", "gone"));
    unselected.write_result_of(&gone);
    let ip = gone.ip.clone();
    gone.delete();
    let last = lab.run_pod("node-a", &PodSpec::new("prod", "last").ip(&ip).cached().pending());
    // The ghost's file is the older one of two for an address.
    lab.wait_source(&last.netns, server, EGRESS);
    reported.netns.tcp(server, 3, 1).expect_all_from(3, node);
    silent.netns.tcp(server, 3, 1).expect_all_from(3, EGRESS);
    outside.expect_at_most(&[EGRESS, node]);
    assert_eq!(outside.to_others(EGRESS), 0);
}

/// The one thing that tells a later pod from an earlier one's file, where no status says anything and the ghost's
/// file is the newer: the interface that the runtime named.
#[test]
fn a_file_that_names_another_interface_does_not_count() {
    let scene = Scene::new(Cni::Ptp);
    let (lab, server) = (&scene.lab, scene.server.as_str());
    let _warm = scene.warm("node-a");
    let outside = Outside::watch(lab);
    let before = lab.run_pod("node-a", &PodSpec::new("prod", "before"));
    let mut ghost = lab.prepare_pod("node-a", &PodSpec::new("dev", "ghost"));
    ghost.write_result_of(&before);
    let ip = before.ip.clone();
    before.delete();
    // Neither its object nor its file is there yet.
    let new = lab.run_pod("node-a", &PodSpec::new("prod", "new").ip(&ip).unannounced());
    let after = lab.run_pod("node-a", &PodSpec::new("prod", "after").cached().pending());
    lab.wait_source(&after.netns, server, EGRESS);
    let seen = new.netns.udp_source(server, Duration::from_millis(300));
    assert!(seen.is_err(), "it passes for the ghost, which nothing selects: {seen:?}");
    new.announce();
    lab.wait_source(&new.netns, server, EGRESS);
    outside.expect_at_most(&[EGRESS]);
}
