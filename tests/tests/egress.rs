//! What selected pods send outside leaves by their egress IP; everything else is as without Outgate.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::service::{Front, Masquerade};
use lab::{Agent, Cni, Lab, LabSpec, Netns, Pod, PodSpec};

const EGRESS: &str = "172.18.0.101";
const LIMIT: Duration = Duration::from_secs(2);

/// One that owns the egress IP and one that does not: each agent costs a second of the kernel's verifier.
fn two_nodes() -> LabSpec {
    LabSpec::default().nodes(2)
}

/// A lab whose namespace `prod` leaves by [`EGRESS`], owned by the one node that may.
fn cluster(spec: &LabSpec, owner: &str) -> (Lab, Vec<Agent>) {
    let lab = Lab::with(spec);
    let agents = start(&lab, owner);
    (lab, agents)
}

/// Starts Outgate in a lab: from now on, namespace `prod` leaves by [`EGRESS`], owned by the one node that may.
fn start(lab: &Lab, owner: &str) -> Vec<Agent> {
    lab.describe_cluster(&[owner]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), owner);
    agents
}

fn echo_at(address: &str) -> String {
    format!("{address}:{ECHO}")
}

/// Every kind of traffic, with real clients and servers, and nobody sees another source.
fn all_traffic(cni: Cni) {
    let (lab, _agents) = cluster(&two_nodes().cni(cni), "node-b");
    let _servers = [
        lab.nginx(&lab.web.netns),
        lab.echo(&lab.web.netns),
        lab.iperf(&lab.web.netns),
        lab.dnsmasq(&lab.web.netns),
    ];
    let recorder = Recorder::start(&lab.web.netns);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &echo_at(&lab.web.address), EGRESS);

    let curl = |more: &[&str]| {
        let mut words = vec!["curl", "-sS", "--fail", "--max-time", "60"];
        words.extend(more);
        let output = pod.exec(&words);
        let answers: Vec<&str> = output.lines().collect();
        let strange = answers.iter().find(|line| !line.starts_with(&format!("{EGRESS} ")));
        assert_eq!(strange, None, "{more:?}");
        answers.len()
    };
    assert_eq!(curl(&["http://203.0.113.10/[1-1000]"]), 1000);
    let parallel = ["--parallel", "--parallel-immediate", "--parallel-max", "200"];
    assert_eq!(curl(&[&parallel[..], &["http://203.0.113.10/[1-200]"]].concat()), 200);
    // curl ends each connection before long; these are all open at the same time.
    pod.netns.tcp(&echo_at(&lab.web.address), 200, 200).expect_all_from(200, EGRESS);
    pod.netns.udp(&echo_at(&lab.web.address), 200).expect_all_from(200, EGRESS);
    assert_eq!(pod.netns.ping("203.0.113.10", 50, "0.01"), 50);
    for way in [&["-R"][..], &[]] {
        let json = pod.exec(&[&["iperf3", "-c", "203.0.113.10", "-n", "50M", "-J"], way].concat());
        assert!(!json.contains("\"error\""), "{json}");
    }
    let json = pod.exec(&["iperf3", "-c", "203.0.113.10", "-u", "-b", "20M", "-t", "1", "-J"]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("iperf3 writes JSON");
    assert_eq!(report["end"]["sum"]["lost_packets"], 0, "{}", report["end"]);
    for transport in ["+notcp", "+tcp"] {
        let answer =
            pod.exec(&["dig", "+short", "+time=2", "+tries=1", transport, "@203.0.113.10", "web.example"]);
        assert_eq!(answer.trim(), "203.0.113.10");
    }
    for protocol in ["tcp", "udp", "icmp"] {
        recorder.expect_only(protocol, &[EGRESS]);
    }

    // A host on the nodes' own network asks for the egress IP by ARP itself.
    let _neighbour = lab.echo(&lab.neighbour.netns);
    let recorder = Recorder::start(&lab.neighbour.netns);
    pod.netns.tcp(&echo_at(&lab.neighbour.address), 20, 10).expect_all_from(20, EGRESS);
    pod.netns.udp(&echo_at(&lab.neighbour.address), 5).expect_all_from(5, EGRESS);
    assert_eq!(pod.netns.ping(&lab.neighbour.address, 3, "0.01"), 3);
    for protocol in ["tcp", "udp", "icmp"] {
        recorder.expect_only(protocol, &[EGRESS]);
    }
}

#[test]
fn all_traffic_of_a_ptp_pod_has_the_egress_ip() {
    all_traffic(Cni::Ptp);
}

#[test]
fn all_traffic_of_a_bridge_pod_has_the_egress_ip() {
    all_traffic(Cni::Bridge);
}

/// The owner is another node, the pod's own, and changes; pods of all nodes follow.
fn any_node_owns(cni: Cni) {
    let (lab, _agents) = cluster(&LabSpec::default().cni(cni), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let pods = ["node-a", "node-b", "node-c"].map(|node| lab.run_pod(node, &PodSpec::new("prod", node)));
    for owner in ["node-b", "node-c", "node-a"] {
        for node in &lab.nodes {
            lab.describe_node(node, node.name == owner, true);
        }
        lab::eventually_ok("the owner moves", Duration::from_secs(10), || match lab.owner(EGRESS) {
            Some(now) if now == owner => Ok(()),
            other => Err(format!("{other:?}")),
        });
        for pod in &pods {
            lab.wait_source(&pod.netns, &echo_at(&lab.web.address), EGRESS);
        }
        let recorder = Recorder::start(&lab.web.netns);
        for pod in &pods {
            pod.netns.tcp(&echo_at(&lab.web.address), 50, 10).expect_all_from(50, EGRESS);
            pod.netns.udp(&echo_at(&lab.web.address), 10).expect_all_from(10, EGRESS);
            assert_eq!(pod.netns.ping("203.0.113.10", 3, "0.01"), 3);
        }
        for protocol in ["tcp", "udp", "icmp"] {
            recorder.expect_only(protocol, &[EGRESS]);
        }
    }
}

#[test]
fn any_node_owns_the_egress_ip_of_ptp_pods() {
    any_node_owns(Cni::Ptp);
}

#[test]
fn any_node_owns_the_egress_ip_of_bridge_pods() {
    any_node_owns(Cni::Bridge);
}

/// Where checksums are computed by software and not left to be done, the receiver sees what was updated wrongly.
fn checksums_are_right(without_offload: impl Fn(&Lab, [&Pod; 2]) -> Vec<Netns>) {
    let (lab, _agents) = cluster(&two_nodes(), "node-b");
    let _servers = [lab.echo(&lab.web.netns), lab.iperf(&lab.web.netns)];
    let remote = lab.run_pod("node-a", &PodSpec::new("prod", "remote"));
    let local = lab.run_pod("node-b", &PodSpec::new("prod", "local"));
    for netns in without_offload(&lab, [&remote, &local]) {
        let _ = netns.exec(&["ethtool", "-K", "eth0", "tx", "off"]);
    }
    for pod in [&remote, &local] {
        lab.wait_source(&pod.netns, &echo_at(&lab.web.address), EGRESS);
        pod.netns.tcp(&echo_at(&lab.web.address), 20, 10).expect_all_from(20, EGRESS);
        pod.netns.udp(&echo_at(&lab.web.address), 20).expect_all_from(20, EGRESS);
        assert_eq!(pod.netns.ping("203.0.113.10", 3, "0.01"), 3);
        let _ = pod.exec(&["iperf3", "-c", "203.0.113.10", "-n", "5M"]);
    }
    for netns in [&remote.netns, &local.netns, &lab.web.netns] {
        for protocol in ["Tcp", "Udp", "Icmp"] {
            assert_eq!(netns.snmp(protocol, "InCsumErrors"), 0, "{protocol} in {}", netns.name());
        }
    }
}

#[test]
fn checksums_are_right_where_the_ends_compute_them() {
    checksums_are_right(|lab, [remote, local]| {
        vec![remote.netns.clone(), local.netns.clone(), lab.web.netns.clone()]
    });
}

/// The packet is translated while its checksum is still to be done from the part that is there.
#[test]
fn checksums_are_right_where_the_uplinks_compute_them() {
    checksums_are_right(|lab, _| lab.nodes.iter().map(|node| node.netns.clone()).collect());
}

/// Pods, services and nodes see a selected pod as they saw it before Outgate was there.
fn cluster_traffic_is_untouched(cni: Cni) {
    let lab = Lab::with(&two_nodes().cni(cni));
    let pod = |node: &str, name: &str| lab.run_pod(node, &PodSpec::new("prod", name));
    let (client, near, far) = (pod("node-a", "client"), pod("node-a", "near"), pod("node-b", "far"));
    let (a, b) = (lab.node("node-a"), lab.node("node-b"));
    let _servers = [&near.netns, &far.netns, &lab.web.netns].map(|netns| lab.echo(netns));
    let _node_servers = [a, b].map(|node| lab.echo_on(&node.netns, &node.address));

    // The plugins masquerade what leaves the node's own pod network.
    let direct =
        [(&near.ip, &client.ip), (&far.ip, &a.address), (&a.address, &client.ip), (&b.address, &a.address)];
    let services = [
        ("10.96.0.10", &far.ip, &a.address),
        ("10.96.0.11", &near.ip, &client.ip),
        ("10.96.0.12", &b.address, &a.address),
        ("198.51.100.12", &b.address, &a.address),
    ];
    for (service, target, _) in &services {
        for protocol in ["tcp", "udp"] {
            a.service(Front::Address(service, 80), protocol, &echo_at(target), Masquerade::Cluster);
        }
    }
    let direct = direct.map(|(destination, source)| (echo_at(destination), source));
    let services = services.map(|(service, _, source)| (format!("{service}:80"), source));
    let check = || {
        for (destination, source) in direct.iter().chain(&services) {
            client.netns.tcp(destination, 20, 10).expect_all_from(20, source);
            client.netns.udp(destination, 5).expect_all_from(5, source);
        }
        for address in [&near.ip, &far.ip, &a.address, &b.address] {
            assert_eq!(client.netns.ping(address, 3, "0.01"), 3, "{address}");
        }
    };
    check();
    let _agents = start(&lab, "node-b");
    lab.wait_source(&client.netns, &echo_at(&lab.web.address), EGRESS);
    let retransmitted = client.netns.snmp("Tcp", "RetransSegs");
    check();
    // A dropped packet that was sent again would not be seen otherwise.
    assert_eq!(client.netns.snmp("Tcp", "RetransSegs"), retransmitted);
}

#[test]
fn cluster_traffic_of_ptp_pods_is_untouched() {
    cluster_traffic_is_untouched(Cni::Ptp);
}

#[test]
fn cluster_traffic_of_bridge_pods_is_untouched() {
    cluster_traffic_is_untouched(Cni::Bridge);
}

/// A service that iptables translates to an outside host is traffic to outside.
fn services_outside_leave_by_the_egress_ip(cni: Cni) {
    let (lab, _agents) = cluster(&two_nodes().cni(cni), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let recorder = Recorder::start(&lab.web.netns);
    for node in ["node-a", "node-b"] {
        let pod = lab.run_pod(node, &PodSpec::new("prod", node));
        let node = lab.node(node);
        for service in ["10.96.0.20", "198.51.100.20"] {
            for protocol in ["tcp", "udp"] {
                let front = Front::Address(service, 80);
                node.service(front, protocol, &echo_at(&lab.web.address), Masquerade::Cluster);
            }
            let destination = format!("{service}:80");
            lab.wait_source(&pod.netns, &destination, EGRESS);
            pod.netns.tcp(&destination, 50, 25).expect_all_from(50, EGRESS);
            pod.netns.udp(&destination, 10).expect_all_from(10, EGRESS);
        }
    }
    recorder.expect_only("tcp", &[EGRESS]);
    recorder.expect_only("udp", &[EGRESS]);
}

#[test]
fn services_outside_leave_by_the_egress_ip_from_ptp_pods() {
    services_outside_leave_by_the_egress_ip(Cni::Ptp);
}

#[test]
fn services_outside_leave_by_the_egress_ip_from_bridge_pods() {
    services_outside_leave_by_the_egress_ip(Cni::Bridge);
}

#[test]
fn unselected_pods_and_nodes_behave_as_before() {
    let lab = Lab::with(&two_nodes());
    let _echo = lab.echo(&lab.web.netns);
    let pods = ["node-a", "node-b"].map(|node| lab.run_pod(node, &PodSpec::new("dev", node)));
    let check = || {
        for pod in &pods {
            let node = lab.node(&pod.node);
            let recorder = Recorder::start(&lab.web.netns);
            for netns in [&pod.netns, &node.netns] {
                netns.tcp(&echo_at(&lab.web.address), 50, 25).expect_all_from(50, &node.address);
                netns.udp(&echo_at(&lab.web.address), 10).expect_all_from(10, &node.address);
                assert_eq!(netns.ping("203.0.113.10", 3, "0.01"), 3);
            }
            for protocol in ["tcp", "udp", "icmp"] {
                recorder.expect_only(protocol, &[&node.address]);
            }
        }
    };
    check();
    let _agents = start(&lab, "node-b");
    check();
}

/// Objects of selected pods whose address is another's: a node's, or one that a running pod has by now.
#[test]
fn host_network_and_finished_pods_select_nobody() {
    let (lab, _agents) = cluster(&two_nodes(), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let node = lab.node("node-a");
    let running = lab.run_pod("node-a", &PodSpec::new("dev", "running"));
    lab.wait_source(&running.netns, &echo_at(&lab.web.address), &node.address);
    for (name, network, phase, ip) in
        [("agent", "true", "Running", &node.address), ("job", "false", "Succeeded", &running.ip)]
    {
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: prod, name: {name}, uid: {name}}}\n\
             spec: {{nodeName: node-a, hostNetwork: {network}}}\n\
             status: {{phase: {phase}, podIP: {ip}, podIPs: [{{ip: {ip}}}]}}\n"
        );
        lab.objects.write(&format!("{name}.yaml"), &pod);
    }
    // The same change selects this one: once it is in force, so is all that the agent makes of the others.
    let selected = lab.run_pod("node-a", &PodSpec::new("prod", "selected"));
    lab.wait_source(&selected.netns, &echo_at(&lab.web.address), EGRESS);
    for netns in [&running.netns, &node.netns] {
        netns.tcp(&echo_at(&lab.web.address), 10, 5).expect_all_from(10, &node.address);
        netns.udp(&echo_at(&lab.web.address), 5).expect_all_from(5, &node.address);
    }
}

/// A selected pod that serves answers by the address it was called by, and goes out by its egress IP.
fn incoming_connections_are_answered_untranslated(cni: Cni) {
    let (lab, _agents) = cluster(&two_nodes().cni(cni).routed_pods(), "node-b");
    let client = &lab.web;
    let _client_echo = lab.echo(&client.netns);
    // On a node that owns nothing and on the owner itself.
    for name in ["node-a", "node-b"] {
        let pod = lab.run_pod(name, &PodSpec::new("prod", name));
        let node = lab.node(name);
        let _server = lab.echo(&pod.netns);
        lab.wait_source(&pod.netns, &echo_at(&client.address), EGRESS);
        for (port, masquerade) in [(30_000, Masquerade::Cluster), (30_001, Masquerade::Local)] {
            for protocol in ["tcp", "udp"] {
                node.service(Front::NodePort(port), protocol, &echo_at(&pod.ip), masquerade);
            }
        }
        let recorder = Recorder::start(&client.netns);
        let called = |destination: &str, seen: &str, answered_by: &str| {
            recorder.reset();
            client.netns.tcp(destination, 50, 25).expect_all_from(50, seen);
            client.netns.udp(destination, 10).expect_all_from(10, seen);
            recorder.expect_only("tcp", &[answered_by]);
            recorder.expect_only("udp", &[answered_by]);
        };
        called(&echo_at(&pod.ip), &client.address, &pod.ip);
        assert_eq!(client.netns.ping(&pod.ip, 3, "0.01"), 3);
        recorder.expect_only("icmp", &[&pod.ip]);
        called(&format!("{}:30001", node.address), &client.address, &node.address);
        let gateway = format!("{}.1", node.pod_prefix);
        called(&format!("{}:30000", node.address), &gateway, &node.address);

        // Its own connections to the very same host are egress all the same.
        recorder.reset();
        pod.netns.tcp(&echo_at(&client.address), 20, 10).expect_all_from(20, EGRESS);
        pod.netns.udp(&echo_at(&client.address), 5).expect_all_from(5, EGRESS);
        assert_eq!(pod.netns.ping(&client.address, 3, "0.01"), 3);
        for protocol in ["tcp", "udp", "icmp"] {
            recorder.expect_only(protocol, &[EGRESS]);
        }
    }
}

#[test]
fn incoming_connections_of_ptp_pods_are_answered_untranslated() {
    incoming_connections_are_answered_untranslated(Cni::Ptp);
}

#[test]
fn incoming_connections_of_bridge_pods_are_answered_untranslated() {
    incoming_connections_are_answered_untranslated(Cni::Bridge);
}

/// A port of a node that has not the pod: the packet is masqueraded there and comes from within the cluster.
#[test]
fn a_port_of_another_node_reaches_a_selected_pod() {
    let (lab, _agents) = cluster(&LabSpec::default(), "node-b");
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "server"));
    let (_server, _echo) = (lab.echo(&pod.netns), lab.echo(&lab.web.netns));
    lab.wait_source(&pod.netns, &echo_at(&lab.web.address), EGRESS);
    let recorder = Recorder::start(&lab.other.netns);
    let entry = lab.node("node-c");
    for protocol in ["tcp", "udp"] {
        entry.service(Front::NodePort(30_000), protocol, &echo_at(&pod.ip), Masquerade::Cluster);
    }
    let destination = format!("{}:30000", entry.address);
    lab.other.netns.tcp(&destination, 50, 25).expect_all_from(50, &entry.address);
    lab.other.netns.udp(&destination, 10).expect_all_from(10, &entry.address);
    recorder.expect_only("tcp", &[&entry.address]);
    recorder.expect_only("udp", &[&entry.address]);
}

/// Two addresses: each pod keeps to one, both owners carry traffic, `status` and the wire agree.
#[test]
fn pods_spread_over_two_addresses_and_keep_to_one() {
    let lab = Lab::new();
    lab.describe_cluster(&["node-b", "node-c"]);
    let addresses = ["172.18.0.101", "172.18.0.102"];
    lab.objects.egress_ip("prod", &addresses, &[("env", "prod")], &[]);
    let _agents = lab.start_agents();
    let owners = addresses.map(|address| lab.wait_owner(address));
    assert_ne!(owners[0], owners[1], "at most one address of an object on a node");
    let _echo = lab.echo(&lab.web.netns);
    let pods: Vec<Pod> =
        (0..6).map(|n| lab.run_pod("node-a", &PodSpec::new("prod", &format!("client-{n}")))).collect();
    let recorder = Recorder::start(&lab.web.netns);
    for pod in &pods {
        let seen = lab::eventually_ok("an egress IP", LIMIT, || {
            pod.netns.tcp_source(&echo_at(&lab.web.address), Duration::from_millis(300))
        });
        assert!(addresses.contains(&&*seen), "{seen}");
        pod.netns.tcp(&echo_at(&lab.web.address), 20, 10).expect_all_from(20, &seen);
        pod.netns.udp(&echo_at(&lab.web.address), 5).expect_all_from(5, &seen);
    }
    // Six pods all on one address would be 1 in 32, for ever: pods are bound by their names.
    recorder.expect_only("tcp", &addresses);
}

/// An egress IP is an address to leave by, not one to be reached at.
#[test]
fn an_egress_ip_serves_nothing_itself() {
    let (lab, _agents) = cluster(&two_nodes(), "node-b");
    let owner = lab.node("node-b");
    let _server = lab.echo(&owner.netns);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let _echo = lab.echo(&lab.web.netns);
    lab.wait_source(&pod.netns, &echo_at(&lab.web.address), EGRESS);
    for client in [&lab.web, &lab.neighbour] {
        // What can be reached is reached, so that the address is what makes the difference.
        let seen = client.netns.tcp_source(&echo_at(&owner.address), LIMIT);
        assert_eq!(seen, Ok(client.address.clone()));
        let limit = Duration::from_millis(300);
        for seen in [
            client.netns.tcp_source(&echo_at(EGRESS), limit),
            client.netns.udp_source(&echo_at(EGRESS), limit),
        ] {
            assert!(seen.is_err(), "{seen:?}");
        }
        assert_eq!(client.netns.ping(EGRESS, 2, "0.01"), 0);
    }
}
