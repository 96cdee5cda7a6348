//! Texts of which a cluster has few and the program holds many: labels, names and UIDs of nodes in port leases. Equal
//! ones share their memory.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::{Deref, Index};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// So many texts are held before those are looked for that nobody uses any more.
const FEW: usize = 1024;

/// A text that shares its memory with those that are equal.
#[derive(Clone, Default)]
pub struct Text(Arc<str>);

/// The texts that are shared, by themselves.
#[expect(clippy::disallowed_types, reason = "looked up, and gone through only to throw out")]
type Texts = std::collections::HashSet<Arc<str>>;

/// All texts, and how many there may be before those are thrown out that are nobody's.
struct Table {
    texts: Texts,
    limit: usize,
}

static TABLE: LazyLock<Mutex<Table>> =
    LazyLock::new(|| Mutex::new(Table { texts: Texts::new(), limit: FEW }));

impl Table {
    fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        if self.texts.len() >= self.limit {
            // Whoever has one can only make more of it, and nobody gets one from here meanwhile.
            self.texts.retain(|t| Arc::strong_count(t) > 1);
            self.limit = (self.texts.len() * 2).max(FEW);
        }
        let new: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&new));
        new
    }
}

impl Text {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        if text.is_empty() {
            return Self::default();
        }
        // A table that somebody panicked over is whole all the same: at worst it lacks a text.
        Self(TABLE.lock().unwrap_or_else(PoisonError::into_inner).get(text))
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl From<&String> for Text {
    fn from(text: &String) -> Self {
        text.as_str().into()
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Text {
    fn borrow(&self) -> &str {
        self
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        // Those that are equal are mostly one.
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl Eq for Text {}

impl PartialOrd for Text {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Text {
    fn cmp(&self, other: &Self) -> Ordering {
        if Arc::ptr_eq(&self.0, &other.0) { Ordering::Equal } else { self.0.cmp(&other.0) }
    }
}

impl Hash for Text {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        **self == *other
    }
}

impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        **self == **other
    }
}

impl PartialEq<String> for Text {
    fn eq(&self, other: &String) -> bool {
        **self == **other
    }
}

impl PartialEq<Text> for String {
    fn eq(&self, other: &Text) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self)
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shared;
        impl Visitor<'_> for Shared {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Text, E> {
                Ok(text.into())
            }
        }
        deserializer.deserialize_str(Shared)
    }
}

impl JsonSchema for Text {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        String::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        String::json_schema(generator)
    }
}

/// Labels of an object: keys in order, each once. A copy shares its memory.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Labels(Arc<[(Text, Text)]>);

impl Labels {
    /// The value of a label.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Text> {
        let at = self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        Some(&self.0[at].1)
    }

    /// Whether there is such a label.
    #[must_use]
    pub fn contains_key(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether there is none at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keys and values, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&Text, &Text)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    /// The same with a label more, or with another value of it.
    #[must_use]
    pub fn with(&self, key: &str, value: &str) -> Self {
        self.iter().map(|(k, v)| (k.clone(), v.clone())).chain([(key.into(), value.into())]).collect()
    }

    /// The same without a label.
    #[must_use]
    pub fn without(&self, key: &str) -> Self {
        self.iter().filter(|(k, _)| **k != *key).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// Of two values of a key the later counts.
impl FromIterator<(Text, Text)> for Labels {
    fn from_iter<I: IntoIterator<Item = (Text, Text)>>(labels: I) -> Self {
        let all: BTreeMap<_, _> = labels.into_iter().collect();
        Self(all.into_iter().collect())
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Labels {
    fn from(labels: [(&str, &str); N]) -> Self {
        labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect()
    }
}

impl Index<&str> for Labels {
    type Output = Text;

    /// # Panics
    /// If there is no such label.
    fn index(&self, key: &str) -> &Text {
        self.get(key).expect("a label that is there")
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl Serialize for Labels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Labels {
    /// `null` is no label, and a value left out (`key:`) the empty text.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = Option::<BTreeMap<Text, Option<Text>>>::deserialize(deserializer)?.unwrap_or_default();
        Ok(Self(all.into_iter().map(|(key, value)| (key, value.unwrap_or_default())).collect()))
    }
}

impl JsonSchema for Labels {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        BTreeMap::<String, String>::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        BTreeMap::<String, String>::json_schema(generator)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_and_nobodys_are_thrown_out() {
        let a: Text = serde_json::from_str("\"eu-central-1\"").unwrap();
        assert!(Arc::ptr_eq(&a.0, &Text::from("eu-central-1".to_owned()).0));
        assert_eq!((&a, a.len()), (&Text::from("eu-central-1"), 12));
        let mut table = Table { texts: Texts::new(), limit: 4 };
        let kept = table.get("kept");
        for n in 0..10_000 {
            table.get(&n.to_string());
        }
        assert!(Arc::ptr_eq(&kept, &table.get("kept")));
        assert!(table.texts.len() <= FEW, "{}", table.texts.len());
        let many: Vec<_> = (0..FEW * 3).map(|n| table.get(&n.to_string())).collect();
        assert!(many.iter().zip(0..).all(|(t, n)| Arc::ptr_eq(t, &table.get(&n.to_string()))));
    }

    #[test]
    fn labels_are_found_by_their_keys() {
        let labels: Labels = serde_json::from_str(r#"{"b": "2", "c": null, "a": "1"}"#).unwrap();
        assert_eq!([&labels["a"], &labels["b"], &labels["c"]].map(Text::as_str), ["1", "2", ""]);
        assert!(labels.get("d").is_none() && !labels.contains_key("ab"));
        assert_eq!(serde_json::to_string(&labels).unwrap(), r#"{"a":"1","b":"2","c":""}"#);
        assert_eq!(labels.with("b", "3")["b"], "3");
        assert_eq!(labels.with("b", "2"), labels);
        assert_eq!(labels.without("b"), Labels::from([("c", ""), ("a", "1")]));
        assert!(serde_json::from_str::<Labels>("null").unwrap().is_empty());
    }
}
