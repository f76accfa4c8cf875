//! Kernel modules: finds the installed kernel, and for a list of module names the files to insert, in order.
//!
//! Reads `modules.dep` and `modules.builtin` itself, so that neither `modprobe` nor its configuration on the host
//! decides what a guest loads.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

const PACKAGE: &str = "linux-image-cloud-amd64";

/// An installed Debian kernel and its modules.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// Kernel release, as `uname -r` prints it in the guest.
    pub version: String,
    modules: PathBuf,
    /// Module name to its file and the files it depends on, the furthest dependency last.
    deps: HashMap<String, Vec<PathBuf>>,
    builtin: HashSet<String>,
}

impl Kernel {
    /// Finds the newest installed cloud kernel whose modules are installed too.
    pub fn find() -> Result<Self> {
        Self::find_in(Path::new("/boot"), Path::new("/lib/modules"))
    }

    fn find_in(boot: &Path, lib: &Path) -> Result<Self> {
        let mut versions: Vec<String> = fs::read_dir(boot)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| Some(e.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
            .filter(|v| v.ends_with("-cloud-amd64") && lib.join(v).join("modules.dep").exists())
            .collect();
        versions.sort_by_key(|v| numbers(v));
        let Some(version) = versions.pop() else {
            let what = format!("{}/vmlinuz-*-cloud-amd64 with its modules", boot.display());
            return Err(Error::Missing { what, package: PACKAGE });
        };
        let modules = lib.join(&version);
        let read = |name: &str| {
            let path = modules.join(name);
            fs::read_to_string(&path).map_err(Error::io("read", path))
        };
        let deps = parse_dep(&read("modules.dep")?, &modules);
        let builtin = read("modules.builtin")?.lines().map(|l| module_name(Path::new(l))).collect();
        Ok(Self { image: boot.join(format!("vmlinuz-{version}")), version, modules, deps, builtin })
    }

    /// Returns the directory of the modules.
    pub fn modules_dir(&self) -> &Path {
        &self.modules
    }

    /// Returns the module files that have to be inserted for `names`, dependencies first, each once. Modules that are
    /// built into this kernel need no file.
    pub fn resolve<S: AsRef<str>>(&self, names: &[S]) -> Result<Vec<PathBuf>> {
        let mut order = Vec::new();
        for name in names {
            let name = name.as_ref().replace('-', "_");
            if self.builtin.contains(&name) {
                continue;
            }
            let Some(files) = self.deps.get(&name) else {
                return Err(Error::NoModule { module: name, version: self.version.clone() });
            };
            for file in files.iter().rev() {
                if !order.contains(file) {
                    order.push(file.clone());
                }
            }
        }
        Ok(order)
    }
}

/// The numbers in a version, for comparing: "6.1.0-56-cloud" sorts after "6.1.0-9-cloud".
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

/// Module name of a file: base name up to ".ko", with `-` as `_`.
fn module_name(path: &Path) -> String {
    let base = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    base.split(".ko").next().unwrap_or_default().replace('-', "_")
}

fn parse_dep(text: &str, dir: &Path) -> HashMap<String, Vec<PathBuf>> {
    text.lines()
        .filter_map(|line| {
            let (file, deps) = line.split_once(':')?;
            let files = std::iter::once(file).chain(deps.split_whitespace()).map(|f| dir.join(f)).collect();
            Some((module_name(Path::new(file)), files))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(dir: &Path) {
        for version in ["6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64"] {
            fs::create_dir_all(dir.join("lib").join(version)).unwrap();
            fs::create_dir_all(dir.join("boot")).unwrap();
            fs::write(dir.join("boot").join(format!("vmlinuz-{version}")), "").unwrap();
            let dep = "k/virtio-blk.ko: k/virtio.ko k/virtio_ring.ko\nk/virtio.ko: k/virtio_ring.ko\nk/virtio_ring.ko:\n";
            fs::write(dir.join("lib").join(version).join("modules.dep"), dep).unwrap();
            fs::write(dir.join("lib").join(version).join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n")
                .unwrap();
        }
    }

    #[test]
    fn newest_kernel_and_insert_order() {
        let dir = tempfile::tempdir().unwrap();
        fake(dir.path());
        let kernel = Kernel::find_in(&dir.path().join("boot"), &dir.path().join("lib")).unwrap();
        assert_eq!(kernel.version, "6.1.0-56-cloud-amd64");
        let files = kernel.resolve(&["virtio_blk", "virtio", "ext4"]).unwrap();
        let names: Vec<String> = files.iter().map(|f| module_name(f)).collect();
        assert_eq!(names, ["virtio_ring", "virtio", "virtio_blk"]);
        let missing = kernel.resolve(&["nvidia"]).unwrap_err().to_string();
        assert_eq!(missing, "kernel module nvidia is not in /lib/modules/6.1.0-56-cloud-amd64");
    }

    #[test]
    fn no_kernel_names_the_package() {
        let dir = tempfile::tempdir().unwrap();
        let error = Kernel::find_in(dir.path(), dir.path()).unwrap_err().to_string();
        assert!(error.ends_with("install the Debian package linux-image-cloud-amd64"), "{error}");
    }
}
