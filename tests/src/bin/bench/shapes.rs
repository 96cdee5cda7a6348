//! Rules to measure with, of the shapes that cost most: as they are written, compiled, and in the words of nftables.

use std::fmt::Write as _;
use std::net::IpAddr;

use datapath::addr::Ip;
use datapath::keys::{FirewallId, RulesetId};
use datapath::memory::Memory;
use datapath::packet::TCP;
use outgate::firewall::compile::compile;
use outgate::firewall::{Destination, Ports, Rule};

use super::v6;

/// The port of the first rule that has one.
const FIRST_PORT: u16 = 8000;

/// What rules look like. All of them allow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Shape {
    /// Single addresses.
    Hosts,
    /// Single addresses of IPv6.
    Hosts6,
    /// Networks of 18 to 32 bits, the longest first.
    Mixed,
    /// An eighth of them for everything at a port of its own, before hosts.
    PortsFirst,
    /// An address and a port of its own each.
    Ports,
    /// An address each, every second and the one after it with a port of their own.
    Pairs,
}

impl Shape {
    pub(crate) const ALL: [Self; 6] =
        [Self::Hosts, Self::Hosts6, Self::Mixed, Self::PortsFirst, Self::Ports, Self::Pairs];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Hosts => "hosts",
            Self::Hosts6 => "IPv6 hosts",
            Self::Mixed => "mixed prefixes",
            Self::PortsFirst => "ports, then hosts",
            Self::Ports => "a port each",
            Self::Pairs => "two to a port",
        }
    }

    /// So many rules; `nth` tells firewalls apart.
    pub(crate) fn rules(self, count: u32, nth: u32) -> Vec<Rule> {
        (0..count).map(|n| self.rule(n, count, nth)).collect()
    }

    fn rule(self, n: u32, count: u32, nth: u32) -> Rule {
        let len = match self {
            Self::Mixed => 32 - (u64::from(n) * 15 / u64::from(count)) as u8,
            Self::PortsFirst if n < count / 8 => 0,
            Self::Hosts | Self::Hosts6 | Self::PortsFirst | Self::Ports | Self::Pairs => 32,
        };
        let port = match self {
            Self::PortsFirst if n < count / 8 => Some(self.port(n)),
            Self::Ports | Self::Pairs => Some(self.port(n)),
            Self::Hosts | Self::Hosts6 | Self::Mixed | Self::PortsFirst => None,
        };
        let net = match IpAddr::from(self.address(n, nth)) {
            IpAddr::V4(ip) => ipnet::Ipv4Net::new_assert(ip, len).trunc().into(),
            ip @ IpAddr::V6(_) => ip.into(),
        };
        Rule {
            allows: true,
            to: Destination::Network(net),
            ports: port.map(|port| Ports { protocol: TCP, first: port, last: port }).into_iter().collect(),
        }
    }
}

impl Shape {
    /// The port that the nth rule is for, if it is for one only; what is sent to its address goes there.
    const fn port(self, n: u32) -> u16 {
        FIRST_PORT + if matches!(self, Self::Pairs) { n / 2 } else { n } as u16
    }

    /// A destination of the first firewall's nth rule.
    pub(crate) fn destination(self, n: u32) -> (Ip, u16) {
        (self.address(n, 0), self.port(n))
    }

    /// The nth rule's address, in the firewall at a place.
    fn address(self, n: u32, nth: u32) -> Ip {
        let address = address(n, nth);
        if matches!(self, Self::Hosts6) { v6(0x20, u32::from_be_bytes(address)) } else { Ip::v4(address) }
    }
}

/// An address that the nth rule is for: scattered, each once (the factor is odd).
fn address(n: u32, nth: u32) -> [u8; 4] {
    let [_, b, c, d] = (n.wrapping_mul(2_654_435_761) >> 8).wrapping_add(nth).to_be_bytes();
    [20 + nth as u8, b, c, d]
}

/// Firewalls with as many rules each, from this place on, version 1 of each.
pub(crate) fn compiled(shape: Shape, each: u32, firewalls: u32) -> Memory {
    let mut memory = Memory::new(1, 0);
    for place in 1..=firewalls {
        let mut rules =
            compile(&shape.rules(each, place - 1), &mut |_| 0).expect("the shapes can be compiled");
        rules.ruleset.firewall = place;
        let (place, id): (FirewallId, RulesetId) = (place, place);
        rules.fill(id, &mut memory);
        memory.firewalls.insert(place, id);
    }
    memory
}

/// The same rules as nftables has them, one by one, in a table of this family, for what a socket sends. Ports are UDP's:
/// it sends datagrams.
pub(crate) fn nftables(family: &str, rules: &[Rule]) -> String {
    let mut script = format!("table {family} bench {{ chain out {{ {NFT_HOOK}\n");
    for rule in rules {
        if let Destination::Network(net) = &rule.to
            && net.prefix_len() > 0
        {
            let _ = write!(script, "{family} daddr {net} ");
        }
        for ports in &rule.ports {
            let _ = write!(script, "udp dport {} ", ports.first);
        }
        script.push_str("accept\n");
    }
    script.push_str("}\n}\n");
    script
}

const NFT_HOOK: &str = "type filter hook output priority 0; policy accept;";
