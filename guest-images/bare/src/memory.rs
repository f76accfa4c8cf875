//! Guest memory: taken from the range that the monitor left free and never given back. Virtual and physical addresses
//! are the same.

use core::sync::atomic::{AtomicUsize, Ordering};

use virtio_drivers::PAGE_SIZE;

static NEXT: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);

/// Sets the range that is handed out.
///
/// # Safety
/// The range must be identity-mapped, zeroed, page aligned at its start and used by nobody else.
pub unsafe fn init(start: u64, end: u64) {
    NEXT.store(start as usize, Ordering::Relaxed);
    END.store(end as usize, Ordering::Relaxed);
}

/// Takes zeroed, page-aligned memory, rounded up to pages; none where there is not enough left.
pub fn take(len_bytes: usize) -> Option<&'static mut [u8]> {
    let rounded = len_bytes.checked_next_multiple_of(PAGE_SIZE)?;
    let at = NEXT.load(Ordering::Relaxed);
    let end = at.checked_add(rounded)?;
    if at == 0 || end > END.load(Ordering::Relaxed) {
        return None;
    }
    NEXT.store(end, Ordering::Relaxed);
    // SAFETY: inside the range of `init`, and each byte is handed out once.
    Some(unsafe { core::slice::from_raw_parts_mut(at as *mut u8, len_bytes) })
}
