//! What a large cluster costs agents and controller, in time, memory and bytes watched: `cargo xtask bench scale` builds
//! and runs this. It runs the parts that read and decide, on made-up objects; nothing is sent anywhere.
#![expect(clippy::print_stdout, reason = "a program whose answer is its output")]

mod cluster;
mod counting;
mod wire;

use std::time::Instant;

use cluster::{Cluster, EGRESS_IPS, GATEWAYS, NAMESPACES, NODES, PODS, PODS_PER_NODE, ROUNDS};
use outgate::compile::compile;
use outgate::facts::Facts;
use outgate::ids::Ids;
use outgate::image::MapImage;
use outgate::model;
use outgate::objects::PortDemand;
use outgate::watch::kube::{Kind, Mirror};
use serde_json::{Value, json};
use wire::List;

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

/// How often the agent of an egress node renews its Lease, in seconds (agent/src/watch/kube/heartbeat.rs).
const HEARTBEAT: f64 = 10.0;
/// How often the leading controller renews its own (agent/src/watch/kube/election.rs).
const LEADER: f64 = 5.0;

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
    let lists = cluster.listed_by_controller();
    let before = counting::held();
    let (time, most, copy) = measured(|| read(None, &lists));
    tell("controller", "lists its objects", Some(time), 0, Some(most));
    tell("controller", "its objects", None, counting::held() - before, None);
    drop((copy, lists));
    // A pod whose namespace had none on the node (which has teams 0 to 29): its agent asks for ports of one address more.
    each(cluster, "a node asks for an address's ports", |c| {
        let n = NODES / 2;
        let node = c.objects.egress_nodes.get_mut(&cluster::node_name(n)).expect("the node");
        node.status.demand.push(PortDemand { egress_ip: cluster::egress_ip(500), granules: 0 });
    });
    each(cluster, "an EgressIP comes", |c| {
        let new = cluster::egress_ip_object(EGRESS_IPS);
        c.objects.egress_ips.insert(new.metadata.name.clone(), new);
    });
    each(cluster, "a node's label changes", |c| {
        let node = c.objects.nodes.get_mut(&cluster::node_name(NODES - 1)).expect("the node");
        node.metadata.labels = node.metadata.labels.with("a", "b");
    });
    each(cluster, "an egress node is lost", |c| {
        let holds = |c: &Cluster| {
            let all = c.objects.egress_allocations.values();
            all.filter(|a| a.spec.owner == cluster::node_name(0)).count()
        };
        assert!(holds(c) > 0, "it has something to lose");
        c.lose(0);
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
        while writes.last().is_some_and(|w| !w.is_empty()) || changed.wait() {
            let (_, plan) = changed.plan();
            writes.push(changed.write(plan));
            assert!(writes.len() < 20, "it does not come to rest");
        }
        let lost = changed.objects.egress_allocations.values().filter(|a| changed.is_silent(&a.spec.owner));
        assert_eq!(lost.count(), 0, "an address is with a node that is lost");
    }
    writes.retain(|w| !w.is_empty());
    tell("controller", what, Some(median(&mut times)), 0, Some(peak));
    println!("    writes {writes:?}");
    let nodes: usize = writes.iter().filter_map(|w| w.get("EgressNode")).sum();
    let statuses: usize = writes.iter().filter_map(|w| w.get("status of an egress node")).sum();
    let [usual, gateway] = [NODES / 2, 1].map(|n| size(&wire::egress_node(&cluster.objects, n)));
    println!("    sent to all agents: {:.1} GiB", gib((nodes * usual + statuses * gateway) * NODES));
}

/// Reads lists as an agent of a node does, or as a controller.
fn read(node: Option<&str>, lists: &[List]) -> Mirror {
    let mut mirror = Mirror::new(node);
    for (kind, pages) in lists {
        mirror.list(*kind, pages).expect("a list");
    }
    mirror
}

/// What an agent holds from one event to the next: its objects, and the image that it has applied, twice: the kernel's
/// side has its own (agent/src/agent.rs, agent/src/bpf/maps.rs).
struct Agent {
    name: String,
    mirror: Mirror,
    facts: Facts,
    ids: Ids,
    applied: MapImage,
    kernel: MapImage,
}

impl Agent {
    /// Goes the whole way once.
    fn reconcile(&mut self) {
        let desired = model::desired(self.mirror.objects(), &self.name);
        let compiled = compile(&desired, &self.facts, &mut self.ids);
        if self.applied != compiled.image {
            self.kernel = compiled.image.clone();
            self.applied = compiled.image.clone();
        }
    }
}

/// One node's agent: what it holds, and what an event costs it.
fn agent(who: &str, cluster: &Cluster, n: usize) {
    let lists = cluster.listed_by_agent(n);
    let name = cluster::node_name(n);
    let before = counting::held();
    let (time, most, mirror) = measured(|| read(Some(&name), &lists));
    tell(who, "lists its objects", Some(time), 0, Some(most));
    tell(who, "its objects", None, counting::held() - before, None);
    drop(lists);
    let before = counting::held();
    let image = MapImage::default();
    let mut agent = Agent {
        name,
        mirror,
        facts: cluster::facts(n),
        ids: Ids::recover(&image),
        applied: image.clone(),
        kernel: image,
    };
    agent.reconcile();
    let held = counting::held() - before;
    tell(who, "what is made of them", None, held, None);
    println!(
        "    in the kernel: {} policies, {} egress IPs, {} nodes, {} networks, ports of {} addresses",
        agent.applied.policies.len(),
        agent.applied.egress_ips.len(),
        agent.applied.nodes.len(),
        agent.applied.networks.len(),
        agent.applied.granules.len(),
    );
    let mut event = |what: &str, kind: Kind, text: &dyn Fn(usize) -> Value, counts: bool| {
        let mut times = Vec::new();
        let mut peak = 0;
        for round in 0..ROUNDS {
            let mut object = text(round);
            // Newer than what was listed.
            object["metadata"]["resourceVersion"] = json!((200_000_000 + round).to_string());
            let text = object.to_string();
            let (time, most, news) = measured(|| {
                let news = agent.mirror.put(kind, &text).expect("an object");
                if news {
                    agent.reconcile();
                }
                news
            });
            assert_eq!(news, counts, "{what}");
            times.push(time);
            peak = peak.max(most);
        }
        tell(who, what, Some(median(&mut times)), 0, Some(peak));
    };
    let o = &cluster.objects;
    event("a pod comes", Kind::Pod, &|round| wire::pod(n, PODS_PER_NODE + round, 0), true);
    event("an EgressIP comes", Kind::EgressIp, &|round| wire::new_egress_ip(EGRESS_IPS + round), true);
    event(
        "another node's label changes",
        Kind::EgressNode,
        &|round| {
            let mut node = wire::egress_node(o, NODES - 1 - round);
            node["spec"]["labels"]["a"] = json!("b");
            node
        },
        true,
    );
    event(
        "another node's demand changes",
        Kind::EgressNode,
        &|round| {
            let mut node = wire::egress_node(o, NODES - 11 - round);
            node["status"]["demand"] = json!([]);
            node
        },
        false,
    );
    if n < GATEWAYS {
        event(
            "an allocation changes",
            Kind::EgressAllocation,
            &|round| {
                let name = o.egress_allocations.keys().nth(round).expect("an allocation");
                let mut allocation = wire::allocation(o, name);
                allocation["metadata"]["generation"] = json!(1_000);
                allocation["spec"]["leases"].as_array_mut().expect("leases").pop();
                allocation
            },
            true,
        );
    }
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

fn gib(bytes: usize) -> f64 {
    count(bytes) / 1024.0 / 1024.0 / 1024.0
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn count(n: usize) -> f64 {
    n as f64
}

/// Sizes of objects on the wire, as JSON, and what agents and the controller read of them at their start.
fn watched(cluster: &Cluster) {
    let o = &cluster.objects;
    let usual = size(&wire::egress_node(o, NODES / 2));
    let gateway = size(&wire::egress_node(o, 0));
    let name = o.egress_allocations.keys().next().expect("an allocation");
    let allocation = size(&wire::allocation(o, name));
    println!(
        "on the wire: EgressNode {usual} bytes (of an egress node {gateway}), EgressAllocation {allocation}"
    );
    let bytes =
        |lists: &[List]| -> usize { lists.iter().flat_map(|(_, pages)| pages).map(String::len).sum() };
    let requests = |lists: &[List]| -> usize { lists.iter().map(|(_, pages)| pages.len()).sum() };
    let lists = cluster.listed_by_agent(NODES / 2);
    let all = bytes(&lists) * (NODES - GATEWAYS);
    println!("an agent lists at its start: {} in {} pages", mib(bytes(&lists)), requests(&lists));
    let lists = cluster.listed_by_agent(0);
    let all = all + bytes(&lists) * GATEWAYS;
    println!("that of an egress node: {} in {} pages", mib(bytes(&lists)), requests(&lists));
    let lists = cluster.listed_by_controller();
    println!("the controller: {} in {} pages", mib(bytes(&lists)), requests(&lists));
    println!("all agents at once: {:.0} GiB", gib(all));
    println!(
        "a changed EgressNode is sent to all agents: {}, that of an egress node: {}",
        mib(usual * NODES),
        mib(gateway * NODES)
    );
}

fn size(object: &Value) -> usize {
    object.to_string().len()
}
