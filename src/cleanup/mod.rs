//! The cleanup after a run: checks whether all of the run's processes are dead, and releases the run's locks.

pub(crate) mod after_run;
pub(crate) mod candidate_backends;
pub(crate) mod clean_up;
pub(crate) mod end_of_run;
mod forked_recovery;
pub(crate) mod invocation;
pub(crate) mod messages;
pub(crate) mod ordered_process;
pub(crate) mod other_backend;
pub(crate) mod planned_backends;
pub(crate) mod process_tree;
pub(crate) mod recovery;
pub(crate) mod recovery_plan;
pub(crate) mod recovery_process;
pub(crate) mod release_all;
pub(crate) mod run_context;
pub(crate) mod takeover_process;
pub(crate) mod terminal_report;
pub(crate) mod wait_explanation;
pub(crate) mod waiter;
pub(crate) mod working_directory;
