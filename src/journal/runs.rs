//! The journal: the records of runs. If every process of a run is killed, a later `tf` uses the run's record to release
//! the run's locks.
//!
//! Each run has a directory below `runs/` in the state directory, with two files. `record.json` has the facts that the
//! later `tf` needs: the facts about locks from terraform's log, where each lock is, and how the run reached it. It
//! contains no value of a variable (`-var`), no access key and no token. `lock` shows whether processes of the run are
//! alive, because these processes hold file locks on two bytes of the file ([`crate::sys::lock_file`]):
//!
//! - [`TREE_LOCK`] is held by terraform and by every process that inherited the descriptor from it.
//! - [`OWNER_LOCK`] is held by the owner of the run: at first `tf` and its guardian together, and later one recovery
//!   process. No other process inherits this lock.
//!
//! A run that leaves nothing unfinished deletes its directory.
//!
//! A directory is created under a temporary name. It is renamed to its final name after `lock` is locked and
//! `record.json` is written. Before the directory is deleted, it is renamed again. A directory with the final name is
//! therefore complete, and was locked from the start. A record is replaced with rename(2), so it is always complete as
//! well.

use std::cell::OnceCell;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::aws::redacted_backend::{AwsEnvironment, RedactedBackend};
use crate::journal::clock_reading::ClockReading;
use crate::journal::host::{HostIdentity, Standpoint};
use crate::journal::kept_locks::KeptLocks;
use crate::journal::membership::TreeIdentity;
use crate::journal::recorder::Recorder;
use crate::journal::run_mark::Living;
use crate::journal::run_state::{RunState, RunTraces};
use crate::journal::state_directory::{Durability, StateDirectory, is_older, is_private, open_private, replace};
use crate::lock::proof::Run;
use crate::lock::reached::Reached;
use crate::sys::file_id::FileId;
use crate::sys::process::{self, Process, ProcessList};
use crate::sys::{descriptor, lock_file};
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::{JSON_LIMIT, Log, LoggedLock, RecordedLock, UnnamedLock};
use crate::trace::trace;
use crate::{crash_point, random};

/// The byte of the lock file that is locked by terraform and by every process that inherits the descriptor.
const TREE_LOCK: u8 = 0;

/// The byte of the lock file that is locked by the owner of the run.
const OWNER_LOCK: u8 = 1;

/// The maximum length of a record, in bytes. `tf` did not write a longer record, so such a record may be hostile.
const MAX_RECORD_BYTES: u64 = 2 * JSON_LIMIT as u64;

/// The maximum number of invalid records in `set-aside/`. The records are kept so that a person can inspect them. If
/// there are more, the oldest ones are deleted.
const MAX_SET_ASIDE: usize = 16;

/// How long a record is kept if `tf` on this host cannot determine whether the run is alive.
const RECORD_RETENTION_WINDOW: Duration = Duration::from_hours(30 * 24);

/// The reason for not finishing a dead run whose lock file cannot be opened for writing.
pub(crate) const READ_ONLY: &str = "the record of the run cannot be locked, because the state directory is read-only";

/// The reason for not judging a run whose lock file cannot be opened, although nothing is wrong with the file. For
/// example, no descriptor is free.
pub(crate) const LOCK_NOT_OPENED: &str = "the lock file of the run cannot be opened";

/// The reasons for not judging a run of this boot, if the processes of this host cannot be listed.
pub(crate) const UNLISTED: [&str; 2] = ["/proc here does not list this process", "the processes cannot be listed here"];

/// The work that is left after a run has ended.
#[derive(Debug, Default)]
pub(crate) struct Unfinished {
    /// Locks that were not released.
    pub(crate) locks: Vec<RecordedLock>,
    /// Locks without a known ID that `tf` must still search for.
    pub(crate) unnamed: Vec<UnnamedLock>,
    /// Whether a lock in a backend other than S3 may be held.
    pub(crate) elsewhere: bool,
    /// Whether terraform died without having written a log, so that it is not known whether it held a lock.
    pub(crate) unlogged: bool,
    /// Locks of the run that were replaced while the run was working. They must be reported to a person.
    pub(crate) replaced: Vec<Replaced>,
}

impl Unfinished {
    /// Records that a lock in a backend other than S3 may be held. `had` contains what is known about such locks.
    pub(crate) fn add_elsewhere(&mut self, had: impl IntoIterator<Item = UnnamedLock>) {
        self.elsewhere = true;
        self.unnamed.extend(had);
    }

    /// Whether nothing is left to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.locks.is_empty()
            && self.unnamed.is_empty()
            && !self.elsewhere
            && !self.unlogged
            && self.replaced.is_empty()
    }
}

/// The record of one run, as it is written to `record.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct JournalRecord {
    /// The version of the format: 1.
    pub(crate) format: u32,
    /// The run's ID, the last part of its `TFW_RUN` and the name of its directory.
    pub(crate) run: String,
    /// The host on which the run was started.
    pub(crate) host: HostIdentity,
    /// The pid of the run's `tf`.
    pub(crate) tf: u32,
    /// The pid of the run's terraform. `None` until terraform is started.
    pub(crate) terraform: Option<i32>,
    /// The facts that identify the run's processes, in addition to the mark (`TFW_RUN`).
    #[serde(default)]
    pub(crate) tree: TreeIdentity,
    /// The pid of the parent of the run's `tf`. `None` if the exit of that parent is not a request to stop.
    #[serde(default)]
    pub(crate) parent: Option<i32>,
    /// `user@host` at the start of the run, as terraform writes it into a lock. Empty in a record of an earlier
    /// version.
    #[serde(default)]
    pub(crate) who: String,
    /// When terraform was started.
    pub(crate) started: Timestamp,
    /// The name by which terraform was started.
    pub(crate) program: String,
    /// The value of `-chdir`. `None` if it was not given.
    pub(crate) chdir: Option<String>,
    /// The subcommand of terraform.
    pub(crate) command: String,
    /// The names of terraform's flags that were given ([`flag_names`]).
    pub(crate) flags: Vec<String>,
    /// The directory in which the run was started.
    pub(crate) directory: String,
    /// The data directory of terraform.
    pub(crate) data_directory: String,
    /// The workspaces that the run may have used.
    pub(crate) workspaces: Vec<String>,
    /// The path of the plan file that the run applied. `None` if it applied none.
    #[serde(default)]
    pub(crate) plan: Option<String>,
    /// The backends that the run may have used, without their secrets.
    pub(crate) access: Vec<RedactedBackend>,
    /// The environment variables and settings that decided how the run reached AWS.
    pub(crate) surroundings: AwsEnvironment,
    /// The facts that have been read from the run's log so far.
    pub(crate) log: Log,
    /// The offset in the log, in bytes, at which a reader that continues with `log` must begin.
    pub(crate) offset: u64,
    /// Whether the run has ended and has left work that could not be done at that time ([`Unfinished`]).
    pub(crate) over: bool,
    /// When the record was closed: `tf` then knew of no process of the run that might still be working. `None` if the
    /// run is not over, and in the records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) closed: Option<ClockReading>,
    /// Whether `tf` must only report the run's locks and not release them (`TFW_RELEASE=never`).
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
    /// Returns a record with the run's ID, the host, and the pid of this process. The caller sets the other fields.
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
            closed: None,
            named_only: false,
            unlogged: false,
            replaced: Vec::new(),
        }
    }

    /// Returns the directory in which terraform worked: the one that `-chdir` names, or the one in which the run was
    /// started.
    pub(crate) fn working_directory(&self) -> String {
        let directory = Path::new(&self.directory);
        let working = self.chdir.as_ref().map_or_else(|| directory.to_owned(), |chdir| directory.join(chdir));
        working.to_string_lossy().into_owned()
    }

    /// Returns the `TF_DATA_DIR` that a command for the run needs. `None` if it needs none.
    pub(crate) fn named_data_directory(&self) -> Option<&str> {
        DataDirectory::named(&self.data_directory, Path::new(&self.working_directory()))
    }

    /// Returns the facts that decide whether a lock belongs to the run.
    pub(crate) fn proof(&self) -> Run {
        Run::recorded(&self.who, self.started, &self.log)
    }

    /// Returns the identities with which the run reached its backends.
    pub(crate) fn reached(&self) -> Reached {
        Reached::of(&self.run, &self.access, &self.surroundings)
    }

    /// Whether the record contains the lock `id` as not released.
    fn has_unreleased(&self, id: &str) -> bool {
        self.log.unreleased().any(|lock| lock.id == id)
    }

    /// Marks the run as over, and stores the unfinished work `left`. The facts about the run's processes do not change.
    pub(crate) fn leave(&mut self, left: Unfinished) {
        let named = left.locks.into_iter().map(LoggedLock::Named);
        self.log.set_locks(named.chain(left.unnamed.into_iter().map(LoggedLock::Unnamed)));
        self.unlogged = left.unlogged;
        self.replaced = left.replaced;
        self.over = true;
        self.closed.get_or_insert_with(ClockReading::now);
    }

    /// Whether the record is valid and belongs to the run `name`. If not, it must not be used.
    fn is_sound(&self, name: &str) -> bool {
        self.format == 1 && self.run == name && self.log.named().all(|lock| is_lock_id(&lock.id))
    }
}

/// The journal in one state directory.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    runs: PathBuf,
    /// The identity of this host. It is determined when it is first needed.
    host: OnceCell<HostIdentity>,
}

/// The directory of a run, and the open lock file through which this process holds [`OWNER_LOCK`].
#[derive(Debug)]
pub(crate) struct JournalEntry {
    path: PathBuf,
    lock_file: File,
}

/// The state of a run in the journal.
#[derive(Debug)]
pub(crate) enum FoundRun {
    /// A process of the run is alive.
    Living(Box<JournalRecord>),
    /// Terraform's tree seems to be dead, and another process is finishing the run at this moment.
    Recovering(Box<JournalRecord>),
    /// The run is dead, and this process is its owner as long as it keeps the [`JournalEntry`].
    Dead(Box<JournalRecord>, JournalEntry, Standpoint),
    /// This process cannot determine whether the run is alive, so it must not finish the run. The text says why. The
    /// record is only for commands that list runs. It is `None` if it could not be read.
    Foreign(&'static str, Option<Box<JournalRecord>>),
    /// No process of the run is known to be alive, but these processes may belong to the run. As long as these
    /// processes are running, the run must not be finished.
    Doubtful(Box<JournalRecord>, Vec<Process>),
    /// The directory at this path has no valid record or no lock file, and no process holds its lock file.
    Broken(PathBuf),
    /// The run in the directory `path` cannot be read because of an error of this host, such as a lack of descriptors.
    /// That proves nothing about the run, which may be alive, or about its record.
    Unread { path: PathBuf, error: String },
    /// The run is not in the journal, or was deleted from it in the meantime.
    Gone,
}

impl Journal {
    /// Opens the journal in `directory`. Creates the journal if it does not exist.
    ///
    /// # Errors
    /// Fails if `runs/` cannot be created, or is not private to this user.
    pub(crate) fn open(directory: &StateDirectory) -> io::Result<Self> {
        let runs = directory.join("runs");
        match DirBuilder::new().mode(0o700).create(&runs) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        Self::there(directory)
            .ok_or_else(|| io::Error::new(io::ErrorKind::PermissionDenied, "runs/ is not private to this user"))
    }

    /// Opens the journal in `directory`. `None` if it does not exist or is not private to this user.
    pub(crate) fn there(directory: &StateDirectory) -> Option<Self> {
        let runs = directory.join("runs");
        is_private(&runs).then(|| Self { runs, host: OnceCell::new() })
    }

    /// Returns the locks that were kept on purpose in the state directory of this journal.
    pub(crate) fn kept_locks(&self) -> KeptLocks {
        KeptLocks::at(self.runs.with_file_name("kept"))
    }

    /// Returns the identity of this host.
    pub(crate) fn host(&self) -> &HostIdentity {
        self.host.get_or_init(|| HostIdentity::here(&self.runs))
    }

    /// Creates the directory of a run and locks both bytes of its lock file. Returns the entry, and the descriptor that
    /// terraform must inherit.
    ///
    /// # Errors
    /// Fails if the directory cannot be created, written or locked. The directory is then deleted again.
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
        let tree_lock = create(&path)?;
        let lock_file = open_lock(&path)?;
        if !lock_file::try_lock(&tree_lock, TREE_LOCK)? || !lock_file::try_lock(&lock_file, OWNER_LOCK)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let inherited = descriptor::inheritable_high(&tree_lock)?;
        crash_point::reached("journal: locked");
        create(&unfinished.join("record.json"))?.write_all(&serde_json::to_vec(record)?)?;
        crash_point::reached("journal: written");
        let path = self.runs.join(&record.run);
        fs::rename(unfinished, &path)?;
        crash_point::reached("journal: in place");
        Ok((JournalEntry { path, lock_file }, inherited))
    }

    /// As [`Journal::list`], for a caller that does not finish or report the runs of a journal that it cannot read.
    pub(crate) fn names(&self) -> Vec<String> {
        self.list().unwrap_or_default()
    }

    /// Returns the names of the runs in the journal. Deletes directories whose creation was not completed within 1 h,
    /// and directories whose deletion was not completed.
    ///
    /// # Errors
    /// Fails if the journal cannot be read, for example because no descriptor is free. Which runs are in it is then not
    /// known.
    pub(crate) fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.runs)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_run_id(&name) {
                names.push(name);
            } else if let Some(run) = name.strip_prefix(".new-")
                && is_older(&entry.path(), Duration::from_hours(1))
            {
                // The run's `tf` died before it started terraform, so the run has left nothing else.
                clear_away(&entry.path(), run);
            } else if let Some(run) = name.strip_prefix(".old-") {
                clear_away(&entry.path(), run);
            }
        }
        Ok(names)
    }

    /// Returns the state of the runs of a journal that cannot be listed because of `error`: no more is known about them
    /// than about one run that cannot be read.
    pub(crate) fn unlisted(&self, error: &io::Error) -> FoundRun {
        FoundRun::Unread { path: self.runs.clone(), error: error.to_string() }
    }

    /// Whether the journal has a run `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        fs::symlink_metadata(self.runs.join(name)).is_ok()
    }

    /// Determines the state of the run `name` from the journal and from the processes of this host. If the run is dead,
    /// this process is its owner as long as it keeps the [`JournalEntry`]. If the host of the run makes that impossible
    /// ([`Standpoint::Foreign`]), returns [`FoundRun::Foreign`], and deletes a record that is older than
    /// [`RECORD_RETENTION_WINDOW`].
    pub(crate) fn look(&self, name: &str) -> FoundRun {
        let path = self.runs.join(name);
        let unread = |error: &io::Error| {
            trace!("{name} cannot be read: {error}");
            FoundRun::Unread { path: path.clone(), error: error.to_string() }
        };
        let place = match fs::symlink_metadata(&path) {
            Ok(place) => place,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return FoundRun::Gone,
            Err(error) => return unread(&error),
        };
        if !is_private(&path) {
            return FoundRun::Foreign("the record of that run is not private to this user", None);
        }
        // The run may be deleted at any moment. Its directory is moved away first, so an error of any kind may come
        // from that: a file that was opened just before has no name any more, and does not count as private.
        let is_gone = || fs::symlink_metadata(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        let record = match read(&path, name) {
            Ok(record) => record,
            Err(_) if is_gone() => return FoundRun::Gone,
            Err(error) if !is_of_content(&error) => return unread(&error),
            Err(error) => {
                trace!("record of {name}: {error}");
                // If a process holds the run's lock file, that process will replace or delete the record. So the record
                // does not count as broken.
                return match self.is_held(name) {
                    Ok(true) => FoundRun::Foreign("the record of that run cannot be read", None),
                    Ok(false) => FoundRun::Broken(path),
                    Err(error) => unread(&error),
                };
            }
        };
        let mut standpoint = record.host.seen_from(self.host());
        if standpoint == Standpoint::ThisBoot {
            standpoint = match process::list() {
                ProcessList::Available => standpoint,
                ProcessList::Unavailable => Standpoint::Foreign(UNLISTED[0]),
                ProcessList::Unsupported => Standpoint::Foreign(UNLISTED[1]),
            };
        }
        if let Standpoint::Foreign(why) = standpoint {
            if is_older(&path, RECORD_RETENTION_WINDOW) && matches!(self.is_held(name), Ok(false)) {
                let _ = remove(&path);
            }
            return FoundRun::Foreign(why, Some(Box::new(record)));
        }
        let opened = match open_lock(&path.join("lock")) {
            // The bytes of a file can be locked only if it is open for writing, so the run cannot be finished from
            // here. But it can be seen whether they are locked.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied) =>
            {
                open_private(OpenOptions::new().read(true), &path.join("lock")).map(|lock_file| (lock_file, false))
            }
            opened => opened.map(|lock_file| (lock_file, true)),
        };
        let (lock_file, is_writable) = match opened {
            Ok(opened) => opened,
            Err(_) if is_gone() => return FoundRun::Gone,
            Err(error) if is_of_content(&error) => return FoundRun::Broken(path),
            Err(_) => return FoundRun::Foreign(LOCK_NOT_OPENED, Some(Box::new(record))),
        };
        let record = Box::new(record);
        let is_owner = if is_writable {
            lock_file::try_lock(&lock_file, OWNER_LOCK).unwrap_or(false)
        } else {
            !lock_file::is_locked(&lock_file, OWNER_LOCK).unwrap_or(true)
        };
        // After a restart, the lock file and the processes of this host show nothing about the run.
        let is_this_boot = standpoint == Standpoint::ThisBoot;
        let tree_is_locked = is_this_boot && lock_file::is_locked(&lock_file, TREE_LOCK).unwrap_or(true);
        let living = if is_this_boot && !tree_is_locked { self.living(name, &record) } else { Living::default() };
        let traces = RunTraces {
            is_owned: !is_owner,
            tree_is_locked,
            has_members: !living.members.is_empty(),
            has_unknown: !living.unknown.is_empty(),
        };
        match traces.state() {
            RunState::Living => return FoundRun::Living(record),
            RunState::Recovering => return FoundRun::Recovering(record),
            RunState::Doubtful => return FoundRun::Doubtful(record, living.unknown),
            RunState::Dead if !is_writable => return FoundRun::Foreign(READ_ONLY, Some(record)),
            RunState::Dead => {}
        }
        // The previous owner may have deleted the directory or replaced the record since this process read the record.
        let same = fs::symlink_metadata(&path).is_ok_and(|now| FileId::from(&now) == FileId::from(&place));
        match read(&path, name) {
            Ok(now) if same && now.tree == record.tree => {
                FoundRun::Dead(Box::new(now), JournalEntry { path, lock_file }, standpoint)
            }
            // The processes were judged by an older record, which may lack one that has outlived the run.
            Ok(_) if same => {
                drop(lock_file);
                self.look(name)
            }
            Err(error) if same && !is_of_content(&error) => unread(&error),
            _ => FoundRun::Gone,
        }
    }

    /// Whether the run's lock file is locked, by a process of the run in any container or by the run's owner. False if
    /// there is no lock file, or if what is in its place was not put there by `tf` of this user, which locks no such
    /// file.
    ///
    /// # Errors
    /// Fails if this cannot be found out: the lock file cannot be opened, for example because no descriptor is free, or
    /// the file system does not say which bytes are locked.
    pub(crate) fn is_held(&self, name: &str) -> io::Result<bool> {
        // A lock can be seen through a file that is open only for reading, so this works in a read-only state
        // directory.
        let lock = match open_private(OpenOptions::new().read(true), &self.runs.join(name).join("lock")) {
            Ok(lock) => lock,
            Err(error) if is_of_content(&error) => return Ok(false),
            Err(error) => return Err(error),
        };
        Ok(lock_file::is_locked(&lock, TREE_LOCK)? || lock_file::is_locked(&lock, OWNER_LOCK)?)
    }

    /// Deletes the record of a run. The caller uses this if it cannot be determined here whether the run is alive.
    ///
    /// # Errors
    /// As [`JournalEntry::take_away`].
    pub(crate) fn drop_record(&self, name: &str) -> io::Result<()> {
        remove(&self.runs.join(name))
    }

    /// Whether the run has an owner at this moment: its `tf`, its guardian, or a recovery process. False if the lock
    /// file cannot be opened.
    pub(crate) fn has_owner(&self, name: &str) -> bool {
        let lock = open_lock(&self.runs.join(name).join("lock"));
        lock.is_ok_and(|lock| lock_file::is_locked(&lock, OWNER_LOCK).unwrap_or(true))
    }

    /// Returns the living processes of a run of this boot. Recorded pids are used only if the run had the same pid
    /// namespace as this process.
    fn living(&self, name: &str, record: &JournalRecord) -> Living {
        let same_numbers = record.host.numbers_processes_as(self.host());
        let identity = if same_numbers { record.tree.clone() } else { TreeIdentity::default() };
        let mut living = Living::of(name, &identity, None);
        if let (false, Some(container)) = (same_numbers, record.host.container()) {
            // The recorded pids belong to another pid namespace, so every living process in the run's container may
            // belong to the run.
            let inside = Process::all().into_iter().filter(|process| !process.is_dead());
            living.unknown.extend(inside.filter(|process| process.may_be_in(container)));
        }
        living
    }

    /// Returns the living processes that are known to belong to the run of `record`. Empty if only a lock on the run's
    /// lock file shows that a process of the run is alive.
    pub(crate) fn members(&self, record: &JournalRecord) -> Vec<Process> {
        self.living(&record.run, record).members
    }

    /// Whether a run other than `own` may still hold the lock `id`. True if the record of such a run contains the lock
    /// as not released, and a process of that run is alive or may be alive ([`FoundRun::Living`],
    /// [`FoundRun::Doubtful`], or [`FoundRun::Foreign`] with a lock file that a process holds). `None` if this is not
    /// known: a record cannot be read whose lock file a process holds, or an error of the host hides the runs.
    pub(crate) fn is_claimed(&self, id: &str, own: &str) -> Option<bool> {
        let names = match self.list() {
            Ok(names) => names,
            // The directory was removed, and every record with it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(false),
            Err(_) => return None,
        };
        let others = names.iter().filter(|name| *name != own);
        any(others.map(|name| match self.look(name) {
            FoundRun::Living(record) | FoundRun::Doubtful(record, _) => Some(record.has_unreleased(id)),
            FoundRun::Foreign(_, Some(record)) if !record.has_unreleased(id) => Some(false),
            FoundRun::Foreign(_, Some(_)) => self.is_held(name).ok(),
            FoundRun::Foreign(_, None) | FoundRun::Unread { .. } => self.is_held(name).ok().filter(|is_held| !is_held),
            FoundRun::Dead(..) | FoundRun::Recovering(_) | FoundRun::Broken(_) | FoundRun::Gone => Some(false),
        }))
    }

    /// Moves an invalid record ([`FoundRun::Broken`]) to `set-aside/`, where a person can inspect it. Returns the new
    /// path of the record. `None` if the record cannot be moved.
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
    /// Replaces the record.
    ///
    /// # Errors
    /// Fails if the record is longer than [`MAX_RECORD_BYTES`], or if it cannot be written, for example because the
    /// disk is full. The previous record stays.
    pub(crate) fn write(&self, record: &JournalRecord, durability: Durability) -> io::Result<()> {
        let text = serde_json::to_vec(record)?;
        if text.len() as u64 > MAX_RECORD_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        replace(&self.path.join("record.json"), &text, durability)
    }

    /// Deletes the run from the journal.
    ///
    /// # Errors
    /// Fails if the run stays in the journal, for example because the state directory is read-only.
    pub(crate) fn take_away(&self) -> io::Result<()> {
        remove(&self.path)
    }

    /// Closes the record. If nothing is `left`, deletes the run from the journal. Otherwise writes `record` with what is
    /// left, for the next `tf`.
    ///
    /// # Errors
    /// Fails if the record cannot be written ([`JournalEntry::write`]). The recorder of the run must then stay: only it
    /// may show a lock. A run that cannot be deleted is no error: a recovery finds that it has left nothing.
    pub(crate) fn close(&self, mut record: JournalRecord, left: Unfinished) -> io::Result<()> {
        if left.is_empty() {
            let _ = self.take_away();
            return Ok(());
        }
        record.leave(left);
        self.write(&record, Durability::PowerLoss)
    }

    /// Whether the record was written within the last `time`. True if the time of the write is not known.
    pub(crate) fn was_written_within(&self, time: Duration) -> bool {
        !is_older(&self.path.join("record.json"), time)
    }

    /// Returns when the record was last written. `None` if that is not known.
    pub(crate) fn written_at(&self) -> Option<Timestamp> {
        let metadata = fs::metadata(self.path.join("record.json")).ok()?;
        Timestamp::try_from(metadata.modified().ok()?).ok()
    }

    /// The lock file, which must stay open in every process that owns the run.
    pub(crate) fn lock_file(&self) -> &File {
        &self.lock_file
    }
}

/// Deletes the directory of a run. The directory is renamed first, so that no process finds an incomplete directory
/// under the final name. A directory that no longer exists counts as deleted.
///
/// # Errors
/// Fails if the directory cannot be renamed. It is then unchanged.
fn remove(path: &Path) -> io::Result<()> {
    let Some(run) = path.file_name().and_then(OsStr::to_str) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let old = path.with_file_name(format!(".old-{run}"));
    match fs::rename(path, &old) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        renamed => renamed?,
    }
    crash_point::reached("journal: moved away");
    clear_away(&old, run);
    Ok(())
}

/// Deletes the recorder of `run` and its directory `old`, which has a temporary name.
fn clear_away(old: &Path, run: &str) {
    // Delete the recorder before the directory. If this process dies between the two deletes, a later `tf` finds the
    // directory and deletes it.
    Recorder::clear_away(run);
    for file in ["record.json", "lock"] {
        let _ = fs::remove_file(old.join(file));
    }
    if fs::remove_dir(old).is_err() {
        let _ = fs::remove_dir_all(old);
    }
}

/// Reads the record of the run `name` in the directory `path`.
///
/// # Errors
/// Fails if the record cannot be read, is longer than [`MAX_RECORD_BYTES`], or is not valid.
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

/// Creates a file that only this user can open. Fails if anything exists at `path`.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Opens a lock file for writing: the bytes of a file that is open only for reading cannot be locked
/// (fcntl_locking(2)).
fn open_lock(path: &Path) -> io::Result<File> {
    open_private(OpenOptions::new().read(true).write(true), path)
}

/// Returns whether one of `answers` is true. `None` if none is, and one is not known.
fn any(answers: impl IntoIterator<Item = Option<bool>>) -> Option<bool> {
    let mut all = Some(false);
    for answer in answers {
        match answer {
            Some(true) => return answer,
            Some(false) => {}
            None => all = None,
        }
    }
    all
}

/// Whether `error`, from an attempt to open or read a file of a run, says something about the file: it does not exist,
/// is not a file that `tf` has written, or has no valid content. Every other error comes from the host, for example
/// because no descriptor or no memory is free, or because the disk fails. Such an error proves nothing about the run.
fn is_of_content(error: &io::Error) -> bool {
    // A symbolic link (O_NOFOLLOW), a directory, and a socket (open(2)).
    let is_another_kind = matches!(error.raw_os_error(), Some(libc::ELOOP | libc::EISDIR | libc::ENXIO));
    // The last two are also the errors of serde_json about a text, and of `open_private` about a file.
    let kinds = [io::ErrorKind::NotFound, io::ErrorKind::InvalidData, io::ErrorKind::UnexpectedEof];
    is_another_kind || kinds.contains(&error.kind())
}

/// Whether `name` has the form `PID-RANDOM` that [`run_id`] creates.
fn is_run_id(name: &str) -> bool {
    name.split_once('-').is_some_and(|(pid, random)| {
        pid.parse::<u32>().is_ok()
            && random.len() == 16
            && random.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// The flags of terraform whose names are recorded. A word that is not in this list is never recorded, because it may
/// be a value.
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

/// Returns the names of the flags among `arguments`, without the values. A word that is not in [`FLAGS`] is left out.
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

/// A lock of another run that replaced this run's own lock while this run was working. Either a person forced the
/// release of this run's own lock, or the service does not enforce locks. In both cases, two runs have worked on the
/// same state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replaced {
    /// The run's own lock.
    pub(crate) own: RecordedLock,
    /// The lock of the other run.
    pub(crate) by: LockInfo,
}

/// Returns a name that no other run has: `PID-RANDOM`, with 16 random hexadecimal digits.
pub(crate) fn run_id() -> String {
    format!("{}-{:016x}", std::process::id(), random::number())
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

    /// Waits until `bytes` are not locked. Other tests in this process start child processes at the same time. Between
    /// fork(2) and exec(2), such a child holds every lock of this process.
    fn wait_until_free(journal: &Journal, bytes: &[u8]) {
        let lock = open_lock(&journal.runs.join(RUN).join("lock")).unwrap();
        wait_until(|| bytes.iter().all(|byte| !lock_file::is_locked(&lock, *byte).unwrap()));
    }

    #[track_caller]
    fn wait_until(is_so: impl Fn() -> bool) {
        let begun = std::time::Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_secs(20), "bytes are held");
            crate::sys::poll::wait(&[], Some(Duration::from_millis(1)));
        }
    }

    #[test]
    fn a_claim_is_excluded_only_if_every_run_is_known() {
        let (yes, no) = (Some(true), Some(false));
        for first in [yes, no, None] {
            for second in [yes, no, None] {
                let expected = match (first, second) {
                    (Some(true), _) | (_, Some(true)) => yes,
                    (Some(false), Some(false)) => no,
                    _ => None,
                };
                assert_eq!(any([first, second]), expected, "{first:?} {second:?}");
            }
        }
        assert_eq!(any([]), no);
        // Without a directory, there is no other run. What is in its place hides the runs.
        let (_root, journal) = journal();
        fs::remove_dir_all(&journal.runs).unwrap();
        assert_eq!(journal.is_claimed(ID, "other"), no);
        fs::write(&journal.runs, "").unwrap();
        assert_eq!(journal.is_claimed(ID, "other"), None);
    }

    #[test]
    fn a_run_is_living_then_settling_then_dead_then_gone() {
        let (_root, journal) = journal();
        let (entry, tree_lock) = journal.begin(&record(&journal)).unwrap();
        assert_eq!(journal.names(), [RUN]);
        assert!(matches!(journal.look(RUN), FoundRun::Living(_)));
        assert_eq!((journal.is_claimed(ID, "other"), journal.is_claimed(ID, RUN)), (Some(true), Some(false)));
        drop(tree_lock);
        wait_until_free(&journal, &[TREE_LOCK]);
        assert!(matches!(journal.look(RUN), FoundRun::Recovering(_)));
        let kept = entry.path.clone();
        drop(entry);
        wait_until_free(&journal, &[TREE_LOCK, OWNER_LOCK]);
        let FoundRun::Dead(found, entry, Standpoint::ThisBoot) = journal.look(RUN) else { panic!() };
        assert_eq!(found.log.named().next().unwrap().id, ID);
        assert!(matches!(journal.look(RUN), FoundRun::Recovering(_)), "one recoverer at a time");
        // A file in the way of the rename, which `list` does not delete.
        let in_the_way = kept.with_file_name(format!(".old-{RUN}"));
        fs::write(&in_the_way, "").unwrap();
        assert!(entry.take_away().is_err() && kept.exists());
        fs::remove_file(&in_the_way).unwrap();
        entry.take_away().unwrap();
        assert!(!kept.exists() && fs::read_dir(&journal.runs).unwrap().next().is_none(), "nothing is left");
        assert!(matches!(journal.look(RUN), FoundRun::Gone));
    }

    #[test]
    fn a_record_that_is_cut_anywhere_is_set_aside_and_nothing_breaks() {
        let (root, journal) = journal();
        let whole = serde_json::to_vec(&record(&journal)).unwrap();
        for length in 0..whole.len() {
            let (entry, tree_lock) = journal.begin(&record(&journal)).unwrap();
            fs::write(entry.path.join("record.json"), &whole[..length]).unwrap();
            drop((entry, tree_lock));
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
        let (entry, tree_lock) = journal.begin(&record(&journal)).unwrap();
        let path = entry.path.clone();
        drop((entry, tree_lock));
        wait_until_free(&journal, &[TREE_LOCK, OWNER_LOCK]);
        // A symbolic link to a valid record, in place of the directory and then of the file.
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
        // A directory that other users can read.
        let (entry, tree_lock) = journal.begin(&record(&journal)).unwrap();
        drop((entry, tree_lock));
        wait_until_free(&journal, &[TREE_LOCK, OWNER_LOCK]);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(journal.look(RUN), FoundRun::Foreign(..)));
        // A record that names another run.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        let other = "4000000-fedcba9876543210";
        fs::rename(&path, path.with_file_name(other)).unwrap();
        assert!(matches!(journal.look(other), FoundRun::Broken(_)));
    }

    #[test]
    fn only_an_error_about_a_file_says_that_the_file_is_broken() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        let read_json = |text: &str| -> io::Error { serde_json::from_str::<JournalRecord>(text).unwrap_err().into() };
        let about_file = [
            open_lock(&path).unwrap_err(),
            open_lock(root.path()).unwrap_err(),
            open_private(OpenOptions::new().read(true), root.path()).unwrap_err(),
            read_json(""),
            read_json("{"),
            read_json("null"),
            read_json("x"),
        ];
        for error in about_file {
            assert!(is_of_content(&error), "{error:?}");
        }
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(is_of_content(&open_lock(&path).unwrap_err()));
        for of_host in [
            libc::EMFILE,
            libc::ENFILE,
            libc::EIO,
            libc::EACCES,
            libc::EPERM,
            libc::ENOMEM,
            libc::EROFS,
            libc::ENOSPC,
            libc::ESTALE,
            libc::EINTR,
            libc::ETIMEDOUT,
            libc::ENOTCONN,
            libc::ENOLCK,
        ] {
            let error = io::Error::from_raw_os_error(of_host);
            assert!(!is_of_content(&error), "{error:?}");
        }
    }

    /// A record whose file cannot be read, a lock file that cannot be read, and neither. Root reads every file.
    #[test]
    fn a_run_whose_files_cannot_be_read_is_neither_broken_nor_free() {
        use std::os::unix::fs::PermissionsExt;
        if nix::unistd::geteuid().is_root() {
            return;
        }
        for (files, is_record_read) in
            [(&["record.json"][..], false), (&["lock"], true), (&["record.json", "lock"], false)]
        {
            let (_root, journal) = journal();
            let (entry, tree_lock) = journal.begin(&record(&journal)).unwrap();
            for file in files {
                fs::set_permissions(entry.path.join(file), fs::Permissions::from_mode(0o000)).unwrap();
            }
            drop((entry, tree_lock));
            match journal.look(RUN) {
                FoundRun::Unread { .. } => assert!(!is_record_read),
                FoundRun::Foreign(LOCK_NOT_OPENED, Some(_)) => assert!(is_record_read),
                found => panic!("{files:?}: {found:?}"),
            }
            assert_eq!(journal.is_held(RUN).is_err(), files.contains(&"lock"), "{files:?}");
        }
    }

    /// The state directory is read-only, or the lock file alone.
    #[test]
    fn a_run_whose_lock_file_cannot_be_written_is_seen_but_not_finished() {
        use std::os::unix::fs::PermissionsExt;
        if nix::unistd::geteuid().is_root() {
            return;
        }
        let (_root, journal) = journal();
        let (entry, tree_lock) = journal.begin(&record(&journal)).unwrap();
        fs::set_permissions(entry.path.join("lock"), fs::Permissions::from_mode(0o400)).unwrap();
        assert!(matches!(journal.look(RUN), FoundRun::Living(_)) && journal.is_held(RUN).unwrap());
        drop(tree_lock);
        wait_until(|| matches!(journal.look(RUN), FoundRun::Recovering(_)));
        assert!(journal.is_held(RUN).unwrap());
        drop(entry);
        wait_until(|| matches!(journal.look(RUN), FoundRun::Foreign(READ_ONLY, Some(_))));
        assert!(!journal.is_held(RUN).unwrap());
    }

    #[test]
    fn only_the_names_of_flags_are_kept() {
        let arguments =
            ["-auto-approve", "-var", "secret=hunter2", "-var=x=hunter3", "--target=a", "-hunter4", "-lock-timeout=0s"];
        let names = flag_names(arguments.iter().map(OsStr::new));
        assert_eq!(names, ["-auto-approve", "-var", "-var", "-target", "-lock-timeout"]);
    }

    #[test]
    fn a_record_with_any_change_is_rejected_or_is_read_back() {
        let (_root, journal) = journal();
        let mut whole = record(&journal);
        whole.tree.survivors = vec![(7, 815)];
        whole.chdir = Some("a b".to_owned());
        let text = serde_json::to_vec(&whole).unwrap();
        crate::generated_input::for_all(file!(), &crate::generated_input::changed(text), |text| {
            crate::generated_input::is_read_back::<JournalRecord>(&text)
        });
    }
}
