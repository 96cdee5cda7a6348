//! What has happened to an EgressIP, from its status before and after: each thing is said once.

use crate::objects::{Condition, EgressIpStatus, ObjectName};
use crate::watch::Event;

use super::ASSIGNED;

/// The events that a change of status is worth.
#[must_use]
pub fn events(name: &str, previous: Option<&EgressIpStatus>, status: &EgressIpStatus) -> Vec<Event> {
    let about = || ObjectName { kind: "EgressIP", namespace: String::new(), name: name.to_owned() };
    let new_items = status.items.iter().filter(|i| previous.is_none_or(|p| !p.items.contains(i)));
    let assigned = new_items.map(|i| Event {
        about: about(),
        reason: "Assigned".to_owned(),
        message: format!("egress IP {} is assigned to node {}", i.egress_ip, i.node),
        warning: false,
    });
    let same = |c: &Condition, p: &Condition| {
        (&p.kind, &p.egress_ip, &p.status, &p.reason) == (&c.kind, &c.egress_ip, &c.status, &c.reason)
    };
    let new = |c: &&Condition| previous.is_none_or(|p| !p.conditions.iter().any(|p| same(c, p)));
    let conditions = status.conditions.iter().filter(new).filter_map(|c| {
        // That addresses are held, or not all of them, is said of each.
        if c.kind == ASSIGNED && c.reason != "Refused" {
            return None;
        }
        let message = match c.egress_ip.as_str() {
            "" => c.message.clone(),
            ip => format!("egress IP {ip}: {}", c.message),
        };
        Some(Event { about: about(), reason: reason(&c.reason).to_owned(), message, warning: true })
    });
    assigned.chain(conditions).collect()
}

/// The reason of an event by that of its condition: OVN-Kubernetes' word where it has one, for what people have
/// written to look for it.
fn reason(condition: &str) -> &str {
    match condition {
        "NoEgressNode" | "NoReadyNode" => "NoMatchingNodeFound",
        "NoUplink" | "NoCapacity" | "NodeTaken" => "UnassignedRequest",
        "Duplicate" | "NodeAddress" => "EgressIPConflict",
        "InsideCluster" | "Unusable" => "UnsupportedRequest",
        "Refused" => "InvalidEgressIP",
        "OlderServes" => "UndefinedRequest",
        own => own,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::EgressIpItem;

    #[test]
    fn each_thing_is_said_once() {
        let condition = |kind: &str, ip: &str, reason: &str| Condition {
            kind: kind.into(),
            egress_ip: ip.into(),
            status: "False".into(),
            reason: reason.into(),
            message: format!("because {reason}"),
            ..Condition::default()
        };
        let item = |node: &str| EgressIpItem { node: node.into(), egress_ip: "192.0.2.1".into() };
        let mut before = EgressIpStatus {
            items: vec![item("a")],
            conditions: vec![
                condition(ASSIGNED, "", "PartlyAssigned"),
                condition("AddressAssigned", "192.0.2.2", "NodeTaken"),
            ],
        };
        let said = |previous: Option<&EgressIpStatus>, status: &EgressIpStatus| {
            let all = events("e", previous, status);
            all.into_iter().map(|e| (e.reason, e.message, e.warning)).collect::<Vec<_>>()
        };
        let taken = ("UnassignedRequest".into(), "egress IP 192.0.2.2: because NodeTaken".into(), true);
        let assigned = |node: &str| {
            ("Assigned".to_owned(), format!("egress IP 192.0.2.1 is assigned to node {node}"), false)
        };
        assert_eq!(said(None, &before), [assigned("a"), taken]);
        let known = before.clone();
        before.conditions[1].message = "in other words".into();
        before.conditions[1].last_transition_time = "later".into();
        assert_eq!(said(Some(&known), &before), []);
        let mut after = before.clone();
        after.items[0] = item("b");
        after.conditions[0].reason = "Refused".into();
        after.conditions[1].reason = "AllLeased".into();
        let reasons: Vec<_> = said(Some(&before), &after).into_iter().map(|e| e.0).collect();
        assert_eq!(reasons, ["Assigned", "InvalidEgressIP", "AllLeased"]);
    }
}
