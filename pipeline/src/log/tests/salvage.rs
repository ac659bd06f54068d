//! Damaged files, mended: what can be read stays under its number, and the log opens.

use std::fs;

use super::damage::{Files, install, three_segments};
use super::*;
use crate::disk::Disk;

fn salvaged(disk: &SimulatedDisk) -> Vec<Mended> {
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    salvage(&disk, Path::new(FOLDER)).expect("salvaged")
}

/// Opens a damaged log, mended if need be: the numbers of its records, all of them true, and what was mended.
fn mended(files: &Files) -> (Vec<u64>, Vec<Mended>) {
    let disk = install(files);
    let refused = open(&disk, 130).is_err();
    let mended = salvaged(&disk);
    assert_eq!(refused, !mended.is_empty());
    let (mut log, _) = open(&disk, 130).expect("it opens");
    let records = all(&log);
    records.iter().for_each(|record| check(std::slice::from_ref(record), record.lsn, &[1]));
    for Mended { path, aside, lost, .. } in &mended {
        let before = files.iter().find(|(name, _)| name == path).map(|(_, bytes)| bytes);
        assert_eq!(disk.read(aside).ok().as_ref(), before, "{}", aside.display());
        let is_lost = |record: &Record| lost.iter().any(|range| range.contains(&record.lsn));
        assert!(!records.iter().any(is_lost), "{lost:?}");
    }
    let kept: u64 = records.len() as u64 + mended.iter().flat_map(|m| &m.lost).map(|r| r.end - r.start).sum::<u64>();
    assert_eq!(kept, log.next_lsn() - log.first_lsn());
    // It is a log like any other.
    let numbers: Vec<u64> = records.iter().map(|record| record.lsn).collect();
    let next = append(&mut log, 1);
    log.commit(Vec::new).expect("committed");
    drop(log);
    assert!(salvaged(&disk).is_empty(), "nothing is left to mend");
    let (log, _) = open(&disk.crash(), 130).expect("it opens again");
    assert_eq!(all(&log).iter().map(|record| record.lsn).collect::<Vec<_>>(), [numbers.clone(), vec![next]].concat());
    (numbers, mended)
}

fn without(lost: std::ops::Range<u64>) -> Vec<u64> {
    (0..12).filter(|lsn| !lost.contains(lsn)).collect()
}

#[test]
fn a_flipped_byte_costs_its_commit_and_no_other() {
    let files = three_segments();
    for index in 0..files.len() {
        for byte in 0..files[index].1.len() {
            let mut files = files.clone();
            files[index].1[byte] ^= 0x10;
            let (numbers, mended) = mended(&files);
            let lost: Vec<u64> = (0..12).filter(|lsn| !numbers.contains(lsn)).collect();
            assert!(lost.len() <= 2, "byte {byte} of file {index}: {lost:?}");
            assert!(lost.iter().all(|lsn| lsn / 4 == index as u64), "byte {byte} of file {index}: {lost:?}");
            let head_lost = mended.iter().any(|mended| mended.head_lost);
            assert_eq!(head_lost, index == 2 && lost.is_empty(), "byte {byte} of file {index}");
            assert!(!mended.iter().any(|mended| mended.end_lost));
        }
    }
}

#[test]
fn a_cut_or_missing_file_costs_the_records_that_were_in_it() {
    let files = three_segments();
    let mut cut = files.clone();
    cut[1].1.truncate(files[1].1.len() - 1);
    let (numbers, mended_files) = mended(&cut);
    assert_eq!((numbers, mended_files[0].lost.clone()), (without(6..8), Vec::from_iter(Some(6..8))));
    cut[1].1.clear();
    assert_eq!(mended(&cut).0, without(4..8));
    assert_eq!(mended(&vec![files[0].clone(), files[2].clone()]).0, without(4..8));
    let mut cut = files.clone();
    cut[2].1.truncate(10);
    let (numbers, mended_files) = mended(&cut);
    assert_eq!(numbers, without(8..12));
    assert!(mended_files[0].head_lost && mended_files[0].end_lost);
    assert_eq!(mended_files[0].lost_bytes, 10);
}

#[test]
fn a_gap_that_no_damage_explains_is_left_alone() {
    let (_, foreign) = three_segments().remove(0);
    let disk = install(&three_segments());
    disk.install(&segment_path(Path::new(FOLDER), 1 << 40), &foreign);
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let error = salvage(&shared, Path::new(FOLDER)).expect_err("refused").to_string();
    assert!(error.contains("more than damage explains") && error.contains("--fresh"), "{error}");
}

#[test]
fn a_salvage_that_a_power_loss_ends_goes_on_when_it_is_called_again() {
    for operation in 0..60 {
        let mut files = three_segments();
        for (_, bytes) in &mut files[..2] {
            let middle = bytes.len() - 20;
            bytes[middle] ^= 1;
        }
        let disk = install(&files);
        disk.power_off_after(operation);
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let _ = salvage(&shared, Path::new(FOLDER));
        let disk = disk.crash();
        salvaged(&disk);
        let (log, _) = open(&disk, 130).expect("it opens");
        let numbers: Vec<u64> = all(&log).iter().map(|record| record.lsn).collect();
        assert_eq!(numbers, [0, 1, 4, 5, 8, 9, 10, 11], "operation {operation}");
    }
}

#[test]
fn a_file_on_the_real_disk_is_mended_twice_without_losing_the_first_copy() {
    let folder = tempfile::tempdir().expect("folder");
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let path = segment_path(folder.path(), 0);
    let (mut log, _) = Log::open(disk.clone(), folder.path(), LogOptions::default()).expect("opened");
    for _ in 0..10 {
        append(&mut log, 1);
        log.commit(Vec::new).expect("committed");
    }
    drop(log);
    for (place, name) in [(50, "damaged"), (200, "damaged-2")] {
        let mut bytes = fs::read(&path).expect("read");
        bytes[place] ^= 1;
        fs::write(&path, bytes).expect("written");
        let mended = salvage(&disk, folder.path()).expect("salvaged");
        assert_eq!(mended[0].aside, path.with_extension(format!("log.{name}")));
    }
    let (log, _) = Log::open(disk, folder.path(), LogOptions::default()).expect("opened");
    assert_eq!((log.next_lsn(), all(&log).len()), (10, 8));
}
