//! ARP for held egress IPs: they are configured on no interface, so the kernel would not answer.

use aya_ebpf::helpers::generated::bpf_redirect;
use datapath::addr::Ip;
use datapath::from_uplink::claims;
use datapath::tables::Tables as _;

use crate::NEXT;
use crate::ctx::{Refused, Skb};
use crate::packet::ETHERNET_LEN;
use crate::tables::Maps;

/// Hardware type Ethernet, protocol type IPv4, their address lengths (RFC 826).
const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];

/// Answers a request for an egress IP that this node holds on this uplink; leaves all other ARP to the kernel.
#[inline(always)]
pub fn answer(skb: &Skb) -> i32 {
    match try_answer(skb) {
        Ok(true) => {
            // SAFETY: plain integers.
            unsafe { bpf_redirect(skb.ifindex(), 0) as i32 }
        }
        Ok(false) | Err(Refused) => NEXT,
    }
}

#[inline(always)]
fn try_answer(skb: &Skb) -> Result<bool, Refused> {
    let arp = skb.load::<[u8; 28]>(ETHERNET_LEN)?;
    if arp[..6] != ETHERNET_IPV4 || arp[6..8] != REQUEST {
        return Ok(false);
    }
    let sender_mac = [arp[8], arp[9], arp[10], arp[11], arp[12], arp[13]];
    let sender_ip = [arp[14], arp[15], arp[16], arp[17]];
    let target_ip = [arp[24], arp[25], arp[26], arp[27]];
    // A gratuitous request is an announcement, not a question (RFC 5227, 3).
    if sender_ip == target_ip || !claims(&Maps, skb.ifindex(), &Ip::v4(target_ip)) {
        return Ok(false);
    }
    let Some(interface) = Maps.interface(skb.ifindex()) else { return Ok(false) };
    skb.store(0, &sender_mac)?;
    skb.store(6, &interface.mac)?;
    skb.store(ETHERNET_LEN + 6, &REPLY)?;
    skb.store(ETHERNET_LEN + 8, &interface.mac)?;
    skb.store(ETHERNET_LEN + 14, &target_ip)?;
    skb.store(ETHERNET_LEN + 18, &sender_mac)?;
    skb.store(ETHERNET_LEN + 24, &sender_ip)?;
    Ok(true)
}
