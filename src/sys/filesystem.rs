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
#[cfg(target_os = "linux")]
pub(crate) fn identity(path: &Path) -> u64 {
    #[expect(clippy::useless_conversion, reason = "the type differs between C libraries")]
    nix::sys::statvfs::statvfs(path).map_or(0, |system| u64::from(system.filesystem_id()))
}

/// Returns a number that identifies the file system: both halves of its UUID, combined (`ATTR_VOL_UUID`,
/// getattrlist(2)). It stays the same after a reboot. `f_fsid` of macOS does not: it is the number of a device or a
/// count of mounts (`vfs_getnewfsid`, bsd/vfs/vfs_subr.c of xnu). Returns 0 if the file system has no UUID or if the
/// call fails.
#[cfg(not(target_os = "linux"))]
pub(crate) fn identity(path: &Path) -> u64 {
    /// The response of getattrlist(2): its length, and the UUID.
    #[repr(C)]
    struct Response {
        length: u32,
        uuid: [u8; 16],
    }
    let Ok(path) = std::ffi::CString::new(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str())) else { return 0 };
    // SAFETY: zeroed values of both types are valid, `path` is zero-terminated, and the call writes at most the size of
    // `response`.
    let (status, response) = unsafe {
        let mut wanted: libc::attrlist = std::mem::zeroed();
        wanted.bitmapcount = libc::ATTR_BIT_MAP_COUNT;
        wanted.volattr = libc::ATTR_VOL_INFO | libc::ATTR_VOL_UUID;
        let mut response: Response = std::mem::zeroed();
        let (wanted, answer) = ((&raw mut wanted).cast(), (&raw mut response).cast());
        (libc::getattrlist(path.as_ptr(), wanted, answer, size_of::<Response>(), 0), response)
    };
    let is_complete = status == 0 && usize::try_from(response.length) == Ok(size_of::<Response>());
    let (first, last) = response.uuid.split_at(8);
    let number = |half: &[u8]| half.try_into().map_or(0, u64::from_ne_bytes);
    if is_complete { number(first) ^ number(last) } else { 0 }
}
