//! The `outgate` command.

use std::io::{Write as _, stderr, stdout};
use std::process::ExitCode;

use clap::Parser as _;
use outgate::{cli, commands};

fn main() -> ExitCode {
    // Wrong usage ends here, with exit code 2.
    let cli = cli::Cli::parse();
    match commands::run(cli, &mut stdout().lock()) {
        Err(error) if !commands::is_broken_pipe(&error) => {
            // Nobody is left to tell when this fails.
            let _ = writeln!(stderr(), "outgate: {error:#}");
            if error.is::<commands::WrongUsage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
        _ => ExitCode::SUCCESS,
    }
}
