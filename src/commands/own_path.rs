//! The path of this program for links, aliases and scripts, which must stay valid after this process has exited.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The path of this program.
pub(super) struct OwnPath {
    /// An absolute path. If `tf` on PATH is this program, this is the path on PATH, because that path stays valid after
    /// an upgrade. It is often a link into a directory whose name contains the version. An upgrade replaces that
    /// directory.
    pub(super) path: PathBuf,
    /// Whether the command `tf` runs this program.
    pub(super) on_path: bool,
}

/// Returns whether both paths lead to the same file. Returns false if one of the paths leads to no file.
pub(super) fn same_file(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    identity(one).is_some() && identity(one) == identity(other)
}

/// Finds the path of this program, on PATH if possible.
///
/// # Errors
/// Fails if the operating system does not report the path of the running program.
pub(super) fn find() -> io::Result<OwnPath> {
    let running = std::env::current_exe()?;
    let first = which::which("tf").ok().filter(|path| path.is_absolute() && same_file(path, &running));
    Ok(OwnPath { on_path: first.is_some(), path: first.unwrap_or(running) })
}
