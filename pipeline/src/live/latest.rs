//! The latest row of every key of one metric. A checkpoint takes it as it is at its barrier, and writes it down while new
//! rows come.

use std::sync::Arc;

use indexmap::IndexMap;

use super::KeyText;
use crate::error::Result;
use crate::state::{StateReader, StateWriter};

/// Most keys of one metric whose latest row is kept, about 20 MB at 200 bytes a row. A new key beyond it
/// takes the place of an old one.
pub const LATEST_KEYS_MAX: usize = 100_000;

/// Rows as JSON objects, by key.
type Rows = IndexMap<KeyText, Arc<str>>;

/// The latest rows.
#[derive(Debug, Default)]
pub(super) struct LatestRows {
    /// All rows; while a checkpoint reads them they stay as they are.
    rows: Arc<Rows>,
    /// Rows that have come meanwhile.
    newer: Rows,
    evicted: usize,
    /// Number of the newest output batch; 0 if there is none.
    pub(super) number: u64,
    /// When it came, microseconds since 1970 UTC.
    pub(super) updated_us: i64,
}

/// The latest rows at a barrier.
#[derive(Debug)]
pub(crate) struct Frozen {
    keys: Vec<String>,
    rows: Arc<Rows>,
    number: u64,
    updated_us: i64,
}

impl LatestRows {
    /// Keeps rows as the latest of their keys.
    pub(super) fn extend(&mut self, rows: impl Iterator<Item = (KeyText, Arc<str>)>) {
        let newer = std::mem::take(&mut self.newer);
        match Arc::get_mut(&mut self.rows) {
            Some(all) => newer.into_iter().chain(rows).for_each(|(key, row)| put(all, &mut self.evicted, key, row)),
            None => {
                self.newer = newer;
                self.newer.extend(rows);
            }
        }
    }

    /// The latest rows, in the order in which their keys came.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&KeyText, &Arc<str>)> {
        let known = self.rows.iter().map(|(key, row)| (key, self.newer.get(key).unwrap_or(row)));
        known.chain(self.newer.iter().filter(|(key, _)| !self.rows.contains_key(*key)))
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len() + self.newer.keys().filter(|key| !self.rows.contains_key(*key)).count()
    }

    /// The rows as they are now. Takes no longer for many rows than for few, unless the last ones were not written down
    /// yet.
    pub(super) fn freeze(&mut self, keys: &[String]) -> Frozen {
        if !self.newer.is_empty() {
            let (newer, all) = (std::mem::take(&mut self.newer), Arc::make_mut(&mut self.rows));
            newer.into_iter().for_each(|(key, row)| put(all, &mut self.evicted, key, row));
        }
        let (rows, number, updated_us) = (Arc::clone(&self.rows), self.number, self.updated_us);
        Frozen { keys: keys.to_vec(), rows, number, updated_us }
    }

    /// What [`Frozen::write`] wrote; nothing if the metric has other key columns now.
    pub(super) fn restore(keys: &[String], state: &mut StateReader<'_>) -> Result<Option<Self>> {
        let mut kept = Vec::new();
        for _ in 0..state.count()? {
            kept.push(state.str()?.to_owned());
        }
        let (number, updated_us) = (state.u64()?, state.i64()?);
        let mut rows = Rows::default();
        for _ in 0..state.count()? {
            let key = kept.iter().map(|_| state.str().map(Box::from)).collect::<Result<KeyText>>()?;
            rows.insert(key, Arc::from(state.str()?));
        }
        let same = kept == keys;
        Ok(same.then(|| Self { rows: Arc::new(rows), number, updated_us, ..Self::default() }))
    }
}

impl Frozen {
    /// Writes the rows down.
    pub(crate) fn write(&self, state: &mut StateWriter) {
        state.u64(self.keys.len() as u64);
        self.keys.iter().for_each(|key| state.str(key));
        state.u64(self.number);
        state.i64(self.updated_us);
        state.u64(self.rows.len() as u64);
        for (key, row) in &*self.rows {
            key.iter().for_each(|part| state.str(part));
            state.str(row);
        }
    }
}

fn put(rows: &mut Rows, evicted: &mut usize, key: KeyText, row: Arc<str>) {
    if rows.len() >= LATEST_KEYS_MAX && !rows.contains_key(&key) {
        // The place goes round, so that it is an old key's that is taken, not always the newest one's.
        let at = *evicted % rows.len();
        rows.swap_remove_index(at);
        *evicted = at + 1;
    }
    rows.insert(key, row);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(key: &str, text: &str) -> (KeyText, Arc<str>) {
        ([Box::from(key)].into(), text.into())
    }

    fn shown(rows: &LatestRows) -> Vec<String> {
        let shown: Vec<String> = rows.iter().map(|(key, row)| format!("{}={row}", key[0])).collect();
        assert_eq!(rows.len(), shown.len());
        shown
    }

    fn written(frozen: &Frozen) -> Vec<u8> {
        let mut state = StateWriter::default();
        frozen.write(&mut state);
        state.finish()
    }

    #[test]
    fn a_checkpoint_has_the_rows_of_its_barrier_and_readers_have_the_newest() {
        let keys = ["device".to_owned()];
        let mut rows = LatestRows { number: 7, updated_us: 70, ..LatestRows::default() };
        rows.extend([row("a", "1"), row("b", "1")].into_iter());
        let frozen = rows.freeze(&keys);
        let before = written(&frozen);
        rows.extend([row("b", "2"), row("c", "1")].into_iter());
        rows.extend([row("c", "2")].into_iter());
        assert_eq!(shown(&rows), ["a=1", "b=2", "c=2"]);
        assert_eq!(written(&frozen), before);
        // Before the first one is written down, too.
        let next = rows.freeze(&keys);
        assert_eq!(written(&frozen), before);
        drop(frozen);
        rows.extend([row("a", "3")].into_iter());
        drop(next);
        rows.extend([row("d", "1")].into_iter());
        assert_eq!(shown(&rows), ["a=3", "b=2", "c=2", "d=1"]);

        let state = written(&rows.freeze(&keys));
        let restored =
            LatestRows::restore(&keys, &mut StateReader::new(&state)).expect("whole").expect("the same keys");
        assert_eq!((shown(&restored), restored.number, restored.updated_us), (shown(&rows), 7, 70));
        let other = LatestRows::restore(&["room".to_owned()], &mut StateReader::new(&state)).expect("whole");
        assert!(other.is_none());
        for length in 0..state.len() {
            assert!(LatestRows::restore(&keys, &mut StateReader::new(&state[..length])).is_err(), "cut to {length}");
        }
    }

    #[test]
    fn a_new_key_beyond_the_limit_takes_the_place_of_an_old_one() {
        let mut rows = LatestRows::default();
        rows.extend((0..LATEST_KEYS_MAX).map(|key| row(&key.to_string(), "1")));
        let frozen = rows.freeze(&[]);
        rows.extend((0..10).map(|key| row(&format!("new {key}"), "1")));
        drop(frozen);
        rows.extend([row("newest", "1")].into_iter());
        assert_eq!(rows.len(), LATEST_KEYS_MAX);
        assert_eq!(rows.iter().filter(|(key, _)| key[0].starts_with("new")).count(), 11);
    }
}
