//! A real Kubernetes API server in the lab: etcd and kube-apiserver on a host of their own between the nodes.
//!
//! ```text
//!   node-a .11 ─┐
//!   node-b .12 ─┼─ 172.18.0.0/24 ── .240 api: kube-apiserver :6443, etcd on its loopback
//!   node-c .13 ─┘
//! ```
//!
//! There is no kubelet, no scheduler and no controller manager: [`KubeApi`] makes the objects that they would
//! make (nodes, bound pods with addresses, accounts' tokens), and starts the processes that the DaemonSet's
//! and the Deployment's pods would be, with the manifests' command lines ([`install`]).
//!
//! Each test has its own server, so tests run side by side; starting one takes some seconds, so one test function
//! has as much as belongs together.

pub mod cluster;
pub mod container;
pub mod history;
pub mod install;
pub mod kubectl;
pub mod request;
pub mod world;

pub use world::KubeLab;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use self::container::Container;
use crate::command::{Process, eventually, run};
use crate::lab::{Host, Lab, utf8};

/// The server's port.
const PORT: u16 = 6443;
/// The last number of its host's address.
const LAST: usize = 240;
/// Where etcd listens, in the host's own namespace.
const ETCD: &str = "http://127.0.0.1:2379";
/// How long etcd or the server may take until they are ready, on a busy machine.
const READY: Duration = Duration::from_mins(1);
/// The token of a user that may do everything.
const ADMIN_TOKEN: &str = "admin-token";

/// A running API server. Dropping it kills it.
#[derive(Debug)]
pub struct KubeApi {
    /// The host that it runs on.
    pub host: Host,
    /// Its files: keys, kubeconfigs, etcd's data.
    dir: PathBuf,
    server: Option<Process>,
    etcd: Option<Process>,
    /// How the processes of Outgate's pods were started, by the pods' names.
    starts: Mutex<BTreeMap<String, Container>>,
}

impl Lab {
    /// Starts an API server that knows no object yet but its own, and waits until it is ready.
    #[track_caller]
    #[must_use]
    pub fn kube_api(&self) -> KubeApi {
        let dir = self.dir().join("kube");
        fs::create_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let host = self.host_beside_nodes("api", LAST);
        let mut api = KubeApi { host, dir, server: None, etcd: None, starts: Mutex::default() };
        api.make_keys();
        api.write_kubeconfig("admin", &format!("token: {ADMIN_TOKEN}"));
        api.start();
        api
    }
}

impl KubeApi {
    /// Starts etcd, if it does not run, and the server, and waits until it is ready.
    #[track_caller]
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    /// The same with further options of the server.
    #[track_caller]
    pub fn start_with(&mut self, options: &[&str]) {
        if self.etcd.is_none() {
            let program = assets().join("etcd");
            let data = self.dir.join("etcd");
            let words = [
                utf8(&program),
                "--name=lab",
                "--data-dir",
                utf8(&data),
                // Nothing here outlives the machine.
                "--unsafe-no-fsync",
                "--log-level=warn",
                &format!("--listen-client-urls={ETCD}"),
                &format!("--advertise-client-urls={ETCD}"),
                "--listen-peer-urls=http://127.0.0.1:2380",
                "--initial-advertise-peer-urls=http://127.0.0.1:2380",
                "--initial-cluster=lab=http://127.0.0.1:2380",
            ];
            self.etcd = Some(self.host.netns.spawn("etcd", &words, &[]));
        }
        let program = assets().join("kube-apiserver");
        let file = |name: &str| self.dir.join(name).display().to_string();
        let address = self.address();
        let mut words = vec![
            utf8(&program).to_owned(),
            format!("--etcd-servers={ETCD}"),
            format!("--bind-address={address}"),
            format!("--advertise-address={address}"),
            format!("--secure-port={PORT}"),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--tls-cert-file={}", file("server.crt")),
            format!("--tls-private-key-file={}", file("server.key")),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=RBAC".to_owned(),
            "--anonymous-auth=false".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-signing-key-file={}", file("server.key")),
            format!("--service-account-key-file={}", file("server.pub")),
            // It asks for ServiceAccounts named `default`, which only the controller manager makes.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
        ];
        words.extend(options.iter().map(|&option| option.to_owned()));
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        self.server = Some(self.host.netns.spawn("kube-apiserver", &words, &[]));
        self.wait_ready();
    }

    /// Kills the server as a crash does; etcd lives on.
    #[track_caller]
    pub fn kill(&mut self) {
        self.server.take().expect("a running server").kill();
    }

    /// Ends etcd and the server, with nothing written that etcd has not written already.
    #[track_caller]
    pub fn kill_all(&mut self) {
        self.kill();
        self.etcd.take().expect("a running etcd").kill();
    }

    /// Makes etcd forget all versions but the newest.
    #[track_caller]
    pub fn compact(&self) {
        let program = assets().join("etcdctl");
        let etcdctl = |words: &[&str]| {
            let words = [&[utf8(&program), "--endpoints", ETCD], words].concat();
            self.host.netns.exec_input(&words, &[("ETCDCTL_API", "3")], "").expect_success()
        };
        let status = etcdctl(&["endpoint", "status", "--write-out=json"]);
        let status: serde_json::Value = serde_json::from_str(&status).expect("etcdctl writes JSON");
        let revision = status[0]["Status"]["header"]["revision"].as_u64().expect("a revision");
        let _ = etcdctl(&["compact", &revision.to_string()]);
    }

    /// Drops, at the server's host, all packets from and to these addresses, as a broken network does: nobody is
    /// told.
    #[track_caller]
    pub fn partition(&self, addresses: &[&str]) {
        let set = addresses.join(", ");
        let rules = format!(
            "table ip partition {{
                chain in {{ type filter hook input priority -300; ip saddr {{ {set} }} drop; }}
                chain out {{ type filter hook output priority -300; ip daddr {{ {set} }} drop; }}
            }}"
        );
        let _ = self.host.netns.exec_input(&["nft", "-f", "-"], &[], &rules).expect_success();
    }

    /// Ends [`KubeApi::partition`].
    #[track_caller]
    pub fn heal(&self) {
        let _ = self.host.netns.exec(&["nft", "delete", "table", "ip", "partition"]);
    }

    /// Its address and port, as a URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.address())
    }

    /// Where a kubeconfig is, by the name it was written under; `admin` may do everything.
    #[must_use]
    pub fn kubeconfig(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.kubeconfig"))
    }

    /// Writes a kubeconfig whose user has these credentials.
    pub(crate) fn write_kubeconfig(&self, name: &str, credentials: &str) {
        let text = format!(
            "apiVersion: v1
kind: Config
clusters:
- name: lab
  cluster:
    server: {}
    certificate-authority: {}
users:
- name: {name}
  user:
    {credentials}
contexts:
- name: lab
  context:
    cluster: lab
    user: {name}
current-context: lab
",
            self.url(),
            self.dir.join("ca.crt").display()
        );
        write(&self.kubeconfig(name), &text);
    }

    /// What the server has logged, the last run of it.
    #[must_use]
    pub fn log(&self) -> String {
        self.server.as_ref().map(Process::stderr).unwrap_or_default()
    }

    fn address(&self) -> &str {
        &self.host.address
    }

    #[track_caller]
    fn wait_ready(&mut self) {
        let ready = eventually(READY, || {
            let server = self.server.as_mut().expect("it was started");
            if let Some(status) = server.try_wait() {
                let etcd = self.etcd.as_ref().map(Process::stderr).unwrap_or_default();
                panic!("kube-apiserver ended: {status}\n{}\n{etcd}", server.stderr());
            }
            self.request("GET", "/readyz", None).ok()
        });
        assert!(ready.is_some(), "kube-apiserver is not ready after {READY:?}:\n{}", self.log());
    }

    /// A CA, the server's certificate, and the file of users' tokens.
    fn make_keys(&self) {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let openssl = |words: &[&str]| {
            let new =
                ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
            let words = [&new[..], &["-nodes", "-days", "2"], words].concat();
            let _ = run(&words, &[], "").expect_success();
        };
        let (ca_key, ca) = (file("ca.key"), file("ca.crt"));
        openssl(&[
            "-keyout",
            &ca_key,
            "-out",
            &ca,
            "-subj",
            "/CN=lab-ca",
            "-addext",
            "keyUsage=critical,keyCertSign",
        ]);
        let name = format!("subjectAltName=IP:{}", self.address());
        openssl(&[
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-keyout",
            &file("server.key"),
            "-out",
            &file("server.crt"),
            "-subj",
            "/CN=kube-apiserver",
            "-addext",
            &name,
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            "extendedKeyUsage=serverAuth",
        ]);
        let public = ["openssl", "pkey", "-pubout", "-in", &file("server.key"), "-out", &file("server.pub")];
        let _ = run(&public, &[], "").expect_success();
        write(&self.dir.join("tokens.csv"), &format!("{ADMIN_TOKEN},admin,1,\"system:masters\"\n"));
    }
}

/// Where etcd and kube-apiserver are: `KUBEBUILDER_ASSETS`, or where `cargo xtask setup` puts them.
fn assets() -> PathBuf {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let place = variable("KUBEBUILDER_ASSETS").or_else(|| Some(cache()?.join("outgate/kube/bin")));
    let place = place.expect("HOME or KUBEBUILDER_ASSETS is set");
    assert!(place.join("kube-apiserver").exists(), "{}: run `cargo xtask setup`", place.display());
    place
}

#[track_caller]
fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
