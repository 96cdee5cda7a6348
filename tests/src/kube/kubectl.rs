//! kubectl, as the user's hand.

use std::fs;

use super::KubeApi;
use crate::command::Output;
use crate::lab::utf8;

impl KubeApi {
    /// Runs kubectl as a user that may do everything; it must succeed. Gives its standard output.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).expect_success()
    }

    /// The same, to its end, whatever that is.
    #[track_caller]
    #[must_use]
    pub fn try_kubectl(&self, arguments: &[&str]) -> Output {
        self.kubectl_as("admin", arguments, "")
    }

    /// `kubectl apply` of a manifest.
    #[track_caller]
    pub fn apply(&self, manifest: &str) -> String {
        self.try_apply(manifest).expect_success()
    }

    /// The same, to its end, whatever that is.
    #[track_caller]
    #[must_use]
    pub fn try_apply(&self, manifest: &str) -> Output {
        self.kubectl_as("admin", &["apply", "-f", "-"], manifest)
    }

    /// Runs kubectl with one of the kubeconfigs ([`KubeApi::kubeconfig`]).
    #[track_caller]
    #[must_use]
    pub fn kubectl_as(&self, user: &str, arguments: &[&str], input: &str) -> Output {
        // It caches what the server offers, for all calls in a lab.
        let home = self.dir.join("home");
        fs::create_dir_all(&home).expect("the lab's directory can be written");
        let (kubeconfig, words) = (self.kubeconfig(user), [&["kubectl"], arguments].concat());
        let environment = [("KUBECONFIG", utf8(&kubeconfig)), ("HOME", utf8(&home))];
        self.host.netns.exec_input(&words, &environment, input)
    }
}
