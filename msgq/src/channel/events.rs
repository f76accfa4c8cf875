//! What comes over the control socket while messages flow: regions that come and go, and the end.

use super::{Channel, Error, put_pool};
use crate::error::Violation;
use crate::handshake::{HandshakeError, LinkError, Message};
use crate::region::{Access, Pool};

/// Where the peer is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PeerState {
    /// It takes part.
    #[default]
    Running,
    /// It sends no new requests.
    Draining,
    /// It is gone. What it published can still be received.
    Gone,
}

/// Something that came over the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer announced a region.
    RegionAdded(u16),
    /// The peer took a region away.
    RegionGone(u16),
    /// The peer has mapped one of this side's regions: it may be used.
    RegionReady(u16),
    /// The peer sends no new requests.
    Draining,
    /// The peer is gone, in order (it said why) or not.
    Gone(Option<u16>),
}

/// Why a region was not announced.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// Its number is in use.
    #[error("region {0} exists")]
    Exists(u16),
    /// The control socket.
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl Channel {
    /// Deals with the next thing that came over the control socket, without blocking. To be called when
    /// [`link`](Self::link) is readable; [`wait`](Self::wait) calls it.
    ///
    /// # Errors
    /// The peer sent what makes no sense.
    pub fn attend(&mut self) -> Result<Option<Event>, Error> {
        if self.peer == PeerState::Gone {
            return Ok(None);
        }
        self.idle = false;
        let (message, fd) = match self.link.receive() {
            Ok(Some(received)) => received,
            Ok(None) => {
                self.show();
                return Ok(None);
            }
            Err(LinkError::Gone) => {
                self.peer = PeerState::Gone;
                self.show();
                return Ok(Some(Event::Gone(None)));
            }
            Err(_) => return Err(self.fail(Violation::Link(0))),
        };
        let event = match (message, fd) {
            (Message::Region { number, generation, both_write, bytes }, Some(fd)) => {
                let access = if both_write { Access::Both } else { Access::Owner };
                if self.regions.get(number).is_some() {
                    return Err(self.fail(Violation::Link(message.kind())));
                }
                let taken = crate::handshake::take_region(
                    &mut self.regions,
                    self.quota,
                    number,
                    generation,
                    access,
                    bytes,
                    fd,
                );
                if taken.is_err() {
                    return Err(self.fail(Violation::Link(message.kind())));
                }
                // A peer that does not read its acknowledgements can wait for this one for ever.
                let _ = self.link.send(&Message::RegionAck { number }, None);
                Event::RegionAdded(number)
            }
            (Message::RegionGone { number }, None) if self.regions.remove(number) => {
                Event::RegionGone(number)
            }
            (Message::RegionAck { number }, None) => match self.pools.get_mut(usize::from(number)) {
                Some(Some((_, ready))) if !*ready => {
                    *ready = true;
                    Event::RegionReady(number)
                }
                _ => return Err(self.fail(Violation::Link(message.kind()))),
            },
            (Message::Drain, None) => {
                self.peer = PeerState::Draining;
                Event::Draining
            }
            (Message::Bye { reason }, None) => {
                self.peer = PeerState::Gone;
                Event::Gone(Some(reason))
            }
            (message, _) => return Err(self.fail(Violation::Link(message.kind()))),
        };
        Ok(Some(event))
    }

    /// Where the peer is in its life, as far as [`attend`](Self::attend) has heard.
    #[must_use]
    pub fn peer_state(&self) -> PeerState {
        self.peer
    }

    /// Announces another pool. It may be used after [`Event::RegionReady`].
    ///
    /// # Errors
    /// Its number is in use, or the peer cannot be told.
    pub fn add_pool(&mut self, pool: Pool) -> Result<(), RegionError> {
        let number = pool.region();
        if self.pools.get(usize::from(number)).is_some_and(Option::is_some) {
            return Err(RegionError::Exists(number));
        }
        let message = crate::handshake::region_message(&pool);
        if !self.link.send(&message, Some(pool.file()))? {
            return Err(LinkError::Late.into());
        }
        put_pool(&mut self.pools, pool, false);
        Ok(())
    }

    /// Takes a pool away: nothing new is sent of it, and it is given up whole, for the peer may keep its mapping.
    ///
    /// # Errors
    /// The peer cannot be told.
    pub fn remove_pool(&mut self, region: u16) -> Result<bool, RegionError> {
        let Some(place) = self.pools.get_mut(usize::from(region)) else { return Ok(false) };
        if place.is_none() {
            return Ok(false);
        }
        if !self.link.send(&Message::RegionGone { number: region }, None)? {
            return Err(LinkError::Late.into());
        }
        *place = None;
        Ok(true)
    }

    /// Tells the peer that no new requests come.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn drain(&mut self) -> Result<(), LinkError> {
        self.link.send(&Message::Drain, None).map(drop)
    }

    /// Ends the channel in order.
    pub fn close(self, reason: u16) {
        let _ = self.link.send(&Message::Bye { reason }, None);
    }
}

impl From<HandshakeError> for Violation {
    fn from(_: HandshakeError) -> Self {
        Self::Link(crate::handshake::wire::kind::REGION)
    }
}
