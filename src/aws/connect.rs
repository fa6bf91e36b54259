//! Reaching AWS as the backend block and the environment of the run say, or not at all.
//!
//! What is followed and what is not stands in [`crate::aws::attributes`]. An attribute that changes whom or what we reach, and
//! that we cannot follow, makes the release a doubt: under another identity, or in another place, a lock that is not seen
//! is not gone.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use aws_config::provider_config::ProviderConfig;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_runtime::env_config::section::EnvConfigSections;
use aws_types::os_shim_internal::{Env, Fs};

use crate::aws::attributes;
use crate::aws::attributes::Treatment;
use crate::aws::causes::causes;
use crate::aws::credentials;
use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::aws::network::{Network, usable};
use crate::aws::proxies::Proxies;
use crate::sys::plain_file;
use crate::terraform::backend::CachedBackend;

/// The account that the credentials of this moment belong to, as STS says. `None` where it does not answer.
pub(crate) async fn account(backend: &CachedBackend) -> Option<String> {
    let config = connect(backend, Purpose::Work).await.ok()?;
    let answer = credentials::sts(backend, &config).get_caller_identity().send().await.ok()?;
    answer.account
}

/// Whose the credentials of this moment are, as STS says: an ARN.
///
/// # Errors
/// Why it does not say.
pub(crate) async fn identity(backend: &CachedBackend) -> Result<String, String> {
    let config = connect(backend, Purpose::Work).await.map_err(|error| error.to_string())?;
    match credentials::sts(backend, &config).get_caller_identity().send().await {
        Ok(answer) => answer.arn.ok_or_else(|| "no answer".to_owned()),
        Err(error) => Err(Failure::of_request("STS", "sts:GetCallerIdentity", &error).to_string()),
    }
}

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

/// What the sources of credentials have given in this process, or why they gave none. Nobody is asked twice: a release
/// connects several times, and what asks a person must not ask again for each.
static RESOLVED: Mutex<Vec<Resolved>> = Mutex::new(Vec::new());

fn resolved() -> MutexGuard<'static, Vec<Resolved>> {
    RESOLVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one question for credentials came to.
struct Resolved {
    backend: CachedBackend,
    purpose: Purpose,
    /// When it was answered.
    at: Instant,
    result: Result<Credentials, Unreachable>,
}

impl Resolved {
    /// Whether it is an answer for `purpose` too. Credentials are good for everything while they last; that none were to be had
    /// for an explanation, within a moment and without asking a person, says nothing of a release.
    fn answers(&self, purpose: Purpose) -> bool {
        match &self.result {
            Ok(credentials) => !self.is_over(credentials),
            // A service that was away for a moment may be back.
            Err(Unreachable::Silent(_)) if purpose == Purpose::Work => false,
            Err(_) => self.purpose == Purpose::Work || purpose == Purpose::Explanation,
        }
    }

    /// Whether credentials end so soon that a request with them may be refused. Some are given with an end in the past, by a
    /// clock that is wrong: those are not asked for again at once.
    fn is_over(&self, credentials: &Credentials) -> bool {
        const MARGIN: Duration = Duration::from_secs(30);
        self.at.elapsed() > MARGIN && credentials.expiry().is_some_and(|until| until < SystemTime::now() + MARGIN)
    }
}

/// Forgets the credentials of `backend`, which a service says are over.
pub(crate) fn forget_credentials(backend: &CachedBackend) {
    resolved().retain(|known| known.backend != *backend);
}

/// A connection's settings, with credentials. These are asked for once in the life of this process, and again when they
/// are over.
///
/// # Errors
/// [`Unreachable`].
pub(crate) async fn connect(backend: &CachedBackend, purpose: Purpose) -> Result<SdkConfig, Unreachable> {
    if let Some(attribute) = not_followed(backend) {
        return Err(Unreachable::Attribute(attribute));
    }
    let files = shared_files(backend);
    let profile = profile(backend, &files).await;
    let network = Network {
        proxies: proxies(backend, set),
        authorities: authorities(backend, profile.as_ref().ok())?,
        insecure: backend.flag("insecure"),
    };
    let client = network.client();
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(3))
        .operation_attempt_timeout(Duration::from_secs(8))
        .build();
    let retries = RetryConfig::standard().with_max_attempts(3);
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .retry_config(retries.clone())
        .timeout_config(timeouts)
        .http_client(client.clone())
        .profile_files(files.builder().build())
        .no_credentials();
    if let Some(region) = backend.string("region") {
        loader = loader.region(Region::new(region.to_owned()));
    }
    if let Some(profile) = profile_name(backend, set) {
        loader = loader.profile_name(profile);
    }
    if backend.flag("use_fips_endpoint") {
        loader = loader.use_fips(true);
    }
    if backend.flag("use_dualstack_endpoint") {
        loader = loader.use_dual_stack(true);
    }
    let config = loader.load().await;
    // The SDK's own calls of STS, for a role of a profile, are in that region only where STS has an endpoint
    // (aws-sdk-go-base, endpoints.go).
    let region = backend.string("sts_region").filter(|_| credentials::sts_endpoint(backend).is_some());
    let region = region.map(|region| Region::new(region.to_owned())).or_else(|| config.region().cloned());
    // Who gives credentials may take longer than a request: they are asked for once, before any clock of ours runs.
    let patient = TimeoutConfig::builder().connect_timeout(Duration::from_secs(3)).build();
    let for_credentials = config.to_builder().timeout_config(patient.clone()).build();
    let for_providers = ProviderConfig::without_region()
        .with_region(region)
        .with_use_fips(config.use_fips())
        .with_use_dual_stack(config.use_dual_stack())
        .with_behavior_version(Some(BehaviorVersion::latest()))
        .with_http_client(client)
        .with_retry_config(retries)
        .with_timeout_config(patient);
    let known = resolved()
        .iter()
        .find(|known| known.backend == *backend && known.answers(purpose))
        .map(|known| known.result.clone());
    let credentials = if let Some(known) = known {
        known?
    } else {
        let sections = profile.as_ref().map_err(String::as_str);
        let result = credentials::resolve((backend, purpose), sections, &for_providers, &for_credentials).await;
        forget_credentials(backend);
        resolved().push(Resolved { backend: backend.clone(), purpose, at: Instant::now(), result: result.clone() });
        result?
    };
    Ok(config.into_builder().credentials_provider(SharedCredentialsProvider::new(credentials)).build())
}

/// The endpoint for one service: the attribute, its deprecated form, or a variable. What is left follows the SDK:
/// `AWS_ENDPOINT_URL` and the shared files.
pub(crate) fn endpoint(backend: &CachedBackend, attributes: [&str; 2], variables: [&str; 2]) -> Option<String> {
    let attribute = attributes.iter().find_map(|name| backend.string(name).map(ToOwned::to_owned));
    let endpoint = attribute.or_else(|| variables.iter().find_map(|name| set(name)))?;
    // OpenTofu puts the scheme in front (backend.go, `customEndpoint`); terraform does not get as far as to a lock.
    Some(if endpoint.contains("://") { endpoint } else { format!("https://{endpoint}") })
}

fn not_followed(backend: &CachedBackend) -> Option<String> {
    let is_unknown = |name: &str| attributes::of_attribute(name) == Treatment::NotFollowed;
    backend.set_attributes().find_map(|outer| match outer {
        "endpoints" | "assume_role" | "assume_role_with_web_identity" => {
            let mut names = backend.nested(outer).into_iter().map(|inner| format!("{outer}.{inner}"));
            names.find(|name| is_unknown(name))
        }
        name => is_unknown(name).then(|| name.to_owned()),
    })
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
    fn absent(&self) -> Option<PathBuf> {
        let named = self.configs.iter().chain(&self.credentials).find(|path| !plain_file::is_plain(path)).cloned();
        named.or_else(|| unreadable_default().filter(|_| self.configs.is_empty()))
    }
}

/// The file that the SDK itself takes for the default one, if that is there and no regular file.
fn unreadable_default() -> Option<PathBuf> {
    set("AWS_CONFIG_FILE").map(PathBuf::from).filter(|path| path.exists() && !plain_file::is_plain(path))
}

/// The shared files as the profile that is used sees them.
///
/// # Errors
/// Why they cannot be read, in words. A file that is named and not there is an error if the profile is in none of the
/// others: it may have been there when the run began.
async fn profile(backend: &CachedBackend, shared: &SharedFiles) -> Result<EnvConfigSections, String> {
    let (files, name) = (shared.builder().build(), profile_name(backend, set));
    let sections = aws_config::profile::load(&Fs::real(), &Env::real(), &files, name.map(Into::into)).await;
    let sections = sections.map_err(|error| causes(&error))?;
    match shared.absent() {
        Some(path) if sections.get_profile(sections.selected_profile()).is_none() => {
            Err(format!("{} is not there, or is no regular file", path.display()))
        }
        _ => Ok(sections),
    }
}

/// The shared files of now, as the profile that is used sees them.
///
/// # Errors
/// See [`profile`].
pub(crate) async fn profile_of(backend: &CachedBackend) -> Result<EnvConfigSections, String> {
    profile(backend, &shared_files(backend)).await
}

/// The profile that is named: by the block, or in one of the two variables that Go's SDK knows.
pub(crate) fn profile_name(backend: &CachedBackend, set: impl Fn(&str) -> Option<String>) -> Option<String> {
    let named = backend.string("profile").map(ToOwned::to_owned);
    named.or_else(|| set("AWS_PROFILE")).or_else(|| set("AWS_DEFAULT_PROFILE"))
}

/// aws-sdk-go-base, internal/config/config.go, `HTTPProxyMode`: an attribute goes before its variable, also when it is
/// empty. In Terraform `http_proxy` of the block serves https as well, where nothing else says what does.
fn proxies(backend: &CachedBackend, set: impl Fn(&str) -> Option<String>) -> Proxies {
    let either = |upper: &str, lower: &str| set(upper).or_else(|| set(lower));
    let [plain, secure] = ["http_proxy", "https_proxy"].map(|name| backend.text(name).map(ToOwned::to_owned));
    let mut https = either("HTTPS_PROXY", "https_proxy");
    if https.is_none() && !backend.is_opentofu() {
        https.clone_from(&plain);
    }
    let http = plain.or_else(|| either("HTTP_PROXY", "http_proxy"));
    let no = backend.string("no_proxy").map(ToOwned::to_owned).or_else(|| either("NO_PROXY", "no_proxy"));
    Proxies::new(http, secure.or(https), no.as_deref())
}

/// The authorities that are trusted in place of the system's.
fn authorities(backend: &CachedBackend, profile: Option<&EnvConfigSections>) -> Result<Option<Vec<u8>>, Unreachable> {
    let named = backend.string("custom_ca_bundle").map(ToOwned::to_owned).or_else(|| set("AWS_CA_BUNDLE"));
    let path = named.map(|path| expand(&path));
    let path = path.or_else(|| profile.and_then(|profile| profile.get("ca_bundle")).map(OsString::from));
    let Some(path) = path else { return Ok(None) };
    let pem = plain_file::read(Path::new(&path)).map_err(|error| error.to_string());
    match pem.and_then(|pem| usable(&pem).ok_or_else(|| "there is none in it".to_owned())) {
        Ok(pem) => Ok(Some(pem)),
        Err(reason) => Err(Unreachable::Certificates { path: path.to_string_lossy().into_owned(), reason }),
    }
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
    use crate::terraform::backend::tests::backend;

    #[test]
    fn what_cannot_be_followed_is_named() {
        for (config, expected) in [
            (r#"{"bucket":"b","region":"r","encrypt":true,"skip_region_validation":true}"#, None),
            (r#"{"insecure":true,"http_proxy":"http://x","sts_region":"r"}"#, None),
            (r#"{"endpoints":{"sts":"http://x","sso":"http://x"}}"#, None),
            (r#"{"assume_role":{"role_arn":"a","source_identity":"x","transitive_tag_keys":["a"]}}"#, None),
            (r#"{"an_attribute_of_tomorrow":"x"}"#, Some("an_attribute_of_tomorrow")),
            (r#"{"an_attribute_of_tomorrow":null}"#, None),
            (r#"{"endpoints":{"glacier":"http://x"}}"#, Some("endpoints.glacier")),
            (r#"{"assume_role":{"role_arn":"a","tomorrow":"x"}}"#, Some("assume_role.tomorrow")),
        ] {
            assert_eq!(not_followed(&backend(config)).as_deref(), expected, "{config}");
        }
    }

    #[test]
    fn in_terraform_a_proxy_for_http_serves_https_too() {
        let choose = |config: &str, opentofu: bool| {
            let marker = if opentofu { r#""state_tags":null,"# } else { "" };
            let proxies = proxies(&backend(&format!("{{{marker}{config}}}")), |_| None);
            proxies.choose("https", "s3.example", 443).map(ToOwned::to_owned)
        };
        assert_eq!(choose(r#""http_proxy":"http://p""#, false).as_deref(), Some("http://p"));
        assert_eq!(choose(r#""http_proxy":"http://p""#, true), None);
        assert_eq!(choose(r#""http_proxy":"http://p","https_proxy":"http://q""#, false).as_deref(), Some("http://q"));
        assert_eq!(choose(r#""http_proxy":"http://p","https_proxy":"""#, false), None);
        assert_eq!(choose(r#""http_proxy":"http://p","no_proxy":"s3.example""#, false), None);
    }

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
