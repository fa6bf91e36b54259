//! The files that `tf` stores: the records of runs, their pending requests, the locks that stay on purpose, terraform's
//! log, the known programs, and the history of releases.

pub(crate) mod clock_reading;
pub(crate) mod event_command;
pub(crate) mod history;
pub(crate) mod host;
pub(crate) mod kept_locks;
pub(crate) mod known_programs;
pub(crate) mod membership;
pub(crate) mod pending_requests;
pub(crate) mod recorder;
pub(crate) mod run_mark;
pub(crate) mod run_state;
pub(crate) mod runs;
pub(crate) mod state_directory;
