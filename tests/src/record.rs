//! What a host sees: every source address, counted by its own nftables before anything else looks.
//!
//! Counting in the kernel misses no packet, whatever the load; a capture would.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::netns::Netns;

/// Counts the IPv4 packets that come in, by source address and protocol.
#[derive(Debug)]
pub struct Recorder {
    netns: Netns,
}

impl Recorder {
    /// Starts counting, anew if there was a recorder in the namespace before.
    #[track_caller]
    #[must_use]
    pub fn start(netns: &Netns) -> Self {
        Self::start_with(netns, "")
    }

    /// The same without TCP resets that acknowledge nothing: a node's own answer to what is for no connection.
    #[track_caller]
    #[must_use]
    pub fn start_without_resets(netns: &Netns) -> Self {
        Self::start_with(netns, "tcp flags & (fin | syn | rst | psh | ack) == rst return;")
    }

    fn start_with(netns: &Netns, first: &str) -> Self {
        let rules = format!(
            "table ip seen
        delete table ip seen
        table ip seen {{
            set sources {{ type ipv4_addr . inet_proto; size 65535; flags dynamic; counter; }}
            chain in {{
                type filter hook prerouting priority -400; {first}
                update @sources {{ ip saddr . ip protocol }}
            }}
        }}"
        );
        let _ = netns.exec_input(&["nft", "-f", "-"], &[], &rules).expect_success();
        Self { netns: netns.clone() }
    }

    /// Forgets what was seen.
    #[track_caller]
    pub fn reset(&self) {
        let _ = self.netns.exec(&["nft", "flush", "set", "ip", "seen", "sources"]);
    }

    /// The sources of one protocol (`tcp`, `udp`, `icmp`) with their packets.
    #[track_caller]
    #[must_use]
    pub fn sources(&self, protocol: &str) -> BTreeMap<String, u64> {
        let text = self.netns.exec(&["nft", "-j", "list", "set", "ip", "seen", "sources"]);
        let list: Value = serde_json::from_str(&text).expect("nft writes JSON");
        let items = list["nftables"].as_array().into_iter().flatten();
        let elements = items.filter_map(|item| item["set"]["elem"].as_array()).flatten();
        elements
            .filter_map(|element| {
                let pair = &element["elem"]["val"]["concat"];
                let packets = element["elem"]["counter"]["packets"].as_u64()?;
                (pair[1] == protocol).then(|| Some((pair[0].as_str()?.to_owned(), packets)))?
            })
            .collect()
    }

    /// Panics unless the sources of a protocol are exactly these.
    #[track_caller]
    pub fn expect_only(&self, protocol: &str, wanted: &[&str]) {
        let seen = self.sources(protocol);
        let mut wanted: Vec<_> = wanted.to_vec();
        wanted.sort_unstable();
        let names: Vec<_> = seen.keys().map(String::as_str).collect();
        assert_eq!(names, wanted, "sources of {protocol} in {}: {seen:?}", self.netns.name());
    }
}
