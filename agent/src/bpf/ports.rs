//! How a node's flows use the ports that it leases. `dir` is as of [`super::pin_dir`] everywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, RandomState};
use std::path::Path;

use datapath::conntrack::{Ticks, older_than, seconds};
use datapath::keys::{EgressId, Reply, ReplyKey};

use super::firewall_counts::each;
use super::{Error, maps};
use crate::ports::Use;

/// Destinations are counted by a hash of so many values: with a full table of flows to as many destinations, one in
/// which all that there are share a count has some ten too many, and a lease is 64 ports at least.
const COUNTS: usize = 1 << 16;

/// Counts the flows of each address, and those towards its busiest destination. It looks at every flow, so it is not to
/// be called where few can be in use.
pub fn used(dir: &Path) -> Result<BTreeMap<EgressId, Use>, Error> {
    let mut counter = Counter::default();
    each(dir, "REPLIES", |key: &ReplyKey, _: &Reply| counter.count(key))?;
    Ok(counter.used)
}

/// Addresses of which a flow has found no port in the last second.
pub fn exhausted(dir: &Path) -> Result<BTreeSet<EgressId>, Error> {
    let (now, mut ids) = (maps::now(), BTreeSet::new());
    each(dir, "FULL", |key: &ReplyKey, until: &Ticks| {
        if !older_than(now, *until, seconds(1)) {
            ids.insert(key.egress);
        }
    })?;
    Ok(ids)
}

struct Counter {
    hash: RandomState,
    counts: Vec<u32>,
    used: BTreeMap<EgressId, Use>,
}

impl Default for Counter {
    fn default() -> Self {
        Self { hash: RandomState::new(), counts: vec![0; COUNTS], used: BTreeMap::new() }
    }
}

impl Counter {
    fn count(&mut self, key: &ReplyKey) {
        let destination = ReplyKey { egress_port: 0, ..*key };
        let words =
            (destination.egress, destination.remote.octets, destination.remote_port, destination.protocol);
        let place = self.hash.hash_one(words) % COUNTS as u64;
        let Some(count) = usize::try_from(place).ok().and_then(|place| self.counts.get_mut(place)) else {
            return;
        };
        *count += 1;
        let of = self.used.entry(key.egress).or_default();
        of.flows += 1;
        of.busiest = of.busiest.max(*count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use datapath::addr::Ip;
    use std::net::{IpAddr, Ipv4Addr};

    fn key(egress: EgressId, remote: u32, remote_port: u16, egress_port: u16) -> ReplyKey {
        let remote = Ip::from(IpAddr::from(Ipv4Addr::from(remote)));
        ReplyKey { egress, remote, egress_port, remote_port, protocol: 6, pad: [0; 3] }
    }

    #[test]
    fn flows_are_counted_by_address_and_destination() {
        let mut c = Counter::default();
        for port in 0..100 {
            c.count(&key(1, 7, 443, port));
        }
        for port in 0..30 {
            c.count(&key(1, 7, 80, port));
        }
        c.count(&key(2, 7, 443, 1));
        assert_eq!((c.used[&1].flows, c.used[&2].flows), (130, 1));
        assert!((100..=130).contains(&c.used[&1].busiest), "{:?}", c.used);
    }

    #[test]
    fn many_destinations_do_not_look_like_one() {
        let mut c = Counter::default();
        for n in 0..datapath::limits::FLOWS {
            c.count(&key(1, n, 443, 1));
        }
        assert_eq!(c.used[&1].flows, datapath::limits::FLOWS);
        assert!(c.used[&1].busiest < 32, "half of the smallest lease: {:?}", c.used);
    }
}
