//! What `tf` saw and did, one line each, in the file that `TFW_LOG` names. Off without it.
//!
//! For whoever asks why a lock was kept, and for the tests, which wait for a line instead of for time to pass. No
//! argument, no environment and no log text of terraform's goes in.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;

static FILE: OnceLock<File> = OnceLock::new();

/// Appends to the file at `path` from now on; made readable for its owner alone if it is not there yet. A file that
/// cannot be opened is no reason not to run terraform.
pub(crate) fn open(path: &Path) {
    if let Ok(file) = OpenOptions::new().append(true).create(true).mode(0o600).open(path) {
        let _ = FILE.set(file);
    }
}

/// The file, for a process that keeps only what it needs: where it is a regular one, and nobody waits for its end.
pub(crate) fn descriptor() -> Option<RawFd> {
    let file = FILE.get()?;
    file.metadata().is_ok_and(|file| file.is_file()).then(|| file.as_raw_fd())
}

/// Writes a line, in one piece: several processes may share the file.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    if let Some(mut file) = FILE.get() {
        let line = format!("{:.3} {} {text}\n", jiff::Timestamp::now(), std::process::id());
        let _ = file.write_all(line.as_bytes());
    }
}

/// Like `format!`, into the file that `TFW_LOG` names.
macro_rules! trace {
    ($($text:tt)*) => { crate::trace::line(format_args!($($text)*)) };
}
pub(crate) use trace;
