//! Whom a client trusts, and how it says who it is.

use std::fmt;

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// How endpoints of `https://` are talked to.
///
/// Without an authority of your own, those that browsers trust may vouch for the server.
#[derive(Clone, Default)]
pub struct Tls {
    config: ClientTlsConfig,
    has_authority: bool,
}

impl Tls {
    /// The web's certificate authorities, and no certificate of the client's own.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Only servers that this authority vouches for: one or several certificates, as PEM. Of several calls all count.
    #[must_use]
    pub fn authority(self, pem: impl AsRef<[u8]>) -> Self {
        let config = self.config.ca_certificate(Certificate::from_pem(pem));
        Self { config, has_authority: true }
    }

    /// The certificate of this client with those between it and its authority, and its key, as PEM.
    #[must_use]
    pub fn identity(self, certificate_pem: impl AsRef<[u8]>, key_pem: impl AsRef<[u8]>) -> Self {
        Self { config: self.config.identity(Identity::from_pem(certificate_pem, key_pem)), ..self }
    }

    /// The name that is in the server's certificate; that of the endpoint by default.
    #[must_use]
    pub fn domain_name(self, name: impl Into<String>) -> Self {
        Self { config: self.config.domain_name(name), ..self }
    }

    pub(super) fn into_config(self) -> ClientTlsConfig {
        if self.has_authority { self.config } else { self.config.with_webpki_roots() }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("has_authority", &self.has_authority).finish_non_exhaustive()
    }
}
