//! A CNI's own VXLAN beside Outgate's: pods reach each other through it, and outside by their egress IP.

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Cni, Lab, LabSpec, Node, PodSpec};

const EGRESS: &str = "172.18.0.101";

/// What flannel's `vxlan` backend makes: one device a node, other nodes' pods behind it, each node by its address.
fn overlay(lab: &Lab) {
    let mac = |node: &Node| format!("02:00:00:00:f1:{}", &node.address[node.address.len() - 2..]);
    for node in &lab.nodes {
        node.netns.ip(&[
            &format!(
                "link add flannel.1 address {} type vxlan id 1 local {} dev eth0 dstport 8472 nolearning",
                mac(node),
                node.address
            ),
            &format!("addr add {}.0/32 dev flannel.1", node.pod_prefix),
            "link set flannel.1 up",
        ]);
        for other in lab.nodes.iter().filter(|other| other.name != node.name) {
            let (prefix, mac) = (&other.pod_prefix, mac(other));
            node.netns.ip(&[
                &format!("route replace {prefix}.0/24 via {prefix}.0 dev flannel.1 onlink"),
                &format!("neigh add {prefix}.0 lladdr {mac} dev flannel.1"),
            ]);
            node.netns.exec(&["bridge", "fdb", "append", &mac, "dev", "flannel.1", "dst", &other.address]);
        }
    }
}

fn beside_an_overlay(cni: Cni) {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni));
    overlay(&lab);
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let _agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let (server, recorder) = (format!("{}:{ECHO}", lab.web.address), Recorder::start(&lab.web.netns));
    let selected = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    let unselected = lab.run_pod("node-b", &PodSpec::new("dev", "peer"));
    lab.wait_source(&selected.netns, &server, EGRESS);
    recorder.reset();
    let _inside = [lab.echo(&selected.netns), lab.echo(&unselected.netns)];
    for _ in 0..3 {
        // Between pods by the overlay, both ways. The plugin masquerades: the source is the overlay's device.
        for (from, to) in [(&selected, &unselected), (&unselected, &selected)] {
            let peer = format!("{}:{ECHO}", to.ip);
            let device = format!("{}.0", lab.node(&from.node).pod_prefix);
            from.netns.tcp(&peer, 30, 10).expect_all_from(30, &device);
            from.netns.udp(&peer, 30).expect_all_from(30, &device);
            assert_eq!(from.netns.ping(&to.ip, 5, "0.01"), 5);
        }
        // And outside.
        selected.netns.tcp(&server, 50, 25).expect_all_from(50, EGRESS);
        selected.netns.udp(&server, 20).expect_all_from(20, EGRESS);
        assert_eq!(selected.netns.ping(&lab.web.address, 5, "0.01"), 5);
    }
    recorder.expect_none_but(&[EGRESS]);
    let drops = lab.drops("node-a");
    assert!(!drops.contains_key("TokenLost") && !drops.contains_key("TunnelForged"), "{drops:?}");
}

#[test]
fn a_ptp_cni_with_an_overlay_works() {
    beside_an_overlay(Cni::Ptp);
}

#[test]
fn a_bridge_cni_with_an_overlay_works() {
    beside_an_overlay(Cni::Bridge);
}
