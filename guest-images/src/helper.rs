//! The helper VM: Debian's stock cloud kernel under QEMU's emulation (TCG), which emulates AMD-V with nested paging, so
//! that `/dev/kvm` works inside wherever this runs. Files of the host lie in it at the same paths with the libraries
//! they need; a job script runs as root; its output and exit status come back.
//!
//! ```no_run
//! # fn main() -> guest_images::Result<()> {
//! let done = guest_images::helper::HelperVm::new()
//!     .program("/usr/bin/fio")?
//!     .run("ls -l /dev/kvm && fio --version")?;
//! assert_eq!(done.status, 0, "{}", done.output);
//! # Ok(())
//! # }
//! ```

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::gate;
use crate::linux::{Initramfs, job_status};
use crate::modules::Kernel;
use crate::qemu::Qemu;
use crate::tree::Tree;
use crate::{Error, Result};

const WHAT: &str = "the helper VM";
/// How often a machine is started whose emulation failed; `docs/decisions/emulated-kvm.md` has what is known of that.
const STARTS: u32 = 3;
/// The exit status with which a job says that the emulated KVM failed it and that it wants another machine: EX_TEMPFAIL
/// of sysexits.h.
pub const AGAIN: i32 = 75;
/// Every job has this function: `again_if_kvm_failed STATUS CONSOLE ERRORS`, called after a monitor with a guest of its own
/// ended, exits with [`AGAIN`] if that guest crashed, or stood still until the monitor was told to end (which it does
/// with 0). Anything else is left to the job to judge.
const AGAIN_IF_KVM_FAILED: &str = "again_if_kvm_failed() {
    if grep -q 'triple fault' $3; then failed=crashed
    elif [ $1 = 0 ] && ! grep -q VCP-JOB-EXIT= $2; then failed='stood still'
    else return 0; fi
    echo \"the guest $failed; the last it said: $(tail -c 300 $2 | tr '\\r\\n' ' |')\"
    exit 75
}
";
/// Modules that ask the kernel's crypto interface for CRC32C when a connection starts; there is no modprobe inside.
const NEED_CRC32C: [&str; 2] = ["iscsi_tcp", "iscsi_target_mod"];

/// What a helper VM has and runs.
#[derive(Clone, Debug)]
pub struct HelperVm {
    tree: Tree,
    modules: Vec<String>,
    disks: Vec<PathBuf>,
    memory_mib: u32,
    cpus: u32,
    arguments: String,
    deadline: Duration,
    echo: bool,
}

/// How a job in the helper VM ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Exit status of the job script.
    pub status: i32,
    /// All that came over the serial console.
    pub output: String,
    /// From the start of QEMU to its end.
    pub elapsed: Duration,
}

impl Default for HelperVm {
    fn default() -> Self {
        Self::new()
    }
}

impl HelperVm {
    /// A machine with 3 CPUs, 3 GiB of memory, `kvm_amd`, virtio and 300 s to live.
    pub fn new() -> Self {
        Self {
            tree: Tree::new(),
            modules: vec!["kvm_amd".into(), "tun".into()],
            disks: Vec::new(),
            memory_mib: 3072,
            // Two for the CPUs of a guest inside, one for the channel processors: where they share one, guests fail more
            // often (docs/decisions/emulated-kvm.md).
            cpus: 3,
            arguments: String::new(),
            deadline: Duration::from_secs(300),
            echo: false,
        }
    }

    /// Copies a program of the host, with its libraries, to the same path. A file that is no program is copied as it is,
    /// a directory with all that is in it (but without libraries).
    pub fn program(self, path: impl AsRef<Path>) -> Result<Self> {
        let path = std::path::absolute(path.as_ref()).map_err(Error::io("find", path.as_ref()))?;
        let at = path.to_str().map(str::to_owned);
        let at = at.ok_or_else(|| Error::Path { path: path.display().to_string(), reason: "not UTF-8" })?;
        self.program_at(&path, &at)
    }

    /// Copies a program of the host, with its libraries, to the path `at`.
    pub fn program_at(mut self, host: &Path, at: &str) -> Result<Self> {
        if host.is_dir() {
            self.tree.host(at, host)?;
        } else {
            self.tree.program(at, host)?;
        }
        Ok(self)
    }

    /// Puts a file with this content at the path `at`.
    pub fn content(mut self, at: &str, mode: u32, data: impl Into<Vec<u8>>) -> Result<Self> {
        self.tree.bytes(at, mode, data)?;
        Ok(self)
    }

    /// Inserts a kernel module, with those it needs, before the job starts: `iscsi_tcp`, `target_core_mod`, ...
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        if NEED_CRC32C.contains(&name) {
            self.modules.extend(["crc32c_generic".to_owned(), "crc32c_intel".to_owned()]);
        }
        self.modules.push(name.to_owned());
        self
    }

    /// Attaches a raw image file as the next virtio disk (`/dev/vda`, `/dev/vdb`, ...), writable.
    #[must_use]
    pub fn disk(mut self, image: impl Into<PathBuf>) -> Self {
        self.disks.push(image.into());
        self
    }

    /// Sets the memory size in MiB. All copied files lie in it, twice while it boots.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Sets the number of CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Appends an argument to the kernel's command line.
    #[must_use]
    pub fn kernel_argument(mut self, argument: &str) -> Self {
        self.arguments.push(' ');
        self.arguments.push_str(argument);
        self
    }

    /// Sets the time after which the machine is killed and [`Error::Deadline`] is returned.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Copies the console to our standard error as it comes.
    #[must_use]
    pub fn echo(mut self, echo: bool) -> Self {
        self.echo = echo;
        self
    }

    /// Runs `script` (POSIX shell, busybox commands) and waits for its end. A machine that resets itself, or whose job
    /// ends with [`AGAIN`], is started again and the reader is told, so the script must be one that can be repeated;
    /// attached disks are then as the first run left them. The shell function `again_if_kvm_failed STATUS CONSOLE ERRORS`
    /// ends the job so where a guest inside failed.
    pub fn run(&self, script: &str) -> Result<Outcome> {
        let script = format!("{AGAIN_IF_KVM_FAILED}{script}");
        // A machine that emulates two CPUs, and a guest inside it, have enough with what a small host has: others of
        // this program's wait, and its deadline begins afterwards.
        let _alone = gate::alone();
        for start in 1.. {
            let started = Instant::now();
            let ended = self.start(&script)?.wait()?;
            let status = job_status(&ended.output);
            if let Some(status) = status.filter(|&status| status != AGAIN || start == STARTS) {
                return Ok(Outcome { status, output: ended.output, elapsed: started.elapsed() });
            }
            // QEMU was told not to reboot: an orderly end of it without the job's status is a reset.
            if status.is_none() && (!ended.status.success() || start == STARTS) {
                return Err(Error::NoStatus {
                    what: WHAT.into(),
                    status: ended.status.to_string(),
                    tail: crate::error::tail(&ended.output, 5),
                });
            }
            let what = if status.is_some() { "asks for another start" } else { "reset itself" };
            eprintln!(
                "{WHAT} {what} after start {start} of {STARTS}: {}",
                crate::error::tail(&ended.output, 4)
            );
        }
        unreachable!("the last start returns")
    }

    /// Starts the machine with `script` as its job and returns at once. It is killed when the calling thread ends.
    pub fn start(&self, script: &str) -> Result<Qemu> {
        let kernel = Kernel::find()?;
        let mut initramfs = Initramfs::new().tree(&self.tree).job(script)?;
        for module in &self.modules {
            initramfs = initramfs.module(module);
        }
        // With programs that are being worked on in it, it is another one each time: not kept in the cache.
        let initrd = initramfs.build_unnamed(&kernel)?;
        let mut args: Vec<String> = [
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-M",
            "q35",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]
        .map(str::to_owned)
        .to_vec();
        // QEMU's CPUs share one time-stamp counter, but cannot say so under TCG (no invariant TSC): the kernel would take
        // the HPET, a device, for every look at the clock, and KVM would move a guest's counter at each switch.
        args.extend([
            "-append".into(),
            format!("console=ttyS0 panic=-1 quiet tsc=reliable{}", self.arguments),
        ]);
        args.extend(["-smp".into(), self.cpus.to_string(), "-m".into(), self.memory_mib.to_string()]);
        args.extend(["-kernel".into(), kernel.image.display().to_string()]);
        let initrd_path = format!("/proc/{}/fd/{}", std::process::id(), initrd.as_raw_fd());
        args.extend(["-initrd".into(), initrd_path]);
        for (n, disk) in self.disks.iter().enumerate() {
            // In QEMU's option syntax a comma in a value is doubled.
            let file = disk.display().to_string().replace(',', ",,");
            args.extend(["-drive".into(), format!("file={file},if=none,id=disk{n},format=raw,cache=unsafe")]);
            args.extend(["-device".into(), format!("virtio-blk-pci,drive=disk{n}")]);
        }
        Ok(Qemu::start(WHAT, &args, self.deadline, self.echo)?.holding(initrd))
    }
}
