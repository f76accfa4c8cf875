//! A disk behind a VCP, for a program without a virtual machine.
//!
//! `vcp-iscsi serve --msgq-path SOCKET URL` serves a logical unit to programs on its host; [`Disk`] is the other end. Data
//! goes by reference: the VCP receives from the network into the program's buffer, and sends from it. While both sides
//! are busy no system call happens between them.
//!
//! ```no_run
//! use msgq_blk::{Disk, Options};
//!
//! let mut disk = Disk::open("/run/disk0.msgq".as_ref(), &Options::default())?;
//! let mut block = vec![0; 4096];
//! disk.read_at(0, &mut block)?; // simple: one at a time
//!
//! // Many at a time: tags come back in the order of completion.
//! for tag in 0..32 {
//!     disk.submit_read(tag * 8, 4096, tag)?;
//! }
//! let mut left = 32;
//! while left > 0 {
//!     match disk.poll()? {
//!         Some(done) => {
//!             done.result?;
//!             disk.read_back(&done, 0, &mut block)?;
//!             left -= 1;
//!         }
//!         None => disk.wait(None)?,
//!     }
//! }
//! # Ok::<(), msgq_blk::Error>(())
//! ```
//!
//! [`proto`] is the protocol: what opcodes, values and codes mean. The queue below is the [`msgq`] crate.
#![forbid(unsafe_code)]

mod disk;
pub mod proto;

pub use disk::{Disk, Done, Error, Options};
pub use proto::{Info, IoError};
