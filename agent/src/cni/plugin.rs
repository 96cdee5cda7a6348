//! The chained CNI plugin: a runtime starts it after the plugins that make a pod's network, and it lets the pod
//! start when the node's agent has programmed it. What it prints and returns is the CNI specification's
//! (containernetworking/cni, SPEC.md), versions 0.3.0 to 1.1.0.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Attachment;
use super::attachment::{Arguments, CniResult, INTERFACE};
use super::door::{Answer, Question};

/// What the plugin is called in a node's directory of plugins, and as `type` in a configuration.
pub const NAME: &str = "outgate-cni";

/// CNI versions that it speaks: those with plugins in a chain.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// How long a pod may wait unless the configuration says otherwise, in seconds.
const WAIT: u64 = 10;
/// The agent says itself what it waited for in vain; this much later nothing comes any more.
const MARGIN: Duration = Duration::from_secs(2);
/// How long what need not be answered may take.
const SHORT: Duration = Duration::from_secs(1);

/// The specification's error codes, "Error".
mod code {
    pub(super) const INCOMPATIBLE_VERSION: u16 = 1;
    pub(super) const INVALID_ENVIRONMENT: u16 = 4;
    pub(super) const IO: u16 = 5;
    pub(super) const DECODING: u16 = 6;
    pub(super) const INVALID_CONFIGURATION: u16 = 7;
    pub(super) const TRY_AGAIN_LATER: u16 = 11;
    /// Of STATUS: cannot service ADD requests.
    pub(super) const NOT_AVAILABLE: u16 = 50;
}

/// What went wrong, as the runtime is told.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}: {details}")]
pub struct Failure {
    /// The configuration's version.
    pub version: String,
    /// The specification's code.
    pub code: u16,
    /// What.
    pub message: String,
    /// What to do.
    pub details: String,
}

impl Failure {
    /// The error as the specification prints it.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({"cniVersion": self.version, "code": self.code, "msg": self.message, "details": self.details})
    }
}

/// The network configuration, as far as it is read here.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct NetConf {
    cni_version: String,
    prev_result: Option<Value>,
    socket: Option<PathBuf>,
    timeout_seconds: Option<u64>,
}

/// What a runtime gives a plugin, beside its standard input.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub command: String,
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_ARGS`.
    pub arguments: String,
}

impl Environment {
    /// The process's own.
    #[must_use]
    pub fn of_process() -> Self {
        let get = |name: &str| std::env::var(name).unwrap_or_default();
        Self {
            command: get("CNI_COMMAND"),
            container: get("CNI_CONTAINERID"),
            interface: get("CNI_IFNAME"),
            arguments: get("CNI_ARGS"),
        }
    }
}

/// Does what the runtime commands. `socket`: the agent's, unless the configuration names another.
pub fn run(
    environment: &Environment,
    mut input: impl Read,
    out: &mut impl Write,
    socket: &Path,
) -> Result<(), Failure> {
    let mut text = String::new();
    let read = input.read_to_string(&mut text);
    let parsed: Result<NetConf, _> = serde_json::from_str(&text);
    let conf = parsed.as_ref().ok();
    let version = conf.map(|c| c.cni_version.clone()).filter(|v| !v.is_empty());
    let failure = |code: u16, message: String, details: &str| Failure {
        version: version.clone().unwrap_or_else(|| "1.0.0".to_owned()),
        code,
        message,
        details: details.to_owned(),
    };
    let mut print = |value: &Value| {
        writeln!(out, "{value}")
            .map_err(|e| failure(code::IO, format!("cannot print the result: {e}"), "try again"))
    };
    let socket = conf.and_then(|c| c.socket.as_deref()).unwrap_or(socket);
    match &*environment.command {
        "VERSION" => {
            let version = version.as_deref().unwrap_or(VERSIONS[VERSIONS.len() - 1]);
            return print(&json!({"cniVersion": version, "supportedVersions": VERSIONS}));
        }
        // What cannot be said to the agent it finds out itself. "Plugins should generally complete a DEL action
        // without error even if some resources are missing" (SPEC.md, DEL).
        "DEL" => {
            let _ = ask(socket, &Question::Del { container: environment.container.clone() }, SHORT);
            return Ok(());
        }
        _ => {}
    }
    read.map_err(|e| {
        failure(code::IO, format!("cannot read the configuration: {e}"), "it comes on standard input")
    })?;
    let conf = parsed.as_ref().map_err(|e| {
        failure(code::DECODING, format!("the configuration is not understood: {e}"), "it must be JSON")
    })?;
    if !VERSIONS.contains(&&*conf.cni_version) {
        let message = format!("cniVersion {:?} is not one of {}", conf.cni_version, VERSIONS.join(", "));
        return Err(failure(code::INCOMPATIBLE_VERSION, message, "set it in the network's configuration"));
    }
    let seconds = conf.timeout_seconds.unwrap_or(WAIT);
    let no_agent =
        |error: &std::io::Error| format!("Outgate's agent does not answer at {}: {error}", socket.display());
    let wait = match &*environment.command {
        "ADD" | "CHECK" => Duration::from_secs(seconds),
        "GC" => return Ok(()),
        "STATUS" => {
            const LOOK: &str = "look at the log of the node's outgate-agent";
            let answer = ask(socket, &Question::Status, SHORT);
            let answer = answer.map_err(|error| failure(code::NOT_AVAILABLE, no_agent(&error), LOOK))?;
            let ready = answer.ok.then_some(());
            return ready.ok_or_else(|| failure(code::NOT_AVAILABLE, answer.message, LOOK));
        }
        other => {
            let message = format!("CNI_COMMAND is {other:?}");
            return Err(failure(
                code::INVALID_ENVIRONMENT,
                message,
                "a container runtime starts this program",
            ));
        }
    };
    let add = environment.command == "ADD";
    let result = conf.prev_result.as_ref().ok_or_else(|| {
        let message = "there is no prevResult".to_owned();
        failure(
            code::INVALID_CONFIGURATION,
            message,
            "the plugin comes after one that makes the pod's network",
        )
    })?;
    if let Some(attachment) = attachment(environment, result).map_err(|message| {
        failure(
            code::INVALID_CONFIGURATION,
            format!("prevResult: {message}"),
            "is the plugin before this one in order?",
        )
    })? {
        let pod = format!("pod {}/{}", attachment.namespace, attachment.name);
        let timeout_milliseconds = seconds.saturating_mul(1000);
        let question = if add {
            Question::Add { attachment, timeout_milliseconds }
        } else {
            Question::Check { attachment, timeout_milliseconds }
        };
        let answer = ask(socket, &question, wait + MARGIN).map_err(|error| {
            let details = "pods of this node wait for it, so that none leaves with an address that is not its egress IP; look \
                           at the node's outgate-agent, or take outgate-cni out of the CNI configuration";
            failure(code::TRY_AGAIN_LATER, no_agent(&error), details)
        })?;
        if !answer.ok {
            let message = format!("{pod} is not programmed after {seconds} s: {}", answer.message);
            let details =
                "it is tried again; if that does not help, look at the log of the node's outgate-agent";
            return Err(failure(code::TRY_AGAIN_LATER, message, details));
        }
    }
    if add { print(result) } else { Ok(()) }
}

/// The pod's sandbox, if it is one of a pod of Kubernetes and this is its first interface. Others are no business
/// of Outgate's.
fn attachment(environment: &Environment, result: &Value) -> Result<Option<Attachment>, String> {
    let arguments = Arguments::parse(&environment.arguments);
    let Some((namespace, name, uid)) = arguments.pod().filter(|_| environment.interface == INTERFACE) else {
        return Ok(None);
    };
    let result: CniResult = serde_json::from_value(result.clone()).map_err(|error| error.to_string())?;
    let addresses = result.addresses().map_err(|error| error.to_string())?;
    Ok(Some(Attachment {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: uid.to_owned(),
        container: environment.container.clone(),
        addresses,
        interfaces: result.host_interfaces(),
        written: SystemTime::UNIX_EPOCH,
    })
    .filter(|a| !a.addresses.is_empty()))
}

/// Asks the agent, and waits no longer than `limit` for each step.
pub(super) fn ask(socket: &Path, question: &Question, limit: Duration) -> std::io::Result<Answer> {
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&fd, Timeout::Recv, Some(limit))?;
    // Also of `connect`: where an agent hangs, its queue is full (`unix_stream_connect`, net/unix/af_unix.c, waits
    // for `sock_sndtimeo`).
    set_socket_timeout(&fd, Timeout::Send, Some(limit))?;
    connect(&fd, &SocketAddrUnix::new(socket)?)?;
    let mut stream = UnixStream::from(fd);
    let mut line = serde_json::to_string(question)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    if answer.is_empty() {
        return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "it hung up"));
    }
    Ok(serde_json::from_str(&answer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOWHERE: &str = "/nonexistent/cni.sock";
    const POD: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u";
    const CONF: &str = r#"{"cniVersion": "1.0.0", "name": "lab", "type": "outgate-cni", "prevResult": {"cniVersion": "1.0.0",
        "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
        "ips": [{"address": "10.244.1.2/24", "interface": 1}], "dns": {}, "unknown": [1]}}"#;

    fn call(command: &str, conf: &str) -> Result<String, Failure> {
        call_as(command, conf, "eth0", POD)
    }

    fn call_as(command: &str, conf: &str, interface: &str, arguments: &str) -> Result<String, Failure> {
        let environment = Environment {
            command: command.into(),
            container: "c1".into(),
            interface: interface.into(),
            arguments: arguments.into(),
        };
        let mut out = Vec::new();
        run(&environment, conf.as_bytes(), &mut out, Path::new(NOWHERE))?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn without_an_agent_no_pod_starts_and_every_pod_ends() {
        for command in ["ADD", "CHECK"] {
            let error = call(command, CONF).unwrap_err();
            assert_eq!((error.code, &*error.version), (11, "1.0.0"));
            assert!(error.message.contains(NOWHERE) && error.details.contains("outgate-agent"), "{error}");
        }
        let status = call("STATUS", &CONF.replace("1.0.0", "1.1.0")).unwrap_err();
        assert_eq!((status.code, &*status.version), (50, "1.1.0"));
        for conf in [CONF, "", "{", r#"{"cniVersion": "9"}"#] {
            assert_eq!(call("DEL", conf), Ok(String::new()), "{conf}");
        }
        assert_eq!(call("GC", CONF), Ok(String::new()));
    }

    #[test]
    fn versions_are_told() {
        let text = call("VERSION", r#"{"cniVersion": "0.4.0"}"#).unwrap();
        let version: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(version, json!({"cniVersion": "0.4.0", "supportedVersions": VERSIONS}));
        assert!(call("VERSION", "").unwrap().contains("1.1.0"));
    }

    #[test]
    fn what_is_no_pods_first_interface_is_let_go() {
        let wanted: Value = serde_json::from_str::<Value>(CONF).unwrap()["prevResult"].clone();
        let none = CONF.replace("10.244.1.2/24\", \"interface\": 1", "10.244.1.2/24\", \"interface\": 0");
        for (conf, interface, arguments) in
            [(CONF, "net1", POD), (CONF, "eth0", "IgnoreUnknown=1"), (&none, "eth0", POD)]
        {
            let text = call_as("ADD", conf, interface, arguments).unwrap();
            let printed: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(printed["unknown"], wanted["unknown"], "unchanged");
        }
    }

    #[test]
    fn wrong_usage_is_named() {
        for (command, conf, code, part) in [
            ("ADD", "{", 6, "not understood"),
            ("ADD", "{}", 1, "cniVersion"),
            ("ADD", r#"{"cniVersion": "0.2.0"}"#, 1, "0.3.0"),
            ("ADD", r#"{"cniVersion": "1.0.0"}"#, 7, "prevResult"),
            ("ADD", r#"{"cniVersion": "1.0.0", "prevResult": {}}"#, 7, "no \"ips\""),
            ("", CONF, 4, "CNI_COMMAND"),
        ] {
            let error = call(command, conf).unwrap_err();
            assert_eq!(error.code, code, "{error}");
            assert!(error.message.contains(part), "{error}");
            assert_eq!(error.json()["msg"], error.message);
        }
    }
}
