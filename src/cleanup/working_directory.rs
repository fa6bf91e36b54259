//! Where terraform worked: relative paths in a backend and in the environment (certificates, shared files, tokens) mean
//! something there alone, and terraform is there by `-chdir` while we are not.

use std::path::{Path, PathBuf};

/// This process is in another directory for as long as this lives.
#[derive(Debug)]
pub(crate) struct Within(Option<PathBuf>);

impl Within {
    /// Goes into `directory`, as [`go`] does.
    pub(crate) fn enter(directory: &Path) -> Self {
        let before = std::env::current_dir().ok();
        go(directory);
        Self(before)
    }
}

/// Goes into `directory` for good. One that is gone is no reason not to go on: absolute paths still mean what they did. But
/// relative ones must not come to mean the files of wherever this process happens to be, which is another's project: at
/// the root they mean nothing.
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
