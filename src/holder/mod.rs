//! Whether the holder of a lock is alive: what this host can see of it, and what that proves.
//!
//! Only the journal of this host proves anything. Everything else is a likelihood, for a person to judge: a `Who` is a
//! user and a host name, and two machines may have both in common.

pub(crate) mod evidence;
pub(crate) mod host;
