//! What this host can see of the holders of locks: its journal, its processes, its boot.
//!
//! It is looked at *after* the locks were read. Read before, a lock that was taken in between would belong to a process
//! that was not there yet.

use std::collections::HashMap;

use jiff::Timestamp;

use super::evidence::{Claim, Judgement, Seen, Suspect, judge};
use crate::journal::pending_requests::Graveyard;
use crate::journal::runs::{Found, Journal, Record};
use crate::journal::state_directory::StateDirectory;
use crate::lock::proof::{self, Run};
use crate::sys::plain_host;
use crate::sys::process::{self, Process};
use crate::terraform::binary::LARGE;
use crate::terraform::lock_info::{self, LockInfo};
use crate::terraform::log::RecordedLock;

/// How a run in the journal is.
#[derive(Clone, Copy)]
enum State {
    Living,
    Settling,
    Dead,
    Foreign(&'static str),
}

/// Why a run is not judged of which only processes are left that may be another's.
const DOUBTFUL: &str = "processes that may belong to that run are still running";

/// One moment of this host.
pub(crate) struct Host {
    /// By lock ID.
    recorded: HashMap<String, (State, Box<Record>)>,
    late: HashMap<String, (Run, RecordedLock)>,
    seen: Seen,
}

impl Host {
    /// Looks around.
    pub(crate) fn look() -> Self {
        let mut recorded = HashMap::new();
        let mut late = HashMap::new();
        for directory in StateDirectory::all(|name| std::env::var_os(name)) {
            let tombstones = Graveyard::of(&directory).read(Timestamp::now());
            late.extend(
                tombstones.into_iter().map(|tombstone| (tombstone.lock.id.clone(), (tombstone.run, tombstone.lock))),
            );
            let Some(journal) = Journal::there(&directory) else { continue };
            for name in journal.names() {
                let (state, record) = match journal.look(&name) {
                    Found::Living(record) => (State::Living, record),
                    Found::Settling(record) => (State::Settling, record),
                    // What is held of it is let go again: nothing is finished here.
                    Found::Dead(record, ..) => (State::Dead, record),
                    Found::Foreign(why, Some(record)) => (State::Foreign(why), record),
                    Found::Doubtful(record, _) => (State::Foreign(DOUBTFUL), record),
                    Found::Foreign(_, None) | Found::Broken(_) | Found::Gone => continue,
                };
                for lock in record.log.standing() {
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
            booted: process::booted(),
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
            Some((State::Dead | State::Settling, record)) => Some(&record.run),
            _ => None,
        }
    }

    /// Whether a dead terraform had this lock while its place was away. A write of it may still be on its way.
    pub(crate) fn was_had_late(&self, id: &str) -> bool {
        self.late.get(id).is_some_and(|(_, recorded)| recorded.locked.is_some())
    }

    fn claim(&self, lock: &LockInfo) -> Option<Claim> {
        let disagrees = |recorded: &RecordedLock, run: &Run| match proof::judge(recorded, lock, run) {
            proof::Verdict::Ours => None,
            proof::Verdict::Doubt(why) => Some(why),
            proof::Verdict::Anothers => Some("its ID is another"),
        };
        if let Some((state, record)) = self.recorded.get(&lock.id) {
            let run = record.run.clone();
            return Some(match state {
                State::Living => Claim::Living {
                    run,
                    tf: record.tf,
                    terraform: record.terraform,
                    command: format!("{} {}", record.program, record.command),
                },
                State::Foreign(why) => Claim::Foreign { why },
                State::Settling | State::Dead => {
                    let of_run = record.proof();
                    let recorded = record.log.standing().find(|recorded| recorded.id == lock.id)?;
                    let settling = matches!(state, State::Settling);
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
fn terraforms() -> Vec<Suspect> {
    let booted = process::booted();
    Process::all()
        .into_iter()
        // We are one of them, where we are called terraform.
        .filter(|process| !process.is_dead() && process.pid != nix::unistd::getpid())
        .filter_map(|process| {
            let program = process.program();
            let named =
                [&program, &process.name].iter().any(|name| name.contains("terraform") || name.contains("tofu"));
            (named || process.may_be_renamed_terraform(LARGE)).then(|| Suspect {
                pid: process.pid.as_raw(),
                started: booted.and_then(|booted| process.started(booted)),
                program,
            })
        })
        .collect()
}
