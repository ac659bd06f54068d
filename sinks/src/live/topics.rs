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

    /// All members.
    pub(crate) fn members(&self) -> impl Iterator<Item = &Member> {
        self.topics.iter().flatten().flat_map(|topic| topic.members.values())
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
