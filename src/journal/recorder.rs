//! The recorder: the file into which terraform writes its core log, and what has been read out of it.
//!
//! Terraform logs its lock's ID before it asks for the lock. So `tf` gives it `TF_LOG_CORE=INFO` and a private
//! `TF_LOG_PATH`; or the level at which the program that it is tells of locks ([`crate::journal::known_programs`]). Where the user has set a
//! variable of that family, all of theirs keep their effect, and the second, undocumented sink is used instead:
//! `TF_TEMP_LOG_PATH` (internal/logging/logging.go, `RegisterSink`), which is always at TRACE, so it is read as it grows, and
//! forgotten behind the reader.
//!
//! A terraform that cannot open `TF_LOG_PATH` writes its whole log, with the values of `-var` in clear, to the user's stderr
//! (internal/logging/logging.go, `newHCLogger`). Of a `TF_TEMP_LOG_PATH` that it cannot open it tells nobody (main.go). So a
//! program that may run terraform as another user (a script with sudo, a setuid terraform) gets the second sink, and
//! /dev/null for the first.
//!
//! The log holds `-var` and `-backend-config` in clear (`CLI args:`). It lies in memory and goes away with us; and what is kept
//! of those records is overwritten as soon as they are read ([`redaction`]), some 20 ms after terraform wrote them, so that they
//! are not in what is left when everything is killed.
//!
//! It has a name, for two reasons. What terraform starts may close every descriptor that it does not know (sudo, Python's
//! `subprocess`), and could not open a file without a name then: it would write its log to the user's stderr. And a lock that
//! was asked for in the last 20 ms of a run of which everything was killed stands nowhere else.

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

/// Every variable by which a user sends terraform's log somewhere (internal/logging/logging.go, v1.15.9).
const LOG_VARIABLES: [&str; 6] =
    ["TF_LOG", "TF_LOG_CORE", "TF_LOG_PATH", "TF_LOG_PROVIDER", "TF_LOG_CLOUD", "TF_LOG_STACKS"];

/// What was read is forgotten once there is so much of it: less would cost more than it frees.
const FORGET_FROM_BYTES: u64 = 1 << 16;

/// Where a log goes that nobody reads.
const NOWHERE: &str = "/dev/null";

/// Names our recorder, so that a `tf` below us does not take our setting for its user's.
const RECORDER: &str = "TFW_RECORDER";

/// What the environment of terraform gets: a value, or nothing any more.
pub(crate) type EnvironmentChange = (&'static str, Option<OsString>);

/// How terraform is made to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sink {
    /// `TF_LOG_CORE` at this level, and `TF_LOG_PATH`: a few kilobytes at INFO.
    Core(&'static str),
    /// `TF_TEMP_LOG_PATH`, at TRACE: megabytes.
    Temporary,
    /// The same; and `TF_LOG_CORE` at this level into /dev/null, which anybody can open. Terraform up to 1.5 logs its
    /// requests only where that level says so, in whichever sink.
    ///
    /// The price of TRACE is small. A plan of 800 resources takes 5.7 s with either sink or with none; its log is 40 MB, which
    /// `tf` reads and frees as it grows.
    GuardianView(&'static str),
}

/// The recorder of one run.
#[derive(Debug)]
pub(crate) struct Recorder {
    file: MemoryFile,
    sink: Sink,
    /// Terraform is known to be able to write into it.
    opens: bool,
    /// Variables that an outer `tf` has set for its own recorder.
    inherited: Vec<&'static str>,
    offset: u64,
    log: Log,
    arguments: Arguments,
}

/// The line that is being read, as long as it may be one with arguments.
#[derive(Debug, Default)]
struct Arguments {
    line: Vec<u8>,
    /// Where it begins.
    at: u64,
    /// It is another one, and its end is still to come.
    is_other: bool,
}

impl Arguments {
    /// No command line is longer (execve(2): a quarter of the stack, 6 MiB at most), and Go's escapes make it longer.
    const MAX_LOG_BYTES: usize = 32 << 20;

    /// Takes the bytes of `file` that begin at `at`, and overwrites the values of arguments in the lines that end in them.
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
    /// Makes the recorder of run `id`, for a log at `level`. `opens`: the program can open a file of this user's.
    /// `variable` reads the environment.
    ///
    /// # Errors
    /// Where no file can be had in memory.
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

    /// The recorder that run `id` has left behind, to be read on from where `log` ends.
    pub(crate) fn find(id: &str, log: Log, offset: u64) -> Option<Self> {
        let file = MemoryFile::find(&name(id))?;
        // As long as nothing was forgotten, the file itself says it all, and no second account of it need be believed.
        let (log, offset) = if offset > FORGET_FROM_BYTES { (log, offset) } else { (Log::default(), 0) };
        let (sink, inherited, arguments) = (Sink::Core("INFO"), Vec::new(), Arguments::default());
        Some(Self { file, sink, opens: false, inherited, offset, log, arguments })
    }

    /// Takes away what run `id` has left behind.
    pub(crate) fn clear_away(id: &str) {
        drop(MemoryFile::find(&name(id)));
    }

    /// What terraform's environment must say.
    pub(crate) fn changes(&self) -> Vec<EnvironmentChange> {
        let path = || Some(self.path().as_os_str().to_owned());
        let mut changes = vec![(RECORDER, path())];
        match self.sink {
            Sink::Core(level) => changes.extend([("TF_LOG_CORE", Some(level.into())), ("TF_LOG_PATH", path())]),
            Sink::Temporary => changes.push(("TF_TEMP_LOG_PATH", path())),
            Sink::GuardianView(level) => changes.extend([
                ("TF_LOG_CORE", Some(level.into())),
                ("TF_LOG_PATH", Some(NOWHERE.into())),
                ("TF_TEMP_LOG_PATH", path()),
            ]),
        }
        // What the outer tf has set is not the user's: with it in place, the user's own would not have its whole effect, and
        // the outer recorder would get this run's locks.
        for name in &self.inherited {
            if !changes.iter().any(|(changed, _)| changed == name) {
                changes.push((name, None));
            }
        }
        changes
    }

    /// Whether terraform has written nothing into it, and may have been unable to. One that can write and has not has asked
    /// for no lock: its first record comes before that.
    pub(crate) fn is_closed(&self) -> bool {
        !self.opens && self.offset == 0 && self.file.file.metadata().is_ok_and(|file| file.len() == 0)
    }

    /// Where terraform finds it.
    pub(crate) fn path(&self) -> &Path {
        &self.file.path
    }

    /// How long after one look the next follows, when terraform has run for `age`: its log is read as it grows, so that the
    /// journal knows of a lock almost as soon as it is asked for, and so that a TRACE log, or what a nested terraform with
    /// a `TF_LOG` of its own writes, does not fill the memory. A look is one fstat(2).
    ///
    /// Not inotify(7): closing one waits for the kernel to clear its marks away, up to 15 ms, when terraform has ended and
    /// everybody waits for us.
    pub(crate) fn interval(&self, age: Duration) -> Duration {
        /// Within that time most runs have asked for their lock.
        const NEW_LOG_WINDOW: Duration = Duration::from_secs(3);
        match self.sink {
            _ if age < NEW_LOG_WINDOW => Duration::from_millis(20),
            Sink::Core("INFO") => Duration::from_millis(250),
            Sink::Core(_) | Sink::Temporary | Sink::GuardianView(_) => Duration::from_millis(100),
        }
    }

    /// The descriptor that a process forked from this one must keep in order to read on.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.file.as_fd()
    }

    /// Where whoever goes on with what is kept of the log must begin to read.
    pub(crate) fn whole_until(&self) -> u64 {
        self.offset - self.log.unfinished()
    }

    /// What has been read so far.
    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Goes on from where another reader of the same file has come to.
    pub(crate) fn resume(&mut self, log: Log, offset: u64) {
        (self.log, self.offset) = (log, offset);
    }

    /// Gives back the memory of what was read. Not before somebody else knows what it said, who might have to go on.
    pub(crate) fn forget(&self) {
        let until = self.whole_until();
        if until > FORGET_FROM_BYTES {
            self.file.forget_before(until);
        }
    }

    /// Goes away without taking the file along.
    pub(crate) fn leave(self) {
        self.file.leave();
    }

    /// Takes the file away, for a process that ends without dropping anything.
    pub(crate) fn remove(&self) {
        self.file.remove();
    }

    /// Reads what has come since the last time, and returns everything that is known.
    pub(crate) fn read(&mut self) -> &Log {
        match self.file.file.metadata().map(|file| file.len().cmp(&self.offset)) {
            Ok(Ordering::Equal) => return &self.log,
            // Somebody has cut it: what was written since then is not whole.
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

/// The name of the file of run `id`.
fn name(id: &str) -> String {
    format!("tf-{id}.log")
}

fn choose(level: &'static str, opens: bool, variable: impl Fn(&str) -> Option<OsString>) -> Sink {
    let set = |name: &&str| variable(name).is_some_and(|value| value.as_os_str() != OsStr::new(""));
    match (LOG_VARIABLES.iter().any(set), opens) {
        (true, _) => Sink::Temporary,
        (false, true) => Sink::Core(level),
        (false, false) => Sink::GuardianView(level),
    }
}

/// The variables that an outer `tf` has set, by the recorder that they name.
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

    /// What becomes of a variable: nothing, or a change.
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
        // The user's own variables keep their effect all the same.
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
        // The user's own temporary sink is not an outer tf's.
        assert!(value(&open(&[("TF_TEMP_LOG_PATH", "/var/log/own")]), "TF_TEMP_LOG_PATH").is_empty());
    }

    /// However terraform's writes are cut, and whoever reads on.
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
            assert_eq!(recorder.read().locks.len(), 1, "cut at {cut}");
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
            assert_eq!(recorder.read().locks.len(), usize::try_from(round).unwrap() + 1);
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
