//! Processes on Linux: /proc, and pidfds.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::{Process, ProcessList, Variable, counted};
use crate::sys::file_id::FileId;
use crate::sys::poll;
use crate::sys::wait::{self, Ended};

/// Makes this process, instead of init, the new parent of its orphaned descendants (`PR_SET_CHILD_SUBREAPER`, Linux
/// 3.4). Returns false if the kernel refuses. In that case, the other signs must prove that the process tree has ended:
/// the lifeline, and what identifies a process of the tree (`cleanup::process_tree`). Always false with `tf_portable`,
/// because macOS has no such thing.
pub(crate) fn become_subreaper() -> bool {
    cfg!(not(tf_portable)) && nix::sys::prctl::set_child_subreaper(true).is_ok()
}

/// Makes sure that no core file is written when a signal kills this process. A core size limit of 0 is not enough,
/// because it does not apply to a core that is piped to a program (core(5)).
pub(crate) fn disable_core_dumps() {
    let _ = nix::sys::prctl::set_dumpable(false);
}

/// A process that can be waited for and signalled, although it is not a child of this process: a pidfd. The descriptor
/// becomes readable when the process has exited.
#[derive(Debug)]
pub(crate) struct ProcessHandle(OwnedFd);

/// Whether another program can inherit a [`ProcessHandle`] (pidfd_open(2)).
pub(crate) const HANDLE_IS_INHERITED: bool = true;

impl From<ProcessHandle> for OwnedFd {
    fn from(ProcessHandle(descriptor): ProcessHandle) -> Self {
        descriptor
    }
}

impl ProcessHandle {
    /// Opens the process `pid` (pidfd_open(2), Linux 5.3).
    ///
    /// # Errors
    /// ENOSYS before Linux 5.3, ESRCH when there is no such process.
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        use rustix::process::{PidfdFlags, pidfd_open};
        let pid = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// Returns another handle of the same process.
    ///
    /// # Errors
    /// The error of fcntl(2) if no descriptor is free.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Whether the process has exited. It may be a zombie.
    pub(crate) fn has_exited(&self) -> bool {
        poll::ready_now(self.0.as_fd(), PollFlags::POLLIN)
    }

    /// Sends `signal` to the process group of the process. A later group with the same number never receives the signal
    /// (PIDFD_SIGNAL_PROCESS_GROUP, pidfd_send_signal(2), Linux 6.9).
    ///
    /// # Errors
    /// EINVAL where the kernel does not support this, ESRCH when the group no longer exists.
    pub(crate) fn signal_group(&self, signal: Signal) -> io::Result<()> {
        /// PIDFD_SIGNAL_PROCESS_GROUP of linux/pidfd.h.
        const PROCESS_GROUP: libc::c_uint = 1 << 2;
        self.send(signal as i32, PROCESS_GROUP)
    }

    /// Sends `signal` to the process. A later process with the same pid never receives the signal
    /// (pidfd_send_signal(2)).
    ///
    /// # Errors
    /// ESRCH when the process no longer exists.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        self.send(signal as i32, 0)
    }

    fn send(&self, number: i32, flags: libc::c_uint) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the arguments are numbers and a null pointer.
        let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), number, none, flags) };
        if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Returns how the process ended, whose pid is `pid`.
    ///
    /// While the process is a zombie, its exit status is the last field of /proc/PID/stat. That field is also 0 if this
    /// process may not trace the zombie (proc_pid_stat(5)), for example because terraform's program is setuid. So a 0
    /// counts only if this process may trace the zombie. After the zombie was reaped, the descriptor provides the
    /// status (PIDFD_GET_INFO with PIDFD_INFO_EXIT, Linux 6.15). Returns `None` if the process is still running, or if
    /// neither source provides the status.
    pub(crate) fn end_of(&self, pid: Pid) -> Option<Ended> {
        let status = self.status().or_else(|| {
            let stat = stat(pid)?;
            // The descriptor can still be signalled, so the process was not reaped, and `stat` cannot be that of a
            // later process with the same pid.
            let is_over = Process::parse(pid, &stat)?.state == 'Z' && running_thread(pid).is_none();
            let zombie = is_over && self.send(0, 0).is_ok();
            let status = stat.trim_end().rsplit(' ').next()?.parse().ok()?;
            (zombie && (status != 0 || may_trace(pid))).then_some(status)
        })?;
        Some(wait::ended_with(status))
    }

    /// Returns the exit status of a process that was reaped. `None` if the kernel does not report it.
    fn status(&self) -> Option<i32> {
        /// The first version of struct pidfd_info (linux/pidfd.h), of 64 bytes. The kernel reads the size from the
        /// request.
        #[repr(C)]
        #[derive(Default)]
        struct PidfdInfo {
            mask: u64,
            control_group: u64,
            numbers: [u32; 11],
            exit_code: i32,
        }
        const EXIT: u64 = 1 << 3;
        const GET_INFO: libc::Ioctl = libc::_IOWR::<PidfdInfo>(0xFF, 11);
        let mut info = PidfdInfo { mask: EXIT, ..PidfdInfo::default() };
        // SAFETY: the call writes at most as many bytes into `info` as its request number contains, which is its size.
        let asked = unsafe { libc::ioctl(self.0.as_raw_fd(), GET_INFO, &raw mut info) };
        (asked == 0 && info.mask & EXIT != 0).then_some(info.exit_code)
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether this process may trace the process `pid`. Reading the link /proc/PID/exe requires the same permission as the
/// exit status in /proc/PID/stat (PTRACE_MODE_READ_FSCREDS, ptrace(2)). Without it, the link cannot be read: EACCES.
/// With it, the link of a zombie cannot be read either, because the zombie has no program any more: ENOENT.
fn may_trace(pid: Pid) -> bool {
    !std::fs::read_link(format!("/proc/{pid}/exe")).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

/// Returns whether /proc can be used to find processes and to determine which run they belong to.
///
/// If /proc was not mounted anew in a pid namespace (`unshare -pf` without `--mount-proc`, a container with the host's
/// /proc), each pid in it belongs to a process of the outer namespace. A signal to such a pid would reach an unrelated
/// process. `/proc/self` contains the pid that this process has in the namespace of the mount. The `NSpid` line of
/// `status` contains one pid for each namespace, from the namespace of the mount down to that of this process
/// (proc_pid_status(5), Linux 4.1). The list is usable only if `/proc/self` and the `NSpid` line both contain exactly
/// one pid, which is the pid of this process in its own namespace.
pub(crate) fn list() -> ProcessList {
    let own = nix::unistd::getpid().as_raw();
    let is_own = |text: &str| text.parse() == Ok(own);
    let named = std::fs::read_link("/proc/self").is_ok_and(|link| link.to_str().is_some_and(is_own));
    let status =
        if named { counted(std::fs::read_to_string("/proc/self/status")).unwrap_or_default() } else { String::new() };
    if names_one_namespace(&status, own) { ProcessList::Available } else { ProcessList::Unavailable }
}

/// Returns whether `status`, the text of /proc/self/status, belongs to the process `own` and was read in the pid
/// namespace of that process.
fn names_one_namespace(status: &str, own: i32) -> bool {
    let mut lines = status.lines();
    let number = |line: &str, name: &str| line.strip_prefix(name).map(|rest| rest.trim().to_owned());
    let own = own.to_string();
    let is_own = lines.clone().find_map(|line| number(line, "Pid:")).is_some_and(|pid| pid == own);
    // Linux before 4.1 has no such line, so a missing line proves nothing.
    is_own && lines.find_map(|line| number(line, "NSpid:")).is_none_or(|numbers| numbers == own)
}

/// Returns the number of the pid namespace of this process, and whether that namespace contains all processes of the
/// machine. The initial namespace contains all of them (pid_namespaces(7); PROC_PID_INIT_INO in linux/proc_ns.h). A
/// debug build also returns true if a test has set so. Returns `None` if /proc does not show the namespace.
pub(crate) fn pid_namespace() -> Option<(u64, bool)> {
    use std::os::unix::fs::MetadataExt;
    const FIRST: u64 = 0xEFFF_FFFC;
    let number = std::fs::metadata("/proc/self/ns/pid").ok()?.ino();
    Some((number, number == FIRST || crate::sys::plain_host::is_plain()))
}

/// Returns the text of /proc/PID/stat. `None` if there is no such process or thread.
fn stat(pid: Pid) -> Option<String> {
    counted(std::fs::read(format!("/proc/{pid}/stat"))).ok().map(|stat| String::from_utf8_lossy(&stat).into_owned())
}

/// Returns the IDs of the threads of the process `pid`, the first thread among them. Only the pid if they cannot be
/// listed.
fn threads(pid: Pid) -> Vec<Pid> {
    let listed = std::fs::read_dir(format!("/proc/{pid}/task"));
    let threads: Vec<Pid> = listed
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok().map(Pid::from_raw))
        .collect();
    if threads.is_empty() { vec![pid] } else { threads }
}

/// Returns a thread of the process `pid` that is alive although the first thread has exited, and its state. A program
/// ends its first thread alone with pthread_exit(3) in `main`. Its other threads work on, but the kernel then calls the
/// process a zombie (proc_pid_stat(5)). `None` if no other thread is alive.
fn running_thread(pid: Pid) -> Option<(Pid, char)> {
    let others = threads(pid).into_iter().filter(|thread| *thread != pid);
    let alive = others.filter_map(|thread| Process::parse(thread, &stat(thread)?).filter(|found| !found.is_dead()));
    alive.map(|found| (found.pid, found.state)).next()
}

/// Returns whether the thread `thread` has exited, is exiting (PF_EXITING in the flags of proc_pid_stat(5),
/// linux/sched.h), or has a pending SIGKILL.
fn is_dying(thread: Pid) -> bool {
    const EXITING: u64 = 0x4;
    let Some(stat) = stat(thread) else { return true };
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    // The flags are field 9. The first field after the name is field 3.
    let flags: u64 = after.split_ascii_whitespace().nth(6).and_then(|flags| flags.parse().ok()).unwrap_or(0);
    let is_dead = Process::parse(thread, &stat).is_some_and(|found| found.is_dead());
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    is_dead || flags & EXITING != 0 || has_pending_kill(&status)
}

/// Returns whether a SIGKILL is pending for a process or for its main thread. `status` is the text of /proc/PID/status.
fn has_pending_kill(status: &str) -> bool {
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    status
        .lines()
        .filter_map(|line| line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")))
        .any(|set| u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & KILL != 0))
}

impl Process {
    fn parse(pid: Pid, line: &str) -> Option<Self> {
        // The name is in parentheses and may itself contain parentheses and spaces, so it ends at the last closing
        // parenthesis.
        let (before, after) = line.rsplit_once(')')?;
        let (_, name) = before.split_once('(')?;
        let mut fields = after.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = Pid::from_raw(fields.next()?.parse().ok()?);
        let group = Pid::from_raw(fields.next()?.parse().ok()?);
        let session = Pid::from_raw(fields.next()?.parse().ok()?);
        // `start` is field 22; `session` is field 6.
        let start = fields.nth(15)?.parse().ok()?;
        Some(Self { pid, thread: pid, name: name.to_owned(), state, parent, group, session, start })
    }

    /// Describes a child of `parent` whose files in /proc this process may not read (`hidepid`, proc(5)). The `start`
    /// of the result is 0. `None` if the child no longer exists, or if its group or session cannot be read.
    fn hidden(pid: Pid, parent: Pid) -> Option<Self> {
        use nix::errno::Errno;
        if nix::sys::signal::kill(pid, None) == Err(Errno::ESRCH) {
            return None;
        }
        let state = if parent == nix::unistd::getpid() && wait::ended(pid).is_some() { 'Z' } else { '?' };
        let (group, session) = (nix::unistd::getpgid(Some(pid)).ok()?, nix::unistd::getsid(Some(pid)).ok()?);
        let name = "a hidden process".to_owned();
        Some(Self { pid, thread: pid, name, state, parent, group, session, start: 0 })
    }

    /// Returns whether the process is dead or certain to die. It is certain to die if each of its threads is exiting,
    /// or if a SIGKILL is pending for it (proc_pid_status(5)), because nothing can revoke a SIGKILL. Such a process
    /// does nothing any more, but still has its pid and its files. Also true if the process no longer exists.
    pub(crate) fn is_dying(&self) -> bool {
        // Without a matching entry, the process no longer exists, or another process has its pid now.
        let Some(now) = Self::read(self.pid).filter(|now| now.start == self.start) else { return true };
        now.is_dead() || threads(self.pid).into_iter().all(is_dying)
    }

    /// Returns when the process started, rounded down to 1 s. `boot_time` is when the machine booted. `None` if the
    /// length of a clock tick is unknown, or if the time is out of range.
    pub(crate) fn started(&self, boot_time: jiff::Timestamp) -> Option<jiff::Timestamp> {
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
        let seconds = self.start.checked_div(ticks.try_into().ok()?)?;
        boot_time.checked_add(jiff::SignedDuration::from_secs(seconds.try_into().ok()?)).ok()
    }

    pub(super) fn read(pid: Pid) -> Option<Self> {
        let process = Self::parse(pid, &stat(pid)?)?;
        if process.is_dead()
            && let Some((thread, state)) = running_thread(pid)
        {
            return Some(Self { thread, state, ..process });
        }
        Some(process)
    }

    /// Returns every process that /proc lists.
    pub(super) fn list_all() -> Vec<Self> {
        let Ok(directory) = counted(std::fs::read_dir("/proc")) else { return Vec::new() };
        directory
            .flat_map(counted)
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(|pid| Self::read(Pid::from_raw(pid)))
            .collect()
    }

    pub(super) fn listed_children(parent: Pid) -> Vec<Self> {
        // Each thread has its own list of children (proc_pid_task_tid_children(5)). A kernel can be built without these
        // lists; then the children are selected from all processes.
        let Ok(threads) = counted(std::fs::read_dir(format!("/proc/{parent}/task"))) else { return Vec::new() };
        let mut pids: Vec<i32> = Vec::new();
        for thread in threads.flat_map(counted) {
            match counted(std::fs::read_to_string(thread.path().join("children"))) {
                Ok(list) => pids.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok())),
                Err(error) if error.kind() == io::ErrorKind::NotFound && thread.path().exists() => {
                    return Self::list_all().into_iter().filter(|process| process.parent == parent).collect();
                }
                Err(_) => {}
            }
        }
        let pids = pids.into_iter().map(Pid::from_raw);
        pids.filter_map(|pid| Self::read(pid).or_else(|| Self::hidden(pid, parent))).collect()
    }

    /// Returns the value of the variable `name` in the environment with which the process was started.
    pub(crate) fn environment(&self, name: &str) -> Variable {
        // The file is empty for a process without an environment, for a zombie, and for a process in the middle of an
        // exec.
        let environment = counted(std::fs::read(format!("/proc/{}/environ", self.thread))).unwrap_or_default();
        if environment.is_empty() {
            return Variable::Unreadable;
        }
        Variable::among(environment.split(|&byte| byte == 0), name)
    }

    /// Returns whether the process may be in the pid namespace `namespace`, which is nested in the namespace of this
    /// process. The namespace of a process of another user is unreadable. For such a process, returns true if it is in
    /// any nested namespace.
    pub(crate) fn may_be_in(&self, namespace: u64) -> bool {
        use std::os::unix::fs::MetadataExt;
        if let Ok(own) = std::fs::metadata(format!("/proc/{}/ns/pid", self.thread)) {
            return own.ino() == namespace;
        }
        // Every user can read the number of namespaces that the process is in (`NSpid`, proc_pid_status(5)).
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.thread)).unwrap_or_default();
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        numbers.is_some_and(|numbers| numbers.split_ascii_whitespace().count() > 1)
    }

    /// Returns whether the process executes a program of `bytes` or more. Returns false if this process may not read
    /// which program it executes.
    pub(crate) fn has_large_program(&self, bytes: u64) -> bool {
        std::fs::metadata(format!("/proc/{}/exe", self.thread)).is_ok_and(|program| program.len() >= bytes)
    }

    /// Returns whether the process may be a terraform under another name: its program has `large` bytes or more, and
    /// its working directory contains `.terraform`.
    pub(crate) fn may_be_renamed_terraform(&self, large: u64) -> bool {
        self.has_large_program(large) && std::fs::metadata(format!("/proc/{}/cwd/.terraform", self.thread)).is_ok()
    }

    /// Returns whether all user IDs of the process (real, effective, saved) are the effective one of this process, so
    /// that a signal of this process's user reaches it. False if they cannot be read.
    pub(crate) fn has_our_user(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.thread)).unwrap_or_default();
        let own = nix::unistd::geteuid().to_string();
        let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        ids.is_some_and(|ids| ids.split_ascii_whitespace().take(3).filter(|id| *id == own).count() == 3)
    }

    /// Returns whether the process executes the same program as this process. `None` if this process may not read which
    /// program the other process executes.
    pub(crate) fn runs_our_program(&self) -> Option<bool> {
        let program = |process: &str| FileId::at(format!("/proc/{process}/exe")).ok();
        program(&self.thread.to_string()).map(|theirs| Some(theirs) == program("self"))
    }

    /// Returns the name that the process has given itself ([`crate::sys::session::name_this_process`]).
    pub(super) fn own_name(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    /// Returns whether the process has the file open (proc(5), `/proc/PID/fd`).
    /// Returns false if this process may not read the list of the other process's descriptors.
    pub(crate) fn has_open(&self, file: FileId) -> bool {
        let Ok(descriptors) = std::fs::read_dir(format!("/proc/{}/fd", self.thread)) else { return false };
        descriptors.flatten().any(|descriptor| FileId::at(descriptor.path()).is_ok_and(|open| open == file))
    }

    /// Returns the file name of the program that the process executes. If the file name cannot be read, returns the
    /// name of the process instead.
    pub(crate) fn program(&self) -> String {
        std::fs::read_link(format!("/proc/{}/exe", self.thread))
            .ok()
            .and_then(|path| Some(String::from_utf8_lossy(path.file_name()?.as_bytes()).into_owned()))
            .unwrap_or_else(|| self.name.clone())
    }
}

/// Whether the clock that gives [`Process::start`] can be set. A process may then seem to be older than its parent.
pub(crate) const START_CLOCK_CAN_BE_SET: bool = false;

/// Returns the current time in the unit of [`Process::start`]: in clock ticks since boot (CLOCK_BOOTTIME,
/// clock_gettime(2)). `None` if the length of a tick is unknown.
pub(crate) fn start_clock() -> Option<u64> {
    let per_second = u64::try_from(nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??).ok()?;
    let now = crate::sys::boot_clock::now();
    Some(now.as_secs() * per_second + u64::from(now.subsec_nanos()) * per_second / 1_000_000_000)
}

/// Returns when this machine booted, according to the current setting of its clock (`btime` in proc_stat(5)). `None` if
/// the boot time cannot be read.
pub(crate) fn boot_time() -> Option<jiff::Timestamp> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    jiff::Timestamp::from_second(seconds).ok()
}

/// Returns whether `pid` is in the control group of this process (cgroups(7)). Returns false if one of the two control
/// groups cannot be read, or if there is no usable process list.
pub(crate) fn is_in_own_control_group(pid: Pid) -> bool {
    let group = |process: &str| std::fs::read(format!("/proc/{process}/cgroup")).ok();
    list() == ProcessList::Available && group("self").is_some_and(|own| group(&pid.to_string()) == Some(own))
}

/// Returns the children of the calling thread, which are all children of this process as long as it has one thread.
/// Empty if the kernel does not list them, or if there is no usable process list.
pub(crate) fn own_children() -> Vec<Pid> {
    if list() != ProcessList::Available {
        return Vec::new();
    }
    let list = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}

/// Returns the number of processes in the control group of this process that the kernel killed because memory ran out
/// (`oom_kill` in memory.events of cgroup v2, in memory.oom_control of v1). `None` if the kernel does not report the
/// number.
pub(crate) fn out_of_memory_kills() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let file = groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        match controllers {
            "" => Some(format!("/sys/fs/cgroup{path}/memory.events")),
            _ if controllers.split(',').any(|controller| controller == "memory") => {
                Some(format!("/sys/fs/cgroup/memory{path}/memory.oom_control"))
            }
            _ => None,
        }
        .filter(|file| std::path::Path::new(file).exists())
    })?;
    std::fs::read_to_string(file).ok()?.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields_of_stat() {
        let process =
            Process::parse(Pid::from_raw(7), "7 (a) T 1 (b)) S 3 4 5 0 -1 0 0 0 0 0 1 2 3 4 20 0 1 0 815 9").unwrap();
        assert_eq!(process.name, "a) T 1 (b)");
        assert_eq!((process.state, process.parent, process.group), ('S', Pid::from_raw(3), Pid::from_raw(4)));
        assert_eq!(process.session, Pid::from_raw(5));
        assert_eq!(process.start, 815);
    }

    /// The texts with two pids in `NSpid` are what /proc/self/status contains below `unshare -pf` if no new /proc is
    /// mounted: the pid in the outer namespace, then the own pid. In one of them, both happen to be equal.
    #[test]
    fn a_proc_of_another_namespace_is_not_ours() {
        for (status, ours) in [
            ("Name:\tx\nPid:\t7\nNSpid:\t7\n", true),
            ("Name:\tx\nPid:\t7\n", true),
            ("Name:\tx\nPid:\t7\nNSpid:\t7\t7\n", false),
            ("Name:\tx\nPid:\t7\nNSpid:\t7\t1\n", false),
            ("Name:\tx\nPid:\t8\nNSpid:\t8\t7\n", false),
            ("Name:\tx\nPid:\t8\nNSpid:\t8\n", false),
            ("", false),
        ] {
            assert_eq!(names_one_namespace(status, 7), ours, "{status:?}");
        }
    }

    #[test]
    fn a_pending_kill_is_seen_for_the_process_and_for_its_thread() {
        for (status, expected) in [
            ("SigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n", true),
            ("SigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n", true),
            ("SigPnd:\t0000000000000000\nShdPnd:\t0000000000000200\nSigBlk:\t0000000000000100\n", false),
            ("", false),
        ] {
            assert_eq!(has_pending_kill(status), expected, "{status}");
        }
    }

    #[test]
    fn a_torn_stat_is_no_process() {
        for stat in ["", "7", "7 (a", "7 (a)", "7 (a) S", "7 (a) S x", "7 (a) S 1", "7 (a) S 1 2 3"] {
            assert_eq!(Process::parse(Pid::from_raw(7), stat), None, "{stat:?}");
        }
    }

    #[test]
    fn no_text_of_a_process_panics_and_any_name_is_read() {
        use proptest::prelude::*;
        let line = crate::generated_input::changed_text("7 (a b) S 3 4 5 0 -1 0 0 0 0 0 1 2 3 4 20 0 1 0 815 9");
        let strategy = (line, "[ -~\n]{1,15}");
        crate::generated_input::for_all(file!(), &strategy, |(line, name)| {
            let _ = Process::parse(Pid::from_raw(7), &line);
            let line = format!("7 ({name}) S 3 4 5 0 -1 0 0 0 0 0 1 2 3 4 20 0 1 0 815 9");
            let process = Process::parse(Pid::from_raw(7), &line).unwrap();
            prop_assert_eq!((process.name, process.state, process.start), (name, 'S', 815));
            Ok(())
        });
    }
}
