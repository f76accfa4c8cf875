//! An iSCSI target that misbehaves as told: the process behind the binary `bad-target`, and [`BadTarget`], the tests'
//! handle on it. Real targets cannot be made to break a given rule at a given moment.
//!
//! It logs initiators in with the machine of the `iscsi` crate (RFC 7143 chapter 6), so parameters, digests and
//! session reinstatement are real. The full feature phase is its own, without the target machine of that crate, since
//! that one cannot be made to err: commands are carried out on a disk in memory, the answer to each is built as a list of
//! correct PDUs, and rules of a *script* change the list before it is sent. It also judges the initiator: every PDU
//! that breaks a rule is noted ([`oracle`]).
//!
//! # Script
//! One rule or setting a line; `#` starts a comment. A rule is `EVENT[WHICH] ACTION`:
//!
//! - EVENT: `read`, `write`, `sync`, `unmap`, `same`, `inquiry`, `capacity`, `mode`, `ready`, `luns`, `command` (any);
//!   `connect`, `login` (a Login Request), `tmf`, `ping` (a NOP-Out that wants an answer), `logout`, `text`.
//! - WHICH: nothing (the next one), `#N` (the Nth from now on), `#N-M`, `#N-` or `*` (all).
//! - ACTION: see [`script::Action`]. PDUs of an answer are named `data0`, `data1`..., `r2t0`..., `status`.
//!
//! Settings are `option KEY VALUE` ([`script::Options`]); what is to happen at once, to the newest session, is
//! `now ACTION` ([`control`]).
//!
//! ```text
//! option blocks 2048
//! read#2 add data1 data-sn 1    # the second READ: a hole in the Data-In numbers
//! write* response 0x01          # every WRITE: target failure, with status GOOD
//! login refuse 3 1              # the next login: service unavailable
//! ```

pub mod answer;
pub mod client;
pub mod conn;
pub mod control;
pub mod disk;
pub mod event;
pub mod fields;
pub mod login;
pub mod oracle;
pub mod script;
pub mod send;
pub mod server;
pub mod task;
pub mod text;

pub use client::{BadTarget, Entry};
pub use server::run;

/// Its name.
pub const IQN: &str = "iqn.2026-01.test.vcp:bad";
