//! CEL rules: what a schema cannot say, in functions that servers have since 1.25. Each message says what is wrong and
//! what to write instead. A server refuses a CRD with a rule whose estimated cost, times the places that it stands at, is
//! over 10,000,000 (`apiextensions-apiserver`, `StaticEstimatedCostLimit`), or over 100,000,000 for all rules: lengths in
//! the schema keep them far below, and a test keeps it so.
//!
//! They stand below `items` only: a server that knows no CEL publishes a schema of CRDs which lists the keywords of
//! `properties` and not of `items`, and kubectl refuses by it, so that `kubectl apply` would need `--validate=false` there.

use serde_json::{Value, json};

/// An expression over `self`, and what is said when it is false.
pub(crate) type Rule = (&'static str, &'static str);

/// `x-kubernetes-validations` of a schema.
pub(crate) fn rules(rules: &[Rule]) -> Value {
    rules.iter().map(|(rule, message)| json!({"rule": rule, "message": message})).collect()
}

/// `::ffff:192.0.2.1` would be another spelling of an IPv4 address.
pub(super) const MAPPED_ADDRESS: Rule = (
    r"!self.matches('(?i)^[0:]*:ffff:([0-9.]+|[0-9a-f]+:[0-9a-f]+)$')",
    "is an IPv4 address in IPv6 form; write it as IPv4, such as 192.0.2.1",
);

/// The same of networks.
pub(super) const MAPPED_NETWORK: Rule = (
    r"!self.matches('(?i)^[0:]*:ffff:([0-9.]+|[0-9a-f]+:[0-9a-f]+)/(9[6-9]|1[0-9]+)$')",
    "is an IPv4 network in IPv6 form; write it as IPv4, such as 192.0.2.0/24",
);

/// `In` of nothing would never, `NotIn` of nothing always hold: a slip either way.
pub(crate) const SELECTOR_VALUES: Rule = (
    "(self.operator == 'In' || self.operator == 'NotIn') == (has(self.values) && size(self.values) > 0)",
    "In and NotIn need values; Exists and DoesNotExist take none",
);

/// A firewall's port range.
pub(super) const PORT_RANGE: Rule = (
    "!has(self.endPort) || (has(self.port) && self.endPort >= self.port)",
    "endPort must not be less than port, and needs it: write both, port first in order",
);

/// An address as a name would be looked up, in vain.
pub(super) const NAME_IS_ADDRESS: Rule = (
    "!self.matches('^[0-9.]+$')",
    "is an address, not a name: write it as cidrSelector, such as 192.0.2.1/32",
);
