//! The points at which a test can kill `tf` or its guardian.
//!
//! In a build with the feature `crash-points`, `TFW_CRASH=NAME` kills the process that reaches the point NAME. NAME may
//! also be a list of names, separated by commas. `TFW_CRASH_LIST=FILE` appends the name of each point that is reached
//! to the file. A build without the feature contains no such code.

/// Records that this process has reached the point `name`, and kills it if `TFW_CRASH` contains that name.
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

/// Does nothing, because this build does not have the feature `crash-points`.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub(crate) const fn reached(_name: &str) {}
