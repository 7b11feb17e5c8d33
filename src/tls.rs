//! TLS of a client: whom it trusts, and who it says it is. One for PostgreSQL and Elasticsearch.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

/// What of a server's certificate is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// Nothing: whoever answers is taken.
    Nothing,
    /// A known authority has signed it, for whatever name.
    Authority,
    /// A known authority has signed it, for this name.
    AuthorityAndName,
}

/// PEM files, each with the key of the configuration that names it.
pub(crate) struct Files<'a> {
    /// The authorities that are known; the system's where there is none.
    pub(crate) authorities: (&'static str, Option<&'a Path>),
    /// The client's certificate.
    pub(crate) certificate: (&'static str, Option<&'a Path>),
    /// Its key.
    pub(crate) key: (&'static str, Option<&'a Path>),
}

/// Why there is no TLS.
#[derive(Debug)]
pub(crate) enum TlsError {
    /// The file that a key of the configuration names cannot be used.
    File { key: &'static str, reason: String },
    /// The library's words.
    Other(String),
}

/// The settings of a client.
///
/// # Errors
/// A file cannot be read or holds no certificate or key, or there are no authorities to check by.
pub(crate) fn client(check: Check, files: &Files<'_>) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let other = |error: &dyn std::error::Error| TlsError::Other(error.to_string());
    let verifier: Arc<dyn ServerCertVerifier> = match check {
        Check::Nothing => Arc::new(Unchecked(provider.clone())),
        Check::Authority | Check::AuthorityAndName => {
            let roots = Arc::new(roots(files)?);
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
                .build()
                .map_err(|error| other(&error))?;
            if check == Check::AuthorityAndName { verifier } else { Arc::new(AnyName(verifier)) }
        }
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| other(&error))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let ((certificate_key, certificate), (key_key, key)) = (files.certificate, files.key);
    match (certificate, key) {
        (None, None) => Ok(builder.with_no_client_auth()),
        (Some(_), None) => Err(unusable(certificate_key, format!("{key_key} is missing"))),
        (None, Some(_)) => Err(unusable(key_key, format!("{certificate_key} is missing"))),
        (Some(certificate), Some(key)) => {
            let certificates = certificates(certificate_key, certificate)?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key_key, key, &error))?;
            builder.with_client_auth_cert(certificates, key).map_err(|error| unusable(certificate_key, error))
        }
    }
}

fn roots(files: &Files<'_>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    let (key, path) = files.authorities;
    if let Some(path) = path {
        for certificate in certificates(key, path)? {
            roots.add(certificate).map_err(|error| unusable(key, error))?;
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(unusable(key, "it is not given, and this system has no certificate authorities of its own"));
        }
    }
    Ok(roots)
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = |error| unreadable(key, path, &error);
    let found: Vec<_> = CertificateDer::pem_file_iter(path).map_err(read)?.collect::<Result<_, _>>().map_err(read)?;
    if found.is_empty() {
        return Err(unusable(key, format!("{} holds no certificate in PEM form", path.display())));
    }
    Ok(found)
}

fn unreadable(key: &'static str, path: &Path, error: &pem::Error) -> TlsError {
    let reason = if let pem::Error::Io(error) = error { error.to_string() } else { error.to_string() };
    unusable(key, format!("{}: {reason}", path.display()))
}

fn unusable(key: &'static str, reason: impl ToString) -> TlsError {
    TlsError::File { key, reason: reason.to_string() }
}

/// `prefer` and `require`: whoever answers is taken, as libpq does.
#[derive(Debug)]
struct Unchecked(Arc<CryptoProvider>);

impl ServerCertVerifier for Unchecked {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// `verify-ca`: signed by a known authority, for whatever host.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // The name is looked at last: whoever fails by it has passed all else.
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
