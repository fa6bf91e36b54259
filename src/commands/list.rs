//! `tf locks` and `tf locks list`: lists locks, with the verdicts on their holders.

use std::slice;

use clap::Args;

use super::connection::{Connection, LocationArgs, ScanTarget, Trouble};
use super::found::{ListedEntry, not_whole};
use super::output::{End, FleetEnd, Output, Rows, TargetEnd, Widths};
use super::scan::{Scan, Scanned};
use super::staleness::Staleness;
use super::stop_requests::StopRequests;
use super::targets::{Fleet, Speed, Tally, TargetArgs, Targets};
use super::{Finding, inventory, watch};
use crate::console;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks                                        the locks of this directory's backend
  tf locks list --json | jq '.locks[].path'
  tf locks list --table terraform-locks --region eu-west-1
  tf locks list --bucket my-states --prefix prod/
  tf locks list --from targets.txt
  tf locks --watch                                the same every 5 s, until ^C

With several targets, or with --from, a line on stderr counts the locks of each target, and one the locks of all. If a
target fails, the others are listed nevertheless.

Exit codes: 0 no lock is stale, 2 a lock is stale (dead or likely dead) or is not a lock, 1 the command failed, 3 (only
with several targets) a lock is stale and a target failed.";

/// The message for `--watch` with several targets.
const SEVERAL_WATCHED: &str = "--watch works with one directory, table or bucket\nwatch each in a terminal of its own";

/// The arguments of `tf locks list`, and of `tf locks` without a command.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct List {
    #[command(flatten)]
    targets: TargetArgs,
    /// Print one JSON object, as described in docs/locks.schema.json
    #[arg(long)]
    json: bool,
    /// List the locks again every TIME (default: 5s), from 1s to 24h, until ^C; in a pipe, print a line for each change
    #[arg(
        long,
        value_name = "TIME",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "5s",
        conflicts_with = "json"
    )]
    watch: Option<String>,
    #[command(flatten)]
    speed: Speed,
}

impl List {
    /// Lists the locks.
    ///
    /// # Errors
    /// Fails if the target cannot be reached, if a request fails, or if the result cannot be written.
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        let interval = self.watch.as_deref().map(watch::interval).transpose()?;
        super::block_on(async {
            match (self.targets.targets(self.speed)?, interval) {
                (Targets::One(place), Some(interval)) => Box::pin(watch::watch(&place, self.speed, interval)).await,
                (Targets::Several(_), Some(_)) => Err(Trouble::Said(SEVERAL_WATCHED.to_owned())),
                (Targets::One(place), None) => self.one(&place).await,
                (Targets::Several(fleet), None) => Box::pin(self.several(&fleet)).await,
            }
        })
    }

    async fn one(&self, place: &LocationArgs) -> Result<Finding, Trouble> {
        let mut stop_requests = StopRequests::listen()?;
        let reached = stop_requests.unless_stopped(Box::pin(place.reach())).await;
        let connection = reached.map_err(Trouble::Stopped)??;
        let ScanTarget::Directory(directory) = &connection.target else {
            return self.list_scanned(connection, place, &mut stop_requests).await;
        };
        let looked =
            inventory::look_and_ask_witness(directory, &connection.stores, Staleness::default(), &inventory::NO_OTHERS);
        let inventory = stop_requests.unless_stopped(Box::pin(looked)).await.map_err(Trouble::Stopped)??;
        inventory.say_unseen();
        let entries = inventory.entries;
        let stale = entries.iter().any(ListedEntry::is_stale);
        let mut output = Output::new(self.json, Widths::of(&entries))?;
        output.put(&output.format().rows(&entries)?, &mut stop_requests)?;
        if let (true, Output::Table(_)) = (entries.is_empty(), &output) {
            let workspaces = if inventory.incomplete.is_some() { "" } else { " and its workspaces" };
            console::print(&format!("no lock is held for {}/{}{workspaces}", directory.bucket, directory.key));
        }
        let (complete, scanned) = (inventory.incomplete.is_none(), inventory.states.len() as u64);
        output.end(&End { complete, scanned, fleet: None }, &mut stop_requests)?;
        if let Some(why) = &inventory.incomplete {
            console::say(why);
        }
        Ok(match inventory.incomplete {
            _ if stale => Finding::Stale,
            Some(_) => Finding::Failed,
            None => Finding::Nothing,
        })
    }

    async fn list_scanned(
        &self,
        connection: Connection,
        place: &LocationArgs,
        stop_requests: &mut StopRequests,
    ) -> Result<Finding, Trouble> {
        let mut output = Output::new(self.json, Widths::USUAL)?;
        let mut tally = Tally::default();
        let scanned = scan(connection, self.speed, stop_requests, &mut output, &mut tally).await?;
        let complete = scanned.stopped.is_none() && scanned.failed.is_none() && tally.unread == 0;
        output.end(&End { complete, scanned: scanned.items, fleet: None }, stop_requests)?;
        if let Some(trouble) = scanned.failed {
            return Err(trouble);
        }
        if tally.unread > 0 {
            console::say(&not_whole(tally.unread));
        }
        note_test_objects(&scanned, place);
        Ok(match scanned.stopped {
            Some(signal) => Finding::Stopped(signal),
            None if tally.needs_attention() => Finding::Stale,
            None if tally.unread > 0 => Finding::Failed,
            None => Finding::Nothing,
        })
    }

    async fn several(&self, fleet: &Fleet) -> Result<Finding, Trouble> {
        let mut output = Output::new(self.json, Widths::USUAL)?;
        let mut stop_requests = StopRequests::listen()?;
        let (mut total, mut items, mut targets) = (Tally::default(), 0, Vec::new());
        let mut stopped = None;
        for target in &fleet.targets {
            let name = target.name();
            output.next_target();
            let mut tally = Tally::default();
            let listed = match stop_requests.unless_stopped(Box::pin(target.place.reach())).await {
                Err(signal) => Ok(Scanned { stopped: Some(signal), ..Scanned::default() }),
                Ok(Err(trouble)) => Err(trouble),
                Ok(Ok(connection)) => scan(connection, target.speed, &mut stop_requests, &mut output, &mut tally).await,
            };
            let (scanned, error) = match listed {
                Ok(mut scanned) => {
                    let failed = scanned.failed.take().map(|trouble| trouble.to_string());
                    (scanned, failed)
                }
                Err(Trouble::Stopped(signal)) => return Err(Trouble::Stopped(signal)),
                Err(trouble) => (Scanned::default(), Some(trouble.to_string())),
            };
            items += scanned.items;
            stopped = scanned.stopped;
            total.add(tally);
            let complete = stopped.is_none() && error.is_none() && tally.unread == 0;
            if stopped.is_none() {
                name.report(tally, error.as_deref(), self.json);
                note_test_objects(&scanned, &target.place);
            }
            targets.push(TargetEnd { target: name, error, complete, scanned: scanned.items });
            if stopped.is_some() {
                break;
            }
        }
        let is_complete = targets.iter().all(|target| target.complete) && fleet.bad_lines.is_empty();
        let failed = targets.iter().filter(|target| target.error.is_some()).count();
        let bad_lines = fleet.bad_lines.clone();
        let fleet_end = Some(FleetEnd { targets, bad_lines });
        output.end(&End { complete: is_complete, scanned: items, fleet: fleet_end }, &mut stop_requests)?;
        if let Some(signal) = stopped {
            return Ok(Finding::Stopped(signal));
        }
        if !self.json {
            console::say(&fleet.total(total, failed));
        }
        Ok(fleet.finding(total, failed))
    }
}

/// Says on stderr that a bucket has objects that a test of the service has put.
fn note_test_objects(scanned: &Scanned, place: &LocationArgs) {
    if let Some(note) = scanned.test_objects.describe(|words| place.command(words)) {
        console::say(&note);
    }
}

/// Lists a table or a bucket, and counts its locks.
async fn scan(
    Connection { target, stores }: Connection,
    speed: Speed,
    stop_requests: &mut StopRequests,
    output: &mut Output,
    tally: &mut Tally,
) -> Result<Scanned, Trouble> {
    let scan = Scan { target, stores, speed, staleness: Staleness::default(), is_silent: false };
    let format = output.format();
    let step = move |entry: ListedEntry, rows: &mut Rows, found: &mut Tally| {
        found.add(Tally::of(slice::from_ref(&entry)));
        format.add_rows([&entry], rows)
    };
    scan.run(stop_requests, output, Tally::default(), step, |found| tally.add(found)).await
}
