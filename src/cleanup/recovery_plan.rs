//! Decides what a recovery does about the runs that it finds in the journal. The decisions are pure functions, and this
//! module signals no process.

/// The state in which a run was found in the journal ([`crate::journal::runs::FoundRun`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    /// A process of the run is alive.
    Living,
    /// The run's tree seems to be dead, and another process is finishing the run.
    Recovering,
    /// The run is dead, and this process may finish it.
    Dead,
    /// The run is dead, but its journal entry cannot be written.
    ReadOnly,
    /// This process cannot determine whether the run is alive.
    Foreign,
    /// Processes that may belong to the run are alive.
    Doubtful,
    /// The run's record or lock file is missing or invalid.
    Broken,
    /// The run cannot be read because of an error of this host.
    Unread,
    /// The run is no longer in the journal.
    Gone,
}

/// Further facts about a run that was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Whether the run may hold a lock, according to its record.
    pub(crate) may_hold: bool,
    /// Whether a process holds the run's lock file.
    pub(crate) is_held: bool,
    /// Whether the run is alive and about to end, because its `tf` or the parent of that `tf` has exited.
    pub(crate) is_about_to_end: bool,
}

/// The mode of `tf locks recover`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Finish,
    /// `--dry-run`: report which actions would be taken, and change nothing.
    DryRun,
}

/// What is done about a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// Finish the run: release its locks, or report why they are not released.
    Finish,
    /// Report which locks would be released.
    Announce,
    /// Move the run's record to a directory where a person can examine it.
    SetAside,
    /// Report why the run is not finished.
    Report,
    /// Do nothing and report nothing.
    LeaveAlone,
}

/// Returns what a recovery does about a run. This is for a recovery whose messages a person reads; [`turn`] is for a
/// `tf` that starts terraform.
pub(crate) fn treatment(sight: Sight, facts: Facts, mode: Mode) -> Treatment {
    let Facts { may_hold, is_held, is_about_to_end } = facts;
    let report_if = |is_worth_it: bool| if is_worth_it { Treatment::Report } else { Treatment::LeaveAlone };
    match (sight, mode) {
        (Sight::Dead, Mode::Finish) => Treatment::Finish,
        (Sight::Dead, Mode::DryRun) => Treatment::Announce,
        (Sight::Broken, Mode::Finish) => Treatment::SetAside,
        (Sight::Broken, Mode::DryRun) => Treatment::Report,
        // `Recovering`: the recovery has waited for the other process, which has not finished the run. That process may
        // be frozen.
        (Sight::ReadOnly | Sight::Doubtful, _) | (Sight::Recovering, Mode::Finish) => report_if(may_hold),
        // If the run's lock file is held, the run is alive on another machine or in another container.
        (Sight::Foreign, _) => report_if(may_hold && !is_held),
        // The record is not moved: nothing is known to be wrong with it.
        (Sight::Unread, _) => report_if(!is_held),
        // The recovery has waited for the run, which has not ended and may hold its lock for a long time. It is
        // reported, so that the exit code shows that a lock is left.
        (Sight::Living, Mode::Finish) => report_if(may_hold && is_about_to_end),
        // A dry run does not wait. So a run of this kind may end, or may be finished by another process, a moment
        // later.
        (Sight::Living | Sight::Recovering, Mode::DryRun) | (Sight::Gone, _) => Treatment::LeaveAlone,
    }
}

/// The facts about a dead run from which a `tf` that is about to start terraform decides when to finish the dead run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeadRun {
    /// Whether the dead run may have taken a lock at a location that this run will lock.
    pub(crate) is_near: bool,
    /// Whether an earlier cleanup of the dead run has left a lock.
    pub(crate) was_tried: bool,
    /// Whether the record of the dead run was written less than 5 min ago.
    pub(crate) is_recent: bool,
}

/// When a `tf` that is about to start terraform finishes a dead run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The dead run is finished before terraform starts, because terraform may need the lock that the dead run has
    /// left.
    BeforeTerraform,
    /// A background process finishes the dead run. `tf` does not wait for it.
    InBackground,
    /// A later `tf` finishes the dead run.
    Later,
}

/// Returns when a `tf` that is about to start terraform finishes a dead run.
pub(crate) fn turn(run: DeadRun) -> Turn {
    match run {
        DeadRun { is_near: true, .. } => Turn::BeforeTerraform,
        // A cleanup that failed a moment ago would most likely fail again.
        DeadRun { was_tried: true, is_recent: true, .. } => Turn::Later,
        DeadRun { .. } => Turn::InBackground,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGHTS: [Sight; 9] = [
        Sight::Living,
        Sight::Recovering,
        Sight::Dead,
        Sight::ReadOnly,
        Sight::Foreign,
        Sight::Doubtful,
        Sight::Broken,
        Sight::Unread,
        Sight::Gone,
    ];

    fn for_all(promise: impl Fn(Sight, Facts, Mode, Treatment)) {
        for sight in SIGHTS {
            for bits in 0..8_u8 {
                let bit = |place: u8| bits & (1 << place) != 0;
                let facts = Facts { may_hold: bit(0), is_held: bit(1), is_about_to_end: bit(2) };
                for mode in [Mode::Finish, Mode::DryRun] {
                    promise(sight, facts, mode, treatment(sight, facts, mode));
                }
            }
        }
    }

    #[test]
    fn only_a_dead_run_is_finished() {
        for_all(|sight, facts, mode, treatment| {
            let expected = sight == Sight::Dead && mode == Mode::Finish;
            assert_eq!(treatment == Treatment::Finish, expected, "{sight:?} {facts:?} {mode:?}");
        });
    }

    #[test]
    fn a_dry_run_changes_nothing() {
        for_all(|sight, facts, mode, treatment| {
            if mode == Mode::DryRun {
                let changes = matches!(treatment, Treatment::Finish | Treatment::SetAside);
                assert!(!changes, "{sight:?} {facts:?}");
            }
        });
    }

    #[test]
    fn a_run_that_holds_nothing_is_not_reported_unless_its_record_cannot_be_read() {
        for_all(|sight, facts, mode, treatment| {
            if !facts.may_hold && treatment == Treatment::Report {
                assert!(sight == Sight::Unread || (sight, mode) == (Sight::Broken, Mode::DryRun), "{sight:?}");
            }
        });
    }

    #[test]
    fn only_a_record_that_is_known_to_be_broken_is_moved() {
        for_all(|sight, facts, mode, treatment| {
            let expected = sight == Sight::Broken && mode == Mode::Finish;
            assert_eq!(treatment == Treatment::SetAside, expected, "{sight:?} {facts:?} {mode:?}");
        });
    }

    #[test]
    fn a_run_that_works_is_left_alone() {
        for_all(|sight, facts, mode, treatment| {
            let works = (sight == Sight::Living && !facts.is_about_to_end)
                || (matches!(sight, Sight::Foreign | Sight::Unread) && facts.is_held);
            assert!(!works || treatment == Treatment::LeaveAlone, "{sight:?} {facts:?} {mode:?}");
        });
    }

    #[test]
    fn what_would_refuse_terraform_is_finished_first_and_what_has_just_failed_later() {
        for bits in 0..8_u8 {
            let bit = |place: u8| bits & (1 << place) != 0;
            let run = DeadRun { is_near: bit(0), was_tried: bit(1), is_recent: bit(2) };
            let expected = match (bit(0), bit(1) && bit(2)) {
                (true, _) => Turn::BeforeTerraform,
                (false, true) => Turn::Later,
                (false, false) => Turn::InBackground,
            };
            assert_eq!(turn(run), expected, "{run:?}");
        }
    }
}
