//! How long a new pod's traffic is held. It prints and judges nothing: a machine's noise is not a failure.
//!
//! `cargo test -p lab --test cni_latency -- --ignored --nocapture --test-threads 1`
#![expect(clippy::print_stdout, reason = "figures are what it is for")]

use std::env;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use lab::scene::{EGRESS, Scene};
use lab::{Cni, Lab, Pod, PodSpec};
use serde_json::{Value, json};

fn how_many() -> usize {
    env::var("OUTGATE_LAB_PODS").ok().and_then(|text| text.parse().ok()).unwrap_or(100)
}

/// What one pod has measured, in microseconds.
struct Sample {
    /// From when the runtime was ready until the server's first answer was there.
    answered: i64,
    /// Outgate's plugin, its process's start included.
    plugin: i64,
}

fn sample(pod: &mut Pod) -> Sample {
    let text = pod.early.take().expect("an early program").finish(Duration::from_mins(1)).expect_success();
    let line = text.lines().rfind(|line| line.starts_with('{')).unwrap_or_default();
    let report: Value = serde_json::from_str(line).expect("a report");
    assert_eq!(report["source"], EGRESS, "{}", pod.full_name());
    let at = report["nanoseconds"].as_i64().expect("a time");
    let plugin = pod.held.as_micros().try_into().expect("it is short");
    Sample { answered: (at - pod.ready_at) / 1000, plugin }
}

fn print(what: &str, mut values: Vec<i64>) {
    values.sort_unstable();
    let mut line = format!("{what}: {} pods, ms:", values.len());
    for percent in [50, 90, 99, 100] {
        let value = values[(values.len() * percent).div_ceil(100).max(1) - 1];
        let _ = write!(line, " p{percent} {}.{}", value / 1000, value % 1000 / 100);
    }
    println!("{line}");
}

/// Pods of node-a that knock as soon as the runtime is ready, so many at a time. (A program that speaks before the
/// host's side is whole waits for the kernel's second ARP request, a second later.)
fn measure(
    cni: Cni,
    what: &str,
    hands: usize,
    kind: impl Fn(&Lab, PodSpec) -> PodSpec + Sync,
) -> Vec<Sample> {
    let scene = Scene::new(cni);
    let (lab, server) = (&scene.lab, scene.server.as_str());
    let _warm = scene.warm("node-a");
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..hands {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= how_many() {
                        break;
                    }
                    let spec = PodSpec::new("prod", &format!("p{number}")).early(&["bulk", "knock", server]);
                    let mut pod = lab.run_pod("node-a", &kind(lab, spec));
                    let sample = sample(&mut pod);
                    done.lock().expect("no thread failed").push((pod, sample));
                }
            });
        }
    });
    let samples: Vec<_> = done.into_inner().expect("no thread failed").into_iter().map(|(_, s)| s).collect();
    print(
        &format!("{cni:?}, {hands} at a time, {what}: ready to first answer"),
        samples.iter().map(|s| s.answered).collect(),
    );
    samples
}

fn cached(cni: Cni, hands: usize) {
    let _ = measure(cni, "libcni's cache", hands, |_, spec| spec.pending().cached());
}

fn chained(cni: Cni, hands: usize) {
    let samples = measure(cni, "the chained plugin", hands, |lab, spec| {
        spec.pending().chained(json!({"socket": lab.cni_socket("node-a"), "timeoutSeconds": 30}))
    });
    print("  the plugin's share of ADD", samples.iter().map(|s| s.plugin).collect());
}

#[test]
#[ignore = "prints figures, shows nothing"]
fn ptp_pods_by_libcnis_cache() {
    for hands in [1, 6] {
        cached(Cni::Ptp, hands);
    }
}

#[test]
#[ignore = "prints figures, shows nothing"]
fn bridge_pods_by_libcnis_cache() {
    for hands in [1, 6] {
        cached(Cni::Bridge, hands);
    }
}

#[test]
#[ignore = "prints figures, shows nothing"]
fn ptp_pods_by_the_chained_plugin() {
    for hands in [1, 6] {
        chained(Cni::Ptp, hands);
    }
}

#[test]
#[ignore = "prints figures, shows nothing"]
fn bridge_pods_by_the_chained_plugin() {
    for hands in [1, 6] {
        chained(Cni::Bridge, hands);
    }
}
