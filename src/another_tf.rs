//! Starts another `tf` process, for work that this process must not do itself. Some work must fork while this process
//! has threads, and some must send requests to a service while terraform runs.

use std::path::Path;
use std::process::{Command, Stdio};

/// Returns a command that runs `tf locks` with `arguments`. The stdin of that `tf` is /dev/null. The caller sets
/// everything else.
///
/// # Errors
/// Fails if the path of this program cannot be determined.
pub(crate) fn locks(arguments: &[&str]) -> std::io::Result<Command> {
    // This is this program even if its file was replaced or removed since (proc(5)). Only Linux has it.
    let itself = Path::new("/proc/self/exe");
    let program = if itself.exists() { itself.to_owned() } else { std::env::current_exe()? };
    let mut command = Command::new(program);
    command.arg("locks").args(arguments).stdin(Stdio::null());
    Ok(command)
}
