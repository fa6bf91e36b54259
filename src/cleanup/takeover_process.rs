//! Starts another `tf` process that takes over the lock of a host that is gone, and contains the work of that process.
//!
//! It ends when its stdin ends, but not between the claim of a lock and its delete.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, ExitStatus};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::ordered_process::{self, OrderedProcess};
use crate::cleanup::{messages, working_directory};
use crate::holder::ci_job::CiJob;
use crate::holder::host::HostView;
use crate::journal::history::{self, By, LockEvent, What};
use crate::lease::terms::Terms;
use crate::lock::location::LockLocation;
use crate::lock::takeover::{self, End, NotTaken, Progress, RefusedLock, Taker, Until};
use crate::sys::signals::Signals;
use crate::sys::{poll, session};
use crate::terraform::data_directory::{CommandDirectories, DataDirectory};
use crate::terraform::lock_info::{LockInfo, who};
use crate::trace::trace;
use crate::{console, crash_point, panics, runtime};

/// The word after `tf locks` that makes this program a taker. It is internal, so clap does not know it.
pub(crate) const WORD: &str = "take-over";

/// The exit code of a taker that had no credentials.
const NO_CREDENTIALS: u8 = 1;

/// The exit code of a taker whose requests failed.
const FAILED: u8 = 2;

/// The exit codes of a taker that could not take a lock ([`End::NotTaken`]): if the same attempt would fail again, and
/// if it may succeed. The taker writes the ID of the lock to its stdout.
const NOT_TAKEN_FINALLY: u8 = 3;
const NOT_TAKEN: u8 = 4;

/// How long a taker may go on that was told to end. It finishes the delete of a lock that it has claimed, and a look at
/// the result. A taker that is stopped (SIGSTOP) never ends.
pub(crate) const END_TIMEOUT: Duration = Duration::from_mins(1);

/// The signal of which `tf` dies if its parent has exited before terraform was started, and if that exit is a request
/// to end. It is the one that terraform would get.
pub(crate) const PARENT_GONE: Signal = Signal::SIGINT;

/// The longest ID of a lock that a taker writes to its stdout.
const MAX_ID_BYTES: usize = 256;

/// What a taker needs to know.
#[derive(Serialize, Deserialize)]
struct Orders {
    /// As [`LockLocation::to_json`].
    location: Value,
    /// The length of the lease of this host's own runs.
    length: Duration,
    /// Whether terraform waits for a lock, so that the taker watches until its stdin ends.
    is_awaited: bool,
    /// The lock that an earlier taker could not take. `None` if there is none.
    refused: Option<Refused>,
    /// Terraform's working directory. Relative paths in the settings are relative to it.
    directory: PathBuf,
}

/// A lock that an earlier taker of a run could not take, and has reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refused {
    /// The ID of the lock. `None` if it is the lock that the first read of the next taker shows.
    pub(crate) id: Option<String>,
    /// After which time it may be tried again.
    pub(crate) left: Duration,
    /// As [`NotTaken::is_final`].
    pub(crate) is_final: bool,
}

/// A taker, as seen by the process that has started it.
#[derive(Debug)]
pub(crate) struct TakeoverProcess {
    process: OrderedProcess,
    /// Whether the process was told that terraform is between two attempts to get the lock.
    rests: bool,
}

/// The messages to a taker, after its orders: whether terraform is between two attempts to get the lock. Each has 1
/// byte.
const RESTS: u8 = b'r';
const TRIES: u8 = b't';

/// How a taker has ended, as its exit code says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Over,
    NoCredentials,
    Failed,
    /// As [`End::NotTaken`]. The ID is `None` if it is not known.
    NotTaken {
        id: Option<String>,
        is_final: bool,
    },
}

/// The result of [`before_run`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Before {
    /// The signal that asked `tf` to stop meanwhile. `None` if there was none.
    pub(crate) asked: Option<Signal>,
    /// How the taker has ended. `None` if there was none, or if its status cannot be read.
    pub(crate) ended: Option<Ended>,
}

impl TakeoverProcess {
    /// Starts a taker for the lock at `location`. `is_awaited` is true if terraform waits for a lock. The taker then
    /// watches until it is told to end. `refused` is the lock that an earlier taker could not take.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub(crate) fn start(
        location: &LockLocation,
        here: &CandidateBackends,
        terms: Terms,
        is_awaited: bool,
        refused: Option<Refused>,
    ) -> std::io::Result<Self> {
        let orders = Orders {
            location: location.to_json(),
            length: terms.length(),
            is_awaited,
            refused,
            directory: here.working_directory.clone(),
        };
        Ok(Self { process: OrderedProcess::start(WORD, &orders)?, rests: false })
    }

    /// Returns the process ID.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Tells the process whether terraform is between two attempts to get the lock. The process deletes the lock only
    /// then.
    pub(crate) fn tell_whether_terraform_rests(&mut self, rests: bool) {
        if self.rests != rests && self.process.send(if rests { RESTS } else { TRIES }) {
            self.rests = rests;
        }
    }

    /// Returns how the process has ended. `None` if it is still running.
    pub(crate) fn ended(&mut self) -> Option<Ended> {
        let status = self.process.ended()?;
        Some(how(status, || self.process.stdout().and_then(read_id)))
    }

    /// Tells the process to end, and returns its child process for the wait.
    pub(crate) fn into_child(self) -> Child {
        self.process.into_child()
    }

    /// Waits until the process has ended. A signal that asks `tf` to end, or the exit of the `parent`, tells the
    /// process to end, and is returned. A second request kills the process, and so does the end of [`END_TIMEOUT`]. If
    /// it had claimed the lock, the claim lapses.
    fn wait(mut self, signals: &mut Signals, parent: Option<BorrowedFd<'_>>) -> Before {
        let mut asked = None;
        let mut kill_at: Option<Instant> = None;
        let Some(mut stdout) = self.process.take_stdout() else { return Before::default() };
        loop {
            let mut awaited = vec![(stdout.as_fd(), PollFlags::POLLIN), (signals.as_fd(), PollFlags::POLLIN)];
            awaited.extend(parent.filter(|_| asked.is_none()).map(|parent| (parent, PollFlags::POLLIN)));
            let left = kill_at.map(|at| at.saturating_duration_since(Instant::now()));
            let ready = poll::wait(&awaited, left);
            let mut requests: Vec<Signal> = std::iter::from_fn(|| signals.next_stop_after_suspending()).collect();
            if ready.get(2) == Some(&true) {
                requests.push(PARENT_GONE);
            }
            for signal in requests {
                self.process.tell_to_end();
                if asked.is_some() {
                    self.process.kill();
                } else {
                    kill_at = Some(Instant::now() + END_TIMEOUT);
                }
                asked.get_or_insert(signal);
            }
            if kill_at.is_some_and(|at| at <= Instant::now()) {
                self.process.kill();
                // Its end may take a moment, or for ever if it hangs in the kernel.
                kill_at = None;
            }
            if ready.first() == Some(&true) {
                let ended = self.process.wait().map(|status| how(status, || read_id(&mut stdout)));
                return Before { asked, ended };
            }
        }
    }
}

/// Returns how a taker with this status has ended. `refused` returns the ID that the taker has written to its stdout.
fn how(status: ExitStatus, refused: impl FnOnce() -> Option<String>) -> Ended {
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(0) => Ended::Over,
        Some(NO_CREDENTIALS) => Ended::NoCredentials,
        Some(NOT_TAKEN_FINALLY) => Ended::NotTaken { id: refused(), is_final: true },
        Some(NOT_TAKEN) => Ended::NotTaken { id: refused(), is_final: false },
        _ => Ended::Failed,
    }
}

/// Reads the ID of a lock that a process which has ended has written to its stdout. `None` if there is none.
fn read_id(stdout: &mut ChildStdout) -> Option<String> {
    let mut bytes = [0; MAX_ID_BYTES];
    let length = poll::ready_now(stdout.as_fd(), PollFlags::POLLIN).then(|| stdout.read(&mut bytes).ok())??;
    let id = str::from_utf8(&bytes[..length]).ok()?;
    (!id.is_empty()).then(|| id.to_owned())
}

/// Takes over the selected lock of `here` before terraform starts, if its lease has lapsed. Waits for that. `parent` is
/// readable when the parent of `tf` has exited, which is a request to end. This process must have only one thread.
pub(crate) fn before_run(
    here: &CandidateBackends,
    terms: Terms,
    signals: &mut Signals,
    parent: Option<BorrowedFd<'_>>,
) -> Before {
    let Some(location) = here.selected() else { return Before::default() };
    match TakeoverProcess::start(&location, here, terms, false, None) {
        Ok(process) => process.wait(signals, parent),
        Err(error) => {
            trace!("no process for the takeover: {error}");
            Before::default()
        }
    }
}

/// Does the work of a taker, and returns its exit code.
pub(crate) fn run() -> u8 {
    session::become_helper(c"tf-takeover");
    let Some((orders, stdin)) = ordered_process::Orders::read() else { return FAILED };
    let Orders { location, length, is_awaited, refused, directory } = orders;
    let (Some(location), Some(terms)) = (LockLocation::of_json(&location), Terms::new(length)) else { return FAILED };
    let chdir = chdir(std::env::current_dir().ok().as_deref(), &directory);
    working_directory::go(&directory);
    crash_point::reached("takeover: begun");
    let until = if is_awaited { Until::Told } else { Until::Decided };
    let (tell_rest, rests) = tokio::sync::watch::channel(false);
    let refused = refused.map(|Refused { id, left, is_final }| RefusedLock::new(id, left, is_final));
    let taker = Taker { by: by(), terms, until, rests, runs_here: stays, refused };
    let hear = move |byte| {
        // Nobody listens any more when the work is over.
        let _ = tell_rest.send(byte == RESTS);
    };
    let Some(told) = stdin.end(hear) else { return FAILED };
    let note = |progress: Progress<'_>| note(progress, chdir.as_deref());
    let end = panics::caught(|| runtime::block_on(takeover::take_over(&location, &taker, told, note)));
    let end = end.and_then(Result::ok);
    trace!("takeover: {end:?}");
    crash_point::reached("takeover: over");
    match end {
        Some(End::Over) => 0,
        Some(End::NoCredentials) => NO_CREDENTIALS,
        Some(End::NotTaken(NotTaken { id, is_final })) => {
            if id.len() <= MAX_ID_BYTES {
                // If nobody reads it, it is not needed.
                let _ = std::io::stdout().write_all(id.as_bytes());
            }
            if is_final { NOT_TAKEN_FINALLY } else { NOT_TAKEN }
        }
        Some(End::Failed) | None => FAILED,
    }
}

/// Whether a process of the run that holds `lock` is or may be running on this host, a process of this host is
/// finishing the run, or this host keeps the lock on purpose. A process that only looks at the journal has the lock of
/// a dead run for a moment, as one that finishes the run has. So this looks twice.
fn stays(lock: &LockInfo) -> bool {
    const TIME_OF_A_LOOK: Duration = Duration::from_millis(100);
    let looks = || HostView::look().stays(lock);
    looks() && {
        poll::wait(&[], Some(TIME_OF_A_LOOK));
        looks()
    }
}

/// Returns how a claim names this process: the URL of the CI job, or `user@host`.
pub(crate) fn by() -> String {
    let job = CiJob::of(&|name| std::env::var_os(name)).map(|job| job.job).unwrap_or_default();
    if job.contains("://") { job } else { who() }
}

/// Returns the value of `--chdir` for a command that a person types in `current`, if terraform works in `directory`.
/// `None` if none is needed.
fn chdir(current: Option<&Path>, directory: &Path) -> Option<String> {
    let shown = match current {
        Some(current) if current == directory => return None,
        Some(current) => directory.strip_prefix(current).unwrap_or(directory),
        None => directory,
    };
    Some(shown.to_string_lossy().into_owned()).filter(|shown| !shown.is_empty())
}

/// Reports what a taker has seen or done, and writes the history. `chdir` is as [`chdir`].
fn note(progress: Progress<'_>, chdir: Option<&str>) {
    trace!("takeover: {progress:?}");
    if let Progress::Took(lapsed) | Progress::MayHaveTaken(lapsed) = progress {
        let mut why = messages::lease::lapsed_lease(lapsed);
        if matches!(progress, Progress::MayHaveTaken(_)) {
            why = format!("{why}; {}", messages::lease::DELETE_UNANSWERED);
        }
        history::record(&LockEvent::of_lock(What::TakenOver, By::Recovery, &lapsed.info, &lapsed.path, &why, None));
    }
    crash_point::reached("takeover: before the message");
    let workspace = std::env::var("TF_WORKSPACE").ok();
    let data = DataDirectory::named_here();
    let directories = CommandDirectories { chdir, data: data.as_deref(), workspace: workspace.as_deref() };
    console::say(&messages::lease::takeover(progress, |words| directories.locks(words)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_names_the_directory_in_which_terraform_works_if_it_is_another_one() {
        for (current, directory, expected) in [
            (Some("/a"), "/a", None),
            (Some("/a"), "/a/", None),
            (Some("/a"), "/a/b/c", Some("b/c")),
            (Some("/a/b"), "/a", Some("/a")),
            (None, "/a", Some("/a")),
        ] {
            let found = chdir(current.map(Path::new), Path::new(directory));
            assert_eq!(found.as_deref(), expected, "{current:?} {directory}");
        }
    }
}
