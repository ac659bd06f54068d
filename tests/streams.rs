//! Redis streams: entries that are gone before they are read, and groups that share the entries.

use std::path::Path;

use pipeline::plugin::{PullReader, Receipt, Receipts, Record, Source, SourceConfig, SourceContext};

use crate::redis::{decoded, json, next, pull, push, records, rows, source, source_context, source_options, tokens};
use crate::support::program::{Program, run};
use crate::support::redis::Redis;
use crate::support::{PATIENCE, Scratch, free_port, wait_for};

const NUMBERS: &str = "stream: s\nstart: earliest\nfields: {n: int}";

/// Adds entries whose ids and fields are these numbers.
fn add(server: &Redis, numbers: impl IntoIterator<Item = u32>) {
    for n in numbers {
        server.command(&["XADD", "s", &format!("{n}-0"), "n", &n.to_string()]);
    }
}

fn of(numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    numbers.into_iter().map(|n| format!(r#"{{"n":{n}}}"#)).collect()
}

/// The first error, and the position with it.
async fn error(reader: &mut Box<dyn PullReader>) -> (String, Vec<u8>) {
    let give_up = std::time::Instant::now() + PATIENCE;
    loop {
        let pulled = next(reader).await;
        if let Some(error) = pulled.errors.into_iter().next() {
            return (error.message, pulled.position);
        }
        assert!(std::time::Instant::now() < give_up, "no error");
    }
}

#[tokio::test]
async fn entries_that_are_trimmed_before_they_are_read_are_counted_once() {
    let server = Redis::start();
    add(&server, 1..=5);
    // What is gone before the very first start is no loss.
    server.command(&["XTRIM", "s", "MAXLEN", "3"]);
    let mut reader = pull(&mut source(&server, NUMBERS), None).await;
    let (found, position) = rows(&mut reader, 3).await;
    assert_eq!(found, of(3..=5));
    drop(reader);
    add(&server, 6..=15);
    server.command(&["XTRIM", "s", "MAXLEN", "4"]);

    let expected = "s: 6 entries after 5-0 were trimmed or deleted before they were read";
    let mut first = source(&server, NUMBERS);
    // The position that knows of it was not reached: it is told again.
    for _ in 0..2 {
        assert_eq!(error(&mut pull(&mut first, Some(&position)).await).await.0, expected);
    }
    let mut reader = pull(&mut source(&server, NUMBERS), Some(&position)).await;
    let (_, told) = error(&mut reader).await;
    let (found, last) = rows(&mut reader, 4).await;
    assert_eq!(found, of(12..=15));
    add(&server, [16]);
    for (position, expected) in [(told, of(12..=16)), (last, of([16]))] {
        let pulled = next(&mut pull(&mut source(&server, NUMBERS), Some(&position)).await).await;
        assert_eq!((json(&pulled.rows), pulled.errors), (expected, vec![]), "told once");
    }
}

#[tokio::test]
async fn entries_that_are_trimmed_while_the_source_runs_are_counted() {
    let server = Redis::start();
    let mut reader = pull(&mut source(&server, NUMBERS), None).await;
    next(&mut reader).await;
    // All at once: no reader sees the first 90.
    let script = "for i = 1, 100 do redis.call('XADD', KEYS[1], 'MAXLEN', 10, i .. '-0', 'n', i) end";
    server.command(&["EVAL", script, "1", "s"]);
    let (message, _) = error(&mut reader).await;
    assert_eq!(message, "s: 90 entries after 100-0 were trimmed or deleted before they were read");
}

#[tokio::test]
async fn a_stream_that_began_anew_is_told_and_not_waited_for() {
    let server = Redis::start();
    add(&server, 10..=14);
    let mut reader = pull(&mut source(&server, NUMBERS), None).await;
    let (_, position) = rows(&mut reader, 5).await;
    server.command(&["DEL", "s"]);
    add(&server, [20, 21]);
    let mut reader = pull(&mut source(&server, NUMBERS), Some(&position)).await;
    let (message, _) = error(&mut reader).await;
    assert_eq!(
        message,
        "s: the stream was deleted, or the server lost writes: what came after 14-0 and was not read is lost"
    );
    assert_eq!(rows(&mut reader, 2).await.0, of([20, 21]));

    server.command(&["DEL", "s"]);
    // Nothing is there yet.
    let (message, gone) = error(&mut pull(&mut source(&server, NUMBERS), Some(&position)).await).await;
    assert!(message.contains("the stream was deleted"), "{message}");
    pull(&mut source(&server, NUMBERS), Some(&gone)).await;
    add(&server, [1, 2]);
    let refused = source(&server, NUMBERS).connect(Some(&position)).await.err().expect("it ends before").to_string();
    assert!(refused.contains("stream `s` ends at 2-0, before 14-0"), "{refused}");
    // A running reader finds out too.
    let give_up = std::time::Instant::now() + PATIENCE;
    let found = loop {
        match reader.next().await {
            Err(error) => break error.to_string(),
            Ok(_) => assert!(std::time::Instant::now() < give_up, "waits in silence"),
        }
    };
    assert!(found.contains("stream `s` ends at 2-0, before 21-0"), "{found}");
}

#[tokio::test]
async fn a_stream_that_is_added_begins_when_it_is_added_and_the_others_go_on() {
    let server = Redis::start();
    add(&server, 1..=3);
    let mut reader = pull(&mut source(&server, NUMBERS), None).await;
    let (_, position) = rows(&mut reader, 3).await;
    add(&server, [4]);
    server.command(&["XADD", "t", "1-0", "n", "10"]);
    let both = "streams: [s, t]\nfields: {n: int, more: string}";
    let mut source_ = source(&server, both);
    drop(pull(&mut source_, Some(&position)).await);
    // The connection was lost before the engine knew where the new one begins.
    server.command(&["XADD", "t", "2-0", "n", "20"]);
    let begun = next(&mut pull(&mut source_, Some(&position)).await).await;
    assert_eq!(begun.rows.num_rows(), 0);
    // It knows now, and a restart loses nothing.
    let (mut found, _) = rows(&mut pull(&mut source(&server, both), Some(&begun.position)).await, 2).await;
    found.sort();
    assert_eq!(found, [r#"{"n":20,"more":null}"#, r#"{"n":4,"more":null}"#]);
}

/// A member of the group with a state folder of its own.
struct Member {
    folder: Scratch,
    yaml: String,
}

impl Member {
    fn new(more: &str) -> Self {
        Self { folder: Scratch::new(), yaml: format!("{NUMBERS}\ngroup: g\n{more}") }
    }

    fn source(&self, server: &Redis) -> Box<dyn Source> {
        let context = SourceContext { state_dir: self.folder.path().to_path_buf(), ..source_context() };
        source_options(server, &self.yaml).build(context).expect("a source")
    }

    fn decoded(&self, server: &Redis, records: &[Record]) -> (Vec<String>, Vec<String>) {
        decoded(&source_options(server, &self.yaml), records)
    }

    fn receipts(&self, server: &Redis) -> Box<dyn Receipts> {
        source_options(server, &self.yaml).receipts().expect("receipts")
    }
}

fn pending(server: &Redis) -> String {
    server.command(&["XPENDING", "s", "g"]).lines().next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_member_gets_again_what_it_did_not_acknowledge() {
    let mut server = Redis::start();
    add(&server, 1..=3);
    let member = Member::new("");
    let mut receipts = member.receipts(&server);
    let (mut reader, mut acknowledger) = push(&mut member.source(&server)).await;
    let taken = records(&mut reader, 3).await;
    assert_eq!(member.decoded(&server, &taken), (of(1..=3), vec![]));
    assert!(taken.iter().all(|record| receipts.receive(record, 0) == Receipt::New));
    acknowledger.acknowledge(&tokens(&taken[..1])).await.expect("acknowledged");
    assert_eq!(pending(&server), "2");
    drop((reader, acknowledger));

    // The server may crash in between; another source of the same installation is the same member.
    server.kill();
    server.restart();
    add(&server, [4]);
    let (mut reader, mut acknowledger) = push(&mut member.source(&server)).await;
    let taken = records(&mut reader, 3).await;
    assert_eq!(member.decoded(&server, &taken), (of(2..=4), vec![]));
    let seen: Vec<bool> = taken.iter().map(|record| receipts.receive(record, 0) == Receipt::Repeated).collect();
    assert_eq!(seen, [true, true, false]);
    acknowledger.acknowledge(&tokens(&taken)).await.expect("acknowledged");
    assert_eq!(pending(&server), "0");
}

#[tokio::test]
async fn members_share_the_entries_and_take_over_from_a_dead_one() {
    let server = Redis::start();
    let (one, other) = (Member::new("claim: 200ms"), Member::new("claim: 200ms"));
    let (mut first, _) = push(&mut one.source(&server)).await;
    add(&server, 1..=4);
    let taken = records(&mut first, 4).await;
    assert_eq!(one.decoded(&server, &taken).0, of(1..=4));
    drop(first);
    // A dead member's entries come after `claim`, a deleted one as an error.
    server.command(&["XDEL", "s", "2-0"]);
    let (mut second, mut acknowledger) = push(&mut other.source(&server)).await;
    let taken = records(&mut second, 4).await;
    let (mut found, errors) = other.decoded(&server, &taken);
    found.sort();
    assert_eq!((found, errors), (of([1, 3, 4]), vec!["s 2-0: trimmed or deleted before it was read".to_owned()]));
    acknowledger.acknowledge(&tokens(&taken)).await.expect("acknowledged");
    assert_eq!(pending(&server), "0");
    add(&server, [5]);
    assert_eq!(other.decoded(&server, &records(&mut second, 1).await).0, of([5]));
}

#[tokio::test]
async fn entries_that_are_deleted_while_they_wait_are_acknowledged_and_counted() {
    let server = Redis::start();
    add(&server, 1..=3);
    let member = Member::new("consumer: me");
    let mut receipts = member.receipts(&server);
    let (mut reader, _acknowledger) = push(&mut member.source(&server)).await;
    let taken = records(&mut reader, 3).await;
    // The first one was on disk before it was deleted: it is not lost.
    receipts.receive(&taken[0], 0);
    server.command(&["XDEL", "s", "1-0", "2-0"]);
    assert!(server.command(&["XINFO", "CONSUMERS", "s", "g"]).contains("me"));
    let (mut reader, mut acknowledger) = push(&mut member.source(&server)).await;
    let taken = records(&mut reader, 3).await;
    let fresh: Vec<Record> =
        taken.iter().filter(|record| receipts.receive(record, 0) == Receipt::New).cloned().collect();
    let (found, errors) = member.decoded(&server, &fresh);
    assert_eq!((found, errors), (of([3]), vec!["s 2-0: trimmed or deleted before it was read".to_owned()]));
    acknowledger.acknowledge(&tokens(&taken)).await.expect("acknowledged");
    assert_eq!(pending(&server), "0");
}

#[tokio::test]
async fn a_group_is_made_from_its_start_and_made_anew_from_the_beginning() {
    let server = Redis::start();
    add(&server, [1]);
    let mut member = Member::new("");
    member.yaml = member.yaml.replace("earliest", "latest");
    let mut source = member.source(&server);
    let (mut reader, _acknowledger) = push(&mut source).await;
    add(&server, [2]);
    assert_eq!(member.decoded(&server, &records(&mut reader, 1).await).0, of([2]));
    server.command(&["DEL", "s"]);
    let gone = reader.next().await.expect_err("no group").to_string();
    assert!(gone.contains("NOGROUP") || gone.contains("UNBLOCKED"), "{gone}");
    add(&server, [3]);
    let (mut reader, _acknowledger) = push(&mut source).await;
    let (found, errors) = member.decoded(&server, &records(&mut reader, 2).await);
    assert_eq!(found, of([3]));
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("s: the group was deleted"), "{errors:?}");
}

#[tokio::test]
async fn a_group_reads_thousands_of_several_streams() {
    let server = Redis::start();
    let script =
        "for i = 1, 5000 do redis.call('XADD', KEYS[1], '*', 'n', i) redis.call('XADD', KEYS[2], '*', 'n', -i) end";
    server.command(&["EVAL", script, "2", "a", "b"]);
    let mut member = Member::new("columns: [stream, id]");
    member.yaml = member.yaml.replace("stream: s\n", "streams: [a, b]\n");
    let mut source = member.source(&server);
    for _ in 0..2 {
        // The second time all of them again, because none was acknowledged.
        let (mut reader, _acknowledger) = push(&mut source).await;
        let (found, errors) = member.decoded(&server, &records(&mut reader, 10_000).await);
        assert_eq!((found.len(), errors.len()), (10_000, 0));
        assert!(found[0].starts_with(r#"{"stream":"a","id":""#), "{}", found[0]);
    }
    let (mut reader, mut acknowledger) = push(&mut source).await;
    acknowledger.acknowledge(&tokens(&records(&mut reader, 10_000).await)).await.expect("acknowledged");
    for stream in ["a", "b"] {
        assert!(server.command(&["XPENDING", stream, "g"]).starts_with('0'), "{stream}");
    }
}

#[tokio::test]
async fn a_server_killed_under_a_waiting_member_is_an_error() {
    let mut server = Redis::start();
    let member = Member::new("");
    let (mut reader, _acknowledger) = push(&mut member.source(&server)).await;
    let waiting = tokio::spawn(async move { reader.next().await.err() });
    server.kill();
    assert!(waiting.await.expect("no panic").is_some());
    // A damaged file is an error, not another member.
    std::fs::write(member.folder.path().join("redis-test.id"), "{").expect("written");
    server.restart();
    let error = member.source(&server).connect(None).await.err().expect("damaged").to_string();
    assert!(error.contains("redis-test.id is damaged"), "{error}");
    assert!(Path::new(&member.folder.path().join("redis-test.id")).exists());
}

#[tokio::test]
async fn wrong_entries_of_a_group_are_row_errors() {
    let server = Redis::start();
    server.command(&["XADD", "s", "1-0", "n", "many"]);
    add(&server, [2]);
    let member = Member::new("");
    let (mut reader, _acknowledger) = push(&mut member.source(&server)).await;
    let taken = records(&mut reader, 2).await;
    let decoded = source_options(&server, &member.yaml).decoder().expect("a decoder").decode(&taken).expect("rows");
    assert_eq!(json(&decoded.rows), of([2]));
    assert_eq!(decoded.errors[0].message, "s 1-0: field `n`: expected int, found `many`");
    assert_eq!(decoded.errors[0].payload, r#"{"n":"many"}"#);
    assert_eq!(decoded.record_of_row, [1]);
}

#[test]
fn a_member_that_is_killed_counts_each_entry_once() {
    const ROUNDS: usize = 8;
    const ENTRIES: usize = 700;
    let server = Redis::start();
    let yaml = format!(
        "server: {{listen: 127.0.0.1:PORT}}\nguarantee: exactly_once\ncheckpoint: {{every: 50ms}}\nsources:\n  in: {{type: redis, \
         url: '{}', stream: s, start: earliest, group: g, fields: {{n: int}}}}\npipelines:\n  kept: {{from: in, to: \
         history}}\nsinks:\n  history: {{type: parquet, path: history, roll: 200ms}}\n",
        server.url()
    );
    let number = |name: &str| -> usize {
        let groups = server.command(&["XINFO", "GROUPS", "s"]);
        let mut lines = groups.lines().skip_while(|line| *line != name).skip(1);
        lines.next().and_then(|value| value.parse().ok()).unwrap_or_default()
    };
    let add = |round: usize| {
        let script = "for i = ARGV[1] + 1, ARGV[1] + ARGV[2] do redis.call('XADD', KEYS[1], '*', 'n', i) end";
        server.command(&["EVAL", script, "1", "s", &(round * ENTRIES).to_string(), &ENTRIES.to_string()]);
    };
    let (mut folder, port) = (Scratch::new(), free_port());
    for round in 0..ROUNDS {
        // Half of a round is there before the start, half comes while it runs.
        add(2 * round);
        let mut program = Program::start_in(folder, port, &yaml);
        wait_for("the first half", || (number("entries-read") > 2 * round * ENTRIES).then_some(()));
        add(2 * round + 1);
        let wanted = 2 * round * ENTRIES + ENTRIES * (1 + round % 2);
        wait_for("entries", || {
            let acknowledged = number("entries-read") - number("pending");
            (number("entries-read") >= wanted && (round % 3 > 0 || acknowledged >= wanted)).then_some(())
        });
        program.process.signal("KILL");
        program.process.wait();
        folder = program.scratch;
    }
    let program = Program::start_in(folder, port, &yaml);
    let all = 2 * ROUNDS * ENTRIES;
    wait_for("the rest", || (number("entries-read") >= all && number("pending") == 0).then_some(()));
    // What was acknowledged before the last kill is in the inbox, and a stop need not wait until it is in history.
    let count = "SELECT count(*) AS n, count(DISTINCT n) AS d, max(n) AS m FROM kept";
    wait_for("all in history", || (program.query(count)[0]["d"] == all).then_some(()));
    let folder = program.stop();
    let counted = run(folder.path(), &["query", count, "--format", "csv"]);
    assert_eq!(String::from_utf8_lossy(&counted.stdout), format!("n,d,m\n{all},{all},{all}\n"));
    // One member through all restarts.
    assert_eq!(number("consumers"), 1);
}
