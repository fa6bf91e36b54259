//! The backend that `terraform init` caches in `.terraform/terraform.tfstate` (internal/command/workdir,
//! backend_state.go). The file has every attribute of the backend's schema; an attribute that is not set is `null`.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A backend block in the form in which `init` caches it. It may contain credentials, so its `Debug` output does not
/// contain the values, and `tf` never writes it to a file.
#[derive(Clone, PartialEq)]
pub(crate) struct CachedBackend {
    /// The type of the backend: `s3`, `http`, `local`...
    pub(crate) kind: String,
    config: Map<String, Value>,
    origin: BackendOrigin,
}

/// The program and version that wrote a backend block, as far as they change the meaning of the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BackendOrigin {
    /// Whether OpenTofu wrote the block, and not Terraform.
    opentofu: bool,
    /// Whether a version before 1.6 wrote the block. The S3 backend used another SDK then.
    before_1_6: bool,
}

impl BackendOrigin {
    /// Whether a version before 1.6 wrote the block. In such a version, access keys in the environment override a
    /// profile in the block.
    pub(crate) fn is_before_1_6(self) -> bool {
        self.before_1_6
    }

    /// Derives the origin from the file's `terraform_version` and from the attributes of the block.
    ///
    /// Terraform and OpenTofu write their version into the same field, so the version does not show which of them wrote
    /// the block. OpenTofu is recognized by attributes that only its schema has, even if they are not set. OpenTofu up
    /// to 1.9 is taken for Terraform.
    fn of(version: &str, config: &Map<String, Value>) -> Self {
        let has = |name: &str| config.contains_key(name);
        let numbers: Vec<u32> = version.split('.').map_while(|part| part.parse().ok()).collect();
        Self {
            opentofu: has("state_tags") || (has("role_arn") && has("use_lockfile")),
            before_1_6: matches!(numbers.as_slice(), [major, minor, ..] if (*major, *minor) < (1, 6)),
        }
    }
}

impl CachedBackend {
    /// Parses the content of the file. `None` if it is not such a file, or if no backend is cached in it.
    pub(crate) fn parse(json: &[u8]) -> Option<Self> {
        let Value::Object(mut file) = serde_json::from_slice(json).ok()? else { return None };
        let Value::Object(mut backend) = file.remove("backend")? else { return None };
        let Value::String(kind) = backend.remove("type")? else { return None };
        let config = match backend.remove("config") {
            Some(Value::Object(config)) => config,
            _ => Map::new(),
        };
        let version = file.get("terraform_version").and_then(Value::as_str).unwrap_or_default();
        let origin = BackendOrigin::of(version, &config);
        Some(Self { kind, config, origin })
    }

    /// Creates a block from a plan or from the configuration, in the form in which an `init` of this `version` would
    /// cache it. An empty `version` counts as 1.6 or later.
    pub(crate) fn of_parts(kind: &str, config: Map<String, Value>, version: &str) -> Self {
        let origin = BackendOrigin::of(version, &config);
        Self { kind: kind.to_owned(), config, origin }
    }

    /// Returns the block for another process of `tf`. The result contains the credentials of the block, if it has any,
    /// so it must go through a pipe, and never into a file, an argument or a variable.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "kind": self.kind, "config": self.config, "origin": self.origin })
    }

    /// Returns the block that [`CachedBackend::to_json`] has written. `None` if `json` is something else.
    pub(crate) fn of_json(json: Value) -> Option<Self> {
        let Value::Object(mut block) = json else { return None };
        let Value::String(kind) = block.remove("kind")? else { return None };
        let Value::Object(config) = block.remove("config")? else { return None };
        Some(Self { kind, config, origin: serde_json::from_value(block.remove("origin")?).ok()? })
    }

    /// Adds `value` under `name`, which is not the name of an attribute.
    pub(crate) fn add(&mut self, name: &str, value: String) {
        self.config.insert(name.to_owned(), Value::String(value));
    }

    /// Whether OpenTofu wrote the block.
    pub(crate) fn is_opentofu(&self) -> bool {
        self.origin.opentofu
    }

    /// Returns the program and version that wrote the block.
    pub(crate) fn origin(&self) -> BackendOrigin {
        self.origin
    }

    /// Returns the value of a string attribute, which may be empty. `None` if the attribute is not set or is not a
    /// string.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.value(name)?.as_str()
    }

    /// Returns the value of a number attribute. `None` if it is not set, or is not a non-negative whole number.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        self.value(name)?.as_u64()
    }

    /// Returns the value of a string attribute. `None` if it is not set or is empty. In all these functions, the name
    /// of an attribute inside a nested one has the form `outer.inner`.
    pub(crate) fn string(&self, name: &str) -> Option<&str> {
        self.value(name)?.as_str().filter(|value| !value.is_empty())
    }

    /// Returns the value of a boolean attribute. False if it is not set.
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.value(name).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Returns the values of a list or set of strings. Empty if the attribute is not set.
    pub(crate) fn strings(&self, name: &str) -> Vec<&str> {
        let values = self.value(name).and_then(Value::as_array);
        values.into_iter().flatten().filter_map(Value::as_str).collect()
    }

    /// Returns the entries of a map of strings. Empty if the attribute is not set.
    pub(crate) fn pairs(&self, name: &str) -> Vec<(&str, &str)> {
        let map = self.value(name).and_then(Value::as_object);
        map.into_iter().flatten().filter_map(|(key, value)| Some((key.as_str(), value.as_str()?))).collect()
    }

    /// Returns the names of the attributes that are set (not [`is_unset`]).
    pub(crate) fn set_attributes(&self) -> impl Iterator<Item = &str> {
        self.config.iter().filter(|(_, value)| !is_unset(value)).map(|(name, _)| name.as_str())
    }

    /// Returns the names of the attributes that are set inside the nested attribute `name`. Empty if `name` itself is
    /// not set.
    pub(crate) fn nested(&self, name: &str) -> Vec<&str> {
        let nested = self.value(name).and_then(Value::as_object);
        nested.into_iter().flatten().filter(|(_, value)| !is_unset(value)).map(|(name, _)| name.as_str()).collect()
    }

    /// Creates a block from values that the caller already has, with a known origin.
    pub(crate) fn from_parts(kind: &str, config: Map<String, Value>, origin: BackendOrigin) -> Self {
        Self { kind: kind.to_owned(), config, origin }
    }

    /// Returns the attributes that are not `null`, with their values. An attribute may be empty. The values may contain
    /// secrets.
    pub(crate) fn attributes(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.config.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.as_str(), value))
    }

    fn value(&self, name: &str) -> Option<&Value> {
        match name.split_once('.') {
            None => self.config.get(name),
            Some((outer, inner)) => self.config.get(outer)?.as_object()?.get(inner),
        }
    }

    /// Whether this is the S3 key of the state of some workspace.
    pub(crate) fn has_state(&self, key: &str) -> bool {
        /// A name that no workspace can have.
        const NAME: &str = "\u{0}";
        if self.string("key") == Some(key) {
            return true;
        }
        let Some(whole) = self.state_key(NAME) else { return false };
        // The key of a workspace's state is `before`, then the name of the workspace, then `behind`. If the block's key
        // contains `..`, the joined path may no longer contain the name. All workspaces except `default` then share one
        // key.
        let Some((before, behind)) = whole.split_once(NAME) else { return whole == key };
        let name = key.strip_prefix(before).and_then(|rest| rest.strip_suffix(behind));
        name.is_some_and(|name| !name.is_empty() && !name.contains('/'))
    }

    /// Returns the S3 key of a workspace's state (backend/remote-state/s3/backend_state.go, `path`). `None` if the
    /// block has no key.
    pub(crate) fn state_key(&self, workspace: &str) -> Option<String> {
        let key = self.string("key")?;
        if workspace == "default" {
            return Some(key.to_owned());
        }
        // An empty prefix differs from an unset one, which means `env:`.
        let prefix = self.value("workspace_key_prefix").and_then(Value::as_str).unwrap_or("env:");
        Some(join_path(&[prefix, workspace, key]))
    }
}

/// Joins path elements as Go's `path.Join` does: it skips empty elements and returns the shortest equivalent path.
fn join_path(parts: &[&str]) -> String {
    let joined = parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join("/");
    let rooted = joined.starts_with('/');
    let mut elements: Vec<&str> = Vec::new();
    for element in joined.split('/') {
        match element {
            "" | "." => {}
            ".." if elements.last().is_some_and(|last| *last != "..") => drop(elements.pop()),
            ".." if rooted => {}
            other => elements.push(other),
        }
    }
    match (rooted, elements.join("/")) {
        (true, path) => format!("/{path}"),
        (false, path) if path.is_empty() && !joined.is_empty() => ".".to_owned(),
        (false, path) => path,
    }
}

/// Whether an attribute is not set: it is `null` or empty, or it is a map in which no value is set.
pub(crate) fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(is_unset),
        _ => false,
    }
}

impl fmt::Debug for CachedBackend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "CachedBackend({})", self.kind)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns an S3 backend with the attributes in `config`, in the form in which `init` caches it.
    pub(crate) fn backend(config: &str) -> CachedBackend {
        let json = format!(r#"{{"version":3,"backend":{{"type":"s3","config":{config},"hash":1}}}}"#);
        CachedBackend::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_workspace_has_its_own_key() {
        let plain = backend(r#"{"key":"dir/prod.tfstate","workspace_key_prefix":null}"#);
        assert_eq!(plain.state_key("default").unwrap(), "dir/prod.tfstate");
        assert_eq!(plain.state_key("green").unwrap(), "env:/green/dir/prod.tfstate");
        let prefixed = backend(r#"{"key":"a","workspace_key_prefix":"x//y/"}"#);
        assert_eq!(prefixed.state_key("green").unwrap(), "x/y/green/a");
        let without = backend(r#"{"key":"a","workspace_key_prefix":""}"#);
        assert_eq!(without.state_key("green").unwrap(), "green/a");
    }

    /// The expected values are the results of Go's `path.Join`.
    #[test]
    fn a_path_is_joined_as_go_joins_it() {
        for (parts, joined) in [
            (["env:", "green", "a"], "env:/green/a"),
            (["", "green", "a"], "green/a"),
            (["", "", ""], ""),
            (["env:", "green", "../a"], "env:/a"),
            (["env:", "green", "../../a"], "a"),
            (["env:", "green", "../../../a"], "../a"),
            (["env:", "green", "../../../../a"], "../../a"),
            (["env:", "green", "../.."], "."),
            (["env:", "green", "a/../b"], "env:/green/b"),
            (["env:", "green", "a/./b/"], "env:/green/a/b"),
            (["x//y/", "green", "a"], "x/y/green/a"),
            (["x/..", "green", "a"], "green/a"),
            (["..", "green", "a"], "../green/a"),
            (["/x", "green", "a"], "/x/green/a"),
            (["/x", "green", "../../../a"], "/a"),
            (["/", "green", "/a"], "/green/a"),
            (["/..", "..", ".."], "/"),
            (["x", "..", "a"], "a"),
            (["..a", "...", ".b"], "..a/.../.b"),
        ] {
            assert_eq!(join_path(&parts), joined, "{parts:?}");
        }
    }

    #[test]
    fn a_key_is_a_states_if_some_workspace_has_it() {
        let of = |key: &str, prefix: &str| backend(&format!(r#"{{"key":{key:?},"workspace_key_prefix":{prefix:?}}}"#));
        for (key, prefix, state, has) in [
            ("a", "p", "a", true),
            ("a", "p", "p/green/a", true),
            ("a", "p", "p/green/b/a", false),
            ("a", "p", "p//a", false),
            ("a", "p", "green/a", false),
            // Every workspace except `default` has this key.
            ("../a", "p", "p/a", true),
            ("../a", "p", "p/green/a", false),
            ("../a", "p", "p/green/../a", false),
            ("x/../a", "p", "p/green/a", true),
            ("../../a", "p", "a", true),
        ] {
            assert_eq!(of(key, prefix).has_state(state), has, "{key} {prefix} {state}");
        }
    }

    #[test]
    fn what_is_not_set_is_none() {
        let backend = backend(
            r#"{"key":"","region":null,"endpoints":{"s3":"http://x","dynamodb":null},"assume_role":{"role_arn":null},
                "insecure":true,"shared_config_files":["a","b"]}"#,
        );
        assert_eq!(backend.string("key"), None);
        assert_eq!(backend.string("endpoints.s3"), Some("http://x"));
        assert_eq!(backend.string("endpoints.dynamodb"), None);
        assert!(backend.flag("insecure") && !backend.flag("skip_region_validation"));
        assert_eq!(backend.strings("shared_config_files"), ["a", "b"]);
        let mut set: Vec<_> = backend.set_attributes().collect();
        set.sort_unstable();
        assert_eq!(set, ["endpoints", "insecure", "shared_config_files"]);
    }

    #[test]
    fn a_secret_is_not_in_the_debug_output() {
        assert_eq!(format!("{:?}", backend(r#"{"secret_key":"hunter2"}"#)), "CachedBackend(s3)");
    }

    #[test]
    fn a_file_that_is_no_cached_backend_is_none() {
        for json in ["", "{}", "[]", r#"{"backend":null}"#, r#"{"backend":{"type":7}}"#, r#"{"state_store":{}}"#] {
            assert!(CachedBackend::parse(json.as_bytes()).is_none(), "{json}");
        }
    }

    #[test]
    fn a_cached_backend_with_any_change_is_rejected_or_has_one_key_for_each_workspace() {
        use proptest::prelude::*;
        let text = r#"{"version":3,"terraform_version":"1.11.4","backend":{"type":"s3","config":{"bucket":"b",
            "key":"a/../k","workspace_key_prefix":"p","region":null,"endpoints":[{"s3":"http://x"}]},"hash":7}}"#;
        let strategy = (crate::generated_input::changed(text.as_bytes().to_vec()), "[a-z.]{1,8}");
        crate::generated_input::for_all(file!(), &strategy, |(text, workspace)| {
            let Some(backend) = CachedBackend::parse(&text) else { return Ok(()) };
            let Some(key) = backend.state_key(&workspace) else { return Ok(()) };
            // Go's `path.Join` resolves a workspace that is named like a parent directory.
            if !workspace.chars().all(|letter| letter == '.') {
                prop_assert!(backend.has_state(&key), "{workspace:?} in {key:?}");
            }
            Ok(())
        });
    }

    /// The rules of Go's `path.Clean`.
    #[test]
    fn a_joined_path_is_the_shortest_one() {
        use proptest::prelude::*;
        let parts = prop::collection::vec("[a./]{0,6}", 1..4);
        crate::generated_input::for_all(file!(), &parts, |parts| {
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            let joined = join_path(&parts);
            prop_assert_eq!(&join_path(&[&joined]), &joined, "joining again changes nothing");
            prop_assert!(!joined.contains("//"), "{}", joined);
            prop_assert!(joined.len() <= 1 || !joined.ends_with('/'), "{}", joined);
            let elements: Vec<&str> = joined.split('/').filter(|element| !element.is_empty()).collect();
            prop_assert!(joined == "." || !elements.contains(&"."), "{}", joined);
            let parents = elements.iter().take_while(|element| **element == "..").count();
            prop_assert!(!elements[parents..].contains(&".."), "{}", joined);
            prop_assert!(parents == 0 || !joined.starts_with('/'), "{}", joined);
            Ok(())
        });
    }
}
