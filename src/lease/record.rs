//! The record that travels with a lock: who holds it, for how long, and when the lease was last renewed.
//!
//! In DynamoDB it is the attribute `tf` of the lock's item, a map. In S3 it is the last member of the lock's own JSON.
//! Terraform and OpenTofu ignore members that they do not know. Whoever may write the lock may write the record, so
//! everything in it is untrusted.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::terms::Terms;
use crate::console::visible;

/// The name of the attribute and of the member.
pub(crate) const FIELD: &str = "tf";

/// The version of the format. A record of another version is not believed.
const FORMAT: u32 = 1;

/// The largest record that is parsed, in bytes of JSON. `tf` writes at most half of it.
const MAX_BYTES: usize = 2048;

/// What the holder's host promises about the time after its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Fence {
    /// The kernel stops terraform before the lease lapses, even if the host is frozen.
    Stop,
    /// Nothing stops it in every case. The lock is never taken over without being asked.
    None,
}

/// Who holds a lock, for the people who read it. Every text may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Holder {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) user: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) host: String,
    /// A hash of the machine's ID.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) machine: String,
    /// The ID of the host's boot.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) boot: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) container: String,
    /// The name of the CI system.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) ci: String,
    /// The URL of the CI job.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) job: String,
    /// Which attempt of the CI job it is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) attempt: String,
    /// The cloud's instance, task or pod.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) cloud: String,
}

impl Holder {
    /// Describes the holder for a person, in one line that is safe for a terminal: the CI job's URL, or else the user
    /// and the host; then the attempt, the container and the cloud. For example, `anna@ci-7, container 3f2a1b9c4d5e`.
    /// Empty if nothing is known.
    pub(crate) fn describe(&self) -> String {
        let who = match (self.user.is_empty(), self.host.is_empty()) {
            (true, true) => String::new(),
            (false, true) => self.user.clone(),
            (_, false) => format!("{}@{}", self.user, self.host),
        };
        let job = match (self.job.is_empty(), self.ci.is_empty()) {
            (true, true) => who,
            (true, false) if who.is_empty() => self.ci.clone(),
            (true, false) => format!("{who} ({})", self.ci),
            // A URL says the system by its host.
            (false, _) if self.job.contains("://") || self.ci.is_empty() => self.job.clone(),
            (false, _) => format!("{} {}", self.ci, self.job),
        };
        let labelled = |label: &str, text: &str| if text.is_empty() { String::new() } else { format!("{label}{text}") };
        let parts =
            [job, labelled("attempt ", &self.attempt), labelled("container ", &self.container), self.cloud.clone()];
        let parts = parts.iter().filter(|part| !part.is_empty()).map(|part| visible(part));
        parts.collect::<Vec<_>>().join(", ")
    }

    fn facts(&mut self) -> [&mut String; 9] {
        [
            &mut self.user,
            &mut self.host,
            &mut self.machine,
            &mut self.boot,
            &mut self.container,
            &mut self.ci,
            &mut self.job,
            &mut self.attempt,
            &mut self.cloud,
        ]
    }
}

/// The decision of another host to release the lock. From this moment the holder may not renew its lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Claim {
    /// `user@host`, or the URL of the CI job.
    pub(crate) by: String,
    /// The service's time when the taker had read the lapsed lease, in seconds since 1970.
    pub(crate) at: i64,
    /// A random number, by which the taker recognizes its own claim.
    pub(crate) number: u64,
}

/// When a lease was renewed. Records of one lock are compared by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Renewal {
    /// As [`Record::renewed`].
    pub(crate) renewed: i64,
    /// As [`Record::beat`]. It orders renewals that have the same `renewed`.
    pub(crate) beat: u64,
}

impl Renewal {
    /// Whether the store may replace the record of `stored` by one of `self`. A request may be delayed and arrive after
    /// newer ones. If it replaced their record, the record would be older than the holder believes, and others would
    /// take the lock of a holder that is connected. The DynamoDB condition says the same.
    pub(crate) fn replaces(self, stored: Option<Self>) -> bool {
        stored.is_none_or(|stored| stored < self)
    }
}

/// A lease as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(rename = "v")]
    format: u32,
    /// The ID of the lock. A record with another ID was left by mistake.
    pub(crate) lock: String,
    /// The service's time in its response to the request before this renewal, in seconds since 1970.
    renewed: i64,
    /// The holder's `CLOCK_BOOTTIME` in milliseconds. Two renewals may have the same `renewed`.
    beat: u64,
    /// A random number of the process that renews the lease. Two records never have the same text, and so two objects
    /// never have the same ETag.
    pub(crate) keeper: u64,
    /// The length of the lease, in seconds.
    lease: u64,
    pub(crate) fence: Fence,
    /// The region in which the record was written. In a global table, another region may show an older one.
    pub(crate) region: String,
    /// The version of `tf`.
    #[serde(rename = "tf")]
    pub(crate) version: String,
    #[serde(default)]
    pub(crate) holder: Holder,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) taken: Option<Claim>,
}

/// Why a record is not believed. The lock is then judged as one without a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotBelieved {
    TooLarge,
    /// It lacks a member, has one twice, or has one of another type.
    Malformed,
    Format,
    AnotherLock,
    Length,
    /// `renewed` is in the future.
    Future,
}

impl fmt::Display for NotBelieved {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::TooLarge => "its lease record is too large",
            Self::Malformed => "its lease record cannot be read",
            Self::Format => "its lease record has a format that this version of tf does not know",
            Self::AnotherLock => "its lease record has the ID of another lock",
            Self::Length => "its lease has a length that nobody may choose",
            Self::Future => "its lease was renewed in the future",
        })
    }
}

impl Record {
    /// Returns a record of the lock `lock` that was renewed by `renewal`.
    pub(crate) fn new(lock: &str, terms: Terms, renewal: Renewal, fence: Fence) -> Self {
        Self {
            format: FORMAT,
            lock: lock.to_owned(),
            renewed: renewal.renewed,
            beat: renewal.beat,
            keeper: 0,
            lease: terms.length().as_secs(),
            fence,
            region: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            holder: Holder::default(),
            taken: None,
        }
    }

    /// Parses the JSON of a record of the lock `lock`.
    ///
    /// # Errors
    /// The reason for which it is not believed.
    pub(crate) fn parse(text: &str, lock: &str) -> Result<Self, NotBelieved> {
        if text.len() > MAX_BYTES {
            return Err(NotBelieved::TooLarge);
        }
        // Two equal names are an error of serde's derived code.
        let record: Self = serde_json::from_str(text).map_err(|_| NotBelieved::Malformed)?;
        record.check(lock)
    }

    /// Reads a record of the lock `lock` from a value, as [`Record::parse`].
    ///
    /// # Errors
    /// The reason for which it is not believed.
    pub(crate) fn of_value(value: &Value, lock: &str) -> Result<Self, NotBelieved> {
        Self::parse(&value.to_string(), lock)
    }

    fn check(self, lock: &str) -> Result<Self, NotBelieved> {
        if self.format != FORMAT {
            Err(NotBelieved::Format)
        } else if self.lock != lock {
            Err(NotBelieved::AnotherLock)
        } else if self.terms().is_none() {
            Err(NotBelieved::Length)
        } else if self.renewed_at().is_none() || self.taken.as_ref().is_some_and(|claim| claim.at().is_none()) {
            Err(NotBelieved::Malformed)
        } else {
            Ok(self)
        }
    }

    /// Returns the terms of the lease. `None` if it has a length that nobody may choose.
    pub(crate) fn terms(&self) -> Option<Terms> {
        Terms::new(Duration::from_secs(self.lease))
    }

    /// Returns when the lease was renewed.
    pub(crate) fn renewal(&self) -> Renewal {
        Renewal { renewed: self.renewed, beat: self.beat }
    }

    /// Returns the service's time at which the lease was renewed. `None` if it is no possible time.
    pub(crate) fn renewed_at(&self) -> Option<Timestamp> {
        Timestamp::from_second(self.renewed).ok()
    }

    /// Returns the record as JSON of at most `max` bytes. Facts about the holder are left out for that, the longest one
    /// first. `None` if it is longer without them.
    pub(crate) fn to_json(&self, max: usize) -> Option<String> {
        let mut record = self.clone();
        loop {
            let text = crate::json::to_string(&record).ok()?;
            if text.len() <= max {
                return Some(text);
            }
            let longest = record.holder.facts().into_iter().max_by_key(|fact| fact.len())?;
            if longest.is_empty() {
                return None;
            }
            longest.clear();
        }
    }
}

impl Claim {
    /// Returns when the claim was made. `None` if it is no possible time.
    pub(crate) fn at(&self) -> Option<Timestamp> {
        Timestamp::from_second(self.at).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_described_in_one_line() {
        let holder = |facts: &[(usize, &str)]| {
            let mut holder = Holder::default();
            for (place, text) in facts {
                *holder.facts()[*place] = (*text).to_owned();
            }
            holder
        };
        let (user, host, container, ci, job, attempt, cloud) = (0, 1, 4, 5, 6, 7, 8);
        for (facts, expected) in [
            (&[][..], ""),
            (&[(user, "anna"), (host, "ci-7")], "anna@ci-7"),
            (&[(user, "anna")], "anna"),
            (&[(host, "ci-7")], "@ci-7"),
            (&[(user, "anna"), (host, "ci-7"), (container, "3f2a1b9c4d5e")], "anna@ci-7, container 3f2a1b9c4d5e"),
            (&[(user, "anna"), (host, "ci-7"), (ci, "Atlantis")], "anna@ci-7 (Atlantis)"),
            (&[(ci, "Atlantis")], "Atlantis"),
            (
                &[
                    (user, "runner"),
                    (host, "fv-az1"),
                    (ci, "GitHub Actions"),
                    (job, "https://github.com/a/b"),
                    (attempt, "2"),
                ],
                "https://github.com/a/b, attempt 2",
            ),
            (&[(ci, "Spacelift"), (job, "infra/01H"), (cloud, "Azure")], "Spacelift infra/01H, Azure"),
            (&[(user, "a"), (host, "b"), (cloud, "pod prod/x, Amazon EC2 i-1")], "a@b, pod prod/x, Amazon EC2 i-1"),
            // A record that somebody else has written.
            (&[(user, "a\u{1b}[2J"), (host, "b\nc")], "a\\u{1b}[2J@b\\u{a}c"),
        ] {
            assert_eq!(holder(facts).describe(), expected, "{facts:?}");
        }
    }
}
