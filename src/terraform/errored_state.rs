//! `errored.tfstate`: a state that terraform could not write to its backend.

use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};

use crate::console::quoted;
use crate::time::saturating_sub;

/// A state that a terraform which was started at `since` in `directory` has put there because it could not write it
/// (internal/backend/local/backend_apply.go, `backupStateForError`).
pub(crate) fn errored_state(directory: &Path, since: Timestamp) -> Option<PathBuf> {
    let path = directory.join("errored.tfstate");
    let written = Timestamp::try_from(std::fs::metadata(&path).ok()?.modified().ok()?).ok()?;
    // File systems keep coarser times than clocks.
    (written >= saturating_sub(since, SignedDuration::from_secs(2))).then_some(path)
}

/// What an `errored.tfstate` is (terraform's internal/command: the local backend writes it).
pub(crate) const ERRORED_STATE: &str =
    "terraform could not write its state, which is newer than the one in the backend";

/// What mends it.
pub(crate) fn push_errored_state(program: &str, directory: Option<&str>) -> String {
    let directory = directory.map_or_else(String::new, |directory| format!(" -chdir={}", quoted(directory)));
    format!("before anybody works there again, type: {program}{directory} state push errored.tfstate")
}
