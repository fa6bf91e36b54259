//! What the backend block, the environment and the shared files say about reaching AWS, read as terraform reads it.

use crate::sys::plain_file;
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use std::ffi::OsString;
use std::path::PathBuf;

use crate::terraform::backend::CachedBackend;

/// Why AWS cannot be reached as terraform did.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Unreachable {
    /// An attribute of the backend block, or a key of a profile.
    #[error("the backend sets {0}, which tf cannot follow")]
    Attribute(String),
    /// A key of the profile that is used.
    #[error("the profile sets {0}, which tf cannot follow")]
    ProfileKey(&'static str),
    /// The shared files, of which one is broken or gone.
    #[error("the shared files cannot be used: {0}")]
    SharedFiles(String),
    /// A profile that is named.
    #[error("the profile {0} is in none of the shared files")]
    Profile(String),
    /// A part of the block that says half of something.
    #[error("the backend sets {0}")]
    Incomplete(&'static str),
    /// The file with certificate authorities.
    #[error("the certificates in {path} cannot be used: {reason}")]
    Certificates {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Where the instance's credentials come from.
    #[error("the endpoint of the instance's metadata cannot be used: {0}")]
    Metadata(String),
    /// The source of credentials gave none.
    #[error("{0}")]
    Credentials(String),
    /// The service that gives them did not answer, or could not do it: it may in a moment. It asks nobody.
    #[error("{0}")]
    Silent(String),
    /// Neither the backend nor the environment or the profile names a region.
    #[error("no region is known")]
    Region,
    /// `duration` of a role.
    #[error("the backend's duration {0:?} for a role is not a time such as 1h30m")]
    Duration(String),
}

impl Unreachable {
    /// Whether asking again may do better: a file may be there by then, an attribute will not be another.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Certificates { .. }
                | Self::SharedFiles(_)
                | Self::Profile(_)
                | Self::Credentials(_)
                | Self::Silent(_)
                | Self::Region
        )
    }
}

/// A variable that is set and not empty.
pub(crate) fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The endpoint for one service: the attribute, its deprecated form, or a variable. What is left follows the SDK:
/// `AWS_ENDPOINT_URL` and the shared files.
pub(crate) fn endpoint(backend: &CachedBackend, attributes: [&str; 2], variables: [&str; 2]) -> Option<String> {
    let attribute = attributes.iter().find_map(|name| backend.string(name).map(ToOwned::to_owned));
    let endpoint = attribute.or_else(|| variables.iter().find_map(|name| set(name)))?;
    // OpenTofu puts the scheme in front (backend.go, `customEndpoint`); terraform does not get as far as to a lock.
    Some(if endpoint.contains("://") { endpoint } else { format!("https://{endpoint}") })
}

/// The shared files that the block or the environment names, in terraform's order. Without any, those at home.
pub(crate) struct SharedFiles {
    configs: Vec<PathBuf>,
    credentials: Vec<PathBuf>,
}

/// See [`SharedFiles`].
pub(crate) fn shared_files(backend: &CachedBackend) -> SharedFiles {
    let listed = |name: &str| backend.strings(name).into_iter().map(ToOwned::to_owned).collect::<Vec<_>>();
    let or =
        |files: Vec<String>, other: Option<String>| if files.is_empty() { other.into_iter().collect() } else { files };
    let configs = or(listed("shared_config_files"), set("AWS_SHARED_CONFIG_FILE"));
    let credentials = or(listed("shared_credentials_files"), set("AWS_SHARED_CREDENTIALS_FILE"));
    let credentials = or(credentials, backend.string("shared_credentials_file").map(ToOwned::to_owned));
    let expanded = |files: Vec<String>| files.iter().map(|file| PathBuf::from(expand(file))).collect();
    SharedFiles { configs: expanded(configs), credentials: expanded(credentials) }
}

impl SharedFiles {
    /// Those that are there: Go's SDK passes the others over, and the one for Rust would not have any of them then. One
    /// that is no regular file is not read: a release must not wait for it.
    pub(crate) fn builder(&self) -> aws_runtime::env_config::file::Builder {
        let mut files = EnvConfigFiles::builder()
            .include_default_config_file(self.configs.is_empty() && unreadable_default().is_none())
            .include_default_credentials_file(self.credentials.is_empty());
        for (kind, paths) in
            [(EnvConfigFileKind::Config, &self.configs), (EnvConfigFileKind::Credentials, &self.credentials)]
        {
            for path in paths.iter().filter(|path| plain_file::is_plain(path)) {
                files = files.with_file(kind, path);
            }
        }
        files
    }

    /// One that is not there, or cannot be read at once.
    pub(crate) fn absent(&self) -> Option<PathBuf> {
        let named = self.configs.iter().chain(&self.credentials).find(|path| !plain_file::is_plain(path)).cloned();
        named.or_else(|| unreadable_default().filter(|_| self.configs.is_empty()))
    }
}

/// The file that the SDK itself takes for the default one, if that is there and no regular file.
fn unreadable_default() -> Option<PathBuf> {
    set("AWS_CONFIG_FILE").map(PathBuf::from).filter(|path| path.exists() && !plain_file::is_plain(path))
}

/// The profile that is named: by the block, or in one of the two variables that Go's SDK knows.
pub(crate) fn profile_name(backend: &CachedBackend, set: impl Fn(&str) -> Option<String>) -> Option<String> {
    let named = backend.string("profile").map(ToOwned::to_owned);
    named.or_else(|| set("AWS_PROFILE")).or_else(|| set("AWS_DEFAULT_PROFILE"))
}

/// `$NAME`, `${NAME}` and then `~` in a path, as terraform expands them (aws-sdk-go-base, internal/expand; os.ExpandEnv).
pub(crate) fn expand(path: &str) -> OsString {
    expand_by(path, |name| std::env::var_os(name))
}

fn expand_by(path: &str, variable: impl Fn(&str) -> Option<OsString>) -> OsString {
    let mut expanded = String::new();
    let mut rest = path;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let (name, behind) = match rest.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some(parts) => parts,
            None => rest.split_at(
                rest.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').unwrap_or(rest.len()),
            ),
        };
        if name.is_empty() {
            expanded.push('$');
        } else {
            expanded.push_str(&variable(name).and_then(|value| value.into_string().ok()).unwrap_or_default());
        }
        rest = behind;
    }
    expanded.push_str(rest);
    match (expanded.strip_prefix('~'), variable("HOME")) {
        (Some(rest), Some(mut home)) if rest.is_empty() || rest.starts_with('/') => {
            home.push(rest);
            home
        }
        _ => expanded.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_expanded_as_terraform_does() {
        let at_home = |name: &str| (name == "HOME").then(|| OsString::from("/home/anna"));
        for (path, expected) in [
            ("/a/b", "/a/b"),
            ("~/x", "/home/anna/x"),
            ("~", "/home/anna"),
            ("~anna/x", "~anna/x"),
            ("$HOME/x", "/home/anna/x"),
            ("${HOME}/x", "/home/anna/x"),
            ("/a/$NOT_SET_ANYWHERE/x", "/a//x"),
            ("/a$", "/a$"),
        ] {
            assert_eq!(expand_by(path, at_home), OsString::from(expected), "{path}");
        }
        assert_eq!(expand_by("~/x", |_| None), OsString::from("~/x"));
    }
}
