//! The cluster's own certificates, as files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};

/// Who signs them all.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key.
pub struct Pair {
    /// The certificate's file.
    pub certificate: PathBuf,
    /// The key's file.
    pub key: PathBuf,
}

impl Authority {
    /// A new one; its certificate is `ca.crt`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn new(folder: &Path) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "lab");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        fs::write(folder.join("ca.crt"), issuer.pem()).context("write ca.crt")?;
        Ok(Self(issuer))
    }

    /// The certificate of a server by these names and addresses: `server.crt`, `server.key`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn server(&self, folder: &Path, names: Vec<String>) -> Result<Pair> {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, "api");
        self.sign(folder, "server", params)
    }

    /// The certificate of a user, and of its group: `NAME.crt`, `NAME.key`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn user(&self, folder: &Path, name: &str, group: Option<&str>) -> Result<Pair> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            let organization = DnType::OrganizationName;
            params.distinguished_name.push(organization, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(folder, name, params)
    }

    fn sign(&self, folder: &Path, name: &str, params: CertificateParams) -> Result<Pair> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.0)?;
        let write = |end: &str, text: String| -> Result<PathBuf> {
            let path = folder.join(format!("{name}.{end}"));
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            Ok(path)
        };
        Ok(Pair {
            certificate: write("crt", certificate.pem())?,
            key: write("key", key.serialize_pem())?,
        })
    }
}
