//! Replay at the pace of event time.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use arrow::array::TimestampMicrosecondArray;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};

/// How fast rows come.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Speed {
    /// As fast as the graph takes them.
    #[default]
    Max,
    /// So many times as fast as they happened.
    Times(f64),
}

impl FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "max" {
            return Ok(Self::Max);
        }
        let times = text.strip_suffix('x').and_then(|times| times.trim_end().parse::<f64>().ok());
        match times {
            Some(times) if times.is_finite() && times > 0.0 => Ok(Self::Times(times)),
            _ => Err(format!("`{text}` is no speed; write `max`, or how many times as fast: `1x`, `60x`, `0.5x`")),
        }
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Max => f.write_str("max"),
            Self::Times(times) => write!(f, "{times}x"),
        }
    }
}

impl<'de> Deserialize<'de> for Speed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for Speed {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Speed".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": r"^(max|[0-9]*\.?[0-9]+ *x)$"})
    }
}

/// Tells which rows are due. The first row with a time is due at once and sets the clock for the others.
pub(super) struct Pace {
    factor: f64,
    /// When the first row came, and its event time.
    start: Option<(Instant, i64)>,
}

impl Pace {
    pub(super) fn new(factor: f64) -> Self {
        Self { factor, start: None }
    }

    /// How many of the next rows are due at `now`, in file order: up to the first that lies ahead. A row without a
    /// time, or earlier than the one before, is due with that one.
    pub(super) fn due(&mut self, now: Instant, times: &TimestampMicrosecondArray) -> usize {
        let due = times.iter().position(|time| time.is_some_and(|time| time > self.reached_us(now, time)));
        due.unwrap_or(times.len())
    }

    /// The event time that is reached at `now`; `first_us` if the clock starts here.
    fn reached_us(&mut self, now: Instant, first_us: i64) -> i64 {
        let (started, first_us) = *self.start.get_or_insert((now, first_us));
        let passed = now.saturating_duration_since(started).as_secs_f64() * 1e6 * self.factor;
        first_us.saturating_add(passed as i64) // a float too large becomes the largest number
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn speeds_read_what_they_print() {
        for text in ["max", "1x", "60x", "0.5x"] {
            assert_eq!(text.parse::<Speed>().map(|speed| speed.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "x", "60", "-1x", "0x", "infx", "fast"] {
            assert!(text.parse::<Speed>().is_err(), "{text}");
        }
    }

    #[test]
    fn rows_are_due_when_their_scaled_time_has_come() {
        let times = TimestampMicrosecondArray::from(vec![
            None,
            Some(1_000_000),
            Some(2_000_000),
            Some(1_500_000), // out of order: with the one before
            None,
            Some(61_000_000),
        ]);
        let start = Instant::now();
        let mut pace = Pace::new(60.0);
        let mut taken = 0;
        for (after_ms, expected) in [(0, 2), (16, 2), (17, 5), (999, 5), (1000, 6)] {
            taken += pace.due(start + Duration::from_millis(after_ms), &times.slice(taken, times.len() - taken));
            assert_eq!(taken, expected, "after {after_ms} ms");
        }
    }
}
