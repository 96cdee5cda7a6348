//! The kernel side: programs, maps, links and their pins. The only module that makes `bpf` system calls.

pub mod attach;
mod batch;
mod blocks;
pub mod firewall_counts;
mod firewalls;
pub mod guard;
mod interfaces;
pub mod maps;
pub mod names;
mod object;
pub mod ports;
pub mod sweep;
mod words;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::facts::Facts;
use crate::image::MapImage;

/// The layout of the pinned maps. Raised when a key or value changes in a way that an older program or agent
/// would misread; each layout has its own directory.
pub const LAYOUT: u32 = 1;

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not root, or without the capabilities.
    #[error("loading eBPF programs needs root or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON: run as root")]
    Unprivileged,
    /// The kernel lacks something.
    #[error("kernel {release} has no tcx links, which need 6.6 or later: upgrade the node's kernel")]
    KernelTooOld {
        /// `uname -r`.
        release: String,
    },
    /// No bpffs at the path.
    #[error("{path} is not on a bpf file system: mount one with `mount -t bpf bpf {mount}`")]
    NoBpffs {
        /// The directory asked for.
        path: PathBuf,
        /// Where to mount.
        mount: PathBuf,
    },
    /// A file operation on pins.
    #[error("cannot {what} {path}: {source}")]
    Pin {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A pinned map is not what this version expects.
    #[error(
        "pinned map {path} has {found}, this version expects {expected}: another version made it; \
         run `outgate cleanup` and start again (connections of this node's pods will break)"
    )]
    Shape {
        /// The pin.
        path: PathBuf,
        /// What it has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// No pinned map at the path.
    #[error("no map {name} under {dir}: is the agent running on this node, with this --bpffs?")]
    NoMap {
        /// The map.
        name: &'static str,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// A map operation.
    #[error("map {name}: {source}")]
    Map {
        /// The map.
        name: &'static str,
        /// Why.
        source: aya::maps::MapError,
    },
    /// A map is full.
    #[error("map {name} is full with {entries} entries")]
    MapFull {
        /// The map.
        name: &'static str,
        /// Its capacity.
        entries: u32,
    },
    /// Loading the object.
    #[error("the kernel refused the eBPF object: {0}; `--log debug` shows the verifier's log")]
    Load(String),
    /// A program.
    #[error("program {name}: {reason}; `--log debug` shows the verifier's log")]
    Program {
        /// The program.
        name: &'static str,
        /// Why, on one line.
        reason: String,
    },
    /// Attaching a program.
    #[error("cannot attach {program} to {interface}: {source}")]
    Attach {
        /// The program.
        program: &'static str,
        /// Where.
        interface: String,
        /// Why.
        source: aya::programs::ProgramError,
    },
}

/// `<bpffs>/v<N>`: where this version pins.
#[must_use]
pub fn pin_dir(bpffs: &Path) -> PathBuf {
    bpffs.join(format!("v{LAYOUT}"))
}

/// Reads the policy maps pinned under `bpffs`.
pub fn read_image(bpffs: &Path) -> Result<MapImage, Error> {
    Ok(maps::Maps::open(&pin_dir(bpffs))?.into_image())
}

/// Removes every link, map and directory that any version pinned under `bpffs`: nothing of Outgate acts on
/// packets afterwards. Returns what was removed; nothing there is not an error.
pub fn cleanup(bpffs: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut removed = Vec::new();
    let mut unlink = |path: PathBuf| {
        let remove = std::fs::remove_file(&path);
        remove.map_err(|source| Error::Pin { what: "remove", path: path.clone(), source })?;
        removed.push(path);
        Ok(())
    };
    let versions: Vec<_> = entries(bpffs)?.into_iter().filter(|path| is_version(path)).collect();
    // The guards first: if something below fails, no new pod is left waiting for an agent that does not come.
    for version in &versions {
        for path in guard::pins(&version.join("links"))? {
            unlink(path)?;
        }
    }
    for version in &versions {
        // Links first: a program without its maps' pins is still whole, a map without programs is only memory.
        for dir in ["links", "maps"].map(|sub| version.join(sub)) {
            for path in entries(&dir)? {
                unlink(path)?;
            }
            remove_dir(&dir)?;
        }
        remove_dir(version)?;
    }
    // The file system's own root stays, as do directories that hold something else.
    let is_root =
        std::fs::metadata(bpffs).and_then(|m| Ok((m.dev(), std::fs::metadata(bpffs.join(".."))?.dev())));
    if !matches!(is_root, Ok((own, above)) if own != above) && entries(bpffs)?.is_empty() {
        remove_dir(bpffs)?;
    }
    Ok(removed)
}

/// Whether a path is a directory of pins: `v` and the layout's number.
fn is_version(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.strip_prefix('v').is_some_and(|n| n.parse::<u32>().is_ok())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Pin { what: "read", path: dir.to_path_buf(), source };
    match std::fs::read_dir(dir) {
        Ok(entries) => {
            let mut paths =
                entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(failed)?;
            paths.sort();
            Ok(paths)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(failed(source)),
    }
}

fn remove_dir(dir: &Path) -> Result<(), Error> {
    match std::fs::remove_dir(dir) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Pin { what: "remove", path: dir.to_path_buf(), source })
        }
        _ => Ok(()),
    }
}

/// The loaded programs and their maps.
pub struct Datapath {
    maps: maps::Maps,
    programs: attach::Programs,
}

impl Datapath {
    /// Whether this process may load programs here, as far as can be told without trying. Changes nothing.
    pub fn check_host(bpffs: &Path) -> Result<(), Error> {
        object::check_host(bpffs)
    }

    /// Loads the programs, on the pinned maps if there are any, and replaces the programs of pinned links in
    /// place: packets never pass without a program.
    pub fn open(bpffs: &Path) -> Result<Self, Error> {
        object::check_host(bpffs)?;
        let dir = pin_dir(bpffs);
        let mut ebpf = object::load(&dir)?;
        sweep::load(&mut ebpf, &dir)?;
        let maps = maps::Maps::open(&dir)?;
        let programs = attach::Programs::new(ebpf, &dir)?;
        Ok(Self { maps, programs })
    }

    /// Attaches the guard to the pods' cgroup.
    pub fn guard(&mut self, cgroup: &Path) -> Result<(), Error> {
        let dir = self.maps.dir().to_path_buf();
        guard::attach(self.programs.object(), &dir, cgroup)
    }

    /// What the policy maps hold: at start, the work of the agent before this one.
    pub fn recovered(&self) -> &MapImage {
        self.maps.image()
    }

    /// Makes the attachments fit the facts and the policy maps equal to the image. Programs come first: an
    /// interface that is in the maps is taken for covered.
    pub fn apply(&mut self, image: &MapImage, facts: &Facts) -> Result<(), Error> {
        let attached = self.programs.attach(facts);
        // An interface that cannot be covered must not keep policy from the others.
        self.maps.apply(image)?;
        attached
    }

    /// The kernel side of names. Within a tokio runtime.
    pub fn names(&mut self) -> Result<names::Names, Error> {
        let dir = self.maps.dir().to_path_buf();
        names::Names::open(self.programs.object(), &dir)
    }

    /// Removes versions of firewalls that were in force a while ago. Called now and then.
    pub fn retire(&mut self) -> Result<(), Error> {
        self.maps.retire()
    }

    /// Removes flows that are past their time or whose pod, policy or address is gone.
    pub fn sweep(&mut self) -> Result<datapath::keys::Swept, Error> {
        let dir = self.maps.dir().to_path_buf();
        sweep::run(self.programs.object(), &dir)
    }

    /// Packets and bytes dropped, by reason, over all CPUs.
    pub fn drops(&self) -> Result<Vec<(datapath::verdict::DropReason, datapath::keys::DropCount)>, Error> {
        maps::drops(self.maps.dir())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleanup_begins_with_the_guards_of_all_versions_and_leaves_others_files() {
        let dir = std::env::temp_dir().join(format!("outgate-cleanup-{}", std::process::id()));
        for version in ["v1", "v2"] {
            for (sub, name) in
                [("links", "from_cgroup@9"), ("links", "a@1"), ("links", "to_uplink@2"), ("maps", "FLOWS")]
            {
                std::fs::create_dir_all(dir.join(version).join(sub)).unwrap();
                std::fs::write(dir.join(version).join(sub).join(name), "").unwrap();
            }
        }
        std::fs::write(dir.join("mine"), "").unwrap();
        let removed = cleanup(&dir).unwrap();
        let removed: Vec<_> =
            removed.iter().map(|p| p.strip_prefix(&dir).unwrap().to_str().unwrap()).collect();
        assert_eq!(removed[..3], ["v1/links/from_cgroup@9", "v2/links/from_cgroup@9", "v1/links/a@1"]);
        assert_eq!(removed.len(), 8);
        assert_eq!(entries(&dir).unwrap(), [dir.join("mine")]);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
