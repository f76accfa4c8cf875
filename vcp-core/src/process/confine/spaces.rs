//! Namespaces: users, mounts, IPC, host name. What a process may make without anybody's help; process ids and the network
//! are its starter's to give.
//!
//! A process without rights gets them inside a user namespace of its own, in which it is root over nothing but itself.
//! With them it builds a root directory that holds the few files it needs, goes there, and drops what was above. Landlock
//! says the same about files once more; each holds where the other has a hole.
#![allow(unsafe_code)] // `unshare` is unsafe for flags that are not used here.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use rustix::process::{chdir, getegid, geteuid, pivot_root};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, unshare_unsafe};

use super::{Confinement, Report};

/// Where the new root is put together: a directory that every system has. What is in it is not reachable afterwards.
const STAGE: &str = "/tmp";

pub(super) fn apply(confinement: &Confinement, report: &mut Report) {
    let may = |capability| capabilities(None).is_ok_and(|sets| sets.effective.contains(capability));
    if !may(CapabilitySet::SYS_ADMIN) {
        let own = own_users();
        let failed = own.is_err();
        report.note("own user namespace", own);
        if failed {
            report.missing.push("own mount, IPC and UTS namespaces: they need a user namespace".into());
            return;
        }
    }
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: none of the flags touches memory or descriptors of this process.
    let unshared = unsafe { unshare_unsafe(flags) };
    let failed = unshared.is_err();
    report.note("own mount, IPC and UTS namespaces", unshared);
    if !failed {
        report.note("a root directory with nothing but what it needs", new_root(confinement));
    }
}

/// A user namespace in which this process is root, and outside who it was.
fn own_users() -> io::Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    // SAFETY: the flag touches no memory, no descriptor.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER)? };
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1\n"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1\n"))
}

fn new_root(confinement: &Confinement) -> io::Result<()> {
    let stage = Path::new(STAGE);
    let here = std::env::current_dir().unwrap_or_else(|_| "/".into());
    // What is named must be found before its place is covered.
    let needed = [&confinement.read, &confinement.write, &confinement.remove];
    let paths: Vec<PathBuf> = needed
        .into_iter()
        .flatten()
        .filter_map(|path| fs::canonicalize(path).ok().map(|_| path.clone()))
        .collect();
    let sources = paths.iter().map(|path| -> io::Result<_> {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        Ok((
            std::path::absolute(path)?,
            rustix::fs::open(path, flags, rustix::fs::Mode::empty())?,
            path.is_dir(),
        ))
    });
    let mut sources = sources.collect::<io::Result<Vec<_>>>()?;
    // A directory before what is in it.
    sources.sort_by(|(a, ..), (b, ..)| a.cmp(b));
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("vcp", stage, "tmpfs", flags, c"size=64k,mode=755")?;
    for (n, (path, source, is_dir)) in sources.iter().enumerate() {
        // It came along with its directory, or it is named twice. To make its place once more would be to do that to the
        // host's own file.
        if sources[..n].iter().any(|(above, ..)| path.starts_with(above)) {
            continue;
        }
        let place = stage.join(path.strip_prefix("/").unwrap_or(path));
        if *is_dir {
            fs::create_dir_all(&place)?;
        } else {
            if let Some(parent) = place.parent() {
                fs::create_dir_all(parent)?;
            }
            // Whatever the path looks like: nothing that exists is opened for writing.
            fs::File::create_new(&place)?;
        }
        mount_bind_recursive(format!("/proc/self/fd/{}", source.as_raw_fd()), &place)?;
    }
    chdir(stage)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    // Paths that were given relative to it are still good, if they are there at all.
    chdir(&here).or_else(|_| chdir("/"))?;
    match mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | flags, "") {
        // Where the kernel does not let the flags be changed, what can be written is 64 KiB of its own memory.
        Err(Errno::PERM) | Ok(()) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
