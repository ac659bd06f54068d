//! What flows between nodes: rows in Arrow columns, with their times beside them.

use std::sync::{Arc, OnceLock};

use arrow::array::{Array, ArrayRef, BooleanArray, Int64Array, RecordBatch, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::{concat, concat_batches, filter, filter_record_batch, take, take_record_batch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

use crate::error::{Error, Result};
use crate::json::{JsonRows, encode_rows};

/// Most rows that one batch holds. Larger batches gain nothing from the CPU's caches and cost latency.
pub const BATCH_ROWS_MAX: usize = 8192;

/// Name of the hidden column with the event time, for expressions.
pub const EVENT_TIME: &str = "event_time";
/// Name of the hidden column with the time of receipt, for expressions.
pub const INGEST_TIME: &str = "ingest_time";

/// How settled the rows of a batch are. Rows that no window made are `Final`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Stage {
    /// An early result of a window that is still open.
    Partial,
    /// The result at the close of a window, or a plain row.
    #[default]
    Final,
    /// A result corrected by a late row.
    Revised,
}

impl Stage {
    /// The word in the `stage` column.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Partial => "partial",
            Self::Final => "final",
            Self::Revised => "revised",
        }
    }
}

/// Three times of every row, in microseconds since 1970 UTC; the columns are equally long.
#[derive(Clone, Debug)]
pub struct Times {
    /// When it happened: the source's `event_time` field, else the ingest time.
    pub event_us: Int64Array,
    /// When the process received it.
    pub ingest_us: Int64Array,
    /// The watermark in force when the row arrived: no row before it in source order moved event time
    /// beyond `watermark + lateness`. A window that ends at or before it is closed for this row.
    /// `i64::MIN` means none yet. Kept row by row so that lateness does not depend on batch cuts.
    pub watermark_us: Int64Array,
}

impl Times {
    /// The same three times for `rows` rows.
    pub fn constant(event_us: i64, ingest_us: i64, watermark_us: i64, rows: usize) -> Self {
        let column = |value| Int64Array::from_value(value, rows);
        Self { event_us: column(event_us), ingest_us: column(ingest_us), watermark_us: column(watermark_us) }
    }

    fn map(&self, f: impl Fn(&dyn Array) -> Result<ArrayRef>) -> Result<Self> {
        let column = |a: &Int64Array| -> Result<Int64Array> { Ok(Int64Array::from(f(a)?.to_data())) };
        Ok(Self {
            event_us: column(&self.event_us)?,
            ingest_us: column(&self.ingest_us)?,
            watermark_us: column(&self.watermark_us)?,
        })
    }
}

/// Rows of one edge. Cloning is cheap: columns and encoded rows are shared.
#[derive(Clone, Debug)]
pub struct Batch {
    rows: RecordBatch,
    times: Arc<Times>,
    stage: Stage,
    json: Arc<OnceLock<JsonRows>>,
}

impl Batch {
    /// Rows with their times. Both must be equally long.
    pub fn new(rows: RecordBatch, times: Times, stage: Stage) -> Result<Self> {
        if times.event_us.len() != rows.num_rows() {
            return Err(Error::internal(format!("{} times for {} rows", times.event_us.len(), rows.num_rows())));
        }
        Ok(Self { rows, times: Arc::new(times), stage, json: Arc::default() })
    }

    /// The visible columns.
    pub fn rows(&self) -> &RecordBatch {
        &self.rows
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.num_rows()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The hidden times.
    pub fn times(&self) -> &Times {
        &self.times
    }

    /// Event times in microseconds since 1970 UTC.
    pub fn event_us(&self) -> &[i64] {
        self.times.event_us.values()
    }

    /// Ingest times in microseconds since 1970 UTC.
    pub fn ingest_us(&self) -> &[i64] {
        self.times.ingest_us.values()
    }

    /// The watermark that each row met, in microseconds since 1970 UTC.
    pub fn watermark_us(&self) -> &[i64] {
        self.times.watermark_us.values()
    }

    /// How settled the rows are; one stage per batch.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Other visible columns for the same rows, in the same order.
    pub fn with_rows(&self, rows: RecordBatch) -> Result<Self> {
        if self.len() != rows.num_rows() {
            return Err(Error::internal(format!("{} rows for {}", rows.num_rows(), self.len())));
        }
        Ok(Self { rows, times: Arc::clone(&self.times), stage: self.stage, json: Arc::default() })
    }

    /// The rows where `keep` is true (null counts as false).
    pub fn filter(&self, keep: &BooleanArray) -> Result<Self> {
        let times = self.times.map(|a| Ok(filter(a, keep)?))?;
        Self::new(filter_record_batch(&self.rows, keep)?, times, self.stage)
    }

    /// The rows at `indices`, in that order.
    pub fn take(&self, indices: &UInt32Array) -> Result<Self> {
        let times = self.times.map(|a| Ok(take(a, indices, None)?))?;
        Self::new(take_record_batch(&self.rows, indices)?, times, self.stage)
    }

    /// `length` rows from `offset`, without a copy.
    pub fn slice(&self, offset: usize, length: usize) -> Result<Self> {
        let times = self.times.map(|a| Ok(a.slice(offset, length)))?;
        Self::new(self.rows.slice(offset, length), times, self.stage)
    }

    /// One batch of all rows in order. All must share one schema and stage; at least one batch.
    pub fn concat(batches: &[Self]) -> Result<Self> {
        let first = batches.first().ok_or_else(|| Error::internal("concat of no batch"))?;
        if batches.len() == 1 {
            return Ok(first.clone());
        }
        let rows = concat_batches(first.rows.schema_ref(), batches.iter().map(|b| &b.rows))?;
        let column = |f: fn(&Times) -> &Int64Array| -> Result<Int64Array> {
            let parts: Vec<&dyn Array> = batches.iter().map(|b| f(&b.times) as &dyn Array).collect();
            Ok(Int64Array::from(concat(&parts)?.to_data()))
        };
        let times = Times {
            event_us: column(|t| &t.event_us)?,
            ingest_us: column(|t| &t.ingest_us)?,
            watermark_us: column(|t| &t.watermark_us)?,
        };
        Self::new(rows, times, first.stage)
    }

    /// The visible columns, then `event_time` and `ingest_time` where no visible column has that name:
    /// what expressions see. Its schema is [`with_hidden_columns`] of the visible one.
    pub fn with_hidden(&self) -> Result<RecordBatch> {
        let schema = with_hidden_columns(self.rows.schema_ref());
        let mut columns = self.rows.columns().to_vec();
        for (name, values) in [(EVENT_TIME, &self.times.event_us), (INGEST_TIME, &self.times.ingest_us)] {
            if self.rows.schema_ref().column_with_name(name).is_none() {
                let array = TimestampMicrosecondArray::new(values.values().clone(), None).with_timezone("UTC");
                columns.push(Arc::new(array));
            }
        }
        Ok(RecordBatch::try_new(schema, columns)?)
    }

    /// Each row as one JSON object, encoded once for all who hold a clone of this batch.
    pub fn json(&self) -> &JsonRows {
        self.json.get_or_init(|| encode_rows(&self.rows))
    }
}

/// `schema` followed by the hidden columns that expressions may name.
pub fn with_hidden_columns(schema: &SchemaRef) -> SchemaRef {
    let mut fields: Vec<Arc<Field>> = schema.fields().iter().cloned().collect();
    for name in [EVENT_TIME, INGEST_TIME] {
        if schema.column_with_name(name).is_none() {
            let utc = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
            fields.push(Arc::new(Field::new(name, utc, false)));
        }
    }
    Arc::new(Schema::new(fields))
}
