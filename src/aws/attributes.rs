//! Lists every attribute, variable and profile key that can affect where the locks of an S3 backend are, how `tf`
//! reaches them, or which credentials it uses. For each of them, the list says what `tf` does with it. `tf` reads this
//! list when it connects to AWS and when it chooses what the journal records. docs/backend-s3.md is generated from this
//! list.
//!
//! Sources of the attributes: internal/backend/remote-state/s3/backend.go, `ConfigSchema`, of Terraform 0.15 to 1.15
//! and OpenTofu 1.6 to 1.12. Sources of the variables: the same file, aws-sdk-go-base, and the AWS SDK for Go. Source
//! of the profile keys: config/shared_config.go of the AWS SDK for Go.

/// Which programs and versions support a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// Terraform and OpenTofu.
    Both,
    /// Only Terraform.
    Terraform,
    /// Only OpenTofu.
    OpenTofu,
    /// OpenTofu, and Terraform before 1.10.
    Removed,
    /// Terraform and OpenTofu before 1.8.
    Gone,
}

#[cfg(test)]
impl Known {
    fn describe(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Terraform => "Terraform",
            Self::OpenTofu => "OpenTofu",
            Self::Removed => "OpenTofu; Terraform up to 1.9",
            Self::Gone => "both, up to 1.7",
        }
    }
}

/// What `tf` does with a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// `tf` applies the setting as terraform does.
    Supported,
    /// `tf` applies the setting as terraform does. The value is a secret, so the journal does not record it.
    Secret,
    /// The setting has no effect on a release.
    NoEffect,
    /// `tf` cannot apply the setting. So `tf` only reports the lock and does not release it. `tf locks doctor` lists
    /// such a setting before there is a lock to release.
    NotSupported,
}

#[cfg(test)]
impl Treatment {
    fn describe(self) -> &'static str {
        match self {
            Self::Supported => "supported",
            Self::Secret => "supported; never recorded",
            Self::NoEffect => "no effect",
            Self::NotSupported => "not supported",
        }
    }
}

/// One attribute, variable or profile key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// The name of the setting. For an attribute inside a nested attribute, it is `outer.inner`.
    pub(crate) name: &'static str,
    #[cfg_attr(not(test), expect(dead_code, reason = "for docs/backend-s3.md"))]
    pub(crate) known: Known,
    pub(crate) treatment: Treatment,
    /// How `tf` applies the setting, or why the setting has no effect or is not supported.
    #[cfg_attr(not(test), expect(dead_code, reason = "for docs/backend-s3.md"))]
    pub(crate) how: &'static str,
}

const fn setting(name: &'static str, known: Known, treatment: Treatment, how: &'static str) -> Setting {
    Setting { name, known, treatment, how }
}

use Known::{Both, Gone, OpenTofu, Removed, Terraform};
use Treatment::{NoEffect, NotSupported, Secret, Supported};

const ROLE: &str = "a parameter of AssumeRole";
const WEB_ROLE: &str = "a parameter of AssumeRoleWithWebIdentity";
const ACCOUNTS: &str = "terraform checks the account before it locks, so a release does not";
const CHECKS: &str = "it skips a check that terraform makes before it locks";
const WRITING: &str = "how terraform writes objects; a release only reads and deletes";
const WRITING_LOCKS: &str =
    "how terraform writes objects; a release only reads and deletes; a lease writes the lock as terraform does";
const RETRIES: &str = "how often terraform repeats a request; a release has its own limits";

/// The attributes of the `backend "s3"` block.
pub(crate) const ATTRIBUTES: &[Setting] = &[
    setting(
        "bucket",
        Both,
        Supported,
        "the bucket of the state and of its .tflock; it may be the ARN of an access point",
    ),
    setting("key", Both, Supported, "the key of the state"),
    setting(
        "workspace_key_prefix",
        Both,
        Supported,
        "for workspaces other than default, the key is PREFIX/WORKSPACE/KEY; the default is env:",
    ),
    setting("dynamodb_table", Both, Supported, "the table that has the lock's item"),
    setting("use_lockfile", Both, Supported, "whether the lock has an object in S3"),
    setting("region", Both, Supported, "used before AWS_REGION and AWS_DEFAULT_REGION"),
    setting("profile", Both, Supported, "used before keys in the environment, as in terraform since 1.6"),
    setting("access_key", Both, Secret, "with secret_key, used before all other credentials"),
    setting("secret_key", Both, Secret, "with access_key"),
    setting("token", Both, Secret, "with access_key"),
    setting("shared_config_files", Both, Supported, "read instead of ~/.aws/config; ~ and $NAME are expanded"),
    setting(
        "shared_credentials_files",
        Both,
        Supported,
        "read instead of ~/.aws/credentials; ~ and $NAME are expanded",
    ),
    setting(
        "shared_credentials_file",
        Both,
        Supported,
        "as shared_credentials_files; AWS_SHARED_CREDENTIALS_FILE is used before it",
    ),
    setting("endpoint", Both, Supported, "the endpoint of S3; endpoints.s3 is used before it"),
    setting("dynamodb_endpoint", Both, Supported, "endpoints.dynamodb is used before it"),
    setting("sts_endpoint", Both, Supported, "endpoints.sts is used before it"),
    setting("iam_endpoint", Both, NoEffect, "tf sends no request to IAM"),
    setting("endpoints.s3", Both, Supported, "used before all others"),
    setting("endpoints.dynamodb", Terraform, Supported, "used before all others (OpenTofu has it too)"),
    setting("endpoints.sts", Both, Supported, "used for the roles of the backend and of a profile"),
    setting("endpoints.sso", Terraform, Supported, "used for a profile that logs in with SSO"),
    setting("endpoints.iam", Both, NoEffect, "tf sends no request to IAM"),
    setting("sts_region", Both, Supported, "the region of STS"),
    setting("use_path_style", Both, Supported, "the bucket is in the path of the URL"),
    setting("force_path_style", Both, Supported, "the old name of use_path_style"),
    setting(
        "use_fips_endpoint",
        Both,
        Supported,
        "FIPS host names; has no effect on an endpoint that is set, as in terraform",
    ),
    setting(
        "use_dualstack_endpoint",
        Both,
        Supported,
        "dual-stack host names; has no effect on an endpoint that is set",
    ),
    setting(
        "custom_ca_bundle",
        Both,
        Supported,
        "used instead of the system's authorities, and before AWS_CA_BUNDLE; an invalid certificate in it is skipped",
    ),
    setting("insecure", Both, Supported, "certificates are not checked"),
    setting(
        "http_proxy",
        Both,
        Supported,
        "for http; in Terraform also for https if nothing else sets a proxy for https",
    ),
    setting("https_proxy", Both, Supported, "for https, used before HTTPS_PROXY; if it is empty, there is no proxy"),
    setting("no_proxy", Both, Supported, "used instead of NO_PROXY"),
    setting("ec2_metadata_service_endpoint", Both, Supported, "the service that gives out the instance's credentials"),
    setting("ec2_metadata_service_endpoint_mode", Both, Supported, "IPv4 or IPv6"),
    setting(
        "skip_metadata_api_check",
        Both,
        Supported,
        "true: credentials of the instance are not used; false does not override AWS_EC2_METADATA_DISABLED, unlike in terraform",
    ),
    setting(
        "encrypt",
        Both,
        Supported,
        "sse_customer_key is sent only with it; doctor --fix-digest writes its lock with it",
    ),
    setting("sse_customer_key", Both, Secret, "sent with every read of the lock and the state"),
    setting(
        "kms_key_id",
        Both,
        NoEffect,
        "a read needs no header for it; a lease and doctor --fix-digest write the lock with it",
    ),
    setting("acl", Both, NoEffect, WRITING_LOCKS),
    setting("state_tags", OpenTofu, NoEffect, WRITING),
    setting("lock_tags", OpenTofu, NoEffect, WRITING_LOCKS),
    setting("skip_s3_checksum", Both, NoEffect, WRITING_LOCKS),
    setting("allowed_account_ids", Both, NoEffect, ACCOUNTS),
    setting("forbidden_account_ids", Both, NoEffect, ACCOUNTS),
    setting("skip_credentials_validation", Both, NoEffect, CHECKS),
    setting("skip_region_validation", Both, NoEffect, CHECKS),
    setting("skip_requesting_account_id", Both, NoEffect, CHECKS),
    setting("max_retries", Both, NoEffect, RETRIES),
    setting("retry_mode", Both, NoEffect, RETRIES),
    setting("use_legacy_workflow", Gone, NoEffect, "the order of the sources of credentials was the same"),
    setting("assume_role.role_arn", Both, Supported, "assumed with the credentials that all of the above gives"),
    setting("assume_role.session_name", Both, Supported, ROLE),
    setting("assume_role.external_id", Both, Secret, ROLE),
    setting("assume_role.duration", Both, Supported, ROLE),
    setting("assume_role.policy", Both, Supported, ROLE),
    setting("assume_role.policy_arns", Both, Supported, ROLE),
    setting("assume_role.tags", Both, Supported, ROLE),
    setting("assume_role.transitive_tag_keys", Both, Supported, ROLE),
    setting("assume_role.source_identity", Terraform, Supported, ROLE),
    setting(
        "assume_role_with_web_identity.role_arn",
        Both,
        Supported,
        "used instead of all credentials except keys in the block",
    ),
    setting("assume_role_with_web_identity.session_name", Both, Supported, WEB_ROLE),
    setting("assume_role_with_web_identity.duration", Both, Supported, WEB_ROLE),
    setting("assume_role_with_web_identity.policy", Both, Supported, WEB_ROLE),
    setting("assume_role_with_web_identity.policy_arns", Both, Supported, WEB_ROLE),
    setting("assume_role_with_web_identity.web_identity_token", Both, Secret, WEB_ROLE),
    setting("assume_role_with_web_identity.web_identity_token_file", Both, Supported, "read again for each release"),
    setting("role_arn", Removed, Supported, "as assume_role.role_arn"),
    setting("session_name", Removed, Supported, "as assume_role.session_name"),
    setting("external_id", Removed, Secret, "as assume_role.external_id"),
    setting("assume_role_duration_seconds", Removed, Supported, "as assume_role.duration"),
    setting("assume_role_policy", Removed, Supported, "as assume_role.policy"),
    setting("assume_role_policy_arns", Removed, Supported, "as assume_role.policy_arns"),
    setting("assume_role_tags", Removed, Supported, "as assume_role.tags"),
    setting("assume_role_transitive_tag_keys", Removed, Supported, "as assume_role.transitive_tag_keys"),
];

const REGION: &str = "used if the block sets no region";
const KEYS: &str = "used if the block has neither keys nor a profile";
const CONTAINER: &str = "credentials of the container";
const PROXY: &str = "as Go reads it: never for this machine itself; http and https proxies, but not SOCKS";

/// The environment variables.
pub(crate) const VARIABLES: &[Setting] = &[
    setting("AWS_REGION", Both, Supported, REGION),
    setting("AWS_DEFAULT_REGION", Both, Supported, REGION),
    setting("AWS_PROFILE", Both, Supported, "used if neither the block nor the environment has credentials"),
    setting("AWS_DEFAULT_PROFILE", Both, Supported, "AWS_PROFILE is used before it"),
    setting("AWS_ACCESS_KEY_ID", Both, Secret, KEYS),
    setting("AWS_ACCESS_KEY", Both, Secret, "AWS_ACCESS_KEY_ID is used before it"),
    setting("AWS_SECRET_ACCESS_KEY", Both, Secret, KEYS),
    setting("AWS_SECRET_KEY", Both, Secret, "AWS_SECRET_ACCESS_KEY is used before it"),
    setting("AWS_SESSION_TOKEN", Both, Secret, KEYS),
    setting(
        "AWS_SHARED_CONFIG_FILE",
        Both,
        Supported,
        "used if the block has no shared_config_files, and before AWS_CONFIG_FILE",
    ),
    setting("AWS_CONFIG_FILE", Both, Supported, "read instead of ~/.aws/config"),
    setting("AWS_SHARED_CREDENTIALS_FILE", Both, Supported, "used if the block has no shared_credentials_files"),
    setting("AWS_ROLE_ARN", Both, Supported, "with AWS_WEB_IDENTITY_TOKEN_FILE"),
    setting("AWS_ROLE_SESSION_NAME", Both, Supported, "with AWS_WEB_IDENTITY_TOKEN_FILE"),
    setting("AWS_WEB_IDENTITY_TOKEN_FILE", Both, Supported, "used after keys in the environment, and before a profile"),
    setting("AWS_WEB_IDENTITY_TOKEN", OpenTofu, Secret, "for a block with assume_role_with_web_identity"),
    setting("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", Both, Secret, CONTAINER),
    setting("AWS_CONTAINER_CREDENTIALS_FULL_URI", Both, Secret, CONTAINER),
    setting("AWS_CONTAINER_AUTHORIZATION_TOKEN", Both, Secret, CONTAINER),
    setting("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", Both, Supported, CONTAINER),
    setting("AWS_EC2_METADATA_DISABLED", Both, Supported, "credentials of the instance are not used"),
    setting(
        "AWS_EC2_METADATA_V1_DISABLED",
        Both,
        NoEffect,
        "the SDK for Rust never uses version 1 of the metadata service",
    ),
    setting("AWS_EC2_METADATA_SERVICE_ENDPOINT", Both, Supported, "used if the block sets none"),
    setting("AWS_METADATA_URL", Both, Supported, "AWS_EC2_METADATA_SERVICE_ENDPOINT is used before it"),
    setting("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", Both, Supported, "used if the block sets none"),
    setting("AWS_ENDPOINT_URL", Both, Supported, "for every service that has no endpoint of its own"),
    setting("AWS_ENDPOINT_URL_S3", Both, Supported, "used if the block sets none"),
    setting("AWS_ENDPOINT_URL_DYNAMODB", Both, Supported, "used if the block sets none"),
    setting("AWS_ENDPOINT_URL_STS", Both, Supported, "used if the block sets none"),
    setting("AWS_ENDPOINT_URL_SSO", Both, Supported, "used if the block sets none"),
    setting("AWS_ENDPOINT_URL_SSO_OIDC", Both, Supported, "used to renew an SSO login"),
    setting("AWS_ENDPOINT_URL_IAM", Both, NoEffect, "tf sends no request to IAM"),
    setting("AWS_S3_ENDPOINT", Both, Supported, "AWS_ENDPOINT_URL_S3 is used before it"),
    setting("AWS_DYNAMODB_ENDPOINT", Both, Supported, "AWS_ENDPOINT_URL_DYNAMODB is used before it"),
    setting("AWS_STS_ENDPOINT", Both, Supported, "AWS_ENDPOINT_URL_STS is used before it"),
    setting("AWS_IAM_ENDPOINT", Both, NoEffect, "tf sends no request to IAM"),
    setting(
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
        Both,
        Supported,
        "AWS_ENDPOINT_URL and endpoint_url in a profile have no effect",
    ),
    setting("AWS_STS_REGIONAL_ENDPOINTS", Both, Supported, "always regional, as in terraform since 1.6"),
    setting("AWS_S3_USE_ARN_REGION", Both, Supported, "whether the region comes from the ARN of an access point"),
    setting("AWS_SDK_LOAD_CONFIG", Both, Supported, "always on, as in terraform since 1.6"),
    setting("AWS_CA_BUNDLE", Both, Supported, "used instead of the system's authorities"),
    setting("AWS_USE_FIPS_ENDPOINT", Both, Supported, "used if the block does not set it"),
    setting("AWS_USE_DUALSTACK_ENDPOINT", Both, Supported, "used if the block does not set it"),
    setting("AWS_SSE_CUSTOMER_KEY", Both, Secret, "as sse_customer_key"),
    setting("AWS_RETRY_MODE", Both, NoEffect, RETRIES),
    setting("AWS_MAX_ATTEMPTS", Both, NoEffect, RETRIES),
    setting("HTTP_PROXY", Both, Supported, PROXY),
    setting("http_proxy", Both, Supported, PROXY),
    setting("HTTPS_PROXY", Both, Supported, PROXY),
    setting("https_proxy", Both, Supported, PROXY),
    setting("NO_PROXY", Both, Supported, PROXY),
    setting("no_proxy", Both, Supported, PROXY),
    setting("HOME", Both, Supported, "the directory that ~ stands for"),
];

const BY_SDK: &str = "as the SDK for Rust follows it";

/// The keys of a profile in the shared files.
pub(crate) const PROFILE_KEYS: &[Setting] = &[
    setting(
        "aws_access_key_id",
        Both,
        Supported,
        "with aws_secret_access_key, used before everything in the profile except source_profile",
    ),
    setting("aws_secret_access_key", Both, Supported, "with aws_access_key_id"),
    setting("aws_session_token", Both, Supported, BY_SDK),
    setting("region", Both, Supported, "for `tf locks list --profile`; terraform's backend does not use it"),
    setting(
        "role_arn",
        Both,
        Supported,
        "with source_profile, credential_source, web_identity_token_file or keys in the same profile; roles can be chained",
    ),
    setting("source_profile", Both, Supported, BY_SDK),
    setting("credential_source", Both, Supported, BY_SDK),
    setting("external_id", Both, Supported, BY_SDK),
    setting("role_session_name", Both, Supported, BY_SDK),
    setting("duration_seconds", Both, NoEffect, "a release ends before any session does"),
    setting("web_identity_token_file", Both, Supported, BY_SDK),
    setting("sso_session", Both, Supported, "from the cache that `aws sso login` fills"),
    setting("sso_start_url", Both, Supported, "the old form of sso_session"),
    setting("sso_region", Both, Supported, BY_SDK),
    setting("sso_account_id", Both, Supported, BY_SDK),
    setting("sso_role_name", Both, Supported, BY_SDK),
    setting(
        "credential_process",
        Both,
        Supported,
        "started once for a release, before its time limit begins; it may take up to 60 s",
    ),
    setting(
        "login_session",
        Both,
        NotSupported,
        "`aws login`: tf is built without the part of the SDK for Rust that reads its sessions",
    ),
    setting("mfa_serial", Both, NoEffect, "terraform itself refuses such a profile"),
    setting("endpoint_url", Both, Supported, BY_SDK),
    setting("services", Both, Supported, "endpoint_url of s3, dynamodb, sts, sso"),
    setting("ignore_configured_endpoint_urls", Both, Supported, BY_SDK),
    setting("use_fips_endpoint", Both, Supported, BY_SDK),
    setting("use_dualstack_endpoint", Both, Supported, BY_SDK),
    setting("ca_bundle", Both, Supported, "custom_ca_bundle and AWS_CA_BUNDLE are used before it"),
    setting("ec2_metadata_service_endpoint", Both, Supported, BY_SDK),
    setting("ec2_metadata_service_endpoint_mode", Both, Supported, BY_SDK),
    setting("s3_use_arn_region", Both, Supported, BY_SDK),
    setting("retry_mode", Both, NoEffect, RETRIES),
    setting("max_attempts", Both, NoEffect, RETRIES),
];

fn treatment(settings: &[Setting], name: &str) -> Treatment {
    // An unknown setting may have any effect, so it counts as not supported.
    settings.iter().find(|known| known.name == name).map_or(Treatment::NotSupported, |known| known.treatment)
}

/// Returns what `tf` does with the attribute `name` of the block. For an attribute inside a nested attribute, `name` is
/// `outer.inner`. For an unknown attribute, the result is [`Treatment::NotSupported`].
pub(crate) fn of_attribute(name: &str) -> Treatment {
    treatment(ATTRIBUTES, name)
}

/// Returns the names of the variables that `tf` applies and that are not secrets. The journal may record their values.
pub(crate) fn kept_variables() -> impl Iterator<Item = &'static str> {
    VARIABLES.iter().filter(|variable| variable.treatment == Supported).map(|variable| variable.name)
}

/// Returns the text of docs/backend-s3.md.
#[cfg(test)]
pub(crate) fn document() -> String {
    use std::fmt::Write as _;
    let mut text = String::from(
        "# Which settings of an S3 backend `tf` supports\n\n\
         `tf` releases a lock in the place where terraform took it, with the identity that terraform had. This page lists every\n\
         attribute, variable and profile key that decides the place or the identity. `tf locks doctor` lists every setting that\n\
         you use and that `tf` does not support. With such a setting, `tf` only reports a lock.\n\n\
         This page is generated from src/aws/attributes.rs by `make generated`.\n",
    );
    for (title, settings) in [
        ("Attributes of the `backend \"s3\"` block", ATTRIBUTES),
        ("Variables", VARIABLES),
        ("Keys of a profile in the shared files", PROFILE_KEYS),
    ] {
        let _ = write!(text, "\n## {title}\n\n| name | known to | `tf` | |\n|---|---|---|---|\n");
        for Setting { name, known, treatment, how } in settings {
            let _ = writeln!(text, "| `{name}` | {} | {} | {how} |", known.describe(), treatment.describe());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_name_stands_once_and_has_its_reason() {
        for settings in [ATTRIBUTES, VARIABLES, PROFILE_KEYS] {
            let names: BTreeSet<_> = settings.iter().map(|setting| setting.name).collect();
            assert_eq!(names.len(), settings.len());
            assert!(settings.iter().all(|setting| !setting.how.is_empty()));
        }
    }

    #[test]
    fn what_nobody_has_heard_of_is_not_followed() {
        assert_eq!(of_attribute("an_attribute_of_tomorrow"), NotSupported);
        assert_eq!(of_attribute("endpoints.glacier"), NotSupported);
        assert_eq!(of_attribute("bucket"), Supported);
    }
}
