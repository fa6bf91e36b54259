//! The record that travels with a lock: who holds it, for how long, and when the lease was last renewed.
//!
//! In DynamoDB it is the attribute `tf` of the lock's item, a map. In S3 it is the last member of the lock's own JSON.
//! Terraform and OpenTofu ignore members that they do not know. A person who may write the lock may write the record,
//! so everything in it is untrusted.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use serde::de::{Deserializer, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::notice::Notice;
use super::terms::Terms;
use crate::json::{self, MemberNames};

/// The name of the attribute and of the member.
pub(crate) const FIELD: &str = "tf";

/// The version of the format. A record of another version is not believed.
const FORMAT: u32 = 1;

/// The largest record that is parsed, in bytes of JSON. `tf` writes at most half of it.
pub(crate) const MAX_BYTES: usize = 2048;

/// 2020-01-01, in seconds since 1970. No service had an earlier time when `tf` wrote a record.
const FIRST_TIME: i64 = 1_577_836_800;

/// What the holder's host promises about the time after its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Promise {
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
    fn facts(&mut self) -> Vec<&mut String> {
        vec![
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

/// The member `tf` of a lock's JSON, as [`split`] finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Member {
    /// There is no such member.
    None,
    /// It is the last member, and an object. The text is its value. It was cut out of the lock's text.
    Last(String),
    /// It is not in the place or of the form in which `tf` writes it. It is still in the lock's text.
    NotBelieved(NotBelieved),
}

impl Member {
    /// Parses the record of the lock `lock`. `None` if there is no member.
    pub(crate) fn record(&self, lock: &str) -> Option<Result<Record, NotBelieved>> {
        match self {
            Self::None => None,
            Self::Last(text) => Some(Record::parse(text, lock)),
            Self::NotBelieved(reason) => Some(Err(*reason)),
        }
    }
}

/// The text before the value of the member, in a lock's text.
const MEMBER: &str = ",\"tf\":";

/// Separates the text of a lock object into the text that terraform wrote and the member `tf`. The first text is `text`
/// itself, byte for byte, unless the member is the last one, exists once, and is an object of at most 2 KiB without
/// white space around it, as `tf` writes it.
pub(crate) fn split(text: &str) -> (Cow<'_, str>, Member) {
    let whole = |member| (Cow::Borrowed(text), member);
    // This is the only look at most objects.
    if !text.contains("tf\"") && !text.contains('\\') {
        return whole(Member::None);
    }
    let Ok(MemberNames(names)) = json::parse(text) else { return whole(Member::None) };
    match names.iter().filter(|name| *name == FIELD).count() {
        0 => return whole(Member::None),
        1 if names.last().is_some_and(|name| name == FIELD) => {}
        _ => return whole(Member::NotBelieved(NotBelieved::Malformed)),
    }
    // The whole text is JSON. So `,"tf":` is never within a string, and a value that ends where the object of the lock
    // ends is a value of that object. At most one value ends there.
    let found = text.strip_suffix('}').and_then(|body| {
        let from = body.ceil_char_boundary(body.len().saturating_sub(MEMBER.len() + MAX_BYTES));
        body[from..].match_indices(MEMBER).find_map(|(at, _)| {
            let value = &body[from + at + MEMBER.len()..];
            let is_object = value.starts_with('{') && serde_json::from_str::<IgnoredAny>(value).is_ok();
            is_object.then(|| (format!("{}}}", &body[..from + at]), value))
        })
    });
    match found {
        Some((lock, value)) if value.ends_with('}') => (Cow::Owned(lock), Member::Last(value.to_owned())),
        _ if text.len() > MAX_BYTES => whole(Member::NotBelieved(NotBelieved::TooLarge)),
        _ => whole(Member::NotBelieved(NotBelieved::Malformed)),
    }
}

/// Adds the member `tf` with the value `record` to the text of a lock. `None` if the text does not end as terraform's
/// does, so that the member could not be cut out again.
pub(crate) fn join(lock: &str, record: &str) -> Option<String> {
    let joined = format!("{}{MEMBER}{record}}}", lock.strip_suffix('}')?);
    (split(&joined) == (Cow::Borrowed(lock), Member::Last(record.to_owned()))).then_some(joined)
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

/// Why the terraform of the lock was interrupted: the host of its run is about to end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Interruption {
    /// What happens to the host: a participle, for example `terminated`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) host: String,
    /// What has announced it, for example `EC2 spot interruption`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) why: String,
    /// When the host ends at the earliest, in seconds since 1970. `None` if that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at: Option<i64>,
}

impl Interruption {
    /// Returns when the host ends at the earliest. `None` if that is not known, or is no possible time.
    pub(crate) fn at(&self) -> Option<Timestamp> {
        Timestamp::from_second(self.at?).ok()
    }
}

impl From<Notice> for Interruption {
    fn from(Notice { end, announcement, at }: Notice) -> Self {
        Self { host: end.word().to_owned(), why: announcement.name().to_owned(), at }
    }
}

/// Reads an interruption. `None` if it does not have the form in which `tf` writes it: nothing is decided by it, so the
/// rest of the record is believed all the same.
fn interruption<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Interruption>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    Ok(value.is_object().then(|| serde_json::from_value(value).ok()).flatten())
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
    pub(crate) fence: Promise,
    /// The region in which the record was written. In a global table, another region may show an older one.
    pub(crate) region: String,
    /// The version of `tf`.
    #[serde(rename = "tf")]
    pub(crate) version: String,
    #[serde(default)]
    pub(crate) holder: Holder,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) taken: Option<Claim>,
    /// `None` if terraform was not interrupted because of a notice.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "interruption")]
    pub(crate) interrupted: Option<Interruption>,
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
    /// `renewed` or the time of a claim is before [`FIRST_TIME`].
    Past,
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
            Self::Past => "its lease record has a time before 2020",
            Self::Future => "its lease was renewed in the future",
        })
    }
}

impl Record {
    /// Returns a record of the lock `lock` that was renewed by `renewal`.
    pub(crate) fn new(lock: &str, terms: Terms, renewal: Renewal, fence: Promise) -> Self {
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
            interrupted: None,
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
        // Serde reads an array as a record too.
        if !text.starts_with('{') {
            return Err(NotBelieved::Malformed);
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
        } else if self.renewed < FIRST_TIME || self.taken.as_ref().is_some_and(|claim| claim.at < FIRST_TIME) {
            Err(NotBelieved::Past)
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

    /// Returns the record as JSON. Two records with equal texts are equal.
    pub(crate) fn to_json(&self) -> String {
        // A record contains only texts and numbers, so this cannot fail.
        crate::json::to_string(self).unwrap_or_default()
    }

    /// Returns the record as a value, in the form that a DynamoDB map has.
    pub(crate) fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// Returns the record without the longest facts about its holder, so that `fits` is true for it. Returns it without
    /// any fact if `fits` is false even then.
    pub(crate) fn cut(&self, fits: impl Fn(&Self) -> bool) -> Self {
        let mut record = self.clone();
        while !fits(&record) {
            let by = record.taken.as_mut().map(|claim| &mut claim.by);
            let why = record.interrupted.iter_mut().flat_map(|notice| [&mut notice.host, &mut notice.why]);
            let facts = record.holder.facts().into_iter().chain(by).chain(why);
            match facts.max_by_key(|fact| fact.len()) {
                Some(longest) if !longest.is_empty() => longest.clear(),
                _ => break,
            }
        }
        record
    }

    /// Whether `stored` is this record, or was written after it by the same keeper. A keeper that finds such a record
    /// has renewed the lease with this one, even if the response to that renewal was lost.
    pub(crate) fn is_confirmed_by(&self, stored: &Self) -> bool {
        stored.lock == self.lock && stored.keeper == self.keeper && self.is_at_most(stored)
    }

    /// Whether `stored` was written after this record was made, and is not about an earlier time of the service. If the
    /// service's clock was set back, an earlier record has the later time. It says nothing about how long the holder
    /// may work now.
    pub(crate) fn is_at_most(&self, stored: &Self) -> bool {
        stored.renewed >= self.renewed && stored.beat >= self.beat
    }
}

impl Claim {
    /// Returns when the claim was made. `None` if it is no possible time.
    pub(crate) fn at(&self) -> Option<Timestamp> {
        Timestamp::from_second(self.at).ok()
    }

    /// Whether `other` is this claim. [`Claim::by`] does not count, because [`Record::cut`] may leave it out.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.number == other.number && self.at == other.at
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::notice::{Announcement, HostEnd};
    use super::*;

    const LOCK: &str = r#"{"ID":"a","Operation":"OperationTypeApply","Info":"","Who":"u,\"tf\":{}}","Path":"b/k"}"#;

    fn record() -> Record {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        let mut record = Record::new("a", terms, Renewal { renewed: 1_790_000_000, beat: 7 }, Promise::Stop);
        record.keeper = u64::MAX;
        record.region = "eu-central-1".to_owned();
        record.holder = Holder { user: "anna".into(), host: "vm".into(), job: "j".repeat(90), ..Holder::default() };
        record
    }

    fn interruption() -> Interruption {
        let (end, announcement) = (HostEnd::Terminated, Announcement::SpotInterruption);
        Notice { end, announcement, at: Some(1_790_000_120) }.into()
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let claim = Claim { by: "o@h".into(), at: 1_790_000_400, number: 9 };
        let interrupted = Some(interruption());
        for record in [
            record(),
            Record { taken: Some(claim), ..record() },
            Record { fence: Promise::None, ..record() },
            Record { interrupted, ..record() },
            Record { interrupted: Some(Interruption::default()), ..record() },
        ] {
            assert_eq!(Record::parse(&record.to_json(), "a"), Ok(record.clone()));
            assert_eq!(Record::of_value(&record.to_value(), "a"), Ok(record));
        }
    }

    #[test]
    fn a_record_that_tf_does_not_write_is_not_believed() {
        type Case = (&'static str, &'static str, NotBelieved);
        let cases: &[Case] = &[
            (r#""v":1"#, r#""v":2"#, NotBelieved::Format),
            (r#""v":1"#, r#""v":1,"v":1"#, NotBelieved::Malformed),
            (r#""v":1,"#, "", NotBelieved::Malformed),
            (r#""lock":"a""#, r#""lock":"b""#, NotBelieved::AnotherLock),
            (r#""lock":"a""#, r#""lock":7"#, NotBelieved::Malformed),
            (r#""lease":300"#, r#""lease":3601"#, NotBelieved::Length),
            (r#""lease":300"#, r#""lease":-1"#, NotBelieved::Malformed),
            (r#""lease":300"#, r#""lease":1e2"#, NotBelieved::Malformed),
            (r#""renewed":1790000000"#, r#""renewed":9223372036854775807"#, NotBelieved::Malformed),
            (r#""renewed":1790000000"#, r#""renewed":-9223372036854775808"#, NotBelieved::Malformed),
            (r#""renewed":1790000000"#, r#""renewed":0"#, NotBelieved::Past),
            (r#""renewed":1790000000"#, r#""renewed":-5"#, NotBelieved::Past),
            (r#""renewed":1790000000"#, r#""renewed":1577836799"#, NotBelieved::Past),
            (r#""fence":"stop""#, r#""fence":"maybe""#, NotBelieved::Malformed),
            (
                r#""holder":{"#,
                r#""taken":{"by":"x","at":9223372036854775807,"number":1},"holder":{"#,
                NotBelieved::Malformed,
            ),
            (r#""holder":{"#, r#""taken":true,"holder":{"#, NotBelieved::Malformed),
            (r#""holder":{"#, r#""taken":{"by":"x","at":0,"number":1},"holder":{"#, NotBelieved::Past),
        ];
        let json = record().to_json();
        for (old, new, reason) in cases {
            assert!(json.contains(old), "{json} {old}");
            assert_eq!(Record::parse(&json.replacen(old, new, 1), "a"), Err(*reason), "{new}");
        }
        let array = r#"[1,"a",1790000000,7,1,300,"stop","","0.1"]"#;
        assert_eq!(Record::parse(array, "a"), Err(NotBelieved::Malformed));
        let large = json.replacen('{', &format!(r#"{{"x":"{}","#, "x".repeat(MAX_BYTES)), 1);
        assert_eq!(Record::parse(&large, "a"), Err(NotBelieved::TooLarge));
        // A later version may add members.
        assert_eq!(Record::parse(&json.replacen('{', r#"{"x":[{}],"#, 1), "a"), Ok(record()));
    }

    #[test]
    fn a_record_with_a_strange_interruption_is_believed_without_it_or_with_its_texts() {
        let written = Record { interrupted: Some(interruption()), ..record() }.to_json();
        let member = r#""interrupted":{"host":"terminated","why":"EC2 spot interruption","at":1790000120}"#;
        assert!(written.contains(member), "{written}");
        let read = |new: &str| Record::parse(&written.replace(member, new), "a").map(|record| record.interrupted);
        for strange in
            ["true", "7", "null", "[]", r#"["a","b"]"#, r#"{"host":7}"#, r#"{"at":"soon"}"#, r#"{"at":1e99}"#]
        {
            assert_eq!(read(&format!(r#""interrupted":{strange}"#)), Ok(None), "{strange}");
        }
        for (text, at) in
            [(r#"{"host":"moved","x":[{}]}"#, None), (r#"{"host":"moved","at":9223372036854775807}"#, None)]
        {
            let found = read(&format!(r#""interrupted":{text}"#)).unwrap().unwrap();
            assert_eq!((found.host.as_str(), found.why.as_str(), found.at()), ("moved", "", at), "{text}");
        }
        assert_eq!(read(&format!("{member},{member}")), Err(NotBelieved::Malformed));
    }

    #[test]
    fn the_longest_facts_are_cut_first() {
        let claim = Claim { by: "t".repeat(60), at: 0, number: 9 };
        let full = Record { taken: Some(claim), ..record() };
        let without = |max: usize| full.cut(|record| record.to_json().len() <= max);
        let length = full.to_json().len();
        assert_eq!(without(length), full);
        let cut = without(length - 1);
        assert_eq!((cut.holder.job.as_str(), cut.holder.user.as_str()), ("", "anna"));
        assert_eq!(cut.taken.as_ref().unwrap().by.len(), 60);
        let cut = without(length - 101);
        assert_eq!((cut.taken.as_ref().unwrap().by.as_str(), cut.holder.user.as_str()), ("", "anna"));
        assert_eq!(without(0).holder, Holder::default());
        let why = Interruption { why: "w".repeat(99), ..interruption() };
        let cut = Record { interrupted: Some(why), ..record() };
        let cut = cut.cut(|record| record.to_json().len() < cut.to_json().len()).interrupted.unwrap();
        assert_eq!((cut.why.as_str(), cut.host.as_str(), cut.at), ("", "terminated", Some(1_790_000_120)));
        assert_eq!(without(0).renewal(), full.renewal());
    }

    #[test]
    fn a_record_is_confirmed_by_itself_and_by_a_later_one_of_its_keeper() {
        let with = |renewed, beat, keeper, lock: &str| Record { renewed, beat, keeper, lock: lock.into(), ..record() };
        let sent = with(10, 5, 1, "a");
        for (stored, confirmed) in [
            (with(10, 5, 1, "a"), true),
            (with(10, 6, 1, "a"), true),
            (with(11, 6, 1, "a"), true),
            // The service's clock was set back since: an earlier record has the later time.
            (with(11, 4, 1, "a"), false),
            (with(10, 4, 1, "a"), false),
            (with(9, 9, 1, "a"), false),
            (with(10, 5, 2, "a"), false),
            (with(10, 5, 1, "b"), false),
        ] {
            assert_eq!(sent.is_confirmed_by(&stored), confirmed, "{stored:?}");
        }
    }

    #[test]
    fn a_member_is_cut_out_of_the_text_to_which_it_was_added() {
        let json = record().to_json();
        let joined = join(LOCK, &json).unwrap();
        assert_eq!(split(&joined), (Cow::Borrowed(LOCK), Member::Last(json.clone())));
        assert_eq!(split(&joined).1.record("a"), Some(Ok(record())));
        assert_eq!(split(&joined).1.record("b"), Some(Err(NotBelieved::AnotherLock)));
        // A record that is not believed is cut out too: it is not of terraform.
        let other = join(LOCK, r#"{"v":2}"#).unwrap();
        assert_eq!(split(&other).0, LOCK);
        for lock in ["", "{}", "[]", "{\"ID\":\"a\"} ", "{\"ID\":\"a\"", joined.as_str(), "{\"ID\":\"a\"}}"] {
            assert_eq!(join(lock, &json), None, "{lock}");
        }
        for record in ["", "7", "[]", "{\"v\":1", "{},\"x\":1", "{}}"] {
            assert_eq!(join(LOCK, record), None, "{record}");
        }
    }

    #[test]
    fn a_lock_without_a_last_member_of_tf_is_left_as_it_is() {
        let large = format!(r#"{{"ID":"a","tf":{{"x":"{}"}}}}"#, "x".repeat(MAX_BYTES));
        let deep = format!(r#"{{"ID":"a","tf":{}1{}}}"#, r#"{"x":"#.repeat(500), "}".repeat(500));
        let deep_lock = format!(r#"{{"x":{}{},"ID":"a"}}"#, "[".repeat(100_000), "]".repeat(100_000));
        for (text, member) in [
            (LOCK, Member::None),
            ("", Member::None),
            ("<html>tf\"</html>", Member::None),
            (r#"{"ID":"a","TF":{}}"#, Member::None),
            (r#"{"ID":"a","x":{"y":1,"tf":{}}}"#, Member::None),
            (r#"[{"ID":"a","tf":{}}]"#, Member::None),
            (&deep_lock, Member::None),
            (r#"{"tf":{}}"#, Member::NotBelieved(NotBelieved::Malformed)),
            (r#"{"tf":{},"ID":"a"}"#, Member::NotBelieved(NotBelieved::Malformed)),
            (r#"{"ID":"a","tf":{},"tf":{}}"#, Member::NotBelieved(NotBelieved::Malformed)),
            (r#"{"t\u0066":{},"ID":"a","tf":{}}"#, Member::NotBelieved(NotBelieved::Malformed)),
            (r#"{"ID":"a","t\u0066":{}}"#, Member::NotBelieved(NotBelieved::Malformed)),
            (r#"{"ID":"a","tf":7}"#, Member::NotBelieved(NotBelieved::Malformed)),
            (r#"{"ID":"a","tf":{}} "#, Member::NotBelieved(NotBelieved::Malformed)),
            (r#"{"ID":"a","tf": {}}"#, Member::NotBelieved(NotBelieved::Malformed)),
            (r#"{"ID":"a","tf":{} }"#, Member::NotBelieved(NotBelieved::Malformed)),
            (&large, Member::NotBelieved(NotBelieved::TooLarge)),
            (&deep, Member::NotBelieved(NotBelieved::TooLarge)),
        ] {
            assert!(split(text) == (Cow::Borrowed(text), member), "{text:.60}");
        }
        let nested = r#"{"ID":"a","tf":{"x":1,"tf":{"y":"},\"tf\":{}"}}}"#;
        assert_eq!(split(nested).0, r#"{"ID":"a"}"#);
        assert_eq!(split(nested).1.record("a"), Some(Err(NotBelieved::Malformed)));
    }

    #[test]
    fn any_text_is_split_without_a_panic_and_a_cut_text_can_be_joined_again() {
        let sample = join(LOCK, &record().to_json()).unwrap();
        let strategy = crate::generated_input::changed(sample.into_bytes());
        crate::generated_input::for_all(file!(), &strategy, |changed| {
            let text = String::from_utf8_lossy(&changed);
            let (lock, member) = split(&text);
            let record = member.record("a");
            match &member {
                Member::Last(value) => {
                    prop_assert_eq!(join(&lock, value), Some(text.clone().into_owned()));
                    prop_assert_eq!(&split(&lock), &(Cow::Borrowed(lock.as_ref()), Member::None));
                }
                Member::None | Member::NotBelieved(_) => {
                    prop_assert_eq!(lock, text.as_ref());
                    prop_assert!(!matches!(record, Some(Ok(_))));
                }
            }
            Ok(())
        });
    }
}
