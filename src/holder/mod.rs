//! Decides whether the holder of a lock is alive: what this host shows about the holder, and what that proves.
//!
//! Only the journal of this host, including its pending requests, proves anything. Everything else only makes a verdict
//! likely, and a person must decide: a `Who` is a user name and a host name, and two machines may have both in common.

pub(crate) mod evidence;
pub(crate) mod host;
