//! Rows as JSON text, for live frames, the HTTP surface and the console: one object per row.
//!
//! NaN and infinities are null, decimals strings, timestamps RFC 3339 with Z, int a number, bytes
//! base64, a `json` column its own JSON value. Columns keep their order.

use std::fmt::Write;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, GenericListArray, OffsetSizeTrait, RecordBatch, StringArray, StructArray,
};
use arrow::compute::cast;
use arrow::datatypes::{
    DataType, Decimal128Type, Field, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
    TimeUnit, TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType,
    UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use bytes::Bytes;

use crate::schema::is_json;
use crate::time::format_us;

/// What a value without JSON of its own is written as.
const NULL: &str = "null";

/// The rows of one batch as JSON objects, one after the other in one buffer.
#[derive(Clone, Debug, Default)]
pub struct JsonRows {
    text: Bytes,
    ends: Vec<usize>,
}

impl JsonRows {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Row `index` as a JSON object.
    pub fn row(&self, index: usize) -> &str {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        // The buffer was filled with whole strings only.
        std::str::from_utf8(&self.text[start..self.ends[index]]).unwrap_or(NULL)
    }

    /// All rows in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).map(|i| self.row(i))
    }
}

/// Encodes every row of `rows` as a JSON object.
pub fn encode_rows(rows: &RecordBatch) -> JsonRows {
    let schema = rows.schema_ref();
    let columns: Vec<(String, Column<'_>)> = schema
        .fields()
        .iter()
        .zip(rows.columns())
        .map(|(field, array)| (format!("{}:", json_string(field.name())), Column::new(field, array)))
        .collect();
    let mut out = JsonRowsBuilder::new(rows.num_rows(), columns.len());
    for row in 0..rows.num_rows() {
        let text = &mut out.text;
        text.push('{');
        for (index, (name, column)) in columns.iter().enumerate() {
            if index > 0 {
                text.push(',');
            }
            text.push_str(name);
            column.write(row, text);
        }
        text.push('}');
        out.end_row();
    }
    out.finish()
}

/// Text that grows row by row.
struct JsonRowsBuilder {
    text: String,
    ends: Vec<usize>,
}

impl JsonRowsBuilder {
    fn new(rows: usize, columns: usize) -> Self {
        Self { text: String::with_capacity(rows * columns * 16), ends: Vec::with_capacity(rows) }
    }

    fn end_row(&mut self) {
        self.ends.push(self.text.len());
    }

    fn finish(self) -> JsonRows {
        JsonRows { text: Bytes::from(self.text), ends: self.ends }
    }
}

/// The values of one column as text: text as it is; structs, lists and `json` as JSON; all else as in JSON, without quotes.
#[derive(Debug)]
pub struct ColumnText(Texts);

#[derive(Debug)]
enum Texts {
    Plain(StringArray),
    Json(JsonRows),
    Unquoted(JsonRows),
}

impl ColumnText {
    /// Writes the values of a column.
    pub fn new(field: &Field, values: &ArrayRef) -> Self {
        let is_json = is_json(field);
        let plain = (is_text(values.data_type()) && !is_json).then(|| cast(values, &DataType::Utf8).ok()).flatten();
        if let Some(plain) = plain {
            return Self(Texts::Plain(plain.as_string().clone()));
        }
        let column = Column::new(field, values);
        let mut out = JsonRowsBuilder::new(values.len(), 1);
        for row in 0..values.len() {
            column.write(row, &mut out.text);
            out.end_row();
        }
        let rows = out.finish();
        Self(if is_json || values.data_type().is_nested() { Texts::Json(rows) } else { Texts::Unquoted(rows) })
    }

    /// The value of one row; `None` if it is null, or has no other JSON than `null`, as NaN.
    pub fn get(&self, row: usize) -> Option<&str> {
        match &self.0 {
            Texts::Plain(values) => values.is_valid(row).then(|| values.value(row)),
            Texts::Json(rows) => Some(rows.row(row)).filter(|text| *text != NULL),
            Texts::Unquoted(rows) => {
                let text = Some(rows.row(row)).filter(|text| *text != NULL)?;
                Some(text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text))
            }
        }
    }
}

fn is_text(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(_, value) => is_text(value),
        other => other.is_string(),
    }
}

/// `text` as a JSON string with its quotes.
pub fn json_string(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    write_string(text, &mut out);
    out
}

fn write_string(text: &str, out: &mut String) {
    out.push('"');
    let mut clean = 0;
    for (at, byte) in text.bytes().enumerate() {
        let escape = match byte {
            b'"' => "\\\"",
            b'\\' => "\\\\",
            b'\n' => "\\n",
            b'\r' => "\\r",
            b'\t' => "\\t",
            0..0x20 => "",
            _ => continue,
        };
        out.push_str(&text[clean..at]);
        if escape.is_empty() {
            let _ = write!(out, "\\u{byte:04x}");
        } else {
            out.push_str(escape);
        }
        clean = at + 1;
    }
    out.push_str(&text[clean..]);
    out.push('"');
}

fn write_float(value: f64, out: &mut String) {
    if value.is_finite() {
        // `{:?}` is the shortest text that reads back as the same float, always with a point or exponent.
        let _ = write!(out, "{value:?}");
    } else {
        out.push_str(NULL);
    }
}

/// Base64 as RFC 4648 section 4, with padding.
fn write_base64(bytes: &[u8], out: &mut String) {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    out.push('"');
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, &b| (w << 8) | u32::from(b)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            if digit <= chunk.len() {
                out.push(char::from(ALPHABET[(word >> (18 - 6 * digit)) as usize & 63]));
            } else {
                out.push('=');
            }
        }
    }
    out.push('"');
}

/// A column with its type resolved once, so that writing a cell is one `match`.
enum Column<'a> {
    Bool(&'a BooleanArray),
    Int(Box<dyn Fn(usize) -> i128 + 'a>, &'a ArrayRef),
    Float(Box<dyn Fn(usize) -> f64 + 'a>, &'a ArrayRef),
    Text(Box<dyn Fn(usize) -> &'a str + 'a>, &'a ArrayRef),
    Json(Box<dyn Fn(usize) -> &'a str + 'a>, &'a ArrayRef),
    Bytes(Box<dyn Fn(usize) -> &'a [u8] + 'a>, &'a ArrayRef),
    Timestamp(Box<dyn Fn(usize) -> i64 + 'a>, &'a ArrayRef),
    Struct(&'a StructArray, Vec<(String, Column<'a>)>),
    List(Box<dyn Fn(usize) -> (usize, usize) + 'a>, &'a ArrayRef, Box<Column<'a>>),
    /// Any other type: Arrow's own text, quoted (dates and decimals among them).
    Display(Option<ArrayFormatter<'a>>, &'a ArrayRef),
}

impl<'a> Column<'a> {
    fn new(field: &Field, array: &'a ArrayRef) -> Self {
        macro_rules! int {
            ($t:ty) => {{
                let values = array.as_primitive::<$t>();
                Self::Int(Box::new(move |row| i128::from(values.value(row))), array)
            }};
        }
        macro_rules! timestamp {
            ($t:ty, $to_us:expr) => {{
                let values = array.as_primitive::<$t>();
                let to_us: fn(i64) -> i64 = $to_us;
                Self::Timestamp(Box::new(move |row| to_us(values.value(row))), array)
            }};
        }
        macro_rules! text {
            ($values:expr) => {{
                let values = $values;
                let read = Box::new(move |row| values.value(row));
                if is_json(field) { Self::Json(read, array) } else { Self::Text(read, array) }
            }};
        }
        match field.data_type() {
            DataType::Boolean => Self::Bool(array.as_boolean()),
            DataType::Int8 => int!(Int8Type),
            DataType::Int16 => int!(Int16Type),
            DataType::Int32 => int!(Int32Type),
            DataType::Int64 => int!(Int64Type),
            DataType::UInt8 => int!(UInt8Type),
            DataType::UInt16 => int!(UInt16Type),
            DataType::UInt32 => int!(UInt32Type),
            DataType::UInt64 => int!(UInt64Type),
            DataType::Float16 => {
                let values = array.as_primitive::<Float16Type>();
                Self::Float(Box::new(move |row| values.value(row).to_f64()), array)
            }
            DataType::Float32 => {
                let values = array.as_primitive::<Float32Type>();
                Self::Float(Box::new(move |row| f64::from(values.value(row))), array)
            }
            DataType::Float64 => {
                let values = array.as_primitive::<Float64Type>();
                Self::Float(Box::new(move |row| values.value(row)), array)
            }
            DataType::Utf8 => text!(array.as_string::<i32>()),
            DataType::LargeUtf8 => text!(array.as_string::<i64>()),
            DataType::Utf8View => text!(array.as_string_view()),
            DataType::Binary => {
                let values = array.as_binary::<i32>();
                Self::Bytes(Box::new(move |row| values.value(row)), array)
            }
            DataType::BinaryView => {
                let values = array.as_binary_view();
                Self::Bytes(Box::new(move |row| values.value(row)), array)
            }
            DataType::Timestamp(TimeUnit::Second, _) => {
                timestamp!(TimestampSecondType, |v| v.saturating_mul(1_000_000))
            }
            DataType::Timestamp(TimeUnit::Millisecond, _) => {
                timestamp!(TimestampMillisecondType, |v| v.saturating_mul(1_000))
            }
            DataType::Timestamp(TimeUnit::Microsecond, _) => timestamp!(TimestampMicrosecondType, |v| v),
            DataType::Timestamp(TimeUnit::Nanosecond, _) => {
                timestamp!(TimestampNanosecondType, |v| v.div_euclid(1_000))
            }
            DataType::Struct(fields) => {
                let values = array.as_struct();
                let children = fields
                    .iter()
                    .zip(values.columns())
                    .map(|(field, child)| (format!("{}:", json_string(field.name())), Column::new(field, child)))
                    .collect();
                Self::Struct(values, children)
            }
            DataType::List(item) => Self::list(array.as_list::<i32>(), array, item),
            DataType::LargeList(item) => Self::list(array.as_list::<i64>(), array, item),
            DataType::Decimal128(_, _) => {
                let values = array.as_primitive::<Decimal128Type>();
                Self::Display(ArrayFormatter::try_new(values, &FORMAT).ok(), array)
            }
            _ => Self::Display(ArrayFormatter::try_new(array, &FORMAT).ok(), array),
        }
    }

    fn list<O: OffsetSizeTrait>(values: &'a GenericListArray<O>, array: &'a ArrayRef, item: &Field) -> Self {
        let range = move |row: usize| {
            let offsets = values.value_offsets();
            (offsets[row].as_usize(), offsets[row + 1].as_usize())
        };
        Self::List(Box::new(range), array, Box::new(Column::new(item, values.values())))
    }

    fn is_null(&self, row: usize) -> bool {
        match self {
            Self::Bool(array) => array.is_null(row),
            Self::Struct(array, _) => array.is_null(row),
            Self::Int(_, array)
            | Self::Float(_, array)
            | Self::Text(_, array)
            | Self::Json(_, array)
            | Self::Bytes(_, array)
            | Self::Timestamp(_, array)
            | Self::List(_, array, _)
            | Self::Display(_, array) => array.is_null(row),
        }
    }

    fn write(&self, row: usize, out: &mut String) {
        if self.is_null(row) {
            out.push_str(NULL);
            return;
        }
        match self {
            Self::Bool(array) => out.push_str(if array.value(row) { "true" } else { "false" }),
            Self::Int(value, _) => {
                let _ = write!(out, "{}", value(row));
            }
            Self::Float(value, _) => write_float(value(row), out),
            Self::Text(value, _) => write_string(value(row), out),
            Self::Json(value, _) => write_json(value(row), out),
            Self::Bytes(value, _) => write_base64(value(row), out),
            Self::Timestamp(value, _) => {
                out.push('"');
                out.push_str(&format_us(value(row)));
                out.push('"');
            }
            Self::Struct(_, children) => {
                out.push('{');
                for (index, (name, child)) in children.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    out.push_str(name);
                    child.write(row, out);
                }
                out.push('}');
            }
            Self::List(range, _, item) => {
                let (start, end) = range(row);
                out.push('[');
                for index in start..end {
                    if index > start {
                        out.push(',');
                    }
                    item.write(index, out);
                }
                out.push(']');
            }
            Self::Display(Some(formatter), _) => write_string(&formatter.value(row).to_string(), out),
            Self::Display(None, _) => out.push_str(NULL),
        }
    }
}

const FORMAT: FormatOptions<'static> = FormatOptions::new();

/// A `json` cell as a value. Text that is no JSON (a database may hold such) becomes a string.
fn write_json(text: &str, out: &mut String) {
    match serde_json::from_str::<&serde_json::value::RawValue>(text) {
        // A raw newline would break an SSE frame; JSON's own white space may be dropped anywhere but in strings,
        // where a raw newline is not allowed.
        Ok(raw) if raw.get().contains(['\n', '\r']) => out.push_str(&raw.get().replace(['\n', '\r'], " ")),
        Ok(raw) => out.push_str(raw.get()),
        Err(_) => write_string(text, out),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{BinaryArray, Decimal128Array, Float64Array, Int64Array, TimestampMicrosecondArray};
    use arrow::datatypes::Schema;

    use super::*;
    use crate::schema::FieldType;

    fn one(field: FieldType, array: ArrayRef) -> Vec<String> {
        let schema = Arc::new(Schema::new(vec![field.field("v")]));
        let rows = RecordBatch::try_new(schema, vec![array]).expect("batch");
        encode_rows(&rows).iter().map(str::to_owned).collect()
    }

    #[test]
    fn every_type_has_its_documented_json() {
        let floats = Float64Array::from(vec![Some(1.0), Some(0.1), Some(f64::NAN), Some(f64::INFINITY), None]);
        assert_eq!(
            one(FieldType::Float, Arc::new(floats)),
            [r#"{"v":1.0}"#, r#"{"v":0.1}"#, r#"{"v":null}"#, r#"{"v":null}"#, r#"{"v":null}"#]
        );
        let ints = Int64Array::from(vec![i64::MIN, i64::MAX]);
        assert_eq!(
            one(FieldType::Int, Arc::new(ints)),
            [r#"{"v":-9223372036854775808}"#, r#"{"v":9223372036854775807}"#]
        );
        let text = StringArray::from(vec!["a\"b\\\n\u{1}é"]);
        assert_eq!(one(FieldType::String, Arc::new(text)), [r#"{"v":"a\"b\\\n\u0001é"}"#]);
        let json = StringArray::from(vec!["{\"a\":\n[1]}", "no json"]);
        assert_eq!(one(FieldType::Json, Arc::new(json)), [r#"{"v":{"a": [1]}}"#, r#"{"v":"no json"}"#]);
        let times = TimestampMicrosecondArray::from(vec![0, 1]).with_timezone("UTC");
        assert_eq!(
            one(FieldType::Timestamp(None), Arc::new(times)),
            [r#"{"v":"1970-01-01T00:00:00.000Z"}"#, r#"{"v":"1970-01-01T00:00:00.000001Z"}"#]
        );
        let decimals = Decimal128Array::from(vec![12345]).with_precision_and_scale(10, 2).expect("decimal");
        assert_eq!(one(FieldType::Decimal(10, 2), Arc::new(decimals)), [r#"{"v":"123.45"}"#]);
        let bytes = BinaryArray::from_vec(vec![b"a", b"ab", b"abc"]);
        assert_eq!(one(FieldType::Bytes, Arc::new(bytes)), [r#"{"v":"YQ=="}"#, r#"{"v":"YWI="}"#, r#"{"v":"YWJj"}"#]);
    }

    #[test]
    fn the_text_of_a_column_is_its_json_without_quotes() {
        let texts = |field: FieldType, array: ArrayRef| -> Vec<Option<String>> {
            let text = ColumnText::new(&field.field("v"), &array);
            (0..array.len()).map(|row| text.get(row).map(str::to_owned)).collect()
        };
        let some =
            |texts: &[&str]| -> Vec<Option<String>> { texts.iter().map(|text| Some((*text).to_owned())).collect() };
        let strings = StringArray::from(vec![Some("a\"b\n"), Some("null"), Some(""), None]);
        let mut expected = some(&["a\"b\n", "null", ""]);
        expected.push(None);
        assert_eq!(texts(FieldType::String, Arc::new(strings.clone())), expected);
        let views = cast(&strings, &DataType::Utf8View).expect("views");
        assert_eq!(texts(FieldType::String, views), expected);
        let floats = Float64Array::from(vec![Some(1.0), Some(f64::NAN), None]);
        assert_eq!(texts(FieldType::Float, Arc::new(floats)), [Some("1.0".to_owned()), None, None]);
        let times = TimestampMicrosecondArray::from(vec![1]).with_timezone("UTC");
        assert_eq!(texts(FieldType::Timestamp(None), Arc::new(times)), some(&["1970-01-01T00:00:00.000001Z"]));
        let decimals = Decimal128Array::from(vec![12345]).with_precision_and_scale(10, 2).expect("decimal");
        assert_eq!(texts(FieldType::Decimal(10, 2), Arc::new(decimals)), some(&["123.45"]));
        let json = StringArray::from(vec!["{\"a\": \"b\"}", "\"c\""]);
        assert_eq!(texts(FieldType::Json, Arc::new(json)), some(&["{\"a\": \"b\"}", "\"c\""]));
    }

    #[test]
    fn every_float_is_read_back_as_it_was() {
        // Any bits: a step of the golden ratio meets all parts of the range.
        let bits = (0..100_000_u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let floats: Vec<f64> = bits.map(f64::from_bits).filter(|value| value.is_finite()).collect();
        let array: ArrayRef = Arc::new(Float64Array::from(floats.clone()));
        let text = ColumnText::new(&FieldType::Float.field("v"), &array);
        for (row, value) in floats.into_iter().enumerate() {
            let text = text.get(row).expect("a number");
            assert_eq!(text.parse::<f64>().map(f64::to_bits), Ok(value.to_bits()), "{text}");
            // What others send is parsed by this.
            let parsed: serde_json::Value = serde_json::from_str(text).expect("JSON");
            assert_eq!(parsed.as_f64().map(f64::to_bits), Some(value.to_bits()), "{text}");
        }
    }
}
