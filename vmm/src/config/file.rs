//! The TOML file of a virtual machine: what may stand in it, and errors that say on which line what is wrong, and what was
//! probably meant.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::size::{CpuList, Size};
use super::words::nearest;
use super::{DiskSpec, Endpoint, NetSpec, Transport};
use crate::error::{Error, Result};

/// Longest file; a wrong one (a disk image, say) is not read to its end.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A virtual machine as its TOML file describes it. Everything is optional here, since options may give the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmFile {
    /// What the guest is called in logs, metrics and `vcp top`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// bzImage or ELF file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Snapshot to go on with instead of booting a kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore: Option<PathBuf>,
    /// Initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; `console=ttyS0` is added where it names no console.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Guest memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// Number of vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u8>,
    /// Back the memory with huge pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<bool>,
    /// NUMA node that the memory comes from; that of the VCPs if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_node: Option<usize>,
    /// `pci` or `mmio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
    /// Host CPUs for vCPU threads, e.g. `0,2-3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu_cpus: Option<CpuList>,
    /// Socket of the API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_socket: Option<PathBuf>,
    /// Where metrics are served: `ADDR:PORT` or `unix:PATH`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Endpoint>,
    /// What is logged; `--log` and `RUST_LOG` override it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
    /// Log JSON objects, one a line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_json: Option<bool>,
    /// The `vcp-iscsi` program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcp_iscsi: Option<PathBuf>,
    /// The `vcp-net` program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcp_net: Option<PathBuf>,
    /// Block devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<DiskSpec>,
    /// Network devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetSpec>,
}

impl VmFile {
    /// Reads a TOML file. Relative paths in it are relative to the directory that it lies in.
    pub fn load(path: &Path) -> Result<Self> {
        let config = |reason| Error::Config { path: path.to_owned(), reason };
        let text = read(path).map_err(|source| Error::File {
            action: "read the configuration",
            path: path.to_owned(),
            source,
        })?;
        let mut file = Self::parse(&text).map_err(config)?;
        file.resolve(path.parent().unwrap_or(Path::new("")));
        Ok(file)
    }

    /// Reads the text of a TOML file; an error is one line, which begins with the number of the wrong one.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let file: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map(|span| line_of(text, span.start));
            let message = suggest(e.message());
            line.map_or(message.clone(), |line| format!("line {line}: {message}"))
        })?;
        // The syntax alone does not say these. The headers of a list are in the order of its entries.
        let disks = file.disk.iter().map(DiskSpec::validate);
        let nets = file.net.iter().map(NetSpec::validate);
        check_each(text, "disk", disks)?;
        check_each(text, "net", nets)?;
        Ok(file)
    }

    /// Makes relative paths relative to `base`.
    fn resolve(&mut self, base: &Path) {
        if let Some(Endpoint::Unix(path)) = &mut self.metrics {
            *path = base.join(&*path);
        }
        let own = [
            &mut self.kernel,
            &mut self.restore,
            &mut self.initrd,
            &mut self.api_socket,
            &mut self.vcp_iscsi,
            &mut self.vcp_net,
        ];
        let disks = self.disk.iter_mut().map(|disk| &mut disk.socket);
        let nets = self.net.iter_mut().map(|net| &mut net.socket);
        for path in own.into_iter().chain(disks).chain(nets).flatten() {
            *path = base.join(&*path);
        }
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        let reason = format!("it has more than {MAX_FILE_BYTES} bytes: this is no description of a machine");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, reason));
    }
    Ok(text)
}

/// The number of the line with the byte at `at`.
fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

/// The first failed check, with the line of its entry's header `[[list]]` if the list is written so.
fn check_each(
    text: &str,
    list: &str,
    checks: impl Iterator<Item = std::result::Result<(), String>>,
) -> std::result::Result<(), String> {
    let is_header = |line: &str| {
        let name = line.trim().strip_prefix("[[").and_then(|rest| rest.split("]]").next());
        name.is_some_and(|name| name.trim() == list)
    };
    let mut headers = text.lines().zip(1..).filter(|(line, _)| is_header(line)).map(|(_, number)| number);
    for check in checks {
        let header = headers.next();
        check.map_err(|reason: String| {
            header.map_or(reason.clone(), |line| format!("line {line}: {reason}"))
        })?;
    }
    Ok(())
}

/// An error of the parser on one line. One about an unknown key says what was probably meant instead of naming all keys.
fn suggest(message: &str) -> String {
    let message = message.replace('\n', " ");
    let Some(rest) = message.strip_prefix("unknown field ") else { return message };
    let names: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
    let Some((unknown, known)) = names.split_first() else { return message };
    match nearest(unknown, known) {
        Some(near) => format!("unknown key `{unknown}`: did you mean `{near}`?"),
        None => format!("unknown key `{unknown}`: there are {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_line_and_suggestion() {
        for (text, expected) in [
            ("kernel='k'\nmemroy='1G'\n", "line 2: unknown key `memroy`: did you mean `memory`?"),
            (
                "kernel='k'\n\n[[disk]]\nurl='iscsi://h/iqn.a:b/0'\nreadonly=true\n",
                "line 5: unknown key `readonly`: did you mean `read-only`?",
            ),
            ("[[net]]\nuser=true\n[[net]]\nhostfwd=['tcp::1-1']\ntap='t'\n", "line 3: hostfwd= needs user"),
            ("cpus=1\nvcpu-cpus='3-1'\n", "line 2: "),
            ("memory='5 apples'\n", "line 1: "),
            ("memory=-1\n", "line 1: "),
            ("cpus='x'\n", "line 1: "),
            ("cpus=300\n", "line 1: "),
            ("metrics='here'\n", "line 1: "),
            ("kernel='k'\nkernel='l'\n", "line 2: "),
            ("kernel='k\n", "line 1: "),
            ("[[net]]\nuser=true\nhostfwd=['x']\n", "line 3: "),
        ] {
            let error = VmFile::parse(text).unwrap_err();
            assert!(error.starts_with(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn what_has_no_near_key_gets_all_of_them() {
        let error = VmFile::parse("zzzzzzzz=1\n").unwrap_err();
        assert!(error.contains("there are name, kernel"), "{error}");
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        std::fs::write(
            &path,
            "kernel='k'\ninitrd='/i'\napi-socket='a'\nmetrics='unix:m'\n[[net]]\nsocket='n'\n",
        )
        .unwrap();
        let file = VmFile::load(&path).unwrap();
        let here = |name: &str| dir.path().join(name);
        assert_eq!(file.kernel, Some(here("k")));
        assert_eq!(file.initrd, Some("/i".into()));
        assert_eq!(file.api_socket, Some(here("a")));
        assert_eq!(file.metrics, Some(Endpoint::Unix(here("m"))));
        assert_eq!(file.net[0].socket, Some(here("n")));
    }

    #[test]
    fn a_file_that_is_too_long_is_not_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 40).unwrap();
        let error = VmFile::load(file.path()).unwrap_err();
        assert!(crate::chain(&error).contains("no description"), "{error:?}");
    }
}
