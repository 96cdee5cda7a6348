//! The lab's own Kubernetes API server: what the other tests rest on.

use std::time::Duration;

use lab::kube::request::path;
use lab::{Lab, LabSpec, PodSpec};

#[test]
fn the_api_server_is_real_and_survives_what_tests_do_to_it() {
    let lab = Lab::with(&LabSpec::default().nodes(1));
    let mut api = lab.kube_api();
    api.describe_cluster(&lab, &["node-a"]);
    let pod = api.run_pod(&lab, "node-a", &PodSpec::new("prod", "web").label("app", "web"));

    let shown = api.kubectl(&["get", "pods", "--namespace", "prod", "--output", "wide"]);
    assert!(shown.contains(&pod.ip) && shown.contains("Running") && shown.contains("node-a"), "{shown}");
    assert!(api.kubectl(&["get", "nodes"]).contains("Ready"));

    // A node reaches it, with the server's certificate checked.
    let url = format!("{}/livez", api.url());
    let node = &lab.node("node-a").netns;
    let ask =
        |limit: &str| node.try_exec(&["curl", "--insecure", "--silent", "--max-time", limit, &url]).success();
    assert!(ask("5"));
    api.partition(&[&lab.node("node-a").address]);
    assert!(!ask("0.5"), "a partition lets nothing through");
    api.heal();
    assert!(ask("5"));

    api.kill();
    assert!(!api.try_kubectl(&["get", "nodes"]).success());
    api.start();
    let version = api.get(&path::pod("prod", "web"))["metadata"]["resourceVersion"].clone();
    api.compact();
    api.kill_all();
    api.start();
    api.wait("the pod as it was", &path::pod("prod", "web"), Duration::from_secs(5), |pod| {
        (pod["metadata"]["resourceVersion"] == version).then_some(())
    });
    api.delete_pod(&pod);
    assert!(api.try_get(&path::pod("prod", "web")).is_none());
}
