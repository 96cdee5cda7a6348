//! IPv6 as IPv4: what selected pods send outside leaves by their egress IP (NAT66), everything else is as
//! without Outgate, and nothing of one family leaves by a mistake about the other.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::service::{Front, Masquerade};
use lab::{Agent, Cni, Family, Host, Lab, LabSpec, Pod, PodSpec, endpoint, eventually_ok};

/// The IPv6 egress IP, and the IPv4 one.
const EGRESS: &str = "2001:db8:172:18::101";
const EGRESS4: &str = "172.18.0.101";
const LIMIT: Duration = Duration::from_secs(2);
/// Where the product needs time to notice and to act.
const SOON: Duration = Duration::from_secs(10);
const PROD: &[(&str, &str)] = &[("env", "prod")];

fn two_nodes() -> LabSpec {
    LabSpec::default().nodes(2).dual_stack()
}

/// Starts Outgate in a lab: from now on, namespace `prod` leaves by these addresses, of which the one node that
/// may holds the first.
fn start(lab: &Lab, owner: &str, addresses: &[&str]) -> Vec<Agent> {
    lab.describe_cluster(&[owner]);
    lab.objects.egress_ip("prod", addresses, PROD, &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(addresses[0]), owner);
    agents
}

fn cluster(spec: &LabSpec, owner: &str) -> (Lab, Vec<Agent>) {
    let lab = Lab::with(spec);
    let agents = start(&lab, owner, &[EGRESS]);
    (lab, agents)
}

fn echo_at(host: &Host) -> String {
    endpoint(&host.address6, ECHO)
}

/// TCP, UDP and ping over IPv6 from a pod arrive with one source only.
#[track_caller]
fn leaves_as(pod: &Pod, host: &Host, source: &str) {
    let recorder = Recorder::start(&host.netns);
    pod.netns.tcp(&echo_at(host), 50, 1).expect_all_from(50, source);
    pod.netns.tcp(&echo_at(host), 50, 50).expect_all_from(50, source);
    pod.netns.udp(&echo_at(host), 10).expect_all_from(10, source);
    assert_eq!(pod.netns.ping(&host.address6, 5, "0.01"), 5);
    for protocol in ["tcp", "udp", "ipv6-icmp"] {
        recorder.expect_only(protocol, &[source]);
    }
    recorder.expect_none_but(&[source]);
}

/// Every kind of traffic, with real clients and servers, and nobody sees another source.
fn all_traffic(cni: Cni) {
    let (lab, _agents) = cluster(&two_nodes().cni(cni), "node-b");
    let web = &lab.web;
    let _servers = [
        lab.nginx(&web.netns),
        lab.echo(&web.netns),
        lab.iperf(&web.netns),
        lab.dnsmasq(&web.netns),
        lab.echo(&lab.neighbour.netns),
    ];
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &echo_at(web), EGRESS);
    let recorder = Recorder::start(&web.netns);
    let curl = |more: &[&str]| {
        let output = pod.exec(&[&["curl", "-sS", "--fail", "--max-time", "60"], more].concat());
        let strange = output.lines().find(|line| !line.starts_with(&format!("{EGRESS} ")));
        assert_eq!(strange, None, "{more:?}");
        output.lines().count()
    };
    // curl's globs: the address's own brackets are escaped.
    let url = |count: u32| format!("http://\\[{}\\]/[1-{count}]", web.address6);
    assert_eq!(curl(&[&url(500)]), 500);
    assert_eq!(curl(&["--parallel", "--parallel-immediate", "--parallel-max", "200", &url(200)]), 200);
    pod.netns.tcp(&echo_at(web), 200, 200).expect_all_from(200, EGRESS);
    pod.netns.udp(&echo_at(web), 200).expect_all_from(200, EGRESS);
    assert_eq!(pod.netns.ping(&web.address6, 50, "0.01"), 50);
    for way in [&["-R"][..], &[]] {
        let json = pod.exec(&[&["iperf3", "-6", "-c", &web.address6, "-n", "50M", "-J"], way].concat());
        assert!(!json.contains("\"error\""), "{json}");
    }
    let json = pod.exec(&["iperf3", "-6", "-c", &web.address6, "-u", "-b", "20M", "-t", "1", "-J"]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("iperf3 writes JSON");
    assert_eq!(report["end"]["sum"]["lost_packets"], 0, "{}", report["end"]);
    for transport in ["+notcp", "+tcp"] {
        let server = format!("@{}", web.address6);
        let question =
            ["dig", "-6", "+short", "+time=2", "+tries=1", transport, &server, "web.example", "AAAA"];
        assert_eq!(pod.exec(&question).trim(), web.address6);
    }
    for protocol in ["tcp", "udp", "ipv6-icmp"] {
        recorder.expect_only(protocol, &[EGRESS]);
    }
    recorder.expect_none_but(&[EGRESS]);
    // A host on the nodes' own network asks for the egress IP by neighbour discovery itself.
    leaves_as(&pod, &lab.neighbour, EGRESS);
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
    let (lab, _agents) = cluster(&LabSpec::default().dual_stack().cni(cni), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let pods = ["node-a", "node-b", "node-c"].map(|node| lab.run_pod(node, &PodSpec::new("prod", node)));
    for owner in ["node-b", "node-c", "node-a"] {
        for node in &lab.nodes {
            lab.describe_node(node, node.name == owner, true);
        }
        eventually_ok("the owner moves", SOON, || match lab.owner(EGRESS) {
            Some(now) if now == owner => Ok(()),
            other => Err(format!("{other:?}")),
        });
        for pod in &pods {
            lab.wait_source(&pod.netns, &echo_at(&lab.web), EGRESS);
        }
        for pod in &pods {
            leaves_as(pod, &lab.web, EGRESS);
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

/// One object with an address of each family: each family leaves by its own.
#[test]
fn a_dual_stack_object_serves_both_families() {
    let lab = Lab::with(&two_nodes());
    // Of each family, a node may hold one address of an object.
    let _agents = start(&lab, "node-b", &[EGRESS4, EGRESS]);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    for node in ["node-a", "node-b"] {
        let pod = lab.run_pod(node, &PodSpec::new("prod", node));
        for family in Family::ALL {
            let server = endpoint(lab.web.address_of(family), ECHO);
            lab.wait_source(&pod.netns, &server, family.egress());
        }
        let recorder = Recorder::start(&lab.web.netns);
        for family in Family::ALL {
            let server = endpoint(lab.web.address_of(family), ECHO);
            pod.netns.tcp(&server, 50, 25).expect_all_from(50, family.egress());
            pod.netns.udp(&server, 10).expect_all_from(10, family.egress());
            assert_eq!(pod.netns.ping(lab.web.address_of(family), 3, "0.01"), 3);
            recorder.expect_only(family.icmp(), &[family.egress()]);
        }
        recorder.expect_none_but(&[EGRESS4, EGRESS]);
    }
}

/// An object has no address of a family that its pods speak too: that traffic has nobody to leave by, so it is
/// dropped and counted, on the owner as elsewhere, and never leaves with the node's address.
fn the_other_family_stays_in(family: Family) {
    let lab = Lab::with(&two_nodes());
    let _agents = start(&lab, "node-b", &[family.egress()]);
    let _servers = [lab.echo(&lab.web.netns), lab.echo(&lab.neighbour.netns)];
    let other = if family == Family::V4 { Family::V6 } else { Family::V4 };
    for node in ["node-a", "node-b"] {
        let pod = lab.run_pod(node, &PodSpec::new("prod", node));
        let unselected = lab.run_pod(node, &PodSpec::new("dev", node));
        let at = |host: &Host, family| endpoint(host.address_of(family), ECHO);
        lab.wait_source(&pod.netns, &at(&lab.web, family), family.egress());
        let before = lab.drops(node).get("NoOwner").copied().unwrap_or_default();
        let recorders = [&lab.web, &lab.neighbour].map(|host| Recorder::start(&host.netns));
        let limit = Duration::from_millis(300);
        for host in [&lab.web, &lab.neighbour] {
            let server = at(host, other);
            for seen in [pod.netns.tcp_source(&server, limit), pod.netns.udp_source(&server, limit)] {
                assert!(seen.is_err(), "{seen:?}");
            }
            assert_eq!(pod.netns.ping(host.address_of(other), 2, "0.01"), 0);
        }
        for recorder in &recorders {
            recorder.expect_none_but(&[]);
        }
        let dropped = lab.drops(node)["NoOwner"] - before;
        // To two hosts: at least a SYN, a datagram and two pings each.
        assert!(dropped >= 8, "{dropped} on {node}: {:?}", lab.drops(node));

        // It is the pod's choice of object that does it, not the family: another pod's traffic leaves.
        let address = lab.node(node).address_of(other).to_owned();
        assert_eq!(unselected.netns.tcp_source(&at(&lab.web, other), LIMIT), Ok(address));
    }
}

#[test]
fn ipv6_of_pods_with_an_ipv4_egress_ip_stays_in() {
    the_other_family_stays_in(Family::V4);
}

#[test]
fn ipv4_of_pods_with_an_ipv6_egress_ip_stays_in() {
    the_other_family_stays_in(Family::V6);
}

/// The tunnel's outer packets are of the family that the nodes have.
#[test]
fn the_tunnel_works_over_a_network_with_ipv6_only() {
    for cni in [Cni::Ptp, Cni::Bridge] {
        let (lab, _agents) = cluster(&two_nodes().cni(cni).ipv6_only_underlay(), "node-b");
        let _servers = [lab.echo(&lab.web.netns), lab.iperf(&lab.web.netns)];
        let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
        lab.wait_source(&pod.netns, &echo_at(&lab.web), EGRESS);
        leaves_as(&pod, &lab.web, EGRESS);
        for way in [&["-R"][..], &[]] {
            let json =
                pod.exec(&[&["iperf3", "-6", "-c", &lab.web.address6, "-n", "20M", "-J"], way].concat());
            assert!(!json.contains("\"error\""), "{json}");
        }
    }
}

/// IPv4 egress from a node without IPv4 on its uplink, by a gateway that has it: the nodes have IPv6 in common.
#[test]
fn ipv4_goes_through_a_tunnel_over_ipv6() {
    let lab = Lab::with(&two_nodes().ipv6_only_underlay());
    lab.router.ip(&["addr add 172.18.0.1/24 dev eth0"]);
    let (a, b) = (lab.node("node-a"), lab.node("node-b"));
    b.netns.ip(&["addr add 172.18.0.12/24 dev eth0", "route add default via 172.18.0.1"]);
    // IPv4 by an IPv6 next hop (RFC 5549), so that the host's stack lets a first packet reach the uplink.
    a.netns.ip(&["route add 0.0.0.0/0 via inet6 2001:db8:172:18::1 dev eth0"]);
    let _agents = start(&lab, "node-b", &[EGRESS4]);
    let _servers = [lab.echo(&lab.web.netns), lab.iperf(&lab.web.netns)];
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let server = endpoint(&lab.web.address, ECHO);
    lab.wait_source(&pod.netns, &server, EGRESS4);
    // What the nodes say to each other is counted by family at the gateway.
    let recorder = Recorder::start(&b.netns);
    pod.netns.tcp(&server, 50, 25).expect_all_from(50, EGRESS4);
    pod.netns.udp(&server, 10).expect_all_from(10, EGRESS4);
    let json = pod.exec(&["iperf3", "-c", &lab.web.address, "-n", "20M", "-J"]);
    assert!(!json.contains("\"error\""), "{json}");
    let outer = recorder.sources("udp");
    assert!(outer.get(&a.address6).is_some_and(|packets| *packets > 100), "{outer:?}");
}

/// The kernel's answer to a neighbour solicitation or ARP request of the neighbour, if there is one.
fn resolves(lab: &Lab, address: &str) -> Option<String> {
    let netns = &lab.neighbour.netns;
    let _ = netns.try_exec(&["ip", "neigh", "del", address, "dev", "eth0"]);
    // That nobody answers the ping itself does not matter.
    let _ = netns.try_exec(&["ping", "-n", "-c", "1", "-W", "0.3", address]);
    lladdr(lab, address)
}

/// The hardware address that the neighbour has noted for an address.
fn lladdr(lab: &Lab, address: &str) -> Option<String> {
    let text = lab.neighbour.netns.exec(&["ip", "neigh", "show", address, "dev", "eth0"]);
    let mut words = text.split_whitespace().skip_while(|word| *word != "lladdr");
    words.nth(1).map(str::to_owned)
}

fn mac(lab: &Lab, node: &str) -> String {
    let node = lab.node(node);
    let text = node.netns.exec(&["ip", "-br", "link", "show", &node.uplink]);
    text.split_whitespace().nth(2).expect("name, state, address").to_owned()
}

#[test]
fn neighbours_resolve_held_addresses_and_no_others() {
    let lab = Lab::with(&two_nodes());
    lab.describe_cluster(&["node-a", "node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS4, EGRESS], PROD, &[]);
    let _agents = lab.start_agents();
    for address in [EGRESS4, EGRESS] {
        let owner = lab.wait_owner(address);
        eventually_ok(&format!("{address} is resolved"), SOON, || match resolves(&lab, address) {
            Some(found) if found == mac(&lab, &owner) => Ok(()),
            other => Err(format!("{other:?}")),
        });
        for node in &lab.nodes {
            let addresses = node.netns.exec(&["ip", "addr"]);
            assert!(!addresses.contains(&format!("{address}/")), "{addresses}");
        }
    }
    // Neither addresses of nobody, nor those of pods, which are another network's.
    for address in ["172.18.0.102", "2001:db8:172:18::102", "2001:db8:172:18::1:101"] {
        assert_eq!(resolves(&lab, address), None, "{address}");
    }
    // An address is given up with its object.
    lab.objects.remove_egress_ip("prod");
    for address in [EGRESS4, EGRESS] {
        eventually_ok(&format!("{address} is given up"), SOON, || match resolves(&lab, address) {
            None => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
}

/// A host with an entry in its neighbour table learns of a move from the announcement, before it asks again.
#[test]
fn a_stale_neighbour_entry_learns_the_move() {
    let lab = Lab::with(&LabSpec::default().dual_stack());
    let families = Family::ALL.map(|family| (family, format!("prod-{family:?}").to_lowercase()));
    lab.describe_cluster(&["node-b"]);
    for (family, name) in &families {
        // One object for each, so that one node may hold both.
        lab.objects.egress_ip(name, &[family.egress()], PROD, &[("family", name)]);
    }
    let _agents = lab.start_agents();
    for (family, _) in &families {
        assert_eq!(lab.wait_owner(family.egress()), "node-b");
        eventually_ok("the first owner is known", SOON, || match resolves(&lab, family.egress()) {
            Some(found) if found == mac(&lab, "node-b") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        // Valid for as long as the test lasts: only an announcement changes it.
        let [address, mac] = [family.egress(), &mac(&lab, "node-b")];
        lab.neighbour.netns.ip(&[&format!("neigh replace {address} dev eth0 lladdr {mac} nud stale")]);
    }
    for node in &lab.nodes {
        lab.describe_node(node, node.name == "node-c", true);
    }
    for (family, _) in &families {
        eventually_ok(&format!("{family:?} moves"), SOON, || match lladdr(&lab, family.egress()) {
            Some(found) if found == mac(&lab, "node-c") => Ok(()),
            other => Err(format!("{other:?}, not {}", mac(&lab, "node-c"))),
        });
    }
}

/// `ICMPv6` errors reach a selected pod as if it had its egress IP itself.
fn errors_reach_the_pod(owner: &str) {
    let (lab, _agents) = cluster(&two_nodes(), owner);
    let web = &lab.web.address6;
    let _echo = lab.echo(&lab.web.netns);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &echo_at(&lab.web), EGRESS);
    let recorder = Recorder::start(&lab.web.netns);

    // The node is the first hop, the router the second, and the server the third; three packets of one flow.
    for (hops, answer) in [
        ("1", "From fd00:10:244:1::1 ".to_owned()),
        ("2", "From 2001:db8:172:18::1 ".to_owned()),
        ("3", format!("bytes from {web}")),
    ] {
        let words = ["ping", "-6", "-n", "-c", "3", "-i", "0.1", "-W", "1", "-t", hops, web];
        let output = pod.try_exec(&words);
        assert_eq!(output.stdout.matches(&answer).count(), 3, "{}", output.explain());
    }

    // The same by UDP, as traceroute and tracepath do it.
    assert_eq!(pod.netns.trace(web, 3), ["fd00:10:244:1::1", "2001:db8:172:18::1", web]);

    // Nobody listens: the refusal reaches the pod's socket at once, by UDP's and by TCP's own way.
    for kind in ["socket.SOCK_DGRAM", "socket.SOCK_STREAM"] {
        let program = format!(
            "import socket\ns = socket.socket(socket.AF_INET6, {kind})\ns.settimeout(2)\n\
             try:\n s.connect(('{web}', 4444)); s.send(b'x'); s.recv(1)\n\
             except ConnectionRefusedError: print('refused')"
        );
        assert_eq!(pod.exec(&["python3", "-c", &program]).trim(), "refused", "{kind}");
    }

    // A narrow link behind the router: the pod learns its MTU from the router's error, and its data arrives.
    lab.router.ip(&["link set br1 mtu 1300"]);
    let words = ["ping", "-6", "-n", "-c", "2", "-i", "0.2", "-W", "1", "-M", "do", "-s", "1350", web];
    let output = pod.try_exec(&words);
    let said = format!("{}{}", output.stdout, output.stderr);
    assert!(said.contains("mtu=1300") || said.contains("mtu = 1300"), "{}", output.explain());
    let route = pod.exec(&["ip", "route", "get", web]);
    assert!(route.contains("mtu 1300"), "{route}");
    pod.netns.tcp(&echo_at(&lab.web), 5, 1).expect_all_from(5, EGRESS);
    for protocol in ["tcp", "udp", "ipv6-icmp"] {
        recorder.expect_only(protocol, &[EGRESS]);
    }
    recorder.expect_none_but(&[EGRESS]);
}

#[test]
fn errors_reach_a_pod_through_another_nodes_egress_ip() {
    errors_reach_the_pod("node-b");
}

#[test]
fn errors_reach_a_pod_through_its_own_nodes_egress_ip() {
    errors_reach_the_pod("node-a");
}

/// Pods, services and nodes see a selected pod as they saw it before Outgate was there.
fn cluster_traffic_is_untouched(cni: Cni) {
    let lab = Lab::with(&two_nodes().cni(cni));
    let pod = |node: &str, name: &str| lab.run_pod(node, &PodSpec::new("prod", name));
    let (client, near, far) = (pod("node-a", "client"), pod("node-a", "near"), pod("node-b", "far"));
    let (a, b) = (lab.node("node-a"), lab.node("node-b"));
    let _servers = [&near.netns, &far.netns, &lab.web.netns].map(|netns| lab.echo(netns));
    let _node_servers = [a, b].map(|node| lab.echo_on(&node.netns, &node.address6));
    let at = |address: &str| endpoint(address, ECHO);
    let mut wanted = vec![
        (at(&near.ip6), &client.ip6),
        (at(&far.ip6), &a.address6),
        (at(&a.address6), &client.ip6),
        (at(&b.address6), &a.address6),
    ];
    for (service, target, source) in [
        ("fd00:10:96::10", &far.ip6, &a.address6),
        ("fd00:10:96::11", &near.ip6, &client.ip6),
        ("fd00:10:96::12", &b.address6, &a.address6),
        ("2001:db8:51::12", &b.address6, &a.address6),
    ] {
        for protocol in ["tcp", "udp"] {
            a.service(Front::Address(service, 80), protocol, &at(target), Masquerade::Cluster);
        }
        wanted.push((endpoint(service, 80), source));
    }
    let check = || {
        for (destination, source) in &wanted {
            client.netns.tcp(destination, 20, 10).expect_all_from(20, source);
            client.netns.udp(destination, 5).expect_all_from(5, source);
        }
        for address in [&near.ip6, &far.ip6, &a.address6, &b.address6] {
            assert_eq!(client.netns.ping(address, 3, "0.01"), 3, "{address}");
        }
    };
    check();
    let _agents = start(&lab, "node-b", &[EGRESS]);
    lab.wait_source(&client.netns, &echo_at(&lab.web), EGRESS);
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

/// A service that ip6tables translates to an outside host is traffic to outside.
#[test]
fn services_outside_leave_by_the_egress_ip() {
    let (lab, _agents) = cluster(&two_nodes(), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    for name in ["node-a", "node-b"] {
        let pod = lab.run_pod(name, &PodSpec::new("prod", name));
        let service = "fd00:10:96::20";
        for protocol in ["tcp", "udp"] {
            let front = Front::Address(service, 80);
            lab.node(name).service(front, protocol, &echo_at(&lab.web), Masquerade::Cluster);
        }
        let destination = endpoint(service, 80);
        lab.wait_source(&pod.netns, &destination, EGRESS);
        let recorder = Recorder::start(&lab.web.netns);
        pod.netns.tcp(&destination, 50, 25).expect_all_from(50, EGRESS);
        pod.netns.udp(&destination, 10).expect_all_from(10, EGRESS);
        recorder.expect_only("tcp", &[EGRESS]);
        recorder.expect_none_but(&[EGRESS]);
    }
}

/// A selected pod that serves answers by the address it was called by, and goes out by its egress IP.
fn incoming_connections_are_answered_untranslated(cni: Cni) {
    let (lab, _agents) = cluster(&two_nodes().cni(cni).routed_pods(), "node-b");
    let client = &lab.web;
    let _client_echo = lab.echo(&client.netns);
    for name in ["node-a", "node-b"] {
        let pod = lab.run_pod(name, &PodSpec::new("prod", name));
        let node = lab.node(name);
        let _server = lab.echo(&pod.netns);
        lab.wait_source(&pod.netns, &echo_at(client), EGRESS);
        let target = endpoint(&pod.ip6, ECHO);
        for protocol in ["tcp", "udp"] {
            node.service(Front::NodePort(30_001), protocol, &target, Masquerade::Local);
        }
        let recorder = Recorder::start(&client.netns);
        for (destination, answered_by) in
            [(target, &pod.ip6), (endpoint(&node.address6, 30_001), &node.address6)]
        {
            recorder.reset();
            client.netns.tcp(&destination, 50, 25).expect_all_from(50, &client.address6);
            client.netns.udp(&destination, 10).expect_all_from(10, &client.address6);
            recorder.expect_only("tcp", &[answered_by]);
            recorder.expect_only("udp", &[answered_by]);
        }
        recorder.reset();
        assert_eq!(client.netns.ping(&pod.ip6, 3, "0.01"), 3);
        recorder.expect_only("ipv6-icmp", &[&pod.ip6]);
        // Its own connections to the very same host are egress all the same.
        leaves_as(&pod, client, EGRESS);
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

#[test]
fn unselected_pods_and_nodes_behave_as_before() {
    let lab = Lab::with(&two_nodes());
    let _echo = lab.echo(&lab.web.netns);
    let pods = ["node-a", "node-b"].map(|node| lab.run_pod(node, &PodSpec::new("dev", node)));
    let check = || {
        for pod in &pods {
            let address = &lab.node(&pod.node).address6;
            leaves_as(pod, &lab.web, address);
            let node = &lab.node(&pod.node).netns;
            node.tcp(&echo_at(&lab.web), 20, 10).expect_all_from(20, address);
        }
    };
    check();
    let _agents = start(&lab, "node-b", &[EGRESS]);
    check();
}

/// An egress IP is an address to leave by, not one to be reached at.
#[test]
fn an_egress_ip_serves_nothing_itself() {
    let (lab, _agents) = cluster(&two_nodes(), "node-b");
    let owner = lab.node("node-b");
    let _server = lab.echo(&owner.netns);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let _echo = lab.echo(&lab.web.netns);
    lab.wait_source(&pod.netns, &echo_at(&lab.web), EGRESS);
    for client in [&lab.web, &lab.neighbour] {
        let seen = client.netns.tcp_source(&endpoint(&owner.address6, ECHO), LIMIT);
        assert_eq!(seen, Ok(client.address6.clone()));
        let limit = Duration::from_millis(300);
        let egress = endpoint(EGRESS, ECHO);
        for seen in [client.netns.tcp_source(&egress, limit), client.netns.udp_source(&egress, limit)] {
            assert!(seen.is_err(), "{seen:?}");
        }
        assert_eq!(client.netns.ping(EGRESS, 2, "0.01"), 0);
    }
}
