//! The rules of the house that a program can check.

use std::fs;
use std::path::{Path, PathBuf};

/// Every Rust file below a folder of the repository.
fn rust_files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no file in {folder}");
    found
}

/// A file without its tests, and without comments.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a file");
    let tests = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    let lines = text[..tests].lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

fn is_test(path: &Path) -> bool {
    path.components().any(|part| matches!(part.as_os_str().to_str(), Some("tests" | "tests.rs" | "testing.rs")))
}

#[test]
fn imports_run_one_way() {
    let dependencies = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name).join("Cargo.toml");
        let text = fs::read_to_string(path).expect("a manifest");
        let section = text.split("[dependencies]").nth(1).unwrap_or_default();
        let section = section.split("\n[").next().unwrap_or_default();
        let names = section.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
        names.filter(|name| !name.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    };
    let own = ["pipeline", "sources", "operators", "sinks", "wire"];
    for (name, allowed) in [
        ("pipeline", &[][..]),
        ("wire", &["pipeline"][..]),
        ("operators", &["pipeline"][..]),
        ("sources", &["pipeline", "wire"][..]),
        ("sinks", &["pipeline", "wire"][..]),
    ] {
        let wrong: Vec<String> = dependencies(name)
            .into_iter()
            .filter(|dependency| own.contains(&dependency.as_str()) && !allowed.contains(&dependency.as_str()))
            .collect();
        assert!(wrong.is_empty(), "{name} may not depend on {wrong:?}");
    }
}

#[test]
fn operators_have_no_clock_no_io_and_no_tasks() {
    let refused =
        ["std::fs", "std::net", "Instant", "SystemTime", "std::thread", "tokio", "async fn", "now_us", "rand::"];
    for path in rust_files("operators/src").into_iter().filter(|path| !is_test(path)) {
        let code = code(&path);
        for word in refused {
            assert!(!code.contains(word), "{}: `{word}` in an operator", path.display());
        }
    }
}

#[test]
fn plugins_leave_waiting_and_tasks_to_the_engine() {
    for folder in ["sources/src", "operators/src", "sinks/src"] {
        for path in rust_files(folder).into_iter().filter(|path| !is_test(path)) {
            assert!(!code(&path).contains("thread::sleep"), "{}: a plugin sleeps", path.display());
        }
    }
}

#[test]
fn every_plugin_file_is_in_its_list() {
    for (folder, kind) in [("sources", "SourceConfig"), ("operators", "OperatorConfig"), ("sinks", "SinkConfig")] {
        let list =
            fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join("src/lib.rs")).expect("a list");
        for path in rust_files(&format!("{folder}/src")).into_iter().filter(|path| !is_test(path)) {
            for line in code(&path).lines().filter(|line| line.starts_with(&format!("impl {kind} for "))) {
                let name = line.split(' ').nth(3).expect("a name");
                assert!(list.contains(&format!("::{name}>()")), "{}: `{name}` is not in the list", path.display());
            }
        }
    }
}

#[test]
fn nothing_from_outside_can_panic_by_unwrap() {
    for folder in ["pipeline/src", "sources/src", "operators/src", "sinks/src", "wire/src", "src"] {
        for path in rust_files(folder).into_iter().filter(|path| !is_test(path)) {
            for word in [".unwrap()", "todo!(", "unimplemented!("] {
                assert!(!code(&path).contains(word), "{}: `{word}`", path.display());
            }
        }
    }
}
