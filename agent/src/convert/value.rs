//! YAML and JSON as it stands in a file: every value with its line.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Located {
    /// The line in the text that it was read from, counted from 1.
    pub(super) line: usize,
    /// The value.
    pub(super) value: Value,
}

/// A value.
#[derive(Clone, Debug)]
pub(super) enum Value {
    /// `null`, or nothing after the colon.
    Null,
    /// A text, or a number or truth value as it stands.
    Text(String),
    /// A list.
    List(Vec<Located>),
    /// A map; of keys that stand twice the last one counts.
    Map(BTreeMap<String, Located>),
}

impl Located {
    /// A field of a map, if it is there and not `null`.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(fields) => fields.get(key).filter(|field| !matches!(field.value, Value::Null)),
            Value::Null | Value::Text(_) | Value::List(_) => None,
        }
    }

    /// A text field of a map; empty texts count as absent.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Self::as_text).filter(|text| !text.is_empty())
    }

    /// The text that it is.
    pub(super) fn as_text(&self) -> Option<&str> {
        if let Value::Text(text) = &self.value { Some(text) } else { None }
    }

    /// A list field of a map; nothing if it is absent.
    pub(super) fn list(&self, key: &str) -> Result<&[Self], (usize, String)> {
        match self.get(key) {
            None => Ok(&[]),
            Some(Self { value: Value::List(items), .. }) => Ok(items),
            Some(other) => Err((other.line, format!("{key} is not a list"))),
        }
    }

    /// Its lines, counted from `first` instead of 1.
    pub(super) fn moved(mut self, first: usize) -> Self {
        self.line += first - 1;
        self.value = match self.value {
            Value::List(items) => Value::List(items.into_iter().map(|item| item.moved(first)).collect()),
            Value::Map(fields) => {
                Value::Map(fields.into_iter().map(|(key, field)| (key, field.moved(first))).collect())
            }
            plain @ (Value::Null | Value::Text(_)) => plain,
        };
        self
    }
}

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(d)?;
        let line = usize::try_from(spanned.defined.line()).unwrap_or(1);
        Ok(Self { line: line.max(1), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Read)
    }
}

struct Read;

impl<'de> Visitor<'de> for Read {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        Value::deserialize(d)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some((key, field)) = fields.next_entry()? {
            map.insert(key, field);
        }
        Ok(Value::Map(map))
    }
}
