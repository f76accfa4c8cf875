//! Who may emulate at the same time: a helper VM, with a guest inside a guest, has the host to itself; other machines of
//! this program share it. Time limits then mean something on a small host. Other programs are not kept apart.

use std::sync::{Condvar, Mutex, PoisonError};

static GATE: Gate = Gate { inside: Mutex::new(Inside::Shared(0)), changed: Condvar::new() };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    /// So many machines that share the host.
    Shared(usize),
    Alone,
}

#[derive(Debug)]
struct Gate {
    inside: Mutex<Inside>,
    changed: Condvar,
}

/// The right to run a machine; given back when it is dropped.
#[derive(Debug)]
pub struct Permit {
    gate: &'static Gate,
}

/// Waits until no machine runs alone. Somebody who has a permit of this kind may ask for another: those who share go
/// before one who waits to be alone.
#[must_use]
pub fn shared() -> Permit {
    GATE.enter(|inside| match inside {
        Inside::Shared(count) => Some(Inside::Shared(count + 1)),
        Inside::Alone => None,
    })
}

/// Waits until no machine runs.
#[must_use]
pub fn alone() -> Permit {
    GATE.enter(|inside| (inside == Inside::Shared(0)).then_some(Inside::Alone))
}

impl Gate {
    fn enter(&'static self, next: impl Fn(Inside) -> Option<Inside>) -> Permit {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(next) = next(*inside) {
                *inside = next;
                return Permit { gate: self };
            }
            inside = self.changed.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut inside = self.gate.inside.lock().unwrap_or_else(PoisonError::into_inner);
        *inside = match *inside {
            Inside::Shared(count) => Inside::Shared(count.saturating_sub(1)),
            Inside::Alone => Inside::Shared(0),
        };
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{TryRecvError, channel};

    #[test]
    fn one_that_is_alone_waits_for_all_and_all_wait_for_it() {
        let first = shared();
        let second = shared();
        let (sender, alone_at_last) = channel();
        let (go, wait) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let permit = alone();
            sender.send(()).unwrap();
            wait.recv().unwrap();
            drop(permit);
        });
        drop(first);
        assert_eq!(alone_at_last.try_recv(), Err(TryRecvError::Empty));
        // Sharing is still possible while somebody waits to be alone.
        drop(shared());
        drop(second);
        alone_at_last.recv().unwrap();
        let (sender, shared_at_last) = channel();
        let other = std::thread::spawn(move || {
            let _permit = shared();
            sender.send(()).unwrap();
        });
        assert_eq!(shared_at_last.try_recv(), Err(TryRecvError::Empty));
        go.send(()).unwrap();
        shared_at_last.recv().unwrap();
        thread.join().unwrap();
        other.join().unwrap();
    }
}
