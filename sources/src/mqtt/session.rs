//! What a source remembers of its session with the broker: its client id and what it subscribed to.
//!
//! A small file in the state folder, so that the client id stays the same through restarts (the broker keeps
//! messages under it) and differs between installations (two clients of one id throw each other out).

use std::path::{Path, PathBuf};

use pipeline::error::Result;
use serde::{Deserialize, Serialize};

use crate::identity;

/// The file's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Session {
    pub(super) client_id: String,
    /// What the broker last confirmed; empty before that, and when it has begun a new session since.
    #[serde(default)]
    subscribed: Subscribed,
    /// Filters that connections may have asked for since, without a word from the broker that we kept. While there is
    /// such a list, even an empty one, a session that the broker still has may hold them, or nothing at all.
    #[serde(default)]
    unconfirmed: Option<Vec<String>>,
    /// How many sessions the broker has begun for this client: packet ids of different ones have nothing in common.
    #[serde(default)]
    pub(super) sessions: u32,
}

/// A confirmed subscription.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Subscribed {
    /// `HOST:PORT`: another broker knows nothing of it.
    pub(super) server: String,
    pub(super) qos: u8,
    pub(super) filters: Vec<String>,
}

/// What to ask the broker for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) subscribe: Vec<String>,
    pub(super) unsubscribe: Vec<String>,
}

impl Session {
    /// The file of a source.
    pub(super) fn path(state_dir: &Path, source: &str) -> PathBuf {
        state_dir.join(format!("mqtt-{source}.id"))
    }

    /// Reads the file, or makes it at the first start. `client_id` is the one of the configuration.
    pub(super) fn load(path: &Path, source: &str, client_id: Option<&str>) -> Result<Self> {
        let stored = identity::load::<Self>(path, "starts a new session")?;
        match (stored, client_id) {
            (Some(session), None) => Ok(session),
            (Some(session), Some(id)) if session.client_id == id => Ok(session),
            (_, id) => {
                let client_id = id.map_or_else(|| identity::new_name(source), str::to_owned);
                let session = Self { client_id, subscribed: Subscribed::default(), unconfirmed: None, sessions: 0 };
                identity::store(path, &session)?;
                Ok(session)
            }
        }
    }

    /// Notes, before CONNECT leaves, that `wanted` is about to be asked for. The answer may never be read, and the broker
    /// may have begun an empty session all the same; on the next connection it says that it has kept that one.
    pub(super) fn about_to_connect(mut self, wanted: &Subscribed, path: &Path) -> Result<Self> {
        let asked = self.unconfirmed.get_or_insert_default();
        let new: Vec<String> = wanted.filters.iter().filter(|filter| !asked.contains(filter)).cloned().collect();
        asked.extend(new);
        identity::store(path, &self)?;
        Ok(self)
    }

    /// Notes, before SUBSCRIBE leaves, that the broker has begun a new session.
    pub(super) fn begun(mut self, path: &Path) -> Result<Self> {
        self.sessions = self.sessions.wrapping_add(1);
        self.subscribed = Subscribed::default();
        identity::store(path, &self)?;
        Ok(self)
    }

    /// What to ask for so that `wanted` is subscribed. `kept` is this session as it was before the connection, if the
    /// broker still has it; it is left alone as far as it is known to fit: to subscribe again would bring every retained
    /// message again, in version 3.
    pub(super) fn change(kept: Option<&Self>, wanted: &Subscribed) -> Change {
        let Some(kept) = kept else {
            return Change { subscribe: wanted.filters.clone(), unsubscribe: Vec::new() };
        };
        let had = Some(&kept.subscribed).filter(|had| had.server == wanted.server);
        let confirmed = had.filter(|had| had.qos == wanted.qos && kept.unconfirmed.is_none());
        let is_missing = |filter: &&String| confirmed.is_none_or(|had| !had.filters.contains(filter));
        let mut unsubscribe: Vec<String> = Vec::new();
        for filter in had.iter().flat_map(|had| &had.filters).chain(kept.unconfirmed.iter().flatten()) {
            if !wanted.filters.contains(filter) && !unsubscribe.contains(filter) {
                unsubscribe.push(filter.clone());
            }
        }
        Change { subscribe: wanted.filters.iter().filter(is_missing).cloned().collect(), unsubscribe }
    }

    /// Whether the broker had a subscription of this client before, as far as we know.
    pub(super) fn was_subscribed(&self, server: &str) -> bool {
        self.subscribed.server == server
    }

    /// The session after the broker confirmed `wanted`.
    pub(super) fn confirmed(mut self, wanted: Subscribed, path: &Path) -> Result<Self> {
        self.subscribed = wanted;
        self.unconfirmed = None;
        identity::store(path, &self)?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subscribed(server: &str, qos: u8, filters: &[&str]) -> Subscribed {
        Subscribed { server: server.into(), qos, filters: filters.iter().map(|f| (*f).to_owned()).collect() }
    }

    #[test]
    fn a_kept_session_is_asked_only_for_what_changed() {
        for (unconfirmed, wanted, subscribe, unsubscribe) in [
            (None, subscribed("host:1", 1, &["a", "b"]), vec![], vec![]),
            (None, subscribed("host:1", 1, &["b", "c"]), vec!["c"], vec!["a"]),
            (None, subscribed("host:1", 2, &["a"]), vec!["a"], vec!["b"]),
            (None, subscribed("other:1", 1, &["a"]), vec!["a"], vec![]),
            // An earlier connection asked and had no answer: the session may be a new, empty one.
            (Some(vec![]), subscribed("host:1", 1, &["a", "b"]), vec!["a", "b"], vec![]),
            (Some(vec!["a", "x"]), subscribed("host:1", 1, &["a", "b"]), vec!["a", "b"], vec!["x"]),
            (Some(vec!["a", "b"]), subscribed("host:1", 1, &["a"]), vec!["a"], vec!["b"]),
            (Some(vec!["x"]), subscribed("other:1", 1, &["a"]), vec!["a"], vec!["x"]),
        ] {
            let session = Session {
                client_id: "id".into(),
                subscribed: subscribed("host:1", 1, &["a", "b"]),
                unconfirmed: unconfirmed.map(|filters| owned(&filters)),
                sessions: 1,
            };
            let change = Session::change(Some(&session), &wanted);
            assert_eq!((change.subscribe, change.unsubscribe), (owned(&subscribe), owned(&unsubscribe)), "{wanted:?}");
        }
        let change = Session::change(None, &subscribed("host:1", 1, &["a", "b"]));
        assert_eq!((change.subscribe, change.unsubscribe), (owned(&["a", "b"]), vec![]), "a new session");
    }

    #[test]
    fn a_file_of_an_earlier_version_is_a_confirmed_session() {
        let text = r#"{"client_id":"id","subscribed":{"server":"host:1","qos":1,"filters":["a"]},"sessions":3}"#;
        let session: Session = serde_json::from_str(text).expect("a session");
        assert_eq!((session.unconfirmed, session.sessions), (None, 3));
    }

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }
}
