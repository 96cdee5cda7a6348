//! What the node's own netfilter drops stays dropped, and what it does not drop is not disturbed.

use std::thread;
use std::time::{Duration, Instant};

use lab::hostile::Outside;
use lab::servers::ECHO;
use lab::service::{Front, Masquerade};
use lab::{Agent, Cni, Lab, LabSpec, Netns, Pod, PodSpec, eventually_ok};

const EGRESS: &str = "172.18.0.101";
const LIMIT: Duration = Duration::from_millis(400);

struct Cluster {
    lab: Lab,
    agents: Vec<Agent>,
    _servers: [lab::Process; 2],
    web: String,
    other: String,
}

fn cluster(cni: Cni) -> Cluster {
    let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni));
    lab.describe_cluster(&["node-b"]);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    let servers = [lab.echo(&lab.web.netns), lab.echo(&lab.other.netns)];
    let [web, other] = [&lab.web, &lab.other].map(|host| format!("{}:{ECHO}", host.address));
    Cluster { lab, agents, _servers: servers, web, other }
}

impl Cluster {
    /// A selected pod on the holder's node and one on another.
    fn pods(&self) -> [Pod; 2] {
        let pods = ["node-a", "node-b"].map(|node| self.lab.run_pod(node, &PodSpec::new("prod", node)));
        for pod in &pods {
            self.lab.wait_source(&pod.netns, &self.web, EGRESS);
        }
        pods
    }
}

/// One rule, made and taken away, in the words of the tool that makes it.
struct Rule {
    what: &'static str,
    add: String,
    remove: String,
}

fn rules(web: &str) -> Vec<Rule> {
    let iptables = |what, table: &str, chain: &str| Rule {
        what,
        add: format!("iptables -w -t {table} -I {chain} -d {web} -j DROP"),
        remove: format!("iptables -w -t {table} -D {chain} -d {web} -j DROP"),
    };
    let nft = |what, hook: &str, priority: i32| Rule {
        what,
        add: format!(
            "printf 'table ip blocked {{\\n chain c {{\\n type filter hook {hook} priority {priority};\\n \
             ip daddr {web} drop\\n }}\\n }}\\n' | nft -f -"
        ),
        remove: "nft delete table ip blocked".into(),
    };
    vec![
        iptables("iptables, filter FORWARD", "filter", "FORWARD"),
        iptables("iptables, mangle FORWARD", "mangle", "FORWARD"),
        iptables("iptables, mangle POSTROUTING", "mangle", "POSTROUTING"),
        iptables("iptables, raw PREROUTING", "raw", "PREROUTING"),
        nft("nft, forward", "forward", 0),
        nft("nft, postrouting before masquerade", "postrouting", 50),
        nft("nft, postrouting after masquerade", "postrouting", 300),
    ]
}

fn shell(netns: &Netns, line: &str) {
    let _ = netns.exec(&["sh", "-c", line]);
}

/// New connections are dropped while the rule is there, and those to others are not; the next after it works.
fn rules_drop_new_connections(cni: Cni) {
    let cluster = cluster(cni);
    let lab = &cluster.lab;
    let pods = cluster.pods();
    let outside = Outside::watch(lab);
    for pod in &pods {
        let node = lab.node(&pod.node);
        for rule in rules(&lab.web.address) {
            let what = format!("{} on {}", rule.what, node.name);
            let kept = pod.netns.stream("tcp", &cluster.other, Duration::from_millis(20));
            pod.netns.tcp(&cluster.web, 2, 1).expect_all_from(2, EGRESS);
            shell(&node.netns, &rule.add);
            for seen in [pod.netns.tcp_source(&cluster.web, LIMIT), pod.netns.udp_source(&cluster.web, LIMIT)]
            {
                assert!(seen.is_err(), "{what}: {seen:?}");
            }
            assert_eq!(pod.netns.ping(&lab.web.address, 2, "0.01"), 0, "{what}");
            pod.netns.tcp(&cluster.other, 5, 1).expect_all_from(5, EGRESS);
            pod.netns.udp(&cluster.other, 2).expect_all_from(2, EGRESS);
            shell(&node.netns, &rule.remove);
            pod.netns.tcp(&cluster.web, 2, 1).expect_all_from(2, EGRESS);
            pod.netns.udp(&cluster.web, 2).expect_all_from(2, EGRESS);
            assert_eq!(pod.netns.ping(&lab.web.address, 2, "0.01"), 2, "{what}");
            kept.finish().expect_lossless_from(EGRESS);
        }
    }
    outside.expect_at_most(&[EGRESS]);
}

#[test]
fn rules_drop_new_connections_of_ptp_pods() {
    rules_drop_new_connections(Cni::Ptp);
}

#[test]
fn rules_drop_new_connections_of_bridge_pods() {
    rules_drop_new_connections(Cni::Bridge);
}

/// TCP from a given port; says `open`, or why not.
fn connect_from(netns: &Netns, port: u16, to: &str, server_port: u16) -> String {
    let program = format!(
        "import socket\ns = socket.socket()\n\
         s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
         s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\\1\\0\\0\\0\\0\\0\\0\\0')\n\
         s.bind(('', {port})); s.settimeout(0.4)\n\
         try:\n s.connect(('{to}', {server_port})); print('open')\n\
         except OSError as e: print(type(e).__name__)"
    );
    netns.exec(&["python3", "-c", &program]).trim().to_owned()
}

/// A connection that begins on the ports of one before it begins anew, however far that one got.
#[test]
fn a_port_that_is_used_again_is_asked_about_again() {
    let cluster = cluster(Cni::Ptp);
    let lab = &cluster.lab;
    let pods = cluster.pods();
    let outside = Outside::watch(lab);
    let web = lab.web.address.clone();
    let silence = |verb: &str| {
        shell(&lab.web.netns, &format!("iptables -w {verb} INPUT -p tcp --dport {ECHO} -j DROP"));
    };
    for pod in &pods {
        let node = &lab.node(&pod.node).netns;
        let rule = |verb: &str| shell(node, &format!("iptables -w {verb} FORWARD -d {web} -j DROP"));
        // Opened and ended by RST before.
        assert_eq!(connect_from(&pod.netns, 41_000, &web, ECHO), "open");
        rule("-I");
        assert_eq!(connect_from(&pod.netns, 41_000, &web, ECHO), "TimeoutError", "after a connection");
        rule("-D");
        assert_eq!(connect_from(&pod.netns, 41_000, &web, ECHO), "open");
        // Never answered before.
        silence("-I");
        assert_eq!(connect_from(&pod.netns, 41_001, &web, ECHO), "TimeoutError");
        rule("-I");
        silence("-D");
        assert_eq!(
            connect_from(&pod.netns, 41_001, &web, ECHO),
            "TimeoutError",
            "after a SYN without an answer"
        );
        rule("-D");
        assert_eq!(connect_from(&pod.netns, 41_001, &web, ECHO), "open");
    }
    outside.expect_at_most(&[EGRESS]);
}

/// UDP and ping have no beginning: within 30 s they are asked about again, and again allowed when they are.
#[test]
fn a_rule_stops_udp_and_ping_within_30_seconds() {
    let cluster = cluster(Cni::Ptp);
    let lab = &cluster.lab;
    let pods = cluster.pods();
    let outside = Outside::watch(lab);
    let inside: Vec<_> = pods.iter().map(|pod| (pod, lab::Recorder::start(&pod.netns))).collect();
    let begun = Instant::now();
    // A datagram every 50 ms on one socket, and pings of one identifier.
    let program = format!(
        "import socket, time\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         s.connect(('{}', {ECHO}))\nwhile True: s.send(b'x'); time.sleep(.05)",
        lab.web.address
    );
    let _streams: Vec<_> = pods
        .iter()
        .flat_map(|pod| {
            [
                pod.spawn("udp", &["python3", "-c", &program]),
                pod.spawn("ping", &["ping", "-n", "-q", "-i", "0.05", &lab.web.address]),
            ]
        })
        .collect();
    let counts = || -> Vec<u64> {
        let of = |recorder: &lab::Recorder, protocol| {
            recorder.sources(protocol).get(&lab.web.address).copied().unwrap_or_default()
        };
        inside.iter().flat_map(|(_, r)| [of(r, "udp"), of(r, "icmp")]).collect()
    };
    eventually_ok("answers", Duration::from_secs(5), || {
        let counts = counts();
        if counts.iter().all(|n| *n > 10) { Ok(()) } else { Err(format!("{counts:?}")) }
    });
    for pod in &pods {
        shell(&lab.node(&pod.node).netns, &format!("iptables -w -I FORWARD -d {} -j DROP", lab.web.address));
    }
    let ruled = Instant::now();
    // Nothing is sent for the 30 s, so there is nothing to wait for but their end; then nothing may come.
    let stopped = eventually_ok("silence", Duration::from_secs(35), || {
        let before = counts();
        thread::sleep(Duration::from_millis(500));
        let after = counts();
        if before == after { Ok(Instant::now()) } else { Err(format!("{before:?} {after:?}")) }
    });
    let after = stopped - ruled;
    assert!(after < Duration::from_secs(33), "{after:?}, {:?} after the flows began", stopped - begun);
    for pod in &pods {
        shell(&lab.node(&pod.node).netns, &format!("iptables -w -D FORWARD -d {} -j DROP", lab.web.address));
    }
    let silent = counts();
    eventually_ok("answers again", Duration::from_secs(5), || {
        let counts = counts();
        if counts.iter().zip(&silent).all(|(now, then)| now > then) {
            Ok(())
        } else {
            Err(format!("{counts:?}"))
        }
    });
    outside.expect_at_most(&[EGRESS]);
}

/// kube-proxy drops in FORWARD what conntrack calls invalid: it sees one direction only of offloaded flows, and
/// hears of some again after long.
fn what_conntrack_does_not_know_goes_on(cni: Cni) {
    let mut cluster = cluster(cni);
    let pods = cluster.pods();
    let outside = Outside::watch(&cluster.lab);
    let interval = Duration::from_millis(10);
    let (lab, web) = (&cluster.lab, &cluster.web);
    for node in &lab.nodes {
        // First of all: whatever comes up the stack is judged. Strict about windows, as it is by default.
        shell(&node.netns, "iptables -w -I FORWARD -m conntrack --ctstate INVALID -j DROP");
        node.netns.sysctl(&[
            "net.netfilter.nf_conntrack_tcp_be_liberal=0",
            "net.netfilter.nf_conntrack_tcp_loose=0",
        ]);
    }
    // A service whose target is outside walks the stack with every packet, both ways.
    for node in &lab.nodes {
        for protocol in ["tcp", "udp"] {
            node.service(Front::Address("10.96.0.30", 80), protocol, web, Masquerade::Cluster);
        }
    }
    let helper = lab::lab::helper_path("bulk");
    let helper = helper.to_str().expect("UTF-8");
    let bulk = format!("{}:7000", lab.web.address);
    let mut server = lab.web.netns.spawn("bulk", &[helper, "serve", &bulk], &[]);
    server.wait_stdout("ready", Duration::from_secs(10));
    for node in &lab.nodes {
        node.service(Front::Address("10.96.0.31", 80), "tcp", &bulk, Masquerade::Cluster);
    }
    let streams: Vec<_> = pods
        .iter()
        .flat_map(|pod| {
            ["tcp", "udp"]
                .map(|p| [pod.netns.stream(p, web, interval), pod.netns.stream(p, "10.96.0.30:80", interval)])
        })
        .flatten()
        .collect();
    // The half that is closed stays closed while the other goes on sending: `tcp --direction down` reads what a
    // server sends that has been told all. Loss makes both ends send again.
    for node in &lab.nodes {
        shell(&node.netns, "tc qdisc add dev eth0 root netem loss 0.5% 2>/dev/null || true");
    }
    let transfer = |destination: &str, direction: &str| {
        let words = [helper, "tcp", destination, "--bytes", "20000000", "--direction", direction];
        let output = pods[0].exec(&words);
        assert!(output.contains("\"bytes\":20000000") && output.contains("\"wrong\":null"), "{output}");
    };
    for destination in [&*bulk, "10.96.0.31:80"] {
        for direction in ["up", "down"] {
            transfer(destination, direction);
        }
    }
    for node in &lab.nodes {
        shell(&node.netns, "tc qdisc del dev eth0 root 2>/dev/null || true");
    }
    cluster.agents.drain(..).for_each(Agent::stop);
    transfer(&bulk, "up");
    let _agents = cluster.lab.start_agents();
    transfer(&bulk, "down");
    for stream in streams {
        let report = stream.finish();
        // Datagrams may have met the loss above; a stream that ended would show one error, of TCP.
        assert!(report.ok > 100, "{report:?}");
        assert!(report.errors.keys().all(|error| error == "no answer"), "{report:?}");
        assert_eq!(report.sources.keys().collect::<Vec<_>>(), [EGRESS], "{report:?}");
    }
    outside.expect_at_most(&[EGRESS]);
}

#[test]
fn what_conntrack_does_not_know_of_ptp_pods_goes_on() {
    what_conntrack_does_not_know_goes_on(Cni::Ptp);
}

#[test]
fn what_conntrack_does_not_know_of_bridge_pods_goes_on() {
    what_conntrack_does_not_know_goes_on(Cni::Bridge);
}
