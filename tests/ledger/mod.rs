//! Nothing lost, nothing twice: publishers number every row and write down what was acknowledged to them; the program
//! between them and its history is killed, cut off and damaged at any moment; at the end the books must agree.
//!
//! `TAILWATER_KILLS=1000` kills so often, `TAILWATER_SEED` repeats a run, `TAILWATER_SYSCALLS=all` kills at every call.

mod copies;
mod feed;
mod feeds;
mod trial;
mod truth;

use std::time::{Duration, Instant};

use crate::support::random::{Random, let_a_random_moment_pass, number_from_environment};

use self::copies::Copies;
use self::feeds::{File, Http, Mqtt, RedisList, RedisStream, open_postgres, open_sqlite};
use self::trial::{CopiesEntry, FeedEntry, Trial};

/// The sources that must be exact.
const FEEDS: &[FeedEntry] = &[
    FeedEntry { name: "redis_stream", open: RedisStream::open },
    FeedEntry { name: "postgres", open: open_postgres },
    FeedEntry { name: "sqlite", open: open_sqlite },
    FeedEntry { name: "file", open: File::open },
];

/// The sinks that must be exact beside Parquet.
const COPIES: &[CopiesEntry] = &[];

/// Those that are not exact yet.
const FEEDS_LATER: &[FeedEntry] = &[
    FeedEntry { name: "redis_list", open: RedisList::open },
    FeedEntry { name: "mqtt_3", open: Mqtt::open_v3 },
    FeedEntry { name: "mqtt_5", open: Mqtt::open_v5 },
    FeedEntry { name: "http", open: Http::open },
];

/// Those that are not exact yet.
const COPIES_LATER: &[CopiesEntry] = &[
    CopiesEntry { name: "copies_postgres", open: Copies::open_postgres },
    CopiesEntry { name: "copies_sqlite", open: Copies::open_sqlite },
];

/// The table: with `TAILWATER_LATER` those that are not exact yet too.
fn table() -> (Vec<FeedEntry>, Vec<CopiesEntry>) {
    match number_from_environment("TAILWATER_LATER") {
        None => (FEEDS.to_vec(), COPIES.to_vec()),
        Some(_) => ([FEEDS, FEEDS_LATER].concat(), [COPIES, COPIES_LATER].concat()),
    }
}

/// Kills of a plain `cargo test`.
const KILLS: u64 = 50;

/// Rows of a source that has all of them from the start: as many as it reads in the time of a kill or so.
const ROWS_PER_KILL: u64 = 60;

#[test]
fn a_program_that_is_killed_at_any_moment_loses_nothing_and_repeats_nothing() {
    let mut random = Random::seeded("kills", 20_261_121);
    let kills = number_from_environment("TAILWATER_KILLS").unwrap_or(KILLS);
    let (feeds, copies) = table();
    let mut trial = Trial::new(&feeds, &copies, kills * ROWS_PER_KILL, None);
    let mut process = trial.start();
    trial.wait_until_healthy();
    trial.publish(&mut random);
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
