//! Answers that the programs make themselves: neighbour discovery, "too big", RST. Every expected packet is built
//! from nothing.

use std::net::Ipv6Addr;

use datapath::addr::Ip;
use datapath::keys::{
    Delivery, DeliveryMode, EgressIp, Interface, InterfaceKind, NetworkKey, NetworkKind, Pod, Policy,
    Settings,
};
use datapath::memory::Memory;
use datapath::packet::{ACK, FIN, RST, SYN};
use datapath::verdict::DropReason;
use lab::kernel::{
    Input, Kernel, Program, Verdict, enter_node_network,
    interfaces::{POD as POD_IF, SECOND_UPLINK, UPLINK},
};
use lab::packet::{Built, Transport, icmp, raw, tcp, udp, verify_checksums};

const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0xa, 2];
const ASKER_MAC: [u8; 6] = [2, 0, 0, 0, 0xb, 1];
const EGRESS: &str = "2001:db8:18::100";
const OTHERS_EGRESS: &str = "2001:db8:18::101";
const SECOND_EGRESS: &str = "2001:db8:19::100";
const ROUTER: &str = "2001:db8:18::1";
const ICMPV6: u8 = 58;
const POD: [u8; 4] = [10, 244, 1, 10];
const REMOTE_POD: [u8; 4] = [10, 244, 2, 10];
const NODE: [u8; 4] = [172, 18, 0, 11];
const SERVER: [u8; 4] = [203, 0, 113, 5];
const MTU: u16 = 1450;
/// "Don't fragment".
const DF: u16 = 0x4000;

/// `POD` is selected. Node 1 holds `EGRESS` on the uplink and `SECOND_EGRESS` on the second, node 2 holds `OTHERS_EGRESS`.
fn tables() -> Memory {
    let mut t = Memory::new(1, 64);
    let router_v4 = Ip::v4(NODE);
    t.settings = Settings { node: 1, mtu: MTU, pass_token: 7, router_v4, ..Settings::default() };
    t.pods.insert(Ip::v4(POD), Pod { id: 1, policy: 1, ifindex: POD_IF, firewall: 0 });
    let mode = DeliveryMode::Peer as u8;
    let delivery = Delivery { ip: Ip::v4(POD), ifindex: POD_IF, mode, ..Delivery::default() };
    t.delivery.insert(1, delivery);
    let pods = NetworkKey { prefix_len: 96 + 16, ip: Ip::v4([10, 244, 0, 0]) };
    t.networks.insert(pods, NetworkKind::Pods as u32);
    let mut policy = Policy { len: 1, ..Policy::default() };
    policy.egress[0] = 4;
    t.policies.insert(1, policy);
    let facing = Interface { kind: InterfaceKind::Pod as u8, guarded: 1, ..Interface::default() };
    t.interfaces.insert(POD_IF, facing);
    for (id, ip, uplink, holder) in [
        (1, ip(EGRESS), UPLINK, 1),
        (2, ip(OTHERS_EGRESS), UPLINK, 2),
        (3, ip(SECOND_EGRESS), SECOND_UPLINK, 1),
        (4, Ip::v4([172, 18, 0, 100]), UPLINK, 1),
    ] {
        t.egress_addrs.insert(ip, id);
        t.egress_ips.insert(id, EgressIp { ip, policy: 1, uplink, holder, ..EgressIp::default() });
    }
    let interface = Interface { kind: InterfaceKind::Uplink as u8, mac: UPLINK_MAC, ..Interface::default() };
    t.interfaces.insert(UPLINK, interface);
    t
}

fn address(text: &str) -> Ipv6Addr {
    text.parse().expect("an IPv6 address")
}

fn ip(text: &str) -> Ip {
    Ip::from(address(text))
}

/// Sum of 16-bit words (RFC 1071), folded.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A packet of `ICMPv6` in a frame; its checksum is made right.
fn icmpv6(macs: [[u8; 6]; 2], source: &str, destination: &str, hop_limit: u8, message: &[u8]) -> Vec<u8> {
    let (source, destination) = (address(source).octets(), address(destination).octets());
    let length = (message.len() as u16).to_be_bytes();
    let mut message = message.to_vec();
    message[2..4].fill(0);
    let pseudo = [&source[..], &destination, &[0, 0], &length, &[0, 0, 0, ICMPV6], &message].concat();
    message[2..4].copy_from_slice(&(!sum(&pseudo)).to_be_bytes());
    let [to, from] = macs;
    let header = [0x60, 0, 0, 0, length[0], length[1], ICMPV6, hop_limit];
    [&to[..], &from, &[0x86, 0xdd], &header, &source, &destination, &message].concat()
}

/// The destination of a question about an address, and its link-layer address (RFC 4291, 2.7.1).
fn solicited_node(target: &str) -> (String, [u8; 6]) {
    let [.., a, b, c] = address(target).octets();
    (format!("ff02::1:ff{a:02x}:{b:02x}{c:02x}"), [0x33, 0x33, 0xff, a, b, c])
}

/// A solicitation with these options, to the target's group.
fn ask(source: &str, target: &str, options: &[u8]) -> Vec<u8> {
    let (group, mac) = solicited_node(target);
    let message = [&[135, 0, 0, 0, 0, 0, 0, 0], &address(target).octets()[..], options].concat();
    icmpv6([mac, ASKER_MAC], source, &group, 255, &message)
}

/// An advertisement of `EGRESS`.
fn told(to: (&str, [u8; 6]), flags: u8) -> Vec<u8> {
    let head = [136, 0, 0, 0, flags, 0, 0, 0];
    let message = [&head, &address(EGRESS).octets()[..], &[2, 1], &UPLINK_MAC].concat();
    icmpv6([to.1, UPLINK_MAC], EGRESS, to.0, 255, &message)
}

/// The option with the asker's link-layer address.
fn own_address() -> Vec<u8> {
    [&[1, 1], &ASKER_MAC[..]].concat()
}

struct Rig {
    kernel: Kernel,
}

impl Rig {
    fn new(tables: &Memory) -> Self {
        enter_node_network();
        let mut kernel = Kernel::load(64);
        kernel.write(tables);
        Self { kernel }
    }

    /// What becomes of a packet; nothing is dropped, and what is answered because it is too big is counted.
    fn run(&mut self, program: Program, ifindex: u32, frame: &[u8]) -> (Verdict, Vec<u8>) {
        let before = self.kernel.drops();
        let (verdict, output) =
            self.kernel.run(program, &Input { frame: frame.to_vec(), ifindex, ..Input::default() });
        for reason in DropReason::ALL {
            let i = *reason as usize;
            let answered = u64::from(
                *reason == DropReason::TooBig && program == Program::FromPod && verdict == Verdict::Redirect,
            );
            assert_eq!(before[i].packets + answered, self.kernel.drops()[i].packets, "{}", reason.name());
        }
        (verdict, output.frame)
    }
}

#[test]
fn neighbours_are_told_where_an_egress_ip_is() {
    let mut rig = Rig::new(&tables());
    let answer = (Verdict::Redirect, told((ROUTER, ASKER_MAC), 0x60));
    // As it is asked by RFC 4861; with a nonce beside (RFC 7527), which is cut off; without any option.
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    for options in [own_address(), [own_address(), nonce.to_vec()].concat(), vec![]] {
        assert_eq!(
            rig.run(Program::FromUplink, UPLINK, &ask(ROUTER, EGRESS, &options)),
            answer,
            "{options:?}"
        );
    }
    // A probe whether it is still there comes to the address itself (RFC 4861, 7.3.3).
    let message = [&[135, 0, 0, 0, 0, 0, 0, 0], &address(EGRESS).octets()[..]].concat();
    let probe = icmpv6([UPLINK_MAC, ASKER_MAC], ROUTER, EGRESS, 255, &message);
    assert_eq!(rig.run(Program::FromUplink, UPLINK, &probe), answer);
    // Padding that Ethernet might add is no part of the packet.
    let padded = [probe, vec![0xa5; 11]].concat();
    assert_eq!(rig.run(Program::FromUplink, UPLINK, &padded), answer);
    let link_local = told(("fe80::b:1", ASKER_MAC), 0x60);
    let asked = ask("fe80::b:1", EGRESS, &own_address());
    assert_eq!(rig.run(Program::FromUplink, UPLINK, &asked), (Verdict::Redirect, link_local));
}

#[test]
fn who_tries_an_egress_ip_for_himself_hears_that_it_is_taken() {
    let mut rig = Rig::new(&tables());
    let answer = told(("ff02::1", [0x33, 0x33, 0, 0, 0, 1]), 0x20);
    for options in [&[][..], &[14, 1, 1, 2, 3, 4, 5, 6]] {
        let asked = ask("::", EGRESS, options);
        assert_eq!(rig.run(Program::FromUplink, UPLINK, &asked), (Verdict::Redirect, answer.clone()));
    }
}

#[test]
fn other_neighbour_discovery_is_the_kernels() {
    let mut rig = Rig::new(&tables());
    let sound = ask(ROUTER, EGRESS, &own_address());
    let with = |at: usize, value: u8| {
        let mut frame = sound.clone();
        frame[at] = value;
        frame
    };
    let group = solicited_node(EGRESS);
    let message = |kind: u8, code: u8, options: &[u8]| {
        [&[kind, code, 0, 0, 0, 0, 0, 0], &address(EGRESS).octets()[..], options].concat()
    };
    let sent = |hop_limit, message: &[u8]| icmpv6([group.1, ASKER_MAC], ROUTER, &group.0, hop_limit, message);
    let mut long = vec![];
    (0..17).for_each(|_| long.extend([14, 1, 1, 2, 3, 4, 5, 6]));
    for (what, frame) in [
        ("another's", ask(ROUTER, OTHERS_EGRESS, &own_address())),
        ("nobody's", ask(ROUTER, "2001:db8:18::7", &own_address())),
        ("held on another uplink", ask(ROUTER, SECOND_EGRESS, &own_address())),
        ("an announcement of it by somebody else", sent(255, &message(136, 0, &own_address()))),
        ("its own question", ask(EGRESS, EGRESS, &own_address())),
        ("from a group", ask("ff02::1", EGRESS, &own_address())),
        ("passed a router", sent(254, &message(135, 0, &own_address()))),
        ("another code", sent(255, &message(135, 1, &own_address()))),
        ("damaged", with(85, 0xee)),
        ("longer than the frame", with(19, 40)),
        ("shorter than a solicitation", with(19, 16)),
        ("cut within an option", with(19, 30)),
        ("an option without length", sent(255, &message(135, 0, &[1, 0, 0, 0, 0, 0, 0, 0]))),
        ("an option beyond the end", sent(255, &message(135, 0, &[1, 2, 0, 0, 0, 0, 0, 0]))),
        ("more options than are read", sent(255, &message(135, 0, &long))),
        ("nobody with a link-layer address", ask("::", EGRESS, &own_address())),
        ("cut short", sound[..70].to_vec()),
    ] {
        assert_eq!(rig.run(Program::FromUplink, UPLINK, &frame), (Verdict::Next, frame), "{what}");
    }
}

/// The frame that goes back, after the Ethernet header, to the sender of `sent`.
fn back(sent: &Built, packet: &Built) -> Vec<u8> {
    let [to, from] = sent.macs;
    let frame = Built { macs: [from, to], fragment: DF, ..packet.clone() }.frame();
    verify_checksums(&frame).expect("the expected packet is right");
    // The builder numbers packets; what may not be fragmented needs no number.
    let mut frame = frame;
    frame[18..20].fill(0);
    frame
}

/// With the IP header's checksum made right.
fn summed(mut frame: Vec<u8>) -> Vec<u8> {
    frame[24..26].fill(0);
    let checksum = !sum(&frame[14..34]);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// "Fragmentation needed" about a packet: class 0xc0, and as much of the packet as 576 bytes hold.
fn needs_fragmentation(sent: &Built) -> Vec<u8> {
    let frame = sent.frame();
    let ip = &frame[14..frame.len() - sent.padding];
    let quoted = &ip[..ip.len().min(548)];
    let [high, low] = MTU.to_be_bytes();
    let mut message = [&[3, 4, 0, 0, 0, 0, high, low], quoted].concat();
    let checksum = !sum(&message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = back(sent, &raw(NODE, POD, 1, &message));
    frame[15] = 0xc0;
    summed(frame)
}

#[test]
fn what_is_too_big_and_may_not_be_fragmented_is_answered() {
    let mut rig = Rig::new(&tables());
    let data = |len: usize| (0..len).map(|i| i as u8).collect::<Vec<_>>();
    let built = |len: usize| {
        [
            ("udp", udp((POD, 5000), (SERVER, 53)).payload(&data(len - 28))),
            ("tcp", tcp((POD, 5000), (SERVER, 80), ACK).payload(&data(len - 40))),
            ("echo", icmp(POD, SERVER, 8, 77).payload(&data(len - 28))),
        ]
    };
    for len in [1451, 1452, 1500, 3000] {
        for (what, packet) in built(len) {
            let packet = packet.fragment(DF);
            assert_eq!(
                rig.run(Program::FromPod, POD_IF, &packet.frame()),
                (Verdict::Redirect, needs_fragmentation(&packet)),
                "{what} of {len} bytes"
            );
            let mut padded = packet.ip_options(&[1; 40]);
            padded.padding = 3;
            assert_eq!(
                rig.run(Program::FromPod, POD_IF, &padded.frame()),
                (Verdict::Redirect, needs_fragmentation(&padded)),
                "{what} of {len} bytes with options and padding"
            );
        }
    }
    // What fits, what may be fragmented, and what stays in the cluster goes on.
    let mut on: Vec<Built> = built(1450).into_iter().map(|(_, packet)| packet.fragment(DF)).collect();
    on.extend(built(1500).into_iter().map(|(_, packet)| packet));
    on.push(udp((POD, 5000), (REMOTE_POD, 53)).payload(&data(1472)).fragment(DF));
    for packet in on {
        let frame = packet.frame();
        assert_eq!(rig.run(Program::FromPod, POD_IF, &frame), (Verdict::Next, frame), "{packet:?}");
    }
}

/// The RST that answers a segment as masquerade left it, coming in by the uplink: the builder's sequence number is
/// 0x01020304, its acknowledgment 0x05060708.
fn rst(sent: &Built, flags: u8, seq: u32, ack: u32) -> Vec<u8> {
    let mut packet = tcp((SERVER, 80), (NODE, 61000), flags);
    let [[s0, s1], [d0, d1]] = [80_u16.to_be_bytes(), 61000_u16.to_be_bytes()];
    let mut bytes = [&[s0, s1, d0, d1][..], &seq.to_be_bytes(), &ack.to_be_bytes()].concat();
    bytes.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
    let pseudo = [&SERVER[..], &NODE, &[0, 6, 0, 20], &bytes].concat();
    bytes[16..18].copy_from_slice(&(!sum(&pseudo)).to_be_bytes());
    packet.transport = Transport::Raw { protocol: 6, bytes };
    let mut frame = summed(back(sent, &packet));
    frame[..6].copy_from_slice(&UPLINK_MAC);
    frame
}

/// The builder's sequence number.
const SEQ: u32 = 0x0102_0304;

#[test]
fn a_segment_of_no_flow_is_answered_with_rst() {
    let mut rig = Rig::new(&tables());
    let segment = |flags| tcp((POD, 5000), (SERVER, 80), flags);
    // The segment walks up; at the uplink masquerade has given it the node's address.
    let mut run = |sent: &Built| {
        let frame = sent.frame();
        assert_eq!(rig.run(Program::FromPod, POD_IF, &frame), (Verdict::Next, frame));
        let hash = *rig.kernel.state().tokens.keys().next().expect("a token");
        let mut at_uplink = sent.clone();
        at_uplink.source = Ip::v4(NODE);
        let Transport::Tcp { ports, .. } = &mut at_uplink.transport else { unreachable!() };
        ports.0 = 61000;
        let input =
            Input { frame: at_uplink.frame(), ifindex: UPLINK, ingress: POD_IF, hash, ..Input::default() };
        let (verdict, output) = rig.kernel.run(Program::ToUplink, &input);
        (verdict, output.frame)
    };
    for (sent, flags, seq, ack) in [
        (segment(ACK), RST, 0x0506_0708, 0),
        (segment(ACK | FIN).payload(b"last words"), RST, 0x0506_0708, 0),
        (segment(SYN | ACK).tcp_options(&[2, 4, 5, 180]), RST, 0x0506_0708, 0),
        (segment(0), RST | ACK, 0, SEQ),
        (segment(0).payload(b"odd"), RST | ACK, 0, SEQ + 3),
        (segment(FIN).payload(b"last words").tcp_options(&[1, 1, 1, 1]), RST | ACK, 0, SEQ + 11),
        (segment(ACK).ip_options(&[1; 40]), RST, 0x0506_0708, 0),
    ] {
        assert_eq!(run(&sent), (Verdict::Redirect, rst(&sent, flags, seq, ack)), "{sent:?}");
    }
    // An RST is never answered.
    for flags in [RST, RST | ACK] {
        assert_eq!(run(&segment(flags)).0, Verdict::Drop);
    }
}
