//! `tf locks` and `tf locks list`: lists locks, with the verdicts on their holders.

use crate::console;
use clap::Args;

use super::connection::{Connection, LocationArgs, ScanTarget, Trouble};
use super::found::{ListedEntry, not_whole};
use super::output::{End, Output, Widths};
use super::scan::{Scan, Speed};
use super::staleness::Staleness;
use super::{Finding, inventory};
use crate::lock::stores::Stores;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks                                        the locks of this directory's backend
  tf locks list --json | jq '.locks[].path'
  tf locks list --table terraform-locks --region eu-west-1
  tf locks list --bucket my-states --prefix prod/

Exit codes: 0 no lock is stale, 2 a lock is stale (dead or likely dead) or is not a lock, 1 the command failed.";

/// The arguments of `tf locks list`, and of `tf locks` without a command.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct List {
    #[command(flatten)]
    place: LocationArgs,
    /// Print one JSON object, as described in docs/locks.schema.json
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    speed: Speed,
}

impl List {
    /// Lists the locks.
    ///
    /// # Errors
    /// Fails if the target cannot be reached, if a request fails, or if the result cannot be written.
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        super::block_on(async {
            let Connection { target, stores } = self.place.reach().await?;
            let ScanTarget::Directory(directory) = &target else {
                let output = Output::new(self.json, Widths::USUAL)?;
                return self.list_scanned(target, stores, output).await;
            };
            let inventory = inventory::take(directory, &stores, &Staleness::default()).await?;
            let entries = inventory.entries;
            let stale = entries.iter().any(ListedEntry::is_stale);
            let mut output = Output::new(self.json, Widths::of(&entries))?;
            for entry in &entries {
                let shown = output.render(entry)?;
                output.put(&shown)?;
            }
            if let (true, Output::Table(_)) = (entries.is_empty(), &output) {
                let workspaces = if inventory.incomplete.is_some() { "" } else { " and its workspaces" };
                console::print(&format!("no lock is held for {}/{}{workspaces}", directory.bucket, directory.key));
            }
            let end = End { complete: inventory.incomplete.is_none(), scanned: inventory.states };
            output.end(end)?;
            if let Some(why) = &inventory.incomplete {
                console::say(why);
            }
            Ok(match inventory.incomplete {
                _ if stale => Finding::Stale,
                Some(_) => Finding::Failed,
                None => Finding::Nothing,
            })
        })
    }

    async fn list_scanned(&self, target: ScanTarget, stores: Stores, mut output: Output) -> Result<Finding, Trouble> {
        let (mut stale, mut unread) = (false, 0);
        let scan = Scan { target, stores, speed: self.speed, staleness: Staleness::default() };
        let scanned = scan
            .run(&mut output, |entry| {
                stale |= entry.is_stale();
                unread += u64::from(entry.is_unread());
                true
            })
            .await?;
        output.end(End { complete: scanned.stopped.is_none() && unread == 0, scanned: scanned.items })?;
        if unread > 0 {
            console::say(&not_whole(unread));
        }
        Ok(match scanned.stopped {
            Some(signal) => Finding::Stopped(signal),
            None if stale => Finding::Stale,
            None if unread > 0 => Finding::Failed,
            None => Finding::Nothing,
        })
    }
}
