//! `OpenShift` 3.11's objects to today's: EgressNetworkPolicy, NetNamespace and HostSubnet (`network.openshift.io/v1`,
//! in older manifests `v1`) to EgressFirewall, EgressIP and node labels.

mod value;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Write};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;
use serde_json::json;

use crate::addresses;
use crate::firewall::check::Spec;
use crate::objects::{EGRESS_ASSIGNABLE, Meta, NAMESPACE_NAME, OVN_API};
use crate::watch::dir::{split_json, split_yaml};
use value::{Located, Value};

/// A file to convert.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Input {
    /// Its name, for messages.
    pub name: String,
    /// What stands in it: YAML documents, or JSON.
    pub text: String,
}

/// What files were converted to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Conversion {
    /// Nodes that may hold egress IPs.
    nodes: Vec<String>,
    /// Whether automatic egress IPs were in use.
    automatic: bool,
    /// New objects, in the order of the old ones.
    objects: Vec<Converted>,
    /// What the reader should know, in the order of the files.
    pub messages: Vec<Message>,
}

/// A new object.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Converted {
    /// What it was, and where.
    origin: String,
    yaml: String,
}

/// Something to tell.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// The file.
    pub file: String,
    /// The line in it, counted from 1.
    pub line: usize,
    /// What.
    pub text: String,
    /// Whether something could not be converted. If not, it is converted and works a little differently.
    pub failed: bool,
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.failed { "not converted" } else { "note" };
        write!(f, "{}:{}: {kind}: {}", self.file, self.line, self.text)
    }
}

impl Conversion {
    /// How many times something could not be converted.
    #[must_use]
    pub fn failures(&self) -> usize {
        self.messages.iter().filter(|message| message.failed).count()
    }

    /// Writes the new objects as YAML. Nodes are labelled by commands, in comments: an object with nothing but a
    /// label would take the others away.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for node in &self.nodes {
            writeln!(out, "# kubectl label node {node} {EGRESS_ASSIGNABLE}=")?;
        }
        if self.automatic {
            writeln!(out, "# Egress IPs are not moved back when a node returns: they stay where they are.")?;
        }
        for object in &self.objects {
            writeln!(out, "---\n# {}\n{}", object.origin, object.yaml.trim_end())?;
        }
        Ok(())
    }
}

/// One of the old objects.
struct Old<'a> {
    file: &'a str,
    object: Located,
}

impl Old<'_> {
    fn origin(&self, kind: &str, name: &str) -> String {
        format!("{kind} {name} ({}:{})", self.file, self.object.line)
    }

    fn name(&self) -> &str {
        self.object.get("metadata").and_then(|meta| meta.text("name")).unwrap_or_default()
    }

    fn namespace(&self) -> &str {
        self.object.get("metadata").and_then(|meta| meta.text("namespace")).unwrap_or_default()
    }

    /// A NetNamespace's project: its name, as `netname` says too.
    fn project(&self) -> &str {
        self.object.text("netname").unwrap_or_else(|| self.name())
    }

    /// A HostSubnet's node: its name, as `host` says too.
    fn node(&self) -> &str {
        self.object.text("host").unwrap_or_else(|| self.name())
    }

    /// The network id of a NetNamespace: projects with the same one are joined, 0 is the global one.
    fn netid(&self) -> Option<&str> {
        self.object.text("netid")
    }
}

#[derive(Default)]
struct Converter<'a> {
    policies: Vec<Old<'a>>,
    projects: Vec<Old<'a>>,
    hosts: Vec<Old<'a>>,
    done: Conversion,
}

/// Converts the objects of some files.
#[must_use]
pub fn convert(inputs: &[Input]) -> Conversion {
    let mut converter = Converter::default();
    for input in inputs {
        converter.read(input);
    }
    converter.hosts();
    converter.projects();
    converter.policies();
    let mut done = converter.done;
    let place = |m: &Message| (inputs.iter().position(|input| input.name == m.file), m.line);
    done.messages.sort_by_key(place);
    done
}

impl<'a> Converter<'a> {
    fn message(&mut self, failed: bool, file: &str, line: usize, text: impl Into<String>) {
        self.done.messages.push(Message { file: file.to_owned(), line, text: text.into(), failed });
    }

    fn fail(&mut self, file: &str, line: usize, text: impl Into<String>) {
        self.message(true, file, line, text);
    }

    fn note(&mut self, file: &str, line: usize, text: impl Into<String>) {
        self.message(false, file, line, text);
    }

    fn read(&mut self, input: &'a Input) {
        let file = input.name.as_str();
        // YAML 1.2 is meant to contain JSON, but for the tabs before it (YAML 1.2, 6.1); no JSON string has one as it is.
        let json = input.text.trim_start().starts_with('{');
        let text = if json { input.text.replace('\t', " ") } else { input.text.clone() };
        let parts = if json { split_json(&text) } else { Ok(split_yaml(&text)) };
        let parts = match parts {
            Ok(parts) => parts,
            Err(error) => return self.fail(file, 1, error),
        };
        for (first, part) in parts {
            match serde_saphyr::from_str::<Located>(part) {
                Ok(object) => self.sort(file, object.moved(first), None),
                Err(error) => {
                    let line = error.location().map_or(1, |at| usize::try_from(at.line()).unwrap_or(1));
                    let error = error.without_snippet().to_string();
                    self.fail(file, first + line.max(1) - 1, format!("not YAML or JSON: {error}"));
                }
            }
        }
    }

    /// Puts an object to its kind; `list` is the kind that a list without kinds of its own is of.
    fn sort(&mut self, file: &'a str, object: Located, list: Option<&str>) {
        let Some(kind) = object.text("kind").or(list).map(str::to_owned) else {
            return self.fail(file, object.line, "no kind: this is not a Kubernetes object");
        };
        let api = object.text("apiVersion").unwrap_or(if list.is_some() { "v1" } else { "" }).to_owned();
        if let Some(of) = kind.strip_suffix("List") {
            let items = match object.list("items") {
                Ok(items) => items.to_vec(),
                Err((line, text)) => return self.fail(file, line, text),
            };
            return items.into_iter().for_each(|item| self.sort(file, item, (!of.is_empty()).then_some(of)));
        }
        let line = object.line;
        let old = Old { file, object };
        match (api.as_str(), kind.as_str()) {
            ("v1" | "network.openshift.io/v1", "EgressNetworkPolicy") => self.policies.push(old),
            ("v1" | "network.openshift.io/v1", "NetNamespace") => self.projects.push(old),
            ("v1" | "network.openshift.io/v1", "HostSubnet") => self.hosts.push(old),
            (_, "EgressNetworkPolicy" | "NetNamespace" | "HostSubnet") => {
                self.fail(
                    file,
                    line,
                    format!("{kind} of apiVersion {api:?}: known is network.openshift.io/v1"),
                );
            }
            _ => self.note(
                file,
                line,
                format!("{kind} is left out: converted are EgressNetworkPolicy, NetNamespace and HostSubnet"),
            ),
        }
    }

    /// Nodes that host addresses get the label.
    fn hosts(&mut self) {
        for old in std::mem::take(&mut self.hosts) {
            let (line, node) = (old.object.line, old.node().to_owned());
            let lists = (old.object.list("egressIPs"), old.object.list("egressCIDRs"));
            let (addresses, networks) = match lists {
                (Ok(addresses), Ok(networks)) => (addresses, networks),
                (Err((line, text)), _) | (_, Err((line, text))) => {
                    self.fail(old.file, line, format!("HostSubnet {node}: {text}"));
                    continue;
                }
            };
            if node.is_empty() {
                self.fail(old.file, line, "a HostSubnet without a name");
            } else if (!addresses.is_empty() || !networks.is_empty()) && !self.done.nodes.contains(&node) {
                if self.done.nodes.is_empty() {
                    let text = "labelled nodes hold addresses of the networks of their interfaces; which of them holds \
                                which is chosen for them";
                    self.note(old.file, line, text);
                }
                self.done.nodes.push(node.clone());
            }
            if !networks.is_empty() && !self.done.automatic {
                self.done.automatic = true;
                let text =
                    "egressCIDRs: egress IPs were moved back to balance when a node returned; now they stay";
                self.note(old.file, line, text);
            }
            self.hosts.push(old);
        }
    }

    /// One EgressIP for each project with addresses.
    fn projects(&mut self) {
        let hosted = Hosted::new(&self.hosts);
        let mut seen = BTreeMap::<IpAddr, String>::new();
        let mut made = BTreeMap::<String, String>::new();
        let projects = std::mem::take(&mut self.projects);
        for old in &projects {
            let (file, line, project) = (old.file, old.object.line, old.project().to_owned());
            let listed = match old.object.list("egressIPs") {
                Ok(listed) => listed,
                Err((line, text)) => {
                    self.fail(file, line, format!("NetNamespace {project}: {text}"));
                    continue;
                }
            };
            if listed.is_empty() {
                continue; // every project has a NetNamespace
            }
            if project.is_empty() {
                self.fail(file, line, "a NetNamespace without a name");
                continue;
            }
            let origin = old.origin("NetNamespace", &project);
            if let Some(first) = made.get(&project) {
                self.fail(file, line, format!("{origin}: the project has one already, {first}"));
                continue;
            }
            let mut addresses = Vec::new();
            for entry in listed {
                let text = entry.as_text().unwrap_or_default();
                let problem = match addresses::address(text) {
                    Err(error) => Some(format!("{text:?} {error}")),
                    Ok(ip) if addresses.contains(&ip) => Some(format!("{ip} stands there twice")),
                    Ok(ip) => {
                        addresses.push(ip);
                        None
                    }
                };
                if let Some(problem) = problem {
                    self.fail(file, entry.line, format!("NetNamespace {project}: egressIPs: {problem}"));
                    continue;
                }
                let Some(ip) = addresses.last().copied() else { continue };
                if let Some(other) = seen.get(&ip) {
                    let text = format!(
                        "NetNamespace {project}: egress IP {ip} is {other}'s too; one object can have it"
                    );
                    self.fail(file, entry.line, text);
                } else if !hosted.is_by(&ip) {
                    let text = format!(
                        "NetNamespace {project}: no HostSubnet hosts {ip}, so the project's traffic was dropped; a \
                         labelled node in its network will hold it"
                    );
                    self.note(file, entry.line, text);
                }
                seen.entry(ip).or_insert_with(|| origin.clone());
            }
            if addresses.is_empty() {
                continue;
            }
            if addresses.len() > 1 {
                let text = format!(
                    "NetNamespace {project}: pods were given the first address whose node was alive; they are spread \
                     over all of them, each pod with one"
                );
                self.note(file, line, text);
            }
            let spec = EgressIpSpec {
                egress_ips: addresses,
                namespace_selector: Selector {
                    match_labels: [(NAMESPACE_NAME.to_owned(), project.clone())].into(),
                },
            };
            made.insert(project.clone(), origin.clone());
            self.object(file, line, origin, "EgressIP", &Name { name: &project, namespace: "" }, &spec);
        }
        self.projects = projects;
        for ip in hosted.addresses.keys().filter(|ip| !seen.contains_key(ip)) {
            if let Some((file, line)) = hosted.addresses.get(ip) {
                self.note(file, *line, format!("no NetNamespace has egress IP {ip}"));
            }
        }
    }

    /// One EgressFirewall for each project with a policy.
    fn policies(&mut self) {
        let policies = std::mem::take(&mut self.policies);
        for old in &policies {
            let (file, line) = (old.file, old.object.line);
            let (name, namespace) = (old.name(), old.namespace());
            let shown = if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") };
            let what = format!("EgressNetworkPolicy {shown}");
            if let Some(why) = self.without_effect(old, &policies) {
                self.fail(file, line, format!("{what}: {why}"));
                continue;
            }
            let Some(rules) = self.rules(old, &what) else { continue };
            let denies = rules.iter().any(|rule| rule.kind == "Deny" && rule.to.cidr_selector.is_some());
            let name = Name { name: "default", namespace };
            let origin = old.origin("EgressNetworkPolicy", &shown);
            if self.object(file, line, origin, "EgressFirewall", &name, &EgressFirewallSpec { egress: rules })
                && denies
            {
                let text = format!(
                    "{what}: it was for destinations outside the cluster only; an EgressFirewall is for the nodes too, \
                     and so for an API server that runs on them: put a rule that allows them first if Deny covers them"
                );
                self.note(file, line, text);
            }
        }
    }

    /// Why a policy was refused, or not in force, where it comes from.
    fn without_effect(&self, old: &Old<'_>, policies: &[Old<'_>]) -> Option<String> {
        let namespace = old.namespace();
        if policies.iter().filter(|other| other.namespace() == namespace).count() > 1 {
            let whose = if namespace.is_empty() { "without a namespace" } else { "of its project" };
            return Some(format!("it is not the only one {whose}: which rules are meant is not known"));
        }
        if namespace == "default" {
            return Some("the project `default` could not have one".to_owned());
        }
        let project = self.projects.iter().find(|project| project.project() == namespace);
        let netid = project.and_then(Old::netid)?;
        if netid == "0" {
            return Some("global projects (netid 0) could not have one".to_owned());
        }
        let joined = |other: &&Old<'_>| other.project() != namespace && other.netid() == Some(netid);
        let other = self.projects.iter().find(joined)?;
        Some(format!("its project is joined with {}, and then its rules were not in force", other.project()))
    }

    /// A policy's rules; nothing if one of them is wrong: without it the others would mean something else.
    fn rules(&mut self, old: &Old<'_>, what: &str) -> Option<Vec<Rule>> {
        let file = old.file;
        let listed = match old.object.get("spec").map(|spec| spec.list("egress")) {
            None => Ok(&[][..]),
            Some(listed) => listed,
        };
        let listed = match listed {
            Ok(listed) => listed,
            Err((line, text)) => {
                self.fail(file, line, format!("{what}: spec.{text}"));
                return None;
            }
        };
        let mut rules = Vec::new();
        let before = self.done.failures();
        for (index, entry) in listed.iter().enumerate() {
            let field = format!("spec.egress[{index}]");
            if let Some((line, name)) = unknown_field(entry) {
                self.fail(
                    file,
                    line,
                    format!("{what}: {field}: {name} is no field of an EgressNetworkPolicy"),
                );
                continue;
            }
            let to = |name: &str| entry.get("to").and_then(|to| to.text(name)).map(str::to_owned);
            let mut rule = Rule {
                kind: entry.text("type").unwrap_or_default().to_owned(),
                to: To { cidr_selector: to("cidrSelector"), dns_name: to("dnsName") },
            };
            if rule.to.cidr_selector.as_deref() == Some("0.0.0.0/32") {
                rule.to.cidr_selector = Some("0.0.0.0/0".to_owned());
                self.note(file, entry.line, format!("{what}: {field}: 0.0.0.0/32 was taken for 0.0.0.0/0"));
            }
            // The agent's own check, of this rule alone.
            let checked =
                Spec::check(&json!({"egress": [rule]})).firewall(&Meta::default(), &BTreeMap::new());
            if let Err(mistakes) = checked.rules {
                let mistakes = mistakes.replace("spec.egress[0]", &field);
                self.fail(file, entry.line, format!("{what}: {mistakes}"));
            }
            rules.push(rule);
        }
        (self.done.failures() == before).then_some(rules)
    }

    /// Adds an object; whether that worked.
    fn object(
        &mut self,
        file: &str,
        line: usize,
        origin: String,
        kind: &'static str,
        metadata: &Name<'_>,
        spec: &impl Serialize,
    ) -> bool {
        match serde_saphyr::to_string(&Object { api_version: OVN_API, kind, metadata, spec }) {
            Ok(yaml) => self.done.objects.push(Converted { origin, yaml }),
            Err(error) => {
                self.fail(file, line, format!("{origin}: cannot be written as YAML: {error}"));
                return false;
            }
        }
        true
    }
}

/// The first field of a rule that is none, and its line.
fn unknown_field(rule: &Located) -> Option<(usize, String)> {
    let unknown = |of: &Located, known: &[&str]| {
        let Value::Map(fields) = &of.value else { return None };
        let found = fields.iter().find(|(name, _)| !known.contains(&name.as_str()));
        found.map(|(name, field)| (field.line, name.clone()))
    };
    unknown(rule, &["type", "to"])
        .or_else(|| rule.get("to").and_then(|to| unknown(to, &["cidrSelector", "dnsName"])))
}

/// What HostSubnets say that nodes host.
struct Hosted {
    /// Whether there are any.
    any: bool,
    /// Addresses, and where each stands.
    addresses: BTreeMap<IpAddr, (String, usize)>,
    networks: BTreeSet<IpNet>,
}

impl Hosted {
    fn new(hosts: &[Old<'_>]) -> Self {
        let mut hosted =
            Self { any: !hosts.is_empty(), addresses: BTreeMap::new(), networks: BTreeSet::new() };
        for old in hosts {
            for entry in old.object.list("egressIPs").unwrap_or_default() {
                if let Some(Ok(ip)) = entry.as_text().map(addresses::address) {
                    hosted.addresses.entry(ip).or_insert_with(|| (old.file.to_owned(), entry.line));
                }
            }
            let networks = old.object.list("egressCIDRs").unwrap_or_default().iter();
            let networks = networks.filter_map(|entry| entry.as_text());
            hosted.networks.extend(networks.filter_map(|text| addresses::network(text).ok()));
        }
        hosted
    }

    /// Whether some node hosts the address, or might: where no HostSubnet is given nothing is known.
    fn is_by(&self, ip: &IpAddr) -> bool {
        !self.any
            || self.addresses.contains_key(ip)
            || self.networks.iter().any(|network| network.contains(ip))
    }
}

/// A new object as it is written.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Object<'a, S> {
    api_version: &'static str,
    kind: &'static str,
    metadata: &'a Name<'a>,
    spec: &'a S,
}

#[derive(Serialize)]
struct Name<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    namespace: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EgressIpSpec {
    #[serde(rename = "egressIPs")]
    egress_ips: Vec<IpAddr>,
    namespace_selector: Selector,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Selector {
    match_labels: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct EgressFirewallSpec {
    egress: Vec<Rule>,
}

#[derive(Serialize)]
struct Rule {
    #[serde(rename = "type")]
    kind: String,
    to: To,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct To {
    #[serde(skip_serializing_if = "Option::is_none")]
    cidr_selector: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dns_name: Option<String>,
}

#[cfg(test)]
mod tests;
