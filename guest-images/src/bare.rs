//! Builds the bare-metal guest, whose crate lies in `guest-images/bare` with a workspace, a lock file and linker
//! arguments of its own.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use crate::{Error, Result, cache};

/// Builds the guest (nothing is done where it is up to date) and returns the path of its ELF file.
///
/// Needs the sources of this workspace and cargo, both of which are there wherever this crate was built.
pub fn build() -> Result<PathBuf> {
    let source = cache::workspace().join("guest-images/bare");
    let target = cache::dir()?.join("bare");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(&source)
        .args(["build", "--release", "--locked", "--quiet", "--target-dir"])
        .arg(&target)
        // The directory is passed as an argument; flags for the host's programs do not suit a freestanding one.
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS");
    let output = command.output().map_err(Error::io("run cargo in", &source))?;
    if !output.status.success() {
        return Err(Error::Program {
            program: "cargo build of the bare-metal guest".into(),
            status: output.status.to_string(),
            output: crate::error::tail(&String::from_utf8_lossy(&output.stderr), 12),
        });
    }
    Ok(target.join("release/vcp-bare-guest"))
}
