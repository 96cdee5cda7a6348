//! The `outgate` command.

use std::io::{Write as _, stderr, stdout};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser as _;
use outgate::{cli, cni, commands};

fn main() -> ExitCode {
    // Wrong usage ends here, with exit code 2.
    let cli = if is_plugin() { cli::Cli::parse_from(["outgate", "cni"]) } else { cli::Cli::parse() };
    match commands::run(cli, &mut stdout().lock()) {
        Err(error) if !commands::is_broken_pipe(&error) => {
            // Nobody is left to tell when this fails.
            let _ = writeln!(stderr(), "outgate: {error:#}");
            if error.is::<commands::WrongUsage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Whether a container runtime started it as a CNI plugin: by that name, and without arguments.
fn is_plugin() -> bool {
    let name = std::env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_name() == Some(cni::plugin::NAME.as_ref()))
}
