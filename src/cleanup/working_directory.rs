//! The directory in which terraform worked. Relative paths in a backend and in the environment (certificates, shared
//! files, tokens) have a meaning only there. With `-chdir`, terraform is in that directory and `tf` is not.

use std::path::{Path, PathBuf};

/// Keeps this process in another working directory until it is dropped.
#[derive(Debug)]
pub(crate) struct Within(Option<PathBuf>);

impl Within {
    /// Changes the working directory to `directory`, as [`go`] does.
    pub(crate) fn enter(directory: &Path) -> Self {
        let before = std::env::current_dir().ok();
        go(directory);
        Self(before)
    }
}

/// Changes the working directory to `directory` for good. If that directory is gone, the work goes on, because absolute
/// paths still mean what they did. But relative paths must not mean the files of the directory in which this process
/// happens to be, which belong to another project. So this process changes to the root, where they mean nothing.
pub(crate) fn go(directory: &Path) {
    if std::env::set_current_dir(directory).is_err() {
        let _ = std::env::set_current_dir("/");
    }
}

impl Drop for Within {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = std::env::set_current_dir(before);
        }
    }
}
