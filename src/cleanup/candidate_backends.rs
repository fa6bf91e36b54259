//! The candidate backends of a run: the backends and workspaces in which the run may have taken locks.

use std::path::{Path, PathBuf};

use crate::aws::redacted_backend;
use crate::aws::redacted_backend::{AwsEnvironment, RedactedBackend};
use crate::cleanup::planned_backends::PlannedBackends;
use crate::cleanup::working_directory::Within;
use crate::lock::location::{self, LockLocation, Workspaces};
use crate::terraform::backend::CachedBackend;
use crate::terraform::command_line::CommandLine;
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::log::{RecordedLock, UnnamedLock};

/// Whether a command may use every workspace. `init` may, because it can migrate all workspaces to another backend
/// (internal/command/meta_backend_migrate.go).
pub(crate) fn is_for_any_workspace(command: &str) -> bool {
    command == "init"
}

/// The backends and workspaces that a run may have used.
#[derive(Clone, Debug)]
pub(crate) struct CandidateBackends {
    /// The contents of the data directories with these backends. The first one is the one that the run most likely
    /// used.
    pub(crate) directories: Vec<DataDirectory>,
    /// The names of the workspaces. The first one is the one that the run most likely used.
    pub(crate) workspaces: Vec<String>,
    /// Whether the run may have used every workspace that exists.
    pub(crate) any_workspace: bool,
    /// The path of the run's data directory.
    pub(crate) data_directory: String,
    /// The directory in which the run's terraform works, after `-chdir`.
    pub(crate) working_directory: PathBuf,
}

impl CandidateBackends {
    /// Returns the candidate backends of a run of `command_line` in the directory `current`. `before` and `after` are
    /// the contents of the run's data directory before and after the run. `planned_backends` are the backends that
    /// follow from `command_line`.
    pub(crate) fn new(
        current: &Path,
        before: &DataDirectory,
        after: DataDirectory,
        command_line: &CommandLine,
        planned_backends: &PlannedBackends,
    ) -> Self {
        // TF_WORKSPACE takes precedence over the selected workspace (internal/command/meta.go, `WorkspaceOverridden`).
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
        let configured = planned_backends.configured(&after.workspace);
        let directories = [after, before.clone()].into_iter().chain(configured).collect();
        let any_workspace = is_for_any_workspace(&command_line.command());
        Self { directories, workspaces, any_workspace, data_directory, working_directory }
    }

    /// Adds the backend and the workspace in the run's plan, if the run has a plan that can be read.
    pub(crate) fn with_plan(mut self, planned_backends: &PlannedBackends) -> Self {
        if let Some(planned) = planned_backends.planned() {
            self.workspaces.push(planned.workspace.clone());
            self.directories.push(planned);
        }
        self
    }

    /// Returns the backends without their secrets, and the environment variables that determine how AWS is reached.
    fn access(&self) -> (Vec<RedactedBackend>, AwsEnvironment) {
        redacted_backend::of_run(self.backends())
    }

    /// Returns the backends without their secrets, and the AWS environment. The environment contains the identities
    /// that the run `run` uses to reach the backends. An identity is left out if a file must be read to determine it.
    /// The caller writes the result to the journal before terraform starts, and reading a file could delay that start.
    pub(crate) fn identified_without_files(&self, run: &str) -> (Vec<RedactedBackend>, AwsEnvironment) {
        let (access, mut surroundings) = self.access();
        surroundings.identify_without_files(run, &access, &self.backends().collect::<Vec<_>>());
        (access, surroundings)
    }

    /// Does the same as [`Self::identified_without_files`], but also reads the shared files of AWS to determine
    /// identities. Call this only where the time for reading files does not delay the start of terraform.
    pub(crate) fn identified(&self, run: &str) -> (Vec<RedactedBackend>, AwsEnvironment) {
        let _there = Within::enter(&self.working_directory);
        let (access, mut surroundings) = self.access();
        surroundings.identify(run, &access, &self.backends().collect::<Vec<_>>());
        (access, surroundings)
    }

    fn backends(&self) -> impl Iterator<Item = &CachedBackend> {
        self.directories.iter().filter_map(|directory| directory.backend.as_ref())
    }

    /// Returns the locations where the lock `recorded` may be stored.
    pub(crate) fn of(&self, recorded: &RecordedLock) -> Vec<LockLocation> {
        let directories: Vec<&DataDirectory> = self.directories.iter().collect();
        location::find(recorded, &directories, self.usable())
    }

    /// Returns the locations where `unnamed`, a lock that the log does not name, may be stored.
    pub(crate) fn of_unnamed(&self, unnamed: &UnnamedLock) -> Vec<LockLocation> {
        let directories: Vec<&DataDirectory> = self.directories.iter().collect();
        location::find_unnamed(unnamed, &directories, self.usable())
    }

    /// Returns the locations where a lock of the state `bucket`/`key` may be stored.
    pub(crate) fn of_state(&self, bucket: &str, key: &str) -> Vec<LockLocation> {
        let directories: Vec<&DataDirectory> = self.directories.iter().collect();
        location::of_state(bucket, key, &directories, self.usable())
    }

    /// Returns the workspace of the state at `location`. `None` if the state does not belong to one of
    /// [`Self::workspaces`].
    pub(crate) fn workspace_of(&self, location: &LockLocation) -> Option<&str> {
        let is_it = |name: &&String| location.backend.state_key(name).as_deref() == Some(&location.key);
        self.workspaces.iter().find(is_it).map(String::as_str)
    }

    /// Returns the workspace of the state that `recorded` locks. `None` if the location of the lock is unknown, or if
    /// the state does not belong to one of [`Self::workspaces`].
    pub(crate) fn workspace_of_lock(&self, recorded: &RecordedLock) -> Option<&str> {
        self.workspace_of(self.of(recorded).first()?)
    }

    /// Returns the workspaces in which the run may have taken locks.
    fn usable(&self) -> Workspaces<'_> {
        if self.any_workspace { Workspaces::Any } else { Workspaces::These(&self.workspaces) }
    }

    /// Returns the location of the lock that terraform takes in the most likely backend and workspace. `None` if the
    /// backend is unknown, is not `s3`, or is configured without locking.
    pub(crate) fn selected(&self) -> Option<LockLocation> {
        let backend = self.directories.iter().find_map(|directory| directory.backend.as_ref())?;
        let location = LockLocation {
            bucket: backend.string("bucket")?.to_owned(),
            key: backend.state_key(self.workspaces.first()?)?,
            table: backend.string("dynamodb_table").map(ToOwned::to_owned),
            lock_file: backend.flag("use_lockfile"),
            backend: backend.clone(),
        };
        (backend.kind == "s3" && (location.table.is_some() || location.lock_file)).then_some(location)
    }
}
