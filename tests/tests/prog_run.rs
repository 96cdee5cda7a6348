//! Fixtures: packets described, run through the loaded programs, and compared with the packets and verdicts
//! that are expected. Every expected packet is built, with its checksums, from nothing.

use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use datapath::addr::Ip;
use datapath::conntrack::FlowState;
use datapath::keys::{
    Delivery, DeliveryMode, EgressIp, GranuleRange, GranuleTable, Interface, InterfaceKind, Lease,
    NetworkKey, NetworkKind, Node, Pod, Policy, ReplyKey, Settings,
};
use datapath::memory::Memory;
use datapath::packet::{ACK, FIN, SYN};
use datapath::verdict::DropReason;
use lab::kernel::{
    Input, Kernel, Observed, Output, Program, Tunnel, Verdict, enter_node_network,
    interfaces::{OTHER_POD as OTHER_IF, POD as POD_IF, PORT, SECOND_UPLINK, TUNNEL, UPLINK},
};
use lab::packet::{Built, Transport, arp, icmp, raw, tcp, udp, verify_checksums};

const POD: [u8; 4] = [10, 244, 1, 10];
const OTHER_POD: [u8; 4] = [10, 244, 1, 11];
const REMOTE_POD: [u8; 4] = [10, 244, 2, 10];
const SERVICE: [u8; 4] = [10, 96, 0, 10];
const NODE_A: [u8; 4] = [172, 18, 0, 11];
const NODE_B: [u8; 4] = [172, 18, 0, 12];
const EGRESS: [u8; 4] = [172, 18, 0, 100];
/// An egress IP of the second uplink's network, held by A.
const SECOND_EGRESS: [u8; 4] = [192, 0, 2, 100];
const SERVER: [u8; 4] = [203, 0, 113, 5];
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0xa, 2];

const A: u16 = 1;
const B: u16 = 2;
const VNI: u32 = 4711;
const PASS: u32 = 0xfeed_f00d;
const MARK: u32 = 0x77;
/// Where the host's masquerade put a packet.
const MASQUERADE: u16 = 61000;

/// Node A: `POD` is selected, `OTHER_POD` is not; `EGRESS` is held by `holder`; A leases granule 0, B
/// granule 10.
fn tables(holder: u16) -> Memory {
    let mut t = Memory::new(1, 64);
    t.settings = Settings {
        node: A,
        tunnel_port: 4795,
        tunnel_vni: VNI,
        tunnel_ifindex: TUNNEL,
        mtu: 1450,
        pass_token: PASS,
        hold_unknown: 1,
        spread: 1,
        tcp_established: 7440,
        tcp_transitory: 240,
        udp: 300,
        icmp: 60,
        rest: 65,
        ..Settings::default()
    };
    for (ip, id, policy, ifindex) in [(POD, 1, 1, POD_IF), (OTHER_POD, 2, 0, OTHER_IF)] {
        let ip = Ip::v4(ip);
        t.pods.insert(ip, Pod { id, policy, ifindex, pad: 0 });
        let mode = DeliveryMode::Peer as u8;
        t.delivery.insert(id, Delivery { ip, ifindex, mode, ..Delivery::default() });
    }
    for (ifindex, kind, guarded, mac) in [
        (POD_IF, InterfaceKind::Pod, 1, [0; 6]),
        (OTHER_IF, InterfaceKind::Pod, 0, [0; 6]),
        (UPLINK, InterfaceKind::Uplink, 0, UPLINK_MAC),
        (SECOND_UPLINK, InterfaceKind::Uplink, 0, [2; 6]),
    ] {
        t.interfaces.insert(ifindex, Interface { kind: kind as u8, guarded, mac, bridge: 0 });
    }
    for (ip, len, kind) in [
        ([10, 244, 0, 0], 16, NetworkKind::Pods),
        ([10, 96, 0, 0], 16, NetworkKind::Services),
        (NODE_A, 32, NetworkKind::Node),
        (NODE_B, 32, NetworkKind::Node),
    ] {
        t.networks.insert(NetworkKey { prefix_len: 96 + len, ip: Ip::v4(ip) }, kind as u32);
    }
    for (id, ip) in [(A, NODE_A), (B, NODE_B)] {
        t.nodes.insert(id, Node { tunnel_ip: Ip::v4(ip) });
    }
    for (id, ip, uplink, holder) in [(1, EGRESS, UPLINK, holder), (2, SECOND_EGRESS, SECOND_UPLINK, A)] {
        let ip = Ip::v4(ip);
        t.egress_addrs.insert(ip, id);
        t.egress_ips.insert(id, EgressIp { ip, policy: 1, uplink, holder, ..EgressIp::default() });
        let mut table = GranuleTable::default();
        (table.node[0], table.node[10]) = (A, B);
        t.granules.insert(id, table);
        let lease = Lease::of(&[GranuleRange { first: 0, count: 1 }]);
        t.leases.insert(id, lease);
    }
    let mut policy = Policy { len: 1, ..Policy::default() };
    policy.egress[0] = 1;
    t.policies.insert(1, policy);
    t
}

/// Loaded once: the verifier takes a second for it. Each test has its own tables, and its turn.
static KERNEL: LazyLock<Mutex<Kernel>> = LazyLock::new(|| Mutex::new(Kernel::load(64)));

/// A kernel with these tables, on a node's interfaces.
struct Rig {
    kernel: MutexGuard<'static, Kernel>,
}

/// What became of a packet, and the one counter that says why it was dropped.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Next(Vec<u8>),
    Redirect(Vec<u8>),
    Drop(DropReason),
}

impl Rig {
    fn new(tables: &Memory) -> Self {
        enter_node_network();
        let mut kernel = KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
        kernel.write(tables);
        Self { kernel }
    }

    /// Runs a program. What it redirects has no mark any more, what it passes keeps it.
    fn fate(&mut self, program: Program, input: &Input) -> Fate {
        let before = self.kernel.drops();
        let (verdict, Output { frame, mark }) = self.kernel.run(program, input);
        let after = self.kernel.drops();
        let drops: Vec<DropReason> = DropReason::ALL
            .iter()
            .copied()
            .filter(|reason| {
                let (old, new) = (before[*reason as usize], after[*reason as usize]);
                if old != new {
                    assert_eq!(new.packets, old.packets + 1);
                    assert_eq!(new.bytes, old.bytes + input.frame.len() as u64);
                }
                old != new
            })
            .collect();
        match (verdict, drops.is_empty()) {
            (Verdict::Next, true) => {
                assert_eq!(mark, input.mark);
                Fate::Next(frame)
            }
            (Verdict::Redirect, true) => {
                let answered = frame[12..14] == [8, 6]; // ARP
                assert_eq!(mark, if answered { input.mark } else { 0 });
                Fate::Redirect(frame)
            }
            (Verdict::Drop, false) if drops.len() == 1 => Fate::Drop(drops[0]),
            other => panic!("{other:?}, counted as {drops:?}"),
        }
    }

    fn observe(&mut self, program: Program, input: &Input) -> Observed {
        self.kernel.observe(program, input).0
    }

    /// The only token there is.
    fn token(&self) -> u32 {
        let tokens = self.kernel.state().tokens;
        assert_eq!(tokens.len(), 1, "{tokens:?}");
        *tokens.keys().next().expect("there is one")
    }

    /// The packet walks up and meets the uplink as `at_uplink`; gives what became of it there.
    fn walk_up(&mut self, sent: &Built, at_uplink: &Built) -> Fate {
        assert_eq!(self.fate(Program::FromPod, &from_pod(sent)), Fate::Next(sent.frame()));
        let hash = self.token();
        let fate = self.fate(Program::ToUplink, &Input { hash, ..to_uplink(at_uplink) });
        assert!(self.kernel.state().tokens.is_empty(), "a token serves once");
        fate
    }

    /// The port of the only flow.
    fn port(&self) -> u16 {
        let state = self.kernel.state();
        assert_eq!((state.flows.len(), state.replies.len()), (1, 1), "{state:?}");
        let port = state.flows.values().next().expect("there is one").egress_port;
        assert!((1024..1088).contains(&port), "{port} is not of the lease");
        assert_eq!(state.replies.keys().next().expect("there is one").egress_port, port);
        port
    }
}

fn input(ifindex: u32, packet: &Built) -> Input {
    Input { frame: packet.frame(), ifindex, mark: MARK, ..Input::default() }
}

fn from_pod(packet: &Built) -> Input {
    input(POD_IF, packet)
}

fn to_uplink(packet: &Built) -> Input {
    Input { ingress: POD_IF, ..input(UPLINK, packet) }
}

fn from_uplink(packet: &Built) -> Input {
    input(UPLINK, packet)
}

/// From the other node.
fn from_tunnel(packet: &Built) -> Input {
    Input { tunnel: Some((Ip::v4(NODE_B), VNI)), ..input(TUNNEL, packet) }
}

fn redirected(packet: &Built) -> Fate {
    let frame = packet.frame();
    verify_checksums(&frame).expect("the expected packet is right");
    Fate::Redirect(frame)
}

/// One packet of a connection, by its ends: how a protocol builds it.
type Build = fn(([u8; 4], u16), ([u8; 4], u16)) -> Built;

/// What each protocol sends first, later, and back; what the outside's port is.
const PROTOCOLS: [(&str, [Build; 3], u16); 3] = [
    ("tcp", [|f, t| tcp(f, t, SYN), |f, t| tcp(f, t, ACK).payload(b"get"), |f, t| tcp(f, t, SYN | ACK)], 80),
    ("udp", [udp, |f, t| udp(f, t).payload(b"more"), |f, t| udp(f, t).payload(b"answer")], 53),
    (
        "icmp",
        [
            |f, t| icmp(f.0, t.0, 8, f.1),
            |f, t| icmp(f.0, t.0, 8, f.1).payload(b"xyz"),
            |f, t| icmp(f.0, t.0, 0, t.1),
        ],
        0,
    ),
];

#[test]
fn a_connection_through_the_tunnel_and_back() {
    let mut rig = Rig::new(&tables(B));
    for (protocol, [first, later, back], remote_port) in PROTOCOLS {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((POD, 40000), (SERVER, remote_port));
        let up = rig.walk_up(&first(pod, server), &first((NODE_A, MASQUERADE), server));
        let port = rig.port();
        assert_eq!(up, redirected(&first((EGRESS, port), server)), "{protocol}");

        let next = from_pod(&later(pod, server));
        assert_eq!(rig.fate(Program::FromPod, &next), redirected(&later((EGRESS, port), server).hop()));
        // The tunnel is told the holder; no hash is left that a token could be taken for.
        let tunnel = Tunnel { source: Ip::v4(NODE_A), destination: Ip::v4(NODE_B), vni: VNI };
        let input = Input { hash: 5, ..next };
        assert_eq!(rig.observe(Program::FromPod, &input), Observed { hash: 0, tunnel: Some(tunnel) });

        let reply = from_tunnel(&back(server, (EGRESS, port)));
        assert_eq!(rig.fate(Program::FromTunnel, &reply), redirected(&back(server, pod).hop()), "{protocol}");
        let flow = *rig.kernel.state().flows.values().next().expect("there is one");
        assert_eq!((flow.packets, flow.state), (3, FlowState::Established as u8));
    }
}

#[test]
fn a_connection_of_the_holders_own_pod() {
    let mut rig = Rig::new(&tables(A));
    for (protocol, [first, later, back], remote_port) in PROTOCOLS {
        rig.kernel.write(&tables(A));
        let (pod, server) = ((POD, 40000), (SERVER, remote_port));
        let up = rig.walk_up(&first(pod, server), &first(pod, server));
        let port = rig.port();
        assert_eq!(up, Fate::Next(first((EGRESS, port), server).frame()), "{protocol}: it is on its uplink");
        let next = from_pod(&later(pod, server));
        assert_eq!(rig.fate(Program::FromPod, &next), redirected(&later((EGRESS, port), server).hop()));
        let reply = from_uplink(&back(server, (EGRESS, port)));
        assert_eq!(rig.fate(Program::FromUplink, &reply), redirected(&back(server, pod).hop()), "{protocol}");
    }
}

#[test]
fn marks_that_from_pod_leaves() {
    let mut rig = Rig::new(&tables(B));
    let pod = (POD, 40000);
    let hash_after = |rig: &mut Rig, packet: &Built| {
        rig.observe(Program::FromPod, &Input { hash: 99, ..from_pod(packet) }).hash
    };
    let identified = hash_after(&mut rig, &tcp(pod, (SERVER, 80), SYN));
    assert_eq!(identified, rig.token());
    assert_eq!(hash_after(&mut rig, &tcp(pod, (REMOTE_POD, 80), SYN)), 0, "stays inside");
    // A connection from outside is noted on its way in; its answers carry the pass token.
    let came = input(POD_IF, &tcp((SERVER, 3333), (POD, 8080), SYN));
    assert_eq!(rig.fate(Program::ToPod, &came), Fate::Next(came.frame.clone()));
    assert_eq!(hash_after(&mut rig, &tcp((POD, 8080), (SERVER, 3333), SYN | ACK)), PASS);
    let not_ours = Input { hash: 99, ..input(OTHER_IF, &tcp((OTHER_POD, 1), (SERVER, 80), SYN)) };
    assert_eq!(rig.observe(Program::FromPod, &not_ours).hash, 99, "untouched");
    // At the uplink the pass token is taken off.
    let passed = Input { hash: PASS, ..to_uplink(&tcp((NODE_A, 1), (SERVER, 3333), ACK)) };
    assert_eq!(rig.fate(Program::ToUplink, &passed), Fate::Next(passed.frame.clone()));
    assert_eq!(rig.observe(Program::ToUplink, &passed).hash, 0);
}

#[test]
fn a_service_that_leads_outside_stays_on_the_hosts_path() {
    let mut rig = Rig::new(&tables(A));
    let (sent, translated) =
        (tcp((POD, 40000), (SERVICE, 443), SYN), tcp((NODE_A, MASQUERADE), (SERVER, 6443), SYN));
    let up = rig.walk_up(&sent, &translated);
    let port = rig.port();
    assert_eq!(up, Fate::Next(tcp((EGRESS, port), (SERVER, 6443), SYN).frame()));
    // The host's stack gets its reply with the address that it knows, by the uplink that it expects it from.
    let (back, inside) = (
        tcp((SERVER, 6443), (EGRESS, port), SYN | ACK),
        tcp((SERVER, 6443), (NODE_A, MASQUERADE), SYN | ACK),
    );
    assert_eq!(rig.fate(Program::FromUplink, &from_uplink(&back)), Fate::Next(inside.frame()));
    let mut to_uplink_mac = inside;
    to_uplink_mac.macs[0] = UPLINK_MAC;
    assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&back)), redirected(&to_uplink_mac));
}

#[test]
fn a_gateway_sends_on_what_it_does_not_own() {
    let mut rig = Rig::new(&tables(A));
    // Granule 10 is B's: 1664 to 1727.
    for (name, [first, _, back], remote_port) in PROTOCOLS {
        for port in [1664, 1727] {
            let out = first((EGRESS, port), (SERVER, remote_port));
            assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&out)), redirected(&out), "{name}");
            let reply = from_uplink(&back((SERVER, remote_port), (EGRESS, port)));
            assert_eq!(rig.fate(Program::FromUplink, &reply), Fate::Redirect(reply.frame.clone()), "{name}");
            let tunnel = Tunnel { source: Ip::v4(NODE_A), destination: Ip::v4(NODE_B), vni: VNI };
            assert_eq!(rig.observe(Program::FromUplink, &reply).tunnel, Some(tunnel));
        }
    }
    // By the second uplink only where it has a route.
    let out = |server| from_tunnel(&tcp((SECOND_EGRESS, 1664), (server, 80), ACK));
    for near in [[192, 0, 2, 9], [198, 51, 100, 9]] {
        assert_eq!(rig.fate(Program::FromTunnel, &out(near)), Fate::Redirect(out(near).frame));
    }
    assert_eq!(rig.fate(Program::FromTunnel, &out(SERVER)), Fate::Drop(DropReason::NoRoute));
}

#[test]
fn arp_is_answered_for_held_addresses_only() {
    let mut rig = Rig::new(&tables(A));
    let (mac, router) = ([2, 0, 0, 0, 0, 0x99], [172, 18, 0, 1]);
    let ask = |ifindex, sender, target| Input {
        frame: arp(1, (mac, sender), ([0; 6], target)),
        ifindex,
        mark: MARK,
        ..Input::default()
    };
    let asked = ask(UPLINK, router, EGRESS);
    let answer = arp(2, (UPLINK_MAC, EGRESS), (mac, router));
    assert_eq!(rig.fate(Program::FromUplink, &asked), Fate::Redirect(answer));
    let mut not_ethernet = asked.clone();
    not_ethernet.frame[15] = 6;
    let mut short = asked.clone();
    short.frame.truncate(30);
    let mut reply = asked.clone();
    reply.frame[21] = 2;
    for (why, other) in [
        ("the node's own", ask(UPLINK, router, NODE_A)),
        ("a gratuitous one", ask(UPLINK, EGRESS, EGRESS)),
        ("another uplink's", ask(SECOND_UPLINK, router, EGRESS)),
        ("no Ethernet", not_ethernet),
        ("short", short),
        ("no request", reply),
    ] {
        assert_eq!(rig.fate(Program::FromUplink, &other), Fate::Next(other.frame.clone()), "{why}");
    }
    rig.kernel.write(&tables(B));
    assert_eq!(rig.fate(Program::FromUplink, &asked), Fate::Next(asked.frame.clone()), "B holds it");
}

#[test]
fn checksums_in_odd_cases() {
    let mut rig = Rig::new(&tables(B));
    let (pod, server) = ((POD, 40000), (SERVER, 53));
    rig.walk_up(&udp(pod, server), &udp(pod, server));
    let out = (EGRESS, rig.port());
    let mut check = |sent: &dyn Fn(([u8; 4], u16)) -> Built, why: &str| {
        let expected = sent(out).hop().frame();
        assert_eq!(rig.fate(Program::FromPod, &from_pod(&sent(pod))), Fate::Redirect(expected), "{why}");
    };
    check(&|from| udp(from, server).no_checksum(), "no checksum stays none");
    check(&|from| udp(from, server).payload(b"odd"), "an odd length");
    check(&|from| udp(from, server).ip_options(&[1, 1, 1, 1, 148, 4, 0, 0]), "IP options");
    check(&|from| Built { padding: 18, ..udp(from, server).payload(b"") }, "padding");
    // A checksum of 0 would say "none": it is sent as 0xffff. This datum leads there.
    let datum = (0..=u16::MAX)
        .map(u16::to_be_bytes)
        .find(|datum| udp(out, server).payload(datum).frame()[40..42] == [0xff, 0xff]);
    let datum = datum.expect("one of 65,536 data does");
    check(&|from| udp(from, server).payload(&datum), "a checksum of 0 after the translation");
    let datum = (0..=u16::MAX)
        .map(u16::to_be_bytes)
        .find(|datum| udp(pod, server).payload(datum).frame()[40..42] == [0xff, 0xff]);
    let datum = datum.expect("one of 65,536 data does");
    check(&|from| udp(from, server).payload(&datum), "a checksum of 0 before the translation");
}

#[test]
fn the_mss_is_lowered_wherever_its_option_stands() {
    let mut rig = Rig::new(&tables(B));
    let (pod, server) = ((POD, 40000), (SERVER, 80));
    rig.walk_up(&tcp(pod, server, SYN), &tcp(pod, server, SYN));
    let out = (EGRESS, rig.port());
    let mss = |value: u16| [vec![2, 4], value.to_be_bytes().to_vec()].concat();
    let timestamps = [8, 10, 0, 0, 0, 1, 0, 0, 0, 0];
    let odd = [&[1][..], &timestamps].concat();
    let prefixes = [&[][..], &[1], &[1, 1], &[3, 3, 7], &timestamps, &odd];
    let values = [(9000, 1410), (1460, 1410), (1411, 1410), (1410, 1410), (536, 536)];
    let cases = prefixes.iter().flat_map(|prefix| values.map(|(before, after)| (*prefix, before, after)));
    let options = |prefix: &[u8], value| [prefix, &mss(value), &[4, 2]].concat();
    for (prefix, before, after) in cases.clone() {
        let sent = from_pod(&tcp(pod, server, SYN).tcp_options(&options(prefix, before)));
        let expected = tcp(out, server, SYN).tcp_options(&options(prefix, after)).hop();
        assert_eq!(rig.fate(Program::FromPod, &sent), redirected(&expected), "{prefix:?} {before}");
    }
    // Options that make no sense are the receiver's to judge; data that looks like an option is none.
    for options in [&[2, 3, 0x23, 0x28][..], &[5, 0, 2, 4, 0x23, 0x28, 0, 0], &[0, 2, 4, 0x23, 0x28, 0, 0, 0]]
    {
        let sent = tcp(pod, server, SYN).tcp_options(options);
        let expected = tcp(out, server, SYN).tcp_options(options).hop();
        assert_eq!(rig.fate(Program::FromPod, &from_pod(&sent)), redirected(&expected), "{options:?}");
    }
    let sent = from_pod(&tcp(pod, server, SYN).payload(&mss(9000)));
    let expected = tcp(out, server, SYN).payload(&mss(9000)).hop();
    assert_eq!(rig.fate(Program::FromPod, &sent), redirected(&expected));
    for (prefix, before, after) in cases {
        let reply = from_tunnel(&tcp(server, out, SYN | ACK).tcp_options(&options(prefix, before)));
        let expected = tcp(server, pod, SYN | ACK).tcp_options(&options(prefix, after)).hop();
        assert_eq!(rig.fate(Program::FromTunnel, &reply), redirected(&expected), "{prefix:?} {before}");
    }
}

#[test]
fn a_port_that_a_flow_has_left_answers_no_more() {
    let mut rig = Rig::new(&tables(B));
    let (pod, server) = ((POD, 40000), (SERVER, 80));
    rig.walk_up(&tcp(pod, server, SYN), &tcp(pod, server, SYN));
    let port = rig.port();
    let mut state = rig.kernel.state();
    let (key, reply) = state.replies.pop_first().expect("there is one");
    state.replies.insert(ReplyKey { egress_port: port ^ 1, ..key }, reply);
    rig.kernel.write_state(&state);
    let old = from_tunnel(&tcp(server, (EGRESS, port ^ 1), SYN | ACK));
    assert_eq!(rig.fate(Program::FromTunnel, &old), Fate::Drop(DropReason::NoReplyFlow));
}

#[test]
fn a_time_to_live_ends_at_the_node() {
    let mut rig = Rig::new(&tables(B));
    let (pod, server) = ((POD, 40000), (SERVER, 53));
    rig.walk_up(&udp(pod, server), &udp(pod, server));
    let port = rig.port();
    let last = Built { ttl: 1, ..udp(pod, server) };
    assert_eq!(rig.fate(Program::FromPod, &from_pod(&last)), Fate::Next(last.frame()), "the host answers it");
    let more = Built { ttl: 2, ..udp(pod, server) };
    assert_eq!(
        rig.fate(Program::FromPod, &from_pod(&more)),
        redirected(&Built { ttl: 1, ..udp((EGRESS, port), server) })
    );
    let reply = Built { ttl: 1, ..udp(server, (EGRESS, port)) };
    let dropped = Fate::Drop(DropReason::TtlExpired);
    assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&reply)), dropped);
}

/// The quoted packet in an ICMP error: its first bytes, as they were on the wire.
fn error(from: [u8; 4], to: [u8; 4], kind: u8, about: &Built, quoted: usize) -> Built {
    let frame = about.frame();
    let quote = &frame[14..frame.len().min(14 + quoted)];
    Built { ttl: 60, ..icmp(from, to, kind, 0).payload(quote) }
}

#[test]
fn icmp_errors_are_translated_with_what_they_quote() {
    const ROUTER: [u8; 4] = [198, 51, 100, 1];
    let mut rig = Rig::new(&tables(B));
    for (protocol, [first, _, back], remote_port) in PROTOCOLS {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((POD, 40000), (SERVER, remote_port));
        rig.walk_up(&first(pod, server), &first(pod, server));
        let out = (EGRESS, rig.port());
        // 28 bytes are sure to be quoted; TCP's checksum is not among them and is not followed.
        for quoted in [28, 60] {
            for (kind, sender) in [(3, SERVER), (11, ROUTER), (12, ROUTER)] {
                let sent = error(sender, EGRESS, kind, &first(out, server), quoted);
                let mut about = first(pod, server);
                keep_tcp_checksum(&mut about, &first(out, server));
                let expected = error(sender, POD, kind, &about, quoted).hop();
                let fate = rig.fate(Program::FromTunnel, &from_tunnel(&sent));
                assert_eq!(fate, redirected(&expected), "{protocol}, {quoted} quoted, from outside");
            }
            let sent = error(POD, SERVER, 3, &back(server, pod), quoted);
            let mut about = back(server, out);
            keep_tcp_checksum(&mut about, &back(server, pod));
            let expected = error(EGRESS, SERVER, 3, &about, quoted).hop();
            let fate = rig.fate(Program::FromPod, &from_pod(&sent));
            assert_eq!(fate, redirected(&expected), "{protocol}, {quoted} quoted, from the pod");
        }
        let stray = error(SERVER, EGRESS, 3, &first((EGRESS, out.1 ^ 1), server), 28);
        let dropped = Fate::Drop(DropReason::NoReplyFlow);
        assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&stray)), dropped);
        let others = error(SERVER, EGRESS, 3, &first((SERVER, out.1), server), 28);
        let dropped = Fate::Drop(DropReason::IcmpType);
        assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&others)), dropped, "not what we sent");
    }
}

/// The translator does not follow the quoted TCP checksum: it is another packet's then.
fn keep_tcp_checksum(packet: &mut Built, other: &Built) {
    if matches!(packet.transport, Transport::Tcp { .. }) {
        let frame = other.frame();
        let mut segment = packet.frame()[34..].to_vec();
        segment[16..18].copy_from_slice(&frame[34 + 16..34 + 18]);
        packet.transport = Transport::Raw { protocol: 6, bytes: segment };
    }
}

#[test]
fn what_a_selected_pod_may_not_send() {
    let mut rig = Rig::new(&tables(B));
    let server = (SERVER, 80);
    for (reason, ifindex, packet) in [
        (DropReason::SpoofedSource, OTHER_IF, tcp((POD, 1), server, SYN)),
        (DropReason::SpoofedSource, POD_IF, tcp((EGRESS, 1), server, SYN)),
        (DropReason::SpoofedSource, POD_IF, tcp(([8, 8, 8, 8], 1), server, SYN)),
        (DropReason::UnknownPod, OTHER_IF, tcp(([10, 244, 1, 99], 1), server, SYN)),
        (DropReason::Protocol, POD_IF, raw(POD, SERVER, 47, b"gre")),
        (DropReason::Fragment, POD_IF, udp((POD, 1), server).fragment(0x2000)),
        (DropReason::Fragment, POD_IF, udp((POD, 1), server).fragment(100)),
        (DropReason::IcmpType, POD_IF, icmp(POD, SERVER, 13, 1)),
        (DropReason::NoFlow, POD_IF, icmp(POD, SERVER, 0, 1)),
        (DropReason::Malformed, POD_IF, raw(POD, SERVER, 6, &[0; 13])),
        (DropReason::Malformed, POD_IF, raw(POD, SERVER, 17, &[0; 7])),
        (DropReason::Malformed, POD_IF, raw(POD, SERVER, 1, &[8; 7])),
    ] {
        assert_eq!(rig.fate(Program::FromPod, &input(ifindex, &packet)), Fate::Drop(reason), "{packet:?}");
    }
    assert_eq!(rig.kernel.state(), lab::kernel::State::default(), "nothing is kept of what is dropped");
}

#[test]
fn what_may_not_leave_by_the_uplink() {
    let mut rig = Rig::new(&tables(B));
    let masqueraded = to_uplink(&tcp((NODE_A, MASQUERADE), (SERVER, 80), SYN));
    let lost = Input { hash: 12345, ..masqueraded.clone() };
    assert_eq!(rig.fate(Program::ToUplink, &lost), Fate::Drop(DropReason::TokenLost));
    let unknown = Input { ingress: PORT, ..masqueraded.clone() };
    assert_eq!(rig.fate(Program::ToUplink, &unknown), Fate::Drop(DropReason::UnknownInterface));
    let forged = to_uplink(&udp((NODE_A, MASQUERADE), (NODE_B, 4795)));
    assert_eq!(rig.fate(Program::ToUplink, &forged), Fate::Drop(DropReason::TunnelForged));
    // An ACK of no flow: with its token it is known whose it is.
    let ack = tcp((POD, 1), (SERVER, 80), ACK | FIN);
    assert_eq!(rig.walk_up(&ack, &ack), Fate::Drop(DropReason::NoFlow));
    let own = Input { ingress: 0, ..masqueraded };
    assert_eq!(rig.fate(Program::ToUplink, &own), Fate::Next(own.frame.clone()), "the node's own");
}

#[test]
fn what_may_not_come_in() {
    let mut rig = Rig::new(&tables(A));
    let server = (SERVER, 80);
    for (reason, packet) in [
        (DropReason::NoRange, tcp(server, (EGRESS, 22), SYN)),
        (DropReason::NoRange, tcp(server, (EGRESS, 40000), SYN)),
        (DropReason::NoReplyFlow, tcp(server, (EGRESS, 1024), SYN)),
        (DropReason::NoReplyFlow, icmp(SERVER, EGRESS, 8, 1)),
        (DropReason::IcmpType, icmp(SERVER, EGRESS, 3, 1)),
        (DropReason::Protocol, raw(SERVER, EGRESS, 47, b"gre")),
        (DropReason::Fragment, tcp(server, (EGRESS, 1024), ACK).fragment(0x2000)),
        (DropReason::Malformed, raw(SERVER, EGRESS, 6, &[0; 13])),
    ] {
        assert_eq!(rig.fate(Program::FromUplink, &from_uplink(&packet)), Fate::Drop(reason), "{packet:?}");
    }
    let mut tunnelled =
        |packet: &Built, tunnel| rig.fate(Program::FromTunnel, &Input { tunnel, ..from_tunnel(packet) });
    let out = tcp((EGRESS, 1664), server, ACK);
    for (reason, packet, tunnel) in [
        (DropReason::UnknownTunnelPeer, &out, None),
        (DropReason::UnknownTunnelPeer, &out, Some((Ip::v4(SERVER), VNI))),
        (DropReason::UnknownTunnelPeer, &out, Some((Ip::v4(NODE_B), VNI + 1))),
        (DropReason::UnknownTunnelPeer, &out, Some((Ip::v4(NODE_A), VNI))),
        (DropReason::TunnelNotAllowed, &tcp((EGRESS, 1024), server, ACK), Some((Ip::v4(NODE_B), VNI))),
        (DropReason::TunnelNotAllowed, &tcp((POD, 1), server, SYN), Some((Ip::v4(NODE_B), VNI))),
        (DropReason::TunnelNotAllowed, &tcp(server, (EGRESS, 1664), ACK), Some((Ip::v4(NODE_B), VNI))),
    ] {
        assert_eq!(tunnelled(packet, tunnel), Fate::Drop(reason), "{packet:?} from {tunnel:?}");
    }
}

#[test]
fn what_is_not_ours_is_not_touched() {
    let mut rig = Rig::new(&tables(B));
    let mut v6 = udp((POD, 1), (SERVER, 2)).payload(&[0; 40]).frame();
    v6[12..14].copy_from_slice(&[0x86, 0xdd]);
    let with = |at: usize, value: u8| {
        let mut frame = udp((POD, 1), (SERVER, 2)).frame();
        frame[at] = value;
        frame
    };
    // The kernel refuses such headers by itself.
    for frame in [v6, with(14, 0x44), with(14, 0x65), with(17, 200), with(17, 19)] {
        for (program, ifindex) in
            [(Program::FromPod, POD_IF), (Program::ToUplink, UPLINK), (Program::FromUplink, UPLINK)]
        {
            let input =
                Input { frame: frame.clone(), ifindex, ingress: POD_IF, mark: MARK, ..Input::default() };
            assert_eq!(rig.fate(program, &input), Fate::Next(frame.clone()), "{program:?}");
        }
        let tunnelled =
            Input { frame, ifindex: TUNNEL, tunnel: Some((Ip::v4(NODE_B), VNI)), ..Input::default() };
        assert_eq!(rig.fate(Program::FromTunnel, &tunnelled), Fate::Drop(DropReason::TunnelNotAllowed));
    }
    let other = input(OTHER_IF, &udp((OTHER_POD, 1), (SERVER, 2)));
    assert_eq!(rig.fate(Program::FromPod, &other), Fate::Next(other.frame.clone()));
    let inbound = from_uplink(&tcp((SERVER, 1), (NODE_A, 22), SYN));
    assert_eq!(rig.fate(Program::FromUplink, &inbound), Fate::Next(inbound.frame.clone()));
}

#[test]
fn before_the_settings_only_the_tunnel_drops() {
    let mut tables = tables(B);
    tables.settings.node = 0;
    let mut rig = Rig::new(&tables);
    let out = from_pod(&tcp((POD, 1), (SERVER, 80), SYN));
    assert_eq!(rig.fate(Program::FromPod, &out), Fate::Next(out.frame.clone()));
    let leaving = to_uplink(&tcp((POD, 1), (SERVER, 80), SYN));
    assert_eq!(rig.fate(Program::ToUplink, &leaving), Fate::Next(leaving.frame.clone()));
    let tunnelled = from_tunnel(&tcp((EGRESS, 1664), (SERVER, 80), ACK));
    assert_eq!(rig.fate(Program::FromTunnel, &tunnelled), Fate::Drop(DropReason::NotReady));
    let reply = from_uplink(&tcp((SERVER, 80), (EGRESS, 1024), ACK));
    assert_eq!(rig.fate(Program::FromUplink, &reply), Fate::Drop(DropReason::NotReady));
}
