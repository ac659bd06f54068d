//! `self`: the counters of this process. The file cannot be named like the source: `self` is a word of Rust.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use async_trait::async_trait;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::config::{At, CheckContext, Duration};
use pipeline::error::Result;
use pipeline::plugin::{
    Delivery, PullReader, Pulled, Reader, Schedule, Source, SourceConfig, SourceContext, SourceShape,
};
use pipeline::rows::Cell;
use pipeline::schema::{FieldType, schema_of};
use pipeline::status::{ConnectionTotals, NodeStatus, Status};
use pipeline::time::now_us;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::fixed::{count, rows_of};

const PAGE: &str = "\
Reports the counters of this process, one row per source, pipeline and sink.

With it the process watches itself: keep its history, show it, raise an alert when a source is away.

## Emits

One row per node and poll, in the order of the graph. All counters count from the start of the process; `rate(rows_out)`
in a window makes a rate of one.

| columns | what |
| --- | --- |
| `node`, `kind`, `type` | its name; `source`, `pipeline` or `sink`; the `type:` of a source or sink |
| `state`, `reason` | `starting`, `healthy`, `retrying`, `failed` or `ended`; why it is not healthy |
| `rows_in`, `rows_out`, `batches_out` | rows taken in; rows and batches given out |
| `errors` | wrong rows, failed connections, failed deliveries |
| `late_rows`, `dropped_rows` | rows that came too late for a window; rows dropped by a named policy |
| `polls`, `queue` | polls of a source; batches or records waiting to be taken in |
| `newest_event` | the newest event time given out |
| `uptime_seconds` | time since the start, the same in all rows |
| `active_connections`, `total_connections` | live connections now and since the start, the same in all rows |
| `messages_sent`, `messages_dropped` | frames sent to live clients and lost to slow ones, the same in all rows |

## Delivery

A sample of the state at each poll.

## Limits

A pipeline that reads this source is counted too, so its rows are never at rest.

## Fails when

Never.
";

/// The columns of a row.
const COLUMNS: [(&str, FieldType); 19] = [
    ("node", FieldType::String),
    ("kind", FieldType::String),
    ("type", FieldType::String),
    ("state", FieldType::String),
    ("reason", FieldType::String),
    ("rows_in", FieldType::Int),
    ("rows_out", FieldType::Int),
    ("batches_out", FieldType::Int),
    ("errors", FieldType::Int),
    ("late_rows", FieldType::Int),
    ("dropped_rows", FieldType::Int),
    ("polls", FieldType::Int),
    ("queue", FieldType::Int),
    ("newest_event", FieldType::Timestamp(None)),
    ("uptime_seconds", FieldType::Float),
    ("active_connections", FieldType::Int),
    ("total_connections", FieldType::Int),
    ("messages_sent", FieldType::Int),
    ("messages_dropped", FieldType::Int),
];

/// Options of `self`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelfConfig {
    /// Time between two polls. Default: 1s, what a dashboard shows.
    #[serde(default = "default_every")]
    pub every: At<Duration>,
}

fn default_every() -> At<Duration> {
    At::nowhere(Duration::from_secs(1))
}

impl SourceConfig for SelfConfig {
    const TYPE: &'static str = "self";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
type: self
every: 1s
";
    const PROMISES: &'static [(&'static str, Delivery)] = &[("", Delivery::Sampled)];
    const INSTEAD: Option<&'static str> = Some("`/metrics` shows the same figures");

    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        if self.every.is_zero() {
            cx.error(self.every.position, "`every` must be longer than nothing");
        }
        Some(SourceShape {
            schema: schema_of(COLUMNS),
            delivery: Delivery::Sampled,
            schedule: Schedule::Every(**self.every),
            bounded: false,
            can_be_on_demand: true,
            mounts: Vec::new(),
        })
    }

    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>> {
        Ok(Box::new(SelfMetrics { status: cx.status }))
    }
}

/// Both the source and its reader: there is nothing to connect to.
#[derive(Clone)]
struct SelfMetrics {
    status: Arc<Status>,
}

#[async_trait]
impl Source for SelfMetrics {
    async fn connect(&mut self, _: Option<&[u8]>) -> Result<Reader> {
        Ok(Reader::Pull(Box::new(self.clone())))
    }
}

#[async_trait]
impl PullReader for SelfMetrics {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        let totals = self.status.connections.totals();
        let uptime_s = now_us().saturating_sub(self.status.started_us) as f64 / 1e6;
        let nodes = self.status.nodes();
        let rows = nodes.iter().take(BATCH_ROWS_MAX).map(|node| cells(node, &totals, uptime_s));
        Ok(Some(Pulled { rows: rows_of(&COLUMNS, rows)?, errors: Vec::new(), position: Vec::new(), more: false }))
    }
}

/// The row of one node, in the order of [`COLUMNS`].
fn cells<'a>(node: &'a NodeStatus, totals: &ConnectionTotals, uptime_s: f64) -> [Cell<'a>; COLUMNS.len()] {
    let state = node.state();
    let counter = |counter: &AtomicU64| count(counter.load(Relaxed));
    let event_us = node.event_us.load(Relaxed);
    [
        Cell::Text(node.name.as_str().into()),
        Cell::Text(node.kind.as_str().into()),
        Cell::Text(node.type_name.as_str().into()),
        Cell::Text(state.as_str().into()),
        state.reason().map_or(Cell::Null, |reason| Cell::Text(reason.to_owned().into())),
        counter(&node.rows_in),
        counter(&node.rows_out),
        counter(&node.batches_out),
        counter(&node.errors),
        counter(&node.late_rows),
        counter(&node.dropped_rows),
        counter(&node.polls),
        counter(&node.queue),
        if event_us == i64::MIN { Cell::Null } else { Cell::Time(event_us) },
        Cell::Float(uptime_s),
        count(totals.active_connections),
        count(totals.total_connections),
        count(totals.messages_sent),
        count(totals.messages_dropped),
    ]
}

#[cfg(test)]
mod tests {
    use pipeline::expression::Expression;
    use pipeline::json::encode_rows;
    use pipeline::status::{NodeKind, NodeState};
    use serde_json::{Value, json};

    use super::*;
    use crate::testing;

    #[tokio::test]
    async fn each_node_gives_a_row_with_its_counters_and_those_of_the_process() {
        let config: SelfConfig = testing::read("{every: 5s}");
        let shape = testing::check(&config).expect("a shape");
        assert_eq!(shape.schedule, Schedule::Every(std::time::Duration::from_secs(5)));
        let cx = testing::context();
        let source = cx.status.node(NodeKind::Source, "devices", "mqtt");
        source.rows_out.store(7, Relaxed);
        source.event_us.store(1_500_000, Relaxed);
        source.set_state(NodeState::Retrying("connection refused".to_owned()));
        cx.status.node(NodeKind::Pipeline, "load", "pipeline").set_state(NodeState::Healthy);
        let connection = cx.status.connections.open("live", None, "test");
        connection.sent.store(3, Relaxed);
        let Reader::Pull(mut reader) = config.build(cx).expect("a source").connect(None).await.expect("a reader")
        else {
            panic!("a pull source");
        };
        let pulled = reader.next().await.expect("rows").expect("not the end");
        assert_eq!(pulled.rows.schema(), shape.schema);
        let rows: Vec<Value> =
            encode_rows(&pulled.rows).iter().map(|row| serde_json::from_str(row).expect("JSON")).collect();
        assert_eq!(rows.len(), 2);
        for (row, column, expected) in [
            (0, "node", json!("devices")),
            (0, "kind", json!("source")),
            (0, "type", json!("mqtt")),
            (0, "state", json!("retrying")),
            (0, "reason", json!("connection refused")),
            (0, "rows_out", json!(7)),
            (0, "newest_event", json!("1970-01-01T00:00:01.500Z")),
            (0, "active_connections", json!(1)),
            (1, "node", json!("load")),
            (1, "state", json!("healthy")),
            (1, "reason", json!(null)),
            (1, "newest_event", json!(null)),
            (1, "messages_sent", json!(3)),
        ] {
            assert_eq!(rows[row][column], expected, "{column} of row {row}");
        }
    }

    #[test]
    fn every_column_can_be_named_in_an_expression_without_quotes() {
        for (name, _) in COLUMNS {
            assert!(Expression::compile(&format!("{name} IS NULL"), &schema_of(COLUMNS)).is_ok(), "{name}");
        }
    }
}
