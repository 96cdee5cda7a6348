//! Addresses and networks as people and objects write them.
//!
//! Maps hold an IPv4 address in its IPv4-mapped form, so that form as input would be another spelling of an
//! IPv4 address in an IPv6 field: it is refused everywhere, as Kubernetes does (KEP-4858).

use std::net::IpAddr;

use ipnet::IpNet;

/// Why a text is not taken for an address or network. It reads on after the text itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// Something else.
    #[error("is not an IP address")]
    NotAnAddress,
    /// Something else where a network should be.
    #[error("is not a network such as 10.0.0.0/16 or 2001:db8::/64")]
    NotANetwork,
    /// `::ffff:192.0.2.1`.
    #[error("is an IPv4 address in IPv6 form; write it as IPv4")]
    Mapped,
    /// `fe80::1%eth0`.
    #[error("has a zone (%), which only link-local addresses of one host have")]
    Zone,
}

/// Reads an address.
pub fn address(text: &str) -> Result<IpAddr, Error> {
    if text.contains(':') && text.contains('%') {
        return Err(Error::Zone);
    }
    let ip = text.parse().map_err(|_| Error::NotAnAddress)?;
    if is_mapped(&ip) { Err(Error::Mapped) } else { Ok(ip) }
}

/// Reads a network; host bits are cut off.
pub fn network(text: &str) -> Result<IpNet, Error> {
    let network: IpNet = text.parse().map_err(|_| Error::NotANetwork)?;
    // ::/0 contains the mapped addresses and is not made of them.
    let within = network.prefix_len() >= 96 && is_mapped(&network.addr());
    if within { Err(Error::Mapped) } else { Ok(network.trunc()) }
}

const fn is_mapped(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some(),
    }
}

/// An address as part of the name of a Kubernetes object, which may have neither colons nor a dash at its end
/// (RFC 1123): IPv6 in full length, with dashes.
#[must_use]
pub fn object_name(ip: &IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => ip.segments().map(|s| format!("{s:04x}")).join("-"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_an_address_and_what_is_wrong_with_the_rest() {
        assert_eq!(address("2001:DB8:0::1").unwrap().to_string(), "2001:db8::1");
        assert_eq!(address("192.0.2.1").unwrap().to_string(), "192.0.2.1");
        for (text, error) in [
            ("::ffff:192.0.2.1", Error::Mapped),
            ("::ffff:c000:201", Error::Mapped),
            ("fe80::1%eth0", Error::Zone),
            ("2001:db8::1%1", Error::Zone),
            ("192.0.2.300", Error::NotAnAddress),
            ("192.0.2.1/32", Error::NotAnAddress),
            ("[2001:db8::1]", Error::NotAnAddress),
            ("2001:db8::1::2", Error::NotAnAddress),
            ("", Error::NotAnAddress),
        ] {
            assert_eq!(address(text), Err(error), "{text}");
        }
    }

    #[test]
    fn what_is_a_network_and_what_is_wrong_with_the_rest() {
        assert_eq!(network("2001:db8::5/64").unwrap().to_string(), "2001:db8::/64");
        assert_eq!(network("::/0").unwrap().to_string(), "::/0");
        for (text, error) in [
            ("::ffff:10.0.0.0/104", Error::Mapped),
            ("::ffff:0:0/96", Error::Mapped),
            ("10.0.0.0/64", Error::NotANetwork),
            ("10.0.0.0", Error::NotANetwork),
            ("2001:db8::/129", Error::NotANetwork),
            ("fe80::%eth0/64", Error::NotANetwork),
        ] {
            assert_eq!(network(text), Err(error), "{text}");
        }
    }

    #[test]
    fn names_of_objects_are_those_that_kubernetes_takes() {
        let of = |text: &str| object_name(&text.parse().unwrap());
        assert_eq!(of("192.0.2.1"), "192.0.2.1");
        assert_eq!(of("2001:db8::"), "2001-0db8-0000-0000-0000-0000-0000-0000");
        assert_eq!(of("2001:db8::1:2"), "2001-0db8-0000-0000-0000-0000-0001-0002");
    }
}
