//! A parsed packet, as the decisions see it.

use crate::keys::Tuple;

/// IP protocol numbers (IANA).
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;

/// TCP flags (RFC 9293, 3.1).
pub const FIN: u8 = 0x01;
/// SYN.
pub const SYN: u8 = 0x02;
/// RST.
pub const RST: u8 = 0x04;
/// ACK.
pub const ACK: u8 = 0x10;

/// What a packet is to a translator.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// TCP, with its flags in [`Packet::tcp_flags`].
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo request: the identifier is the source port.
    EchoRequest,
    /// ICMP echo reply: the identifier is the destination port.
    EchoReply,
    /// An ICMP error (unreachable, time exceeded, parameter problem). Its tuple is that of the packet it quotes,
    /// reversed: of a packet of the same flow that travels the error's way (RFC 5508, 4).
    IcmpError,
    /// Any other ICMP.
    OtherIcmp,
    /// Any fragment, the first included.
    Fragment,
    /// A protocol without ports.
    Other,
    /// A sound IP header, but its transport header is short.
    Malformed,
}

/// A packet's decisive parts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Addresses and ports; ports are 0 where [`Kind`] has none.
    pub tuple: Tuple,
    /// Length of the IP packet, in bytes.
    pub len: u32,
    /// What it is.
    pub kind: Kind,
    /// TCP flags; 0 for others.
    pub tcp_flags: u8,
    /// Time to live, in hops.
    pub ttl: u8,
    /// An ICMP error whose own source is not the tuple's: a router's on the way. What is quoted is the sender's
    /// word, so a pod's error is one of these or about a packet to itself, never told apart by the quote alone:
    /// on the pods' side such an error is parsed as [`Kind::OtherIcmp`], with its own addresses.
    pub by_router: bool,
}

impl Packet {
    /// Whether it can open a connection: a TCP SYN without ACK, any UDP, an echo request.
    #[inline(always)]
    #[must_use]
    pub const fn opens(&self) -> bool {
        match self.kind {
            Kind::Tcp => self.tcp_flags & (SYN | ACK | RST | FIN) == SYN,
            Kind::Udp | Kind::EchoRequest => true,
            Kind::EchoReply
            | Kind::IcmpError
            | Kind::OtherIcmp
            | Kind::Fragment
            | Kind::Other
            | Kind::Malformed => false,
        }
    }
}
