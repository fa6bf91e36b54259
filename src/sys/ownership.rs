//! Determines which users can change the file that a path refers to.
//!
//! A user who can write to a directory can replace any entry in it. If the directory is sticky, only the owner of the
//! entry, the owner of the directory and root can do so. So a path is safe if no other user can replace an entry in any
//! directory along the path.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use nix::unistd::geteuid;

/// The owner and the mode of one directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owned {
    by: u32,
    mode: u32,
}

const STICKY: u32 = 0o1000;
const WRITABLE_BY_GROUP: u32 = 0o020;
const WRITABLE_BY_OTHERS: u32 = 0o002;

impl Owned {
    /// Returns whether the owner is root or `user`. Root is trusted, because root can change every file anyway.
    fn by_root_or(self, user: u32) -> bool {
        self.by == 0 || self.by == user
    }

    /// Returns whether only root and `user` can rename those entries of this directory that belong to root or `user`.
    fn keeps_names_of(self, user: u32) -> bool {
        let writable = self.mode & (WRITABLE_BY_GROUP | WRITABLE_BY_OTHERS) != 0;
        self.by_root_or(user) && (!writable || self.mode & STICKY != 0)
    }
}

/// Returns the owner and mode of each directory from `/` down to the directory `path`, which must be canonical.
fn chain(path: &Path) -> io::Result<Vec<Owned>> {
    let mut chain = Vec::new();
    for directory in path.ancestors() {
        let place = fs::symlink_metadata(directory)?;
        if !place.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        chain.push(Owned { by: place.uid(), mode: place.mode() });
    }
    chain.reverse();
    Ok(chain)
}

/// Returns whether only root and `user` can rename a file of `user` in the last directory of `chain`. This requires
/// that the last directory belongs to `user` and that only `user` can write to it, or that the directory is sticky and
/// belongs to root or `user`. It also requires that [`Owned::keeps_names_of`] is true for every directory above the
/// last one. Returns false if `chain` is empty.
fn keeps_files_of(user: u32, chain: &[Owned]) -> bool {
    let Some((last, above)) = chain.split_last() else { return false };
    let alone = last.by == user && last.mode & (WRITABLE_BY_GROUP | WRITABLE_BY_OTHERS) == 0;
    let shared = last.mode & STICKY != 0 && last.by_root_or(user);
    (alone || shared) && above.iter().all(|directory| directory.keeps_names_of(user))
}

/// Returns the canonical path of `directory` if only this user and root can change what the path refers to and rename
/// this user's files in the directory. Returns `None` if another user can do so, or if the directories cannot be
/// examined.
pub(crate) fn safe_directory(directory: &Path) -> Option<PathBuf> {
    let path = fs::canonicalize(directory).ok()?;
    keeps_files_of(geteuid().as_raw(), &chain(&path).ok()?).then_some(path)
}

/// Returns whether every directory of `chain` belongs to `user`, to root, or to the owner of `/`. The owner of `/` is
/// accepted because in a user namespace without root, root's files appear to belong to the overflow user
/// (user_namespaces(7)). Returns false if `chain` is empty.
fn are_of(user: u32, chain: &[Owned]) -> bool {
    let Some(first) = chain.first() else { return false };
    chain.iter().all(|directory| directory.by_root_or(user) || directory.by == first.by)
}

/// Returns whether every directory above `path` belongs to this user, to root, or to the owner of `/` (see [`are_of`]).
/// Directories that do not exist are skipped. Write permissions are not checked, because a home directory is often
/// writable by the user's own group, and a container's volume is often writable by every user. Returns false if the
/// directories cannot be examined.
pub(crate) fn is_in_own_directories(path: &Path) -> bool {
    let there = path.ancestors().skip(1).find_map(|above| fs::canonicalize(above).ok());
    there.and_then(|there| chain(&there).ok()).is_some_and(|chain| are_of(geteuid().as_raw(), &chain))
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u32 = 1000;
    const OTHER: u32 = 1001;

    /// Returns every combination of an owner and the mode bits that matter.
    fn all() -> impl Iterator<Item = Owned> {
        [0, US, OTHER].into_iter().flat_map(|by| {
            [0o700, 0o755, 0o770, 0o775, 0o707, 0o777]
                .into_iter()
                .flat_map(move |mode| [mode, mode | STICKY].map(|mode| Owned { by, mode }))
        })
    }

    #[test]
    fn a_file_of_ours_keeps_its_name_only_where_nobody_else_can_rename_anything_above_it() {
        for top in all() {
            for middle in all() {
                for last in all() {
                    let others_write = |directory: Owned| directory.mode & 0o022 != 0;
                    let safe = |directory: Owned| {
                        directory.by != OTHER && (!others_write(directory) || directory.mode & STICKY != 0)
                    };
                    // A directory is also safe if it belongs to root, is not sticky and is writable only by root. But
                    // this user cannot create a file in it.
                    let usable = last.by == US || last.mode & STICKY != 0;
                    let expected = safe(top) && safe(middle) && safe(last) && usable;
                    assert_eq!(keeps_files_of(US, &[top, middle, last]), expected, "{top:?} {middle:?} {last:?}");
                }
            }
        }
        assert!(!keeps_files_of(US, &[]));
    }

    #[test]
    fn root_does_not_use_what_a_user_can_rearrange() {
        let root = Owned { by: 0, mode: 0o755 };
        let run_user = Owned { by: US, mode: 0o700 };
        assert!(keeps_files_of(US, &[root, root, run_user]) && !keeps_files_of(0, &[root, root, run_user]));
        // This is a directory that root created in the user's directory.
        assert!(!keeps_files_of(0, &[root, run_user, Owned { by: 0, mode: 0o700 }]));
        let shm = Owned { by: 0, mode: 0o1777 };
        assert!(keeps_files_of(0, &[root, root, shm]) && keeps_files_of(US, &[root, root, shm]));
        // This is a user's directory in that sticky directory.
        assert!(keeps_files_of(US, &[root, shm, run_user]) && !keeps_files_of(OTHER, &[root, shm, run_user]));
    }

    #[test]
    fn a_directory_of_another_user_above_ours_is_seen() {
        let (root, other) = (Owned { by: 0, mode: 0o755 }, Owned { by: OTHER, mode: 0o755 });
        let ours = Owned { by: US, mode: 0o775 };
        let volume = Owned { by: 0, mode: 0o777 };
        assert!(are_of(US, &[root, ours]) && are_of(US, &[root, volume]) && are_of(0, &[root, root]));
        assert!(!are_of(US, &[root, other]) && !are_of(0, &[root, ours]) && !are_of(US, &[]));
        // This is the owner of root's files in a user namespace without root.
        let nobody = Owned { by: 65534, mode: 0o755 };
        assert!(are_of(US, &[nobody, nobody, ours]) && !are_of(US, &[root, nobody, ours]));
    }

    #[test]
    fn a_link_is_followed_once_and_its_target_is_named() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let (real, link) = (root.join("real"), root.join("link"));
        fs::create_dir(&real).unwrap();
        // The test sets the mode, because the umask may have any value.
        fs::set_permissions(&real, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(safe_directory(&link), safe_directory(&real));
        assert_eq!(safe_directory(&link).unwrap(), real);
        assert_eq!(safe_directory(&root.join("none")), None);
    }
}
