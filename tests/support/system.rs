//! What the tests ask the operating system. Everything in which Linux and macOS differ for the tests is in this file.
//!
//! On Linux, this is what /proc says (proc(5)). On macOS, it is what libproc (libproc.h, sys/proc_info.h) and sysctl(3)
//! say. They do not show the environment of the system's own programs, such as `/bin/sh`.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

#[cfg(target_os = "linux")]
use linux as system;
#[cfg(not(target_os = "linux"))]
use macos as system;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::unistd::Pid;
pub use system::{
    arguments, boot_time, environment, is_dying, is_noexec, name, pids, process, program, queued, state, terminal_name,
    waits_in,
};

/// Whether this is Linux. Some tests look at what only Linux shows, such as the system call in which a process waits.
/// On another system they end at once, and tests/left-out lists them.
pub const IS_LINUX: bool = cfg!(target_os = "linux");

/// Whether this process can create namespaces and control groups, and change its user: it is root on Linux. Without
/// that, some tests end at once, and tests/left-out lists them.
pub fn is_root_on_linux() -> bool {
    IS_LINUX && nix::unistd::geteuid().is_root()
}

/// A process, as the list of processes describes it.
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: Pid,
    /// Its name, of at most 15 bytes. It is that of its program, unless the process has changed it.
    pub name: String,
    /// One letter, as ps(1) shows it: `S`, `T`, `Z`...
    pub state: char,
    pub parent: Pid,
    pub group: Pid,
}

/// Returns all processes.
pub fn processes() -> Vec<Process> {
    pids().into_iter().filter_map(process).collect()
}

/// The system calls that [`waits_in`] knows.
#[derive(Clone, Copy, Debug)]
pub enum SystemCall {
    Read,
    Write,
}

/// Whether any other open file description has a lock on a part of the file (F_OFD_GETLK, fcntl(2)). False if there is
/// no such file.
pub fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::options().read(true).write(true).open(path) else { return false };
    let found = control_lock(&file, libc::F_OFD_GETLK, 0..0);
    let found = found.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    libc::c_int::from(found.l_type) != libc::c_int::from(libc::F_UNLCK)
}

/// Locks the byte `byte` of the file until it is closed (F_OFD_SETLK, fcntl(2)).
pub fn lock_byte(file: &File, byte: i64) {
    control_lock(file, libc::F_OFD_SETLK, byte..byte + 1).unwrap();
}

/// Returns how many bytes a pipe holds (FIONREAD, pipe(7)).
pub fn unread(reader: &std::io::PipeReader) -> libc::c_int {
    let mut bytes = 0;
    // SAFETY: FIONREAD writes one int.
    assert_eq!(unsafe { libc::ioctl(reader.as_raw_fd(), libc::FIONREAD, &raw mut bytes) }, 0);
    bytes
}

/// Whether there is something to read from `file` now.
pub fn is_readable(file: &impl AsFd) -> bool {
    let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Calls fcntl(2) with a write lock on `bytes`. An empty range is the whole file. Returns the lock that the call has
/// written.
fn control_lock(file: &File, command: libc::c_int, bytes: std::ops::Range<i64>) -> std::io::Result<libc::flock> {
    // SAFETY: a zeroed flock is valid. The call reads it, and F_OFD_GETLK writes it.
    unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = libc::c_short::try_from(libc::F_WRLCK).unwrap();
        (lock.l_start, lock.l_len) = (bytes.start, bytes.end - bytes.start);
        if libc::fcntl(file.as_raw_fd(), command, &raw mut lock) == 0 {
            Ok(lock)
        } else {
            Err(std::io::Error::last_os_error())
        }
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::{read, read_dir, read_link, read_to_string};
    use std::path::PathBuf;

    use nix::pty::PtyMaster;
    use nix::sys::signal::Signal;
    use nix::sys::statvfs::FsFlags;
    use nix::unistd::Pid;

    use super::{Process, SystemCall};

    /// Returns the pids of all processes, in ascending order.
    pub fn pids() -> Vec<Pid> {
        let names = read_dir("/proc").unwrap().flatten().map(|entry| entry.file_name());
        let mut pids: Vec<i32> = names.filter_map(|name| name.to_str()?.parse().ok()).collect();
        pids.sort_unstable();
        pids.into_iter().map(Pid::from_raw).collect()
    }

    /// Describes a process (proc_pid_stat(5)). `None` if it no longer exists. The state is that of its first thread.
    pub fn process(pid: Pid) -> Option<Process> {
        let stat = String::from_utf8_lossy(&read(format!("/proc/{pid}/stat")).ok()?).into_owned();
        let (open, close) = (stat.find('(')?, stat.rfind(')')?);
        let mut fields = stat[close + 2..].split(' ');
        let state = fields.next()?.chars().next()?;
        let mut number = || Some(Pid::from_raw(fields.next()?.parse().ok()?));
        Some(Process { pid, name: stat[open + 1..close].to_owned(), state, parent: number()?, group: number()? })
    }

    /// Returns the state of a process: `S`, `T`, `Z`... `None` if it no longer exists. A process whose first thread has
    /// exited is no zombie as long as another thread has not: it still has its descriptors, and so its file locks.
    pub fn state(pid: Pid) -> Option<char> {
        let of = |thread: &str| {
            let stat = read(format!("/proc/{pid}/task/{thread}/stat")).ok()?;
            let stat = String::from_utf8_lossy(&stat).into_owned();
            stat[stat.rfind(')')? + 2..].chars().next()
        };
        let threads = read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
        let states = threads.filter_map(|thread| of(thread.file_name().to_str()?));
        states.reduce(|one, other| if matches!(one, 'Z' | 'X') { other } else { one })
    }

    /// Whether a SIGKILL to the process has not ended it yet. Its descriptors may be closed by then, so that others act
    /// on its death, while it still has children.
    pub fn is_dying(pid: Pid) -> bool {
        /// The bit of SIGKILL in the sets of proc_pid_status(5).
        const KILL: u64 = 1 << (Signal::SIGKILL as u64 - 1);
        /// The flag of the kernel's include/linux/sched.h, in field 9 of proc_pid_stat(5).
        const PF_EXITING: u64 = 4;
        let text = |name| read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let (status, stat) = (text("status"), text("stat"));
        let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
        let is_pending = pending.filter_map(|set| u64::from_str_radix(set.trim(), 16).ok()).any(|set| set & KILL != 0);
        let flags = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(6)?.parse::<u64>().ok());
        is_pending || flags.is_some_and(|flags| flags & PF_EXITING != 0)
    }

    /// Returns the name that the process has in the process list. Empty if it no longer exists.
    pub fn name(pid: Pid) -> String {
        read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
    }

    /// Returns the path of the program that the process executes. `None` if it cannot be read.
    pub fn program(pid: Pid) -> Option<PathBuf> {
        read_link(format!("/proc/{pid}/exe")).ok()
    }

    /// Returns the command line as ps(1) shows it. Empty if there is no such process.
    pub fn arguments(pid: Pid) -> String {
        String::from_utf8_lossy(&read(format!("/proc/{pid}/cmdline")).unwrap_or_default()).replace('\0', " ")
    }

    /// Returns the entries `NAME=value` of the environment with which the process was started. `None` if it cannot be
    /// read.
    pub fn environment(pid: Pid) -> Option<Vec<String>> {
        let bytes = read(format!("/proc/{pid}/environ")).ok()?;
        let entries = bytes.split(|&byte| byte == 0).filter(|entry| !entry.is_empty());
        Some(entries.map(|entry| String::from_utf8_lossy(entry).into_owned()).collect())
    }

    /// Returns how many bytes a connection on 127.0.0.1 has sent that were not acknowledged, and how many it has received
    /// that were not read (/proc/net/tcp, proc_net(5)). `None` if there is no such connection.
    pub fn queued(local: u16, remote: u16) -> Option<(usize, usize)> {
        let text = read_to_string("/proc/net/tcp").unwrap();
        let ends = format!(" 0100007F:{local:04X} 0100007F:{remote:04X} ");
        let line = text.lines().find(|line| line.contains(&ends))?;
        let (sent, received) = line.split_whitespace().nth(4)?.split_once(':')?;
        Some((usize::from_str_radix(sent, 16).ok()?, usize::from_str_radix(received, 16).ok()?))
    }

    /// Whether a process waits in this system call (proc_pid_syscall(5)).
    pub fn waits_in(pid: Pid, call: SystemCall) -> bool {
        let number = match call {
            SystemCall::Read => libc::SYS_read,
            SystemCall::Write => libc::SYS_write,
        };
        let current = read_to_string(format!("/proc/{pid}/syscall"));
        current.is_ok_and(|current| current.starts_with(&format!("{number} ")))
    }

    /// Returns when the machine was started, in seconds since 1970.
    pub fn boot_time() -> i64 {
        let stat = read_to_string("/proc/stat").unwrap();
        stat.lines().find_map(|line| line.strip_prefix("btime ")).unwrap().trim().parse().unwrap()
    }

    /// Returns the path of the terminal whose master is `master` (ptsname(3)).
    pub fn terminal_name(master: &PtyMaster) -> String {
        nix::pty::ptsname_r(master).unwrap()
    }

    /// Whether no program can be executed on a file system with these flags.
    pub fn is_noexec(flags: FsFlags) -> bool {
        flags.contains(FsFlags::ST_NOEXEC)
    }
}

#[cfg(not(target_os = "linux"))]
mod macos {
    use std::ffi::CStr;
    use std::os::fd::AsRawFd;
    use std::path::PathBuf;

    use nix::pty::PtyMaster;
    use nix::sys::statvfs::FsFlags;
    use nix::unistd::Pid;

    use super::{Process, SystemCall};

    /// Returns what `proc_pidinfo` (libproc.h) says. `None` if it says nothing.
    ///
    /// # Safety
    /// `T` must be the type that belongs to `flavor` in sys/proc_info.h, and all zeros must be a valid `T`.
    unsafe fn information<T>(pid: Pid, flavor: libc::c_int, argument: u64) -> Option<T> {
        let size = i32::try_from(size_of::<T>()).unwrap();
        // SAFETY: the call writes at most `size` bytes.
        unsafe {
            let mut value: T = std::mem::zeroed();
            let written = libc::proc_pidinfo(pid.as_raw(), flavor, argument, (&raw mut value).cast(), size);
            (written > 0).then_some(value)
        }
    }

    /// The description of a process, also of a zombie.
    fn description(pid: Pid) -> Option<libc::proc_bsdinfo> {
        // SAFETY: this is the type of PROC_PIDTBSDINFO, and all its fields are numbers.
        unsafe { information(pid, libc::PROC_PIDTBSDINFO, 1) }
    }

    fn text(field: &[libc::c_char]) -> String {
        let bytes: Vec<u8> = field.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Returns the pids of all processes, in ascending order.
    pub fn pids() -> Vec<Pid> {
        let mut numbers = vec![0i32; 100_000];
        let size = i32::try_from(size_of_val(&*numbers)).unwrap();
        // SAFETY: the call writes at most `size` bytes.
        let count = unsafe { libc::proc_listallpids(numbers.as_mut_ptr().cast(), size) };
        numbers.truncate(usize::try_from(count).unwrap());
        numbers.sort_unstable();
        numbers.into_iter().filter(|number| *number > 0).map(Pid::from_raw).collect()
    }

    /// Describes a process. `None` if it no longer exists, or belongs to another user.
    pub fn process(pid: Pid) -> Option<Process> {
        let found = description(pid)?;
        let number = |pid: u32| Pid::from_raw(pid.cast_signed());
        // The states of sys/proc.h: SIDL, SRUN, SSLEEP, SSTOP, SZOMB.
        let state = *b"?IRSTZ".get(found.pbi_status as usize).unwrap_or(&b'?');
        Some(Process {
            pid,
            name: text(&found.pbi_comm),
            state: state.into(),
            parent: number(found.pbi_ppid),
            group: number(found.pbi_pgid),
        })
    }

    /// Returns the state of a process: `S`, `T`, `Z`... `None` if it no longer exists.
    pub fn state(pid: Pid) -> Option<char> {
        process(pid).map(|found| found.state)
    }

    /// Whether the process is exiting (PROC_FLAG_INEXIT, sys/proc_info.h).
    pub fn is_dying(pid: Pid) -> bool {
        description(pid).is_some_and(|found| found.pbi_flags & 4 != 0)
    }

    /// Returns the name that the process has given itself, which is that of one of its threads, or that of its program.
    /// Empty if it no longer exists.
    pub fn name(pid: Pid) -> String {
        /// The handles of the threads, 64 bits each (sys/proc_info.h).
        const PROC_PIDLISTTHREADS: libc::c_int = 6;
        // SAFETY: the handles are numbers. More of them than there are threads are 0.
        let handles: Option<[u64; 64]> = unsafe { information(pid, PROC_PIDLISTTHREADS, 0) };
        let names = handles.into_iter().flatten().filter(|handle| *handle != 0).filter_map(|handle| {
            // SAFETY: this is the type of PROC_PIDTHREADINFO, and all its fields are numbers.
            let thread: libc::proc_threadinfo = unsafe { information(pid, libc::PROC_PIDTHREADINFO, handle) }?;
            Some(text(&thread.pth_name))
        });
        let own = names.into_iter().find(|name| name.starts_with("tf-"));
        own.or_else(|| process(pid).map(|found| found.name)).unwrap_or_default()
    }

    /// Returns the path of the program that the process executes. `None` if it cannot be read.
    pub fn program(pid: Pid) -> Option<PathBuf> {
        let mut path = vec![0u8; usize::try_from(libc::PROC_PIDPATHINFO_MAXSIZE).unwrap()];
        let size = u32::try_from(path.len()).unwrap();
        // SAFETY: the call writes at most `size` bytes.
        let length = unsafe { libc::proc_pidpath(pid.as_raw(), path.as_mut_ptr().cast(), size) };
        path.truncate(usize::try_from(length).ok().filter(|length| *length > 0)?);
        Some(String::from_utf8_lossy(&path).into_owned().into())
    }

    /// Returns a value of the kernel (sysctl(3)). `None` if it cannot be read.
    fn kernel<const N: usize>(mut name: [libc::c_int; N]) -> Option<Vec<u8>> {
        // As large as the arguments and the environment of a process can be (ARG_MAX, sys/syslimits.h).
        let mut value = vec![0u8; 1 << 20];
        let (length, mut size) = (u32::try_from(N).unwrap(), value.len());
        let (start, end) = (value.as_mut_ptr().cast(), &raw mut size);
        // SAFETY: the call reads `length` numbers and writes at most `size` bytes.
        let asked = unsafe { libc::sysctl(name.as_mut_ptr(), length, start, end, std::ptr::null_mut(), 0) };
        value.truncate(size);
        (asked == 0).then_some(value)
    }

    /// Returns the command line as ps(1) shows it. Empty if it cannot be read.
    pub fn arguments(pid: Pid) -> String {
        let output = std::process::Command::new("ps").args(["-ww", "-o", "args=", "-p", &pid.to_string()]).output();
        String::from_utf8_lossy(&output.unwrap().stdout).trim_end().to_owned()
    }

    /// Returns the entries `NAME=value` of the environment with which the process was started. `None` if it cannot be
    /// read.
    pub fn environment(pid: Pid) -> Option<Vec<String>> {
        // The number of arguments, the path of the program, zeros, the arguments, and the environment (KERN_PROCARGS2).
        let bytes = kernel([libc::CTL_KERN, libc::KERN_PROCARGS2, pid.as_raw()])?;
        let (count, strings) = bytes.split_first_chunk()?;
        let count = usize::try_from(i32::from_ne_bytes(*count)).ok()?;
        let path = strings.iter().position(|byte| *byte == 0)?;
        let arguments = path + strings[path..].iter().position(|byte| *byte != 0)?;
        let after_arguments = strings[arguments..].split(|byte| *byte == 0).skip(count).filter(|text| !text.is_empty());
        let entries: Vec<String> = after_arguments.map(|text| String::from_utf8_lossy(text).into_owned()).collect();
        (!entries.is_empty()).then_some(entries)
    }

    /// Returns `None`: macOS has no file that shows the queues of a connection.
    pub fn queued(_local: u16, _remote: u16) -> Option<(usize, usize)> {
        None
    }

    /// Returns false: macOS does not say in which system call a process waits.
    pub fn waits_in(_pid: Pid, _call: SystemCall) -> bool {
        false
    }

    /// Returns when the machine was started, in seconds since 1970.
    pub fn boot_time() -> i64 {
        let value = kernel([libc::CTL_KERN, libc::KERN_BOOTTIME]).unwrap();
        i64::from_ne_bytes(*value.first_chunk().unwrap())
    }

    /// Returns the path of the terminal whose master is `master`. TIOCPTYGNAME writes it, with the zero at its end,
    /// into 128 bytes (sys/ttycom.h). ptsname(3) would return a static buffer, which two tests cannot use at once.
    pub fn terminal_name(master: &PtyMaster) -> String {
        let mut name = [0u8; 128];
        let request = libc::c_ulong::from(libc::TIOCPTYGNAME);
        // SAFETY: the call writes at most 128 bytes.
        let asked = unsafe { libc::ioctl(master.as_raw_fd(), request, name.as_mut_ptr()) };
        assert_eq!(asked, 0, "{}", std::io::Error::last_os_error());
        CStr::from_bytes_until_nul(&name).unwrap().to_str().unwrap().to_owned()
    }

    /// Returns false: statvfs(3) of macOS does not say whether programs can be executed.
    pub fn is_noexec(_flags: FsFlags) -> bool {
        false
    }
}
