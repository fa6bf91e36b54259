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

/// Gives this process the name `name` in the process list (PR_SET_NAME, prctl(2)). macOS names the calling thread
/// instead (`pthread_setname_np`, pthread.h).
pub(crate) fn name_this_process(name: &std::ffi::CStr) {
    // SAFETY: the call reads a zero-terminated string.
    unsafe {
        #[cfg(target_os = "linux")]
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        #[cfg(not(target_os = "linux"))]
        libc::pthread_setname_np(name.as_ptr());
    }
}

/// Gives this process the name `name`, and blocks every signal. A signal to a whole process tree is meant for
/// terraform, and not for a process that works for it.
pub(crate) fn become_helper(name: &std::ffi::CStr) {
    name_this_process(name);
    let _ = nix::sys::signal::SigSet::all().thread_block();
}
