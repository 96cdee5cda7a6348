//! What the commands do. They print through a writer, so that tests can read it.

mod agent;
mod cleanup;
mod cni;
mod controller;
mod convert;
mod crds;
mod flows;
mod known;
mod monitor;
mod status;
mod trace;
mod validate;

use std::io::{self, Write};

use anyhow::Context as _;
use clap::CommandFactory as _;

use crate::cli::{Cli, Command};

/// Runs a command. Results go to `out`, the agent's log to standard error.
pub fn run(cli: Cli, out: &mut impl Write) -> anyhow::Result<()> {
    match cli.command {
        Command::Agent(args) => agent::run(args),
        Command::Controller(args) => controller::run(args),
        Command::Status(args) => status::run(&args, out),
        Command::Flows(args) => flows::run(&args, out),
        Command::Monitor(args) => monitor::run(&args, out),
        Command::Trace(args) => trace::run(&args, out),
        Command::Cleanup(args) => cleanup::run(&args, out),
        Command::Convert(args) => convert::run(&args, out),
        Command::Validate(args) => validate::run(&args, out),
        Command::Crds => crds::run(out),
        Command::Cni(args) => cni::run(&args, out),
        Command::Version => Ok(writeln!(out, "outgate {}", env!("CARGO_PKG_VERSION"))?),
        Command::Completions { shell } => {
            // The generator panics when its writer fails, so it gets one that does not.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "outgate", &mut script);
            Ok(out.write_all(&script)?)
        }
    }
}

/// Starts the log, on standard error. What libraries have to say is only for those who ask.
fn log(filter: &str) -> anyhow::Result<()> {
    let mut filter = tracing_subscriber::EnvFilter::try_new(filter)?;
    for quiet in [
        "kube_client=off",
        "kube_lease_manager=off",
        "tower=off",
        "hyper_util=warn",
        "rustls=warn",
        // It warns when notices were lost; everything is read again then.
        "netlink_proto=error",
    ] {
        let name = quiet.split('=').next().unwrap_or_default();
        if !filter.to_string().contains(name) {
            filter = filter.add_directive(quiet.parse()?);
        }
    }
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .with_env_filter(filter)
        .init();
    Ok(())
}

/// Runs on one thread until it is done.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    runtime.block_on(tokio::task::LocalSet::new().run_until(work))
}

/// An error that is the command line's, and ends the program as such.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongUsage(pub String);

/// Whether an error only says that nobody reads the output any more (`outgate flows | head`).
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
