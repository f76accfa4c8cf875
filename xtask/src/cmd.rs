//! Runs other programs for the tasks: prints what is run, fails with what failed. Output goes to the terminal;
//! what a task has to read (figures, versions) is captured by [`output`].

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The workspace's root directory.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Cargo's target directory of this workspace.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Runs a command to its end.
///
/// # Errors
/// It could not be started, or did not exit with 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let text = shown(command);
    eprintln!("+ {text}");
    let status = command.status().with_context(|| format!("cannot start `{text}`"))?;
    if !status.success() {
        bail!("`{text}` ended with {status}");
    }
    Ok(())
}

/// Runs a command quietly and returns its standard output.
///
/// # Errors
/// As [`run`]; the command's standard error is part of the message.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let text = shown(command);
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{text}`"))?;
    if !out.status.success() {
        bail!("`{text}` ended with {}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Builds the programs as users run them and returns the directory that they are in.
///
/// # Errors
/// They do not build.
pub(crate) fn release_programs() -> Result<PathBuf> {
    run(cargo().args([
        "build",
        "--release",
        "-p",
        "vmm",
        "-p",
        "vcp-iscsi",
        "-p",
        "vcp-net",
        "-p",
        "iscsi-target",
    ]))?;
    Ok(target_dir().join("release"))
}
