//! Finds the locations where a lock can be.
//!
//! The log names a lock's bucket and key, but not its table, region, endpoint or account. Those are in the backend that
//! `terraform init` cached. So the log's bucket and key select among the backends that the run can have used. A log
//! record that matches none of them is reported to the user, and `tf` never searches another backend's table for its
//! lock: the record may come from a nested terraform or from `terraform_remote_state`, or it may be forged.

use serde_json::{Value, json};

use super::stores::{LOCK_FILE, StoreKey, Stores};
use crate::terraform::backend::CachedBackend;
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::log::{LockIdentity, LockParts, RecordedLock, UnnamedLock};

/// The location of one lock in an S3 backend.
#[derive(Clone, Debug)]
pub(crate) struct LockLocation {
    /// The backend whose settings are used to reach the lock.
    pub(crate) backend: CachedBackend,
    /// The bucket of the state.
    pub(crate) bucket: String,
    /// The key of the state.
    pub(crate) key: String,
    /// The DynamoDB table. `None` if the lock has no part in DynamoDB.
    pub(crate) table: Option<String>,
    /// Whether the lock has a part in S3.
    pub(crate) lock_file: bool,
}

impl LockLocation {
    /// Returns the location for another process of `tf`. The result may contain credentials, as
    /// [`CachedBackend::to_json`] says.
    pub(crate) fn to_json(&self) -> Value {
        let Self { backend, bucket, key, table, lock_file } = self;
        json!({ "backend": backend.to_json(), "bucket": bucket, "key": key, "table": table, "lock_file": lock_file })
    }

    /// Returns the location that [`LockLocation::to_json`] has written. `None` if `json` is something else.
    pub(crate) fn of_json(json: &Value) -> Option<Self> {
        Some(Self {
            backend: CachedBackend::of_json(json.get("backend")?.clone())?,
            bucket: json.get("bucket")?.as_str()?.to_owned(),
            key: json.get("key")?.as_str()?.to_owned(),
            table: serde_json::from_value(json.get("table")?.clone()).ok()?,
            lock_file: json.get("lock_file")?.as_bool()?,
        })
    }

    /// Returns the `LockID` of the part in DynamoDB, which is also the `Path` of the lock
    /// (backend/remote-state/s3/client.go, `lockPath`).
    pub(crate) fn lock_path(&self) -> String {
        format!("{}/{}", self.bucket, self.key)
    }

    /// Returns the key of the part in S3.
    pub(crate) fn lock_key(&self) -> String {
        format!("{}{LOCK_FILE}", self.key)
    }

    /// Returns the locations of the lock's parts, in the order in which the parts are released.
    pub(crate) fn store_keys(&self, stores: &Stores) -> Vec<StoreKey> {
        let item = self.table.as_ref().map(|table| stores.item(table, self.lock_path()));
        item.into_iter().chain(self.lock_file.then(|| stores.object(&self.bucket, &self.lock_key()))).collect()
    }
}

/// The workspaces that a run can have used.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Workspaces<'a> {
    /// Only the workspaces with these names.
    These(&'a [String]),
    /// Every workspace.
    Any,
}

impl Workspaces<'_> {
    /// Whether the state of one of these workspaces has the key `key` in `backend`.
    fn have(self, backend: &CachedBackend, key: &str) -> bool {
        match self {
            Self::These(names) => names.iter().any(|name| backend.state_key(name).as_deref() == Some(key)),
            Self::Any => backend.has_state(key),
        }
    }
}

/// Returns the locations where `lock` can be. `backends` are the data directories before and after the run.
/// `workspaces` are the workspaces that the run can have used. There is more than one location if an `init` changed the
/// settings with which the same bucket is reached. Empty if no backend matches.
pub(crate) fn find(lock: &RecordedLock, backends: &[&DataDirectory], workspaces: Workspaces<'_>) -> Vec<LockLocation> {
    let locations = of_state(&lock.bucket, &lock.key, backends, workspaces).into_iter().filter_map(|location| {
        let LockParts { s3, dynamodb } = lock.parts;
        let table = location.table.filter(|_| dynamodb);
        // If the lock has a part in DynamoDB and this backend names no table, the lock belongs to another backend.
        (!dynamodb || table.is_some()).then_some(LockLocation { table, lock_file: s3, ..location })
    });
    locations.collect()
}

/// Like [`find`], for a lock whose ID is not known.
pub(crate) fn find_unnamed(
    lock: &UnnamedLock,
    backends: &[&DataDirectory],
    workspaces: Workspaces<'_>,
) -> Vec<LockLocation> {
    match &lock.identity {
        LockIdentity::Object { bucket, key, .. } => of_state(bucket, key, backends, workspaces),
        LockIdentity::Workspace(workspace) => {
            let s3 = distinct(backends).into_iter().filter(|backend| backend.kind == "s3");
            s3.filter_map(|backend| Some(of(backend, backend.string("bucket")?, &backend.state_key(workspace)?)))
                .collect()
        }
    }
}

/// Returns a location for each backend in which the state `bucket`/`key` belongs to one of `workspaces`.
pub(crate) fn of_state(
    bucket: &str,
    key: &str,
    backends: &[&DataDirectory],
    workspaces: Workspaces<'_>,
) -> Vec<LockLocation> {
    let fitting = distinct(backends).into_iter().filter(|backend| {
        backend.kind == "s3" && backend.string("bucket") == Some(bucket) && workspaces.have(backend, key)
    });
    fitting.map(|backend| of(backend, bucket, key)).collect()
}

/// Returns the location of the lock of the state `bucket`/`key` in `backend`.
fn of(backend: &CachedBackend, bucket: &str, key: &str) -> LockLocation {
    LockLocation {
        backend: backend.clone(),
        bucket: bucket.to_owned(),
        key: key.to_owned(),
        table: backend.string("dynamodb_table").map(ToOwned::to_owned),
        lock_file: backend.flag("use_lockfile"),
    }
}

/// Returns the backends of `directories`, each one once.
fn distinct<'a>(directories: &[&'a DataDirectory]) -> Vec<&'a CachedBackend> {
    let mut known: Vec<&CachedBackend> = Vec::new();
    for backend in directories.iter().filter_map(|directory| directory.backend.as_ref()) {
        if !known.contains(&backend) {
            known.push(backend);
        }
    }
    known
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::Log;
    use crate::terraform::log::tests::{ID, lock_line};

    fn directory(config: &str) -> DataDirectory {
        let json = format!(r#"{{"version":3,"backend":{{"type":"s3","config":{config}}}}}"#);
        DataDirectory { backend: CachedBackend::parse(json.as_bytes()), workspace: "default".into() }
    }

    fn lock(kind: &str) -> RecordedLock {
        let mut log = Log::default();
        log.read(lock_line(7, &format!("Attempting to lock remote state ({kind})..."), ID, "r").as_bytes());
        log.named().next().unwrap().clone()
    }

    #[test]
    fn another_process_gets_the_whole_location() {
        let backend = r#"{"bucket":"b","key":"k","secret_key":"s","dynamodb_table":"t","use_lockfile":true}"#;
        for (table, lock_file) in [(Some("t".to_owned()), false), (None, true)] {
            let backend = directory(backend).backend.unwrap();
            let location = LockLocation { backend, bucket: "b".into(), key: "k".into(), table, lock_file };
            let read = LockLocation::of_json(&location.to_json()).unwrap();
            assert_eq!((&read.backend, &read.bucket, &read.key), (&location.backend, &location.bucket, &location.key));
            assert_eq!((&read.table, read.lock_file), (&location.table, location.lock_file));
        }
        assert!(LockLocation::of_json(&json!({ "bucket": "b" })).is_none());
    }

    fn default() -> Vec<String> {
        vec!["default".into()]
    }

    #[test]
    fn the_backend_with_the_bucket_and_the_key_is_the_place() {
        let fits = directory(r#"{"bucket":"bkt","key":"dir/prod.tfstate","dynamodb_table":"locks","region":"r"}"#);
        let location = find(&lock("S3 Native and DynamoDB"), &[&fits, &fits], Workspaces::These(&default()));
        let [location] = location.as_slice() else { panic!("{location:?}") };
        assert_eq!(location.lock_path(), "bkt/dir/prod.tfstate");
        assert_eq!(location.lock_key(), "dir/prod.tfstate.tflock");
        assert_eq!((location.table.as_deref(), location.lock_file), (Some("locks"), true));
    }

    #[test]
    fn the_item_is_released_before_the_object() {
        let stores = Stores::offline("eu-west-1");
        for (table, lock_file, expected) in [
            (Some("locks"), true, vec!["DynamoDB", "S3"]),
            (Some("locks"), false, vec!["DynamoDB"]),
            (None, true, vec!["S3"]),
            (None, false, vec![]),
        ] {
            let location = LockLocation {
                backend: directory("{}").backend.unwrap(),
                bucket: "bkt".into(),
                key: "dir/prod.tfstate".into(),
                table: table.map(ToOwned::to_owned),
                lock_file,
            };
            let store_keys = location.store_keys(&stores);
            assert_eq!(store_keys.iter().map(StoreKey::service).collect::<Vec<_>>(), expected);
            assert!(store_keys.iter().all(|key| key.path() == "bkt/dir/prod.tfstate"), "{store_keys:?}");
        }
    }

    #[test]
    fn a_lock_without_a_name_is_where_its_object_or_its_workspace_is() {
        let progress = crate::terraform::logged_lock::Progress::asked("2026-11-23T01:46:07Z".parse().unwrap());
        let unnamed = |identity| UnnamedLock { identity, progress };
        let object = |bucket: &str| {
            unnamed(LockIdentity::Object {
                bucket: bucket.into(),
                key: "dir/green/prod.tfstate".into(),
                checksum: None,
            })
        };
        let workspace = |name: &str| unnamed(LockIdentity::Workspace(name.into()));
        let s3 = directory(r#"{"bucket":"bkt","key":"prod.tfstate","workspace_key_prefix":"dir"}"#);
        let gcs = DataDirectory {
            backend: CachedBackend::parse(
                br#"{"version":3,"backend":{"type":"gcs","config":{"bucket":"bkt","key":"prod.tfstate"}}}"#,
            ),
            workspace: "default".into(),
        };
        for (lock, expected) in [
            (object("bkt"), vec!["bkt/dir/green/prod.tfstate"]),
            (object("other"), vec![]),
            (workspace("default"), vec!["bkt/prod.tfstate"]),
            (workspace("green"), vec!["bkt/dir/green/prod.tfstate"]),
        ] {
            let locations = find_unnamed(&lock, &[&s3, &gcs], Workspaces::Any);
            assert_eq!(locations.iter().map(LockLocation::lock_path).collect::<Vec<_>>(), expected, "{lock:?}");
        }
        let none = find_unnamed(&object("bkt"), &[&s3], Workspaces::These(&default()));
        assert!(none.is_empty(), "the run cannot have used that workspace");
    }

    #[test]
    fn a_record_that_fits_no_backend_has_no_place() {
        for config in [
            r#"{"bucket":"other","key":"dir/prod.tfstate","dynamodb_table":"locks"}"#,
            r#"{"bucket":"bkt","key":"dir/other.tfstate","dynamodb_table":"locks"}"#,
            r#"{"bucket":"bkt","key":"dir/prod.tfstate"}"#,
            "{}",
        ] {
            assert!(
                find(&lock("DynamoDB only"), &[&directory(config)], Workspaces::These(&default())).is_empty(),
                "{config}"
            );
        }
        assert!(find(&lock("DynamoDB only"), &[], Workspaces::These(&default())).is_empty());
    }

    #[test]
    fn only_the_workspaces_of_this_run_fit() {
        let backend = directory(r#"{"bucket":"bkt","key":"prod.tfstate","workspace_key_prefix":"dir"}"#);
        let mut lock = lock("S3 Native only");
        lock.key = "dir/green/prod.tfstate".into();
        assert!(find(&lock, &[&backend], Workspaces::These(&default())).is_empty());
        assert_eq!(find(&lock, &[&backend], Workspaces::These(&["default".into(), "green".into()])).len(), 1);
    }

    #[test]
    fn a_migration_goes_through_every_workspace_and_through_no_other_state() {
        let backend = directory(r#"{"bucket":"bkt","key":"prod.tfstate","workspace_key_prefix":"dir"}"#);
        let mut lock = lock("S3 Native only");
        for (key, found) in [
            ("prod.tfstate", 1),
            ("dir/green/prod.tfstate", 1),
            ("dir/green/other.tfstate", 0),
            ("green/prod.tfstate", 0),
            ("dir/a/b/prod.tfstate", 0),
            ("dir//prod.tfstate", 0),
        ] {
            lock.key = key.into();
            assert_eq!(find(&lock, &[&backend], Workspaces::Any).len(), found, "{key}");
        }
    }

    #[test]
    fn the_backend_after_the_run_counts_as_much_as_the_one_before() {
        let before = directory(r#"{"bucket":"old","key":"dir/prod.tfstate"}"#);
        let after = directory(r#"{"bucket":"bkt","key":"dir/prod.tfstate"}"#);
        assert_eq!(find(&lock("S3 Native only"), &[&before, &after], Workspaces::These(&default())).len(), 1);
        let moved = directory(r#"{"bucket":"bkt","key":"dir/prod.tfstate","region":"elsewhere"}"#);
        assert_eq!(find(&lock("S3 Native only"), &[&moved, &after], Workspaces::These(&default())).len(), 2);
    }
}
