//! The inbox of a push source: every record is on disk before its sender learns that it was received.
//!
//! A thread of its own writes and syncs. What arrives while it does goes to the disk together with the next sync, so
//! one sync serves a single record when few come, and thousands under load. Records enter the graph beside it; only
//! acknowledgements and checkpoints wait for the disk.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use tokio::sync::watch;
use tracing::warn;

use super::back_off::BackOff;
use super::names::key_of_inbox;
use crate::batch::BATCH_ROWS_MAX;
use crate::disk::Disk;
use crate::error::{Error, Result, Retry};
use crate::log::{Cursor, Durability, Log, LogOptions};
use crate::plugin::{Receipt, Receipts, Record};
use crate::state::{StateReader, StateWriter};

/// Bytes of a segment. A whole one is removed at a time, and each begins with what [`Receipts`] remember.
const SEGMENT_BYTES: u64 = 32 << 20;

/// The only kind of record in it.
const RECORD: u8 = 0;

/// Bytes that one write takes: enough to make a sync cheap, little enough that nobody waits long for it.
const GROUP_BYTES_MAX: usize = 1 << 20;

/// Records of a group, from which on the next group waits a moment to fill: under load fewer, larger writes leave more of
/// the machine to the messages themselves. Senders that wait for each answer never get there.
const GROUP_RECORDS_BUSY: u64 = 64;
/// That moment.
const GATHER: Duration = Duration::from_millis(1);

/// Bytes received that are not on disk yet, at which no more is taken in: the disk is full, or too slow.
const WAITING_BYTES_MAX: usize = 64 << 20;

/// What a record takes beside its text.
const RECORD_OVERHEAD: usize = 64;

/// The engine's end.
pub(crate) struct Inbox {
    key: String,
    commands: Sender<Command>,
    progress: watch::Receiver<Progress>,
    receipts: Option<Box<dyn Receipts>>,
    /// Number of the next record that arrives.
    next: u64,
    /// Records that are not on disk yet: the number after each lot, and its bytes.
    waiting: VecDeque<(u64, usize)>,
    waiting_bytes: usize,
    replay: Option<Replay>,
}

/// How far the disk is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// All records with smaller numbers are on disk.
    pub(crate) durable: u64,
    /// What holds it up, if anything: it is tried again and again.
    pub(crate) trouble: Option<String>,
    /// Why no record will ever be on disk again.
    pub(crate) broken: Option<String>,
}

enum Command {
    Append(Vec<Record>, i64),
    /// Records with smaller numbers are in every checkpoint that is kept.
    Trim(u64),
}

/// Records of an earlier run that no checkpoint covers.
struct Replay {
    cursor: Cursor,
    /// The next one, if it was read already, with its number and when it was received.
    read: Option<(u64, Record, i64)>,
    /// Number of the next one to be taken in: none after it is in the graph.
    next: u64,
    /// Number after the last one that was handed out.
    given: u64,
    /// Number after the last one.
    end: u64,
}

/// What became of records that have arrived.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// Those to be taken in, in order.
    pub(crate) fresh: Vec<Record>,
    /// Tokens of all that are to be acknowledged: the fresh ones and those that came again.
    pub(crate) tokens: Vec<u64>,
    /// Tokens of those that are refused, with the reason.
    pub(crate) refused: Vec<(u64, String)>,
}

impl Inbox {
    /// Opens the inbox in `folder`. Its records from number `from` on are to be taken in again; without a checkpoint
    /// all of them. `receipts` makes the memory of what was received.
    pub(crate) fn open(
        disk: Arc<dyn Disk>,
        folder: &Path,
        durability: Durability,
        receipts: impl Fn() -> Option<Box<dyn Receipts>>,
        from: Option<u64>,
    ) -> Result<Self> {
        Self::open_with(disk, folder, LogOptions { segment_bytes: SEGMENT_BYTES, durability }, receipts, from)
    }

    fn open_with(
        disk: Arc<dyn Disk>,
        folder: &Path,
        options: LogOptions,
        receipts: impl Fn() -> Option<Box<dyn Receipts>>,
        from: Option<u64>,
    ) -> Result<Self> {
        let (mut log, opened) = Log::open(disk, folder, options)?;
        if opened.cut_bytes > 0 {
            warn!("{}: {} bytes of an unfinished write are cut off", folder.display(), opened.cut_bytes);
        }
        let from = from.unwrap_or(log.first_lsn());
        if from < log.first_lsn() {
            return Err(Error::outside(format!(
                "the inbox {} begins with record {}, but the checkpoint goes on from {from}: records are missing",
                folder.display(),
                log.first_lsn()
            ))
            .fatal());
        }
        let next = log.next_lsn().max(from);
        if log.next_lsn() < from {
            // They are in the checkpoint already: nothing is missing but the memory of them.
            warn!("{}: records {} to {from} are gone; the checkpoint has them", folder.display(), log.next_lsn());
            log.skip_to(from)?;
        }
        let (mut here, mut there) = (receipts(), receipts());
        for receipts in [&mut here, &mut there].into_iter().flatten() {
            remember(&log, receipts.as_mut())?;
        }
        let replay = match from < next {
            true => Some(Replay { cursor: log.records_from(from)?, read: None, next: from, given: from, end: next }),
            false => None,
        };
        let (commands, received) = channel();
        let (sender, progress) = watch::channel(Progress { durable: next, ..Progress::default() });
        let writer = Writer { log, receipts: there, commands: received, progress: sender };
        thread::Builder::new()
            .name("inbox".to_owned())
            .spawn(move || writer.run())
            .map_err(|e| Error::outside("a thread for the inbox").because(e).fatal())?;
        let waiting = VecDeque::new();
        let key = key_of_inbox(folder);
        Ok(Self { key, commands, progress, receipts: here, next, waiting, waiting_bytes: 0, replay })
    }

    /// Tells the records that are new from those that come again.
    pub(crate) fn receive(&mut self, records: Vec<Record>, ingest_us: i64) -> Received {
        let Some(receipts) = &mut self.receipts else {
            let tokens = records.iter().map(|record| record.token).collect();
            return Received { fresh: records, tokens, refused: Vec::new() };
        };
        let mut received = Received::default();
        for record in records {
            match receipts.receive(&record, ingest_us) {
                Receipt::New => {
                    received.tokens.push(record.token);
                    received.fresh.push(record);
                }
                Receipt::Repeated => received.tokens.push(record.token),
                Receipt::Refused(reason) => received.refused.push((record.token, reason)),
            }
        }
        received
    }

    /// The key of this inbox in a checkpoint.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// Hands records to the disk.
    pub(crate) fn append(&mut self, records: Vec<Record>, ingest_us: i64) {
        if records.is_empty() {
            return;
        }
        let bytes: usize = records.iter().map(|r| r.payload.len() + r.metadata.len() + RECORD_OVERHEAD).sum();
        self.next += records.len() as u64;
        self.waiting.push_back((self.next, bytes));
        self.waiting_bytes += bytes;
        // The thread ends only with this handle, or broken: then `progress` says so.
        let _ = self.commands.send(Command::Append(records, ingest_us));
    }

    /// Whether more may be taken in.
    pub(crate) fn has_room(&self) -> bool {
        self.waiting_bytes < WAITING_BYTES_MAX
    }

    /// Waits until the disk is further. Cancel safe.
    pub(crate) async fn changed(&mut self) -> Progress {
        if self.progress.changed().await.is_err() {
            let broken = Some("its thread has ended".to_owned());
            return Progress { broken, ..self.progress.borrow().clone() };
        }
        let progress = self.progress.borrow_and_update().clone();
        while let Some(&(end, bytes)) = self.waiting.front()
            && end <= progress.durable
        {
            self.waiting.pop_front();
            self.waiting_bytes -= bytes;
        }
        progress
    }

    /// All records with smaller numbers are on disk.
    pub(crate) fn durable(&self) -> u64 {
        self.progress.borrow().durable
    }

    /// Number of the next record that enters the graph.
    pub(crate) fn taken(&self) -> u64 {
        self.replay.as_ref().map_or(self.next, |replay| replay.next)
    }

    /// Number of the next record that arrives.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Whether records of an earlier run are still to be taken in.
    pub(crate) fn is_replaying(&self) -> bool {
        self.replay.is_some()
    }

    /// The next records of an earlier run, all received at the same time, and that time. [`Self::replayed`] follows once they
    /// are in the graph.
    pub(crate) fn replay(&mut self) -> Result<Option<(Vec<Record>, i64)>> {
        let Some(replay) = &mut self.replay else { return Ok(None) };
        let mut records = Vec::new();
        let mut at = None;
        while records.len() < BATCH_ROWS_MAX {
            let (number, record, ingest_us) = match replay.read() {
                Ok(Some(read)) => read,
                Ok(None) => break,
                Err(error) if records.is_empty() => return Err(error),
                // What was read before it comes first; it will show again.
                Err(_) => break,
            };
            if at.is_some_and(|at| at != ingest_us) {
                replay.read = Some((number, record, ingest_us));
                break;
            }
            at = Some(ingest_us);
            records.push(record);
            // Not counted: some may be lost to damage.
            replay.given = number + 1;
        }
        let Some(at) = at else {
            self.replay = None;
            return Ok(None);
        };
        Ok(Some((records, at)))
    }

    /// What [`Self::replay`] gave is in the graph.
    pub(crate) fn replayed(&mut self) {
        if let Some(replay) = &mut self.replay {
            replay.next = replay.given;
        }
    }

    /// Records with smaller numbers will not be asked for again.
    pub(crate) fn trim(&self, before: u64) {
        let _ = self.commands.send(Command::Trim(before));
    }
}

impl Replay {
    fn read(&mut self) -> Result<Option<(u64, Record, i64)>> {
        if let Some(read) = self.read.take() {
            return Ok(Some(read));
        }
        if self.cursor.lsn() >= self.end {
            return Ok(None);
        }
        let Some(stored) = self.cursor.read()? else { return Ok(None) };
        let record = Record { payload: stored.payload, metadata: stored.metadata, token: 0 };
        Ok(Some((stored.lsn, record, stored.ingest_us)))
    }
}

/// Tells the receipts of every record that was received.
fn remember(log: &Log, receipts: &mut dyn Receipts) -> Result<()> {
    let head = log.head()?;
    if !head.bytes.is_empty() {
        let what = "what it remembers of earlier records cannot be read; it is damaged, or the source took other records then \
                    (a Redis list, and now a group): give the source another name";
        receipts.restore(&mut StateReader::new(&head.bytes)).map_err(|e| e.context(what))?;
    }
    let mut cursor = log.records_from(head.lsn)?;
    while let Some(stored) = cursor.read()? {
        let record = Record { payload: stored.payload, metadata: stored.metadata, token: 0 };
        receipts.receive(&record, stored.ingest_us);
    }
    Ok(())
}

/// The thread's end.
struct Writer {
    log: Log,
    /// What was received and is in the log: a segment begins with it.
    receipts: Option<Box<dyn Receipts>>,
    commands: Receiver<Command>,
    progress: watch::Sender<Progress>,
}

impl Writer {
    /// Runs until the engine's end is dropped, or the disk cannot be trusted any more.
    fn run(mut self) {
        let mut before = self.log.next_lsn();
        while let Ok(command) = self.commands.recv() {
            let group = self.log.next_lsn() - before;
            before = self.log.next_lsn();
            if group >= GROUP_RECORDS_BUSY {
                thread::sleep(GATHER);
            }
            let mut trim = None;
            let mut next = Some(command);
            while let Some(command) = next.take() {
                match command {
                    Command::Append(records, ingest_us) if !self.append(&records, ingest_us) => return,
                    Command::Append(..) => {}
                    Command::Trim(before) => trim = Some(before),
                }
                if self.log.buffered_bytes() < GROUP_BYTES_MAX {
                    next = self.commands.try_recv().ok();
                }
            }
            if !self.commit() {
                return;
            }
            if let Some(before) = trim
                && let Err(error) = self.log.trim(before)
            {
                // It only takes room; the next one removes it too.
                warn!("{error}");
            }
        }
    }

    /// Buffers records; false if what was buffered before can never be on the disk.
    fn append(&mut self, records: &[Record], ingest_us: i64) -> bool {
        for record in records {
            // A lot of large records is several writes: a group that is too large is none.
            if self.log.buffered_bytes() >= GROUP_BYTES_MAX && !self.commit() {
                return false;
            }
            self.log.append(RECORD, ingest_us, &record.metadata, &record.payload);
            if let Some(receipts) = &mut self.receipts {
                receipts.receive(record, ingest_us);
            }
        }
        true
    }

    /// Puts what was appended on the disk, however long it is full; false if that can never be.
    fn commit(&mut self) -> bool {
        let mut back_off = BackOff::new(self.log.next_lsn());
        loop {
            let receipts = &self.receipts;
            let head = || {
                let mut head = StateWriter::default();
                receipts.iter().for_each(|receipts| receipts.snapshot(&mut head));
                head.finish()
            };
            let error = match self.log.commit(head) {
                Ok(durable) => {
                    let progress = Progress { durable, ..Progress::default() };
                    self.progress.send_if_modified(|before| std::mem::replace(before, progress.clone()) != progress);
                    return true;
                }
                Err(error) => error,
            };
            let text = error.to_string();
            if error.retry == Retry::Never {
                self.progress.send_modify(|progress| progress.broken = Some(text));
                return false;
            }
            self.progress.send_modify(|progress| progress.trouble = Some(text));
            thread::sleep(back_off.wait());
            if self.progress.is_closed() {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bytes::Bytes;

    use super::*;
    use crate::disk::simulated::SimulatedDisk;

    /// Remembers texts.
    #[derive(Default)]
    struct Texts(BTreeSet<Bytes>);

    impl Receipts for Texts {
        fn receive(&mut self, record: &Record, _ingest_us: i64) -> Receipt {
            match &record.payload[..] {
                b"refuse" => Receipt::Refused("no".to_owned()),
                _ if self.0.insert(record.payload.clone()) => Receipt::New,
                _ => Receipt::Repeated,
            }
        }
        fn snapshot(&self, state: &mut StateWriter) {
            state.u64(self.0.len() as u64);
            self.0.iter().for_each(|text| state.bytes(text));
        }
        fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
            for _ in 0..state.count()? {
                self.0.insert(Bytes::copy_from_slice(state.bytes()?));
            }
            Ok(())
        }
    }

    fn open(disk: &SimulatedDisk, from: Option<u64>) -> Result<Inbox> {
        let options = LogOptions { segment_bytes: 200, durability: Durability::Power };
        let receipts = || Some(Box::new(Texts::default()) as Box<dyn Receipts>);
        Inbox::open_with(Arc::new(disk.clone()), Path::new("state/inbox"), options, receipts, from)
    }

    fn record(text: &str) -> Record {
        Record { payload: Bytes::copy_from_slice(text.as_bytes()), metadata: Bytes::from_static(b"m"), token: 7 }
    }

    fn take(inbox: &mut Inbox, text: &str, ingest_us: i64) -> bool {
        let received = inbox.receive(vec![record(text)], ingest_us);
        let is_new = !received.fresh.is_empty();
        inbox.append(received.fresh, ingest_us);
        is_new
    }

    /// Waits until all is on the disk, or nothing more will be.
    async fn until_durable(inbox: &mut Inbox, disk: &SimulatedDisk) -> Progress {
        loop {
            let progress = Progress { durable: inbox.durable(), ..inbox.progress.borrow().clone() };
            if progress.durable >= inbox.next() || progress.broken.is_some() || disk.is_off() {
                return progress;
            }
            inbox.changed().await;
        }
    }

    fn replayed(inbox: &mut Inbox) -> Vec<(String, i64)> {
        let mut all = Vec::new();
        while let Some((records, at)) = inbox.replay().expect("whole") {
            let before = inbox.taken();
            all.extend(records.iter().map(|r| (String::from_utf8_lossy(&r.payload).into_owned(), at)));
            inbox.replayed();
            assert_eq!(inbox.taken(), before + records.len() as u64);
        }
        all
    }

    #[tokio::test]
    async fn what_no_checkpoint_has_comes_again_with_its_times_and_what_was_received_is_known() {
        let mut disk = SimulatedDisk::new(1);
        let mut inbox = open(&disk, None).expect("an inbox");
        let texts: Vec<String> = (0..50).map(|n| format!("record {n}")).collect();
        for (at, text) in (0..).zip(&texts) {
            assert!(take(&mut inbox, text, at));
            assert!(!take(&mut inbox, text, at), "again");
            until_durable(&mut inbox, &disk).await;
        }
        assert_eq!(inbox.receive(vec![record("refuse")], 0).refused, [(7, "no".to_owned())]);
        drop(inbox);
        for from in [None, Some(0), Some(20), Some(50)] {
            disk = disk.kill();
            let mut inbox = open(&disk, from).expect("an inbox");
            let first = from.unwrap_or(0);
            assert_eq!((inbox.taken(), inbox.next()), (first, 50));
            let expected: Vec<_> =
                (0..).zip(&texts).skip(first as usize).map(|(at, text)| (text.clone(), at)).collect();
            assert_eq!(replayed(&mut inbox), expected);
            assert!(texts.iter().all(|text| !take(&mut inbox, text, 99)), "the memory outlives a restart");
            assert_eq!((inbox.taken(), inbox.is_replaying()), (50, false));
        }
        // What all checkpoints have is removed, and still known.
        let mut inbox = open(&disk, Some(40)).expect("an inbox");
        inbox.trim(40);
        assert!(take(&mut inbox, "later", 100));
        until_durable(&mut inbox, &disk).await;
        drop(inbox);
        let mut inbox = open(&disk, Some(51)).expect("an inbox");
        assert!(texts.iter().all(|text| !take(&mut inbox, text, 102)));
        assert!(open(&disk, Some(0)).err().expect("missing").to_string().contains("missing"));
        // Removed by hand: the checkpoint goes on alone.
        let disk = SimulatedDisk::new(2);
        let mut inbox = open(&disk, Some(51)).expect("an inbox");
        assert_eq!((inbox.taken(), inbox.next()), (51, 51));
        assert!(take(&mut inbox, "again", 103));
        assert_eq!(until_durable(&mut inbox, &disk).await.durable, 52);
    }

    #[tokio::test]
    async fn a_full_disk_is_waited_for_and_one_that_cannot_be_trusted_is_not() {
        let disk = SimulatedDisk::new(1);
        let mut inbox = open(&disk, None).expect("an inbox");
        disk.set_room(Some(0));
        take(&mut inbox, "a", 1);
        let progress = inbox.changed().await;
        assert!(progress.trouble.is_some() && progress.durable == 0, "{progress:?}");
        let huge = "x".repeat(WAITING_BYTES_MAX);
        take(&mut inbox, &huge, 2);
        assert!(!inbox.has_room());
        disk.set_room(None);
        assert_eq!(until_durable(&mut inbox, &disk).await, Progress { durable: 2, trouble: None, broken: None });
        assert!(inbox.has_room());
        disk.fail_sync_after(0);
        take(&mut inbox, "b", 3);
        assert!(until_durable(&mut inbox, &disk).await.broken.is_some());
    }

    #[tokio::test]
    async fn whatever_was_durable_is_there_after_a_power_loss_at_any_moment() {
        for operation in 0..60 {
            let disk = SimulatedDisk::new(operation);
            disk.power_off_after(operation);
            let mut durable = 0;
            if let Ok(mut inbox) = open(&disk, None) {
                for n in 0..20 {
                    take(&mut inbox, &format!("record {n}"), n);
                    let progress = until_durable(&mut inbox, &disk).await;
                    durable = progress.durable;
                    if progress.durable < inbox.next() {
                        break;
                    }
                }
            }
            let mut inbox = open(&disk.crash(), None).expect("an inbox");
            let found = replayed(&mut inbox);
            assert!(found.len() as u64 >= durable, "operation {operation}: {} of {durable}", found.len());
            assert!((0..).zip(&found).all(|(n, (text, at))| *text == format!("record {n}") && *at == n));
        }
    }
}
