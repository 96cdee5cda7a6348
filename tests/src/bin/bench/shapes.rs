//! Rules to measure with, of the shapes that cost most: as they are written, compiled, and in the words of nftables.

use std::fmt::Write as _;

use datapath::keys::{FirewallId, RulesetId};
use datapath::memory::Memory;
use datapath::packet::TCP;
use outgate::firewall::compile::compile;
use outgate::firewall::{Destination, Ports, Rule};

/// The port of the first rule that has one.
pub(crate) const FIRST_PORT: u16 = 8000;

/// What rules look like. All of them allow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Shape {
    /// Single addresses.
    Hosts,
    /// Networks of 18 to 32 bits, the longest first.
    Mixed,
    /// An eighth of them for everything at a port of its own, before hosts.
    PortsFirst,
    /// An address and a port of its own each.
    Ports,
}

impl Shape {
    pub(crate) const ALL: [Self; 4] = [Self::Hosts, Self::Mixed, Self::PortsFirst, Self::Ports];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Hosts => "hosts",
            Self::Mixed => "mixed prefixes",
            Self::PortsFirst => "ports, then hosts",
            Self::Ports => "a port each",
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
            Self::Hosts | Self::PortsFirst | Self::Ports => 32,
        };
        let port = match self {
            Self::PortsFirst if n < count / 8 => Some(FIRST_PORT + n as u16),
            Self::Ports => Some(FIRST_PORT + n as u16),
            Self::Hosts | Self::Mixed | Self::PortsFirst => None,
        };
        let net = ipnet::Ipv4Net::new_assert(address(n, nth).into(), len).trunc();
        Rule {
            allows: true,
            to: Destination::Network(net.into()),
            ports: port.map(|port| Ports { protocol: TCP, first: port, last: port }).into_iter().collect(),
        }
    }
}

/// An address that the nth rule is for: scattered, each once (the factor is odd).
pub(crate) fn address(n: u32, nth: u32) -> [u8; 4] {
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

/// The same rules as nftables has them, one by one, for what a socket sends. Ports are UDP's: it sends datagrams.
pub(crate) fn nftables(rules: &[Rule]) -> String {
    let mut script =
        "table ip bench { chain out { type filter hook output priority 0; policy accept;\n".to_owned();
    for rule in rules {
        if let Destination::Network(net) = &rule.to
            && net.prefix_len() > 0
        {
            let _ = write!(script, "ip daddr {net} ");
        }
        for ports in &rule.ports {
            let _ = write!(script, "udp dport {} ", ports.first);
        }
        script.push_str("accept\n");
    }
    script.push_str("}\n}\n");
    script
}
