//! Stock QEMU (TCG) with Debian's stock cloud kernel, whose disks and networks are vhost-user sockets: real drivers on our
//! device models, on any machine. A job script runs in its initramfs; values come back as `@NAME=VALUE` lines.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use guest_images::gate::{self, Permit};
use guest_images::linux::{self, Initramfs};
use guest_images::modules::Kernel;
use guest_images::qemu::Qemu;
use guest_images::tree::Tree;

use crate::Result;

/// What stands before a value on the console.
const VALUE: char = '@';

/// A guest to be run.
#[derive(Clone, Debug)]
pub struct QemuGuest {
    disks: Vec<Disk>,
    nets: Vec<Net>,
    programs: Vec<String>,
    modules: Vec<String>,
    /// Further arguments of QEMU.
    arguments: Vec<String>,
    deadline: Duration,
}

#[derive(Clone, Debug)]
struct Net {
    behind: Behind,
    mac: String,
    /// Further properties of the device, each with a comma before it.
    properties: String,
}

/// What a network's frames go to.
#[derive(Clone, Debug)]
enum Behind {
    /// A vhost-user back end.
    Socket(PathBuf),
    /// One of QEMU's own, as `-netdev` has it without its name.
    Qemu(String),
}

#[derive(Clone, Debug)]
struct Disk {
    socket: PathBuf,
    queues: u16,
    /// Further properties of the device, each with a comma before it.
    properties: String,
    /// Whether QEMU connects again when the backend is gone.
    reconnects: bool,
}

/// What a guest's job left.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Exit status of the job.
    pub status: i32,
    /// Everything on the console.
    pub console: String,
}

impl Outcome {
    /// The value of `name`.
    pub fn value(&self, name: &str) -> Result<&str> {
        let mut lines = self.console.lines().rev();
        let found = lines.find_map(|l| l.trim().strip_prefix(VALUE)?.strip_prefix(name)?.strip_prefix('='));
        found.with_context(|| format!("the guest did not print {VALUE}{name}=:\n{}", self.console))
    }

    /// The value of `name` as a number.
    pub fn number(&self, name: &str) -> Result<u64> {
        let value = self.value(name)?;
        value.trim().parse().with_context(|| format!("{name} is {value:?}"))
    }
}

impl Default for QemuGuest {
    fn default() -> Self {
        Self::new()
    }
}

impl QemuGuest {
    /// A machine without disks and with 180 s to live.
    pub fn new() -> Self {
        Self {
            disks: Vec::new(),
            nets: Vec::new(),
            programs: Vec::new(),
            modules: Vec::new(),
            arguments: Vec::new(),
            deadline: Duration::from_secs(180),
        }
    }

    /// Adds the next network (`eth0`, ...), with further properties of the device (`packed=on`), each with a comma before
    /// it. QEMU connects again, every second, when its backend is gone.
    #[must_use]
    pub fn net(mut self, socket: &Path, mac: &str, properties: &str) -> Self {
        let behind = Behind::Socket(socket.to_owned());
        self.nets.push(Net { behind, mac: mac.into(), properties: properties.into() });
        self
    }

    /// Adds the next network, behind one of QEMU's own back ends: `-netdev` without `id=`.
    #[must_use]
    pub fn netdev(mut self, netdev: &str, mac: &str) -> Self {
        let behind = Behind::Qemu(netdev.to_owned());
        self.nets.push(Net { behind, mac: mac.into(), properties: String::new() });
        self
    }

    /// Adds arguments of QEMU.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&it| it.to_owned()));
        self
    }

    /// Inserts a module of the kernel's, with those that it needs.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// Adds the next disk (`/dev/vda`, ...), with this many queues.
    #[must_use]
    pub fn disk(mut self, socket: &Path, queues: u16) -> Self {
        self.disks.push(Disk {
            socket: socket.to_owned(),
            queues,
            properties: String::new(),
            reconnects: false,
        });
        self
    }

    /// Gives the last disk a further property (`packed=on`).
    #[must_use]
    pub fn property(mut self, property: &str) -> Self {
        if let Some(disk) = self.disks.last_mut() {
            disk.properties.push(',');
            disk.properties.push_str(property);
        }
        self
    }

    /// Has QEMU connect again, every second, when the last disk's backend is gone.
    #[must_use]
    pub fn reconnects(mut self) -> Self {
        if let Some(disk) = self.disks.last_mut() {
            disk.reconnects = true;
        }
        self
    }

    /// Sets the time after which the machine is killed.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Copies a program of the host into the guest, at the same path.
    #[must_use]
    pub fn program(mut self, path: &str) -> Self {
        self.programs.push(path.to_owned());
        self
    }

    /// Boots, runs `script` (POSIX shell, busybox) and waits for the end.
    pub fn run(&self, script: &str) -> Result<Outcome> {
        self.start(script)?.wait()
    }

    /// Boots and runs `script`.
    pub fn start(&self, script: &str) -> Result<Running> {
        let mut tree = Tree::new();
        for program in &self.programs {
            tree.program(program, Path::new(program))?;
        }
        let kernel = Kernel::find()?;
        let mut initramfs = Initramfs::new().tree(&tree).job(&format!("{PRELUDE}{script}"))?;
        for module in &self.modules {
            initramfs = initramfs.module(module);
        }
        let initrd = initramfs.build(&kernel)?;
        let mut args: Vec<String> = [
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-M",
            "q35,memory-backend=mem",
            "-smp",
            "2",
            "-m",
            "512",
            "-object",
            "memory-backend-memfd,id=mem,size=512M,share=on",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
            "-append",
            // On a busy host the kernel finds that an emulated timer does not tick, and gives up.
            "console=ttyS0 panic=-1 quiet no_timer_check",
        ]
        .map(str::to_owned)
        .to_vec();
        args.extend(["-kernel".into(), kernel.image.display().to_string()]);
        args.extend(["-initrd".into(), initrd.display().to_string()]);
        for (n, Disk { socket, queues, properties, reconnects }) in self.disks.iter().enumerate() {
            let reconnect = if *reconnects { ",reconnect=1" } else { "" };
            args.extend(["-chardev".into(), format!("socket,id=c{n},path={}{reconnect}", socket.display())]);
            let place = format!("num-queues={queues},addr={:#x}", n + 4);
            let device = format!("vhost-user-blk-pci,chardev=c{n},{place}{properties}");
            args.extend(["-device".into(), device]);
        }
        for (n, Net { behind, mac, properties }) in self.nets.iter().enumerate() {
            let netdev = match behind {
                Behind::Socket(socket) => {
                    let chardev = format!("socket,id=n{n},path={},reconnect=1", socket.display());
                    args.extend(["-chardev".into(), chardev]);
                    format!("vhost-user,id=v{n},chardev=n{n}")
                }
                Behind::Qemu(netdev) => format!("{netdev},id=v{n}"),
            };
            args.extend(["-netdev".into(), netdev]);
            // Without vectors: this QEMU dies of MSI-X with vhost-user networks where there is no KVM.
            let place = format!("vectors=0,romfile=,addr={:#x}", n + 0x10);
            args.extend([
                "-device".into(),
                format!("virtio-net-pci,netdev=v{n},mac={mac},{place}{properties}"),
            ]);
        }
        args.extend(self.arguments.iter().cloned());
        let permit = gate::shared();
        Ok(Running { qemu: Qemu::start("the QEMU guest", &args, self.deadline, false)?, _permit: permit })
    }
}

/// A guest whose job runs.
#[derive(Debug)]
pub struct Running {
    qemu: Qemu,
    _permit: Permit,
}

impl Running {
    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    /// Waits until the job printed the value `name`.
    pub fn wait_value(&mut self, name: &str) -> Result<()> {
        Ok(self.qemu.wait_for(&format!("{VALUE}{name}="))?)
    }

    /// Waits for the end of the job.
    pub fn wait(self) -> Result<Outcome> {
        let ended = self.qemu.wait()?;
        match linux::job_status(&ended.output) {
            Some(status) => Ok(Outcome { status, console: ended.output }),
            None => bail!("the guest's job did not end: {}:\n{}", ended.status, ended.output),
        }
    }
}

/// `value NAME WORDS` prints a value, `queue DISK NAME` a limit of the block layer, `die TEXT` ends the job.
const PRELUDE: &str = "
value() { name=$1; shift; echo \"@$name=$*\"; }
queue() { value \"$1.$2\" \"$(cat /sys/block/$1/queue/$2)\"; }
die() { echo \"FAILED: $*\"; exit 1; }
wait_disk() { n=100; until [ -b /dev/$1 ]; do n=$((n-1)); [ $n -gt 0 ] || die no /dev/$1; sleep 0.1; done; }
drop_caches() { sync; echo 3 >/proc/sys/vm/drop_caches; }
replies() { ping -q -c $2 -i 0.1 -W 2 $3 $1 | grep -o '[0-9]* packets received' | cut -d' ' -f1; }
lease() {
    printf '%s\\n' '#!/bin/busybox sh' '[ \"$1\" = bound ] || exit 0' 'ip addr add $ip/$mask dev $interface' \\
        'ip route add default via $router' 'echo \"nameserver $dns\" >/etc/resolv.conf' \\
        'echo \"$ip $router $dns\" >/tmp/lease' >/tmp/lease.sh
    chmod 755 /tmp/lease.sh; mkdir -p /etc; ip link set lo up; ip link set eth0 up
    udhcpc -i eth0 -n -q -t 20 -T 1 -x hostname:$1 -s /tmp/lease.sh >/tmp/udhcpc 2>&1 || { cat /tmp/udhcpc; die no lease; }
}
";
