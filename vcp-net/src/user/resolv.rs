//! What the host's `resolv.conf` says (resolv.conf(5)): name servers and domains. It is read again when it has changed.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::tcp::Ms;

/// Where it is.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How often is looked whether it has changed, at most.
const LOOK_MS: Ms = 1_000;
/// Servers and domains that are used at most.
const MOST: usize = 8;

/// See the module.
#[derive(Debug)]
pub struct Resolver {
    path: PathBuf,
    fixed: bool,
    looked: Option<Ms>,
    read: Option<(SystemTime, u64)>,
    /// Name servers, in their order.
    pub servers: Vec<IpAddr>,
    /// Domains in which names are looked for.
    pub search: Vec<String>,
    /// How often it was read.
    pub reads: u64,
}

impl Resolver {
    /// What the file at `path` says; of `servers` instead of those in it, if there are any.
    #[must_use]
    pub fn new(path: &Path, servers: &[IpAddr]) -> Self {
        let mut this = Self {
            path: path.into(),
            fixed: !servers.is_empty(),
            looked: None,
            read: None,
            servers: servers.into(),
            search: Vec::new(),
            reads: 0,
        };
        this.look(0);
        this
    }

    /// Reads the file if it has changed.
    pub fn look(&mut self, now: Ms) {
        if self.looked.is_some_and(|looked| now < looked + LOOK_MS) {
            return;
        }
        self.looked = Some(now);
        let Ok(meta) = std::fs::metadata(&self.path) else { return };
        let state = meta.modified().ok().map(|at| (at, meta.len()));
        if state.is_some() && state == self.read {
            return;
        }
        // What cannot be read leaves what was known.
        let Ok(text) = std::fs::read_to_string(&self.path) else { return };
        self.read = state;
        self.reads += 1;
        let (servers, search) = parse(&text);
        if !self.fixed {
            self.servers = servers;
        }
        self.search = search;
    }
}

fn parse(text: &str) -> (Vec<IpAddr>, Vec<String>) {
    let (mut servers, mut search) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            // Of link-local ones, the interface is of no use to others.
            Some("nameserver") => {
                let ip = words.next().and_then(|it| it.split('%').next()?.parse::<IpAddr>().ok());
                servers.extend(ip);
            }
            Some("search" | "domain") => {
                let good =
                    |it: &&str| *it != "." && it.len() <= 253 && it.bytes().all(super::dns::is_name_byte);
                search = words.filter(good).map(|it| it.trim_matches('.').to_owned()).take(MOST).collect();
            }
            _ => {}
        }
    }
    servers.truncate(MOST);
    (servers, search)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_the_file_is_seen_when_it_is_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut none = Resolver::new(&path, &[]);
        assert!(none.servers.is_empty());
        std::fs::write(&path, "# comment\nsearch example.org bad$name .\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\noptions x\n").unwrap();
        none.look(999);
        assert!(none.servers.is_empty());
        none.look(1000);
        assert_eq!(none.servers, ["192.0.2.1".parse::<IpAddr>().unwrap(), "fe80::1".parse().unwrap()]);
        assert_eq!(none.search, ["example.org"]);
        none.look(3000);
        assert_eq!(none.reads, 1);
        std::fs::write(&path, "nameserver 192.0.2.22\n").unwrap();
        none.look(5000);
        assert_eq!((none.servers.len(), none.search.len(), none.reads), (1, 0, 2));
        let fixed = Resolver::new(&path, &["192.0.2.9".parse().unwrap()]);
        assert_eq!(fixed.servers, ["192.0.2.9".parse::<IpAddr>().unwrap()]);
    }
}
