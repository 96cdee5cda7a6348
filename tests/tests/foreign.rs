//! What is connected to a node and is no pod of the cluster's goes on, and pods are found whatever their interfaces
//! are called.

use std::time::Duration;

use lab::servers::ECHO;
use lab::{Lab, LabSpec, Pod, PodSpec, eventually_ok};

const EGRESS: &str = "172.18.0.101";
const NODE: &str = "node-a";

/// Another program's container: a namespace whose only way is `port`, the other end of which it gets.
fn container(lab: &Lab, name: &str, port: &str, address: &str, gateway: &str) -> Pod {
    let pod = lab.run_pod(NODE, &PodSpec::new("foreign", name).unannounced());
    let node = &lab.node(NODE).netns;
    pod.netns.ip(&["link del eth0"]);
    node.ip(&[&format!("link add {port} type veth peer name eth0 netns {}", pod.netns.name())]);
    node.ip(&[&format!("link set {port} up")]);
    pod.netns.ip(&[
        "link set eth0 up",
        &format!("address add {address} dev eth0"),
        &format!("route add {gateway} dev eth0"),
        &format!("route add default via {gateway}"),
    ]);
    pod
}

/// Containers behind a bridge of their own, whatever its ports are called, and behind interfaces of their own: the
/// node masquerades them, before and after there are pods to guard.
#[test]
fn other_programs_containers_leave_with_the_nodes_address() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let node = &lab.node(NODE).netns;
    node.ip(&["link add docker0 type bridge forward_delay 0", "address add 172.17.0.1/16 dev docker0"]);
    node.ip(&["link set docker0 up"]);
    node.iptables(&["nat POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"]);
    node.iptables(&["nat POSTROUTING -s 192.168.7.0/24 -o eth0 -j MASQUERADE"]);
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);

    let containers = [
        container(&lab, "docker", "veth9", "172.17.0.2/16", "172.17.0.1"),
        container(&lab, "libvirt", "vnet9", "172.17.0.3/16", "172.17.0.1"),
        container(&lab, "nspawn", "ve-9", "192.168.7.2/28", "192.168.7.1"),
        container(&lab, "routed", "ext9", "192.168.7.18/32", "192.168.7.1"),
    ];
    node.ip(&["link set veth9 master docker0", "link set vnet9 master docker0"]);
    node.ip(&["address add 192.168.7.1/28 dev ve-9", "route add 192.168.7.18 dev ext9"]);
    for container in &containers {
        lab.wait_source(&container.netns, &server, &lab.node(NODE).address);
    }
    let pod = lab.run_pod(NODE, &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &server, EGRESS);
    for container in &containers {
        container.netns.udp(&server, 20).expect_all_from(20, &lab.node(NODE).address);
        container.netns.tcp(&server, 20, 1).expect_all_from(20, &lab.node(NODE).address);
    }
}

/// A CNI plugin may call a pod's interface what no pattern knows.
#[test]
fn a_pod_behind_an_interface_of_any_name_has_the_egress_ip() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let node = &lab.node(NODE).netns;
    let pod = lab.run_pod(NODE, &PodSpec::new("prod", "client").unannounced());
    node.ip(&[&format!("link set {} name eni9", pod.host_interface)]);
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    eventually_ok("a program on eni9", Duration::from_secs(10), || {
        let known = lab.bpffs(NODE).read_dir().map_err(|error| error.to_string())?;
        let link = node.exec(&["ip", "-o", "link", "show", "eni9"]);
        let pin = format!("from_pod@{}", link.split(':').next().unwrap_or_default());
        let links = known.flatten().map(|version| version.path().join("links").join(&pin));
        if links.into_iter().any(|link| link.exists()) { Ok(()) } else { Err(format!("no {pin}")) }
    });
    assert!(pod.netns.udp_source(&server, Duration::from_millis(300)).is_err(), "an unknown pod is held");
    pod.announce();
    lab.wait_source(&pod.netns, &server, EGRESS);
}
