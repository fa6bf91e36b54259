//! Certificate authorities: those of a file, and those of the system.
//!
//! On macOS, Security.framework has the authorities of the system. After a fork, a process must not use a framework
//! until it executes a program (fork(2) of macOS, CAVEATS). Such a process asks another `tf`, which asks the framework
//! and writes the authorities to its stdout.

use std::fmt::Write as _;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::process::{ChildStdout, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::another_tf;
use crate::sys::poll;
use crate::trace::trace;

/// The internal word of `tf locks` for the process that writes [`of_system`].
pub(crate) const WORD: &str = "authorities";

/// How long to wait for the other `tf`. The framework asks another process (trustd), which may hang.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The authorities of the system that another `tf` has written. `None` before.
static ASKED: Mutex<Option<Vec<u8>>> = Mutex::new(None);

/// Returns the usable certificates in `pem`, as PEM. `None` if no certificate is usable.
pub(crate) fn usable(pem: &[u8]) -> Option<Vec<u8>> {
    to_pem(CertificateDer::pem_slice_iter(pem).flatten()).map(String::into_bytes)
}

/// Returns the authorities of the system, as PEM. `None` if it has none that is usable. This process must be one that
/// may use frameworks ([`crate::sys::detached::may_use_frameworks`]).
pub(crate) fn of_system() -> Option<String> {
    to_pem(rustls_native_certs::load_native_certs().certs)
}

/// Returns the usable ones of `certificates`, as PEM. `None` if there is none. Unusable certificates are left out,
/// because Go skips them, and the SDK would panic on them.
fn to_pem<'a>(certificates: impl IntoIterator<Item = CertificateDer<'a>>) -> Option<String> {
    let mut roots = rustls::RootCertStore::empty();
    let mut usable = String::new();
    for certificate in certificates {
        if roots.add(certificate.clone()).is_ok() {
            let encoded = aws_smithy_types::base64::encode(&certificate);
            let _ = writeln!(usable, "-----BEGIN CERTIFICATE-----\n{encoded}\n-----END CERTIFICATE-----");
        }
    }
    (!usable.is_empty()).then_some(usable)
}

/// Returns the authorities of the system, as PEM, which another `tf` reads. `None` if that `tf` finds none, cannot be
/// started, or needs more than [`TIMEOUT`] (10 s).
pub(super) fn from_another_tf() -> Option<Vec<u8>> {
    let mut asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner);
    if asked.is_none() {
        let answer = ask();
        trace!("the authorities of the system, in bytes: {:?}", answer.as_ref().map(Vec::len));
        *asked = answer.ok().filter(|pem| !pem.is_empty());
    }
    asked.clone()
}

/// Returns what another `tf` writes about the authorities of the system. Empty if it finds none.
///
/// # Errors
/// The error of a process that cannot be started, of a read, or [`io::ErrorKind::TimedOut`].
fn ask() -> io::Result<Vec<u8>> {
    let mut command = another_tf::locks(&[WORD])?;
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    #[expect(clippy::disallowed_methods, reason = "this starts `tf`, not terraform; it needs only the setup above")]
    let mut child = command.spawn()?;
    let written = child.stdout.take().map_or_else(|| Err(io::ErrorKind::BrokenPipe.into()), read_to_end);
    // A process that has closed its stdout is about to exit.
    let _ = child.kill();
    child.wait()?;
    written
}

/// Reads `stdout` to its end.
///
/// # Errors
/// The error of a read, or [`io::ErrorKind::TimedOut`] if there is no end within [`TIMEOUT`].
fn read_to_end(mut stdout: ChildStdout) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + TIMEOUT;
    let mut written = Vec::new();
    let mut buffer = [0; 1 << 16];
    loop {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let ready = poll::wait(&[(stdout.as_fd(), PollFlags::POLLIN)], Some(remaining));
        if ready == [true] {
            match stdout.read(&mut buffer)? {
                0 => return Ok(written),
                length => written.extend_from_slice(&buffer[..length]),
            }
        } else if remaining.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_certificate_is_told_from_one_with_a_broken_one() {
        let key = rcgen::KeyPair::generate().unwrap();
        let good = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap().pem();
        let broken = "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        let mixed = usable(format!("{broken}{good}{broken}").as_bytes()).unwrap();
        assert_eq!(CertificateDer::pem_slice_iter(&mixed).flatten().count(), 1);
        assert_eq!(usable(broken.as_bytes()), None);
        assert_eq!(usable(b"nothing"), None);
        assert_eq!(usable(b"-----BEGIN CERTIFICATE-----\nMIIB\n"), None);
    }
}
