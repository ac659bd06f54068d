//! The topics of the configuration: MQTT filters in which `{name}` binds one level to a column.

/// Longest topic that MQTT can carry, in bytes.
const TOPIC_BYTES_MAX: usize = 65_535;

/// One entry of `topics:`, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Topic {
    /// What the broker is asked for: `+` stands where a name was.
    pub(super) filter: String,
    levels: Vec<Level>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Level {
    /// Exactly this text.
    Text(String),
    /// Any text, bound to a column.
    Name(String),
    /// `+`: any text.
    One,
    /// `#`: any number of levels, also none.
    Rest,
}

impl Topic {
    /// Takes an entry apart, or says what is wrong and at which character.
    pub(super) fn parse(text: &str) -> Result<Self, (usize, String)> {
        if text.is_empty() || text.len() > TOPIC_BYTES_MAX || text.contains('\0') {
            return Err((0, "a topic has 1 to 65535 bytes and no NUL".into()));
        }
        let shared = shared_prefix(text)?;
        let mut levels = Vec::new();
        let mut at = text[..shared].chars().count();
        let mut parts = text[shared..].split('/').peekable();
        while let Some(part) = parts.next() {
            let level = Level::parse(part).map_err(|message| (at, message))?;
            if level == Level::Rest && parts.peek().is_some() {
                return Err((at, "`#` stands only at the end".into()));
            }
            if matches!(&level, Level::Name(name) if levels.contains(&Level::Name(name.clone()))) {
                return Err((at, format!("`{part}` stands twice in one topic")));
            }
            levels.push(level);
            at += part.chars().count() + 1;
        }
        let words: Vec<&str> = levels.iter().map(Level::in_filter).collect();
        Ok(Self { filter: format!("{}{}", &text[..shared], words.join("/")), levels })
    }

    /// The names it binds, in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.levels.iter().filter_map(|level| match level {
            Level::Name(name) => Some(name.as_str()),
            _ => None,
        })
    }

    /// Whether `topic` is one of these; then `bind` was called for every name with its text. It may be called
    /// for a topic that is none of these, too.
    pub(super) fn matches<'t>(&self, topic: &'t str, mut bind: impl FnMut(&str, &'t str)) -> bool {
        // A wildcard at the start does not stand for the broker's own topics.
        if topic.starts_with('$') && !matches!(self.levels.first(), Some(Level::Text(_))) {
            return false;
        }
        let mut parts = topic.split('/');
        for level in &self.levels {
            if *level == Level::Rest {
                return true;
            }
            match (level, parts.next()) {
                (Level::Text(text), Some(part)) if text == part => {}
                (Level::Name(name), Some(part)) => bind(name, part),
                (Level::One, Some(_)) => {}
                _ => return false,
            }
        }
        parts.next().is_none()
    }
}

impl Level {
    fn parse(part: &str) -> Result<Self, String> {
        match part {
            "+" => return Ok(Self::One),
            "#" => return Ok(Self::Rest),
            _ => {}
        }
        if let Some(name) = part.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
            if !is_name(name) {
                return Err(format!("`{name}` is no column name; write letters, digits and _, as `{{device_id}}`"));
            }
            return Ok(Self::Name(name.to_owned()));
        }
        if part.contains(['+', '#', '{', '}']) {
            return Err(format!("`{part}`: `+`, `#` and `{{name}}` stand for whole levels between slashes"));
        }
        Ok(Self::Text(part.to_owned()))
    }

    fn in_filter(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Name(_) | Self::One => "+",
            Self::Rest => "#",
        }
    }
}

/// Bytes of `$share/GROUP/`, which names a group of clients that share the messages; it is no part of the topic.
fn shared_prefix(text: &str) -> Result<usize, (usize, String)> {
    let Some(rest) = text.strip_prefix("$share/") else { return Ok(0) };
    match rest.split_once('/') {
        Some((group, topic)) if !group.is_empty() && !group.contains(['+', '#', '{', '}']) && !topic.is_empty() => {
            Ok(text.len() - topic.len())
        }
        _ => Err((0, "write `$share/GROUP/TOPIC`".into())),
    }
}

/// Whether it can name a column: `[A-Za-z_][A-Za-z0-9_]*`.
fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_bind_levels_as_mqtt_matches_them() {
        for (text, filter, topic, expected) in [
            ("devices/{id}/telemetry", "devices/+/telemetry", "devices/a b/telemetry", Some(vec![("id", "a b")])),
            ("devices/{id}/telemetry", "devices/+/telemetry", "devices/a/b/telemetry", None),
            ("{a}/{b}", "+/+", "x/", Some(vec![("a", "x"), ("b", "")])),
            ("a/#", "a/#", "a", Some(vec![])),
            ("a/#", "a/#", "a/b/c", Some(vec![])),
            ("a/#", "a/#", "ab", None),
            ("a/+/c", "a/+/c", "a/b/c", Some(vec![])),
            ("a/+", "a/+", "a", None),
            ("#", "#", "$SYS/broker/uptime", None),
            ("{x}/y", "+/y", "$SYS/y", None),
            ("$SYS/#", "$SYS/#", "$SYS/broker/uptime", Some(vec![])),
            ("$share/g/a/{id}", "$share/g/a/+", "a/7", Some(vec![("id", "7")])),
            ("/a", "/a", "/a", Some(vec![])),
            ("a/b", "a/b", "a/b/c", None),
        ] {
            let parsed = Topic::parse(text).expect(text);
            assert_eq!(parsed.filter, filter);
            let mut bound = Vec::new();
            let matched = parsed.matches(topic, |name, part| bound.push((name.to_owned(), part)));
            let found = matched.then(|| bound.iter().map(|(name, part)| (name.as_str(), *part)).collect());
            assert_eq!(found, expected, "{text} on {topic}");
        }
    }

    #[test]
    fn a_wrong_topic_is_told_with_its_place() {
        for (text, at, expected) in [
            ("", 0, "1 to 65535"),
            ("a/#/b", 2, "only at the end"),
            ("a/b+", 2, "whole levels"),
            ("é/x{id}", 2, "whole levels"),
            ("a/{1d}", 2, "no column name"),
            ("{id}/{id}", 5, "twice"),
            ("$share/g", 0, "$share/GROUP/TOPIC"),
        ] {
            let (place, message) = Topic::parse(text).expect_err(text);
            assert!(place == at && message.contains(expected), "{text}: {place} {message}");
        }
    }
}
