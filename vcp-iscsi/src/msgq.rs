//! The disk for programs on this host and other VCPs: block requests in `msgq` messages become chains for the same device
//! model that guests have, above an engine (and so a session) of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use msgq_blk::proto;
use vcp_core::mailbox::Mailbox;
use vcp_core::msgq::front::Direction;
use vcp_core::msgq::{Front, Listener, ListenerOptions, Plan, Protocol};
use vcp_core::poll::Side;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::blk::BlkDevice;
use crate::engine::Engine;
use crate::limit::Limits;

/// Clients at a time.
pub const CLIENTS: u16 = 16;
/// Slots of this side's rings, as a power of two: a client may have half as many requests in flight.
const LOG2_SLOTS: u8 = 12;
/// Most bytes that a client may share.
const CLIENT_BYTES: u64 = 4 << 30;

/// Block requests as [`msgq_blk::proto`] has them.
#[derive(Debug)]
struct BlkProtocol;

impl Protocol for BlkProtocol {
    fn plan(&self, opcode: u16, value: u64) -> Plan {
        let (kind, direction) = match opcode {
            proto::CONFIG => return Plan::Config,
            proto::READ => (VIRTIO_BLK_T_IN, Direction::FromDevice),
            proto::WRITE => (VIRTIO_BLK_T_OUT, Direction::ToDevice),
            proto::FLUSH => (VIRTIO_BLK_T_FLUSH, Direction::None),
            proto::DISCARD => (VIRTIO_BLK_T_DISCARD, Direction::ToDevice),
            proto::WRITE_ZEROES => (VIRTIO_BLK_T_WRITE_ZEROES, Direction::ToDevice),
            _ => return Plan::Unknown,
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&value.to_le_bytes());
        Plan::Chain { header, direction, status_bytes: 1 }
    }

    fn code(&self, status: &[u8]) -> u16 {
        match status.first() {
            Some(0) => proto::OK,
            Some(2) => proto::UNSUPPORTED,
            _ => proto::IO_ERROR,
        }
    }

    fn invalid(&self) -> u16 {
        proto::INVALID
    }

    fn unknown(&self) -> u16 {
        proto::UNSUPPORTED
    }
}

/// A front whose clients connect to `listener`, or, in a process that takes over, to that of the old one.
///
/// # Errors
/// No thread or descriptor can be had.
pub fn front<E: Engine + Send + std::fmt::Debug + 'static>(
    listener: Option<Listener>,
    engine: E,
    limits: Limits,
) -> Result<Box<dyn Side>> {
    let arrivals = Arc::new(Mailbox::new().context("cannot create an event descriptor")?);
    let options = ListenerOptions {
        config: msgq::handshake::Config {
            log2_slots: LOG2_SLOTS,
            window: 1,
            chain_max: 64,
            segment_max: 16 << 20,
            features: proto::FEATURE,
            required: proto::FEATURE,
            region_bytes_max: CLIENT_BYTES,
            deadline: Duration::from_secs(1),
            ..msgq::handshake::Config::default()
        },
        users: Vec::new(),
    };
    let device = BlkDevice::new(engine, CLIENTS).limited(limits, Instant::now());
    let front = Front::new(device, BlkProtocol, arrivals).context("cannot create an epoll instance")?;
    let front = front.with_listener(listener, options);
    Ok(Box::new(front.context("cannot start the thread for msgq clients")?))
}

/// What the ready line says of it.
pub(crate) fn describe<E: Engine>(path: &Path, engine: &E) -> String {
    let lun = engine.lun();
    format!(
        " msgq={} size_bytes={} block_bytes={}",
        path.display(),
        lun.blocks.saturating_mul(lun.block_bytes.into()),
        lun.block_bytes
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_become_virtio_headers() {
        let Plan::Chain { header, direction, status_bytes } = BlkProtocol.plan(proto::WRITE, 0x1122) else {
            panic!("a write is a chain");
        };
        assert_eq!(header, [1, 0, 0, 0, 0, 0, 0, 0, 0x22, 0x11, 0, 0, 0, 0, 0, 0]);
        assert_eq!((direction, status_bytes), (Direction::ToDevice, 1));
        assert_eq!(BlkProtocol.plan(99, 0), Plan::Unknown);
        let codes = [&[0][..], &[1], &[2], &[255], &[]].map(|status| BlkProtocol.code(status));
        assert_eq!(codes, [0, 1, 2, 1, 1]);
    }
}
