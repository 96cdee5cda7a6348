//! The scene of the tests of CNI: two nodes, an egress IP on the second one, and a server outside that says whom it sees.

use crate::agent::Agent;
use crate::cni::{Cni, Pod, PodSpec};
use crate::command::Process;
use crate::lab::{Lab, LabSpec};
use crate::servers::ECHO;

/// The egress IP of the pods of namespace `prod`.
pub const EGRESS: &str = "172.18.0.101";

/// Two nodes and a server. Fields are dropped in this order.
#[derive(Debug)]
pub struct Scene {
    /// The nodes' agents, node-a's first.
    pub agents: Vec<Agent>,
    _echo: Process,
    /// The server's address and port, as pods dial it.
    pub server: String,
    /// The lab.
    pub lab: Lab,
}

impl Scene {
    /// The scene at work: node-b holds the egress IP.
    #[track_caller]
    #[must_use]
    pub fn new(cni: Cni) -> Self {
        let mut scene = Self::laid_out(cni);
        scene.agents = scene.lab.start_agents();
        assert_eq!(scene.lab.wait_owner(EGRESS), "node-b");
        scene
    }

    /// The same before any agent was there.
    #[track_caller]
    #[must_use]
    pub fn laid_out(cni: Cni) -> Self {
        let lab = Lab::with(&LabSpec::default().nodes(2).cni(cni));
        lab.describe_cluster(&["node-b"]);
        lab.objects.egress_ip("prod", &[EGRESS], &[("env", "prod")], &[]);
        let echo = lab.echo(&lab.web.netns);
        Self { agents: Vec::new(), _echo: echo, server: format!("{}:{ECHO}", lab.web.address), lab }
    }

    /// A selected pod that has its ports: others on its node need not wait for a lease.
    #[track_caller]
    #[must_use]
    pub fn warm(&self, node: &str) -> Pod {
        let pod = self.lab.run_pod(node, &PodSpec::new("prod", &format!("warm-{node}")));
        self.lab.wait_source(&pod.netns, &self.server, EGRESS);
        pod
    }
}
