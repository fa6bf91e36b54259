//! File descriptors: pipes, copies with a high number, and the transfer of bytes between descriptors without waiting.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Creates a pipe that is closed on exec. Returns its read end and its write end.
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    #[cfg(target_os = "linux")]
    let ends = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    #[cfg(not(target_os = "linux"))]
    let ends = {
        let ends = nix::unistd::pipe()?;
        for end in [&ends.0, &ends.1] {
            nix::fcntl::fcntl(end, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        }
        ends
    };
    Ok(ends)
}

/// Copies `descriptor` to a high number. Programs that this process starts inherit the copy.
///
/// The number is high because scripts often use low numbers: `exec 9>lock` and `200>lock` are common, and would close
/// the copy. The number is at least 512. If RLIMIT_NOFILE does not allow that, the number is at least 256, or else 128,
/// and so on down to 8.
///
/// # Errors
/// The error of fcntl(2) if every number from 8 up is in use or not allowed.
pub(crate) fn inheritable_high(descriptor: &impl AsFd) -> io::Result<OwnedFd> {
    let mut lowest = 512;
    loop {
        // SAFETY: F_DUPFD on an open descriptor creates a new descriptor, which nothing else owns.
        let copy = unsafe { libc::fcntl(descriptor.as_fd().as_raw_fd(), libc::F_DUPFD, lowest) };
        if copy >= 0 {
            // SAFETY: the descriptor was created above, and nothing else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(copy) });
        }
        if lowest < 16 {
            return Err(io::Error::last_os_error());
        }
        lowest /= 2;
    }
}

/// Makes the program that `command` starts inherit no descriptor except 0, 1 and 2. The caller of this process may have
/// left others open.
pub(crate) fn inherit_only_standard(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure only calls close_range(2) and fcntl(2), which are system calls that do not access the memory of
    // this process.
    unsafe {
        command.pre_exec(|| {
            // Not closed: Command reports the error of exec through one of them.
            #[cfg(target_os = "linux")]
            if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) == 0 {
                return Ok(());
            }
            // This is for Linux before 5.11 and for other systems. Most programs open low numbers only.
            for number in 3..1024 {
                libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC);
            }
            Ok(())
        });
    }
}

/// Makes the program that `command` starts inherit `descriptors`, with their numbers. In this process they stay closed on
/// exec.
pub(crate) fn inherit(command: &mut std::process::Command, descriptors: &[BorrowedFd<'_>]) {
    use std::os::unix::process::CommandExt;
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: the closure only calls fcntl(2), which is async-signal-safe (signal-safety(7)), on memory that was
    // allocated before the fork.
    unsafe {
        command.pre_exec(move || {
            for number in &numbers {
                if libc::fcntl(*number, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

/// Takes the descriptors with these numbers, which this process has inherited. They are closed on exec from now on.
/// `None` if one of them is a standard descriptor or is not open, or if a number occurs twice. Call this once, before
/// this process opens anything.
pub(crate) fn inherited(numbers: &[RawFd]) -> Option<Vec<OwnedFd>> {
    let is_sound = numbers.iter().enumerate().all(|(place, number)| *number > 2 && !numbers[..place].contains(number));
    // SAFETY: F_SETFD fails for a number that is not open, and changes nothing else.
    let is_open = |number: &RawFd| unsafe { libc::fcntl(*number, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
    if !is_sound || !numbers.iter().all(is_open) {
        return None;
    }
    // SAFETY: the descriptors are open, each number occurs once, and nothing else in this process owns them.
    Some(numbers.iter().map(|number| unsafe { OwnedFd::from_raw_fd(*number) }).collect())
}

/// Returns descriptor `number` of this process. `number` must be 0, 1 or 2. These three descriptors are always open,
/// because Rust's runtime opens /dev/null in place of those that were closed at the start.
pub(crate) fn standard(number: RawFd) -> BorrowedFd<'static> {
    debug_assert!((0..3).contains(&number));
    // SAFETY: the descriptor is open, as described above. `tf` closes 0, 1 and 2 only right before exec (`sys::spawn`).
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// The result of a transfer of bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// This many bytes were moved.
    Bytes(usize),
    /// Every writer of the source has closed it.
    EndOfSource,
    /// The source or the destination is not ready, or the call was interrupted.
    NotReady,
}

/// Moves up to 64 KiB from the pipe `from` into the pipe `to`, without waiting for either.
///
/// SPLICE_F_NONBLOCK applies only to this call. O_NONBLOCK would apply to the open file description, which this process
/// shares with the process that has started it.
///
/// # Errors
/// EPIPE if `to` has no reader any more; EINVAL if `from` or `to` is not a pipe.
#[cfg(target_os = "linux")]
pub(crate) fn move_pipe_to_pipe(from: &impl AsFd, to: &impl AsFd) -> io::Result<Moved> {
    // SAFETY: both descriptors are open, and null offsets are allowed.
    let moved = unsafe {
        libc::splice(
            from.as_fd().as_raw_fd(),
            std::ptr::null_mut(),
            to.as_fd().as_raw_fd(),
            std::ptr::null_mut(),
            1 << 16,
            libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE,
        )
    };
    moved_bytes(moved)
}

/// The number of bytes that a pipe accepts completely or not at all (PIPE_BUF, POSIX write). If poll(2) reports that a
/// pipe is writable, it accepts this number of bytes.
pub(crate) const ATOMIC_WRITE_BYTES: usize = libc::PIPE_BUF;

/// Returns how many bytes can be read from a pipe now. 0 if that is unknown.
pub(crate) fn readable_bytes(pipe: &impl AsFd) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the call writes one int.
    let asked = unsafe { libc::ioctl(pipe.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if asked == 0 { usize::try_from(bytes).unwrap_or(0) } else { 0 }
}

/// Writes at most [`ATOMIC_WRITE_BYTES`] bytes into a pipe that poll(2) has reported as writable. Does not wait, even if
/// another process has filled the pipe in the meantime (RWF_NOWAIT, pwritev2(2)). Before Linux 6.4 and on other systems,
/// it waits in that case.
///
/// # Errors
/// EPIPE if the pipe has no reader any more.
pub(crate) fn write_to_pipe(pipe: &impl AsFd, bytes: &[u8]) -> io::Result<Moved> {
    debug_assert!((1..=ATOMIC_WRITE_BYTES).contains(&bytes.len()));
    #[cfg(target_os = "linux")]
    {
        let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: the descriptor is open, and `part` describes readable memory. The offset -1 means that there is none.
        let written = unsafe { libc::pwritev2(pipe.as_fd().as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
        match moved_bytes(written) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {}
            moved => return moved,
        }
    }
    Ok(Moved::Bytes(nix::unistd::write(pipe, bytes)?))
}

/// Sends bytes to a socket without waiting. Returns `EndOfSource` only if `bytes` is empty.
///
/// # Errors
/// EPIPE or ECONNRESET if the other end of the socket is closed.
pub(crate) fn send(socket: &impl AsFd, bytes: &[u8]) -> io::Result<Moved> {
    #[cfg(target_os = "linux")]
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    #[cfg(not(target_os = "linux"))]
    let flags = libc::MSG_DONTWAIT;
    // SAFETY: `bytes` is readable for its length.
    let sent = unsafe { libc::send(socket.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    moved_bytes(sent)
}

fn moved_bytes(result: isize) -> io::Result<Moved> {
    match result {
        0 => Ok(Moved::EndOfSource),
        1.. => Ok(Moved::Bytes(result.cast_unsigned())),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(Moved::NotReady),
            error if error.kind() == io::ErrorKind::Interrupted => Ok(Moved::NotReady),
            error => Err(error),
        },
    }
}
