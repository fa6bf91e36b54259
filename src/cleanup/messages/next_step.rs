//! What a person can type next.

use crate::console::{argument, visible, visible_whole};
use crate::journal::runs::JournalRecord;
use crate::lock::outcome::Because;
use crate::terraform::data_directory::CommandDirectories;
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::RecordedLock;

/// The commands about a lock that was not released, without the lock's ID or path.
pub(crate) struct Removal {
    /// `terraform force-unlock`, for a lock.
    pub(crate) unlock: String,
    /// `tf locks release`, for anything that is not a lock: `terraform force-unlock` cannot read it.
    pub(crate) release: String,
    /// `tf locks show`, for a lock whose holder may be alive.
    pub(crate) show: String,
}

impl Removal {
    /// Returns the sentences that say when a person may release or remove the lock, and how. For `is_recorded`, see
    /// [`next_step()`].
    pub(super) fn next_step(&self, because: Because, recorded: &RecordedLock, is_recorded: bool) -> String {
        let Self { unlock, release, show } = self;
        let id = &recorded.id;
        match because {
            Because::NoLock => {
                format!("{UNUSED}, type: {release} {}", argument(&recorded.path))
            }
            // To remove the lock would be wrong, because it belongs to a run that may be alive.
            Because::Claimed => format!("to see whether the holder is alive, type: {show} {id}"),
            _ => next_step(because, is_recorded, &format!("{unlock} {id}")),
        }
    }
}

/// Returns the sentences that say when a person may release or remove a lock that was not released, and how. `unlock`
/// is the whole command that removes the lock. `is_recorded` is true if the lock is in the journal, so that `tf locks
/// recover` may release it.
pub(super) fn next_step(because: Because, is_recorded: bool, unlock: &str) -> String {
    match because {
        // An unlock would be wrong as long as such a process may change something, even if no terraform is running.
        Because::StillRunning { several } => {
            let when = if several {
                "when they have exited, or after you have killed them"
            } else {
                "when it has exited, or after you have killed it"
            };
            format!("{when}, type: {}", if is_recorded { RECOVER } else { unlock })
        }
        Because::Unseen => {
            format!("{UNUSED} and no process that terraform started is running, type: {unlock}")
        }
        Because::Denied(action) => format!("{UNUSED}, with credentials that allow {action}, type: {unlock}"),
        Because::NotYet | Because::NoAnswer | Because::NoCredentials if is_recorded => {
            format!("to try again now, type: {RECOVER}\nif that fails, {UNUSED}, type: {unlock}")
        }
        _ => format!("{UNUSED}, type: {unlock}"),
    }
}

/// The command that releases the locks of all dead runs on this host.
pub(super) const RECOVER: &str = "tf locks recover";

/// The condition under which a person may remove a lock.
pub(crate) const UNUSED: &str = "once no terraform is using this state";

/// The condition under which a person may release a lock whose holder is likely dead.
pub(crate) const IF_UNUSED: &str = "if you know that no terraform is using this state";

/// The arguments of `tf locks`, without the path, that remove an object that is in the place of a lock but is not a
/// lock. Without the option, the command would release a lock in another part of the same location.
pub(crate) const RELEASE_NO_LOCK: &str = "release --no-lock";

/// Something that is not a lock, in the place of a lock.
pub(crate) struct NoLock<'a> {
    /// The table or the bucket.
    pub(crate) place: &'a str,
    /// What is there, ready to be printed.
    pub(crate) what: &'a str,
    /// The path of the lock, as `tf locks` takes it.
    pub(crate) path: &'a str,
}

/// Reports that terraform's lock request was refused because of `found`. `release` is the command that removes what was
/// found, without the path.
pub(crate) fn refused_by_no_lock(found: &NoLock<'_>, release: &str) -> String {
    format!(
        "every run is refused by something that is not a lock, in {}: {}\n\
         once you know that nobody needs it, type: {release} {}",
        visible(found.place),
        found.what,
        argument(found.path)
    )
}

/// Returns the `force-unlock` command, without the lock's ID.
pub(crate) fn unlock_command(program: &str, directories: CommandDirectories<'_>) -> String {
    directories.terraform(program, "force-unlock")
}

/// Calls `command` with the directories and the workspace that a command for an earlier run names, and returns its
/// result. Between that run and the command, a person may select another workspace. So the command names `workspace`
/// even if it is selected now. It names none only if `workspace` is `None`.
pub(crate) fn in_directories_of<T>(
    record: &JournalRecord,
    workspace: Option<&str>,
    command: impl FnOnce(CommandDirectories<'_>) -> T,
) -> T {
    let chdir = record.working_directory();
    command(CommandDirectories { chdir: Some(&chdir), data: record.named_data_directory(), workspace })
}

/// Returns the `tf locks` command with the arguments `words` for an earlier run and `workspace`.
pub(crate) fn locks_command_of(record: &JournalRecord, words: &str, workspace: Option<&str>) -> String {
    in_directories_of(record, workspace, |there| there.locks(words))
}

/// Returns the `force-unlock` command for a lock of an earlier run, without the lock's ID. The command works in any
/// directory and with any selected workspace, because it names the directory, the data directory and the workspace.
pub(crate) fn unlock_command_of(record: &JournalRecord, workspace: Option<&str>) -> String {
    in_directories_of(record, workspace, |there| unlock_command(&visible_whole(&record.program), there))
}

/// As [`unlock_command_of`], for a lock in S3 or DynamoDB. After a `workspace` command, the workspace of the lock may
/// have no state yet, or no longer have one, and terraform refuses to work in it. So after such a command, if the
/// workspace is not the one that was selected, returns a `tf locks release` command, which works without a state.
pub(super) fn removal_command_of(record: &JournalRecord, workspace: Option<&str>) -> String {
    let is_other = workspace.is_some_and(|name| record.workspaces.first().is_none_or(|selected| selected != name));
    if is_other && record.command.starts_with("workspace ") {
        locks_command_of(record, "release", workspace)
    } else {
        unlock_command_of(record, workspace)
    }
}

/// Returns the sentences that say how a person can decide about a lock that may belong to a dead run. `show` and
/// `unlock` are the commands without the lock's ID.
pub(super) fn decide_after_show(info: &LockInfo, show: &str, unlock: &str) -> String {
    let unlock = if is_lock_id(&info.id) {
        format!("\n{}", next_step(Because::Doubt, false, &format!("{unlock} {}", info.id)))
    } else {
        String::new()
    };
    format!("to see who holds it, type: {show} {}{unlock}", argument(&info.id))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::Timestamp;

    use super::*;
    use crate::cleanup::messages::refused::{Refusal, refused};
    use crate::holder::evidence::{Judgement, NOT_YET, Verdict};
    use crate::journal::runs::Journal;
    use crate::journal::state_directory::StateDirectory;

    #[test]
    fn a_refusal_names_the_command_that_releases_the_lock_and_not_a_longer_one() {
        let info = LockInfo { id: "5e75cb05-d70c-4132-39e0-d2abba1b3077".into(), ..LockInfo::default() };
        let said = |verdict, is_released_after| {
            let judgement = Judgement { verdict, ..NOT_YET.clone() };
            let refusal = Refusal { info: &info, lease: None, judgement: &judgement, is_released_after };
            let said = refused(&refusal, Timestamp::UNIX_EPOCH, |words| format!("tf locks {words}"), false);
            said.lines().last().unwrap_or_default().to_owned()
        };
        assert!(said(Verdict::LikelyDead, None).ends_with(&format!("tf locks release {}", info.id)));
        let soon = said(Verdict::Alive, Some(Duration::from_secs(19)));
        assert!(soon.ends_with("the command releases the lock if you run it again in 20 s"), "{soon}");
    }

    #[test]
    fn a_command_for_an_earlier_run_names_the_workspace_of_its_lock_even_if_that_is_the_default_one() {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::open(&StateDirectory::at(root.path())).unwrap();
        let mut record = JournalRecord::new("1-0", &journal);
        (record.program, record.directory) = ("tofu".into(), "/w".into());
        record.workspaces = vec!["default".into(), "green".into()];
        for (command, workspace, expected) in [
            ("apply", Some("default"), "TF_WORKSPACE=default tofu -chdir=/w force-unlock"),
            ("apply", Some("green"), "TF_WORKSPACE=green tofu -chdir=/w force-unlock"),
            ("apply", None, "tofu -chdir=/w force-unlock"),
            ("workspace delete", Some("default"), "TF_WORKSPACE=default tofu -chdir=/w force-unlock"),
            ("workspace delete", Some("green"), "TF_WORKSPACE=green tf locks release --chdir /w"),
            ("workspace new", Some("green"), "TF_WORKSPACE=green tf locks release --chdir /w"),
        ] {
            record.command = command.into();
            assert_eq!(removal_command_of(&record, workspace), expected, "{command} {workspace:?}");
            // Another backend than S3 has no `tf locks release`.
            assert!(unlock_command_of(&record, workspace).ends_with("tofu -chdir=/w force-unlock"));
            // `tf locks` always looks at the default workspace.
            let show = locks_command_of(&record, "show", workspace);
            let names_it = show == "TF_WORKSPACE=green tf locks show --chdir /w";
            assert_eq!(names_it, workspace == Some("green"), "{show}");
        }
    }
}
