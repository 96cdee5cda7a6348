//! Where things are on this machine, and what this process may do on it.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The checkout this xtask was built from.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the checkout")
}

/// Cargo's target directory for this checkout, absolute.
pub(crate) fn target_dir() -> Result<PathBuf> {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) if !dir.is_empty() => {
            std::path::absolute(&dir).with_context(|| format!("CARGO_TARGET_DIR={}", dir.display()))
        }
        _ => Ok(root().join("target")),
    }
}

/// The agent's eBPF object; the agent's build embeds it.
pub(crate) fn bpf_object() -> Result<PathBuf> {
    Ok(target_dir()?.join("bpf/outgate.o"))
}

/// Where `setup` keeps what it makes: the user's cache, so that another checkout or `cargo clean` does not make it
/// again.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache"))) {
        Some(cache) => Ok(cache.join("outgate")),
        None => Ok(target_dir()?.join("cache")),
    }
}

/// Where `setup` puts tools.
pub(crate) fn tools_dir() -> Result<PathBuf> {
    Ok(cache_dir()?.join("tools"))
}

/// The first executable of that name, also in the `sbin` directories that users' `PATH` often lacks.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

/// Whether it is a file that may be executed.
pub(crate) fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Whether this process runs as root.
pub(crate) fn is_root() -> bool {
    status_field("Uid:").and_then(|ids| ids.split_whitespace().nth(1).map(|id| id == "0")).unwrap_or(false)
}

/// The capabilities that the lab needs and this process lacks, by name.
pub(crate) fn missing_capabilities() -> Vec<&'static str> {
    const NEEDED: [(u32, &str); 4] =
        [(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW"), (21, "CAP_SYS_ADMIN"), (39, "CAP_BPF")];
    let effective = status_field("CapEff:").and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let effective = effective.unwrap_or(0);
    NEEDED.into_iter().filter(|(bit, _)| effective >> bit & 1 == 0).map(|(_, name)| name).collect()
}

fn status_field(name: &str) -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned))
}

/// Whether a file system of this type is mounted at this place.
pub(crate) fn is_mounted(place: &str, kind: &str) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(place) && fields.next() == Some(kind)
    })
}

/// How the path is best shown: relative to the checkout where it lies in it.
pub(crate) fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// Cargo as this xtask was called with, else the one on the path.
pub(crate) fn cargo() -> impl AsRef<OsStr> {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
