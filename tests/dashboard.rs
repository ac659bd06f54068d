//! Rules of the built-in page that must hold without a browser.

use std::path::{Path, PathBuf};

fn files() -> Vec<(PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboard");
    let entries = std::fs::read_dir(folder).expect("the dashboard's folder");
    let paths = entries.map(|entry| entry.expect("a file").path());
    paths.map(|path| (path.clone(), std::fs::read_to_string(path).expect("text"))).collect()
}

#[test]
fn the_page_takes_nothing_from_elsewhere_and_puts_no_html_in() {
    for (path, text) in files() {
        // The second group could make what a server sends run as a script.
        for forbidden in
            ["http://", "https://", "@import", "innerHTML", "outerHTML", "insertAdjacent", "eval(", "document.write"]
        {
            assert!(!text.contains(forbidden), "{}: {forbidden}", path.display());
        }
    }
}

#[test]
fn every_file_that_the_page_names_is_there_and_every_file_is_named() {
    let files = files();
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    let names: Vec<String> = files.iter().map(|(path, _)| name(path)).collect();
    let mut named = vec!["index.html".to_owned()];
    for (_, text) in &files {
        for quoted in text.split('"').skip(1).step_by(2) {
            let is_file = [".js", ".css"].iter().any(|end| quoted.ends_with(end));
            named.extend(is_file.then(|| quoted.trim_start_matches("./").to_owned()));
        }
    }
    for file in &named {
        assert!(names.contains(file), "{file} is not there");
    }
    for file in &names {
        assert!(named.contains(file), "{file} is named nowhere");
    }
}
