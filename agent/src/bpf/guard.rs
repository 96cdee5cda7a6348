//! Attaches the guard to the pods' cgroup by a pinned link: `from_cgroup@<the cgroup's id>`.

use std::fs::{File, read_to_string};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, LinkError};
use aya::programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, ProgramError};

use super::Error;
use super::attach::unpin;

const PROGRAM: &str = "from_cgroup";
/// Where a kubelet puts pods, with systemd and without (its `--cgroup-driver`).
const NAMES: [&str; 2] = ["kubepods.slice", "kubepods"];

/// The pods' cgroup of this node, if a mounted cgroup2 hierarchy shows one.
#[must_use]
pub fn find() -> Option<PathBuf> {
    let mounts = read_to_string("/proc/self/mountinfo").unwrap_or_default();
    cgroup_mounts(&mounts)
        .flat_map(|mount| NAMES.map(|name| Path::new(mount).join(name)))
        .find(|path| path.is_dir())
}

/// Mount points of cgroup2 in `/proc/self/mountinfo`: the fifth field; the type follows the field `-`
/// (`proc_pid_mountinfo(5)`).
fn cgroup_mounts(mountinfo: &str) -> impl Iterator<Item = &str> {
    mountinfo.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4))?
    })
}

/// Attaches the loaded object's guard, in place of an earlier agent's: the new one first.
pub(super) fn attach(ebpf: &mut aya::Ebpf, dir: &Path, cgroup: &Path) -> Result<(), Error> {
    let links = dir.join("links");
    let failed = |source: ProgramError| Error::Attach {
        program: PROGRAM,
        interface: cgroup.display().to_string(),
        source,
    };
    let open = || -> std::io::Result<_> {
        let file = File::open(cgroup)?;
        let id = file.metadata()?.ino();
        Ok((file, id))
    };
    let (file, id) = open().map_err(|error| failed(ProgramError::IOError(error)))?;
    let program = ebpf
        .program_mut(PROGRAM)
        .ok_or_else(|| Error::Program { name: PROGRAM, reason: "not in the object".into() })?;
    let program: &mut CgroupSkb = program.try_into().map_err(failed)?;
    program
        .load()
        .map_err(|error| Error::Program { name: PROGRAM, reason: super::object::one_line(&error) })?;
    // A link lets others' programs on the cgroup, such as systemd's, go on by itself, and takes no flag that says
    // so (cgroup_bpf_link_attach, kernel/bpf/cgroup.c).
    let link = program
        .attach(file, CgroupSkbAttachType::Egress, CgroupAttachMode::Single)
        .and_then(|id| program.take_link(id))
        .map_err(failed)?;
    let link = FdLink::try_from(link)
        .map_err(|error: LinkError| failed(ProgramError::IOError(std::io::Error::other(error))))?;
    for pin in pins(&links)? {
        unpin(&pin)?;
    }
    let path = links.join(format!("{PROGRAM}@{id}"));
    link.pin(&path).map_err(|error| Error::Pin {
        what: "pin a link at",
        path,
        source: std::io::Error::other(error),
    })?;
    Ok(())
}

/// Pins of guards that earlier agents attached.
pub(super) fn pins(links: &Path) -> Result<Vec<PathBuf>, Error> {
    let ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.split_once('@').is_some_and(|(program, _)| program == PROGRAM)
    };
    Ok(super::entries(links)?.into_iter().filter(ours).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let text = "24 1 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n\
            30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n\
            31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            32 24 0:28 /x /host/cgroup rw - cgroup2 cgroup rw\n\
            broken\n";
        assert_eq!(cgroup_mounts(text).collect::<Vec<_>>(), ["/sys/fs/cgroup", "/host/cgroup"]);
    }
}
