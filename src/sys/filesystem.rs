//! Determines the kind of file system that a path is on.

use std::path::Path;

/// Returns whether the file system at `path` is local to this machine. On a network file system, a lock may be granted
/// that has no effect on another host. On Linux, returns true only for the file systems in the list below, which are
/// known to be local. On other systems, returns true if the file system has the flag MNT_LOCAL. Returns false if
/// statfs(2) fails.
pub(crate) fn is_local(path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        /// The magic numbers of ext2 to ext4, xfs, btrfs, tmpfs, overlayfs, f2fs, zfs and bcachefs (statfs(2),
        /// linux/magic.h).
        const LOCAL: [u64; 8] =
            [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0x794C_7630, 0xF2F5_2010, 0x2FC1_2FC1, 0xCA45_1A4E];
        nix::sys::statfs::statfs(path).is_ok_and(|system| {
            #[expect(
                clippy::cast_sign_loss,
                reason = "the magic number has 32 bits; its type differs between C libraries"
            )]
            let kind = (system.filesystem_type().0 as u64) & 0xffff_ffff;
            LOCAL.contains(&kind)
        })
    }
    #[cfg(not(target_os = "linux"))]
    {
        // The value of MNT_LOCAL in f_flags (statfs(2) of macOS).
        const MNT_LOCAL: u32 = 0x1000;
        let Ok(path) = std::ffi::CString::new(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str())) else {
            return false;
        };
        // SAFETY: `path` is zero-terminated, and the kernel writes `system`, which is a complete statfs.
        unsafe {
            let mut system: libc::statfs = std::mem::zeroed();
            libc::statfs(path.as_ptr(), &raw mut system) == 0 && system.f_flags & MNT_LOCAL != 0
        }
    }
}

/// Returns a number that identifies the file system (statvfs(3), `f_fsid`). The number stays the same while the file
/// system is mounted. It also stays the same after a reboot if the file system has a UUID. Returns 0 if the file system
/// has no such number or if statvfs(3) fails.
pub(crate) fn identity(path: &Path) -> u64 {
    #[expect(clippy::useless_conversion, reason = "the type differs between systems")]
    nix::sys::statvfs::statvfs(path).map_or(0, |system| u64::from(system.filesystem_id()))
}
