//! The files in `examples/`, each run as it is by the built binary, against real servers and with stock clients.

mod mqtt_devices;
mod publishing_queue;
mod redis_worker;

use crate::support::Scratch;
use crate::support::program::{example, run};

/// Every example's file.
fn files() -> Vec<String> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let entries = std::fs::read_dir(folder).expect("the examples");
    let names = entries.map(|entry| entry.expect("a file").file_name().to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(".yaml")).collect()
}

#[test]
fn every_example_checks_clean_and_says_how_to_run_it() {
    let readme = example("README.md");
    for name in files() {
        let scratch = Scratch::new();
        scratch.write(&name, &example(&name));
        let output = run(scratch.path(), &["check", &name]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains("warning"), "{name}: {said}");
        let head: String = example(&name).lines().take_while(|line| line.starts_with('#')).collect();
        for part in ["Run it", &format!("run examples/{name}"), "Try it:"] {
            assert!(head.contains(part), "{name} does not say `{part}`");
        }
        assert!(readme.contains(&format!("({name})")), "README.md does not name {name}");
    }
}

#[test]
fn an_old_path_below_the_api_is_free_but_its_own_paths_are_not() {
    for (path, is_free) in [
        ("/api/v1/stream", true),
        ("/api/v1/telemetry/live", true),
        ("/api/v1/stats", false),
        ("/api/v1/pipelines", false),
        ("/api/v1/connections", false),
        ("/api/v1/query", false),
        ("/api/v1/metrics/device_messages", false),
        ("/health", false),
        ("/", false),
    ] {
        let yaml = example("mqtt-devices.yaml").replace("path: /api/v1/stream\n", &format!("path: {path}\n"));
        let scratch = Scratch::new();
        scratch.write("pipelines.yaml", &yaml);
        let output = run(scratch.path(), &["check"]);
        let said = String::from_utf8_lossy(&output.stdout);
        let refused = said.contains(&format!("the path `{path}` belongs to the program itself"));
        assert_eq!((output.status.success(), refused), (is_free, !is_free), "{path}: {said}");
    }
}
