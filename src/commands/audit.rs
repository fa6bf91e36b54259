//! `tf locks audit`: counts locks, for scheduled jobs. The exit code says whether a lock needs attention.

use crate::console;
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::connection::{Connection, LocationArgs, ScanTarget, Trouble};
use super::found::{ListedEntry, not_whole};
use super::output::{Output, Widths};
use super::scan::{Scan, Speed};
use super::staleness::Staleness;
use super::{Finding, inventory};
use crate::holder::evidence::Verdict;
use crate::json;
use crate::lease::observed::ObservedLease;
use crate::settings;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks audit --older-than 2h
  tf locks audit --older-than 2h --table terraform-locks --json
  tf locks audit --older-than 2h --table terraform-locks --prometheus > /var/lib/node_exporter/tf_locks.prom

A lock is stale if it is older than the given time and its holder is not known to be alive. Anything in the place of a
lock that is not a lock counts too.

Exit codes: 0 no lock is stale, 2 at least one lock is stale, 1 the command failed.";

#[derive(Args, Clone, Debug)]
pub(super) struct Audit {
    /// Only count locks older than this as stale: 90s, 45m, 2h, 3d
    #[arg(long, value_name = "TIME", value_parser = age)]
    older_than: Duration,
    #[command(flatten)]
    place: LocationArgs,
    #[command(flatten)]
    speed: Speed,
    /// Print one JSON object with the counts
    #[arg(long)]
    json: bool,
    /// Print metrics in the Prometheus text format
    #[arg(long, conflicts_with = "json")]
    prometheus: bool,
}

fn age(text: &str) -> Result<Duration, String> {
    settings::duration(text).ok_or_else(|| "it must be a time such as 90s, 45m, 2h or 3d".to_owned())
}

/// The result of an audit. Two audits of an unchanged table differ only in the last two fields, unless a verdict
/// changes or a lock becomes stale in between.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Count {
    /// The number of locks whose holder is alive. The next three fields count the locks with the other verdicts.
    alive: u64,
    unknown: u64,
    likely_dead: u64,
    dead: u64,
    /// The number of locks that need attention.
    stale: u64,
    /// The number of locks whose lease was not renewed in time. They count in the fields above too.
    lease_lapsed: u64,
    /// The number of entries in a lock's place that are not locks or could not be read.
    unreadable: u64,
    /// How many of `unreadable` could not be read at all: whether they are locks is unknown.
    #[serde(skip)]
    unread: u64,
    /// The number of items, objects or states that were checked.
    scanned: u64,
    /// False if an entry could not be read or the workspaces could not be listed.
    complete: bool,
    older_than_seconds: u64,
    oldest_age_seconds: f64,
    scan_seconds: f64,
}

impl Count {
    fn of(&self, verdict: Verdict) -> u64 {
        match verdict {
            Verdict::Alive => self.alive,
            Verdict::Unknown => self.unknown,
            Verdict::LikelyDead => self.likely_dead,
            Verdict::Dead => self.dead,
        }
    }

    fn add(&mut self, entry: &ListedEntry, now: Timestamp) {
        let ListedEntry::Lock(lock) = entry else {
            self.unreadable += 1;
            self.complete &= !entry.is_unread();
            self.unread += u64::from(entry.is_unread());
            return;
        };
        match lock.verdict() {
            Verdict::Alive => self.alive += 1,
            Verdict::Unknown => self.unknown += 1,
            Verdict::LikelyDead => self.likely_dead += 1,
            Verdict::Dead => self.dead += 1,
        }
        self.stale += u64::from(lock.stale);
        self.lease_lapsed += u64::from(lock.lease.as_ref().is_some_and(ObservedLease::has_lapsed));
        if let Some(age) = lock.age(now) {
            self.oldest_age_seconds = self.oldest_age_seconds.max(age.as_secs_f64());
        }
    }

    /// Formats the counts in the Prometheus text format, version 0.0.4.
    fn metrics(&self) -> String {
        let mut text = String::new();
        let mut metric = |name: &str, help: &str, samples: &[(String, String)]| {
            text = format!("{text}# HELP tf_locks{name} {help}\n# TYPE tf_locks{name} gauge\n");
            for (labels, value) in samples {
                text = format!("{text}tf_locks{name}{labels} {value}\n");
            }
        };
        let by_verdict =
            Verdict::ALL.map(|verdict| (format!("{{verdict=\"{}\"}}", verdict.word()), self.of(verdict).to_string()));
        let one = |value: String| [(String::new(), value)];
        metric("", "Locks that are held, by the verdict on their holders.", &by_verdict);
        metric("_stale", "Locks that need attention.", &one(self.stale.to_string()));
        metric("_unreadable", "Entries in the place of a lock that are not locks.", &one(self.unreadable.to_string()));
        metric("_oldest_age_seconds", "Age of the oldest lock.", &one(self.oldest_age_seconds.to_string()));
        metric("_scanned", "Items, objects or states that were read.", &one(self.scanned.to_string()));
        metric("_scan_seconds", "Duration of the scan.", &one(self.scan_seconds.to_string()));
        metric("_scan_complete", "1 if everything was read.", &one(u8::from(self.complete).to_string()));
        metric(
            "_lease_lapsed",
            "Locks whose lease was not renewed in time, by the service's clock.",
            &one(self.lease_lapsed.to_string()),
        );
        text
    }
}

impl Audit {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        super::block_on(async {
            let begun = Instant::now();
            let staleness = Staleness { older_than: Some(self.older_than) };
            let Connection { target, stores } = self.place.reach().await?;
            let silent = self.json || self.prometheus;
            let now = Timestamp::now();
            let mut count = Count { older_than_seconds: self.older_than.as_secs(), complete: true, ..Count::default() };
            // With --json and --prometheus, only the counts are printed.
            let is_shown = |entry: &ListedEntry| !silent && entry.is_stale();
            let mut output = Output::new(false, Widths::USUAL)?;
            if let ScanTarget::Directory(directory) = &target {
                let inventory = inventory::take(directory, &stores, &staleness).await?;
                for entry in &inventory.entries {
                    count.add(entry, now);
                    if is_shown(entry) {
                        output.put(&output.render(entry)?)?;
                    }
                }
                count.scanned = inventory.states;
                if let Some(why) = inventory.incomplete {
                    console::say(&why);
                    count.complete = false;
                }
            } else {
                let scan = Scan { target, stores, speed: self.speed, staleness };
                let scanned = scan
                    .run(&mut output, |entry| {
                        count.add(entry, now);
                        is_shown(entry)
                    })
                    .await?;
                count.scanned = scanned.items;
                if let Some(signal) = scanned.stopped {
                    return Ok(Finding::Stopped(signal));
                }
            }
            if count.unread > 0 {
                console::say(&not_whole(count.unread));
            }
            count.scan_seconds = begun.elapsed().as_secs_f64();
            if self.json {
                console::print(&json::to_string(&count).map_err(|error| Trouble::Said(error.to_string()))?);
            } else if self.prometheus {
                console::print(&count.metrics());
            }
            // An entry that is not a lock blocks every run, however old it is, so it counts like a stale lock.
            Ok(match (count.stale + count.unreadable - count.unread, count.complete) {
                (1.., _) => Finding::Stale,
                (0, false) => Finding::Failed,
                (0, true) => Finding::Nothing,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_read() {
        for (text, seconds) in [("90s", 90), ("45m", 2700), ("2h", 7200), ("3d", 259_200), ("0s", 0)] {
            assert_eq!(age(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "h", "-2h", "2 h", "2w", "99999999999999999999d", "999999999999999999d"] {
            assert!(age(text).is_err(), "{text}");
        }
    }
}
