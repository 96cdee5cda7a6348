//! `lint`: formatting, clippy on both workspaces, files made from code, and the house rules.

use anyhow::{Result, bail};

use crate::{build, codegen, machine, process, setup, tidy, ui};

/// `cargo xtask lint`.
pub(crate) fn run() -> Result<()> {
    setup::ensure_build()?;
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
    check("codegen", codegen::check);
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

/// The programs are linted as if for the host: clippy comes with its own compiler, and few have that compiler's
/// source of `core`, which the BPF target asks for. The code is the same for both.
fn clippy_ebpf() -> Result<()> {
    process::run(
        process::cargo()
            .current_dir(machine::root().join("ebpf"))
            .args(["clippy", "--release", "--", "-D", "warnings"])
            .env("RUSTC_BOOTSTRAP", "1") // atomic addition is an intrinsic for this target (tables.rs)
            .env("CARGO_TARGET_DIR", machine::target_dir()?.join("ebpf-lint")),
    )
}
