//! Edits of addresses, ports and checksums.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use datapath::addr::Ip;
use datapath::packet::{ICMP, Kind, SYN, UDP};
use datapath::verdict::ReverseSnat;

use crate::ctx::{Refused, Skb};
use crate::packet::{ETHERNET_LEN, Headers, ICMP_LEN};

const IP_TTL: usize = ETHERNET_LEN + 8;
const IP_CHECKSUM: usize = ETHERNET_LEN + 10;
const IP_SOURCE: usize = ETHERNET_LEN + 12;
const IP_DESTINATION: usize = ETHERNET_LEN + 16;

/// A UDP checksum of 0 is "none" and stays so; one that comes out as 0 is written as its other form (RFC 768).
const UDP_FLAGS: u64 = BPF_F_MARK_MANGLED_0 as u64;
/// Bytes of a TCP header that options may take (RFC 9293, 3.1).
const MAX_OPTIONS: u32 = 40;
/// IPv4 and TCP headers without options.
const TCP_OVERHEAD: u16 = 20 + 20;
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
    let end = ETHERNET_LEN + headers.packet.len as usize;
    lower_mss(skb, headers.l4, end, mtu.saturating_sub(TCP_OVERHEAD))
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

/// SNAT: sets source address and port.
#[inline(always)]
pub fn snat(skb: &Skb, headers: &Headers, source: &Ip, source_port: u16) -> Result<(), Refused> {
    let tuple = &headers.packet.tuple;
    rewrite(skb, headers, End::Source, (&tuple.source, tuple.source_port), (source, source_port))
}

/// Reverse SNAT: sets destination address and port.
#[inline(always)]
pub fn reverse_snat(skb: &Skb, headers: &Headers, to: &ReverseSnat) -> Result<(), Refused> {
    let tuple = &headers.packet.tuple;
    rewrite(
        skb,
        headers,
        End::Destination,
        (&tuple.destination, tuple.destination_port),
        (&to.destination, to.destination_port),
    )
}

#[inline(always)]
fn rewrite(
    skb: &Skb,
    headers: &Headers,
    end: End,
    (from_ip, from_port): (&Ip, u16),
    (to_ip, to_port): (&Ip, u16),
) -> Result<(), Refused> {
    if headers.packet.kind == Kind::IcmpError {
        let change = Change { end, from_port, to_port, to: to_ip.v4_octets() };
        return rewrite_error(skb, headers.l4, headers.packet.tuple.protocol, &change);
    }
    // Words as they lie in memory: what the checksum helpers take.
    let (from, to) = (u32::from_ne_bytes(from_ip.v4_octets()), u32::from_ne_bytes(to_ip.v4_octets()));
    let (from_word, to_word) = (u32::from(from_port.to_be()), u32::from(to_port.to_be()));
    // Offset of the checksum; whether it covers the addresses (pseudo-header); a UDP checksum of 0 is "none".
    let (checksum, covers_addresses, flags) = match headers.packet.kind {
        Kind::Tcp => (16, true, 0),
        Kind::Udp => (6, true, UDP_FLAGS),
        Kind::EchoRequest | Kind::EchoReply => (2, false, 0),
        Kind::IcmpError | Kind::OtherIcmp | Kind::Fragment | Kind::Other | Kind::Malformed => {
            return Err(Refused);
        }
    };
    let port = headers.l4
        + match (headers.packet.kind, end) {
            (Kind::EchoRequest | Kind::EchoReply, _) => 4,
            (_, End::Source) => 0,
            (_, End::Destination) => 2,
        };
    let checksum = headers.l4 + checksum;
    if covers_addresses && from != to {
        skb.fix_l4_checksum(checksum, from, to, flags | u64::from(BPF_F_PSEUDO_HDR) | 4)?;
    }
    if from_port != to_port {
        skb.fix_l4_checksum(checksum, from_word, to_word, flags | 2)?;
        skb.store(port, &to_port.to_be_bytes())?;
    }
    if from != to {
        skb.fix_ip_checksum(IP_CHECKSUM, from, to)?;
        let address = if end == End::Source { IP_SOURCE } else { IP_DESTINATION };
        skb.store(address, &to_ip.v4_octets())?;
    }
    Ok(())
}

/// What is rewritten in an ICMP error.
struct Change {
    end: End,
    from_port: u16,
    to_port: u16,
    to: [u8; 4],
}

/// Rewrites an ICMP error: its own address at one end, and in the packet it quotes, which travelled the other
/// way, address and port at the other end (RFC 5508, REQ-4 and REQ-5).
///
/// Of the quoted packet's checksums, those within the eight bytes that are sure to be quoted are corrected. A
/// correction within the quoted packet that leaves its sum as it was does not change the error's own checksum.
#[inline(never)]
fn rewrite_error(skb: &Skb, l4: usize, quoted_protocol: u8, change: &Change) -> Result<(), Refused> {
    let quoted = l4 + ICMP_LEN;
    let quoted_l4 = quoted + usize::from(skb.load::<[u8; 1]>(quoted)?[0] & 0x0f) * 4;
    let (outer_ip, quoted_ip, quoted_port) = match change.end {
        End::Source => (IP_SOURCE, quoted + 16, quoted_l4 + 2),
        End::Destination => (IP_DESTINATION, quoted + 12, quoted_l4),
    };
    let to = u32::from_ne_bytes(change.to);
    for (address, checksum) in [(outer_ip, IP_CHECKSUM), (quoted_ip, quoted + 10)] {
        let from = u32::from_ne_bytes(skb.load(address)?);
        skb.fix_ip_checksum(checksum, from, to)?;
        skb.store(address, &change.to)?;
        if address == quoted_ip && quoted_protocol == UDP {
            let before = skb.load::<[u8; 2]>(quoted_l4 + 6)?;
            if before != [0, 0] {
                skb.fix_l4_checksum(quoted_l4 + 6, from, to, UDP_FLAGS | 4)?;
                fix_error_checksum(skb, l4, before, skb.load(quoted_l4 + 6)?)?;
            }
        }
    }
    let (before, after) = (change.from_port.to_be_bytes(), change.to_port.to_be_bytes());
    if quoted_protocol == ICMP {
        // The identifier and the quoted message's checksum change against each other.
        skb.fix_l4_checksum(quoted_l4 + 2, word(before), word(after), 2)?;
        return skb.store(quoted_l4 + 4, &after);
    }
    if quoted_protocol == UDP {
        let checksum = skb.load::<[u8; 2]>(quoted_l4 + 6)?;
        if checksum != [0, 0] {
            skb.fix_l4_checksum(quoted_l4 + 6, word(before), word(after), UDP_FLAGS | 2)?;
            fix_error_checksum(skb, l4, checksum, skb.load(quoted_l4 + 6)?)?;
        }
    }
    skb.store(quoted_port, &after)?;
    fix_error_checksum(skb, l4, before, after)
}

#[inline(always)]
fn fix_error_checksum(skb: &Skb, l4: usize, before: [u8; 2], after: [u8; 2]) -> Result<(), Refused> {
    skb.fix_l4_checksum(l4 + 2, word(before), word(after), 2)
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
    // The time to live is the high byte of its 16-bit word; the low one does not change.
    skb.fix_ip_checksum_word(IP_CHECKSUM, word([ttl, 0]), word([ttl.wrapping_sub(1), 0]))?;
    skb.store(IP_TTL, &[ttl.wrapping_sub(1)])
}
