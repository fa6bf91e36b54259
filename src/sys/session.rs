//! A command in a session of its own: no key of a terminal reaches it, and it has no terminal to ask a person at
//! (setsid(2)).

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes `command` start in a session of its own.
pub(crate) fn of_its_own(command: &mut Command) {
    // SAFETY: setsid(2) is one system call, and touches nothing of this process's memory.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
}
