//! Guest memory: mapping what the vhost-user front end shares, translating its addresses, and the data buffers of
//! requests.
//!
//! Rules of this module: guest memory is only ever reached through raw pointers with volatile or library-provided
//! copies, never through Rust references; every range is checked against the mapped regions before a pointer to it
//! exists; a pointer never outlives the mapping, which each [`GuestBuf`] keeps alive.
#![allow(unsafe_code)] // Pointers into mappings shared with the guest have no safe form.

mod buf;
mod crc32c;
mod digested;
mod table;

pub use buf::{BufError, GuestBuf};
pub use table::{MAX_REGIONS, MemError, MemTable, RegionSpec};

/// Guest memory as mapped here: regions sorted by guest physical address.
pub type GuestMap = vm_memory::GuestMemoryMmap<()>;
