//! Loads the eBPF object, and says what the host lacks for it.

use std::path::{Path, PathBuf};

use aya::{Ebpf, EbpfLoader};

use super::{Error, maps};

/// The object that `cargo xtask build` made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OUTGATE_BPF_OBJECT"));

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// First kernel with tcx links.
const TCX_SINCE: (u32, u32) = (6, 6);

/// Checks what the kernel's own errors would not say clearly.
pub(super) fn check_host(bpffs: &Path) -> Result<(), Error> {
    if !may_load(&std::fs::read_to_string("/proc/self/status").unwrap_or_default()) {
        return Err(Error::Unprivileged);
    }
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if version(&release).is_some_and(|v| v < TCX_SINCE) {
        return Err(Error::KernelTooOld { release });
    }
    // The directory itself may not exist yet: its nearest ancestor that does must be on a bpffs.
    let existing = bpffs.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let on_bpffs = rustix::fs::statfs(existing).is_ok_and(|fs| fs.f_type == BPF_FS_MAGIC);
    if !on_bpffs {
        let mount =
            if bpffs.starts_with("/sys/fs/bpf") { PathBuf::from("/sys/fs/bpf") } else { bpffs.to_path_buf() };
        return Err(Error::NoBpffs { path: bpffs.to_path_buf(), mount });
    }
    Ok(())
}

/// Loads the object on the maps pinned under `dir`, pinning those that are not there yet.
pub(super) fn load(dir: &Path) -> Result<Ebpf, Error> {
    for sub in ["maps", "links"] {
        let path = dir.join(sub);
        std::fs::create_dir_all(&path).map_err(|source| Error::Pin { what: "create", path, source })?;
    }
    maps::check_pinned(dir)?;
    let paths: Vec<_> =
        maps::SPECS.iter().map(|spec| (spec.name, dir.join("maps").join(spec.name))).collect();
    let mut loader = EbpfLoader::new();
    for (name, path) in &paths {
        loader.map_pin_path(name, path);
    }
    loader.load(OBJECT).map_err(|error| Error::Load(one_line(&error)))
}

/// An error and its causes on one line, without the verifier's log, which goes to the debug log.
pub(super) fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let message = error.to_string();
        tracing::debug!("{message}");
        let line = message.lines().next().unwrap_or_default();
        // aya's errors repeat their causes.
        if !text.contains(line) {
            text = if text.is_empty() { line.to_owned() } else { format!("{text}: {line}") };
        }
        next = error.source();
    }
    text
}

/// Whether the effective capabilities in `/proc/self/status` allow what the agent does (capabilities(7)).
fn may_load(status: &str) -> bool {
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_ADMIN: u64 = 1 << 21;
    const PERFMON: u64 = 1 << 38;
    const BPF: u64 = 1 << 39;
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0);
    let has = |capabilities| effective & capabilities == capabilities;
    has(NET_ADMIN) && (has(SYS_ADMIN) || has(BPF | PERFMON))
}

/// Major and minor of `uname -r`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities() {
        assert!(may_load("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(may_load("CapEff:\t000000c000001000"));
        assert!(!may_load("CapEff:\t0000000000000000"));
        assert!(!may_load("CapEff:\t0000000000200000"), "no CAP_NET_ADMIN");
        assert!(!may_load("CapEff:\t0000008000001000"), "no CAP_PERFMON");
        assert!(!may_load(""));
    }

    #[test]
    fn kernel_versions() {
        assert_eq!(version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version("6.6.0"), Some((6, 6)));
        assert_eq!(version("5.10.0-28-cloud-amd64"), Some((5, 10)));
        assert_eq!(version("next"), None);
    }
}
