//! The two full fences of the sleep rule, as types, so that tests can take either out of the very code that is shipped
//! and show that a wake-up is then lost.

use crate::sync::{Ordering, fence};

/// Which fences there are.
pub trait Fences {
    /// Between publishing and looking whether the peer sleeps.
    fn producer();
    /// Between announcing the sleep and the last look.
    fn consumer();
}

/// Both: the protocol.
#[derive(Clone, Copy, Debug)]
pub struct Full;

impl Fences for Full {
    #[inline]
    fn producer() {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn consumer() {
        fence(Ordering::SeqCst);
    }
}

/// Broken on purpose: no fence where messages are published.
#[derive(Clone, Copy, Debug)]
#[doc(hidden)]
pub struct NoProducer;

impl Fences for NoProducer {
    #[inline]
    fn producer() {
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    }

    #[inline]
    fn consumer() {
        fence(Ordering::SeqCst);
    }
}

/// Broken on purpose: no fence where the sleep is announced.
#[derive(Clone, Copy, Debug)]
#[doc(hidden)]
pub struct NoConsumer;

impl Fences for NoConsumer {
    #[inline]
    fn producer() {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn consumer() {
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    }
}
