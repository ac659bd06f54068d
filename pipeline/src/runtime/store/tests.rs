use std::fs;

use super::*;
use crate::disk::simulated::SimulatedDisk;

/// A large state of which a tenth changes each time.
fn large(number: u64, words: u32) -> Vec<u8> {
    let mut state: Vec<u8> = (0..words).flat_map(|n| (n.wrapping_mul(2_654_435_761)).to_le_bytes()).collect();
    let tenth = state.len() / 10;
    let from = (number as usize % 10) * tenth;
    state[from..from + tenth].iter_mut().for_each(|byte| *byte ^= number as u8 | 1);
    state
}

fn checkpoint(number: u64) -> Checkpoint {
    checkpoint_of(number, 5_000)
}

fn checkpoint_of(number: u64, words: u32) -> Checkpoint {
    let nodes = [("source/a", 1, vec![1, 2]), ("pipeline/b", 2, vec![]), ("pipeline/c", 3, large(number, words))];
    Checkpoint { number, nodes: nodes.into_iter().map(|(k, f, s)| (k.to_owned(), (f, s))).collect() }
}

#[test]
fn the_newest_whole_checkpoint_is_found_and_three_are_kept() {
    let dir = tempfile::tempdir().expect("folder");
    let mut store = Store::open(dir.path()).expect("store");
    assert_eq!(store.latest().expect("latest"), None);
    for number in 1..=5 {
        store.write(&checkpoint(number)).expect("written");
    }
    let numbers: Vec<u64> = store.list().expect("list").into_iter().map(|(number, _)| number).collect();
    assert_eq!(numbers, [3, 4, 5]);
    assert_eq!(store.latest().expect("latest"), Some(checkpoint(5)));
    let (_, newest) = store.list().expect("list").pop().expect("one");
    let mut bytes = fs::read(&newest).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&newest, &bytes).expect("write");
    assert_eq!(store.latest().expect("latest"), Some(checkpoint(4)));
    // Whatever becomes of the damaged one, no start goes on from it any more, and it pushes no whole one out.
    assert!(newest.with_extension(DAMAGED).exists() && !newest.exists());
    assert_eq!(store.write(&checkpoint(6)).expect("written"), 3);
    for length in 0..bytes.len() {
        assert!(Manifest::decode(&bytes[..length]).is_err(), "cut to {length}");
    }
    store.clear().expect("cleared");
    assert_eq!(store.latest().expect("latest"), None);
}

#[test]
fn a_checkpoint_writes_what_has_changed_and_keeps_what_it_needs() {
    const WORDS: u32 = 60_000;
    let dir = tempfile::tempdir().expect("folder");
    let bytes = |store: &Store| -> u64 {
        let files = store.disk.list(&store.dir).expect("a list");
        files.iter().filter(|file| file.name.ends_with(PIECES)).map(|file| file.length).sum()
    };
    let mut store = Store::open(dir.path()).expect("store");
    store.write(&checkpoint_of(1, WORDS)).expect("written");
    let whole = bytes(&store);
    assert!(whole >= large(1, WORDS).len() as u64);
    store.write(&Checkpoint { number: 2, ..checkpoint_of(1, WORDS) }).expect("written");
    assert_eq!(bytes(&store), whole, "nothing has changed");
    for number in 3..100 {
        store.write(&checkpoint_of(number, WORDS)).expect("written");
        assert!(bytes(&store) <= 5 * whole, "{number}: {} of {whole}", bytes(&store));
        assert_eq!(store.latest().expect("latest"), Some(checkpoint_of(number, WORDS)));
        if number % 20 == 0 {
            drop(store);
            store = Store::open(dir.path()).expect("store");
            assert_eq!(store.latest().expect("latest"), Some(checkpoint_of(number, WORDS)));
            for (number, path) in store.list().expect("a list") {
                assert_eq!(store.read(&path).expect("whole").1, checkpoint_of(number, WORDS));
            }
        }
    }
    store.clear().expect("cleared");
    assert_eq!(bytes(&store), 0);
}

#[test]
fn a_flipped_bit_in_a_piece_is_seen_and_the_checkpoint_before_is_taken() {
    let dir = tempfile::tempdir().expect("folder");
    let mut store = Store::open(dir.path()).expect("store");
    let mut other = checkpoint(2);
    other.nodes.insert("pipeline/c".to_owned(), (3, vec![7; 200_000]));
    store.write(&checkpoint(1)).expect("written");
    store.write(&other).expect("written");
    let path = store.path(2, PIECES);
    let mut bytes = fs::read(&path).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).expect("write");
    let mut store = {
        drop(store);
        Store::open(dir.path()).expect("store")
    };
    assert_eq!(store.latest().expect("latest"), Some(checkpoint(1)));
    // The same state again: no checkpoint may name the damaged piece, nor one that is gone.
    let again = Checkpoint { number: 3, ..other };
    store.write(&again).expect("written");
    assert_eq!(store.latest().expect("latest"), Some(again.clone()));
    // Nor does a copy under another name count.
    fs::rename(store.path(3, SUFFIX), store.path(30, SUFFIX)).expect("renamed");
    fs::remove_file(store.path(3, PIECES)).expect("removed");
    assert_eq!(store.latest().expect("latest"), Some(checkpoint(1)));
    let again = Checkpoint { number: 4, ..again };
    store.write(&again).expect("written");
    assert_eq!(store.latest().expect("latest"), Some(again));
}

#[test]
fn a_checkpoint_that_cannot_be_read_for_now_is_not_set_aside() {
    let dir = tempfile::tempdir().expect("folder");
    let mut store = Store::open(dir.path()).expect("store");
    store.write(&checkpoint(1)).expect("written");
    let path = store.path(2, SUFFIX);
    // No way to read a folder as a file, and none that says the disk is damaged.
    fs::create_dir(&path).expect("a folder");
    let error = store.latest().expect_err("unreadable");
    assert_eq!((error.blame, error.retry), (Blame::Outside, crate::error::Retry::Never), "{error}");
    assert!(path.exists());
}

#[test]
fn the_first_version_is_read() {
    let dir = tempfile::tempdir().expect("folder");
    let mut body = StateWriter::default();
    body.u64(9);
    body.u64(3);
    for (key, (fingerprint, state)) in &checkpoint(9).nodes {
        body.str(key);
        body.u64(*fingerprint);
        body.bytes(state);
    }
    let body = body.finish();
    let bytes = [&FIRST_MAGIC[..], &crc32c::crc32c(&body).to_le_bytes(), &body].concat();
    fs::write(dir.path().join("00000000000000000009.checkpoint"), bytes).expect("written");
    let mut store = Store::open(dir.path()).expect("store");
    assert_eq!(store.latest().expect("latest"), Some(checkpoint(9)));
    store.write(&checkpoint(10)).expect("written");
    assert_eq!(store.latest().expect("latest"), Some(checkpoint(10)));
}

/// The checkpoints of the corpus: the layouts of this version and of the one before, which must stay readable.
fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/checkpoint")
}

/// A checkpoint with a state of each kind.
fn manifest() -> Manifest {
    let piece = |number: u64| Piece { hash: u128::from(number) << 64 | 7, length: 9, file: number, offset: 3 };
    let nodes = [
        ("source/a", (1, State::Small(vec![1, 2, 3]))),
        ("pipeline/b", (2, State::Pieces(vec![piece(4), piece(5)]))),
        ("sink/c", (3, State::Small(Vec::new()))),
    ];
    Manifest { number: 42, nodes: nodes.into_iter().map(|(key, node)| (key.to_owned(), node)).collect() }
}

#[test]
fn the_layout_stays_as_it_is() {
    let kept = fs::read(corpus().join("version-2.checkpoint")).expect("the corpus");
    assert_eq!(kept, manifest().encode());
    let first = Manifest::decode(&fs::read(corpus().join("version-1.checkpoint")).expect("the corpus"));
    let first = first.expect("readable");
    assert_eq!((first.number, first.nodes.len(), first.pieces().count()), (9, 2, 0));
}

#[test]
fn no_damaged_manifest_is_read() {
    for entry in fs::read_dir(corpus()).expect("the corpus") {
        let bytes = fs::read(entry.expect("an entry").path()).expect("a file");
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // The digit of the version alone is not under the checksum.
            let read = Manifest::decode(&flipped);
            assert!(read.is_err() || bit / 8 == 7, "bit {bit}");
        }
    }
}

#[test]
fn a_second_process_on_the_same_folder_is_refused() {
    let dir = tempfile::tempdir().expect("folder");
    let first = Store::open(dir.path()).expect("store");
    assert!(Store::open(dir.path()).is_err());
    drop(first);
    assert!(Store::open(dir.path()).is_ok());
}
fn on(disk: &SimulatedDisk) -> Result<Store> {
    Store::on(Arc::new(disk.clone()), Path::new("state"), None)
}

fn newest(disk: &SimulatedDisk) -> u64 {
    let mut store = on(disk).expect("store");
    let found = store.latest().expect("latest").unwrap_or_default();
    if found.number > 0 {
        assert_eq!(found, checkpoint(found.number));
    }
    found.number
}

/// Writes checkpoints until something fails: the newest that was written, and the one that was begun.
fn write_some(disk: &SimulatedDisk, from: u64) -> (u64, u64) {
    let Ok(mut store) = on(disk) else { return (from, from) };
    if store.latest().is_err() {
        return (from, from);
    }
    for number in from + 1..from + 6 {
        if store.write(&checkpoint(number)).is_err() {
            return (number - 1, number);
        }
    }
    (from + 5, from + 5)
}

#[test]
fn a_power_loss_anywhere_leaves_the_newest_checkpoint_or_the_one_begun() {
    let disk = SimulatedDisk::new(0);
    write_some(&disk, 0);
    for seed in 0..8 {
        for operation in 0..=disk.operations() {
            let disk = SimulatedDisk::new(seed);
            disk.power_off_after(operation);
            let (written, begun) = write_some(&disk, 0);
            let disk = disk.crash();
            let found = newest(&disk);
            assert!((written..=begun).contains(&found), "seed {seed}, operation {operation}: {found}");
            // Once restored it is not taken back, and the run goes on from it.
            assert_eq!(newest(&disk.crash()), found, "seed {seed}, operation {operation}");
            let disk = SimulatedDisk::new(seed);
            disk.fail_after(operation, 1);
            let (written, begun) = write_some(&disk, 0);
            let disk = disk.kill();
            let found = newest(&disk);
            assert!((written..=begun).contains(&found), "seed {seed}, operation {operation}: {found}");
            assert_eq!(newest(&disk.crash()), found, "seed {seed}, operation {operation}");
        }
    }
}

#[test]
fn clearing_that_a_power_loss_ends_leaves_the_newest_checkpoint_or_none() {
    for seed in 0..50 {
        for operation in 0..10 {
            let disk = SimulatedDisk::new(seed);
            let (written, _) = write_some(&disk, 0);
            let mut store = on(&disk).expect("store");
            disk.power_off_after(operation);
            let cleared = store.clear().is_ok();
            let found = newest(&disk.crash());
            assert!(found == 0 || (found == written && !cleared), "seed {seed}, operation {operation}: {found}");
        }
    }
}
