//! Outgate's build, setup, demo, lint and tests: `cargo xtask --help`.

mod bench;
mod build;
mod codegen;
mod demo;
mod image;
mod kube;
mod leftovers;
mod lint;
mod machine;
mod process;
mod setup;
mod test;
mod tidy;
mod toolchain;
mod ui;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, tries and tests Outgate. `demo` and `test` first install what they need.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or install what building and testing need; running it again costs nothing
    Setup,
    /// Build the eBPF object, then the agent that carries it
    Build(build::Options),
    /// Show a small cluster whose pods leave by egress IPs (as root)
    Demo(demo::Options),
    /// Run every rung of tests, the first without root, and print one line of counts
    Test(test::Options),
    /// Measure time and memory of the programs, as root: quick, or `--long`
    Bench(bench::Options),
    /// Build the container image that the manifests in deploy/ run, without a registry
    Image,
    /// Write the files that are made from code: the CRDs in deploy/crds
    Codegen,
    /// Check formatting, clippy on both workspaces and the house rules
    Lint,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Setup => setup::run(),
        Command::Build(options) => build::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Image => image::run(),
        Command::Codegen => codegen::run(),
        Command::Lint => lint::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::error(&error);
            ExitCode::FAILURE
        }
    }
}
