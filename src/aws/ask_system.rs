//! Asks another `tf` for what this process must not ask the system itself: on macOS, only a process that does nothing else
//! uses a framework ([`frameworks`]).
//!
//! TLS takes the certificate authorities of the system from Security.framework, and getaddrinfo(3) uses
//! Network.framework.

use std::ffi::OsString;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError};
use hyper_util::client::legacy::connect::dns::Name;
use nix::poll::PollFlags;
use nix::sys::signal::{SigSet, Signal};
use tokio::task;
use tower_service::Service;

use crate::aws::authorities;
use crate::sys::{disposition, frameworks, poll};
use crate::trace::trace;
use crate::{another_tf, console};

/// The internal word of `tf locks` before a question.
pub(crate) const WORD: &str = "ask-system";

/// The question for the certificate authorities, in PEM.
const AUTHORITIES: &str = "authorities";

/// The question for the addresses of a host, whose name follows. Each is a line of the answer.
const ADDRESSES: &str = "addresses";

/// How long to wait for an answer. The frameworks ask other processes, which may hang.
const TIMEOUT: Duration = Duration::from_secs(10);

/// After this time, in seconds, the other `tf` kills itself: nobody waits for its answer any more.
const OTHER_TIMEOUT: u32 = 20;

/// The largest answer that is read, in bytes. The authorities of a system are about 200 kB.
const MAX_ANSWER: usize = 8 << 20;

/// Why there are no authorities on a machine that has none.
const NO_AUTHORITIES: &str =
    "this machine has no certificate authorities: install ca-certificates, or set AWS_CA_BUNDLE";

/// The last line of an answer. An answer without it is not complete.
const END: &str = "end of the answer\n";

/// The beginning of an answer that is the reason why there is none.
const ERROR: &str = "error: ";

/// The last answer about the authorities. `None` before the first one.
static LAST_AUTHORITIES: Mutex<Option<Authorities>> = Mutex::new(None);

/// An answer about the authorities.
struct Authorities {
    /// When it arrived.
    at: Instant,
    /// The authorities, in PEM, or why they could not be read.
    answer: Result<Vec<u8>, String>,
}

/// How long after a failed answer about the authorities the question is not repeated. Several clients need it at once.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Answers the question in `words`, as the other `tf`.
pub(crate) fn answer(words: &[OsString]) {
    frameworks::allow();
    // This process has inherited a signal mask that blocks every signal.
    disposition::set_default(Signal::SIGALRM);
    let _ = SigSet::from(Signal::SIGALRM).thread_unblock();
    nix::unistd::alarm::set(OTHER_TIMEOUT);
    let words: Vec<&str> = words.iter().filter_map(|word| word.to_str()).collect();
    let answer = match words[..] {
        [AUTHORITIES] => authorities::of_system().ok_or_else(|| NO_AUTHORITIES.to_owned()),
        [ADDRESSES, host] => match look_up(host) {
            Ok(addresses) => {
                Ok(addresses.iter().map(|address| address.ip().to_string()).collect::<Vec<_>>().join("\n") + "\n")
            }
            Err(error) => Err(error.to_string()),
        },
        _ => return,
    };
    let text = answer.unwrap_or_else(|reason| format!("{ERROR}{reason}\n"));
    console::print_for_program(&(text + END));
}

/// Returns what another `tf` answers to `question`.
///
/// # Errors
/// The reason in the answer, the error of a process that cannot be started or of a read,
/// [`io::ErrorKind::UnexpectedEof`] for an answer that is not complete, [`io::ErrorKind::TimedOut`] after [`TIMEOUT`].
fn ask(question: &[&str]) -> io::Result<String> {
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

/// Returns the certificate authorities of the system, in PEM.
///
/// # Errors
/// Why there are none, for the user.
pub(super) fn authorities() -> Result<Vec<u8>, String> {
    let mut last = LAST_AUTHORITIES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(Authorities { at, answer }) = &*last
        && (answer.is_ok() || at.elapsed() < RETRY_INTERVAL)
    {
        return answer.clone();
    }
    let answer = if frameworks::are_allowed() {
        authorities::of_system().ok_or_else(|| NO_AUTHORITIES.to_owned())
    } else {
        let failed = |error| format!("the certificate authorities of the system could not be read: {error}");
        ask(&[AUTHORITIES]).map_err(failed)
    };
    let answer = answer.map(String::into_bytes);
    *last = Some(Authorities { at: Instant::now(), answer: answer.clone() });
    answer
}

/// Returns the addresses of `host` (getaddrinfo(3)), with the port 0.
fn look_up(host: &str) -> io::Result<Vec<SocketAddr>> {
    Ok((host, 0).to_socket_addrs()?.collect())
}

/// Looks up the addresses of hosts. A process that must not do that itself asks another `tf`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resolver;

impl Resolver {
    async fn addresses(host: String) -> io::Result<Vec<SocketAddr>> {
        let looked_up = task::spawn_blocking(move || {
            if frameworks::are_allowed() {
                return look_up(&host);
            }
            let answer = ask(&[ADDRESSES, &host])?;
            let addresses = answer.lines().filter_map(|line| line.parse::<IpAddr>().ok());
            Ok(addresses.map(|address| SocketAddr::new(address, 0)).collect())
        });
        looked_up.await.map_err(io::Error::other)?
    }
}

impl ResolveDns for Resolver {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        let addresses = Self::addresses(name.to_owned());
        DnsFuture::new(async {
            let addresses = addresses.await.map_err(ResolveDnsError::new)?;
            Ok(addresses.iter().map(SocketAddr::ip).collect())
        })
    }
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let addresses = Self::addresses(name.as_str().to_owned());
        Box::pin(async {
            // The caller sets the port.
            Ok(addresses.await?.into_iter())
        })
    }
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
        assert_eq!(read_answer(b"127.0.0.1\n::1\nend of the answer\n").unwrap(), "127.0.0.1\n::1\n");
        assert_eq!(read_answer(b"error: no such host\nend of the answer\n").unwrap_err().to_string(), "no such host");
    }
}
