//! The API server away, back, forgetful and cut off: traffic and rules go on, and afterwards all is as asked for,
//! without a restart.
//!
//! The outage here is of ten seconds, in which the waits between attempts reach their longest. `OUTGATE_LAB_OUTAGE` asks
//! for another, in seconds; the run of ten minutes that Outgate promises to live through is
//! `OUTGATE_LAB_OUTAGE=600 cargo nextest run -P long -p lab --test kube_outage traffic`.

use std::collections::BTreeSet;
use std::env;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::kube::KubeLab;
use lab::kube::install::NAMESPACE;
use lab::kube::request::path;
use lab::kube::world::items;
use lab::objects::egress_ip;
use lab::reach::{self, OPEN, SILENT};
use lab::{Agent, eventually_ok};
use serde_json::json;

const FIRST: &str = "172.18.0.101";
const SECOND: &str = "172.18.0.102";
const LATE: &str = "172.18.0.103";
const PROD: &[(&str, &str)] = &[("env", "prod")];
/// How long the API server is away unless asked otherwise.
const OUTAGE: Duration = Duration::from_secs(10);
/// A node that gives no sign of life for 40 s is taken for dead. So long after a longer outage nobody dies of it any more.
const DEADLINE: Duration = Duration::from_secs(90);
/// For what is noticed by TCP's keepalives: after 20 s without a word on a connection.
const KEEPALIVE: Duration = Duration::from_mins(1);

const FIREWALL: &str = "apiVersion: k8s.ovn.org/v1
kind: EgressFirewall
metadata:
  name: default
  namespace: prod
spec:
  egress:
  - type: Deny
    to:
      cidrSelector: 203.0.113.20/32
";

/// Two nodes whose egress IP is on the second, a pod on each, and a firewall.
fn world() -> KubeLab {
    let kube = KubeLab::new(2, &["node-b"]);
    // It is away on purpose.
    kube.lab.tolerate("API server");
    kube.lab.tolerate("cannot write");
    kube.lab.tolerate("this node's heartbeat: cannot");
    // A server that has just started knows no roles yet, and refuses everything for a moment.
    kube.lab.tolerate("is forbidden");
    kube.lab.tolerate("cannot be read or renewed");
    kube.api.apply(&egress_ip("prod", &[FIRST], PROD, &[]));
    kube.api.apply(FIREWALL);
    kube
}

/// How long the API server is away.
fn outage() -> Duration {
    env::var("OUTGATE_LAB_OUTAGE").map_or(OUTAGE, |text| {
        let seconds = text.parse().unwrap_or_else(|error| panic!("OUTGATE_LAB_OUTAGE={text}: {error}"));
        Duration::from_secs(seconds)
    })
}

/// When a node's agent has last given a sign of life, by its own clock.
fn heartbeat(kube: &KubeLab, node: &str) -> Option<String> {
    Some(kube.api.try_get(&path::lease(NAMESPACE, node))?["spec"]["renewTime"].as_str()?.to_owned())
}

fn set_address(kube: &KubeLab, address: &str) {
    kube.api.patch(&path::egress_ip("prod"), &json!({"spec": {"egressIPs": [address]}}));
}

#[test]
fn traffic_goes_on_without_the_api_server() {
    let mut kube = world();
    // Another that may lead when the server is back.
    kube.controllers.push(kube.api.start_controller(&kube.lab, "node-b"));
    let pods = ["node-a", "node-b"].map(|node| kube.pod(node, "prod", node));
    for pod in &pods {
        kube.wait_source(pod, FIRST);
    }
    let rules: &[(&str, &str)] =
        &[(&kube.lab.web.address.clone(), OPEN), (&kube.lab.other.address.clone(), SILENT)];
    reach::expect(&pods[0].netns, rules);
    let web = kube.web();
    let interval = Duration::from_millis(50);
    let old = pods[0].netns.stream("tcp", &web, interval);
    let new = pods[1].netns.fresh("tcp", &web, interval);
    let last = eventually_ok("a heartbeat", KEEPALIVE, || {
        heartbeat(&kube, "node-b").ok_or_else(|| "there is none".to_owned())
    });
    kube.api.kill_all();
    let outage = outage();
    sleep(outage);

    // Rules are in force for new connections too.
    reach::expect(&pods[1].netns, rules);
    // An agent that starts now has what it left in the kernel, and says what it waits for.
    let crashed = kube.take_agent("node-a");
    crashed.kill();
    // Its token is as it was; nobody can be asked for another one.
    let mut agent = kube.restart_agent("node-a");
    eventually_ok("it says that the API server is away", Duration::from_secs(20), || {
        let said = agent.get("/readyz");
        let text = [said.explain(), agent.log()].concat();
        if !said.success() && text.contains(&kube.api.url()) { Ok(()) } else { Err(text) }
    });
    kube.wait_source(&pods[0], FIRST);
    reach::expect(&pods[0].netns, rules);

    // When the leader decides for the first time, the egress node's sign of life is as old as the outage.
    kube.agent("node-b").pause();
    kube.api.start();
    let back = Instant::now();
    let owners = kube.api.record_allocations();
    kube.api.apply(&egress_ip("late", &[LATE], &[("env", "late")], &[]));
    assert_eq!(kube.wait_owner("late", LATE), "node-b");
    println!("the leader has decided {:?} after the server is back", back.elapsed());
    assert_eq!(heartbeat(&kube, "node-b").as_deref(), Some(&*last), "node-b is still");
    kube.agent("node-b").resume();
    agent.wait_ready();
    kube.agents.push(agent);
    eventually_ok("node-b gives a sign of life again", KEEPALIVE, || match heartbeat(&kube, "node-b") {
        Some(now) if now != last => Ok(()),
        other => Err(format!("{other:?}, before it was {last}")),
    });
    println!("a heartbeat {:?} after the server is back", back.elapsed());
    // Nobody has lost an address because the heartbeat was old, nor does when that could be noticed late.
    if outage > OUTAGE {
        sleep(DEADLINE.saturating_sub(back.elapsed()));
    }
    let held = [FIRST, LATE].map(|address| (address.to_owned(), "node-b".to_owned()));
    assert_eq!(owners.owners(), BTreeSet::from(held), "of all the time since the server is back");
    old.finish().expect_lossless_from(FIRST);
    new.finish().expect_lossless_from(FIRST);

    // All is as it was, and follows again, with the processes of before.
    let asked = Instant::now();
    set_address(&kube, SECOND);
    for pod in &pods {
        kube.wait_source(pod, SECOND);
    }
    println!("a new address is in force after {:?}", asked.elapsed());
    kube.api.delete(&path::egress_firewall("prod"));
    reach::expect(&pods[1].netns, &[(&kube.lab.other.address, OPEN)]);
    let late = kube.pod("node-a", "prod", "late");
    kube.wait_source(&late, SECOND);
    kube.agents.iter_mut().for_each(Agent::wait_ready);
}

/// A node's connections hang while the server starts anew elsewhere, so to speak, and forgets: no end of a connection
/// is told, and the versions that watches would go on from are gone.
#[test]
fn a_partition_with_everything_forgotten_is_noticed() {
    let mut kube = world();
    let pod = kube.pod("node-b", "prod", "web");
    kube.wait_source(&pod, FIRST);
    let cut = kube.lab.node("node-b").address.clone();
    kube.api.partition(&[&cut]);
    kube.api.kill();
    kube.api.compact();
    kube.api.start();
    // Deleted and made: a watch that goes on would miss it.
    kube.api.delete(&path::egress_firewall("prod"));
    kube.api.apply(&FIREWALL.replace("113.20", "113.10"));
    set_address(&kube, SECOND);
    // Nothing reaches the node, and what it has stays in force there.
    let rules: &[(&str, &str)] =
        &[(&kube.lab.web.address.clone(), OPEN), (&kube.lab.other.address.clone(), SILENT)];
    reach::expect(&pod.netns, rules);
    kube.api.compact();
    kube.api.heal();
    eventually_ok("the node has the new firewall", KEEPALIVE, || {
        let said =
            pod.netns.reach(&[&reach::tcp(&kube.lab.web.address), &reach::tcp(&kube.lab.other.address)]);
        if said == [SILENT, OPEN] { Ok(()) } else { Err(said.join(" ")) }
    });
    let object = path::egress_ip("prod");
    kube.api.wait("the status follows", &object, KEEPALIVE, |object| {
        (items(object) == [(SECOND.to_owned(), "node-b".to_owned())]).then_some(())
    });
    let other = format!("{}:{}", kube.lab.other.address, lab::servers::ECHO);
    kube.lab.wait_source(&pod.netns, &other, SECOND);
}
