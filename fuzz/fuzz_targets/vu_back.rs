//! A hostile front end: whole connections of messages with descriptors, to a VCP that serves a disk in memory as it serves
//! a guest. No panic, no hang: it is there for the next connection, whatever the last one said.
#![no_main]

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vcp_core::process::Signals;
use vcp_core::vu::listen::SocketFile;
use vcp_core::vu::{DeviceSpec, ServeOptions, serve};
use vcp_iscsi::blk::BlkDevice;

mod engine {
    pub use vcp_iscsi::engine::*;
}
#[path = "../../vcp-iscsi/tests/support/mem_engine.rs"]
#[allow(dead_code)]
mod mem_engine;

use mem_engine::{MemEngine, lun};

const MEMORY_BYTES: u64 = 256 << 10;
/// Most messages of a connection.
const MAX_MESSAGES: usize = 48;
/// A connection that was ended is gone after so long, or the process hangs.
const END: Duration = Duration::from_secs(8);

/// The server, started once.
fn server() -> &'static PathBuf {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("vcp-fuzz-{}", std::process::id()));
        let socket = SocketFile::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (signals, _keep) = Signals::embedded().unwrap();
            let device = BlkDevice::new(MemEngine::new(lun(512, 2048), 32), 4);
            let specs = vec![DeviceSpec { name: Arc::from("disk0"), socket, device }];
            let end = serve(specs, ServeOptions::default(), &signals, Box::new(serde_json::Map::new), || {});
            panic!("the server has ended: {end:?}");
        });
        path
    })
}

fn file(kind: u8) -> Option<OwnedFd> {
    match kind % 4 {
        0 => None,
        1 => Some(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap()),
        2 => {
            let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
            let file = rustix::fs::memfd_create("m", flags).unwrap();
            rustix::fs::ftruncate(&file, MEMORY_BYTES).unwrap();
            Some(file)
        }
        _ => Some(std::fs::File::open("/dev/null").unwrap().into()),
    }
}

fn send(stream: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd.as_fd()]);
    if let Some(fds) = &fds {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_ok()
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    [&[request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat()[..], payload].concat()
}

/// A well-formed message whose numbers the input chooses, so that what lies behind the first checks is reached.
fn cooked(pick: u8, next: &mut impl Iterator<Item = u8>) -> (Vec<u8>, Option<OwnedFd>) {
    let mut byte = || next.next().unwrap_or(0);
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let pair = |a: u32, b: u32| [a, b].map(u32::to_ne_bytes).concat();
    let queue = u32::from(byte() % 5);
    match pick % 10 {
        0 => (message(3, 1, &[]), None),
        1 => (message(2, 1, &words(&[1 << 32 | 1 << 30 | u64::from(byte()) << 28])), None),
        2 => (message(16, 1, &words(&[1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 15])), None),
        3 => {
            // One region of memory, at 0 for the guest and at 1 MiB for the front end.
            let region = words(&[0, MEMORY_BYTES, 1 << 20, u64::from(byte() & 1) << 12]);
            (message(5, 1, &[pair(1, 0), region].concat()), file(2))
        }
        4 => (message(8, 1, &pair(queue, 1 << (byte() % 9))), None),
        5 => (message(10, 1, &pair(queue, u32::from(byte()))), None),
        6 => {
            let at = |byte: u8| (1u64 << 20) + u64::from(byte) * 0x400;
            let addresses = words(&[at(byte()), at(byte()), at(byte()), 0]);
            (message(9, 1, &[pair(queue, 0), addresses].concat()), None)
        }
        7 => (message(12, 1, &words(&[u64::from(queue)])), file(1)),
        8 => (message(18, 1, &pair(queue, u32::from(byte() & 1))), None),
        _ => (message(11, 1, &pair(queue, 0)), None),
    }
}

fuzz_target!(|input: &[u8]| {
    let mut stream = UnixStream::connect(server()).unwrap();
    let mut input = input.iter().copied();
    for _ in 0..MAX_MESSAGES {
        let Some(kind) = input.next() else { break };
        let (bytes, fd) = if kind & 0xc0 == 0xc0 {
            // As it comes.
            let (request, flags, len) = (input.next().unwrap_or(0), input.next().unwrap_or(0), kind & 0x3f);
            let payload: Vec<u8> = input.by_ref().take(usize::from(len)).collect();
            (message(u32::from(request), u32::from(flags), &payload), file(input.next().unwrap_or(0)))
        } else {
            cooked(kind, &mut input)
        };
        if !send(&stream, &bytes, fd.as_ref()) {
            break;
        }
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
    stream.set_read_timeout(Some(END)).unwrap();
    let mut answers = Vec::new();
    match stream.read_to_end(&mut answers) {
        // A reset is an end as well.
        Ok(_) => {}
        Err(error) => assert!(
            !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
            "the connection is not taken down: {error}"
        ),
    }
});
