//! Messages about a lock that another run holds: the lock refuses terraform, or terraform waits for it.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::next_step::IF_UNUSED;
use crate::console::{argument, length_of_time, option, visible, visible_whole};
use crate::holder::evidence::Judgement;
use crate::holder::lease_text;
use crate::holder::next_step::{self, NextStep, ReportKind};
use crate::lease::observed::ObservedLease;
use crate::terraform::lock_info::LockInfo;
use crate::time::saturating_add;

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
