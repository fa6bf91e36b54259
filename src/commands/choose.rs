//! One lock, by its path or its ID.

use super::found::{Entry, Found, Unreadable, Wanted, pair};
use super::inventory;
use super::reach::{Reach, Target, Trouble};
use super::staleness::Staleness;
use crate::console::{visible, visible_whole};
use crate::holder::host::Host;
use crate::lock::stores::{LOCK_FILE, Spot};
use crate::terraform::lock_info::is_lock_id;

/// What is meant.
pub(super) enum Choice {
    /// A lock, and what stands beside it in its other place and is none.
    Lock(Box<Found>, Vec<Unreadable>),
    /// What stands in the places of one lock and is none: at least one thing.
    NoLock(Vec<Unreadable>),
}

/// Finds the lock that is meant by `which`: an ID, a path (`bucket/key`), a key, or the name of a workspace. Without a
/// word it is the only one that stands.
///
/// `no_lock`: only what is in a lock's place and is no lock matches.
///
/// # Errors
/// [`Trouble`]: it matches nothing, or several.
pub(super) async fn choose(reach: &Reach, which: Option<&str>, no_lock: bool) -> Result<Choice, Trouble> {
    let entries = match (&reach.target, which) {
        (Target::Directory(directory), _) => {
            inventory::take(directory, &reach.stores, &Staleness::default()).await?.entries
        }
        (Target::Table(_), Some(word)) if is_lock_id(word) => {
            return Err(Trouble::Said(format!(
                "a table is read by path, not by ID\nname the lock's path; `tf locks list --table` shows it beside {word}"
            )));
        }
        (Target::Table(_), Some(path)) if path.ends_with("-md5") => {
            return Err(Trouble::Said(format!(
                "{}: that is the digest of a state, and no lock\nto mend one that does not fit its state, type in that \
                 state's directory: tf locks doctor --fix-digest",
                visible(path)
            )));
        }
        (Target::Table(table), Some(path)) => read(reach, reach.stores.item(table, path)).await?,
        (Target::Bucket(bucket, _), Some(path)) => {
            let key = path.strip_prefix(&format!("{bucket}/")).unwrap_or(path);
            let key = key.strip_suffix(LOCK_FILE).unwrap_or(key);
            read(reach, reach.stores.object(bucket, &format!("{key}{LOCK_FILE}"))).await?
        }
        (Target::Table(_) | Target::Bucket(..), None) => {
            return Err(Trouble::Said(
                "which lock?\nname its path; `tf locks list` with the same options shows it".into(),
            ));
        }
    };
    let entries = entries.into_iter().filter(|entry| !no_lock || matches!(entry, Entry::Unreadable(_))).collect();
    one_of(entries, which, matches!(reach.target, Target::Directory(_)))
}

async fn read(reach: &Reach, spot: Spot) -> Result<Vec<Entry>, Trouble> {
    let what = spot.describe();
    let standing =
        reach.stores.read(&spot).await.map_err(|failure| Trouble::failed(failure, &visible(&what), &reach.stores))?;
    let halves = standing.map(|standing| (spot, standing)).into_iter().collect();
    let mut entries = pair(Wanted::default(), halves, None);
    Staleness::default().judge(&mut entries, &Host::look());
    Ok(entries)
}

fn one_of(entries: Vec<Entry>, which: Option<&str>, select: bool) -> Result<Choice, Trouble> {
    let matches = |entry: &Entry| {
        let Some(word) = which.filter(|_| select) else { return true };
        let is_shown = |text: &str| text == word || visible_whole(text) == word;
        let in_bucket = |path: &str| path.split_once('/').is_some_and(|(_, key)| key == word);
        match entry {
            Entry::Lock(lock) => {
                // As it is, or as it is shown.
                is_shown(&lock.info.id)
                    || is_shown(&lock.path())
                    || in_bucket(&lock.path())
                    || lock.workspace.as_deref() == Some(word)
            }
            Entry::Unreadable(unreadable) => is_shown(&unreadable.place.path()) || in_bucket(&unreadable.place.path()),
        }
    };
    let standing = entries.len();
    let (meant, others): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(matches);
    let named = |entries: &[Entry]| {
        entries.iter().fold(String::new(), |all, entry| match entry {
            Entry::Lock(lock) => format!("{all}\n  {}  {}", visible(&lock.info.id), visible(&lock.path())),
            Entry::Unreadable(unreadable) => {
                format!("{all}\n  {} (no lock: {})", visible(&unreadable.place.describe()), unreadable.reason)
            }
        })
    };
    let (locks, junk): (Vec<Entry>, Vec<Entry>) = meant.into_iter().partition(|entry| matches!(entry, Entry::Lock(_)));
    match (locks.len(), which) {
        (1, _) => {}
        (0, _) if !junk.is_empty() => {
            let path = |entry: &Entry| match entry {
                Entry::Unreadable(unreadable) => unreadable.place.path(),
                Entry::Lock(lock) => lock.path(),
            };
            if junk.iter().any(|entry| path(entry) != path(&junk[0])) {
                return Err(Trouble::Said(format!("several match; name one by its path:{}", named(&junk))));
            }
        }
        (0, Some(word)) if standing > 0 && select => {
            return Err(Trouble::Said(format!("no lock matches {:?}; these stand:{}", visible(word), named(&others))));
        }
        (0, Some(word)) => {
            return Err(Trouble::Said(format!("no lock stands at {:?}: there is nothing to release", visible(word))));
        }
        (0, None) => return Err(Trouble::Said("no lock stands here: there is nothing to release".into())),
        _ => {
            return Err(Trouble::Said(format!("several locks match; name one by its ID:{}", named(&locks))));
        }
    }
    let junk = junk.into_iter().chain(others).filter_map(|entry| match entry {
        Entry::Unreadable(unreadable) => Some(unreadable),
        Entry::Lock(_) => None,
    });
    if let Some(Entry::Lock(lock)) = locks.into_iter().next() {
        let path = lock.path();
        return Ok(Choice::Lock(lock, junk.filter(|junk| junk.place.path() == path).collect()));
    }
    let junk: Vec<Unreadable> = junk.collect();
    let path = junk.first().map(|junk| junk.place.path());
    Ok(Choice::NoLock(junk.into_iter().filter(|junk| Some(junk.place.path()) == path).collect()))
}
