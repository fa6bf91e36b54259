//! The user's own directory for temporary files.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Returns the directory for the temporary files of this user (`_CS_DARWIN_USER_TEMP_DIR`, confstr(3)). Unlike
/// `TMPDIR`, it is the same in a shell, in a cron job and over ssh. `None` if the system names none.
pub(crate) fn of_user() -> Option<PathBuf> {
    let mut path = vec![0u8; libc::PATH_MAX.try_into().ok()?];
    // SAFETY: the call writes at most `path.len()` bytes.
    let length = unsafe { libc::confstr(libc::_CS_DARWIN_USER_TEMP_DIR, path.as_mut_ptr().cast(), path.len()) };
    // The length includes the zero byte at the end. It is 0 for an error, and larger than the buffer if the path does
    // not fit.
    if length < 2 || length > path.len() {
        return None;
    }
    path.truncate(length - 1);
    Some(PathBuf::from(OsString::from_vec(path)))
}
