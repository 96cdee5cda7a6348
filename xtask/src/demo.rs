//! `demo`: builds all and runs the lab's demo as root.

use anyhow::{Result, bail};
use clap::Args;

use crate::{build, leftovers, machine, process, setup, ui};

/// How to show it.
#[derive(Args)]
pub(crate) struct Options {
    /// Leave the small cluster up, and say how to get into it
    #[arg(long)]
    keep: bool,
}

/// `cargo xtask demo`.
pub(crate) fn run(options: &Options) -> Result<()> {
    let missing = machine::missing_capabilities();
    if !machine::is_root() || !missing.is_empty() {
        bail!(
            "the demo makes network namespaces and loads eBPF programs: run it as root (missing: {})",
            if missing.is_empty() { "user id 0".to_owned() } else { missing.join(" ") }
        );
    }
    setup::ensure()?;
    // Not optimised: packets are the kernel's work, and `test` shares this build.
    let agent = build::build(false)?;
    let step = ui::Step::begin("build", "lab");
    process::run(process::cargo().args(["build", "--package", "lab", "--bins"]))?;
    step.done("lab");

    let before = leftovers::Before::look();
    let mut demo = std::process::Command::new(machine::target_dir()?.join("debug/demo"));
    demo.current_dir(machine::root())
        .env("OUTGATE_BIN", agent)
        .env(build::OBJECT_VARIABLE, machine::bpf_object()?)
        .env(leftovers::RUN_VARIABLE, before.run())
        .env("RUST_LIB_BACKTRACE", "0"); // its errors are for readers; a panic keeps its backtrace
    if options.keep {
        demo.arg("--keep");
        return process::run(&mut demo);
    }
    let result = process::run(&mut demo);
    let left = before.left_behind();
    for thing in &left {
        ui::note("left", thing);
    }
    result?;
    if !left.is_empty() {
        bail!("the demo left {} thing(s) behind on this machine, listed above", left.len());
    }
    Ok(())
}
