//! Reaching AWS as the backend block and the environment of the run say, or not at all.
//!
//! An attribute that changes whom or what we reach, and that we cannot follow, makes the release a doubt: under another
//! identity, or in another place, a lock that is not seen is not gone.

use std::ffi::OsString;
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::sts::AssumeRoleProvider;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};

use crate::terraform::backend::CachedBackend;

/// Attributes that we follow here, in `dynamodb` or in `s3`.
const FOLLOWED: [&str; 19] = [
    "bucket",
    "key",
    "workspace_key_prefix",
    "dynamodb_table",
    "use_lockfile",
    "region",
    "profile",
    "access_key",
    "secret_key",
    "token",
    "endpoint",
    "dynamodb_endpoint",
    "endpoints",
    "shared_config_files",
    "shared_credentials_file",
    "shared_credentials_files",
    "use_path_style",
    "force_path_style",
    "assume_role",
];

/// More of them, from the network's side.
const FOLLOWED_NETWORK: [&str; 3] = ["use_fips_endpoint", "use_dualstack_endpoint", "custom_ca_bundle"];

/// Attributes that cannot matter to a release: how objects are written, what is checked first, how often is retried.
const WITHOUT_EFFECT: [&str; 14] = [
    "acl",
    "allowed_account_ids",
    "encrypt",
    "forbidden_account_ids",
    "iam_endpoint",
    "kms_key_id",
    "max_retries",
    "retry_mode",
    "skip_credentials_validation",
    "skip_metadata_api_check",
    "skip_region_validation",
    "skip_requesting_account_id",
    "skip_s3_checksum",
    "state_tags",
];

/// What is followed inside nested attributes.
const FOLLOWED_NESTED: [(&str, &[&str]); 2] = [
    ("endpoints", &["s3", "dynamodb", "iam"]),
    ("assume_role", &["role_arn", "session_name", "external_id", "duration", "policy", "policy_arns", "tags"]),
];

/// Whether the attribute cannot matter to whom and what we reach.
pub(crate) fn has_no_effect(name: &str) -> bool {
    WITHOUT_EFFECT.contains(&name)
}

/// Whether the attribute (`outer.inner` for a nested one) is known to hold no secret, in a form that we can follow.
pub(crate) fn holds_no_secret(name: &str) -> bool {
    const SECRET: [&str; 4] = ["access_key", "secret_key", "token", "assume_role.external_id"];
    let followed = match name.split_once('.') {
        None => FOLLOWED.contains(&name) || FOLLOWED_NETWORK.contains(&name),
        Some((outer, inner)) => {
            FOLLOWED_NESTED.iter().any(|(name, followed)| *name == outer && followed.contains(&inner))
        }
    };
    followed && !SECRET.contains(&name)
}

/// The account that the credentials of this moment belong to, as STS says. `None` where it does not answer.
pub(crate) async fn account(backend: &CachedBackend) -> Option<String> {
    let config = connect(backend).await.ok()?;
    let answer = aws_sdk_sts::Client::new(&config).get_caller_identity().send().await.ok()?;
    answer.account
}

/// Whose the credentials of this moment are, as STS says: an ARN.
///
/// # Errors
/// Why it does not say.
pub(crate) async fn identity(backend: &CachedBackend) -> Result<String, String> {
    let config = connect(backend).await.map_err(|error| error.to_string())?;
    match aws_sdk_sts::Client::new(&config).get_caller_identity().send().await {
        Ok(answer) => answer.arn.ok_or_else(|| "no answer".to_owned()),
        Err(error) => Err(aws_sdk_sts::error::DisplayErrorContext(&error).to_string()),
    }
}

/// Why AWS cannot be reached as terraform did.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreachable {
    /// An attribute of the backend block.
    #[error("the backend sets {0}, which tf cannot follow")]
    Attribute(String),
    /// The file with certificate authorities.
    #[error("the certificates in {path} cannot be used: {reason}")]
    Certificates {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `assume_role.duration`.
    #[error("the backend's assume_role.duration {0:?} is not a time such as 1h30m")]
    Duration(String),
}

/// A connection's settings. Credentials are resolved anew each time that this is made.
///
/// # Errors
/// [`Unreachable`].
pub(crate) async fn connect(backend: &CachedBackend) -> Result<SdkConfig, Unreachable> {
    if let Some(attribute) = not_followed(backend) {
        return Err(Unreachable::Attribute(attribute));
    }
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(3))
        .operation_attempt_timeout(Duration::from_secs(8))
        .build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .retry_config(RetryConfig::standard().with_max_attempts(3))
        .timeout_config(timeouts);
    if let Some(client) = client_with_certificates(backend)? {
        loader = loader.http_client(client);
    }
    if let Some(region) = backend.string("region") {
        loader = loader.region(Region::new(region.to_owned()));
    }
    if let Some(profile) = backend.string("profile") {
        loader = loader.profile_name(profile);
    }
    if let Some(files) = profile_files(backend) {
        loader = loader.profile_files(files);
    }
    if let (Some(key), Some(secret)) = (backend.string("access_key"), backend.string("secret_key")) {
        let token = backend.string("token").map(ToOwned::to_owned);
        loader = loader.credentials_provider(Credentials::new(key, secret, token, None, "backend"));
    }
    if backend.flag("use_fips_endpoint") {
        loader = loader.use_fips(true);
    }
    if backend.flag("use_dualstack_endpoint") {
        loader = loader.use_dual_stack(true);
    }
    let config = loader.load().await;
    match backend.string("assume_role.role_arn") {
        None => Ok(config),
        Some(role) => assume(backend, role, config).await,
    }
}

/// The endpoint for one service: the attribute, its deprecated form, or the deprecated variable. `AWS_ENDPOINT_URL` and
/// its service's own variant are followed by the SDK.
pub(crate) fn endpoint(
    backend: &CachedBackend,
    attributes: [&str; 2],
    [variable, deprecated]: [&str; 2],
) -> Option<String> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    attributes
        .iter()
        .find_map(|name| backend.string(name).map(ToOwned::to_owned))
        .or_else(|| set(deprecated).filter(|_| set(variable).is_none()))
}

fn not_followed(backend: &CachedBackend) -> Option<String> {
    let assumes = !backend.nested("assume_role").is_empty();
    let plain = backend.set_attributes().find(|name| match *name {
        // Set to false it says what is so without it.
        "insecure" => backend.flag("insecure"),
        // Nobody asks STS where no role is assumed.
        "sts_endpoint" | "sts_region" => assumes,
        name => ![&FOLLOWED[..], &FOLLOWED_NETWORK, &WITHOUT_EFFECT].iter().any(|list| list.contains(&name)),
    });
    plain.map(ToOwned::to_owned).or_else(|| {
        FOLLOWED_NESTED.iter().find_map(|(outer, followed)| {
            let mut inner = backend.nested(outer).into_iter().filter(|inner| assumes || *inner != "sts");
            let inner = inner.find(|inner| !followed.contains(inner))?;
            Some(format!("{outer}.{inner}"))
        })
    })
}

fn profile_files(backend: &CachedBackend) -> Option<EnvConfigFiles> {
    let configs = backend.strings("shared_config_files");
    let mut credentials = backend.strings("shared_credentials_files");
    credentials.extend(backend.string("shared_credentials_file"));
    if configs.is_empty() && credentials.is_empty() {
        return None;
    }
    let mut files = EnvConfigFiles::builder();
    if configs.is_empty() {
        files = files.include_default_config_file(true);
    }
    if credentials.is_empty() {
        files = files.include_default_credentials_file(true);
    }
    for file in configs {
        files = files.with_file(EnvConfigFileKind::Config, expand_home(file));
    }
    for file in credentials {
        files = files.with_file(EnvConfigFileKind::Credentials, expand_home(file));
    }
    Some(files.build())
}

/// Terraform expands `~` in these (aws-sdk-go-base, internal/expand).
fn expand_home(path: &str) -> OsString {
    match (path.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(mut home)) => {
            home.push("/");
            home.push(rest);
            home
        }
        _ => path.into(),
    }
}

async fn assume(backend: &CachedBackend, role: &str, config: SdkConfig) -> Result<SdkConfig, Unreachable> {
    let mut provider = AssumeRoleProvider::builder(role).configure(&config);
    provider = provider.session_name(backend.string("assume_role.session_name").unwrap_or("tf-lock-release"));
    if let Some(id) = backend.string("assume_role.external_id") {
        provider = provider.external_id(id);
    }
    if let Some(policy) = backend.string("assume_role.policy") {
        provider = provider.policy(policy);
    }
    let arns = backend.strings("assume_role.policy_arns");
    if !arns.is_empty() {
        provider = provider.policy_arns(arns.into_iter().map(ToOwned::to_owned).collect());
    }
    if let Some(text) = backend.string("assume_role.duration") {
        provider = provider.session_length(go_duration(text).ok_or_else(|| Unreachable::Duration(text.to_owned()))?);
    }
    let tags = backend.pairs("assume_role.tags");
    if !tags.is_empty() {
        provider = provider.tags(tags);
    }
    let provider = provider.build().await;
    let shared = aws_credential_types::provider::SharedCredentialsProvider::new(provider);
    Ok(config.into_builder().credentials_provider(shared).build())
}

/// A Go duration in whole units: `15m`, `1h30m`, `900s`.
fn go_duration(text: &str) -> Option<Duration> {
    let mut seconds: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|character: char| !character.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        let unit = match rest.as_bytes()[digits] {
            b'h' => 3600,
            b'm' => 60,
            b's' => 1,
            _ => return None,
        };
        seconds = seconds.checked_add(number.checked_mul(unit)?)?;
        rest = &rest[digits + 1..];
    }
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

/// A client that trusts the authorities of `custom_ca_bundle` or `AWS_CA_BUNDLE` alone, as terraform's does.
fn client_with_certificates(
    backend: &CachedBackend,
) -> Result<Option<aws_sdk_s3::config::SharedHttpClient>, Unreachable> {
    use aws_smithy_http_client::tls;
    let attribute = backend.string("custom_ca_bundle").map(ToOwned::to_owned);
    let bundle = attribute.or_else(|| std::env::var("AWS_CA_BUNDLE").ok().filter(|path| !path.is_empty()));
    let Some(path) = bundle else { return Ok(None) };
    let unusable = |reason: String| Unreachable::Certificates { path: path.clone(), reason };
    let certificates = std::fs::read(expand_home(&path)).map_err(|error| unusable(error.to_string()))?;
    let trusted = tls::TrustStore::empty().with_pem_certificate(certificates);
    let context =
        tls::TlsContext::builder().with_trust_store(trusted).build().map_err(|error| unusable(error.to_string()))?;
    let client = aws_smithy_http_client::Builder::new()
        .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc))
        .tls_context(context)
        .build_https();
    Ok(Some(client))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::backend::tests::backend;

    #[test]
    fn what_cannot_be_followed_is_named() {
        for (config, expected) in [
            (r#"{"bucket":"b","region":"r","encrypt":true,"skip_region_validation":true}"#, None),
            (r#"{"insecure":false}"#, None),
            (r#"{"endpoints":{"sts":"http://x"},"sts_region":"r"}"#, None),
            (r#"{"sts_region":"r","assume_role":{"role_arn":"a"}}"#, Some("sts_region")),
            (r#"{"endpoints":{"sts":"http://x"},"assume_role":{"role_arn":"a"}}"#, Some("endpoints.sts")),
            (r#"{"insecure":true}"#, Some("insecure")),
            (r#"{"http_proxy":"http://x"}"#, Some("http_proxy")),
            (r#"{"an_attribute_of_tomorrow":"x"}"#, Some("an_attribute_of_tomorrow")),
            (r#"{"endpoints":{"sso":"http://x"}}"#, Some("endpoints.sso")),
            (r#"{"assume_role":{"role_arn":"a","source_identity":"x"}}"#, Some("assume_role.source_identity")),
        ] {
            assert_eq!(not_followed(&backend(config)).as_deref(), expected, "{config}");
        }
    }

    #[test]
    fn a_go_duration_is_read() {
        assert_eq!(go_duration("1h30m"), Some(Duration::from_mins(90)));
        assert_eq!(go_duration("900s"), Some(Duration::from_mins(15)));
        for text in ["", "900", "1d", "-1h", "1.5h"] {
            assert_eq!(go_duration(text), None, "{text:?}");
        }
    }
}
