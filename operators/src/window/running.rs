//! `none`: totals that run on, given out at every tick of event time for the keys that changed.

use pipeline::batch::Batch;
use pipeline::error::Result;
use pipeline::plugin::{Operator, Output};
use pipeline::state::{StateReader, StateWriter};

use super::keys::NONE;
use super::panes::{Grid, Panes};
use super::slots::{Closing, Core, restore};

/// The operator of running totals.
///
/// A total that is given out at tick `b` holds the rows before `b` that met a watermark before `b`. So a row enters the
/// total at the first tick after both its event time and its watermark; until then it waits in a pane of that tick.
pub(super) struct RunningWindow {
    every_us: i64,
    reset_us: Option<i64>,
    core: Core,
    /// What the totals take in at each tick.
    ticks: Panes,
    /// The slot of each key's total.
    totals: Vec<u32>,
    /// When the totals are cleared; `i64::MAX` if never.
    resets_at_us: i64,
    row_slots: Vec<u32>,
}

impl RunningWindow {
    /// `reset_us` is a multiple of `every_us`.
    pub(super) fn new(every_us: i64, reset_us: Option<i64>, core: Core) -> Self {
        Self {
            every_us,
            reset_us,
            core,
            ticks: Panes::default(),
            totals: Vec::new(),
            resets_at_us: i64::MAX,
            row_slots: Vec::new(),
        }
    }

    /// The first tick after `time_us`.
    fn tick_after(&self, time_us: i64) -> i64 {
        Grid { size_us: self.every_us, every_us: self.every_us }.end_after(time_us)
    }

    /// Gives out the totals of every tick at or before `watermark_us`.
    fn advance(&mut self, watermark_us: i64, out: &mut Output) -> Result<()> {
        if watermark_us <= self.core.watermark_us {
            return Ok(());
        }
        while let Some(tick) = self.ticks.first().filter(|tick| *tick <= watermark_us) {
            self.reset(tick - 1);
            if let Some(reset_us) = self.reset_us {
                self.resets_at_us = (tick - 1).div_euclid(reset_us) * reset_us + reset_us;
            }
            self.close(tick, out)?;
            self.core.reach(tick);
        }
        self.core.reach(watermark_us);
        self.reset(self.core.watermark_us);
        Ok(())
    }

    /// Clears the totals if their time is over at `time_us`.
    fn reset(&mut self, time_us: i64) {
        if self.resets_at_us <= time_us {
            let totals: Vec<u32> = self.totals.drain(..).filter(|slot| *slot != NONE).collect();
            self.core.free(&totals);
            self.resets_at_us = i64::MAX;
        }
    }

    fn close(&mut self, tick: i64, out: &mut Output) -> Result<()> {
        let news = self.ticks.remove(tick, &self.core);
        let mut changed = Vec::with_capacity(news.len());
        let mut pairs = Vec::with_capacity(news.len());
        for slot in &news {
            let total = self.total(self.core.key_of(*slot))?;
            changed.push(total);
            pairs.push((total, *slot));
        }
        self.core.merge(&pairs)?;
        self.core.settle(&changed);
        self.core.free(&news);
        self.core.sort_by_key(&mut changed);
        for slot in changed {
            let start_us = match self.reset_us {
                Some(reset_us) => (tick - 1).div_euclid(reset_us) * reset_us,
                None => self.core.seen(slot).first_us.div_euclid(self.every_us) * self.every_us,
            };
            let closing = Closing { start_us, end_us: tick, span_us: tick - start_us, slot, free: false };
            self.core.close(closing, out)?;
        }
        // The totals go on with the next tick.
        self.core.flush(out)
    }

    /// The slot of a key's total, opened if need be.
    fn total(&mut self, key: u32) -> Result<u32> {
        if self.totals.len() <= key as usize {
            self.totals.resize(key as usize + 1, NONE);
        }
        if self.totals[key as usize] == NONE {
            self.totals[key as usize] = self.core.open(key)?;
        }
        Ok(self.totals[key as usize])
    }

    /// Whether the totals that a row at `event_us` would enter are over.
    fn is_late(&self, event_us: i64, watermark_us: i64) -> bool {
        let over = |reset_us: i64| event_us.div_euclid(reset_us) * reset_us + reset_us <= watermark_us;
        !Core::in_range(event_us) || self.reset_us.is_some_and(over)
    }
}

impl Operator for RunningWindow {
    fn process(&mut self, _input: usize, batch: Batch, out: &mut Output) -> Result<()> {
        let mut watermarks = self.core.watermarks(&batch);
        let on_time: Vec<bool> =
            batch.event_us().iter().zip(&watermarks).map(|(event, mark)| !self.is_late(*event, *mark)).collect();
        let mut batch = batch;
        let late = on_time.iter().filter(|on_time| !**on_time).count();
        if late > 0 {
            self.core.late += late as u64;
            let mut keep = on_time.iter();
            watermarks.retain(|_| keep.next() == Some(&true));
            batch = batch.filter(&on_time.into())?;
        }
        if batch.is_empty() {
            return Ok(());
        }
        let rows = self.core.rows(&batch)?;
        let keys = self.core.find_keys(&batch)?;
        let mut at = 0;
        while at < batch.len() {
            self.advance(watermarks[at], out)?;
            let next_tick = self.tick_after(self.core.watermark_us);
            let until = at + watermarks[at..].partition_point(|watermark_us| *watermark_us < next_tick).max(1);
            self.row_slots.clear();
            for row in at..until {
                let tick = self.tick_after(batch.event_us()[row].max(watermarks[row]));
                let slot = self.ticks.slot(tick, keys[row], &mut self.core)?;
                self.row_slots.push(slot);
            }
            self.core.update(&rows, at..until, &self.row_slots)?;
            at = until;
        }
        self.core.finish(out)
    }

    fn watermark(&mut self, time_us: i64, out: &mut Output) -> Result<()> {
        self.advance(time_us, out)?;
        self.core.finish(out)
    }

    // Nothing is held back: the ticks to come are after the watermark, so their results are at or after it.

    fn is_stateful(&self) -> bool {
        true
    }

    fn late_rows(&self) -> u64 {
        self.core.late
    }

    fn snapshot(&self, state: &mut StateWriter) {
        state.attempt(|state| {
            self.core.save(state);
            state.i64(self.resets_at_us);
            self.core.save_slots(&self.ticks.all(), state)?;
            let totals = self.totals.iter().filter(|slot| **slot != NONE);
            let totals: Vec<(i64, u32)> = totals.map(|slot| (0, *slot)).collect();
            self.core.save_slots(&totals, state)
        });
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        restore(state, |state| {
            self.core.load(state)?;
            self.resets_at_us = state.i64()?;
            for (tick, slot) in self.core.load_slots(state)? {
                self.ticks.insert(tick, slot, &self.core);
            }
            for (_, slot) in self.core.load_slots(state)? {
                let key = self.core.key_of(slot) as usize;
                if self.totals.len() <= key {
                    self.totals.resize(key + 1, NONE);
                }
                self.totals[key] = slot;
            }
            Ok(())
        })
    }
}
