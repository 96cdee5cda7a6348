//! A parsed packet, as the decisions see it.

use crate::keys::Tuple;

/// IP protocol numbers (IANA).
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// `ICMPv6`.
pub const ICMPV6: u8 = 58;
/// SCTP.
pub const SCTP: u8 = 132;

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
    /// SCTP; what its first chunk does to the association stands in [`Packet::tcp_flags`], in TCP's words.
    Sctp,
    /// ICMP echo request: the identifier is the source port.
    EchoRequest,
    /// ICMP echo reply: the identifier is the destination port.
    EchoReply,
    /// An ICMP error (unreachable, too big, time exceeded, parameter problem). Its tuple is that of the packet it quotes,
    /// reversed: of a packet of the same flow that travels the error's way (RFC 5508, 4).
    IcmpError,
    /// Any other ICMP.
    OtherIcmp,
    /// A fragment that is not the first, as parsed: it has no ports. [`crate::fragments`] finds what it is.
    Fragment,
    /// A protocol without ports.
    Other,
    /// A sound IP header, but its transport header is short.
    Malformed,
}

/// Which part of a datagram a packet is.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Part {
    /// All of it.
    #[default]
    Whole = 0,
    /// Its beginning, with the transport header.
    First = 1,
    /// Anything behind its beginning.
    Later = 2,
}

/// A packet's decisive parts.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Addresses and ports; ports are 0 where [`Kind`] has none.
    pub tuple: Tuple,
    /// Length of the IP packet, in bytes.
    pub len: u32,
    /// Length of the largest IP packet that it is on the wire, in bytes: of one segment under GSO, else `len`.
    pub wire_len: u32,
    /// The identification that all fragments of a datagram share; 0 for [`Part::Whole`].
    pub fragment_id: u32,
    /// What it is.
    pub kind: Kind,
    /// TCP flags, or what stands for them in SCTP; 0 for others.
    pub tcp_flags: u8,
    /// Time to live or hop limit, in hops.
    pub ttl: u8,
    /// Which part of a datagram it is.
    pub part: Part,
    /// Whether its IP header has options, or hop-by-hop or routing headers: for routers to look at.
    pub options: bool,
    /// Whether a router may not fragment it: IPv4's flag; always for IPv6 (RFC 8200, 5).
    pub dont_fragment: bool,
    /// An ICMP error whose own source is not the tuple's: a router's on the way. What is quoted is the sender's
    /// word, so a pod's error is one of these or about a packet to itself, never told apart by the quote alone:
    /// on the pods' side such an error is parsed as [`Kind::OtherIcmp`], with its own addresses.
    pub by_router: bool,
}

impl Packet {
    /// Whether it cannot be sent whole where packets of `mtu` bytes can, and may not be fragmented: its sender
    /// has to send less. What its sender has fragmented already is let go, to be fragmented once more outside.
    /// `mtu` 0: not known.
    #[inline(always)]
    #[must_use]
    pub const fn too_big_for(&self, mtu: u16) -> bool {
        self.dont_fragment && matches!(self.part, Part::Whole) && self.larger_than(mtu)
    }

    /// Whether it does not fit where packets of `mtu` bytes do. `mtu` 0: not known.
    #[inline(always)]
    #[must_use]
    pub const fn larger_than(&self, mtu: u16) -> bool {
        mtu != 0 && self.wire_len > mtu as u32
    }

    /// Whether it can open a connection: a TCP SYN without ACK, an SCTP INIT, any UDP, an echo request; no
    /// fragment but the first.
    #[inline(always)]
    #[must_use]
    pub const fn opens(&self) -> bool {
        match self.kind {
            _ if matches!(self.part, Part::Later) => false,
            Kind::Tcp | Kind::Sctp => self.tcp_flags & (SYN | ACK | RST | FIN) == SYN,
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
