//! Does the work of a recovery in a forked process, and reports its messages.

use std::ffi::CStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill, raise};
use nix::unistd::Pid;

use crate::cleanup::messages;
use crate::sys::signals::Signals;
use crate::sys::terminal::Terminal;
use crate::sys::{detached, poll, wait};
use crate::{console, trace};

/// The name of the process that finishes a run.
pub(super) const RECOVERY: &CStr = c"tf-recovery";

/// How long a recovery may take before a message reports it.
const QUIET_GRACE: Duration = Duration::from_secs(1);

/// How often to check whether the process was stopped, if it may prompt at the terminal.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The result of a recovery.
#[derive(Debug, Default)]
pub(super) struct Finished {
    pub(super) messages: Vec<String>,
    pub(super) left: Left,
}

/// Whether a recovery has left a lock that it did not release. If so, one of its messages reports that lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Left {
    #[default]
    Nothing,
    Lock,
    /// A lock was not released because no credentials were available.
    ForLackOfCredentials,
}

/// The forked process sends this after all messages. Without it, the process was killed, or has panicked.
const DONE: &str = "\u{3}";

/// The first byte of a message about what the forked process is doing. The other messages are its results.
const PROGRESS: &str = "\u{4}";

/// The forked process sends this in place of a message if a lock was not released.
const LEFT: &str = "\u{1}";

/// The forked process sends this in place of a message if a lock was not released because no credentials were
/// available.
const LEFT_FOR_LACK_OF_CREDENTIALS: &str = "\u{2}";

/// Settings of a process that does the work of a recovery.
pub(super) struct RecoveryProcess {
    /// The descriptors that it keeps open.
    pub(super) keep: Vec<RawFd>,
    /// Whether to report a recovery that takes longer than [`QUIET_GRACE`]. If false, the process also must not prompt
    /// for credentials at the terminal.
    pub(super) announced: bool,
}

/// Does `work` in a forked process, and reports the resulting messages with `say`. What that process says meanwhile,
/// for example that it waits for a write, is written to stderr. Returns when that process has
/// exited, or was killed at a person's request. Stores the first signal that asks `tf` to stop in `asked`. Returns
/// whether a lock was not released. If that process cannot be forked, or does not complete its work, a lock may be
/// left, so the result is at least [`Left::Lock`].
pub(super) fn in_a_process(
    RecoveryProcess { mut keep, announced }: RecoveryProcess,
    work: impl FnOnce() -> Finished,
    say: impl Fn(&str),
    signals: &mut Signals,
    asked: &mut Option<Signal>,
) -> Left {
    let mut left = Left::Nothing;
    let not_started = |error: &io::Error| {
        say(&messages::recovery::no_recovery_process(error));
        Left::Lock
    };
    let (mut lines, writer) = match UnixStream::pair() {
        Ok(pair) => pair,
        Err(error) => return not_started(&error),
    };
    keep.push(writer.as_raw_fd());
    keep.extend(trace::descriptor());
    let current = std::env::current_dir();
    // The program that supplies the credentials may have to prompt a person at the terminal.
    let asks = announced && Terminal::is_our_turn();
    let parent = if asks { detached::Parent::UsAtOurTerminal } else { detached::Parent::Us };
    let forked = detached::run(RECOVERY, parent, &keep, || {
        if let Ok(current) = current {
            let _ = std::env::set_current_dir(current);
        }
        if let Ok(writer) = writer.try_clone() {
            console::divert(move |text| drop(send(&writer, &format!("{PROGRESS}{text}"))));
        }
        let finished = work();
        let left = match finished.left {
            Left::Nothing => None,
            Left::Lock => Some(LEFT.to_owned()),
            Left::ForLackOfCredentials => Some(LEFT_FOR_LACK_OF_CREDENTIALS.to_owned()),
        };
        for message in finished.messages.into_iter().chain(left).chain([DONE.to_owned()]) {
            let _ = send(&writer, &message);
        }
    });
    drop(writer);
    let pid = match forked {
        Ok(Some(pid)) => pid,
        Ok(None) => return left,
        Err(error) => return not_started(&error),
    };
    let mut is_done = false;
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    let mut told = !announced;
    let quiet_until = Instant::now() + QUIET_GRACE;
    loop {
        if asks && wait::stopped(pid).is_some() {
            // A ^Z has stopped the process that prompts. This process stops too, so that the shell reports the job as
            // stopped and can continue both.
            let _ = raise(Signal::SIGSTOP);
            let _ = kill(pid, Signal::SIGCONT);
        }
        let remaining = (!told).then(|| quiet_until.saturating_duration_since(Instant::now()));
        let timeout = if asks { Some(remaining.unwrap_or(POLL_INTERVAL).min(POLL_INTERVAL)) } else { remaining };
        let awaited = [(lines.as_fd(), PollFlags::POLLIN), (signals.as_fd(), PollFlags::POLLIN)];
        let ready = poll::wait(&awaited, timeout);
        if ready == [false, false] && !told && Instant::now() >= quiet_until {
            told = true;
            console::say(&messages::recovery::recovering());
        }
        if ready[1] {
            hear(signals, asked, pid, asks);
        }
        if ready[0] {
            match lines.read(&mut buffer) {
                Ok(length @ 1..) => received.extend(&buffer[..length]),
                _ => break,
            }
            while let Some(end) = received.iter().position(|&byte| byte == 0) {
                let message: Vec<u8> = received.drain(..=end).collect();
                match String::from_utf8_lossy(&message[..end]).as_ref() {
                    DONE => is_done = true,
                    LEFT => left = Left::Lock,
                    LEFT_FOR_LACK_OF_CREDENTIALS => left = Left::ForLackOfCredentials,
                    message => message.strip_prefix(PROGRESS).map_or_else(|| say(message), console::say),
                }
            }
        }
    }
    let _ = nix::sys::wait::waitpid(pid, None);
    if is_done { left } else { left.max(Left::Lock) }
}

/// Sends one message to the parent process.
fn send(mut writer: &UnixStream, message: &str) -> io::Result<()> {
    writer.write_all(format!("{message}\0").as_bytes())
}

/// Handles requests to stop. The first request is answered with a message, and its signal is stored in `asked`. After
/// that, a ^C kills the recovery. Nothing is lost: the run stays in the journal. A ^Z stops this process. If the
/// recovery `shares_terminal`, the ^Z stops the recovery too, and the caller notices that.
fn hear(signals: &mut Signals, asked: &mut Option<Signal>, recovery: Pid, shares_terminal: bool) {
    let next = if shares_terminal { Signals::next_stop } else { Signals::next_stop_after_suspending };
    while let Some(signal) = next(signals) {
        match reaction(*asked, signal) {
            Reaction::Explain => console::say(&messages::run::still_releasing()),
            Reaction::Kill => drop(kill(recovery, Signal::SIGKILL)),
            Reaction::None => {}
        }
        asked.get_or_insert(signal);
    }
}

/// What is done about a request to stop during a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reaction {
    /// Report that the recovery continues, and how to end it.
    Explain,
    /// Kill the recovery.
    Kill,
    None,
}

/// Returns what is done about the request to stop `signal`. `before` is the first request, or `None` if there was none.
fn reaction(before: Option<Signal>, signal: Signal) -> Reaction {
    match (before, signal) {
        (None, _) => Reaction::Explain,
        (Some(_), Signal::SIGINT) => Reaction::Kill,
        (Some(_), _) => Reaction::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_stop_is_explained_and_a_second_interrupt_kills_the_recovery() {
        let stops = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
        for signal in stops {
            assert_eq!(reaction(None, signal), Reaction::Explain);
            for before in stops {
                // A runner that cancels a job sends SIGTERM after SIGINT. Only a person repeats ^C.
                let expected = if signal == Signal::SIGINT { Reaction::Kill } else { Reaction::None };
                assert_eq!(reaction(Some(before), signal), expected, "{before} {signal}");
            }
        }
    }
}
