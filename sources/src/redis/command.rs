//! The commands that a poll may run: their text, and what they reply.

use pipeline::config::did_you_mean;
use pipeline::schema::FieldType;

/// What a command replies, and so the type of its column unless `fields` says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// A whole number, or nothing.
    Int,
    /// A number as text, or nothing.
    Float,
    /// Text, or nothing.
    Text,
    /// Names and values in turn: an object. An empty one is a missing key.
    Pairs,
    /// A list, perhaps of lists: an array.
    List,
    /// The text of `INFO`: an object of its `name:value` lines.
    Info,
}

impl Shape {
    /// The column's type if `fields` does not say one.
    pub(super) fn default_type(self) -> FieldType {
        match self {
            Self::Int => FieldType::Int,
            Self::Float => FieldType::Float,
            Self::Text => FieldType::String,
            Self::Pairs | Self::List | Self::Info => FieldType::Json,
        }
    }
}

/// Every command that a poll may run: none of them writes, waits, or goes through all keys. With its fewest
/// and most arguments, and what it replies.
const READS: &[(&str, usize, usize, Shape)] = &[
    // Keys
    ("EXISTS", 1, ANY, Shape::Int),
    ("TYPE", 1, 1, Shape::Text),
    ("TTL", 1, 1, Shape::Int),
    ("PTTL", 1, 1, Shape::Int),
    ("EXPIRETIME", 1, 1, Shape::Int),
    ("PEXPIRETIME", 1, 1, Shape::Int),
    ("RANDOMKEY", 0, 0, Shape::Text),
    ("OBJECT ENCODING", 1, 1, Shape::Text),
    ("OBJECT FREQ", 1, 1, Shape::Int),
    ("OBJECT IDLETIME", 1, 1, Shape::Int),
    ("OBJECT REFCOUNT", 1, 1, Shape::Int),
    ("MEMORY USAGE", 1, 3, Shape::Int),
    // Strings
    ("GET", 1, 1, Shape::Text),
    ("MGET", 1, ANY, Shape::List),
    ("STRLEN", 1, 1, Shape::Int),
    ("GETRANGE", 3, 3, Shape::Text),
    ("GETBIT", 2, 2, Shape::Int),
    ("BITCOUNT", 1, 4, Shape::Int),
    ("BITPOS", 2, 5, Shape::Int),
    // Hashes
    ("HGET", 2, 2, Shape::Text),
    ("HMGET", 2, ANY, Shape::List),
    ("HGETALL", 1, 1, Shape::Pairs),
    ("HLEN", 1, 1, Shape::Int),
    ("HEXISTS", 2, 2, Shape::Int),
    ("HSTRLEN", 2, 2, Shape::Int),
    ("HKEYS", 1, 1, Shape::List),
    ("HVALS", 1, 1, Shape::List),
    // Lists
    ("LLEN", 1, 1, Shape::Int),
    ("LINDEX", 2, 2, Shape::Text),
    ("LRANGE", 3, 3, Shape::List),
    ("LPOS", 2, 6, Shape::Int),
    // Sets
    ("SCARD", 1, 1, Shape::Int),
    ("SISMEMBER", 2, 2, Shape::Int),
    ("SMISMEMBER", 2, ANY, Shape::List),
    ("SMEMBERS", 1, 1, Shape::List),
    ("SRANDMEMBER", 1, 1, Shape::Text),
    ("SINTERCARD", 2, ANY, Shape::Int),
    // Sorted sets
    ("ZCARD", 1, 1, Shape::Int),
    ("ZCOUNT", 3, 3, Shape::Int),
    ("ZLEXCOUNT", 3, 3, Shape::Int),
    ("ZSCORE", 2, 2, Shape::Float),
    ("ZMSCORE", 2, ANY, Shape::List),
    ("ZRANK", 2, 2, Shape::Int),
    ("ZREVRANK", 2, 2, Shape::Int),
    ("ZRANGE", 3, ANY, Shape::List),
    ("ZREVRANGE", 3, 4, Shape::List),
    ("ZRANGEBYSCORE", 3, 7, Shape::List),
    ("ZINTERCARD", 2, ANY, Shape::Int),
    // Streams
    ("XLEN", 1, 1, Shape::Int),
    ("XRANGE", 3, 5, Shape::List),
    ("XREVRANGE", 3, 5, Shape::List),
    ("XPENDING", 2, ANY, Shape::List),
    ("XINFO STREAM", 1, 1, Shape::Pairs),
    ("XINFO GROUPS", 1, 1, Shape::List),
    ("XINFO CONSUMERS", 2, 2, Shape::List),
    // Sketches and places
    ("PFCOUNT", 1, ANY, Shape::Int),
    ("GEODIST", 3, 4, Shape::Float),
    ("GEOPOS", 1, ANY, Shape::List),
    // The server
    ("DBSIZE", 0, 0, Shape::Int),
    ("LASTSAVE", 0, 0, Shape::Int),
    ("TIME", 0, 0, Shape::List),
    ("PING", 0, 1, Shape::Text),
    ("INFO", 0, ANY, Shape::Info),
    ("CONFIG GET", 1, ANY, Shape::Pairs),
    ("SLOWLOG LEN", 0, 0, Shape::Int),
    ("PUBSUB NUMSUB", 0, ANY, Shape::Pairs),
    ("PUBSUB NUMPAT", 0, 0, Shape::Int),
    ("CLIENT LIST", 0, 0, Shape::Text),
];

/// No limit on the number of arguments.
const ANY: usize = usize::MAX;

/// Well-known commands that write, wait or stop the server, for a message that says so.
#[rustfmt::skip]
const REFUSED: &[&str] = &[
    "APPEND", "BITFIELD", "BITOP", "BLMOVE", "BLMPOP", "BLPOP", "BRPOP", "BRPOPLPUSH", "BZMPOP", "BZPOPMAX", "BZPOPMIN",
    "COPY", "DECR", "DECRBY", "DEL", "EVAL", "EVALSHA", "EXEC", "EXPIRE", "EXPIREAT", "FCALL", "FLUSHALL", "FLUSHDB",
    "GEOADD", "GETDEL", "GETEX", "GETSET", "HDEL", "HINCRBY", "HINCRBYFLOAT", "HMSET", "HSET", "HSETNX", "INCR", "INCRBY",
    "INCRBYFLOAT", "KEYS", "LINSERT", "LMOVE", "LMPOP", "LPOP", "LPUSH", "LPUSHX", "LREM", "LSET", "LTRIM", "MIGRATE",
    "MONITOR", "MOVE", "MSET", "MSETNX", "MULTI", "PERSIST", "PEXPIRE", "PFADD", "PFMERGE", "PSETEX", "PSUBSCRIBE",
    "PUBLISH", "RENAME", "RESTORE", "RPOP", "RPOPLPUSH", "RPUSH", "RPUSHX", "SADD", "SDIFFSTORE", "SET", "SETBIT", "SETEX",
    "SETNX", "SETRANGE", "SHUTDOWN", "SMOVE", "SORT", "SPOP", "SREM", "SUBSCRIBE", "UNLINK", "XADD", "XDEL", "XREAD",
    "XTRIM", "ZADD", "ZINCRBY", "ZPOPMIN", "ZREM", "ZREMRANGEBYSCORE",
];

/// A command of a poll, split into words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReadCommand {
    /// The words, first the command.
    pub(super) words: Vec<String>,
    /// What it replies.
    pub(super) shape: Shape,
}

/// What is wrong with the text of a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CommandError {
    /// Character in the text, from 0.
    pub(super) offset: usize,
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

impl ReadCommand {
    /// Reads `GET key`, `HGET "a hash" field`: words as a shell splits them.
    pub(super) fn parse(text: &str) -> Result<Self, CommandError> {
        let words = split(text)?;
        let Some((first, offset)) = words.first() else {
            let hint = Some("such as `GET key`".to_owned());
            return Err(CommandError { offset: 0, message: "a command is missing".to_owned(), hint });
        };
        let (offset, upper) = (*offset, first.to_uppercase());
        let is_group = READS.iter().any(|(name, ..)| name.split_once(' ').is_some_and(|(group, _)| group == upper));
        let (name, own_words) = match words.get(1) {
            Some((second, _)) if is_group => (format!("{upper} {}", second.to_uppercase()), 2),
            _ => (upper, 1),
        };
        let Some((_, least, most, shape)) = READS.iter().find(|(known, ..)| *known == name) else {
            return Err(unknown(&name, offset));
        };
        let given = words.len() - own_words;
        if !(*least..=*most).contains(&given) {
            let expected = match (*least, *most) {
                (least, ANY) => format!("at least {least}"),
                (least, most) if least == most => least.to_string(),
                (least, most) => format!("{least} to {most}"),
            };
            let message = format!("`{name}` takes {expected} arguments, here are {given}");
            return Err(CommandError { offset, message, hint: None });
        }
        Ok(Self { words: words.into_iter().map(|(word, _)| word).collect(), shape: *shape })
    }
}

fn unknown(name: &str, offset: usize) -> CommandError {
    if REFUSED.contains(&name) {
        return CommandError {
            offset,
            message: format!("`{name}` is refused: a poll only reads, and what it asks must be answered at once"),
            hint: Some("to write, use a `redis` sink; to take elements, `list`, `stream` or `channels`".to_owned()),
        };
    }
    let hint = did_you_mean(name, READS.iter().map(|(known, ..)| *known));
    CommandError { offset, message: format!("`{name}` is not among the commands that a poll may run"), hint }
}

/// Splits at white space; quotes keep it, a backslash keeps the next character (in single quotes it is plain).
/// Each word comes with the character it starts at.
fn split(text: &str) -> Result<Vec<(String, usize)>, CommandError> {
    let mut words = Vec::new();
    let mut word: Option<(String, usize)> = None;
    let mut characters = text.chars().enumerate();
    while let Some((at, character)) = characters.next() {
        if character.is_whitespace() {
            words.extend(word.take());
            continue;
        }
        let (current, _) = word.get_or_insert_with(|| (String::new(), at));
        match character {
            '\'' | '"' => quoted(character, at, &mut characters, current)?,
            '\\' => current.extend(characters.next().map(|(_, next)| next)),
            plain => current.push(plain),
        }
    }
    words.extend(word);
    Ok(words)
}

fn quoted(
    quote: char,
    start: usize,
    characters: &mut impl Iterator<Item = (usize, char)>,
    word: &mut String,
) -> Result<(), CommandError> {
    while let Some((_, character)) = characters.next() {
        match character {
            end if end == quote => return Ok(()),
            '\\' if quote == '"' => word.extend(characters.next().map(|(_, next)| next)),
            plain => word.push(plain),
        }
    }
    Err(CommandError { offset: start, message: format!("the quote {quote} is not closed"), hint: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_shell_does() {
        for (text, words) in [
            ("GET total_messages", vec!["GET", "total_messages"]),
            ("  hget \"my hash\"  'it is' ", vec!["hget", "my hash", "it is"]),
            (r#"GET "a\"b" "#, vec!["GET", "a\"b"]),
            (r"GET a\ b", vec!["GET", "a b"]),
            (r"GET 'a\b'", vec!["GET", r"a\b"]),
            ("GET ''", vec!["GET", ""]),
            ("GET a'b'c", vec!["GET", "abc"]),
            ("memory usage k", vec!["memory", "usage", "k"]),
        ] {
            assert_eq!(ReadCommand::parse(text).map(|c| c.words), Ok(words.iter().map(|w| (*w).to_owned()).collect()));
        }
    }

    #[test]
    fn a_wrong_command_is_refused_at_its_place() {
        for (text, offset, message, hint) in [
            ("", 0, "a command is missing", "GET key"),
            (" SET a 1", 1, "`SET` is refused: a poll only reads", "sink"),
            ("FLUSHALL", 0, "`FLUSHALL` is refused", "sink"),
            ("blpop q 0", 0, "`BLPOP` is refused", "`list`"),
            ("LLENN q", 0, "`LLENN` is not among", "`LLEN`"),
            ("CONFIG SET a b", 0, "`CONFIG SET` is not among", "CONFIG GET"),
            ("GET", 0, "`GET` takes 1 arguments, here are 0", ""),
            ("MEMORY USAGE", 0, "`MEMORY USAGE` takes 1 to 3 arguments", ""),
            ("GET 'a", 4, "the quote ' is not closed", ""),
        ] {
            let error = ReadCommand::parse(text).expect_err(text);
            assert_eq!(error.offset, offset, "{text}");
            assert!(error.message.starts_with(message), "{text}: {}", error.message);
            assert!(error.hint.unwrap_or_default().contains(hint), "{text}");
        }
    }

    #[test]
    fn replies_have_the_types_that_the_documentation_says() {
        for (text, field_type) in [
            ("LLEN q", FieldType::Int),
            ("ZSCORE z m", FieldType::Float),
            ("GET k", FieldType::String),
            ("HGETALL h", FieldType::Json),
            ("info clients", FieldType::Json),
        ] {
            assert_eq!(ReadCommand::parse(text).map(|c| c.shape.default_type()), Ok(field_type));
        }
    }
}
