//! Messages about a release: which lock was released, or why it was not.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::Timestamp;

use super::names::{lock, visible_lines};
use super::next_step::{Removal, decide_after_show, next_step};
use crate::console::{argument, length_of_time, option, visible, visible_whole};
use crate::holder::lease_text;
use crate::journal::history::By;
use crate::lease::record::Claim;
use crate::lock::digest::Comparison;
use crate::lock::outcome::{Because, Released, Write};
use crate::terraform::data_directory::CommandDirectories;
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::RecordedLock;
use crate::terraform::other_backends::OtherBackend;

/// Reports that a lock of this run was released.
pub(crate) fn released(ending: &str, recorded: &RecordedLock, released: &Released, now: Timestamp) -> String {
    let mut text = format!("{ending} without releasing its state lock");
    match released.write {
        Some(Write::Landed) => text.push_str("; a write of its state that was in flight has arrived"),
        Some(Write::Quiet { waited }) => {
            let waited = waited.as_secs();
            let _ = write!(text, "; waited {waited} s for a late write of its state, and none arrived");
        }
        None => {}
    }
    let held = released.created.map_or_else(String::new, |created| {
        format!(", held for {}", length_of_time(now.duration_since(created).unsigned_abs()))
    });
    let released = released_or_claimed("the lock", released.claim.as_ref());
    let _ = write!(text, "\n{released}: {}{held}", lock(recorded));
    text
}

/// Says that `what`, a lock, was released. `claim` is the claim that another host had on it: that host says that it has
/// released the lock.
pub(super) fn released_or_claimed(what: &str, claim: Option<&Claim>) -> String {
    let Some(claim) = claim else { return format!("released {what}") };
    let at = claim.at().map_or_else(String::new, |at| format!(" at {at:.0}"));
    format!("{what} is released; {} had claimed it{at}", lease_text::claimant(claim))
}

/// Reports that the recorded digest does not match the state. The command in the message names `workspace` if it is not
/// `None`.
pub(crate) fn digest_mismatch(
    digest_mismatch: &Comparison,
    workspace: Option<&str>,
    directories: CommandDirectories<'_>,
) -> String {
    let recorded = visible(digest_mismatch.recorded.as_deref().unwrap_or("none"));
    let written = digest_mismatch.written.map_or_else(String::new, |at| format!(" (written at {at:.0})"));
    let (state, advice) = match &digest_mismatch.computed {
        Some(digest) => {
            (format!("the digest of the state{written} is {digest}"), "if the state has the latest changes, type:")
        }
        None => (
            "there is no state".to_owned(),
            "if this workspace had resources, restore its state (the bucket may have old versions)\n\
             if the state was deleted on purpose, or never existed, type:",
        ),
    };
    let name = |name: &str| option("--fix-digest", &visible_whole(name));
    let workspace = workspace.map_or_else(|| " --fix-digest".to_owned(), name);
    let command = directories.locks("doctor");
    format!(
        "the state's digest does not match, so every command will fail with a checksum error\n\
         the recorded digest is {recorded}, but {state}\n{advice} {command}{workspace}"
    )
}

/// Reports that a lock was not released, or may not have been, and which command to type. `later` is true if the next
/// `tf` in the directory tries again.
pub(crate) fn kept(
    ending: &str,
    recorded: &RecordedLock,
    why: &str,
    because: Because,
    later: bool,
    removal: &Removal,
) -> String {
    // As long as a process of the run may be running, the next `tf` does not release the lock either.
    let is_running = matches!(because, Because::StillRunning { .. } | Because::Unseen);
    let again = if later && !is_running { "the next tf in this directory tries again\n" } else { "" };
    format!(
        "{ending}; its state lock was not released: {}\n{}\n{again}{}",
        lock(recorded),
        visible_lines(why),
        removal.next_step(because, recorded, later)
    )
}

/// The parts of the messages about a release in a backend other than S3.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wording<'a> {
    /// How the run ended, as the beginning of a message.
    pub(crate) ending: &'a str,
    /// The command that a person types to remove the lock.
    pub(crate) unlock: &'a str,
    /// Which process releases the lock.
    pub(crate) by: By,
    /// Whether the run has a journal, so that `tf locks recover` may release the lock.
    pub(crate) has_journal: bool,
}

/// Reports that `tf` waits before it releases a lock, because a write may still be in flight to a backend whose state
/// `tf` cannot read.
pub(crate) fn waiting_blindly(time: Duration) -> String {
    format!("terraform's last write may still arrive; waiting {} s before releasing the lock", time.as_secs())
}

/// Reports that a lock in a backend other than S3 was released.
pub(crate) fn released_elsewhere(ending: &str, kind: &OtherBackend, info: &LockInfo) -> String {
    format!("{ending} without releasing its state lock\nreleased the lock: {}, backend {}", lock(info), kind.kind)
}

/// Reports that a lock in a backend other than S3 was not released: `why` is the reason, and `because` its kind. `info`
/// is `None` if it is unknown whether there is a lock; the message then names the backend by `place`.
pub(crate) fn left_elsewhere(
    wording: Wording<'_>,
    kind: &OtherBackend,
    place: &str,
    (why, because): (&str, Because),
    info: Option<&LockInfo>,
) -> String {
    let what = match info {
        Some(info) => format!("{}, Who {}", lock(info), visible(&info.who)),
        None => format!("backend {}, {}", kind.kind, visible(place)),
    };
    let look = kind.look.map_or_else(String::new, |look| format!("\nto see who holds the lock: {look}"));
    let id = info.map_or_else(|| "ID".to_owned(), |info| argument(&info.id));
    let next = next_step(because, wording.has_journal, &format!("{} {id}", wording.unlock));
    let needs_id = info.is_none() && !(wording.has_journal && matches!(because, Because::StillRunning { .. }));
    let placeholder =
        if needs_id { "\nreplace ID with the ID that terraform prints when the lock refuses it" } else { "" };
    format!(
        "{} and may have left its state lock, which was not released: {what}\n{}{look}\n{next}{placeholder}",
        wording.ending,
        visible_lines(why)
    )
}

/// The reason why a lock that was not found does not count as deleted.
pub(crate) const ANOTHER_ACCOUNT: &str =
    "the lock was not found with the current credentials, which may belong to another account";

/// Reports that another run locked the same state while this run was working.
pub(crate) fn replaced(
    ending: &str,
    own: &RecordedLock,
    by: &LockInfo,
    program: &str,
    directories: CommandDirectories<'_>,
) -> String {
    let command = directories.terraform(program, "plan");
    format!(
        "{ending}; while it ran, another run locked the same state, and both may have changed it\nits own lock was {}\n\
         the other lock is held by {} for {} since {}, ID {}\nonce that run is over, to compare the state with \
         the real resources, type: {command}",
        lock(own),
        visible(&by.who),
        visible(&by.operation),
        visible(&by.created),
        visible(&by.id)
    )
}

/// Reports that a lock was not found and may exist in another account. The run's record is still in the journal.
pub(crate) fn not_seen(ending: &str, recorded: &RecordedLock, needs: &str) -> String {
    format!(
        "{ending}; its state lock was not released: {}\n{ANOTHER_ACCOUNT}\nthat run used: {}\n\
         with those credentials, type: tf locks recover\nif the lock is gone, type: tf locks recover --forget {}",
        lock(recorded),
        visible(needs),
        recorded.id
    )
}

/// The reason why `tf` cannot look for a lock of an earlier run: settings of the backend are missing.
pub(crate) fn missing(attributes: &str, directory: &str) -> String {
    format!(
        "some settings of the run's backend ({attributes}) are stored only in {directory}, which is now set up for another \
         backend"
    )
}

/// The reason why a lock was not released: another run, which is or may be alive, has recorded the same lock.
pub(crate) const CLAIMED: &str = "the lock belongs to another run of tf on this host, which may still be running";

/// The reason why a lock was not released: the journal does not show whether another run has recorded the same lock.
pub(crate) const MAY_BE_CLAIMED: &str =
    "the record of another run of tf on this host cannot be read, and the lock may belong to that run";

/// Reports that the log of this run does not show its locks, and that the lock `info` may belong to this run. `show`
/// and `unlock` are the commands without the lock's ID.
pub(crate) fn suspected(ending: &str, info: &LockInfo, doubt: Option<&str>, show: &str, unlock: &str) -> String {
    format!(
        "{ending}; its log does not say whether it held a state lock\n\
         this lock may belong to that run and was not released: {}, Who {}{}\n{}",
        lock(info),
        visible(&info.who),
        doubt.map_or_else(String::new, |doubt| format!("\n{doubt}")),
        decide_after_show(info, show, unlock)
    )
}

/// Reports that it is unknown whether a run held a lock, and that `tf` could not search for a lock, for `reason`. `list`
/// is the command that lists the locks.
pub(crate) fn suspect_not_looked_for(ending: &str, reason: &str, list: &str) -> String {
    format!(
        "{ending}; its log does not say whether it held a state lock, and tf could not look for one\n{}\n\
         to see whether a lock is held, type: {list}",
        visible_lines(reason)
    )
}

/// Reports that terraform died and its log is empty. Either terraform could not open the log, or it died before it
/// wrote to the log. `suspect` is a lock that terraform may have held, or `None` if no such lock was found.
pub(crate) fn unlogged(ending: &str, suspect: Option<&LockInfo>, directories: CommandDirectories<'_>) -> String {
    let log =
        "terraform left no log that tf can read: it died early, or ran as another user (for example through sudo)";
    let Some(info) = suspect else {
        return format!(
            "{ending}; its state lock, if it held one, was not released\n{log}\n\
             to see which locks are held, type: {}",
            directories.locks("")
        );
    };
    let id = if is_lock_id(&info.id) { format!(" {}", info.id) } else { String::new() };
    let command = directories.locks(&format!("show{id}"));
    format!(
        "{ending}; this state lock may belong to that run and was not released: {}, held by {}\n{log}\n\
         to see whether the holder is alive, type: {command}",
        lock(info),
        visible(&info.who)
    )
}

/// Reports that terraform held a lock with an unknown ID, and that `tf` could not look for the lock, for `reason`.
pub(crate) fn not_looked_for(ending: &str, reason: &str) -> String {
    format!(
        "{ending}; it held a state lock, but its log does not contain the lock's ID, and tf could not look for the lock\n\
         {}\nthe next tf in this directory tries again\nto try now, type: tf locks recover",
        visible_lines(reason)
    )
}

/// The reason why a lock was not released: the lock matches no backend.
pub(crate) const NO_PLACE: &str =
    "the lock matches no backend of this directory, so tf does not know where it is stored";

/// The reason why a lock was not released: the user has disabled releases by a setting.
pub(crate) const NEVER: &str = "TFW_RELEASE is set to never";

/// The reason why a lock was not released: no client for the lock service could be set up.
pub(crate) const NO_RESOURCES: &str =
    "could not ask the lock service: this system has no free thread or file descriptor";

/// The reason why a lock was not released: the client for the lock service has panicked. In most cases, it could not
/// start a thread.
pub(crate) const CLIENT_FAILED: &str = "could not ask the lock service: the AWS client has failed\nto see why, set TFW_LOG to the path of a file, and try again";

/// The reason why a lock was not released: a person interrupted the wait.
pub(crate) const INTERRUPTED: &str = "^C ended the wait for the lock service";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cleanup::messages::refused::{LockName, lock_step};
    use crate::holder::next_step::NextStep;

    /// Of two hosts, one says that it has released the lock.
    #[test]
    fn the_release_of_a_lock_that_another_host_has_claimed_names_that_host() {
        assert_eq!(released_or_claimed("the lock", None), "released the lock");
        for (by, expected) in [("ci\u{7}@other", "ci\\u{7}@other"), ("", "another host")] {
            let claim = Claim { by: by.into(), at: 1_790_000_000, number: 7 };
            let said = released_or_claimed("the lock", Some(&claim));
            assert_eq!(said, format!("the lock is released; {expected} had claimed it at 2026-09-21T14:13:20Z"));
        }
    }

    /// An unlock would let another run change what a provisioner of the dead run still changes.
    #[test]
    fn a_lock_of_a_run_whose_processes_are_alive_is_left_to_a_recovery() {
        const UNLOCK: &str = "terraform force-unlock 1";
        for (because, recorded, expected) in [
            (
                Because::StillRunning { several: true },
                true,
                "when they have exited, or after you have killed them, type: tf locks recover",
            ),
            (
                Because::StillRunning { several: false },
                true,
                "when it has exited, or after you have killed it, type: tf locks recover",
            ),
            // Without a journal, a recovery does not know the run.
            (
                Because::StillRunning { several: true },
                false,
                "when they have exited, or after you have killed them, type: terraform force-unlock 1",
            ),
            // A recovery on a host without a process list does not release the lock either.
            (
                Because::Unseen,
                true,
                "once no terraform is using this state and no process that terraform started is running, type: terraform force-unlock 1",
            ),
            (
                Because::NoAnswer,
                true,
                "to try again now, type: tf locks recover\n\
                 if that fails, once no terraform is using this state, type: terraform force-unlock 1",
            ),
            (Because::NoAnswer, false, "once no terraform is using this state, type: terraform force-unlock 1"),
            (Because::Doubt, true, "once no terraform is using this state, type: terraform force-unlock 1"),
            (Because::Never, true, "once no terraform is using this state, type: terraform force-unlock 1"),
        ] {
            assert_eq!(next_step(because, recorded, UNLOCK), expected, "{because:?} {recorded}");
        }
    }

    #[test]
    fn each_next_step_that_has_a_command_names_the_lock() {
        let info = LockInfo { id: "ID-7".into(), who: "anna@vm".into(), ..LockInfo::default() };
        let said = |step, name: &LockName| lock_step(step, &info, name, |words| format!("tf locks {words} --table t"));
        let (by_id, by_path) = (LockName::of_id("ID-7"), LockName::of_path("b/k"));
        for (step, id, path) in [
            (NextStep::Release, "release --table t ID-7", "release --table t b/k"),
            (NextStep::ReleaseIfUnused, "release --table t ID-7", "release --table t b/k"),
            (NextStep::ReleaseIfUnusedUnasked, "release --table t --yes ID-7", "release --table t --yes b/k"),
            (NextStep::Show, "show --table t ID-7", "show --table t b/k"),
            (NextStep::Force, "release --table t --force ID-7", "release --table t --force ID-7 b/k"),
        ] {
            for (name, command) in [(&by_id, id), (&by_path, path)] {
                let said = said(step, name).unwrap();
                assert!(said.ends_with(&format!("type: tf locks {command}")), "{said}");
                assert_eq!(said.contains("ask anna@vm"), step == NextStep::Force, "{said}");
            }
        }
        assert_eq!(said(NextStep::None, &by_id), None);
        for step in [NextStep::Wait, NextStep::RunAgain, NextStep::RunAgainAfter(Duration::ZERO)] {
            assert!(said(step, &by_id).is_some_and(|said| !said.contains("tf locks")), "{step:?}");
        }
        let unknown = LockInfo::default();
        let said = lock_step(NextStep::Force, &unknown, &by_id, ToOwned::to_owned).unwrap();
        assert!(said.contains("nothing shows whom to ask"), "{said}");
    }
}
