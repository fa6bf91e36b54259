//! Decides what a recovery does about the runs that it finds in the journal. This is the whole rule, and it touches no
//! process.

/// How a run was found ([`crate::journal::runs::FoundRun`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    /// A process of the run is alive.
    Living,
    /// Its tree seems to be dead, and another process is finishing it.
    Recovering,
    /// It is dead, and this process may finish it.
    Dead,
    /// It is dead, and its journal cannot be written.
    ReadOnly,
    /// It cannot be judged from here.
    Foreign,
    /// Processes that may belong to it are alive.
    Doubtful,
    /// Its record is missing or invalid.
    Broken,
    /// It is no longer in the journal.
    Gone,
}

/// What else is known of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Whether it may hold a lock, according to its record.
    pub(crate) may_hold: bool,
    /// Whether a process holds its lock file.
    pub(crate) is_held: bool,
    /// Whether it is alive and about to end, because its `tf` or that `tf`'s parent process has exited.
    pub(crate) is_about_to_end: bool,
}

/// What `tf locks recover` was told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Finish,
    /// `--dry-run`: report what would be done, and change nothing.
    DryRun,
}

/// What is done about a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// It is finished: its locks are released, or it is reported why they are not.
    Finish,
    /// It is reported what would be done.
    Announce,
    /// Its record is moved to a place where a person can examine it.
    SetAside,
    /// It is reported why the run is left alone.
    Report,
    /// Nothing is done or reported.
    LeaveAlone,
}

/// Decides what a recovery does about a run. A person reads the reports of this recovery.
pub(crate) fn treatment(sight: Sight, facts: Facts, mode: Mode) -> Treatment {
    let Facts { may_hold, is_held, is_about_to_end } = facts;
    let report_if = |is_worth_it: bool| if is_worth_it { Treatment::Report } else { Treatment::LeaveAlone };
    match (sight, mode) {
        (Sight::Dead, Mode::Finish) => Treatment::Finish,
        (Sight::Dead, Mode::DryRun) => Treatment::Announce,
        (Sight::Broken, Mode::Finish) => Treatment::SetAside,
        (Sight::Broken, Mode::DryRun) => Treatment::Report,
        // The wait for a run that another process is finishing was in vain. That process may be frozen.
        (Sight::ReadOnly | Sight::Doubtful, _) | (Sight::Recovering, Mode::Finish) => report_if(may_hold),
        // If its lock file is held, the run is alive somewhere: on another machine, or in another container.
        (Sight::Foreign, _) => report_if(may_hold && !is_held),
        // The wait was in vain. The run may hold its lock for a long time. The exit code reports this to the caller as
        // well.
        (Sight::Living, Mode::Finish) => report_if(may_hold && is_about_to_end),
        // The recovery has not waited for these.
        (Sight::Living | Sight::Recovering, Mode::DryRun) | (Sight::Gone, _) => Treatment::LeaveAlone,
    }
}

/// A dead run, as a `tf` that is about to start terraform sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeadRun {
    /// Whether it can have locked what this run is about to lock.
    pub(crate) is_near: bool,
    /// Whether it was cleaned up before, and something was left.
    pub(crate) was_tried: bool,
    /// Whether its record was written a moment ago.
    pub(crate) is_recent: bool,
}

/// When a dead run is finished, and by which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Before terraform starts, because its lock would refuse terraform.
    BeforeTerraform,
    /// By a process in the background, for which nothing waits.
    InBackground,
    /// Not by this `tf`.
    Later,
}

/// Decides when a `tf` that is about to start terraform finishes a dead run.
pub(crate) fn turn(run: DeadRun) -> Turn {
    match run {
        DeadRun { is_near: true, .. } => Turn::BeforeTerraform,
        // A cleanup that failed a moment ago would fail again.
        DeadRun { was_tried: true, is_recent: true, .. } => Turn::Later,
        DeadRun { .. } => Turn::InBackground,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGHTS: [Sight; 8] = [
        Sight::Living,
        Sight::Recovering,
        Sight::Dead,
        Sight::ReadOnly,
        Sight::Foreign,
        Sight::Doubtful,
        Sight::Broken,
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
    fn a_run_that_holds_nothing_is_not_reported_unless_its_record_is_broken() {
        for_all(|sight, facts, mode, treatment| {
            if !facts.may_hold && treatment == Treatment::Report {
                assert_eq!((sight, mode), (Sight::Broken, Mode::DryRun));
            }
        });
    }

    #[test]
    fn a_run_that_works_is_left_alone() {
        for_all(|sight, facts, mode, treatment| {
            let works =
                (sight == Sight::Living && !facts.is_about_to_end) || (sight == Sight::Foreign && facts.is_held);
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
