//! Where a test may kill the device: before each store to memory that outlives it.
//!
//! Outside the unit tests of this crate nothing of it is left.

/// A store that others may find after a crash comes next.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn point() {}

#[cfg(test)]
pub(crate) use armed::{at, point};

#[cfg(test)]
mod armed {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        /// Stores until the crash; `None`: no crash.
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// What a crash unwinds with.
    #[derive(Debug)]
    pub(crate) struct Crash;

    pub(crate) fn point() {
        if let Some(left) = LEFT.get() {
            if left == 0 {
                LEFT.set(None);
                // Without the panic hook: a crash is expected.
                resume_unwind(Box::new(Crash));
            }
            LEFT.set(Some(left - 1));
        }
    }

    /// Runs `f` and kills it before store number `stores`; `Err` if it came that far.
    pub(crate) fn at<T>(stores: u32, f: impl FnOnce() -> T) -> Result<T, Crash> {
        LEFT.set(Some(stores));
        let result = catch_unwind(AssertUnwindSafe(f));
        LEFT.set(None);
        result.map_err(|payload| match payload.downcast::<Crash>() {
            Ok(_) => Crash,
            Err(other) => resume_unwind(other),
        })
    }
}
