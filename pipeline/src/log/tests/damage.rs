//! The bytes on disk: as they shall stay, and damaged in every way.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::disk::Disk;
use crate::disk::simulated::Random;
use crate::log::groups::Step;

/// Files of a log, in order.
pub(super) type Files = Vec<(PathBuf, Vec<u8>)>;

/// Three segments, the last one with two groups.
pub(super) fn three_segments() -> Files {
    let disk = SimulatedDisk::new(1);
    let (mut log, _) = open(&disk, 130).expect("opened");
    for commit in 0..6 {
        append(&mut log, 1);
        append(&mut log, 1);
        log.options.segment_bytes = if [1, 3].contains(&commit) { 1 } else { 1 << 20 };
        log.commit(|| b"head".to_vec()).expect("committed");
    }
    let files: Vec<_> = log.segments.iter().map(|kept| segment_path(Path::new(FOLDER), kept.first_lsn)).collect();
    assert_eq!(files.len(), 3);
    files.into_iter().map(|path| (path.clone(), disk.read(&path).expect("read"))).collect()
}

pub(super) fn install(files: &[(PathBuf, Vec<u8>)]) -> SimulatedDisk {
    let disk = SimulatedDisk::new(1);
    files.iter().for_each(|(path, bytes)| disk.install(path, bytes));
    disk
}

/// Opens a log that was damaged: the records that are left, or nothing if it is refused. What can be read must be true, and
/// `inspect` must say the same.
fn open_damaged(disk: &SimulatedDisk) -> Option<u64> {
    let report = inspect(&(Arc::new(disk.clone()) as Arc<dyn Disk>), Path::new(FOLDER)).expect("a report");
    match open(disk, 130) {
        Ok((log, opened)) => {
            assert!(report.damage.iter().all(|damage| damage.torn));
            assert_eq!(opened.cut_bytes > 0, !report.damage.is_empty());
            assert_eq!((report.first_lsn(), report.next_lsn()), (log.first_lsn(), log.committed_lsn()));
            check(&all(&log), 0, &vec![1; log.committed_lsn() as usize]);
            Some(log.committed_lsn())
        }
        Err(error) => {
            let damage = report.damage.iter().find(|damage| !damage.torn).expect("damage");
            let told = error.to_string();
            assert!(
                told.contains(&format!("`{}` is damaged at byte {}", damage.path.display(), damage.offset)),
                "{told}"
            );
            assert!(told.contains("pipeline doctor") && error.retry == Retry::Never, "{told}");
            None
        }
    }
}

#[test]
fn the_bytes_of_a_segment_stay_as_they_are() {
    let disk = SimulatedDisk::new(1);
    let (mut log, _) = open(&disk, 1).expect("opened");
    log.append(1, 2, b"m", b"first");
    log.commit(|| b"head".to_vec()).expect("committed");
    log.append(3, -1, b"", b"second");
    log.append(4, 0x0102_0304_0506_0708, b"meta", b"");
    log.options.segment_bytes = 1000;
    log.commit(Vec::new).expect("committed");
    log.append(5, 0, b"", b"");
    log.commit(Vec::new).expect("committed");
    let bytes = disk.read(&segment_path(Path::new(FOLDER), 1)).expect("read");
    let hex: Vec<String> = bytes.chunks(16).map(|line| line.iter().map(|b| format!("{b:02x}")).collect()).collect();
    assert_eq!(hex, GOLDEN, "a change of the format needs a new version and a reader of the old one");
}

const GOLDEN: &[&str] = &[
    "5441494c574c4f470100000004000000",
    "01000000000000007705e8de68656164",
    "f74752502c00000083b5461401000000",
    "00000000020000002000000000000000",
    "03ffffffffffffffff00000000060000",
    "007365636f6e64040807060504030201",
    "04000000000000006d657461f7475250",
    "1100000072ffe24a0300000000000000",
    "010000006c0000000000000005000000",
    "00000000000000000000000000",
];

/// Where the groups of a segment begin, and its end.
fn places(path: &Path, bytes: &[u8], first_lsn: u64) -> Vec<usize> {
    let disk: Arc<dyn Disk> = Arc::new(install(&[(path.to_owned(), bytes.to_vec())]));
    let (mut groups, _) = Groups::open(&disk, path, first_lsn).expect("read").expect("a header");
    let (mut places, mut next) = (vec![groups.offset() as usize], first_lsn);
    while let Step::Group { header, .. } = groups.step(next).expect("read") {
        next += u64::from(header.count);
        places.push(groups.offset() as usize);
    }
    places
}

#[test]
fn every_cut_end_is_cut_off_or_refused() {
    let files = three_segments();
    let groups = places(&files[2].0, &files[2].1, 8);
    for index in 0..files.len() {
        for length in 0..files[index].1.len() {
            let mut files = files.clone();
            files[index].1.truncate(length);
            let left = open_damaged(&install(&files));
            let whole = groups.iter().filter(|place| **place <= length).count() as u64;
            let expected = (index == 2 && whole > 0).then(|| 8 + 2 * (whole - 1));
            assert_eq!(left, expected, "file {index} cut to {length}");
        }
    }
}

#[test]
fn every_flipped_bit_is_cut_off_or_refused() {
    let files = three_segments();
    let groups = places(&files[2].0, &files[2].1, 8);
    for index in 0..files.len() {
        for bit in 0..files[index].1.len() * 8 {
            let mut files = files.clone();
            files[index].1[bit / 8] ^= 1 << (bit % 8);
            // Nothing proves that the last group of all was ever durable.
            let expected = (index == 2 && bit / 8 >= groups[1]).then_some(10);
            assert_eq!(open_damaged(&install(&files)), expected, "bit {bit} of file {index}");
        }
    }
}

#[test]
fn a_missing_or_foreign_file_is_seen() {
    let files = three_segments();
    assert_eq!(open_damaged(&install(&[files[0].clone(), files[2].clone()])), None, "a gap");
    let moved = (files[1].0.clone(), files[2].1.clone());
    assert_eq!(open_damaged(&install(&[files[0].clone(), moved])), None, "another segment's bytes");
    let disk = install(&files);
    disk.install(&Path::new(FOLDER).join("notes.txt"), b"not ours");
    disk.install(&Path::new(FOLDER).join("00000000000000000099.draft"), b"never finished");
    assert_eq!(open_damaged(&disk), Some(12));
    assert!(disk.exists(&Path::new(FOLDER).join("notes.txt")).expect("looked"));
    assert!(!disk.exists(&Path::new(FOLDER).join("00000000000000000099.draft")).expect("looked"));
    // Trimmed away, as far as the log can know: who relies on the first records is told.
    let (log, _) = open(&install(&files[1..]), 130).expect("opened");
    let error = log.records_from(0).expect_err("not there any more");
    assert!(error.to_string().contains("begins at record 4 and ends before 12"), "{error}");
}

#[test]
fn a_log_inside_a_torn_message_is_not_taken_for_proof() {
    let (path, bytes) = three_segments().pop().expect("a segment");
    let disk = SimulatedDisk::new(1);
    let (mut log, _) = open(&disk, 1 << 20).expect("opened");
    log.append(1, 1, b"", &[0; 100]);
    log.commit(Vec::new).expect("committed");
    log.append(1, 1, b"", &bytes.repeat(3));
    log.commit(Vec::new).expect("committed");
    let path = segment_path(path.parent().expect("a folder"), 0);
    let mut torn = disk.read(&path).expect("read");
    torn.pop();
    let (log, opened) = open(&install(&[(path, torn)]), 1 << 20).expect("opened");
    assert_eq!(log.committed_lsn(), 1);
    assert!(opened.cut_bytes > 100);
}

/// The small logs in `corpus/log`, each a folder with the files of one log.
fn corpus() -> Vec<(String, Files)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/log");
    let list = |folder: &Path| {
        let mut paths: Vec<PathBuf> =
            fs::read_dir(folder).expect("a folder").map(|e| e.expect("entry").path()).collect();
        paths.sort();
        paths
    };
    let case = |path: PathBuf| {
        let file =
            |path: PathBuf| (Path::new(FOLDER).join(path.file_name().expect("name")), fs::read(&path).expect("read"));
        (path.display().to_string(), list(&path).into_iter().map(file).collect())
    };
    list(&folder).into_iter().map(case).collect()
}

#[test]
fn no_damaged_file_is_read_wrongly() {
    // All of them were made from this one; a change may also mend one.
    let whole = all(&open(&install(&three_segments()), 130).expect("opened").0);
    for (name, files) in corpus() {
        for seed in 0..300 {
            let mut random = Random::new(seed);
            let mut files = files.clone();
            for _ in 0..=random.below(3) {
                let index = random.below(files.len() as u64) as usize;
                random.damage(&mut files[index].1);
            }
            if let Ok((log, _)) = open(&install(&files), 130) {
                let records = all(&log);
                assert_eq!(Some(&records[..]), whole.get(..records.len()), "{name}, seed {seed}");
            }
        }
    }
}

#[test]
fn the_logs_kept_from_earlier_are_read_as_they_were() {
    let found: Vec<(String, Option<u64>)> = corpus()
        .into_iter()
        .map(|(name, files)| {
            let name = name.rsplit('/').next().unwrap_or_default().to_owned();
            (name, open(&install(&files), 130).ok().map(|(log, _)| log.committed_lsn()))
        })
        .collect();
    let expected = [("damaged", None), ("empty", Some(0)), ("torn", Some(10)), ("whole", Some(12))];
    assert_eq!(found, expected.map(|(name, end)| (name.to_owned(), end)));
}
