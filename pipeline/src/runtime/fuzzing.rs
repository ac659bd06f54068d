//! What holds whatever bytes lie in the place of a durable file: nothing panics or runs for ever, what was read can be gone
//! on from, and `doctor` tells of what a start refuses.
//!
//! The targets in `fuzz/` call these with bytes that a fuzzer makes up, the tests here with the corpus, changed at random. A
//! checksum keeps made-up bytes out, so each is also tried with checksums made right.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::intake_task::IntakeTask;
use super::names::first_not_covered;
use super::outbox::Kept;
use super::store::{Checkpoint, Manifest, Store, resealed};
use crate::disk::Disk;
use crate::disk::simulated::SimulatedDisk;
use crate::log::{self, Log, LogOptions};

/// Bytes as the first segment of an inbox.
pub fn inbox(bytes: &[u8]) {
    one_inbox(bytes);
    one_inbox(&log::resealed(bytes));
}

fn one_inbox(bytes: &[u8]) {
    let folder = Path::new("inbox");
    let disk = SimulatedDisk::new(0);
    disk.install(&folder.join("00000000000000000000.log"), bytes);
    let disk: Arc<dyn Disk> = Arc::new(disk);
    let open = || Log::open(Arc::clone(&disk), folder, LogOptions::default());
    let report = log::inspect(&disk, folder).expect("a report");
    let mut log = match open() {
        Ok((log, _)) => {
            assert!(report.damage.iter().all(|damage| damage.torn));
            assert_eq!((report.first_lsn(), report.next_lsn()), (log.first_lsn(), log.committed_lsn()));
            log
        }
        Err(error) => {
            assert!(report.damage.iter().any(|damage| !damage.torn), "{error}");
            // What cannot be mended says so, and stays.
            let Ok(_) = log::salvage(&disk, folder) else { return };
            open().expect("a log that was mended").0
        }
    };
    let mut cursor = log.records_from(log.first_lsn()).expect("the first record");
    let mut before = None;
    while let Some(record) = cursor.read().expect("records") {
        assert!(before < Some(record.lsn) && record.lsn < log.committed_lsn());
        before = Some(record.lsn);
    }
    let lsn = log.append(1, 2, b"metadata", b"payload");
    log.commit(Vec::new).expect("committed");
    drop(log);
    let (log, _) = open().expect("the log that was written to");
    let last = log.records_from(lsn).expect("the last record").read().expect("records").expect("a record");
    assert_eq!((last.lsn, &last.payload[..]), (lsn, &b"payload"[..]));
}

/// Bytes as the newest checkpoint, beside a file of pieces.
pub fn checkpoint(bytes: &[u8]) {
    one_checkpoint(bytes);
    one_checkpoint(&resealed(bytes));
}

fn one_checkpoint(bytes: &[u8]) {
    let dir = Path::new("state");
    let disk = SimulatedDisk::new(0);
    disk.install(&dir.join("00000000000000000004.pieces"), &[7; 100]);
    let open = || Store::on(Arc::new(disk.clone()), dir, None).expect("a store");
    let number = Manifest::decode(bytes).map_or(42, |manifest| {
        let written = manifest.encode();
        assert_eq!(Manifest::decode(&written).expect("readable").encode(), written);
        manifest.number
    });
    disk.install(&dir.join(format!("{number:020}.checkpoint")), bytes);
    let mut store = open();
    let Some(found) = store.latest().expect("a disk that works") else { return };
    for (key, (_, state)) in &found.nodes {
        let _ = (IntakeTask::place(state), Kept::read(state), first_not_covered(&found, &PathBuf::from(key)));
    }
    let Some(number) = found.number.checked_add(1) else { return };
    let next = Checkpoint { number, ..found };
    store.write(&next).expect("written");
    assert_eq!(open().latest().expect("a disk that works"), Some(next));
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::disk::simulated::Random;

    /// Of each file of the corpus. The targets in `fuzz/` go on from there.
    const CHANGED: u64 = 200;

    /// The files below a folder of the corpus.
    fn corpus(folder: &Path) -> Vec<Vec<u8>> {
        let entries = fs::read_dir(folder).expect("the corpus").map(|entry| entry.expect("an entry").path());
        entries
            .flat_map(|path| if path.is_dir() { corpus(&path) } else { vec![fs::read(path).expect("a file")] })
            .collect()
    }

    fn changed(bytes: &[u8], random: &mut Random) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        (0..=random.below(4)).for_each(|_| random.damage(&mut bytes));
        bytes
    }

    #[test]
    fn whatever_lies_in_the_place_of_a_durable_file_does_no_harm() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
        for (kind, holds) in [("log", inbox as fn(&[u8])), ("checkpoint", checkpoint)] {
            let mut random = Random::new(1);
            for bytes in corpus(&folder.join(kind)) {
                holds(&bytes);
                (0..CHANGED).for_each(|_| holds(&changed(&bytes, &mut random)));
            }
        }
    }
}
