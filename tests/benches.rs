//! The benches must not rot: each runs here, small.

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
