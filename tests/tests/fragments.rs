//! Sizes: fragments both ways, paths of every MTU, and who is told what when a packet does not fit.
//!
//! Every test is run with the pod on another node than the gateway, through the tunnel, which takes 50 bytes of
//! the nodes' MTU (70 over IPv6), and on the gateway itself.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Agent, Cni, Family, Lab, LabSpec, Pod, PodSpec, Process, endpoint, eventually_ok};

/// Both nodes hold addresses of neither family before this.
fn start(lab: &Lab, family: Family) -> Vec<Agent> {
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[family.egress()], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(family.egress()), "node-b");
    agents
}

/// A lab whose pods leave by the family's egress IP, held by `node-b`.
fn cluster(spec: LabSpec, family: Family) -> (Lab, Vec<Agent>) {
    let spec = spec.nodes(2);
    let lab = Lab::with(&if family == Family::V6 { spec.dual_stack() } else { spec });
    let agents = start(&lab, family);
    (lab, agents)
}

/// The pods of a test: through another node's gateway, and through their own node's.
fn pods(lab: &Lab, family: Family) -> [Pod; 2] {
    let pods = ["node-a", "node-b"].map(|node| lab.run_pod(node, &PodSpec::new("prod", node)));
    for pod in &pods {
        lab.wait_source(&pod.netns, &endpoint(lab.web.address_of(family), ECHO), family.egress());
    }
    pods
}

/// Datagrams and pings in fragments arrive, are answered in fragments, and carry the data that was sent.
#[track_caller]
fn large_datagrams_work(lab: &Lab, pod: &Pod, family: Family) {
    let web = lab.web.address_of(family);
    let (server, egress) = (endpoint(web, ECHO), family.egress());
    // What may not be fragmented on its way and does not fit is lost once, for the pod to learn the path's MTU.
    let learn = |size: u32| {
        eventually_ok("the pod learns the path's MTU", Duration::from_secs(10), || {
            let report = pod.netns.udp_sized(&server, size, 1, false);
            if report.ok == 1 { Ok(()) } else { Err(format!("{report:?}")) }
        });
    };
    // IPv6 routers never fragment. An IPv4 pod does not ask them not to, of a datagram that it fragments itself:
    // the first packet of each flow is in fragments here, and so are later ones.
    if family == Family::V6 {
        learn(9000);
    }
    let recorder = Recorder::start(&lab.web.netns);
    pod.netns.udp_sized(&server, 9000, 10, false).expect_all_from(10, egress);
    pod.netns.udp_sized(&server, 9000, 10, true).expect_all_from(10, egress);
    // Around what fits a packet, which neither the pod nor the server lets routers fragment; and about the largest
    // there is.
    for size in [1444, 1472, 1473, 2000, 60_000] {
        learn(size);
        pod.netns.udp_sized(&server, size, 2, true).expect_all_from(2, egress);
    }
    assert_eq!(pod.netns.ping_sized(web, 3000, 5, "0.01"), 5);
    // Small ones in between are of the same flow's kind, and still go.
    pod.netns.udp(&server, 5).expect_all_from(5, egress);
    recorder.expect_only("udp", &[egress]);
    // The router has its say to the server about what does not fit the nodes' network.
    recorder.expect_none_but(&[egress, ["203.0.113.1", "2001:db8:203::1"][family as usize]]);
    // Answers came in fragments too, or this test would show nothing.
    assert!(pod.netns.snmp("Ip", "ReasmOKs") > 0 || family == Family::V6);
}

fn fragments_pass_both_ways(cni: Cni, family: Family) {
    let (lab, _agents) = cluster(LabSpec::default().cni(cni), family);
    let _echo = lab.echo(&lab.web.netns);
    for pod in pods(&lab, family) {
        large_datagrams_work(&lab, &pod, family);
    }
}

#[test]
fn ipv4_fragments_of_ptp_pods_pass_both_ways() {
    fragments_pass_both_ways(Cni::Ptp, Family::V4);
}

#[test]
fn ipv4_fragments_of_bridge_pods_pass_both_ways() {
    fragments_pass_both_ways(Cni::Bridge, Family::V4);
}

#[test]
fn ipv6_fragments_of_ptp_pods_pass_both_ways() {
    fragments_pass_both_ways(Cni::Ptp, Family::V6);
}

#[test]
fn ipv6_fragments_of_bridge_pods_pass_both_ways() {
    fragments_pass_both_ways(Cni::Bridge, Family::V6);
}

#[test]
fn ipv6_fragments_pass_a_tunnel_over_ipv6_both_ways() {
    let (lab, _agents) = cluster(LabSpec::default().ipv6_only_underlay(), Family::V6);
    let _echo = lab.echo(&lab.web.netns);
    for pod in pods(&lab, Family::V6) {
        large_datagrams_work(&lab, &pod, Family::V6);
    }
}

/// Second parts of datagrams whose first was never there: 20 of them, then three whole datagrams.
#[track_caller]
fn later_fragments(lab: &Lab, pod: &Pod, recorder: &Recorder) {
    let send = "import socket, struct, sys
source, destination = map(socket.inet_aton, sys.argv[1:3])
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
for number in range(20):
    # The last part, 1480 bytes into a datagram; the kernel fills in the checksum.
    header = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 220, 4000 + number, 185, 64, 17, 0, source, destination)
    s.sendto(header + b'x' * 200, (sys.argv[2], 0))";
    let egress = Family::V4.egress();
    recorder.reset();
    pod.exec(&["python3", "-c", send, &pod.ip, &lab.web.address]);
    // What is sent after them has overtaken nothing when it is answered.
    pod.netns.udp(&endpoint(&lab.web.address, ECHO), 3).expect_all_from(3, egress);
    recorder.expect_none_but(&[egress]);
    assert_eq!(recorder.sources("udp")[egress], 3, "three requests, and none of the twenty");
}

/// A fragment's later parts carry no ports: without their first, nothing says whose they are.
#[test]
fn fragments_without_a_first_one_go_nowhere() {
    let (lab, _agents) = cluster(LabSpec::default(), Family::V4);
    let _echo = lab.echo(&lab.web.netns);
    let recorder = Recorder::start(&lab.web.netns);
    for pod in pods(&lab, Family::V4) {
        later_fragments(&lab, &pod, &recorder);
    }
}

/// Everything of every size with other MTUs than 1500 between the nodes.
fn an_mtu_of(mtu: u32, family: Family) {
    let (lab, _agents) = cluster(LabSpec::default().mtu(mtu), family);
    let _servers = [lab.echo(&lab.web.netns), lab.iperf(&lab.web.netns)];
    for pod in pods(&lab, family) {
        large_datagrams_work(&lab, &pod, family);
        bulk(&lab, &pod, family);
    }
}

/// TCP in segments as large as they may be, both ways, from the very first on.
#[track_caller]
fn bulk(lab: &Lab, pod: &Pod, family: Family) {
    let recorder = Recorder::start(&lab.web.netns);
    for way in [&["-R"][..], &[]] {
        let words = ["timeout", "30", "iperf3", family.option(), "-c", lab.web.address_of(family)];
        let json = pod.exec(&[&words[..], &["-n", "20M", "-J"], way].concat());
        assert!(!json.contains("\"error\""), "{json}");
    }
    recorder.expect_only("tcp", &[family.egress()]);
}

#[test]
fn an_mtu_of_1450_carries_ipv4() {
    an_mtu_of(1450, Family::V4);
}

#[test]
fn an_mtu_of_1450_carries_ipv6() {
    an_mtu_of(1450, Family::V6);
}

#[test]
fn an_mtu_of_9000_carries_ipv4() {
    an_mtu_of(9000, Family::V4);
}

#[test]
fn an_mtu_of_9000_carries_ipv6() {
    an_mtu_of(9000, Family::V6);
}

/// With `ping -M do`: what it printed, of both outputs.
fn ping_unfragmented(pod: &Pod, destination: &str, size: u32) -> String {
    let size = size.to_string();
    let words = ["ping", "-n", "-c", "3", "-i", "0.2", "-W", "1", "-M", "do", "-s", &size, destination];
    let output = pod.try_exec(&words);
    format!("{}{}", output.stdout, output.stderr)
}

/// A packet that may not be fragmented and does not fit the tunnel is answered with the tunnel's MTU, on the
/// gateway itself as well: the address may move to another node. One that fits passes.
fn the_pod_is_told_the_mtu(spec: LabSpec, family: Family, tunnel: u32) {
    let (lab, _agents) = cluster(spec, family);
    let _echo = lab.echo(&lab.web.netns);
    let web = lab.web.address_of(family);
    let headers = family.header() + 8;
    for pod in pods(&lab, family) {
        let said = ping_unfragmented(&pod, web, tunnel - headers);
        assert!(said.contains(" 3 received"), "{said}");
        let said = ping_unfragmented(&pod, web, 1500 - headers);
        // From an address of the node that the pod is on.
        let router = lab.node(&pod.node).address_of(family);
        let answer = match family {
            Family::V4 => format!("From {router} icmp_seq=1 Frag needed and DF set (mtu = {tunnel})"),
            Family::V6 => format!("From {router} icmp_seq=1 Packet too big: mtu={tunnel}"),
        };
        assert!(said.contains(&answer), "not '{answer}': {said}");
        // From the second on the pod's own kernel knows.
        let knows = ["mtu=", "mtu: "].iter().any(|text| said.contains(&format!("too long, {text}{tunnel}")));
        assert!(knows, "{said}");
        let route = pod.exec(&["ip", "route", "get", web]);
        assert!(route.contains(&format!("mtu {tunnel} ")), "{route}");
    }
}

#[test]
fn a_pod_is_told_that_ipv4_does_not_fit_the_tunnel() {
    the_pod_is_told_the_mtu(LabSpec::default(), Family::V4, 1450);
}

#[test]
fn a_pod_is_told_that_ipv6_does_not_fit_the_tunnel() {
    // Over IPv4, as long as every node has an IPv4 address.
    the_pod_is_told_the_mtu(LabSpec::default(), Family::V6, 1450);
}

#[test]
fn a_pod_is_told_that_ipv6_does_not_fit_the_tunnel_over_ipv6() {
    the_pod_is_told_the_mtu(LabSpec::default().ipv6_only_underlay(), Family::V6, 1430);
}

/// What an operator does against ICMP, and breaks path-MTU discovery by it.
fn ignore_icmp(lab: &Lab, family: Family) {
    let rule = match family {
        Family::V4 => "ip protocol icmp drop",
        // Neighbours are still found.
        Family::V6 => "icmpv6 type { 1-4, 128, 129 } drop",
    };
    let rules = format!(
        "table inet deaf {{
            chain in {{
                type filter hook prerouting priority -400;
                {rule}
            }}
        }}"
    );
    let _ = lab.web.netns.exec_input(&["nft", "-f", "-"], &[], &rules).expect_success();
}

/// TCP with a server that ignores ICMP: no segment of it is larger than the tunnel carries, from the first on.
fn tcp_needs_no_icmp(family: Family) {
    let (lab, _agents) = cluster(LabSpec::default(), family);
    let _servers = [lab.echo(&lab.web.netns), lab.iperf(&lab.web.netns)];
    ignore_icmp(&lab, family);
    for pod in pods(&lab, family) {
        bulk(&lab, &pod, family);
    }
}

#[test]
fn tcp_needs_no_icmp_over_ipv4() {
    tcp_needs_no_icmp(Family::V4);
}

#[test]
fn tcp_needs_no_icmp_over_ipv6() {
    tcp_needs_no_icmp(Family::V6);
}

/// A server that sends datagrams as large as its link carries, not to be fragmented, whatever ICMP says.
fn stubborn_server(lab: &Lab, family: Family) -> Process {
    // IP_MTU_DISCOVER is 10, IPV6_MTU_DISCOVER 23, and IP_PMTUDISC_PROBE 3 (linux/in.h): "don't fragment", and
    // never believe a smaller MTU.
    let program = "import socket, sys
v6 = sys.argv[1] == '-6'
s = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP, 23 if v6 else 10, 3)
s.bind(('', 7778))
print('ready', flush=True)
while True:
    size, client = s.recvfrom(100)
    s.sendto(bytes(n % 251 for n in range(int(size))), client)";
    let mut process =
        lab.web.netns.spawn("stubborn", &["python3", "-u", "-c", program, family.option()], &[]);
    process.wait_stdout("ready", Duration::from_secs(10));
    process
}

/// A pod asks the [`stubborn_server`] for answers in packets of every interesting size.
#[track_caller]
fn ask_all(lab: &Lab, pod: &Pod, family: Family) {
    let ask = "import socket, sys
web, size = sys.argv[1], int(sys.argv[2])
s = socket.socket(socket.AF_INET6 if ':' in web else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(2)
for _ in range(5):
    s.sendto(str(size).encode(), (web, 7778))
    assert s.recv(2000) == bytes(n % 251 for n in range(size))
print('all')";
    for packet in [1400, 1450, 1451, 1500] {
        let size = (packet - family.header() - 8).to_string();
        let output = pod.try_exec(&["python3", "-c", ask, lab.web.address_of(family), &size]);
        assert_eq!(output.stdout.trim(), "all", "{packet} bytes: {}", output.explain());
    }
}

/// Answers from outside of up to the uplink's MTU reach a pod behind the tunnel, if need be in two outer parts.
fn answers_that_fill_the_uplink_arrive(family: Family) {
    let (lab, _agents) = cluster(LabSpec::default(), family);
    let _servers = [lab.echo(&lab.web.netns), stubborn_server(&lab, family)];
    for pod in pods(&lab, family) {
        ask_all(&lab, &pod, family);
    }
}

#[test]
fn ipv4_answers_that_fill_the_uplink_arrive() {
    answers_that_fill_the_uplink_arrive(Family::V4);
}

#[test]
fn ipv6_answers_that_fill_the_uplink_arrive() {
    answers_that_fill_the_uplink_arrive(Family::V6);
}
