//! The node's resolv.conf (resolv.conf(5)): which resolvers pods without cluster DNS are given, and whom the agent asks.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Where systemd-resolved lists the resolvers behind its stub (systemd-resolved.service(8), "/ETC/RESOLV.CONF"); the
/// kubelet gives pods this file then.
const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";

/// The file, as it was last read.
#[derive(Debug)]
pub struct ResolvConf {
    path: PathBuf,
    behind_stub: PathBuf,
    text: String,
    nameservers: Vec<IpAddr>,
}

impl ResolvConf {
    /// Reads the file; one that is not there is empty.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        Self::open_with(path, Path::new(BEHIND_STUB))
    }

    fn open_with(path: &Path, behind_stub: &Path) -> Self {
        let mut read = Self {
            path: path.to_path_buf(),
            behind_stub: behind_stub.to_path_buf(),
            text: String::new(),
            nameservers: Vec::new(),
        };
        read.reread();
        read
    }

    /// Reads it again. Whether other nameservers are in it. Read rather than watched: it is small, and often a link, or
    /// replaced, or mounted over.
    pub fn reread(&mut self) -> bool {
        let read = |path: &Path| std::fs::read_to_string(path).ok();
        let mut text = read(&self.path).unwrap_or_default();
        if !parse(&text).is_empty() && parse(&text).iter().all(IpAddr::is_loopback) {
            // The stub is no pod's resolver.
            text = read(&self.behind_stub).unwrap_or(text);
        }
        if text == self.text {
            return false;
        }
        let before = std::mem::replace(&mut self.nameservers, parse(&text));
        self.text = text;
        before != self.nameservers
    }

    /// Its nameservers, in order. Loopback ones only if there are no others: the agent can ask them, pods cannot.
    #[must_use]
    pub fn nameservers(&self) -> &[IpAddr] {
        &self.nameservers
    }
}

/// The nameservers; those on loopback only if there are no others. An address with a zone (`fe80::1%eth0`) is a
/// neighbour's, whom pods do not reach.
fn parse(text: &str) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() == Some("nameserver")
            && let Some(ip) = words.next().and_then(|word| word.parse::<IpAddr>().ok())
            && !ip.is_unspecified()
            && !found.contains(&ip)
        {
            found.push(ip);
        }
    }
    if found.iter().any(|ip| !ip.is_loopback()) {
        found.retain(|ip| !ip.is_loopback());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let text = "# nameserver 192.0.2.1\nsearch a b\nnameserver 192.0.2.2\n nameserver\t2001:db8::1 # x\n\
                    nameserver fe80::1%eth0\nnameserver 192.0.2.2\nnameserver 127.0.0.1\nnameservers 192.0.2.3\nnameserver\n";
        assert_eq!(parse(text), ["192.0.2.2", "2001:db8::1"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert_eq!(parse("nameserver 127.0.0.53\n"), ["127.0.0.53".parse::<IpAddr>().unwrap()]);
        assert_eq!(parse(""), Vec::<IpAddr>::new());
    }

    #[test]
    fn it_is_read_again_when_it_changes() {
        let dir = std::env::temp_dir().join(format!("outgate-resolv-conf-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (path, behind) = (dir.join("resolv.conf"), dir.join("behind"));
        let servers =
            |conf: &ResolvConf| conf.nameservers().iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut conf = ResolvConf::open_with(&path, &behind);
        assert_eq!(conf.nameservers(), [] as [IpAddr; 0]);
        assert!(!conf.reread());
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert!(conf.reread());
        assert!(!conf.reread());
        assert_eq!(servers(&conf), ["192.0.2.1"]);
        // A stub without a list behind it is asked itself.
        std::fs::write(&path, "nameserver 127.0.0.53\n").unwrap();
        assert!(conf.reread());
        assert_eq!(servers(&conf), ["127.0.0.53"]);
        std::fs::write(&behind, "nameserver 192.0.2.9\n").unwrap();
        assert!(conf.reread());
        assert_eq!(servers(&conf), ["192.0.2.9"]);
        std::fs::write(&behind, "nameserver 192.0.2.9\n# by resolved\n").unwrap();
        assert!(!conf.reread(), "the same nameservers are no news");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
