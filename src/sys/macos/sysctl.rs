//! Reads values of the kernel (sysctl(3)).

use std::ffi::CStr;

/// How often a read is repeated because the value has grown since its size was asked for.
const ATTEMPTS: usize = 3;

/// How much a value may grow between the question for its size and the read.
const SPARE_BYTES: usize = 4096;

/// Returns the value with the name `name`. `None` if there is no such value, or if this process may not read it.
pub(crate) fn by_name(name: &CStr) -> Option<Vec<u8>> {
    // SAFETY: `name` is zero-terminated. `read` passes either a null pointer or a buffer of `size` bytes.
    read(|buffer, size| unsafe { libc::sysctlbyname(name.as_ptr(), buffer, size, std::ptr::null_mut(), 0) })
}

/// Returns the value with the numbers `name`. `None` if there is no such value, or if this process may not read it.
pub(crate) fn by_number<const N: usize>(mut name: [libc::c_int; N]) -> Option<Vec<u8>> {
    let length = libc::c_uint::try_from(N).ok()?;
    // SAFETY: `name` has `length` numbers. `read` passes either a null pointer or a buffer of `size` bytes.
    read(|buffer, size| unsafe { libc::sysctl(name.as_mut_ptr(), length, buffer, size, std::ptr::null_mut(), 0) })
}

/// Returns the text with the name `name`, without the zero byte at its end. `None` if it cannot be read, is empty or is
/// not UTF-8.
pub(crate) fn text(name: &CStr) -> Option<String> {
    let value = by_name(name)?;
    let text = CStr::from_bytes_until_nul(&value).ok()?.to_str().ok()?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// Asks for the size of a value with a null pointer, and then for the value. The buffer is larger than that size, and a
/// full one counts as too small: of the arguments of a process, the kernel returns only the end if they have grown
/// (`sysctl_procargsx`, bsd/kern/kern_sysctl.c of xnu).
fn read(mut call: impl FnMut(*mut libc::c_void, *mut libc::size_t) -> libc::c_int) -> Option<Vec<u8>> {
    for _ in 0..ATTEMPTS {
        let mut size = 0;
        if call(std::ptr::null_mut(), &raw mut size) != 0 {
            return None;
        }
        let mut value = vec![0u8; size + SPARE_BYTES];
        size = value.len();
        match call(value.as_mut_ptr().cast(), &raw mut size) {
            0 if size == value.len() => {}
            0 => {
                value.truncate(size);
                return Some(value);
            }
            _ if std::io::Error::last_os_error().raw_os_error() == Some(libc::ENOMEM) => {}
            _ => return None,
        }
    }
    None
}
