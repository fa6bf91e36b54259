//! `tf locks history`: prints the history of this user on this host: the locks that were released, force-released,
//! refused or replaced by another run's lock.

use crate::console;
use clap::Args;
use serde::Serialize;

use super::Finding;
use super::connection::Trouble;
use crate::console::visible;
use crate::journal::history;
use crate::journal::history::{By, LockEvent, What};
use crate::json;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks history
  tf locks history --json | jq '.events[] | select(.event == \"forced\")'

Exit codes: 0 it was shown, 1 the command failed.";

#[derive(Args, Clone, Debug)]
pub(super) struct History {
    /// Print one JSON object whose `events` are the lines of the history, oldest first
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct All<'a> {
    events: &'a [LockEvent],
    /// The number of lines that could not be read.
    unreadable: usize,
}

impl History {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        let (events, unreadable) = history::read();
        if self.json {
            let text = json::to_string(&All { events: &events, unreadable });
            console::print(&text.map_err(|error| Trouble::Said(error.to_string()))?);
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

fn line(event: &LockEvent) -> String {
    let what = match event.what {
        What::Released => "released",
        What::Forced => "forced  ",
        What::Refused => "refused ",
        What::Replaced => "replaced",
        What::TakenOver => "taken over",
    };
    let by = match event.by {
        By::Tf => "tf",
        By::Guardian => "its guardian",
        By::Recovery if event.what == What::TakenOver => "tf",
        By::Recovery => "recovery",
        By::Command => "tf locks release",
    };
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
