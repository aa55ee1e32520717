//! Locks that survive a panic.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A poisoned lock still holds usable data: the writer panicked, the reader need not.
pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
