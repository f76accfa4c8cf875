//! [`NetPort`]: a virtio-net device (VIRTIO 1.2, 5.1), which is a port of the switch.
//!
//! It knows features, configuration space and queues. What moves frames is the switch, which sees all ports at once
//! ([`crate::switch`]); the port by itself only answers its control queue.

mod config;
mod control;
pub mod features;
mod spec;

pub use spec::{MTU_RANGE, OnFull, PAIRS_MAX, PortSpec, Rate, Vlan};

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use vcp_core::device::{RingDevice, Rings, Wait};
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::metrics::DeviceMetrics;
use vcp_core::queue::Chain;
use vcp_core::queue::burst::{BurstRing, Direction};
use vcp_core::vu::RingSet;

use crate::frame::Offloads;
use crate::frame::vnet::{HEADER_BYTES, NUM_BUFFERS_AT, SHORT_HEADER_BYTES};
use control::Control;

/// Entries of a queue at most.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// See the module.
#[derive(Debug)]
pub struct NetPort {
    spec: PortSpec,
    acked: u64,
    control: Control,
    chain: Chain,
    /// What this port's driver takes unfinished.
    offloads: Offloads,
    attached: bool,
    metrics: Arc<DeviceMetrics>,
}

impl NetPort {
    /// A port as `spec` describes it.
    #[must_use]
    pub fn new(spec: PortSpec) -> Self {
        Self {
            control: Control::new(&spec),
            spec,
            acked: 0,
            chain: Chain::with_capacity(16),
            offloads: Offloads::NONE,
            attached: false,
            metrics: Arc::default(),
        }
    }

    /// What it was made with.
    #[must_use]
    pub fn spec(&self) -> &PortSpec {
        &self.spec
    }

    /// What may change while it runs is changed; the driver is told of its link.
    pub fn change(&mut self, spec: PortSpec) {
        if spec.link != self.spec.link {
            self.control.changed();
        }
        self.spec = spec;
    }

    /// Whether a front end is connected.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// Bytes of the header in front of each frame (5.1.6.1).
    #[inline]
    #[must_use]
    pub fn header_bytes(&self) -> usize {
        if self.acked & (features::VERSION_1 | features::MRG_RXBUF) == 0 {
            SHORT_HEADER_BYTES
        } else {
            HEADER_BYTES
        }
    }

    /// Where the number of buffers goes in it, if a frame may take several.
    #[inline]
    #[must_use]
    pub fn count_at(&self) -> Option<usize> {
        (self.acked & features::MRG_RXBUF != 0).then_some(NUM_BUFFERS_AT)
    }

    /// What the driver may leave to others. `None`: nothing, and its headers need not be looked at.
    #[inline]
    #[must_use]
    pub fn host_offloads(&self) -> Option<Offloads> {
        (self.acked & features::HOST_OFFLOADS != 0).then(|| features::host(self.acked))
    }

    /// What the driver takes unfinished.
    #[inline]
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Pairs of queues in use.
    #[inline]
    #[must_use]
    pub fn pairs(&self) -> u16 {
        if self.acked & features::MQ != 0 { self.control.pairs().unwrap_or(self.spec.pairs) } else { 1 }
    }

    /// Pairs of queues at most.
    #[must_use]
    pub fn pairs_max(&self) -> u16 {
        self.spec.pairs
    }

    /// Whether the driver wants a frame for this address: it told, if it has a control queue.
    #[inline]
    #[must_use]
    pub fn filters(&self) -> Option<&control::Filter> {
        self.control.filter()
    }

    fn update_offloads(&mut self) {
        let negotiated = features::guest(self.acked);
        self.offloads =
            self.control.offloads().map_or(negotiated, |chosen| features::both(negotiated, chosen));
    }

    /// Answers the control queue.
    fn serve_control<R: Rings>(&mut self, rings: &mut R) -> bool {
        let queue = 2 * self.spec.pairs;
        let mut moved = false;
        while rings.take(queue, &mut self.chain) {
            moved = true;
            match self.control.answer(&self.chain, self.spec.pairs) {
                Ok(len_bytes) => rings.complete(self.chain.id, len_bytes),
                Err(error) => rings.fail(self.chain.id, error),
            }
            self.chain.readable.clear();
            self.chain.writable.clear();
            self.update_offloads();
        }
        moved
    }
}

/// The receive queue of pair `pair`, if it runs.
#[inline]
pub fn receive_queue(rings: &mut RingSet, pair: u16) -> Option<&mut BurstRing> {
    rings.burst(2 * pair)
}

/// The transmit queue of pair `pair`, if it runs.
#[inline]
pub fn transmit_queue(rings: &mut RingSet, pair: u16) -> Option<&mut BurstRing> {
    rings.burst(2 * pair + 1)
}

impl RingDevice for NetPort {
    fn queues(&self) -> u16 {
        2 * self.spec.pairs + 1
    }

    fn queue_num(&self) -> u16 {
        // What the field counts for this device: QEMU and DPDK compare it with their number of pairs.
        self.spec.pairs
    }

    fn queue_size_max(&self) -> u16 {
        QUEUE_SIZE_MAX
    }

    fn burst(&self, queue: u16) -> Option<Direction> {
        match queue {
            queue if queue == 2 * self.spec.pairs => None,
            queue if queue % 2 == 0 => Some(Direction::ToDriver),
            _ => Some(Direction::FromDriver),
        }
    }

    fn keeps_log(&self) -> bool {
        false
    }

    fn features(&self) -> u64 {
        features::offered(&self.spec)
    }

    fn set_features(&mut self, acked: u64) {
        self.acked = acked;
        self.control = Control::new(&self.spec);
        if features::announces(acked) {
            // A switch that has just begun does not know where its stations are, and no driver can tell.
            self.control.ask_to_announce();
        }
        self.update_offloads();
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        config::read(&self.spec, self.control.announces(), offset, out);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {
        // No field of it can be written (5.1.4.1).
        self.metrics.refused_config_writes.add(1);
    }

    fn attached(&mut self, attached: bool) {
        self.attached = attached;
    }

    fn poll<R: Rings>(&mut self, rings: &mut R, _now: Instant) -> bool {
        self.acked & features::CTRL_VQ != 0 && self.serve_control(rings)
    }

    fn has_room(&self) -> bool {
        true
    }

    fn wait(&self) -> Wait<'_> {
        Wait::default()
    }

    fn take_config_change(&mut self) -> bool {
        self.control.take_config_change()
    }

    fn status(&self) -> Value {
        json!({
            "attached": self.attached,
            "mac": self.spec.mac.map(|mac| mac.to_string()),
            "features": format!("{:#x}", self.acked),
            "pairs": self.pairs(),
        })
    }

    fn export(&self, _fds: &mut Fds, _now: Instant) -> Result<Value, NotNow> {
        Ok(json!({ "control": self.control.export(), "spec": self.spec }))
    }

    fn import(&mut self, state: Value, _fds: &mut Fds, _now: Instant) -> Result<(), BadState> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct State {
            control: Value,
            spec: PortSpec,
        }
        let failed = |source| BadState::Json { what: "a port", source };
        let State { control, spec } = serde_json::from_value(state).map_err(failed)?;
        if spec.pairs != self.spec.pairs {
            return Err(BadState::Text("a port with another number of queues".into()));
        }
        self.spec = spec;
        self.control.import(control).map_err(failed)?;
        self.attached = true;
        Ok(())
    }

    fn memory_bound_bytes(&self) -> u64 {
        // Each queue has a batch for what it reads ahead.
        u64::from(self.queues()) * vcp_core::queue::burst::Batch::memory_bound_bytes()
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        &self.metrics
    }
}
