//! Rules for names are in force before the pod has the answer, whoever resolves, and nobody but a resolver of the
//! cluster says which addresses a name has.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use datapath::limits::NAME_GRACE_SECONDS;
use datapath::packet::ACK;
use lab::dns::{A, Answer, Data, Question, Record};
use lab::firewall::{Rule, allow, deny};
use lab::hostile::{ip_packet, octets};
use lab::lookups::answered;
use lab::packet::{Built, raw, tcp, udp};
use lab::servers::ECHO;
use lab::service::{Front, Masquerade};
use lab::{Agent, Lab, LabSpec, Netns, Pod, PodSpec, Process, endpoint, eventually_ok};

const EGRESS: &str = "172.18.0.101";
const WEB: &str = "203.0.113.10";
const OTHER: &str = "203.0.113.20";
const NODE_A: &str = "172.18.0.11";
const NODE_B: &str = "172.18.0.12";
/// The service of the cluster's DNS.
const CLUSTER_DNS: &str = "10.96.0.53";
const NODE_LOCAL_DNS: &str = "169.254.20.10";
const LIMIT: Duration = Duration::from_secs(5);
/// Addresses outside that `web` answers as.
const POOL: &str = "198.18.0.0/15";
const POOL6: &str = "2001:db8:5::/64";

struct Cluster {
    lab: Lab,
    agents: Vec<Agent>,
    _servers: Vec<Process>,
}

impl Cluster {
    /// Two nodes; `web` serves at every address of the pool; the agents have the name servers of `resolv`.
    fn new(spec: LabSpec, config: &str, resolv: &str) -> Self {
        let lab = Lab::with(&spec.nodes(2));
        let web = &lab.web;
        lab.router.ip(&[&format!("route add {POOL} via {WEB}")]);
        web.netns.ip(&[&format!("route add local {POOL} dev lo")]);
        if !web.address6.is_empty() {
            lab.router.ip(&[&format!("route add {POOL6} via {}", web.address6)]);
            web.netns.ip(&[&format!("route add local {POOL6} dev lo")]);
        }
        lab.describe_cluster(&["node-b"]);
        lab.objects.namespace("kube-system", &[]);
        lab.objects.config(config);
        fs::write(lab.dir().join("resolv.conf"), resolv).expect("the lab's directory can be written");
        let servers = vec![lab.echo(&web.netns)];
        let mut cluster = Self { lab, agents: Vec::new(), _servers: servers };
        cluster.start();
        cluster
    }

    fn start(&mut self) {
        let resolv = self.lab.dir().join("resolv.conf");
        self.agents = self.lab.start_agents_with(&["--resolv-conf", resolv.to_str().expect("UTF-8")]);
    }

    fn pod(&self, node: &str, namespace: &str, name: &str) -> Pod {
        self.lab.run_pod(node, &PodSpec::new(namespace, name))
    }

    /// `prod/node-a` and `prod/node-b`.
    fn pods(&self) -> [Pod; 2] {
        ["node-a", "node-b"].map(|node| self.pod(node, "prod", node))
    }

    /// Rules and, at the end, that nothing else is allowed. They are in force when this returns: while they are not, the
    /// pods are asked to connect to an address that each call denies or allows in turn.
    fn firewall(&self, pods: &[&Pod], rules: &[Rule]) {
        static MARKER: AtomicUsize = AtomicUsize::new(1);
        let marker = format!("198.19.255.{}", MARKER.fetch_add(1, Ordering::Relaxed));
        let mut all = vec![allow(&format!("{marker}/32"))];
        all.extend(rules.iter().cloned());
        all.extend([deny("0.0.0.0/0"), deny("::/0")]);
        self.lab.objects.firewall("prod", &all);
        for pod in pods {
            reaches(&pod.netns, &marker, true);
            reaches(&pod.netns, "198.19.254.1", false);
        }
    }

    /// The cluster's DNS: a pod on `node-b`, behind a service.
    fn cluster_dns(&self, names: DnsNames, entries: &[impl AsRef<str>]) -> (Pod, Process) {
        let spec = PodSpec::new(names.namespace, "dns").label(names.label.0, names.label.1);
        let pod = self.lab.run_pod("node-b", &spec);
        let server = self.lab.resolver_on(&pod.netns, "0.0.0.0", names.port, entries);
        self.dns_service(names, &pod);
        (pod, server)
    }

    fn dns_service(&self, names: DnsNames, pod: &Pod) {
        for node in &self.lab.nodes {
            for protocol in ["udp", "tcp"] {
                let front = Front::Address(names.address, 53);
                node.service(front, protocol, &endpoint(&pod.ip, names.port), Masquerade::Cluster);
            }
        }
        let DnsNames { namespace, service, address, .. } = names;
        let (key, value) = names.label;
        self.lab.objects.namespace(namespace, &[]);
        self.lab.objects.write(
            &format!("service-{namespace}.yaml"),
            &format!(
                "apiVersion: v1
kind: Service
metadata: {{name: {service}, namespace: {namespace}, labels: {{\"{key}\": \"{value}\"}}}}
spec: {{clusterIP: {address}, clusterIPs: [{address}], ports: [{{name: dns, port: 53, protocol: UDP}}]}}
"
            ),
        );
    }
}

/// How a distribution calls the parts of its cluster DNS.
#[derive(Clone, Copy)]
struct DnsNames {
    namespace: &'static str,
    service: &'static str,
    label: (&'static str, &'static str),
    address: &'static str,
    port: u16,
}

const KUBERNETES: DnsNames = DnsNames {
    namespace: "kube-system",
    service: "kube-dns",
    label: ("k8s-app", "kube-dns"),
    address: CLUSTER_DNS,
    port: 53,
};
const OPENSHIFT: DnsNames = DnsNames {
    namespace: "openshift-dns",
    service: "dns-default",
    label: ("dns.operator.openshift.io/daemonset-dns", "default"),
    address: "10.96.0.54",
    port: 5353,
};

/// Waits until the lab's server at an address is reached over TCP, or is not.
#[track_caller]
fn reaches(pod: &Netns, address: &str, wanted: bool) {
    let target = format!("tcp/{}", endpoint(address, ECHO));
    eventually_ok(&format!("{} reaches {address}: {wanted}", pod.name()), LIMIT, || {
        let outcome = pod.reach(&[&target]).remove(0);
        if (outcome == "open") == wanted { Ok(()) } else { Err(outcome) }
    });
}

/// Panics if the lab's server is reached at an address.
#[track_caller]
fn never_reaches(pod: &Netns, address: &str) {
    assert_ne!(pod.reach(&[&format!("tcp/{}", endpoint(address, ECHO))]), ["open"], "{address}");
}

/// The example of `OpenShift`'s documentation, with a real resolver and clients that use it as containers do.
#[test]
fn the_documentations_example_does_what_it_says() {
    let cluster = Cluster::new(LabSpec::default(), "", "");
    let lab = &cluster.lab;
    lab.tolerate("cannot be looked up");
    let dns = lab.run_pod("node-b", &PodSpec::new("kube-system", "dns").label("k8s-app", "kube-dns"));
    let _dns = lab.dnsmasq_with(
        &dns.netns,
        &[
            "--host-record=www.example.com,198.18.7.7",
            "--host-record=web.example.org,198.18.7.8",
            "--cname=alias.example.org,www.example.com",
        ],
    );
    cluster.dns_service(KUBERNETES, &dns);
    let _nginx = lab.nginx(&lab.web.netns);
    let pods = cluster.pods();
    let curl = |pod: &Pod, url: &str| {
        let words = ["curl", "-sS", "--fail", "--max-time", "3", "--connect-timeout", "1", url];
        pod.netns.exec_with_resolver(lab, CLUSTER_DNS, &words)
    };
    lab.objects.firewall("prod", &[allow("1.2.3.0/24"), allow("www.example.com"), deny("0.0.0.0/0")]);
    for pod in &pods {
        reaches(&pod.netns, "198.19.0.1", false);
        let page = curl(pod, "http://www.example.com/").expect_success();
        assert!(page.starts_with(&lab.node(&pod.node).address), "{page}");
        for url in ["http://web.example.org/", "http://198.18.7.8/", &format!("http://{WEB}/")] {
            assert!(!curl(pod, url).success(), "{url}");
        }
    }
    // It is not the name that is written that counts, but the one that is asked for.
    let late = cluster.pod("node-a", "prod", "late");
    eventually_ok("a pod that comes now", LIMIT, || {
        let page = curl(&late, "http://www.example.com/");
        if page.success() { Ok(()) } else { Err(page.explain()) }
    });
    lab.objects.firewall("prod", &[deny("0.0.0.0/0"), allow("1.2.3.0/24"), allow("www.example.com")]);
    for pod in &pods {
        reaches(&pod.netns, "198.18.7.7", false);
        for url in ["http://www.example.com/", "http://alias.example.org/", "http://198.18.7.7/"] {
            assert!(!curl(pod, url).success(), "{url}");
        }
    }
}

/// Each answer has another address, which is good for that moment only.
#[test]
fn the_first_connection_after_a_look_up_is_allowed() {
    let config = format!("  denyAction: Reject\n  resolvers: [\"{OTHER}\", \"{NODE_LOCAL_DNS}\"]\n");
    let cluster = Cluster::new(LabSpec::default(), &config, "");
    let lab = &cluster.lab;
    // The agents ask some of these resolvers, and each knows one name only.
    lab.tolerate("has no address");
    lab.tolerate("cannot be looked up");
    // Addresses of another part of the pool from each, and a name of its own.
    let places = ["service", "openshift", "pod", "outside", "node", "local"];
    let name = |place: &str| format!("{place}.spin.example.com");
    let entry = |at: usize| format!("{} 0 SPIN 198.18.{}.0", name(places[at]), at * 40);
    let (dns, _dns) = cluster.cluster_dns(KUBERNETES, &[entry(0), entry(2)]);
    let (_openshift, _openshift_dns) = cluster.cluster_dns(OPENSHIFT, &[entry(1)]);
    let node = &lab.node("node-a").netns;
    node.ip(&[&format!("addr add {NODE_LOCAL_DNS}/32 dev lo")]);
    let _resolvers = [
        lab.resolver_on(&lab.other.netns, OTHER, 53, &[entry(3)]),
        lab.resolver_on(node, NODE_A, 53, &[entry(4)]),
        lab.resolver_on(node, NODE_LOCAL_DNS, 53, &[entry(5)]),
    ];
    let pods = cluster.pods();
    let mut rules = vec![allow(&format!("{OTHER}/32")).port("UDP", 53).port("TCP", 53)];
    rules.extend(places.iter().map(|place| allow(&name(place))));
    cluster.firewall(&[&pods[0], &pods[1]], &rules);
    let servers = [CLUSTER_DNS, OPENSHIFT.address, &dns.ip, OTHER, NODE_A, NODE_LOCAL_DNS];
    let rounds = |count: u32, at: usize, pod: &Pod| {
        let rounds = pod.netns.rounds(servers[at], &name(places[at]), count, &["--never"]);
        rounds.expect_all(count.into(), count.into());
        assert_eq!(rounds.truncated, 0, "{rounds:?}");
    };
    rounds(1000, 0, &pods[0]);
    for at in 1..places.len() {
        rounds(50, at, &pods[0]);
        // The node-local resolver is its own node's only.
        if at != 5 {
            rounds(50, at, &pods[1]);
        }
    }
    // Over TCP the answer waits until it is known.
    for at in [0, 2, 3, 4, 5] {
        pods[0].netns.rounds(servers[at], &name(places[at]), 2, &["--never", "--tcp"]).expect_all(2, 2);
    }
    // With an egress IP the look-ups that leave the cluster do so by another way.
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    assert_eq!(lab.wait_owner(EGRESS), "node-b");
    lab.objects.firewall("prod", &[]);
    for pod in &pods {
        lab.wait_source(&pod.netns, &endpoint(WEB, ECHO), EGRESS);
    }
    cluster.firewall(&[&pods[0], &pods[1]], &rules);
    for pod in &pods {
        for at in [0, 3, 4] {
            rounds(50, at, pod);
        }
        pod.netns.rounds(OTHER, &name("outside"), 2, &["--never", "--tcp"]).expect_all(2, 2);
    }
    // What is always translated at once still shows its answers.
    lab.objects.config(&format!("{config}  offload: Always\n"));
    rounds(100, 3, &pods[0]);
    rounds(100, 0, &pods[0]);
}

/// Whatever form an answer has, it is either learnt whole or asked for again over TCP.
#[test]
fn answers_of_every_form_are_learnt_and_nothing_else() {
    let cluster = Cluster::new(LabSpec::default().dual_stack(), "  denyAction: Reject\n", "");
    let chain: Vec<_> = (0..7).map(|n| format!("c{n}.example.com 5 CNAME c{}.example.com", n + 1)).collect();
    let mut entries: Vec<&str> = chain.iter().map(String::as_str).collect();
    entries.extend([
        "c7.example.com 0 SPIN 198.18.20.0",
        "www.example.com 0 SPIN 198.18.21.0",
        "six.example.com 5 A 198.18.19.1 2001:db8:5::1",
        "ports.example.com 5 A 198.18.29.2",
        "alias.example.net 5 CNAME www2.cdn.example",
        "www2.cdn.example 0 SPIN 198.18.22.0",
        "few.example.com 5 MANY 198.18.23.0 12",
        "many.example.com 5 MANY 198.18.24.0 60",
        "huge.example.com 5 MANY 198.18.25.0 200",
        "split.example.com 0 SPIN 198.18.26.0",
        "one.wild.example 5 A 198.18.27.1",
        "two.one.wild.example 5 A 198.18.27.2",
        "wild.example 5 A 198.18.27.3",
        "denied.example.com 5 A 198.18.28.1",
        "shared.example.com 5 A 198.18.28.1",
        // Of what comes with an answer, only what the question led to counts.
        "evil.example.net 5 STRAY www.example.com 198.18.66.1",
        "evil2.example.net 5 CNAME www.example.com",
        "stray.example.com 5 STRAY stranger.example 198.18.66.2",
        "elsewhere.example 5 A 198.18.66.3",
    ]);
    let (dns, _server) = cluster.cluster_dns(KUBERNETES, &entries);
    let pods = cluster.pods();
    cluster.firewall(
        &[&pods[0], &pods[1]],
        &[
            deny("denied.example.com"),
            deny("198.18.25.7/32"),
            allow("c0.example.com"),
            allow("Www.Example.COM."),
            allow("six.example.com"),
            allow("ports.example.com").port("TCP", ECHO),
            allow("alias.example.net"),
            allow("few.example.com"),
            allow("many.example.com"),
            allow("huge.example.com"),
            allow("split.example.com"),
            allow("*.wild.example"),
            allow("shared.example.com"),
            allow("stray.example.com"),
        ],
    );
    let pod = &pods[0].netns;
    let rounds = |name: &str, more: &[&str]| pod.rounds(CLUSTER_DNS, name, 1, more);
    // The agent knows all names of the rules by its own look-ups, but not the addresses of the moment.
    for name in ["evil.example.net", "evil2.example.net", "stray.example.com", "elsewhere.example"] {
        rounds(name, &[]).expect_denied();
    }
    for address in ["198.18.66.1", "198.18.66.2", "198.18.66.3", "198.18.21.1"] {
        never_reaches(pod, address);
    }
    // The question's name has the addresses at the chain's end; the names between have not become allowed.
    rounds("c1.example.com", &[]).expect_denied();
    rounds("www2.cdn.example", &[]).expect_denied();
    rounds("c0.example.com", &["--never"]).expect_all(1, 1);
    rounds("alias.example.net", &["--never"]).expect_all(1, 1);

    // As 0x20 writes it (draft-vixie-dnsext-dns0x20), and with the other family.
    rounds("wWw.eXaMPLE.cOm", &["--never"]).expect_all(1, 1);
    rounds("six.EXAMPLE.com", &["--never", "--aaaa", "--edns", "1232"]).expect_all(1, 1);
    rounds("ports.example.com", &[]).expect_all(1, 1);
    assert_ne!(pod.reach(&["udp/198.18.29.2:7777"]), ["open"]);
    assert_eq!(pod.ping("198.18.29.2", 1, "0.01"), 0);

    rounds("one.wild.example", &[]).expect_all(1, 1);
    rounds("ONE.WILD.example", &[]).expect_all(1, 1);
    rounds("two.one.wild.example", &[]).expect_denied();
    rounds("wild.example", &[]).expect_denied();

    for options in [&["--edns", "1232"][..], &["--edns", "4096"], &[], &["--tcp"]] {
        rounds("few.example.com", options).expect_all(12, 12);
        rounds("many.example.com", options).expect_all(60, 60);
        // One of them is denied by a rule before, whatever the answer.
        let huge = rounds("huge.example.com", options);
        assert_eq!((huge.connected, huge.distinct), (199, 200), "{huge:?}");
    }
    // Nothing can have been cut short for those who asked over TCP at first.
    assert_eq!(rounds("few.example.com", &["--tcp"]).truncated, 0);
    pod.rounds(CLUSTER_DNS, "split.example.com", 3, &["--tcp", "--never"]).expect_all(3, 3);
    pods[1].netns.rounds(&dns.ip, "split.example.com", 3, &["--tcp", "--never"]).expect_all(3, 3);

    // Of two names of an address the first rule decides, whatever the pod asked for.
    rounds("denied.example.com", &[]).expect_denied();
    rounds("shared.example.com", &[]).expect_denied();
    // A changed firewall keeps what was learnt: nobody looks up again because of it.
    cluster.firewall(&[&pods[0], &pods[1]], &[allow("shared.example.com"), allow("six.example.com")]);
    reaches(pod, "198.18.28.1", true);
    reaches(pod, "198.18.19.1", true);
    reaches(pod, "198.18.27.1", false);
}

/// An answer that makes `name` an address.
fn forged(question: &Question, address: &str) -> Vec<u8> {
    let data = Data::Address(address.parse().expect("an address"));
    Answer::of(vec![Record { owner: question.name.clone(), ttl: 300, data }]).to_bytes(question, 512)
}

/// A UDP packet in two fragments, the first of which has no data.
fn in_two(whole: &Built) -> [Built; 2] {
    const MORE_FRAGMENTS: u16 = 0x2000;
    let bytes = ip_packet(whole).split_off(20);
    let piece = |bytes: &[u8], fragment| raw(whole.source, whole.destination, 17, bytes).fragment(fragment);
    [piece(&bytes[..8], MORE_FRAGMENTS), piece(&bytes[8..], 1)]
}

/// Pods of every kind send answers to questions that are under way, with the right number, to the right port.
#[test]
fn forged_answers_gain_nothing() {
    const ID: u16 = 4660;
    // Without reverse-path filters nothing but the programs stands between.
    let config = format!("  denyAction: Reject\n  resolvers: [\"{OTHER}\"]\n");
    let cluster = Cluster::new(LabSpec::default().rp_filter(0), &config, "");
    let lab = &cluster.lab;
    let question = Question::new(ID, "silent.example.com", A);
    let entries = ["silent.example.com 0 SILENT", "real.example.com 5 A 198.18.30.1"];
    let (dns, _server) = cluster.cluster_dns(KUBERNETES, &entries);
    let evil_entries = ["silent.example.com 5 A 198.18.67.1", "real.example.com 5 A 198.18.67.2"];
    let _silent = [(&lab.node("node-b").netns, NODE_B), (&lab.other.netns, OTHER)]
        .map(|(netns, address)| lab.resolver_on(netns, address, 53, &entries));
    let _neighbour_dns = lab.resolver_on(&lab.neighbour.netns, "172.18.0.250", 53, &evil_entries);
    // On the resolver's own node nothing is masqueraded between them: a clash in conntrack would drop what is forged.
    let [elsewhere, victim] = cluster.pods();
    let impostor = lab.run_pod("node-b", &PodSpec::new("prod", "impostor").label("k8s-app", "kube-dns"));
    let _impostor_dns = lab.resolver_on(&impostor.netns, "0.0.0.0", 53, &evil_entries);
    let others = [cluster.pod("node-b", "dev", "near"), cluster.pod("node-a", "dev", "far")];
    cluster.firewall(
        &[&victim],
        &[
            allow("silent.example.com"),
            allow("real.example.com"),
            allow("172.18.0.250/32").port("UDP", 53).port("TCP", 53),
            allow(&format!("{OTHER}/32")).port("UDP", 53),
        ],
    );
    let pod = &victim.netns;

    // Who is no resolver says nothing: a host outside that may be asked, a pod with the label of one.
    for server in ["172.18.0.250", &impostor.ip] {
        for transport in [&[][..], &["--tcp"]] {
            for name in ["silent.example.com", "real.example.com"] {
                pod.rounds(server, name, 1, transport).expect_denied();
            }
        }
    }

    // Each from its place, as each of the resolvers, while the pod waits for that one's answer.
    let spoofed = |node: &str| lab.drops(node).get("SpoofedSource").copied().unwrap_or(0);
    let attackers: [(&Netns, &str, &str); 5] = [
        (pod, "node-b", &victim.ip),
        (&elsewhere.netns, "node-a", &elsewhere.ip),
        (&impostor.netns, "node-b", &impostor.ip),
        (&others[0].netns, "node-b", &others[0].ip),
        (&others[1].netns, "node-a", &others[1].ip),
    ];
    // Each time from another port: conntrack remembers the NAT of the last one.
    let ask = |resolver: &str, port: u16| {
        pod.asking(resolver, &question.name, &["--source-port", &port.to_string(), "--limit-ms", "10000"])
    };
    let at_port = |port: u16| (octets(&victim.ip), port);
    for (at, (attacker, node, own)) in attackers.into_iter().enumerate() {
        for (turn, resolver) in [CLUSTER_DNS, &dns.ip, NODE_B, OTHER].into_iter().enumerate() {
            let address = format!("198.18.{}.{}", 70 + at, turn + 1);
            let answer = forged(&question, &address);
            let before = spoofed(node);
            let port = 40_000 + 10 * at as u16 + turn as u16;
            let (asking, victim_end) = (ask(resolver, port), at_port(port));
            let framed = [&u16::try_from(answer.len()).expect("short").to_be_bytes()[..], &answer].concat();
            let as_resolver = (octets(resolver), 53);
            let whole = udp(as_resolver, victim_end).payload(&answer);
            let [first, second] = in_two(&whole);
            attacker.send_packets(&[
                whole.clone(),
                whole.ip_options(&[1, 1, 1, 0]),
                first,
                second,
                udp((octets(own), 53), victim_end).payload(&answer),
                tcp(as_resolver, victim_end, ACK).payload(&framed),
                udp((octets(resolver), 5353), victim_end).payload(&answer),
            ]);
            assert!(spoofed(node) >= before + 5, "of {before}: {:?}", lab.drops(node));
            never_reaches(pod, &address);
            // It waits still.
            let came = asking.stdout();
            assert!(!came.contains('{'), "{resolver}'s answer forged by {}: {came}", attacker.name());
        }
    }

    // The resolver's own pod may answer, but only what it was asked: not another number, nor to or from another port.
    let as_dns = (octets(&dns.ip), 53);
    let (asking, victim_end) = (ask(&dns.ip, 41_000), at_port(41_000));
    dns.netns.send_packets(&[
        udp(as_dns, victim_end).payload(&forged(&Question { id: ID + 1, ..question.clone() }, "198.18.80.1")),
        udp(as_dns, at_port(41_001)).payload(&forged(&question, "198.18.80.2")),
        udp((octets(&dns.ip), 54), victim_end).payload(&forged(&question, "198.18.80.3")),
    ]);
    for address in ["198.18.80.1", "198.18.80.2", "198.18.80.3"] {
        never_reaches(pod, address);
    }
    drop(asking);
    // The very same packets are believed when they come from where they should: nothing else was wrong with them.
    let (asking, victim_end) = (ask(&dns.ip, 41_010), at_port(41_010));
    dns.netns.send_packets(&[udp(as_dns, victim_end).payload(&forged(&question, "198.18.80.4"))]);
    let came = answered(&asking.wait(Duration::from_secs(15)));
    assert!(came.is_ok(), "{came:?}");
    reaches(pod, "198.18.80.4", true);
    pod.rounds(CLUSTER_DNS, "real.example.com", 1, &["--never"]).expect_all(1, 1);
}

/// A pod that has its address from elsewhere is judged by the name all the same: the agent looks names up itself.
#[test]
fn names_are_in_force_for_pods_that_did_not_look_them_up() {
    let cluster = Cluster::new(LabSpec::default(), "", &format!("nameserver {OTHER}\n"));
    let lab = &cluster.lab;
    let pods = cluster.pods();
    let serve = |address: &str| {
        let entries = [
            format!("bad.example.com 1 A {address}"),
            "good.example.com 1 CNAME cdn.example".to_owned(),
            "cdn.example 1 A 198.18.41.1".to_owned(),
        ];
        lab.resolver_on(&lab.other.netns, OTHER, 53, &entries)
    };
    let server = serve("198.18.40.1");
    for pod in &pods {
        reaches(&pod.netns, "198.18.40.1", true);
    }
    lab.objects.firewall(
        "prod",
        &[deny("bad.example.com"), allow("good.example.com"), allow("198.18.40.0/24"), deny("198.18.0.0/15")],
    );
    for pod in &pods {
        reaches(&pod.netns, "198.18.40.1", false);
        reaches(&pod.netns, "198.18.40.2", true);
        reaches(&pod.netns, "198.18.41.1", true);
        reaches(&pod.netns, "198.18.41.2", false);
    }
    // Its address changes: the new one is in force soon after the TTL, the old one for a grace time.
    drop(server);
    let server = serve("198.18.40.2");
    let limit = Duration::from_secs(20);
    for pod in &pods {
        eventually_ok("the new address is denied", limit, || {
            match pod.netns.reach(&["tcp/198.18.40.2:7777"]).remove(0) {
                outcome if outcome == "open" => Err(outcome),
                _ => Ok(()),
            }
        });
        never_reaches(&pod.netns, "198.18.40.1");
    }
    drop(server);
}

/// Programs learn without an agent; what only an agent can read comes late, not never.
#[test]
fn answers_come_while_the_agent_is_dead() {
    let mut cluster = Cluster::new(LabSpec::default(), "  denyAction: Reject\n", "");
    let entries = ["spin.example.com 0 SPIN 198.18.50.0", "many.example.com 5 MANY 198.18.59.0 60"];
    let (_dns, _server) = cluster.cluster_dns(KUBERNETES, &entries);
    let pods = cluster.pods();
    let rules = [allow("spin.example.com"), allow("many.example.com")];
    cluster.firewall(&[&pods[0], &pods[1]], &rules);
    cluster.agents.drain(..).for_each(Agent::kill);
    for pod in &pods {
        let pod = &pod.netns;
        pod.rounds(CLUSTER_DNS, "spin.example.com", 100, &["--never"]).expect_all(100, 100);
        let addresses = pod.ask(CLUSTER_DNS, "spin.example.com", &["--tcp"]);
        assert_eq!(addresses.as_ref().map(Vec::len), Ok(1), "{addresses:?}");
        let addresses = pod.ask(CLUSTER_DNS, "many.example.com", &["--tcp"]);
        assert_eq!(addresses.as_ref().map(Vec::len), Ok(60), "{addresses:?}");
    }
    // What was learnt before and meanwhile stays when the agent is back, and TCP is as it was.
    let learnt = pods[0].netns.ask(CLUSTER_DNS, "spin.example.com", &[]).expect("an address")[0].to_string();
    cluster.start();
    for _ in 0..5 {
        assert_eq!(pods[0].netns.reach(&[&format!("tcp/{learnt}:{ECHO}")]), ["open"]);
    }
    for pod in &pods {
        pod.netns.rounds(CLUSTER_DNS, "spin.example.com", 3, &["--tcp", "--never"]).expect_all(3, 3);
        pod.netns.rounds(CLUSTER_DNS, "many.example.com", 1, &["--tcp"]).expect_all(60, 60);
    }
}

/// An address whose TTL is long over is allowed as long as a connection uses it, and is not when none does. What the
/// agent has found out stays in force while its resolver is silent. It takes the grace time, a minute.
#[test]
fn addresses_live_as_long_as_their_connections() {
    let config = "  denyAction: Reject\n";
    let cluster = Cluster::new(LabSpec::default(), config, &format!("nameserver {OTHER}\n"));
    let lab = &cluster.lab;
    lab.tolerate("look");
    let entries = [
        "used.example.com 1 A 198.18.60.1",
        // Agents look no wildcards up, so nobody but the pod asks.
        "idle.wild.example.com 1 A 198.18.62.2",
        "bad.example.com 1 A 198.18.61.1",
    ];
    let resolver = lab.resolver_on(&lab.other.netns, OTHER, 53, &entries);
    let [pod, _] = cluster.pods();
    let resolvers = format!("{OTHER}/32");
    let rules = ["used.example.com", "*.wild.example.com", "198.18.61.0/24", &resolvers].map(allow);
    cluster.firewall(&[&pod], &[&[deny("bad.example.com")], &rules[..]].concat());
    reaches(&pod.netns, "198.18.61.1", false);
    reaches(&pod.netns, "198.18.61.2", true);
    pod.netns.rounds(OTHER, "used.example.com", 1, &["--never"]).expect_all(1, 1);
    let to = endpoint("198.18.60.1", ECHO);
    let stream = pod.netns.stream("tcp", &to, Duration::from_millis(50));
    // Known by now, but connected to by nobody: that would keep it.
    assert_eq!(pod.netns.ask(OTHER, "idle.wild.example.com", &[]).map(|all| all.len()), Ok(1));
    drop(resolver);
    let grace = Duration::from_secs(u64::from(NAME_GRACE_SECONDS));
    std::thread::sleep(grace + Duration::from_secs(4));
    let targets = ["198.18.60.1", "198.18.62.2", "198.18.61.1", "198.18.61.2"];
    let targets = targets.map(|address| format!("tcp/{}", endpoint(address, ECHO)));
    let outcomes = pod.netns.reach(&targets.each_ref().map(String::as_str));
    assert_eq!(outcomes, ["open", "refused", "refused", "open"]);
    stream.finish().expect_lossless_from(NODE_A);
}
