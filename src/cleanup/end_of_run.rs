//! How terraform ended.

use crate::sys::wait::Ended;

/// How a run of terraform ended, as its supervisor saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndOfRun {
    /// How the process ended (waitid(2)). `None` if that is unknown: a guardian may not find out, because it is not
    /// terraform's parent.
    pub(crate) ended: Option<Ended>,
    /// Why `tf` killed terraform. `None` if `tf` did not kill it.
    pub(crate) killed: Option<Why>,
    /// Whether terraform got a second interrupt, or was killed by `tf`.
    pub(crate) forced: bool,
    /// Whether terraform got an interrupt.
    pub(crate) interrupted: bool,
    /// Whether the kernel most likely killed terraform because memory ran out: terraform was killed by SIGKILL, and the
    /// kernel has killed a process for this reason during the run.
    pub(crate) out_of_memory: bool,
}

/// Why `tf` kills terraform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Why {
    /// A person pressed ^C three times.
    Forced,
    /// The stop timeout (`TFW_STOP_TIMEOUT`) has expired.
    StopTimeout,
    /// Its lock was taken over, or is another run's, while it was stopped.
    LockLost,
    /// It was stopped because its lease could not be renewed, and for a long time nobody knew whether it still has its
    /// lock.
    LeaseUnknown,
}
