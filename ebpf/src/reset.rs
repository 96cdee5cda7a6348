//! RST for a TCP segment that belongs to no flow: its sender learns at once, not when it gives up.

use datapath::addr::Ip;
use datapath::keys::Tuple;
use datapath::packet::{ACK, FIN, RST, SYN, TCP};

use crate::answer::Answer;
use crate::ctx::{Refused, Skb};
use crate::packet::{ETHERNET_LEN, Headers, IPV4_LEN as V4, IPV6_LEN as V6};

/// Length of a TCP header without options.
const TCP_LEN: u32 = 20;
/// Hop limit of an answer, as of its IPv4 twin.
const HOP_LIMIT: u8 = 64;
/// Transport headers that begin further in are not answered: `Answer::replace` has no room for them.
const LAST_L4: usize = 256;

/// Turns a TCP segment into the RST that answers it (RFC 9293, 3.5.2), link-layer addresses turned round. An
/// RST, or a segment to a link-layer group, is refused. A refused packet may be spoilt and is to be dropped.
///
/// A function of its own: it needs stack that its callers do not have to spare.
#[inline(never)]
pub fn turn(skb: &Skb, headers: &Headers) -> Result<(), Refused> {
    let tuple = &headers.packet.tuple;
    if tuple.source.is_v4() {
        make::<V4>(skb, headers.l4, headers.packet.len, tuple)
    } else {
        make::<V6>(skb, headers.l4, headers.packet.len, tuple)
    }
}

/// For an IP header of `HEADER` bytes. The segment's header is at `l4` of the frame, its packet is `len` bytes
/// of IP.
#[inline(always)]
fn make<const HEADER: usize>(skb: &Skb, l4: usize, len: u32, tuple: &Tuple) -> Result<(), Refused> {
    let mut answer = Answer::to(skb)?;
    let [words, flags] = skb.load(l4 + 12)?;
    if flags & RST != 0 || l4 > LAST_L4 || !answer.was_unicast() {
        return Err(Refused);
    }
    let (seq, ack, answer_flags) = if flags & ACK != 0 {
        (skb.load(l4 + 8)?, [0; 4], RST)
    } else {
        let headers = (l4 - ETHERNET_LEN) as u32 + u32::from(words >> 4) * 4;
        let taken = len.saturating_sub(headers) + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        let seq = u32::from_be_bytes(skb.load(l4 + 4)?);
        ([0; 4], seq.wrapping_add(taken).to_be_bytes(), RST | ACK)
    };
    let (from, to) = (&tuple.destination, &tuple.source);
    answer.set(HEADER, &tuple.destination_port.to_be_bytes());
    answer.set(HEADER + 2, &tuple.source_port.to_be_bytes());
    answer.set(HEADER + 4, &seq);
    answer.set(HEADER + 8, &ack);
    answer.set(HEADER + 12, &[(TCP_LEN as u8 / 4) << 4, answer_flags, 0, 0, 0, 0, 0, 0]);
    let checksum = if HEADER == V4 {
        answer.set(12, &from.v4_octets());
        answer.set(16, &to.v4_octets());
        answer.set_v4_header(0, V4 as u32 + TCP_LEN, TCP);
        answer.pseudo_checksum_v4(TCP, TCP_LEN)
    } else {
        let (Ip { octets: from }, Ip { octets: to }) = (from, to);
        answer.set(8, from);
        answer.set(24, to);
        answer.set_v6_header(TCP_LEN, TCP, HOP_LIMIT);
        answer.pseudo_checksum_v6(TCP, TCP_LEN)
    };
    answer.set(HEADER + 16, &checksum);
    answer.replace(skb, HEADER as u32 + TCP_LEN)
}
