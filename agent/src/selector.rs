//! Label selectors, as Kubernetes defines them.

use std::collections::BTreeSet;

use crate::objects::{LabelSelector, NAMESPACE_NAME};
use crate::text::Labels;

/// A valid label selector. The empty one selects everything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Selector {
    requirements: Vec<Requirement>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Requirement {
    key: String,
    demand: Demand,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Demand {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

/// Whether labels are selected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Match {
    /// They are.
    Yes,
    /// They are not.
    No,
    /// It depends on labels that are not known.
    Unknown,
}

/// What is wrong with a selector.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// No such operator.
    #[error("matchExpressions[{index}].operator {operator:?} is none of In, NotIn, Exists, DoesNotExist")]
    Operator {
        /// Which expression.
        index: usize,
        /// What it says.
        operator: String,
    },
    /// `In` of nothing would never, `NotIn` of nothing always hold: a slip either way.
    #[error("matchExpressions[{index}] has operator {operator} and no values")]
    NoValues {
        /// Which expression.
        index: usize,
        /// What it says.
        operator: String,
    },
    /// `Exists` looks at no value.
    #[error("matchExpressions[{index}] has operator {operator}, which takes no values")]
    Values {
        /// Which expression.
        index: usize,
        /// What it says.
        operator: String,
    },
    /// No key.
    #[error("matchExpressions[{index}].key is missing")]
    NoKey {
        /// Which expression.
        index: usize,
    },
    /// No label can have this key.
    #[error(
        "{0:?} is no label's key: letters, digits, '-', '_' and '.', at most 63, perhaps after a domain and '/'"
    )]
    Key(String),
    /// No label can have this value.
    #[error("{value:?} is no value that label {key} can have: letters, digits, '-', '_' and '.', at most 63")]
    Value {
        /// The label.
        key: String,
        /// The value.
        value: String,
    },
}

impl Selector {
    /// Checks a selector as an object has it.
    pub fn new(selector: &LabelSelector) -> Result<Self, Error> {
        let mut requirements: Vec<_> = selector
            .match_labels
            .iter()
            .map(|(key, value)| Requirement {
                key: key.clone(),
                demand: Demand::In(BTreeSet::from([value.clone()])),
            })
            .collect();
        for (index, expression) in selector.match_expressions.iter().enumerate() {
            let operator = expression.operator.clone();
            if expression.key.is_empty() {
                return Err(Error::NoKey { index });
            }
            let values: BTreeSet<_> = expression.values.iter().cloned().collect();
            let demand = match (operator.as_str(), values.is_empty()) {
                ("In", false) => Demand::In(values),
                ("NotIn", false) => Demand::NotIn(values),
                ("Exists", true) => Demand::Exists,
                ("DoesNotExist", true) => Demand::DoesNotExist,
                ("In" | "NotIn", true) => return Err(Error::NoValues { index, operator }),
                ("Exists" | "DoesNotExist", false) => return Err(Error::Values { index, operator }),
                _ => return Err(Error::Operator { index, operator }),
            };
            requirements.push(Requirement { key: expression.key.clone(), demand });
        }
        for Requirement { key, demand } in &requirements {
            if !is_key(key) {
                return Err(Error::Key(key.clone()));
            }
            if let Demand::In(values) | Demand::NotIn(values) = demand
                && let Some(value) = values.iter().find(|value| !value.is_empty() && !is_name(value))
            {
                return Err(Error::Value { key: key.clone(), value: value.clone() });
            }
        }
        Ok(Self { requirements })
    }

    /// Whether these labels are selected.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|r| r.holds(labels.get(&r.key).map(|v| &**v)))
    }

    /// Whether a namespace is selected; `labels` is `None` if its object is not known. Every namespace has
    /// its name as a label: the API server sees to that, files written by hand may not.
    #[must_use]
    pub fn matches_namespace(&self, name: &str, labels: Option<&Labels>) -> Match {
        let mut outcome = Match::Yes;
        for requirement in &self.requirements {
            let value = labels.and_then(|l| l.get(&requirement.key)).map(|v| &**v);
            let value = if requirement.key == NAMESPACE_NAME { value.or(Some(name)) } else { value };
            if value.is_none() && labels.is_none() {
                outcome = Match::Unknown;
            } else if !requirement.holds(value) {
                return Match::No;
            }
        }
        outcome
    }
}

impl Requirement {
    fn holds(&self, value: Option<&str>) -> bool {
        match &self.demand {
            Demand::In(values) => value.is_some_and(|v| values.contains(v)),
            Demand::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
            Demand::Exists => value.is_some(),
            Demand::DoesNotExist => value.is_none(),
        }
    }
}

/// Whether a label can have this key (`IsQualifiedName`, apimachinery/pkg/util/validation/validation.go).
fn is_key(key: &str) -> bool {
    match key.split_once('/') {
        None => is_name(key),
        Some((domain, name)) => is_domain(domain) && is_name(name),
    }
}

/// A key's last part, or a value that is not empty.
fn is_name(name: &str) -> bool {
    let inside = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    name.len() <= 63
        && name.chars().all(inside)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.ends_with(|c: char| c.is_ascii_alphanumeric())
}

fn is_domain(domain: &str) -> bool {
    let inside = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let label =
        |l: &str| l.starts_with(inside) && l.ends_with(inside) && l.chars().all(|c| inside(c) || c == '-');
    domain.len() <= 253 && domain.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(yaml: &str) -> Result<Selector, Error> {
        Selector::new(&serde_saphyr::from_str(yaml).unwrap())
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    #[test]
    fn every_operator() {
        let prod = labels(&[("env", "prod"), ("tier", "")]);
        for (text, expected) in [
            ("{}", true),
            ("matchLabels: {env: prod}", true),
            ("matchLabels: {env: prod, tier: x}", false),
            ("matchExpressions: [{key: env, operator: In, values: [test, prod]}]", true),
            ("matchExpressions: [{key: none, operator: In, values: ['']}]", false),
            ("matchExpressions: [{key: env, operator: NotIn, values: [prod]}]", false),
            ("matchExpressions: [{key: none, operator: NotIn, values: [prod]}]", true),
            ("matchExpressions: [{key: tier, operator: Exists}]", true),
            ("matchExpressions: [{key: tier, operator: DoesNotExist}]", false),
            ("matchExpressions: [{key: none, operator: DoesNotExist}]", true),
        ] {
            assert_eq!(selector(text).unwrap().matches(&prod), expected, "{text}");
        }
    }

    #[test]
    fn slips_are_refused() {
        for text in ["operator: in, values: [a]", "operator: In", "operator: Exists, values: [a]"] {
            assert!(selector(&format!("matchExpressions: [{{key: k, {text}}}]")).is_err(), "{text}");
        }
        assert_eq!(selector("matchExpressions: [{operator: Exists}]"), Err(Error::NoKey { index: 0 }));
    }

    #[test]
    fn an_unknown_namespace_is_known_by_its_name() {
        let of = |text: &str| selector(text).unwrap().matches_namespace("shop", None);
        assert_eq!(of("{}"), Match::Yes);
        assert_eq!(of("matchLabels: {kubernetes.io/metadata.name: shop}"), Match::Yes);
        assert_eq!(of("matchLabels: {kubernetes.io/metadata.name: x, env: prod}"), Match::No);
        assert_eq!(of("matchLabels: {env: prod}"), Match::Unknown);
        assert_eq!(of("matchExpressions: [{key: env, operator: DoesNotExist}]"), Match::Unknown);
    }

    #[test]
    fn labels_that_cannot_be_are_mistakes() {
        for good in ["a", "k8s.ovn.org/egress-assignable", "A_b.c-9"] {
            assert!(is_key(good), "{good}");
        }
        for bad in ["", "a b", "-a", "a-", "/a", "a/", "A.example/x", "a..b/x", "a/b/c", &"a".repeat(64)] {
            assert!(!is_key(bad), "{bad}");
        }
        let wrong = selector("matchLabels: {'a b': c}").unwrap_err();
        assert_eq!(wrong, Error::Key("a b".to_owned()));
        let wrong =
            selector("matchExpressions: [{key: a, operator: NotIn, values: [b, 'c d']}]").unwrap_err();
        assert!(wrong.to_string().contains("c d"), "{wrong}");
        assert!(selector("matchLabels: {a: ''}").is_ok());
    }
}
