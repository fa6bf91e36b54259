//! Starts terraform with clone(2) or fork(2), and execve(2).
//!
//! `std::process::Command` cannot do two necessary things between the two calls, with every signal blocked: join a
//! process group, and after that discard the signals that are already pending for the child. Without this, a ^C between
//! fork and setpgid reaches the child twice: once as a member of the group of `tf`, and once when `tf` passes it on.
//!
//! On Linux the child uses the memory of this process until execve(2), as with posix_spawn(3). A copy of the address
//! space would cost more time than all other steps of starting terraform.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::Pid;

use super::{descriptor, disposition, entry};

/// A program, its arguments and its environment, in the form that execve(2) requires.
///
/// All memory is allocated here, before the fork, because no allocation is allowed between fork and exec
/// (signal-safety(7)).
pub(crate) struct Image {
    path: CString,
    // The pointers in `argv` and `envp` point into these two lists.
    _arguments: Vec<CString>,
    _environment: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
}

impl Image {
    /// Creates the image of the program at `path`. `arguments` begins with the name of the program (argv\[0\]).
    ///
    /// # Errors
    /// `InvalidInput` if a string contains a zero byte. This cannot happen with a string that this process received by
    /// exec.
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

    /// Replaces this process with the program. Returns only if this fails, with the error of execve(2).
    pub(crate) fn exec(&self) -> io::Error {
        restore_entry();
        // SAFETY: path, argv and envp are zero-terminated and valid as long as `self`.
        unsafe { libc::execve(self.path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
        io::Error::last_os_error()
    }
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Restores the state that Rust's runtime changed before `main`: the disposition of SIGPIPE, and the closed standard
/// descriptors. This function is async-signal-safe.
fn restore_entry() {
    if entry::sigpipe_ignored() {
        disposition::set_ignored(Signal::SIGPIPE);
    } else {
        disposition::set_default(Signal::SIGPIPE);
    }
    for descriptor in entry::closed_standard_descriptors() {
        // SAFETY: the runtime opened /dev/null as this descriptor. A process that is about to exec does not use it.
        unsafe { libc::close(descriptor) };
    }
}

/// The settings for the child, which are applied before it becomes the program.
pub(crate) struct Setup<'a> {
    /// Whether the child is in a new process group. If not, it remains in the group of this process.
    pub(crate) own_group: bool,
    /// The new descriptors 1 and 2 of the child. For `None`, the child inherits the descriptor of this process.
    pub(crate) redirect: [Option<BorrowedFd<'a>>; 2],
    /// The child's signal mask.
    pub(crate) mask: &'a SigSet,
    /// The signals that the child must ignore, because they were ignored at the start of this process.
    pub(crate) ignored: &'a [Signal],
    /// A socket, and the bytes that the child writes into it before exec. The child appends its own pid, in 4 bytes. So
    /// the process that reads the socket learns the pid even if this process is killed right after the start. At most
    /// 12 of the bytes are written.
    pub(crate) announce: Option<(BorrowedFd<'a>, &'a [u8])>,
}

/// The signals that a terminal or a kill of the whole group may have sent to the child while it was still in the group
/// of this process. The child ignores each of them once, which discards a pending signal.
const STRAY: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGCONT];

/// Starts `image` as a child process and returns its pid. This process must have one thread.
///
/// # Errors
/// An error if no pipe can be created, or the error of fork(2) or execve(2): `NotFound`, `PermissionDenied`, ENOEXEC...
pub(crate) fn spawn(image: &Image, setup: &Setup<'_>) -> io::Result<Pid> {
    let (report, reporter) = descriptor::pipe()?;
    let blocked = AllBlocked::now()?;
    let pid = start_child(&Child { image, setup, reporter: reporter.as_raw_fd() })?;
    drop((reporter, blocked));
    if setup.own_group {
        // Both the parent and the child call setpgid, so that the group exists, whichever of the two continues first.
        // SAFETY: this is setpgid for a child of this process. If the child has already called exec, the call fails
        // with EACCES, which has no consequences.
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

/// The data that the child needs to become the program.
struct Child<'a> {
    image: &'a Image,
    setup: &'a Setup<'a>,
    /// The descriptor into which the child writes the error of execve(2).
    reporter: RawFd,
}

/// Starts the child, which shares the memory of this process, and waits until the child has called execve(2) or has
/// exited (`CLONE_VM` and `CLONE_VFORK`, clone(2)). The child has its own descriptors, signal dispositions and signal
/// mask.
///
/// Shared memory is safe here, for three reasons:
///
/// - The child writes only to its own stack and to `errno`. This process reads neither of them while it waits.
/// - No signal handler of `tf` can run in the child. Every signal is blocked until right before execve(2). `tf` has
///   handlers only for SIGSEGV and SIGBUS. If the child causes a fault while these two are blocked, the kernel kills
///   the child without calling the handler.
/// - If this process is killed while it waits, its memory exists until the child no longer uses it. So the child still
///   becomes terraform, and the guardian learns its pid.
///
/// While this process waits, it cannot be stopped, and only SIGKILL ends it. The wait lasts for a few system calls of
/// the child. If the child is stopped with SIGSTOP, the wait lasts until the child is continued.
///
/// # Errors
/// The error of clone(2): `EAGAIN` if the limit on processes is reached.
#[cfg(target_os = "linux")]
fn start_child(child: &Child<'_>) -> io::Result<Pid> {
    /// The size of the child's stack: 64 KiB, in units of 16 bytes. 16 bytes are also the stack's alignment. The child
    /// needs less than 1 KiB, and only slightly more in a debug build.
    const STACK: usize = 4096;

    extern "C" fn run(child: *mut libc::c_void) -> libc::c_int {
        // SAFETY: the pointer is to the `child` of `start_child`, which waits meanwhile.
        become_program(unsafe { &*child.cast::<Child<'_>>() })
    }

    let mut stack: Vec<u128> = Vec::with_capacity(STACK);
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the stack grows down from `top`. It exists until the child no longer uses it, because this process waits
    // for that. There is one thread (a condition for the caller), so no lock of the C library is held. The comment of
    // this function describes what the child does.
    let pid = unsafe { libc::clone(run, top.cast(), flags, std::ptr::from_ref(child).cast_mut().cast()) };
    if pid == -1 { Err(io::Error::last_os_error()) } else { Ok(Pid::from_raw(pid)) }
}

/// Starts the child as a copy of this process.
///
/// # Errors
/// The error of fork(2): `EAGAIN` if the limit on processes is reached.
#[cfg(not(target_os = "linux"))]
fn start_child(child: &Child<'_>) -> io::Result<Pid> {
    // SAFETY: there is one thread (a condition for the caller), and the child calls only async-signal-safe functions.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => become_program(child),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Blocks every signal until this value is dropped in the parent. A forked child inherits the blocked mask, and must
/// set another mask if it needs one.
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
    // SAFETY: all calls are async-signal-safe, on memory that was prepared before the fork (signal-safety(7)).
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
        if let Some((socket, prefix)) = &setup.announce {
            // If nobody reads the socket, the write must not leave a signal that ends this process before its exec.
            disposition::set_ignored(Signal::SIGPIPE);
            let mut message = [0u8; 16];
            let pid = libc::getpid().to_ne_bytes();
            let length = prefix.len().min(message.len() - pid.len());
            message[..length].copy_from_slice(&prefix[..length]);
            message[length..length + pid.len()].copy_from_slice(&pid);
            libc::write(socket.as_raw_fd(), message.as_ptr().cast(), length + pid.len());
        }
        restore_entry();
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

/// Waits until the child has become the program, which closes the pipe, or has reported its error. `None` if it has
/// reported no error.
fn exec_error(report: &OwnedFd) -> Option<io::Error> {
    let mut number = [0; size_of::<i32>()];
    match nix::unistd::read(report, &mut number) {
        Ok(length) if length == number.len() => Some(io::Error::from_raw_os_error(i32::from_ne_bytes(number))),
        _ => None,
    }
}
