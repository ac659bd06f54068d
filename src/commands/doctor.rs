//! `pipeline doctor`: reads everything durable and says what is damaged; `--salvage` mends what can be mended.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use pipeline::runtime::doctor::{self, Examined};

use super::{Failure, counted, load, print};

#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// The YAML file [default: pipelines.yaml]
    file: Option<PathBuf>,
    /// Mend damaged inboxes and outboxes: keep every record that can be read, and the damaged file as FILE.damaged. Refused
    /// while a process runs on the state
    #[arg(long)]
    salvage: bool,
}

impl Doctor {
    pub(super) fn run(self) -> Result<(), Failure> {
        let graph = load(self.file.as_deref())?.graph()?;
        let mut text = String::new();
        if self.salvage {
            let salvaged = doctor::salvage(&graph)?;
            for line in &salvaged {
                let _ = writeln!(text, "{line}");
            }
            if salvaged.is_empty() {
                text.push_str("no inbox and no outbox is damaged: nothing to mend\n");
            }
            // What was done is told even if the rest cannot be read.
            print(&std::mem::take(&mut text))?;
        }
        let examined = doctor::examine(&graph)?;
        for finding in &examined.findings {
            let _ = writeln!(text, "{finding}");
        }
        text.push_str(&summary(&examined));
        print(&text)?;
        if examined.is_damaged() {
            return Err(Failure { message: String::new(), code: Failure::RUNNING });
        }
        Ok(())
    }
}

fn summary(examined: &Examined) -> String {
    let damaged = examined.findings.iter().filter(|finding| finding.damaged).count();
    let result = match damaged {
        0 => "all is well".to_owned(),
        count => format!("{} damaged", counted(count, "place")),
    };
    let running =
        if examined.running { "; a process runs on the state, what it writes just now is left out" } else { "" };
    format!(
        "{result}: {}, {}, {} with {} read{running}\n",
        counted(examined.checkpoints, "checkpoint"),
        counted(examined.logs, "log"),
        counted(examined.files, "history file"),
        counted(usize::try_from(examined.rows).unwrap_or(usize::MAX), "row"),
    )
}
