//! Selects one lock by its ID, path, key or workspace.

use super::connection::{Connection, Directory, LocationArgs, ScanTarget, Trouble};
use super::found::{FoundLock, ListedEntry, UnreadableLock, Wanted, pair};
use super::inventory;
use super::staleness::Staleness;
use crate::aws::failure::Failure;
use crate::console::{self, visible, visible_whole};
use crate::holder::host::HostView;
use crate::lock::dynamodb::InfoAttribute;
use crate::lock::leased::StoredPart;
use crate::lock::stores::{LOCK_FILE, StoreKey, StoredLock};
use crate::terraform::data_directory::{CommandDirectories, DataDirectory};
use crate::terraform::lock_info::{is_lock_id, split_path};

/// The result of [`choose`].
pub(super) enum Choice {
    /// A lock, and the entries at the same path that are not locks.
    Lock(Box<FoundLock>, Vec<UnreadableLock>),
    /// No lock, but at least one entry that is not a lock. All of them are at the same path.
    NoLock(Vec<UnreadableLock>),
}

/// Finds the lock that `which` names, and judges its holder, with the witness if there is one. In a directory, `which`
/// is an ID, a path (`bucket/key`), a key or the name of a workspace; if it is `None`, there must be exactly one lock.
/// In a table, `which` is a path, and in a bucket a path or a key. For a table, the object of the same path is read
/// too. For a bucket, the table is not known.
///
/// If `no_lock` is set, only entries that are not locks match.
///
/// # Errors
/// Fails if nothing matches, if several locks match, or if a request fails. For a table or a bucket, also fails if
/// `which` is `None`. For a table, also fails if `which` is an ID or the path of a digest.
pub(super) async fn choose(reach: &Connection, which: Option<&str>, no_lock: bool) -> Result<Choice, Trouble> {
    let entries = match (&reach.target, which) {
        (ScanTarget::Directory(directory), which) => {
            let selected = match which {
                Some(word) => inventory::take_selected(directory, &reach.stores, word).await?,
                None => None,
            };
            match selected {
                Some(entries) => entries,
                None => inventory::take(directory, &reach.stores, &Staleness::default()).await?.entries,
            }
        }
        (ScanTarget::Table(_), Some(word)) if is_lock_id(word) => {
            return Err(Trouble::Said(format!(
                "in a table, a lock is selected by its path, not by its ID\nto see the path of {word}, type `tf locks list` \
                 with the same options"
            )));
        }
        (ScanTarget::Table(_) | ScanTarget::Bucket(..), Some(path)) => {
            let entries = read_at(reach, path).await?;
            match console::shown_as(path).filter(|_| entries.is_empty()) {
                Some(stored) => read_at(reach, &stored).await?,
                None => entries,
            }
        }
        (ScanTarget::Table(_) | ScanTarget::Bucket(..), None) => {
            return Err(Trouble::Said(
                "no lock is selected\nadd the lock's path; `tf locks list` with the same options shows the paths"
                    .into(),
            ));
        }
    };
    let entries: Vec<ListedEntry> =
        entries.into_iter().filter(|entry| !no_lock || matches!(entry, ListedEntry::UnreadableLock(_))).collect();
    match (&reach.target, which) {
        (ScanTarget::Directory(directory), None) if entries.is_empty() => {
            Err(nothing_here(directory, reach.stores.region(), no_lock))
        }
        (target, which) => {
            let mut choice = one_of(entries, which, matches!(target, ScanTarget::Directory(_)))?;
            if let Choice::Lock(lock, _) = &mut choice {
                Staleness::default().ask_about(lock).await;
            }
            Ok(choice)
        }
    }
}

/// Builds the error for a directory whose backend has no entry that matches. For `no_lock`, see [`choose`]. `region` is
/// the region of the backend's table.
fn nothing_here(directory: &Directory, region: &str, no_lock: bool) -> Trouble {
    let state = visible(&format!("{}/{}", directory.bucket, directory.key));
    let (chdir, data) = (directory.path.to_string_lossy(), DataDirectory::named_here());
    let directories = CommandDirectories { chdir: Some(&chdir), data: data.as_deref(), workspace: None };
    if no_lock {
        return Trouble::Said(format!(
            "nothing was deleted: --no-lock found nothing that is not a lock for {state}\n\
             to see which locks are held, type: {}",
            directories.locks("list")
        ));
    }
    let elsewhere = directory.table.as_ref().map_or_else(String::new, |table| {
        let next = match LocationArgs::of_table(&directory.backend, table, region) {
            Ok(place) => format!("to list all locks of the table, type: {}", place.command("list")),
            Err(others) => format!(
                "`tf locks list --table` has no option for these settings of the backend, so it may fail or read \
                 another account: {}\nto see the lock of one workspace, replace WORKSPACE with its name and type: {}",
                visible(&others.join(", ")),
                CommandDirectories { workspace: Some("WORKSPACE"), ..directories }.locks("list")
            ),
        };
        format!("\na workspace that has no state yet may have a lock in DynamoDB\n{next}")
    });
    Trouble::Said(format!("no lock is held for {state}{elsewhere}"))
}

/// Reads the lock with this path in a table or a bucket. The entries of a directory are read elsewhere.
async fn read_at(reach: &Connection, path: &str) -> Result<Vec<ListedEntry>, Trouble> {
    match &reach.target {
        ScanTarget::Directory(_) => Ok(Vec::new()),
        ScanTarget::Table(table) => read_both(reach, table, path).await,
        ScanTarget::Bucket(bucket, _) => {
            let key = path.strip_prefix(&format!("{bucket}/")).unwrap_or(path);
            let key = key.strip_suffix(LOCK_FILE).unwrap_or(key);
            let object = reach.stores.object(bucket, &format!("{key}{LOCK_FILE}"));
            Ok(judged(read(reach, &object).await?.into_iter().collect()))
        }
    }
}

async fn read(reach: &Connection, store_key: &StoreKey) -> Result<Option<StoredPart>, Trouble> {
    let failed = |failure| Trouble::failed(failure, &visible(&store_key.describe()), &reach.stores);
    reach.stores.read_part(store_key).await.map_err(failed)
}

/// Reads the item with the path `path` in `table`, and the object of the same state: a lock may have both parts, and
/// each of them alone refuses every run. The user has named the table alone, so the object need not be readable.
async fn read_both(reach: &Connection, table: &str, path: &str) -> Result<Vec<ListedEntry>, Trouble> {
    let item = read(reach, &reach.stores.item(table, path)).await?;
    if item.as_ref().is_some_and(|item| is_digest(path, &item.stored)) {
        return Err(Trouble::Said(format!(
            "{} is the digest of a state, not a lock\nto fix a digest that does not match its state, type in the \
             directory of that state: tf locks doctor --fix-digest",
            visible(path)
        )));
    }
    let object = match split_path(path) {
        Some((bucket, key)) => reach.stores.read_part(&reach.stores.object(bucket, &format!("{key}{LOCK_FILE}"))).await,
        None => Ok(None),
    };
    let object = object.unwrap_or_else(|failure| {
        if let Some(note) = unseen_object(&failure).filter(|_| item.is_some()) {
            console::say(&note);
        }
        None
    });
    let has_item = item.is_some();
    let mut entries = judged(item.into_iter().chain(object).collect());
    if has_item {
        // The path selects the item. A lock of another run that has only the object is named with it
        // ([`FoundLock::rival`]).
        entries.retain(|entry| match entry {
            ListedEntry::Lock(lock) => matches!(lock.place(), StoreKey::DynamoDb { .. }),
            ListedEntry::UnreadableLock(_) => true,
        });
    }
    Ok(entries)
}

/// Returns whether `stored`, an item with the path `path`, is the digest of a state. The key of a state may end with
/// `-md5` too. The item of its lock has an `Info`, which a digest does not have.
fn is_digest(path: &str, stored: &StoredLock) -> bool {
    path.ends_with("-md5") && matches!(stored, StoredLock::Item(InfoAttribute::None))
}

/// Returns what to say if the read of the object that a lock may have beside its item has failed. `None` if there can
/// be no object.
fn unseen_object(failure: &Failure) -> Option<String> {
    if failure.cause().excludes_locks() {
        None
    } else if failure.denied().is_some() {
        Some(inventory::UNSEEN.to_owned())
    } else {
        Some(format!("the .tflock object of this lock was not checked\n{failure}"))
    }
}

fn judged(parts: Vec<StoredPart>) -> Vec<ListedEntry> {
    let mut entries = pair(Wanted::default(), parts, None);
    Staleness::default().judge(&mut entries, &HostView::look());
    entries
}

/// Selects the entry that `which` names. `entries` is not empty if `which` is `None`. If `select` is true, `entries`
/// are those of a whole directory. If it is false, the entries were read at the path that `which` names, so all of them
/// match.
fn one_of(entries: Vec<ListedEntry>, which: Option<&str>, select: bool) -> Result<Choice, Trouble> {
    let matches = |entry: &ListedEntry| {
        let Some(word) = which.filter(|_| select) else { return true };
        let is_shown = |text: &str| text == word || visible_whole(text) == word;
        let in_bucket = |path: &str| split_path(path).is_some_and(|(_, key)| key == word);
        match entry {
            ListedEntry::Lock(lock) => {
                // The word may be the stored text, or that text as `tf` prints it with special characters escaped.
                is_shown(&lock.info.id)
                    || is_shown(&lock.path())
                    || in_bucket(&lock.path())
                    || lock.workspace.as_deref() == Some(word)
            }
            ListedEntry::UnreadableLock(unreadable) => {
                is_shown(&unreadable.place.path()) || in_bucket(&unreadable.place.path())
            }
        }
    };
    let stored = entries.len();
    let (meant, others): (Vec<ListedEntry>, Vec<ListedEntry>) = entries.into_iter().partition(matches);
    let named = |entries: &[ListedEntry]| {
        entries.iter().fold(String::new(), |all, entry| match entry {
            ListedEntry::Lock(lock) => format!("{all}\n  {}  {}", visible(&lock.info.id), visible(&lock.path())),
            ListedEntry::UnreadableLock(unreadable) => {
                format!("{all}\n  {}  (not a lock: {})", visible_whole(&unreadable.place.path()), unreadable.reason)
            }
        })
    };
    let (locks, junk): (Vec<ListedEntry>, Vec<ListedEntry>) =
        meant.into_iter().partition(|entry| matches!(entry, ListedEntry::Lock(_)));
    match (locks.len(), which) {
        (1, _) => {}
        (0, _) if !junk.is_empty() => {
            let path = |entry: &ListedEntry| match entry {
                ListedEntry::UnreadableLock(unreadable) => unreadable.place.path(),
                ListedEntry::Lock(lock) => lock.path(),
            };
            if junk.iter().any(|entry| path(entry) != path(&junk[0])) {
                return Err(Trouble::Said(format!(
                    "several entries match; give the path of one of them:{}",
                    named(&junk)
                )));
            }
        }
        (0, Some(word)) if stored > 0 && select => {
            return Err(Trouble::Said(format!(
                "no lock matches \"{}\"; these are held:{}",
                visible(word),
                named(&others)
            )));
        }
        (0, word) => {
            return Err(Trouble::Said(format!("there is no lock at \"{}\"", visible(word.unwrap_or_default()))));
        }
        _ => {
            return Err(Trouble::Said(format!("several locks match; give the ID of one of them:{}", named(&locks))));
        }
    }
    let junk = junk.into_iter().chain(others).filter_map(|entry| match entry {
        ListedEntry::UnreadableLock(unreadable) => Some(unreadable),
        ListedEntry::Lock(_) => None,
    });
    if let Some(ListedEntry::Lock(lock)) = locks.into_iter().next() {
        let path = lock.path();
        return Ok(Choice::Lock(lock, junk.filter(|junk| junk.place.path() == path).collect()));
    }
    let junk: Vec<UnreadableLock> = junk.collect();
    let path = junk.first().map(|junk| junk.place.path());
    Ok(Choice::NoLock(junk.into_iter().filter(|junk| Some(junk.place.path()) == path).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aws::failure::ServiceAnswer;
    use crate::terraform::backend::tests::backend;
    use crate::terraform::lock_info::LockInfo;

    fn place(path: &str) -> StoreKey {
        StoreKey::DynamoDb { table: "t".to_owned(), key: path.to_owned(), region: "r".to_owned() }
    }

    fn lock(id: &str, path: &str, workspace: &str) -> ListedEntry {
        let stored = StoredLock::Item(InfoAttribute::Text(format!(r#"{{"ID":"{id}"}}"#)));
        ListedEntry::Lock(Box::new(FoundLock {
            info: LockInfo { id: id.to_owned(), ..LockInfo::default() },
            parts: vec![(place(path), stored)],
            lease: None,
            workspace: Some(workspace.to_owned()),
            notes: Vec::new(),
            rival: None,
            judgement: None,
            stale: false,
        }))
    }

    fn junk(path: &str) -> ListedEntry {
        ListedEntry::UnreadableLock(UnreadableLock { place: place(path), reason: "junk".to_owned(), stored: None })
    }

    /// The ID of the chosen lock and the paths of the entries that are not locks, or the message.
    fn chosen(entries: Vec<ListedEntry>, which: Option<&str>, select: bool) -> Result<(String, Vec<String>), String> {
        let paths = |junk: Vec<UnreadableLock>| junk.iter().map(|junk| junk.place.path()).collect();
        match one_of(entries, which, select).map_err(|trouble| trouble.to_string())? {
            Choice::Lock(lock, junk) => Ok((lock.info.id, paths(junk))),
            Choice::NoLock(junk) => Ok((String::new(), paths(junk))),
        }
    }

    fn locks() -> Vec<ListedEntry> {
        vec![lock("1", "b/k", "default"), lock("2", "b/env:/green/k", "green"), lock("3", "b/env:/k/k", "k")]
    }

    #[test]
    fn a_lock_is_chosen_by_each_of_its_names_and_no_other_lock_is() {
        for (word, id) in [
            ("1", "1"),
            ("b/k", "1"),
            ("default", "1"),
            ("2", "2"),
            ("b/env:/green/k", "2"),
            ("env:/green/k", "2"),
            ("green", "2"),
            ("b/env:/k/k", "3"),
        ] {
            assert_eq!(chosen(locks(), Some(word), true), Ok((id.to_owned(), Vec::new())), "{word}");
        }
    }

    #[test]
    fn an_object_beside_an_item_that_cannot_be_read_is_mentioned_unless_there_can_be_none() {
        let failed = |code, status| {
            let answer = ServiceAnswer { code: Some(code), message: None, status: Some(status) };
            Failure::of_answer("S3", "s3:GetObject", answer, "")
        };
        assert_eq!(unseen_object(&failed("NoSuchBucket", 404)), None);
        assert_eq!(unseen_object(&failed("AccessDenied", 403)).as_deref(), Some(inventory::UNSEEN));
        let said = unseen_object(&failed("PermanentRedirect", 301)).unwrap();
        assert_eq!(said, "the .tflock object of this lock was not checked\nS3: PermanentRedirect");
    }

    #[test]
    fn an_item_is_a_digest_only_if_its_path_ends_with_md5_and_it_has_no_info() {
        let text = || StoredLock::Item(InfoAttribute::Text("{}".to_owned()));
        let without = || StoredLock::Item(InfoAttribute::None);
        for (path, stored, expected) in [
            ("b/k-md5", without(), true),
            ("b/k-md5", text(), false),
            ("b/k", without(), false),
            ("b/k", text(), false),
        ] {
            assert_eq!(is_digest(path, &stored), expected, "{path} {stored:?}");
        }
    }

    #[test]
    fn without_a_lock_the_command_to_type_reaches_the_table_of_this_backend() {
        let said = |config: &str| {
            let directory = Directory {
                path: "/x".into(),
                asked_from: "/x".into(),
                own_files: "/x/.terraform".into(),
                backend: backend(config),
                bucket: "b".into(),
                key: "k".into(),
                table: Some("t".into()),
                lock_file: false,
                workspace: "default".into(),
            };
            nothing_here(&directory, "r", false).to_string()
        };
        let typed = said(r#"{"profile":"p","endpoints":{"dynamodb":"http://x"}}"#);
        assert!(typed.ends_with("tf locks list --table t --region r --profile p --endpoint-url http://x"), "{typed}");
        let typed = said(r#"{"assume_role":{"role_arn":"arn"},"profile":"p"}"#);
        assert!(!typed.contains("--table t") && typed.contains("read another account: assume_role\n"), "{typed}");
        assert!(typed.ends_with("type: TF_WORKSPACE=WORKSPACE tf locks list --chdir /x"), "{typed}");
    }

    #[test]
    fn a_word_that_names_two_locks_chooses_none() {
        // The key of one lock is the workspace of another.
        let said = chosen(locks(), Some("k"), true).unwrap_err();
        assert!(said.starts_with("several locks match") && said.contains("  1  b/k"), "{said}");
        assert!(said.contains("  3  b/env:/k/k") && !said.contains("green"), "{said}");
        assert!(chosen(locks(), None, true).unwrap_err().starts_with("several locks match"));
    }

    #[test]
    fn a_word_that_names_none_chooses_none_even_if_there_is_only_one_lock() {
        let said = chosen(vec![lock("1", "b/k", "default")], Some("other"), true).unwrap_err();
        assert!(said.starts_with("no lock matches \"other\"") && said.contains("  1  b/k"), "{said}");
        assert_eq!(chosen(Vec::new(), Some("other"), true).unwrap_err(), "there is no lock at \"other\"");
        assert_eq!(chosen(Vec::new(), Some("b/k"), false).unwrap_err(), "there is no lock at \"b/k\"");
    }

    #[test]
    fn the_only_lock_needs_no_word_and_what_was_read_at_a_path_needs_no_second_match() {
        assert_eq!(chosen(vec![lock("1", "b/k", "default")], None, true), Ok(("1".to_owned(), Vec::new())));
        assert_eq!(chosen(vec![lock("1", "b/k", "w")], Some("whatever"), false), Ok(("1".to_owned(), Vec::new())));
    }

    #[test]
    fn what_is_not_a_lock_goes_with_the_lock_of_its_path_and_is_chosen_alone_only_at_one_path() {
        let entries = || vec![lock("1", "b/k", "default"), junk("b/k"), junk("b/other")];
        assert_eq!(chosen(entries(), Some("1"), true), Ok(("1".to_owned(), vec!["b/k".to_owned()])));
        assert_eq!(chosen(entries(), Some("b/other"), true), Ok((String::new(), vec!["b/other".to_owned()])));
        assert_eq!(chosen(entries(), Some("other"), true), Ok((String::new(), vec!["b/other".to_owned()])));
        let said = chosen(vec![junk("b/k"), junk("b/other")], None, true).unwrap_err();
        assert!(
            said.starts_with("several entries match") && said.contains("b/k") && said.contains("b/other"),
            "{said}"
        );
        assert_eq!(
            chosen(vec![junk("b/k"), junk("b/k")], None, true),
            Ok((String::new(), vec!["b/k".to_owned(), "b/k".to_owned()]))
        );
    }
}
