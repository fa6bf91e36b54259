//! Logs the observations and actions of `tf`, one line each, to the file in `TFW_LOG`. Without this variable, nothing
//! is logged.
//!
//! The log shows why a lock was not released. The tests read it too: they wait for a certain line, not for a fixed
//! time. The log contains no arguments, no environment and no text of terraform's log.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;

/// The open file that `TFW_LOG` names.
#[derive(Debug)]
struct Trace {
    file: File,
    /// Whether the file is a regular file. Only a regular file may remain open in a detached process. A FIFO, for
    /// example, may have a reader that waits until every writer has closed the FIFO.
    is_regular: bool,
    /// The pid of the process that opened the file.
    opened_by: u32,
}

static TRACE: OnceLock<Trace> = OnceLock::new();

impl Trace {
    /// Opens `path` for appending. Neither open(2) nor write(2) waits. So a FIFO without a reader cannot be opened, and
    /// a line is lost if a full FIFO cannot accept it. A terminal does not become the controlling terminal of this
    /// process.
    fn open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(flags).open(path)?;
        let is_regular = file.metadata()?.is_file();
        Ok(Self { file, is_regular, opened_by: std::process::id() })
    }

    /// Returns whether the process `pid` may write to the descriptor: it opened the file, or the file is regular. A
    /// detached process has closed the descriptor of any other file, and the same number may belong to another open
    /// file in that process.
    fn is_open_in(&self, pid: u32) -> bool {
        self.is_regular || pid == self.opened_by
    }
}

/// Opens the log file at `path`. A new file is readable only by its owner. If the file cannot be opened, nothing is
/// logged, and terraform runs nevertheless.
pub(crate) fn open(path: &Path) {
    if let Ok(trace) = Trace::open(path) {
        let _ = TRACE.set(trace);
    }
}

/// Returns the descriptor of the log file, which a detached process must keep open. `None` if nothing is logged, or if
/// the file is not regular, because a detached process must not keep such a file open.
pub(crate) fn descriptor() -> Option<RawFd> {
    TRACE.get().filter(|trace| trace.is_regular).map(|trace| trace.file.as_raw_fd())
}

/// Writes one line with a single write, because several processes may share the file.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let pid = std::process::id();
    if let Some(trace) = TRACE.get().filter(|trace| trace.is_open_in(pid)) {
        let line = format!("{:.3} {pid} {text}\n", jiff::Timestamp::now());
        let _ = (&trace.file).write_all(line.as_bytes());
    }
}

/// Formats its arguments like `format!`, and writes the line to the file in `TFW_LOG`.
macro_rules! trace {
    ($($text:tt)*) => { crate::trace::line(format_args!($($text)*)) };
}
pub(crate) use trace;

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_fifo_is_written_only_as_far_as_somebody_reads_it_and_by_its_opener_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(Trace::open(&path).is_err(), "nobody reads it");
        let mut reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let trace = Trace::open(&path).unwrap();
        let own = std::process::id();
        assert!(trace.is_open_in(own) && !trace.is_open_in(own + 1));
        // This is much more text than a pipe can hold. No write may wait.
        for _ in 0..10_000 {
            let _ = (&trace.file).write_all(&[b'x'; 100]);
        }
        assert!(reader.read(&mut [0; 100]).unwrap() == 100);
        let regular = Trace::open(&directory.path().join("file")).unwrap();
        assert!(regular.is_open_in(own) && regular.is_open_in(own + 1));
    }
}
