//! One network namespace, and what is run in it.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::command::{self, Output, Process, eventually_ok};

/// A network namespace of a lab, known to `ip netns` by its name. A handle: the lab removes the namespace.
///
/// Programs enter it by `nsenter --net`, not by `ip netns exec`: the latter makes a mount namespace too, in
/// which the lab's BPF filesystem would not be seen.
#[derive(Debug, Clone)]
pub struct Netns {
    name: Arc<str>,
    dir: Arc<Path>,
}

/// Numbers the logs of a process's programs.
static LOGS: AtomicUsize = AtomicUsize::new(0);

impl Netns {
    /// Makes the namespace, with its loopback up. Logs of its programs go to `dir`.
    pub(crate) fn create(name: &str, dir: &Path) -> Self {
        let _ = command::run(&["ip", "netns", "add", name], &[], "").expect_success();
        let netns = Self { name: name.into(), dir: dir.into() };
        netns.ip(&["link set lo up"]);
        netns
    }

    /// Makes it anew after it was removed.
    pub(crate) fn again(&self) -> Self {
        Self::create(&self.name, &self.dir)
    }

    /// New interfaces' IPv6 addresses are usable at once: nothing in a lab has an address twice.
    pub(crate) fn without_dad(&self) {
        // The larger of the two counts (Documentation/networking/ip-sysctl.rst, accept_dad).
        self.sysctl(&["net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"]);
    }

    /// Its name for `ip netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&*self.name)
    }

    /// The words that enter it.
    #[must_use]
    pub fn enter(&self) -> String {
        format!("nsenter --net=/run/netns/{}", self.name)
    }

    /// Runs a command that must succeed; gives its standard output.
    #[track_caller]
    #[expect(clippy::must_use_candidate, reason = "commands are run for their effect as often")]
    pub fn exec(&self, words: &[&str]) -> String {
        self.try_exec(words).expect_success()
    }

    /// Runs a command to its end.
    #[track_caller]
    #[must_use]
    pub fn try_exec(&self, words: &[&str]) -> Output {
        self.exec_input(words, &[], "")
    }

    /// Runs a command to its end with some environment and standard input.
    #[track_caller]
    #[must_use]
    pub fn exec_input(&self, words: &[&str], environment: &[(&str, &str)], input: &str) -> Output {
        self.with_enter(words, |words| command::run(words, environment, input))
    }

    /// Starts a program; `label` names its logs in the lab's directory.
    #[track_caller]
    #[must_use]
    pub fn spawn(&self, label: &str, words: &[&str], environment: &[(&str, &str)]) -> Process {
        let number = LOGS.fetch_add(1, Ordering::Relaxed);
        let log = self.dir.join(format!("{number:03}-{label}.log"));
        self.with_enter(words, |words| Process::spawn(words, environment, &log))
    }

    /// Runs `ip` commands, without the word `ip`, all at once.
    #[track_caller]
    pub fn ip(&self, commands: &[&str]) {
        let words = ["ip", "-n", &self.name, "-batch", "-"];
        let output = command::run(&words, &[], &commands.join("\n"));
        assert!(output.success(), "{}{}", output.explain(), commands.join("\n"));
    }

    /// Sets kernel parameters of the namespace, as `name=value`.
    #[track_caller]
    pub fn sysctl(&self, settings: &[&str]) {
        let mut words = vec!["sysctl", "-qw"];
        words.extend(settings);
        let _ = self.exec(&words);
    }

    /// Appends iptables rules, each `table chain rule…`, and waits for whoever holds the lock.
    #[track_caller]
    pub fn iptables(&self, rules: &[&str]) {
        self.append_rules("iptables", rules);
    }

    /// The same for IPv6.
    #[track_caller]
    pub fn ip6tables(&self, rules: &[&str]) {
        self.append_rules("ip6tables", rules);
    }

    #[track_caller]
    fn append_rules(&self, program: &str, rules: &[&str]) {
        for rule in rules {
            let (table, rest) = rule.split_once(' ').expect("a rule starts with its table");
            let mut words = vec![program, "-w", "-t", table, "-A"];
            words.extend(rest.split(' '));
            let _ = self.exec(&words);
        }
    }

    /// Waits until something listens on a port of `tcp` or `udp`.
    #[track_caller]
    pub fn wait_listening(&self, protocol: &str, port: u16) {
        let kind = if protocol == "udp" { "-Hlnu" } else { "-Hlnt" };
        let what = format!("a listener on {protocol} port {port} in {}", self.name);
        eventually_ok(&what, Duration::from_secs(10), || {
            let sockets = self.exec(&["ss", kind]);
            sockets.contains(&format!(":{port} ")).then_some(()).ok_or(sockets)
        });
    }

    /// A counter of `/proc/net/snmp`, for instance `("Tcp", "RetransSegs")`.
    #[track_caller]
    #[must_use]
    pub fn snmp(&self, protocol: &str, counter: &str) -> u64 {
        let text = self.exec(&["cat", "/proc/net/snmp"]);
        let mut rows = text.lines().filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(": "));
        let (names, values) = (rows.next().unwrap_or_default(), rows.next().unwrap_or_default());
        let mut pairs = names.split(' ').zip(values.split(' '));
        let found = pairs.find(|(name, _)| *name == counter).and_then(|(_, value)| value.parse().ok());
        found.unwrap_or_else(|| panic!("/proc/net/snmp has no {protocol} {counter}:\n{text}"))
    }

    fn with_enter<T>(&self, words: &[&str], then: impl FnOnce(&[&str]) -> T) -> T {
        let enter = format!("--net=/run/netns/{}", self.name);
        let mut all = vec!["nsenter", &enter];
        all.extend(words);
        then(&all)
    }
}

/// Device and inode of a namespace's file: the same for every file that stands for it.
pub(crate) fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
