//! What `tf` saw and did, one line each, in the file that `TFW_LOG` names. Off without it.
//!
//! For whoever asks why a lock was kept, and for the tests, which wait for a line instead of for time to pass. No
//! argument, no environment and no log text of terraform's goes in.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;

/// The file of `TFW_LOG`, open.
#[derive(Debug)]
struct Trace {
    file: File,
    /// A regular file: a detached process may keep it open, and nobody waits for its end.
    is_regular: bool,
    /// The process that opened it.
    opened_by: u32,
}

static TRACE: OnceLock<Trace> = OnceLock::new();

impl Trace {
    /// Appends to `path`. Neither open(2) nor write(2) waits: a FIFO that nobody reads cannot be opened, and a line that a
    /// full one cannot take is lost. A terminal does not become our controlling terminal.
    fn open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(flags).open(path)?;
        let is_regular = file.metadata()?.is_file();
        Ok(Self { file, is_regular, opened_by: std::process::id() })
    }

    /// Whether process `pid` may write: in a detached process the descriptor of anything but a regular file is closed, and
    /// its number may be another file's.
    fn is_open_in(&self, pid: u32) -> bool {
        self.is_regular || pid == self.opened_by
    }
}

/// Appends to the file at `path` from now on; made readable for its owner alone if it is not there yet. A file that
/// cannot be opened is no reason not to run terraform.
pub(crate) fn open(path: &Path) {
    if let Ok(trace) = Trace::open(path) {
        let _ = TRACE.set(trace);
    }
}

/// The file's descriptor, for a detached process that keeps only what it needs. None where that may not keep it.
pub(crate) fn descriptor() -> Option<RawFd> {
    TRACE.get().filter(|trace| trace.is_regular).map(|trace| trace.file.as_raw_fd())
}

/// Writes a line, in one piece: several processes may share the file.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let pid = std::process::id();
    if let Some(trace) = TRACE.get().filter(|trace| trace.is_open_in(pid)) {
        let line = format!("{:.3} {pid} {text}\n", jiff::Timestamp::now());
        let _ = (&trace.file).write_all(line.as_bytes());
    }
}

/// Like `format!`, into the file that `TFW_LOG` names.
macro_rules! trace {
    ($($text:tt)*) => { crate::trace::line(format_args!($($text)*)) };
}
pub(crate) use trace;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

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
        // Far more than a pipe takes; none of it waits.
        for _ in 0..10_000 {
            let _ = (&trace.file).write_all(&[b'x'; 100]);
        }
        assert!(reader.read(&mut [0; 100]).unwrap() == 100);
        let regular = Trace::open(&directory.path().join("file")).unwrap();
        assert!(regular.is_open_in(own) && regular.is_open_in(own + 1));
    }
}
