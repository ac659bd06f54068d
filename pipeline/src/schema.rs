//! The types of `fields:`, one Arrow type each, in the engine and in history alike.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use arrow::datatypes::{
    DECIMAL128_MAX_PRECISION, DECIMAL128_MAX_SCALE, DataType, Field, Fields, Schema, SchemaRef, TimeUnit,
};

/// Key of the Arrow field metadata that marks a text column as JSON (Arrow's canonical extension types).
const EXTENSION_NAME: &str = "ARROW:extension:name";
/// The canonical extension name of JSON text.
const EXTENSION_JSON: &str = "arrow.json";

/// Unit of a timestamp that arrives as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberUnit {
    /// Seconds, fractions allowed.
    Seconds,
    /// Milliseconds.
    Milliseconds,
    /// Microseconds.
    Microseconds,
    /// Nanoseconds; digits finer than a microsecond are cut.
    Nanoseconds,
}

impl NumberUnit {
    /// A number of this unit as microseconds since 1970 UTC. `None` if it does not fit.
    pub fn to_us(self, value: i64) -> Option<i64> {
        match self {
            Self::Seconds => value.checked_mul(1_000_000),
            Self::Milliseconds => value.checked_mul(1_000),
            Self::Microseconds => Some(value),
            Self::Nanoseconds => Some(value.div_euclid(1_000)),
        }
    }

    /// As [`Self::to_us`] for a number with a fraction. A float next to a whole microsecond stands for it: of
    /// seconds since 1970 it holds hardly more digits, and every second one lies just below.
    pub fn float_to_us(self, value: f64) -> Option<i64> {
        let us = match self {
            Self::Seconds => value * 1e6,
            Self::Milliseconds => value * 1e3,
            Self::Microseconds => value,
            Self::Nanoseconds => value / 1e3,
        };
        // Half a place by which the float misses the number, and half a place of the product.
        let is_whole = (us - us.round()).abs() <= us.abs() * f64::EPSILON;
        let us = if is_whole { us.round() } else { us.floor() };
        // 2^63 as f64 is exact; anything at or beyond it does not fit.
        (us.is_finite() && us.abs() < 9_223_372_036_854_775_808.0).then_some(us as i64)
    }
}

/// A type as written in `fields:`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    /// UTF-8 text.
    String,
    /// 64-bit signed integer.
    Int,
    /// 64-bit float.
    Float,
    /// true or false.
    Bool,
    /// Microseconds since 1970 UTC. With a unit, numbers of that unit are read too.
    Timestamp(Option<NumberUnit>),
    /// A day.
    Date,
    /// Exact decimal of `precision` digits, `scale` of them after the point.
    Decimal(u8, i8),
    /// Raw bytes.
    Bytes,
    /// JSON text, kept as it came.
    Json,
}

/// Every word that a type may be, for hints.
pub const TYPE_WORDS: [&str; 13] = [
    "string",
    "int",
    "float",
    "bool",
    "timestamp",
    "timestamp_s",
    "timestamp_ms",
    "timestamp_us",
    "timestamp_ns",
    "date",
    "decimal(18,2)",
    "bytes",
    "json",
];

impl FieldType {
    /// The Arrow type of a column of this type.
    pub fn data_type(self) -> DataType {
        match self {
            Self::String | Self::Json => DataType::Utf8,
            Self::Int => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::Bool => DataType::Boolean,
            Self::Timestamp(_) => timestamp_type(),
            Self::Date => DataType::Date32,
            Self::Decimal(precision, scale) => DataType::Decimal128(precision, scale),
            Self::Bytes => DataType::Binary,
        }
    }

    /// A nullable Arrow field of this type.
    pub fn field(self, name: &str) -> Field {
        let field = Field::new(name, self.data_type(), true);
        match self {
            Self::Json => field.with_metadata(HashMap::from([(EXTENSION_NAME.to_owned(), EXTENSION_JSON.to_owned())])),
            _ => field,
        }
    }

    /// The type whose column has this Arrow field, if there is one: the inverse of [`Self::field`].
    pub fn of_field(field: &Field) -> Option<Self> {
        Some(match field.data_type() {
            DataType::Utf8 if is_json(field) => Self::Json,
            DataType::Utf8 => Self::String,
            DataType::Int64 => Self::Int,
            DataType::Float64 => Self::Float,
            DataType::Boolean => Self::Bool,
            DataType::Timestamp(TimeUnit::Microsecond, _) => Self::Timestamp(None),
            DataType::Date32 => Self::Date,
            DataType::Decimal128(precision, scale) => Self::Decimal(*precision, *scale),
            DataType::Binary => Self::Bytes,
            _ => return None,
        })
    }
}

/// `Timestamp(Microsecond, "UTC")`.
pub fn timestamp_type() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

/// The engine's own type nearest to `data_type`, as [`FieldType::data_type`] gives them, so that history and JSON
/// look the same whatever made the column. Structs and lists keep their shape; what they hold is changed alike.
/// `None` for types with no counterpart: durations, intervals, maps, unions.
pub fn engine_type(data_type: &DataType) -> Option<DataType> {
    let within = |field: &Arc<Field>| -> Option<Arc<Field>> {
        let inner = engine_type(field.data_type())?;
        Some(Arc::new(field.as_ref().clone().with_data_type(inner).with_nullable(true)))
    };
    Some(match data_type {
        DataType::Boolean => DataType::Boolean,
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => DataType::Int64,
        DataType::UInt8 | DataType::UInt16 | DataType::UInt32 | DataType::UInt64 => DataType::Int64,
        DataType::Float16 | DataType::Float32 | DataType::Float64 => DataType::Float64,
        // A lone `NULL` has no type of its own; text shows it best.
        DataType::Null | DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::Time32(_) | DataType::Time64(_) => DataType::Utf8,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
            DataType::Binary
        }
        DataType::Timestamp(_, _) => timestamp_type(),
        DataType::Date32 | DataType::Date64 => DataType::Date32,
        DataType::Decimal32(precision, scale)
        | DataType::Decimal64(precision, scale)
        | DataType::Decimal128(precision, scale)
        | DataType::Decimal256(precision, scale) => {
            DataType::Decimal128((*precision).min(DECIMAL128_MAX_PRECISION), (*scale).min(DECIMAL128_MAX_SCALE))
        }
        DataType::Dictionary(_, values) => engine_type(values)?,
        DataType::RunEndEncoded(_, values) => engine_type(values.data_type())?,
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(within).collect::<Option<Fields>>()?),
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _) => DataType::List(within(item)?),
        DataType::Duration(_) | DataType::Interval(_) | DataType::Map(_, _) | DataType::Union(_, _) => return None,
    })
}

/// Whether a text column holds JSON.
pub fn is_json(field: &Field) -> bool {
    field.metadata().get(EXTENSION_NAME).is_some_and(|name| name == EXTENSION_JSON)
}

/// The word of an Arrow type in messages: the `fields:` word if there is one, `{a: int, b: float}` for a struct,
/// `[int]` for a list.
pub fn type_word(field: &Field) -> Cow<'static, str> {
    if let Some(field_type) = FieldType::of_field(field) {
        return field_type.to_string().into();
    }
    match field.data_type() {
        DataType::Struct(fields) => {
            let parts: Vec<String> = fields.iter().map(|f| format!("{}: {}", f.name(), type_word(f))).collect();
            format!("{{{}}}", parts.join(", ")).into()
        }
        DataType::List(item) => format!("[{}]", type_word(item)).into(),
        other => other.to_string().into(),
    }
}

/// A schema of nullable columns.
pub fn schema_of<'a>(columns: impl IntoIterator<Item = (&'a str, FieldType)>) -> SchemaRef {
    Arc::new(Schema::new(columns.into_iter().map(|(name, t)| t.field(name)).collect::<Vec<_>>()))
}

impl FromStr for FieldType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "string" => Self::String,
            "int" => Self::Int,
            "float" => Self::Float,
            "bool" => Self::Bool,
            "timestamp" => Self::Timestamp(None),
            "timestamp_s" => Self::Timestamp(Some(NumberUnit::Seconds)),
            "timestamp_ms" => Self::Timestamp(Some(NumberUnit::Milliseconds)),
            "timestamp_us" => Self::Timestamp(Some(NumberUnit::Microseconds)),
            "timestamp_ns" => Self::Timestamp(Some(NumberUnit::Nanoseconds)),
            "date" => Self::Date,
            "bytes" => Self::Bytes,
            "json" => Self::Json,
            _ => return decimal(text),
        })
    }
}

/// Reads `decimal(p,s)`.
fn decimal(text: &str) -> Result<FieldType, String> {
    let unknown = || format!("unknown type `{text}`");
    let digits = text.strip_prefix("decimal(").and_then(|t| t.strip_suffix(')')).ok_or_else(unknown)?;
    let (precision, scale) = digits.split_once(',').ok_or_else(unknown)?;
    let precision: u8 = precision.trim().parse().map_err(|_| unknown())?;
    let scale: i8 = scale.trim().parse().map_err(|_| unknown())?;
    if !(1..=38).contains(&precision) || scale < 0 || scale as u8 > precision {
        return Err(format!("`{text}`: precision is 1 to 38, scale 0 to the precision"));
    }
    Ok(FieldType::Decimal(precision, scale))
}

impl fmt::Display for FieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Self::String => "string",
            Self::Int => "int",
            Self::Float => "float",
            Self::Bool => "bool",
            Self::Timestamp(None) => "timestamp",
            Self::Timestamp(Some(NumberUnit::Seconds)) => "timestamp_s",
            Self::Timestamp(Some(NumberUnit::Milliseconds)) => "timestamp_ms",
            Self::Timestamp(Some(NumberUnit::Microseconds)) => "timestamp_us",
            Self::Timestamp(Some(NumberUnit::Nanoseconds)) => "timestamp_ns",
            Self::Date => "date",
            Self::Bytes => "bytes",
            Self::Json => "json",
            Self::Decimal(precision, scale) => return write!(f, "decimal({precision},{scale})"),
        };
        f.write_str(word)
    }
}
