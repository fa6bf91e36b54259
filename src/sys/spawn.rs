//! clone(2) or fork(2), and execve(2), to start terraform.
//!
//! `std::process::Command` cannot do what is needed between the two calls: join a process group, *then* discard the
//! signals that are already pending for the child, with every signal blocked until then. Without this, a ^C between
//! fork and setpgid reaches the child twice: as a member of the group of `tf`, and again when `tf` passes it on.
//!
//! On Linux the child uses the memory of this process until execve(2), as posix_spawn(3) does it. A copy of the address
//! space would cost more than everything else that starts terraform.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::Pid;

use super::{descriptor, disposition, entry};

/// A program, its arguments and its environment, in the form that execve(2) takes.
///
/// Everything is allocated here, before the fork, because nothing may allocate between fork and exec
/// (signal-safety(7)).
pub(crate) struct Image {
    path: CString,
    // The pointers of `argv` and `envp` point into these.
    _arguments: Vec<CString>,
    _environment: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
}

impl Image {
    /// Creates the image of the program at `path`. `arguments` begins with the name of the program (argv\[0\]).
    ///
    /// # Errors
    /// `InvalidInput` when a string contains a zero byte. A string that this process received by exec cannot contain
    /// one.
    pub(crate) fn new<'a>(
        path: &Path,
        arguments: impl IntoIterator<Item = &'a OsStr>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let arguments =
            arguments.into_iter().map(|argument| CString::new(argument.as_bytes())).collect::<Result<Vec<_>, _>>()?;
        let environment = environment
            .into_iter()
            .map(|(name, value)| {
                let mut entry = name.into_vec();
                entry.push(b'=');
                entry.extend_from_slice(value.as_bytes());
                CString::new(entry)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let argv = pointers(&arguments);
        let envp = pointers(&environment);
        Ok(Self { path, _arguments: arguments, _environment: environment, argv, envp })
    }

    /// Replaces this process with the program. Returns only if that fails, with the error of execve(2).
    pub(crate) fn exec(&self) -> io::Error {
        restore_entry();
        // SAFETY: path, argv and envp are zero-terminated and live as long as `self`.
        unsafe { libc::execve(self.path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
        io::Error::last_os_error()
    }
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Restores what Rust's runtime changed before `main`: the disposition of SIGPIPE, and closed standard descriptors.
/// Async-signal-safe.
fn restore_entry() {
    if entry::sigpipe_ignored() {
        disposition::set_ignored(Signal::SIGPIPE);
    } else {
        disposition::set_default(Signal::SIGPIPE);
    }
    for descriptor in entry::closed_standard_descriptors() {
        // SAFETY: the runtime opened /dev/null there. Nothing uses it in a process that is about to exec.
        unsafe { libc::close(descriptor) };
    }
}

/// How the child is set up before it becomes the program.
pub(crate) struct Setup<'a> {
    /// Whether the child gets a process group of its own. Otherwise it stays in the group of this process.
    pub(crate) own_group: bool,
    /// What becomes descriptor 1 and descriptor 2 of the child. `None` where it inherits that of this process.
    pub(crate) redirect: [Option<BorrowedFd<'a>>; 2],
    /// The signal mask that the child gets.
    pub(crate) mask: &'a SigSet,
    /// The signals that the child must ignore, because this process ignored them when it started.
    pub(crate) ignored: &'a [Signal],
    /// A socket, and the bytes that the child writes into it before exec, followed by its own pid in 4 bytes. So the
    /// process that reads the socket knows of the child before anything can happen to this process. Of the bytes, at
    /// most 12 are written.
    pub(crate) announce: Option<(BorrowedFd<'a>, &'a [u8])>,
}

/// Signals that a terminal or a group kill may have sent to the group of this process while the child was still in it.
/// Ignoring a signal discards it.
const STRAY: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGCONT];

/// Starts `image` as a child process and returns its pid. There must be one thread.
///
/// # Errors
/// When no pipe can be created, or with the error of fork(2) or execve(2): `NotFound`, `PermissionDenied`, ENOEXEC...
pub(crate) fn spawn(image: &Image, setup: &Setup<'_>) -> io::Result<Pid> {
    let (report, reporter) = descriptor::pipe()?;
    let blocked = AllBlocked::now()?;
    let pid = start_child(&Child { image, setup, reporter: reporter.as_raw_fd() })?;
    drop((reporter, blocked));
    if setup.own_group {
        // The parent and the child both call setpgid, so that the group exists whichever of them continues first.
        // SAFETY: setpgid on a child of this process. If the child has already called exec, this fails with EACCES,
        // which is harmless.
        unsafe { libc::setpgid(pid.as_raw(), pid.as_raw()) };
    }
    match exec_error(&report) {
        None => Ok(pid),
        Some(error) => {
            let _ = nix::sys::wait::waitpid(pid, None);
            Err(error)
        }
    }
}

/// What the child needs to become the program.
struct Child<'a> {
    image: &'a Image,
    setup: &'a Setup<'a>,
    /// Where the child writes the error of execve(2).
    reporter: RawFd,
}

/// Starts the child, which shares the memory of this process, and waits until it has called execve(2) or has exited
/// (`CLONE_VM` and `CLONE_VFORK`, clone(2)). It has descriptors, signal dispositions and a signal mask of its own.
///
/// Three things could go wrong in shared memory, and none of them does:
///
/// - The child writes only to its own stack and to `errno`, and this process reads neither while it waits.
/// - No signal handler of `tf` can run in the child: every signal is blocked until right before execve(2), and `tf`
///   handles none but SIGSEGV and SIGBUS, which end a process that has a fault.
/// - If this process is killed meanwhile, its memory exists until the child no longer uses it. So the child still
///   becomes terraform, and the guardian learns its pid.
///
/// While this process waits, it cannot be stopped, and SIGKILL alone ends it. It waits for some system calls of the
/// child, and for as long as the child is stopped, if somebody sends SIGSTOP to it.
///
/// # Errors
/// The error of clone(2): `EAGAIN` when there may be no more processes.
#[cfg(target_os = "linux")]
fn start_child(child: &Child<'_>) -> io::Result<Pid> {
    /// The size of the child's stack, in units of 16 bytes, which is also its alignment. The child needs less than 1
    /// KiB of these 64 KiB, and a debug build not much more.
    const STACK: usize = 4096;

    extern "C" fn run(child: *mut libc::c_void) -> libc::c_int {
        // SAFETY: this is the `child` of `start_child`, which waits.
        become_program(unsafe { &*child.cast::<Child<'_>>() })
    }

    let mut stack: Vec<u128> = Vec::with_capacity(STACK);
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the stack grows down from `top`, and it lives until the child no longer uses it, because this process
    // waits for that. There is one thread (asserted by the caller), so no lock of the C library is held. What the child
    // does is described above.
    let pid = unsafe { libc::clone(run, top.cast(), flags, std::ptr::from_ref(child).cast_mut().cast()) };
    if pid == -1 { Err(io::Error::last_os_error()) } else { Ok(Pid::from_raw(pid)) }
}

/// Starts the child as a copy of this process.
///
/// # Errors
/// The error of fork(2): `EAGAIN` when there may be no more processes.
#[cfg(not(target_os = "linux"))]
fn start_child(child: &Child<'_>) -> io::Result<Pid> {
    // SAFETY: there is one thread (asserted by the caller), and the child calls only async-signal-safe functions.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => become_program(child),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Keeps every signal blocked until this is dropped in the parent. A forked child inherits that mask, and sets another
/// one if it needs one.
pub(super) struct AllBlocked(SigSet);

impl AllBlocked {
    pub(super) fn now() -> io::Result<Self> {
        let mut before = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
        Ok(Self(before))
    }
}

impl Drop for AllBlocked {
    fn drop(&mut self) {
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.0), None);
    }
}

fn become_program(&Child { image, setup, reporter }: &Child<'_>) -> ! {
    // SAFETY: only async-signal-safe calls on memory that was prepared before the fork (signal-safety(7)).
    unsafe {
        if setup.own_group {
            libc::setpgid(0, 0);
        }
        for signal in STRAY {
            disposition::set_ignored(signal);
            disposition::set_default(signal);
        }
        for signal in setup.ignored {
            disposition::set_ignored(*signal);
        }
        restore_entry();
        if let Some((socket, prefix)) = &setup.announce {
            let mut message = [0u8; 16];
            let pid = libc::getpid().to_ne_bytes();
            let length = prefix.len().min(message.len() - pid.len());
            message[..length].copy_from_slice(&prefix[..length]);
            message[length..length + pid.len()].copy_from_slice(&pid);
            libc::write(socket.as_raw_fd(), message.as_ptr().cast(), length + pid.len());
        }
        for (target, source) in (1..).zip(setup.redirect) {
            if let Some(source) = source {
                libc::dup2(source.as_raw_fd(), target);
            }
        }
        libc::sigprocmask(libc::SIG_SETMASK, setup.mask.as_ref(), std::ptr::null_mut());
        libc::execve(image.path.as_ptr(), image.argv.as_ptr(), image.envp.as_ptr());
        let error = *super::errno::location();
        libc::write(reporter, (&raw const error).cast(), size_of::<i32>());
        libc::_exit(127)
    }
}

/// Waits until the child has become the program, which closes the pipe, or has reported why it could not. `None` if it
/// has reported no error.
fn exec_error(report: &OwnedFd) -> Option<io::Error> {
    let mut number = [0; size_of::<i32>()];
    match nix::unistd::read(report, &mut number) {
        Ok(length) if length == number.len() => Some(io::Error::from_raw_os_error(i32::from_ne_bytes(number))),
        _ => None,
    }
}
