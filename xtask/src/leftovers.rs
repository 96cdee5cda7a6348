//! What a run may leave behind on the machine: namespaces, links, pins and processes.
//!
//! The lab removes all it makes, also when a test fails. This looks from outside, so that a leak is a failure
//! of the run that made it and not a riddle in the next.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Environment of everything a run starts, so that its processes are known even when their parents are gone.
pub(crate) const RUN_VARIABLE: &str = "OUTGATE_TEST_RUN";
/// How the lab's namespaces, and links of its own in the host's namespace, begin.
const LAB_PREFIX: &str = "og";
/// Processes that were killed need a moment to be gone.
const PATIENCE: Duration = Duration::from_secs(3);

/// What stood on the machine before a run.
pub(crate) struct Before {
    things: BTreeSet<String>,
    run: String,
}

impl Before {
    /// Looks around.
    pub(crate) fn look() -> Self {
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self { things: things(), run: format!("{}-{}", std::process::id(), time.as_millis()) }
    }

    /// The value of [`RUN_VARIABLE`] for everything that this run starts.
    pub(crate) fn run(&self) -> &str {
        &self.run
    }

    /// What is there now and was not, one line each.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut left: Vec<String> = things().difference(&self.things).cloned().collect();
            left.extend(processes(&self.run));
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn things() -> BTreeSet<String> {
    let namespaces = names("/run/netns").into_iter().filter(|name| name.starts_with(LAB_PREFIX));
    let links = names("/sys/class/net")
        .into_iter()
        .filter(|name| name.starts_with(LAB_PREFIX) || name.starts_with("outgate"));
    let pins =
        names("/sys/fs/bpf").into_iter().filter(|name| name.starts_with(LAB_PREFIX) || name == "outgate");
    namespaces
        .map(|name| format!("network namespace {name}: `ip netns del {name}`"))
        .chain(links.map(|name| format!("link {name}: `ip link del {name}`")))
        .chain(pins.map(|name| format!("pins /sys/fs/bpf/{name}: `rm -r /sys/fs/bpf/{name}`")))
        .collect()
}

fn names(directory: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Processes that carry this run's mark in their environment.
fn processes(run: &str) -> Vec<String> {
    let mark = format!("{RUN_VARIABLE}={run}");
    let mut found = Vec::new();
    for pid in names("/proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
        let process = Path::new("/proc").join(&pid);
        let Ok(environment) = fs::read(process.join("environ")) else { continue };
        if environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
            let command = fs::read(process.join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            found.push(format!("process {pid}: {}", command.trim()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn an_orphan_is_known_by_its_mark() {
        let before = Before::look();
        let mut child = Command::new("sleep").arg("60").env(RUN_VARIABLE, before.run()).spawn().unwrap();
        let left = processes(before.run());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(left.len(), 1, "{left:?}");
        assert!(left[0].ends_with("sleep 60"), "{left:?}");
        assert_eq!(processes(before.run()), Vec::<String>::new());
    }
}
