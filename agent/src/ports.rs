//! A node's own side of port leases: what it asks for, and what it gives back. A pure state machine: the time and what
//! the kernel does come in as arguments.
//!
//! **More** is asked for, twice what there is, when half of the ports are in use towards one destination, or when a
//! search has found none. **Back** goes what no pod has needed for a while: first the kernel stops taking ports of it,
//! then, once no flow is on it, the leader is told. What it has been told is never used again, also by an agent that has
//! restarted, until the leader has taken it back and leased it anew.

use std::collections::BTreeMap;
use std::net::IpAddr;

use datapath::limits::{GRANULE_PORTS, GRANULES};

use crate::model::{Desired, Grant, Granted};
use crate::objects::{EgressNodeStatus, GrantedGranules, PortDemand, ReturnedPorts};

/// How long no pod has to need an address until its ports are given back, in seconds.
pub const IDLE: u64 = 300;

/// How the ports of an address are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Use {
    /// Flows.
    pub flows: u32,
    /// Those towards the destination that has most of them; rather too many than too few.
    pub busiest: u32,
}

/// Ports that are given back, of one address.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Back {
    /// UID of the allocation.
    uid: String,
    ranges: Vec<Granted>,
}

/// What a node asks for and gives back.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ports {
    /// What is granted, as the objects were last seen.
    granted: BTreeMap<IpAddr, Grant>,
    /// Granules of each address that its pods need, in all; 0: whatever comes first.
    demand: BTreeMap<IpAddr, u16>,
    /// Since when no pod has needed an address that there are ports of.
    idle: BTreeMap<IpAddr, u64>,
    /// Ports that the kernel is to stop taking. Nobody has been told.
    stopping: BTreeMap<IpAddr, Back>,
    /// Of these, what the kernel's maps are without, and since when.
    stopped: BTreeMap<IpAddr, u64>,
    /// All of an allocation that was ever given back. An EgressNode that is removed and made anew says nothing of what was
    /// given back, and the leader grants it again.
    given: BTreeMap<IpAddr, Back>,
    /// Of these, what the leader has not taken back yet, as far as the node was last told: it is told, or told again.
    returned: BTreeMap<IpAddr, Back>,
}

impl Ports {
    /// What the agent before this one has told the leader.
    #[must_use]
    pub fn recover(status: &EgressNodeStatus) -> Self {
        let address = |text: &str| text.parse::<IpAddr>().ok();
        let granted = |r: &GrantedGranules| Granted {
            range: datapath::keys::GranuleRange { first: r.first, count: r.count },
            generation: r.generation,
            stopped: true,
        };
        let mut ports = Self {
            demand: status.demand.iter().filter_map(|d| Some((address(&d.egress_ip)?, d.granules))).collect(),
            returned: status
                .returned
                .iter()
                .filter_map(|r| {
                    let back = Back { uid: r.uid.clone(), ranges: r.ranges.iter().map(granted).collect() };
                    Some((address(&r.egress_ip)?, back))
                })
                .collect(),
            ..Self::default()
        };
        ports.given = ports.returned.clone();
        ports
    }

    /// Takes up what the objects say, and marks in `desired` the ports that must not be taken. `now` is in seconds, of
    /// any clock that does not go back.
    pub fn observe(&mut self, desired: &mut Desired, now: u64) {
        let needed = desired.demand();
        self.demand.retain(|ip, _| needed.contains(ip));
        for ip in &needed {
            self.demand.entry(*ip).or_default();
            self.idle.remove(ip);
            // Nobody has been told: they serve again.
            self.stopping.remove(ip);
        }
        if let Some(grants) = &mut desired.grants {
            self.stopping.retain(|ip, back| grants.get(ip).is_some_and(|g| g.uid == back.uid));
            let named = |ip: &IpAddr| desired.egress_ips.values().any(|e| e.named.contains(ip));
            self.given.retain(|ip, back| grants.get(ip).map_or_else(|| named(ip), |g| g.uid == back.uid));
            self.returned = self
                .given
                .iter()
                .filter_map(|(ip, given)| {
                    let grant = grants.get(ip)?;
                    let ranges: Vec<_> = given.ranges.iter().filter(|r| has(grant, r)).copied().collect();
                    (!ranges.is_empty()).then(|| (*ip, Back { uid: given.uid.clone(), ranges }))
                })
                .collect();
            for (ip, grant) in grants {
                let backs = [self.returned.get(ip), self.stopping.get(ip)];
                for r in &mut grant.ranges {
                    let of = |b: &&Back| b.uid == grant.uid && b.ranges.iter().any(|o| overlap(o, r));
                    r.stopped = backs.into_iter().flatten().any(|b| of(&b));
                }
                if needed.contains(ip) || grant.ranges.iter().all(|r| r.stopped) {
                    self.idle.remove(ip);
                } else {
                    self.idle.entry(*ip).or_insert(now);
                }
            }
            self.idle.retain(|ip, _| desired.grants.as_ref().is_some_and(|g| g.contains_key(ip)));
        }
        self.stopped.retain(|ip, _| self.stopping.contains_key(ip));
        self.granted = desired.grants.clone().unwrap_or_default();
    }

    /// Stops what has been idle for `patience` seconds. Whether there is such: then the maps have to be made anew.
    pub fn stop_idle(&mut self, now: u64, patience: u64) -> bool {
        let due: Vec<_> =
            self.idle.iter().filter(|(_, since)| now >= **since + patience).map(|(ip, _)| *ip).collect();
        for ip in &due {
            self.idle.remove(ip);
            if let Some(grant) = self.granted.get(ip) {
                let ranges = grant.ranges.iter().filter(|r| !r.stopped).copied().collect();
                self.stopping.insert(*ip, Back { uid: grant.uid.clone(), ranges });
            }
        }
        !due.is_empty()
    }

    /// The kernel's maps are as the objects and [`Self::observe`] wanted them.
    pub fn applied(&mut self, now: u64) {
        for ip in self.stopping.keys() {
            self.stopped.entry(*ip).or_insert(now);
        }
    }

    /// Addresses whose ports the kernel has stopped taking: whether flows are on them has to be seen. Not at once: a
    /// packet may have been on its way to take one.
    #[must_use]
    pub fn draining(&self, now: u64) -> Vec<IpAddr> {
        self.stopped.iter().filter(|(_, since)| now > **since + 1).map(|(ip, _)| *ip).collect()
    }

    /// No flow is on any port of an address, and that was seen after its ports were stopped.
    pub fn drained(&mut self, ip: &IpAddr) {
        if self.stopped.remove(ip).is_some()
            && let Some(back) = self.stopping.remove(ip)
        {
            for all in [self.given.entry(*ip).or_default(), self.returned.entry(*ip).or_default()] {
                // Those of an allocation that is gone are nobody's.
                if all.uid == back.uid {
                    all.ranges.extend(back.ranges.clone());
                } else {
                    all.clone_from(&back);
                }
            }
        }
    }

    /// Asks for more of an address, if enough of it is in use or `exhausted`: a search has found no port. Nothing more is
    /// asked for while not all is granted that was.
    pub fn used(&mut self, ip: &IpAddr, how: Use, exhausted: bool) -> bool {
        let (Some(demand), Some(grant)) = (self.demand.get_mut(ip), self.granted.get(ip)) else {
            return false;
        };
        let ranges = grant.ranges.iter().filter(|r| !r.stopped);
        let granules: u32 = ranges.map(|r| u32::from(r.range.count)).sum();
        let half = granules * u32::from(GRANULE_PORTS) / 2;
        if granules == 0 || u32::from(*demand) > granules || (how.busiest < half && !exhausted) {
            return false;
        }
        let wanted = u16::try_from((granules * 2).min(GRANULES as u32)).unwrap_or(u16::MAX);
        let more = wanted > *demand;
        *demand = (*demand).max(wanted);
        more
    }

    /// What is asked for, as it is written.
    #[must_use]
    pub fn demand(&self) -> Vec<PortDemand> {
        let of =
            |(ip, granules): (&IpAddr, &u16)| PortDemand { egress_ip: ip.to_string(), granules: *granules };
        self.demand.iter().map(of).collect()
    }

    /// What is given back, as it is written.
    #[must_use]
    pub fn returned(&self) -> Vec<ReturnedPorts> {
        let granules = |r: &Granted| GrantedGranules {
            first: r.range.first,
            count: r.range.count,
            generation: r.generation,
        };
        let of = |(ip, back): (&IpAddr, &Back)| ReturnedPorts {
            egress_ip: ip.to_string(),
            uid: back.uid.clone(),
            ranges: back.ranges.iter().map(granules).collect(),
        };
        self.returned.iter().map(of).collect()
    }
}

/// Whether ports are granted still, or some of them.
fn has(grant: &Grant, r: &Granted) -> bool {
    grant.ranges.iter().any(|g| overlap(g, r))
}

/// Whether two ranges are of the same lease and have a granule in common.
fn overlap(a: &Granted, b: &Granted) -> bool {
    a.generation == b.generation
        && a.range.first < b.range.first + b.range.count
        && b.range.first < a.range.first + a.range.count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EgressIp, Pod};
    use datapath::keys::GranuleRange;

    fn ip() -> IpAddr {
        "192.0.2.1".parse().unwrap()
    }

    /// A node that is granted these ranges, first granule, count and generation each.
    fn desired(needed: bool, granted: &[(u16, u16, u64)]) -> Desired {
        let ranges = granted.iter().map(|(first, count, generation)| Granted {
            range: GranuleRange { first: *first, count: *count },
            generation: *generation,
            stopped: false,
        });
        let grant = Grant { uid: "u".into(), owner: None, ranges: ranges.collect() };
        let mut d = Desired { grants: Some([(ip(), grant)].into()), ..Desired::default() };
        let e = EgressIp {
            name: "e".into(),
            uid: String::new(),
            age: 0,
            generation: 0,
            addresses: vec![ip()],
            named: [ip()].into(),
            refused: Vec::new(),
            rejected: None,
            selectors: None,
        };
        d.egress_ips.insert("e".into(), e);
        if needed {
            let pod = Pod { egress_ip: Some("e".into()), ..Pod::default() };
            d.pods.insert(("ns".into(), "p".into()), pod);
        }
        d
    }

    fn usable(d: &Desired) -> Vec<u16> {
        d.grant(&ip()).unwrap().ranges.iter().filter(|r| !r.stopped).map(|r| r.range.first).collect()
    }

    #[test]
    fn more_is_asked_for_at_half_and_at_the_first_failure_and_once() {
        let mut p = Ports::default();
        let mut d = desired(true, &[(0, 10, 1)]);
        p.observe(&mut d, 0);
        assert_eq!(p.demand(), [PortDemand { egress_ip: "192.0.2.1".into(), granules: 0 }]);
        let at = |p: &mut Ports, busiest, exhausted| {
            p.used(&ip(), Use { flows: 9999, busiest }, exhausted).then(|| p.demand()[0].granules)
        };
        assert_eq!(at(&mut p, 319, false), None);
        assert_eq!(at(&mut p, 320, false), Some(20));
        assert_eq!(at(&mut p, 640, true), None, "not granted yet");
        let mut d = desired(true, &[(0, 10, 1), (50, 10, 2)]);
        p.observe(&mut d, 1);
        assert_eq!(at(&mut p, 0, true), Some(40));
        // After a restart it asks for the same.
        let status = EgressNodeStatus { demand: p.demand(), ..EgressNodeStatus::default() };
        assert_eq!(Ports::recover(&status).demand(), p.demand());
        let mut all = desired(true, &[(0, 1008, 1)]);
        p.observe(&mut all, 2);
        assert_eq!(at(&mut p, 64_512, true), Some(1008));
        assert_eq!(at(&mut p, 64_512, true), None, "there are no more");
        let mut none = desired(true, &[]);
        p.observe(&mut none, 3);
        assert_eq!(at(&mut p, 0, true), None, "the first share is on its way");
    }

    #[test]
    fn what_is_idle_stops_drains_and_goes_back() {
        let mut p = Ports::default();
        let mut d = desired(false, &[(0, 10, 1), (20, 5, 2)]);
        p.observe(&mut d, 100);
        assert!(p.demand().is_empty());
        assert!(!p.stop_idle(100 + IDLE - 1, IDLE));
        assert!(p.stop_idle(100 + IDLE, IDLE));
        p.observe(&mut d, 500);
        assert_eq!(usable(&d), [] as [u16; 0]);
        assert!(p.draining(900).is_empty(), "the kernel has them still");
        p.drained(&ip());
        assert!(p.returned().is_empty());
        p.applied(500);
        assert_eq!(p.draining(501).len(), 0);
        assert_eq!(p.draining(502).len(), 1);
        p.drained(&ip());
        let told = p.returned();
        let granules = |first, count, generation| GrantedGranules { first, count, generation };
        assert_eq!(told[0].ranges, [granules(0, 10, 1), granules(20, 5, 2)]);
        // A pod comes, another agent starts, both too late.
        let status = EgressNodeStatus { returned: told.clone(), ..EgressNodeStatus::default() };
        for mut p in [p, Ports::recover(&status)] {
            let mut d = desired(true, &[(0, 10, 1), (20, 5, 2)]);
            p.observe(&mut d, 501);
            assert_eq!(usable(&d), [] as [u16; 0]);
            assert_eq!(p.returned(), told);
            // It is not told anything: it keeps what it knows.
            p.observe(&mut Desired::default(), 502);
            assert_eq!(p.returned(), told);
            // One is taken back, and leased again.
            let mut d = desired(true, &[(0, 10, 1), (20, 5, 4)]);
            p.observe(&mut d, 503);
            assert_eq!(usable(&d), [20]);
            assert_eq!(p.returned()[0].ranges, [granules(0, 10, 1)]);
            p.observe(&mut desired(true, &[(20, 5, 4)]), 504);
            assert!(p.returned().is_empty());
            // The EgressNode was removed and made anew, before a leader had read what was given back.
            let mut d = desired(true, &[(0, 10, 1), (20, 5, 4)]);
            p.observe(&mut d, 505);
            assert_eq!(usable(&d), [20]);
            assert_eq!(p.returned()[0].ranges, [granules(0, 10, 1)]);
        }
    }

    #[test]
    fn what_is_needed_again_in_time_stays() {
        let mut p = Ports::default();
        let mut d = desired(false, &[(0, 10, 1)]);
        p.observe(&mut d, 0);
        assert!(p.stop_idle(IDLE, IDLE));
        p.observe(&mut d, IDLE);
        p.applied(IDLE);
        let mut d = desired(true, &[(0, 10, 1)]);
        p.observe(&mut d, IDLE + 1);
        assert_eq!(usable(&d), [0]);
        p.drained(&ip());
        assert!(p.returned().is_empty());
        // Idle again: the time counts anew.
        let mut d = desired(false, &[(0, 10, 1)]);
        p.observe(&mut d, IDLE + 2);
        assert!(!p.stop_idle(2 * IDLE, IDLE));
    }
}
