//! Several ways to one unit: the arguments for them, and `--paths all`, which asks the target for its portals.

use std::str::FromStr;

use clap::{Args, ValueEnum};

use crate::cli::Private;
use crate::discover;
use crate::portal::options::PathPolicy;
use crate::portal::probe::UnitId;
use crate::portal::{MAX_PATHS, Options};
use crate::url::{Portal, Url};

/// Which paths are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PathsFrom {
    /// Those that are given
    #[default]
    Given,
    /// Besides, every portal that SendTargets names for the target
    All,
}

/// Arguments of `serve` about paths.
#[derive(Args, Clone, Debug)]
pub struct PathArgs {
    /// A further way to the same unit: another portal, or another target; may be repeated
    #[arg(long = "path", value_name = "URL", conflicts_with = "disk")]
    pub path: Vec<Private>,
    /// Which paths to take
    #[arg(long = "paths", value_enum, default_value_t)]
    pub from: PathsFrom,
    /// Sessions with each portal
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MAX_PATHS as i64))]
    pub sessions: u16,
    /// How commands are spread over paths that are equally good
    #[arg(long, value_enum, default_value_t)]
    pub path_policy: PathPolicy,
    /// Refuse any other unit than the one with this designator (VPD page 83h), whatever its address is
    #[arg(long, value_name = "naa.HEX|eui.HEX|t10.TEXT", conflicts_with = "disk")]
    pub unit_id: Option<UnitId>,
}

/// What a `--disk` says about its paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathSpec {
    /// `path=URL`, each.
    pub urls: Vec<Url>,
    /// `paths=all`.
    pub all: bool,
    /// `sessions=N`.
    pub sessions: Option<u16>,
    /// `unit-id=ID`.
    pub unit_id: Option<UnitId>,
}

impl PathSpec {
    /// Takes one `KEY=VALUE` of a specification; `Ok(false)` if it is about something else. The errors do not repeat the
    /// value.
    ///
    /// # Errors
    /// What is wrong with the value.
    pub fn take(&mut self, key: &str, value: Option<&str>) -> Result<bool, String> {
        match (key, value) {
            ("path", Some(url)) => {
                let url = url.parse::<Url>().map_err(|error| format!("path: {error}"))?;
                self.urls.push(url);
            }
            ("paths", Some("all")) => self.all = true,
            ("sessions", Some(count)) => {
                let count = count.parse().ok().filter(|count| (1..=MAX_PATHS as u16).contains(count));
                self.sessions = Some(count.ok_or(format!("sessions must be 1 to {MAX_PATHS}"))?);
            }
            ("unit-id", Some(id)) => {
                self.unit_id = Some(UnitId::from_str(id).map_err(|error| format!("unit-id: {error}"))?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl PathArgs {
    /// The further paths of the command line.
    ///
    /// # Errors
    /// One is no URL.
    pub fn spec(&self) -> Result<PathSpec, String> {
        let urls = self.path.iter().map(Private::url).collect::<Result<_, _>>();
        let urls = urls.map_err(|error| format!("--path: {error}"))?;
        Ok(PathSpec { urls, all: false, sessions: None, unit_id: self.unit_id.clone() })
    }

    /// Sets what a disk's options say about paths; returns whether the target is to be asked for its portals.
    pub fn apply(&self, spec: PathSpec, options: &mut Options) -> bool {
        options.paths = spec.urls;
        for path in &mut options.paths {
            // What is not said is as in the first URL.
            path.target = path.target.take().or_else(|| options.url.target.clone());
            path.lun = path.lun.or(options.url.lun);
        }
        options.sessions = spec.sessions.unwrap_or(self.sessions);
        options.path_policy = self.path_policy;
        options.unit_id = spec.unit_id;
        spec.all || self.from == PathsFrom::All
    }
}

/// Adds every portal that the target names to the paths. Portals that cannot be asked are left to the paths given: they may
/// come back, and others may answer. Blocks for the time limits of connecting and logging in.
pub fn add_all(options: &mut Options) {
    for asked in options.each_path() {
        match discover::targets(&asked) {
            Ok(targets) => {
                let portals = targets
                    .into_iter()
                    .filter(|target| Some(&target.name) == asked.url.target.as_ref())
                    .flat_map(|target| target.addresses)
                    .map(|address| Portal { host: address.host, port: address.port });
                for portal in portals {
                    add(options, &asked.url, portal);
                }
                return;
            }
            Err(error) => {
                let error = vcp_core::process::chain(&*error);
                tracing::warn!(portal = %asked.url.portal, error, "the portal cannot be asked for the target's others");
            }
        }
    }
}

fn add(options: &mut Options, like: &Url, portal: Portal) {
    let unspecified = portal.host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_unspecified());
    let known = |url: &Url| url.portal == portal && url.target == like.target;
    if unspecified || known(&options.url) || options.paths.iter().any(known) {
        return;
    }
    tracing::info!(%portal, "another portal of the target");
    options.paths.push(Url { portal, ..like.clone() });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_a_specification() {
        let mut spec = PathSpec::default();
        assert_eq!(spec.take("path", Some("iscsi://b/iqn.a:b/0")), Ok(true));
        assert_eq!(spec.take("path", Some("iscsi://c")), Ok(true));
        assert_eq!(spec.take("sessions", Some("2")), Ok(true));
        assert_eq!(spec.take("unit-id", Some("naa.6000000000000001")), Ok(true));
        assert_eq!(spec.take("queues", Some("2")), Ok(false));
        assert_eq!(spec.take("paths", Some("some")), Ok(false));
        for (key, value) in [("path", "http://hush"), ("sessions", "0"), ("unit-id", "hush")] {
            let error = spec.take(key, Some(value)).unwrap_err();
            assert!(error.contains(key) && !error.contains("hush"), "{error}");
        }
    }

    #[test]
    fn portals_that_are_known_are_not_added_again() {
        let mut options = Options::new("iscsi://10.0.0.1/iqn.a:b/0".parse().unwrap());
        let url = options.url.clone();
        for host in ["10.0.0.1", "10.0.0.2", "10.0.0.2", "0.0.0.0", "::"] {
            add(&mut options, &url, Portal { host: host.into(), port: 3260 });
        }
        let hosts: Vec<_> = options.paths.iter().map(|url| url.portal.host.as_str()).collect();
        assert_eq!(hosts, ["10.0.0.2"]);
        assert_eq!((&options.paths[0].target, options.paths[0].lun), (&url.target, url.lun));
    }
}
