//! Answers that the programs make themselves: neighbour discovery. Every expected packet is built from nothing.

use std::net::Ipv6Addr;

use datapath::addr::Ip;
use datapath::keys::{EgressIp, Interface, InterfaceKind, Settings};
use datapath::memory::Memory;
use datapath::verdict::DropReason;
use lab::kernel::{
    Input, Kernel, Program, Verdict, enter_node_network,
    interfaces::{SECOND_UPLINK, UPLINK},
};

const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0xa, 2];
const ASKER_MAC: [u8; 6] = [2, 0, 0, 0, 0xb, 1];
const EGRESS: &str = "2001:db8:18::100";
const OTHERS_EGRESS: &str = "2001:db8:18::101";
const SECOND_EGRESS: &str = "2001:db8:19::100";
const ROUTER: &str = "2001:db8:18::1";
const ICMPV6: u8 = 58;

/// Node 1 holds `EGRESS` on the uplink and `SECOND_EGRESS` on the second, node 2 holds `OTHERS_EGRESS`.
fn tables() -> Memory {
    let mut t = Memory::new(1, 64);
    t.settings = Settings { node: 1, ..Settings::default() };
    for (id, address, uplink, holder) in
        [(1, EGRESS, UPLINK, 1), (2, OTHERS_EGRESS, UPLINK, 2), (3, SECOND_EGRESS, SECOND_UPLINK, 1)]
    {
        let ip = ip(address);
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

/// An ICMPv6 packet in a frame; its checksum is made right.
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

    /// What becomes of a packet; nothing is dropped.
    fn run(&mut self, program: Program, ifindex: u32, frame: &[u8]) -> (Verdict, Vec<u8>) {
        let before = self.kernel.drops();
        let (verdict, output) =
            self.kernel.run(program, &Input { frame: frame.to_vec(), ifindex, ..Input::default() });
        for reason in DropReason::ALL {
            let i = *reason as usize;
            assert_eq!(before[i], self.kernel.drops()[i], "{}", reason.name());
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
