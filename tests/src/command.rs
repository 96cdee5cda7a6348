//! Running commands: every failure shows the whole command line, ready to be pasted into a root shell.

use std::env;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{panicking, sleep};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How often a condition is looked at again. Short against every time a test asserts.
const POLL: Duration = Duration::from_millis(10);

/// What a finished command said.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command as one would type it.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, lossy UTF-8.
    pub stdout: String,
    /// Its standard error, lossy UTF-8.
    pub stderr: String,
}

impl Output {
    /// Standard output of a command that must have succeeded.
    #[track_caller]
    #[must_use]
    pub fn expect_success(self) -> String {
        assert!(self.status.success(), "{}", self.explain());
        self.stdout
    }

    /// Whether it ended with exit code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Everything about it, for a failure's message.
    #[must_use]
    pub fn explain(&self) -> String {
        format!("`{}`: {}\n{}{}", self.line, self.status, self.stdout, self.stderr)
    }
}

/// Words as one would type them: those with a shell's special characters in single quotes.
pub(crate) fn shown(words: &[&str]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+".contains(c);
    let quoted = words.iter().map(|word| {
        if !word.is_empty() && word.chars().all(plain) {
            (*word).to_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// Runs a command to its end with `input` on its standard input.
#[track_caller]
pub(crate) fn run(words: &[&str], environment: &[(&str, &str)], input: &str) -> Output {
    let line = shown(words);
    let mut child = Command::new(words[0])
        .args(&words[1..])
        .envs(environment.iter().copied())
        .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("`{line}` cannot be started: {error}"));
    if let Some(mut stdin) = child.stdin.take() {
        // A command that ends without reading is judged by its exit code.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().unwrap_or_else(|error| panic!("`{line}`: {error}"));
    Output {
        line,
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Looks at a condition until it gives a value; `None` at the deadline. Says how long it took.
pub fn eventually<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<(T, Duration)> {
    let start = Instant::now();
    loop {
        if let Some(value) = look() {
            return Some((value, start.elapsed()));
        }
        if start.elapsed() >= limit {
            return None;
        }
        sleep(POLL);
    }
}

/// [`eventually`] for checks that say what is missing; panics with the last complaint at the deadline.
#[track_caller]
pub fn eventually_ok<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let mut complaint = String::new();
    let found = eventually(limit, || look().map_err(|error| complaint = error).ok());
    match found {
        Some((value, _)) => value,
        None => panic!("not within {limit:?}: {what}: {complaint}"),
    }
}

/// A running program. Dropping the value kills it, by its pid.
#[derive(Debug)]
pub struct Process {
    child: Child,
    line: String,
    stdout: PathBuf,
    stderr: PathBuf,
    detached: bool,
}

impl Process {
    /// Starts a program whose output goes to `<log>.out` and `<log>.err`, in a process group of its own, so
    /// that Ctrl-C in a terminal reaches the lab's owner only.
    #[track_caller]
    pub(crate) fn spawn(words: &[&str], environment: &[(&str, &str)], log: &Path) -> Self {
        let line = shown(words);
        let stdout = log.with_extension("out");
        let stderr = log.with_extension("err");
        let file = |path: &Path| File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let child = Command::new(words[0])
            .args(&words[1..])
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(file(&stdout))
            .stderr(file(&stderr))
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("`{line}` cannot be started: {error}"));
        Self { child, line, stdout, stderr, detached: false }
    }

    /// Its process id: `nsenter` and its kin replace themselves by the program, so this is the program's.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        read_lossy(&self.stdout)
    }

    /// What it has written to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr)
    }

    /// Where its standard error goes.
    #[must_use]
    pub fn stderr_path(&self) -> &Path {
        &self.stderr
    }

    /// Waits until standard output holds `text`.
    #[track_caller]
    pub fn wait_stdout(&mut self, text: &str, limit: Duration) {
        let found = eventually(limit, || {
            // The order matters: what a program wrote before it ended is seen.
            let ended = self.try_wait().is_some();
            (self.stdout().contains(text) || ended).then_some(())
        });
        assert!(found.is_some() && self.stdout().contains(text), "no '{text}' from {}", self.explain());
    }

    /// Its exit status, if it has ended.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap_or_else(|error| panic!("`{}`: {error}", self.line))
    }

    /// Waits for its end.
    #[track_caller]
    #[must_use]
    pub fn wait(mut self, limit: Duration) -> Output {
        let ended = eventually(limit, || self.try_wait());
        let Some((status, _)) = ended else { panic!("still running after {limit:?}: {}", self.explain()) };
        Output { line: self.line.clone(), status, stdout: self.stdout(), stderr: self.stderr() }
    }

    /// Closes its standard input, which tells the lab's own programs to report and end.
    #[track_caller]
    #[must_use]
    pub fn finish(mut self, limit: Duration) -> Output {
        drop(self.child.stdin.take());
        self.wait(limit)
    }

    /// Asks it to end with SIGTERM and waits.
    #[track_caller]
    #[must_use]
    pub fn terminate(self, limit: Duration) -> Output {
        signal(self.pid(), Signal::TERM);
        self.wait(limit)
    }

    /// Ends it with SIGINT, as Ctrl-C does, and waits.
    #[track_caller]
    #[must_use]
    pub fn interrupt(self, limit: Duration) -> Output {
        signal(self.pid(), Signal::INT);
        self.wait(limit)
    }

    /// Ends it with SIGKILL, as a crash or the kernel's memory killer would.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Leaves it running when the value is dropped.
    pub fn detach(&mut self) {
        self.detached = true;
    }

    fn explain(&self) -> String {
        format!("`{}`\n{}{}", self.line, self.stdout(), self.stderr())
    }
}

/// Whether a failed test's lab stays, with everything that runs in it.
pub(crate) fn keep_failed() -> bool {
    panicking() && env::var_os("OUTGATE_LAB_KEEP").is_some()
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.detached && !keep_failed() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Sends a signal to one process; that it has ended already is no error.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_command_can_be_pasted() {
        assert_eq!(shown(&["ip", "-n", "og1-web", "addr"]), "ip -n og1-web addr");
        assert_eq!(shown(&["sh", "-c", "echo 'a b'", ""]), r"sh -c 'echo '\''a b'\''' ''");
    }

    #[test]
    fn a_failure_shows_command_code_and_output() {
        let output = run(&["sh", "-c", "echo out; echo err >&2; exit 3"], &[], "");
        assert!(!output.success());
        let text = output.explain();
        for part in ["sh -c", "exit status: 3", "out", "err"] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
    }

    #[test]
    fn input_reaches_the_command() {
        assert_eq!(run(&["cat"], &[], "hello").expect_success(), "hello");
    }
}
