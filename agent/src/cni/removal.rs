//! Takes what the agent and `outgate cni --install` have left on a node away: the socket with its directory, and the
//! plugin, once nobody needs it.
//!
//! A plugin that is configured and missing lets no pod start, nor end. CRI-O, other than containerd, ends a sandbox by the
//! configuration that it was made with, which libcni has cached (`TearDownPodWithContext`, pkg/ocicni/ocicni.go of
//! cri-o/ocicni). So the plugin stays while a configuration or a cached one names it.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use k8s_openapi::ByteString;
use serde::Deserialize;

use super::plugin::NAME;

/// Where a node's CNI configuration is.
pub const CONFIGURATION: &str = "/etc/cni/net.d";
/// What libcni reads there (`ConfFiles`, libcni/api.go of containernetworking/cni).
const ENDINGS: [&str; 3] = ["conf", "conflist", "json"];

/// What has become of a plugin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Plugin {
    /// There was none.
    Absent,
    /// It was removed.
    Removed(PathBuf),
    /// This configuration names it.
    Configured {
        /// The plugin, which stays.
        plugin: PathBuf,
        /// The file.
        by: PathBuf,
    },
    /// So many sandboxes were made with it.
    Used {
        /// The plugin, which stays.
        plugin: PathBuf,
        /// How many.
        sandboxes: usize,
    },
}

/// What went wrong, and where.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", path.display())]
pub struct Error {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Removes the plugin from a directory of plugins, unless it is needed. `configuration`: the node's; `results`: libcni's
/// cache.
pub fn plugin(bin: &Path, configuration: &Path, results: &Path) -> Result<Plugin, Error> {
    let plugin = bin.join(NAME);
    if fs::symlink_metadata(&plugin).is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        return Ok(Plugin::Absent);
    }
    for file in files(configuration)? {
        let is_read = file.extension().and_then(OsStr::to_str).is_some_and(|e| ENDINGS.contains(&e));
        if is_read && is_named(&read(&file)?) {
            return Ok(Plugin::Configured { plugin, by: file });
        }
    }
    let mut sandboxes = 0;
    for file in files(results)? {
        // What is no result of libcni's has no configuration.
        let cached: Cached = serde_json::from_slice(&read(&file)?).unwrap_or_default();
        sandboxes += usize::from(is_named(&cached.config.0));
    }
    if sandboxes > 0 {
        return Ok(Plugin::Used { plugin, sandboxes });
    }
    remove(&plugin)?;
    Ok(Plugin::Removed(plugin))
}

/// Removes the agent's socket, and its directory if that is Outgate's own. Returns what there was.
pub fn socket(socket: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut removed = Vec::new();
    let Some(dir) = socket.parent() else { return Ok(removed) };
    let own = socket.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for file in files(dir)? {
        // Or the one of an agent that ended before its socket had its name (`door.rs`).
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let rest = name.strip_prefix(&own).map(|rest| rest.strip_prefix('.').unwrap_or(rest));
        if rest.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit())) {
            remove(&file)?;
            removed.push(file);
        }
    }
    if dir.file_name() == Some(OsStr::new("outgate")) {
        match fs::remove_dir(dir) {
            Ok(()) => removed.push(dir.to_path_buf()),
            // Somebody else's are in it, or it was never made.
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::NotFound) => {}
            Err(source) => return Err(Error { what: "remove", path: dir.to_path_buf(), source }),
        }
    }
    Ok(removed)
}

/// An entry of libcni's cache (`cachedInfo`, libcni/api.go): its configuration is base64, as Go writes bytes.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Cached {
    config: ByteString,
}

/// Whether a configuration names the plugin: as `type`, which may stand in other plugins' configurations too.
fn is_named(text: &[u8]) -> bool {
    text.windows(NAME.len()).any(|window| window == NAME.as_bytes())
}

/// A directory's entries; none if it is not there.
fn files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error { what: "read", path: dir.to_path_buf(), source };
    match fs::read_dir(dir) {
        Ok(entries) => {
            let paths = entries.map(|entry| entry.map(|entry| entry.path()));
            let mut paths = paths.collect::<Result<Vec<_>, _>>().map_err(failed)?;
            paths.sort();
            Ok(paths)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

/// A file's content; nothing if it is gone, or is a directory.
fn read(path: &Path) -> Result<Vec<u8>, Error> {
    match fs::read(path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::IsADirectory) => Ok(Vec::new()),
        read => read.map_err(|source| Error { what: "read", path: path.to_path_buf(), source }),
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => {
            Err(Error { what: "remove", path: path.to_path_buf(), source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node(PathBuf);

    impl Node {
        fn new(test: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("outgate-removal-{test}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn write(&self, path: &str, text: &str) -> PathBuf {
            let file = self.0.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, text).unwrap();
            file
        }

        fn remove(&self) -> Plugin {
            plugin(&self.0.join("bin"), &self.0.join("net.d"), &self.0.join("results")).unwrap()
        }
    }

    impl Drop for Node {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const CHAIN: &str = r#"{"name":"pods","plugins":[{"type":"ptp"},{"type":"outgate-cni"}]}"#;

    #[test]
    fn the_plugin_goes_when_nobody_needs_it() {
        let node = Node::new("plugin");
        assert_eq!(node.remove(), Plugin::Absent);
        let plugin = node.write("bin/outgate-cni", "program");
        let others = node.write("bin/ptp", "program");
        // libcni does not read this one.
        node.write("net.d/10-pods.conflist.old", CHAIN);
        let by = node.write("net.d/10-pods.conflist", CHAIN);
        assert_eq!(node.remove(), Plugin::Configured { plugin: plugin.clone(), by });
        node.write("net.d/10-pods.conflist", &CHAIN.replace("outgate-cni", "portmap"));
        let cached = |chain: &str| {
            let config = serde_json::to_value(ByteString(chain.as_bytes().to_vec())).unwrap();
            serde_json::json!({"kind": "cniCacheV1", "containerId": "c", "config": config}).to_string()
        };
        let sandbox = node.write("results/pods-c-eth0", &cached(CHAIN));
        node.write("results/pods-d-eth0", &cached("{}"));
        node.write("results/broken", "{");
        assert_eq!(node.remove(), Plugin::Used { plugin: plugin.clone(), sandboxes: 1 });
        assert!(plugin.exists());
        fs::remove_file(sandbox).unwrap();
        assert_eq!(node.remove(), Plugin::Removed(plugin.clone()));
        assert!(!plugin.exists() && others.exists());
    }

    #[test]
    fn the_socket_goes_with_outgates_own_directory_only() {
        let node = Node::new("socket");
        let at = node.0.join("outgate/cni.sock");
        assert_eq!(socket(&at).unwrap(), Vec::<PathBuf>::new());
        let mut files = ["outgate/cni.sock", "outgate/cni.sock.17"].map(|path| node.write(path, "")).to_vec();
        let other = node.write("outgate/cni.sock.txt", "");
        assert_eq!(socket(&at).unwrap(), files);
        assert!(other.exists());
        fs::remove_file(other).unwrap();
        node.write("outgate/cni.sock", "");
        files[1] = node.0.join("outgate");
        assert_eq!(socket(&at).unwrap(), files);
        let elsewhere = node.write("run/cni.sock", "");
        assert_eq!(socket(&elsewhere).unwrap(), [elsewhere]);
        assert!(node.0.join("run").exists());
    }
}
