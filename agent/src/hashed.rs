//! A table that is looked up and never gone through, so that its random order shows nowhere. For names of nodes, of which
//! a plan looks up hundreds of thousands: they begin alike, and a tree compares them to the end at every step.

#![expect(clippy::disallowed_types, reason = "nothing here gives out the order")]

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Index;

/// A table by key.
#[derive(Debug)]
pub(crate) struct Hashed<K, V>(HashMap<K, V>);

impl<K: Eq + Hash, V> Hashed<K, V> {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self(HashMap::new())
    }

    /// What there is of a key.
    pub(crate) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.0.get(key)
    }

    /// Puts in a value, in place of the one before.
    pub(crate) fn insert(&mut self, key: K, value: V) {
        self.0.insert(key, value);
    }

    /// The value of a key, made if there is none.
    pub(crate) fn or_default(&mut self, key: K) -> &mut V
    where
        V: Default,
    {
        self.0.entry(key).or_default()
    }
}

impl<K: Eq + Hash + Borrow<Q>, Q: Eq + Hash + ?Sized, V> Index<&Q> for Hashed<K, V> {
    type Output = V;

    /// # Panics
    /// If there is no such key.
    fn index(&self, key: &Q) -> &V {
        &self.0[key]
    }
}

/// Of two values of a key the later counts.
impl<K: Eq + Hash, V> FromIterator<(K, V)> for Hashed<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(all: I) -> Self {
        Self(all.into_iter().collect())
    }
}
