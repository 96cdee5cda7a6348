//! The agent's side of the chained CNI plugin: a unix socket, a line of JSON each way.
//!
//! A sandbox that is asked about is known from that moment, and the answer is sent when the kernel has it, by what the
//! node's interfaces are by then: the pod's own is older than the question, but what the agent knows may be older still.
//! On an interface that is not programmed yet, an unselected pod's packets are held, too. A sandbox is
//! forgotten when its pod's status says the same, when the pod goes, on DEL, and when whoever asked hangs up
//! before it was answered, for then the runtime makes another.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, oneshot};
use tracing::debug;

use super::Attachment;
use super::known::{is_same, status_addresses};
use crate::facts::Fresh;
use crate::model::has_network;
use crate::objects::Objects;

/// Where the plugin asks unless it is told otherwise.
pub const SOCKET: &str = "/run/outgate/cni.sock";

/// The longest question, in bytes.
const LINE: u64 = 64 << 10;
/// Who has not asked by then is gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest wait that can be asked for.
const LONGEST: Duration = Duration::from_mins(2);
/// How many may ask at the same time; others wait until they are let in. A node has 110 pods unless told otherwise.
const MANY: usize = 512;

/// What the plugin asks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "command")]
pub enum Question {
    /// Take these addresses for the pod's, and answer when the kernel has them.
    #[serde(rename = "ADD", rename_all = "camelCase")]
    Add {
        /// The sandbox.
        attachment: Attachment,
        /// How long to wait at most.
        timeout_milliseconds: u64,
    },
    /// Answer when the kernel has these addresses.
    #[serde(rename = "CHECK", rename_all = "camelCase")]
    Check {
        /// The sandbox.
        attachment: Attachment,
        /// How long to wait at most.
        timeout_milliseconds: u64,
    },
    /// The sandbox is going away.
    #[serde(rename = "DEL")]
    Del {
        /// Its identifier.
        container: String,
    },
    /// Whether ADD would be served.
    #[serde(rename = "STATUS")]
    Status,
}

/// What the agent answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it is so.
    pub ok: bool,
    /// If not: what is missing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

impl Answer {
    fn of(result: Result<(), String>) -> Self {
        match result {
            Ok(()) => Self { ok: true, message: String::new() },
            Err(message) => Self { ok: false, message },
        }
    }
}

/// The socket, and who waits at it.
#[derive(Debug)]
pub struct Door {
    shared: Rc<Shared>,
    path: PathBuf,
    /// The socket's inode, by which it is known from a later agent's.
    inode: u64,
}

#[derive(Debug)]
struct Shared {
    state: RefCell<State>,
    news: Notify,
    fresh: Fresh,
}

#[derive(Debug, Default)]
struct State {
    /// Sandboxes that were asked about, by identifier.
    sandboxes: BTreeMap<String, Attachment>,
    waiting: BTreeMap<u64, Waiting>,
    next: u64,
    not_ready: Option<String>,
}

#[derive(Debug)]
struct Waiting {
    attachment: Attachment,
    interfaces: Interfaces,
    /// What is missing.
    why: String,
    done: oneshot::Sender<()>,
}

/// Since when the node's interfaces that the agent goes by are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Interfaces {
    /// Perhaps from before the question.
    Old,
    /// They have been read since.
    Read,
    /// And what is programmed now, if all is well, is by these.
    Used,
}

/// The socket cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve the CNI plugin at {}: {error}; --cni-socket can name another place", path.display())]
pub struct Error {
    path: PathBuf,
    error: std::io::Error,
}

impl Door {
    /// Makes the socket, in place of one that an earlier agent left, and serves it in a task of the current
    /// `LocalSet`. `fresh` has the node's interfaces read, which [`Door::begin`]'s caller then uses.
    pub fn open(path: &Path, fresh: Fresh) -> Result<Self, Error> {
        let failure = |error| Error { path: path.to_owned(), error };
        let (listener, inode) = listen(path).map_err(failure)?;
        let state =
            State { not_ready: Some("the node's agent has just started".to_owned()), ..State::default() };
        let shared = Rc::new(Shared { state: RefCell::new(state), news: Notify::new(), fresh });
        tokio::task::spawn_local(serve(listener, Rc::clone(&shared)));
        Ok(Self { shared, path: path.to_owned(), inode })
    }

    /// Waits until somebody is to be answered or leaves. Cancelling it loses nothing.
    pub async fn changed(&self) {
        self.shared.news.notified().await;
    }

    /// The sandboxes that were asked about.
    #[must_use]
    pub fn attachments(&self) -> Vec<Attachment> {
        self.shared.state.borrow().sandboxes.values().cloned().collect()
    }

    /// Whether ADD is served now, and if not why.
    pub fn set_not_ready(&self, why: Option<String>) {
        self.shared.state.borrow_mut().not_ready = why;
    }

    /// Whether somebody waits for an answer.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        !self.shared.state.borrow().waiting.is_empty()
    }

    /// To be called before the node's interfaces are looked up, by which pods are then programmed: who asks later, or
    /// whose interface may not be among them, is not answered this time.
    pub fn begin(&self) {
        for waiting in self.shared.state.borrow_mut().waiting.values_mut() {
            if waiting.interfaces == Interfaces::Read {
                waiting.interfaces = Interfaces::Used;
            }
        }
    }

    /// Answers those whose pods are programmed.
    pub fn answer(&self, programmed: impl Fn(&Attachment) -> Result<(), String>) {
        let mut state = self.shared.state.borrow_mut();
        let waiting = std::mem::take(&mut state.waiting);
        for (number, mut waiting) in waiting {
            if waiting.interfaces == Interfaces::Used {
                match programmed(&waiting.attachment) {
                    // Whoever has left forgets the sandbox itself.
                    Ok(()) => {
                        let _ = waiting.done.send(());
                        continue;
                    }
                    Err(why) => waiting.why = why,
                }
            }
            state.waiting.insert(number, waiting);
        }
    }

    /// Forgets sandboxes that the objects say enough of: whose pod's status has the same addresses, or is gone.
    pub fn forget(&self, objects: &Objects) {
        let State { sandboxes, waiting, .. } = &mut *self.shared.state.borrow_mut();
        sandboxes.retain(|container, a| {
            let pod = objects.pods.get(&(a.namespace.clone(), a.name.clone())).filter(|pod| is_same(a, pod));
            match pod {
                None => waiting.values().any(|w| w.attachment.container == *container),
                Some(pod) => {
                    let said: Vec<_> = status_addresses(pod).collect();
                    has_network(pod) && !a.addresses.iter().all(|ip| said.contains(ip))
                        || waiting.values().any(|w| w.attachment.container == *container)
                }
            }
        });
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // A later agent's is not ours to remove.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn listen(path: &Path) -> std::io::Result<(UnixListener, u64)> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    // Beside it and renamed: there is no moment without a socket, nor one where others may connect.
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(beside);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    fs::set_permissions(&beside, Permissions::from_mode(0o600))?;
    let inode = fs::symlink_metadata(&beside)?.ino();
    fs::rename(&beside, path)?;
    Ok((listener, inode))
}

async fn serve(listener: UnixListener, shared: Rc<Shared>) {
    let room = std::sync::Arc::new(Semaphore::new(MANY));
    loop {
        let Ok(permit) = std::sync::Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = Rc::clone(&shared);
                tokio::task::spawn_local(async move {
                    if let Err(error) = talk(stream, &shared).await {
                        debug!("CNI plugin: {error}");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of file descriptors.
                debug!("CNI plugin: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn talk(stream: UnixStream, shared: &Shared) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader.take(LINE));
    let mut line = String::new();
    tokio::time::timeout(PATIENCE, reader.read_line(&mut line)).await??;
    let mut reader = reader.into_inner().into_inner();
    let result = match serde_json::from_str(&line) {
        Err(error) => {
            Err(format!("the question is not understood: {error}; are plugin and agent of one version?"))
        }
        Ok(Question::Status) => shared.state.borrow().not_ready.clone().map_or(Ok(()), Err),
        Ok(Question::Del { container }) => {
            if shared.state.borrow_mut().sandboxes.remove(&container).is_some() {
                shared.news.notify_one();
            }
            Ok(())
        }
        Ok(Question::Add { attachment, timeout_milliseconds: t }) => {
            wait(shared, attachment, true, t, &mut reader).await
        }
        Ok(Question::Check { attachment, timeout_milliseconds: t }) => {
            wait(shared, attachment, false, t, &mut reader).await
        }
    };
    let mut answer = serde_json::to_string(&Answer::of(result))?;
    answer.push('\n');
    writer.write_all(answer.as_bytes()).await
}

/// Waits until the pod is programmed, the time is over, or whoever asks hangs up.
async fn wait(
    shared: &Shared,
    mut attachment: Attachment,
    add: bool,
    milliseconds: u64,
    reader: &mut OwnedReadHalf,
) -> Result<(), String> {
    let limit = Duration::from_millis(milliseconds).min(LONGEST);
    let container = attachment.container.clone();
    let (done, mut answered) = oneshot::channel();
    let number = {
        let mut state = shared.state.borrow_mut();
        attachment.written = SystemTime::now();
        if add {
            state.sandboxes.insert(container.clone(), attachment.clone());
        }
        state.next += 1;
        let number = state.next;
        let why = "the node's agent has not read the node's interfaces since".to_owned();
        state.waiting.insert(number, Waiting { attachment, interfaces: Interfaces::Old, why, done });
        number
    };
    let look = async {
        let looked = shared.fresh.look().await;
        if let Some(waiting) = shared.state.borrow_mut().waiting.get_mut(&number) {
            match looked {
                Ok(()) => {
                    waiting.interfaces = Interfaces::Read;
                    "the node's agent is busy".clone_into(&mut waiting.why);
                }
                Err(ended) => waiting.why = ended.to_string(),
            }
        }
        shared.news.notify_one();
        std::future::pending().await
    };
    let programmed = tokio::select! {
        biased;
        done = &mut answered => done.is_ok(),
        never = look => never,
        () = tokio::time::sleep(limit) => false,
        // Nothing more is to come: the end of the stream, or nonsense.
        _ = reader.read_u8() => false,
    };
    let mut state = shared.state.borrow_mut();
    let waiting = state.waiting.remove(&number);
    if programmed {
        return Ok(());
    }
    if add {
        state.sandboxes.remove(&container);
        shared.news.notify_one();
    }
    Err(waiting.map(|w| w.why).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::thread::{JoinHandle, spawn};

    use tokio::task::LocalSet;

    use super::*;
    use crate::cni::plugin::ask;
    use crate::facts::{Requests, fresh};

    struct Dir(PathBuf);

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn dir(test: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("outgate-door-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Dir(dir)
    }

    fn attachment() -> Attachment {
        Attachment {
            namespace: "shop".into(),
            name: "web".into(),
            uid: "u".into(),
            container: "c".into(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            interfaces: vec!["veth1".into()],
            written: SystemTime::UNIX_EPOCH,
        }
    }

    fn add(timeout_milliseconds: u64) -> Question {
        Question::Add { attachment: attachment(), timeout_milliseconds }
    }

    /// Asks in a thread of its own, as another process would.
    fn asking(path: &Path, question: Question) -> JoinHandle<std::io::Result<Answer>> {
        let path = path.to_owned();
        spawn(move || ask(&path, &question, Duration::from_secs(10)))
    }

    async fn answered(asking: JoinHandle<std::io::Result<Answer>>) -> Answer {
        while !asking.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        asking.join().unwrap().unwrap()
    }

    /// Waits until the door knows so many sandboxes, and the node's interfaces since then.
    async fn until(door: &Door, sandboxes: usize) {
        let limit = Duration::from_secs(10);
        let reads = || door.shared.state.borrow().waiting.values().any(|w| w.interfaces == Interfaces::Old);
        while door.attachments().len() != sandboxes || reads() {
            tokio::time::timeout(limit, door.changed()).await.expect("it changes");
        }
    }

    /// As the agent does it.
    fn answer(door: &Door, programmed: impl Fn(&Attachment) -> Result<(), String>) {
        door.begin();
        door.answer(programmed);
    }

    fn read(requests: &mut Requests) {
        let served = requests.begin();
        requests.done(served);
    }

    /// Reads the node's interfaces whenever it is asked to.
    fn reading() -> Fresh {
        let (fresh, mut requests) = fresh();
        tokio::task::spawn_local(async move {
            loop {
                requests.asked().await;
                read(&mut requests);
            }
        });
        fresh
    }

    async fn with(test: &str, then: impl AsyncFnOnce(Door, PathBuf)) {
        let dir = dir(test);
        let path = dir.0.join("run/cni.sock");
        LocalSet::new()
            .run_until(async { then(Door::open(&path, reading()).unwrap(), path.clone()).await })
            .await;
    }

    #[tokio::test]
    async fn whoever_asks_waits_until_the_pod_is_programmed() {
        with("waits", async |door, path| {
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
            let asking = asking(&path, add(60_000));
            until(&door, 1).await;
            assert_eq!(door.attachments()[0].addresses, attachment().addresses);
            assert!(door.attachments()[0].written > SystemTime::UNIX_EPOCH);
            answer(&door, |_| Err("not yet".to_owned()));
            assert!(door.is_asked() && !asking.is_finished());
            answer(&door, |a| if a.name == "web" { Ok(()) } else { Err(String::new()) });
            assert_eq!(answered(asking).await, Answer::of(Ok(())));
            // Known until its status says so.
            let pod = |ip: &str| -> Objects {
                let yaml = format!("metadata: {{uid: u}}\nstatus: {{podIP: '{ip}'}}");
                let pod = serde_saphyr::from_str(&yaml).unwrap();
                Objects { pods: [(("shop".to_owned(), "web".to_owned()), pod)].into(), ..Objects::default() }
            };
            for (ip, left) in [("", 1), ("10.0.0.9", 1), ("10.0.0.1", 0)] {
                door.forget(&pod(ip));
                assert_eq!(door.attachments().len(), left, "{ip}");
            }
        })
        .await;
    }

    /// A pod's interface may be younger than what was known of the node when it was asked about.
    #[tokio::test]
    async fn nobody_is_answered_by_what_the_node_was_before_the_question() {
        let dir = dir("fresh");
        let path = dir.0.join("cni.sock");
        let test = async {
            let (fresh, mut requests) = fresh();
            let door = Door::open(&path, fresh).unwrap();
            let (first, check) = (
                asking(&path, add(60_000)),
                Question::Check { attachment: attachment(), timeout_milliseconds: 60_000 },
            );
            requests.asked().await;
            let asked_of = || {
                let asked = std::cell::Cell::new(0);
                door.answer(|_| {
                    asked.set(asked.get() + 1);
                    Err(String::new())
                });
                asked.get()
            };
            door.begin();
            assert_eq!(asked_of(), 0, "what is known is older");
            // Read while the agent is at work with what it had.
            read(&mut requests);
            until(&door, 1).await;
            assert_eq!(asked_of(), 0, "not used yet");
            door.begin();
            assert_eq!(asked_of(), 1);
            let second = asking(&path, check);
            requests.asked().await;
            door.begin();
            assert_eq!(asked_of(), 1, "each has its own question");
            read(&mut requests);
            until(&door, 1).await;
            answer(&door, |_| Ok(()));
            assert!(answered(first).await.ok && answered(second).await.ok);
            // Whose reader is gone is told so.
            drop(requests);
            let vain = answered(asking(&path, add(1))).await;
            assert!(vain.message.contains("not watched any more"), "{vain:?}");
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn whoever_waits_in_vain_is_told_why_and_leaves_nothing() {
        with("vain", async |door, path| {
            let hasty = asking(&path, add(200));
            until(&door, 1).await;
            answer(&door, |_| Err("no such pod".to_owned()));
            door.forget(&Objects::default());
            assert_eq!(door.attachments().len(), 1, "it is being waited for");
            assert_eq!(answered(hasty).await, Answer::of(Err("no such pod".to_owned())));
            until(&door, 0).await;
            // The runtime kills a plugin that takes too long for it.
            let mut killed = UnixStream::connect(&path).unwrap();
            killed
                .write_all(format!("{}\n", serde_json::to_string(&add(60_000)).unwrap()).as_bytes())
                .unwrap();
            until(&door, 1).await;
            drop(killed);
            until(&door, 0).await;
            assert!(!door.is_asked());
        })
        .await;
    }

    #[tokio::test]
    async fn sandboxes_go_with_del_and_with_their_pods() {
        with("del", async |door, path| {
            for gone in [false, true] {
                let asking = asking(&path, add(60_000));
                until(&door, 1).await;
                answer(&door, |_| Ok(()));
                answered(asking).await;
                if gone {
                    door.forget(&Objects::default());
                } else {
                    let del = Question::Del { container: "c".into() };
                    assert!(answered(self::asking(&path, del)).await.ok);
                }
                assert_eq!(door.attachments(), []);
            }
        })
        .await;
    }

    #[tokio::test]
    async fn status_and_nonsense_are_answered_at_once() {
        with("status", async |door, path| {
            let status = answered(asking(&path, Question::Status)).await;
            assert!(!status.ok && status.message.contains("just started"), "{status:?}");
            door.set_not_ready(None);
            assert!(answered(asking(&path, Question::Status)).await.ok);
            let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
            let (read, mut write) = stream.into_split();
            write.write_all(b"hello\n").await.unwrap();
            let mut line = String::new();
            BufReader::new(read).read_line(&mut line).await.unwrap();
            let answer: Answer = serde_json::from_str(&line).unwrap();
            assert!(!answer.ok && answer.message.contains("not understood"), "{answer:?}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_later_agent_takes_the_place() {
        with("place", async |first, path| {
            let second = Door::open(&path, reading()).unwrap();
            second.set_not_ready(None);
            drop(first);
            assert!(answered(asking(&path, Question::Status)).await.ok, "it is the second's");
            drop(second);
            assert!(!path.exists());
            // What a killed agent leaves is in nobody's way.
            fs::write(&path, "").unwrap();
            let third = Door::open(&path, reading()).unwrap();
            third.set_not_ready(None);
            assert!(answered(asking(&path, Question::Status)).await.ok);
        })
        .await;
    }
}
