//! One pod's network as a container runtime has it: what CNI's arguments and the plugins' result say.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use crate::addresses;

/// The name of every pod's first interface. Kubernetes' runtimes fix it: containerd (`DefaultPrefix` "eth" and a
/// count, containerd/go-cni `types.go`) and CRI-O (`DefaultInterfaceName`, cri-o/ocicni). Others are a
/// meta-plugin's additional networks, whose addresses are in no Pod's status either.
pub const INTERFACE: &str = "eth0";

/// A pod's sandbox and the addresses that it was given.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID; empty where the runtime does not say.
    #[serde(default)]
    pub uid: String,
    /// The sandbox: a pod may have another one later.
    pub container: String,
    /// The addresses of its first interface.
    pub addresses: Vec<IpAddr>,
    /// Interfaces at the host's side, as far as the plugins name them.
    #[serde(default)]
    pub interfaces: Vec<String>,
    /// When the result was written: a later one of the same pod counts.
    #[serde(skip, default = "epoch")]
    pub written: SystemTime,
}

const fn epoch() -> SystemTime {
    SystemTime::UNIX_EPOCH
}

/// Why a result says nothing of a pod's addresses.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// It is in the form of CNI before 0.3.0, or none.
    #[error("the result has no \"ips\"; CNI versions before 0.3.0 are not understood")]
    NoAddresses,
    /// An address that is none.
    #[error("ips: {text:?} {why}")]
    Address {
        /// As it is written.
        text: String,
        /// What is wrong with it.
        why: String,
    },
}

/// `CNI_ARGS`, as pairs: what Kubernetes' runtimes say of the pod.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Arguments(BTreeMap<String, String>);

impl Arguments {
    /// From `A=B;C=D`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        text.split(';').filter_map(|pair| pair.split_once('=')).collect()
    }

    /// The pod's namespace and name, and its UID if it is said; nothing for what is no pod of Kubernetes.
    #[must_use]
    pub fn pod(&self) -> Option<(&str, &str, &str)> {
        let get = |name: &str| self.0.get(name).map(String::as_str).filter(|value| !value.is_empty());
        Some((get("K8S_POD_NAMESPACE")?, get("K8S_POD_NAME")?, get("K8S_POD_UID").unwrap_or_default()))
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Arguments {
    fn from_iter<T: IntoIterator<Item = (&'a str, &'a str)>>(pairs: T) -> Self {
        Self(pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }
}

/// A plugin's result, as far as it is read here: CNI specification 0.3.0 to 1.1.0, "ADD Success".
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CniResult {
    #[serde(deserialize_with = "or_default")]
    interfaces: Vec<Interface>,
    ips: Option<Vec<Address>>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
struct Interface {
    name: String,
    /// The network namespace; empty or absent for interfaces of the host.
    #[serde(deserialize_with = "or_default")]
    sandbox: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
struct Address {
    address: String,
    /// An index into `interfaces`.
    interface: Option<usize>,
}

fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(d).map(Option::unwrap_or_default)
}

impl CniResult {
    /// The addresses of the pod's first interface. One that is of no interface in particular is (Calico's and
    /// other plugins' results name none in the sandbox); one of an interface of the host is not.
    pub fn addresses(&self) -> Result<Vec<IpAddr>, Error> {
        let ips = self.ips.as_ref().ok_or(Error::NoAddresses)?;
        let mut all = Vec::new();
        for ip in ips {
            let interface = ip.interface.and_then(|index| self.interfaces.get(index));
            if interface.is_some_and(|i| i.sandbox.is_empty() || i.name != INTERFACE) {
                continue;
            }
            let failure = |why: String| Error::Address { text: ip.address.clone(), why };
            let host = ip.address.split('/').next().unwrap_or_default();
            let address = addresses::address(host).map_err(|error| failure(error.to_string()))?;
            if ip.address.contains('/') && ip.address.parse::<IpNet>().is_err() {
                return Err(failure("is not an address with a prefix's length".to_owned()));
            }
            if !all.contains(&address) {
                all.push(address);
            }
        }
        Ok(all)
    }

    /// Names of the interfaces at the host's side: the pod's own one, and whatever else the plugins report.
    #[must_use]
    pub fn host_interfaces(&self) -> Vec<String> {
        let host = self.interfaces.iter().filter(|i| i.sandbox.is_empty() && !i.name.is_empty());
        host.map(|i| i.name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(text: &str) -> CniResult {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn addresses_of_the_pods_own_interface() {
        // Of `bridge`, the reference plugin.
        let bridge = result(
            r#"{"cniVersion": "1.0.0", "dns": {},
                "interfaces": [{"name": "cni0", "mac": "02:00:00:00:00:01"}, {"name": "veth12", "mac": "02:00:00:00:00:02"},
                               {"name": "eth0", "mac": "02:00:00:00:00:03", "sandbox": "/run/netns/x"}],
                "ips": [{"address": "10.244.1.2/24", "gateway": "10.244.1.1", "interface": 2},
                        {"address": "fd00::2/64", "interface": 2}]}"#,
        );
        let both: [IpAddr; 2] = ["10.244.1.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        assert_eq!(bridge.addresses(), Ok(both.to_vec()));
        assert_eq!(bridge.host_interfaces(), ["cni0", "veth12"]);
        // Of no interface in particular.
        let calico = result(
            r#"{"interfaces": [{"name": "cali12"}], "ips": [{"version": "4", "address": "10.244.1.2/32"}]}"#,
        );
        assert_eq!(calico.addresses(), Ok(both[..1].to_vec()));
        // Of the host, of another interface of the pod.
        let others = result(
            r#"{"interfaces": [{"name": "veth1"}, {"name": "net1", "sandbox": "/x"}],
                "ips": [{"address": "10.0.0.1/24", "interface": 0}, {"address": "10.0.0.2/24", "interface": 1}]}"#,
        );
        assert_eq!(others.addresses(), Ok(Vec::new()));
        assert_eq!(result(r#"{"ips": [], "interfaces": null}"#).addresses(), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_result_is_named() {
        let old = result(r#"{"cniVersion": "0.2.0", "ip4": {"ip": "10.0.0.1/24"}}"#);
        assert_eq!(old.addresses(), Err(Error::NoAddresses));
        for wrong in ["", "10.0.0", "10.0.0.1/33", "::ffff:10.0.0.1/120"] {
            let text = format!(r#"{{"ips": [{{"address": "{wrong}"}}]}}"#);
            let error = result(&text).addresses().unwrap_err();
            assert!(error.to_string().contains(&format!("{wrong:?}")), "{error}");
        }
    }

    #[test]
    fn arguments_name_the_pod() {
        let text = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u";
        assert_eq!(Arguments::parse(text).pod(), Some(("shop", "web", "u")));
        assert_eq!(
            Arguments::parse("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web").pod(),
            Some(("shop", "web", ""))
        );
        for none in ["", "K8S_POD_NAMESPACE=shop", "K8S_POD_NAMESPACE=;K8S_POD_NAME=web", "nonsense"] {
            assert_eq!(Arguments::parse(none).pod(), None, "{none}");
        }
    }
}
