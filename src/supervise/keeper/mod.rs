//! The keeper: another `tf` process, which renews the lease of the run's lock.
//!
//! A process that supervises a terraform sends no request to AWS, because it must fork with one thread and must handle
//! signals at any time. So the keeper is this program again. `tf` starts it when the log shows that the lock is held.
//! The keeper resolves terraform's credentials anew. It goes on while `tf` and terraform are suspended, and after the
//! death of `tf`. The guardian then starts a keeper of its own as well, because the first one may have been killed
//! together with `tf`. Two keepers of one run do no harm: the store accepts a renewal only if it is newer than the
//! stored one, and a stored one that is newer confirms both.
//!
//! The process that has started a keeper asks it for an answer every few seconds ([`Keeper::ping`]), and replaces it if
//! it does not answer ([`super::keepers`]).
//!
//! A keeper ends when it is told to, when there is no lease, and when terraform has ended. It holds a pidfd of
//! terraform, and looks at it before each renewal: the lock of a dead terraform must not look alive.
//!
//! A keeper also asks the metadata service of the host's cloud whether the host is about to end ([`crate::notice`]).
//! That is a task of its own, so a service that does not answer delays no renewal. The keeper reports a notice, and the
//! process that has started it interrupts terraform. From then on, the record says so.
//!
//! When it is forked, a new keeper holds a copy of everything that `tf` holds, and so a write end of the kill pipe. It
//! closes that copy first, and not only when it calls exec: while terraform is stopped, the lease may have lapsed, and
//! if `tf` died in that moment, the kernel would continue terraform.

mod keeper_fence;
pub(crate) mod keeper_process;
mod renewals;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::another_tf;
use crate::aws::identity::AccountIdentity;
use crate::cleanup::waiter::Waiter;
use crate::journal::run_mark::marks_us;
use crate::lease::fence::{Look, Loss, Withdrawal};
use crate::lease::notice::{Notice, Provider};
use crate::lease::record::{Holder, Promise};
use crate::lock::location::LockLocation;
use crate::supervise::fence::Fence;
use crate::sys::{descriptor, poll, process, session};
use crate::trace::trace;

/// The word after `tf locks` that makes this program a keeper. It is internal, so clap does not know it.
pub(crate) const WORD: &str = "keep-lease";

/// How long a keeper may take to end when it is told to. Then it is killed. A renewal of it that is in flight does no
/// harm, because it has the condition that the lock still exists.
const END_TIMEOUT: Duration = Duration::from_millis(500);

/// What a keeper needs to know. It reads this as JSON from its stdin, because the backend may contain credentials.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// The lock's ID.
    pub(crate) lock: String,
    /// Where the lock may be, as [`crate::lock::location::LockLocation::to_json`].
    pub(crate) places: Vec<Value>,
    /// The identity with which the run reached each of these places when it had just got the lock. Its hashes are made
    /// with the lock's ID.
    pub(crate) identities: Vec<AccountIdentity>,
    pub(crate) length: Duration,
    /// What the host promises about the time after the lease.
    pub(crate) fence: Promise,
    /// Whether the stored record may promise [`Promise::Stop`]. After `fence` was changed, it may do so until a renewal
    /// is confirmed.
    pub(crate) may_promise: bool,
    pub(crate) holder: Holder,
    /// The metadata service to ask whether this host is about to end. `None` if none must be asked.
    pub(crate) asks: Option<Provider>,
    /// The notice for which terraform was interrupted. `None` if it was not.
    pub(crate) interrupted: Option<Notice>,
    /// The pid of the terraform that holds the lock, and its start ([`process::Process::start`]).
    pub(crate) terraform: i32,
    pub(crate) start: u64,
    /// Whether an earlier keeper of this run may have stored a record.
    pub(crate) may_have_a_record: bool,
    /// Whether the run has ended and its lock stays. The keeper then writes one record that promises no fence, so that
    /// nobody takes the lock without being asked, and ends.
    pub(crate) withdraws: bool,
    /// Terraform's working directory. Relative paths in the settings are relative to it.
    pub(crate) directory: PathBuf,
}

/// Returns [`Orders::identities`] for the lock with this ID, which the run has just got. The current directory must be
/// that of terraform.
pub(crate) fn identities(lock: &str, locations: &[LockLocation]) -> Vec<AccountIdentity> {
    locations.iter().map(|location| AccountIdentity::at_start(lock, &location.backend)).collect()
}

impl std::fmt::Debug for Orders {
    /// Leaves out the places, which may contain credentials.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "lock {}, {:?}", self.lock, self.fence)
    }
}

/// What a keeper reports to the process that has started it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The service has confirmed a renewal. `fence` is what its record promises. `sent` is when the request was sent:
    /// the lock was the run's later than that. `fuse` is the number of the fuse that has confirmed a deadline
    /// ([`fuse::Answer::fuse`](super::fuse::Answer::fuse)), and that deadline. `None` if none has. The times are of
    /// `sys::boot_clock`.
    Renewed { fence: Promise, sent: Duration, fuse: Option<(u32, Duration)> },
    /// What the lock looks like while the fuse is gone. `reason` says why it is unknown.
    Looked { look: Look, loss: Option<Loss>, reason: String },
    /// A request has failed for this reason. The keeper goes on. The same reason is not reported again until a request
    /// has succeeded.
    Failed(String),
    /// The lock is not the run's any more.
    Lost(Loss),
    /// The service has refused every renewal so far, so there is no lease. The keeper ends.
    NoLease(String),
    /// The service refuses renewals, and the lease will lapse. Terraform should stop in time.
    Refused(String),
    /// The fuse has not answered, although it has not ended. It may be stopped (SIGSTOP), or it is slow. No renewal is
    /// sent until it answers.
    FuseSilent,
    /// The first renewal is about to be sent, so from now on the lock may have a record. The keeper sends no renewal
    /// before this report: the one that replaces it must know whether a refusal means that there never was a lease.
    MayHaveRecord,
    /// This host is about to end. Terraform should stop in time. It is reported again after each renewal, until the
    /// supervisor says that it has interrupted terraform ([`Keeper::tell_of_interrupt`]).
    Notice(Notice),
    /// The answer to [`Keeper::ping`].
    Alive,
}

/// The descriptors that a keeper inherits.
#[derive(Debug)]
pub(crate) struct Inherited<'a> {
    /// The fence of the run. `None` if the records promise none. The keeper gets its end of the socket to the fuse, and
    /// the read ends of both pipes. It does not use the kill pipe: a pipe signals nobody if the process that holds its
    /// last write end is also the only one with a read end.
    pub(crate) fence: Option<&'a Fence>,
    /// A pidfd of the terraform that holds the lock.
    pub(crate) terraform: BorrowedFd<'a>,
    /// The write end of the kill pipe, which the keeper closes as soon as it was forked. `None` if this process has
    /// none.
    pub(crate) kill_write_end: Option<BorrowedFd<'a>>,
}

/// A keeper, as seen by the process that has started it.
#[derive(Debug)]
pub(crate) struct Keeper {
    process: Child,
    socket: UnixStream,
    /// The part of a report that has arrived.
    received: Vec<u8>,
}

/// What a keeper has reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Report(Report),
    /// Nothing new.
    Nothing,
    /// The keeper has ended.
    Gone,
}

impl Keeper {
    /// Starts a keeper.
    ///
    /// # Errors
    /// If the process or its socket cannot be created.
    pub(crate) fn start(orders: &Orders, inherited: &Inherited<'_>) -> io::Result<Self> {
        let (socket, its_end) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        let mut descriptors = vec![its_end.as_fd()];
        descriptors.extend(Some(inherited.terraform).filter(|_| process::HANDLE_IS_INHERITED));
        if let Some(fence) = inherited.fence {
            descriptors.extend([fence.keeper_end().as_fd(), fence.stop_pipe().as_fd(), fence.kill_pipe().as_fd()]);
        }
        let mut command = another_tf::locks(&[WORD])?;
        if let Some(write_end) = inherited.kill_write_end {
            descriptor::close_after_fork(&mut command, write_end);
        }
        command.args(descriptors.iter().map(|descriptor| descriptor.as_raw_fd().to_string()));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(marks_us)) {
            command.env_remove(name);
        }
        session::of_its_own(&mut command);
        descriptor::inherit(&mut command, &descriptors);
        #[expect(clippy::disallowed_methods, reason = "this starts `tf`, not terraform; it needs only the setup above")]
        let mut process = command.spawn()?;
        if let Some(mut stdin) = process.stdin.take() {
            // The pipe has room for more than any orders. If the keeper has ended, its end is seen by its socket.
            let _ = stdin.write_all(&serde_json::to_vec(orders)?);
        }
        Ok(Self { process, socket, received: Vec::new() })
    }

    /// Returns the socket. It is readable when the keeper has reported something or has ended.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns the keeper's next report, without waiting.
    pub(crate) fn hear(&mut self) -> Heard {
        let mut bytes = [0; 4096];
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                match serde_json::from_slice(&line) {
                    Ok(report) => return Heard::Report(report),
                    Err(error) => trace!("the keeper reports something unknown: {error}"),
                }
                continue;
            }
            match self.socket.read(&mut bytes) {
                Ok(0) => return Heard::Gone,
                Ok(length) => self.received.extend(&bytes[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Heard::Nothing,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Heard::Gone,
            }
        }
    }

    /// Asks the keeper to look at the lock, or to renew, at once.
    pub(crate) fn hurry(&self) {
        let _ = (&self.socket).write(&[HURRY]);
    }

    /// Tells the keeper that terraform is interrupted because of the notice that the keeper has reported. The record
    /// then says so.
    pub(crate) fn tell_of_interrupt(&self) {
        let _ = (&self.socket).write(&[INTERRUPTED]);
    }

    /// Asks the keeper to report [`Report::Alive`].
    pub(crate) fn ping(&self) {
        let _ = (&self.socket).write(&[PING]);
    }

    /// Returns the pid of the keeper, which is a child of this process.
    pub(crate) fn pid(&self) -> Option<Pid> {
        i32::try_from(self.process.id()).ok().map(Pid::from_raw)
    }

    /// Tells the keeper to end.
    pub(crate) fn tell_to_end(&self) {
        let _ = (&self.socket).write(&[END]);
    }

    /// Whether the keeper has ended. Reaps it then.
    pub(crate) fn has_ended(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(None))
    }

    /// Tells the keeper to end, and waits for its end. Returns how it ended. `None` if it did not end, even when it was
    /// killed.
    pub(crate) fn end(mut self) -> Option<ExitStatus> {
        self.tell_to_end();
        self.wait(END_TIMEOUT)
    }

    /// Kills the keeper. A stopped process dies of that, too. What it had reported can still be read.
    pub(crate) fn kill(&mut self) {
        self.wait(Duration::ZERO);
    }

    /// Waits for the end of a keeper that withdraws a promise, and returns what has become of it. The first SIGINT ends
    /// the wait.
    pub(crate) fn withdrawal(mut self, waiter: &mut Waiter<'_>) -> Withdrawal {
        let until = Instant::now() + LAST_RENEWAL_TIMEOUT + END_TIMEOUT;
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < until {
            if waiter.interrupts() > 0 {
                trace!("a SIGINT ends the wait for the withdrawal of the promise");
                break;
            }
            waiter.wait(WITHDRAWAL_POLL_INTERVAL);
        }
        let code = self.wait(Duration::ZERO).and_then(|status| status.code());
        [Withdrawal::Done, Withdrawal::NoLock]
            .into_iter()
            .find(|withdrawal| code == Some(i32::from(exit_code(*withdrawal))))
            .unwrap_or(Withdrawal::Failed)
    }

    /// Waits for the end of the keeper, and kills it after `limit`. Returns how it ended. `None` if it did not end.
    fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        match self.wait_until(Instant::now() + limit) {
            Ok(None) => {}
            // If it was reaped elsewhere, its pid may be that of another process by now.
            ended => return ended.ok().flatten(),
        }
        // A keeper that is frozen, or hangs in the kernel, does not end even if it is killed. Init reaps it after this
        // process has ended.
        let _ = self.process.kill();
        self.wait_until(Instant::now() + END_TIMEOUT).ok().flatten()
    }

    /// Waits until `until` for the end of the keeper. Returns how it ended. `None` if it did not end.
    ///
    /// # Errors
    /// If it is not a child of this process any more.
    fn wait_until(&mut self, until: Instant) -> io::Result<Option<ExitStatus>> {
        loop {
            match self.process.try_wait() {
                Ok(None) if Instant::now() < until => poll::wait(&[], Some(POLL_INTERVAL)),
                ended => return ended,
            };
        }
    }
}

/// How often to check whether a keeper that was told to end has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// How often to check whether a keeper that withdraws a promise has ended.
const WITHDRAWAL_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Returns the exit code of a keeper that was to withdraw a promise.
fn exit_code(withdrawal: Withdrawal) -> u8 {
    match withdrawal {
        Withdrawal::Done => 0,
        Withdrawal::Failed => 1,
        Withdrawal::NoLock => 3,
    }
}

/// The messages to a keeper. Each has 1 byte.
const HURRY: u8 = b'h';
const PING: u8 = b'p';
const END: u8 = b'e';
const INTERRUPTED: u8 = b'i';

/// How long the last renewal of a keeper may take, which promises no fence.
const LAST_RENEWAL_TIMEOUT: Duration = Duration::from_secs(5);
