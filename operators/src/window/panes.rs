//! Tumbling and sliding windows. Time is cut into panes that overlapping windows share: a row is added to one
//! pane, and a window is the merge of its panes.

use std::collections::BTreeMap;
use std::ops::Range;

use arrow::array::BooleanArray;
use hashbrown::HashTable;
use pipeline::batch::Batch;
use pipeline::error::Result;
use pipeline::plugin::{Operator, Output};
use pipeline::state::{StateReader, StateWriter};

use super::keys::NONE;
use super::slots::{Closing, Core, Rows, restore};

/// Windows of `size_us` that start at every multiple of `every_us` since 1970 UTC.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub(super) size_us: i64,
    pub(super) every_us: i64,
}

impl Grid {
    /// Length of a pane: the greatest that divides both.
    pub(super) fn pane_us(self) -> i64 {
        let (mut a, mut b) = (self.size_us, self.every_us);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    }

    /// The first end of a window after `time_us`.
    pub(super) fn end_after(self, time_us: i64) -> i64 {
        let (size, every) = (i128::from(self.size_us), i128::from(self.every_us));
        let end = ((i128::from(time_us) - size).div_euclid(every) + 1) * every + size;
        i64::try_from(end).unwrap_or(if end < 0 { i64::MIN } else { i64::MAX })
    }

    /// The end of the last window that holds `event_us`.
    fn last_end(self, event_us: i64) -> i64 {
        event_us.div_euclid(self.every_us) * self.every_us + self.size_us
    }
}

/// Slots by pane and key.
#[derive(Default)]
pub(super) struct Panes {
    by_key: HashTable<u32>,
    slots: BTreeMap<i64, Vec<u32>>,
    /// The pane of each slot that is in one.
    pane_of: Vec<i64>,
}

impl Panes {
    /// The slot of `key` in `pane`, opened if need be.
    #[inline]
    pub(super) fn slot(&mut self, pane: i64, key: u32, core: &mut Core) -> Result<u32> {
        let guess = core.keys().last_slot(key);
        if guess != NONE && core.key_of(guess) == key && self.pane_of.get(guess as usize) == Some(&pane) {
            return Ok(guess);
        }
        let slot = self.find_or_open(pane, key, core)?;
        core.keys_mut().set_last_slot(key, slot);
        Ok(slot)
    }

    fn find_or_open(&mut self, pane: i64, key: u32, core: &mut Core) -> Result<u32> {
        let hash = mix(core.keys().hash(key), pane);
        let found = self.by_key.find(hash, |slot| self.pane_of[*slot as usize] == pane && core.key_of(*slot) == key);
        if let Some(slot) = found {
            return Ok(*slot);
        }
        let slot = core.open(key)?;
        self.insert(pane, slot, core);
        Ok(slot)
    }

    /// Puts an open slot into a pane.
    pub(super) fn insert(&mut self, pane: i64, slot: u32, core: &Core) {
        if self.pane_of.len() <= slot as usize {
            self.pane_of.resize(slot as usize + 1, i64::MIN);
        }
        self.pane_of[slot as usize] = pane;
        self.slots.entry(pane).or_default().push(slot);
        let key = core.key_of(slot);
        let hash = mix(core.keys().hash(key), pane);
        let pane_of = &self.pane_of;
        self.by_key.insert_unique(hash, slot, |slot| {
            let key = core.key_of(*slot);
            mix(core.keys().hash(key), pane_of[*slot as usize])
        });
    }

    /// The first pane.
    pub(super) fn first(&self) -> Option<i64> {
        self.slots.keys().next().copied()
    }

    /// The slots of the panes in a range, by pane.
    pub(super) fn range(&self, range: Range<i64>) -> impl Iterator<Item = u32> {
        self.slots.range(range).flat_map(|(_, slots)| slots.iter().copied())
    }

    /// Every slot with its pane.
    pub(super) fn all(&self) -> Vec<(i64, u32)> {
        self.slots.iter().flat_map(|(pane, slots)| slots.iter().map(|slot| (*pane, *slot))).collect()
    }

    /// Takes a pane away. Its slots stay open.
    pub(super) fn remove(&mut self, pane: i64, core: &Core) -> Vec<u32> {
        let slots = self.slots.remove(&pane).unwrap_or_default();
        for slot in &slots {
            let key = core.key_of(*slot);
            let hash = mix(core.keys().hash(key), pane);
            if let Ok(entry) = self.by_key.find_entry(hash, |one| one == slot) {
                entry.remove();
            }
            self.pane_of[*slot as usize] = i64::MIN;
        }
        slots
    }
}

/// The hash of a key in a pane.
fn mix(key_hash: u64, pane: i64) -> u64 {
    let mixed = (key_hash ^ (pane as u64).rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}

/// The operator of tumbling and sliding windows.
pub(super) struct PaneWindow {
    grid: Grid,
    pane_us: i64,
    core: Core,
    panes: Panes,
    /// Slots of the rows at hand, kept for its memory.
    row_slots: Vec<u32>,
}

/// Rows that are on time, with their panes and watermarks.
struct Placed {
    batch: Batch,
    panes: Vec<i64>,
    watermarks: Vec<i64>,
}

impl PaneWindow {
    pub(super) fn new(grid: Grid, core: Core) -> Self {
        Self { grid, pane_us: grid.pane_us(), core, panes: Panes::default(), row_slots: Vec::new() }
    }

    /// Finds each row's pane, and counts and drops the rows that are late for all windows.
    fn place(&mut self, batch: Batch) -> Result<Placed> {
        let mut watermarks = self.core.watermarks(&batch);
        let mut panes = Vec::with_capacity(batch.len());
        // Neighbours mostly share a pane, and a division costs more than the comparison.
        let (mut pane, mut last_end) = (i64::MIN, i64::MIN);
        let mut late = 0;
        for (event_us, watermark_us) in batch.event_us().iter().zip(&watermarks) {
            if pane == i64::MIN || event_us.wrapping_sub(pane) as u64 >= self.pane_us as u64 {
                if Core::in_range(*event_us) {
                    pane = event_us.div_euclid(self.pane_us) * self.pane_us;
                    last_end = self.grid.last_end(*event_us);
                } else {
                    (pane, last_end) = (i64::MIN, i64::MIN);
                }
            }
            let is_late = last_end <= *watermark_us;
            late += u64::from(is_late);
            panes.push(if is_late { i64::MIN } else { pane });
        }
        if late == 0 {
            return Ok(Placed { batch, panes, watermarks });
        }
        self.core.late += late;
        let on_time: Vec<bool> = panes.iter().map(|pane| *pane != i64::MIN).collect();
        let mut keep = on_time.iter();
        watermarks.retain(|_| keep.next() == Some(&true));
        panes.retain(|pane| *pane != i64::MIN);
        Ok(Placed { batch: batch.filter(&BooleanArray::from(on_time))?, panes, watermarks })
    }

    /// Adds rows between which no window closes.
    fn add(&mut self, rows: &Rows, range: Range<usize>, panes: &[i64], keys: &[u32]) -> Result<()> {
        self.row_slots.clear();
        for (pane, key) in panes[range.clone()].iter().zip(&keys[range.clone()]) {
            let slot = self.panes.slot(*pane, *key, &mut self.core)?;
            self.row_slots.push(slot);
        }
        self.core.update(rows, range, &self.row_slots)
    }

    /// Closes every window that ends at or before `watermark_us`, in the order of their ends.
    fn advance(&mut self, watermark_us: i64, out: &mut Output) -> Result<()> {
        if watermark_us <= self.core.watermark_us {
            return Ok(());
        }
        while let Some(first) = self.panes.first() {
            let end_us = self.grid.end_after((first + self.pane_us - 1).max(self.core.watermark_us));
            if end_us > watermark_us {
                break;
            }
            self.close(end_us, out)?;
            self.core.reach(end_us);
        }
        self.core.reach(watermark_us);
        Ok(())
    }

    fn close(&mut self, end_us: i64, out: &mut Output) -> Result<()> {
        let start_us = end_us - self.grid.size_us;
        let mut slots = if self.pane_us == self.grid.size_us {
            self.panes.remove(start_us, &self.core)
        } else {
            self.merge_panes(start_us..end_us)?
        };
        self.core.sort_by_key(&mut slots);
        for slot in slots {
            self.core.close(Closing { start_us, end_us, span_us: self.grid.size_us, slot, free: true }, out)?;
        }
        while let Some(pane) = self.panes.first().filter(|pane| self.grid.last_end(*pane) <= end_us) {
            let done = self.panes.remove(pane, &self.core);
            self.core.free(&done);
        }
        Ok(())
    }

    /// New slots, one per key, that saw what the panes of a window saw.
    fn merge_panes(&mut self, window: Range<i64>) -> Result<Vec<u32>> {
        let mut merged = Vec::new();
        let mut merged_of = vec![NONE; self.core.keys().bound()];
        let mut pairs = Vec::new();
        for slot in self.panes.range(window) {
            let key = self.core.key_of(slot);
            if merged_of[key as usize] == NONE {
                merged_of[key as usize] = self.core.open(key)?;
                merged.push(merged_of[key as usize]);
            }
            pairs.push((merged_of[key as usize], slot));
        }
        self.core.merge(&pairs)?;
        Ok(merged)
    }
}

impl Operator for PaneWindow {
    fn process(&mut self, _input: usize, batch: Batch, out: &mut Output) -> Result<()> {
        let Placed { batch, panes, watermarks } = self.place(batch)?;
        if batch.is_empty() {
            return Ok(());
        }
        let rows = self.core.rows(&batch)?;
        let keys = self.core.find_keys(&batch)?;
        let mut at = 0;
        while at < batch.len() {
            self.advance(watermarks[at], out)?;
            let next_end = self.grid.end_after(self.core.watermark_us);
            let until = at + watermarks[at..].partition_point(|watermark_us| *watermark_us < next_end).max(1);
            self.add(&rows, at..until, &panes, &keys)?;
            at = until;
        }
        self.core.finish(out)
    }

    fn watermark(&mut self, time_us: i64, out: &mut Output) -> Result<()> {
        self.advance(time_us, out)?;
        self.core.finish(out)
    }

    // Nothing is held back: an open window ends after the watermark, so its results are at or after it.

    fn is_stateful(&self) -> bool {
        true
    }

    fn late_rows(&self) -> u64 {
        self.core.late
    }

    fn snapshot(&self, state: &mut StateWriter) {
        state.attempt(|state| {
            self.core.save(state);
            self.core.save_slots(&self.panes.all(), state)
        });
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        restore(state, |state| {
            self.core.load(state)?;
            for (pane, slot) in self.core.load_slots(state)? {
                self.panes.insert(pane, slot, &self.core);
            }
            Ok(())
        })
    }
}
