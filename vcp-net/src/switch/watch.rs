//! [`Watch`]: the capture of a switch's process, if there is one, and the thread that writes it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::json;
use vcp_core::ask::Rest;

use super::SwitchFabric;
use super::work::PortId;
use crate::capture::{Capture, CaptureSpec};

type Thread = Arc<Mutex<Option<(PathBuf, JoinHandle<()>)>>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Watch {
    capture: Option<Box<Capture>>,
    thread: Thread,
    dir: Option<PathBuf>,
    /// Captures that there were: their files have numbers.
    count: u64,
}

impl Watch {
    /// The capture that runs.
    #[inline]
    pub(super) fn capture(&mut self) -> Option<&mut Capture> {
        self.capture.as_deref_mut()
    }

    /// Time has passed.
    #[inline]
    pub(super) fn turn(&mut self, now: Instant) {
        if let Some(capture) = &mut self.capture {
            capture.turn(now);
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.capture.as_ref().and_then(|capture| capture.deadline())
    }

    /// Ends the capture; its file is whole when the rest is done.
    pub(super) fn stop(&mut self) -> Result<Rest, String> {
        let capture = self.capture.take().ok_or("there is no capture")?;
        let thread = Arc::clone(&self.thread);
        let (frames, lost) = capture.finish();
        Ok(Rest::new(move || {
            let done = thread.lock().unwrap_or_else(PoisonError::into_inner).take();
            let (file, thread) = done.ok_or("the capture's file was never made")?;
            thread.join().map_err(|_| "the capture's thread failed")?;
            Ok(json!({ "file": file, "frames": frames, "lost": lost }))
        }))
    }

    /// The process ends.
    pub(super) fn close(&mut self) {
        if let Ok(rest) = self.stop() {
            let _ = rest.finish();
        }
    }
}

impl SwitchFabric {
    /// Captures are written to files in this directory.
    pub fn capture_in(&mut self, dir: &Path) {
        self.watch.dir = Some(dir.into());
    }

    /// Begins a capture. The file is made by the rest.
    ///
    /// # Errors
    /// In words for the user.
    pub fn capture(&mut self, spec: CaptureSpec, now: Instant) -> Result<Rest, String> {
        spec.check()?;
        let dir = self.watch.dir.clone().ok_or("this process was started without --capture-dir")?;
        if self.watch.capture.as_ref().is_some_and(|capture| capture.is_alive()) {
            return Err("a capture runs already (`capture-stop` ends it)".into());
        }
        let names: Vec<&str> = self.members.iter().map(|member| &*member.spec.name).collect();
        let port = match spec.port.as_deref() {
            None => None,
            Some("uplink") => Some(PortId::UPLINK),
            Some(name) => {
                let at = names.iter().position(|it| *it == name);
                let at =
                    at.ok_or_else(|| format!("no port `{name}` (there is {}, uplink)", names.join(", ")))?;
                Some(PortId(at as u8))
            }
        };
        let (capture, writer) = Capture::new(spec, port, &names, now);
        self.watch.capture = Some(Box::new(capture));
        let (thread, number) = (Arc::clone(&self.watch.thread), self.watch.count);
        self.watch.count += 1;
        Ok(Rest::new(move || {
            let (file, handle) = writer.start(&dir, number)?;
            let told = json!({ "file": file });
            *thread.lock().unwrap_or_else(PoisonError::into_inner) = Some((file, handle));
            Ok(told)
        }))
    }
}
