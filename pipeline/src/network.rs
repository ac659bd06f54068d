//! Addresses and TLS of servers whose protocol a plugin speaks itself.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use url::Url;

use crate::config::{Secret, SecretUrl};
use crate::error::{Error, Result};

/// A server named by a URL: `SCHEME://USER:PASSWORD@HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The word before `://`, in lower case.
    pub scheme: String,
    /// Host name or address; an IPv6 address keeps its brackets.
    pub host: String,
    /// The port if the URL says one.
    pub port: Option<u16>,
    /// The user if the URL says one.
    pub username: Option<String>,
    /// The password if the URL says one.
    pub password: Option<Secret>,
}

impl Address {
    /// Reads a URL, or says what is wrong with it without repeating its password.
    pub fn parse(url: &SecretUrl) -> Result<Self, String> {
        let parsed = Url::parse(url.expose()).map_err(|e| format!("`{url}` is no URL: {e}"))?;
        let host = parsed.host_str().filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| format!("`{url}` names no host"))?.to_owned();
        if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(format!("`{url}`: nothing may follow the host and port"));
        }
        let decode = |text: &str| {
            percent_decode(text).ok_or_else(|| format!("`{url}`: wrong `%` escape in the user or the password"))
        };
        let username = match parsed.username() {
            "" => None,
            name => Some(decode(name)?),
        };
        let password = parsed.password().map(decode).transpose()?.map(|text| Secret::from(text.as_str()));
        Ok(Self { scheme: parsed.scheme().to_owned(), host, port: parsed.port(), username, password })
    }
}

/// Undoes `%XX`. `None` if an escape is broken or the result is not UTF-8.
fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

/// How to meet a TLS server: trusting the certificates of the file `ca` (PEM) and nobody else, or those the
/// operating system trusts. The provider is named here, so that no process-wide default is needed.
pub fn tls_client(ca: Option<&Path>) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => add_file(&mut roots, path)?,
        // A store may hold certificates that rustls cannot read; those are skipped.
        None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
    }
    if roots.is_empty() {
        return Err(Error::user("this system has no list of trusted certificates; name one with `ca: FILE.pem`"));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::internal("TLS").because(e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<()> {
    let wrong = || Error::user(format!("`ca`: cannot read certificates from {}", path.display()));
    for certificate in CertificateDer::pem_file_iter(path).map_err(|e| wrong().because(e))? {
        let certificate = certificate.map_err(|e| wrong().because(e))?;
        roots.add(certificate).map_err(|e| wrong().because(e))?;
    }
    if roots.is_empty() {
        return Err(Error::user(format!("`ca`: {} holds no certificate", path.display())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_its_parts_decoded() {
        let address = Address::parse(&"mqtts://me%40home:p%3Ass@broker.example:8883".into()).expect("address");
        assert_eq!((address.scheme.as_str(), address.host.as_str()), ("mqtts", "broker.example"));
        assert_eq!(address.port, Some(8883));
        assert_eq!(address.username.as_deref(), Some("me@home"));
        assert_eq!(address.password.as_ref().map(Secret::expose), Some("p:ss"));
        let bare = Address::parse(&"mqtt://[::1]".into()).expect("address");
        assert_eq!((bare.host.as_str(), bare.port, bare.username, bare.password), ("[::1]", None, None, None));
    }

    #[test]
    fn a_wrong_address_is_told_without_its_password() {
        for (url, expected) in [
            ("localhost:1883", "names no host"),
            ("mqtt://", "names no host"),
            ("broker", "is no URL"),
            ("mqtt://me:hidden@host/topic", "nothing may follow"),
            ("mqtt://me:hid%zzden@host", "wrong `%` escape"),
        ] {
            let error = Address::parse(&url.into()).expect_err(url);
            assert!(error.contains(expected) && !error.contains("den"), "{url}: {error}");
        }
    }
}
