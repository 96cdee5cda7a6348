//! ICMP errors reach a selected pod as if it had its egress IP itself: traceroute, refused UDP and path-MTU
//! discovery work, through a gateway on another node and on its own.

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Lab, PodSpec};

const EGRESS: &str = "172.18.0.101";
const WEB: &str = "203.0.113.10";

fn errors_reach_the_pod(owner: &str) {
    let lab = Lab::new();
    lab.describe_cluster(&[owner]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), owner);
    let _echo = lab.echo(&lab.web.netns);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &format!("{WEB}:{ECHO}"), EGRESS);
    let recorder = Recorder::start(&lab.web.netns);

    // The node is the first hop, the router the second, and the server the third.
    let hop = |ttl: &str| {
        // One flow (identifier) first walks the host's stack, then is offloaded: both must count hops alike.
        let output = pod.netns.try_exec(&["ping", "-n", "-c", "3", "-i", "0.1", "-W", "1", "-t", ttl, WEB]);
        output.stdout.clone()
    };
    let first = hop("1");
    assert_eq!(first.matches("From 10.244.1.1").count(), 3, "{first}");
    let second = hop("2");
    assert_eq!(second.matches("From 172.18.0.1 ").count(), 3, "{second}");
    let third = hop("3");
    assert_eq!(third.matches(&format!("bytes from {WEB}")).count(), 3, "{third}");

    // The same by UDP, as traceroute and tracepath do it.
    assert_eq!(pod.netns.trace(WEB, 3), ["10.244.1.1", "172.18.0.1", WEB]);

    // Nobody listens: the server's refusal reaches the pod's socket at once, by UDP's and by TCP's own way.
    for kind in ["socket.SOCK_DGRAM", "socket.SOCK_STREAM"] {
        let program = format!(
            "import socket\ns = socket.socket(socket.AF_INET, {kind})\ns.settimeout(2)\n\
             try:\n s.connect(('{WEB}', 4444)); s.send(b'x'); s.recv(1)\n\
             except ConnectionRefusedError: print('refused')"
        );
        assert_eq!(pod.exec(&["python3", "-c", &program]).trim(), "refused", "{kind}");
    }

    // A narrow link behind the router: the pod learns its MTU from the router's error, and its data arrives.
    lab.router.ip(&["link set br1 mtu 1300"]);
    let output =
        pod.netns.try_exec(&["ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", "-M", "do", "-s", "1350", WEB]);
    assert!(
        output.stdout.contains("mtu = 1300") || output.stderr.contains("mtu=1300"),
        "{}",
        output.explain()
    );
    let route = pod.exec(&["ip", "route", "get", WEB]);
    assert!(route.contains("mtu 1300"), "{route}");
    pod.netns.tcp(&format!("{WEB}:{ECHO}"), 5, 1).expect_all_from(5, EGRESS);
    for protocol in ["tcp", "udp", "icmp"] {
        recorder.expect_only(protocol, &[EGRESS]);
    }
}

#[test]
fn errors_reach_a_pod_through_another_nodes_egress_ip() {
    errors_reach_the_pod("node-b");
}

#[test]
fn errors_reach_a_pod_through_its_own_nodes_egress_ip() {
    errors_reach_the_pod("node-a");
}
