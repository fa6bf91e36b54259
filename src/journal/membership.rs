//! Decides which processes belong to a run. This module is for observers that are not ancestors of these processes: the
//! guardian, and a later `tf`.
//!
//! Five facts show that a process belongs to a run, and each of them misses some processes:
//!
//! - The mark: `TFW_RUN` in the environment. A child process may clear its environment, and the environment of another
//!   user's process (`sudo`) cannot be read.
//! - Descent from a member. An observer can see this fact only as long as the parent is alive.
//! - An earlier observation that showed the process as a member. A process that starts and loses its parent between two
//!   observations is missed.
//! - Terraform's process group. A child process stays in it unless it creates a group of its own. The kernel does not
//!   reuse the number of the group as a pid while any process is in the group (fork(2), `alloc_pid`).
//! - Terraform's session. The caller's shell is in the same session, so this fact proves little. It makes a process a
//!   possible member only if its environment cannot be read and its parent has exited.
//!
//! If it is not certain whether a process belongs to the run, the lock is not released, and the process gets no signal.

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::sys::process::{self, Process};

/// The facts that identify the processes of a run, in addition to the mark.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TreeIdentity {
    /// When terraform started, in clock ticks since boot. `None` if that could not be read.
    pub(crate) start: Option<u64>,
    /// Terraform's process group. `None` if terraform is in the group of `tf` (`TFW_TTY=shared`), which other processes
    /// are in as well.
    pub(crate) group: Option<i32>,
    /// Terraform's session. `None` if that could not be read.
    pub(crate) session: Option<i32>,
    /// Processes that were seen as members: processes that left terraform's group, and processes that outlived the run.
    /// Each entry is a pid and the start of the process, in clock ticks since boot. The start is 0 if it could not be
    /// read.
    #[serde(default)]
    pub(crate) survivors: Vec<(i32, u64)>,
}

impl TreeIdentity {
    /// Returns the identity of the tree of terraform `pid`, which was just started. `own_group` is true if terraform
    /// has a process group of its own.
    pub(crate) fn of(pid: Pid, own_group: bool) -> Self {
        Self {
            start: Process::look_up(pid).map(|process| process.start),
            group: own_group.then(|| pid.as_raw()),
            session: nix::unistd::getsid(Some(pid)).ok().map(Pid::as_raw),
            survivors: Vec::new(),
        }
    }

    /// Adds `survivors` to those that are known. A process that is not seen now may still be running, because a search
    /// may fail.
    pub(crate) fn add_survivors(&mut self, survivors: Vec<(i32, u64)>) {
        for survivor in survivors {
            if !self.survivors.contains(&survivor) {
                self.survivors.push(survivor);
            }
        }
    }
}

/// Whether the environment of a process contains the mark of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProcessMark {
    /// The environment contains the mark.
    Marked,
    /// The environment does not contain the mark.
    Unmarked,
    /// The environment is empty or cannot be read.
    Unreadable,
}

/// Whether a process belongs to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Membership {
    /// The process belongs to the run.
    Member,
    /// The process does not belong to the run.
    Other,
    /// The process may belong to the run.
    Unknown,
}

/// Returns the membership of each process in `all`, in the same order.
///
/// `certain_before` is a moment, in clock ticks since boot, at which terraform was still alive. A process in
/// terraform's group that started before this moment is certainly a member. A process that started later may be in
/// another group, which has the same number because terraform's group no longer exists. If `certain_before` is `None`,
/// every process in the group counts as a process that started before this moment.
pub(crate) fn classify(
    all: &[(Process, ProcessMark)],
    identity: &TreeIdentity,
    certain_before: Option<u64>,
) -> Vec<Membership> {
    let mut found: Vec<Membership> =
        all.iter().map(|(process, mark)| alone(process, *mark, all, identity, certain_before)).collect();
    // Each parent passes its membership on to its children, until nothing changes. A zombie passes on nothing, because
    // its children already have another parent.
    loop {
        let mut more = false;
        for kind in [Membership::Member, Membership::Unknown] {
            let parents: Vec<Pid> = all
                .iter()
                .zip(&found)
                .filter(|(_, found)| **found == kind)
                .map(|((process, _), _)| process.pid)
                .collect();
            for ((process, _), found) in all.iter().zip(&mut found) {
                let weaker = *found == Membership::Other || (*found, kind) == (Membership::Unknown, Membership::Member);
                if weaker && parents.contains(&process.parent) {
                    (*found, more) = (kind, true);
                }
            }
        }
        if !more {
            return found;
        }
    }
}

/// Returns the membership of one process by its own facts. The membership of its parent is not considered.
fn alone(
    process: &Process,
    mark: ProcessMark,
    all: &[(Process, ProcessMark)],
    identity: &TreeIdentity,
    certain_before: Option<u64>,
) -> Membership {
    let survived =
        identity.survivors.iter().any(|(pid, start)| (*pid, *start) == (process.pid.as_raw(), process.start));
    if survived || mark == ProcessMark::Marked {
        return Membership::Member;
    }
    let in_time = identity.start.is_none_or(|start| process.start >= start);
    let in_group = Some(process.group.as_raw()) == identity.group;
    // If the clock was set back, a process of the tree seems to be older than terraform.
    if in_group && (in_time || process::START_CLOCK_CAN_BE_SET) {
        let leader = all.iter().find(|(other, _)| other.pid == process.group);
        let reused = leader.is_some_and(|(leader, _)| identity.start.is_some_and(|start| leader.start != start));
        let certain = in_time && identity.start.is_some() && certain_before.is_none_or(|moment| process.start < moment);
        return match (reused, certain) {
            (true, _) => Membership::Other,
            (false, true) => Membership::Member,
            (false, false) => Membership::Unknown,
        };
    }
    // The start of this survivor could not be read when it was recorded, so its pid may have been reused.
    if identity.survivors.iter().any(|(pid, start)| *pid == process.pid.as_raw() && *start == 0) {
        return Membership::Unknown;
    }
    let in_session = Some(process.session.as_raw()) == identity.session;
    if in_time && in_session && mark == ProcessMark::Unreadable && is_orphan(process, all) {
        return Membership::Unknown;
    }
    Membership::Other
}

/// Whether the parent of `process` has exited. True if the current parent is not in `all`, is init, or is in another
/// session: the kernel gives an orphan to init or to a subreaper, and the subreaper is in another session.
fn is_orphan(process: &Process, all: &[(Process, ProcessMark)]) -> bool {
    let parent = all.iter().find(|(other, _)| other.pid == process.parent);
    parent.is_none_or(|(parent, _)| parent.pid == Pid::from_raw(1) || parent.session != process.session)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERRAFORM: i32 = 100;
    const SHELL: i32 = 50;

    fn process(pid: i32, parent: i32, group: i32, session: i32, start: u64) -> Process {
        Process {
            pid: Pid::from_raw(pid),
            thread: Pid::from_raw(pid),
            name: "x".into(),
            state: 'S',
            parent: Pid::from_raw(parent),
            group: Pid::from_raw(group),
            session: Pid::from_raw(session),
            start,
        }
    }

    fn identity() -> TreeIdentity {
        TreeIdentity { start: Some(1000), group: Some(TERRAFORM), session: Some(SHELL), survivors: vec![(300, 1500)] }
    }

    /// Returns the membership of `process` in a list that also contains init and the caller's shell. Neither of these
    /// two is a member.
    fn judge(process: Process, mark: ProcessMark, certain_before: Option<u64>) -> Membership {
        let all = [
            (self::process(1, 0, 1, 1, 1), ProcessMark::Unreadable),
            (self::process(SHELL, 1, SHELL, SHELL, 500), ProcessMark::Unmarked),
            (process, mark),
        ];
        let found = classify(&all, &identity(), certain_before);
        assert_eq!(found[..2], [Membership::Other; 2]);
        found[2]
    }

    #[test]
    fn every_combination_of_group_session_age_parent_and_mark_is_judged_on_the_safe_side() {
        use ProcessMark::{Marked, Unmarked, Unreadable};
        for mark in [Marked, Unmarked, Unreadable] {
            for group in [TERRAFORM, 200] {
                for session in [SHELL, 60] {
                    for parent in [1, SHELL] {
                        for start in [999, 1000, 1999, 2000] {
                            let seen = process(200, parent, group, session, start);
                            let of_group = group == TERRAFORM && start >= 1000;
                            let doubtful = session == SHELL && parent == 1 && start >= 1000 && mark == Unreadable;
                            let expected = match () {
                                () if mark == Marked => Membership::Member,
                                () if of_group && start < 2000 => Membership::Member,
                                () if of_group || doubtful => Membership::Unknown,
                                () => Membership::Other,
                            };
                            assert_eq!(judge(seen.clone(), mark, Some(2000)), expected, "{seen:?} {mark:?}");
                            let expected = if of_group { Membership::Member } else { expected };
                            assert_eq!(judge(seen.clone(), mark, None), expected, "{seen:?} {mark:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_group_whose_number_another_leader_has_is_another_group() {
        let child = (process(200, 1, TERRAFORM, SHELL, 3000), ProcessMark::Unmarked);
        for (start, expected) in [(1000, Membership::Member), (2900, Membership::Other)] {
            let all = [child.clone(), (process(TERRAFORM, 1, TERRAFORM, SHELL, start), ProcessMark::Unmarked)];
            assert_eq!(classify(&all, &identity(), None)[0], expected);
        }
        // If the start of terraform is not known, no process is certain to be its child.
        let unknown = TreeIdentity { start: None, ..identity() };
        assert_eq!(classify(&[child], &unknown, None), [Membership::Unknown]);
    }

    /// In a container, init may be in the session of its shell.
    #[test]
    fn an_orphan_of_an_init_in_the_same_session_is_in_doubt() {
        for (parent, expected) in [(1, Membership::Unknown), (SHELL, Membership::Other)] {
            let all = [
                (process(1, 0, 1, SHELL, 1), ProcessMark::Unreadable),
                (process(SHELL, 1, SHELL, SHELL, 500), ProcessMark::Unmarked),
                (process(200, parent, 200, SHELL, 1500), ProcessMark::Unreadable),
            ];
            assert_eq!(classify(&all, &identity(), None)[2], expected, "{parent}");
        }
    }

    #[test]
    fn what_survived_is_known_by_number_and_start() {
        for (start, expected) in [(1500, Membership::Member), (1501, Membership::Other)] {
            assert_eq!(judge(process(300, 1, 300, 60, start), ProcessMark::Unreadable, None), expected);
        }
    }

    #[test]
    fn children_are_what_their_parents_are() {
        let all = [
            (process(400, 201, 400, 400, 1600), ProcessMark::Unmarked),
            (process(201, 200, 201, 201, 1600), ProcessMark::Unreadable),
            (process(200, 1, TERRAFORM, SHELL, 1500), ProcessMark::Unreadable),
            (process(500, 501, 500, 500, 1600), ProcessMark::Unmarked),
            (process(501, 1, 501, SHELL, 1600), ProcessMark::Unreadable),
        ];
        let found = classify(&all, &identity(), None);
        assert_eq!(found[..3], [Membership::Member; 3]);
        assert_eq!(found[3..], [Membership::Unknown; 2]);
    }

    /// The start of the survivor could not be read when it was recorded.
    #[test]
    fn a_survivor_of_unknown_start_is_only_possible_and_no_other_process_is() {
        let identity = TreeIdentity { survivors: vec![(300, 0)], ..identity() };
        for (pid, expected) in [(300, Membership::Unknown), (301, Membership::Other)] {
            let other = process(pid, 1, 200, 60, 1500);
            let found = classify(&[(other, ProcessMark::Unmarked)], &identity, None);
            assert_eq!(found, [expected], "{pid}");
        }
    }
}
