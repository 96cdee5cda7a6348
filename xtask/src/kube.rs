//! The Kubernetes API server that the tests run: found, or built once and kept in the user's cache.
//!
//! `KUBEBUILDER_ASSETS`, as other projects' tests know it, names a directory that has `etcd` and `kube-apiserver`
//! already. Without it the server is built from Debian's source package by `kube-apiserver.sh`.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{machine, process, ui};

/// The variable that says where the programs are: read here, and set for the lab's tests.
pub(crate) const ASSETS_VARIABLE: &str = "KUBEBUILDER_ASSETS";
/// What the tests start. `etcdctl` is wanted only where the server is built here.
const PROGRAMS: [&str; 2] = ["etcd", "kube-apiserver"];
/// How to do without a build.
const BY_HAND: &str = "have etcd and kube-apiserver of any version from 1.20 on in a directory and name it by \
                       KUBEBUILDER_ASSETS";

/// The directory of the programs, whether or not they are there yet.
pub(crate) fn assets() -> Result<PathBuf> {
    match env::var_os(ASSETS_VARIABLE).filter(|value| !value.is_empty()) {
        Some(dir) => {
            std::path::absolute(&dir).with_context(|| format!("{ASSETS_VARIABLE}={}", dir.display()))
        }
        None => Ok(cache()?.join("bin")),
    }
}

/// The programs, if all are there.
pub(crate) fn find() -> Result<Option<Vec<PathBuf>>> {
    let assets = assets()?;
    let programs: Vec<_> = PROGRAMS.iter().map(|program| assets.join(program)).collect();
    let missing: Vec<_> = programs
        .iter()
        .filter(|path| !machine::is_executable(path))
        .map(|path| machine::shown(path))
        .collect();
    if missing.is_empty() {
        return Ok(Some(programs));
    }
    if env::var_os(ASSETS_VARIABLE).is_some_and(|value| !value.is_empty()) {
        bail!("{ASSETS_VARIABLE} is set, but there is no {}", missing.join(", no "));
    }
    Ok(None)
}

/// Builds them into the cache; waits for another xtask that does the same. Needs apt-get and dpkg-source.
pub(crate) fn build() -> Result<()> {
    let cache = cache()?;
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let lock = cache.join("lock");
    let lock = File::create(&lock).with_context(|| format!("cannot write {}", lock.display()))?;
    lock.lock().context("cannot lock the cache of the Kubernetes API server")?;
    if find()?.is_some() {
        return Ok(());
    }
    let work = cache.join("work");
    // An interrupted build's.
    remove(&work)?;
    let step = ui::Step::begin("install", "kube-apiserver 1.20.2 for the tests (3 to 10 minutes, once)");
    let script = machine::root().join("xtask/kube-apiserver.sh");
    let built = process::run_showing(
        // Others work on this machine, too; it is done once.
        Command::new("nice").arg("bash").arg(&script).arg(&work).arg(work.join("bin")).env("LC_ALL", "C"),
        |line| line.starts_with("== "),
    );
    built.with_context(|| format!("cannot build kube-apiserver; or {BY_HAND}"))?;
    // Whole or not at all: what is in the cache is used without another look.
    let bin = cache.join("bin");
    remove(&bin)?;
    fs::rename(work.join("bin"), &bin).with_context(|| format!("cannot make {}", bin.display()))?;
    remove(&work)?;
    step.done("kube-apiserver 1.20.2, etcd");
    Ok(())
}

/// Why nothing can be built here, told with the way around.
pub(crate) fn cannot_build(why: &str) -> anyhow::Error {
    anyhow::anyhow!("no kube-apiserver for the tests, and none can be built: {why}; {BY_HAND}")
}

fn cache() -> Result<PathBuf> {
    Ok(machine::cache_dir()?.join("kube"))
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
