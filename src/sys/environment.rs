//! Changes the environment of this process, for the libraries that read it and for the processes that read /proc.

use std::ffi::{CStr, OsStr, OsString};

unsafe extern "C" {
    static mut environ: *mut *mut libc::c_char;
}

/// Removes every variable for whose name `unwanted` returns true, both from the environment and from /proc/PID/environ.
/// After that, a job runner that searches /proc for processes with its variable no longer finds this process. A
/// variable whose name is not UTF-8 is kept. This process must have one thread.
pub(crate) fn forget(unwanted: impl Fn(&str) -> bool) {
    // SAFETY: there is one thread. `environ` is the list that the kernel created at exec, and nothing has been added
    // since. Even an added entry would be a writable, zero-terminated string to which nothing else refers.
    unsafe {
        let mut from = environ;
        let mut to = environ;
        if from.is_null() {
            return;
        }
        while !(*from).is_null() {
            let entry = *from;
            let text = CStr::from_ptr(entry).to_bytes();
            let name = text.split(|&byte| byte == b'=').next().unwrap_or_default();
            if std::str::from_utf8(name).is_ok_and(&unwanted) {
                std::ptr::write_bytes(entry, 0, text.len());
            } else {
                *to = entry;
                to = to.add(1);
            }
            from = from.add(1);
        }
        *to = std::ptr::null_mut();
    }
}

/// Removes every variable whose name begins with `prefix` and whose value is empty. The AWS SDK for Go treats such a
/// variable as unset, but the SDK for Rust treats it as an endpoint with an empty URL. This process must have one
/// thread.
pub(crate) fn unset_empty(prefix: &str) {
    let is_empty = |(name, value): (OsString, OsString)| name.into_string().ok().filter(|_| value.is_empty());
    let empty: Vec<String> = std::env::vars_os().filter_map(is_empty).filter(|name| name.starts_with(prefix)).collect();
    if !empty.is_empty() {
        forget(|name| empty.iter().any(|known| known == name));
    }
}

/// Sets a variable to `value`, or removes it if `value` is `None`. This process must have one thread.
pub(crate) fn change(name: &str, value: Option<&OsString>) {
    // SAFETY: there is one thread (a condition for the caller).
    unsafe {
        match value {
            Some(value) => std::env::set_var(name, AsRef::<OsStr>::as_ref(value)),
            None => std::env::remove_var(name),
        }
    }
}
