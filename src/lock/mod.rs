//! Locks: where one lives, whether it is ours, and giving it back.
//!
//! Nothing here knows of children, signals or terminals, and nothing there knows of AWS.

pub(crate) mod deleted;
pub(crate) mod digest;
pub(crate) mod dynamodb;
pub(crate) mod location;
pub(crate) mod probe;
pub(crate) mod proof;
pub(crate) mod reached;
pub(crate) mod release;
pub(crate) mod s3;
pub(crate) mod stores;
