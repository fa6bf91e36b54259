//! The mark of a run in the environment of its processes, and the search for the living processes of a run.

use nix::unistd::{Pid, getpid};

use crate::journal::membership::{Membership, ProcessMark, TreeIdentity, classify};
use crate::sys::process::{self, Process, Variable};

/// The variable that marks every process of a run. A nested run appends its own ID to the IDs of its outer runs:
/// `OUTER/INNER`.
pub(crate) const RUN: &str = "TFW_RUN";

/// The living processes of a run, as seen by an observer that is not their ancestor.
#[derive(Debug, Default)]
pub(crate) struct Living {
    /// Processes that belong to the run.
    pub(crate) members: Vec<Process>,
    /// Processes that may belong to the run.
    pub(crate) unknown: Vec<Process>,
}

impl Living {
    /// Finds the living processes of the run with the mark `run`, except this process and helpers of `tf`. For
    /// `certain_before`, see [`classify`].
    pub(crate) fn of(run: &str, identity: &TreeIdentity, certain_before: Option<u64>) -> Self {
        let failed_before = process::failed_reads();
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
        // /proc may hide a survivor that runs as another user (`hidepid`). If kill(2) fails with EPERM, a process with
        // its pid still exists.
        let hidden = identity.survivors.iter().map(|(pid, _)| Pid::from_raw(*pid));
        let hidden = hidden.filter(|pid| pid.as_raw() > 0 && !pids.contains(pid));
        living.unknown.extend(hidden.filter_map(Process::forbidden));
        // A list without this process is not complete either.
        if !pids.contains(&own) || process::failed_reads() != failed_before {
            living.unknown.push(Process::unseen_in(Pid::from_raw(0)));
        }
        // /proc may also hide members of terraform's group. This matters only if no other process of the run was found.
        if let Some(group) = identity.group.map(Pid::from_raw)
            && living.is_empty()
            && is_hidden(group)
        {
            living.unknown.push(Process::unseen_in(group));
        }
        living
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty() && self.unknown.is_empty()
    }
}

/// Returns whether the environment of `process` has the mark of `run`.
pub(crate) fn mark_of(process: &Process, run: &str) -> ProcessMark {
    match process.environment(RUN) {
        Variable::Set(runs) if runs.split(|&byte| byte == b'/').any(|marked| marked == run.as_bytes()) => {
            ProcessMark::Marked
        }
        Variable::Set(_) | Variable::Unset => ProcessMark::Unmarked,
        Variable::Unreadable => ProcessMark::Unreadable,
    }
}

/// Whether `group` has processes although /proc shows none of them to this process. False if /proc shows at least one
/// process of the group, even if it hides others.
fn is_hidden(group: Pid) -> bool {
    // Read the list before the group is checked. If a zombie is reaped between the two checks, it is in the list, and
    // does not count as hidden.
    !Process::all().iter().any(|process| process.group == group) && process::group_exists(group)
}
/// Returns whether `name` is a variable by which Jenkins finds the processes of a job (ProcessTree.java).
pub(crate) fn is_jenkins_cookie(name: &str) -> bool {
    (name.starts_with("JENKINS_") || name.starts_with("HUDSON_")) && name.ends_with("COOKIE")
}

/// Returns whether `name` is a variable that the guardian, the fuse and the keeper must not have. These are the
/// variables by which a runner finds the processes of a job, and the mark of an outer run in which this run is nested
/// ([`RUN`]).
pub(crate) fn marks_us(name: &str) -> bool {
    is_jenkins_cookie(name) || matches!(name, "RUNNER_TRACKING_ID" | "VSTS_PROCESS_LOOKUP_ID" | "BUILD_ID" | RUN)
}
