//! A machine that claims an egress IP which a node holds is reported.

use std::time::Duration;

use lab::{Lab, LabSpec, eventually_ok};

const EGRESS: &str = "172.18.0.101";

#[test]
fn another_machine_with_a_held_address_is_reported() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let intruder = &lab.neighbour.netns;
    let link = intruder.exec(&["ip", "-br", "link", "show", "eth0"]);
    let mac = link.split_whitespace().nth(2).expect("a hardware address");
    let text = format!("egress IP {EGRESS}, which this node holds, is claimed by {mac}");
    lab.tolerate(&text);

    // It asks for somebody who is not there, as that address.
    intruder.ip(&[&format!("addr add {EGRESS}/32 dev eth0")]);
    let ask = || intruder.try_exec(&["ping", "-c", "1", "-W", "1", "-I", EGRESS, "172.18.0.200"]);
    let counted = |agent: &lab::Agent| agent.metric("outgate_address_conflicts_total", "");
    eventually_ok("the holder reports it", Duration::from_secs(20), || {
        let _ = ask();
        if agents[1].log().contains(&text) && counted(&agents[1]) >= 1 {
            Ok(())
        } else {
            Err(agents[1].log())
        }
    });
    assert_eq!(counted(&agents[0]), 0, "this node does not hold it");
    assert_eq!(agents[1].log().matches(&text).count(), 1, "said once");
}
