//! [`CaptureSpec`]: what is captured.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Operations of the line, in their order, as they are named.
pub const OPERATIONS: [&str; 6] = ["parse", "police", "learn", "snoop", "lookup", "enqueue"];
/// Longest piece of a frame that is kept: all of it.
const SNAP_MAX_BYTES: usize = crate::frame::MAX_FRAME_BYTES;
/// A file's length, if nothing is said.
const SIZE_BYTES: u64 = 64 << 20;

/// Which way frames go, as the switch sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// What a port sends into the switch.
    In,
    /// What it gets.
    Out,
    /// Both.
    #[default]
    Both,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptureSpec {
    /// Name of the port, or `uplink`; `None`: all of the process.
    pub port: Option<String>,
    /// Which way.
    pub direction: Direction,
    /// Frames that come to this operation, with what was decided about them; `None`: frames at ports.
    pub operation: Option<String>,
    /// Bytes of a frame that are kept.
    #[serde(rename = "snap")]
    pub snap_bytes: usize,
    /// Bytes of the file at most.
    #[serde(rename = "size")]
    pub size_bytes: u64,
}

impl Default for CaptureSpec {
    fn default() -> Self {
        Self {
            port: None,
            direction: Direction::Both,
            operation: None,
            snap_bytes: SNAP_MAX_BYTES,
            size_bytes: SIZE_BYTES,
        }
    }
}

impl CaptureSpec {
    /// Whether it is one that can be.
    ///
    /// # Errors
    /// What is wrong, in words for the user.
    pub fn check(&self) -> Result<(), String> {
        if let Some(operation) = self.operation.as_deref().filter(|it| !OPERATIONS.contains(it)) {
            return Err(format!("`{operation}` is no operation (there is {})", OPERATIONS.join(", ")));
        }
        if !(14..=SNAP_MAX_BYTES).contains(&self.snap_bytes) {
            return Err(format!("{} bytes of a frame (14 to {SNAP_MAX_BYTES})", self.snap_bytes));
        }
        Ok(())
    }
}

impl fmt::Display for CaptureSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.port.as_deref().unwrap_or("all ports"))?;
        match (&self.operation, self.direction) {
            (Some(operation), _) => write!(f, ", operation {operation}"),
            (None, Direction::In) => write!(f, ", in"),
            (None, Direction::Out) => write!(f, ", out"),
            (None, Direction::Both) => Ok(()),
        }
    }
}

impl FromStr for CaptureSpec {
    type Err = String;

    /// `port=NAME,direction=in|out|both,operation=NAME,snap=N,size=SIZE`, all of them optional.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut this = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty() && *part != "all") {
            let bad = |what: &str| format!("`{part}`: {what}");
            match part.split_once('=') {
                Some(("port", name)) if !name.is_empty() => this.port = Some(name.to_owned()),
                Some(("direction", "in")) => this.direction = Direction::In,
                Some(("direction", "out")) => this.direction = Direction::Out,
                Some(("direction", "both")) => this.direction = Direction::Both,
                Some(("operation", name)) => this.operation = Some(name.to_owned()),
                Some(("snap", number)) => {
                    this.snap_bytes = number.parse().map_err(|_| bad("not a number"))?;
                }
                Some(("size", size)) => {
                    this.size_bytes = crate::cli::size(size).ok_or_else(|| bad("not a size"))?;
                }
                _ => {
                    return Err(bad("port=NAME, direction=in|out|both, operation=NAME, snap=N or size=SIZE"));
                }
            }
        }
        this.check()?;
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captures_are_read_as_they_are_written() {
        assert_eq!("all".parse(), Ok(CaptureSpec::default()));
        let spec: CaptureSpec = "port=p0,direction=out,snap=96,size=1M".parse().unwrap();
        assert_eq!((spec.port.as_deref(), spec.direction), (Some("p0"), Direction::Out));
        assert_eq!((spec.snap_bytes, spec.size_bytes, spec.to_string().as_str()), (96, 1 << 20, "p0, out"));
        assert_eq!(
            "operation=police".parse::<CaptureSpec>().unwrap().to_string(),
            "all ports, operation police"
        );
        for bad in ["port", "port=", "direction=up", "operation=fly", "snap=1", "snap=x", "size=x", "x=1"] {
            assert!(bad.parse::<CaptureSpec>().is_err(), "{bad}");
        }
    }
}
