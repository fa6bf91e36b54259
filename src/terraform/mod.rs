//! Everything about terraform: its command line, its binary, its data directory, its log and its lock.
//!
//! A comment that states a fact about Terraform cites the source file. The version is v1.11.4 if the comment gives
//! none.

pub(crate) mod backend;
pub(crate) mod binary;
pub(crate) mod command_line;
pub(crate) mod configuration;
pub(crate) mod data_directory;
pub(crate) mod errored_state;
pub(crate) mod exchange;
pub(crate) mod kubernetes_cluster;
pub(crate) mod lock_info;
pub(crate) mod log;
pub(crate) mod logged_lock;
pub(crate) mod other_backends;
pub(crate) mod plan_file;
pub(crate) mod record;
pub(crate) mod redaction;
pub(crate) mod version;
