//! `image`: the container image that the manifests in `deploy/` run, as an archive that needs no registry.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{build, machine, process, setup, ui};

/// The image's name in the manifests. With `localhost` in front no runtime looks for it anywhere else.
const NAME: &str = "localhost/outgate";

/// `cargo xtask image`.
pub(crate) fn run() -> Result<()> {
    setup::ensure_image()?;
    build::ebpf()?;
    let program = static_program()?;
    let dir = machine::target_dir()?.join("image");
    let context = dir.join("context");
    fs::create_dir_all(&context).with_context(|| format!("cannot make {}", context.display()))?;
    let inside = context.join("outgate");
    process::run(Command::new("strip").args(["--strip-debug", "-o"]).arg(&inside).arg(&program))?;
    check(&inside)?;

    let tag = format!("{NAME}:{}", env!("CARGO_PKG_VERSION"));
    let archive = dir.join("outgate.oci");
    let step = ui::Step::begin("image", &tag);
    // What an interrupted run left would be added to.
    let storage = Storage::new(&dir)?;
    if archive.exists() {
        fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))?;
    }
    let (revision, time) = revision();
    process::run_showing(
        storage
            .buildah("build")
            .args(["--isolation", "chroot", "--format", "oci", "--tag", &tag, "--timestamp", &time])
            .args(["--build-arg", concat!("VERSION=", env!("CARGO_PKG_VERSION"))])
            .args(["--build-arg", &format!("REVISION={revision}"), "--file"])
            .arg(machine::root().join("deploy/Containerfile"))
            .arg(&context),
        |_| false,
    )?;
    process::run_showing(
        storage.buildah("push").arg(&tag).arg(format!("oci-archive:{}:{tag}", archive.display())),
        |_| false,
    )?;
    let size = |path: &Path| -> Result<u64> { Ok(fs::metadata(path)?.len().div_ceil(1 << 10)) };
    step.done(&format!("{tag}, {} KiB with a program of {} KiB", size(&archive)?, size(&inside)?));
    try_out(&storage, &archive)?;
    let archive = machine::shown(&archive);
    for (with, command) in [
        ("containerd, K3s", format!("ctr -n k8s.io images import {archive}")),
        ("CRI-O, Podman", format!("podman load -i {archive}")),
        ("kind", format!("kind load image-archive {archive}")),
        ("minikube", format!("minikube image load {archive}")),
    ] {
        ui::note("load", &format!("{with}: {command}"));
    }
    ui::result(&archive);
    Ok(())
}

/// The agent for this machine's kind, optimised, with the C library inside. Firewalls' names are asked for by the agent
/// itself; an API server that is given by name is looked up by the C library, which has what `/etc/hosts` and DNS take
/// within since glibc 2.34, also without an nsswitch.conf.
fn static_program() -> Result<PathBuf> {
    let version = process::capture(Command::new("rustc").arg("-vV"))?;
    let target =
        version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let step = ui::Step::begin("build", "agent, static");
    let mut cargo = process::cargo();
    // With `--target` the flag is for the program and its libraries, not for what is run while building.
    cargo
        .args(["build", "--release", "--package", "outgate", "--target", target])
        .env(build::OBJECT_VARIABLE, machine::bpf_object()?)
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", "-C\x1ftarget-feature=+crt-static");
    process::run(&mut cargo)?;
    let program = machine::target_dir()?.join(target).join("release/outgate");
    step.done(&machine::shown(&program));
    Ok(program)
}

/// That the program is static, and starts.
fn check(program: &Path) -> Result<()> {
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    ensure!(!asks_for_a_loader(&bytes)?, "{} is not static", program.display());
    says_its_version(Command::new(program).arg("version").env_clear())
}

/// That a container of the image starts: what users load, with nothing of this machine around it.
fn try_out(storage: &Storage, archive: &Path) -> Result<()> {
    const CONTAINER: &str = "try-out";
    const SHOWN: &str = "outgate version, in a container of the image";
    let step = ui::Step::begin("try", SHOWN);
    let image = format!("oci-archive:{}", archive.display());
    process::capture(storage.buildah("from").args(["--quiet", "--name", CONTAINER]).arg(image))?;
    says_its_version(storage.buildah("run").args([
        "--isolation",
        "chroot",
        CONTAINER,
        "--",
        "/outgate",
        "version",
    ]))?;
    step.done(SHOWN);
    Ok(())
}

fn says_its_version(command: &mut Command) -> Result<()> {
    let said = process::capture(command)?;
    ensure!(said.trim() == concat!("outgate ", env!("CARGO_PKG_VERSION")), "`outgate version` says {said:?}");
    Ok(())
}

/// Whether an ELF program of 64 bits, little-endian, has a program header of type `PT_INTERP` (elf(5)).
fn asks_for_a_loader(elf: &[u8]) -> Result<bool> {
    const PT_INTERP: u32 = 3;
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        bail!("not an ELF program of 64 bits, little-endian");
    }
    let short = |at: usize| elf.get(at..at + 2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let headers = elf.get(32..40).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let (Some(headers), Some(size), Some(count)) = (headers, short(54), short(56)) else {
        bail!("an ELF header that is cut off");
    };
    let headers = usize::try_from(headers)?;
    let kinds = (0..count).map(|n| elf.get(headers + n * size..headers + n * size + 4));
    let kinds: Option<Vec<_>> = kinds.collect();
    let kinds = kinds.context("program headers that are cut off")?;
    Ok(kinds.iter().any(|kind| **kind == PT_INTERP.to_le_bytes()))
}

/// The commit that is built, and its time in seconds since 1970: the same commit gives the same image.
fn revision() -> (String, String) {
    let git = |format: &str| {
        let mut git = Command::new("git");
        git.current_dir(machine::root()).args(["-c", "safe.directory=*", "log", "-1", format]);
        process::capture(&mut git).map(|text| text.trim().to_owned())
    };
    match (git("--format=%H"), git("--format=%ct")) {
        (Ok(revision), Ok(time)) => (revision, time),
        _ => ("unknown".to_owned(), "0".to_owned()), // a checkout without git
    }
}

/// Buildah's storage, apart from the user's own, and removed in the end.
struct Storage {
    dir: PathBuf,
}

impl Storage {
    fn new(dir: &Path) -> Result<Self> {
        let storage = Self { dir: dir.join("storage") };
        storage.remove()?;
        Ok(storage)
    }

    fn remove(&self) -> Result<()> {
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir).with_context(|| format!("cannot remove {}", self.dir.display()))?;
        }
        Ok(())
    }

    /// `vfs` needs nothing of the kernel.
    fn buildah(&self, command: &str) -> Command {
        let mut buildah = Command::new("buildah");
        buildah.arg("--root").arg(self.dir.join("root")).arg("--runroot").arg(self.dir.join("run")).args([
            "--storage-driver",
            "vfs",
            command,
        ]);
        buildah
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            ui::error(&error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_is_no_static_program_and_a_text_is_none_at_all() {
        // Tests are built with the C library outside unless told otherwise.
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(asks_for_a_loader(&own).unwrap(), !cfg!(target_feature = "crt-static"));
        assert!(asks_for_a_loader(b"#!/bin/sh\n").is_err());
        assert!(asks_for_a_loader(&own[..60]).is_err());
    }
}
