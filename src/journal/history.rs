//! The history of locks, for people. Each release, forced release, refused release and replacement of a lock is one
//! line of JSON in `history.jsonl` in the state directory, and is passed to the command in `TFW_ON_EVENT`.
//!
//! The history never prevents a release: if a line cannot be written, the lock is released nevertheless.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::journal::event_command;
use crate::journal::state_directory::{StateDirectory, open_private};
use crate::json;
use crate::sys::file_id::FileId;
use crate::sys::lock_file;
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::RecordedLock;
use crate::trace::trace;

/// The name of the history file in the state directory.
const FILE: &str = "history.jsonl";

/// The maximum size of a history file: 1 MiB. If the next line would make the file larger, the file is first renamed to
/// an older file ([`older`]).
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The number of older history files that are kept.
const MAX_FILES: usize = 4;

/// The maximum length of a text in an event, in UTF-16 code units: 1024. The limit is necessary because the texts come
/// from a lock, and other users can write a lock with texts of any length. JSON escapes a code unit with at most 6
/// bytes (RFC 8259, section 7), so the 8 texts of an event need at most 48 KiB, and its line is shorter than
/// [`event_command::MAX_LINE_BYTES`].
const MAX_TEXT_UNITS: usize = 1024;

/// What happened to a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum What {
    /// The lock was released. Its holder was dead, or was likely dead and a person agreed to the release.
    Released,
    /// A person forced the delete. The holder was alive, it was unknown whether the holder was alive, or the stored
    /// text could not be parsed as a lock.
    Forced,
    /// A release was requested and refused. The lock is still held.
    Refused,
    /// Another run locked the state while the run that held this lock was working.
    Replaced,
    /// The lease of the lock had lapsed, so this host took the lock from its holder and released it.
    #[serde(rename = "taken over")]
    TakenOver,
}

/// The process that caused an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum By {
    /// The `tf` that started the terraform which acquired the lock.
    Tf,
    /// The guardian of that `tf`, after `tf` was killed.
    Guardian,
    /// A later `tf`, or `tf locks recover`. For [`What::TakenOver`], a `tf` on any host whose terraform needs the lock.
    Recovery,
    /// A person, with `tf locks release`.
    Command,
}

/// One line of the history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LockEvent {
    pub(crate) time: Timestamp,
    #[serde(rename = "event")]
    pub(crate) what: What,
    pub(crate) by: By,
    /// `user@host` of the process that caused the event.
    pub(crate) who: String,
    /// The pid of the process that caused the event.
    pub(crate) pid: u32,
    /// The ID of the lock.
    pub(crate) id: String,
    /// For a lock in S3 or DynamoDB, `bucket/key` of the state. For a lock in another backend, the `Path` field of the
    /// lock.
    pub(crate) path: String,
    /// The `Operation` field of the lock.
    pub(crate) operation: String,
    /// `user@host` of the holder.
    pub(crate) holder: String,
    /// For a lock that was read from its location: the `Created` field, a time by the holder's clock. For a lock from a
    /// log: the time at which terraform acquired the lock, or `None` if the log does not contain that time.
    pub(crate) created: Option<String>,
    /// What was known about the holder. For [`What::Replaced`]: which run has locked the state instead.
    pub(crate) why: String,
    /// The reason that a person gave. `None` if no person gave one.
    pub(crate) reason: Option<String>,
}

impl LockEvent {
    /// Returns the event `what` for a lock that a log recorded.
    pub(crate) fn of_recorded(what: What, by: By, lock: &RecordedLock, why: &str, reason: Option<&str>) -> Self {
        Self {
            id: cut(&lock.id),
            path: cut(&lock.path),
            operation: cut(&lock.operation),
            holder: cut(&lock.who),
            created: lock.progress.held.map(|at| at.to_string()),
            why: cut(why),
            reason: reason.map(cut),
            ..Self::now(what, by)
        }
    }

    /// Returns the event `what` for a lock that was read from its location. For `path`, see [`LockEvent::path`].
    pub(crate) fn of_lock(what: What, by: By, lock: &LockInfo, path: &str, why: &str, reason: Option<&str>) -> Self {
        Self {
            id: cut(&lock.id),
            path: cut(path),
            operation: cut(&lock.operation),
            holder: cut(&lock.who),
            created: Some(cut(&lock.created)),
            why: cut(why),
            reason: reason.map(cut),
            ..Self::now(what, by)
        }
    }

    /// Returns an event with the current time, and with the user, the host and the pid of this process. The caller sets
    /// the fields about the lock.
    fn now(what: What, by: By) -> Self {
        Self {
            time: Timestamp::now(),
            what,
            by,
            who: cut(&crate::terraform::lock_info::who()),
            pid: std::process::id(),
            id: String::new(),
            path: String::new(),
            operation: String::new(),
            holder: String::new(),
            created: None,
            why: String::new(),
            reason: None,
        }
    }
}

/// Truncates a text to [`MAX_TEXT_UNITS`], to limit the length of a line of the history. No character is split.
fn cut(text: &str) -> String {
    let mut units = 0;
    let fits = |character: &char| {
        units += character.len_utf16();
        units <= MAX_TEXT_UNITS
    };
    text.chars().take_while(fits).collect()
}

/// Appends an event to the history and starts the command in `TFW_ON_EVENT`. An error is only traced, because the
/// release matters more.
pub(crate) fn record(event: &LockEvent) {
    let Ok(mut line) = json::to_string(event) else { return };
    line.push('\n');
    let written =
        StateDirectory::open(|name| std::env::var_os(name)).and_then(|state| append(&state.join(FILE), &line));
    if let Err(error) = written {
        trace!("no history: {error}");
    }
    event_command::start(&line);
}

/// Returns every event in the history, the oldest first, and the number of lines that cannot be parsed. A file that
/// cannot be read is skipped.
pub(crate) fn read() -> (Vec<LockEvent>, usize) {
    let mut events = Vec::new();
    let mut torn = 0;
    for state in StateDirectory::existing() {
        let path = state.join(FILE);
        // Another process may rename the files now, each to the next higher number. In this order, no file is missed,
        // and one that is found twice is read once.
        let mut files: Vec<(FileId, File)> = Vec::new();
        for path in std::iter::once(path.clone()).chain((1..=MAX_FILES).map(|number| older(&path, number))) {
            let file = open_private(OpenOptions::new().read(true), &path);
            let Some((id, file)) = file.ok().and_then(|file| Some((FileId::of_open(file.as_fd())?, file))) else {
                continue;
            };
            if files.iter().all(|(known, _)| *known != id) {
                files.push((id, file));
            }
        }
        for (_, file) in files.into_iter().rev() {
            let mut text = Vec::new();
            // `tf` never writes a history file of more than twice the maximum size. If a file is longer, `tf` did not
            // write it, and the rest of the file is not read.
            if file.take(2 * MAX_FILE_BYTES).read_to_end(&mut text).is_err() {
                continue;
            }
            for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
                match serde_json::from_slice(line) {
                    Ok(event) => events.push(event),
                    Err(_) => torn += 1,
                }
            }
        }
    }
    events.sort_by_key(|event: &LockEvent| event.time);
    (events, torn)
}

/// Appends a line in one write, so that the lines of two processes do not mix. A file that would exceed
/// [`MAX_FILE_BYTES`] is renamed first. If the file ends with a part of a line, because the disk was full, that part is
/// ended first, so that it does not make this line unreadable.
fn append(path: &Path, line: &str) -> io::Result<()> {
    let lock = open_private(
        OpenOptions::new().create(true).truncate(false).write(true).mode(0o600),
        &path.with_extension("lock"),
    )?;
    // A process that holds this lock only renames a few files and appends a line. If another process holds the lock for
    // more than 200 ms, this process appends its line without the lock, and renames no file.
    let mut alone = false;
    for _ in 0..20 {
        alone = lock_file::try_lock(&lock, 0).unwrap_or(false);
        if alone {
            break;
        }
        crate::sys::poll::wait(&[], Some(Duration::from_millis(10)));
    }
    // The 1 is for the end of a part of a line.
    if alone && fs::metadata(path).is_ok_and(|file| file.len() + 1 + line.len() as u64 > MAX_FILE_BYTES) {
        for number in (1..MAX_FILES).rev() {
            let _ = fs::rename(older(path, number), older(path, number + 1));
        }
        fs::rename(path, older(path, 1))?;
    }
    let mut file = open_private(OpenOptions::new().create(true).read(true).append(true).mode(0o600), path)?;
    let end = if ends_within_line(&file)? { "\n" } else { "" };
    file.write_all(format!("{end}{line}").as_bytes())
}

/// Whether the file ends with a part of a line. False if the file is empty.
///
/// # Errors
/// Fails if the end of the file cannot be read.
fn ends_within_line(file: &File) -> io::Result<bool> {
    let Some(last) = file.metadata()?.len().checked_sub(1) else { return Ok(false) };
    let mut byte = [b'\n'];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte != [b'\n'])
}

/// Returns the path of the older history file `number`. Number 1 is the newest of these files.
fn older(path: &Path, number: usize) -> PathBuf {
    path.with_extension(format!("jsonl.{number}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_full_history_becomes_an_older_one_and_the_oldest_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        let line = format!("{}\n", "x".repeat(1 << 19));
        for _ in 0..20 {
            append(&path, &line).unwrap();
        }
        let mut names: Vec<_> =
            fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let expected = ["history.jsonl", "history.jsonl.1", "history.jsonl.2", "history.jsonl.3", "history.jsonl.4"];
        assert_eq!(names[..5], expected);
        assert_eq!(names[5..], ["history.lock"]);
        for name in names {
            let file = fs::metadata(directory.path().join(name)).unwrap();
            assert!(file.len() <= MAX_FILE_BYTES && file.mode() & 0o777 == 0o600);
        }
    }

    /// On a full disk, a write may store a part of its line.
    #[test]
    fn a_line_after_a_part_of_a_line_can_be_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        append(&path, "1\n").unwrap();
        fs::write(&path, "1\n{\"time\":\"2026-").unwrap();
        for line in ["2\n", "3\n"] {
            append(&path, line).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n{\"time\":\"2026-\n2\n3\n");
    }

    #[test]
    fn a_strangers_text_is_cut_and_kept_on_one_line() {
        let lock = LockInfo {
            id: "x\ny".into(),
            who: "w".repeat(300_000),
            operation: "\u{202e}".into(),
            version: String::new(),
            created: "now".into(),
            path: "p".into(),
        };
        let event = LockEvent::of_lock(What::Refused, By::Command, &lock, "p", "because", None);
        let line = json::to_string(&event).unwrap();
        assert!(line.len() < 3000 && line.is_ascii() && !line.contains('\n'), "{line}");
        assert_eq!(serde_json::from_str::<LockEvent>(&line).unwrap(), event);
    }

    #[test]
    fn the_longest_line_reaches_the_command_whole() {
        for character in ["\u{1}", "\u{7f}", "\u{ffff}", "🔒", "\"", "w"] {
            let text = character.repeat(2 * MAX_TEXT_UNITS);
            let lock = LockInfo {
                id: text.clone(),
                who: text.clone(),
                operation: text.clone(),
                version: text.clone(),
                created: text.clone(),
                path: text.clone(),
            };
            let event = LockEvent {
                who: cut(&text),
                pid: u32::MAX,
                ..LockEvent::of_lock(What::TakenOver, By::Recovery, &lock, &text, &text, Some(&text))
            };
            let line = json::to_string(&event).unwrap() + "\n";
            assert!(line.len() as u64 <= event_command::MAX_LINE_BYTES, "{character:?}: {}", line.len());
            assert_eq!(serde_json::from_str::<LockEvent>(&line).unwrap(), event);
            assert_eq!(event.id.encode_utf16().count(), MAX_TEXT_UNITS);
        }
        assert_eq!(cut(&format!("{}🔒", "w".repeat(MAX_TEXT_UNITS - 1))).len(), MAX_TEXT_UNITS - 1);
    }

    #[test]
    fn a_line_with_any_change_is_rejected_or_is_read_back() {
        let event = LockEvent::of_lock(What::Forced, By::Command, &LockInfo::default(), "b/k", "why", Some("reason"));
        let text = serde_json::to_vec(&event).unwrap();
        crate::generated_input::for_all(file!(), &crate::generated_input::changed(text), |text| {
            crate::generated_input::is_read_back::<LockEvent>(&text)
        });
    }
}
