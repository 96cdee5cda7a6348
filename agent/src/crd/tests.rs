//! Tests of the definitions: that servers take them, what they take and refuse, and that what Outgate writes is taken.

use std::fs;
use std::path::Path;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::cel::cel::Program;
use kube::core::cel::cel::common::ast::{Expr, IdedExpr, LiteralValue};
use kube::core::cel::{ScopeContext, Validator, check_rule_scope, compile_schema};
use serde::Serialize;

use super::check::tests::each;
use super::check::{Checker, Mistake};
use super::*;
use crate::objects::{
    AppliedFirewall, Condition, EgressAllocation, EgressFirewallReport, EgressIpItem, EgressIpReport,
    EgressNode, EgressUplink, GrantedGranules, GrantedPorts, Granules, LoadedAllocation, Meta, PortDemand,
    PortLease, RestingPorts, ReturnedPorts, ShadowedPods,
};

/// What the schema and the rules of its kind say of an object, as `field: message`.
fn said(object: &Value) -> Vec<String> {
    let text = |name: &str| object[name].as_str().unwrap();
    let kind = Kind::find(text("apiVersion"), text("kind")).expect("one of our kinds");
    let mistakes = Checker::default().check(kind, object).into_iter();
    mistakes.map(|Mistake { field, message }| format!("{field}: {message}")).collect()
}

fn yaml_value(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn egress_ip(spec: &str) -> Value {
    yaml_value(&format!(
        "{{apiVersion: k8s.ovn.org/v1, kind: EgressIP, metadata: {{name: a}}, spec: {spec}}}"
    ))
}

fn firewall(rule: &str) -> Value {
    yaml_value(&format!(
        "{{apiVersion: k8s.ovn.org/v1, kind: EgressFirewall, metadata: {{name: default}}, spec: {{egress: [{rule}]}}}}"
    ))
}

fn config(spec: &str) -> Value {
    yaml_value(&format!(
        "{{apiVersion: outgate.dev/v1alpha1, kind: EgressConfig, metadata: {{name: default}}, spec: {spec}}}"
    ))
}

#[test]
fn the_files_in_deploy_are_what_the_code_says() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    for document in yaml().unwrap().split("---\n").filter(|d| !d.is_empty()) {
        let name = document.lines().find_map(|l| l.strip_prefix("  name: ")).unwrap();
        let (plural, group) = name.split_once('.').unwrap();
        let file = directory.join(format!("{group}_{plural}.yaml"));
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert!(
            text == document,
            "{} differs: run `cargo xtask codegen` and commit deploy/crds",
            file.display()
        );
    }
}

#[test]
fn the_apis_own_types_know_every_field() {
    for kind in &KINDS {
        let definition = kind.definition();
        let read: CustomResourceDefinition = serde_json::from_value(definition.clone()).unwrap();
        // They hold bounds as floating-point numbers.
        let whole = |value: Value| -> Value {
            fn walk(value: Value) -> Value {
                match value {
                    Value::Number(n) => n.as_f64().map_or(Value::Null, Value::from),
                    Value::Array(items) => items.into_iter().map(walk).collect(),
                    Value::Object(fields) => {
                        Value::Object(fields.into_iter().map(|(name, value)| (name, walk(value))).collect())
                    }
                    other @ (Value::Null | Value::Bool(_) | Value::String(_)) => other,
                }
            }
            walk(value)
        };
        assert_eq!(whole(serde_json::to_value(read).unwrap()), whole(definition), "{}", kind.kind);
    }
}

#[test]
fn names_scope_and_columns_are_those_of_ovn_kubernetes() {
    for (kind, name, scope, short, columns) in [
        (
            "EgressIP",
            "egressips.k8s.ovn.org",
            "Cluster",
            json!(["eip"]),
            json!([
                {"jsonPath": ".spec.egressIPs[*]", "name": "EgressIPs", "type": "string"},
                {"jsonPath": ".status.items[*].node", "name": "Assigned Node", "type": "string"},
                {"jsonPath": ".status.items[*].egressIP", "name": "Assigned EgressIPs", "type": "string"},
            ]),
        ),
        (
            "EgressFirewall",
            "egressfirewalls.k8s.ovn.org",
            "Namespaced",
            Value::Null,
            json!([{"jsonPath": ".status.status", "name": "EgressFirewall Status", "type": "string"}]),
        ),
    ] {
        let definition = Kind::find("k8s.ovn.org/v1", kind).unwrap().definition();
        let spec = &definition["spec"];
        assert_eq!(definition["metadata"]["name"], name);
        assert_eq!((&spec["scope"], &spec["names"]["shortNames"]), (&json!(scope), &short));
        assert_eq!((&spec["group"], &spec["versions"][0]["name"]), (&json!("k8s.ovn.org"), &json!("v1")));
        let shown = spec["versions"][0]["additionalPrinterColumns"].as_array().unwrap().iter();
        let always: Vec<_> = shown.filter(|c| c["priority"].is_null()).cloned().collect();
        assert_eq!(Value::from(always), columns, "without -o wide");
    }
}

#[test]
fn every_field_has_words_for_kubectl_explain() {
    for kind in &KINDS {
        each(kind.kind, &kind.schema(), &mut |at, schema| {
            for (name, field) in schema["properties"].as_object().into_iter().flatten() {
                let words = field["description"].as_str().unwrap_or_default();
                let ours = !at.contains(".metadata") && name != "metadata";
                assert!(!ours || !words.is_empty(), "{at}.{name} has no description");
                assert!(
                    !words.contains("[`") && !words.contains('\n'),
                    "{at}.{name}: {words:?} is for rustdoc"
                );
            }
        });
    }
}

/// Examples of `OpenShift`'s and OVN-Kubernetes' documentation.
#[test]
fn what_works_there_applies_here() {
    for object in [
        egress_ip(
            "{egressIPs: [192.168.126.10, 192.168.126.102], namespaceSelector: {matchLabels: {env: qa}}}",
        ),
        egress_ip(
            "{egressIPs: [192.168.127.30, 192.168.127.40], namespaceSelector: {matchLabels: {env: prod}}, \
             podSelector: {matchLabels: {region: East}}}",
        ),
        egress_ip(
            "{egressIPs: [192.168.127.40], namespaceSelector: {matchExpressions: [{key: environment, operator: NotIn, \
             values: [development]}]}, podSelector: {}}",
        ),
        egress_ip(
            "{egressIPs: [172.18.0.33, 'fc00:f853:ccd:e793::64'], namespaceSelector: {}, podSelector: null}",
        ),
        egress_ip(
            "{egressIPs: ['::1:2:3:192.0.2.1'], namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop, e: ''}}}",
        ),
        firewall("{type: Allow, to: {cidrSelector: 1.2.3.0/24}}"),
        firewall(
            "{type: Deny, to: {cidrSelector: 1.2.3.0/24}, ports: [{port: 80, protocol: TCP}, {port: 443, protocol: UDP}]}",
        ),
        firewall(
            "{type: Allow, to: {dnsName: www.example.com}}, {type: Allow, to: {dnsName: '*.example.com.'}}",
        ),
        firewall(
            "{type: Allow, to: {nodeSelector: {matchLabels: {region: east}}}}, {type: Deny, to: {cidrSelector: '::/0'}}",
        ),
        firewall("{type: Allow, to: {nodeSelector: {matchExpressions: [{key: region, operator: Exists}]}}}"),
        firewall(
            "{type: Deny, to: {cidrSelector: 0.0.0.0/0}, ports: [{protocol: SCTP}, {protocol: TCP, port: 1, endPort: 1}]}",
        ),
        firewall(""),
        config("{}"),
        config(
            "{clusterCIDRs: [10.128.0.0/14, 'fd01::/48'], serviceCIDRs: [172.30.0.0/16], unassigned: NodeIP, unknownPods: Allow, \
             spread: Connection, offload: Always, routedCIDRs: ['::ffff:0:0/64'], tunnel: {port: 4795, vni: 16777215}, \
             timeouts: {udpSeconds: 604800}, denyAction: Reject, resolvers: ['2001:db8::53']}",
        ),
    ] {
        assert_eq!(said(&object), Vec::<String>::new(), "{object}");
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn each_mistake_is_refused_at_its_field() {
    let all = "namespaceSelector: {}";
    let to = "to: {cidrSelector: 10.0.0.0/8}";
    let port = |port: &str| firewall(&format!("{{type: Allow, {to}, ports: [{port}]}}"));
    let many = (1..=33).map(|n| format!("192.0.2.{n}")).collect::<Vec<_>>().join(", ");
    for (object, expected) in [
        (
            egress_ip(&format!("{{egressIPs: [192.0.2.300], {all}}}")),
            r#"spec.egressIPs[0]: "192.0.2.300" is not an IP"#,
        ),
        (
            egress_ip(&format!("{{egressIPs: [192.0.2.0/24], {all}}}")),
            r#"spec.egressIPs[0]: "192.0.2.0/24" is not an IP"#,
        ),
        (
            egress_ip(&format!("{{egressIPs: ['2001:db8::g'], {all}}}")),
            r#"spec.egressIPs[0]: "2001:db8::g" is not an IP"#,
        ),
        (egress_ip(&format!("{{egressIPs: [], {all}}}")), "spec.egressIPs: has 0 items; at least 1"),
        (egress_ip(&format!("{{egressIPs: [{many}], {all}}}")), "spec.egressIPs: has 33 items; at most 32"),
        (
            egress_ip(&format!("{{egressIPs: 192.0.2.1, {all}}}")),
            r#"spec.egressIPs: is "192.0.2.1", expected a list"#,
        ),
        (
            egress_ip(&format!("{{egressIPs: [3], {all}}}")),
            "spec.egressIPs[0]: is the number 3, expected text",
        ),
        (egress_ip(&format!("{{egressIPs: [null], {all}}}")), "spec.egressIPs[0]: is missing; expected text"),
        (egress_ip(&format!("{{{all}}}")), "spec.egressIPs: is missing"),
        (egress_ip("{egressIPs: [192.0.2.1]}"), "spec.namespaceSelector: is missing"),
        (
            egress_ip("{egressIPs: [192.0.2.1], namespaceSelector: null}"),
            "spec.namespaceSelector: is missing",
        ),
        (egress_ip("null"), "spec: is missing"),
        (
            egress_ip("{egressIPs: [192.0.2.1], namespaceSelector: {matchLabels: {a: 1}}}"),
            "spec.namespaceSelector.matchLabels.a: is the number 1, expected text",
        ),
        (
            egress_ip("{egressIPs: [192.0.2.1], namespaceSelector: {matchLabels: {a: 'b c'}}}"),
            r#"spec.namespaceSelector.matchLabels.a: "b c" is not of the form"#,
        ),
        (
            egress_ip(
                "{egressIPs: [192.0.2.1], namespaceSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}",
            ),
            r#"spec.namespaceSelector.matchExpressions[0].operator: "in" is none of In, NotIn, Exists, DoesNotExist"#,
        ),
        (
            egress_ip(
                "{egressIPs: [192.0.2.1], namespaceSelector: {matchExpressions: [{operator: Exists}]}}",
            ),
            "spec.namespaceSelector.matchExpressions[0].key: is missing",
        ),
        (egress_ip(&format!("{{egresIPs: [192.0.2.1], {all}}}")), "spec.egresIPs: is no field of this kind"),
        (
            egress_ip(&format!("{{egressIPs: [192.0.2.1], {all}, podSelector: {{matchLabel: {{}}}}}}")),
            "spec.podSelector.matchLabel: is no field of this kind",
        ),
        (
            yaml_value(
                "{apiVersion: k8s.ovn.org/v1, kind: EgressFirewall, metadata: {name: other}, spec: {egress: []}}",
            ),
            r#"metadata.name: is "other"; it must be default"#,
        ),
        (
            yaml_value(
                "{apiVersion: outgate.dev/v1alpha1, kind: EgressConfig, metadata: {name: other}, spec: {}}",
            ),
            r#"metadata.name: is "other"; it must be default"#,
        ),
        (
            firewall(&format!("{{type: allow, {to}}}")),
            r#"spec.egress[0].type: "allow" is none of Allow, Deny"#,
        ),
        (
            firewall(&format!("{{type: AllowX, {to}}}")),
            r#"spec.egress[0].type: "AllowX" is none of Allow, Deny"#,
        ),
        (firewall(&format!("{{{to}}}")), "spec.egress[0].type: is missing"),
        (firewall("{type: Allow}"), "spec.egress[0].to: is missing"),
        (firewall("{type: Allow, to: {}}"), "spec.egress[0].to: has 0 fields; at least 1"),
        (
            firewall("{type: Allow, to: {cidrselector: 10.0.0.0/8}}"),
            "spec.egress[0].to: has 0 fields; at least 1",
        ),
        (
            firewall("{type: Allow, to: {cidrSelector: 10.0.0.0/8, dnsName: a.b}}"),
            "spec.egress[0].to: has 2 fields; at most 1",
        ),
        (
            firewall("{type: Allow, to: {cidrSelector: 10.0.0.1}}"),
            r#"spec.egress[0].to.cidrSelector: "10.0.0.1" is not a network"#,
        ),
        (
            firewall("{type: Allow, to: {cidrSelector: 10.0.0.0/33}}"),
            r#"spec.egress[0].to.cidrSelector: "10.0.0.0/33" is not a network"#,
        ),
        (
            firewall("{type: Allow, to: {dnsName: a..b}}"),
            r#"spec.egress[0].to.dnsName: "a..b" is not of the form"#,
        ),
        (
            firewall("{type: Allow, to: {dnsName: 'a.*.b'}}"),
            r#"spec.egress[0].to.dnsName: "a.*.b" is not of the form"#,
        ),
        (
            firewall(&format!("{{type: Allow, to: {{dnsName: {}}}}}", "a.".repeat(128))),
            "spec.egress[0].to.dnsName: has 256 characters; at most 254",
        ),
        (
            port("{protocol: tcp, port: 1}"),
            r#"spec.egress[0].ports[0].protocol: "tcp" is none of TCP, UDP, SCTP"#,
        ),
        (port("{port: 1}"), "spec.egress[0].ports[0].protocol: is missing"),
        (port("{protocol: TCP, port: 0}"), "spec.egress[0].ports[0].port: 0 is not from 1 to 65535"),
        (port("{protocol: TCP, port: 65536}"), "spec.egress[0].ports[0].port: 65536 is not from 1 to 65535"),
        (port("{protocol: TCP, port: -1}"), "spec.egress[0].ports[0].port: -1 is not from 1 to 65535"),
        (
            port("{protocol: TCP, port: 1, endPort: 65536}"),
            "spec.egress[0].ports[0].endPort: 65536 is not from 1",
        ),
        (
            port("{protocol: TCP, port: '80'}"),
            r#"spec.egress[0].ports[0].port: is "80", expected a whole number"#,
        ),
        (config("{unassigned: drop}"), r#"spec.unassigned: "drop" is none of Drop, NodeIP"#),
        (config("{unknownPods: Drop}"), r#"spec.unknownPods: "Drop" is none of Hold, Allow"#),
        (config("{spread: pod}"), r#"spec.spread: "pod" is none of Pod, Connection"#),
        (config("{offload: true}"), "spec.offload: is true, expected text"),
        (config("{denyAction: Deny}"), r#"spec.denyAction: "Deny" is none of Drop, Reject"#),
        (config("{timeouts: {udpSeconds: 0}}"), "spec.timeouts.udpSeconds: 0 is not from 1 to 604800"),
        (config("{tunnel: {port: 65536}}"), "spec.tunnel.port: 65536 is not from 1 to 65535"),
        (config("{tunnel: {vni: 16777216}}"), "spec.tunnel.vni: 16777216 is not from 1 to 16777215"),
        (
            config("{resolvers: [ns.example.com]}"),
            r#"spec.resolvers[0]: "ns.example.com" is not an IP address"#,
        ),
        (config("{clusterCIDRs: [10.0.0.0]}"), r#"spec.clusterCIDRs[0]: "10.0.0.0" is not a network"#),
    ] {
        let said = said(&object);
        assert!(said.iter().any(|m| m.starts_with(expected)), "{object}: expected {expected}, said {said:?}");
    }
}

/// What a server before 1.25 takes, and the agents refuse: one good and one bad object of each rule.
#[test]
fn mistakes_that_only_rules_can_refuse() {
    let selector = |expression: &str| {
        egress_ip(&format!(
            "{{egressIPs: [192.0.2.1], namespaceSelector: {{matchExpressions: [{{{expression}}}]}}}}"
        ))
    };
    let address = |ip: &str| egress_ip(&format!("{{egressIPs: ['{ip}'], namespaceSelector: {{}}}}"));
    let network = |net: &str| config(&format!("{{clusterCIDRs: ['{net}']}}"));
    let ports = |ports: &str| {
        firewall(&format!(
            "{{type: Allow, to: {{cidrSelector: 0.0.0.0/0}}, ports: [{{protocol: TCP, {ports}}}]}}"
        ))
    };
    let name = |name: &str| firewall(&format!("{{type: Allow, to: {{dnsName: {name}}}}}"));
    let requirement = "spec.namespaceSelector.matchExpressions[0]";
    let mut used = Vec::new();
    for (rule, good, bad, at) in [
        (
            rules::SELECTOR_VALUES,
            selector("key: a, operator: In, values: [b]"),
            selector("key: a, operator: In"),
            requirement,
        ),
        (
            rules::SELECTOR_VALUES,
            selector("key: a, operator: Exists, values: []"),
            selector("key: a, operator: Exists, values: [b]"),
            requirement,
        ),
        (
            rules::SELECTOR_VALUES,
            selector("key: a, operator: NotIn, values: [b]"),
            selector("key: a, operator: NotIn, values: []"),
            requirement,
        ),
        (
            rules::MAPPED_ADDRESS,
            address("2001:db8::ffff:192.0.2.1"),
            address("::ffff:192.0.2.1"),
            "spec.egressIPs[0]",
        ),
        (
            rules::MAPPED_ADDRESS,
            address("::ffff:1:2:3"),
            address("0:0:0:0:0:FFFF:c000:201"),
            "spec.egressIPs[0]",
        ),
        (rules::MAPPED_NETWORK, network("::ffff:0:0/95"), network("::ffff:0:0/96"), "spec.clusterCIDRs[0]"),
        (rules::MAPPED_NETWORK, network("::/0"), network("::ffff:10.0.0.0/104"), "spec.clusterCIDRs[0]"),
        (
            rules::PORT_RANGE,
            ports("port: 80, endPort: 80"),
            ports("port: 80, endPort: 79"),
            "spec.egress[0].ports[0]",
        ),
        (rules::PORT_RANGE, ports("port: 80"), ports("endPort: 79"), "spec.egress[0].ports[0]"),
        (rules::NAME_IS_ADDRESS, name("1.2.3.example"), name("'192.0.2.1'"), "spec.egress[0].to.dnsName"),
    ] {
        assert_eq!(said(&good), Vec::<String>::new(), "{good}");
        assert_eq!(said(&bad), [format!("{at}: {}", rule.1)], "{bad}");
        used.push(rule.0);
    }
    for (kind, at, schema) in places() {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            assert!(used.contains(&rule["rule"].as_str().unwrap()), "{kind}{at}: {rule} has no example here");
        }
    }
}

/// Every schema within the definitions, by kind and path.
fn places() -> Vec<(&'static str, String, Value)> {
    let mut places = Vec::new();
    for kind in &KINDS {
        each("", &kind.schema(), &mut |at, schema| places.push((kind.kind, at.to_owned(), schema.clone())));
    }
    places
}

#[test]
fn rules_compile_and_look_at_the_object_only() {
    for (kind, at, schema) in places() {
        let compiled = compile_schema(&schema);
        assert!(!compiled.has_errors(), "{kind}{at}: {:?}", compiled.compilation_errors());
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let warnings = check_rule_scope(rule["rule"].as_str().unwrap(), ScopeContext::CrdValidation);
            assert!(warnings.is_empty(), "{kind}{at}: {warnings:?}");
            // Within `items` only: see the head of `rules`.
            assert!(
                at.contains("[]"),
                "{kind}{at}: kubectl would refuse the definition on a server before 1.25"
            );
        }
    }
    // The library is one that evaluates.
    assert!(
        Validator::new()
            .validate(&json!({"x-kubernetes-validations": [{"rule": "self > 1"}]}), &json!(1), None)
            .is_err()
    );
}

#[expect(clippy::wildcard_enum_match_arm, reason = "what rules do not use")]
/// What a server estimates a rule to cost at most (cel-go, `checker/cost.go`), for the few operations that rules here use.
/// `schema` is that of `self`. Literals are 1 here and 0 there.
fn cost(expr: &IdedExpr, schema: &Value) -> u64 {
    match &expr.expr {
        Expr::Literal(_) | Expr::Ident(_) => 1,
        Expr::Select(select) => 1 + cost(&select.operand, schema),
        Expr::Call(call) => {
            let target = call.target.as_ref().map_or(0, |t| cost(t, schema));
            let inside: u64 = target + call.args.iter().map(|a| cost(a, schema)).sum::<u64>();
            inside
                + match call.func_name.as_str() {
                    "_||_" | "_&&_" => 0,
                    "!_" | "_>=_" | "_>_" | "size" => 1,
                    // The shorter of the two is gone through.
                    "_==_" => 1 + call.args.iter().map(|a| length(a, schema)).min().unwrap().div_ceil(10),
                    "matches" => {
                        let text = length(call.target.as_ref().unwrap(), schema) + 1;
                        text.div_ceil(10) * length(&call.args[0], schema).div_ceil(4)
                    }
                    other => panic!("no cost is known of {other}"),
                }
        }
        other => panic!("no cost is known of {other:?}"),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "what rules do not use")]
/// How long a text can be, in bytes; 1 for what is none.
fn length(expr: &IdedExpr, schema: &Value) -> u64 {
    let of = |schema: &Value| match schema["type"].as_str() {
        // A character is up to four bytes.
        Some("string") => schema["maxLength"].as_u64().map(|n| n * 4).or_else(|| {
            schema["enum"]
                .as_array()
                .map(|words| words.iter().map(|w| w.as_str().unwrap().len() as u64).max().unwrap())
        }),
        _ => Some(1),
    };
    match &expr.expr {
        Expr::Literal(LiteralValue::String(text)) => text.inner().len() as u64,
        Expr::Ident(_) => of(schema).expect("a text in a rule has a maxLength"),
        Expr::Select(select) => {
            of(&schema["properties"][&select.field]).expect("a text in a rule has a maxLength")
        }
        _ => 1,
    }
}

#[test]
fn rules_cost_less_than_servers_allow() {
    /// A rule's estimate, and that of all rules of a definition (`apiextensions-apiserver`, `StaticEstimatedCostLimit`
    /// and `StaticEstimatedCRDCostLimit`).
    const LIMITS: (u64, u64) = (10_000_000, 100_000_000);
    /// At the same time it bounds what one object may cost when it is checked (`RuntimeCELCostBudget`).
    const RUNTIME: u64 = 10_000_000;
    fn walk(at: &str, schema: &Value, times: u64, costs: &mut Vec<(String, u64)>) {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let program = Program::compile(rule["rule"].as_str().unwrap()).unwrap();
            costs.push((format!("{at}: {}", rule["rule"]), times * cost(program.expression(), schema)));
        }
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            walk(&format!("{at}.{name}"), schema, times, costs);
        }
        for (below, bound) in [("items", "maxItems"), ("additionalProperties", "maxProperties")] {
            if let Some(inner) = schema.get(below) {
                // Without a bound a server thinks of as many as fit into a request, 3 MB.
                let times = times.saturating_mul(schema[bound].as_u64().unwrap_or(3 << 20));
                walk(&format!("{at}[]"), inner, times, costs);
            }
        }
    }
    for kind in &KINDS {
        let mut costs = Vec::new();
        walk(kind.kind, &kind.schema(), 1, &mut costs);
        for (rule, cost) in &costs {
            assert!(*cost < LIMITS.0, "{rule} may cost {cost}");
        }
        assert!(costs.iter().map(|(_, cost)| cost).sum::<u64>() < LIMITS.1, "{costs:?}");
    }
    // A firewall of as many rules as there may be, each of a network and one range of ports.
    let kind = Kind::find("k8s.ovn.org/v1", "EgressFirewall").unwrap();
    let schema = kind.schema();
    let rule = &schema["properties"]["spec"]["properties"]["egress"]["items"]["properties"];
    let of = |schema: &Value| {
        let program =
            Program::compile(schema["x-kubernetes-validations"][0]["rule"].as_str().unwrap()).unwrap();
        cost(program.expression(), schema)
    };
    let whole = 8000 * (of(&rule["to"]["properties"]["cidrSelector"]) + of(&rule["ports"]["items"]));
    assert!(whole < RUNTIME, "{whole}");
}

#[test]
#[expect(clippy::too_many_lines, reason = "every field")]
fn what_outgate_writes_is_taken() {
    fn check(object: &impl Serialize) {
        let object = serde_json::to_value(object).unwrap();
        assert_eq!(said(&object), Vec::<String>::new(), "{object}");
    }
    let meta =
        || Meta { name: "default".into(), namespace: "shop".into(), uid: "0".into(), ..Meta::default() };
    let condition = |egress_ip: &str| Condition {
        kind: "Assigned".into(),
        egress_ip: egress_ip.into(),
        status: "False".into(),
        reason: "Duplicate".into(),
        message: "also in EgressIP b".into(),
        last_transition_time: "2026-01-02T03:04:05Z".into(),
    };
    let ranges = || vec![Granules { first: 0, count: 94 }, Granules { first: 1007, count: 1 }];
    let granted = || {
        let of = |g: Granules| GrantedGranules { first: g.first, count: g.count, generation: 2 };
        ranges().into_iter().map(of).collect()
    };
    let ip = || "2001:db8::1".to_owned();

    let mut node = EgressNode { metadata: meta(), ..EgressNode::default() };
    check(&node);
    node.spec.node_uid = "1".into();
    node.spec.labels = [("a.example/b", "")].into();
    node.spec.internal_ips = vec![ip()];
    node.spec.external_ips = vec![ip()];
    node.spec.pod_cidrs = vec!["10.1.0.0/24".into()];
    let ports = GrantedPorts {
        egress_ip: ip(),
        uid: "2".into(),
        generation: 3,
        owner: "b".into(),
        ranges: granted(),
    };
    node.spec.ranges = vec![GrantedPorts::default(), ports];
    node.status.boot_id = "4".into();
    node.status.tunnel_addresses = vec![ip()];
    node.status.addresses = vec![ip()];
    let uplink = EgressUplink {
        name: "eth0".into(),
        mac: "02:00:00:00:00:01".into(),
        networks: vec!["192.0.2.2/24".into()],
        default_route: vec!["IPv4".into()],
        up: true,
    };
    node.status.uplinks = vec![EgressUplink::default(), uplink];
    node.status.demand = vec![PortDemand::default(), PortDemand { egress_ip: ip(), granules: 1008 }];
    node.status.returned = vec![ReturnedPorts { egress_ip: ip(), uid: "2".into(), ranges: granted() }];
    node.status.loaded =
        vec![LoadedAllocation { egress_ip: ip().into(), uid: "2".into(), generation: u64::from(u32::MAX) }];
    node.status.shadowed = vec![ShadowedPods { egress_ip: "b".into(), by: "a".into(), pods: 3 }];
    node.status.firewalls = vec![
        AppliedFirewall::default(),
        AppliedFirewall {
            namespace: "shop".into(),
            uid: "5".into(),
            version: "6".into(),
            message: "no room".into(),
            kept: true,
        },
    ];
    check(&node);

    let mut allocation = EgressAllocation { metadata: meta(), ..EgressAllocation::default() };
    check(&allocation);
    allocation.spec = EgressAllocationSpec {
        egress_ip: ip(),
        owner: "a".into(),
        standbys: vec!["b".into()],
        leases: vec![
            PortLease::default(),
            PortLease {
                node: "a".into(),
                node_uid: "1".into(),
                boot_id: "4".into(),
                since: "2026-01-02T03:04:05Z".into(),
                generation: 3,
                ranges: ranges(),
            },
        ],
        resting: vec![
            RestingPorts::default(),
            RestingPorts { first: 1007, count: 1, generation: 2, until: "2026-01-02T03:04:05Z".into() },
        ],
    };
    check(&allocation);

    let mut report = EgressIpReport {
        api_version: OVN_API.into(),
        kind: "EgressIP".into(),
        metadata: meta(),
        status: EgressIpStatus { items: Vec::new(), conditions: Vec::new() },
    };
    // The spec is the user's, and is not in a report.
    let with_spec = |report: &EgressIpReport| {
        let mut object = serde_json::to_value(report).unwrap();
        object["spec"] = json!({"egressIPs": ["192.0.2.1"], "namespaceSelector": {}});
        object
    };
    check(&with_spec(&report));
    report.status.items = vec![EgressIpItem { node: "a".into(), egress_ip: ip() }];
    report.status.conditions = vec![condition(""), condition("192.0.2.1"), Condition::default()];
    check(&with_spec(&report));

    let mut report = EgressFirewallReport {
        api_version: OVN_API.into(),
        kind: "EgressFirewall".into(),
        metadata: meta(),
        status: EgressFirewallStatus::default(),
    };
    let with_spec = |report: &EgressFirewallReport| {
        let mut object = serde_json::to_value(report).unwrap();
        object["spec"] = json!({"egress": []});
        object
    };
    check(&with_spec(&report));
    report.status.status = crate::status::firewall::APPLIED.into();
    report.status.messages = vec!["a: EgressFirewall Rules applied".into()];
    report.status.conditions = vec![condition("")];
    check(&with_spec(&report));
}
