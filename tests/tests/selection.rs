//! A pod that becomes selected keeps no old connection with the node's address.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Lab, LabSpec, Netns, PodSpec, eventually_ok};

const EGRESS: &str = "172.18.0.101";
const LIMIT: Duration = Duration::from_secs(5);

/// A node's conntrack entries opened by `source` towards `destination`, a line each.
fn entries(node: &Netns, source: &str, destination: &str) -> Vec<String> {
    let list = node.exec(&["conntrack", "-L", "-s", source, "-d", destination]);
    list.lines().map(str::to_owned).collect()
}

/// A connection that says nothing once it is open.
fn quiet(netns: &Netns, address: &str) -> lab::Process {
    let script = format!("exec 3<>/dev/tcp/{address}/{ECHO}; read -r -t 10 -N 1 -u 3; echo open; sleep 60");
    let mut process = netns.spawn("quiet", &["bash", "-c", &script], &[]);
    process.wait_stdout("open", LIMIT);
    process
}

#[test]
fn old_connections_towards_outside_end_and_no_others() {
    let lab = Lab::with(&LabSpec::default().nodes(2).routed_pods());
    lab.describe_cluster(&["node-b"]);
    let _agents = lab.start_agents();
    let node = lab.node("node-a");
    let web = lab.echo(&lab.web.netns);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let inside = lab.run_pod("node-b", &PodSpec::new("dev", "inside"));
    let _servers = [&pod, &inside].map(|pod| lab.echo(&pod.netns));
    lab.wait_source(&pod.netns, &format!("{}:{ECHO}", lab.web.address), &node.address);
    // The connections of before are closed by both ends, and no longer than that of interest.
    let _ = node.netns.exec(&["conntrack", "-F"]);

    let (outside, interval) = (&lab.web.address, Duration::from_millis(10));
    let old = quiet(&pod.netns, outside);
    let to_pod = pod.netns.stream("tcp", &format!("{}:{ECHO}", inside.ip), interval);
    let came_in = lab.web.netns.stream("tcp", &format!("{}:{ECHO}", pod.ip), interval);
    assert_eq!(entries(&node.netns, &pod.ip, outside).len(), 1);
    assert_eq!(entries(&node.netns, &pod.ip, &inside.ip).len(), 1);
    assert_eq!(entries(&node.netns, outside, &pod.ip).len(), 1);

    let recorder = Recorder::start_without_resets(&lab.web.netns);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    eventually_ok("the old connection's entry goes", LIMIT, || {
        let left = entries(&node.netns, &pod.ip, outside);
        if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
    });
    assert_eq!(entries(&node.netns, &pod.ip, &inside.ip).len(), 1);
    assert_eq!(entries(&node.netns, outside, &pod.ip).len(), 1);

    // What the server still sends is not delivered: the node resets it.
    web.kill();
    eventually_ok("the server's end of the old connection is gone", LIMIT, || {
        let left = lab.web.netns.exec(&["ss", "-Htan", "dst", &node.address]);
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    drop(old);
    // The plugin masquerades towards other nodes' pods as well.
    to_pod.finish().expect_lossless_from(&node.address);
    came_in.finish().expect_lossless_from(outside);
    let seen = recorder.sources("tcp");
    assert!(!seen.contains_key(&node.address), "{seen:?}");
}
