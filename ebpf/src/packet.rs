//! The parser: the only place that reads packet headers.

use datapath::addr::Ip;
use datapath::keys::Tuple;
use datapath::packet::{ICMP, Kind, Packet, TCP, UDP};

use crate::ctx::{Refused, Skb};

/// Length of an Ethernet header; a VLAN tag at a TC hook is held outside the packet.
pub const ETHERNET_LEN: usize = 14;
/// `ETH_P_IP`, as `skb->protocol` holds it.
const ETH_P_IP: u16 = 0x0800_u16.to_be();
/// `ETH_P_ARP`.
const ETH_P_ARP: u16 = 0x0806_u16.to_be();

/// Length of an ICMP header; an error's quoted packet follows it (RFC 792).
pub const ICMP_LEN: usize = 8;
const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_UNREACHABLE: u8 = 3;
const ICMP_ECHO_REQUEST: u8 = 8;
const ICMP_TIME_EXCEEDED: u8 = 11;
const ICMP_PARAMETER_PROBLEM: u8 = 12;

/// "More fragments" and the fragment offset (RFC 791, 3.1).
const FRAGMENT_BITS: u16 = 0x3fff;
/// The fragment offset alone.
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// What a packet is.
pub enum Parsed {
    /// IPv4 with a sound header.
    Ip(Headers),
    /// ARP.
    Arp,
    /// Anything else, or an IP header that the kernel will refuse.
    Other,
}

/// A packet and where its headers are.
pub struct Headers {
    pub packet: Packet,
    /// Offset of the transport header from the link-layer header.
    pub l4: usize,
}

/// Parses a packet that came from outside.
#[inline(always)]
pub fn parse(skb: &Skb) -> Parsed {
    parse_with(skb, true)
}

/// Parses a packet that pods sent, or are sent by the host's stack. What an ICMP error quotes is the sender's
/// own invention: unless it quotes a packet to the sender itself, it is taken by its own addresses.
#[inline(always)]
pub fn parse_pods(skb: &Skb) -> Parsed {
    parse_with(skb, false)
}

#[inline(always)]
fn parse_with(skb: &Skb, routers: bool) -> Parsed {
    match skb.protocol() {
        ETH_P_IP => parse_v4(skb, routers),
        ETH_P_ARP => Parsed::Arp,
        _ => Parsed::Other,
    }
}

#[inline(always)]
fn parse_v4(skb: &Skb, routers: bool) -> Parsed {
    let Ok(ip) = skb.load::<[u8; 20]>(ETHERNET_LEN) else { return Parsed::Other };
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    let on_wire = skb.len() as usize - ETHERNET_LEN;
    let total_len = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    // `ip_rcv_core` refuses these (net/ipv4/ip_input.c). A total length of 0 is BIG TCP's.
    if ip[0] >> 4 != 4 || header_len < 20 || total_len > on_wire || (total_len != 0 && total_len < header_len)
    {
        return Parsed::Other;
    }
    let l4 = ETHERNET_LEN + header_len;
    // Behind the packet's own end there may be Ethernet padding, which is no header of it.
    let end = ETHERNET_LEN + if total_len == 0 { on_wire } else { total_len };
    let protocol = ip[9];
    let mut tuple = Tuple {
        source: Ip::v4([ip[12], ip[13], ip[14], ip[15]]),
        destination: Ip::v4([ip[16], ip[17], ip[18], ip[19]]),
        source_port: 0,
        destination_port: 0,
        protocol,
        pad: [0; 3],
    };
    let mut tcp_flags = 0;
    let mut by_router = false;
    let kind = if u16::from_be_bytes([ip[6], ip[7]]) & FRAGMENT_BITS != 0 {
        Kind::Fragment
    } else if protocol == TCP {
        match load_within::<20>(skb, l4, end) {
            Ok(tcp) => {
                ports(&mut tuple, &tcp);
                tcp_flags = tcp[13];
                Kind::Tcp
            }
            Err(_) => Kind::Malformed,
        }
    } else if protocol == UDP {
        match load_within::<8>(skb, l4, end) {
            Ok(udp) => {
                ports(&mut tuple, &udp);
                Kind::Udp
            }
            Err(_) => Kind::Malformed,
        }
    } else if protocol == ICMP {
        match load_within::<8>(skb, l4, end) {
            Ok(icmp) => {
                let identifier = u16::from_be_bytes([icmp[4], icmp[5]]);
                match icmp[0] {
                    ICMP_ECHO_REQUEST => {
                        tuple.source_port = identifier;
                        Kind::EchoRequest
                    }
                    ICMP_ECHO_REPLY => {
                        tuple.destination_port = identifier;
                        Kind::EchoReply
                    }
                    ICMP_UNREACHABLE | ICMP_TIME_EXCEEDED | ICMP_PARAMETER_PROBLEM => {
                        match quoted_reversed(skb, l4 + ICMP_LEN, end, &mut tuple, routers) {
                            Quote::Unknown => Kind::OtherIcmp,
                            Quote::ByHost => Kind::IcmpError,
                            Quote::ByRouter => {
                                by_router = true;
                                Kind::IcmpError
                            }
                        }
                    }
                    _ => Kind::OtherIcmp,
                }
            }
            Err(_) => Kind::Malformed,
        }
    } else {
        Kind::Other
    };
    Parsed::Ip(Headers {
        packet: Packet { tuple, len: (end - ETHERNET_LEN) as u32, kind, tcp_flags, ttl: ip[8], by_router },
        l4,
    })
}

/// Copies a header out, if it ends within the packet.
#[inline(always)]
fn load_within<const N: usize>(skb: &Skb, at: usize, end: usize) -> Result<[u8; N], Refused> {
    if at + N > end { Err(Refused) } else { skb.load(at) }
}

#[inline(always)]
fn ports<const N: usize>(tuple: &mut Tuple, header: &[u8; N]) {
    tuple.source_port = u16::from_be_bytes([header[0], header[1]]);
    tuple.destination_port = u16::from_be_bytes([header[2], header[3]]);
}

/// What an ICMP error quotes.
#[derive(Clone, Copy)]
enum Quote {
    /// Nothing that can be told, or what its receiver did not send.
    Unknown,
    /// A packet to the error's own source.
    ByHost,
    /// A packet to somewhere else.
    ByRouter,
}

/// Sets the tuple to that of the packet quoted at `at`, reversed. Where that cannot be told, where the quoted
/// packet was not sent by whom the error is sent to, or where a router's error is not wanted, the tuple is left
/// as it was.
///
/// A function of its own: it needs stack that its callers do not have to spare.
#[inline(never)]
fn quoted_reversed(skb: &Skb, at: usize, end: usize, tuple: &mut Tuple, routers: bool) -> Quote {
    let Ok(ip) = load_within::<20>(skb, at, end) else { return Quote::Unknown };
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    // A later fragment has no ports to tell.
    let offset = u16::from_be_bytes([ip[6], ip[7]]) & FRAGMENT_OFFSET;
    if ip[0] >> 4 != 4 || header_len < 20 || offset != 0 {
        return Quote::Unknown;
    }
    let to = Ip::v4([ip[16], ip[17], ip[18], ip[19]]);
    let by_host = to == tuple.source;
    if [ip[12], ip[13], ip[14], ip[15]] != tuple.destination.v4_octets() || !(by_host || routers) {
        return Quote::Unknown;
    }
    // Eight bytes are all that is sure to be quoted (RFC 792), and enough.
    let Ok(l4) = load_within::<8>(skb, at + header_len, end) else { return Quote::Unknown };
    let (from_port, to_port) = match (ip[9], l4[0]) {
        (TCP | UDP, _) => (u16::from_be_bytes([l4[0], l4[1]]), u16::from_be_bytes([l4[2], l4[3]])),
        (ICMP, ICMP_ECHO_REQUEST) => (u16::from_be_bytes([l4[4], l4[5]]), 0),
        (ICMP, ICMP_ECHO_REPLY) => (0, u16::from_be_bytes([l4[4], l4[5]])),
        _ => return Quote::Unknown,
    };
    tuple.source = to;
    tuple.source_port = to_port;
    tuple.destination_port = from_port;
    tuple.protocol = ip[9];
    if by_host { Quote::ByHost } else { Quote::ByRouter }
}
