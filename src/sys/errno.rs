//! The errno of the calling thread.

/// Returns the address of errno (errno(3); on macOS `__error`, sys/errno.h). Async-signal-safe.
pub(crate) fn location() -> *mut libc::c_int {
    #[cfg(target_os = "linux")]
    // SAFETY: the call has no conditions. It returns an address that is valid for the calling thread.
    unsafe {
        libc::__errno_location()
    }
    #[cfg(not(target_os = "linux"))]
    // SAFETY: the call has no conditions. It returns an address that is valid for the calling thread.
    unsafe {
        libc::__error()
    }
}
