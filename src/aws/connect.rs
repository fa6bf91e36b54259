//! Connects to AWS exactly as the backend block and the environment of the run require, or not at all.
//!
//! [`crate::aws::attributes`] lists the settings that `tf` supports. If the block has an attribute that `tf` does not
//! support, `tf` does not release the lock. Such an attribute may change the identity or the endpoint. With another
//! identity or another endpoint, `tf` could wrongly conclude that the lock does not exist.

use std::ffi::OsString;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use aws_config::provider_config::ProviderConfig;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_runtime::env_config::section::EnvConfigSections;
use aws_types::os_shim_internal::{Env, Fs};

use super::settings::{SharedFiles, expand, profile_name, set, shared_files};
use crate::aws::attributes::Treatment;
use crate::aws::authorities::usable;
use crate::aws::causes::causes;
use crate::aws::credentials::{Purpose, Question};
use crate::aws::failure::Failure;
use crate::aws::network::Network;
use crate::aws::proxies::Proxies;
use crate::aws::settings::Unreachable;
use crate::aws::{attributes, credentials};
use crate::sys::plain_file;
use crate::terraform::backend::CachedBackend;

/// Asks STS which account the current credentials belong to. `None` if [`connect`] fails, if the request fails, or if
/// STS returns no account.
pub(crate) async fn account(backend: &CachedBackend) -> Option<String> {
    let config = connect(backend, Purpose::Work).await.ok()?;
    let answer = credentials::sts(backend, &config).get_caller_identity().send().await.ok()?;
    answer.account
}

/// Asks STS for the ARN of the identity that the current credentials belong to.
///
/// # Errors
/// The reason, as text, if [`connect`] fails, if the request fails, or if STS returns no ARN.
pub(crate) async fn identity(backend: &CachedBackend) -> Result<String, String> {
    let config = connect(backend, Purpose::Work).await.map_err(|error| error.to_string())?;
    match credentials::sts(backend, &config).get_caller_identity().send().await {
        Ok(answer) => answer.arn.ok_or_else(|| "no answer".to_owned()),
        Err(error) => Err(Failure::of_request("STS", "sts:GetCallerIdentity", &error).to_string()),
    }
}

/// For each backend, the credentials that this process has obtained, or the error. These results are reused: a release
/// connects several times, and a source that prompts a person must not prompt again for each connection.
static RESOLVED: Mutex<Vec<Resolved>> = Mutex::new(Vec::new());

fn resolved() -> MutexGuard<'static, Vec<Resolved>> {
    RESOLVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The credentials of one backend, or the error.
struct Resolved {
    backend: CachedBackend,
    purpose: Purpose,
    /// When the credentials or the error were received.
    at: Instant,
    result: Result<Credentials, Unreachable>,
}

impl Resolved {
    /// Whether this result can be used for `purpose`. Credentials can be used for every purpose until they expire. An
    /// error can always be used for [`Purpose::Explanation`]. It can be used for [`Purpose::Work`] only if it was
    /// received for [`Purpose::Work`] and a second attempt cannot succeed. An explanation has less time and may not
    /// prompt a person, so work may succeed where an explanation failed.
    fn answers(&self, purpose: Purpose) -> bool {
        match &self.result {
            Ok(credentials) => !self.is_over(credentials),
            // The service that issues the credentials may respond now.
            Err(Unreachable::Silent(_)) if purpose == Purpose::Work => false,
            Err(_) => self.purpose == Purpose::Work || purpose == Purpose::Explanation,
        }
    }

    /// Whether `credentials` have expired or expire within 30 s. A request with such credentials may be refused. In the
    /// first 30 s after the credentials were received, the result is always false. Without this rule, every connection
    /// would request credentials again if a wrong clock makes new credentials look expired.
    fn is_over(&self, credentials: &Credentials) -> bool {
        const EXPIRY_GRACE: Duration = Duration::from_secs(30);
        self.at.elapsed() > EXPIRY_GRACE
            && credentials.expiry().is_some_and(|until| until < SystemTime::now() + EXPIRY_GRACE)
    }
}

/// Removes the stored credentials of `backend`, for example because a service reports that they have expired.
pub(crate) fn forget_credentials(backend: &CachedBackend) {
    resolved().retain(|known| known.backend != *backend);
}

/// Returns the SDK's configuration for `backend`, with credentials. Credentials that this process has already obtained
/// for the backend are reused until they expire.
///
/// # Errors
/// [`Unreachable`] if the backend has an attribute that `tf` does not support, if the file with certificate authorities
/// cannot be used, or if there are no credentials.
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
    refuse_unsendable([("region", config.region().map(AsRef::as_ref))])?;
    // The SDK itself calls STS for a profile's role. As in terraform, `sts_region` applies to these calls only if an
    // STS endpoint is set (aws-sdk-go-base, endpoints.go).
    let region = backend.string("sts_region").filter(|_| credentials::sts_endpoint(backend).is_some());
    let region = region.map(|region| Region::new(region.to_owned())).or_else(|| config.region().cloned());
    // A source of credentials may take longer than a request to a lock service, and it is used only once, before the
    // timeout of a release starts. So only the attempt to connect has a timeout here.
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
        let result = credentials::resolve(Question {
            backend,
            purpose,
            sections,
            for_providers: &for_providers,
            config: &for_credentials,
        })
        .await;
        forget_credentials(backend);
        resolved().push(Resolved { backend: backend.clone(), purpose, at: Instant::now(), result: result.clone() });
        result?
    };
    let parts = [("access key ID", Some(credentials.access_key_id())), ("session token", credentials.session_token())];
    refuse_unsendable(parts)?;
    Ok(config.into_builder().credentials_provider(SharedCredentialsProvider::new(credentials)).build())
}

/// Checks the parts of requests that become part of a header, each with its name.
///
/// # Errors
/// [`Unreachable::Unsendable`] if a part contains a character that no header can contain, for example the carriage
/// return of a file from Windows. The SDK panics if it must sign a request with one.
fn refuse_unsendable<'a>(parts: impl IntoIterator<Item = (&'static str, Option<&'a str>)>) -> Result<(), Unreachable> {
    let is_sendable = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    match parts.into_iter().find(|(_, text)| !text.is_none_or(is_sendable)) {
        Some((what, _)) => Err(Unreachable::Unsendable(what)),
        None => Ok(()),
    }
}

fn not_followed(backend: &CachedBackend) -> Option<String> {
    let is_unknown = |name: &str| attributes::of_attribute(name) == Treatment::NotSupported;
    backend.set_attributes().find_map(|outer| match outer {
        "endpoints" | "assume_role" | "assume_role_with_web_identity" => {
            let mut names = backend.nested(outer).into_iter().map(|inner| format!("{outer}.{inner}"));
            names.find(|name| is_unknown(name))
        }
        name => is_unknown(name).then(|| name.to_owned()),
    })
}

/// Loads the shared files and selects the profile of `backend` or of the environment.
///
/// # Errors
/// Returns the reason, as text, if a file cannot be read or parsed. Also returns an error if a named file is missing or
/// is not a regular file, and no other file has the profile: when the run started, the profile may have been in that
/// file.
async fn profile(backend: &CachedBackend, shared: &SharedFiles) -> Result<EnvConfigSections, String> {
    let (files, name) = (shared.builder().build(), profile_name(backend, set));
    let sections = aws_config::profile::load(&Fs::real(), &Env::real(), &files, name.map(Into::into)).await;
    let sections = sections.map_err(|error| causes(&error))?;
    match shared.absent() {
        Some(path) if sections.get_profile(sections.selected_profile()).is_none() => {
            Err(format!("{} does not exist or is not a regular file", path.display()))
        }
        _ => Ok(sections),
    }
}

/// Loads the current shared files and selects the profile of `backend` or of the environment.
///
/// # Errors
/// Returns the reason, as text, in the same cases as [`profile`].
pub(crate) async fn profile_of(backend: &CachedBackend) -> Result<EnvConfigSections, String> {
    profile(backend, &shared_files(backend)).await
}

/// Returns the proxies for `backend` as terraform chooses them (aws-sdk-go-base, internal/config/config.go,
/// `HTTPProxyMode`). An `http_proxy` or `https_proxy` attribute overrides its variable, even if the attribute is empty.
/// In Terraform, but not in OpenTofu, the block's `http_proxy` is also the proxy for https if neither the block nor the
/// environment sets a proxy for https.
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

/// Returns the certificate authorities, in PEM, to trust instead of those of the system. `None` if no setting names a
/// file with certificate authorities.
///
/// # Errors
/// [`Unreachable::Certificates`] if the file cannot be read, or contains no usable certificate.
fn authorities(backend: &CachedBackend, profile: Option<&EnvConfigSections>) -> Result<Option<Vec<u8>>, Unreachable> {
    let named = backend.string("custom_ca_bundle").map(ToOwned::to_owned).or_else(|| set("AWS_CA_BUNDLE"));
    let path = named.map(|path| expand(&path));
    let path = path.or_else(|| profile.and_then(|profile| profile.get("ca_bundle")).map(OsString::from));
    let Some(path) = path else { return Ok(None) };
    let pem = plain_file::read(Path::new(&path)).map_err(|error| error.to_string());
    match pem.and_then(|pem| usable(&pem).ok_or_else(|| "the file contains none".to_owned())) {
        Ok(pem) => Ok(Some(pem)),
        Err(reason) => Err(Unreachable::Certificates { path: path.to_string_lossy().into_owned(), reason }),
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
    fn what_the_sdk_cannot_sign_is_named_and_its_value_is_not() {
        for (text, is_refused) in [
            ("eu-west-1", false),
            ("IQoJb3JpZ2luX2VjE/+=", false),
            ("eu-west-1\r", true),
            ("eu west", true),
            ("AKI\u{c4}", true),
            ("t\n", true),
        ] {
            let refused = refuse_unsendable([("x", None), ("region", Some(text))]);
            let said = refused.map_err(|error| error.to_string()).err().unwrap_or_default();
            assert_eq!(said.starts_with("the region contains"), is_refused, "{text:?}: {said}");
            assert!(!said.contains(text));
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
}
