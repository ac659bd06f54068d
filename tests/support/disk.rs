//! A disk that can be full.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where room runs out.
pub enum Disk {
    /// A small file system of its own, unmounted when this is dropped.
    Mounted(PathBuf),
    /// The room of one process, taken by a limit on the size of its files: needs no rights.
    Limited,
}

/// Size of a mounted disk: room for the files of a test, and soon filled.
const MOUNTED: &str = "size=1m";

impl Disk {
    /// Mounts a small file system on a new folder, if this user may.
    pub fn mount(folder: &Path) -> Option<Self> {
        std::fs::create_dir_all(folder).expect("a folder");
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", MOUNTED, "tmpfs"]).arg(folder).output().ok()?.status.success();
        mounted.then(|| Self::Mounted(folder.to_owned()))
    }

    /// Leaves no room for the files of `process`.
    pub fn fill(&self, process: u32) {
        match self {
            Self::Mounted(folder) => {
                let mut file = File::create(folder.join("filler")).expect("a file");
                let mut bytes = 64 * 1024;
                // Down to the last byte: with some room left, the first small file would still fit.
                while bytes > 0 {
                    match file.write_all(&vec![0; bytes]) {
                        Ok(()) => {}
                        Err(_) => bytes /= 2,
                    }
                }
            }
            Self::Limited => limit(process, "0:"),
        }
    }

    /// Makes room again.
    pub fn free(&self, process: u32) {
        match self {
            Self::Mounted(folder) => std::fs::remove_file(folder.join("filler")).expect("the file"),
            Self::Limited => limit(process, "unlimited:"),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Self::Mounted(folder) = self {
            let _ = Command::new("umount").arg("-l").arg(folder).output();
        }
    }
}

fn limit(process: u32, size: &str) {
    let mut command = Command::new("prlimit");
    command.args(["--pid", &process.to_string(), &format!("--fsize={size}")]);
    let output = command.output().expect("prlimit");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
