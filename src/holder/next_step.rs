//! Decides what a person can do about a lock that refuses terraform. All messages with such a command use this
//! decision, so that they name the same command for the same lock.

use std::time::Duration;

use crate::holder::evidence::Verdict;

/// What the person reads about the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReportKind {
    /// The lock has refused terraform, and `tf` says so in a few lines.
    Refused {
        /// Whether `tf` is about to clean up after the holder, a dead run.
        is_finishing: bool,
        /// After which time the same command, if it is repeated, releases the lock before terraform starts, because its
        /// lease has lapsed by then. `None` if a repetition would be refused as well, or if that is not known.
        is_released_after: Option<Duration>,
    },
    /// `tf locks show` has shown all evidence.
    Shown,
    /// `tf locks release` has shown all evidence and has not released the lock. `can_ask` is whether its stdin is a
    /// terminal, so that it can ask the person.
    NotReleased { can_ask: bool },
}

/// What the person can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NextStep {
    /// Nothing: `tf` releases the lock.
    None,
    /// Repeat the command that was refused, which releases the lock.
    RunAgain,
    /// The same, after this time, unless the holder renews its lease.
    RunAgainAfter(Duration),
    /// Wait for the end of the holder's run.
    Wait,
    /// Release the lock of a holder that is proven dead.
    Release,
    /// Release the lock, if no terraform is using the state. The command asks for confirmation.
    ReleaseIfUnused,
    /// The same with `--yes`, because the command cannot ask.
    ReleaseIfUnusedUnasked,
    /// Read all evidence first.
    Show,
    /// Ask the holder, and release the lock by force if no terraform is using the state.
    Force,
}

/// Decides what a person can do about a lock whose holder is judged by `verdict`.
pub(crate) fn next_step(verdict: Verdict, kind: ReportKind) -> NextStep {
    match (verdict, kind) {
        (_, ReportKind::Refused { is_finishing: true, .. }) => NextStep::None,
        (Verdict::Alive, ReportKind::Refused { is_released_after: Some(time), .. }) => NextStep::RunAgainAfter(time),
        (Verdict::Alive, _) => NextStep::Wait,
        // What this host knows about the holder counts more than the lease.
        (Verdict::Dead, _) => NextStep::Release,
        (Verdict::LikelyDead, ReportKind::Refused { is_released_after: Some(_), .. }) => NextStep::RunAgain,
        (Verdict::LikelyDead, ReportKind::NotReleased { can_ask: false }) => NextStep::ReleaseIfUnusedUnasked,
        (Verdict::LikelyDead, _) => NextStep::ReleaseIfUnused,
        (Verdict::Unknown, ReportKind::Refused { .. }) => NextStep::Show,
        (Verdict::Unknown, _) => NextStep::Force,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_has_the_same_next_step_wherever_a_person_reads_about_it() {
        let time = Duration::from_secs(19);
        let refused = |is_released_after| ReportKind::Refused { is_finishing: false, is_released_after };
        for verdict in Verdict::ALL {
            let anywhere = match verdict {
                Verdict::Alive => NextStep::Wait,
                Verdict::Dead => NextStep::Release,
                Verdict::LikelyDead => NextStep::ReleaseIfUnused,
                // Nobody is told to force a release before the evidence was shown.
                Verdict::Unknown => NextStep::Force,
            };
            for kind in [refused(None), ReportKind::Shown, ReportKind::NotReleased { can_ask: true }] {
                let is_short = kind == refused(None);
                let expected = if verdict == Verdict::Unknown && is_short { NextStep::Show } else { anywhere };
                assert_eq!(next_step(verdict, kind), expected, "{verdict:?} {kind:?}");
            }
            let without_a_terminal = match verdict {
                Verdict::LikelyDead => NextStep::ReleaseIfUnusedUnasked,
                _ => anywhere,
            };
            assert_eq!(
                next_step(verdict, ReportKind::NotReleased { can_ask: false }),
                without_a_terminal,
                "{verdict:?}"
            );
            let with_a_lease = match verdict {
                Verdict::Alive => NextStep::RunAgainAfter(time),
                Verdict::LikelyDead => NextStep::RunAgain,
                Verdict::Dead | Verdict::Unknown => next_step(verdict, refused(None)),
            };
            assert_eq!(next_step(verdict, refused(Some(time))), with_a_lease, "{verdict:?}");
            for is_released_after in [None, Some(time)] {
                let kind = ReportKind::Refused { is_finishing: true, is_released_after };
                assert_eq!(next_step(verdict, kind), NextStep::None, "{verdict:?} {kind:?}");
            }
        }
    }
}
