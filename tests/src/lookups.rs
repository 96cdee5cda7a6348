//! Clients of resolvers in a namespace ([`crate::Lab::resolver_on`]), and what they report.

use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;

use crate::command::{Output, Process};
use crate::family::endpoint;
use crate::lab::{Lab, helper_path, utf8};
use crate::netns::Netns;
use crate::servers::ECHO;

/// What came of looking up and connecting at once, again and again.
#[derive(Debug, Clone)]
pub struct Rounds {
    /// Connections to answered addresses that worked.
    pub connected: u64,
    /// Look-ups and connections that did not, by reason.
    pub failed: Value,
    /// Addresses that were never answered and could be connected to.
    pub wrong: Value,
    /// Answers that were cut short, so that TCP was asked.
    pub truncated: u64,
    /// Addresses that were answered, each counted once.
    pub distinct: u64,
    /// The whole report.
    text: String,
}

impl Rounds {
    /// Panics unless every look-up gave addresses and each was connected to: `count` in all, of so many distinct
    /// ones; and nothing else was.
    #[track_caller]
    pub fn expect_all(&self, count: u64, distinct: u64) {
        let wrong = self.wrong.as_array().is_none_or(|wrong| !wrong.is_empty());
        let failed = self.failed.as_object().is_none_or(|failed| !failed.is_empty());
        assert!(!wrong && !failed, "{}", self.text);
        assert_eq!((self.connected, self.distinct), (count, distinct), "{}", self.text);
    }

    /// Panics unless there was an answer each time, and none of its addresses could be connected to.
    #[track_caller]
    pub fn expect_denied(&self) {
        assert!(self.connected == 0 && self.distinct > 0, "{}", self.text);
    }
}

impl Netns {
    /// Looks a name up and connects to the lab's server at each address of the answer, at once. `more`: options of
    /// `dns rounds`.
    #[track_caller]
    #[must_use]
    pub fn rounds(&self, server: &str, name: &str, count: u32, more: &[&str]) -> Rounds {
        let (helper, server) = (helper_path("dns"), endpoint(server, 53));
        let (port, count) = (ECHO.to_string(), count.to_string());
        let words =
            [&[utf8(&helper), "rounds", &server, name, "--port", &port, "--count", &count], more].concat();
        let text = self.exec(&words);
        let line = text.lines().rfind(|line| line.starts_with('{')).unwrap_or_default();
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {text}"));
        let number = |name: &str| value[name].as_u64().unwrap_or_default();
        Rounds {
            connected: number("connected"),
            failed: value["failed"].clone(),
            wrong: value["wrong"].clone(),
            truncated: number("truncated"),
            distinct: number("distinct"),
            text,
        }
    }

    /// Asks once and gives the addresses, or why there are none. `more`: options of `dns ask`.
    #[track_caller]
    pub fn ask(&self, server: &str, name: &str, more: &[&str]) -> Result<Vec<IpAddr>, String> {
        answered(&self.asking(server, name, more).wait(Duration::from_secs(20)))
    }

    /// Starts asking; [`answered`] reads what came of it.
    #[track_caller]
    #[must_use]
    pub fn asking(&self, server: &str, name: &str, more: &[&str]) -> Process {
        let (helper, server) = (helper_path("dns"), endpoint(server, 53));
        let words = [&[utf8(&helper), "ask", &server, name], more].concat();
        let mut process = self.spawn("ask", &words, &[]);
        process.wait_stdout("asking", Duration::from_secs(10));
        process
    }

    /// Runs a command with a resolver of its own, as a container has.
    #[track_caller]
    #[must_use]
    pub fn exec_with_resolver(&self, lab: &Lab, server: &str, words: &[&str]) -> Output {
        let path = lab.dir().join(format!("resolv-{}.conf", self.name()));
        let content = format!("nameserver {server}\noptions timeout:2 attempts:2\n");
        fs::write(&path, content).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let script = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
        let enter = ["unshare", "--mount", "sh", "-c", script, utf8(&path)];
        self.try_exec(&[&enter, words].concat())
    }
}

/// What came of [`Netns::asking`].
#[track_caller]
pub fn answered(output: &Output) -> Result<Vec<IpAddr>, String> {
    let text = output.clone().expect_success();
    let line = text.lines().rfind(|line| line.starts_with('{')).unwrap_or_default();
    let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {text}"));
    match value["addresses"].as_array() {
        Some(all) => Ok(all.iter().filter_map(|address| address.as_str()?.parse().ok()).collect()),
        None => Err(value["error"].to_string()),
    }
}
