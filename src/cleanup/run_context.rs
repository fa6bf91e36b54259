//! The data about one run of terraform that are known before it starts.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use jiff::Timestamp;

use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::invocation::Invocation;
use crate::cleanup::planned_backends::PlannedBackends;
use crate::journal::pending_requests::PendingRequests;
use crate::journal::runs::{Journal, JournalRecord, flag_names, run_id};
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::lock_info;

/// The data about one run of terraform. `tf` reads them before terraform starts, and its guardian inherits them.
pub(crate) struct RunContext<'a> {
    /// The run's ID: the last part of its `TFW_RUN`, and the name of its directory in the journal.
    pub(crate) id: String,
    /// `user@host` at the start of the run. It is stored because the host's name may change during the run.
    pub(crate) who: String,
    /// When this `tf` was started. The times of the stop timeout are relative to this time.
    pub(crate) begun: Instant,
    /// A time before terraform's start. It is taken as late as possible.
    pub(crate) started: Timestamp,
    /// The terraform to run, and its command line.
    pub(crate) invocation: &'a Invocation,
    /// The directory in which `tf` was started.
    pub(crate) current: PathBuf,
    /// The path of terraform's data directory, in most cases `.terraform`.
    pub(crate) data_directory: PathBuf,
    /// The contents of the data directory before the run.
    pub(crate) before: DataDirectory,
    /// The backends that follow from the command line.
    pub(crate) planned_backends: PlannedBackends,
    /// The candidate backends that are known before the run.
    pub(crate) candidates: CandidateBackends,
    /// The journal, or why there is none.
    pub(crate) journal: Result<Journal, String>,
    /// The store of requests that may still land. `None` without a state directory.
    pub(crate) pending_requests: Option<PendingRequests>,
    /// Whether locks may be released (`TFW_RELEASE`).
    pub(crate) release: bool,
}

impl<'a> RunContext<'a> {
    /// Reads the data about a run of `invocation` in the current directory. Does not open the journal.
    pub(crate) fn new(invocation: &'a Invocation, release: bool, begun: Instant) -> Self {
        let current = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
        let data_directory = DataDirectory::path(&current, &invocation.command_line);
        let working_directory = invocation.command_line.working_directory(&current);
        let before = DataDirectory::read(&data_directory, &working_directory);
        let planned_backends = PlannedBackends::of(&invocation.command_line, &current);
        let candidates =
            CandidateBackends::new(&current, &before, before.clone(), &invocation.command_line, &planned_backends);
        Self {
            id: run_id(),
            who: lock_info::who(),
            begun,
            started: Timestamp::now(),
            invocation,
            current,
            data_directory,
            before,
            planned_backends,
            candidates,
            journal: Err("it was not opened".to_owned()),
            pending_requests: None,
            release,
        }
    }

    /// Returns the journal. `None` if this run has none.
    pub(crate) fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref().ok()
    }

    /// Returns the candidate backends after the run. They also contain the backend and the workspace that are in the
    /// data directory now.
    pub(crate) fn candidates_after(&self) -> CandidateBackends {
        let after = DataDirectory::read(&self.data_directory, &self.candidates.working_directory);
        let command_line = &self.invocation.command_line;
        CandidateBackends::new(&self.current, &self.before, after, command_line, &self.planned_backends)
    }

    /// Returns the first version of the run's record in `journal`.
    pub(crate) fn record(&self, journal: &Journal) -> JournalRecord {
        let (access, surroundings) = self.candidates.identified_without_files(&self.id);
        let Invocation { name, arguments, command_line, .. } = self.invocation;
        JournalRecord {
            who: self.who.clone(),
            started: self.started,
            program: Path::new(name).file_name().unwrap_or_default().to_string_lossy().into_owned(),
            chdir: command_line.directory.as_ref().map(|path| path.to_string_lossy().into_owned()),
            command: command_line.command(),
            flags: flag_names(arguments.iter().map(OsString::as_os_str)),
            directory: self.current.to_string_lossy().into_owned(),
            data_directory: self.candidates.data_directory.clone(),
            workspaces: self.candidates.workspaces.clone(),
            plan: self.planned_backends.plan().map(|path| path.to_string_lossy().into_owned()),
            named_only: !self.release,
            surroundings,
            access,
            ..JournalRecord::new(&self.id, journal)
        }
    }
}
