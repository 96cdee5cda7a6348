//! Every mistake that a user can make in an object is told: by the API server when it is applied, or in the object's
//! status and an event where the server cannot know. The server here is old: it knows schemas and no CEL, so what newer
//! ones refuse at once is told by the status.

use std::time::Duration;

use lab::kube::KubeLab;
use lab::kube::request::path;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);

/// A mistake: the object's name, the manifest's spec, and words that must be among those that tell it.
type Mistake<'a> = (&'a str, &'a str, &'a [&'a str]);

/// All that an object's status says.
fn told(object: &Value) -> String {
    let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    let bad = conditions.filter(|condition| condition["status"] == "False");
    let texts = bad.map(|condition| {
        format!("{} {} {}", condition["reason"], condition["message"], condition["egressIP"])
    });
    texts.collect::<Vec<_>>().join("; ")
}

/// Applies an object and gives what is said about it, by the server or by the status.
#[track_caller]
fn said(kube: &KubeLab, manifest: &str, place: &str, words: &[&str]) -> String {
    let output = kube.api.try_apply(manifest);
    if !output.success() {
        return output.stderr;
    }
    kube.api.wait(&format!("{words:?} in the status of\n{manifest}"), place, LIMIT, |object| {
        let told = told(object);
        words.iter().all(|word| told.contains(word)).then_some(told)
    })
}

#[track_caller]
fn expect(kube: &KubeLab, manifest: &str, place: &str, words: &[&str]) {
    let said = said(kube, manifest, place, words);
    for word in words {
        assert!(said.contains(word), "'{word}' is missing in what is said of\n{manifest}\n{said}");
    }
    if kube.api.try_get(place).is_some() {
        kube.api.delete(place);
    }
}

const EGRESS_IPS: &[Mistake] = &[
    ("octet", "egressIPs: [300.1.2.3]", &["300.1.2.3"]),
    ("network", "egressIPs: [172.18.0.101/24]", &["172.18.0.101/24"]),
    ("word", "egressIPs: [gateway]", &["gateway"]),
    ("zeros", "egressIPs: [172.018.000.101]", &["172.018.000.101"]),
    ("number", "egressIPs: [17]", &["egressIPs"]),
    ("text", "egressIPs: 172.18.0.101", &["egressIPs"]),
    ("missing", "", &["egressIPs"]),
    ("nodes-own", "egressIPs: [172.18.0.11]", &["172.18.0.11", "node-a"]),
    ("pods", "egressIPs: [10.244.1.7]", &["10.244.1.7", "10.244"]),
    ("elsewhere", "egressIPs: [198.51.100.7]", &["198.51.100.7", "uplink"]),
    ("loopback", "egressIPs: [127.0.0.1]", &["127.0.0.1"]),
    ("broadcast", "egressIPs: [172.18.0.255]", &["172.18.0.255", "172.18.0.0/24"]),
    ("taken", "egressIPs: [172.18.0.101]", &["172.18.0.101", "prod", "older"]),
    ("mapped", "egressIPs: [\"::ffff:172.18.0.102\"]", &["::ffff:172.18.0.102"]),
];

const SELECTORS: &[Mistake] = &[
    ("none", "podSelector: {}", &["namespaceSelector"]),
    (
        "operator",
        "namespaceSelector: {matchExpressions: [{key: env, operator: Is, values: [prod]}]}",
        &["Is"],
    ),
    ("no-values", "namespaceSelector: {matchExpressions: [{key: env, operator: In}]}", &["In", "values"]),
    ("label", "namespaceSelector: {matchLabels: {\"a b\": c}}", &["a b"]),
    ("value", "namespaceSelector: {matchLabels: {a: \"b c\"}}", &["b c"]),
    ("slip", "namespaceSelector: {matchLabel: {env: prod}}", &["matchLabel"]),
    ("slip-pods", "namespaceSelector: {}\n  podSelectors: {matchLabels: {app: web}}", &["podSelectors"]),
];

const RULES: &[(&str, &[&str])] = &[
    ("{type: Permit, to: {cidrSelector: 192.0.2.0/24}}", &["Permit"]),
    ("{type: AllowX, to: {cidrSelector: 192.0.2.0/24}}", &["AllowX"]),
    ("{to: {cidrSelector: 192.0.2.0/24}}", &["type"]),
    ("{type: Deny}", &["to"]),
    ("{type: Deny, to: {}}", &["to"]),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0/24, dnsName: web.example}}", &["to"]),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0}}", &["192.0.2.0"]),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0/33}}", &["192.0.2.0/33"]),
    ("{type: Deny, to: {cidrSelector: all}}", &["all"]),
    ("{type: Deny, to: {dnsName: \"exa mple\"}}", &["exa mple"]),
    ("{type: Deny, to: {dnsName: \"*.*.example\"}}", &["*.*.example"]),
    ("{type: Deny, to: {dnsName: 192.0.2.1}}", &["192.0.2.1"]),
    ("{type: Deny, to: {nodeSelector: {matchLabels: {no: such}}}}", &["matches no node"]),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0/24}, ports: [{protocol: ICMP, port: 8}]}", &["ICMP"]),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0/24}, ports: [{protocol: tcp, port: 8}]}", &["tcp"]),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0/24}, ports: [{protocol: TCP, port: 0}]}", &["port"]),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0/24}, ports: [{protocol: TCP, port: 65536}]}", &["port"]),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0/24}, ports: [{protocol: TCP, port: http}]}", &["port"]),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0/24}, ports: [{port: 443}]}", &["protocol"]),
    (
        "{type: Deny, to: {cidrSelector: 192.0.2.0/24}, ports: [{protocol: TCP, port: 9, endPort: 8}]}",
        &["endPort"],
    ),
    ("{type: Deny, to: {cidrSelector: 192.0.2.0/24}, port: [{protocol: TCP, port: 9}]}", &["port"]),
];

const SETTINGS: &[(&str, &[&str])] = &[
    ("offload: Sometimes", &["Sometimes"]),
    ("unassigned: Leave", &["Leave"]),
    ("clusterCIDRs: [10.244.0.0]", &["clusterCIDRs"]),
    ("tunnel: {port: 70000}", &["port"]),
    ("tunnel: {vni: 16777216}", &["vni"]),
    ("timeouts: {udpSeconds: 0}", &["udpSeconds"]),
    ("resolvers: [dns.example]", &["resolvers"]),
    ("offloads: Never", &["offloads"]),
];

#[test]
fn every_mistake_is_told() {
    let kube = KubeLab::new(1, &["node-a"]);
    // Agents and the controller log mistakes, too.
    kube.lab.tolerate("EgressIP ");
    kube.lab.tolerate("EgressFirewall ");
    let _pod = kube.pod("node-a", "prod", "web");
    kube.api.apply(&lab::objects::egress_ip("prod", &["172.18.0.101"], &[("env", "prod")], &[]));
    let _ = kube.wait_owner("prod", "172.18.0.101");
    for (name, spec, words) in EGRESS_IPS {
        let manifest = format!(
            "apiVersion: k8s.ovn.org/v1\nkind: EgressIP\nmetadata:\n  name: {name}\nspec:\n  {spec}\n  namespaceSelector: {{matchLabels: {{env: none}}}}\n"
        );
        expect(&kube, &manifest, &path::egress_ip(name), words);
    }
    for (name, spec, words) in SELECTORS {
        let manifest = format!(
            "apiVersion: k8s.ovn.org/v1\nkind: EgressIP\nmetadata:\n  name: {name}\nspec:\n  egressIPs: [172.18.0.103]\n  {spec}\n"
        );
        expect(&kube, &manifest, &path::egress_ip(name), words);
    }
    for (rule, words) in RULES {
        let manifest = format!(
            "apiVersion: k8s.ovn.org/v1\nkind: EgressFirewall\nmetadata:\n  namespace: prod\n  name: default\nspec:\n  egress:\n  - {rule}\n"
        );
        expect(&kube, &manifest, &path::egress_firewall("prod"), words);
    }
    let named = "apiVersion: k8s.ovn.org/v1\nkind: EgressFirewall\nmetadata:\n  namespace: prod\n  name: mine\nspec:\n  egress: []\n";
    expect(&kube, named, &path::egress_firewall("prod").replace("default", "mine"), &["default"]);
    for (spec, words) in SETTINGS {
        let manifest = format!(
            "apiVersion: outgate.dev/v1alpha1\nkind: EgressConfig\nmetadata:\n  name: default\nspec:\n  {spec}\n"
        );
        expect(&kube, &manifest, &path::outgate("egressconfigs/default"), words);
    }
    let named = "apiVersion: outgate.dev/v1alpha1\nkind: EgressConfig\nmetadata:\n  name: mine\nspec: {}\n";
    expect(&kube, named, &path::outgate("egressconfigs/mine"), &["default"]);

    // What others did wrong took nothing from the object that was right.
    assert_eq!(kube.wait_owner("prod", "172.18.0.101"), "node-a");
    // And the mistakes that only the status tells are news, too.
    let events = kube.api.kubectl(&["get", "events", "--all-namespaces"]);
    for object in ["egressip/taken", "egressip/nodes-own", "egressfirewall/default"] {
        assert!(
            events.lines().any(|line| line.contains("Warning") && line.contains(object)),
            "no warning about {object}: {events}"
        );
    }
}
