//! The task that empties an outbox into its sink.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::time::sleep;
use tracing::warn;

use super::Outbox;
use crate::error::{Result, Retry};
use crate::plugin::OutboxSink;
use crate::runtime::back_off::BackOff;
use crate::status::{NodeState, NodeStatus};
use crate::time::now_us;

/// Empties an outbox into its sink, connecting and retrying as needed. Runs until it is dropped.
pub(crate) struct DeliveryTask {
    pub(crate) name: String,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) sink: Box<dyn OutboxSink>,
    pub(crate) status: Arc<NodeStatus>,
    /// Whether the other side knows of no row that it should not.
    pub(crate) checked: bool,
}

impl DeliveryTask {
    pub(crate) async fn run(mut self) {
        let mut back_off = BackOff::new(now_us() as u64);
        loop {
            let error = match self.connected(&mut back_off).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            self.status.errors.fetch_add(1, Relaxed);
            if error.retry == Retry::Never {
                tracing::error!(sink = %self.name, "{error}");
                self.status.set_state(NodeState::Failed(error.to_string()));
                self.outbox.failing.send_replace(true);
            } else {
                self.status.set_state(NodeState::Retrying(error.to_string()));
            }
            // Even an error that is the user's to mend is tried again: a table may be created meanwhile, and giving
            // up would lose the rows that wait.
            let wait = back_off.wait();
            warn!(sink = %self.name, "{error}; trying again in {:.1} s", wait.as_secs_f64());
            sleep(wait).await;
        }
    }

    /// Connects and delivers until something fails.
    async fn connected(&mut self, back_off: &mut BackOff) -> Result<std::convert::Infallible> {
        self.sink.connect().await?;
        if !self.checked {
            for input in 0..self.outbox.inputs() {
                if let Some(last) = self.sink.last_delivery(input).await? {
                    self.outbox.check_numbers(input, last)?;
                }
            }
            self.checked = true;
        }
        self.status.set_state(NodeState::Healthy);
        self.outbox.failing.send_replace(false);
        loop {
            let delivery = self.outbox.due().await?;
            let rows = delivery.rows.num_rows() as u64;
            match self.sink.deliver(delivery.input, &delivery.rows, delivery.id).await {
                Ok(()) => {
                    back_off.reset();
                    self.status.rows_out.fetch_add(rows, Relaxed);
                    self.status.batches_out.fetch_add(1, Relaxed);
                }
                Err(error) if error.retry == Retry::Never => {
                    tracing::error!(sink = %self.name, rows, "rows are refused: {error}");
                    self.status.errors.fetch_add(1, Relaxed);
                    self.status.dropped_rows.fetch_add(rows, Relaxed);
                }
                Err(error) => return Err(error),
            }
            self.outbox.done(&delivery);
        }
    }
}
