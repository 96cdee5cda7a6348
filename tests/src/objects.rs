//! Kubernetes objects in a directory: each file is written whole, beside, and renamed into place.

use std::fmt::Write as _;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::lab::{POD_NETWORKS, SERVICE_NETWORKS};

/// A directory that agents watch.
#[derive(Debug, Clone)]
pub struct Objects {
    dir: PathBuf,
    /// Whether the cluster's networks are of both families.
    v6: bool,
}

/// Labels as pairs, in the order they are written.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// What a pod's object says besides its address.
#[derive(Debug, Clone)]
pub(crate) struct PodObject {
    namespace: String,
    name: String,
    node: String,
    pub(crate) uid: String,
    pub(crate) labels: Vec<(String, String)>,
}

impl PodObject {
    pub(crate) fn new(namespace: &str, name: &str, node: &str, labels: &[(String, String)]) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            node: node.into(),
            uid: next_uid(),
            labels: labels.to_vec(),
        }
    }

    fn file(&self) -> String {
        format!("pod-{}-{}.yaml", self.namespace, self.name)
    }
}

impl Objects {
    pub(crate) fn new(dir: &Path, v6: bool) -> Self {
        fs::create_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        Self { dir: dir.into(), v6 }
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a file in one step: whoever reads the directory sees the old content or the new.
    #[track_caller]
    pub fn write(&self, file: &str, content: &str) {
        let (path, beside) = (self.dir.join(file), self.dir.join(format!(".{file}.new")));
        let written = fs::write(&beside, content).and_then(|()| fs::rename(&beside, &path));
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// Removes a file, if it is there.
    #[track_caller]
    pub fn remove(&self, file: &str) {
        match fs::remove_file(self.dir.join(file)) {
            Err(error) if error.kind() != ErrorKind::NotFound => panic!("{file}: {error}"),
            _ => {}
        }
    }

    /// A Node that may own egress IPs if `assignable`, as its kubelet reports it. The first of the pods' networks
    /// is the cluster's primary one.
    pub fn node(&self, name: &str, addresses: &[&str], pod_cidrs: &[String], assignable: bool, ready: bool) {
        self.labelled_node(name, addresses, pod_cidrs, assignable, ready, &[]);
    }

    /// The same with further labels.
    pub fn labelled_node(
        &self,
        name: &str,
        addresses: &[&str],
        pod_cidrs: &[String],
        assignable: bool,
        ready: bool,
        labels: Labels,
    ) {
        let internal = addresses.iter().fold(String::new(), |mut text, address| {
            let _ = write!(text, "\n  - type: InternalIP\n    address: \"{address}\"");
            text
        });
        let (pod_cidr, pod_cidrs) = (&pod_cidrs[0], list(pod_cidrs));
        let mut more = String::new();
        for (key, value) in
            assignable.then_some(&("k8s.ovn.org/egress-assignable", "")).into_iter().chain(labels)
        {
            let _ = write!(more, "\n    {key}: \"{value}\"");
        }
        let status = if ready { "True" } else { "False" };
        self.write(
            &format!("node-{name}.yaml"),
            &format!(
                "apiVersion: v1
kind: Node
metadata:
  name: {name}
  uid: uid-{name}
  labels:
    kubernetes.io/hostname: {name}{more}
spec:
  podCIDR: \"{pod_cidr}\"
  podCIDRs:{pod_cidrs}
status:
  addresses:{internal}
  - type: Hostname
    address: {name}
  conditions:
  - type: Ready
    status: \"{status}\"
"
            ),
        );
    }

    /// A Namespace.
    pub fn namespace(&self, name: &str, labels: Labels) {
        let labels = map(4, labels.iter().copied());
        self.write(
            &format!("namespace-{name}.yaml"),
            &format!(
                "apiVersion: v1
kind: Namespace
metadata:
  name: {name}
  labels:{labels}
"
            ),
        );
    }

    /// An `EgressIP`; an empty pod selector is left out, as most manifests do.
    pub fn egress_ip(&self, name: &str, addresses: &[&str], namespaces: Labels, pods: Labels) {
        self.write(&egress_ip_file(name), &egress_ip(name, addresses, namespaces, pods));
    }

    /// Removes an `EgressIP`.
    pub fn remove_egress_ip(&self, name: &str) {
        self.remove(&egress_ip_file(name));
    }

    /// The `EgressConfig` with the lab's networks and, indented by two, further fields of its `spec`.
    pub fn config(&self, more: &str) {
        let families = if self.v6 { 2 } else { 1 };
        let (pods, services) = (list(&POD_NETWORKS[..families]), list(&SERVICE_NETWORKS[..families]));
        self.write(
            "egressconfig.yaml",
            &format!(
                "apiVersion: outgate.dev/v1alpha1
kind: EgressConfig
metadata:
  name: default
spec:
  clusterCIDRs:{pods}
  serviceCIDRs:{services}
{more}"
            ),
        );
    }

    /// Writes a pod's object: pending without addresses, running with them.
    pub(crate) fn write_pod(&self, pod: &PodObject, ips: &[&str]) {
        let PodObject { namespace, name, node, uid, labels } = pod;
        let labels = map(4, labels.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        let status = match ips {
            [] => "  phase: Pending".to_owned(),
            [first, ..] => ips.iter().fold(
                format!("  phase: Running\n  podIP: \"{first}\"\n  podIPs:"),
                |mut text, ip| {
                    let _ = write!(text, "\n  - ip: \"{ip}\"");
                    text
                },
            ),
        };
        self.write(
            &pod.file(),
            &format!(
                "apiVersion: v1
kind: Pod
metadata:
  namespace: {namespace}
  name: {name}
  uid: {uid}
  labels:{labels}
spec:
  nodeName: {node}
status:
{status}
"
            ),
        );
    }

    pub(crate) fn remove_pod(&self, pod: &PodObject) {
        self.remove(&pod.file());
    }
}

/// An `EgressIP`'s manifest.
#[must_use]
pub fn egress_ip(name: &str, addresses: &[&str], namespaces: Labels, pods: Labels) -> String {
    let addresses = list(addresses);
    let selector = |name: &str, labels: Labels| match labels {
        [] => String::new(),
        labels => format!("  {name}:\n    matchLabels:{}\n", map(6, labels.iter().copied())),
    };
    let namespaces = match namespaces {
        [] => "  namespaceSelector: {}\n".to_owned(),
        some => selector("namespaceSelector", some),
    };
    format!(
        "apiVersion: k8s.ovn.org/v1
kind: EgressIP
metadata:
  name: {name}
spec:
  egressIPs:{addresses}
{namespaces}{}",
        selector("podSelector", pods)
    )
}

fn egress_ip_file(name: &str) -> String {
    format!("egressip-{name}.yaml")
}

/// A block sequence of plain strings. An address is one: none of its colons is followed by a space.
fn list<T: AsRef<str>>(items: &[T]) -> String {
    items.iter().fold(String::new(), |mut text, item| {
        let _ = write!(text, "\n  - {}", item.as_ref());
        text
    })
}

/// A block mapping of strings, or ` {}`.
fn map<'a>(indent: usize, pairs: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let text = pairs.fold(String::new(), |mut text, (key, value)| {
        let _ = write!(text, "\n{:indent$}{key}: \"{value}\"", "");
        text
    });
    if text.is_empty() { " {}".to_owned() } else { text }
}

/// A uid that no other object of this process has.
fn next_uid() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("00000000-0000-4000-8000-{:012x}", NEXT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_egress_ip_reads_like_the_documentation() {
        let text = egress_ip("egressips-prod", &["172.18.0.101", "172.18.0.102"], &[("env", "prod")], &[]);
        assert_eq!(
            text,
            "apiVersion: k8s.ovn.org/v1
kind: EgressIP
metadata:
  name: egressips-prod
spec:
  egressIPs:
  - 172.18.0.101
  - 172.18.0.102
  namespaceSelector:
    matchLabels:
      env: \"prod\"
"
        );
    }
}
