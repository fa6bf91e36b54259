//! Asks another `tf` for what this process must not ask the system itself: on macOS, only a process that does nothing else
//! uses a framework ([`crate::sys::frameworks`]).
//!
//! TLS takes the certificate authorities of the system from Security.framework, and getaddrinfo(3) uses
//! Network.framework.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use crate::another_tf;
use crate::sys::poll;
use crate::trace::trace;

/// The internal word of `tf locks` before a question.
pub(crate) const WORD: &str = "ask-system";

/// The question for the certificate authorities, in PEM.
pub(crate) const AUTHORITIES: &str = "authorities";

/// The question for the addresses of a host, whose name follows. Each is a line of the answer.
pub(crate) const ADDRESSES: &str = "addresses";

/// How long to wait for an answer. The frameworks ask other processes, which may hang.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The largest answer that is read, in bytes. The authorities of a system are about 200 kB.
const MAX_ANSWER: usize = 8 << 20;

/// The last line of an answer. An answer without it is not complete.
const END: &str = "end of the answer\n";

/// The beginning of an answer that is the reason why there is none.
const ERROR: &str = "error: ";

/// Returns what another `tf` answers to `question`.
///
/// # Errors
/// The reason in the answer, the error of a process that cannot be started or of a read,
/// [`io::ErrorKind::UnexpectedEof`] for an answer that is not complete, [`io::ErrorKind::TimedOut`] after [`TIMEOUT`].
pub(super) fn ask(question: &[&str]) -> io::Result<String> {
    let mut command = another_tf::locks(&[&[WORD], question].concat())?;
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    // It belongs to no run, and writes no trace.
    for name in ["TFW_RUN", "TFW_CHAIN", "TFW_LOG"] {
        command.env_remove(name);
    }
    #[expect(clippy::disallowed_methods, reason = "this starts `tf`, not terraform; it needs only the setup above")]
    let mut child = command.spawn()?;
    let written = read_to_end(&mut child);
    // It has nothing left to do. It is killed so that the wait is short. An answer that has its last line is complete,
    // however that process has ended.
    let _ = child.kill();
    let _ = child.wait();
    let answer = written.and_then(|written| read_answer(&written));
    trace!("asked another tf for {question:?}: {:?}", answer.as_ref().map(String::len));
    answer
}

/// Returns an answer as the other `tf` writes it: what was asked for, in whole lines, or the reason why there is none.
pub(crate) fn written(answer: Result<String, String>) -> String {
    answer.unwrap_or_else(|reason| format!("{ERROR}{reason}\n")) + END
}

/// Returns the text of a complete answer.
///
/// # Errors
/// As [`ask`].
fn read_answer(written: &[u8]) -> io::Result<String> {
    let text = std::str::from_utf8(written).ok().and_then(|text| text.strip_suffix(END));
    let text =
        text.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the answer of another tf is not complete"))?;
    match text.strip_prefix(ERROR) {
        Some(reason) => Err(io::Error::other(reason.trim_end())),
        None => Ok(text.to_owned()),
    }
}

/// Reads the stdout of `child` to its end.
///
/// # Errors
/// As [`ask`], and [`io::ErrorKind::FileTooLarge`] after [`MAX_ANSWER`].
fn read_to_end(child: &mut Child) -> io::Result<Vec<u8>> {
    let stdout = child.stdout.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
    let deadline = Instant::now() + TIMEOUT;
    let mut written = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    while written.len() <= MAX_ANSWER {
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "another tf did not answer within 10 s"));
        }
        if poll::wait(&[(stdout.as_fd(), PollFlags::POLLIN)], Some(remaining)) == [true] {
            match stdout.read(&mut buffer)? {
                0 => return Ok(written),
                length => written.extend_from_slice(&buffer[..length]),
            }
        }
    }
    Err(io::ErrorKind::FileTooLarge.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_answer_is_an_answer() {
        for text in ["", "127.0.0.1\n", "127.0.0.1\nend of the ans", "end of the answer\n127.0.0.1\n"] {
            assert_eq!(read_answer(text.as_bytes()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{text}");
        }
        assert_eq!(read_answer(b"\xff\nend of the answer\n").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let read = |answer| read_answer(written(answer).as_bytes());
        assert_eq!(read(Ok("127.0.0.1\n::1\n".to_owned())).unwrap(), "127.0.0.1\n::1\n");
        assert_eq!(read(Err("no such host".to_owned())).unwrap_err().to_string(), "no such host");
    }
}
