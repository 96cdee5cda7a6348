//! Which egress address a new flow gets, and where a translated packet goes.

use crate::addr::Ip;
use crate::keys::{EgressId, EgressIp, IfIndex, Policy, Settings, Tuple};
use crate::tables::Tables;
use crate::verdict::{DropReason, Way};

/// `EgressConfig.spread: Connection`.
pub const SPREAD_CONNECTION: u8 = 2;

/// The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
#[inline(always)]
const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[inline(always)]
const fn mix_ip(seed: u64, ip: &Ip) -> u64 {
    let (high, low) = ip.halves();
    mix(mix(seed ^ high) ^ low)
}

/// The held addresses that score highest for a flow: 0 where there is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Choice {
    /// The address to use.
    pub best: EgressId,
    /// The one to use when the best has no port free.
    pub second: EgressId,
}

/// Rendezvous hashing (Thaler, Ravishankar 1998) of a pod, or of a connection, over the addresses that are
/// held: one pod keeps one public address (paired pooling, RFC 4787 REQ-2), and a lost address moves only
/// the pods that had it.
#[inline(always)]
#[must_use]
pub fn choose_egress_ip<T: Tables>(t: &T, settings: &Settings, policy: &Policy, tuple: &Tuple) -> Choice {
    let mut seed = mix_ip(0, &tuple.source);
    if settings.spread == SPREAD_CONNECTION {
        let ports = u64::from(tuple.source_port) << 24
            | u64::from(tuple.destination_port) << 8
            | u64::from(tuple.protocol);
        seed = mix_ip(seed ^ ports, &tuple.destination);
    }
    let mut choice = Choice::default();
    let (mut best, mut second) = (0, 0);
    t.repeat(policy.len, |i| {
        let Some(id) = policy.egress.get(i as usize).copied() else { return true };
        let Some(egress) = t.egress_ip(id) else { return false };
        if egress.holder == 0 || egress.ip.is_v4() != tuple.source.is_v4() {
            return false;
        }
        let score = mix_ip(seed, &egress.ip) | 1; // never 0, which stands for "none"
        if score > best {
            (second, choice.second) = (best, choice.best);
            (best, choice.best) = (score, id);
        } else if score > second {
            (second, choice.second) = (score, id);
        }
        false
    });
    choice
}

/// Where a packet with this egress address as its source goes from here. `here` is the uplink it is on, 0
/// for none.
#[inline(always)]
pub fn way_out<T: Tables>(
    t: &T,
    settings: &Settings,
    egress: &EgressIp,
    here: IfIndex,
) -> Result<Way, DropReason> {
    if egress.holder == 0 {
        return Err(DropReason::NoOwner);
    }
    if egress.holder != settings.node {
        return t.node(egress.holder).map(|n| Way::Tunnel(n.tunnel_ip)).ok_or(DropReason::NoOwner);
    }
    match egress.uplink {
        0 => Err(DropReason::NotAGateway),
        uplink if uplink == here => Ok(Way::Here),
        uplink => Ok(Way::Uplink(uplink)),
    }
}
