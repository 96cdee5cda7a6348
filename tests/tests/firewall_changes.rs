//! What changes in an egress firewall is in force in one step, for live flows as well; what is not valid changes nothing
//! and opens nothing; and a person finds out which rule decides.

use std::time::Duration;

use lab::firewall::{Cluster, Rule, allow, deny};
use lab::reach::{OPEN, SILENT, expect, expect_targets, tcp, udp};
use lab::record::Recorder;
use lab::servers::ECHO;
use lab::{Agent, Lab, LabSpec, Netns, Pod, PodSpec, endpoint, eventually_ok};

const EGRESS: &str = "172.18.0.101";
const WEB: &str = "203.0.113.10";
const OTHER: &str = "203.0.113.20";
const NEIGHBOUR: &str = "172.18.0.250";
const NODE_A: &str = "172.18.0.11";
/// For a change to be in force, on a busy machine.
const LIMIT: Duration = Duration::from_secs(5);
/// For a denied live flow to stop.
const CUT: Duration = Duration::from_secs(1);

/// Of streams to two hosts the one that a change denies stops, the other loses nothing.
#[track_caller]
fn live_flows_are_judged_again(cluster: &Cluster, pods: &[Pod], source: &str) {
    let lab = &cluster.lab;
    let interval = Duration::from_millis(2);
    let both = [allow("203.0.113.0/24"), deny("0.0.0.0/0")];
    cluster.firewall(&both);
    for pod in pods {
        expect(&pod.netns, &[(WEB, OPEN), (OTHER, OPEN), (NEIGHBOUR, SILENT)]);
    }
    let ends = || pods.iter().map(|pod| &pod.netns).chain([&lab.other.netns]);
    // Tail loss probes send again what was only late.
    ends().for_each(|netns| netns.sysctl(&["net.ipv4.tcp_early_retrans=0"]));
    let streams = |address: &str| -> Vec<_> {
        let to = endpoint(address, ECHO);
        let all = pods.iter().flat_map(|pod| ["tcp", "udp"].map(|protocol| (pod, protocol)));
        all.map(|(pod, protocol)| pod.netns.stream(protocol, &to, interval)).collect()
    };
    let denied = streams(WEB);
    let allowed = streams(OTHER);
    let retransmitted = || pods.iter().map(|pod| pod.netns.snmp("Tcp", "RetransSegs")).collect::<Vec<_>>();

    // Allowed by one rule, then by another, then by none, then by a port.
    let before = retransmitted();
    for rules in [
        &[deny("198.51.100.0/24"), allow("203.0.113.0/25"), deny("0.0.0.0/0")][..],
        &[deny("198.51.100.0/24")],
        &[allow("0.0.0.0/0").ports("TCP", 1, 65_535).ports("UDP", ECHO, ECHO), deny("0.0.0.0/0")],
        &both,
    ] {
        cluster.firewall(rules);
        let outside = if rules.len() == 1 { OPEN } else { SILENT };
        let ping = |netns: &Netns| netns.ping(&lab.neighbour.address, 1, "0.01") == 1;
        for pod in pods {
            eventually_ok("the rules are in force", LIMIT, || {
                if ping(&pod.netns) == (outside == OPEN) { Ok(()) } else { Err("not yet".to_owned()) }
            });
        }
    }
    assert_eq!(retransmitted(), before, "segments of allowed connections were sent again");

    cluster.firewall(&[deny("203.0.113.10/32")]);
    let recorder = Recorder::start(&lab.web.netns);
    let silence = |recorder: &Recorder| {
        recorder.reset();
        std::thread::sleep(Duration::from_millis(200));
        let seen = ["tcp", "udp"].map(|protocol| recorder.sources(protocol).contains_key(source));
        if seen == [false; 2] { Ok(()) } else { Err(format!("[tcp, udp] of {source} are seen: {seen:?}")) }
    };
    eventually_ok("denied streams stop", CUT, || silence(&recorder));
    // A retransmission is not let through either.
    std::thread::sleep(Duration::from_millis(500));
    silence(&recorder).unwrap_or_else(|complaint| panic!("{complaint}"));
    for stream in allowed {
        let report = stream.finish();
        assert!(report.errors.is_empty() && report.ok > 0, "{report:?}");
    }
    drop(denied);
    cluster.firewall(&[allow("203.0.113.10/32"), deny("0.0.0.0/0")]);
    expect(&pods[0].netns, &[(WEB, OPEN), (OTHER, SILENT)]);
}

#[test]
fn live_flows_follow_changes() {
    let cluster = Cluster::new(LabSpec::default());
    // What runs before there is a firewall: allowed by it, denied by it.
    let pod = cluster.pod("node-a", "prod");
    let interval = Duration::from_millis(5);
    let [allowed, denied] = [OTHER, WEB].map(|host| {
        ["tcp", "udp"].map(|protocol| pod.netns.stream(protocol, &endpoint(host, ECHO), interval))
    });
    cluster.firewall(&[allow("203.0.113.20/32"), deny("0.0.0.0/0")]);
    expect(&pod.netns, &[(WEB, SILENT), (OTHER, OPEN)]);
    let recorder = Recorder::start(&cluster.lab.web.netns);
    std::thread::sleep(CUT);
    for protocol in ["tcp", "udp"] {
        let seen = recorder.sources(protocol);
        assert!(!seen.contains_key(NODE_A), "{protocol} goes on: {seen:?}");
    }
    for stream in allowed {
        stream.finish().expect_lossless_from(NODE_A);
    }
    drop(denied);
    // Another pod: what is left of the denied connection is sent again for a while.
    let fresh = cluster.lab.run_pod("node-a", &PodSpec::new("prod", "fresh"));
    live_flows_are_judged_again(&cluster, &[fresh], NODE_A);
    // And those of pods with an egress IP, on its owner and elsewhere.
    cluster.lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    assert_eq!(cluster.lab.wait_owner(EGRESS), "node-b");
    let pods = ["node-a", "node-b"]
        .map(|node| cluster.lab.run_pod(node, &PodSpec::new("prod", &format!("{node}-too"))));
    for pod in &pods {
        cluster.lab.wait_source(&pod.netns, &endpoint(WEB, ECHO), EGRESS);
    }
    live_flows_are_judged_again(&cluster, &pods, EGRESS);
}

/// What `outgate status` says, to programs and to people.
fn status_texts(lab: &Lab) -> [String; 2] {
    let text = lab.outgate("node-a", &["status", "--source", &lab.source()]).expect_success();
    [lab.status().to_string(), text]
}

/// Waits until the status has OVN-Kubernetes' words and, in both forms, the detail.
#[track_caller]
fn status_says(lab: &Lab, words: &str, detail: &str) {
    eventually_ok(&format!("status says '{words}' and '{detail}'"), LIMIT, || {
        let [json, text] = status_texts(lab);
        if json.contains(words) && [&json, &text].iter().all(|form| form.contains(detail)) {
            Ok(())
        } else {
            Err(format!("{json}\n{text}"))
        }
    });
}

const APPLIED: &str = "EgressFirewall Rules applied";
const NOT_APPLIED: &str = "EgressFirewall Rules not correctly applied";

#[test]
fn what_is_not_valid_changes_nothing_and_opens_nothing() {
    let Cluster { lab, mut agents, servers: _servers } = Cluster::new(LabSpec::default());
    lab.tolerate("EgressFirewall");
    let pods = ["node-a", "node-b"].map(|node| lab.run_pod(node, &PodSpec::new("prod", node)));
    let good = [allow("203.0.113.10/32"), deny("0.0.0.0/0")];
    let everywhere = |wanted: &[(&str, &str)]| pods.iter().for_each(|pod| expect(&pod.netns, wanted));
    let log_says = |agents: &[Agent], part: &str| {
        eventually_ok(&format!("the log says {part}"), LIMIT, || {
            let log = agents[0].log();
            if log.contains(part) { Ok(()) } else { Err(log) }
        });
    };

    // A first object that is wrong opens nothing; what is inside is not its matter.
    expect(&pods[0].netns, &[(WEB, OPEN)]);
    lab.objects.firewall("prod", &[allow("203.0.113.10"), deny("0.0.0.0/0")]);
    everywhere(&[(WEB, SILENT), (OTHER, SILENT)]);
    assert_eq!(pods[0].netns.ping(&pods[1].ip, 2, "0.01"), 2);
    assert!(lab.drops("node-a").contains_key("FirewallNotReady"), "{:?}", lab.drops("node-a"));
    status_says(&lab, NOT_APPLIED, "spec.egress[0].to.cidrSelector");
    log_says(&agents, "203.0.113.10");
    // It says what to write instead.
    status_says(&lab, NOT_APPLIED, "203.0.113.10/32");

    lab.objects.firewall("prod", &good);
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    status_says(&lab, APPLIED, "prod");
    assert!(!status_texts(&lab)[0].contains(NOT_APPLIED), "{}", status_texts(&lab)[0]);

    // Wrong updates, each in another way: the version in force stays.
    let bad = |content: &str| format!("spec:\n  egress:\n{content}\n");
    for (wrong, named) in [
        (bad("  - {type: Allow, to: {cidrSelector: 203.0.113.0/33}}"), "203.0.113.0/33"),
        (bad("  - {type: AllowAll, to: {cidrSelector: 0.0.0.0/0}}"), "AllowAll"),
        (bad("  - {type: Allow, to: {cidrSelector: 0.0.0.0/0, dnsName: a.example}}"), "egress[0]"),
        (bad("  - {type: Allow, to: {}}"), "egress[0]"),
        (bad("  - {type: Allow, to: {cidrSelector: 0.0.0.0/0}, ports: [{protocol: ICMP, port: 1}]}"), "ICMP"),
        (bad("  - {type: Allow, to: {cidrSelector: 0.0.0.0/0}, ports: [{protocol: TCP, port: 0}]}"), "port"),
        (
            bad(
                "  - {type: Allow, to: {cidrSelector: 0.0.0.0/0}, ports: [{protocol: TCP, port: 9, endPort: 8}]}",
            ),
            "endPort",
        ),
        (bad("  - {type: Allow, to: {dnsName: \"*.*.example\"}}"), "*.*.example"),
    ] {
        let head =
            "apiVersion: k8s.ovn.org/v1\nkind: EgressFirewall\nmetadata: {name: default, namespace: prod}\n";
        lab.objects.write("firewall-prod.yaml", &format!("{head}{wrong}"));
        status_says(&lab, NOT_APPLIED, named);
        log_says(&agents, named);
        assert_eq!(
            pods[0].netns.reach(&[&tcp(WEB), &tcp(OTHER), &udp(OTHER)]),
            [OPEN, SILENT, SILENT],
            "{wrong}"
        );
    }
    // One that is too long.
    let long: Vec<_> = (0..8001_u32).map(|i| allow(&format!("198.18.{}.{}/32", i >> 8, i & 255))).collect();
    lab.objects.firewall("prod", &long);
    status_says(&lab, NOT_APPLIED, "8000");
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);

    // The agents die, and come back to the same wrong object.
    let stream = pods[0].netns.stream("tcp", &endpoint(WEB, ECHO), Duration::from_millis(5));
    for agent in agents.drain(..) {
        agent.kill();
    }
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    agents = lab.start_agents();
    for _ in 0..3 {
        everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    }
    status_says(&lab, NOT_APPLIED, "8000");
    stream.finish().expect_lossless_from(NODE_A);
    // A pod that comes now has the version in force too.
    let late = lab.run_pod("node-a", &PodSpec::new("prod", "late"));
    expect(&late.netns, &[(WEB, OPEN), (OTHER, SILENT)]);

    // Restarts while all is well lose nothing.
    lab.objects.firewall("prod", &good);
    status_says(&lab, APPLIED, "prod");
    let streams = ["tcp", "udp"]
        .map(|protocol| pods[0].netns.stream(protocol, &endpoint(WEB, ECHO), Duration::from_millis(2)));
    agents.drain(..).for_each(Agent::stop);
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    agents = lab.start_agents();
    everywhere(&[(WEB, OPEN), (OTHER, SILENT)]);
    for stream in streams {
        stream.finish().expect_lossless_from(NODE_A);
    }
    lab.objects.remove_firewall("prod");
    everywhere(&[(WEB, OPEN), (OTHER, OPEN)]);
    assert!(!status_texts(&lab)[0].contains(APPLIED), "{}", status_texts(&lab)[0]);
    // Once open, a wrong object closes: nobody knows what its author meant to deny.
    lab.objects.firewall("prod", &[allow("1.2.3.4")]);
    everywhere(&[(WEB, SILENT)]);
    // Objects of another name are nobody's (OVN-Kubernetes: the name is `default`).
    lab.objects.remove_firewall("prod");
    everywhere(&[(WEB, OPEN)]);
    drop(agents);
}

/// Rules that differ in every entry, but for what is asked of them: `x` is allowed by the even versions and denied by
/// the odd ones, `y` the other way round; `both` and `none` are allowed and denied by all, each time by another part
/// of the compiled rules, so that a judgement by parts of two versions would go wrong.
fn version(number: u32) -> Vec<Rule> {
    let odd = number & 1 == 1;
    let mut rules = Vec::with_capacity(8000);
    let (x, y) = if odd {
        (deny("198.18.1.0/24"), allow("198.18.2.0/24"))
    } else {
        (allow("198.18.1.0/24"), deny("198.18.2.0/24"))
    };
    rules.extend([x, y]);
    if odd {
        // By port and by prefixes of other lengths.
        rules.push(allow("198.18.3.0/24").ports("UDP", 9000, 9999));
        rules.push(deny("198.18.3.0/25"));
        rules.push(deny("198.18.4.4/32"));
        rules.push(allow("198.18.4.0/24").port("TCP", 9999));
    } else {
        rules.push(allow("198.18.3.3/32"));
        rules.push(deny("198.18.3.0/24").port("UDP", 9999));
        rules.push(deny("198.18.4.0/24").ports("UDP", 1, 65_535));
        rules.push(allow("198.18.4.0/25"));
    }
    let filler = (0..).map(|i: u32| {
        let network = format!("198.19.{}.{}/32", i >> 8 & 255, (i + number) & 255);
        let rule = if (i + number) & 1 == 0 { allow(&network) } else { deny(&network) };
        match i % 8 {
            0 => rule.ports("UDP", 9000 + (i % 500) as u16 + number as u16 % 50, 9999),
            _ => rule,
        }
    });
    rules.extend(filler.take(7999 - rules.len()));
    rules.push(deny("0.0.0.0/0"));
    rules
}

#[test]
fn eight_thousand_rules_are_replaced_in_one_step() {
    const PORT: u16 = 9999;
    let cluster = Cluster::new(LabSpec::default());
    let lab = &cluster.lab;
    let [x, y, both, none] = ["198.18.1.1", "198.18.2.2", "198.18.3.3", "198.18.4.4"];
    let web = &lab.web.netns;
    lab.router.ip(&["route add 198.18.0.0/15 via 203.0.113.10"]);
    let counters = "table inet spray {
        set seen { type ipv4_addr; flags dynamic; counter; }
        chain in { type filter hook prerouting priority -450; udp dport 9999 update @seen { ip daddr } drop; }
    }";
    let _ = web.exec_input(&["nft", "-f", "-"], &[], counters).expect_success();
    let seen = |address: &str| -> u64 {
        let text = web.exec(&["nft", "list", "set", "inet", "spray", "seen"]);
        let rest = text.split_once(&format!("{address} counter packets ")).map(|(_, rest)| rest);
        rest.and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0)
    };
    let pods = cluster.pods();
    // Until the agents know the pods, what they send is held.
    for pod in &pods {
        expect(&pod.netns, &[(WEB, OPEN)]);
    }
    cluster.firewall(&version(0));
    let in_force = |number: u32| {
        eventually_ok(&format!("version {number}"), Duration::from_secs(20), || {
            let before = [seen(x), seen(y)];
            std::thread::sleep(Duration::from_millis(100));
            let moves = [seen(x) > before[0], seen(y) > before[1]];
            let wanted = [number & 1 == 0, number & 1 == 1];
            if moves == wanted { Ok(()) } else { Err(format!("[x, y] pass: {moves:?}")) }
        });
    };
    expect(&pods[0].netns, &[(WEB, SILENT)]);
    expect(&pods[1].netns, &[(WEB, SILENT)]);
    let to = [x, y, both, none].map(|address| endpoint(address, PORT));
    let to = to.each_ref().map(String::as_str);
    let sprays = pods.each_ref().map(|pod| pod.netns.spray(&to));
    in_force(0);
    for number in 1..=6 {
        cluster.firewall(&version(number));
        in_force(number);
    }
    let sent = sprays.map(lab::traffic::Spray::finish);
    let of = |address: &str| sent.iter().map(|sent| sent[address]).sum::<u64>();
    // What was sent last is on its way.
    eventually_ok("all that is always allowed arrives", LIMIT, || {
        let (got, sent) = (seen(both), of(both));
        if got == sent { Ok(()) } else { Err(format!("{got} of {sent}")) }
    });
    assert_eq!(seen(none), 0, "of {} that no version allows", of(none));
    // Every change took some of each: at any time just one of the two passes.
    assert!(seen(x) > 0 && seen(y) > 0 && seen(x) + seen(y) < 2 * of(x));
    // One of 8,000 changes.
    let mut rules = version(6);
    rules[0] = deny("198.18.1.0/24");
    cluster.firewall(&rules);
    let spray = pods[0].netns.spray(&to);
    eventually_ok("x stops", LIMIT, || {
        let before = seen(x);
        std::thread::sleep(Duration::from_millis(50));
        if seen(x) == before { Ok(()) } else { Err("x passes".to_owned()) }
    });
    drop(spray);
}

#[test]
fn a_person_finds_out_which_rule_decides() {
    let cluster = Cluster::new(LabSpec::default());
    let lab = &cluster.lab;
    cluster.firewall(&[
        allow("203.0.113.10/32").port("TCP", ECHO),
        deny("203.0.113.0/24"),
        allow("172.18.0.0/24"),
    ]);
    let pods = cluster.pods();
    let pod = &pods[0];
    expect_targets(&pod.netns, &[(tcp(WEB), OPEN), (udp(WEB), SILENT), (tcp(OTHER), SILENT)]);
    let bpffs = lab.bpffs("node-a");
    let bpffs = bpffs.to_str().expect("UTF-8");
    let trace = |destination: &str, protocol: &str| {
        let words =
            ["trace", &pod.full_name(), destination, "--protocol", protocol, "--bpffs", bpffs, "-o", "json"];
        lab.outgate("node-a", &words).expect_success()
    };
    for (destination, protocol, says) in [
        ("203.0.113.10:7777", "tcp", Some("egress[0]")),
        ("203.0.113.10:7777", "udp", Some("egress[1]")),
        ("203.0.113.20:80", "tcp", Some("egress[1]")),
        ("203.0.113.20", "icmp", Some("egress[1]")),
        ("172.18.0.12:80", "tcp", Some("egress[2]")),
        ("192.0.2.1:80", "tcp", None),
    ] {
        let text = trace(destination, protocol);
        match says {
            Some(rule) => assert!(text.contains(rule), "{destination} {protocol}: no {rule} in {text}"),
            None => assert!(!text.contains("egress["), "{text}"),
        }
        let denied = says == Some("egress[1]");
        assert_eq!(text.contains("FirewallDenied"), denied, "{destination} {protocol}: {text}");
    }
    let dev = cluster.pod("node-a", "dev");
    expect(&dev.netns, &[(OTHER, OPEN)]);

    // Counts: hits of each rule, and who was denied.
    let agent = &cluster.agents[0];
    let metrics = || -> Vec<String> {
        let all = agent.metrics();
        all.lines()
            .filter(|line| line.contains("firewall") && !line.starts_with('#'))
            .map(str::to_owned)
            .collect()
    };
    let denied = |lines: &[String]| -> f64 {
        let ours = lines.iter().filter(|line| line.contains("prod") && line.to_lowercase().contains("den"));
        ours.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    let before = metrics();
    assert_eq!(pod.netns.reach(&[&tcp(OTHER), &udp(OTHER)]), [SILENT, SILENT]);
    eventually_ok("metrics count denials", LIMIT, || {
        let now = metrics();
        if denied(&now) > denied(&before) { Ok(()) } else { Err(now.join("\n")) }
    });
    // The audit log: pod, destination and rule on one line.
    eventually_ok("the log names the denial", LIMIT, || {
        let log = agent.log();
        let found = log
            .lines()
            .any(|line| ["prod/node-a", "203.0.113.20", "egress[1]"].iter().all(|part| line.contains(part)));
        if found { Ok(()) } else { Err(log) }
    });
    status_says(lab, APPLIED, "prod");
    let status = lab.status().to_string();
    for node in ["node-a", "node-b"] {
        assert!(status.contains(&format!("{node}: {APPLIED}")), "{status}");
    }
}
