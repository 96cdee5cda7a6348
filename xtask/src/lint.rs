//! `lint`: formatting, clippy on the host's and the BPF target's crates, and the house rules.

use anyhow::{Result, bail};

use crate::{build, machine, process, setup, tidy, toolchain, ui};

/// `cargo xtask lint`.
pub(crate) fn run() -> Result<()> {
    setup::ensure()?;
    build::ebpf()?; // the agent's build reads the object
    check()
}

/// All checks, each to its end, on a checkout whose eBPF object is built.
pub(crate) fn check() -> Result<()> {
    let mut failed = Vec::new();
    let mut check = |name, check: fn() -> Result<()>| {
        let step = ui::Step::begin("lint", name);
        match check() {
            Ok(()) => step.done(&format!("{name}: ok")),
            Err(error) => {
                ui::error(&error);
                step.done(&format!("{name}: FAILED"));
                failed.push(name);
            }
        }
    };
    check("fmt", fmt);
    check("clippy", clippy);
    check("clippy, eBPF", clippy_ebpf);
    check("tidy", tidy::run);
    if !failed.is_empty() {
        bail!("lint failed: {}", failed.join(", "));
    }
    Ok(())
}

fn fmt() -> Result<()> {
    process::run(process::cargo().args(["fmt", "--all", "--check"]))?;
    let ebpf = machine::root().join("ebpf/Cargo.toml");
    process::run(process::cargo().args(["fmt", "--all", "--check", "--manifest-path"]).arg(ebpf))
}

fn clippy() -> Result<()> {
    process::run(
        process::cargo()
            .args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])
            .env(build::OBJECT_VARIABLE, machine::bpf_object()?),
    )
}

/// Clippy comes with its own compiler, so it needs that compiler's source of `core`; Debian's `rustc-web` has no
/// clippy, and there the compiler's own lints must do.
fn clippy_ebpf() -> Result<()> {
    let tools = toolchain::find()?;
    let driver = tools.rustc.path.with_file_name("clippy-driver");
    if !machine::is_executable(&driver) {
        ui::note("lint", &format!("{} has no clippy: denying rustc's warnings", tools.rustc.path.display()));
        return process::run(build::ebpf_cargo(&tools, &["-Dwarnings"])?.args(["check", "--release"]));
    }
    let mut cargo = build::ebpf_cargo(&tools, &[])?;
    process::run(
        cargo
            .env("RUSTC_WORKSPACE_WRAPPER", driver)
            .env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__")
            .args(["check", "--release"]),
    )
}
