//! Another `tf` process, for work that this process must not do itself: either the work has to fork while this process
//! has threads, or it has to talk to a service while terraform runs.

use std::process::{Command, Stdio};

/// Returns a command that runs `tf locks` with `arguments`. Its stdin is /dev/null; everything else is up to the
/// caller.
///
/// # Errors
/// When the path of this program cannot be determined.
pub(crate) fn locks(arguments: &[&str]) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("locks").args(arguments).stdin(Stdio::null());
    Ok(command)
}
