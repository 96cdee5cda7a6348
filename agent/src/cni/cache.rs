//! libcni's result cache: one file for each network of each sandbox on the node, written as soon as the plugins
//! have returned and before the sandbox's containers start, removed after DEL.
//!
//! Name and format are `getCacheFilePath`, `cacheAdd` and `cachedInfo` in containernetworking/cni, libcni/api.go:
//! `DIR/results/NETWORK-CONTAINER-IFNAME` with `kind: cniCacheV1`. DIR is `/var/lib/cni` (`CacheDir`) unless the
//! runtime gives another; containerd (containerd/go-cni, cni.go: `CNIConfig{Path: …}`) and CRI-O do not. Files are
//! truncated and written in place (`os.WriteFile`), so they are read when their writer closes them. libcni does
//! not remove those of configurations before CNI 0.4.0 (`DelNetworkList`), nor does anybody when a node reboots:
//! files from before the boot do not count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use notify::event::{AccessKind, AccessMode, ModifyKind, RenameMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Attachment;
use super::attachment::{Arguments, CniResult, INTERFACE};
use crate::watch::Problem;

/// Where libcni has it unless it is told otherwise.
pub const RESULTS: &str = "/var/lib/cni/results";

/// `cachedInfo.Kind`.
const KIND: &str = "cniCacheV1";
/// A result with its configuration has a few kilobytes.
const LARGEST: u64 = 1 << 20;
/// A file that cannot be read and is younger than this may still be being written.
const YOUNG: Duration = Duration::from_secs(2);
/// Everything is looked at this often even if inotify says nothing.
const RESCAN: Duration = Duration::from_secs(30);

/// The directory, as it is watched.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    watcher: Option<RecommendedWatcher>,
    events: mpsc::UnboundedReceiver<notify::Result<notify::Event>>,
    /// The directory, or while it is not there the nearest one above it.
    watched: Option<PathBuf>,
    files: BTreeMap<PathBuf, Attachment>,
    broken: BTreeMap<PathBuf, Problem>,
    /// Why changes are not seen.
    blind: Option<Problem>,
    /// What is said of them: both of the above.
    problems: BTreeSet<Problem>,
    /// Files from before it are another boot's.
    booted: SystemTime,
    /// When everything is looked at again.
    due: Instant,
}

impl Cache {
    /// Watches a directory, which need not be there yet.
    #[must_use]
    pub fn open(dir: &Path) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let watcher = notify::recommended_watcher(move |event| {
            // The receiver is gone only when the agent ends.
            let _ = sender.send(event);
        });
        let mut cache = Self {
            dir: dir.to_owned(),
            watcher: None,
            events,
            watched: None,
            files: BTreeMap::new(),
            broken: BTreeMap::new(),
            blind: None,
            problems: BTreeSet::new(),
            booted: booted(),
            due: Instant::now() + RESCAN,
        };
        match watcher {
            Ok(watcher) => cache.watcher = Some(watcher),
            Err(error) => cache.cannot_watch(&error),
        }
        cache.attach();
        cache
    }

    /// Waits until something else is known. Cancelling it loses nothing.
    pub async fn changed(&mut self) {
        loop {
            let event = tokio::select! {
                // Without a watcher nobody sends; looking now and then is all that is left.
                Some(event) = self.events.recv() => Some(event),
                () = tokio::time::sleep_until(self.due) => None,
            };
            let mut changed = if let Some(event) = event {
                self.digest(event)
            } else {
                self.due = Instant::now() + RESCAN;
                self.attach()
            };
            while let Ok(event) = self.events.try_recv() {
                changed |= self.digest(event);
            }
            if changed {
                return;
            }
        }
    }

    /// What the files say.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.files.values()
    }

    /// What is wrong with the directory or its files.
    pub const fn problems(&self) -> &BTreeSet<Problem> {
        &self.problems
    }

    /// Takes up an event. Whether anything is known that was not.
    fn digest(&mut self, event: notify::Result<notify::Event>) -> bool {
        let Ok(event) = event else { return self.attach() };
        let about_watched = event.paths.iter().any(|path| Some(path) == self.watched.as_ref());
        if event.need_rescan() || self.watched.as_ref() != Some(&self.dir) {
            return self.attach();
        }
        let gone = matches!(
            event.kind,
            EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(RenameMode::From | RenameMode::Any))
        );
        if about_watched && gone {
            // The watch went with it.
            self.watched = None;
            return self.attach();
        }
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(_))
            | EventKind::Remove(_) => {
                let mut changed = false;
                for path in event.paths {
                    changed |= self.look_at(path, true);
                }
                changed
            }
            // What is being written is looked at when it is closed.
            EventKind::Any
            | EventKind::Access(_)
            | EventKind::Create(_)
            | EventKind::Modify(_)
            | EventKind::Other => false,
        }
    }

    /// Watches the directory, or the nearest one above it that is there, and reads all.
    fn attach(&mut self) -> bool {
        loop {
            let nearest = self.dir.ancestors().find(|path| path.is_dir()).map(Path::to_owned);
            if nearest == self.watched {
                break;
            }
            let Some(watcher) = &mut self.watcher else { break };
            if let Some(old) = self.watched.take() {
                // It may be gone, and its watch with it.
                let _ = watcher.unwatch(&old);
            }
            let Some(path) = nearest else { break };
            match watcher.watch(&path, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.watched = Some(path);
                    self.blind = None;
                }
                // It went meanwhile.
                Err(_) if !path.is_dir() => {}
                Err(error) => {
                    self.cannot_watch(&error);
                    break;
                }
            }
            // What was made before the watch has made no event: look again.
        }
        self.scan()
    }

    fn cannot_watch(&mut self, error: &notify::Error) {
        self.blind = Some(Problem::new(
            self.dir.display(),
            format_args!(
                "cannot be watched: {error}; new pods are known when the API says their addresses. Maybe \
                 fs.inotify.max_user_watches or max_user_instances is too low"
            ),
        ));
    }

    fn scan(&mut self) -> bool {
        let mut there = BTreeSet::new();
        let mut changed = false;
        match fs::read_dir(&self.dir) {
            Ok(entries) => {
                for path in entries.flatten().map(|entry| entry.path()) {
                    changed |= self.look_at(path.clone(), false);
                    there.insert(path);
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                self.blind = Some(Problem::new(self.dir.display(), format_args!("cannot be read: {error}")));
            }
        }
        let before = self.files.len();
        self.files.retain(|path, _| there.contains(path));
        self.broken.retain(|path, _| there.contains(path));
        changed |= before != self.files.len();
        self.say() || changed
    }

    /// Reads one file. `closed`: nobody is writing it.
    fn look_at(&mut self, path: PathBuf, closed: bool) -> bool {
        let read = read(&path, self.booted);
        let changed = match read {
            Ok(Some(attachment)) => {
                self.broken.remove(&path);
                self.files.get(&path) != Some(&attachment) && {
                    self.files.insert(path, attachment);
                    true
                }
            }
            Ok(None) => {
                self.broken.remove(&path);
                self.files.remove(&path).is_some()
            }
            // Its close is to come.
            Err(_) if !closed && is_young(&path) => false,
            Err(message) => {
                let text =
                    format!("not understood, so that pod is known when the API says its address: {message}");
                self.broken.insert(path.clone(), Problem::new(path.display(), text));
                self.files.remove(&path).is_some()
            }
        };
        self.say() || changed
    }

    /// Whether there is something else to say.
    fn say(&mut self) -> bool {
        let now: BTreeSet<_> = self.broken.values().chain(&self.blind).cloned().collect();
        let news = now != self.problems;
        self.problems = now;
        news
    }
}

/// When the kernel started.
fn booted() -> SystemTime {
    let up = clock_gettime(ClockId::Boottime);
    let up =
        Duration::new(up.tv_sec.try_into().unwrap_or_default(), up.tv_nsec.try_into().unwrap_or_default());
    SystemTime::now().checked_sub(up).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn is_young(path: &Path) -> bool {
    let written = fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    // A time to come is young too.
    SystemTime::now().duration_since(written).is_ok_and(|age| age < YOUNG)
}

/// `cachedInfo`, as far as it is read here.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct CachedInfo {
    kind: String,
    container_id: String,
    if_name: String,
    cni_args: Option<Vec<(String, String)>>,
    result: Option<CniResult>,
}

/// What one file says; nothing if it is of no pod's first interface, or gone.
fn read(path: &Path, booted: SystemTime) -> Result<Option<Attachment>, String> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    let written = metadata.modified().map_err(|error| error.to_string())?;
    if !metadata.is_file() || written < booted {
        return Ok(None);
    }
    let mut text = Vec::new();
    file.take(LARGEST).read_to_end(&mut text).map_err(|error| error.to_string())?;
    parse(&text, written)
}

fn parse(text: &[u8], written: SystemTime) -> Result<Option<Attachment>, String> {
    let info: CachedInfo = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    // Before libcni 0.8 the file was the result alone, which names no pod.
    if info.kind != KIND || info.if_name != INTERFACE {
        return Ok(None);
    }
    let arguments = info.cni_args.unwrap_or_default();
    let arguments: Arguments = arguments.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let (Some((namespace, name, uid)), Some(result)) = (arguments.pod(), info.result) else {
        return Ok(None);
    };
    let addresses = result.addresses().map_err(|error| error.to_string())?;
    Ok(Some(Attachment {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: uid.to_owned(),
        container: info.container_id,
        addresses,
        interfaces: result.host_interfaces(),
        written,
    })
    .filter(|a| !a.addresses.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    /// Of `bridge`, as libcni 1.1 writes it; `config` is base64, as Go marshals bytes.
    const FILE: &str = r#"{"kind":"cniCacheV1","containerId":"c1","config":"e30=","ifName":"eth0","networkName":"lab",
        "netns":"/run/netns/x","cniArgs":[["IgnoreUnknown","1"],["K8S_POD_NAMESPACE","shop"],["K8S_POD_NAME","web"],
        ["K8S_POD_INFRA_CONTAINER_ID","c1"],["K8S_POD_UID","u1"]],"capabilityArgs":{"portMappings":[]},
        "result":{"cniVersion":"1.0.0","dns":{},"interfaces":[{"name":"veth1","mac":"02:00:00:00:00:02"},
        {"name":"eth0","mac":"02:00:00:00:00:03","sandbox":"/run/netns/x"}],
        "ips":[{"address":"10.244.1.2/24","gateway":"10.244.1.1","interface":1}],"routes":[{"dst":"0.0.0.0/0"}]}}"#;

    struct Dir(PathBuf);

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    impl Dir {
        fn new(test: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("outgate-cni-{test}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }
    }

    fn names(cache: &Cache) -> Vec<String> {
        cache.attachments().map(|a| format!("{} {}", a.name, a.addresses[0])).collect()
    }

    /// Waits until the cache says so.
    async fn until(cache: &mut Cache, wanted: &[&str]) {
        let limit = Duration::from_secs(10);
        while names(cache) != wanted {
            tokio::time::timeout(limit, cache.changed())
                .await
                .unwrap_or_else(|_| panic!("{:?}, not {wanted:?}", names(cache)));
        }
    }

    #[test]
    fn a_file_is_read_as_libcni_writes_it() {
        let of = |text: &str| parse(text.as_bytes(), SystemTime::UNIX_EPOCH);
        let a = of(FILE).unwrap().unwrap();
        assert_eq!((&*a.namespace, &*a.name, &*a.uid, &*a.container), ("shop", "web", "u1", "c1"));
        assert_eq!(
            (a.addresses, a.interfaces),
            (vec!["10.244.1.2".parse().unwrap()], vec!["veth1".to_owned()])
        );
        for (what, with) in [
            ("\"ifName\":\"eth0\"", "\"ifName\":\"lo\""),
            ("cniCacheV1", "another"),
            ("K8S_POD_NAME\"", "OTHER\""),
            ("\"interface\":1", "\"interface\":0"),
            ("\"result\"", "\"other\""),
        ] {
            assert!(FILE.contains(what), "{what}");
            assert_eq!(of(&FILE.replace(what, with)), Ok(None), "{what}");
        }
        for wrong in [
            "",
            "{",
            &FILE[..200],
            &FILE.replace("10.244.1.2/24", "10.244.1/24"),
            &FILE.replace("\"ips\"", "\"ip4\""),
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn files_from_before_the_boot_say_nothing() {
        let dir = Dir::new("boot");
        let path = dir.0.join("lab-c1-eth0");
        fs::write(&path, FILE).unwrap();
        assert!(read(&path, booted()).unwrap().is_some());
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(booted() - Duration::from_mins(1))
            .unwrap();
        assert_eq!(read(&path, booted()), Ok(None));
    }

    #[tokio::test]
    async fn the_directory_may_come_late_and_go() {
        let dir = Dir::new("late");
        let results = dir.0.join("lib/cni/results");
        let mut cache = Cache::open(&results);
        assert!(cache.problems().is_empty());
        fs::create_dir_all(&results).unwrap();
        fs::write(results.join("lab-c1-eth0"), FILE).unwrap();
        until(&mut cache, &["web 10.244.1.2"]).await;
        fs::remove_dir_all(dir.0.join("lib")).unwrap();
        until(&mut cache, &[]).await;
        fs::create_dir_all(&results).unwrap();
        fs::write(results.join("lab-c1-eth0"), FILE).unwrap();
        until(&mut cache, &["web 10.244.1.2"]).await;
    }

    #[tokio::test]
    async fn files_come_when_they_are_whole_and_go() {
        let dir = Dir::new("whole");
        let path = dir.0.join("lab-c1-eth0");
        let mut half = File::create(&path).unwrap();
        half.write_all(&FILE.as_bytes()[..300]).unwrap();
        let mut cache = Cache::open(&dir.0);
        assert_eq!((names(&cache).len(), cache.problems().len()), (0, 0), "it is being written");
        half.write_all(&FILE.as_bytes()[300..]).unwrap();
        drop(half);
        until(&mut cache, &["web 10.244.1.2"]).await;
        // In place, as `os.WriteFile` does.
        fs::write(&path, FILE.replace("10.244.1.2", "10.244.1.3")).unwrap();
        until(&mut cache, &["web 10.244.1.3"]).await;
        let other = FILE.replace("\"web\"", "\"db\"");
        fs::write(dir.0.join(".new"), &other).unwrap();
        fs::rename(dir.0.join(".new"), dir.0.join("lab-c2-eth0")).unwrap();
        until(&mut cache, &["web 10.244.1.3", "db 10.244.1.2"]).await;
        fs::write(&path, "{").unwrap();
        until(&mut cache, &["db 10.244.1.2"]).await;
        let problems: Vec<_> = cache.problems().iter().map(ToString::to_string).collect();
        assert!(matches!(&problems[..], [p] if p.contains("lab-c1-eth0: not understood")), "{problems:?}");
        fs::remove_file(dir.0.join("lab-c2-eth0")).unwrap();
        until(&mut cache, &[]).await;
        fs::remove_file(&path).unwrap();
        tokio::time::timeout(Duration::from_secs(10), cache.changed()).await.unwrap();
        assert!(cache.problems().is_empty());
    }
}
