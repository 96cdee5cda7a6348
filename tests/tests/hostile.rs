//! A pod that builds packets itself: none becomes a tunnel's, none leaves with another source.

use std::fs;
use std::time::Duration;

use lab::hostile::{Outside, hex_lines, ip_packet, octets};
use lab::packet::{self, Built, udp};
use lab::record::Recorder;
use lab::servers::ECHO;
use lab::service::{Front, Masquerade};
use lab::{Agent, Cni, Lab, LabSpec, Netns, Pod, PodSpec};

const EGRESS: &str = "172.18.0.101";
const TUNNEL: u16 = 4795;
/// Where forged packets go, which nobody else sends to.
const NOWHERE: u16 = 9999;
const LIMIT: Duration = Duration::from_secs(2);

struct Cluster {
    lab: Lab,
    _agents: Vec<Agent>,
    _servers: [lab::Process; 2],
    server: String,
    vni: u32,
}

/// Selected pods on every node, so that each leases ports; `node-b` holds the address.
fn cluster(cni: Cni, rp_filter: u8) -> (Cluster, Vec<Pod>) {
    let lab = Lab::with(&LabSpec::default().cni(cni).rp_filter(rp_filter));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let servers = [lab.echo(&lab.web.netns), lab.echo(&lab.neighbour.netns)];
    let server = format!("{}:{ECHO}", lab.web.address);
    let pods: Vec<_> =
        lab.nodes.iter().map(|node| lab.run_pod(&node.name, &PodSpec::new("prod", &node.name))).collect();
    for pod in &pods {
        lab.wait_source(&pod.netns, &server, EGRESS);
    }
    let text = fs::read_to_string(lab.objects.dir().join(".outgate/cluster.yaml")).expect("the tunnel");
    let vni = text.lines().find_map(|line| line.trim().strip_prefix("vni: ")?.parse().ok());
    let vni = vni.unwrap_or_else(|| panic!("no VNI in {text}"));
    (Cluster { lab, _agents: agents, _servers: servers, server, vni }, pods)
}

impl Cluster {
    /// What a peer's tunnel would bring: packets as the egress IP to another host outside, from ports all over the
    /// range, so that whoever's they are, some are; and answers to a flow of a pod.
    fn inner(&self, victim_port: u16) -> Vec<Vec<u8>> {
        let (egress, other) = (octets(EGRESS), octets(&self.lab.other.address));
        let mut inner: Vec<_> =
            (1024..=u16::MAX).step_by(64 * 60).map(|port| udp((egress, port), (other, NOWHERE))).collect();
        inner.push(udp((octets(&self.lab.web.address), ECHO), (egress, victim_port)));
        inner.iter().map(|packet| self.vxlan(packet)).collect()
    }

    /// RFC 7348, 5: a header of eight bytes, then the frame.
    fn vxlan(&self, inner: &Built) -> Vec<u8> {
        let [_, a, b, c] = self.vni.to_be_bytes();
        [&[8, 0, 0, 0, a, b, c, 0][..], &inner.frame()].concat()
    }
}

/// Data of a first fragment: a UDP header and more.
const FIRST: usize = 32;
const MORE_FRAGMENTS: u16 = 0x2000;

/// A UDP packet, whole or in two fragments of which the second has no ports.
fn outer(from: &str, to: &str, port: u16, data: &[u8], fragmented: bool) -> Vec<Vec<u8>> {
    let whole = udp((octets(from), 45_000), (octets(to), port)).payload(data);
    if !fragmented {
        return vec![ip_packet(&whole)];
    }
    let bytes = ip_packet(&whole).split_off(20);
    let piece = |bytes: &[u8], fragment: u16| {
        ip_packet(&packet::raw(octets(from), octets(to), 17, bytes).fragment(fragment))
    };
    vec![piece(&bytes[..FIRST], MORE_FRAGMENTS), piece(&bytes[FIRST..], (FIRST / 8) as u16)]
}

/// Tells packets apart that are in fragments: they are put together by their identification.
fn number(packets: &mut [Vec<u8>], identification: u16) {
    for packet in packets {
        packet[4..6].copy_from_slice(&identification.to_be_bytes());
        packet[10..12].fill(0);
        let sum: u32 = packet[..20].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// The tunnel's packets, sent by a pod in every way that leads to a node's tunnel port.
fn nothing_is_injected(cni: Cni, rp_filter: u8) {
    let (cluster, pods) = cluster(cni, rp_filter);
    let lab = &cluster.lab;
    let [a, b, c] = ["node-a", "node-b", "node-c"].map(|name| lab.node(name));
    let unselected = lab.run_pod("node-a", &PodSpec::new("dev", "unselected"));
    lab.wait_source(&unselected.netns, &cluster.server, &a.address);
    a.service(
        Front::Address("10.96.0.50", 80),
        "udp",
        &format!("{}:{TUNNEL}", b.address),
        Masquerade::Cluster,
    );
    c.service(Front::NodePort(30_000), "udp", &format!("{}:{TUNNEL}", b.address), Masquerade::Cluster);

    // The victim's flow is one of the node that the forged packets come to, or pass.
    let victim = &pods[1];
    let flow = victim.netns.udp_from(40_000, &cluster.server, LIMIT);
    flow.expect_all_from(1, EGRESS);
    let victim_port = u16::try_from(flow.port).expect("a port");
    let near = pods[0].netns.udp_from(40_000, &cluster.server, LIMIT);
    near.expect_all_from(1, EGRESS);
    let near_port = u16::try_from(near.port).expect("a port");
    let inside = [&pods[0], &pods[1]].map(|pod| Recorder::start(&pod.netns));
    let outside = Outside::watch(lab);
    let inner = [cluster.inner(victim_port), cluster.inner(near_port)].concat();
    let arrived = || {
        let answers = inside.each_ref().map(|r| r.sources("udp").get(&lab.web.address).copied().unwrap_or(0));
        let out = outside.to_others(EGRESS);
        inside.iter().for_each(Recorder::reset);
        outside.reset();
        (out, answers[0], answers[1])
    };

    // A node may do so itself, and is believed: what follows would be seen.
    let script = format!(
        "import socket, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         for line in sys.stdin: s.sendto(bytes.fromhex(line), ('{}', {TUNNEL}))",
        b.address
    );
    let _ = a.netns.exec_input(&["python3", "-c", &script], &[], &hex_lines(&inner)).expect_success();
    let (out, _, answered) = lab::eventually_ok("a node's own packets", LIMIT, || match arrived() {
        (0, ..) => Err("nothing is forwarded".to_owned()),
        some => Ok(some),
    });
    assert!(out > 0 && answered <= 1, "{out} {answered}");

    let gateway = format!("{}.1", a.pod_prefix);
    let ways = [
        ("another node", &*b.address, TUNNEL),
        ("another node by a service", "10.96.0.50", 80),
        ("another node by a node port of a third", &*c.address, 30_000),
        ("its own node", &*a.address, TUNNEL),
        ("its router", &*gateway, TUNNEL),
    ];
    let variants = [(false, false), (false, true), (true, false), (true, true)];
    let mut injected = Vec::new();
    for (forger, what) in [(&pods[0], "a selected pod"), (&unselected, "an unselected pod")] {
        for (way, to, port) in ways {
            let tried = |variants: &[(bool, bool)]| {
                let mut packets = Vec::new();
                for (fragmented, as_node) in variants {
                    let source = if *as_node { &b.address } else { &forger.ip };
                    for data in &inner {
                        let mut parts = outer(source, to, port, data, *fragmented);
                        number(&mut parts, 1 + packets.len() as u16);
                        packets.extend(parts);
                    }
                }
                let _ = arrived();
                forger.netns.send_ip(&packets);
                // Behind them, by the same way.
                pods[0].netns.tcp(&cluster.server, 1, 1).expect_all_from(1, EGRESS);
                arrived()
            };
            if tried(&variants) == (0, 0, 0) {
                continue;
            }
            for (fragmented, as_node) in variants {
                // Also those that show nothing by themselves: something did.
                let (out, near, far) = tried(&[(fragmented, as_node)]);
                injected.push(format!(
                    "{what} to {way}, fragmented: {fragmented}, as another node: {as_node}: \
                     {out} forwarded, {near} and {far} delivered"
                ));
            }
        }
    }
    assert_eq!(injected, Vec::<String>::new(), "{cni:?}, rp_filter {rp_filter}");
    let refused = ["node-a", "node-b", "node-c"].map(|node| lab.drops(node));
    let sum = |reason: &str| refused.iter().filter_map(|drops| drops.get(reason)).sum::<u64>();
    assert!(sum("TunnelForged") > 0, "{refused:?}");
}

#[test]
fn ptp_pods_inject_nothing_into_the_tunnel() {
    nothing_is_injected(Cni::Ptp, 1);
}

#[test]
fn ptp_pods_inject_nothing_where_no_reverse_path_is_asked_for() {
    nothing_is_injected(Cni::Ptp, 0);
}

#[test]
fn bridge_pods_inject_nothing_into_the_tunnel() {
    nothing_is_injected(Cni::Bridge, 1);
}

/// Packets of one flow, each with one thing that is wrong or rare.
fn rarities(from: ([u8; 4], u16), to: ([u8; 4], u16), detour: [u8; 4]) -> Vec<Vec<u8>> {
    let plain = || udp(from, to);
    let option = |bytes: &[u8]| ip_packet(&plain().ip_options(bytes));
    let bent = |at: usize, bytes: &[u8]| {
        let mut packet = ip_packet(&plain());
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        let mut one = [packet];
        let identification = u16::from_be_bytes([one[0][4], one[0][5]]);
        if at != 10 {
            number(&mut one, identification);
        }
        let [packet] = one;
        packet
    };
    let [a, b, c, d] = detour;
    let raw = |protocol: u8, bytes: &[u8]| ip_packet(&packet::raw(from.0, to.0, protocol, bytes));
    let tcp = |flags: u8| ip_packet(&packet::tcp(from, to, flags));
    let inner = ip_packet(&udp((octets("198.51.100.7"), 1), to));
    vec![
        // Record route.
        option(&[7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        // Loose source route.
        option(&[0x83, 7, 4, a, b, c, d, 0]),
        // Strict source route.
        option(&[0x89, 7, 4, a, b, c, d, 0]),
        // Timestamps.
        option(&[0x44, 8, 5, 0, 0, 0, 0, 0]),
        // Router alert.
        option(&[0x94, 4, 0, 0]),
        // No operation.
        option(&[1, 1, 1, 1]),
        // An option of no length.
        option(&[7, 0, 0, 0]),
        // An option past the header.
        option(&[7, 40, 4, 0]),
        // An unknown option.
        option(&[0xde, 4, 0, 0]),
        // Version 6.
        bent(0, &[0x65]),
        // A header of 16 bytes.
        bent(0, &[0x44]),
        // A header of 60 bytes.
        bent(0, &[0x4f]),
        // A total length of 0.
        bent(2, &[0, 0]),
        // A total length of 19.
        bent(2, &[0, 19]),
        // A total length of 24.
        bent(2, &[0, 24]),
        // A total length past the end.
        bent(2, &[5, 0]),
        // A wrong header checksum.
        bent(10, &[0x12, 0x34]),
        // Time to live 0.
        bent(8, &[0]),
        // The reserved flag.
        bent(6, &[0x80]),
        // A last fragment far out.
        bent(6, &[0x1f, 0xff]),
        // A short UDP length.
        bent(24, &[0, 4]),
        // A long UDP length.
        bent(24, &[0xff, 0xff]),
        // UDP port 0.
        bent(20, &[0, 0]),
        // TCP without flags.
        tcp(0),
        // TCP with every flag.
        tcp(0xff),
        // SYN and FIN.
        tcp(3),
        // SYN and RST.
        tcp(6),
        // RST.
        tcp(4),
        // TCP of 12 bytes.
        raw(6, &[0; 12]),
        // An IP packet in it.
        raw(4, &inner),
        // GRE.
        raw(47, &[&[0, 0, 8, 0][..], &inner].concat()),
        // ESP.
        raw(50, &[7; 32]),
        // SCTP.
        raw(132, &[&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), &[0; 24]].concat()),
        // Protocol 255.
        raw(255, &[1; 24]),
        // IGMP.
        raw(2, &[0x16, 0, 0, 0, 224, 0, 0, 9]),
        // An ICMP timestamp.
        ip_packet(&packet::icmp(from.0, to.0, 13, 7)),
        // An ICMP redirect.
        raw(1, &[&[5, 1, 0, 0, a, b, c, d][..], &ip_packet(&udp(to, from))].concat()),
        // An ICMP error about nothing.
        raw(1, &[&[3, 3, 0, 0, 0, 0, 0, 0][..], &[0; 28]].concat()),
        // An ICMP error about another's flow.
        raw(1, &[&[3, 3, 0, 0, 0, 0, 0, 0][..], &inner].concat()),
        // A short ICMP packet.
        raw(1, &[8, 0, 0]),
        // An unasked echo reply.
        ip_packet(&packet::icmp(from.0, to.0, 0, 7)),
    ]
}

/// What the router gets that a node's kernel would not have let pass.
struct Forbidden<'a>(&'a Netns);

impl<'a> Forbidden<'a> {
    fn watch(router: &'a Netns) -> Self {
        let rules = "table ip forbidden {
            chain in {
                type filter hook prerouting priority -350;
                ip option lsrr exists counter
                ip option ssrr exists counter
            }
        }";
        let _ = router.exec_input(&["nft", "-f", "-"], &[], rules).expect_success();
        Self(router)
    }

    #[track_caller]
    fn expect_none(&self) {
        let text = self.0.exec(&["nft", "list", "table", "ip", "forbidden"]);
        assert_eq!(text.matches("counter packets 0").count(), 2, "source routes left the node: {text}");
    }
}

/// Dropped, or passed as the kernel would; never with another source; and all goes on working.
fn rare_packets(cni: Cni, holder: &str) {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni).rp_filter(0));
    lab.describe_cluster(&[holder]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), holder);
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &server, EGRESS);
    let outside = Outside::watch(&lab);
    let forbidden = Forbidden::watch(&lab.router);
    // One of the rarities has a wrong header checksum. It stays wrong, for the next host to refuse.
    lab.tolerate("IpExt InCsumErrors");
    let (from, to) = ((octets(&pod.ip), 40_000), (octets(&lab.web.address), ECHO));
    // Once in a flow that is known, which skips the host's stack, and once in one that is not.
    for known in [true, false] {
        if known {
            pod.netns.udp_from(from.1, &server, LIMIT).expect_all_from(1, EGRESS);
        }
        let from = if known { from } else { (from.0, 40_001) };
        pod.netns.send_ip(&rarities(from, to, octets(&lab.other.address)));
        pod.netns.tcp(&server, 5, 1).expect_all_from(5, EGRESS);
        pod.netns.udp(&server, 5).expect_all_from(5, EGRESS);
        assert_eq!(pod.netns.ping(&lab.web.address, 3, "0.01"), 3);
        outside.expect_at_most(&[EGRESS]);
    }
    let drops = lab.drops("node-a");
    for reason in ["Protocol", "IcmpType", "Malformed"] {
        assert!(drops.contains_key(reason), "{reason}: {drops:?}");
    }
    forbidden.expect_none();
}

#[test]
fn rare_packets_of_a_ptp_pod_leave_with_no_other_source() {
    rare_packets(Cni::Ptp, "node-b");
}

#[test]
fn rare_packets_of_a_bridge_pod_on_the_holder_leave_with_no_other_source() {
    rare_packets(Cni::Bridge, "node-a");
}
