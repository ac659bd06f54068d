//! The benches must not rot: each runs here, small.

#[path = "../benches/history.rs"]
mod history;
#[path = "../benches/throughput.rs"]
mod throughput;

#[test]
fn memory_and_json_give_the_same_results() {
    let figures = throughput::run(200_000);
    let [max, memory, peer, json] = figures.as_slice() else { panic!("four shapes") };
    assert_eq!((max.results, memory.results, peer.results), (2_000, 2_000, 2_000), "1,000 keys in two seconds");
    assert_eq!((memory.results, memory.hash), (json.results, json.hash));
    assert_ne!(max.hash, memory.hash);
    assert!(figures.iter().all(|figure| figure.million_rows_per_second > 0.0 && !figure.name.is_empty()));
}

#[test]
fn a_small_day_is_merged_and_every_query_answers() {
    let (before, after, figures) = history::run(600, None);
    assert_eq!((before, after), (10, 1));
    let answer = |name: &str| figures.iter().find(|figure| figure.name == name).expect(name).answer.as_str();
    assert_eq!(answer("count"), "c,newest\n600000,2026-11-20T00:09:59.999999Z\n");
    for name in ["average_by_key_of_an_hour", "average_by_key_of_the_day", "newest_value_per_key"] {
        assert_eq!(answer(name).lines().count(), 1 + 1000, "{name}");
    }
    assert_ne!(answer("average_by_key_of_an_hour"), answer("average_by_key_of_the_day"));
    let p99: f64 = answer("percentile_99_of_the_day").lines().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    assert!((98.0..100.0).contains(&p99), "{p99}");
    assert!(figures.iter().all(|figure| figure.duckdb.is_none() && !figure.ours.is_zero()));
}
