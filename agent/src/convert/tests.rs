//! The examples of OpenShift 3.11's documentation, and what people have in their files besides.

use super::*;
use crate::objects;

/// Egress firewall, as in "Limiting access to external resources".
const POLICY: &str = "kind: EgressNetworkPolicy
apiVersion: v1
metadata:
  name: default
spec:
  egress:
  - to:
      cidrSelector: 1.2.3.0/24
    type: Allow
  - to:
      dnsName: www.foo.com
    type: Allow
  - to:
      cidrSelector: 0.0.0.0/0
    type: Deny
";

fn input(name: &str, text: &str) -> Input {
    Input { name: name.to_owned(), text: text.to_owned() }
}

fn of(text: &str) -> Conversion {
    convert(&[input("f", text)])
}

fn written(conversion: &Conversion) -> String {
    let mut out = Vec::new();
    conversion.write(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn said(conversion: &Conversion) -> Vec<String> {
    conversion.messages.iter().map(ToString::to_string).collect()
}

#[test]
fn an_egress_firewall_keeps_its_rules_and_their_order() {
    let converted = of(POLICY);
    assert_eq!(converted.failures(), 0, "{:?}", said(&converted));
    assert_eq!(
        written(&converted),
        "---
# EgressNetworkPolicy default (f:1)
apiVersion: k8s.ovn.org/v1
kind: EgressFirewall
metadata:
  name: default
spec:
  egress:
  - type: Allow
    to:
      cidrSelector: 1.2.3.0/24
  - type: Allow
    to:
      dnsName: www.foo.com
  - type: Deny
    to:
      cidrSelector: 0.0.0.0/0
"
    );
    // The agent takes it.
    let firewall: objects::EgressFirewall = serde_saphyr::from_str(&written(&converted)).unwrap();
    assert_eq!(firewall.spec.len(), 3);
    // That nodes are within its reach now must not go unsaid.
    assert!(said(&converted).iter().any(|m| m.starts_with("f:1: note: ") && m.contains("API server")));
}

#[test]
fn the_same_as_json_with_tabs_and_of_the_newer_api() {
    let json = "{\n\t\"kind\": \"EgressNetworkPolicy\", \"apiVersion\": \"network.openshift.io/v1\",
\t\"metadata\": {\"name\": \"mine\", \"namespace\": \"123\"},
\t\"spec\": {\"egress\": [{\"type\": \"Allow\", \"to\": {\"cidrSelector\": \"10.0.0.0/8\", \"dnsName\": \"\"}}]}}\n";
    let converted = of(json);
    assert_eq!(said(&converted), [""; 0]);
    let yaml = written(&converted);
    let firewall: objects::EgressFirewall = serde_saphyr::from_str(&yaml).unwrap();
    assert_eq!((firewall.metadata.name.as_str(), firewall.metadata.namespace.as_str()), ("default", "123"));
    assert_eq!(firewall.spec.len(), 1);
    assert!(yaml.contains("# EgressNetworkPolicy 123/mine (f:1)"), "{yaml}");
}

#[test]
fn static_egress_ips_keep_their_order_and_nodes_get_the_label() {
    let text = "apiVersion: v1
kind: List
items:
- apiVersion: network.openshift.io/v1
  kind: NetNamespace
  metadata: {name: project1}
  netname: project1
  netid: 17711
  egressIPs:
  - \"192.168.1.101\"
  - \"192.168.1.100\"
- apiVersion: network.openshift.io/v1
  kind: NetNamespace
  metadata: {name: other}
  netname: other
  netid: 4
- apiVersion: network.openshift.io/v1
  kind: HostSubnet
  metadata: {name: node1}
  host: node1
  hostIP: 192.168.1.11
  subnet: 10.128.0.0/23
  egressIPs: [192.168.1.100, 192.168.1.101, 192.168.1.102]
- apiVersion: network.openshift.io/v1
  kind: HostSubnet
  metadata: {name: node2}
  host: node2
  egressIPs: []
";
    let converted = of(text);
    assert_eq!(converted.failures(), 0);
    assert_eq!(
        written(&converted),
        "# kubectl label node node1 k8s.ovn.org/egress-assignable=
---
# NetNamespace project1 (f:4)
apiVersion: k8s.ovn.org/v1
kind: EgressIP
metadata:
  name: project1
spec:
  egressIPs:
  - \"192.168.1.101\"
  - \"192.168.1.100\"
  namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: project1
"
    );
    let said = said(&converted);
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(
        said[0].starts_with("f:4: note: NetNamespace project1: ") && said[0].contains("spread"),
        "{said:?}"
    );
    assert!(said[1].starts_with("f:17: note: ") && said[1].contains("chosen"), "{said:?}");
    assert_eq!(said[2], "f:23: note: no NetNamespace has egress IP 192.168.1.102");
}

#[test]
fn automatic_egress_ips() {
    let spaces = "{\"kind\": \"NetNamespace\", \"apiVersion\": \"v1\", \"metadata\": {\"name\": \"p\"}, \
                  \"egressIPs\": [\"192.168.1.100\"]}\n{\"kind\": \"NetNamespace\", \"apiVersion\": \"v1\", \
                  \"metadata\": {\"name\": \"q\"}, \"egressIPs\": [\"192.168.2.100\"]}\n";
    let hosts = "kind: HostSubnetList
apiVersion: network.openshift.io/v1
items:
- metadata: {name: a}
  egressCIDRs: [192.168.1.0/24]
- metadata: {name: b}
  egressCIDRs: [192.168.1.0/24]
";
    let converted = convert(&[input("spaces.json", spaces), input("hosts.yaml", hosts)]);
    assert_eq!(converted.failures(), 0);
    let yaml = written(&converted);
    assert!(
        yaml.starts_with(
            "# kubectl label node a k8s.ovn.org/egress-assignable=
# kubectl label node b k8s.ovn.org/egress-assignable=
# Egress IPs are not moved back when a node returns"
        ),
        "{yaml}"
    );
    assert_eq!(yaml.matches("kind: EgressIP\n").count(), 2);
    let said = said(&converted);
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(said[0].starts_with("spaces.json:2: note: NetNamespace q: no HostSubnet hosts 192.168.2.100"));
    assert!(said[2].starts_with("hosts.yaml:4: note: egressCIDRs"), "{said:?}");
}

#[test]
fn what_cannot_be_converted_is_told_by_line_and_leaves_no_half_of_an_object() {
    let header = "kind: EgressNetworkPolicy\napiVersion: v1\nmetadata: {name: default, namespace: p}\nspec:\n  egress:\n";
    for (rules, line, part) in [
        ("  - {type: Allow, to: {cidrSelector: 10.0.0.0/33}}\n", 6, "spec.egress[0]"),
        (
            "  - {type: Deny, to: {cidrSelector: 10.0.0.0/8}}\n  - {type: deny, to: {cidrSelector: 10.0.0.0/8}}\n",
            7,
            "spec.egress[1]",
        ),
        ("  - type: Deny\n    to: {cidrSelector: 10.0.0.0/8, dnsName: a.example}\n", 6, "spec.egress[0]"),
        ("  - type: Deny\n", 6, "spec.egress[0]"),
        (
            "  - type: Deny\n    to:\n      cidrSelector: 10.0.0.0/8\n      nodeSelector: {}\n",
            9,
            "nodeSelector is no field",
        ),
    ] {
        let converted = of(&format!("{header}{rules}"));
        assert_eq!((converted.failures(), written(&converted).as_str()), (1, ""), "{rules}");
        let said = said(&converted);
        let start = format!("f:{line}: not converted: EgressNetworkPolicy p/default: ");
        assert!(said[0].starts_with(&start) && said[0].contains(part), "{said:?}");
    }
    for (text, said_of) in [
        (
            "kind: EgressNetworkPolicy\napiVersion: v2\n",
            "f:1: not converted: EgressNetworkPolicy of apiVersion \"v2\"",
        ),
        ("a: b\n", "f:1: not converted: no kind"),
        ("kind: [\n", "not YAML or JSON"),
        ("{\"kind\": }", "f:1: not converted: "),
        (
            "kind: NetNamespace\napiVersion: v1\nmetadata: {name: p}\negressIPs:\n- 10.0.0\n",
            "f:5: not converted: NetNamespace p: egressIPs: \"10.0.0\" is not an IP address",
        ),
        (
            "kind: NetNamespace\napiVersion: v1\nmetadata: {name: p}\negressIPs: 10.0.0.1\n",
            "f:4: not converted: NetNamespace p: egressIPs is not a list",
        ),
        (
            &POLICY
                .replace("name: default", "{name: default, namespace: default}")
                .replace("metadata:\n  ", "metadata: "),
            "f:1: not converted: EgressNetworkPolicy default/default: the project `default` could not have one",
        ),
    ] {
        let converted = of(text);
        assert_eq!(written(&converted), "", "{text}");
        assert_eq!(converted.failures(), 1, "{text}");
        assert!(said(&converted)[0].contains(said_of), "{:?}", said(&converted));
    }
    // Other objects are nobody's mistake.
    let other = of("kind: Pod\napiVersion: v1\nmetadata: {name: p}\n");
    assert_eq!((other.failures(), said(&other).len()), (0, 1));
}

#[test]
fn policies_that_were_not_in_force_do_not_come_into_force() {
    let policy = |name: &str| {
        format!(
            "---\nkind: EgressNetworkPolicy\napiVersion: v1\nmetadata: {{name: {name}, namespace: p}}\nspec: {{egress: []}}\n"
        )
    };
    let two = of(&(policy("a") + &policy("b")));
    assert_eq!((two.failures(), written(&two).as_str()), (2, ""), "{:?}", said(&two));
    assert!(said(&two)[1].starts_with("f:7: not converted: EgressNetworkPolicy p/b: it is not the only one"));
    let space = |name: &str, netid: u32| {
        format!("---\nkind: NetNamespace\napiVersion: v1\nmetadata: {{name: {name}}}\nnetid: {netid}\n")
    };
    let joined = of(&(policy("a") + &space("p", 7) + &space("q", 7)));
    assert!(said(&joined)[0].contains("its project is joined with q"), "{:?}", said(&joined));
    let global = of(&(policy("a") + &space("p", 0)));
    assert!(said(&global)[0].contains("global projects"), "{:?}", said(&global));
    let alone = of(&(policy("a") + &space("p", 7) + &space("q", 8)));
    assert_eq!(alone.failures(), 0, "{:?}", said(&alone));
    assert!(written(&alone).contains("spec:\n  egress: []"), "{}", written(&alone));
}

#[test]
fn an_address_of_two_projects_and_one_that_stands_twice() {
    let text = "kind: NetNamespace
apiVersion: v1
metadata: {name: p}
egressIPs: [192.0.2.1, 192.0.2.1]
---
kind: NetNamespace
apiVersion: v1
metadata: {name: q}
egressIPs:
- 192.0.2.1
";
    let converted = of(text);
    let said = said(&converted);
    assert_eq!(converted.failures(), 2, "{said:?}");
    assert!(
        said[0].starts_with("f:4: not converted: NetNamespace p: egressIPs: 192.0.2.1 stands there twice")
    );
    assert!(said[1].starts_with(
        "f:10: not converted: NetNamespace q: egress IP 192.0.2.1 is NetNamespace p (f:1)'s too"
    ));
    // Without its object a project's pods would leave by their nodes' addresses.
    assert_eq!(written(&converted).matches("kind: EgressIP\n").count(), 2);
}

#[test]
fn the_old_word_for_everything_outside() {
    let converted = of(&POLICY.replace("0.0.0.0/0", "0.0.0.0/32"));
    assert!(written(&converted).contains("cidrSelector: 0.0.0.0/0\n"));
    assert!(said(&converted)[1].starts_with("f:13: note: "), "{:?}", said(&converted));
}
