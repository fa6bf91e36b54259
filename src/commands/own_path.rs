//! The path by which this program is to be called: by a link, an alias or a script that outlives this process.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where this program lies.
pub(super) struct OwnPath {
    /// An absolute path. One on PATH before any other: that one an upgrade leaves in place, while a program is often a
    /// link there, to a directory that has its version in its name.
    pub(super) path: PathBuf,
    /// Whoever types `tf` gets this program.
    pub(super) on_path: bool,
}

/// Whether both names lead to one file.
pub(super) fn same_file(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    identity(one).is_some() && identity(one) == identity(other)
}

/// Looks for this program on PATH.
///
/// # Errors
/// Nobody knows where this program lies.
pub(super) fn find() -> io::Result<OwnPath> {
    let running = std::env::current_exe()?;
    let first = which::which("tf").ok().filter(|path| path.is_absolute() && same_file(path, &running));
    Ok(OwnPath { on_path: first.is_some(), path: first.unwrap_or(running) })
}
