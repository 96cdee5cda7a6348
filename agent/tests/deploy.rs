//! The manifests under `deploy/`: they name what the program has, and nothing is missing from the lists of files.

#![expect(clippy::unwrap_used, reason = "a test, whose helpers clippy does not take for one")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use outgate::cli::Cli;
use serde_json::Value;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Every YAML file below a directory, by its path from there.
fn files(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|ending| ending == "yaml") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found.sort();
    found
}

fn documents(text: &str) -> Vec<Value> {
    text.split("\n---\n")
        .map(|document| serde_saphyr::from_str(document).unwrap_or_else(|e| panic!("{document}: {e}")))
        .collect()
}

/// All containers of all manifests and patches, with the file.
fn containers() -> Vec<(PathBuf, Value)> {
    let mut found = Vec::new();
    for (path, text) in files(&deploy()) {
        for document in documents(&text) {
            for list in ["initContainers", "containers"] {
                let containers = document.pointer(&format!("/spec/template/spec/{list}"));
                for container in containers.and_then(Value::as_array).into_iter().flatten() {
                    found.push((path.clone(), container.clone()));
                }
            }
        }
    }
    found
}

fn texts(value: &Value) -> Vec<String> {
    let items = value.as_array().into_iter().flatten();
    items.map(|item| item.as_str().expect("a text").to_owned()).collect()
}

/// The variables of a container; one that the node or the pod fills in has a stand-in.
fn variables(container: &Value) -> Vec<(String, String)> {
    let variables = container["env"].as_array().into_iter().flatten();
    variables
        .map(|variable| {
            let value = variable["value"].as_str().unwrap_or("filled-in");
            (variable["name"].as_str().unwrap().to_owned(), value.replace("$(HOST_IP)", "192.0.2.1"))
        })
        .collect()
}

#[test]
fn containers_name_only_options_that_the_program_has_with_values_that_it_takes() {
    let containers = containers();
    assert!(containers.len() >= 6, "{}", containers.len());
    for (path, container) in containers {
        let mut line = vec!["outgate".to_owned()];
        line.extend(texts(&container["args"]));
        let patch = line.len() == 1;
        if patch {
            // A patch adds to the container of that name, which runs the command of that name.
            line.push(container["name"].as_str().unwrap().to_owned());
            line.extend(["--source".to_owned(), "kube".to_owned()]);
            if line[1] == "agent" {
                line.extend(["--node".to_owned(), "n".to_owned()]);
            }
        }
        for (name, value) in variables(&container) {
            let Some(option) = name.strip_prefix("OUTGATE_") else {
                assert_eq!(name, "HOST_IP", "{}", path.display());
                continue;
            };
            line.push(format!("--{}={value}", option.to_lowercase().replace('_', "-")));
        }
        if let Err(error) = Cli::try_parse_from(&line) {
            panic!("{}: {line:?}: {error}", path.display());
        }
    }
}

#[test]
fn probes_and_port_are_where_the_program_serves() {
    for file in ["agent.yaml", "controller.yaml"] {
        let text = fs::read_to_string(deploy().join("base").join(file)).unwrap();
        let container = documents(&text)[0].pointer("/spec/template/spec/containers/0").unwrap().clone();
        let metrics =
            variables(&container).into_iter().find(|(name, _)| name == "OUTGATE_METRICS").unwrap().1;
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let Some(probe) = container[probe].get("httpGet") else { continue };
            assert_eq!(format!("{}:{}", probe["host"].as_str().unwrap(), probe["port"]), metrics, "{file}");
        }
        assert_eq!(format!("127.0.0.1:{}", container["ports"][0]["containerPort"]), metrics, "{file}");
    }
}

/// `tests/tests/kube_uninstall.rs` shows that the DaemonSet's are enough.
#[test]
fn the_unit_for_systemd_has_the_daemonsets_capabilities() {
    let text = fs::read_to_string(deploy().join("base/agent.yaml")).unwrap();
    let container = documents(&text)[0].pointer("/spec/template/spec/containers/0").unwrap().clone();
    let added = texts(&container["securityContext"]["capabilities"]["add"]);
    let unit = fs::read_to_string(deploy().join("outgate-agent.service")).unwrap();
    let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let bounding: BTreeSet<_> =
        line.split(' ').map(|name| name.trim_start_matches("CAP_").to_owned()).collect();
    assert_eq!(bounding, added.into_iter().collect());
}

#[test]
fn the_image_is_this_version() {
    let image = concat!("localhost/outgate:", env!("CARGO_PKG_VERSION"));
    let images: BTreeSet<_> = containers()
        .into_iter()
        .filter_map(|(_, container)| container["image"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(images, [image.to_owned()].into());
}

#[test]
fn one_command_installs_all() {
    let listed = |dir: &str| -> Vec<String> {
        let text = fs::read_to_string(deploy().join(dir).join("kustomization.yaml")).unwrap();
        texts(&documents(&text)[0]["resources"])
    };
    let mut parts = Vec::new();
    for dir in ["crds", "base"] {
        let files = files(&deploy().join(dir));
        let names = files.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap());
        let names: BTreeSet<_> =
            names.filter(|name| *name != "kustomization.yaml").map(str::to_owned).collect();
        let listed = listed(dir);
        assert_eq!(listed.iter().cloned().collect::<BTreeSet<_>>(), names, "{dir}");
        parts.extend(listed.iter().map(|name| format!("{dir}/{name}")));
    }
    assert_eq!(listed("."), parts);
}
