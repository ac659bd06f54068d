//! `host`: load, memory, disk and network of the machine.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use async_trait::async_trait;
use pipeline::config::{At, CheckContext, Duration};
use pipeline::error::{Error, Result};
use pipeline::plugin::{
    Delivery, PullReader, Pulled, Reader, Schedule, Source, SourceConfig, SourceContext, SourceShape,
};
use pipeline::rows::Cell;
use pipeline::schema::{FieldType, schema_of};
use schemars::JsonSchema;
use serde::Deserialize;
use sysinfo::{
    Disk, DiskRefreshKind, Disks, MINIMUM_CPU_UPDATE_INTERVAL, MemoryRefreshKind, Networks, ProcessRefreshKind,
    ProcessesToUpdate, System,
};

use crate::blocking;
use crate::fixed::{count, rows_of};

const PAGE: &str = "\
Measures the machine that the process runs on: processor, memory, disk and network.

## Emits

One row per poll. `host` is the machine's name.

| columns | what |
| --- | --- |
| `cpu_percent`, `cpus` | use of all processors together since the poll before, 0 to 100; their number |
| `load_1`, `load_5`, `load_15` | processes that run or want to, averaged over minutes |
| `memory_used_bytes`, `memory_available_bytes`, `memory_total_bytes`, `memory_percent` | memory |
| `swap_used_bytes`, `swap_total_bytes`, `swap_percent` | swap |
| `disk_used_bytes`, `disk_total_bytes`, `disk_percent` | the file system that holds `disk` |
| `network_received_bytes`, `network_sent_bytes` | since the start of the machine, all interfaces but loopback |
| `network_received_bytes_per_second`, `network_sent_bytes_per_second` | since the poll before |
| `processes`, `uptime_seconds` | processes that exist; time since the start of the machine |

`cpu_percent` and the rates are null in a row that comes less than 200 ms after the measurement before, as the first
row after the start does: there is nothing to compare with yet.

## Delivery

A sample of the state at each poll. With `on_demand: true` it is polled only while somebody looks; the first row then
covers the time since the last look.

## Limits

In a container the numbers are those of the machine, not of the container. Network file systems and memory disks have
no `disk_` columns, nor has a system where the load is not known its `load_` columns: they are null.

## Fails when

The system does not say what it is asked; then it is asked again.
";

/// The columns of a row.
const COLUMNS: [(&str, FieldType); 22] = [
    ("host", FieldType::String),
    ("cpu_percent", FieldType::Float),
    ("cpus", FieldType::Int),
    ("load_1", FieldType::Float),
    ("load_5", FieldType::Float),
    ("load_15", FieldType::Float),
    ("memory_used_bytes", FieldType::Int),
    ("memory_available_bytes", FieldType::Int),
    ("memory_total_bytes", FieldType::Int),
    ("memory_percent", FieldType::Float),
    ("swap_used_bytes", FieldType::Int),
    ("swap_total_bytes", FieldType::Int),
    ("swap_percent", FieldType::Float),
    ("disk_used_bytes", FieldType::Int),
    ("disk_total_bytes", FieldType::Int),
    ("disk_percent", FieldType::Float),
    ("network_received_bytes", FieldType::Int),
    ("network_sent_bytes", FieldType::Int),
    ("network_received_bytes_per_second", FieldType::Float),
    ("network_sent_bytes_per_second", FieldType::Float),
    ("processes", FieldType::Int),
    ("uptime_seconds", FieldType::Int),
];

/// Options of `host`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Time between two polls, at least 200ms. Default: 1s, what a dashboard shows.
    #[serde(default = "default_every")]
    pub every: At<Duration>,
    /// A path on the file system to measure. Default: `/`.
    #[serde(default = "default_disk")]
    pub disk: PathBuf,
}

fn default_every() -> At<Duration> {
    At::nowhere(Duration::from_secs(1))
}

fn default_disk() -> PathBuf {
    PathBuf::from("/")
}

impl SourceConfig for HostConfig {
    const TYPE: &'static str = "host";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
type: host
every: 1s
on_demand: true
";
    const PROMISES: &'static [(&'static str, Delivery)] = &[("", Delivery::Sampled)];
    const INSTEAD: Option<&'static str> = Some("a file of its own, without the guarantee, for samples of this machine");

    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        if **self.every < MINIMUM_CPU_UPDATE_INTERVAL {
            cx.error(self.every.position, "the use of the processors cannot be told in less than 200ms");
        }
        Some(SourceShape {
            schema: schema_of(COLUMNS),
            delivery: Delivery::Sampled,
            schedule: Schedule::Every(**self.every),
            bounded: false,
            can_be_on_demand: true,
            mounts: Vec::new(),
        })
    }

    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>> {
        Ok(Box::new(Host { disk: cx.folder.join(&self.disk) }))
    }
}

struct Host {
    disk: PathBuf,
}

#[async_trait]
impl Source for Host {
    async fn connect(&mut self, _: Option<&[u8]>) -> Result<Reader> {
        let disk = self.disk.clone();
        let meter = blocking(MEASURING, move || Meter::new(&disk)).await?;
        Ok(Reader::Pull(Box::new(HostReader { meter: Some(meter) })))
    }
}

/// The system is asked by reading files, which may block.
const MEASURING: &str = "measuring the host";

struct HostReader {
    /// Away while it measures.
    meter: Option<Meter>,
}

#[async_trait]
impl PullReader for HostReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        let mut meter = self.meter.take().ok_or_else(|| Error::outside("the last measurement did not end"))?;
        let (meter, cells) = blocking(MEASURING, move || {
            let cells = meter.measure();
            Ok((meter, cells))
        })
        .await?;
        self.meter = Some(meter);
        Ok(Some(Pulled { rows: rows_of(&COLUMNS, [cells])?, errors: Vec::new(), position: Vec::new(), more: false }))
    }
}

/// Asks the system, and remembers what rates are counted from.
struct Meter {
    system: System,
    networks: Networks,
    disks: Disks,
    /// Index of the file system to measure.
    disk: Option<usize>,
    host: String,
    counted_at: Instant,
    received: u64,
    sent: u64,
}

impl Meter {
    fn new(disk: &Path) -> Result<Self> {
        let failed = |what: &'static str| move |error: sysinfo::Error| Error::outside(what).because(error.to_string());
        let mut system = System::new().map_err(failed("asking the system"))?;
        // The use of a processor is told between two readings: this is the first.
        system.refresh_cpu_usage();
        let networks = Networks::new_with_refreshed_list().map_err(failed("asking for networks"))?;
        // A system that does not tell its disks has other columns.
        let disks = Disks::new_with_refreshed_list_specifics(DiskRefreshKind::nothing().with_storage())
            .or_else(|_| Disks::new())
            .map_err(failed("asking for disks"))?;
        let disk = disk.canonicalize().unwrap_or_else(|_| disk.to_owned());
        let (received, sent) = network_bytes(&networks);
        Ok(Self {
            disk: file_system(&disks, &disk),
            host: System::host_name().unwrap_or_default(),
            counted_at: Instant::now(),
            system,
            networks,
            disks,
            received,
            sent,
        })
    }

    /// One row, in the order of [`COLUMNS`].
    fn measure(&mut self) -> [Cell<'static>; COLUMNS.len()] {
        self.system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram().with_swap());
        self.system.refresh_processes_specifics(
            ProcessesToUpdate::All,
            true,
            ProcessRefreshKind::nothing().without_tasks(),
        );
        let system = &self.system;
        let (memory, swap) = (system.total_memory(), system.total_swap());
        let (memory_used, swap_used) = (system.used_memory(), system.used_swap());
        let available = system.available_memory();
        let processes = system.processes().len() as u64;
        let load = System::load_average().ok();
        let load = |f: fn(&sysinfo::LoadAvg) -> f64| load.as_ref().map_or(Cell::Null, |load| Cell::Float(f(load)));
        let (disk_used, disk) = self.disk_bytes();
        let [cpu, received_rate, sent_rate] = self.rates();
        [
            text(&self.host),
            cpu,
            count(self.system.cpus().len() as u64),
            load(|load| load.one),
            load(|load| load.five),
            load(|load| load.fifteen),
            count(memory_used),
            count(available),
            count(memory),
            percent(memory_used, memory),
            count(swap_used),
            count(swap),
            percent(swap_used, swap),
            disk_used.map_or(Cell::Null, count),
            disk.map_or(Cell::Null, count),
            disk_used.zip(disk).map_or(Cell::Null, |(used, total)| percent(used, total)),
            count(self.received),
            count(self.sent),
            received_rate,
            sent_rate,
            count(processes),
            System::uptime().map_or(Cell::Null, count),
        ]
    }

    /// Use of the processors, and bytes received and sent per second, since the measurement before; null if that
    /// was just now.
    fn rates(&mut self) -> [Cell<'static>; 3] {
        let elapsed = self.counted_at.elapsed();
        self.networks.refresh(true);
        let (received, sent) = network_bytes(&self.networks);
        if elapsed < MINIMUM_CPU_UPDATE_INTERVAL {
            return [Cell::Null, Cell::Null, Cell::Null];
        }
        self.system.refresh_cpu_usage();
        self.counted_at = Instant::now();
        // An interface that went away takes its bytes with it.
        let rate = |now: u64, before: u64| Cell::Float(now.saturating_sub(before) as f64 / elapsed.as_secs_f64());
        let rates = [
            Cell::Float(f64::from(self.system.global_cpu_usage())),
            rate(received, self.received),
            rate(sent, self.sent),
        ];
        (self.received, self.sent) = (received, sent);
        rates
    }

    /// Used and all bytes of the file system.
    fn disk_bytes(&mut self) -> (Option<u64>, Option<u64>) {
        let Some(disk) = self.disk.and_then(|index| self.disks.get_mut(index)) else { return (None, None) };
        disk.refresh_specifics(DiskRefreshKind::nothing().with_storage());
        let total = disk.total_space();
        (Some(total.saturating_sub(disk.available_space())), Some(total))
    }
}

/// The file system that `path` lies on: the one mounted deepest above it.
fn file_system(disks: &Disks, path: &Path) -> Option<usize> {
    let above = disks.iter().enumerate().filter(|(_, disk)| path.starts_with(disk.mount_point()));
    let depth = |disk: &Disk| disk.mount_point().components().count();
    above.max_by_key(|(_, disk)| depth(disk)).map(|(index, _)| index)
}

/// Bytes received and sent since the start of the machine, over all interfaces but loopback.
fn network_bytes(networks: &Networks) -> (u64, u64) {
    let real = networks.iter().filter(|(name, _)| !is_loopback(name));
    real.fold((0, 0), |(received, sent), (_, data)| (received + data.total_received(), sent + data.total_transmitted()))
}

/// `lo` on Linux, `lo0` on macOS.
fn is_loopback(name: &OsStr) -> bool {
    name == "lo" || name == "lo0" || name.to_string_lossy().starts_with("Loopback")
}

fn percent(part: u64, whole: u64) -> Cell<'static> {
    if whole == 0 { Cell::Null } else { Cell::Float(part as f64 * 100.0 / whole as f64) }
}

fn text(text: &str) -> Cell<'static> {
    if text.is_empty() { Cell::Null } else { Cell::Text(text.to_owned().into()) }
}

#[cfg(test)]
mod tests {
    use pipeline::json::encode_rows;
    use serde_json::{Map, Value};

    use super::*;
    use crate::testing;

    fn row(meter: &mut Meter) -> Map<String, Value> {
        let rows = rows_of(&COLUMNS, [meter.measure()]).expect("a row");
        serde_json::from_str(encode_rows(&rows).row(0)).expect("JSON")
    }

    #[test]
    fn one_measurement_has_all_columns_and_they_agree_with_each_other() {
        let mut meter = Meter::new(Path::new("/")).expect("a meter");
        let first = row(&mut meter);
        assert!(first["cpu_percent"].is_null() && first["network_sent_bytes_per_second"].is_null(), "{first:?}");
        // As if the measurement before were a second ago: no test waits for the clock.
        meter.counted_at = Instant::now() - std::time::Duration::from_secs(1);
        let second = row(&mut meter);
        let number = |name: &str| second[name].as_f64().unwrap_or_else(|| panic!("{name}: {second:?}"));
        assert!((0.0..=100.0).contains(&number("cpu_percent")));
        assert!(number("memory_used_bytes") > 0.0 && number("memory_used_bytes") <= number("memory_total_bytes"));
        assert!((0.0..=100.0).contains(&number("memory_percent")));
        assert!(number("cpus") >= 1.0 && number("processes") >= 1.0 && number("uptime_seconds") > 0.0);
        assert!(number("network_received_bytes_per_second") >= 0.0);
        for (used, total) in [("swap_used_bytes", "swap_total_bytes"), ("disk_used_bytes", "disk_total_bytes")] {
            assert!(second[used].as_u64() <= second[total].as_u64(), "{used}: {second:?}");
        }
    }

    #[tokio::test]
    async fn every_poll_gives_one_row_of_the_columns_said() {
        let config: HostConfig = testing::read("{}");
        let mut source = config.build(testing::context()).expect("a source");
        let Reader::Pull(mut reader) = source.connect(None).await.expect("a reader") else { panic!("a pull source") };
        for _ in 0..2 {
            let pulled = reader.next().await.expect("rows").expect("not the end");
            assert_eq!(pulled.rows.num_rows(), 1);
            assert_eq!(pulled.rows.schema(), testing::check(&config).expect("a shape").schema);
        }
    }

    #[test]
    fn a_poll_too_often_is_reported() {
        let problems = testing::problems::<HostConfig>("{every: 100ms}");
        assert!(problems.contains("1:9: error: source test: the use of the processors"), "{problems}");
    }
}
