//! The recorder: the file that terraform writes its core log to, and the facts that `tf` has read from it.
//!
//! Terraform logs the ID of its lock before it requests the lock. `tf` therefore sets `TF_LOG_PATH` to a private file,
//! and `TF_LOG_CORE` to `INFO` or to the level at which the program logs its locks
//! ([`crate::journal::known_programs`]). If the user has set any of [`LOG_VARIABLES`], `tf` changes none of these
//! variables, and uses terraform's second, undocumented sink instead: `TF_TEMP_LOG_PATH` (internal/logging/logging.go,
//! `RegisterSink`). That sink always logs at TRACE, so `tf` reads the file while the file grows, and frees the memory
//! of the part that was read.
//!
//! If terraform cannot open `TF_LOG_PATH`, it writes its whole log, including the values of `-var` in plain text, to
//! the user's stderr (internal/logging/logging.go, `newHCLogger`). If terraform cannot open `TF_TEMP_LOG_PATH`, it
//! continues without that log and reports nothing (main.go). A program that may run terraform as another user (a script
//! with sudo, a setuid terraform) therefore gets the second sink, and `/dev/null` as the first.
//!
//! The log contains the values of `-var` and `-backend-config` in plain text (`CLI args:`). On Linux the file is in
//! memory, and it is deleted at the end of the run. If every process is killed, the file remains. So `tf` also
//! overwrites the argument values as soon as it reads them ([`redaction`]), about 20 ms after terraform wrote them.
//!
//! The file has a name, for two reasons. The first reason: a program in terraform's tree may close every descriptor
//! that it does not know (sudo, Python's `subprocess`). Terraform could then not open a file without a name, and would
//! write its log to the user's stderr. The second reason: if every process of a run is killed, this file is the only
//! record of a lock that was requested in the last 20 ms. A later `tf` opens the file by name ([`Recorder::find`]).

use std::cmp::Ordering;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::sys::memory::MemoryFile;
use crate::terraform::log::Log;
use crate::terraform::redaction;

/// The variables with which a user configures terraform's log (internal/logging/logging.go, v1.15.9).
const LOG_VARIABLES: [&str; 6] =
    ["TF_LOG", "TF_LOG_CORE", "TF_LOG_PATH", "TF_LOG_PROVIDER", "TF_LOG_CLOUD", "TF_LOG_STACKS"];

/// Memory is freed only if more than this number of bytes of the log have been read. Freeing less memory costs more
/// than it gains.
const FORGET_FROM_BYTES: u64 = 1 << 16;

/// The path of a device that discards the log.
const NOWHERE: &str = "/dev/null";

/// The variable with the path of a run's recorder. A nested `tf` uses it to distinguish the settings of the outer `tf`
/// from those of the user.
const RECORDER: &str = "TFW_RECORDER";

/// A change to terraform's environment: the name of a variable and its new value, or `None` to unset it.
pub(crate) type EnvironmentChange = (&'static str, Option<OsString>);

/// How terraform's log is redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sink {
    /// Sets `TF_LOG_CORE` to this level, and `TF_LOG_PATH` to the recorder. At INFO the log is a few kilobytes.
    Core(&'static str),
    /// Sets `TF_TEMP_LOG_PATH` to the recorder. The log is at TRACE and several megabytes long.
    Temporary,
    /// Does the same as [`Sink::Temporary`], and also sets `TF_LOG_CORE` to this level and `TF_LOG_PATH` to
    /// `/dev/null`, which every user can open. Terraform up to 1.5 logs its requests, in either sink, only if
    /// `TF_LOG_CORE` has a level that includes them.
    ///
    /// TRACE costs little time. A plan of 800 resources takes 5.7 s with either sink, and also without a log. Its TRACE
    /// log is 40 MB long. `tf` reads the log and frees its memory while it grows.
    Beside(&'static str),
}

/// The recorder of one run.
#[derive(Debug)]
pub(crate) struct Recorder {
    file: MemoryFile,
    sink: Sink,
    /// Whether terraform is known to be able to open the file.
    opens: bool,
    /// The variables that an outer `tf` has set for its own recorder.
    inherited: Vec<&'static str>,
    /// The number of bytes read so far.
    offset: u64,
    log: Log,
    arguments: Arguments,
}

/// The line that is being read. It is kept as long as it may be a record with command-line arguments, because the
/// values of such arguments must be overwritten.
#[derive(Debug, Default)]
struct Arguments {
    line: Vec<u8>,
    /// The offset of the line in the file, in bytes.
    at: u64,
    /// Whether the rest of the line is skipped, because the line has no command-line arguments or is too long.
    is_other: bool,
}

impl Arguments {
    /// The maximum length of a line that is kept, in bytes. A command line has at most 6 MiB (execve(2): a quarter of
    /// the stack limit, and at most 6 MiB), and Go's escapes make it longer.
    const MAX_LOG_BYTES: usize = 32 << 20;

    /// Parses `bytes`, which were read from `file` at the offset `at`. Overwrites in `file` the argument values of
    /// every line that ends within `bytes`.
    fn overwrite(&mut self, file: &std::fs::File, bytes: &[u8], at: u64) {
        let mut at = at;
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let is_end = piece.ends_with(b"\n");
            if self.line.is_empty() {
                self.at = at;
            }
            at += piece.len() as u64;
            if !self.is_other {
                self.line.extend_from_slice(piece);
                self.is_other = !redaction::may_have_arguments(&self.line) || self.line.len() > Self::MAX_LOG_BYTES;
            }
            if is_end && !self.is_other {
                for value in redaction::values(&self.line) {
                    let stars = vec![b'*'; value.len()];
                    let _ = file.write_all_at(&stars, self.at + value.start as u64);
                }
            }
            if is_end || self.is_other {
                self.line.clear();
            }
            self.is_other &= !is_end;
        }
    }
}

impl Recorder {
    /// Creates the recorder of run `id`, for a log at `level`. `opens` is true if the program is known to be able to
    /// open a file that only this user can open. `variable` returns the value of an environment variable.
    ///
    /// # Errors
    /// Fails if [`MemoryFile::create`] cannot create the file.
    pub(crate) fn open(
        id: &str,
        level: &'static str,
        opens: bool,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> io::Result<Self> {
        let inherited = inherited(&variable);
        let sink = choose(level, opens, |name| variable(name).filter(|_| !inherited.contains(&name)));
        let file = MemoryFile::create(&name(id))?;
        Ok(Self { file, sink, opens, inherited, offset: 0, log: Log::default(), arguments: Arguments::default() })
    }

    /// Opens the recorder that run `id` has left. `log` has the facts that were read from the first `offset` bytes.
    /// Reading continues at `offset`, or starts from the beginning if the file still has the whole log. `None` if there
    /// is no such file.
    pub(crate) fn find(id: &str, log: Log, offset: u64) -> Option<Self> {
        let file = MemoryFile::find(&name(id))?;
        // If nothing was freed, the file still has the whole log. Reading the file again is safer than trusting `log`.
        let (log, offset) = if offset > FORGET_FROM_BYTES { (log, offset) } else { (Log::default(), 0) };
        let (sink, inherited, arguments) = (Sink::Core("INFO"), Vec::new(), Arguments::default());
        Some(Self { file, sink, opens: false, inherited, offset, log, arguments })
    }

    /// Deletes the recorder that run `id` has left, if there is one.
    pub(crate) fn clear_away(id: &str) {
        drop(MemoryFile::find(&name(id)));
    }

    /// Returns the changes to terraform's environment.
    pub(crate) fn changes(&self) -> Vec<EnvironmentChange> {
        let path = || Some(self.path().as_os_str().to_owned());
        let mut changes = vec![(RECORDER, path())];
        match self.sink {
            Sink::Core(level) => changes.extend([("TF_LOG_CORE", Some(level.into())), ("TF_LOG_PATH", path())]),
            Sink::Temporary => changes.push(("TF_TEMP_LOG_PATH", path())),
            Sink::Beside(level) => changes.extend([
                ("TF_LOG_CORE", Some(level.into())),
                ("TF_LOG_PATH", Some(NOWHERE.into())),
                ("TF_TEMP_LOG_PATH", path()),
            ]),
        }
        // Unset the variables that an outer `tf` has set. Otherwise the user's own variables would not have their full
        // effect, and the outer recorder would record the locks of this run.
        for name in &self.inherited {
            if !changes.iter().any(|(changed, _)| changed == name) {
                changes.push((name, None));
            }
        }
        changes
    }

    /// Whether the file is empty and terraform may have been unable to open it. If true, terraform may have requested a
    /// lock without a log record. If terraform could open the file, an empty file shows that no lock was requested,
    /// because terraform writes its first log record before it requests a lock.
    pub(crate) fn is_closed(&self) -> bool {
        !self.opens && self.offset == 0 && self.file.file.metadata().is_ok_and(|file| file.len() == 0)
    }

    /// The path at which terraform opens the file.
    pub(crate) fn path(&self) -> &Path {
        &self.file.path
    }

    /// Returns how long to wait between two calls of [`Recorder::read`] when terraform has run for `age`. The log is
    /// read while it grows, for two reasons. The journal must record a lock almost as soon as terraform requests it.
    /// And a long log must not fill the memory: a log at TRACE, or the log of a nested terraform for which `TF_LOG` is
    /// set. A call that finds nothing new costs one fstat(2).
    ///
    /// inotify(7) is not used: closing its descriptor waits up to 15 ms until the kernel has removed the marks, at a
    /// moment when terraform has exited and the caller waits for `tf`.
    pub(crate) fn interval(&self, age: Duration) -> Duration {
        /// Most runs have requested their lock within this time.
        const NEW_LOG_WINDOW: Duration = Duration::from_secs(3);
        match self.sink {
            _ if age < NEW_LOG_WINDOW => Duration::from_millis(20),
            Sink::Core("INFO") => Duration::from_millis(250),
            Sink::Core(_) | Sink::Temporary | Sink::Beside(_) => Duration::from_millis(100),
        }
    }

    /// The descriptor of the file. A process that is forked from this process, and that will continue reading, must
    /// keep it open.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.file.as_fd()
    }

    /// Returns the offset, in bytes, at which a reader that continues with [`Recorder::log`] must begin: the start of
    /// the first line or record that has not been read to its end.
    pub(crate) fn whole_until(&self) -> u64 {
        self.offset - self.log.unfinished()
    }

    /// The facts that have been read from the log so far.
    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Continues where another reader of the same file stopped. `log` has the facts that the other reader has read.
    /// `offset` is the position of the other reader in the file, in bytes.
    pub(crate) fn resume(&mut self, log: Log, offset: u64) {
        (self.log, self.offset) = (log, offset);
    }

    /// Frees the memory of the part of the log that was read. Call this only after the facts in that part were written
    /// to the journal, or if there is no journal.
    pub(crate) fn forget(&self) {
        let until = self.whole_until();
        if until > FORGET_FROM_BYTES {
            self.file.forget_before(until);
        }
    }

    /// Closes the recorder without deleting the file.
    pub(crate) fn leave(self) {
        self.file.leave();
    }

    /// Deletes the file, for a process that exits without dropping its values.
    pub(crate) fn remove(&self) {
        self.file.remove();
    }

    /// Reads the part of the log that was written since the last call. Returns all facts that have been read so far.
    pub(crate) fn read(&mut self) -> &Log {
        match self.file.file.metadata().map(|file| file.len().cmp(&self.offset)) {
            Ok(Ordering::Equal) => return &self.log,
            // The file was truncated, so the log is incomplete. A log without a program counts as incomplete.
            Ok(Ordering::Less) => self.log.program = None,
            _ => {}
        }
        let mut buffer = vec![0; 1 << 16];
        while let Ok(length @ 1..) = self.file.file.read_at(&mut buffer, self.offset) {
            self.log.read(&buffer[..length]);
            self.arguments.overwrite(&self.file.file, &buffer[..length], self.offset);
            self.offset += length as u64;
        }
        &self.log
    }
}

/// Returns the name of the recorder's file of run `id`.
fn name(id: &str) -> String {
    format!("tf-{id}.log")
}

/// Chooses the sink. `variable` returns the value of an environment variable, or `None` if an outer `tf` has set the
/// variable.
fn choose(level: &'static str, opens: bool, variable: impl Fn(&str) -> Option<OsString>) -> Sink {
    let set = |name: &&str| variable(name).is_some_and(|value| value.as_os_str() != OsStr::new(""));
    match (LOG_VARIABLES.iter().any(set), opens) {
        (true, _) => Sink::Temporary,
        (false, true) => Sink::Core(level),
        (false, false) => Sink::Beside(level),
    }
}

/// Returns the variables that an outer `tf` has set for its own recorder. They are recognised by the path of that
/// recorder: it is the value of [`RECORDER`], and also of `TF_LOG_PATH` or `TF_TEMP_LOG_PATH`.
fn inherited(variable: &impl Fn(&str) -> Option<OsString>) -> Vec<&'static str> {
    let Some(outer) = variable(RECORDER) else { return Vec::new() };
    let is = |name: &str, value: &OsStr| variable(name).is_some_and(|set| set == value);
    let temporary = is("TF_TEMP_LOG_PATH", &outer);
    let core = is("TF_LOG_PATH", &outer) || (temporary && is("TF_LOG_PATH", OsStr::new(NOWHERE)));
    let mut names = Vec::new();
    names.extend(core.then_some(["TF_LOG_CORE", "TF_LOG_PATH"]).into_iter().flatten());
    names.extend(temporary.then_some("TF_TEMP_LOG_PATH"));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(set: &[(&str, &str)]) -> Recorder {
        open_for(true, set)
    }

    fn open_for(opens: bool, set: &[(&str, &str)]) -> Recorder {
        let set: Vec<_> = set.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
        let id = format!("test-{}-{:?}", std::process::id(), std::thread::current().id());
        Recorder::open(&id, "INFO", opens, |name| {
            set.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
        })
        .unwrap()
    }

    /// Returns the changes to the variable `name`: at most one.
    fn value(recorder: &Recorder, name: &str) -> Vec<Option<OsString>> {
        recorder.changes().into_iter().filter(|(changed, _)| *changed == name).map(|(_, value)| value).collect()
    }

    #[test]
    fn without_a_variable_of_the_users_the_core_log_is_ours() {
        for set in [&[][..], &[("TF_LOG", ""), ("TF_LOG_PATH", "")]] {
            let recorder = open(set);
            assert_eq!(value(&recorder, "TF_LOG_CORE"), [Some("INFO".into())]);
            assert_eq!(value(&recorder, "TF_LOG_PATH"), [Some(recorder.path().into())]);
            assert!(value(&recorder, "TF_TEMP_LOG_PATH").is_empty());
        }
    }

    #[test]
    fn each_variable_of_the_users_keeps_its_effect() {
        for name in LOG_VARIABLES {
            let recorder = open(&[(name, "DEBUG")]);
            assert!(recorder.changes().iter().all(|(changed, _)| !LOG_VARIABLES.contains(changed)), "{name}");
            assert_eq!(value(&recorder, "TF_TEMP_LOG_PATH").len(), 1, "{name}");
        }
    }

    #[test]
    fn the_recorder_of_a_tf_above_us_is_not_the_users() {
        let above = [("TFW_RECORDER", "/dev/shm/o"), ("TF_LOG_CORE", "INFO"), ("TF_LOG_PATH", "/dev/shm/o")];
        assert_eq!(value(&open(&above), "TF_LOG_CORE"), [Some("INFO".into())]);
        let with_own = [&above[..], &[("TF_LOG", "DEBUG")]].concat();
        let recorder = open(&with_own);
        assert_eq!(value(&recorder, "TF_LOG_CORE"), [None]);
        assert_eq!(value(&recorder, "TF_LOG_PATH"), [None]);
        assert_eq!(recorder.sink, Sink::Temporary);
    }

    #[test]
    fn a_program_that_may_not_open_our_file_is_never_told_to_log_there_itself() {
        let recorder = open_for(false, &[]);
        assert_eq!(value(&recorder, "TF_LOG_CORE"), [Some("INFO".into())]);
        assert_eq!(value(&recorder, "TF_LOG_PATH"), [Some("/dev/null".into())]);
        assert_eq!(value(&recorder, "TF_TEMP_LOG_PATH"), [Some(recorder.path().into())]);
        // The user's own variables still have their effect.
        let recorder = open_for(false, &[("TF_LOG", "DEBUG")]);
        assert!(recorder.changes().iter().all(|(changed, _)| !LOG_VARIABLES.contains(changed)));
    }

    #[test]
    fn nothing_of_an_outer_recorder_is_left_to_an_inner_run() {
        let above = [
            ("TFW_RECORDER", "/dev/shm/o"),
            ("TF_LOG_CORE", "TRACE"),
            ("TF_LOG_PATH", "/dev/null"),
            ("TF_TEMP_LOG_PATH", "/dev/shm/o"),
        ];
        for opens in [false, true] {
            let recorder = open_for(opens, &above);
            assert_eq!(value(&recorder, "TF_LOG_CORE"), [Some("INFO".into())]);
            for name in ["TF_LOG_PATH", "TF_TEMP_LOG_PATH"] {
                assert_ne!(value(&recorder, name), [Some("/dev/shm/o".into())], "{opens} {name}");
                assert_eq!(value(&recorder, name).len(), 1, "{opens} {name}");
            }
        }
        // A `TF_TEMP_LOG_PATH` that the user has set does not count as the sink of an outer `tf`.
        assert!(value(&open(&[("TF_TEMP_LOG_PATH", "/var/log/own")]), "TF_TEMP_LOG_PATH").is_empty());
    }

    /// Splits the log into two writes at every possible byte.
    #[test]
    fn what_was_read_of_arguments_is_overwritten() {
        use std::io::Write;
        let record = "2026-11-23T01:46:07.529Z [INFO]  CLI args: []string{\"terraform\", \"-var\", \"x=hunter2\"}\n";
        let lock = crate::terraform::log::tests::lock_line(
            7,
            "Attempting to lock remote state (DynamoDB only)...",
            crate::terraform::log::tests::ID,
            "r",
        );
        let text = format!("{record}{lock}{record}");
        for cut in 0..text.len() {
            let mut recorder = open(&[]);
            let mut writer = std::fs::OpenOptions::new().append(true).open(recorder.path()).unwrap();
            writer.write_all(&text.as_bytes()[..cut]).unwrap();
            recorder.read();
            writer.write_all(&text.as_bytes()[cut..]).unwrap();
            assert_eq!(recorder.read().named().count(), 1, "cut at {cut}");
            let kept = std::fs::read_to_string(recorder.path()).unwrap();
            assert!(
                !kept.contains("hunter2") && kept.contains(&lock) && kept.len() == text.len(),
                "cut at {cut}: {kept}"
            );
        }
    }

    #[test]
    fn what_was_read_is_forgotten_and_nothing_is_lost() {
        use std::io::Write;
        use std::os::unix::fs::MetadataExt;
        let mut recorder = open(&[("TF_LOG", "DEBUG")]);
        let mut writer = std::fs::OpenOptions::new().append(true).open(recorder.path()).unwrap();
        for round in 0..50u32 {
            let id = format!("{round:08x}-d70c-4132-39e0-d2abba1b3077");
            let line = crate::terraform::log::tests::lock_line(
                7,
                "Attempting to lock remote state (DynamoDB only)...",
                &id,
                "r",
            );
            writer.write_all(&line.repeat(20).into_bytes()).unwrap();
            assert_eq!(recorder.read().named().count(), usize::try_from(round).unwrap() + 1);
            recorder.forget();
        }
        let file = std::fs::metadata(recorder.path()).unwrap();
        assert!(
            file.len() > 300_000 && file.blocks() * 512 <= 16_384,
            "{} bytes in {} blocks",
            file.len(),
            file.blocks()
        );
    }
}
