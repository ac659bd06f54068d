//! Records that were given out and not acknowledged yet, shared by a reader and its acknowledger.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// What is kept of each record, with its token, in the order of receipt.
pub(super) struct Unacknowledged<T>(Arc<Shared<T>>);

struct Shared<T> {
    records: Mutex<VecDeque<(u64, T)>>,
    /// Some have been acknowledged.
    fewer: Notify,
}

impl<T> Clone for Unacknowledged<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Default for Unacknowledged<T> {
    fn default() -> Self {
        Self(Arc::new(Shared { records: Mutex::default(), fewer: Notify::new() }))
    }
}

impl<T> Unacknowledged<T> {
    /// Notes a record. Tokens grow.
    pub(super) fn push(&self, token: u64, kept: T) {
        self.0.records.lock().unwrap_or_else(PoisonError::into_inner).push_back((token, kept));
    }

    /// Takes out what is kept of these records. Those before them were refused, and are forgotten.
    pub(super) fn take(&self, tokens: &[u64]) -> Vec<T> {
        let mut taken = Vec::with_capacity(tokens.len());
        {
            let mut records = self.0.records.lock().unwrap_or_else(PoisonError::into_inner);
            for token in tokens {
                while let Some((number, kept)) = records.pop_front_if(|(number, _)| *number <= *token) {
                    if number == *token {
                        taken.push(kept);
                    }
                }
            }
        }
        self.0.fewer.notify_one();
        taken
    }

    /// Waits until `more` records can be given out and no more than `max` are unacknowledged. For one reader.
    pub(super) async fn room(&self, more: usize, max: usize) {
        while self.0.records.lock().unwrap_or_else(PoisonError::into_inner).len() + more > max {
            self.0.fewer.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn no_more_are_given_out_than_are_remembered() {
        let records = Unacknowledged::default();
        for token in 1..=3 {
            assert_eq!(records.room(1, 3).now_or_never(), Some(()), "{token}");
            records.push(token, token * 10);
        }
        assert_eq!(records.room(1, 3).now_or_never(), None, "all three are unacknowledged");
        assert_eq!(records.take(&[2]), [20], "the one before it was refused");
        assert_eq!(records.room(2, 3).now_or_never(), Some(()));
        assert_eq!(records.room(3, 3).now_or_never(), None);
        assert_eq!(records.take(&[3]), [30]);
        assert_eq!(records.room(3, 3).now_or_never(), Some(()));
    }
}
