//! `tf` around real Terraform, against a real protocol server, with real processes, signals and terminals.
//!
//! Every test is named for the promise that it holds. What bare terraform does in the same place is tried beside it
//! wherever the promise is about a difference.

#![expect(
    unsafe_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, starts processes, and changes them between fork and exec"
)]

#[path = "support/mod.rs"]
mod support;

#[path = "real/accounts.rs"]
mod accounts;
#[path = "real/another_user.rs"]
mod another_user;
#[path = "real/answers.rs"]
mod answers;
#[path = "real/any_key.rs"]
mod any_key;
#[path = "real/behind_wrappers.rs"]
mod behind_wrappers;
#[cfg(feature = "crash-points")]
#[path = "real/crash.rs"]
mod crash;
#[path = "real/documents.rs"]
mod documents;
#[path = "real/given_back.rs"]
mod given_back;
#[path = "real/interrupted_once.rs"]
mod interrupted_once;
#[path = "real/invisible.rs"]
mod invisible;
#[path = "real/least_requests.rs"]
mod least_requests;
#[path = "real/left_behind.rs"]
mod left_behind;
#[path = "real/left_operation.rs"]
mod left_operation;
#[path = "real/locks_doctor.rs"]
mod locks_doctor;
#[path = "real/locks_history.rs"]
mod locks_history;
#[path = "real/locks_list.rs"]
mod locks_list;
#[path = "real/locks_recover.rs"]
mod locks_recover;
#[path = "real/locks_release.rs"]
mod locks_release;
#[path = "real/many_locks.rs"]
mod many_locks;
#[path = "real/never_anothers.rs"]
mod never_anothers;
#[path = "real/never_hangs.rs"]
mod never_hangs;
#[path = "real/no_lock_at_all.rs"]
mod no_lock_at_all;
#[path = "real/nobody_elses_directory.rs"]
mod nobody_elses_directory;
#[path = "real/only_named.rs"]
mod only_named;
#[path = "real/permissions.rs"]
mod permissions;
#[path = "real/process_tree.rs"]
mod process_tree;
#[path = "real/reached_alike.rs"]
mod reached_alike;
#[path = "real/recipes.rs"]
mod recipes;
#[path = "real/renamed_host.rs"]
mod renamed_host;
#[path = "real/runners.rs"]
mod runners;
#[path = "real/said_well.rs"]
mod said_well;
#[path = "real/scripts.rs"]
mod scripts;
#[path = "real/services.rs"]
mod services;
#[path = "real/shells.rs"]
mod shells;
#[path = "real/shims.rs"]
mod shims;
#[path = "real/silent_services.rs"]
mod silent_services;
#[path = "real/slow_credentials.rs"]
mod slow_credentials;
#[path = "real/stopped_together.rs"]
mod stopped_together;
#[path = "real/survived.rs"]
mod survived;
#[path = "real/terminal.rs"]
mod terminal;
#[path = "real/two_at_once.rs"]
mod two_at_once;
#[path = "real/where_it_is.rs"]
mod where_it_is;
#[path = "real/which_machine.rs"]
mod which_machine;
