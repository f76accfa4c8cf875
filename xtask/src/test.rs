//! `cargo xtask test`: set-up, then every test there is. What CI runs and what a newcomer runs are the same.

use anyhow::Result;

use crate::cmd;
use crate::packages::{self, Need};

/// Installs, builds, tests.
///
/// # Errors
/// The first step that failed.
pub(crate) fn run(filter: &[String]) -> Result<()> {
    packages::ensure(Need::Test)?;
    // The end-to-end tests start these; cargo builds a package's binaries only for the package's own tests.
    cmd::run(cmd::cargo().args(["build", "--workspace", "--bins"]))?;
    guest_images::bare::build()?;
    let mut test = cmd::cargo();
    test.args(["test", "--workspace", "--no-fail-fast"]);
    if !filter.is_empty() {
        test.arg("--").args(filter);
    }
    // A missing tool is a failure here, never a silent skip: set-up has just installed them all.
    cmd::run(test.env("VCP_REQUIRE_TOOLS", "1"))
}
