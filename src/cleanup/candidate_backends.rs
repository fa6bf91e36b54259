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
        let workspaces = workspaces(std::env::var("TF_WORKSPACE").ok(), before, &after, command_line);
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

    /// Returns the workspace of the state with the lock path `path`, which is `BUCKET/KEY`. `None` if no backend has that
    /// bucket, or if the state does not belong to one of [`Self::workspaces`].
    pub(crate) fn workspace_of_path(&self, path: &str) -> Option<&str> {
        let (bucket, key) = path.split_once('/')?;
        self.workspace_of(self.of_state(bucket, key).first()?)
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

/// Returns the workspaces that a run of `command_line` may have used, the most likely one first. `variable` is the
/// value of TF_WORKSPACE. `before` and `after` are the contents of the data directory before and after the run.
fn workspaces(
    variable: Option<String>,
    before: &DataDirectory,
    after: &DataDirectory,
    command_line: &CommandLine,
) -> Vec<String> {
    // TF_WORKSPACE takes precedence over the selected workspace (internal/command/meta.go, `WorkspaceOverridden`).
    let mut workspaces = match variable {
        Some(name) if !name.is_empty() => vec![name],
        _ => vec![after.workspace.clone(), before.workspace.clone()],
    };
    workspaces.dedup();
    if command_line.command().starts_with("workspace ") {
        workspaces.extend(command_line.operands.iter().map(|operand| operand.to_string_lossy().into_owned()));
    }
    workspaces
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn command_line(line: &str) -> CommandLine {
        CommandLine::parse(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    fn selected(workspace: &str, backend: &str) -> DataDirectory {
        DataDirectory { backend: CachedBackend::parse(backend.as_bytes()), workspace: workspace.into() }
    }

    fn s3(config: &str) -> String {
        format!(r#"{{"version":3,"backend":{{"type":"s3","config":{{{config}}}}}}}"#)
    }

    fn candidates(directories: Vec<DataDirectory>, workspaces: &[&str], command: &str) -> CandidateBackends {
        CandidateBackends {
            directories,
            workspaces: workspaces.iter().map(|name| (*name).to_owned()).collect(),
            any_workspace: is_for_any_workspace(command),
            data_directory: "/x/.terraform".into(),
            working_directory: "/x".into(),
        }
    }

    #[test]
    fn the_workspaces_are_the_selected_ones_or_that_of_the_variable_and_those_of_the_command() {
        for (variable, before, after, line, expected) in [
            (None, "default", "default", "apply", vec!["default"]),
            (None, "a", "b", "apply", vec!["b", "a"]),
            // An empty TF_WORKSPACE does not select anything.
            (Some(""), "a", "b", "apply", vec!["b", "a"]),
            (Some("v"), "a", "b", "apply", vec!["v"]),
            (None, "default", "green", "workspace new green", vec!["green", "default", "green"]),
            (None, "a", "a", "workspace delete -force old", vec!["a", "old"]),
            (Some("v"), "a", "b", "workspace delete old", vec!["v", "old"]),
            (None, "a", "a", "env delete old", vec!["a", "old"]),
            // A flag with its value in a word of its own: each word may be the name.
            (None, "a", "a", "workspace new -state x.tfstate green", vec!["a", "x.tfstate", "green"]),
            // Only the words of a workspace command are names of workspaces.
            (None, "a", "a", "apply green", vec!["a"]),
            (None, "a", "a", "state rm green", vec!["a"]),
            (None, "a", "a", "workspace", vec!["a"]),
        ] {
            let (before, after) = (selected(before, ""), selected(after, ""));
            let found = workspaces(variable.map(ToOwned::to_owned), &before, &after, &command_line(line));
            assert_eq!(found, expected, "{variable:?} {line}");
        }
    }

    #[test]
    fn only_an_init_may_use_every_workspace() {
        for command in ["apply", "plan", "workspace new", "state mv", "", "init2"] {
            assert!(!is_for_any_workspace(command), "{command}");
        }
        let directory = || selected("default", &s3(r#""bucket":"b","key":"k""#));
        for (command, found) in [("init", 1), ("apply", 0)] {
            let candidates = candidates(vec![directory()], &["default"], command);
            assert_eq!(candidates.of_state("b", "env:/other/k").len(), found, "{command}");
            assert_eq!(candidates.of_state("b", "k").len(), 1, "{command}");
            assert_eq!(candidates.of_state("b", "another").len(), 0, "{command}");
        }
    }

    #[test]
    fn the_workspace_of_a_state_is_one_that_the_run_may_have_used() {
        let directory = selected("a", &s3(r#""bucket":"b","key":"k""#));
        let candidates = candidates(vec![directory], &["a", "default"], "init");
        for (key, expected) in [("env:/a/k", Some("a")), ("k", Some("default")), ("env:/other/k", None)] {
            let location = candidates.of_state("b", key).remove(0);
            assert_eq!(candidates.workspace_of(&location), expected, "{key}");
            assert_eq!(candidates.workspace_of_path(&format!("b/{key}")), expected, "{key}");
        }
    }

    #[test]
    fn a_path_in_another_bucket_has_no_workspace() {
        let candidates = candidates(vec![selected("default", &s3(r#""bucket":"b","key":"k""#))], &["default"], "apply");
        for path in ["c/k", "b", "k", "", "/b/k"] {
            assert_eq!(candidates.workspace_of_path(path), None, "{path}");
        }
    }

    #[test]
    fn the_lock_that_terraform_takes_is_that_of_the_first_backend_and_workspace() {
        let none = || selected("default", "");
        let place = |directories, workspaces: &[&str]| {
            let location = candidates(directories, workspaces, "apply").selected()?;
            Some((location.lock_path(), location.table, location.lock_file))
        };
        let of = |config: &str| selected("default", &s3(config));
        let table = || of(r#""bucket":"b","key":"k","dynamodb_table":"t""#);
        let object = || of(r#""bucket":"c","key":"k","use_lockfile":true"#);
        let unlocked = || of(r#""bucket":"d","key":"k","use_lockfile":false,"dynamodb_table":"""#);
        let gcs = || {
            selected(
                "default",
                r#"{"version":3,"backend":{"type":"gcs","config":{"bucket":"b","key":"k","dynamodb_table":"t"}}}"#,
            )
        };
        let in_table = || Some(("b/env:/green/k".to_owned(), Some("t".to_owned()), false));
        assert_eq!(place(vec![table(), object()], &["green", "default"]), in_table());
        assert_eq!(place(vec![none(), table()], &["green"]), in_table(), "no backend before the run");
        assert_eq!(place(vec![object(), table()], &["default"]), Some(("c/k".to_owned(), None, true)));
        assert_eq!(place(vec![unlocked(), table()], &["default"]), None, "the backend does not lock");
        assert_eq!(place(vec![gcs(), table()], &["default"]), None, "the run did not use S3");
        assert_eq!(place(vec![of(r#""key":"k","use_lockfile":true"#)], &["default"]), None, "no bucket");
        assert_eq!(place(vec![table()], &[]), None);
        assert_eq!(place(vec![none()], &["default"]), None);
    }
}
