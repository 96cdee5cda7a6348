//! The agent sees its node as it is, whatever else speaks netlink.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lab::hostile::Outside;
use lab::servers::ECHO;
use lab::{Agent, Lab, LabSpec, PodSpec};

const EGRESS: &str = "172.18.0.101";

/// Adds and removes an address under sequence numbers that count from 1, as the CNI plugins
/// netlink library does in each of its processes. The kernel puts the number of who asked into the notice that all
/// listeners get.
const NOISE: &str = "
import socket, struct, time
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
def attr(kind, data):
    n = 4 + len(data)
    return struct.pack('HH', n, kind) + data + b'\\0' * (-n % 4)
def say(kind, flags, seq, body):
    s.send(struct.pack('IHHII', 16 + len(body), kind, flags | 1 | 4, seq, 0) + body)
    s.recv(65536)
index = socket.if_nametoindex('noise')
end = time.time() + SECONDS
print('running', flush=True)
while time.time() < end:
    for seq in range(1, 200):
        ip = bytes([198, 18, 0, seq])
        address = struct.pack('BBBBI', 2, 32, 0, 0, index) + attr(2, ip) + attr(1, ip)
        say(20, 0x600, seq, address)
        say(21, 0, seq, address)
        if time.time() > end: break
";

/// The names of a node's pinned links.
fn pinned(lab: &Lab, node: &str) -> BTreeSet<String> {
    let versions = fs::read_dir(lab.bpffs(node)).into_iter().flatten().flatten();
    let links = versions.flat_map(|version| fs::read_dir(version.path().join("links")).into_iter().flatten());
    links.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A notice that bears the number of one of the agent's own questions is not its answer.
#[test]
fn other_programs_notices_are_no_answers() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    // More notices than the agent reads are noticed, and said.
    lab.tolerate("netlink socket buffer full");
    let mut agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &server, EGRESS);
    let outside = Outside::watch(&lab);
    let before = ["node-a", "node-b"].map(|node| pinned(&lab, node));
    let program = NOISE.replace("SECONDS", "12");
    let noise = ["node-a", "node-b"].map(|node| {
        let netns = &lab.node(node).netns;
        netns.ip(&["link add noise type veth peer name noise-peer", "link set noise up"]);
        netns.spawn("noise", &["python3", "-c", &program], &[])
    });
    let interval = Duration::from_millis(5);
    let streams = ["tcp", "udp"].map(|protocol| {
        [pod.netns.stream(protocol, &server, interval), pod.netns.fresh(protocol, &server, interval)]
    });
    // A young agent's questions have low numbers.
    let done = AtomicBool::new(false);
    let lost = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut lost = BTreeSet::new();
            while !done.load(Ordering::Relaxed) {
                for (node, before) in ["node-a", "node-b"].into_iter().zip(&before) {
                    let now = pinned(&lab, node);
                    lost.extend(before.difference(&now).map(|link| format!("{node}: {link}")));
                }
                thread::sleep(Duration::from_millis(2));
            }
            lost
        });
        for _ in 0..3 {
            agents.drain(..).for_each(Agent::stop);
            agents = lab.start_agents();
            thread::sleep(Duration::from_millis(500));
        }
        done.store(true, Ordering::Relaxed);
        watcher.join().expect("no panic")
    });
    for process in noise {
        let _ = process.wait(Duration::from_secs(20)).expect_success();
    }
    for stream in streams.into_iter().flatten() {
        stream.finish().expect_lossless_from(EGRESS);
    }
    outside.expect_at_most(&[EGRESS]);
    assert_eq!(lost, BTreeSet::new(), "programs were taken off their interfaces");
}
