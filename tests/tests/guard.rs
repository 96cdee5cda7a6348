//! Pods that start while no agent runs are held by the guard on the pods' cgroup.

use std::net::IpAddr;
use std::time::Duration;

use datapath::addr::Ip;
use datapath::keys::{NetworkKey, NetworkKind, Settings};
use datapath::memory::Memory;
use datapath::verdict::DropReason;
use lab::kernel::Kernel;
use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Cgroup, Lab, LabSpec, Pod, PodSpec, eventually_ok};

const EGRESS: &str = "172.18.0.101";

/// The pod's address as nginx sees it.
fn seen_by(cgroup: &Cgroup, pod: &Pod, server: &str) -> Result<String, String> {
    let url = format!("http://{server}/");
    let output = cgroup.try_exec(&pod.netns, &["curl", "--silent", "--show-error", "--max-time", "2", &url]);
    if !output.success() {
        return Err(output.explain());
    }
    Ok(output.stdout.split(' ').next().unwrap_or_default().to_owned())
}

#[test]
fn pods_that_start_without_an_agent_are_held() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let cgroup = lab.cgroup();
    let start = |node| {
        let path = cgroup.path.to_str().expect("UTF-8");
        let options: &[_] = if node == "node-a" { &["--pod-cgroup", path] } else { &[] };
        let mut agent = lab.start_agent_with(node, options);
        agent.wait_ready();
        agent
    };
    let [agent, _other_agent] = ["node-a", "node-b"].map(start);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _web = [lab.nginx(&lab.web.netns), lab.echo(&lab.web.netns)];
    let web = &lab.web.address;
    let node = lab.node("node-a");
    let selected = lab.run_pod("node-a", &PodSpec::new("prod", "selected"));
    let unselected = lab.run_pod("node-a", &PodSpec::new("dev", "unselected"));
    let _inside = lab.echo(&unselected.netns);
    let known = || {
        for (pod, address) in [(&selected, EGRESS), (&unselected, &*node.address)] {
            eventually_ok("known pods pass", Duration::from_secs(10), || match seen_by(&cgroup, pod, web) {
                Ok(seen) if seen == address => Ok(()),
                other => Err(format!("{other:?}")),
            });
        }
    };
    known();
    // Replaced by that of the next agent.
    agent.kill();
    let agent = start("node-a");
    let pin = |(name, _): &(String, _)| name.starts_with("from_cgroup@");
    assert_eq!(lab.programs("node-a").into_iter().filter(pin).count(), 1);
    agent.kill();

    known();
    let late = lab.run_pod("node-a", &PodSpec::new("prod", "late"));
    let recorder = Recorder::start(&node.netns);
    // A sender is told of no failure: its datagrams are lost as in any network.
    let send = format!("for i in 1 2 3; do echo x > /dev/udp/{web}/{ECHO} || exit 1; done");
    let _ = cgroup.try_exec(&late.netns, &["bash", "-c", &send]).expect_success();
    assert!(seen_by(&cgroup, &late, web).is_err());
    for protocol in ["udp", "tcp"] {
        let seen = recorder.sources(protocol);
        assert!(!seen.contains_key(&late.ip), "{protocol} left the pod: {seen:?}");
    }
    let drops = lab.drops("node-a");
    assert!(drops.get("UnknownPod").is_some_and(|count| *count >= 4), "{drops:?}");
    // Inside the cluster it may speak.
    let inside = format!("echo x > /dev/tcp/{}/{ECHO}", unselected.ip);
    let _ = cgroup.try_exec(&late.netns, &["bash", "-c", &inside]).expect_success();
    // The node's own processes are not pods, whichever cgroup they are in.
    let url = format!("http://{web}/");
    let _ = cgroup.try_exec(&node.netns, &["curl", "--silent", "--max-time", "2", &url]).expect_success();
    known();

    let agent = start("node-a");
    eventually_ok("the pod is known", Duration::from_secs(10), || match seen_by(&cgroup, &late, web) {
        Ok(seen) if seen == EGRESS => Ok(()),
        other => Err(format!("{other:?}")),
    });

    agent.stop();
    let pins = lab.bpffs("node-a");
    let _ = lab.outgate("node-a", &["cleanup", "--bpffs", pins.to_str().expect("UTF-8")]).expect_success();
    let path = cgroup.path.to_str().expect("UTF-8");
    eventually_ok("the cgroup has no programs", Duration::from_secs(5), || {
        let left = node.netns.exec(&["bpftool", "-j", "cgroup", "show", path]);
        if left.trim() == "[]" || left.trim().is_empty() { Ok(()) } else { Err(left) }
    });
}

/// The loaded program reads both families' addresses, and decides as the function does in memory.
#[test]
fn the_program_and_the_decision_agree() {
    let ip = |text: &str| Ip::from(text.parse::<IpAddr>().expect("an address"));
    let net = |prefix_len, text, kind: NetworkKind| (NetworkKey { prefix_len, ip: ip(text) }, kind as u32);
    let mut tables = Memory::new(1, 1);
    tables.settings = Settings { node: 1, hold_unknown: 1, ..Settings::default() };
    tables.networks = [
        net(96 + 16, "10.244.0.0", NetworkKind::Pods),
        net(96 + 12, "10.96.0.0", NetworkKind::Services),
        net(128, "172.18.0.11", NetworkKind::Node),
        net(48, "fd00:1:2::", NetworkKind::Pods),
        net(112, "fd00:9::", NetworkKind::Services),
    ]
    .into();
    tables.pods =
        ["10.244.1.2", "fd00:1:2::2"].map(|known| (ip(known), datapath::keys::Pod::default())).into();
    let mut kernel = Kernel::load(1);
    let v4 = ["10.244.1.2", "10.244.1.3", "10.96.0.10", "172.18.0.11", "203.0.113.10", "169.254.20.10"];
    let v6 = ["fd00:1:2::2", "fd00:1:2::3", "fd00:9::a", "2001:db8::1", "fe80::1", "ff02::1"];
    let mut held = 0;
    for hold_unknown in [1, 0] {
        tables.settings.hold_unknown = hold_unknown;
        kernel.write(&tables);
        for family in [v4, v6] {
            for (from, to) in family.iter().flat_map(|from| family.map(|to| (*from, to))) {
                let decided = datapath::guard::from_cgroup(&tables, &ip(from), &ip(to)).is_ok();
                assert_eq!(kernel.passes_guard(&frame(ip(from), ip(to))), decided, "{from} to {to}");
                held += u64::from(!decided);
            }
        }
    }
    // An unknown pod of each family, to the one address outside.
    assert_eq!(held, 2);
    assert_eq!(kernel.drops()[DropReason::UnknownPod as usize].packets, held);
}

/// A UDP packet without payload; no checksums, which the guard does not look at.
fn frame(from: Ip, to: Ip) -> Vec<u8> {
    let udp = [0, 9, 0, 9, 0, 8, 0, 0];
    let mut frame = vec![2; 12];
    if from.is_v4() {
        frame.extend([8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0]);
        frame.extend(from.v4_octets());
        frame.extend(to.v4_octets());
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 17, 64]);
        frame.extend(from.octets);
        frame.extend(to.octets);
    }
    frame.extend(udp);
    frame
}
