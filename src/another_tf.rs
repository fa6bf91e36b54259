//! Starts another `tf` process, for work that this process must not do itself. Some work must fork while this process
//! has threads, and some must send requests to a service while terraform runs.

use std::process::{Command, Stdio};

/// Returns a command that runs `tf locks` with `arguments`. The stdin of that `tf` is /dev/null. The caller sets
/// everything else.
///
/// # Errors
/// Fails if the path of this program cannot be determined.
pub(crate) fn locks(arguments: &[&str]) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("locks").args(arguments).stdin(Stdio::null());
    Ok(command)
}
