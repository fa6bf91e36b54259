//! The places that one run can have locked: its backends, before and after, and its workspaces.

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

/// Whether a command goes through all workspaces: a migration does (internal/command/meta_backend_migrate.go).
pub(crate) fn is_for_any_workspace(command: &str) -> bool {
    command == "init"
}

/// The backends and workspaces of a run.
#[derive(Clone, Debug)]
pub(crate) struct CandidateBackends {
    /// The most likely first.
    pub(crate) directories: Vec<DataDirectory>,
    pub(crate) workspaces: Vec<String>,
    /// It can have used every workspace that there is.
    pub(crate) any_workspace: bool,
    /// Where it read that.
    pub(crate) data_directory: String,
    /// Where its terraform works.
    pub(crate) working_directory: PathBuf,
}

impl CandidateBackends {
    /// Those of a run of `command_line` in the directory `current`, whose data directory said so `before`, and says so
    /// `after`, and which leads to `planned_backends`.
    pub(crate) fn new(
        current: &Path,
        before: &DataDirectory,
        after: DataDirectory,
        command_line: &CommandLine,
        planned_backends: &PlannedBackends,
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
        let configured = planned_backends.configured(&after.workspace);
        let directories = [after, before.clone()].into_iter().chain(configured).collect();
        let any_workspace = is_for_any_workspace(&command_line.command());
        Self { directories, workspaces, any_workspace, data_directory, working_directory }
    }

    /// The same, with what the plan of the run says.
    pub(crate) fn with_plan(mut self, planned_backends: &PlannedBackends) -> Self {
        if let Some(planned) = planned_backends.planned() {
            self.workspaces.push(planned.workspace.clone());
            self.directories.push(planned);
        }
        self
    }

    /// The backends, and how they are reached.
    fn access(&self) -> (Vec<RedactedBackend>, AwsEnvironment) {
        redacted_backend::of_run(self.backends())
    }

    /// The same, and as whom `run` reaches them, whose terraform is about to start: as far as no file has to be read for it. What
    /// is written down before terraform starts must not wait.
    pub(crate) fn identified_without_files(&self, run: &str) -> (Vec<RedactedBackend>, AwsEnvironment) {
        let (access, mut surroundings) = self.access();
        surroundings.identify_without_files(run, &access, &self.backends().collect::<Vec<_>>());
        (access, surroundings)
    }

    /// The same with what the shared files tell: to be asked where nobody waits for it.
    pub(crate) fn identified(&self, run: &str) -> (Vec<RedactedBackend>, AwsEnvironment) {
        let _there = Within::enter(&self.working_directory);
        let (access, mut surroundings) = self.access();
        surroundings.identify(run, &access, &self.backends().collect::<Vec<_>>());
        (access, surroundings)
    }

    fn backends(&self) -> impl Iterator<Item = &CachedBackend> {
        self.directories.iter().filter_map(|directory| directory.backend.as_ref())
    }

    /// Where a lock that a log recorded can be.
    pub(crate) fn of(&self, recorded: &RecordedLock) -> Vec<LockLocation> {
        let directories: Vec<&DataDirectory> = self.directories.iter().collect();
        location::find(recorded, &directories, self.usable())
    }

    /// Where a lock can be that a log does not name.
    pub(crate) fn of_unnamed(&self, unnamed: &UnnamedLock) -> Vec<LockLocation> {
        let directories: Vec<&DataDirectory> = self.directories.iter().collect();
        location::find_unnamed(unnamed, &directories, self.usable())
    }

    /// Where the state `bucket`/`key` is.
    pub(crate) fn of_state(&self, bucket: &str, key: &str) -> Vec<LockLocation> {
        let directories: Vec<&DataDirectory> = self.directories.iter().collect();
        location::of_state(bucket, key, &directories, self.usable())
    }

    /// The workspace whose state is at `place`. `None` where it is not one of those that this run is known to have used.
    pub(crate) fn workspace_of(&self, place: &LockLocation) -> Option<&str> {
        let is_it = |name: &&String| place.backend.state_key(name).as_deref() == Some(&place.key);
        self.workspaces.iter().find(is_it).map(String::as_str)
    }

    /// The same for the state that `recorded` locks.
    pub(crate) fn workspace_of_lock(&self, recorded: &RecordedLock) -> Option<&str> {
        self.workspace_of(self.of(recorded).first()?)
    }

    fn usable(&self) -> Workspaces<'_> {
        if self.any_workspace { Workspaces::Any } else { Workspaces::These(&self.workspaces) }
    }

    /// Where a command without further words would lock.
    pub(crate) fn selected(&self) -> Option<LockLocation> {
        let backend = self.directories.iter().find_map(|directory| directory.backend.as_ref())?;
        let place = LockLocation {
            bucket: backend.string("bucket")?.to_owned(),
            key: backend.state_key(self.workspaces.first()?)?,
            table: backend.string("dynamodb_table").map(ToOwned::to_owned),
            lock_file: backend.flag("use_lockfile"),
            backend: backend.clone(),
        };
        (backend.kind == "s3" && (place.table.is_some() || place.lock_file)).then_some(place)
    }
}
