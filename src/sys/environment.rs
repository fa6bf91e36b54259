//! The environment of this process, as other processes see it and as libraries read it.

use std::ffi::{CStr, OsStr, OsString};

unsafe extern "C" {
    #[cfg_attr(target_os = "macos", expect(dead_code, reason = "not linked there"))]
    static mut environ: *mut *mut libc::c_char;
}

/// Removes every variable for whose name `unwanted` returns true from the environment, and from what /proc/PID/environ
/// shows of this process. A job runner that looks for its own variable there then does not find this process any more.
/// A variable whose name is not UTF-8 stays. There must be one thread.
pub(crate) fn forget(unwanted: impl Fn(&str) -> bool) {
    // SAFETY: there is one thread. `environ` is the list that the kernel laid out at exec. Nothing has been added
    // since; and if something has been, an entry is still a writable, zero-terminated string that nothing else refers
    // to.
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

/// Removes every variable whose name begins with `prefix` and whose value is empty. The AWS SDK for Go takes such a
/// variable as not set; the SDK for Rust takes it for an endpoint without a name. There must be one thread.
pub(crate) fn unset_empty(prefix: &str) {
    let is_empty = |(name, value): (OsString, OsString)| name.into_string().ok().filter(|_| value.is_empty());
    let empty: Vec<String> = std::env::vars_os().filter_map(is_empty).filter(|name| name.starts_with(prefix)).collect();
    if !empty.is_empty() {
        forget(|name| empty.iter().any(|known| known == name));
    }
}

/// Sets a variable to `value`, or removes it when `value` is `None`. There must be one thread.
pub(crate) fn change(name: &str, value: Option<&OsString>) {
    // SAFETY: one thread.
    unsafe {
        match value {
            Some(value) => std::env::set_var(name, AsRef::<OsStr>::as_ref(value)),
            None => std::env::remove_var(name),
        }
    }
}
