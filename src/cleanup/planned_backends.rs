//! The backends that follow from a command line, besides the backend in the data directory. An `init` may use the
//! backend of the configuration: a migration locks this backend while the data directory still contains the old
//! backend. An `apply` of a plan uses the backend and the workspace for which the plan was made.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use crate::sys::plain_file;
use crate::terraform::backend::CachedBackend;
use crate::terraform::command_line::{self, CommandLine};
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::{configuration, plan_file};

/// The backends that follow from the command line of one run.
#[derive(Debug, Default)]
pub(crate) struct PlannedBackends {
    /// The backends of the configuration. Empty if the command is not `init`, or the configuration has no backend that
    /// can be read.
    configured: Vec<CachedBackend>,
    /// The path of the plan file, and the open file. The file is opened before the run, because it may be deleted
    /// during the run. `None` if there is no plan file that can be opened.
    plan: Option<(PathBuf, File)>,
}

impl PlannedBackends {
    /// Returns the planned backends of `command_line`, which was given in the directory `current`.
    pub(crate) fn of(command_line: &CommandLine, current: &Path) -> Self {
        let plan = command_line.plan(current).and_then(|path| Some((path.clone(), plain_file::open(&path).ok()?)));
        let mut configured = Vec::new();
        if command_line.command() == "init" {
            let mut given = backend_configs_of_environment();
            given.extend(command_line.backend_configs.iter().cloned());
            configured = configuration::backends(&command_line.working_directory(current), &given);
        }
        Self { configured, plan }
    }

    /// Returns the planned backends of an earlier run with the plan file `path`. There are none if the file cannot be
    /// opened.
    pub(crate) fn of_plan(path: &Path) -> Self {
        Self { configured: Vec::new(), plan: plain_file::open(path).ok().map(|file| (path.to_owned(), file)) }
    }

    /// Returns the path of the plan file. `None` if there is no plan file that could be opened.
    pub(crate) fn plan(&self) -> Option<&Path> {
        self.plan.as_ref().map(|(path, _)| path.as_path())
    }

    /// Returns the descriptor of the plan file, which a process forked from this one must keep open. `None` if there is
    /// no plan file that could be opened.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.plan.as_ref().map(|(_, file)| file.as_fd())
    }

    /// Returns the backends that an `init` may set up, with `workspace` as their workspace.
    pub(crate) fn configured(&self, workspace: &str) -> Vec<DataDirectory> {
        let with =
            |backend: &CachedBackend| DataDirectory { backend: Some(backend.clone()), workspace: workspace.to_owned() };
        self.configured.iter().map(with).collect()
    }

    /// Reads the backend and the workspace in the plan. Call this only if they are needed, because reading a large plan
    /// takes time. `None` if there is no plan, or if the plan cannot be read.
    pub(crate) fn planned(&self) -> Option<DataDirectory> {
        plan_file::read(&self.plan.as_ref()?.1)
    }
}

/// Returns the `-backend-config` values in `TF_CLI_ARGS_init` and `TF_CLI_ARGS`.
fn backend_configs_of_environment() -> Vec<OsString> {
    command_line::backend_configs(&command_line::words_of_variables("init", |name| std::env::var(name).ok()))
}
