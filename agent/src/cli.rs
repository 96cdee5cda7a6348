//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::styling::Styles;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::addresses;

/// Where programs, links and maps are pinned unless told otherwise.
const BPFFS: &str = "/sys/fs/bpf/outgate";

/// Outgate: fixed addresses for Kubernetes pods on their way out of the cluster.
#[derive(Parser, Debug)]
#[command(name = "outgate", version, max_term_width = 100, styles = Styles::plain())]
#[command(after_help = "Every option can also be given as an environment variable, as its help says.\n\
    Exit codes: 0 done, 1 failed, 2 wrong usage.")]
#[command(propagate_version = true, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run this node's agent, in the current network namespace
    ///
    /// It loads the eBPF programs, attaches them to the pods' interfaces and the uplinks, and keeps their maps
    /// equal to what the objects ask for. When it ends, everything stays in the kernel and traffic goes on:
    /// `outgate cleanup` removes it.
    Agent(AgentArgs),
    /// Do the leader's work in a Kubernetes cluster: assign egress IPs, lease their ports, write statuses
    ///
    /// Of several controllers one leads, elected by a Lease. In a directory the agents do this themselves.
    Controller(ControllerArgs),
    /// Show egress IPs with their owners and ports, egress firewalls with their state, and nodes
    Status(StatusArgs),
    /// Show this node's flows
    Flows(FlowsArgs),
    /// Show what happens on this node, as it happens: drops, denials of egress firewalls, and flows
    ///
    /// It looks twice a second until it is interrupted. Denials are told by pod, destination and rule, with the
    /// packets since the last look. Without an option, everything.
    Monitor(MonitorArgs),
    /// Explain what would happen to a new connection of a pod of this node
    ///
    /// It runs the code that the kernel runs, on the maps that the kernel uses. What the node's own netfilter
    /// would do in between is not known to it: it takes the packet for let through and not rewritten.
    Trace(TraceArgs),
    /// Check manifests without a cluster, as the API server and the agents would
    ///
    /// It names file, object and field of each mistake. Objects of kinds that outgate does not read are skipped.
    Validate(ValidateArgs),
    /// Remove every program, link, pin and device that outgate has made on this node
    ///
    /// Stop the agent first. Connections through egress IPs end; pods leave by the node's address again.
    Cleanup(CleanupArgs),
    /// Convert OpenShift 3.11's EgressNetworkPolicy, NetNamespace and HostSubnet objects to EgressFirewall and EgressIP
    ///
    /// The new objects go to standard output as YAML, with the nodes' labels as commands in comments. What cannot be
    /// converted, and what works differently now, is told by file and line on standard error; the exit code is 1 if
    /// something could not be converted.
    Convert(ConvertArgs),
    /// Print the custom resource definitions, for `cargo xtask codegen`
    #[command(hide = true)]
    Crds,
    /// Be a chained CNI plugin: let a pod start when this node's agent has programmed it
    ///
    /// A container runtime starts it, by the name outgate-cni and without arguments, and gives it the network's
    /// configuration on standard input. docs/cni.md says how to chain it.
    Cni(CniArgs),
    /// Print the version
    Version,
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Options of `outgate agent`.
#[derive(Args, Debug)]
pub struct AgentArgs {
    /// Name of this node's Node object
    #[arg(long, env = "OUTGATE_NODE", value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub node: String,
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub source: SourceArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub adopt: AdoptArg,
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub bpffs: BpffsArg,
    /// Interface that leads out of the node; may be given several times [default: every interface with a route
    /// by a gateway that is not pod-facing]
    #[arg(long = "uplink", env = "OUTGATE_UPLINK", value_name = "IFACE", value_delimiter = ',')]
    pub uplinks: Vec<String>,
    /// Pattern of the names of interfaces that lead to pods; may be given several times
    #[arg(
        long = "pod-interface",
        env = "OUTGATE_POD_INTERFACE",
        value_name = "GLOB",
        value_delimiter = ',',
        default_values = ["veth*", "cali*", "lxc*", "cni*", "tap*"]
    )]
    pub pod_interfaces: Vec<String>,
    /// Cgroup (version 2) of the node's pods, where pods that are not known yet are held, also while no agent
    /// runs [default: kubepods.slice or kubepods, if there is one]
    #[arg(long, env = "OUTGATE_POD_CGROUP", value_name = "PATH")]
    pub pod_cgroup: Option<PathBuf>,
    /// The resolv.conf that the node's pods may have been given: names of egress firewalls are learnt from answers of
    /// its nameservers too
    #[arg(long, env = "OUTGATE_RESOLV_CONF", value_name = "FILE", default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// libcni's cache of results on this node, by which new pods are known before the API has their addresses
    #[arg(long, env = "OUTGATE_CNI_RESULTS", value_name = "DIR", default_value = crate::cni::cache::RESULTS)]
    pub cni_results: PathBuf,
    /// Serve the chained CNI plugin at this socket [default: /run/outgate/cni.sock, if it can be made]
    #[arg(long, env = "OUTGATE_CNI_SOCKET", value_name = "PATH")]
    pub cni_socket: Option<PathBuf>,
    /// Serve /metrics, /healthz and /readyz on this address
    #[arg(long, env = "OUTGATE_METRICS", value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
    /// What to log: error, warn, info, debug or trace, also by module (as in info,outgate=debug)
    #[arg(long, env = "OUTGATE_LOG", value_name = "FILTER", default_value = "info", value_parser = filter)]
    pub log: String,
}

/// Options of `outgate cni`.
#[derive(Args, Debug)]
pub struct CniArgs {
    /// Where the node's agent serves it; `socket` in the network's configuration overrides it
    #[arg(long, env = "OUTGATE_CNI_SOCKET", value_name = "PATH", default_value = crate::cni::door::SOCKET)]
    pub cni_socket: PathBuf,
    /// Copy this program to DIR/outgate-cni, where the node's container runtime has its plugins, and end
    #[arg(long, env = "OUTGATE_INSTALL", value_name = "DIR")]
    pub install: Option<PathBuf>,
}

/// Options of `outgate controller`.
#[derive(Args, Debug)]
pub struct ControllerArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub source: SourceArgs,
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub adopt: AdoptArg,
    /// Serve /metrics, /healthz and /readyz on this address
    #[arg(long, env = "OUTGATE_METRICS", value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
    /// What to log: error, warn, info, debug or trace, also by module (as in info,outgate=debug)
    #[arg(long, env = "OUTGATE_LOG", value_name = "FILTER", default_value = "info", value_parser = filter)]
    pub log: String,
}

/// Where objects come from, for several commands.
#[derive(Args, Debug)]
pub struct SourceArgs {
    /// Where the objects come from: kube, the Kubernetes API, or dir:PATH, a directory of Kubernetes YAML and JSON
    #[arg(long, env = "OUTGATE_SOURCE", value_name = "kube|dir:PATH")]
    pub source: SourceArg,
    /// With --source kube: the file that says where the API server is and as whom to speak to it [default: KUBECONFIG,
    /// else the pod's ServiceAccount]
    #[arg(long, env = "OUTGATE_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// With --source kube: the namespace of outgate's own Leases
    #[arg(long, env = "OUTGATE_NAMESPACE", value_name = "NAMESPACE", default_value = "outgate-system")]
    pub namespace: String,
}

/// The option of those who refuse a cluster that another serves.
#[derive(Args, Debug)]
pub struct AdoptArg {
    /// With --source kube: work in a cluster whose nodes OVN-Kubernetes runs, which serves EgressIP itself
    #[arg(long, env = "OUTGATE_ADOPT")]
    pub adopt: bool,
}

/// The option that several commands share.
#[derive(Args, Debug)]
pub struct BpffsArg {
    /// Directory on a bpf file system where programs, links and maps are pinned
    #[arg(long, env = "OUTGATE_BPFFS", value_name = "DIR", default_value = BPFFS)]
    pub bpffs: PathBuf,
}

/// Options of `outgate status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub source: SourceArgs,
    /// How to print
    #[arg(long, short, env = "OUTGATE_OUTPUT", value_enum, default_value_t)]
    pub output: Output,
}

/// Options of `outgate flows`.
#[derive(Args, Debug)]
pub struct FlowsArgs {
    /// Only flows of this pod
    #[arg(long, env = "OUTGATE_POD", value_name = "NS/NAME")]
    pub pod: Option<PodArg>,
    /// Only flows that leave by this egress IP
    #[arg(long, env = "OUTGATE_EGRESS_IP", value_name = "IP")]
    pub egress_ip: Option<IpAddr>,
    /// Print again every second until interrupted
    #[arg(long, short, env = "OUTGATE_WATCH")]
    pub watch: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub bpffs: BpffsArg,
    /// How to print
    #[arg(long, short, env = "OUTGATE_OUTPUT", value_enum, default_value_t)]
    pub output: Output,
}

/// Options of `outgate monitor`.
#[derive(Args, Debug)]
pub struct MonitorArgs {
    /// Packets that are dropped, and what egress firewalls deny
    #[arg(long, env = "OUTGATE_DROPS")]
    pub drops: bool,
    /// Flows that begin and end
    #[arg(long, env = "OUTGATE_FLOWS")]
    pub flows: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub bpffs: BpffsArg,
    /// How to print: JSON is a line each, YAML a document each
    #[arg(long, short, env = "OUTGATE_OUTPUT", value_enum, default_value_t)]
    pub output: Output,
}

/// Options of `outgate trace`.
#[derive(Args, Debug)]
pub struct TraceArgs {
    /// The pod
    #[arg(value_name = "NS/POD")]
    pub pod: PodArg,
    /// Address and port it connects to; the port is 80 unless given
    #[arg(value_name = "DEST[:PORT]")]
    pub destination: DestinationArg,
    /// Protocol of the connection
    #[arg(long, env = "OUTGATE_PROTOCOL", value_enum, default_value_t)]
    pub protocol: Protocol,
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub bpffs: BpffsArg,
    /// How to print
    #[arg(long, short, env = "OUTGATE_OUTPUT", value_enum, default_value_t)]
    pub output: Output,
}

/// A destination: an address, or an address and a port; IPv6 with a port in brackets (RFC 3986, 3.2.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DestinationArg {
    /// The address.
    pub ip: IpAddr,
    /// The port; 80 if none was given.
    pub port: u16,
}

impl std::str::FromStr for DestinationArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str =
            "expected an address, or ADDRESS:PORT such as 203.0.113.10:443 or [2001:db8::10]:443";
        let bracketed = text.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        let (host, port) = match bracketed {
            Some((host, rest)) if host.contains(':') => (host, rest),
            Some(_) => return Err(EXPECTED.to_owned()),
            // Colons without brackets are all the address's, if there are several.
            None => match text.find(':') {
                Some(at) if text.matches(':').count() == 1 => text.split_at(at),
                _ => (text, ""),
            },
        };
        let ip = addresses::address(host).map_err(|error| match error {
            addresses::Error::NotAnAddress | addresses::Error::NotANetwork => EXPECTED.to_owned(),
            addresses::Error::Mapped | addresses::Error::Zone => format!("{host:?} {error}"),
        })?;
        let port = match port.strip_prefix(':') {
            None if port.is_empty() => 80,
            // Digits only: `parse` would take a sign.
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                digits.parse().map_err(|_| format!("{digits:?} is not a port (0 to 65535)"))?
            }
            _ => return Err(EXPECTED.to_owned()),
        };
        Ok(Self { ip, port })
    }
}

/// A protocol that has flows.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Protocol {
    /// TCP
    #[default]
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
    /// ICMP echo
    Icmp,
}

/// Options of `outgate validate`.
#[derive(Args, Debug)]
pub struct ValidateArgs {
    /// Files of Kubernetes YAML or JSON, several documents each; - is standard input
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// How to print
    #[arg(long, short, env = "OUTGATE_OUTPUT", value_enum, default_value_t)]
    pub output: Output,
}

/// Options of `outgate cleanup`.
#[derive(Args, Debug)]
pub struct CleanupArgs {
    /// When done, stay until told to end: a DaemonSet starts a pod that ends again and again
    #[arg(long, env = "OUTGATE_STAY")]
    pub stay: bool,
    /// Where the agent has served the chained CNI plugin: the socket and, if it is empty, a directory of the name outgate
    /// are removed
    #[arg(long, env = "OUTGATE_CNI_SOCKET", value_name = "PATH", default_value = crate::cni::door::SOCKET)]
    pub cni_socket: PathBuf,
    /// Remove the plugin outgate-cni from DIR too, where `outgate cni --install` has put it, unless it is still needed;
    /// may be given several times
    #[arg(long, env = "OUTGATE_CNI_BIN", value_name = "DIR", value_delimiter = ',')]
    pub cni_bin: Vec<PathBuf>,
    /// The node's CNI configuration: what names outgate-cni there needs it
    #[arg(long, env = "OUTGATE_CNI_CONF", value_name = "DIR", default_value = crate::cni::removal::CONFIGURATION)]
    pub cni_conf: PathBuf,
    /// libcni's cache of results on this node: sandboxes that were made with outgate-cni may need it to end
    #[arg(long, env = "OUTGATE_CNI_RESULTS", value_name = "DIR", default_value = crate::cni::cache::RESULTS)]
    pub cni_results: PathBuf,
    #[command(flatten)]
    #[expect(missing_docs, reason = "its help is the options'")]
    pub bpffs: BpffsArg,
}

/// Options of `outgate convert`.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Files with YAML or JSON, as `oc get … -o yaml` prints it; `-` is standard input
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
}

/// How to print.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Output {
    /// Aligned tables
    #[default]
    Table,
    /// JSON
    Json,
    /// YAML
    Yaml,
}

/// Where objects come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceArg {
    /// A directory.
    Dir(PathBuf),
    /// The Kubernetes API.
    Kube,
}

impl FromStr for SourceArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once(':') {
            None if s == "kube" => Ok(Self::Kube),
            Some(("dir", path)) if !path.is_empty() => Ok(Self::Dir(path.into())),
            _ => Err("a source is kube or dir:PATH".to_owned()),
        }
    }
}

/// A pod's namespace and name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodArg {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl FromStr for PodArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err("a pod is NAMESPACE/NAME".to_owned()),
        }
    }
}

fn filter(s: &str) -> Result<String, String> {
    tracing_subscriber::EnvFilter::try_new(s).map(|_| s.to_owned()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;
    use std::path::Path;

    #[test]
    fn the_definition_is_sound_and_every_option_has_help_and_an_environment_variable() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for sub in command.get_subcommands().filter(|s| s.get_name() != "help") {
            assert!(sub.get_about().is_some(), "{}", sub.get_name());
            for arg in sub.get_arguments().filter(|a| !["help", "version"].contains(&a.get_id().as_str())) {
                assert!(arg.get_help().is_some(), "{} {}", sub.get_name(), arg.get_id());
                // What stands by its place is no option.
                let Some(long) = arg.get_long() else { continue };
                let env = arg.get_env().map(|e| e.to_string_lossy().into_owned());
                let wanted = format!("OUTGATE_{}", long.to_uppercase().replace('-', "_"));
                assert_eq!(env.as_deref(), Some(wanted.as_str()));
            }
        }
    }

    #[test]
    fn destinations_of_both_families() {
        let of = |text: &str| text.parse::<DestinationArg>().map(|d| (d.ip.to_string(), d.port));
        for (text, ip, port) in [
            ("203.0.113.9", "203.0.113.9", 80),
            ("203.0.113.9:443", "203.0.113.9", 443),
            ("2001:db8::1", "2001:db8::1", 80),
            ("2001:db8::1:443", "2001:db8::1:443", 80),
            ("[2001:DB8::1]", "2001:db8::1", 80),
            ("[2001:db8::1]:443", "2001:db8::1", 443),
        ] {
            assert_eq!(of(text), Ok((ip.to_owned(), port)), "{text}");
        }
        for (text, part) in [
            ("", "expected"),
            ("example.org", "expected"),
            ("[203.0.113.9]:80", "expected"),
            ("[2001:db8::1", "expected"),
            ("[2001:db8::1]80", "expected"),
            ("[2001:db8::1]:+80", "expected"),
            ("203.0.113.9:", "not a port"),
            ("203.0.113.9:65536", "not a port"),
            ("[fe80::1%eth0]:80", "zone"),
            ("::ffff:203.0.113.9", "IPv6 form"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_documented_command_line() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        let cli = parse("outgate agent --node a --source dir:/x --uplink eth0 --uplink eth1 --pod-interface v* --metrics 127.0.0.1:9090 --log debug").unwrap();
        let Command::Agent(a) = cli.command else { panic!() };
        assert_eq!(a.source.source, SourceArg::Dir("/x".into()));
        assert_eq!((a.uplinks.len(), a.pod_interfaces.len(), a.adopt.adopt), (2, 1, false));
        assert_eq!(a.bpffs.bpffs, Path::new(BPFFS));
        let Command::Controller(c) =
            parse("outgate controller --source kube --kubeconfig /k --adopt").unwrap().command
        else {
            panic!()
        };
        assert_eq!(c.source.source, SourceArg::Kube);
        assert_eq!(c.source.kubeconfig.as_deref(), Some(Path::new("/k")));
        assert_eq!(c.source.namespace, "outgate-system");
        assert!(c.adopt.adopt);
        assert!(parse("outgate agent --node a --source kube --namespace n").is_ok());
        let Command::Flows(f) =
            parse("outgate flows --pod n/p --egress-ip 192.0.2.1 --watch").unwrap().command
        else {
            panic!()
        };
        assert_eq!(f.pod.unwrap().name, "p");
        let Command::Monitor(m) = parse("outgate monitor --drops -o json").unwrap().command else { panic!() };
        assert!(m.drops && !m.flows);
        for wrong in [
            "outgate",
            "outgate agent",
            "outgate agent --node a",
            "outgate agent --node a --source etcd:x",
            "outgate agent --node a --source kube:x",
            "outgate controller",
            "outgate agent --node a --source dir:",
            "outgate agent --node a --source dir:x --log =5=",
            "outgate flows --pod p",
            "outgate flows --egress-ip x",
            "outgate status --source dir:x -o xml",
        ] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{wrong}");
        }
    }
}
