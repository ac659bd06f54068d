//! What every log promises; damaged files are in `damage`, crashes in `crash`.

mod crash;
mod damage;
mod salvage;

use std::path::Path;
use std::sync::Arc;

use super::recovery::segment_path;
use super::*;
use crate::disk::RealDisk;
use crate::disk::simulated::SimulatedDisk;
use crate::error::Retry;

const FOLDER: &str = "state/log";

fn options(segment_bytes: u64) -> LogOptions {
    LogOptions { segment_bytes, durability: Durability::Power }
}

fn open(disk: &SimulatedDisk, segment_bytes: u64) -> Result<(Log, Opened)> {
    Log::open(Arc::new(disk.clone()), Path::new(FOLDER), options(segment_bytes))
}

/// A record that tells its number and differs in length.
fn payload(lsn: u64, salt: u64) -> Vec<u8> {
    let length = (lsn * 7 + salt) % 40;
    (0..length).map(|i| (lsn + salt * 31 + i) as u8).collect()
}

/// Every kind that an owner may give.
fn kind(lsn: u64) -> u8 {
    (lsn % 255) as u8
}

fn append(log: &mut Log, salt: u64) -> u64 {
    let lsn = log.next_lsn();
    let given = log.append(kind(lsn), lsn.cast_signed() * 10, &salt.to_le_bytes(), &payload(lsn, salt));
    assert_eq!(given, lsn);
    lsn
}

fn all(log: &Log) -> Vec<Record> {
    rest(&mut log.records_from(log.first_lsn()).expect("a cursor"))
}

fn rest(cursor: &mut Cursor) -> Vec<Record> {
    let mut records = Vec::new();
    while let Some(record) = cursor.read().expect("a record") {
        records.push(record);
    }
    records
}

/// The records are whole, in order from `from` to `to`, and have these salts.
fn check(records: &[Record], from: u64, salts: &[u64]) {
    assert_eq!(records.len(), salts.len());
    for ((record, lsn), salt) in records.iter().zip(from..).zip(salts) {
        assert_eq!(record.lsn, lsn);
        assert_eq!((record.kind, record.ingest_us), (kind(lsn), lsn.cast_signed() * 10));
        assert_eq!(record.metadata, salt.to_le_bytes().as_slice(), "record {lsn}");
        assert_eq!(record.payload, payload(lsn, *salt), "record {lsn}");
    }
}

#[test]
fn records_come_back_from_any_place_across_segments() {
    let disk = SimulatedDisk::new(1);
    let (mut log, opened) = open(&disk, 200).expect("opened");
    assert!(opened.created);
    let mut cursor = log.records_from(0).expect("a cursor");
    for lsn in 0..40 {
        append(&mut log, 3);
        if lsn % 3 == 2 {
            assert_eq!(log.commit(|| vec![9; lsn as usize]).expect("committed"), lsn + 1);
            check(&rest(&mut cursor), lsn - 2, &[3; 3]);
        }
    }
    assert_eq!((log.first_lsn(), log.committed_lsn(), log.next_lsn()), (0, 39, 40));
    assert!(log.buffered_bytes() > 0);
    let head = log.head().expect("a head");
    assert_eq!(head.bytes, vec![9; head.lsn as usize - 1]);
    drop(log);

    let (log, opened) = open(&disk.kill(), 200).expect("opened again");
    assert_eq!(opened, Opened::default());
    for from in 0..=39 {
        check(&rest(&mut log.records_from(from).expect("a cursor")), from, &vec![3; 39 - from as usize]);
    }
    assert!(log.records_from(40).is_err(), "a reader may not wait for records that it believes to be there");
    assert_eq!(log.head().expect("a head"), head);
}

#[test]
fn the_real_disk_holds_a_log_with_a_huge_record() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("inbox/devices");
    let huge = vec![7; 17 << 20];
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let (mut log, _) = Log::open(disk.clone(), &path, options(1 << 20)).expect("opened");
    for payload in [b"small".as_slice(), &huge, b"after"] {
        log.append(1, 2, b"", payload);
        log.commit(Vec::new).expect("committed");
    }
    assert!(log.buffer.capacity() <= KEPT_BUFFER_BYTES);
    drop(log);
    let (log, _) = Log::open(disk.clone(), &path, options(1 << 20)).expect("opened again");
    let lengths: Vec<usize> = all(&log).iter().map(|record| record.payload.len()).collect();
    assert_eq!(lengths, [5, huge.len(), 5]);
    let report = inspect(&disk, &path).expect("a report");
    assert_eq!((report.segments.len(), report.first_lsn(), report.next_lsn()), (2, 0, 3));
    assert_eq!((report.bytes(), report.damage), (log.bytes(), vec![]));
}

#[test]
fn old_segments_go_and_the_newest_stays() {
    let disk = SimulatedDisk::new(2);
    let (mut log, _) = open(&disk, 100).expect("opened");
    for _ in 0..30 {
        append(&mut log, 5);
        log.commit(Vec::new).expect("committed");
    }
    let all_bytes = log.bytes();
    log.trim(10).expect("trimmed");
    let first = log.first_lsn();
    assert!((8..=10).contains(&first), "{first}");
    assert!(log.bytes() < all_bytes);
    assert!(log.records_from(first - 1).is_err());
    check(&all(&log), first, &vec![5; 30 - first as usize]);
    log.trim(u64::MAX).expect("trimmed");
    let first = log.first_lsn();
    check(&all(&log), first, &vec![5; 30 - first as usize]);
    assert_eq!(log.committed_lsn(), 30);
    let report = inspect(&log.disk, log.folder()).expect("a report");
    check(&rest(&mut report.records(&log.disk, log.folder())), first, &vec![5; 30 - first as usize]);
    assert_eq!((report.segments.len(), report.bytes(), report.damage), (1, log.bytes(), vec![]));
}

#[test]
fn a_log_goes_on_beyond_its_end_wherever_the_power_is_cut() {
    for cut in 0..100 {
        let disk = SimulatedDisk::new(cut);
        let (mut log, _) = open(&disk, 100).expect("a log");
        for salt in 0..10 {
            append(&mut log, salt);
            log.commit(Vec::new).expect("room");
        }
        assert!(log.skip_to(9).is_err(), "records would be given out twice");
        disk.power_off_after(cut);
        let skipped = log.skip_to(50);
        let finished = !disk.is_off();
        assert_eq!(skipped.is_ok(), finished, "{cut}");
        drop(log);
        disk.calm();
        let disk = if finished { disk } else { disk.crash() };
        let (mut log, _) = open(&disk, 100).expect("no gap");
        if log.next_lsn() < 50 {
            log.skip_to(50).expect("room");
        }
        assert_eq!((log.first_lsn(), append(&mut log, 7)), (50, 50), "{cut}");
        log.commit(Vec::new).expect("room");
        assert_eq!(all(&log).len(), 1, "{cut}");
        if finished {
            return;
        }
    }
    panic!("it never ends");
}

#[test]
fn dropped_records_stay_dropped_wherever_the_log_is_cut() {
    for lsn in 0..=20 {
        let disk = SimulatedDisk::new(3);
        let (mut log, _) = open(&disk, 150).expect("opened");
        for _ in 0..4 {
            (0..5).for_each(|_| {
                append(&mut log, 1);
            });
            log.commit(Vec::new).expect("committed");
        }
        append(&mut log, 1);
        log.truncate(lsn).expect("cut");
        assert_eq!((log.next_lsn(), log.buffered_bytes()), (lsn, 0));
        let disk = disk.crash();
        let (mut log, opened) = open(&disk, 150).expect("opened again");
        assert_eq!(opened, Opened::default());
        check(&all(&log), 0, &vec![1; lsn as usize]);
        append(&mut log, 2);
        log.commit(Vec::new).expect("committed");
        check(&all(&log)[lsn as usize..], lsn, &[2]);
        assert!(log.truncate(lsn + 2).is_err(), "records that were believed to be there are not");
    }
}

#[test]
fn a_cursor_follows_a_writer_that_is_in_the_middle_of_a_group() {
    let disk = SimulatedDisk::new(4);
    let (mut log, _) = open(&disk, 1 << 20).expect("opened");
    append(&mut log, 1);
    log.commit(Vec::new).expect("committed");
    let mut cursor = log.records_from(0).expect("a cursor");
    append(&mut log, 1);
    disk.set_room(Some(50));
    log.commit(Vec::new).expect_err("a part of the group fits");
    log.tail.file.write_all(&[0xF7; 40]).expect("as if the writer were in the middle of it");
    check(&rest(&mut cursor), 0, &[1]);
    disk.set_room(None);
    log.tail.cut_needed = true;
    append(&mut log, 1);
    log.commit(Vec::new).expect("committed");
    check(&rest(&mut cursor), 1, &[1, 1]);
}

#[test]
fn a_full_disk_loses_nothing_and_room_mends_it() {
    for room in 0..400 {
        let disk = SimulatedDisk::new(room);
        let (mut log, _) = open(&disk, 100).expect("opened");
        append(&mut log, 1);
        log.commit(Vec::new).expect("committed");
        let mut appended = 1;
        disk.set_room(Some(room));
        for _ in 0..6 {
            append(&mut log, 1);
            appended += 1;
            if let Err(error) = log.commit(|| vec![1; 30]) {
                assert_eq!(error.retry, Retry::BackOff, "{error}");
                assert_eq!(log.next_lsn(), appended);
            }
        }
        check(&all(&log), 0, &vec![1; log.committed_lsn() as usize]);
        disk.set_room(None);
        assert_eq!(log.commit(Vec::new).expect("committed"), appended);
        let (log, _) = open(&disk.crash(), 100).expect("opened again");
        check(&all(&log), 0, &vec![1; appended as usize]);
    }
}

#[test]
fn a_commit_that_failed_leaves_nothing_behind() {
    for seed in 0..100 {
        let disk = SimulatedDisk::new(seed);
        let (mut log, _) = open(&disk, 1000).expect("opened");
        append(&mut log, 1);
        // The write, and in every second case the cut that takes it back.
        disk.fail_after(0, 1 + seed % 2);
        assert_eq!(log.commit(Vec::new).expect_err("the write failed").retry, Retry::BackOff);
        if seed < 50 {
            append(&mut log, 1);
            assert_eq!(log.commit(Vec::new).expect("committed"), 2);
            check(&all(&open(&disk.crash(), 1000).expect("opened again").0), 0, &[1, 1]);
        } else {
            log.truncate(0).expect("dropped");
            assert_eq!(all(&open(&disk.crash(), 1000).expect("opened again").0), []);
        }
    }
}

#[test]
fn a_new_segment_that_does_not_fit_is_made_later() {
    let disk = SimulatedDisk::new(5);
    let (mut log, _) = open(&disk, 40).expect("opened");
    append(&mut log, 1);
    disk.set_room(Some(log.buffered_bytes() as u64));
    assert_eq!(log.commit(|| vec![1]).expect("the group fits"), 1);
    assert_eq!(log.segments.len(), 1);
    disk.set_room(None);
    assert_eq!(log.commit(|| vec![2]).expect("nothing to write"), 1);
    assert_eq!(log.segments.len(), 2);
    assert_eq!(log.head().expect("a head"), Head { lsn: 1, bytes: Bytes::from_static(&[2]) });
}

#[test]
fn after_a_failed_sync_nothing_works_until_the_next_start() {
    let disk = SimulatedDisk::new(6);
    let (mut log, _) = open(&disk, 1000).expect("opened");
    append(&mut log, 1);
    log.commit(Vec::new).expect("committed");
    append(&mut log, 1);
    disk.fail_sync_after(0);
    for _ in 0..2 {
        let error = log.commit(Vec::new).expect_err("the sync failed");
        assert_eq!(error.retry, Retry::Never);
        assert!(error.to_string().contains("not known any more"), "{error}");
    }
    assert_eq!(log.trim(0).expect_err("poisoned").retry, Retry::Never);
    assert_eq!(log.truncate(0).expect_err("poisoned").retry, Retry::Never);
    check(&all(&log), 0, &[1]);
    // The next process believes what it reads, so it has to make that true.
    let disk = disk.kill();
    let (log, _) = open(&disk, 1000).expect("opened again");
    let seen = log.committed_lsn();
    let (log, _) = open(&disk.crash(), 1000).expect("opened after a power loss");
    assert_eq!(log.committed_lsn(), seen);
}

#[test]
fn a_group_beyond_the_limit_is_refused_whole() {
    let disk = SimulatedDisk::new(7);
    let (mut log, _) = open(&disk, 1000).expect("opened");
    append(&mut log, 1);
    log.buffer.resize(GROUP_BYTES_MAX + 1, 0);
    assert_eq!(log.commit(Vec::new).expect_err("too long").retry, Retry::Never);
    assert_eq!(log.committed_lsn(), 0);
}

#[test]
fn a_reader_on_another_thread_sees_what_is_committed_and_nothing_else() {
    const RECORDS: u64 = 600;
    let folder = tempfile::tempdir().expect("folder");
    let options = LogOptions { segment_bytes: 2000, durability: Durability::Process };
    let (mut log, _) = Log::open(Arc::new(RealDisk), folder.path(), options).expect("opened");
    let mut cursor = log.records_from(0).expect("a cursor");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while log.next_lsn() < RECORDS {
                append(&mut log, 1);
                if log.next_lsn() % 3 == 0 {
                    log.commit(Vec::new).expect("committed");
                }
            }
        });
        while cursor.lsn() < RECORDS {
            let lsn = cursor.lsn();
            match cursor.read().expect("no damage") {
                Some(record) => check(&[record], lsn, &[1]),
                None => std::thread::yield_now(),
            }
        }
    });
}
