//! What a person finds who looks at an egress firewall: status, trace, metrics.

use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use lab::eventually_ok;
use lab::{Lab, LabSpec, PodSpec};

const FIREWALL: &str = "apiVersion: k8s.ovn.org/v1
kind: EgressFirewall
metadata: {name: default, namespace: prod}
spec:
  egress:
  - {type: Allow, to: {cidrSelector: 203.0.113.0/24}}
  - {type: Deny, to: {cidrSelector: 0.0.0.0/0}}
";

#[test]
fn a_firewall_is_seen_in_status_trace_and_metrics() {
    let lab = Lab::with(&LabSpec::default().nodes(1));
    lab.describe_cluster(&[]);
    lab.objects.write("firewall.yaml", FIREWALL);
    let agents = lab.start_agents();
    let _pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    eventually_ok("the firewall is in force", Duration::from_secs(5), || {
        let status = lab.status();
        let firewall = &status["egressFirewalls"][0];
        let applied = firewall["messages"][0] == "node-a: EgressFirewall Rules applied";
        if applied { Ok(()) } else { Err(format!("{firewall}")) }
    });
    let bpffs = lab.bpffs("node-a");
    let trace = |to: &str| {
        let bpffs = bpffs.to_str().expect("UTF-8");
        lab.outgate("node-a", &["trace", "prod/client", to, "--bpffs", bpffs, "-o", "json"]).expect_success()
    };
    for (to, rule) in [("203.0.113.10:80", "spec.egress[0]"), ("198.51.100.1:80", "spec.egress[1]")] {
        let walk: serde_json::Value = serde_json::from_str(&trace(to)).expect("JSON");
        assert_eq!(walk["firewall"]["rule"], rule, "{to}: {walk}");
    }
    // More counts than one look of the agent's takes, and of another version some.
    let rulesets = lab.map("node-a", "RULESETS");
    let id = rulesets[0]["key"].as_u64().expect("a number") as u32;
    let path = bpffs.join("v1/maps/RULE_COUNTS");
    let map = MapData::from_pin(path).and_then(Map::from_map_data).expect("RULE_COUNTS");
    let mut counts: HashMap<_, [u32; 2], [u64; 2]> = HashMap::try_from(map).expect("a hash map");
    for rule in 0..20_000 {
        let ruleset = if rule % 2 == 0 { id } else { id + 1000 };
        counts.insert([ruleset, rule], [u64::from(rule), 1], 0).expect("there is room");
    }
    let metrics = agents[0].metrics();
    let mut hits = metrics.lines().filter_map(|line| {
        line.strip_prefix("outgate_firewall_rule_hits_total{namespace=\"prod\",rule=\"spec.egress[")
    });
    let sum: u64 = hits
        .by_ref()
        .map(|line| line.split(' ').next_back().and_then(|n| n.parse::<u64>().ok()).expect("a count"))
        .sum();
    assert_eq!(sum, (0..10_000).map(|n| 2 * n).sum::<u64>(), "each once");
    assert_eq!(agents[0].metric("outgate_firewall_rules", "prod"), 2);
}
