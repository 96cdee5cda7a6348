//! Real servers, each on a namespace of the lab, with its files in the lab's directory.

use std::fs;
use std::time::Duration;

use crate::command::Process;
use crate::family::endpoint;
use crate::lab::{Lab, helper_path, utf8};
use crate::netns::Netns;

/// The port of the lab's own server ([`Lab::echo`]), TCP and UDP.
pub const ECHO: u16 = 7777;

/// The port of [`Lab::iperf`].
pub const IPERF: u16 = 5201;

impl Lab {
    /// nginx on port 80: it answers `<client address> <client port>`, one connection a request.
    #[track_caller]
    #[must_use]
    pub fn nginx(&self, netns: &Netns) -> Process {
        let prefix = self.dir().join(format!("nginx-{}", netns.name()));
        fs::create_dir(&prefix).unwrap_or_else(|error| panic!("{}: {error}", prefix.display()));
        let config = prefix.join("nginx.conf");
        let listen6 = if self.v6 { "listen [::]:80 backlog=1024;" } else { "" };
        let content = "daemon off; master_process off; user root; pid nginx.pid; error_log stderr;
            events { worker_connections 2048; }
            http {
                access_log off; default_type text/plain; keepalive_timeout 0;
                client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
                uwsgi_temp_path uwsgi; scgi_temp_path scgi;
                server { listen 80 backlog=1024; LISTEN6 location / { return 200 \"$remote_addr $remote_port\\n\"; } }
            }"
        .replace("LISTEN6", listen6);
        fs::write(&config, content).unwrap_or_else(|error| panic!("{}: {error}", config.display()));
        let words = ["nginx", "-p", utf8(&prefix), "-c", utf8(&config), "-e", "stderr"];
        let process = netns.spawn("nginx", &words, &[]);
        netns.wait_listening("tcp", 80);
        process
    }

    /// The lab's own server on TCP and UDP port [`ECHO`]: it says whom it sees, then echoes.
    #[track_caller]
    #[must_use]
    pub fn echo(&self, netns: &Netns) -> Process {
        self.echo_on(netns, if self.v6 { "::" } else { "0.0.0.0" })
    }

    /// The same on one address of a host with several, which would answer datagrams from any of them.
    #[track_caller]
    #[must_use]
    pub fn echo_on(&self, netns: &Netns, address: &str) -> Process {
        let helper = helper_path("peer");
        let address = endpoint(address, ECHO);
        let mut process = netns.spawn("echo", &[utf8(&helper), "serve", &address], &[]);
        process.wait_stdout("ready", Duration::from_secs(10));
        process
    }

    /// `iperf3 -s` on port [`IPERF`].
    #[track_caller]
    #[must_use]
    pub fn iperf(&self, netns: &Netns) -> Process {
        let process = netns.spawn("iperf3", &["iperf3", "-s"], &[]);
        netns.wait_listening("tcp", IPERF);
        process
    }

    /// dnsmasq on port 53, which knows `web.example` only, by UDP and TCP.
    #[track_caller]
    #[must_use]
    pub fn dnsmasq(&self, netns: &Netns) -> Process {
        let answer = |address: &str| format!("--address=/web.example/{address}");
        let [v4, v6] = [answer(&self.web.address), answer(&self.web.address6)];
        if self.v6 { self.dnsmasq_with(netns, &[&v4, &v6]) } else { self.dnsmasq_with(netns, &[&v4]) }
    }

    /// dnsmasq on port 53, which knows what its further options say.
    #[track_caller]
    #[must_use]
    pub fn dnsmasq_with(&self, netns: &Netns, options: &[&str]) -> Process {
        let mut words = vec![
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--pid-file=",
            "--user=root",
            "--bind-interfaces",
        ];
        words.extend(options);
        let process = netns.spawn("dnsmasq", &words, &[]);
        netns.wait_listening("udp", 53);
        process
    }

    /// The lab's own resolver on an address and port, with what `dns serve --help` calls entries.
    #[track_caller]
    #[must_use]
    pub fn resolver_on<T: AsRef<str>>(
        &self,
        netns: &Netns,
        address: &str,
        port: u16,
        entries: &[T],
    ) -> Process {
        let helper = helper_path("dns");
        let address = endpoint(address, port);
        let entries: Vec<_> = entries.iter().map(AsRef::as_ref).collect();
        let words = [&[utf8(&helper), "serve", &address], &entries[..]].concat();
        let mut process = netns.spawn("dns", &words, &[]);
        process.wait_stdout("ready", Duration::from_secs(10));
        process
    }
}
