//! What the developer sees. Progress goes to standard error, results to standard output.

use std::time::{Duration, Instant};

/// A line about something that was looked at or done: `topic  what`.
pub(crate) fn note(topic: &str, what: &str) {
    eprintln!("{topic:<8} {what}");
}

/// A heading over everything that follows it.
pub(crate) fn heading(title: &str) {
    eprintln!("\n== {title}");
}

/// The line a caller may count on; the only one that goes to standard output.
#[expect(clippy::print_stdout, reason = "the one place where xtask prints a result")]
pub(crate) fn result(line: &str) {
    println!("{line}");
}

/// One line for the error and its causes.
pub(crate) fn error(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}

/// Measures a step; what it does in between may print its own progress.
pub(crate) struct Step {
    topic: &'static str,
    begun: Instant,
}

impl Step {
    /// Says what is about to be done.
    pub(crate) fn begin(topic: &'static str, what: &str) -> Self {
        note(topic, &format!("{what} ..."));
        Self { topic, begun: Instant::now() }
    }

    /// Says what came of it, and how long it took.
    pub(crate) fn done(self, outcome: &str) {
        note(self.topic, &format!("{outcome} ({})", seconds(self.begun.elapsed())));
    }
}

/// `0.4 s`, `12.0 s`.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
