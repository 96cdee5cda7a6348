//! Pods that start while no agent runs are held by the guard on the pods' cgroup.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Cgroup, Lab, LabSpec, Pod, PodSpec, eventually_ok};

const EGRESS: &str = "172.18.0.101";

/// The pod's address as nginx sees it.
fn seen_by(cgroup: &Cgroup, pod: &Pod, server: &str) -> Result<String, String> {
    let url = format!("http://{server}/");
    let output = cgroup.try_exec(&pod.netns, &["curl", "--silent", "--show-error", "--max-time", "2", &url]);
    if !output.success() {
        return Err(output.explain());
    }
    Ok(output.stdout.split(' ').next().unwrap_or_default().to_owned())
}

#[test]
fn pods_that_start_without_an_agent_are_held() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let cgroup = lab.cgroup();
    let start = |node| {
        let path = cgroup.path.to_str().expect("UTF-8");
        let environment: &[_] = if node == "node-a" { &[("OUTGATE_POD_CGROUP", path)] } else { &[] };
        let mut agent = lab.start_agent_with(node, environment);
        agent.wait_ready();
        agent
    };
    let [agent, _other_agent] = ["node-a", "node-b"].map(start);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _web = [lab.nginx(&lab.web.netns), lab.echo(&lab.web.netns)];
    let web = &lab.web.address;
    let node = lab.node("node-a");
    let selected = lab.run_pod("node-a", &PodSpec::new("prod", "selected"));
    let unselected = lab.run_pod("node-a", &PodSpec::new("dev", "unselected"));
    let _inside = lab.echo(&unselected.netns);
    let known = || {
        for (pod, address) in [(&selected, EGRESS), (&unselected, &*node.address)] {
            eventually_ok("known pods pass", Duration::from_secs(10), || match seen_by(&cgroup, pod, web) {
                Ok(seen) if seen == address => Ok(()),
                other => Err(format!("{other:?}")),
            });
        }
    };
    known();
    // Replaced by that of the next agent.
    agent.kill();
    let agent = start("node-a");
    let pin = |(name, _): &(String, _)| name.starts_with("from_cgroup@");
    assert_eq!(lab.programs("node-a").into_iter().filter(pin).count(), 1);
    agent.kill();

    known();
    let late = lab.run_pod("node-a", &PodSpec::new("prod", "late"));
    let recorder = Recorder::start(&node.netns);
    // A sender is told of no failure: its datagrams are lost as in any network.
    let send = format!("for i in 1 2 3; do echo x > /dev/udp/{web}/{ECHO} || exit 1; done");
    let _ = cgroup.try_exec(&late.netns, &["bash", "-c", &send]).expect_success();
    assert!(seen_by(&cgroup, &late, web).is_err());
    for protocol in ["udp", "tcp"] {
        let seen = recorder.sources(protocol);
        assert!(!seen.contains_key(&late.ip), "{protocol} left the pod: {seen:?}");
    }
    let drops = lab.drops("node-a");
    assert!(drops.get("UnknownPod").is_some_and(|count| *count >= 4), "{drops:?}");
    // Inside the cluster it may speak.
    let inside = format!("echo x > /dev/tcp/{}/{ECHO}", unselected.ip);
    let _ = cgroup.try_exec(&late.netns, &["bash", "-c", &inside]).expect_success();
    // The node's own processes are not pods, whichever cgroup they are in.
    let url = format!("http://{web}/");
    let _ = cgroup.try_exec(&node.netns, &["curl", "--silent", "--max-time", "2", &url]).expect_success();
    known();

    let agent = start("node-a");
    eventually_ok("the pod is known", Duration::from_secs(10), || match seen_by(&cgroup, &late, web) {
        Ok(seen) if seen == EGRESS => Ok(()),
        other => Err(format!("{other:?}")),
    });

    agent.stop();
    let pins = lab.bpffs("node-a");
    let _ = lab.outgate("node-a", &["cleanup", "--bpffs", pins.to_str().expect("UTF-8")]).expect_success();
    let path = cgroup.path.to_str().expect("UTF-8");
    eventually_ok("the cgroup has no programs", Duration::from_secs(5), || {
        let left = node.netns.exec(&["bpftool", "-j", "cgroup", "show", path]);
        if left.trim() == "[]" || left.trim().is_empty() { Ok(()) } else { Err(left) }
    });
}
