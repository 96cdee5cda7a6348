//! Addresses as they stand in map keys and on the wire.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv4 or IPv6 address in network byte order; IPv4 is held as its IPv4-mapped form
/// `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2), so that one key type and one code path serve both families.
///
/// Aligned to words: BPF reads bytes one by one where it does not know better.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Ip {
    /// The sixteen octets.
    pub octets: [u8; 16],
}

impl Ip {
    /// `::`, which stands for "no address" where a map value has none.
    pub const UNSPECIFIED: Self = Self { octets: [0; 16] };

    /// The IPv4-mapped form of four octets.
    #[inline(always)]
    #[must_use]
    pub const fn v4(a: [u8; 4]) -> Self {
        Self { octets: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3]] }
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        let (high, low) = self.halves();
        high == 0 && (low >> 32) == 0xffff
    }

    /// The four octets of an IPv4 address; of an IPv6 address, its last four.
    #[inline(always)]
    #[must_use]
    pub const fn v4_octets(&self) -> [u8; 4] {
        let o = &self.octets;
        [o[12], o[13], o[14], o[15]]
    }

    /// The address as two big-endian halves.
    #[inline(always)]
    #[must_use]
    pub const fn halves(&self) -> (u64, u64) {
        let o = &self.octets;
        (
            u64::from_be_bytes([o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]]),
            u64::from_be_bytes([o[8], o[9], o[10], o[11], o[12], o[13], o[14], o[15]]),
        )
    }

    /// Link-local, multicast or broadcast: never translated, whatever the policy says.
    ///
    /// IPv4: 169.254.0.0/16 (RFC 3927), 224.0.0.0/4 (RFC 5771), 255.255.255.255 (RFC 919), 0.0.0.0/8
    /// (RFC 1122, 3.2.1.3). IPv6: `fe80::/10`, `ff00::/8`, `::`.
    #[inline(always)]
    #[must_use]
    pub const fn stays_on_link(&self) -> bool {
        if self.is_v4() {
            matches!(self.v4_octets(), [0 | 224..=239, ..] | [169, 254, ..] | [255, 255, 255, 255])
        } else {
            let o = &self.octets;
            o[0] == 0xff || (o[0] == 0xfe && (o[1] & 0xc0) == 0x80) || matches!(self.halves(), (0, 0))
        }
    }
}

impl Ip {
    /// Whether it is a single host's beyond the link, or an IPv4 link-local one, which clouds' metadata services have:
    /// an address that firewall rules are for. IPv6's link-local addresses are neighbours'.
    #[inline(always)]
    #[must_use]
    pub const fn can_be_ruled(&self) -> bool {
        !self.stays_on_link() || (self.is_v4() && matches!(self.v4_octets(), [169, 254, ..]))
    }
}

impl From<Ipv4Addr> for Ip {
    fn from(a: Ipv4Addr) -> Self {
        Self::v4(a.octets())
    }
}

impl From<Ipv6Addr> for Ip {
    fn from(a: Ipv6Addr) -> Self {
        Self { octets: a.octets() }
    }
}

impl From<IpAddr> for Ip {
    fn from(a: IpAddr) -> Self {
        match a {
            IpAddr::V4(a) => a.into(),
            IpAddr::V6(a) => a.into(),
        }
    }
}

impl From<Ip> for IpAddr {
    fn from(ip: Ip) -> Self {
        if ip.is_v4() { Self::V4(ip.v4_octets().into()) } else { Self::V6(ip.octets.into()) }
    }
}

impl fmt::Debug for Ip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

impl fmt::Display for Ip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    fn ip(s: &str) -> Ip {
        s.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn families_round_trip_and_print_as_usual() {
        for s in ["10.1.2.3", "0.0.0.0", "255.255.255.255", "2001:db8::1", "::1", "fe80::1"] {
            assert_eq!(IpAddr::from(ip(s)).to_string(), s);
        }
        assert!(ip("10.1.2.3").is_v4());
        assert!(!ip("::1").is_v4());
        assert!(!ip("1::ffff:10.1.2.3").is_v4());
    }

    #[test]
    fn what_stays_on_the_link() {
        for s in [
            "169.254.169.254",
            "224.0.0.1",
            "239.1.1.1",
            "255.255.255.255",
            "0.0.0.0",
            "fe80::1",
            "ff02::1",
            "::",
        ] {
            assert!(ip(s).stays_on_link(), "{s}");
        }
        for s in ["169.253.0.1", "223.255.255.255", "240.0.0.1", "8.8.8.8", "fec0::1", "2001:db8::1"] {
            assert!(!ip(s).stays_on_link(), "{s}");
        }
    }
}
