//! Label selectors, as Kubernetes defines them.

use std::collections::{BTreeMap, BTreeSet};

use crate::objects::{LabelSelector, NAMESPACE_NAME};

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
        Ok(Self { requirements })
    }

    /// Whether these labels are selected.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.requirements.iter().all(|r| r.holds(labels.get(&r.key)))
    }

    /// Whether a namespace is selected; `labels` is `None` if its object is not known. Every namespace has
    /// its name as a label: the API server sees to that, files written by hand may not.
    #[must_use]
    pub fn matches_namespace(&self, name: &str, labels: Option<&BTreeMap<String, String>>) -> Match {
        let name = name.to_owned();
        let mut outcome = Match::Yes;
        for requirement in &self.requirements {
            let value = labels.and_then(|l| l.get(&requirement.key));
            let value = if requirement.key == NAMESPACE_NAME { value.or(Some(&name)) } else { value };
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
    fn holds(&self, value: Option<&String>) -> bool {
        match &self.demand {
            Demand::In(values) => value.is_some_and(|v| values.contains(v)),
            Demand::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
            Demand::Exists => value.is_some(),
            Demand::DoesNotExist => value.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(yaml: &str) -> Result<Selector, Error> {
        Selector::new(&serde_saphyr::from_str(yaml).unwrap())
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
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
}
