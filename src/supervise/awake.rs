//! Keeps the machine awake while terraform holds a lock.

use nix::unistd::Pid;

use crate::cleanup::process_tree::Tree;
use crate::sys::idle_sleep::NoIdleSleep;
use crate::terraform::log::Log;

/// What is done about the sleep of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The machine may not sleep from now on.
    Prevent,
    /// The machine may sleep again.
    Allow,
    /// Nothing changes.
    Nothing,
}

/// What is known before a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sight {
    /// False with `TFW_AWAKE=off`.
    is_wanted: bool,
    holds_lock: bool,
    /// Whether the sleep was prevented, or could not be prevented, for the lock that is held.
    was_tried: bool,
}

/// Decides what to do.
fn next_step(sight: Sight) -> Step {
    match (sight.is_wanted && sight.holds_lock, sight.was_tried) {
        (true, false) => Step::Prevent,
        (false, true) => Step::Allow,
        (true, true) | (false, false) => Step::Nothing,
    }
}

/// Whether the machine is kept awake now. When this value is dropped, the machine may sleep again.
#[derive(Debug)]
pub(crate) struct Awake {
    is_wanted: bool,
    was_tried: bool,
    kept: Option<NoIdleSleep>,
}

impl Awake {
    /// `is_wanted` is false with `TFW_AWAKE=off`.
    pub(crate) fn new(is_wanted: bool) -> Self {
        Self { is_wanted, was_tried: false, kept: None }
    }

    /// Follows `log`, which says whether `terraform` holds a lock. `tree` learns of the process that this starts.
    pub(crate) fn step(&mut self, log: &Log, terraform: Pid, tree: &Tree) {
        let holds_lock = log.unreleased().any(|lock| lock.progress.held.is_some());
        match next_step(Sight { is_wanted: self.is_wanted, holds_lock, was_tried: self.was_tried }) {
            Step::Prevent => {
                self.was_tried = true;
                self.kept = NoIdleSleep::while_running(terraform);
                if let Some(pid) = self.kept.as_ref().and_then(NoIdleSleep::pid) {
                    tree.exclude(pid);
                }
            }
            Step::Allow => {
                self.was_tried = false;
                self.kept = None;
            }
            Step::Nothing => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_stays_awake_while_a_lock_is_held() {
        for bits in 0..8u8 {
            let bit = |place: u8| bits & (1 << place) != 0;
            let (is_wanted, holds_lock, was_tried) = (bit(0), bit(1), bit(2));
            let must_be = is_wanted && holds_lock;
            let expected = match () {
                () if must_be == was_tried => Step::Nothing,
                () if must_be => Step::Prevent,
                () => Step::Allow,
            };
            let sight = Sight { is_wanted, holds_lock, was_tried };
            assert_eq!(next_step(sight), expected, "{sight:?}");
        }
    }
}
