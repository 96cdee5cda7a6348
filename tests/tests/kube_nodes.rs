//! Which node holds an address: capacity, readiness, heartbeats, and nodes that come back.

use std::time::Duration;

use lab::kube::KubeLab;
use lab::kube::request::path;
use lab::objects::egress_ip;
use serde_json::json;

const ADDRESSES: [&str; 3] = ["172.18.0.101", "172.18.0.102", "172.18.0.103"];
const PROD: &[(&str, &str)] = &[("env", "prod")];
/// An agent is given up after 40 s without a heartbeat, and the machine is busy.
const HEARTBEAT: Duration = Duration::from_secs(80);

/// What clouds say of a node.
fn capacity(ipv4: u32) -> String {
    json!([{"interface": "eth0", "ifaddr": {"ipv4": "172.18.0.0/24"}, "capacity": {"ipv4": ipv4}}])
        .to_string()
}

#[test]
fn capacity_readiness_and_return_decide() {
    let kube = KubeLab::new(3, &["node-b", "node-c"]);
    let api = &kube.api;
    for (node, addresses) in [("node-b", 1), ("node-c", 1)] {
        let annotation = format!("cloud.network.openshift.io/egress-ipconfig={}", capacity(addresses));
        api.kubectl(&["annotate", "node", node, &annotation]);
    }
    let pod = kube.pod("node-a", "prod", "web");
    // Three objects, two places.
    for (name, address) in ["one", "two", "three"].iter().zip(ADDRESSES) {
        let labels: &[(&str, &str)] = if *name == "one" { PROD } else { &[("env", "none")] };
        api.apply(&egress_ip(name, &[address], labels, &[]));
        if *name != "three" {
            let _ = kube.wait_owner(name, address);
        }
    }
    kube.wait_condition(&path::egress_ip("three"), "AddressAssigned", "False", "NoCapacity");
    let first = kube.wait_owner("one", ADDRESSES[0]);
    let second = kube.wait_owner("two", ADDRESSES[1]);
    assert_ne!(first, second);
    kube.wait_source(&pod, ADDRESSES[0]);

    // More room: what waits gets it, and nothing else moves.
    let annotation = format!("cloud.network.openshift.io/egress-ipconfig={}", capacity(2));
    api.kubectl(&["annotate", "--overwrite", "node", &second, &annotation]);
    assert_eq!(kube.wait_owner("three", ADDRESSES[2]), second);
    assert_eq!(kube.wait_owner("one", ADDRESSES[0]), first);

    // A node that is not ready any more: the other has room for nothing else.
    let unready = kube.lab.node(&first).clone();
    api.set_ready(&unready, false);
    kube.wait_condition(&path::egress_ip("one"), "AddressAssigned", "False", "NoCapacity");
    api.kubectl(&["delete", "eip", "three"]);
    kube.wait_items("one", |items| items == [(ADDRESSES[0].to_owned(), second.clone())]);
    kube.wait_source(&pod, ADDRESSES[0]);

    // It comes back and gets what nobody has, not what others hold.
    api.set_ready(&unready, true);
    api.apply(&egress_ip("three", &[ADDRESSES[2]], &[("env", "none")], &[]));
    assert_eq!(kube.wait_owner("three", ADDRESSES[2]), first);
    assert_eq!(kube.wait_owner("one", ADDRESSES[0]), second);
    assert_eq!(kube.wait_owner("two", ADDRESSES[1]), second);
    kube.wait_source(&pod, ADDRESSES[0]);
}

#[test]
fn a_node_whose_agent_is_dead_gives_its_addresses_away() {
    let mut kube = KubeLab::new(3, &["node-b", "node-c"]);
    kube.api.apply(&egress_ip("prod", &[ADDRESSES[0]], PROD, &[]));
    let pod = kube.pod("node-a", "prod", "web");
    kube.wait_source(&pod, ADDRESSES[0]);
    let owner = kube.wait_owner("prod", ADDRESSES[0]);
    let connection = pod.netns.stream("tcp", &kube.web(), Duration::from_millis(50));
    kube.take_agent(&owner).kill();
    let heir = kube.api.wait("another owner", &path::egress_ip("prod"), HEARTBEAT, |object| {
        let items = lab::kube::world::items(object);
        let (_, node) = items.first()?;
        (*node != owner).then(|| node.clone())
    });
    assert!(["node-b", "node-c"].contains(&heir.as_str()), "{heir}");
    kube.wait_source(&pod, ADDRESSES[0]);
    connection.finish().expect_lossless_from(ADDRESSES[0]);

    // Its agent comes back: nothing moves for that, and it gets what is new.
    let mut agent = kube.restart_agent(&owner);
    agent.wait_ready();
    kube.agents.push(agent);
    kube.api.apply(&egress_ip("late", &[ADDRESSES[1]], &[("env", "none")], &[]));
    assert_eq!(kube.wait_owner("late", ADDRESSES[1]), owner);
    assert_eq!(kube.wait_owner("prod", ADDRESSES[0]), heir);
}
