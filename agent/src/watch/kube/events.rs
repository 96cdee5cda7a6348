//! Events: what `kubectl describe` shows of an object. They are news for people, so they are few, and one that cannot be
//! written is forgotten.

use std::collections::BTreeMap;
use std::time::Duration;

use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::debug;

use crate::agent::random;
use crate::objects::{OUTGATE_API, OVN_API};
use crate::watch::Event;

/// The same is not said again for so long.
const AGAIN: Duration = Duration::from_mins(10);
/// At most so many a minute.
const RATE: usize = 60;
/// Waiting ones; further ones are dropped.
pub(super) const QUEUE: usize = 256;
/// A note's length that servers take (`NoteLengthLimit`, kubernetes pkg/apis/core/validation/events.go).
const NOTE: usize = 1024;

/// What has been said lately.
#[derive(Debug, Default)]
struct Lately {
    said: BTreeMap<Event, Instant>,
}

impl Lately {
    /// Whether to say it now.
    fn admits(&mut self, event: &Event, now: Instant) -> bool {
        self.said.retain(|_, at| now.duration_since(*at) < AGAIN);
        let minute =
            self.said.values().filter(|at| now.duration_since(**at) < Duration::from_mins(1)).count();
        if minute >= RATE || self.said.contains_key(event) {
            return false;
        }
        self.said.insert(event.clone(), now);
        true
    }
}

/// Writes events, each with the UID of its object, until there are no more.
pub(super) async fn record(client: Client, instance: String, mut events: mpsc::Receiver<(Event, String)>) {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Event"));
    let mut lately = Lately::default();
    while let Some((event, uid)) = events.recv().await {
        if !lately.admits(&event, Instant::now()) {
            debug!("not written as an event: {}: {}", event.about, event.message);
            continue;
        }
        let body = body(&event, &uid, &instance, &jiff::Timestamp::now(), random());
        let namespace = body["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &namespace, &resource);
        match serde_json::from_value(body) {
            Ok(object) => {
                if let Err(error) = api.create(&PostParams::default(), &object).await {
                    debug!("event not written: {error}");
                }
            }
            Err(error) => debug!("event not written: {error}"),
        }
    }
}

fn body(event: &Event, uid: &str, instance: &str, now: &jiff::Timestamp, unique: u64) -> Value {
    let about = &event.about;
    // Events of what is in no namespace are in this one, as the API server demands.
    let namespace = if about.namespace.is_empty() { "default" } else { &about.namespace };
    let version = match about.kind {
        "EgressIP" | "EgressFirewall" => OVN_API,
        "Node" | "Pod" | "Namespace" => "v1",
        _ => OUTGATE_API,
    };
    let mut regarding = json!({"apiVersion": version, "kind": about.kind, "name": about.name});
    if !about.namespace.is_empty() {
        regarding["namespace"] = json!(about.namespace);
    }
    if !uid.is_empty() {
        regarding["uid"] = json!(uid);
    }
    let mut note = event.message.clone();
    if note.len() > NOTE {
        let end = (0..=NOTE - 3).rev().find(|i| note.is_char_boundary(*i)).unwrap_or(0);
        note.truncate(end);
        note.push('…');
    }
    // The older form of events: in the newer one, servers up to 1.20 take those of objects in no namespace only in
    // kube-system (`legacyValidateEvent`, kubernetes pkg/apis/core/validation/events.go), where nobody looks.
    let time = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": namespace, "name": format!("{}.{unique:016x}", about.name.replace(':', "-"))},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": "outgate-controller"},
        "reportingComponent": "outgate.dev/controller",
        "reportingInstance": instance,
        "action": event.reason,
        "reason": event.reason,
        "involvedObject": regarding,
        "message": note,
        "type": if event.warning { "Warning" } else { "Normal" },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::ObjectName;

    fn event(namespace: &str, message: String) -> Event {
        let about = ObjectName { kind: "EgressIP", namespace: namespace.into(), name: "e".into() };
        Event { about, reason: "Assigned".into(), message, warning: false }
    }

    #[test]
    fn the_same_is_said_once_and_not_too_much_a_minute() {
        let mut lately = Lately::default();
        let now = Instant::now();
        assert!(lately.admits(&event("", "a".into()), now));
        assert!(!lately.admits(&event("", "a".into()), now + Duration::from_secs(599)));
        assert!(lately.admits(&event("", "a".into()), now + Duration::from_secs(601)));
        let admitted =
            (0..200).filter(|i| lately.admits(&event("", i.to_string()), now + Duration::from_secs(700)));
        assert_eq!(admitted.count(), RATE);
        assert!(lately.admits(&event("", "b".into()), now + Duration::from_secs(761)));
    }

    #[test]
    fn what_is_in_no_namespace_has_its_events_in_the_default_one() {
        let now = "2026-01-02T03:04:05Z".parse().unwrap();
        let b = body(&event("", "x".into()), "u", "i", &now, 1);
        assert_eq!(
            (&b["metadata"]["namespace"], &b["involvedObject"]["uid"]),
            (&json!("default"), &json!("u"))
        );
        assert_eq!(b["involvedObject"].get("namespace"), None);
        assert_eq!(body(&event("shop", "x".into()), "", "i", &now, 1)["metadata"]["namespace"], "shop");
        let long = body(&event("", "ä".repeat(1000)), "", "i", &now, 1);
        assert!(long["message"].as_str().unwrap().len() <= NOTE);
    }
}
