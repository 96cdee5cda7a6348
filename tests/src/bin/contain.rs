//! Runs a program as a container runtime does: in a root directory of its own, with what is mounted there, as a user and
//! with some capabilities and no others. It is to be started in a mount namespace of its own (`unshare --mount`), and
//! becomes the program.
//!
//! As runc does for a container that is not privileged: `/proc/sys` and `/sys` cannot be written.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use clap::Parser;
use rustix::mount::{MountFlags, mount, mount_bind, mount_bind_recursive, mount_remount};
use rustix::process::chroot;
use rustix::thread::{
    CapabilitySet, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};
use rustix::thread::{Gid, Uid};

/// What every container's `/dev` has, and a program may ask for.
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];

#[derive(Parser)]
#[command(about = "Run a program as a container's")]
struct Arguments {
    /// An existing directory that becomes the root.
    #[arg(long)]
    root: PathBuf,
    /// Something of the host, and its place in the container.
    #[arg(long = "mount", value_name = "FROM:TO[:ro]", value_parser = Mount::parse)]
    mounts: Vec<Mount>,
    /// Whether nothing but what is mounted can be written.
    #[arg(long)]
    read_only: bool,
    #[arg(long)]
    user: u32,
    #[arg(long)]
    group: u32,
    /// Capabilities without `CAP_`.
    #[arg(long = "capability", value_name = "NAME")]
    capabilities: Vec<String>,
    /// Whether it may gain no rights by what it starts.
    #[arg(long)]
    no_new_privileges: bool,
    /// The program, as seen inside, with its arguments.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

#[derive(Clone)]
struct Mount {
    from: PathBuf,
    to: PathBuf,
    read_only: bool,
}

impl Mount {
    fn parse(text: &str) -> Result<Self, String> {
        let (paths, read_only) = text.strip_suffix(":ro").map_or((text, false), |paths| (paths, true));
        let (from, to) = paths.split_once(':').ok_or("expected FROM:TO or FROM:TO:ro")?;
        Ok(Self { from: from.into(), to: to.into(), read_only })
    }

    fn mount(&self, root: &Path) -> Result<()> {
        let to = root.join(self.to.strip_prefix("/").unwrap_or(&self.to));
        let here = format!("cannot mount {} at {}", self.from.display(), to.display());
        if self.from.is_dir() {
            fs::create_dir_all(&to).context(here.clone())?;
        } else {
            fs::create_dir_all(to.parent().unwrap_or(root)).context(here.clone())?;
            File::options().create(true).append(true).open(&to).context(here.clone())?;
        }
        mount_bind_recursive(&self.from, &to).context(here.clone())?;
        if self.read_only { read_only(&to).context(here) } else { Ok(()) }
    }
}

fn read_only(mounted: &Path) -> rustix::io::Result<()> {
    mount_remount(mounted, MountFlags::BIND | MountFlags::RDONLY, c"")
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let kept = arguments
        .capabilities
        .iter()
        .map(|name| CapabilitySet::from_name(name).with_context(|| format!("{name} is no capability")));
    let kept: CapabilitySet = kept.collect::<Result<Vec<_>>>()?.into_iter().collect();
    enter(&arguments)?;
    drop_rights(&arguments, kept)?;
    let Err(error) = become_program(&arguments.command);
    Err(error)
}

fn enter(arguments: &Arguments) -> Result<()> {
    let root = &arguments.root;
    mount_bind(root, root).context("cannot mount the root")?;
    let inside = |path: &str| Mount { from: path.into(), to: path.into(), read_only: false };
    inside("/proc").mount(root)?;
    let sys = root.join("proc/sys");
    mount_bind(&sys, &sys).and_then(|()| read_only(&sys)).context("cannot mount /proc/sys")?;
    fs::create_dir_all(root.join("sys"))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("sysfs", root.join("sys"), "sysfs", flags, c"").context("cannot mount /sys")?;
    for device in DEVICES {
        inside(&format!("/dev/{device}")).mount(root)?;
    }
    for mount in &arguments.mounts {
        mount.mount(root)?;
    }
    if arguments.read_only {
        read_only(root).context("cannot make the root read-only")?;
    }
    chroot(root).context("cannot enter the root")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// What a program may do that is executed from here on, by root too, is what the bounding set has (capabilities(7),
/// "Transformation of capabilities during `execve()`").
fn drop_rights(arguments: &Arguments, kept: CapabilitySet) -> Result<()> {
    clear_ambient_capability_set()?;
    for capability in (0..64).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        // An error: the kernel has no such capability.
        let known = capability_is_in_bounding_set(capability);
        if known == Ok(true) && !kept.contains(capability) {
            remove_capability_from_bounding_set(capability)?;
        } else if known != Ok(true) && kept.contains(capability) {
            anyhow::bail!("{capability:?} is not to be had here");
        }
    }
    let mut sets = capabilities(None)?;
    sets.inheritable = CapabilitySet::empty();
    set_capabilities(None, sets)?;
    let (user, group) = (Uid::from_raw(arguments.user), Gid::from_raw(arguments.group));
    set_thread_groups(&[])?;
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    if arguments.no_new_privileges {
        set_no_new_privs(true)?;
    }
    Ok(())
}

fn become_program(command: &[OsString]) -> Result<Infallible> {
    let program = &command[0];
    Err(Command::new(program).args(&command[1..]).exec())
        .with_context(|| format!("cannot run {}", program.display()))
}
