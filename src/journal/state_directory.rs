//! The directory in which `tf` stores data that must outlive its process.
//!
//! The directory must belong to this user and be on a local file system, and no other user may be able to change its
//! path. Otherwise, under sudo with the HOME of another user, root would write to a directory whose owner can replace
//! any part of its path. Therefore:
//!
//! - Every directory from the base (the one that the environment names) down to the state directory belongs to this
//!   user.
//! - Nothing below the base is a symbolic link. The state directory is not a symbolic link even if it is the base
//!   itself.
//! - No other user can write to the state directory.
//! - Every directory above the state directory belongs to this user or to root.
//!
//! A location that does not meet these conditions is skipped. If no location does, terraform runs without a journal.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::sys::file_id::FileId;
use crate::sys::{filesystem, ownership};
use crate::terraform::lock_info;

/// A location where the state directory may be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    /// The directory that the environment names, or a default. It must belong to this user.
    base: PathBuf,
    /// The path of the state directory below `base`. `tf` may create it.
    below: PathBuf,
    /// Whether `tf` may create `base` too.
    made: bool,
}

/// A state directory that meets the conditions above.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateDirectory(PathBuf);

impl StateDirectory {
    /// Returns the first location that can be used. Creates the directory if it does not exist. `variable` returns the
    /// value of an environment variable.
    ///
    /// # Errors
    /// Fails if no location can be used. The error names each location with its reason.
    pub(crate) fn open(variable: impl Fn(&str) -> Option<OsString>) -> io::Result<Self> {
        Self::first_of(candidates(variable))
    }

    fn first_of(candidates: impl Iterator<Item = Candidate>) -> io::Result<Self> {
        let mut reasons = Vec::new();
        for candidate in candidates {
            match candidate.open() {
                Ok(directory) => return Ok(directory),
                Err(error) => {
                    let (path, reason) = (candidate.path().display().to_string(), error.to_string());
                    reasons.push(if reason.contains(&path) { reason } else { format!("{path}: {reason}") });
                }
            }
        }
        Err(io::Error::new(io::ErrorKind::NotFound, reasons.join("; ")))
    }

    /// Returns every location that exists and can be used, each directory once. Any of them may contain data of earlier
    /// runs, because those runs may have had other environment variables.
    pub(crate) fn all(variable: impl Fn(&str) -> Option<OsString>) -> Vec<Self> {
        let mut seen = Vec::new();
        let all = candidates(variable).filter_map(|candidate| {
            let directory = candidate.there().ok()?;
            // Two locations may be the same directory under different paths.
            let id = FileId::at(&directory.0).ok()?;
            if seen.contains(&id) {
                return None;
            }
            seen.push(id);
            Some(directory)
        });
        all.collect()
    }

    /// As [`StateDirectory::all`], with the environment of this process.
    pub(crate) fn existing() -> Vec<Self> {
        Self::all(|name| std::env::var_os(name))
    }

    /// The path `name` in the directory. It may not exist.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    #[cfg(test)]
    pub(crate) fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

/// Returns the locations, the preferred one first: `TFW_STATE_DIR`, `XDG_STATE_HOME/tf`, `~/.local/state/tf`,
/// `XDG_RUNTIME_DIR/tf`, `/var/tmp/tf-UID`. A variable with a relative path is ignored.
fn candidates(variable: impl Fn(&str) -> Option<OsString>) -> impl Iterator<Item = Candidate> {
    let uid = nix::unistd::geteuid().as_raw();
    let set = |name| variable(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute());
    let place = |base: PathBuf, below: &str, made| Candidate { base, below: below.into(), made };
    let home = set("HOME").filter(|home| is_ours(home)).or_else(|| home_in_passwd(uid));
    [
        set("TFW_STATE_DIR").map(|base| place(base, "", true)),
        set("XDG_STATE_HOME").map(|base| place(base, "tf", true)),
        home.map(|base| place(base, ".local/state/tf", false)),
        set("XDG_RUNTIME_DIR").map(|base| place(base, "tf", false)),
        Some(place(format!("/var/tmp/tf-{uid}").into(), "", true)),
    ]
    .into_iter()
    .flatten()
}

/// Returns the home directory of `uid` in /etc/passwd. It is used if HOME is not a directory of this user, for example
/// under sudo. `None` if /etc/passwd cannot be read, or has no entry for `uid`.
fn home_in_passwd(uid: u32) -> Option<PathBuf> {
    let passwd = lock_info::passwd()?;
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(uid)).then(|| fields.get(5).map(PathBuf::from)).flatten()
    })
}

/// Whether `path` is a directory of this user, and no other user has any permission on it. False if `path` is a
/// symbolic link.
pub(crate) fn is_private(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|place| {
        place.is_dir() && place.uid() == nix::unistd::geteuid().as_raw() && place.mode() & 0o077 == 0
    })
}

/// Opens a regular file of this user with `options`. Refuses files that another user may have put or linked there: a
/// symbolic link, a file of another user, and a file with several hard links in a directory that is not private. In a
/// private directory, only this user can make a hard link, for example for a backup.
///
/// # Errors
/// `InvalidData` if the file is refused, or if it was deleted in between; otherwise what open(2) reports, such as `ELOOP`
/// for a symbolic link.
pub(crate) fn open_private(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let place = file.metadata()?;
    let is_linked_once = match place.nlink() {
        0 => false,
        1 => true,
        _ => path.parent().is_some_and(is_private),
    };
    if !place.is_file() || place.uid() != nix::unistd::geteuid().as_raw() || !is_linked_once {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not private to this user"));
    }
    Ok(file)
}

/// The worst failure after which the file must still have either the complete old or the complete new content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// The death of every process.
    Processes,
    /// A power loss as well. This costs two flushes to the disk.
    PowerLoss,
}

/// Replaces the file at `path` by one with `content`, readable by this user alone. At every moment, the file has either
/// the complete old content or the complete new content.
///
/// For [`Durability::PowerLoss`], the content is flushed before the rename, because otherwise the disk may contain the
/// new name without the content. ext4 prevents that (ext4(5), `auto_da_alloc`), but other file systems do not. The
/// directory is flushed after the rename, because it contains the name.
///
/// # Errors
/// Fails if the file cannot be written, for example because the disk is full. The old file is then unchanged, unless
/// only the flush of the directory failed.
pub(crate) fn replace(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    let unfinished = path.with_extension(std::process::id().to_string());
    // An earlier process with the same pid may have died while it was writing this file.
    let _ = fs::remove_file(&unfinished);
    let written = write_new(&unfinished, content, durability).and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
        return written;
    }
    match (durability, path.parent()) {
        (Durability::PowerLoss, Some(directory)) => File::open(directory)?.sync_all(),
        _ => Ok(()),
    }
}

/// Deletes the file at `path` if a [`replace`] has left it because its process was killed. Such a file has a pid as its
/// extension, and a name for which `is_name` is true. It is deleted if it is older than 1 h, because its process may
/// still be writing it.
pub(crate) fn clear_unfinished(path: &Path, is_name: impl Fn(&str) -> bool) {
    const UNFINISHED_WINDOW: Duration = Duration::from_hours(1);
    let part = |part: Option<&OsStr>| part.and_then(OsStr::to_str).unwrap_or_default().to_owned();
    let is_unfinished = is_name(&part(path.file_stem())) && part(path.extension()).parse::<u32>().is_ok();
    if is_unfinished && is_older(path, UNFINISHED_WINDOW) {
        let _ = fs::remove_file(path);
    }
}

/// Whether the file at `path` was modified longer than `age` ago. Does not follow a symbolic link. False if that is
/// unknown.
pub(crate) fn is_older(path: &Path, age: Duration) -> bool {
    let modified = fs::symlink_metadata(path).and_then(|place| place.modified());
    modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|since| since > age))
}

fn write_new(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)?;
    file.write_all(content)?;
    if durability == Durability::PowerLoss { file.sync_all() } else { Ok(()) }
}

/// Whether `path` is a directory of this user, or a symbolic link to one.
fn is_ours(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|place| place.is_dir() && place.uid() == nix::unistd::geteuid().as_raw())
}

impl Candidate {
    fn path(&self) -> PathBuf {
        if self.below.as_os_str().is_empty() { self.base.clone() } else { self.base.join(&self.below) }
    }

    fn open(&self) -> io::Result<StateDirectory> {
        if !self.made && !is_ours(&self.base) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{} does not belong to this user", self.base.display()),
            ));
        }
        match self.there() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                DirBuilder::new().recursive(true).mode(0o700).create(self.path())?;
                self.there()
            }
            there => there,
        }
    }

    /// Returns the directory if it exists and meets the conditions in the documentation of this module. Otherwise
    /// returns an error with the reason.
    fn there(&self) -> io::Result<StateDirectory> {
        let refused = |path: &Path, why: &str| {
            io::Error::new(io::ErrorKind::PermissionDenied, format!("{} {why}", path.display()))
        };
        // This check comes first, because `open` must not create anything in a directory of another user.
        if !ownership::is_in_own_directories(&self.path()) {
            return Err(refused(&self.path(), "is in a directory of another user"));
        }
        let uid = nix::unistd::geteuid().as_raw();
        let mut path = self.base.clone();
        // An administrator may have made the home directory a symbolic link, so a link at `base` is followed. Links
        // below it are refused.
        let mut last = fs::metadata(&path)?;
        for part in &self.below {
            path.push(part);
            if last.uid() != uid {
                break;
            }
            last = fs::symlink_metadata(&path)?;
            if last.is_symlink() {
                return Err(refused(&path, "is a symbolic link"));
            }
        }
        if !last.is_dir() || last.uid() != uid {
            return Err(refused(&path, "is not a directory of this user"));
        }
        if last.mode() & 0o022 != 0 {
            return Err(refused(&path, "is writable by other users"));
        }
        if fs::symlink_metadata(&path)?.is_symlink() {
            return Err(refused(&path, "is a symbolic link"));
        }
        if !filesystem::is_local(&path) {
            return Err(refused(&path, "is on a file system whose locks may not work"));
        }
        Ok(StateDirectory(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_no_place_can_be_used_each_is_named_with_its_reason() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let place = |name: &str, mode| {
            let base = root.path().join(name);
            fs::create_dir(&base).unwrap();
            fs::set_permissions(&base, fs::Permissions::from_mode(mode)).unwrap();
            base
        };
        let (open, file) = (place("open", 0o777), root.path().join("file"));
        fs::write(&file, "").unwrap();
        let candidate = |base: &Path| Candidate { base: base.to_owned(), below: PathBuf::new(), made: true };
        let error = StateDirectory::first_of([candidate(&open), candidate(&file)].into_iter()).unwrap_err().to_string();
        for path in [&open, &file] {
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
        let good = place("good", 0o700);
        assert_eq!(StateDirectory::first_of([candidate(&open), candidate(&good)].into_iter()).unwrap().0, good);
    }
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A backup may link each file of the state directory.
    #[test]
    fn a_file_with_two_links_is_opened_only_in_a_private_directory() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        fs::hard_link(&file, root.path().join("link")).unwrap();
        for (mode, is_opened) in [(0o700, true), (0o755, false)] {
            fs::set_permissions(root.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(open_private(OpenOptions::new().read(true), &file).is_ok(), is_opened, "{mode:o}");
        }
    }

    fn open(set: &[(&str, &Path)]) -> Option<PathBuf> {
        let known = |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, path)| (*path).into());
        let candidate = candidates(known).find(|candidate| !candidate.base.starts_with("/var/tmp"))?;
        candidate.open().ok().map(|directory| directory.0)
    }

    #[test]
    fn the_first_place_that_is_named_is_used_and_made_for_us_alone() {
        let root = tempfile::tempdir().unwrap();
        let state = root.path().join("state");
        assert_eq!(open(&[("TFW_STATE_DIR", &state), ("HOME", root.path())]), Some(state.clone()));
        assert_eq!(fs::metadata(&state).unwrap().mode() & 0o777, 0o700);
        assert_eq!(open(&[("XDG_STATE_HOME", &state)]), Some(state.join("tf")));
        assert_eq!(open(&[("HOME", root.path())]), Some(root.path().join(".local/state/tf")));
    }

    #[test]
    fn a_link_on_the_way_or_a_door_left_open_is_not_used() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = root.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, root.path().join(".local")).unwrap();
        assert_eq!(open(&[("HOME", root.path())]), None);
        let state = root.path().join("state");
        symlink(&elsewhere, &state).unwrap();
        assert_eq!(open(&[("TFW_STATE_DIR", &state)]), None);
        fs::remove_file(&state).unwrap();
        fs::create_dir(&state).unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(open(&[("TFW_STATE_DIR", &state)]), None);
    }

    #[test]
    fn a_directory_that_several_variables_name_is_returned_once() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for directory in [at("xdg/tf"), at("run/tf")] {
            DirBuilder::new().recursive(true).mode(0o700).create(directory).unwrap();
        }
        symlink(at("xdg"), at("link")).unwrap();
        let below_root = |set: &[(&str, PathBuf)]| {
            let known = |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, path)| path.into());
            let all = StateDirectory::all(known).into_iter().map(|directory| directory.0);
            all.filter(|path| path.starts_with(root.path())).collect::<Vec<_>>()
        };
        // The equal locations are not adjacent.
        let same = [("TFW_STATE_DIR", at("xdg/tf")), ("XDG_STATE_HOME", at("run")), ("XDG_RUNTIME_DIR", at("xdg"))];
        assert_eq!(below_root(&same), [at("xdg/tf"), at("run/tf")]);
        let linked = [("XDG_STATE_HOME", at("xdg")), ("XDG_RUNTIME_DIR", at("link"))];
        assert_eq!(below_root(&linked), [at("xdg/tf")]);
    }

    #[test]
    fn a_relative_path_names_no_place() {
        assert_eq!(
            candidates(|name| (name == "TFW_STATE_DIR").then(|| "state".into()))
                .filter(|c| c.base == Path::new("state"))
                .count(),
            0
        );
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_of_a_write_that_failed() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record.json");
        // An unfinished file of a dead process with the same pid.
        fs::write(path.with_extension(std::process::id().to_string()), "half").unwrap();
        for (content, durability) in [("one", Durability::Processes), ("two", Durability::PowerLoss)] {
            replace(&path, content.as_bytes(), durability).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no unfinished file");
        }
        // A directory cannot be replaced by a file.
        let taken = directory.path().join("taken.json");
        fs::create_dir_all(taken.join("x")).unwrap();
        assert!(replace(&taken, b"three", Durability::Processes).is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "no unfinished file");
    }
}
