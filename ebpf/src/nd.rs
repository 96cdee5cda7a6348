//! Neighbour discovery for held egress IPs, which are configured on no interface: the IPv6 twin of `arp.rs`.

use datapath::addr::Ip;
use datapath::from_uplink::claims;
use datapath::packet::ICMPV6;
use datapath::tables::Tables as _;
use datapath::verdict::DropReason;

use crate::NEXT;
use crate::answer::{Answer, send_back};
use crate::ctx::{Refused, Skb};
use crate::packet::{ETHERNET_LEN, IPV6_LEN as V6};
use crate::report::drop;
use crate::tables::Maps;

const ADVERTISEMENT: u8 = 136;
/// A solicitation without options, and so an advertisement (RFC 4861, 4.3 and 4.4).
const MESSAGE_LEN: u32 = 24;
/// An advertisement with its one option, in units of 8 bytes: the target's link-layer address.
const ANSWER_LEN: u32 = MESSAGE_LEN + 8;
const SOURCE_ADDRESS: u8 = 1;
const TARGET_ADDRESS: [u8; 2] = [2, 1];
/// Flags of an advertisement (RFC 4861, 4.4).
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
/// No router has touched the packet (RFC 4861, 7.1).
const HOP_LIMIT: u8 = 255;
/// Longest solicitation that is looked at: the IPv6 minimum MTU.
const MAX_LEN: u32 = 1280;
/// Options that are looked at. No host sends more than three (RFC 4861, RFC 7527).
const MAX_OPTIONS: u32 = 16;
/// `ff02::1`, all nodes, and its link-layer address (RFC 2464, 7).
const ALL_NODES: Ip = Ip { octets: [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] };
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// Offsets from the IP header.
const SOURCE: usize = 8;
const DESTINATION: usize = 24;
const TARGET: usize = V6 + 8;
const OPTIONS: usize = V6 + MESSAGE_LEN as usize;

/// Answers a neighbour solicitation for an egress IP that this node holds on this uplink. All others, and
/// malformed ones, are left to the kernel untouched.
///
/// The link-layer address that is answered to is the frame's sender, whatever the option says, which many
/// solicitations do not have (RFC 4861, 7.2.2).
///
/// A function of its own: it needs stack that its callers do not have to spare.
#[inline(never)]
pub fn answer(skb: &Skb) -> i32 {
    let Ok(octets) = skb.load::<[u8; 16]>(ETHERNET_LEN + TARGET) else { return NEXT };
    let target = Ip { octets };
    if !claims(&Maps, skb.ifindex(), &target) {
        return NEXT;
    }
    let Some(interface) = Maps.interface(skb.ifindex()) else { return NEXT };
    let Ok(answer) = make(skb, &interface.mac) else { return NEXT };
    match answer.replace(skb, V6 as u32 + ANSWER_LEN) {
        Ok(()) => send_back(skb),
        Err(Refused) => drop(skb, DropReason::Rewrite),
    }
}

/// Checks the solicitation (RFC 4861, 7.1.1) and makes the advertisement (7.2.4), without changing the packet.
#[inline(always)]
fn make(skb: &Skb, mac: &[u8; 6]) -> Result<Answer, Refused> {
    const LEAST: u32 = V6 as u32 + MESSAGE_LEN;
    let length = V6 as u32 + u32::from(u16::from_be_bytes(skb.load(ETHERNET_LEN + 4)?));
    if !length.is_multiple_of(8) {
        return Err(Refused);
    }
    let mut answer = Answer::to(skb)?;
    let payload = answer.quote::<LEAST, MAX_LEN>(skb, 0, length)? - V6 as u32;
    let [hop_limit] = answer.get(7);
    let [code] = answer.get(V6 + 1);
    if hop_limit != HOP_LIMIT || code != 0 || answer.pseudo_checksum_v6(ICMPV6, payload) != [0, 0] {
        return Err(Refused);
    }
    let asker = Ip { octets: answer.get(SOURCE) };
    let target = Ip { octets: answer.get(TARGET) };
    let nobody = asker == Ip::UNSPECIFIED;
    if asker.octets[0] == 0xff || asker == target || !sound_options(skb, payload, nobody) {
        return Err(Refused);
    }
    // Somebody who tries out the address for himself (RFC 4862, 5.4) has none to be answered at: all are told.
    let (to, to_mac, flags) = if nobody {
        (ALL_NODES, ALL_NODES_MAC, OVERRIDE)
    } else {
        (asker, answer.asker_mac(), SOLICITED | OVERRIDE)
    };
    answer.set_macs(&to_mac, mac);
    answer.set(SOURCE, &target.octets);
    answer.set(DESTINATION, &to.octets);
    answer.set_v6_header(ANSWER_LEN, ICMPV6, HOP_LIMIT);
    answer.set(V6, &[ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0]);
    answer.set(OPTIONS, &TARGET_ADDRESS);
    answer.set(OPTIONS + 2, mac);
    let checksum = answer.pseudo_checksum_v6(ICMPV6, ANSWER_LEN);
    answer.set(V6 + 2, &checksum);
    Ok(answer)
}

/// Whether all options have a length and fit exactly. An asker without address gives no link-layer address.
#[inline(always)]
fn sound_options(skb: &Skb, payload: u32, nobody: bool) -> bool {
    let end = ETHERNET_LEN + V6 + payload as usize;
    let mut at = ETHERNET_LEN + OPTIONS;
    for _ in 0..MAX_OPTIONS {
        if at >= end {
            break;
        }
        let Ok([kind, len]) = skb.load::<[u8; 2]>(at) else { return false };
        if len == 0 || (nobody && kind == SOURCE_ADDRESS) {
            return false;
        }
        at += usize::from(len) * 8;
    }
    at == end
}
