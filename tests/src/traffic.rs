//! Clients in a namespace, and what they report.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::command::Process;
use crate::lab::{helper_path, utf8};
use crate::netns::Netns;

/// What a client of the lab's own server saw.
#[derive(Debug, Clone)]
pub struct Report {
    /// Exchanges that worked.
    pub ok: u64,
    /// Exchanges that did not, by reason.
    pub errors: BTreeMap<String, u64>,
    /// The client's address as the server saw it, with the number of exchanges.
    pub sources: BTreeMap<String, u64>,
    /// The client's port as the server saw it last.
    pub port: u64,
    /// The longest time without an answer, in milliseconds (streams only).
    pub longest_gap: u64,
}

impl Report {
    fn parse(text: &str) -> Self {
        let line = text.lines().rfind(|line| line.starts_with('{'));
        let line = line.unwrap_or_else(|| panic!("no report in '{text}'"));
        let value: Value = serde_json::from_str(line).expect("a report is JSON");
        let counts = |name: &str| {
            let object = value[name].as_object().cloned().unwrap_or_default();
            object.into_iter().map(|(key, count)| (key, count.as_u64().unwrap_or_default())).collect()
        };
        Self {
            ok: value["ok"].as_u64().unwrap_or_default(),
            errors: counts("errors"),
            sources: counts("sources"),
            port: value["port"].as_u64().unwrap_or_default(),
            longest_gap: value["longest_gap_ms"].as_u64().unwrap_or_default(),
        }
    }

    /// Panics unless all of `count` exchanges worked and the server saw `source` only.
    #[track_caller]
    pub fn expect_all_from(&self, count: u64, source: &str) {
        assert!(self.errors.is_empty(), "{self:?}");
        assert_eq!(self.ok, count, "{self:?}");
        assert_eq!(self.sources.keys().map(String::as_str).collect::<Vec<_>>(), [source], "{self:?}");
    }

    /// Panics unless there was some traffic, all of it worked, and the server saw `source` only.
    #[track_caller]
    pub fn expect_lossless_from(&self, source: &str) {
        assert!(self.ok > 0, "no traffic: {self:?}");
        self.expect_all_from(self.ok, source);
    }
}

/// Traffic that goes on until it is told to end.
#[derive(Debug)]
pub struct Stream(Process);

impl Stream {
    /// Ends it and says how it went.
    #[track_caller]
    #[must_use]
    pub fn finish(self) -> Report {
        Report::parse(&self.0.finish(Duration::from_secs(30)).expect_success())
    }
}

/// Datagrams that go on until they are told to end.
#[derive(Debug)]
pub struct Spray(Process);

impl Spray {
    /// Ends them; gives how many were sent to each address.
    #[track_caller]
    #[must_use]
    pub fn finish(self) -> BTreeMap<String, u64> {
        let text = self.0.finish(Duration::from_secs(10)).expect_success();
        let line = text.lines().rfind(|line| line.starts_with('{')).unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

/// Pings, a hundred a second, until told to end.
#[derive(Debug)]
pub struct Pings(Process);

impl Pings {
    /// Ends them; gives how many were sent and how many answered.
    #[track_caller]
    #[must_use]
    pub fn finish(self) -> (u32, u32) {
        let summary = self.0.interrupt(Duration::from_secs(5)).stdout;
        (number_before(&summary, "packets"), number_before(&summary, "received"))
    }
}

impl Netns {
    /// `count` TCP connections to the lab's server (`address:port`), `parallel` of them open at a time.
    #[track_caller]
    #[must_use]
    pub fn tcp(&self, destination: &str, count: u64, parallel: u64) -> Report {
        self.client("tcp", destination, &["--count", &count.to_string(), "--parallel", &parallel.to_string()])
    }

    /// `count` UDP exchanges with the lab's server, each from a port of its own.
    #[track_caller]
    #[must_use]
    pub fn udp(&self, destination: &str, count: u64) -> Report {
        self.client("udp", destination, &["--count", &count.to_string()])
    }

    /// `count` exchanges of UDP datagrams with `size` bytes of data, of one flow or each of its own. What comes
    /// back must be the same bytes.
    #[track_caller]
    #[must_use]
    pub fn udp_sized(&self, destination: &str, size: u32, count: u64, one_flow: bool) -> Report {
        let (size, count) = (size.to_string(), count.to_string());
        let mut more = vec!["--size", &size, "--count", &count, "--limit-ms", "2000"];
        if one_flow {
            more.push("--one-flow");
        }
        self.client("udp", destination, &more)
    }

    /// One UDP exchange from a given port, if it is answered within `limit`.
    #[track_caller]
    #[must_use]
    pub fn udp_from(&self, port: u16, destination: &str, limit: Duration) -> Report {
        let (port, limit) = (port.to_string(), limit.as_millis().to_string());
        self.client("udp", destination, &["--source-port", &port, "--limit-ms", &limit])
    }

    /// What a TCP server sees as this namespace's address, or why it cannot be asked within `limit`.
    #[track_caller]
    pub fn tcp_source(&self, destination: &str, limit: Duration) -> Result<String, String> {
        self.source("tcp", destination, limit)
    }

    /// What a UDP server sees as this namespace's address, or why it cannot be asked within `limit`.
    #[track_caller]
    pub fn udp_source(&self, destination: &str, limit: Duration) -> Result<String, String> {
        self.source("udp", destination, limit)
    }

    /// What comes of trying each of `tcp/address:port` and `udp/address:port` of the lab's server, all at the same
    /// time: `open`, `silent` for 300 ms, `refused`, `unreachable` or `prohibited`.
    #[track_caller]
    #[must_use]
    pub fn reach(&self, targets: &[&str]) -> Vec<String> {
        self.reach_within(targets, Duration::from_millis(300))
    }

    /// The same with another limit.
    #[track_caller]
    #[must_use]
    pub fn reach_within(&self, targets: &[&str], limit: Duration) -> Vec<String> {
        let (helper, limit) = (helper_path("peer"), limit.as_millis().to_string());
        let words = [&[utf8(&helper), "reach", "--limit-ms", &limit], targets].concat();
        let text = self.exec(&words);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Sends UDP datagrams to all of some destinations in turn, each from a new socket, until told to end.
    #[track_caller]
    #[must_use]
    pub fn spray(&self, destinations: &[&str]) -> Spray {
        let helper = helper_path("peer");
        let words = [&[utf8(&helper), "spray"], destinations].concat();
        let mut process = self.spawn("spray", &words, &[]);
        process.wait_stdout("running", Duration::from_secs(10));
        Spray(process)
    }

    /// A numbered message every `interval` over one connection (`tcp`) or socket (`udp`), until told to end.
    /// Every message must come back.
    #[track_caller]
    #[must_use]
    pub fn stream(&self, protocol: &str, destination: &str, interval: Duration) -> Stream {
        self.endless("stream", protocol, destination, interval)
    }

    /// A new connection or socket every `interval`, until told to end.
    #[track_caller]
    #[must_use]
    pub fn fresh(&self, protocol: &str, destination: &str, interval: Duration) -> Stream {
        self.endless("fresh", protocol, destination, interval)
    }

    /// Pings; gives how many of `count` were answered. `interval` in seconds.
    #[track_caller]
    #[must_use]
    pub fn ping(&self, destination: &str, count: u32, interval: &str) -> u32 {
        self.ping_sized(destination, 56, count, interval)
    }

    /// The same with `size` bytes of data, which ping compares with the answer's.
    #[track_caller]
    #[must_use]
    pub fn ping_sized(&self, destination: &str, size: u32, count: u32, interval: &str) -> u32 {
        let (size, count) = (size.to_string(), count.to_string());
        let words = ["ping", "-n", "-W", "1", "-c", &count, "-i", interval, "-s", &size, destination];
        // Not `-q`: it would say nothing of wrong data.
        let text = self.try_exec(&words).stdout;
        assert!(!text.contains("wrong data byte"), "{text}");
        number_before(&text, "received")
    }

    /// Who answers UDP to a port that nobody listens on, with hop limits from 1 to `hops`: what traceroute shows.
    /// Each is read from the error queue of a socket of its own.
    #[track_caller]
    #[must_use]
    pub fn trace(&self, destination: &str, hops: u32) -> Vec<String> {
        // IP_RECVERR is 11, IPV6_RECVERR 25 (linux/in.h, linux/in6.h); the offender's address follows the 16 bytes
        // of struct sock_extended_err (linux/errqueue.h).
        let program = "import select, socket, sys
destination, hops = sys.argv[1], int(sys.argv[2])
v6 = ':' in destination
family, level = (socket.AF_INET6, socket.IPPROTO_IPV6) if v6 else (socket.AF_INET, socket.IPPROTO_IP)
for hop in range(1, hops + 1):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.setsockopt(level, 25 if v6 else 11, 1)
    s.setsockopt(level, socket.IPV6_UNICAST_HOPS if v6 else socket.IP_TTL, hop)
    s.connect((destination, 33433 + hop))
    s.send(b'x' * 24)
    poll = select.poll()
    poll.register(s, select.POLLERR)
    if not poll.poll(2000):
        print('nobody')
        continue
    control = s.recvmsg(512, 512, socket.MSG_ERRQUEUE)[1]
    offender = control[0][2][16:]
    print(socket.inet_ntop(family, offender[8:24] if v6 else offender[4:8]))";
        let text = self.exec(&["python3", "-c", program, destination, &hops.to_string()]);
        text.lines().map(str::to_owned).collect()
    }

    /// Starts pinging.
    #[track_caller]
    #[must_use]
    pub fn pings(&self, destination: &str) -> Pings {
        Pings(self.spawn("ping", &["ping", "-n", "-q", "-i", "0.01", destination], &[]))
    }

    fn source(&self, protocol: &str, destination: &str, limit: Duration) -> Result<String, String> {
        let limit = limit.as_millis().to_string();
        let report = self.client(protocol, destination, &["--limit-ms", &limit]);
        let mut errors = report.errors.into_keys();
        let mut sources = report.sources.into_keys();
        sources.next().ok_or_else(|| errors.next().unwrap_or_else(|| "no answer".to_owned()))
    }

    fn client(&self, protocol: &str, destination: &str, more: &[&str]) -> Report {
        let helper = helper_path("peer");
        let mut words = vec![utf8(&helper), protocol, destination];
        words.extend(more);
        Report::parse(&self.exec(&words))
    }

    fn endless(&self, mode: &str, protocol: &str, destination: &str, interval: Duration) -> Stream {
        let helper = helper_path("peer");
        let interval = interval.as_millis().to_string();
        let words = [utf8(&helper), mode, protocol, destination, "--interval-ms", &interval];
        let mut process = self.spawn(&format!("{mode}-{protocol}"), &words, &[]);
        process.wait_stdout("running", Duration::from_secs(10));
        Stream(process)
    }
}

/// The number in front of a word of ping's summary.
fn number_before(summary: &str, word: &str) -> u32 {
    let words = summary.split(|c: char| c.is_whitespace() || c == ',').filter(|word| !word.is_empty());
    let words: Vec<_> = words.collect();
    let at = words.iter().position(|candidate| *candidate == word);
    at.and_then(|at| words.get(at.checked_sub(1)?)?.parse().ok())
        .unwrap_or_else(|| panic!("ping said nothing of {word}: {summary}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_counted() {
        let head = "PING 203.0.113.10 (203.0.113.10) 56(84) bytes of data.\n\n--- ping statistics ---\n";
        let text = format!("{head}5 packets transmitted, 3 received, 40% packet loss, time 800ms\n");
        assert_eq!((number_before(&text, "packets"), number_before(&text, "received")), (5, 3));
        let text = format!("{head}2 packets transmitted, 0 received, +2 errors, 100% packet loss\n");
        assert_eq!(number_before(&text, "received"), 0);
    }
}
