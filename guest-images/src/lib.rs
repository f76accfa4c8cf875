//! Builds the guests that the tests, the demo and the benchmarks boot.
//!
//! - [`bare`]: the bare-metal guest, an ELF file made from the crate in `guest-images/bare`.
//! - [`linux`]: Debian's cloud kernel as it is installed and an initramfs for it.
//! - [`rootfs`]: an ext4 root file system image that a LUN can carry.
//! - [`helper`]: the helper VM: Debian's kernel under QEMU's emulation, with `/dev/kvm` inside, in which a job script
//!   runs with given files at their usual paths.
//! - [`qemu`]: a QEMU process with its serial console captured and a deadline.
//!
//! Everything is made from what Debian packages have installed, without root rights, loop mounts or downloads, and is
//! kept by content hash under `target/guest-images/` (or `$VCP_GUEST_IMAGES_DIR`). What is missing is named with the
//! Debian package that has it. Starting targets, backends and monitors is left to the callers.
#![forbid(unsafe_code)]

pub mod bare;
pub mod cache;
pub mod cpio;
mod error;
pub mod gate;
pub mod helper;
pub mod linux;
pub mod modules;
pub mod qemu;
pub mod rootfs;
pub mod tree;

pub use error::Error;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
