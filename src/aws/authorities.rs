//! Certificate authorities: those of a file, and those of the system.

use std::fmt::Write as _;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::sys::frameworks;

/// Returns the usable certificates in `pem`, as PEM. `None` if no certificate is usable.
pub(crate) fn usable(pem: &[u8]) -> Option<Vec<u8>> {
    to_pem(CertificateDer::pem_slice_iter(pem).flatten()).map(String::into_bytes)
}

/// Returns the authorities of the system, as PEM. `None` if it has none that is usable. This process must be one that
/// may use frameworks ([`frameworks::are_allowed`]).
pub(super) fn of_system() -> Option<String> {
    debug_assert!(frameworks::are_allowed());
    to_pem(rustls_native_certs::load_native_certs().certs)
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
