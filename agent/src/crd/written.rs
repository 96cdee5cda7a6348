//! An EgressFirewall's spec as people write it. [`crate::firewall::check`] reads it by hand and tolerantly, to name every
//! mistake; this is its strict form, for the schema alone.

#![expect(dead_code, reason = "only their schema is used")]

use datapath::limits::FIREWALL_RULES;
use schemars::JsonSchema;

use super::{Network, rules, texts::DNS_NAME};
use crate::objects::LabelSelector;

/// Ports of one rule: together with [`FIREWALL_RULES`] it bounds what CEL costs. More are written as ranges, or as a
/// second rule.
const RULE_PORTS: usize = 64;

/// What is wanted: rules, in their order.
#[derive(JsonSchema)]
pub(super) struct EgressFirewallSpec {
    /// The rules, in their order: the first that matches decides. What none matches is allowed.
    #[schemars(length(max = FIREWALL_RULES))]
    egress: Vec<EgressFirewallRule>,
}

/// What to allow or to deny.
#[derive(JsonSchema)]
struct EgressFirewallRule {
    /// `Allow` or `Deny`.
    #[schemars(rename = "type", extend("enum" = ["Allow", "Deny"]))]
    kind: String,
    /// Where the traffic goes: exactly one of the fields.
    to: EgressFirewallDestination,
    /// Ports that the rule is for; none: everything.
    #[schemars(length(max = RULE_PORTS))]
    ports: Option<Vec<EgressFirewallPort>>,
}

/// A destination.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", extend("minProperties" = 1, "maxProperties" = 1))]
struct EgressFirewallDestination {
    /// A network, such as `192.0.2.0/24` or `2001:db8::/32`. `0.0.0.0/0` does not cover IPv6.
    #[schemars(with = "Network", default)]
    cidr_selector: Option<String>,
    /// A DNS name: the addresses that it has for the nodes and for the pods that look it up. `*.example.com` is every name
    /// with one label more.
    #[schemars(
        length(max = 254),
        regex(pattern = DNS_NAME),
        extend("x-kubernetes-validations" = rules::rules(&[rules::NAME_IS_ADDRESS]))
    )]
    dns_name: Option<String>,
    /// Nodes, by their labels: all their addresses.
    #[schemars(with = "LabelSelector", default)]
    node_selector: Option<LabelSelector>,
}

/// Ports of one protocol.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", extend("x-kubernetes-validations" = rules::rules(&[rules::PORT_RANGE])))]
struct EgressFirewallPort {
    /// `TCP`, `UDP` or `SCTP`.
    #[schemars(extend("enum" = ["TCP", "UDP", "SCTP"]))]
    protocol: String,
    /// The port, or the first of a range; none: all ports of the protocol.
    #[schemars(range(min = 1))]
    port: Option<u16>,
    /// The last port of a range that begins with `port`.
    #[schemars(range(min = 1))]
    end_port: Option<u16>,
}
