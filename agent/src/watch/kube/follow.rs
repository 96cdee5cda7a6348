//! One watch: lists, then follows the changes, for ever. What goes wrong is said, and tried again.
//!
//! kube-runtime has the same in `watcher`. It is written out here because that one keeps two things to itself: the
//! version that a list was of, by which a write is told from what the list is too old for; and that a broken watch
//! is up again, which is news even if nothing has changed.

use std::time::{Duration, SystemTime};

use futures_util::stream::{BoxStream, StreamExt as _};
use kube::api::{DynamicObject, ListMeta, ListParams, WatchEvent, WatchParams};
use kube::core::{PartialObjectMeta, Request};
use kube::{Api, Client};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::kinds::{Key, Kind, Seen, read, version};
use super::trouble::Trouble;
use crate::agent::random;
use crate::status::rfc3339;

/// The server ends a watch after this many seconds, the client a little later. Dead connections show earlier, by TCP.
const WATCH: u32 = 290;
/// The first wait after a failure, and the longest. Half of each is drawn at random: thousands of nodes lose a server at
/// the same time.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(400), Duration::from_secs(10));

/// A watch that lasted no longer than this was none.
const BRIEF: Duration = Duration::from_millis(500);

/// After so many answers that there is no such kind, some of them seconds apart, there is none.
const MISSING: u32 = 8;

/// A page of a list. Its objects stay texts until each is read: as trees of values, large ones are ten times as large.
#[derive(Deserialize)]
pub(super) struct Page {
    #[serde(default)]
    metadata: ListMeta,
    items: Option<Vec<Box<RawValue>>>,
}

impl Page {
    /// What it says of the list, and its objects.
    pub(super) fn read(self, scope: &Scope) -> serde_json::Result<(ListMeta, Vec<Seen>)> {
        let items = self.items.unwrap_or_default().into_iter();
        let seen =
            items.map(|item| Ok(read(scope.kind, serde_json::from_str(item.get())?, scope.own.as_deref())));
        Ok((self.metadata, seen.collect::<serde_json::Result<_>>()?))
    }
}

/// What is watched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Scope {
    /// The kind.
    pub(super) kind: Kind,
    /// In one namespace only.
    pub(super) namespace: Option<String>,
    /// With these labels only.
    pub(super) labels: Option<String>,
    /// With these fields only.
    pub(super) fields: Option<String>,
    /// Only their metadata.
    pub(super) metadata: bool,
    /// The node of the agent that watches: of much it needs a part only.
    pub(super) own: Option<String>,
}

impl Scope {
    /// All of a kind.
    pub(super) fn all(kind: Kind) -> Self {
        Self { kind, namespace: None, labels: None, fields: None, metadata: false, own: None }
    }

    /// In one namespace.
    pub(super) fn within(self, namespace: &str) -> Self {
        Self { namespace: Some(namespace.to_owned()), ..self }
    }

    /// With a label selector.
    pub(super) fn labelled(self, labels: &str) -> Self {
        Self { labels: Some(labels.to_owned()), ..self }
    }

    /// With a field selector.
    pub(super) fn with(self, fields: String) -> Self {
        Self { fields: Some(fields), ..self }
    }

    /// Metadata only.
    pub(super) fn metadata(self) -> Self {
        Self { metadata: true, ..self }
    }

    /// For whom it is read.
    pub(super) fn read_for(self, own: Option<&str>) -> Self {
        Self { own: own.map(str::to_owned), ..self }
    }

    pub(super) fn api(&self, client: Client) -> Api<DynamicObject> {
        let resource = self.kind.resource();
        match &self.namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &resource),
            None => Api::all_with(client, &resource),
        }
    }

    /// Objects to a page of a list: some kinds' are large.
    pub(super) fn page(&self) -> u32 {
        if self.kind == Kind::EgressFirewall && !self.metadata {
            50
        } else if matches!(self.kind, Kind::Node | Kind::EgressAllocation) {
            100
        } else {
            500
        }
    }
}

/// What a watch says.
#[derive(Debug)]
pub(super) enum Change {
    /// A list begins.
    Begin,
    /// Some of its objects.
    Page(Vec<Seen>),
    /// It has ended, of this version.
    End(Option<u64>),
    /// An object is new or has changed.
    Put(Box<Seen>),
    /// An object is gone.
    Gone(Key, String, Option<u64>),
    /// The server is there and has nothing to say.
    Alive,
    /// It does not work, since when.
    Failed(Trouble, String),
}

/// A change of one watch. `run` tells a watch that was started anew from the one before.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) watch: usize,
    pub(super) run: u64,
    pub(super) change: Change,
}

/// Where a watch says it.
#[derive(Clone)]
pub(super) struct Outlet {
    pub(super) watch: usize,
    pub(super) run: u64,
    pub(super) sender: mpsc::Sender<Message>,
}

impl Outlet {
    async fn say(&self, change: Change) -> Result<(), Over> {
        let message = Message { watch: self.watch, run: self.run, change };
        self.sender.send(message).await.map_err(|_| Over)
    }
}

/// Nobody listens any more.
struct Over;

/// Lists and watches until nobody listens.
pub(super) async fn follow(client: Client, scope: Scope, outlet: Outlet) {
    let mut follower =
        Follower { api: scope.api(client.clone()), client, scope, outlet, patience: PATIENCE.0, since: None };
    // It ends when nobody listens, and that is no error.
    let _ = follower.run().await;
}

struct Follower {
    client: Client,
    api: Api<DynamicObject>,
    scope: Scope,
    outlet: Outlet,
    patience: Duration,
    /// Since when it does not work.
    since: Option<String>,
}

type Events = BoxStream<'static, kube::Result<WatchEvent<DynamicObject>>>;

/// How a watch went on.
enum Next {
    /// From where it was.
    Again,
    /// That version is too old.
    List,
}

impl Follower {
    async fn run(&mut self) -> Result<(), Over> {
        loop {
            let mut version = self.list().await?;
            let mut missing = 0;
            loop {
                let params = self.watch_params();
                let events = match self.events(&params, &version).await {
                    Ok(events) => events,
                    Err(error) => {
                        let trouble = Trouble::of(&error, "watch");
                        // A server that starts does not know all kinds at first. One that goes on not to know this one
                        // may have forgotten its objects with it.
                        missing = if trouble == Trouble::Missing { missing + 1 } else { 0 };
                        let expired = trouble.is_expired() || missing > MISSING;
                        self.failed(trouble).await?;
                        if expired {
                            break;
                        }
                        continue;
                    }
                };
                missing = 0;
                self.works().await?;
                let begun = Instant::now();
                if let Next::List = self.drain(events, &mut version).await? {
                    break;
                }
                // Whatever takes watches and drops them at once is not asked without a pause.
                if begun.elapsed() < BRIEF {
                    tokio::time::sleep(jitter(BRIEF)).await;
                }
            }
        }
    }

    /// Lists until it works; the version of the list.
    async fn list(&mut self) -> Result<String, Over> {
        'list: loop {
            self.outlet.say(Change::Begin).await?;
            let mut params = ListParams {
                label_selector: self.scope.labels.clone(),
                field_selector: self.scope.fields.clone(),
                limit: Some(self.scope.page()),
                // No version asked for: the newest, which a majority of etcd has. A new leader relies on it.
                ..ListParams::default()
            };
            loop {
                let page = match self.page(&params).await {
                    Ok(page) => page,
                    Err(error) => {
                        let trouble = Trouble::of(&error, "list");
                        self.failed(trouble).await?;
                        continue 'list;
                    }
                };
                let (metadata, seen) = page;
                self.outlet.say(Change::Page(seen)).await?;
                params.continue_token = metadata.continue_.filter(|t| !t.is_empty());
                if params.continue_token.is_none() {
                    let of = metadata.resource_version.unwrap_or_default();
                    self.works().await?;
                    self.outlet.say(Change::End(version(Some(&of)))).await?;
                    return Ok(of);
                }
            }
        }
    }

    async fn page(&self, params: &ListParams) -> kube::Result<(ListMeta, Vec<Seen>)> {
        // As `Api::list` does, but for what the answer is read as.
        let request = Request::new(self.api.resource_url());
        let request = if self.scope.metadata { request.list_metadata(params) } else { request.list(params) };
        let page: Page = self.client.request(request.map_err(kube::Error::BuildRequest)?).await?;
        page.read(&self.scope).map_err(kube::Error::SerdeError)
    }

    fn watch_params(&self) -> WatchParams {
        WatchParams {
            label_selector: self.scope.labels.clone(),
            field_selector: self.scope.fields.clone(),
            timeout: Some(WATCH),
            bookmarks: true,
            send_initial_events: false,
        }
    }

    async fn events(&self, params: &WatchParams, version: &str) -> kube::Result<Events> {
        if !self.scope.metadata {
            return Ok(self.api.watch(params, version).await?.boxed());
        }
        let events = self.api.watch_metadata(params, version).await?;
        let bare = |event| match event {
            WatchEvent::Added(o) => WatchEvent::Added(bare(o)),
            WatchEvent::Modified(o) => WatchEvent::Modified(bare(o)),
            WatchEvent::Deleted(o) => WatchEvent::Deleted(bare(o)),
            WatchEvent::Bookmark(b) => WatchEvent::Bookmark(b),
            WatchEvent::Error(e) => WatchEvent::Error(e),
        };
        Ok(events.map(move |event| event.map(bare)).boxed())
    }

    /// Tells what a watch brings until it ends.
    async fn drain(&mut self, mut events: Events, from: &mut String) -> Result<Next, Over> {
        let idle = Duration::from_secs(u64::from(WATCH) + 10);
        loop {
            let change = match timeout(idle, events.next()).await {
                // It ended, as it does every few minutes, or breaks off when the server goes away: what the server has
                // to say about that it says to the next request.
                Err(_) | Ok(None | Some(Err(_))) => return Ok(Next::Again),
                Ok(Some(Ok(event))) => match event {
                    WatchEvent::Added(o) | WatchEvent::Modified(o) => {
                        advance(from, o.metadata.resource_version.as_deref());
                        Change::Put(Box::new(read(self.scope.kind, o, self.scope.own.as_deref())))
                    }
                    WatchEvent::Deleted(o) => {
                        advance(from, o.metadata.resource_version.as_deref());
                        let key =
                            (o.metadata.namespace.unwrap_or_default(), o.metadata.name.unwrap_or_default());
                        let of = version(o.metadata.resource_version.as_deref());
                        Change::Gone(key, o.metadata.uid.unwrap_or_default(), of)
                    }
                    WatchEvent::Bookmark(b) => {
                        advance(from, Some(&b.metadata.resource_version));
                        Change::Alive
                    }
                    WatchEvent::Error(status) => {
                        let trouble = Trouble::of(&kube::Error::Api(status), "watch");
                        if trouble.is_expired() {
                            return Ok(Next::List);
                        }
                        self.failed(trouble).await?;
                        return Ok(Next::Again);
                    }
                },
            };
            self.outlet.say(change).await?;
        }
    }

    async fn works(&mut self) -> Result<(), Over> {
        self.patience = PATIENCE.0;
        self.since = None;
        self.outlet.say(Change::Alive).await
    }

    async fn failed(&mut self, trouble: Trouble) -> Result<(), Over> {
        let since = self.since.get_or_insert_with(|| rfc3339(SystemTime::now())).clone();
        self.outlet.say(Change::Failed(trouble, since)).await?;
        tokio::time::sleep(jitter(self.patience)).await;
        self.patience = (self.patience * 2).min(PATIENCE.1);
        Ok(())
    }
}

/// From half of a time to all of it.
pub(super) fn jitter(time: Duration) -> Duration {
    let part = u32::try_from(random() % 1024).unwrap_or(0);
    time / 2 + time * part / 2048
}

fn advance(from: &mut String, version: Option<&str>) {
    if let Some(version) = version.filter(|v| !v.is_empty()) {
        version.clone_into(from);
    }
}

fn bare(object: PartialObjectMeta<DynamicObject>) -> DynamicObject {
    DynamicObject { types: object.types, metadata: object.metadata, data: Value::Null }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_between_half_and_all() {
        let waits: Vec<_> = (0..200).map(|_| jitter(Duration::from_secs(10))).collect();
        assert!(waits.iter().all(|w| (5.0..=10.0).contains(&w.as_secs_f64())));
        assert!(waits.iter().any(|w| w.as_secs_f64() < 7.0) && waits.iter().any(|w| w.as_secs_f64() > 8.0));
    }
}
