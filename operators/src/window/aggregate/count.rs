//! `count(x)`, and `count()` and `rate()` with a FILTER. Eight bytes per slot; the order of rows is no matter.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array};
use pipeline::error::Result;
use pipeline::state::{StateReader, StateWriter};

use super::{Aggregate, Chunk, each_value};

/// Numbers of rows, or of values that are not null if there is an argument.
#[derive(Default)]
pub(super) struct Count {
    counts: Vec<i64>,
}

impl Aggregate for Count {
    fn grow(&mut self, slots: usize) {
        self.counts.resize(slots, 0);
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        match chunk.arguments.first() {
            Some(values) => each_value(chunk.slots, values, |_, slot| self.counts[slot] += 1),
            None => chunk.slots.iter().for_each(|slot| self.counts[*slot as usize] += 1),
        }
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            self.counts[*into as usize] += self.counts[*from as usize];
        }
        Ok(())
    }

    fn clear(&mut self, slots: &[u32]) {
        slots.iter().for_each(|slot| self.counts[*slot as usize] = 0);
    }

    fn evaluate(&mut self, slots: &[u32], _output: usize) -> Result<ArrayRef> {
        Ok(Arc::new(slots.iter().map(|slot| Some(self.counts[*slot as usize])).collect::<Int64Array>()))
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        slots.iter().for_each(|slot| state.i64(self.counts[*slot as usize]));
        Ok(())
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        for slot in slots {
            self.counts[*slot as usize] = state.i64()?;
        }
        Ok(())
    }
}
