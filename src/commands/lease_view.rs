//! The lease of a lock, as `tf locks` shows it. Every fact in a record is untrusted.

use jiff::Timestamp;
use serde::Serialize;

use crate::console::{length_of_time, visible};
use crate::holder::lease_text;
use crate::lease::observed::{Freshness, KnownLease, LeaseDoubt, ObservedLease};
use crate::lease::record::{Holder, Interruption, Promise, Record};

/// The lease in JSON, as docs/locks.schema.json describes it.
#[derive(Serialize)]
pub(super) struct LeaseView<'a> {
    state: &'static str,
    /// Why the lease says nothing. `None` if it is believed and its age is known.
    reason: Option<String>,
    /// The record. `None` if it is not believed.
    #[serde(flatten)]
    record: RecordView<'a>,
    age_seconds: Option<u64>,
    claim: Option<ClaimView<'a>>,
}

#[derive(Default, Serialize)]
struct RecordView<'a> {
    length_seconds: Option<u64>,
    renewed: Option<Timestamp>,
    grade: Option<Promise>,
    region: Option<&'a str>,
    version: Option<&'a str>,
    holder: Option<HolderView<'a>>,
    interrupted: Option<InterruptionView<'a>>,
}

#[derive(Serialize)]
struct HolderView<'a> {
    user: &'a str,
    host: &'a str,
    machine: &'a str,
    boot: &'a str,
    container: &'a str,
    ci: &'a str,
    job: &'a str,
    attempt: &'a str,
    cloud: &'a str,
}

#[derive(Serialize)]
struct InterruptionView<'a> {
    host: &'a str,
    why: &'a str,
    at: Option<Timestamp>,
}

impl<'a> InterruptionView<'a> {
    fn of(interruption: &'a Interruption) -> Self {
        Self { host: &interruption.host, why: &interruption.why, at: interruption.at() }
    }
}

#[derive(Serialize)]
struct ClaimView<'a> {
    by: &'a str,
    at: Option<Timestamp>,
    age_seconds: u64,
    lapsed: bool,
}

impl<'a> LeaseView<'a> {
    /// Returns the lease as it is shown in JSON.
    pub(super) fn of(lease: &'a ObservedLease) -> Self {
        let known = lease.known();
        let state = match &known {
            Ok(KnownLease { claim: Some(_), .. }) => "claimed",
            Ok(KnownLease { freshness: Freshness::Fresh, .. }) => "fresh",
            Ok(KnownLease { freshness: Freshness::Lapsed, .. }) => "lapsed",
            Err(LeaseDoubt::NotBelieved(_)) => "not_believed",
            Err(LeaseDoubt::NoTime) => "unknown",
        };
        let claim = known.as_ref().ok().and_then(|known| known.claim).map(|known| ClaimView {
            by: &known.claim.by,
            at: known.claim.at(),
            age_seconds: known.age.as_secs(),
            lapsed: known.has_lapsed,
        });
        Self {
            state,
            reason: known.as_ref().err().map(ToString::to_string),
            record: lease.shown_record().map_or_else(RecordView::default, RecordView::of),
            age_seconds: known.as_ref().ok().map(|known| known.age.as_secs()),
            claim,
        }
    }
}

impl<'a> RecordView<'a> {
    fn of(record: &'a Record) -> Self {
        let Holder { user, host, machine, boot, container, ci, job, attempt, cloud } = &record.holder;
        Self {
            length_seconds: record.terms().map(|terms| terms.length().as_secs()),
            renewed: record.renewed_at(),
            grade: Some(record.fence),
            region: Some(&record.region),
            version: Some(&record.version),
            holder: Some(HolderView { user, host, machine, boot, container, ci, job, attempt, cloud }),
            interrupted: record.interrupted.as_ref().map(InterruptionView::of),
        }
    }
}

/// Returns everything about a lease in lines. Each line has a name, which is empty if it continues the one before.
pub(super) fn lines(lease: &ObservedLease) -> Vec<(&'static str, String)> {
    let known = lease.known();
    let mut lines: Vec<(&str, String)> = Vec::new();
    if let Err(doubt) = &known {
        lines.push(("lease", doubt.to_string()));
    }
    let Some(record) = lease.shown_record() else { return lines };
    if let Ok(known) = &known {
        lines.push((
            "lease",
            format!(
                "{}, renewed {} ago ({:.0}), by the service's clock",
                lease_text::length(known.length),
                length_of_time(known.age),
                known.renewed
            ),
        ));
    }
    lines.push((
        "grade",
        match record.fence {
            Promise::Stop => "stop: its host stops terraform before the lease lapses".to_owned(),
            Promise::None => "none: its host does not promise to stop terraform before the lease lapses".to_owned(),
        },
    ));
    let holder = &record.holder;
    let mut name = "holder";
    let facts = [
        lease_text::who(holder),
        lease_text::job(holder),
        lease_text::container(holder),
        lease_text::cloud(holder),
        named("machine", &holder.machine),
        named("boot", &holder.boot),
    ];
    for fact in facts.into_iter().flatten() {
        lines.push((std::mem::take(&mut name), fact));
    }
    lines.extend(named("tf", &record.version).map(|version| (name, version)));
    lines.extend(named("region", &record.region).map(|region| ("", region)));
    lines.extend(record.interrupted.as_ref().map(|notice| ("interrupted", lease_text::interruption(notice))));
    if let Ok(KnownLease { claim: Some(known), .. }) = &known {
        let rest = if known.has_lapsed { ", and has not released the lock" } else { "" };
        let by = lease_text::claimant(known.claim);
        lines.push(("claimed by", format!("{by}, {} ago{rest}", length_of_time(known.age))));
    }
    lines
}

fn named(name: &str, fact: &str) -> Option<String> {
    (!fact.is_empty()).then(|| format!("{name} {}", visible(fact)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::lease::notice::{Announcement, HostEnd, Notice};
    use crate::lease::observed::tests::lease;
    use crate::lease::record::NotBelieved;

    fn parsed(lease: &ObservedLease) -> Value {
        serde_json::from_str(&crate::json::to_string(&LeaseView::of(lease)).unwrap()).unwrap()
    }

    fn of_ci() -> ObservedLease {
        let mut lease = lease("id", 40, None, Promise::Stop);
        if let Ok(record) = &mut lease.record {
            record.holder.user = "runner".into();
            record.holder.host = "fv-7".into();
            record.holder.job = "https://ci/7".into();
            record.holder.boot = "b".into();
            let notice =
                Notice { end: HostEnd::Stopped, announcement: Announcement::AutoScaling, at: Some(1_790_000_120) };
            record.interrupted = Some(notice.into());
        }
        lease
    }

    #[test]
    fn a_lease_in_json_has_the_same_members_in_every_state() {
        let good = parsed(&of_ci());
        assert_eq!(
            (&good["state"], &good["reason"], &good["age_seconds"]),
            (&json!("fresh"), &Value::Null, &json!(40))
        );
        assert_eq!((&good["grade"], &good["length_seconds"]), (&json!("stop"), &json!(300)));
        let interrupted = json!({"host": "stopped", "why": "EC2 Auto Scaling", "at": "2026-09-21T14:15:20Z"});
        assert_eq!(good["interrupted"], interrupted);
        assert_eq!((&good["holder"]["job"], &good["holder"]["cloud"]), (&json!("https://ci/7"), &json!("")));
        let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        for (lease, state) in [
            (lease("id", 400, None, Promise::None), "lapsed"),
            (lease("id", 400, Some(5), Promise::Stop), "claimed"),
            (lease("id", 400, Some(100), Promise::Stop), "claimed"),
            (lease("id", -60, None, Promise::Stop), "not_believed"),
            (ObservedLease { record: Err(NotBelieved::TooLarge), ..of_ci() }, "not_believed"),
            (ObservedLease { date: None, ..of_ci() }, "unknown"),
        ] {
            let shown = parsed(&lease);
            assert_eq!(shown["state"], state);
            assert_eq!(names(&shown), names(&good));
            assert_eq!(shown["holder"].is_null(), state == "not_believed", "{shown}");
            assert_eq!(shown["reason"].is_null(), !matches!(state, "not_believed" | "unknown"), "{shown}");
            assert_eq!(shown["claim"].is_null(), state != "claimed", "{shown}");
        }
    }

    #[test]
    fn a_lease_in_lines_has_every_fact() {
        let all = |lease: &ObservedLease| {
            lines(lease).iter().fold(String::new(), |all, (name, text)| format!("{all}{name}: {text}\n"))
        };
        let shown = all(&of_ci());
        for fact in [
            "lease: 5 min, renewed 40 s ago",
            "grade: stop",
            "holder: runner@fv-7",
            ": https://ci/7",
            ": boot b",
            "interrupted: its host is to be stopped at 2026-09-21T14:15:20Z (EC2 Auto Scaling)",
        ] {
            assert!(shown.contains(fact), "{fact}: {shown}");
        }
        let claimed = all(&lease("id", 400, Some(100), Promise::Stop));
        assert!(claimed.contains("claimed by: bert@ci-8, 1 min 40 s ago, and has not released the lock"), "{claimed}");
        let not_believed = all(&ObservedLease { record: Err(NotBelieved::Format), ..of_ci() });
        assert_eq!(not_believed, "lease: its lease record has a format that this version of tf does not know\n");
        let no_time = all(&ObservedLease { date: None, ..of_ci() });
        assert!(
            no_time.starts_with("lease: the age of its lease is not known") && no_time.contains("runner"),
            "{no_time}"
        );
    }

    #[test]
    fn a_strangers_record_cannot_do_anything() {
        let mut lease = lease("id", 400, Some(5), Promise::Stop);
        if let Ok(record) = &mut lease.record {
            let evil = "\u{1b}]0;x\u{7}\n\r\u{202e}".repeat(30);
            let interrupted = record.interrupted.insert(Interruption::default());
            for text in [
                &mut interrupted.host,
                &mut interrupted.why,
                &mut record.region,
                &mut record.version,
                &mut record.holder.user,
                &mut record.holder.host,
                &mut record.holder.machine,
                &mut record.holder.boot,
                &mut record.holder.container,
                &mut record.holder.ci,
                &mut record.holder.job,
                &mut record.holder.attempt,
                &mut record.holder.cloud,
                &mut record.taken.as_mut().unwrap().by,
            ] {
                text.clone_from(&evil);
            }
        }
        let shown = lines(&lease).into_iter().map(|(_, text)| text).chain(lease_text::of_holder(&lease));
        for text in shown.chain([crate::json::to_string(&LeaseView::of(&lease)).unwrap()]) {
            assert!(!text.chars().any(char::is_control) && !text.contains('\u{202e}'), "{text:?}");
        }
    }
}
