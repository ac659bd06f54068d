use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::disk::simulated::SimulatedDisk;
use crate::disk::{Disk, RealDisk};

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

fn append(log: &mut Log, salt: u64) -> u64 {
    let lsn = log.next_lsn();
    let given = log.append(lsn as u8, lsn.cast_signed() * 10, &salt.to_le_bytes(), &payload(lsn, salt));
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
        assert_eq!((record.kind, record.ingest_us), (lsn as u8, lsn.cast_signed() * 10));
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
