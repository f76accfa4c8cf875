//! `--switch`: ports and control socket of a switch with a name, in a directory where guests find it.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;
use vcp_core::process::named;

use super::PortArg;
use crate::port::PortSpec;
use crate::switch::PORTS_MAX;

/// Ports of a switch that was not told how many.
const PORTS: usize = 8;

/// A switch of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchArg {
    name: String,
    ports: usize,
    pairs: u16,
}

impl FromStr for SwitchArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default().to_owned();
        if !named::is_switch_name(&name) {
            return Err(format!("{name:?} is no name: letters, digits, '-', '_' and '.', at most 32"));
        }
        let mut switch = Self { name, ports: PORTS, pairs: 1 };
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match key {
                "ports" => {
                    let ports = value.parse().ok().filter(|ports| (1..=PORTS_MAX).contains(ports));
                    switch.ports = ports.ok_or(format!("`{part}`: 1 to {PORTS_MAX} ports"))?;
                }
                "queues" => switch.pairs = value.parse().map_err(|_| format!("`{part}`: not a number"))?,
                _ => return Err(format!("`{part}` is no option of a switch: ports=N, queues=N")),
            }
        }
        switch.spec().check()?;
        Ok(switch)
    }
}

impl SwitchArg {
    fn spec(&self) -> PortSpec {
        PortSpec { pairs: self.pairs, ..PortSpec::default() }
    }

    /// Its directory.
    ///
    /// # Errors
    /// There is no place for it, in words for the user.
    pub fn dir(&self) -> Result<PathBuf, String> {
        named::switch_dir(&self.name).ok_or_else(|| {
            format!(
                "there is no place for the switch {}: set XDG_RUNTIME_DIR or {}",
                self.name,
                named::SWITCHES_VARIABLE
            )
        })
    }

    /// Its ports.
    pub(super) fn ports(&self, dir: &Path) -> Vec<PortArg> {
        let port =
            |at| PortArg { path: named::port_socket(dir, at), fd: None, connect: false, spec: self.spec() };
        (0..self.ports).map(port).collect()
    }

    /// Makes the directory, for its owner only. One that is there is used if it is ours alone; a switch that runs in it is
    /// found by its sockets.
    ///
    /// # Errors
    /// It cannot be made, or others have a part in it.
    pub fn create_dir(&self) -> anyhow::Result<()> {
        let dir = self.dir().map_err(anyhow::Error::msg)?;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&dir).with_context(|| format!("cannot create the directory {}", dir.display()))?;
        check_own(&dir)
    }
}

/// Who can put sockets there, or reach them, is a neighbour of every guest.
fn check_own(dir: &Path) -> anyhow::Result<()> {
    let found =
        std::fs::symlink_metadata(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    let is_own = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw();
    if !is_own || found.mode() & 0o077 != 0 {
        anyhow::bail!("{} is not a directory of this user alone (mode 0700): remove it", dir.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_that_others_have_a_part_in_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let mode =
            |mode| std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o700);
        check_own(dir.path()).unwrap();
        mode(0o750);
        assert!(check_own(dir.path()).unwrap_err().to_string().contains("0700"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        mode(0o700);
        assert!(check_own(&link).is_err(), "a link");
    }

    #[test]
    fn a_switch_has_ports_in_its_directory() {
        let switch: SwitchArg = "lan,ports=3,queues=2".parse().unwrap();
        let ports = switch.ports(Path::new("/run/vcp-switch/lan"));
        assert_eq!(ports.len(), 3);
        assert_eq!(
            (ports[2].path.as_path(), ports[2].spec.pairs),
            (Path::new("/run/vcp-switch/lan/port2"), 2)
        );
        assert_eq!("lan".parse(), Ok(SwitchArg { name: "lan".into(), ports: PORTS, pairs: 1 }));
        for bad in ["", "../x", "lan,ports=0", "lan,ports=1000", "lan,queues=99", "lan,colour=red"] {
            assert!(bad.parse::<SwitchArg>().is_err(), "{bad}");
        }
    }
}
