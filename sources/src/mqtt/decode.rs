//! From messages to rows.

use bytes::Bytes;
use pipeline::config::ByteSize;
use pipeline::error::Result;
use pipeline::plugin::{Decoded, Decoder, Record, RowError};
use pipeline::rows::{Cell, Row, RowsBuilder};
use serde_json::value::RawValue;

use super::metadata::Metadata;
use super::topic::Topic;
use super::{Columns, MqttConfig};

/// Decodes the messages of one source.
pub(super) struct MqttDecoder {
    topics: Vec<BoundTopic>,
    builder: RowsBuilder,
    topic_column: Option<usize>,
    payload_column: Option<usize>,
    max_message: ByteSize,
}

/// A topic and, for each of its names, the column.
struct BoundTopic {
    topic: Topic,
    columns: Vec<usize>,
}

impl MqttDecoder {
    pub(super) fn new(config: &MqttConfig, topics: Vec<Topic>, columns: &Columns) -> Self {
        let bound = |topic: Topic| {
            let column = |name| columns.names.iter().position(|known| known == name);
            let columns = topic.names().filter_map(column).collect();
            BoundTopic { topic, columns }
        };
        Self {
            topics: topics.into_iter().map(bound).collect(),
            builder: RowsBuilder::new(&columns.extra(), &config.fields),
            topic_column: columns.topic,
            payload_column: columns.payload,
            max_message: config.max_message.value,
        }
    }

    /// A row with what the topic says.
    fn row<'r>(&mut self, topic: &'r str) -> Result<Row<'r>, String> {
        let mut row = self.builder.row();
        let mut values = Vec::new();
        for BoundTopic { topic: pattern, columns } in &self.topics {
            values.clear();
            if !pattern.matches(topic, |_, value| values.push(value)) {
                continue;
            }
            for (column, value) in columns.iter().zip(&values) {
                self.builder.set(&mut row, *column, Cell::Text((*value).into()))?;
            }
            if let Some(column) = self.topic_column {
                self.builder.set(&mut row, column, Cell::Text(topic.into()))?;
            }
            return Ok(row);
        }
        Err(format!("topic `{topic}` is none of `topics`; a subscription of earlier may have left it queued"))
    }

    /// Takes one message; appends an error for each part that is wrong. Returns the number of rows taken.
    fn take(&mut self, record: &Record, errors: &mut Vec<RowError>) -> Result<u32, String> {
        if record.payload.len() as u64 > self.max_message.0 {
            return Err(format!("the message is larger than `max_message: {}`", self.max_message));
        }
        let topic = Metadata::topic(&record.metadata)?;
        if let Some(column) = self.payload_column {
            let mut row = self.row(topic)?;
            self.builder.set(&mut row, column, Cell::Bytes(&record.payload))?;
            self.builder.push(row);
            return Ok(1);
        }
        if !is_array(&record.payload) {
            let mut row = self.row(topic)?;
            self.builder.set_json(&mut row, &record.payload)?;
            self.builder.push(row);
            return Ok(1);
        }
        let items: Vec<&RawValue> =
            serde_json::from_slice(&record.payload).map_err(|e| format!("malformed JSON: {e}"))?;
        let mut rows = 0;
        for (index, item) in items.into_iter().enumerate() {
            let mut row = self.row(topic)?;
            match self.builder.set_json(&mut row, item.get().as_bytes()) {
                Ok(()) => {
                    self.builder.push(row);
                    rows += 1;
                }
                Err(wrong) => {
                    errors.push(RowError::new(format!("item {index} of the array: {wrong}"), item.get().as_bytes()));
                }
            }
        }
        Ok(rows)
    }
}

impl Decoder for MqttDecoder {
    fn decode(&mut self, records: &[Record]) -> Result<Decoded> {
        let mut record_of_row = Vec::with_capacity(records.len());
        let mut errors = Vec::new();
        for (index, record) in (0u32..).zip(records) {
            match self.take(record, &mut errors) {
                Ok(rows) => record_of_row.extend(std::iter::repeat_n(index, rows as usize)),
                Err(wrong) => errors.push(RowError::new(wrong, &record.payload)),
            }
        }
        Ok(Decoded { rows: self.builder.finish()?, record_of_row, errors })
    }
}

fn is_array(payload: &Bytes) -> bool {
    payload.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[')
}
