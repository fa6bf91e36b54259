//! Starts a command in its own session (setsid(2)). No key of a terminal signals the command, and it has no terminal at
//! which it could prompt a person.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes `command` start in its own session.
pub(crate) fn of_its_own(command: &mut Command) {
    // SAFETY: setsid(2) is a single system call and does not access the memory of this process.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
}
