//! Which cluster the backend `kubernetes` uses. The block alone does not show it: the backend also reads kubeconfig files
//! and environment variables, and `kubectl config use-context` changes a kubeconfig at any time.

use std::path::{Path, PathBuf};

use aws_smithy_types::base64;
use sha2::{Digest, Sha256};

use super::backend::CachedBackend;
use crate::sys::plain_file;

/// The name under which the fingerprint is stored beside the attributes of a block. Terraform has no such attribute.
pub(crate) const FINGERPRINT: &str = "tf_cluster_fingerprint";

/// The variables that select a cluster (backend/remote-state/kubernetes/backend.go, `DefaultFunc`), and those that
/// client-go reads in a pod (rest/config.go, `InClusterConfig`).
const VARIABLES: [&str; 9] = [
    "KUBE_HOST",
    "KUBE_NAMESPACE",
    "KUBE_CTX",
    "KUBE_CTX_CLUSTER",
    "KUBE_CONFIG_PATH",
    "KUBE_CONFIG_PATHS",
    "KUBE_IN_CLUSTER_CONFIG",
    "KUBERNETES_SERVICE_HOST",
    "KUBERNETES_SERVICE_PORT",
];

/// The attributes that select a cluster and are not shown as the place of a lock.
const ATTRIBUTES: [&str; 3] = ["config_context", "config_context_cluster", "in_cluster_config"];

/// Returns a fingerprint of what selects the cluster, besides the attributes that are shown as the place of a lock: the
/// SHA-256 of the variables, of [`ATTRIBUTES`] and of the kubeconfig files, in Base64. If the fingerprints of two moments are equal, the same block names the same
/// cluster at both. If they differ, it may name another one: a kubeconfig also changes when a login is renewed in it.
///
/// `variable` returns the value of an environment variable. Relative paths are relative to `working_directory`.
pub(crate) fn fingerprint(
    backend: &CachedBackend,
    working_directory: &Path,
    variable: impl Fn(&str) -> Option<String>,
) -> String {
    let mut digest = Sha256::new();
    // The length before each part keeps two lists of parts with the same concatenation apart.
    let mut add = |part: &[u8]| {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    };
    for name in VARIABLES {
        add(variable(name).unwrap_or_default().as_bytes());
    }
    for (_, value) in backend.attributes().filter(|(name, _)| ATTRIBUTES.contains(name)) {
        add(value.to_string().as_bytes());
    }
    for path in kubeconfigs(backend, &variable) {
        let path = match (path.strip_prefix("~"), variable("HOME")) {
            (Ok(rest), Some(home)) => Path::new(&home).join(rest),
            _ => working_directory.join(path),
        };
        add(path.as_os_str().as_encoded_bytes());
        add(&plain_file::read(&path).unwrap_or_default());
    }
    base64::encode(digest.finalize())
}

/// Returns the paths of the kubeconfig files that the block or the variables name.
fn kubeconfigs(backend: &CachedBackend, variable: &impl Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = backend.strings("config_paths").into_iter().map(PathBuf::from).collect();
    paths.extend(backend.string("config_path").map(PathBuf::from));
    paths.extend(variable("KUBE_CONFIG_PATH").map(PathBuf::from));
    let list = variable("KUBE_CONFIG_PATHS").unwrap_or_default();
    paths.extend(std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()));
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_changes_exactly_with_what_selects_the_cluster() {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path().to_str().unwrap();
        let write = |name: &str, content: &str| std::fs::write(directory.path().join(name), content).unwrap();
        let block = |config: &str| {
            let json = format!(r#"{{"backend":{{"type":"kubernetes","config":{{{config}}}}}}}"#);
            CachedBackend::parse(json.as_bytes()).unwrap()
        };
        let of = |config: &str, set: &[(&str, &str)]| {
            fingerprint(&block(config), directory.path(), |name| {
                let set = set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
                set.or_else(|| (name == "HOME").then(|| home.to_owned()))
            })
        };
        let absolute = format!("{home}/d");
        let ways = [
            (r#""config_path":"a""#, vec![], "a"),
            (r#""config_path":"~/b""#, vec![], "b"),
            (r#""config_paths":["a","c"]"#, vec![], "c"),
            ("", vec![("KUBE_CONFIG_PATH", absolute.as_str())], "d"),
            ("", vec![("KUBE_CONFIG_PATHS", "~/a:e")], "e"),
            (r#""config_path":"/no/such/file""#, vec![("KUBE_CONFIG_PATH", "~/f")], "f"),
        ];
        for (config, set, file) in ways {
            write(file, "current-context: prod");
            let before = of(config, &set);
            assert_eq!(before, of(config, &set), "{config} {set:?}");
            assert_eq!(before, of(config, &[&set[..], &[("KUBE_TOKEN", "x")]].concat()), "a login selects no cluster");
            write(file, "current-context: staging");
            assert_ne!(before, of(config, &set), "{config} {set:?}");
            write(file, "current-context: prod");
            assert_eq!(before, of(config, &set), "{config} {set:?}");
        }
        for name in VARIABLES {
            assert_ne!(of("", &[]), of("", &[(name, "x")]), "{name}");
        }
        for name in ATTRIBUTES {
            let [one, other] = ["x", "y"].map(|value| of(&format!(r#""{name}":"{value}""#), &[]));
            assert_ne!(one, other, "{name}");
        }
    }
}
