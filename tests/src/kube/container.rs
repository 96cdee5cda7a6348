//! A manifest's container as its runtime starts it: the same words, environment, mounts, user and capabilities, in a
//! root directory that has the program and nothing else.
//!
//! What is the node's own directories in the manifests is a directory of the lab for each node: see
//! [`KubeApi::host_path`].

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use serde_json::Value;

use super::KubeApi;
use super::install::NAMESPACE;
use crate::agent::outgate;
use crate::cgroup;
use crate::command::{Output, Process, run};
use crate::lab::{Lab, helper_path, utf8};

/// How a container's program is started.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    pub(crate) node: String,
    words: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Container {
    /// A variable that its program has.
    pub(crate) fn variable(&self, name: &str) -> Option<&str> {
        self.environment.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn with<T>(&self, then: impl FnOnce(&[&str], &[(&str, &str)]) -> T) -> T {
        let words: Vec<_> = self.words.iter().map(String::as_str).collect();
        let environment: Vec<_> =
            self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        then(&words, &environment)
    }

    /// Starts it; `label` names its logs.
    #[track_caller]
    pub(crate) fn spawn(&self, lab: &Lab, label: &str) -> Process {
        self.with(|words, environment| lab.node(&self.node).netns.spawn(label, words, environment))
    }

    /// Runs it to its end, as a kubelet does an init container.
    #[track_caller]
    pub(crate) fn run(&self, lab: &Lab) -> Output {
        self.with(|words, environment| lab.node(&self.node).netns.exec_input(words, environment, ""))
    }
}

impl KubeApi {
    /// The lab's directory that stands for a node's own in mounts of `hostPath`.
    #[must_use]
    pub fn host_path(&self, lab: &Lab, node: &str, path: &str) -> PathBuf {
        match path {
            // Where each node has a directory of its own: all of a lab have one file system.
            "/sys/fs/bpf" => lab.bpffs(node).parent().expect("a directory of the lab").to_path_buf(),
            // Where this machine has version 2, if it has both.
            "/sys/fs/cgroup" => cgroup::mounted().expect("a cgroup2 file system is mounted"),
            _ => self.dir.join("host").join(node).join(path.trim_start_matches('/')),
        }
    }

    /// Runs the first init container of a DaemonSet's template on a node, to its end.
    #[track_caller]
    #[must_use]
    pub fn run_init_container(&self, lab: &Lab, node: &str, set: &Value) -> Output {
        let template = &set["spec"]["template"];
        let container = &template["spec"]["initContainers"][0];
        let container =
            self.container(lab, (node, &format!("outgate-agent-{node}")), template, container, &[]);
        container.run(lab)
    }

    /// Starts the container of a DaemonSet's template on a node, whatever it is.
    #[track_caller]
    #[must_use]
    pub fn start_container(&self, lab: &Lab, node: &str, set: &Value) -> Process {
        let template = &set["spec"]["template"];
        let container = &template["spec"]["containers"][0];
        let pod = format!("outgate-agent-{node}");
        self.container(lab, (node, &pod), template, container, &[]).spawn(lab, &pod)
    }

    /// What a pod's container of a template runs on a node, with further arguments.
    #[track_caller]
    pub(crate) fn container(
        &self,
        lab: &Lab,
        (node, pod): (&str, &str),
        template: &Value,
        container: &Value,
        options: &[&str],
    ) -> Container {
        // Every node has these.
        for path in ["/run", "/etc"] {
            let path = self.host_path(lab, node, path);
            fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        let program = outgate();
        let root = self.dir.join("root").join(pod);
        fs::create_dir_all(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
        let mut words: Vec<String> =
            ["unshare", "--mount", "--propagation", "slave"].map(str::to_owned).into();
        words.extend([utf8(&helper_path("contain")), "--root", utf8(&root)].map(str::to_owned));
        words.extend(rights(&container["securityContext"]));
        let mut mount = |from: &str, to: &str, read_only: bool| {
            let more = if read_only { ":ro" } else { "" };
            words.extend(["--mount".to_owned(), format!("{from}:{to}{more}")]);
        };
        mount(utf8(&program), "/outgate", true);
        for library in libraries(&program) {
            mount(&library, &library, true);
        }
        // As a kubelet has them made for a pod of the node's network with the node's own resolvers.
        for file in ["/etc/resolv.conf", "/etc/hosts"] {
            mount(file, file, true);
        }
        // For the account's token and the server's certificate: a kubelet mounts them as a volume.
        mount(utf8(&self.dir), utf8(&self.dir), true);
        let volumes = template["spec"]["volumes"].as_array().cloned().unwrap_or_default();
        let mut bpffs = None;
        for place in container["volumeMounts"].as_array().into_iter().flatten() {
            let volume = volumes.iter().find(|volume| volume["name"] == place["name"]);
            let source = &volume.unwrap_or_else(|| panic!("there is no volume for {place}"))["hostPath"];
            let path = source["path"].as_str().expect("a hostPath");
            let from = self.host_path(lab, node, path);
            match source["type"].as_str() {
                Some("Directory") => assert!(from.is_dir(), "{path} is not there: the pod would not start"),
                Some("DirectoryOrCreate") => fs::create_dir_all(&from).expect("a directory of the lab"),
                other => panic!("the lab does not know hostPath's type {other:?}"),
            }
            let to = place["mountPath"].as_str().expect("a mountPath");
            mount(utf8(&from), to, place["readOnly"] == true);
            if path == "/sys/fs/bpf" {
                bpffs = Some(format!("{to}/{node}"));
            }
        }
        let mut environment = self.environment(lab, (node, pod), container);
        if let Some(place) = environment.iter_mut().find(|(name, _)| name == "OUTGATE_BPFFS") {
            place.1 = bpffs.expect("a mount of the node's bpf file system");
        }
        words.extend(["--", "/outgate"].map(str::to_owned));
        let arguments = container["args"].as_array().into_iter().flatten();
        let arguments = arguments.map(|word| word.as_str().expect("a word"));
        words.extend(arguments.chain(options.iter().copied()).map(str::to_owned));
        Container { node: node.to_owned(), words, environment }
    }

    #[track_caller]
    fn environment(&self, lab: &Lab, (node, pod): (&str, &str), container: &Value) -> Vec<(String, String)> {
        let mut environment = Vec::new();
        for variable in container["env"].as_array().into_iter().flatten() {
            let name = variable["name"].as_str().expect("a name").to_owned();
            let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                None => variable["value"].as_str().expect("a value"),
                Some("spec.nodeName") => node,
                Some("metadata.namespace") => NAMESPACE,
                Some("metadata.name") => pod,
                Some("status.hostIP" | "status.podIP") => &lab.node(node).address,
                Some(other) => panic!("the lab does not know the field {other}"),
            };
            environment.push((name, value.to_owned()));
        }
        let kubeconfig = self.kubeconfig(pod);
        for (name, value) in [("OUTGATE_KUBECONFIG", utf8(&kubeconfig)), ("NO_COLOR", "1")] {
            environment.retain(|(known, _)| known != name);
            environment.push((name.to_owned(), value.to_owned()));
        }
        environment
    }

    /// Keeps how a pod is started.
    pub(crate) fn remember(&self, pod: &str, container: &Container) {
        let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        starts.insert(pod.to_owned(), container.clone());
    }

    /// How a pod was started the last time.
    #[track_caller]
    pub(crate) fn recall(&self, pod: &str) -> Container {
        let known = self.starts.lock().unwrap_or_else(PoisonError::into_inner).get(pod).cloned();
        known.unwrap_or_else(|| panic!("{pod} was never started"))
    }
}

/// A securityContext as `contain` takes it. What it does not say is as runtimes have it, and not wanted here.
#[track_caller]
fn rights(context: &Value) -> Vec<String> {
    let says = |name: &str, wanted: bool| assert_eq!(context[name], wanted, "securityContext.{name}");
    says("privileged", false);
    says("allowPrivilegeEscalation", false);
    says("readOnlyRootFilesystem", true);
    assert_eq!(
        context["capabilities"]["drop"],
        serde_json::json!(["ALL"]),
        "securityContext.capabilities.drop"
    );
    let mut words = vec!["--no-new-privileges".to_owned(), "--read-only".to_owned()];
    for (option, name) in [("--user", "runAsUser"), ("--group", "runAsGroup")] {
        let number = context[name].as_u64().unwrap_or_else(|| panic!("securityContext.{name}"));
        words.extend([option.to_owned(), number.to_string()]);
    }
    for capability in context["capabilities"]["add"].as_array().into_iter().flatten() {
        words.extend(["--capability".to_owned(), capability.as_str().expect("a name").to_owned()]);
    }
    words
}

/// The libraries that a program asks for, and its loader: none in an image's, which is static.
#[track_caller]
fn libraries(program: &Path) -> Vec<String> {
    // Of a static program it says so, and fails.
    let listed = run(&["ldd", utf8(program)], &[], "").stdout;
    let paths = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    paths.map(str::to_owned).collect()
}
