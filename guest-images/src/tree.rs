//! A file tree in memory, before it becomes an initramfs or a file system image.
//!
//! Paths are relative to the root of the image and kept in order, so that a directory always stands before what it
//! contains and the same content always gives the same image.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, Result};

/// One entry of a [`Tree`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory with its permission bits.
    Dir {
        /// Permission bits.
        mode: u32,
    },
    /// A file whose content is given here.
    Bytes {
        /// Permission bits.
        mode: u32,
        /// Content.
        data: Vec<u8>,
    },
    /// A file that is copied from the host when the image is written.
    Host {
        /// Permission bits.
        mode: u32,
        /// Where it lies on the host.
        path: PathBuf,
    },
    /// A symbolic link and what it points to.
    Symlink {
        /// Content of the link.
        target: String,
    },
}

/// A file tree.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// Returns an empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the entries, directories before what they contain.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// Returns the entry at `path`.
    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path.trim_start_matches('/'))
    }

    /// Adds a directory with mode 755 and its parents; one that is there stays as it is.
    pub fn dir(&mut self, path: &str) -> Result<()> {
        let path = normal(path)?;
        self.parents(&path);
        self.nodes.entry(path).or_insert(Node::Dir { mode: 0o755 });
        Ok(())
    }

    /// Adds a file with the given content, replacing what stood there.
    pub fn bytes(&mut self, path: &str, mode: u32, data: impl Into<Vec<u8>>) -> Result<()> {
        self.put(path, Node::Bytes { mode, data: data.into() })
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.put(path, Node::Symlink { target: target.to_owned() })
    }

    /// Adds the file `host` of the host at `path`, or, if it is a directory, all that is in it. Links are followed.
    pub fn host(&mut self, path: &str, host: &Path) -> Result<()> {
        let meta = fs::metadata(host).map_err(Error::io("read", host))?;
        if !meta.is_dir() {
            let mode = meta.permissions().mode() & 0o7777;
            return self.put(path, Node::Host { mode, path: host.to_owned() });
        }
        self.dir(path)?;
        for entry in fs::read_dir(host).map_err(Error::io("list", host))? {
            let entry = entry.map_err(Error::io("list", host))?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                return Err(Error::Path { path: format!("{name:?}"), reason: "not UTF-8" });
            };
            self.host(&format!("{path}/{name}"), &entry.path())?;
        }
        Ok(())
    }

    /// Adds a program of the host at `path` together with the shared libraries it needs, each library at the path
    /// where the host's dynamic loader finds it.
    pub fn program(&mut self, path: &str, host: &Path) -> Result<()> {
        self.host(path, host)?;
        for library in libraries(host)? {
            let Some(at) = library.to_str() else {
                return Err(Error::Path { path: library.display().to_string(), reason: "not UTF-8" });
            };
            self.host(at, &library)?;
        }
        Ok(())
    }

    /// Adds all entries of `other`; where both have a path, `other` wins.
    pub fn merge(&mut self, other: &Tree) {
        self.nodes.extend(other.nodes.iter().map(|(path, node)| (path.clone(), node.clone())));
    }

    /// Writes the tree into the directory `root`, which must be there.
    pub fn write_to(&self, root: &Path) -> Result<()> {
        for (path, node) in self.iter() {
            let at = root.join(path);
            match node {
                Node::Dir { mode } => {
                    fs::create_dir_all(&at).map_err(Error::io("create", &at))?;
                    set_mode(&at, *mode)?;
                }
                Node::Bytes { mode, data } => {
                    fs::write(&at, data).map_err(Error::io("write", &at))?;
                    set_mode(&at, *mode)?;
                }
                Node::Host { mode, path } => {
                    fs::copy(path, &at).map_err(Error::io("copy", path))?;
                    set_mode(&at, *mode)?;
                }
                Node::Symlink { target } => symlink(target, &at).map_err(Error::io("create", &at))?,
            }
        }
        Ok(())
    }

    fn put(&mut self, path: &str, node: Node) -> Result<()> {
        let path = normal(path)?;
        if path.is_empty() {
            return Err(Error::Path { path, reason: "it is the root" });
        }
        self.parents(&path);
        self.nodes.insert(path, node);
        Ok(())
    }

    fn parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            self.nodes.entry(path[..at].to_owned()).or_insert(Node::Dir { mode: 0o755 });
        }
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::io("set the mode of", path))
}

/// Returns `path` without leading, trailing and doubled slashes; refuses `.` and `..`.
fn normal(path: &str) -> Result<String> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    if parts.iter().any(|p| *p == "." || *p == "..") {
        return Err(Error::Path { path: path.to_owned(), reason: "it has . or .. in it" });
    }
    if path.contains('\0') {
        return Err(Error::Path { path: path.to_owned(), reason: "it has a NUL in it" });
    }
    Ok(parts.join("/"))
}

/// Returns the shared libraries and the loader that a program of the host needs; empty for a static program and for
/// anything that is not an ELF file.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = match Command::new("ldd").arg(program).output() {
        Ok(output) => output,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(Error::Missing { what: "ldd".into(), package: "libc-bin" });
        }
        Err(e) => return Err(Error::io("run", "ldd")(e)),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|l| l.contains("not found")) {
        return Err(Error::Program {
            program: format!("ldd {}", program.display()),
            status: output.status.to_string(),
            output: line.trim().to_owned(),
        });
    }
    Ok(parse_ldd(&text))
}

/// Takes the paths out of what `ldd` prints: the word after `=>`, or the only word if that is a path.
fn parse_ldd(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let path = match line.split_once("=>") {
                Some((_, right)) => right,
                None => line,
            };
            path.split_whitespace().next().filter(|p| p.starts_with('/')).map(PathBuf::from)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_stand_before_children() {
        let mut tree = Tree::new();
        tree.bytes("/usr/lib/x/file", 0o644, "x").unwrap();
        tree.symlink("bin", "usr/bin").unwrap();
        let paths: Vec<&str> = tree.iter().map(|(p, _)| p).collect();
        assert_eq!(paths, ["bin", "usr", "usr/lib", "usr/lib/x", "usr/lib/x/file"]);
    }

    #[test]
    fn paths_that_leave_the_image_are_refused() {
        let mut tree = Tree::new();
        assert!(matches!(tree.bytes("/a/../../etc/passwd", 0o644, ""), Err(Error::Path { .. })));
        assert!(matches!(tree.bytes("/", 0o644, ""), Err(Error::Path { .. })));
    }

    #[test]
    fn ldd_output_gives_libraries_and_loader() {
        let text = "\tlinux-vdso.so.1 (0x7ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f1)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x7f2)\n";
        let want = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_ldd(text), want);
        assert!(parse_ldd("\tnot a dynamic executable\n\tstatically linked\n").is_empty());
    }
}
