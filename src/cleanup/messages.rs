//! The messages that `tf` writes for people. A run prints them on stderr, and `tf locks recover` prints some of them on
//! stdout. The doc comment of each item says what the message reports.
//!
//! An output that is closed, hung up or full must not stop a release or end the program. So messages are printed with
//! the functions of [`crate::console`], which do not fail and do not block for long. `println!` and `eprintln!`, which
//! panic, are forbidden everywhere (clippy.toml).

use std::fmt::Write as _;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nix::sys::signal::Signal;

use crate::cleanup::end_of_run::{EndOfRun, Why};
use crate::console::{argument, length_of_time, option, visible, visible_whole};
use crate::holder::evidence::Judgement;
use crate::holder::lease_text;
use crate::holder::next_step::{self, NextStep, ReportKind};
use crate::journal::history::By;
use crate::journal::pending_requests::PENDING_WINDOW;
use crate::journal::runs::JournalRecord;
use crate::lease::fence::{INTERRUPTS_TO_END, LateWrite, Loss, StopCause, Trouble};
use crate::lease::notice::{Notice, NoticeStep};
use crate::lease::observed::ObservedLease;
use crate::lease::record::Claim;
use crate::lease::takeover::{MAX_READ_GAP, Obstacle};
use crate::lock::digest::Comparison;
use crate::lock::outcome::{Because, Released, Write};
use crate::lock::takeover::{Lapsed, Progress, Reason};
use crate::sys::process::Process;
use crate::sys::wait::Ended;
use crate::terraform::data_directory::CommandDirectories;
use crate::terraform::errored_state::{ERRORED_STATE, push_errored_state};
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::RecordedLock;
use crate::terraform::other_backends::OtherBackend;
use crate::time::saturating_add;

/// Returns how terraform ended, as the beginning of a message.
pub(crate) fn ending(end: &EndOfRun) -> String {
    match (end.killed, end.ended) {
        (Some(Why::Forced), _) => "terraform was killed (third ^C)".to_owned(),
        (Some(Why::StopTimeout), _) => "terraform was killed (TFW_STOP_TIMEOUT expired)".to_owned(),
        (Some(Why::LockLost), _) => "terraform was killed (its lock was lost)".to_owned(),
        (Some(Why::LeaseUnknown), _) => "terraform was killed (its lease could not be renewed)".to_owned(),
        (None, Some(Ended::Killed(Signal::SIGKILL))) if end.out_of_memory => {
            "terraform was killed by SIGKILL (out of memory)".to_owned()
        }
        (None, Some(Ended::Killed(signal))) => format!("terraform was killed by {}", signal.as_str()),
        (None, Some(Ended::Exited(11))) => "terraform crashed (exit code 11)".to_owned(),
        (None, Some(Ended::Exited(code))) => format!("terraform exited with code {code}"),
        (None, None) => "terraform was killed together with its tf".to_owned(),
    }
}

/// Reports that the kernel has stopped terraform because of its lease.
pub(crate) fn lease_stopped(cause: StopCause, has_person: bool) -> String {
    let why = match cause {
        StopCause::Deadline => "the lease of its lock was not renewed in time",
        StopCause::FuseKilled => "it is not certain that it still has its lock",
    };
    let end = if has_person { "\nto end it now, without saving its state, press ^C three times" } else { "" };
    format!(
        "terraform was stopped, because {why}\n\
         it goes on when the service answers and the lock is still this run's{end}"
    )
}

/// Reports why a terraform that was stopped because of its lease stays stopped.
pub(crate) fn cannot_renew(reason: &str) -> String {
    format!("the lease cannot be renewed: {}", visible_lines(reason))
}

/// Reports that a terraform goes on that was stopped because of its lease.
pub(crate) fn lease_continued() -> &'static str {
    "the lease was renewed, and terraform goes on"
}

/// Reports that a run goes on that was stopped because of a lease, although its terraform had released the lock before.
pub(crate) fn released_while_stopped() -> &'static str {
    "terraform had released the lock, and the run goes on"
}

/// Answers the ^C number `keys` while terraform is stopped because of its lease.
pub(crate) fn key_while_stopped(keys: u8) -> String {
    match INTERRUPTS_TO_END.saturating_sub(keys) {
        0 => "ending the stopped terraform; its state is not saved".to_owned(),
        more => format!(
            "terraform is stopped, and stops gracefully when it goes on; to end it now, without saving its state, press \
             ^C {more} more {}",
            if more == 1 { "time" } else { "times" }
        ),
    }
}

/// Reports why terraform is asked to stop.
pub(crate) fn lease_interrupts(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Refused(reason) => format!(
            "the lease of this run's lock cannot be renewed, so terraform is asked to stop: {}",
            visible_lines(reason)
        ),
        Trouble::Gone => "somebody has deleted the lock of this run, so terraform is asked to stop".to_owned(),
    }
}

/// Reports that this host is about to end, and what follows from it.
pub(crate) fn host_ends(Notice { end, announcement, at }: Notice, step: NoticeStep) -> String {
    // The end is at most 15 minutes ahead, so the date is left out.
    let at = at.and_then(|at| Timestamp::from_second(at).ok());
    let at = at.map_or_else(String::new, |at| at.strftime(" at %H:%M:%SZ").to_string());
    let next = match step {
        NoticeStep::Interrupt => "terraform is interrupted so that it can release its lock",
        NoticeStep::InterruptStopped => "terraform is stopped because of its lease, and is interrupted when it goes on",
        NoticeStep::SayOnly => "terraform is being stopped already",
    };
    format!("this host will be {}{at} ({}); {next}", end.word(), announcement.name())
}

/// Reports that the processes fail that renew the lease. `how` says how the last one has.
pub(crate) fn keepers_fail(how: &str) -> String {
    format!(
        "the process that renews the lease of this run's lock has failed several times in a row: {}\n\
         it is started again; the lease is not extended until that succeeds\n\
         to see what it does, set TFW_LOG to the name of a file",
        visible_lines(how)
    )
}

/// Reports that the second lock of a run has no lease. `path` is the lock's.
pub(crate) fn lock_without_lease(path: &str) -> String {
    format!("the lock of {} has no lease: a run has a lease only for its first lock", visible(path))
}

/// Reports that a run has no lease. `reason` says why.
pub(crate) fn no_lease(reason: &str) -> String {
    format!(
        "this run goes on without a lease: {}\nif this host vanishes, another host cannot release its lock without \
         being asked",
        visible_lines(reason)
    )
}

/// Reports that terraform was killed because the run has lost its lock. `write` is whether it may have written its
/// state after that. `plan` is the command that plans in the directory and the workspace of the run.
pub(crate) fn lock_lost(loss: Option<&Loss>, write: LateWrite, plan: &str) -> String {
    let how = match loss {
        Some(Loss::Claimed(claim)) => {
            let at = claim.at().map_or_else(String::new, |at| format!(" at {at:.0}"));
            // The lease may have lapsed, or a person may have typed `tf locks release --force`.
            format!("{} has claimed the lock of this run{at}", lease_text::claimant(claim))
        }
        Some(Loss::Another { who, created }) => {
            format!("the lock is held by another run now: {}, since {}", visible(who), visible(created))
        }
        Some(Loss::Gone) | None => "the lock of this run is gone: somebody has released or deleted it".to_owned(),
    };
    let over = match loss {
        Some(Loss::Claimed(_) | Loss::Another { .. }) => "over the state of the other run",
        Some(Loss::Gone) | None => "without a lock",
    };
    let state = match write {
        LateWrite::No => {
            "terraform was killed, so what it has changed since it last saved its state is not in the state".to_owned()
        }
        LateWrite::BeforeTheLossWasFound => {
            format!("terraform was killed; before that was known, it may have written its state {over}")
        }
        LateWrite::AfterTheDeadline => {
            format!("terraform ran after the deadline of its lease, so it may have written its state {over}")
        }
    };
    format!("{how}\n{state}\nto compare the state with the real resources, type: {plan}")
}

/// Reports that terraform was killed because it was stopped within its unlock, and its lock was gone. It writes its
/// state before its unlock. `plan` is as for [`lock_lost`].
pub(crate) fn lost_in_unlock(plan: &str) -> String {
    format!(
        "terraform was stopped while it released its lock, and the lock is gone\n\
         terraform was killed, because it might have released the lock of another run instead of its own\n\
         to compare the state with the real resources, type: {plan}"
    )
}

/// Reports that the record of a lock that stays still promises a fence.
pub(crate) const LEASE_STANDS: &str = "the lease of the lock that stays could not be withdrawn, so another host releases \
     the lock when the lease has lapsed";

/// The fields of a lock that identify it to a person.
struct NamedLock<'a> {
    operation: &'a str,
    path: &'a str,
    id: &'a str,
}

impl<'a> From<&'a RecordedLock> for NamedLock<'a> {
    fn from(lock: &'a RecordedLock) -> Self {
        Self { operation: &lock.operation, path: &lock.path, id: &lock.id }
    }
}

impl<'a> From<&'a LockInfo> for NamedLock<'a> {
    fn from(lock: &'a LockInfo) -> Self {
        Self { operation: &lock.operation, path: &lock.path, id: &lock.id }
    }
}

fn lock<'a>(lock: impl Into<NamedLock<'a>>) -> String {
    let NamedLock { operation, path, id } = lock.into();
    format!("{} on {}, ID {}", visible(operation), visible(path), visible(id))
}

/// Returns `why` with each of its lines escaped for a terminal.
fn visible_lines(why: &str) -> String {
    why.lines().map(visible).collect::<Vec<_>>().join("\n")
}

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
fn released_or_claimed(what: &str, claim: Option<&Claim>) -> String {
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

/// Reports that terraform could not write its state to the backend and saved the state in the working directory.
pub(crate) fn errored_state(path: &std::path::Path, program: &str, directories: CommandDirectories<'_>) -> String {
    format!(
        "{} exists: {ERRORED_STATE}\n{}",
        visible(&path.display().to_string()),
        push_errored_state(program, directories)
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
    fn next_step(&self, because: Because, recorded: &RecordedLock, is_recorded: bool) -> String {
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
fn next_step(because: Because, is_recorded: bool, unlock: &str) -> String {
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
const RECOVER: &str = "tf locks recover";

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
fn removal_command_of(record: &JournalRecord, workspace: Option<&str>) -> String {
    let is_other = workspace.is_some_and(|name| record.workspaces.first().is_none_or(|selected| selected != name));
    if is_other && record.command.starts_with("workspace ") {
        locks_command_of(record, "release", workspace)
    } else {
        unlock_command_of(record, workspace)
    }
}

/// Reports that terraform is waiting for a lock that may belong to a dead run.
pub(crate) fn waiting_for_the_dead(tf: u32) -> String {
    format!(
        "terraform is waiting for a lock that may belong to a dead run on this host (pid {tf})\ntf is cleaning up after that run"
    )
}

/// Describes the holder of a lock with a lease: the URL of its CI job, or `user@host`.
fn leaseholder(Lapsed { info, record, .. }: &Lapsed) -> String {
    lease_text::name(&record.holder).unwrap_or_else(|| visible(&info.who))
}

/// Says whose lease has lapsed, and when it was last renewed.
pub(crate) fn lapsed_lease(lapsed: &Lapsed) -> String {
    format!(
        "the {} lease of {} was last renewed {} ago",
        lease_text::length(lapsed.length()),
        leaseholder(lapsed),
        length_of_time(lapsed.renewed_ago())
    )
}

/// Says who has claimed a lock and has not deleted it, and how long the holder may still work.
fn unfinished_claim(lapsed: &Lapsed) -> String {
    let since = |at: Timestamp| Duration::try_from(lapsed.now.duration_since(at)).unwrap_or_default();
    let Lapsed { record, now, .. } = lapsed;
    let claimed = record.taken.as_ref().map_or_else(
        || "another host claimed the lock".to_owned(),
        |claim| {
            let age = length_of_time(claim.at().map(since).unwrap_or_default());
            format!("{} claimed the lock {age} ago", lease_text::claimant(claim))
        },
    );
    let left = record.terms().zip(record.renewed_at()).map(|(terms, renewed)| terms.time_to_lapse(renewed, *now));
    let holder = match left {
        Some(left) if !left.is_zero() => {
            format!("; its holder cannot renew the lease, which lapses in {}", length_of_time(left))
        }
        _ => String::new(),
    };
    format!("{claimed}, and has not released it{holder}")
}

/// What a taker knows about a lock whose deletion it has requested without a response.
pub(crate) const DELETE_UNANSWERED: &str = "this run requested the deletion of the lock, and the response was lost";

/// Reports a step of a takeover. `command` returns the `tf locks` command with the given arguments.
pub(crate) fn takeover(progress: Progress<'_>, command: impl Fn(&str) -> String) -> String {
    match progress {
        Progress::Watches(lapsed, missing) => format!(
            "a state lock blocks this run: {}; {}\nreleasing the lock if nothing changes for {}; to stop waiting, press ^C",
            lock(&lapsed.info),
            lapsed_lease(lapsed),
            length_of_time(Duration::from_secs(missing.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)))
        ),
        Progress::WaitsFor(lapsed, claim) => format!(
            "a state lock blocks this run: {}; {}\n{} is releasing that lock; waiting for that",
            lock(&lapsed.info),
            lapsed_lease(lapsed),
            lease_text::claimant(claim)
        ),
        Progress::Took(lapsed) => {
            format!("released the lock: {}, because {}", lock(&lapsed.info), lapsed_lease(lapsed))
        }
        Progress::LeftObject(object) => format!(
            "there may be an object that tf could not look at: {}\npermission denied: s3:GetObject\nif it is a part of the \
             released lock, it still refuses every run whose backend sets use_lockfile\nwith that permission, type: {}",
            visible(&object.describe()),
            command("list")
        ),
        Progress::MayHaveTaken(lapsed) => format!(
            "the lock is gone: {}; {}\n{DELETE_UNANSWERED}, so another process may have deleted it",
            lock(&lapsed.info),
            lapsed_lease(lapsed)
        ),
        Progress::Gone(lapsed) => format!("the lock is already released: {}", lock(&lapsed.info)),
        Progress::Renewed(lapsed) => {
            format!("the lock is still held: {}; {} has renewed its lease", lock(&lapsed.info), leaseholder(lapsed))
        }
        Progress::Leaves(lapsed, reason) => {
            let id = argument(&lapsed.info.id);
            let next = match reason {
                Reason::NotTaken(failure) | Reason::Unknown(failure) => {
                    let when = failure
                        .denied()
                        .map_or_else(|| IF_UNUSED.to_owned(), |action| format!("with the permission {action}"));
                    format!("{when}, type: {} {id}", command("release"))
                }
                Reason::TooSlow(_) | Reason::Unsettled(_) => {
                    format!("{IF_UNUSED}, type: {} {id}", command("release"))
                }
                _ => format!("for details, type: {} {id}", command("show")),
            };
            let why = match reason {
                Reason::Obstacle(Obstacle::AnotherRegion) => {
                    "tf does not release it, because that run uses another AWS region".to_owned()
                }
                Reason::Obstacle(Obstacle::Claimed | Obstacle::ClaimLapsedEarly) => unfinished_claim(lapsed),
                Reason::Obstacle(Obstacle::RunsHere) => {
                    "tf does not release it, because a process on this host is or may be working for that run, or because \
                     tf on this host has said that it does not release that lock"
                        .to_owned()
                }
                Reason::Obstacle(_) => {
                    "tf does not release it, because its lease does not promise that terraform was stopped: that host \
                     cannot stop terraform in every case, or its tf has kept the lock on purpose"
                        .to_owned()
                }
                Reason::GlobalTable(reason) => visible_lines(reason),
                Reason::Failure(failure) | Reason::NotTaken(failure) => visible_lines(&failure.to_string()),
                Reason::TooSlow(gap) => format!(
                    "the service answers too slowly: tf must see at least every {} s that nothing has changed, and the \
                     last read took {} s",
                    MAX_READ_GAP.as_secs(),
                    gap.as_millis().div_ceil(1000)
                ),
                Reason::Unsettled(waited) => format!(
                    "in {}, tf has not seen the lock and the state unchanged for long enough: another program may be \
                     writing the state without a lock",
                    length_of_time(*waited)
                ),
                Reason::Unknown(failure) => {
                    format!("{DELETE_UNANSWERED}: {}", visible_lines(&failure.to_string()))
                }
            };
            let fact = match reason {
                Reason::Unknown(_) => "it is unknown whether the lock was released",
                _ => "the lock was not released",
            };
            format!("{fact}: {}; {}\n{why}\n{next}", lock(&lapsed.info), lapsed_lease(lapsed))
        }
    }
}

/// Reports that an earlier run did not end while this `tf` waited for it. `stops` is true if the `tf` of that run is
/// alive and is stopping terraform. `processes` are the processes of the run that are known to be alive.
pub(crate) fn still_ending(record: &JournalRecord, stops: bool, processes: &[Process]) -> String {
    let tf = record.tf;
    if stops {
        return format!(
            "a run on this host (pid {tf}) is still stopping and may hold a state lock\n\
             that run releases its lock when it exits\nto check again, type: tf locks recover"
        );
    }
    let running = if processes.is_empty() {
        "another process of that run (most likely its guardian, a second tf) is still running\n\
         when it has exited, or after you have killed it"
            .to_owned()
    } else {
        format!(
            "processes of that run are still running: {}\nwhen they have exited, or after you have killed them",
            list(processes)
        )
    };
    format!(
        "a run on this host (pid {tf}) may hold a state lock, which was not released\n\
         the tf of that run is dead, but {running}, type: tf locks recover"
    )
}

/// Reports that another process is cleaning up after a dead run, and did not finish while this `tf` waited for it.
pub(crate) fn still_recovering(record: &JournalRecord) -> String {
    format!(
        "a dead run on this host (pid {}) may hold a state lock\nanother process is still cleaning up after that run\n\
         to check again, type: tf locks recover",
        record.tf
    )
}

/// Reports that a recovery could not be started, because of `error`.
pub(crate) fn no_recovery_process(error: &std::io::Error) -> String {
    format!(
        "could not start a process that cleans up after an earlier run: {error}\nto try again, type: tf locks recover"
    )
}

/// Reports that no process of a run is known to be alive, but that `processes` may belong to the run.
pub(crate) fn may_be_alive(record: &JournalRecord, processes: &[Process]) -> String {
    format!(
        "an earlier run (pid {}) may hold a state lock, which was not released\n\
         these processes may belong to that run: {}\nwhen they have exited, type: tf locks recover",
        record.tf,
        list(processes)
    )
}

/// Reports that this `tf` cannot determine whether an earlier run is alive, and which locks that run may hold.
/// `workspace_of` returns the workspace of a lock, or `None` if that is unknown.
pub(crate) fn cannot_be_judged<'a>(
    record: &JournalRecord,
    why: &str,
    workspace_of: impl Fn(&RecordedLock) -> Option<&'a str>,
) -> String {
    let mut text = format!(
        "an earlier run (pid {}) may hold a state lock, but tf cannot tell whether that run is still running\n{why}",
        record.tf
    );
    for recorded in record.log.unreleased() {
        let words = format!("release --force {}", recorded.id);
        let release = locks_command_of(record, &words, workspace_of(recorded));
        let _ = write!(
            text,
            "\nit may hold the lock {}\n\
             once no process of that run is running on the host or in the container that started it, type: {release}",
            lock(recorded)
        );
    }
    let _ = write!(text, "\nif that lock is gone, type: tf locks recover --forget {}", visible(&record.run));
    text
}

/// Reports that `tf` cannot clean up after a dead run, for the reason `why`.
pub(crate) fn cannot_be_finished(record: &JournalRecord, why: &str) -> String {
    format!(
        "an earlier run (pid {}) may hold a state lock, but tf cannot clean up after that run\n{why}\n\
         once that is fixed, type: tf locks recover",
        record.tf
    )
}

/// The reason why a lock was not released: there is no process list.
pub(crate) const UNSEEN: &str = "cannot tell whether terraform's child processes are still running: \
     /proc is not mounted, cannot be read, or belongs to another pid namespace";

/// Reports that a recovery is taking more than 1 s.
pub(crate) fn recovering() -> String {
    "cleaning up after an earlier run; press ^C twice to skip this".to_owned()
}

/// Reports that a lock of an earlier run was released.
pub(crate) fn recovered(
    record: &JournalRecord,
    recorded: &RecordedLock,
    claim: Option<&Claim>,
    now: Timestamp,
) -> String {
    let ago = length_of_time(now.duration_since(record.started).unsigned_abs());
    let what = format!("the lock that an earlier run left (started {ago} ago, pid {})", record.tf);
    format!("{}: {}", released_or_claimed(&what, claim), lock(recorded))
}

/// Reports what a recovery would do about a lock of a dead run.
pub(crate) fn would_recover(record: &JournalRecord, recorded: &RecordedLock) -> String {
    format!("would release, if it is still held, the lock of a dead run (pid {}): {}", record.tf, lock(recorded))
}

/// Reports what a recovery would do about a lock of a dead run if the run's log does not contain the lock's ID.
pub(crate) fn would_look_for(record: &JournalRecord, asked: Timestamp) -> String {
    format!(
        "would look for the lock that a dead run (pid {}) requested at {asked}; the log of that run does not contain the lock's ID",
        record.tf
    )
}

/// Reports that a lock was not released, because it is not certain whether it belongs to an earlier run. `workspace` is
/// the workspace of the lock, or `None` if that is unknown.
pub(crate) fn may_be_its(record: &JournalRecord, info: &LockInfo, workspace: Option<&str>, why: &str) -> String {
    let show = locks_command_of(record, "show", workspace);
    format!(
        "this lock may belong to an earlier run (pid {}) and was not released: {}, Who {}\n{}\n{}",
        record.tf,
        lock(info),
        visible(&info.who),
        visible_lines(why),
        decide_after_show(info, &show, &removal_command_of(record, workspace))
    )
}

/// Returns the sentences that say how a person can decide about a lock that may belong to a dead run. `show` and
/// `unlock` are the commands without the lock's ID.
fn decide_after_show(info: &LockInfo, show: &str, unlock: &str) -> String {
    let unlock = if is_lock_id(&info.id) {
        format!("\n{}", next_step(Because::Doubt, false, &format!("{unlock} {}", info.id)))
    } else {
        String::new()
    };
    format!("to see who holds it, type: {show} {}{unlock}", argument(&info.id))
}

/// Reports that `tf` could not look for a lock of an earlier run. The run's log does not contain the ID of that lock.
pub(crate) fn not_looked_for_again(record: &JournalRecord, why: &str) -> String {
    format!(
        "an earlier run (pid {}) may have left a state lock, but tf could not look for that lock\n{}\nthat run used: {}\n\
         if the lock is gone, type: tf locks recover --forget {}",
        record.tf,
        visible_lines(why),
        visible(&record.surroundings.needs()),
        visible(&record.run)
    )
}

/// Reports that the outputs of a CI step could not be written to `path`.
pub(crate) fn no_outputs(path: &std::ffi::OsStr, error: &std::io::Error) -> String {
    format!("could not write the outputs of this step to {}: {error}", visible(&path.to_string_lossy()))
}

/// Returns the beginning of a message about a lock of a dead run.
pub(crate) fn earlier_run(record: &JournalRecord) -> String {
    format!("an earlier run (pid {}) was killed", record.tf)
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

/// Reports that a lock of an earlier run was not released. `workspace` is the workspace of the lock, or `None` if that is
/// unknown.
pub(crate) fn not_recovered(
    record: &JournalRecord,
    recorded: &RecordedLock,
    workspace: Option<&str>,
    (why, because): (&str, Because),
) -> String {
    let removal = Removal {
        unlock: removal_command_of(record, workspace),
        release: locks_command_of(record, RELEASE_NO_LOCK, workspace),
        show: locks_command_of(record, "show", workspace),
    };
    format!(
        "an earlier run (pid {}) may have left a state lock, which was not released: {}\n{}\nthat run used: {}\n\
         {}",
        record.tf,
        lock(recorded),
        visible_lines(why),
        visible(&record.surroundings.needs()),
        removal.next_step(because, recorded, true)
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

/// Reports that another run locked the same state while the earlier run of `record` was working. `workspace` is that of
/// the state, or `None` if it is unknown.
pub(crate) fn replaced_earlier(
    record: &JournalRecord,
    own: &RecordedLock,
    by: &LockInfo,
    workspace: Option<&str>,
) -> String {
    let program = visible_whole(&record.program);
    in_directories_of(record, workspace, |directories| replaced(&earlier_run(record), own, by, &program, directories))
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

/// The next step if the record of a run cannot be read.
const SEE_WHICH_ARE_HELD: &str =
    "that run may have left a state lock; to see which locks are held, type in its directory: tf locks";

/// Reports that the record at `path` cannot be read and was not moved.
pub(crate) fn broken(path: &std::path::Path) -> String {
    format!(
        "could not read the record of an earlier run: {}\n{SEE_WHICH_ARE_HELD}",
        visible(&path.display().to_string())
    )
}

/// Reports that the record at `path` cannot be read because of `error`, which says nothing about the run.
pub(crate) fn unread(path: &std::path::Path, error: &str) -> String {
    format!(
        "could not read the record of an earlier run: {}\n{}\nthat run may have left a state lock; once the record can be \
         read, type: {RECOVER}",
        visible(&path.display().to_string()),
        visible(error)
    )
}

/// Reports that a record is invalid and was moved to `path`.
pub(crate) fn set_aside(path: &std::path::Path) -> String {
    format!(
        "could not read the record of an earlier run; it was moved to {}\n{SEE_WHICH_ARE_HELD}",
        visible(&path.display().to_string())
    )
}

/// Reports, after terraform has died, that the run had no journal. `has_lease` is whether the run renewed a lease on
/// its lock: any host may release the lock when that has lapsed.
pub(crate) fn unprotected(why: &str, has_lease: bool) -> String {
    let until = if has_lease { " before its lease had lapsed" } else { "" };
    format!(
        "this run had no journal: {}\nif tf had been killed too, no later run would have released the lock{until}",
        visible(why)
    )
}

/// The reason why a lock was not released: another run, which is or may be alive, has recorded the same lock.
pub(crate) const CLAIMED: &str = "the lock belongs to another run of tf on this host, which may still be running";

/// The reason why a lock was not released: the journal does not show whether another run has recorded the same lock.
pub(crate) const MAY_BE_CLAIMED: &str =
    "the record of another run of tf on this host cannot be read, and the lock may belong to that run";

/// Returns how long a request may still land.
fn pending_time() -> String {
    format!("{} min", PENDING_WINDOW.as_secs() / 60)
}

/// Reports that a lock was requested and not found, and that the request may still land. `kept` is true if the next
/// `tf` looks for the lock.
pub(crate) fn may_still_come(ending: &str, recorded: &RecordedLock, kept: bool, unlock: &str) -> String {
    let then = if kept {
        format!("if the lock appears within {}, the next tf in this directory releases it", pending_time())
    } else {
        format!("if the lock appears later, type: {unlock} {}", recorded.id)
    };
    format!(
        "{ending} while it requested a state lock: {}\ntf did not find that lock; the lock may still appear\n{then}",
        lock(recorded)
    )
}

/// Reports that one part of a lock was released, and that the other part was never found. `kept` is true if the next
/// `tf` looks for the other part.
pub(crate) fn other_part_may_land(recorded: &RecordedLock, kept: bool, unlock: &str) -> String {
    let then = if kept {
        format!("if that part appears within {}, the next tf in this directory releases it", pending_time())
    } else {
        format!("if that part appears, type: {unlock} {}", recorded.id)
    };
    format!("the other part of this lock (its DynamoDB item or its S3 object) may still appear\n{then}")
}

/// Reports that a lock with an unknown ID was requested and not found. `kept` is true if the next `tf` looks for the
/// lock. `list` is the command that lists the locks.
pub(crate) fn unnamed_may_still_come(ending: &str, asked: Timestamp, kept: bool, list: &str) -> String {
    let then = if kept {
        let time = pending_time();
        &format!(
            "if the lock appears within {time}, the next tf in this directory finds it\nto look for it now, type: tf locks recover"
        )
    } else {
        &format!("to look for it later, type: {list}")
    };
    format!("{ending} while it requested a state lock (at {asked:.0}); the lock may still appear\n{then}")
}

/// Reports that the table or bucket of a lock that the run held does not exist. `kept` is true if the next `tf` looks
/// for the lock.
pub(crate) fn place_is_away(ending: &str, recorded: &RecordedLock, kept: bool) -> String {
    let then = if kept { "\nif the table or bucket exists again within 24 h, type: tf locks recover" } else { "" };
    format!(
        "{ending}; its state lock is gone, because the lock's table or bucket does not exist: {}{then}",
        lock(recorded)
    )
}

/// Reports that a lock that appeared after the cleanup, or that could not be found then, was released.
pub(crate) fn came_late(recorded: &RecordedLock) -> String {
    let how = if recorded.progress.held.is_some() {
        "a dead terraform left"
    } else {
        "appeared after its terraform had died"
    };
    format!("released a lock that {how}: {}", lock(recorded))
}

/// Reports that the lock because of which this run failed was released.
pub(crate) const TRY_AGAIN: &str = "terraform failed because of that lock; run the command again";

/// Returns the holder of a lock, the holder's operation, and since when the lock is held. What the lock does not
/// contain is left out.
pub(crate) fn held(info: &LockInfo, now: Timestamp) -> String {
    let text =
        |name: &str, value: &str| if value.is_empty() { String::new() } else { format!("{name}{}", visible(value)) };
    let who = if info.who.is_empty() { "an unknown holder" } else { &visible(&info.who) };
    format!("{who}{}{}, ID {}", text(" for ", &info.operation), since(info, now), visible(&info.id))
}

/// Returns since when a lock is held, and for how long by this host's clock. Empty if the lock has no valid creation
/// time.
fn since(info: &LockInfo, now: Timestamp) -> String {
    match info.created() {
        Some(created) if created > saturating_add(now, CLOCK_SLACK_WINDOW) => {
            format!(", since {created:.0}, which is {} ahead of this host's clock", apart(created, now))
        }
        // A creation time slightly in the future counts as now.
        Some(created) => format!(", since {created:.0} ({})", apart(created.min(now), now)),
        None => String::new(),
    }
}

/// The difference between the clocks of two hosts that is tolerated.
pub(crate) const CLOCK_SLACK_WINDOW: SignedDuration = SignedDuration::from_mins(1);

fn apart(one: Timestamp, other: Timestamp) -> String {
    length_of_time(other.duration_since(one).unsigned_abs())
}

/// The lock that terraform was refused.
pub(crate) struct Refusal<'a> {
    pub(crate) info: &'a LockInfo,
    /// The lease record of the lock. `None` if it has none.
    pub(crate) lease: Option<&'a ObservedLease>,
    pub(crate) judgement: &'a Judgement,
    /// As in [`ReportKind::Refused`].
    pub(crate) is_released_after: Option<Duration>,
}

/// Reports that terraform's lock request was refused: who holds the lock, whether the holder is alive, and which
/// command to type. `command` returns a `tf locks` command for the location of the lock. `finishing` is true if `tf` is
/// about to clean up after the holder, a dead run; there is no command to type in that case.
pub(crate) fn refused(
    Refusal { info, lease, judgement, is_released_after }: &Refusal<'_>,
    now: Timestamp,
    command: impl Fn(&str) -> String,
    finishing: bool,
) -> String {
    let lease = lease.and_then(lease_text::of_holder).map_or_else(String::new, |text| format!("\n{text}"));
    let said = format!(
        "the lock is held by {}{lease}\n{}: {}",
        held(info, now),
        judgement.verdict.of_the_holder(),
        judgement.reason
    );
    let kind = ReportKind::Refused { is_finishing: finishing, is_released_after: *is_released_after };
    let step = next_step::next_step(judgement.verdict, kind);
    match lock_step(step, info, &LockName::of_id(&info.id), command) {
        Some(next) => format!("{said}\n{next}"),
        None => said,
    }
}

/// How a `tf locks` command names a lock.
pub(crate) struct LockName {
    /// The argument: the lock's ID, or its path.
    pub(crate) argument: String,
    /// The path, if a command with `--force` needs it beside the ID.
    pub(crate) path: Option<String>,
}

impl LockName {
    /// The lock is found by its ID, in the directory of the command.
    pub(crate) fn of_id(id: &str) -> Self {
        Self { argument: argument(id), path: None }
    }

    /// The lock is found by its path, in a table or a bucket.
    pub(crate) fn of_path(path: &str) -> Self {
        Self { argument: argument(path), path: Some(argument(path)) }
    }
}

/// Says what a person can do about the lock `info`. `command` returns a `tf locks` command for the location of the
/// lock. `None` if nothing is to be done.
pub(crate) fn lock_step(
    step: NextStep,
    info: &LockInfo,
    name: &LockName,
    command: impl Fn(&str) -> String,
) -> Option<String> {
    let lock = &name.argument;
    Some(match step {
        NextStep::None => return None,
        NextStep::RunAgain => "to release it, run the command again".to_owned(),
        NextStep::RunAgainAfter(time) => format!(
            "the holder has not renewed its lease in time; unless it does so now, the command releases the lock if you \
             run it again in {}",
            length_of_time(Duration::from_secs(time.as_secs() + 1))
        ),
        NextStep::Wait => "wait until that run is over, or let terraform wait with -lock-timeout=10m".to_owned(),
        NextStep::Release => format!("to release it, type: {} {lock}", command("release")),
        NextStep::ReleaseIfUnused => format!("{IF_UNUSED}, type: {} {lock}", command("release")),
        NextStep::ReleaseIfUnusedUnasked => format!("{IF_UNUSED}, type: {} --yes {lock}", command("release")),
        NextStep::Show => format!("for details, type: {} {lock}", command("show")),
        NextStep::Force => {
            let ask = match visible(&info.who) {
                who if who.is_empty() => "the lock's Who is empty, so nothing shows whom to ask".to_owned(),
                who => format!("ask {who}"),
            };
            let force = option("--force", &visible_whole(&info.id));
            let path = name.path.as_ref().map_or_else(String::new, |path| format!(" {path}"));
            format!("{ask}\n{IF_UNUSED}, type: {}{force}{path}", command("release"))
        }
    })
}

/// Why a line about the lock is printed for which terraform waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// No line was printed about this wait.
    First,
    /// The last line was about another lock.
    Changed,
    /// The last line is 5 minutes old.
    Again,
}

/// Reports on one line who holds the lock for which terraform waits, with its CI job, and whether the holder is alive.
pub(crate) fn waits(
    occasion: Occasion,
    Refusal { info, lease, judgement, .. }: &Refusal<'_>,
    now: Timestamp,
) -> String {
    let begin = match occasion {
        Occasion::First => "terraform is waiting for a lock held by",
        Occasion::Changed => "the lock for which terraform is waiting is now held by",
        Occasion::Again => "terraform is still waiting for a lock held by",
    };
    let record = lease.and_then(ObservedLease::shown_record);
    let job = record.and_then(|record| lease_text::job(&record.holder));
    let interrupted = record.and_then(|record| record.interrupted.as_ref()).map(lease_text::interruption);
    format!(
        "{begin} {}{}{}; {}: {}",
        held(info, now),
        job.map_or_else(String::new, |job| format!(", job {job}")),
        interrupted.map_or_else(String::new, |why| format!(", interrupted: {why}")),
        judgement.verdict.of_the_holder(),
        judgement.reason
    )
}

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

/// The reason why a lock was not released: processes that terraform started are alive.
pub(crate) fn still_alive(processes: &[Process]) -> String {
    format!("processes that terraform started are still running: {}", list(processes))
}

/// The reason why a lock was not released: a process that `tf` cannot see still has the lifeline open.
pub(crate) const LIFELINE_HELD: &str = "a child process of terraform is still running, but tf cannot see which one";

/// The reason why a lock was not released: another terraform of the run is still running.
pub(crate) fn another_terraform(process: &Process) -> String {
    format!("a terraform that this run started is still running: {}", list(std::slice::from_ref(process)))
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

/// Reports, after an interrupt, the processes that terraform has started and that are still running.
pub(crate) fn survivors(processes: &[Process]) -> String {
    format!(
        "terraform exited after the interrupt, but processes that it started are still running: {}",
        list(processes)
    )
}

fn list(processes: &[Process]) -> String {
    let mut names: Vec<_> = processes
        .iter()
        .take(5)
        .map(|process| format!("{} (pid {})", visible(&process.program()), process.pid))
        .collect();
    if processes.len() > names.len() {
        names.push(format!("{} more", processes.len() - names.len()));
    }
    names.join(", ")
}

/// Answers another ^C while terraform is stopping.
pub(crate) fn stopping(since: Duration, offer: Duration, holds_lock: bool) -> String {
    let releases = if holds_lock { " and will release its lock" } else { "" };
    format!(
        "terraform has been stopping for {}{releases}; press ^C again within {} s to force it to stop",
        length_of_time(since),
        offer.as_secs()
    )
}

/// Answers the third ^C.
pub(crate) fn forcing() -> String {
    "sent terraform its second interrupt; it will be killed if it does not exit within 6 s".to_owned()
}

/// Answers the first ^C while a lock is being released.
pub(crate) fn still_releasing() -> String {
    "releasing the state lock; press ^C again to leave it held".to_owned()
}

/// Reports that there is no terraform to run, or that a setting is invalid.
pub(crate) fn cannot_start(reason: &dyn std::fmt::Display) -> String {
    format!("{reason}")
}

/// Reports that terraform was found but could not be run.
pub(crate) fn cannot_run(path: &std::path::Path, error: &std::io::Error) -> String {
    format!("could not run {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::holder::evidence::Verdict;
    use crate::journal::runs::Journal;
    use crate::journal::state_directory::StateDirectory;
    use crate::lease::notice::{Announcement, HostEnd};
    use crate::lease::record::{Promise, Record, Renewal};
    use crate::lease::terms::Terms;

    #[test]
    fn a_notice_says_what_happens_to_the_host_when_why_and_what_follows() {
        let (end, announcement) = (HostEnd::Terminated, Announcement::SpotInterruption);
        let at = |text: &str| Some(text.parse::<Timestamp>().unwrap().as_second());
        for (at, step, expected) in [
            (
                at("2026-11-24T12:00:05Z"),
                NoticeStep::Interrupt,
                "this host will be terminated at 12:00:05Z (EC2 spot interruption); terraform is interrupted so that it \
                 can release its lock",
            ),
            (
                at("2026-11-24T09:08:07Z"),
                NoticeStep::SayOnly,
                "this host will be terminated at 09:08:07Z (EC2 spot interruption); terraform is being stopped already",
            ),
            (
                None,
                NoticeStep::InterruptStopped,
                "this host will be terminated (EC2 spot interruption); terraform is stopped because of its lease, and \
                 is interrupted when it goes on",
            ),
            (
                Some(i64::MIN),
                NoticeStep::SayOnly,
                "this host will be terminated (EC2 spot interruption); terraform is being stopped already",
            ),
        ] {
            assert_eq!(host_ends(Notice { end, announcement, at }, step), expected);
        }
    }

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

    #[test]
    fn a_taker_that_waits_for_a_claim_names_the_claimant() {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        let record = Record::new("id", terms, Renewal { renewed: 1_790_000_000, beat: 7 }, Promise::Stop);
        let now = Timestamp::from_second(1_790_000_400).unwrap();
        let lapsed = Lapsed { info: LockInfo::default(), record, path: "b/k".into(), now };
        for (by, expected) in [("ci@other", "ci@other"), ("", "another host")] {
            let claim = Claim { by: by.into(), at: 1_790_000_390, number: 7 };
            let said = takeover(Progress::WaitsFor(&lapsed, &claim), ToOwned::to_owned);
            assert!(said.ends_with(&format!("\n{expected} is releasing that lock; waiting for that")), "{said}");
        }
    }

    #[test]
    fn a_taker_that_no_longer_waits_for_a_claim_says_how_old_it_is_and_when_the_lease_lapses() {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        for (now, expected) in [
            (
                100,
                "ci@other claimed the lock 1 min 20 s ago, and has not released it; its holder cannot renew the lease, \
                 which lapses in 3 min 30 s",
            ),
            (400, "ci@other claimed the lock 6 min 20 s ago, and has not released it"),
        ] {
            let mut record = Record::new("id", terms, Renewal { renewed: 1_790_000_000, beat: 7 }, Promise::Stop);
            record.taken = Some(Claim { by: "ci@other".into(), at: 1_790_000_020, number: 7 });
            let now = Timestamp::from_second(1_790_000_000 + now).unwrap();
            let lapsed = Lapsed { info: LockInfo::default(), record, path: "b/k".into(), now };
            let reason = Reason::Obstacle(Obstacle::ClaimLapsedEarly);
            let said = takeover(Progress::Leaves(&lapsed, &reason), |words| format!("tf locks {words}"));
            assert!(said.starts_with("the lock was not released: "), "{said}");
            assert!(said.contains(&format!("\n{expected}\nfor details, type: tf locks show")), "{said}");
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
    fn a_refusal_names_the_command_that_releases_the_lock_and_not_a_longer_one() {
        let info = LockInfo { id: "5e75cb05-d70c-4132-39e0-d2abba1b3077".into(), ..LockInfo::default() };
        let said = |verdict, is_released_after| {
            let judgement = Judgement { verdict, reason: String::new(), evidence: Vec::new(), is_settled: false };
            let refusal = Refusal { info: &info, lease: None, judgement: &judgement, is_released_after };
            let said = refused(&refusal, Timestamp::UNIX_EPOCH, |words| format!("tf locks {words}"), false);
            said.lines().last().unwrap_or_default().to_owned()
        };
        assert!(said(Verdict::LikelyDead, None).ends_with(&format!("tf locks release {}", info.id)));
        let soon = said(Verdict::Alive, Some(Duration::from_secs(19)));
        assert!(soon.ends_with("the command releases the lock if you run it again in 20 s"), "{soon}");
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

    #[test]
    fn a_lock_that_was_not_looked_for_is_listed_in_the_directory_of_its_run() {
        let list = "TF_WORKSPACE=green tf locks --chdir /w";
        let expected = format!("type: {list}");
        assert!(suspect_not_looked_for("it died", "no answer", list).ends_with(&expected));
        let said = |kept| unnamed_may_still_come("it died", Timestamp::UNIX_EPOCH, kept, list);
        assert!(said(false).ends_with(&expected) && said(true).ends_with("type: tf locks recover"));
    }

    #[test]
    fn a_lost_lock_is_said_to_be_whose_it_is_or_that_nobody_knows_who_released_it() {
        let claim = |by: &str| Claim { by: by.into(), at: 1_790_000_000, number: 7 };
        let another = Loss::Another { who: "bert@vm".into(), created: "2026-11-26T12:00:00Z".into() };
        for (loss, who) in [
            (
                Some(Loss::Claimed(claim("ci@other"))),
                "ci@other has claimed the lock of this run at 2026-09-21T14:13:20Z\n",
            ),
            (Some(Loss::Claimed(claim(""))), "another host has claimed the lock of this run at 2026-09-21T14:13:20Z\n"),
            (Some(another), "the lock is held by another run now: bert@vm"),
            (Some(Loss::Gone), "the lock of this run is gone: somebody has released or deleted it"),
            (None, "the lock of this run is gone: somebody has released or deleted it"),
        ] {
            let has_another = !matches!(loss, Some(Loss::Gone) | None);
            for write in [LateWrite::No, LateWrite::BeforeTheLossWasFound, LateWrite::AfterTheDeadline] {
                let said = lock_lost(loss.as_ref(), write, "terraform -chdir=d plan");
                assert!(said.ends_with("type: terraform -chdir=d plan"), "{said}");
                assert!(said.starts_with(who) && !said.contains("lapsed"), "{said}");
                assert_eq!(
                    said.contains("the state of the other run"),
                    write != LateWrite::No && has_another,
                    "{said}"
                );
                assert_eq!(said.contains("ran after the deadline"), write == LateWrite::AfterTheDeadline, "{said}");
                assert_eq!(said.contains("since it last saved its state"), write == LateWrite::No, "{said}");
            }
        }
    }

    #[test]
    fn without_a_journal_the_lock_of_a_run_with_a_lease_would_have_been_released_later() {
        for (has_lease, end) in [(false, "released the lock"), (true, "released the lock before its lease had lapsed")]
        {
            let said = unprotected("No space left on device", has_lease);
            assert!(
                said.starts_with("this run had no journal: No space left on device\n") && said.ends_with(end),
                "{said}"
            );
        }
    }

    #[test]
    fn an_ending_names_its_signal() {
        let ending = |ended, out_of_memory| {
            ending(&EndOfRun { ended: Some(ended), killed: None, forced: false, interrupted: false, out_of_memory })
        };
        assert_eq!(ending(Ended::Killed(Signal::SIGKILL), false), "terraform was killed by SIGKILL");
        assert_eq!(ending(Ended::Killed(Signal::SIGKILL), true), "terraform was killed by SIGKILL (out of memory)");
        assert_eq!(ending(Ended::Killed(Signal::SIGHUP), true), "terraform was killed by SIGHUP");
        assert_eq!(ending(Ended::Exited(1), false), "terraform exited with code 1");
    }
}
