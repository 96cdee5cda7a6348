//! The tunnel's outer packets take no entries of the conntrack table; nothing else is untracked.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Lab, LabSpec, Netns, PodSpec, eventually_ok};

const EGRESS: &str = "172.18.0.101";

/// Conntrack entries of UDP packets to a port, a line each.
fn entries(node: &Netns, port: &str) -> String {
    node.exec(&["conntrack", "-L", "-p", "udp", "--orig-port-dst", port])
}

/// The tunnel's port, as the device has it.
fn tunnel_port(node: &Netns) -> String {
    let text = node.exec(&["ip", "-d", "link", "show", "outgate0"]);
    let mut words = text.split_whitespace().skip_while(|word| *word != "dstport");
    words.nth(1).expect("a VXLAN device has a port").to_owned()
}

/// How often each rule of the table stands in it.
fn rules(node: &Netns) -> Result<Vec<String>, String> {
    let output = node.try_exec(&["nft", "list", "table", "inet", "outgate"]);
    if !output.success() {
        return Err(output.explain());
    }
    let lines = output.stdout.lines().map(str::trim).filter(|line| line.contains("notrack"));
    Ok(lines.map(str::to_owned).collect())
}

#[test]
fn outer_packets_are_not_tracked_and_pods_packets_are() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let mut agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &server, EGRESS);
    let node = lab.node("node-a");
    let port = tunnel_port(&node.netns);
    let wanted =
        [format!("udp dport {port} fib daddr type local notrack"), format!("udp dport {port} notrack")];
    for node in &lab.nodes {
        assert_eq!(rules(&node.netns).as_deref(), Ok(&wanted[..]));
    }
    pod.netns.tcp(&server, 20, 10).expect_all_from(20, EGRESS);
    pod.netns.udp(&server, 20).expect_all_from(20, EGRESS);
    for node in &lab.nodes {
        assert_eq!(entries(&node.netns, &port), "");
    }

    // Somebody else's service at that port: masqueraded as ever.
    let other = lab.run_pod("node-a", &PodSpec::new("dev", "other"));
    lab.wait_source(&other.netns, &server, &node.address);
    let recorder = Recorder::start(&lab.web.netns);
    let _ = other.netns.udp_from(4000, &format!("{}:{port}", lab.web.address), Duration::from_millis(50));
    recorder.expect_only("udp", &[&node.address]);
    assert!(entries(&node.netns, &port).contains(&other.ip));

    // Removed by somebody, it comes back; so it does, once, at a start.
    let _ = node.netns.exec(&["nft", "delete", "table", "inet", "outgate"]);
    let back =
        || rules(&node.netns).and_then(|found| if found == wanted { Ok(()) } else { Err(found.join("\n")) });
    eventually_ok("the table is made again", Duration::from_secs(30), back);
    agents.drain(..).for_each(lab::Agent::stop);
    agents = lab.start_agents();
    assert_eq!(back(), Ok(()));
    pod.netns.tcp(&server, 5, 1).expect_all_from(5, EGRESS);

    agents.into_iter().for_each(lab::Agent::stop);
    let pins = lab.bpffs("node-a");
    let cleanup = ["cleanup", "--bpffs", pins.to_str().expect("UTF-8")];
    let said = lab.outgate("node-a", &cleanup).expect_success();
    assert!(said.contains("removed table inet outgate"), "{said}");
    assert!(rules(&node.netns).is_err());
}
