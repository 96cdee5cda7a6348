//! Fixtures: packets described, run through the loaded programs, and compared with the packets and verdicts
//! that are expected. Every expected packet is built, with its checksums, from nothing.

use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use datapath::addr::Ip;
use datapath::conntrack::{FlowState, seconds};
use datapath::keys::{
    Delivery, DeliveryMode, EgressIp, GranuleRange, GranuleTable, Guard, Interface, InterfaceKind, Lease,
    NetworkKey, NetworkKind, Node, Pod, Policy, ReplyKey, Settings,
};
use datapath::memory::Memory;
use datapath::packet::{ACK, FIN, SYN};
use datapath::verdict::DropReason;
use lab::kernel::{
    Input, Kernel, Observed, Output, Program, Tunnel, Verdict, enter_node_network,
    interfaces::{OTHER_POD as OTHER_IF, POD as POD_IF, PORT, SECOND_UPLINK, TUNNEL, UPLINK},
};
use lab::packet::{
    Built, DATA, DESTINATION_OPTIONS, End, FRAGMENT, HOP_BY_HOP, INIT, INIT_ACK, ROUTING, Transport, arp,
    echo, icmp, raw, sctp, summed, tcp, udp, v6, verify_checksums,
};

const POD: Ip = V4.pod;
const OTHER_POD: Ip = Ip::v4([10, 244, 1, 11]);
const REMOTE_POD: Ip = V4.remote_pod;
const NODE_A: Ip = V4.nodes[0];
const NODE_B: Ip = V4.nodes[1];
const EGRESS: Ip = V4.egress;
const SERVER: Ip = V4.server;
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0xa, 2];

const A: u16 = 1;
const B: u16 = 2;
const VNI: u32 = 4711;
const PASS: u32 = 0xfeed_f00d;
const MARK: u32 = 0x77;
/// A bridge; no program is attached to it.
const BRIDGE: u32 = 99;
/// Where the host's masquerade put a packet.
const MASQUERADE: u16 = 61000;

/// The addresses of one family.
struct Family {
    pod: Ip,
    pod_id: u32,
    remote_pod: Ip,
    service: Ip,
    nodes: [Ip; 2],
    egress: Ip,
    /// The first of two ids.
    egress_id: u32,
    /// An egress IP of the second uplink's network, held by A.
    second_egress: Ip,
    server: Ip,
    /// A router on the way to the server.
    router: Ip,
    /// Prefixes, by length.
    networks: [(Ip, u32, NetworkKind); 4],
    /// IP and TCP headers.
    overhead: u16,
}

const V4: Family = Family {
    pod: Ip::v4([10, 244, 1, 10]),
    pod_id: 1,
    remote_pod: Ip::v4([10, 244, 2, 10]),
    service: Ip::v4([10, 96, 0, 10]),
    nodes: [Ip::v4([172, 18, 0, 11]), Ip::v4([172, 18, 0, 12])],
    egress: Ip::v4([172, 18, 0, 100]),
    egress_id: 1,
    second_egress: Ip::v4([192, 0, 2, 100]),
    server: Ip::v4([203, 0, 113, 5]),
    router: Ip::v4([198, 51, 100, 1]),
    networks: [
        (Ip::v4([10, 244, 0, 0]), 96 + 16, NetworkKind::Pods),
        (Ip::v4([10, 96, 0, 0]), 96 + 16, NetworkKind::Services),
        (Ip::v4([172, 18, 0, 11]), 128, NetworkKind::Node),
        (Ip::v4([172, 18, 0, 12]), 128, NetworkKind::Node),
    ],
    overhead: 20 + 20,
};

const V6: Family = Family {
    pod: v6([0xfd00, 0x10, 0x244, 1, 0x10]),
    pod_id: 3,
    remote_pod: v6([0xfd00, 0x10, 0x244, 2, 0x10]),
    service: v6([0xfd00, 0x10, 0x96, 0, 0x10]),
    nodes: [v6([0x2001, 0xdb8, 0x18, 0, 0x11]), v6([0x2001, 0xdb8, 0x18, 0, 0x12])],
    egress: v6([0x2001, 0xdb8, 0x18, 0, 0x100]),
    egress_id: 3,
    second_egress: v6([0x2001, 0xdb8, 0x19, 0, 0x100]),
    server: v6([0x2001, 0xdb8, 0xcb, 0, 5]),
    router: v6([0x2001, 0xdb8, 0x51, 0, 1]),
    networks: [
        (v6([0xfd00, 0x10, 0x244, 0, 0]), 48, NetworkKind::Pods),
        (v6([0xfd00, 0x10, 0x96, 0, 0]), 48, NetworkKind::Services),
        (v6([0x2001, 0xdb8, 0x18, 0, 0x11]), 128, NetworkKind::Node),
        (v6([0x2001, 0xdb8, 0x18, 0, 0x12]), 128, NetworkKind::Node),
    ],
    overhead: 40 + 20,
};

const FAMILIES: [Family; 2] = [V4, V6];

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
    for (ip, id, policy, ifindex) in
        [(POD, V4.pod_id, 1, POD_IF), (OTHER_POD, 2, 0, OTHER_IF), (V6.pod, V6.pod_id, 1, POD_IF)]
    {
        t.pods.insert(ip, Pod { id, policy, ifindex, firewall: 0 });
        let mode = DeliveryMode::Peer as u8;
        t.delivery.insert(id, Delivery { ip, ifindex, mode, ..Delivery::default() });
    }
    for (ifindex, kind, guard, mac) in [
        (POD_IF, InterfaceKind::Pod, Guard::Own, [0; 6]),
        (OTHER_IF, InterfaceKind::Pod, Guard::None, [0; 6]),
        (UPLINK, InterfaceKind::Uplink, Guard::None, UPLINK_MAC),
        (SECOND_UPLINK, InterfaceKind::Uplink, Guard::None, [2; 6]),
    ] {
        let guarded = guard as u8;
        t.interfaces.insert(ifindex, Interface { kind: kind as u8, guarded, mac, bridge: 0 });
    }
    for (id, ip) in [(A, NODE_A), (B, NODE_B)] {
        t.nodes.insert(id, Node { tunnel_ip: ip });
    }
    let mut policy = Policy { len: 2, ..Policy::default() };
    for (nth, family) in FAMILIES.into_iter().enumerate() {
        for (ip, prefix_len, kind) in family.networks {
            t.networks.insert(NetworkKey { prefix_len, ip }, kind as u32);
        }
        let id = family.egress_id;
        policy.egress[nth] = id;
        for (id, ip, uplink, holder) in
            [(id, family.egress, UPLINK, holder), (id + 1, family.second_egress, SECOND_UPLINK, A)]
        {
            t.egress_addrs.insert(ip, id);
            t.egress_ips.insert(id, EgressIp { ip, policy: 1, uplink, holder, ..EgressIp::default() });
            let mut table = GranuleTable::default();
            (table.node[0], table.node[10]) = (A, B);
            t.granules.insert(id, table);
            let lease = Lease::of(&[GranuleRange { first: 0, count: 1 }]);
            t.leases.insert(id, lease);
        }
    }
    t.policies.insert(1, policy);
    t
}

/// The same, with tunnels between addresses of this family.
fn tunnelled(holder: u16, family: &Family) -> Memory {
    let mut t = tables(holder);
    for (id, tunnel_ip) in [A, B].into_iter().zip(family.nodes) {
        t.nodes.insert(id, Node { tunnel_ip });
    }
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
    /// Counted, and answered with this.
    Answer(DropReason, Vec<u8>),
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
            (Verdict::Redirect, false) if drops.len() == 1 => {
                assert_eq!(mark, 0);
                Fate::Answer(drops[0], frame)
            }
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

fn input_of(ifindex: u32, packet: &Built) -> Input {
    framed(ifindex, packet.frame())
}

fn framed(ifindex: u32, frame: Vec<u8>) -> Input {
    Input { frame, ifindex, mark: MARK, ..Input::default() }
}

fn from_pod(packet: &Built) -> Input {
    input_of(POD_IF, packet)
}

fn to_uplink(packet: &Built) -> Input {
    Input { ingress: POD_IF, ..input_of(UPLINK, packet) }
}

fn from_uplink(packet: &Built) -> Input {
    input_of(UPLINK, packet)
}

/// From the other node.
fn from_tunnel(packet: &Built) -> Input {
    Input { tunnel: Some((NODE_B, VNI)), ..input_of(TUNNEL, packet) }
}

fn redirected(packet: &Built) -> Fate {
    let frame = packet.frame();
    verify_checksums(&frame).expect("the expected packet is right");
    Fate::Redirect(frame)
}

/// What comes out of the tunnel for the host's stack: as if by the uplink that the server is behind.
fn into_uplink(packet: &Built) -> Built {
    Built { macs: [UPLINK_MAC, packet.macs[1]], ..packet.clone() }
}

/// One packet of a connection, by its ends: how a protocol builds it.
type Build = fn(End, End) -> Built;

/// What each protocol sends first, later, and back; what the outside's port is.
const PROTOCOLS: [(&str, [Build; 3], u16); 4] = [
    ("tcp", [|f, t| tcp(f, t, SYN), |f, t| tcp(f, t, ACK).payload(b"get"), |f, t| tcp(f, t, SYN | ACK)], 80),
    ("udp", [|f, t| udp(f, t), |f, t| udp(f, t).payload(b"more"), |f, t| udp(f, t).payload(b"answer")], 53),
    (
        "sctp",
        [
            |f, t| sctp(f, t, INIT),
            |f, t| sctp(f, t, DATA).payload(b"of some length"),
            |f, t| sctp(f, t, INIT_ACK).payload(b"a cookie"),
        ],
        3868,
    ),
    (
        "icmp",
        [
            |f, t| echo(f.0, t.0, true, f.1),
            |f, t| echo(f.0, t.0, true, f.1).payload(b"xyz"),
            |f, t| echo(f.0, t.0, false, t.1),
        ],
        0,
    ),
];

#[test]
fn a_connection_through_the_tunnel_and_back() {
    let mut rig = Rig::new(&tables(B));
    let every = FAMILIES.iter().flat_map(|f| FAMILIES.iter().map(move |tunnels| (f, tunnels)));
    for ((f, tunnels), (protocol, [first, later, back], remote_port)) in
        every.flat_map(|families| PROTOCOLS.map(|protocol| (families, protocol)))
    {
        rig.kernel.write(&tunnelled(B, tunnels));
        let [node_a, node_b] = tunnels.nodes;
        let (pod, server) = ((f.pod, 40000), (f.server, remote_port));
        let up = rig.walk_up(&first(pod, server), &first((f.nodes[0], MASQUERADE), server));
        let port = rig.port();
        assert_eq!(up, redirected(&first((f.egress, port), server)), "{protocol} from {}", f.pod);

        let next = from_pod(&later(pod, server));
        assert_eq!(rig.fate(Program::FromPod, &next), redirected(&later((f.egress, port), server).hop()));
        // The tunnel is told the holder; no hash is left that a token could be taken for.
        let tunnel = Tunnel { source: node_a, destination: node_b, vni: VNI };
        let input = Input { hash: 5, ..next };
        assert_eq!(rig.observe(Program::FromPod, &input), Observed { hash: 0, tunnel: Some(tunnel) });

        let reply = back(server, (f.egress, port));
        let reply = Input { tunnel: Some((node_b, VNI)), ..input_of(TUNNEL, &reply) };
        let delivered = redirected(&back(server, pod).hop());
        assert_eq!(rig.fate(Program::FromTunnel, &reply), delivered, "{protocol} to {}", f.pod);
        let flow = *rig.kernel.state().flows.values().next().expect("there is one");
        assert_eq!((flow.packets, flow.state), (3, FlowState::Established as u8));
    }
}

#[test]
fn a_connection_of_the_holders_own_pod() {
    let mut rig = Rig::new(&tables(A));
    for (f, (protocol, [first, later, back], remote_port)) in
        FAMILIES.iter().flat_map(|f| PROTOCOLS.map(|protocol| (f, protocol)))
    {
        rig.kernel.write(&tables(A));
        let (pod, server) = ((f.pod, 40000), (f.server, remote_port));
        let up = rig.walk_up(&first(pod, server), &first(pod, server));
        let port = rig.port();
        assert_eq!(
            up,
            Fate::Next(first((f.egress, port), server).frame()),
            "{protocol}: it is on its uplink"
        );
        let next = from_pod(&later(pod, server));
        assert_eq!(rig.fate(Program::FromPod, &next), redirected(&later((f.egress, port), server).hop()));
        let reply = from_uplink(&back(server, (f.egress, port)));
        let delivered = redirected(&back(server, pod).hop());
        assert_eq!(rig.fate(Program::FromUplink, &reply), delivered, "{protocol} to {}", f.pod);
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
    let came = input_of(POD_IF, &tcp((SERVER, 3333), (POD, 8080), SYN));
    assert_eq!(rig.fate(Program::ToPod, &came), Fate::Next(came.frame.clone()));
    assert_eq!(hash_after(&mut rig, &tcp((POD, 8080), (SERVER, 3333), SYN | ACK)), PASS);
    let not_ours = Input { hash: 99, ..input_of(OTHER_IF, &tcp((OTHER_POD, 1), (SERVER, 80), SYN)) };
    assert_eq!(rig.observe(Program::FromPod, &not_ours).hash, 99, "untouched");
    // At the uplink the pass token is taken off.
    let passed = Input { hash: PASS, ..to_uplink(&tcp((NODE_A, 1), (SERVER, 3333), ACK)) };
    assert_eq!(rig.fate(Program::ToUplink, &passed), Fate::Next(passed.frame.clone()));
    assert_eq!(rig.observe(Program::ToUplink, &passed).hash, 0);
}

#[test]
fn a_service_that_leads_outside_stays_on_the_hosts_path() {
    let mut rig = Rig::new(&tables(A));
    for f in FAMILIES {
        rig.kernel.write(&tables(A));
        let outside = (f.server, 6443);
        let sent = tcp((f.pod, 40000), (f.service, 443), SYN);
        let up = rig.walk_up(&sent, &tcp((f.nodes[0], MASQUERADE), outside, SYN));
        let port = rig.port();
        assert_eq!(up, Fate::Next(tcp((f.egress, port), outside, SYN).frame()));
        // The host's stack gets its reply with the address that it knows, by the uplink that it expects it from.
        let back = tcp(outside, (f.egress, port), SYN | ACK);
        let inside = tcp(outside, (f.nodes[0], MASQUERADE), SYN | ACK);
        assert_eq!(rig.fate(Program::FromUplink, &from_uplink(&back)), Fate::Next(inside.frame()));
        let through = redirected(&into_uplink(&inside));
        assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&back)), through);
    }
}

#[test]
fn a_gateway_sends_on_what_it_does_not_own() {
    let mut rig = Rig::new(&tables(A));
    // Granule 10 is B's: 1664 to 1727.
    for (f, (name, [first, _, back], remote_port)) in
        FAMILIES.iter().flat_map(|f| PROTOCOLS.map(|protocol| (f, protocol)))
    {
        for port in [1664, 1727] {
            let out = first((f.egress, port), (f.server, remote_port));
            assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&out)), redirected(&out), "{name}");
            let reply = from_uplink(&back((f.server, remote_port), (f.egress, port)));
            assert_eq!(rig.fate(Program::FromUplink, &reply), Fate::Redirect(reply.frame.clone()), "{name}");
            let tunnel = Tunnel { source: NODE_A, destination: NODE_B, vni: VNI };
            assert_eq!(rig.observe(Program::FromUplink, &reply).tunnel, Some(tunnel));
        }
    }
    // By the second uplink only where it has a route. IPv6 would take the first's.
    let near = [Ip::v4([192, 0, 2, 9]), Ip::v4([198, 51, 100, 9])];
    let near6 = [v6([0x2001, 0xdb8, 0x19, 0, 9]), v6([0x2001, 0xdb8, 0x51, 0, 9])];
    for (f, near) in FAMILIES.into_iter().zip([near, near6]) {
        let out = |server| from_tunnel(&tcp((f.second_egress, 1664), (server, 80), ACK));
        for near in near {
            assert_eq!(rig.fate(Program::FromTunnel, &out(near)), Fate::Redirect(out(near).frame));
        }
        assert_eq!(rig.fate(Program::FromTunnel, &out(f.server)), Fate::Drop(DropReason::NoRoute));
    }
}

#[test]
fn arp_is_answered_for_held_addresses_only() {
    let mut rig = Rig::new(&tables(A));
    let (mac, router) = ([2, 0, 0, 0, 0, 0x99], [172, 18, 0, 1]);
    let (egress, node) = (EGRESS.v4_octets(), NODE_A.v4_octets());
    let ask = |ifindex, sender, target| Input {
        frame: arp(1, (mac, sender), ([0; 6], target)),
        ifindex,
        mark: MARK,
        ..Input::default()
    };
    let asked = ask(UPLINK, router, egress);
    let answer = arp(2, (UPLINK_MAC, egress), (mac, router));
    assert_eq!(rig.fate(Program::FromUplink, &asked), Fate::Redirect(answer));
    let mut not_ethernet = asked.clone();
    not_ethernet.frame[15] = 6;
    let mut short = asked.clone();
    short.frame.truncate(30);
    let mut reply = asked.clone();
    reply.frame[21] = 2;
    for (why, other) in [
        ("the node's own", ask(UPLINK, router, node)),
        ("a gratuitous one", ask(UPLINK, egress, egress)),
        ("another uplink's", ask(SECOND_UPLINK, router, egress)),
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
    for f in FAMILIES {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, 53));
        rig.walk_up(&udp(pod, server), &udp(pod, server));
        let out = (f.egress, rig.port());
        let mut check = |sent: &dyn Fn(End) -> Built, why: &str| {
            let expected = sent(out).hop().frame();
            let fate = rig.fate(Program::FromPod, &from_pod(&sent(pod)));
            assert_eq!(fate, Fate::Redirect(expected), "{why} from {}", f.pod);
        };
        check(&|from| udp(from, server).no_checksum(), "no checksum stays none");
        check(&|from| udp(from, server).payload(b"odd"), "an odd length");
        check(&|from| Built { padding: 18, ..udp(from, server).payload(b"") }, "padding");
        // A checksum of 0 would say "none": it is sent as 0xffff. This datum leads there.
        let leads_there = |from: End| {
            let datum = (0..=u16::MAX).map(u16::to_be_bytes).find(|datum| {
                let frame = udp(from, server).payload(datum).frame();
                frame[frame.len() - 4..frame.len() - 2] == [0xff, 0xff]
            });
            datum.expect("one of 65,536 data does")
        };
        let datum = leads_there(out);
        check(&|from| udp(from, server).payload(&datum), "a checksum of 0 after the translation");
        let datum = leads_there(pod);
        check(&|from| udp(from, server).payload(&datum), "a checksum of 0 before the translation");
    }
}

#[test]
fn ip_options_are_for_the_hosts_stack() {
    let mut rig = Rig::new(&tables(B));
    for (protocol, [first, later, back], remote_port) in PROTOCOLS {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((POD, 40000), (SERVER, remote_port));
        // No operation; router alert (RFC 2113).
        let with = |packet: Built| packet.ip_options(&[1, 1, 1, 1, 148, 4, 0, 0]);
        rig.walk_up(&first(pod, server), &first(pod, server));
        let out = (EGRESS, rig.port());
        for packet in [first, later] {
            let sent = with(packet(pod, server));
            let up = rig.walk_up(&sent, &sent);
            assert_eq!(up, redirected(&with(packet(out, server))), "{protocol}");
        }
        // Without them it goes past the stack, as before.
        let fate = rig.fate(Program::FromPod, &from_pod(&later(pod, server)));
        assert_eq!(fate, redirected(&later(out, server).hop()), "{protocol}");

        let reply = with(back(server, out));
        let inside = with(back(server, pod));
        let fate = rig.fate(Program::FromTunnel, &from_tunnel(&reply));
        assert_eq!(fate, redirected(&into_uplink(&inside)), "{protocol}");
        assert_eq!(
            rig.fate(Program::FromUplink, &from_uplink(&reply)),
            Fate::Next(inside.frame()),
            "{protocol}"
        );
        assert_eq!(rig.port(), out.1, "{protocol}: one flow all the time");
    }
}

#[test]
fn the_mss_is_lowered_wherever_its_option_stands() {
    let mut rig = Rig::new(&tables(B));
    for f in FAMILIES {
        rig.kernel.write(&tables(B));
        mss_is_lowered(&mut rig, &f);
    }
}

fn mss_is_lowered(rig: &mut Rig, f: &Family) {
    let (pod, server) = ((f.pod, 40000), (f.server, 80));
    rig.walk_up(&tcp(pod, server, SYN), &tcp(pod, server, SYN));
    let out = (f.egress, rig.port());
    let most = 1450 - f.overhead;
    let mss = |value: u16| [vec![2, 4], value.to_be_bytes().to_vec()].concat();
    let timestamps = [8, 10, 0, 0, 0, 1, 0, 0, 0, 0];
    let odd = [&[1][..], &timestamps].concat();
    let prefixes = [&[][..], &[1], &[1, 1], &[3, 3, 7], &timestamps, &odd];
    let values = [(9000, most), (1460, most), (most + 1, most), (most, most), (536, 536)];
    let cases = prefixes.iter().flat_map(|prefix| values.map(|(before, after)| (*prefix, before, after)));
    let options = |prefix: &[u8], value| [prefix, &mss(value), &[4, 2]].concat();
    // One that opens a connection walks up the host's stack; the others that have the option do not.
    let opening = |from| tcp(from, server, SYN).tcp_options(&options(&[], 9000));
    let lowered = tcp(out, server, SYN).tcp_options(&options(&[], most));
    assert_eq!(rig.walk_up(&opening(pod), &opening((f.nodes[0], MASQUERADE))), redirected(&lowered));
    for (prefix, before, after) in cases.clone() {
        let with = |from: End, flags, value| tcp(from, server, flags).tcp_options(&options(prefix, value));
        let sent = with(pod, SYN, before);
        let expected = redirected(&with(out, SYN, after));
        assert_eq!(rig.walk_up(&sent, &sent), expected, "{prefix:?} {before}");
        // Two ends may open the connection at once (RFC 9293, 3.5).
        let sent = from_pod(&with(pod, SYN | ACK, before));
        let expected = redirected(&with(out, SYN | ACK, after).hop());
        assert_eq!(rig.fate(Program::FromPod, &sent), expected, "{prefix:?} {before}");
    }
    // Options that make no sense are the receiver's to judge; data that looks like an option is none.
    for options in [&[2, 3, 0x23, 0x28][..], &[5, 0, 2, 4, 0x23, 0x28, 0, 0], &[0, 2, 4, 0x23, 0x28, 0, 0, 0]]
    {
        let with = |from: End, flags| tcp(from, server, flags).tcp_options(options);
        let up = rig.walk_up(&with(pod, SYN), &with(pod, SYN));
        assert_eq!(up, redirected(&with(out, SYN)), "{options:?}");
        let fate = rig.fate(Program::FromPod, &from_pod(&with(pod, SYN | ACK)));
        assert_eq!(fate, redirected(&with(out, SYN | ACK).hop()), "{options:?}");
    }
    let with = |from: End, flags| tcp(from, server, flags).payload(&mss(9000));
    assert_eq!(rig.walk_up(&with(pod, SYN), &with(pod, SYN)), redirected(&with(out, SYN)));
    let fate = rig.fate(Program::FromPod, &from_pod(&with(pod, SYN | ACK)));
    assert_eq!(fate, redirected(&with(out, SYN | ACK).hop()));
    assert_eq!(rig.port(), out.1, "one flow all the time");
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
    for f in FAMILIES {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, 53));
        rig.walk_up(&udp(pod, server), &udp(pod, server));
        let out = (f.egress, rig.port());
        let last = Built { ttl: 1, ..udp(pod, server) };
        assert_eq!(
            rig.fate(Program::FromPod, &from_pod(&last)),
            Fate::Next(last.frame()),
            "the host answers it"
        );
        let more = Built { ttl: 2, ..udp(pod, server) };
        let expected = redirected(&Built { ttl: 1, ..udp(out, server) });
        assert_eq!(rig.fate(Program::FromPod, &from_pod(&more)), expected);
        let reply = Built { ttl: 1, ..udp(server, out) };
        let dropped = Fate::Drop(DropReason::TtlExpired);
        assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&reply)), dropped);
    }
}

/// The quoted packet in an ICMP error: its first bytes, as they were on the wire.
fn error(from: Ip, to: Ip, kind: u8, about: &Built, quoted: usize) -> Built {
    let frame = about.frame();
    let quote = &frame[14..frame.len().min(14 + quoted)];
    Built { ttl: 60, ..icmp(from, to, kind, 0).payload(quote) }
}

#[test]
fn icmp_errors_are_translated_with_what_they_quote() {
    let mut rig = Rig::new(&tables(B));
    for (f, (protocol, [first, _, back], remote_port)) in
        FAMILIES.iter().flat_map(|f| PROTOCOLS.map(|protocol| (f, protocol)))
    {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, remote_port));
        rig.walk_up(&first(pod, server), &first(pod, server));
        let out = (f.egress, rig.port());
        let (header, kinds) = if f.pod.is_v4() { (20, [3, 11, 12, 12]) } else { (40, [1, 2, 3, 4]) };
        let unreachable = kinds[0];
        // Eight bytes behind the header are sure to be quoted; the checksums of TCP and SCTP are not among them
        // and are not followed.
        for quoted in [header + 8, header + 9, header + 40] {
            for (kind, sender) in kinds.into_iter().zip([f.server, f.router, f.router, f.server]) {
                let sent = error(sender, f.egress, kind, &first(out, server), quoted);
                let mut about = first(pod, server);
                keep_checksum(&mut about, &first(out, server));
                let expected = error(sender, f.pod, kind, &about, quoted).hop();
                let fate = rig.fate(Program::FromTunnel, &from_tunnel(&sent));
                assert_eq!(fate, redirected(&expected), "{protocol}, {quoted} quoted, to {}", f.pod);
            }
            let sent = error(f.pod, f.server, unreachable, &back(server, pod), quoted);
            let mut about = back(server, out);
            keep_checksum(&mut about, &back(server, pod));
            let expected = error(f.egress, f.server, unreachable, &about, quoted).hop();
            let fate = rig.fate(Program::FromPod, &from_pod(&sent));
            assert_eq!(fate, redirected(&expected), "{protocol}, {quoted} quoted, from {}", f.pod);
        }
        let about = |from: End| error(f.server, f.egress, unreachable, &first(from, server), header + 8);
        let stray = about((f.egress, out.1 ^ 1));
        let dropped = Fate::Drop(DropReason::NoReplyFlow);
        assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&stray)), dropped);
        let others = about((f.server, out.1));
        let dropped = Fate::Drop(DropReason::IcmpType);
        assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&others)), dropped, "not what we sent");
        // An error in fragments cannot be told: its checksum covers what is not there.
        let long = error(f.server, f.egress, unreachable, &first(out, server), header + 40);
        let cut = long.fragments(&[(8 + header + 8).next_multiple_of(8)]).swap_remove(0);
        let input = Input { tunnel: Some((NODE_B, VNI)), ..framed(TUNNEL, cut) };
        assert_eq!(rig.fate(Program::FromTunnel, &input), dropped, "the first fragment of an error");
        // A pod's error about a packet to somebody else is none of the flow's.
        let router = error(f.pod, f.server, unreachable, &back(server, (f.remote_pod, 40000)), header + 8);
        assert_eq!(rig.fate(Program::FromPod, &from_pod(&router)), dropped, "not what it received");
    }
}

#[test]
fn a_quoted_checksum_may_be_none_or_come_out_as_zero() {
    let mut rig = Rig::new(&tables(B));
    for f in FAMILIES {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, 53));
        rig.walk_up(&udp(pod, server), &udp(pod, server));
        let out = (f.egress, rig.port());
        let kind = if f.pod.is_v4() { 3 } else { 1 };
        let datum = (0..=u16::MAX).map(u16::to_be_bytes).find(|datum| {
            let frame = udp(pod, server).payload(datum).frame();
            frame[frame.len() - 4..frame.len() - 2] == [0xff, 0xff]
        });
        let datum = datum.expect("one of 65,536 data does");
        for about in [&|from| udp(from, server).no_checksum(), &|from| udp(from, server).payload(&datum)]
            as [&dyn Fn(End) -> Built; 2]
        {
            let sent = error(f.router, f.egress, kind, &about(out), 80);
            let expected = error(f.router, f.pod, kind, &about(pod), 80).hop();
            assert_eq!(rig.fate(Program::FromTunnel, &from_tunnel(&sent)), redirected(&expected));
        }
    }
}

/// The translator does not follow the quoted checksums of TCP and SCTP: they are another packet's then.
fn keep_checksum(packet: &mut Built, other: &Built) {
    let (protocol, checksum) = match packet.transport {
        Transport::Tcp { .. } => (6, 16..18),
        Transport::Sctp { .. } => (132, 8..12),
        Transport::Udp { .. } | Transport::Icmp { .. } | Transport::Raw { .. } => return,
    };
    let header = if packet.source.is_v4() { 34 } else { 54 };
    let mut segment = packet.frame()[header..].to_vec();
    segment[checksum.clone()].copy_from_slice(&other.frame()[header..][checksum]);
    packet.transport = Transport::Raw { protocol, bytes: segment };
}

/// Cuts a datagram into three.
fn in_three(packet: &Built) -> Vec<Vec<u8>> {
    let frames = packet.fragments(&[24, 48]);
    assert_eq!(frames.len(), 3);
    frames
}

/// Data enough for three fragments.
const LONG: [u8; 63] = *b"a datagram that is longer than what its way carries, let us say";

/// A datagram of each protocol that is translated in fragments: out, and back.
const DATAGRAMS: [(&str, [Build; 2], u16); 3] = [
    ("tcp", [|f, t| tcp(f, t, ACK).payload(&LONG), |f, t| tcp(f, t, ACK).payload(&LONG[..62])], 80),
    ("udp", [|f, t| udp(f, t).payload(&LONG), |f, t| udp(f, t).payload(&LONG[..62])], 53),
    (
        "icmp",
        [
            |f, t| echo(f.0, t.0, true, f.1).payload(&LONG),
            |f, t| echo(f.0, t.0, false, t.1).payload(&LONG[..62]),
        ],
        0,
    ),
];

#[test]
fn fragments_of_a_flow_follow_their_first() {
    let mut rig = Rig::new(&tables(B));
    for (f, ((protocol, [first, ..], _), (_, [out, back], remote_port))) in FAMILIES.iter().flat_map(|f| {
        [PROTOCOLS[0], PROTOCOLS[1], PROTOCOLS[3]].into_iter().zip(DATAGRAMS).map(move |p| (f, p))
    }) {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, remote_port));
        rig.walk_up(&first(pod, server), &first(pod, server));
        let egress = (f.egress, rig.port());
        let tunnel = |frame| Input { tunnel: Some((NODE_B, VNI)), ..framed(TUNNEL, frame) };

        // Before their first they go up the host's stack, and no further; from outside they are dropped.
        let sent = in_three(&out(pod, server));
        for later in &sent[1..] {
            let input = Input { hash: 9, ..framed(POD_IF, later.clone()) };
            assert_eq!(rig.fate(Program::FromPod, &input), Fate::Next(later.clone()), "{protocol}");
            assert_eq!(rig.observe(Program::FromPod, &input).hash, 0);
            let input = Input { ingress: POD_IF, ..framed(UPLINK, later.clone()) };
            assert_eq!(rig.fate(Program::ToUplink, &input), Fate::Drop(DropReason::Fragment));
        }
        let answers = in_three(&back(server, egress));
        for later in &answers[1..] {
            let dropped = Fate::Drop(DropReason::Fragment);
            assert_eq!(rig.fate(Program::FromTunnel, &tunnel(later.clone())), dropped);
            assert_eq!(rig.fate(Program::FromUplink, &framed(UPLINK, later.clone())), dropped);
        }

        // After it they follow it, in any order, with the addresses changed and nothing else.
        let expected = in_three(&out(egress, server).hop());
        for nth in [0, 2, 1] {
            let fate = rig.fate(Program::FromPod, &framed(POD_IF, sent[nth].clone()));
            assert_eq!(
                fate,
                Fate::Redirect(expected[nth].clone()),
                "{protocol}, fragment {nth} from {}",
                f.pod
            );
        }
        let delivered = in_three(&back(server, pod).hop());
        for nth in [0, 2, 1] {
            let fate = rig.fate(Program::FromTunnel, &tunnel(answers[nth].clone()));
            assert_eq!(
                fate,
                Fate::Redirect(delivered[nth].clone()),
                "{protocol}, fragment {nth} to {}",
                f.pod
            );
        }
        // Of another datagram they are not.
        let others = in_three(&Built { id: 0x4321, ..out(pod, server) });
        let fate = rig.fate(Program::FromPod, &framed(POD_IF, others[1].clone()));
        assert_eq!(fate, Fate::Next(others[1].clone()));

        // Two seconds later its identification may be another's.
        let mut state = rig.kernel.state();
        assert_eq!(state.fragments.len(), 2, "{:?}", state.fragments);
        state.fragments.values_mut().for_each(|head| head.seen = head.seen.wrapping_sub(seconds(2) + 1));
        rig.kernel.write_state(&state);
        let fate = rig.fate(Program::FromPod, &framed(POD_IF, sent[1].clone()));
        assert_eq!(fate, Fate::Next(sent[1].clone()));
        let dropped = Fate::Drop(DropReason::Fragment);
        assert_eq!(rig.fate(Program::FromTunnel, &tunnel(answers[1].clone())), dropped);
    }
}

#[test]
fn a_flow_may_begin_in_fragments() {
    let mut rig = Rig::new(&tables(B));
    for (f, (protocol, [out, _], remote_port)) in
        FAMILIES.iter().flat_map(|f| [DATAGRAMS[1], DATAGRAMS[2]].map(move |datagram| (f, datagram)))
    {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, remote_port));
        let sent = in_three(&out(pod, server));
        for frame in &sent {
            let fate = rig.fate(Program::FromPod, &framed(POD_IF, frame.clone()));
            assert_eq!(fate, Fate::Next(frame.clone()), "{protocol}: the host's stack gets all of them");
        }
        // As the host's stack masqueraded them; the first has the token, the others have none.
        let at_uplink = in_three(&out((f.nodes[0], MASQUERADE), server));
        let mut hash = rig.token();
        let mut came = vec![];
        for frame in &at_uplink {
            let input = Input { hash, ingress: POD_IF, ..framed(UPLINK, frame.clone()) };
            came.push(rig.fate(Program::ToUplink, &input));
            hash = 0;
        }
        let port = rig.port();
        let expected = in_three(&out((f.egress, port), server));
        assert_eq!(
            came,
            expected.into_iter().map(Fate::Redirect).collect::<Vec<_>>(),
            "{protocol} from {}",
            f.pod
        );
    }
}

#[test]
fn sctp_is_not_translated_in_fragments() {
    let mut rig = Rig::new(&tables(B));
    for f in FAMILIES {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, 3868));
        rig.walk_up(&sctp(pod, server, INIT), &sctp(pod, server, INIT));
        let egress = (f.egress, rig.port());
        let dropped = Fate::Drop(DropReason::Fragment);
        let data = |from, to| in_three(&sctp(from, to, DATA).payload(&LONG));
        let first = framed(POD_IF, data(pod, server).swap_remove(0));
        assert_eq!(rig.fate(Program::FromPod, &first), dropped);
        for frame in data(server, egress) {
            let input = Input { tunnel: Some((NODE_B, VNI)), ..framed(TUNNEL, frame) };
            assert_eq!(rig.fate(Program::FromTunnel, &input), dropped);
        }
        // The host's stack fragments what came whole, and with it the token.
        let whole = sctp(pod, (f.server, 3869), INIT).payload(&LONG);
        assert_eq!(rig.fate(Program::FromPod, &from_pod(&whole)), Fate::Next(whole.frame()));
        let hash = rig.token();
        let frame = in_three(&whole).swap_remove(0);
        let input = Input { hash, ingress: POD_IF, ..framed(UPLINK, frame) };
        assert_eq!(rig.fate(Program::ToUplink, &input), dropped);
    }
}

#[test]
fn sctp_leaves_a_checksum_to_the_device_that_the_pod_left_to_it() {
    let mut rig = Rig::new(&tables(B));
    for f in FAMILIES {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, 3868));
        rig.walk_up(&sctp(pod, server, INIT), &sctp(pod, server, INIT));
        let egress = (f.egress, rig.port());
        let header = if f.pod.is_v4() { 34 } else { 54 };
        let unset = |packet: &Built| {
            let mut frame = packet.frame();
            frame[header + 8..header + 12].fill(0);
            frame
        };
        let sent = framed(POD_IF, unset(&sctp(pod, server, DATA)));
        let expected = unset(&sctp(egress, server, DATA).hop());
        assert_eq!(rig.fate(Program::FromPod, &sent), Fate::Redirect(expected));
    }
}

#[test]
fn a_sum_that_a_device_has_taken_stays_right() {
    let mut rig = Rig::new(&tables(B));
    for (f, (protocol, [first, later, back], remote_port)) in
        FAMILIES.iter().flat_map(|f| PROTOCOLS.map(|protocol| (f, protocol)))
    {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, remote_port));
        rig.walk_up(&first(pod, server), &first(pod, server));
        let egress = (f.egress, rig.port());
        let kind = if f.pod.is_v4() { 3 } else { 1 };
        // Nobody looks at the sum of what has a checksum of its own kind.
        if protocol != "sctp" {
            let out = rig.kernel.keeps_the_sum(Program::FromPod, &from_pod(&later(pod, server)));
            assert!(out, "{protocol} from {}", f.pod);
            let reply = from_tunnel(&back(server, egress));
            assert!(rig.kernel.keeps_the_sum(Program::FromTunnel, &reply), "{protocol} to {}", f.pod);
        }
        let error = from_tunnel(&error(f.router, f.egress, kind, &first(egress, server), 80));
        assert!(rig.kernel.keeps_the_sum(Program::FromTunnel, &error), "{protocol}'s error to {}", f.pod);
        if let Some((_, [out, back], _)) = DATAGRAMS.into_iter().find(|datagram| datagram.0 == protocol) {
            for frame in in_three(&out(pod, server)) {
                let kept = rig.kernel.keeps_the_sum(Program::FromPod, &framed(POD_IF, frame));
                assert!(kept, "a fragment of {protocol} from {}", f.pod);
            }
            for frame in in_three(&back(server, egress)) {
                let input = Input { tunnel: Some((NODE_B, VNI)), ..framed(TUNNEL, frame) };
                let kept = rig.kernel.keeps_the_sum(Program::FromTunnel, &input);
                assert!(kept, "a fragment of {protocol} to {}", f.pod);
            }
        }
    }
}

/// An extension header of eight bytes: padding (RFC 8200, 4.2).
const PADDED: [u8; 7] = [0, 1, 4, 0, 0, 0, 0];
/// One of sixteen.
const PADDED_LONG: [u8; 15] = [1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A routing header, all of whose segments are behind it.
const ROUTED: [u8; 7] = [0, 4, 0, 0, 0, 0, 0];
/// A fragment header that says "all of it" (RFC 6946).
const ATOMIC: [u8; 7] = [0, 0, 0, 1, 2, 3, 4];

/// A packet with extension headers before what it carries.
fn extended(packet: Built, extensions: &[(u8, &[u8])]) -> Built {
    extensions.iter().fold(packet, |packet, (kind, bytes)| packet.extension(*kind, bytes))
}

#[test]
fn extension_headers_are_looked_behind() {
    let mut rig = Rig::new(&tables(B));
    let chains: [&[(u8, &[u8])]; 9] = [
        &[(HOP_BY_HOP, &PADDED)],
        &[(DESTINATION_OPTIONS, &PADDED_LONG)],
        &[(ROUTING, &ROUTED)],
        &[(FRAGMENT, &ATOMIC)],
        &[(FRAGMENT, &ATOMIC), (DESTINATION_OPTIONS, &PADDED)],
        &[
            (DESTINATION_OPTIONS, &PADDED_LONG),
            (DESTINATION_OPTIONS, &PADDED),
            (FRAGMENT, &ATOMIC),
            (DESTINATION_OPTIONS, &PADDED),
        ],
        &[
            (HOP_BY_HOP, &PADDED_LONG),
            (ROUTING, &ROUTED),
            (FRAGMENT, &ATOMIC),
            (DESTINATION_OPTIONS, &PADDED),
        ],
        &[(DESTINATION_OPTIONS, &PADDED), (ROUTING, &ROUTED), (DESTINATION_OPTIONS, &PADDED_LONG)],
        &[(HOP_BY_HOP, &PADDED), (DESTINATION_OPTIONS, &PADDED), (DESTINATION_OPTIONS, &PADDED_LONG)],
    ];
    for (chain, (protocol, [first, later, back], remote_port)) in
        chains.into_iter().flat_map(|chain| PROTOCOLS.map(|protocol| (chain, protocol)))
    {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((V6.pod, 40000), (V6.server, remote_port));
        let with = |packet| extended(packet, chain);
        // What is for routers to look at is for the host's stack.
        let for_routers = chain.iter().any(|(kind, _)| [HOP_BY_HOP, ROUTING].contains(kind));
        let came = |packet: Built| redirected(&if for_routers { into_uplink(&packet) } else { packet.hop() });
        let up = rig.walk_up(&with(first(pod, server)), &with(first((V6.nodes[0], MASQUERADE), server)));
        let out = (V6.egress, rig.port());
        assert_eq!(up, redirected(&with(first(out, server))), "{protocol} behind {chain:?}");
        let (sent, translated) = (with(later(pod, server)), with(later(out, server)));
        if for_routers {
            let up = rig.walk_up(&sent, &sent);
            assert_eq!(up, redirected(&translated), "{protocol} behind {chain:?}");
        } else {
            let fate = rig.fate(Program::FromPod, &from_pod(&sent));
            assert_eq!(fate, redirected(&translated.hop()), "{protocol} behind {chain:?}");
        }
        let reply = with(back(server, out));
        let fate = rig.fate(Program::FromTunnel, &from_tunnel(&reply));
        assert_eq!(fate, came(with(back(server, pod))), "{protocol} behind {chain:?}");
        let by_uplink = rig.fate(Program::FromUplink, &from_uplink(&reply));
        let expected = if for_routers { Fate::Next(with(back(server, pod)).frame()) } else { fate };
        assert_eq!(by_uplink, expected, "{protocol} behind {chain:?}");
        let quoting = |to: Ip, about: End| {
            let mut quoted = first(about, server);
            if about.0 == V6.pod {
                keep_checksum(&mut quoted, &first(out, server));
            }
            with(error(V6.router, to, 1, &quoted, 60))
        };
        let fate = rig.fate(Program::FromTunnel, &from_tunnel(&quoting(V6.egress, out)));
        assert_eq!(fate, came(quoting(V6.pod, pod)), "{protocol}'s error behind {chain:?}");
        assert_eq!(rig.port(), out.1, "{protocol} behind {chain:?}: one flow all the time");
    }
}

#[test]
fn fragments_behind_and_before_other_extension_headers() {
    let mut rig = Rig::new(&tables(B));
    let (pod, server) = ((V6.pod, 40000), (V6.server, 53));
    rig.walk_up(&udp(pod, server), &udp(pod, server));
    let out = (V6.egress, rig.port());
    // What is before the fragment header is in every fragment; what is behind it is in the first only.
    let before: Build = |f, t| {
        let chain: [(u8, &[u8]); 2] = [(DESTINATION_OPTIONS, &PADDED), (DESTINATION_OPTIONS, &PADDED_LONG)];
        extended(udp(f, t).payload(&LONG), &chain)
    };
    let behind: Build = |f, t| {
        let datagram = udp(f, t).payload(&LONG).frame();
        raw(f.0, t.0, DESTINATION_OPTIONS, &[&[17], &PADDED[..], &datagram[54..]].concat())
    };
    let tunnelled = |frame| Input { tunnel: Some((NODE_B, VNI)), ..framed(TUNNEL, frame) };
    for datagram in [before, behind] {
        let expected = in_three(&datagram(out, server).hop());
        for (sent, expected) in in_three(&datagram(pod, server)).into_iter().zip(expected) {
            assert_eq!(rig.fate(Program::FromPod, &framed(POD_IF, sent)), Fate::Redirect(expected));
        }
        let expected = in_three(&datagram(server, pod).hop());
        for (sent, expected) in in_three(&datagram(server, out)).into_iter().zip(expected) {
            assert_eq!(rig.fate(Program::FromTunnel, &tunnelled(sent)), Fate::Redirect(expected));
        }
    }
    // What is for routers to look at makes the host's stack the way of all of them, later ones behind their first.
    let for_routers: Build = |f, t| {
        let chain: [(u8, &[u8]); 2] = [(HOP_BY_HOP, &PADDED), (ROUTING, &ROUTED)];
        Built { id: 77, ..extended(udp(f, t).payload(&LONG), &chain) }
    };
    let sent = in_three(&for_routers(pod, server));
    for frame in &sent {
        let fate = rig.fate(Program::FromPod, &framed(POD_IF, frame.clone()));
        assert_eq!(fate, Fate::Next(frame.clone()));
    }
    let mut hash = rig.token();
    for (frame, expected) in sent.into_iter().zip(in_three(&for_routers(out, server))) {
        let input = Input { hash, ingress: POD_IF, ..framed(UPLINK, frame) };
        assert_eq!(rig.fate(Program::ToUplink, &input), Fate::Redirect(expected));
        hash = 0; // the later ones have none
    }
    let expected = in_three(&into_uplink(&for_routers(server, pod)));
    for (sent, expected) in in_three(&for_routers(server, out)).into_iter().zip(expected) {
        assert_eq!(rig.fate(Program::FromTunnel, &tunnelled(sent)), Fate::Redirect(expected));
    }
    assert_eq!(rig.port(), out.1, "one flow all the time");
}

/// One extension header more than are looked behind.
const FIVE: [(u8, &[u8]); 5] = [(DESTINATION_OPTIONS, &PADDED); 5];
/// Its destination is not where it goes in the end.
const SEGMENTS_LEFT: (u8, &[u8]) = (ROUTING, &[0, 4, 1, 0, 0, 0, 0]);
/// A fragment header that says "more follow".
const FIRST: (u8, &[u8]) = (FRAGMENT, &[0, 0, 1, 1, 2, 3, 4]);
/// It is longer than the packet.
const BEYOND: (u8, &[u8]) = (DESTINATION_OPTIONS, &[200, 1, 4, 0, 0, 0, 0]);

/// With this payload length.
fn cut(mut frame: Vec<u8>, payload: u8) -> Vec<u8> {
    frame[18..20].copy_from_slice(&[0, payload]);
    frame
}

/// How a frame is built of its ends.
type BuildFrame = fn(End, End) -> Vec<u8>;

#[test]
fn what_cannot_be_told_of_ipv6() {
    let mut rig = Rig::new(&tables(B));
    let (pod, server) = ((V6.pod, 40000), (V6.server, 53));
    rig.walk_up(&udp(pod, server), &udp(pod, server));
    let out = (V6.egress, rig.port());
    let mapped = |at: usize, packet: Built| {
        let mut frame = packet.frame();
        frame[at..at + 16].copy_from_slice(&POD.octets);
        frame
    };
    let cases: [(DropReason, BuildFrame); 11] = [
        (DropReason::Protocol, |f, t| extended(udp(f, t), &FIVE).frame()),
        (DropReason::Protocol, |f, t| extended(udp(f, t), &[SEGMENTS_LEFT]).frame()),
        (DropReason::Malformed, |f, t| extended(udp(f, t), &[BEYOND]).frame()),
        (DropReason::Protocol, |f, t| cut(extended(udp(f, t), &[(HOP_BY_HOP, &PADDED)]).frame(), 7)),
        (DropReason::Malformed, |f, t| cut(extended(udp(f, t), &[(HOP_BY_HOP, &PADDED)]).frame(), 15)),
        (DropReason::Malformed, |f, t| cut(udp(f, t).frame(), 7)),
        (DropReason::Malformed, |f, t| cut(tcp(f, t, ACK).frame(), 19)),
        // Only many segments in one may say that they have no length.
        (DropReason::Malformed, |f, t| cut(udp(f, t).frame(), 0)),
        (DropReason::Protocol, |f, t| extended(udp(f, t), &[FIRST, (FRAGMENT, &ATOMIC)]).frame()),
        (DropReason::Protocol, |f, t| raw(f.0, t.0, 59, b"no next header").frame()),
        // ICMP of the other family is a protocol like any other.
        (DropReason::Protocol, |f, t| raw(f.0, t.0, 1, &[8, 0, 0, 0, 0, 1, 0, 1]).frame()),
    ];
    for (nth, (reason, build)) in cases.into_iter().enumerate() {
        let fate = rig.fate(Program::FromPod, &framed(POD_IF, build(pod, server)));
        assert_eq!(fate, Fate::Drop(reason), "case {nth}, from the pod");
        let fate = rig.fate(Program::FromUplink, &framed(UPLINK, build(server, out)));
        assert_eq!(fate, Fate::Drop(reason), "case {nth}, to the pod");
    }
    // Addresses that stand for IPv4 here: at the source such a packet would be the IPv4 pod's.
    for at in [22, 38] {
        let frame = mapped(at, udp(pod, server));
        assert_eq!(rig.fate(Program::FromPod, &framed(POD_IF, frame)), Fate::Drop(DropReason::Malformed));
    }
    let mut to_v4 = udp(server, out).frame();
    to_v4[38..54].copy_from_slice(&EGRESS.octets);
    assert_eq!(rig.fate(Program::FromUplink, &framed(UPLINK, to_v4)), Fate::Drop(DropReason::Malformed));
    // What is not IPv6, or shorter than it says, is the kernel's to refuse.
    let good = udp(pod, server).frame();
    for (at, value) in [(14, 0x45), (19, 200)] {
        let mut frame = good.clone();
        frame[at] = value;
        let fate = rig.fate(Program::FromPod, &framed(POD_IF, frame.clone()));
        assert_eq!(fate, Fate::Next(frame), "{at}: {value:#x}");
    }
}

/// The frame of an answer to `sent`: turned round, without a flow label.
fn answer(sent: &Built, packet: Built) -> Vec<u8> {
    let [to, from] = sent.macs;
    let mut frame = Built { macs: [from, to], ..packet }.frame();
    verify_checksums(&frame).expect("the expected packet is right");
    frame[14..18].copy_from_slice(&[0x60, 0, 0, 0]);
    frame
}

#[test]
fn packet_too_big_of_ipv6() {
    let mut t = tables(B);
    t.settings.router_v6 = V6.nodes[0];
    let mut rig = Rig::new(&t);
    let data = |len: usize| (0..len).map(|i| i as u8).collect::<Vec<_>>();
    let (pod, server) = ((V6.pod, 40000), (V6.server, 53));
    let extension: &[(u8, &[u8])] = &[(HOP_BY_HOP, &PADDED), (FRAGMENT, &ATOMIC)];
    for len in [1451, 1452, 1454, 3000] {
        for big in [
            udp(pod, server).payload(&data(len - 48)),
            tcp(pod, server, ACK).payload(&data(len - 60)),
            echo(V6.pod, V6.server, true, 7).payload(&data(len - 48)),
            extended(udp(pod, server).payload(&data(len - 64)), extension),
            Built { padding: 3, ..udp(pod, server).payload(&data(len - 48)) },
        ] {
            // As much of the packet as 1,280 bytes hold (RFC 4443, 2.4).
            let message = [&[2, 0, 0, 0, 0, 0, 5, 0xaa][..], &big.frame()[14..14 + 1232]].concat();
            let error = summed(V6.nodes[0], V6.pod, 58, &message, 2);
            let fate = rig.fate(Program::FromPod, &from_pod(&big));
            assert_eq!(fate, Fate::Answer(DropReason::TooBig, answer(&big, error)), "{len} bytes");
        }
        // What its sender has cut already goes on, and so do packets to the cluster.
        let cut = udp(pod, server).payload(&data(len)).fragments(&[len / 8 * 8]).swap_remove(0);
        assert_eq!(rig.fate(Program::FromPod, &framed(POD_IF, cut.clone())), Fate::Next(cut));
        let inside = from_pod(&udp(pod, (V6.remote_pod, 53)).payload(&data(len - 48)));
        assert_eq!(rig.fate(Program::FromPod, &inside), Fate::Next(inside.frame.clone()));
    }
}

#[test]
fn a_segment_of_no_flow_is_answered_over_ipv6() {
    let mut rig = Rig::new(&tables(B));
    let server = (V6.server, 80);
    let extension: &[(u8, &[u8])] = &[(DESTINATION_OPTIONS, &PADDED_LONG)];
    // The builder's sequence number is 0x01020304, its acknowledgment 0x05060708 (RFC 9293, 3.5.2).
    for (flags, data, extension, seq, ack, answer_flags) in [
        (ACK, &b""[..], &[][..], 0x0506_0708_u32, 0_u32, 4),
        (ACK | FIN, b"last words", &[], 0x0506_0708, 0, 4),
        (SYN | ACK, b"", extension, 0x0506_0708, 0, 4),
        (0, b"odd", &[], 0, 0x0102_0307, 4 | 16),
        (FIN, b"last words", extension, 0, 0x0102_030f, 4 | 16),
    ] {
        let of = |from| extended(tcp(from, server, flags).payload(data), extension);
        let masqueraded = (V6.nodes[0], MASQUERADE);
        let sent = of(masqueraded);
        let fate = rig.walk_up(&of((V6.pod, 40000)), &sent);
        let ports = [80_u16.to_be_bytes(), MASQUERADE.to_be_bytes()].concat();
        let numbers = [seq.to_be_bytes(), ack.to_be_bytes()].concat();
        let rst = [&ports[..], &numbers, &[0x50, answer_flags, 0, 0, 0, 0, 0, 0]].concat();
        let mut expected = answer(&sent, summed(server.0, masqueraded.0, 6, &rst, 16));
        expected[..6].copy_from_slice(&UPLINK_MAC);
        assert_eq!(fate, Fate::Answer(DropReason::NoFlow, expected), "flags {flags:#x}");
    }
}

#[test]
fn what_is_too_big_is_counted_once() {
    let mut t = tables(B);
    (t.settings.router_v4, t.settings.router_v6) = (V4.nodes[0], V6.nodes[0]);
    let mut rig = Rig::new(&t);
    for f in FAMILIES {
        // Without the IP header: of 1,451 bytes in all.
        let payload = vec![7; 1451 - usize::from(f.overhead) + 20 - 8];
        let mut big = udp((f.pod, 40000), (f.server, 53)).payload(&payload);
        if f.pod.is_v4() {
            big = big.fragment(0x4000);
        }
        let fate = rig.fate(Program::FromPod, &from_pod(&big));
        assert!(matches!(fate, Fate::Answer(DropReason::TooBig, _)), "{fate:?}");
        // To a link-layer group there is no answer.
        big.macs[0] = [0x33, 0x33, 0, 0, 0, 1];
        let dropped = Fate::Drop(DropReason::TooBig);
        assert_eq!(rig.fate(Program::FromPod, &from_pod(&big)), dropped);
        // Cut into segments it is as large as those.
        let segments = Input { gso: 1450 - u32::from(f.overhead) + 20 - 8, ..from_pod(&big) };
        assert_eq!(rig.fate(Program::FromPod, &segments), Fate::Next(segments.frame.clone()));
        let segments = Input { gso: segments.gso + 1, ..segments };
        assert_eq!(rig.fate(Program::FromPod, &segments), dropped);
    }
}

/// Without a length, as the kernel has what is too long for the field (BIG TCP; `iph_totlen`, include/net/ip.h).
fn without_length(packet: &Built) -> Vec<u8> {
    let mut frame = packet.frame();
    let field = if packet.source.is_v4() { 16..18 } else { 18..20 };
    frame[field].fill(0);
    if packet.source.is_v4() {
        frame[24..26].fill(0);
        // RFC 1071.
        let words = frame[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let sum = !((words.sum::<u32>() % 0xffff) as u16);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

#[test]
fn many_segments_in_one_need_no_length() {
    let mut rig = Rig::new(&tables(B));
    for f in FAMILIES {
        rig.kernel.write(&tables(B));
        let (pod, server) = ((f.pod, 40000), (f.server, 80));
        rig.walk_up(&tcp(pod, server, SYN), &tcp(pod, server, SYN));
        let out = (f.egress, rig.port());
        let data = vec![7; 3000];
        let of = |from, to| tcp(from, to, ACK).payload(&data);
        let sent = framed(POD_IF, without_length(&of(pod, server)));
        let expected = Fate::Redirect(without_length(&of(out, server).hop()));
        let segments = Input { gso: 1300, ..sent.clone() };
        assert_eq!(rig.fate(Program::FromPod, &segments), expected, "from {}", f.pod);
        let reply = framed(TUNNEL, without_length(&of(server, out)));
        let reply = Input { tunnel: Some((NODE_B, VNI)), ..reply };
        let expected = Fate::Redirect(without_length(&of(server, pod).hop()));
        let segments = Input { gso: 1300, ..reply.clone() };
        assert_eq!(rig.fate(Program::FromTunnel, &segments), expected, "to {}", f.pod);
        // One packet needs it: that of IPv4 is the kernel's to refuse, that of IPv6 has an end, and no header.
        let v4 = f.pod.is_v4();
        let refused = if v4 { Fate::Next(sent.frame.clone()) } else { Fate::Drop(DropReason::Malformed) };
        assert_eq!(rig.fate(Program::FromPod, &sent), refused, "from {}", f.pod);
        let reason = if v4 { DropReason::TunnelNotAllowed } else { DropReason::Malformed };
        assert_eq!(rig.fate(Program::FromTunnel, &reply), Fate::Drop(reason), "to {}", f.pod);
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
        (DropReason::SpoofedSource, OTHER_IF, tcp((V6.pod, 1), (V6.server, 80), SYN)),
        (DropReason::SpoofedSource, POD_IF, tcp((V6.egress, 1), (V6.server, 80), SYN)),
        (DropReason::SpoofedSource, POD_IF, tcp((OTHER_POD, 1), server, SYN)),
        (DropReason::SpoofedSource, POD_IF, tcp((V6.router, 1), (V6.server, 80), SYN)),
        (DropReason::SpoofedSource, POD_IF, tcp((NODE_A, 1), server, SYN)),
        (DropReason::SpoofedSource, OTHER_IF, tcp((NODE_B, 1), server, SYN)),
        (DropReason::SpoofedSource, OTHER_IF, tcp((V6.nodes[0], 1), (V6.server, 80), SYN)),
        (DropReason::TunnelForged, POD_IF, udp((POD, 1), (NODE_B, 4795))),
        (DropReason::TunnelForged, OTHER_IF, udp((OTHER_POD, 1), (NODE_A, 4795))),
        (DropReason::TunnelForged, POD_IF, udp((V6.pod, 1), (V6.nodes[1], 4795))),
        (DropReason::UnknownPod, OTHER_IF, tcp(("fd00:10:244:1::99", 1), (V6.server, 80), SYN)),
        (DropReason::UnknownPod, OTHER_IF, tcp(([10, 244, 1, 99], 1), server, SYN)),
        (DropReason::Protocol, POD_IF, raw(POD, SERVER, 47, b"gre")),
        (DropReason::Fragment, POD_IF, sctp((POD, 1), server, INIT).fragment(0x2000)),
        (DropReason::IcmpType, POD_IF, icmp(POD, SERVER, 13, 1)),
        (DropReason::IcmpType, POD_IF, icmp(V6.pod, V6.server, 135, 1)),
        (DropReason::NoFlow, POD_IF, icmp(POD, SERVER, 0, 1)),
        (DropReason::NoFlow, POD_IF, icmp(V6.pod, V6.server, 129, 1)),
        (DropReason::Malformed, POD_IF, raw(POD, SERVER, 6, &[0; 13])),
        (DropReason::Malformed, POD_IF, raw(POD, SERVER, 17, &[0; 7])),
        (DropReason::Malformed, POD_IF, raw(POD, SERVER, 1, &[8; 7])),
        (DropReason::Malformed, POD_IF, raw(POD, SERVER, 132, &[0; 15])),
        (DropReason::Malformed, POD_IF, raw(V6.pod, V6.server, 58, &[128; 7])),
    ] {
        assert_eq!(rig.fate(Program::FromPod, &input_of(ifindex, &packet)), Fate::Drop(reason), "{packet:?}");
    }
    assert_eq!(rig.kernel.state(), lab::kernel::State::default(), "nothing is kept of what is dropped");
    // Where others may speak as well, a source that nobody knows is no spoofed one; but it is no selected pod's.
    let mut t = tables(B);
    t.interfaces.get_mut(&POD_IF).expect("it is there").guarded = Guard::Guarded as u8;
    rig.kernel.write(&t);
    let unknown = Input { hash: 99, ..from_pod(&tcp(([8, 8, 8, 8], 1), server, SYN)) };
    assert_eq!(rig.fate(Program::FromPod, &unknown), Fate::Next(unknown.frame.clone()));
    assert_eq!(rig.observe(Program::FromPod, &unknown).hash, PASS);
    let egress = from_pod(&tcp((EGRESS, 1), server, SYN));
    assert_eq!(rig.fate(Program::FromPod, &egress), Fate::Drop(DropReason::SpoofedSource));
}

/// The agent learns a bridge's pod by its bridge first, then by its port.
#[test]
fn an_unselected_pods_entry_may_move_while_its_packets_are_under_way() {
    let guarded = |kind: InterfaceKind, bridge| Interface {
        kind: kind as u8,
        guarded: Guard::Guarded as u8,
        bridge,
        ..Interface::default()
    };
    let with_entry_at = |ifindex| {
        let mut t = tables(B);
        t.interfaces.insert(BRIDGE, guarded(InterfaceKind::Bridge, 0));
        t.interfaces.insert(OTHER_IF, guarded(InterfaceKind::Pod, BRIDGE));
        t.pods.get_mut(&OTHER_POD).expect("it is there").ifindex = ifindex;
        t
    };
    let mut rig = Rig::new(&with_entry_at(BRIDGE));
    let sent = udp((OTHER_POD, 4000), (SERVER, 53));
    let masqueraded = to_uplink(&udp((NODE_A, MASQUERADE), (SERVER, 53)));
    for (before, after) in [(BRIDGE, OTHER_IF), (OTHER_IF, BRIDGE), (0, OTHER_IF)] {
        rig.kernel.write(&with_entry_at(before));
        let hash = rig.observe(Program::FromPod, &input_of(OTHER_IF, &sent)).hash;
        assert_eq!(hash, PASS);
        rig.kernel.write(&with_entry_at(after));
        let at_uplink = Input { ingress: BRIDGE, hash, ..masqueraded.clone() };
        assert_eq!(rig.fate(Program::ToUplink, &at_uplink), Fate::Next(masqueraded.frame.clone()));
        let unmarked = Input { hash: 0, ..at_uplink };
        assert_eq!(rig.fate(Program::ToUplink, &unmarked), Fate::Drop(DropReason::TokenLost));
    }
}

#[test]
fn what_may_not_leave_by_the_uplink() {
    let mut t = tables(B);
    let bridge = Interface {
        kind: InterfaceKind::Bridge as u8,
        guarded: Guard::Guarded as u8,
        ..Interface::default()
    };
    t.interfaces.insert(BRIDGE, bridge);
    let mut rig = Rig::new(&t);
    let masqueraded = to_uplink(&tcp((NODE_A, MASQUERADE), (SERVER, 80), SYN));
    let lost = Input { hash: 12345, ..masqueraded.clone() };
    assert_eq!(rig.fate(Program::ToUplink, &lost), Fate::Drop(DropReason::TokenLost));
    let unknown = Input { ingress: PORT, ..masqueraded.clone() };
    assert_eq!(rig.fate(Program::ToUplink, &unknown), Fate::Drop(DropReason::UnknownInterface));
    let forged = to_uplink(&udp((NODE_A, MASQUERADE), (NODE_B, 4795)));
    assert_eq!(rig.fate(Program::ToUplink, &forged), Fate::Drop(DropReason::TunnelForged));
    // An ACK of no flow: with its token it is known whose it is.
    let ack = tcp((POD, 1), (SERVER, 80), ACK | FIN);
    let fate = rig.walk_up(&ack, &ack);
    assert!(matches!(fate, Fate::Answer(DropReason::NoFlow, _)), "{fate:?}");
    let abort = sctp((POD, 1), (SERVER, 80), DATA);
    assert_eq!(rig.walk_up(&abort, &abort), Fate::Drop(DropReason::NoFlow), "only TCP is answered");
    // What a program has translated does not come out of a bridge.
    for f in FAMILIES {
        let translated = to_uplink(&tcp((f.egress, 1664), (f.server, 80), ACK));
        let spoofed = Input { ingress: BRIDGE, ..translated.clone() };
        assert_eq!(rig.fate(Program::ToUplink, &spoofed), Fate::Drop(DropReason::SpoofedSource));
        let unknown = Input { ingress: PORT, ..translated.clone() };
        assert_eq!(rig.fate(Program::ToUplink, &unknown), Fate::Drop(DropReason::UnknownInterface));
        assert_eq!(rig.fate(Program::ToUplink, &translated), Fate::Next(translated.frame.clone()));
    }
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
        (DropReason::Fragment, tcp(server, (EGRESS, 1024), ACK).fragment(100)),
        (DropReason::NoRange, tcp((V6.server, 80), (V6.egress, 40000), SYN)),
        (DropReason::NoReplyFlow, tcp((V6.server, 80), (V6.egress, 1024), SYN)),
        (DropReason::NoReplyFlow, icmp(V6.server, V6.egress, 128, 1)),
        (DropReason::IcmpType, icmp(V6.server, V6.egress, 1, 1)),
        (DropReason::Protocol, raw(V6.server, V6.egress, 47, b"gre")),
        (DropReason::Malformed, raw(SERVER, EGRESS, 6, &[0; 13])),
    ] {
        assert_eq!(rig.fate(Program::FromUplink, &from_uplink(&packet)), Fate::Drop(reason), "{packet:?}");
    }
    let mut tunnelled =
        |packet: &Built, tunnel| rig.fate(Program::FromTunnel, &Input { tunnel, ..from_tunnel(packet) });
    let out = tcp((EGRESS, 1664), server, ACK);
    for (reason, packet, tunnel) in [
        (DropReason::UnknownTunnelPeer, &out, None),
        (DropReason::UnknownTunnelPeer, &out, Some((SERVER, VNI))),
        (DropReason::UnknownTunnelPeer, &out, Some((NODE_B, VNI + 1))),
        (DropReason::UnknownTunnelPeer, &out, Some((NODE_A, VNI))),
        (DropReason::TunnelNotAllowed, &tcp((EGRESS, 1024), server, ACK), Some((NODE_B, VNI))),
        (DropReason::TunnelNotAllowed, &tcp((POD, 1), server, SYN), Some((NODE_B, VNI))),
        (DropReason::TunnelNotAllowed, &tcp(server, (EGRESS, 1664), ACK), Some((NODE_B, VNI))),
        (DropReason::UnknownTunnelPeer, &out, Some((V6.nodes[1], VNI))),
        (DropReason::TunnelNotAllowed, &tcp((V6.egress, 1024), (V6.server, 80), ACK), Some((NODE_B, VNI))),
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
    for frame in [v6, with(14, 0x44), with(14, 0x65), with(17, 200), with(17, 19), with(17, 0)] {
        for (program, ifindex) in
            [(Program::FromPod, POD_IF), (Program::ToUplink, UPLINK), (Program::FromUplink, UPLINK)]
        {
            let input =
                Input { frame: frame.clone(), ifindex, ingress: POD_IF, mark: MARK, ..Input::default() };
            assert_eq!(rig.fate(program, &input), Fate::Next(frame.clone()), "{program:?}");
        }
        let tunnelled = Input { frame, ifindex: TUNNEL, tunnel: Some((NODE_B, VNI)), ..Input::default() };
        assert_eq!(rig.fate(Program::FromTunnel, &tunnelled), Fate::Drop(DropReason::TunnelNotAllowed));
    }
    let other = input_of(OTHER_IF, &udp((OTHER_POD, 1), (SERVER, 2)));
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
