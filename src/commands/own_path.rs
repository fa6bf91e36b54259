//! The path of this program for links, aliases and scripts, which must stay valid after this process has exited.

use std::io;
use std::path::{Path, PathBuf};

use crate::sys::file_id::FileId;

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
    FileId::at(one).is_ok_and(|one| FileId::at(other).is_ok_and(|other| one == other))
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
