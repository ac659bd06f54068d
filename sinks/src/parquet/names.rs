//! Names of published files: `SINK-CHECKPOINT-PART.parquet`, and `SINK-compacted-FIRST-LAST-PART.parquet` after a merge.

use std::path::Path;

/// What stands in the place of the checkpoint where a file was merged. No number, so the two forms never collide.
const COMPACTED: &str = "compacted";
const EXTENSION: &str = ".parquet";

/// What the name of a published file tells. In the order of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileName {
    /// First checkpoint whose rows it has.
    pub(super) first: u64,
    /// Last checkpoint whose rows it has.
    pub(super) last: u64,
    /// Tells files of the same checkpoints apart.
    pub(super) part: u64,
    /// Whether it was merged from others.
    pub(super) compacted: bool,
}

impl FileName {
    /// A file as a checkpoint names it first.
    pub(super) fn published(checkpoint: u64, part: u64) -> Self {
        Self { first: checkpoint, last: checkpoint, part, compacted: false }
    }

    /// Reads the name of a file of `sink`; `None` for any other name.
    pub(super) fn read(sink: &str, path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(EXTENSION)?;
        let words: Vec<&str> = name.strip_prefix(sink)?.strip_prefix('-')?.split('-').collect();
        let read = match words[..] {
            [checkpoint, part] => Self::published(number(checkpoint)?, number(part)?),
            [COMPACTED, first, last, part] => {
                Self { first: number(first)?, last: number(last)?, part: number(part)?, compacted: true }
            }
            _ => return None,
        };
        (read.write(sink) == format!("{name}{EXTENSION}")).then_some(read)
    }

    /// The name.
    pub(super) fn write(&self, sink: &str) -> String {
        let Self { first, last, part, compacted } = self;
        if *compacted {
            format!("{sink}-{COMPACTED}-{first}-{last}-{part}{EXTENSION}")
        } else {
            format!("{sink}-{first}-{part}{EXTENSION}")
        }
    }
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_reads_back_and_another_is_not_taken_for_one() {
        let merged = FileName { first: 3, last: 17, part: 2, compacted: true };
        for (name, text) in
            [(FileName::published(12, 0), "history-12-0.parquet"), (merged, "history-compacted-3-17-2.parquet")]
        {
            assert_eq!(name.write("history"), text);
            assert_eq!(FileName::read("history", &Path::new("/x/dt=2026-11-20/hh=01").join(text)), Some(name));
        }
        for text in [
            "history-12-0.part",
            "history-12.parquet",
            "history-+12-0.parquet",
            "history-012-0.parquet",
            "history_2-12-0.parquet",
            "other-12-0.parquet",
            "history-compacted-3-17.parquet",
            "history-merged-3-17-2.parquet",
            "history-12-0-0.parquet",
            ".history-12-0.parquet",
        ] {
            assert_eq!(FileName::read("history", Path::new(text)), None, "{text}");
        }
        let mut order = [merged, FileName::published(20, 0), FileName::published(2, 9), FileName::published(2, 10)];
        order.sort();
        assert_eq!(order.map(|name| (name.first, name.part)), [(2, 9), (2, 10), (3, 2), (20, 0)]);
    }
}
