//! Every sentence that `tf` says to a person, and the only way to say one: on stderr, never on stdout.
//!
//! A stderr that is closed, hung up or full must neither stop a release nor end the program, so nothing here can fail
//! or wait for long, and `println!` and `eprintln!`, which panic, are forbidden everywhere (clippy.toml).

use crate::console::length_of_time;
use crate::console::option;
use crate::console::visible;
use crate::console::visible_whole;
use crate::terraform::errored_state::ERRORED_STATE;
use std::fmt::Write as _;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nix::sys::signal::Signal;

use crate::cleanup::end_of_run::{EndOfRun, Why};
use crate::console::{argument, quoted};
use crate::holder::evidence::{Judgement, Verdict};
use crate::journal::runs::JournalRecord;
use crate::lock::digest::Comparison;
use crate::lock::release::{Because, Released, Write};
use crate::sys::process::Process;
use crate::sys::wait::Ended;
use crate::terraform::errored_state::push_errored_state;
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::RecordedLock;
use crate::terraform::other_backends::OtherBackend;
use crate::time::saturating_add;

/// How terraform ended, as the beginning of a sentence.
pub(crate) fn ending(end: &EndOfRun) -> String {
    match (end.killed, end.ended) {
        (Some(Why::Forced), _) => "terraform was killed at the third ^C".to_owned(),
        (Some(Why::StopTimeout), _) => "terraform was killed at the end of TFW_STOP_TIMEOUT".to_owned(),
        (None, Some(Ended::Killed(Signal::SIGKILL))) if end.out_of_memory => {
            "terraform was killed by SIGKILL, out of memory".to_owned()
        }
        (None, Some(Ended::Killed(signal))) => format!("terraform was killed by {}", signal.as_str()),
        (None, Some(Ended::Exited(11))) => "terraform crashed (exit code 11)".to_owned(),
        (None, Some(Ended::Exited(code))) => format!("terraform ended with exit code {code}"),
        (None, None) => "terraform was killed with its tf".to_owned(),
    }
}

fn lock(operation: &str, path: &str, id: &str) -> String {
    format!("{} on {}, ID {}", visible(operation), visible(path), visible(id))
}

/// A lock was given back.
pub(crate) fn released(ending: &str, recorded: &RecordedLock, released: &Released, now: Timestamp) -> String {
    let mut text = format!("{ending} without giving its state lock back");
    match released.write {
        Some(Write::Landed) => text.push_str("; a write of it still arrived"),
        Some(Write::Quiet) => text.push_str("; no write of it arrived any more"),
        None => {}
    }
    let held = released.created.map_or_else(String::new, |created| {
        format!(", held for {}", length_of_time(now.duration_since(created).unsigned_abs()))
    });
    let _ = write!(text, "\nreleased the lock: {}{held}", lock(&recorded.operation, &recorded.path, &recorded.id));
    text
}

/// A digest that does not fit its state, in `workspace` if that is known.
pub(crate) fn unfit_digest(digest_mismatch: &Comparison, workspace: Option<&str>, directory: Option<&str>) -> String {
    let recorded = visible(digest_mismatch.recorded.as_deref().unwrap_or("none"));
    let written = digest_mismatch.written.map_or_else(String::new, |at| format!(", written at {at:.0}"));
    let (state, advice) = match &digest_mismatch.computed {
        Some(digest) => {
            (format!("the state{written} has {digest}"), "look at the state; if it is the right one, type:")
        }
        None => (
            "there is no state".to_owned(),
            "if there should be one, bring it back (its bucket may keep old versions); if not, type:",
        ),
    };
    let name = |name: &str| option("--fix-digest", &visible_whole(name));
    let workspace = workspace.map_or_else(|| " --fix-digest".to_owned(), name);
    let directory = directory.map_or_else(String::new, |directory| option("--chdir", directory));
    format!(
        "the state's digest does not fit: {state}, and {recorded} is recorded; every command will fail with a checksum \
         error\n{advice} tf locks doctor{directory}{workspace}"
    )
}

/// A state that terraform could not write, and put beside the configuration.
pub(crate) fn errored_state(path: &std::path::Path, program: &str, directory: Option<&str>) -> String {
    format!(
        "{} lies there: {ERRORED_STATE}\n{}",
        visible(&path.display().to_string()),
        push_errored_state(program, directory)
    )
}

/// A lock stands, or may, and what to type. `later`: the next `tf` knows of it, and tries again.
pub(crate) fn kept(
    ending: &str,
    recorded: &RecordedLock,
    why: &str,
    because: Because,
    later: bool,
    removal: &Removal,
) -> String {
    let again = if later { "the next tf here tries again; or, " } else { "" };
    format!(
        "{ending}; its state lock was not released: {}\n{}\n{again}{}once nobody works there, type: {}",
        visible(why),
        lock(&recorded.operation, &recorded.path, &recorded.id),
        with_what(because),
        removal.of(because, recorded)
    )
}

/// The commands that remove what is in the place of a lock, without its ID or path.
pub(crate) struct Removal {
    /// Terraform's own, for a lock.
    pub(crate) unlock: String,
    /// `tf locks release`, for what is no lock: terraform's own cannot read it.
    pub(crate) release: String,
}

impl Removal {
    fn of(&self, because: Because, recorded: &RecordedLock) -> String {
        match because {
            Because::NoLock => format!("{} {}", self.release, argument(&recorded.path)),
            _ => format!("{} {}", self.unlock, recorded.id),
        }
    }
}

/// What a person needs for the command that is named next, where that is not what the run had.
fn with_what(because: Because) -> String {
    match because {
        Because::Denied(action) => format!("with credentials that may do {action}, and "),
        _ => String::new(),
    }
}

/// The words of the `tf locks` command that removes what is in the place of a lock and is none, without its path. Without the
/// option the command releases a lock that is beside it.
pub(crate) const RELEASE_NO_LOCK: &str = "release --no-lock";

/// Something that is no lock is in the place of one, and has refused terraform. `release` is the command that removes it,
/// without the path.
pub(crate) fn barred(place: &str, what: &str, release: &str, path: &str) -> String {
    format!(
        "what refuses every run is no lock: {what}, in {}\nonce you know that nobody needs it, type: {release} {}",
        visible(place),
        argument(path)
    )
}

/// A `tf locks` command for `directory`, where that is not the current one, and for `workspace`.
pub(crate) fn locks_command(words: &str, directory: Option<&str>, workspace: Option<&str>) -> String {
    let directory = directory.map_or_else(String::new, |directory| option("--chdir", directory));
    in_workspace(workspace, &format!("tf locks {words}{directory}"))
}

/// The command that removes a lock, without its ID.
pub(crate) fn unlock_command(program: &str, directory: Option<&str>) -> String {
    match directory {
        None => format!("{program} force-unlock"),
        Some(directory) => format!("{program} -chdir={} force-unlock", quoted(directory)),
    }
}

/// The same for a lock of an earlier run, to be typed anywhere: with its directory, and with its workspace where that need not
/// be the one that is selected now.
fn unlock_command_of(record: &JournalRecord) -> String {
    let command = unlock_command(&visible(&record.program), Some(&visible(&record.working_directory())));
    in_workspace(record.workspaces.first().map(String::as_str), &command)
}

/// `command` for a workspace that is chosen by the environment.
pub(crate) fn in_workspace(workspace: Option<&str>, command: &str) -> String {
    match workspace.filter(|name| !name.is_empty() && *name != "default") {
        Some(name) => format!("TF_WORKSPACE={} {command}", quoted(&visible(name))),
        None => command.to_owned(),
    }
}

/// Terraform waits for the lock of a run that died.
pub(crate) fn waiting_for_the_dead(tf: u32) -> String {
    format!("the lock that terraform waits for may be that of a dead run here (pid {tf}), which is being finished")
}

/// A run that was waited for goes on. `stops`: its `tf` lives, and has terraform stop.
pub(crate) fn still_ending(record: &JournalRecord, stops: bool) -> String {
    let next = if stops {
        "it is stopping, and gives its lock back when it has"
    } else {
        "its tf is dead, and something that it started still works; when that has ended, type: tf locks recover"
    };
    format!("a run here (pid {}) has not ended yet, and may hold a state lock\n{next}", record.tf)
}

/// A dead run that another process takes care of, and has not finished in the time in which it was waited for.
pub(crate) fn still_settling(record: &JournalRecord) -> String {
    format!(
        "a dead run here (pid {}) may hold a state lock, and another process has begun to release it and has not ended yet\n\
         in a while, type again: tf locks recover",
        record.tf
    )
}

/// A run of which nobody is known to be alive, and these processes may be.
pub(crate) fn may_be_alive(record: &JournalRecord, processes: &[Process]) -> String {
    format!(
        "an earlier run (pid {}) may hold a state lock, and was left alone: these may belong to it: {}\n\
         when they have ended, type: tf locks recover",
        record.tf,
        list(processes)
    )
}

/// A run of which nobody here can tell whether it is alive. What it may hold is named.
pub(crate) fn cannot_be_judged(record: &JournalRecord, why: &str) -> String {
    let mut text = format!(
        "an earlier run (pid {}) may hold a state lock, and whether it is alive cannot be seen from here: {why}",
        record.tf
    );
    for recorded in record.log.unreleased() {
        let _ = write!(
            text,
            "\n{}\nonce you know that it is dead, type in its directory: {} {}",
            lock(&recorded.operation, &recorded.path, &recorded.id),
            in_workspace(record.workspaces.first().map(String::as_str), "tf locks release --force"),
            recorded.id
        );
    }
    let _ = write!(text, "\nif that lock is gone, type: tf locks recover --forget {}", visible(&record.run));
    text
}

/// A dead run whose record cannot be worked with.
pub(crate) fn cannot_be_finished(record: &JournalRecord, why: &str) -> String {
    format!(
        "an earlier run (pid {}) may hold a state lock, and cannot be finished: {why}\n\
         once that is mended, type: tf locks recover",
        record.tf
    )
}

/// Why a lock was kept: there is no process list.
pub(crate) const UNSEEN: &str =
    "/proc does not list this system's processes here, so what terraform started may still be running";

/// The recovery takes its time.
pub(crate) fn recovering() -> String {
    "finishing what an earlier run left here; ^C twice leaves it".to_owned()
}

/// A lock of an earlier run is gone.
pub(crate) fn recovered(record: &JournalRecord, recorded: &RecordedLock, now: Timestamp) -> String {
    format!(
        "released the lock that an earlier run left, started {} ago by pid {}: {}",
        length_of_time(now.duration_since(record.started).unsigned_abs()),
        record.tf,
        lock(&recorded.operation, &recorded.path, &recorded.id)
    )
}

/// A lock of a dead run, which may stand.
pub(crate) fn would_recover(record: &JournalRecord, recorded: &RecordedLock) -> String {
    format!(
        "would give back, if it stands, the lock of a dead run (pid {}): {}",
        record.tf,
        lock(&recorded.operation, &recorded.path, &recorded.id)
    )
}

/// What would be done about a lock whose ID its run's log does not tell.
pub(crate) fn would_look_for(record: &JournalRecord, asked: Timestamp) -> String {
    format!(
        "would look for the lock that a dead run (pid {}) asked for at {asked}, and whose ID its log does not tell",
        record.tf
    )
}

/// A lock that an earlier run may have left.
pub(crate) fn may_be_its(record: &JournalRecord, info: &LockInfo, why: &str) -> String {
    let command = unlock_command_of(record);
    let id = if is_lock_id(&info.id) { format!("\nif it is, type: {command} {}", info.id) } else { String::new() };
    format!(
        "this lock may be an earlier run's (pid {}), and was not released ({why}):\n{}, Who {}{id}",
        record.tf,
        lock(&info.operation, &info.path, &info.id),
        visible(&info.who)
    )
}

/// A lock of an earlier run, whose ID its log does not tell, could not be looked for.
pub(crate) fn not_looked_for_again(record: &JournalRecord, why: &str) -> String {
    format!(
        "an earlier run (pid {}) may have left a state lock, which could not be looked for: {}\nit was reached with {}\nif it \
         is gone, type: tf locks recover --forget {}",
        record.tf,
        visible(why),
        visible(&record.surroundings.needs()),
        visible(&record.run)
    )
}

/// The outputs of a step could not be written.
pub(crate) fn no_outputs(path: &std::ffi::OsStr, error: &std::io::Error) -> String {
    format!("the outputs of this step are missing: {}: {error}", visible(&path.to_string_lossy()))
}

/// A dead run, as the beginning of a sentence about its lock.
pub(crate) fn earlier_run(record: &JournalRecord) -> String {
    format!("an earlier run (pid {}) was killed", record.tf)
}

/// A write may still be on its way to a backend that nobody here can look into.
pub(crate) fn waiting_blindly(time: Duration) -> String {
    format!("what terraform wrote last may still be on its way; its lock is kept for {} s", time.as_secs())
}

/// A lock in another backend than S3 was given back.
pub(crate) fn released_elsewhere(ending: &str, kind: &OtherBackend, info: &LockInfo) -> String {
    format!(
        "{ending} without giving its state lock back\nreleased the lock: {}, backend {}",
        lock(&info.operation, &info.path, &info.id),
        kind.kind
    )
}

/// A lock in another backend than S3 stands, or may.
pub(crate) fn left_elsewhere(
    ending: &str,
    kind: &OtherBackend,
    place: &str,
    why: &str,
    info: Option<&LockInfo>,
    unlock: &str,
) -> String {
    let what = match info {
        Some(info) => format!("{}, Who {}", lock(&info.operation, &info.path, &info.id), visible(&info.who)),
        None => format!("backend {}, {}", kind.kind, visible(place)),
    };
    let id = info.map_or("ID", |info| &info.id);
    format!(
        "{ending}, and may have left its state lock, which was not released ({}): {what}\nto see who holds it: {}\n\
         once nobody works there, type: {unlock} {}",
        visible(why),
        kind.look,
        visible(id)
    )
}

/// A lock of an earlier run could not be given back.
pub(crate) fn not_recovered(record: &JournalRecord, recorded: &RecordedLock, why: &str, because: Because) -> String {
    let workspace = record.workspaces.first().map(String::as_str);
    let release = locks_command(RELEASE_NO_LOCK, Some(&visible(&record.working_directory())), workspace);
    let removal = Removal { unlock: unlock_command_of(record), release };
    format!(
        "an earlier run (pid {}) may have left a state lock, which was not released: {}\n{}; it was reached with {}\n\
         {}once nobody works there, type: {}",
        record.tf,
        visible(why),
        lock(&recorded.operation, &recorded.path, &recorded.id),
        visible(&record.surroundings.needs()),
        with_what(because),
        removal.of(because, recorded)
    )
}

/// Why a lock that is not seen does not count as gone.
pub(crate) const ANOTHER_ACCOUNT: &str =
    "it cannot be seen with the current credentials, which are not known to belong to its account";

/// Another run locked the state while this one worked.
pub(crate) fn replaced(
    ending: &str,
    own: &RecordedLock,
    by: &LockInfo,
    program: &str,
    directory: Option<&str>,
) -> String {
    let directory = directory.map_or_else(String::new, |directory| format!(" -chdir={}", quoted(directory)));
    format!(
        "{ending}, and another run locked its state while it worked: both may have changed it\nits own lock was {}\n\
         the other lock is held by {} for {} since {}, ID {}\nwhen that run has ended, compare the state with what \
         exists: {program}{directory} plan",
        lock(&own.operation, &own.path, &own.id),
        visible(&by.who),
        visible(&by.operation),
        visible(&by.created),
        visible(&by.id)
    )
}

/// The same for an earlier run.
pub(crate) fn replaced_earlier(record: &JournalRecord, own: &RecordedLock, by: &LockInfo) -> String {
    let directory = record.working_directory();
    replaced(&earlier_run(record), own, by, &visible(&record.program), Some(&directory))
}

/// A lock cannot be seen, and may exist in another account. The journal has a record of it.
pub(crate) fn not_seen(ending: &str, recorded: &RecordedLock, needs: &str) -> String {
    format!(
        "{ending}; its state lock was not released: {ANOTHER_ACCOUNT}\n{}; it was taken with {}\n\
         with those, type: tf locks recover; if the lock is gone, type: tf locks recover --forget {}",
        lock(&recorded.operation, &recorded.path, &recorded.id),
        visible(needs),
        recorded.id
    )
}

/// Why a lock of an earlier run cannot be looked for.
pub(crate) fn missing(attributes: &str, directory: &str) -> String {
    format!("{attributes} of its backend are kept nowhere but in {directory}, which names another backend now")
}

/// A record that cannot be read, and that was left where it is.
pub(crate) fn broken(path: &std::path::Path) -> String {
    format!("a record of an earlier run cannot be read: {}", visible(&path.display().to_string()))
}

/// A record that is none.
pub(crate) fn set_aside(path: &std::path::Path) -> String {
    format!("a record of an earlier run cannot be read; it lies in {} now", visible(&path.display().to_string()))
}

/// What was missing, after an abnormal end.
pub(crate) fn unprotected(why: &str) -> String {
    format!("this run had no journal ({}): had tf been killed as well, its lock would have stayed", visible(why))
}

/// Why a lock was kept: another run says that it is its.
pub(crate) const CLAIMED: &str = "another run of tf on this host, which is alive, holds a lock with this ID";

/// A lock was asked for, was not seen, and may still come. `kept`: the next `tf` knows of it.
pub(crate) fn may_still_come(ending: &str, recorded: &RecordedLock, kept: bool, unlock: &str) -> String {
    let then = if kept {
        "should it come within 20 min, the next tf here gives it back".to_owned()
    } else {
        format!("should it come, type: {unlock} {}", recorded.id)
    };
    format!(
        "{ending} while it asked for a state lock, which did not come: {}\n{then}",
        lock(&recorded.operation, &recorded.path, &recorded.id)
    )
}

/// One part of a lock was released, and the other was never seen. `kept`: the next `tf` knows of it.
pub(crate) fn other_part_may_land(recorded: &RecordedLock, kept: bool, unlock: &str) -> String {
    let then = if kept {
        "if it does so within 20 min, the next tf here releases it".to_owned()
    } else {
        format!("if it does, type: {unlock} {}", recorded.id)
    };
    format!("the request for the other part of this lock may still land\n{then}")
}

/// A lock was asked for whose ID is not known, and was not seen. `kept`: the next `tf` knows of it.
pub(crate) fn unnamed_may_still_come(ending: &str, asked: Timestamp, kept: bool) -> String {
    let then = if kept {
        "if it does so within 20 min, the next tf here finds it, or type: tf locks recover"
    } else {
        "to look for it later, type: tf locks"
    };
    format!("{ending} while it asked for a state lock, at {asked:.0}; that request may still land\n{then}")
}

/// The place of a lock that was had is not there. `kept`: the next `tf` knows of it.
pub(crate) fn place_is_away(ending: &str, recorded: &RecordedLock, kept: bool) -> String {
    let then = if kept { "\nif that comes back within a day, type: tf locks recover" } else { "" };
    format!(
        "{ending}; its state lock is gone with its table or bucket, which is not there: {}{then}",
        lock(&recorded.operation, &recorded.path, &recorded.id)
    )
}

/// A lock came late, and was given back.
pub(crate) fn came_late(recorded: &RecordedLock) -> String {
    let how = if recorded.progress.held.is_some() { " left" } else { "'s request took late" };
    format!("released a lock that a dead terraform{how}: {}", lock(&recorded.operation, &recorded.path, &recorded.id))
}

/// The lock that refused this run is gone.
pub(crate) const TRY_AGAIN: &str = "it was what refused this run: run it again";

/// Who holds a lock, for what and since when, as far as the lock says so.
pub(crate) fn held(info: &LockInfo, now: Timestamp) -> String {
    let text =
        |name: &str, value: &str| if value.is_empty() { String::new() } else { format!("{name}{}", visible(value)) };
    let who = if info.who.is_empty() { "an unknown holder" } else { &visible(&info.who) };
    format!("{who}{}{}, ID {}", text(" for ", &info.operation), since(info, now), visible(&info.id))
}

/// Since when a lock is held, by this host's clock; nothing where it does not say.
fn since(info: &LockInfo, now: Timestamp) -> String {
    match info.created() {
        Some(created) if created > saturating_add(now, CLOCK_SLACK_WINDOW) => {
            format!(", since {created:.0}, which is {} ahead of this host's clock", apart(created, now))
        }
        // Little ahead is now.
        Some(created) => format!(", since {created:.0} ({})", apart(created.min(now), now)),
        None => String::new(),
    }
}

/// How much the clocks of two hosts may differ without anybody minding.
pub(crate) const CLOCK_SLACK_WINDOW: SignedDuration = SignedDuration::from_mins(1);

fn apart(one: Timestamp, other: Timestamp) -> String {
    length_of_time(other.duration_since(one).unsigned_abs())
}

/// Terraform was refused by a lock: whose it is, whether the holder lives, and what to type. `command` makes a `tf locks`
/// command for that place out of its words. `finishing`: its dead run is about to be finished, so there is nothing to type.
pub(crate) fn refused(
    info: &LockInfo,
    judgement: &Judgement,
    now: Timestamp,
    command: impl Fn(&str) -> String,
    finishing: bool,
) -> String {
    let said = format!(
        "the lock is held by {}\nits holder is {}: {}",
        held(info, now),
        judgement.verdict.words(),
        judgement.reason
    );
    let id = argument(&info.id);
    let next = match judgement.verdict {
        _ if finishing => return said,
        Verdict::Alive => "wait for it, or let terraform wait: -lock-timeout=10m".to_owned(),
        Verdict::Dead => format!("to give it back, type: {} {id}", command("release")),
        Verdict::LikelyDead => format!("if you know that nobody works there, type: {} {id}", command("release")),
        Verdict::Unknown => format!("for everything that is known of it, type: {} {id}", command("show")),
    };
    format!("{said}\n{next}")
}

/// A lock whose log was lost may be this run's.
pub(crate) fn suspected(ending: &str, info: &LockInfo, doubt: Option<&str>, unlock: &str) -> String {
    let id = visible(&info.id);
    let command = if is_lock_id(&info.id) { format!("\nif it is, type: {unlock} {id}") } else { String::new() };
    format!(
        "{ending}, and its log does not tell whether it held a state lock; this one may be it, and was not released{}:\n{}, Who {}{command}",
        doubt.map_or_else(String::new, |doubt| format!(" ({doubt})")),
        lock(&info.operation, &info.path, &info.id),
        visible(&info.who)
    )
}

/// Nothing is known of a lock of this run, and the lock service could not be asked.
pub(crate) fn suspect_not_looked_for(ending: &str, reason: &str) -> String {
    format!(
        "{ending}, and its log does not tell whether it held a state lock; it could not be looked for: {}\n\
         to see whether one is held, type: tf locks",
        visible(reason)
    )
}

/// Terraform died, and its log is empty: it could not open it, or it died before it wrote. `suspect` is a lock that it may
/// have held.
pub(crate) fn unlogged(ending: &str, suspect: Option<&LockInfo>, directory: Option<&str>) -> String {
    let directory = directory.map_or_else(String::new, |directory| option("--chdir", directory));
    let log = "it wrote no log that tf can read; does it run as another user?";
    let Some(info) = suspect else {
        return format!(
            "{ending}; its state lock, if it held one, was not released: {log}\nto see what is locked, type: tf \
             locks{directory}"
        );
    };
    let id = if is_lock_id(&info.id) { format!(" {}", info.id) } else { String::new() };
    format!(
        "{ending}; a state lock that may be its own was not released: {log}\n{}, held by {}\nto see whether its holder \
         is alive, type: tf locks show{id}{directory}",
        lock(&info.operation, &info.path, &info.id),
        visible(&info.who)
    )
}

/// Terraform held a lock whose ID is not known, and the lock service could not be asked.
pub(crate) fn not_looked_for(ending: &str, reason: &str) -> String {
    format!(
        "{ending}, and held a state lock whose ID its log does not tell; it could not be looked for: {reason}\nthe next tf \
         in this directory tries again, or type: tf locks recover"
    )
}

/// Why a lock was kept whose holder's tree did not die.
pub(crate) fn still_alive(processes: &[Process]) -> String {
    format!("what terraform started is still alive: {}", list(processes))
}

/// Why a lock was kept whose tree is not to be seen, but not gone either.
pub(crate) const LIFELINE_HELD: &str =
    "somebody who cannot be seen from here still holds a file that only terraform's children inherited";

/// Why a lock was kept while a terraform of the run goes on.
pub(crate) fn another_terraform(process: &Process) -> String {
    format!("a terraform that this run started still works: {}", list(std::slice::from_ref(process)))
}

/// Why a lock was kept that fits no backend.
pub(crate) const NO_PLACE: &str = "no backend of this directory has it, so tf does not know where it stands";

/// Why a lock was kept: nobody has answered.
pub(crate) const SILENT: &str = "the lock service did not answer in time";

/// Why a lock was kept: it was not to be released.
pub(crate) const NEVER: &str = "TFW_RELEASE is never";

/// Why a lock was kept: what the lock service is asked with could not be set up.
pub(crate) const NO_RESOURCES: &str =
    "no thread or no file descriptor is left on this system to ask the lock service with";

/// Why a lock was kept: somebody ended the waiting.
pub(crate) const INTERRUPTED: &str = "^C ended the waiting for the lock service";

/// After an interrupt, what terraform's provisioners left running.
pub(crate) fn survivors(processes: &[Process]) -> String {
    format!("terraform ended after the interrupt, and these that it started run on: {}", list(processes))
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

/// Another ^C while terraform stops.
pub(crate) fn stopping(since: Duration, offer: Duration, holds_lock: bool) -> String {
    let releases = if holds_lock { " and will release its lock" } else { "" };
    format!(
        "terraform is stopping{releases}, for {} now; another ^C within {} s forces it",
        length_of_time(since),
        offer.as_secs()
    )
}

/// The third ^C.
pub(crate) fn forcing() -> String {
    "terraform gets its second interrupt, and is killed if it does not end in 6 s".to_owned()
}

/// A ^C while a lock is being given back.
pub(crate) fn still_releasing() -> String {
    "giving the state lock back; another ^C leaves it".to_owned()
}

/// No terraform to run, or a setting that cannot be read.
pub(crate) fn cannot_start(reason: &dyn std::fmt::Display) -> String {
    format!("{reason}")
}

/// Terraform was found and could not be run.
pub(crate) fn cannot_run(path: &std::path::Path, error: &std::io::Error) -> String {
    format!("cannot run {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ending_names_its_signal() {
        let ending = |ended, out_of_memory| {
            ending(&EndOfRun { ended: Some(ended), killed: None, forced: false, interrupted: false, out_of_memory })
        };
        assert_eq!(ending(Ended::Killed(Signal::SIGKILL), false), "terraform was killed by SIGKILL");
        assert_eq!(ending(Ended::Killed(Signal::SIGKILL), true), "terraform was killed by SIGKILL, out of memory");
        assert_eq!(ending(Ended::Killed(Signal::SIGHUP), true), "terraform was killed by SIGHUP");
        assert_eq!(ending(Ended::Exited(1), false), "terraform ended with exit code 1");
    }
}
