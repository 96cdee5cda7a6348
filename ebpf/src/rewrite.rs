//! Edits of addresses, ports and checksums.

use aya_ebpf::bindings::BPF_F_MARK_MANGLED_0;
use datapath::addr::Ip;
use datapath::crc32c;
use datapath::packet::{ICMP, ICMPV6, Kind, Part, SYN, UDP};
use datapath::verdict::ReverseSnat;

use crate::ctx::{Refused, Skb, difference};
use crate::packet::{ETHERNET_LEN, Headers, ICMP_LEN, IPV6_LEN};

const IP_TTL: usize = ETHERNET_LEN + 8;
const IP_CHECKSUM: usize = ETHERNET_LEN + 10;
const IP_SOURCE: usize = ETHERNET_LEN + 12;
const IP_DESTINATION: usize = ETHERNET_LEN + 16;
const IPV6_HOP_LIMIT: usize = ETHERNET_LEN + 7;
const IPV6_SOURCE: usize = ETHERNET_LEN + 8;
const IPV6_DESTINATION: usize = ETHERNET_LEN + 24;

/// A UDP checksum of 0 is "none" and stays so; one that comes out as 0 is written as its other form (RFC 768).
const UDP_FLAGS: u64 = BPF_F_MARK_MANGLED_0 as u64;
/// Bytes of a TCP header that options may take (RFC 9293, 3.1).
const MAX_OPTIONS: u32 = 40;
/// IPv4 and TCP headers without options, and the same for IPv6.
const TCP_OVERHEAD: u16 = 20 + 20;
const TCP_OVERHEAD_V6: u16 = 40 + 20;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;

/// Lowers the MSS option of a SYN or SYN-ACK to what the tunnel carries whole: both ends would else send
/// segments that must be fragmented. Other packets, and SYNs without the option, are left as they are.
#[inline(always)]
pub fn clamp_mss(skb: &Skb, headers: &Headers, mtu: u16) -> Result<(), Refused> {
    if headers.packet.kind != Kind::Tcp || headers.packet.tcp_flags & SYN == 0 || mtu == 0 {
        return Ok(());
    }
    let overhead = if headers.packet.tuple.source.is_v4() { TCP_OVERHEAD } else { TCP_OVERHEAD_V6 };
    lower_mss(skb, headers.l4, headers.end, mtu.saturating_sub(overhead))
}

/// A function of its own: it needs stack that its callers do not have to spare.
#[inline(never)]
fn lower_mss(skb: &Skb, l4: usize, end: usize, mss: u16) -> Result<(), Refused> {
    let options_end = l4 + usize::from(skb.load::<[u8; 1]>(l4 + 12)?[0] >> 4) * 4;
    // The data offset lies: what is behind the packet's end is Ethernet's padding, which no checksum covers.
    if options_end > end {
        return Ok(());
    }
    let mut at = l4 + 20;
    for _ in 0..MAX_OPTIONS {
        if at + 4 > options_end {
            break;
        }
        let [kind, len, high, low] = skb.load::<[u8; 4]>(at)?;
        match (kind, len) {
            (OPTION_END, _) => break,
            (OPTION_NOP, _) => at += 1,
            (OPTION_MSS, 4) => {
                let offered = u16::from_be_bytes([high, low]);
                if offered > mss {
                    set_mss(skb, l4, at + 2, offered, mss)?;
                }
                break;
            }
            (_, 0 | 1) => break, // malformed: the receiver's to judge
            _ => at += usize::from(len),
        }
    }
    Ok(())
}

#[inline(always)]
fn set_mss(skb: &Skb, l4: usize, at: usize, from: u16, to: u16) -> Result<(), Refused> {
    // At an odd offset the two bytes belong to neighbouring words of the sum: the same as swapped in one.
    let swap = |value: u16| if (at - l4) % 2 == 1 { value.swap_bytes() } else { value };
    skb.fix_l4_checksum(l4 + 16, u32::from(swap(from).to_be()), u32::from(swap(to).to_be()), 2)?;
    skb.store(at, &to.to_be_bytes())
}

/// The end of the tuple that is rewritten.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
}

impl Headers {
    /// Address and port at one end.
    #[inline(always)]
    const fn side(&self, end: End) -> (&Ip, u16) {
        let tuple = &self.packet.tuple;
        match end {
            End::Source => (&tuple.source, tuple.source_port),
            End::Destination => (&tuple.destination, tuple.destination_port),
        }
    }
}

/// SNAT: sets source address and port.
#[inline(always)]
pub fn snat(skb: &Skb, headers: &Headers, source: &Ip, source_port: u16) -> Result<(), Refused> {
    rewrite(skb, headers, End::Source, source, source_port)
}

/// Reverse SNAT: sets destination address and port.
#[inline(always)]
pub fn reverse_snat(skb: &Skb, headers: &Headers, to: &ReverseSnat) -> Result<(), Refused> {
    rewrite(skb, headers, End::Destination, &to.destination, to.destination_port)
}

#[inline(always)]
fn rewrite(skb: &Skb, headers: &Headers, end: End, to: &Ip, to_port: u16) -> Result<(), Refused> {
    if headers.packet.kind == Kind::IcmpError {
        rewrite_error(skb, headers, end, to, to_port)
    } else {
        rewrite_packet(skb, headers, end, to, to_port)
    }
}

/// A function of its own, as the other: they need stack that their callers do not have to spare.
#[inline(never)]
fn rewrite_packet(skb: &Skb, headers: &Headers, end: End, to: &Ip, to_port: u16) -> Result<(), Refused> {
    let (from, from_port) = headers.side(end);
    let change = difference(from, to);
    // What the first fragment says of ports and checksum covers the later ones.
    let balanced = headers.packet.part != Part::Later
        && rewrite_transport(skb, headers, end, change, from_port, to_port)?;
    set_address(skb, end, change, to, balanced)
}

/// Sets an address, and corrects the IPv4 header's checksum. `balanced`: a checksum behind it has been corrected
/// for it.
#[inline(always)]
fn set_address(skb: &Skb, end: End, change: u32, to: &Ip, balanced: bool) -> Result<(), Refused> {
    if to.is_v4() {
        skb.fix_ip_checksum(IP_CHECKSUM, change)?;
        let address = if end == End::Source { IP_SOURCE } else { IP_DESTINATION };
        skb.store(address, &to.v4_octets())
    } else {
        let address = if end == End::Source { IPV6_SOURCE } else { IPV6_DESTINATION };
        if balanced { skb.store(address, &to.octets) } else { skb.store_summed(address, &to.octets) }
    }
}

/// Sets a port, and corrects the transport checksum for it and for the `change` of an address. Returns whether
/// that checksum covers addresses.
#[inline(always)]
fn rewrite_transport(
    skb: &Skb,
    headers: &Headers,
    end: End,
    change: u32,
    from: u16,
    to: u16,
) -> Result<bool, Refused> {
    let packet = &headers.packet;
    // Offset of the checksum; whether it covers the addresses (pseudo-header); a UDP checksum of 0 is "none".
    let (checksum, covers_addresses, flags) = match packet.kind {
        Kind::Tcp => (16, true, 0),
        Kind::Udp => (6, true, UDP_FLAGS),
        Kind::EchoRequest | Kind::EchoReply => (2, packet.tuple.protocol == ICMPV6, 0),
        Kind::Sctp => return rewrite_sctp(skb, headers, end, to).map(|()| false),
        Kind::IcmpError | Kind::OtherIcmp | Kind::Fragment | Kind::Other | Kind::Malformed => {
            return Err(Refused);
        }
    };
    let port = headers.l4
        + match (packet.kind, end) {
            (Kind::EchoRequest | Kind::EchoReply, _) => 4,
            (_, End::Source) => 0,
            (_, End::Destination) => 2,
        };
    let checksum = headers.l4 + checksum;
    if covers_addresses {
        skb.fix_pseudo_header(checksum, change, !packet.tuple.source.is_v4(), flags)?;
    }
    if from != to {
        skb.fix_l4_checksum(checksum, word(from.to_be_bytes()), word(to.to_be_bytes()), flags | 2)?;
        skb.store(port, &to.to_be_bytes())?;
    }
    // A UDP checksum of 0 is none (RFC 768).
    let none = packet.kind == Kind::Udp && skb.load::<[u8; 2]>(checksum)? == [0, 0];
    Ok(covers_addresses && !none)
}

/// SCTP's checksum does not cover addresses.
#[inline(always)]
fn rewrite_sctp(skb: &Skb, headers: &Headers, end: End, to: u16) -> Result<(), Refused> {
    let from = skb.load::<[u8; 4]>(headers.l4)?;
    let to = to.to_be_bytes();
    let ports = match end {
        End::Source => [to[0], to[1], from[2], from[3]],
        End::Destination => [from[0], from[1], to[0], to[1]],
    };
    let checksum = u32::from_le_bytes(skb.load(headers.l4 + 8)?);
    let after = headers.packet.len - (headers.l4 - ETHERNET_LEN) as u32 - 4;
    // 0: left to the device to be summed up (sctp_packet_pack, net/sctp/output.c), as netfilter's NAT leaves it.
    if checksum != 0 {
        skb.store_summed(headers.l4 + 8, &crc32c::updated(checksum, from, ports, after).to_le_bytes())?;
    }
    skb.store_summed(headers.l4, &ports)
}

/// Rewrites an ICMP error: its own address at one end, and in the packet it quotes, which travelled the other
/// way, address and port at the other end (RFC 5508, REQ-4 and REQ-5). Both addresses are the same before.
///
/// Of the quoted packet's transport checksums, those within the eight bytes that are sure to be quoted are
/// corrected. The error's own checksum covers all that is quoted, and over IPv6 its own addresses.
#[inline(never)]
fn rewrite_error(skb: &Skb, headers: &Headers, end: End, to: &Ip, to_port: u16) -> Result<(), Refused> {
    let (from, from_port) = headers.side(end);
    let change = difference(from, to);
    let (l4, quoted_protocol) = (headers.l4, headers.packet.tuple.protocol);
    let v4 = to.is_v4();
    let quoted = l4 + ICMP_LEN;
    let error_checksum = l4 + 2;
    set_address(skb, end, change, to, true)?;
    if !v4 {
        skb.fix_pseudo_header(error_checksum, change, true, 0)?;
    }
    let quoted_l4 = if v4 {
        // The quoted header's checksum balances its address.
        skb.fix_ip_checksum(quoted + 10, change)?;
        skb.store(quoted + if end == End::Source { 16 } else { 12 }, &to.v4_octets())?;
        quoted + usize::from(skb.load::<[u8; 1]>(quoted)?[0] & 0x0f) * 4
    } else {
        skb.fix_l4_checksum_by(error_checksum, change, 0)?;
        skb.store(quoted + if end == End::Source { 24 } else { 8 }, &to.octets)?;
        quoted + IPV6_LEN
    };
    let (before, after) = (from_port.to_be_bytes(), to_port.to_be_bytes());
    let (checksum, covers_addresses, flags) = match quoted_protocol {
        UDP => (6, true, UDP_FLAGS),
        ICMP => (2, false, 0),
        ICMPV6 => (2, true, 0),
        _ => (0, false, 0),
    };
    if checksum != 0 {
        let stands = skb.load::<[u8; 2]>(quoted_l4 + checksum)?;
        if stands != [0, 0] || quoted_protocol != UDP {
            if covers_addresses {
                skb.fix_l4_checksum_by(quoted_l4 + checksum, change, flags)?;
            }
            skb.fix_l4_checksum(quoted_l4 + checksum, word(before), word(after), flags | 2)?;
            fix_error_checksum(skb, l4, stands, skb.load(quoted_l4 + checksum)?)?;
        }
    }
    let port = match (quoted_protocol, end) {
        (ICMP | ICMPV6, _) => 4,
        (_, End::Source) => 2,
        (_, End::Destination) => 0,
    };
    skb.store(quoted_l4 + port, &after)?;
    fix_error_checksum(skb, l4, before, after)
}

#[inline(always)]
fn fix_error_checksum(skb: &Skb, l4: usize, before: [u8; 2], after: [u8; 2]) -> Result<(), Refused> {
    skb.fix_l4_checksum(l4 + 2, word(before), word(after), 2)
}

/// Sets two bytes of a datagram's payload, at an even distance from its UDP header at `l4`, and corrects its checksum.
#[inline(always)]
pub fn udp_word(skb: &Skb, l4: usize, at: usize, from: [u8; 2], to: [u8; 2]) -> Result<(), Refused> {
    skb.fix_l4_checksum(l4 + 6, word(from), word(to), UDP_FLAGS | 2)?;
    skb.store(at, &to)
}

/// Two bytes as they lie in memory.
#[inline(always)]
const fn word(bytes: [u8; 2]) -> u32 {
    u16::from_ne_bytes(bytes) as u32
}

/// One router hop: takes one from the time to live, which is more than 1.
#[inline(always)]
pub fn hop(skb: &Skb, headers: &Headers) -> Result<(), Refused> {
    let ttl = headers.packet.ttl;
    if !headers.packet.tuple.source.is_v4() {
        // No checksum balances it.
        return skb.store_summed(IPV6_HOP_LIMIT, &[ttl.wrapping_sub(1)]);
    }
    // The time to live is the high byte of its 16-bit word; the low one does not change.
    skb.fix_ip_checksum_word(IP_CHECKSUM, word([ttl, 0]), word([ttl.wrapping_sub(1), 0]))?;
    skb.store(IP_TTL, &[ttl.wrapping_sub(1)])
}
