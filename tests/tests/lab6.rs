//! The lab with IPv6 and with other networks than the default, without Outgate: what a cluster does, it does.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::service::{Front, Masquerade};
use lab::{Cni, Family, Host, Lab, LabSpec, Pod, PodSpec, Uplink, endpoint};

const LIMIT: Duration = Duration::from_secs(2);

/// A client reaches a server outside with every protocol, large datagrams and pings, and is seen as `source`.
#[track_caller]
fn reaches(pod: &Pod, host: &Host, family: Family, source: &str) {
    let recorder = Recorder::start(&host.netns);
    let server = endpoint(host.address_of(family), ECHO);
    pod.netns.tcp(&server, 10, 5).expect_all_from(10, source);
    pod.netns.udp(&server, 5).expect_all_from(5, source);
    // The first large datagram may be lost to path-MTU discovery.
    let _ = pod.netns.udp_sized(&server, 9000, 1, false);
    pod.netns.udp_sized(&server, 9000, 2, false).expect_all_from(2, source);
    assert_eq!(pod.netns.ping_sized(host.address_of(family), 3000, 3, "0.01"), 3);
    for protocol in ["tcp", "udp", family.icmp()] {
        recorder.expect_only(protocol, &[source]);
    }
    recorder.expect_none_but(&[source]);
}

/// Pods reach outside as their node, and each other, in both families.
fn pods_talk_in_both_families(cni: Cni) {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni).dual_stack());
    let _servers = [lab.echo(&lab.web.netns), lab.echo(&lab.neighbour.netns), lab.nginx(&lab.web.netns)];
    let (a, b) = (lab.node("node-a"), lab.node("node-b"));
    let client = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let near = lab.run_pod("node-a", &PodSpec::new("prod", "near"));
    let far = lab.run_pod("node-b", &PodSpec::new("prod", "far"));
    let _pods = [&near, &far].map(|pod| lab.echo(&pod.netns));
    for family in Family::ALL {
        for host in [&lab.web, &lab.neighbour] {
            reaches(&client, host, family, a.address_of(family));
        }
        let to = |pod: &Pod| client.netns.tcp_source(&endpoint(pod.ip_of(family), ECHO), LIMIT);
        assert_eq!(to(&near), Ok(client.ip_of(family).to_owned()));
        assert_eq!(to(&far), Ok(a.address_of(family).to_owned()));
        let first = ["10.244.1.1", "fd00:10:244:1::1"][family as usize];
        let second = ["172.18.0.1", "2001:db8:172:18::1"][family as usize];
        let web = lab.web.address_of(family);
        assert_eq!(client.netns.trace(web, 3), [first, second, web]);
        let url = format!("http://{}/", endpoint(lab.web.address_of(family), 80));
        let page = client.exec(&["curl", "-sS", "--max-time", "2", &url]);
        assert!(page.starts_with(&format!("{} ", a.address_of(family))), "{page}");

        let target = endpoint(far.ip_of(family), ECHO);
        let service = ["10.96.0.10", "fd00:10:96::10"][family as usize];
        a.service(Front::Address(service, 80), "tcp", &target, Masquerade::Cluster);
        let seen = client.netns.tcp_source(&endpoint(service, 80), LIMIT);
        assert_eq!(seen, Ok(a.address_of(family).to_owned()));
        b.service(Front::NodePort(30_001), "tcp", &target, Masquerade::Local);
        let seen = lab.other.netns.tcp_source(&endpoint(b.address_of(family), 30_001), LIMIT);
        assert_eq!(seen, Ok(lab.other.address_of(family).to_owned()));
    }
}

#[test]
fn ptp_pods_talk_in_both_families() {
    pods_talk_in_both_families(Cni::Ptp);
}

#[test]
fn bridge_pods_talk_in_both_families() {
    pods_talk_in_both_families(Cni::Bridge);
}

#[test]
fn routed_pods_answer_as_themselves_in_both_families() {
    let lab = Lab::with(&LabSpec::default().nodes(1).routed_pods().dual_stack());
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "server"));
    let _server = lab.echo(&pod.netns);
    let recorder = Recorder::start(&lab.web.netns);
    for family in Family::ALL {
        let server = endpoint(pod.ip_of(family), ECHO);
        assert_eq!(lab.web.netns.tcp_source(&server, LIMIT), Ok(lab.web.address_of(family).to_owned()));
    }
    recorder.expect_only("tcp", &[&pod.ip, &pod.ip6]);
}

#[test]
fn the_nodes_network_may_have_ipv6_only() {
    let lab = Lab::with(&LabSpec::default().nodes(2).ipv6_only_underlay());
    let _echo = lab.echo(&lab.web.netns);
    let node = lab.node("node-a");
    assert!(!node.netns.exec(&["ip", "-4", "addr"]).contains("eth0"));
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    reaches(&pod, &lab.web, Family::V6, &node.address6);
    assert_eq!(pod.netns.ping(&lab.web.address, 1, "0.01"), 0);
}

#[test]
fn every_kind_of_uplink_leads_out() {
    for uplink in [Uplink::Bridge, Uplink::Macvlan, Uplink::Stacked] {
        let lab = Lab::with(&LabSpec::default().nodes(2).uplink(uplink).dual_stack());
        let _servers = [lab.echo(&lab.web.netns), lab.echo(&lab.neighbour.netns)];
        let node = lab.node("node-a");
        let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
        for family in Family::ALL {
            for host in [&lab.web, &lab.neighbour] {
                reaches(&pod, host, family, node.address_of(family));
            }
        }
    }
}

#[test]
fn a_second_network_is_used_by_its_own_addresses_only() {
    let lab = Lab::with(&LabSpec::default().nodes(2).second_uplink().dual_stack());
    let _echo = lab.echo(&lab.web.netns);
    let node = lab.node("node-a");
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    for family in Family::ALL {
        reaches(&pod, &lab.web, family, node.address_of(family));
        let second = ["172.19.0.11", "fd00:172:19::11"][family as usize];
        let web = lab.web.address_of(family);
        for from in ["eth1", second] {
            let text = node.netns.exec(&["ping", "-n", "-c", "1", "-W", "1", "-I", from, web]);
            assert!(text.contains("1 received"), "{text}");
        }
        let route = node.netns.exec(&["ip", "route", "get", web]);
        assert!(route.contains("dev eth0"), "{route}");
    }
}

#[test]
fn the_nodes_network_has_the_mtu_that_is_asked_for() {
    for mtu in [1450, 9000] {
        let lab = Lab::with(&LabSpec::default().nodes(2).mtu(mtu).pod_mtu(mtu).dual_stack());
        let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
        for family in Family::ALL {
            // To the other node, with headers of IP and ICMP.
            let largest = mtu - family.header() - 8;
            let to = lab.node("node-b").address_of(family);
            let size = |size: u32| {
                let size = size.to_string();
                pod.try_exec(&["ping", "-n", "-c", "1", "-W", "1", "-M", "do", "-s", &size, to])
            };
            assert!(size(largest).success(), "{}", size(largest).explain());
            assert!(!size(largest + 1).success(), "{}", size(largest + 1).explain());
        }
    }
}

#[test]
fn a_snooping_wire_asks_members_only() {
    let lab = Lab::with(&LabSpec::default().nodes(2).snooping().dual_stack());
    lab.wait_snooping();
    // Those that have an address are members of its group.
    for node in &lab.nodes {
        assert_eq!(lab.neighbour.netns.ping(&node.address6, 1, "0.01"), 1);
    }
}

/// What [`Lab`] looks for when it is dropped would be found.
#[test]
fn bad_checksums_and_foreign_sources_fail_a_test() {
    let lab = Lab::with(&LabSpec::default().nodes(1).dual_stack());
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let node = &lab.node("node-a").netns;
    // Without the plugin's masquerade a pod's own address leaves.
    for program in ["iptables", "ip6tables"] {
        let _ = node.exec(&[program, "-w", "-t", "nat", "-F", "POSTROUTING"]);
    }
    for family in Family::ALL {
        assert_eq!(pod.netns.ping(lab.web.address_of(family), 1, "0.01"), 0);
    }
    // A wrong checksum, as a program that forgot one bit of a change leaves behind.
    let send = "import socket, sys
packet = bytes([8, 0, 1, 2, 0, 1, 0, 1])
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.sendto(packet, (sys.argv[1], 0))";
    let _ = node.exec(&["python3", "-c", send, &lab.web.address]);
    let message =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(lab))).expect_err("a complaint");
    let message = message.downcast_ref::<String>().expect("a message");
    for part in ["foreign source", "10.244.1.2", "fd00:10:244:1::2", "web: Icmp InCsumErrors 1"] {
        assert!(message.contains(part), "'{part}' is missing: {message}");
    }
}
