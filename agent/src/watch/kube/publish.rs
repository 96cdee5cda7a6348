//! What an agent says of its node goes to the server behind its back: an API server that is slow or away must not keep a
//! node's agent from what its kernel needs. The newest word counts; those between need not be sent.

use std::time::Duration;

use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{mpsc, watch};

use super::Note;
use super::client::Connection;
use super::follow::{Scope, jitter};
use super::kinds::Kind;
use super::trouble::{self, Trouble};
use crate::objects::{EgressNodeStatus, OUTGATE_API};
use crate::watch::Problem;

/// After a write, changes are gathered for this long.
const GATHER: Duration = Duration::from_millis(100);
/// The first wait after a failure, and the longest.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Writes whatever status is there last, until nobody says any more.
pub(super) async fn publish(
    connection: Connection,
    client: Client,
    node: String,
    mut said: watch::Receiver<Option<EgressNodeStatus>>,
    notes: mpsc::UnboundedSender<Note>,
) {
    let api = Scope::all(Kind::EgressNode).api(client);
    let mut patience = PATIENCE.0;
    let mut before = None;
    while said.changed().await.is_ok() {
        loop {
            let Some(status) = said.borrow_and_update().clone() else { break };
            let trouble = write(&api, &node, &status).await.err();
            let problem = trouble::lasting(trouble.as_ref(), before.as_ref()).map(|t| {
                let what = format!("the status of EgressNode {node}");
                let text = trouble::request(t, &what, "patch", Kind::EgressNode, &connection);
                Problem::new("this node's EgressNode", text)
            });
            let away = trouble.as_ref().is_some_and(Trouble::is_away);
            if notes.send(Note { about: "EgressNode", problem, away }).is_err() {
                return;
            }
            before = trouble;
            if before.is_none() {
                patience = PATIENCE.0;
                break;
            }
            tokio::time::sleep(jitter(patience)).await;
            patience = (patience * 2).min(PATIENCE.1);
        }
        tokio::time::sleep(GATHER).await;
    }
}

async fn write(api: &Api<DynamicObject>, node: &str, status: &EgressNodeStatus) -> Result<(), Trouble> {
    let refused = |error: serde_json::Error| Trouble::Refused(error.to_string());
    // The whole status is set at once; a merge would leave what is not there any more.
    let patch = json!([{"op": "add", "path": "/status", "value": status}]);
    let patch: Patch<()> = Patch::Json(serde_json::from_value(patch).map_err(refused)?);
    let params = PatchParams { field_manager: Some("outgate-agent".to_owned()), ..PatchParams::default() };
    match api.patch_status(node, &params, &patch).await {
        Ok(_) => return Ok(()),
        Err(kube::Error::Api(answer)) if answer.code == 404 => {}
        Err(error) => return Err(Trouble::of(&error, "patch")),
    }
    let new =
        json!({"apiVersion": OUTGATE_API, "kind": "EgressNode", "metadata": {"name": node}, "spec": {}});
    let new = serde_json::from_value(new).map_err(refused)?;
    match api.create(&PostParams::default(), &new).await {
        Err(kube::Error::Api(answer)) if answer.code == 409 => {}
        Err(error) => return Err(Trouble::of(&error, "create")),
        Ok(_) => {}
    }
    api.patch_status(node, &params, &patch).await.map(drop).map_err(|e| Trouble::of(&e, "patch"))
}
