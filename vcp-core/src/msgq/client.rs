//! One client: its channel, its regions as guest memory, and its requests under way.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use msgq::{Channel, Incoming, PeerState, Request, Status};
use rustix::event::epoll;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::front::{Direction, Plan, Protocol};
use crate::mem::{GuestBuf, GuestMap};
use crate::queue::{Chain, ChainId};

/// Where region `n` begins in the client's address space: `(n + 1) << REGION_SHIFT`. Below lies the scratch memory.
const REGION_SHIFT: u32 = 40;
/// Scratch bytes of a request: header, then status.
const SCRATCH_BYTES: usize = 64;
const STATUS_AT: usize = 32;
/// Longest header and status.
pub(super) const HEADER_MAX: usize = STATUS_AT;
pub(super) const STATUS_MAX: usize = SCRATCH_BYTES - STATUS_AT;

/// A request that the device works on.
#[derive(Debug)]
struct Slot {
    request: Request,
    status_bytes: usize,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) channel: Channel,
    /// Tells this client from an earlier one at its place.
    pub(super) life: u32,
    map: Arc<GuestMap>,
    scratch_region: Arc<GuestRegionMmap<()>>,
    scratch: GuestBuf,
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    /// The channel does no more.
    pub(super) over: bool,
}

/// What became of the attempt to take a request.
pub(super) enum Taken {
    /// A chain.
    Chain,
    /// There is nothing, or no more will come.
    Nothing,
}

impl Client {
    pub(super) fn new(channel: Channel, life: u32) -> Option<Self> {
        let window = channel.agreed().window_theirs.min(u32::from(u16::MAX)) as u16;
        let bytes = (usize::from(window) * SCRATCH_BYTES).next_multiple_of(4096);
        let scratch_region = Arc::new(GuestRegionMmap::new(MmapRegion::new(bytes).ok()?, GuestAddress(0))?);
        let mut client = Self {
            channel,
            life,
            map: Arc::default(),
            scratch_region,
            scratch: GuestBuf::new(),
            slots: (0..window).map(|_| None).collect(),
            free: (0..window).rev().collect(),
            over: false,
        };
        client.map_regions();
        client.scratch.push(&client.map, GuestAddress(0), bytes).ok()?;
        Some(client)
    }

    /// Maps the client's regions as they are now. Those that cannot be mapped are not there: requests that name them fail.
    fn map_regions(&mut self) {
        let mut regions = vec![Arc::clone(&self.scratch_region)];
        for (number, region) in self.channel.regions().iter() {
            let mapped = region.file().try_clone_to_owned().ok().and_then(|file| {
                let prot = match region.access() {
                    msgq::region::Access::Owner => libc::PROT_READ,
                    msgq::region::Access::Both => libc::PROT_READ | libc::PROT_WRITE,
                };
                let file = FileOffset::new(File::from(file), 0);
                let size = usize::try_from(region.size()).ok()?;
                let mapping = MmapRegion::build(Some(file), size, prot, libc::MAP_SHARED).ok()?;
                GuestRegionMmap::new(mapping, GuestAddress(address(number, 0)))
            });
            match mapped {
                Some(mapped) => regions.push(Arc::new(mapped)),
                None => tracing::warn!(number, "a msgq region cannot be mapped"),
            }
        }
        self.map = Arc::new(GuestMap::from_arc_regions(regions).unwrap_or_default());
        let bytes = self.slots.len() * SCRATCH_BYTES;
        let mut scratch = GuestBuf::new();
        if scratch.push(&self.map, GuestAddress(0), bytes).is_ok() {
            self.scratch = scratch;
        }
    }

    pub(super) fn inflight(&self) -> u32 {
        (self.slots.len() - self.free.len()) as u32
    }

    /// Deals with the control socket; true if something came.
    /// A connection that ended would wake whoever waits in `epoll` for ever.
    pub(super) fn attend(&mut self, epoll: &OwnedFd) -> bool {
        let mut moved = false;
        let was = self.channel.peer_state();
        loop {
            match self.channel.attend() {
                Ok(Some(_)) => {
                    moved = true;
                    self.map_regions();
                }
                Ok(None) => {
                    if was != PeerState::Gone && self.channel.peer_state() == PeerState::Gone {
                        let _ = epoll::delete(epoll, self.channel.link());
                    }
                    return moved;
                }
                Err(_) => {
                    self.over = true;
                    return true;
                }
            }
        }
    }

    /// Takes the next request as a chain of queue `queue`.
    pub(super) fn take<P: Protocol>(
        &mut self,
        queue: u16,
        protocol: &P,
        config: &dyn Fn(&mut [u8]),
        chain: &mut Chain,
    ) -> Taken {
        loop {
            if self.over || self.free.is_empty() {
                return Taken::Nothing;
            }
            let request = match self.channel.receive() {
                Ok(Some(Incoming::Request(request))) => request,
                // Nobody asked for either.
                Ok(Some(Incoming::OneWay(_) | Incoming::Completion(_))) => continue,
                Ok(None) => return Taken::Nothing,
                Err(error) => {
                    if self.channel.peer_state() != PeerState::Gone {
                        let why = crate::process::chain(&error);
                        tracing::warn!(why, "a msgq client is cut off");
                    }
                    self.over = true;
                    return Taken::Nothing;
                }
            };
            let code = match protocol.plan(request.opcode, request.value) {
                Plan::Chain { header, direction, status_bytes } => {
                    match self.build(queue, &request, &header, direction, status_bytes, chain) {
                        Ok(slot) => {
                            self.slots[usize::from(slot)] = Some(Slot { request, status_bytes });
                            return Taken::Chain;
                        }
                        Err(()) => protocol.invalid(),
                    }
                }
                Plan::Config => self.tell_config(&request, config).unwrap_or(protocol.invalid()),
                Plan::Unknown => protocol.unknown(),
            };
            let _ = self.channel.complete(request, Status { code, ..Status::default() });
        }
    }

    fn tell_config(&self, request: &Request, config: &dyn Fn(&mut [u8])) -> Option<u16> {
        let [segment] = self.channel.segments(request) else { return None };
        let slice = self.channel.slice(*segment)?;
        let mut bytes = [0; 256];
        let len = slice.len().min(bytes.len());
        config(&mut bytes[..len]);
        slice.write(0, &bytes[..len]).ok()?;
        Some(0)
    }

    fn build(
        &mut self,
        queue: u16,
        request: &Request,
        header: &[u8],
        direction: Direction,
        status_bytes: usize,
        chain: &mut Chain,
    ) -> Result<u16, ()> {
        let slot = *self.free.last().ok_or(())?;
        let scratch = usize::from(slot) * SCRATCH_BYTES;
        let at = |offset: usize| (scratch + offset) as u64;
        if header.len() > HEADER_MAX || status_bytes > STATUS_MAX {
            return Err(());
        }
        self.scratch.copy_from(scratch, header);
        self.scratch.fill_zero(scratch + STATUS_AT, status_bytes);
        chain.begin(slot);
        chain.id = ChainId { queue, head: slot, epoch: self.life };
        let mut push = |addr, len, writable| chain.push(&self.map, addr, len, writable).map_err(drop);
        push(at(0), header.len() as u32, false)?;
        for segment in self.channel.segments(request) {
            let region = self.channel.regions().get(segment.region).ok_or(())?;
            // Memory that is mapped here to be read would fault if the device wrote it.
            let writable = region.access() == msgq::region::Access::Both;
            match direction {
                Direction::None => return Err(()),
                Direction::FromDevice if !writable => return Err(()),
                _ => {}
            }
            push(address(segment.region, segment.offset), segment.len, direction == Direction::FromDevice)?;
        }
        push(at(STATUS_AT), status_bytes as u32, true)?;
        self.free.pop();
        Ok(slot)
    }

    /// Gives the answer to a chain.
    pub(super) fn complete<P: Protocol>(&mut self, head: u16, len_bytes: u32, protocol: &P) {
        let Some(slot) = self.slots.get_mut(usize::from(head)).and_then(Option::take) else { return };
        let mut status = [0; STATUS_MAX];
        self.scratch.copy_to(usize::from(head) * SCRATCH_BYTES + STATUS_AT, &mut status[..slot.status_bytes]);
        let code = protocol.code(&status[..slot.status_bytes]);
        self.free.push(head);
        // The device counts its status; the client does not see it as bytes.
        let len = len_bytes.saturating_sub(slot.status_bytes as u32);
        let _ = self.channel.complete(slot.request, Status { code, value: 0, len });
    }

    /// Refuses a chain that breaks the device's rules.
    pub(super) fn refuse(&mut self, head: u16, code: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(head)).and_then(Option::take) else { return };
        self.free.push(head);
        let _ = self.channel.complete(slot.request, Status { code, ..Status::default() });
    }
}

fn address(region: u16, offset: u64) -> u64 {
    ((u64::from(region) + 1) << REGION_SHIFT) + offset
}
