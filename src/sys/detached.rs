//! Forks a process that runs independently of `tf`, for example to clean up after `tf` has exited.
//!
//! The detached process must not delay the caller of `tf`, which may wait until the stdout of `tf` is closed. It must
//! not hold an outer lifeline open, and must not keep the file system of the working directory in use. So its
//! descriptors 0, 1 and 2 are /dev/null, its working directory is `/`, and all other descriptors are closed, except
//! those that the caller of [`run`] names. It has its own session. With [`Parent::UsAtOurTerminal`], it instead keeps
//! its session, its stdin and its stderr.
//!
//! In the detached process, every signal stays blocked. A signal to a whole process tree is meant for terraform, and
//! not for the process that cleans up after terraform.

use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::unistd::Pid;

use super::spawn::AllBlocked;
use super::{descriptor, session};

/// The parent of a detached process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    /// This process. It must reap the detached process.
    Us,
    /// This process, which must reap the detached process. The detached process keeps the session, the process group,
    /// stdin and stderr. So the commands that it starts can prompt the person at the terminal.
    UsAtOurTerminal,
    /// Init, or the nearest subreaper above this process. The detached process is not a descendant of this process.
    Init,
}

/// Forks and calls `work` in the new process, which exits when `work` returns or panics. This process must have one
/// thread.
///
/// `name` is the name of the new process ([`session::name_this_process`]). `keep` lists the descriptors that stay open
/// in the new process. Returns the pid of the new process. With [`Parent::Init`], returns `None`, because the new
/// process is not a child of this process.
///
/// # Errors
/// The error of sigprocmask(2) or fork(2).
pub(crate) fn run(
    name: &std::ffi::CStr,
    parent: Parent,
    keep: &[RawFd],
    work: impl FnOnce(),
) -> io::Result<Option<Pid>> {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    let blocked = AllBlocked::now()?;
    // SAFETY: there is one thread (a condition for the caller), so the child may run any Rust code.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: the child has one thread too. The process between the two forks only exits.
            if parent == Parent::Init && unsafe { libc::fork() } != 0 {
                end();
            }
            detach(name, parent, &keep);
            hide_arguments();
            // Even if `work` panics, this process must not return into the code of the process that it was forked from.
            let _ = catch_unwind(AssertUnwindSafe(work));
            end()
        }
        pid => {
            drop(blocked);
            let pid = Pid::from_raw(pid);
            if parent == Parent::Init {
                let _ = nix::sys::wait::waitpid(pid, None);
                return Ok(None);
            }
            Ok(Some(pid))
        }
    }
}

fn end() -> ! {
    // SAFETY: `_exit` ends the process without destructors and exit handlers, which only the parent process may run.
    unsafe { libc::_exit(0) }
}

fn detach(name: &std::ffi::CStr, parent: Parent, keep: &[RawFd]) {
    let is_kept = |standard| keep.contains(&standard) || (parent == Parent::UsAtOurTerminal && standard != 1);
    // SAFETY: these are system calls with numbers and zero-terminated strings.
    unsafe {
        if parent != Parent::UsAtOurTerminal {
            libc::setsid();
        }
        libc::chdir(c"/".as_ptr());
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        for standard in 0..3 {
            if null >= 0 && !is_kept(standard) {
                libc::dup2(null, standard);
            }
        }
    }
    session::name_this_process(name);
    // SAFETY: this process was forked to use only the kept descriptors, so nothing in it uses one that is closed here.
    unsafe { descriptor::close_from(3, keep) };
}

/// Removes the arguments of this process from the process list. A forked process has the arguments of its parent. These
/// are the arguments of terraform, including the values of `-var`, and the detached process does not need them. ps(1)
/// reads the arguments from the memory of the process (proc_pid_cmdline(5)), so this function fills that memory with
/// zeros. Linux reports the addresses of that memory (`arg_start` and `arg_end`, proc_pid_stat(5)). On macOS, the
/// strings of argv are that memory (`_NSGetArgv`, crt_externs.h; `sys::macos::procargs`).
fn hide_arguments() {
    #[cfg(target_os = "linux")]
    {
        /// The index of `arg_start`, which is field 48, among the fields after the name. The first of these is field 3
        /// (proc_pid_stat(5)).
        const ARG_START: usize = 48 - 3;
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit_once(") ").map_or_else(Vec::new, |(_, rest)| rest.split(' ').collect());
        let field = |place: usize| fields.get(place)?.trim().parse::<usize>().ok();
        if let (Some(start), Some(end)) = (field(ARG_START), field(ARG_START + 1))
            && start > 0
            && end > start
        {
            // SAFETY: these are the strings of argv, which the kernel has put on this process's stack. Every
            // user of these strings copies them. Code that reads them again gets empty strings.
            unsafe { std::ptr::write_bytes(start as *mut u8, 0, end - start) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    // SAFETY: argv has `argc` zero-terminated strings, which the kernel has put on this process's stack. Every user of
    // these strings copies them. Code that reads them again gets empty strings.
    unsafe {
        let arguments = *libc::_NSGetArgv();
        for place in 0..usize::try_from(*libc::_NSGetArgc()).unwrap_or(0) {
            let argument = *arguments.add(place);
            if !argument.is_null() {
                std::ptr::write_bytes(argument, 0, libc::strlen(argument));
            }
        }
    }
}
