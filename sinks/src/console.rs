//! Prints rows on standard output, one JSON object per line.

use std::io::{self, Write};
use std::time::Duration;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::config::CheckContext;
use pipeline::error::{Error, Result};
use pipeline::json::{encode_rows, json_string};
use pipeline::plugin::{
    BatchLimits, BatchOptions, OutboxSink, Promise, Sink, SinkConfig, SinkContext, SinkInput, SinkShape,
};
use schemars::JsonSchema;
use serde::Deserialize;

const PAGE: &str = "\
Prints rows on standard output, one JSON object per line.

## Writes
With `envelope: metric` (the default) a line is `{\"metric\":\"device_load\",\"data\":{…row…}}`, so that lines of several
pipelines can be told apart; with `envelope: none` it is the bare row. Rows are encoded as in live frames: timestamps
RFC 3339 with Z, decimals as strings, NaN and infinities null. Nothing else is printed on standard output while the
graph runs (logs go to standard error), so the output can be piped: `pipeline run | jq .data`.

## Delivery
At least once, from a durable outbox: a row is handed on once a line is written and flushed; after a crash or a failed
write, the last lines may be printed again. Corrected window rows (`stage: revised`) are printed too.

## Limits
It is a durable sink: it keeps `on_demand` sources awake. A reader that is slow (a pipe) fills the outbox, and a full
outbox pushes back to the sources.

## Fails when
Standard output cannot be written, as on a full disk: tried again. If the reader of a pipe has gone away, its rows are
counted as failed and the graph goes on.
";

/// Where the rows' names go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Envelope {
    /// `{"metric":"device_load","data":{…}}`.
    #[default]
    Metric,
    /// The bare row.
    None,
}

/// The YAML block of a `console` sink.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// `metric` (default) prints `{"metric":"device_load","data":{…}}`, because one sink often takes several
    /// pipelines; `none` prints the bare row.
    #[serde(default)]
    pub envelope: Envelope,
    /// When waiting rows become a delivery. Default `{rows: 8192, every: 0s}`: as many rows as there are, without a wait, so
    /// that what happens shows at once.
    #[serde(default)]
    pub batch: BatchOptions,
}

/// Of the option `batch`.
const BATCH_DEFAULT: BatchLimits = BatchLimits { rows: BATCH_ROWS_MAX, every: Duration::ZERO };

impl SinkConfig for ConsoleConfig {
    const TYPE: &'static str = "console";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "type: console\n";
    const PROMISES: &'static [(&'static str, Promise)] = &[("", Promise::AtLeastOnce)];
    const INSTEAD: Option<&'static str> = Some("`parquet`, or `sql`; the console may still take `errors`");

    fn check(&self, _inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
        let errors = cx.errors();
        self.batch.check(cx);
        (cx.errors() == errors).then_some(SinkShape { takes_revised: true, ..SinkShape::default() })
    }

    fn build(&self, cx: SinkContext) -> Result<Sink> {
        let starts = cx.inputs.iter().map(|input| self.envelope.start_of_line(&input.metric)).collect();
        let console = Console { envelope: self.envelope, starts };
        Ok(Sink::Outbox(Box::new(console), self.batch.limits(BATCH_DEFAULT)))
    }
}

impl Envelope {
    fn start_of_line(self, metric: &str) -> String {
        match self {
            Self::Metric => format!("{{\"metric\":{},\"data\":", json_string(metric)),
            Self::None => String::new(),
        }
    }
}

/// Prints.
struct Console {
    envelope: Envelope,
    /// What each input's lines start with.
    starts: Vec<String>,
}

#[async_trait]
impl OutboxSink for Console {
    async fn connect(&mut self) -> Result<()> {
        Ok(())
    }

    async fn deliver(&mut self, input: usize, rows: &RecordBatch, _id: u64) -> Result<()> {
        let start = self.starts.get(input).map_or("", String::as_str);
        let text = lines(start, self.envelope, rows);
        // A pipe may block for as long as its reader likes.
        let printed = tokio::task::spawn_blocking(move || print(&mut io::stdout().lock(), &text)).await;
        printed.map_err(|e| Error::internal("printing").because(e))?
    }
}

/// One line per row.
fn lines(start: &str, envelope: Envelope, rows: &RecordBatch) -> String {
    let end = if envelope == Envelope::Metric { "}\n" } else { "\n" };
    let rows = encode_rows(rows);
    let size = rows.iter().map(|row| start.len() + row.len() + end.len()).sum();
    let mut text = String::with_capacity(size);
    for row in rows.iter() {
        text.push_str(start);
        text.push_str(row);
        text.push_str(end);
    }
    text
}

fn print(out: &mut impl Write, text: &str) -> Result<()> {
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| {
        let gone = error.kind() == io::ErrorKind::BrokenPipe;
        let error = Error::outside("standard output cannot be written").because(error);
        // A closed pipe stays closed: trying again would only fill the outbox.
        if gone { error.fatal() } else { error }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Float64Array, StringArray};
    use pipeline::error::Retry;
    use pipeline::schema::{FieldType, schema_of};

    use super::*;

    fn rows() -> RecordBatch {
        let schema = schema_of([("device_id", FieldType::String), ("latency_ms", FieldType::Float)]);
        let ids = StringArray::from(vec!["a\nb", "c"]);
        let latencies = Float64Array::from(vec![Some(1.5), None]);
        RecordBatch::try_new(schema, vec![Arc::new(ids), Arc::new(latencies)]).expect("rows")
    }

    #[test]
    fn a_row_is_one_line_in_its_envelope() {
        for (envelope, expected) in [
            (
                Envelope::Metric,
                "{\"metric\":\"load\",\"data\":{\"device_id\":\"a\\nb\",\"latency_ms\":1.5}}\n\
                 {\"metric\":\"load\",\"data\":{\"device_id\":\"c\",\"latency_ms\":null}}\n",
            ),
            (
                Envelope::None,
                "{\"device_id\":\"a\\nb\",\"latency_ms\":1.5}\n{\"device_id\":\"c\",\"latency_ms\":null}\n",
            ),
        ] {
            let start = envelope.start_of_line("load");
            assert_eq!(lines(&start, envelope, &rows()), expected);
        }
    }

    #[test]
    fn only_a_closed_pipe_is_final() {
        struct Failing(io::ErrorKind);
        impl Write for Failing {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for (kind, retry) in [(io::ErrorKind::BrokenPipe, Retry::Never), (io::ErrorKind::StorageFull, Retry::BackOff)] {
            let error = print(&mut Failing(kind), "x\n").expect_err("a failing stream");
            assert_eq!(error.retry, retry, "{kind:?}");
        }
    }
}
