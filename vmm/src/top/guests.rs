//! Asks the monitors, side by side: one that hangs does not keep the others from being shown.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Look;
use super::view::{self, GuestView};
use crate::api::client::Client;
use crate::api::types::GuestStatus;

/// How long a monitor may take.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Most guests that are looked at.
const MAX_GUESTS: usize = 256;

/// The guests that were asked for, by their sockets.
#[derive(Debug)]
pub(super) struct Guests {
    given: Vec<PathBuf>,
    known: BTreeMap<PathBuf, Guest>,
}

#[derive(Debug, Default)]
struct Guest {
    before: Option<Look>,
    now: Option<Look>,
    failure: Option<String>,
    /// It was named itself, and not found in a directory.
    named: bool,
}

impl Guests {
    pub(super) fn new(given: &[PathBuf]) -> Self {
        Self { given: given.to_vec(), known: BTreeMap::new() }
    }

    /// Asks all of them.
    pub(super) fn look(&mut self) -> Result<()> {
        self.find();
        let answers: Vec<(PathBuf, Result<Look>)> = std::thread::scope(|scope| {
            let ask = |path: &PathBuf| {
                let path = path.clone();
                scope.spawn(move || (path.clone(), ask(&path)))
            };
            let threads: Vec<_> = self.known.keys().map(ask).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        for (path, answer) in answers {
            let Some(guest) = self.known.get_mut(&path) else { continue };
            guest.before = guest.now.take();
            match answer {
                Ok(look) => (guest.now, guest.failure) = (Some(look), None),
                Err(e) => guest.failure = Some(crate::chain(e.as_ref())),
            }
        }
        // What was found in a directory and is gone, or was no monitor's, is not shown.
        self.known.retain(|path, guest| {
            guest.named || guest.failure.is_none() || guest.before.is_some() && path.exists()
        });
        Ok(())
    }

    /// The sockets that are there now.
    fn find(&mut self) {
        for given in &self.given {
            if !given.is_dir() {
                self.known.entry(given.clone()).or_default().named = true;
                continue;
            }
            let Ok(entries) = std::fs::read_dir(given) else { continue };
            let is_socket = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_socket());
            for entry in entries.flatten().filter(is_socket) {
                if self.known.len() < MAX_GUESTS {
                    self.known.entry(entry.path()).or_default();
                }
            }
        }
    }

    pub(super) fn any_answers(&self) -> bool {
        self.known.values().any(|guest| guest.now.is_some())
    }

    /// Why the first one that was named did not answer.
    pub(super) fn first_failure(&self) -> Option<&str> {
        self.known.values().find_map(|guest| guest.failure.as_deref())
    }

    /// What is known about each.
    pub(super) fn views(&self) -> Vec<GuestView> {
        let view = |(path, guest): (&PathBuf, &Guest)| match &guest.now {
            Some(now) => view::guest(guest.before.as_ref(), now),
            None => view::gone(&name_of(path, guest), guest.failure.as_deref().unwrap_or("does not answer")),
        };
        self.known.iter().map(view).collect()
    }
}

fn name_of(path: &Path, guest: &Guest) -> String {
    match &guest.before {
        Some(before) => before.status.name.clone(),
        None => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
    }
}

fn ask(path: &Path) -> Result<Look> {
    let client = Client::new(path, PATIENCE)?;
    let status: GuestStatus = client.get("/api/v1/status").context("no status")?;
    Ok(Look { at: Instant::now(), status })
}
