//! The command line of `vcp-net`.

mod port;
mod switch;
mod uplink;

pub use port::PortArg;
pub(crate) use port::size;
pub use switch::SwitchArg;
pub use uplink::UplinkArg;

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand};
use vcp_core::handover::upgrade::UpgradeArgs;
use vcp_core::http::Endpoint;
use vcp_core::poll::PollMode;
use vcp_core::process::confine::Mode as ConfineMode;

use crate::capture::CaptureSpec;
use crate::handover::take_over::TakeOverArgs;
use crate::switch::PORTS_MAX;

/// An Ethernet switch among guests, as vhost-user-net devices.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None, max_term_width = 110)]
pub struct Cli {
    /// What to log on standard error: error, warn, info, debug, trace, or a filter [default: $RUST_LOG, else warn]
    #[arg(long, global = true, value_name = "LEVEL", value_parser = NonEmptyStringValueParser::new())]
    pub log: Option<String>,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // There is one of it in a process.
pub enum Command {
    /// Serve ports of a switch (or of several) as vhost-user-net devices
    Serve(ServeArgs),
    /// Replace a running `serve` by a newer program, under traffic
    #[command(after_help = "Example:\n  \
        vcp-net serve --port socket=/run/net0 --port socket=/run/net1 --control /run/net.ctl\n  \
        install -m 755 new/vcp-net /usr/bin/vcp-net && vcp-net upgrade --control /run/net.ctl")]
    Upgrade(UpgradeArgs),
    /// Take over from a running `serve`: what `upgrade` starts, and a monitor may start itself
    TakeOver(TakeOverArgs),
}

/// Arguments of `serve`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vcp-net serve --port socket=/run/net0 --port socket=/run/net1\n  \
    vcp-net serve --port socket=/run/net0 --uplink user,hostfwd=tcp:127.0.0.1:2222-22\n  \
    vcp-net serve --switch lan --uplink user      (guests: vcp run --net switch=lan)\n  \
    vcp-net serve --port socket=/run/net0,mac=52:54:00:00:00:01,vlan=5 --uplink tap=tap0 --control /run/net.ctl\n  \
    qemu-system-x86_64 -M q35,memory-backend=m -object memory-backend-memfd,id=m,size=2G,share=on \\\n    \
    -chardev socket,id=c,path=/run/net0,reconnect=1 -netdev vhost-user,id=n,chardev=c \\\n    \
    -device virtio-net-pci,netdev=n ...")]
pub struct ServeArgs {
    /// A port: `socket=SOCKET` to listen on, `connect=SOCKET` of a front end that listens, or `fd=N`, a socket that this
    /// process was started with. Options behind commas:
    /// `name=NAME`, `mac=M` (told to the driver where the front end leaves that to us), `mtu=N`, `queues=N` pairs of queues,
    /// `vlan=N` (an access port), `trunk=all|A-B-...` and `native=N|none` (a trunk), `on-full=wait|drop`, `protect` (only its
    /// own address), `rate=SIZE` bytes and `frames=N` frames per second, `offloads=on|off`, `switch=N`
    #[arg(long, value_name = "SPEC", required_unless_present = "switch")]
    pub port: Vec<PortArg>,
    /// A switch with a name, for guests of `vcp run --net switch=NAME`: its ports (`ports=N`, 8 if not given, of `queues=N`
    /// pairs) and its control socket are in a directory where those look for it: below $VCP_SWITCHES, else /run/vcp-switch
    /// for root and $XDG_RUNTIME_DIR/vcp-switch for others
    #[arg(long, value_name = "NAME[,ports=N][,queues=N]", conflicts_with_all = ["port", "control", "control_fd"])]
    pub switch: Option<SwitchArg>,
    /// Where frames go besides: `none`, `tap=NAME` (a TAP device of the host), `packet=IFNAME` (a network interface of
    /// the host), `user` (a network of our own behind sockets of this process, without any rights). Options of `user`
    /// behind commas: `hostfwd=tcp|udp:ADDR:PORT-[GUEST:]PORT`, `net=A/LEN`, `net6=P/64`, `dns=A`, `domain=D`, `mac=M`,
    /// `mtu=N`, `flows=N` for each guest, `ahead=MIB` for TCP out of order, `host=on|off` (the gateway's address leads to the host's loopback).
    /// Given several times: one for each switch, in their order
    #[arg(long, value_name = "SPEC")]
    pub uplink: Vec<UplinkArg>,
    /// Hardware thread for the data path
    #[arg(long, value_name = "N")]
    pub cpu: Option<usize>,
    /// A second hardware thread: under load it takes frames from the guests and decides where they go, and the first one
    /// carries that out. Without it, or when little is to be done, the first one does everything
    #[arg(long, value_name = "N")]
    pub second_cpu: Option<usize>,
    /// Microseconds that an idle data thread looks before it sleeps; 0: sleeps at once, `always`: never sleeps
    #[arg(long, value_name = "N|always", default_value = "adaptive")]
    pub poll_us: PollMode,
    /// Unix socket for commands, one JSON object per line: {"cmd":"ports"}, {"cmd":"macs"}, {"cmd":"counters"}, ...
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// The same on a socket that listens already, which this process was started with as descriptor FDNUM
    #[arg(long, value_name = "FDNUM", conflicts_with = "control")]
    pub control_fd: Option<i32>,
    /// For a supervisor: the page into which the data thread counts what it does (a sealed memfd)
    #[arg(long, value_name = "FDNUM")]
    pub pulse_fd: Option<i32>,
    /// Serve a page of metrics for Prometheus there: http://ADDRESS:PORT/metrics, or over a Unix socket
    #[arg(long, value_name = "ADDRESS:PORT|unix:PATH")]
    pub metrics: Option<Endpoint>,
    /// Directory for captures, which the control socket can ask for then: {"cmd":"capture","port":"port0"}
    #[arg(long, value_name = "DIR")]
    pub capture_dir: Option<PathBuf>,
    /// Capture from the start: `all`, or `port=NAME|uplink`, `direction=in|out|both`, `operation=NAME` (frames that come to
    /// it, with what was decided), `snap=N` bytes of each, `size=SIZE` of the file, with commas
    #[arg(long, value_name = "SPEC", requires = "capture_dir")]
    pub capture: Option<CaptureSpec>,
    /// Give up rights that are not needed: files, ports, processes, system calls, memory
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub confine: ConfineMode,
    /// End when the process that started this one ends
    #[arg(long)]
    pub exit_with_parent: bool,
}

impl ServeArgs {
    /// Checks what `clap` cannot see, and gives every port its name.
    ///
    /// # Errors
    /// Wrong usage, in words for the user.
    pub fn check(&mut self) -> Result<(), String> {
        if let Some(switch) = &self.switch {
            let dir = switch.dir()?;
            self.port = switch.ports(&dir);
            self.control = Some(dir.join(vcp_core::process::named::CONTROL));
        }
        if self.second_cpu.is_some() && self.second_cpu == self.cpu {
            return Err("--cpu and --second-cpu are one hardware thread: give another one, or none".into());
        }
        if self.port.len() > PORTS_MAX {
            return Err(format!("{} ports ({PORTS_MAX} at most)", self.port.len()));
        }
        let last = self.port.iter().map(|port| usize::from(port.spec.switch)).max().unwrap_or(0);
        let switches = self.uplink.len().max(1);
        if last >= switches {
            return Err(format!("a port of switch {last}, but --uplink is given for {switches}"));
        }
        for at in 0..self.port.len() {
            if self.port[at].spec.name.is_empty() {
                self.port[at].spec.name = format!("port{at}");
            }
            let (before, rest) = self.port.split_at(at);
            let (name, path) = (&rest[0].spec.name, &rest[0].path);
            if before.iter().any(|other| &other.spec.name == name) {
                return Err(format!("two ports are named {name}"));
            }
            if before.iter().any(|other| &other.path == path) {
                return Err(format!("socket {} is given for two ports", path.display()));
            }
        }
        Ok(())
    }
}
