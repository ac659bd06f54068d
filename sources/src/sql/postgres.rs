//! PostgreSQL: connection, values in its binary format, binding.

use std::borrow::Cow;
use std::str::FromStr;
use std::time::Duration;

use futures::TryStreamExt;
use pipeline::config::SecretUrl;
use pipeline::error::{Error, Result};
use pipeline::rows::Cell;
use pipeline::schema::FieldType;
use sqlx::postgres::{
    PgArguments, PgColumn, PgConnectOptions, PgConnection, PgRow, PgTypeInfo, PgTypeKind, PgValueFormat, Postgres,
};
use sqlx::query::Query;
use sqlx::types::{BigDecimal, Uuid};
use sqlx::{Column as _, ConnectOptions, Executor, Row, SqlSafeStr, Statement, TypeInfo, ValueRef};

use super::cells;
use super::collect::{Collector, SqlRow};
use super::connection::{Column, failed, trusted};
use super::key::Key;

/// Microseconds from 1970-01-01 to 2000-01-01, where PostgreSQL starts to count.
const EPOCH_US: i64 = 946_684_800_000_000;
/// Days from 1970-01-01 to 2000-01-01.
const EPOCH_DAYS: i32 = 10_957;

/// The types of the catalogue, whose numbers never change.
mod oid {
    pub(super) const BOOL: u32 = 16;
    pub(super) const BYTEA: u32 = 17;
    pub(super) const CHAR: u32 = 18;
    pub(super) const NAME: u32 = 19;
    pub(super) const INT8: u32 = 20;
    pub(super) const INT2: u32 = 21;
    pub(super) const INT4: u32 = 23;
    pub(super) const TEXT: u32 = 25;
    pub(super) const OID: u32 = 26;
    pub(super) const JSON: u32 = 114;
    pub(super) const XML: u32 = 142;
    pub(super) const FLOAT4: u32 = 700;
    pub(super) const FLOAT8: u32 = 701;
    pub(super) const UNKNOWN: u32 = 705;
    pub(super) const BPCHAR: u32 = 1042;
    pub(super) const VARCHAR: u32 = 1043;
    pub(super) const DATE: u32 = 1082;
    pub(super) const TIME: u32 = 1083;
    pub(super) const TIMESTAMP: u32 = 1114;
    pub(super) const TIMESTAMPTZ: u32 = 1184;
    pub(super) const INTERVAL: u32 = 1186;
    pub(super) const TIMETZ: u32 = 1266;
    pub(super) const NUMERIC: u32 = 1700;
    pub(super) const UUID: u32 = 2950;
    pub(super) const JSONB: u32 = 3802;
    pub(super) const XID8: u32 = 5069;
}

/// Connects for reading. Sessions run in UTC.
pub(super) async fn connect(url: &SecretUrl, timeout: Duration) -> Result<PgConnection> {
    let options = PgConnectOptions::from_str(url.expose())
        .map_err(failed)?
        .application_name("tailwater")
        .disable_statement_logging();
    let mut connection = options.connect().await.map_err(|e| failed(e).context(format!("connecting to {url}")))?;
    let session = format!(
        "SET SESSION statement_timeout = {}; SET SESSION default_transaction_read_only = on; SET TIME ZONE 'UTC'",
        timeout.as_millis()
    );
    connection.execute(sqlx::raw_sql(trusted(&session))).await.map_err(failed)?;
    Ok(connection)
}

/// Runs a query; see [`super::connection::Connection::fetch`].
pub(super) async fn fetch(connection: &mut PgConnection, sql: &str, keys: &[Key], rows: &mut Collector) -> Result<()> {
    let mut query = sqlx::query(trusted(sql));
    for key in keys {
        query = bind(query, key)?;
    }
    let mut stream = query.fetch(connection);
    while let Some(row) = stream.try_next().await.map_err(failed)? {
        if !rows.take(&row)? {
            break;
        }
    }
    Ok(())
}

fn bind<'q>(query: Query<'q, Postgres, PgArguments>, key: &Key) -> Result<Query<'q, Postgres, PgArguments>> {
    Ok(match key {
        Key::Int(value) => query.bind(*value),
        Key::Text(text) => query.bind(text.clone()),
        Key::Time(us) => query.bind(Key::naive(*us)?),
        Key::TimeUtc(us) => query.bind(Key::utc(*us)?),
        Key::Day(day) => query.bind(Key::date(*day)?),
        Key::Uuid(bytes) => query.bind(Uuid::from_bytes(*bytes)),
        Key::Decimal(digits) => query
            .bind(BigDecimal::from_str(digits).map_err(|e| Error::internal(format!("cursor at {digits}")).because(e))?),
        Key::Unsigned(_) | Key::Float(_) | Key::Bytes(_) => return Err(key.foreign("PostgreSQL")),
    })
}

/// The columns of a query.
pub(super) async fn columns(connection: &mut PgConnection, sql: &str) -> Result<Vec<Column>> {
    let statement = connection.prepare(trusted(sql).into_sql_str()).await.map_err(failed)?;
    let column = |column: &PgColumn| Column {
        name: column.name().to_owned(),
        field_type: Some(declared(column.type_info())),
        is_xid8: number_of(column.type_info()) == oid::XID8,
        origin: None,
    };
    Ok(statement.columns().iter().map(column).collect())
}

fn number_of(type_info: &PgTypeInfo) -> u32 {
    type_info.oid().map_or(0, |oid| oid.0)
}

/// The type to declare a column of this PostgreSQL type with.
fn declared(type_info: &PgTypeInfo) -> FieldType {
    match type_info.kind() {
        PgTypeKind::Domain(base) => return declared(base),
        PgTypeKind::Array(_) => return FieldType::Json,
        _ => {}
    }
    match number_of(type_info) {
        oid::BOOL => FieldType::Bool,
        oid::INT2 | oid::INT4 | oid::INT8 | oid::OID | oid::XID8 => FieldType::Int,
        oid::FLOAT4 | oid::FLOAT8 | oid::NUMERIC | oid::INTERVAL => FieldType::Float,
        oid::TIMESTAMP | oid::TIMESTAMPTZ => FieldType::Timestamp(None),
        oid::DATE => FieldType::Date,
        oid::JSON | oid::JSONB => FieldType::Json,
        oid::BYTEA => FieldType::Bytes,
        _ => FieldType::String,
    }
}

impl SqlRow for PgRow {
    fn width(&self) -> usize {
        self.len()
    }

    fn name(&self, index: usize) -> &str {
        self.column(index).name()
    }

    fn cell(&self, index: usize, wanted: FieldType) -> Result<Cell<'_>, String> {
        match binary(self, index)? {
            Some((bytes, type_info)) => cell(bytes, &type_info, wanted),
            None => Ok(Cell::Null),
        }
    }

    fn key(&self, index: usize) -> Result<Key, String> {
        let (bytes, type_info) = binary(self, index)?.ok_or("null")?;
        Ok(match number_of(&type_info) {
            oid::INT2 | oid::INT4 | oid::INT8 | oid::OID | oid::XID8 => Key::Int(int(bytes, &type_info)?),
            oid::TEXT | oid::VARCHAR | oid::BPCHAR | oid::NAME => Key::Text(utf8(bytes)?.to_owned()),
            oid::TIMESTAMP => Key::Time(timestamp(bytes)?),
            oid::TIMESTAMPTZ => Key::TimeUtc(timestamp(bytes)?),
            oid::DATE => Key::Day(day(bytes)?),
            oid::UUID => Key::Uuid(fixed(bytes)?),
            oid::NUMERIC => Key::Decimal(numeric(bytes)?),
            _ => return Err(format!("{} cannot be a cursor; cast it in the query", type_info.name())),
        })
    }
}

/// A value's bytes with their type; `None` for null.
fn binary(row: &PgRow, index: usize) -> Result<Option<(&[u8], PgTypeInfo)>, String> {
    let value = row.try_get_raw(index).map_err(|e| e.to_string())?;
    if value.is_null() {
        return Ok(None);
    }
    if value.format() != PgValueFormat::Binary {
        return Err("the server answered in text format".into());
    }
    let type_info = value.type_info().into_owned();
    Ok(Some((value.as_bytes().map_err(|e| e.to_string())?, type_info)))
}

/// One value in PostgreSQL's binary format.
fn cell<'a>(bytes: &'a [u8], type_info: &PgTypeInfo, wanted: FieldType) -> Result<Cell<'a>, String> {
    match type_info.kind() {
        PgTypeKind::Domain(base) => return cell(bytes, base, wanted),
        PgTypeKind::Enum(_) => return Ok(cells::text(utf8(bytes)?, wanted)),
        PgTypeKind::Array(element) => return Ok(Cell::Json(array(bytes, element)?.into())),
        _ => {}
    }
    Ok(match number_of(type_info) {
        oid::BOOL => Cell::Bool(fixed::<1>(bytes)?[0] != 0),
        oid::INT2 | oid::INT4 | oid::INT8 | oid::OID | oid::XID8 => Cell::Int(int(bytes, type_info)?),
        oid::FLOAT4 => Cell::Float(f64::from(f32::from_be_bytes(fixed(bytes)?))),
        oid::FLOAT8 => Cell::Float(f64::from_be_bytes(fixed(bytes)?)),
        oid::NUMERIC => cells::decimal(numeric(bytes)?.into(), wanted),
        oid::TIMESTAMP | oid::TIMESTAMPTZ => cells::time(timestamp(bytes)?, wanted),
        oid::DATE => cells::day(day(bytes)?, wanted)?,
        oid::TIME => Cell::Text(cells::time_of_day(i64::from_be_bytes(fixed(bytes)?)).into()),
        oid::TIMETZ => Cell::Text(time_with_zone(bytes)?.into()),
        oid::INTERVAL => interval(bytes, wanted)?,
        oid::UUID => Cell::Text(Uuid::from_bytes(fixed(bytes)?).to_string().into()),
        oid::JSON => cells::json(utf8(bytes)?, wanted),
        // One byte of version stands before the text.
        oid::JSONB => cells::json(utf8(bytes.get(1..).unwrap_or_default())?, wanted),
        oid::BYTEA => Cell::Bytes(bytes),
        oid::TEXT | oid::VARCHAR | oid::BPCHAR | oid::NAME | oid::CHAR | oid::XML | oid::UNKNOWN => {
            cells::text(utf8(bytes)?, wanted)
        }
        _ if type_info.name().eq_ignore_ascii_case("citext") => cells::text(utf8(bytes)?, wanted),
        _ => return Err(format!("the type {} is not read; cast it in the query: `::text`", type_info.name())),
    })
}

fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], String> {
    bytes.try_into().map_err(|_| format!("{} bytes where the type has {N}", bytes.len()))
}

fn utf8(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8: {e}"))
}

fn int(bytes: &[u8], type_info: &PgTypeInfo) -> Result<i64, String> {
    Ok(match number_of(type_info) {
        oid::INT2 => i16::from_be_bytes(fixed(bytes)?).into(),
        oid::INT4 => i32::from_be_bytes(fixed(bytes)?).into(),
        oid::OID => u32::from_be_bytes(fixed(bytes)?).into(),
        _ => i64::from_be_bytes(fixed(bytes)?),
    })
}

/// Microseconds since 1970.
fn timestamp(bytes: &[u8]) -> Result<i64, String> {
    match i64::from_be_bytes(fixed(bytes)?) {
        i64::MAX => Err("infinity is no point in time".into()),
        i64::MIN => Err("-infinity is no point in time".into()),
        us => us.checked_add(EPOCH_US).ok_or_else(|| "out of range".into()),
    }
}

/// Days since 1970-01-01.
fn day(bytes: &[u8]) -> Result<i32, String> {
    match i32::from_be_bytes(fixed(bytes)?) {
        i32::MAX => Err("infinity is no date".into()),
        i32::MIN => Err("-infinity is no date".into()),
        day => day.checked_add(EPOCH_DAYS).ok_or_else(|| "out of range".into()),
    }
}

/// Microseconds of the day, then seconds west of UTC.
fn time_with_zone(bytes: &[u8]) -> Result<String, String> {
    let (us, west) = bytes.split_at_checked(8).ok_or("a short time")?;
    let (us, west) = (i64::from_be_bytes(fixed(us)?), i32::from_be_bytes(fixed(west)?));
    let (sign, minutes) = (if west <= 0 { '+' } else { '-' }, west.unsigned_abs() / 60);
    Ok(format!("{}{sign}{:02}:{:02}", cells::time_of_day(us), minutes / 60, minutes % 60))
}

/// Microseconds, days, months: seconds for `float`, ISO 8601 (`P1M2DT3.5S`) for `string`.
fn interval<'a>(bytes: &[u8], wanted: FieldType) -> Result<Cell<'a>, String> {
    let bytes: [u8; 16] = fixed(bytes)?;
    let us = i64::from_be_bytes(fixed(&bytes[..8])?);
    let days = i32::from_be_bytes(fixed(&bytes[8..12])?);
    let months = i32::from_be_bytes(fixed(&bytes[12..])?);
    let seconds = us as f64 / 1e6;
    match wanted {
        FieldType::Float if months == 0 => Ok(Cell::Float(f64::from(days) * 86_400.0 + seconds)),
        FieldType::Float => Err("an interval with months has no fixed length; use `extract(epoch from …)`".into()),
        _ => Ok(Cell::Text(format!("P{months}M{days}DT{seconds}S").into())),
    }
}

/// Groups of four digits; `weight` is the place of the first before the point.
fn numeric(bytes: &[u8]) -> Result<String, String> {
    let mut words = bytes.chunks_exact(2).map(|two| u16::from_be_bytes([two[0], two[1]]));
    let mut word = || words.next().ok_or("a short numeric");
    let (count, weight, sign, scale) = (word()?, word()? as i16, word()?, word()?);
    let groups: Vec<u16> = words.collect();
    match sign {
        0xC000 => return Ok("NaN".into()),
        0xD000 => return Ok("inf".into()),
        0xF000 => return Ok("-inf".into()),
        _ if groups.len() != usize::from(count) || groups.iter().any(|g| *g > 9999) => {
            return Err("a damaged numeric".into());
        }
        _ => {}
    }
    let (weight, scale) = (i32::from(weight), usize::from(scale));
    let group =
        |place: i32| usize::try_from(weight - place).ok().and_then(|index| groups.get(index)).copied().unwrap_or(0);
    let mut digits = String::from(if sign == 0x4000 { "-" } else { "" });
    let whole: String = (0..=weight.max(0)).rev().map(|place| format!("{:04}", group(place))).collect();
    let whole = whole.trim_start_matches('0');
    digits.push_str(if whole.is_empty() { "0" } else { whole });
    if scale > 0 {
        let groups_after = scale.div_ceil(4) as i32;
        let fraction: String = (1..=groups_after).map(|place| format!("{:04}", group(-place))).collect();
        digits.push('.');
        digits.push_str(&fraction[..scale]);
    }
    Ok(digits)
}

/// Deepest array that is read; PostgreSQL allows no deeper one.
const ARRAY_DEPTH_MAX: usize = 6;

/// An array of any depth as JSON text.
fn array(bytes: &[u8], element: &PgTypeInfo) -> Result<String, String> {
    let mut rest = bytes;
    let word = |rest: &mut &[u8]| -> Result<i32, String> {
        let (four, after) = rest.split_at_checked(4).ok_or("a short array")?;
        *rest = after;
        Ok(i32::from_be_bytes(fixed(four)?))
    };
    let depth = usize::try_from(word(&mut rest)?).map_err(|_| "a damaged array")?;
    let (_has_nulls, _element) = (word(&mut rest)?, word(&mut rest)?);
    if depth > ARRAY_DEPTH_MAX {
        return Err("a damaged array".into());
    }
    let mut lengths = Vec::new();
    for _ in 0..depth {
        lengths.push(usize::try_from(word(&mut rest)?).map_err(|_| "a damaged array")?);
        let _lower_bound = word(&mut rest)?;
    }
    // Text is text here even if it looks like JSON, and a decimal is a number.
    let wanted = if number_of(element) == oid::NUMERIC { FieldType::Json } else { FieldType::String };
    let mut values = Vec::new();
    while !rest.is_empty() {
        let Ok(length) = usize::try_from(word(&mut rest)?) else {
            values.push(Cow::Borrowed("null"));
            continue;
        };
        let (value, after) = rest.split_at_checked(length).ok_or("a short array")?;
        rest = after;
        values.push(cells::to_json(&cell(value, element, wanted)?).into());
    }
    // From the innermost dimension outwards, each run of values becomes one.
    for length in lengths.into_iter().skip(1).rev() {
        if length == 0 {
            return Err("a damaged array".into());
        }
        values = values.chunks(length).map(|run| Cow::from(format!("[{}]", run.join(",")))).collect();
    }
    Ok(format!("[{}]", values.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A numeric as the server sends it.
    fn sent(weight: i16, sign: u16, scale: u16, groups: &[u16]) -> Vec<u8> {
        let words = [groups.len() as u16, weight as u16, sign, scale];
        words.iter().chain(groups).flat_map(|w| w.to_be_bytes()).collect()
    }

    #[test]
    fn numerics_keep_every_digit() {
        for (bytes, expected) in [
            (sent(0, 0, 0, &[]), "0"),
            (sent(0, 0, 2, &[5, 1000]), "5.10"),
            (sent(1, 0x4000, 0, &[12, 3456]), "-123456"),
            (sent(2, 0, 0, &[1]), "100000000"),
            (sent(-1, 0, 4, &[25]), "0.0025"),
            (sent(-2, 0, 6, &[2500]), "0.000025"),
            (sent(0, 0, 3, &[]), "0.000"),
            (sent(0, 0xC000, 0, &[]), "NaN"),
        ] {
            assert_eq!(numeric(&bytes).as_deref(), Ok(expected));
        }
        assert!(numeric(&[0, 1, 0, 0, 0, 0, 0, 0]).is_err(), "a group is missing");
        assert!(numeric(&[0]).is_err());
    }

    #[test]
    fn damaged_values_are_errors() {
        for number in
            [oid::INT8, oid::FLOAT4, oid::UUID, oid::DATE, oid::TIMESTAMP, oid::INTERVAL, oid::TIMETZ, oid::BOOL]
        {
            let type_info = PgTypeInfo::with_oid(sqlx::postgres::types::Oid(number));
            assert!(int(&[1, 2, 3], &type_info).is_err());
        }
        assert!(timestamp(&i64::MAX.to_be_bytes()).is_err());
        assert!(day(&i32::MIN.to_be_bytes()).is_err());
    }
}
