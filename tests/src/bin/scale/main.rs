//! What a large cluster costs agents and controller, in time, memory and bytes watched: `cargo xtask bench scale` builds
//! and runs this. It runs the parts that decide, on made-up objects; nothing is sent anywhere.
#![expect(clippy::print_stdout, reason = "a program whose answer is its output")]

mod cluster;
mod counting;

use std::time::Instant;

use cluster::{Cluster, EGRESS_IPS, GATEWAYS, NAMESPACES, NODES, PODS, PODS_PER_NODE};
use outgate::compile::compile;
use outgate::ids::Ids;
use outgate::image::MapImage;
use outgate::model;
use outgate::objects::{Objects, PortDemand};
use serde::Serialize;

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

/// How often each thing is measured; told is the median.
const ROUNDS: usize = 3;
/// How often the agent of an egress node renews its Lease, in seconds (agent/src/watch/kube/heartbeat.rs).
const HEARTBEAT: f64 = 10.0;
/// How often the leading controller renews its own (agent/src/watch/kube/election.rs).
const LEADER: f64 = 5.0;
/// `metadata.managedFields` and what else an object on the wire has that the agent's types do not.
const OVERHEAD: usize = 600;

fn main() {
    println!(
        "{NODES} nodes ({GATEWAYS} may hold egress IPs), {PODS} pods, {NAMESPACES} namespaces, {EGRESS_IPS} EgressIPs"
    );
    let mut cluster = Cluster::new();
    controller(&mut cluster);
    agent("agent", &cluster, NODES / 2);
    agent("agent of an egress node", &cluster, 0);
    watched(&cluster);
    println!(
        "writes at rest: {:.2} a second ({:.4} a node): {GATEWAYS} heartbeats every {HEARTBEAT} s, the leader's Lease every {LEADER} s",
        rest(),
        rest() / count(NODES)
    );
}

/// Writes a second while nothing happens.
fn rest() -> f64 {
    count(GATEWAYS) / HEARTBEAT + 1.0 / LEADER
}

/// From nothing to everything assigned and leased, then one event after the other.
fn controller(cluster: &mut Cluster) {
    let before = counting::held();
    let fresh = cluster.clone();
    tell("controller", "its objects", None, counting::held() - before, None);
    drop(fresh);
    for round in 1.. {
        let (time, most, (_, plan)) = measured(|| cluster.plan());
        let written = cluster.write(plan);
        tell("controller", &format!("from nothing, plan {round}"), Some(time), 0, Some(most));
        if written.is_empty() {
            break;
        }
        println!("    writes {written:?}");
        assert!(round < 20, "it does not come to rest");
    }
    // A pod whose namespace had none on the node (which has teams 0 to 29): its agent asks for ports of one address more.
    each(cluster, "a node asks for an address's ports", |c| {
        let n = NODES / 2;
        let node = c.objects.egress_nodes.get_mut(&cluster::node_name(n)).expect("the node");
        let address = c.objects.egress_ips["team-0500"].spec.egress_ips[0].clone();
        node.status.demand.push(PortDemand { egress_ip: address, granules: 0 });
    });
    each(cluster, "an EgressIP comes", |c| {
        let new = cluster::egress_ip_object(EGRESS_IPS);
        c.objects.egress_ips.insert(new.metadata.name.clone(), new);
    });
    each(cluster, "a node's label changes", |c| {
        let node = c.objects.nodes.get_mut(&cluster::node_name(NODES - 1)).expect("the node");
        node.metadata.labels.insert("a".to_owned(), "b".to_owned());
    });
    each(cluster, "an egress node is lost", |c| {
        c.objects.nodes.get_mut(&cluster::node_name(0)).expect("the node").status.conditions.clear();
    });
}

/// One event: the plan that it makes, and what is written until all is at rest.
fn each(cluster: &Cluster, what: &str, event: impl Fn(&mut Cluster)) {
    let mut times = Vec::new();
    let mut writes = Vec::new();
    let mut peak = 0;
    for _ in 0..ROUNDS {
        let mut changed = cluster.clone();
        event(&mut changed);
        let (time, most, (_, plan)) = measured(|| changed.plan());
        times.push(time);
        peak = peak.max(most);
        writes.clear();
        writes.push(changed.write(plan));
        while !writes[writes.len() - 1].is_empty() {
            let (_, plan) = changed.plan();
            writes.push(changed.write(plan));
        }
    }
    tell("controller", what, Some(median(&mut times)), 0, Some(peak));
    println!("    writes {writes:?}");
}

/// One node's agent: what it holds, and what an event costs it.
fn agent(who: &str, cluster: &Cluster, n: usize) {
    let before = counting::held();
    let objects = cluster.seen_by(n);
    tell(who, "its objects", None, counting::held() - before, None);
    let facts = cluster::facts(n);
    let name = cluster::node_name(n);
    let mut ids = Ids::recover(&MapImage::default());
    let between = counting::held();
    let desired = model::desired(&objects, &name);
    let compiled = compile(&desired, &facts, &mut ids);
    assert_eq!(desired.pods.values().filter(|pod| pod.egress_ip.is_some()).count(), PODS_PER_NODE);
    tell(who, "what is made of them", None, counting::held() - between, None);
    tell(who, "all", None, counting::held() - before, None);
    println!(
        "    in the kernel: {} policies, {} egress IPs, {} nodes, {} networks",
        compiled.image.policies.len(),
        compiled.image.egress_ips.len(),
        compiled.image.nodes.len(),
        compiled.image.networks.len()
    );
    let mut event = |what: &str, event: &dyn Fn(&mut Objects)| {
        let mut times = Vec::new();
        let mut peak = 0;
        for _ in 0..ROUNDS {
            let mut changed = objects.clone();
            event(&mut changed);
            let (time, most, _) = measured(|| compile(&model::desired(&changed, &name), &facts, &mut ids));
            times.push(time);
            peak = peak.max(most);
        }
        tell(who, what, Some(median(&mut times)), 0, Some(peak));
    };
    event("a pod comes", &|o| {
        let pod = cluster::pod(n, PODS_PER_NODE, 0);
        o.pods.insert((pod.metadata.namespace.clone(), pod.metadata.name.clone()), pod);
    });
    event("an EgressIP comes", &|o| {
        let new = cluster::egress_ip_object(EGRESS_IPS);
        o.egress_ips.insert(new.metadata.name.clone(), new);
    });
    event("another node's label changes", &|o| {
        let other = cluster::node_name(NODES - 1);
        let labels = &mut o.nodes.get_mut(&other).expect("the node").metadata.labels;
        labels.insert("a".to_owned(), "b".to_owned());
    });
    event("another node's status changes", &|o| {
        let other = o.egress_nodes.get_mut(&cluster::node_name(NODES - 1)).expect("the node");
        other.status.demand.pop();
    });
}

/// How long a call takes, in seconds, and how much more memory it held at most than before.
fn measured<T>(call: impl FnOnce() -> T) -> (f64, usize, T) {
    counting::reset();
    let before = counting::held();
    let begun = Instant::now();
    let result = call();
    let time = begun.elapsed().as_secs_f64();
    (time, counting::most() - before, result)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn tell(who: &str, what: &str, time: Option<f64>, held: usize, peak: Option<usize>) {
    let time = time.map_or_else(String::new, |time| format!("{:.1} ms", time * 1e3));
    let memory = peak.map_or_else(|| mib(held), |peak| format!("+{} while it lasts", mib(peak)));
    println!("{who:24} {what:36} {time:>12}  {memory}");
}

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", count(bytes) / 1024.0 / 1024.0)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn count(n: usize) -> f64 {
    n as f64
}

/// Sizes of objects on the wire, as JSON, and what an agent and the controller read of them at their start.
fn watched(cluster: &Cluster) {
    let o = &cluster.objects;
    let usual = cluster::node_name(NODES / 2);
    let node = size(&o.egress_nodes[&usual]);
    let gateway = size(&o.egress_nodes[&cluster::node_name(0)]);
    let allocation = size(&o.egress_allocations[&cluster::allocation_name(0)]);
    // The types of these are only read, so their sizes are a real object's of this shape, as `kubectl get -o json` has it.
    let (namespace, egress_ip, pod) = (900, 900, 7_000);
    println!(
        "on the wire: EgressNode {node} bytes (of an egress node {gateway}), EgressAllocation {allocation}; taken: metadata of \
         a namespace {namespace}, EgressIP {egress_ip}, Pod {pod}"
    );
    let nodes = node * (NODES - GATEWAYS) + gateway * GATEWAYS;
    let all = nodes + NAMESPACES * namespace + EGRESS_IPS * egress_ip + PODS_PER_NODE * pod;
    println!(
        "an agent lists at its start: {}, of an egress node {}",
        mib(all),
        mib(all + EGRESS_IPS * allocation)
    );
    println!("the controller: {}", mib(nodes + NODES * 12_000 + EGRESS_IPS * (egress_ip + allocation)));
    println!("all agents at once: {:.0} GiB", count(all) * count(NODES) / f64::from(1 << 30));
    println!("a changed EgressNode is sent to all agents: {}", mib(node * NODES));
}

fn size(object: &impl Serialize) -> usize {
    serde_json::to_vec(object).map_or(0, |json| json.len()) + OVERHEAD
}
