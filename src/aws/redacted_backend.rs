//! The settings with which a run reaches its backends, without secrets. They contain everything else that another
//! process needs to reach the same locks.
//!
//! The value of an attribute or a variable is recorded only if it is known to contain no secret. For an attribute that
//! may contain a secret, only the name is recorded. A later process can then read the value from the cached backend in
//! the run's directory, as long as the same backend is still cached there.
//!
//! The identity of the run is recorded too, for [`crate::lock::reached`].

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::aws::attributes;
use crate::aws::attributes::Treatment;
use crate::aws::identity::AccountIdentity;
use crate::terraform::backend::{BackendOrigin, CachedBackend, is_unset};
use crate::terraform::other_backends::OtherBackend;

/// A backend block without its secrets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RedactedBackend {
    kind: String,
    config: Map<String, Value>,
    /// The names of the attributes that are set and whose values are not recorded.
    withheld: Vec<String>,
    #[serde(default)]
    origin: BackendOrigin,
}

impl RedactedBackend {
    /// Returns `backend` without the values that must not be recorded.
    pub(crate) fn of(backend: &CachedBackend) -> Self {
        let mut config = Map::new();
        let mut withheld = Vec::new();
        if backend.kind == "s3" {
            config = kept("", &mut backend.attributes(), &mut withheld);
        } else if let Some(other) = OtherBackend::of(backend) {
            let kept = backend.attributes().filter(|(name, value)| other.may_keep(name, value));
            config.extend(kept.map(|(name, value)| (name.to_owned(), value.clone())));
        }
        Self { kind: backend.kind.clone(), config, withheld, origin: backend.origin() }
    }

    /// Whether this is a backend other than S3. For such a backend, only the attributes that name its location are
    /// recorded.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.kind != "s3"
    }

    /// Returns the complete block. If `cached` is still the same block, the withheld attributes are read from it.
    ///
    /// # Errors
    /// If attributes are withheld and `cached` is `None` or another block, returns the names of the withheld
    /// attributes.
    pub(crate) fn backend(&self, cached: Option<&CachedBackend>) -> Result<CachedBackend, String> {
        match cached {
            Some(cached) if Self::of(cached) == *self => Ok(cached.clone()),
            _ if self.withheld.is_empty() => {
                Ok(CachedBackend::from_parts(&self.kind, self.config.clone(), self.origin))
            }
            _ => Err(self.withheld.join(", ")),
        }
    }
}

/// Returns the attributes that may be recorded. The name of an attribute that is set and must not be recorded is added
/// to `withheld`, with the prefix `outer`. An attribute that has no effect on a release is neither returned nor added.
/// An empty string is recorded, because it can have another meaning than an attribute that is not set.
fn kept<'a>(
    outer: &str,
    attributes: &mut dyn Iterator<Item = (&'a str, &'a Value)>,
    withheld: &mut Vec<String>,
) -> Map<String, Value> {
    let mut config = Map::new();
    for (name, value) in attributes {
        let whole = format!("{outer}{name}");
        match (attributes::of_attribute(&whole), value) {
            (Treatment::NoEffect, _) => {}
            (Treatment::Supported, value) if !value.as_str().is_some_and(|text| has_a_user(&whole, text)) => {
                config.insert(name.to_owned(), value.clone());
            }
            // [`attributes`] lists the attributes inside a nested attribute, and not the nested attribute itself. So
            // each inner attribute is checked separately.
            (Treatment::NotSupported, Value::Object(inner)) if outer.is_empty() => {
                let inner = inner.iter().filter(|(_, value)| !value.is_null());
                let mut inner = inner.map(|(name, value)| (name.as_str(), value));
                config.insert(name.to_owned(), Value::Object(kept(&format!("{name}."), &mut inner, withheld)));
            }
            (_, value) if is_unset(value) => {}
            _ => withheld.push(whole),
        }
    }
    config
}

/// Whether `value` may contain a user name, and therefore perhaps a password. The value of a proxy or an endpoint may
/// have no scheme (`user:password@host:3128`), so the result for such an attribute is true if the value contains any
/// `@`. For another attribute, such as the name of a session, the result is true only if the value also contains `://`.
fn has_a_user(name: &str, value: &str) -> bool {
    let name = name.to_lowercase();
    let is_address = ["proxy", "endpoint", "url", "uri"].iter().any(|word| name.contains(word));
    value.contains('@') && (is_address || value.contains("://"))
}

/// The variables with credentials. The access key's ID and its secret have two names each.
const KEYS: [&str; 5] =
    ["AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN"];

/// Returns the ID of the access key in the environment. `None` if there is none.
fn key(set: &impl Fn(&str) -> Option<String>) -> Option<String> {
    set(KEYS[0]).or_else(|| set(KEYS[1]))
}

/// Returns the redacted form of `backends`, each backend once, and the environment of this process. The environment
/// does not contain the identities yet; [`AwsEnvironment::identify`] adds them.
pub(crate) fn of_run<'a>(
    backends: impl IntoIterator<Item = &'a CachedBackend>,
) -> (Vec<RedactedBackend>, AwsEnvironment) {
    let mut all: Vec<RedactedBackend> = Vec::new();
    for access in backends.into_iter().map(RedactedBackend::of) {
        if !all.contains(&access) {
            all.push(access);
        }
    }
    (all, AwsEnvironment::of_environment(|name| std::env::var_os(name)))
}

/// The environment variables that decide which identity a run has and which endpoints it uses. The identities of the
/// run are recorded here too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AwsEnvironment {
    variables: BTreeMap<String, String>,
    /// The names of the variables that are set but not recorded, because their values may contain a user name.
    withheld: Vec<String>,
    /// Whether the environment contains an access key.
    had_keys: bool,
    /// The identity, as far as it is known, for a backend block that contains no credentials.
    identity: AccountIdentity,
    /// The identity for each of the run's backends, in the order of the backends. Empty if there is no S3 backend, and
    /// in a record of an earlier version.
    #[serde(default)]
    identities: Vec<AccountIdentity>,
}

impl AwsEnvironment {
    /// Reads the environment. `variable` returns the value of a variable, or `None` if it is unset.
    fn of_environment(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let set =
            |name: &str| variable(name).and_then(|value| value.into_string().ok()).filter(|value| !value.is_empty());
        let mut variables = BTreeMap::new();
        let mut withheld = Vec::new();
        for name in attributes::kept_variables() {
            match set(name) {
                Some(value) if has_a_user(name, &value) => withheld.push(name.to_owned()),
                Some(value) => {
                    variables.insert(name.to_owned(), value);
                }
                None => {}
            }
        }
        Self { variables, withheld, had_keys: key(&set).is_some(), ..Self::default() }
    }

    /// Adds the identity of `run`, whose terraform is about to start, for each backend in `access`. `backends` are the
    /// same blocks with their secrets. This reads the shared files, so it must be called in terraform's working
    /// directory. If there is no S3 backend, nothing is added.
    pub(crate) fn identify(&mut self, run: &str, access: &[RedactedBackend], backends: &[&CachedBackend]) {
        self.identify_by(access, backends, |backend| AccountIdentity::at_start(run, backend));
        if !self.identities.is_empty() {
            self.identity =
                AccountIdentity::now(run, &CachedBackend::from_parts("s3", Map::new(), BackendOrigin::default()));
        }
    }

    /// Adds the identities as [`Self::identify`] does, but only as far as they are known without reading a file.
    pub(crate) fn identify_without_files(
        &mut self,
        run: &str,
        access: &[RedactedBackend],
        backends: &[&CachedBackend],
    ) {
        self.identify_by(access, backends, |backend| AccountIdentity::without_files(run, backend));
        if !self.identities.is_empty() {
            let empty = CachedBackend::from_parts("s3", Map::new(), BackendOrigin::default());
            self.identity = AccountIdentity::without_files(run, &empty);
        }
    }

    fn identify_by(
        &mut self,
        access: &[RedactedBackend],
        backends: &[&CachedBackend],
        identity: impl Fn(&CachedBackend) -> AccountIdentity,
    ) {
        if access.iter().all(RedactedBackend::is_elsewhere) {
            return;
        }
        let of = |access: &RedactedBackend| {
            let backend = backends.iter().find(|backend| RedactedBackend::of(backend) == *access)?;
            (backend.kind == "s3").then(|| identity(backend))
        };
        self.identities = access.iter().map(|access| of(access).unwrap_or_default()).collect();
    }

    /// Returns the changes that give another environment the same AWS access as the run had. Each change is the name of
    /// a variable and its value, or `None` if the variable must be unset. The result does not contain the withheld
    /// variables.
    pub(crate) fn changes(&self) -> Vec<(&'static str, Option<OsString>)> {
        let withheld = |name: &&str| !self.withheld.iter().any(|withheld| withheld == name);
        let mut changes: Vec<_> = attributes::kept_variables()
            .filter(withheld)
            .map(|name| (name, self.variables.get(name).map(OsString::from)))
            .collect();
        if !self.had_keys {
            // The run's credentials came from another source. Keys in the environment would override that source.
            changes.extend(KEYS.map(|name| (name, None)));
        }
        changes
    }

    /// Returns the identities for the run's `count` backends, in their order.
    pub(crate) fn identities(&self, count: usize) -> impl Iterator<Item = AccountIdentity> {
        // A record of an earlier version has one identity for all backends.
        (0..count).map(|place| self.identities.get(place).unwrap_or(&self.identity).clone())
    }

    /// Returns the identity for a backend block that contains no credentials.
    pub(crate) fn environment(&self) -> &AccountIdentity {
        &self.identity
    }

    /// Returns the credentials and settings that a person must provide to reach the lock, as text for a message.
    pub(crate) fn needs(&self) -> String {
        let mut text = String::new();
        match self.identities.iter().chain([&self.identity]).find_map(|identity| identity.account.as_ref()) {
            Some(account) => {
                let _ = write!(text, "credentials of account {account}");
            }
            None if self.had_keys => text.push_str("the credentials in its environment"),
            None => text.push_str("credentials of an unknown account"),
        }
        let named = [
            ("AWS_PROFILE", "profile"),
            ("AWS_ROLE_ARN", "role"),
            ("AWS_REGION", "region"),
            ("AWS_ENDPOINT_URL", "endpoint"),
        ];
        for (variable, word) in named {
            if let Some(value) = self.variables.get(variable) {
                let _ = write!(text, ", {word} {value}");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::backend::tests::backend;

    #[test]
    fn no_secret_of_the_block_is_kept_and_what_is_missing_is_named() {
        let block = backend(
            r#"{"bucket":"b","key":"k","region":"r","access_key":"AKIASECRET","secret_key":"hunter2","token":"tok",
                "endpoints":{"s3":"http://anna:hunter3@x","dynamodb":"http://x"},"sse_customer_key":"hunter4",
                "assume_role":{"role_arn":"arn:aws:iam::111122223333:role/x","external_id":"hunter5"},
                "an_attribute_of_tomorrow":"hunter6","encrypt":true}"#,
        );
        let access = RedactedBackend::of(&block);
        let text = serde_json::to_string(&access).unwrap();
        for secret in ["AKIASECRET", "hunter", "\"tok\""] {
            assert!(!text.contains(secret), "{secret}: {text}");
        }
        let missing = access.backend(None).unwrap_err();
        for name in ["access_key", "secret_key", "token", "endpoints.s3", "sse_customer_key", "assume_role.external_id"]
        {
            assert!(missing.contains(name), "{name}: {missing}");
        }
        assert!(access.backend(Some(&block)).unwrap() == block, "the block itself has them");
        let other = backend(r#"{"bucket":"b","key":"k","region":"elsewhere","access_key":"x"}"#);
        assert!(access.backend(Some(&other)).is_err(), "another block has others");
    }

    #[test]
    fn of_another_backend_its_place_is_kept_and_no_secret() {
        let json = r#"{"backend":{"type":"gcs","config":{"bucket":"b","prefix":"p","access_token":"hunter2","credentials":"hunter3"}}}"#;
        let block = CachedBackend::parse(json.as_bytes()).unwrap();
        let access = RedactedBackend::of(&block);
        assert!(access.is_elsewhere() && !serde_json::to_string(&access).unwrap().contains("hunter"));
        let kept = access.backend(None).unwrap();
        let other = OtherBackend::of(&block).unwrap();
        assert_eq!(other.place(&kept), other.place(&block));
    }

    /// Returns a block with every attribute of `all`. Each value is a string, or a map if the attribute is a map.
    fn block_of(all: &[&str]) -> CachedBackend {
        let mut config = Map::new();
        for name in all {
            let value = match *name {
                "assume_role_tags" | "assume_role.tags" => serde_json::json!({ "a": "value-of-tags" }),
                _ => format!("value-of-{name}").into(),
            };
            match name.split_once('.') {
                None => drop(config.insert((*name).to_owned(), value)),
                Some((outer, inner)) => {
                    let outer = config.entry(outer).or_insert_with(|| Map::new().into());
                    outer.as_object_mut().unwrap().insert(inner.to_owned(), value);
                }
            }
        }
        backend(&Value::Object(config).to_string())
    }

    #[test]
    fn each_attribute_is_kept_withheld_or_left_out_as_the_list_says() {
        let unknown = ["an_attribute_of_tomorrow", "endpoints.of_tomorrow", "assume_role.of_tomorrow"];
        let listed = attributes::ATTRIBUTES.iter().map(|attribute| attribute.name);
        let all: Vec<&str> = listed.chain(unknown).collect();
        // Each attribute is tested alone, and together with all others.
        for (name, access) in all
            .iter()
            .map(|name| (*name, RedactedBackend::of(&block_of(&[name]))))
            .chain(all.iter().map(|name| (*name, RedactedBackend::of(&block_of(&all)))))
        {
            let treatment = attributes::of_attribute(name);
            let withheld = access.withheld.iter().any(|withheld| withheld == name);
            assert_eq!(withheld, matches!(treatment, Treatment::Secret | Treatment::NotSupported), "{name}");
            let value = match name.split_once('.') {
                None => access.config.get(name),
                Some((outer, inner)) => access.config.get(outer).and_then(|outer| outer.get(inner)),
            };
            assert_eq!(value.is_some(), treatment == Treatment::Supported, "{name}");
        }
        let without_effect: Vec<&str> =
            all.iter().copied().filter(|name| attributes::of_attribute(name) == Treatment::NoEffect).collect();
        assert!(without_effect.contains(&"endpoints.iam"));
        assert!(RedactedBackend::of(&block_of(&without_effect)).backend(None).is_ok());
    }

    #[test]
    fn what_is_set_to_nothing_is_no_secret_and_not_forgotten() {
        let block = backend(
            r#"{"bucket":"b","key":"k","workspace_key_prefix":"","https_proxy":"","access_key":"","region":null,
                "assume_role":{"role_arn":"r","external_id":"","tags":null}}"#,
        );
        let again = RedactedBackend::of(&block).backend(None).unwrap();
        assert_eq!(again.state_key("green").as_deref(), Some("green/k"));
        assert_eq!(again.text("https_proxy"), Some(""));
    }

    #[test]
    fn a_variable_that_cannot_matter_is_neither_kept_nor_missing() {
        for variable in attributes::VARIABLES {
            let here = surroundings(&[(variable.name, "http://anna:hunter2@x/aws")]);
            let kept = here.variables.contains_key(variable.name);
            let withheld = here.withheld.iter().any(|name| name == variable.name);
            let followed = variable.treatment == Treatment::Supported;
            assert_eq!(kept || withheld, followed, "{}", variable.name);
            assert!(!serde_json::to_string(&here).unwrap().contains("hunter2"), "{}", variable.name);
        }
    }

    #[test]
    fn a_block_without_secrets_is_whole() {
        let block = backend(
            r#"{"bucket":"b","key":"k","region":"r","dynamodb_table":"t","use_path_style":true,"profile":null}"#,
        );
        let again = RedactedBackend::of(&block).backend(None).unwrap();
        assert_eq!(again.string("dynamodb_table"), Some("t"));
        assert!(again.flag("use_path_style"));
    }

    #[test]
    fn an_address_with_a_user_is_not_kept_in_any_form() {
        for (name, value, kept) in [
            ("https_proxy", "anna:hunter2@proxy:3128", false),
            ("http_proxy", "http://anna:hunter2@proxy:3128", false),
            ("https_proxy", "http://proxy:3128", true),
            ("endpoint", "anna:hunter2@s3.internal", false),
            ("endpoints.s3", "s3.internal", true),
            ("assume_role.session_name", "anna@example.com", true),
        ] {
            let config = match name.split_once('.') {
                Some((outer, inner)) => format!(r#"{{"{outer}":{{"{inner}":"{value}"}}}}"#),
                None => format!(r#"{{"{name}":"{value}"}}"#),
            };
            let access = RedactedBackend::of(&backend(&config));
            assert_eq!(access.withheld.is_empty(), kept, "{name} {value}");
            assert!(kept || !serde_json::to_string(&access).unwrap().contains("hunter2"), "{name}");
        }
        let here = surroundings(&[("HTTPS_PROXY", "anna:hunter2@proxy:3128"), ("AWS_ENDPOINT_URL", "a:hunter2@x")]);
        assert!(!serde_json::to_string(&here).unwrap().contains("hunter2"));
        assert!(!here.needs().contains("hunter2") && here.withheld.len() == 2);
    }

    fn surroundings(set: &[(&str, &str)]) -> AwsEnvironment {
        AwsEnvironment::of_environment(|name| {
            set.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn the_environment_is_kept_without_its_credentials() {
        let here = surroundings(&[
            ("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE"),
            ("AWS_SECRET_ACCESS_KEY", "hunter2"),
            ("AWS_SESSION_TOKEN", "hunter3"),
            ("AWS_REGION", "eu-west-1"),
            ("AWS_ENDPOINT_URL", "http://anna:hunter4@localhost"),
        ]);
        let text = serde_json::to_string(&here).unwrap();
        for secret in ["AKIAIOSFODNN7EXAMPLE", "hunter"] {
            assert!(!text.contains(secret), "{text}");
        }
        let changes = here.changes();
        assert!(changes.contains(&("AWS_REGION", Some("eu-west-1".into()))));
        assert!(changes.contains(&("AWS_PROFILE", None)), "what was not set must not be set now");
        assert!(!changes.iter().any(|(name, _)| *name == "AWS_ENDPOINT_URL" || KEYS.contains(name)));
        let without = surroundings(&[("AWS_PROFILE", "prod")]).changes();
        assert!(
            KEYS.iter().all(|key| without.contains(&(key, None))),
            "keys of now would go before the profile of then"
        );
    }
}
