//! The last look before a node's ports are taken from it. A watch may be behind: a Node that it says is gone may be
//! there, made again from a backup under its UID, or the list may have come from a server's old cache. Whether the very
//! node is there only the server can say, now.

use std::collections::{BTreeMap, BTreeSet};

use kube::api::DynamicObject;

use super::kinds::Kind;
use super::trouble::Trouble;
use super::write::{Done, Writer};
use crate::objects::{EgressAllocation, EgressNode};

/// A node of a lease: its name, and the UID of its Node object.
pub(super) type Lessee = (String, String);

/// The nodes that lose ports which they have not given back, as far as it is known here.
pub(super) fn fenced(
    old: &EgressAllocation,
    new: &EgressAllocation,
    nodes: &BTreeMap<String, EgressNode>,
) -> BTreeSet<Lessee> {
    let mut fenced = BTreeSet::new();
    for lease in &old.spec.leases {
        let kept = new
            .spec
            .leases
            .iter()
            .filter(|l| l.node_uid == lease.node_uid && l.generation == lease.generation)
            .flat_map(|l| &l.ranges)
            .map(|r| r.first..r.first.saturating_add(r.count));
        let status =
            nodes.get(lease.node.as_str()).map(|n| &n.status).filter(|s| s.node_uid == lease.node_uid);
        let returned = status
            .into_iter()
            .flat_map(|s| &s.returned)
            .filter(|r| r.uid == old.metadata.uid)
            .flat_map(|r| &r.ranges)
            .filter(|r| r.generation == lease.generation)
            .map(|r| r.first..r.first.saturating_add(r.count));
        let accounted: Vec<_> = kept.chain(returned).collect();
        let mut granules = lease.ranges.iter().flat_map(|r| r.first..r.first.saturating_add(r.count));
        if granules.any(|g| !accounted.iter().any(|range| range.contains(&g))) {
            fenced.insert((lease.node.to_string(), lease.node_uid.to_string()));
        }
    }
    fenced
}

/// The first of these nodes that is there, with its very UID. An error names the node that could not be asked for.
pub(super) async fn living(
    writer: &Writer,
    nodes: &BTreeSet<Lessee>,
) -> Result<Option<DynamicObject>, (String, Trouble)> {
    for (name, uid) in nodes {
        // Without a resourceVersion a server reads what a majority of its store has, not its own cache:
        // https://kubernetes.io/docs/reference/using-api/api-concepts/#semantics-for-get-and-list
        match writer.get(Kind::Node, "", name).await {
            Ok(Done::Now(node)) if node.metadata.uid.as_ref() == Some(uid) => return Ok(Some(*node)),
            // Every server has Nodes: that there is none of this name it says of the object, not of the kind.
            Ok(_) => {}
            Err(trouble) => return Err((name.clone(), trouble)),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use hyper::{Request, Response};
    use kube::Client;
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    fn allocation(leases: &Value) -> EgressAllocation {
        serde_json::from_value(json!({
            "apiVersion": "outgate.dev/v1alpha1", "kind": "EgressAllocation",
            "metadata": {"name": "192.0.2.1", "uid": "x"},
            "spec": {"egressIP": "192.0.2.1", "leases": leases},
        }))
        .unwrap()
    }

    fn lease(node: &str, generation: u64, first: u16, count: u16) -> Value {
        json!({"node": node, "nodeUID": format!("u{node}"), "generation": generation,
            "ranges": [{"first": first, "count": count}]})
    }

    fn returning(uid: &str, allocation: &str, generation: u64, count: u16) -> BTreeMap<String, EgressNode> {
        let ranges = json!([{"first": 0, "count": count, "generation": generation}]);
        let node = json!({
            "apiVersion": "outgate.dev/v1alpha1", "kind": "EgressNode", "metadata": {"name": "a"},
            "status": {"nodeUID": uid, "returned": [{"egressIP": "192.0.2.1", "uid": allocation, "ranges": ranges}]},
        });
        BTreeMap::from([("a".to_owned(), serde_json::from_value(node).unwrap())])
    }

    #[test]
    fn a_node_is_fenced_that_loses_what_it_has_not_given_back() {
        let old = allocation(&json!([lease("a", 1, 0, 10), lease("b", 2, 10, 10)]));
        let without = allocation(&json!([lease("b", 2, 10, 10)]));
        let fenced = |new: &EgressAllocation, nodes: &BTreeMap<_, _>| {
            fenced(&old, new, nodes).into_iter().map(|(_, uid)| uid).collect::<Vec<_>>()
        };
        let silent = BTreeMap::new();
        assert_eq!(fenced(&old, &silent), [""; 0]);
        assert_eq!(fenced(&without, &silent), ["ua"]);
        assert_eq!(fenced(&allocation(&json!([])), &silent), ["ua", "ub"]);
        let part = allocation(&json!([lease("a", 1, 4, 6), lease("b", 2, 10, 10)]));
        assert_eq!(fenced(&part, &silent), ["ua"]);
        assert_eq!(fenced(&part, &returning("ua", "x", 1, 4)), [""; 0]);
        assert_eq!(fenced(&without, &returning("ua", "x", 1, 10)), [""; 0]);
        assert_eq!(fenced(&without, &returning("ua", "x", 1, 9)), ["ua"]);
        assert_eq!(fenced(&without, &returning("another", "x", 1, 10)), ["ua"], "said by another node");
        assert_eq!(fenced(&without, &returning("ua", "y", 1, 10)), ["ua"], "of another allocation");
        assert_eq!(fenced(&without, &returning("ua", "x", 7, 10)), ["ua"], "of another lease");
        let anew = allocation(&json!([lease("a", 3, 0, 10), lease("b", 2, 10, 10)]));
        assert_eq!(fenced(&anew, &silent), ["ua"], "the same ports, as another lease");
    }

    /// A server that has Node `a`, of UID `ua`, and whose Node `broken` cannot be read.
    fn server() -> Writer {
        let answer = |request: Request<Body>| async move {
            // Any resourceVersion would let the server answer from its cache.
            assert_eq!(request.uri().query().unwrap_or_default(), "");
            let (code, body) = match request.uri().path() {
                "/api/v1/nodes/a" => (
                    200,
                    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a", "uid": "ua", "resourceVersion": "7"}}),
                ),
                "/api/v1/nodes/broken" => {
                    (500, json!({"kind": "Status", "code": 500, "reason": "InternalError", "message": "no"}))
                }
                _ => (404, json!({"kind": "Status", "code": 404, "reason": "NotFound", "message": "none"})),
            };
            let response = Response::builder().status(code).body(Body::from(body.to_string().into_bytes()));
            Ok::<_, Infallible>(response.unwrap())
        };
        Writer::new(Client::new(tower::service_fn(answer), "default"), "outgate-system")
    }

    #[tokio::test]
    async fn a_node_that_the_server_has_is_not_fenced() {
        let server = server();
        let of = |name: &str, uid: &str| BTreeSet::from([(name.to_owned(), uid.to_owned())]);
        let name = |found: Option<DynamicObject>| found.and_then(|n| n.metadata.name);
        assert_eq!(living(&server, &of("a", "ua")).await.map(name), Ok(Some("a".to_owned())));
        assert_eq!(living(&server, &of("a", "older")).await.map(name), Ok(None), "made anew under its name");
        assert_eq!(living(&server, &of("b", "ub")).await.map(name), Ok(None));
        let failed = living(&server, &of("broken", "u")).await;
        assert_eq!(failed.map_err(|(name, _)| name).map(name), Err("broken".to_owned()));
    }
}
