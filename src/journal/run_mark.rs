//! The mark of a run in the environment of its processes, and who is alive of those that a run can be known by.

use crate::journal::membership::{Membership, ProcessMark, TreeIdentity, classify};
use crate::sys::process::{self, Process, Variable};
use nix::unistd::{Pid, getpid};

/// The variable that marks every process of a run. A run below another one names both, the outer first: `OUTER/INNER`.
pub(crate) const RUN: &str = "TFW_RUN";

/// The processes of a run, as an observer sees them who is not above them.
#[derive(Debug, Default)]
pub(crate) struct Living {
    /// These belong to it.
    pub(crate) members: Vec<Process>,
    /// These may.
    pub(crate) unknown: Vec<Process>,
}

impl Living {
    /// Looks at the living processes of the run that has the mark `run`. `certain_before`: see [`classify`].
    pub(crate) fn of(run: &str, identity: &TreeIdentity, certain_before: Option<u64>) -> Self {
        let all: Vec<(Process, ProcessMark)> =
            Process::all().into_iter().map(|process| (process.clone(), mark_of(&process, run))).collect();
        let found = classify(&all, identity, certain_before);
        let pids: Vec<Pid> = all.iter().map(|(process, _)| process.pid).collect();
        let own = getpid();
        let mut living = Self::default();
        for ((process, _), membership) in all.into_iter().zip(found) {
            let list = match membership {
                Membership::Member => &mut living.members,
                Membership::Unknown => &mut living.unknown,
                Membership::Other => continue,
            };
            if !process.is_dead() && process.pid != own && !process.is_helper_of_ours() {
                list.push(process);
            }
        }
        // Another user's, which /proc may hide from us (`hidepid`): to signal it is forbidden only while it is there.
        let hidden = identity.survivors.iter().map(|(pid, _)| Pid::from_raw(*pid));
        let hidden = hidden.filter(|pid| pid.as_raw() > 0 && !pids.contains(pid));
        living.unknown.extend(hidden.filter_map(Process::forbidden));
        // Members of terraform's group whom it hides.
        if let Some(group) = identity.group.map(Pid::from_raw)
            && living.is_empty()
            && hides_members(group)
        {
            living.unknown.push(Process::unseen_in(group));
        }
        living
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty() && self.unknown.is_empty()
    }
}

/// Whether the process carries the mark of `run`.
pub(crate) fn mark_of(process: &Process, run: &str) -> ProcessMark {
    match process.environment(RUN) {
        Variable::Set(runs) if runs.split(|&byte| byte == b'/').any(|marked| marked == run.as_bytes()) => {
            ProcessMark::Marked
        }
        Variable::Set(_) | Variable::Unset => ProcessMark::Unmarked,
        Variable::Unreadable => ProcessMark::Unreadable,
    }
}

/// Whether a process is in `group` that /proc does not show us.
fn hides_members(group: Pid) -> bool {
    // The list first: a zombie that is taken away between the two is in the list, or is no member any more.
    !Process::all().iter().any(|process| process.group == group) && process::group_exists(group)
}
