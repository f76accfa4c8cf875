//! The loads of `bench blk`: the few that the quick run measures, and the whole matrix.

/// One load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Case {
    /// `--rw` of `vcp bench blk`.
    pub(super) rw: &'static str,
    /// Bytes per request, in KiB.
    pub(super) kib: u32,
    /// Requests in flight on each queue.
    pub(super) depth: u32,
    /// Queues.
    pub(super) queues: u32,
}

impl Case {
    const fn new(rw: &'static str, kib: u32, depth: u32, queues: u32) -> Self {
        Self { rw, kib, depth, queues }
    }

    /// Its name in tables.
    pub(super) fn name(&self) -> String {
        let queues = if self.queues == 1 { String::new() } else { format!(" x{}", self.queues) };
        format!("{}k {} qd{}{queues}", self.kib, self.rw, self.depth)
    }
}

/// What the goals are about, and one load of each other kind.
pub(super) fn quick() -> Vec<Case> {
    vec![
        Case::new("randread", 4, 1, 1),
        Case::new("randread", 4, 32, 1),
        Case::new("randwrite", 4, 1, 1),
        Case::new("randwrite", 4, 32, 1),
        Case::new("randread", 4, 32, 4),
        Case::new("randrw", 16, 32, 1),
        Case::new("read", 128, 8, 1),
        Case::new("write", 128, 8, 1),
    ]
}

/// Every size, kind, depth and number of queues with every other. Long transfers are sequential, short ones random.
pub(super) fn full() -> Vec<Case> {
    let mut cases = Vec::new();
    for kib in [4, 16, 128] {
        let kinds =
            if kib == 128 { ["read", "write", "randrw"] } else { ["randread", "randwrite", "randrw"] };
        for rw in kinds {
            for depth in [1, 32, 128] {
                for queues in [1, 4] {
                    cases.push(Case::new(rw, kib, depth, queues));
                }
            }
        }
    }
    // Not in the matrix, but what the goals for long transfers are measured at.
    cases.extend([Case::new("read", 128, 8, 1), Case::new("write", 128, 8, 1)]);
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_matrix_has_the_quick_loads_and_no_load_twice() {
        let full = full();
        assert_eq!(full.len(), 3 * 3 * 3 * 2 + 2);
        for (at, case) in full.iter().enumerate() {
            assert!(!full[..at].contains(case), "{}", case.name());
        }
        for case in quick() {
            assert!(full.contains(&case), "{}", case.name());
        }
    }
}
