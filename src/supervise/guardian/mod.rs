//! The guardian: if `tf` is killed, it interrupts terraform and releases terraform's lock.
//!
//! `tf` forks the guardian before terraform starts. The guardian reads from a socket that it shares with `tf`. If `tf`
//! reports that the run is over, the guardian exits. If the socket is closed without that report, `tf` was killed, and
//! the guardian does the rest of its work with the same code. It uses the data that were in memory at the fork, and the
//! data that `tf` has sent since.
//!
//! The guardian is not an ancestor of terraform. The alternative would be two processes above terraform: a thin `tf`,
//! which the caller started, and a supervisor below it. The supervisor would be a subreaper, and could still prove that
//! the tree is dead after the thin `tf` was killed. But the shell stops and continues the thin `tf`. So every stop,
//! every change of the foreground group and every signal would pass through two processes, either of which can die
//! alone. And the supervisor would be no safer against a kill of a session, a control group or all descendants.
//!
//! - The guardian is the leader of a new session. Its descriptors 0, 1 and 2 are /dev/null, and every other descriptor
//!   that it does not need is closed ([`crate::sys::detached`]). So it does not keep the caller's pipe or an outer
//!   run's lifeline open.
//! - At the end of a job, CI runners kill the processes that have a certain variable in their environment. The guardian
//!   removes these variables from its environment. Jenkins also kills the descendants of these processes, so on Jenkins
//!   the guardian is a child of init. It is also a child of init if there is no process list ([`Guardian::fork`]). In
//!   all other cases, the guardian is a child of `tf`, and `tf` reaps it. As a child of init, each guardian would
//!   remain as a zombie in a container whose first process reaps no orphans.
//! - It signals terraform through a pidfd, which never refers to another process with the same pid. The child of `tf`
//!   sends its own pid to the guardian before it executes terraform.
//! - Its [`Stop`](crate::supervise::stop::Stop) gets the same events as that of `tf`, so both have the same state. So
//!   terraform gets only one interrupt, whether `tf` or the guardian sends it.
//! - After the death of `tf`, it reads terraform's pipes and discards the output: terraform must not die of SIGPIPE
//!   with its state unsaved.

mod guardian_process;
mod message;

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) use self::guardian_process::GuardianContext;
use self::guardian_process::GuardianProcess;
use self::message::{
    CANNOT_WRITE, EVENT, LEASE, LOCK_IS_LOST, MAX_MESSAGE_BYTES, MessageReader, MessageWriter, NEWS, OUTSIDE_GROUP,
    OVER, STILL, STOPS_NO_MORE, UNIT_IS_STOPPED,
};
pub(crate) use self::message::{MAX_UNANSWERED, STARTED_PREFIX, Suspension};
use crate::journal::run_mark::is_jenkins_cookie;
use crate::supervise::keeper::Orders;
use crate::supervise::stop::StopEvent;
use crate::sys::process::{self, ProcessHandle, ProcessList};
use crate::sys::{detached, poll, wait};
use crate::terraform::log::Log;
use crate::trace::{self, trace};

/// How long the guardian may take to exit after `tf` has reported that the run is over.
const GUARDIAN_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the guardian may take to exit after it has closed its socket or was killed.
const GUARDIAN_KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// The guardian, as seen by `tf`.
#[derive(Debug)]
pub(crate) struct Guardian {
    /// The guardian's pid. `None` if the guardian is not a child of this process.
    pid: Option<Pid>,
    /// All messages but those in `events`. The guardian's reports come through the same socket.
    messages: MessageWriter,
    /// The [`EVENT`] and [`STILL`] messages.
    events: MessageWriter,
}

/// A report of the guardian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// The guardian has reported nothing new.
    Nothing,
    /// The journal cannot be written, for example because the disk is full.
    CannotWrite,
    /// A service manager has sent SIGTERM to every process of the unit, including terraform.
    UnitIsStopped,
    /// The guardian has read that `tf` was continued ([`Guardian::report_suspension`]), so it does not stop terraform's
    /// group for the lease any more.
    StopsNoMore,
    /// The guardian's own keeper has found that another run holds the lock, or has claimed it. It is reported once
    /// while `tf` is suspended.
    LockIsLost,
    /// The guardian has exited, or was killed.
    Gone,
}

impl Guardian {
    /// Forks the guardian. This process must have only one thread, and terraform must not have been started.
    ///
    /// # Errors
    /// Fails if the socket cannot be created, or fork(2) fails. The run then continues without a guardian.
    pub(crate) fn fork(context: GuardianContext<'_>) -> io::Result<Self> {
        let (messages, messages_end) = MessageWriter::new()?;
        let (events, events_end) = MessageWriter::new()?;
        let mut keep: Vec<RawFd> =
            [messages_end.as_fd(), events_end.as_fd(), context.tree.lifeline(), context.recorder.descriptor()]
                .iter()
                .chain(&context.pipes.sources().collect::<Vec<_>>())
                .map(AsRawFd::as_raw_fd)
                .collect();
        keep.extend(context.entry.map(|entry| entry.lock_file().as_raw_fd()));
        keep.extend(context.run.planned_backends.descriptor().map(|plan| plan.as_raw_fd()));
        keep.extend(trace::descriptor());
        keep.extend(context.lease.iter().flat_map(|lease| lease.guardian_descriptors()));
        let pid = detached::run(c"tf-guardian", parent(), &keep, || {
            GuardianProcess::begin(MessageReader::new(messages_end), MessageReader::new(events_end), context);
        })?;
        Ok(Self { pid, messages, events })
    }

    /// Returns the pid of the guardian. `None` if the guardian is not a child of this process.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Returns the socket that is shared with the guardian. The child that executes terraform writes its pid into the
    /// socket. The socket is readable when the guardian has reported something, or is gone.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.messages.socket().as_fd()
    }

    /// Returns the guardian's next report, without waiting.
    pub(crate) fn hear(&self) -> Heard {
        let mut said = [0];
        match self.messages.socket().read(&mut said) {
            Ok(1) if said == [UNIT_IS_STOPPED] => Heard::UnitIsStopped,
            Ok(1) if said == [STOPS_NO_MORE] => Heard::StopsNoMore,
            Ok(1) if said == [LOCK_IS_LOST] => Heard::LockIsLost,
            Ok(1) if said == [CANNOT_WRITE] => Heard::CannotWrite,
            Ok(1) => Heard::Nothing,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Heard::Nothing,
            _ => Heard::Gone,
        }
    }

    /// Sends an event to the guardian's [`Stop`](crate::supervise::stop::Stop).
    ///
    /// # Errors
    /// Fails if the guardian is gone.
    pub(crate) fn note(&mut self, event: StopEvent) -> io::Result<()> {
        self.events.send(EVENT, &serde_json::to_vec(&event)?)
    }

    /// Reports that `tf` is about to stop itself, or was continued. The guardian answers [`Suspension::Over`] with
    /// [`Heard::StopsNoMore`].
    ///
    /// # Errors
    /// Fails if the guardian is gone.
    pub(crate) fn report_suspension(&mut self, suspension: Suspension) -> io::Result<()> {
        self.events.send(STILL, &[suspension as u8])
    }

    /// Sends what could not be sent yet, because a socket was full.
    ///
    /// # Errors
    /// Fails if the guardian is gone.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.events.flush()?;
        self.messages.flush()
    }

    /// Sends the parsed log of terraform. The log was read up to `offset`, in bytes. Returns true if the message was
    /// sent, or if the rest of it will be sent later. Returns false if the message was not sent, because at the last
    /// [`Guardian::flush`] an earlier message still filled the socket, or because this message would be too long.
    ///
    /// # Errors
    /// Fails if the guardian is gone.
    pub(crate) fn tell(&mut self, log: &Log, offset: u64) -> io::Result<bool> {
        if self.messages.is_full() {
            return Ok(false);
        }
        let news = serde_json::to_vec(&(offset, log))?;
        if news.len() > MAX_MESSAGE_BYTES {
            // The guardian would skip the message. After the death of `tf`, the guardian reads the log itself. It can
            // do so because it alone frees a part of the log, after it has written the facts in that part.
            return Ok(false);
        }
        self.messages.send(NEWS, &news)?;
        Ok(true)
    }

    /// Sends the processes below terraform that have left its process group: the pid of each, and its start time in
    /// clock ticks since boot.
    ///
    /// # Errors
    /// Fails if the guardian is gone.
    pub(crate) fn tell_outside_group(&mut self, processes: &[(i32, u64)]) -> io::Result<()> {
        self.messages.send(OUTSIDE_GROUP, &serde_json::to_vec(processes)?)
    }

    /// Sends what a keeper of the run's lease needs to know, for a keeper that the guardian starts if `tf` dies or is
    /// suspended. `None` if there is no lease any more.
    ///
    /// # Errors
    /// Fails if the guardian is gone.
    pub(crate) fn tell_lease(&mut self, orders: Option<&Orders>) -> io::Result<()> {
        self.messages.send(LEASE, &serde_json::to_vec(&orders)?)
    }

    /// Reports that the run is over. The guardian then exits without further work. [`Guardian::wait`] waits for its
    /// exit.
    pub(crate) fn over(&mut self) {
        let _ = self.messages.send(OVER, &[]);
    }

    /// Waits until the guardian has exited. If it is a child of this process, it is killed after
    /// [`GUARDIAN_EXIT_TIMEOUT`].
    pub(crate) fn wait(self) {
        let begun = Instant::now();
        let mut guardian = self;
        while begun.elapsed() < GUARDIAN_EXIT_TIMEOUT {
            let _ = guardian.messages.flush();
            let rest = GUARDIAN_EXIT_TIMEOUT.saturating_sub(begun.elapsed());
            poll::wait(&[(guardian.socket(), PollFlags::POLLIN)], Some(rest));
            if guardian.has_closed_its_socket() {
                break;
            }
        }
        if let Some(pid) = guardian.pid {
            if begun.elapsed() >= GUARDIAN_EXIT_TIMEOUT {
                trace!("the guardian does not end");
                let _ = kill(pid, Signal::SIGKILL);
            }
            // A guardian that is frozen, or hangs in the kernel, does not exit even if it is killed. So the wait is
            // limited. Init reaps that guardian after `tf` has exited.
            let until = Instant::now() + GUARDIAN_KILL_TIMEOUT;
            // A handle reports the guardian's exit at once, so `tf` does not wait longer than needed.
            if let Ok(end) = ProcessHandle::open(pid) {
                poll::wait(&[(end.as_fd(), PollFlags::POLLIN)], Some(GUARDIAN_KILL_TIMEOUT));
            }
            while !wait::reap(pid) && wait::is_child(pid) && Instant::now() < until {
                poll::wait(&[], Some(Duration::from_millis(1)));
            }
        }
    }

    /// Reads what the guardian has sent, without waiting: its reports do not matter any more. Returns whether their end
    /// was reached. A read is needed because macOS reports a hang-up only together with something to read
    /// ([`poll::has_hung_up`]).
    fn has_closed_its_socket(&self) -> bool {
        loop {
            match self.messages.socket().read(&mut [0; 64]) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Ok(0) | Err(_) => return true,
            }
        }
    }
}

/// Returns which process must be the parent of the guardian and of the fuse. Without a process list, the tree counts as
/// dead when `tf` has no child left. So they must not be children of `tf` then.
pub(crate) fn parent() -> detached::Parent {
    let is_listed = process::list() != ProcessList::Unavailable;
    if runner_kills_descendants() || !is_listed { detached::Parent::Init } else { detached::Parent::Us }
}

/// Returns whether a runner would kill the descendants of this process, whatever their environment contains (Jenkins,
/// ProcessTree.java, `killRecursively`). False if this process is the first process of a pid namespace. In this case,
/// this process is init itself, and when it exits, the kernel kills all processes of the namespace.
fn runner_kills_descendants() -> bool {
    std::process::id() != 1 && std::env::vars_os().any(|(name, _)| name.to_str().is_some_and(is_jenkins_cookie))
}
