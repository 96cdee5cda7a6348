//! A small cluster on this machine whose pods leave by egress IPs, told step by step.
#![expect(clippy::print_stdout, reason = "a program whose answer is its output")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use lab::agent::outgate;
use lab::objects::egress_ip;
use lab::{Agent, Lab, Pod, PodSpec, Process, eventually};

/// Addresses of the nodes' own network that no machine has. A pod keeps to one of them by a hash of both addresses;
/// of these two, each selected pod of the demo gets another.
const EGRESS_IPS: [&str; 2] = ["172.18.0.100", "172.18.0.101"];
/// Who may own them.
const GATEWAYS: [&str; 2] = ["node-b", "node-c"];

#[derive(Parser)]
#[command(about = "Three nodes, four pods, two egress IPs and a web server, in network namespaces")]
struct Arguments {
    /// Leave everything up, and say how to get in and how to remove it
    #[arg(long)]
    keep: bool,
}

#[expect(clippy::print_stderr, reason = "what a failed demo leaves to be understood by")]
fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let start = Instant::now();
    let lab = Lab::new();
    match tell(&lab) {
        Ok(cast) if arguments.keep => keep(lab, cast, start.elapsed()),
        Ok(cast) => {
            drop((cast, lab));
            let seconds = start.elapsed().as_secs_f32();
            println!("\nAll of it is removed again, {seconds:.1} s after the start. `--keep` leaves it up.");
        }
        Err(error) => {
            eprintln!("{}", lab.describe());
            return Err(error);
        }
    }
    Ok(())
}

/// What runs until the end of the demo.
struct Cast {
    nginx: Process,
    agents: Vec<Agent>,
    pods: Vec<Pod>,
}

/// The story.
fn tell(lab: &Lab) -> Result<Cast> {
    let nginx = lab.nginx(&lab.web.netns);
    lab.describe_cluster(&GATEWAYS);

    step(1, "Three nodes, a router, and a web server outside that answers with the address it sees");
    let rows = lab.nodes.iter().map(|node| {
        let role = if GATEWAYS.contains(&node.name.as_str()) { "may own egress IPs" } else { "" };
        vec![node.name.clone(), node.address.clone(), format!("pods {}.0/24", node.pod_prefix), role.into()]
    });
    let web = ["web server", &lab.web.address, "", "behind the router 172.18.0.1"].map(str::to_owned);
    print_table(&["HOST", "ADDRESS", "", ""], rows.chain([web.to_vec()]));

    step(2, "Four pods in two namespaces, connected by the CNI plugin `ptp`, which masquerades");
    let pods: Vec<Pod> = [
        ("node-a", "prod", "shop"),
        ("node-b", "prod", "pay"),
        ("node-a", "dev", "try"),
        ("node-c", "dev", "ci"),
    ]
    .into_iter()
    .map(|(node, namespace, name)| lab.run_pod(node, &PodSpec::new(namespace, name)))
    .collect();
    let before = ask_all(lab, &pods)?;
    print_table(
        &["POD", "LABEL OF ITS NAMESPACE", "NODE", "ITS ADDRESS", "THE SERVER SAW"],
        pods.iter().map(|pod| {
            let label = format!("env: {}", pod.namespace);
            vec![pod.full_name(), label, pod.node.clone(), pod.ip.clone(), before[&pod.full_name()].clone()]
        }),
    );
    println!("Without Outgate every pod looks like its node.");

    step(3, "An agent on each node");
    let agents = lab.start_agents();
    println!("`{}`", lab.agent_arguments("node-a").join(" "));

    step(4, "An EgressIP, as OpenShift's documentation has it: pods of namespaces with `env: prod`");
    let manifest = egress_ip("egressips-prod", &EGRESS_IPS, &[("env", "prod")], &[]);
    print!("{manifest}");
    let applied = Instant::now();
    lab.objects.write("egressips-prod.yaml", &manifest);
    let owners: BTreeMap<_, _> =
        EGRESS_IPS.into_iter().map(|address| (address.to_owned(), lab.wait_owner(address))).collect();
    let selected = |pod: &Pod| pod.namespace == "prod";
    let in_force = eventually(Duration::from_secs(10), || {
        let seen = ask_all(lab, &pods).ok()?;
        pods.iter()
            .filter(|pod| selected(pod))
            .all(|p| owners.contains_key(&seen[&p.full_name()]))
            .then_some(())
    });
    ensure!(in_force.is_some(), "10 s later the web server still sees other addresses");
    println!("In force after {} ms.", applied.elapsed().as_millis());

    step(5, "Every pod asks the web server again");
    let after = ask_all(lab, &pods)?;
    let mut rows = Vec::new();
    for pod in &pods {
        let seen = &after[&pod.full_name()];
        let node = lab.node(&pod.node);
        let (egress_ip, gateway) = match owners.get(seen) {
            Some(owner) => {
                let answering = gateway_by_arp(lab, seen)?;
                ensure!(*owner == answering, "{seen} is owned by {owner}, but {answering} answers for it");
                (seen.clone(), answering)
            }
            None => ("none".to_owned(), "none: its own node".to_owned()),
        };
        ensure!(
            if selected(pod) { owners.contains_key(seen) } else { *seen == node.address },
            "the web server saw {} as {seen}",
            pod.full_name()
        );
        rows.push(vec![pod.full_name(), pod.node.clone(), egress_ip, gateway, seen.clone()]);
    }
    print_table(&["WHO ASKED", "FROM NODE", "EGRESS IP", "GATEWAY", "THE SERVER SAW"], rows);
    println!("The gateway is the node that answers the router's ARP for the egress IP.");

    step(6, "outgate status");
    print!("{}", lab.outgate("node-a", &["status", "--source", &lab.source()]).expect_success());

    Ok(Cast { nginx, agents, pods })
}

/// Leaves everything up, and says how to get in and how to remove it.
fn keep(lab: Lab, mut cast: Cast, since: Duration) {
    cast.nginx.detach();
    cast.agents.iter_mut().for_each(Agent::detach);
    println!("\nKept, {:.1} s after the start. To get in:\n", since.as_secs_f32());
    let mut rows = Vec::new();
    for pod in &cast.pods {
        rows.push((pod.full_name(), pod.netns.enter(), format!("curl http://{}/", lab.web.address)));
    }
    for node in &lab.nodes {
        let flows = format!("{} flows --bpffs {}", outgate().display(), lab.bpffs(&node.name).display());
        rows.push((node.name.clone(), node.netns.enter(), flows));
    }
    rows.push(("web server".into(), lab.web.netns.enter(), "tcpdump -ni eth0".into()));
    print_table(
        &["WHERE", "ENTER WITH", "THEN, FOR INSTANCE"],
        rows.into_iter().map(|(name, enter, then)| vec![name, enter, then]),
    );
    println!("\nThe objects are in {}: change them and ask again.", lab.objects.dir().display());
    println!("To remove it all: {}", lab.keep());
}

fn step(number: u32, what: &str) {
    println!("\n{number}. {what}\n");
}

/// What the web server sees of each pod, by the pod's full name.
fn ask_all(lab: &Lab, pods: &[Pod]) -> Result<BTreeMap<String, String>> {
    let url = format!("http://{}/", lab.web.address);
    pods.iter()
        .map(|pod| {
            let output = pod.try_exec(&["curl", "-sS", "--max-time", "3", &url]);
            ensure!(output.success(), "{}", output.explain());
            let seen = output.stdout.split(' ').next().context("an answer")?;
            Ok((pod.full_name(), seen.to_owned()))
        })
        .collect()
}

/// The node whose interface the router found for an address.
fn gateway_by_arp(lab: &Lab, address: &str) -> Result<String> {
    let entry = lab.router.exec(&["ip", "neigh", "show", address, "dev", "eth0"]);
    let mac = entry.split_whitespace().skip_while(|word| *word != "lladdr").nth(1);
    let Some(mac) = mac else { bail!("the router does not know {address}: {entry}") };
    let owner =
        lab.nodes.iter().find(|node| node.netns.exec(&["ip", "-o", "link", "show", "eth0"]).contains(mac));
    owner.map(|node| node.name.clone()).with_context(|| format!("{mac} is no node's interface"))
}

/// Columns as wide as their widest cell.
fn print_table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    let head = head.iter().map(|cell| (*cell).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or_default();
    for row in &rows {
        let cells = row.iter().enumerate().map(|(column, cell)| format!("{cell:<0$}", width(column)));
        println!("   {}", cells.collect::<Vec<_>>().join("   ").trim_end());
    }
}
