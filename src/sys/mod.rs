//! This module contains the system calls. It is the only module with unsafe code, and with code that is specific to one
//! operating system. Each file contains one family of calls. Other modules decide when to use them.
#![expect(unsafe_code, reason = "no crate wraps these system calls; each unsafe block states why it is sound")]

pub(crate) mod boot_clock;
pub(crate) mod connections;
pub(crate) mod descriptor;
pub(crate) mod detached;
pub(crate) mod disposition;
pub(crate) mod entry;
pub(crate) mod environment;
mod errno;
pub(crate) mod file_id;
pub(crate) mod filesystem;
pub(crate) mod frameworks;
pub(crate) mod group_signal_watcher;
pub(crate) mod hangup_pipe;
pub(crate) mod host_facts;
pub(crate) mod idle_sleep;
pub(crate) mod locale;
pub(crate) mod lock_file;
pub(crate) mod machine;
#[cfg(any(target_os = "macos", test))]
pub(crate) mod macos;
pub(crate) mod memory;
pub(crate) mod ownership;
pub(crate) mod packet_socket;
pub(crate) mod plain_file;
pub(crate) mod plain_host;
pub(crate) mod poll;
pub(crate) mod process;
pub(crate) mod readiness;
pub(crate) mod session;
pub(crate) mod shell_command;
pub(crate) mod signals;
pub(crate) mod spawn;
pub(crate) mod terminal;
pub(crate) mod user_database;
pub(crate) mod wait;
