//! "Too big", said to a pod: the packet at hand becomes the ICMP error about itself.

use aya_ebpf::bindings::TC_ACT_SHOT;
use datapath::addr::Ip;
use datapath::packet::{ICMP, ICMPV6};

use crate::answer::{Answer, send_back};
use crate::ctx::{Refused, Skb};
use crate::packet::{ETH_P_IP, ETHERNET_LEN, ICMP_LEN, IPV4_LEN as V4, IPV6_LEN as V6};

/// Longest error of IPv4 (RFC 1812, 4.3.2.3): what every host takes.
const MAX_V4: u32 = 576;
/// Longest error of IPv6, its minimum MTU (RFC 4443, 2.4).
const MAX_V6: u32 = 1280;
/// "Fragmentation needed and DF set" (RFC 792); "packet too big" (RFC 4443, 3.2).
const UNREACHABLE: [u8; 2] = [3, 4];
const PACKET_TOO_BIG: [u8; 2] = [2, 0];
/// Hop limit of an answer, as of its IPv4 twin.
const HOP_LIMIT: u8 = 64;
/// Precedence "internetwork control" (RFC 1812, 4.3.2.5).
const CONTROL: u8 = 0xc0;
/// The quoted packet's header and as much behind it as tells whose it is (RFC 792).
const LEAST_BEHIND_HEADER: u32 = 8;
/// The fragment offset (RFC 791, 3.1).
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// Answers a packet with "too big": `mtu` is the size, in bytes of IP, that fits, `from` the error's source, of
/// the packet's family. The error goes back out of the interface that the packet came by.
///
/// A packet that may not be answered is dropped: a later fragment, or one to a link-layer group (RFC 1812,
/// 4.3.2.7). That it is no ICMP error itself is the caller's to see to.
///
/// A function of its own: it needs stack that its callers do not have to spare.
#[inline(never)]
pub fn answer(skb: &Skb, mtu: u16, from: &Ip) -> i32 {
    let done = if skb.protocol() == ETH_P_IP { v4(skb, mtu, from) } else { v6(skb, mtu, from) };
    match done {
        Ok(()) => send_back(skb),
        Err(Refused) => TC_ACT_SHOT,
    }
}

#[inline(always)]
fn v4(skb: &Skb, mtu: u16, from: &Ip) -> Result<(), Refused> {
    const QUOTE: usize = V4 + ICMP_LEN;
    const LEAST: u32 = V4 as u32 + LEAST_BEHIND_HEADER;
    const MOST: u32 = MAX_V4 - QUOTE as u32;
    let mut answer = Answer::to(skb)?;
    let length = quotable(skb, skb.load(ETHERNET_LEN + 2)?, 0, MOST);
    let quoted = answer.quote::<LEAST, MOST>(skb, QUOTE, length)?;
    let offset = u16::from_be_bytes(answer.get(QUOTE + 6)) & FRAGMENT_OFFSET;
    if offset != 0 || !answer.was_unicast() {
        return Err(Refused);
    }
    let len = ICMP_LEN as u32 + quoted;
    answer.set(12, &from.v4_octets());
    answer.copy::<4>(QUOTE + 12, 16);
    answer.set_v4_header(CONTROL, V4 as u32 + len, ICMP);
    let [kind, code] = UNREACHABLE;
    let [high, low] = mtu.to_be_bytes();
    answer.set(V4, &[kind, code, 0, 0, 0, 0, high, low]);
    let checksum = answer.checksum_v4(len);
    answer.set(V4 + 2, &checksum);
    answer.replace(skb, V4 as u32 + len)
}

#[inline(always)]
fn v6(skb: &Skb, mtu: u16, from: &Ip) -> Result<(), Refused> {
    const QUOTE: usize = V6 + ICMP_LEN;
    const LEAST: u32 = V6 as u32 + LEAST_BEHIND_HEADER;
    const MOST: u32 = MAX_V6 - QUOTE as u32;
    let mut answer = Answer::to(skb)?;
    let length = quotable(skb, skb.load(ETHERNET_LEN + 4)?, V6 as u32, MOST);
    let quoted = answer.quote::<LEAST, MOST>(skb, QUOTE, length)?;
    if !answer.was_unicast() {
        return Err(Refused);
    }
    let len = ICMP_LEN as u32 + quoted;
    answer.set(8, &from.octets);
    answer.copy::<16>(QUOTE + 8, 24);
    answer.set_v6_header(len, ICMPV6, HOP_LIMIT);
    let [kind, code] = PACKET_TOO_BIG;
    let [high, low] = mtu.to_be_bytes();
    answer.set(V6, &[kind, code, 0, 0, 0, 0, high, low]);
    let checksum = answer.pseudo_checksum_v6(ICMPV6, len);
    answer.set(V6 + 2, &checksum);
    answer.replace(skb, V6 as u32 + len)
}

/// How much of the packet can be quoted: all of it, without Ethernet padding, up to `most`.
#[inline(always)]
fn quotable(skb: &Skb, length_field: [u8; 2], header: u32, most: u32) -> u32 {
    let on_wire = skb.len() - ETHERNET_LEN as u32;
    let told = u32::from(u16::from_be_bytes(length_field));
    // BIG TCP's length is 0 (include/net/ip.h, iph_totlen; RFC 2675).
    let len = if told == 0 || told + header > on_wire { on_wire } else { told + header };
    if len > most { most } else { len }
}
