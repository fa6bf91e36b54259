//! `tf locks audit`: counts locks, for scheduled jobs. The exit code says whether a lock needs attention.

use std::time::{Duration, Instant};
use std::{io, slice};

use clap::Args;
use jiff::Timestamp;
use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::Value;

use super::connection::{Connection, LocationArgs, ScanTarget, Trouble};
use super::found::{ListedEntry, not_whole};
use super::output::{Format, Output, Rows, Widths};
use super::scan::Scan;
use super::staleness::Staleness;
use super::stop_requests::StopRequests;
use super::targets::{BadLine, Fleet, Speed, Tally, TargetArgs, TargetName, Targets};
use super::{Finding, inventory};
use crate::holder::evidence::Verdict;
use crate::lease::observed::ObservedLease;
use crate::{console, json, settings};

pub(super) const EXAMPLES: &str = "Examples:
  tf locks audit --older-than 2h
  tf locks audit --older-than 2h --table terraform-locks --json
  tf locks audit --older-than 2h --table terraform-locks --prometheus > /var/lib/node_exporter/tf_locks.prom
  tf locks audit --older-than 2h --table terraform-locks --bucket my-states --region eu-west-1
  tf locks audit --older-than 2h --from targets.txt

A lock is stale if it is older than the given time and its holder is not known to be alive. Anything in the place of a
lock that is not a lock counts too.

With several targets, or with --from, a line on stderr counts the locks of each target, and one the locks of all. If a
target fails, the others are read nevertheless.

Exit codes: 0 no lock is stale, 2 at least one lock is stale, 1 the command failed, 3 (only with several targets) a lock
is stale and a target failed.";

#[derive(Args, Clone, Debug)]
pub(super) struct Audit {
    /// Only count locks older than this as stale: 90s, 45m, 2h, 3d
    #[arg(long, value_name = "TIME", value_parser = age)]
    older_than: Duration,
    #[command(flatten)]
    targets: TargetArgs,
    #[command(flatten)]
    speed: Speed,
    /// Print one JSON object with the counts and the stale locks
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
        self.lease_lapsed += u64::from(lock.lease.as_deref().is_some_and(ObservedLease::has_lapsed));
        if let Some(age) = lock.age(now) {
            self.oldest_age_seconds = self.oldest_age_seconds.max(age.as_secs_f64());
        }
    }

    fn tally(&self) -> Tally {
        Tally {
            locks: Verdict::ALL.into_iter().map(|verdict| self.of(verdict)).sum(),
            stale: self.stale,
            no_locks: self.unreadable - self.unread,
            unread: self.unread,
        }
    }

    /// Adds the counts of a part of the target, or of one of several targets.
    fn add_part(&mut self, other: &Self) {
        self.alive += other.alive;
        self.unknown += other.unknown;
        self.likely_dead += other.likely_dead;
        self.dead += other.dead;
        self.stale += other.stale;
        self.lease_lapsed += other.lease_lapsed;
        self.unreadable += other.unreadable;
        self.unread += other.unread;
        self.scanned += other.scanned;
        self.complete &= other.complete;
        self.oldest_age_seconds = self.oldest_age_seconds.max(other.oldest_age_seconds);
    }
}

/// The counts of one target, and what JSON shows of its stale locks.
#[derive(Clone, Debug, Serialize)]
struct Audited {
    #[serde(flatten)]
    count: Count,
    /// The first [`MAX_DESCRIBED`] stale locks, in the form of `tf locks list --json`. Empty if JSON is not wanted.
    stale_locks: Vec<Value>,
}

/// How many stale locks of a target JSON describes. A table can have any number of them, and the audit needs no more
/// memory for a large table.
const MAX_DESCRIBED: usize = 100;

impl Audited {
    /// Adds `entry` to the counts. If `describes` is true, adds a stale lock to the description too.
    fn add(&mut self, entry: &ListedEntry, now: Timestamp, describes: bool) {
        self.count.add(entry, now);
        if let ListedEntry::Lock(lock) = entry
            && describes
            && lock.stale
            && self.stale_locks.len() < MAX_DESCRIBED
        {
            self.stale_locks.extend(serde_json::to_value(lock));
        }
    }

    /// Adds what was found in a part of the target.
    fn add_part(&mut self, part: Self) {
        self.count.add_part(&part.count);
        let room = MAX_DESCRIBED.saturating_sub(self.stale_locks.len());
        self.stale_locks.extend(part.stale_locks.into_iter().take(room));
    }
}

/// The counts of one of several targets.
#[derive(Debug, Serialize)]
struct TargetCount {
    target: TargetName,
    /// Why the target could not be read; `None` if it was read. The counts are then those of the part that was read.
    error: Option<String>,
    #[serde(flatten)]
    audited: Audited,
}

/// The counts of several targets.
#[derive(Debug, Serialize)]
struct FleetCount<'a> {
    /// The sum over the targets. `complete` is true if every target is complete and every line names a target.
    #[serde(flatten)]
    total: Count,
    targets: &'a [TargetCount],
    bad_lines: &'a [BadLine],
}

/// Formats the counts in the Prometheus text format, version 0.0.4. `rows` has the labels of each target, without
/// braces, and its counts. Of a target that could not be read (`true`), only the duration and the fact are given,
/// because its counts are not known.
fn metrics(rows: &[(String, &Count, bool)]) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, help: &str, of_failed: bool, value: fn(&Count) -> String| {
        let samples = rows.iter().filter(|(.., failed)| of_failed || !failed);
        let samples = samples.map(|(labels, count, _)| (braced(labels), value(count))).collect::<Vec<_>>();
        text.push_str(&family(name, help, &samples));
    };
    metric("_stale", "Locks that need attention.", false, |count| count.stale.to_string());
    metric("_unreadable", "Entries in the place of a lock that are not locks or could not be read.", false, |count| {
        count.unreadable.to_string()
    });
    metric("_oldest_age_seconds", "Age of the oldest lock.", false, |count| count.oldest_age_seconds.to_string());
    metric("_scanned", "Items, objects or states that were read.", false, |count| count.scanned.to_string());
    metric("_scan_seconds", "Duration of the scan.", true, |count| count.scan_seconds.to_string());
    metric("_scan_complete", "1 if everything was read.", true, |count| u8::from(count.complete).to_string());
    metric("_lease_lapsed", "Locks whose lease was not renewed in time, by the service's clock.", false, |count| {
        count.lease_lapsed.to_string()
    });
    let known = rows.iter().filter(|(.., failed)| !failed);
    let by_verdict: Vec<_> = known
        .flat_map(|(labels, count, _)| {
            Verdict::ALL.map(|verdict| {
                let comma = if labels.is_empty() { "" } else { "," };
                (braced(&format!("{labels}{comma}verdict=\"{}\"", verdict.word())), count.of(verdict).to_string())
            })
        })
        .collect();
    family("", "Locks that are held, by the verdict on their holders.", &by_verdict) + &text
}

fn braced(labels: &str) -> String {
    if labels.is_empty() { String::new() } else { format!("{{{labels}}}") }
}

/// Formats the gauge `tf_locks` + `name`. Each sample has its labels in braces, and its value. Without a sample, there
/// is no gauge.
fn family(name: &str, help: &str, samples: &[(String, String)]) -> String {
    if samples.is_empty() {
        return String::new();
    }
    let mut text = format!("# HELP tf_locks{name} {help}\n# TYPE tf_locks{name} gauge\n");
    for (labels, value) in samples {
        text = format!("{text}tf_locks{name}{labels} {value}\n");
    }
    text
}

impl Audit {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        super::block_on(async {
            match self.targets.targets(self.speed)? {
                Targets::One(place) => self.one(&place).await,
                Targets::Several(fleet) => Box::pin(self.several(&fleet)).await,
            }
        })
    }

    fn empty_count(&self) -> Count {
        Count { older_than_seconds: self.older_than.as_secs(), complete: true, ..Count::default() }
    }

    fn nothing_audited(&self) -> Audited {
        Audited { count: self.empty_count(), stale_locks: Vec::new() }
    }

    /// With `--json` and `--prometheus`, only the counts are printed.
    fn is_silent(&self) -> bool {
        self.json || self.prometheus
    }

    async fn one(&self, place: &LocationArgs) -> Result<Finding, Trouble> {
        let begun = Instant::now();
        let mut stop_requests = StopRequests::listen()?;
        let reached = stop_requests.unless_stopped(Box::pin(place.reach())).await;
        let connection = reached.map_err(Trouble::Stopped)??;
        let mut audited = self.nothing_audited();
        let mut output = Output::new(false, Widths::USUAL)?;
        if let ScanTarget::Directory(directory) = &connection.target {
            let staleness = Staleness { older_than: Some(self.older_than), ..Staleness::default() };
            let looked =
                inventory::look_and_ask_witness(directory, &connection.stores, staleness, &inventory::NO_OTHERS);
            let inventory = stop_requests.unless_stopped(Box::pin(looked)).await.map_err(Trouble::Stopped)??;
            inventory.say_unseen();
            let mut rows = Rows::default();
            self.add(&inventory.entries, output.format(), &mut rows, &mut audited)?;
            output.put(&rows, &mut stop_requests)?;
            audited.count.scanned = inventory.states.len() as u64;
            if let Some(why) = inventory.incomplete {
                console::say(&why);
                audited.count.complete = false;
            }
        } else {
            let counted = self.scan(connection, self.speed, &mut stop_requests, &mut output, &mut audited).await?;
            if let Some(signal) = counted {
                return Ok(Finding::Stopped(signal));
            }
        }
        if audited.count.unread > 0 {
            console::say(&not_whole(audited.count.unread));
        }
        audited.count.scan_seconds = begun.elapsed().as_secs_f64();
        let count = audited.count;
        // From here, a signal ends this process at once, also while the reader of stdout does not read.
        drop(stop_requests);
        if self.json {
            print_json(&audited)?;
        } else if self.prometheus {
            console::print_for_program(&metrics(&[(String::new(), &count, false)]));
        }
        Ok(match (count.tally().needs_attention(), count.complete) {
            (true, _) => Finding::Stale,
            (false, false) => Finding::Failed,
            (false, true) => Finding::Nothing,
        })
    }

    /// Adds `entries` to the result, and to `rows` those that need attention.
    fn add(&self, entries: &[ListedEntry], format: Format, rows: &mut Rows, audited: &mut Audited) -> io::Result<()> {
        let now = Timestamp::now();
        for entry in entries {
            audited.add(entry, now, self.json);
        }
        format.add_rows(entries.iter().filter(|entry| !self.is_silent() && entry.is_stale()), rows)
    }

    /// Counts the locks of a table or a bucket, and shows the stale ones. Returns the signal that stopped the scan.
    async fn scan(
        &self,
        Connection { target, stores }: Connection,
        speed: Speed,
        stop_requests: &mut StopRequests,
        output: &mut Output,
        audited: &mut Audited,
    ) -> Result<Option<Signal>, Trouble> {
        let staleness = Staleness { older_than: Some(self.older_than), ..Staleness::default() };
        let scan = Scan { target, stores, speed, staleness, is_silent: false };
        let format = output.format();
        let audit = self.clone();
        let step = move |entry: ListedEntry, rows: &mut Rows, part: &mut Audited| {
            audit.add(slice::from_ref(&entry), format, rows, part)
        };
        let initial = self.nothing_audited();
        let scanned = scan.run(stop_requests, output, initial, step, |part| audited.add_part(part)).await?;
        audited.count.scanned = scanned.items;
        scanned.failed.map_or(Ok(scanned.stopped), Err)
    }

    async fn several(&self, fleet: &Fleet) -> Result<Finding, Trouble> {
        let begun = Instant::now();
        let mut output = Output::new(false, Widths::USUAL)?;
        let mut stop_requests = StopRequests::listen()?;
        let mut total = Count { complete: fleet.bad_lines.is_empty(), ..self.empty_count() };
        let mut counts = Vec::new();
        for target in &fleet.targets {
            let begun = Instant::now();
            let mut audited = self.nothing_audited();
            let connection = match stop_requests.unless_stopped(Box::pin(target.place.reach())).await {
                Err(signal) => return Ok(Finding::Stopped(signal)),
                Ok(connection) => connection,
            };
            let counted = match connection {
                Ok(connection) => {
                    self.scan(connection, target.speed, &mut stop_requests, &mut output, &mut audited).await
                }
                Err(trouble) => Err(trouble),
            };
            let name = target.name();
            let error = match counted {
                Ok(Some(signal)) => return Ok(Finding::Stopped(signal)),
                Err(Trouble::Stopped(signal)) => return Err(Trouble::Stopped(signal)),
                Ok(None) => None,
                Err(trouble) => Some(trouble.to_string()),
            };
            audited.count.complete &= error.is_none();
            audited.count.scan_seconds = begun.elapsed().as_secs_f64();
            name.report(audited.count.tally(), error.as_deref(), self.is_silent());
            total.add_part(&audited.count);
            counts.push(TargetCount { target: name, error, audited });
        }
        total.scan_seconds = begun.elapsed().as_secs_f64();
        let failed = counts.iter().filter(|target| target.error.is_some()).count();
        drop(stop_requests);
        if self.json {
            print_json(&FleetCount { total, targets: &counts, bad_lines: &fleet.bad_lines })?;
        } else if self.prometheus {
            let rows: Vec<_> =
                counts.iter().map(|one| (one.target.labels(), &one.audited.count, one.error.is_some())).collect();
            let gauges = [
                ("_targets", "Tables and buckets to read.", fleet.targets.len()),
                ("_targets_failed", "Tables and buckets that could not be read.", failed),
                ("_bad_lines", "Lines of the file with targets that name no target.", fleet.bad_lines.len()),
            ];
            let gauges = gauges.map(|(name, help, value)| family(name, help, &[(String::new(), value.to_string())]));
            console::print_for_program(&(metrics(&rows) + &gauges.concat()));
        } else {
            console::say(&fleet.total(total.tally(), failed));
        }
        Ok(fleet.finding(total.tally(), failed))
    }
}

fn print_json(value: &impl Serialize) -> Result<(), Trouble> {
    console::print_for_program(&json::to_string(value).map_err(|error| Trouble::Said(error.to_string()))?);
    Ok(())
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
