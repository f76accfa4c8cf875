//! How an engine comes to be: with a session that was just made, or without one for a unit that is known from before.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::scsi;

use super::log::{LogLimit, chain};
use super::observe::Observer;
use super::path::{Doubt, Path};
use super::waits::Waits;
use super::{IscsiEngine, Stats, look};
use crate::portal::client::Client;
use crate::portal::job::Jobs;
use crate::portal::login::Purpose;
use crate::portal::probe::Found;
use crate::portal::{Options, PortalError};

/// With several paths, a former process's session on one that is not reached within this time is made sure of by a reset.
const START_PATIENCE: Duration = Duration::from_secs(3);

impl IscsiEngine {
    /// Opens the unit that the options name; blocks for the connect and login time limits of each path at most, until one
    /// works. For the time before `ready`; the other paths follow.
    ///
    /// # Errors
    /// It cannot be reached, refuses us, or is not a disk: what was found on the first path.
    pub fn open(options: Options) -> Result<Self, PortalError> {
        options.url.require_target()?;
        let options = Arc::new(options);
        let mut first = None;
        for (index, path) in options.each_path().into_iter().enumerate() {
            match Self::open_by(&options, index, path) {
                Ok(engine) => return Ok(engine),
                Err(error) => {
                    if options.paths.len() + usize::from(options.sessions) > 1 {
                        tracing::warn!(path = index, error = chain(&error), "not by this path");
                    }
                    first.get_or_insert(error);
                }
            }
        }
        Err(first.unwrap_or(PortalError::Url(crate::url::UrlError::Missing("a target"))))
    }

    fn open_by(options: &Arc<Options>, index: usize, path: Arc<Options>) -> Result<Self, PortalError> {
        let wanted = path.url.require_lun()?;
        let mut client = Client::connect(path, Purpose::Normal)?;
        let (lun_address, found) = client.find_lun(wanted)?;
        let identity = found.identity();
        if let Some(wanted) = options.unit_id.as_ref().filter(|wanted| !wanted.names(&identity)) {
            let error = PortalError::OtherUnit {
                target: client.options().url.target.clone().unwrap_or_default(),
                lun: lun_address.to_string(),
                portal: client.options().url.portal.to_string(),
                why: format!("{identity}, not {wanted}"),
            };
            client.logout();
            return Err(error);
        }
        let now = Instant::now();
        let (_, wire, _, negotiated) = client.into_parts();
        let mut engine = Self::detached(Arc::clone(options), lun_address, found, now);
        if let Some(path) = engine.paths.get_mut(index) {
            let fresh = Path::new(Arc::clone(&path.options), lun_address, path.own_slot, now);
            *path = fresh.with_session(wire, negotiated, &engine.found);
        }
        engine.doubts_changed();
        engine.rank(now);
        Ok(engine)
    }

    /// An engine without a session, for a unit that is known from before: `found` is what it was, at `lun_address`. The
    /// first [`Engine::poll`](crate::engine::Engine::poll) at `now` or later begins to log in; requests wait until the unit is there and is the same.
    pub fn detached(options: Arc<Options>, lun_address: scsi::Lun, found: Found, now: Instant) -> Self {
        let depth = options.queue_depth;
        let lun = found.lun(options.read_only);
        let jitter = options.jitter_seed << 32 ^ u64::from(options.isid()[5]) | 1;
        let url_lun = options.url.lun.unwrap_or_default();
        let mut paths: Vec<_> = options
            .each_path()
            .into_iter()
            .zip(depth..)
            .map(|(path, own_slot)| {
                let lun = look::address_at(path.url.lun.unwrap_or_default(), url_lun, lun_address);
                Path::new(path, lun, own_slot, now)
            })
            .collect();
        if paths.len() > 1 {
            // A process before this one may have left sessions with writes underway. The login of each path ends its own.
            for path in &mut paths {
                path.doubt = Some(Doubt::of_a_former_process(now + START_PATIENCE));
            }
        }
        let mut engine = Self {
            observer: Observer::new(&options, now),
            jobs: Jobs::new(depth + paths.len() as u16),
            waits: if paths.len() > 1 { Waits::new() } else { None },
            wait_serial: 0,
            watched: None,
            active: Vec::with_capacity(paths.len()),
            paths,
            options,
            lun_address,
            found,
            lun,
            class: None,
            ranked: false,
            turn: 0,
            run: 0,
            free: (0..depth).rev().collect(),
            waiting: VecDeque::with_capacity(usize::from(depth)),
            backoff: Vec::with_capacity(usize::from(depth)),
            pinned: Vec::with_capacity(usize::from(depth)),
            ready: Vec::new(),
            scratch: Vec::with_capacity(usize::from(depth)),
            changed: false,
            closing: false,
            abandoned: false,
            in_doubt: false,
            barrier: false,
            reset: None,
            reset_not_before: None,
            reset_failures: 0,
            size_read: now,
            away_since: Some(now),
            jitter,
            log: LogLimit::default(),
            stats: Stats::default(),
        };
        engine.doubts_changed();
        engine
    }
}
