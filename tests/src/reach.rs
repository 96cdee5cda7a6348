//! Who reaches whom: tries, and what should come of them.

use std::time::Duration;

use crate::command::eventually_ok;
use crate::family::endpoint;
use crate::netns::Netns;
use crate::record::Recorder;
use crate::servers::ECHO;

/// What [`Netns::reach`] says of a server that answers.
pub const OPEN: &str = "open";
/// And of one that does not, without any error.
pub const SILENT: &str = "silent";
/// For a change to be in force, on a busy machine.
const LIMIT: Duration = Duration::from_secs(5);

/// The lab's server at an address over TCP, as [`Netns::reach`] takes it.
#[must_use]
pub fn tcp(address: &str) -> String {
    format!("tcp/{}", endpoint(address, ECHO))
}

/// The same over UDP.
#[must_use]
pub fn udp(address: &str) -> String {
    format!("udp/{}", endpoint(address, ECHO))
}

/// Waits until all tries come out as they should, TCP and UDP of the lab's server on each address.
#[track_caller]
pub fn expect(pod: &Netns, wanted: &[(&str, &str)]) {
    let targets: Vec<_> = wanted
        .iter()
        .flat_map(|(address, outcome)| [(tcp(address), *outcome), (udp(address), *outcome)])
        .collect();
    expect_targets(pod, &targets);
}

/// The same of whole targets.
#[track_caller]
pub fn expect_targets<T: AsRef<str>>(pod: &Netns, wanted: &[(T, &str)]) {
    let targets: Vec<_> = wanted.iter().map(|(target, _)| target.as_ref()).collect();
    eventually_ok(&format!("reached from {}", pod.name()), LIMIT, || {
        let outcomes = pod.reach(&targets);
        let wrong: Vec<_> = wanted
            .iter()
            .zip(&outcomes)
            .filter(|((_, wanted), got)| wanted != got)
            .map(|((target, wanted), got)| format!("{}: {got}, not {wanted}", target.as_ref()))
            .collect();
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
    });
}

/// Panics if the host sees a packet from one of these sources while `attempt` is made.
#[track_caller]
pub fn nothing_arrives(host: &Netns, sources: &[&str], attempt: impl FnOnce()) {
    let recorder = Recorder::start(host);
    attempt();
    for protocol in ["tcp", "udp", "icmp", "ipv6-icmp"] {
        let mut seen = recorder.sources(protocol);
        seen.retain(|source, _| sources.contains(&source.as_str()));
        assert!(seen.is_empty(), "{protocol} in {}: {seen:?}", host.name());
    }
}
