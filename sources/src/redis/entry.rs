//! An entry of a stream: its columns, and how it becomes a row.

use std::collections::HashMap;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use pipeline::config::{At, CheckContext, Fields};
use pipeline::error::Result;
use pipeline::json::json_string;
use pipeline::rows::{Cell, RowsBuilder};
use pipeline::schema::FieldType;
use schemars::JsonSchema;
use serde::Deserialize;
use wire::redis::Reply;

/// A column beside `fields`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StreamColumn {
    /// The entry's id, such as `1700000000000-0`.
    Id,
    /// The name of the stream.
    Stream,
    /// The time in the entry's id, in milliseconds: when the server took it, unless the writer set the id.
    Time,
}

impl StreamColumn {
    fn name_and_type(self) -> (&'static str, FieldType) {
        match self {
            Self::Id => ("id", FieldType::String),
            Self::Stream => ("stream", FieldType::String),
            Self::Time => ("time", FieldType::Timestamp(None)),
        }
    }
}

/// How entries become rows.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Columns beside `fields`, first in the row.
    pub(super) columns: Vec<StreamColumn>,
    /// Whether the whole entry is one `payload` column.
    pub(super) raw: bool,
    /// The field of the entry that holds JSON with the `fields`; else they are fields of the entry.
    pub(super) json: Option<String>,
    /// The declared columns.
    pub(super) fields: Fields,
}

impl Layout {
    fn extra(&self) -> Vec<(&'static str, FieldType)> {
        let payload = self.raw.then_some(("payload", FieldType::Json));
        self.columns.iter().map(|column| column.name_and_type()).chain(payload).collect()
    }

    fn builder(&self) -> RowsBuilder {
        RowsBuilder::new(&self.extra(), &self.fields)
    }

    /// The columns of the row.
    pub(super) fn schema(&self) -> SchemaRef {
        self.builder().schema().clone()
    }

    /// Reports what does not fit together.
    pub(super) fn check(&self, fields: &At<Fields>, cx: &mut CheckContext<'_>) {
        for (name, _) in self.extra() {
            if self.fields.0.contains_key(name) {
                let hint = format!("another name: `{name}_field: {{type: string, path: {name}}}`");
                cx.error_hint(fields.position, format!("`{name}` is in `columns` and in `fields`"), Some(hint));
            }
        }
        if self.json.is_some() && self.fields.is_empty() {
            cx.error(fields.position, "`json` needs `fields`: what to read from it");
        }
        let nested = self.fields.0.iter().find(|(_, spec)| spec.path.as_ref().is_some_and(|path| path.len() > 1));
        if let Some((name, _)) = nested.filter(|_| self.json.is_none()) {
            let hint = Some("name the field that holds JSON: `json: payload`".to_owned());
            cx.error_hint(fields.position, format!("`{name}`: an entry's fields are not nested"), hint);
        }
    }

    /// Which columns an entry's field fills.
    fn columns_of_name(&self) -> HashMap<String, Vec<usize>> {
        let mut columns: HashMap<String, Vec<usize>> = HashMap::new();
        let first = self.extra().len();
        for (index, (name, spec)) in self.fields.0.iter().enumerate() {
            let entry_name = spec.path.as_ref().and_then(|path| path.first()).unwrap_or(name);
            columns.entry(entry_name.clone()).or_default().push(first + index);
        }
        columns
    }
}

/// Builds rows of entries.
pub(super) struct EntryRows {
    layout: Layout,
    columns_of_name: HashMap<String, Vec<usize>>,
    rows: RowsBuilder,
}

impl EntryRows {
    pub(super) fn new(layout: Layout) -> Self {
        Self { columns_of_name: layout.columns_of_name(), rows: layout.builder(), layout }
    }

    /// The rows taken since the last call.
    pub(super) fn finish(&mut self) -> Result<RecordBatch> {
        self.rows.finish()
    }

    /// Takes one entry as a row.
    pub(super) fn take(&mut self, stream: &str, id: &str, fields: &[Reply]) -> Result<(), String> {
        let whole = if self.layout.raw { payload(fields) } else { String::new() };
        let mut row = self.rows.row();
        for (index, column) in self.layout.columns.iter().enumerate() {
            let cell = match column {
                StreamColumn::Id => Cell::Text(id.into()),
                StreamColumn::Stream => Cell::Text(stream.into()),
                StreamColumn::Time => {
                    Cell::Time(milliseconds(id).and_then(|ms| ms.checked_mul(1000)).ok_or("an id without time")?)
                }
            };
            self.rows.set(&mut row, index, cell)?;
        }
        if self.layout.raw {
            self.rows.set(&mut row, self.layout.columns.len(), Cell::Json(whole.as_str().into()))?;
        } else if let Some(json) = &self.layout.json {
            let named = fields.chunks_exact(2).find(|pair| pair[0].as_str() == Some(json));
            match named.map(|pair| &pair[1]) {
                Some(Reply::Text(message)) => self.rows.set_json(&mut row, message)?,
                _ => return Err(format!("the entry has no field `{json}`")),
            }
        } else {
            for pair in fields.chunks_exact(2) {
                let (Some(name), Reply::Text(value)) = (pair[0].as_str(), &pair[1]) else { continue };
                for &column in self.columns_of_name.get(name).into_iter().flatten() {
                    let cell = std::str::from_utf8(value).map_or(Cell::Bytes(value), Cell::Untyped);
                    self.rows.set(&mut row, column, cell)?;
                }
            }
        }
        self.rows.push(row);
        Ok(())
    }
}

/// The milliseconds in an id such as `1700000000000-0` or `1700000000000`.
pub(super) fn milliseconds(id: &str) -> Option<i64> {
    let (time, sequence) = id.split_once('-').unwrap_or((id, "0"));
    sequence.parse::<u64>().ok()?;
    time.parse().ok()
}

/// An entry's id and its names and values in turn. An entry that was deleted meanwhile has none.
pub(super) fn entry_of(entry: Reply) -> Option<(String, Vec<Reply>)> {
    let mut parts = entry.into_list()?.into_iter();
    let id = parts.next()?.as_str()?.to_owned();
    Some((id, parts.next().and_then(Reply::into_list).unwrap_or_default()))
}

/// An entry as a JSON object of texts. Bytes that are no UTF-8 are replaced.
pub(super) fn payload(fields: &[Reply]) -> String {
    let text = |reply: &Reply| match reply {
        Reply::Text(text) => json_string(&String::from_utf8_lossy(text)),
        _ => "null".to_owned(),
    };
    let pairs: Vec<String> =
        fields.chunks_exact(2).map(|pair| format!("{}:{}", text(&pair[0]), text(&pair[1]))).collect();
    format!("{{{}}}", pairs.join(","))
}

/// What the server said that is no answer.
pub(super) fn words_of(reply: &Reply) -> String {
    match reply {
        Reply::Error(words) => words.clone(),
        other => format!("unexpected reply {other:?}"),
    }
}

/// The entries of each stream in the reply to `XREAD` and its like; none if nothing came while the server waited.
pub(super) fn streams_of(reply: Reply) -> Result<Vec<(String, Vec<Reply>)>, String> {
    let stream_of = |reply: Reply| {
        let mut parts = reply.into_list()?.into_iter();
        let name = parts.next()?.as_str()?.to_owned();
        Some((name, parts.next()?.into_list()?))
    };
    match reply {
        Reply::Null => Ok(Vec::new()),
        Reply::List(streams) => {
            streams.into_iter().map(|stream| stream_of(stream).ok_or_else(|| "a malformed entry".to_owned())).collect()
        }
        other => Err(words_of(&other)),
    }
}
