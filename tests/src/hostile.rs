//! Packets that a pod makes itself, and the look from outside that finds what should not be there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::lab::Lab;
use crate::netns::Netns;
use crate::packet::{Built, ETHERNET};
use crate::record::Recorder;

/// Sends whole frames, one a line in hexadecimal digits.
const SENDER: &str = "import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(('eth0', 0))
for line in sys.stdin: s.send(bytes.fromhex(line))";

impl Netns {
    /// Sends frames out of `eth0` as they are, past this namespace's own stack.
    #[track_caller]
    pub fn send_frames(&self, frames: &[Vec<u8>]) {
        let _ = self.exec_input(&["python3", "-c", SENDER], &[], &hex_lines(frames)).expect_success();
    }

    /// Sends packets out of `eth0` to the namespace's router.
    #[track_caller]
    pub fn send_packets(&self, packets: &[Built]) {
        let macs = self.router_macs();
        let frames: Vec<_> = packets
            .iter()
            .map(|packet| {
                let mut packet = packet.clone();
                packet.macs = macs;
                packet.frame()
            })
            .collect();
        self.send_frames(&frames);
    }

    /// Sends IPv4 packets, from the header on, out of `eth0` to the namespace's router.
    #[track_caller]
    pub fn send_ip(&self, packets: &[Vec<u8>]) {
        let [to, from] = self.router_macs();
        let link = [&to[..], &from, &[8, 0]].concat();
        self.send_frames(&packets.iter().map(|packet| [&link[..], packet].concat()).collect::<Vec<_>>());
    }

    /// Link-layer addresses of the router and of `eth0`.
    #[track_caller]
    fn router_macs(&self) -> [[u8; 6]; 2] {
        let route = self.exec(&["ip", "-4", "route", "show", "default"]);
        let router =
            route.split(' ').nth(2).unwrap_or_else(|| panic!("no default route: {route}")).to_owned();
        let _ = self.try_exec(&["ping", "-n", "-q", "-c", "1", "-W", "1", &router]);
        let neighbour = self.exec(&["ip", "-4", "neigh", "show", &router]);
        let after = |text: &str, word: &str| {
            let mut words = text.split_whitespace().skip_while(|candidate| *candidate != word);
            words.nth(1).unwrap_or_else(|| panic!("no {word} in '{text}'")).to_owned()
        };
        let link = self.exec(&["ip", "link", "show", "eth0"]);
        [mac(&after(&neighbour, "lladdr")), mac(&after(&link, "link/ether"))]
    }
}

/// `02:00:…` as bytes.
fn mac(text: &str) -> [u8; 6] {
    let mut bytes = [0; 6];
    for (byte, digits) in bytes.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(digits, 16).unwrap_or_else(|error| panic!("{text}: {error}"));
    }
    bytes
}

/// Bytes in hexadecimal digits, each on a line of its own.
#[must_use]
pub fn hex_lines(all: &[Vec<u8>]) -> String {
    all.iter().fold(String::new(), |mut text, bytes| {
        for byte in bytes {
            let _ = write!(text, "{byte:02x}");
        }
        text.push('\n');
        text
    })
}

/// An IPv4 address as bytes.
#[must_use]
pub fn octets(address: &str) -> [u8; 4] {
    let address: std::net::Ipv4Addr = address.parse().unwrap_or_else(|error| panic!("{address}: {error}"));
    address.octets()
}

/// A packet from its IPv4 header on.
#[must_use]
pub fn ip_packet(packet: &Built) -> Vec<u8> {
    packet.frame().split_off(ETHERNET)
}

/// What is sent outside, by whatever way: counted at every host outside and at the router.
#[derive(Debug)]
pub struct Outside {
    recorders: Vec<Recorder>,
    own: BTreeSet<String>,
}

impl Outside {
    /// Starts counting.
    #[track_caller]
    #[must_use]
    pub fn watch(lab: &Lab) -> Self {
        let hosts = [&lab.web, &lab.other, &lab.neighbour];
        let mut recorders: Vec<_> = hosts.iter().map(|host| Recorder::start(&host.netns)).collect();
        recorders.push(Recorder::start(&lab.router));
        let own = hosts.iter().map(|host| host.address.clone());
        Self { recorders, own: own.chain(["172.18.0.1".into(), "203.0.113.1".into()]).collect() }
    }

    /// Forgets what was seen.
    #[track_caller]
    pub fn reset(&self) {
        self.recorders.iter().for_each(Recorder::reset);
    }

    /// Packets of each source that is no outside host's, over all protocols and all recorders.
    #[track_caller]
    #[must_use]
    pub fn packets(&self) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for recorder in &self.recorders {
            for (source, packets) in ["tcp", "udp", "icmp"].iter().flat_map(|p| recorder.sources(p)) {
                if !self.own.contains(&source) {
                    *all.entry(source).or_default() += packets;
                }
            }
        }
        all
    }

    /// Packets of a source that other hosts than `web` saw: the second host outside, and the neighbour.
    #[track_caller]
    #[must_use]
    pub fn to_others(&self, source: &str) -> u64 {
        let others = self.recorders[1..3].iter();
        let seen = others.flat_map(|recorder| ["tcp", "udp", "icmp"].map(|p| recorder.sources(p)));
        seen.filter_map(|sources| sources.get(source).copied()).sum()
    }

    /// Panics if TCP, UDP or ICMP of a source was seen outside that is none of these and no outside host's.
    #[track_caller]
    pub fn expect_at_most(&self, allowed: &[&str]) {
        for recorder in &self.recorders {
            for protocol in ["tcp", "udp", "icmp"] {
                let mut seen = recorder.sources(protocol);
                seen.retain(|source, _| !self.own.contains(source) && !allowed.contains(&source.as_str()));
                assert!(seen.is_empty(), "foreign sources of {protocol}: {seen:?} ({recorder:?})");
            }
        }
    }
}
