//! `pipeline fields SOURCE`: connects and prints the `fields:` block to paste.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use pipeline::config::tree::{Node, Value};
use pipeline::config::{CheckContext, Problems, did_you_mean};
use pipeline::http::Routes;
use pipeline::plugin::SourceContext;
use pipeline::status::Status;

use super::{Failure, by_blame, load, print};
use crate::plugins::PLUGINS;

#[derive(Debug, Args)]
pub(super) struct FieldsCommand {
    /// The source's name
    source: String,
    /// The YAML file [default: pipelines.yaml]
    #[arg(long)]
    config: Option<PathBuf>,
}

impl FieldsCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        let loaded = load(self.config.as_deref())?;
        let names = || loaded.file.sources.iter().map(|source| source.name.value.as_str());
        let Some(entry) = loaded.file.sources.iter().find(|source| source.name.value == self.source) else {
            let hint = did_you_mean(&self.source, names()).map(|hint| format!("; {hint}")).unwrap_or_default();
            return Err(Failure::user(format!("no source `{}`{hint}", self.source)));
        };
        let type_name = &entry.common.type_name.value;
        let plugin = PLUGINS.source(type_name).ok_or_else(|| Failure::user(format!("no source type `{type_name}`")))?;
        let has_errors = |problems: &Problems| {
            eprint!("{}", problems.render_errors(&loaded.path.display().to_string()));
            Failure::user(format!("the source `{}` has errors", self.source))
        };
        if lacks_variable(&entry.options, &loaded.problems) {
            return Err(has_errors(&loaded.problems));
        }
        // The block may lack what this command finds out, so its own check is not asked.
        let mut problems = Problems::default();
        let node = format!("source {}", self.source);
        let mut cx = CheckContext::new(&mut problems, node, entry.position, &loaded.file.folder);
        let Some(config) = (plugin.read)(&entry.options, &mut cx) else {
            return Err(has_errors(&problems));
        };
        let context = SourceContext {
            name: self.source.clone(),
            folder: loaded.file.folder.clone(),
            state_dir: loaded.file.folder.join(&loaded.file.checkpoint.dir),
            routes: Routes::default(),
            status: Arc::new(Status::default()),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|error| Failure::running(error.to_string()))?;
        let fields = runtime.block_on(config.discover(context)).map_err(|error| by_blame(&error))?;
        print(&fields.to_string())
    }
}

/// Whether a value below `node` lacks its variable: the text that is there instead would be taken for the value.
fn lacks_variable(node: &Node, problems: &Problems) -> bool {
    match &node.value {
        Value::Scalar(_) => problems.is_unset(node.position),
        Value::Sequence(items) => items.iter().any(|item| lacks_variable(item, problems)),
        Value::Mapping(entries) => entries.iter().any(|(_, value)| lacks_variable(value, problems)),
    }
}
