//! Parquet files: columns by name, cast to the declared types.

use std::fs::File;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, TimestampMicrosecondArray,
};
use arrow::compute::{CastOptions, can_cast_types, cast_with_options, filter_record_batch, is_null, nullif};
use arrow::datatypes::{DataType, Field, Fields as ArrowFields, Float64Type, Int64Type, SchemaRef};
use arrow::util::display::array_value_to_string;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::metadata::RowGroupMetaData;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::config::{FieldSpec, did_you_mean};
use pipeline::error::{Error, Result};
use pipeline::json::encode_rows;
use pipeline::plugin::RowError;
use pipeline::schema::{FieldType, NumberUnit};
use pipeline::time::parse_us;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::files::{DataFile, unreadable};
use super::{Layout, Part, Place, Rows, changed, name_in_file};

/// An open Parquet file.
pub(super) struct ParquetFile {
    name: String,
    schema: SchemaRef,
    columns: Vec<Column>,
    rows: ParquetRecordBatchReader,
    /// Rows of the file that were read.
    read: u64,
    /// Of each row group: the rows until its end, and a hash of all until there.
    marks: Vec<(u64, u64)>,
}

/// One declared field and where it lies in the file.
struct Column {
    name: String,
    field_type: FieldType,
    /// Names from the outside in.
    path: Vec<String>,
    how: How,
}

/// How a column of the file becomes one of the declared type.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    /// Arrow's cast.
    Cast,
    /// Text with timestamps.
    Text,
    /// Numbers of this unit since 1970.
    Number(NumberUnit),
}

impl ParquetFile {
    /// Opens `file` after `place.offset` rows.
    pub(super) fn open(layout: &Layout, file: &DataFile, place: Place) -> Result<Self> {
        let builder = open(file)?;
        let found = builder.schema().fields().clone();
        let columns: Vec<Column> =
            layout.fields.0.iter().map(|(name, spec)| column(name, spec, &found, &file.name)).collect::<Result<_>>()?;
        let rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
        if rows < place.offset {
            let message = format!("`{}` was read up to row {} before and has only {rows} now", file.name, place.offset);
            return Err(Error::user(message));
        }
        let marks = marks(builder.metadata().row_groups());
        if place.mark.is_some() && place.mark != mark(&marks, place.offset) {
            return Err(changed(&file.name, &format!("row {}", place.offset)));
        }
        let roots = columns.iter().filter_map(|column| found.iter().position(|field| *field.name() == column.path[0]));
        let projection = ProjectionMask::roots(builder.parquet_schema(), roots);
        let skipped = usize::try_from(place.offset).unwrap_or(usize::MAX);
        let reader = builder.with_projection(projection).with_batch_size(BATCH_ROWS_MAX).with_offset(skipped).build();
        let reader = reader.map_err(|error| damaged(&file.name, error))?;
        let (name, schema) = (file.name.clone(), layout.fields.schema());
        Ok(Self { name, schema, columns, rows: reader, read: place.offset, marks })
    }

    /// The rows of `batch` in the declared types. A row with a value that does not fit becomes an error.
    fn convert(&self, batch: &RecordBatch) -> Result<(RecordBatch, Vec<(usize, RowError)>)> {
        let mut arrays = Vec::with_capacity(self.columns.len());
        let mut wrong: Vec<Option<String>> = Vec::new();
        for column in &self.columns {
            let source = column.find(batch)?;
            let target = column.convert(&source)?;
            if target.null_count() > source.logical_null_count() {
                wrong.resize(batch.num_rows(), None);
                column.note_wrong(&source, &target, &mut wrong)?;
            }
            arrays.push(target);
        }
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        let rows = RecordBatch::try_new_with_options(Arc::clone(&self.schema), arrays, &options)?;
        if wrong.is_empty() {
            return Ok((rows, Vec::new()));
        }
        let mut errors = Vec::new();
        for (row, message) in wrong.iter().enumerate() {
            let Some(message) = message else { continue };
            let number = self.read + row as u64 + 1;
            let excerpt = encode_rows(&batch.slice(row, 1)).row(0).to_owned();
            let error = RowError::new(format!("{}: row {number}: {message}", self.name), excerpt.as_bytes());
            errors.push((row - errors.len(), error));
        }
        let right: BooleanArray = wrong.iter().map(|message| Some(message.is_none())).collect();
        Ok((filter_record_batch(&rows, &right)?, errors))
    }
}

impl Rows for ParquetFile {
    fn read(&mut self) -> Result<Option<Part>> {
        let Some(batch) = self.rows.next() else { return Ok(None) };
        let batch = batch.map_err(|error| damaged(&self.name, error))?;
        let (rows, errors) = self.convert(&batch)?;
        self.read += batch.num_rows() as u64;
        let mark = mark(&self.marks, self.read);
        Ok(Some(Part { rows, errors, after: Place { offset: self.read, mark, ..Place::default() } }))
    }
}

/// Opens a file and reads its footer.
pub(super) fn open(file: &DataFile) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    let opened = File::open(&file.path).map_err(|error| unreadable(&file.name, &file.path, error))?;
    ParquetRecordBatchReaderBuilder::try_new(opened).map_err(|error| damaged(&file.name, error))
}

/// For each row group, the rows until its end, and a hash of the row groups until there: of their sizes, and of the least and
/// the greatest values where the file tells them.
fn marks(groups: &[RowGroupMetaData]) -> Vec<(u64, u64)> {
    let (mut rows, mut mark) = (0u64, 0u64);
    let hash = |group: &RowGroupMetaData, before: u64| {
        let numbers = [group.num_rows(), group.total_byte_size(), group.compressed_size()];
        let mark = numbers.iter().fold(before, |mark, number| xxh3_64_with_seed(&number.to_le_bytes(), mark));
        let statistics = group.columns().iter().filter_map(|column| column.statistics());
        let values = statistics.flat_map(|values| [values.min_bytes_opt(), values.max_bytes_opt()]);
        values.flatten().fold(mark, |mark, value| xxh3_64_with_seed(value, mark))
    };
    let until = |group: &RowGroupMetaData| {
        rows += u64::try_from(group.num_rows()).unwrap_or_default();
        mark = hash(group, mark);
        (rows, mark)
    };
    groups.iter().map(until).collect()
}

/// The mark of a place: that of the row groups wholly before it.
fn mark(marks: &[(u64, u64)], offset: u64) -> Option<u64> {
    let before = marks.partition_point(|(rows, _)| *rows <= offset);
    before.checked_sub(1).map(|last| marks[last].1)
}

/// A file is written once; what cannot be read now cannot be read later.
fn damaged(name: &str, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::user(format!("`{name}` cannot be read as Parquet")).because(error)
}

/// Finds a declared field in the file and checks that its type can be read.
fn column(name: &str, spec: &FieldSpec, found: &ArrowFields, file: &str) -> Result<Column> {
    let wanted = name_in_file(name, spec.path.as_ref());
    // A name with a dot may be one column's own, or the way into a struct.
    let own = vec![wanted.to_string()];
    let path = if find(found, &own).is_some() { own } else { spec.path.clone().unwrap_or(own) };
    let field = find(found, &path).ok_or_else(|| {
        let hint = did_you_mean(&wanted, found.iter().map(|field| field.name()));
        let hint = hint.map_or(String::new(), |hint| format!(" ({hint})"));
        Error::user(format!("`{file}` has no column `{wanted}`{hint}"))
    })?;
    let how = how(spec.field_type, field.data_type()).ok_or_else(|| {
        let (expected, is) = (spec.field_type, field.data_type());
        Error::user(format!("`{file}`: field `{name}`: expected {expected}, the column is {is}"))
    })?;
    Ok(Column { name: name.to_owned(), field_type: spec.field_type, path, how })
}

fn find<'a>(fields: &'a ArrowFields, path: &[String]) -> Option<&'a Field> {
    let (first, rest) = path.split_first()?;
    let (_, field) = fields.find(first)?;
    match (rest, field.data_type()) {
        ([], _) => Some(field),
        (_, DataType::Struct(below)) => find(below, rest),
        _ => None,
    }
}

/// How a column of type `source` is read as `field_type`, if it can be.
fn how(field_type: FieldType, source: &DataType) -> Option<How> {
    use DataType::{
        Binary, BinaryView, Boolean, Date32, Date64, Dictionary, FixedSizeBinary, LargeBinary, LargeUtf8, Null,
        Timestamp, Utf8, Utf8View,
    };
    let value = if let Dictionary(_, value) = source { value } else { source };
    let is_text = matches!(value, Utf8 | LargeUtf8 | Utf8View);
    let is_number = value.is_integer() || value.is_floating() || value.is_decimal();
    let fits = match field_type {
        _ if *value == Null => true,
        FieldType::Int => value.is_integer(),
        FieldType::Float => is_number,
        FieldType::Bool => *value == Boolean,
        FieldType::String | FieldType::Json => is_text,
        FieldType::Bytes => is_text || matches!(value, Binary | LargeBinary | BinaryView | FixedSizeBinary(_)),
        FieldType::Date => is_text || matches!(value, Date32 | Date64),
        FieldType::Decimal(..) => is_text || is_number,
        FieldType::Timestamp(_) if is_text => return Some(How::Text),
        FieldType::Timestamp(Some(unit)) if value.is_integer() || value.is_floating() => {
            return Some(How::Number(unit));
        }
        FieldType::Timestamp(_) => matches!(value, Timestamp(..) | Date32 | Date64),
    };
    (fits && can_cast_types(source, &field_type.data_type())).then_some(How::Cast)
}

/// Values that do not fit become null, and are found by that.
const CAST: CastOptions<'static> =
    CastOptions { safe: true, format_options: arrow::util::display::FormatOptions::new() };

impl Column {
    /// The column in a batch of the file, null where a struct around it is.
    fn find(&self, batch: &RecordBatch) -> Result<ArrayRef> {
        let lost = || Error::internal(format!("column `{}` is not in its batch", self.name));
        let (first, rest) = self.path.split_first().ok_or_else(lost)?;
        let mut array = Arc::clone(batch.column_by_name(first).ok_or_else(lost)?);
        for name in rest {
            let inner = array.as_struct_opt().and_then(|outer| outer.column_by_name(name)).ok_or_else(lost)?;
            array = nullif(inner, &is_null(&array)?)?;
        }
        Ok(array)
    }

    fn convert(&self, source: &ArrayRef) -> Result<ArrayRef> {
        let cast = |data_type: &DataType| cast_with_options(source, data_type, &CAST);
        let times: TimestampMicrosecondArray = match self.how {
            How::Cast => return Ok(cast(&self.field_type.data_type())?),
            How::Text => cast(&DataType::Utf8)?.as_string::<i32>().iter().map(|text| text.and_then(parse_us)).collect(),
            How::Number(unit) if source.data_type().is_floating() => {
                let numbers: Float64Array = cast(&DataType::Float64)?.as_primitive::<Float64Type>().clone();
                numbers.unary_opt(|number| unit.float_to_us(number))
            }
            How::Number(unit) => {
                let numbers: Int64Array = cast(&DataType::Int64)?.as_primitive::<Int64Type>().clone();
                numbers.unary_opt(|number| unit.to_us(number))
            }
        };
        Ok(Arc::new(times.with_timezone("UTC")))
    }

    /// Notes the rows where a value was lost on the way.
    fn note_wrong(&self, source: &ArrayRef, target: &ArrayRef, wrong: &mut [Option<String>]) -> Result<()> {
        let nulls = source.logical_nulls();
        for (row, message) in wrong.iter_mut().enumerate() {
            let was_null = nulls.as_ref().is_some_and(|nulls| nulls.is_null(row));
            if target.is_null(row) && !was_null && message.is_none() {
                let value = array_value_to_string(source, row)?;
                *message = Some(format!("field `{}`: expected {}, found {value}", self.name, self.field_type));
            }
        }
        Ok(())
    }
}
