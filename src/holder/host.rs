//! What this host can see of the holders of locks: its journal, its processes, its boot.
//!
//! It is looked at *after* the locks were read. Read before, a lock that was taken in between would belong to a process
//! that was not there yet.

use std::collections::HashMap;

use jiff::Timestamp;

use super::evidence::{Claim, Judgement, PossibleHolder, Seen, judge};
use crate::journal::pending_requests::PendingRequests;
use crate::journal::runs::{FoundRun, Journal, JournalRecord};
use crate::journal::state_directory::StateDirectory;
use crate::lock::proof::{self, Run};
use crate::sys::plain_host;
use crate::sys::process::{self, Process};
use crate::terraform::binary::LARGE;
use crate::terraform::lock_info::{self, LockInfo};
use crate::terraform::log::RecordedLock;

/// How a run in the journal is.
#[derive(Clone, Copy)]
enum RunState {
    Living,
    Settling,
    Dead,
    Foreign(&'static str),
}

/// Why a run is not judged of which only processes are left that may be another's.
const DOUBTFUL: &str = "processes that may belong to that run are still running";

/// One moment of this host.
pub(crate) struct HostView {
    /// By lock ID.
    recorded: HashMap<String, (RunState, Box<JournalRecord>)>,
    late: HashMap<String, (Run, RecordedLock)>,
    seen: Seen,
}

impl HostView {
    /// Looks around.
    pub(crate) fn look() -> Self {
        let mut recorded = HashMap::new();
        let mut late = HashMap::new();
        for directory in StateDirectory::all(|name| std::env::var_os(name)) {
            let tombstones = PendingRequests::of(&directory).read(Timestamp::now());
            late.extend(tombstones.into_iter().map(|pending| (pending.lock.id.clone(), (pending.run, pending.lock))));
            let Some(journal) = Journal::there(&directory) else { continue };
            for name in journal.names() {
                let (state, record) = match journal.look(&name) {
                    FoundRun::Living(record) => (RunState::Living, record),
                    FoundRun::Settling(record) => (RunState::Settling, record),
                    // What is held of it is let go again: nothing is finished here.
                    FoundRun::Dead(record, ..) => (RunState::Dead, record),
                    FoundRun::Foreign(why, Some(record)) => (RunState::Foreign(why), record),
                    FoundRun::Doubtful(record, _) => (RunState::Foreign(DOUBTFUL), record),
                    FoundRun::Foreign(_, None) | FoundRun::Broken(_) | FoundRun::Gone => continue,
                };
                for lock in record.log.unreleased() {
                    recorded.insert(lock.id.clone(), (state, record.clone()));
                }
            }
        }
        let seen = Seen {
            claim: None,
            who: lock_info::who(),
            sees_all: process::pid_namespace().is_some_and(|(_, first)| first),
            is_plain: plain_host::is_plain(),
            terraforms: terraforms(),
            boot_time: process::boot_time(),
        };
        Self { recorded, late, seen }
    }

    /// Judges the holder of a lock that stood before this was looked at.
    pub(crate) fn judge(&self, lock: &LockInfo) -> Judgement {
        judge(lock, &Seen { claim: self.claim(lock), ..self.seen.clone() })
    }

    /// The run in the journal that a dead lock belongs to.
    pub(crate) fn dead_run(&self, id: &str) -> Option<&str> {
        match self.recorded.get(id) {
            Some((RunState::Dead | RunState::Settling, record)) => Some(&record.run),
            _ => None,
        }
    }

    /// Whether a dead terraform had this lock while its place was away. A write of it may still be on its way.
    pub(crate) fn was_had_late(&self, id: &str) -> bool {
        self.late.get(id).is_some_and(|(_, recorded)| recorded.locked.is_some())
    }

    fn claim(&self, lock: &LockInfo) -> Option<Claim> {
        let disagrees = |recorded: &RecordedLock, run: &Run| match proof::judge(recorded, lock, run) {
            proof::Match::Ours => None,
            proof::Match::Doubt(why) => Some(why),
            proof::Match::Anothers => Some("its ID is another"),
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
                RunState::Foreign(why) => Claim::Foreign { why },
                RunState::Settling | RunState::Dead => {
                    let of_run = record.proof();
                    let recorded = record.log.unreleased().find(|recorded| recorded.id == lock.id)?;
                    let settling = matches!(state, RunState::Settling);
                    Claim::Dead { run, tf: record.tf, settling, disagrees: disagrees(recorded, &of_run) }
                }
            });
        }
        let (run, recorded) = self.late.get(&lock.id)?;
        Some(Claim::Late { disagrees: disagrees(recorded, run), had: recorded.locked.is_some() })
    }
}

/// Everything that runs here and has terraform or tofu in its name: providers among it, which may still be at work when
/// their terraform is dead; and what may be a terraform under another name. This decides nothing that is not asked of a person.
fn terraforms() -> Vec<PossibleHolder> {
    let boot_time = process::boot_time();
    Process::all()
        .into_iter()
        // We are one of them, where we are called terraform.
        .filter(|process| !process.is_dead() && process.pid != nix::unistd::getpid())
        .filter_map(|process| {
            let program = process.program();
            let named =
                [&program, &process.name].iter().any(|name| name.contains("terraform") || name.contains("tofu"));
            (named || process.may_be_renamed_terraform(LARGE)).then(|| PossibleHolder {
                pid: process.pid.as_raw(),
                started: boot_time.and_then(|boot_time| process.started(boot_time)),
                program,
            })
        })
        .collect()
}
