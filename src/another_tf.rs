//! Another `tf`: a process for what this one must not do itself, because it has to fork and has threads, or has to talk to
//! a service while terraform runs.

use std::process::{Command, Stdio};

/// `tf locks` with `arguments`, to be started. Nothing on its stdin; the rest is the caller's.
///
/// # Errors
/// Nobody knows where this program lies.
pub(crate) fn locks(arguments: &[&str]) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("locks").args(arguments).stdin(Stdio::null());
    Ok(command)
}
