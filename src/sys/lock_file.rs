//! Locks on single bytes of a file. The holder of such a lock is an open file description (F_OFD_SETLK,
//! fcntl_locking(2); fcntl(2) of macOS). A child process inherits the lock together with the descriptor, through fork
//! and exec. The kernel releases the lock when no process has the descriptor open any more, even if the last such
//! process was killed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use libc::{F_OFD_GETLK, F_OFD_SETLK};

/// Tries to lock `byte` of `file`, without waiting. Returns true if `file` now holds the lock, and false if another
/// open file description holds it.
///
/// # Errors
/// An error of fcntl(2) if the file system does not support locks (ENOLCK, EOPNOTSUPP...).
pub(crate) fn try_lock(file: &File, byte: u8) -> io::Result<bool> {
    match call(file, F_OFD_SETLK, byte) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::EACCES) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Returns whether an open file description other than that of `file` has locked `byte`. This function only queries the
/// lock and does not take it. Otherwise, two processes that check at the same time would report each other's lock.
///
/// # Errors
/// Fails in the same cases as [`try_lock`].
pub(crate) fn is_locked(file: &File, byte: u8) -> io::Result<bool> {
    let found = call(file, F_OFD_GETLK, byte)?;
    Ok(found.l_type != short(libc::F_UNLCK))
}

/// Returns a constant of fcntl(2) in the type of the fields of `struct flock`. Linux has these constants as `int`,
/// macOS has some of them as `short`, and all of them are small.
fn short<T>(constant: T) -> libc::c_short
where
    libc::c_short: TryFrom<T>,
{
    libc::c_short::try_from(constant).unwrap_or_default()
}

fn call(file: &File, command: i32, byte: u8) -> io::Result<libc::flock> {
    // SAFETY: a zeroed flock is valid. The kernel reads it and, for F_OFD_GETLK, writes it.
    unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = short(libc::F_WRLCK);
        lock.l_whence = short(libc::SEEK_SET);
        lock.l_start = libc::off_t::from(byte);
        lock.l_len = 1;
        match libc::fcntl(file.as_raw_fd(), command, &raw mut lock) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(lock),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_locked_for_every_other_open_file_and_no_other_byte_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let holder = file.reopen().unwrap();
        let other = file.reopen().unwrap();
        assert!(try_lock(&holder, 0).unwrap());
        assert!(is_locked(&other, 0).unwrap() && !is_locked(&holder, 0).unwrap());
        assert!(!try_lock(&other, 0).unwrap());
        assert!(!is_locked(&other, 1).unwrap() && try_lock(&other, 1).unwrap());
        drop(holder);
        assert!(!is_locked(&other, 0).unwrap());
    }
}
