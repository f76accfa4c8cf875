//! A hostile peer in the set-up of a msgq channel: messages from bytes, with descriptors of every kind, in any order.

#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use msgq::handshake::{Config, Message, Prior, Setup, wire};
use msgq::layout::control_bytes;
use msgq::region::{Access, Pool};
use msgq::shm::file::create;

/// Descriptors that a peer may send: right and wrong ones.
fn files() -> &'static [OwnedFd] {
    static FILES: OnceLock<Vec<OwnedFd>> = OnceLock::new();
    FILES.get_or_init(|| {
        let memory = |len, access| create("fuzz", len, access).expect("memory").0;
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        vec![
            memory(control_bytes(1, 4), Access::Owner),
            memory(control_bytes(1, 4), Access::Both),
            memory(4096, Access::Both),
            memory(4096, Access::Owner),
            read,
            write,
            File::open("/dev/null").expect("/dev/null").into(),
        ]
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((&first, mut rest)) = data.split_first() else { return };
    let config = Config { log2_slots: 4, lanes: 2, ..Config::default() };
    let prior = (first & 2 != 0).then_some(Prior { channel: 7, epoch: 3 });
    let pools =
        if first & 4 != 0 { vec![Pool::new(1, 1, 64, 4, Access::Owner).expect("pool")] } else { Vec::new() };
    let mut setup = match first & 1 {
        0 => Setup::accepting(config, pools, prior),
        _ => Setup::connecting(config, pools, prior),
    };
    for _ in 0..40 {
        while setup.outgoing().is_some() {}
        if rest.len() < wire::BYTES + 1 {
            break;
        }
        let (bytes, after) = rest.split_at(wire::BYTES);
        let mut bytes: [u8; wire::BYTES] = bytes.try_into().expect("its length");
        // Random bytes hardly ever begin right.
        bytes[..4].copy_from_slice(b"msgq");
        bytes[5..8].fill(0);
        bytes[4] %= 12;
        let (which, after) = after.split_first().expect("one more");
        rest = after;
        let Ok(message) = Message::decode(&bytes) else { continue };
        let fd = files().get(usize::from(*which) % (files().len() + 1));
        let fd = fd.map(|fd| fd.try_clone().expect("a descriptor"));
        if setup.incoming(message, fd).is_err() {
            return;
        }
        let _ = setup.is_done();
    }
});
