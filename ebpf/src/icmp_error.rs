//! ICMP errors: the packet at hand becomes the one about itself.

use datapath::addr::Ip;
use datapath::packet::{ICMP, ICMPV6};

use crate::answer::Answer;
use crate::ctx::{Refused, Skb};
use crate::packet::{ETH_P_IP, ETHERNET_LEN, ICMP_LEN, IPV4_LEN as V4, IPV6_LEN as V6};

/// Longest error of IPv4 (RFC 1812, 4.3.2.3): what every host takes.
const MAX_V4: u32 = 576;
/// Longest error of IPv6, its minimum MTU (RFC 4443, 2.4).
const MAX_V6: u32 = 1280;
/// "Fragmentation needed and DF set" (RFC 792); "packet too big" (RFC 4443, 3.2).
const FRAGMENTATION_NEEDED: [u8; 2] = [3, 4];
const PACKET_TOO_BIG: [u8; 2] = [2, 0];
/// "Communication administratively prohibited" (RFC 1812, 5.2.7.1; RFC 4443, 3.1).
const PROHIBITED_V4: [u8; 2] = [3, 13];
const PROHIBITED_V6: [u8; 2] = [1, 1];
/// Instead of a size: the packet is prohibited.
const PROHIBITED: u16 = 0;
/// Hop limit of an answer, as of its IPv4 twin.
const HOP_LIMIT: u8 = 64;
/// Precedence "internetwork control" (RFC 1812, 4.3.2.5).
const CONTROL: u8 = 0xc0;
/// The quoted packet's header and as much behind it as tells whose it is (RFC 792).
const LEAST_BEHIND_HEADER: u32 = 8;
/// The fragment offset (RFC 791, 3.1).
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// Turns a packet into the error "too big": `mtu` is the size, in bytes of IP, that fits. The rest is as of
/// [`prohibited`].
#[inline(always)]
pub fn too_big(skb: &Skb, mtu: u16, from: &Ip) -> Result<(), Refused> {
    make(skb, mtu, from)
}

/// Turns a packet into the error "administratively prohibited", link-layer addresses turned round. `from` is the
/// error's source, of the packet's family. Refused is a packet that may not be answered: a later fragment, or one to a
/// link-layer group (RFC 1812, 4.3.2.7); that it is no ICMP error itself is the caller's to see to. A refused packet
/// may be spoilt and is to be dropped.
#[inline(always)]
pub fn prohibited(skb: &Skb, from: &Ip) -> Result<(), Refused> {
    make(skb, PROHIBITED, from)
}

/// A function of its own: it needs stack that its callers do not have to spare.
#[inline(never)]
fn make(skb: &Skb, mtu: u16, from: &Ip) -> Result<(), Refused> {
    if skb.protocol() == ETH_P_IP { v4(skb, mtu, from) } else { v6(skb, mtu, from) }
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
    let [kind, code] = if mtu == PROHIBITED { PROHIBITED_V4 } else { FRAGMENTATION_NEEDED };
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
    let [kind, code] = if mtu == PROHIBITED { PROHIBITED_V6 } else { PACKET_TOO_BIG };
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
