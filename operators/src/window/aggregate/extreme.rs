//! `min` and `max`: one value per slot. The order of rows is no matter.

use std::cmp::Ordering;

use arrow::array::ArrayRef;
use arrow::datatypes::DataType;
use pipeline::error::{Error, Result};
use pipeline::state::{StateReader, StateWriter};

use super::stored::Stored;
use super::{Aggregate, Chunk, argument, each_value, pair_mut};
use crate::encoding::{Layout, into_layout, out_of_layout};

/// An empty state for values of `data_type`.
pub(super) fn build(data_type: &DataType, greatest: bool) -> Result<Box<dyn Aggregate>> {
    let data_type = data_type.clone();
    let wanted = if greatest { Ordering::Less } else { Ordering::Greater };
    Ok(match Layout::of(&data_type) {
        Some(Layout::Int) => Box::new(Extreme::<i64> { values: Vec::new(), wanted, data_type }),
        Some(Layout::Float) => Box::new(Extreme::<f64> { values: Vec::new(), wanted, data_type }),
        Some(Layout::Decimal) => Box::new(Extreme::<i128> { values: Vec::new(), wanted, data_type }),
        Some(Layout::Bytes) => Box::new(Extreme::<Vec<u8>> { values: Vec::new(), wanted, data_type }),
        None => return Err(Error::internal(format!("no order of {data_type}"))),
    })
}

struct Extreme<T> {
    values: Vec<Option<T>>,
    /// How the kept value stands to one that replaces it.
    wanted: Ordering,
    data_type: DataType,
}

impl<T: Stored> Aggregate for Extreme<T> {
    fn grow(&mut self, slots: usize) {
        self.values.resize(slots, None);
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        let array = into_layout(argument(chunk)?)?;
        let column = T::downcast(&array)?;
        each_value(chunk.slots, column, |row, slot| match &mut self.values[slot] {
            Some(kept) if kept.against(column, row) != self.wanted => {}
            Some(kept) => kept.set(column, row),
            empty => empty.insert(T::default()).set(column, row),
        });
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            let (into, from) = pair_mut(&mut self.values, *into, *from)?;
            match (&*into, from) {
                (_, None) => {}
                (Some(kept), Some(other)) if kept.compare(other) != self.wanted => {}
                _ => into.clone_from(from),
            }
        }
        Ok(())
    }

    fn clear(&mut self, slots: &[u32]) {
        slots.iter().for_each(|slot| self.values[*slot as usize] = None);
    }

    fn evaluate(&mut self, slots: &[u32], _output: usize) -> Result<ArrayRef> {
        out_of_layout(T::column(slots.iter().map(|slot| self.values[*slot as usize].as_ref())), &self.data_type)
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        for slot in slots {
            let value = &self.values[*slot as usize];
            state.bool(value.is_some());
            if let Some(value) = value {
                value.write(state);
            }
        }
        Ok(())
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        for slot in slots {
            self.values[*slot as usize] = if state.bool()? { Some(T::read(state)?) } else { None };
        }
        Ok(())
    }
}
