//! The lab itself, without Outgate: what a cluster does, it does.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use lab::record::Recorder;
use lab::servers::{ECHO, IPERF};
use lab::service::{Front, Masquerade};
use lab::{Cni, Lab, LabSpec, Node, PodSpec, eventually};

const LIMIT: Duration = Duration::from_secs(2);

/// Pods reach outside as their node, and each other.
fn pods_talk_as_in_a_cluster(cni: Cni) {
    let lab = Lab::with(&LabSpec::default().cni(cni));
    let _nginx = lab.nginx(&lab.web.netns);
    let _echo = lab.echo(&lab.web.netns);
    let recorder = Recorder::start(&lab.web.netns);
    for (node, name) in [("node-a", "one"), ("node-b", "two")] {
        let pod = lab.run_pod(node, &PodSpec::new("prod", name));
        let Node { address, pod_prefix, .. } = lab.node(node);
        assert!(pod.ip.starts_with(&format!("{pod_prefix}.")), "{}", pod.ip);
        let page = pod.exec(&["curl", "-s", "--max-time", "2", "http://203.0.113.10/"]);
        assert!(page.starts_with(&format!("{address} ")), "{page}");

        recorder.reset();
        let server = format!("203.0.113.10:{ECHO}");
        pod.netns.tcp(&server, 40, 20).expect_all_from(40, address);
        pod.netns.udp(&server, 5).expect_all_from(5, address);
        assert_eq!(pod.netns.ping("203.0.113.10", 3, "0.01"), 3);
        for protocol in ["tcp", "udp", "icmp"] {
            recorder.expect_only(protocol, &[address]);
        }
    }

    let server = lab.run_pod("node-b", &PodSpec::new("prod", "server"));
    let near = lab.run_pod("node-b", &PodSpec::new("prod", "near"));
    let far = lab.run_pod("node-a", &PodSpec::new("prod", "far"));
    let _server = lab.echo(&server.netns);
    let address = format!("{}:{ECHO}", server.ip);
    assert_eq!(near.netns.tcp_source(&address, LIMIT), Ok(near.ip.clone()));
    // The plugins masquerade all that leaves the node's own pod network.
    assert_eq!(far.netns.tcp_source(&address, LIMIT), Ok(lab.node("node-a").address.clone()));

    let _node = lab.echo(&lab.node("node-c").netns);
    let address = format!("{}:{ECHO}", lab.node("node-c").address);
    assert_eq!(far.netns.udp_source(&address, LIMIT), Ok(lab.node("node-a").address.clone()));
}

#[test]
fn ptp_pods_talk_as_in_a_cluster() {
    pods_talk_as_in_a_cluster(Cni::Ptp);
}

#[test]
fn bridge_pods_talk_as_in_a_cluster() {
    pods_talk_as_in_a_cluster(Cni::Bridge);
}

#[test]
fn services_are_translated_as_by_kube_proxy() {
    let lab = Lab::new();
    let (a, b) = (lab.node("node-a"), lab.node("node-b"));
    let client = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let server = lab.run_pod("node-b", &PodSpec::new("prod", "server"));
    let _servers = [lab.echo(&server.netns), lab.echo(&b.netns), lab.echo(&lab.web.netns)];
    for (service, target) in
        [("10.96.0.10", &*server.ip), ("10.96.0.11", &*b.address), ("198.51.100.7", "203.0.113.10")]
    {
        let target = format!("{target}:{ECHO}");
        a.service(Front::Address(service, 80), "tcp", &target, Masquerade::Cluster);
        let seen = client.netns.tcp_source(&format!("{service}:80"), LIMIT);
        assert_eq!(seen, Ok(a.address.clone()), "{service}");
    }

    let target = format!("{}:{ECHO}", server.ip);
    b.service(Front::NodePort(30_000), "tcp", &target, Masquerade::Cluster);
    b.service(Front::NodePort(30_001), "tcp", &target, Masquerade::Local);
    let seen = |port: u16| lab.other.netns.tcp_source(&format!("{}:{port}", b.address), LIMIT);
    // `Cluster` shows the pod its own node's bridge or veth address; `Local` the client.
    assert_eq!(seen(30_000), Ok("10.244.2.1".to_owned()));
    assert_eq!(seen(30_001), Ok(lab.other.address.clone()));
}

#[test]
fn routed_pods_are_reached_and_answer_as_themselves() {
    let lab = Lab::with(&LabSpec::default().nodes(1).routed_pods());
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "server"));
    let _server = lab.echo(&pod.netns);
    let recorder = Recorder::start(&lab.web.netns);
    let address = format!("{}:{ECHO}", pod.ip);
    assert_eq!(lab.web.netns.tcp_source(&address, LIMIT), Ok(lab.web.address.clone()));
    assert_eq!(lab.web.netns.ping(&pod.ip, 2, "0.01"), 2);
    recorder.expect_only("tcp", &[&pod.ip]);
    recorder.expect_only("icmp", &[&pod.ip]);
}

#[test]
fn streams_notice_loss_and_go_on_without_it() {
    let lab = Lab::with(&LabSpec::default().nodes(1));
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("203.0.113.10:{ECHO}");
    let address = lab.node("node-a").address.clone();
    let interval = Duration::from_millis(5);
    let start = || {
        ["tcp", "udp"]
            .map(|p| [pod.netns.stream(p, &server, interval), pod.netns.fresh(p, &server, interval)])
    };
    for stream in start().into_iter().flatten() {
        stream.finish().expect_lossless_from(&address);
    }

    // One lost datagram of each ten: a stream that reports none would hide an agent's fault as well.
    let lossy = pod.netns.stream("udp", &server, interval);
    lab.router.iptables(&["filter FORWARD -p udp -m statistic --mode nth --every 10 --packet 0 -j DROP"]);
    let dropped = eventually(Duration::from_secs(5), || {
        let rules = lab.router.exec(&["iptables-save", "-c", "-t", "filter"]);
        rules.lines().any(|line| line.contains("-j DROP") && !line.starts_with("[0:0]")).then_some(())
    });
    assert!(dropped.is_some(), "the router drops datagrams");
    assert!(!lossy.finish().errors.is_empty());
}

#[test]
fn iperf_and_dns_work() {
    let lab = Lab::with(&LabSpec::default().nodes(1));
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let _iperf = lab.iperf(&lab.web.netns);
    let _dns = lab.dnsmasq(&lab.web.netns);
    let port = IPERF.to_string();
    let json = pod.exec(&["iperf3", "-c", "203.0.113.10", "-p", &port, "-n", "20M", "-J"]);
    assert!(json.contains("bits_per_second"), "{json}");
    for transport in ["+notcp", "+tcp"] {
        let answer = pod.exec(&["dig", "+short", "+time=2", transport, "@203.0.113.10", "web.example"]);
        assert_eq!(answer.trim(), "203.0.113.10");
    }
}

#[test]
fn two_labs_live_side_by_side() {
    let labs = [Lab::with(&LabSpec::default().nodes(1)), Lab::with(&LabSpec::default().nodes(1))];
    for lab in &labs {
        let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
        let recorder = Recorder::start(&lab.web.netns);
        assert_eq!(pod.netns.ping("203.0.113.10", 2, "0.01"), 2);
        recorder.expect_only("icmp", &["172.18.0.11"]);
        assert_eq!(recorder.sources("icmp")["172.18.0.11"], 2, "the other lab's packets are not seen here");
    }
}

/// Everything of a lab that can be seen from outside it.
fn traces(id: &str) -> Vec<String> {
    let mut traces = Vec::new();
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    traces.extend(names.filter(|name| name.starts_with(&format!("{id}-"))));
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    traces.extend(mounts.lines().filter(|line| line.contains(&format!("{id}/"))).map(str::to_owned));
    let dir = PathBuf::from(format!("{}/outgate-lab/{id}", std::env::temp_dir().display()));
    traces.extend(dir.exists().then(|| dir.display().to_string()));
    let commands = fs::read_dir("/proc").expect("/proc").flatten().filter_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        // Not those of og12x1, which is another's: a namespace, a directory, or the reaper's argument.
        ["-", "/", " "].iter().any(|end| line.contains(&format!("{id}{end}"))).then_some(line)
    });
    traces.extend(commands);
    traces
}

#[test]
fn a_dropped_lab_leaves_nothing() {
    let links = || {
        let text = Command::new("ip").args(["-br", "link"]).output().expect("ip runs").stdout;
        String::from_utf8_lossy(&text)
            .lines()
            .map(|l| l.split(' ').next().unwrap_or_default().to_owned())
            .collect::<Vec<_>>()
    };
    let before = links();
    let lab = Lab::with(&LabSpec::default().nodes(1));
    let id = lab.id().to_owned();
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let _nginx = lab.nginx(&lab.web.netns);
    // A program nobody holds a guard of, in a session of its own.
    let _ = pod.exec(&["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"]);
    assert!(traces(&id).len() > 8, "{:?}", traces(&id));
    assert_eq!(links(), before, "the machine's own namespace is not touched");
    drop(lab);
    assert_eq!(traces(&id), Vec::<String>::new());
}

/// Not a test by itself: the child that [`a_killed_owner_leaves_nothing`] kills.
#[test]
#[ignore = "run by a_killed_owner_leaves_nothing"]
fn owner_that_waits_to_be_killed() {
    let lab = Lab::with(&LabSpec::default().nodes(1));
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let _stream = pod.spawn("sleep", &["sleep", "1000"]);
    println!("lab {} is up", lab.id());
    std::thread::sleep(Duration::from_mins(1));
}

#[test]
fn a_killed_owner_leaves_nothing() {
    let own = std::env::current_exe().expect("the test's path");
    let mut child = Command::new(own)
        .args(["--ignored", "--exact", "--nocapture", "owner_that_waits_to_be_killed"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the test runs again");
    let stdout = child.stdout.take().expect("a pipe");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stdout)).map_while(Result::ok);
    let line = lines.find(|line| line.contains(" is up"));
    child.kill().expect("the owner is killed");
    child.wait().expect("the owner ends");
    let line = line.expect("the owner says which lab it made");
    let id = line.rsplit("lab ").next().and_then(|rest| rest.split(' ').next()).expect("a name");
    let gone = eventually(Duration::from_secs(10), || traces(id).is_empty().then_some(()));
    assert!(gone.is_some(), "{:?}", traces(id));
}

/// The lab's own resolver and its clients, by the ways that pods look names up.
#[test]
fn resolvers_answer_as_they_are_told() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.router.ip(&["route add 198.18.0.0/15 via 203.0.113.10"]);
    lab.web.netns.ip(&["route add local 198.18.0.0/15 dev lo"]);
    let _echo = lab.echo(&lab.web.netns);
    let server = &lab.other.address;
    let entries = [
        "spin.example 0 SPIN 198.18.0.0",
        "alias.example 5 CNAME spin.example",
        "many.example 5 MANY 198.18.1.0 200",
        "split.example 5 A 198.18.2.1",
        "nowhere.example 5 A 192.0.2.1",
        "silent.example 5 SILENT",
    ];
    let _dns = lab.resolver_on(&lab.other.netns, server, 53, &entries);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let pod = &pod.netns;
    pod.rounds(server, "SPIN.example", 20, &[]).expect_all(20, 20);
    pod.rounds(server, "alias.example", 2, &["--tcp"]).expect_all(2, 2);
    assert!(
        !pod.rounds(server, "spin.example", 1, &["--never"]).wrong.as_array().expect("a list").is_empty()
    );
    for (options, truncated) in [(&[][..], 1), (&["--edns", "1232"], 1), (&["--edns", "4096"], 0)] {
        let rounds = pod.rounds(server, "many.example", 1, options);
        rounds.expect_all(200, 200);
        assert_eq!(rounds.truncated, truncated, "{options:?}");
    }
    pod.rounds(server, "split.example", 1, &["--tcp"]).expect_all(1, 1);
    pod.rounds(server, "nowhere.example", 1, &["--limit-ms", "100"]).expect_denied();
    assert_eq!(pod.ask(server, "split.example", &["--aaaa"]), Ok(vec![]));
    assert!(pod.ask(server, "silent.example", &["--limit-ms", "100"]).is_err());
    let targets = ["tcp/198.18.0.9:7777", "udp/203.0.113.10:7777", "tcp/203.0.113.20:9", "tcp/192.0.2.1:9"];
    let limit = Duration::from_secs(1);
    assert_eq!(pod.reach_within(&targets, limit)[..3], ["open", "open", "refused"]);
    // A real client, and another resolver.
    let text =
        pod.exec_with_resolver(&lab, server, &["getent", "ahostsv4", "split.example"]).expect_success();
    assert!(text.starts_with("198.18.2.1 "), "{text}");
    let dig = ["dig", "+short", "+tcp", &format!("@{server}"), "alias.example"];
    assert!(pod.exec(&dig).starts_with("spin.example.\n198.18."));
}
