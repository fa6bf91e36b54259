//! `tf locks release`: does what `terraform force-unlock` does, but checks the lock's holder first.
//!
//! It deletes exactly what it showed, byte for byte. After the user's answer, right before the delete, it judges the
//! evidence again. A lock that was released and acquired again in the meantime is another lock: it is shown and not
//! deleted.

use std::io::IsTerminal;

use clap::Args;
use jiff::Timestamp;
use tokio::time::sleep;

use super::choose::{Choice, choose};
use super::connection::{Connection, LocationArgs, Trouble};
use super::found::{FoundLock, ListedEntry, UnreadableLock};
use super::staleness::Staleness;
use super::stop_requests::unless_stopped;
use super::{Finding, agreement, show};
use crate::aws::failure::Failure;
use crate::cleanup::{messages, takeover_process};
use crate::console;
use crate::console::{visible, visible_whole};
use crate::holder::evidence::{Judgement, Verdict};
use crate::holder::host::HostView;
use crate::holder::next_step::ReportKind;
use crate::journal::history;
use crate::journal::history::{By, LockEvent, What};
use crate::lease::observed::ObservedLease;
use crate::lease::takeover::TakeStage;
use crate::lock::leased::LeaseRead;
use crate::lock::release_step::QUIET_WINDOW;
use crate::lock::stores::{Removed, StoreKey, StoredLock};
use crate::lock::takeover::{self, Taken};
use crate::sys::signals::Uninterrupted;
use crate::terraform::lock_info::LockInfo;

pub(super) const EXAMPLES: &str = "Examples:
  tf locks release                         the only lock of this directory
  tf locks release --dry-run
  tf locks release green --yes --reason 'runner 7 was reclaimed'
  tf locks release --force 5e75cb05-d70c-4132-39e0-d2abba1b3077

If the holder is proven dead, the lock is released. If the holder is likely dead, tf asks you first. If the holder is
alive or its state is unknown, the lock is not released, unless you pass --force with its full ID. If the stored item or
object is not a terraform lock, tf asks you before it deletes that. Where tf cannot ask, it releases only after --yes.

Exit codes: 0 released, 2 it would be released (--dry-run), 1 not released, or every run is still refused.";

/// The question before the release of a lock whose holder is likely dead.
const LIKELY: &str = "the holder is likely dead, but that is not proven. Release it?";
/// The question before the deletion of an entry that is not a lock.
const NO_LOCK: &str = "it is not a terraform lock, and every run is refused because of it. Delete it?";
/// The question before the deletion of an object that a test of the service has put.
const TEST_OBJECT: &str = "it is not a terraform lock, and tf removes such an object within seconds. Delete it?";

/// How often a forced release claims a lock whose holder renews its lease at the same time.
const CLAIM_ATTEMPTS: u32 = 5;

#[derive(Args, Clone, Debug)]
pub(super) struct Release {
    /// The lock's ID, path (bucket/key) or workspace (default: the only lock there is). With --table or --bucket: its
    /// path
    #[arg(value_name = "PATH|ID")]
    lock: Option<String>,
    #[command(flatten)]
    place: LocationArgs,
    /// Release the lock with this full ID, even if its holder is alive or unknown
    #[arg(long, value_name = "ID")]
    force: Option<String>,
    /// Only delete an item or object that is in a lock's place and is not a lock
    #[arg(long, conflicts_with = "force")]
    no_lock: bool,
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
    /// Only print what would be done
    #[arg(long)]
    dry_run: bool,
    /// The reason, for the history
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

/// What to do with a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Recover the dead run that held the lock, as `tf locks recover` does. If this host has no record of that run,
    /// delete the lock.
    Finish,
    /// Delete the lock.
    Delete,
    /// Ask the user, and delete the lock if the answer is yes.
    Ask,
    /// Do not release the lock.
    Refuse,
}

/// The result of a look at a lock right before its delete.
enum Again {
    /// It is still what was shown. With `--force`, its lease record may be another one: these are its parts as they are
    /// now.
    Same(Vec<(StoreKey, StoredLock)>),
    Changed,
    /// Its holder is now judged otherwise, so that the lock may not be deleted.
    NotAllowed(Box<FoundLock>),
}

/// How far the user agrees to a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Consent {
    /// `--force` with the full ID. The user agrees, whatever is known about the holder.
    Forced,
    /// `--yes`, or the user has answered yes. The user agrees if the holder is likely dead.
    Given,
    /// The user can be asked, because stdin is a terminal.
    CanBeAsked,
    /// Nobody can be asked.
    None,
}

/// Decides what to do with a lock.
fn decide(verdict: Verdict, consent: Consent) -> Step {
    match (verdict, consent) {
        (Verdict::Dead, _) => Step::Finish,
        (_, Consent::Forced) | (Verdict::LikelyDead, Consent::Given) => Step::Delete,
        (Verdict::LikelyDead, Consent::CanBeAsked) => Step::Ask,
        (Verdict::LikelyDead | Verdict::Unknown | Verdict::Alive, _) => Step::Refuse,
    }
}

/// Decides whether a lock may still be deleted, right before the delete. `shown` is the verdict for which [`decide`]
/// returned a step that deletes, and `now` is the verdict of this moment. A user who was asked has said yes to a lock
/// whose holder is likely dead; nobody was asked about a lock whose holder was proven dead.
fn is_still_allowed(shown: Verdict, now: Verdict, consent: Consent) -> bool {
    let consent = match consent {
        Consent::CanBeAsked if shown == Verdict::LikelyDead => Consent::Given,
        other => other,
    };
    matches!(decide(now, consent), Step::Finish | Step::Delete)
}

/// Whether a witness alone has proven that the holder is dead. The holder may have died a moment ago, and this host has
/// no log that says which of its writes were answered.
fn is_proven_by_a_witness(judgement: &Judgement) -> bool {
    judgement.verdict == Verdict::Dead && !judgement.is_settled
}

impl Release {
    fn consent(&self) -> Consent {
        if self.force.is_some() {
            Consent::Forced
        } else if self.yes {
            Consent::Given
        } else if std::io::stdin().is_terminal() {
            Consent::CanBeAsked
        } else {
            Consent::None
        }
    }

    pub(super) fn run(self) -> Result<Finding, Trouble> {
        super::block_on(async {
            let chosen = async {
                let reach = self.place.reach().await?;
                let chosen = choose(&reach, self.lock.as_deref().or(self.force.as_deref()), self.no_lock).await?;
                Ok((reach, chosen))
            };
            let (reach, chosen) = unless_stopped(Box::pin(chosen)).await?;
            let (lock, junk) = match chosen {
                Choice::Lock(lock, junk) => (lock, junk),
                Choice::NoLock(junk) => return self.remove(&reach, &junk).await,
            };
            let is_it = |id: &str| id == lock.info.id || id == visible_whole(&lock.info.id);
            if let Some(id) = self.force.as_deref().filter(|id| !is_it(id)) {
                return Err(Trouble::Said(format!(
                    "not released: {} is not the full ID of the lock\n--force takes the full ID, which is {}",
                    visible(id),
                    visible(&lock.info.id)
                )));
            }
            let step = decide(lock.verdict(), self.consent());
            console::print(&show::description(&lock, Timestamp::now()));
            if self.dry_run {
                return Ok(self.dry(&lock, step));
            }
            // Only the lock of a dead holder can be one that this host has recorded.
            let host = matches!(step, Step::Finish).then(HostView::look);
            let recorded =
                host.filter(|host| host.dead_run(&lock.info.id).is_some() || host.was_had_late(&lock.info.id));
            let released = match step {
                Step::Finish if let Some(host) = &recorded => self.finish(&reach, &lock, host).await,
                Step::Refuse => {
                    self.remember(What::Refused, &lock);
                    Ok(self.refuse(&lock, lock.verdict()))
                }
                Step::Finish | Step::Delete => self.delete(&reach, &lock).await,
                Step::Ask if agreement::is_given(LIKELY) => self.delete(&reach, &lock).await,
                Step::Ask => {
                    console::say("not released");
                    Ok(Finding::Failed)
                }
            };
            match (released, junk.first()) {
                // The lock is released, but the entry that is not a lock still blocks every run.
                (Ok(Finding::Nothing), Some(first)) => {
                    let found = messages::next_step::NoLock {
                        place: &first.place.describe(),
                        what: &first.reason,
                        path: &first.place.path(),
                    };
                    console::say(&messages::next_step::refused_by_no_lock(
                        &found,
                        &self.place.command(messages::next_step::RELEASE_NO_LOCK),
                    ));
                    Ok(Finding::Failed)
                }
                (Ok(Finding::Nothing), None) if let Some(rival) = &lock.rival => {
                    // In a table, a path selects a lock.
                    let name = if self.place.is_outside() { lock.path() } else { rival.clone() };
                    console::say(&format!(
                        "every run is still refused, because the other part of this lock is another lock, ID {}\nfor \
                         details, type: {} {}",
                        visible(rival),
                        self.place.command("show"),
                        console::argument(&name)
                    ));
                    Ok(Finding::Failed)
                }
                // A recovery looks at both parts.
                (Ok(Finding::Nothing), None) if self.place.bucket.is_some() && recorded.is_none() => {
                    console::say(&format!(
                        "tf has looked at the object alone: if the backend names a DynamoDB table too, every run may still \
                         be refused by the item there\nto release that, replace TABLE with its name and type: {} {}",
                        self.place.in_a_table("TABLE").command("release"),
                        console::argument(&lock.path())
                    ));
                    Ok(Finding::Nothing)
                }
                (released, _) => released,
            }
        })
    }

    /// Deletes entries that are not locks, after the user has agreed, on condition that they are still what was read.
    ///
    /// # Errors
    /// Fails if an entry could not be read or is a terraform state, if the user cannot be asked, or if the service does
    /// not delete an entry.
    async fn remove(&self, reach: &Connection, junk: &[UnreadableLock]) -> Result<Finding, Trouble> {
        for junk in junk {
            console::print(&show::description_of_junk(junk));
        }
        if let Some(unread) = junk.iter().find(|junk| junk.is_unread()) {
            return Err(Trouble::Said(format!("not released, because this could not be read: {}", unread.describe())));
        }
        if let Some(state) = junk.iter().find(|junk| junk.stored.as_ref().is_some_and(StoredLock::is_state)) {
            return Err(Trouble::Said(format!(
                "not released: {} is a terraform state\nmove the state to the place where it belongs",
                visible(&state.place.describe())
            )));
        }
        if self.dry_run {
            console::print("it would be released after you confirm");
            return Ok(Finding::Stale);
        }
        if !self.yes && !std::io::stdin().is_terminal() {
            return Err(Trouble::Said(
                "not released: stdin is not a terminal, so tf cannot ask\nto release it, add --yes".into(),
            ));
        }
        let question = if junk.iter().all(UnreadableLock::is_test_object) { TEST_OBJECT } else { NO_LOCK };
        if !self.yes && !agreement::is_given(question) {
            console::say("not released");
            return Ok(Finding::Failed);
        }
        for UnreadableLock { place, reason, stored } in junk {
            let Some(stored) = stored else { continue };
            let shown = visible(&place.describe());
            match reach.stores.remove(place, stored).await {
                Ok(Removed::GoneBefore) => console::print(&format!("{shown} is gone: another process deleted it")),
                Ok(Removed::Gone(_)) => {
                    let event = LockInfo::default();
                    let reason_given = self.reason.as_deref();
                    let why = format!("it was not a lock: {reason}");
                    let event =
                        LockEvent::of_lock(What::Forced, By::Command, &event, &place.path(), &why, reason_given);
                    history::record(&event);
                    console::print(&format!("released {shown}"));
                }
                Ok(Removed::Anothers) => {
                    console::say(&format!("not released, because it changed in the meantime: {shown}"));
                    return Ok(Finding::Failed);
                }
                Ok(Removed::Refused) => return Err(refuses_to_delete(&shown)),
                Err(failure) => return Err(Trouble::failed(failure, &shown, &reach.stores)),
            }
        }
        Ok(Finding::Nothing)
    }

    fn dry(&self, lock: &FoundLock, step: Step) -> Finding {
        match step {
            Step::Finish | Step::Delete => console::print("it would be released"),
            Step::Ask => console::print("it would be released after you confirm"),
            Step::Refuse => return self.refuse(lock, lock.verdict()),
        }
        Finding::Stale
    }

    /// Records in the history that `what` happened to the lock.
    fn remember(&self, what: What, lock: &FoundLock) {
        let why = format!("{}: {}", lock.verdict().of_the_holder(), lock.judgement().reason);
        let path = lock.path();
        history::record(&LockEvent::of_lock(what, By::Command, &lock.info, &path, &why, self.reason.as_deref()));
    }

    /// Reports that the lock is not released, and why. `shown` is the verdict that the user saw.
    fn refuse(&self, lock: &FoundLock, shown: Verdict) -> Finding {
        let reason = &lock.judgement().reason;
        let text = match lock.verdict() {
            Verdict::LikelyDead if shown == Verdict::Dead => {
                format!("not released: it is no longer proven that the holder is dead\n{reason}")
            }
            Verdict::Alive => format!("not released: the holder is alive\n{reason}"),
            // If the holder is likely dead, the release is refused only if `tf` cannot ask.
            Verdict::LikelyDead => format!(
                "not released: stdin is not a terminal, so tf cannot ask\n\
                 the holder is likely dead, but that is not proven: {reason}"
            ),
            Verdict::Unknown | Verdict::Dead => {
                format!("not released: nothing proves that the holder is dead\n{reason}")
            }
        };
        let kind = ReportKind::NotReleased { can_ask: std::io::stdin().is_terminal() };
        console::say(&format!("{text}\n{}", show::next_step(lock, kind, &self.place)));
        Finding::Failed
    }

    /// Releases a lock of a dead run that this host has recorded. If the journal has a record of that run, recovers the
    /// run, as `tf locks recover` does for all dead runs, because recovery waits for writes in flight and knows more
    /// about the run. If there is only a pending request for a lock that the run held, recovers all dead runs.
    ///
    /// Returns [`Finding::Failed`] if a part of the lock still exists unchanged after the recovery.
    async fn finish(&self, reach: &Connection, lock: &FoundLock, host: &HostView) -> Result<Finding, Trouble> {
        super::recover::in_a_process(host.dead_run(&lock.info.id), self.reason.as_deref())?;
        for (store_key, stored) in &lock.parts {
            if read(reach, store_key).await?.is_some_and(|now| now.is_same_lock(stored)) {
                console::say("not released; the messages above say why");
                return Ok(Finding::Failed);
            }
        }
        Ok(Finding::Nothing)
    }

    /// Deletes every part of the lock, each on condition that it is still what was shown.
    async fn delete(&self, reach: &Connection, lock: &FoundLock) -> Result<Finding, Trouble> {
        let parts = match unless_stopped(Box::pin(self.check_again(reach, lock))).await? {
            Again::Same(parts) => parts,
            Again::Changed => return self.changed(reach, lock).await,
            Again::NotAllowed(again) => {
                self.remember(What::Refused, &again);
                return Ok(self.refuse(&again, lock.verdict()));
            }
        };
        match self.claim(reach, lock).await? {
            Some(Taken::Gone(_)) => return Ok(self.was_released(lock)),
            Some(Taken::Changed) => return self.changed(reach, lock).await,
            None => {}
        }
        let (mut gone, mut is_ours) = (true, false);
        let mut half = "";
        for (store_key, shown) in &parts {
            let place = visible(&store_key.describe());
            match reach.stores.remove(store_key, shown).await {
                Ok(removed @ (Removed::Gone(_) | Removed::GoneBefore)) => {
                    is_ours |= removed != Removed::GoneBefore;
                    half = HALF;
                }
                Ok(Removed::Anothers) => gone = false,
                Ok(Removed::Refused) => return Err(refuses_to_delete(&place)),
                Err(failure) => {
                    let trouble = Trouble::failed(failure, &place, &reach.stores);
                    return Err(if half.is_empty() { trouble } else { Trouble::Said(format!("{trouble}{half}")) });
                }
            }
        }
        if !gone {
            return self.changed(reach, lock).await;
        }
        if !is_ours {
            // It is no event of this command, so the history does not get it.
            console::print(&format!("the lock {} is gone: another process released it", visible(&lock.info.id)));
            return Ok(Finding::Nothing);
        }
        Ok(self.was_released(lock))
    }

    /// Reads the lock and judges its holder again, right before the delete. If only a witness has proven that the holder
    /// is dead, waits first for a write that may still arrive.
    async fn check_again(&self, reach: &Connection, lock: &FoundLock) -> Result<Again, Trouble> {
        if self.force.is_none() && is_proven_by_a_witness(lock.judgement()) {
            console::say(&format!(
                "the holder's last write may still arrive; waiting {} s before releasing the lock",
                QUIET_WINDOW.as_secs()
            ));
            sleep(QUIET_WINDOW).await;
        }
        let mut parts = lock.parts.clone();
        for (store_key, shown) in &mut parts {
            match read(reach, store_key).await? {
                Some(now) if now == *shown => {}
                // A holder that is alive renews its lease, so the object changes. `--force` means this holder too.
                Some(now) if self.force.is_some() && now.is_same_lock(shown) => *shown = now,
                Some(_) => return Ok(Again::Changed),
                None => {}
            }
        }
        // The answer may have taken long. The holder may be alive after all by now, or another process may have begun
        // to recover its run. So the witness is asked again too, if its answer counts.
        let mut again = vec![ListedEntry::Lock(Box::new(lock.clone()))];
        Staleness::default().judge(&mut again, &HostView::look());
        if self.force.is_none() {
            Staleness::default().ask_witness(&mut again).await;
        }
        match again.pop() {
            Some(ListedEntry::Lock(again)) if !is_still_allowed(lock.verdict(), again.verdict(), self.consent()) => {
                Ok(Again::NotAllowed(again))
            }
            _ => Ok(Again::Same(parts)),
        }
    }

    /// Releases a lock with an item that has a lease record. It is claimed first, so that a holder that renews its
    /// lease in between keeps its lock, and so that a holder that is alive (`--force`) notices it and stops. Returns
    /// `None` if the lock has no such item, or if that cannot be seen ([`needs_no_claim`]).
    async fn claim(&self, reach: &Connection, lock: &FoundLock) -> Result<Option<Taken>, Trouble> {
        let item = lock.parts.iter().find(|(store_key, _)| matches!(store_key, StoreKey::DynamoDb { .. }));
        let object = lock.parts.iter().find(|(store_key, _)| matches!(store_key, StoreKey::S3 { .. }));
        let Some((item, shown)) = item else { return Ok(None) };
        let object = object.map(|(store_key, _)| store_key);
        let failed = |failure| Trouble::failed(failure, &visible(&item.describe()), &reach.stores);
        for _ in 0..CLAIM_ATTEMPTS {
            let LeaseRead { lock: now, date } = match reach.stores.read_lease(item).await {
                Err(failure) if needs_no_claim(&failure, lock.lease.as_deref()) => return Ok(None),
                read => read.map_err(failed)?,
            };
            let (Some(now), Some(date)) = (now, date) else { return Ok(None) };
            if now.stored != *shown {
                return Ok(Some(Taken::Changed));
            }
            let Some(Ok(record)) = &now.record else { return Ok(None) };
            let shown_record = lock.lease.as_ref().and_then(|lease| lease.record.as_ref().ok());
            if self.force.is_none() && shown_record != Some(record) {
                return Ok(Some(Taken::Changed));
            }
            let by = takeover_process::by();
            // A claim without a delete stops a holder that is alive, and the lock stays.
            let uninterrupted = Uninterrupted::begin();
            let taken = takeover::release_item(&reach.stores, item, object, &now, (&by, date)).await;
            drop(uninterrupted);
            let taken = taken.map_err(|(failure, stage)| {
                let part = object.filter(|_| stage == TakeStage::Object).unwrap_or(item);
                let follows = after_failed_claim(stage, &failure, object.is_some());
                let trouble = Trouble::failed(failure, &visible(&part.describe()), &reach.stores);
                if follows.is_empty() { trouble } else { Trouble::Said(format!("{trouble}{follows}")) }
            })?;
            // A holder that is alive may renew its lease in between. `--force` means this holder too.
            if taken != Taken::Changed || self.force.is_none() {
                return Ok(Some(taken));
            }
        }
        Ok(Some(Taken::Changed))
    }

    fn was_released(&self, lock: &FoundLock) -> Finding {
        let agreed = matches!(lock.verdict(), Verdict::Dead | Verdict::LikelyDead);
        self.remember(if agreed { What::Released } else { What::Forced }, lock);
        console::print(&format!("released the lock {}", visible(&lock.info.id)));
        Finding::Nothing
    }

    /// Reports that the lock has changed since it was shown, and shows what is there now.
    async fn changed(&self, reach: &Connection, lock: &FoundLock) -> Result<Finding, Trouble> {
        console::say("not released, because it changed in the meantime; this is there now:");
        let path = lock.path();
        match choose(reach, Some(&path), false).await {
            Ok(Choice::Lock(now, _)) => console::print(&show::description(&now, Timestamp::now())),
            Ok(Choice::NoLock(junk)) => junk.iter().for_each(|junk| console::print(&show::description_of_junk(junk))),
            Err(trouble) => console::say(&trouble.to_string()),
        }
        Ok(Finding::Failed)
    }
}

/// Whether a lock is deleted without a claim although the read of its record has failed. A policy may permit only the
/// attributes that terraform itself reads. Then the lock was shown and judged as one without a lease
/// ([`Stores::read_part`](crate::lock::stores::Stores::read_part)), and is deleted as one. If it was shown with a
/// `lease`, it must be claimed.
fn needs_no_claim(failure: &Failure, lease: Option<&ObservedLease>) -> bool {
    failure.denied().is_some() && lease.is_none()
}

/// What follows if one part of a lock was deleted, and the delete of the other part has failed.
const HALF: &str = "\nthe other part of the lock was deleted, but this part still refuses every run";

/// Returns what is true after a request of the step `stage` has failed with `failure`: empty, or lines that begin with
/// a line feed. A claim that the service has refused is not stored. `has_object` is whether the lock had an object.
fn after_failed_claim(stage: TakeStage, failure: &Failure, has_object: bool) -> String {
    const STOPS: &str = "its holder cannot renew the lease, and terraform is stopped if it is still running";
    match (stage, failure.is_final(), has_object) {
        (TakeStage::Claim, true, _) => String::new(),
        (TakeStage::Claim, false, _) => format!("\nthe lock may be claimed now: if it is, {STOPS}"),
        (TakeStage::Item, _, true) => format!("{HALF}\nthe lock is claimed now: {STOPS}"),
        (TakeStage::Object | TakeStage::Item, ..) => format!("\nthe lock is claimed now: {STOPS}"),
    }
}

/// Builds the error for a service that accepts a delete and does not carry it out.
fn refuses_to_delete(place: &str) -> Trouble {
    Trouble::Said(format!(
        "not released: {place}\nthe service does not delete it, although it has not changed\ntry again later; if that does \
         not help, ask the operator of that service"
    ))
}

async fn read(reach: &Connection, store_key: &StoreKey) -> Result<Option<StoredLock>, Trouble> {
    let failed = |failure| Trouble::failed(failure, &visible(&store_key.describe()), &reach.stores);
    reach.stores.read(store_key).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aws::failure::ServiceAnswer;
    use crate::lease::observed::tests::lease;
    use crate::lease::record::Promise;

    /// With [`crate::holder::witness`], `shown` and `now` are the verdicts after its first and its second answer.
    #[test]
    fn a_lock_is_deleted_only_if_the_last_verdict_allows_it_as_the_shown_one_did() {
        const CONSENTS: [Consent; 4] = [Consent::Forced, Consent::Given, Consent::CanBeAsked, Consent::None];
        for shown in Verdict::ALL {
            for now in Verdict::ALL {
                for consent in CONSENTS {
                    let expected = match (now, consent) {
                        (_, Consent::Forced) | (Verdict::Dead, _) | (Verdict::LikelyDead, Consent::Given) => true,
                        // The user has agreed to exactly this.
                        (Verdict::LikelyDead, Consent::CanBeAsked) => shown == Verdict::LikelyDead,
                        _ => false,
                    };
                    assert_eq!(is_still_allowed(shown, now, consent), expected, "{shown:?} {now:?} {consent:?}");
                }
            }
        }
    }

    #[test]
    fn a_lock_whose_record_may_not_be_read_is_deleted_without_a_claim_only_if_it_was_shown_without_a_lease() {
        let answer = ServiceAnswer { code: Some("AccessDeniedException"), message: None, status: Some(400) };
        let denied = Failure::of_answer("DynamoDB", "dynamodb:GetItem", answer, "");
        let lease = lease("id", 40, None, Promise::Stop);
        for (failure, expected) in
            [(denied, true), (Failure::no_answer("DynamoDB", "x"), false), (Failure::refusal("DynamoDB", "x"), false)]
        {
            assert_eq!(needs_no_claim(&failure, None), expected, "{failure}");
            assert!(!needs_no_claim(&failure, Some(&lease)), "{failure}");
        }
    }

    #[test]
    fn a_failure_after_the_claim_says_that_the_holder_stops_and_which_part_is_gone() {
        for stage in [TakeStage::Claim, TakeStage::Object, TakeStage::Item] {
            for (is_final, has_object) in [(false, false), (false, true), (true, false), (true, true)] {
                let failure = if is_final { Failure::refusal("S3", "x") } else { Failure::no_answer("S3", "x") };
                let said = after_failed_claim(stage, &failure, has_object);
                let is_claim = stage == TakeStage::Claim;
                assert_eq!(said.contains("the lock is claimed now"), !is_claim, "{said}");
                assert_eq!(said.contains("the lock may be claimed now"), is_claim && !is_final, "{said}");
                assert_eq!(said.contains(HALF), stage == TakeStage::Item && has_object, "{said}");
                assert_eq!(said.is_empty(), is_claim && is_final, "{said}");
                assert!(said.is_empty() || said.starts_with('\n'), "{said}");
            }
        }
    }

    #[test]
    fn only_the_dead_go_unasked_and_the_living_only_by_force() {
        for (consent, likely_dead) in [
            (Consent::Forced, Step::Delete),
            (Consent::Given, Step::Delete),
            (Consent::CanBeAsked, Step::Ask),
            (Consent::None, Step::Refuse),
        ] {
            assert_eq!(decide(Verdict::Dead, consent), Step::Finish);
            assert_eq!(decide(Verdict::LikelyDead, consent), likely_dead);
            for verdict in [Verdict::Alive, Verdict::Unknown] {
                let expected = if consent == Consent::Forced { Step::Delete } else { Step::Refuse };
                assert_eq!(decide(verdict, consent), expected, "{verdict:?} {consent:?}");
            }
        }
    }
}
