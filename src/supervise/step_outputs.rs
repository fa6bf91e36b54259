//! Writes the outputs of a workflow step, in place of the wrapper that hashicorp/setup-terraform installs. `tf` does
//! not run that wrapper, because the first interrupt kills the wrapper and leaves terraform running without a parent.
//! `tf` gives the workflow the same outputs as the wrapper (wrapper/terraform.js). `tf` writes `stdout`, `stderr` and
//! `exitcode` into the file that `GITHUB_OUTPUT` names. If terraform exits with 2, `tf` exits with 0, because `plan
//! -detailed-exitcode` reports changes with exit code 2.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use nix::poll::PollFlags;

use crate::journal::runs::run_id;
use crate::supervise::pipes::Copies;
use crate::sys::poll;
use crate::sys::wait::Ended;

/// How long to wait if the output file is a FIFO or a terminal that accepts no data.
const READER_TIMEOUT: Duration = Duration::from_secs(5);

/// Appends the outputs of a step to the file at `path`.
///
/// # Errors
/// Fails if the file cannot be opened or written, or if it accepts no data for [`READER_TIMEOUT`].
pub(crate) fn write(path: &OsStr, Copies { stdout, stderr }: Copies<'_>, ended: Ended) -> io::Result<()> {
    let code = exit_code(ended).to_string();
    let mut text = Vec::new();
    for (name, value) in [("stdout", stdout), ("stderr", stderr), ("exitcode", code.as_bytes())] {
        // The end of a value is marked by a line that is not in the value, so the line contains a random ID (the
        // runner's FileCommandManager).
        let end = format!("ghadelimiter_{}", run_id());
        text.extend_from_slice(format!("{name}<<{end}\n").as_bytes());
        text.extend_from_slice(value);
        text.extend_from_slice(format!("\n{end}\n").as_bytes());
    }
    // If the file is a FIFO without a reader, opening it must fail and not block this process.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut file = OpenOptions::new().append(true).create(true).custom_flags(flags).open(path)?;
    let mut rest = text.as_slice();
    while !rest.is_empty() {
        match file.write(rest) {
            Ok(length) => rest = &rest[length..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if poll::wait(&[(file.as_fd(), PollFlags::POLLOUT)], Some(READER_TIMEOUT)) != [true] {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns how the wrapper would end after a terraform that ended as `ended` says. Exit codes 0 and 2 become 0, and
/// every other exit code becomes 1. If a signal killed terraform, the result is the same signal.
pub(crate) fn end_of_step(ended: Ended) -> Ended {
    match ended {
        Ended::Exited(0 | 2) => Ended::Exited(0),
        Ended::Exited(_) => Ended::Exited(1),
        killed @ Ended::Killed(_) => killed,
    }
}

fn exit_code(ended: Ended) -> i32 {
    match ended {
        Ended::Exited(code) => code,
        Ended::Killed(signal) => 128 + signal as i32,
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;

    use super::*;

    #[test]
    fn a_step_ends_as_under_the_wrapper() {
        for (ended, step) in [
            (Ended::Exited(0), Ended::Exited(0)),
            (Ended::Exited(2), Ended::Exited(0)),
            (Ended::Exited(1), Ended::Exited(1)),
            (Ended::Exited(11), Ended::Exited(1)),
            (Ended::Killed(Signal::SIGKILL), Ended::Killed(Signal::SIGKILL)),
        ] {
            assert_eq!(end_of_step(ended), step);
        }
        assert_eq!(exit_code(Ended::Killed(Signal::SIGTERM)), 143);
    }

    #[test]
    fn a_fifo_that_nobody_reads_is_an_error_and_no_wait() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(write(path.as_os_str(), Copies { stdout: b"a", stderr: b"" }, Ended::Exited(0)).is_err());
    }

    #[test]
    fn what_is_in_an_output_cannot_end_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        write(
            file.path().as_os_str(),
            Copies { stdout: b"a\nghadelimiter_1\nexitcode=9\n", stderr: b"" },
            Ended::Exited(2),
        )
        .unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        let mut lines = text.lines();
        let end = lines.next().unwrap().strip_prefix("stdout<<").unwrap();
        let value: Vec<_> = lines.by_ref().take_while(|line| *line != end).collect();
        assert_eq!(value, ["a", "ghadelimiter_1", "exitcode=9", ""]);
        assert!(lines.next().unwrap().starts_with("stderr<<"));
    }
}
