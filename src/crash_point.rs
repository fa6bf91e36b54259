//! The points at which a test can kill a process of `tf`.
//!
//! In a build with the feature `crash-points`, `TFW_CRASH=NAME` kills the process that reaches the point NAME. NAME may
//! also be a list of names, separated by commas. `TFW_CRASH_LIST=FILE` appends the name of each point that is reached
//! to the file.
//!
//! With `TFW_CRASH_STOP=FILE`, the process is stopped instead, and its pid is in the new file FILE. If FILE exists, or
//! its directory does not, the point is passed. So one process is stopped, at a point that it reaches after the
//! directory was created, and the test can kill it together with others.
//!
//! A build without the feature contains no such code.

/// Records that this process has reached the point `name`, and kills or stops it if `TFW_CRASH` contains that name.
#[cfg(feature = "crash-points")]
pub(crate) fn reached(name: &str) {
    use std::io::Write;
    use std::os::unix::ffi::OsStrExt;

    use nix::sys::signal::{Signal, kill};

    let pid = nix::unistd::getpid();
    if let Some(path) = std::env::var_os("TFW_CRASH_LIST")
        && let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = file.write_all(format!("{name}\n").as_bytes());
    }
    let here = |names: std::ffi::OsString| {
        names.as_bytes().split(|byte| *byte == b',').any(|wanted| wanted == name.as_bytes())
    };
    if !std::env::var_os("TFW_CRASH").is_some_and(here) {
        return;
    }
    let Some(path) = std::env::var_os("TFW_CRASH_STOP") else {
        crate::trace::trace!("crash point: {name}");
        let _ = kill(pid, Signal::SIGKILL);
        return;
    };
    if let Ok(mut file) = std::fs::File::create_new(path) {
        let _ = file.write_all(pid.to_string().as_bytes());
        let _ = kill(pid, Signal::SIGSTOP);
    }
}

/// Does nothing, because this build does not have the feature `crash-points`.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub(crate) const fn reached(_name: &str) {}
