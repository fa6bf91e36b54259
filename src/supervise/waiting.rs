//! Releases the lock of a dead run while terraform waits for that lock (`-lock-timeout`), so that terraform's next
//! attempt succeeds. A run that died before this run started was normally finished before terraform started. This
//! module handles a run that dies later, and tries again to finish a run that could not be finished before.
//!
//! If the wait takes 3 s, another `tf` process says who holds the lock.
//!
//! With `TFW_LEASE`, this module also watches the lock for which terraform waits, and takes it over when its lease has
//! lapsed.
//!
//! Another `tf` process does each of these, because a process that supervises a terraform sends no request to AWS
//! before that terraform has exited. This process is the parent of that `tf`, and excludes it from terraform's tree.

use std::collections::HashMap;
use std::process::Child;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::unistd::Pid;

use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::process_tree::Tree;
use crate::cleanup::recovery::Tried;
use crate::cleanup::takeover_process::{self, Ended, Refused, TakeoverProcess};
use crate::cleanup::wait_explanation::{self, EXPLANATION_DELAY, WaitExplanation};
use crate::cleanup::waiter::Waiter;
use crate::cleanup::{messages, recovery, recovery_process};
use crate::console;
use crate::journal::state_directory::StateDirectory;
use crate::lease::terms::Terms;
use crate::terraform::log::{Log, RecordedLock};
use crate::trace::trace;

/// How long a lock request must be without a response before the journal is searched for dead runs. The same time
/// passes between two searches.
const JOURNAL_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How long to wait before a dead run that could not be finished is tried again. The lock service may be available
/// again by then.
const RETRY_INTERVAL: Duration = Duration::from_secs(15);

/// How long to wait before a dead run, or the lock of another host, is tried again if no credentials were available.
/// This is longer than [`RETRY_INTERVAL`], because each attempt requests credentials, and a few failed requests may
/// lock an account.
const CREDENTIALS_RETRY_INTERVAL: Duration = Duration::from_mins(10);

/// How long to wait before the lock of another host is tried again that could not be taken, for example because a
/// permission is missing.
const REFUSAL_RETRY_INTERVAL: Duration = Duration::from_mins(10);

/// Finishes dead runs while terraform waits for a lock, and lets the wait be explained.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// Whether dead runs may be finished. False if no lock may be released.
    recovers: bool,
    /// When to search the journal next. `None` if terraform does not wait for a lock.
    look_at: Option<Instant>,
    /// The IDs of the dead runs that `tf` tried to finish, and when each may be tried again.
    tried: HashMap<String, Instant>,
    /// The processes that are finishing a run, each with the ID of that run.
    at_work: Vec<(Child, String)>,
    /// The terms of the lease of this run. `None` if it may not take over a lock.
    takes_over: Option<Terms>,
    /// The process that watches the lock for which terraform waits. `None` if terraform does not wait for a lock.
    taker: Option<TakeoverProcess>,
    /// When to start the next one, if the last one has ended by itself.
    take_at: Option<Instant>,
    /// Until when nothing here requests credentials, because a recovery or a taker got none. `None` if none of them has
    /// failed so.
    no_credentials_until: Option<Instant>,
    /// The last lock of which one has reported that it cannot be taken. `None` if there is none.
    given_up: Option<GivenUp>,
    /// What is done to explain the wait.
    explaining: Explaining,
    /// The process that explains the wait, and the ID of the lock for which terraform waits. `None` if none was started
    /// for this wait.
    explanation: Option<(WaitExplanation, String)>,
    /// Processes that were told to end, because terraform does not wait any more, each with the time that it may need.
    ending: Vec<(Child, Duration)>,
}

/// What may be done while terraform waits for a lock, and what was done before terraform started.
#[derive(Debug, Default)]
pub(crate) struct BeforeTerraform {
    /// Whether dead runs may be finished.
    pub(crate) recovers: bool,
    /// The dead runs that could not be finished.
    pub(crate) tried: Vec<Tried>,
    /// The terms of the lease of this run. `None` if it may not take over a lock.
    pub(crate) takes_over: Option<Terms>,
    /// How the taker has ended that ran before terraform started. `None` if there was none.
    pub(crate) taker: Option<Ended>,
}

impl Waiting {
    /// Creates the state at the start of terraform.
    pub(crate) fn new(before: BeforeTerraform) -> Self {
        let BeforeTerraform { recovers, tried, takes_over, taker } = before;
        let now = Instant::now();
        let lacks_credentials =
            taker == Some(Ended::NoCredentials) || tried.iter().any(|tried| tried.lacks_credentials);
        let no_credentials_until = lacks_credentials.then(|| now + retry_interval(true));
        let given_up = taker.and_then(|ended| after_taker(ended, now).given_up);
        let tried =
            tried.into_iter().map(|Tried { run, lacks_credentials }| (run, now + retry_interval(lacks_credentials)));
        Self { recovers, tried: tried.collect(), takes_over, no_credentials_until, given_up, ..Self::default() }
    }

    /// If terraform's log shows that terraform waits for a lock, starts other `tf` processes that finish dead runs and
    /// explain the wait. Call this each time the log has been read.
    pub(crate) fn step(&mut self, log: &Log, here: &CandidateBackends, tree: &Tree) {
        let awaited = log.unreleased().find(|lock| lock.progress.held.is_none());
        if awaited.is_none() {
            self.ending.extend(self.taker.take().map(ending_taker));
        }
        if let (Some(lock), Some(attempted), Some(taker)) = (awaited, log.attempted, &mut self.taker) {
            taker.tell_whether_terraform_rests(rests(lock.progress.asked, attempted, Timestamp::now()));
        }
        self.explain(awaited, here, tree);
        self.ending.retain_mut(|(child, _)| matches!(child.try_wait(), Ok(None)));
        let next = next_search(self.look_at, awaited.is_some(), Instant::now());
        self.look_at = next.at;
        if next.is_due && self.recovers {
            self.recover_dead_runs(here, tree);
            if let Some(awaited) = awaited {
                self.watch_lease(awaited, here, tree);
            }
        }
    }

    /// Starts a process that says who holds the lock `awaited`, if that is due. Ends the process if terraform does not
    /// wait, or waits for another lock.
    fn explain(&mut self, awaited: Option<&RecordedLock>, here: &CandidateBackends, tree: &Tree) {
        let now = Instant::now();
        if let Some((process, id)) = self.explanation.take() {
            if awaited.is_some_and(|awaited| awaited.id == id) {
                self.explanation = Some((process, id));
            } else {
                self.ending.push(ending_explanation(process));
                self.explaining = Explaining::No;
            }
        }
        let no_credentials_until = self.no_credentials_until.filter(|at| *at > now);
        self.explaining = next_explaining(self.explaining, awaited.is_some(), no_credentials_until, now);
        let (Explaining::Now, Some(awaited)) = (self.explaining, awaited) else { return };
        self.explaining = match &mut self.explanation {
            Some((process, _)) => match process.ended() {
                None => Explaining::Now,
                Some(wait_explanation::Ended::Over) => Explaining::Over,
                Some(wait_explanation::Ended::CannotRead) => {
                    self.explanation = None;
                    Explaining::At(now + CREDENTIALS_RETRY_INTERVAL)
                }
            },
            // A recovery that is at work may release the lock, or find that there are no credentials.
            None if !self.at_work.is_empty() => Explaining::Now,
            None => {
                let location = here.of(awaited).into_iter().next().or_else(|| here.selected());
                match location.map(|location| WaitExplanation::start(&location, here, awaited)) {
                    Some(Ok(process)) => {
                        if let Ok(pid) = i32::try_from(process.pid()) {
                            tree.exclude(Pid::from_raw(pid));
                        }
                        self.explanation = Some((process, awaited.id.clone()));
                        Explaining::Now
                    }
                    Some(Err(error)) => {
                        trace!("no process for the explanation of the wait: {error}");
                        Explaining::At(now + RETRY_INTERVAL)
                    }
                    None => Explaining::Over,
                }
            }
        };
    }

    /// Starts a process that watches the lock `awaited`, if none is running.
    fn watch_lease(&mut self, awaited: &RecordedLock, here: &CandidateBackends, tree: &Tree) {
        let now = Instant::now();
        match self.taker.as_mut().map(TakeoverProcess::ended) {
            Some(None) => return,
            Some(Some(ended)) => {
                self.taker = None;
                if ended == Ended::NoCredentials {
                    self.no_credentials_until = Some(now + retry_interval(true));
                }
                let next = after_taker(ended, now);
                (self.take_at, self.given_up) = (next.take_at, next.given_up.or(self.given_up.take()));
            }
            None => {}
        }
        let is_due = self.take_at.max(self.no_credentials_until).is_none_or(|at| at <= now);
        let Some(terms) = self.takes_over.filter(|_| is_due) else { return };
        let Some(location) = here.of(awaited).into_iter().next().or_else(|| here.selected()) else { return };
        let refused = self.given_up.as_ref().map(|given_up| given_up.at(now));
        match TakeoverProcess::start(&location, here, terms, true, refused) {
            Ok(process) => {
                if let Ok(pid) = i32::try_from(process.pid()) {
                    tree.exclude(Pid::from_raw(pid));
                }
                self.taker = Some(process);
            }
            Err(error) => {
                trace!("no process for the takeover: {error}");
                self.take_at = Some(now + RETRY_INTERVAL);
            }
        }
    }

    fn recover_dead_runs(&mut self, here: &CandidateBackends, tree: &Tree) {
        let (tried, no_credentials_until) = (&mut self.tried, &mut self.no_credentials_until);
        self.at_work.retain_mut(|(child, run)| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) if status.code() == Some(recovery_process::NO_CREDENTIALS.into()) => {
                let later = Instant::now() + retry_interval(true);
                tried.insert(run.clone(), later);
                // The other processes would ask for the same credentials.
                *no_credentials_until = Some(later);
                false
            }
            _ => false,
        });
        if !self.at_work.is_empty() {
            return;
        }
        for state in StateDirectory::existing() {
            for (name, pid) in recovery::dead(&state, here) {
                let before = match attempt(self.tried.get(&name).copied(), Instant::now()) {
                    Attempt::Later => continue,
                    Attempt::First => false,
                    Attempt::Again => true,
                };
                if !before {
                    console::say(&messages::recovery::waiting_for_the_dead(pid));
                }
                match recovery_process::start(&name, before) {
                    Ok(child) => {
                        if let Ok(pid) = i32::try_from(child.id()) {
                            tree.exclude(Pid::from_raw(pid));
                        }
                        self.at_work.push((child, name.clone()));
                    }
                    Err(error) => trace!("no other tf for run {name}: {error}"),
                }
                self.tried.insert(name, Instant::now() + retry_interval(false));
            }
        }
    }

    /// Waits for the processes that are finishing a run. Call this after terraform has exited. A caller that reads
    /// stderr to its end must wait for these processes anyway, because they have stderr open too. Returns the IDs of
    /// the runs that were tried.
    pub(crate) fn finish(self, waiter: &mut Waiter<'_>) -> Vec<String> {
        let taker = self.taker.map(ending_taker);
        let explanation = self.explanation.map(|(process, _)| ending_explanation(process));
        let told = self.ending.into_iter().chain(taker).chain(explanation);
        let at_work = self.at_work.into_iter().map(|(child, _)| (child, recovery_process::RECOVERY_TIMEOUT));
        for (child, limit) in told.chain(at_work) {
            recovery_process::wait_for(child, limit, waiter);
        }
        self.tried.into_keys().collect()
    }
}

/// Tells a taker to end. Returns its process, and the time that it may need.
fn ending_taker(process: TakeoverProcess) -> (Child, Duration) {
    (process.into_child(), takeover_process::END_TIMEOUT)
}

/// Does the same as [`ending_taker`], for a process that explains a wait.
fn ending_explanation(process: WaitExplanation) -> (Child, Duration) {
    (process.into_child(), wait_explanation::END_TIMEOUT)
}

/// Whether terraform, which waits for a lock, is between two attempts to get it. `asked` and `attempted` are when the
/// first and the last attempt began.
///
/// An attempt is a request for the lock and, if that is refused, a read of the lock that is there. If the lock is gone
/// by the time of that read, terraform gives up, although it could wait longer: it then has no complete error
/// (statemgr.LockWithContext). So a lock must not be deleted during an attempt. Between two attempts, terraform waits 1
/// s, 2 s, 4 s, 8 s, and then always 16 s. An attempt seldom takes long, and a delete is finished in a fraction of a
/// second, so both get a part of that time.
fn rests(asked: Timestamp, attempted: Timestamp, now: Timestamp) -> bool {
    const LONGEST_PAUSE: u64 = 16;
    const LONGEST_ATTEMPT: Duration = Duration::from_secs(2);
    let since = |earlier: Timestamp, later: Timestamp| Duration::try_from(later.duration_since(earlier)).ok();
    let (Some(waited), Some(since)) = (since(asked, attempted), since(attempted, now)) else { return false };
    // The attempts themselves take time too, so the sum of the pauses before this one is a little less than `waited`.
    let pause = Duration::from_secs(1 << (waited.as_secs() + 1).min(LONGEST_PAUSE).ilog2());
    let attempt = (pause * 3 / 10).min(LONGEST_ATTEMPT);
    (attempt..pause.saturating_sub(attempt)).contains(&since)
}

/// How long to wait before a dead run, or the lock of another host, is tried again. `lacks_credentials` is whether the
/// last attempt failed because no credentials were available.
fn retry_interval(lacks_credentials: bool) -> Duration {
    if lacks_credentials { CREDENTIALS_RETRY_INTERVAL } else { RETRY_INTERVAL }
}

/// A lock that cannot be taken, which was reported.
#[derive(Clone, Debug, PartialEq, Eq)]
struct GivenUp {
    /// The ID of the lock. `None` if the taker has not written it.
    id: Option<String>,
    /// When it may be tried again.
    until: Instant,
    /// Whether the same attempt would have failed again.
    is_final: bool,
}

impl GivenUp {
    /// Returns what a taker must know that is started at the time `now`.
    fn at(&self, now: Instant) -> Refused {
        Refused { id: self.id.clone(), left: self.until.saturating_duration_since(now), is_final: self.is_final }
    }
}

/// What follows after a taker has ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NextTaker {
    /// When to start the next one. `None`: at once. It leaves the lock that was given up.
    take_at: Option<Instant>,
    /// The lock that the taker has given up. `None` if it has given up none.
    given_up: Option<GivenUp>,
}

/// Decides what follows after a taker has `ended` by itself at the time `now`.
fn after_taker(ended: Ended, now: Instant) -> NextTaker {
    match ended {
        Ended::NotTaken { id, is_final: true } => {
            let until = now + REFUSAL_RETRY_INTERVAL;
            NextTaker { take_at: None, given_up: Some(GivenUp { id, until, is_final: true }) }
        }
        Ended::NotTaken { id, is_final: false } => NextTaker {
            take_at: Some(now + retry_interval(false)),
            given_up: Some(GivenUp { id, until: now, is_final: false }),
        },
        ended => NextTaker { take_at: Some(now + retry_interval(ended == Ended::NoCredentials)), given_up: None },
    }
}

/// What is done to explain a wait for a lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Explaining {
    /// Nothing: terraform does not wait.
    #[default]
    No,
    /// The process is started at this time, if terraform still waits then.
    At(Instant),
    /// The process is running, or is to be started now.
    Now,
    /// The process has ended, and is not started again during this wait.
    Over,
}

/// Returns what to do to explain a wait. `waits` is whether the log shows a lock request without a response.
/// `no_credentials_until` is when credentials may be requested again. `None` if they may be requested now.
fn next_explaining(
    current: Explaining,
    waits: bool,
    no_credentials_until: Option<Instant>,
    now: Instant,
) -> Explaining {
    match current {
        _ if !waits => Explaining::No,
        Explaining::No => Explaining::At(now + EXPLANATION_DELAY),
        Explaining::At(at) if at > now => current,
        Explaining::At(_) => no_credentials_until.map_or(Explaining::Now, Explaining::At),
        Explaining::Now | Explaining::Over => current,
    }
}

/// When to search the journal for dead runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NextSearch {
    /// Whether to search now.
    is_due: bool,
    /// When to search next. `None` if terraform does not wait for a lock.
    at: Option<Instant>,
}

/// Returns when to search the journal. `look_at` is when the next search was planned, or `None` if none was. `waits` is
/// whether the log shows a lock request without a response.
fn next_search(look_at: Option<Instant>, waits: bool, now: Instant) -> NextSearch {
    let next = Some(now + JOURNAL_POLL_INTERVAL);
    match look_at {
        _ if !waits => NextSearch { is_due: false, at: None },
        None => NextSearch { is_due: false, at: next },
        Some(at) if at > now => NextSearch { is_due: false, at: Some(at) },
        Some(_) => NextSearch { is_due: true, at: next },
    }
}

/// Whether to try to finish a dead run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    /// The run was not tried before. It is announced.
    First,
    /// An earlier attempt failed, and its result was reported.
    Again,
    /// An earlier attempt failed, and it is too early for another one.
    Later,
}

/// Returns whether to try a dead run. `due` is when it may be tried again, or `None` if it was not tried before.
fn attempt(due: Option<Instant>, now: Instant) -> Attempt {
    match due {
        None => Attempt::First,
        Some(due) if due > now => Attempt::Later,
        Some(_) => Attempt::Again,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_searched_once_a_second_while_a_lock_request_has_no_response() {
        let now = Instant::now();
        let next = now + Duration::from_secs(1);
        let soon = now + Duration::from_millis(1);
        for (look_at, waits, is_due, at) in [
            // The first response usually arrives within the second, so the first look at the log only plans a search.
            (None, true, false, Some(next)),
            (Some(soon), true, false, Some(soon)),
            (Some(now), true, true, Some(next)),
            (now.checked_sub(Duration::from_secs(9)), true, true, Some(next)),
            // A response ends the plan, so that a later request has its own second.
            (None, false, false, None),
            (Some(soon), false, false, None),
            (Some(now), false, false, None),
        ] {
            assert_eq!(next_search(look_at, waits, now), NextSearch { is_due, at }, "{look_at:?} {waits}");
        }
    }

    #[test]
    fn terraform_rests_between_two_attempts_and_not_during_one() {
        let asked: Timestamp = "2026-11-27T01:00:00Z".parse().unwrap();
        let after = |milliseconds: u64| asked + Duration::from_millis(milliseconds);
        for (attempted, begin, end) in [
            (0, 300, 699),
            (1_050, 600, 1_399),
            (3_150, 1_200, 2_799),
            (7_300, 2_000, 5_999),
            (15_500, 2_000, 13_999),
            (31_900, 2_000, 13_999),
            (3_600_000, 2_000, 13_999),
            // Slow attempts.
            (1_900, 600, 1_399),
            (6_500, 1_200, 2_799),
            (14_900, 2_000, 5_999),
        ] {
            let rests = |since| rests(asked, after(attempted), after(attempted + since));
            assert!(!rests(0) && !rests(begin - 1) && rests(begin) && rests(end) && !rests(end + 1), "{attempted}");
        }
        // A clock that was set.
        assert!(!rests(after(5), asked, after(9)) && !rests(asked, after(5), asked));
    }

    #[test]
    fn a_wait_is_explained_once_it_takes_three_seconds_and_only_with_credentials() {
        let now = Instant::now();
        let at = |seconds| Explaining::At(now + Duration::from_secs(seconds));
        let later = Some(now + Duration::from_mins(10));
        for no_credentials_until in [None, later] {
            for current in [Explaining::No, at(0), at(1), Explaining::Now, Explaining::Over] {
                assert_eq!(next_explaining(current, false, no_credentials_until, now), Explaining::No, "{current:?}");
                let expected = match current {
                    Explaining::No => at(3),
                    Explaining::At(due) if due <= now => no_credentials_until.map_or(Explaining::Now, Explaining::At),
                    other => other,
                };
                assert_eq!(next_explaining(current, true, no_credentials_until, now), expected, "{current:?}");
            }
        }
    }

    #[test]
    fn a_dead_run_is_tried_again_only_when_its_interval_is_over() {
        let now = Instant::now();
        for (due, expected) in [
            (None, Attempt::First),
            (Some(now + Duration::from_millis(1)), Attempt::Later),
            (Some(now), Attempt::Again),
            (now.checked_sub(Duration::from_secs(1)), Attempt::Again),
        ] {
            assert_eq!(attempt(due, now), expected, "{due:?}");
        }
    }

    #[test]
    fn without_credentials_the_next_attempt_is_ten_minutes_later() {
        assert_eq!(retry_interval(false), Duration::from_secs(15));
        assert_eq!(retry_interval(true), Duration::from_mins(10));
        let tried = |run: &str, lacks_credentials| Tried { run: run.into(), lacks_credentials };
        let waiting = |tried| Waiting::new(BeforeTerraform { tried, ..BeforeTerraform::default() });
        let only_one = waiting(vec![tried("a", false)]);
        let before = Instant::now();
        let waiting = waiting(vec![tried("a", false), tried("b", true)]);
        let after = Instant::now();
        for (run, interval) in [("a", Duration::from_secs(15)), ("b", Duration::from_mins(10))] {
            let due = waiting.tried[run];
            assert!(before + interval <= due && due <= after + interval, "{run}");
            assert_eq!(attempt(Some(due), after), Attempt::Later, "what failed before terraform is not new");
        }
        // A process that takes over a lock would ask for the same credentials.
        let until = waiting.no_credentials_until.unwrap();
        assert!(before + Duration::from_mins(10) <= until && until <= after + Duration::from_mins(10));
        assert_eq!(only_one.no_credentials_until, None);
    }

    #[test]
    fn a_lock_that_could_not_be_taken_before_terraform_started_is_tried_again_ten_minutes_later() {
        let waiting = |taker| Waiting::new(BeforeTerraform { taker, ..BeforeTerraform::default() });
        for ended in [Ended::Over, Ended::NoCredentials, Ended::Failed] {
            assert_eq!(waiting(Some(ended)).given_up, None);
        }
        assert_eq!(waiting(None).given_up, None);
        let before = Instant::now();
        let final_end = Ended::NotTaken { id: Some("a".into()), is_final: true };
        let waiting = waiting(Some(final_end));
        let after = Instant::now();
        let GivenUp { id, until, is_final } = waiting.given_up.unwrap();
        assert_eq!((id.as_deref(), is_final), (Some("a"), true));
        assert!(before + Duration::from_mins(10) <= until && until <= after + Duration::from_mins(10));
        // The wait is explained nevertheless.
        assert_eq!((waiting.take_at, waiting.no_credentials_until), (None, None));
    }

    /// Another lock, which another host leaves meanwhile, is taken over.
    #[test]
    fn only_the_lock_that_cannot_be_taken_is_not_tried_for_ten_minutes() {
        let now = Instant::now();
        let after = |seconds| Some(now + Duration::from_secs(seconds));
        let not_taken = |id: Option<&str>, is_final| Ended::NotTaken { id: id.map(ToOwned::to_owned), is_final };
        for (ended, take_at, given_up) in [
            (Ended::Over, after(15), None),
            (Ended::Failed, after(15), None),
            (Ended::NoCredentials, after(600), None),
            (not_taken(Some("a"), true), None, Some((Some("a"), 600, true))),
            (not_taken(None, true), None, Some((None, 600, true))),
            // The next attempt may succeed. It does not report the same again.
            (not_taken(Some("a"), false), after(15), Some((Some("a"), 0, false))),
        ] {
            let next = after_taker(ended, now);
            assert_eq!(next.take_at, take_at);
            let given_up = given_up.map(|(id, until, is_final)| (id.map(ToOwned::to_owned), until, is_final));
            let expected =
                given_up.clone().map(|(id, until, is_final)| GivenUp { id, until: after(until).unwrap(), is_final });
            assert_eq!(next.given_up, expected);
            for elapsed in [0, 599, 600, 700] {
                let refused = next.given_up.as_ref().map(|given_up| given_up.at(after(elapsed).unwrap()));
                let expected = given_up.clone().map(|(id, until, is_final)| Refused {
                    id,
                    left: Duration::from_secs(until.saturating_sub(elapsed)),
                    is_final,
                });
                assert_eq!(refused, expected, "{elapsed}");
            }
        }
    }
}
