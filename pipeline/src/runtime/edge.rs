//! Edges between nodes: bounded queues, and the alignment of barriers over several of them.

use std::future::poll_fn;
use std::task::Poll;

use super::queue::{Receiver, Sender, queue};
use crate::batch::{Batch, Stage};

/// Batches and signals that wait on one edge, beside the queue's bound on rows. Enough to keep both ends busy; more
/// would only add delay and memory before back-pressure reaches the source.
const EDGE_MESSAGES_MAX: usize = 16;

/// A checkpoint's mark in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Barrier {
    /// Number of the checkpoint.
    pub(crate) checkpoint: u64,
    /// Whether the process stops after it.
    pub(crate) last: bool,
}

/// What flows on an edge.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    /// Rows, and the number of this output batch of the pipeline.
    Batch(Batch, u64),
    /// No row before this event time will come that is not late. Also withdraws [`Self::Idle`].
    Watermark(i64),
    /// The producer is idle until its next batch or watermark; if all inputs are, event time may go on to this.
    Idle(i64),
    /// A checkpoint.
    Barrier(Barrier),
    /// Nothing more will come.
    End,
}

/// Which stages a consumer takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    /// Settled rows only: downstream pipelines, plain sinks.
    Final,
    /// Also corrections: history, upserts.
    FinalAndRevised,
    /// Everything: live sinks.
    All,
}

impl Takes {
    fn takes(self, stage: Stage) -> bool {
        match stage {
            Stage::Final => true,
            Stage::Revised => self != Self::Final,
            Stage::Partial => self == Self::All,
        }
    }
}

/// The consumers of one producer. The slowest rules.
#[derive(Default)]
pub(crate) struct Outlet {
    consumers: Vec<(Sender<Message>, Takes)>,
}

impl Outlet {
    pub(crate) fn add(&mut self, takes: Takes) -> Receiver<Message> {
        let (sender, receiver) = queue(EDGE_MESSAGES_MAX);
        self.consumers.push((sender, takes));
        receiver
    }

    /// Sends to every consumer, waiting where one is full. A consumer that is gone is skipped.
    /// Returns how many consumers refused the batch because of its stage.
    pub(crate) async fn send(&self, message: Message) -> u64 {
        let mut refused = 0;
        let rows = if let Message::Batch(batch, _) = &message { batch.len() } else { 0 };
        for (sender, takes) in &self.consumers {
            match &message {
                Message::Batch(batch, _) if !takes.takes(batch.stage()) => refused += 1,
                message => {
                    let _ = sender.send(message.clone(), rows).await;
                }
            }
        }
        refused
    }
}

/// What a node with several inputs sees.
#[derive(Debug)]
pub(crate) enum Event {
    Batch(usize, Batch, u64),
    Watermark(usize, i64),
    Idle(usize, i64),
    /// The barrier has come on every input.
    Barrier(Barrier),
    /// Every input has ended.
    End,
}

/// Several inputs read as one, with aligned barriers: an input whose barrier has come is not read until the
/// others have theirs.
pub(crate) struct Inputs {
    list: Vec<Input>,
    next: usize,
}

struct Input {
    receiver: Receiver<Message>,
    barrier: Option<Barrier>,
    ended: bool,
}

impl Inputs {
    pub(crate) fn new(receivers: Vec<Receiver<Message>>) -> Self {
        let list = receivers.into_iter().map(|receiver| Input { receiver, barrier: None, ended: false }).collect();
        Self { list, next: 0 }
    }

    /// Messages waiting on all inputs.
    pub(crate) fn queued(&self) -> usize {
        self.list.iter().map(|input| input.receiver.len()).sum()
    }

    /// The next event. Cancel safe.
    pub(crate) async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.aligned() {
                return event;
            }
            let (index, message) = self.receive().await;
            match message {
                Some(Message::Batch(batch, number)) => return Event::Batch(index, batch, number),
                Some(Message::Watermark(time)) => return Event::Watermark(index, time),
                Some(Message::Idle(time)) => return Event::Idle(index, time),
                Some(Message::Barrier(barrier)) => self.list[index].barrier = Some(barrier),
                Some(Message::End) | None => self.list[index].ended = true,
            }
        }
    }

    fn aligned(&mut self) -> Option<Event> {
        let open = || self.list.iter().filter(|input| !input.ended);
        let barrier = self.list.iter().find_map(|input| input.barrier);
        match barrier {
            Some(barrier) if open().all(|input| input.barrier.is_some()) => {
                self.list.iter_mut().for_each(|input| input.barrier = None);
                Some(Event::Barrier(barrier))
            }
            None if open().next().is_none() => Some(Event::End),
            _ => None,
        }
    }

    /// One message of any input that is neither ended nor behind its barrier, in turn.
    async fn receive(&mut self) -> (usize, Option<Message>) {
        let count = self.list.len();
        let (index, message) = poll_fn(|context| {
            for offset in 0..count {
                let index = (self.next + offset) % count;
                let input = &mut self.list[index];
                if input.ended || input.barrier.is_some() {
                    continue;
                }
                if let Poll::Ready(message) = input.receiver.poll_recv(context) {
                    return Poll::Ready((index, message));
                }
            }
            Poll::Pending
        })
        .await;
        self.next = (index + 1) % count;
        (index, message)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use arrow::array::RecordBatch;
    use futures::poll;

    use super::*;
    use crate::batch::Times;
    use crate::schema::{FieldType, schema_of};

    const FIRST: Barrier = Barrier { checkpoint: 1, last: false };
    const SECOND: Barrier = Barrier { checkpoint: 2, last: true };

    fn batch(stage: Stage) -> Batch {
        let rows = RecordBatch::new_empty(schema_of([("a", FieldType::Int)]));
        Batch::new(rows, Times::constant(0, 0, 0, 0), stage).expect("a batch")
    }

    /// Sends what each input holds, ends none, and returns the events in short until nothing more comes.
    async fn events(sent: &[Vec<Message>]) -> Vec<String> {
        let mut outlets = Vec::new();
        let mut receivers = Vec::new();
        for messages in sent {
            let mut outlet = Outlet::default();
            receivers.push(outlet.add(Takes::All));
            for message in messages {
                outlet.send(message.clone()).await;
            }
            outlets.push(outlet);
        }
        let mut inputs = Inputs::new(receivers);
        let mut seen = Vec::new();
        loop {
            let next = match poll!(pin!(inputs.next())) {
                Poll::Ready(event) => event,
                Poll::Pending => return seen,
            };
            seen.push(match next {
                Event::Batch(input, _, number) => format!("{input}: batch {number}"),
                Event::Watermark(input, time) => format!("{input}: watermark {time}"),
                Event::Idle(input, time) => format!("{input}: idle {time}"),
                Event::Barrier(barrier) => format!("barrier {}", barrier.checkpoint),
                Event::End => {
                    seen.push("end".to_owned());
                    return seen;
                }
            });
        }
    }

    #[tokio::test]
    async fn barriers_align_over_all_inputs_that_have_not_ended() {
        use Message::{Barrier, End, Idle, Watermark};
        for (case, sent, expected) in [
            (
                "one input",
                vec![vec![Watermark(1), Barrier(FIRST), Watermark(2), End]],
                vec!["0: watermark 1", "barrier 1", "0: watermark 2", "end"],
            ),
            (
                "an input behind its barrier is not read until the other has its own",
                vec![vec![Barrier(FIRST), Watermark(9)], vec![Watermark(1), Watermark(2), Idle(3)]],
                vec!["1: watermark 1", "1: watermark 2", "1: idle 3"],
            ),
            (
                "rows after the barrier come after it",
                vec![vec![Barrier(FIRST), Watermark(9)], vec![Watermark(1), Barrier(FIRST)]],
                vec!["1: watermark 1", "barrier 1", "0: watermark 9"],
            ),
            (
                "an ended input does not hold the barrier",
                vec![vec![End], vec![Watermark(1), Barrier(FIRST), Watermark(2)]],
                vec!["1: watermark 1", "barrier 1", "1: watermark 2"],
            ),
            (
                "an input that ends while the other waits behind its barrier",
                vec![vec![Barrier(FIRST), Watermark(2)], vec![Watermark(1), End]],
                vec!["1: watermark 1", "barrier 1", "0: watermark 2"],
            ),
            (
                "the end behind the last barrier",
                vec![vec![Barrier(SECOND), End], vec![Barrier(SECOND), End]],
                vec!["barrier 2", "end"],
            ),
            ("one input is open, so nothing ends", vec![vec![End], vec![Watermark(1)]], vec!["1: watermark 1"]),
            ("two barriers in a row", vec![vec![Barrier(FIRST), Barrier(SECOND)]; 3], vec!["barrier 1", "barrier 2"]),
            ("inputs take turns", vec![vec![Watermark(1), Watermark(2)]; 2], {
                vec!["0: watermark 1", "1: watermark 1", "0: watermark 2", "1: watermark 2"]
            }),
            ("no input at all", vec![], vec!["end"]),
        ] {
            assert_eq!(events(&sent).await, expected, "{case}");
        }
    }

    #[tokio::test]
    async fn a_producer_that_is_gone_has_ended() {
        let mut outlet = Outlet::default();
        let mut inputs = Inputs::new(vec![outlet.add(Takes::All)]);
        outlet.send(Message::Batch(batch(Stage::Final), 7)).await;
        drop(outlet);
        assert_eq!(inputs.queued(), 1);
        assert!(matches!(inputs.next().await, Event::Batch(0, _, 7)));
        assert!(matches!(inputs.next().await, Event::End));
    }

    #[tokio::test]
    async fn each_consumer_gets_the_stages_that_it_takes_and_every_signal() {
        for (takes, expected) in [
            (Takes::Final, vec![Stage::Final]),
            (Takes::FinalAndRevised, vec![Stage::Revised, Stage::Final]),
            (Takes::All, vec![Stage::Partial, Stage::Revised, Stage::Final]),
        ] {
            let mut outlet = Outlet::default();
            let mut receiver = outlet.add(takes);
            drop(outlet.add(Takes::All));
            let mut refused = 0;
            for stage in [Stage::Partial, Stage::Revised, Stage::Final] {
                refused += outlet.send(Message::Batch(batch(stage), 0)).await;
            }
            refused += outlet.send(Message::Barrier(FIRST)).await;
            drop(outlet);
            let mut stages = Vec::new();
            let mut signals = 0;
            while let Some(message) = receiver.recv().await {
                match message {
                    Message::Batch(batch, _) => stages.push(batch.stage()),
                    _ => signals += 1,
                }
            }
            assert_eq!((stages.as_slice(), signals), (expected.as_slice(), 1), "{takes:?}");
            assert_eq!(refused, 3 - expected.len() as u64, "{takes:?}: a consumer that is gone refuses nothing");
        }
    }
}
