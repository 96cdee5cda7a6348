//! `outgate validate`: checks manifests without a cluster, as the API server would (the CRDs' schemas and CEL rules), as
//! the agents would, and all files together.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{self, Read as _, Write};
use std::path::Path;

use anyhow::bail;
use serde::Serialize;
use serde_json::Value;

use crate::cli::ValidateArgs;
use crate::crd::Kind;
use crate::crd::check::{Checker, Mistake, UNKNOWN_FIELD};
use crate::firewall;
use crate::model;
use crate::objects::{EgressIp, LabelSelector, Objects};
use crate::print;
use crate::watch::dir::{self, Object, Text};

/// What is found.
#[derive(Serialize, Default)]
struct Report {
    /// Objects that were checked.
    checked: usize,
    /// Objects of kinds that are not read.
    skipped: usize,
    findings: Vec<Finding>,
}

#[derive(Serialize, PartialEq, Eq, PartialOrd, Ord, Clone, Debug)]
struct Finding {
    file: String,
    line: usize,
    /// Kind, namespace and name; empty if it is not known.
    object: String,
    /// The field, if it is about one.
    field: String,
    message: String,
    /// A note is worth knowing and no mistake.
    severity: Severity,
}

#[derive(Serialize, PartialEq, Eq, PartialOrd, Ord, Clone, Copy, Debug)]
enum Severity {
    Mistake,
    Note,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.file, self.line)?;
        if self.severity == Severity::Note {
            f.write_str("note: ")?;
        }
        for part in [&self.object, &self.field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        f.write_str(&self.message)
    }
}

pub(super) fn run(args: &ValidateArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let mut files = Files::default();
    for path in &args.files {
        files.read(path);
    }
    let report = files.finish();
    print::print_into(out, args.output, &report, |out| table(out, &report))?;
    match report.findings.iter().filter(|f| f.severity == Severity::Mistake).count() {
        0 => Ok(()),
        1 => bail!("1 mistake"),
        n => bail!("{n} mistakes"),
    }
}

fn table(out: &mut impl Write, report: &Report) -> io::Result<()> {
    for finding in &report.findings {
        writeln!(out, "{finding}")?;
    }
    let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    write!(out, "{} checked", count(report.checked, "object"))?;
    if report.skipped > 0 {
        write!(out, ", {} of other kinds skipped", report.skipped)?;
    }
    writeln!(out)
}

/// Where an object stands.
#[derive(Clone)]
struct Place {
    file: String,
    line: usize,
}

#[derive(Default)]
struct Files {
    checker: Checker,
    report: Report,
    objects: Objects,
    /// Where each object was first seen, by what it is called.
    places: BTreeMap<String, Place>,
}

impl Files {
    fn read(&mut self, path: &Path) {
        let (file, bytes) = if path == Path::new("-") {
            let mut bytes = Vec::new();
            ("standard input".to_owned(), io::stdin().read_to_end(&mut bytes).map(|_| bytes))
        } else {
            (path.display().to_string(), fs::read(path))
        };
        let text = bytes
            .map_err(|error| format!("cannot be read: {error}"))
            .and_then(|bytes| String::from_utf8(bytes).map_err(|_| "is not UTF-8 text".to_owned()));
        match text {
            Ok(text) => self.text(&file, text.trim_start_matches('\u{feff}')),
            Err(message) => self.wrong(&Place { file, line: 1 }, "", "", message),
        }
    }

    fn text(&mut self, file: &str, text: &str) {
        let place = |line| Place { file: file.to_owned(), line };
        // JSON is YAML too, but for a text of several values.
        let json = dir::split_json(text);
        let is_json = json.is_ok() || file.ends_with(".json");
        let parts = match json {
            Ok(parts) => parts,
            Err(message) if is_json => return self.wrong(&place(1), "", "", message),
            Err(_) => dir::split_yaml(text),
        };
        for (first_line, part) in parts {
            let line = first_line + dir::leading_lines(part);
            let read = if is_json { Text::Json(part).read() } else { Text::Yaml(part).read() };
            match read {
                Ok(value) => self.value(&place(line), value),
                Err(c) => self.wrong(&place(c.line.map_or(line, |l| first_line + l - 1)), "", "", c.message),
            }
        }
    }

    /// A document, or an item of a list.
    fn value(&mut self, place: &Place, mut value: Value) {
        let api_version = value["apiVersion"].as_str().unwrap_or_default().to_owned();
        let kind = value["kind"].as_str().unwrap_or_default().to_owned();
        let is_list = (api_version == "v1" && kind == "List")
            || kind.strip_suffix("List").is_some_and(|kind| Kind::find(&api_version, kind).is_some());
        if is_list {
            if let Value::Array(items) = value["items"].take() {
                for item in items {
                    self.value(place, item);
                }
            }
            return;
        }
        let kind = Kind::find(&api_version, &kind);
        let mut mistakes = kind.map(|kind| self.checker.check(kind, &value)).unwrap_or_default();
        let by_schema = !mistakes.is_empty();
        if kind.is_some_and(|kind| kind.kind == "EgressFirewall") {
            merge(&mut mistakes, firewall::check::mistakes(&value["spec"]));
        }
        let mut documents = Vec::new();
        let parsed = dir::parse_document(&Text::Value(value.clone()), place.line, &mut documents);
        let object = documents.pop().map(|d| d.object);
        let named = object.as_ref().and_then(Object::name).map(|(name, meta)| (name, meta.clone()));
        let about = match (&named, kind) {
            (Some((name, _)), _) => name.to_string(),
            (None, Some(kind)) => {
                format!("{} {}", kind.kind, value["metadata"]["name"].as_str().unwrap_or_default())
                    .trim_end()
                    .to_owned()
            }
            (None, None) => String::new(),
        };
        for Mistake { field, message } in mistakes {
            self.wrong(place, &about, &field, message);
        }
        match parsed {
            // The schema has said it with the field's name.
            Err(_) if by_schema => {}
            Err(complaint) => self.wrong(place, &about, "", complaint.message),
            Ok(()) => {}
        }
        match (object, named) {
            (Some(object), Some((name, meta))) => {
                self.report.checked += 1;
                if let Some(first) = self.places.get(&about) {
                    let message = format!("is already in {}:{}, which counts", first.file, first.line);
                    return self.wrong(place, &about, "", message);
                }
                self.places.insert(about, place.clone());
                object.put((name.namespace, meta.name), &mut self.objects);
            }
            // A kind that Outgate writes.
            (Some(_), None) if kind.is_some() => self.report.checked += 1,
            (Some(_), None) => self.report.skipped += 1,
            (None, _) => self.report.checked += usize::from(kind.is_some()),
        }
    }

    /// What is wrong with all of them together.
    fn finish(mut self) -> Report {
        let problems = model::desired(&self.objects, "").problems;
        for problem in problems {
            let Some(place) = self.places.get(&problem.about).cloned() else { continue };
            let (field, message) = split(&problem.message);
            // What was said of the field or of a part of it, or of a name that does not count, said all. On firewalls
            // the agent has been heard already.
            let said = |f: &Finding| {
                f.object == problem.about
                    && (problem.about.starts_with("EgressFirewall")
                        || f.field == "metadata.name"
                        || within(&f.field, field))
            };
            if self.report.findings.iter().any(said) {
                continue;
            }
            // That no node is selected is known only where there are nodes.
            if problem.message.contains("the rule matches nothing") {
                if !self.objects.nodes.is_empty() {
                    self.note(&place, &problem.about, field, message);
                }
                continue;
            }
            self.wrong(&place, &problem.about, field, message.to_owned());
        }
        self.notes();
        let mut report = self.report;
        report.findings.sort();
        report.findings.dedup();
        report
    }

    /// What is right, and may not be meant.
    fn notes(&mut self) {
        let objects: Vec<EgressIp> = self.objects.egress_ips.values().cloned().collect();
        for (index, o) in objects.iter().enumerate() {
            let about = format!("EgressIP {}", o.metadata.name);
            let Some(place) = self.places.get(&about).cloned() else { continue };
            let Some(namespaces) = &o.spec.namespace_selector else { continue };
            if *namespaces == LabelSelector::default() {
                let message = "is empty: it selects all namespaces, those of the system too";
                self.note(&place, &about, "spec.namespaceSelector", message);
            }
            let same = objects[..index].iter().find(|other| {
                other.spec.namespace_selector.as_ref() == Some(namespaces)
                    && other.spec.pod_selector == o.spec.pod_selector
            });
            if let Some(other) = same {
                let message = format!(
                    "selects the same pods as EgressIP {}: the older object serves them, the other waits",
                    other.metadata.name
                );
                self.note(&place, &about, "spec", &message);
            }
        }
        // Twice is once.
        for o in &objects {
            let mut seen = BTreeSet::new();
            for (index, address) in o.spec.egress_ips.iter().enumerate() {
                let about = format!("EgressIP {}", o.metadata.name);
                if let (false, Some(place)) = (seen.insert(address), self.places.get(&about).cloned()) {
                    let field = format!("spec.egressIPs[{index}]");
                    self.note(&place, &about, &field, &format!("{address:?} is there twice"));
                }
            }
        }
    }

    fn wrong(&mut self, place: &Place, object: &str, field: &str, message: String) {
        self.found(place, object, field, message, Severity::Mistake);
    }

    fn note(&mut self, place: &Place, object: &str, field: &str, message: &str) {
        self.found(place, object, field, message.to_owned(), Severity::Note);
    }

    fn found(&mut self, place: &Place, object: &str, field: &str, message: String, severity: Severity) {
        let Place { file, line } = place.clone();
        let (object, field) = (object.to_owned(), field.to_owned());
        self.report.findings.push(Finding { file, line, object, field, message, severity });
    }
}

/// Adds the agent's own words on an `EgressFirewall`. They say more than a schema's of the same field, and of one that it
/// is a part of or has as a part; the whole list is no field in this sense.
fn merge(mistakes: &mut Vec<Mistake>, own: Vec<(String, String)>) {
    for (field, message) in own {
        // The schema names the field itself.
        if message.contains(" is no field of it") {
            continue;
        }
        mistakes.retain(|m| {
            let same = m.field == field
                || (field != "spec.egress" && m.field != "spec.egress")
                    && (within(&m.field, &field) || within(&field, &m.field));
            !same || m.message == UNKNOWN_FIELD
        });
        mistakes.push(Mistake { field, message });
    }
}

/// The field that a problem begins with, and the rest.
fn split(message: &str) -> (&str, &str) {
    match message.find([' ', ':']) {
        Some(at) if message.starts_with("spec.") => {
            (&message[..at], message[at..].trim_start_matches([' ', ':']))
        }
        _ => ("", message),
    }
}

/// Whether a field is another or a part of it.
fn within(field: &str, other: &str) -> bool {
    let rest = field.strip_prefix(other);
    !other.is_empty() && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}
