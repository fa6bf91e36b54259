//! What was done to locks, for people: every release, forced or refused, is one line of JSON in `history.jsonl` in the
//! state directory, and goes to the command that `TFW_ON_EVENT` names.
//!
//! It is never in the way: what cannot be written is not, and a lock is given back all the same.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::journal::event_command;
use crate::journal::state_directory::{StateDirectory, open_private};
use crate::json;
use crate::sys::lock_file;
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::RecordedLock;
use crate::trace::trace;

/// The file in the state directory.
const FILE: &str = "history.jsonl";

/// From this size on a new one is begun.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// So many full ones are kept.
const MAX_FILES: usize = 4;

/// What a stranger has written is kept up to so many characters of it.
const MAX_TEXT_BYTES: usize = 1024;

/// What happened to a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum What {
    /// It was given back: its holder was dead, or somebody agreed that he was.
    Released,
    /// It was deleted whatever was believed of its holder.
    Forced,
    /// Somebody wanted it released, and it stands.
    Refused,
    /// Another run locked the state while its own run worked.
    Replaced,
}

/// Who did it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum By {
    /// The `tf` whose terraform it was.
    Tf,
    /// Its guardian, after that `tf` was killed.
    Guardian,
    /// A later `tf`, or `tf locks recover`.
    Recovery,
    /// A person, by `tf locks release`.
    Command,
}

/// One line of the history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LockEvent {
    pub(crate) time: Timestamp,
    #[serde(rename = "event")]
    pub(crate) what: What,
    pub(crate) by: By,
    /// The user and host that did it, and the process.
    pub(crate) who: String,
    pub(crate) pid: u32,
    /// The lock: its ID, `bucket/key`, its operation, and who held it since when by his own clock.
    pub(crate) id: String,
    pub(crate) path: String,
    pub(crate) operation: String,
    pub(crate) holder: String,
    pub(crate) created: Option<String>,
    /// What was known of the holder.
    pub(crate) why: String,
    /// What a person gave as the reason.
    pub(crate) reason: Option<String>,
}

impl LockEvent {
    /// A lock that a log told of.
    pub(crate) fn of_recorded(what: What, by: By, lock: &RecordedLock, why: &str, reason: Option<&str>) -> Self {
        let created = lock.locked.map(|at| at.to_string());
        Self::new(what, by, [&lock.id, &lock.path, &lock.operation, &lock.who], created.as_deref(), [Some(why), reason])
    }

    /// A lock that was read where it stands.
    pub(crate) fn of_standing(
        what: What,
        by: By,
        lock: &LockInfo,
        path: &str,
        why: &str,
        reason: Option<&str>,
    ) -> Self {
        Self::new(what, by, [&lock.id, path, &lock.operation, &lock.who], Some(&lock.created), [Some(why), reason])
    }

    fn new(
        what: What,
        by: By,
        [id, path, operation, holder]: [&str; 4],
        created: Option<&str>,
        [why, reason]: [Option<&str>; 2],
    ) -> Self {
        let cut = |text: &str| text.chars().take(MAX_TEXT_BYTES).collect::<String>();
        Self {
            time: Timestamp::now(),
            what,
            by,
            who: crate::terraform::lock_info::who(),
            pid: std::process::id(),
            id: cut(id),
            path: cut(path),
            operation: cut(operation),
            holder: cut(holder),
            created: created.map(cut),
            why: cut(why.unwrap_or_default()),
            reason: reason.map(cut),
        }
    }
}

/// Writes an event down and tells `TFW_ON_EVENT` of it. Errors are for nobody: the lock matters, and this does not.
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

/// Every event that is kept, the oldest first, and how many lines are none.
pub(crate) fn read() -> (Vec<LockEvent>, usize) {
    let mut events = Vec::new();
    let mut torn = 0;
    for state in StateDirectory::all(|name| std::env::var_os(name)) {
        let path = state.join(FILE);
        for path in (1..=MAX_FILES).rev().map(|number| older(&path, number)).chain([path.clone()]) {
            let mut text = Vec::new();
            let file = open_private(OpenOptions::new().read(true), &path);
            // A file of ours is never longer than this; another's is not read to its end.
            if file.and_then(|file| file.take(2 * MAX_FILE_BYTES).read_to_end(&mut text)).is_err() {
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

/// Appends a line in one write, so that two that write at once do not mix. A full file becomes an older one first.
fn append(path: &Path, line: &str) -> io::Result<()> {
    let lock = open_private(
        OpenOptions::new().create(true).truncate(false).write(true).mode(0o600),
        &path.with_extension("lock"),
    )?;
    // Whoever has it renames some files. If he takes longer, the line goes where it can.
    let mut alone = false;
    for _ in 0..20 {
        alone = lock_file::try_lock(&lock, 0).unwrap_or(false);
        if alone {
            break;
        }
        crate::sys::poll::wait(&[], Some(Duration::from_millis(10)));
    }
    if alone && fs::metadata(path).is_ok_and(|file| file.len() + line.len() as u64 > MAX_FILE_BYTES) {
        for number in (1..MAX_FILES).rev() {
            let _ = fs::rename(older(path, number), older(path, number + 1));
        }
        fs::rename(path, older(path, 1))?;
    }
    let mut file: File = open_private(OpenOptions::new().create(true).append(true).mode(0o600), path)?;
    file.write_all(line.as_bytes())
}

fn older(path: &Path, number: usize) -> PathBuf {
    path.with_extension(format!("jsonl.{number}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

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
        let event = LockEvent::of_standing(What::Refused, By::Command, &lock, "p", "because", None);
        let line = json::to_string(&event).unwrap();
        assert!(line.len() < 3000 && line.is_ascii() && !line.contains('\n'), "{line}");
        assert_eq!(serde_json::from_str::<LockEvent>(&line).unwrap(), event);
    }
}
