//! Giving a lock back: read, judge, delete on condition of exactly what was read; each half by itself.
//!
//! DynamoDB first and `.tflock` last, the reverse of taking, so that no contender gets half in. Both are tried even if
//! the other fails.
//!
//! Two things can still be on their way from a terraform that died. A *lock request* that was not answered can land
//! after we looked: so an absent half is looked for again, for [`LATE`]. A *write*, of the state or of the unlock's own
//! deletes, carries no condition and would hit whoever comes next: so the lock is kept until everything that such a
//! write would change has been seen unchanged for [`QUIET`].

use std::time::Duration;

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use tokio::time::{Instant, sleep};

use super::causes::causes;
use super::digest::Comparison;
use super::place::Place;
use super::proof::{Run, Verdict, judge, judge_unnamed};
use super::stores::{Spot, Standing, Stores};
use super::{aws, digest, dynamodb, s3};
use crate::crash_point;
use crate::report;
use crate::settings::release_is_asked_for;
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::{Halves, Mark, RecordedLock, UnnamedLock};
use crate::trace::trace;

/// For how long a lock that was asked for, and not seen, is looked for.
const LATE: Duration = Duration::from_secs(5);

/// For how long nothing may have changed before the lock of a terraform that died while writing is given back.
const QUIET: Duration = Duration::from_secs(10);

/// For how long a service that fails is asked again: not longer than a person would wait.
const PATIENCE: Duration = Duration::from_secs(20);

/// For how long a write is waited for at most: somebody may go on writing there without a lock.
const LONGEST_QUIET: Duration = Duration::from_mins(1);

/// Between two looks at the same thing.
const LOOK: Duration = Duration::from_millis(250);

/// What a conditional delete did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deleted {
    /// It is gone, by us.
    Yes,
    /// It is no longer the one that was read: to be read again. Gone, another's, or our own delete, whose answer was
    /// lost, so that the SDK sent it twice.
    Changed,
}

/// A request that did not work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{service}: {reason}")]
pub(crate) struct Failure {
    service: &'static str,
    reason: String,
    /// Asking again cannot help: the service understood, and refused.
    refused: bool,
    /// The action that these credentials may not do.
    denied: Option<&'static str>,
}

impl Failure {
    /// A response that tells nothing. The next one may.
    pub(super) fn unsure(service: &'static str, reason: &str) -> Self {
        Self { service, reason: reason.to_owned(), refused: false, denied: None }
    }

    /// Something that asking again cannot mend.
    fn refusal(service: &'static str, reason: &str) -> Self {
        Self { service, reason: reason.to_owned(), refused: true, denied: None }
    }

    /// The action, as a policy names it, that these credentials may not do.
    pub(crate) fn denied(&self) -> Option<&'static str> {
        self.denied
    }

    /// What went wrong with a request for `action`, which a policy names so.
    pub(crate) fn of_request<E>(service: &'static str, action: &'static str, error: &SdkError<E>) -> Self
    where
        E: std::error::Error + ProvideErrorMetadata + 'static,
    {
        let status = error.raw_response().map(|response| response.status().as_u16());
        Self::of_action(service, action, (error.code(), error.message(), status), &causes(error))
    }

    /// What went wrong with `action`, which a policy names so: `code` and `message` are the service's own, `status` is that
    /// of HTTP, and `otherwise` tells what happened where the service said nothing.
    pub(crate) fn of_action(
        service: &'static str,
        action: &'static str,
        (code, message, status): (Option<&str>, Option<&str>, Option<u16>),
        otherwise: &str,
    ) -> Self {
        // What answers a HEAD has no body to say more in. It may be a clock or a signature as well, and is asked again.
        if (code, message, status) == (None, None, Some(403)) {
            return Self::new(
                service,
                None,
                Some(&format!("403, without a reason: {action} may be missing")),
                otherwise,
            );
        }
        // Who the credentials are of may be refused as well, before the action is asked for: there is no code then.
        let denied = code.is_some_and(|code| code.contains("AccessDenied"));
        Self { denied: denied.then_some(action), ..Self::new(service, code, message, otherwise) }
    }

    /// Whether the service understood and refused.
    pub(crate) fn is_refusal(&self) -> bool {
        self.refused
    }

    /// `code` and `message` are the service's own; `otherwise` tells what happened where it said nothing.
    pub(crate) fn new(service: &'static str, code: Option<&str>, message: Option<&str>, otherwise: &str) -> Self {
        let refused = code.is_some_and(|code| {
            [
                "AccessDenied",
                "NotFound",
                "NoSuchBucket",
                "InvalidSignature",
                "SignatureDoesNotMatch",
                "Validation",
                "UnrecognizedClient",
                "InvalidAccessKeyId",
            ]
            .iter()
            .any(|refusal| code.contains(refusal))
        });
        // A role that may not be assumed is no one's for a while. STS says so within the SDK's own error.
        let refused = refused || (code.is_none() && otherwise.contains("cannot be assumed: AccessDenied"));
        let reason = match (code, message) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => code.to_owned(),
            (None, Some(message)) => message.to_owned(),
            (None, None) => otherwise.to_owned(),
        };
        Self { service, reason, refused, denied: None }
    }
}

/// What is known of the run whose lock is to be given back.
#[derive(Clone, Debug)]
pub(crate) struct Situation {
    /// For the proof.
    pub(crate) run: Run,
    /// A request for the lock can still be on its way: terraform has died just now. One that ended by itself had its
    /// answers.
    pub(crate) request_may_land: bool,
    /// A write of it can still be on its way.
    pub(crate) write_may_land: bool,
}

/// How giving a lock back came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// No lock of ours stood. `anothers` is the ID that stands there, if one does.
    Absent {
        /// Somebody else's lock at the same place.
        anothers: Option<String>,
    },
    /// It stood, and is gone.
    Released(Released),
    /// It stands, or may, and why.
    Kept {
        /// What is told of it.
        reason: String,
        /// Whether a later try may do better: a service was not to be reached, somebody still lived.
        later: bool,
    },
}

impl Outcome {
    /// Kept, and nothing that we could do later would change that.
    pub(crate) fn kept(reason: impl Into<String>) -> Self {
        Self::Kept { reason: reason.into(), later: false }
    }

    /// Why it is kept.
    pub(crate) fn reason(&self) -> Option<&str> {
        match self {
            Self::Kept { reason, .. } => Some(reason),
            Self::Absent { .. } | Self::Released(_) => None,
        }
    }

    /// Kept for now.
    pub(crate) fn later(reason: impl Into<String>) -> Self {
        Self::Kept { reason: reason.into(), later: true }
    }
}

/// What is told of a lock that was given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Released {
    /// `Created` of the lock.
    pub(crate) created: Option<jiff::Timestamp>,
    /// A write was waited for: what was seen of it.
    pub(crate) write: Option<Write>,
    /// The state and its digest, where they do not fit any more.
    pub(crate) unfit: Option<Comparison>,
}

/// What became of a write that was on its way when terraform died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// The state changed while we waited.
    Landed,
    /// Nothing changed for as long as we waited.
    Quiet,
}

/// One place, and the services that it is in, as the run reached them.
struct Services<'a> {
    place: &'a Place,
    stores: Stores,
    /// Where its halves can stand.
    halves: Vec<Spot>,
}

impl<'a> Services<'a> {
    async fn connect(place: &'a Place) -> Result<Self, aws::Unreachable> {
        let stores = Stores::connect(&place.backend).await?;
        Ok(Self { place, halves: place.spots(&stores), stores })
    }

    /// Everything that a write of terraform's changes, as one text: the state, its digest, the lock itself.
    async fn fingerprint(&self) -> Result<[String; 2], Failure> {
        let state = s3::fingerprint(&self.stores.s3, &self.place.bucket, &self.place.key).await?;
        let digest = match &self.place.table {
            Some(table) => dynamodb::digest(&self.stores.dynamodb, table, &self.place.lock_path()).await?,
            None => None,
        };
        let mut lock = String::new();
        for half in &self.halves {
            lock.push_str(self.stores.read(half).await?.as_ref().map_or("- ", Standing::text));
        }
        Ok([format!("{state:?} {digest:?}"), lock])
    }
}

/// Gives back the lock that the log recorded, if it stands and is ours.
pub(crate) async fn release(recorded: &RecordedLock, place: &Place, situation: &Situation) -> Outcome {
    let mut attempt = Attempt {
        recorded,
        place,
        situation,
        begun: Instant::now(),
        asked_to_go: Vec::new(),
        created: None,
        deleted: false,
        write: None,
        agreed: release_is_asked_for(),
    };
    loop {
        match attempt.go().await {
            Ok(outcome) => return outcome,
            Err(failure) => {
                trace!("release of {}: {failure}", recorded.id);
                if failure.refused || attempt.begun.elapsed() > PATIENCE {
                    return Outcome::later(failure.to_string());
                }
                sleep(LOOK).await;
            }
        }
    }
}

/// The locks that stand at `place` now: one, or two where somebody got half in. None where nothing can be read.
pub(crate) async fn standing(place: &Place) -> Vec<LockInfo> {
    let Ok(services) = Services::connect(place).await else { return Vec::new() };
    let mut locks: Vec<LockInfo> = Vec::new();
    for half in &services.halves {
        if let Ok(Some(standing)) = services.stores.read(half).await
            && let Some(info) = standing.info()
            && !locks.contains(&info)
        {
            locks.push(info);
        }
    }
    locks
}

/// Whether the lock `id` stands at `place`, or may: also where a service did not let it be read.
pub(crate) async fn may_stand(place: &Place, id: &str) -> bool {
    let Ok(services) = Services::connect(place).await else { return true };
    for half in &services.halves {
        match services.stores.read(half).await {
            Ok(Some(standing)) if standing.info().is_none_or(|info| info.id == id) => return true,
            Ok(_) => {}
            Err(_) => return true,
        }
    }
    false
}

/// What stands at `place` of a lock that the log of its run does not name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Light {
    /// Nothing that could be it.
    None,
    /// It is it.
    Ours(Box<RecordedLock>),
    /// It may be it, and why that is not certain.
    Suspect(Box<LockInfo>, &'static str),
}

/// Looks at `place` for a lock that the log does not name.
///
/// # Errors
/// [`Failure`], when a service did not let it be read.
pub(crate) async fn bring_to_light(
    unnamed: &UnnamedLock,
    place: &Place,
    run: &Run,
    died: bool,
) -> Result<Light, Failure> {
    let unreachable = |error: aws::Unreachable| Failure::refusal("AWS", &error.to_string());
    let services = Services::connect(place).await.map_err(unreachable)?;
    let mut light = Light::None;
    for half in &services.halves {
        let Some(standing) = services.stores.read(half).await? else { continue };
        let Some(info) = standing.info() else { continue };
        if !is_lock_id(&info.id) {
            continue;
        }
        let verdict = judge_unnamed(unnamed, &info, standing.text(), run, died);
        trace!("{half:?} holds {}, which the log does not name: {verdict:?}", info.id);
        match verdict {
            Verdict::Ours => {
                let halves = Halves { s3: place.lock_file, dynamodb: place.table.is_some() };
                let mut lock = RecordedLock::held(&info, &place.bucket, &place.key, halves, unnamed.asked);
                // It was made in the moment in which it was asked for, and the log tells that moment to the millisecond.
                lock.asked = info.created().map_or(unnamed.asked, |created| created.max(unnamed.asked));
                // Of what its log does not tell anything may be under way.
                let tells = matches!(unnamed.mark, Mark::Object { .. });
                (lock.uploading, lock.unlocking) = (unnamed.uploading || !tells, unnamed.unlocking || !tells);
                return Ok(Light::Ours(Box::new(lock)));
            }
            Verdict::Doubt(reason) if info.who == run.who => light = Light::Suspect(Box::new(info), reason),
            Verdict::Doubt(_) | Verdict::Anothers => {}
        }
    }
    Ok(light)
}

/// A lock at `place` that only its own JSON connects with a run whose log is lost: the same user and host, made in the
/// time of that run. Two machines with one name pass the same test, so it is only ever named.
pub(crate) async fn suspect(place: &Place, situation: &Situation) -> Option<LockInfo> {
    let services = Services::connect(place).await.ok()?;
    for half in &services.halves {
        if let Ok(Some(standing)) = services.stores.read(half).await
            && let Some(info) = standing.info()
            && info.who == situation.run.who
            && info.created().is_some_and(|created| created >= situation.run.started)
        {
            return Some(info);
        }
    }
    None
}

/// One release, which may need several goes.
struct Attempt<'a> {
    recorded: &'a RecordedLock,
    place: &'a Place,
    situation: &'a Situation,
    begun: Instant,
    /// The halves that were ours, and were asked to go.
    asked_to_go: Vec<Spot>,
    created: Option<jiff::Timestamp>,
    /// A half is known to be gone by us.
    deleted: bool,
    write: Option<Write>,
    /// A delete here holds everywhere, or was asked for by name.
    agreed: bool,
}

impl Attempt<'_> {
    /// Credentials are resolved anew in each go: those of the run may have expired.
    async fn go(&mut self) -> Result<Outcome, Failure> {
        let services = match Services::connect(self.place).await {
            Ok(services) => services,
            Err(unreachable) if unreachable.may_pass() => return Ok(Outcome::later(unreachable.to_string())),
            Err(unreachable) => return Ok(Outcome::kept(unreachable.to_string())),
        };
        let Situation { request_may_land, write_may_land, .. } = *self.situation;
        if write_may_land && self.write.is_none() && (self.recorded.uploading || self.recorded.unlocking) {
            self.write = Some(wait_for_quiet(&services).await?);
            // The service answered all that time: patience begins anew.
            self.begun = Instant::now();
        }
        // The answer of a lock request tells that nothing is on its way any more; and so does an end by itself.
        let late_until = (request_may_land && self.recorded.locked.is_none()).then(|| self.begun + LATE);
        let mut failed = None;
        let mut kept = None;
        let mut anothers = None;
        let mut missing;
        loop {
            missing = false;
            for half in &services.halves {
                match self.half(&services, half).await {
                    Ok(Judged::Absent) => missing = true,
                    Ok(Judged::Deleted) => self.deleted = true,
                    Ok(Judged::Anothers(id)) => {
                        missing = true;
                        anothers = Some(id);
                    }
                    Ok(Judged::Doubt(reason)) => kept = Some(Outcome::kept(reason)),
                    Ok(Judged::Unasked(reason)) => kept = Some(Outcome::later(reason)),
                    Err(failure) => failed = Some(failure),
                }
            }
            let again = failed.is_none() && missing && late_until.is_some_and(|until| Instant::now() < until);
            if !again {
                break;
            }
            anothers = None;
            sleep(LOOK).await;
        }
        match (failed, kept) {
            (Some(failure), _) => Err(failure),
            (None, Some(kept)) => Ok(kept),
            (None, None) if self.deleted => {
                let unfit = unfit_digest(&services).await;
                Ok(Outcome::Released(Released { created: self.created, write: self.write, unfit }))
            }
            (None, None) => Ok(Outcome::Absent { anothers }),
        }
    }

    /// Reads one half, judges it and deletes it, until one of the three has settled it.
    async fn half(&mut self, services: &Services<'_>, half: &Spot) -> Result<Judged, Failure> {
        loop {
            // At the same time: a slow service is paid for once.
            let agreed = self.agreed;
            let is_global = async { if agreed { Ok(None) } else { global_table(services).await } };
            let (standing, global) = tokio::join!(services.stores.read(half), is_global);
            self.agreed |= global == Ok(None);
            let Some(standing) = standing? else {
                // Ours stood here and was asked to go: it went, though the answer to that was lost.
                return Ok(if self.asked_to_go.contains(half) { Judged::Deleted } else { Judged::Absent });
            };
            let Some(info) = standing.info() else { return Ok(Judged::Anothers("what is no lock".to_owned())) };
            let verdict = judge(self.recorded, &info, &self.situation.run);
            trace!("{half:?} holds {}: {verdict:?}", info.id);
            match verdict {
                Verdict::Anothers => return Ok(Judged::Anothers(info.id)),
                Verdict::Doubt(reason) => return Ok(Judged::Doubt(reason)),
                Verdict::Ours => {}
            }
            if let Some(reason) = global? {
                return Ok(Judged::Unasked(reason));
            }
            self.asked_to_go.push(half.clone());
            self.created = info.created();
            crash_point::reached("release: half judged");
            match services.stores.delete(half, &standing).await? {
                Deleted::Yes => {
                    trace!("deleted {} in {half:?}", info.id);
                    crash_point::reached("release: half deleted");
                    return Ok(Judged::Deleted);
                }
                Deleted::Changed => {
                    sleep(Duration::from_millis(20)).await;
                    if self.begun.elapsed() > PATIENCE {
                        return Ok(Judged::Doubt("it changes while it is deleted"));
                    }
                }
            }
        }
    }
}

/// Why nothing of a lock is deleted unasked: its table is a global one. A delete on condition is right in the region that
/// we ask, and can still undo the lock that somebody took in another one a moment ago. Who may not ask has a table as
/// nearly all of them are.
async fn global_table(services: &Services<'_>) -> Result<Option<String>, Failure> {
    let Some(table) = &services.place.table else { return Ok(None) };
    match dynamodb::describe(&services.stores.dynamodb, table).await {
        Ok(described) if described.last_writer_wins() => Ok(Some(report::global_table(table, &described.replicas))),
        Err(failure) if !failure.refused => Err(failure),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// What became of a half.
enum Judged {
    Absent,
    Deleted,
    Anothers(String),
    Doubt(&'static str),
    /// It is ours, and goes only where that is asked for.
    Unasked(String),
}

/// The state and its digest, if they do not fit, and nobody is writing them at this moment. What cannot be read is not
/// said to be wrong, and the lock is gone in any case.
async fn unfit_digest(services: &Services<'_>) -> Option<Comparison> {
    let Place { bucket, key, table, .. } = services.place;
    let table = table.as_ref()?;
    let compare = || async {
        let compared = digest::compare(&services.stores, bucket, key, table);
        let compared = tokio::time::timeout(PATIENCE, compared).await.ok()?.ok()?;
        (!compared.fits()).then_some(compared)
    };
    let first = compare().await?;
    for half in &services.halves {
        if services.stores.read(half).await.ok()?.is_some() {
            return None;
        }
    }
    // The same again, and nobody held the lock in between: so nobody was between the state and its digest.
    (compare().await.as_ref() == Some(&first)).then_some(first)
}

/// Waits until nothing that a write of the dead terraform would change has changed for [`QUIET`].
async fn wait_for_quiet(services: &Services<'_>) -> Result<Write, Failure> {
    let mut write = Write::Quiet;
    let mut last = services.fingerprint().await?;
    let begun = Instant::now();
    let mut since = begun;
    let absent = "- ".repeat(services.halves.len());
    if last[1] == absent {
        // Nothing of ours stands in front of anybody: there is nothing to keep, and so nothing to wait for.
        return Ok(write);
    }
    trace!("waiting for a write that may be on its way");
    report::say(&report::waiting_for_write(QUIET));
    while since.elapsed() < QUIET {
        if begun.elapsed() > LONGEST_QUIET {
            return Err(Failure::refusal(
                "S3",
                "the state is written again and again, by somebody who does not lock it",
            ));
        }
        sleep(LOOK).await;
        let now = services.fingerprint().await?;
        if now != last {
            trace!("it landed");
            if now[0] != last[0] {
                write = Write::Landed;
            }
            last = now;
            since = Instant::now();
        }
    }
    Ok(write)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_service_refused_is_not_asked_again() {
        for (code, refused) in [
            ("AccessDeniedException", true),
            ("ResourceNotFoundException", true),
            ("SignatureDoesNotMatch", true),
            ("ProvisionedThroughputExceededException", false),
            ("InternalServerError", false),
            ("SlowDown", false),
            ("ExpiredToken", false),
            ("ExpiredTokenException", false),
        ] {
            assert_eq!(Failure::new("S3", Some(code), None, "").refused, refused, "{code}");
        }
    }

    #[test]
    fn only_a_refusal_that_says_so_is_one() {
        for (code, message, status, denied, refused) in [
            (Some("AccessDenied"), Some("no"), Some(403), true, true),
            (Some("AccessDeniedException"), None, Some(400), true, true),
            (Some("SignatureDoesNotMatch"), None, Some(403), false, true),
            // A clock, a session that is over, a proxy: they may be well the next time.
            (Some("RequestTimeTooSkewed"), Some("skewed"), Some(403), false, false),
            (Some("InvalidTokenId"), None, Some(403), false, false),
            (None, Some("<html>"), Some(403), false, false),
            // The answer to a HEAD.
            (None, None, Some(403), false, false),
            (Some("SlowDown"), None, Some(503), false, false),
            (None, None, None, false, false),
        ] {
            let failure = Failure::of_action("S3", "s3:GetObject", (code, message, status), "unhandled error");
            assert_eq!(failure.denied(), denied.then_some("s3:GetObject"), "{code:?} {status:?}");
            assert_eq!(failure.is_refusal(), refused, "{code:?} {status:?}");
        }
        let silent = Failure::of_action("S3", "s3:GetObject", (None, None, Some(403)), "unhandled error");
        assert_eq!(silent.to_string(), "S3: 403, without a reason: s3:GetObject may be missing");
        let role = "dispatch failure: other: the role arn:x cannot be assumed: AccessDenied: not authorized";
        let role = Failure::of_action("S3", "s3:GetObject", (None, None, None), role);
        assert!(role.is_refusal() && role.denied().is_none());
    }

    #[test]
    fn a_failure_says_what_the_service_said() {
        assert_eq!(Failure::new("S3", Some("AccessDenied"), Some("no"), "x").to_string(), "S3: AccessDenied: no");
        assert_eq!(Failure::new("DynamoDB", None, None, "timed out").to_string(), "DynamoDB: timed out");
    }
}
