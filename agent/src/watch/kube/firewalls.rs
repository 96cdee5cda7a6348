//! The EgressFirewalls of an agent's own pods. A cluster has one in each of thousands of namespaces, with thousands of rules:
//! an agent watches the metadata of all, and gets those whole whose namespaces have pods on its node.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kube::api::DynamicObject;
use kube::{Api, Client};
use tokio::sync::mpsc;

use super::client::Connection;
use super::follow::{Scope, jitter};
use super::kinds::{Key, Kind, Seen};
use super::trouble::{self, Trouble};
use super::{Note, Task};
use crate::watch::Problem;

/// What its problems are noted as.
pub(super) const NOTE: &str = "EgressFirewalls";
/// The first wait after a failure, and the longest.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(400), Duration::from_secs(10));

/// Which spec of an object.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Version {
    uid: String,
    generation: i64,
    resource: Option<u64>,
}

impl Version {
    fn of(seen: &Seen) -> Self {
        Self { uid: seen.uid.clone(), generation: seen.generation, resource: seen.version }
    }

    /// Whether this may have another spec than what was got before. A status changes the version and not the generation;
    /// what was got may be newer than what the watch has come to.
    fn differs_from(&self, got: &Self) -> bool {
        let newer = !matches!((self.resource, got.resource), (Some(known), Some(got)) if known <= got);
        newer && (&self.uid, self.generation) != (&got.uid, got.generation)
    }
}

/// What is known of all, and what is got of some.
#[derive(Default)]
pub(super) struct Firewalls {
    known: BTreeMap<Key, Version>,
    got: BTreeMap<Key, Version>,
    getting: BTreeMap<Key, Task>,
}

/// What there is to do about the objects.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Errands {
    /// To be got.
    pub(super) get: Vec<Key>,
    /// There is none, or none that concerns the node.
    pub(super) drop: Vec<Key>,
}

impl Firewalls {
    /// The watch shows an object's metadata.
    pub(super) fn note(&mut self, seen: &Seen) {
        self.known.insert(seen.key.clone(), Version::of(seen));
    }

    /// The watch says that an object is gone.
    pub(super) fn forget(&mut self, key: &Key) {
        self.known.remove(key);
    }

    /// An object has been got.
    pub(super) fn got(&mut self, seen: &Seen) {
        self.getting.remove(&seen.key);
        self.got.insert(seen.key.clone(), Version::of(seen));
    }

    /// Whether some object is needed that was never got.
    pub(super) fn is_complete(&self, namespaces: &BTreeSet<&str>) -> bool {
        self.known.keys().all(|key| !namespaces.contains(key.0.as_str()) || self.got.contains_key(key))
    }

    /// What there is to do, with pods in these namespaces.
    pub(super) fn errands(&mut self, namespaces: &BTreeSet<&str>) -> Errands {
        let wanted = |key: &Key| namespaces.contains(key.0.as_str());
        let known = &self.known;
        let gone: Vec<_> =
            self.got.keys().filter(|key| !known.contains_key(*key) || !wanted(key)).cloned().collect();
        for key in &gone {
            self.got.remove(key);
        }
        self.getting.retain(|key, _| known.contains_key(key) && wanted(key));
        let get = known
            .iter()
            .filter(|(key, version)| {
                wanted(key) && self.got.get(*key).is_none_or(|got| version.differs_from(got))
            })
            .map(|(key, _)| key.clone())
            .filter(|key| !self.getting.contains_key(key))
            .collect();
        Errands { get, drop: gone }
    }

    /// Gets an object in the background.
    pub(super) fn fetch(
        &mut self,
        key: &Key,
        connection: &Connection,
        got: &mpsc::UnboundedSender<Got>,
        notes: &mpsc::UnboundedSender<Note>,
    ) {
        let task = fetch(connection.clone(), key.clone(), got.clone(), notes.clone());
        self.getting.insert(key.clone(), Task::spawn(task));
    }
}

/// An object that was got.
pub(super) type Got = (Key, DynamicObject);

async fn fetch(
    connection: Connection,
    key: Key,
    got: mpsc::UnboundedSender<Got>,
    notes: mpsc::UnboundedSender<Note>,
) {
    let api = api(connection.client.clone(), &key.0);
    let mut patience = PATIENCE.0;
    loop {
        let answer = api.get_opt(&key.1).await.map_err(|e| Trouble::of(&e, "get"));
        let problem = answer.as_ref().err().map(|t| {
            let what = format!("EgressFirewall {}/{}", key.0, key.1);
            Problem::new(&what, trouble::request(t, &what, "get", Kind::EgressFirewall, &connection))
        });
        // Nobody listens any more: the task ends with who started it.
        let away = answer.as_ref().err().is_some_and(Trouble::is_away);
        let _ = notes.send(Note { about: NOTE, problem, away });
        // None is not gone: a server that starts knows of none. The watch tells, and ends this task.
        if let Ok(Some(object)) = answer {
            let _ = got.send((key, object));
            return;
        }
        tokio::time::sleep(jitter(patience)).await;
        patience = (patience * 2).min(PATIENCE.1);
    }
}

fn api(client: Client, namespace: &str) -> Api<DynamicObject> {
    Scope::all(Kind::EgressFirewall).within(namespace).api(client)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::kube::kinds::Object;

    fn seen(namespace: &str, uid: &str, generation: i64, version: u64) -> Seen {
        Seen {
            key: key(namespace),
            uid: uid.into(),
            generation,
            version: Some(version),
            object: Ok(Object::Heartbeat(String::new())),
        }
    }

    fn key(namespace: &str) -> Key {
        (namespace.into(), "default".into())
    }

    fn get(f: &mut Firewalls, namespaces: &[&str]) -> Vec<String> {
        f.errands(&namespaces.iter().copied().collect()).get.into_iter().map(|k| k.0).collect()
    }

    #[test]
    fn only_those_with_pods_are_got_and_only_when_their_spec_differs() {
        let mut f = Firewalls::default();
        f.note(&seen("shop", "1", 1, 5));
        f.note(&seen("bank", "2", 1, 6));
        assert_eq!(get(&mut f, &["shop", "empty"]), ["shop"]);
        assert!(!f.is_complete(&BTreeSet::from(["shop"])) && f.is_complete(&BTreeSet::from(["empty"])));
        f.got(&seen("shop", "1", 1, 5));
        assert!(f.is_complete(&BTreeSet::from(["shop"])));
        assert!(get(&mut f, &["shop"]).is_empty());
        // Its status was written.
        f.note(&seen("shop", "1", 1, 8));
        assert!(get(&mut f, &["shop"]).is_empty());
        f.note(&seen("shop", "1", 2, 9));
        assert_eq!(get(&mut f, &["shop"]), ["shop"]);
        assert!(f.is_complete(&BTreeSet::from(["shop"])), "the version before is there");
        // What was got is newer than the watch, and then another object of the name.
        f.got(&seen("shop", "1", 3, 12));
        assert!(get(&mut f, &["shop"]).is_empty());
        f.note(&seen("shop", "3", 1, 14));
        assert_eq!(get(&mut f, &["shop"]), ["shop"]);
    }

    #[test]
    fn what_has_no_pods_any_more_or_is_gone_is_dropped() {
        let mut f = Firewalls::default();
        for name in ["a", "b"] {
            f.note(&seen(name, name, 1, 1));
            f.got(&seen(name, name, 1, 1));
        }
        f.forget(&key("a"));
        assert_eq!(f.errands(&BTreeSet::from(["a", "b"])), Errands { get: vec![], drop: vec![key("a")] });
        assert_eq!(f.errands(&BTreeSet::new()), Errands { get: vec![], drop: vec![key("b")] });
        assert_eq!(get(&mut f, &["b"]), ["b"], "pods again");
    }
}
