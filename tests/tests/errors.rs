//! Mistakes get one clear line that says what and where, and the rest works on.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use lab::servers::ECHO;
use lab::{Agent, Lab, LabSpec, Output, PodSpec, eventually_ok};

const EGRESS: &str = "172.18.0.101";

fn lab() -> Lab {
    let lab = Lab::with(&LabSpec::default().nodes(1));
    lab.describe_cluster(&["node-a"]);
    lab
}

/// Runs an agent that must give up, with its arguments changed by `change` and behind other programs.
#[track_caller]
fn failing_agent(lab: &Lab, before: &[&str], change: impl FnOnce(&mut Vec<String>)) -> Output {
    let mut words = lab.agent_arguments("node-a");
    change(&mut words);
    // An agent that works instead of failing is ended, and `timeout` says 124.
    let mut all = vec!["timeout", "10"];
    all.extend(before);
    all.extend(words.iter().map(String::as_str));
    let output = lab.node("node-a").netns.try_exec(&all);
    assert_eq!(output.status.code(), Some(1), "{}", output.explain());
    output
}

/// Panics unless what it says last is one line with all of these in it, and no panic or backtrace is about.
#[track_caller]
fn expect_line(output: &Output, parts: &[&str]) {
    let lines: Vec<_> = output.stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "one line is wanted: {}", output.explain());
    for part in parts {
        assert!(lines[0].contains(part), "'{part}' is missing: {}", lines[0]);
    }
}

fn replace(words: &mut [String], option: &str, value: &str) {
    let at = words.iter().position(|word| word == option).expect("the option is given");
    value.clone_into(&mut words[at + 1]);
}

#[test]
fn without_privileges() {
    let lab = lab();
    // A copy: another user may not reach the build's directory.
    let program = lab.dir().join("outgate");
    fs::copy(lab::agent::outgate(), &program).expect("a copy of outgate");
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"];
    let output = failing_agent(&lab, &nobody, |words| words[0] = program.display().to_string());
    expect_line(&output, &["root"]);
    // Root in name only, as in a container that drops capabilities.
    let output = failing_agent(&lab, &["setpriv", "--bounding-set=-all", "--inh-caps=-all"], |_| {});
    expect_line(&output, &["CAP_"]);
}

#[test]
fn without_a_bpf_filesystem() {
    let lab = lab();
    let plain: PathBuf = lab.dir().join("plain");
    fs::create_dir(&plain).expect("a directory");
    let path = plain.join("outgate").display().to_string();
    let output = failing_agent(&lab, &[], |words| replace(words, "--bpffs", &path));
    expect_line(&output, &[&plain.display().to_string(), "mount -t bpf"]);
}

#[test]
fn with_a_bad_directory() {
    let lab = lab();
    let path = lab.dir().join("absent").display().to_string();
    let output = failing_agent(&lab, &[], |words| replace(words, "--source", &format!("dir:{path}")));
    expect_line(&output, &[&path]);
    let file = lab.objects.dir().join("egressconfig.yaml").display().to_string();
    let output = failing_agent(&lab, &[], |words| replace(words, "--source", &format!("dir:{file}")));
    expect_line(&output, &[&file]);
}

#[test]
fn on_an_old_kernel() {
    let lab = lab();
    // The kernel then says that it is 2.6.
    let output = failing_agent(&lab, &["setarch", "--uname-2.6"], |_| {});
    expect_line(&output, &["kernel", "2.6."]);
}

#[test]
fn wrong_usage() {
    let lab = lab();
    for arguments in [&["agent"][..], &["no-such-command"], &["agent", "--node"]] {
        let output = lab.outgate("node-a", arguments);
        assert_eq!(output.status.code(), Some(2), "{}", output.explain());
    }
    let output = failing_agent_usage(&lab, "etcd:somewhere");
    assert_eq!(output.status.code(), Some(2), "{}", output.explain());
}

fn failing_agent_usage(lab: &Lab, source: &str) -> Output {
    lab.outgate("node-a", &["agent", "--node", "node-a", "--source", source])
}

/// Waits for the one line of the agent's log that has all of these.
#[track_caller]
fn logged_once(agent: &Agent, parts: &[&str]) {
    let find = || {
        let log = agent.log();
        let has_all = |line: &&str| parts.iter().all(|part| line.contains(part));
        log.lines().filter(has_all).map(str::to_owned).collect::<Vec<_>>()
    };
    eventually_ok(&format!("a line with {parts:?}"), Duration::from_secs(2), || {
        if find().is_empty() { Err(agent.log()) } else { Ok(()) }
    });
    assert_eq!(find().len(), 1, "said more than once: {:#?}", find());
}

#[test]
fn wrong_manifests_are_named_and_the_rest_works() {
    let lab = lab();
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
    lab.objects.egress_ip("wrong", &["172.18.0.999"], &[("env", "dev")], &[]);
    lab.tolerate("egressip-wrong.yaml");
    let agents = lab.start_agents();
    let agent = &agents[0];
    let pod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&pod.netns, &server, EGRESS);
    logged_once(agent, &["egressip-wrong.yaml", "wrong", "172.18.0.999", "egressIPs"]);

    // A file that does not parse: what it held stays in force.
    lab.tolerate("egressip-prod.yaml");
    lab.objects.write("egressip-prod.yaml", "apiVersion: k8s.ovn.org/v1\nkind: EgressIP\n  metadata: [\n");
    logged_once(agent, &["egressip-prod.yaml", "line"]);
    pod.netns.tcp(&server, 10, 5).expect_all_from(10, EGRESS);
    // Mended, it counts again.
    lab.objects.egress_ip("prod", &["172.18.0.105"], &[("env", "prod")], &[]);
    lab.wait_source(&pod.netns, &server, "172.18.0.105");

    // What is mended is said no more, and works.
    lab.objects.egress_ip("wrong", &["172.18.0.106"], &[("env", "dev")], &[]);
    let dev = lab.run_pod("node-a", &PodSpec::new("dev", "client"));
    lab.wait_source(&dev.netns, &server, "172.18.0.106");
}

#[test]
fn two_objects_with_one_address() {
    let lab = lab();
    let _echo = lab.echo(&lab.web.netns);
    let server = format!("{}:{ECHO}", lab.web.address);
    lab.objects.egress_ip("first", &[EGRESS], &[("env", "prod")], &[]);
    let agents = lab.start_agents();
    let prod = lab.run_pod("node-a", &PodSpec::new("prod", "client"));
    lab.wait_source(&prod.netns, &server, EGRESS);

    lab.tolerate(EGRESS);
    lab.objects.egress_ip("second", &[EGRESS, "172.18.0.102"], &[("env", "dev")], &[]);
    // What it comes to for the object is an event besides.
    logged_once(&agents[0], &["WARN", EGRESS, "first", "second"]);
    // The one that had it keeps it, and no pod of the other leaves by it.
    prod.netns.tcp(&server, 10, 5).expect_all_from(10, EGRESS);
    let dev = lab.run_pod("node-a", &PodSpec::new("dev", "client"));
    lab.wait_source(&dev.netns, &server, "172.18.0.102");
    dev.netns.tcp(&server, 50, 10).expect_all_from(50, "172.18.0.102");
    let status = lab.status().to_string();
    assert!(status.contains("second"), "{status}");
}
