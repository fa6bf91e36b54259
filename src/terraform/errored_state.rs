//! `errored.tfstate`: the file in which terraform saves a state that it could not write to its backend.

use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};

use crate::terraform::data_directory::CommandDirectories;
use crate::time::saturating_sub;

/// Returns the path of `errored.tfstate` in `directory`, if the terraform that was started there at `since` has written
/// it (internal/backend/local/backend_apply.go, `backupStateForError`). `None` if there is no such file, or if it is
/// older.
pub(crate) fn errored_state(directory: &Path, since: Timestamp) -> Option<PathBuf> {
    let path = directory.join("errored.tfstate");
    let written = Timestamp::try_from(std::fs::metadata(&path).ok()?.modified().ok()?).ok()?;
    // File times are less precise than the clock, so the file may be up to 2 s older than `since`.
    (written >= saturating_sub(since, SignedDuration::from_secs(2))).then_some(path)
}

/// The part of a message that explains `errored.tfstate`. Terraform's local backend writes the file; see
/// [`errored_state`].
pub(crate) const ERRORED_STATE: &str =
    "terraform could not write its state to the backend; unless another run has written it since, the file is newer";

/// Returns the part of a message that shows how to upload `errored.tfstate` to the backend.
pub(crate) fn push_errored_state(program: &str, directories: CommandDirectories<'_>) -> String {
    let command = directories.terraform(program, "state push errored.tfstate");
    format!("before anyone runs terraform there again, type: {command}")
}
