//! Processes on macOS: libproc (libproc.h, sys/proc_info.h), sysctl(3) and kqueue(2).
//!
//! libproc describes the processes of this user completely, those of other users partly, and root's view is complete.
//! The kernel leaves the environment out of the description of a restricted process, such as every program of the
//! system ([`crate::sys::macos::procargs`]). So a shell that terraform has started is recognised by its process group,
//! its parent and its session, and not by the mark in its environment. An open lifeline shows that a process is alive, but
//! not which one.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::ffi::{CStr, OsStr};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid};

use super::{Process, ProcessList, Variable, counted};
use crate::sys::file_id::FileId;
use crate::sys::macos::kqueue::Kqueue;
use crate::sys::macos::{procargs, process_entry, sysctl};
use crate::sys::poll;
use crate::sys::wait::{self, Ended};

/// Returns false: macOS gives every orphan to launchd, so the other signs must prove that the process tree has ended:
/// the lifeline, and what identifies a process of the tree (`cleanup::process_tree`).
pub(crate) fn become_subreaper() -> bool {
    false
}

/// Makes sure that no core file is written when a signal kills this process (RLIMIT_CORE, setrlimit(2)).
pub(crate) fn disable_core_dumps() {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `none` is a complete rlimit.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
}

/// A process that can be waited for and signalled, although it is not a child of this process. The descriptor becomes
/// readable when the process has exited. A forked process cannot use the handle (kqueue(2)).
#[derive(Debug)]
pub(crate) struct ProcessHandle {
    pid: Pid,
    /// Gets the exit of the process. Nothing takes it from the queue, so the descriptor stays readable. The exit is
    /// reported shortly before the process is a zombie (`proc_exit`, bsd/kern/kern_exit.c of xnu).
    exit: Kqueue,
    /// Gets the exit of the process with its status, which can be taken once. `None` if this process may not know it.
    status: Option<Kqueue>,
    /// The status that was taken from `status`.
    known: OnceCell<i32>,
}

/// Whether another program can inherit a [`ProcessHandle`]. A kqueue is closed in a forked process (kqueue(2);
/// `fdt_fork`, bsd/kern/kern_descrip.c of xnu).
pub(crate) const HANDLE_IS_INHERITED: bool = false;

impl From<ProcessHandle> for OwnedFd {
    fn from(handle: ProcessHandle) -> Self {
        handle.exit.into()
    }
}

impl ProcessHandle {
    /// Opens the process `pid`.
    ///
    /// # Errors
    /// ESRCH when there is no such process, or when it has exited, even if it was not reaped. The error of kqueue(2).
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        let exit = Kqueue::new()?;
        exit.await_exit(pid)?;
        let status = Kqueue::new().and_then(|queue| queue.await_status(pid).map(|()| queue)).ok();
        Ok(Self { pid, exit, status, known: OnceCell::new() })
    }

    /// Returns another handle of the same process.
    ///
    /// # Errors
    /// As [`ProcessHandle::open`].
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let clone = Self::open(self.pid)?;
        // As long as the process of this handle has not exited, its pid belongs to no other process.
        if self.has_exited() { Err(io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(clone) }
    }

    /// Whether the process has exited. It may be a zombie.
    pub(crate) fn has_exited(&self) -> bool {
        poll::ready_now(self.exit.as_fd(), PollFlags::POLLIN)
    }

    /// Sends `signal` to the process group of the process.
    ///
    /// # Errors
    /// Always `Unsupported`: nothing would prevent that the signal reaches a later group with the same number.
    pub(crate) fn signal_group(&self, signal: Signal) -> io::Result<()> {
        let _ = (self, signal);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Sends `signal` to the process, unless it has exited.
    ///
    /// macOS before 14 has no public call that signals a process by more than its pid (later ones have
    /// `proc_signal_with_audittoken`, libproc.h, which this program could only look up at run time). If the process
    /// exits and is reaped between the check and kill(2), and if another process gets its pid in that time, then that
    /// process gets the signal. The kernel gives out all other pids, nearly 100,000, before it gives out the same pid
    /// again (`forkproc`, bsd/kern/kern_fork.c of xnu).
    ///
    /// # Errors
    /// ESRCH when the process has exited, EPERM when this process may not signal it.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        if self.has_exited() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(nix::sys::signal::kill(self.pid, signal)?)
    }

    /// Returns how the process ended (NOTE_EXITSTATUS, kqueue(2)). `None` if it is still running, or if this process
    /// may not kill it, and so may not know its status.
    pub(crate) fn end_of(&self, _pid: Pid) -> Option<Ended> {
        if self.known.get().is_none()
            && let Some(status) = self.status.as_ref()?.next(false)?.status
        {
            let _ = self.known.set(status);
        }
        self.known.get().map(|status| wait::ended_with(*status))
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.exit.as_fd()
    }
}

/// Returns whether libproc can be used to find processes. A sandbox may forbid that.
pub(crate) fn list() -> ProcessList {
    let is_listed = pids().contains(&getpid()) && description(getpid()).is_some();
    if is_listed { ProcessList::Available } else { ProcessList::Unsupported }
}

/// Returns the number 0, and true: all processes of the machine have one set of pids, and every process can see them.
#[expect(clippy::unnecessary_wraps, reason = "Linux may not show the namespace")]
pub(crate) fn pid_namespace() -> Option<(u64, bool)> {
    Some((0, true))
}

/// Returns the pids of all processes, zombies among them (`proc_listallpids`, libproc.h). Empty if they cannot be
/// listed.
fn pids() -> Vec<Pid> {
    // SAFETY: with a null pointer, the call returns a number of pids that is larger than the number of processes.
    let count = unsafe { libc::proc_listallpids(std::ptr::null_mut(), 0) };
    let mut numbers = vec![0i32; usize::try_from(count).unwrap_or(0) + SPARE_PIDS];
    let bytes = i32::try_from(numbers.len() * size_of::<i32>()).unwrap_or(0);
    // SAFETY: the call writes at most `bytes` bytes.
    let listed = unsafe { libc::proc_listallpids(numbers.as_mut_ptr().cast(), bytes) };
    let listed = if listed > 0 { Ok(listed) } else { Err(io::Error::last_os_error()) };
    numbers.truncate(counted(listed).ok().and_then(|listed| usize::try_from(listed).ok()).unwrap_or(0));
    numbers.into_iter().filter(|pid| *pid > 0).map(Pid::from_raw).collect()
}

/// How many processes may start between the two calls of [`pids`].
const SPARE_PIDS: usize = 256;

/// Calls `proc_pidinfo` (libproc.h), which fills a value of the type `T`. `None` if it fails, for example because the
/// process belongs to another user.
///
/// # Safety
/// `T` must be the type that belongs to `flavor` in sys/proc_info.h, and all zeros must be a valid `T`.
unsafe fn pidinfo<T>(pid: Pid, flavor: libc::c_int, argument: u64) -> Option<T> {
    let size = i32::try_from(size_of::<T>()).ok()?;
    // SAFETY: a zeroed `T` is valid (a condition for the caller), and the call writes at most its size.
    unsafe {
        let mut value: T = std::mem::zeroed();
        let written = libc::proc_pidinfo(pid.as_raw(), flavor, argument, (&raw mut value).cast(), size);
        (written == size).then_some(value)
    }
}

/// Makes `PROC_PIDTBSDINFO` and `PROC_PIDT_SHORTBSDINFO` find zombies too (`proc_pidinfo`, bsd/kern/proc_info.c of
/// xnu).
const ZOMBIES_TOO: u64 = 1;

/// What libproc says about a process.
struct Description {
    parent: u32,
    group: u32,
    status: u32,
    flags: u32,
    name: String,
    /// The real, the effective and the saved user.
    users: [u32; 3],
    start: u64,
}

/// Describes the process `pid`. `None` if there is no such process.
fn description(pid: Pid) -> Option<Description> {
    // SAFETY: this is the type of PROC_PIDTBSDINFO, and all its fields are numbers.
    if let Some(info) = unsafe { pidinfo::<libc::proc_bsdinfo>(pid, libc::PROC_PIDTBSDINFO, ZOMBIES_TOO) } {
        return Some(Description {
            parent: info.pbi_ppid,
            group: info.pbi_pgid,
            status: info.pbi_status,
            flags: info.pbi_flags,
            name: text(&info.pbi_comm),
            users: [info.pbi_ruid, info.pbi_uid, info.pbi_svuid],
            start: process_entry::start(info.pbi_start_tvsec, info.pbi_start_tvusec),
        });
    }
    // Of another user's process, libproc gives a shorter description, without the start. ps(1) reads the start by
    // KERN_PROC.
    // SAFETY: this is the type of PROC_PIDT_SHORTBSDINFO, and all its fields are numbers.
    let info = unsafe { pidinfo::<libc::proc_bsdshortinfo>(pid, libc::PROC_PIDT_SHORTBSDINFO, ZOMBIES_TOO) }?;
    let entry = sysctl::process_entry(pid.as_raw());
    Some(Description {
        parent: info.pbsi_ppid,
        group: info.pbsi_pgid,
        status: info.pbsi_status,
        flags: info.pbsi_flags,
        name: text(&info.pbsi_comm),
        users: [info.pbsi_ruid, info.pbsi_uid, info.pbsi_svuid],
        start: process_entry::time_in_timeval(&entry.unwrap_or_default()),
    })
}

/// Returns the text in a field that is filled with zeros.
fn text(field: &[libc::c_char]) -> String {
    let bytes: Vec<u8> = field.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn number(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed())
}

/// Returns the path of the program that the process `pid` executes (`proc_pidpath`, libproc.h). `None` if there is no
/// such process, if it is a zombie, or if its program was deleted.
fn program_path(pid: Pid) -> Option<PathBuf> {
    let mut path = vec![0u8; usize::try_from(libc::PROC_PIDPATHINFO_MAXSIZE).ok()?];
    let size = u32::try_from(path.len()).ok()?;
    // SAFETY: the call writes at most `size` bytes.
    let length = unsafe { libc::proc_pidpath(pid.as_raw(), path.as_mut_ptr().cast(), size) };
    path.truncate(usize::try_from(length).ok().filter(|length| *length > 0)?);
    Some(PathBuf::from(OsStr::from_bytes(&path)))
}

impl Process {
    pub(super) fn read(pid: Pid) -> Option<Self> {
        let found = description(pid)?;
        Some(Self {
            pid,
            thread: pid,
            name: found.name,
            state: process_entry::state(found.status),
            parent: number(found.parent),
            group: number(found.group),
            // Every process may ask for the session of any other (getsid(2)), but a zombie has none.
            session: nix::unistd::getsid(Some(pid)).unwrap_or(Pid::from_raw(0)),
            start: found.start,
        })
    }

    /// Returns every process that libproc lists.
    pub(super) fn list_all() -> Vec<Self> {
        pids().into_iter().filter_map(Self::read).collect()
    }

    pub(super) fn listed_children(parent: Pid) -> Vec<Self> {
        Self::list_all().into_iter().filter(|process| process.parent == parent).collect()
    }

    /// Returns whether the process is dead or certain to die, because it is exiting (`PROC_FLAG_INEXIT`,
    /// sys/proc_info.h). Also true if the process no longer exists.
    pub(crate) fn is_dying(&self) -> bool {
        const INEXIT: u32 = 4;
        match description(self.pid) {
            Some(now) if now.start == self.start => now.flags & INEXIT != 0 || process_entry::state(now.status) == 'Z',
            // Another process has its pid now.
            Some(_) => true,
            // It no longer exists, or this process may not read what it is.
            None => nix::sys::signal::kill(self.pid, None) == Err(nix::errno::Errno::ESRCH),
        }
    }

    /// Returns when the process started. `None` if it is unknown.
    pub(crate) fn started(&self, _boot_time: jiff::Timestamp) -> Option<jiff::Timestamp> {
        let microseconds = i64::try_from(self.start).ok().filter(|start| *start > 0)?;
        jiff::Timestamp::from_microsecond(microseconds).ok()
    }

    /// Returns the value of the variable `name` in the environment with which the process was started.
    pub(crate) fn environment(&self, name: &str) -> Variable {
        let bytes = sysctl::arguments(self.pid.as_raw()).unwrap_or_default();
        procargs::environment(&bytes).map_or(Variable::Unreadable, |entries| Variable::among(entries, name))
    }

    /// Returns false: macOS has no pid namespaces.
    pub(crate) fn may_be_in(&self, namespace: u64) -> bool {
        let _ = (self, namespace);
        false
    }

    /// Returns whether the process executes a program of `bytes` or more. Returns false if this process may not read
    /// which program it executes.
    pub(crate) fn has_large_program(&self, bytes: u64) -> bool {
        let program = program_path(self.pid).and_then(|path| std::fs::metadata(path).ok());
        program.is_some_and(|program| program.len() >= bytes)
    }

    /// Returns whether the process may be a terraform under another name: its program has `large` bytes or more, and
    /// its working directory contains `.terraform` (`PROC_PIDVNODEPATHINFO`, sys/proc_info.h).
    pub(crate) fn may_be_renamed_terraform(&self, large: u64) -> bool {
        if !self.has_large_program(large) {
            return false;
        }
        // SAFETY: this is the type of PROC_PIDVNODEPATHINFO, and all its fields are numbers.
        let paths = unsafe { pidinfo::<libc::proc_vnodepathinfo>(self.pid, libc::PROC_PIDVNODEPATHINFO, 0) };
        paths.is_some_and(|paths| {
            let bytes: Vec<u8> = paths.pvi_cdir.vip_path.iter().flatten().map(|byte| byte.cast_unsigned()).collect();
            let directory =
                CStr::from_bytes_until_nul(&bytes).map(|path| Path::new(OsStr::from_bytes(path.to_bytes())));
            // The path is empty if the kernel cannot tell it (bsd/kern/proc_info.c of xnu).
            directory.is_ok_and(|directory| directory.is_absolute() && directory.join(".terraform").exists())
        })
    }

    /// Returns whether all user IDs of the process (real, effective, saved) are the effective one of this process, so
    /// that a signal of this process's user reaches it. False if they cannot be read.
    pub(crate) fn has_our_user(&self) -> bool {
        let own = nix::unistd::geteuid().as_raw();
        description(self.pid).is_some_and(|found| found.users == [own; 3])
    }

    /// Returns whether the process executes the same program as this process. `None` if this process may not read which
    /// program the other process executes.
    pub(crate) fn runs_our_program(&self) -> Option<bool> {
        let program = |pid| FileId::at(program_path(pid)?).ok();
        program(self.pid).map(|theirs| Some(theirs) == program(getpid()))
    }

    /// Returns the name that the process has given itself ([`crate::sys::session::name_this_process`]): the name of one
    /// of its threads that begins with `tf-`. Empty if there is none. macOS has no name of a process that the process
    /// can set.
    pub(super) fn own_name(&self) -> Cow<'_, str> {
        /// The handles of the threads of a process, 64 bits each (sys/proc_info.h).
        const PROC_PIDLISTTHREADS: libc::c_int = 6;
        const MAX_THREADS: usize = 64;
        let mut handles = [0u64; MAX_THREADS];
        let size = i32::try_from(size_of_val(&handles)).unwrap_or(0);
        // SAFETY: the call writes at most `size` bytes.
        let written =
            unsafe { libc::proc_pidinfo(self.pid.as_raw(), PROC_PIDLISTTHREADS, 0, handles.as_mut_ptr().cast(), size) };
        let count = usize::try_from(written).unwrap_or(0) / size_of::<u64>();
        let names = handles.iter().take(count).filter_map(|handle| {
            // SAFETY: this is the type of PROC_PIDTHREADINFO, and all its fields are numbers.
            let info = unsafe { pidinfo::<libc::proc_threadinfo>(self.pid, libc::PROC_PIDTHREADINFO, *handle) }?;
            Some(text(&info.pth_name))
        });
        Cow::Owned(names.into_iter().find(|name| name.starts_with("tf-")).unwrap_or_default())
    }

    /// Returns whether the process has the file open (`PROC_PIDLISTFDS` and `PROC_PIDFDVNODEINFO`, sys/proc_info.h).
    /// Returns false if this process may not read the list of the other process's descriptors.
    pub(crate) fn has_open(&self, file: FileId) -> bool {
        descriptors(self.pid).into_iter().any(|number| opened(self.pid, number) == Some(file))
    }

    /// Returns the file name of the program that the process executes. If the file name cannot be read, returns the
    /// name of the process instead.
    pub(crate) fn program(&self) -> String {
        program_path(self.pid)
            .and_then(|path| Some(String::from_utf8_lossy(path.file_name()?.as_bytes()).into_owned()))
            .unwrap_or_else(|| self.name.clone())
    }
}

/// Returns the numbers of the descriptors of the process `pid` that are files. Empty if this process may not read them.
fn descriptors(pid: Pid) -> Vec<i32> {
    /// Descriptors that the process may open between the two calls.
    const SPARE: usize = 32;
    let entry = size_of::<libc::proc_fdinfo>();
    // SAFETY: with a null pointer, the call returns the number of bytes that all descriptors need.
    let bytes = unsafe { libc::proc_pidinfo(pid.as_raw(), libc::PROC_PIDLISTFDS, 0, std::ptr::null_mut(), 0) };
    let Some(count) = usize::try_from(bytes).ok().filter(|bytes| *bytes > 0).map(|bytes| bytes / entry) else {
        return Vec::new();
    };
    let mut entries = vec![libc::proc_fdinfo { proc_fd: 0, proc_fdtype: 0 }; count + SPARE];
    let size = i32::try_from(entries.len() * entry).unwrap_or(0);
    // SAFETY: the call writes at most `size` bytes, which are whole entries.
    let written =
        unsafe { libc::proc_pidinfo(pid.as_raw(), libc::PROC_PIDLISTFDS, 0, entries.as_mut_ptr().cast(), size) };
    entries.truncate(usize::try_from(written).unwrap_or(0) / entry);
    let is_file = |entry: &libc::proc_fdinfo| i32::try_from(entry.proc_fdtype) == Ok(libc::PROX_FDTYPE_VNODE);
    entries.iter().filter(|entry| is_file(entry)).map(|entry| entry.proc_fd).collect()
}

/// Returns the file that the process `pid` has open as descriptor `number`. `None` if that cannot be read.
fn opened(pid: Pid, number: i32) -> Option<FileId> {
    /// sys/proc_info.h.
    const PROC_PIDFDVNODEINFO: libc::c_int = 1;
    let mut bytes = [0u8; process_entry::VNODE_FDINFO_BYTES];
    let size = i32::try_from(bytes.len()).ok()?;
    // SAFETY: the call writes at most `size` bytes.
    let written =
        unsafe { libc::proc_pidfdinfo(pid.as_raw(), number, PROC_PIDFDVNODEINFO, bytes.as_mut_ptr().cast(), size) };
    let (device, inode) = process_entry::file_in_vnode_fdinfo(&bytes);
    (written == size).then(|| FileId::of_numbers(device, inode))
}

/// Whether the clock that gives [`Process::start`] can be set. A process may then seem to be older than its parent.
pub(crate) const START_CLOCK_CAN_BE_SET: bool = true;

/// Returns the current time in the unit of [`Process::start`]: in microseconds since 1970. The kernel takes the start
/// of a process from the same clock (`p_start`, bsd/kern/kern_fork.c of xnu).
pub(crate) fn start_clock() -> Option<u64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(process_entry::start(now.as_secs(), u64::from(now.subsec_micros())))
}

/// Returns when this machine booted, according to the current setting of its clock (`kern.boottime`, sysctl(3)). `None`
/// if the boot time cannot be read.
pub(crate) fn boot_time() -> Option<jiff::Timestamp> {
    let start = process_entry::time_in_timeval(&sysctl::by_name(c"kern.boottime")?);
    jiff::Timestamp::from_microsecond(i64::try_from(start).ok().filter(|start| *start > 0)?).ok()
}

/// Returns true: macOS has no control groups. launchd ends a service by a signal to one process or to its group, and
/// the guardian has a session of its own. So a SIGTERM of process 1 to the guardian is part of a shutdown. Then every
/// process gets one that has a handler for it, also terraform (`proc_shutdown`, bsd/kern/kern_shutdown.c of xnu).
pub(crate) fn is_in_own_control_group(pid: Pid) -> bool {
    let _ = pid;
    true
}

/// Returns the children of this process. Empty if they cannot be listed.
pub(crate) fn own_children() -> Vec<Pid> {
    Process::listed_children(getpid()).into_iter().map(|child| child.pid).collect()
}

/// Returns `None`: macOS does not count the processes that it has killed because memory ran out.
pub(crate) fn out_of_memory_kills() -> Option<u64> {
    None
}
