//! Rules, and what they have decided, in words: the same ones in the audit log, in commands and in metrics.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use datapath::firewall::Judgement;
use datapath::keys::{DenialKey, PodName, Winner};
use datapath::packet::{ICMP, ICMPV6, SCTP, TCP, UDP};

use super::{Destination, Ports, Rule};

/// A rule by its number in the maps ([`Winner::order`]): `spec.egress[2]`. None: it stands for no rule.
#[must_use]
pub fn place(order: u32) -> Option<String> {
    (order < Winner::NOT_READY).then(|| format!("spec.egress[{}]", order / 2))
}

/// Whether what a number stands for allows: `Allow` or `Deny`.
#[must_use]
pub const fn action(order: u32) -> &'static str {
    if (Judgement { rule: order, name: 0 }).allows() { "Allow" } else { "Deny" }
}

/// Where a rule stands, what it does, and what it is for if that is known: `spec.egress[2] Deny 0.0.0.0/0`.
#[must_use]
pub fn decision(order: u32, rules: Option<&[Rule]>) -> String {
    let Some(place) = place(order) else {
        return match order {
            Winner::NOT_READY => "no rules are in force".to_owned(),
            _ => "no rule".to_owned(),
        };
    };
    let rule = rules.and_then(|rules| rules.get(order as usize / 2));
    match rule {
        Some(rule) => format!("{place} {rule}"),
        None => format!("{place} {}", action(order)),
    }
}

impl fmt::Display for Rule {
    /// `Deny 0.0.0.0/0 TCP 80, UDP`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.allows { "Allow " } else { "Deny " })?;
        match &self.to {
            Destination::Network(network) => network.fmt(f)?,
            Destination::Name(name) => name.fmt(f)?,
            Destination::Nodes(addresses) => write!(f, "nodes (addresses: {})", addresses.len())?,
        }
        for (i, ports) in self.ports.iter().enumerate() {
            write!(f, "{}{ports}", if i == 0 { " " } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Display for Ports {
    /// `TCP`, `TCP 80`, `TCP 80-90`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&protocol(self.protocol).to_uppercase())?;
        match (self.first, self.last) {
            (0, u16::MAX) => Ok(()),
            (first, last) if first == last => write!(f, " {first}"),
            (first, last) => write!(f, " {first}-{last}"),
        }
    }
}

/// A protocol's name in lower case, or its number.
#[must_use]
pub fn protocol(number: u8) -> String {
    match number {
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        SCTP => "sctp".to_owned(),
        ICMP => "icmp".to_owned(),
        ICMPV6 => "icmpv6".to_owned(),
        other => other.to_string(),
    }
}

/// What was denied: `203.0.113.9:443/tcp`, `203.0.113.9/icmp`.
#[must_use]
pub fn destination(key: &DenialKey) -> String {
    let ip = IpAddr::from(key.remote);
    let protocol = protocol(key.protocol);
    match key.protocol {
        TCP | UDP | SCTP => format!("{}/{protocol}", SocketAddr::new(ip, key.remote_port)),
        _ => format!("{ip}/{protocol}"),
    }
}

/// A pod's namespace, as the maps have it.
#[must_use]
pub fn namespace(name: &PodName) -> String {
    text(&name.namespace)
}

/// A pod's namespace and name.
#[must_use]
pub fn pod(name: &PodName) -> String {
    format!("{}/{}", text(&name.namespace), text(&name.name))
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::Name;

    #[test]
    fn rules_read_as_they_are_written() {
        let rule = |allows, to, ports: &[(u8, u16, u16)]| {
            let ports = ports.iter().map(|(protocol, first, last)| Ports {
                protocol: *protocol,
                first: *first,
                last: *last,
            });
            Rule { allows, to, ports: ports.collect() }
        };
        let network = |text: &str| Destination::Network(text.parse().unwrap());
        let rules = [
            rule(false, network("0.0.0.0/0"), &[]),
            rule(
                true,
                Destination::Name(Name { wildcard: true, name: "example.com".into() }),
                &[(TCP, 80, 80), (UDP, 0, 65_535), (SCTP, 5, 9)],
            ),
            rule(true, Destination::Nodes(vec!["192.0.2.1".parse().unwrap()]), &[]),
        ];
        let of = |index, allows| decision(Winner::new(index, allows).order, Some(&rules));
        assert_eq!(of(0, false), "spec.egress[0] Deny 0.0.0.0/0");
        assert_eq!(of(1, true), "spec.egress[1] Allow *.example.com TCP 80, UDP, SCTP 5-9");
        assert_eq!(of(2, true), "spec.egress[2] Allow nodes (addresses: 1)");
        assert_eq!(of(3, false), "spec.egress[3] Deny", "of a version whose text is not known");
        assert_eq!(decision(Winner::new(7, true).order, None), "spec.egress[7] Allow");
        assert_eq!(decision(Winner::NOT_READY, Some(&rules)), "no rules are in force");
        assert_eq!(decision(Winner::NONE, Some(&rules)), "no rule");
        assert_eq!((place(Winner::NONE), action(Winner::NONE)), (None, "Allow"));
        assert_eq!((place(Winner::NOT_READY), action(Winner::NOT_READY)), (None, "Deny"));
    }

    #[test]
    fn destinations_of_both_families() {
        let of = |ip: &str, protocol, remote_port| {
            let remote = ip.parse::<IpAddr>().unwrap().into();
            destination(&DenialKey { remote, remote_port, protocol, ..DenialKey::default() })
        };
        assert_eq!(of("203.0.113.9", TCP, 443), "203.0.113.9:443/tcp");
        assert_eq!(of("2001:db8::9", UDP, 53), "[2001:db8::9]:53/udp");
        assert_eq!(of("2001:db8::9", ICMPV6, 0), "2001:db8::9/icmpv6");
        assert_eq!(of("203.0.113.9", 47, 0), "203.0.113.9/47");
    }
}
