//! Logs on a disk that fails in every way it can, at any place: what was committed is there, and nothing else.

use super::*;
use crate::disk::simulated::Random;

/// What must be in the log, and what may be.
#[derive(Debug, Default)]
struct Model {
    /// By record; the last ones may be buffered.
    salts: Vec<u64>,
    /// The log begins between these.
    first: (u64, u64),
    /// Records below survive `kill -9`.
    committed: u64,
    /// Records below survive a power loss.
    durable: u64,
    /// No record from here on was ever written.
    written: u64,
}

impl Model {
    /// Compares with the log as it was opened after `crash` or a kill, and goes on from there.
    fn check(&mut self, log: &Log, crash: bool) {
        let (first, end) = (log.first_lsn(), log.committed_lsn());
        assert!((self.first.0..=self.first.1).contains(&first), "begins at {first}: {self:?}");
        let low = if crash { self.durable } else { self.committed };
        assert!((low..=self.written).contains(&end), "ends at {end}: {self:?}");
        self.salts.truncate(end as usize);
        check(&all(log), first, &self.salts[first as usize..]);
        self.first = (first, first);
        (self.committed, self.durable, self.written) = (end, end, end);
    }
}

struct Run {
    random: Random,
    disk: SimulatedDisk,
    log: Log,
    durability: Durability,
    model: Model,
}

impl Run {
    fn append(&mut self) {
        let salt = self.random.below(1000);
        append(&mut self.log, salt);
        self.model.salts.push(salt);
    }

    /// Whether the log can still be used.
    fn commit(&mut self) -> bool {
        let end = self.log.next_lsn();
        self.model.written = end;
        let mut head = None;
        let result = self.log.commit(|| head.insert(end.to_le_bytes().to_vec()).clone());
        match &result {
            Ok(next) => {
                assert_eq!(*next, end);
                self.model.committed = end;
                self.model.durable = match self.durability {
                    Durability::Power => end,
                    Durability::Process => self.log.newest().first_lsn.max(self.model.durable),
                };
            }
            Err(error) => assert!(self.disk.is_off() || error.retry == Retry::Never || self.log.next_lsn() == end),
        }
        !matches!(result, Err(error) if error.retry == Retry::Never)
    }

    fn truncate(&mut self) -> bool {
        let (first, end) = (self.log.first_lsn(), self.log.committed_lsn());
        let lsn = if self.random.below(2) == 0 { end } else { first + self.random.below(end - first + 1) };
        let cut = self.log.truncate(lsn);
        let model = &mut self.model;
        if cut.is_ok() {
            model.salts.truncate(lsn as usize);
            // What was cut was synced on the way; what was not is as before.
            model.durable = if lsn == end { model.durable } else { lsn };
            (model.committed, model.written) = (lsn, lsn);
        } else {
            model.salts.truncate(model.written as usize);
            (model.committed, model.durable) = (lsn, lsn.min(model.durable));
        }
        cut.is_ok()
    }

    fn trim(&mut self) -> bool {
        let lsn = self.random.below(self.log.next_lsn() + 2);
        self.model.first.1 = self.model.first.1.max(lsn.min(self.log.newest().first_lsn));
        let before = self.log.first_lsn();
        let trimmed = self.log.trim(lsn);
        assert!(self.log.first_lsn() <= lsn.max(before));
        let goes_on = !matches!(trimmed, Err(error) if error.retry == Retry::Never);
        if goes_on && !self.disk.is_off() {
            self.model.first = (self.log.first_lsn(), self.log.first_lsn());
        }
        goes_on
    }

    fn read(&mut self) {
        let (first, end) = (self.log.first_lsn(), self.log.committed_lsn());
        let lsn = first + self.random.below(end - first + 1);
        let mut cursor = self.log.records_from(lsn).expect("within the log");
        let mut next = lsn;
        // An error is one that was asked for: the end.
        while let Ok(Some(record)) = cursor.read() {
            check(&[record], next, &self.model.salts[next as usize..=next as usize]);
            next += 1;
        }
        assert!(next <= end);
    }

    /// Works until the disk or the log is of no use any more, or long enough.
    fn live(&mut self) {
        for _ in 0..self.random.below(40) {
            let goes_on = match self.random.below(20) {
                0 => self.truncate(),
                1 | 2 => self.trim(),
                3 => {
                    self.read();
                    true
                }
                4 => {
                    self.disk.set_room(None);
                    true
                }
                5..10 => self.commit(),
                _ => {
                    self.append();
                    true
                }
            };
            if !goes_on || self.disk.is_off() {
                break;
            }
        }
    }
}

/// Asks for up to two failures.
fn plan_failures(disk: &SimulatedDisk, random: &mut Random) {
    for _ in 0..2 {
        let soon = random.below(40);
        match random.below(6) {
            0 => disk.power_off_after(soon),
            1 => disk.fail_after(soon, 1 + random.below(3)),
            2 => disk.fail_sync_after(soon / 4),
            3 => disk.set_room(Some(soon * 30)),
            _ => {}
        }
    }
}

/// Opens the log however often it takes. Only what was asked for may go wrong. The disk it opened on, and whether the power
/// was lost on the way.
fn reopen(mut disk: SimulatedDisk, random: &mut Random, options: LogOptions) -> (SimulatedDisk, Log, bool) {
    let mut crashed = false;
    for failing in [true, true, false] {
        if failing {
            plan_failures(&disk, random);
        }
        match Log::open(Arc::new(disk.clone()), Path::new(FOLDER), options) {
            Ok((log, _)) => {
                disk.calm();
                return (disk, log, crashed);
            }
            Err(error) => {
                assert!(failing && !error.to_string().contains("damaged"), "{error}");
                let crash = disk.is_off() || random.below(2) == 0;
                crashed |= crash;
                disk = if crash { disk.crash() } else { disk.kill() };
                disk.calm();
            }
        }
    }
    unreachable!("the last time nothing fails")
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    let durability = if random.below(4) == 0 { Durability::Process } else { Durability::Power };
    let options = LogOptions { segment_bytes: 100 + random.below(900), durability };
    let mut model = Model::default();
    let mut disk = SimulatedDisk::new(seed);
    let mut crash = false;
    for _ in 0..3 {
        let (opened_on, log, crashed) = reopen(disk, &mut random, options);
        model.check(&log, crash || crashed);
        plan_failures(&opened_on, &mut random);
        let mut run = Run { random, disk: opened_on, log, durability, model };
        run.live();
        crash = run.disk.is_off() || run.random.below(2) == 0;
        (random, model) = (run.random, run.model);
        disk = if crash { run.disk.crash() } else { run.disk.kill() };
        disk.calm();
    }
    let (_, log, crashed) = reopen(disk, &mut random, options);
    model.check(&log, crash || crashed);
}

#[test]
fn what_was_committed_is_there_whatever_the_disk_does() {
    for seed in 0..5000 {
        // The seed of a failure is the last one printed.
        eprintln!("seed {seed}");
        run(seed);
    }
}
