//! A device on the data thread between two processes.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use super::{F_RING_PACKED, Port, What};
use crate::device::RingDevice;
use crate::handover::Fds;
use crate::handover::state::{BadState, LogState, NotNow, PortState};
use crate::mem::GuestMap;
use crate::queue::log::{LogArea, LogFormat, LogSpec};

impl<D: RingDevice> Port<D> {
    /// Whether nothing is under way.
    pub(crate) fn is_quiet(&self) -> Result<(), NotNow> {
        if self.resetting.is_some() || self.left_behind {
            return Err(NotNow::Busy("the device is being reset".into()));
        }
        self.rings.is_quiet()
    }

    /// The device, if nothing is under way. Changes nothing.
    pub(crate) fn export(&self, fds: &mut Fds, now: Instant) -> Result<PortState, NotNow> {
        self.is_quiet()?;
        Ok(PortState {
            features: self.acked,
            channel: fds.put_copy_of(self.channel.as_ref())?,
            changed: self.changed,
            log: self.rings.log().map(|log| export_log(log, fds)).transpose()?,
            vrings: self.rings.export(fds)?,
            device: self.device.export(fds, now)?,
        })
    }

    /// Goes on where the device of `state` stopped, with the front end's memory `map`.
    pub(crate) fn import(
        &mut self,
        epoll: &OwnedFd,
        state: PortState,
        map: Arc<GuestMap>,
        fds: &mut Fds,
        now: Instant,
    ) -> Result<(), BadState> {
        self.device.import(state.device, fds, now)?;
        self.rings.set_metrics(Arc::clone(self.device.metrics()));
        self.carry_out(epoll, What::SetMemory(map), now)?;
        self.carry_out(epoll, What::SetFeatures(state.features), now)?;
        if let Some(log) = state.log {
            let packed = state.features & F_RING_PACKED != 0;
            let format = if packed { LogFormat::Packed } else { LogFormat::Split };
            let LogState { len_bytes, offset, queues, queue_size, fd } = log;
            let spec = LogSpec { len_bytes, offset, queues, queue_size };
            let log = LogArea::map(spec, fds.take(fd)?.into(), format)?;
            self.carry_out(epoll, What::SetInflight(Arc::new(log)), now)?;
        }
        if let Some(fd) = fds.take_if(state.channel)? {
            let stream = UnixStream::from(fd);
            let failed = |source| BadState::System { what: "use the back-end channel", source };
            stream.set_nonblocking(true).map_err(failed)?;
            self.channel = Some(stream);
        }
        self.rings.import(epoll, state.vrings, fds)?;
        self.changed = state.changed;
        Ok(())
    }
}

fn export_log(log: &LogArea, fds: &mut Fds) -> Result<LogState, NotNow> {
    let LogSpec { len_bytes, offset, queues, queue_size } = log.spec();
    let file = log.file().ok_or_else(|| NotNow::Never("the in-flight log has no file".into()))?;
    Ok(LogState { len_bytes, offset, queues, queue_size, fd: fds.put_copy(file)? })
}
