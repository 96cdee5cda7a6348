//! Running other programs, with errors that name the command.

use std::{
    io::{BufRead as _, BufReader, IsTerminal as _, Read, Write as _},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail};

use crate::machine;

/// Cargo, in the checkout.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(machine::cargo());
    command.current_dir(machine::root());
    command
}

/// Runs a command whose output the developer sees.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a command and gives its standard output.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}: {}", shown(command), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command whose output the developer sees as it comes, and gives its lines as well.
pub(crate) fn tee(command: &mut Command) -> Result<(bool, Vec<String>)> {
    watch(command, |_| true)
}

/// Runs a talkative command: shown are the lines that tell its progress, and all of them when it fails.
pub(crate) fn run_showing(command: &mut Command, progress: fn(&str) -> bool) -> Result<()> {
    let (ok, lines) = watch(command, progress)?;
    if !ok {
        bail!("`{}` failed:\n{}", shown(command), lines.join("\n"));
    }
    Ok(())
}

fn watch(command: &mut Command, show: fn(&str) -> bool) -> Result<(bool, Vec<String>)> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let err = thread::spawn({
        let pipe = child.stderr.take();
        move || copy_lines(pipe, show)
    });
    let mut lines = copy_lines(child.stdout.take(), show);
    lines.extend(err.join().expect("the copying thread does not panic"));
    let status = child.wait().with_context(|| format!("cannot wait for `{}`", shown(command)))?;
    Ok((status.success(), lines))
}

/// Everything goes to standard error: standard output is for xtask's own result.
fn copy_lines(pipe: Option<impl Read>, show: fn(&str) -> bool) -> Vec<String> {
    let Some(pipe) = pipe else { return Vec::new() };
    let mut lines = Vec::new();
    let mut pipe = BufReader::new(pipe);
    let mut bytes = Vec::new();
    while pipe.read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        if show(&line) {
            // A closed standard error must not end the tests.
            let _ = std::io::stderr().lock().write_all(&bytes);
        }
        lines.push(line);
        bytes.clear();
    }
    lines
}

/// What `tee` hides from the child: whether a person is watching.
pub(crate) fn color_choice() -> &'static str {
    if std::io::stderr().is_terminal() { "always" } else { "never" }
}

/// The command as one would type it, without its environment.
pub(crate) fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}
