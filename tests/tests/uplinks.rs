//! Nodes whose uplink is more than one plain interface: bridges, macvlans, interfaces on interfaces, switches
//! that snoop, and a second network.

use std::time::Duration;

use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Agent, Cni, Family, Host, Lab, LabSpec, Netns, PodSpec, Uplink, endpoint, eventually_ok};

const SOON: Duration = Duration::from_secs(10);
const PROD: &[(&str, &str)] = &[("env", "prod")];

fn dual_stack() -> LabSpec {
    LabSpec::default().nodes(2).dual_stack()
}

/// One object with an address of each family. Pods run on both nodes, so each address has local and remote ones.
fn start(lab: &Lab, options: &[&str]) -> Vec<Agent> {
    lab.describe_cluster(&["node-a", "node-b"]);
    lab.objects.egress_ip("prod", &Family::ALL.map(Family::egress), PROD, &[]);
    let agents = lab.start_agents_with(options);
    for family in Family::ALL {
        let _ = lab.wait_owner(family.egress());
    }
    agents
}

/// Everything small and large, from a pod of each node, to a host behind the router and one on the link.
#[track_caller]
fn everything_leaves_by(lab: &Lab, egress: fn(Family) -> &'static str, hosts: &[&Host]) {
    let _servers: Vec<_> = hosts.iter().map(|host| lab.echo(&host.netns)).collect();
    let _iperf = lab.iperf(&lab.web.netns);
    for node in ["node-a", "node-b"] {
        let pod = lab.run_pod(node, &PodSpec::new("prod", node));
        for family in Family::ALL {
            let source = egress(family);
            for host in hosts {
                let server = endpoint(host.address_of(family), ECHO);
                lab.wait_source(&pod.netns, &server, source);
                let recorder = Recorder::start(&host.netns);
                pod.netns.tcp(&server, 50, 25).expect_all_from(50, source);
                pod.netns.udp(&server, 20).expect_all_from(20, source);
                assert_eq!(pod.netns.ping(host.address_of(family), 5, "0.01"), 5);
                recorder.expect_only(family.icmp(), &[source]);
                recorder.expect_none_but(&[source]);
            }
            let words = ["timeout", "30", "iperf3", family.option(), "-c", lab.web.address_of(family)];
            for way in [&["-R"][..], &[]] {
                let json = pod.exec(&[&words[..], &["-n", "10M", "-J"], way].concat());
                assert!(!json.contains("\"error\""), "{json}");
            }
        }
    }
}

fn works_on(uplink: Uplink, cni: Cni, options: &[&str]) {
    let lab = Lab::with(&dual_stack().uplink(uplink).cni(cni));
    let _agents = start(&lab, options);
    everything_leaves_by(&lab, Family::egress, &[&lab.web, &lab.neighbour]);
}

#[test]
fn a_bridge_uplink_works() {
    works_on(Uplink::Bridge, Cni::Ptp, &[]);
}

#[test]
fn a_bridge_uplink_works_beside_a_bridge_of_pods() {
    works_on(Uplink::Bridge, Cni::Bridge, &[]);
}

/// The programs stand on the bridge and on its port: each packet meets them twice.
#[test]
fn a_bridge_and_its_port_may_both_be_uplinks() {
    works_on(Uplink::Bridge, Cni::Ptp, &["--uplink", "br-ex", "--uplink", "eth0"]);
}

#[test]
fn a_macvlan_uplink_works() {
    works_on(Uplink::Macvlan, Cni::Ptp, &[]);
}

#[test]
fn an_uplink_on_another_interface_works() {
    works_on(Uplink::Stacked, Cni::Ptp, &[]);
}

/// As with a VLAN on a bond: the programs stand on both, and each packet meets them twice.
#[test]
fn an_uplink_and_what_it_stands_on_may_both_be_uplinks() {
    works_on(Uplink::Stacked, Cni::Ptp, &["--uplink", "eth0", "--uplink", "under0"]);
}

/// Asks for an address anew and gives what the kernel learnt.
fn resolves(netns: &Netns, interface: &str, address: &str) -> Option<String> {
    let _ = netns.try_exec(&["ip", "neigh", "del", address, "dev", interface]);
    // That nobody answers the ping itself does not matter.
    let _ = netns.try_exec(&["ping", "-n", "-c", "1", "-W", "0.3", address]);
    let text = netns.exec(&["ip", "neigh", "show", address, "dev", interface]);
    let mut words = text.split_whitespace().skip_while(|word| *word != "lladdr");
    words.nth(1).map(str::to_owned)
}

fn mac(netns: &Netns, interface: &str) -> String {
    let text = netns.exec(&["ip", "-br", "link", "show", interface]);
    text.split_whitespace().nth(2).expect("name, state, address").to_owned()
}

/// A switch that takes multicast to members only: the owner must be a member of the egress IP's group.
fn solicitations_arrive_through_a_snooping_wire(uplink: Uplink) {
    let lab = Lab::with(&dual_stack().uplink(uplink).snooping());
    let _agents = start(&lab, &[]);
    lab.wait_snooping();
    let egress = Family::V6.egress();
    let owner = lab.node(&lab.wait_owner(egress)).clone();
    eventually_ok("the neighbour resolves the egress IP", SOON, || {
        match resolves(&lab.neighbour.netns, "eth0", egress) {
            Some(found) if found == mac(&owner.netns, &owner.uplink) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    // Membership is a report that is renewed: the wire's questions come while all this runs.
    everything_leaves_by(&lab, Family::egress, &[&lab.web, &lab.neighbour]);
}

#[test]
fn solicitations_arrive_through_a_snooping_wire_at_a_plain_uplink() {
    solicitations_arrive_through_a_snooping_wire(Uplink::Plain);
}

#[test]
fn solicitations_arrive_through_a_snooping_wire_at_a_macvlan() {
    solicitations_arrive_through_a_snooping_wire(Uplink::Macvlan);
}

#[test]
fn solicitations_arrive_through_a_snooping_wire_at_a_bridge() {
    solicitations_arrive_through_a_snooping_wire(Uplink::Bridge);
}

/// An egress IP of the second network leaves by its interface and by its routes, and answers come back by it.
fn a_second_uplink_carries_its_own_addresses(rp_filter: u8) {
    let lab = Lab::with(&dual_stack().second_uplink().rp_filter(rp_filter));
    lab.describe_cluster(&["node-a", "node-b"]);
    lab.objects.egress_ip("prod", &Family::ALL.map(Family::second_egress), PROD, &[]);
    // One of the first network beside it, for other pods.
    lab.objects.egress_ip("dev", &Family::ALL.map(Family::egress), &[("env", "dev")], &[]);
    let _agents = lab.start_agents();
    let owners = Family::ALL.map(|family| lab.wait_owner(family.second_egress()));
    for (family, owner) in Family::ALL.into_iter().zip(&owners) {
        let node = &lab.node(owner).netns;
        // Who is asked by the router's second interface answers there, and only there.
        let egress = family.second_egress();
        eventually_ok("the router resolves the egress IP", SOON, || {
            match resolves(&lab.router, "eth1", egress) {
                Some(found) if found == mac(node, "eth1") => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }
    let came_by = |family: Family| {
        let text = lab.router.exec(&["nft", "list", "table", "inet", "came"]);
        let source = format!("saddr {} ", family.second_egress());
        let rules = text.lines().filter(|line| line.contains(&source));
        rules
            .filter_map(|line| line.split_once("packets ")?.1.split(' ').next()?.parse::<u64>().ok())
            .collect::<Vec<_>>()
    };
    let [v4, v6] = Family::ALL.map(Family::second_egress);
    let rules = format!(
        "table inet came {{
            chain in {{
                type filter hook prerouting priority -450;
                ip saddr {v4} iifname eth0 counter
                ip saddr {v4} iifname eth1 counter
                ip6 saddr {v6} iifname eth0 counter
                ip6 saddr {v6} iifname eth1 counter
            }}
        }}"
    );
    let _ = lab.router.exec_input(&["nft", "-f", "-"], &[], &rules).expect_success();
    // The router sends answers by its second interface, where the address's network is.
    everything_leaves_by(&lab, Family::second_egress, &[&lab.web, &lab.other]);
    for family in Family::ALL {
        let [by_eth0, by_eth1] = came_by(family)[..] else { panic!("{:?}", came_by(family)) };
        assert!(by_eth1 > 100 && by_eth0 == 0, "{family:?}: {by_eth0} by eth0, {by_eth1} by eth1");
    }

    // Pods of the other object leave by the first network as ever.
    let _echo = lab.echo(&lab.web.netns);
    let pod = lab.run_pod("node-a", &PodSpec::new("dev", "client"));
    for family in Family::ALL {
        let server = endpoint(lab.web.address_of(family), ECHO);
        lab.wait_source(&pod.netns, &server, family.egress());
        pod.netns.tcp(&server, 20, 10).expect_all_from(20, family.egress());
    }
}

#[test]
fn a_second_uplink_carries_its_own_addresses_with_strict_filters() {
    a_second_uplink_carries_its_own_addresses(1);
}

#[test]
fn a_second_uplink_carries_its_own_addresses_without_filters() {
    a_second_uplink_carries_its_own_addresses(0);
}

/// An address that no uplink's network contains is not in force, its object says why, and its pods do not leave.
#[test]
fn an_address_of_no_uplink_is_refused_with_a_reason() {
    let lab = Lab::with(&dual_stack());
    lab.describe_cluster(&["node-a", "node-b"]);
    let addresses = ["198.51.100.7", "2001:db8:51::7"];
    lab.objects.egress_ip("prod", &addresses, PROD, &[]);
    let _agents = lab.start_agents();
    let _echo = lab.echo(&lab.web.netns);
    eventually_ok("both addresses have their reason", SOON, || {
        let status = lab.status();
        let conditions = status["egressIPs"][0]["conditions"].as_array().cloned().unwrap_or_default();
        let said = |address: &str| {
            conditions.iter().any(|c| {
                let message = c["message"].as_str().unwrap_or_default();
                c["egressIP"] == address && c["status"] == "False" && message.contains("no ready egress node")
            })
        };
        if addresses.iter().all(|address| said(address)) { Ok(()) } else { Err(status.to_string()) }
    });
    assert_eq!(addresses.map(|address| lab.owner(address)), [None, None]);
    let recorder = Recorder::start(&lab.web.netns);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    for family in Family::ALL {
        let server = endpoint(lab.web.address_of(family), ECHO);
        let seen = pod.netns.tcp_source(&server, Duration::from_millis(500));
        assert!(seen.is_err(), "{seen:?}");
        assert_eq!(pod.netns.ping(lab.web.address_of(family), 2, "0.01"), 0);
    }
    recorder.expect_none_but(&[]);
    assert!(lab.drops("node-a").contains_key("NoOwner"), "{:?}", lab.drops("node-a"));
}
