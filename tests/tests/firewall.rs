//! Egress firewalls do what the documentation of `OpenShift` says of them: ordered rules on what leaves the cluster and
//! on nodes, for pods with and without an egress IP.

use std::time::Duration;

use lab::firewall::{Rule, allow, deny};
use lab::record::Recorder;
use lab::servers::ECHO;
use lab::service::{Front, Masquerade};
use lab::{Agent, Cni, Family, Lab, LabSpec, Netns, Pod, PodSpec, Process, endpoint, eventually_ok};

const EGRESS: &str = "172.18.0.101";
const WEB: &str = "203.0.113.10";
const OTHER: &str = "203.0.113.20";
const NEIGHBOUR: &str = "172.18.0.250";
const NODE_A: &str = "172.18.0.11";
const NODE_B: &str = "172.18.0.12";
/// For a change to be in force, on a busy machine.
const LIMIT: Duration = Duration::from_secs(5);
/// For a denied live flow to stop.
const CUT: Duration = Duration::from_secs(1);

const OPEN: &str = "open";
const SILENT: &str = "silent";

struct Cluster {
    lab: Lab,
    agents: Vec<Agent>,
    _servers: Vec<Process>,
}

impl Cluster {
    /// Two nodes, agents, and the lab's own servers at the outside hosts.
    fn new(spec: LabSpec) -> Self {
        let lab = Lab::with(&spec.nodes(2));
        lab.describe_cluster(&["node-b"]);
        let agents = lab.start_agents();
        Self::serve(lab, agents)
    }

    fn serve(lab: Lab, agents: Vec<Agent>) -> Self {
        let servers = [&lab.web, &lab.other].map(|host| lab.echo(&host.netns)).into();
        Self { lab, agents, _servers: servers }
    }

    fn pod(&self, node: &str, namespace: &str) -> Pod {
        self.lab.run_pod(node, &PodSpec::new(namespace, node))
    }

    /// A pod of namespace `prod` on each node.
    fn pods(&self) -> [Pod; 2] {
        ["node-a", "node-b"].map(|node| self.pod(node, "prod"))
    }

    fn firewall(&self, rules: &[Rule]) {
        self.lab.objects.firewall("prod", rules);
    }
}

fn tcp(address: &str) -> String {
    format!("tcp/{}", endpoint(address, ECHO))
}

fn udp(address: &str) -> String {
    format!("udp/{}", endpoint(address, ECHO))
}

/// Waits until all tries come out as they should, TCP and UDP of the lab's server on each address.
#[track_caller]
fn expect(pod: &Netns, wanted: &[(&str, &str)]) {
    let targets: Vec<_> = wanted
        .iter()
        .flat_map(|(address, outcome)| [(tcp(address), *outcome), (udp(address), *outcome)])
        .collect();
    expect_targets(pod, &targets);
}

/// The same of whole targets.
#[track_caller]
fn expect_targets<T: AsRef<str>>(pod: &Netns, wanted: &[(T, &str)]) {
    let targets: Vec<_> = wanted.iter().map(|(target, _)| target.as_ref()).collect();
    eventually_ok(&format!("reached from {}", pod.name()), LIMIT, || {
        let outcomes = pod.reach(&targets);
        let wrong: Vec<_> = wanted
            .iter()
            .zip(&outcomes)
            .filter(|((_, wanted), got)| wanted != got)
            .map(|((target, wanted), got)| format!("{}: {got}, not {wanted}", target.as_ref()))
            .collect();
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
    });
}

/// Panics if the host sees a packet from one of these sources while `attempt` is made.
#[track_caller]
fn nothing_arrives(host: &Netns, sources: &[&str], attempt: impl FnOnce()) {
    let recorder = Recorder::start(host);
    attempt();
    for protocol in ["tcp", "udp", "icmp", "ipv6-icmp"] {
        let mut seen = recorder.sources(protocol);
        seen.retain(|source, _| sources.contains(&source.as_str()));
        assert!(seen.is_empty(), "{protocol} in {}: {seen:?}", host.name());
    }
}

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
    // Live flows of translated pods are judged again as well.
    live_flows_are_judged_again(&cluster, &pods, EGRESS);
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
        if status.contains("role") && status.contains("match") { Ok(()) } else { Err(status) }
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

/// Of streams to two hosts the one that a change denies stops, the other loses nothing.
#[track_caller]
fn live_flows_are_judged_again(cluster: &Cluster, pods: &[Pod], source: &str) {
    let lab = &cluster.lab;
    let interval = Duration::from_millis(2);
    let both = [allow("203.0.113.0/24"), deny("0.0.0.0/0")];
    cluster.firewall(&both);
    for pod in pods {
        expect(&pod.netns, &[(WEB, OPEN), (OTHER, OPEN), (NEIGHBOUR, SILENT)]);
    }
    let ends = || pods.iter().map(|pod| &pod.netns).chain([&lab.other.netns]);
    // Tail loss probes send again what was only late.
    ends().for_each(|netns| netns.sysctl(&["net.ipv4.tcp_early_retrans=0"]));
    let streams = |address: &str| -> Vec<_> {
        let to = endpoint(address, ECHO);
        let all = pods.iter().flat_map(|pod| ["tcp", "udp"].map(|protocol| (pod, protocol)));
        all.map(|(pod, protocol)| pod.netns.stream(protocol, &to, interval)).collect()
    };
    let denied = streams(WEB);
    let allowed = streams(OTHER);
    let retransmitted = || pods.iter().map(|pod| pod.netns.snmp("Tcp", "RetransSegs")).collect::<Vec<_>>();

    // Allowed by one rule, then by another, then by none, then by a port.
    let before = retransmitted();
    for rules in [
        &[deny("198.51.100.0/24"), allow("203.0.113.0/25"), deny("0.0.0.0/0")][..],
        &[deny("198.51.100.0/24")],
        &[allow("0.0.0.0/0").ports("TCP", 1, 65_535).ports("UDP", ECHO, ECHO), deny("0.0.0.0/0")],
        &both,
    ] {
        cluster.firewall(rules);
        let outside = if rules.len() == 1 { OPEN } else { SILENT };
        let ping = |netns: &Netns| netns.ping(&lab.neighbour.address, 1, "0.01") == 1;
        for pod in pods {
            eventually_ok("the rules are in force", LIMIT, || {
                if ping(&pod.netns) == (outside == OPEN) { Ok(()) } else { Err("not yet".to_owned()) }
            });
        }
    }
    assert_eq!(retransmitted(), before, "segments of allowed connections were sent again");

    cluster.firewall(&[deny("203.0.113.10/32")]);
    let recorder = Recorder::start(&lab.web.netns);
    let silence = |recorder: &Recorder| {
        recorder.reset();
        std::thread::sleep(Duration::from_millis(200));
        let seen = ["tcp", "udp"].map(|protocol| recorder.sources(protocol).contains_key(source));
        if seen == [false; 2] { Ok(()) } else { Err(format!("[tcp, udp] of {source} are seen: {seen:?}")) }
    };
    eventually_ok("denied streams stop", CUT, || silence(&recorder));
    // A retransmission is not let through either.
    std::thread::sleep(Duration::from_millis(500));
    silence(&recorder).unwrap_or_else(|complaint| panic!("{complaint}"));
    for stream in allowed {
        let report = stream.finish();
        assert!(report.errors.is_empty() && report.ok > 0, "{report:?}");
    }
    drop(denied);
    cluster.firewall(&[allow("203.0.113.10/32"), deny("0.0.0.0/0")]);
    expect(&pods[0].netns, &[(WEB, OPEN), (OTHER, SILENT)]);
}

#[test]
fn live_flows_follow_changes() {
    let cluster = Cluster::new(LabSpec::default());
    // What runs before there is a firewall: allowed by it, denied by it.
    let pod = cluster.pod("node-a", "prod");
    let interval = Duration::from_millis(5);
    let [allowed, denied] = [OTHER, WEB].map(|host| {
        ["tcp", "udp"].map(|protocol| pod.netns.stream(protocol, &endpoint(host, ECHO), interval))
    });
    cluster.firewall(&[allow("203.0.113.20/32"), deny("0.0.0.0/0")]);
    expect(&pod.netns, &[(WEB, SILENT), (OTHER, OPEN)]);
    let recorder = Recorder::start(&cluster.lab.web.netns);
    std::thread::sleep(CUT);
    for protocol in ["tcp", "udp"] {
        let seen = recorder.sources(protocol);
        assert!(!seen.contains_key(NODE_A), "{protocol} goes on: {seen:?}");
    }
    for stream in allowed {
        stream.finish().expect_lossless_from(NODE_A);
    }
    drop(denied);
    live_flows_are_judged_again(&cluster, &[pod], NODE_A);
}

/// What `outgate status` says, to programs and to people.
fn status_texts(lab: &Lab) -> [String; 2] {
    let text = lab.outgate("node-a", &["status", "--source", &lab.source()]).expect_success();
    [lab.status().to_string(), text]
}

/// Waits until the status has OVN-Kubernetes' words and, in both forms, the detail.
#[track_caller]
fn status_says(lab: &Lab, words: &str, detail: &str) {
    eventually_ok(&format!("status says '{words}' and '{detail}'"), LIMIT, || {
        let [json, text] = status_texts(lab);
        if json.contains(words) && [&json, &text].iter().all(|form| form.contains(detail)) {
            Ok(())
        } else {
            Err(format!("{json}\n{text}"))
        }
    });
}

const APPLIED: &str = "EgressFirewall Rules applied";
const NOT_APPLIED: &str = "EgressFirewall Rules not correctly applied";

#[test]
fn what_is_not_valid_changes_nothing_and_opens_nothing() {
    let Cluster { lab, mut agents, _servers } = Cluster::new(LabSpec::default());
    lab.tolerate("EgressFirewall");
    let pods = ["node-a", "node-b"].map(|node| lab.run_pod(node, &PodSpec::new("prod", node)));
    let good = [allow("203.0.113.10/32"), deny("0.0.0.0/0")];
    let everywhere = |wanted: &[(&str, &str)]| pods.iter().for_each(|pod| expect(&pod.netns, wanted));
    let log_says = |agents: &[Agent], part: &str| {
        eventually_ok(&format!("the log says {part}"), LIMIT, || {
            let log = agents[0].log();
            if log.contains(part) { Ok(()) } else { Err(log) }
        });
    };

    // A first object that is wrong opens nothing; what is inside is not its matter.
    expect(&pods[0].netns, &[(WEB, OPEN)]);
    lab.objects.firewall("prod", &[allow("203.0.113.10"), deny("0.0.0.0/0")]);
    everywhere(&[(WEB, SILENT), (OTHER, SILENT)]);
    assert_eq!(pods[0].netns.ping(&pods[1].ip, 2, "0.01"), 2);
    assert!(lab.drops("node-a").contains_key("FirewallNotReady"), "{:?}", lab.drops("node-a"));
    status_says(&lab, NOT_APPLIED, "spec.egress[0].to.cidrSelector");
    log_says(&agents, "203.0.113.10");
    // It says what to write instead.
    status_says(&lab, NOT_APPLIED, "203.0.113.10/32");

    lab.objects.firewall("prod", &good);
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    status_says(&lab, APPLIED, "prod");
    assert!(!status_texts(&lab)[0].contains(NOT_APPLIED), "{}", status_texts(&lab)[0]);

    // Wrong updates, each in another way: the version in force stays.
    let bad = |content: &str| format!("spec:\n  egress:\n{content}\n");
    for (wrong, named) in [
        (bad("  - {type: Allow, to: {cidrSelector: 203.0.113.0/33}}"), "203.0.113.0/33"),
        (bad("  - {type: AllowAll, to: {cidrSelector: 0.0.0.0/0}}"), "AllowAll"),
        (bad("  - {type: Allow, to: {cidrSelector: 0.0.0.0/0, dnsName: a.example}}"), "egress[0]"),
        (bad("  - {type: Allow, to: {}}"), "egress[0]"),
        (bad("  - {type: Allow, to: {cidrSelector: 0.0.0.0/0}, ports: [{protocol: ICMP, port: 1}]}"), "ICMP"),
        (bad("  - {type: Allow, to: {cidrSelector: 0.0.0.0/0}, ports: [{protocol: TCP, port: 0}]}"), "port"),
        (
            bad(
                "  - {type: Allow, to: {cidrSelector: 0.0.0.0/0}, ports: [{protocol: TCP, port: 9, endPort: 8}]}",
            ),
            "endPort",
        ),
        (bad("  - {type: Allow, to: {dnsName: \"*.*.example\"}}"), "*.*.example"),
    ] {
        let head =
            "apiVersion: k8s.ovn.org/v1\nkind: EgressFirewall\nmetadata: {name: default, namespace: prod}\n";
        lab.objects.write("firewall-prod.yaml", &format!("{head}{wrong}"));
        status_says(&lab, NOT_APPLIED, named);
        log_says(&agents, named);
        assert_eq!(
            pods[0].netns.reach(&[&tcp(WEB), &tcp(OTHER), &udp(OTHER)]),
            [OPEN, SILENT, SILENT],
            "{wrong}"
        );
    }
    // One that is too long.
    let long: Vec<_> = (0..8001_u32).map(|i| allow(&format!("198.18.{}.{}/32", i >> 8, i & 255))).collect();
    lab.objects.firewall("prod", &long);
    status_says(&lab, NOT_APPLIED, "8000");
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);

    // The agents die, and come back to the same wrong object.
    let stream = pods[0].netns.stream("tcp", &endpoint(WEB, ECHO), Duration::from_millis(5));
    for agent in agents.drain(..) {
        agent.kill();
    }
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    agents = lab.start_agents();
    for _ in 0..3 {
        everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    }
    status_says(&lab, NOT_APPLIED, "8000");
    stream.finish().expect_lossless_from(NODE_A);
    // A pod that comes now has the version in force too.
    let late = lab.run_pod("node-a", &PodSpec::new("prod", "late"));
    expect(&late.netns, &[(WEB, OPEN), (OTHER, SILENT)]);

    // Restarts while all is well lose nothing.
    lab.objects.firewall("prod", &good);
    status_says(&lab, APPLIED, "prod");
    let streams = ["tcp", "udp"]
        .map(|protocol| pods[0].netns.stream(protocol, &endpoint(WEB, ECHO), Duration::from_millis(2)));
    agents.drain(..).for_each(Agent::stop);
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    agents = lab.start_agents();
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    for stream in streams {
        stream.finish().expect_lossless_from(NODE_A);
    }
    lab.objects.remove_firewall("prod");
    everywhere(&[(WEB, OPEN), (OTHER, OPEN)]);
    assert!(!status_texts(&lab)[0].contains(APPLIED), "{}", status_texts(&lab)[0]);
    // Once open, a wrong object closes: nobody knows what its author meant to deny.
    lab.objects.firewall("prod", &[allow("1.2.3.4")]);
    everywhere(&[(WEB, SILENT)]);
    // Objects of another name are nobody's (OVN-Kubernetes: the name is `default`).
    lab.objects.remove_firewall("prod");
    everywhere(&[(WEB, OPEN)]);
    drop(agents);
}

/// Rules that differ in every entry, but for what is asked of them: `x` is allowed by the even versions and denied by
/// the odd ones, `y` the other way round; `both` and `none` are allowed and denied by all, each time by another part
/// of the compiled rules, so that a judgement by parts of two versions would go wrong.
fn version(number: u32) -> Vec<Rule> {
    let odd = number & 1 == 1;
    let mut rules = Vec::with_capacity(8000);
    let (x, y) = if odd {
        (deny("198.18.1.0/24"), allow("198.18.2.0/24"))
    } else {
        (allow("198.18.1.0/24"), deny("198.18.2.0/24"))
    };
    rules.extend([x, y]);
    if odd {
        // By port and by prefixes of other lengths.
        rules.push(allow("198.18.3.0/24").ports("UDP", 9000, 9999));
        rules.push(deny("198.18.3.0/25"));
        rules.push(deny("198.18.4.4/32"));
        rules.push(allow("198.18.4.0/24").port("TCP", 9999));
    } else {
        rules.push(allow("198.18.3.3/32"));
        rules.push(deny("198.18.3.0/24").port("UDP", 9999));
        rules.push(deny("198.18.4.0/24").ports("UDP", 1, 65_535));
        rules.push(allow("198.18.4.0/25"));
    }
    let filler = (0..).map(|i: u32| {
        let network = format!("198.19.{}.{}/32", i >> 8 & 255, (i + number) & 255);
        let rule = if (i + number) & 1 == 0 { allow(&network) } else { deny(&network) };
        match i % 8 {
            0 => rule.ports("UDP", 9000 + (i % 500) as u16 + number as u16 % 50, 9999),
            _ => rule,
        }
    });
    rules.extend(filler.take(7999 - rules.len()));
    rules.push(deny("0.0.0.0/0"));
    rules
}

#[test]
fn eight_thousand_rules_are_replaced_in_one_step() {
    const PORT: u16 = 9999;
    let cluster = Cluster::new(LabSpec::default());
    let lab = &cluster.lab;
    let [x, y, both, none] = ["198.18.1.1", "198.18.2.2", "198.18.3.3", "198.18.4.4"];
    let web = &lab.web.netns;
    lab.router.ip(&["route add 198.18.0.0/15 via 203.0.113.10"]);
    let counters = "table inet spray {
        set seen { type ipv4_addr; flags dynamic; counter; }
        chain in { type filter hook prerouting priority -450; udp dport 9999 update @seen { ip daddr } drop; }
    }";
    let _ = web.exec_input(&["nft", "-f", "-"], &[], counters).expect_success();
    let seen = |address: &str| -> u64 {
        let text = web.exec(&["nft", "list", "set", "inet", "spray", "seen"]);
        let rest = text.split_once(&format!("{address} counter packets ")).map(|(_, rest)| rest);
        rest.and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0)
    };
    cluster.firewall(&version(0));
    let pods = cluster.pods();
    let in_force = |number: u32| {
        eventually_ok(&format!("version {number}"), Duration::from_secs(20), || {
            let before = [seen(x), seen(y)];
            std::thread::sleep(Duration::from_millis(100));
            let moves = [seen(x) > before[0], seen(y) > before[1]];
            let wanted = [number & 1 == 0, number & 1 == 1];
            if moves == wanted { Ok(()) } else { Err(format!("[x, y] pass: {moves:?}")) }
        });
    };
    expect(&pods[0].netns, &[(WEB, SILENT)]);
    expect(&pods[1].netns, &[(WEB, SILENT)]);
    let to = [x, y, both, none].map(|address| endpoint(address, PORT));
    let to = to.each_ref().map(String::as_str);
    let sprays = pods.each_ref().map(|pod| pod.netns.spray(&to));
    in_force(0);
    for number in 1..=6 {
        cluster.firewall(&version(number));
        in_force(number);
    }
    let sent = sprays.map(lab::traffic::Spray::finish);
    let of = |address: &str| sent.iter().map(|sent| sent[address]).sum::<u64>();
    // What was sent last is on its way.
    eventually_ok("all that is always allowed arrives", LIMIT, || {
        let (got, sent) = (seen(both), of(both));
        if got == sent { Ok(()) } else { Err(format!("{got} of {sent}")) }
    });
    assert_eq!(seen(none), 0, "of {} that no version allows", of(none));
    // Every change took some of each: at any time just one of the two passes.
    assert!(seen(x) > 0 && seen(y) > 0 && seen(x) + seen(y) < 2 * of(x));
    // One of 8,000 changes.
    let mut rules = version(6);
    rules[0] = deny("198.18.1.0/24");
    cluster.firewall(&rules);
    let spray = pods[0].netns.spray(&to);
    eventually_ok("x stops", LIMIT, || {
        let before = seen(x);
        std::thread::sleep(Duration::from_millis(50));
        if seen(x) == before { Ok(()) } else { Err("x passes".to_owned()) }
    });
    drop(spray);
}

#[test]
fn a_person_finds_out_which_rule_decides() {
    let cluster = Cluster::new(LabSpec::default());
    let lab = &cluster.lab;
    cluster.firewall(&[
        allow("203.0.113.10/32").port("TCP", ECHO),
        deny("203.0.113.0/24"),
        allow("172.18.0.0/24"),
    ]);
    let pods = cluster.pods();
    let pod = &pods[0];
    expect_targets(&pod.netns, &[(tcp(WEB), OPEN), (udp(WEB), SILENT), (tcp(OTHER), SILENT)]);
    let bpffs = lab.bpffs("node-a");
    let bpffs = bpffs.to_str().expect("UTF-8");
    let trace = |destination: &str, protocol: &str| {
        let words =
            ["trace", &pod.full_name(), destination, "--protocol", protocol, "--bpffs", bpffs, "-o", "json"];
        lab.outgate("node-a", &words).expect_success()
    };
    for (destination, protocol, says) in [
        ("203.0.113.10:7777", "tcp", Some("egress[0]")),
        ("203.0.113.10:7777", "udp", Some("egress[1]")),
        ("203.0.113.20:80", "tcp", Some("egress[1]")),
        ("203.0.113.20", "icmp", Some("egress[1]")),
        ("172.18.0.12:80", "tcp", Some("egress[2]")),
        ("192.0.2.1:80", "tcp", None),
    ] {
        let text = trace(destination, protocol);
        match says {
            Some(rule) => assert!(text.contains(rule), "{destination} {protocol}: no {rule} in {text}"),
            None => assert!(!text.contains("egress["), "{text}"),
        }
        let denied = says == Some("egress[1]");
        assert_eq!(text.contains("FirewallDenied"), denied, "{destination} {protocol}: {text}");
    }
    let dev = cluster.pod("node-a", "dev");
    expect(&dev.netns, &[(OTHER, OPEN)]);

    // Counts: hits of each rule, and who was denied.
    let agent = &cluster.agents[0];
    let metrics = || -> Vec<String> {
        let all = agent.metrics();
        all.lines()
            .filter(|line| line.contains("firewall") && !line.starts_with('#'))
            .map(str::to_owned)
            .collect()
    };
    let denied = |lines: &[String]| -> f64 {
        let ours = lines.iter().filter(|line| line.contains("prod") && line.to_lowercase().contains("den"));
        ours.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    let before = metrics();
    assert_eq!(pod.netns.reach(&[&tcp(OTHER), &udp(OTHER)]), [SILENT, SILENT]);
    eventually_ok("metrics count denials", LIMIT, || {
        let now = metrics();
        if denied(&now) > denied(&before) { Ok(()) } else { Err(now.join("\n")) }
    });
    // The audit log: pod, destination and rule on one line.
    eventually_ok("the log names the denial", LIMIT, || {
        let log = agent.log();
        let found = log
            .lines()
            .any(|line| ["prod/node-a", "203.0.113.20", "egress[1]"].iter().all(|part| line.contains(part)));
        if found { Ok(()) } else { Err(log) }
    });
    status_says(lab, APPLIED, "prod");
    let status = lab.status().to_string();
    for node in ["node-a", "node-b"] {
        assert!(status.contains(&format!("{node}: {APPLIED}")), "{status}");
    }
}

/// No agent from the first packet on: rules are in force for pods of every age.
#[test]
fn both_families_of_a_pod_are_covered_over_a_network_of_ipv6() {
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
