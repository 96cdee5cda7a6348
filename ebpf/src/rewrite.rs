//! Edits of addresses, ports and checksums.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use datapath::addr::Ip;
use datapath::packet::Kind;
use datapath::verdict::ReverseSnat;

use crate::ctx::{Refused, Skb};
use crate::packet::{ETHERNET_LEN, Headers};

const IP_CHECKSUM: usize = ETHERNET_LEN + 10;
const IP_SOURCE: usize = ETHERNET_LEN + 12;
const IP_DESTINATION: usize = ETHERNET_LEN + 16;

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
    // Words as they lie in memory: what the checksum helpers take.
    let (from, to) = (u32::from_ne_bytes(from_ip.v4_octets()), u32::from_ne_bytes(to_ip.v4_octets()));
    let (from_word, to_word) = (u32::from(from_port.to_be()), u32::from(to_port.to_be()));
    // Offset of the checksum; whether it covers the addresses (pseudo-header); a UDP checksum of 0 is "none".
    let (checksum, covers_addresses, flags) = match headers.packet.kind {
        Kind::Tcp => (16, true, 0),
        Kind::Udp => (6, true, u64::from(BPF_F_MARK_MANGLED_0)),
        Kind::EchoRequest | Kind::EchoReply => (2, false, 0),
        Kind::OtherIcmp | Kind::Fragment | Kind::Other | Kind::Malformed => return Err(Refused),
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
