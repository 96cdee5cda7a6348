//! What the DaemonSet's containers may do is enough, from the first to the last: the CNI plugin is installed, the agent
//! works, and the uninstall leaves nothing on the node.
//!
//! The lab starts these containers with the manifests' capabilities, mounts and users (`lab::kube::container`).

use std::fs;
use std::path::Path;
use std::time::Duration;

use lab::kube::KubeLab;
use lab::kube::install::{NAMESPACE, manifests};
use lab::kube::world::LIMIT;
use lab::objects::egress_ip;
use lab::{Process, eventually_ok};
use serde_json::{Value, json};

const EGRESS: &str = "172.18.0.101";
/// `outgate-cni`, chained.
const CHAIN: &str =
    r#"{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"ptp"},{"type":"outgate-cni"}]}"#;
/// libcni's cache of a sandbox with `{"plugins":[{"type":"outgate-cni"}]}`, which is base64 there.
const CACHED: &str =
    r#"{"kind":"cniCacheV1","containerId":"c","config":"eyJwbHVnaW5zIjpbeyJ0eXBlIjoib3V0Z2F0ZS1jbmkifV19"}"#;
/// Bits of include/uapi/linux/capability.h.
const CAPABILITIES: [(&str, u32); 5] =
    [("NET_ADMIN", 12), ("NET_RAW", 13), ("SYS_ADMIN", 21), ("PERFMON", 38), ("BPF", 39)];

/// The DaemonSet with a component's patch.
fn with_component(kube: &KubeLab, component: &str) -> Value {
    let patch = fs::read_to_string(manifests().join("components").join(component).join("agent.yaml"));
    let base = manifests().join("base/agent.yaml");
    let words =
        ["patch", "--local", "-f", base.to_str().expect("UTF-8"), "--type", "strategic", "-o", "json"];
    let text = kube.api.kubectl(&[&words[..], &["-p", &patch.expect("the component's patch")]].concat());
    serde_json::from_str(&text).expect("kubectl writes JSON")
}

/// That a process has the rights that the manifest gives its container, and no others.
#[track_caller]
fn has_rights(pid: u32, container: &Value) {
    let names = container["securityContext"]["capabilities"]["add"].as_array().expect("capabilities");
    let bit = |name: &Value| CAPABILITIES.iter().find(|(known, _)| name == known).expect("a known name").1;
    let wanted: u64 = names.iter().map(|name| 1 << bit(name)).sum();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
        u64::from_str_radix(line.trim(), 16).expect("a number")
    };
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(field(set), wanted, "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), 1);
}

/// The names in a directory; none if it is not there.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn the_manifests_rights_are_enough_and_nothing_is_left() {
    let mut kube = KubeLab::installed(2, &["node-b"]);
    let cgroup = kube.lab.cgroup();
    kube.controllers.push(kube.api.start_controller(&kube.lab, "node-a"));
    let set = with_component(&kube, "cni-plugin");
    let installed = kube.api.run_init_container(&kube.lab, "node-a", &set).expect_success();
    assert!(installed.contains("outgate-cni installed"), "{installed}");
    let name = cgroup.path.file_name().expect("a name").to_str().expect("UTF-8");
    let option = format!("/host/cgroup/{name}");
    let agent = kube.api.start_agent_with(&kube.lab, "node-a", &["--pod-cgroup", &option]);
    kube.agents = vec![agent, kube.api.start_agent(&kube.lab, "node-b")];
    for agent in &mut kube.agents {
        agent.wait_ready();
        has_rights(agent.pid(), &set["spec"]["template"]["spec"]["containers"][0]);
    }
    let (api, lab) = (&kube.api, &kube.lab);
    let host = |path: &str| api.host_path(lab, "node-a", path);

    // Traffic by a tunnel and a gateway, of a pod that had connections before it was selected.
    let pod = kube.pod("node-a", "prod", "web");
    let own = lab.node("node-a").address.clone();
    kube.wait_source(&pod, &own);
    api.apply(&egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]));
    kube.wait_source(&pod, EGRESS);
    // The chained plugin reaches the agent by the node's directory.
    let plugin = host("/opt/cni/bin").join("outgate-cni");
    let conf =
        json!({"cniVersion": "1.1.0", "name": "pods", "socket": host("/run").join("outgate/cni.sock")});
    let words = [plugin.to_str().expect("UTF-8")];
    let status = [("CNI_COMMAND", "STATUS")];
    let _ = lab.node("node-a").netns.exec_input(&words, &status, &conf.to_string()).expect_success();
    let guards = |kube: &KubeLab| {
        let path = cgroup.path.to_str().expect("UTF-8");
        kube.lab.node("node-a").netns.exec(&["bpftool", "-j", "cgroup", "show", path])
    };
    assert!(guards(&kube).contains("from_cgroup"), "{}", guards(&kube));

    // As README says.
    api.kubectl(&["apply", "-k", manifests().join("uninstall").to_str().expect("UTF-8")]);
    let set = api.get(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/outgate-agent"));
    let deployment = api.get(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/outgate-controller"));
    assert_eq!(deployment["spec"]["replicas"], 0);
    kube.controllers.remove(0).stop();
    let nodes = ["node-a", "node-b"];
    for node in nodes {
        kube.take_agent(node).stop();
    }
    let (api, lab) = (&kube.api, &kube.lab);
    let host = |path: &str| api.host_path(lab, "node-a", path);

    // A node whose configuration names the plugin keeps that, and nothing else.
    let configuration = host("/etc/cni/net.d/10-pods.conflist");
    fs::create_dir_all(configuration.parent().expect("a directory")).expect("a directory of the lab");
    fs::write(&configuration, CHAIN).expect("a file of the lab");
    let refused = api.run_init_container(lab, "node-a", &set);
    let said = refused.explain();
    assert!(!refused.success() && said.contains("10-pods.conflist names it"), "{said}");
    assert!(plugin.exists() && !lab.bpffs("node-a").exists(), "{said}");
    kube.wait_source(&pod, &own);
    assert!(!guards(&kube).contains("from_cgroup"), "{}", guards(&kube));
    fs::remove_file(&configuration).expect("it is there");

    // One that has pods which were made with it keeps it until they are gone.
    let sandbox = host("/var/lib/cni/results/pods-c-eth0");
    fs::create_dir_all(sandbox.parent().expect("a directory")).expect("a directory of the lab");
    fs::write(&sandbox, CACHED).expect("a file of the lab");
    for node in nodes {
        let _ = api.run_init_container(lab, node, &set).expect_success();
    }
    let stays: Vec<Process> = nodes.iter().map(|node| api.start_container(lab, node, &set)).collect();
    eventually_ok("it says what is left", LIMIT, || {
        let said = stays[0].stdout();
        if said.contains("left ") { Ok(()) } else { Err(said) }
    });
    has_rights(stays[0].pid(), &set["spec"]["template"]["spec"]["containers"][0]);
    assert!(plugin.exists());
    fs::remove_file(&sandbox).expect("it is there");
    eventually_ok("the plugin goes", LIMIT, || if plugin.exists() { Err(stays[0].stdout()) } else { Ok(()) });

    for (node, stay) in nodes.iter().zip(stays) {
        let ended = stay.terminate(Duration::from_secs(5));
        assert!(ended.success(), "{}", ended.explain());
        let netns = &lab.node(node).netns;
        assert!(!lab.bpffs(node).exists(), "pins of {node}");
        for path in ["/run", "/opt/cni/bin"] {
            assert_eq!(names(&api.host_path(lab, node, path)), Vec::<String>::new(), "{path} of {node}");
        }
        for words in [&["ip", "link"][..], &["nft", "list", "ruleset"], &["bpftool", "net", "show"]] {
            let left = netns.exec(words);
            for word in ["outgate", "from_pod", "to_uplink", "from_uplink"] {
                assert!(!left.contains(word), "{word} on {node}: {left}");
            }
        }
    }
}
