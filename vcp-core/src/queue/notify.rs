//! The order of steps that makes it safe to sleep: announce that notifications are wanted, full fence, look again.
//!
//! The driver does the mirror image: publish the new chain, full fence, read whether a notification is wanted. With
//! both fences at least one side sees the other's store, so a chain is either found by the last look or notified.
//! `tests/loom_notify.rs` explores every interleaving of this very function, and shows that it fails without the fence.

/// The three steps on some ring. A trait, so that the model test runs the same code on modelled memory.
pub trait ArmSteps {
    /// What a step can fail with.
    type Error;
    /// Stores "notifications wanted from here on".
    ///
    /// # Errors
    /// The ring is not accessible.
    fn announce(&mut self) -> Result<(), Self::Error>;
    /// Orders the store before the load that follows.
    fn fence(&mut self);
    /// Loads whether something is there already.
    ///
    /// # Errors
    /// The ring is not accessible.
    fn look(&mut self) -> Result<bool, Self::Error>;
}

/// Arms notifications; true if the caller must not sleep because something is there already.
///
/// # Errors
/// As the steps.
pub fn arm_then_look<S: ArmSteps>(steps: &mut S) -> Result<bool, S::Error> {
    steps.announce()?;
    steps.fence();
    steps.look()
}
