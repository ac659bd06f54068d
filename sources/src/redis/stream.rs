//! `stream`: the entries of streams, from a position that is kept in the checkpoint.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::config::Fields;
use pipeline::error::{Error, Result};
use pipeline::plugin::source::{PullReader, Pulled, Reader, RowError, Source};
use pipeline::state::{StateReader, StateWriter};

use super::entry::{EntryRows, Layout, entry_of, milliseconds, payload, streams_of, words_of};
use wire::redis::{Command, Connection, Endpoint, PATIENCE, Reply};

/// How long the server holds a read back when there is nothing new. New entries end the wait at once, so this
/// only bounds how long a dead connection stays unnoticed.
pub(super) const BLOCK: Duration = Duration::from_secs(5);

/// Most entries of one read of one stream: a larger batch gains nothing, a smaller one costs round trips.
pub(super) const ENTRIES_MAX: usize = 2048;

/// How often the server is asked whether entries were trimmed before they were read.
const EXAMINE_EVERY: Duration = Duration::from_secs(5);

/// Entries that `pipeline fields` looks at.
const DISCOVER_ENTRIES: usize = 100;

/// Where to begin at the very first start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// With entries added from now on.
    Latest,
    /// With the oldest entry.
    Earliest,
    /// After the entry with this id.
    After(String),
}

impl Start {
    pub(super) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "latest" => Self::Latest,
            "earliest" => Self::Earliest,
            id if milliseconds(id).is_some() => Self::After(id.to_owned()),
            _ => return None,
        })
    }
}

/// The source in this mode.
pub(super) struct StreamSource {
    pub(super) endpoint: Endpoint,
    pub(super) streams: Vec<String>,
    pub(super) start: Start,
    pub(super) layout: Layout,
    pub(super) name: String,
    /// Where the last reader began, for a connection that is lost before it gave a position with all streams.
    pub(super) begun: Option<Vec<Place>>,
    pub(super) warned: bool,
}

#[async_trait]
impl Source for StreamSource {
    async fn connect(&mut self, position: Option<&[u8]>) -> Result<Reader> {
        let mut connection = self.endpoint.connect(1).await?;
        super::warn_if_volatile(&mut connection, &self.name, &mut self.warned).await?;
        let known = position.map(decode_position).transpose()?.unwrap_or_default();
        for place in known.iter().filter(|_| self.begun.is_none()).filter(|place| !self.streams.contains(&place.stream))
        {
            tracing::warn!(
                source = self.name,
                stream = place.stream,
                id = place.id,
                "this stream is read no more: its position is dropped"
            );
        }
        let begun_before = self.begun.clone().unwrap_or_default();
        let is_known = |stream: &String| known.iter().any(|place| place.stream == *stream);
        let (mut places, mut begun) = (Vec::new(), Vec::new());
        let mut errors = Vec::new();
        for stream in &self.streams {
            let info = info(&mut connection, stream).await?;
            let mut place = match known.iter().chain(&begun_before).find(|place| place.stream == *stream) {
                Some(place) => place.clone(),
                None => Place::first(stream, &self.start, info.as_ref()),
            };
            let before = place.clone();
            let error = place.examine(&connection, info.as_ref())?;
            // What was found missing is told again unless the engine takes the position that knows of it.
            begun.push(if error.is_some() { before } else { place.clone() });
            errors.extend(error);
            places.push(place);
        }
        self.begun = Some(begun);
        Ok(Reader::Pull(Box::new(StreamReader {
            connection,
            places,
            // The engine learns the beginning even if no entry comes before a restart.
            announce: !self.streams.iter().all(is_known) || !errors.is_empty(),
            errors,
            rows: EntryRows::new(self.layout.clone()),
            examined: Instant::now(),
        })))
    }
}

/// The id before every entry.
const BEFORE_ALL: &str = "0-0";

/// Where a stream has been read to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    stream: String,
    /// Of the last entry read.
    id: String,
    /// How many entries the stream was given up to there, gone ones among them; `None` if that is not known.
    given: Option<u64>,
}

impl Place {
    /// The one at the very first start.
    fn first(stream: &str, start: &Start, info: Option<&Info>) -> Self {
        let id = match start {
            Start::Earliest => BEFORE_ALL.to_owned(),
            Start::After(id) => id.clone(),
            Start::Latest => info.map_or(BEFORE_ALL, |info| &info.last).to_owned(),
        };
        Self { stream: stream.to_owned(), id, given: None }
    }

    /// Looks for what is missing after this place, and notes how many entries there have been up to it, if that can be told.
    /// A stream that ends before the place is an error: nothing would ever be read from it.
    fn examine(&mut self, connection: &Connection, info: Option<&Info>) -> Result<Option<RowError>> {
        let Self { stream, id, given } = self;
        let missing = match info {
            Some(info) => missing(*given, id, info),
            None if given.is_some_and(|given| given > 0) => Missing::Unknown(Some(0)),
            None => Missing::Nothing(Some(0)),
        };
        let (message, known) = match missing {
            Missing::Nothing(known) => {
                *given = known;
                return Ok(None);
            }
            Missing::SetBack(last) => {
                return Err(connection.error(format!(
                    "stream `{stream}` ends at {last}, before {id}, the last entry read: it was deleted and began anew with \
                     smaller ids, or the server lost writes; entries up to {id} are not read again, so give the source \
                     another name to begin at `start`"
                )));
            }
            Missing::Entries(count, known) => {
                (format!("{stream}: {count} entries after {id} were trimmed or deleted before they were read"), known)
            }
            Missing::Unknown(known) => {
                let what = "the stream was deleted, or the server lost writes";
                (format!("{stream}: {what}: what came after {id} and was not read is lost"), known)
            }
        };
        *given = known;
        Ok(Some(RowError::new(message, &[])))
    }
}

/// What a server says of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Info {
    length: u64,
    /// Id of the last entry that was ever added.
    last: String,
    /// Id of the oldest entry that is there.
    first: Option<String>,
    /// How many entries were ever added. Servers before Redis 7 do not count them.
    added: Option<u64>,
}

/// Asks about a stream; `None` if there is none.
async fn info(connection: &mut Connection, stream: &str) -> Result<Option<Info>> {
    let command = Command::new("XINFO").args(["STREAM".to_owned(), stream.to_owned()]);
    let pairs = match connection.call(command, PATIENCE).await? {
        Reply::Error(words) if words.contains("no such key") => return Ok(None),
        Reply::List(pairs) => pairs,
        other => return Err(connection.error(format!("stream `{stream}`: {}", words_of(&other)))),
    };
    let value = |name| pairs.chunks_exact(2).find(|pair| pair[0].as_str() == Some(name)).map(|pair| &pair[1]);
    let number = |name| match value(name) {
        Some(Reply::Int(number)) => u64::try_from(*number).ok(),
        _ => None,
    };
    let first = value("first-entry").and_then(|entry| entry_of(entry.clone())).map(|(id, _)| id);
    match (number("length"), value("last-generated-id").and_then(Reply::as_str)) {
        (Some(length), Some(last)) => {
            Ok(Some(Info { length, last: last.to_owned(), first, added: number("entries-added") }))
        }
        _ => Err(connection.error("XINFO STREAM without length and last-generated-id")),
    }
}

/// What is missing after a place.
#[derive(Debug, PartialEq, Eq)]
enum Missing {
    /// Nothing that can be told; with the number of entries up to the place.
    Nothing(Option<u64>),
    /// So many entries; with the number of entries up to where they were.
    Entries(u64, Option<u64>),
    /// It is another stream than it was, or an older state of it.
    Unknown(Option<u64>),
    /// It ends before the place, with this id.
    SetBack(String),
}

/// Compares what was read with what there was. `given` entries were added up to and with the one of `id`.
fn missing(given: Option<u64>, id: &str, info: &Info) -> Missing {
    let place = number_of(id);
    let last = number_of(&info.last);
    if last < place {
        return Missing::SetBack(info.last.clone());
    }
    let Some(added) = info.added else { return Missing::Nothing(None) };
    let is_after = |first: &String| number_of(first) > place;
    let before_the_next = if last == place {
        Some(added)
    } else if info.first.as_ref().is_none_or(is_after) {
        // All that is there comes after the place, so what is not there came before the next entry.
        Some(added.saturating_sub(info.length))
    } else {
        None
    };
    match (given, before_the_next) {
        (Some(given), Some(before)) if before > given => Missing::Entries(before - given, Some(before)),
        (Some(given), Some(before)) if before < given => Missing::Unknown(Some(before)),
        // There is at least one entry after the place.
        (Some(given), None) if added <= given => Missing::Unknown(None),
        (given, before) => Missing::Nothing(before.or(given)),
    }
}

/// An id in the order of ids.
pub(super) fn number_of(id: &str) -> (u64, u64) {
    let (time, sequence) = id.split_once('-').unwrap_or((id, "0"));
    (time.parse().unwrap_or_default(), sequence.parse().unwrap_or_default())
}

struct StreamReader {
    connection: Connection,
    places: Vec<Place>,
    announce: bool,
    /// What was missing at connect.
    errors: Vec<RowError>,
    rows: EntryRows,
    /// When the server was last asked what is missing.
    examined: Instant,
}

#[async_trait]
impl PullReader for StreamReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        let mut errors = std::mem::take(&mut self.errors);
        if !std::mem::take(&mut self.announce) {
            for (stream, entries) in self.read().await? {
                let place = self.places.iter_mut().find(|place| place.stream == stream);
                let place = place.ok_or_else(|| self.connection.error(format!("entries of `{stream}`, unasked")))?;
                for entry in entries {
                    let (id, fields) = entry_of(entry).ok_or_else(|| self.connection.error("an entry without id"))?;
                    if let Err(message) = self.rows.take(&stream, &id, &fields) {
                        errors.push(RowError::new(format!("{stream} {id}: {message}"), payload(&fields).as_bytes()));
                    }
                    place.id = id;
                    place.given = place.given.map(|given| given + 1);
                }
            }
            if self.examined.elapsed() >= EXAMINE_EVERY {
                errors.extend(self.examine().await?);
            }
        }
        Ok(Some(Pulled { rows: self.rows.finish()?, errors, position: encode_position(&self.places), more: false }))
    }
}

impl StreamReader {
    /// Entries after the places, per stream; none if nothing came while the server waited.
    async fn read(&mut self) -> Result<Vec<(String, Vec<Reply>)>> {
        let count = (BATCH_ROWS_MAX / self.places.len().max(1)).clamp(1, ENTRIES_MAX);
        let command = Command::new("XREAD")
            .args(["COUNT".to_owned(), count.to_string(), "BLOCK".to_owned(), BLOCK.as_millis().to_string()])
            .arg("STREAMS")
            .args(self.places.iter().map(|place| place.stream.clone()))
            .args(self.places.iter().map(|place| place.id.clone()));
        let reply = self.connection.call(command, BLOCK + PATIENCE).await?;
        streams_of(reply).map_err(|words| self.connection.error(words))
    }

    /// What is missing in the streams after their places.
    async fn examine(&mut self) -> Result<Vec<RowError>> {
        self.examined = Instant::now();
        let mut errors = Vec::new();
        for place in &mut self.places {
            let info = info(&mut self.connection, &place.stream).await?;
            errors.extend(place.examine(&self.connection, info.as_ref())?);
        }
        Ok(errors)
    }
}

fn encode_position(places: &[Place]) -> Vec<u8> {
    let mut state = StateWriter::default();
    state.u64(places.len() as u64);
    for place in places {
        state.str(&place.stream);
        state.str(&place.id);
    }
    for place in places {
        state.bool(place.given.is_some());
        state.u64(place.given.unwrap_or_default());
    }
    state.finish()
}

fn decode_position(bytes: &[u8]) -> Result<Vec<Place>> {
    let mut state = StateReader::new(bytes);
    let place = |state: &mut StateReader<'_>| {
        Ok(Place { stream: state.str()?.to_owned(), id: state.str()?.to_owned(), given: None })
    };
    let mut places = (0..state.count()?).map(|_| place(&mut state)).collect::<Result<Vec<_>>>()?;
    // Earlier positions end here.
    if !state.is_empty() {
        for place in &mut places {
            let is_known = state.bool()?;
            place.given = Some(state.u64()?).filter(|_| is_known);
        }
    }
    Ok(places)
}

/// Guesses the fields from the newest entries.
pub(super) async fn discover(endpoint: &Endpoint, streams: &[String], json: Option<&str>) -> Result<Fields> {
    let mut connection = endpoint.connect(1).await?;
    let mut guesses = super::Guesses::default();
    for stream in streams {
        let newest = ["+".to_owned(), "-".to_owned(), "COUNT".to_owned(), DISCOVER_ENTRIES.to_string()];
        let command = Command::new("XREVRANGE").arg(stream.clone()).args(newest);
        let entries = match connection.call(command, PATIENCE).await? {
            Reply::List(entries) => entries,
            other => return Err(connection.error(format!("stream `{stream}`: {}", words_of(&other)))),
        };
        for (_, fields) in entries.into_iter().filter_map(entry_of) {
            for pair in fields.chunks_exact(2) {
                let (Some(name), Some(value)) = (pair[0].as_str(), pair[1].as_str()) else { continue };
                match json {
                    None => guesses.see(name, super::guess(value)),
                    Some(json) if json == name => guesses.see_json(value),
                    Some(_) => {}
                }
            }
        }
    }
    guesses.fields().ok_or_else(|| Error::user("no entry to look at: add one, then ask again"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_a_word_or_an_id() {
        for (text, expected) in [
            ("latest", Some(Start::Latest)),
            ("earliest", Some(Start::Earliest)),
            ("1700000000000-3", Some(Start::After("1700000000000-3".to_owned()))),
            ("1700000000000", Some(Start::After("1700000000000".to_owned()))),
            ("newest", None),
            ("1-", None),
            ("$", None),
        ] {
            assert_eq!(Start::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn positions_read_back_and_damage_is_an_error() {
        let place = |stream: &str, id: &str, given| Place { stream: stream.to_owned(), id: id.to_owned(), given };
        let places = vec![place("a", "1-0", Some(7)), place("b", BEFORE_ALL, None)];
        let bytes = encode_position(&places);
        assert_eq!(decode_position(&bytes).expect("places"), places);
        assert!(decode_position(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn what_is_missing_is_told_by_the_counts_and_the_ids() {
        use Missing::{Entries, Nothing, SetBack, Unknown};
        // Length, first and last id, entries ever added.
        let info = |length, first: &str, last: &str, added| Info {
            length,
            first: Some(first.to_owned()).filter(|first| !first.is_empty()),
            last: last.to_owned(),
            added,
        };
        for (case, given, id, info, expected) in [
            ("all read", Some(9), "9-0", info(3, "7-0", "9-0", Some(9)), Nothing(Some(9))),
            ("all read, learned", None, "9-0", info(3, "7-0", "9-0", Some(9)), Nothing(Some(9))),
            ("trimmed after reading", Some(7), "7-0", info(2, "8-0", "9-0", Some(9)), Nothing(Some(7))),
            ("two trimmed", Some(5), "5-0", info(2, "8-0", "9-0", Some(9)), Entries(2, Some(7))),
            ("ids of any size", Some(5), "50-3", info(2, "100-0", "101-0", Some(9)), Entries(2, Some(7))),
            ("all trimmed", Some(5), "5-0", info(0, "", "9-0", Some(9)), Entries(4, Some(9))),
            ("some to read", Some(7), "7-0", info(5, "5-0", "9-0", Some(9)), Nothing(Some(7))),
            ("the first start", None, BEFORE_ALL, info(2, "8-0", "9-0", Some(9)), Nothing(Some(7))),
            ("in the middle", None, "7-0", info(5, "5-0", "9-0", Some(9)), Nothing(None)),
            ("anew", Some(7), "7-0", info(2, "8-0", "9-0", Some(2)), Unknown(Some(0))),
            ("anew with a smaller id", Some(7), "7-0", info(2, "5-0", "9-0", Some(2)), Unknown(None)),
            ("set back", Some(7), "7-0", info(2, "1-0", "2-0", Some(2)), SetBack("2-0".to_owned())),
            ("an old server", None, "5-0", info(2, "8-0", "9-0", None), Nothing(None)),
        ] {
            assert_eq!(missing(given, id, &info), expected, "{case}");
        }
    }
}
