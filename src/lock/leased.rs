//! Reads, renews and takes over the lease of a stored lock. These requests are the only ones that write a lease record.

use std::time::Duration;

use jiff::Timestamp;

use super::deleted::{Deleted, noted};
use super::dynamodb::{self, ItemKey};
use super::probe::{self, IfMatch};
use super::s3::{self, ObjectKey};
use super::stores::{LOCK_FILE, Removed, StoreKey, StoredLock, Stores};
use super::written::Written;
use crate::aws::failure::Failure;
use crate::crash_point;
use crate::lease::observed::ObservedLease;
use crate::lease::record::{Claim, NotBelieved, Record};
use crate::lease::takeover::{AfterClaim, TakeRequests, TakeStage};
use crate::terraform::lock_info::LockInfo;

/// A lock and its lease record, as one consistent read found them. Two of them are equal if neither the lock nor its
/// record has changed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LeasedLock {
    pub(crate) stored: StoredLock,
    /// The lease record, or the reason why it is not believed. `None` if the lock has no record, or if what is stored
    /// is not a lock.
    pub(crate) record: Option<Result<Record, NotBelieved>>,
    /// All attributes of the item. `None` for an object in S3.
    item: Option<dynamodb::Item>,
}

impl LeasedLock {
    fn of_item(item: dynamodb::Item) -> Self {
        let stored = StoredLock::Item(item.info());
        Self { record: stored.info().and_then(|info| item.record(&info.id)), stored, item: Some(item) }
    }

    fn of_object(object: s3::Object) -> Self {
        let member = object.member.clone();
        let stored = StoredLock::Object(object);
        Self { record: stored.info().and_then(|info| member.record(&info.id)), stored, item: None }
    }
}

/// The result of a consistent read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LeaseRead {
    /// `None` if nothing is stored at the location.
    pub(crate) lock: Option<LeasedLock>,
    /// The service's time in the response, in whole seconds. `None` if the response has none that counts
    /// ([`super::service_time`]); in S3, a response that there is no object never has one.
    pub(crate) date: Option<Timestamp>,
}

/// The object of a lock with an item, as a part to be deleted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ObjectPart<'a> {
    /// The object was found, or locks with this backend have one. The item stays if the object cannot be read.
    Known(&'a StoreKey),
    /// Locks with this backend have no object. A run with another backend block may have put one, which would stay
    /// without its record if only the item was deleted. But this backend needs no permission for objects, and the
    /// bucket need not exist.
    OfAnotherBackend(&'a StoreKey),
}

/// What to do with an object that may be a part of the lock of another backend ([`ObjectPart::OfAnotherBackend`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ObjectStep {
    /// It is a part of the lock.
    Delete,
    /// There is none, or it is not a part of the lock.
    Leave,
    /// These credentials may not read it. S3 refuses the read of an object that does not exist too, so only a listing
    /// shows whether there is one.
    List,
}

/// Decides what to do with the object of another backend, for the delete of the lock `id`.
///
/// # Errors
/// Returns the failure of the `read` if it does not show whether there is such an object.
fn object_step(read: Result<Option<&StoredLock>, Failure>, id: &str) -> Result<ObjectStep, Failure> {
    Ok(match read {
        Ok(stored) if stored.and_then(StoredLock::info).is_some_and(|info| info.id == id) => ObjectStep::Delete,
        Ok(_) => ObjectStep::Leave,
        Err(failure) if failure.cause().excludes_locks() => ObjectStep::Leave,
        Err(failure) if failure.denied().is_some() => ObjectStep::List,
        Err(failure) => return Err(failure),
    })
}

/// One part of a lock, for a person or a program that looks at it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StoredPart {
    pub(crate) store_key: StoreKey,
    pub(crate) stored: StoredLock,
    /// The lease record. `None` if the part has none, or if it is not a lock. It is in a box, because it is large and most
    /// locks have none.
    pub(crate) lease: Option<Box<ObservedLease>>,
}

impl StoredPart {
    /// `record` was read with `stored`, in a response with the service's time `date`.
    pub(crate) fn new(
        store_key: StoreKey,
        stored: StoredLock,
        record: Option<Result<Record, NotBelieved>>,
        date: Option<Timestamp>,
    ) -> Self {
        let lease =
            record.map(|record| Box::new(ObservedLease { record, date, region: store_key.region().to_owned() }));
        Self { store_key, stored, lease }
    }

    /// Whether `later` has the same lock and the same lease record, whatever the time of the read was.
    pub(crate) fn is_same_as(&self, later: &Self) -> bool {
        let record = |part: &Self| part.lease.as_ref().map(|lease| lease.record.clone());
        self.stored == later.stored && record(self) == record(later)
    }
}

/// The result of [`Stores::renew`]. Each variant has what is stored now; the next renewal is based on it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Renewed {
    /// The service has stored the record.
    Yes(LeaseRead),
    /// A read shows this record, or a later one of the same keeper: the response to an earlier request was lost.
    Before(LeaseRead),
    /// A read shows the lock with a record of another keeper that is as new or newer. Nothing was written. The caller
    /// must make a newer record.
    Overtaken(LeaseRead),
    /// The lock is gone, is another one, or was claimed.
    Lost(LeaseRead),
}

/// What to do with a record that should be stored beside the lock that a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RenewStep {
    Write,
    IsStored,
    IsOvertaken,
    IsLost,
    /// What is stored is not a lock. A proxy may have sent it.
    NoLock,
    /// The lock has something in the place of the record that this version of `tf` did not write.
    NoRecord,
}

fn renew_step(record: &Record, now: Option<&LeasedLock>) -> RenewStep {
    let Some(now) = now else { return RenewStep::IsLost };
    let Some(info) = now.stored.info() else { return RenewStep::NoLock };
    match &now.record {
        _ if info.id != record.lock => RenewStep::IsLost,
        None => RenewStep::Write,
        Some(Err(_)) => RenewStep::NoRecord,
        Some(Ok(stored)) if stored.taken.is_some() => RenewStep::IsLost,
        Some(Ok(stored)) if record.is_confirmed_by(stored) => RenewStep::IsStored,
        Some(Ok(stored)) if record.renewal().replaces(Some(stored.renewal())) => RenewStep::Write,
        Some(Ok(_)) => RenewStep::IsOvertaken,
    }
}

/// Returns what a taker finds after it has sent `claim` for the lock `read`. `None` if what is stored is not a lock,
/// which may be the response of a proxy.
fn after_claim(claim: &Claim, read: &LeasedLock, now: Option<&LeasedLock>) -> Option<AfterClaim> {
    let Some(now) = now else { return Some(AfterClaim::Gone) };
    let id = now.stored.info()?.id;
    Some(if read.stored.info().is_none_or(|info| info.id != id) {
        AfterClaim::Gone
    } else if has_claim(now, claim) {
        AfterClaim::Ours
    } else if now == read {
        AfterClaim::Unchanged
    } else {
        AfterClaim::Changed
    })
}

fn has_claim(lock: &LeasedLock, claim: &Claim) -> bool {
    let taken = lock.record.as_ref().and_then(|record| record.as_ref().ok()?.taken.as_ref());
    taken.is_some_and(|taken| taken.is_same(claim))
}

/// Returns the locks in `parts`. Two parts of one lock are returned once, with the lease of the first part that has
/// one.
pub(crate) fn locks_of(parts: &[StoredPart]) -> Vec<(LockInfo, Option<ObservedLease>)> {
    let mut locks: Vec<(LockInfo, Option<ObservedLease>)> = Vec::new();
    for part in parts {
        let Some(info) = part.stored.info() else { continue };
        match locks.iter_mut().find(|(known, _)| *known == info) {
            Some((_, lease)) => *lease = lease.take().or_else(|| part.lease.as_deref().cloned()),
            None => locks.push((info, part.lease.as_deref().cloned())),
        }
    }
    locks
}

impl Stores {
    /// Reads the lock at `store_key` and its lease record with one consistent read.
    ///
    /// # Errors
    /// Returns a [`Failure`] if the request fails, or if the service cannot have sent the response.
    pub(crate) async fn read_lease(&self, store_key: &StoreKey) -> Result<LeaseRead, Failure> {
        Ok(match store_key {
            StoreKey::DynamoDb { table, key, .. } => {
                let (item, date) = dynamodb::read_item(&self.dynamodb, ItemKey { table, path: key }).await?;
                LeaseRead { lock: item.map(LeasedLock::of_item), date }
            }
            StoreKey::S3 { bucket, key, .. } => {
                let (object, date) = s3::read_with_time(&self.s3, ObjectKey { bucket, key }).await?;
                LeaseRead { lock: object.map(LeasedLock::of_object), date }
            }
        })
    }

    /// Reads one part of a lock as [`Stores::read_lease`] does. `None` if nothing is stored at `store_key`. If a policy
    /// permits only the attributes that terraform itself reads, the part counts as one without a record.
    ///
    /// # Errors
    /// As [`Stores::read_lease`].
    pub(crate) async fn read_part(&self, store_key: &StoreKey) -> Result<Option<StoredPart>, Failure> {
        let LeaseRead { lock, date } = match self.read_lease(store_key).await {
            Err(failure) if failure.denied().is_some() && matches!(store_key, StoreKey::DynamoDb { .. }) => {
                let stored = self.read(store_key).await?;
                return Ok(stored.map(|stored| StoredPart::new(store_key.clone(), stored, None, None)));
            }
            read => read?,
        };
        Ok(lock.map(|lock| StoredPart::new(store_key.clone(), lock.stored, lock.record, date)))
    }

    /// As [`Stores::read_lease`]. A lock counts as absent only if two reads do not find it, because a single response
    /// proves nothing.
    pub(super) async fn read_lease_surely(&self, store_key: &StoreKey) -> Result<LeaseRead, Failure> {
        let read = self.read_lease(store_key).await?;
        if read.lock.is_some() { Ok(read) } else { self.read_lease(store_key).await }
    }

    /// Tests how the service at `store_key` treats the condition of a renewal. Only [`IfMatch::Obeyed`] permits a
    /// lease: on another service, a renewal could bring a released lock back or replace another run's lock. DynamoDB
    /// and AWS's own S3 obey it, so there is no request to them. On another S3 service, an object beside the lock is
    /// put and deleted. The caller must not drop this before it is ready, because the object would stay then.
    ///
    /// Returns `None` if the service has not answered within `limit`, so that another test may have another result.
    pub(crate) async fn treatment_of_renewals(&self, store_key: &StoreKey, limit: Duration) -> Option<IfMatch> {
        match store_key {
            StoreKey::S3 { bucket, key, .. } if self.has_custom_s3 => {
                let key = probe::test_key(key.strip_suffix(LOCK_FILE).unwrap_or(key));
                probe::replace_object(&self.s3, bucket, &key, limit).await
            }
            StoreKey::S3 { .. } | StoreKey::DynamoDb { .. } => Some(IfMatch::Obeyed),
        }
    }

    /// Tests how the service at `store_key` treats the condition of a delete. Only [`IfMatch::Obeyed`] permits a
    /// takeover of an object without a claim: its delete is the decision, and the holder may renew just before it. The
    /// test takes at most twice the `limit`. The caller must not drop this before it is ready, because a test object
    /// would stay then.
    ///
    /// # Errors
    /// Returns the [`Failure`] of a request of the test. That shows nothing about the condition.
    pub(crate) async fn treatment_of_deletes(&self, store_key: &StoreKey, limit: Duration) -> Result<IfMatch, Failure> {
        match store_key {
            StoreKey::S3 { bucket, key, .. } if self.has_custom_s3 => {
                let key = probe::test_key(key.strip_suffix(LOCK_FILE).unwrap_or(key));
                probe::delete_object(&self.s3, bucket, &key, limit).await.1
            }
            StoreKey::S3 { .. } | StoreKey::DynamoDb { .. } => Ok(IfMatch::Obeyed),
        }
    }

    /// Stores `record` beside the lock that `read` found at `store_key`. Long facts about the holder are left out, so
    /// that lock and record stay within 1 KiB.
    ///
    /// If the condition of the write is not met, reads what is stored, and writes again if it is the same lock with an
    /// older record, up to 3 times.
    ///
    /// # Errors
    /// Returns a [`Failure`] if a request fails for a reason other than its condition. The record may have been stored
    /// nevertheless, and may still be stored later. Also if the lock has something else in the place of its record.
    pub(crate) async fn renew(
        &self,
        store_key: &StoreKey,
        read: &LeasedLock,
        record: &Record,
    ) -> Result<Renewed, Failure> {
        let mut seen = LeaseRead { lock: Some(read.clone()), date: None };
        for _ in 0..3 {
            let lock = match (renew_step(record, seen.lock.as_ref()), &seen.lock) {
                (RenewStep::Write, Some(lock)) => lock,
                (RenewStep::Write | RenewStep::IsLost, _) => return Ok(Renewed::Lost(seen)),
                (RenewStep::IsStored, _) => return Ok(Renewed::Before(seen)),
                (RenewStep::IsOvertaken, _) => return Ok(Renewed::Overtaken(seen)),
                (RenewStep::NoLock, _) => return Err(no_lock(store_key)),
                (RenewStep::NoRecord, _) => {
                    let reason = "the lock has a lease record that this version of tf cannot renew";
                    return Err(Failure::refusal(store_key.service(), reason));
                }
            };
            if let Written::Yes(lock, date) = self.write(store_key, lock, record).await? {
                return Ok(Renewed::Yes(LeaseRead { lock: Some(lock), date }));
            }
            seen = self.read_lease_surely(store_key).await?;
        }
        match renew_step(record, seen.lock.as_ref()) {
            RenewStep::IsStored => Ok(Renewed::Before(seen)),
            RenewStep::IsLost => Ok(Renewed::Lost(seen)),
            _ => Err(Failure::no_answer(store_key.service(), "the lock keeps changing")),
        }
    }

    /// Says in the object of a lock with two parts that the lock has the lease `record` ([`crate::lease::info_field`]):
    /// terraform shows the object to everybody whom the lock refuses. Changes nothing if the object is not a part of
    /// that lock. Call this only if [`Stores::treatment_of_renewals`] is [`IfMatch::Obeyed`]: otherwise the write could
    /// bring the object back after it was deleted.
    ///
    /// # Errors
    /// Returns a [`Failure`] if a request fails for a reason other than its condition. The object may have been written
    /// nevertheless.
    pub(crate) async fn fill_info(&self, object: &StoreKey, record: &Record) -> Result<(), Failure> {
        let StoreKey::S3 { bucket, key, .. } = object else { return Ok(()) };
        let Some(read) = s3::read(&self.s3, bucket, key).await? else { return Ok(()) };
        let is_part = LockInfo::parse(&read.body).is_some_and(|info| info.id == record.lock);
        if is_part {
            s3::fill_info(&self.s3, &self.write_settings, ObjectKey { bucket, key }, &read, record).await?;
        }
        Ok(())
    }

    async fn write(
        &self,
        store_key: &StoreKey,
        read: &LeasedLock,
        record: &Record,
    ) -> Result<Written<LeasedLock>, Failure> {
        Ok(match (store_key, &read.stored, &read.item) {
            (StoreKey::DynamoDb { table, key, .. }, _, Some(item)) => {
                let written = dynamodb::renew(&self.dynamodb, ItemKey { table, path: key }, item, record).await?;
                written.map(LeasedLock::of_item)
            }
            (StoreKey::S3 { bucket, key, .. }, StoredLock::Object(object), _) => {
                let key = ObjectKey { bucket, key };
                let written = s3::renew(&self.s3, &self.write_settings, key, object, record).await?;
                written.map(LeasedLock::of_object)
            }
            // `read` was read from the other service.
            _ => Written::Changed,
        })
    }

    /// Claims the lock of another host: replaces the record of the item `read` by one with `claim`, on the condition
    /// that lock and record are exactly as they were read. The result is what a read shows then, and only
    /// [`AfterClaim::Ours`] permits [`Stores::delete_claimed`]. A lock with a `.tflock` object alone is not claimed:
    /// [`Stores::remove`] deletes it on the condition that lock and record are as they were read.
    ///
    /// # Errors
    /// Returns a [`Failure`] if a request fails for a reason other than its condition. The claim may have been stored
    /// nevertheless. Also if `read` is not a DynamoDB item with a record that is believed.
    pub(crate) async fn claim(
        &self,
        store_key: &StoreKey,
        read: &LeasedLock,
        claim: &Claim,
    ) -> Result<(AfterClaim, LeaseRead), Failure> {
        let (StoreKey::DynamoDb { table, key, .. }, Some(item), Some(Ok(record))) =
            (store_key, &read.item, &read.record)
        else {
            return Err(Failure::refusal(store_key.service(), "only an item with a lease can be claimed"));
        };
        let mut claimed = record.clone();
        claimed.taken = Some(claim.clone());
        dynamodb::claim(&self.dynamodb, ItemKey { table, path: key }, item, &claimed).await?;
        let now = self.read_lease_surely(store_key).await?;
        match after_claim(claim, read, now.lock.as_ref()) {
            Some(after) => Ok((after, now)),
            None => Err(no_lock(store_key)),
        }
    }

    /// Deletes a lock that this process has claimed: first its object at `object`, if that is part of the same lock,
    /// and then its item at `item`, on the condition that it still has the claim. `claimed` is the lock as it was read
    /// after the claim. Notes in `requests` what is known about them.
    ///
    /// # Errors
    /// Returns a [`Failure`] if a request fails for a reason other than its condition. A part of the lock may have been
    /// deleted nevertheless.
    pub(crate) async fn delete_claimed(
        &self,
        item: &StoreKey,
        object: Option<ObjectPart<'_>>,
        claimed: &LeasedLock,
        requests: &mut TakeRequests,
    ) -> Result<Removed, Failure> {
        let taken = claimed.record.as_ref().and_then(|record| record.as_ref().ok()?.taken.as_ref());
        let (StoreKey::DynamoDb { table, key, .. }, Some(attributes), Some(info), Some(claim)) =
            (item, &claimed.item, claimed.stored.info(), taken)
        else {
            return Err(Failure::refusal(item.service(), "only an item with a claim can be deleted"));
        };
        requests.stage = TakeStage::Object;
        let is_refused = match object {
            None => false,
            Some(ObjectPart::Known(object)) => self.remove_if_of(object, &info.id).await? == Removed::Refused,
            Some(ObjectPart::OfAnotherBackend(object)) => {
                let read = self.read_lease(object).await;
                match object_step(read.as_ref().map(stored_of).map_err(Clone::clone), &info.id)? {
                    ObjectStep::Delete => self.remove_if_of(object, &info.id).await? == Removed::Refused,
                    ObjectStep::Leave => false,
                    ObjectStep::List => {
                        requests.is_object_unread = self.is_listed(object).await;
                        false
                    }
                }
            }
        };
        if is_refused {
            return Ok(Removed::Refused);
        }
        crash_point::reached("takeover: deleted the object");
        requests.stage = TakeStage::Item;
        for _ in 0..ATTEMPTS {
            let key = ItemKey { table, path: key };
            let deleted =
                noted(&mut requests.deleted, dynamodb::delete_claimed(&self.dynamodb, key, attributes)).await?;
            let now = self.read_lease_surely(item).await?;
            match after_claim(claim, claimed, now.lock.as_ref()) {
                None => return Err(no_lock(item)),
                Some(AfterClaim::Gone) => return Ok(Removed::Gone(None)),
                Some(AfterClaim::Changed) if !matches!(deleted, Deleted::Yes(_)) => return Ok(Removed::Anothers),
                Some(AfterClaim::Ours | AfterClaim::Unchanged | AfterClaim::Changed) => {
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
        Ok(Removed::Refused)
    }

    /// Whether the object may be there: a listing shows it, or fails, for example because a policy permits it only for
    /// the prefix of the state.
    async fn is_listed(&self, object: &StoreKey) -> bool {
        let StoreKey::S3 { bucket, key, .. } = object else { return false };
        s3::is_listed(&self.s3, bucket, key).await.unwrap_or(true)
    }

    /// Deletes the object if it is a part of the lock `id`. Returns [`Removed::Anothers`] if it is a part of another
    /// lock: for a moment, another run may have the object and not yet the item.
    async fn remove_if_of(&self, object: &StoreKey, id: &str) -> Result<Removed, Failure> {
        for _ in 0..ATTEMPTS {
            let Some(lock) = self.read_lease_surely(object).await?.lock else { return Ok(Removed::GoneBefore) };
            let Some(info) = lock.stored.info() else { return Err(no_lock(object)) };
            if info.id != id {
                return Ok(Removed::Anothers);
            }
            match self.remove(object, &lock.stored).await? {
                Removed::Anothers => {}
                removed => return Ok(removed),
            }
        }
        Ok(Removed::Refused)
    }
}

fn stored_of(read: &LeaseRead) -> Option<&StoredLock> {
    Some(&read.lock.as_ref()?.stored)
}

/// How often a delete is tried while what was to be deleted is still there.
const ATTEMPTS: u32 = 5;

/// The time between two of these attempts.
const RETRY_INTERVAL: std::time::Duration = std::time::Duration::from_millis(50);

fn no_lock(store_key: &StoreKey) -> Failure {
    Failure::no_answer(store_key.service(), "something that is not a lock is in the lock's place")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::lease::record::{Member, Promise, Renewal};
    use crate::lease::terms::Terms;

    const BEGIN: i64 = 1_790_000_000;

    #[test]
    fn an_object_of_another_backend_is_deleted_only_if_it_is_read_as_a_part_of_the_lock() {
        use crate::aws::failure::ServiceAnswer;
        let failed = |code, status| {
            let answer = ServiceAnswer { code: Some(code), message: None, status: Some(status) };
            Failure::of_answer("S3", "s3:GetObject", answer, "")
        };
        let object = |body: &str| {
            let (length, etag) = (body.len() as u64, Some("1".to_owned()));
            StoredLock::Object(s3::Object { body: body.to_owned(), member: Member::None, length, etag })
        };
        let (part, other, page) = (object(r#"{"ID":"a"}"#), object(r#"{"ID":"b"}"#), object("<html>"));
        for (read, expected) in [
            (Ok(None), Ok(ObjectStep::Leave)),
            (Ok(Some(&part)), Ok(ObjectStep::Delete)),
            (Ok(Some(&other)), Ok(ObjectStep::Leave)),
            (Ok(Some(&page)), Ok(ObjectStep::Leave)),
            (Err(failed("AccessDenied", 403)), Ok(ObjectStep::List)),
            (Err(failed("NoSuchBucket", 404)), Ok(ObjectStep::Leave)),
            // The object may be there.
            (Err(failed("InternalError", 500)), Err(failed("InternalError", 500))),
            (Err(failed("InvalidRequest", 400)), Err(failed("InvalidRequest", 400))),
            (Err(Failure::no_answer("S3", "x")), Err(Failure::no_answer("S3", "x"))),
        ] {
            assert_eq!(object_step(read.clone(), "a"), expected, "{read:?}");
        }
    }

    /// Returns a record that was renewed `renewed` seconds after [`BEGIN`].
    fn record(lock: &str, (renewed, beat): (i64, u64), keeper: u64) -> Record {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        let mut record = Record::new(lock, terms, Renewal { renewed: BEGIN + renewed, beat }, Promise::Stop);
        record.keeper = keeper;
        record
    }

    fn claimed(record: &Record, claim: &Claim) -> Record {
        let mut claimed = record.clone();
        claimed.taken = Some(claim.clone());
        claimed
    }

    fn lock(text: &str, member: Member) -> LeasedLock {
        LeasedLock::of_object(s3::Object { body: text.to_owned(), member, length: 0, etag: None })
    }

    fn with(id: &str, record: &Record) -> LeasedLock {
        lock(&format!(r#"{{"ID":"{id}"}}"#), Member::Last(record.to_json()))
    }

    #[test]
    fn two_parts_of_a_lock_are_one_lock_with_its_lease() {
        use crate::lease::observed::tests::lease;
        use crate::lease::record::Promise;
        use crate::lock::dynamodb::InfoAttribute;
        use crate::lock::stores::{StoreKey, StoredLock};
        let part = |id: &str, age: Option<i64>| StoredPart {
            store_key: StoreKey::DynamoDb { table: "t".into(), key: "b/k".into(), region: "r".into() },
            stored: StoredLock::Item(InfoAttribute::Text(format!(r#"{{"ID":"{id}"}}"#))),
            lease: age.map(|age| Box::new(lease(id, age, None, Promise::Stop))),
        };
        for (parts, expected) in [
            (vec![part("a", None), part("a", Some(1))], vec![("a", Some(1))]),
            (vec![part("a", Some(1)), part("a", Some(2))], vec![("a", Some(1))]),
            (vec![part("a", None), part("b", Some(2))], vec![("a", None), ("b", Some(2))]),
            (vec![part("", None)], vec![]),
        ] {
            let expected: Vec<_> = expected
                .into_iter()
                .map(|(id, age)| (id.to_owned(), age.map(|age| lease(id, age, None, Promise::Stop))))
                .collect();
            let found: Vec<_> = locks_of(&parts).into_iter().map(|(info, lease)| (info.id, lease)).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_record_is_only_written_where_it_replaces_an_older_one_of_the_same_lock() {
        let ours = record("a", (10, 5), 1);
        let claim = Claim { by: "o@h".into(), at: BEGIN + 20, number: 7 };
        for (now, expected) in [
            (None, RenewStep::IsLost),
            (Some(lock("<html>", Member::None)), RenewStep::NoLock),
            (Some(lock(r#"{"ID":"a"}"#, Member::None)), RenewStep::Write),
            (Some(lock(r#"{"ID":"b"}"#, Member::None)), RenewStep::IsLost),
            (Some(with("b", &record("b", (1, 1), 1))), RenewStep::IsLost),
            (Some(with("a", &record("b", (1, 1), 1))), RenewStep::NoRecord),
            (Some(lock(r#"{"ID":"a"}"#, Member::Last(r#"{"v":2}"#.into()))), RenewStep::NoRecord),
            (Some(lock(r#"{"ID":"a"}"#, Member::NotBelieved(NotBelieved::TooLarge))), RenewStep::NoRecord),
            (Some(with("a", &ours)), RenewStep::IsStored),
            (Some(with("a", &record("a", (10, 6), 1))), RenewStep::IsStored),
            (Some(with("a", &record("a", (10, 4), 1))), RenewStep::Write),
            (Some(with("a", &record("a", (9, 9), 2))), RenewStep::Write),
            (Some(with("a", &record("a", (10, 5), 2))), RenewStep::IsOvertaken),
            (Some(with("a", &record("a", (11, 1), 2))), RenewStep::IsOvertaken),
            (Some(with("a", &claimed(&ours, &claim))), RenewStep::IsLost),
            (Some(with("a", &claimed(&record("a", (9, 9), 2), &claim))), RenewStep::IsLost),
        ] {
            assert_eq!(renew_step(&ours, now.as_ref()), expected, "{now:?}");
        }
    }

    #[test]
    fn a_claim_is_ours_only_if_a_read_shows_it() {
        let read = with("a", &record("a", (10, 5), 1));
        let claim = Claim { by: "o@h".into(), at: BEGIN + 20, number: 7 };
        let other = Claim { number: 8, ..claim.clone() };
        let earlier = Claim { at: BEGIN + 19, ..claim.clone() };
        for (now, expected) in [
            (None, Some(AfterClaim::Gone)),
            (Some(lock("<html>", Member::None)), None),
            (Some(with("b", &record("b", (10, 5), 1))), Some(AfterClaim::Gone)),
            (Some(read.clone()), Some(AfterClaim::Unchanged)),
            (Some(with("a", &record("a", (11, 6), 1))), Some(AfterClaim::Changed)),
            (Some(lock(r#"{"ID":"a"}"#, Member::None)), Some(AfterClaim::Changed)),
            (Some(with("a", &claimed(&record("a", (10, 5), 1), &claim))), Some(AfterClaim::Ours)),
            (Some(with("a", &claimed(&record("a", (10, 5), 1), &other))), Some(AfterClaim::Changed)),
            (Some(with("a", &claimed(&record("a", (10, 5), 1), &earlier))), Some(AfterClaim::Changed)),
        ] {
            assert_eq!(after_claim(&claim, &read, now.as_ref()), expected, "{now:?}");
        }
    }

    #[test]
    fn what_is_not_a_lock_has_no_record() {
        assert_eq!(lock("<html>", Member::Last(record("", (1, 1), 1).to_json())).record, None);
    }
}
