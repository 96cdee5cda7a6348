//! What a person finds who looks: pins, programs, status, flows, metrics.

use lab::servers::ECHO;
use lab::{Lab, LabSpec, PodSpec};
use serde_json::Value;

const EGRESS: &str = "172.18.0.101";

#[track_caller]
fn has_fields(entry: &Value, part: &str, fields: &[&str]) {
    for field in fields {
        assert!(entry[part].get(field).is_some(), "{part} has no {field}: {entry}");
    }
}

#[test]
fn a_flow_is_seen_in_maps_commands_and_metrics() {
    let lab = Lab::with(&LabSpec::default().nodes(2));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &server, EGRESS);
    let stream = pod.netns.stream("tcp", &server, std::time::Duration::from_millis(10));

    let flows = lab.map("node-a", "FLOWS");
    assert!(!flows.is_empty());
    for flow in &flows {
        has_fields(flow, "key", &["pod", "remote", "local_port", "remote_port", "protocol"]);
        has_fields(flow, "value", &["egress", "egress_port", "state", "packets"]);
    }
    let policies = lab.map("node-a", "POLICIES");
    assert!(!policies.is_empty());
    for policy in &policies {
        has_fields(policy, "value", &["egress", "len"]);
    }

    let programs = lab.programs("node-a");
    for program in ["from_pod", "to_pod", "to_uplink", "from_uplink", "from_tunnel"] {
        let named = |(link, (_, name)): (&String, &(u64, String))| {
            link.starts_with(&format!("{program}@")) && name == program
        };
        assert!(programs.iter().any(named), "{program} is missing: {programs:?}");
    }

    let flows = lab.outgate("node-a", &["flows", "--bpffs", lab.bpffs("node-a").to_str().expect("UTF-8")]);
    let flows = flows.expect_success();
    let line = flows.lines().find(|line| line.contains("prod/client") && line.contains("203.0.113.10"));
    assert!(line.is_some_and(|line| line.contains(EGRESS)), "{flows}");

    let status = lab.outgate("node-a", &["status", "--source", &lab.source()]).expect_success();
    let line = status.lines().find(|line| line.contains(EGRESS)).unwrap_or_else(|| panic!("{status}"));
    assert!(line.contains("node-b"), "{status}");
    let metrics = agents[0].metrics();
    let named = metrics.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    assert!(named.clone().count() > 0);
    let strange: Vec<_> = named.filter(|line| !line.starts_with("outgate_")).collect();
    assert_eq!(strange, Vec::<&str>::new());
    stream.finish().expect_lossless_from(EGRESS);
}
