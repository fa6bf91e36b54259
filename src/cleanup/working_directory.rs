//! Changes to the directory in which terraform worked. Relative paths in a backend and in the environment
//! (certificates, shared files, tokens) are relative to that directory. With `-chdir`, it is not the working directory
//! of `tf`.

use std::path::{Path, PathBuf};

/// Changes the working directory of this process. When the value is dropped, the previous working directory is
/// restored.
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

/// Changes the working directory to `directory`, and does not restore it. If `directory` does not exist any more,
/// changes to the root directory. The cleanup can continue there, because absolute paths are still valid. The process
/// must not stay in the previous working directory, because a relative path could then refer to a file of another
/// project.
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
