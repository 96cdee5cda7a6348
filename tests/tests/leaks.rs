//! Nothing of a selected pod leaves with another source: not from its first moment, not without an agent, not when
//! the pod forges its source.

use std::env;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use lab::hostile::{Outside, octets};
use lab::packet::{icmp, tcp, udp};
use lab::servers::ECHO;
use lab::{Agent, Cni, Lab, LabSpec, Pod, PodSpec, eventually};

const EGRESS: &str = "172.18.0.101";
/// Nobody listens there.
const CLOSED: u16 = 9;
/// Pods that are being made at the same time.
const HANDS: usize = 6;

fn two_nodes(cni: Cni) -> Lab {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    lab
}

/// How many pods a test starts: `OUTGATE_LAB_PODS`, or 200.
fn how_many() -> usize {
    let text = env::var("OUTGATE_LAB_PODS");
    text.map_or(200, |text| text.parse().unwrap_or_else(|error| panic!("OUTGATE_LAB_PODS={text}: {error}")))
}

/// Runs pods that speak as soon as they can, half of them on each node.
fn early_pods(lab: &Lab, namespace: &str, count: usize) -> Vec<Pod> {
    let (next, pods) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let (server, closed) = (format!("{}:{ECHO}", lab.web.address), CLOSED.to_string());
    thread::scope(|scope| {
        for _ in 0..HANDS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        break;
                    }
                    let spec = PodSpec::new(namespace, &format!("p{number}"));
                    let spec = spec.early(&["bulk", "spray", &server, "--syn", &closed]);
                    let pod = lab.run_pod(&lab.nodes[number % 2].name, &spec);
                    pods.lock().expect("no thread failed").push(pod);
                }
            });
        }
    });
    pods.into_inner().expect("no thread failed")
}

/// Ends the pods' early programs; every one of them must have been answered, and only ever as the egress IP.
fn finish(pods: &mut [Pod]) -> (u64, u64) {
    let (mut sent, mut syns) = (0, 0);
    for pod in pods {
        let output = pod.early.take().expect("an early program").finish(Duration::from_mins(1));
        let text = output.expect_success();
        let line = text.lines().rfind(|line| line.starts_with('{')).unwrap_or_default();
        let report: serde_json::Value = serde_json::from_str(line).expect("a report");
        let answers = report["answers"].as_object().expect("answers");
        let seen: Vec<_> = answers.keys().map(String::as_str).collect();
        assert_eq!(seen, [EGRESS], "{}: {report}", pod.full_name());
        sent += report["sent"].as_u64().unwrap_or_default();
        syns += report["syns"].as_u64().unwrap_or_default();
    }
    (sent, syns)
}

/// Packets that were held back: of interfaces and pods not known yet, and of new ports of a bridge that is.
fn held(lab: &Lab) -> u64 {
    let reasons = ["UnknownInterface", "UnknownPod", "TokenLost"];
    let drops = lab.nodes.iter().map(|node| lab.drops(&node.name));
    drops.map(|drops| reasons.iter().filter_map(|reason| drops.get(reason)).sum::<u64>()).sum()
}

/// Every pod sends before the CNI plugin has returned. `part` of the pods that are asked for.
fn first_packets_of_new_pods(cni: Cni, part: usize) {
    let lab = two_nodes(cni);
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let outside = Outside::watch(&lab);
    let before = held(&lab);
    let mut pods = early_pods(&lab, "prod", how_many() / part);
    let (sent, syns) = finish(&mut pods);
    assert!(sent > 0 && syns > 0, "{sent} datagrams and {syns} SYNs left pods");
    assert!(held(&lab) > before, "no pod spoke before it was known: the test shows nothing");
    outside.expect_at_most(&[EGRESS]);
}

#[test]
fn first_packets_of_new_ptp_pods_wait() {
    first_packets_of_new_pods(Cni::Ptp, 1);
}

#[test]
fn first_packets_of_new_bridge_pods_wait() {
    first_packets_of_new_pods(Cni::Bridge, 2);
}

/// The first pod of a node makes the bridge. The agent may have seen it without a port, and must not take it for
/// something that no pod speaks through.
#[test]
fn first_packets_behind_an_empty_bridge_wait() {
    let lab = two_nodes(Cni::Bridge);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let outside = Outside::watch(&lab);
    for node in &lab.nodes {
        node.netns.ip(&["link add cni0 type bridge", "link set cni0 up"]);
        let text = node.netns.exec(&["ip", "-o", "link", "show", "cni0"]);
        let index: u64 = text.split(':').next().and_then(|index| index.parse().ok()).expect("an index");
        // Where the agent writes something about it, that is what is tried.
        let _ = eventually(Duration::from_secs(1), || {
            let known = lab.map(&node.name, "INTERFACES");
            known.iter().any(|entry| entry["key"] == index).then_some(())
        });
    }
    // However late it is told of the first port.
    agents.into_iter().for_each(Agent::stop);
    let mut pods = early_pods(&lab, "prod", 6);
    outside.expect_at_most(&[EGRESS]);
    let _agents = lab.start_agents();
    let (sent, syns) = finish(&mut pods);
    assert!(sent > 0 && syns > 0, "{sent} datagrams and {syns} SYNs left pods");
    outside.expect_at_most(&[EGRESS]);
}

/// The agents were there once; pods that start while they are away wait for them.
fn pods_that_start_without_an_agent(cni: Cni) {
    let lab = two_nodes(cni);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    // A selected pod on each node before: what is there for them must not be what holds the others.
    let known = ["node-a", "node-b"].map(|node| lab.run_pod(node, &PodSpec::new("prod", node)));
    let server = format!("{}:{ECHO}", lab.web.address);
    for pod in &known {
        lab.wait_source(&pod.netns, &server, EGRESS);
    }
    let outside = Outside::watch(&lab);
    agents.into_iter().for_each(Agent::stop);
    let before = held(&lab);
    let mut pods = early_pods(&lab, "prod", how_many() / 5);
    outside.expect_at_most(&[EGRESS]);
    assert!(held(&lab) > before, "no packet was held");
    let _agents = lab.start_agents();
    let (sent, syns) = finish(&mut pods);
    assert!(sent > 0 && syns > 0, "{sent} datagrams and {syns} SYNs left pods");
    outside.expect_at_most(&[EGRESS]);
}

#[test]
fn ptp_pods_that_start_without_an_agent_wait_for_it() {
    pods_that_start_without_an_agent(Cni::Ptp);
}

#[test]
fn bridge_pods_that_start_without_an_agent_wait_for_it() {
    pods_that_start_without_an_agent(Cni::Bridge);
}

/// TCP, UDP and ping with a forged source, from a pod that is known, to every host outside.
fn forged_sources(cni: Cni, rp_filter: u8) {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni).rp_filter(rp_filter));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let pod = |node: &str, namespace: &str, name: &str| lab.run_pod(node, &PodSpec::new(namespace, name));
    // On the holder's node and on another.
    for name in ["node-a", "node-b"] {
        let forger = pod(name, "prod", &format!("forger-{name}"));
        let selected = pod(name, "prod", &format!("selected-{name}"));
        let other = pod(name, "dev", &format!("other-{name}"));
        lab.wait_source(&forger.netns, &server, EGRESS);
        lab.wait_source(&selected.netns, &server, EGRESS);
        lab.wait_source(&other.netns, &server, &lab.node(name).address);
        let stranger = lab.nodes.iter().find(|node| node.name != name).expect("another node");
        let outside = Outside::watch(&lab);
        let sources = [
            ("another selected pod", &*selected.ip),
            ("an unselected pod", &*other.ip),
            ("its node", &*lab.node(name).address),
            ("another node", &*stranger.address),
            ("no pod at all", "10.244.9.9"),
            ("an outside host", "198.51.100.7"),
            ("an egress IP", EGRESS),
        ];
        let mut leaked = Vec::new();
        for (whose, source) in sources {
            let from = (octets(source), 41_000);
            let hosts = [&lab.web, &lab.other, &lab.neighbour];
            let packets: Vec<_> = hosts
                .iter()
                .flat_map(|host| {
                    let to = octets(&host.address);
                    [
                        udp(from, (to, ECHO)),
                        tcp(from, (to, ECHO), datapath::packet::SYN),
                        icmp(from.0, to, 8, 77),
                    ]
                })
                .collect();
            outside.reset();
            forger.netns.send_packets(&packets);
            // Behind them on the same way: when its answer is here, so would the others be.
            forger.netns.tcp(&server, 1, 1).expect_all_from(1, EGRESS);
            let seen = outside.packets().into_keys();
            leaked.extend(
                seen.filter(|s| s != EGRESS).map(|seen| format!("as {whose} ({source}): seen as {seen}")),
            );
            // The forger itself has sent to `web` only.
            let as_egress = outside.to_others(EGRESS);
            if as_egress > 0 {
                leaked.push(format!("as {whose} ({source}): {as_egress} seen as {EGRESS}"));
            }
        }
        assert_eq!(leaked, Vec::<String>::new(), "{cni:?} pod on {name}, rp_filter {rp_filter}");
    }
}

#[test]
fn forged_sources_of_ptp_pods_do_not_leave() {
    forged_sources(Cni::Ptp, 0);
}

#[test]
fn forged_sources_of_bridge_pods_do_not_leave() {
    forged_sources(Cni::Bridge, 0);
}

#[test]
fn forged_sources_of_bridge_pods_do_not_leave_past_strict_filters() {
    forged_sources(Cni::Bridge, 1);
}

/// A pod that has the address of one that is gone is another pod, whoever's object still names the address.
fn an_address_on_a_new_interface(cni: Cni, old_namespace: &str) {
    let lab = two_nodes(cni);
    // The agent says that it holds the old pod's address.
    lab.tolerate("held: its interface is gone");
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let ip = "10.244.1.77";
    let old = lab.run_pod("node-a", &PodSpec::new(old_namespace, "old").ip(ip));
    let source = if old_namespace == "prod" { EGRESS } else { &*lab.node("node-a").address };
    lab.wait_source(&old.netns, &server, source);
    // Its sandbox is gone, its object is not yet.
    old.end_network();
    let outside = Outside::watch(&lab);
    let new = lab.run_pod("node-a", &PodSpec::new("prod", "new").ip(ip).unannounced());
    for _ in 0..10 {
        let seen = new.netns.udp_source(&server, Duration::from_millis(100));
        assert!(seen.is_err(), "it passes for the old pod: {seen:?}");
    }
    outside.expect_at_most(&[]);
    old.remove_object();
    new.announce();
    lab.wait_source(&new.netns, &server, EGRESS);
    outside.expect_at_most(&[EGRESS]);
}

#[test]
fn an_unselected_pods_address_on_a_new_interface_is_unknown_again() {
    an_address_on_a_new_interface(Cni::Ptp, "dev");
}

#[test]
fn a_selected_pods_address_on_a_new_interface_is_unknown_again() {
    an_address_on_a_new_interface(Cni::Ptp, "prod");
}

#[test]
fn an_unselected_bridge_pods_address_on_a_new_interface_is_unknown_again() {
    an_address_on_a_new_interface(Cni::Bridge, "dev");
}
