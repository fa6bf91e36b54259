//! Starts another `tf` process that says who holds the lock for which terraform waits, and contains the work of that
//! process.
//!
//! It reads the lock less often than terraform requests it, and only while terraform waits: a run that does not wait
//! sends no request.

use std::path::PathBuf;
use std::pin::pin;
use std::process::Child;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::messages::refused::Refusal;
use crate::cleanup::ordered_process::{OrderedProcess, Orders};
use crate::cleanup::{messages, working_directory};
use crate::holder::host::HostView;
use crate::lock::leased::locks_of;
use crate::lock::location::LockLocation;
use crate::lock::release::stored::{self, Unread};
use crate::sys::session;
use crate::terraform::log::RecordedLock;
use crate::trace::trace;
use crate::{console, panics, runtime};

/// The word after `tf locks` that makes this program explain a wait. It is internal, so clap does not know it.
pub(crate) const WORD: &str = "explain-wait";

/// How long a process that was told to end may go on. It breaks off its requests. One that is stopped (SIGSTOP) ends
/// never.
pub(crate) const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How long terraform has waited for a lock before the process is started.
pub(crate) const EXPLANATION_DELAY: Duration = Duration::from_secs(3);

/// The time after which a holder that has not changed is reported again.
const REPEAT_INTERVAL: Duration = Duration::from_mins(5);

/// The longest time between two reads of the lock. Terraform's pauses between its requests are 1, 2, 4, 8 and then 16 s
/// (internal/states/statemgr/locker.go, `LockWithContext`).
const MAX_LOOK_INTERVAL: Duration = Duration::from_secs(20);

/// The exit code of a process that cannot read the lock.
const CANNOT_READ: u8 = 1;

/// What the process needs to know.
#[derive(Serialize, Deserialize)]
struct Wait {
    /// As [`LockLocation::to_json`].
    location: Value,
    /// The ID of the lock that terraform requests.
    asked: String,
    /// Terraform's working directory. Relative paths in the settings are relative to it.
    directory: PathBuf,
}

/// The process that explains a wait, as seen by the process that has started it.
#[derive(Debug)]
pub(crate) struct WaitExplanation {
    process: OrderedProcess,
}

/// How the process has ended, as its exit code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Terraform does not wait: it has its lock.
    Over,
    /// The lock cannot be read, for example because there are no credentials.
    CannotRead,
}

impl WaitExplanation {
    /// Starts the process, for the lock `asked`, which terraform requests at `location`.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub(crate) fn start(
        location: &LockLocation,
        here: &CandidateBackends,
        asked: &RecordedLock,
    ) -> std::io::Result<Self> {
        let directory = here.working_directory.clone();
        let wait = Wait { location: location.to_json(), asked: asked.id.clone(), directory };
        Ok(Self { process: OrderedProcess::start(WORD, &wait)? })
    }

    /// Returns the process ID.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Returns how the process has ended. `None` if it is still running.
    pub(crate) fn ended(&mut self) -> Option<Ended> {
        let status = self.process.ended()?;
        Some(if status.success() { Ended::Over } else { Ended::CannotRead })
    }

    /// Tells the process to end, and returns its child process for the wait.
    pub(crate) fn into_child(self) -> Child {
        self.process.into_child()
    }
}

/// Explains a wait until stdin ends, and returns the exit code.
pub(crate) fn run() -> u8 {
    session::become_helper(c"tf-waiting");
    let Some((wait, orders)) = Orders::read::<Wait>() else { return CANNOT_READ };
    let Some(location) = LockLocation::of_json(&wait.location) else { return CANNOT_READ };
    working_directory::go(&wait.directory);
    let Some(told) = orders.end(|_| ()) else { return CANNOT_READ };
    let end = panics::caught(|| {
        runtime::block_on(async {
            let mut told = pin!(told);
            tokio::select! {
                () = &mut told => Ended::Over,
                ended = explain(&location, &wait.asked) => ended,
            }
        })
    });
    let end = end.and_then(Result::ok);
    trace!("explanation of the wait: {end:?}");
    if end == Some(Ended::Over) { 0 } else { CANNOT_READ }
}

/// Reads the lock again and again, and prints a line whenever one is due.
async fn explain(location: &LockLocation, asked: &str) -> Ended {
    let begun = Instant::now();
    let mut said: Option<Said> = None;
    loop {
        let parts = match stored::read_stored(location).await {
            Ok(parts) => parts,
            Err(Unread::Unreachable(unreachable)) => {
                trace!("explanation of the wait: {unreachable}");
                return Ended::CannotRead;
            }
            Err(Unread::Failed(failure)) => {
                trace!("explanation of the wait: {failure}");
                if failure.is_final() {
                    return Ended::CannotRead;
                }
                Vec::new()
            }
        };
        let locks = locks_of(&parts);
        let is_own = !locks.is_empty() && locks.iter().all(|(info, _)| info.id == asked);
        let other = locks.iter().find(|(info, _)| info.id != asked);
        let waited = EXPLANATION_DELAY + begun.elapsed();
        let seen = match other {
            Some((info, _)) => Seen::Other(&info.id),
            None if is_own => Seen::Own,
            None => Seen::Nothing,
        };
        match (next_step(seen, said.as_ref(), waited), other) {
            (Step::End, _) => return Ended::Over,
            (Step::Say(occasion), Some((info, lease))) => {
                // The run of this process's parent waits for the lock, so it does not hold it.
                let host = HostView::look().without_run_of(nix::unistd::getppid());
                let judgement = host.judge(info, lease.as_ref());
                let (lease, judgement) = (lease.as_ref(), &judgement);
                let refusal = Refusal { info, lease, judgement, is_released_after: None };
                console::say(&messages::refused::waits(occasion, &refusal, Timestamp::now()));
                said = Some(Said { id: info.id.clone(), waited });
            }
            _ => {}
        }
        tokio::time::sleep(look_interval(waited)).await;
    }
}

/// What a read of the lock's location has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen<'a> {
    /// The lock that terraform requests, and no other: terraform has acquired it.
    Own,
    /// A lock with this ID, which is not the one that terraform requests.
    Other(&'a str),
    /// No lock, or the read has failed.
    Nothing,
}

/// The last line that was printed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    /// The ID of the lock.
    id: String,
    /// How long terraform had waited by then.
    waited: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Say(messages::refused::Occasion),
    End,
}

/// Returns what to do after a read of the lock. `said` is the last line, or `None` if there was none. `waited` is how
/// long terraform has waited.
fn next_step(seen: Seen<'_>, said: Option<&Said>, waited: Duration) -> Step {
    match (seen, said) {
        (Seen::Own, _) => Step::End,
        (Seen::Other(_), None) => Step::Say(messages::refused::Occasion::First),
        (Seen::Other(id), Some(said)) if said.id != id => Step::Say(messages::refused::Occasion::Changed),
        (Seen::Other(_), Some(said)) if waited.saturating_sub(said.waited) >= REPEAT_INTERVAL => {
            Step::Say(messages::refused::Occasion::Again)
        }
        (Seen::Other(_), Some(_)) | (Seen::Nothing, _) => Step::Nothing,
    }
}

/// Returns the time until the next read: as long as terraform has waited already, and at most [`MAX_LOOK_INTERVAL`].
fn look_interval(waited: Duration) -> Duration {
    waited.min(MAX_LOOK_INTERVAL)
}

#[cfg(test)]
mod tests {
    use messages::refused::Occasion;

    use super::*;

    #[test]
    fn a_line_is_due_for_each_holder_and_every_five_minutes() {
        let seconds = Duration::from_secs;
        let said = |id: &str, waited| Some(Said { id: id.into(), waited: seconds(waited) });
        for seen in [Seen::Own, Seen::Nothing, Seen::Other("a"), Seen::Other("b")] {
            for last in [None, said("a", 3), said("a", 303), said("b", 3)] {
                for waited in [3, 4, 302, 303, 304, 3000] {
                    let is_same = |last: &Said| seen == Seen::Other(&last.id);
                    let expected = match (seen, &last) {
                        (Seen::Own, _) => Step::End,
                        (Seen::Nothing, _) => Step::Nothing,
                        (_, None) => Step::Say(Occasion::First),
                        (_, Some(last)) if !is_same(last) => Step::Say(Occasion::Changed),
                        (_, Some(last)) if waited >= last.waited.as_secs() + 300 => Step::Say(Occasion::Again),
                        _ => Step::Nothing,
                    };
                    assert_eq!(next_step(seen, last.as_ref(), seconds(waited)), expected, "{seen:?} {last:?} {waited}");
                }
            }
        }
    }

    #[test]
    fn the_lock_is_read_less_often_than_terraform_requests_it() {
        let requests: Vec<_> =
            [0, 1, 3, 7, 15].into_iter().chain((31..4000).step_by(16)).map(Duration::from_secs).collect();
        let (mut waited, mut reads) = (EXPLANATION_DELAY, 0);
        while waited < Duration::from_hours(1) {
            reads += 1;
            let requested = requests.iter().filter(|request| **request <= waited).count();
            assert!(reads < requested, "{reads} reads and {requested} requests in {waited:?}");
            waited += look_interval(waited);
        }
        assert_eq!(look_interval(Duration::from_hours(9)), MAX_LOOK_INTERVAL);
    }
}
