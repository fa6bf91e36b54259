//! `tf locks history`: what was released, forced and refused by this user on this host.

use clap::Args;
use serde::Serialize;

use super::Finding;
use super::reach::Trouble;
use crate::history::{self, By, Event, What};
use crate::json;
use crate::report::{self, visible};

pub(super) const EXAMPLES: &str = "Examples:
  tf locks history
  tf locks history --json | jq '.events[] | select(.event == \"forced\")'

Exit codes: 0 it was shown, 1 it could not be.";

#[derive(Args, Clone, Debug)]
pub(super) struct History {
    /// One JSON object: its `events` are the lines of the file, the oldest first
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct All<'a> {
    events: &'a [Event],
    /// So many lines could not be read.
    unreadable: usize,
}

impl History {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        let (events, unreadable) = history::read();
        if self.json {
            let text = json::to_string(&All { events: &events, unreadable });
            report::print(&text.map_err(|error| Trouble::Said(error.to_string()))?);
            return Ok(Finding::Nothing);
        }
        for event in &events {
            report::print(&line(event));
        }
        if unreadable > 0 {
            report::say(&format!("{unreadable} lines of the history cannot be read, and are not shown"));
        }
        Ok(Finding::Nothing)
    }
}

fn line(event: &Event) -> String {
    let what = match event.what {
        What::Released => "released",
        What::Forced => "forced  ",
        What::Refused => "refused ",
        What::Replaced => "replaced",
    };
    let by = match event.by {
        By::Tf => "tf",
        By::Guardian => "its guardian",
        By::Recovery => "recovery",
        By::Command => "tf locks release",
    };
    let reason = event.reason.as_deref().map_or_else(String::new, |reason| format!("  reason: {}", visible(reason)));
    format!(
        "{:.0}  {what}  {}  {}  held by {} for {}  by {} ({by}): {}{reason}",
        event.time,
        visible(&event.id),
        visible(&event.path),
        visible(&event.holder),
        visible(&event.operation),
        visible(&event.who),
        visible(&event.why)
    )
}
