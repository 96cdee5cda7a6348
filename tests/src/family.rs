//! The two families of addresses, for tests that do the same in both.

use std::net::Ipv6Addr;

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, IPv4 first.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address without its prefix length.
    #[must_use]
    pub fn of(address: &str) -> Self {
        if address.contains(':') { Self::V6 } else { Self::V4 }
    }

    /// An address of the nodes' network that nobody has: tests use it as egress IP.
    #[must_use]
    pub fn egress(self) -> &'static str {
        match self {
            Self::V4 => "172.18.0.101",
            Self::V6 => "2001:db8:172:18::101",
        }
    }

    /// An address of the nodes' second network that nobody has ([`crate::LabSpec::second_uplink`]).
    #[must_use]
    pub fn second_egress(self) -> &'static str {
        match self {
            Self::V4 => "172.19.0.101",
            Self::V6 => "fd00:172:19::101",
        }
    }

    /// What a [`crate::Recorder`] calls the family's ICMP.
    #[must_use]
    pub fn icmp(self) -> &'static str {
        match self {
            Self::V4 => "icmp",
            Self::V6 => "ipv6-icmp",
        }
    }

    /// The option that ping, iperf3 and dig choose the family by.
    #[must_use]
    pub fn option(self) -> &'static str {
        match self {
            Self::V4 => "-4",
            Self::V6 => "-6",
        }
    }

    /// The bytes of a header without options or extension headers.
    #[must_use]
    pub fn header(self) -> u32 {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }
}

/// `address:port`, with the brackets that an IPv6 address needs.
#[must_use]
pub fn endpoint(address: &str, port: u16) -> String {
    match Family::of(address) {
        Family::V4 => format!("{address}:{port}"),
        Family::V6 => format!("[{address}]:{port}"),
    }
}

/// The group that a neighbour solicitation for an address is sent to (RFC 4291, 2.7.1).
#[track_caller]
#[must_use]
pub fn solicited_node(address: &str) -> String {
    let address: Ipv6Addr = address.parse().unwrap_or_else(|_| panic!("{address} is no IPv6 address"));
    let [.., high, low] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (high & 0xff), low).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_and_groups() {
        assert_eq!(endpoint("172.18.0.1", 80), "172.18.0.1:80");
        assert_eq!(endpoint("2001:db8::1", 80), "[2001:db8::1]:80");
        assert_eq!(solicited_node("2001:db8:172:18::101"), "ff02::1:ff00:101");
        assert_eq!(solicited_node("fe80::aabb:ccdd"), "ff02::1:ffbb:ccdd");
    }
}
