//! `deduplicate`: drops rows that came before.

use std::collections::BTreeSet;

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use pipeline::batch::Batch;
use pipeline::config::{At, CheckContext, Duration};
use pipeline::error::Result;
use pipeline::plugin::{Operator, OperatorConfig, Output, Planned, StreamShape};
use pipeline::state::{StateReader, StateWriter};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::keys::{Keys, key_columns};

const PAGE: &str = "\
Drops rows whose key has passed before, within a window of event time.

    deduplicate: {key: [message_id], window: 10m}

A row is dropped if a row of the same key has passed whose event time is less than `window` away, before or after:
rows may come out of order. A dropped row does not renew the window, so of a message repeated for ever one passes
about every `window`.

## Emits

The rows that pass, unchanged, at once. A row in which all key columns are null has no identity and always passes;
otherwise null equals null. Which of two equal rows is first is the order of arrival: within one source that order is
kept through a crash, between several sources there is none.

## State

16 bytes of hash and 8 of time per row that passed, kept until the watermark is `window` beyond it. It is in the
checkpoint: a restart forgets nothing. Partial and revised rows of a window are not taken.

## Limits

One million rows are remembered; beyond that the one with the oldest event time is forgotten, and a repetition of it
passes. A row later than `lateness` may be a repetition of one already forgotten; then it passes.

## Fails when

Never.
";

/// Most rows remembered. About 100 MB in memory and 24 MB in a checkpoint; beyond it the oldest is forgotten.
const ROWS_MAX: usize = 1_000_000;

/// Options of `deduplicate`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeduplicateConfig {
    /// Columns that tell rows apart; rows equal in all of them are the same.
    pub key: Vec<At<String>>,
    /// How far apart in event time two rows of one key may be to count as the same: `10m`. There is no default,
    /// because only the sender knows for how long it repeats.
    pub window: At<Duration>,
}

impl OperatorConfig for DeduplicateConfig {
    const TYPE: &'static str = "deduplicate";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "deduplicate: {key: [device_id, ts], window: 10m}";

    fn keeps_columns(&self) -> bool {
        true
    }

    fn plan(&self, inputs: &[StreamShape], cx: &mut CheckContext<'_>) -> Option<Planned> {
        let shape = inputs.first()?.clone();
        let key = key_columns(&self.key, "key", &shape.schema, cx);
        if self.window.as_us() == 0 {
            cx.error(self.window.position, "`window` must be longer than nothing");
            return Some(Planned::broken(shape));
        }
        let Some(key) = key else { return Some(Planned::broken(shape)) };
        let operator = Deduplicate::new(key, self.window.as_us(), ROWS_MAX);
        Some(Planned { shape, operator: Box::new(operator) })
    }
}

struct Deduplicate {
    key: Vec<usize>,
    window_us: i64,
    rows_max: usize,
    passed: HashMap<u128, Passed>,
    /// The same by time, to forget the oldest first.
    by_time: BTreeSet<(i64, u128)>,
}

/// Event times of the rows of one key that have passed, each at least a window from the next.
enum Passed {
    /// Nearly always.
    One(i64),
    /// In order.
    More(Vec<i64>),
}

impl Passed {
    fn times(&self) -> &[i64] {
        match self {
            Self::One(time) => std::slice::from_ref(time),
            Self::More(times) => times,
        }
    }

    fn first_after(&self, time: i64) -> Option<i64> {
        let times = self.times();
        times.get(times.partition_point(|other| *other <= time)).copied()
    }

    fn add(&mut self, time: i64) {
        let mut times = self.times().to_vec();
        times.insert(times.partition_point(|other| *other < time), time);
        *self = Self::More(times);
    }
}

impl Deduplicate {
    fn new(key: Vec<usize>, window_us: i64, rows_max: usize) -> Self {
        Self { key, window_us, rows_max, passed: HashMap::new(), by_time: BTreeSet::new() }
    }

    /// Whether a row passes, which met `watermark`; if so it is remembered.
    fn passes(&mut self, hash: u128, time: i64, watermark: i64) -> bool {
        // A row that the watermark has left behind counts no more, forgotten already or not: else the fate of a
        // late row would depend on where batches are cut.
        let forgotten = watermark.saturating_sub(self.window_us);
        let (after, before) = (time.saturating_sub(self.window_us), time.saturating_add(self.window_us));
        if self
            .passed
            .get(&hash)
            .and_then(|passed| passed.first_after(after.max(forgotten)))
            .is_some_and(|t| t < before)
        {
            return false;
        }
        if self.by_time.len() >= self.rows_max {
            self.forget_until(forgotten);
        }
        if self.by_time.len() >= self.rows_max
            && let Some(oldest) = self.by_time.pop_first()
        {
            self.remove(oldest);
        }
        self.remember(hash, time);
        true
    }

    fn remember(&mut self, hash: u128, time: i64) {
        if self.by_time.insert((time, hash)) {
            match self.passed.entry(hash) {
                Entry::Vacant(vacant) => {
                    vacant.insert(Passed::One(time));
                }
                Entry::Occupied(mut occupied) => occupied.get_mut().add(time),
            }
        }
    }

    /// Forgets all rows at or before `time_us`.
    fn forget_until(&mut self, time_us: i64) {
        while let Some(oldest) = self.by_time.first().copied().filter(|(time, _)| *time <= time_us) {
            self.by_time.pop_first();
            self.remove(oldest);
        }
    }

    fn remove(&mut self, (time, hash): (i64, u128)) {
        let Entry::Occupied(mut entry) = self.passed.entry(hash) else { return };
        match entry.get_mut() {
            Passed::More(times) if times.len() > 1 => times.retain(|other| *other != time),
            Passed::One(_) | Passed::More(_) => {
                entry.remove();
            }
        }
    }
}

impl Operator for Deduplicate {
    fn process(&mut self, _: usize, batch: Batch, out: &mut Output) -> Result<()> {
        let mut keys = Keys::new(batch.rows(), &self.key)?;
        let times = batch.event_us().iter().zip(batch.watermark_us());
        let mut keep = Vec::with_capacity(batch.len());
        for (row, (time, watermark)) in times.enumerate() {
            let hash = keys.hash(row);
            keep.push(keys.is_null() || self.passes(hash, *time, *watermark));
        }
        if keep.iter().all(|keep| *keep) {
            out.push(batch);
        } else {
            out.push(batch.filter(&keep.into())?);
        }
        Ok(())
    }

    fn watermark(&mut self, time_us: i64, _: &mut Output) -> Result<()> {
        // The end of all rows takes no room: after a drain, what has passed is still known to the next run.
        if time_us != i64::MAX {
            self.forget_until(time_us.saturating_sub(self.window_us));
        }
        Ok(())
    }

    fn is_stateful(&self) -> bool {
        true
    }

    fn snapshot(&self, state: &mut StateWriter) {
        state.u64(self.by_time.len() as u64);
        for (time, hash) in &self.by_time {
            state.i64(*time);
            state.u64((hash >> 64) as u64);
            state.u64(*hash as u64);
        }
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        for _ in 0..state.count()? {
            let time = state.i64()?;
            let high = u128::from(state.u64()?);
            let low = u128::from(state.u64()?);
            self.remember(high << 64 | low, time);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pipeline::schema::FieldType;

    use super::*;
    use crate::testing::{Case, Columns, Random, row};

    const COLUMNS: Columns<'static> = &[("id", FieldType::String), ("part", FieldType::Int)];

    fn case(step: &str, lateness_s: f64) -> Case<'_> {
        Case { step, inputs: &[COLUMNS], keys: &[], windowed: false, lateness_s }
    }

    #[test]
    fn a_row_is_dropped_less_than_a_window_from_one_that_passed() {
        let rows = [
            row(0.0, r#"{"id": "a", "part": 1}"#),
            row(1.0, r#"{"id": "a", "part": 2}"#),
            row(9.9, r#"{"id": "a", "part": 1}"#),
            row(10.0, r#"{"id": "a", "part": 1}"#),
            row(12.0, r#"{"id": "b", "part": 1}"#),
            row(3.0, r#"{"id": "b", "part": 1}"#),
            row(2.0, r#"{"id": "b", "part": 1}"#),
        ];
        let a1 = r#"0 {"id":"a","part":1}"#;
        let a2 = r#"1 {"id":"a","part":2}"#;
        let later = r#"10 {"id":"a","part":1}"#;
        let b = r#"12 {"id":"b","part":1}"#;
        let earlier = r#"2 {"id":"b","part":1}"#;
        for (step, expected) in [
            ("deduplicate: {key: [id], window: 10s}", vec![a1, later, b, earlier]),
            ("deduplicate: {key: [id, part], window: 10s}", vec![a1, a2, later, b, earlier]),
            ("deduplicate: {key: [part, id], window: 1d}", vec![a1, a2, b]),
        ] {
            case(step, 60.0).gives(&rows, &expected);
        }
    }

    #[test]
    fn a_late_repetition_passes_once_its_first_row_is_a_window_behind_the_watermark() {
        let rows = [
            row(0.0, r#"{"id": "a"}"#),
            row(12.0, r#"{"id": "b"}"#),
            row(1.0, r#"{"id": "a"}"#),
            row(15.0, r#"{"id": "c"}"#),
            // This row meets a watermark of 10 s, the first that has left the row at 0 s a window behind.
            row(1.0, r#"{"id": "a"}"#),
        ];
        let expected = [
            r#"0 {"id":"a","part":null}"#,
            r#"12 {"id":"b","part":null}"#,
            r#"15 {"id":"c","part":null}"#,
            r#"1 {"id":"a","part":null}"#,
        ];
        case("deduplicate: {key: [id], window: 10s}", 5.0).gives(&rows, &expected);
    }

    #[test]
    fn a_row_without_any_key_passes_and_null_equals_null_in_a_part_of_it() {
        let rows =
            [row(1.0, "{}"), row(2.0, "{}"), row(3.0, r#"{"id": "a"}"#), row(4.0, r#"{"id": "a"}"#), row(5.0, "{}")];
        let none = |second: &str| format!(r#"{second} {{"id":null,"part":null}}"#);
        let (one, two, five) = (none("1"), none("2"), none("5"));
        let expected = [one.as_str(), two.as_str(), r#"3 {"id":"a","part":null}"#, five.as_str()];
        case("deduplicate: {key: [id, part], window: 10s}", 0.0).gives(&rows, &expected);
    }

    #[test]
    fn random_rows_pass_as_a_search_through_all_that_passed_says() {
        const WINDOW_US: i64 = 100;
        const LATENESS_US: i64 = 250;
        for seed in 1..=20 {
            let mut random = Random(seed);
            let mut step = Deduplicate::new(vec![0], WINDOW_US, ROWS_MAX);
            let (mut passed, mut newest) = (Vec::<(u128, i64)>::new(), 0);
            for _ in 0..2_000 {
                let watermark = newest - LATENESS_US;
                // One row in ten is later than allowed.
                let late_max = if random.below(10) == 0 { 600 } else { LATENESS_US as u64 };
                let late = random.below(late_max);
                let (hash, time) = (u128::from(random.below(4)), newest + 20 - late as i64);
                let same = |(other, at): &(u128, i64)| {
                    *other == hash && (at - time).abs() < WINDOW_US && *at > watermark - WINDOW_US
                };
                let expected = !passed.iter().any(same);
                assert_eq!(step.passes(hash, time, watermark), expected, "seed {seed}, row at {time}");
                if expected {
                    passed.push((hash, time));
                }
                newest = newest.max(time);
                if random.below(5) == 0 {
                    step.forget_until(newest - LATENESS_US - WINDOW_US);
                }
            }
            assert!(step.by_time.len() < 100, "old rows are forgotten");
        }
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_row_is_forgotten_first() {
        let mut step = Deduplicate::new(vec![0], 1_000, 3);
        for (hash, time) in [(1, 50), (2, 20), (3, 40)] {
            assert!(step.passes(hash, time, i64::MIN));
        }
        assert!(step.passes(4, 60, i64::MIN), "takes the place of the row at 20");
        assert!(!step.passes(1, 60, i64::MIN));
        assert!(step.passes(2, 60, i64::MIN), "forgotten; takes the place of the row at 40");
        assert_eq!((step.by_time.len(), step.passed.len()), (3, 3));
        step.forget_until(59);
        assert_eq!((step.by_time.len(), step.passed.len()), (2, 2));
        assert!(step.passes(2, 1_060, i64::MIN) && step.passes(2, 2_060, i64::MIN));
        step.forget_until(i64::MAX);
        assert_eq!((step.by_time.len(), step.passed.len()), (0, 0));
    }

    #[test]
    fn wrong_options_are_reported_at_their_place() {
        for (step, expected) in [
            ("deduplicate: {key: [], window: 1s}", "`key` needs at least one column"),
            ("deduplicate: {key: [ix], window: 1s}", "1:21: error: step: no column `ix` here"),
            ("deduplicate: {key: [id, id], window: 1s}", "1:25: error: step: column `id` stands twice"),
            ("deduplicate: {key: [id], window: 0s}", "1:34: error"),
            ("deduplicate: {key: [id]}", "`window` is missing"),
        ] {
            let problems = case(step, 0.0).problems();
            assert!(problems.contains(expected), "{step}: {problems}");
        }
    }
}
