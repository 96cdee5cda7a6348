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
    if !rustix::process::geteuid().is_root() {
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
    Ok(loader.load(OBJECT)?)
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
    fn kernel_versions() {
        assert_eq!(version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version("6.6.0"), Some((6, 6)));
        assert_eq!(version("5.10.0-28-cloud-amd64"), Some((5, 10)));
        assert_eq!(version("next"), None);
    }
}
