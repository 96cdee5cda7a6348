//! Two controllers: one leads, the other takes over, and whatever a late one writes gives no port to two nodes.

use std::time::Duration;

use lab::eventually_ok;
use lab::kube::KubeLab;
use lab::kube::install::NAMESPACE;
use lab::kube::request::path;
use lab::kube::world::LIMIT;
use lab::objects::egress_ip;
use serde_json::{Value, json};

const PROD: &[(&str, &str)] = &[("env", "prod")];
const DEV: &[(&str, &str)] = &[("env", "dev")];
/// A Lease of ten seconds that nobody renews, and a busy machine.
const TAKEOVER: Duration = Duration::from_secs(30);

/// Who holds the Lease.
fn holder(lease: &Value) -> Option<String> {
    lease["spec"]["holderIdentity"].as_str().filter(|holder| !holder.is_empty()).map(str::to_owned)
}

/// Waits until somebody else leads; gives who does.
fn wait_leader(kube: &KubeLab, but: &str) -> String {
    kube.api.wait("a leader", &path::lease(NAMESPACE, "outgate-controller"), TAKEOVER, |lease| {
        holder(lease).filter(|holder| holder != but)
    })
}

/// Which of the controllers says that it leads: just one does.
fn leading(kube: &KubeLab) -> usize {
    eventually_ok("one leads", TAKEOVER, || {
        let leading = kube.controllers.iter().map(|controller| controller.metric("outgate_leader", ""));
        let leading: Vec<_> = leading.collect();
        let at = leading.iter().position(|leads| *leads == 1);
        at.filter(|_| leading.iter().sum::<u64>() == 1).ok_or_else(|| format!("{leading:?}"))
    })
}

#[test]
fn one_leads_and_the_other_takes_over() {
    let mut kube = KubeLab::installed(3, &["node-b", "node-c"]);
    let history = kube.api.record_allocations();
    // Both at once.
    for node in ["node-a", "node-b"] {
        kube.controllers.push(kube.api.start_controller(&kube.lab, node));
    }
    kube.agents = kube.api.start_agents(&kube.lab);
    kube.api.apply(&egress_ip("prod", &["172.18.0.101", "172.18.0.102"], PROD, &[]));
    let first = kube.pod("node-a", "prod", "first");
    kube.wait_source_of(&first, &["172.18.0.101", "172.18.0.102"]);
    let leader = wait_leader(&kube, "");
    let at = leading(&kube);

    // The leader dies without a word.
    let dead = kube.controllers.remove(at);
    let node = dead.node.clone();
    dead.kill();
    kube.api.apply(&egress_ip("dev", &["172.18.0.103"], DEV, &[]));
    let second = kube.pod("node-c", "dev", "second");
    let next = wait_leader(&kube, &leader);
    kube.wait_source(&second, "172.18.0.103");

    // It comes back, and the one that leads now sleeps past its Lease. Both have plans then.
    kube.controllers.push(kube.api.start_controller(&kube.lab, &node));
    let sleeper = &kube.controllers[0];
    kube.lab.tolerate("Lease");
    sleeper.pause();
    kube.api.apply(&egress_ip("late", &["172.18.0.104"], &[("team", "late")], &[]));
    let third = kube.pod("node-a", "dev", "third");
    let last = wait_leader(&kube, &next);
    assert_ne!(last, next);
    kube.api.kubectl(&["delete", "eip", "dev"]);
    kube.api.kubectl(&["label", "namespace", "dev", "team=late"]);
    kube.wait_source(&second, "172.18.0.104");
    kube.wait_source(&third, "172.18.0.104");
    sleeper.resume();

    // Changes after its awakening are made once, by the one that leads.
    kube.api.patch(&path::egress_ip("late"), &json!({"spec": {"egressIPs": ["172.18.0.105"]}}));
    kube.wait_source(&third, "172.18.0.105");
    kube.wait_items("late", |items| items.len() == 1 && items[0].0 == "172.18.0.105");
    kube.wait_items("prod", |items| items.len() == 2);
    assert_eq!(wait_leader(&kube, ""), last, "the one that woke up has not taken the Lease");
    let lists = [path::outgate("egressallocations"), path::outgate("egressnodes")];
    let newest: Vec<_> = lists
        .iter()
        .flat_map(|list| kube.api.list(list))
        .map(|object| object["metadata"]["resourceVersion"].as_str().expect("a version").to_owned())
        .collect();
    assert!(newest.len() >= 6, "three nodes and three addresses: {newest:?}");
    assert_eq!(history.conflicts(&newest), Vec::<String>::new());

    // A controller that is told to end gives the Lease back: the other one need not wait for its end.
    let at = leading(&kube);
    kube.controllers.remove(at).stop();
    kube.api.wait(
        "the Lease is given back or taken",
        &path::lease(NAMESPACE, "outgate-controller"),
        LIMIT,
        |lease| (holder(lease).as_deref() != Some(&last)).then_some(()),
    );
    let heir = wait_leader(&kube, &last);
    assert_ne!(heir, last);
}
