//! Rows of sources whose columns are fixed.

use arrow::array::RecordBatch;
use pipeline::config::Fields;
use pipeline::error::{Error, Result};
use pipeline::rows::{Cell, RowsBuilder};
use pipeline::schema::FieldType;

/// Rows over `columns`, each with its cells in their order.
pub(crate) fn rows_of<'a, const N: usize>(
    columns: &[(&str, FieldType); N],
    rows: impl IntoIterator<Item = [Cell<'a>; N]>,
) -> Result<RecordBatch> {
    let mut builder = RowsBuilder::new(columns, &Fields::default());
    for cells in rows {
        let mut row = builder.row();
        for (column, cell) in cells.into_iter().enumerate() {
            builder.set(&mut row, column, cell).map_err(Error::internal)?;
        }
        builder.push(row);
    }
    builder.finish()
}

/// A counter as a cell.
pub(crate) fn count(value: u64) -> Cell<'static> {
    Cell::Int(i64::try_from(value).unwrap_or(i64::MAX))
}
