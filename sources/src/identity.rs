//! What a source remembers of itself: the name under which a server keeps things for it, and what goes with the name.
//!
//! A small file in the state folder, so that the name stays the same through restarts and differs between installations.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;

use pipeline::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

/// Hexadecimal digits of the random part of a name; enough for all installations at one server.
const SUFFIX_DIGITS: usize = 12;

/// A name that no other installation has.
pub(crate) fn new_name(source: &str) -> String {
    let random = Uuid::new_v4().simple().to_string();
    format!("tailwater-{source}-{}", &random[..SUFFIX_DIGITS])
}

/// Reads the file, if there is one. `without` says what the source does if the user removes a damaged one.
pub(crate) fn load<T: DeserializeOwned>(path: &Path, without: &str) -> Result<Option<T>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::outside(format!("cannot read {}", path.display())).because(error)),
    };
    let damaged = |e| {
        let message = format!("{} is damaged; without it the source {without}", path.display());
        Error::outside(message).because(e).fatal()
    };
    serde_json::from_slice(&bytes).map(Some).map_err(damaged)
}

/// Replaces the file in one step, on the disk.
pub(crate) fn store<T: Serialize>(path: &Path, remembered: &T) -> Result<()> {
    let failed = |e: std::io::Error| Error::outside(format!("cannot write {}", path.display())).because(e);
    let text = serde_json::to_vec(remembered).map_err(|e| Error::internal("what a source remembers").because(e))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(failed)?;
    let next = path.with_extension("id.next");
    let mut file = File::create(&next).map_err(failed)?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed)?;
    std::fs::rename(&next, path).map_err(failed)?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_and_name_the_source() {
        let (one, other) = (new_name("devices"), new_name("devices"));
        assert!(one != other && one.starts_with("tailwater-devices-"), "{one} {other}");
    }

    #[test]
    fn what_was_stored_is_loaded_and_a_damaged_file_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state/mqtt-devices.id");
        assert_eq!(load::<String>(&path, "is new").expect("no file"), None);
        for name in ["one", "other"] {
            store(&path, &name).expect("stored");
            assert_eq!(load(&path, "is new").expect("a file"), Some(name.to_owned()));
        }
        std::fs::write(&path, "\"oth").expect("a file");
        let error = load::<String>(&path, "is new").expect_err("cut off").to_string();
        assert!(error.contains("mqtt-devices.id is damaged; without it the source is new"), "{error}");
    }
}
