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

/// The same of a namespace's EgressFirewall. That nodes have not answered yet is no news.
#[must_use]
pub fn firewall_events(namespace: &str, previous: &[Condition], conditions: &[Condition]) -> Vec<Event> {
    let said = |c: &Condition| {
        let same = |p: &Condition| {
            let words = (&p.kind, &p.status, &p.reason) == (&c.kind, &c.status, &c.reason);
            words && (c.status == "True" || p.message == c.message)
        };
        previous.iter().any(same)
    };
    let news =
        conditions.iter().filter(|c| !["Pending", "NodeNotReady"].contains(&c.reason.as_str()) && !said(c));
    news.map(|c| Event {
        about: ObjectName {
            kind: "EgressFirewall",
            namespace: namespace.to_owned(),
            name: "default".to_owned(),
        },
        reason: c.reason.clone(),
        message: c.message.clone(),
        warning: c.status != "True",
    })
    .collect()
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

    #[test]
    fn a_firewalls_conditions_are_news_once() {
        let condition = |status: &str, reason: &str, message: &str| Condition {
            kind: "Applied".into(),
            status: status.into(),
            reason: reason.into(),
            message: message.into(),
            ..Condition::default()
        };
        let applied = condition("True", "RulesApplied", "2 rules in force on 1 node");
        let refused = condition("False", "Refused", "spec.egress[0].to: is missing");
        let of = |previous: &[&Condition], now: &Condition| {
            let previous: Vec<_> = previous.iter().map(|c| (*c).clone()).collect();
            let events = firewall_events("prod", &previous, std::slice::from_ref(now));
            events.into_iter().map(|e| (e.about.to_string(), e.reason, e.warning)).collect::<Vec<_>>()
        };
        let about = "EgressFirewall prod/default".to_owned();
        assert_eq!(of(&[], &applied), [(about.clone(), "RulesApplied".to_owned(), false)]);
        assert_eq!(of(&[&condition("True", "RulesApplied", "on 2 nodes")], &applied), []);
        assert_eq!(of(&[&applied], &refused), [(about.clone(), "Refused".to_owned(), true)]);
        assert_eq!(of(&[&refused], &refused), []);
        assert_eq!(
            of(&[&condition("False", "Refused", "another")], &refused),
            [(about, "Refused".to_owned(), true)]
        );
        assert_eq!(of(&[], &condition("False", "Pending", "node a has not confirmed it yet")), []);
    }
}
