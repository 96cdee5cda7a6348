//! How long a new pod's traffic is held. It prints and judges nothing: a machine's noise is not a failure.
//!
//! `cargo test -p lab --test cni_latency -- --ignored --nocapture --test-threads 1`

use std::env;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use lab::servers::ECHO;
use lab::{Cni, Lab, LabSpec, Pod, PodSpec};
use serde_json::{Value, json};

const EGRESS: &str = "172.18.0.101";

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
    let at = |percent: usize| values[(values.len() * percent).div_ceil(100).max(1) - 1] as f64 / 1000.0;
    println!(
        "{what}: {} pods, p50 {:.1} ms, p90 {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
        values.len(),
        at(50),
        at(90),
        at(99),
        at(100)
    );
}

/// Pods of node-a that knock as soon as the runtime is ready, so many at a time. (A program that speaks before the
/// host's side is whole waits for the kernel's second ARP request, a second later.)
fn measure(
    cni: Cni,
    what: &str,
    hands: usize,
    kind: impl Fn(&Lab, PodSpec) -> PodSpec + Sync,
) -> Vec<Sample> {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let warm = lab.run_pod("node-a", &PodSpec::new("prod", "warm"));
    lab.wait_source(&warm.netns, &server, EGRESS);
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..hands {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= how_many() {
                        break;
                    }
                    let spec = PodSpec::new("prod", &format!("p{number}")).early(&["bulk", "knock", &server]);
                    let mut pod = lab.run_pod("node-a", &kind(&lab, spec));
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
    [1, 6].map(|hands| cached(Cni::Ptp, hands));
}

#[test]
#[ignore = "prints figures, shows nothing"]
fn bridge_pods_by_libcnis_cache() {
    [1, 6].map(|hands| cached(Cni::Bridge, hands));
}

#[test]
#[ignore = "prints figures, shows nothing"]
fn ptp_pods_by_the_chained_plugin() {
    [1, 6].map(|hands| chained(Cni::Ptp, hands));
}

#[test]
#[ignore = "prints figures, shows nothing"]
fn bridge_pods_by_the_chained_plugin() {
    [1, 6].map(|hands| chained(Cni::Bridge, hands));
}
