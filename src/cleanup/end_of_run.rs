//! How terraform ended.

use crate::sys::wait::Ended;

/// How a run of terraform ended, as its supervisor saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndOfRun {
    /// What waitid(2) says of the process. `None` where nothing says it: a guardian is not terraform's parent.
    pub(crate) ended: Option<Ended>,
    /// Why `tf` killed it. `None` if it did not.
    pub(crate) killed: Option<Why>,
    /// It was sent a second interrupt, or was killed.
    pub(crate) forced: bool,
    /// It was sent an interrupt.
    pub(crate) interrupted: bool,
    /// The kernel killed it, or something beside it, for want of memory.
    pub(crate) out_of_memory: bool,
}

/// Why terraform is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// A person pressed ^C three times.
    Forced,
    /// `TFW_STOP_TIMEOUT` is over.
    StopTimeout,
}
