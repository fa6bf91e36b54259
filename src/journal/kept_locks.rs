//! The locks of dead runs that `tf` on this host has kept on purpose. It has told a person so, and then no run on this
//! host takes such a lock over when its lease has lapsed. The record of the run cannot say this: it is deleted if no
//! later attempt can release the lock.
//!
//! Each lock is an empty file in `kept/` in the state directory, with the ID of the lock as its name.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::journal::state_directory::{StateDirectory, is_older, is_private};
use crate::terraform::lock_info::is_lock_id;
use crate::trace::trace;

/// How long a lock is remembered after `tf` has last said that it was not released. As long as the record of its run.
const RETENTION_WINDOW: Duration = Duration::from_hours(30 * 24);

/// The locks in one state directory.
#[derive(Clone, Debug)]
pub(crate) struct KeptLocks {
    path: PathBuf,
}

impl KeptLocks {
    /// Returns the locks in `directory`.
    pub(crate) fn of(directory: &StateDirectory) -> Self {
        Self::at(directory.join("kept"))
    }

    /// Returns the locks in the directory `path`, which may not exist.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Remembers that the lock `id` was kept on purpose. Does nothing if the ID is invalid or the file cannot be
    /// written: the lock is then judged by its lease alone, as on another host.
    pub(crate) fn add(&self, id: &str) {
        if let Err(error) = self.try_add(id) {
            trace!("the lock {id} is not remembered as kept: {error}");
        }
    }

    fn try_add(&self, id: &str) -> io::Result<()> {
        if !is_lock_id(id) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match DirBuilder::new().mode(0o700).create(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if !is_private(&self.path) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        // Without this, an existing empty file would keep its age.
        options.open(self.path.join(id))?.set_modified(std::time::SystemTime::now())
    }

    /// Forgets the lock `id`: it was released or is gone, or `tf` would release it now.
    pub(crate) fn remove(&self, id: &str) {
        if is_lock_id(id) {
            let _ = fs::remove_file(self.path.join(id));
        }
    }

    /// Returns the IDs of the locks. Deletes those that were kept longer than [`RETENTION_WINDOW`] ago.
    ///
    /// # Errors
    /// Fails if the directory exists and cannot be read. Which locks are in it is then not known.
    pub(crate) fn ids(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !is_lock_id(&name) {
                continue;
            }
            if is_older(&entry.path(), RETENTION_WINDOW) {
                let _ = fs::remove_file(entry.path());
            } else {
                ids.push(name);
            }
        }
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::tests::ID;

    #[test]
    fn a_lock_is_kept_until_it_is_removed_or_too_old() {
        let root = tempfile::tempdir().unwrap();
        let kept = KeptLocks::of(&StateDirectory::at(root.path()));
        assert!(kept.ids().unwrap().is_empty());
        kept.remove(ID);
        for _ in 0..2 {
            kept.add(ID);
            assert_eq!(kept.ids().unwrap(), [ID]);
        }
        let age = |by: Duration| {
            let file = OpenOptions::new().write(true).open(kept.path.join(ID)).unwrap();
            file.set_modified(std::time::SystemTime::now() - by).unwrap();
        };
        age(Duration::from_hours(30 * 24 - 1));
        assert_eq!(kept.ids().unwrap(), [ID]);
        age(RETENTION_WINDOW + Duration::from_mins(1));
        kept.add(ID);
        assert_eq!(kept.ids().unwrap(), [ID], "it was said again");
        age(RETENTION_WINDOW + Duration::from_mins(1));
        assert!(kept.ids().unwrap().is_empty() && !kept.path.join(ID).exists());
        kept.add(ID);
        kept.remove(ID);
        assert!(kept.ids().unwrap().is_empty());
    }

    #[test]
    fn nothing_but_a_lock_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let kept = KeptLocks::of(&StateDirectory::at(root.path()));
        for id in ["", "..", "../x", "/x", "ID"] {
            kept.add(id);
            kept.remove(id);
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        kept.add(ID);
        fs::write(kept.path.join("other"), "").unwrap();
        assert_eq!(kept.ids().unwrap(), [ID]);
        // A file in place of the directory.
        fs::remove_dir_all(&kept.path).unwrap();
        fs::write(&kept.path, "").unwrap();
        kept.add(ID);
        assert!(kept.ids().is_err());
    }
}
