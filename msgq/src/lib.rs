//! Asynchronous messages in shared memory, between processes that do not trust each other.
//!
//! A [`Channel`] carries one-way messages, requests and completions of 32 bytes each, by reference to data in shared
//! regions. Sending and receiving are a few atomic accesses; a system call happens only to wake a peer that sleeps.
//!
//! * **Distrust.** Each side's rings lie in memory that only it can write; the kernel's seals see to it. Every word that the
//!   peer writes is loaded once, copied, checked, then used. A peer that breaks a rule ends this channel with a
//!   [`Violation`](error::Violation); it cannot make this side panic, hang, or touch what is not the channel's.
//! * **Ownership.** Buffers are lent by a [`Pool`](region::Pool), sent, and come back with the completion. Only the owner of a
//!   region frees. Using a buffer after it was sent does not compile.
//! * **No deadlock.** A share of each ring is kept for completions, so an answer never waits for room.
//! * **No lost wake-up.** The sleep rule is checked by a model (`tests/loom.rs`) and by races on the real processor
//!   (`tests/fences.rs`); both fail when either fence is taken out.
//! * **Recovery.** What was published before a peer died is received; what was not answered is sent again with a mark when it
//!   comes back ([`Dormant`]).
//!
//! `docs/msgq.md` is the normative description of the memory layout, the rules, and who may write what.
//!
//! ```
//! use msgq::handshake::{Config, Link, read_hello};
//! use msgq::region::{Access, Pool};
//! use msgq::{Channel, Head, Incoming, Status};
//! use std::time::{Duration, Instant};
//!
//! let config = Config::default();
//! let deadline = Instant::now() + Duration::from_secs(10);
//! let (here, there) = Link::pair()?; // between processes: `Link::new(socket)`
//! let server = std::thread::spawn(move || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//!     let hello = read_hello(&there, deadline)?;
//!     let mut channel = Channel::accept(there, hello, &Config::default(), &[])?;
//!     loop {
//!         match channel.receive() {
//!             Ok(Some(Incoming::Request(request))) => {
//!                 let mut text = [0; 5];
//!                 let segment = channel.segments(&request)[0];
//!                 channel.slice(segment).ok_or("no such region")?.read(0, &mut text)?;
//!                 channel.complete(request, Status { value: u64::from(text == *b"hello"), ..Status::default() })?;
//!                 channel.commit();
//!             }
//!             Ok(_) => { channel.wait(Some(deadline))?; }
//!             Err(msgq::Error::Gone) => return Ok(()),
//!             Err(error) => return Err(error.into()),
//!         }
//!     }
//! });
//!
//! let pool = Pool::new(0, 1, 4096, 16, Access::Owner)?;
//! let mut channel = Channel::connect(here, &config, &[pool.clone()])?;
//! let mut loan = pool.loan()?.ok_or("no free buffer")?;
//! loan[..5].copy_from_slice(b"hello");
//! let token = channel.request_one(Head::default(), loan.freeze(0..5)).map_err(|(error, _)| error)?;
//! let done = loop {
//!     match channel.receive()? {
//!         Some(Incoming::Completion(done)) => break done,
//!         _ => { channel.wait(Some(deadline))?; }
//!     }
//! };
//! assert_eq!((done.token, done.value), (token, 1));
//! drop(channel);
//! server.join().unwrap().unwrap();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod bell;
mod channel;
pub mod error;
pub mod handshake;
pub mod layout;
pub mod region;
pub mod ring;
#[cfg(test)]
#[path = "ring/tests.rs"]
mod ring_tests;
pub mod shm;
pub mod spin;
mod sync;

pub use channel::{
    Batch, COUNTERS, Channel, Completion, Dormant, Durations, Error, Event, Fixed, Head, Incoming, Keepsake,
    LATENCY_STEPS, Observed, OneWay, PeerState, Phase, RegionError, Request, RingUse, SendError, Sizer,
    Stats, Status, Token, wait_any,
};
