//! The renewals of one lease: sends one request after another, and tells the fuse what follows from the responses.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use jiff::Timestamp;
use nix::errno::Errno;
use nix::sys::signal::killpg;
use nix::unistd::Pid;

use super::keeper_fence::{FUSE_TIMEOUT, KeeperFence};
use super::{Orders, Report};
use crate::aws::connect;
use crate::aws::credentials::Purpose;
use crate::aws::failure::{Cause, Failure};
use crate::aws::identity::AccountIdentity;
use crate::aws::settings::Unreachable;
use crate::cleanup::messages::release::ANOTHER_ACCOUNT;
use crate::lease::fence::{Look, Loss, Withdrawal};
use crate::lease::keeper::{
    self, Answer, BeforeRenewal, History, KeeperStep, NextRenewal, Response, Setback, after_answer, next_renewal,
};
use crate::lease::notice::Notice;
use crate::lease::record::{Interruption, Promise, Record};
use crate::lease::terms::Terms;
use crate::lock::leased::{LeaseRead, LeasedLock, Renewed};
use crate::lock::location::LockLocation;
use crate::lock::probe::IfMatch;
use crate::lock::reached::{self, NothingFound};
use crate::lock::release::SERVICE_TIMEOUT;
use crate::lock::stores::{StoreKey, Stores};
use crate::supervise::fuse;
use crate::sys::boot_clock;
use crate::sys::process::{self, Process, ProcessList};
use crate::trace::trace;
use crate::{crash_point, random};

/// The longest time for one request. A request that takes longer counts as unanswered. It may still arrive.
const MAX_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait before the next step after the fuse has not answered.
const FUSE_PAUSE: Duration = Duration::from_millis(250);

/// The longest pause after the source of the credentials has failed while terraform is stopped: a person may have
/// logged in again.
const MAX_CREDENTIALS_PAUSE_WHILE_STOPPED: Duration = Duration::from_secs(15);

/// What a keeper does after a step.
pub(super) struct Step {
    pub(super) report: Option<Report>,
    /// When the next step is due.
    pub(super) pause: Duration,
}

/// The renewals of one lease.
pub(super) struct Renewals {
    pub(super) orders: Orders,
    terms: Terms,
    /// Terraform's process group. `None` if terraform had already ended.
    group: Option<Pid>,
    /// `None` if the records promise nothing.
    fence: Option<KeeperFence>,
    /// What the records promise. Once it is [`Promise::None`], it stays so.
    promised: Promise,
    /// A random number, which tells the records of this keeper from those of others.
    number: u64,
    /// `None` until the lock's place was found.
    connection: Option<Connection>,
    /// Whether there was a connection before this one.
    has_connected: bool,
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
    pub(super) is_announced: bool,
    /// How many requests in a row were not answered.
    failures: u32,
    /// Whether a test of the service has begun and not ended.
    pub(super) is_testing: Rc<Cell<bool>>,
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
    pub(super) fn new(
        orders: Orders,
        terms: Terms,
        fence: Option<KeeperFence>,
        interrupted: Rc<Cell<Option<Notice>>>,
    ) -> Self {
        let history = History { may_have_a_record: orders.may_have_a_record, has_interrupted: false };
        // It is looked up now, because the process may be gone later.
        let group = Process::look_up(Pid::from_raw(orders.terraform)).map(|terraform| terraform.group);
        Self {
            group,
            promised: if fence.is_some() { orders.fence } else { Promise::None },
            orders,
            terms,
            fence,
            number: random::number(),
            connection: None,
            has_connected: false,
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

    /// Writes a record that promises no fence.
    pub(super) async fn withdraw(&mut self) -> Withdrawal {
        loop {
            let step = self.step(BeforeRenewal::Renew).await;
            match step.report {
                Some(Report::Renewed { .. }) => return Withdrawal::Done,
                Some(Report::Lost(_)) => return Withdrawal::NoLock,
                Some(Report::NoLease(_)) => return Withdrawal::Failed,
                _ => tokio::time::sleep(step.pause).await,
            }
        }
    }

    fn request_timeout(&self) -> Duration {
        self.terms.renewal_interval().min(MAX_REQUEST_TIMEOUT).max(Duration::from_millis(500))
    }

    /// Whether the fuse is gone, so that terraform is stopped and no renewal may be sent.
    pub(super) fn is_stopped(&self) -> bool {
        // A fence that was taken down, and a record that promises nothing, stop nobody.
        self.promised == Promise::Stop && self.fence.as_ref().is_some_and(|fence| fence.stop_pipe.has_hung_up())
    }

    /// Promises nothing any more if the fence was taken down. Then `tf` was killed before it could tell the guardian.
    /// The fence is armed before the first keeper is started. A stopped terraform does not show that there is a fence:
    /// ^Z stops it, too.
    pub(super) fn note_fence(&mut self) {
        if self.fence.as_ref().is_some_and(|fence| !fence.stop_pipe.is_armed()) {
            self.promised = Promise::None;
        }
    }

    /// Whether terraform is stopped, for whatever reason.
    pub(super) fn terraform_is_stopped(&self) -> bool {
        let terraform = Process::look_up(Pid::from_raw(self.orders.terraform));
        terraform.is_some_and(|terraform| terraform.state == 'T')
    }

    /// Whether the last look has shown that the lock is the run's, and an interval has passed since the last renewal.
    pub(super) fn is_seen_and_due(&self) -> bool {
        self.is_seen && boot_clock::now().saturating_sub(self.confirmed) >= self.terms.renewal_interval()
    }

    /// Returns the service's time in the record that was last seen in the lock. `None` if it had none.
    fn stored_time(&self) -> Option<Timestamp> {
        self.lock.as_ref()?.record.as_ref()?.as_ref().ok()?.renewed_at()
    }

    /// Sends the next request.
    pub(super) async fn step(&mut self, before: BeforeRenewal) -> Step {
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
        Step { report: Some(Report::Looked { look, loss, reason }), pause: jittered(LOOK_INTERVAL, random::number()) }
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
        let next = next_renewal(self.terms, last, boot_clock::now(), self.promised, latest);
        let has_fuse = before != BeforeRenewal::RenewForTheStopped;
        if self.promised == Promise::Stop
            && has_fuse
            && !self.is_armed
            && let Err(step) = self.arm_before_renewal(next.deadline).await
        {
            return Ok(step);
        }
        if !self.history.may_have_a_record && !self.is_announced && !self.orders.withdraws {
            return Ok(Step { report: Some(Report::MayHaveRecord), pause: Duration::ZERO });
        }
        self.renew(last, next, has_fuse).await
    }

    /// Makes sure that the fuse has a deadline, before the first renewal is sent. A fuse without a timer stops nobody,
    /// so the records promise no fence then.
    ///
    /// # Errors
    /// The fuse does not answer, so no renewal may be sent. The value is what to do instead. If the fuse is gone, the
    /// next step looks at the lock.
    async fn arm_before_renewal(&mut self, deadline: Duration) -> Result<(), Step> {
        crash_point::reached("keeper: arms the fuse");
        match self.arm_first(deadline).await {
            Some(answer) if answer.deadline.is_some() => {
                self.is_armed = true;
                crash_point::reached("keeper: armed the fuse");
            }
            Some(_) => self.promised = Promise::None,
            None => {
                let report = (!self.is_stopped()).then_some(Report::FuseSilent);
                return Err(Step { report, pause: FUSE_PAUSE });
            }
        }
        Ok(())
    }

    /// Sends the renewal `next`, which follows from the response `last`. `has_fuse`: there is a fuse.
    async fn renew(&mut self, last: Response, next: NextRenewal, has_fuse: bool) -> Result<Step, (Answer, String)> {
        let (Some(Connection { stores, key, .. }), Some(lock)) = (&self.connection, &self.lock) else {
            return Err((Answer::None, "the lock was not read".to_owned()));
        };
        let mut record = Record::new(&self.orders.lock, self.terms, next.renewal, self.promised);
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
            // A stored record of another keeper confirms this renewal, because it is at least as new.
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
        let mut step = self.confirmed(sent, last, next.deadline, has_fuse).await;
        if !has_fuse {
            step.pause = jittered(LOOK_INTERVAL, random::number());
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
        let Some(Connection { stores, key, .. }) = &self.connection else { return };
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
        jittered(self.terms.renewal_interval(), random::number())
    }

    /// Whether the record of another keeper, which `seen` has, confirms a renewal of this one, with the record `sent`.
    fn is_confirmed_by(&self, sent: &Record, seen: &LeaseRead) -> bool {
        let stored = seen.lock.as_ref().and_then(|lock| lock.record.as_ref()?.as_ref().ok());
        stored.is_none_or(|stored| {
            sent.is_at_most(stored) && keeper::is_confirmed_by_another(self.promised, stored.fence)
        })
    }

    /// Notes that the service has stored a record with the time in `last`, after a request that was sent at `sent`, and
    /// tells the fuse the deadline that follows. `has_fuse`: there was a fuse when the renewal was sent. A later fuse
    /// gets no deadline from it: that fuse waits for a renewal of its own.
    async fn confirmed(&mut self, sent: Duration, last: Response, deadline: Duration, has_fuse: bool) -> Step {
        self.confirmed = last.sent;
        self.history.has_interrupted = false;
        let fuse = if self.promised == Promise::Stop && has_fuse { self.arm(deadline).await } else { None };
        crash_point::reached("keeper: told the deadline");
        // `tf` continues a stopped terraform only after the answer of its new fuse. Another keeper may have read it, or
        // it may come late.
        let lacks_answer = self.promised == Promise::Stop && has_fuse && fuse.is_none() && self.terraform_is_stopped();
        self.is_armed &= !lacks_answer;
        let pause = if lacks_answer { FUSE_PAUSE } else { self.until_next_renewal() };
        let fuse = fuse.and_then(|answer| Some((answer.fuse, answer.deadline?)));
        let report = Report::Renewed { fence: self.promised, sent, fuse };
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
        keeper::retry_pause(self.terms, self.failures, setback, random::number())
    }

    /// Reads the lock. Returns how it was lost. `None` if it is the run's.
    async fn read(&mut self) -> Result<Option<Loss>, (Answer, String)> {
        if self.connection.is_none() {
            self.connection = Some(self.find().await?);
            crash_point::reached("keeper: is connected");
        }
        let Some(Connection { stores, key, .. }) = &self.connection else {
            return Err((Answer::None, "no place".to_owned()));
        };
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
        if matches!(loss, Some(Loss::Gone | Loss::Another { .. })) && !self.is_lost().await {
            self.forget_connection();
            return Err((Answer::Refused, ANOTHER_ACCOUNT.to_owned()));
        }
        if let (None | Some(Loss::Claimed(_)), Some(connection)) = (&loss, &mut self.connection) {
            connection.has_seen_lock = true;
        }
        Ok(loss)
    }

    /// Whether the lock is lost of which a read over the current connection has found nothing. The credentials may
    /// belong to another account by now, because a person has logged in there: that account can have a table of the
    /// same name, without the lock ([`reached`]).
    async fn is_lost(&self) -> bool {
        let Some(connection) = &self.connection else { return false };
        let location = self.orders.places.get(connection.place).and_then(LockLocation::of_json);
        let (Some(location), Some(then)) = (location, self.orders.identities.get(connection.place)) else {
            return false;
        };
        let shows = Box::pin(reached::what_nothing_shows(then, &connection.identity, &location));
        let shows = tokio::time::timeout(SERVICE_TIMEOUT, shows).await.unwrap_or(NothingFound::Nothing);
        let is_first = !self.has_connected && !self.orders.may_have_a_record;
        is_lost(shows, connection.has_seen_lock || is_first)
    }

    /// Finds the place that holds the lock, and connects to its service.
    async fn find(&self) -> Result<Connection, (Answer, String)> {
        let mut reason = (Answer::Refused, "the place of the lock is not known".to_owned());
        for (place, location) in self.orders.places.iter().enumerate() {
            let Some(location) = LockLocation::of_json(location) else { continue };
            let identity = AccountIdentity::now(&self.orders.lock, &location.backend);
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
            if AccountIdentity::now(&self.orders.lock, &location.backend) != identity {
                // A person has logged in meanwhile, so it is not known which of the two the connection has.
                connect::forget_credentials(&location.backend);
                reason = (Answer::None, "the credentials changed while tf connected".to_owned());
                continue;
            }
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
                return Ok(Connection { stores, key, place, has_seen_lock: false, identity });
            }
            match within(self.request_timeout(), stores.read(&key)).await {
                Ok(found) => {
                    if found.and_then(|found| found.info()).is_some_and(|info| info.id == self.orders.lock) {
                        return Ok(Connection { stores, key, place, has_seen_lock: true, identity });
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
        self.forget_connection();
    }

    /// Makes the next attempt connect anew. The lock is read anew then.
    fn forget_connection(&mut self) {
        self.has_connected = true;
        (self.connection, self.last, self.lock, self.is_armed) = (None, None, None, false);
        for location in self.orders.places.iter().filter_map(LockLocation::of_json) {
            connect::forget_credentials(&location.backend);
        }
    }

    /// Whether the fuse of a run can end whose terraform has ended, and of which only keeper and fuse are left. What
    /// terraform has left in its group goes on then.
    ///
    /// If the group is empty, there is nothing to stop. If the lock is gone, terraform has ended well, or a person has
    /// deleted it. But as long as the lock is there, its record promises others that nothing of the run goes on after
    /// the lease: so the fuse stays, and its end kills the group in time. Returns true when the group is empty or a
    /// read shows that the lock is gone, and false when the fuse has ended. After a read that shows the lock, this
    /// looks at the group alone.
    ///
    /// If no record can have been stored, nothing is promised. The fuse has no deadline yet then, and would stay as
    /// long as a process of the group.
    pub(super) async fn may_end_fuse(&mut self) -> bool {
        if !self.history.may_have_a_record && !self.is_announced {
            return true;
        }
        let mut is_lock_there = false;
        loop {
            if self.group.is_some_and(is_empty) {
                return true;
            }
            let pause = match if is_lock_there { Ok(None) } else { self.read().await } {
                Ok(Some(_)) => return true,
                Ok(None) => {
                    is_lock_there = true;
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
    pub(super) fn end_fuse(&self) {
        if let Some(fence) = &self.fence {
            let _ = fuse::send_over(&fence.socket);
        }
    }
}

/// A connection to the service that has the lock.
struct Connection {
    stores: Stores,
    /// The part of the lock that has the record.
    key: StoreKey,
    /// The place of the lock, as an index of [`Orders::places`].
    place: usize,
    /// Whether the lock was seen over this connection.
    has_seen_lock: bool,
    /// The identity that it has. Its credentials do not change when a person logs in later.
    identity: AccountIdentity,
}

/// Decides whether a run has lost its lock if a read has not found it. `shows` is what that shows for the account of
/// the run. `is_of_the_run` is whether the connection has read the lock before, or is the first one for this lock, so
/// that its settings are those with which terraform has just got the lock. That decides if no account is known: for
/// example, a `credential_process` says none.
fn is_lost(shows: NothingFound, is_of_the_run: bool) -> bool {
    match shows {
        NothingFound::IsGone => true,
        NothingFound::Nothing => false,
        NothingFound::UnknownAccount => is_of_the_run,
    }
}

/// How often to check whether a process is left in the group of a terraform that has ended.
const GROUP_INTERVAL: Duration = Duration::from_millis(500);

/// Whether no process of the group runs. A zombie does nothing, and in a container whose first process reaps nobody it
/// stays for ever. Without a process list, a zombie counts as running.
fn is_empty(group: Pid) -> bool {
    if process::list() == ProcessList::Available {
        return !Process::all().iter().any(|process| process.group == group && !process.is_dead());
    }
    killpg(group, None) == Err(Errno::ESRCH)
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

/// Returns `interval`, changed by at most a tenth, so that the runs of a fleet do not renew at the same moment.
/// `random` is any number.
fn jittered(interval: Duration, random: u64) -> Duration {
    let permille = u32::try_from(900 + random % 201).unwrap_or(1000);
    interval * permille / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_not_found_is_lost_only_in_the_account_of_the_run() {
        for (shows, is_of_the_run, expected) in [
            (NothingFound::IsGone, false, true),
            (NothingFound::IsGone, true, true),
            (NothingFound::Nothing, false, false),
            (NothingFound::Nothing, true, false),
            (NothingFound::UnknownAccount, false, false),
            (NothingFound::UnknownAccount, true, true),
        ] {
            assert_eq!(is_lost(shows, is_of_the_run), expected, "{shows:?} {is_of_the_run}");
        }
    }
}
