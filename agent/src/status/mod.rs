//! What is said about an EgressIP: who holds its addresses, and why one is not in force. A pure function.

mod events;
pub mod firewall;

pub use events::{events, firewall_events};

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use datapath::limits::{GRANULE_PORTS, GRANULES};

use crate::assign::Assignment;
use crate::model::EgressIp;
use crate::objects::{Condition, EgressIpItem, EgressIpStatus};

/// The condition of the whole object: every address of it is held.
pub const ASSIGNED: &str = "Assigned";
/// The condition of one address that is not in force.
pub const ADDRESS_ASSIGNED: &str = "AddressAssigned";
/// The condition of an address that some node gets no ports of, or not as many as it needs.
pub const PORTS_AVAILABLE: &str = "PortsAvailable";
/// The condition of an address of whose ports most are leased.
pub const PORTS_SCARCE: &str = "PortsScarce";
/// The condition of an object that selects pods which older ones serve.
pub const SHADOWED: &str = "Shadowed";

/// From more granules than these on, three quarters, ports are scarce. The first shares of all nodes are so many.
const SCARCE: usize = GRANULES * 3 / 4;

/// How the ports of an address are shared out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ports {
    /// Granules that are leased.
    pub leased: usize,
    /// Nodes that need some and got none.
    pub refused: Vec<String>,
    /// Nodes that need more than they have got.
    pub short: Vec<String>,
}

/// Pods that an object selects and an older one serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shadow<'a> {
    /// The older one.
    pub by: &'a str,
    /// How many pods.
    pub pods: u32,
    /// On how many nodes.
    pub nodes: u32,
}

/// What the leader has decided that concerns an object.
pub struct Outcomes<'a> {
    /// Who holds which address.
    pub assignment: &'a Assignment,
    /// How the ports of each are shared out.
    pub ports: &'a BTreeMap<IpAddr, Ports>,
    /// Whether an address's allocation cannot be read.
    pub unreadable: &'a dyn Fn(&IpAddr) -> bool,
    /// Pods that the object selects in vain.
    pub shadowed: &'a [Shadow<'a>],
}

/// The status of an object. Conditions of `previous` that still hold keep the time since when they do.
#[must_use]
pub fn egress_ip(e: &EgressIp, outcomes: &Outcomes<'_>, previous: &[Condition], now: &str) -> EgressIpStatus {
    let mut items = Vec::new();
    let mut conditions = Vec::new();
    let condition = |kind: &str, ip: String, ok: bool, reason: &str, message: String| Condition {
        kind: kind.to_owned(),
        egress_ip: ip,
        status: if ok { "True" } else { "False" }.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: String::new(),
    };
    let Outcomes { assignment, unreadable, .. } = outcomes;
    for ip in &e.addresses {
        let text = ip.to_string();
        if let Some(node) = assignment.owners.get(ip) {
            items.push(EgressIpItem { node: node.clone(), egress_ip: text.clone() });
        } else if unreadable(ip) {
            let message =
                "its EgressAllocation cannot be read, so who leases its ports is not known".to_owned();
            conditions.push(condition(
                ADDRESS_ASSIGNED,
                text.clone(),
                false,
                "AllocationUnreadable",
                message,
            ));
        } else if let Some(why) = assignment.unassigned.get(ip) {
            conditions.push(condition(ADDRESS_ASSIGNED, text.clone(), false, why.reason(), why.to_string()));
        }
        let Some(ports) = outcomes.ports.get(ip) else { continue };
        let lists = [("none", &ports.refused), ("no more", &ports.short)];
        let lists = lists.iter().filter(|(_, nodes)| !nodes.is_empty());
        let lists: Vec<_> =
            lists.map(|(what, nodes)| format!("{what} for node {}", nodes.join(", "))).collect();
        if !lists.is_empty() {
            let message = format!("all ports that may be leased are; {}", lists.join("; "));
            conditions.push(condition(PORTS_AVAILABLE, text.clone(), false, "AllLeased", message));
        }
        if ports.leased > SCARCE {
            let message = format!(
                "{} of {} ports are leased; another address for the object would help, or fewer nodes that use it",
                ports.leased * usize::from(GRANULE_PORTS),
                GRANULES * usize::from(GRANULE_PORTS),
            );
            conditions.push(condition(PORTS_SCARCE, text, true, "MostLeased", message));
        }
    }
    if !outcomes.shadowed.is_empty() {
        let count = |n: u32, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let of = |s: &Shadow<'_>| {
            format!("{} on {} by EgressIP {}", count(s.pods, "pod"), count(s.nodes, "node"), s.by)
        };
        let all: Vec<_> = outcomes.shadowed.iter().map(of).collect();
        let message = format!("pods that it selects are served by older objects: {}", all.join(", "));
        conditions.push(condition(SHADOWED, String::new(), true, "OlderServes", message));
    }
    for (text, refusal) in &e.refused {
        conditions.push(condition(
            ADDRESS_ASSIGNED,
            text.clone(),
            false,
            refusal.reason(),
            refusal.to_string(),
        ));
    }
    let missing = e.addresses.len() + e.refused.len() - items.len();
    let overall = if let Some(message) = &e.rejected {
        condition(ASSIGNED, String::new(), false, "Refused", message.clone())
    } else if missing == 0 {
        condition(ASSIGNED, String::new(), true, "AllAssigned", "every address is held".to_owned())
    } else {
        let reason = if items.is_empty() { "NotAssigned" } else { "PartlyAssigned" };
        let message = format!("{} of {} addresses are held", items.len(), items.len() + missing);
        condition(ASSIGNED, String::new(), false, reason, message)
    };
    conditions.insert(0, overall);
    date(&mut conditions, previous, now);
    EgressIpStatus { items, conditions }
}

/// Dates conditions: those of `previous` whose status is the same keep their time.
fn date(conditions: &mut [Condition], previous: &[Condition], now: &str) {
    for c in conditions {
        let same = |p: &&Condition| p.kind == c.kind && p.egress_ip == c.egress_ip && p.status == c.status;
        c.last_transition_time =
            previous.iter().find(same).map_or_else(|| now.to_owned(), |p| p.last_transition_time.clone());
    }
}

/// A time as objects have it: RFC 3339, UTC, whole seconds.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = seconds_of(time);
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days to date in the proleptic Gregorian calendar, years beginning in March so that the leap day is last:
    // https://howardhinnant.github.io/date_algorithms.html#civil_from_days
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// A time in seconds since 1970.
#[must_use]
pub fn seconds_of(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The seconds since 1970 of a time as [`rfc3339`] writes it; nothing for another text.
#[must_use]
pub fn seconds(text: &str) -> Option<u64> {
    let parts = [0..4, 5..7, 8..10, 11..13, 14..16, 17..19].map(|r| text.get(r)?.parse::<u64>().ok());
    let [Some(year), Some(month), Some(day), Some(hour), Some(minute), Some(second)] = parts else {
        return None;
    };
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // https://howardhinnant.github.io/date_algorithms.html#days_from_civil
    let y = year - u64::from(month <= 2);
    let (era, year_of_era) = (y / 400, y % 400);
    let shifted = (month + 9) % 12;
    let day_of_era =
        year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + (153 * shifted + 2) / 5 + day - 1;
    let days = era * 146_097 + day_of_era - 719_468;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
    // Also what does not look the same: another zone, fractions.
    (rfc3339(UNIX_EPOCH + std::time::Duration::from_secs(seconds)) == text).then_some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::time::Duration;

    #[test]
    fn times() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
            assert_eq!(super::seconds(text), Some(seconds));
        }
        for text in [
            "",
            "now",
            "2026-02-30T00:00:00Z",
            "2026-01-01T00:00:00+01:00",
            "2026-01-01T24:00:00Z",
            "1969-12-31T23:59:59Z",
        ] {
            assert_eq!(super::seconds(text), None, "{text}");
        }
    }

    #[test]
    fn a_condition_keeps_its_time_while_its_status_stays() {
        let e = EgressIp {
            name: "e".into(),
            uid: String::new(),
            age: 0,
            generation: 0,
            addresses: vec!["192.0.2.1".parse().unwrap()],
            named: BTreeSet::new(),
            refused: Vec::new(),
            rejected: None,
            selectors: None,
        };
        let of = |a: &Assignment, previous: &[Condition], now: &str| {
            let outcomes =
                Outcomes { assignment: a, ports: &BTreeMap::new(), unreadable: &|_| false, shadowed: &[] };
            egress_ip(&e, &outcomes, previous, now).conditions
        };
        let mut a = Assignment::default();
        a.unassigned.insert(e.addresses[0], crate::assign::Unassigned::NoNode);
        let first = of(&a, &[], "1");
        assert_eq!(first.iter().map(|c| c.last_transition_time.as_str()).collect::<Vec<_>>(), ["1", "1"]);
        a.unassigned.insert(e.addresses[0], crate::assign::Unassigned::NotReady);
        let second = of(&a, &first, "2");
        assert_eq!(
            (second[1].reason.as_str(), second[1].last_transition_time.as_str()),
            ("NoReadyNode", "1")
        );
        a.owners.insert(e.addresses[0], "a".into());
        let third = of(&a, &second, "3");
        assert_eq!(third.len(), 1);
        assert_eq!((third[0].status.as_str(), third[0].last_transition_time.as_str()), ("True", "3"));
    }
}
