//! Why a server cannot be set up or go on, and errors as one line.

use std::io;
use std::net::SocketAddr;

/// Why a server cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}; is it taken, or not an address of this machine?")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The control socket cannot be made.
    #[error(
        "cannot listen on the control socket {path}; does another server use it, or is the directory missing?"
    )]
    Control {
        /// Its path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A medium cannot be opened.
    #[error("cannot open the medium `{path}` of LUN {lun}")]
    Medium {
        /// The file.
        path: String,
        /// The LUN.
        lun: u16,
        /// Why.
        source: io::Error,
    },
    /// A medium holds no block.
    #[error("the medium `{path}` of LUN {lun} is smaller than a block of {block_bytes} bytes")]
    Empty {
        /// The file.
        path: String,
        /// The LUN.
        lun: u16,
        /// The block size.
        block_bytes: u32,
    },
    /// Two logical units have one number, or there are too many.
    #[error("LUN {lun} of {target} is given twice, or there are more than {max} LUNs", max = crate::device::MAX_LUNS)]
    Lun {
        /// The target.
        target: String,
        /// The LUN.
        lun: u16,
    },
    /// The secrets of the two directions are the same, which lets an attacker reflect a challenge.
    #[error("the CHAP accounts cannot be used")]
    Chap(#[source] iscsi::chap::ChapError),
    /// Two targets have one name.
    #[error("target {0} is given twice")]
    Target(String),
    /// The data thread cannot be pinned.
    #[error("cannot pin the data path to hardware thread {cpu}; does it exist, and is it allowed?")]
    Pin {
        /// The hardware thread.
        cpu: usize,
        /// Why.
        source: io::Error,
    },
    /// The operating system refused.
    #[error("{action} failed")]
    Os {
        /// What.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What the operating system refused.
pub(super) fn os<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Os { action, source: source.into() }
}

/// An error with its causes, on one line.
pub(super) struct Chain<'a>(pub(super) &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
