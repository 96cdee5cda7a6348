//! What cannot go out is said to the pod at once: the size that fits, and that a connection is gone.

use std::time::Duration;

use lab::servers::ECHO;
use lab::{Lab, LabSpec, PodSpec};

const EGRESS: &str = "172.18.0.101";
const LIMIT: Duration = Duration::from_secs(10);
/// Sends until it is refused.
const SENDER: &str = "
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print('connected', flush=True)
try:
    while True:
        s.send(b'x' * 5000)
        time.sleep(0.05)
except ConnectionResetError:
    print('reset', flush=True)
";

#[test]
fn a_pod_hears_what_cannot_go_out() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    let _echo = lab.echo(&lab.web.netns);
    let _agents = lab.start_agents();
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let server = format!("{}:{ECHO}", lab.web.address);
    let node = lab.node("node-a").address.clone();
    lab.wait_source(&pod.netns, &server, &node);
    let words = ["python3", "-c", SENDER, &lab.web.address, &ECHO.to_string()];
    let mut old = pod.netns.spawn("sender", &words, &[]);
    old.wait_stdout("connected", LIMIT);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    lab.wait_source(&pod.netns, &server, EGRESS);
    // It left with the node's address: it belongs to no flow, and must not go on.
    old.wait_stdout("reset", LIMIT);
    let output = old.wait(LIMIT);
    assert!(output.success(), "{}", output.explain());

    let web = &lab.web.address;
    let output =
        pod.netns.try_exec(&["ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", "-M", "do", "-s", "1472", web]);
    // The old connection's segments may have taught it already.
    let told = output.stdout.contains("Frag needed and DF set (mtu = 1450)");
    assert!(told || output.stderr.contains("mtu=1450"), "{}", output.explain());
    let route = pod.exec(&["ip", "route", "get", web]);
    assert!(route.contains("mtu 1450"), "{route}");
    pod.netns.tcp(&server, 5, 1).expect_all_from(5, EGRESS);
}
