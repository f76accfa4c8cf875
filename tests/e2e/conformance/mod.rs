//! The initiator against a target that breaks one rule at a time, through the whole program: `bad-target` at one end, a
//! vhost-user front end at the other. What counts is what the guest is told, what is in its memory and on the disk,
//! and what went over the wire; `bad-target` judges every PDU of ours besides.
//!
//! Tests named `line_NN_...` hold line NN of the project's checklist of RFC 7143; `ffp_N_N_...` are the cases of the
//! UNH-IOL initiator full feature phase suite. `docs/conformance-initiator.md` has both lists.

mod bed;
mod data_in;
mod data_out;
mod defects;
mod document;
mod durable;
mod ending;
mod ffp;
mod ffp_session;
mod login;
mod random;
mod sequence;
mod session;
mod status;
mod timeouts;
