//! Holds the sources back while something downstream is full that only a checkpoint can empty.
//!
//! A queue that is full holds back what stands before it, barriers too. What waits for a checkpoint must let the barrier
//! come: there the sources themselves stop taking rows in, and those on their way are few.

use tokio::sync::watch;

/// How many hold the sources back, shared by them and by those who are held.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hold(watch::Sender<usize>);

/// Holds the sources back until it is dropped.
#[derive(Debug)]
pub(crate) struct Held(watch::Sender<usize>);

impl Hold {
    pub(crate) fn hold(&self) -> Held {
        self.0.send_modify(|holding| *holding += 1);
        Held(self.0.clone())
    }

    /// For a source: not zero while it is held back.
    pub(crate) fn subscribe(&self) -> watch::Receiver<usize> {
        self.0.subscribe()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.send_modify(|holding| *holding -= 1);
    }
}
