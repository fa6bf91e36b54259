//! The messages that `tf` writes for people. A run prints them on stderr, and `tf locks recover` prints some of them on
//! stdout. The doc comment of each item says what the message reports.
//!
//! An output that is closed, hung up or full must not stop a release or end the program. So messages are printed with
//! the functions of [`crate::console`], which do not fail and do not block for long. `println!` and `eprintln!`, which
//! panic, are forbidden everywhere (clippy.toml).

pub(crate) mod late;
pub(crate) mod lease;
mod names;
pub(crate) mod next_step;
pub(crate) mod recovery;
pub(crate) mod refused;
pub(crate) mod release;
pub(crate) mod run;
