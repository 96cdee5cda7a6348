//! What is said about an EgressFirewall: whether the nodes that have pods of its namespace have its rules in
//! force. In OVN-Kubernetes' words, and as conditions. A pure function.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::date;
use crate::firewall::{Firewall, version_text};
use crate::model::Node;
use crate::objects::{AppliedFirewall, Condition, EgressFirewallStatus};

/// What OVN-Kubernetes says of rules that are in force (`status_manager/egressfirewall_manager.go` there).
pub const APPLIED: &str = "EgressFirewall Rules applied";
/// What it says of rules that are not.
pub const NOT_APPLIED: &str = "EgressFirewall Rules not correctly applied";
/// The condition of the whole object: its rules are in force wherever it has pods.
pub const CONDITION: &str = "Applied";
/// The condition that every `nodeSelector` matches a node; only there if one does not.
pub const NODES_MATCHED: &str = "NodesMatched";

/// What has come of an object on one node.
enum Outcome<'a> {
    /// Its rules are in force.
    Applied,
    /// They are not, and why.
    Failed(&'a AppliedFirewall),
    /// The node has said nothing of this version yet, and why that may be.
    Waiting(&'static str),
}

/// The status of an object that concerns `nodes`. Conditions of `previous` that still hold keep the time since
/// when they do.
#[must_use]
pub fn status(
    namespace: &str,
    firewall: &Firewall,
    nodes: &BTreeSet<String>,
    known: &BTreeMap<String, Node>,
    previous: &[Condition],
    now: &str,
) -> EgressFirewallStatus {
    let outcomes: Vec<_> =
        nodes.iter().map(|name| (name, outcome(namespace, firewall, known.get(name)))).collect();
    let mut messages = Vec::new();
    for (node, outcome) in &outcomes {
        match (outcome, &firewall.rules) {
            (_, Err(mistakes)) => messages.push(format!("{node}: {NOT_APPLIED}: {mistakes}")),
            (Outcome::Applied, Ok(_)) => messages.push(format!("{node}: {APPLIED}")),
            (Outcome::Failed(report), Ok(_)) => {
                messages.push(format!("{node}: {NOT_APPLIED}: {}", report.message));
            }
            (Outcome::Waiting(_), Ok(_)) => {}
        }
    }
    let failed: Vec<_> = outcomes
        .iter()
        .filter_map(|(node, o)| if let Outcome::Failed(report) = o { Some((*node, *report)) } else { None })
        .collect();
    let waiting: Vec<_> = outcomes
        .iter()
        .filter_map(|(node, o)| if let Outcome::Waiting(why) = o { Some((*node, *why)) } else { None })
        .collect();
    let (word, overall) = match &firewall.rules {
        Err(mistakes) => {
            if messages.is_empty() {
                messages.push(format!("{NOT_APPLIED}: {mistakes}"));
            }
            (NOT_APPLIED, condition(CONDITION, "False", "Refused", refused(mistakes, &failed)))
        }
        Ok(_) if !failed.is_empty() => {
            let each: Vec<_> = failed
                .iter()
                .map(|(node, report)| format!("node {node}: {}{}", report.message, kept(report)))
                .collect();
            (NOT_APPLIED, condition(CONDITION, "False", "NotApplied", each.join("; ")))
        }
        Ok(rules) if waiting.is_empty() => {
            let message = match nodes.len() {
                0 => format!("{}, no node has pods of the namespace", Count(rules.len(), "rule")),
                n => format!("{} in force on {}", Count(rules.len(), "rule"), Count(n, "node")),
            };
            (APPLIED, condition(CONDITION, "True", "RulesApplied", message))
        }
        Ok(_) => {
            let not_ready = waiting.iter().all(|(_, why)| *why == NOT_READY || *why == NO_AGENT);
            let reason = if not_ready { "NodeNotReady" } else { "Pending" };
            let each: Vec<_> = waiting.iter().map(|(node, why)| format!("node {node} {why}")).collect();
            ("", condition(CONDITION, "False", reason, each.join("; ")))
        }
    };
    let mut conditions = vec![overall];
    if !firewall.notes.is_empty() {
        conditions.push(condition(NODES_MATCHED, "False", "NoMatchingNode", firewall.notes.join("; ")));
    }
    date(&mut conditions, previous, now);
    EgressFirewallStatus { status: word.to_owned(), messages, conditions }
}

const NOT_READY: &str = "is not ready and has not confirmed it";
const NO_AGENT: &str = "has pods of the namespace and no agent";

fn outcome<'a>(namespace: &str, firewall: &Firewall, node: Option<&'a Node>) -> Outcome<'a> {
    let Some(node) = node else { return Outcome::Waiting(NO_AGENT) };
    let Some(agent) = &node.agent else { return Outcome::Waiting(NO_AGENT) };
    match agent.firewalls.get(namespace) {
        Some(report) if report.uid == firewall.uid && report.version == version_text(firewall.version) => {
            if report.message.is_empty() {
                Outcome::Applied
            } else {
                Outcome::Failed(report)
            }
        }
        _ if !node.ready => Outcome::Waiting(NOT_READY),
        _ => Outcome::Waiting("has not confirmed it yet"),
    }
}

/// What becomes of a refused object, as the nodes tell.
fn refused(mistakes: &str, failed: &[(&String, &AppliedFirewall)]) -> String {
    let names = |wanted: bool| {
        let names: Vec<_> =
            failed.iter().filter(|(_, r)| r.kept == wanted).map(|(node, _)| node.as_str()).collect();
        (!names.is_empty()).then(|| names.join(", "))
    };
    let what = match (names(true), names(false)) {
        (None, None) => String::new(),
        (Some(_), None) => "; the version before stays in force".to_owned(),
        (None, Some(_)) => "; there is no version before, all that rules could be for is denied".to_owned(),
        (Some(kept), Some(without)) => format!(
            "; the version before stays in force on {kept}, on {without} there is none and all that rules could be for is denied"
        ),
    };
    format!("{mistakes}{what}")
}

fn kept(report: &AppliedFirewall) -> &'static str {
    if report.kept { " (the version before stays in force)" } else { "" }
}

fn condition(kind: &str, status: &str, reason: &str, message: String) -> Condition {
    Condition {
        kind: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        ..Condition::default()
    }
}

/// `1 rule`, `2 rules`.
struct Count(usize, &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.0, self.1, if self.0 == 1 { "" } else { "s" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeAgent;
    use std::sync::Arc;

    fn firewall(rules: Result<usize, &str>) -> Firewall {
        let rule = crate::firewall::Rule {
            allows: true,
            to: crate::firewall::Destination::Nodes(Vec::new()),
            ports: Vec::new(),
        };
        Firewall {
            uid: "u".into(),
            version: 7,
            rules: rules.map(|n| Arc::new(vec![rule; n])).map_err(str::to_owned),
            notes: Vec::new(),
        }
    }

    fn says(version: u64, message: &str, kept: bool) -> Node {
        let report = AppliedFirewall {
            namespace: "shop".into(),
            uid: "u".into(),
            version: version_text(version),
            message: message.into(),
            kept,
        };
        let agent =
            NodeAgent { firewalls: BTreeMap::from([("shop".into(), report)]), ..NodeAgent::default() };
        Node { exists: true, ready: true, agent: Some(agent), ..Node::default() }
    }

    fn of(firewall: &Firewall, nodes: &[(&str, Node)]) -> EgressFirewallStatus {
        let known: BTreeMap<_, _> = nodes.iter().map(|(name, n)| ((*name).to_owned(), n.clone())).collect();
        status("shop", firewall, &known.keys().cloned().collect(), &known, &[], "now")
    }

    fn told(s: &EgressFirewallStatus) -> (&str, &str, &str) {
        let c = &s.conditions[0];
        assert_eq!((c.kind.as_str(), c.last_transition_time.as_str()), ("Applied", "now"));
        (c.status.as_str(), c.reason.as_str(), c.message.as_str())
    }

    #[test]
    fn in_the_words_of_ovn_kubernetes() {
        let f = firewall(Ok(2));
        let s = of(&f, &[("a", says(7, "", false)), ("b", says(7, "", false))]);
        assert_eq!(s.status, "EgressFirewall Rules applied");
        assert_eq!(s.messages, ["a: EgressFirewall Rules applied", "b: EgressFirewall Rules applied"]);
        assert_eq!(told(&s), ("True", "RulesApplied", "2 rules in force on 2 nodes"));
        let s = of(&f, &[("a", says(7, "", false)), ("b", says(7, "RULES is full", true))]);
        assert_eq!(s.status, "EgressFirewall Rules not correctly applied");
        assert_eq!(
            s.messages,
            [
                "a: EgressFirewall Rules applied",
                "b: EgressFirewall Rules not correctly applied: RULES is full"
            ]
        );
        assert_eq!(
            told(&s),
            ("False", "NotApplied", "node b: RULES is full (the version before stays in force)")
        );
    }

    #[test]
    fn nothing_is_said_before_all_nodes_have() {
        let f = firewall(Ok(1));
        let s = of(&f, &[("a", says(7, "", false)), ("b", says(6, "", false))]);
        assert_eq!((s.status.as_str(), s.messages.len()), ("", 1));
        assert_eq!(told(&s), ("False", "Pending", "node b has not confirmed it yet"));
        let s = of(&f, &[("a", Node { ready: false, ..says(6, "", false) })]);
        assert_eq!(told(&s).1, "NodeNotReady");
        let s = of(&f, &[("a", Node::default())]);
        assert_eq!(told(&s), ("False", "NodeNotReady", "node a has pods of the namespace and no agent"));
        let s = of(&f, &[]);
        assert_eq!((s.status.as_str(), s.messages.len()), (APPLIED, 0));
        assert_eq!(told(&s), ("True", "RulesApplied", "1 rule, no node has pods of the namespace"));
    }

    #[test]
    fn a_refused_object_is_told_of_wherever_its_pods_are() {
        let f = firewall(Err("spec.egress[0]: no"));
        let s = of(&f, &[]);
        assert_eq!(s.messages, ["EgressFirewall Rules not correctly applied: spec.egress[0]: no"]);
        assert_eq!(told(&s), ("False", "Refused", "spec.egress[0]: no"));
        let s = of(&f, &[("a", says(7, "refused", true))]);
        assert_eq!(s.status, NOT_APPLIED);
        assert_eq!(s.messages, ["a: EgressFirewall Rules not correctly applied: spec.egress[0]: no"]);
        assert_eq!(told(&s).2, "spec.egress[0]: no; the version before stays in force");
        let s = of(&f, &[("a", says(7, "refused", true)), ("b", says(7, "refused", false))]);
        assert!(
            told(&s).2.ends_with(
                "stays in force on a, on b there is none and all that rules could be for is denied"
            )
        );
    }

    #[test]
    fn a_selector_without_a_match_is_a_condition_and_no_failure() {
        let f = Firewall { notes: vec!["no node".into()], ..firewall(Ok(1)) };
        let s = of(&f, &[("a", says(7, "", false))]);
        assert_eq!(s.status, APPLIED);
        let c = &s.conditions[1];
        assert_eq!(
            (c.kind.as_str(), c.status.as_str(), c.reason.as_str()),
            (NODES_MATCHED, "False", "NoMatchingNode")
        );
    }
}
