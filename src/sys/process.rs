//! Processes: those of ours, those we adopted, and what /proc tells of the rest.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::wait::Ended;

/// Makes orphans of our descendants our children instead of init's (`PR_SET_CHILD_SUBREAPER`, Linux 3.4).
/// False where the system has no such thing; then the proof of death rests on the other two.
pub(crate) fn adopt_orphans() -> bool {
    #[cfg(target_os = "linux")]
    {
        nix::sys::prctl::set_child_subreaper(true).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Makes sure that our own death by a signal leaves no core file. A core size limit of 0 would not be enough: it does
/// not stop a core that is piped to a program (core(5)).
pub(crate) fn leave_no_core() {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_dumpable(false);
    #[cfg(not(target_os = "linux"))]
    {
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `none` is a whole rlimit.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    }
}

/// A descriptor that becomes readable when `pid` has ended (pidfd_open(2), Linux 5.3).
///
/// # Errors
/// ENOSYS where there is none, ESRCH when there is no such process.
pub(crate) fn watch_end(pid: Pid) -> io::Result<OwnedFd> {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::FromRawFd;
        // SAFETY: the call takes two numbers and gives a new descriptor, which is ours alone and closed on exec.
        unsafe {
            let descriptor = libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0);
            match i32::try_from(descriptor) {
                Ok(descriptor) if descriptor >= 0 => Ok(OwnedFd::from_raw_fd(descriptor)),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = pid;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Sends `signal` to the process behind a descriptor of [`watch_end`]: to that one, and never to another that has its
/// number now (pidfd_send_signal(2)).
///
/// # Errors
/// ESRCH when it is gone.
pub(crate) fn signal(process: &OwnedFd, signal: Signal) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    return signal_number(process, signal as i32);
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (process, signal);
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(target_os = "linux")]
fn signal_number(process: &OwnedFd, number: i32) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: numbers and a null pointer.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), number, none, 0) };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How the process behind a descriptor of [`watch_end`] ended, though it was no child of ours. While it is a zombie that
/// stands in /proc/PID/stat (the last field, for whoever may trace it); once it was taken away the descriptor tells it
/// (PIDFD_GET_INFO with PIDFD_INFO_EXIT, Linux 6.15). `None` where nothing does.
pub(crate) fn end_of(pid: Pid, process: &OwnedFd) -> Option<Ended> {
    #[cfg(target_os = "linux")]
    {
        let status = status_by_descriptor(process).or_else(|| {
            let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
            let stat = String::from_utf8_lossy(&stat);
            // Still there to be asked, so it is that one and no other with its number.
            let zombie = Process::parse(pid, &stat)?.state == 'Z' && signal_number(process, 0).is_ok();
            zombie.then(|| stat.trim_end().rsplit(' ').next()?.parse().ok()).flatten()
        })?;
        Some(if libc::WIFSIGNALED(status) {
            Ended::Killed(Signal::try_from(libc::WTERMSIG(status)).unwrap_or(Signal::SIGKILL))
        } else {
            Ended::Exited(libc::WEXITSTATUS(status))
        })
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (pid, process);
        None
    }
}

#[cfg(target_os = "linux")]
fn status_by_descriptor(process: &OwnedFd) -> Option<i32> {
    use std::os::fd::AsRawFd;
    /// struct pidfd_info, as its first version has it (linux/pidfd.h).
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        mask: u64,
        control_group: u64,
        numbers: [u32; 11],
        exit_code: i32,
    }
    const EXIT: u64 = 1 << 3;
    const GET_INFO: libc::c_ulong = 0xC040_FF0B;
    let mut info = Info { mask: EXIT, ..Info::default() };
    debug_assert_eq!(size_of::<Info>(), 64);
    // SAFETY: the call writes at most the 64 bytes that its number names into `info`.
    let asked = unsafe { libc::ioctl(process.as_raw_fd(), GET_INFO, &raw mut info) };
    (asked == 0 && info.mask & EXIT != 0).then_some(info.exit_code)
}

/// The number of our pid namespace, and whether it is the first one, which sees every process of the machine
/// (pid_namespaces(7); PROC_PID_INIT_INO in linux/proc_ns.h). `None` where there is no such thing.
pub(crate) fn pid_namespace() -> Option<(u64, bool)> {
    use std::os::unix::fs::MetadataExt;
    const FIRST: u64 = 0xEFFF_FFFC;
    let number = std::fs::metadata("/proc/self/ns/pid").ok()?.ino();
    Some((number, number == FIRST))
}

/// Whether a SIGKILL is pending, for the process or for the thread that leads it, in the text of /proc/PID/status.
fn has_pending_kill(status: &str) -> bool {
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    status
        .lines()
        .filter_map(|line| line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")))
        .any(|set| u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & KILL != 0))
}

/// What /proc/PID/stat says of a process (proc_pid_stat(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its number.
    pub(crate) pid: Pid,
    /// Its name: at most 15 bytes, chosen by itself, so not to be trusted and not to be printed raw.
    pub(crate) name: String,
    /// One letter; `T` is stopped, `Z` and `X` are dead.
    pub(crate) state: char,
    /// Its parent.
    pub(crate) parent: Pid,
    /// Its process group.
    pub(crate) group: Pid,
    /// When it started, in clock ticks since boot. With its number it names one process for ever: a number comes again.
    pub(crate) start: u64,
}

impl Process {
    /// A zombie is dead: it will do nothing any more, whatever kill(pid, 0) says.
    pub(crate) fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }

    fn parse(pid: Pid, line: &str) -> Option<Self> {
        // The name stands in brackets and may itself hold brackets and spaces: the last bracket ends it.
        let (before, after) = line.rsplit_once(')')?;
        let (_, name) = before.split_once('(')?;
        let mut fields = after.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = Pid::from_raw(fields.next()?.parse().ok()?);
        let group = Pid::from_raw(fields.next()?.parse().ok()?);
        // Field 22; the group is field 5.
        let start = fields.nth(16)?.parse().ok()?;
        Some(Self { pid, name: name.to_owned(), state, parent, group, start })
    }

    /// Whether it is dead, or will be as soon as the kernel comes to it: it is taken apart (PF_EXITING in the flags of
    /// proc_pid_stat(5), linux/sched.h), or a SIGKILL waits for it (proc_pid_status(5)), which nothing can take back. The
    /// pid and the files of such a process are still its own, and it does nothing any more.
    pub(crate) fn is_dying(&self) -> bool {
        const EXITING: u64 = 0x4;
        let stat = std::fs::read(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let stat = String::from_utf8_lossy(&stat);
        // Gone since, or another one has its number now.
        let Some(now) = Self::parse(self.pid, &stat).filter(|now| now.start == self.start) else { return true };
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        let flags: u64 = after.split_ascii_whitespace().nth(6).and_then(|flags| flags.parse().ok()).unwrap_or(0);
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        now.is_dead() || flags & EXITING != 0 || has_pending_kill(&status)
    }

    /// When it started, on a machine that was started at `booted`.
    pub(crate) fn started(&self, booted: jiff::Timestamp) -> Option<jiff::Timestamp> {
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
        let seconds = self.start.checked_div(ticks.try_into().ok()?)?;
        booted.checked_add(jiff::SignedDuration::from_secs(seconds.try_into().ok()?)).ok()
    }

    /// Looks one process up.
    pub(crate) fn look_up(pid: Pid) -> Option<Self> {
        Self::parse(pid, &String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/stat")).ok()?))
    }

    /// Every process that /proc shows. Empty where there is no /proc.
    pub(crate) fn all() -> Vec<Self> {
        let Ok(directory) = std::fs::read_dir("/proc") else { return Vec::new() };
        directory
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(|pid| Self::look_up(Pid::from_raw(pid)))
            .collect()
    }

    /// The children of `parent`, those that it adopted among them.
    pub(crate) fn children(parent: Pid) -> Vec<Self> {
        // A list for each thread (proc_pid_task_tid_children(5)); a kernel may be built without it.
        let Ok(threads) = std::fs::read_dir(format!("/proc/{parent}/task")) else { return Vec::new() };
        let mut pids: Vec<i32> = Vec::new();
        for thread in threads.flatten() {
            match std::fs::read_to_string(thread.path().join("children")) {
                Ok(list) => pids.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok())),
                Err(error) if error.kind() == io::ErrorKind::NotFound && thread.path().exists() => {
                    return Self::all().into_iter().filter(|process| process.parent == parent).collect();
                }
                Err(_) => {}
            }
        }
        pids.into_iter().filter_map(|pid| Self::look_up(Pid::from_raw(pid))).collect()
    }

    /// Everything below `root`, `root` not among it.
    pub(crate) fn below(root: Pid) -> Vec<Self> {
        let mut found: Vec<Self> = Self::children(root);
        let mut next = 0;
        while next < found.len() {
            let children = Self::children(found[next].pid);
            // A process that forks while we look can be seen twice, once below each of two parents.
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

    /// The value of `name` in the environment that the process started with. `None` as well for a process whose
    /// environment we may not read: another user's.
    pub(crate) fn environment(&self, name: &str) -> Option<Vec<u8>> {
        let environment = std::fs::read(format!("/proc/{}/environ", self.pid)).ok()?;
        environment
            .split(|&byte| byte == 0)
            .find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
            .map(<[u8]>::to_vec)
    }

    /// Whether it runs another program than we do: a child that was forked has become one by exec.
    pub(crate) fn runs_another_program(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let program =
            |process: &str| std::fs::metadata(format!("/proc/{process}/exe")).map(|file| (file.dev(), file.ino())).ok();
        program(&self.pid.to_string()).is_some_and(|theirs| Some(theirs) != program("self"))
    }

    /// Whether it has that file open (proc(5), `/proc/PID/fd`). False for a process that we may not look into.
    pub(crate) fn has_open(&self, (device, number): (u64, u64)) -> bool {
        use std::os::unix::fs::MetadataExt;
        let Ok(descriptors) = std::fs::read_dir(format!("/proc/{}/fd", self.pid)) else { return false };
        descriptors
            .flatten()
            .filter_map(|descriptor| std::fs::metadata(descriptor.path()).ok())
            .any(|file| (file.dev(), file.ino()) == (device, number))
    }

    /// The program that it runs, without its directory, or else its name.
    pub(crate) fn program(&self) -> String {
        std::fs::read_link(format!("/proc/{}/exe", self.pid))
            .ok()
            .and_then(|path| Some(String::from_utf8_lossy(path.file_name()?.as_bytes()).into_owned()))
            .unwrap_or_else(|| self.name.clone())
    }
}

/// When this machine was started, by its clock of now (`btime` in proc_stat(5)). `None` where nothing tells.
pub(crate) fn booted() -> Option<jiff::Timestamp> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    jiff::Timestamp::from_second(seconds).ok()
}

/// The children of this process, while it has one thread. Empty where a kernel does not tell.
pub(crate) fn own_children() -> Vec<Pid> {
    let list = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}

/// How often the kernel has killed a process of our control group for want of memory, as far as it tells
/// (`oom_kill` in memory.events of cgroup v2, in memory.oom_control of v1). `None` where it does not.
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
        assert_eq!(process.start, 815);
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
}
