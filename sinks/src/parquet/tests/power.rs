//! The power goes at every operation of the disk, and again while the sink starts after it.

use bytes::Bytes;
use pipeline::disk::simulated::{Random, SimulatedDisk};
use pipeline::disk::{remove_drafts, write_whole};

use super::*;

/// Rows of a run, two in each batch.
const ROWS: i64 = 12;

/// How many checkpoints are kept, as the state folder has them.
const KEPT: u64 = 2;

/// A sink and a store of checkpoints on one disk that loses power.
struct Machine {
    house: House,
    disk: SimulatedDisk,
}

impl Machine {
    fn root() -> PathBuf {
        // No folder of the real disk, where hours are merged.
        PathBuf::from("/simulated/history")
    }

    fn checkpoint_path(number: u64) -> PathBuf {
        PathBuf::from(format!("/simulated/state/{number:04}.checkpoint"))
    }

    fn failed(error: std::io::Error) -> Error {
        Error::outside("the store of checkpoints").because(error)
    }

    /// The numbers of the checkpoints that are there.
    fn checkpoints(&self) -> Result<Vec<u64>> {
        let entries = self.disk.list(Path::new("/simulated/state")).map_err(Self::failed)?;
        let number = |name: &str| name.strip_suffix(".checkpoint")?.parse().ok();
        Ok(entries.iter().filter_map(|entry| number(&entry.name)).collect())
    }

    /// Starts from the newest checkpoint, writes the rest of the rows, two a checkpoint, and publishes them. An error is a
    /// power loss.
    fn run(&mut self) -> Result<()> {
        let Self { disk, house } = self;
        let state_folder = Path::new("/simulated/state");
        disk.create_folder(state_folder).map_err(Self::failed)?;
        remove_drafts(disk, state_folder).map_err(Self::failed)?;
        // After a kill: what is gone on from must not be taken back later.
        disk.sync_folder(state_folder).map_err(Self::failed)?;
        let cx = house.context();
        let mut sink = ParquetSink::on_disk(Arc::new(disk.clone()), Self::root(), &house.config, cx)?;
        let mut number = self.checkpoints()?.last().copied().unwrap_or(0);
        let mut next = 1;
        if number == 0 {
            sink.restore(0, None)?;
        } else {
            let kept = self.disk.read(&Self::checkpoint_path(number)).map_err(Self::failed)?;
            let mut state = StateReader::new(&kept);
            next = state.i64().expect("a whole checkpoint");
            sink.restore(number, Some(&mut state))?;
            assert!(state.is_empty(), "unread state");
        }
        self.check(next, &sink)?;
        while next <= ROWS || !sink.staged.is_empty() {
            if next <= ROWS {
                write(&mut sink, 0, &batch([next, next + 1]), next as u64)?;
                next += 2;
            }
            number += 1;
            let mut state = StateWriter::default();
            state.i64(next);
            // The hour changes in the middle of the run.
            let now_us = now() + number as i64 * 400_000;
            sink.prepare_at(number, next > ROWS, now_us, &mut state)?;
            drop(
                write_whole(&self.disk, &Self::checkpoint_path(number), &state.finish())
                    .map_err(|e| Self::failed(e.into()))?,
            );
            for old in self.checkpoints()?.into_iter().filter(|old| old + KEPT <= number) {
                self.disk.remove(&Self::checkpoint_path(old)).map_err(Self::failed)?;
            }
            sink.commit(number, (number + 1).saturating_sub(KEPT))?;
            self.check(next, &sink)?;
        }
        Ok(())
    }

    /// Every row before `next` is in one whole file, or waits; no other row is in any.
    fn check(&self, next: i64, sink: &ParquetSink) -> Result<()> {
        let mut rows = self.published()?;
        for waiting in &sink.inputs[0].open.batches {
            rows.extend(waiting["n"].as_primitive::<Int64Type>().values());
        }
        assert!(sink.staged.iter().all(|file| file.target.is_none()), "named and not published");
        rows.sort_unstable();
        assert_eq!(rows, (1..next).collect::<Vec<_>>());
        Ok(())
    }

    /// The rows of all files that any reader takes for history; each must be whole.
    fn published(&self) -> Result<Vec<i64>> {
        let mut rows = Vec::new();
        for file in files::list_on(&self.disk, &Self::root().join("load")).map_err(Self::failed)? {
            let bytes = Bytes::from(self.disk.read(&file.path).map_err(Self::failed)?);
            let reader =
                ParquetRecordBatchReaderBuilder::try_new(bytes).expect("a whole file").build().expect("a reader");
            for batch in reader {
                rows.extend(batch.expect("rows")["n"].as_primitive::<Int64Type>().values());
            }
        }
        Ok(rows)
    }
}

/// Runs until all rows are published, with the power going after `cut` operations, and then after a few more, some times.
/// Returns whether it went at all.
fn run_with_power_losses(new: fn() -> House, cut: u64, seed: u64) -> bool {
    let mut random = Random::new(seed);
    let mut machine = Machine { house: new(), disk: SimulatedDisk::new(seed) };
    machine.disk.power_off_after(cut);
    let mut losses = 0;
    while let Err(error) = machine.run() {
        assert!(machine.disk.is_off(), "cut {cut} seed {seed}: {error}");
        losses += 1;
        // A kill now and then: what it leaves is there, but not durable.
        machine.disk = if random.below(4) == 0 { machine.disk.kill() } else { machine.disk.crash() };
        machine.published().expect("nothing torn is visible");
        if losses < 4 {
            machine.disk.power_off_after(random.below(60));
        }
    }
    machine.disk.calm();
    let mut rows = machine.published().expect("the power is on");
    rows.sort_unstable();
    assert_eq!(rows, (1..=ROWS).collect::<Vec<_>>(), "cut {cut} seed {seed}");
    losses > 0
}

#[test]
fn a_power_loss_at_any_operation_keeps_every_row_of_a_durable_checkpoint_once() {
    let by_size = || House::new(Duration::from_secs(86_400), 1);
    for (index, new) in [House::at_once, House::patient, by_size].into_iter().enumerate() {
        let mut cut = 0;
        loop {
            let seeds = (0..2).map(|seed| seed + 2 * (cut + 1000 * index as u64));
            let losses = seeds.filter(|seed| run_with_power_losses(new, cut, *seed)).count();
            if losses == 0 {
                break;
            }
            cut += 1;
        }
        assert!(cut > 50, "{cut} operations");
    }
}
