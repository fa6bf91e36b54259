//! The process of a keeper: it listens to the process that has started it, to terraform, and to the metadata service,
//! and lets [`Renewals`] send the requests.

use std::cell::Cell;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::sync::oneshot;

use super::keeper_fence::KeeperFence;
use super::renewals::Renewals;
use super::{END, INTERRUPTED, LAST_RENEWAL_TIMEOUT, Orders, PING, Report, exit_code};
use crate::cleanup::working_directory;
use crate::lease::fence::Withdrawal;
use crate::lease::keeper::{BeforeRenewal, KeeperSight, before_renewal};
use crate::lease::notice::Notice;
use crate::lease::terms::Terms;
use crate::notice::requests;
use crate::notice::service::Service;
use crate::sys::process::{self, Process, ProcessHandle};
use crate::sys::readiness::Readiness;
use crate::sys::{descriptor, environment, poll, session};
use crate::trace::trace;
use crate::{crash_point, panics, runtime};

/// The maximum length of the reports that wait for room in the socket, in bytes.
const MAX_UNSENT_BYTES: usize = 1 << 16;

/// How long to wait before a report is sent again that the supervisor must read.
const REPORT_PAUSE: Duration = Duration::from_millis(250);

/// Runs a keeper. `descriptors` are the arguments with the numbers of its descriptors, in the order of
/// [`super::Keeper::start`]. Returns its exit code: 0 if it has done what it was told.
pub(crate) fn keep(descriptors: &[OsString]) -> u8 {
    exit_code(run(descriptors))
}

fn run(descriptors: &[OsString]) -> Withdrawal {
    let numbers: Option<Vec<RawFd>> = descriptors.iter().map(|number| number.to_str()?.parse().ok()).collect();
    let Some(descriptors) = numbers.and_then(|numbers| descriptor::inherited(&numbers)) else {
        return Withdrawal::Failed;
    };
    session::become_helper(c"tf-keeper");
    crash_point::reached("keeper: begun");
    environment::unset_empty("AWS_");
    let mut orders = Vec::new();
    let _ = io::stdin().lock().take(MAX_ORDERS_BYTES).read_to_end(&mut orders);
    let Ok(orders) = serde_json::from_slice::<Orders>(&orders) else { return Withdrawal::Failed };
    working_directory::go(&orders.directory);
    crash_point::reached("keeper: has its orders");
    let ended = panics::caught(|| runtime::block_on(KeeperProcess::run(orders, descriptors)));
    let ended = ended.map(Result::flatten);
    trace!("keeper: {ended:?}");
    ended.and_then(Result::ok).unwrap_or(Withdrawal::Failed)
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
            let interest =
                if self.unsent.is_empty() { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
            let is_due = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = self.terraform.readable() => return Wake::End(Ending::TerraformEnded),
                _ = self.socket.ready(interest), if !self.is_abandoned => {
                    self.flush();
                    if let Some(wake) = self.read() {
                        return wake;
                    }
                }
                notice = announced(&mut self.answer) => {
                    self.notice = Some(notice);
                    self.report_notice();
                }
                () = is_due => return Wake::Due,
            }
        }
    }

    /// Reads one message of the supervisor, without waiting. `None` if there is none, or if it needs no wake.
    fn read(&mut self) -> Option<Wake> {
        let mut byte = [0];
        match (self.socket.try_read(&mut byte), byte[0]) {
            (Ok(1), END) => return Some(Wake::End(Ending::Left)),
            (Ok(1), PING) => drop(self.report(&Report::Alive)),
            (Ok(1), INTERRUPTED) => {
                self.interrupted.set(self.notice.take().or(self.interrupted.get()));
                return Some(Wake::Hurry);
            }
            (Ok(1), _) => return Some(Wake::Hurry),
            (Err(error), _) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => self.is_abandoned = true,
        }
        None
    }

    /// Whether the supervisor is gone, without waiting. If it died together with terraform, the end of its socket was
    /// not read yet.
    fn is_left_alone(&self) -> bool {
        self.is_abandoned || poll::has_hung_up(self.socket.as_fd())
    }

    /// Reports a notice that the supervisor has not answered. A report of it may have been lost.
    fn report_notice(&mut self) {
        if let Some(notice) = self.notice {
            self.report(&Report::Notice(notice));
        }
    }

    /// Sends a report to the supervisor, without waiting: a supervisor that is suspended reads nothing, and the lease
    /// must be renewed all the same. If the socket is full, the report is lost if a later one says the same or is newer
    /// ([`is_queued`]). Otherwise it is sent as soon as there is room. Returns whether all of the report was
    /// sent, so that the supervisor can read it even if this process ends now.
    fn report(&mut self, report: &Report) -> bool {
        if *report != Report::Alive {
            trace!("keeper: {report:?}");
        }
        let Ok(line) = serde_json::to_vec(report) else { return false };
        let has_room = self.flush();
        if has_room || (is_queued(report) && self.unsent.len() < MAX_UNSENT_BYTES) {
            self.unsent.extend(line);
            self.unsent.push(b'\n');
        }
        self.flush() && has_room
    }

    /// Sends what is left of earlier reports, without waiting. Returns whether all was sent.
    ///
    /// If nobody reads the socket any more, it stays writable, and each write fails with EPIPE. So the socket must not
    /// be waited for again: the thread would do nothing else.
    fn flush(&mut self) -> bool {
        while !self.unsent.is_empty() {
            match self.socket.try_write(&self.unsent) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(error) => {
                    self.is_abandoned |= error.kind() != io::ErrorKind::WouldBlock;
                    return false;
                }
            }
        }
        true
    }
}

/// Whether a report waits for room in the socket. No later report says the same, or only after a renewal interval.
fn is_queued(report: &Report) -> bool {
    matches!(report, Report::Lost(_) | Report::Refused(_) | Report::Failed(_))
}

/// The process of a keeper.
struct KeeperProcess {
    link: Link,
    renewals: Renewals,
}

impl KeeperProcess {
    /// Renews the lease until the keeper has to end, or withdraws its promise. [`Withdrawal::Done`] if it has done what
    /// it was told.
    async fn run(orders: Orders, descriptors: Vec<OwnedFd>) -> io::Result<Withdrawal> {
        let mut descriptors = descriptors.into_iter();
        let socket = descriptors.next();
        let terraform = if process::HANDLE_IS_INHERITED { descriptors.next() } else { opened(&orders) };
        let (Some(socket), Some(terraform)) = (socket, terraform) else { return Ok(Withdrawal::Failed) };
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
        let Some(terms) = Terms::new(orders.length) else { return Ok(Withdrawal::Failed) };
        let renewals = Renewals::new(orders, terms, fence, Rc::clone(&link.interrupted));
        let mut process = Self { link, renewals };
        if process.renewals.orders.withdraws {
            // If this process were killed instead, a command that gives it credentials would leave processes behind.
            let withdrawn = tokio::time::timeout(LAST_RENEWAL_TIMEOUT, process.renewals.withdraw()).await;
            crash_point::reached("keeper: has withdrawn");
            return Ok(withdrawn.unwrap_or(Withdrawal::Failed));
        }
        // If nobody supervises terraform, the keeper ends the fuse when terraform has ended. But a stopped terraform
        // that nobody will continue must not keep its lock for ever: its fuse goes on, and ends it.
        let ending = process.renew().await;
        crash_point::reached("keeper: ends");
        if ending == Ending::TerraformEnded && process.link.is_left_alone() && process.renewals.may_end_fuse().await {
            process.renewals.end_fuse();
            crash_point::reached("keeper: ended the fuse");
        }
        Ok(Withdrawal::Done)
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
/// renewals, and does nothing but wait for its few requests. `None` if nothing must be asked: an interrupted terraform
/// is not interrupted again.
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;
    use crate::lease::record::Promise;
    use crate::supervise::keeper::Loss;

    fn link(socket: UnixStream, terraform: OwnedFd) -> Link {
        Link {
            socket: tokio::net::UnixStream::from_std(socket).unwrap(),
            is_abandoned: false,
            terraform: Readiness::of(terraform).unwrap(),
            unsent: Vec::new(),
            answer: None,
            notice: None,
            interrupted: Rc::default(),
        }
    }

    /// Returns the reports that a supervisor reads which was suspended while `reports` were sent until its socket was
    /// full, and then `last`.
    fn read_after_a_suspension(last: &[Report]) -> Vec<Report> {
        let (own, supervisors) = UnixStream::pair().unwrap();
        own.set_nonblocking(true).unwrap();
        let (terraform, _lives) = descriptor::pipe().unwrap();
        runtime::block_on(async {
            let mut link = link(own, terraform);
            let renewed =
                Report::Renewed { fence: Promise::Stop, sent: Duration::ZERO, fuse: Some((7, Duration::ZERO)) };
            link.socket.writable().await.unwrap();
            while link.report(&renewed) {}
            for report in last {
                assert!(!link.report(report), "there is no room");
            }
            let reader = std::thread::spawn(move || {
                let lines = BufReader::new(supervisors).lines();
                lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect::<Vec<Report>>()
            });
            while !link.unsent.is_empty() {
                let soon = tokio::time::Instant::now() + Duration::from_millis(10);
                assert!(matches!(link.wake(Some(soon)).await, Wake::Due));
            }
            drop(link);
            reader.join().unwrap()
        })
        .unwrap()
    }

    #[test]
    fn a_supervisor_that_is_gone_is_not_waited_for() {
        let (own, supervisors) = UnixStream::pair().unwrap();
        own.set_nonblocking(true).unwrap();
        drop(supervisors);
        let (terraform, _lives) = descriptor::pipe().unwrap();
        runtime::block_on(async {
            let mut link = link(own, terraform);
            // The write is the first thing that shows it, before the end of the socket was waited for.
            link.socket.writable().await.unwrap();
            assert!(!link.report(&Report::Lost(Loss::Gone)) && link.is_abandoned);
            let soon = tokio::time::Instant::now() + Duration::from_millis(10);
            assert!(matches!(link.wake(Some(soon)).await, Wake::Due));
        })
        .unwrap();
    }

    #[test]
    fn a_supervisor_that_was_suspended_learns_what_is_said_only_once() {
        let once = [Report::Refused("denied".into()), Report::Failed("x".into()), Report::Lost(Loss::Gone)];
        let read = read_after_a_suspension(&once);
        assert_eq!(read[read.len() - once.len()..], once);
        // What the next one says as well is not kept.
        let read = read_after_a_suspension(&[Report::Alive, Report::Lost(Loss::Gone), Report::Alive]);
        assert_eq!(read.last(), Some(&Report::Lost(Loss::Gone)));
        assert!(!read.contains(&Report::Alive));
    }
}
