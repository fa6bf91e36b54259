//! The settings for connecting to AWS, from the backend block, the environment and the shared files, read as terraform
//! reads them.

use std::ffi::OsString;
use std::path::PathBuf;

use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};

use crate::sys::plain_file;
use crate::terraform::backend::CachedBackend;

/// Why `tf` cannot connect to AWS as terraform did.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Unreachable {
    /// The backend block sets this attribute, which `tf` does not support.
    #[error("the backend sets {0}, which tf does not support")]
    Attribute(String),
    /// The selected profile sets this key, which `tf` does not support.
    #[error("the profile sets {0}, which tf does not support")]
    ProfileKey(&'static str),
    /// One of the shared files is invalid or missing. The text is the reason.
    #[error("the shared files cannot be used: {0}")]
    SharedFiles(String),
    /// The backend block or a variable names this profile, but it is in none of the shared files.
    #[error("the profile {0} is in none of the shared files")]
    Profile(String),
    /// The backend block sets only one of two attributes that belong together. The text describes the incomplete part.
    #[error("the backend sets {0}")]
    Incomplete(&'static str),
    /// The file with certificate authorities cannot be read, or contains no usable certificate.
    #[error("the certificates in {path} cannot be used: {reason}")]
    Certificates {
        /// The path of the file.
        path: String,
        /// Why the file cannot be used.
        reason: String,
    },
    /// The endpoint of the instance metadata service, which provides the instance's credentials, is invalid.
    #[error("the endpoint of the instance metadata service cannot be used: {0}")]
    Metadata(String),
    /// The source returned no credentials. The text is the reason.
    #[error("{0}")]
    Credentials(String),
    /// The service that issues the credentials did not respond, or could not issue them at the moment. A second attempt
    /// may succeed, and it does not prompt a person.
    #[error("{0}")]
    Silent(String),
    /// Neither the backend, nor the environment, nor the profile names a region.
    #[error("no region is set")]
    Region,
    /// The region or a part of the credentials contains a character that no request can contain. The text says which of
    /// them, without its value.
    #[error("the {0} contains a space, a line break or another character that it cannot have")]
    Unsendable(&'static str),
    /// The `duration` of a role is not a duration in Go's format.
    #[error("the backend's duration {0:?} for a role is not a time such as 1h30m")]
    Duration(String),
}

impl Unreachable {
    /// Whether a later attempt may succeed. For example, a missing file may exist by then, but an attribute does not
    /// change.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Certificates { .. }
                | Self::SharedFiles(_)
                | Self::Profile(_)
                | Self::Credentials(_)
                | Self::Silent(_)
                | Self::Region
                | Self::Unsendable(_)
        )
    }
}

/// Returns the value of the environment variable `name`. `None` if it is unset, empty or not UTF-8.
pub(crate) fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Returns the endpoint of one service: from the attribute, its deprecated form, or a variable, in this order. `None`
/// if none of them is set. In this case, the SDK uses `AWS_ENDPOINT_URL` and the shared files.
pub(crate) fn endpoint(backend: &CachedBackend, attributes: [&str; 2], variables: [&str; 2]) -> Option<String> {
    let attribute = attributes.iter().find_map(|name| backend.string(name).map(ToOwned::to_owned));
    let endpoint = attribute.or_else(|| variables.iter().find_map(|name| set(name)))?;
    // If the scheme is missing, OpenTofu adds it (backend.go, `customEndpoint`). Terraform fails before it takes a
    // lock.
    Some(if endpoint.contains("://") { endpoint } else { format!("https://{endpoint}") })
}

/// The shared files that the backend block or the environment names, in terraform's order. If `configs` is empty, the
/// SDK reads the file in `AWS_CONFIG_FILE`, or else `~/.aws/config`. If `credentials` is empty, the SDK reads
/// `~/.aws/credentials`.
pub(crate) struct SharedFiles {
    configs: Vec<PathBuf>,
    credentials: Vec<PathBuf>,
}

/// Returns the [`SharedFiles`] for `backend` and the environment.
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
    /// Returns a builder with the files that exist. A missing file is left out, because the AWS SDK for Go skips it,
    /// and the SDK for Rust would load none of the files. A file that is not a regular file is left out too, because
    /// reading it could block a release.
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

    /// Returns the first file that is missing, or is not a regular file and could block the reader. `None` if there is
    /// no such file.
    pub(crate) fn absent(&self) -> Option<PathBuf> {
        let named = self.configs.iter().chain(&self.credentials).find(|path| !plain_file::is_plain(path)).cloned();
        named.or_else(|| unreadable_default().filter(|_| self.configs.is_empty()))
    }
}

/// Returns the file in `AWS_CONFIG_FILE`, which the SDK uses as the default config file, if the file exists and is not
/// a regular file. `None` otherwise.
fn unreadable_default() -> Option<PathBuf> {
    set("AWS_CONFIG_FILE").map(PathBuf::from).filter(|path| path.exists() && !plain_file::is_plain(path))
}

/// Returns the name of the profile from the block, or from one of the two variables that the AWS SDK for Go reads.
/// `None` if none of them names a profile.
pub(crate) fn profile_name(backend: &CachedBackend, set: impl Fn(&str) -> Option<String>) -> Option<String> {
    let named = backend.string("profile").map(ToOwned::to_owned);
    named.or_else(|| set("AWS_PROFILE")).or_else(|| set("AWS_DEFAULT_PROFILE"))
}

/// Expands `$NAME` and `${NAME}`, and then `~`, in a path as terraform does (aws-sdk-go-base, internal/expand;
/// os.ExpandEnv).
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

    #[test]
    fn any_path_is_expanded_without_a_panic_and_one_without_variables_is_not_changed() {
        use proptest::prelude::*;
        let strategy = (crate::generated_input::changed_text("~/.aws/${PROFILE}/$HOME-$1$"), "[^$~]{0,20}");
        crate::generated_input::for_all(file!(), &strategy, |(path, plain)| {
            let _ = expand_by(&path, |name| (name.len() % 2 == 0).then(|| "$A${B}~".into()));
            prop_assert_eq!(expand_by(&plain, |_| None), OsString::from(&plain));
            Ok(())
        });
    }
}
