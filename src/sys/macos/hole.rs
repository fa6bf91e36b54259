//! Frees the disk blocks of a part of a file.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Frees the disk blocks of `file` that contain only bytes before the offset `end`. They read as zeros afterwards, and
/// the file keeps its length (`F_PUNCHHOLE`, fcntl(2) of macOS 10.13). Does nothing if the file system cannot do that,
/// or does not report its block size (fstatfs(2)).
pub(crate) fn punch_before(file: &File, end: u64) {
    // SAFETY: a zeroed statfs is valid, and the call fills it.
    let block = unsafe {
        let mut system: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(file.as_raw_fd(), &raw mut system) != 0 {
            return;
        }
        u64::from(system.f_bsize)
    };
    // Offset and length must be multiples of the block size.
    let Some(length) = end.checked_div(block).and_then(|blocks| i64::try_from(blocks * block).ok()) else { return };
    if length > 0 {
        let hole = libc::fpunchhole_t { fp_flags: 0, reserved: 0, fp_offset: 0, fp_length: length };
        // SAFETY: the descriptor is open, and the call reads `hole`.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_PUNCHHOLE, &raw const hole) };
    }
}
