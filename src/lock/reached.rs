//! Decides whether a lock that was not found is really gone, or whether the search used another account than the run.
//!
//! With the credentials of another account, a lock that is not found is not necessarily gone: that account can have a
//! table of the same name, which is empty. [`crate::aws::identity`] determines the account of a run. If that account is
//! not known, or is not the current one, the location itself may prove that the lock is gone:
//!
//! - A bucket name exists only once in AWS. If AWS's own endpoint reports that the bucket has no such object, that is
//!   true for every account. Other object stores may have a namespace for each account, so their reports prove nothing.
//! - A table name that is an ARN contains the account, so it names the same table for every account.
//! - If a table has the digest of the current state in that bucket, and not of an older state, it is the table of that
//!   state.

use aws_sdk_s3::presigning::PresigningConfig;

use super::location::LockLocation;
use super::stores::Stores;
use crate::aws::connect;
use crate::aws::credentials::Purpose;
use crate::aws::identity::{AccountIdentity, Relation, relation};
use crate::aws::redacted_backend::{AwsEnvironment, RedactedBackend};
use crate::lock::digest;
use crate::lock::s3::ObjectKey;
use crate::terraform::backend::CachedBackend;
use crate::terraform::log::LockParts;
use crate::trace::trace;

/// The facts about a location that are valid for every account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct PlaceEvidence {
    /// Whether the bucket is reached through an endpoint of AWS itself, where a bucket name exists only once.
    bucket: bool,
    /// Whether the table's name is an ARN.
    arn: bool,
    /// Whether the table has the digest of the state that is in the bucket. False if they were not compared.
    digest: bool,
}

impl PlaceEvidence {
    async fn gather(location: &LockLocation, stores: &Stores) -> Self {
        let bucket = is_aws(&address(location, stores).await.unwrap_or_default());
        let Some(table) = &location.table else { return Self { bucket, arn: false, digest: false } };
        let arn = table.starts_with("arn:");
        // The digest is compared only if it can decide: it proves something only if `bucket` is true, and the
        // comparison must read the whole state.
        let digest = bucket
            && !arn
            && digest::compare(stores, ObjectKey { bucket: &location.bucket, key: &location.key }, table)
                .await
                .is_ok_and(|compared| compared.recorded.is_some() && compared.fits());
        Self { bucket, arn, digest }
    }
}

/// Whether a lock with these parts is gone, if it was not found. `same` is true if the search used the account of the
/// run.
fn is_proven_gone(same: bool, parts: LockParts, evidence: PlaceEvidence) -> bool {
    let object = !parts.s3 || same || evidence.bucket;
    let item = !parts.dynamodb || same || evidence.arn || (evidence.bucket && evidence.digest);
    object && item
}

/// Returns a presigned URL of the state, which contains the host of the endpoint. `None` if no URL can be created.
async fn address(location: &LockLocation, stores: &Stores) -> Option<String> {
    let signing = PresigningConfig::expires_in(std::time::Duration::from_secs(1)).ok()?;
    let request = stores.s3.get_object().bucket(&location.bucket).key(&location.key).presigned(signing).await.ok()?;
    Some(request.uri().to_owned())
}

/// Whether the host of a URL is an endpoint of AWS itself, in any of its partitions. Only `https` URLs count.
fn is_aws(url: &str) -> bool {
    let Some(rest) = url.strip_prefix("https://") else { return false };
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    [".amazonaws.com", ".amazonaws.com.cn", ".amazonaws.eu", ".api.aws"].iter().any(|suffix| host.ends_with(suffix))
}

/// The identities with which a run reached its backends.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reached {
    run: String,
    /// The backends that the run used, each with the identity with which the run reached it.
    known: Vec<(RedactedBackend, AccountIdentity)>,
    /// The identity for a backend that does not set one itself.
    environment: AccountIdentity,
    needs: String,
}

impl Reached {
    /// Creates the value from the recorded facts about a run. `run` is the ID of that run.
    pub(crate) fn of(run: &str, access: &[RedactedBackend], surroundings: &AwsEnvironment) -> Self {
        Self {
            run: run.to_owned(),
            known: access.iter().cloned().zip(surroundings.identities(access.len())).collect(),
            environment: surroundings.environment().clone(),
            needs: surroundings.needs(),
        }
    }

    /// Describes what a person must provide to reach the run's locks ([`AwsEnvironment::needs`]).
    pub(crate) fn needs(&self) -> &str {
        &self.needs
    }

    /// Whether a lock is really gone if a search with the environment of this process has just found it at none of
    /// `locations`. Only the locations whose backend the run is known to have used count. If there is no such location,
    /// all locations count.
    pub(crate) async fn believes(&self, locations: &[LockLocation]) -> bool {
        let known = |location: &&LockLocation| {
            self.known.iter().any(|(access, _)| *access == RedactedBackend::of(&location.backend))
        };
        let of_the_run: Vec<&LockLocation> = locations.iter().filter(known).collect();
        let deciding = if of_the_run.is_empty() { locations.iter().collect() } else { of_the_run };
        for location in deciding {
            if !self.saw(location).await {
                return false;
            }
        }
        true
    }

    /// Returns the identity with which the run reached `backend`.
    fn then(&self, backend: &CachedBackend) -> AccountIdentity {
        let access = RedactedBackend::of(backend);
        if let Some((_, identity)) = self.known.iter().find(|(known, _)| *known == access) {
            return identity.clone();
        }
        // The backend was not known before the run, so it is the backend of a plan file.
        let alone = AccountIdentity::new(&self.run, backend, Err("not those of now"), |_| None);
        let says = backend.string("profile").is_some() || alone.account.is_some() || alone.key.is_some();
        if says { alone } else { self.environment.clone() }
    }

    async fn saw(&self, location: &LockLocation) -> bool {
        let now = AccountIdentity::now(&self.run, &location.backend);
        what_nothing_shows(&self.then(&location.backend), &now, location).await == NothingFound::IsGone
    }
}

/// What it shows that a search has not found a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NothingFound {
    /// The lock is gone.
    IsGone,
    /// Nothing: the search used another account than the run, or may have.
    Nothing,
    /// Nothing, because the account of the run is not known. So it is not known either whether the account has changed.
    UnknownAccount,
}

/// Decides what it shows that a search has just not found a lock at `location`. `then` is the identity with which the
/// run reached that location, and `now` that of the search. The hashes of both were made with the same ID.
pub(crate) async fn what_nothing_shows(
    then: &AccountIdentity,
    now: &AccountIdentity,
    location: &LockLocation,
) -> NothingFound {
    let parts = LockParts { s3: location.lock_file, dynamodb: location.table.is_some() };
    let relation = relation(then, now);
    let same = match &relation {
        Relation::Same => true,
        Relation::Ask(account) => connect::account(&location.backend).await.as_ref() == Some(account),
        Relation::Another | Relation::Unknown => false,
    };
    if is_proven_gone(same, parts, PlaceEvidence::default()) {
        return NothingFound::IsGone;
    }
    if let Ok(stores) = Stores::connect(&location.backend, Purpose::Work).await {
        let evidence = PlaceEvidence::gather(location, &stores).await;
        trace!("not seen by {relation:?} ({same}), {evidence:?}");
        if is_proven_gone(same, parts, evidence) {
            return NothingFound::IsGone;
        }
    }
    if relation == Relation::Unknown { NothingFound::UnknownAccount } else { NothingFound::Nothing }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn each_half_must_be_settled() {
        for same in [false, true] {
            for bits in 0..32_u8 {
                let bit = |location: u8| bits & (1 << location) != 0;
                let parts = LockParts { s3: bit(0), dynamodb: bit(1) };
                let evidence = PlaceEvidence { bucket: bit(2), arn: bit(3), digest: bit(4) };
                let item = same || bit(3) || (bit(2) && bit(4));
                let expected = (!bit(0) || same || bit(2)) && (!bit(1) || item);
                assert_eq!(is_proven_gone(same, parts, evidence), expected, "{same} {parts:?} {evidence:?}");
            }
        }
    }

    #[test]
    fn only_awss_own_hosts_are_awss() {
        for (url, expected) in [
            ("https://bucket.s3.eu-west-1.amazonaws.com/key?x", true),
            ("https://s3.dualstack.us-gov-west-1.amazonaws.com/bucket/key", true),
            ("https://bucket.s3.cn-north-1.amazonaws.com.cn/key", true),
            ("https://bucket.vpce-1.s3.eu-west-1.vpce.amazonaws.com/key", true),
            ("http://bucket.s3.eu-west-1.amazonaws.com/key", false),
            ("https://s3.example.com/amazonaws.com/key", false),
            ("https://s3.example.com?x=.amazonaws.com", false),
            ("https://amazonaws.com.example.com/key", false),
            ("https://127.0.0.1:4566/bucket/key", false),
            ("", false),
        ] {
            assert_eq!(is_aws(url), expected, "{url}");
        }
    }
}
