//! Where a cursor stands: the values of its columns in the last row read, as the database gave them.

use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};
use pipeline::error::{Error, Result};
use pipeline::schema::FieldType;
use pipeline::state::{StateReader, StateWriter};
use pipeline::time::parse_us;

use super::cells;
use super::plan::Server;

/// One value of a cursor column, in a type that the database compares with its own column exactly.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Key {
    /// A whole number.
    Int(i64),
    /// A whole number beyond `i64` (MySQL `BIGINT UNSIGNED`).
    Unsigned(u64),
    /// A float; SQLite keeps Julian days so.
    Float(f64),
    /// Text.
    Text(String),
    /// Raw bytes (SQLite blobs, MySQL `BINARY`).
    Bytes(Vec<u8>),
    /// Microseconds since 1970, of a column without a zone.
    Time(i64),
    /// Microseconds since 1970 UTC, of a column with a zone.
    TimeUtc(i64),
    /// Days since 1970.
    Day(i32),
    /// A UUID.
    Uuid([u8; 16]),
    /// An exact decimal, as its digits.
    Decimal(String),
}

impl Key {
    /// The value of [`Self::Time`] for binding.
    pub(super) fn naive(us: i64) -> Result<NaiveDateTime> {
        Self::utc(us).map(|time| time.naive_utc())
    }

    /// The value of [`Self::TimeUtc`] for binding.
    pub(super) fn utc(us: i64) -> Result<DateTime<Utc>> {
        DateTime::from_timestamp_micros(us).ok_or_else(|| Error::internal(format!("cursor at {us} us")))
    }

    /// The value of [`Self::Day`] for binding.
    pub(super) fn date(day: i32) -> Result<NaiveDate> {
        cells::date_of(day).ok_or_else(|| Error::internal(format!("cursor at day {day}")))
    }

    /// The error for a variant that a server's columns never give.
    pub(super) fn foreign(&self, server: &str) -> Error {
        Error::internal(format!("a cursor value {self:?} of another server than {server}"))
    }

    /// A value of `start:` for a column declared as `field_type`.
    pub(super) fn parse(text: &str, field_type: FieldType, server: &Server) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no {field_type}");
        if let (Server::Sqlite(_), FieldType::Int | FieldType::Timestamp(_) | FieldType::Date) = (server, field_type) {
            // SQLite keeps times as text or numbers, whichever the table holds: the text says which.
            return match (text.parse(), text.parse()) {
                (Ok(int), _) => Ok(Self::Int(int)),
                (_, Ok(float)) => Ok(Self::Float(float)),
                _ if field_type == FieldType::Int => Err(wrong()),
                _ => Ok(Self::Text(text.to_owned())),
            };
        }
        match field_type {
            FieldType::Int => text.parse().map(Self::Int).map_err(|_| wrong()),
            FieldType::String => Ok(Self::Text(text.to_owned())),
            FieldType::Timestamp(_) => {
                let us = parse_us(text).ok_or_else(wrong)?;
                Ok(if matches!(server, Server::Postgres) { Self::TimeUtc(us) } else { Self::Time(us) })
            }
            FieldType::Date => cells::day_of(text).map(Self::Day).ok_or_else(wrong),
            FieldType::Decimal(..) => {
                let digits = text.trim_start_matches(['-', '+']);
                let is_number = digits.bytes().any(|b| b.is_ascii_digit())
                    && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.')
                    && digits.bytes().filter(|b| *b == b'.').count() <= 1;
                if is_number { Ok(Self::Decimal(text.to_owned())) } else { Err(wrong()) }
            }
            FieldType::Float | FieldType::Bool | FieldType::Bytes | FieldType::Json => Err(wrong()),
        }
    }

    fn write(&self, state: &mut StateWriter) {
        match self {
            Self::Int(value) => {
                state.u64(0);
                state.i64(*value);
            }
            Self::Unsigned(value) => {
                state.u64(1);
                state.u64(*value);
            }
            Self::Float(value) => {
                state.u64(2);
                state.f64(*value);
            }
            Self::Text(text) => {
                state.u64(3);
                state.str(text);
            }
            Self::Bytes(bytes) => {
                state.u64(4);
                state.bytes(bytes);
            }
            Self::Time(us) => {
                state.u64(5);
                state.i64(*us);
            }
            Self::TimeUtc(us) => {
                state.u64(6);
                state.i64(*us);
            }
            Self::Day(day) => {
                state.u64(7);
                state.i64(i64::from(*day));
            }
            Self::Uuid(bytes) => {
                state.u64(8);
                state.bytes(bytes);
            }
            Self::Decimal(text) => {
                state.u64(9);
                state.str(text);
            }
        }
    }

    fn read(state: &mut StateReader<'_>) -> Result<Self> {
        let damaged = || Error::internal("damaged cursor position");
        Ok(match state.u64()? {
            0 => Self::Int(state.i64()?),
            1 => Self::Unsigned(state.u64()?),
            2 => Self::Float(state.f64()?),
            3 => Self::Text(state.str()?.to_owned()),
            4 => Self::Bytes(state.bytes()?.to_vec()),
            5 => Self::Time(state.i64()?),
            6 => Self::TimeUtc(state.i64()?),
            7 => Self::Day(i32::try_from(state.i64()?).map_err(|_| damaged())?),
            8 => Self::Uuid(state.bytes()?.try_into().map_err(|_| damaged())?),
            9 => Self::Decimal(state.str()?.to_owned()),
            _ => return Err(damaged()),
        })
    }
}

/// A position: the cursor's columns by name, then their values; no values before the first row.
pub(super) fn encode(columns: &[String], keys: &[Key]) -> Vec<u8> {
    let mut state = StateWriter::default();
    state.u64(columns.len() as u64);
    for column in columns {
        state.str(column);
    }
    state.u64(keys.len() as u64);
    for key in keys {
        key.write(&mut state);
    }
    state.finish()
}

/// The values of a position that [`encode`] wrote for the same columns.
pub(super) fn decode(columns: &[String], position: &[u8]) -> Result<Vec<Key>> {
    let mut state = StateReader::new(position);
    let names = (0..state.count()?).map(|_| Ok(state.str()?.to_owned())).collect::<Result<Vec<_>>>()?;
    if names != columns {
        return Err(Error::user(format!(
            "the checkpoint holds a position of the cursor [{}], and the YAML now says [{}]; give the source another \
             name to start anew",
            names.join(", "),
            columns.join(", ")
        )));
    }
    (0..state.count()?).map(|_| Key::read(&mut state)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_reads_back_and_belongs_to_its_columns() {
        let columns = ["a".to_owned(), "b".to_owned()];
        let keys = vec![
            Key::Int(-5),
            Key::Unsigned(u64::MAX),
            Key::Float(0.1),
            Key::Text("ü".into()),
            Key::Bytes(vec![0, 255]),
            Key::Time(1),
            Key::TimeUtc(-1),
            Key::Day(20_000),
            Key::Uuid([7; 16]),
            Key::Decimal("1.50".into()),
        ];
        let position = encode(&columns, &keys);
        assert_eq!(decode(&columns, &position).expect("keys"), keys);
        assert!(decode(&columns, &encode(&columns, &[])).expect("keys").is_empty());
        let other = decode(&columns[..1], &position).expect_err("other columns").to_string();
        assert!(other.contains("[a, b]") && other.contains("[a]"), "{other}");
        for cut in 0..position.len() {
            assert!(decode(&columns, &position[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn start_is_read_as_the_column_and_the_server_want_it() {
        let sqlite = Server::Sqlite("x".into());
        let time = FieldType::Timestamp(None);
        let noon = 1_795_176_000_000_000;
        for (text, field_type, server, expected) in [
            ("5", FieldType::Int, &Server::Postgres, Some(Key::Int(5))),
            ("x", FieldType::Int, &Server::Postgres, None),
            ("x", FieldType::Int, &sqlite, None),
            ("2026-11-20T12:00:00Z", time, &Server::Postgres, Some(Key::TimeUtc(noon))),
            ("2026-11-20T12:00:00Z", time, &Server::MySql, Some(Key::Time(noon))),
            ("2026-11-20T12:00:00Z", time, &sqlite, Some(Key::Text("2026-11-20T12:00:00Z".into()))),
            ("1700000000", FieldType::Timestamp(None), &sqlite, Some(Key::Int(1_700_000_000))),
            ("1970-01-02", FieldType::Date, &Server::MySql, Some(Key::Day(1))),
            ("-1.50", FieldType::Decimal(9, 2), &Server::Postgres, Some(Key::Decimal("-1.50".into()))),
            ("1.5.0", FieldType::Decimal(9, 2), &Server::Postgres, None),
        ] {
            assert_eq!(Key::parse(text, field_type, server).ok(), expected, "{text}");
        }
    }
}
