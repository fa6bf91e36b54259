//! `tf locks history`: prints the history of this user on this host: the locks that were released, force-released,
//! refused, taken over or replaced by another run's lock.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::Finding;
use super::connection::Trouble;
use super::history_page::{Page, by};
use crate::console::{visible, visible_whole};
use crate::journal::history;
use crate::journal::history::{LockEvent, What};
use crate::terraform::lock_info;
use crate::time::saturating_sub;
use crate::{console, json, settings};

pub(super) const EXAMPLES: &str = "Examples:
  tf locks history
  tf locks history --since 7d --path my-states/prod
  tf locks history --since 30d --html history.html
  tf locks history --json | jq '.events[] | select(.event == \"forced\")'

Exit codes: 0 it was shown, 1 the command failed.";

#[derive(Args, Clone, Debug)]
pub(super) struct History {
    /// Print one JSON object whose `events` are the lines of the history, oldest first
    #[arg(long)]
    json: bool,
    /// Only show events since TIME: a duration (90m, 2h, 7d), a date (2026-11-27, in UTC) or a time
    /// (2026-11-27T08:00:00Z)
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Since>,
    /// Only show locks whose path (bucket/key) is PATH or below it
    #[arg(long, value_name = "PATH", value_parser = NonEmptyStringValueParser::new())]
    path: Option<String>,
    /// Write one HTML page with a timeline to FILE (- for stdout)
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    html: Option<PathBuf>,
}

/// The beginning of the events to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    /// This long before now.
    Ago(Duration),
    At(Timestamp),
}

fn since(text: &str) -> Result<Since, String> {
    let has_unit = text.ends_with(|last: char| last.is_ascii_alphabetic());
    let ago = settings::duration(text).filter(|_| has_unit).map(Since::Ago);
    // Jiff would parse a date that a time without an offset follows, and ignore the time.
    let date = || text.parse::<Date>().ok().filter(|_| !text.contains(['T', 't', ' ']));
    let midnight = || date()?.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp());
    let at = || text.parse().ok().or_else(midnight).map(Since::At);
    ago.or_else(at).ok_or_else(|| {
        "it must be a duration such as 7d, a date such as 2026-11-27, or a time such as 2026-11-27T08:00:00Z".to_owned()
    })
}

impl Since {
    /// Returns the time of the first event to show.
    fn time(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(time) => time,
            Self::Ago(duration) => {
                saturating_sub(now, SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX))
            }
        }
    }
}

/// Returns whether `path` is `wanted` or below it, as a directory is above its files.
fn is_below(path: &str, wanted: &str) -> bool {
    let wanted = wanted.trim_end_matches('/');
    path.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[derive(Serialize)]
struct All<'a> {
    events: &'a [LockEvent],
    /// The number of lines that could not be read.
    unreadable: usize,
}

impl History {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        let (mut events, unreadable) = history::read();
        let first = self.since.map(|since| since.time(Timestamp::now()));
        events.retain(|event| {
            first.is_none_or(|first| event.time >= first)
                && self.path.as_ref().is_none_or(|path| is_below(&event.path, path))
        });
        if let Some(file) = &self.html {
            let who = lock_info::who();
            let path = self.path.as_deref();
            let page = Page { events: &events, unreadable, who: &who, since: first, path, now: Timestamp::now() };
            return write(file, &page.html());
        }
        if self.json {
            let text = json::to_string(&All { events: &events, unreadable });
            console::print_for_program(&text.map_err(|error| Trouble::Said(error.to_string()))?);
            return Ok(Finding::Nothing);
        }
        for event in &events {
            console::print(&line(event));
        }
        if unreadable > 0 {
            console::say(&format!("{unreadable} lines of the history could not be read and are not shown"));
        }
        Ok(Finding::Nothing)
    }
}

/// Writes the page to `file`, or to stdout for `-`. A new file is readable only by its owner, as the history is.
///
/// # Errors
/// Fails if the file cannot be written.
fn write(file: &Path, html: &str) -> Result<Finding, Trouble> {
    if file == Path::new("-") {
        console::print_for_program(html);
        return Ok(Finding::Nothing);
    }
    let shown = visible_whole(&file.display().to_string());
    let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(file);
    opened.and_then(|mut file| file.write_all(html.as_bytes())).map_err(|error| {
        Trouble::Said(format!("could not write {shown}: {error}\nname a file in a directory that you can write to"))
    })?;
    console::print(&format!("wrote {shown}"));
    Ok(Finding::Nothing)
}

fn line(event: &LockEvent) -> String {
    let what = match event.what {
        What::Released => "released",
        What::Forced => "forced  ",
        What::Refused => "refused ",
        What::Replaced => "replaced",
        What::TakenOver => "taken over",
    };
    let by = by(event);
    // For an entry that was not a lock, only its path is known.
    let lock = if event.id.is_empty() && event.holder.is_empty() {
        visible(&event.path)
    } else {
        let operation = match visible(&event.operation) {
            operation if operation.is_empty() => operation,
            operation => format!(" for {operation}"),
        };
        let holder = if event.holder.is_empty() { "an unknown holder".to_owned() } else { visible(&event.holder) };
        format!("{}  {}  held by {holder}{operation}", visible(&event.id), visible(&event.path))
    };
    let reason = event.reason.as_deref().map_or_else(String::new, |reason| format!("  reason: {}", visible(reason)));
    format!("{:.0}  {what}  {lock}  by {} ({by}): {}{reason}", event.time, visible(&event.who), visible(&event.why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_duration_a_date_or_a_time() {
        let at = |text: &str| Ok(Since::At(text.parse().unwrap()));
        for (text, expected) in [
            ("90m", Ok(Since::Ago(Duration::from_mins(90)))),
            ("7d", Ok(Since::Ago(Duration::from_hours(168)))),
            ("2026-11-27", at("2026-11-27T00:00:00Z")),
            ("2026-11-27T08:00:00+02:00", at("2026-11-27T06:00:00Z")),
            ("2026-11-27T08:00:00.5Z", at("2026-11-27T08:00:00.5Z")),
        ] {
            assert_eq!(since(text), expected, "{text}");
        }
        // A year is not a number of seconds.
        for text in ["", "2026", "yesterday", "7w", "-1d", "2026-13-01", "2026-11-27T08:00:00", "99999999999999999999d"]
        {
            assert!(since(text).is_err(), "{text}");
        }
        let now: Timestamp = "2026-11-27T08:00:00Z".parse().unwrap();
        assert_eq!(Since::Ago(Duration::from_hours(8)).time(now), "2026-11-27T00:00:00Z".parse().unwrap());
        assert_eq!(Since::Ago(Duration::MAX).time(now), Timestamp::MIN);
    }

    #[test]
    fn a_path_is_that_of_one_state_or_of_all_below_it() {
        for (path, wanted, expected) in [
            ("b/prod", "b/prod", true),
            ("b/prod/vpc", "b/prod", true),
            ("b/prod/vpc", "b/prod/", true),
            ("b/prod", "b", true),
            ("b/production", "b/prod", false),
            ("b/prod", "b/prod/vpc", false),
            ("b/prod", "prod", false),
            ("", "b", false),
        ] {
            assert_eq!(is_below(path, wanted), expected, "{path} {wanted}");
        }
    }
}
