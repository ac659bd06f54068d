//! What a source remembers of its session with the broker: its client id and what it subscribed to.
//!
//! A small file in the state folder, so that the client id stays the same through restarts (the broker keeps
//! messages under it) and differs between installations (two clients of one id throw each other out).

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use pipeline::error::{Error, Result};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Hexadecimal digits of the random part of a client id; enough for all installations at one broker.
const SUFFIX_DIGITS: usize = 12;

/// The file's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Session {
    pub(super) client_id: String,
    /// What the broker last confirmed; empty before that.
    #[serde(default)]
    subscribed: Subscribed,
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
        let stored = match std::fs::read(path) {
            Ok(bytes) => Some(serde_json::from_slice::<Self>(&bytes).map_err(|e| {
                let message = format!("{} is damaged; without it the source starts a new session", path.display());
                Error::outside(message).because(e).fatal()
            })?),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::outside(format!("cannot read {}", path.display())).because(error)),
        };
        match (stored, client_id) {
            (Some(session), None) => Ok(session),
            (Some(session), Some(id)) if session.client_id == id => Ok(session),
            (_, id) => {
                let client_id = id.map_or_else(|| new_client_id(source), str::to_owned);
                let session = Self { client_id, subscribed: Subscribed::default(), sessions: 0 };
                session.store(path)?;
                Ok(session)
            }
        }
    }

    /// Replaces the file in one step.
    fn store(&self, path: &Path) -> Result<()> {
        let failed = |e: std::io::Error| Error::outside(format!("cannot write {}", path.display())).because(e);
        let text = serde_json::to_vec(self).map_err(|e| Error::internal("client id").because(e))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(failed)?;
        let next = path.with_extension("id.next");
        let mut file = File::create(&next).map_err(failed)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed)?;
        std::fs::rename(&next, path).map_err(failed)?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
    }

    /// What to ask for so that `wanted` is subscribed. A session that the broker kept is left alone as far as
    /// it fits: to subscribe again would bring every retained message again.
    pub(super) fn change(&self, present: bool, wanted: &Subscribed) -> Change {
        let had = &self.subscribed;
        if !present || had.server != wanted.server {
            return Change { subscribe: wanted.filters.clone(), unsubscribe: Vec::new() };
        }
        let missing = |filter: &&String| had.qos != wanted.qos || !had.filters.contains(filter);
        Change {
            subscribe: wanted.filters.iter().filter(missing).cloned().collect(),
            unsubscribe: had.filters.iter().filter(|f| !wanted.filters.contains(f)).cloned().collect(),
        }
    }

    /// Whether the broker had a subscription of this client before, as far as we know.
    pub(super) fn was_subscribed(&self, server: &str) -> bool {
        self.subscribed.server == server
    }

    /// The session after the broker confirmed `wanted`; `present` says whether it had kept the one before.
    pub(super) fn subscribed(mut self, present: bool, wanted: Subscribed, path: &Path) -> Result<Self> {
        if !present || self.subscribed != wanted {
            self.sessions = self.sessions.wrapping_add(u32::from(!present));
            self.subscribed = wanted;
            self.store(path)?;
        }
        Ok(self)
    }
}

fn new_client_id(source: &str) -> String {
    let random = Uuid::new_v4().simple().to_string();
    format!("tailwater-{source}-{}", &random[..SUFFIX_DIGITS])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subscribed(server: &str, qos: u8, filters: &[&str]) -> Subscribed {
        Subscribed { server: server.into(), qos, filters: filters.iter().map(|f| (*f).to_owned()).collect() }
    }

    #[test]
    fn a_kept_session_is_asked_only_for_what_changed() {
        let session = Session { client_id: "id".into(), subscribed: subscribed("host:1", 1, &["a", "b"]), sessions: 1 };
        for (present, wanted, subscribe, unsubscribe) in [
            (true, subscribed("host:1", 1, &["a", "b"]), vec![], vec![]),
            (true, subscribed("host:1", 1, &["b", "c"]), vec!["c"], vec!["a"]),
            (true, subscribed("host:1", 2, &["a"]), vec!["a"], vec!["b"]),
            (true, subscribed("other:1", 1, &["a"]), vec!["a"], vec![]),
            (false, subscribed("host:1", 1, &["a", "b"]), vec!["a", "b"], vec![]),
        ] {
            let change = session.change(present, &wanted);
            assert_eq!((change.subscribe, change.unsubscribe), (owned(&subscribe), owned(&unsubscribe)), "{wanted:?}");
        }
    }

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn client_ids_differ_and_name_the_source() {
        let (one, other) = (new_client_id("devices"), new_client_id("devices"));
        assert!(one != other && one.starts_with("tailwater-devices-"), "{one} {other}");
    }
}
