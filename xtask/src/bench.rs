//! `bench`: builds the programs and the lab's benchmark, optimised, and runs it as root.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::{build, machine, process, setup, ui};

/// What to measure, and how to tell.
#[derive(Args)]
pub(crate) struct Options {
    /// Ten times as many runs: minutes, and steadier figures
    #[arg(long)]
    long: bool,
    /// One group of figures only
    #[arg(value_enum)]
    group: Option<Group>,
    /// The same
    #[arg(long, value_enum, conflicts_with = "group")]
    only: Option<Group>,
    /// Where the choice among flows starts: the same seed, the same packets
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How to print the figures
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// Aligned columns
    Table,
    /// One JSON object
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Sizes of the programs
    Programs,
    /// An offloaded flow's packet, with 1 and with 200,000 flows in the table, beside a program that only parses
    /// and redirects
    Packet,
    /// A flow's first packet, with more and more ports taken
    New,
    /// Bytes of map memory per flow
    Memory,
    /// The sweep of a full table, of live flows and of dead ones
    Sweep,
    /// 1,000,000 flows held
    Held,
    /// Packets with more and more firewall rules, compiling them, and nftables beside
    Firewall,
    /// Agents and controller in a cluster of 5,000 nodes, simulated; needs no root, and is not among all
    Scale,
}

/// `cargo xtask bench`.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.group.or(options.only) == Some(Group::Scale) {
        setup::ensure_build()?;
        build::ebpf()?;
        return process::run(&mut std::process::Command::new(program("scale")?));
    }
    let missing = machine::missing_capabilities();
    if !machine::is_root() || !missing.is_empty() {
        bail!(
            "the benchmark loads eBPF programs into a network namespace of its own: run it as root (missing: {})",
            if missing.is_empty() { "user id 0".to_owned() } else { missing.join(" ") }
        );
    }
    setup::ensure()?;
    build::ebpf()?;
    let mut bench = std::process::Command::new(program("bench")?);
    bench
        .current_dir(machine::root())
        .env(build::OBJECT_VARIABLE, machine::bpf_object()?)
        .env("RUST_LIB_BACKTRACE", "0") // its errors are for readers
        .args(["--seed", &options.seed.to_string(), "--output", &name(&options.output)]);
    if options.long {
        bench.arg("--long");
    }
    if let Some(group) = options.group.or(options.only) {
        bench.args(["--only", &name(&group)]);
    }
    process::run(&mut bench)
}

/// Builds a program of the lab, optimised, and gives its path.
fn program(name: &str) -> Result<PathBuf> {
    let step = ui::Step::begin("build", "lab, release");
    process::run(
        process::cargo()
            .env(build::OBJECT_VARIABLE, machine::bpf_object()?) // the agent is in it
            .args(["build", "--release", "--package", "lab", "--bin", name]),
    )?;
    step.done("lab");
    Ok(machine::target_dir()?.join("release").join(name))
}

/// A value as one types it.
fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
