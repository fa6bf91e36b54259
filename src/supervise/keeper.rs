//! The keeper: another `tf` process, which renews the lease of the run's lock.
//!
//! A process that supervises a terraform sends no request to AWS, because it must fork with one thread and must handle
//! signals at any time. So the keeper is this program again. `tf` starts it when the log shows that the lock is held.
//! The keeper resolves terraform's credentials anew. It goes on while `tf` and terraform are suspended, and after the
//! death of `tf`. The guardian then starts a keeper of its own as well, because the first one may have been killed
//! together with `tf`. Two keepers of one run do no harm: the store accepts a renewal only if it is newer than the
//! stored one, and a stored one that is newer confirms both.
//!
//! The process that has started a keeper asks it for an answer every few seconds ([`Keeper::ping`]), and replaces it if it
//! does not answer ([`super::keepers`]).
//!
//! A keeper ends when it is told to, when its lock is lost, and when terraform has ended. It holds a pidfd of terraform,
//! and looks at it before each renewal: the lock of a dead terraform must not look alive.
//!
//! A keeper also asks the metadata service of the host's cloud whether the host is about to end ([`crate::notice`]). That
//! is a task of its own, so a service that does not answer delays no renewal. The keeper reports a notice, and the process
//! that has started it interrupts terraform. From then on, the record says so.
//!
//! When it is forked, a new keeper holds a copy of everything that `tf` holds, and so a write end of the kill pipe. It
//! closes that copy first, and not only when it calls exec: while terraform is stopped, the lease may have lapsed, and if
//! `tf` died in that moment, the kernel would continue terraform.

use std::cell::Cell;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::errno::Errno;
use nix::sys::signal::killpg;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;

use crate::aws::connect;
use crate::aws::credentials::Purpose;
use crate::aws::failure::{Cause, Failure};
use crate::aws::settings::Unreachable;
use crate::cleanup::waiter::Waiter;
use crate::cleanup::working_directory;
use crate::crash_point;
use crate::journal::run_mark::marks_us;
use crate::lease::fence::{Look, Loss};
use crate::lease::keeper::{
    self, Answer, BeforeRenewal, History, KeeperSight, KeeperStep, NextRenewal, Response, Setback, after_answer,
    before_renewal, next_renewal,
};
use crate::lease::notice::{Notice, Provider};
use crate::lease::record::{Fence as Promise, Holder, Interruption, Record};
use crate::lease::terms::Terms;
use crate::lock::leased::{LeaseRead, LeasedLock, Renewed};
use crate::lock::location::LockLocation;
use crate::lock::probe::IfMatch;
use crate::lock::stores::{StoreKey, Stores};
use crate::notice::requests;
use crate::notice::service::Service;
use crate::supervise::fence::Fence;
use crate::supervise::fuse;
use crate::sys::hangup_pipe::HangupPipe;
use crate::sys::packet_socket::PacketSocket;
use crate::sys::process::{self, Process, ProcessHandle, ProcessList};
use crate::sys::readiness::Readiness;
use crate::sys::{boot_clock, descriptor, environment, poll, session};
use crate::trace::trace;
use crate::{another_tf, panics};

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
    /// Where the lock may be, as [`LockLocation::to_json`].
    pub(crate) places: Vec<Value>,
    pub(crate) length: Duration,
    /// What the host promises about the time after the lease.
    pub(crate) fence: Promise,
    pub(crate) holder: Holder,
    /// The metadata service to ask whether this host is about to end. `None` if none must be asked.
    pub(crate) asks: Option<Provider>,
    /// The notice for which terraform was interrupted. `None` if it was not.
    pub(crate) interrupted: Option<Notice>,
    /// The pid of the terraform that holds the lock, and its start ([`Process::start`]).
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

impl std::fmt::Debug for Orders {
    /// Leaves out the places, which may contain credentials.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "lock {}, {:?}", self.lock, self.fence)
    }
}

/// What a keeper reports to the process that has started it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The service has confirmed a renewal. `fence` is what its record promises. `fuse` is the number of the fuse that
    /// has confirmed the deadline of this renewal ([`fuse::Answer::fuse`]). `None` if none has.
    Renewed { fence: Promise, fuse: Option<u32> },
    /// What the lock looks like while the fuse is gone. `reason` says why it is unknown.
    Looked { look: Look, loss: Option<Loss>, reason: String },
    /// A request has failed for this reason. The keeper goes on. The same reason is not reported again until a request has
    /// succeeded.
    Failed(String),
    /// The lock is not the run's any more.
    Lost(Loss),
    /// The service has refused every renewal so far, so there is no lease. The keeper ends.
    NoLease(String),
    /// The service refuses renewals, and the lease will lapse. Terraform should stop in time.
    Refused(String),
    /// The fuse has not answered, although it has not ended. It may be stopped (SIGSTOP), or it is slow. No renewal is sent
    /// until it answers.
    FuseSilent,
    /// The first renewal is about to be sent, so from now on the lock may have a record. The keeper sends no renewal before
    /// this report: the one that replaces it must know whether a refusal means that there never was a lease.
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
    /// The write end of the kill pipe, which the keeper closes as soon as it was forked. `None` if this process has none.
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

    /// Tells the keeper that terraform is interrupted because of the notice that the keeper has reported. The record then
    /// says so.
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

    /// Waits for the end of a keeper that withdraws a promise. Returns whether it has done so, or found the lock gone. The
    /// first SIGINT ends the wait.
    pub(crate) fn withdrawn(mut self, waiter: &mut Waiter<'_>) -> bool {
        let until = Instant::now() + LAST_RENEWAL_TIMEOUT + END_TIMEOUT;
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < until {
            if waiter.interrupts() > 0 {
                trace!("a SIGINT ends the wait for the withdrawal of the promise");
                break;
            }
            waiter.wait(WITHDRAWAL_POLL_INTERVAL);
        }
        self.wait(Duration::ZERO).is_some_and(|status| status.success())
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

/// The messages to a keeper. Each has 1 byte.
const HURRY: u8 = b'h';
const PING: u8 = b'p';
const END: u8 = b'e';
const INTERRUPTED: u8 = b'i';

/// How long the last renewal of a keeper may take, which promises no fence.
const LAST_RENEWAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest time for one request. A request that takes longer counts as unanswered. It may still arrive.
const MAX_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait before a report is sent again that the supervisor must read.
const REPORT_PAUSE: Duration = Duration::from_millis(250);

/// How long to wait before the next step after the fuse has not answered.
const FUSE_PAUSE: Duration = Duration::from_millis(250);

/// The longest pause after the source of the credentials has failed while terraform is stopped: a person may have logged
/// in again.
const MAX_CREDENTIALS_PAUSE_WHILE_STOPPED: Duration = Duration::from_secs(15);

/// Runs a keeper. `descriptors` are the arguments with the numbers of its descriptors, in the order of
/// [`Keeper::start`]. Returns whether it has done what it was told.
pub(crate) fn keep(descriptors: &[OsString]) -> bool {
    let numbers: Option<Vec<RawFd>> = descriptors.iter().map(|number| number.to_str()?.parse().ok()).collect();
    let Some(descriptors) = numbers.and_then(|numbers| descriptor::inherited(&numbers)) else { return false };
    session::become_helper(c"tf-keeper");
    crash_point::reached("keeper: begun");
    environment::unset_empty("AWS_");
    let mut orders = Vec::new();
    let _ = io::stdin().lock().take(MAX_ORDERS_BYTES).read_to_end(&mut orders);
    let Ok(orders) = serde_json::from_slice::<Orders>(&orders) else { return false };
    working_directory::go(&orders.directory);
    crash_point::reached("keeper: has its orders");
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return false };
    let ended = panics::caught(|| runtime.block_on(KeeperProcess::run(orders, descriptors)));
    trace!("keeper: {ended:?}");
    // A name lookup may hang in a thread of the runtime.
    runtime.shutdown_background();
    matches!(ended, Some(Ok(true)))
}

/// Opens terraform, where a keeper cannot inherit its handle. `None` if terraform has exited.
fn opened(orders: &Orders) -> Option<OwnedFd> {
    let pid = Pid::from_raw(orders.terraform);
    let handle = ProcessHandle::open(pid).ok()?;
    // The handle is opened first. So if the process is terraform now, the handle is that of terraform.
    let is_same = Process::look_up(pid).is_some_and(|process| process.start == orders.start);
    is_same.then(|| handle.into())
}

/// The largest orders, in bytes.
const MAX_ORDERS_BYTES: u64 = 1 << 20;

/// What ends the wait of a keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wake {
    /// The time of the next request has come.
    Due,
    /// The supervisor wants the next request at once.
    Hurry,
    /// The supervisor wants the keeper to end, or terraform has ended.
    End(Ending),
}

/// What a keeper listens to.
struct Link {
    socket: tokio::net::UnixStream,
    /// Whether the supervisor is gone. The keeper then goes on until terraform has ended.
    is_abandoned: bool,
    terraform: Readiness,
    /// The rest of a report that has not been sent.
    unsent: Vec<u8>,
    /// The answer of the task that asks the metadata service. `None` if there is no such task, or if it has ended.
    answer: Option<oneshot::Receiver<Notice>>,
    /// The notice, which the supervisor has not answered yet. `None` if there is none.
    notice: Option<Notice>,
    /// The notice for which terraform was interrupted. `None` if it was not. The renewals write it.
    interrupted: Rc<Cell<Option<Notice>>>,
}

/// Returns the answer of the task that asks the metadata service. Never returns if there is none.
async fn announced(answer: &mut Option<oneshot::Receiver<Notice>>) -> Notice {
    let announced = match answer {
        Some(answer) => answer.await.ok(),
        None => None,
    };
    *answer = None;
    match announced {
        Some(notice) => notice,
        None => std::future::pending().await,
    }
}

impl Link {
    /// Waits until `due`, or for the next event. With `None`, there is no such time.
    async fn wake(&mut self, due: Option<tokio::time::Instant>) -> Wake {
        loop {
            let mut byte = [0];
            let is_due = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = self.terraform.readable() => return Wake::End(Ending::TerraformEnded),
                read = self.socket.read(&mut byte), if !self.is_abandoned => match (read, byte[0]) {
                    (Ok(1), END) => return Wake::End(Ending::Left),
                    (Ok(1), PING) => {
                        self.report(&Report::Alive);
                    }
                    (Ok(1), INTERRUPTED) => {
                        self.interrupted.set(self.notice.take().or(self.interrupted.get()));
                        return Wake::Hurry;
                    }
                    (Ok(1), _) => return Wake::Hurry,
                    _ => self.is_abandoned = true,
                },
                notice = announced(&mut self.answer) => {
                    self.notice = Some(notice);
                    self.report_notice();
                }
                () = is_due => return Wake::Due,
            }
        }
    }

    /// Whether the supervisor is gone, without waiting. If it died together with terraform, the end of its socket was not
    /// read yet.
    fn is_left_alone(&self) -> bool {
        self.is_abandoned || poll::has_hung_up(self.socket.as_fd())
    }

    /// Reports a notice that the supervisor has not answered. A report of it may have been lost.
    fn report_notice(&mut self) {
        if let Some(notice) = self.notice {
            self.report(&Report::Notice(notice));
        }
    }

    /// Sends a report to the supervisor, without waiting: a supervisor that is suspended reads nothing, and the lease must
    /// be renewed all the same. If the socket is full, the report is lost, or its rest is sent with the next one. The next
    /// one says the same or is newer. Returns whether all of the report was sent, so that the supervisor can read it even
    /// if this process ends now.
    fn report(&mut self, report: &Report) -> bool {
        if *report != Report::Alive {
            trace!("keeper: {report:?}");
        }
        let Ok(line) = serde_json::to_vec(report) else { return false };
        let has_room = self.unsent.is_empty();
        if has_room {
            self.unsent.extend(line);
            self.unsent.push(b'\n');
        }
        while !self.unsent.is_empty() {
            match self.socket.try_write(&self.unsent) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(_) => return false,
            }
        }
        has_room
    }
}

/// What a keeper does after a step.
struct Step {
    report: Option<Report>,
    /// When the next step is due.
    pause: Duration,
}

/// The process of a keeper.
struct KeeperProcess {
    link: Link,
    renewals: Renewals,
}

impl KeeperProcess {
    /// Renews the lease until the keeper has to end. Returns whether it has done what it was told.
    async fn run(orders: Orders, descriptors: Vec<OwnedFd>) -> io::Result<bool> {
        let mut descriptors = descriptors.into_iter();
        let socket = descriptors.next();
        let terraform = if process::HANDLE_IS_INHERITED { descriptors.next() } else { opened(&orders) };
        let (Some(socket), Some(terraform)) = (socket, terraform) else { return Ok(false) };
        let fence = KeeperFence::of(descriptors)?;
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        let link = Link {
            socket: tokio::net::UnixStream::from_std(socket)?,
            is_abandoned: false,
            terraform: Readiness::of(terraform)?,
            unsent: Vec::new(),
            answer: ask(&orders),
            notice: None,
            interrupted: Rc::new(Cell::new(orders.interrupted)),
        };
        let Some(terms) = Terms::new(orders.length) else { return Ok(false) };
        let renewals = Renewals::new(orders, terms, fence, Rc::clone(&link.interrupted));
        let mut process = Self { link, renewals };
        if process.renewals.orders.withdraws {
            // If this process were killed instead, a command that gives it credentials would leave processes behind.
            let withdrawn = tokio::time::timeout(LAST_RENEWAL_TIMEOUT, process.renewals.withdraw()).await;
            crash_point::reached("keeper: has withdrawn");
            return Ok(withdrawn.unwrap_or(false));
        }
        // If nobody supervises terraform, the keeper ends the fuse when terraform has ended. But a stopped terraform that
        // nobody will continue must not keep its lock for ever: its fuse goes on, and ends it.
        let ending = process.renew().await;
        crash_point::reached("keeper: ends");
        if ending == Ending::TerraformEnded && process.link.is_left_alone() && process.renewals.may_end_fuse().await {
            process.renewals.end_fuse();
            crash_point::reached("keeper: ended the fuse");
        }
        Ok(true)
    }

    /// Renews the lease until the keeper has to end.
    async fn renew(&mut self) -> Ending {
        let mut due = tokio::time::Instant::now();
        loop {
            match self.link.wake(Some(due)).await {
                Wake::End(ending) => return ending,
                Wake::Due | Wake::Hurry => {}
            }
            self.renewals.note_fence();
            let before = before_renewal(KeeperSight {
                is_told_to_end: false,
                terraform_has_ended: false,
                stop_pipe_has_hung_up: self.renewals.is_stopped(),
                is_supervised: !self.link.is_abandoned,
                terraform_is_stopped: self.renewals.terraform_is_stopped(),
                is_seen_and_due: self.renewals.is_seen_and_due(),
            });
            if before == BeforeRenewal::End {
                return Ending::Left;
            }
            let mut hurries = false;
            let is_testing = Rc::clone(&self.renewals.is_testing);
            let step = {
                let step = self.renewals.step(before);
                tokio::pin!(step);
                loop {
                    tokio::select! {
                        biased;
                        wake = self.link.wake(None) => match wake {
                            Wake::End(ending) => {
                                // A test of the service puts an object and deletes it again. After it, a read may have
                                // begun, but no renewal: the keeper needs the response to the read first.
                                let is_tested = |_: &mut Context<'_>| {
                                    if is_testing.get() { Poll::Pending } else { Poll::Ready(()) }
                                };
                                tokio::select! {
                                    biased;
                                    () = std::future::poll_fn(is_tested) => {}
                                    _ = &mut step => {}
                                }
                                return ending;
                            }
                            Wake::Due | Wake::Hurry => hurries = true,
                        },
                        step = &mut step => break step,
                    }
                }
            };
            due = tokio::time::Instant::now() + if hurries { Duration::ZERO } else { step.pause };
            if let Some(report) = step.report {
                crash_point::reached("keeper: reports");
                let is_sent = self.link.report(&report);
                crash_point::reached("keeper: has reported");
                if report == Report::MayHaveRecord {
                    self.renewals.is_announced = is_sent || self.link.is_abandoned;
                    // The supervisor may be suspended and read nothing now.
                    due += if self.renewals.is_announced { Duration::ZERO } else { REPORT_PAUSE };
                }
                self.link.report_notice();
                if matches!(report, Report::NoLease(_)) {
                    return Ending::Left;
                }
            }
        }
    }
}

/// Starts the task that asks the metadata service whether this host is about to end. It shares the thread with the
/// renewals, and does nothing but wait for its few requests. `None` if nothing must be asked: an interrupted terraform is
/// not interrupted again.
fn ask(orders: &Orders) -> Option<oneshot::Receiver<Notice>> {
    let provider = orders.asks.filter(|_| orders.interrupted.is_none() && !orders.withdraws)?;
    let service = Service::of(provider, |name| std::env::var_os(name));
    let service = service.inspect_err(|reason| trace!("keeper: no metadata is asked: {reason}")).ok()?;
    let (sender, receiver) = oneshot::channel();
    tokio::spawn(async {
        let _ = sender.send(requests::first_notice(service).await);
    });
    Some(receiver)
}

/// Why a keeper ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    TerraformEnded,
    /// The supervisor wants it, or there is nothing to renew.
    Left,
}

/// The renewals of one lease.
struct Renewals {
    orders: Orders,
    terms: Terms,
    /// Terraform's process group. `None` if terraform had already ended.
    group: Option<Pid>,
    /// `None` if the records promise nothing.
    fence: Option<KeeperFence>,
    /// What the records promise. Once it is [`Promise::None`], it stays so.
    promised: Promise,
    /// A random number, which tells the records of this keeper from those of others.
    number: u64,
    /// The clients, and the part of the lock that has the record. `None` until the lock was found.
    store: Option<(Stores, StoreKey)>,
    /// The record that the lock's other part does not mention yet.
    unmentioned: Option<Record>,
    /// Whether the lock's other part was written.
    is_mentioned: bool,
    /// The lock as it was read or written last.
    lock: Option<LeasedLock>,
    /// The first response, by which a clock that stands still is noticed.
    first: Option<Response>,
    /// The last response whose time no renewal has written yet.
    last: Option<Response>,
    /// Whether the fuse has confirmed a deadline since the lock was read.
    is_armed: bool,
    /// Whether the last look, while terraform is stopped, has shown that the lock is the run's.
    is_seen: bool,
    /// When the request was sent whose time is in the last confirmed record.
    confirmed: Duration,
    history: History,
    /// Whether the supervisor was told that the lock may have a record ([`Report::MayHaveRecord`]).
    is_announced: bool,
    /// How many requests in a row were not answered.
    failures: u32,
    /// Whether a test of the service has begun and not ended.
    is_testing: Rc<Cell<bool>>,
    /// Why the last request has failed, as it was reported. `None` if it has not failed.
    reason: Option<String>,
    /// Whether the last attempt to connect has failed because there were no credentials. False if the service that
    /// issues them did not respond.
    lacks_credentials: Cell<bool>,
    /// The notice for which terraform was interrupted. `None` if it was not.
    interrupted: Rc<Cell<Option<Notice>>>,
    /// The one that the last confirmed record has.
    recorded: Option<Notice>,
}

impl Renewals {
    fn new(orders: Orders, terms: Terms, fence: Option<KeeperFence>, interrupted: Rc<Cell<Option<Notice>>>) -> Self {
        let history = History { may_have_a_record: orders.may_have_a_record, has_interrupted: false };
        // It is looked up now, because the process may be gone later.
        let group = Process::look_up(Pid::from_raw(orders.terraform)).map(|terraform| terraform.group);
        Self {
            group,
            promised: if fence.is_some() { orders.fence } else { Promise::None },
            orders,
            terms,
            fence,
            number: random(),
            store: None,
            unmentioned: None,
            is_mentioned: false,
            lock: None,
            first: None,
            last: None,
            is_armed: false,
            is_seen: false,
            confirmed: boot_clock::now(),
            history,
            is_announced: false,
            failures: 0,
            is_testing: Rc::default(),
            reason: None,
            lacks_credentials: Cell::new(false),
            interrupted,
            recorded: None,
        }
    }

    /// Writes a record that promises no fence. Returns whether that was confirmed, or the lock is gone.
    async fn withdraw(&mut self) -> bool {
        loop {
            let step = self.step(BeforeRenewal::Renew).await;
            match step.report {
                Some(Report::Renewed { .. } | Report::Lost(_)) => return true,
                Some(Report::NoLease(_)) => return false,
                _ => tokio::time::sleep(step.pause).await,
            }
        }
    }

    fn request_timeout(&self) -> Duration {
        self.terms.renewal_interval().min(MAX_REQUEST_TIMEOUT).max(Duration::from_millis(500))
    }

    /// Whether the fuse is gone, so that terraform is stopped and no renewal may be sent.
    fn is_stopped(&self) -> bool {
        // A fence that was taken down, and a record that promises nothing, stop nobody.
        self.promised == Promise::Stop && self.fence.as_ref().is_some_and(|fence| fence.stop_pipe.has_hung_up())
    }

    /// Promises nothing any more if the fence was taken down. Then `tf` was killed before it could tell the guardian. The
    /// fence is armed before the first keeper is started. A stopped terraform does not show that there is a fence: ^Z stops
    /// it, too.
    fn note_fence(&mut self) {
        if self.fence.as_ref().is_some_and(|fence| !fence.stop_pipe.is_armed()) {
            self.promised = Promise::None;
        }
    }

    /// Whether terraform is stopped, for whatever reason.
    fn terraform_is_stopped(&self) -> bool {
        let terraform = Process::look_up(Pid::from_raw(self.orders.terraform));
        terraform.is_some_and(|terraform| terraform.state == 'T')
    }

    /// Whether the last look has shown that the lock is the run's, and an interval has passed since the last renewal.
    fn is_seen_and_due(&self) -> bool {
        self.is_seen && boot_clock::now().saturating_sub(self.confirmed) >= self.terms.renewal_interval()
    }

    /// Returns the service's time in the record that was last seen in the lock. `None` if it had none.
    fn stored_time(&self) -> Option<Timestamp> {
        self.lock.as_ref()?.record.as_ref()?.as_ref().ok()?.renewed_at()
    }

    /// Sends the next request.
    async fn step(&mut self, before: BeforeRenewal) -> Step {
        match self.next_request(before).await {
            Ok(step) => {
                if !matches!(step.report, Some(Report::Looked { look: Look::Unknown, .. })) {
                    (self.failures, self.reason) = (0, None);
                }
                step
            }
            Err((answer, reason)) => self.failed(answer, reason),
        }
    }

    /// Reads the lock of a stopped terraform.
    async fn look(&mut self) -> Step {
        (self.last, self.is_armed, self.is_seen) = (None, false, false);
        crash_point::reached("keeper: looks");
        let (look, loss, reason) = match self.read().await {
            Ok(None) => (Look::Ours, None, String::new()),
            Ok(Some(loss)) => (Look::Lost, Some(loss), String::new()),
            Err((answer, reason)) => {
                let pause = self.retry_pause(answer).min(MAX_CREDENTIALS_PAUSE_WHILE_STOPPED);
                return Step { report: Some(Report::Looked { look: Look::Unknown, loss: None, reason }), pause };
            }
        };
        self.is_seen = look == Look::Ours;
        Step { report: Some(Report::Looked { look, loss, reason }), pause: jittered(LOOK_INTERVAL, random()) }
    }

    async fn next_request(&mut self, before: BeforeRenewal) -> Result<Step, (Answer, String)> {
        if before == BeforeRenewal::Look {
            return Ok(self.look().await);
        }
        if let Some(record) = self.unmentioned.take() {
            crash_point::reached("keeper: between the two parts");
            self.mention(&record).await;
            crash_point::reached("keeper: has written both parts");
            // This step may have been the one that should have recorded an interrupt.
            let is_recorded = self.recorded == self.interrupted.get();
            let pause = if is_recorded { self.until_next_renewal() } else { Duration::ZERO };
            return Ok(Step { report: None, pause });
        }
        let is_outdated = |last| keeper::is_outdated(self.terms, last, boot_clock::now());
        if self.last.is_none_or(is_outdated)
            && let Some(loss) = self.read().await?
        {
            return Ok(self.lost(loss));
        }
        let Some(last) = self.last else {
            return Err((Answer::Refused, "the service does not say its time".to_owned()));
        };
        let first = *self.first.get_or_insert(last);
        let latest = self.stored_time();
        self.promised = keeper::fence(self.promised, first, last, latest);
        let NextRenewal { renewal, deadline } =
            next_renewal(self.terms, last, boot_clock::now(), self.promised, latest);
        let has_fuse = before != BeforeRenewal::RenewForTheStopped;
        if self.promised == Promise::Stop && has_fuse && !self.is_armed {
            crash_point::reached("keeper: arms the fuse");
            match self.arm_first(deadline).await {
                Some(answer) if answer.deadline.is_some() => {
                    self.is_armed = true;
                    crash_point::reached("keeper: armed the fuse");
                }
                // A fuse without a timer stops nobody, so the record must not promise a fence.
                Some(_) => self.promised = Promise::None,
                // If the fuse is gone, the next step looks at the lock.
                None => {
                    let report = (!self.is_stopped()).then_some(Report::FuseSilent);
                    return Ok(Step { report, pause: FUSE_PAUSE });
                }
            }
        }
        if !self.history.may_have_a_record && !self.is_announced && !self.orders.withdraws {
            return Ok(Step { report: Some(Report::MayHaveRecord), pause: Duration::ZERO });
        }
        let (Some((stores, key)), Some(lock)) = (&self.store, &self.lock) else {
            return Err((Answer::None, "the lock was not read".to_owned()));
        };
        let mut record = Record::new(&self.orders.lock, self.terms, renewal, self.promised);
        (record.keeper, record.region, record.holder) =
            (self.number, stores.region().to_owned(), self.orders.holder.clone());
        let interrupted = self.interrupted.get();
        record.interrupted = interrupted.map(Interruption::from);
        crash_point::reached("keeper: renews");
        let sent = boot_clock::now();
        // From here on a record may be stored, even if no response arrives.
        let had_record = std::mem::replace(&mut self.history.may_have_a_record, true);
        let renewed = within(self.request_timeout(), stores.renew(key, lock, &record)).await;
        let read = boot_clock::now();
        crash_point::reached("keeper: has a response");
        let (seen, answer) = match renewed {
            Ok(Renewed::Yes(seen)) => {
                self.recorded = interrupted;
                (seen, Answer::Renewed)
            }
            Ok(Renewed::Overtaken(seen)) if !self.is_confirmed_by(&record, &seen) => {
                // The next renewal is newer.
                self.last = seen.date.map(|date| Response { sent, read, date });
                self.lock = seen.lock;
                return Err((Answer::None, "the stored record is of a later time, or promises more".to_owned()));
            }
            // A record that was overtaken by another keeper's is as good: the stored one is at least as new.
            Ok(Renewed::Before(seen) | Renewed::Overtaken(seen)) => (seen, Answer::RenewedBefore),
            Ok(Renewed::Lost(seen)) => (seen, Answer::Lost),
            Err(failure) => {
                let answer = answer(&failure);
                // The service has refused this request, so it has stored nothing.
                self.history.may_have_a_record = had_record || answer.0 != Answer::Refused;
                self.forget_connection_after(&failure);
                return Err(answer);
            }
        };
        self.last = seen.date.map(|date| Response { sent, read, date });
        if after_answer(self.terms, self.history, answer, Duration::ZERO) == KeeperStep::ReportLoss {
            return Ok(self.lost(loss(&self.orders.lock, seen.lock.as_ref()).unwrap_or(Loss::Gone)));
        }
        self.lock = seen.lock;
        let mut step = self.confirmed(last, deadline, has_fuse).await;
        if !has_fuse {
            step.pause = jittered(LOOK_INTERVAL, random());
        }
        if !std::mem::replace(&mut self.is_mentioned, true) {
            // The report goes first.
            self.unmentioned = Some(record);
            step.pause = Duration::ZERO;
        }
        Ok(step)
    }

    /// Writes into the lock's other part, if there is one, that the lock has a lease. Nothing depends on that, so it is
    /// tried once.
    async fn mention(&self, record: &Record) {
        let Some((stores, key)) = &self.store else { return };
        for location in self.orders.places.iter().filter_map(LockLocation::of_json) {
            let parts = location.store_keys(stores);
            let [first, object] = parts.as_slice() else { continue };
            if first != key {
                continue;
            }
            self.is_testing.set(true);
            // The next renewal waits for all of this: the test, the delete of its object, and the write.
            let limit = self.request_timeout() / 4;
            let treatment = stores.treatment_of_renewals(object, limit).await;
            self.is_testing.set(false);
            if treatment != Some(IfMatch::Obeyed) {
                trace!("keeper: the lock's object cannot mention the lease: {treatment:?}");
                continue;
            }
            match within(limit * 2, Box::pin(stores.fill_info(object, record))).await {
                Ok(()) => trace!("keeper: the lock's object mentions the lease"),
                Err(failure) => trace!("keeper: the lock's object does not mention the lease: {failure}"),
            }
        }
    }

    fn until_next_renewal(&self) -> Duration {
        jittered(self.terms.renewal_interval(), random())
    }

    /// Whether the record of another keeper, which `seen` has, confirms a renewal of this one, with the record `sent`.
    fn is_confirmed_by(&self, sent: &Record, seen: &LeaseRead) -> bool {
        let stored = seen.lock.as_ref().and_then(|lock| lock.record.as_ref()?.as_ref().ok());
        stored.is_none_or(|stored| {
            sent.is_at_most(stored) && keeper::is_confirmed_by_another(self.promised, stored.fence)
        })
    }

    /// Notes that the service has stored a record with the time in `last`, and tells the fuse the deadline that follows.
    /// `has_fuse`: there was a fuse when the renewal was sent. A later fuse gets no deadline from it: that fuse waits for a
    /// renewal of its own.
    async fn confirmed(&mut self, last: Response, deadline: Duration, has_fuse: bool) -> Step {
        self.confirmed = last.sent;
        self.history.has_interrupted = false;
        let fuse = if self.promised == Promise::Stop && has_fuse { self.arm(deadline).await } else { None };
        crash_point::reached("keeper: told the deadline");
        // `tf` continues a stopped terraform only after the answer of its new fuse. Another keeper may have read it, or it may
        // come late.
        let lacks_answer = self.promised == Promise::Stop && has_fuse && fuse.is_none() && self.terraform_is_stopped();
        self.is_armed &= !lacks_answer;
        let pause = if lacks_answer { FUSE_PAUSE } else { self.until_next_renewal() };
        let fuse = fuse.filter(|answer| answer.deadline.is_some()).map(|answer| answer.fuse);
        let report = Report::Renewed { fence: self.promised, fuse };
        Step { report: Some(report), pause }
    }

    /// Sends the fuse the deadline of a confirmed renewal, and returns its answer. `None` if it does not answer.
    async fn arm(&self, deadline: Duration) -> Option<fuse::Answer> {
        tokio::time::timeout(FUSE_TIMEOUT, self.fence.as_ref()?.arm(deadline)).await.ok()?
    }

    /// Makes sure that the fuse has a deadline, before the first renewal is sent. Returns its answer. `None` if it does
    /// not answer.
    async fn arm_first(&self, deadline: Duration) -> Option<fuse::Answer> {
        tokio::time::timeout(FUSE_TIMEOUT, self.fence.as_ref()?.arm_first(deadline)).await.ok()?
    }

    fn lost(&mut self, loss: Loss) -> Step {
        self.last = None;
        Step { report: Some(Report::Lost(loss)), pause: self.terms.renewal_interval() }
    }

    fn failed(&mut self, answer: Answer, reason: String) -> Step {
        trace!("keeper: {answer:?}: {reason}");
        let pause = self.retry_pause(answer);
        let unconfirmed = boot_clock::now().saturating_sub(self.confirmed);
        let report = match after_answer(self.terms, self.history, answer, unconfirmed) {
            KeeperStep::GiveUp => Some(Report::NoLease(reason)),
            KeeperStep::InterruptTerraform => {
                self.history.has_interrupted = true;
                Some(Report::Refused(reason))
            }
            KeeperStep::TellDeadline | KeeperStep::Retry | KeeperStep::ReportLoss => {
                let is_new = self.reason.replace(reason.clone()).as_ref() != Some(&reason);
                is_new.then_some(Report::Failed(reason))
            }
        };
        Step { report, pause }
    }

    /// Counts a failed request, and returns how long to wait before the next one.
    fn retry_pause(&mut self, answer: Answer) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let setback = match answer {
            _ if self.lacks_credentials.get() => Setback::Credentials,
            Answer::Busy => Setback::Busy,
            _ => Setback::Failed,
        };
        keeper::retry_pause(self.terms, self.failures, setback, random())
    }

    /// Reads the lock. Returns how it was lost. `None` if it is the run's.
    async fn read(&mut self) -> Result<Option<Loss>, (Answer, String)> {
        if self.store.is_none() {
            self.store = Some(self.find().await?);
            crash_point::reached("keeper: is connected");
        }
        let Some((stores, key)) = &self.store else { return Err((Answer::None, "no place".to_owned())) };
        let sent = boot_clock::now();
        let mut seen = within(self.request_timeout(), stores.read_lease(key)).await;
        if matches!(&seen, Ok(seen) if seen.lock.is_none()) {
            // A single response proves nothing: a proxy may have sent it.
            seen = within(self.request_timeout(), stores.read_lease(key)).await;
        }
        let seen = match seen {
            Ok(seen) => seen,
            Err(failure) => {
                self.forget_connection_after(&failure);
                return Err(answer(&failure));
            }
        };
        let read = boot_clock::now();
        crash_point::reached("keeper: has read");
        self.last = seen.date.map(|date| Response { sent, read, date });
        if seen.lock.as_ref().is_some_and(|lock| lock.stored.info().is_none()) {
            return Err((Answer::None, "something that is not a lock is in its place".to_owned()));
        }
        let loss = loss(&self.orders.lock, seen.lock.as_ref());
        self.lock = seen.lock;
        Ok(loss)
    }

    /// Finds the place that holds the lock, and connects to its service.
    async fn find(&self) -> Result<(Stores, StoreKey), (Answer, String)> {
        let mut reason = (Answer::Refused, "the place of the lock is not known".to_owned());
        for location in self.orders.places.iter().filter_map(LockLocation::of_json) {
            let stores = match Stores::connect(&location.backend, Purpose::Work).await {
                Ok(stores) => stores,
                Err(unreachable) => {
                    // The next attempt asks for credentials again, because their source may work again by then.
                    connect::forget_credentials(&location.backend);
                    let is_silent = matches!(unreachable, Unreachable::Silent(_));
                    let answer = if is_silent { Answer::None } else { Answer::Refused };
                    reason = (answer, unreachable.to_string());
                    self.lacks_credentials.set(!is_silent);
                    continue;
                }
            };
            self.lacks_credentials.set(false);
            // The item has the record if there is one.
            let Some(key) = location.store_keys(&stores).into_iter().next() else { continue };
            self.is_testing.set(true);
            let treatment = stores.treatment_of_renewals(&key, MAX_REQUEST_TIMEOUT).await;
            self.is_testing.set(false);
            match treatment {
                Some(IfMatch::Obeyed) => {}
                // A renewal could bring back a lock that was deleted meanwhile.
                Some(IfMatch::Ignored) => {
                    reason = (Answer::Refused, "the service ignores the condition of a renewal (If-Match)".to_owned());
                    continue;
                }
                None => {
                    let text = "the service has not answered whether it obeys the condition of a renewal (If-Match)";
                    reason = (Answer::None, text.to_owned());
                    continue;
                }
                Some(IfMatch::Unknown) => {
                    let text = "it is not known whether the service obeys the condition of a renewal (If-Match)";
                    reason = (Answer::Refused, text.to_owned());
                    continue;
                }
            }
            if self.orders.places.len() == 1 {
                return Ok((stores, key));
            }
            match within(self.request_timeout(), stores.read(&key)).await {
                Ok(found) => {
                    if found.and_then(|found| found.info()).is_some_and(|info| info.id == self.orders.lock) {
                        return Ok((stores, key));
                    }
                }
                Err(failure) => reason = answer(&failure),
            }
        }
        Err(reason)
    }

    /// If new credentials may help, makes the next attempt connect anew.
    fn forget_connection_after(&mut self, failure: &Failure) {
        if matches!(failure.cause(), Cause::NoAnswer | Cause::Passing | Cause::Busy) {
            return;
        }
        // The lock is read anew over the new connection.
        (self.store, self.last, self.lock, self.is_armed) = (None, None, None, false);
        for location in self.orders.places.iter().filter_map(LockLocation::of_json) {
            connect::forget_credentials(&location.backend);
        }
    }

    /// Whether the fuse of a run can end whose terraform has ended, and of which only keeper and fuse are left. What
    /// terraform has left in its group goes on then.
    ///
    /// If the group is empty, there is nothing to stop. If the lock is gone, it was released, so terraform ended well or a
    /// person knows better. But as long as the lock stands, its record promises others that nothing of the run goes on
    /// after the lease: so the fuse stays, and its end kills the group in time. Waits until the group is empty, the lock is
    /// gone, or the fuse is.
    async fn may_end_fuse(&mut self) -> bool {
        let mut lock_stands = false;
        loop {
            if self.group.is_some_and(is_empty) {
                return true;
            }
            let pause = match if lock_stands { Ok(None) } else { self.read().await } {
                Ok(Some(_)) => return true,
                Ok(None) => {
                    lock_stands = true;
                    GROUP_INTERVAL
                }
                Err((answer, _)) => self.retry_pause(answer),
            };
            if self.fence.as_ref().is_none_or(|fence| fence.stop_pipe.has_hung_up()) {
                return false;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Ends the fuse of a run of which only keeper and fuse are left. The fuse disarms both pipes.
    fn end_fuse(&self) {
        if let Some(fence) = &self.fence {
            let _ = fuse::send_over(&fence.socket);
        }
    }
}

/// How often to check whether a process is left in the group of a terraform that has ended.
const GROUP_INTERVAL: Duration = Duration::from_millis(500);

/// Whether no process of the group runs. A zombie does nothing, and in a container whose first process reaps nobody it stays
/// for ever. Without a process list, a zombie counts as running.
fn is_empty(group: Pid) -> bool {
    if process::list() == ProcessList::Available {
        return !Process::all().iter().any(|process| process.group == group && !process.is_dead());
    }
    killpg(group, None) == Err(Errno::ESRCH)
}

/// How long the fuse may take to answer.
const FUSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a keeper holds of the fence.
struct KeeperFence {
    socket: PacketSocket,
    /// The same socket, to wait for it.
    answers: Readiness,
    stop_pipe: HangupPipe,
    /// Not used: see [`Inherited`].
    _kill_pipe: OwnedFd,
}

impl KeeperFence {
    /// Takes the descriptors. `None` if there are none.
    fn of(mut descriptors: impl Iterator<Item = OwnedFd>) -> io::Result<Option<Self>> {
        let (Some(socket), Some(stop_pipe), Some(kill_pipe)) =
            (descriptors.next(), descriptors.next(), descriptors.next())
        else {
            return Ok(None);
        };
        let answers = Readiness::of(socket.try_clone()?)?;
        let stop_pipe = HangupPipe::from_read_end(stop_pipe);
        Ok(Some(Self { socket: socket.into(), answers, stop_pipe, _kill_pipe: kill_pipe }))
    }

    /// Sends the fuse the deadline of a confirmed renewal, and waits for the answer to it or to a later one.
    async fn arm(&self, deadline: Duration) -> Option<fuse::Answer> {
        fuse::send_deadline(&self.socket, deadline).ok()?;
        self.answer(|answer| answer.deadline.is_none_or(|armed| armed >= deadline)).await
    }

    /// Sends the fuse the deadline of a renewal that is about to be sent, and waits for an answer.
    async fn arm_first(&self, deadline: Duration) -> Option<fuse::Answer> {
        fuse::send_first_deadline(&self.socket, deadline).ok()?;
        self.answer(|_| true).await
    }

    async fn answer(&self, is_awaited: impl Fn(&fuse::Answer) -> bool) -> Option<fuse::Answer> {
        loop {
            let mut ready = self.answers.readable().await.ok()?;
            // The runtime never clears the end of a socket, so only this call notices it.
            match fuse::receive_answer(&self.socket).ok()? {
                Some(answer) if is_awaited(&answer) => return Some(answer),
                Some(_) => {}
                None => ready.clear_ready(),
            }
        }
    }
}

/// How often a keeper looks at the lock while terraform is stopped.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Returns how the lock `id` was lost, if `lock` is stored in its place. `None` if it was not lost.
fn loss(id: &str, lock: Option<&LeasedLock>) -> Option<Loss> {
    let Some(lock) = lock else { return Some(Loss::Gone) };
    let info = lock.stored.info()?;
    if info.id != id {
        return Some(Loss::Another { who: info.who, created: info.created });
    }
    match &lock.record {
        Some(Ok(Record { taken: Some(claim), .. })) => Some(Loss::Claimed(claim.clone())),
        _ => None,
    }
}

/// Returns what a failed request means for the lease.
fn answer(failure: &Failure) -> (Answer, String) {
    let answer = match failure.cause() {
        Cause::NoAnswer | Cause::Passing => Answer::None,
        Cause::Busy => Answer::Busy,
        _ => Answer::Refused,
    };
    (answer, failure.to_string())
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let late = || Err(Failure::no_answer("AWS", "the service has not answered in time"));
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| late())
}

/// Returns `interval`, changed by at most a tenth, so that the runs of a fleet do not renew at the same moment. `random`
/// is any number.
fn jittered(interval: Duration, random: u64) -> Duration {
    let permille = u32::try_from(900 + random % 201).unwrap_or(1000);
    interval * permille / 1000
}

/// Returns a random number.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // Each `RandomState` has new random keys.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
