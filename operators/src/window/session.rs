//! Sessions: the rows of a key with less than `gap` between neighbours.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use pipeline::batch::Batch;
use pipeline::error::Result;
use pipeline::plugin::{Operator, Output};
use pipeline::state::{StateReader, StateWriter};

use super::keys::NONE;
use super::slots::{Closing, Core, Rows, restore};

/// An open session.
#[derive(Clone, Copy, Debug)]
struct Session {
    first_us: i64,
    last_us: i64,
    /// Tells apart sessions that had the same slot after one another; 0 is none.
    number: u64,
}

/// The operator of session windows.
pub(super) struct SessionWindow {
    gap_us: i64,
    core: Core,
    /// By slot.
    sessions: Vec<Session>,
    /// The slots of the open sessions of each key, seldom more than one.
    by_key: Vec<Vec<u32>>,
    /// An end that each open session had once, with its slot and number. Rows that prolong a session leave
    /// it alone; an entry that comes up too early goes back with the true end.
    ends: BinaryHeap<Reverse<(i64, u32, u64)>>,
    next_number: u64,
    row_slots: Vec<u32>,
}

impl SessionWindow {
    pub(super) fn new(gap_us: i64, core: Core) -> Self {
        Self {
            gap_us,
            core,
            sessions: Vec::new(),
            by_key: Vec::new(),
            ends: BinaryHeap::new(),
            next_number: 1,
            row_slots: Vec::new(),
        }
    }

    /// Closes every session that ends at or before `watermark_us`, in the order of ends, starts and keys.
    fn advance(&mut self, watermark_us: i64, out: &mut Output) -> Result<()> {
        if watermark_us <= self.core.watermark_us {
            return Ok(());
        }
        self.core.reach(watermark_us);
        let mut closed: Vec<u32> = Vec::new();
        while let Some(Reverse((end_us, slot, number))) = self.ends.peek().copied() {
            if end_us > watermark_us {
                break;
            }
            self.ends.pop();
            let session = self.sessions[slot as usize];
            if session.number != number {
                continue;
            }
            let true_end_us = session.last_us + self.gap_us;
            if true_end_us > watermark_us {
                self.ends.push(Reverse((true_end_us, slot, number)));
            } else {
                self.forget(slot);
                self.core.reach(true_end_us);
                closed.push(slot);
            }
        }
        let bounds = |slot: &u32| (self.sessions[*slot as usize].last_us, self.sessions[*slot as usize].first_us);
        closed.sort_unstable_by(|a, b| bounds(a).cmp(&bounds(b)).then_with(|| self.core.compare_keys(*a, *b)));
        for slot in closed {
            let Session { first_us, last_us, .. } = self.sessions[slot as usize];
            let (end_us, span_us) = (last_us + self.gap_us, last_us - first_us);
            self.core.close(Closing { start_us: first_us, end_us, span_us, slot, free: true }, out)?;
        }
        Ok(())
    }

    /// The session in `slot` is open no more.
    fn forget(&mut self, slot: u32) {
        self.sessions[slot as usize].number = 0;
        let key = self.core.key_of(slot);
        self.by_key[key as usize].retain(|one| *one != slot);
    }

    /// Enters an open slot as a session.
    fn enter(&mut self, slot: u32, first_us: i64, last_us: i64) {
        let number = self.next_number;
        self.next_number += 1;
        if self.sessions.len() <= slot as usize {
            self.sessions.resize(slot as usize + 1, Session { first_us: 0, last_us: 0, number: 0 });
        }
        self.sessions[slot as usize] = Session { first_us, last_us, number };
        let key = self.core.key_of(slot) as usize;
        if self.by_key.len() <= key {
            self.by_key.resize_with(key + 1, Vec::new);
        }
        self.by_key[key].push(slot);
        self.ends.push(Reverse((last_us + self.gap_us, slot, number)));
    }

    /// The open sessions that a row at `event_us` belongs to, the earlier first: none, one, or two that it joins.
    fn around(&self, key: u32, event_us: i64) -> [u32; 2] {
        let mut found = [NONE; 2];
        for slot in self.by_key.get(key as usize).into_iter().flatten() {
            let session = &self.sessions[*slot as usize];
            if event_us - session.last_us < self.gap_us && session.first_us - event_us < self.gap_us {
                if found[0] == NONE {
                    found[0] = *slot;
                } else {
                    found[1] = *slot;
                }
            }
        }
        if found[1] != NONE && self.sessions[found[1] as usize].first_us < self.sessions[found[0] as usize].first_us {
            found.swap(0, 1);
        }
        found
    }

    /// Adds the rows from `range.start` on whose slots are known.
    fn add(&mut self, rows: &Rows, range: Range<usize>) -> Result<()> {
        if !range.is_empty() {
            self.core.update(rows, range, &self.row_slots)?;
        }
        self.row_slots.clear();
        Ok(())
    }
}

impl Operator for SessionWindow {
    fn process(&mut self, _input: usize, batch: Batch, out: &mut Output) -> Result<()> {
        let watermarks = self.core.watermarks(&batch);
        let rows = self.core.rows(&batch)?;
        let keys = self.core.find_keys(&batch)?;
        // Rows from `waiting` on have their slots in `row_slots` but are not added yet.
        let mut waiting = 0;
        for (row, (event_us, watermark_us)) in batch.event_us().iter().zip(watermarks).enumerate() {
            if self.ends.peek().is_some_and(|Reverse((end_us, ..))| *end_us <= watermark_us) {
                self.add(&rows, waiting..row)?;
                waiting = row;
            }
            self.advance(watermark_us, out)?;
            let around = if Core::in_range(*event_us) { self.around(keys[row], *event_us) } else { [NONE; 2] };
            let slot = match around {
                [NONE, _] if !Core::in_range(*event_us) || event_us + self.gap_us <= watermark_us => {
                    self.core.late += 1;
                    self.add(&rows, waiting..row)?;
                    waiting = row + 1;
                    continue;
                }
                [NONE, _] => {
                    let slot = self.core.open(keys[row])?;
                    self.enter(slot, *event_us, *event_us);
                    slot
                }
                [slot, NONE] => slot,
                [slot, later] => {
                    self.add(&rows, waiting..row)?;
                    waiting = row;
                    self.core.merge(&[(slot, later)])?;
                    self.sessions[slot as usize].last_us = self.sessions[later as usize].last_us;
                    self.forget(later);
                    self.core.free(&[later]);
                    slot
                }
            };
            let session = &mut self.sessions[slot as usize];
            session.first_us = session.first_us.min(*event_us);
            session.last_us = session.last_us.max(*event_us);
            self.row_slots.push(slot);
        }
        self.add(&rows, waiting..batch.len())?;
        self.core.finish(out)
    }

    fn watermark(&mut self, time_us: i64, out: &mut Output) -> Result<()> {
        self.advance(time_us, out)?;
        self.core.finish(out)
    }

    // Nothing is held back: an open session ends after the watermark, so its results are at or after it.

    fn is_stateful(&self) -> bool {
        true
    }

    fn late_rows(&self) -> u64 {
        self.core.late
    }

    fn snapshot(&self, state: &mut StateWriter) {
        state.attempt(|state| {
            self.core.save(state);
            let open = self.by_key.iter().flatten();
            let place = |slot: &u32| (self.sessions[*slot as usize].first_us, *slot);
            let places: Vec<(i64, u32)> = open.map(place).collect();
            self.core.save_slots(&places, state)
        });
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        restore(state, |state| {
            self.core.load(state)?;
            for (first_us, slot) in self.core.load_slots(state)? {
                let last_us = self.core.seen(slot).last_us;
                self.enter(slot, first_us, last_us);
            }
            Ok(())
        })
    }
}
