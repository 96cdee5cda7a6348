//! What a run may leave behind on the machine: namespaces, links, pins, directories and processes.
//!
//! The lab removes all it makes, also when a test fails or is killed. This looks from outside, so that a leak is
//! a failure of the run that made it and not a riddle in the next. Other runs may go on at the same time: what
//! belongs to a living process of theirs is not ours to report.

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Environment of everything a run starts, so that its processes are known even when their parents are gone.
pub(crate) const RUN_VARIABLE: &str = "OUTGATE_TEST_RUN";
/// The lab names everything of its own `og<pid of its owner>…`.
const LAB_PREFIX: &str = "og";
/// When its owner is gone the lab is removed by another process, which gives up after ten seconds.
const PATIENCE: Duration = Duration::from_secs(12);

/// What stood on the machine before a run.
pub(crate) struct Before {
    things: BTreeMap<String, String>,
    run: String,
}

impl Before {
    /// Looks around.
    pub(crate) fn look() -> Self {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { things: things(), run: format!("{}-{}", std::process::id(), time.as_millis()) }
    }

    /// The value of [`RUN_VARIABLE`] for everything that this run starts.
    pub(crate) fn run(&self) -> &str {
        &self.run
    }

    /// What is there now and was not, one line each, with the command that removes it.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut left: Vec<String> = things()
                .into_iter()
                .filter(|(thing, name)| !self.things.contains_key(thing) && !self.is_anothers(name))
                .map(|(thing, _)| thing)
                .collect();
            left.extend(
                processes(&self.run).into_iter().map(|(pid, command)| format!("process {pid}: {command}")),
            );
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Whether the thing of that name belongs to a living process that this run did not start.
    fn is_anothers(&self, name: &str) -> bool {
        owner(name).is_some_and(|pid| Path::new("/proc").join(pid).exists() && !carries(pid, &self.run))
    }
}

/// The process that a lab's name speaks of.
fn owner(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(LAB_PREFIX)?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    (end > 0).then(|| &rest[..end])
}

/// Everything that looks like Outgate's or the lab's: how to remove it, and its name.
fn things() -> BTreeMap<String, String> {
    let labs = env::temp_dir().join("outgate-lab");
    let labs = labs.to_string_lossy();
    let places: [(&str, &str, &str); 4] = [
        ("/run/netns", "network namespace", "ip netns del "),
        ("/sys/class/net", "link", "ip link del "),
        ("/sys/fs/bpf", "pins", "rm -r /sys/fs/bpf/"),
        (&labs, "lab's directory", &format!("rm -r {labs}/")),
    ];
    let mut things = BTreeMap::new();
    for (place, kind, command) in places {
        for name in names(Path::new(place)) {
            if owner(&name).is_some() || name.starts_with("outgate") {
                things.insert(format!("{kind} {name} (`{command}{name}`)"), name);
            }
        }
    }
    things
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Processes that carry this run's mark, with their command lines.
fn processes(run: &str) -> Vec<(String, String)> {
    let pids =
        names(Path::new("/proc")).into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    pids.filter(|pid| carries(pid, run))
        .map(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            (pid, command.trim().to_owned())
        })
        .collect()
}

/// Whether a process has the run's mark in its environment.
fn carries(pid: &str, run: &str) -> bool {
    let mark = format!("{RUN_VARIABLE}={run}");
    fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| {
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn an_orphan_is_known_by_its_mark() {
        let before = Before::look();
        let mut child = Command::new("sleep").arg("60").env(RUN_VARIABLE, before.run()).spawn().unwrap();
        // The kernel sets a new program's environment a moment after its parent goes on.
        let deadline = Instant::now() + PATIENCE;
        let left = loop {
            let left = processes(before.run());
            if left.iter().any(|(_, command)| !command.is_empty()) || Instant::now() > deadline {
                break left;
            }
        };
        let (own, anothers) = (format!("og{}-node-a", child.id()), format!("og{}x2", std::process::id()));
        let whose = (before.is_anothers(&own), before.is_anothers(&anothers));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(left[0].1, "sleep 60");
        assert_eq!(whose, (false, true));
        assert!(!before.is_anothers(&own), "its owner is dead");
        assert_eq!(processes(before.run()), Vec::new());
    }

    #[test]
    fn reads_the_owner_from_a_labs_name() {
        assert_eq!(owner("og123-node-a"), Some("123"));
        assert_eq!(owner("og123x1-prod-web"), Some("123"));
        assert_eq!(owner("ogre"), None);
        assert_eq!(owner("eth0"), None);
    }
}
