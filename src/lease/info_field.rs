//! The field `Info` of a lock. Terraform prints it to everybody whom the lock refuses, and leaves it empty. While the
//! lock has a lease, the field says who holds the lock, for people who do not use `tf`.
//!
//! Everything that compares the text of a lock compares the text that terraform wrote. So the field is emptied again
//! when a lock is read.

use std::borrow::Cow;

use super::record::Record;
use super::terms::Terms;
use crate::console::visible_whole;
use crate::json;

/// The field as terraform writes it (encoding/json, without white space). This text cannot be within a string, because
/// a string contains no quotation mark without a backslash.
const EMPTY: &str = r#","Info":"","#;

/// The begin of the field.
const BEGIN: &str = r#","Info":""#;

/// The longest name of a holder in the field, in bytes.
const MAX_NAME: usize = 256;

/// Adds the content of the field to the text of a lock with the lease `record`. `None` if the field is not as terraform
/// writes it.
pub(crate) fn fill(lock: &str, record: &Record) -> Option<String> {
    let content = json::to_string(&content(record)).ok()?;
    let filled = lock.replacen(EMPTY, &format!(r#","Info":{content},"#), 1);
    (filled != lock && clear(&filled) == lock).then_some(filled)
}

/// Returns the text of a lock as terraform wrote it: with an empty field if [`fill`] has filled it, and `lock` itself
/// otherwise.
pub(crate) fn clear(lock: &str) -> Cow<'_, str> {
    // Most locks have an empty field.
    let filled = lock.split_once(BEGIN).filter(|(_, rest)| !rest.starts_with('"'));
    let cleared = filled.and_then(|(before, rest)| {
        // The first quotation mark after an even number of backslashes ends the string.
        let mut is_escaped = false;
        let end = rest.find(|char| {
            let is_end = char == '"' && !is_escaped;
            is_escaped = char == '\\' && !is_escaped;
            is_end
        })?;
        let content: String = serde_json::from_str(&format!("\"{}\"", &rest[..end])).ok()?;
        let after = rest[end + 1..].strip_prefix(',')?;
        is_ours(&content).then(|| format!("{before}{EMPTY}{after}"))
    });
    cleared.map_or(Cow::Borrowed(lock), Cow::Owned)
}

/// Returns the content for a lock with the lease `record`: `https://ci.example/job/7 (tf lease 5m)`, for example.
fn content(record: &Record) -> String {
    let holder = &record.holder;
    let who = if holder.host.is_empty() { holder.user.clone() } else { format!("{}@{}", holder.user, holder.host) };
    let has_url = holder.job.contains("://") && holder.job.len() <= MAX_NAME;
    let name = visible_whole(if has_url { &holder.job } else { &who });
    let lease = format!("tf lease {}", record.terms().map_or_else(String::new, length));
    if name.is_empty() || name.len() > MAX_NAME { lease } else { format!("{name} ({lease})") }
}

/// Returns the length of a lease, in the form in which a user chooses it.
fn length(terms: Terms) -> String {
    match terms.length().as_secs() {
        seconds if seconds % 60 == 0 => format!("{}m", seconds / 60),
        seconds => format!("{seconds}s"),
    }
}

fn is_ours(content: &str) -> bool {
    let lease = content.rsplit_once(" (").and_then(|(_, last)| last.strip_suffix(')')).unwrap_or(content);
    let length = lease.strip_prefix("tf lease ").and_then(|length| length.strip_suffix(['m', 's']));
    length.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::record::{Promise, Renewal};
    use super::*;

    const LOCK: &str = r#"{"ID":"a","Operation":"OperationTypeApply","Info":"","Who":"o@h","Path":"b/k"}"#;

    fn record(length: Duration, fill: impl Fn(&mut Record)) -> Record {
        let mut record = Record::new("a", Terms::new(length).unwrap(), Renewal { renewed: 1, beat: 1 }, Promise::Stop);
        record.holder.user = "anna".into();
        record.holder.host = "ci-7".into();
        fill(&mut record);
        record
    }

    #[test]
    fn the_field_names_the_job_or_else_the_user_and_the_host() {
        let minutes = Duration::from_mins(5);
        for (record, expected) in [
            (record(minutes, |_| {}), "anna@ci-7 (tf lease 5m)"),
            (record(Duration::from_secs(90), |_| {}), "anna@ci-7 (tf lease 90s)"),
            (record(minutes, |one| one.holder.job = "https://ci/7?a=b&c".into()), "https://ci/7?a=b&c (tf lease 5m)"),
            // Only a URL says which system it is.
            (record(minutes, |one| one.holder.job = "7".into()), "anna@ci-7 (tf lease 5m)"),
            (record(minutes, |one| one.holder.job = format!("https://{}", "j".repeat(300))), "anna@ci-7 (tf lease 5m)"),
            (record(minutes, |one| one.holder.host = "h".repeat(300)), "tf lease 5m"),
            (record(minutes, |one| (one.holder.user, one.holder.host) = Default::default()), "tf lease 5m"),
            (record(minutes, |one| one.holder.host = "a\u{1b}[31m\"\\".into()), "anna@a\\u{1b}[31m\"\\ (tf lease 5m)"),
        ] {
            assert_eq!(content(&record), expected);
            let filled = fill(LOCK, &record).unwrap();
            let read: serde_json::Value = serde_json::from_str(&filled).unwrap();
            assert_eq!(read["Info"], expected);
            assert_eq!(clear(&filled), LOCK);
        }
    }

    #[test]
    fn a_field_that_is_not_as_terraform_or_tf_writes_it_is_left_as_it_is() {
        let record = record(Duration::from_mins(5), |_| {});
        for text in [
            r#"{"ID":"a","Info":"x","Who":"o@h"}"#,
            r#"{"ID":"a", "Info": "", "Who":"o@h"}"#,
            r#"{"ID":"a","Who":"o@h"}"#,
            r#"{"Info":"","ID":"a"}"#,
            r#"{"ID":"a","Who":",\"Info\":\"\","}"#,
            r#"{"ID":"a","Info":"","Info":"x","Who":"o@h"}"#,
            "",
        ] {
            if let Some(filled) = fill(text, &record) {
                assert_eq!(clear(&filled), text);
            }
            assert_eq!(clear(text), text);
        }
        assert_eq!(fill(r#"{"ID":"a","Who":",\"Info\":\"\","}"#, &record), None);
        for content in
            ["", "x", "tf lease", "tf lease 5h", "tf lease m", "(tf lease 5m", "a (tf lease 5m) b", "atf lease 5m"]
        {
            let text = format!(r#"{{"ID":"a","Info":"{content}","Who":"o@h"}}"#);
            assert_eq!(clear(&text), text);
        }
    }

    proptest! {
        #[test]
        fn what_was_filled_is_cleared_again(user in "\\PC{0,9}", host in ".{0,9}", who in "\\PC{0,30}") {
            let record = record(Duration::from_mins(5), |record| {
                record.holder.user.clone_from(&user);
                record.holder.host.clone_from(&host);
            });
            let who = serde_json::to_string(&who).unwrap();
            let lock = format!(r#"{{"ID":"a","Operation":"o","Info":"","Who":{who},"Path":"b/k"}}"#);
            let filled = fill(&lock, &record).unwrap();
            prop_assert_eq!(clear(&filled), lock);
        }

        #[test]
        fn nothing_that_is_no_lock_is_a_fault(text in "\\PC{0,60}") {
            let _ = clear(&format!("{BEGIN}{text}"));
        }
    }
}
