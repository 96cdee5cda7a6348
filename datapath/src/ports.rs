//! Granules of an egress IP's ports, and which port a new flow gets.

use crate::conntrack::{Ticks, expired, older_than, seconds};
use crate::keys::{FlowKey, Lease, Reply, ReplyKey, Settings};
use crate::limits::{FIRST_PORT, FULL_SECONDS, GRANULE_PORTS, PORT_DRAWS};
use crate::tables::{InsertError, Tables};
use crate::verdict::DropReason;

/// The granule that covers a port; `None` below [`FIRST_PORT`].
#[inline(always)]
#[must_use]
pub const fn granule_of(port: u16) -> Option<u16> {
    if port < FIRST_PORT { None } else { Some((port - FIRST_PORT) / GRANULE_PORTS) }
}

/// The `nth` port of a lease; `None` past its end.
#[inline(always)]
#[must_use]
pub fn nth_port(lease: &Lease, nth: u32) -> Option<u16> {
    let index = nth / u32::from(GRANULE_PORTS);
    if index >= lease.granules {
        return None;
    }
    let granule = *lease.granule.get(index as usize)?;
    let offset = nth % u32::from(GRANULE_PORTS);
    u16::try_from(u32::from(FIRST_PORT) + u32::from(granule) * u32::from(GRANULE_PORTS) + offset).ok()
}

/// Claims a port of this node's lease for a flow, by inserting its reply key: the insertion is the claim, so
/// two CPUs never get one port. Ports are drawn at random (RFC 6056); when the draws find none, the whole
/// lease is scanned from a random place, so that the search fails only if every port is taken. A port whose
/// flow is past its time is taken over.
///
/// `key` is complete but for its port, which is 0. Returns the port.
#[inline(always)]
pub fn claim_port<T: Tables>(
    t: &T,
    settings: &Settings,
    now: Ticks,
    mut key: ReplyKey,
    reply: &Reply,
) -> Result<u16, DropReason> {
    let Some(lease) = t.lease(key.egress) else { return Err(DropReason::NoPortRange) };
    let ports = lease.granules * u32::from(GRANULE_PORTS);
    if ports == 0 {
        return Err(DropReason::NoPortRange);
    }
    if t.full_until(&key).is_some_and(|until| !older_than(now, until, 0)) {
        return Err(DropReason::NoPortFree);
    }
    let mut found = Err(DropReason::NoPortFree);
    let mut nth = 0;
    t.repeat(PORT_DRAWS + ports, |i| {
        // The last draw is where the scan starts.
        nth = match i < PORT_DRAWS {
            true => scale(t.random(), ports),
            false if nth + 1 < ports => nth + 1,
            false => 0,
        };
        let Some(port) = nth_port(lease, nth) else { return false };
        key.egress_port = port;
        let claim = match t.insert_reply(&key, reply) {
            // Another CPU may be quicker in taking over what is dead: then the next port.
            Err(InsertError::Exists) if release_if_dead(t, settings, now, &key) => {
                t.insert_reply(&key, reply)
            }
            claim => claim,
        };
        found = match claim {
            Ok(()) => Ok(port),
            Err(InsertError::Full) => Err(DropReason::FlowTableFull),
            Err(InsertError::Exists) => return false,
        };
        true
    });
    if found == Err(DropReason::NoPortFree) {
        key.egress_port = 0;
        t.put_full(&key, now.wrapping_add(seconds(FULL_SECONDS)));
    }
    found
}

/// A random word to 0..`n`, by multiplication (Lemire 2019): no division, no division by zero.
#[inline(always)]
const fn scale(random: u32, n: u32) -> u32 {
    ((random as u64 * n as u64) >> 32) as u32
}

/// Removes a reply entry whose flow is gone, is past its time, has another port now, or whose pod is gone.
/// Returns whether the key is free now.
#[inline(always)]
pub fn release_if_dead<T: Tables>(t: &T, settings: &Settings, now: Ticks, key: &ReplyKey) -> bool {
    let Some(reply) = t.reply(key) else { return true };
    let flow_key = flow_key_of(key, &reply);
    let alive = t.delivery(reply.pod).is_some()
        && t.flow(&flow_key, |flow| {
            flow.egress == key.egress
                && flow.egress_port == key.egress_port
                && !expired(settings, now, flow, key.protocol)
        }) == Some(true);
    if alive {
        return false;
    }
    // The forward entry goes only if it is this reply's own; one that is not translated has no egress address.
    let own = t.flow(&flow_key, |flow| flow.egress == key.egress && flow.egress_port == key.egress_port);
    if own == Some(true) {
        t.remove_flow(&flow_key);
    }
    t.remove_reply(key);
    true
}

/// The forward key of a reply entry.
#[inline(always)]
#[must_use]
pub const fn flow_key_of(key: &ReplyKey, reply: &Reply) -> FlowKey {
    FlowKey {
        pod: reply.pod,
        remote: key.remote,
        local_port: reply.local_port,
        remote_port: key.remote_port,
        protocol: key.protocol,
        path: reply.path,
        pad: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::GranuleRange;
    use crate::limits::GRANULES;

    #[test]
    fn granules_cover_1024_to_65535() {
        assert_eq!(granule_of(0), None);
        assert_eq!(granule_of(1023), None);
        assert_eq!(granule_of(1024), Some(0));
        assert_eq!(granule_of(1087), Some(0));
        assert_eq!(granule_of(1088), Some(1));
        assert_eq!(granule_of(65535), Some(GRANULES as u16 - 1));
    }

    #[test]
    fn every_port_of_a_lease_is_counted_once_and_lies_in_it() {
        let lease = Lease::of(&[GranuleRange { first: 0, count: 1 }, GranuleRange { first: 1005, count: 3 }]);
        assert_eq!(lease.granules, 4);
        let ports: std::vec::Vec<u16> = (0..4 * 64).map(|n| nth_port(&lease, n).unwrap()).collect();
        assert_eq!(ports[0], 1024);
        assert_eq!(ports[63], 1087);
        assert_eq!(ports[64], 1024 + 1005 * 64);
        assert_eq!(*ports.last().unwrap(), 65535);
        assert!(ports.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(nth_port(&lease, 4 * 64), None);
        assert_eq!(nth_port(&Lease::default(), 0), None);
    }
}
