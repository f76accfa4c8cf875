//! The disk as the guest knows it: what each block may hold, by what was answered so far.
//!
//! Each block is a register with concurrent writers. Kept are, for each block, the writes that it may hold now, and those
//! that it may hold after a power loss ([`Held`]). An answer narrows both down: a write that was answered before another one began is gone when that is answered; a read that was
//! answered has shown which write came last. Where two orders are possible, both are allowed: the oracle never accuses an
//! innocent, and misses only what no guest could tell either.
//!
//! A write that was answered with an error may happen or not, at any time until a later write, to whatever block, was
//! answered well: nothing is written as long as an older write may still act.
//!
//! A power loss of the target takes back what was not flushed. The guest does not notice when; so what was answered by the
//! target before, and reached the guest after it, counts as answered before ([`Oracle::power_loss`]).

use super::content::Seen;

/// Number of a write, from 1; 0 is what the disk held in the beginning (zeroes).
pub type WriteId = u32;

/// Guest-visible events, counted: before and after are these numbers, not the time.
pub type Tick = u64;

/// A request that was not answered yet.
#[derive(Debug)]
pub enum Active {
    /// What may be read, for each block.
    Read {
        since: Tick,
        lba: u64,
        allowed: Vec<Vec<WriteId>>,
        crossed: bool,
    },
    Write {
        since: Tick,
        id: WriteId,
        lba: u64,
        blocks: u64,
        exposed: bool,
    },
    /// What may be durable, for each block of the disk.
    Flush {
        since: Tick,
        floor: Vec<Vec<WriteId>>,
    },
}

/// A write that a block may hold, now or after a power loss.
#[derive(Clone, Copy, Debug)]
struct Held {
    id: WriteId,
    /// When it was certainly done; [`NEVER`] while it is under way, or was answered with an error and may still happen.
    done: Tick,
    /// When it was answered with an error; [`NEVER`] if it was not.
    failed: Tick,
    /// Whether it is under way.
    pending: bool,
    /// Whether the block may hold it now; if not, it may come back by a power loss.
    current: bool,
}

const NEVER: Tick = Tick::MAX;

#[derive(Debug)]
struct Block(Vec<Held>);

#[derive(Clone, Copy, Debug)]
struct Write {
    zeroes: bool,
    since: Tick,
}

#[derive(Debug)]
pub struct Oracle {
    blocks: Vec<Block>,
    writes: Vec<Write>,
    tick: Tick,
    /// A write is durable when it is answered.
    pub write_through: bool,
}

impl Oracle {
    pub fn new(blocks: u64) -> Self {
        let first = Held { id: 0, done: 0, failed: NEVER, pending: false, current: true };
        Self {
            blocks: (0..blocks).map(|_| Block(vec![first])).collect(),
            writes: vec![Write { zeroes: true, since: 0 }],
            tick: 0,
            write_through: false,
        }
    }

    fn next(&mut self) -> Tick {
        self.tick += 1;
        self.tick
    }

    fn range(&mut self, lba: u64, blocks: u64) -> &mut [Block] {
        &mut self.blocks[lba as usize..(lba + blocks) as usize]
    }

    /// A write (or write of zeroes) begins; `others` are the requests under way.
    pub fn write(&mut self, lba: u64, blocks: u64, zeroes: bool, others: &mut [Option<Active>]) -> Active {
        let (since, id) = (self.next(), self.writes.len() as WriteId);
        self.writes.push(Write { zeroes, since });
        for block in self.range(lba, blocks) {
            block.0.push(Held { id, done: NEVER, failed: NEVER, pending: true, current: false });
        }
        for other in others.iter_mut().flatten() {
            if let Active::Read { lba: from, allowed, .. } = other {
                for (at, allowed) in (*from..).zip(allowed) {
                    if (lba..lba + blocks).contains(&at) {
                        allowed.push(id);
                    }
                }
            }
        }
        Active::Write { since, id, lba, blocks, exposed: false }
    }

    pub fn read(&mut self, lba: u64, blocks: u64) -> Active {
        let since = self.next();
        let allowed = self.range(lba, blocks).iter().map(Block::possible).collect();
        Active::Read { since, lba, allowed, crossed: false }
    }

    pub fn flush(&mut self) -> Active {
        let since = self.next();
        Active::Flush { since, floor: self.blocks.iter().map(Block::possible).collect() }
    }

    /// A request was answered with an error.
    pub fn failed(&mut self, request: &Active) {
        let now = self.next();
        if let Active::Write { id, lba, blocks, .. } = *request {
            for block in self.range(lba, blocks) {
                block.answered(id, |held| held.failed = now);
            }
        }
    }

    /// A write was answered well. For a discard, `certain` is false: what the blocks hold then is the unit's affair.
    pub fn written(&mut self, request: &Active, certain: bool) {
        let now = self.next();
        let write_through = self.write_through;
        let Active::Write { since, id, lba, blocks, exposed } = *request else { return };
        for block in &mut self.blocks {
            block.settle_failed(since);
        }
        for block in self.range(lba, blocks) {
            if certain && !exposed {
                block.overwritten(since, |_| false);
            }
            block.answered(id, |held| held.done = now);
            if write_through && certain {
                block.0.retain(|held| held.current || held.pending);
            }
        }
    }

    /// A read was answered well: checks the blocks.
    pub fn was_read(&mut self, request: &Active, data: &[Seen]) -> Result<(), String> {
        self.next();
        let Active::Read { since, lba, allowed, crossed } = request else { return Ok(()) };
        for (n, (&seen, allowed)) in data.iter().zip(allowed).enumerate() {
            let at = lba + n as u64;
            let matches = |id: WriteId| match seen {
                Seen::Zero => self.writes[id as usize].zeroes,
                Seen::Write(write) => write == id,
                Seen::Garbage(_) => false,
            };
            if !allowed.iter().any(|&id| matches(id)) {
                let block = &self.blocks[at as usize];
                return Err(format!(
                    "block {at} read as {seen:?}, but it may only be of writes {allowed:?} (0: never written); \
                     now possible {:?}",
                    block.possible()
                ));
            }
            let shown: Vec<_> = allowed.iter().copied().filter(|&id| matches(id)).collect();
            let block = &mut self.blocks[at as usize];
            if !crossed {
                block.overwritten(*since, |id| shown.contains(&id));
            }
        }
        Ok(())
    }

    /// A flush was answered well.
    pub fn flushed(&mut self, request: &Active) {
        self.next();
        let Active::Flush { since, floor } = request else { return };
        let writes = &self.writes;
        for (block, floor) in self.blocks.iter_mut().zip(floor) {
            block.0.retain(|held| floor.contains(&held.id) || writes[held.id as usize].since > *since);
        }
    }

    /// The target lost its volatile cache. `answered` tells whether it had answered all of a write by then.
    pub fn power_loss(&mut self, active: &mut [Option<Active>], answered: impl Fn(WriteId, u64) -> bool) {
        self.next();
        let write_through = self.write_through;
        for held in self.blocks.iter_mut().flat_map(|block| &mut block.0) {
            held.current |= !held.pending;
        }
        for request in active.iter_mut().flatten() {
            match request {
                Active::Read { lba, allowed, crossed, .. } => {
                    *crossed = true;
                    for (at, allowed) in (*lba..).zip(allowed) {
                        allowed.extend(self.blocks[at as usize].0.iter().map(|held| held.id));
                    }
                }
                Active::Write { id, blocks, exposed, .. } => {
                    let zeroes = self.writes[*id as usize].zeroes;
                    *exposed |= !write_through && (zeroes || answered(*id, *blocks));
                }
                Active::Flush { floor, .. } => {
                    for (floor, block) in floor.iter_mut().zip(&self.blocks) {
                        *floor = block.possible();
                    }
                }
            }
        }
    }
}

impl Block {
    /// What it may hold now.
    fn possible(&self) -> Vec<WriteId> {
        self.0.iter().filter(|held| held.current || held.pending).map(|held| held.id).collect()
    }

    fn answered(&mut self, id: WriteId, mark: impl Fn(&mut Held)) {
        for held in self.0.iter_mut().filter(|held| held.id == id) {
            (held.pending, held.current) = (false, true);
            mark(held);
        }
    }

    /// A request that began at `since` shows that what was done before is no longer there, but for what it shows itself.
    fn overwritten(&mut self, since: Tick, shown: impl Fn(WriteId) -> bool) {
        for held in &mut self.0 {
            held.current &= held.done > since || shown(held.id);
        }
    }

    /// A write that began at `since` was answered well: what failed before that was over when it began.
    fn settle_failed(&mut self, since: Tick) {
        for held in self.0.iter_mut().filter(|held| held.failed < since && held.done == NEVER) {
            held.done = since;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(oracle: &mut Oracle) -> (Active, WriteId) {
        let active = oracle.write(0, 1, false, &mut []);
        let Active::Write { id, .. } = active else { unreachable!() };
        (active, id)
    }

    fn reads(oracle: &mut Oracle, id: WriteId) -> bool {
        let active = oracle.read(0, 1);
        let seen = if id == 0 { Seen::Zero } else { Seen::Write(id) };
        oracle.was_read(&active, &[seen]).is_ok()
    }

    #[test]
    fn what_was_answered_is_there() {
        let mut oracle = Oracle::new(1);
        let (a, first) = write(&mut oracle);
        oracle.written(&a, true);
        assert!(reads(&mut oracle, first) && !reads(&mut oracle, 0));
        let (b, second) = write(&mut oracle);
        // Under way: either, but once the new one was seen, never the old one again.
        assert!(reads(&mut oracle, first) && reads(&mut oracle, second) && !reads(&mut oracle, first));
        oracle.written(&b, true);
        assert!(!reads(&mut oracle, first));
    }

    #[test]
    fn concurrent_writes_end_in_either_order() {
        let mut oracle = Oracle::new(1);
        let (a, first) = write(&mut oracle);
        let (b, second) = write(&mut oracle);
        oracle.written(&a, true);
        oracle.written(&b, true);
        assert!(reads(&mut oracle, first) && !reads(&mut oracle, second));
    }

    #[test]
    fn a_failed_write_may_happen_until_another_write_is_answered() {
        let mut oracle = Oracle::new(2);
        let (a, first) = write(&mut oracle);
        oracle.failed(&a);
        assert!(reads(&mut oracle, 0) && reads(&mut oracle, first) && !reads(&mut oracle, 0));
        let (b, second) = write(&mut oracle);
        oracle.written(&b, true);
        assert!(
            reads(&mut oracle, second) && !reads(&mut oracle, first),
            "an acknowledged write was lost to it"
        );
        // A write elsewhere is enough: it has happened by now, or never will.
        let mut oracle = Oracle::new(2);
        let (a, first) = write(&mut oracle);
        oracle.failed(&a);
        let b = oracle.write(1, 1, false, &mut []);
        oracle.written(&b, true);
        assert!(reads(&mut oracle, 0) && !reads(&mut oracle, first));
    }

    #[test]
    fn a_power_loss_takes_what_was_not_flushed() {
        let mut oracle = Oracle::new(1);
        let (a, first) = write(&mut oracle);
        oracle.written(&a, true);
        let flush = oracle.flush();
        oracle.flushed(&flush);
        let (b, second) = write(&mut oracle);
        oracle.written(&b, true);
        oracle.power_loss(&mut [], |_, _| false);
        assert!(!reads(&mut oracle, 0), "it was flushed");
        assert!(reads(&mut oracle, first) && !reads(&mut oracle, second));
        oracle.write_through = true;
        let (c, third) = write(&mut oracle);
        oracle.written(&c, true);
        oracle.power_loss(&mut [], |_, _| false);
        assert!(reads(&mut oracle, third) && !reads(&mut oracle, first));
    }

    #[test]
    fn a_write_that_was_not_wholly_answered_before_the_power_loss_must_be_there() {
        for answered in [false, true] {
            let mut oracle = Oracle::new(1);
            let (a, _) = write(&mut oracle);
            let mut active = [Some(a)];
            oracle.power_loss(&mut active, |_, _| answered);
            let Some(a) = active[0].take() else { unreachable!() };
            oracle.written(&a, true);
            assert_eq!(reads(&mut oracle, 0), answered);
        }
    }
}
