//! Front ends of a network port in orders of messages that real ones have, by hand.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::ensure;
use vcp_tests::Result;
use vcp_tests::switch::Switch;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
/// Version 1, and an answer is wanted.
const ANSWER: u32 = 1 | 1 << 3;
const REPLY_ACK: u64 = 1 << 3;

struct Front(UnixStream);

impl Front {
    fn send(&mut self, request: u32, flags: u32, body: &[u8]) -> Result<()> {
        let mut message = [request, flags, body.len() as u32].map(u32::to_ne_bytes).concat();
        message.extend_from_slice(body);
        Ok(self.0.write_all(&message)?)
    }

    /// The number that an answer carries.
    fn number(&mut self, request: u32) -> Result<u64> {
        let mut answer = [0; 20];
        self.0.read_exact(&mut answer)?;
        ensure!(answer[..4] == request.to_ne_bytes(), "an answer to another message: {answer:?}");
        Ok(u64::from_ne_bytes([12, 13, 14, 15, 16, 17, 18, 19].map(|at| answer[at])))
    }
}

/// QEMU enables the rings of a network device before it acknowledges any feature.
#[test]
fn rings_are_enabled_before_features_are_acknowledged() -> Result<()> {
    let switch = Switch::start(["", ""], &[])?;
    let stream = UnixStream::connect(switch.socket(0))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut front = Front(stream);
    front.send(SET_OWNER, 1, &[])?;
    front.send(GET_FEATURES, 1, &[])?;
    let features = front.number(GET_FEATURES)?;
    front.send(GET_PROTOCOL_FEATURES, 1, &[])?;
    let protocol = front.number(GET_PROTOCOL_FEATURES)?;
    ensure!(protocol & REPLY_ACK != 0, "no answers: {protocol:#x}");
    front.send(SET_PROTOCOL_FEATURES, 1, &REPLY_ACK.to_ne_bytes())?;
    for queue in [0u32, 1] {
        let enable = [queue, 1].map(u32::to_ne_bytes).concat();
        front.send(SET_VRING_ENABLE, ANSWER, &enable)?;
        assert_eq!(front.number(SET_VRING_ENABLE)?, 0, "ring {queue} is not enabled");
    }
    front.send(SET_FEATURES, ANSWER, &features.to_ne_bytes())?;
    assert_eq!(front.number(SET_FEATURES)?, 0);
    Ok(())
}
