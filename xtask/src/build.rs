//! `build`: the eBPF object first, then the agent that embeds it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{machine, process, toolchain, ui};

const TARGET: &str = "bpfel-unknown-none";
/// Environment of the agent's build and of the tests: where the object lies.
pub(crate) const OBJECT_VARIABLE: &str = "OUTGATE_BPF_OBJECT";

/// How to build.
#[derive(Args)]
pub(crate) struct Options {
    /// Optimise the agent (the eBPF programs always are)
    #[arg(long)]
    release: bool,
}

/// `cargo xtask build`.
pub(crate) fn run(options: &Options) -> Result<()> {
    build(options.release).map(drop)
}

/// Builds all and gives the agent's path.
pub(crate) fn build(release: bool) -> Result<PathBuf> {
    ebpf()?;
    agent(release)
}

/// Compiles the programs and puts them where the agent's build looks, touching the file only when it differs.
pub(crate) fn ebpf() -> Result<()> {
    let tools = toolchain::find()?;
    let step = ui::Step::begin("build", &format!("eBPF programs, rustc {}", tools.rustc.version));
    process::run(ebpf_cargo(&tools)?.args(["build", "--release"]))?;
    let built = ebpf_target_dir()?.join(TARGET).join("release/outgate");
    let object = machine::bpf_object()?;
    let (bytes, changed) = install_if_changed(&built, &object)?;
    let state = if changed { "new" } else { "unchanged" };
    step.done(&format!("{}, {} KiB, {state}", machine::shown(&object), bytes.div_ceil(1024)));
    Ok(())
}

/// Cargo for the eBPF workspace: with a compiler of our choice, and untouched by what is set for the host's.
fn ebpf_cargo(tools: &toolchain::Toolchain) -> Result<Command> {
    let linker = tools.linker.to_str().context("bpf-linker's path is not UTF-8")?;
    let linker = format!("-Clinker={linker}");
    // v3 of the instruction set (32-bit registers, atomics) is in every kernel that Outgate runs on.
    let flags = [linker.as_str(), "-Clink-arg=--btf", "-Cdebuginfo=2", "-Ctarget-cpu=v3"].join("\x1f");
    let mut cargo = process::cargo();
    for variable in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN"] {
        cargo.env_remove(variable);
    }
    cargo
        .current_dir(machine::root().join("ebpf"))
        .env("RUSTC", &tools.rustc.path)
        .env("RUSTC_BOOTSTRAP", "1") // lets a released compiler take -Z
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env("CARGO_TARGET_DIR", ebpf_target_dir()?)
        .env("CARGO_BUILD_TARGET", TARGET)
        .env("CARGO_UNSTABLE_BUILD_STD", "core");
    Ok(cargo)
}

fn ebpf_target_dir() -> Result<PathBuf> {
    Ok(machine::target_dir()?.join("ebpf"))
}

/// Compiles the agent and gives its path.
fn agent(release: bool) -> Result<PathBuf> {
    let profile = if release { "release" } else { "debug" };
    let step = ui::Step::begin("build", &format!("agent, {profile}"));
    let mut cargo = process::cargo();
    cargo.args(["build", "--package", "outgate"]).env(OBJECT_VARIABLE, machine::bpf_object()?);
    if release {
        cargo.arg("--release");
    }
    process::run(&mut cargo)?;
    let agent = machine::target_dir()?.join(profile).join("outgate");
    step.done(&machine::shown(&agent));
    Ok(agent)
}

/// Copies `from` to `to` by rename, unless `to` already holds the same; gives the size and whether it changed.
fn install_if_changed(from: &Path, to: &Path) -> Result<(usize, bool)> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok((new.len(), false));
    }
    let parent = to.parent().context("the object's path has no parent")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let draft = to.with_extension(format!("o.{}", std::process::id()));
    fs::write(&draft, &new).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, to)
        .with_context(|| format!("cannot rename {} to {}", draft.display(), to.display()))?;
    Ok((new.len(), true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_equal_object_is_left_alone() {
        let dir = std::env::temp_dir().join(format!("xtask-install-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (from, to) = (dir.join("built"), dir.join("bpf/outgate.o"));
        fs::write(&from, b"one").unwrap();
        assert_eq!(install_if_changed(&from, &to).unwrap(), (3, true));
        let first = fs::metadata(&to).unwrap().modified().unwrap();
        assert_eq!(install_if_changed(&from, &to).unwrap(), (3, false));
        assert_eq!(fs::metadata(&to).unwrap().modified().unwrap(), first);
        fs::write(&from, b"three").unwrap();
        assert_eq!(install_if_changed(&from, &to).unwrap(), (5, true));
        assert_eq!(fs::read(&to).unwrap(), b"three");
        assert_eq!(fs::read_dir(to.parent().unwrap()).unwrap().count(), 1, "no draft left");
        fs::remove_dir_all(&dir).unwrap();
    }
}
