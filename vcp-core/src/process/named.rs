//! Where a switch that has a name is found by those who want to join it: a directory with a socket for each of its ports.

use std::path::{Path, PathBuf};

/// Sets the directory that has the directories of switches.
pub const SWITCHES_VARIABLE: &str = "VCP_SWITCHES";
/// The control socket in a switch's directory.
pub const CONTROL: &str = "control";
/// Longest name of a switch.
const MAX_NAME: usize = 32;

/// Whether a switch can have this name: letters, digits, `-`, `_` and `.`, 32 at most, not with `-` or `.` in front.
#[must_use]
pub fn is_switch_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=MAX_NAME).contains(&name.len()) && name.chars().all(good) && !name.starts_with(['-', '.'])
}

/// The directory of the switch of this name: below `$VCP_SWITCHES`, else below `/run/vcp-switch` for root, and below
/// `$XDG_RUNTIME_DIR/vcp-switch` for others. None where an ordinary user has no such directory.
#[must_use]
pub fn switch_dir(name: &str) -> Option<PathBuf> {
    let base = match std::env::var_os(SWITCHES_VARIABLE).filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None if rustix::process::geteuid().is_root() => PathBuf::from("/run/vcp-switch"),
        None => PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())?)
            .join("vcp-switch"),
    };
    Some(base.join(name))
}

/// The socket of port number `at` in a switch's directory.
#[must_use]
pub fn port_socket(dir: &Path, at: usize) -> PathBuf {
    dir.join(format!("port{at}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_no_paths_and_no_options() {
        assert!(is_switch_name("lan.1"));
        for bad in ["", "..", "-x", "a/b", "a b", "x,y", &"x".repeat(33)] {
            assert!(!is_switch_name(bad), "{bad}");
        }
    }
}
