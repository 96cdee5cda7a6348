//! What a host sees: every source address, counted by its own nftables before anything else looks, and the
//! packets whose checksum its kernel found wrong.
//!
//! Counting in the kernel misses no packet, whatever the load; a capture would.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::command;
use crate::netns::Netns;

/// Counts the packets of both families that come in, by source address and protocol.
#[derive(Debug)]
pub struct Recorder {
    netns: Netns,
}

impl Recorder {
    /// Starts counting, anew if there was a recorder in the namespace before.
    ///
    /// Neighbour discovery and what is said about multicast groups (IGMP, `ICMPv6` types 130 to 137 and 143) are
    /// not counted: they are the links' own talk.
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

    #[track_caller]
    fn start_with(netns: &Netns, first: &str) -> Self {
        // Before fragments are put together (-400): each one counts. What a host says to itself came from nobody: the
        // "unreachable" of a ping to an address that did not resolve comes seconds later.
        let rules = format!(
            "table inet seen
            delete table inet seen
            table inet seen {{
                set sources4 {{ type ipv4_addr . inet_proto; size 65535; flags dynamic; counter; }}
                set sources6 {{ type ipv6_addr . inet_proto; size 65535; flags dynamic; counter; }}
                chain in {{
                    type filter hook prerouting priority -450; {first}
                    iif lo return
                    ip protocol igmp return
                    icmpv6 type {{ 130-137, 143 }} return
                    meta nfproto ipv4 update @sources4 {{ ip saddr . meta l4proto }}
                    meta nfproto ipv6 update @sources6 {{ ip6 saddr . meta l4proto }}
                }}
            }}"
        );
        let _ = netns.exec_input(&["nft", "-f", "-"], &[], &rules).expect_success();
        Self { netns: netns.clone() }
    }

    /// Forgets what was seen.
    #[track_caller]
    pub fn reset(&self) {
        let flush = "flush set inet seen sources4\nflush set inet seen sources6";
        let _ = self.netns.exec_input(&["nft", "-f", "-"], &[], flush).expect_success();
    }

    /// The sources of one protocol (`tcp`, `udp`, `icmp`, `ipv6-icmp`) with their packets, of both families.
    #[track_caller]
    #[must_use]
    pub fn sources(&self, protocol: &str) -> BTreeMap<String, u64> {
        let mut all = self.all();
        all.retain(|(_, name), _| name == protocol);
        all.into_iter().map(|((source, _), packets)| (source, packets)).collect()
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

    /// Panics if any packet, of whatever protocol, had another source than these.
    #[track_caller]
    pub fn expect_none_but(&self, wanted: &[&str]) {
        let mut seen = self.all();
        seen.retain(|(source, _), _| !wanted.contains(&&**source));
        assert!(seen.is_empty(), "in {}, sources other than {wanted:?}: {seen:?}", self.netns.name());
    }

    /// Packets by source and protocol.
    #[track_caller]
    fn all(&self) -> BTreeMap<(String, String), u64> {
        let text = self.netns.exec(&["nft", "-j", "list", "table", "inet", "seen"]);
        let list: Value = serde_json::from_str(&text).expect("nft writes JSON");
        let items = list["nftables"].as_array().into_iter().flatten();
        let elements = items.filter_map(|item| item["set"]["elem"].as_array()).flatten();
        elements
            .filter_map(|element| {
                let pair = &element["elem"]["val"]["concat"];
                let packets = element["elem"]["counter"]["packets"].as_u64()?;
                // A protocol that nft has no name for is a number.
                let protocol = pair[1].as_str().map_or_else(|| pair[1].to_string(), str::to_owned);
                Some(((pair[0].as_str()?.to_owned(), protocol), packets))
            })
            .collect()
    }
}

/// Counts what comes in with a source in one of these networks (IPv4, IPv6): nobody outside knows the way there.
#[track_caller]
pub(crate) fn watch_foreign_sources(netns: &Netns, [v4, v6]: &[&str; 2]) {
    let rules = format!(
        "table inet foreign {{
            set seen {{ type ipv4_addr; flags dynamic; counter; }}
            set seen6 {{ type ipv6_addr; flags dynamic; counter; }}
            chain in {{
                type filter hook prerouting priority -450;
                ip saddr {v4} update @seen {{ ip saddr }}
                ip6 saddr {v6} update @seen6 {{ ip6 saddr }}
            }}
        }}"
    );
    let _ = netns.exec_input(&["nft", "-f", "-"], &[], &rules).expect_success();
}

/// A line for every source that should not have been seen.
pub(crate) fn foreign_sources(netns: &Netns) -> Vec<String> {
    let output = netns.try_exec(&["nft", "list", "table", "inet", "foreign"]);
    if !output.success() {
        return vec![output.explain()];
    }
    let seen = output.stdout.lines().map(str::trim).filter(|line| line.contains(" counter packets "));
    seen.map(|line| format!("foreign source in {}: {line}", netns.name())).collect()
}

/// A line for every protocol of which a namespace's kernel has met packets with a wrong checksum.
pub(crate) fn bad_checksums(name: &str) -> Vec<String> {
    let enter = format!("--net=/run/netns/{name}");
    let files = ["/proc/net/snmp", "/proc/net/netstat", "/proc/net/snmp6"];
    let output = command::run(&[&["nsenter", &enter, "cat"][..], &files].concat(), &[], "");
    if !output.success() {
        return vec![output.explain()];
    }
    let bad = checksum_counters(&output.stdout).into_iter().filter(|(_, count)| *count > 0);
    bad.map(|(counter, count)| format!("bad checksums in {name}: {counter} {count}")).collect()
}

/// The counters of wrong checksums in the text of `/proc/net/{snmp,netstat,snmp6}`.
fn checksum_counters(text: &str) -> Vec<(String, u64)> {
    let mut counters = Vec::new();
    let mut names: Option<(&str, &str)> = None;
    for line in text.lines() {
        if let Some((protocol, rest)) = line.split_once(": ") {
            match names.take() {
                // A line of names is followed by one of values.
                Some((first, all)) if first == protocol => {
                    let pairs = all.split(' ').zip(rest.split(' '));
                    let wanted = pairs.filter(|(name, _)| name.ends_with("CsumErrors"));
                    counters.extend(wanted.filter_map(|(name, value)| {
                        Some((format!("{protocol} {name}"), value.parse().ok()?))
                    }));
                }
                _ => names = Some((protocol, rest)),
            }
        } else if let Some((name, value)) = line.split_once(char::is_whitespace)
            && name.ends_with("CsumErrors")
        {
            counters.extend(value.trim().parse().ok().map(|value| (name.to_owned(), value)));
        }
    }
    counters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_both_forms_are_read() {
        let text = "Tcp: InSegs InCsumErrors\nTcp: 7 2\nUdp: InCsumErrors MemErrors\nUdp: 3 0\n\
                    IpExt: InNoRoutes InCsumErrors InNoECTPkts\nIpExt: 0 4 1\n\
                    Ip6InReceives                   \t1\nIcmp6InCsumErrors               \t5\n";
        let wanted = [
            ("Tcp InCsumErrors", 2),
            ("Udp InCsumErrors", 3),
            ("IpExt InCsumErrors", 4),
            ("Icmp6InCsumErrors", 5),
        ];
        let wanted: Vec<_> = wanted.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
        assert_eq!(checksum_counters(text), wanted);
    }
}
