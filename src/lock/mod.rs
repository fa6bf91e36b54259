//! Locks: where a lock is, whether it belongs to a run of `tf`, and how it is released.
//!
//! This module does not deal with child processes, signals or terminals. The `supervise` module does, but it does not
//! deal with AWS.

pub(crate) mod attempts;
pub(crate) mod deleted;
pub(crate) mod digest;
pub(crate) mod dynamodb;
pub(crate) mod leased;
pub(crate) mod location;
pub(crate) mod outcome;
pub(crate) mod probe;
pub(crate) mod proof;
pub(crate) mod reached;
pub(crate) mod release;
pub(crate) mod release_step;
pub(crate) mod s3;
mod scan_response;
pub(crate) mod service_time;
pub(crate) mod stores;
pub(crate) mod takeover;
pub(crate) mod written;
