//! An EgressFirewall's spec as it stands in an object, checked. Each mistake is named by its field, and all are
//! named at once; a single one refuses the whole object, because rules work by their order.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use datapath::limits::{FIREWALL_NAMES, FIREWALL_RULES};
use datapath::packet::{SCTP, TCP, UDP};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::{Destination, Firewall, Name, Ports, Rule};
use crate::addresses;
use crate::ids::identity;
use crate::model::Node;
use crate::objects::{LabelSelector, Meta};
use crate::selector::Selector;

/// Why a spec that has not been read has no rules.
const UNREAD: &str = "its rules have not been read yet";
/// How many mistakes are told; the others are counted.
const MISTAKES: usize = 10;

/// A spec, checked by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spec {
    /// Its rules, those for nodes without addresses yet; or its mistakes.
    rules: Result<Arc<Vec<Rule>>, String>,
    /// Rules for nodes, by their place.
    selectors: Arc<Vec<(usize, Selector)>>,
    /// A hash of what stands there.
    content: u64,
}

impl Default for Spec {
    /// No spec at all: refused.
    fn default() -> Self {
        Self::check(&Value::Null)
    }
}

impl<'de> Deserialize<'de> for Spec {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Value::deserialize(d).map(|value| Self::check(&value))
    }
}

impl Spec {
    /// Checks what stands under `spec`.
    #[must_use]
    pub fn check(spec: &Value) -> Self {
        let mut checker = Checker::default();
        let rules = checker.spec(spec);
        let mistakes = &checker.mistakes;
        Self {
            rules: if mistakes.told.is_empty() { Ok(Arc::new(rules)) } else { Err(mistakes.to_string()) },
            selectors: Arc::new(checker.selectors),
            content: identity(&[&spec.to_string()]),
        }
    }

    /// The spec of an object that is there and has not been read yet: refused, like one with mistakes.
    #[must_use]
    pub fn unread() -> Self {
        Self { rules: Err(UNREAD.to_owned()), selectors: Arc::default(), content: identity(&["unread"]) }
    }

    /// Whether that is all there is to say of it: no mistake of anybody's.
    #[must_use]
    pub fn is_unread(&self) -> bool {
        self.rules.as_ref().is_err_and(|why| why == UNREAD)
    }

    /// How many rules it has; 0 if it is refused.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rules.as_ref().map_or(0, |rules| rules.len())
    }

    /// Whether it has no rules.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The firewall of the object that has this spec, for these nodes.
    #[must_use]
    pub fn firewall(&self, meta: &Meta, cluster: &BTreeMap<String, Node>) -> Firewall {
        let mut notes = Vec::new();
        let mut rules = self.rules.clone();
        if let Ok(rules) = &mut rules
            && !self.selectors.is_empty()
        {
            let rules = Arc::make_mut(rules);
            for (index, selector) in self.selectors.iter() {
                let matching = || cluster.values().filter(|n| n.exists && selector.matches(&n.labels));
                let addresses: BTreeSet<_> = matching().flat_map(Node::addresses).collect();
                if addresses.is_empty() {
                    let what = if matching().next().is_none() {
                        format!("nodeSelector of spec.egress[{index}] matches no node")
                    } else {
                        format!(
                            "no address is known of the nodes that nodeSelector of spec.egress[{index}] matches"
                        )
                    };
                    notes.push(format!("{what}: the rule matches nothing"));
                }
                if let Some(rule) = rules.get_mut(*index) {
                    rule.to = Destination::Nodes(addresses.into_iter().collect());
                }
            }
        }
        Firewall { uid: meta.uid.clone(), version: self.content, rules, notes }
    }
}

/// Every mistake of a spec, with its field.
pub(crate) fn mistakes(spec: &Value) -> Vec<(String, String)> {
    let mut checker =
        Checker { mistakes: Mistakes { most: usize::MAX, ..Mistakes::default() }, ..Checker::default() };
    checker.spec(spec);
    checker.mistakes.told
}

/// Mistakes, the first of them in words.
struct Mistakes {
    /// Field and what is wrong with it.
    told: Vec<(String, String)>,
    /// How many are told.
    most: usize,
    more: usize,
}

impl Default for Mistakes {
    fn default() -> Self {
        Self { told: Vec::new(), most: MISTAKES, more: 0 }
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told: Vec<_> = self.told.iter().map(|(at, what)| format!("{at}: {what}")).collect();
        f.write_str(&told.join("; "))?;
        if self.more > 0 {
            write!(f, "; and {} more", self.more)?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Checker {
    mistakes: Mistakes,
    selectors: Vec<(usize, Selector)>,
    names: BTreeSet<Name>,
}

impl Checker {
    /// Notes a mistake at a field.
    fn wrong(&mut self, at: &str, what: impl fmt::Display) {
        if self.mistakes.told.len() < self.mistakes.most {
            self.mistakes.told.push((at.to_owned(), what.to_string()));
        } else {
            self.mistakes.more += 1;
        }
    }

    /// The fields of an object. One that is not known is a mistake: a rule that misses a condition for a slip in
    /// its name would be another rule.
    fn fields<'a>(&mut self, at: &str, value: &'a Value, known: &[&str]) -> Option<&'a Map<String, Value>> {
        let Value::Object(map) = value else {
            self.wrong(at, Expected("an object", value));
            return None;
        };
        for (name, value) in map {
            if !value.is_null() && !known.contains(&name.as_str()) {
                self.wrong(at, format_args!("{name:?} is no field of it; there are {}", known.join(", ")));
            }
        }
        Some(map)
    }

    fn text<'a>(&mut self, at: &str, value: &'a Value) -> Option<&'a str> {
        let text = value.as_str();
        if text.is_none() {
            self.wrong(at, Expected("text", value));
        }
        text
    }

    fn spec(&mut self, spec: &Value) -> Vec<Rule> {
        let Some(fields) = self.fields("spec", spec, &["egress"]) else { return Vec::new() };
        match present(fields, "egress") {
            None => self.wrong("spec.egress", "is missing; no rules are written []"),
            Some(Value::Array(rules)) if rules.len() > FIREWALL_RULES => self.wrong(
                "spec.egress",
                format_args!("has {} rules; an object may have {FIREWALL_RULES}", rules.len()),
            ),
            Some(Value::Array(rules)) => {
                let rules = rules.iter().enumerate().filter_map(|(i, rule)| self.rule(i, rule)).collect();
                if self.names.len() > FIREWALL_NAMES {
                    let count = self.names.len();
                    self.wrong(
                        "spec.egress",
                        format_args!("has {count} different names; an object may have {FIREWALL_NAMES}"),
                    );
                }
                return rules;
            }
            Some(other) => self.wrong("spec.egress", Expected("a list of rules", other)),
        }
        Vec::new()
    }

    fn rule(&mut self, index: usize, rule: &Value) -> Option<Rule> {
        let at = format!("spec.egress[{index}]");
        let fields = self.fields(&at, rule, &["type", "to", "ports"])?;
        let allows = match present(fields, "type") {
            None => {
                self.wrong(&format!("{at}.type"), "is missing: Allow or Deny");
                None
            }
            Some(Value::String(word)) if word == "Allow" => Some(true),
            Some(Value::String(word)) if word == "Deny" => Some(false),
            Some(other) => {
                self.wrong(&format!("{at}.type"), format_args!("{other} is neither Allow nor Deny"));
                None
            }
        };
        let to = match present(fields, "to") {
            None => {
                self.wrong(&format!("{at}.to"), format_args!("is missing: one of {DESTINATIONS}"));
                None
            }
            Some(to) => self.destination(index, &format!("{at}.to"), to),
        };
        let ports = match present(fields, "ports") {
            None => Some(Vec::new()),
            Some(Value::Array(ports)) => {
                let each = |(i, ports)| self.ports(&format!("{at}.ports[{i}]"), ports);
                // All of them, not up to the first that is wrong.
                let ports: Vec<_> = ports.iter().enumerate().map(each).collect();
                ports.into_iter().collect()
            }
            Some(other) => {
                self.wrong(&format!("{at}.ports"), Expected("a list", other));
                None
            }
        };
        Some(Rule { allows: allows?, to: to?, ports: ports? })
    }

    fn destination(&mut self, index: usize, at: &str, to: &Value) -> Option<Destination> {
        let fields = self.fields(at, to, &["cidrSelector", "dnsName", "nodeSelector"])?;
        let given: Vec<_> = fields.iter().filter(|(_, value)| !value.is_null()).collect();
        let [(field, value)] = given.as_slice() else {
            let names: Vec<_> = given.iter().map(|(name, _)| name.as_str()).collect();
            let has = if names.is_empty() { "nothing".to_owned() } else { names.join(" and ") };
            self.wrong(at, format_args!("has {has}, but must have exactly one of {DESTINATIONS}"));
            return None;
        };
        let at = format!("{at}.{field}");
        match field.as_str() {
            "cidrSelector" => {
                let text = self.text(&at, value)?;
                match network(text) {
                    Ok(to) => Some(to),
                    Err(what) => {
                        self.wrong(&at, format_args!("{text:?} {what}"));
                        None
                    }
                }
            }
            "dnsName" => {
                let text = self.text(&at, value)?;
                match name(text) {
                    Ok(name) => {
                        self.names.insert(name.clone());
                        Some(Destination::Name(name))
                    }
                    Err(what) => {
                        self.wrong(&at, format_args!("{text:?} {what}"));
                        None
                    }
                }
            }
            "nodeSelector" => {
                self.fields(&at, value, &["matchLabels", "matchExpressions"])?;
                let selector = LabelSelector::deserialize(*value)
                    .map_err(|error| format!("is no label selector: {error}"))
                    .and_then(|s| Selector::new(&s).map_err(|error| error.to_string()));
                match selector {
                    Ok(selector) => self.selectors.push((index, selector)),
                    Err(what) => self.wrong(&at, what),
                }
                Some(Destination::Nodes(Vec::new()))
            }
            // An unknown field, told already.
            _ => None,
        }
    }

    fn ports(&mut self, at: &str, value: &Value) -> Option<Ports> {
        let fields = self.fields(at, value, &["protocol", "port", "endPort"])?;
        let protocol = match present(fields, "protocol") {
            None => {
                self.wrong(&format!("{at}.protocol"), "is missing: TCP, UDP or SCTP");
                None
            }
            Some(Value::String(word)) if word == "TCP" => Some(TCP),
            Some(Value::String(word)) if word == "UDP" => Some(UDP),
            Some(Value::String(word)) if word == "SCTP" => Some(SCTP),
            Some(other) => {
                self.wrong(&format!("{at}.protocol"), format_args!("{other} is none of TCP, UDP, SCTP"));
                None
            }
        };
        let mut number = |field: &str| {
            let value = present(fields, field)?;
            let port = value.as_i64().filter(|n| PORTS.contains(n)).and_then(|n| u16::try_from(n).ok());
            if port.is_none() {
                self.wrong(
                    &format!("{at}.{field}"),
                    format_args!("{value} is not a port, a number from 1 to 65535"),
                );
            }
            Some(port)
        };
        let (first, last) = match (number("port"), number("endPort")) {
            // A port that is wrong has been told.
            (Some(None), _) | (_, Some(None)) => return None,
            (None, None) => (0, u16::MAX),
            (Some(Some(port)), None) => (port, port),
            (Some(Some(port)), Some(Some(end))) if end >= port => (port, end),
            (Some(Some(port)), Some(Some(end))) => {
                self.wrong(&format!("{at}.endPort"), format_args!("{end} is less than port, {port}"));
                return None;
            }
            (None, Some(Some(_))) => {
                self.wrong(&format!("{at}.endPort"), "needs a port, with which the range begins");
                return None;
            }
        };
        Some(Ports { protocol: protocol?, first, last })
    }
}

const DESTINATIONS: &str = "cidrSelector, dnsName, nodeSelector";
const PORTS: RangeInclusive<i64> = 1..=65_535;

/// What stands in a field; `null` is the same as absent.
fn present<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|value| !value.is_null())
}

/// A value of the wrong kind.
pub(crate) struct Expected<'a>(pub(crate) &'static str, pub(crate) &'a Value);

impl fmt::Display for Expected<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = match self.1 {
            Value::Null => return write!(f, "is missing; expected {}", self.0),
            Value::Bool(value) => return write!(f, "is {value}, expected {}", self.0),
            Value::Number(value) => return write!(f, "is the number {value}, expected {}", self.0),
            Value::String(value) => return write!(f, "is {value:?}, expected {}", self.0),
            Value::Array(_) => "a list",
            Value::Object(_) => "an object",
        };
        write!(f, "is {found}, expected {}", self.0)
    }
}

/// A rule's network. Host bits are cut off, as `net.ParseCIDR` does, which OVN-Kubernetes reads it with.
fn network(text: &str) -> Result<Destination, String> {
    match (addresses::network(text), addresses::address(text)) {
        (Ok(network), _) => Ok(Destination::Network(network)),
        (Err(_), Ok(ip)) => {
            Err(format!("is an address, not a network: write {ip}/{}", if ip.is_ipv4() { 32 } else { 128 }))
        }
        (Err(_), Err(error @ (addresses::Error::Mapped | addresses::Error::Zone))) | (Err(error), Err(_)) => {
            Err(error.to_string())
        }
    }
}

/// A rule's name: `*.` for one label more, labels of letters, digits, `-` and `_` (RFC 1123, 2.1; RFC 2181, 11,
/// forbids nothing, but nothing else is asked for), at most 63 each and 253 in all (RFC 1035, 2.3.4).
fn name(text: &str) -> Result<Name, String> {
    if let Ok(ip) = text.trim_end_matches('.').parse::<IpAddr>() {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        return Err(format!("is an address, not a name: write cidrSelector: {ip}/{bits}"));
    }
    if text.parse::<ipnet::IpNet>().is_ok() {
        return Err("is a network, not a name: write it as cidrSelector".to_owned());
    }
    if !text.is_ascii() {
        return Err("has letters that a name has not on the wire: write it in its xn-- form".to_owned());
    }
    let full = text.strip_suffix('.').unwrap_or(text);
    let (wildcard, name) = full.strip_prefix("*.").map_or((false, full), |name| (true, name));
    if name.contains('*') {
        return Err("has a * that does not stand for a whole first label, as in *.example.com".to_owned());
    }
    if full.len() > 253 {
        return Err(format!("has {} characters; a name has at most 253", full.len()));
    }
    for label in name.split('.') {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
        if label.is_empty() {
            return Err("has an empty label".to_owned());
        }
        if label.len() > 63 {
            return Err(format!("has a label of {} characters; a label has at most 63", label.len()));
        }
        if !label.bytes().all(allowed) || label.starts_with('-') || label.ends_with('-') {
            return Err(format!(
                "is not a DNS name: its label {label:?} must be of letters, digits, - and _, with no - at its ends"
            ));
        }
    }
    Ok(Name { wildcard, name: name.to_ascii_lowercase() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(yaml: &str) -> Spec {
        serde_saphyr::from_str(yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"))
    }

    /// What is said of a spec of one rule.
    fn said(rule: &str) -> String {
        spec(&format!("egress: [{rule}]")).rules.unwrap_err()
    }

    fn rules(yaml: &str) -> Vec<Rule> {
        spec(yaml).rules.unwrap_or_else(|error| panic!("{yaml}: {error}")).to_vec()
    }

    fn to(rule: &str) -> String {
        match &rules(&format!("egress: [{{type: Allow, to: {{{rule}}}}}]"))[0].to {
            Destination::Network(network) => network.to_string(),
            Destination::Name(name) => name.to_string(),
            Destination::Nodes(nodes) => format!("{nodes:?}"),
        }
    }

    #[test]
    fn the_example_of_openshifts_documentation() {
        let rules = rules(
            "egress:
- type: Allow
  to:
    cidrSelector: 1.2.3.0/24
- type: Allow
  to:
    dnsName: www.example.com
- type: Deny
  to:
    cidrSelector: 0.0.0.0/0
  ports:
  - port: 80
    protocol: TCP
  - port: 443
    protocol: UDP
  - protocol: SCTP
  - {protocol: TCP, port: 8000, endPort: 8010}
",
        );
        assert_eq!(rules.iter().map(|r| r.allows).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(rules[1].to, Destination::Name(Name { wildcard: false, name: "www.example.com".into() }));
        let ports: Vec<_> = rules[2].ports.iter().map(|p| (p.protocol, p.first, p.last)).collect();
        assert_eq!(ports, [(TCP, 80, 80), (UDP, 443, 443), (SCTP, 0, 65_535), (TCP, 8000, 8010)]);
        assert!(rules[0].ports.is_empty());
    }

    #[test]
    fn what_is_accepted() {
        assert_eq!(to("cidrSelector: 10.1.2.3/8"), "10.0.0.0/8", "host bits are cut off");
        assert_eq!(to("cidrSelector: '2001:db8::1/32'"), "2001:db8::/32");
        assert_eq!(to("cidrSelector: '::/0'"), "::/0");
        assert_eq!(to("dnsName: WWW.Example.COM."), "www.example.com");
        assert_eq!(to("dnsName: '*.Example.com'"), "*.example.com");
        assert_eq!(to("dnsName: _sip._tcp.example.com, cidrSelector: null"), "_sip._tcp.example.com");
        assert_eq!(to("dnsName: 1.2.3.example"), "1.2.3.example");
        assert_eq!(to("nodeSelector: {matchLabels: {role: db}}"), "[]", "until nodes are known");
        assert!(rules("egress: []").is_empty());
        assert!(
            rules("egress: [{type: Deny, to: {cidrSelector: 0.0.0.0/0}, ports: null}]")[0].ports.is_empty()
        );
        assert!(
            rules("egress: [{type: Deny, to: {cidrSelector: 0.0.0.0/0}, ports: []}]")[0].ports.is_empty()
        );
        let label = "a".repeat(63);
        let longest = format!("{label}.{label}.{label}.{}", "a".repeat(61));
        assert_eq!(to(&format!("dnsName: {longest}.")), longest);
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn each_mistake_is_named_by_its_field() {
        let good = "cidrSelector: 10.0.0.0/8";
        for (rule, expected) in [
            ("{to: {GOOD}}", "spec.egress[0].type: is missing: Allow or Deny"),
            ("{type: allow, to: {GOOD}}", "spec.egress[0].type: \"allow\" is neither Allow nor Deny"),
            ("{type: AllowX, to: {GOOD}}", "spec.egress[0].type: \"AllowX\" is neither Allow nor Deny"),
            ("{type: [], to: {GOOD}}", "spec.egress[0].type: [] is neither Allow nor Deny"),
            ("{type: Deny}", "spec.egress[0].to: is missing: one of cidrSelector, dnsName, nodeSelector"),
            ("{type: Deny, to: 10.0.0.0/8}", "spec.egress[0].to: is \"10.0.0.0/8\", expected an object"),
            ("Deny", "spec.egress[0]: is \"Deny\", expected an object"),
            (
                "{type: Deny, to: {}}",
                "spec.egress[0].to: has nothing, but must have exactly one of cidrSelector, dnsName, nodeSelector",
            ),
            (
                "{type: Deny, to: {GOOD, dnsName: a.b}}",
                "spec.egress[0].to: has cidrSelector and dnsName, but must have exactly one of cidrSelector, dnsName, nodeSelector",
            ),
            (
                "{type: Deny, to: {cidrselector: 10.0.0.0/8}}",
                "spec.egress[0].to: \"cidrselector\" is no field of it; there are cidrSelector, dnsName, nodeSelector",
            ),
            (
                "{type: Deny, to: {GOOD}, port: 80}",
                "spec.egress[0]: \"port\" is no field of it; there are type, to, ports",
            ),
            (
                "{type: Deny, to: {cidrSelector: 10.0.0.1}}",
                "spec.egress[0].to.cidrSelector: \"10.0.0.1\" is an address, not a network: write 10.0.0.1/32",
            ),
            (
                "{type: Deny, to: {cidrSelector: '2001:DB8::1'}}",
                "spec.egress[0].to.cidrSelector: \"2001:DB8::1\" is an address, not a network: write 2001:db8::1/128",
            ),
            (
                "{type: Deny, to: {cidrSelector: 10.0.0.0/33}}",
                "spec.egress[0].to.cidrSelector: \"10.0.0.0/33\" is not a network such as 10.0.0.0/16 or 2001:db8::/64",
            ),
            (
                "{type: Deny, to: {cidrSelector: '::ffff:10.0.0.1'}}",
                "spec.egress[0].to.cidrSelector: \"::ffff:10.0.0.1\" is an IPv4 address in IPv6 form; write it as IPv4",
            ),
            (
                "{type: Deny, to: {cidrSelector: '::ffff:10.0.0.0/104'}}",
                "spec.egress[0].to.cidrSelector: \"::ffff:10.0.0.0/104\" is an IPv4 address in IPv6 form; write it as IPv4",
            ),
            (
                "{type: Deny, to: {cidrSelector: 10}}",
                "spec.egress[0].to.cidrSelector: is the number 10, expected text",
            ),
            (
                "{type: Deny, to: {dnsName: 10.0.0.1}}",
                "spec.egress[0].to.dnsName: \"10.0.0.1\" is an address, not a name: write cidrSelector: 10.0.0.1/32",
            ),
            (
                "{type: Deny, to: {dnsName: 10.0.0.0/8}}",
                "spec.egress[0].to.dnsName: \"10.0.0.0/8\" is a network, not a name: write it as cidrSelector",
            ),
            (
                "{type: Deny, to: {nodeSelector: {matchLabel: {a: b}}}}",
                "spec.egress[0].to.nodeSelector: \"matchLabel\" is no field of it; there are matchLabels, matchExpressions",
            ),
            (
                "{type: Deny, to: {nodeSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}}",
                "spec.egress[0].to.nodeSelector: matchExpressions[0].operator \"in\" is none of In, NotIn, Exists, DoesNotExist",
            ),
            (
                "{type: Deny, to: {nodeSelector: {matchLabels: [a]}}}",
                "spec.egress[0].to.nodeSelector: is no label selector: invalid type: sequence, expected a map",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: 80}",
                "spec.egress[0].ports: is the number 80, expected a list",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: [80]}",
                "spec.egress[0].ports[0]: is the number 80, expected an object",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: [{port: 80}]}",
                "spec.egress[0].ports[0].protocol: is missing: TCP, UDP or SCTP",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: [{protocol: tcp, port: 80}]}",
                "spec.egress[0].ports[0].protocol: \"tcp\" is none of TCP, UDP, SCTP",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: [{protocol: UDP}, {protocol: TCP, port: 0}]}",
                "spec.egress[0].ports[1].port: 0 is not a port, a number from 1 to 65535",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: [{protocol: TCP, port: 65536}]}",
                "spec.egress[0].ports[0].port: 65536 is not a port, a number from 1 to 65535",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: [{protocol: TCP, port: '80'}]}",
                "spec.egress[0].ports[0].port: \"80\" is not a port, a number from 1 to 65535",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: [{protocol: TCP, endPort: 80}]}",
                "spec.egress[0].ports[0].endPort: needs a port, with which the range begins",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: [{protocol: TCP, port: 80, endPort: 79}]}",
                "spec.egress[0].ports[0].endPort: 79 is less than port, 80",
            ),
            (
                "{type: Deny, to: {GOOD}, ports: [{protocol: TCP, port: 80, endport: 90}]}",
                "spec.egress[0].ports[0]: \"endport\" is no field of it; there are protocol, port, endPort",
            ),
        ] {
            assert_eq!(said(&rule.replace("GOOD", good)), expected, "{rule}");
        }
        for (text, expected) in [
            ("{}", "spec.egress: is missing; no rules are written []"),
            ("{egress: null}", "spec.egress: is missing; no rules are written []"),
            ("{egress: {}}", "spec.egress: is an object, expected a list of rules"),
            ("{egress: [], ingress: []}", "spec: \"ingress\" is no field of it; there are egress"),
            ("rules", "spec: is \"rules\", expected an object"),
        ] {
            assert_eq!(spec(text).rules.unwrap_err(), expected, "{text}");
        }
        assert_eq!(Spec::default().rules.unwrap_err(), "spec: is missing; expected an object");
    }

    #[test]
    fn names_that_are_none() {
        let label = "a".repeat(64);
        let long = format!("{}.a", vec!["a".repeat(62); 4].join("."));
        for (name, expected) in [
            ("", "has an empty label"),
            (".", "has an empty label"),
            ("a..b", "has an empty label"),
            (".a", "has an empty label"),
            ("a..", "has an empty label"),
            ("*.", "has a * that"),
            ("*", "has a * that does not stand for a whole first label"),
            ("www.*.com", "has a * that"),
            ("*a.com", "has a * that"),
            ("*.*.com", "has a * that"),
            ("-a.com", "its label \"-a\" must be"),
            ("a-.com", "its label \"a-\" must be"),
            ("a b.com", "its label \"a b\" must be"),
            ("https://a.com", "its label \"https://a\" must be"),
            ("a.com:443", "its label \"com:443\" must be"),
            ("bücher.example", "write it in its xn-- form"),
            (label.as_str(), "has a label of 64 characters"),
            (long.as_str(), "has 253 characters"),
            ("10.0.0.1.", "is an address, not a name: write cidrSelector: 10.0.0.1/32"),
            ("2001:db8::1", "is an address, not a name: write cidrSelector: 2001:db8::1/128"),
        ] {
            let name = if name == long { format!("{name}b") } else { name.to_owned() };
            let expected = expected.replace("253 characters", "254 characters");
            let found = said(&format!("{{type: Allow, to: {{dnsName: '{name}'}}}}"));
            assert!(found.starts_with(&format!("spec.egress[0].to.dnsName: {name:?} ")), "{found}");
            assert!(found.contains(&expected), "{found}");
        }
    }

    #[test]
    fn all_mistakes_are_told_up_to_ten() {
        let bad = vec!["{type: Deny, to: {cidrSelector: x}}"; 13].join(", ");
        let found = spec(&format!("egress: [{bad}]")).rules.unwrap_err();
        assert!(found.starts_with("spec.egress[0].to.cidrSelector: \"x\" is not"), "{found}");
        assert!(found.contains("; spec.egress[9].to") && !found.contains("spec.egress[10]"), "{found}");
        assert!(found.ends_with("; and 3 more"), "{found}");
        // Several in one rule.
        let found = said("{type: deny, to: {dnsName: '*'}, ports: [{}, {protocol: TCP, port: -1}]}");
        assert_eq!(found.split("; ").count(), 4, "{found}");
    }

    #[test]
    fn bounds_are_kept() {
        let many = |n: usize, rule: &dyn Fn(usize) -> String| {
            let rules: Vec<_> = (0..n).map(rule).collect();
            spec(&format!("egress: [{}]", rules.join(", "))).rules
        };
        let rule = |_| "{type: Deny, to: {cidrSelector: 0.0.0.0/0}}".to_owned();
        assert_eq!(many(8000, &rule).unwrap().len(), 8000);
        assert_eq!(many(8001, &rule).unwrap_err(), "spec.egress: has 8001 rules; an object may have 8000");
        let name = |i| format!("{{type: Deny, to: {{dnsName: n{}.example}}}}", i % 1025);
        assert_eq!(many(1024, &name).unwrap().len(), 1024);
        assert_eq!(
            many(2000, &name).unwrap_err(),
            "spec.egress: has 1025 different names; an object may have 1024"
        );
    }

    #[test]
    fn rules_for_nodes_follow_labels_and_addresses() {
        let spec = spec(
            "egress:
- {type: Allow, to: {cidrSelector: 10.0.0.0/8}}
- {type: Allow, to: {nodeSelector: {matchLabels: {role: db}}}}
- {type: Deny, to: {nodeSelector: {matchExpressions: [{key: role, operator: In, values: [web]}]}}}
- {type: Deny, to: {nodeSelector: {}}}
",
        );
        let node = |role: &str, addresses: &[&str]| Node {
            exists: true,
            labels: [("role", role)].into(),
            object_addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ..Node::default()
        };
        let mut nodes = BTreeMap::from([
            ("a".to_owned(), node("db", &["192.0.2.2", "2001:db8::2"])),
            ("b".to_owned(), node("db", &["192.0.2.1"])),
            ("c".to_owned(), Node { exists: false, ..node("db", &["192.0.2.3"]) }),
        ]);
        let meta = Meta { uid: "u".into(), ..Meta::default() };
        let of = |nodes: &BTreeMap<String, Node>| {
            let firewall = spec.firewall(&meta, nodes);
            let rules = firewall.rules.clone().unwrap();
            let addresses = rules.iter().filter_map(|r| match &r.to {
                Destination::Nodes(nodes) => Some(nodes.iter().map(ToString::to_string).collect::<Vec<_>>()),
                Destination::Network(_) | Destination::Name(_) => None,
            });
            (addresses.collect::<Vec<_>>(), firewall.notes, firewall.version)
        };
        let (found, said, version) = of(&nodes);
        let db = ["192.0.2.1", "192.0.2.2", "2001:db8::2"].map(str::to_owned).to_vec();
        assert_eq!(found, [db.clone(), vec![], db]);
        assert_eq!(said, ["nodeSelector of spec.egress[2] matches no node: the rule matches nothing"]);
        nodes.insert("d".to_owned(), node("web", &[]));
        let (_, said, same) = of(&nodes);
        assert_eq!(
            said,
            [
                "no address is known of the nodes that nodeSelector of spec.egress[2] matches: the rule matches nothing"
            ]
        );
        assert_eq!(version, same, "the object's, not the nodes'");
        nodes.insert("d".to_owned(), node("web", &["192.0.2.9"]));
        let (found, said, _) = of(&nodes);
        assert_eq!((found[1].as_slice(), said.len()), (["192.0.2.9".to_owned()].as_slice(), 0));
    }

    #[test]
    fn a_version_is_of_what_stands_there() {
        let of = |text: &str| spec(text).firewall(&Meta::default(), &BTreeMap::new()).version;
        assert_eq!(of("egress: []"), of("{\"egress\": []}"));
        assert_ne!(of("egress: []"), of("egress: [{}]"));
    }
}
