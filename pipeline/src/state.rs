//! How operators, sources and sinks write their state into a checkpoint: little-endian, length-prefixed,
//! the same on every machine. Reading never panics: a damaged state is an error with its place.

use std::io::Cursor;

use arrow::array::RecordBatch;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;

use crate::error::{Error, Result};

/// Writes one node's state.
#[derive(Clone, Debug, Default)]
pub struct StateWriter {
    bytes: Vec<u8>,
    /// Why a part could not be written.
    failure: Option<String>,
}

impl StateWriter {
    /// With room for so many bytes: a state is about as long as the last one was.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), failure: None }
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Why a part of it could not be written, the first time: it is no state to go on from.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// `true` and what `write` writes, or `false` and why it could not, which is then the state's [`Self::failure`] too.
    pub fn attempt(&mut self, write: impl FnOnce(&mut Self) -> Result<()>) {
        let start = self.bytes.len();
        self.bool(true);
        if let Err(error) = self.nested(write) {
            self.bytes.truncate(start);
            self.bool(false);
            self.str(&error.to_string());
            self.failure.get_or_insert_with(|| error.to_string());
        }
    }

    /// What `write` writes, with its length before it, as [`Self::bytes`] of it would be. After an error nothing of it is
    /// there.
    pub fn nested<E>(&mut self, write: impl FnOnce(&mut Self) -> Result<(), E>) -> Result<(), E> {
        let start = self.bytes.len();
        self.u64(0);
        if let Err(error) = write(self) {
            self.bytes.truncate(start);
            return Err(error);
        }
        let length = (self.bytes.len() - start - 8) as u64;
        self.bytes[start..start + 8].copy_from_slice(&length.to_le_bytes());
        Ok(())
    }

    /// An unsigned number.
    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// A signed number.
    pub fn i64(&mut self, value: i64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// A float, bit for bit.
    pub fn f64(&mut self, value: f64) {
        self.u64(value.to_bits());
    }

    /// One bit.
    pub fn bool(&mut self, value: bool) {
        self.bytes.push(u8::from(value));
    }

    /// Bytes with their length.
    pub fn bytes(&mut self, value: &[u8]) {
        self.u64(value.len() as u64);
        self.bytes.extend_from_slice(value);
    }

    /// Text with its length.
    pub fn str(&mut self, value: &str) {
        self.bytes(value.as_bytes());
    }

    /// Rows as an Arrow IPC stream. All batches share the schema of the first.
    pub fn batches(&mut self, batches: &[RecordBatch]) -> Result<()> {
        let mut buffer = Vec::new();
        if let Some(first) = batches.first() {
            let mut writer = StreamWriter::try_new(&mut buffer, first.schema_ref())?;
            for batch in batches {
                writer.write(batch)?;
            }
            writer.finish()?;
        }
        self.bytes(&buffer);
        Ok(())
    }

    /// What was written.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

impl From<Vec<u8>> for StateWriter {
    /// Goes on after these bytes.
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, failure: None }
    }
}

/// Reads what [`StateWriter`] wrote, in the same order.
#[derive(Debug)]
pub struct StateReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> StateReader<'a> {
    /// Over the whole state of one node.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            Error::internal(format!("damaged state: {length} bytes wanted at {} of {}", self.at, self.bytes.len()))
        })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn eight(&mut self) -> Result<[u8; 8]> {
        let mut eight = [0; 8];
        eight.copy_from_slice(self.take(8)?);
        Ok(eight)
    }

    /// An unsigned number.
    pub fn u64(&mut self) -> Result<u64> {
        self.eight().map(u64::from_le_bytes)
    }

    /// A count of things that follow, each of at least one byte: bounded by what is left, so that a damaged
    /// count cannot ask for all memory.
    pub fn count(&mut self) -> Result<usize> {
        let count = self.u64()?;
        let left = self.bytes.len() - self.at;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= left)
            .ok_or_else(|| Error::internal(format!("damaged state: {count} items in {left} bytes")))
    }

    /// A signed number.
    pub fn i64(&mut self) -> Result<i64> {
        self.eight().map(i64::from_le_bytes)
    }

    /// A float, bit for bit.
    pub fn f64(&mut self) -> Result<f64> {
        self.u64().map(f64::from_bits)
    }

    /// One bit.
    pub fn bool(&mut self) -> Result<bool> {
        Ok(self.take(1)?[0] != 0)
    }

    /// Bytes with their length.
    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let length = self.u64()?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    /// Text with its length.
    pub fn str(&mut self) -> Result<&'a str> {
        std::str::from_utf8(self.bytes()?).map_err(|e| Error::internal("damaged state").because(e))
    }

    /// Rows of an Arrow IPC stream.
    pub fn batches(&mut self) -> Result<Vec<RecordBatch>> {
        let bytes = self.bytes()?;
        if bytes.is_empty() {
            return Ok(Vec::new());
        }
        let reader = StreamReader::try_new(Cursor::new(bytes), None)?;
        reader.map(|batch| Ok(batch?)).collect()
    }
}
