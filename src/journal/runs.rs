//! The journal: who releases when everything was killed.
//!
//! Each run has a directory below `runs/` in the state directory, with two files. `record.json` says what the next `tf`
//! must know: the lock facts out of terraform's log, where the lock lives and how it was reached; no argument's value, no
//! key, no token. `lock` tells who is alive, by two bytes that are locked ([`crate::sys::lock_file`]):
//!
//! - [`TREE_LOCK`] is held by terraform and by all that inherited the descriptor from it;
//! - [`OWNER_LOCK`] is held by whoever takes care of the run: `tf` and its guardian together, later one recoverer. Nothing
//!   inherits it.
//!
//! A run that ends well takes its directory away.
//!
//! A directory is made under another name, locked, written, and then moved to its place, and moved away again before it
//! is emptied: so whatever is found in place is whole, and was locked from its first moment on. A record is replaced by
//! rename(2), so it is whole at every moment as well.

use crate::terraform::lock_info::LockInfo;
use std::cell::OnceCell;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::aws::redacted_backend::{AwsEnvironment, RedactedBackend};
use crate::crash_point;
use crate::journal::host::{HostIdentity, Standpoint};
use crate::journal::membership::TreeIdentity;
use crate::journal::recorder::Recorder;
use crate::journal::run_mark::Living;
use crate::journal::state_directory::{StateDirectory, is_private, open_private};
use crate::lock::proof::Run;
use crate::lock::reached::Reached;
use crate::sys::process::{self, Process, ProcessList};
use crate::sys::{descriptor, lock_file};
use crate::terraform::lock_info::is_lock_id;
use crate::terraform::log::{JSON_LIMIT, Log, RecordedLock, UnnamedLock};
use crate::trace::trace;

/// The byte that the whole tree below terraform holds.
const TREE_LOCK: u8 = 0;

/// The byte of whoever takes care of the run.
const OWNER_LOCK: u8 = 1;

/// No record is longer; what is, is hostile.
const MAX_RECORD_BYTES: u64 = 2 * JSON_LIMIT as u64;

/// So many unreadable records are kept for somebody to look at.
const MAX_SET_ASIDE: usize = 16;

/// What nobody here may judge, or nobody came back for, goes after so long.
const RECORD_RETENTION_WINDOW: Duration = Duration::from_hours(30 * 24);

/// Why a run is left alone whose lock file cannot be opened for writing.
pub(crate) const READ_ONLY: &str = "its record cannot be locked: the state directory is read-only";

/// What is left of a run that is over: locks that could not be given back.
#[derive(Debug, Default)]
pub(crate) struct Unfinished {
    pub(crate) locks: Vec<RecordedLock>,
    /// Those that could not even be looked for.
    pub(crate) unnamed: Vec<UnnamedLock>,
    /// One that may stand in another backend than S3.
    pub(crate) elsewhere: bool,
    /// Its terraform died and had written no log: nothing tells whether it held one.
    pub(crate) unlogged: bool,
    /// Those that were replaced while it worked: a person must hear of it.
    pub(crate) replaced: Vec<Replaced>,
}

impl Unfinished {
    /// Leaves what may stand in another backend, and what is known of it.
    pub(crate) fn add_elsewhere(&mut self, had: impl IntoIterator<Item = UnnamedLock>) {
        self.elsewhere = true;
        self.unnamed.extend(had);
    }

    /// Nothing is.
    pub(crate) fn is_empty(&self) -> bool {
        self.locks.is_empty()
            && self.unnamed.is_empty()
            && !self.elsewhere
            && !self.unlogged
            && self.replaced.is_empty()
    }
}

/// What is written down of one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct JournalRecord {
    pub(crate) format: u32,
    /// The run's ID, the last part of its `TFW_RUN` and the name of its directory.
    pub(crate) run: String,
    pub(crate) host: HostIdentity,
    /// The pid of its `tf`, and of its terraform.
    pub(crate) tf: u32,
    pub(crate) terraform: Option<i32>,
    /// What its processes can be known by.
    #[serde(default)]
    pub(crate) tree: TreeIdentity,
    /// The parent of its `tf`, where its end asks for a stop.
    #[serde(default)]
    pub(crate) parent: Option<i32>,
    /// `user@host` at its start, as its terraform wrote it. Empty in a record of an earlier version.
    #[serde(default)]
    pub(crate) who: String,
    /// When terraform was started.
    pub(crate) started: Timestamp,
    /// `terraform`, or by what name it was run.
    pub(crate) program: String,
    /// `-chdir`, where it was given.
    pub(crate) chdir: Option<String>,
    /// The subcommand, and the names of the flags that terraform has.
    pub(crate) command: String,
    pub(crate) flags: Vec<String>,
    /// Where it ran, and where its data directory is.
    pub(crate) directory: String,
    pub(crate) data_directory: String,
    /// The workspaces that it can have used.
    pub(crate) workspaces: Vec<String>,
    /// The plan that it applied.
    #[serde(default)]
    pub(crate) plan: Option<String>,
    /// The backends that it can have used.
    pub(crate) access: Vec<RedactedBackend>,
    pub(crate) surroundings: AwsEnvironment,
    /// What its log has told so far, and up to where it was read.
    pub(crate) log: Log,
    pub(crate) offset: u64,
    /// Its operation is over, and what is left of it could not be done then.
    pub(crate) over: bool,
    /// Its locks were to be named and not released (`TFW_RELEASE=never`).
    #[serde(default)]
    pub(crate) named_only: bool,
    /// See [`Unfinished::unlogged`].
    #[serde(default)]
    pub(crate) unlogged: bool,
    /// See [`Unfinished::replaced`].
    #[serde(default)]
    pub(crate) replaced: Vec<Replaced>,
}

impl JournalRecord {
    /// The first form of a record; the rest is for the caller to fill in.
    pub(crate) fn new(run: &str, journal: &Journal) -> Self {
        Self {
            format: 1,
            run: run.to_owned(),
            host: journal.host().clone(),
            tf: std::process::id(),
            terraform: None,
            tree: TreeIdentity::default(),
            parent: None,
            who: String::new(),
            started: Timestamp::now(),
            program: String::new(),
            chdir: None,
            command: String::new(),
            flags: Vec::new(),
            directory: String::new(),
            data_directory: String::new(),
            workspaces: Vec::new(),
            plan: None,
            access: Vec::new(),
            surroundings: AwsEnvironment::default(),
            log: Log::default(),
            offset: 0,
            over: false,
            named_only: false,
            unlogged: false,
            replaced: Vec::new(),
        }
    }

    /// Where its terraform worked: the directory that `-chdir` names, or its own.
    pub(crate) fn working_directory(&self) -> String {
        let directory = Path::new(&self.directory);
        let working = self.chdir.as_ref().map_or_else(|| directory.to_owned(), |chdir| directory.join(chdir));
        working.to_string_lossy().into_owned()
    }

    /// What its locks are judged by.
    pub(crate) fn proof(&self) -> Run {
        Run::recorded(&self.who, self.started, &self.log)
    }

    /// As whom it reached its backends.
    pub(crate) fn reached(&self) -> Reached {
        Reached::of(&self.run, &self.access, &self.surroundings)
    }

    /// What is left when a run is over: locks that could not be given back. What is known of its processes stays.
    pub(crate) fn leave(&mut self, left: Unfinished) {
        self.log.locks = left.locks;
        self.log.unnamed = left.unnamed;
        self.unlogged = left.unlogged;
        self.replaced = left.replaced;
        self.over = true;
    }

    /// A record is obeyed only if all of it makes sense.
    fn is_sound(&self, name: &str) -> bool {
        self.format == 1 && self.run == name && self.log.locks.iter().all(|lock| is_lock_id(&lock.id))
    }
}

/// The runs below one state directory.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    runs: PathBuf,
    /// Asked for when there is something to judge or to write down.
    host: OnceCell<HostIdentity>,
}

/// A run's directory, and the hold on it of whoever takes care of the run.
#[derive(Debug)]
pub(crate) struct JournalEntry {
    path: PathBuf,
    lock_file: File,
}

/// What is found in the place of a run.
#[derive(Debug)]
pub(crate) enum FoundRun {
    /// Somebody of it is alive.
    Living(Box<JournalRecord>),
    /// Terraform's tree seems dead, and somebody takes care of the rest at this moment.
    Settling(Box<JournalRecord>),
    /// It is dead, and ours to finish.
    Dead(Box<JournalRecord>, JournalEntry, Standpoint),
    /// Not for us to judge, and why; with what it says, where it can be read. For whoever lists what there is; nothing is
    /// done about it.
    Foreign(&'static str, Option<Box<JournalRecord>>),
    /// Nobody of it is known to be alive, and these processes may be of it: it is left alone as long as they run.
    Doubtful(Box<JournalRecord>, Vec<Process>),
    /// What lies here is no record, and nobody holds it.
    Broken(PathBuf),
    /// Nothing, or nothing any more.
    Gone,
}

impl Journal {
    /// The journal in `directory`, which is made.
    ///
    /// # Errors
    /// Where it cannot be.
    pub(crate) fn open(directory: &StateDirectory) -> io::Result<Self> {
        let runs = directory.join("runs");
        match DirBuilder::new().mode(0o700).create(&runs) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        Self::there(directory).ok_or_else(|| io::Error::new(io::ErrorKind::PermissionDenied, "runs/ is not ours alone"))
    }

    /// The journal in `directory`, if there is one.
    pub(crate) fn there(directory: &StateDirectory) -> Option<Self> {
        let runs = directory.join("runs");
        is_private(&runs).then(|| Self { runs, host: OnceCell::new() })
    }

    pub(crate) fn host(&self) -> &HostIdentity {
        self.host.get_or_init(|| HostIdentity::here(&self.runs))
    }

    /// Makes the directory of a run. Gives the descriptor that terraform must inherit.
    ///
    /// # Errors
    /// Where it cannot be made, written or locked. Nothing is left then.
    pub(crate) fn begin(&self, record: &JournalRecord) -> io::Result<(JournalEntry, OwnedFd)> {
        let unfinished = self.runs.join(format!(".new-{}", record.run));
        let begun = self.begin_in(&unfinished, record);
        if begun.is_err() {
            let _ = fs::remove_dir_all(&unfinished);
        }
        begun
    }

    fn begin_in(&self, unfinished: &Path, record: &JournalRecord) -> io::Result<(JournalEntry, OwnedFd)> {
        DirBuilder::new().mode(0o700).create(unfinished)?;
        crash_point::reached("journal: made");
        let path = unfinished.join("lock");
        let life = create(&path)?;
        let lock_file = open_lock(&path)?;
        if !lock_file::try_lock(&life, TREE_LOCK)? || !lock_file::try_lock(&lock_file, OWNER_LOCK)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let inherited = descriptor::inheritable_high(&life)?;
        crash_point::reached("journal: locked");
        create(&unfinished.join("record.json"))?.write_all(&serde_json::to_vec(record)?)?;
        crash_point::reached("journal: written");
        let path = self.runs.join(&record.run);
        fs::rename(unfinished, &path)?;
        crash_point::reached("journal: in place");
        Ok((JournalEntry { path, lock_file }, inherited))
    }

    /// The names of the runs that are there. What was begun or taken away and not finished, and is old, is cleared away.
    pub(crate) fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.runs) else { return Vec::new() };
        let mut names = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_run_id(&name) {
                names.push(name);
            } else if let Some(run) = name.strip_prefix(".new-")
                && is_older(&entry.path(), Duration::from_hours(1))
            {
                // It died before terraform was started, so there is nothing of it but this.
                clear_away(&entry.path(), run);
            } else if let Some(run) = name.strip_prefix(".old-") {
                clear_away(&entry.path(), run);
            }
        }
        names
    }

    /// Whether there is a run of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        fs::symlink_metadata(self.runs.join(name)).is_ok()
    }

    /// Looks at one run. What is dead is ours from then on, as long as the [`JournalEntry`] is held.
    pub(crate) fn look(&self, name: &str) -> FoundRun {
        let path = self.runs.join(name);
        let Ok(place) = fs::symlink_metadata(&path) else { return FoundRun::Gone };
        if !is_private(&path) {
            return FoundRun::Foreign("it is not a directory of ours alone", None);
        }
        let record = match read(&path, name) {
            Ok(record) => record,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => return FoundRun::Gone,
            Err(error) => {
                trace!("record of {name}: {error}");
                let held = self.is_held(name);
                // Whoever holds it will write it anew, or take it away.
                return if held { FoundRun::Foreign("it cannot be read", None) } else { FoundRun::Broken(path) };
            }
        };
        let mut standpoint = record.host.seen_from(self.host());
        if standpoint == Standpoint::ThisBoot && process::list() == ProcessList::Unavailable {
            standpoint = Standpoint::Foreign("there is no /proc here that lists our own processes");
        }
        if let Standpoint::Foreign(why) = standpoint {
            if is_older(&path, RECORD_RETENTION_WINDOW) {
                remove(&path);
            }
            return FoundRun::Foreign(why, Some(Box::new(record)));
        }
        let lock_file = match open_lock(&path.join("lock")) {
            Ok(lock_file) => lock_file,
            // A file must be open for writing for its bytes to be locked, so nothing can be finished here.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied) =>
            {
                return FoundRun::Foreign(READ_ONLY, Some(Box::new(record)));
            }
            Err(_) => return FoundRun::Broken(path),
        };
        let record = Box::new(record);
        let is_owner = lock_file::try_lock(&lock_file, OWNER_LOCK).unwrap_or(false);
        let mut doubtful = Vec::new();
        if standpoint == Standpoint::ThisBoot {
            if lock_file::is_locked(&lock_file, TREE_LOCK).unwrap_or(true) {
                return FoundRun::Living(record);
            }
            let living = self.living(name, &record);
            if !living.members.is_empty() {
                return FoundRun::Living(record);
            }
            doubtful = living.unknown;
        }
        if !is_owner {
            return FoundRun::Settling(record);
        }
        if !doubtful.is_empty() {
            return FoundRun::Doubtful(record, doubtful);
        }
        // Whoever was in charge before us may have taken it away while we looked; and have written in between.
        let same = fs::symlink_metadata(&path).is_ok_and(|now| now.ino() == place.ino() && now.dev() == place.dev());
        match read(&path, name) {
            Ok(record) if same => FoundRun::Dead(Box::new(record), JournalEntry { path, lock_file }, standpoint),
            _ => FoundRun::Gone,
        }
    }

    /// Whether some process holds that run's lock file: one of its own, wherever it is, or whoever takes care of it.
    pub(crate) fn is_held(&self, name: &str) -> bool {
        let lock = open_lock(&self.runs.join(name).join("lock"));
        lock.is_ok_and(|lock| {
            [TREE_LOCK, OWNER_LOCK].iter().any(|byte| lock_file::is_locked(&lock, *byte).unwrap_or(true))
        })
    }

    /// Drops the record of a run that cannot be judged from here.
    pub(crate) fn drop_record(&self, name: &str) {
        remove(&self.runs.join(name));
    }

    /// Whether somebody takes care of that run at this moment: its `tf`, its guardian, or another recovery.
    pub(crate) fn has_owner(&self, name: &str) -> bool {
        let lock = open_lock(&self.runs.join(name).join("lock"));
        lock.is_ok_and(|lock| lock_file::is_locked(&lock, OWNER_LOCK).unwrap_or(true))
    }

    /// The living processes of a run of this boot. Numbers of processes count only where they mean the same to us.
    fn living(&self, name: &str, record: &JournalRecord) -> Living {
        let same_numbers = record.host.numbers_processes_as(self.host());
        let identity = if same_numbers { record.tree.clone() } else { TreeIdentity::default() };
        let mut living = Living::of(name, &identity, None);
        if let (false, Some(container)) = (same_numbers, record.host.container()) {
            // Its numbers mean nothing here, so whatever is alive in its container may be of it.
            let inside = Process::all().into_iter().filter(|process| !process.is_dead());
            living.unknown.extend(inside.filter(|process| process.may_be_in(container)));
        }
        living
    }

    /// Whether another run than `own`, with somebody of it alive, says that the lock `id` is its.
    pub(crate) fn is_claimed(&self, id: &str, own: &str) -> bool {
        self.names().iter().filter(|name| *name != own).any(|name| match self.look(name) {
            FoundRun::Living(record) | FoundRun::Doubtful(record, _) => {
                record.log.locks.iter().any(|lock| lock.id == id && !lock.unlocked)
            }
            _ => false,
        })
    }

    /// Puts what is no record out of the way, where a person can look at it, and gives that place. `None` where it cannot be
    /// moved.
    pub(crate) fn set_aside(&self, name: &str) -> Option<PathBuf> {
        let directory = self.runs.with_file_name("set-aside");
        let _ = DirBuilder::new().mode(0o700).create(&directory);
        let target = directory.join(name);
        if !is_private(&directory) {
            return None;
        }
        let _ = fs::remove_dir_all(&target);
        fs::rename(self.runs.join(name), &target).ok()?;
        Recorder::clear_away(name);
        let mut kept: Vec<_> = fs::read_dir(&directory).into_iter().flatten().flatten().collect();
        kept.sort_by_key(|entry| std::cmp::Reverse(entry.metadata().and_then(|place| place.modified()).ok()));
        for old in kept.into_iter().skip(MAX_SET_ASIDE) {
            let _ = fs::remove_dir_all(old.path());
        }
        Some(target)
    }
}

impl JournalEntry {
    /// Replaces the record. With `to_disk` it is there after a loss of power too.
    ///
    /// # Errors
    /// A full disk, or one that is gone.
    pub(crate) fn write(&self, record: &JournalRecord, to_disk: bool) -> io::Result<()> {
        let unfinished = self.path.join(format!("record.{}", std::process::id()));
        let _ = fs::remove_file(&unfinished);
        let written = (|| {
            let text = serde_json::to_vec(record)?;
            if text.len() as u64 > MAX_RECORD_BYTES {
                // The older one can still be read.
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let mut file = create(&unfinished)?;
            file.write_all(&text)?;
            fs::rename(&unfinished, self.path.join("record.json"))?;
            if to_disk {
                // Once, for the content and the new name: what a journaling file system writes for a file that was just
                // renamed has both in it. If the power goes in between, the name may stand with nothing behind it, and
                // the record is none. That is no more than was lost a moment before, when it did not know of the lock.
                file.sync_all()?;
            }
            Ok(())
        })();
        if written.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        written
    }

    /// Takes the run out of the journal.
    pub(crate) fn take_away(&self) {
        remove(&self.path);
    }

    /// Whether somebody has written the record in the last while.
    pub(crate) fn was_written_within(&self, time: Duration) -> bool {
        !is_older(&self.path.join("record.json"), time)
    }

    /// What must stay open in whoever takes care of the run.
    pub(crate) fn lock_file(&self) -> &File {
        &self.lock_file
    }
}

/// Moved away first: nobody may find it half empty.
fn remove(path: &Path) {
    let Some(run) = path.file_name().and_then(OsStr::to_str) else { return };
    let old = path.with_file_name(format!(".old-{run}"));
    if fs::rename(path, &old).is_ok() {
        crash_point::reached("journal: moved away");
        clear_away(&old, run);
    }
}

/// Deletes what was moved away, and what its run has logged.
fn clear_away(old: &Path, run: &str) {
    // Before the directory: as long as that stands somebody knows that there may be a log.
    Recorder::clear_away(run);
    for file in ["record.json", "lock"] {
        let _ = fs::remove_file(old.join(file));
    }
    if fs::remove_dir(old).is_err() {
        let _ = fs::remove_dir_all(old);
    }
}

fn read(path: &Path, name: &str) -> io::Result<JournalRecord> {
    let mut text = Vec::new();
    open_private(OpenOptions::new().read(true), &path.join("record.json"))?
        .take(MAX_RECORD_BYTES + 1)
        .read_to_end(&mut text)?;
    let record: JournalRecord = serde_json::from_slice(&text)?;
    if text.len() as u64 > MAX_RECORD_BYTES || !record.is_sound(name) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it contradicts itself"));
    }
    Ok(record)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// A file must be open for writing for its bytes to be locked (fcntl_locking(2)).
fn open_lock(path: &Path) -> io::Result<File> {
    open_private(OpenOptions::new().read(true).write(true), path)
}

fn is_older(path: &Path, age: Duration) -> bool {
    let modified = fs::symlink_metadata(path).and_then(|place| place.modified());
    modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|since| since > age))
}

/// `PID-RANDOM`, as [`crate::journal::runs::run_id`] makes it.
fn is_run_id(name: &str) -> bool {
    name.split_once('-').is_some_and(|(pid, random)| {
        pid.parse::<u32>().is_ok()
            && random.len() == 16
            && random.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// The flags of terraform that say something about a run and whose names can be told from values.
const FLAGS: [&str; 22] = [
    "auto-approve",
    "backend",
    "backend-config",
    "backup",
    "destroy",
    "detailed-exitcode",
    "force-copy",
    "input",
    "json",
    "lock",
    "lock-timeout",
    "migrate-state",
    "out",
    "parallelism",
    "reconfigure",
    "refresh",
    "refresh-only",
    "replace",
    "state",
    "target",
    "var",
    "var-file",
];

/// The names of the flags among `arguments`, never a value: a word that is no flag of terraform's is somebody's value.
pub(crate) fn flag_names<'a>(arguments: impl IntoIterator<Item = &'a OsStr>) -> Vec<String> {
    let mut names = Vec::new();
    for argument in arguments {
        let Some(word) = argument.to_str().and_then(|word| word.strip_prefix('-')) else { continue };
        let name = word.trim_start_matches('-').split('=').next().unwrap_or_default();
        if FLAGS.contains(&name) {
            names.push(format!("-{name}"));
        }
    }
    names
}

/// Another's lock in the place of a run's own, taken while the run worked: somebody forced the run's lock, or the service
/// keeps nobody out. Two runs have worked on one state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replaced {
    /// The run's own lock.
    pub(crate) own: RecordedLock,
    /// The one that is there.
    pub(crate) by: LockInfo,
}

/// A name for this run that no other has.
pub(crate) fn run_id() -> String {
    let random = RandomState::new().build_hasher().finish();
    format!("{}-{random:016x}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::tests::{ID, lock_line};

    const RUN: &str = "4000000-0123456789abcdef";

    fn journal() -> (tempfile::TempDir, Journal) {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::open(&StateDirectory::at(root.path())).unwrap();
        (root, journal)
    }

    fn record(journal: &Journal) -> JournalRecord {
        let mut record = JournalRecord::new(RUN, journal);
        record.log.read(lock_line(7, "Attempting to lock remote state (DynamoDB only)...", ID, "r").as_bytes());
        record
    }

    /// Other tests of this process start processes meanwhile, and between fork(2) and exec(2) those hold every lock of ours.
    fn wait_until_free(journal: &Journal, bytes: &[u8]) {
        let lock = open_lock(&journal.runs.join(RUN).join("lock")).unwrap();
        let begun = std::time::Instant::now();
        while bytes.iter().any(|byte| lock_file::is_locked(&lock, *byte).unwrap()) {
            assert!(begun.elapsed() < Duration::from_secs(20), "{bytes:?} are held");
            crate::sys::poll::wait(&[], Some(Duration::from_millis(1)));
        }
    }

    #[test]
    fn a_run_is_living_then_settling_then_dead_then_gone() {
        let (_root, journal) = journal();
        let (entry, life) = journal.begin(&record(&journal)).unwrap();
        assert_eq!(journal.names(), [RUN]);
        assert!(matches!(journal.look(RUN), FoundRun::Living(_)));
        assert!(journal.is_claimed(ID, "other") && !journal.is_claimed(ID, RUN));
        drop(life);
        wait_until_free(&journal, &[TREE_LOCK]);
        assert!(matches!(journal.look(RUN), FoundRun::Settling(_)));
        let kept = entry.path.clone();
        drop(entry);
        wait_until_free(&journal, &[TREE_LOCK, OWNER_LOCK]);
        let FoundRun::Dead(found, entry, Standpoint::ThisBoot) = journal.look(RUN) else { panic!() };
        assert_eq!(found.log.locks[0].id, ID);
        assert!(matches!(journal.look(RUN), FoundRun::Settling(_)), "one recoverer at a time");
        entry.take_away();
        assert!(!kept.exists() && fs::read_dir(&journal.runs).unwrap().next().is_none(), "nothing is left");
        assert!(matches!(journal.look(RUN), FoundRun::Gone));
    }

    #[test]
    fn a_record_that_is_cut_anywhere_is_set_aside_and_nothing_breaks() {
        let (root, journal) = journal();
        let whole = serde_json::to_vec(&record(&journal)).unwrap();
        for length in 0..whole.len() {
            let (entry, life) = journal.begin(&record(&journal)).unwrap();
            fs::write(entry.path.join("record.json"), &whole[..length]).unwrap();
            drop((entry, life));
            wait_until_free(&journal, &[TREE_LOCK, OWNER_LOCK]);
            let found = journal.look(RUN);
            assert!(matches!(found, FoundRun::Broken(_)), "cut at {length}: {found:?}");
            assert_eq!(journal.names(), [RUN], "who only looks moves nothing");
            assert!(journal.set_aside(RUN).is_some());
            assert!(journal.names().is_empty());
        }
        assert!(fs::read_dir(root.path().join("set-aside")).unwrap().count() <= MAX_SET_ASIDE);
    }

    #[test]
    fn what_others_put_there_is_never_obeyed() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let (root, journal) = journal();
        let (entry, life) = journal.begin(&record(&journal)).unwrap();
        let path = entry.path.clone();
        drop((entry, life));
        wait_until_free(&journal, &[TREE_LOCK, OWNER_LOCK]);
        // A link to a whole record, in place of the directory and of the file.
        let elsewhere = root.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert!(matches!(journal.look(RUN), FoundRun::Foreign(..)));
        fs::remove_file(&path).unwrap();
        fs::rename(&elsewhere, &path).unwrap();
        fs::rename(path.join("record.json"), root.path().join("record")).unwrap();
        symlink(root.path().join("record"), path.join("record.json")).unwrap();
        assert!(matches!(journal.look(RUN), FoundRun::Broken(_)));
        journal.set_aside(RUN).unwrap();
        // One that is open to others.
        let (entry, life) = journal.begin(&record(&journal)).unwrap();
        drop((entry, life));
        wait_until_free(&journal, &[TREE_LOCK, OWNER_LOCK]);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(journal.look(RUN), FoundRun::Foreign(..)));
        // One that says to be another run.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        let other = "4000000-fedcba9876543210";
        fs::rename(&path, path.with_file_name(other)).unwrap();
        assert!(matches!(journal.look(other), FoundRun::Broken(_)));
    }

    #[test]
    fn only_the_names_of_flags_are_kept() {
        let arguments =
            ["-auto-approve", "-var", "secret=hunter2", "-var=x=hunter3", "--target=a", "-hunter4", "-lock-timeout=0s"];
        let names = flag_names(arguments.iter().map(OsStr::new));
        assert_eq!(names, ["-auto-approve", "-var", "-var", "-target", "-lock-timeout"]);
    }
}
