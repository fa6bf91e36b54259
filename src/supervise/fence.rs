//! The fence of a run with a lease: stops terraform when the lease was not renewed in time, and kills it if nobody is
//! left who could continue it.
//!
//! It consists of two pipes whose hang-up makes the kernel signal terraform's process group (`sys::hangup_pipe`), and
//! of a process that dies at the lease's deadline ([`super::fuse`]):
//!
//! | descriptor | held by |
//! |---|---|
//! | stop pipe, write end | the fuse |
//! | kill pipe, write end | the fuse and `tf` |
//! | both read ends | terraform's tree, `tf`, the guardian, the keeper, the fuse |
//! | deadline socket, the fuse's end | the fuse, and `tf` for the next fuse |
//! | deadline socket, the keeper's end | the keeper, `tf`, the guardian |
//!
//! If the fuse dies, the group gets SIGSTOP. If `tf` dies too, it gets SIGKILL. Without the kill pipe the kernel itself
//! would let terraform go on: a stopped group that has lost its last parent in the session gets SIGHUP and SIGCONT
//! (`kill_orphaned_pgrp`, kernel/exit.c). The kernel closes the descriptors of a process before it does that
//! (`do_exit`), so SIGKILL comes first.
//!
//! A second fuse, the spare one, is forked while terraform works, and takes the place of a fuse that has died. A
//! process that is forked while terraform is stopped would have a copy of the kill pipe's write end until it has closed
//! it. If `tf` died meanwhile, the kernel would continue terraform first. Only a process that was forked before cannot
//! do that.
//!
//! One write end in a wrong process would keep a pipe silent. So every write end is closed on exec, and every process
//! that `tf` forks without exec closes it: [`crate::sys::detached`] and [`crate::sys::group_signal_watcher`] close all
//! descriptors that are not named.
//!
//! Without a lease there is no fence, and nothing of this exists.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::fuse::{self, Fuse, Role};
use crate::crash_point;
use crate::sys::detached::{self, Parent};
use crate::sys::hangup_pipe::HangupPipe;
use crate::sys::packet_socket::PacketSocket;
use crate::sys::process::ProcessHandle;
use crate::sys::{descriptor, environment, poll, wait};

/// How long the fuses may take to exit after they were told to, and again after they were killed. A frozen fuse does
/// neither.
const FUSE_EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// The fence, as `tf` and the guardian hold it.
#[derive(Debug)]
pub(crate) struct Fence {
    stop: HangupPipe,
    kill: HangupPipe,
    /// The write end of the kill pipe. `None` in the guardian, and before the first fuse is forked.
    kill_write_end: Option<OwnedFd>,
    /// The fuse's end of the deadline socket. `None` in the guardian.
    fuse_end: Option<PacketSocket>,
    keeper_end: PacketSocket,
    /// The pid of the fuse. `None` if there is none, or if it is not a child of this process.
    fuse: Option<Pid>,
    /// The fuse that replaces it. `None` if there is none.
    spare: Option<Spare>,
    /// The number of the fuse in use. 0 before the first.
    number: u32,
    /// The number of the fuse that was forked last.
    last_number: u32,
    /// Whether the group was stopped by the death of an earlier fuse, and was not continued since.
    is_stopped: Cell<bool>,
    /// Whether a variable of this name marks the processes of a run or of a job. The fuse forgets such variables.
    is_mark: fn(&str) -> bool,
}

/// A fuse that is not in use.
#[derive(Debug)]
struct Spare {
    /// `None` if it is not a child of this process.
    pid: Option<Pid>,
    number: u32,
    /// The spare fuse exits when this end is closed.
    socket: PacketSocket,
}

impl Fence {
    /// Creates the pipes and the deadline socket. Nothing is armed. Call this before the guardian is forked.
    ///
    /// `is_mark` says whether an environment variable marks the processes of a run or of a job. A fuse forgets these
    /// variables, so that what kills the marked processes does not kill it.
    ///
    /// # Errors
    /// The error of pipe2(2) or socketpair(2). `Unsupported` on systems other than Linux.
    pub(crate) fn prepare(is_mark: fn(&str) -> bool) -> io::Result<Self> {
        // The guardian must not have the write ends, not even until it has closed what it inherited. So they are closed
        // here, and opened again after its fork.
        let (stop, _) = HangupPipe::new()?;
        let (kill, _) = HangupPipe::new()?;
        let (fuse_end, keeper_end) = PacketSocket::pair()?;
        Ok(Self {
            stop,
            kill,
            kill_write_end: None,
            fuse_end: Some(fuse_end),
            keeper_end,
            fuse: None,
            spare: None,
            number: 0,
            last_number: 0,
            is_stopped: Cell::new(false),
            is_mark,
        })
    }

    /// Returns the descriptors that the guardian must keep open: both read ends, and the keeper's end of the deadline
    /// socket.
    pub(crate) fn guardian_descriptors(&self) -> [RawFd; 3] {
        [self.stop.as_fd().as_raw_fd(), self.kill.as_fd().as_raw_fd(), self.keeper_end.as_fd().as_raw_fd()]
    }

    /// Makes this the guardian's view of the fence. Call this first in the guardian's process, in which every
    /// descriptor except [`Fence::guardian_descriptors`] was closed by its number.
    pub(crate) fn become_guardians(&mut self) {
        // These numbers may belong to other files by now, so they must not be closed again.
        let closed = [self.kill_write_end.take(), self.fuse_end.take().map(OwnedFd::from)];
        for descriptor in closed.into_iter().flatten() {
            let _ = descriptor.into_raw_fd();
        }
        (self.fuse, self.spare) = (None, None);
    }

    /// Returns copies of both read ends, which terraform must inherit. They are open in every program that this process
    /// starts, so they must be dropped right after terraform was started.
    ///
    /// # Errors
    /// As [`descriptor::inheritable_high`].
    pub(crate) fn inheritable_read_ends(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([descriptor::inheritable_high(&self.stop)?, descriptor::inheritable_high(&self.kill)?])
    }

    /// Returns the stop pipe. The keeper must inherit its read end.
    pub(crate) fn stop_pipe(&self) -> &HangupPipe {
        &self.stop
    }

    /// Returns the kill pipe. The keeper must inherit its read end.
    pub(crate) fn kill_pipe(&self) -> &HangupPipe {
        &self.kill
    }

    /// Returns the write end of the kill pipe. A process that this one starts must close it at once. `None` in the
    /// guardian, and before the first fuse was forked.
    pub(crate) fn kill_write_end(&self) -> Option<BorrowedFd<'_>> {
        self.kill_write_end.as_ref().map(AsFd::as_fd)
    }

    /// Returns the keeper's end of the deadline socket. The keeper must inherit it.
    pub(crate) fn keeper_end(&self) -> &PacketSocket {
        &self.keeper_end
    }

    /// Returns the number of the fuse in use ([`fuse::Answer::fuse`]). A renewal counts only if it was sent after this
    /// fuse had answered.
    pub(crate) fn fuse_number(&self) -> u32 {
        self.number
    }

    /// Forks the first fuse and a spare one, and opens the write ends of both pipes. Call this after the guardian was
    /// forked and before this process becomes a subreaper. This process must have one thread. Returns the pids of both,
    /// which must be excluded from terraform's tree. `None` if they are not children of this process, which depends on
    /// `parent`.
    ///
    /// # Errors
    /// The error of fork(2), of open(2) (no /proc), or of a copy of a descriptor. Then there can be no lease, and this
    /// value must be dropped.
    pub(crate) fn fork_fuse(&mut self, parent: Parent) -> io::Result<[Option<Pid>; 2]> {
        // In this order, no process has a write end that it must not have, not even for a moment.
        let spare = self.fork_spare(parent)?;
        crash_point::reached("lease: forked the spare fuse");
        let stop_write_end = self.stop.reopen_write_end()?;
        let kill_write_end = self.kill.reopen_write_end()?;
        let its_copy = kill_write_end.try_clone()?;
        crash_point::reached("lease: opened the write ends");
        self.fuse = self.fork(parent, Role::InUse(stop_write_end), Some(its_copy))?;
        self.kill_write_end = Some(kill_write_end);
        self.number = self.last_number;
        Ok([self.fuse, spare])
    }

    /// Forks a spare fuse if there is none. Call this after each [`Fence::rearm`], as soon as terraform was continued.
    /// This process must have one thread. Returns the pid of a new spare fuse, which must be excluded from terraform's
    /// tree. `None` if there was one, or if it is not a child of this process. After this process has become a
    /// subreaper, `parent` must be [`Parent::Us`], because a child of init would then be a child of this process with
    /// an unknown pid.
    ///
    /// # Errors
    /// The error of fork(2), or of a copy of a descriptor. The fence works without a spare fuse:
    /// [`Fence::rearm`] then tries again.
    pub(crate) fn fork_spare(&mut self, parent: Parent) -> io::Result<Option<Pid>> {
        if self.spare.is_some() {
            return Ok(None);
        }
        let (socket, its_end) = PacketSocket::pair()?;
        let pid = self.fork(parent, Role::Spare(its_end), None)?;
        self.spare = Some(Spare { pid, number: self.last_number, socket });
        Ok(pid)
    }

    /// Forks a fuse. This process closes the descriptors in `role` and `kill_write_end`, whether the fork succeeds or
    /// not.
    fn fork(&mut self, parent: Parent, role: Role, kill_write_end: Option<OwnedFd>) -> io::Result<Option<Pid>> {
        let socket = self.fuse_end.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        let fuse = Fuse {
            number: self.last_number + 1,
            socket: socket.as_fd().try_clone_to_owned()?.into(),
            stop: HangupPipe::from_read_end(self.stop.as_fd().try_clone_to_owned()?),
            kill: HangupPipe::from_read_end(self.kill.as_fd().try_clone_to_owned()?),
            role,
            kill_write_end,
        };
        let mut keep = vec![
            fuse.socket.as_fd().as_raw_fd(),
            fuse.stop.as_fd().as_raw_fd(),
            fuse.kill.as_fd().as_raw_fd(),
            match &fuse.role {
                Role::InUse(write_end) => write_end.as_raw_fd(),
                Role::Spare(socket) => socket.as_fd().as_raw_fd(),
            },
        ];
        keep.extend(fuse.kill_write_end.as_ref().map(AsRawFd::as_raw_fd));
        let is_mark = self.is_mark;
        let name = if matches!(fuse.role, Role::Spare(_)) { c"tf-spare" } else { c"tf-fuse" };
        let pid = detached::run(name, parent, &keep, move || {
            environment::forget(is_mark);
            fuse.run();
        })?;
        self.last_number += 1;
        Ok(pid)
    }

    /// Arms both pipes for terraform's process group. Call this before the keeper sends its first renewal. The caller
    /// must have checked that the terraform with the lock is in `group` and belongs to this user.
    ///
    /// # Errors
    /// `BrokenPipe` if the fuse is already gone; the group was continued if that had stopped it. ESRCH if there is no
    /// such group. In both cases nothing is armed, and there can be no lease.
    pub(crate) fn arm(&self, group: Pid) -> io::Result<()> {
        let armed = self.kill.arm(group, Signal::SIGKILL).and_then(|()| self.stop.arm(group, Signal::SIGSTOP));
        armed.inspect_err(|error| {
            let _ = (self.stop.disarm(), self.kill.disarm());
            if error.kind() == io::ErrorKind::BrokenPipe {
                let _ = killpg(group, Signal::SIGCONT);
            }
        })
    }

    /// Whether the fuse is gone and terraform's group was stopped: the fence is armed, and the stop pipe has hung up.
    /// False again after [`Fence::rearm`].
    pub(crate) fn is_blown(&self) -> bool {
        self.stop.is_armed() && self.stop.has_hung_up()
    }

    /// Kills the fuse in use. That stops the group, and [`Fence::rearm`] replaces the fuse. Waits until the group was
    /// stopped, for [`FUSE_EXIT_TIMEOUT`] at most: a process may hang in the kernel before it dies. Returns false if
    /// the fuse is not a child of this process, so that it cannot be killed.
    pub(crate) fn kill_fuse(&self) -> bool {
        let is_killed = self.fuse.is_some_and(|fuse| kill(fuse, Signal::SIGKILL).is_ok());
        if is_killed {
            poll::wait(&[(self.stop.as_fd(), PollFlags::POLLIN)], Some(FUSE_EXIT_TIMEOUT));
        }
        is_killed
    }

    /// Puts the spare fuse in the place of a fuse that is gone. It gets the stop pipe on whose read end terraform is
    /// already waiting, so terraform needs nothing new. It gets the kill pipe later ([`Fence::give_kill_pipe`]): until
    /// then `tf` alone holds it, and if `tf` dies, the stopped terraform is killed instead of continued.
    ///
    /// If there is no spare fuse, one is forked, and must be excluded from terraform's tree: its pid is returned. This
    /// process must have one thread. Terraform stays stopped.
    ///
    /// # Errors
    /// The error of open(2) (no /proc), of fork(2), or of sendmsg(2). Terraform is stopped and unfenced then: renew
    /// without a promise and call [`Fence::end`].
    pub(crate) fn rearm(&mut self) -> io::Result<Option<Pid>> {
        self.is_stopped.set(self.is_stopped.get() || self.is_blown());
        if let Some(old) = self.fuse.take() {
            wait::reap(old);
        }
        // Nothing that was sent to the old fuse may reach the new one, nor an answer of the old one the keeper. The
        // keeper begins again when the hang-up is gone. So this is done before that.
        self.fuse_end.iter().for_each(fuse::drain);
        fuse::drain(&self.keeper_end);
        if let Some(spare) = self.spare.take() {
            match self.use_spare(&spare) {
                Ok(()) => return Ok(None),
                // It was killed, as the fuse was. A second one is tried.
                Err(_) => EndingFuses(spare.pid.into_iter().collect()).wait(),
            }
        }
        let pid = self.fork_spare(Parent::Us)?;
        let spare = self.spare.take().ok_or(io::ErrorKind::InvalidInput)?;
        self.use_spare(&spare)?;
        Ok(pid)
    }

    fn use_spare(&mut self, spare: &Spare) -> io::Result<()> {
        let stop_write_end = self.stop.reopen_write_end()?;
        crash_point::reached("lease: reopened the stop pipe");
        fuse::send_stop_pipe(&spare.socket, &stop_write_end)?;
        crash_point::reached("lease: sent the stop pipe");
        (self.fuse, self.number) = (spare.pid, spare.number);
        Ok(())
    }

    /// Gives the fuse the write end of the kill pipe. Call this after a renewal was confirmed for which this fuse has
    /// its deadline, right before [`continue_group`].
    ///
    /// # Errors
    /// As [`fuse::send_deadline`]. Terraform must not be continued then.
    pub(crate) fn give_kill_pipe(&self) -> io::Result<()> {
        let write_end = self.kill_write_end.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        fuse::send_kill_pipe(&self.keeper_end, write_end)
    }

    /// Continues the group if this fence allows it. See [`continue_group`].
    fn continue_group(&self, group: Pid) -> bool {
        if !self.stop.is_armed() {
            return killpg(group, Signal::SIGCONT).is_ok();
        }
        let can_gate = self.stop.set_signal(Signal::SIGKILL).is_ok();
        crash_point::reached("fence: kills at a hang-up");
        let is_continued = can_gate && !self.stop.has_hung_up() && killpg(group, Signal::SIGCONT).is_ok();
        crash_point::reached("fence: continued the group");
        let _ = self.stop.set_signal(Signal::SIGSTOP);
        if is_continued {
            self.is_stopped.set(false);
        }
        is_continued
    }

    /// Takes the fence down: disarms both pipes, tells the fuse that the run is over, and continues `group` if the
    /// fence had stopped it, after a call of `before_continuing`. Call this when terraform has ended, before it is
    /// reaped, or when it must go on without a lease. Does not wait for the fuses. Returns those that are children of
    /// this process, which must reap them.
    ///
    /// The pipes are disarmed before the fuse may exit. A daemon that terraform left on purpose in its group has
    /// inherited the read ends, and would otherwise be stopped for ever. If the fuse has stopped the group, such a
    /// daemon goes on.
    pub(crate) fn end(&mut self, group: Option<Pid>, before_continuing: impl FnOnce()) -> EndingFuses {
        let was_armed = self.stop.is_armed();
        let _ = self.stop.disarm();
        crash_point::reached("fence: disarmed the stop pipe");
        let _ = self.kill.disarm();
        crash_point::reached("fence: disarmed both pipes");
        // A hang-up after the pipe was disarmed stopped nobody, and to continue a running group changes nothing.
        let has_stopped = self.is_stopped.get() || (was_armed && self.stop.has_hung_up());
        let _ = fuse::send_over(&self.keeper_end);
        crash_point::reached("fence: told the fuse");
        if let Some(group) = group.filter(|_| has_stopped) {
            before_continuing();
            let _ = killpg(group, Signal::SIGCONT);
            self.is_stopped.set(false);
        }
        // A spare fuse exits when its socket is closed.
        let spare = self.spare.take().and_then(|spare| spare.pid);
        EndingFuses(self.fuse.take().into_iter().chain(spare).collect())
    }
}

/// Fuses that were told to exit, and are children of this process.
#[derive(Debug, Default)]
pub(crate) struct EndingFuses(Vec<Pid>);

impl EndingFuses {
    /// Reaps those that have exited, without waiting.
    pub(crate) fn reap(&mut self) {
        self.0.retain(|&pid| !wait::reap(pid) && wait::is_child(pid));
    }

    /// Waits until all have exited, and reaps them. Kills those that have not exited after [`FUSE_EXIT_TIMEOUT`], and
    /// gives up after another one: a frozen fuse exits when it is thawed.
    pub(crate) fn wait(&mut self) {
        for is_killing in [false, true] {
            if is_killing {
                for &pid in &self.0 {
                    let _ = kill(pid, Signal::SIGKILL);
                }
            }
            let until = Instant::now() + FUSE_EXIT_TIMEOUT;
            loop {
                self.reap();
                let rest = until.saturating_duration_since(Instant::now());
                let Some(&first) = self.0.first().filter(|_| !rest.is_zero()) else { break };
                // A handle is readable as soon as the process has exited. Without one, the next look is soon.
                match ProcessHandle::open(first) {
                    Ok(end) => poll::wait(&[(end.as_fd(), PollFlags::POLLIN)], Some(rest)),
                    Err(_) => poll::wait(&[], Some(Duration::from_millis(1))),
                };
            }
        }
    }
}

/// Continues terraform's process group, unless the fence of its run has stopped it, and returns whether it was
/// continued. `fence` is `None` for a run without a lease. Every SIGCONT to terraform's group must go through this
/// function, because a SIGCONT discards a SIGSTOP that is pending (signal(7)): a group that was suspended by ^Z when
/// the fuse died would go on unfenced.
///
/// So it takes four steps: it sets the signal of the stop pipe to SIGKILL, looks whether the pipe has hung up, sends
/// SIGCONT only if not, and sets the signal back to SIGSTOP. If the fuse dies before the first step, the look sees it.
/// If it dies between the first and the last step, the group is killed instead of stopped: SIGCONT does not discard
/// SIGKILL. If it dies after SIGCONT and the last step, the SIGSTOP comes after the SIGCONT and counts. If this process
/// dies in between, the signal stays SIGKILL, which is safe.
pub(crate) fn continue_group(fence: Option<&Fence>, group: Pid) -> bool {
    fence.map_or_else(|| killpg(group, Signal::SIGCONT).is_ok(), |fence| fence.continue_group(group))
}
