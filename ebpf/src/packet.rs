//! The parser: the only place that reads packet headers.

use datapath::addr::Ip;
use datapath::packet::{ACK, ICMP, ICMPV6, Kind, Packet, Part, RST, SCTP, SYN, TCP, UDP};

use crate::ctx::{Refused, Skb};
use crate::maps;

/// Length of an Ethernet header; a VLAN tag at a TC hook is held outside the packet.
pub const ETHERNET_LEN: usize = 14;
/// Length of an IPv4 header without options (RFC 791, 3.1).
pub const IPV4_LEN: usize = 20;
/// Length of an IPv6 header (RFC 8200, 3).
pub const IPV6_LEN: usize = 40;
/// `ETH_P_IP`, as `skb->protocol` holds it.
pub const ETH_P_IP: u16 = 0x0800_u16.to_be();
/// `ETH_P_IPV6`.
const ETH_P_IPV6: u16 = 0x86dd_u16.to_be();
/// `ETH_P_ARP`.
const ETH_P_ARP: u16 = 0x0806_u16.to_be();

/// Length of an ICMP header of either family; an error's quoted packet follows it (RFC 792, RFC 4443).
pub const ICMP_LEN: usize = 8;

/// "Don't fragment", "more fragments" and the fragment offset (RFC 791, 3.1).
const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;
/// The same of an IPv6 fragment header (RFC 8200, 4.5).
const V6_MORE_FRAGMENTS: u16 = 0x0001;
const V6_FRAGMENT_OFFSET: u16 = 0xfff8;

/// Extension headers of IPv6 that are looked behind (RFC 8200, 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// Extension headers before the transport header. More than a sound packet has; it is then untranslatable.
const MAX_EXTENSIONS: usize = 4;

/// What a packet is.
pub enum Parsed {
    /// IP with a sound header. It lies in a per-CPU entry: the stack's 512 bytes are needed elsewhere.
    Ip(&'static mut Headers),
    /// ARP.
    Arp,
    /// An IPv6 neighbour solicitation: who has this address? From outside only.
    Solicitation,
    /// Anything else, or an IP header that the kernel will refuse.
    Other,
}

/// A packet and where its headers are.
#[repr(C)]
pub struct Headers {
    pub packet: Packet,
    /// Offset of the transport header from the link-layer header.
    pub l4: usize,
    /// Where the packet ends; behind it there may be Ethernet padding, which is no part of it.
    pub end: usize,
    /// Source and destination of the packet that an ICMP error quotes.
    quoted: [Ip; 2],
    /// An IPv4 header without options, as it is read.
    ipv4: [u8; IPV4_LEN],
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
fn parse_with(skb: &Skb, outside: bool) -> Parsed {
    let Some(headers) = maps::HEADERS.get_ptr_mut(0) else { return Parsed::Other };
    // SAFETY: this CPU's own entry, and this program's for as long as it runs: programs of one CPU do not
    // interrupt each other at TC. Nothing is read before it is written.
    let headers = unsafe { &mut *headers };
    match read(skb, headers) {
        What::Ip => {}
        What::Error => {
            let by = quoted_reversed(skb, headers, outside);
            headers.packet.by_router = matches!(by, Quote::ByRouter);
            headers.packet.kind = match by {
                Quote::Unknown => Kind::OtherIcmp,
                Quote::ByHost | Quote::ByRouter => Kind::IcmpError,
            };
        }
        What::Solicitation if outside => return Parsed::Solicitation,
        What::Solicitation => {}
        What::Arp => return Parsed::Arp,
        What::Other => return Parsed::Other,
    }
    Parsed::Ip(headers)
}

/// [`Parsed`], as [`read`] finds it.
#[repr(u8)]
enum What {
    Ip,
    /// IP, an ICMP error: what it quotes is to be read.
    Error,
    Solicitation,
    Arp,
    Other,
}

/// Reads network and transport header. A function of its own: it needs stack that its callers do not have to
/// spare.
#[inline(never)]
fn read(skb: &Skb, headers: &mut Headers) -> What {
    headers.packet.kind = Kind::Other;
    headers.packet.tcp_flags = 0;
    headers.packet.by_router = false;
    headers.packet.tuple.source_port = 0;
    headers.packet.tuple.destination_port = 0;
    headers.packet.tuple.pad = [0; 3];
    let sound = match skb.protocol() {
        ETH_P_IP => read_v4(skb, headers),
        ETH_P_IPV6 => read_v6(skb, headers),
        ETH_P_ARP => return What::Arp,
        _ => return What::Other,
    };
    if sound.is_err() {
        return What::Other;
    }
    headers.packet.len = (headers.end - ETHERNET_LEN) as u32;
    headers.packet.wire_len = headers.packet.len;
    if headers.packet.kind == Kind::Malformed {
        return What::Ip;
    }
    if headers.packet.part == Part::Later {
        headers.packet.kind = Kind::Fragment;
        return What::Ip;
    }
    read_transport(skb, headers).unwrap_or_else(|Refused| {
        headers.packet.kind = Kind::Malformed;
        What::Ip
    })
}

#[inline(always)]
fn read_v4(skb: &Skb, headers: &mut Headers) -> Result<(), Refused> {
    skb.load_into(ETHERNET_LEN, &mut headers.ipv4)?;
    let ip = &headers.ipv4;
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    let on_wire = skb.len() as usize - ETHERNET_LEN;
    let total_len = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    // `ip_rcv_core` refuses these (net/ipv4/ip_input.c). BIG TCP's length is 0
    // (include/net/ip.h, iph_totlen).
    let big = total_len == 0 && skb.gso_size() != 0;
    if ip[0] >> 4 != 4 || header_len < IPV4_LEN || total_len > on_wire || (total_len < header_len && !big) {
        return Err(Refused);
    }
    headers.l4 = ETHERNET_LEN + header_len;
    headers.end = ETHERNET_LEN + if big { on_wire } else { total_len };
    let packet = &mut headers.packet;
    packet.tuple.source = Ip::v4([ip[12], ip[13], ip[14], ip[15]]);
    packet.tuple.destination = Ip::v4([ip[16], ip[17], ip[18], ip[19]]);
    packet.tuple.protocol = ip[9];
    packet.ttl = ip[8];
    let fragment = u16::from_be_bytes([ip[6], ip[7]]);
    packet.options = header_len != IPV4_LEN;
    packet.dont_fragment = fragment & DONT_FRAGMENT != 0;
    packet.part = part(fragment & FRAGMENT_OFFSET, fragment & MORE_FRAGMENTS);
    packet.fragment_id = match packet.part {
        Part::Whole => 0,
        // The protocol is part of what names a datagram (RFC 791, 3.2).
        Part::First | Part::Later => u32::from(u16::from_be_bytes([ip[4], ip[5]])) | u32::from(ip[9]) << 16,
    };
    Ok(())
}

const fn part(offset: u16, more: u16) -> Part {
    match (offset, more) {
        (0, 0) => Part::Whole,
        (0, _) => Part::First,
        _ => Part::Later,
    }
}

#[inline(always)]
fn read_v6(skb: &Skb, headers: &mut Headers) -> Result<(), Refused> {
    let ip = skb.load::<[u8; 8]>(ETHERNET_LEN)?;
    let on_wire = skb.len() as usize - ETHERNET_LEN;
    let len = IPV6_LEN + usize::from(u16::from_be_bytes([ip[4], ip[5]]));
    // `ip6_rcv_core` refuses these (net/ipv6/ip6_input.c). BIG TCP's length is 0.
    let big = len == IPV6_LEN && skb.gso_size() != 0;
    if ip[0] >> 4 != 6 || len > on_wire {
        return Err(Refused);
    }
    headers.l4 = ETHERNET_LEN + IPV6_LEN;
    headers.end = ETHERNET_LEN + if big { on_wire } else { len };
    let packet = &mut headers.packet;
    skb.load_into(ETHERNET_LEN + 8, &mut packet.tuple.source.octets)?;
    skb.load_into(ETHERNET_LEN + 24, &mut packet.tuple.destination.octets)?;
    packet.tuple.protocol = ip[6];
    packet.ttl = ip[7];
    packet.dont_fragment = true;
    packet.options = false;
    packet.part = Part::Whole;
    packet.fragment_id = 0;
    // IPv4-mapped addresses stand for IPv4 here; no packet carries them. The kernel refuses such a source only
    // (`ip6_rcv_core`).
    if packet.tuple.source.is_v4() || packet.tuple.destination.is_v4() {
        packet.kind = Kind::Malformed;
        return Ok(());
    }
    for _ in 0..MAX_EXTENSIONS {
        if !skip_extension(skb, headers) {
            break;
        }
    }
    Ok(())
}

/// Looks behind one extension header; false where there is none, or none that may be looked behind: the
/// protocol is then that header's number, which is none that can be translated.
#[inline(always)]
fn skip_extension(skb: &Skb, headers: &mut Headers) -> bool {
    let packet = &mut headers.packet;
    let kind = packet.tuple.protocol;
    if packet.part == Part::Later || !matches!(kind, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS) {
        return false;
    }
    let Ok(header) = load_within::<8>(skb, headers.l4, headers.end) else { return false };
    match kind {
        // Each extension header comes once (RFC 8200, 4.1).
        FRAGMENT if packet.part != Part::Whole => return false,
        FRAGMENT => {
            let fragment = u16::from_be_bytes([header[2], header[3]]);
            // Whole: an atomic fragment (RFC 6946).
            packet.part = part(fragment & V6_FRAGMENT_OFFSET, fragment & V6_MORE_FRAGMENTS);
            if packet.part != Part::Whole {
                packet.fragment_id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            }
            headers.l4 += 8;
        }
        // The destination is not where it ends.
        ROUTING if header[3] != 0 => return false,
        _ => {
            packet.options |= kind != DESTINATION_OPTIONS;
            headers.l4 += (usize::from(header[1]) + 1) * 8;
        }
    }
    packet.tuple.protocol = header[0];
    true
}

/// Reads the transport header: kind, ports and flags. Refused: it is short.
#[inline(always)]
fn read_transport(skb: &Skb, headers: &mut Headers) -> Result<What, Refused> {
    let Headers { packet, l4, end, .. } = headers;
    let (l4, end) = (*l4, *end);
    let v4 = packet.tuple.source.is_v4();
    let protocol = packet.tuple.protocol;
    let icmp = matches!(protocol, ICMP | ICMPV6) && v4 == (protocol == ICMP);
    if !icmp && !matches!(protocol, TCP | UDP | SCTP) {
        return Ok(What::Ip);
    }
    let header = load_within::<8>(skb, l4, end)?;
    if icmp {
        let identifier = u16::from_be_bytes([header[4], header[5]]);
        packet.kind = Kind::OtherIcmp;
        match message(v4, header[0]) {
            Message::EchoRequest => {
                packet.tuple.source_port = identifier;
                packet.kind = Kind::EchoRequest;
            }
            Message::EchoReply => {
                packet.tuple.destination_port = identifier;
                packet.kind = Kind::EchoReply;
            }
            Message::Error if packet.part == Part::Whole => return Ok(What::Error),
            Message::Solicitation => return Ok(What::Solicitation),
            Message::Error | Message::Other => {}
        }
        return Ok(What::Ip);
    }
    packet.tuple.source_port = u16::from_be_bytes([header[0], header[1]]);
    packet.tuple.destination_port = u16::from_be_bytes([header[2], header[3]]);
    let header_len = match protocol {
        TCP => {
            // The last byte of the header without options (RFC 9293, 3.1).
            load_within::<1>(skb, l4 + 19, end)?;
            let [offset, flags] = load_within::<2>(skb, l4 + 12, end)?;
            packet.kind = Kind::Tcp;
            packet.tcp_flags = flags;
            u32::from(offset >> 4) * 4
        }
        SCTP => {
            // A chunk's header follows the common one (RFC 9260, 3).
            let chunk = load_within::<4>(skb, l4 + 12, end)?;
            packet.kind = Kind::Sctp;
            packet.tcp_flags = sctp_flags(chunk[0]);
            12
        }
        _ => {
            packet.kind = Kind::Udp;
            8
        }
    };
    let segment = skb.gso_size();
    if segment != 0 {
        packet.wire_len = (l4 - ETHERNET_LEN) as u32 + header_len + segment;
    }
    Ok(What::Ip)
}

/// What an ICMP message is to a translator.
enum Message {
    EchoRequest,
    EchoReply,
    /// Unreachable, too big, time exceeded or parameter problem.
    Error,
    Solicitation,
    Other,
}

/// RFC 792; RFC 4443, 4; RFC 4861, 4.3.
#[inline(always)]
const fn message(v4: bool, kind: u8) -> Message {
    match (v4, kind) {
        (true, 8) | (false, 128) => Message::EchoRequest,
        (true, 0) | (false, 129) => Message::EchoReply,
        (true, 3 | 11 | 12) | (false, 1..=4) => Message::Error,
        (false, 135) => Message::Solicitation,
        _ => Message::Other,
    }
}

/// What an SCTP chunk does to its association, in TCP's words (RFC 9260, 3.2).
#[inline(always)]
const fn sctp_flags(chunk: u8) -> u8 {
    match chunk {
        1 => SYN,
        2 => SYN | ACK,
        6 | 14 => RST,
        _ => ACK,
    }
}

/// Copies a header out, if it ends within the packet.
#[inline(always)]
fn load_within<const N: usize>(skb: &Skb, at: usize, end: usize) -> Result<[u8; N], Refused> {
    if at + N > end { Err(Refused) } else { skb.load(at) }
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

/// Sets the tuple of an ICMP error to that of the packet that it quotes, reversed. Where that cannot be told,
/// where the quoted packet was not sent by whom the error is sent to, or where a router's error is not wanted,
/// the tuple is left as it was.
#[inline(never)]
fn quoted_reversed(skb: &Skb, headers: &mut Headers, routers: bool) -> Quote {
    let at = headers.l4 + ICMP_LEN;
    let end = headers.end;
    let tuple = &mut headers.packet.tuple;
    let [from, to] = &mut headers.quoted;
    let v4 = tuple.source.is_v4();
    let (protocol, l4) = if v4 {
        let Ok(ip) = load_within::<IPV4_LEN>(skb, at, end) else { return Quote::Unknown };
        let header_len = usize::from(ip[0] & 0x0f) * 4;
        // A later fragment has no ports to tell.
        let offset = u16::from_be_bytes([ip[6], ip[7]]) & FRAGMENT_OFFSET;
        if ip[0] >> 4 != 4 || header_len < IPV4_LEN || offset != 0 {
            return Quote::Unknown;
        }
        *from = Ip::v4([ip[12], ip[13], ip[14], ip[15]]);
        *to = Ip::v4([ip[16], ip[17], ip[18], ip[19]]);
        (ip[9], at + header_len)
    } else {
        let Ok(ip) = load_within::<8>(skb, at, end) else { return Quote::Unknown };
        if ip[0] >> 4 != 6
            || at + IPV6_LEN > end
            || skb.load_into(at + 8, &mut from.octets).is_err()
            || skb.load_into(at + 24, &mut to.octets).is_err()
        {
            return Quote::Unknown;
        }
        (ip[6], at + IPV6_LEN)
    };
    let by_host = *to == tuple.source;
    if *from != tuple.destination || !(by_host || routers) {
        return Quote::Unknown;
    }
    // Eight bytes are all that is sure to be quoted (RFC 792), and enough.
    let Ok(header) = load_within::<8>(skb, l4, end) else { return Quote::Unknown };
    let identifier = u16::from_be_bytes([header[4], header[5]]);
    let (from_port, to_port) = match protocol {
        TCP | UDP | SCTP => {
            (u16::from_be_bytes([header[0], header[1]]), u16::from_be_bytes([header[2], header[3]]))
        }
        ICMP | ICMPV6 if v4 == (protocol == ICMP) => match message(v4, header[0]) {
            Message::EchoRequest => (identifier, 0),
            Message::EchoReply => (0, identifier),
            _ => return Quote::Unknown,
        },
        _ => return Quote::Unknown,
    };
    tuple.source = *to;
    tuple.source_port = to_port;
    tuple.destination_port = from_port;
    tuple.protocol = protocol;
    if by_host { Quote::ByHost } else { Quote::ByRouter }
}
