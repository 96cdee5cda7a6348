//! Requests to the API server: what the lab itself asks and writes, as a user that may do everything.

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{ADMIN_TOKEN, KubeApi};
use crate::command::{Output, Process};
use crate::lab::utf8;

/// How often an object is read again while something is waited for: each look is a process with a TLS handshake.
const POLL: Duration = Duration::from_millis(50);

/// Paths of the objects that tests ask for.
pub mod path {
    /// All objects of Outgate's own cluster-scoped kinds, by plural name.
    #[must_use]
    pub fn outgate(plural: &str) -> String {
        format!("/apis/outgate.dev/v1alpha1/{plural}")
    }

    /// An EgressIP.
    #[must_use]
    pub fn egress_ip(name: &str) -> String {
        format!("/apis/k8s.ovn.org/v1/egressips/{name}")
    }

    /// A namespace's EgressFirewall.
    #[must_use]
    pub fn egress_firewall(namespace: &str) -> String {
        format!("/apis/k8s.ovn.org/v1/namespaces/{namespace}/egressfirewalls/default")
    }

    /// A pod.
    #[must_use]
    pub fn pod(namespace: &str, name: &str) -> String {
        format!("/api/v1/namespaces/{namespace}/pods/{name}")
    }

    /// A Lease.
    #[must_use]
    pub fn lease(namespace: &str, name: &str) -> String {
        format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{name}")
    }
}

impl KubeApi {
    /// Sends a request; the error is what the server or curl says.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, String> {
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let body = body.map(Value::to_string).unwrap_or_default();
        let output = self.curl(
            &["--request", method, "--header", &format!("Content-Type: {kind}"), "--data-binary", "@-"],
            path,
            &body,
        );
        if !output.success() {
            return Err(output.explain());
        }
        // The probes answer in plain text.
        let answer: Value = serde_json::from_str(&output.stdout).unwrap_or(Value::String(output.stdout));
        Ok(answer)
    }

    /// Reads an object or a list, which must be there.
    #[track_caller]
    #[must_use]
    pub fn get(&self, path: &str) -> Value {
        self.request("GET", path, None).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Reads an object that may not be there.
    #[must_use]
    pub fn try_get(&self, path: &str) -> Option<Value> {
        self.request("GET", path, None).ok()
    }

    /// Makes an object in a collection.
    #[track_caller]
    pub fn create(&self, collection: &str, object: &Value) -> Value {
        self.request("POST", collection, Some(object)).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Merges a patch into an object.
    #[track_caller]
    pub fn patch(&self, path: &str, change: &Value) {
        self.request("PATCH", path, Some(change)).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Deletes an object at once.
    #[track_caller]
    pub fn delete(&self, path: &str) {
        let options = serde_json::json!({"gracePeriodSeconds": 0});
        self.request("DELETE", path, Some(&options)).unwrap_or_else(|error| panic!("{error}"));
    }

    /// The items of a list.
    #[track_caller]
    #[must_use]
    pub fn list(&self, collection: &str) -> Vec<Value> {
        self.get(collection)["items"].as_array().cloned().unwrap_or_default()
    }

    /// Waits until an object (`null` if it is not there) is as it should be.
    #[track_caller]
    pub fn wait<T>(
        &self,
        what: &str,
        path: &str,
        limit: Duration,
        mut look: impl FnMut(&Value) -> Option<T>,
    ) -> T {
        let start = Instant::now();
        loop {
            let answer = self.request("GET", path, None);
            let object = answer.as_ref().unwrap_or(&Value::Null);
            if let Some(found) = look(object) {
                return found;
            }
            assert!(start.elapsed() < limit, "not within {limit:?}: {what}: {answer:#?}");
            sleep(POLL);
        }
    }

    /// Starts to write every change of a collection, from its present state on, to a file that the process's
    /// standard output is.
    #[track_caller]
    #[must_use]
    pub(crate) fn watch(&self, collection: &str) -> Process {
        let words = self.curl_words(&["--no-buffer"], &format!("{collection}?watch=1"));
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        self.host.netns.spawn("watch", &words, &[])
    }

    #[track_caller]
    fn curl(&self, options: &[&str], path: &str, body: &str) -> Output {
        let words = self.curl_words(&[&["--max-time", "10"], options].concat(), path);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        self.host.netns.exec_input(&words, &[], body)
    }

    fn curl_words(&self, options: &[&str], path: &str) -> Vec<String> {
        let authority = self.dir.join("ca.crt");
        let token = format!("Authorization: Bearer {ADMIN_TOKEN}");
        let fixed = [
            "curl",
            "--silent",
            "--show-error",
            "--fail-with-body",
            "--cacert",
            utf8(&authority),
            "--header",
        ];
        let url = format!("{}{path}", self.url());
        fixed
            .into_iter()
            .chain([token.as_str()])
            .chain(options.iter().copied())
            .chain([url.as_str()])
            .map(str::to_owned)
            .collect()
    }
}
