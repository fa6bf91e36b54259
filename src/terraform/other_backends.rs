//! The backends other than S3: what remains of a lock in each of them when terraform is killed, and what `tf` does
//! about it. This list is the only one; docs/backends.md is generated from it.
//!
//! The facts come from the sources of Terraform 1.15 and OpenTofu 1.12 (internal/backend/remote-state/KIND/client.go,
//! `Lock` and `Unlock`).

use serde_json::Value;

use super::backend::{CachedBackend, is_unset};
use super::kubernetes_cluster::FINGERPRINT;

/// What `tf` does about a lock that a killed terraform has left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnlockPolicy {
    /// Nothing, because the lock ends with terraform's process or session.
    Nothing,
    /// Run `force-unlock` with the lock's ID. The service itself makes the delete conditional on that ID.
    ForceUnlock,
    /// Report the lock and do not release it: an unlock in this backend may release a lock that another holder has
    /// acquired in the meantime.
    Name,
}

/// A backend other than S3, and the facts about its locks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OtherBackend {
    pub(crate) kind: &'static str,
    pub(crate) unlock_policy: UnlockPolicy,
    /// What remains of a lock when terraform is killed.
    #[cfg_attr(not(test), expect(dead_code, reason = "for docs/backends.md"))]
    leaves: &'static str,
    /// Whether the unlock is conditional on the lock's ID, and how that was verified.
    #[cfg_attr(not(test), expect(dead_code, reason = "for docs/backends.md"))]
    conditional: &'static str,
    /// How a person can see which run holds the lock. `None` if that is not possible.
    pub(crate) look: Option<&'static str>,
    /// The attributes that contain the location of the lock. They contain no secret.
    place: &'static [&'static str],
}

/// The backends of Terraform 1.15 and OpenTofu 1.12, except `s3`. The list does not contain the backends that Terraform
/// 1.3 removed (artifactory, etcd, etcdv3, manta, swift).
pub(crate) const OTHER_BACKENDS: &[OtherBackend] = &[
    OtherBackend {
        kind: "local",
        unlock_policy: UnlockPolicy::Nothing,
        leaves: "nothing that locks: the kernel's lock ends with the process; `.terraform.tfstate.lock.info` stays, and is ignored",
        conditional: "no lock to release (test: killed, and the next run locks)",
        look: Some("cat .terraform.tfstate.lock.info"),
        place: &["path", "workspace_dir"],
    },
    OtherBackend {
        kind: "pg",
        unlock_policy: UnlockPolicy::Nothing,
        leaves: "nothing that locks: PostgreSQL frees a session's advisory lock when the connection ends",
        conditional: "no: force-unlock answers success and does nothing (test: killed, and the next run locks)",
        look: Some("select * from pg_locks where locktype = 'advisory'"),
        place: &["schema_name"],
    },
    OtherBackend {
        kind: "consul",
        unlock_policy: UnlockPolicy::Nothing,
        leaves: "a lock for 20 to 35 s: its session ends by itself; `.lockinfo` stays, and is ignored",
        conditional: "no: force-unlock destroys the session and then deletes any lock that is held (read in the source)",
        look: Some("consul kv get PATH/.lockinfo"),
        place: &["path", "address", "datacenter"],
    },
    OtherBackend {
        kind: "inmem",
        unlock_policy: UnlockPolicy::Nothing,
        leaves: "nothing: it is in the memory of the process",
        conditional: "no lock to release",
        look: None,
        place: &[],
    },
    OtherBackend {
        kind: "gcs",
        unlock_policy: UnlockPolicy::ForceUnlock,
        leaves: "the object PREFIX/WORKSPACE.tflock",
        conditional: "yes: the delete names the object's generation, which is the lock's ID (test: the lock of another run remains)",
        look: Some("gcloud storage cat gs://BUCKET/PREFIX/WORKSPACE.tflock"),
        place: &["bucket", "prefix"],
    },
    OtherBackend {
        kind: "azurerm",
        unlock_policy: UnlockPolicy::ForceUnlock,
        leaves: "an infinite lease of the state's blob",
        conditional: "yes: the release names the lease, which is the lock's ID (test: the lease of another run remains)",
        look: Some("az storage blob show --account-name ACCOUNT -c CONTAINER -n KEY --query properties.lease"),
        place: &["storage_account_name", "container_name", "key"],
    },
    OtherBackend {
        kind: "kubernetes",
        unlock_policy: UnlockPolicy::ForceUnlock,
        leaves: "the holder in the Lease lock-tfstate-WORKSPACE-SUFFIX",
        conditional: "yes: the update names the version of the Lease that was compared (read in the source)",
        look: Some("kubectl -n NAMESPACE get lease lock-tfstate-WORKSPACE-SUFFIX -o yaml"),
        place: &["secret_suffix", "namespace", "host"],
    },
    OtherBackend {
        kind: "oci",
        unlock_policy: UnlockPolicy::ForceUnlock,
        leaves: "the object KEY.tflock",
        conditional: "yes: the delete names the tag of the object that was compared (read in the source)",
        look: Some("oci os object get -ns NAMESPACE -bn BUCKET --name KEY.tflock --file -"),
        place: &["bucket", "namespace", "key", "region", "workspace_key_prefix"],
    },
    OtherBackend {
        kind: "http",
        unlock_policy: UnlockPolicy::Name,
        leaves: "the lock in the server",
        conditional: "no: force-unlock sends no ID, and the server releases any lock (test: the lock of another run was removed)",
        look: Some("ask the server of the state (in GitLab: Operate, Terraform states)"),
        place: &["address", "lock_address", "unlock_address"],
    },
    OtherBackend {
        kind: "cos",
        unlock_policy: UnlockPolicy::Name,
        leaves: "the object KEY.tflock, and for a moment a tag",
        conditional: "no: the lock is compared, and then deleted even if it has changed (read in the source)",
        look: Some("read the object KEY.tflock in the bucket"),
        place: &["bucket", "prefix", "key", "region"],
    },
    OtherBackend {
        kind: "oss",
        unlock_policy: UnlockPolicy::Name,
        leaves: "the row of the state in Tablestore",
        conditional: "no: the lock is compared, and then deleted even if it has changed (read in the source)",
        look: Some("read the row LockID = BUCKET/PREFIX/KEY of the table"),
        place: &["bucket", "prefix", "key", "region", "tablestore_endpoint", "tablestore_table"],
    },
    OtherBackend {
        kind: "remote",
        unlock_policy: UnlockPolicy::Name,
        leaves: "the lock of the workspace in HCP Terraform, where the run was here",
        conditional: "no: force-unlock there removes any lock (read in the source)",
        look: Some("open the workspace, which shows who holds it"),
        place: &["hostname", "organization", "workspaces"],
    },
    OtherBackend {
        kind: "cloud",
        unlock_policy: UnlockPolicy::Name,
        leaves: "the lock of the workspace in HCP Terraform, where the run was here",
        conditional: "no: force-unlock there removes any lock (read in the source)",
        look: Some("open the workspace, which shows who holds it"),
        place: &["hostname", "organization", "workspaces"],
    },
];

/// The attribute with the address of a service that replaces Google Cloud Storage.
const ENDPOINT: &str = "storage_custom_endpoint";

impl OtherBackend {
    /// Returns the entry for a backend. `None` for `s3`, and for a backend that is not in the list.
    pub(crate) fn of(backend: &CachedBackend) -> Option<&'static Self> {
        OTHER_BACKENDS.iter().find(|other| other.kind == backend.kind)
    }

    /// Returns the policy for this particular block. `variable` returns the value of an environment variable. For `gcs`
    /// with another endpoint than Google's, the policy is [`UnlockPolicy::Name`], because another service may ignore
    /// the condition of the delete. The service that the tests use does ignore it.
    pub(crate) fn unlock_policy(
        &self,
        backend: &CachedBackend,
        variable: impl Fn(&str) -> Option<String>,
    ) -> UnlockPolicy {
        const ENDPOINTS: [&str; 3] =
            ["GOOGLE_BACKEND_STORAGE_CUSTOM_ENDPOINT", "GOOGLE_STORAGE_CUSTOM_ENDPOINT", "STORAGE_EMULATOR_HOST"];
        let elsewhere = backend.string(ENDPOINT).is_some()
            || ENDPOINTS.iter().any(|name| variable(name).is_some_and(|value| !value.is_empty()));
        if self.kind == "gcs" && elsewhere { UnlockPolicy::Name } else { self.unlock_policy }
    }

    /// Whether an attribute may be recorded: it contains the lock's location, the service's address or the fingerprint of
    /// a cluster, and no secret.
    pub(crate) fn may_keep(&self, name: &str, value: &Value) -> bool {
        let known = self.place.contains(&name) || [ENDPOINT, FINGERPRINT].contains(&name);
        known && value.as_str().is_none_or(|text| without_secrets(text) == text)
    }

    /// Returns the location of the lock for a message: the attributes of the block that contain it, without secrets.
    pub(crate) fn place(&self, backend: &CachedBackend) -> String {
        let named = self.place.iter().filter_map(|name| {
            let value = match backend.attributes().find(|(known, value)| known == name && !is_unset(value))?.1 {
                Value::String(text) => without_secrets(text).to_owned(),
                other => other.to_string(),
            };
            Some(format!("{name} {value}"))
        });
        named.collect::<Vec<_>>().join(", ")
    }
}

/// Removes the query and the fragment from a URL, because either can contain a password. A URL that contains a user is
/// replaced as a whole, for the same reason. Other text is returned unchanged.
fn without_secrets(text: &str) -> &str {
    if !text.contains("://") {
        return text;
    }
    let text = text.split(['?', '#']).next().unwrap_or_default();
    if text.contains('@') { "(not shown: it has a user in it)" } else { text }
}

/// Generates the text of docs/backends.md.
#[cfg(test)]
pub(crate) fn document() -> String {
    use std::fmt::Write as _;
    let mut text = String::from(
        "# Other backends than S3\n\n\
         This page lists what a killed terraform leaves in each backend, and what `tf` does about it.\n\n\
         For gcs, azurerm, kubernetes and oci, `tf` releases the lock. It first tries to take the lock itself (`terraform taint`\n\
         of a resource that does not exist, which changes nothing). The error message of that command has the ID of the lock. If\n\
         the creation time shows that the lock belongs to its run, `tf` waits 10 s and runs `terraform force-unlock` with that\n\
         ID, with the same program, directory and environment. Then it checks again. For kubernetes, it only reports the lock\n\
         if a kubeconfig, or a variable that selects the cluster, has changed since the run.\n\n\
         For http, cos, oss, remote and cloud, `tf` reports the lock and prints how to see who holds it. For local, pg, consul\n\
         and inmem it does nothing, because no lock remains.\n\n\
         This page is generated from src/terraform/other_backends.rs by `make generated`.\n\n\
         | backend | what is left | is its unlock conditional on the ID? | `tf` | to see who holds it |\n|---|---|---|---|---|\n",
    );
    for OtherBackend { kind, unlock_policy, leaves, conditional, look, .. } in OTHER_BACKENDS {
        let does = match unlock_policy {
            UnlockPolicy::Nothing => "nothing: there is nothing to do",
            UnlockPolicy::ForceUnlock if *kind == "gcs" => {
                "releases it; only reports it if the endpoint is not Google's"
            }
            UnlockPolicy::ForceUnlock => "releases it",
            UnlockPolicy::Name => "only reports it",
        };
        let look = look.map_or_else(|| "not possible".to_owned(), |look| format!("`{}`", look.replace('|', "\\|")));
        let _ = writeln!(text, "| {kind} | {leaves} | {conditional} | {does} | {look} |");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(kind: &str, config: &str) -> CachedBackend {
        let json = format!(r#"{{"backend":{{"type":"{kind}","config":{config}}}}}"#);
        CachedBackend::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_place_has_no_secret_in_it() {
        for (kind, config, place) in [
            ("http", r#"{"address":"https://x/state?token=hunter2","password":"hunter2"}"#, "address https://x/state"),
            ("http", r#"{"address":"https://anna:hunter2@x/state"}"#, "address (not shown: it has a user in it)"),
            ("pg", r#"{"conn_str":"postgres://anna:hunter2@x/db","schema_name":"s"}"#, "schema_name s"),
            ("gcs", r#"{"bucket":"b","prefix":null,"access_token":"hunter2"}"#, "bucket b"),
            ("azurerm", r#"{"key":"k","access_key":"hunter2","sas_token":"hunter2"}"#, "key k"),
        ] {
            let block = backend(kind, config);
            let shown = OtherBackend::of(&block).unwrap().place(&block);
            assert_eq!(shown, place);
        }
    }

    #[test]
    fn only_where_the_service_itself_looks_at_the_id_is_force_unlock_used() {
        let unlock_policy = |kind: &str, config: &str, set: &str| {
            let block = backend(kind, config);
            OtherBackend::of(&block)
                .map(|other| other.unlock_policy(&block, |name| (name == set).then(|| "http://x".into())))
        };
        assert_eq!(unlock_policy("gcs", r#"{"bucket":"b"}"#, ""), Some(UnlockPolicy::ForceUnlock));
        assert_eq!(unlock_policy("gcs", r#"{"storage_custom_endpoint":"http://x"}"#, ""), Some(UnlockPolicy::Name));
        assert_eq!(unlock_policy("gcs", "{}", "STORAGE_EMULATOR_HOST"), Some(UnlockPolicy::Name));
        assert_eq!(unlock_policy("azurerm", "{}", "STORAGE_EMULATOR_HOST"), Some(UnlockPolicy::ForceUnlock));
        assert_eq!(unlock_policy("http", "{}", ""), Some(UnlockPolicy::Name));
        assert_eq!(unlock_policy("local", "{}", ""), Some(UnlockPolicy::Nothing));
        assert_eq!(unlock_policy("s3", "{}", ""), None);
        assert_eq!(unlock_policy("a_backend_of_tomorrow", "{}", ""), None);
    }
}
