//! Egress firewalls do what the documentation of `OpenShift` says of them: ordered rules on what leaves the cluster and
//! on nodes, for pods with and without an egress IP.

use std::time::Duration;

use lab::firewall::{Cluster, allow, deny};
use lab::reach::{OPEN, SILENT, expect, expect_targets, nothing_arrives, tcp, udp};
use lab::servers::ECHO;
use lab::service::{Front, Masquerade};
use lab::{Cni, Family, Lab, LabSpec, Pod, PodSpec, endpoint, eventually_ok};

const EGRESS: &str = "172.18.0.101";
const WEB: &str = "203.0.113.10";
const OTHER: &str = "203.0.113.20";
const NEIGHBOUR: &str = "172.18.0.250";
const NODE_A: &str = "172.18.0.11";
const NODE_B: &str = "172.18.0.12";
/// For a change to be in force, on a busy machine.
const LIMIT: Duration = Duration::from_secs(5);

/// Routes a network outside to a host, which answers as all of its addresses.
fn whole_network(lab: &Lab, host: &lab::Host, network: &str) {
    lab.router.ip(&[&format!("route add {network} via {}", host.address)]);
    host.netns.ip(&[&format!("route add local {network} dev lo")]);
}

/// The object of `OpenShift`'s documentation as it stands there, and its reverse. Names: tests/names.rs.
fn order_decides(cni: Cni) {
    let cluster = Cluster::new(LabSpec::default().cni(cni));
    let lab = &cluster.lab;
    whole_network(lab, &lab.web, "1.2.3.0/24");
    let pods = cluster.pods();
    let free = cluster.pod("node-a", "dev");
    expect(&pods[0].netns, &[(WEB, OPEN), (OTHER, OPEN)]);
    cluster.firewall(&[allow("1.2.3.0/24"), deny("0.0.0.0/0")]);
    for pod in &pods {
        let node = &lab.node(&pod.node).address;
        expect_targets(&pod.netns, &[(tcp("1.2.3.4"), OPEN), (tcp("1.2.3.255"), OPEN), (tcp(OTHER), SILENT)]);
        expect(&pod.netns, &[(OTHER, SILENT), (WEB, SILENT)]);
        // The node's path and address, as without a firewall.
        pod.netns.tcp("1.2.3.4:7777", 20, 5).expect_all_from(20, node);
        pod.netns.tcp("1.2.3.77:7777", 1, 1).expect_all_from(1, node);
        assert_eq!(pod.netns.ping("1.2.3.4", 3, "0.01"), 3);
        for host in [&lab.web, &lab.other] {
            nothing_arrives(&host.netns, &[node, &pod.ip], || {
                assert_eq!(pod.netns.reach(&[&tcp(&host.address), &udp(&host.address)]), [SILENT, SILENT]);
                assert_eq!(pod.netns.ping(&host.address, 2, "0.01"), 0);
            });
        }
    }
    // Who has no firewall is not disturbed by others'.
    free.netns.tcp(&endpoint(OTHER, ECHO), 10, 5).expect_all_from(10, NODE_A);
    free.netns.udp(&endpoint(OTHER, ECHO), 10).expect_all_from(10, NODE_A);
    lab.node("node-a").netns.tcp(&endpoint(OTHER, ECHO), 2, 1).expect_all_from(2, NODE_A);

    cluster.firewall(&[deny("0.0.0.0/0"), allow("1.2.3.0/24")]);
    for pod in &pods {
        expect_targets(&pod.netns, &[(tcp("1.2.3.4"), SILENT), (tcp(OTHER), SILENT), (udp(WEB), SILENT)]);
        assert_eq!(pod.netns.ping("1.2.3.4", 2, "0.01"), 0);
    }
    assert!(lab.drops("node-a").contains_key("FirewallDenied"), "{:?}", lab.drops("node-a"));
    // Pods that speak from their first moment.
    nothing_arrives(&lab.other.netns, &[NODE_A, NODE_B], || {
        let server = endpoint(OTHER, ECHO);
        let early = (0..6).map(|number| {
            let spec = PodSpec::new("prod", &format!("early{number}"));
            lab.run_pod(&lab.nodes[number % 2].name, &spec.early(&["bulk", "spray", &server, "--syn", "9"]))
        });
        let early: Vec<_> = early.collect();
        for pod in &early {
            expect(&pod.netns, &[(WEB, SILENT)]);
        }
    });
    // A pod of the host's network is the node, which has no firewall.
    let text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: prod, name: host, uid: host}}\n\
         spec: {{nodeName: node-a, hostNetwork: true}}\n\
         status: {{phase: Running, podIP: {NODE_A}, podIPs: [{{ip: {NODE_A}}}]}}\n"
    );
    lab.objects.write("host.yaml", &text);
    let late = lab.run_pod("node-a", &PodSpec::new("prod", "late"));
    expect(&late.netns, &[(WEB, SILENT)]);
    lab.node("node-a").netns.tcp(&endpoint(WEB, ECHO), 2, 1).expect_all_from(2, NODE_A);

    lab.objects.remove_firewall("prod");
    for pod in &pods {
        expect(&pod.netns, &[(WEB, OPEN), (OTHER, OPEN)]);
    }
    // Nor does a change of nothing but a namespace's last rule matter to who is not denied by it.
    cluster.firewall(&[]);
    expect(&pods[0].netns, &[(WEB, OPEN), (OTHER, OPEN)]);
}

#[test]
fn order_decides_for_ptp_pods() {
    order_decides(Cni::Ptp);
}

#[test]
fn order_decides_for_bridge_pods() {
    order_decides(Cni::Bridge);
}

#[test]
fn ports_protocols_and_families() {
    let cluster = Cluster::new(LabSpec::default().dual_stack());
    let lab = &cluster.lab;
    let (web6, other6) = (&*lab.web.address6, &*lab.other.address6);
    let pods = cluster.pods();
    let pod = &pods[0].netns;
    let _nginx = lab.nginx(&lab.web.netns);
    let every = |v4: [&'static str; 2], v6: [&'static str; 2]| {
        [(tcp(WEB), v4[0]), (udp(WEB), v4[1]), (tcp(web6), v6[0]), (udp(web6), v6[1])]
    };

    // Each family has its own "everything".
    for (rule, v4, v6) in [("0.0.0.0/0", SILENT, OPEN), ("::/0", OPEN, SILENT)] {
        cluster.firewall(&[deny(rule)]);
        expect_targets(pod, &every([v4; 2], [v6; 2]));
        assert_eq!(pod.ping(WEB, 2, "0.01") > 0, v4 == OPEN);
        assert_eq!(pod.ping(web6, 2, "0.01") > 0, v6 == OPEN);
    }

    // A protocol's port is another's not; what has no ports is touched by no rule with some.
    cluster.firewall(&[
        allow("203.0.113.0/24").port("TCP", ECHO),
        allow("2001:db8:203::/64").port("UDP", ECHO),
        deny("0.0.0.0/0"),
        deny("::/0"),
    ]);
    expect_targets(pod, &every([OPEN, SILENT], [SILENT, OPEN]));
    assert_eq!([pod.ping(WEB, 2, "0.01"), pod.ping(web6, 2, "0.01")], [0, 0]);
    let curl =
        |port: &str| pod.try_exec(&["curl", "-s", "--max-time", "1", &format!("http://{WEB}:{port}/")]);
    assert!(!curl("80").success(), "port 80 is not allowed");

    // The whole of a range, and nothing beside it. Port rules of a narrower and a wider prefix, in both orders.
    cluster.firewall(&[
        deny("203.0.113.20/32").ports("TCP", 7000, 7777),
        allow("203.0.113.0/24").ports("TCP", 80, ECHO).ports("UDP", ECHO, 9000),
        deny("203.0.113.0/24"),
        deny("2001:db8:203::10/128").ports("TCP", ECHO + 1, 65_535),
        deny("2001:db8:203::20/128").ports("UDP", 1, ECHO),
    ]);
    expect_targets(pod, &every([OPEN; 2], [OPEN; 2]));
    expect_targets(
        pod,
        &[(tcp(OTHER), SILENT), (udp(OTHER), OPEN), (tcp(other6), OPEN), (udp(other6), SILENT)],
    );
    assert!(curl("80").success(), "port 80 is the range's first");
    // No port, no rule with ports: the third rule, and for IPv6 none.
    assert_eq!((pod.ping(WEB, 2, "0.01"), pod.ping(web6, 2, "0.01")), (0, 2));

    // The pod on the other node, over the same rules.
    expect_targets(&pods[1].netns, &every([OPEN; 2], [OPEN; 2]));
    expect_targets(&pods[1].netns, &[(tcp(OTHER), SILENT), (udp(other6), SILENT)]);
}

#[test]
fn an_egress_ip_and_a_firewall_work_together() {
    let cluster = Cluster::new(LabSpec::default());
    let lab = &cluster.lab;
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    cluster.firewall(&[allow("203.0.113.10/32"), deny("0.0.0.0/0")]);
    let pods = cluster.pods();
    for pod in &pods {
        expect(&pod.netns, &[(WEB, OPEN), (OTHER, SILENT)]);
        lab.wait_source(&pod.netns, &endpoint(WEB, ECHO), EGRESS);
        pod.netns.tcp(&endpoint(WEB, ECHO), 20, 5).expect_all_from(20, EGRESS);
        pod.netns.udp(&endpoint(WEB, ECHO), 5).expect_all_from(5, EGRESS);
        assert_eq!(pod.netns.ping(WEB, 2, "0.01"), 2);
        nothing_arrives(&lab.other.netns, &[EGRESS, NODE_A, NODE_B, &pod.ip], || {
            assert_eq!(pod.netns.reach(&[&tcp(OTHER), &udp(OTHER)]), [SILENT, SILENT]);
            assert_eq!(pod.netns.ping(OTHER, 2, "0.01"), 0);
        });
    }
    // The firewall goes, the egress IP stays; and the other way round.
    lab.objects.remove_firewall("prod");
    expect(&pods[0].netns, &[(WEB, OPEN), (OTHER, OPEN)]);
    pods[0].netns.tcp(&endpoint(OTHER, ECHO), 5, 1).expect_all_from(5, EGRESS);
    cluster.firewall(&[allow("203.0.113.10/32"), deny("0.0.0.0/0")]);
    lab.objects.remove_egress_ip("prod");
    lab.wait_source(&pods[0].netns, &endpoint(WEB, ECHO), NODE_A);
    expect(&pods[0].netns, &[(WEB, OPEN), (OTHER, SILENT)]);
}

/// Pods by whatever address are never judged, and neither is what they answer to who called them.
fn inside_and_inbound(cni: Cni) {
    let cluster = Cluster::new(LabSpec::default().cni(cni).routed_pods());
    let lab = &cluster.lab;
    let pod = |node: &str, name: &str| lab.run_pod(node, &PodSpec::new("prod", name));
    let (client, near, far) = (pod("node-a", "client"), pod("node-a", "near"), pod("node-b", "far"));
    let node = lab.node("node-a");
    let _servers = [&near.netns, &far.netns, &client.netns].map(|netns| lab.echo(netns));
    let _node_b = lab.echo_on(&lab.node("node-b").netns, NODE_B);
    for protocol in ["tcp", "udp"] {
        for (service, target) in [
            ("10.96.0.10", &*far.ip),
            ("10.96.0.11", &near.ip),
            ("198.51.100.10", &far.ip),
            ("10.96.0.20", WEB),
            ("10.96.0.21", OTHER),
            ("198.51.100.12", NODE_B),
        ] {
            node.service(
                Front::Address(service, ECHO),
                protocol,
                &endpoint(target, ECHO),
                Masquerade::Cluster,
            );
        }
        node.service(Front::NodePort(30_000), protocol, &endpoint(&near.ip, ECHO), Masquerade::Cluster);
        node.service(Front::NodePort(30_001), protocol, &endpoint(&client.ip, ECHO), Masquerade::Local);
    }
    // Connections from outside that were there before the firewall go on as well.
    let calls = |interval| {
        let to = endpoint(&client.ip, ECHO);
        ["tcp", "udp"].map(|protocol| lab.web.netns.stream(protocol, &to, Duration::from_millis(interval)))
    };
    let before = calls(5);
    cluster.firewall(&[allow("203.0.113.20/32"), deny("0.0.0.0/0")]);
    expect(
        &client.netns,
        &[
            (WEB, SILENT),
            (OTHER, OPEN),
            (&far.ip, OPEN),
            (&near.ip, OPEN),
            ("10.96.0.10", OPEN),
            ("10.96.0.11", OPEN),
            ("198.51.100.10", OPEN),
            // What netfilter makes of these leads outside or to a node: judged as that.
            ("10.96.0.20", SILENT),
            ("10.96.0.21", OPEN),
            ("198.51.100.12", SILENT),
        ],
    );
    // A port of the own node that leads to a pod.
    let ports = ["tcp", "udp"].map(|protocol| (format!("{protocol}/{NODE_A}:30000"), OPEN));
    expect_targets(&client.netns, &ports);
    assert_eq!(client.netns.ping(&far.ip, 2, "0.01"), 2);
    let during = calls(5);

    // New calls from a host that the pod itself may not call.
    let web = &lab.web.netns;
    web.tcp(&endpoint(&client.ip, ECHO), 20, 5).expect_all_from(20, WEB);
    web.udp(&endpoint(&client.ip, ECHO), 5).expect_all_from(5, WEB);
    web.tcp(&endpoint(NODE_A, 30_001), 20, 5).expect_all_from(20, WEB);
    web.udp(&endpoint(NODE_A, 30_001), 5).expect_all_from(5, WEB);
    assert_eq!(web.ping(&client.ip, 3, "0.01"), 3);
    // And changes of the firewall do not cut them either.
    cluster.firewall(&[deny("0.0.0.0/0")]);
    expect(&client.netns, &[(OTHER, SILENT), ("10.96.0.21", SILENT), ("10.96.0.10", OPEN)]);
    for stream in before.into_iter().chain(during) {
        stream.finish().expect_lossless_from(WEB);
    }
    // The backend decides, not the address that was called.
    cluster.firewall(&[allow("10.96.0.0/16"), allow("198.51.100.0/24"), deny("0.0.0.0/0")]);
    expect(&client.netns, &[("10.96.0.20", SILENT), ("198.51.100.12", SILENT), ("10.96.0.10", OPEN)]);
    cluster.firewall(&[deny("10.96.0.0/16"), deny("198.51.100.0/24"), deny("10.244.0.0/16")]);
    expect(
        &client.netns,
        &[("10.96.0.20", OPEN), ("198.51.100.12", OPEN), (&far.ip, OPEN), ("10.96.0.10", OPEN)],
    );
}

#[test]
fn inside_and_inbound_of_ptp_pods() {
    inside_and_inbound(Cni::Ptp);
}

#[test]
fn inside_and_inbound_of_bridge_pods() {
    inside_and_inbound(Cni::Bridge);
}

#[test]
fn nodes_and_link_local_addresses_are_judged() {
    const METADATA: &str = "169.254.169.254";
    let cluster = Cluster::new(LabSpec::default());
    let lab = &cluster.lab;
    lab.tolerate("matches no node");
    lab.neighbour.netns.ip(&[&format!("addr add {METADATA}/32 dev lo")]);
    let _servers = [NEIGHBOUR, METADATA].map(|address| lab.echo_on(&lab.neighbour.netns, address));
    let _nodes = [(0, NODE_A), (1, NODE_B)].map(|(at, address)| lab.echo_on(&lab.nodes[at].netns, address));
    for node in &lab.nodes {
        node.netns.ip(&[&format!("route add {METADATA} via {NEIGHBOUR}")]);
    }
    let label = |labels: [&[(&str, &str)]; 2]| {
        for (node, labels) in lab.nodes.iter().zip(labels) {
            lab.label_node(node, true, labels);
        }
    };
    let pods = cluster.pods();
    let everywhere = |wanted: &[(&str, &str)]| pods.iter().for_each(|pod| expect(&pod.netns, wanted));
    everywhere(&[(NODE_A, OPEN), (NODE_B, OPEN), (METADATA, OPEN), (NEIGHBOUR, OPEN)]);

    cluster.firewall(&[deny("0.0.0.0/0")]);
    everywhere(&[(NODE_A, SILENT), (NODE_B, SILENT), (METADATA, SILENT), (NEIGHBOUR, SILENT)]);
    for pod in &pods {
        for address in [NODE_A, NODE_B, METADATA] {
            assert_eq!(pod.netns.ping(address, 1, "0.01"), 0, "{address}");
        }
    }
    cluster.firewall(&[deny("172.18.0.11/32"), deny("169.254.0.0/16")]);
    everywhere(&[(NODE_A, SILENT), (NODE_B, OPEN), (METADATA, SILENT), (NEIGHBOUR, OPEN)]);
    cluster.firewall(&[
        allow("169.254.169.254/32").port("TCP", ECHO),
        allow("172.18.0.12/32").port("UDP", ECHO),
        deny("0.0.0.0/0"),
    ]);
    for pod in &pods {
        expect_targets(
            &pod.netns,
            &[(tcp(METADATA), OPEN), (udp(METADATA), SILENT), (tcp(NODE_B), SILENT), (udp(NODE_B), OPEN)],
        );
    }

    // Selected nodes: by whatever label they have now.
    cluster.firewall(&[allow("role=db").port("TCP", ECHO), deny("0.0.0.0/0")]);
    everywhere(&[(NODE_A, SILENT), (NODE_B, SILENT)]);
    let db: &[(&str, &str)] = &[("role", "db")];
    let tcp_only = |open: [bool; 2]| {
        let outcome = |open| if open { OPEN } else { SILENT };
        for pod in &pods {
            let wanted = [
                (tcp(NODE_A), outcome(open[0])),
                (tcp(NODE_B), outcome(open[1])),
                (udp(NODE_A), SILENT),
                (udp(NODE_B), SILENT),
                (tcp(WEB), SILENT),
            ];
            expect_targets(&pod.netns, &wanted);
        }
    };
    label([&[], db]);
    tcp_only([false, true]);
    label([db, db]);
    tcp_only([true, true]);
    label([db, &[("role", "web")]]);
    tcp_only([true, false]);
    // Denied nodes, too; and once none is left, nothing is.
    cluster.firewall(&[deny("role=db"), allow("role=web"), deny("172.18.0.0/24")]);
    everywhere(&[(NODE_A, SILENT), (NODE_B, OPEN), (WEB, OPEN), (NEIGHBOUR, SILENT)]);
    label([&[], &[]]);
    everywhere(&[(NODE_A, SILENT), (NODE_B, SILENT), (WEB, OPEN)]);
    cluster.firewall(&[deny("role=db")]);
    everywhere(&[(NODE_A, OPEN), (NODE_B, OPEN), (WEB, OPEN)]);
    eventually_ok("status says that the selector matches nothing", LIMIT, || {
        let status = lab.status().to_string();
        if status.contains("spec.egress[0] matches no node") { Ok(()) } else { Err(status) }
    });
}

#[test]
fn denied_clients_fail_fast_if_asked_for() {
    let cluster = Cluster::new(LabSpec::default().dual_stack());
    let lab = &cluster.lab;
    let (web6, other6) = (&*lab.web.address6, &*lab.other.address6);
    let node = lab.node("node-a");
    let _node = lab.echo_on(&node.netns, NODE_A);
    for protocol in ["tcp", "udp"] {
        node.service(
            Front::Address("10.96.0.20", ECHO),
            protocol,
            &endpoint(OTHER, ECHO),
            Masquerade::Cluster,
        );
    }
    lab.objects.config("  denyAction: Reject\n");
    cluster.firewall(&[
        allow("203.0.113.10/32"),
        allow("2001:db8:203::10/128"),
        deny("0.0.0.0/0"),
        deny("::/0"),
    ]);
    let pods = cluster.pods();
    let check = |pod: &Pod, service: bool| {
        // ICMP type 3, code 13 is EHOSTUNREACH (net/ipv4/icmp.c, icmp_err_convert); ICMPv6 type 1, code 1 is EACCES
        // (net/ipv6/icmp.c, tab_unreach).
        let mut wanted = vec![
            (tcp(WEB), OPEN),
            (udp(web6), OPEN),
            (tcp(OTHER), "refused"),
            (udp(OTHER), "unreachable"),
            (tcp(other6), "refused"),
            (udp(other6), "prohibited"),
            (tcp(NODE_A), "refused"),
            (udp(NODE_A), "unreachable"),
        ];
        if service {
            wanted.extend([(tcp("10.96.0.20"), "refused"), (udp("10.96.0.20"), "unreachable")]);
        }
        expect_targets(&pod.netns, &wanted);
        nothing_arrives(&lab.other.netns, &[NODE_A, NODE_B, EGRESS, &node.address6], || {
            let targets: Vec<_> = wanted.iter().map(|(target, _)| target.as_str()).collect();
            let outcomes = pod.netns.reach(&targets);
            assert_eq!(outcomes, wanted.iter().map(|(_, outcome)| *outcome).collect::<Vec<_>>());
            for (address, says) in [(OTHER, "filtered"), (other6, "rohibited")] {
                let ping = pod.try_exec(&["ping", "-n", "-c", "1", "-W", "1", address]);
                assert!(ping.stdout.contains(says), "{}", ping.explain());
            }
        });
    };
    check(&pods[0], true);
    check(&pods[1], false);

    // An established connection that becomes denied is reset.
    let stream = pods[0].netns.stream("tcp", &endpoint(WEB, ECHO), Duration::from_millis(5));
    cluster.firewall(&[deny("0.0.0.0/0"), deny("::/0")]);
    expect_targets(&pods[0].netns, &[(tcp(WEB), "refused"), (udp(web6), "prohibited")]);
    let report = stream.finish();
    assert!(report.errors.keys().any(|error| error.contains("reset")), "{report:?}");
    // As without an egress IP, so with one.
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    cluster.firewall(&[
        allow("203.0.113.10/32"),
        allow("2001:db8:203::10/128"),
        deny("0.0.0.0/0"),
        deny("::/0"),
    ]);
    lab.wait_source(&pods[0].netns, &endpoint(WEB, ECHO), EGRESS);
    let v4 = [(tcp(OTHER), "refused"), (udp(OTHER), "unreachable"), (tcp("10.96.0.20"), "refused")];
    expect_targets(&pods[0].netns, &v4);
    expect_targets(&pods[1].netns, &v4[..2]);

    lab.objects.config("");
    expect(&pods[0].netns, &[(OTHER, SILENT), (other6, SILENT), (NODE_A, SILENT)]);
}

/// Nodes included, and what a pod needs of its link and its cluster goes on.
#[test]
fn both_families_of_a_pod_are_covered() {
    let cluster = Cluster::new(LabSpec::default().dual_stack());
    let lab = &cluster.lab;
    cluster.firewall(&[deny("::/0"), deny("0.0.0.0/0")]);
    let pod = cluster.pod("node-a", "prod");
    for family in Family::ALL {
        expect(
            &pod.netns,
            &[(lab.web.address_of(family), SILENT), (lab.node("node-b").address_of(family), SILENT)],
        );
        assert_eq!(pod.netns.ping(lab.node("node-a").address_of(family), 1, "0.01"), 0);
    }
    // The way to its router is not outside: it still resolves it and reaches pods.
    let near = lab.run_pod("node-a", &PodSpec::new("prod", "near"));
    let far = lab.run_pod("node-b", &PodSpec::new("prod", "far"));
    for peer in [&near, &far] {
        let _echo = lab.echo(&peer.netns);
        expect(&pod.netns, &[(peer.ip_of(Family::V4), OPEN), (peer.ip_of(Family::V6), OPEN)]);
    }
}
