//! Why a lock that terraform holds gets no lease, and when the run stops waiting for that to change.

use std::fmt;
use std::time::Duration;

/// How long an obstacle may last that can disappear by itself: the log names a lock with two parts when terraform
/// requests the second one, and a terraform that is just starting or ending is in no list of processes.
const OBSTACLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a lock that terraform holds has no lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LeaseObstacle {
    /// The log of `program` does not name the lock, so no renewal could have its condition. `is_final`: no later record
    /// names it either. `program` is `None` if it is unknown.
    Unnamed { program: Option<String>, is_final: bool },
    /// The place of the lock is unknown. The text is the path of its state.
    NoPlace(String),
    /// No process was found that holds the lock.
    NoHolder,
    /// This process or this host has no free descriptor.
    NoDescriptor,
    /// The end of the terraform that holds the lock cannot be seen. The text is the kernel's error.
    Unwatchable(String),
}

impl LeaseObstacle {
    /// Whether the run gives up waiting for the end of this obstacle, which has lasted for `lasted`.
    pub(crate) fn is_given_up(&self, lasted: Duration) -> bool {
        let is_final = match self {
            Self::Unnamed { is_final, .. } => *is_final,
            Self::NoPlace(_) | Self::NoHolder | Self::NoDescriptor => false,
            Self::Unwatchable(_) => true,
        };
        is_final || lasted >= OBSTACLE_TIMEOUT
    }
}

impl fmt::Display for LeaseObstacle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unnamed { program: Some(program), .. } => {
                write!(formatter, "{program} does not log the ID of its lock")
            }
            Self::Unnamed { program: None, .. } => formatter.write_str("the log does not contain the ID of the lock"),
            Self::NoPlace(path) => write!(formatter, "it is not known where the lock of {path} is stored"),
            Self::NoHolder => formatter
                .write_str("the process that holds the lock was not found; it may be the process of another user"),
            Self::NoDescriptor => formatter.write_str("too many files are open"),
            Self::Unwatchable(error) => write!(formatter, "tf cannot see when terraform ends (pidfd_open): {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_obstacle_that_may_disappear_is_waited_for() {
        let unnamed = |is_final| LeaseObstacle::Unnamed { program: None, is_final };
        let [early, late] = [Duration::from_millis(4999), Duration::from_secs(5)];
        for (obstacle, expected) in [
            (unnamed(false), [false, true]),
            (unnamed(true), [true, true]),
            (LeaseObstacle::NoPlace("b/k".to_owned()), [false, true]),
            (LeaseObstacle::NoHolder, [false, true]),
            (LeaseObstacle::NoDescriptor, [false, true]),
            (LeaseObstacle::Unwatchable("ENOSYS".to_owned()), [true, true]),
        ] {
            assert_eq!([early, late].map(|lasted| obstacle.is_given_up(lasted)), expected, "{obstacle:?}");
        }
    }
}
