//! Everything that was ever written to a kind of objects, by a watch from the start on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::Value;

use super::KubeApi;
use super::request::path;
use crate::command::{Process, eventually};

/// The history of allocations and of what nodes were granted.
#[derive(Debug)]
pub struct History {
    allocations: Process,
    nodes: Process,
}

impl KubeApi {
    /// Starts to record; the server must not be restarted while it does.
    #[track_caller]
    #[must_use]
    pub fn record_allocations(&self) -> History {
        let watch = |plural| self.watch(&path::outgate(plural));
        History { allocations: watch("egressallocations"), nodes: watch("egressnodes") }
    }
}

impl History {
    /// Waits until the history has these versions of objects, then gives everything that was wrong at any time:
    /// a port of an address with two nodes, or granted to a node without a lease of that node on it.
    #[track_caller]
    #[must_use]
    pub fn conflicts(&self, until: &[String]) -> Vec<String> {
        let complete = eventually(Duration::from_secs(10), || {
            let text = [self.allocations.stdout(), self.nodes.stdout()].concat();
            until
                .iter()
                .all(|version| text.contains(&format!("\"resourceVersion\":\"{version}\"")))
                .then_some(())
        });
        assert!(complete.is_some(), "the history ends before {until:?}");
        let mut events: Vec<Value> = [self.allocations.stdout(), self.nodes.stdout()]
            .iter()
            .flat_map(|text| {
                text.lines()
                    .map(|line| serde_json::from_str(line).expect("an event a line"))
                    .collect::<Vec<_>>()
            })
            .collect();
        // etcd counts the versions of all kinds together.
        events.sort_by_key(|event| version(&event["object"]));
        check(&events)
    }

    /// Every address with every node that owned it at any time; none where nobody did, or its allocation was deleted.
    /// Waits until there is something to tell.
    #[track_caller]
    #[must_use]
    pub fn owners(&self) -> BTreeSet<(String, String)> {
        let told =
            eventually(Duration::from_secs(10), || self.allocations.stdout().contains('\n').then_some(()));
        assert!(told.is_some(), "no allocation was ever there");
        let text = self.allocations.stdout();
        // The last line may be under way.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let events = whole.lines().map(|line| serde_json::from_str(line).expect("an event a line"));
        events
            .map(|event: Value| {
                let spec = &event["object"]["spec"];
                let owner =
                    if event["type"] == "DELETED" { String::new() } else { self::text(&spec["owner"]) };
                (self::text(&spec["egressIP"]), owner)
            })
            .collect()
    }

    /// How many events there are, of allocations and of nodes.
    #[must_use]
    pub fn len(&self) -> (usize, usize) {
        (self.allocations.stdout().lines().count(), self.nodes.stdout().lines().count())
    }
}

fn version(object: &Value) -> u64 {
    let version = object["metadata"]["resourceVersion"].as_str().and_then(|version| version.parse().ok());
    version.unwrap_or_else(|| panic!("no resourceVersion: {object}"))
}

/// Granules by address with its allocation's UID, and by node. An allocation that was deleted and made again is another
/// one: what was granted of the old one is worth nothing at any gateway.
type Ports = BTreeMap<(String, String), BTreeSet<u64>>;

/// An address and its allocation's UID.
fn of(address: &Value, uid: &Value) -> String {
    format!("{} of allocation {}", text(address), text(uid))
}

/// Goes through a history and gives what must not be.
fn check(events: &[Value]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut leased = Ports::new();
    let mut granted = Ports::new();
    let mut ended = BTreeSet::new();
    for event in events {
        let object = &event["object"];
        let gone = event["type"] == "DELETED";
        let at = format!("at version {}", version(object));
        let list = |value: &Value| value.as_array().filter(|_| !gone).cloned().unwrap_or_default();
        if object["kind"] == "EgressAllocation" {
            let address = of(&object["spec"]["egressIP"], &object["metadata"]["uid"]);
            if gone {
                ended.insert(address.clone());
            }
            let mut taken = BTreeMap::<u64, String>::new();
            leased.retain(|(of, _), _| *of != address);
            let resting = list(&object["spec"]["resting"]);
            let given = list(&object["spec"]["leases"]);
            let owners = given
                .iter()
                .map(|lease| (text(&lease["node"]), granules(&lease["ranges"])))
                .chain(resting.iter().map(|range| ("rest".to_owned(), one(range))));
            for (node, ports) in owners {
                for port in &ports {
                    if let Some(other) = taken.insert(*port, node.clone()) {
                        wrong.push(format!("{at}: granule {port} of {address} has {other} and {node}"));
                    }
                }
                if node != "rest" {
                    leased.entry((address.clone(), node)).or_default().extend(ports);
                }
            }
        } else {
            let node = text(&object["metadata"]["name"]);
            granted.retain(|(_, of), _| *of != node);
            for range in list(&object["spec"]["ranges"]) {
                let address = of(&range["egressIP"], &range["uid"]);
                let place = granted.entry((address, node.clone())).or_default();
                place.extend(granules(&range["ranges"]));
            }
        }
        for ((address, node), ports) in &granted {
            for ((other_address, other), theirs) in &granted {
                if address == other_address && node < other && !ports.is_disjoint(theirs) {
                    wrong.push(format!("{at}: {node} and {other} have the same ports of {address}"));
                }
            }
            let own = leased.get(&(address.clone(), node.clone())).cloned().unwrap_or_default();
            // A lease is given up only after the grant: whoever is granted ports has a lease on them.
            if !ports.is_subset(&own)
                && !ended.contains(address)
                && object["kind"] == "EgressNode"
                && text(&object["metadata"]["name"]) == *node
            {
                wrong.push(format!("{at}: {node} is granted ports of {address} without a lease"));
            }
        }
    }
    wrong
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn one(range: &Value) -> BTreeSet<u64> {
    let number = |name: &str| range[name].as_u64().unwrap_or_else(|| panic!("no {name}: {range}"));
    (number("first")..number("first") + number("count")).collect()
}

fn granules(ranges: &Value) -> BTreeSet<u64> {
    ranges.as_array().into_iter().flatten().flat_map(one).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn allocation(version: u64, leases: &Value) -> Value {
        json!({"type": "MODIFIED", "object": {
            "kind": "EgressAllocation",
            "metadata": {"name": "a", "uid": "u", "resourceVersion": version.to_string()},
            "spec": {"egressIP": "192.0.2.1", "leases": leases},
        }})
    }

    fn lease(node: &str, first: u64, count: u64) -> Value {
        json!({"node": node, "ranges": [{"first": first, "count": count}]})
    }

    fn granted(version: u64, node: &str, first: u64, count: u64) -> Value {
        json!({"type": "MODIFIED", "object": {
            "kind": "EgressNode",
            "metadata": {"name": node, "resourceVersion": version.to_string()},
            "spec": {"ranges": [{"egressIP": "192.0.2.1", "uid": "u", "ranges": [{"first": first, "count": count}]}]},
        }})
    }

    #[test]
    fn a_right_history_has_no_conflict() {
        let leases = json!([lease("a", 0, 4), lease("b", 4, 4)]);
        let events = [allocation(1, &leases), granted(2, "a", 0, 4), granted(3, "b", 4, 4)];
        assert_eq!(check(&events), Vec::<String>::new());
    }

    #[test]
    fn each_kind_of_conflict_is_seen() {
        let twice = json!([lease("a", 0, 4), lease("b", 3, 4)]);
        assert_eq!(check(&[allocation(1, &twice)]).len(), 1);
        let leases = json!([lease("a", 0, 4)]);
        let without = [allocation(1, &leases), granted(2, "b", 4, 1)];
        assert_eq!(check(&without).len(), 1);
        let same = [allocation(1, &leases), granted(2, "a", 0, 4), granted(3, "b", 0, 1)];
        assert_eq!(check(&same).len(), 2, "the same ports, and no lease");
    }
}
