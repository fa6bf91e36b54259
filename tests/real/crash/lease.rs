//! Crash points of a run with a lease: a process of the run is killed at every step, alone and together with others,
//! before, during and after a stop by the fuse. Meanwhile another host waits for the lock.
//!
//! The process stops itself at its point, so that the others can be killed in the same moment. In the end:
//!
//! - No process is left, stopped or running.
//! - The other host has got the lock: not before the lease has lapsed unless the holder's host has released it, not
//!   while the holder's terraform was running, and not later than it is promised.
//! - The holder's terraform has written nothing after that.
//! - The write ends of both pipes were in the fuse and in `tf` alone.
//! - The journal of the holder's host is empty.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{in_source, tell};
use crate::given_back::{holds_state, through};
use crate::leased::{record, wait_for_renewal_after};
use crate::locks_recover::recover;
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::lease::{LEASED, record as lapsed_record};
use crate::support::process::{Run, state};
use crate::support::processes::{KillOnDrop, home, is_gone, marked, wait_until_all_is_gone};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::system::{IS_LINUX, name};
use crate::support::test_env::{APPLY, TEST_HOST, WAITS, id_of};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_within};

/// Returns the length of the leases, in seconds: `TF_TEST_CRASH_LEASE`, or 5. A machine that is slow needs more.
fn lease() -> i64 {
    std::env::var("TF_TEST_CRASH_LEASE").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

/// How long a step may take: with the lease of a dead run, and the longest pause between two attempts of terraform.
const LIMIT: Duration = Duration::from_mins(3);

/// How long a busy machine may take for what is not a wait.
const SLACK: i64 = 20;

/// Terraform's longest pause between two attempts to lock (internal/states/statemgr/locker.go).
const LONGEST_PAUSE: i64 = 16;

/// Returns how many seconds after its last renewal a lock is released at the latest, by a host that waits for it: when
/// the lease has lapsed by the service's clocks, when nothing has changed for a while, and when the waiting terraform
/// pauses (`Terms::lapse_time`, `Terms::quiet_window`, `MAX_REST_WAIT`).
fn latest_release() -> i64 {
    const MAX_REST_WAIT: i64 = 20;
    let clock_tolerance = (lease() / 6).min(10) + 1;
    // One and a half intervals between two renewals, which are less than a fifth of the lease.
    let quiet_window = clock_tolerance.max(lease() * 3 / 10 + 1);
    lease() + clock_tolerance + quiet_window + MAX_REST_WAIT + SLACK
}

/// How often the processes of a run are looked at. To list them takes milliseconds.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The processes of a run that are killed together with the one at a point.
const PROCESSES: [&str; 5] = ["tf", "tf-guardian", "tf-keeper", "tf-fuse", "terraform"];

/// What happens to a run before one of its processes dies at a point. Points that are reached earlier do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Situation {
    /// Nothing: all points count, and the run ends.
    Whole,
    /// The keeper was killed.
    KeeperKilled,
    /// The fuse was killed, so that terraform is stopped until there is another one.
    FuseKilled,
    /// The holder has no network until the other host has the lock.
    CutOff,
    /// `tf` was killed, and the terraform that its guardian has interrupted needs long for its end.
    TfKilled,
    /// The same, and then the keeper of the guardian was killed.
    GuardiansKeeperKilled,
    /// `tf` and its guardian were killed.
    Unsupervised,
    /// `tf`, its guardian and the keeper were killed.
    OnlyFuse,
    /// Terraform was killed, and its lock stays on purpose.
    KeptOnPurpose,
}

const SITUATIONS: [Situation; 9] = [
    Situation::Whole,
    Situation::KeeperKilled,
    Situation::FuseKilled,
    Situation::CutOff,
    Situation::TfKilled,
    Situation::GuardiansKeeperKilled,
    Situation::Unsupervised,
    Situation::OnlyFuse,
    Situation::KeptOnPurpose,
];

/// How the names of the points of a run with a lease begin, and those of a taker.
pub const OF_A_TAKER: &str = "takeover: ";
pub const OF_A_RUN: [&str; 5] = ["lease: ", "fence: ", "keeper: ", "fuse: ", "spare: "];

/// A holder and another host that share a state.
struct Hosts {
    holder: TestEnv,
    other: TestEnv,
    _proxy: Proxy,
    is_away: Arc<AtomicBool>,
    /// Whether the service does not answer the holder's terraform when it writes the state.
    state_is_slow: Arc<AtomicBool>,
    _kill_on_drop: [KillOnDrop; 2],
}

/// The processes that were killed, and when, in seconds since 1970.
struct Deaths {
    victims: Vec<(Pid, String)>,
    at: i64,
    /// The last renewal that was seen before, by the service's clock. 0 if none was.
    renewed: i64,
}

/// The plan of the other host, which waits for the lock.
struct Contender<'a> {
    env: &'a TestEnv,
    run: Option<Run>,
    end: Option<Ended>,
    /// When the plan was started and was seen to have ended, in seconds since 1970.
    started: i64,
    ended: i64,
}

/// What came of the run after the deaths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// The other host has got the lock.
    Taken,
    /// No process of the run is left.
    Over,
    /// The lease was renewed for longer than it lasts.
    Renewed,
    /// Terraform works on alone.
    Alone,
}

impl<'a> Contender<'a> {
    fn start(env: &'a TestEnv) -> Self {
        let mut contender = Self { env, run: None, end: None, started: 0, ended: 0 };
        contender.start_again();
        contender
    }

    fn start_again(&mut self) {
        self.started = Timestamp::now().as_second();
        self.run = Some(self.env.start(Subject::Tf, &["plan", "-no-color", "-lock-timeout=5m"]));
    }

    fn has_ended(&mut self) -> bool {
        let Some(run) = self.run.take_if(|run| is_gone(run.pid())) else { return self.end.is_some() };
        let end = run.wait();
        // A terraform that dies between the writes of its state and of the digest leaves this. It is repaired on
        // request.
        let is_torn = end.err.contains("does not have the expected content");
        if end.code() != Some(0) && (end.met_a_lock_that_went() || is_torn) {
            if is_torn {
                let mended = self.env.run(Subject::Tf, &["locks", "doctor", "--fix-digest", "--yes"]);
                assert_eq!(mended.code(), Some(0), "{}", self.env.dump(&mended));
            }
            self.start_again();
            return false;
        }
        self.ended = Timestamp::now().as_second();
        self.end = Some(end);
        true
    }

    fn has_released(&self) -> bool {
        self.end.as_ref().is_some_and(|end| end.err.contains("released the lock"))
    }

    /// Returns when the other host has released the lock, in seconds since 1970, as its history says. `None` if the last
    /// event in it is another one.
    fn released_at(&self) -> Option<i64> {
        let path = self.env.directory.parent().unwrap().join("home/.local/state/tf/history.jsonl");
        let event: Value = serde_json::from_str(fs::read_to_string(path).ok()?.lines().last()?).ok()?;
        let time: Timestamp = event["time"].as_str()?.parse().ok()?;
        (event["event"] == "taken over").then(|| time.as_second())
    }

    fn seen(&self) -> String {
        let run = self.run.as_ref().map(|run| format!("{}{}", run.out(), run.err()));
        format!("the other host: {run:?} {:?}\n{}", self.end, self.env.trace())
    }
}

impl Hosts {
    fn new(lock: Lock) -> Self {
        let mut holder = TestEnv::new(lock, WAITS);
        let (is_away, state_is_slow) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (away, slow) = (is_away.clone(), state_is_slow.clone());
        let rule = move |request: &Message| {
            let is_closed = holds_state(request, &slow) || away.load(Ordering::SeqCst);
            if is_closed { ProxyAction::Close } else { ProxyAction::Pass }
        };
        let proxy = through(&mut holder, rule);
        let mut other = TestEnv::empty(lock);
        other.bucket.clone_from(&holder.bucket);
        other.table.clone_from(&holder.table);
        other.write_main("", "true");
        other.init();
        other.set(TEST_HOST, "fedcba9876543210fedcba9876543210");
        holder.set("TFW_LEASE", format!("{}s", lease())).set("TFW_CLOCK", "steady");
        other.set("TFW_LEASE", "1m").set("TFW_CLOCK", "steady");
        let kill_on_drop = [KillOnDrop(home(&holder)), KillOnDrop(home(&other))];
        Self { holder, other, _proxy: proxy, is_away, state_is_slow, _kill_on_drop: kill_on_drop }
    }

    /// The directory that makes the points count ([`Hosts::start`]).
    fn armed(&self) -> PathBuf {
        self.holder.directory.join("armed")
    }

    /// Lets the holder's terraform come to its end.
    fn unblock(&self) {
        self.state_is_slow.store(false, Ordering::SeqCst);
        self.holder.unblock();
    }

    fn clear(&self) {
        self.is_away.store(false, Ordering::SeqCst);
        self.state_is_slow.store(false, Ordering::SeqCst);
        let _ = fs::remove_dir_all(self.armed());
        for env in [&self.holder, &self.other] {
            for name in ["began", "go", "trace"] {
                let _ = fs::remove_file(env.directory.join(name));
            }
        }
        self.holder.forget_state();
    }

    fn start(&self, situation: Situation, point: &str) -> Run {
        let mut command = self.holder.command(self.holder.bin().join("tf"));
        command.args(APPLY).env("TFW_CRASH", point);
        command.env("TFW_CRASH_LIST", self.armed().join("points")).env("TFW_CRASH_STOP", self.armed().join("stopped"));
        if situation == Situation::KeptOnPurpose {
            command.env("TFW_RELEASE", "never");
        }
        Run::start(command)
    }

    fn points(&self) -> BTreeSet<String> {
        let text = fs::read_to_string(self.armed().join("points")).unwrap_or_default();
        text.lines().filter(|name| OF_A_RUN.iter().any(|kind| name.starts_with(kind))).map(ToOwned::to_owned).collect()
    }

    /// The processes of the holder: their names and states.
    fn left(&self) -> Vec<(Pid, String, Option<char>)> {
        marked(&home(&self.holder)).into_iter().map(|pid| (pid, name(pid), state(pid))).collect()
    }

    /// Whether neither terraform nor a process of `tf` is left. Without `tf` and guardian, terraform dies when it
    /// writes: its output is a pipe that nobody reads.
    fn is_over(&self) -> bool {
        !self.left().iter().any(|(_, name, _)| name == "terraform" || name.starts_with("tf"))
    }

    /// Returns the process with this name. The spare fuse is another one than the fuse.
    fn find(&self, name: &str) -> Option<Pid> {
        self.left().into_iter().find(|(_, found, _)| found == name).map(|(pid, ..)| pid)
    }

    /// Returns the process that has stopped at its point, or was killed there. `None` if there is none.
    fn stopped(&self) -> Option<Pid> {
        let pid = fs::read_to_string(self.armed().join("stopped")).ok()?.parse().ok().map(Pid::from_raw)?;
        (is_gone(pid) || state(pid) == Some('T')).then_some(pid)
    }

    fn seen(&self, run: &Run) -> String {
        format!("{:?}\n{:?}\n{}{}{}", self.left(), record(&self.holder), run.out(), run.err(), self.holder.trace())
    }

    /// Waits until a process has stopped at its point, and returns it, or until `otherwise`, or until the run is over.
    fn until(&self, run: &Run, what: &str, mut otherwise: impl FnMut() -> bool) -> Option<Pid> {
        let either = || {
            sleep(POLL_INTERVAL);
            match self.stopped() {
                Some(pid) => Some(Some(pid)),
                None => (otherwise() || self.is_over()).then_some(None),
            }
        };
        wait_within(LIMIT, what, either, || self.seen(run))
    }

    /// The record of the holder's lock. `None` if it has none, or if the other host has the lock.
    fn record(&self) -> Option<Value> {
        // The other host plans, and the holder applies.
        let is_its = |lock: &String, id: &Value| id_of(lock) == *id && lock.contains("OperationTypeApply");
        record(&self.holder).filter(|record| self.holder.locks().iter().any(|lock| is_its(lock, &record["lock"])))
    }

    /// The service's time in that record. 0 if there is none.
    fn renewed(&self) -> i64 {
        self.record().and_then(|record| record["renewed"].as_i64()).unwrap_or(0)
    }

    fn kill_named(&self, name: &str) {
        if let Some(pid) = self.find(name) {
            let _ = kill(pid, Signal::SIGKILL);
            wait_within(LIMIT, "the end of a process", || is_gone(pid).then_some(()), || format!("{name} {pid}"));
        }
    }

    /// Lets happen what the situation is about, and what follows from it, until a process has stopped at its point.
    /// Returns it. `None` if no process has come to its point.
    fn happen<'a>(&'a self, situation: Situation, run: &Run, contender: &mut Option<Contender<'a>>) -> Option<Pid> {
        let last = record(&self.holder).unwrap_or_default();
        let is_over = || self.is_over();
        let is_renewed = |times: u64| {
            let (mut last, mut count) = (last["beat"].as_u64(), 0);
            move || {
                let now = record(&self.holder).and_then(|record| record["beat"].as_u64());
                if now > last {
                    (last, count) = (now, count + 1);
                }
                count >= times
            }
        };
        match situation {
            Situation::Whole => {}
            Situation::KeeperKilled => {
                self.kill_named("tf-keeper");
                return self.until(run, "two renewals", is_renewed(2));
            }
            Situation::FuseKilled => {
                self.kill_named("tf-fuse");
                let mut is_renewed = is_renewed(2);
                return self.until(run, "terraform to go on", || {
                    is_renewed() && run.err().contains("terraform goes on") && self.find("tf-spare").is_some()
                });
            }
            Situation::CutOff => {
                self.is_away.store(true, Ordering::SeqCst);
                let contender = contender.insert(Contender::start(&self.other));
                let stopped = self.until(run, "the lock to be taken", || contender.has_ended());
                if stopped.is_some() {
                    return stopped;
                }
                self.is_away.store(false, Ordering::SeqCst);
                return self.until(run, "the end of all", is_over);
            }
            Situation::TfKilled | Situation::GuardiansKeeperKilled => {
                // The guardian interrupts terraform, which then saves the state. It must not end before the renewals.
                self.state_is_slow.store(true, Ordering::SeqCst);
                let first = self.find("tf-keeper");
                let _ = kill(run.pid(), Signal::SIGKILL);
                if situation == Situation::GuardiansKeeperKilled {
                    let keepers = || self.left().into_iter().filter(|(_, name, _)| name == "tf-keeper");
                    let second = || keepers().map(|(pid, ..)| pid).find(|pid| Some(*pid) != first);
                    let stopped = self.until(run, "another keeper", || second().is_some());
                    if stopped.is_some() {
                        return stopped;
                    }
                    let _ = second().map(|pid| kill(pid, Signal::SIGKILL));
                    let is_there = || self.points().contains("lease: the guardian replaced its keeper");
                    let stopped = self.until(run, "a third keeper", is_there);
                    if stopped.is_some() {
                        return stopped;
                    }
                }
                let stopped = self.until(run, "renewals", is_renewed(3));
                if stopped.is_some() {
                    return stopped;
                }
            }
            Situation::Unsupervised => {
                self.kill_named("tf-guardian");
                let _ = kill(run.pid(), Signal::SIGKILL);
                let stopped = self.until(run, "renewals", is_renewed(2));
                if stopped.is_some() {
                    return stopped;
                }
            }
            Situation::OnlyFuse => {
                self.kill_named("tf-guardian");
                let _ = kill(run.pid(), Signal::SIGKILL);
                self.kill_named("tf-keeper");
                return self.until(run, "the end of terraform", || self.find("terraform").is_none());
            }
            Situation::KeptOnPurpose => self.kill_named("terraform"),
        }
        self.unblock();
        self.until(run, "the end of all", is_over)
    }

    /// Runs an apply in this situation. The process that comes to `point` is killed there, together with all processes
    /// that are named in `with`. Checks everything that this file promises. Returns the points that were reached.
    fn play(&self, situation: Situation, point: &str, with: &[&str]) -> BTreeSet<String> {
        self.clear();
        let what = format!("{:?}, {situation:?}, dead at {point:?} with {with:?}", self.holder.lock);
        let (mut contender, mut renewed) = (None, 0);
        if situation == Situation::Whole {
            fs::create_dir(self.armed()).unwrap();
        }
        let run = self.start(situation, point);
        let works = || self.holder.exists("began") && record(&self.holder).is_some();
        let mut stopped = self.until(&run, "the provisioner and a renewal", works);
        if situation != Situation::Whole {
            // The next renewal comes after the first one was written into the other part of the lock.
            let last = record(&self.holder).unwrap_or_default();
            renewed = wait_for_renewal_after(&self.holder, &last)["renewed"].as_i64().unwrap();
            fs::create_dir(self.armed()).unwrap();
        }
        if stopped.is_none() {
            stopped = self.happen(situation, &run, &mut contender);
        }
        let points = self.points();

        let mut victims: Vec<(Pid, String)> = self
            .left()
            .into_iter()
            .filter(|(pid, name, _)| Some(*pid) == stopped || (stopped.is_some() && with.contains(&name.as_str())))
            .map(|(pid, name, _)| (pid, name))
            .collect();
        for (pid, _) in &victims {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        for (pid, name) in &victims {
            wait_within(
                LIMIT,
                "the end of a process",
                || is_gone(*pid).then_some(()),
                || format!("{what}: {name} {pid}"),
            );
        }
        victims.retain(|(_, name)| name != "tf-spare");
        tell(&format!("{what}: {victims:?}"));
        let deaths = Deaths { victims, at: Timestamp::now().as_second(), renewed };
        self.assert_write_ends(run.pid(), &what);
        self.finish(situation, run, contender, &what, &deaths);
        points
    }

    /// Checks what follows from the deaths.
    fn finish(&self, situation: Situation, run: Run, contender: Option<Contender<'_>>, what: &str, deaths: &Deaths) {
        let Deaths { victims, at: killed_at, renewed } = deaths;
        let mut contender = contender.unwrap_or_else(|| Contender::start(&self.other));
        let helpers = ["tf", "tf-guardian", "tf-keeper", "tf-fuse", "tf-spare"];
        let mut renewed = self.renewed().max(*renewed);
        let outcome = || {
            sleep(POLL_INTERVAL);
            let left = self.left();
            let has_ended = contender.has_ended();
            renewed = renewed.max(self.renewed());
            if has_ended {
                Some(After::Taken)
            } else if left.is_empty() {
                Some(After::Over)
            } else if renewed > killed_at + lease() + 1 {
                Some(After::Renewed)
            } else if !left.iter().any(|(_, name, _)| helpers.contains(&name.as_str())) {
                Some(After::Alone)
            } else {
                None
            }
        };
        let after = wait_within(LIMIT, &format!("an outcome: {what}"), outcome, || self.seen(&run));
        let dump = |contender: &Contender<'_>| format!("{after:?}: {what}\n{}\n{}", self.seen(&run), contender.seen());
        if after == After::Taken && contender.has_released() {
            for (pid, name, state) in self.left() {
                assert!(name != "terraform" || matches!(state, Some('T' | 'Z') | None), "{pid}\n{}", dump(&contender));
            }
        }
        let written = self.holder.state();
        self.is_away.store(false, Ordering::SeqCst);
        self.unblock();
        let mut is_killed_late = false;
        let end_of_all = || {
            sleep(POLL_INTERVAL);
            // A process may come to its point only now.
            if let Some(pid) = self.stopped().filter(|pid| state(*pid) == Some('T')) {
                let _ = kill(pid, Signal::SIGKILL);
                is_killed_late = true;
            }
            renewed = renewed.max(self.renewed());
            self.left().is_empty().then_some(())
        };
        wait_within(LIMIT, &format!("the end of all: {what}"), end_of_all, || dump(&contender));
        if after == After::Taken {
            assert_eq!(self.holder.state(), written, "{}", dump(&contender));
        }
        let promises = self.record().is_some_and(|record| record["fence"] == "stop");
        if !contender.has_ended() && !promises {
            // Nobody takes such a lock without being asked, but the next run of this host releases it.
            let kept =
                self.holder.locks().first().filter(|_| situation == Situation::KeptOnPurpose).map(|lock| id_of(lock));
            if let Some(kept) = kept {
                let end = self.holder.run(Subject::Tf, &["locks", "release", "--force", &kept]);
                assert_eq!(end.code(), Some(0), "{}\n{end:?}", dump(&contender));
            } else {
                // The lock may be that of the other host by now, which has the same host name here.
                drop(recover(&self.holder, &[]));
            }
        }
        let seen = || format!("{}{}", self.seen(&run), self.other.trace());
        wait_within(LIMIT, &format!("the other host: {what}"), || contender.has_ended().then_some(()), seen);
        assert_eq!(contender.end.as_ref().and_then(Ended::code), Some(0), "{}", dump(&contender));
        if contender.has_released() {
            let released = contender.released_at().expect("the other host has released the lock");
            assert!(released >= renewed + lease(), "{renewed} {released}\n{}", dump(&contender));
            // The other host may have begun to wait when the lease had lapsed.
            let from = renewed.max(contender.started);
            assert!(released <= from + latest_release(), "{from} {released}\n{}", dump(&contender));
            tell(&format!("{what}: released {} s after the last renewal", released - renewed));
            let latest_end = released + LONGEST_PAUSE + SLACK;
            assert!(contender.ended <= latest_end, "{released} {}\n{}", contender.ended, dump(&contender));
        }
        wait_until_all_is_gone(&self.other);
        // The run has left nothing on its host.
        let end = recover(&self.holder, &[]);
        assert_eq!(end.code(), Some(0), "{}\n{end:?}", dump(&contender));
        assert!(self.holder.locks().is_empty(), "{:?}\n{}", self.holder.locks(), dump(&contender));
        let runs = self.holder.directory.parent().unwrap().join("home/.local/state/tf/runs");
        for left in fs::read_dir(runs).into_iter().flatten().flatten() {
            // A record directory whose creation was interrupted is deleted when it is an hour old.
            assert!(left.file_name().to_string_lossy().contains(".new-"), "{left:?}\n{}", dump(&contender));
            fs::remove_dir_all(left.path()).unwrap();
        }
        let seen = dump(&contender);
        let has = |names: &[&str]| victims.iter().any(|(_, name)| names.contains(&name.as_str()));
        let end = run.wait();
        let survives = matches!(situation, Situation::Whole | Situation::KeeperKilled | Situation::FuseKilled);
        // A holder that gets too little of a processor loses its lock. It must not say then that its terraform has run
        // on.
        assert!(!end.err.contains("ran after the deadline"), "{seen}");
        let keeps_its_lock =
            after != After::Taken && !contender.has_released() && !end.err.contains("to compare the state with");
        if survives && keeps_its_lock && !is_killed_late && !has(&["tf", "terraform"]) {
            assert_eq!(end.code(), Some(0), "{seen}");
        }
        let withdraws = situation == Situation::KeptOnPurpose && !has(&["tf"]);
        if withdraws && promises {
            assert!(end.err.contains("could not be withdrawn"), "{seen}");
        }
    }

    /// Waits until both pipes of the fence have their write ends in the fuse and in `tf` alone. A process that `tf` has
    /// just forked may have them for a moment.
    fn assert_write_ends(&self, tf: Pid, what: &str) {
        let wrong = || {
            let left = self.left();
            let of_the_fuse = |(pid, name, _): &(Pid, String, Option<char>)| match name.as_str() {
                "tf-fuse" | "tf-spare" => pipes_of(*pid).into_iter().map(|(pipe, _)| pipe).collect(),
                _ => Vec::new(),
            };
            let pipes: BTreeSet<String> = left.iter().flat_map(of_the_fuse).collect();
            let mut wrong = Vec::new();
            for (pid, name, _) in left {
                if name != "tf-fuse" && pid != tf {
                    let has = pipes_of(pid).into_iter().filter(|(pipe, writes)| *writes && pipes.contains(pipe));
                    wrong.extend(has.map(|(pipe, _)| (pid, name.clone(), pipe)));
                }
            }
            wrong
        };
        wait_within(
            LIMIT,
            "no write end in a wrong process",
            || wrong().is_empty().then_some(()),
            || format!("{what}: {:?}", wrong()),
        );
    }
}

/// Returns the pipes that a process has open, and whether it can write to them.
fn pipes_of(pid: Pid) -> Vec<(String, bool)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?.display().to_string();
            let number = entry.file_name().into_string().ok()?;
            let information = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
            let flags = information.lines().find_map(|line| line.strip_prefix("flags:"))?.trim();
            let writes = u32::from_str_radix(flags, 8).ok()? & 3 != 0;
            target.starts_with("pipe:").then_some((target, writes))
        })
        .collect()
}

/// Runs `cases` on hosts with these kinds of locks, at the same time.
fn on_hosts<T: Sync>(locks: &[Lock], cases: &[(Lock, T)], play: impl Fn(&Hosts, &T) + Sync) {
    let next = Mutex::new((0..cases.len()).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for lock in locks.iter().copied() {
            let (next, play) = (&next, &play);
            scope.spawn(move || {
                let hosts = Hosts::new(lock);
                loop {
                    let taken = {
                        let mut left = next.lock().unwrap();
                        left.iter().position(|place| cases[*place].0 == lock).map(|place| left.remove(place))
                    };
                    let Some(place) = taken else { return };
                    play(&hosts, &cases[place].1);
                }
            });
        }
    });
}

/// The sets of processes that are killed with the one at point number `place`: none, and another one for every second
/// place. With `TF_TEST_DEATHS=all`, every one.
fn subsets(place: usize) -> Vec<Vec<&'static str>> {
    let of = |bits: usize| {
        PROCESSES.iter().enumerate().filter(move |(bit, _)| bits & (1 << bit) != 0).map(|(_, name)| *name).collect()
    };
    let all = 1 << PROCESSES.len();
    if std::env::var_os("TF_TEST_DEATHS").is_some_and(|value| value == "all") {
        return (0..all).map(of).collect();
    }
    let with_others = place.is_multiple_of(2).then(|| of(1 + place / 2 * 11 % (all - 1)));
    [of(0)].into_iter().chain(with_others).collect()
}

#[test]
fn whichever_processes_of_a_lease_die_wherever_its_lock_can_be_taken_after_it_and_not_before() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    let reached = Mutex::new(Vec::new());
    let cases = SITUATIONS.map(|situation| (Lock::Both, situation));
    on_hosts(&[Lock::Both; 5], &cases, |hosts, situation| {
        let points = hosts.play(*situation, "none", &[]);
        reached.lock().unwrap().push((*situation, points));
    });
    let mut reached = reached.into_inner().unwrap();
    reached.sort_by_key(|(situation, _)| SITUATIONS.iter().position(|other| other == situation));
    let known: BTreeSet<String> = reached.iter().flat_map(|(_, points)| points.clone()).collect();
    assert_eq!(
        known,
        in_source(|name| OF_A_RUN.iter().any(|kind| name.starts_with(kind))),
        "points that no situation reaches"
    );

    let only = std::env::var("TF_TEST_SITUATION").ok();
    let is_wanted = |situation: &Situation| only.as_ref().is_none_or(|only| format!("{situation:?}") == *only);
    let pairs: Vec<_> = reached
        .iter()
        .filter(|(situation, _)| is_wanted(situation))
        .flat_map(|(situation, points)| points.iter().map(move |point| (*situation, point.as_str())))
        .collect();
    let mut cases = Vec::new();
    for (place, (situation, point)) in pairs.iter().enumerate() {
        for with in subsets(place) {
            cases.push((Lock::ALL[cases.len() % 3], (*situation, *point, with)));
        }
    }
    on_hosts(&[Lock::ALL; 3].concat(), &cases, |hosts, (situation, point, with)| {
        hosts.play(*situation, point, with);
    });
    tell(&format!("{} points of a lease, {} deaths", known.len(), cases.len()));
}

/// A keeper gives the fuse its first deadline. If terraform, `tf` and the guardian die before that, the fuse would stay
/// as long as a script that terraform has left.
#[test]
fn a_keeper_that_has_promised_nothing_ends_with_its_fuse_although_a_script_works_on() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    for lock in Lock::ALL {
        let hosts = Hosts::new(lock);
        fs::create_dir(hosts.armed()).unwrap();
        let run = hosts.start(Situation::Whole, "keeper: has its orders");
        let keeper = hosts.until(&run, "the keeper", || false).expect("a keeper that is stopped at its point");
        hosts.holder.wait_for_began(&run);
        for name in ["tf-guardian", "tf", "terraform"] {
            hosts.kill_named(name);
        }
        kill(keeper, Signal::SIGCONT).unwrap();
        let is_over = || hosts.is_over().then_some(());
        wait_within(LIMIT, "the end of the keeper and the fuse", is_over, || hosts.seen(&run));
        assert!(hosts.find("sh").is_some(), "{}", hosts.seen(&run));
        assert_eq!(record(&hosts.holder), None, "{}", hosts.seen(&run));
        hosts.unblock();
        let is_gone = || hosts.left().is_empty().then_some(());
        wait_within(LIMIT, "the end of the script", is_gone, || hosts.seen(&run));
    }
}

/// How a lock with a lapsed lease is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taker {
    /// Before terraform starts.
    Plan,
    /// While terraform waits. The lease lapses only then.
    WaitingPlan,
    /// A person releases it.
    Person,
}

const LONG_AGO: i64 = 3 * 3600;

fn taker_on(lock: Lock, taker: Taker, point: &str) -> (TestEnv, Ended) {
    let mut env = TestEnv::new(lock, "true");
    env.set("TFW_LEASE", format!("{}s", lease())).set("TFW_CLOCK", "steady");
    let (age, length, arguments) = match taker {
        Taker::Plan => (LONG_AGO, 300, vec!["plan", "-no-color"]),
        Taker::WaitingPlan => (0, 5, vec!["plan", "-no-color", "-lock-timeout=20s"]),
        Taker::Person => (LONG_AGO, 300, vec!["locks", "release", "--force", LEASED]),
    };
    env.lock_with_lease(&lapsed_record(age, length));
    let mut command = env.command(env.bin().join("tf"));
    command.args(arguments).env("TFW_CRASH", point).env("TFW_CRASH_LIST", env.directory.join("points"));
    let end = Run::start(command).wait();
    wait_until_all_is_gone(&env);
    (env, end)
}

/// Returns the points that a taker reaches.
fn reached_by(lock: Lock, taker: Taker) -> BTreeSet<String> {
    let (env, end) = taker_on(lock, taker, "none");
    assert_eq!(end.code(), Some(0), "{lock:?} {taker:?} {}", env.dump(&end));
    env.assert_unlocked();
    let points = env.read("points");
    points.lines().filter(|name| name.starts_with(OF_A_TAKER) || *name == "tf: begun").map(ToOwned::to_owned).collect()
}

/// Kills a taker at `point`, and lets another one take the lock.
fn a_taker_dies(lock: Lock, taker: Taker, point: &str) {
    let (env, end) = taker_on(lock, taker, point);
    let what = || format!("{lock:?} {taker:?} {point} {}", env.dump(&end));
    if let Some(claimed) = record(&env).filter(|_| lock != Lock::File) {
        let key = json!({ "TableName": env.table, "Key": { "LockID": { "S": env.path() } } });
        let mut item = cloud().dynamodb("GetItem", &key)["Item"].clone();
        let claim = &mut item["tf"]["M"]["taken"]["M"]["at"]["N"];
        let is_claimed = !claim.is_null();
        assert_eq!(
            is_claimed,
            ["takeover: claimed", "takeover: deleted the object"].contains(&point),
            "{claimed}\n{}",
            what()
        );
        if is_claimed {
            // It lapses within 10 s.
            *claim = (Timestamp::now().as_second() - 65).to_string().into();
            cloud().dynamodb("PutItem", &json!({ "TableName": env.table, "Item": item }));
        }
        let next = env.run(Subject::Tf, &["plan", "-no-color", "-lock-timeout=1m"]);
        assert_eq!(next.code(), Some(0), "{}\n{}", what(), env.dump(&next));
        assert_eq!(next.err.contains("is releasing that lock"), is_claimed, "{}\n{}", what(), env.dump(&next));
        assert!(next.err.contains("released the lock"), "{}\n{}", what(), env.dump(&next));
    } else {
        let next = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(next.code(), Some(0), "{}\n{}", what(), env.dump(&next));
    }
    env.assert_unlocked();
    wait_until_all_is_gone(&env);
}

#[test]
fn wherever_a_taker_dies_the_lock_can_be_taken_after_its_claim() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    let takers: Vec<(Lock, Taker)> = Lock::ALL
        .into_iter()
        .flat_map(|lock| [Taker::Plan, Taker::Person].map(|taker| (lock, taker)))
        .chain([(Lock::Both, Taker::WaitingPlan)])
        .collect();
    let mut cases = Vec::new();
    let mut known = BTreeSet::new();
    for (lock, taker) in takers {
        let points = reached_by(lock, taker);
        known.extend(points.iter().filter(|name| name.starts_with(OF_A_TAKER)).cloned());
        // A point of the taker before the start is one of the waiting taker too. Killed there, both reach no other one.
        let is_new = |name: &String| taker != Taker::WaitingPlan || name != "takeover: begun";
        cases.extend(points.into_iter().filter(is_new).map(|point| (lock, taker, point)));
    }
    assert_eq!(known, in_source(|name| name.starts_with(OF_A_TAKER)), "points that no taker reaches");
    let next = Mutex::new(cases.iter());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some((lock, taker, point)) = next.lock().unwrap().next() else { return };
                    a_taker_dies(*lock, *taker, point);
                }
            });
        }
    });
    tell(&format!("{} points of a taker, {} deaths", known.len(), cases.len()));
}
