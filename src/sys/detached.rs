//! fork(2) of a process that goes on by itself: in a session of its own, with nothing of our caller's in its hands.
//!
//! A caller that waits for the end of our stdout must not wait for that process, nor an outer lifeline, nor a mount for
//! its directory. So its descriptors 0, 1 and 2 are /dev/null, all others but the named ones are closed, and it stands in
//! `/`. Every signal stays blocked in it: whoever tells a whole tree to end means terraform, and not the one that cleans
//! up behind it.

use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::unistd::Pid;

use super::spawn::AllBlocked;

/// Whose child a detached process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    /// Ours: we take its end away.
    Us,
    /// Ours, and it stays in our session and process group, with our stdin and stderr: what it starts may ask whoever sits at
    /// our terminal.
    UsAtOurTerminal,
    /// Init's, or the next subreaper's above us: it is no descendant of ours.
    Init,
}

/// Forks, and runs `work` in the new process, which ends with it. There must be one thread.
///
/// `keep` are the descriptors that it goes on with. Gives its pid where it is a child of ours.
///
/// # Errors
/// What fork(2) says.
pub(crate) fn run(
    name: &std::ffi::CStr,
    parent: Parent,
    keep: &[RawFd],
    work: impl FnOnce(),
) -> io::Result<Option<Pid>> {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    let blocked = AllBlocked::now()?;
    // SAFETY: one thread (asserted by the caller), so that the child may go on with all of Rust.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: as above. The one in between holds nothing and has nothing to do.
            if parent == Parent::Init && unsafe { libc::fork() } != 0 {
                end();
            }
            detach(name, parent, &keep);
            hide_arguments();
            // Whatever happens in there, it must not come back into the story of the process that it was forked from.
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
    // SAFETY: ends the process; nothing that was made before the fork is undone a second time.
    unsafe { libc::_exit(0) }
}

fn detach(name: &std::ffi::CStr, parent: Parent, keep: &[RawFd]) {
    let is_kept = |standard| keep.contains(&standard) || (parent == Parent::UsAtOurTerminal && standard != 1);
    // SAFETY: plain system calls on numbers and zero-terminated strings.
    unsafe {
        if parent != Parent::UsAtOurTerminal {
            libc::setsid();
        }
        #[cfg(target_os = "linux")]
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        libc::chdir(c"/".as_ptr());
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        for standard in 0..3 {
            if null >= 0 && !is_kept(standard) {
                libc::dup2(null, standard);
            }
        }
    }
    let _ = name;
    let mut from = 3;
    for &kept in keep.iter().filter(|kept| **kept >= 3) {
        close_between(from, kept);
        from = kept + 1;
    }
    close_between(from, RawFd::MAX);
}

/// Takes the arguments that this process has by its fork out of the process list: they are those of terraform, with the values
/// of `-var`, and what stays behind needs none of them. What ps(1) shows is read from the memory of the process itself
/// (proc_pid_cmdline(5)); where that is, the kernel tells (`arg_start` and `arg_end`, proc_pid_stat(5)).
fn hide_arguments() {
    #[cfg(target_os = "linux")]
    {
        /// Behind the name, the fields begin with the third (proc_pid_stat(5)).
        const ARG_START: usize = 48 - 3;
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit_once(") ").map_or_else(Vec::new, |(_, rest)| rest.split(' ').collect());
        let field = |place: usize| fields.get(place)?.trim().parse::<usize>().ok();
        if let (Some(start), Some(end)) = (field(ARG_START), field(ARG_START + 1))
            && start > 0
            && end > start
        {
            // SAFETY: the strings of argv, which the kernel has put on this process's stack; they are copied wherever they are
            // used, and zeros are empty strings for whoever reads them anew.
            unsafe { std::ptr::write_bytes(start as *mut u8, 0, end - start) };
        }
    }
}

/// Closes every descriptor from `from` up to and without `to`.
fn close_between(from: RawFd, to: RawFd) {
    if from >= to {
        return;
    }
    #[cfg(target_os = "linux")]
    {
        // SAFETY: nothing in this process uses what is closed here: it was forked to go on with the kept ones alone.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, from, to - 1, 0) };
        if closed == 0 {
            return;
        }
    }
    // Before Linux 5.9, and elsewhere.
    let listed = ["/proc/self/fd", "/dev/fd"].iter().find_map(|directory| std::fs::read_dir(directory).ok());
    let open: Vec<RawFd> = match listed {
        Some(entries) => entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect(),
        None => (from..to.min(1024)).collect(),
    };
    for descriptor in open.into_iter().filter(|descriptor| (from..to).contains(descriptor)) {
        // SAFETY: as above.
        unsafe { libc::close(descriptor) };
    }
}
