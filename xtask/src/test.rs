//! `test`: every rung in order, and one line of counts at the end.
//!
//! Rungs, least powerful first: lint; `cargo test` without root; the lab as root (programs on built packets,
//! then whole nodes in network namespaces). A rung that cannot run is said loudly and fails the command.

use std::{path::Path, process::Command};

use anyhow::{Result, bail};
use clap::Args;

use crate::{build, kube, leftovers, lint, machine, process, setup, ui};

/// What to test.
#[derive(Args)]
pub(crate) struct Options {
    /// Run only the tests whose name contains this
    filter: Option<String>,
    /// Skip the first rung: formatting, clippy and the house rules
    #[arg(long)]
    no_lint: bool,
    /// Only what needs no root
    #[arg(long)]
    unprivileged: bool,
}

/// What came out of some tests.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u32,
    failed: u32,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// `cargo xtask test`.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.unprivileged {
        setup::ensure_build()?;
    } else {
        setup::ensure_tests()?;
    }
    let agent = build::build(false)?;
    let mut total = Counts::default();
    let mut not_run = Vec::new();

    if !options.no_lint && options.filter.is_none() {
        ui::heading("rung 1: lint");
        total.add(outcome(lint::check()));
    }
    ui::heading("rung 2: tests without root");
    total.add(cargo_test(options, &[], |_| {})?);
    total.add(doc_tests(options)?);

    ui::heading("rung 3: the lab, as root");
    let missing = machine::missing_capabilities();
    if options.unprivileged {
        ui::note("test", "not run: --unprivileged");
    } else if !machine::is_root() || !missing.is_empty() {
        not_run.push(format!("the lab (needs root; missing: {})", missing.join(" ")));
    } else {
        total.add(lab(options, &agent)?);
    }
    finish(total, &not_run, options)
}

fn finish(total: Counts, not_run: &[String], options: &Options) -> Result<()> {
    ui::heading("result");
    for rung in not_run {
        ui::note("NOT RUN", rung);
    }
    ui::result(&format!("{} passed, {} failed", total.passed, total.failed));
    if total.failed > 0 {
        bail!("{} failed, see above", total.failed);
    }
    if !not_run.is_empty() {
        bail!("not all rungs were run; run as root, or pass --unprivileged to leave them out");
    }
    if total.passed == 0 {
        bail!("no test has {} in its name", options.filter.as_deref().unwrap_or("anything"));
    }
    Ok(())
}

/// A check that is not a test of the harness counts as one.
fn outcome(result: Result<()>) -> Counts {
    match result {
        Ok(()) => Counts { passed: 1, failed: 0 },
        Err(error) => {
            ui::error(&error);
            Counts { passed: 0, failed: 1 }
        }
    }
}

/// The lab's tests, and whether they left the machine as it was.
fn lab(options: &Options, agent: &Path) -> Result<Counts> {
    let before = leftovers::Before::look();
    let object = machine::bpf_object()?;
    let kube = kube::assets()?;
    let mut counts = cargo_test(options, &["--package", "lab"], |command| {
        command
            .env("OUTGATE_BIN", agent)
            .env(kube::ASSETS_VARIABLE, &kube)
            .env(build::OBJECT_VARIABLE, &object)
            .env(leftovers::RUN_VARIABLE, before.run());
    })?;
    if counts == Counts::default() {
        return Ok(counts); // no test of that name made anything
    }
    let left = before.left_behind();
    for thing in &left {
        ui::note("left", thing);
    }
    if left.is_empty() {
        ui::note("test", "the lab left nothing behind");
        counts.passed += 1;
    } else {
        ui::note("test", "FAILED: the lab left the above behind");
        counts.failed += 1;
    }
    Ok(counts)
}

/// Who runs the tests, and so how the counts are told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Harness {
    Nextest,
    Cargo,
}

/// Runs a package's tests, or the default members', with cargo-nextest where it is installed.
fn cargo_test(options: &Options, packages: &[&str], adjust: impl Fn(&mut Command)) -> Result<Counts> {
    let mut command = process::cargo();
    let harness = if machine::find_program("cargo-nextest").is_some() {
        command.args(["nextest", "run", "--no-tests=pass"]);
        Harness::Nextest
    } else {
        command.args(["test", "--lib", "--bins", "--tests"]);
        Harness::Cargo
    };
    command.args(["--no-fail-fast", "--color", process::color_choice()]).args(packages);
    command.args(&options.filter).env(build::OBJECT_VARIABLE, machine::bpf_object()?);
    adjust(&mut command);
    counted(&mut command, harness)
}

/// Examples in documentation; nextest does not run them.
fn doc_tests(options: &Options) -> Result<Counts> {
    let mut command = process::cargo();
    command.args(["test", "--doc", "--quiet", "--no-fail-fast", "--package", "outgate-datapath"]);
    command.args(&options.filter).env(build::OBJECT_VARIABLE, machine::bpf_object()?);
    counted(&mut command, Harness::Cargo)
}

/// Runs tests and reads their counts. A command that fails without a failed test (it did not compile) is one.
fn counted(command: &mut Command, harness: Harness) -> Result<Counts> {
    let (ok, lines) = process::tee(command)?;
    let mut counts = count(&lines, harness);
    if !ok && counts.failed == 0 {
        ui::note("test", &format!("FAILED: `{}`", process::shown(command)));
        counts.failed = 1;
    }
    Ok(counts)
}

/// Reads the harness's own summary: nextest's single one, or the sum over cargo's, one a program.
///
/// A failed test's output is among the lines and may hold a summary of the other kind, or an earlier one.
fn count(lines: &[String], harness: Harness) -> Counts {
    let plain = lines.iter().map(|line| without_colors(line));
    let summaries = plain.filter_map(|line| {
        let line = line.trim();
        match harness {
            Harness::Nextest => Some(line.strip_prefix("Summary [")?.split_once("run:")?.1.to_owned()),
            Harness::Cargo => Some(line.strip_prefix("test result:")?.to_owned()),
        }
    });
    let mut sum = Counts::default();
    for summary in summaries {
        if harness == Harness::Nextest {
            sum = Counts::default();
        }
        sum.add(parse_counts(&summary));
    }
    sum
}

/// `4 passed (1 slow), 1 failed, 1 timed out, 0 skipped` or `ok. 3 passed; 0 failed; 0 ignored; ...`.
fn parse_counts(summary: &str) -> Counts {
    let mut counts = Counts::default();
    let words: Vec<&str> =
        summary.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    for (index, word) in words.iter().enumerate() {
        let Ok(number) = word.parse::<u32>() else { continue };
        match words[index + 1..] {
            ["passed", ..] => counts.passed += number,
            ["failed" | "exec", ..] | ["timed", "out", ..] => counts.failed += number,
            _ => {}
        }
    }
    counts
}

fn without_colors(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut escaped = false;
    for c in line.chars() {
        match (escaped, c) {
            (false, '\x1b') => escaped = true,
            (false, c) => plain.push(c),
            (true, 'm') => escaped = false,
            (true, _) => {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(lines: &[&str], harness: Harness) -> (u32, u32) {
        let lines: Vec<String> = lines.iter().map(ToString::to_string).collect();
        let Counts { passed, failed } = count(&lines, harness);
        (passed, failed)
    }

    #[test]
    fn reads_nextests_summary() {
        let all = "     Summary [   0.012s] 5 tests run: 5 passed, 0 skipped";
        assert_eq!(counts(&[all], Harness::Nextest), (5, 0));
        let mixed = "     Summary [  61.0s] 9/12 tests run: 5 passed (1 slow, 2 leaky), 2 failed, \
                     1 exec failed, 1 timed out, 3 skipped";
        assert_eq!(counts(&[mixed], Harness::Nextest), (5, 4));
    }

    #[test]
    fn a_failed_tests_output_does_not_count() {
        let lines = [
            "    test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 2 filtered out",
            "    Summary [   9.9s] 7 tests run: 7 passed, 0 skipped",
            "     Summary [   0.1s] 3 tests run: 2 passed, 1 failed, 0 skipped",
            "        PASS [   0.1s] lab tests::9 passed, 2 failed",
        ];
        assert_eq!(counts(&lines, Harness::Nextest), (2, 1));
    }

    #[test]
    fn colors_do_not_hide_the_counts() {
        let line = "\x1b[32;1m     Summary\x1b[0m [   0.5s] \x1b[1m3\x1b[0m tests run: \x1b[1m3\x1b[0m \
                    \x1b[32;1mpassed\x1b[0m, \x1b[1m0\x1b[0m \x1b[33;1mskipped\x1b[0m";
        assert_eq!(counts(&[line], Harness::Nextest), (3, 0));
    }

    #[test]
    fn sums_cargos_own_summaries() {
        let lines = [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: FAILED. 1 passed; 2 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.01s",
        ];
        assert_eq!(counts(&lines, Harness::Cargo), (4, 2));
    }
}
