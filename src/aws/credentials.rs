//! Finds the credentials for AWS in terraform's order (aws-sdk-go-base, credentials.go; the AWS SDK for Go,
//! config/resolve_credentials.go), which differs from the order of the SDK for Rust:
//!
//! 1. `access_key` and `secret_key` of the block.
//! 2. The block's `profile`. Keys in the environment are then ignored. Before version 1.6, such keys overrode the
//!    profile.
//! 3. Without a `profile` in the block: keys in the environment, or else a web identity in the environment, or else the
//!    environment's profile.
//! 4. If there is no profile, or the profile names no source of credentials: the container's credentials, or else the
//!    instance's.
//! 5. `assume_role_with_web_identity` replaces steps 2 to 4.
//! 6. `assume_role`: the role is assumed with the credentials from steps 1 to 5.

use std::cell::Cell;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use aws_config::ecs::EcsCredentialsProvider;
use aws_config::imds::credentials::ImdsCredentialsProvider;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::web_identity_token::WebIdentityTokenCredentialsProvider;
use aws_config::{SdkConfig, imds};
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, Result as Provided, SharedCredentialsProvider, future};
use aws_runtime::env_config::file::EnvConfigFileKind;
use aws_runtime::env_config::section::EnvConfigSections;
use aws_sdk_sts::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sts::types::{PolicyDescriptorType, Tag};

use super::settings::{Unreachable, endpoint, expand, profile_name, set, shared_files};
use crate::aws::attributes;
use crate::aws::attributes::Treatment;
use crate::aws::causes::causes;
use crate::aws::failure::Failure;
use crate::aws::resolver::Resolver;
use crate::sys::plain_file;
use crate::sys::shell_command::{self, Asks};
use crate::terraform::backend::CachedBackend;

/// The name of the session in which a role is assumed, if the block sets no session name.
const SESSION: &str = "tf-lock-release";

/// The lifetime of the `assume_role` session if the block has no `duration`. This is terraform's default
/// (aws-sdk-go-base, stscreds: 15 minutes).
const DEFAULT_SESSION_WINDOW: Duration = Duration::from_mins(15);

/// What the credentials are needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To release a lock, or to do something that a person has requested.
    Work,
    /// To explain something, or to search for a lock that most likely does not exist. No person is prompted for a
    /// password, and the time limit is short, so that nobody has to wait for long.
    Explanation,
}

impl Purpose {
    /// Returns the time limit for finding the credentials and assuming all roles.
    fn limit(self) -> Duration {
        match self {
            // A person may have to touch a hardware key or to log in.
            Self::Work => Duration::from_mins(1),
            // This is less than `release::EXPLANATION_TIMEOUT` (3 s), so that the failure is recorded before the
            // caller's own timeout. A second request then uses the recorded failure and does not start the source of
            // credentials again.
            Self::Explanation => Duration::from_millis(2500),
        }
    }
}

/// A request for credentials: for which backend, for which purpose and with which settings.
#[derive(Clone, Copy)]
pub(crate) struct Question<'a> {
    pub(crate) backend: &'a CachedBackend,
    pub(crate) purpose: Purpose,
    /// The shared files, or the reason why they cannot be read.
    pub(crate) sections: Result<&'a EnvConfigSections, &'a str>,
    /// The settings for the SDK's own sources of credentials: network, region, timeouts.
    pub(crate) for_providers: &'a ProviderConfig,
    /// The settings for STS.
    pub(crate) config: &'a SdkConfig,
}

/// The progress of one request for credentials.
#[derive(Default)]
struct Asked {
    /// The source that is in use now, for the message about a timeout.
    source: Cell<String>,
    /// Whether a `credential_process` was started.
    has_run_a_command: Cell<bool>,
}

/// Obtains the credentials once, within at most [`Purpose::limit`].
///
/// The SDK would obtain the credentials within each attempt of each request. A source that is slower than an attempt
/// would then never finish, and the SDK would start it again for each attempt. Each time, a person may have to log in
/// or to touch a hardware key, and an account may be locked after three attempts.
///
/// # Errors
/// [`Unreachable`] if a part of the block is incomplete or invalid, if the shared files or the profile cannot be used,
/// or if the source returns no credentials within the limit.
pub(crate) async fn resolve(question: Question<'_>) -> Result<Credentials, Unreachable> {
    let Question { backend, purpose, config, .. } = question;
    let asked = Asked::default();
    let resolved = async {
        let base = base(question, &asked).await?;
        let Some(role) = Role::of(backend)? else { return Ok(base) };
        asked.source.set(format!("STS, for the role {}", role.assumed.arn));
        let config = config.to_builder().credentials_provider(SharedCredentialsProvider::new(base)).build();
        role.with(sts(backend, &config)).ask().await.map_err(|error| no_credentials(&error))
    };
    let limit = purpose.limit();
    let resolved = tokio::time::timeout(limit, resolved).await.unwrap_or_else(|_| {
        let (source, limit) = (asked.source.take(), limit.as_secs_f32());
        Err(Unreachable::Credentials(format!("{source} returned no credentials within {limit} s")))
    });
    match resolved {
        // After `Silent`, the caller tries again. A second attempt would start the command a second time, so the error
        // becomes final here.
        Err(Unreachable::Silent(why)) if asked.has_run_a_command.get() => Err(Unreachable::Credentials(why)),
        resolved => resolved,
    }
}

/// Obtains the credentials as [`resolve`] does, but without a time limit, and does not assume the role of
/// `assume_role`.
async fn base(question: Question<'_>, asked: &Asked) -> Result<Credentials, Unreachable> {
    let Question { backend, purpose, sections, for_providers, config } = question;
    let fixed = ["access_key", "secret_key", "token"].map(|name| backend.string(name));
    if let [Some(key), Some(secret), token] = fixed {
        return Ok(Credentials::new(key, secret, token.map(ToOwned::to_owned), None, "backend"));
    }
    if fixed.iter().any(Option::is_some) {
        return Err(Unreachable::Incomplete("only one of access_key and secret_key"));
    }
    if let Some(role) = WebRole::of(backend)? {
        asked.source.set(format!("STS, for the role {}", role.assumed.arn));
        return role.with(sts(backend, config)).ask().await.map_err(|error| no_credentials(&error));
    }
    let source = match source(backend, sections, set)? {
        CredentialSource::Process { profile, command, used_by } => {
            asked.source.set(format!("the credential_process of the profile {profile}"));
            asked.has_run_a_command.set(true);
            let keys = of_process(&profile, &command, purpose).await?;
            match used_by {
                None => return Ok(keys.credentials("credential_process")),
                Some(name) => CredentialSource::RoleOfProfile(name, keys),
            }
        }
        source => source,
    };
    asked.source.set(source.describe());
    let selected = sections.map(|sections| sections.selected_profile().to_owned()).unwrap_or_default();
    let provider = from(source, selected, backend, for_providers)?;
    provider.provide_credentials().await.map_err(|error| {
        // The text of a `NoRole` error contains the role, so the source is not added to it.
        let why = if role_error(&error).is_some() {
            causes(&error)
        } else {
            format!("{}: {}", asked.source.take(), causes(&error))
        };
        kind(&error)(why)
    })
}

/// Converts the error of a role that could not be assumed. If `error` contains a [`NoRole`], the text is that of the
/// [`NoRole`], which contains the role. Otherwise, the text is that of the error and its causes.
fn no_credentials(error: &CredentialsError) -> Unreachable {
    kind(error)(role_error(error).map_or_else(|| causes(error), ToString::to_string))
}

/// Returns [`Unreachable::Silent`] if a second attempt may succeed, otherwise [`Unreachable::Credentials`]. If `error`
/// contains a [`NoRole`], a second attempt may succeed if the [`NoRole`] is not final. Otherwise, it may succeed if the
/// provider timed out or reported [`CredentialsError::ProviderError`].
fn kind(error: &CredentialsError) -> fn(String) -> Unreachable {
    let was_away = match (role_error(error), error) {
        (Some(role), _) => !role.is_final,
        (None, CredentialsError::ProviderTimedOut(_) | CredentialsError::ProviderError(_)) => true,
        (None, _) => false,
    };
    if was_away { Unreachable::Silent } else { Unreachable::Credentials }
}

/// Returns the [`NoRole`] in `error` or in its causes. `None` if neither contains one.
fn role_error(error: &CredentialsError) -> Option<&NoRole> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(refusal) = error.downcast_ref::<NoRole>() {
            return Some(refusal);
        }
        cause = error.source();
    }
    None
}

/// Runs `command`, the `credential_process` of `profile`, and parses its output (AWS SDKs and Tools Reference Guide,
/// "Process credential provider").
///
/// # Errors
/// [`Unreachable::Credentials`] if the command cannot be started, fails, or prints no credentials in version 1 of the
/// format. No error text contains the output of the command, because the output may contain a secret.
async fn of_process(profile: &str, command: &str, purpose: Purpose) -> Result<AccessKeys, Unreachable> {
    let said = |what: &str| of_process_error(profile, what);
    let asks = if purpose == Purpose::Work { Asks::Person } else { Asks::Nobody };
    let run = shell_command::output(command, asks).await;
    let (status, printed) = run.map_err(|error| said(&format!("could not be started: {error}")))?;
    if !status.success() {
        return Err(said(&format!("failed ({status})")));
    }
    printed_keys(profile, &printed)
}

/// Returns the error that the `credential_process` of `profile` failed in the way that `what` describes.
fn of_process_error(profile: &str, what: &str) -> Unreachable {
    Unreachable::Credentials(format!("the credential_process of the profile {profile} {what}"))
}

/// Parses `printed`, the output of the `credential_process` of `profile`.
///
/// # Errors
/// [`Unreachable::Credentials`] if it is not credentials in version 1 of the format. The text contains no part of
/// `printed`, except the version.
fn printed_keys(profile: &str, printed: &[u8]) -> Result<AccessKeys, Unreachable> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Printed {
        version: u32,
        access_key_id: String,
        secret_access_key: String,
        session_token: Option<String>,
        expiration: Option<String>,
    }
    let said = |what: &str| of_process_error(profile, what);
    let printed: Printed = serde_json::from_slice(printed).map_err(|_| said("printed no credentials"))?;
    if printed.version != 1 {
        return Err(said(&format!("printed version {} of its output, but only version 1 is defined", printed.version)));
    }
    Ok(AccessKeys {
        id: printed.access_key_id,
        secret: printed.secret_access_key,
        token: printed.session_token.filter(|token| !token.is_empty()),
        until: printed.expiration.and_then(|time| time.parse::<jiff::Timestamp>().ok()).map(Into::into),
    })
}

/// The source of the credentials, if the block itself contains none.
#[derive(Clone, Debug, PartialEq, Eq)]
enum CredentialSource {
    Environment(AccessKeys),
    WebIdentity,
    /// The profile with this name. The SDK's own provider reads it.
    Profile(String),
    /// The keys in the selected profile.
    KeysOfProfile(AccessKeys),
    /// The name of a profile with a role, and the keys with which that role is assumed. The profile is the selected
    /// profile, or one of its source profiles.
    RoleOfProfile(String, AccessKeys),
    /// The output of a `credential_process`.
    Process {
        /// The profile that contains the command.
        profile: String,
        command: String,
        /// The name of the profile whose role is assumed with these credentials. It is the last profile with a role in
        /// the chain from the selected profile to `profile`. `None` if no profile in the chain has a role.
        used_by: Option<String>,
    },
    Container,
    Instance,
}

#[derive(Clone, PartialEq, Eq)]
struct AccessKeys {
    id: String,
    secret: String,
    token: Option<String>,
    /// When the keys expire. `None` if the expiry is unknown.
    until: Option<SystemTime>,
}

impl CredentialSource {
    /// Returns a description of the source. A message uses it as the subject of a sentence.
    fn describe(&self) -> String {
        match self {
            Self::Environment(_) => "the environment".to_owned(),
            Self::WebIdentity => "STS, for the web identity of the environment".to_owned(),
            Self::Profile(name) | Self::RoleOfProfile(name, _) | Self::Process { profile: name, .. } => {
                format!("the profile {name}")
            }
            Self::KeysOfProfile(_) => "the profile".to_owned(),
            Self::Container => "the container".to_owned(),
            Self::Instance => "the instance metadata service".to_owned(),
        }
    }
}

impl std::fmt::Debug for AccessKeys {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Keys")
    }
}

impl AccessKeys {
    fn credentials(self, name: &'static str) -> Credentials {
        Credentials::new(self.id, self.secret, self.token, self.until, name)
    }

    fn provider(self, name: &'static str) -> SharedCredentialsProvider {
        SharedCredentialsProvider::new(self.credentials(name))
    }

    /// Reads the keys from the environment, under every name that the AWS SDK for Go supports. `None` if the ID or the
    /// secret is missing.
    fn of_environment(set: &impl Fn(&str) -> Option<String>) -> Option<Self> {
        Some(Self {
            id: set("AWS_ACCESS_KEY_ID").or_else(|| set("AWS_ACCESS_KEY"))?,
            secret: set("AWS_SECRET_ACCESS_KEY").or_else(|| set("AWS_SECRET_KEY"))?,
            token: set("AWS_SESSION_TOKEN"),
            until: None,
        })
    }
}

/// Selects one source of credentials as the AWS SDK for Go does: it reads only the settings, and does not try any
/// source. `set` returns the value of an environment variable, or `None` if it is unset or empty.
///
/// The SDK for Rust, in contrast, tries the sources in turn until one returns credentials. Such credentials may belong
/// to another identity, for example to the instance instead of a profile.
///
/// # Errors
/// [`Unreachable::SharedFiles`] if the shared files are needed and cannot be read, [`Unreachable::ProfileKey`] if the
/// profile has a key that `tf` does not support, and [`Unreachable::Profile`] if a named profile does not exist. A
/// missing profile is an error even where the SDK for Go ignores it (`AWS_DEFAULT_PROFILE`), because the profile may
/// have existed when the run started.
fn source(
    backend: &CachedBackend,
    sections: Result<&EnvConfigSections, &str>,
    set: impl Fn(&str) -> Option<String>,
) -> Result<CredentialSource, Unreachable> {
    if backend.string("profile").is_none() || backend.origin().is_before_1_6() {
        if let Some(keys) = AccessKeys::of_environment(&set) {
            return Ok(CredentialSource::Environment(keys));
        }
        if set("AWS_WEB_IDENTITY_TOKEN_FILE").is_some() {
            return Ok(CredentialSource::WebIdentity);
        }
    }
    let sections = sections.map_err(|why| Unreachable::SharedFiles(why.to_owned()))?;
    let profile = sections.get_profile(sections.selected_profile());
    if let (None, Some(name)) = (profile, profile_name(backend, &set)) {
        return Err(Unreachable::Profile(name));
    }
    let get = |name: &str| profile.and_then(|profile| profile.get(name)).filter(|value| !value.is_empty());
    let selected = || sections.selected_profile().to_owned();
    if get("source_profile").is_some() {
        return Ok(process_behind(sections).unwrap_or_else(|| CredentialSource::Profile(selected())));
    }
    if let (Some(id), Some(secret)) = (get("aws_access_key_id"), get("aws_secret_access_key")) {
        let token = get("aws_session_token").map(ToOwned::to_owned);
        let keys = AccessKeys { id: id.to_owned(), secret: secret.to_owned(), token, until: None };
        return Ok(match get("role_arn") {
            Some(_) => CredentialSource::RoleOfProfile(selected(), keys),
            None => CredentialSource::KeysOfProfile(keys),
        });
    }
    let not_followed = attributes::PROFILE_KEYS.iter().filter(|key| key.treatment == Treatment::NotSupported);
    if let Some(key) = not_followed.map(|key| key.name).find(|name| get(name).is_some()) {
        return Err(Unreachable::ProfileKey(key));
    }
    if let Some(process) = process_behind(sections) {
        return Ok(process);
    }
    let others = [
        "aws_access_key_id",
        "aws_secret_access_key",
        "role_arn",
        "credential_source",
        "web_identity_token_file",
        "sso_session",
        "sso_account_id",
        "sso_role_name",
        "sso_start_url",
    ];
    Ok(if others.iter().any(|name| get(name).is_some()) {
        CredentialSource::Profile(selected())
    } else if CONTAINER.iter().any(|name| set(name).is_some()) {
        CredentialSource::Container
    } else {
        CredentialSource::Instance
    })
}

/// Returns the `credential_process` at the end of the chain of source profiles that starts with the selected profile.
/// `None` if there is no such command, if the chain is a loop or has more than 32 profiles, or if another source has
/// precedence: keys, a `credential_source`, a web identity token and SSO override a command (config/shared_config.go
/// and resolve_credentials.go of the SDK for Go).
fn process_behind(sections: &EnvConfigSections) -> Option<CredentialSource> {
    const BEFORE: [&str; 6] = [
        "aws_access_key_id",
        "credential_source",
        "web_identity_token_file",
        "sso_session",
        "sso_account_id",
        "sso_start_url",
    ];
    /// The maximum number of profiles in a chain. If the chain is a loop, this limit ends the search.
    const MAX_PROFILE_CHAIN: usize = 32;
    let mut name = sections.selected_profile();
    let mut used_by = None;
    for _ in 0..MAX_PROFILE_CHAIN {
        let profile = sections.get_profile(name)?;
        let get = |key: &str| profile.get(key).filter(|value| !value.is_empty());
        if get("role_arn").is_some() {
            used_by = Some(name);
        }
        if let Some(next) = get("source_profile").filter(|next| *next != name) {
            name = next;
            continue;
        }
        let command = get("credential_process").filter(|_| !BEFORE.iter().any(|key| get(key).is_some()))?;
        return Some(CredentialSource::Process {
            profile: name.to_owned(),
            command: command.to_owned(),
            used_by: used_by.map(ToOwned::to_owned),
        });
    }
    None
}

/// The owner of credentials, as far as the settings show it. No source of credentials is used to determine the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The role with this ARN, which will be assumed.
    Role(String),
    Account(String),
    /// The access key with this ID.
    Key(String),
    Unknown,
}

/// Returns the [`Owner`] of the credentials for `backend`. `sections` are the shared files, or the reason why they
/// cannot be read. `set` returns the value of an environment variable, or `None` if it is unset or empty.
pub(crate) fn owner(
    backend: &CachedBackend,
    sections: Result<&EnvConfigSections, &str>,
    set: impl Fn(&str) -> Option<String>,
) -> Owner {
    let text = |name: &str| backend.string(name).map(ToOwned::to_owned);
    // This role is assumed last, so the credentials belong to it, whatever credentials are used to assume it.
    if let Some(arn) = text("assume_role.role_arn").or_else(|| text("role_arn")) {
        return Owner::Role(arn);
    }
    if let Some(id) = text("access_key") {
        return Owner::Key(id);
    }
    if !backend.nested("assume_role_with_web_identity").is_empty() {
        let arn = text("assume_role_with_web_identity.role_arn").or_else(|| set("AWS_ROLE_ARN"));
        return arn.map_or(Owner::Unknown, Owner::Role);
    }
    match source(backend, sections, &set) {
        Ok(CredentialSource::Environment(keys) | CredentialSource::KeysOfProfile(keys)) => Owner::Key(keys.id),
        Ok(CredentialSource::WebIdentity) => set("AWS_ROLE_ARN").map_or(Owner::Unknown, Owner::Role),
        Ok(CredentialSource::Process { .. }) => {
            let selected = sections.ok().and_then(|sections| sections.get_profile(sections.selected_profile()));
            let role = selected.and_then(|profile| profile.get("role_arn"));
            role.map_or(Owner::Unknown, |arn| Owner::Role(arn.to_owned()))
        }
        Ok(CredentialSource::Profile(name) | CredentialSource::RoleOfProfile(name, _)) => {
            let profile = sections.ok().and_then(|sections| sections.get_profile(&name));
            let get = |name: &str| profile.and_then(|profile| profile.get(name)).map(ToOwned::to_owned);
            let role = get("role_arn").map(Owner::Role);
            role.or_else(|| get("sso_account_id").map(Owner::Account)).unwrap_or(Owner::Unknown)
        }
        Ok(CredentialSource::Container | CredentialSource::Instance) | Err(_) => Owner::Unknown,
    }
}

/// The variables that contain the address of a container's credentials.
const CONTAINER: [&str; 2] = ["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];

/// Returns the provider for `source`. `selected` is the name of the selected profile.
///
/// # Errors
/// [`Unreachable::Metadata`] if the endpoint of the instance metadata service is invalid.
fn from(
    source: CredentialSource,
    selected: String,
    backend: &CachedBackend,
    config: &ProviderConfig,
) -> Result<SharedCredentialsProvider, Unreachable> {
    let (name, keys) = match source {
        CredentialSource::Environment(keys) => return Ok(keys.provider("environment")),
        CredentialSource::KeysOfProfile(keys) => return Ok(keys.provider("profile")),
        CredentialSource::WebIdentity => {
            let provider = WebIdentityTokenCredentialsProvider::builder().configure(config).build();
            return Ok(SharedCredentialsProvider::new(provider));
        }
        CredentialSource::Container => {
            let provider = EcsCredentialsProvider::builder().configure(config).dns(Resolver).build();
            return Ok(SharedCredentialsProvider::new(provider));
        }
        CredentialSource::Instance => {
            return Ok(match metadata(backend, config)? {
                Some(metadata) => SharedCredentialsProvider::new(metadata),
                None => SharedCredentialsProvider::new(NoCredentials),
            });
        }
        CredentialSource::RoleOfProfile(name, keys) => (name, Some(keys)),
        CredentialSource::Profile(_) | CredentialSource::Process { .. } => (selected.clone(), None),
    };
    let mut files = shared_files(backend).builder();
    if let Some(additions) = additions(backend, &name, keys.as_ref()) {
        files = files.with_contents(EnvConfigFileKind::Config, additions);
    }
    let builder = ProfileFileCredentialsProvider::builder().configure(config);
    let mut profile = builder.profile_files(files.build()).profile_name(selected);
    if let Some(metadata) = metadata(backend, config)? {
        profile = profile.with_custom_provider("Ec2InstanceMetadata", metadata);
    }
    Ok(SharedCredentialsProvider::new(profile.build()))
}

/// Returns the text of an additional config file. The SDK's own providers read some settings only from a profile, so
/// this file adds these settings to the profile `name`: the endpoints of STS and SSO, and, if `keys` is given, a source
/// profile. The source profile contains `keys`, with which the role of the profile `name` is assumed. `None` if there
/// is neither an endpoint nor keys.
fn additions(backend: &CachedBackend, name: &str, keys: Option<&AccessKeys>) -> Option<String> {
    let endpoints = [("sts", sts_endpoint(backend)), ("sso", backend.string("endpoints.sso").map(ToOwned::to_owned))];
    let endpoints: Vec<_> = endpoints.into_iter().filter_map(|(service, url)| Some((service, url?))).collect();
    let mut profile = String::new();
    let mut others = String::new();
    if !endpoints.is_empty() {
        profile.push_str("services = of-the-backend\n");
        others.push_str("[services of-the-backend]\n");
        for (service, url) in endpoints {
            let _ = writeln!(others, "{service} =\n  endpoint_url = {url}");
        }
    }
    if let Some(AccessKeys { id, secret, token, .. }) = keys {
        profile.push_str("source_profile = of-the-same-profile\n");
        let _ = writeln!(others, "[profile of-the-same-profile]\naws_access_key_id = {id}");
        let _ = writeln!(others, "aws_secret_access_key = {secret}");
        if let Some(token) = token {
            let _ = writeln!(others, "aws_session_token = {token}");
        }
    }
    let header = if name == "default" { name.to_owned() } else { format!("profile {name}") };
    (!profile.is_empty()).then(|| format!("[{header}]\n{profile}{others}"))
}

/// A provider without credentials. It replaces the instance's provider if `skip_metadata_api_check` is set.
#[derive(Debug)]
struct NoCredentials;

impl ProvideCredentials for NoCredentials {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::ready(Err(CredentialsError::not_loaded(
            "there are no credentials in the backend, the environment or a profile, and the backend disables the instance \
             metadata service",
        )))
    }
}

/// Returns the provider of the instance's credentials. `None` if `skip_metadata_api_check` is set.
///
/// # Errors
/// [`Unreachable::Metadata`] if the endpoint of the instance metadata service is invalid.
fn metadata(backend: &CachedBackend, config: &ProviderConfig) -> Result<Option<ImdsCredentialsProvider>, Unreachable> {
    if backend.flag("skip_metadata_api_check") {
        return Ok(None);
    }
    let mut client = imds::Client::builder().configure(config).connect_timeout(Duration::from_secs(1));
    let address = backend.string("ec2_metadata_service_endpoint").map(ToOwned::to_owned);
    let address = address.or_else(|| set("AWS_EC2_METADATA_SERVICE_ENDPOINT")).or_else(|| set("AWS_METADATA_URL"));
    if let Some(address) = address {
        client = client.endpoint(address).map_err(|error| Unreachable::Metadata(error.to_string()))?;
    }
    let mode = backend.string("ec2_metadata_service_endpoint_mode").map(ToOwned::to_owned);
    match mode.or_else(|| set("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE")) {
        Some(mode) if mode.eq_ignore_ascii_case("ipv6") => {
            client = client.endpoint_mode(imds::client::EndpointMode::IpV6);
        }
        Some(_) => client = client.endpoint_mode(imds::client::EndpointMode::IpV4),
        None => {}
    }
    Ok(Some(ImdsCredentialsProvider::builder().configure(config).imds_client(client.build()).build()))
}

/// Returns an STS client with the block's `sts_region`, and with the STS endpoint from the block or the environment.
pub(crate) fn sts(backend: &CachedBackend, config: &SdkConfig) -> aws_sdk_sts::Client {
    let mut builder = aws_sdk_sts::config::Builder::from(config);
    if let Some(region) = backend.string("sts_region") {
        builder = builder.region(aws_sdk_sts::config::Region::new(region.to_owned()));
    }
    if let Some(endpoint) = sts_endpoint(backend) {
        builder = builder.endpoint_url(endpoint).use_fips(false).use_dual_stack(false);
    }
    aws_sdk_sts::Client::from_conf(builder.build())
}

/// Returns the STS endpoint from the block or from the environment. `None` if neither sets one.
pub(crate) fn sts_endpoint(backend: &CachedBackend) -> Option<String> {
    endpoint(backend, ["endpoints.sts", "sts_endpoint"], ["AWS_ENDPOINT_URL_STS", "AWS_STS_ENDPOINT"])
}

/// The parameters that AssumeRole and AssumeRoleWithWebIdentity have in common.
#[derive(Clone, Debug)]
struct Assumed {
    arn: String,
    session: Option<String>,
    duration: Option<Duration>,
    policy: Option<String>,
    policy_arns: Vec<String>,
}

impl Assumed {
    /// Reads the parameters from a nested attribute. `prefix` is the name of that attribute, followed by a dot.
    ///
    /// # Errors
    /// [`Unreachable::Duration`] if `duration` is not a Go duration.
    fn of(backend: &CachedBackend, prefix: &str, arn: String) -> Result<Self, Unreachable> {
        let text = |name: &str| backend.string(&format!("{prefix}{name}")).map(ToOwned::to_owned);
        let duration = match text("duration") {
            Some(text) => Some(go_duration(&text).ok_or(Unreachable::Duration(text))?),
            None => None,
        };
        let policy_arns = backend.strings(&format!("{prefix}policy_arns"));
        Ok(Self {
            arn,
            session: text("session_name"),
            duration,
            policy: text("policy").map(|policy| policy.trim().to_owned()),
            policy_arns: policy_arns.into_iter().map(ToOwned::to_owned).collect(),
        })
    }

    fn seconds(duration: Duration) -> i32 {
        i32::try_from(duration.as_secs()).unwrap_or(i32::MAX)
    }

    fn policies(&self) -> Option<Vec<PolicyDescriptorType>> {
        let one = |arn: &String| PolicyDescriptorType::builder().arn(arn).build();
        (!self.policy_arns.is_empty()).then(|| self.policy_arns.iter().map(one).collect())
    }
}

/// A role to assume with AssumeRole, and the parameters that AssumeRoleWithWebIdentity does not have.
#[derive(Clone, Debug)]
struct Role {
    assumed: Assumed,
    external_id: Option<String>,
    tags: Vec<(String, String)>,
    transitive: Vec<String>,
    source_identity: Option<String>,
}

impl Role {
    fn of(backend: &CachedBackend) -> Result<Option<Self>, Unreachable> {
        let owned = |values: Vec<&str>| values.into_iter().map(ToOwned::to_owned).collect();
        let pairs = |name: &str| {
            let pairs = backend.pairs(name).into_iter();
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
        };
        if let Some(arn) = backend.string("assume_role.role_arn") {
            return Ok(Some(Self {
                assumed: Assumed::of(backend, "assume_role.", arn.to_owned())?,
                external_id: backend.string("assume_role.external_id").map(ToOwned::to_owned),
                tags: pairs("assume_role.tags"),
                transitive: owned(backend.strings("assume_role.transitive_tag_keys")),
                source_identity: backend.string("assume_role.source_identity").map(ToOwned::to_owned),
            }));
        }
        // OpenTofu, and Terraform before 1.10, also have these attributes outside of `assume_role`.
        let Some(arn) = backend.string("role_arn") else { return Ok(None) };
        Ok(Some(Self {
            assumed: Assumed {
                arn: arn.to_owned(),
                session: backend.string("session_name").map(ToOwned::to_owned),
                duration: backend.number("assume_role_duration_seconds").map(Duration::from_secs),
                policy: backend.string("assume_role_policy").map(|policy| policy.trim().to_owned()),
                policy_arns: owned(backend.strings("assume_role_policy_arns")),
            },
            external_id: backend.string("external_id").map(ToOwned::to_owned),
            tags: pairs("assume_role_tags"),
            transitive: owned(backend.strings("assume_role_transitive_tag_keys")),
            source_identity: None,
        }))
    }

    fn with(self, sts: aws_sdk_sts::Client) -> Assuming<Self> {
        Assuming { sts, role: self }
    }
}

/// A role to assume with AssumeRoleWithWebIdentity, and the token for the request.
#[derive(Clone)]
struct WebRole {
    assumed: Assumed,
    token: Token,
}

#[derive(Clone)]
enum Token {
    Text(String),
    File(std::path::PathBuf),
}

impl std::fmt::Debug for WebRole {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "WebRole({})", self.assumed.arn)
    }
}

impl WebRole {
    fn of(backend: &CachedBackend) -> Result<Option<Self>, Unreachable> {
        const BLOCK: &str = "assume_role_with_web_identity";
        if backend.nested(BLOCK).is_empty() {
            return Ok(None);
        }
        let text = |name: &str, variable: &str| {
            let text = backend.string(&format!("{BLOCK}.{name}")).map(ToOwned::to_owned);
            // If the block lacks an attribute, OpenTofu reads it from the environment. Terraform requires it in the
            // block.
            text.or_else(|| set(variable))
        };
        let Some(arn) = text("role_arn", "AWS_ROLE_ARN") else {
            return Err(Unreachable::Incomplete("assume_role_with_web_identity without a role"));
        };
        let mut assumed = Assumed::of(backend, "assume_role_with_web_identity.", arn)?;
        assumed.session = text("session_name", "AWS_ROLE_SESSION_NAME");
        let token = text("web_identity_token", "AWS_WEB_IDENTITY_TOKEN").map(Token::Text);
        let file = || text("web_identity_token_file", "AWS_WEB_IDENTITY_TOKEN_FILE");
        let token = token.or_else(|| file().map(|path| Token::File(expand(&path).into())));
        match token {
            Some(token) => Ok(Some(Self { assumed, token })),
            None => Err(Unreachable::Incomplete("assume_role_with_web_identity without a token")),
        }
    }

    fn with(self, sts: aws_sdk_sts::Client) -> Assuming<Self> {
        Assuming { sts, role: self }
    }
}

/// A role, and the STS client to assume it with.
#[derive(Debug)]
struct Assuming<R> {
    sts: aws_sdk_sts::Client,
    role: R,
}

impl Assuming<Role> {
    async fn ask(&self) -> Provided {
        let Role { assumed, external_id, tags, transitive, source_identity } = &self.role;
        let tags: Result<Vec<Tag>, _> =
            tags.iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect();
        let tags = tags.map_err(CredentialsError::invalid_configuration)?;
        let answer = self
            .sts
            .assume_role()
            .role_arn(&assumed.arn)
            .role_session_name(assumed.session.as_deref().unwrap_or(SESSION))
            .duration_seconds(Assumed::seconds(assumed.duration.unwrap_or(DEFAULT_SESSION_WINDOW)))
            .set_policy(assumed.policy.clone())
            .set_policy_arns(assumed.policies())
            .set_external_id(external_id.clone())
            .set_tags((!tags.is_empty()).then_some(tags))
            .set_transitive_tag_keys((!transitive.is_empty()).then(|| transitive.clone()))
            .set_source_identity(source_identity.clone())
            .send()
            .await;
        match answer {
            Ok(answer) => credentials(answer.credentials),
            Err(error) => Err(refused(&assumed.arn, &error)),
        }
    }
}

impl Assuming<WebRole> {
    async fn ask(&self) -> Provided {
        let WebRole { assumed, token } = &self.role;
        let token = match token {
            Token::Text(token) => token.clone(),
            Token::File(path) => plain_file::read_text(path).map_err(|error| {
                CredentialsError::provider_error(format!("the web identity token {}: {error}", path.display()))
            })?,
        };
        let answer = self
            .sts
            .assume_role_with_web_identity()
            .role_arn(&assumed.arn)
            .role_session_name(assumed.session.as_deref().unwrap_or(SESSION))
            .web_identity_token(token)
            .set_duration_seconds(assumed.duration.map(Assumed::seconds))
            .set_policy(assumed.policy.clone())
            .set_policy_arns(assumed.policies())
            .send()
            .await;
        match answer {
            Ok(answer) => credentials(answer.credentials),
            Err(error) => Err(refused(&assumed.arn, &error)),
        }
    }
}

/// Returns the error for a role that could not be assumed. The text of the error contains the code and the message from
/// STS. If STS sent no code or no message, the text contains the reason for the failure instead.
fn refused<E: std::error::Error + ProvideErrorMetadata + 'static>(arn: &str, error: &SdkError<E>) -> CredentialsError {
    let failure = Failure::of_request("STS", "sts:AssumeRole", error);
    let why = match (error.code(), error.message()) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        _ => failure.to_string(),
    };
    CredentialsError::provider_error(NoRole { arn: arn.to_owned(), why, is_final: failure.is_final() })
}

/// The error for a role that could not be assumed.
#[derive(Debug, thiserror::Error)]
#[error("the role {arn} cannot be assumed: {why}")]
struct NoRole {
    arn: String,
    why: String,
    /// Whether a second attempt cannot succeed.
    is_final: bool,
}

fn credentials(given: Option<aws_sdk_sts::types::Credentials>) -> Provided {
    let Some(given) = given else { return Err(CredentialsError::unhandled("STS returned no credentials")) };
    let until = std::time::SystemTime::try_from(given.expiration).ok();
    Ok(Credentials::new(given.access_key_id, given.secret_access_key, Some(given.session_token), until, "assume_role"))
}

/// Parses a duration as Go's `time.ParseDuration` does: `15m`, `1h30m`, `900s`, `0.5h`, `900000ms`. `None` for any
/// other text, for a duration that is not positive, and for one of more nanoseconds than an `i64` holds.
fn go_duration(text: &str) -> Option<Duration> {
    let mut nanoseconds: u128 = 0;
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    while !rest.is_empty() {
        let (whole, after) = split_digits(rest);
        let (fraction, after) = after.strip_prefix('.').map_or(("", after), split_digits);
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let end = after.find(|character: char| character == '.' || character.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let unit: u128 = match unit {
            "ns" => 1,
            // The micro sign and the Greek letter.
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let number = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u64>().ok() };
        // More digits than these are less than a nanosecond, even of an hour.
        let fraction = &fraction[..fraction.len().min(18)];
        let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
        let part = u128::from(number(whole)?) * unit + u128::from(number(fraction)?) * unit / scale;
        nanoseconds = nanoseconds.checked_add(part)?;
        rest = after;
    }
    let nanoseconds = u64::try_from(i64::try_from(nanoseconds).ok()?).ok()?;
    (nanoseconds > 0).then(|| Duration::from_nanos(nanoseconds))
}

/// Splits a text behind the ASCII digits that it begins with.
fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use aws_runtime::env_config::file::EnvConfigFiles;
    use aws_types::os_shim_internal::{Env, Fs};

    use super::*;
    use crate::terraform::backend::tests::backend;

    fn sections(file: &'static str, selected: Option<&'static str>) -> EnvConfigSections {
        let files = EnvConfigFiles::builder().with_contents(EnvConfigFileKind::Config, file).build();
        let (fs, env) = (Fs::real(), Env::from_slice(&[]));
        let loading = aws_config::profile::load(&fs, &env, &files, selected.map(Into::into));
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(loading).unwrap()
    }

    /// Returns the source or the error as a short text, for comparison.
    fn source_of(block: &str, file: &'static str, variables: &[(&str, &str)]) -> String {
        let backend = backend(block);
        let set = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        let selected = profile_name(&backend, set).map(|name| &*name.leak());
        match source(&backend, Ok(&sections(file, selected)), set) {
            Ok(CredentialSource::Environment(keys)) => format!("environment {}", keys.id),
            Ok(CredentialSource::WebIdentity) => "web identity".to_owned(),
            Ok(CredentialSource::Profile(name)) => format!("profile {name}"),
            Ok(CredentialSource::KeysOfProfile(keys)) => format!("keys {}", keys.id),
            Ok(CredentialSource::RoleOfProfile(name, keys)) => format!("role of {name} by {}", keys.id),
            Ok(CredentialSource::Process { profile, command, used_by }) => {
                format!("{command} of {profile} for {used_by:?}")
            }
            Ok(CredentialSource::Container) => "container".to_owned(),
            Ok(CredentialSource::Instance) => "instance".to_owned(),
            Err(unreachable) => unreachable.to_string(),
        }
    }

    #[test]
    fn one_source_is_decided_on_before_anybody_is_asked() {
        const KEYS: (&str, &str) = ("AWS_ACCESS_KEY_ID", "ENV");
        const SECRET: (&str, &str) = ("AWS_SECRET_ACCESS_KEY", "s");
        const TOKEN: (&str, &str) = ("AWS_WEB_IDENTITY_TOKEN_FILE", "/t");
        const TASK: (&str, &str) = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://x");
        const P: &str = r#"{"profile":"p"}"#;
        const STATIC: &str = "[profile p]\naws_access_key_id = P\naws_secret_access_key = s\n";
        for (block, file, variables, expected) in [
            ("{}", "", &[KEYS, SECRET, TOKEN, ("AWS_PROFILE", "p")][..], "environment ENV"),
            ("{}", "", &[KEYS, TOKEN], "web identity"),
            ("{}", "", &[KEYS, TASK], "container"),
            ("{}", "", &[], "instance"),
            (P, STATIC, &[KEYS, SECRET, TOKEN, TASK], "keys P"),
            ("{}", STATIC, &[("AWS_PROFILE", "p"), TASK], "keys P"),
            ("{}", STATIC, &[("AWS_DEFAULT_PROFILE", "p"), TASK], "keys P"),
            (P, "", &[KEYS, SECRET, TASK], "the profile p is in none of the shared files"),
            ("{}", "", &[("AWS_DEFAULT_PROFILE", "p"), TASK], "the profile p is in none of the shared files"),
            (P, "[profile p]\noutput = json\n", &[], "instance"),
            (P, "[profile p]\nrole_arn = r\nsource_profile = gone\n", &[TASK], "profile p"),
            (P, "[profile p]\nsso_account_id = 1\n", &[TASK], "profile p"),
            (P, "[profile p]\nrole_arn = r\naws_access_key_id = P\naws_secret_access_key = s\n", &[], "role of p by P"),
            (
                P,
                "[profile p]\nrole_arn = r\nsource_profile = p\naws_access_key_id = P\naws_secret_access_key = s\n",
                &[],
                "profile p",
            ),
            (P, "[profile p]\naws_access_key_id = half\n", &[TASK], "profile p"),
            (P, "[profile p]\ncredential_process = c\n", &[TASK], "c of p for None"),
            (P, "[profile p]\nrole_arn = r\ncredential_process = c\n", &[], "c of p for Some(\"p\")"),
            (P, "[profile p]\nsource_profile = q\n[profile q]\ncredential_process = c\n", &[], "c of q for None"),
            (
                P,
                "[profile p]\nrole_arn = r\nsource_profile = q\n[profile q]\ncredential_process = c\n",
                &[],
                "c of q for Some(\"p\")",
            ),
            (
                P,
                "[profile p]\nrole_arn = r\nsource_profile = q\n[profile q]\nrole_arn = s\nsource_profile = t\n\
                 [profile t]\ncredential_process = c\n",
                &[],
                "c of t for Some(\"q\")",
            ),
            (P, "[profile p]\nsource_profile = q\n[profile q]\nsource_profile = p\n", &[], "profile p"),
            (P, "[profile p]\nsso_start_url = u\ncredential_process = c\n", &[], "profile p"),
            (
                P,
                "[profile p]\nlogin_session = l\n",
                &[TASK],
                "the profile sets login_session, which tf does not support",
            ),
        ] {
            assert_eq!(source_of(block, file, variables), expected, "{block} {file} {variables:?}");
        }
        let unread = source(&backend("{}"), Err("broken"), |_| None).unwrap_err();
        assert!(unread.may_pass() && unread.to_string().contains("broken"));
    }

    /// The file has terraform's own answers: `go_rules` in `tests/real` asks for them.
    #[test]
    fn a_duration_is_read_as_terraform_reads_it() {
        let golden: Vec<(String, Option<u64>)> =
            serde_json::from_str(include_str!("../../tests/golden/durations.json")).unwrap();
        for (text, seconds) in golden {
            let read = go_duration(&text);
            match seconds {
                Some(seconds) => assert_eq!(read.map(|read| read.as_secs()), Some(seconds), "{text:?}"),
                // Terraform refuses what it cannot parse, and what is no possible length of a session.
                None => assert!(
                    read.is_none_or(|read| read < Duration::from_mins(15) || read > Duration::from_hours(12)),
                    "{text:?}: {read:?}"
                ),
            }
        }
        assert_eq!(go_duration("9223372036854775807ns"), Some(Duration::from_nanos(i64::MAX.unsigned_abs())));
        assert_eq!(go_duration("9223372036854775808ns"), None);
        assert_eq!(go_duration("0.1234567891234567891234567h"), Some(Duration::from_nanos(444_444_440_844)));
    }

    #[test]
    fn no_text_of_a_duration_panics_and_the_parts_of_one_add_up() {
        use proptest::prelude::*;
        let parts =
            prop::collection::vec((0_u32..1000, prop::sample::select(vec!["h", "m", "s", "ms", "us", "ns"])), 1..6);
        let strategy = (parts, crate::generated_input::changed_text("+1.5h30m.5s\u{b5}s0"));
        crate::generated_input::for_all(file!(), &strategy, |(parts, other)| {
            go_duration(&other);
            let parts: Vec<String> = parts.into_iter().map(|(number, unit)| format!("{number}{unit}")).collect();
            let sum = parts.iter().map(|part| go_duration(part).unwrap_or_default());
            prop_assert_eq!(go_duration(&parts.concat()).unwrap_or_default(), sum.sum::<Duration>());
            Ok(())
        });
    }

    #[test]
    fn only_version_1_of_the_output_of_a_credential_process_is_read() {
        let read = |text: &str| printed_keys("p", text.as_bytes());
        let keys = read(
            r#"{"Version":1,"AccessKeyId":"AKIA","SecretAccessKey":"s","SessionToken":"t",
                "Expiration":"2026-11-23T01:46:07Z","Other":[1]}"#,
        )
        .unwrap();
        assert_eq!((keys.id.as_str(), keys.secret.as_str(), keys.token.as_deref()), ("AKIA", "s", Some("t")));
        assert_eq!(keys.until, Some("2026-11-23T01:46:07Z".parse::<jiff::Timestamp>().unwrap().into()));
        let keys = read(r#"{"Version":1,"AccessKeyId":"A","SecretAccessKey":"s","SessionToken":""}"#).unwrap();
        assert!(keys.token.is_none() && keys.until.is_none(), "long-term keys have no token and do not expire");
        for (text, expected) in [
            (r#"{"Version":2,"AccessKeyId":"A","SecretAccessKey":"s"}"#, "printed version 2 of its output"),
            (r#"{"AccessKeyId":"A","SecretAccessKey":"s"}"#, "printed no credentials"),
            (r#"{"Version":1,"SecretAccessKey":"s"}"#, "printed no credentials"),
            (r#"{"Version":1,"AccessKeyId":"A"}"#, "printed no credentials"),
            (r#"{"Version":"1","AccessKeyId":"A","SecretAccessKey":"s"}"#, "printed no credentials"),
            ("Password: ", "printed no credentials"),
            ("", "printed no credentials"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("the profile p "), "{text}: {error}");
        }
    }

    #[test]
    fn any_output_of_a_credential_process_is_read_or_refused_and_no_error_shows_it() {
        use proptest::prelude::*;
        const SECRETS: [&str; 3] = ["AKIAQQQQQQQQ", "wJalrhunter2", "FwoGhunter3"];
        let whole = serde_json::json!({
            "Version": 1, "AccessKeyId": SECRETS[0], "SecretAccessKey": SECRETS[1], "SessionToken": SECRETS[2],
            "Expiration": "2026-11-23T01:46:07Z",
        });
        // A text without any change, with a key and a time of any content, and the text above with changes.
        let strategy = (
            ("\\PC{0,20}", "\\PC{0,20}", prop::option::of("\\PC{0,20}"), prop::option::of("\\PC{0,30}")),
            crate::generated_input::changed(whole.to_string().into_bytes()),
        );
        crate::generated_input::for_all(file!(), &strategy, |((id, secret, token, until), changed)| {
            let text = serde_json::json!({
                "Version": 1, "AccessKeyId": id, "SecretAccessKey": secret, "SessionToken": token, "Expiration": until,
            });
            let keys = printed_keys("p", text.to_string().as_bytes());
            let keys = keys.map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!((keys.id, keys.secret), (id, secret));
            prop_assert_eq!(keys.token, token.filter(|token| !token.is_empty()));
            let shown = match printed_keys("p", &changed) {
                Ok(keys) => format!("{keys:?}"),
                Err(error) => format!("{error} {error:?}"),
            };
            // Half of a secret is enough to recognise it.
            prop_assert!(!SECRETS.iter().any(|secret| shown.contains(&secret[..6])), "{}", shown);
            Ok(())
        });
    }

    #[test]
    fn a_role_in_either_form_is_the_same_role() {
        let new = backend(
            r#"{"assume_role":{"role_arn":"arn:x","session_name":"s","external_id":"e","duration":"20m","policy":" p ",
                "policy_arns":["a","b"],"tags":{"k":"v"},"transitive_tag_keys":["k"]}}"#,
        );
        let old = backend(
            r#"{"role_arn":"arn:x","session_name":"s","external_id":"e","assume_role_duration_seconds":1200,
                "assume_role_policy":" p ","assume_role_policy_arns":["a","b"],"assume_role_tags":{"k":"v"},
                "assume_role_transitive_tag_keys":["k"]}"#,
        );
        let [new, old] = [new, old].map(|backend| format!("{:?}", Role::of(&backend).unwrap().unwrap()));
        assert_eq!(new, old);
        assert!(Role::of(&backend("{}")).unwrap().is_none());
    }

    #[test]
    fn a_token_is_in_no_debug_output() {
        let block = backend(r#"{"assume_role_with_web_identity":{"role_arn":"arn:x","web_identity_token":"hunter2"}}"#);
        assert_eq!(format!("{:?}", WebRole::of(&block).unwrap().unwrap()), "WebRole(arn:x)");
    }

    #[test]
    fn a_role_for_nobody_is_an_error() {
        for config in [
            r#"{"assume_role_with_web_identity":{"role_arn":"arn:x"}}"#,
            r#"{"assume_role_with_web_identity":{"web_identity_token":"t"}}"#,
        ] {
            assert!(matches!(WebRole::of(&backend(config)), Err(Unreachable::Incomplete(_))), "{config}");
        }
        assert!(matches!(
            Role::of(&backend(r#"{"assume_role":{"role_arn":"a","duration":"long"}}"#)),
            Err(Unreachable::Duration(_))
        ));
    }
}
