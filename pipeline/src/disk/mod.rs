//! The few file operations that everything durable is built from, behind one trait.
//!
//! Two disks: [`RealDisk`] over the operating system, and [`simulated::SimulatedDisk`], which forgets what was not
//! synced and fails on request, so that tests can cut the power at every instruction.
//!
//! What a caller may rely on, on both:
//!
//! - Written bytes survive a power loss once [`DiskFile::sync_data`] came back without an error.
//! - A new name, a rename or a removal survives it once [`Disk::sync_folder`] of its folder came back without an error.
//! - A rename is atomic: a reader, or the next start, finds the old file or the new one under the name.
//! - After a failed sync nothing is known about what was written since the last one. Syncing again proves nothing: the
//!   operating system may have dropped the bytes and called them clean.

pub mod simulated;

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// What lies in a folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The last part of its path.
    pub name: String,
    /// Bytes of a file; zero for a folder.
    pub length: u64,
    /// Whether it is a folder.
    pub folder: bool,
}

/// A file open for writing. Every write goes to its end.
pub trait DiskFile: Write + Send + Sync + Debug {
    /// Makes the bytes and the length durable.
    fn sync_data(&mut self) -> io::Result<()>;

    /// Makes the bytes, the length and the file's attributes durable.
    fn sync_all(&mut self) -> io::Result<()>;

    /// Cuts the file, or extends it with zeros. The next write goes to the new end.
    fn set_len(&mut self, length: u64) -> io::Result<()>;

    /// Writes over bytes that are there; the length stays. With the same bytes it makes sure that the next sync is about
    /// them: those that an earlier sync failed to write may be called clean since.
    fn overwrite(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// The file operations.
pub trait Disk: Send + Sync + Debug {
    /// A new empty file, or an existing one emptied.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// An existing file, to write at its end, and its length. `NotFound` if there is none.
    fn append(&self, path: &Path) -> io::Result<(Box<dyn DiskFile>, u64)>;

    /// A whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// At most `length` bytes from `offset` on; fewer only at the end of the file.
    fn read_range(&self, path: &Path, offset: u64, length: usize) -> io::Result<Vec<u8>>;

    /// The files and folders in a folder, sorted by name. Names that are not UTF-8 are left out: none of them is ours.
    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>>;

    /// Creates a folder and those above it that are missing, each made durable in the one above. An existing one is no
    /// error, and it too is made durable in the one above: a process may have been killed just after it made it.
    fn create_folder(&self, folder: &Path) -> io::Result<()>;

    /// Gives a file another name, replacing what had it. Durable after [`Disk::sync_folder`].
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file. Durable after [`Disk::sync_folder`].
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Whether a file or folder is there.
    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// Makes the names in a folder durable.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;

    /// [`Disk::remove`], with a file that is already gone as a success: a process that was killed in the middle of
    /// removing must find nothing to complain about.
    fn remove_if_there(&self, path: &Path) -> io::Result<()> {
        match self.remove(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

/// Extension of a file that [`write_whole`] is writing.
const DRAFT: &str = "draft";

/// Why a file could not be written as a whole.
#[derive(Debug)]
pub enum NotWritten {
    /// Nothing has changed.
    Unchanged(io::Error),
    /// The folder could not be synced: the file is there now, but a power loss may take it back.
    Unknown(io::Error),
}

impl From<NotWritten> for io::Error {
    fn from(not_written: NotWritten) -> Self {
        match not_written {
            NotWritten::Unchanged(error) | NotWritten::Unknown(error) => error,
        }
    }
}

/// Writes a file that is there as a whole and durable, or not at all, whatever happens: under another name (the extension
/// `draft`), synced, renamed into place. The file is left open at its end.
pub fn write_whole(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<Box<dyn DiskFile>, NotWritten> {
    let draft = path.with_extension(DRAFT);
    let write = || {
        let mut file = disk.create(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        disk.rename(&draft, path)?;
        Ok(file)
    };
    let file = write().map_err(|error| {
        // On a full disk it would only take room. If it stays: the next start removes it.
        let _ = disk.remove_if_there(&draft);
        NotWritten::Unchanged(error)
    })?;
    disk.sync_folder(path.parent().unwrap_or(Path::new(""))).map_err(NotWritten::Unknown)?;
    Ok(file)
}

/// Removes what a process that was killed had begun to write with [`write_whole`].
pub fn remove_drafts(disk: &dyn Disk, folder: &Path) -> io::Result<()> {
    for entry in disk.list(folder)? {
        let path = folder.join(&entry.name);
        if !entry.folder && path.extension().is_some_and(|extension| extension == DRAFT) {
            disk.remove_if_there(&path)?;
        }
    }
    Ok(())
}

/// The disk of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

#[derive(Debug)]
struct RealFile(File);

impl Write for RealFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl DiskFile for RealFile {
    fn sync_data(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn sync_all(&mut self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn set_len(&mut self, length: u64) -> io::Result<()> {
        self.0.set_len(length)?;
        // Otherwise a write after a cut would leave a hole.
        self.0.seek(SeekFrom::Start(length)).map(drop)
    }

    fn overwrite(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.seek(SeekFrom::Start(offset))?;
        self.0.write_all(bytes)?;
        self.0.seek(SeekFrom::End(0)).map(drop)
    }
}

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(RealFile(File::create(path)?)))
    }

    fn append(&self, path: &Path) -> io::Result<(Box<dyn DiskFile>, u64)> {
        // Not `append`: with it the operating system would put an overwrite at the end too.
        let mut file = OpenOptions::new().write(true).open(path)?;
        let length = file.seek(SeekFrom::End(0))?;
        Ok((Box::new(RealFile(file)), length))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn read_range(&self, path: &Path, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        // A damaged length may ask for more than there is: memory is taken for what is there.
        let left = file.metadata()?.len().saturating_sub(offset);
        let length = length.min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut bytes = Vec::with_capacity(length);
        file.seek(SeekFrom::Start(offset))?;
        file.take(length as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        let mut list = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            match entry.metadata() {
                Ok(data) => {
                    list.push(Entry { name, length: if data.is_dir() { 0 } else { data.len() }, folder: data.is_dir() })
                }
                // Removed since the listing began.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        list.sort();
        Ok(list)
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        let Some(above) = folder.parent() else { return Ok(()) };
        if folder.is_dir() {
            return match self.sync_folder(above) {
                // Someone else's folder, and so someone else's care.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
                result => result,
            };
        }
        self.create_folder(above)?;
        match fs::create_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists || !folder.is_dir() => return Err(error),
            _ => {}
        }
        self.sync_folder(above)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        fs::exists(path)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        // The folder of a bare file name.
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::simulated::SimulatedDisk;
    use super::*;

    /// What both disks promise, from inside the folder `root`.
    fn check(disk: &dyn Disk, root: &Path) {
        let folder = root.join("a/b");
        disk.create_folder(&folder).expect("created");
        disk.create_folder(&folder).expect("already there");
        assert!(disk.exists(&folder).expect("looked"));
        let path = folder.join("one");
        assert_eq!(disk.append(&path).expect_err("missing").kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.read(&path).expect_err("missing").kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.remove(&path).expect_err("missing").kind(), io::ErrorKind::NotFound);
        disk.remove_if_there(&path).expect("nothing to do");

        let mut file = disk.create(&path).expect("created");
        file.write_all(b"hello world").expect("written");
        file.set_len(5).expect("cut");
        file.write_all(b", you").expect("written");
        file.sync_data().expect("synced");
        drop(file);
        let (mut file, length) = disk.append(&path).expect("opened");
        assert_eq!(length, 10);
        file.set_len(7).expect("cut");
        file.overwrite(0, b"H").expect("written");
        file.write_all(b"me").expect("written");
        file.sync_all().expect("synced");
        assert_eq!(disk.read(&path).expect("read"), b"Hello, me");
        assert_eq!(disk.read_range(&path, 7, 100).expect("read"), b"me");
        assert_eq!(disk.read_range(&path, 0, 5).expect("read"), b"Hello");
        assert_eq!(disk.read_range(&path, 100, usize::MAX).expect("read"), b"");

        let other = folder.join("two");
        disk.create(&other).expect("created");
        disk.rename(&path, &other).expect("renamed");
        disk.sync_folder(&folder).expect("synced");
        let file = Entry { name: "two".to_owned(), length: 9, folder: false };
        assert_eq!(disk.list(&folder).expect("listed"), [file]);
        let inner = Entry { name: "b".to_owned(), length: 0, folder: true };
        assert_eq!(disk.list(&root.join("a")).expect("listed"), [inner]);
        disk.remove(&other).expect("removed");
        assert!(!disk.exists(&other).expect("looked"));
        assert_eq!(disk.list(&root.join("c")).expect_err("missing").kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn both_disks_keep_the_same_promises() {
        let folder = tempfile::tempdir().expect("folder");
        check(&RealDisk, folder.path());
        check(&SimulatedDisk::new(1), Path::new(""));
        check(&SimulatedDisk::new(1), Path::new("/"));
    }
}
