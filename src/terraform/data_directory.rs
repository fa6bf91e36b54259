//! Terraform's data directory, `.terraform`. It contains the cached backend and the selected workspace.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::backend::CachedBackend;
use super::command_line::CommandLine;
use crate::sys::plain_file;

/// The content of the data directory at one moment.
///
/// `tf` reads the directory before and after a run, because an `init` or a `workspace select` changes it in between. If
/// such a command is killed, the directory may still have the old content.
#[derive(Clone, Debug)]
pub(crate) struct DataDirectory {
    /// The backend that `init` cached, with the values of `-backend-config`. It may contain secrets. `None` if no
    /// backend is cached, or if the cached one cannot be read.
    pub(crate) backend: Option<CachedBackend>,
    /// The selected workspace. It is `default` if none was selected.
    pub(crate) workspace: String,
}

impl DataDirectory {
    /// Returns the path of the data directory: `TF_DATA_DIR` or `.terraform`, in the directory that `-chdir` names
    /// (internal/command/meta.go, `DataDir`; main.go changes the directory before that).
    pub(crate) fn path(current: &Path, command_line: &CommandLine) -> PathBuf {
        let name = std::env::var_os("TF_DATA_DIR")
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| OsString::from(".terraform"));
        command_line.working_directory(current).join(name)
    }

    /// Reads the current content of the data directory.
    pub(crate) fn read(path: &Path) -> Self {
        let backend = plain_file::read(&path.join("terraform.tfstate")).ok();
        let workspace = plain_file::read_text(&path.join("environment")).unwrap_or_default();
        Self {
            backend: backend.and_then(|json| CachedBackend::parse(&json)),
            workspace: match workspace.trim() {
                "" => "default".to_owned(),
                name => name.to_owned(),
            },
        }
    }
}
