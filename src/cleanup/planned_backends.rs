//! Where a command line leads besides what the data directory says: an `init` to the backend of the configuration, which a
//! migration locks while the other is still cached; an `apply` to the backend and the workspace that its plan was made for.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use crate::sys::plain_file;
use crate::terraform::backend::CachedBackend;
use crate::terraform::command_line::{self, CommandLine};
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::{configuration, plan_file};

/// The destinations of one run.
#[derive(Debug, Default)]
pub(crate) struct PlannedBackends {
    configured: Option<CachedBackend>,
    /// Open from before the run: it may be gone after it.
    plan: Option<(PathBuf, File)>,
}

impl PlannedBackends {
    /// Those of `command_line`, given in the directory `current`.
    pub(crate) fn of(command_line: &CommandLine, current: &Path) -> Self {
        let plan = command_line.plan(current).and_then(|path| Some((path.clone(), plain_file::open(&path).ok()?)));
        let configured = (command_line.command() == "init").then(|| {
            let mut given = backend_configs_of_environment();
            given.extend(command_line.backend_configs.iter().cloned());
            configuration::backend(&command_line.working_directory(current), &given)
        });
        Self { configured: configured.flatten(), plan }
    }

    /// The plan that an earlier run applied, if it is still there.
    pub(crate) fn of_plan(path: &Path) -> Self {
        Self { configured: None, plan: plain_file::open(path).ok().map(|file| (path.to_owned(), file)) }
    }

    /// Where the plan is.
    pub(crate) fn plan(&self) -> Option<&Path> {
        self.plan.as_ref().map(|(path, _)| path.as_path())
    }

    /// What a process forked from this one must keep open.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.plan.as_ref().map(|(_, file)| file.as_fd())
    }

    /// The backend that an `init` is to set up.
    pub(crate) fn configured(&self, workspace: &str) -> Option<DataDirectory> {
        let backend = self.configured.clone()?;
        Some(DataDirectory { backend: Some(backend), workspace: workspace.to_owned() })
    }

    /// What the plan says: to be asked when it matters, for it may be long.
    pub(crate) fn planned(&self) -> Option<DataDirectory> {
        plan_file::read(&self.plan.as_ref()?.1)
    }
}

/// Words that terraform puts behind the command's own name (main.go, `mergeEnvArgs`).
fn backend_configs_of_environment() -> Vec<OsString> {
    let words = ["TF_CLI_ARGS_init", "TF_CLI_ARGS"].iter().filter_map(|name| std::env::var(name).ok());
    // The one for the command stands before the one for all.
    let words = words.filter_map(|text| shell_words::split(&text).ok()).flatten().map(OsString::from);
    command_line::backend_configs(&words.collect::<Vec<_>>())
}
