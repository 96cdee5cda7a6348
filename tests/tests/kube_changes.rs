//! Edits of every object that egress IPs depend on: the traffic follows, the status too, and what others wrote stays.

use lab::kube::KubeLab;
use lab::kube::request::path;
use lab::kube::world::{LIMIT, items};
use lab::objects::egress_ip;
use serde_json::json;

const FIRST: &str = "172.18.0.101";
const SECOND: &str = "172.18.0.102";
const PROD: &[(&str, &str)] = &[("env", "prod")];

#[test]
fn traffic_and_status_follow_every_edit() {
    let kube = KubeLab::new(2, &["node-b"]);
    let (api, lab) = (&kube.api, &kube.lab);
    let own = lab.node("node-a").address.as_str();
    let pod = kube.pod("node-a", "prod", "web");
    api.apply(&egress_ip("prod", &[FIRST], PROD, &[]));
    kube.wait_source(&pod, FIRST);
    assert_eq!(kube.wait_owner("prod", FIRST), "node-b");

    // What others write on the object is theirs, whatever Outgate writes.
    api.kubectl(&["annotate", "eip", "prod", "example.com/owner=team-a"]);
    api.kubectl(&["label", "eip", "prod", "team=a"]);
    api.patch(&format!("{}/status", path::egress_ip("prod")), &json!({"status": {"note": "pruned or kept"}}));

    // Another address.
    api.kubectl(&[
        "patch",
        "eip",
        "prod",
        "--type=merge",
        "-p",
        &json!({"spec": {"egressIPs": [SECOND]}}).to_string(),
    ]);
    kube.wait_source(&pod, SECOND);
    let object = api.wait("the status follows", &path::egress_ip("prod"), LIMIT, |object| {
        (items(object) == [(SECOND.to_owned(), "node-b".to_owned())]).then(|| object.clone())
    });
    assert_eq!(object["metadata"]["annotations"]["example.com/owner"], "team-a");
    assert_eq!(object["metadata"]["labels"]["team"], "a");
    assert_eq!(object["spec"]["namespaceSelector"], json!({"matchLabels": {"env": "prod"}}));

    // The namespace's label.
    api.kubectl(&["label", "namespace", "prod", "env=test", "--overwrite"]);
    kube.wait_source(&pod, own);
    api.kubectl(&["label", "namespace", "prod", "env=prod", "--overwrite"]);
    kube.wait_source(&pod, SECOND);

    // The pod's label.
    let select = json!({"spec": {"podSelector": {"matchLabels": {"app": "web"}}}});
    api.kubectl(&["patch", "eip", "prod", "--type=merge", "-p", &select.to_string()]);
    kube.wait_source(&pod, own);
    api.kubectl(&["label", "pod", "web", "--namespace", "prod", "app=web"]);
    kube.wait_source(&pod, SECOND);
    api.kubectl(&["label", "pod", "web", "--namespace", "prod", "app-"]);
    kube.wait_source(&pod, own);
    api.kubectl(&[
        "patch",
        "eip",
        "prod",
        "--type=json",
        "-p",
        r#"[{"op": "remove", "path": "/spec/podSelector"}]"#,
    ]);
    kube.wait_source(&pod, SECOND);

    // A node that has not heard yet that the address has moved still answers for it, for a moment.
    kube.lab.tolerate("two machines answer for it");
    // The node's label: the address moves, and with no node it is nobody's and its pods wait.
    api.kubectl(&["label", "node", "node-a", "k8s.ovn.org/egress-assignable="]);
    api.kubectl(&["label", "node", "node-b", "k8s.ovn.org/egress-assignable-"]);
    kube.wait_items("prod", |items| items == [(SECOND.to_owned(), "node-a".to_owned())]);
    kube.wait_source(&pod, SECOND);
    api.kubectl(&["label", "node", "node-a", "k8s.ovn.org/egress-assignable-"]);
    kube.wait_condition(&path::egress_ip("prod"), "AddressAssigned", "False", "NoEgressNode");
    lab::eventually_ok("an address that nobody holds lets nothing out", LIMIT, || {
        let seen = pod.netns.tcp_source(&kube.web(), std::time::Duration::from_millis(300));
        seen.map_or(Ok(()), Err)
    });
    api.kubectl(&["label", "node", "node-b", "k8s.ovn.org/egress-assignable="]);
    kube.wait_source(&pod, SECOND);

    // A pod that goes, and another one with its name and other labels.
    api.delete_pod(&pod);
    drop(pod);
    let pod = kube.pod("node-b", "prod", "web");
    kube.wait_source(&pod, SECOND);

    kube.lab.tolerate("is refused: also in EgressIP prod");
    // A second object with the same address: the older one has it, and the other one says so.
    api.apply(&egress_ip("late", &[SECOND], &[("env", "dev")], &[]));
    let message = kube.wait_condition(&path::egress_ip("late"), "AddressAssigned", "False", "Duplicate");
    assert!(message.contains("prod"), "{message}");
    api.kubectl(&["delete", "eip", "prod"]);
    kube.wait_source(&pod, &lab.node("node-b").address);
    let other = kube.pod("node-a", "dev", "web");
    kube.wait_source(&other, SECOND);
    assert_eq!(kube.wait_owner("late", SECOND), "node-b");
}

/// The definition that OVN-Kubernetes installs has no status subresource: its status is a field like others.
#[test]
fn a_definition_without_a_status_subresource_works_too() {
    let kube = KubeLab::installed(2, &["node-b"]);
    let patch = r#"[{"op": "remove", "path": "/spec/versions/0/subresources"}]"#;
    for name in ["egressips.k8s.ovn.org", "egressfirewalls.k8s.ovn.org"] {
        kube.api.kubectl(&["patch", "crd", name, "--type=json", "-p", patch]);
    }
    let mut kube = kube;
    kube.controllers.push(kube.api.start_controller(&kube.lab, "node-a"));
    kube.agents = kube.api.start_agents(&kube.lab);
    let pod = kube.pod("node-a", "prod", "web");
    kube.api.apply(&egress_ip("prod", &[FIRST], PROD, &[]));
    kube.wait_source(&pod, FIRST);
    assert_eq!(kube.wait_owner("prod", FIRST), "node-b");
    // A user's edit with the status in it, as `kubectl edit` sends it.
    kube.api.kubectl(&["annotate", "eip", "prod", "example.com/owner=team-a"]);
    kube.api.kubectl(&[
        "patch",
        "eip",
        "prod",
        "--type=merge",
        "-p",
        &json!({"spec": {"egressIPs": [SECOND]}}).to_string(),
    ]);
    kube.wait_source(&pod, SECOND);
    let object = kube.api.wait("the status follows", &path::egress_ip("prod"), LIMIT, |object| {
        (items(object) == [(SECOND.to_owned(), "node-b".to_owned())]).then(|| object.clone())
    });
    assert_eq!(object["metadata"]["annotations"]["example.com/owner"], "team-a");
    assert_eq!(object["spec"]["egressIPs"], json!([SECOND]));
}
