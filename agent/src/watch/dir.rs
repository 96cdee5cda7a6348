//! The directory source: Kubernetes YAML and JSON on one machine, watched for changes.
//!
//! The user's files are the directory's own; Outgate writes under `.outgate/` only:
//!
//! | path | written by |
//! |---|---|
//! | `leader.lock` | whoever leads holds the lock on it |
//! | `cluster.yaml` | the leader |
//! | `egressnodes/NAME.yaml` | that node's agent |
//! | `egressnodespecs/NAME.yaml` | the leader |
//! | `egressallocations/ADDRESS.yaml` | the leader |
//! | `status/egressips/NAME.yaml` | the leader |
//! | `status/egressfirewalls/NAMESPACE.yaml` | the leader |
//! | `last-good/FILE` | the leader: the user's files as they last parsed |
//!
//! **A file that is being written is not read.** Truncating and writing in place shows the file empty for a
//! moment, and an EgressIP that is gone for a moment lets its pods out by the node's address. So a file that
//! inotify has seen modified is left alone until its writer closes it, or has not touched it for half a second.
//!
//! **A file that does not parse keeps what it held**, also over a restart of the agent: hence the copies.
//!
//! **A directory without `.outgate` is not the one that was opened**: removed, unmounted or replaced. It is not
//! read, or all policies would end; a restarted agent takes it as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecursiveMode, Watcher as _};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, info};

use super::{Problem, Source, Write};
use crate::objects::{
    Cluster, EgressAllocation, EgressConfig, EgressFirewall, EgressFirewallReport, EgressIp, EgressIpReport,
    EgressNode, EgressNodeSpec, Meta, Namespace, Node, OUTGATE_API, OVN_API, ObjectName, Objects, Pod,
    Service,
};

/// From the first sign of a change to reading: long enough to see a burst of renames as one change.
const DEBOUNCE: Duration = Duration::from_millis(15);
/// A file whose writer neither closes it nor goes on writing is read after this.
const WRITER_PATIENCE: Duration = Duration::from_millis(500);
/// Everything is looked at this often even if inotify says nothing: it is silent on some network file systems.
const RESCAN: Duration = Duration::from_secs(2);
/// Modification times are that coarse: a file read so soon after its change is looked at again.
const RACY: Duration = Duration::from_secs(1);

/// Why a directory cannot be used, or not be written to.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Error {
    #[error("source directory {0} does not exist; is the path right?", path.display())]
    Missing { path: PathBuf },
    #[error("source {0} is not a directory; --source wants dir:PATH of the directory that holds the manifests", path.display())]
    NotADirectory { path: PathBuf },
    #[error("cannot read source directory {0}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
    #[error("cannot write {0}: {error}; the agent needs write access to .outgate in the source directory", path.display())]
    Unwritable { path: PathBuf, error: io::Error },
    #[error("cannot lock {0}: {error}; does the file system support locks?", path.display())]
    Lock { path: PathBuf, error: io::Error },
    #[error("cannot watch {0}: {error}; maybe fs.inotify.max_user_watches or max_user_instances is too low", path.display())]
    Watch { path: PathBuf, error: notify::Error },
    #[error("cannot put {name} into YAML: {error}")]
    Encode { name: String, error: String },
}

/// A directory of objects.
pub struct DirSource {
    root: PathBuf,
    /// The user's files, by name: the order in which duplicates are decided.
    files: BTreeMap<String, FileState<Vec<Document>>>,
    /// Outgate's own, by path below `.outgate`.
    own: BTreeMap<String, FileState<Own>>,
    /// What went wrong with the directory itself.
    directory_error: Option<String>,
    objects: Objects,
    statuses: BTreeMap<String, EgressIpReport>,
    firewall_statuses: BTreeMap<String, EgressFirewallReport>,
    unreadable: BTreeSet<String>,
    places: BTreeMap<String, String>,
    problems: BTreeSet<Problem>,
    /// Held while this process leads.
    lock: Option<File>,
    /// Files that have a copy under `last-good`, as they were then. Only while this process leads.
    copied: BTreeMap<String, Stamp>,
    /// Why there is no copy of one.
    copy_error: Option<String>,
    /// Absent for a source that is read once.
    watch: Option<Watch>,
}

struct Watch {
    watcher: notify::RecommendedWatcher,
    events: mpsc::UnboundedReceiver<Event>,
    /// Files being written, with the time of the last sign of it.
    busy: BTreeMap<PathBuf, Instant>,
    /// When to read next.
    due: Instant,
}

enum Event {
    /// Written to, writer not done.
    Writing(PathBuf),
    /// Anything after which the path may be read.
    Settled(PathBuf),
    /// Something else, or events were lost.
    Look,
}

/// Of hashes of what files say. Nobody outside can make two that are the same.
static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);

struct FileState<T> {
    stamp: Stamp,
    /// When it was read.
    read: Instant,
    /// A hash of what stood there, with keys of this process: none of what could not be read.
    hash: Option<u64>,
    /// The last content that parsed; `None` if none has.
    content: Option<T>,
    /// Why the content that is there now does not count.
    error: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(m: &fs::Metadata) -> Self {
        Self {
            device: m.dev(),
            inode: m.ino(),
            length: m.len(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        }
    }
}

/// One of the user's documents.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    /// Where it begins in its file.
    pub(crate) line: usize,
    /// What it is.
    pub(crate) object: Object,
}

#[derive(Clone, Debug)]
pub(crate) enum Object {
    Node(Node),
    Namespace(Namespace),
    Pod(Pod),
    Service(Service),
    EgressIp(EgressIp),
    EgressFirewall(EgressFirewall),
    EgressConfig(Box<EgressConfig>),
    /// A kind that is written by Outgate, found among the user's files.
    OutgatesOwn(&'static str),
    /// Not read by Outgate at all.
    Foreign,
}

#[expect(clippy::large_enum_variant, reason = "one a file")]
#[derive(Clone, Debug)]
enum Own {
    Cluster(Cluster),
    EgressNode(EgressNode),
    NodeSpec(EgressNodeSpec),
    Allocation(EgressAllocation),
    Status(EgressIpReport),
    FirewallStatus(EgressFirewallReport),
}

impl DirSource {
    /// Opens a directory for an agent: makes `.outgate` if it is not there, and watches.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let mut source = Self::closed(root)?;
        for sub in OWN_DIRECTORIES {
            let path = root.join(sub);
            fs::create_dir_all(&path).map_err(|error| Error::Unwritable { path, error })?;
        }
        let copies = root.join(COPIES);
        // Whoever may not read the user's files may not read the copies.
        match fs::DirBuilder::new().mode(0o700).create(&copies) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::Unwritable { path: copies, error });
            }
            _ => {}
        }
        let (sender, events) = mpsc::unbounded_channel();
        let watcher = notify::recommended_watcher(move |event| {
            for event in digest(event) {
                // The receiver is gone only when the agent ends.
                let _ = sender.send(event);
            }
        })
        .map_err(|error| Error::Watch { path: root.to_owned(), error })?;
        let mut watch = Watch { watcher, events, busy: BTreeMap::new(), due: Instant::now() + RESCAN };
        watch.subscribe(root)?;
        source.watch = Some(watch);
        source.scan();
        Ok(source)
    }

    /// Reads a directory once; for commands.
    pub fn read(root: &Path) -> Result<Self, Error> {
        let mut source = Self::closed(root)?;
        source.scan();
        Ok(source)
    }

    fn closed(root: &Path) -> Result<Self, Error> {
        let path = root.to_owned();
        match fs::metadata(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::Missing { path }),
            Err(error) => return Err(Error::Unreadable { path, error }),
            Ok(m) if !m.is_dir() => return Err(Error::NotADirectory { path }),
            Ok(_) => {}
        }
        fs::read_dir(root).map_err(|error| Error::Unreadable { path, error })?;
        Ok(Self {
            root: root.to_owned(),
            files: BTreeMap::new(),
            own: BTreeMap::new(),
            directory_error: None,
            objects: Objects::default(),
            statuses: BTreeMap::new(),
            firewall_statuses: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            places: BTreeMap::new(),
            problems: BTreeSet::new(),
            lock: None,
            copied: BTreeMap::new(),
            copy_error: None,
            watch: None,
        })
    }

    /// Reads what has changed; whether anything has.
    fn scan(&mut self) -> bool {
        let mut changed = false;
        let mut waiting = false;
        let listed = match fs::metadata(self.root.join(".outgate")) {
            Err(_) if self.watch.is_some() => Err(format!(
                "has no .outgate any more: was the directory removed, unmounted or replaced? {HELD}; \
                 a restarted agent takes the directory as it is"
            )),
            _ => list(&self.root, |name| kind_of(name).is_some())
                .map_err(|error| format!("cannot be listed: {error}; {HELD}")),
        };
        match listed {
            Ok(paths) => {
                changed |= self.directory_error.take().is_some();
                let busy = self.watch.as_mut().map(|w| &mut w.busy);
                (changed, waiting) = merge_flags(
                    (changed, waiting),
                    refresh(
                        &self.root,
                        &mut self.files,
                        paths,
                        busy,
                        |name, text| parse_file(text, kind_of(name) == Some(Format::Json)),
                        |name| fs::read_to_string(self.root.join(COPIES).join(name)).ok(),
                    ),
                );
            }
            Err(message) => {
                changed |= self.directory_error.as_ref() != Some(&message);
                self.directory_error = Some(message);
            }
        }
        if self.directory_error.is_none() {
            let mut own = BTreeMap::new();
            for sub in OWN_DIRECTORIES {
                // Absent until an agent has been here.
                for (name, path) in list(&self.root.join(sub), own_file).unwrap_or_default() {
                    own.insert(format!("{}/{name}", &sub[".outgate".len()..]), path);
                }
            }
            let busy = self.watch.as_mut().map(|w| &mut w.busy);
            let root = self.root.join(".outgate");
            let found = refresh(&root, &mut self.own, own, busy, parse_own, |_| None);
            (changed, waiting) = merge_flags((changed, waiting), found);
        }
        if let Some(watch) = &mut self.watch {
            let now = Instant::now();
            watch.busy.retain(|_, since| now.duration_since(*since) < WRITER_PATIENCE);
            watch.due = now + if waiting { WRITER_PATIENCE / 5 } else { RESCAN };
        }
        if changed {
            self.copy();
            self.merge();
        }
        changed
    }

    /// Leader: keeps `last-good` as the files are, those that parse.
    fn copy(&mut self) {
        if self.lock.is_some() {
            self.copy_error = self.try_copy().err().map(|error| error.to_string());
        }
    }

    fn try_copy(&mut self) -> Result<(), Error> {
        for (name, state) in &self.files {
            // Of what concerns Outgate only: the directory may hold secrets too.
            let ours = state.content.iter().flatten().any(|d| !matches!(d.object, Object::Foreign));
            if state.error.is_some() || !ours || self.copied.get(name) == Some(&state.stamp) {
                continue;
            }
            let path = self.root.join(name);
            let Ok(bytes) = read_regular(&path) else { continue };
            // It has changed since it was parsed: the next look decides.
            if fs::metadata(&path).ok().as_ref().map(Stamp::of) != Some(state.stamp) {
                continue;
            }
            put(&self.root.join(COPIES).join(name), &bytes, false)?;
            self.copied.insert(name.clone(), state.stamp);
        }
        self.copied.retain(|name, _| self.files.contains_key(name));
        for (name, path) in list(&self.root.join(COPIES), |_| true).unwrap_or_default() {
            // A broken file's copy is what the copies are for.
            let broken = self.files.get(&name).is_some_and(|s| s.error.is_some());
            if !broken && !self.copied.contains_key(&name) {
                fs::remove_file(&path).map_err(|error| Error::Unwritable { path, error })?;
            }
        }
        Ok(())
    }

    /// Makes objects and problems from the files' contents.
    fn merge(&mut self) {
        let mut objects = Objects::default();
        let mut problems = BTreeSet::new();
        if let Some(message) = &self.directory_error {
            problems.insert(Problem::new(self.root.display(), message));
        }
        if let Some(message) = &self.copy_error {
            problems.insert(Problem::new(self.root.join(COPIES).display(), message));
        }
        // Where each object was first seen.
        let mut seen: BTreeMap<ObjectName, String> = BTreeMap::new();
        for (file, state) in &self.files {
            if let Some(error) = &state.error {
                let held = if state.content.is_some() {
                    "what the file held before stays in force"
                } else {
                    "nothing in this file is in force"
                };
                problems.insert(Problem::new(file, format_args!("{error}; {held}")));
            }
            for document in state.content.iter().flatten() {
                let place = format!("{file}:{}", document.line);
                match &document.object {
                    Object::OutgatesOwn(kind) => {
                        problems.insert(Problem::new(
                            place,
                            format_args!("{kind} is written by outgate itself, under .outgate; ignored here"),
                        ));
                        continue;
                    }
                    Object::Foreign => continue,
                    Object::Node(_)
                    | Object::Namespace(_)
                    | Object::Pod(_)
                    | Object::Service(_)
                    | Object::EgressIp(_)
                    | Object::EgressFirewall(_)
                    | Object::EgressConfig(_) => {}
                }
                let Some((name, meta)) = document.object.name() else { continue };
                if let Some(first) = seen.get(&name) {
                    problems.insert(Problem::new(
                        place,
                        format_args!("{name} is already in {first}, which counts; this one is ignored"),
                    ));
                    continue;
                }
                let key = (name.namespace.clone(), meta.name.clone());
                seen.insert(name, place);
                document.object.clone().put(key, &mut objects);
            }
        }
        self.places = seen.into_iter().map(|(name, place)| (name.to_string(), place)).collect();
        self.merge_own(&mut objects, &mut problems);
        self.objects = objects;
        self.problems = problems;
    }

    /// The same of Outgate's own files.
    fn merge_own(&mut self, objects: &mut Objects, problems: &mut BTreeSet<Problem>) {
        self.statuses.clear();
        self.firewall_statuses.clear();
        self.unreadable.clear();
        for (file, state) in &self.own {
            if let Some(error) = &state.error {
                problems.insert(Problem::new(format_args!(".outgate{file}"), error));
            }
            match &state.content {
                None => {
                    if let Some(name) = own_name(file, "/egressallocations/") {
                        self.unreadable.insert(name.to_owned());
                    }
                }
                Some(Own::Cluster(o)) => objects.cluster = Some(*o),
                Some(Own::EgressNode(o)) => {
                    let node = objects.egress_nodes.entry(o.metadata.name.clone()).or_default();
                    *node = EgressNode { spec: std::mem::take(&mut node.spec), ..o.clone() };
                }
                Some(Own::NodeSpec(spec)) => {
                    if let Some(name) = own_name(file, NODE_SPECS) {
                        let node = objects.egress_nodes.entry(name.to_owned()).or_default();
                        name.clone_into(&mut node.metadata.name);
                        node.spec.clone_from(spec);
                    }
                }
                Some(Own::Allocation(o)) => {
                    objects.egress_allocations.insert(o.metadata.name.clone(), o.clone());
                }
                Some(Own::Status(o)) => {
                    self.statuses.insert(o.metadata.name.clone(), o.clone());
                }
                Some(Own::FirewallStatus(o)) => {
                    self.firewall_statuses.insert(o.metadata.namespace.clone(), o.clone());
                }
            }
        }
    }

    /// Writes one of Outgate's own files.
    fn write_own(&self, sub: &str, value: &impl Serialize, durable: bool) -> Result<(), Error> {
        let text = serde_saphyr::to_string(value)
            .map_err(|e| Error::Encode { name: sub.to_owned(), error: e.to_string() })?;
        put(&self.root.join(format!(".outgate{sub}")), text.as_bytes(), durable)
    }

    fn remove(&self, sub: &str) -> Result<(), Error> {
        let path = self.root.join(format!(".outgate{sub}"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::Unwritable { path, error }),
            _ => Ok(()),
        }
    }
}

impl Source for DirSource {
    type Error = Error;

    async fn changed(&mut self) -> Result<(), Error> {
        loop {
            let Some(watch) = &mut self.watch else { return std::future::pending().await };
            tokio::select! {
                event = watch.events.recv() => {
                    let Some(event) = event else { return std::future::pending().await };
                    watch.note(event);
                    while let Ok(event) = watch.events.try_recv() {
                        watch.note(event);
                    }
                }
                () = tokio::time::sleep_until(watch.due) => {
                    // A directory made anew has a new inode; watching one twice does no harm.
                    let _ = watch.subscribe(&self.root);
                    if self.scan() {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn objects(&self) -> &Objects {
        &self.objects
    }

    fn statuses(&self) -> &BTreeMap<String, EgressIpReport> {
        &self.statuses
    }

    fn firewall_statuses(&self) -> &BTreeMap<String, EgressFirewallReport> {
        &self.firewall_statuses
    }

    fn unreadable_allocations(&self) -> &BTreeSet<String> {
        &self.unreadable
    }

    fn place(&self, object: &str) -> Option<&str> {
        self.places.get(object).map(String::as_str)
    }

    fn complete(&self) -> bool {
        self.directory_error.is_none() && self.files.values().all(|f| f.content.is_some())
    }

    fn problems(&self) -> &BTreeSet<Problem> {
        &self.problems
    }

    fn lead(&mut self) -> Result<bool, Error> {
        let path = self.root.join(".outgate/leader.lock");
        if let Some(lock) = &self.lock {
            // A lock on a file that is not there any more keeps nobody from leading.
            let id = |m: io::Result<fs::Metadata>| m.ok().map(|m| (m.dev(), m.ino()));
            if id(lock.metadata()) == id(fs::metadata(&path)) {
                return Ok(true);
            }
            self.lock = None;
        }
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| Error::Unwritable { path: path.clone(), error })?;
        match file.try_lock() {
            Ok(()) => {
                self.lock = Some(file);
                // The leader before may have written since the last look: decide on what is there now.
                if !self.scan() {
                    self.copy();
                }
                Ok(true)
            }
            Err(fs::TryLockError::WouldBlock) => Ok(false),
            Err(fs::TryLockError::Error(error)) => Err(Error::Lock { path, error }),
        }
    }

    async fn write(&mut self, write: Write) -> Result<(), Error> {
        match write {
            Write::EgressNode(mut o) => {
                // The leader's part is a file of its own.
                o.spec = EgressNodeSpec::default();
                self.write_own(&format!("/egressnodes/{}.yaml", o.metadata.name), &o, false)?;
                let before = self.objects.egress_nodes.remove(&o.metadata.name);
                o.spec = before.map(|b| b.spec).unwrap_or_default();
                self.objects.egress_nodes.insert(o.metadata.name.clone(), o);
            }
            Write::NodeSpec(name, spec) => {
                self.write_own(&format!("{NODE_SPECS}{name}.yaml"), &spec, false)?;
                let node = self.objects.egress_nodes.entry(name.clone()).or_default();
                (node.metadata.name, node.spec) = (name, spec);
            }
            Write::RemoveEgressNode(name) => {
                self.remove(&format!("{NODE_SPECS}{name}.yaml"))?;
                self.remove(&format!("/egressnodes/{name}.yaml"))?;
                self.objects.egress_nodes.remove(&name);
            }
            Write::Event(event) => {
                // A warning is for what is wrong with the agent's own work or input, which it says itself.
                if event.warning {
                    info!("{}: {} ({})", event.about, event.message, event.reason);
                } else {
                    // The leader's log has it.
                    debug!("{}: {} ({})", event.about, event.message, event.reason);
                }
            }
            Write::Allocation(o) => {
                self.write_own(&format!("/egressallocations/{}.yaml", o.metadata.name), &o, true)?;
                self.objects.egress_allocations.insert(o.metadata.name.clone(), o);
            }
            Write::RemoveAllocation(name) => {
                self.remove(&format!("/egressallocations/{name}.yaml"))?;
                self.objects.egress_allocations.remove(&name);
            }
            Write::Status(o) => {
                self.write_own(&format!("/status/egressips/{}.yaml", o.metadata.name), &o, false)?;
                self.statuses.insert(o.metadata.name.clone(), o);
            }
            Write::RemoveStatus(name) => {
                self.remove(&format!("/status/egressips/{name}.yaml"))?;
                self.statuses.remove(&name);
            }
            Write::FirewallStatus(o) => {
                self.write_own(&format!("{FIREWALL_STATUSES}{}.yaml", o.metadata.namespace), &o, false)?;
                self.firewall_statuses.insert(o.metadata.namespace.clone(), o);
            }
            Write::RemoveFirewallStatus(namespace) => {
                self.remove(&format!("{FIREWALL_STATUSES}{namespace}.yaml"))?;
                self.firewall_statuses.remove(&namespace);
            }
            Write::Cluster(o) => {
                self.write_own("/cluster.yaml", &o, true)?;
                self.objects.cluster = Some(o);
            }
        }
        Ok(())
    }
}

/// Said of a directory that cannot be read.
const HELD: &str = "what was read before stays in force";

/// Where copies of the user's files are.
const COPIES: &str = ".outgate/last-good";

/// Where, below `.outgate`, the spec of each EgressNode is; its status, which the node's agent writes, is in a file of its own.
const NODE_SPECS: &str = "/egressnodespecs/";

/// Where, below `.outgate`, the status of each EgressFirewall is, by namespace.
const FIREWALL_STATUSES: &str = "/status/egressfirewalls/";

/// Outgate's own directories, parents first.
const OWN_DIRECTORIES: [&str; 6] = [
    ".outgate",
    ".outgate/egressnodes",
    ".outgate/egressnodespecs",
    ".outgate/egressallocations",
    ".outgate/status/egressips",
    ".outgate/status/egressfirewalls",
];

impl Watch {
    fn subscribe(&mut self, root: &Path) -> Result<(), Error> {
        for sub in [""].iter().chain(&OWN_DIRECTORIES) {
            let path = root.join(sub);
            self.watcher
                .watch(&path, RecursiveMode::NonRecursive)
                .map_err(|error| Error::Watch { path, error })?;
        }
        Ok(())
    }

    fn note(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Writing(path) => drop(self.busy.insert(path, now)),
            Event::Settled(path) => drop(self.busy.remove(&path)),
            Event::Look => {}
        }
        // Not later than already planned, so that steady writing cannot put it off.
        self.due = self.due.min(now + DEBOUNCE);
    }
}

/// What an inotify event means here. Reading a file makes events too; those say nothing.
fn digest(event: notify::Result<notify::Event>) -> Vec<Event> {
    let Ok(event) = event else { return vec![Event::Look] };
    if event.need_rescan() {
        return vec![Event::Look];
    }
    let paths = event.paths.into_iter().filter(|p| {
        // The lock file and temporary files concern nobody.
        p.extension().is_none_or(|e| !e.to_string_lossy().starts_with("tmp-") && e != "lock")
    });
    match event.kind {
        EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any) => paths.map(Event::Writing).collect(),
        EventKind::Access(AccessKind::Close(AccessMode::Write)) | EventKind::Remove(_) => {
            paths.map(Event::Settled).collect()
        }
        // A rename puts a whole file in place.
        EventKind::Modify(ModifyKind::Name(_)) => paths.map(Event::Settled).collect(),
        EventKind::Access(_) => Vec::new(),
        EventKind::Any | EventKind::Create(_) | EventKind::Modify(_) | EventKind::Other => {
            paths.map(|_| Event::Look).collect()
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Yaml,
    Json,
}

/// How a user's file is read, by its name; hidden files (editors' and Outgate's own) are not.
fn kind_of(name: &str) -> Option<Format> {
    if name.starts_with('.') {
        return None;
    }
    match Path::new(name).extension()?.to_str()? {
        "yaml" | "yml" => Some(Format::Yaml),
        "json" => Some(Format::Json),
        _ => None,
    }
}

fn own_file(name: &str) -> bool {
    kind_of(name) == Some(Format::Yaml)
}

/// The name in `DIRECTORY/NAME.yaml`.
fn own_name<'a>(file: &'a str, directory: &str) -> Option<&'a str> {
    file.strip_prefix(directory)?.strip_suffix(".yaml")
}

fn list(directory: &Path, wanted: impl Fn(&str) -> bool) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut paths = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if let Some(name) = entry.file_name().to_str().filter(|n| wanted(n)) {
            paths.insert(name.to_owned(), entry.path());
        }
    }
    Ok(paths)
}

fn merge_flags(a: (bool, bool), b: (bool, bool)) -> (bool, bool) {
    (a.0 | b.0, a.1 | b.1)
}

/// Writes a file by rename, so that a reader sees the old or the new one.
fn put(path: &Path, bytes: &[u8], durable: bool) -> Result<(), Error> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    // Agents of one directory may write at once, each its own file; the process id keeps them apart.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".tmp-{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = (|| {
        // Directories are made at the start only: see the module's head.
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_data()?;
        }
        fs::rename(&temporary, path)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        Error::Unwritable { path: path.to_owned(), error }
    })
}

/// Reads what differs from what was read before. Says whether anything did, and whether a writer is waited for.
/// `copy` gives the text that a file had when it last parsed, for one that does not and has not since the start.
fn refresh<T>(
    root: &Path,
    states: &mut BTreeMap<String, FileState<T>>,
    mut paths: BTreeMap<String, PathBuf>,
    busy: Option<&mut BTreeMap<PathBuf, Instant>>,
    parse: impl Fn(&str, &str) -> Result<T, String>,
    copy: impl Fn(&str) -> Option<String>,
) -> (bool, bool) {
    let now = Instant::now();
    let empty = BTreeMap::new();
    let busy = busy.map_or(&empty, |b| &*b);
    // A list made while a file was replaced may lack it; an EgressIP must not be gone for that.
    for name in states.keys() {
        if !paths.contains_key(name) {
            paths.insert(name.clone(), root.join(name.trim_start_matches('/')));
        }
    }
    // A listed file may be gone by now, and a subdirectory may be called `x.yaml`.
    paths.retain(|_, path| {
        fs::metadata(path).map_or_else(|e| e.kind() != io::ErrorKind::NotFound, |m| !m.is_dir())
    });
    let before = states.len();
    states.retain(|name, _| paths.contains_key(name));
    let mut changed = states.len() != before;
    let mut waiting = false;
    for (name, path) in paths {
        let old = states.get(&name);
        let metadata = fs::metadata(&path);
        let stamp = metadata.as_ref().ok().map(Stamp::of);
        if let (Some(old), Some(stamp)) = (old, stamp)
            && old.stamp == stamp
            && !is_racy(metadata.as_ref().ok(), old.read, now)
        {
            continue;
        }
        if busy.get(&path).is_some_and(|since| now.duration_since(*since) < WRITER_PATIENCE) {
            waiting = true;
            continue;
        }
        let read = read_regular(&path);
        let hash = read.as_ref().ok().map(|bytes| KEYS.hash_one(bytes));
        // What was looked at again only because it could have changed is not parsed again.
        if let (Some(old), Some(stamp)) = (states.get_mut(&name), stamp)
            && hash.is_some()
            && old.hash == hash
        {
            (old.stamp, old.read) = (stamp, now);
            continue;
        }
        let result = match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => Err(format!("cannot be read: {error}")),
            Ok(bytes) => match std::str::from_utf8(&bytes) {
                Ok(text) => parse(&name, text.trim_start_matches('\u{feff}')),
                Err(e) => {
                    let line = bytes[..=e.valid_up_to()].split(|b| *b == b'\n').count();
                    Err(format!("line {line}: not UTF-8 text"))
                }
            },
        };
        let (content, error) = match result {
            Ok(content) => (Some(content), None),
            Err(error) => {
                let before = states.remove(&name).and_then(|s| s.content);
                let content = before.or_else(|| copy(&name).and_then(|text| parse(&name, &text).ok()));
                (content, Some(error))
            }
        };
        let stamp =
            stamp.unwrap_or(Stamp { device: 0, inode: 0, length: 0, modified: (0, 0), changed: (0, 0) });
        states.insert(name, FileState { stamp, read: now, hash, content, error });
        changed = true;
    }
    (changed, waiting)
}

/// Whether the file was read so soon after its modification that another could have gone unseen, and has not
/// been looked at again since that time has passed.
fn is_racy(metadata: Option<&fs::Metadata>, read: Instant, now: Instant) -> bool {
    let Some(age) = metadata.and_then(|m| m.modified().ok()).and_then(|t| t.elapsed().ok()) else {
        return false;
    };
    let since_read = now.duration_since(read);
    // Read within RACY of the change, and now is after that time: once more, then never again.
    since_read > RACY && age >= since_read && age.saturating_sub(since_read) < RACY
}

/// Reads a regular file; a pipe or a device of that name would block for ever.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Text that an object can be read from, in one of the forms it comes in.
pub(crate) enum Text<'a> {
    Yaml(&'a str),
    Json(&'a str),
    /// An item of a `List`.
    Value(serde_json::Value),
}

/// A parser's complaint: the line within the text, counted from 1, if it knows, and what is wrong.
pub(crate) struct Complaint {
    pub(crate) line: Option<usize>,
    pub(crate) message: String,
}

impl Text<'_> {
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, Complaint> {
        match self {
            Self::Yaml(text) => read_yaml(text),
            Self::Json(text) => serde_json::from_str(text).map_err(|e| Complaint {
                line: Some(e.line()),
                message: strip_place(&e.to_string()).to_owned(),
            }),
            Self::Value(value) => serde_json::from_value(value.clone())
                .map_err(|e| Complaint { line: None, message: e.to_string() }),
        }
    }
}

fn read_yaml<T: DeserializeOwned>(text: &str) -> Result<T, Complaint> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            // A List of a whole cluster's pods is one document.
            max_events: 50_000_000,
            max_nodes: 20_000_000,
            max_total_scalar_bytes: 1 << 30,
        },
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|e| Complaint {
        line: e.location().and_then(|l| usize::try_from(l.line()).ok()),
        message: strip_place(&e.without_snippet().to_string()).to_owned(),
    })
}

/// Without the " at line 3, column 7" at its end: the line is counted within the file instead.
fn strip_place(message: &str) -> &str {
    message.rfind(" at line ").map_or(message, |at| &message[..at])
}

fn parse_file(text: &str, json: bool) -> Result<Vec<Document>, String> {
    let mut documents = Vec::new();
    let parts = if json { split_json(text)? } else { split_yaml(text) };
    for (index, (first_line, part)) in parts.iter().enumerate() {
        let text = if json { Text::Json(part) } else { Text::Yaml(part) };
        let line = first_line + leading_lines(part);
        parse_document(&text, line, &mut documents).map_err(|c| {
            let at = c.line.map_or(line, |l| first_line + l - 1);
            let which = if parts.len() > 1 { format!(" (document {})", index + 1) } else { String::new() };
            format!("line {at}{which}: {}", c.message)
        })?;
    }
    Ok(documents)
}

/// Lines before the first that says something.
pub(crate) fn leading_lines(text: &str) -> usize {
    text.lines().take_while(|l| is_silent(l)).count()
}

fn is_silent(line: &str) -> bool {
    let line = line.trim();
    line.is_empty() || line.starts_with(['#', '%']) || line == "---" || line == "..."
}

/// The documents of a YAML text with the number of their first line. A line that begins with `---` is always
/// a document marker, even within a block scalar (YAML 1.2, 9.1.2), so lines are enough to tell.
pub(crate) fn split_yaml(text: &str) -> Vec<(usize, &str)> {
    let marker = |line: &str, mark: &str| {
        line.strip_prefix(mark)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    let mut parts = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 1, 0);
    for (n, line) in text.split_inclusive('\n').enumerate() {
        if marker(line, "---") {
            parts.push((start_line, &text[start..at]));
            (start, start_line) = (at, n + 1);
        }
        at += line.len();
        if marker(line, "...") {
            parts.push((start_line, &text[start..at]));
            (start, start_line) = (at, n + 2);
        }
    }
    parts.push((start_line, &text[start..]));
    parts.retain(|(_, part)| !part.lines().all(is_silent));
    parts
}

/// The values of a text of one or more JSON values with the number of their first line.
pub(crate) fn split_json(text: &str) -> Result<Vec<(usize, &str)>, String> {
    let mut parts = Vec::new();
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<serde::de::IgnoredAny>();
    let mut start = 0;
    while let Some(value) = stream.next() {
        value.map_err(|e| format!("line {}: {}", e.line(), strip_place(&e.to_string())))?;
        let end = stream.byte_offset();
        parts.push((1 + text[..start].matches('\n').count(), &text[start..end]));
        start = end;
    }
    Ok(parts)
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Head {
    api_version: Option<String>,
    kind: Option<String>,
}

pub(crate) fn parse_document(
    text: &Text<'_>,
    line: usize,
    documents: &mut Vec<Document>,
) -> Result<(), Complaint> {
    #[derive(Deserialize)]
    struct List {
        #[serde(default)]
        items: Vec<serde_json::Value>,
    }

    let head: Head = text.read()?;
    let complain = |message: String| Complaint { line: None, message };
    let kind = head.kind.unwrap_or_default();
    let api = head.api_version.unwrap_or_default();
    if kind.is_empty() {
        return Err(complain("no kind: this is not a Kubernetes object".to_owned()));
    }
    if api.is_empty() {
        return Err(complain(format!("{kind} has no apiVersion")));
    }
    let object = match (api.as_str(), kind.as_str()) {
        ("v1", "List") => {
            for (index, item) in text.read::<List>()?.items.into_iter().enumerate() {
                parse_document(&Text::Value(item), line, documents).map_err(|c| Complaint {
                    line: c.line,
                    message: format!("items[{index}]: {}", c.message),
                })?;
            }
            return Ok(());
        }
        ("v1", "Node") => Object::Node(text.read()?),
        ("v1", "Namespace") => Object::Namespace(text.read()?),
        ("v1", "Pod") => Object::Pod(text.read()?),
        ("v1", "Service") => Object::Service(text.read()?),
        (OVN_API, "EgressIP") => Object::EgressIp(text.read()?),
        (OVN_API, "EgressFirewall") => Object::EgressFirewall(text.read()?),
        (OUTGATE_API, "EgressConfig") => Object::EgressConfig(Box::new(text.read()?)),
        (OUTGATE_API, "EgressNode") => Object::OutgatesOwn("EgressNode"),
        (OUTGATE_API, "EgressAllocation") => Object::OutgatesOwn("EgressAllocation"),
        // Of these groups nothing may be passed over: a slip in the kind would be a policy that is not there.
        (api, kind)
            if ["k8s.ovn.org/", "outgate.dev/"].iter().any(|group| api.starts_with(group))
                || matches!(kind, "EgressIP" | "EgressFirewall" | "EgressConfig") =>
        {
            return Err(complain(format!("{kind} of {api} is not a kind that outgate knows")));
        }
        _ => Object::Foreign,
    };
    if let Some((name, _)) = object.name() {
        check_name("metadata.name", &name.name, 253, true).map_err(complain)?;
        if !name.namespace.is_empty() {
            check_name("metadata.namespace", &name.namespace, 63, false).map_err(complain)?;
        }
    }
    documents.push(Document { line, object });
    Ok(())
}

impl Object {
    /// Puts it among others, by its namespace and name.
    pub(crate) fn put(self, key: (String, String), objects: &mut Objects) {
        match self {
            Self::Node(o) => drop(objects.nodes.insert(key.1, o)),
            Self::Namespace(o) => drop(objects.namespaces.insert(key.1, o)),
            Self::Pod(mut o) => {
                o.metadata.namespace.clone_from(&key.0);
                objects.pods.insert(key, o);
            }
            Self::Service(mut o) => {
                o.metadata.namespace.clone_from(&key.0);
                objects.services.insert(key, o);
            }
            Self::EgressIp(o) => drop(objects.egress_ips.insert(key.1, o)),
            Self::EgressFirewall(mut o) => {
                o.metadata.namespace.clone_from(&key.0);
                objects.egress_firewalls.insert(key, o);
            }
            Self::EgressConfig(o) => drop(objects.egress_configs.insert(key.1, *o)),
            Self::OutgatesOwn(_) | Self::Foreign => {}
        }
    }

    /// What it is called, and its metadata; none of what is not read.
    pub(crate) fn name(&self) -> Option<(ObjectName, &Meta)> {
        let (kind, namespaced, meta) = match self {
            Self::Node(o) => ("Node", false, &o.metadata),
            Self::Namespace(o) => ("Namespace", false, &o.metadata),
            Self::Pod(o) => ("Pod", true, &o.metadata),
            Self::Service(o) => ("Service", true, &o.metadata),
            Self::EgressIp(o) => ("EgressIP", false, &o.metadata),
            Self::EgressFirewall(o) => ("EgressFirewall", true, &o.metadata),
            Self::EgressConfig(o) => ("EgressConfig", false, &o.metadata),
            Self::OutgatesOwn(_) | Self::Foreign => return None,
        };
        let namespace = match (namespaced, meta.namespace.as_str()) {
            (false, _) => "",
            // As kubectl does.
            (true, "") => "default",
            (true, namespace) => namespace,
        };
        Some((ObjectName { kind, namespace: namespace.to_owned(), name: meta.name.clone() }, meta))
    }
}

/// RFC 1123 names, which is what Kubernetes allows. They also become file names here.
fn check_name(field: &str, name: &str, longest: usize, dots: bool) -> Result<(), String> {
    let alphanumeric = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let inner = |c: u8| alphanumeric(c) || c == b'-' || (dots && c == b'.');
    let bytes = name.as_bytes();
    match (bytes.first(), bytes.last()) {
        (None, _) | (_, None) => Err(format!("{field} is missing")),
        (Some(first), Some(last))
            if alphanumeric(*first)
                && alphanumeric(*last)
                && bytes.iter().all(|c| inner(*c))
                && bytes.len() <= longest =>
        {
            Ok(())
        }
        _ => Err(format!(
            "{field} {name:?} is not a Kubernetes name: lower-case letters, digits and '-' (RFC 1123), at most {longest}"
        )),
    }
}

/// One of Outgate's own files, by its path below `.outgate`.
fn parse_own(file: &str, text: &str) -> Result<Own, String> {
    fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
        read_yaml(text).map_err(|c| format!("line {}: {}", c.line.unwrap_or(1), c.message))
    }
    fn named<T>(object: T, meta: impl Fn(&T) -> &Meta, name: &str) -> Result<T, String> {
        let found = &meta(&object).name;
        if found == name {
            Ok(object)
        } else {
            Err(format!("metadata.name is {found:?}, the file's name says {name:?}; ignored"))
        }
    }
    if file == "/cluster.yaml" {
        return read(text).map(Own::Cluster);
    }
    if let Some(name) = own_name(file, "/egressnodes/") {
        return named(read(text)?, |o: &EgressNode| &o.metadata, name).map(Own::EgressNode);
    }
    if own_name(file, NODE_SPECS).is_some() {
        return read(text).map(Own::NodeSpec);
    }
    if let Some(name) = own_name(file, "/egressallocations/") {
        return named(read(text)?, |o: &EgressAllocation| &o.metadata, name).map(Own::Allocation);
    }
    if let Some(name) = own_name(file, "/status/egressips/") {
        return named(read(text)?, |o: &EgressIpReport| &o.metadata, name).map(Own::Status);
    }
    if let Some(namespace) = own_name(file, FIREWALL_STATUSES) {
        let report: EgressFirewallReport = read(text)?;
        let found = &report.metadata.namespace;
        return if found == namespace {
            Ok(Own::FirewallStatus(report))
        } else {
            Err(format!("metadata.namespace is {found:?}, the file's name says {namespace:?}; ignored"))
        };
    }
    Err("not a file of outgate's; ignored".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that goes with the test.
    struct Temp(PathBuf);

    impl Temp {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("outgate-dir-{test}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
        fn put(&self, name: &str, text: &str) {
            let temporary = self.0.join(".writing");
            fs::write(&temporary, text).unwrap();
            fs::rename(temporary, self.0.join(name)).unwrap();
        }
    }

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn pod(name: &str) -> String {
        format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: n}}\n")
    }

    fn problems(source: &DirSource) -> Vec<String> {
        source.problems().iter().map(ToString::to_string).collect()
    }

    async fn changed(source: &mut DirSource) {
        tokio::time::timeout(Duration::from_secs(1), source.changed())
            .await
            .expect("a change within a second")
            .unwrap();
    }

    #[test]
    fn a_bad_directory_is_one_clear_error() {
        let temp = Temp::new("bad");
        let error = |path: &Path| DirSource::open(path).err().unwrap().to_string();
        assert!(error(&temp.0.join("none")).contains("does not exist"));
        temp.put("file", "");
        assert!(error(&temp.0.join("file")).contains("is not a directory"));
    }

    #[test]
    fn files_hold_several_documents_in_yaml_and_json_and_lists() {
        let temp = Temp::new("documents");
        temp.put("a.yaml", &format!("# two\n---\n{}---\n{}...\n", pod("a"), pod("b")));
        temp.put(
            "b.json",
            r#"{"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "x"}}]}
               {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n", "labels": null}}"#,
        );
        temp.put("c.yml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n");
        temp.put("d.txt", "not: read");
        temp.put(".e.yaml", "not: read");
        fs::create_dir(temp.0.join("f.yaml")).unwrap();
        let source = DirSource::read(&temp.0).unwrap();
        assert_eq!(problems(&source), Vec::<String>::new());
        let objects = source.objects();
        assert_eq!(objects.pods.len(), 2);
        assert!(objects.nodes.contains_key("x") && objects.namespaces.contains_key("n"));
    }

    #[test]
    fn mistakes_are_reported_by_file_and_line() {
        let temp = Temp::new("lines");
        temp.put("a.yaml", &format!("{}---\n\n{}spec:\n  nodeName: [\n", pod("a"), pod("b")));
        temp.put("b.yaml", &format!("{}spec:\n  hostNetwork: perhaps\n", pod("c")));
        temp.put("c.json", "{\"apiVersion\": \"v1\",\n \"kind\": }");
        temp.put("d.yaml", "a: b\n");
        temp.put("e.yaml", "apiVersion: k8s.ovn.org/v1\nkind: EgressIp\nmetadata: {name: e}\n");
        temp.put("f.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: ../../etc}\n");
        let source = DirSource::read(&temp.0).unwrap();
        let all = problems(&source);
        let said = |start: &str, part: &str| {
            assert!(all.iter().any(|p| p.starts_with(start) && p.contains(part)), "{start} {part}: {all:#?}");
        };
        said("a.yaml: line 1", "(document 2)");
        said("b.yaml: line 5", "bool");
        said("c.json: line 2", "expected value");
        said("d.yaml: line 1", "no kind");
        said("e.yaml: line 1", "EgressIp of k8s.ovn.org/v1 is not a kind");
        said("f.yaml: line 1", "is not a Kubernetes name");
        assert!(source.objects().pods.is_empty(), "one bad document rejects its file");
        assert_eq!(all.len(), 6);
    }

    #[test]
    fn of_duplicates_the_first_in_name_order_counts() {
        let temp = Temp::new("duplicates");
        temp.put("b.yaml", &pod("a"));
        temp.put("a.yaml", &format!("{}status: {{podIP: 10.0.0.1}}\n", pod("a")));
        let source = DirSource::read(&temp.0).unwrap();
        assert_eq!(source.objects().pods[&("n".into(), "a".into())].status.pod_ip, "10.0.0.1");
        assert_eq!(
            problems(&source),
            ["b.yaml:1: Pod n/a is already in a.yaml:1, which counts; this one is ignored"]
        );
    }

    #[tokio::test]
    async fn changes_are_seen_and_a_broken_file_keeps_what_it_held() {
        let temp = Temp::new("changes");
        temp.put("a.yaml", &pod("a"));
        let mut source = DirSource::open(&temp.0).unwrap();
        assert_eq!(source.objects().pods.len(), 1);
        temp.put("b.yaml", &pod("b"));
        changed(&mut source).await;
        assert_eq!(source.objects().pods.len(), 2);
        // In place, and broken.
        fs::write(temp.0.join("a.yaml"), "kind: [").unwrap();
        changed(&mut source).await;
        assert_eq!(source.objects().pods.len(), 2);
        assert!(problems(&source)[0].contains("stays in force"), "{:?}", problems(&source));
        fs::remove_file(temp.0.join("a.yaml")).unwrap();
        changed(&mut source).await;
        assert_eq!(source.objects().pods.len(), 1);
        assert_eq!(problems(&source), Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_file_being_written_is_not_read() {
        let temp = Temp::new("writing");
        temp.put("a.yaml", &format!("{}---\n{}", pod("a"), pod("b")));
        let mut source = DirSource::open(&temp.0).unwrap();
        let mut file = File::options().write(true).truncate(true).open(temp.0.join("a.yaml")).unwrap();
        file.write_all(pod("a").as_bytes()).unwrap();
        let early = tokio::time::timeout(Duration::from_millis(200), source.changed()).await;
        assert!(early.is_err(), "half a file was read");
        assert_eq!(source.objects().pods.len(), 2);
        file.write_all(format!("---\n{}---\n{}", pod("b"), pod("c")).as_bytes()).unwrap();
        drop(file);
        changed(&mut source).await;
        assert_eq!(source.objects().pods.len(), 3);
    }

    #[tokio::test]
    async fn one_leads_and_what_it_writes_the_others_see() {
        let temp = Temp::new("lead");
        let mut a = DirSource::open(&temp.0).unwrap();
        let mut b = DirSource::open(&temp.0).unwrap();
        assert!(a.lead().unwrap() && a.lead().unwrap());
        assert!(!b.lead().unwrap());
        let cluster = Cluster { tunnel: crate::objects::Tunnel { port: 4795, vni: 7 } };
        a.write(Write::Cluster(cluster)).await.unwrap();
        changed(&mut b).await;
        assert_eq!(b.objects().cluster, Some(cluster));
        let mut node = EgressNode::default();
        node.metadata.name = "x".into();
        b.write(Write::EgressNode(node.clone())).await.unwrap();
        changed(&mut a).await;
        while a.objects().egress_nodes.is_empty() {
            changed(&mut a).await;
        }
        assert_eq!(a.objects().egress_nodes["x"], node);
        drop(a);
        assert!(b.lead().unwrap());
    }

    #[tokio::test]
    async fn a_directory_that_is_gone_ends_nothing_and_nobody_leads_twice() {
        let temp = Temp::new("gone");
        temp.put("a.yaml", &pod("a"));
        let mut source = DirSource::open(&temp.0).unwrap();
        assert!(source.lead().unwrap());
        fs::remove_dir_all(&temp.0).unwrap();
        fs::create_dir(&temp.0).unwrap();
        tokio::time::timeout(RESCAN * 2, source.changed()).await.unwrap().unwrap();
        assert_eq!(source.objects().pods.len(), 1);
        assert!(!source.complete());
        assert!(problems(&source)[0].contains("unmounted"), "{:?}", problems(&source));
        assert!(source.lead().is_err());
        assert!(source.write(Write::EgressNode(EgressNode::default())).await.is_err());
        assert!(!temp.0.join(".outgate").exists());
        // Somebody starts anew there.
        let mut other = DirSource::open(&temp.0).unwrap();
        assert!(other.lead().unwrap());
        tokio::time::timeout(RESCAN * 2, source.changed()).await.unwrap().unwrap();
        assert!(source.objects().pods.is_empty());
        assert!(!source.lead().unwrap());
    }

    #[tokio::test]
    async fn a_broken_file_keeps_what_it_held_over_a_restart() {
        let temp = Temp::new("copies");
        temp.put("a.yaml", &pod("a"));
        temp.put("b.yaml", &pod("b"));
        temp.put("secret.yaml", "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\n");
        let mut source = DirSource::open(&temp.0).unwrap();
        assert!(source.lead().unwrap());
        temp.put("a.yaml", &format!("{}---\n{}", pod("a"), pod("c")));
        changed(&mut source).await;
        fs::remove_file(temp.0.join("b.yaml")).unwrap();
        changed(&mut source).await;
        temp.put("a.yaml", "kind: [");
        changed(&mut source).await;
        assert_eq!(source.objects().pods.len(), 2);
        drop(source);
        let copies: Vec<_> = list(&temp.0.join(COPIES), |_| true).unwrap().into_keys().collect();
        assert_eq!(copies, ["a.yaml"]);
        let mut source = DirSource::open(&temp.0).unwrap();
        assert_eq!(source.objects().pods.len(), 2);
        assert!(source.complete());
        assert!(problems(&source)[0].contains("stays in force"), "{:?}", problems(&source));
        assert!(source.lead().unwrap());
        fs::remove_file(temp.0.join("a.yaml")).unwrap();
        changed(&mut source).await;
        assert!(source.objects().pods.is_empty());
        assert!(list(&temp.0.join(COPIES), |_| true).unwrap().is_empty());
    }

    #[test]
    fn an_allocation_that_cannot_be_read_is_named() {
        let temp = Temp::new("unreadable");
        fs::create_dir_all(temp.0.join(".outgate/egressallocations")).unwrap();
        fs::write(temp.0.join(".outgate/egressallocations/192.0.2.1.yaml"), "spec: [").unwrap();
        let source = DirSource::read(&temp.0).unwrap();
        assert!(source.unreadable_allocations().contains("192.0.2.1"));
    }

    /// A firewall whose file were not read would be no firewall.
    #[test]
    fn mistakes_in_a_firewalls_rules_leave_its_file_readable() {
        let temp = Temp::new("firewall");
        temp.put(
            "a.yaml",
            &format!(
                "apiVersion: k8s.ovn.org/v1\nkind: EgressFirewall\nmetadata: {{name: default, namespace: n}}\nspec: {{egress: [{{type: 7, to: [], ports: yes}}]}}\n---\n{}",
                pod("p")
            ),
        );
        temp.put(
            "b.json",
            r#"{"apiVersion": "k8s.ovn.org/v1", "kind": "EgressFirewall", "metadata": {"name": "default"}}"#,
        );
        let source = DirSource::read(&temp.0).unwrap();
        assert_eq!(problems(&source), Vec::<String>::new());
        let objects = source.objects();
        let rules = |namespace: &str| {
            let o = &objects.egress_firewalls[&(namespace.to_owned(), "default".to_owned())];
            o.spec.firewall(&o.metadata, &BTreeMap::new()).rules.unwrap_err()
        };
        assert!(rules("n").contains("spec.egress[0].type: 7 is neither"), "{}", rules("n"));
        assert_eq!(rules("default"), "spec: is missing; expected an object");
        assert_eq!(objects.pods.len(), 1);
    }

    #[tokio::test]
    async fn a_firewalls_status_is_a_file_by_its_namespace() {
        let temp = Temp::new("firewall-status");
        let mut source = DirSource::open(&temp.0).unwrap();
        let mut report = EgressFirewallReport::default();
        (report.metadata.name, report.metadata.namespace) = ("default".into(), "shop".into());
        report.status.messages = vec!["a: EgressFirewall Rules applied".into()];
        source.write(Write::FirewallStatus(report.clone())).await.unwrap();
        let again = DirSource::read(&temp.0).unwrap();
        assert_eq!(again.firewall_statuses(), &BTreeMap::from([("shop".to_owned(), report)]));
        let file = temp.0.join(".outgate/status/egressfirewalls/shop.yaml");
        fs::copy(&file, file.with_file_name("other.yaml")).unwrap();
        let again = DirSource::read(&temp.0).unwrap();
        assert_eq!(again.firewall_statuses().len(), 1);
        assert!(
            problems(&again)[0].contains("metadata.namespace is \"shop\", the file's name says \"other\"")
        );
        source.write(Write::RemoveFirewallStatus("shop".into())).await.unwrap();
        assert!(source.firewall_statuses().is_empty() && !file.exists());
    }

    #[test]
    fn yaml_is_split_at_markers_only() {
        let text = "a: |\n  ---\n  x\n--- # second\nb: 1\n---\n# nothing\n---x: 1\n";
        let parts = split_yaml(text);
        assert_eq!(parts.iter().map(|p| p.0).collect::<Vec<_>>(), [1, 4, 6]);
        assert!(parts[0].1.contains("  ---"));
    }

    proptest::proptest! {
        /// People save half-written files; editors write anything.
        #[test]
        fn no_text_breaks_the_parser(
            text in r#"(apiVersion: v1\n|kind: (Pod|List|Node)\n|metadata:|---\n|\.\.\.\n|[ \t\[\]{}:,\-"'|>&*!%#\n]|[a-z0-9]|\PC){0,60}"#,
            json: bool,
        ) {
            if let Err(message) = parse_file(&text, json) {
                proptest::prop_assert!(message.starts_with("line "), "{}", message);
            }
        }
    }
}
