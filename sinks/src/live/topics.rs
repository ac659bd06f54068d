//! The distinct subscriptions to one metric, and which rows belong to each.
//!
//! Clients with the same filter share one topic, so that their frame is written once. Topics are found by value,
//! so that a row costs the same whether ten or ten thousand clients each watch a device of their own.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use indexmap::IndexMap;
use pipeline::live::KeyColumns;

use super::queue::Client;
use super::subscription::Filter;

/// The topics of one metric.
#[derive(Debug, Default)]
pub(crate) struct Topics {
    /// By number; numbers are used again.
    topics: Vec<Option<Topic>>,
    free: Vec<usize>,
    by_filter: HashMap<Filter, usize>,
    /// The topic that takes every row.
    everything: Option<usize>,
    /// Topics by key column and wanted value, for the first column of each alternative.
    by_value: BTreeMap<usize, HashMap<Box<str>, Vec<usize>>>,
    /// Sequence number of the metric's newest frame.
    pub(crate) newest_seq: u64,
}

/// Clients with the same filter.
#[derive(Debug)]
pub(crate) struct Topic {
    filter: Filter,
    /// By the number of the connection.
    pub(crate) members: IndexMap<u64, Member>,
}

/// A client in a topic.
#[derive(Debug)]
pub(crate) struct Member {
    /// The client.
    pub(crate) client: Arc<Client>,
    /// Its snapshot held the output batches up to this number.
    pub(crate) after: u64,
}

/// The rows of a batch that belong to each topic. Kept from batch to batch, to allocate nothing.
#[derive(Debug, Default)]
pub(crate) struct Picked {
    rows: Vec<Vec<usize>>,
    topics: Vec<usize>,
}

impl Topics {
    /// Whether nobody listens.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_filter.is_empty()
    }

    /// Whether rows must be told apart by their keys.
    pub(crate) fn needs_keys(&self) -> bool {
        !self.by_value.is_empty()
    }

    /// Adds a client.
    pub(crate) fn join(&mut self, filter: &Filter, client: &Arc<Client>, after: u64) {
        let number = match self.by_filter.get(filter) {
            Some(&number) => number,
            None => self.open(filter),
        };
        if let Some(topic) = &mut self.topics[number] {
            topic.members.insert(client.connection.id, Member { client: Arc::clone(client), after });
        }
    }

    /// Removes a client; the last one closes the topic.
    pub(crate) fn leave(&mut self, filter: &Filter, client: &Client) {
        let Some(&number) = self.by_filter.get(filter) else { return };
        let Some(topic) = &mut self.topics[number] else { return };
        topic.members.swap_remove(&client.connection.id);
        if topic.members.is_empty() {
            self.close(number, filter);
        }
    }

    fn open(&mut self, filter: &Filter) -> usize {
        let number = self.free.pop().unwrap_or_else(|| {
            self.topics.push(None);
            self.topics.len() - 1
        });
        self.topics[number] = Some(Topic { filter: filter.clone(), members: IndexMap::new() });
        self.by_filter.insert(filter.clone(), number);
        if filter.is_everything() {
            self.everything = Some(number);
            return number;
        }
        for (column, values) in filter.alternatives().iter().filter_map(|columns| columns.first_key_value()) {
            let by_value = self.by_value.entry(*column).or_default();
            for value in values {
                let topics = by_value.entry(value.clone()).or_default();
                // Two alternatives may begin alike.
                if topics.last() != Some(&number) {
                    topics.push(number);
                }
            }
        }
        number
    }

    fn close(&mut self, number: usize, filter: &Filter) {
        self.topics[number] = None;
        self.free.push(number);
        self.by_filter.remove(filter);
        if self.everything == Some(number) {
            self.everything = None;
            return;
        }
        for (column, values) in filter.alternatives().iter().filter_map(|columns| columns.first_key_value()) {
            let Some(by_value) = self.by_value.get_mut(column) else { continue };
            for value in values {
                if let Some(topics) = by_value.get_mut(value) {
                    topics.retain(|&topic| topic != number);
                    if topics.is_empty() {
                        by_value.remove(value);
                    }
                }
            }
            if by_value.is_empty() {
                self.by_value.remove(column);
            }
        }
    }

    /// Finds the topics of `rows` of a batch. Without `keys` only the topic of every row is found.
    pub(crate) fn pick(&self, rows: Range<usize>, keys: Option<&KeyColumns>, picked: &mut Picked) {
        picked.clear(self.topics.len());
        if let Some(everything) = self.everything {
            picked.topics.push(everything);
            picked.rows[everything].extend(rows.clone());
        }
        let Some(keys) = keys else { return };
        for row in rows {
            for (&column, by_value) in &self.by_value {
                for &number in by_value.get(keys.value(column, row)).into_iter().flatten() {
                    let Some(topic) = &self.topics[number] else { continue };
                    // A topic may be found by several of its alternatives.
                    if picked.rows[number].last() != Some(&row) && topic.filter.matches(|c| keys.value(c, row)) {
                        picked.add(number, row);
                    }
                }
            }
        }
    }

    /// The topics with rows, and their rows in order.
    pub(crate) fn picked<'a>(&'a self, picked: &'a Picked) -> impl Iterator<Item = (&'a Topic, &'a [usize])> {
        picked.topics.iter().filter_map(|&number| Some((self.topics[number].as_ref()?, picked.rows[number].as_slice())))
    }
}

impl Picked {
    fn clear(&mut self, topics: usize) {
        for number in self.topics.drain(..) {
            self.rows[number].clear();
        }
        if self.rows.len() < topics {
            self.rows.resize_with(topics, Vec::new);
        }
    }

    fn add(&mut self, number: usize, row: usize) {
        if self.rows[number].is_empty() {
            self.topics.push(number);
        }
        self.rows[number].push(row);
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{RecordBatch, StringArray};
    use pipeline::batch::{Batch, Stage, Times};
    use pipeline::schema::{FieldType, schema_of};
    use pipeline::status::Connections;

    use super::super::subscription::{Catalog, ClientMessage, Metric};
    use super::*;

    /// Numbers that look random and are the same in every run.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % end
        }
    }

    const KEYS: [&str; 2] = ["site", "device"];

    /// A filter of some alternatives, as a client would build it.
    fn filter(numbers: &mut Numbers) -> Filter {
        let keys = KEYS.map(str::to_owned).to_vec();
        let catalog = Catalog { metrics: vec![Metric { name: "m".into(), keys }], ..Catalog::default() };
        let mut subscription = Default::default();
        for _ in 0..=numbers.below(3) {
            let mut columns = Vec::new();
            for key in KEYS {
                if numbers.below(3) > 0 {
                    columns.push(format!(r#""{key}":["{}",{}]"#, numbers.below(4), numbers.below(4)));
                }
            }
            let text = format!(r#"{{"type":"subscribe","metric":"m","where":{{{}}}}}"#, columns.join(","));
            let Ok(ClientMessage::Subscribe(change)) = serde_json::from_str(&text) else { panic!("{text}") };
            subscription = catalog.subscribe(&subscription, &change).expect("a subscription").1;
        }
        subscription.remove(&0).expect("a filter")
    }

    fn batch(numbers: &mut Numbers) -> Batch {
        let rows = numbers.below(20) as usize;
        let mut column = || StringArray::from_iter_values((0..rows).map(|_| numbers.below(4).to_string()));
        let schema = schema_of(KEYS.map(|key| (key, FieldType::String)));
        let columns = RecordBatch::try_new(schema, vec![Arc::new(column()), Arc::new(column())]).expect("rows");
        Batch::new(columns, Times::constant(0, 0, 0, rows), Stage::Final).expect("a batch")
    }

    #[test]
    fn every_client_finds_exactly_the_rows_that_its_filter_lets_pass() {
        let connections = Connections::default();
        let (mut numbers, mut topics, mut picked) = (Numbers(42), Topics::default(), Picked::default());
        let mut clients: Vec<(Filter, Arc<Client>)> = Vec::new();
        for _ in 0..500 {
            if numbers.below(2) == 0 || clients.is_empty() {
                let client = Arc::new(Client::new(connections.open("live", None, "test"), 1));
                let filter = filter(&mut numbers);
                topics.join(&filter, &client, 0);
                clients.push((filter, client));
            } else {
                let (filter, client) = clients.swap_remove(numbers.below(clients.len() as u64) as usize);
                topics.leave(&filter, &client);
            }
            let batch = batch(&mut numbers);
            let keys = KeyColumns::new(&batch, &KEYS.map(str::to_owned));
            topics.pick(0..batch.len(), topics.needs_keys().then_some(&keys), &mut picked);
            for (filter, client) in &clients {
                let expected: Vec<usize> =
                    (0..batch.len()).filter(|&row| filter.matches(|column| keys.value(column, row))).collect();
                let mut own =
                    topics.picked(&picked).filter(|(topic, _)| topic.members.contains_key(&client.connection.id));
                let found = own.next().map(|(_, rows)| rows.to_vec()).unwrap_or_default();
                assert_eq!(found, expected, "{filter:?}");
                assert!(own.next().is_none(), "one topic per client");
            }
        }
        for (filter, client) in clients {
            topics.leave(&filter, &client);
        }
        assert!(topics.is_empty() && !topics.needs_keys() && topics.everything.is_none());
    }
}
