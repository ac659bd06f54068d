//! The options that both live sinks have: defaults, limits and checks.

use indexmap::IndexMap;
use pipeline::config::{At, CheckContext, Duration, did_you_mean};
use pipeline::plugin::{Mount, Promise, SinkInput, SinkShape};

use super::envelope::{Envelope, Wire};
use super::subscription::{METRIC, SINCE};

/// Most frames that may be let wait for a client, by `queue`.
const QUEUE_MAX: usize = 100_000;

/// Shortest keep-alive: more often is a load and proves nothing.
const KEEP_ALIVE_MIN: std::time::Duration = std::time::Duration::from_millis(100);

/// Default of `keep_alive`: half of the minute after which the usual proxies cut a silent connection.
pub(crate) fn default_keep_alive() -> At<Duration> {
    At::nowhere(Duration::from_secs(30))
}

/// Default of `queue`: a second of a hundred emissions a second, and little memory.
pub(crate) fn default_queue() -> At<usize> {
    At::nowhere(100)
}

/// Default of `max_clients`: some 20 kB each, so 200 MB.
pub(crate) fn default_max_clients() -> usize {
    10_000
}

/// The options that both live sinks have, for [`check`].
pub(crate) struct Declared<'a> {
    pub(crate) path: &'a At<String>,
    pub(crate) params: &'a IndexMap<String, At<String>>,
    pub(crate) required: &'a [At<String>],
    pub(crate) keep_alive: &'a At<Duration>,
    pub(crate) queue: &'a At<usize>,
}

/// Checks the options that both live sinks have.
pub(crate) fn check(declared: &Declared<'_>, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
    let errors = cx.errors();
    let path = declared.path;
    if !path.starts_with('/') || path.contains(['?', '#']) || path.contains(char::is_whitespace) {
        let hint = "write it as in a URL: `/ws`".to_owned();
        cx.error_hint(path.position, format!("`{}` is no path", path.value), Some(hint));
    }
    check_names(declared, inputs, cx);
    if *declared.keep_alive.value < KEEP_ALIVE_MIN {
        let shortest = Duration(KEEP_ALIVE_MIN);
        cx.error(declared.keep_alive.position, format!("`keep_alive` is at least {shortest}"));
    }
    if !(1..=QUEUE_MAX).contains(&declared.queue.value) {
        cx.error(declared.queue.position, format!("`queue` is 1 to {QUEUE_MAX} frames"));
    }
    let mounts = vec![Mount { method: "GET", path: path.value.clone() }];
    (cx.errors() == errors).then_some(SinkShape {
        mounts,
        live: true,
        takes_revised: true,
        promise: Promise::Live,
        ..SinkShape::default()
    })
}

/// Checks parameters against key columns.
fn check_names(declared: &Declared<'_>, inputs: &[SinkInput], cx: &mut CheckContext<'_>) {
    let keys: Vec<&str> = inputs.iter().flat_map(|input| &input.shape.keys).map(String::as_str).collect();
    for input in inputs {
        for key in input.shape.keys.iter().filter(|key| [METRIC, SINCE].contains(&key.as_str())) {
            let message = format!("key column `{key}` of `{}` is named like a parameter of live clients", input.metric);
            cx.error_hint(cx.position(), message, Some(format!("rename it: `select: {{{key}_: {key}}}`")));
        }
    }
    if inputs.is_empty() {
        return;
    }
    for (name, column) in declared.params {
        if [METRIC, SINCE].contains(&name.as_str()) {
            cx.error(column.position, format!("parameter `{name}` is taken: it has a meaning of its own"));
        } else if keys.contains(&name.as_str()) && *name != column.value {
            cx.error(column.position, format!("parameter `{name}` is also the name of another key column"));
        }
        if !keys.contains(&column.as_str()) {
            let hint = did_you_mean(column, &keys)
                .or_else(|| Some("a window's `group_by` or a pipeline's `key` gives key columns".to_owned()));
            cx.error_hint(
                column.position,
                format!("no key column `{}` in what this sink receives", column.value),
                hint,
            );
        }
    }
    for name in declared.required {
        if !declared.params.contains_key(&name.value) && !keys.contains(&name.as_str()) {
            let known = declared.params.keys().map(String::as_str).chain(keys.iter().copied());
            let message = format!("`{}` is neither one of `params` nor a key column", name.value);
            cx.error_hint(name.position, message, did_you_mean(name, known));
        }
    }
}

/// How a hub treats its clients.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// What stands around the rows.
    pub(crate) envelope: Envelope,
    /// How frames stand on the wire.
    pub(crate) wire: Wire,
    /// Whether a client first gets the latest rows.
    pub(crate) snapshot: bool,
    /// Parameter to key column.
    pub(crate) params: IndexMap<String, String>,
    /// Parameters without which a client is refused.
    pub(crate) required: Vec<String>,
    /// Time between signs of life.
    pub(crate) keep_alive: std::time::Duration,
    /// Most emissions that wait for one client.
    pub(crate) queue: usize,
    /// Most clients.
    pub(crate) max_clients: usize,
}
