//! `tf locks show`: shows one lock and all evidence for and against its holder being alive.

use clap::Args;
use jiff::Timestamp;
use serde_json::Value;

use super::choose::{Choice, choose};
use super::connection::{LocationArgs, Trouble};
use super::found::{FoundLock, ListedEntry, UnreadableLock};
use super::output::{End, Output, Widths};
use super::stop_requests::{StopRequests, unless_stopped};
use super::{Finding, lease_view};
use crate::cleanup::messages;
use crate::cleanup::messages::refused::LockName;
use crate::console;
use crate::console::{argument, length_of_time, visible};
use crate::holder::next_step::{self, ReportKind};
use crate::terraform::lock_info::LockInfo;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks show                            the only lock of this directory
  tf locks show green                      the lock of workspace green
  tf locks show 5e75cb05-d70c-4132-39e0-d2abba1b3077
  tf locks show my-states/prod.tfstate --table terraform-locks

Exit codes: 0 the lock is not stale, 2 it is stale (dead or likely dead) or not a lock, 1 it could not be found.";

#[derive(Args, Clone, Debug)]
pub(super) struct Show {
    /// The lock's ID, path (bucket/key) or workspace (default: the only lock there is). With --table or --bucket: its
    /// path
    #[arg(value_name = "PATH|ID")]
    lock: Option<String>,
    #[command(flatten)]
    place: LocationArgs,
    /// Print the JSON of `tf locks list --json`, for this lock only
    #[arg(long)]
    json: bool,
}

impl Show {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        super::block_on(async {
            let chosen = async {
                let reach = self.place.reach().await?;
                choose(&reach, self.lock.as_deref(), false).await
            };
            let (lock, junk) = match unless_stopped(Box::pin(chosen)).await? {
                Choice::Lock(lock, junk) => (Some(lock), junk),
                Choice::NoLock(junk) => (None, junk),
            };
            let stale = lock.as_ref().is_some_and(|lock| lock.stale) || !junk.is_empty();
            if self.json {
                let mut output = Output::new(true, Widths::USUAL)?;
                let junk = junk.into_iter().map(ListedEntry::UnreadableLock);
                let entries: Vec<_> = lock.map(ListedEntry::Lock).into_iter().chain(junk).collect();
                let mut stop_requests = StopRequests::listen()?;
                output.put(&output.format().rows(&entries)?, &mut stop_requests)?;
                output.end(&End { complete: true, scanned: 1, fleet: None }, &mut stop_requests)?;
            } else {
                if let Some(lock) = &lock {
                    console::print(&description(lock, Timestamp::now()));
                    console::print(&next_step(lock, ReportKind::Shown, &self.place));
                }
                if let Some(first) = junk.first() {
                    for junk in &junk {
                        console::print(&description_of_junk(junk));
                    }
                    let path = argument(&first.place.path());
                    let why = if first.is_test_object() {
                        "tf removes such an object within seconds; if it stays there, nobody needs it\nto remove it"
                    } else {
                        "every run is refused because of it\nonce you know that nobody needs it"
                    };
                    console::print(&format!(
                        "{why}, type: {} {path}",
                        self.place.command(messages::next_step::RELEASE_NO_LOCK)
                    ));
                }
            }
            Ok(if stale { Finding::Stale } else { Finding::Nothing })
        })
    }
}

/// Describes an entry that is in a lock's place and is not a lock.
pub(super) fn description_of_junk(junk: &UnreadableLock) -> String {
    format!("not a lock  {}\nstored in   {}", junk.reason, visible(&junk.place.describe()))
}

/// Returns what the user can do about a lock. `place` are the options with which the lock was found; the commands
/// repeat them.
pub(super) fn next_step(lock: &FoundLock, kind: ReportKind, place: &LocationArgs) -> String {
    // In a table or a bucket, a lock is found by its path.
    let name = if place.is_outside() { LockName::of_path(&lock.path()) } else { LockName::of_id(&lock.info.id) };
    let step = next_step::next_step(lock.verdict(), kind);
    messages::refused::lock_step(step, &lock.info, &name, |words| place.command(words)).unwrap_or_default()
}

/// Describes a lock completely: one line for each fact, with its name first.
pub(super) fn description(lock: &FoundLock, now: Timestamp) -> String {
    let mut lines: Vec<(String, String)> = Vec::new();
    let Members { known, other } = members(lock);
    for (name, mut shown) in known {
        if name == "Created"
            && let Some(age) = lock.age(now)
        {
            shown = format!("{shown} ({} ago)", length_of_time(age));
        }
        lines.push((name.to_owned(), shown));
    }
    if let Some(workspace) = &lock.workspace {
        lines.push(("workspace".into(), visible(workspace)));
    }
    if let Some(lease) = &lock.lease {
        lines.extend(lease_view::lines(lease).into_iter().map(|(name, text)| (name.to_owned(), text)));
    }
    let mut name = "stored in";
    for (store_key, _) in &lock.parts {
        lines.push((name.into(), visible(&store_key.describe())));
        name = "";
    }
    for note in &lock.notes {
        lines.push(("note".into(), note.clone()));
    }
    lines.push(("holder is".into(), format!("{}: {}", lock.verdict().words(), lock.judgement().reason)));
    let mut name = "evidence";
    for evidence in &lock.judgement().evidence {
        let text = match evidence.proves.strip_prefix("nothing") {
            Some(why) => format!("{} (no proof{why})", evidence.seen),
            None => format!("{}; this proves {}", evidence.seen, evidence.proves),
        };
        lines.push((name.into(), text));
        name = "";
    }
    lines.extend(other);
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).min(24);
    lines.iter().fold(String::new(), |all, (name, text)| format!("{all}{name:width$}  {text}\n"))
}

/// The members of a lock's JSON, as they are shown to a person: the name, and the value.
struct Members {
    /// Those that terraform writes.
    known: Vec<(&'static str, String)>,
    /// Any others. Anybody who can write the lock chooses their names, so no name is one that this command prints for a
    /// fact of its own.
    other: Vec<(String, String)>,
}

fn members(lock: &FoundLock) -> Members {
    const KNOWN: [&str; 7] = ["ID", "Path", "Operation", "Who", "Version", "Created", "Info"];
    let text = |value: &Value| visible(&value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned));
    if let Ok(Value::Object(fields)) = serde_json::from_str(lock.parts[0].1.text()) {
        let known = KNOWN.iter().filter_map(|name| Some((*name, text(fields.get(*name)?)))).collect();
        let other = fields.iter().filter(|(name, _)| !KNOWN.contains(&name.as_str()));
        return Members { known, other: other.map(|(name, value)| (other_name(name), text(value))).collect() };
    }
    // A member has a value that terraform can skip, but that cannot be stored here.
    let LockInfo { id, operation, who, version, created, path } = &lock.info;
    let fields = [("ID", id), ("Path", path), ("Operation", operation), ("Who", who), ("Version", version)];
    let known = fields.into_iter().chain([("Created", created)]).map(|(name, value)| (name, visible(value)));
    Members { known: known.collect(), other: vec![("other".into(), "members that cannot be shown".into())] }
}

fn other_name(name: &str) -> String {
    format!("other \"{}\"", visible(name))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::holder::evidence::{Judgement, NOT_YET, Verdict};
    use crate::lock::dynamodb::InfoAttribute;
    use crate::lock::stores::{StoreKey, StoredLock};

    fn lock(verdict: Verdict, who: &str) -> FoundLock {
        let place = StoreKey::DynamoDb { table: "t".into(), key: "b/k".into(), region: "r".into() };
        FoundLock {
            info: LockInfo { id: "ID-7".into(), who: who.into(), path: "b/k".into(), ..LockInfo::default() },
            parts: vec![(place, StoredLock::Item(InfoAttribute::Text(r#"{"ID":"ID-7"}"#.into())))],
            lease: None,
            workspace: None,
            notes: Vec::new(),
            rival: None,
            judgement: Some(Arc::new(Judgement { verdict, ..NOT_YET.clone() })),
            stale: false,
        }
    }

    /// The command in a directory and the command in a table, with what each kind adds.
    #[test]
    fn the_next_step_repeats_the_options_with_which_the_lock_was_found() {
        let mut outside = LocationArgs::directory_of(None);
        outside.table = Some("t".into());
        let inside = LocationArgs::directory_of(None);
        let can_not_ask = ReportKind::NotReleased { can_ask: false };
        for (verdict, kind, in_table, in_directory) in [
            (Verdict::Dead, ReportKind::Shown, "release --table t b/k", "release ID-7"),
            (Verdict::LikelyDead, ReportKind::Shown, "release --table t b/k", "release ID-7"),
            (Verdict::LikelyDead, can_not_ask, "release --table t --yes b/k", "release --yes ID-7"),
            (Verdict::Unknown, ReportKind::Shown, "release --table t --force ID-7 b/k", "release --force ID-7"),
        ] {
            for (place, command) in [(&outside, in_table), (&inside, in_directory)] {
                let step = next_step(&lock(verdict, "anna@vm"), kind, place);
                assert!(step.ends_with(&format!("type: tf locks {command}")), "{step}");
            }
        }
        let alive = next_step(&lock(Verdict::Alive, "anna@vm"), ReportKind::Shown, &outside);
        assert!(!alive.contains("release"), "{alive}");
    }

    /// Anybody who can write a lock can add members to it.
    #[test]
    fn no_member_of_a_lock_can_be_read_as_a_line_of_tf() {
        let mut lock = lock(Verdict::Unknown, "anna@vm");
        let forged = r#"{"holder is":"dead: proven","ID":"ID-7","evidence":"seen","note":"n","Created":"x"}"#;
        lock.parts[0].1 = StoredLock::Item(InfoAttribute::Text(forged.into()));
        let shown = description(&lock, Timestamp::now());
        let of_tf: Vec<&str> = shown.lines().filter(|line| line.starts_with("holder is")).collect();
        assert_eq!(of_tf.len(), 1, "{shown}");
        assert!(of_tf[0].contains("unknown"), "{shown}");
        let last: Vec<&str> = shown.lines().rev().take(3).collect();
        assert!(last.iter().all(|line| line.starts_with("other \"")), "{shown}");
    }

    #[test]
    fn a_lock_whose_json_cannot_be_stored_is_shown_with_the_fields_of_terraform() {
        let mut lock = lock(Verdict::Unknown, "anna@vm");
        lock.parts[0].1 = StoredLock::Item(InfoAttribute::Text(r#"{"ID":"ID-7","Who":"anna@vm","y":1e400}"#.into()));
        let shown = description(&lock, Timestamp::now());
        assert!(shown.starts_with("ID ") && shown.contains("anna@vm") && shown.contains("cannot be shown"), "{shown}");
    }
}
