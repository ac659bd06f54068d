//! What a client wants: metrics, filtered by key columns; and how it says so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use indexmap::IndexMap;
use pipeline::config::did_you_mean;
use serde::Deserialize;
use serde_json::Value;

/// The parameter that chooses metrics.
pub(crate) const METRIC: &str = "metric";
/// The parameter that says what a client already has.
pub(crate) const SINCE: &str = "since";

/// Most values that the filters of one client name together, about 1 MB. A client that wants more wants all.
const VALUES_MAX: usize = 10_000;

/// What a live sink hands out: its metrics, and the names by which a client chooses among their rows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Catalog {
    /// In the order of the sink's inputs.
    pub(crate) metrics: Vec<Metric>,
    /// Parameter to key column, where they differ.
    pub(crate) params: IndexMap<String, String>,
    /// Parameters without which a client is refused.
    pub(crate) required: Vec<String>,
}

/// A metric and its key columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Metric {
    /// The pipeline's name.
    pub(crate) name: String,
    /// Its key columns, in order.
    pub(crate) keys: Vec<String>,
}

/// Wanted values by key column (its place among the metric's keys). All columns must match; none is all rows.
pub(crate) type Where = BTreeMap<usize, BTreeSet<Box<str>>>;

/// Which rows of one metric a client wants: those that match any of the alternatives.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Filter(Vec<Where>);

impl Filter {
    /// Whether it lets every row pass.
    pub(crate) fn is_everything(&self) -> bool {
        self.0.iter().any(BTreeMap::is_empty)
    }

    /// Whether a row passes, given the text of its key columns.
    pub(crate) fn matches<'a>(&self, value: impl Fn(usize) -> &'a str) -> bool {
        self.0.iter().any(|columns| columns.iter().all(|(&column, wanted)| wanted.contains(value(column))))
    }

    /// The alternatives.
    pub(crate) fn alternatives(&self) -> &[Where] {
        &self.0
    }

    /// Widens the filter by `more`; a filter that let everything pass is narrowed to `more`.
    fn add(&mut self, more: Where) {
        if more.is_empty() || self.is_everything() {
            self.0 = vec![more];
            return;
        }
        // Alternatives on the same single column are one, so that values can be taken back one by one.
        let is_same = |has: &Where| more.len() == 1 && has.len() == 1 && has.keys().eq(more.keys());
        match self.0.iter().position(is_same) {
            Some(same) => {
                for (column, values) in more {
                    self.0[same].entry(column).or_default().extend(values);
                }
            }
            None if self.0.contains(&more) => {}
            None => self.0.push(more),
        }
        self.0.sort_unstable();
    }

    /// Takes `less` back. False if it was not there.
    fn remove(&mut self, less: &Where) -> bool {
        if let Some((column, values)) = less.first_key_value().filter(|_| less.len() == 1) {
            let same = self.0.iter_mut().find(|has| has.len() == 1 && has.contains_key(column));
            let Some(has) = same.and_then(|has| has.get_mut(column)) else { return false };
            let before = has.len();
            has.retain(|value| !values.contains(value));
            let removed = has.len() < before;
            self.0.retain(|has| has.values().all(|values| !values.is_empty()));
            return removed;
        }
        let before = self.0.len();
        self.0.retain(|has| has != less);
        self.0.len() < before
    }

    fn is_nothing(&self) -> bool {
        self.0.is_empty()
    }

    fn values(&self) -> usize {
        self.0.iter().flat_map(BTreeMap::values).map(BTreeSet::len).sum()
    }
}

/// What one client wants: metrics by their place in the catalog, each with its filter.
pub(crate) type Subscription = BTreeMap<usize, Filter>;

/// The place in a sink's frames up to which a client has seen them: `EPOCH:SEQ`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Since {
    /// The epoch.
    pub(crate) epoch: String,
    /// The sequence number of the last frame.
    pub(crate) seq: u64,
}

impl Since {
    /// Reads `EPOCH:SEQ`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (epoch, seq) = text.rsplit_once(':')?;
        Some(Self { epoch: epoch.to_owned(), seq: seq.parse().ok()? })
    }
}

/// Why a client's wish cannot be met, for the client to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal(pub(crate) String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A client's change of its subscription, over WebSocket.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Change {
    /// The metric's name.
    pub(crate) metric: String,
    /// Column or parameter name, and the wanted value or list of values.
    #[serde(default, rename = "where")]
    pub(crate) columns: serde_json::Map<String, Value>,
}

/// What a WebSocket client may send as JSON.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum ClientMessage {
    /// Rows of a metric are wanted.
    Subscribe(Change),
    /// Rows of a metric are wanted no longer.
    Unsubscribe(Change),
    /// Answered by a pong.
    Ping {},
}

impl Catalog {
    /// What the parameters of a connection ask for.
    pub(crate) fn subscription(
        &self,
        parameters: &[(String, String)],
    ) -> Result<(Subscription, Option<Since>), Refusal> {
        let mut named: Option<BTreeSet<usize>> = None;
        let mut since = None;
        let mut wanted: BTreeMap<&str, BTreeSet<Box<str>>> = BTreeMap::new();
        for (name, value) in parameters {
            match name.as_str() {
                METRIC => {
                    let named = named.get_or_insert_default();
                    for metric in value.split(',').filter(|metric| !metric.is_empty()) {
                        named.insert(self.metric(metric)?);
                    }
                }
                SINCE => {
                    let wrong = || Refusal(format!("`since` is EPOCH:SEQ of the last frame you have, not `{value}`"));
                    since = Some(Since::parse(value).ok_or_else(wrong)?);
                }
                _ => {
                    let column = self.column(name).ok_or_else(|| self.unknown_parameter(name))?;
                    wanted.entry(column).or_default().extend(value.split(',').map(Box::from));
                }
            }
        }
        self.check_required(&wanted)?;
        let mut subscription = Subscription::new();
        for (index, metric) in self.metrics.iter().enumerate() {
            if named.as_ref().is_some_and(|named| !named.contains(&index)) {
                continue;
            }
            match metric.filter(&wanted) {
                Ok(columns) => drop(subscription.insert(index, Filter(vec![columns]))),
                // Asked for by name, it must have the columns; otherwise it is just none of the wanted ones.
                Err(refusal) if named.is_some() => return Err(refusal),
                Err(_) => {}
            }
        }
        if subscription.is_empty() && !self.metrics.is_empty() {
            let columns: Vec<&str> = wanted.into_keys().collect();
            return Err(Refusal(match columns.as_slice() {
                [] => format!("`metric` names none; {}", self.known_metrics()),
                _ => format!("no metric has all of the key columns {}", listed(columns)),
            }));
        }
        check_values(&subscription)?;
        Ok((subscription, since))
    }

    /// `subscription` with more rows of a metric, and that metric's place.
    pub(crate) fn subscribe(
        &self,
        subscription: &Subscription,
        change: &Change,
    ) -> Result<(usize, Subscription), Refusal> {
        let (metric, columns) = self.change(change)?;
        let mut subscription = subscription.clone();
        subscription
            .entry(metric)
            .and_modify(|filter| filter.add(columns.clone()))
            .or_insert_with(|| Filter(vec![columns]));
        check_values(&subscription)?;
        Ok((metric, subscription))
    }

    /// `subscription` with fewer rows of a metric, and that metric's place.
    pub(crate) fn unsubscribe(
        &self,
        subscription: &Subscription,
        change: &Change,
    ) -> Result<(usize, Subscription), Refusal> {
        // Taking back all of a metric needs no filter, even if subscribing does.
        let (metric, columns) = match change.columns.is_empty() {
            true => (self.metric(&change.metric)?, Where::new()),
            false => self.change(change)?,
        };
        let not_there = || Refusal(format!("you are not subscribed to that of metric `{}`", change.metric));
        let mut subscription = subscription.clone();
        let filter = subscription.get_mut(&metric).ok_or_else(not_there)?;
        if columns.is_empty() {
            subscription.remove(&metric);
            return Ok((metric, subscription));
        }
        if filter.is_everything() {
            let name = &change.metric;
            return Err(Refusal(format!(
                "you have all rows of metric `{name}`; subscribe to the rows you want, or unsubscribe without `where`"
            )));
        }
        if !filter.remove(&columns) {
            return Err(not_there());
        }
        if filter.is_nothing() {
            subscription.remove(&metric);
        }
        Ok((metric, subscription))
    }

    fn change(&self, change: &Change) -> Result<(usize, Where), Refusal> {
        let metric = self.metric(&change.metric)?;
        let mut wanted: BTreeMap<&str, BTreeSet<Box<str>>> = BTreeMap::new();
        for (name, values) in &change.columns {
            let column = self.column(name).ok_or_else(|| self.unknown_parameter(name))?;
            let values = match values {
                Value::Array(values) => values.iter().map(key_text).collect::<Result<_, _>>()?,
                value => BTreeSet::from([key_text(value)?]),
            };
            if values.is_empty() {
                return Err(Refusal(format!("`where` names no value for `{name}`")));
            }
            wanted.entry(column).or_default().extend(values);
        }
        self.check_required(&wanted)?;
        Ok((metric, self.metrics[metric].filter(&wanted)?))
    }

    fn check_required(&self, wanted: &BTreeMap<&str, BTreeSet<Box<str>>>) -> Result<(), Refusal> {
        for name in &self.required {
            let values = self.column(name).and_then(|column| wanted.get(column));
            if !values.is_some_and(|values| values.iter().any(|value| !value.is_empty())) {
                return Err(Refusal(format!("`{name}` is required: `?{name}=VALUE,VALUE`")));
            }
        }
        Ok(())
    }

    fn metric(&self, name: &str) -> Result<usize, Refusal> {
        self.metrics
            .iter()
            .position(|metric| metric.name == name)
            .ok_or_else(|| Refusal(format!("no metric `{name}` here; {}", self.known_metrics())))
    }

    /// The key column behind a parameter.
    fn column<'a>(&'a self, parameter: &'a str) -> Option<&'a str> {
        if let Some(column) = self.params.get(parameter) {
            return Some(column);
        }
        self.metrics.iter().flat_map(|metric| &metric.keys).find(|key| *key == parameter).map(String::as_str)
    }

    fn known_metrics(&self) -> String {
        match self.metrics.is_empty() {
            true => "there is none".into(),
            false => format!("there is {}", listed(self.metrics.iter().map(|metric| metric.name.as_str()))),
        }
    }

    fn unknown_parameter(&self, name: &str) -> Refusal {
        let keys = self.metrics.iter().flat_map(|metric| &metric.keys).map(String::as_str);
        let known: BTreeSet<&str> = keys.chain(self.params.keys().map(String::as_str)).chain([METRIC, SINCE]).collect();
        let hint = did_you_mean(name, &known).unwrap_or_default();
        Refusal(format!("no parameter or key column `{name}` here; {hint}"))
    }
}

impl Metric {
    /// The filter on this metric's own key columns.
    fn filter(&self, wanted: &BTreeMap<&str, BTreeSet<Box<str>>>) -> Result<Where, Refusal> {
        let place =
            |(column, values): (&&str, &BTreeSet<Box<str>>)| match self.keys.iter().position(|key| key == column) {
                Some(place) => Ok((place, values.clone())),
                None => Err(Refusal(format!("metric `{}` has no key column `{column}`", self.name))),
            };
        wanted.iter().map(place).collect()
    }
}

/// The text of a key value, as it is compared: see [`pipeline::live::KeyText`].
fn key_text(value: &Value) -> Result<Box<str>, Refusal> {
    match value {
        Value::String(text) => Ok(text.as_str().into()),
        Value::Number(number) => Ok(number.to_string().into()),
        Value::Bool(flag) => Ok(flag.to_string().into()),
        Value::Null => Ok("".into()),
        Value::Array(_) | Value::Object(_) => Err(Refusal("a value in `where` is a text, number, bool or null".into())),
    }
}

fn check_values(subscription: &Subscription) -> Result<(), Refusal> {
    let values: usize = subscription.values().map(Filter::values).sum();
    if values > VALUES_MAX {
        return Err(Refusal(format!("{values} values are too many to filter by; at most {VALUES_MAX}")));
    }
    Ok(())
}

fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(required: &[&str]) -> Catalog {
        let metric = |name: &str, keys: &[&str]| Metric {
            name: name.into(),
            keys: keys.iter().map(|key| (*key).into()).collect(),
        };
        Catalog {
            metrics: vec![
                metric("load", &["device_id"]),
                metric("sites", &["site", "device_id"]),
                metric("total", &[]),
            ],
            params: IndexMap::from([("device_ids".to_owned(), "device_id".to_owned())]),
            required: required.iter().map(|name| (*name).into()).collect(),
        }
    }

    /// Which of some rows a query lets pass, or the refusal.
    fn passing(catalog: &Catalog, query: &str) -> Result<Vec<String>, String> {
        let uri: hyper::Uri = format!("/ws?{query}").parse().expect("a URI");
        let parameters = pipeline::http::respond::parameters(&uri);
        let (subscription, _) = catalog.subscription(&parameters).map_err(|refusal| refusal.0)?;
        Ok(rows_passing(&subscription))
    }

    fn rows_passing(subscription: &Subscription) -> Vec<String> {
        let rows: [(usize, &[&str]); 6] =
            [(0, &["A"]), (0, &["B"]), (1, &["north", "A"]), (1, &["north", "B"]), (1, &["south", "A"]), (2, &[])];
        let passes = |metric: usize, key: &[&str]| {
            subscription.get(&metric).is_some_and(|filter| filter.matches(|column| key[column]))
        };
        let shown = |(metric, key): &(usize, &[&str])| format!("{metric}:{}", key.join("/"));
        rows.iter().filter(|(metric, key)| passes(*metric, key)).map(shown).collect()
    }

    #[test]
    fn parameters_choose_metrics_and_rows() {
        let all = ["0:A", "0:B", "1:north/A", "1:north/B", "1:south/A", "2:"];
        for (query, expected) in [
            ("", &all[..]),
            ("metric=load", &["0:A", "0:B"]),
            ("metric=load,total", &["0:A", "0:B", "2:"]),
            ("metric=load&metric=total", &["0:A", "0:B", "2:"]),
            // A metric without the column is no part of the answer.
            ("device_id=A", &["0:A", "1:north/A", "1:south/A"]),
            ("device_ids=A,B&site=north", &["1:north/A", "1:north/B"]),
            ("device_ids=A&device_id=B&metric=load", &["0:A", "0:B"]),
            ("metric=load&device_id=nobody", &[]),
            ("since=e:1&metric=total", &["2:"]),
        ] {
            assert_eq!(passing(&catalog(&[]), query).expect(query), expected, "{query}");
        }
    }

    #[test]
    fn a_wrong_parameter_is_refused_with_the_names_there_are() {
        for (query, expected) in [
            ("metric=lod", "no metric `lod` here; there is `load`, `sites`, `total`"),
            ("metric=", "`metric` names none; there is `load`, `sites`, `total`"),
            ("divice_id=A", "no parameter or key column `divice_id` here; did you mean `device_id`?"),
            ("metric=total&device_id=A", "metric `total` has no key column `device_id`"),
            ("since=now", "`since` is EPOCH:SEQ of the last frame you have, not `now`"),
        ] {
            assert_eq!(passing(&catalog(&[]), query), Err(expected.to_owned()), "{query}");
        }
    }

    #[test]
    fn a_required_parameter_must_have_a_value() {
        let required = catalog(&["device_ids"]);
        for query in ["", "device_ids=", "device_ids=,", "metric=load"] {
            let expected = "`device_ids` is required: `?device_ids=VALUE,VALUE`";
            assert_eq!(passing(&required, query), Err(expected.to_owned()), "{query}");
        }
        assert_eq!(passing(&required, "device_ids=B").expect("a value"), ["0:B", "1:north/B"]);
        assert_eq!(passing(&required, "device_id=B").expect("the column's own name"), ["0:B", "1:north/B"]);
    }

    #[test]
    fn a_client_widens_and_narrows_what_it_has() {
        let catalog = catalog(&[]);
        let mut subscription = catalog.subscription(&[("device_id".into(), "A".into())]).expect("a subscription").0;
        let steps: [(&str, Result<&[&str], &str>); 10] = [
            (
                r#"{"type":"subscribe","metric":"load","where":{"device_id":["B"]}}"#,
                Ok(&["0:A", "0:B", "1:north/A", "1:south/A"]),
            ),
            (
                r#"{"type":"unsubscribe","metric":"load","where":{"device_ids":"A"}}"#,
                Ok(&["0:B", "1:north/A", "1:south/A"]),
            ),
            (
                r#"{"type":"unsubscribe","metric":"load","where":{"device_ids":"A"}}"#,
                Err("you are not subscribed to that of metric `load`"),
            ),
            (r#"{"type":"unsubscribe","metric":"load","where":{"device_id":["B"]}}"#, Ok(&["1:north/A", "1:south/A"])),
            (
                r#"{"type":"subscribe","metric":"sites","where":{"site":"north","device_id":"B"}}"#,
                Ok(&["1:north/A", "1:north/B", "1:south/A"]),
            ),
            (
                r#"{"type":"unsubscribe","metric":"sites","where":{"site":["north"],"device_id":["B"]}}"#,
                Ok(&["1:north/A", "1:south/A"]),
            ),
            (r#"{"type":"subscribe","metric":"sites"}"#, Ok(&["1:north/A", "1:north/B", "1:south/A"])),
            (
                r#"{"type":"unsubscribe","metric":"sites","where":{"site":"north"}}"#,
                Err(
                    "you have all rows of metric `sites`; subscribe to the rows you want, or unsubscribe without `where`",
                ),
            ),
            (r#"{"type":"subscribe","metric":"sites","where":{"site":"south"}}"#, Ok(&["1:south/A"])),
            (r#"{"type":"unsubscribe","metric":"sites"}"#, Ok(&[])),
        ];
        for (text, expected) in steps {
            let message: ClientMessage = serde_json::from_str(text).expect(text);
            let changed = match &message {
                ClientMessage::Subscribe(change) => catalog.subscribe(&subscription, change),
                ClientMessage::Unsubscribe(change) => catalog.unsubscribe(&subscription, change),
                ClientMessage::Ping {} => continue,
            };
            let changed = changed.map(|(_, changed)| subscription = changed).map_err(|refusal| refusal.0);
            let rows = changed.map(|()| rows_passing(&subscription));
            assert_eq!(
                rows,
                expected.map(|e| e.iter().map(|row| (*row).to_owned()).collect()).map_err(str::to_owned),
                "{text}"
            );
        }
    }

    #[test]
    fn a_client_cannot_name_values_without_end() {
        let catalog = catalog(&[]);
        let values: Vec<String> = (0..=VALUES_MAX).map(|n| n.to_string()).collect();
        let refused = catalog.subscription(&[("device_id".into(), values.join(","))]);
        assert!(refused.is_err_and(|refusal| refusal.0.contains("too many")));
    }
}
