//! `cargo xtask fuzz`: runs the fuzz targets under `fuzz/` for a bounded time, corpus kept between runs.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cmd;

/// The instrumented build needs compiler flags that stable rustc refuses without this.
const BOOTSTRAP: (&str, &str) = ("RUSTC_BOOTSTRAP", "1");

fn targets() -> Result<Vec<String>> {
    let directory = cmd::root().join("fuzz/fuzz_targets");
    let mut names: Vec<String> = std::fs::read_dir(&directory)
        .with_context(|| format!("cannot read {}", directory.display()))?
        .filter_map(|entry| entry.ok()?.path().file_stem()?.to_str().map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

/// Runs one target, or all, `seconds` each.
///
/// # Errors
/// An unknown target, or a finding (the input is left under `fuzz/artifacts/`).
pub(crate) fn run(name: Option<&str>, seconds: u32) -> Result<()> {
    let all = targets()?;
    let chosen: Vec<&String> = match name {
        None => all.iter().collect(),
        Some(name) => {
            let found: Vec<_> = all.iter().filter(|target| target.as_str() == name).collect();
            if found.is_empty() {
                bail!("no fuzz target named {name}; there are: {}", all.join(", "));
            }
            found
        }
    };
    if Command::new("cargo-fuzz").arg("--version").output().is_err() {
        cmd::run(cmd::cargo().args(["install", "--locked", "cargo-fuzz"]))?;
    }
    for target in chosen {
        let time = format!("-max_total_time={seconds}");
        cmd::run(
            cmd::cargo()
                .args([
                    "fuzz",
                    "run",
                    "--sanitizer",
                    "none",
                    target,
                    "--",
                    &time,
                    "-rss_limit_mb=2048",
                    "-timeout=10",
                ])
                .env(BOOTSTRAP.0, BOOTSTRAP.1),
        )?;
    }
    Ok(())
}
