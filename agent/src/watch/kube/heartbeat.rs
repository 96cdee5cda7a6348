//! Signs of life: the agent of a node that may own egress IPs renews a Lease named after the node; the leader judges by
//! whether it does. Nobody's clock is compared with another's: what counts is that the time in the Lease changes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::Note;
use super::client::Connection;
use super::follow::{Scope, jitter};
use super::kinds::Kind;
use super::trouble::{self, Trouble};
use crate::watch::Problem;

/// How often a Lease is renewed.
const RENEW: Duration = Duration::from_secs(10);
/// A node whose Lease was not renewed for so long is taken for dead.
const DEAD: Duration = Duration::from_secs(40);
/// If nothing at all has been heard for longer than this, it may be this end that was cut off.
const SILENCE: Duration = Duration::from_secs(20);
/// The label of these Leases.
pub(super) const LABEL: &str = "outgate.dev/heartbeat";

/// Who is alive, as far as one end of a watch can know.
///
/// Time passes for the judgement only while something is heard on the watch, be it of other nodes: a leader that has
/// lost the server, or whose connection hangs, has nobody die of it.
#[derive(Debug, Default)]
pub(super) struct Judge {
    /// The renewal that was last seen of each, and when.
    renewals: BTreeMap<String, (String, Instant)>,
    /// When anything was last heard.
    heard: Option<Instant>,
    alive: BTreeSet<String>,
}

impl Judge {
    /// Something was heard, and the Leases are now these, with their last renewals. Whether a judgement has changed.
    pub(super) fn hear(&mut self, leases: &BTreeMap<String, String>, now: Instant) -> bool {
        if self.heard.is_none_or(|heard| now.duration_since(heard) > SILENCE) {
            for (_, since) in self.renewals.values_mut() {
                *since = now;
            }
        }
        self.heard = Some(now);
        self.renewals.retain(|node, _| leases.contains_key(node));
        for (node, renewal) in leases {
            match self.renewals.get_mut(node) {
                Some((known, _)) if known == renewal => {}
                Some(entry) => *entry = (renewal.clone(), now),
                None => drop(self.renewals.insert(node.clone(), (renewal.clone(), now))),
            }
        }
        let alive: BTreeSet<_> = self
            .renewals
            .iter()
            .filter(|(_, (_, since))| now.duration_since(*since) <= DEAD)
            .map(|(node, _)| node.clone())
            .collect();
        let changed = alive != self.alive;
        self.alive = alive;
        changed
    }

    /// Whether a node is alive.
    pub(super) fn is_alive(&self, node: &str) -> bool {
        self.alive.contains(node)
    }
}

/// Renews a node's Lease for as long as its Node object has the label; `wanted` has the object's UID then.
pub(super) async fn renew(
    connection: Connection,
    client: Client,
    namespace: String,
    node: String,
    mut wanted: watch::Receiver<Option<String>>,
    notes: mpsc::UnboundedSender<Note>,
) {
    let api = Scope::all(Kind::Heartbeat).within(&namespace).api(client);
    loop {
        let uid = wanted.borrow_and_update().clone();
        let pause = match uid {
            None => None,
            Some(uid) => {
                let trouble = beat(&api, &node, &uid).await.err();
                let problem = trouble.as_ref().map(|t| {
                    let what = format!("Lease {namespace}/{node}");
                    let text = trouble::request(t, &what, "patch", Kind::Heartbeat, &connection);
                    Problem::new("this node's heartbeat", text)
                });
                let failed = problem.is_some();
                let away = trouble.as_ref().is_some_and(Trouble::is_away);
                if notes.send(Note { about: "heartbeat", problem, away }).is_err() {
                    return;
                }
                Some(if failed { jitter(RENEW / 4) } else { RENEW })
            }
        };
        let changed = async {
            match pause {
                Some(pause) => tokio::time::timeout(pause, wanted.changed()).await.unwrap_or(Ok(())),
                None => wanted.changed().await,
            }
        };
        if changed.await.is_err() {
            return;
        }
    }
}

async fn beat(api: &Api<DynamicObject>, node: &str, uid: &str) -> Result<(), Trouble> {
    let body = lease(node, uid, &jiff::Timestamp::now());
    let params = PatchParams { field_manager: Some("outgate-agent".to_owned()), ..PatchParams::default() };
    match api.patch(node, &params, &Patch::Merge(&body)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let new = serde_json::from_value(body).map_err(|e| Trouble::Refused(e.to_string()))?;
            api.create(&PostParams::default(), &new).await.map(drop).map_err(|e| Trouble::of(&e, "create"))
        }
        Err(error) => Err(Trouble::of(&error, "patch")),
    }
}

fn lease(node: &str, uid: &str, now: &jiff::Timestamp) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": node,
            "labels": {LABEL: ""},
            // With its Node it goes.
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}],
        },
        "spec": {
            "holderIdentity": node,
            "leaseDurationSeconds": DEAD.as_secs(),
            // Six digits: a MicroTime's format, which servers insist on (apimachinery/pkg/apis/meta/v1/micro_time.go).
            "renewTime": format!("{now:.6}"),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct World {
        judge: Judge,
        start: Instant,
        leases: BTreeMap<String, String>,
    }

    impl World {
        fn new() -> Self {
            Self { judge: Judge::default(), start: Instant::now(), leases: BTreeMap::new() }
        }

        /// At this second, these nodes renew; who is alive then.
        fn at(&mut self, second: u64, renew: &[&str]) -> Vec<&str> {
            for node in renew {
                self.leases.insert((*node).to_owned(), second.to_string());
            }
            self.judge.hear(&self.leases, self.start + Duration::from_secs(second));
            self.judge.alive.iter().map(String::as_str).collect()
        }
    }

    #[test]
    fn a_node_that_renews_lives_and_one_that_does_not_dies() {
        let mut w = World::new();
        assert_eq!(w.at(0, &["a", "b"]), ["a", "b"]);
        for second in [10, 20, 30, 40] {
            assert_eq!(w.at(second, &["a"]), ["a", "b"], "{second}");
        }
        assert_eq!(w.at(50, &["a"]), ["a"]);
        assert!(w.judge.is_alive("a") && !w.judge.is_alive("b") && !w.judge.is_alive("c"));
        assert_eq!(w.at(60, &["a", "b"]), ["a", "b"]);
    }

    #[test]
    fn who_just_started_to_listen_gives_everybody_time() {
        let mut w = World::new();
        w.leases.insert("b".to_owned(), "long ago".to_owned());
        assert_eq!(w.at(0, &["a"]), ["a", "b"]);
        for second in [10, 20, 30, 40] {
            w.at(second, &["a"]);
        }
        assert_eq!(w.at(50, &["a"]), ["a"]);
    }

    #[test]
    fn nobody_dies_of_the_listeners_own_silence() {
        let mut w = World::new();
        w.at(0, &["a", "b"]);
        // Cut off for ten minutes; the first word after that is of one node only.
        assert_eq!(w.at(600, &["a"]), ["a", "b"]);
        assert_eq!(w.at(615, &["a"]), ["a", "b"]);
        // Cut off again and again.
        assert_eq!(w.at(640, &["a"]), ["a", "b"]);
        for second in [650, 660, 670, 680] {
            assert_eq!(w.at(second, &["a"]), ["a", "b"], "{second}");
        }
        assert_eq!(w.at(681, &["a"]), ["a"], "it was given time, and not more");
    }

    #[test]
    fn bookmarks_count_as_heard_and_a_lease_that_is_gone_is_nobodys() {
        let mut w = World::new();
        w.at(0, &["a"]);
        for second in [15, 30, 45] {
            w.at(second, &[]);
        }
        assert!(!w.judge.is_alive("a"));
        w.at(46, &["a"]);
        w.leases.clear();
        assert!(w.at(47, &[]).is_empty());
    }

    #[test]
    fn a_time_has_six_digits() {
        let at: jiff::Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        assert_eq!(lease("a", "u", &at)["spec"]["renewTime"], "2026-01-02T03:04:05.000000Z");
    }
}
