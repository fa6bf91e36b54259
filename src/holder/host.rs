//! Collects what this host can show about the holders of locks: the journal, the pending requests, the running
//! processes and the boot time.
//!
//! Collect these facts *after* the locks are read. In the other order, a new process could take a lock in between, and
//! the facts would not contain that process.

use std::cell::{OnceCell, RefCell};
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use nix::unistd::Pid;

use super::evidence::{Claim, Judgement, PossibleHolder, Seen, depends_on_processes, host_of, judge};
use crate::journal::clock_reading::ClockReading;
use crate::journal::kept_locks::KeptLocks;
use crate::journal::pending_requests::PendingRequests;
use crate::journal::runs::{FoundRun, Journal, JournalRecord, UNLISTED};
use crate::journal::state_directory::StateDirectory;
use crate::lease::observed::ObservedLease;
use crate::lock::proof::{self, Run};
use crate::settings;
use crate::sys::plain_host;
use crate::sys::process::{self, Process};
use crate::terraform::binary::MIN_TERRAFORM_BYTES;
use crate::terraform::lock_info::{self, LockInfo};
use crate::terraform::log::RecordedLock;

/// The state of a run in the journal ([`FoundRun`]).
#[derive(Clone, Copy)]
enum RunState {
    Living,
    Recovering,
    Dead,
    /// As [`Claim::Foreign`].
    Foreign {
        why: &'static str,
        may_run_here: bool,
    },
}

impl RunState {
    /// As [`Claim::runs_here`].
    fn runs_here(self) -> bool {
        match self {
            Self::Living | Self::Recovering | Self::Foreign { may_run_here: true, .. } => true,
            Self::Dead | Self::Foreign { may_run_here: false, .. } => false,
        }
    }
}

/// The reason for not judging a run whose remaining processes may belong to another run.
const DOUBTFUL: &str = "processes that may belong to that run are still running";

/// The reason for not judging a run whose processes cannot be seen from here, if its lock file is held. The kernel
/// shows the locks on a file to every container that sees the file.
const HELD: &str = "its processes cannot be seen from here, and one of them holds the lock file of the run";

/// The reason for not judging a run if not even its lock file shows whether it is running.
const NOT_SEEN: &str = "it is not known whether a process of that run is running: its lock file cannot be examined";

/// What the journal shows about one run.
enum RecordedRun {
    /// The run was judged, and has this record.
    Read(RunState, Box<JournalRecord>),
    /// The record cannot be read, and a process holds the run's lock file, or may hold it. Each lock of this host can
    /// be a lock of that run.
    Unread,
    /// The run has ended, or no process holds its lock file and it has no valid record.
    Nothing,
}

/// Returns what `found` shows about a run. `is_held` is as [`Journal::is_held`], which is only called for a run that
/// was not judged.
fn recorded_run(found: FoundRun, is_held: impl Fn() -> io::Result<bool>) -> RecordedRun {
    let (state, record) = match found {
        FoundRun::Living(record) => (RunState::Living, record),
        FoundRun::Recovering(record) => (RunState::Recovering, record),
        // The `JournalEntry` is dropped at once, which releases the owner lock: this process only reads the journal,
        // and does not finish the run.
        FoundRun::Dead(record, ..) => (RunState::Dead, record),
        FoundRun::Doubtful(record, _) => (RunState::Foreign { why: DOUBTFUL, may_run_here: true }, record),
        FoundRun::Foreign(why, Some(record)) if UNLISTED.contains(&why) => {
            (RunState::Foreign { why, may_run_here: true }, record)
        }
        FoundRun::Foreign(why, Some(record)) => match is_held() {
            Ok(false) => (RunState::Foreign { why, may_run_here: false }, record),
            Ok(true) => (RunState::Foreign { why: HELD, may_run_here: true }, record),
            Err(_) => (RunState::Foreign { why: NOT_SEEN, may_run_here: true }, record),
        },
        FoundRun::Foreign(_, None) | FoundRun::Broken(_) | FoundRun::Unread { .. } if is_held().unwrap_or(true) => {
            return RecordedRun::Unread;
        }
        FoundRun::Foreign(_, None) | FoundRun::Broken(_) | FoundRun::Unread { .. } | FoundRun::Gone => {
            return RecordedRun::Nothing;
        }
    };
    RecordedRun::Read(state, record)
}

/// The facts that this host showed at one moment.
pub(crate) struct HostView {
    /// The runs in the journal. The key is the ID of a lock that the run has not released.
    recorded: HashMap<String, (RunState, Box<JournalRecord>)>,
    /// The pending requests. The key is the ID of the requested lock.
    late: HashMap<String, (Run, RecordedLock)>,
    /// The IDs of the locks of dead runs that `tf` on this host keeps on purpose ([`KeptLocks`], or because
    /// `TFW_RELEASE` was `never` for the run and is not set now).
    kept: HashSet<String>,
    /// Whether it is not known which locks those are, because of an error of this host.
    has_unread_kept: bool,
    /// What is the same for all locks, without the processes.
    seen: Seen,
    /// The running processes that may be a terraform. They are listed for the first lock whose verdict depends on them,
    /// because a list of all processes takes longer than all else here, and most locks of a table belong to other
    /// hosts.
    terraforms: OnceCell<Vec<PossibleHolder>>,
    /// The judgements on the holders of which only the host in the lock's `Who` is known. The key is that host. Many
    /// locks of a table may belong to the same hosts.
    by_host: RefCell<HashMap<String, Arc<Judgement>>>,
}

impl HostView {
    /// Reads the journals, the pending requests and the boot time. The processes are listed later, if at all.
    pub(crate) fn look() -> Self {
        // A look at a run that is not living locks it for a moment. A look from another thread would take that for a process
        // that cleans up after the run.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut recorded: HashMap<String, (RunState, Box<JournalRecord>)> = HashMap::new();
        let mut kept = HashSet::new();
        let (mut has_unread_run, mut has_unread_kept) = (false, false);
        let mut late = HashMap::new();
        for directory in StateDirectory::existing() {
            let pending = PendingRequests::of(&directory).read(&ClockReading::now());
            late.extend(pending.into_iter().map(|pending| (pending.lock.id.clone(), (pending.run, pending.lock))));
            match KeptLocks::of(&directory).ids() {
                Ok(ids) => kept.extend(ids),
                // Each lock may be one of these.
                Err(_) => has_unread_kept = true,
            }
            let Some(journal) = Journal::there(&directory) else { continue };
            let names = journal.list();
            has_unread_run |= names.is_err();
            for name in names.unwrap_or_default() {
                match recorded_run(journal.look(&name), || journal.is_held(&name)) {
                    RecordedRun::Read(state, record) => {
                        let is_kept = matches!(state, RunState::Dead)
                            && settings::only_reports(
                                settings::release(|name| std::env::var_os(name)),
                                record.named_only,
                            );
                        for lock in record.log.unreleased() {
                            if is_kept {
                                kept.insert(lock.id.clone());
                            }
                            // If a dead run has recorded the lock of a living one, the living one counts.
                            if !recorded.get(&lock.id).is_some_and(|(other, _)| other.runs_here()) {
                                recorded.insert(lock.id.clone(), (state, record.clone()));
                            }
                        }
                    }
                    RecordedRun::Unread => has_unread_run = true,
                    RecordedRun::Nothing => {}
                }
            }
        }
        let seen = Seen {
            claim: None,
            lease: None,
            who: lock_info::who(),
            sees_all: process::pid_namespace().is_some_and(|(_, first)| first),
            is_plain: plain_host::is_plain(),
            has_unread_run,
            is_kept: false,
            terraforms: Vec::new(),
            boot_time: process::boot_time(),
        };
        let (terraforms, by_host) = (OnceCell::new(), RefCell::default());
        Self { recorded, late, kept, has_unread_kept, seen, terraforms, by_host }
    }

    /// Leaves out the process `tf` and its descendants. A run that waits for a lock does not hold it.
    pub(crate) fn without_run_of(mut self, tf: Pid) -> Self {
        let mut terraforms = self.terraforms.take().unwrap_or_else(terraforms);
        let own: Vec<i32> = Process::below(tf).iter().map(|process| process.pid.as_raw()).collect();
        terraforms.retain(|process| process.pid != tf.as_raw() && !own.contains(&process.pid));
        self.terraforms = OnceCell::from(terraforms);
        self
    }

    /// Judges the holder of `lock`, which must have been read before this `HostView` was made. `lease` is the lease
    /// record that was read with the lock. `None` if there is none.
    pub(crate) fn judge(&self, lock: &LockInfo, lease: Option<&ObservedLease>) -> Arc<Judgement> {
        let (claim, is_kept) = (self.claim(lock), self.kept.contains(&lock.id));
        let host = host_of(&lock.who);
        let is_elsewhere = !depends_on_processes(host, &self.seen);
        if is_elsewhere && claim.is_none() && lease.is_none() && !is_kept {
            let mut by_host = self.by_host.borrow_mut();
            return match by_host.get(host) {
                Some(judgement) => Arc::clone(judgement),
                None => Arc::clone(by_host.entry(host.to_owned()).or_insert(Arc::new(judge(lock, &self.seen)))),
            };
        }
        let mut seen = Seen { claim, lease: lease.cloned(), is_kept, ..self.seen.clone() };
        if !is_elsewhere {
            seen.terraforms.clone_from(self.terraforms.get_or_init(terraforms));
        }
        Arc::new(judge(lock, &seen))
    }

    /// Returns whether the journal shows that a process of the run that holds `lock` is or may be running on this host,
    /// or that a process of this host is finishing the run. Its lock then stays, whatever its lease says. If the
    /// journal has a run whose record cannot be read and that may be running, this is true for every lock that no other
    /// record has.
    fn runs_here(&self, lock: &LockInfo) -> bool {
        self.claim(lock).map_or(self.seen.has_unread_run, |claim| claim.runs_here())
    }

    /// Returns whether no run on this host may take over `lock`, whatever its lease says: because a process of its run
    /// is or may be running here ([`Self::runs_here`]), or because `tf` on this host keeps the lock of that dead run on
    /// purpose. This host has said that it does not release such a lock, or will say so.
    pub(crate) fn stays(&self, lock: &LockInfo) -> bool {
        self.runs_here(lock)
            || self.has_unread_kept
            || self.kept.contains(&lock.id)
            || self.claim(lock).is_some_and(|claim| claim.is_in_doubt())
    }

    /// Returns the ID of the dead run in the journal that recorded the lock `id` and did not release it. `None` if
    /// there is no such run.
    pub(crate) fn dead_run(&self, id: &str) -> Option<&str> {
        match self.recorded.get(id) {
            Some((RunState::Dead | RunState::Recovering, record)) => Some(&record.run),
            _ => None,
        }
    }

    /// Returns whether a dead terraform held the lock `id` while the lock's table or bucket was unavailable. If so, a
    /// write of that terraform may still be in flight.
    pub(crate) fn was_had_late(&self, id: &str) -> bool {
        self.late.get(id).is_some_and(|(_, recorded)| recorded.progress.held.is_some())
    }

    fn claim(&self, lock: &LockInfo) -> Option<Claim> {
        let disagrees = |recorded: &RecordedLock, run: &Run| match proof::judge(recorded, lock, run) {
            proof::Match::Ours => None,
            proof::Match::Doubt(why) => Some(why),
            proof::Match::Anothers => Some("the lock's ID is different"),
        };
        if let Some((state, record)) = self.recorded.get(&lock.id) {
            let run = record.run.clone();
            return Some(match state {
                RunState::Living => Claim::Living {
                    run,
                    tf: record.tf,
                    terraform: record.terraform,
                    command: format!("{} {}", record.program, record.command),
                },
                RunState::Foreign { why, may_run_here } => Claim::Foreign { why, may_run_here: *may_run_here },
                RunState::Recovering | RunState::Dead => {
                    let of_run = record.proof();
                    let recorded = record.log.unreleased().find(|recorded| recorded.id == lock.id)?;
                    let recovering = matches!(state, RunState::Recovering);
                    Claim::Dead { run, tf: record.tf, recovering, disagrees: disagrees(recorded, &of_run) }
                }
            });
        }
        let (run, recorded) = self.late.get(&lock.id)?;
        Some(Claim::Late { disagrees: disagrees(recorded, run), had: recorded.progress.held.is_some() })
    }
}

/// Returns the running processes that have `terraform` or `tofu` in their name, and the running processes that may be a
/// terraform under another name. The list includes providers, because a provider may still be working when its
/// terraform is dead. The list proves neither that a holder is alive nor that it is dead: a person must decide about
/// the lock.
fn terraforms() -> Vec<PossibleHolder> {
    let boot_time = process::boot_time();
    Process::all()
        .into_iter()
        // This process is left out, because its name contains `terraform` if `tf` is installed under that name.
        .filter(|process| !process.is_dead() && process.pid != nix::unistd::getpid())
        .filter_map(|process| {
            let program = process.program();
            let named = [&program, &process.name].iter().any(|name| is_name_of_terraform(name));
            (named || process.may_be_renamed_terraform(MIN_TERRAFORM_BYTES)).then(|| PossibleHolder {
                pid: process.pid.as_raw(),
                started: boot_time.and_then(|boot_time| process.started(boot_time)),
                program,
            })
        })
        .collect()
}

/// Whether `name` may be the name of a terraform or of one of its providers.
fn is_name_of_terraform(name: &str) -> bool {
    name.contains("terraform") || name.contains("tofu")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::tests::{ID, lock_line};

    const RUN: &str = "4000000-0123456789abcdef";

    fn record() -> JournalRecord {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::open(&StateDirectory::at(root.path())).unwrap();
        let mut record = JournalRecord::new(RUN, &journal);
        record.log.read(lock_line(7, "Attempting to lock remote state (DynamoDB only)...", ID, "r").as_bytes());
        JournalRecord {
            who: "root@vm".into(),
            started: "2026-11-23T01:46:07Z".parse().unwrap(),
            tf: 7,
            terraform: Some(8),
            program: "terraform".into(),
            command: "apply".into(),
            ..record
        }
    }

    fn stored(id: &str, who: &str) -> LockInfo {
        LockInfo {
            id: id.into(),
            operation: "OperationTypeApply".into(),
            who: who.into(),
            version: "1.11.4".into(),
            created: "2026-11-23T01:46:07.5931Z".into(),
            path: "bkt/dir/prod.tfstate".into(),
        }
    }

    /// Returns what this host shows if a run in the state `state` has recorded the lock, and if a request for the lock
    /// is pending, whose terraform held it if `late` is true.
    fn view(state: Option<RunState>, late: Option<bool>) -> HostView {
        let record = record();
        let mut lock = record.log.named().next().unwrap().clone();
        let recorded = state.map(|state| (ID.to_owned(), (state, Box::new(record.clone()))));
        let late = late.map(|is_held| {
            lock.progress.held = is_held.then_some(record.started);
            (ID.to_owned(), (record.proof(), lock))
        });
        HostView {
            recorded: recorded.into_iter().collect(),
            late: late.into_iter().collect(),
            kept: HashSet::new(),
            has_unread_kept: false,
            seen: Seen::default(),
            terraforms: OnceCell::new(),
            by_host: RefCell::default(),
        }
    }

    #[test]
    fn the_journal_says_of_a_lock_what_it_says_of_its_run() {
        let run = || RUN.to_owned();
        let dead = |recovering, disagrees| Claim::Dead { run: run(), tf: 7, recovering, disagrees };
        let who = Some("the lock's Who is not this user on this host");
        for (state, [agreeing, disagreeing]) in [
            (RunState::Dead, [dead(false, None), dead(false, who)]),
            (RunState::Recovering, [dead(true, None), dead(true, who)]),
            (
                RunState::Foreign { why: "why", may_run_here: false },
                [(); 2].map(|()| Claim::Foreign { why: "why", may_run_here: false }),
            ),
            (
                RunState::Living,
                [0, 1].map(|_| Claim::Living {
                    run: run(),
                    tf: 7,
                    terraform: Some(8),
                    command: "terraform apply".into(),
                }),
            ),
        ] {
            // The record of a run knows more than a request that the run has left.
            for late in [None, Some(true), Some(false)] {
                let view = view(Some(state), late);
                let disagreement = |claim: Option<Claim>| match claim {
                    Some(Claim::Dead { disagrees, .. }) => disagrees.is_some(),
                    _ => false,
                };
                assert_eq!(view.claim(&stored(ID, "root@vm")), Some(agreeing.clone()));
                let other = view.claim(&stored(ID, "root@other"));
                assert_eq!(disagreement(other.clone()), disagreement(Some(disagreeing.clone())), "{other:?}");
                assert_eq!(view.claim(&stored("6e75cb05-d70c-4132-39e0-d2abba1b3077", "root@vm")), None);
            }
        }
    }

    #[test]
    fn a_pending_request_claims_its_lock_and_shows_whether_it_was_held() {
        for had in [false, true] {
            let view = view(None, Some(had));
            assert_eq!(view.claim(&stored(ID, "root@vm")), Some(Claim::Late { disagrees: None, had }));
            let other = view.claim(&stored(ID, "root@other"));
            assert!(matches!(other, Some(Claim::Late { disagrees: Some(_), had: held }) if held == had), "{other:?}");
            assert_eq!((view.was_had_late(ID), view.was_had_late("other")), (had, false));
            assert_eq!(view.dead_run(ID), None);
        }
        assert_eq!(view(None, None).claim(&stored(ID, "root@vm")), None);
    }

    #[test]
    fn only_a_run_whose_processes_are_dead_is_a_dead_run() {
        for (state, expected) in [
            (RunState::Living, None),
            (RunState::Recovering, Some(RUN)),
            (RunState::Dead, Some(RUN)),
            (RunState::Foreign { why: "x", may_run_here: true }, None),
            (RunState::Foreign { why: "x", may_run_here: false }, None),
        ] {
            assert_eq!(view(Some(state), None).dead_run(ID), expected);
            assert_eq!(view(Some(state), None).dead_run("other"), None);
        }
    }

    #[test]
    fn a_run_is_running_here_if_the_journal_has_a_process_that_is_or_may_be_its_own_or_finishes_it() {
        for (state, expected) in [
            (Some(RunState::Living), true),
            (Some(RunState::Foreign { why: "x", may_run_here: true }), true),
            (Some(RunState::Foreign { why: "x", may_run_here: false }), false),
            (Some(RunState::Recovering), true),
            (Some(RunState::Dead), false),
            (None, false),
        ] {
            for late in [None, Some(true), Some(false)] {
                let mut view = view(state, late);
                let other = stored("6e75cb05-d70c-4132-39e0-d2abba1b3077", "root@vm");
                assert_eq!(view.runs_here(&stored(ID, "root@vm")), expected);
                assert!(!view.runs_here(&other));
                // A record that cannot be read may have each lock that no other record has.
                view.seen.has_unread_run = true;
                assert_eq!(
                    view.runs_here(&stored(ID, "root@vm")),
                    expected || (state.is_none() && late.is_none()),
                    "{late:?}"
                );
                assert!(view.runs_here(&other));
            }
        }
    }

    #[test]
    fn a_run_that_cannot_be_judged_may_be_running_unless_the_kernel_shows_that_nobody_holds_its_lock_file() {
        type Held = fn() -> io::Result<bool>;
        let held: [(Held, bool); 3] =
            [(|| Ok(false), false), (|| Ok(true), true), (|| Err(io::Error::from_raw_os_error(libc::EMFILE)), true)];
        for (is_held, may_run_here) in held {
            let RecordedRun::Read(state, _) = recorded_run(FoundRun::Foreign("x", Some(Box::new(record()))), is_held)
            else {
                panic!()
            };
            assert_eq!(state.runs_here(), may_run_here);
            assert!(matches!(state, RunState::Foreign { why, .. } if (why == "x") != may_run_here));
            let unread = FoundRun::Unread { path: "x".into(), error: "y".into() };
            for found in [FoundRun::Foreign("x", None), FoundRun::Broken("x".into()), unread] {
                assert_eq!(matches!(recorded_run(found, is_held), RecordedRun::Unread), may_run_here);
            }
            for found in [FoundRun::Living(Box::new(record())), FoundRun::Recovering(Box::new(record()))] {
                assert!(matches!(recorded_run(found, is_held), RecordedRun::Read(state, _) if state.runs_here()));
            }
            let doubtful = FoundRun::Doubtful(Box::new(record()), Vec::new());
            assert!(matches!(recorded_run(doubtful, is_held), RecordedRun::Read(state, _) if state.runs_here()));
            for why in UNLISTED {
                let found = recorded_run(FoundRun::Foreign(why, Some(Box::new(record()))), is_held);
                assert!(matches!(found, RecordedRun::Read(state, _) if state.runs_here()));
            }
            assert!(matches!(recorded_run(FoundRun::Gone, is_held), RecordedRun::Nothing));
        }
    }

    #[test]
    fn a_lock_that_this_host_keeps_on_purpose_stays_here() {
        for (state, runs_here) in [(Some(RunState::Living), true), (Some(RunState::Dead), false), (None, false)] {
            for late in [None, Some(true), Some(false)] {
                for is_kept in [false, true] {
                    let mut view = view(state, late);
                    if is_kept {
                        view.kept.insert(ID.to_owned());
                    }
                    assert_eq!(view.stays(&stored(ID, "root@vm")), runs_here || is_kept, "{late:?}");
                    // The lock does not agree with what was recorded.
                    let is_recorded = state.is_some() || late.is_some();
                    assert_eq!(view.stays(&stored(ID, "root@other")), is_recorded || is_kept, "{late:?}");
                    assert!(!view.stays(&stored("6e75cb05-d70c-4132-39e0-d2abba1b3077", "root@vm")));
                }
            }
        }
    }

    #[test]
    fn a_lock_gets_the_judgement_that_it_would_get_alone() {
        use crate::lease::observed::tests::lease;
        use crate::lease::record::Promise;
        const OTHER: &str = "6e75cb05-d70c-4132-39e0-d2abba1b3077";
        let whos =
            ["a@elsewhere", "b@elsewhere", "elsewhere", "b", "", "a@localhost", "b@localhost", "a@vm", "root@vm"];
        for state in [None, Some(RunState::Dead), Some(RunState::Living)] {
            for bits in 0..32 {
                let bit = |place: u32| bits >> place & 1 == 1;
                let mut view = view(state, None);
                view.kept.extend(bit(0).then(|| ID.to_owned()));
                view.seen = Seen {
                    who: if bit(1) { "root@vm".into() } else { String::new() },
                    has_unread_run: bit(2),
                    is_plain: bit(3),
                    sees_all: bit(4),
                    boot_time: Some("2026-11-01T00:00:00Z".parse().unwrap()),
                    ..Seen::default()
                };
                view.terraforms = OnceCell::from(Vec::new());
                // Before each lock but the first of its host came one with another user, time and operation.
                for ((who, id), is_old) in
                    whos.into_iter().flat_map(|who| [(who, OTHER), (who, ID)]).zip([false, true].into_iter().cycle())
                {
                    for lease in [None, Some(lease(id, 40, None, Promise::Stop))] {
                        let (mut lock, is_kept) = (stored(id, who), view.kept.contains(id));
                        if is_old {
                            lock.created = "2026-10-01T00:00:00Z".into();
                            lock.operation = "OperationTypePlan".into();
                        }
                        let claim = view.claim(&lock);
                        let seen = Seen { claim, lease: lease.clone(), is_kept, ..view.seen.clone() };
                        assert_eq!(*view.judge(&lock, lease.as_ref()), judge(&lock, &seen), "{lock:?} {seen:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_provider_has_the_name_of_terraform_too() {
        for name in ["terraform", "tofu", "terraform_1.11.4", "opentofu", "terraform-provi"] {
            assert!(is_name_of_terraform(name), "{name}");
        }
        for name in ["tf", "terragrunt", "bash", ""] {
            assert!(!is_name_of_terraform(name), "{name}");
        }
    }
}
