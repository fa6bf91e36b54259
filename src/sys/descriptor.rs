//! File descriptors: pipes, copies at a high number, moving bytes from one to another without waiting.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A pipe, closed on exec: (read end, write end).
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

/// A copy of `descriptor` with a high number, which programs that we start inherit.
///
/// High, because scripts use low numbers as they like: `exec 9>lock` and `200>lock` are idioms, and would close ours.
/// Where fewer than 512 descriptors are allowed (RLIMIT_NOFILE) the number is as high as it can be.
pub(crate) fn inheritable_high(descriptor: &impl AsFd) -> io::Result<OwnedFd> {
    let mut lowest = 512;
    loop {
        // SAFETY: F_DUPFD on an open descriptor makes a new one, which is ours alone.
        let copy = unsafe { libc::fcntl(descriptor.as_fd().as_raw_fd(), libc::F_DUPFD, lowest) };
        if copy >= 0 {
            // SAFETY: just made.
            return Ok(unsafe { OwnedFd::from_raw_fd(copy) });
        }
        if lowest < 16 {
            return Err(io::Error::last_os_error());
        }
        lowest /= 2;
    }
}

/// Descriptor `number` of this process: 0, 1 or 2, which stay open all our life (Rust's runtime opens what is closed).
pub(crate) fn standard(number: RawFd) -> BorrowedFd<'static> {
    debug_assert!((0..3).contains(&number));
    // SAFETY: see above; nothing of ours closes 0, 1 or 2.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Which file it is: its device and its number there.
pub(crate) fn identity(descriptor: BorrowedFd<'_>) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::File::from(descriptor.try_clone_to_owned().ok()?).metadata().ok()?;
    Some((file.dev(), file.ino()))
}

/// How far a move of bytes went.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// So many bytes went over.
    Bytes(usize),
    /// Everybody who could write has closed the source.
    EndOfSource,
    /// One of the two is not ready.
    NotReady,
}

/// Moves what is in the pipe `from` into the pipe `to`, without waiting on either.
///
/// SPLICE_F_NONBLOCK says so for this call alone. O_NONBLOCK would say so for the open file, which we share with
/// whoever started us.
///
/// # Errors
/// EPIPE when `to` has no reader left; EINVAL when one of the two is no pipe.
#[cfg(target_os = "linux")]
pub(crate) fn move_pipe_to_pipe(from: &impl AsFd, to: &impl AsFd) -> io::Result<Moved> {
    // SAFETY: two open descriptors, no offsets.
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

/// Sends bytes to a socket without waiting. The answer is never `EndOfSource` unless `bytes` is empty.
///
/// # Errors
/// EPIPE or ECONNRESET when nobody reads the other end.
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
