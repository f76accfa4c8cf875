//! Regions: shared memory that messages refer to.
//!
//! Own regions are [`Pool`]s: buffers of one size with explicit ownership. The peer's regions are a table
//! ([`PeerRegions`]) in which every reference of a message is looked up and checked.
//!
//! | pool for | the peer may | a buffer is | content is reached by |
//! | --- | --- | --- | --- |
//! | data to send ([`Access::Owner`]) | read | [`Loan`] | an ordinary slice: nobody else can write it |
//! | data to be filled ([`Access::Both`]) | read and write | [`Blank`] | copies in and out: the peer may write at any time |

mod peer;
mod pool;

pub use peer::{PeerRegion, PeerRegions, PeerSlice, Segment};
pub use pool::{Blank, Loan, OwnershipError, Parcel, Pool, RawBuf};

pub use crate::shm::file::Access;

#[cfg(test)]
mod tests;
