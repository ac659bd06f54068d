//! The text of frames: envelopes, and how a frame stands on the wire.

use std::fmt::Write;
use std::time::Duration;

use pipeline::json::json_string;
use pipeline::time::{format_us, now_us};
use schemars::JsonSchema;
use serde::Deserialize;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::queue::{Lost, Snapshot};
use super::subscription::{Catalog, Subscription};

/// What stands around the rows of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Envelope {
    /// `{"type":"update","metric":"NAME","seq":42,…,"data":[{…row…}]}`: one frame per emission.
    #[default]
    Metric,
    /// `{"event":"message","data":{…row…}}`: one frame per row.
    Event,
    /// The bare row, one frame per row; nothing else is sent but errors.
    None,
}

/// How a frame stands on the wire.
#[derive(Clone, Debug)]
pub(crate) enum Wire {
    /// One text message.
    WebSocket,
    /// `event:`, `id:` and `data:` lines and an empty line.
    Sse {
        /// Stands after `event:` instead of the frame's type.
        event_name: Option<String>,
    },
}

/// Writes the frames of one live sink.
#[derive(Debug)]
pub(crate) struct Encoder {
    /// What stands around the rows.
    pub(crate) envelope: Envelope,
    /// How it stands on the wire.
    pub(crate) wire: Wire,
    /// The epoch of this start.
    pub(crate) epoch: String,
    /// What the sink hands out.
    pub(crate) catalog: Catalog,
    /// Time between pings, for clients to know when they are cut off.
    pub(crate) keep_alive: Duration,
}

/// Room for what stands around the rows.
const AROUND_BYTES: usize = 256;

impl Encoder {
    /// The first frame of a connection. No `id:`, because the rows up to `seq` are yet to come.
    pub(crate) fn hello(&self, subscription: &Subscription, seq: u64) -> Option<Utf8Bytes> {
        if self.envelope != Envelope::Metric {
            return None;
        }
        Some(self.frame("hello", None, 0, |text| {
            self.head(text, "hello", None, seq);
            let _ = write!(text, r#","keep_alive_ms":{},"metrics":["#, self.keep_alive.as_millis());
            for (nth, (&metric, filter)) in subscription.iter().enumerate() {
                let metric = &self.catalog.metrics[metric];
                text.push_str(if nth > 0 { "," } else { "" });
                let _ = write!(text, r#"{{"name":{},"keys":"#, json_string(&metric.name));
                write_list(text, metric.keys.iter().map(String::as_str));
                // A connection starts with one alternative per metric.
                if let Some(columns) = filter.alternatives().first().filter(|columns| !columns.is_empty()) {
                    text.push_str(r#","where":{"#);
                    for (nth, (&column, values)) in columns.iter().enumerate() {
                        text.push_str(if nth > 0 { "," } else { "" });
                        let _ = write!(text, "{}:", json_string(&metric.keys[column]));
                        write_list(text, values.iter().map(AsRef::as_ref));
                    }
                    text.push('}');
                }
                text.push('}');
            }
            text.push_str("]}");
        }))
    }

    /// Rows of one emission in one frame.
    pub(crate) fn update<'a>(
        &self,
        metric: usize,
        seq: u64,
        batch: u64,
        timestamp: &str,
        bytes: usize,
        rows: impl Iterator<Item = &'a str>,
    ) -> Utf8Bytes {
        self.frame("update", Some(seq), bytes, |text| {
            self.head_at(text, "update", Some(metric), seq, timestamp);
            let _ = write!(text, r#","batch":{batch}"#);
            write_data(text, rows);
        })
    }

    /// One row in its own frame, for the envelopes that have no list.
    pub(crate) fn row(&self, row: &str, seq: Option<u64>) -> Utf8Bytes {
        match self.envelope {
            Envelope::None => self.frame("", seq, row.len(), |text| text.push_str(row)),
            _ => self.frame("message", seq, row.len(), |text| {
                let _ = write!(text, r#"{{"event":"message","data":{row}}}"#);
            }),
        }
    }

    /// The frames of part `part` (from 0) of a snapshot.
    pub(crate) fn snapshot(&self, snapshot: &Snapshot, part: usize, frames: &mut Vec<Utf8Bytes>) {
        let Some(range) = snapshot.parts.get(part) else { return };
        let rows = &snapshot.rows[range.clone()];
        // A client that reconnects from an `id:` gets no snapshot: so only the very last frame carries one.
        let id = (snapshot.completes && part + 1 == snapshot.parts.len()).then_some(snapshot.seq);
        if self.envelope != Envelope::Metric {
            for (nth, row) in rows.iter().enumerate() {
                frames.push(self.row(row, id.filter(|_| nth + 1 == rows.len())));
            }
            return;
        }
        let bytes = rows.iter().map(|row| row.len() + 1).sum();
        frames.push(self.frame("snapshot", id, bytes, |text| {
            self.head(text, "snapshot", Some(snapshot.metric), snapshot.seq);
            let _ = write!(text, r#","batch":{}"#, snapshot.batch);
            if snapshot.parts.len() > 1 {
                let _ = write!(text, r#","part":{},"parts":{}"#, part + 1, snapshot.parts.len());
            }
            write_data(text, rows.iter().map(|row| &**row));
        }));
    }

    /// Tells a slow client what it lost. The bare rows have no place for it.
    pub(crate) fn gap(&self, lost: &Lost) -> Option<Utf8Bytes> {
        match self.envelope {
            Envelope::None => None,
            Envelope::Metric => Some(self.frame("gap", None, 0, |text| {
                self.head(text, "gap", Some(lost.metric), lost.seq);
                let _ = write!(text, r#","lost":{}}}"#, lost.frames);
            })),
            Envelope::Event => Some(self.frame("gap", None, 0, |text| {
                let metric = json_string(&self.catalog.metrics[lost.metric].name);
                let _ = write!(text, r#"{{"event":"gap","data":{{"metric":{metric},"lost":{}}}}}"#, lost.frames);
            })),
        }
    }

    /// The keep-alive. Over SSE, where there is no other sign of life, bare rows have a comment.
    pub(crate) fn ping(&self) -> Option<Utf8Bytes> {
        match (self.envelope, &self.wire) {
            (Envelope::None, Wire::WebSocket) => None,
            (Envelope::None, Wire::Sse { .. }) => Some(Utf8Bytes::from_static(": keep-alive\n\n")),
            (Envelope::Metric, _) => Some(self.frame("ping", None, 0, |text| {
                let _ = write!(text, r#"{{"type":"ping","timestamp":"{}"}}"#, now_text());
            })),
            (Envelope::Event, _) => Some(self.frame("ping", None, 0, |text| {
                text.push_str(r#"{"event":"ping","data":{"type":"keep-alive"}}"#);
            })),
        }
    }

    /// The answer to a client's JSON ping.
    pub(crate) fn pong(&self) -> Utf8Bytes {
        Utf8Bytes::from_static(match self.envelope {
            Envelope::Event => r#"{"event":"pong","data":{}}"#,
            Envelope::Metric | Envelope::None => r#"{"type":"pong"}"#,
        })
    }

    /// Tells a client what is wrong.
    pub(crate) fn error(&self, message: &str) -> Utf8Bytes {
        let message = json_string(message);
        self.frame("error", None, message.len(), |text| {
            let _ = match self.envelope {
                Envelope::Event => write!(text, r#"{{"event":"error","data":{{"message":{message}}}}}"#),
                _ => write!(text, r#"{{"type":"error","timestamp":"{}","message":{message}}}"#, now_text()),
            };
        })
    }

    fn head(&self, text: &mut String, kind: &str, metric: Option<usize>, seq: u64) {
        self.head_at(text, kind, metric, seq, &now_text());
    }

    /// An object's beginning, without its end.
    fn head_at(&self, text: &mut String, kind: &str, metric: Option<usize>, seq: u64, timestamp: &str) {
        let _ = write!(text, r#"{{"type":"{kind}""#);
        if let Some(metric) = metric {
            let _ = write!(text, r#","metric":{}"#, json_string(&self.catalog.metrics[metric].name));
        }
        let _ = write!(text, r#","seq":{seq},"epoch":{},"timestamp":"{timestamp}""#, json_string(&self.epoch));
    }

    /// A frame as it stands on the wire. JSON text holds no raw line break, so one `data:` line holds it.
    fn frame(&self, kind: &str, id: Option<u64>, bytes: usize, body: impl FnOnce(&mut String)) -> Utf8Bytes {
        let mut text = String::with_capacity(bytes + AROUND_BYTES);
        let Wire::Sse { event_name } = &self.wire else {
            body(&mut text);
            return text.into();
        };
        let event = event_name.as_deref().unwrap_or(kind);
        if !event.is_empty() {
            let _ = writeln!(text, "event: {event}");
        }
        if let Some(id) = id {
            let _ = writeln!(text, "id: {}:{id}", self.epoch);
        }
        text.push_str("data: ");
        body(&mut text);
        text.push_str("\n\n");
        text.into()
    }
}

/// The wall clock in milliseconds, for `timestamp`.
pub(crate) fn now_text() -> String {
    let us = now_us();
    format_us(us - us.rem_euclid(1000))
}

/// `,"data":[…]}`: the end of a frame with rows.
fn write_data<'a>(text: &mut String, rows: impl Iterator<Item = &'a str>) {
    text.push_str(r#","data":["#);
    for (nth, row) in rows.enumerate() {
        text.push_str(if nth > 0 { "," } else { "" });
        text.push_str(row);
    }
    text.push_str("]}");
}

fn write_list<'a>(text: &mut String, values: impl Iterator<Item = &'a str>) {
    text.push('[');
    for (nth, value) in values.enumerate() {
        text.push_str(if nth > 0 { "," } else { "" });
        text.push_str(&json_string(value));
    }
    text.push(']');
}

#[cfg(test)]
mod tests {
    use super::super::subscription::Metric;
    use super::*;

    fn encoder(envelope: Envelope, wire: Wire) -> Encoder {
        let metrics = vec![Metric { name: "load".into(), keys: vec!["device_id".into()] }];
        Encoder {
            envelope,
            wire,
            epoch: "e1".into(),
            catalog: Catalog { metrics, ..Catalog::default() },
            keep_alive: Duration::from_secs(30),
        }
    }

    const SSE: Wire = Wire::Sse { event_name: None };

    fn update(encoder: &Encoder) -> String {
        let rows = [r#"{"a":1}"#, r#"{"a":2}"#];
        encoder.update(0, 42, 7, "2026-11-20T12:00:00.000Z", 16, rows.into_iter()).to_string()
    }

    #[test]
    fn an_update_has_the_documented_envelope_on_both_wires() {
        let json = r#"{"type":"update","metric":"load","seq":42,"epoch":"e1","timestamp":"2026-11-20T12:00:00.000Z","batch":7,"data":[{"a":1},{"a":2}]}"#;
        assert_eq!(update(&encoder(Envelope::Metric, Wire::WebSocket)), json);
        assert_eq!(update(&encoder(Envelope::Metric, SSE)), format!("event: update\nid: e1:42\ndata: {json}\n\n"));
        let named = Wire::Sse { event_name: Some("telemetry".into()) };
        let expected = format!("event: telemetry\nid: e1:42\ndata: {json}\n\n");
        assert_eq!(update(&encoder(Envelope::Metric, named)), expected);
    }

    #[test]
    fn rows_stand_alone_in_the_other_envelopes() {
        let row = r#"{"a":1}"#;
        for (envelope, wire, expected) in [
            (Envelope::Event, Wire::WebSocket, r#"{"event":"message","data":{"a":1}}"#),
            (Envelope::Event, SSE, "event: message\nid: e1:3\ndata: {\"event\":\"message\",\"data\":{\"a\":1}}\n\n"),
            (Envelope::None, Wire::WebSocket, row),
            (Envelope::None, SSE, "id: e1:3\ndata: {\"a\":1}\n\n"),
        ] {
            assert_eq!(encoder(envelope, wire).row(row, Some(3)).as_str(), expected);
        }
    }

    #[test]
    fn ping_gap_and_error_follow_the_envelope() {
        let lost = Lost { metric: 0, frames: 5, seq: 9 };
        let event = encoder(Envelope::Event, Wire::WebSocket);
        assert_eq!(event.ping().expect("a ping").as_str(), r#"{"event":"ping","data":{"type":"keep-alive"}}"#);
        assert_eq!(event.gap(&lost).expect("a gap").as_str(), r#"{"event":"gap","data":{"metric":"load","lost":5}}"#);
        assert_eq!(event.error("no \"x\"").as_str(), r#"{"event":"error","data":{"message":"no \"x\""}}"#);
        let none = encoder(Envelope::None, Wire::WebSocket);
        assert!(none.ping().is_none() && none.gap(&lost).is_none() && none.hello(&Subscription::new(), 0).is_none());
        assert_eq!(encoder(Envelope::None, SSE).ping().expect("a comment").as_str(), ": keep-alive\n\n");
        let gap = encoder(Envelope::Metric, Wire::WebSocket).gap(&lost).expect("a gap");
        let gap: serde_json::Value = serde_json::from_str(&gap).expect("JSON");
        assert_eq!(
            (&gap["type"], &gap["metric"], &gap["lost"], &gap["seq"]),
            (&"gap".into(), &"load".into(), &5.into(), &9.into())
        );
    }

    #[test]
    fn only_the_last_frame_of_the_last_snapshot_can_be_resumed_from() {
        let snapshot = |completes| Snapshot {
            metric: 0,
            seq: 8,
            batch: 2,
            rows: vec!["1".into(), "2".into(), "3".into()],
            parts: vec![0..2, 2..3],
            completes,
        };
        for (envelope, completes, expected) in [
            (Envelope::Metric, true, vec![false, true]),
            (Envelope::Metric, false, vec![false, false]),
            (Envelope::None, true, vec![false, false, true]),
            (Envelope::None, false, vec![false, false, false]),
        ] {
            let mut frames = Vec::new();
            for part in 0..2 {
                encoder(envelope, SSE).snapshot(&snapshot(completes), part, &mut frames);
            }
            let with_id: Vec<bool> =
                frames.iter().map(|frame| frame.contains("\nid: e1:8\n") || frame.starts_with("id: e1:8\n")).collect();
            assert_eq!(with_id, expected, "{frames:?}");
        }
    }
}
