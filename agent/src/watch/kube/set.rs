//! What is known of one watch's objects: which versions, and which of them this process wrote itself.
//!
//! A list counts as a whole: what it lacks is gone once it has ended, and not while its pages come in. What this process
//! wrote stays until the watch has come to it: an older version must not undo it. Pure.

use std::collections::BTreeMap;

use super::kinds::{Key, Seen};

/// One object's newest known version.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Head {
    uid: String,
    version: Option<u64>,
}

/// What is to be done with the objects.
#[derive(Debug)]
pub(super) enum Step {
    /// This is the object now.
    Put(Box<Seen>),
    /// There is none of this name.
    Remove(Key),
}

/// The objects of one watch.
#[derive(Debug, Default)]
pub(super) struct Set {
    heads: BTreeMap<Key, Head>,
    /// What a list that is under way has brought.
    listing: Option<BTreeMap<Key, Seen>>,
    /// Whether a list has been brought to its end.
    listed: bool,
    /// The newest version that the watch has come to.
    horizon: Option<u64>,
    /// UIDs of objects that this process has removed, until the watch says so.
    removed: BTreeMap<Key, String>,
}

impl Set {
    /// Whether every object is known, as of some moment since [`forget_lists`](Self::forget_lists).
    pub(super) fn complete(&self) -> bool {
        self.listed && self.listing.is_none()
    }

    /// Whether a list has been brought to its end since then, whatever has begun after it.
    pub(super) fn is_listed(&self) -> bool {
        self.listed
    }

    /// The next list decides whether the set is complete.
    pub(super) fn forget_lists(&mut self) {
        self.listed = false;
        self.listing = None;
    }

    /// Whether there is such an object.
    #[cfg(test)]
    fn has(&self, key: &Key) -> bool {
        self.heads.contains_key(key)
    }

    /// UID and version of an object.
    pub(super) fn head(&self, key: &Key) -> Option<(&str, Option<u64>)> {
        self.heads.get(key).map(|h| (h.uid.as_str(), h.version))
    }

    /// Forgets everything; which objects that were.
    pub(super) fn clear(&mut self) -> Vec<Key> {
        std::mem::take(self).heads.into_keys().collect()
    }

    /// A list begins.
    pub(super) fn begin(&mut self) {
        self.listing = Some(BTreeMap::new());
    }

    /// A page of it.
    pub(super) fn page(&mut self, seen: Vec<Seen>) {
        if let Some(listing) = &mut self.listing {
            listing.extend(seen.into_iter().map(|s| (s.key.clone(), s)));
        }
    }

    /// The list has ended; it was of this version.
    pub(super) fn end(&mut self, of: Option<u64>) -> Vec<Step> {
        let Some(listing) = self.listing.take() else { return Vec::new() };
        self.listed = true;
        if older(of, self.horizon) {
            // Lists are of the newest version there is: so the server's store was put back to an earlier state. What is
            // there now counts, whatever it is called.
            for head in self.heads.values_mut() {
                head.version = None;
            }
        }
        self.horizon = of;
        let mut steps = Vec::new();
        // Gone is what the list lacks, unless it is younger than the list.
        let gone: Vec<_> = self
            .heads
            .iter()
            .filter(|(key, head)| !listing.contains_key(*key) && !older(of, head.version))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            self.heads.remove(&key);
            steps.push(Step::Remove(key));
        }
        self.removed.retain(|key, uid| listing.get(key).is_some_and(|seen| seen.uid == *uid));
        for (_, seen) in listing {
            steps.extend(self.unless_removed(seen));
        }
        steps
    }

    /// An object is new or has changed, says the watch.
    pub(super) fn put(&mut self, seen: Seen) -> Option<Step> {
        self.horizon = self.horizon.max(seen.version);
        self.unless_removed(seen)
    }

    fn unless_removed(&mut self, seen: Seen) -> Option<Step> {
        if self.removed.get(&seen.key) == Some(&seen.uid) { None } else { self.written(seen) }
    }

    /// An object is new or has changed, says the answer to a request: the watch may not have come to it.
    pub(super) fn written(&mut self, seen: Seen) -> Option<Step> {
        if let Some(head) = self.heads.get(&seen.key)
            && (older(seen.version, head.version)
                || (head.uid == seen.uid && head.version.is_some() && head.version == seen.version))
        {
            return None;
        }
        self.removed.remove(&seen.key);
        self.heads.insert(seen.key.clone(), Head { uid: seen.uid.clone(), version: seen.version });
        Some(Step::Put(Box::new(seen)))
    }

    /// An object is gone, says the watch.
    pub(super) fn gone(&mut self, key: &Key, uid: &str, version: Option<u64>) -> Option<Step> {
        self.horizon = self.horizon.max(version);
        if self.removed.get(key).is_some_and(|removed| removed == uid) {
            self.removed.remove(key);
        }
        let head = self.heads.get(key)?;
        if older(version, head.version) {
            return None;
        }
        self.heads.remove(key);
        Some(Step::Remove(key.clone()))
    }

    /// This process has removed an object.
    pub(super) fn remove(&mut self, key: &Key) -> Option<Step> {
        let head = self.heads.remove(key)?;
        self.removed.insert(key.clone(), head.uid);
        Some(Step::Remove(key.clone()))
    }
}

/// Whether a version is older than one that is known. Versions that are no numbers are taken in the order that they come.
fn older(version: Option<u64>, known: Option<u64>) -> bool {
    matches!((version, known), (Some(version), Some(known)) if version < known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::kube::kinds::Object;

    fn seen(name: &str, uid: &str, version: u64) -> Seen {
        Seen {
            key: key(name),
            uid: uid.into(),
            generation: 1,
            version: Some(version),
            object: Ok(Object::Heartbeat(version.to_string())),
        }
    }

    fn key(name: &str) -> Key {
        (String::new(), name.into())
    }

    fn told(steps: impl IntoIterator<Item = Step>) -> Vec<String> {
        steps
            .into_iter()
            .map(|s| match s {
                Step::Put(s) => format!("{}@{}", s.key.1, s.version.unwrap_or_default()),
                Step::Remove(k) => format!("-{}", k.1),
            })
            .collect()
    }

    fn list(set: &mut Set, objects: Vec<Seen>, of: u64) -> Vec<String> {
        set.begin();
        set.page(objects);
        told(set.end(Some(of)))
    }

    #[test]
    fn a_list_counts_as_a_whole() {
        let mut set = Set::default();
        assert!(!set.complete());
        set.begin();
        set.page(vec![seen("a", "1", 3), seen("b", "2", 4)]);
        assert!(!set.complete());
        assert_eq!(told(set.end(Some(5))), ["a@3", "b@4"]);
        assert!(set.complete());
        set.begin();
        assert!(!set.complete(), "in the middle of a list something may be missing");
        assert!(set.has(&key("a")), "but nothing is gone");
        set.page(vec![seen("b", "2", 4)]);
        // An interrupted list begins again.
        set.begin();
        set.page(vec![seen("b", "2", 6), seen("c", "3", 7)]);
        assert_eq!(told(set.end(Some(8))), ["-a", "b@6", "c@7"]);
        assert!(set.complete());
        set.forget_lists();
        assert!(!set.complete() && set.has(&key("b")));
    }

    #[test]
    fn what_comes_late_undoes_nothing() {
        let mut set = Set::default();
        list(&mut set, vec![seen("a", "1", 3)], 3);
        assert_eq!(told(set.written(seen("a", "1", 10))), ["a@10"]);
        assert_eq!(told(set.put(seen("a", "1", 7))), Vec::<String>::new());
        assert_eq!(told(set.gone(&key("a"), "1", Some(9))), Vec::<String>::new());
        assert_eq!(told(set.put(seen("a", "1", 10))), Vec::<String>::new(), "the same again");
        assert_eq!(told(set.put(seen("a", "1", 11))), ["a@11"]);
        assert_eq!(told(set.gone(&key("a"), "1", Some(12))), ["-a"]);
    }

    #[test]
    fn a_list_older_than_a_write_neither_undoes_nor_loses_it() {
        let mut set = Set::default();
        list(&mut set, vec![seen("a", "1", 3)], 3);
        set.begin();
        set.page(vec![seen("a", "1", 3)]);
        set.written(seen("a", "1", 10));
        set.written(seen("b", "2", 11));
        assert_eq!(told(set.end(Some(9))), Vec::<String>::new());
        assert_eq!(set.head(&key("a")), Some(("1", Some(10))));
        assert!(set.has(&key("b")));
        // A list that is younger than the write knows better.
        assert_eq!(list(&mut set, vec![seen("a", "1", 10)], 12), ["-b"]);
    }

    #[test]
    fn what_was_removed_does_not_come_back_by_an_old_word() {
        let mut set = Set::default();
        list(&mut set, vec![seen("a", "1", 3)], 3);
        assert_eq!(told(set.remove(&key("a"))), ["-a"]);
        assert_eq!(told(set.put(seen("a", "1", 4))), Vec::<String>::new());
        assert_eq!(list(&mut set, vec![seen("a", "1", 4)], 4), Vec::<String>::new());
        // A request's answer knows better: somebody's finalizer keeps it.
        assert_eq!(told(set.written(seen("a", "1", 6))), ["a@6"]);
        assert_eq!(told(set.remove(&key("a"))), ["-a"]);
        // Another object of the name is another object, before and after the removal is heard of.
        assert_eq!(told(set.put(seen("a", "2", 9))), ["a@9"]);
        assert_eq!(told(set.gone(&key("a"), "1", Some(5))), Vec::<String>::new());
        assert!(set.has(&key("a")));
    }

    #[test]
    fn a_store_that_was_put_back_is_believed() {
        let mut set = Set::default();
        list(&mut set, vec![seen("a", "1", 90), seen("b", "2", 95)], 100);
        set.put(seen("a", "1", 110));
        assert_eq!(list(&mut set, vec![seen("a", "1", 40)], 50), ["-b", "a@40"]);
        assert_eq!(told(set.put(seen("a", "1", 51))), ["a@51"]);
    }

    #[test]
    fn versions_that_are_no_numbers_are_taken_as_they_come() {
        let mut set = Set::default();
        let odd = |name: &str| Seen { version: None, ..seen(name, "1", 0) };
        set.begin();
        set.page(vec![odd("a")]);
        assert_eq!(set.end(None).len(), 1);
        assert!(set.put(odd("a")).is_some());
        assert_eq!(told(set.gone(&key("a"), "1", None)), ["-a"]);
    }
}
