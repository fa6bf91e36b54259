//! Places where a test stops `tf` or its guardian dead.
//!
//! In a build with the feature `crash-points`, `TFW_CRASH=NAME` kills the process that reaches that place, and
//! `TFW_CRASH_LIST=FILE` has the names of all that are reached appended to a file. In any other build nothing of this is
//! there.

/// The process has come to the place `name`.
#[cfg(feature = "crash-points")]
pub(crate) fn reached(name: &str) {
    use std::io::Write;
    if let Some(path) = std::env::var_os("TFW_CRASH_LIST")
        && let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = file.write_all(format!("{name}\n").as_bytes());
    }
    let here = |names: String| names.split(',').any(|wanted| wanted == name);
    if std::env::var("TFW_CRASH").is_ok_and(here) {
        crate::trace::trace!("crash point: {name}");
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    }
}

/// The process has come to the place `name`.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub(crate) const fn reached(_name: &str) {}
