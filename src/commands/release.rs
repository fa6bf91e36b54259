//! `tf locks release`: what `force-unlock` does, with a look at the holder first.
//!
//! What is deleted is exactly what was shown, byte for byte. Evidence is judged again after a person's answer, right
//! before the delete: a lock that was given back and taken anew meanwhile is another one, and is shown instead.

use std::io::IsTerminal;

use clap::Args;
use jiff::Timestamp;

use super::choose::choose;
use super::found::{Entry, Found};
use super::reach::{Reach, Trouble, Where};
use super::staleness::Staleness;
use super::{Finding, agreement, show};
use crate::history::{self, By, Event, What};
use crate::holder::evidence::Verdict;
use crate::holder::host::Host;
use crate::lock::stores::{Removed, Spot, Standing};
use crate::report::{self, visible};
use crate::terraform::lock_info::is_lock_id;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks release                         the only lock that stands for this directory
  tf locks release --dry-run
  tf locks release green --yes --reason 'runner 7 was reclaimed'
  tf locks release --force 5e75cb05-d70c-4132-39e0-d2abba1b3077

A lock whose holder is proven dead goes. One whose holder is likely dead goes when you say so. One whose holder is alive,
or of which nothing is known, stays, unless you force it by its full ID.

Exit codes: 0 it is gone, 2 it would go (--dry-run), 1 it stands.";

/// The question.
const LIKELY: &str = "its holder is likely dead, which is no proof. Release it?";

#[derive(Args, Clone, Debug)]
pub(super) struct Release {
    /// The lock: its ID, its path (bucket/key), or a workspace; without it, the only one that stands
    #[arg(value_name = "PATH|ID")]
    lock: Option<String>,
    #[command(flatten)]
    place: Where,
    /// Release the lock with this full ID, whatever is believed of its holder
    #[arg(long, value_name = "ID")]
    force: Option<String>,
    /// Answer yes where it would ask
    #[arg(long, short)]
    yes: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Why, for the history
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Its dead run is finished, as `tf locks recover` does.
    Finish,
    /// It is deleted.
    Delete,
    /// A person is asked first.
    Ask,
    /// It stays.
    Refuse,
}

/// What to do about a lock. `terminal`: there is somebody to ask.
fn decide(verdict: Verdict, forced: bool, yes: bool, terminal: bool) -> Step {
    match verdict {
        Verdict::Dead => Step::Finish,
        _ if forced => Step::Delete,
        Verdict::LikelyDead if yes => Step::Delete,
        Verdict::LikelyDead if terminal => Step::Ask,
        Verdict::LikelyDead | Verdict::Unknown | Verdict::Alive => Step::Refuse,
    }
}

impl Release {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        if let Some(id) = self.force.as_deref().filter(|id| !is_lock_id(id)) {
            return Err(Trouble::Said(format!(
                "--force takes the full ID of a lock, and {:?} is none\n`tf locks` shows the IDs of those that stand",
                visible(id)
            )));
        }
        super::block_on(async {
            let reach = self.place.reach().await?;
            let lock = choose(&reach, self.lock.as_deref().or(self.force.as_deref())).await?;
            if let Some(id) = self.force.as_deref().filter(|id| *id != lock.info.id) {
                return Err(Trouble::Said(format!(
                    "the lock that stands there is not {id}, but {}: nothing was released",
                    visible(&lock.info.id)
                )));
            }
            let terminal = std::io::stdin().is_terminal();
            let step = decide(lock.verdict(), self.force.is_some(), self.yes, terminal);
            report::print(&show::description(&lock, Timestamp::now()));
            if self.dry_run {
                return Ok(Self::dry(&lock, step));
            }
            match step {
                Step::Finish => self.finish(&reach, &lock).await,
                Step::Refuse => {
                    self.remember(What::Refused, &lock);
                    Ok(Self::refuse(&lock))
                }
                Step::Delete => self.delete(&reach, &lock).await,
                Step::Ask if agreement::is_given(LIKELY) => self.delete(&reach, &lock).await,
                Step::Ask => {
                    report::say("it was left alone");
                    Ok(Finding::Failed)
                }
            }
        })
    }

    fn dry(lock: &Found, step: Step) -> Finding {
        match step {
            Step::Finish | Step::Delete => report::print("it would be released"),
            Step::Ask => report::print("it would be released once you agree"),
            Step::Refuse => return Self::refuse(lock),
        }
        Finding::Stale
    }

    /// For the history.
    fn remember(&self, what: What, lock: &Found) {
        let why = format!("its holder is {}: {}", lock.verdict().words(), lock.judgement.reason);
        let path = lock.path();
        history::record(&Event::of_standing(what, By::Command, &lock.info, &path, &why, self.reason.as_deref()));
    }

    fn refuse(lock: &Found) -> Finding {
        let reason = &lock.judgement.reason;
        let text = match lock.verdict() {
            Verdict::Alive => format!("not released: its holder is alive, {reason}"),
            Verdict::LikelyDead => format!("not released: its holder is likely dead ({reason})"),
            Verdict::Unknown | Verdict::Dead => {
                format!("not released: nothing proves that its holder is dead ({reason})")
            }
        };
        report::say(&format!("{text}\n{}", show::next_step(lock)));
        Finding::Failed
    }

    /// Its run is dead: what `tf locks recover` does for all of them is done for this one. That waits for writes that are
    /// on their way, and knows more about the run than we.
    async fn finish(&self, reach: &Reach, lock: &Found) -> Result<Finding, Trouble> {
        let host = Host::look();
        if let Some(run) = host.dead_run(&lock.info.id) {
            super::recover::in_a_process(run, self.reason.as_deref())?;
            let mut still = false;
            for (spot, standing) in &lock.halves {
                still |= read(reach, spot).await?.as_ref() == Some(standing);
            }
            if still {
                report::say("its run was not finished; what was said above tells why");
                return Ok(Finding::Failed);
            }
            return Ok(Finding::Nothing);
        }
        self.delete(reach, lock).await
    }

    /// Deletes each half, on condition that it is what was shown.
    async fn delete(&self, reach: &Reach, lock: &Found) -> Result<Finding, Trouble> {
        for (spot, shown) in &lock.halves {
            let now = read(reach, spot).await?;
            if now.as_ref().is_some_and(|now| now != shown) {
                return self.changed(reach, lock).await;
            }
        }
        // Whoever was asked took his time, and the holder may have come back to life, or somebody may have begun to
        // finish it.
        let mut again = vec![Entry::Lock(Box::new(lock.clone()))];
        Staleness::default().judge(&mut again, &Host::look());
        if let Some(Entry::Lock(again)) = again.first()
            && decide(again.verdict(), self.force.is_some(), true, true) == Step::Refuse
        {
            self.remember(What::Refused, again);
            return Ok(Self::refuse(again));
        }
        let mut gone = true;
        let mut half = "";
        for (spot, shown) in &lock.halves {
            let place = visible(&spot.describe());
            match reach.stores.remove(spot, shown).await {
                Ok(Removed::Gone) => half = "\nits other half is deleted: the lock keeps others out all the same",
                Ok(Removed::Anothers) => gone = false,
                Ok(Removed::Refused) => {
                    return Err(Trouble::Said(format!(
                        "{place} refuses to delete what stands there, though it has not changed\nlook at it by hand"
                    )));
                }
                Err(failure) => {
                    let trouble = Trouble::failed(failure, &place, &reach.stores);
                    return Err(if half.is_empty() { trouble } else { Trouble::Said(format!("{trouble}{half}")) });
                }
            }
        }
        if !gone {
            return self.changed(reach, lock).await;
        }
        let agreed = matches!(lock.verdict(), Verdict::Dead | Verdict::LikelyDead);
        self.remember(if agreed { What::Released } else { What::Forced }, lock);
        report::print(&format!("released the lock {}", visible(&lock.info.id)));
        Ok(Finding::Nothing)
    }

    /// Another lock stands there by now.
    async fn changed(&self, reach: &Reach, lock: &Found) -> Result<Finding, Trouble> {
        report::say("it changed in between, and what stands there now was left alone:");
        let path = lock.path();
        match choose(reach, Some(&path)).await {
            Ok(now) => report::print(&show::description(&now, Timestamp::now())),
            Err(trouble) => report::say(&trouble.to_string()),
        }
        Ok(Finding::Failed)
    }
}

async fn read(reach: &Reach, spot: &Spot) -> Result<Option<Standing>, Trouble> {
    let failed = |failure| Trouble::failed(failure, &visible(&spot.describe()), &reach.stores);
    reach.stores.read(spot).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_dead_go_unasked_and_the_living_only_by_force() {
        for forced in [false, true] {
            for yes in [false, true] {
                for terminal in [false, true] {
                    let step = |verdict| decide(verdict, forced, yes, terminal);
                    assert_eq!(step(Verdict::Dead), Step::Finish);
                    for verdict in [Verdict::Alive, Verdict::Unknown] {
                        assert_eq!(step(verdict), if forced { Step::Delete } else { Step::Refuse });
                    }
                    let expected = match (forced || yes, terminal) {
                        (true, _) => Step::Delete,
                        (false, true) => Step::Ask,
                        (false, false) => Step::Refuse,
                    };
                    assert_eq!(step(Verdict::LikelyDead), expected);
                }
            }
        }
    }
}
