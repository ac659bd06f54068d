//! Nothing lost, nothing twice: publishers number every row and write down what was acknowledged to them; the program
//! between them and its history is killed, cut off and damaged at any moment; at the end the books must agree.
//!
//! `TAILWATER_KILLS=1000` kills so often, `TAILWATER_SEED` repeats a run, `TAILWATER_SYSCALLS=all` kills at every call.

mod copies;
mod feed;
mod feeds;
mod syscalls;
mod trial;
mod truth;
mod watcher;

use std::time::{Duration, Instant};

use crate::support::random::{Random, let_a_random_moment_pass, number_from_environment};
use crate::support::wait_for;

use self::copies::Copies;
use self::feeds::{File, Http, Mqtt, RedisList, RedisStream, open_postgres, open_sqlite};
use self::trial::{CopiesEntry, FeedEntry, Trial};

/// The sources.
const FEEDS: &[FeedEntry] = &[
    FeedEntry { name: "redis_stream", open: RedisStream::open },
    FeedEntry { name: "redis_list", open: RedisList::open },
    FeedEntry { name: "postgres", open: open_postgres },
    FeedEntry { name: "sqlite", open: open_sqlite },
    FeedEntry { name: "file", open: File::open },
    FeedEntry { name: "mqtt_3", open: Mqtt::open_v3 },
    FeedEntry { name: "mqtt_5", open: Mqtt::open_v5 },
    FeedEntry { name: "http", open: Http::open },
];

/// The sinks beside Parquet.
const COPIES: &[CopiesEntry] = &[
    CopiesEntry { name: "copies_postgres", open: Copies::open_postgres },
    CopiesEntry { name: "copies_sqlite", open: Copies::open_sqlite },
];

/// Kills of a plain `cargo test`.
const KILLS: u64 = 50;

/// Rows of a source that has all of them from the start: as many as it reads in the time of a kill or so.
const ROWS_PER_KILL: u64 = 60;

#[test]
fn a_program_that_is_killed_at_any_moment_loses_nothing_and_repeats_nothing() {
    let mut random = Random::seeded("kills", 20_261_121);
    let kills = number_from_environment("TAILWATER_KILLS").unwrap_or(KILLS);
    let mut trial = Trial::new(FEEDS, COPIES, kills * ROWS_PER_KILL, None);
    let mut process = trial.start();
    trial.wait_until_healthy();
    trial.publish(&mut random);
    trial.watch(&mut random);
    let start = Instant::now();
    let mut early = 0;
    for _ in 0..kills {
        // Now and then while it starts and restores; else after it is up.
        if random.once_in(5) {
            early += 1;
            let_a_random_moment_pass(&mut random, Duration::ZERO, Duration::from_millis(30));
        } else {
            trial.wait_until_it_answers(&mut process);
            let_a_random_moment_pass(&mut random, Duration::from_millis(5), Duration::from_millis(500));
        }
        assert!(process.is_running(), "it ended by itself: {}", process.printed());
        drop(process);
        process = trial.spawn();
    }
    let (killed, rows) = (start.elapsed(), trial.acknowledged());
    eprintln!("{kills} kills in {:.0} s, {early} of them during the start; {rows} rows so far", killed.as_secs_f64());
    trial.stop_publishing();
    trial.wait_until_it_answers(&mut process);
    trial.wait_until_healthy();
    trial.settle();
    trial.stop(process);
    let wrong = trial.wrong();
    assert!(wrong.is_empty(), "after {kills} kills:\n{}", wrong.join("\n"));
}

/// Connections of a plain `cargo test` that meet a bad end.
const CUTS: u64 = 25;

#[test]
fn connections_that_are_cut_in_the_middle_lose_nothing_and_repeat_nothing() {
    let mut random = Random::seeded("cuts", 20_261_121);
    let cuts = number_from_environment("TAILWATER_CUTS").unwrap_or(CUTS);
    let mut cutting = random.fork();
    let mut trial = Trial::new(FEEDS, COPIES, ROWS_PER_KILL, Some(&mut cutting));
    let process = trial.start();
    // A broker keeps nothing for a source that has never subscribed.
    trial.wait_until_healthy();
    trial.publish(&mut random);
    wait_for("the connections to be cut", || (trial.cuts() >= cuts).then_some(()));
    trial.stop_publishing();
    trial.leave_connections_alone();
    trial.wait_until_healthy();
    trial.settle();
    trial.stop(process);
    let wrong = trial.wrong();
    assert!(wrong.is_empty(), "after {} cuts:\n{}", trial.cuts(), wrong.join("\n"));
}
