//! Reads values of the kernel (sysctl(3)).

use std::ffi::CStr;

use nix::errno::Errno;

use super::sized_read;

/// The largest buffer that `KERN_PROCARGS2` accepts: `ARG_MAX` (sys/syslimits.h) and the number of arguments. With a
/// larger one, it fails with EINVAL (`sysctl_procargsx`, bsd/kern/kern_sysctl.c of xnu).
const MAX_ARGUMENTS: usize = 1024 * 1024 + size_of::<libc::c_int>();

/// Returns the value with the name `name`. `None` if there is no such value, or if this process may not read it.
pub(crate) fn by_name(name: &CStr) -> Option<Vec<u8>> {
    // SAFETY: `name` is zero-terminated. `read` passes either a null pointer or a buffer of `size` bytes.
    read(usize::MAX, |buffer, size| unsafe { libc::sysctlbyname(name.as_ptr(), buffer, size, std::ptr::null_mut(), 0) })
}

/// Returns the arguments and the environment of a process, in the format of [`super::procargs`]. `None` if there is no
/// such process, or if this process may not read them.
pub(crate) fn arguments(pid: libc::pid_t) -> Option<Vec<u8>> {
    by_number(MAX_ARGUMENTS, [libc::CTL_KERN, libc::KERN_PROCARGS2, pid])
}

/// Returns the `kinfo_proc` (sys/sysctl.h) of a process. Empty if there is no such process.
pub(crate) fn process_entry(pid: libc::pid_t) -> Option<Vec<u8>> {
    by_number(usize::MAX, [libc::CTL_KERN, libc::KERN_PROC, libc::KERN_PROC_PID, pid])
}

/// Returns the value with the numbers `name`. The kernel accepts a buffer of at most `max` bytes.
fn by_number<const N: usize>(max: usize, mut name: [libc::c_int; N]) -> Option<Vec<u8>> {
    let length = libc::c_uint::try_from(N).ok()?;
    // SAFETY: `name` has `length` numbers. `read` passes either a null pointer or a buffer of `size` bytes.
    read(max, |buffer, size| unsafe { libc::sysctl(name.as_mut_ptr(), length, buffer, size, std::ptr::null_mut(), 0) })
}

/// Returns the text with the name `name`, without the zero byte at its end. `None` if it cannot be read, is empty or is
/// not UTF-8.
pub(crate) fn text(name: &CStr) -> Option<String> {
    let value = by_name(name)?;
    let text = CStr::from_bytes_until_nul(&value).ok()?.to_str().ok()?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// Reads a value by `call`, which gets a buffer and its size, and stores the size of the value there. With a null
/// pointer it only stores the size. It returns -1 and sets errno if it fails.
fn read(max: usize, mut call: impl FnMut(*mut libc::c_void, *mut libc::size_t) -> libc::c_int) -> Option<Vec<u8>> {
    sized_read::read(max, |buffer| {
        let (start, mut size) =
            buffer.map_or((std::ptr::null_mut(), 0), |buffer| (buffer.as_mut_ptr().cast(), buffer.len()));
        Errno::result(call(start, &raw mut size))?;
        Ok(size)
    })
}
