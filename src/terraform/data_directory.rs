//! Terraform's data directory, `.terraform`: which backend and which workspace are in use.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::backend::CachedBackend;
use super::command_line::CommandLine;
use crate::sys::plain_file;

/// What the data directory says at one moment.
///
/// It is looked at before a run and after it: an `init` or a `workspace select` changes it in between, and a killed one
/// may leave the old one.
#[derive(Clone, Debug)]
pub(crate) struct DataDirectory {
    /// The backend that `init` wrote down, with the values of `-backend-config` in it: secrets among them.
    pub(crate) backend: Option<CachedBackend>,
    /// The selected workspace, `default` if none was.
    pub(crate) workspace: String,
}

impl DataDirectory {
    /// Where it is: TF_DATA_DIR or `.terraform`, below the directory that `-chdir` names
    /// (internal/command/meta.go, `DataDir`; main.go changes the directory before).
    pub(crate) fn path(current: &Path, command_line: &CommandLine) -> PathBuf {
        let name = std::env::var_os("TF_DATA_DIR")
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| OsString::from(".terraform"));
        command_line.working_directory(current).join(name)
    }

    /// Reads the directory as it is now.
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
