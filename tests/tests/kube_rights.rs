//! What the manifests' accounts may do: enough, no more, and whoever lacks a right says which.

use std::time::Duration;

use lab::eventually_ok;
use lab::kube::KubeLab;
use lab::kube::install::NAMESPACE;
use lab::kube::request::path;
use lab::objects::egress_ip;
use serde_json::{Value, json};

const FIRST: &str = "172.18.0.101";
const SECOND: &str = "172.18.0.102";
const LIMIT: Duration = Duration::from_mins(1);

fn role(account: &str) -> String {
    format!("/apis/rbac.authorization.k8s.io/v1/clusterroles/{account}")
}

/// A ClusterRole with one verb on one resource taken away.
fn without(role: &Value, resource: &str, verb: &str) -> Value {
    let mut rules = Vec::new();
    for rule in role["rules"].as_array().expect("rules") {
        let names = |of: &Value| {
            of.as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let (resources, verbs) = (names(&rule["resources"]), names(&rule["verbs"]));
        let others: Vec<_> = resources.iter().filter(|name| *name != resource).collect();
        if others.len() < resources.len() {
            let left: Vec<_> = verbs.iter().filter(|name| *name != verb).collect();
            assert!(left.len() < verbs.len(), "the role has {verb} on {resource}");
            if !left.is_empty() {
                rules.push(json!({"apiGroups": rule["apiGroups"], "resources": [resource], "verbs": left}));
            }
        }
        if !others.is_empty() {
            rules.push(json!({"apiGroups": rule["apiGroups"], "resources": others, "verbs": verbs}));
        }
    }
    json!({"rules": rules})
}

#[test]
fn whoever_lacks_a_right_says_which() {
    let kube = KubeLab::installed(1, &["node-a"]);
    kube.lab.tolerate("may not");
    kube.lab.tolerate("orbidden");
    kube.api.apply(&egress_ip("prod", &[FIRST], &[("env", "prod")], &[]));
    for (account, resource, verb) in [
        ("outgate-agent", "pods", "list"),
        ("outgate-agent", "egressips", "watch"),
        ("outgate-agent", "egressnodes/status", "patch"),
        ("outgate-controller", "nodes", "list"),
        ("outgate-controller", "egressallocations", "create"),
    ] {
        let place = role(account);
        let whole = kube.api.get(&place);
        kube.api.patch(&place, &without(&whole, resource, verb));
        let controller = kube.api.start_controller(&kube.lab, "node-a");
        let agent = kube.api.start_agent(&kube.lab, "node-a");
        let mut process = if account == "outgate-agent" { agent } else { controller };
        eventually_ok(&format!("{account} misses {verb} on {resource}"), LIMIT, || {
            let log = process.log();
            let said = log.lines().any(|line| {
                (line.contains("WARN") || line.contains("ERROR"))
                    && line.contains(verb)
                    && line.contains(resource)
            });
            if said { Ok(()) } else { Err(log) }
        });
        // Whoever can list and not watch knows all there is, though not for long.
        if ["list", "watch"].contains(&verb) {
            let ready = process.get("/readyz");
            assert!(!ready.success(), "{} is ready without {verb} on {resource}", process.node);
        }
        // Given it, it goes on by itself.
        kube.api.patch(&place, &json!({"rules": whole["rules"]}));
        process.wait_ready();
        kube.api.wait(
            "a node that is reported",
            "/apis/outgate.dev/v1alpha1/egressnodes/node-a",
            LIMIT,
            |node| node["status"]["tunnelAddress"].is_string().then_some(()),
        );
        let _ = kube.wait_owner("prod", FIRST);
        kube.api.delete("/apis/outgate.dev/v1alpha1/egressnodes/node-a");
        let name =
            kube.api.wait("an allocation", "/apis/outgate.dev/v1alpha1/egressallocations", LIMIT, |list| {
                Some(list["items"].get(0)?["metadata"]["name"].as_str()?.to_owned())
            });
        kube.api.delete(&format!("/apis/outgate.dev/v1alpha1/egressallocations/{name}"));
    }
}

/// What is known stays in force and grows old: whoever looks whether the agent is ready is told.
#[test]
fn a_right_that_is_taken_away_shows_and_what_was_known_stays_in_force() {
    let mut kube = KubeLab::new(1, &["node-a"]);
    kube.lab.tolerate("orbidden");
    kube.lab.tolerate("API server");
    kube.lab.tolerate("cannot be read or renewed");
    kube.api.apply(&egress_ip("prod", &[FIRST], &[("env", "prod")], &[]));
    let pod = kube.pod("node-a", "prod", "web");
    kube.wait_source(&pod, FIRST);
    let place = role("outgate-agent");
    let whole = kube.api.get(&place);
    kube.api.patch(&place, &without(&whole, "egressips", "watch"));
    // A watch that is under way goes on: who may have it is asked when it begins.
    kube.api.kill();
    kube.api.start();
    eventually_ok("an agent that is not ready", LIMIT, || {
        let agent = kube.agent("node-a");
        let said = agent.log().contains("may not watch egressips");
        if said && !agent.get("/readyz").success() { Ok(()) } else { Err(agent.log()) }
    });
    kube.wait_source(&pod, FIRST);
    // The agent does not hear of it yet.
    kube.api.patch(&path::egress_ip("prod"), &json!({"spec": {"egressIPs": [SECOND]}}));
    kube.api.patch(&place, &json!({"rules": whole["rules"]}));
    kube.agents[0].wait_ready();
    kube.wait_source(&pod, SECOND);
}

/// Before the leader takes a node's ports away it looks whether the node is there.
#[test]
fn who_may_not_look_for_a_node_takes_no_ports_from_it() {
    let mut kube = KubeLab::new(2, &["node-a"]);
    kube.lab.tolerate("may not get nodes");
    kube.api.apply(&egress_ip("prod", &[FIRST], &[("env", "prod")], &[]));
    let pod = kube.pod("node-b", "prod", "web");
    kube.wait_source(&pod, FIRST);
    let place = role("outgate-controller");
    let whole = kube.api.get(&place);
    kube.api.patch(&place, &without(&whole, "nodes", "get"));
    eventually_ok("a right that is gone", LIMIT, || {
        let user = "outgate-controller-node-a";
        let answer = kube.api.kubectl_as(user, &["auth", "can-i", "get", "nodes"], "");
        if answer.stdout.trim() == "no" { Ok(()) } else { Err(answer.explain()) }
    });
    kube.take_agent("node-b").kill();
    kube.api.delete("/api/v1/nodes/node-b");
    eventually_ok("the controller says what it lacks", LIMIT, || {
        let log = kube.controllers[0].log();
        let words = ["WARN", "may not get nodes", "the verb get"];
        let said = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        if said { Ok(()) } else { Err(log) }
    });
    let spec = || kube.api.list(&path::outgate("egressallocations"))[0]["spec"].clone();
    let leases = |spec: &Value| spec["leases"].to_string().contains("\"node-b\"");
    assert!(leases(&spec()), "{}", spec());
    kube.api.patch(&place, &json!({"rules": whole["rules"]}));
    eventually_ok("ports that rest", LIMIT, || {
        let spec = spec();
        let rest = spec["resting"].as_array().is_some_and(|resting| !resting.is_empty());
        if rest && !leases(&spec) { Ok(()) } else { Err(spec.to_string()) }
    });
}

#[test]
fn nobody_has_more_rights_than_needed() {
    let kube = KubeLab::new(1, &["node-a"]);
    let may = |user: &str, words: &[&str]| {
        let answer = kube.api.kubectl_as(user, &[&["auth", "can-i"], words].concat(), "");
        assert!(["yes", "no"].contains(&answer.stdout.trim()), "{}", answer.explain());
        answer.stdout.trim() == "yes"
    };
    let (agent, controller) = ("outgate-agent-node-a", "outgate-controller-node-a");
    assert!(may(agent, &["patch", "egressnodes", "--subresource=status"]));
    assert!(may(controller, &["update", "egressallocations"]));
    for user in [agent, controller] {
        for verb in ["get", "list", "watch"] {
            assert!(!may(user, &[verb, "secrets", "--all-namespaces"]), "{user} may {verb} secrets");
        }
        for what in ["pods", "nodes", "nodes/status", "namespaces", "configmaps", "clusterroles"] {
            for verb in ["create", "update", "patch", "delete"] {
                assert!(!may(user, &[verb, what, "--all-namespaces"]), "{user} may {verb} {what}");
            }
        }
        for what in ["egressips", "egressfirewalls", "egressconfigs"] {
            assert!(!may(user, &["delete", what]) && !may(user, &["create", what]), "{user} and {what}");
        }
    }
    assert!(!may(controller, &["list", "pods", "--all-namespaces"]));
    for verb in ["create", "update", "patch", "delete"] {
        assert!(!may(agent, &[verb, "egressallocations"]), "agents may {verb} allocations");
    }
    assert!(!may(agent, &["update", "egressnodes"]), "what a node is granted is the controller's word");
    assert!(!may(agent, &["delete", "leases", "--namespace", NAMESPACE]));
}
