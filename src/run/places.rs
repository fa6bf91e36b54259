//! The places that one run can have locked: its backends, before and after, and its workspaces.

use std::path::{Path, PathBuf};

use crate::lock::place::{self, Place};
use crate::terraform::command_line::CommandLine;
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::log::{RecordedLock, UnnamedLock};

/// The backends and workspaces of a run.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The most likely first.
    pub(crate) directories: Vec<DataDirectory>,
    pub(crate) workspaces: Vec<String>,
    /// Where it read that.
    pub(crate) data_directory: String,
    /// Where its terraform works.
    pub(crate) working_directory: PathBuf,
}

impl Places {
    /// Those of a run of `command_line` in the directory `current`, whose data directory said so `before`, and says so
    /// `after`.
    pub(crate) fn new(
        current: &Path,
        before: &DataDirectory,
        after: DataDirectory,
        command_line: &CommandLine,
    ) -> Self {
        // TF_WORKSPACE wins over what is selected (internal/command/meta.go, `WorkspaceOverridden`).
        let mut workspaces = match std::env::var("TF_WORKSPACE") {
            Ok(name) if !name.is_empty() => vec![name],
            _ => vec![after.workspace.clone(), before.workspace.clone()],
        };
        workspaces.dedup();
        if command_line.command().starts_with("workspace ") {
            workspaces.extend(command_line.operands.iter().map(|operand| operand.to_string_lossy().into_owned()));
        }
        let data_directory = DataDirectory::path(current, command_line).to_string_lossy().into_owned();
        let working_directory = command_line.working_directory(current);
        Self { directories: vec![after, before.clone()], workspaces, data_directory, working_directory }
    }

    /// Where a lock that a log recorded can be.
    pub(crate) fn of(&self, recorded: &RecordedLock) -> Vec<Place> {
        let directories: Vec<&DataDirectory> = self.directories.iter().collect();
        place::find(recorded, &directories, &self.workspaces)
    }

    /// Where a lock can be that a log does not name.
    pub(crate) fn of_unnamed(&self, unnamed: &UnnamedLock) -> Vec<Place> {
        let directories: Vec<&DataDirectory> = self.directories.iter().collect();
        place::find_unnamed(unnamed, &directories, &self.workspaces)
    }

    /// Where a command without further words would lock.
    pub(crate) fn selected(&self) -> Option<Place> {
        let backend = self.directories.iter().find_map(|directory| directory.backend.as_ref())?;
        let place = Place {
            bucket: backend.string("bucket")?.to_owned(),
            key: backend.state_key(self.workspaces.first()?)?,
            table: backend.string("dynamodb_table").map(ToOwned::to_owned),
            lock_file: backend.flag("use_lockfile"),
            backend: backend.clone(),
        };
        (backend.kind == "s3" && (place.table.is_some() || place.lock_file)).then_some(place)
    }
}
