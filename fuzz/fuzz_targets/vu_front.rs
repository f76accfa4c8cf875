//! A hostile backend: the monitor's front end shakes hands, starts queues, writes configuration, and stops, with a backend
//! that answers what the input says. No panic, no hang, and never more configuration than was asked for.
//!
//! The backend reads each request and answers it honestly, with bytes changed, or with any bytes and then nothing more, so
//! that the input reaches the late messages and not only the first.
#![no_main]

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm::virtio::vhost_user::link::Link;
use vmm::virtio::vhost_user::{VhostUserDevice, blk};
use vmm::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const GET_MAX_MEM_SLOTS: u32 = 36;
const NEED_REPLY: u32 = 8;
const CONFIG_LEN: usize = 60;

struct Line(EventFd);

impl Interrupt for Line {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn call_fd(&self, _index: u16) -> Option<&EventFd> {
        Some(&self.0)
    }
}

/// What an honest backend answers, and whether a descriptor goes with it.
fn honest(request: u32, flags: u32, payload: &[u8]) -> Option<(Vec<u8>, bool)> {
    let word = |word: u64| Some((word.to_ne_bytes().to_vec(), false));
    match request {
        GET_FEATURES => word(1 << 32 | 1 << 30 | 1 << 29),
        // Several queues, acknowledgements, the backend's channel, configuration, log, memory by pieces.
        GET_PROTOCOL_FEATURES => word(1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 15),
        GET_QUEUE_NUM => word(4),
        GET_MAX_MEM_SLOTS => word(32),
        GET_CONFIG => Some(([payload.get(..12)?, &[0; CONFIG_LEN]].concat(), false)),
        GET_VRING_BASE => Some((payload.get(..8)?.to_vec(), false)),
        GET_INFLIGHT_FD => {
            let size = 65536u64.to_ne_bytes();
            Some(([&size[..], &[0; 8], payload.get(16..20)?, &[0; 4]].concat(), true))
        }
        _ if flags & NEED_REPLY != 0 => word(0),
        _ => None,
    }
}

fn send(stream: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd.as_fd()]);
    if let Some(fds) = &fds {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let data = [IoSlice::new(bytes)];
    sendmsg(stream, &data, &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_ok()
}

/// The backend; ends with the connection.
fn serve(mut stream: UnixStream, input: Vec<u8>) {
    let mut input = input.into_iter();
    loop {
        let mut header = [0u8; 12];
        if stream.read_exact(&mut header).is_err() {
            return;
        }
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags, len) = (word(0), word(4), word(8) as usize);
        let mut payload = vec![0u8; len.min(4096)];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        let how = input.next().unwrap_or(0);
        if how & 0x80 != 0 {
            // Anything, and then nothing.
            let any: Vec<u8> = input.by_ref().take(usize::from(how & 0x7f) * 8).collect();
            send(&stream, &any, None);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            return;
        }
        let Some((mut answer, with_fd)) = honest(request, flags, &payload) else { continue };
        let mut reply = [request, 5, answer.len() as u32].map(u32::to_ne_bytes).concat();
        reply.append(&mut answer);
        for _ in 0..how & 7 {
            let (at, value) = (input.next().unwrap_or(0), input.next().unwrap_or(0));
            let at = usize::from(at) % reply.len();
            reply[at] = value;
        }
        let file = with_fd.then(|| {
            let file = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
            let len = if how & 8 == 0 { 65536 } else { u64::from(how) };
            rustix::fs::ftruncate(&file, len).ok()?;
            Some(file)
        });
        if !send(&stream, &reply, file.flatten().as_ref()) {
            return;
        }
        // A reply that is not whole would be waited for.
        if how & 7 != 0
            && u32::from_ne_bytes([reply[8], reply[9], reply[10], reply[11]]) as usize > reply.len() - 12
        {
            let _ = stream.shutdown(std::net::Shutdown::Write);
            return;
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let backend = std::thread::spawn({
        let input = input.to_vec();
        move || serve(theirs, input)
    });
    let link = Link::from_stream("disk0", ours, 2).unwrap();
    if let Ok(mut device) =
        VhostUserDevice::new("disk0", blk::kind(2, false), link, input.first() == Some(&1))
    {
        let mut config = [0xaa; 4096];
        device.read_config(0, &mut config);
        assert!(
            config[CONFIG_LEN + 256..].iter().all(|byte| *byte == 0xaa),
            "more than a configuration space"
        );
        let memory = vmm::kvm::memory::create(1 << 20, false).unwrap();
        let queue = |index: u16| ActiveQueue {
            index,
            size: 16,
            desc_table: 0x1_0000 * u64::from(index) + 0x1000,
            avail_ring: 0x1_0000 * u64::from(index) + 0x2000,
            used_ring: 0x1_0000 * u64::from(index) + 0x3000,
            kick: Arc::new(EventFd::new(0).unwrap()),
        };
        let activation = Activation {
            features: device.features(),
            memory,
            queues: vec![queue(0), queue(1)],
            interrupt: Arc::new(Line(EventFd::new(0).unwrap())),
        };
        let _ = device.activate(activation);
        device.write_config(32, &[0]);
        let _ = device.stop_queue(1);
        let _ = device.shut_down();
        device.read_config(0, &mut config);
    }
    backend.join().unwrap();
});
