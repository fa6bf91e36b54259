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
    // SAFETY: the closure only calls close_range(2) and fcntl(2), which are system calls that do not access the memory
    // of this process.
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

/// Makes the program that `command` starts inherit `descriptors`, with their numbers. In this process they stay closed
/// on exec.
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

/// Makes the process that `command` starts close `descriptor` as soon as it was forked, and not only when it calls
/// exec. Call this before other functions that prepare `command`.
pub(crate) fn close_after_fork(command: &mut std::process::Command, descriptor: BorrowedFd<'_>) {
    use std::os::unix::process::CommandExt;
    let number = descriptor.as_raw_fd();
    // SAFETY: the closure only calls close(2), which is async-signal-safe (signal-safety(7)). The child uses the
    // descriptor for nothing, and would close it on exec.
    unsafe {
        command.pre_exec(move || {
            libc::close(number);
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

/// Closes all descriptors from `lowest` up, except those in `keep`, which must be sorted. This process must have one
/// thread.
///
/// # Safety
/// Nothing in this process may use a descriptor that is closed here.
pub(crate) unsafe fn close_from(lowest: RawFd, keep: &[RawFd]) {
    let mut from = lowest;
    for &kept in keep.iter().filter(|kept| **kept >= lowest) {
        // SAFETY: as for this function.
        unsafe { close_between(from, kept) };
        from = kept + 1;
    }
    // SAFETY: as for this function.
    unsafe { close_between(from, RawFd::MAX) };
}

/// The highest number of a descriptor that is closed without a list of the open ones: Linux before 5.9 or another
/// system, and no /proc or /dev/fd. To close each number up to the limit could take minutes.
const MAX_UNLISTED: RawFd = 1 << 16;

/// Closes all descriptors from `from` to `to - 1`.
///
/// # Safety
/// As for [`close_from`].
unsafe fn close_between(from: RawFd, to: RawFd) {
    if from >= to {
        return;
    }
    #[cfg(target_os = "linux")]
    {
        // SAFETY: as for this function.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, from, to - 1, 0) };
        if closed == 0 {
            return;
        }
    }
    // This code is for Linux before 5.9 and for other systems.
    let listed = ["/proc/self/fd", "/dev/fd"].iter().find_map(|directory| std::fs::read_dir(directory).ok());
    let open: Vec<RawFd> = match listed {
        Some(entries) => entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect(),
        None => (from..to.min(MAX_UNLISTED)).collect(),
    };
    for descriptor in open.into_iter().filter(|descriptor| (from..to).contains(descriptor)) {
        // SAFETY: as for this function.
        unsafe { libc::close(descriptor) };
    }
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

/// Whether the system has splice(2), which moves bytes between pipes without a copy.
pub(crate) const HAS_SPLICE: bool = cfg!(target_os = "linux");

/// Moves up to 64 KiB from the pipe `from` into the pipe `to`, without waiting for either.
///
/// SPLICE_F_NONBLOCK applies only to this call. O_NONBLOCK would apply to the open file description, which this process
/// shares with the process that has started it.
///
/// # Errors
/// EPIPE if `to` has no reader any more; EINVAL if `from` or `to` is not a pipe; `Unsupported` without [`HAS_SPLICE`].
pub(crate) fn move_pipe_to_pipe(from: &impl AsFd, to: &impl AsFd) -> io::Result<Moved> {
    #[cfg(target_os = "linux")]
    {
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
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (from, to);
        Err(io::ErrorKind::Unsupported.into())
    }
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

/// Writes as many of `bytes` as a pipe accepts now. poll(2) must have reported the pipe as writable. Does not wait, even
/// if another process has filled the pipe in the meantime (RWF_NOWAIT, pwritev2(2)). Where that is not supported (before
/// Linux 6.4, on other systems, for a pipe with a name, or if a filter of system calls does not know it), it writes at
/// most [`ATOMIC_WRITE_BYTES`] bytes, and waits in that case.
///
/// # Errors
/// EPIPE if the pipe has no reader any more.
pub(crate) fn write_to_pipe(pipe: &impl AsFd, bytes: &[u8]) -> io::Result<Moved> {
    debug_assert!(!bytes.is_empty());
    #[cfg(target_os = "linux")]
    {
        let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: the descriptor is open, and `part` describes readable memory. The offset -1 means that there is none.
        let written = unsafe { libc::pwritev2(pipe.as_fd().as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
        match moved_bytes(written) {
            // Any other error comes again below, unless it is that this call is not supported.
            Err(error) if error.raw_os_error() != Some(libc::EPIPE) => {}
            moved => return moved,
        }
    }
    write(pipe, &bytes[..bytes.len().min(ATOMIC_WRITE_BYTES)])
}

/// Opens a terminal anew, for writes that do not wait. O_NONBLOCK on `terminal` itself would apply to all processes that
/// share it. `None` if it is no terminal, or cannot be opened, for example because it belongs to another user.
pub(crate) fn reopened_terminal(terminal: BorrowedFd<'_>) -> Option<OwnedFd> {
    use std::io::IsTerminal;
    use std::os::unix::fs::OpenOptionsExt;
    if !terminal.is_terminal() {
        return None;
    }
    // In a container, the name of a terminal may be of another mount.
    #[cfg(target_os = "linux")]
    let path = format!("/proc/self/fd/{}", terminal.as_raw_fd());
    #[cfg(not(target_os = "linux"))]
    let path = nix::unistd::ttyname(terminal).ok()?;
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    Some(std::fs::OpenOptions::new().write(true).custom_flags(flags).open(path).ok()?.into())
}

/// Writes bytes (write(2)). Another process may have set O_NONBLOCK for all processes that share the file. Then the
/// result may be `NotReady` although poll(2) has reported the file as writable, for example on a terminal to which another
/// process writes.
///
/// # Errors
/// Those of write(2), except EAGAIN and EINTR.
pub(crate) fn write(to: &impl AsFd, bytes: &[u8]) -> io::Result<Moved> {
    // SAFETY: `bytes` is readable for its length.
    moved_bytes(unsafe { libc::write(to.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) })
}

/// Sends bytes to a socket without waiting (send(2)). Returns `EndOfSource` only if `bytes` is empty. The page of macOS
/// does not document MSG_NOSIGNAL. Rust's runtime ignores SIGPIPE.
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

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use super::*;

    /// A pipe with a name does not support RWF_NOWAIT.
    #[test]
    fn a_write_into_a_full_pipe_that_does_not_block_is_not_ready_and_loses_nothing() {
        use std::io::Read;
        use std::os::unix::fs::OpenOptionsExt;
        let directory = tempfile::tempdir().unwrap();
        let name = directory.path().join("pipe");
        nix::unistd::mkfifo(&name, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let open =
            || std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&name).unwrap();
        for is_long in [false, true] {
            let mut pipe = open();
            let bytes = vec![b'x'; if is_long { 100_000 } else { 100 }];
            let mut sent = 0;
            let end = loop {
                match if is_long { write_to_pipe(&pipe, &bytes) } else { write(&pipe, &bytes) }.unwrap() {
                    Moved::Bytes(length) => sent += length,
                    end => break end,
                }
            };
            assert_eq!(end, Moved::NotReady);
            let mut read = vec![0; sent];
            pipe.read_exact(&mut read).unwrap();
            assert!(read.iter().all(|byte| *byte == b'x') && pipe.read(&mut read).is_err(), "{sent}");
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test has no terraform")]
    fn a_descriptor_is_closed_in_the_child_before_the_rest_is_prepared() {
        let (_read_end, write_end) = pipe().unwrap();
        for closes in [false, true] {
            let mut command = Command::new("true");
            if closes {
                close_after_fork(&mut command, write_end.as_fd());
            }
            let number = write_end.as_raw_fd();
            // SAFETY: the closure only calls fcntl(2), which is async-signal-safe.
            unsafe {
                command.pre_exec(move || {
                    if libc::fcntl(number, libc::F_GETFD) < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
                });
            }
            let error = command.stdin(Stdio::null()).status().map_err(|error| error.raw_os_error());
            assert_eq!(error.err(), closes.then_some(Some(libc::EBADF)));
        }
    }
}
