//! A verifying load: random reads, writes and flushes at a queue depth, in which every read is compared with the
//! newest write to its place.

use std::collections::HashMap;

use anyhow::{Context, bail};

use crate::front::{Driver, Op, REQUEST};
use crate::{Result, pattern};

/// Bytes of a request.
pub const CHUNK: usize = 4096;

/// What is known of the disk, and the random numbers that choose what is next.
#[derive(Debug)]
pub struct Load {
    /// Version of each chunk from the start of the disk; 0: not written by us.
    versions: Vec<u32>,
    random: u64,
    started: u64,
    in_flight: HashMap<u64, (usize, Option<u32>)>,
    busy: Vec<bool>,
}

impl Load {
    /// A load over the first `chunks` chunks of a disk that nobody else writes.
    pub fn new(seed: u64, chunks: usize) -> Self {
        Self {
            versions: vec![0; chunks],
            random: seed,
            started: 0,
            in_flight: HashMap::new(),
            busy: vec![false; chunks],
        }
    }

    fn next(&mut self, below: usize) -> usize {
        self.random = pattern::mix(self.random);
        (self.random % below as u64) as usize
    }

    /// Does `count` requests on `queue`, `depth` in flight, after those that [`Load::fill`] left there; ends with none in
    /// flight. Calls `at` with the number of completed ones.
    pub fn run(
        &mut self,
        driver: &mut Driver,
        queue: usize,
        depth: usize,
        count: usize,
        mut at: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let (mut done, mut left) = (0, count);
        while left > 0 || !self.in_flight.is_empty() {
            while left > 0 && self.in_flight.len() < depth {
                self.start(driver, queue)?;
                left -= 1;
            }
            self.finish(driver, queue)?;
            done += 1;
            at(done)?;
        }
        Ok(())
    }

    /// Reads everything that was written and compares it.
    pub fn verify_all(&self, driver: &mut Driver) -> Result<()> {
        for (chunk, &version) in self.versions.iter().enumerate().filter(|(_, v)| **v != 0) {
            let offset = (chunk * CHUNK) as u64;
            let data = driver.read(offset, CHUNK)?;
            pattern::check(u64::from(version), offset, &data).context("read back at the end")?;
        }
        Ok(())
    }

    /// Submits requests until `depth` are in flight, and leaves them there.
    pub fn fill(&mut self, driver: &mut Driver, queue: usize, depth: usize) -> Result<()> {
        while self.in_flight.len() < depth {
            self.start(driver, queue)?;
        }
        Ok(())
    }

    /// Forgets what is in flight after its front end is gone: those writes may or may not have happened.
    pub fn abandon(&mut self) {
        for (_, (chunk, _)) in self.in_flight.drain() {
            self.versions[chunk] = 0;
            self.busy[chunk] = false;
        }
    }

    fn start(&mut self, driver: &mut Driver, queue: usize) -> Result<()> {
        // One request at a time for a chunk, so that it is known what a read must find.
        let chunk = loop {
            let chunk = self.next(self.versions.len());
            if !self.busy[chunk] {
                break chunk;
            }
        };
        let offset = (chunk * CHUNK) as u64;
        self.started += 1;
        let (op, version) = if self.started.is_multiple_of(50) {
            (Op::Flush, None)
        } else if self.versions[chunk] == 0 || self.next(2) == 0 {
            let version = u32::try_from(self.started)?;
            (Op::Write { offset, data: pattern::make(u64::from(version), offset, CHUNK) }, Some(version))
        } else {
            (Op::Read { offset, len: CHUNK }, None)
        };
        let id = driver.submit(queue, &op)?;
        self.busy[chunk] = true;
        self.in_flight.insert(id, (chunk, version));
        Ok(())
    }

    fn finish(&mut self, driver: &mut Driver, queue: usize) -> Result<()> {
        let done = driver.wait(queue, REQUEST)?;
        let Some((chunk, version)) = self.in_flight.remove(&done.id) else {
            bail!("request {} completed, which is not in flight", done.id);
        };
        self.busy[chunk] = false;
        let offset = (chunk * CHUNK) as u64;
        let data = done.result.with_context(|| format!("request {} at {offset}", done.id))?;
        match version {
            Some(version) => self.versions[chunk] = version,
            None if !data.is_empty() => {
                pattern::check(u64::from(self.versions[chunk]), offset, &data).context("read under load")?;
            }
            None => {}
        }
        Ok(())
    }
}
