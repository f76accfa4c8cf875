//! What the tests share: our programs as commands, and what one clear error looks like.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use guest_images::helper::HelperVm;
use guest_images::linux;
use serde_json::Value;
use vcp_tests::proc::{Cmd, Output};
use vcp_tests::target::Chap;
use vcp_tests::{Result, tool};

/// How long a command that talks to a target that answers may take.
pub(crate) const COMMAND: Duration = Duration::from_secs(30);

/// How long the helper VM may take for one start, everything emulated: a guest that goes on slowly on a busy host is no
/// failure, so this is several times what a quiet one takes (40 s).
const HELPER: Duration = Duration::from_secs(600);

/// The helper VM with these programs of ours, and a Debian guest's kernel and initramfs under `/guest`.
pub(crate) fn helper_vm(programs: &[&str]) -> Result<HelperVm> {
    let guest = linux::guest()?;
    let mut helper = HelperVm::new()
        .program_at(&guest.kernel, "/guest/vmlinuz")?
        .program_at(&guest.initramfs, "/guest/initrd")?
        .deadline(HELPER);
    for program in programs {
        helper = helper.program_at(&tool::ours(program)?, &format!("/usr/bin/{program}"))?;
    }
    Ok(helper)
}

/// `vcp-iscsi` with these arguments.
pub(crate) fn vcp_iscsi<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Result<Cmd> {
    Ok(Cmd::new(tool::ours("vcp-iscsi")?).args(args))
}

/// `vcp` with these arguments.
pub(crate) fn vcp<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Result<Cmd> {
    Ok(Cmd::new(tool::ours("vcp")?).args(args))
}

/// Runs `vcp-iscsi` and demands success; returns its standard output.
pub(crate) fn output(args: &[&str]) -> Result<String> {
    vcp_iscsi(args)?.output(COMMAND)
}

/// Runs `vcp-iscsi ... --json` and parses it.
pub(crate) fn json(args: &[&str]) -> Result<Value> {
    let text = vcp_iscsi(args)?.arg("--json").output(COMMAND)?;
    serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
}

/// Checks that a command failed as every failure should look: this exit code, nothing on standard output that looks
/// like success, and one line on standard error that has all of these words.
pub(crate) fn one_error(out: &Output, code: i32, words: &[&str]) -> Result<()> {
    ensure!(out.status.code() == Some(code), "{} in place of exit code {code}: {}", out.status, out.stderr);
    ensure!(!out.stdout.contains("ready:"), "says that it is ready: {}", out.stdout);
    let lines: Vec<&str> = out.stderr.lines().collect();
    ensure!(lines.len() == 1, "not one line on standard error but {}:\n{}", lines.len(), out.stderr);
    for word in words {
        ensure!(
            lines[0].to_lowercase().contains(&word.to_lowercase()),
            "the error does not say {word:?}: {}",
            lines[0]
        );
    }
    Ok(())
}

/// Files with the secrets of a login, and the arguments that name them.
#[derive(Debug)]
pub(crate) struct SecretFiles {
    /// `--chap-user` and the like.
    pub(crate) args: Vec<String>,
    _dir: tempfile::TempDir,
}

impl SecretFiles {
    /// Writes them.
    pub(crate) fn new(chap: &Chap) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vcp-secrets-").tempdir()?;
        let mut args = vec!["--chap-user".into(), chap.user.clone(), "--chap-secret-file".into()];
        args.push(private(dir.path(), "chap", &chap.secret)?);
        if let Some((user, secret)) = &chap.mutual {
            args.extend(["--mutual-chap-user".into(), user.clone(), "--mutual-chap-secret-file".into()]);
            args.push(private(dir.path(), "mutual", secret)?);
        }
        Ok(Self { args, _dir: dir })
    }

    /// The arguments as string slices.
    pub(crate) fn args(&self) -> Vec<&str> {
        self.args.iter().map(String::as_str).collect()
    }
}

fn private(dir: &Path, name: &str, secret: &str) -> Result<String> {
    use std::os::unix::fs::PermissionsExt;
    let path: PathBuf = dir.join(name);
    std::fs::write(&path, format!("{secret}\n"))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(path.display().to_string())
}

/// All text values of a JSON document.
pub(crate) fn strings(value: &Value) -> Vec<String> {
    match value {
        Value::String(s) => vec![s.clone()],
        Value::Array(a) => a.iter().flat_map(strings).collect(),
        Value::Object(o) => o.values().flat_map(strings).collect(),
        _ => Vec::new(),
    }
}

/// The numbers that stand directly behind `key` in a text.
pub(crate) fn numbers(text: &str, key: &str) -> Vec<f64> {
    let number = |rest: &str| {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        rest[..end].parse().ok()
    };
    text.split(key).skip(1).filter_map(number).collect()
}

/// The middle and the largest of some numbers of milliseconds, in words.
pub(crate) fn spread(mut numbers: Vec<f64>) -> String {
    numbers.sort_by(f64::total_cmp);
    let at = |part: usize| numbers.get((numbers.len() * part / 100).min(numbers.len().saturating_sub(1)));
    let mut text = format!("{} times", numbers.len());
    for (name, part) in [("median", 50), ("p95", 95), ("p99", 99), ("largest", 100)] {
        if let Some(number) = at(part) {
            let _ = write!(text, ", {name} {number:.1} ms");
        }
    }
    text
}
