//! Decides whether a run is alive, from what a process that is not its ancestor can see. The decision is a pure
//! function.

/// What the lock file of a run and the processes of this host show about the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RunTraces {
    /// Whether another process holds the owner lock of the run's lock file: the run's `tf`, its guardian, or a
    /// recovery.
    pub(crate) is_owned: bool,
    /// Whether a process holds the tree lock: terraform, or a process that inherited the lock file from it.
    pub(crate) tree_is_locked: bool,
    /// Whether a process that certainly belongs to the run is alive.
    pub(crate) has_members: bool,
    /// Whether a process that may belong to the run is alive.
    pub(crate) has_unknown: bool,
}

/// The state of a run, as far as this host can see it. [`crate::journal::runs::FoundRun`] has the same states, with the
/// data of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunState {
    Living,
    Recovering,
    Doubtful,
    Dead,
}

impl RunTraces {
    /// Returns the state of the run. A run is dead only if nothing of it is alive, and if no other process is finishing
    /// it.
    pub(crate) fn state(self) -> RunState {
        if self.tree_is_locked || self.has_members {
            RunState::Living
        } else if self.is_owned {
            RunState::Recovering
        } else if self.has_unknown {
            RunState::Doubtful
        } else {
            RunState::Dead
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls `promise` with all combinations of traces and the state that follows from them.
    fn for_all(promise: impl Fn(RunTraces, RunState)) {
        for bits in 0..16_u8 {
            let bit = |place: u8| bits & (1 << place) != 0;
            let traces =
                RunTraces { is_owned: bit(0), tree_is_locked: bit(1), has_members: bit(2), has_unknown: bit(3) };
            promise(traces, traces.state());
        }
    }

    #[test]
    fn a_run_of_which_anything_may_be_alive_is_not_dead() {
        for_all(|traces, state| {
            assert_eq!(state == RunState::Dead, traces == RunTraces::default(), "{traces:?}");
        });
    }

    #[test]
    fn a_run_is_alive_exactly_if_something_of_it_certainly_is() {
        for_all(|traces, state| {
            assert_eq!(state == RunState::Living, traces.tree_is_locked || traces.has_members, "{traces:?}");
        });
    }

    #[test]
    fn a_run_that_another_process_is_finishing_is_left_to_that_process() {
        for_all(|traces, state| {
            let is_alive = traces.tree_is_locked || traces.has_members;
            assert_eq!(state == RunState::Recovering, traces.is_owned && !is_alive, "{traces:?}");
        });
    }
}
