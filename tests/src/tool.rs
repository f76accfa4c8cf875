//! Programs that the tests need: those of the system, by name, and our own, built beforehand.
//!
//! A test whose system programs are missing is skipped with a printed reason; with `VCP_REQUIRE_TOOLS=1` (set where
//! everything is installed) it fails instead. Our own programs must be there: they are looked for in `$VCP_BIN_DIR`,
//! else beside the running test program.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};

use crate::Result;

/// Returns `$PATH` with the system directories, where Debian keeps tgtd and mkfs.
pub fn search_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    path
}

/// Returns the path of a system program.
pub fn find(name: &str) -> Option<PathBuf> {
    env::split_paths(&search_path()).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Whether all of these system programs are there; if not, says so, and panics under `VCP_REQUIRE_TOOLS=1`.
pub fn have(names: &[&str]) -> bool {
    let missing: Vec<&str> = names.iter().copied().filter(|name| find(name).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    skip(&format!("not installed: {}", missing.join(", ")));
    false
}

/// Says why a test is skipped for something missing; panics under `VCP_REQUIRE_TOOLS=1`.
pub fn skip(reason: &str) {
    assert!(env::var_os("VCP_REQUIRE_TOOLS").is_none_or(|v| v != "1"), "VCP_REQUIRE_TOOLS=1, but {reason}");
    note_skip(reason);
}

/// Says why a test is skipped where the host cannot run it, whatever is installed.
pub fn note_skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    eprintln!("SKIPPED {test}: {reason}");
}

/// Returns the path of one of our own programs.
pub fn ours(name: &str) -> Result<PathBuf> {
    let dir = match env::var_os("VCP_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let exe = env::current_exe().context("find the running test program")?;
            // target/debug/deps/e2e-HASH; the programs lie one directory up.
            exe.ancestors().nth(2).context("the test program has no directory")?.to_owned()
        }
    };
    let path = dir.join(name);
    if !path.is_file() {
        bail!("{} is not built: run `cargo build --bins`, or set VCP_BIN_DIR to where it is", path.display());
    }
    Ok(path)
}
