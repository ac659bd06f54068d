//! What the unit tests of sources share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pipeline::config::{CheckContext, Position, Problems, deserialize, tree};
use pipeline::http::Routes;
use pipeline::plugin::{SourceConfig, SourceContext, SourceShape};
use pipeline::status::Status;

/// Reads and checks a block without its `type`; the problems are in the second part.
fn run<T: SourceConfig>(yaml: &str) -> (Option<(T, SourceShape)>, Problems) {
    let node = tree::parse(yaml).expect("YAML");
    let mut problems = Problems::default();
    let mut cx = CheckContext::new(&mut problems, "source test", Position { line: 1, column: 1 }, Path::new("."));
    let config = deserialize::read::<T>(&node, &mut cx);
    let both = config.and_then(|config| config.check(&mut cx).map(|shape| (config, shape)));
    (both, problems)
}

/// A configuration that reads and checks clean.
pub(crate) fn read<T: SourceConfig>(yaml: &str) -> T {
    let (read, problems) = run::<T>(yaml);
    read.unwrap_or_else(|| panic!("{yaml}: {}", problems.render("test"))).0
}

/// What a configuration emits.
pub(crate) fn check<T: SourceConfig>(config: &T) -> Option<SourceShape> {
    let mut problems = Problems::default();
    config.check(&mut CheckContext::new(&mut problems, "source test", Position::default(), Path::new(".")))
}

/// What is wrong with a block.
pub(crate) fn problems<T: SourceConfig>(yaml: &str) -> String {
    run::<T>(yaml).1.render("test")
}

/// A context without anything around it.
pub(crate) fn context() -> SourceContext {
    SourceContext {
        name: "test".to_owned(),
        folder: PathBuf::from("."),
        state_dir: PathBuf::from("."),
        routes: Routes::default(),
        status: Arc::new(Status::default()),
    }
}
