//! A cgroup of the lab, as a kubelet has one for pods. It is removed with the lab.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::command::Output;
use crate::lab::{Lab, utf8};
use crate::netns::Netns;

/// A cgroup (version 2) under the root of its hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup {
    /// Its directory.
    pub path: PathBuf,
}

impl Lab {
    /// Makes the lab's cgroup.
    #[track_caller]
    #[must_use]
    pub fn cgroup(&self) -> Cgroup {
        let path = place(self.id()).expect("a cgroup2 file system is mounted");
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Cgroup { path }
    }
}

impl Cgroup {
    /// Runs a command to its end, in the cgroup and a network namespace.
    #[track_caller]
    #[must_use]
    pub fn try_exec(&self, netns: &Netns, words: &[&str]) -> Output {
        let join = "echo $$ > \"$0\"/cgroup.procs && exec \"$@\"";
        netns.try_exec(&[&["sh", "-c", join, utf8(&self.path)], words].concat())
    }
}

/// Where this machine has the hierarchy.
pub(crate) fn mounted() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut cgroup2 = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next()?;
        (fields.next()? == "cgroup2").then_some(at)
    });
    cgroup2.next().map(PathBuf::from)
}

/// Where a lab's cgroup is, by the lab's short name.
fn place(id: &str) -> Option<PathBuf> {
    Some(mounted()?.join(format!("{id}-pods")))
}

/// Removes a lab's cgroup, if it made one. Its processes have ended.
pub(crate) fn remove(id: &str) -> io::Result<()> {
    match place(id).map(fs::remove_dir) {
        Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
