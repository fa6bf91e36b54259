//! `tf` with a real terraform, a server that implements the real protocols, and real processes, signals and terminals.
//!
//! The name of each test states what it checks. If that is a difference from bare terraform, the test checks bare
//! terraform in the same situation too.

#![expect(
    unsafe_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, starts processes, and changes them between fork and exec"
)]

#[macro_use]
#[path = "../support/mod.rs"]
mod support;

mod accounts;
mod another_user;
mod answers;
mod any_key;
mod audit_recipes;
mod before_terraform;
mod behind_wrappers;
#[cfg(feature = "crash-points")]
mod crash;
mod documents;
mod given_back;
mod go_rules;
mod in_flight;
mod interrupted_once;
mod invisible;
mod large_tables;
mod lease_processes;
mod leased;
mod least_requests;
mod left_behind;
mod left_operation;
mod locks_doctor;
mod locks_history;
mod locks_list;
mod locks_recover;
mod locks_release;
mod locks_version;
mod many_locks;
mod many_targets;
mod never_anothers;
mod never_hangs;
mod no_lock_at_all;
mod nobody_elses_directory;
mod notice;
mod notifications;
mod only_named;
mod permissions;
mod process_tree;
mod reached_alike;
mod recipes;
mod renamed_host;
mod runners;
mod said_well;
mod scripts;
mod services;
mod shells;
mod shims;
mod silent_services;
mod slow_credentials;
mod stopped_together;
mod survived;
mod taken_over;
mod terminal;
mod two_at_once;
mod two_hosts;
mod waiting;
mod watch;
mod where_it_is;
mod which_machine;
mod witness;
mod witness_scripts;
