//! Which files a path names.

use std::io;
use std::path::{Path, PathBuf};

use pipeline::error::{Error, Result};

use super::counted;

/// Most files of one source; a pattern that finds more is rather a mistake (`/**`).
const FILES_MAX: usize = 1_000_000;

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DataFile {
    /// The path as the user would write it: in positions and messages.
    pub(super) name: String,
    /// Where it is.
    pub(super) path: PathBuf,
}

/// The files that `pattern` names, as counted from `folder`, in the order of their names; at least one.
pub(super) fn find(folder: &Path, pattern: &str) -> Result<Vec<DataFile>> {
    if !pattern.contains(['*', '?']) {
        let file = DataFile { name: pattern.to_owned(), path: folder.join(pattern) };
        let metadata = file.path.metadata().map_err(|error| unreadable(pattern, &file.path, error))?;
        if metadata.is_dir() {
            return Err(Error::user(format!("`{pattern}` is a folder; name its files, such as `{pattern}/*.json`")));
        }
        return Ok(vec![file]);
    }
    let (root, relative) = match pattern.strip_prefix('/') {
        Some(rest) => (DataFile { name: "/".into(), path: "/".into() }, rest),
        None => (DataFile { name: String::new(), path: folder.to_path_buf() }, pattern),
    };
    let parts: Vec<&str> = relative.split('/').filter(|part| !part.is_empty()).collect();
    let mut found = Vec::new();
    search(&root, &parts, &mut found)?;
    found.sort();
    found.dedup();
    match found.len() {
        0 => Err(Error::outside(format!("no file matches `{pattern}` in {}", folder.display())).fatal()),
        1..=FILES_MAX => Ok(found),
        many => Err(Error::user(format!("`{pattern}` matches {}, more than {FILES_MAX}", counted(many, "file")))),
    }
}

/// Why a file cannot be opened.
pub(super) fn unreadable(name: &str, path: &Path, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::NotFound {
        return Error::outside(format!("there is no file `{name}` ({})", path.display())).fatal();
    }
    Error::outside(format!("`{name}` cannot be read")).because(error).fatal()
}

/// Collects the files below `at` that the rest of the pattern names.
fn search(at: &DataFile, parts: &[&str], found: &mut Vec<DataFile>) -> Result<()> {
    let Some((part, rest)) = parts.split_first() else {
        if at.path.is_file() {
            found.push(at.clone());
        }
        return Ok(());
    };
    if found.len() > FILES_MAX {
        return Ok(());
    }
    if *part == "**" {
        search(at, rest, found)?;
        for below in entries(at)? {
            // Links to folders are not followed: they may lead back up.
            if !below.name.rsplit('/').next().unwrap_or_default().starts_with('.') && is_folder(&below.path) {
                search(&below, parts, found)?;
            }
        }
        return Ok(());
    }
    if !part.contains(['*', '?']) {
        let below = below(at, part);
        return if below.path.exists() { search(&below, rest, found) } else { Ok(()) };
    }
    for entry in entries(at)? {
        if matches(part, entry.name.rsplit('/').next().unwrap_or_default()) {
            search(&entry, rest, found)?;
        }
    }
    Ok(())
}

fn below(at: &DataFile, part: &str) -> DataFile {
    let slash = if at.name.is_empty() || at.name.ends_with('/') { "" } else { "/" };
    DataFile { name: format!("{}{slash}{part}", at.name), path: at.path.join(part) }
}

fn is_folder(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir())
}

/// What lies in a folder; nothing if it is none.
fn entries(folder: &DataFile) -> Result<Vec<DataFile>> {
    if !folder.path.is_dir() {
        return Ok(Vec::new());
    }
    let fail = |error| unreadable(&folder.name, &folder.path, error);
    let mut list = Vec::new();
    for entry in folder.path.read_dir().map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        let Some(name) = name.to_str() else {
            let shown = folder.path.join(&name);
            return Err(Error::user(format!("the name of {} is no UTF-8; rename it", shown.display())));
        };
        list.push(below(folder, name));
    }
    Ok(list)
}

/// Whether a name fits a pattern of `*` (any characters) and `?` (any one). A hidden name needs its dot written.
fn matches(pattern: &str, name: &str) -> bool {
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where to try again: after the last star, which then takes one character more.
    let mut retry = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                retry = Some((p + 1, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((star, taken)) = retry else { return false };
                retry = Some((star, taken + 1));
                (p, n) = (star, taken + 1);
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_wildcards() {
        for (pattern, name, expected) in [
            ("*.json", "a.json", true),
            ("*.json", "a.jsonl", false),
            ("*.json", ".json", false),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "aXbYbZ", false),
            ("day-??.csv", "day-07.csv", true),
            ("day-??.csv", "day-7.csv", false),
            ("*", "ü", true),
            ("?", "ü", true),
            ("**", "", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn patterns_find_files_in_the_order_of_their_names() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["b.json", "a.json", "a.csv", "x/1/c.json", "x/d.json", ".stage/e.json", "x/.f.json"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
            std::fs::write(path, "").expect("a file");
        }
        for (pattern, expected) in [
            ("a.csv", vec!["a.csv"]),
            ("*.json", vec!["a.json", "b.json"]),
            ("x/*.json", vec!["x/d.json"]),
            ("*/*/c.json", vec!["x/1/c.json"]),
            ("**/*.json", vec!["a.json", "b.json", "x/1/c.json", "x/d.json"]),
            (".stage/*", vec![".stage/e.json"]),
        ] {
            let found = find(folder.path(), pattern).expect(pattern);
            assert_eq!(found.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), expected, "{pattern}");
        }
        for (pattern, expected) in
            [("none.json", "there is no file `none.json`"), ("x", "`x` is a folder"), ("*.parquet", "no file matches")]
        {
            let error = find(folder.path(), pattern).expect_err(pattern).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
