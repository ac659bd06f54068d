//! Queues between tasks, bounded by what waits in them: messages, and the rows these hold, of which large ones count more.
//!
//! A bound on messages alone would let a queue of full batches hold a hundred times the rows of a queue of small
//! ones; under load each barrier, and the stop, would wait behind all of them.

use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::mpsc::{self, error::TryRecvError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::batch::BATCH_ROWS_MAX;

/// Rows that wait in one queue: a full batch for the consumer to take up next, and one more for the producer to lay
/// down meanwhile. At this limit the producer waits.
pub(crate) const QUEUE_ROWS_MAX: usize = 2 * BATCH_ROWS_MAX;

/// A row of more bytes than this takes the room of several.
const ROW_BYTES: usize = 4 << 10;

/// The room that rows of so many bytes in all take in a queue.
pub(crate) fn room(rows: usize, bytes: usize) -> usize {
    rows.max(bytes / ROW_BYTES)
}

/// A new queue of at most `messages` messages and [`QUEUE_ROWS_MAX`] rows.
pub(crate) fn queue<T>(messages: usize) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = mpsc::channel(messages);
    (Sender { sender, room: Arc::new(Semaphore::new(QUEUE_ROWS_MAX)) }, Receiver { receiver })
}

/// A message, with the room that it takes until it is received.
struct Waiting<T> {
    message: T,
    _room: Option<OwnedSemaphorePermit>,
}

/// The receiver of a queue is gone.
#[derive(Debug)]
pub(crate) struct Closed;

/// The producer's end.
pub(crate) struct Sender<T> {
    sender: mpsc::Sender<Waiting<T>>,
    room: Arc<Semaphore>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), room: Arc::clone(&self.room) }
    }
}

impl<T> Sender<T> {
    /// Waits for room and sends. A message of more rows than fit waits until the queue holds no other row.
    pub(crate) async fn send(&self, message: T, rows: usize) -> Result<(), Closed> {
        let rows = u32::try_from(rows.min(QUEUE_ROWS_MAX)).unwrap_or(u32::MAX);
        let room = match rows {
            0 => None,
            // The receiver's end drops what waits, and with it the room taken: this resolves, and sending fails.
            rows => Some(Arc::clone(&self.room).acquire_many_owned(rows).await.map_err(|_| Closed)?),
        };
        self.sender.send(Waiting { message, _room: room }).await.map_err(|_| Closed)
    }

    /// Resolves when the receiver is closed or gone.
    pub(crate) async fn closed(&self) {
        self.sender.closed().await;
    }
}

/// The consumer's end.
pub(crate) struct Receiver<T> {
    receiver: mpsc::Receiver<Waiting<T>>,
}

impl<T> Receiver<T> {
    /// The next message; `None` when all senders are gone. Cancel safe.
    pub(crate) async fn recv(&mut self) -> Option<T> {
        self.receiver.recv().await.map(|waiting| waiting.message)
    }

    /// The next message if one waits.
    pub(crate) fn try_recv(&mut self) -> Result<T, TryRecvError> {
        self.receiver.try_recv().map(|waiting| waiting.message)
    }

    /// As [`Self::recv`], for hand-written futures.
    pub(crate) fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<T>> {
        self.receiver.poll_recv(context).map(|waiting| waiting.map(|waiting| waiting.message))
    }

    /// Takes no more messages; those that wait can still be received.
    pub(crate) fn close(&mut self) {
        self.receiver.close();
    }

    /// Messages that wait.
    pub(crate) fn len(&self) -> usize {
        self.receiver.len()
    }

    /// Whether no message waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.receiver.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::poll;

    use super::*;

    #[test]
    fn large_rows_take_the_room_of_several() {
        for (rows, bytes, expected) in
            [(0, 0, 0), (8192, 100 * 8192, 8192), (512, 512 * 150_000, 18_750), (1, 5_000, 1)]
        {
            assert_eq!(room(rows, bytes), expected, "{rows} rows of {bytes} bytes");
        }
    }

    #[tokio::test]
    async fn rows_bound_a_queue_and_signals_pass() {
        let (sender, mut receiver) = queue(16);
        for (message, rows) in [("full", BATCH_ROWS_MAX), ("full too", BATCH_ROWS_MAX), ("signal", 0)] {
            sender.send(message, rows).await.expect("room");
        }
        {
            let mut third = pin!(sender.send("third", 1));
            assert!(poll!(third.as_mut()).is_pending(), "no room for another row");
            assert_eq!(receiver.recv().await, Some("full"));
            third.await.expect("room again");
        }
        for expected in ["full too", "signal", "third"] {
            assert_eq!(receiver.recv().await, Some(expected));
        }
        // Larger than the queue: alone in it.
        sender.send("huge", 10 * QUEUE_ROWS_MAX).await.expect("an empty queue");
        let mut next = pin!(sender.send("next", 1));
        assert!(poll!(next.as_mut()).is_pending());
        drop(receiver);
        assert!(next.await.is_err(), "a sender does not wait for a receiver that is gone");
    }
}
