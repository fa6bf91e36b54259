//! Certificate authorities: those of a file, and those of the system.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::aws::ask_system;
use crate::sys::frameworks;

/// Why there are no authorities on a machine that has none.
const NO_AUTHORITIES: &str =
    "this machine has no certificate authorities: install ca-certificates, or set AWS_CA_BUNDLE";

/// The last answer about the authorities of the system. `None` before the first one.
static LAST: Mutex<Option<Loaded>> = Mutex::new(None);

/// An answer about the authorities of the system.
struct Loaded {
    /// When it arrived.
    at: Instant,
    /// The authorities, in PEM, or why they could not be read.
    answer: Result<Vec<u8>, String>,
}

/// How long after a failed answer about the authorities the question is not repeated. Several clients need it at once.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Returns the usable certificates in `pem`, as PEM. `None` if no certificate is usable.
pub(crate) fn usable(pem: &[u8]) -> Option<Vec<u8>> {
    to_pem(CertificateDer::pem_slice_iter(pem).flatten()).map(String::into_bytes)
}

/// Returns the authorities of the system, as PEM. A process that must not ask the system for them itself asks another
/// `tf`.
///
/// # Errors
/// Why there are none, for the user.
pub(super) fn of_system() -> Result<Vec<u8>, String> {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(Loaded { at, answer }) = &*last
        && (answer.is_ok() || at.elapsed() < RETRY_INTERVAL)
    {
        return answer.clone();
    }
    let answer = if frameworks::are_allowed() {
        load()
    } else {
        let failed = |error| format!("the certificate authorities of the system could not be read: {error}");
        ask_system::ask(&[ask_system::AUTHORITIES]).map_err(failed)
    };
    let answer = answer.map(String::into_bytes);
    *last = Some(Loaded { at: Instant::now(), answer: answer.clone() });
    answer
}

/// As [`of_system`], in a process that may use frameworks ([`frameworks::are_allowed`]).
///
/// # Errors
/// As [`of_system`].
pub(crate) fn load() -> Result<String, String> {
    debug_assert!(frameworks::are_allowed());
    to_pem(rustls_native_certs::load_native_certs().certs).ok_or_else(|| NO_AUTHORITIES.to_owned())
}

/// Returns the usable certificates among `certificates`, as PEM. `None` if there is none. Unusable certificates are left
/// out, because Go skips them, and the SDK would panic on them.
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
