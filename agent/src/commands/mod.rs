//! What the commands do. They print through a writer, so that tests can read it.

mod agent;
mod cleanup;
mod crds;
mod flows;
mod monitor;
mod status;
mod trace;

use std::io::{self, Write};

use clap::CommandFactory as _;

use crate::cli::{Cli, Command};

/// Runs a command. Results go to `out`, the agent's log to standard error.
pub fn run(cli: Cli, out: &mut impl Write) -> anyhow::Result<()> {
    match cli.command {
        Command::Agent(args) => agent::run(args),
        Command::Status(args) => status::run(&args, out),
        Command::Flows(args) => flows::run(&args, out),
        Command::Monitor(args) => monitor::run(&args, out),
        Command::Trace(args) => trace::run(&args, out),
        Command::Cleanup(args) => cleanup::run(&args, out),
        Command::Crds => crds::run(out),
        Command::Version => Ok(writeln!(out, "outgate {}", env!("CARGO_PKG_VERSION"))?),
        Command::Completions { shell } => {
            // The generator panics when its writer fails, so it gets one that does not.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "outgate", &mut script);
            Ok(out.write_all(&script)?)
        }
    }
}

/// Whether an error only says that nobody reads the output any more (`outgate flows | head`).
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
