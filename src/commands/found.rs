//! The locks that a command has found, with the verdicts on their holders.

use std::sync::Arc;

use jiff::Timestamp;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::lease_view::LeaseView;
use crate::cleanup::messages::refused::CLOCK_SLACK_WINDOW;
use crate::console::visible;
use crate::holder::evidence::{Judgement, NOT_YET, Verdict};
use crate::lease::observed::ObservedLease;
use crate::lock::leased::StoredPart;
use crate::lock::probe;
use crate::lock::stores::{StoreKey, StoredLock};
use crate::terraform::lock_info::{LockInfo, split_path};
use crate::time::saturating_add;

/// One lock, with those of its parts that exist.
#[derive(Clone, Debug)]
pub(super) struct FoundLock {
    pub(super) info: LockInfo,
    /// The parts that exist, at least one: DynamoDB before S3.
    pub(super) parts: Vec<(StoreKey, StoredLock)>,
    /// The lease record of the first part that has one. `None` if no part has one.
    pub(super) lease: Option<Box<ObservedLease>>,
    /// The workspace; `None` if it is not known.
    pub(super) workspace: Option<String>,
    /// What is unusual about the lock, for example a missing part.
    pub(super) notes: Vec<String>,
    /// The ID of another lock that holds the other part of the same location; `None` if there is none.
    pub(super) rival: Option<String>,
    /// The judgement on the holder. `None` if the holder was not judged yet.
    pub(super) judgement: Option<Arc<Judgement>>,
    /// Whether the lock needs attention.
    pub(super) stale: bool,
}

/// An entry (an item or an object) in a lock's place that is not a lock, or that could not be read.
#[derive(Clone, Debug, Serialize)]
pub(super) struct UnreadableLock {
    pub(super) place: StoreKey,
    pub(super) reason: String,
    /// The stored item or object. `None` if it could not be read; whether it is a lock is then unknown. In JSON, only
    /// whether it was read.
    #[serde(rename = "read", serialize_with = "is_some")]
    pub(super) stored: Option<StoredLock>,
}

#[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
fn is_some<T, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bool(value.is_some())
}

impl UnreadableLock {
    /// Returns whether the entry could not be read.
    pub(super) fn is_unread(&self) -> bool {
        self.stored.is_none()
    }

    /// Returns whether a test of the service has put the entry.
    pub(super) fn is_test_object(&self) -> bool {
        self.stored.as_ref().is_some_and(|stored| probe::is_test_object(&self.place, stored))
    }

    /// Returns where the entry is and what is wrong with it, for a message.
    pub(super) fn describe(&self) -> String {
        format!("{} ({})", visible(&self.place.describe()), self.reason)
    }
}

/// A lock, or an entry in a lock's place that is not a lock or could not be read.
#[derive(Clone, Debug)]
pub(super) enum ListedEntry {
    Lock(Box<FoundLock>),
    UnreadableLock(UnreadableLock),
}

/// Which parts a lock of the backend must have. Both are false if the backend is not known.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    pub(super) dynamodb: bool,
    pub(super) s3: bool,
}

impl ListedEntry {
    /// Returns whether this is an entry that could not be read.
    pub(super) fn is_unread(&self) -> bool {
        matches!(self, Self::UnreadableLock(unreadable) if unreadable.is_unread())
    }

    /// Returns whether this entry needs attention: it is a stale lock, or it is not a lock and blocks every run.
    pub(super) fn is_stale(&self) -> bool {
        match self {
            Self::Lock(lock) => lock.stale,
            Self::UnreadableLock(unreadable) => !unreadable.is_unread(),
        }
    }
}

/// Returns the message for a scan in which `unread` lock objects could not be read.
pub(super) fn not_whole(unread: u64) -> String {
    format!(
        "{unread} lock objects could not be read, so their holders are not known\n`tf locks list` with the same options \
         shows the reason for each (AccessDenied means that the permission s3:GetObject is missing)"
    )
}

impl FoundLock {
    /// Returns the judgement on the holder, which is [`NOT_YET`] if the holder was not judged yet.
    pub(super) fn judgement(&self) -> &Judgement {
        self.judgement.as_deref().unwrap_or(&NOT_YET)
    }

    pub(super) fn verdict(&self) -> Verdict {
        self.judgement().verdict
    }

    /// Returns the location of the lock's first part, for messages.
    pub(super) fn place(&self) -> &StoreKey {
        &self.parts[0].0
    }

    /// Returns `bucket/key` of the lock's state.
    pub(super) fn path(&self) -> String {
        self.place().path()
    }

    /// Adds a note if the lock's `Path` is not where it is stored.
    fn compare_path(&mut self) {
        if self.info.path != self.place().path_in_place() {
            self.notes.push("the lock's Path is not the place where it is stored".to_owned());
        }
    }

    /// Returns how long the lock has been held, by this host's clock. `None` if `Created` is not a time, or is ahead of
    /// this host's clock by more than [`CLOCK_SLACK_WINDOW`] (1 min); if it is ahead by less, the age is zero.
    pub(super) fn age(&self, now: Timestamp) -> Option<std::time::Duration> {
        age_at(self.info.created()?, now)
    }
}

/// Returns the age of a lock that was created at `created`, as [`FoundLock::age`].
pub(super) fn age_at(created: Timestamp, now: Timestamp) -> Option<std::time::Duration> {
    if created > now && created <= saturating_add(now, CLOCK_SLACK_WINDOW) {
        return Some(std::time::Duration::ZERO);
    }
    now.duration_since(created).try_into().ok()
}

/// Combines the parts that were read at the locations of one state's lock. Parts with the same ID become one lock, and
/// parts with different IDs become different locks. An entry that is not a lock becomes an [`UnreadableLock`]. If
/// `workspace` is `None`, the workspace is derived from the key where possible. The holders are not judged yet.
pub(super) fn pair(wanted: Wanted, parts: Vec<StoredPart>, workspace: Option<&str>) -> Vec<ListedEntry> {
    let mut locks: Vec<Box<FoundLock>> = Vec::new();
    let mut unreadable: Vec<UnreadableLock> = Vec::new();
    for part in parts {
        match read(part, workspace) {
            ListedEntry::UnreadableLock(not_a_lock) => unreadable.push(not_a_lock),
            ListedEntry::Lock(part) => match locks.iter_mut().find(|lock| lock.info.id == part.info.id) {
                Some(lock) => {
                    lock.parts.extend(part.parts);
                    lock.lease = lock.lease.take().or(part.lease);
                }
                None => locks.push(part),
            },
        }
    }
    if locks.len() > 1 {
        let ids: Vec<String> = locks.iter().map(|lock| lock.info.id.clone()).collect();
        for lock in &mut locks {
            lock.rival = ids.iter().find(|id| **id != lock.info.id).cloned();
        }
    }
    for lock in &mut locks {
        let has = |dynamodb: bool| {
            lock.parts.iter().any(|(store_key, _)| matches!(store_key, StoreKey::DynamoDb { .. }) == dynamodb)
        };
        let (item, object) = (has(true), has(false));
        let junk =
            |dynamodb: bool| unreadable.iter().find(|junk| matches!(junk.place, StoreKey::DynamoDb { .. }) == dynamodb);
        if let Some(junk) = junk(!item).filter(|_| item != object) {
            lock.notes.push(format!("its other part is not a lock, so every run is refused: {}", junk.describe()));
        } else if lock.rival.is_some() {
            lock.notes.push("its other part is another lock, with another ID".to_owned());
        } else if item && !object && wanted.s3 {
            lock.notes
                .push("only part of a lock: the backend locks in S3 too, but there is no .tflock object".to_owned());
        } else if object && !item && wanted.dynamodb && wanted.s3 {
            lock.notes.push("only part of a lock: the backend locks in DynamoDB too, but there is no item".to_owned());
        } else if object && !item && wanted.dynamodb {
            lock.notes.push(
                "the backend of this directory does not set use_lockfile; the lock was taken by a run whose backend sets it".to_owned(),
            );
        }
        lock.compare_path();
    }
    let locks = locks.into_iter().map(ListedEntry::Lock);
    locks.chain(unreadable.into_iter().map(ListedEntry::UnreadableLock)).collect()
}

/// Does the same as [`pair`], for one part that a scan has found.
pub(super) fn alone(part: StoredPart) -> ListedEntry {
    let mut entry = read(part, None);
    if let ListedEntry::Lock(lock) = &mut entry {
        lock.compare_path();
    }
    entry
}

/// Returns the entry of this part, without notes, and not judged. Its workspace is as in [`pair`].
fn read(StoredPart { store_key, stored, lease }: StoredPart, workspace: Option<&str>) -> ListedEntry {
    let Some(info) = stored.info() else {
        let is_test_object = probe::is_test_object(&store_key, &stored);
        let reason = if is_test_object { TEST_OBJECT.to_owned() } else { why_unreadable(&stored) };
        return ListedEntry::UnreadableLock(UnreadableLock { reason, place: store_key, stored: Some(stored) });
    };
    ListedEntry::Lock(Box::new(FoundLock {
        notes: Vec::new(),
        rival: None,
        workspace: workspace.map(ToOwned::to_owned).or_else(|| guess_workspace(&store_key.path_in_place())),
        info,
        parts: vec![(store_key, stored)],
        lease,
        judgement: None,
        stale: false,
    }))
}

/// Why an object is not a lock that a test of the service has put.
const TEST_OBJECT: &str = "tf has put it to test the service";

/// Returns why `stored` is not a lock.
fn why_unreadable(stored: &StoredLock) -> String {
    let text = stored.text();
    let it = if matches!(stored, StoredLock::Item(_)) { "its Info" } else { "its content" };
    match serde_json::from_str::<serde_json::Value>(text) {
        _ if text.is_empty() => stored.describe_no_lock(),
        Err(_) => format!("{it} is not JSON"),
        Ok(value) if !value.is_object() => format!("{it} is not a JSON object"),
        Ok(value) if value.get("ID").is_none_or(|id| id.as_str().is_none_or(str::is_empty)) => {
            format!("{it} has no ID")
        }
        Ok(_) => format!("a field of {it} is not text"),
    }
}

/// Returns the workspace in a path that has terraform's default prefix for workspaces, `env:`. `None` for any other
/// path: a prefix that a user chose cannot be recognised.
fn guess_workspace(path: &str) -> Option<String> {
    let (_, key) = split_path(path)?;
    let (name, _) = key.strip_prefix("env:/")?.split_once('/')?;
    Some(name.to_owned())
}

impl Serialize for FoundLock {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let places: Vec<&StoreKey> = self.parts.iter().map(|(store_key, _)| store_key).collect();
        let judgement = self.judgement();
        let mut object = serializer.serialize_struct("Lock", 15)?;
        object.serialize_field("id", &self.info.id)?;
        object.serialize_field("path", &self.path())?;
        object.serialize_field("workspace", &self.workspace)?;
        object.serialize_field("operation", &self.info.operation)?;
        object.serialize_field("who", &self.info.who)?;
        object.serialize_field("created", &self.info.created)?;
        object.serialize_field("version", &self.info.version)?;
        object.serialize_field("place", self.place())?;
        object.serialize_field("halves", &places)?;
        object.serialize_field("verdict", &judgement.verdict)?;
        object.serialize_field("stale", &self.stale)?;
        object.serialize_field("reason", &judgement.reason)?;
        object.serialize_field("evidence", &judgement.evidence)?;
        object.serialize_field("notes", &self.notes)?;
        object.serialize_field("lease", &self.lease.as_deref().map(LeaseView::of))?;
        object.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::observed::tests::lease;
    use crate::lease::record::Promise;
    use crate::lock::dynamodb::InfoAttribute;

    fn item(info: &str) -> StoredPart {
        let store_key = StoreKey::DynamoDb { table: "t".into(), key: "b/k".into(), region: "r".into() };
        StoredPart { store_key, stored: StoredLock::Item(InfoAttribute::Text(info.into())), lease: None }
    }

    fn object(body: &str) -> StoredPart {
        let store_key = StoreKey::S3 { bucket: "b".into(), key: "k.tflock".into(), region: "r".into() };
        let stored = StoredLock::Object(crate::lock::s3::Object {
            body: body.into(),
            member: crate::lease::record::Member::None,
            length: body.len() as u64,
            etag: None,
        });
        StoredPart { store_key, stored, lease: None }
    }

    fn info(id: &str) -> String {
        format!(r#"{{"ID":"{id}","Path":"b/k"}}"#)
    }

    const BOTH: Wanted = Wanted { dynamodb: true, s3: true };

    fn locks(entries: &[ListedEntry]) -> Vec<&FoundLock> {
        entries
            .iter()
            .filter_map(|entry| match entry {
                ListedEntry::Lock(lock) => Some(&**lock),
                ListedEntry::UnreadableLock(_) => None,
            })
            .collect()
    }

    #[test]
    fn halves_of_one_id_are_one_lock_and_of_two_are_two() {
        let one = pair(BOTH, vec![item(&info("a")), object(&info("a"))], None);
        assert_eq!((one.len(), locks(&one)[0].parts.len(), locks(&one)[0].notes.len()), (1, 2, 0));
        let two = pair(BOTH, vec![item(&info("a")), object(&info("b"))], None);
        assert_eq!(locks(&two).len(), 2);
        assert!(locks(&two).iter().all(|lock| lock.notes[0].contains("another ID")));
    }

    #[test]
    fn a_lock_has_the_lease_of_its_first_part_that_has_one() {
        let with =
            |part: StoredPart, age| StoredPart { lease: Some(Box::new(lease("a", age, None, Promise::Stop))), ..part };
        let (item, object) = (|| item(&info("a")), || object(&info("a")));
        for (parts, age) in [
            (vec![item(), object()], None),
            (vec![with(item(), 1), object()], Some(1)),
            (vec![item(), with(object(), 2)], Some(2)),
            (vec![with(item(), 1), with(object(), 2)], Some(1)),
        ] {
            let found = pair(BOTH, parts, None);
            let expected = age.map(|age| lease("a", age, None, Promise::Stop));
            assert_eq!(locks(&found)[0].lease.as_deref(), expected.as_ref());
        }
    }

    #[test]
    fn a_half_alone_is_said_to_be_one() {
        for (wanted, half, expected) in [
            (BOTH, item(&info("a")), "only part of a lock"),
            (BOTH, object(&info("a")), "only part of a lock"),
            (Wanted { dynamodb: true, s3: false }, object(&info("a")), "does not set use_lockfile"),
        ] {
            let found = pair(wanted, vec![half], None);
            assert!(locks(&found)[0].notes[0].contains(expected), "{:?}", locks(&found)[0].notes);
        }
        for (wanted, half) in
            [(Wanted { dynamodb: true, s3: false }, item(&info("a"))), (Wanted::default(), object(&info("a")))]
        {
            assert!(locks(&pair(wanted, vec![half], None))[0].notes.is_empty());
        }
    }

    #[test]
    fn what_is_no_lock_beside_a_lock_is_named_and_not_taken_for_nothing() {
        for parts in [[item(""), object(&info("a"))], [item(&info("a")), object("")]] {
            let found = pair(BOTH, parts.to_vec(), None);
            let [lock] = locks(&found)[..] else { panic!("{found:?}") };
            assert!(lock.notes[0].contains("is not a lock, so every run is refused"), "{:?}", lock.notes);
            assert_eq!(lock.notes.len(), 1, "{:?}", lock.notes);
            assert!(found.iter().filter(|entry| entry.is_stale()).count() == 1, "{found:?}");
        }
    }

    #[test]
    fn what_is_no_lock_says_why() {
        for (text, expected) in [
            ("", "an item with an empty Info"),
            ("{", "not JSON"),
            ("[]", "not a JSON object"),
            ("{}", "no ID"),
            (r#"{"ID":""}"#, "no ID"),
            (r#"{"ID":7}"#, "no ID"),
            (r#"{"ID":"a","Who":7}"#, "is not text"),
        ] {
            match &pair(BOTH, vec![item(text)], None)[..] {
                [ListedEntry::UnreadableLock(unreadable)] => assert!(unreadable.reason.contains(expected), "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_workspace_is_told_by_terraforms_own_prefix() {
        assert_eq!(guess_workspace("b/env:/green/dir/k").as_deref(), Some("green"));
        assert_eq!(guess_workspace("b/dir/env:/green/k"), None);
        assert_eq!(guess_workspace("b"), None);
    }
}
