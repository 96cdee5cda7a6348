//! The README's way into a cluster, with documentation's manifests, and what kubectl shows of it.

use lab::Output;
use lab::kube::KubeLab;
use lab::kube::request::path;
use lab::kube::world::LIMIT;
use lab::reach::{self, OPEN, SILENT};

/// OpenShift's documentation, "Assigning an egress IP address to a namespace", with the lab's addresses.
const EGRESSIPS_PROD: &str = "apiVersion: k8s.ovn.org/v1
kind: EgressIP
metadata:
  name: egressips-prod
spec:
  egressIPs:
  - 172.18.0.101
  - 172.18.0.102
  namespaceSelector:
    matchLabels:
      env: prod
";
const ADDRESSES: [&str; 2] = ["172.18.0.101", "172.18.0.102"];

/// OpenShift's documentation, "Example EgressFirewall CR objects", with the lab's addresses.
const FIREWALL: &str = "apiVersion: k8s.ovn.org/v1
kind: EgressFirewall
metadata:
  name: default
spec:
  egress:
  - type: Allow
    to:
      cidrSelector: 203.0.113.0/28
  - type: Deny
    to:
      cidrSelector: 0.0.0.0/0
";

/// A table that kubectl prints, by rows of words.
fn table(text: &str) -> Vec<Vec<&str>> {
    text.lines()
        .map(|line| line.split("  ").map(str::trim).filter(|word| !word.is_empty()).collect())
        .collect()
}

#[track_caller]
fn events(kube: &KubeLab, namespace: &str, wanted: &[&str]) {
    lab::eventually_ok(&format!("an event with {wanted:?}"), LIMIT, || {
        let text = kube.api.kubectl(&["get", "events", "--namespace", namespace]);
        let found = text.lines().any(|line| wanted.iter().all(|word| line.contains(word)));
        if found { Ok(()) } else { Err(text) }
    });
}

#[test]
fn one_command_installs_and_documentations_manifests_work() {
    let kube = KubeLab::new(3, &[]);
    let (api, lab) = (&kube.api, &kube.lab);
    // Installing again changes nothing; of the definitions this old server has dropped the CEL rules, so kubectl sends
    // those again.
    let again = api.kubectl(&["apply", "-k", lab::kube::install::manifests().to_str().expect("UTF-8")]);
    let changed = again.lines().filter(|line| !line.ends_with(" unchanged"));
    assert!(changed.into_iter().all(|line| line.starts_with("customresourcedefinition")), "{again}");

    let prod = kube.pod("node-a", "prod", "web");
    let other = kube.pod("node-a", "dev", "web");
    kube.wait_source(&prod, &lab.node("node-a").address);
    api.kubectl(&["label", "nodes", "node-b", "node-c", "k8s.ovn.org/egress-assignable="]);
    api.apply(EGRESSIPS_PROD);
    kube.wait_source_of(&prod, &ADDRESSES);
    kube.wait_source(&other, &lab.node("node-a").address);

    // Where it is, at a glance.
    let items = kube.wait_items("egressips-prod", |items| items.len() == 2);
    let mut nodes: Vec<_> = items.iter().map(|(_, node)| node.as_str()).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["node-b", "node-c"], "one address of an object on a node");
    let eip = api.kubectl(&["get", "eip"]);
    let rows = table(&eip);
    assert_eq!(rows[0][..4], ["NAME", "EGRESSIPS", "ASSIGNED NODE", "ASSIGNED EGRESSIPS"], "{eip}");
    assert_eq!(
        rows[1][..4],
        ["egressips-prod", ADDRESSES[0], items[0].1.as_str(), items[0].0.as_str()],
        "{eip}"
    );
    let allocations = api.kubectl(&["get", "egressallocations"]);
    for (address, node) in &items {
        assert!(
            table(&allocations)
                .iter()
                .any(|row| row.contains(&address.as_str()) && row.contains(&node.as_str())),
            "{allocations}"
        );
    }
    let shown = api.kubectl(&["get", "egressnodes"]);
    for node in &lab.nodes {
        let row = table(&shown).into_iter().find(|row| row[0] == node.name);
        assert!(row.is_some_and(|row| row.len() > 2 && row.contains(&node.address.as_str())), "{shown}");
    }
    for line in [&eip, &allocations, &shown].into_iter().flat_map(|text| text.lines()) {
        assert!(line.chars().count() <= 160, "too wide for a terminal: {line}");
    }
    events(&kube, "default", &["egressip", "egressips-prod"]);

    // The firewall's object is in its namespace.
    let _ = api.kubectl_as("admin", &["apply", "--namespace", "prod", "-f", "-"], FIREWALL).expect_success();
    reach::expect(&prod.netns, &[(&lab.web.address, OPEN), (&lab.other.address, SILENT)]);
    reach::expect(&other.netns, &[(&lab.other.address, OPEN)]);
    kube.wait_condition(&path::egress_firewall("prod"), "Applied", "True", "RulesApplied");
    let firewalls = api.kubectl(&["get", "egressfirewall", "--namespace", "prod"]);
    let rows = table(&firewalls);
    assert_eq!(rows[0][..2], ["NAME", "EGRESSFIREWALL STATUS"], "{firewalls}");
    assert_eq!(rows[1][..2], ["default", "EgressFirewall Rules applied"], "{firewalls}");
    events(&kube, "prod", &["egressfirewall/default"]);

    // As users look at one object.
    let described = api.kubectl(&["describe", "eip", "egressips-prod"]);
    assert!(described.contains("Events:") && described.contains("Normal"), "{described}");

    // Taken away again: the pod is as others are.
    api.kubectl(&["delete", "egressfirewall", "default", "--namespace", "prod"]);
    reach::expect(&prod.netns, &[(&lab.other.address, OPEN)]);
    api.kubectl(&["delete", "eip", "egressips-prod"]);
    kube.wait_source(&prod, &lab.node("node-a").address);
    api.wait("allocations go with their object", &path::outgate("egressallocations"), LIMIT, |list| {
        list["items"].as_array()?.is_empty().then_some(())
    });
}

#[test]
fn uninstalling_leaves_users_objects() {
    let kube = KubeLab::installed(1, &["node-a"]);
    kube.api.apply(EGRESSIPS_PROD);
    let base = lab::kube::install::manifests().join("base");
    let removed: Output =
        kube.api.try_kubectl(&["delete", "-k", base.to_str().expect("UTF-8"), "--wait=false"]);
    assert!(removed.success(), "{}", removed.explain());
    assert!(kube.api.kubectl(&["get", "eip"]).contains("egressips-prod"));
    assert!(!kube.api.try_kubectl(&["get", "clusterrole", "outgate-agent"]).success());
}
