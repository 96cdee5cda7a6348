//! The leader's writes. Each names the version it was planned from where a later one must not be overwritten, and leaves
//! alone what is not Outgate's.

use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, core::ObjectMeta};
use serde::Serialize;
use serde_json::{Value, json};

use super::follow::Scope;
use super::kinds::{Kind, TUNNEL_PORT, TUNNEL_VNI};
use super::trouble::Trouble;
use crate::objects::{Cluster, EgressAllocation, EgressNodeSpec, OUTGATE_API, OVN_API};

/// The name under which the leader writes.
const MANAGER: &str = "outgate-controller";
/// The ConfigMap of what all nodes agree on.
pub(super) const CLUSTER: &str = "outgate-cluster";

/// Writes to the server.
#[derive(Clone)]
pub(super) struct Writer {
    client: Client,
    namespace: String,
    /// Which kinds of k8s.ovn.org have a status of their own, once it is known: OVN-Kubernetes' EgressIP has none.
    own_status: Option<Vec<String>>,
}

/// What has come of a write.
pub(super) enum Done {
    /// The object is this now.
    Now(Box<DynamicObject>),
    /// It has been removed.
    Removed,
    /// There is none, says the server. It says the same of a kind that it does not know, as for a moment when it starts: only
    /// a watch tells that something is gone.
    NotFound,
}

/// What has come of a write.
pub(super) type Outcome = Result<Done, Trouble>;

fn now(object: DynamicObject) -> Done {
    Done::Now(Box::new(object))
}

impl Writer {
    pub(super) fn new(client: Client, namespace: &str) -> Self {
        Self { client, namespace: namespace.to_owned(), own_status: None }
    }

    fn api(&self, kind: Kind) -> Api<DynamicObject> {
        Scope::all(kind).api(self.client.clone())
    }

    /// Reads one object anew.
    pub(super) async fn get(&self, kind: Kind, namespace: &str, name: &str) -> Outcome {
        let scope = Scope::all(kind);
        let scope = if namespace.is_empty() { scope } else { scope.within(namespace) };
        scope
            .api(self.client.clone())
            .get_opt(name)
            .await
            .map(|found| found.map_or(Done::NotFound, now))
            .map_err(|e| Trouble::of(&e, "get"))
    }

    /// An allocation, in place of the one that has this metadata, or as a new one.
    pub(super) async fn allocation(&self, new: &EgressAllocation, old: Option<&ObjectMeta>) -> Outcome {
        let name = &new.metadata.name;
        let metadata = old.map_or_else(|| json!({"name": name}), |old| json!(old));
        let body = json!({
            "apiVersion": OUTGATE_API, "kind": "EgressAllocation", "metadata": metadata, "spec": &new.spec,
        });
        let body = object(body)?;
        let api = self.api(Kind::EgressAllocation);
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        match old {
            // With its resourceVersion: a server takes no other for a custom resource.
            Some(_) => api.replace(name, &params, &body).await,
            None => api.create(&params, &body).await,
        }
        .map(now)
        .map_err(|e| Trouble::of(&e, if old.is_some() { "update" } else { "create" }))
    }

    /// The leader's part of an EgressNode, which is of this version; none: there is no such object.
    pub(super) async fn node_spec(&self, name: &str, spec: &EgressNodeSpec, old: Option<u64>) -> Outcome {
        let api = self.api(Kind::EgressNode);
        let Some(version) = old else {
            let body = json!({
                "apiVersion": OUTGATE_API, "kind": "EgressNode", "metadata": {"name": name}, "spec": spec,
            });
            let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
            return api.create(&params, &object(body)?).await.map(now).map_err(|e| Trouble::of(&e, "create"));
        };
        // All of the spec at once; a patch that sets the version is taken only for that version.
        let patch = json!([
            {"op": "add", "path": "/spec", "value": spec},
            {"op": "replace", "path": "/metadata/resourceVersion", "value": version.to_string()},
        ]);
        let patch: Patch<()> =
            Patch::Json(serde_json::from_value(patch).map_err(|e| Trouble::Refused(e.to_string()))?);
        api.patch(name, &by(MANAGER), &patch).await.map(now).map_err(|e| Trouble::of(&e, "patch"))
    }

    /// Removes an object, if it is this one in this version.
    pub(super) async fn remove(&self, kind: Kind, name: &str, uid: &str, version: Option<u64>) -> Outcome {
        let preconditions =
            Preconditions { uid: Some(uid.to_owned()), resource_version: version.map(|v| v.to_string()) };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match self.api(kind).delete(name, &params).await {
            // It stays for a while if somebody has put a finalizer on it.
            Ok(answer) => {
                let stays = answer.left().filter(|o| {
                    let finalizers = o.metadata.finalizers.as_ref();
                    o.metadata.deletion_timestamp.is_some() && finalizers.is_some_and(|f| !f.is_empty())
                });
                Ok(stays.map_or(Done::Removed, now))
            }
            Err(error) => {
                let trouble = Trouble::of(&error, "delete");
                if trouble == Trouble::Missing { Ok(Done::NotFound) } else { Err(trouble) }
            }
        }
    }

    /// The status of an object of k8s.ovn.org, its other fields left alone. The object may be gone meanwhile.
    pub(super) async fn status(
        &mut self,
        kind: Kind,
        namespace: &str,
        name: &str,
        uid: &str,
        status: &impl Serialize,
    ) -> Outcome {
        let scope = Scope::all(kind);
        let scope = if namespace.is_empty() { scope } else { scope.within(namespace) };
        let api = scope.api(self.client.clone());
        let status = serde_json::to_value(status).map_err(|e| Trouble::Refused(e.to_string()))?;
        let patch = Patch::Merge(status_patch(uid, &status));
        let own = self.has_own_status(kind).await?;
        let mut answer = patch_status(&api, name, &patch, own).await;
        let lost = match &answer {
            Ok(object) => !takes(object, &status),
            Err(error) => Trouble::of(error, "patch") == Trouble::Missing,
        };
        if lost {
            // The definition was replaced by one of the other sort, perhaps.
            self.own_status = None;
            let newly = self.has_own_status(kind).await?;
            if newly != own {
                answer = patch_status(&api, name, &patch, newly).await;
            }
        }
        match answer.map_err(|e| Trouble::of(&e, "patch")) {
            Ok(object) => Ok(now(object)),
            Err(Trouble::Missing) => Ok(Done::NotFound),
            Err(trouble) => Err(trouble),
        }
    }

    /// Whether the status is a resource of its own, as the server tells: OVN-Kubernetes' definition of EgressIP has none,
    /// and there a write to it is refused as unknown, while elsewhere one to the object leaves its status as it was.
    async fn has_own_status(&mut self, kind: Kind) -> Result<bool, Trouble> {
        let wanted = format!("{}/status", kind.resource().plural);
        if self.own_status.is_none() {
            let list =
                self.client.list_api_group_resources(OVN_API).await.map_err(|e| Trouble::of(&e, "get"))?;
            let names = list.resources.into_iter().map(|r| r.name).filter(|n| n.ends_with("/status"));
            self.own_status = Some(names.collect());
        }
        Ok(self.own_status.as_ref().is_some_and(|all| all.contains(&wanted)))
    }

    /// What all nodes agree on, in place of this version or as new.
    pub(super) async fn cluster(&self, cluster: &Cluster, old: Option<u64>) -> Outcome {
        let api = Scope::all(Kind::Cluster).within(&self.namespace).api(self.client.clone());
        let data = json!({
            TUNNEL_PORT: cluster.tunnel.port.to_string(),
            TUNNEL_VNI: cluster.tunnel.vni.to_string(),
        });
        let answer = if let Some(version) = old {
            let patch = json!({"metadata": {"resourceVersion": version.to_string()}, "data": data});
            api.patch(CLUSTER, &by(MANAGER), &Patch::Merge(patch)).await
        } else {
            let new =
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CLUSTER}, "data": data});
            let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
            api.create(&params, &object(new)?).await
        };
        answer.map(now).map_err(|e| Trouble::of(&e, if old.is_some() { "patch" } else { "create" }))
    }
}

async fn patch_status(
    api: &Api<DynamicObject>,
    name: &str,
    patch: &Patch<Value>,
    own: bool,
) -> kube::Result<DynamicObject> {
    if own {
        api.patch_status(name, &by(MANAGER), patch).await
    } else {
        api.patch(name, &by(MANAGER), patch).await
    }
}

/// Whether an object has anything of a status now. Definitions may know only a part of it, and prune the rest.
fn takes(object: &DynamicObject, status: &Value) -> bool {
    let has = object.data.get("status");
    status
        .as_object()
        .is_none_or(|fields| fields.iter().any(|(key, value)| has.and_then(|s| s.get(key)) == Some(value)))
}

fn by(manager: &str) -> PatchParams {
    PatchParams { field_manager: Some(manager.to_owned()), ..PatchParams::default() }
}

fn object(body: Value) -> Result<DynamicObject, Trouble> {
    serde_json::from_value(body).map_err(|e| Trouble::Refused(e.to_string()))
}

/// Sets the status of one object: a merge patch that names its UID is refused for another of its name.
fn status_patch(uid: &str, status: &Value) -> Value {
    if uid.is_empty() {
        json!({"status": status})
    } else {
        json!({"metadata": {"uid": uid}, "status": status})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_of_which_nothing_has_come_was_written_to_the_wrong_place() {
        let object = |status: Value| {
            serde_json::from_value(json!({"metadata": {"name": "e"}, "status": status})).unwrap()
        };
        let status = json!({"items": [{"node": "a"}], "conditions": [1]});
        assert!(
            takes(&object(json!({"items": [{"node": "a"}]})), &status),
            "a definition without conditions"
        );
        assert!(!takes(&object(json!({"items": [{"node": "b"}]})), &status));
        assert!(!takes(&object(Value::Null), &status));
    }

    #[test]
    fn a_status_is_that_of_one_object() {
        assert_eq!(
            status_patch("u", &json!({"items": []})),
            json!({"metadata": {"uid": "u"}, "status": {"items": []}})
        );
        assert_eq!(status_patch("", &json!(1)), json!({"status": 1}));
    }
}
