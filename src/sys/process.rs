//! Processes: the children of this process, the orphans that were reparented to it, and all others that the system
//! lists.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::unistd::Pid;

#[cfg(target_os = "linux")]
#[path = "linux/process.rs"]
mod system;
#[cfg(not(target_os = "linux"))]
#[path = "macos/process.rs"]
mod system;

pub(crate) use system::{
    HANDLE_IS_INHERITED, ProcessHandle, START_CLOCK_CAN_BE_SET, become_subreaper, boot_time, disable_core_dumps,
    is_in_own_control_group, list, out_of_memory_kills, own_children, pid_namespace, start_clock,
};

/// Whether this process has a usable list of processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProcessList {
    /// The list contains the processes of the pid namespace of this process.
    Available,
    /// There is no /proc, or it belongs to another pid namespace, in which the same pids are other processes.
    Unavailable,
    /// This process may not list the processes. Orphans are not reparented to `tf` on this system, so that `tf` has no
    /// child proves nothing.
    #[cfg_attr(target_os = "linux", expect(dead_code, reason = "Linux has /proc"))]
    Unsupported,
}

/// Returns whether the process group `group` contains any process. Processes of other users, processes that /proc hides
/// (`hidepid`) and zombies count as well (kill(2)). False for a `group` of 1 or less.
pub(crate) fn group_exists(group: Pid) -> bool {
    group.as_raw() > 1 && nix::sys::signal::killpg(group, None) != Err(nix::errno::Errno::ESRCH)
}

/// The value of a variable in the environment of another process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Variable {
    /// The variable has this value.
    Set(Vec<u8>),
    /// The environment can be read, and the variable is not in it.
    Unset,
    /// The environment is empty or cannot be read, for example because the process belongs to another user.
    Unreadable,
}

impl Variable {
    /// Returns the value of the variable `name` in a readable environment. `entries` have the form `NAME=VALUE`.
    fn among<'a>(mut entries: impl Iterator<Item = &'a [u8]>, name: &str) -> Self {
        let value = entries.find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="));
        value.map_or(Self::Unset, |value| Self::Set(value.to_vec()))
    }
}

/// A process, as the list of processes describes it (on Linux /proc/PID/stat, proc_pid_stat(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its pid; 0 if unknown.
    pub(crate) pid: Pid,
    /// The ID of a thread whose files in /proc describe the process. It is the pid, unless the first thread has exited
    /// and others are running: /proc/PID then has no environment, no descriptors and no program.
    pub(crate) thread: Pid,
    /// Its name, at most 15 bytes. The process can choose the name, so it must be escaped before it is shown.
    pub(crate) name: String,
    /// One letter: `T` is stopped, `Z` and `X` are dead, `?` is unknown. If the first thread has exited and others are
    /// running, it is the state of one of those, although the kernel calls the process a zombie.
    pub(crate) state: char,
    /// The pid of its parent; 0 if unknown.
    pub(crate) parent: Pid,
    /// Its process group; 0 if unknown.
    pub(crate) group: Pid,
    /// Its session; 0 if unknown.
    pub(crate) session: Pid,
    /// When it started, in clock ticks since boot (on macOS, in microseconds since 1970); 0 if unknown. Pids are
    /// reused, so a process is identified only by its pid together with its start.
    pub(crate) start: u64,
}

/// How often the process list could not be read.
static FAILED_READS: AtomicU64 = AtomicU64::new(0);

/// Returns how often this process could not read a part of the process list because of an error of the host, for example
/// because no descriptor or no memory was free. A list is complete only if this number has not changed meanwhile.
pub(crate) fn failed_reads() -> u64 {
    FAILED_READS.load(Ordering::Relaxed)
}

/// Returns the result of a read of the process list. Counts an error of the host ([`failed_reads`]).
pub(super) fn counted<T>(result: io::Result<T>) -> io::Result<T> {
    if result.as_ref().is_err_and(is_of_host) {
        FAILED_READS.fetch_add(1, Ordering::Relaxed);
    }
    result
}

/// Returns whether the error says nothing about a process. The other errors say that there is no such process or no
/// process list, or that the process belongs to another user.
fn is_of_host(error: &io::Error) -> bool {
    let of_process = [libc::ENOENT, libc::ESRCH, libc::EACCES, libc::EPERM, libc::ENOTDIR];
    !error.raw_os_error().is_some_and(|number| of_process.contains(&number))
}

impl Process {
    /// Returns whether the process is dead. A zombie counts as dead: it can do nothing any more, although kill(pid, 0)
    /// succeeds.
    pub(crate) fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }

    /// Returns a description of the process `pid` if the process exists and this process may not signal it. The
    /// description is for a process that the list does not show, so it contains only the pid. `None` for any other pid.
    pub(crate) fn forbidden(pid: Pid) -> Option<Self> {
        let is_there = nix::sys::signal::kill(pid, None) == Err(nix::errno::Errno::EPERM);
        is_there.then(|| Self { pid, ..Self::unseen_in(Pid::from_raw(0)) })
    }

    /// Returns a placeholder for a process in the group `group` that the list does not show. Its pid is unknown.
    pub(crate) fn unseen_in(group: Pid) -> Self {
        let unknown = Pid::from_raw(0);
        let name = "a hidden process".to_owned();
        Self { pid: unknown, thread: unknown, name, state: '?', parent: unknown, group, session: unknown, start: 0 }
    }

    /// Returns the process with the pid `pid`. `None` if it does not exist, or if there is no usable process list.
    pub(crate) fn look_up(pid: Pid) -> Option<Self> {
        if list() == ProcessList::Available { Self::read(pid) } else { None }
    }

    /// Returns every process in the list. Empty if there is no usable process list.
    pub(crate) fn all() -> Vec<Self> {
        if list() == ProcessList::Available { Self::list_all() } else { Vec::new() }
    }

    /// Returns the children of `parent`, including the orphans that were reparented to it. Empty if there is no usable
    /// process list.
    pub(crate) fn children(parent: Pid) -> Vec<Self> {
        if list() == ProcessList::Available { Self::listed_children(parent) } else { Vec::new() }
    }

    /// Returns all descendants of `root`, without `root` itself.
    pub(crate) fn below(root: Pid) -> Vec<Self> {
        let mut found: Vec<Self> = Self::children(root);
        let mut next = 0;
        while next < found.len() {
            let children = Self::listed_children(found[next].pid);
            // A process that is reparented during this search can be found twice, below the old and below the new
            // parent.
            found.extend(children.into_iter().filter(|child| child.pid != root).collect::<Vec<_>>());
            next += 1;
            if next > 100_000 {
                break;
            }
        }
        found.sort_by_key(|process| process.pid);
        found.dedup_by_key(|process| process.pid);
        found
    }

    /// Returns whether the process works for any run of `tf`, for example as its guardian or its keeper: it executes
    /// this program, under one of the names that these processes give themselves.
    pub(crate) fn is_helper_of_ours(&self) -> bool {
        matches!(
            &*self.own_name(),
            "tf-guardian" | "tf-recovery" | "tf-fuse" | "tf-spare" | "tf-keeper" | "tf-takeover" | "tf-waiting"
        ) && self.runs_our_program() == Some(true)
    }

    /// Returns whether the process executes a different program from this process. A forked child does so only after
    /// exec. Returns false if this process may not read which program the other process executes.
    pub(crate) fn runs_another_program(&self) -> bool {
        self.runs_our_program() == Some(false)
    }
}

/// Returns whether `pid` is a service manager, which is init or a user's own systemd (systemd(1)). A service manager
/// stops all processes of a service together.
pub(crate) fn is_service_manager(pid: Pid) -> bool {
    pid == Pid::from_raw(1) || Process::look_up(pid).is_some_and(|process| process.name == "systemd")
}
