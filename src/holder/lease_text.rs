//! The texts about a lease and its holder. All facts in a lease record are untrusted.

use std::fmt::Write as _;
use std::time::Duration;

use crate::console::{length_of_time, visible};
use crate::lease::observed::ObservedLease;
use crate::lease::record::{Claim, Holder, Interruption, Promise};
use crate::lease::terms::Terms;

/// Returns the length of a lease in words: whole minutes without seconds, because that is how a user sets it.
pub(crate) fn length(length: Duration) -> String {
    match length.as_secs() {
        seconds if seconds > 0 && seconds.is_multiple_of(60) => format!("{} min", seconds / 60),
        _ => length_of_time(length),
    }
}

/// Returns a lease in one line: its length, its age, its grade and its holder. `None` if it is not believed.
pub(crate) fn of_holder(lease: &ObservedLease) -> Option<String> {
    let record = lease.shown_record()?;
    let mut text = format!("lease of {}", record.terms().map(Terms::length).map(length)?);
    if let Ok(known) = lease.known() {
        let _ = write!(text, ", renewed {} ago", length_of_time(known.age));
    }
    let _ = write!(text, ", grade {}", grade(record.fence));
    if let Some(holder) = holder(&record.holder) {
        let _ = write!(text, ", held by {holder}");
    }
    if let Some(interrupted) = &record.interrupted {
        let _ = write!(text, ", interrupted: {}", interruption(interrupted));
    }
    Some(text)
}

/// Returns why a run was interrupted: `its host is to be terminated at 2026-11-24T12:00:05Z (EC2 spot interruption)`.
/// What the record does not have is left out.
pub(crate) fn interruption(interrupted: &Interruption) -> String {
    let mut text = match visible(&interrupted.host) {
        end if end.is_empty() => "its host is about to end".to_owned(),
        end => format!("its host is to be {end}"),
    };
    if let Some(at) = interrupted.at() {
        let _ = write!(text, " at {at:.0}");
    }
    if !interrupted.why.is_empty() {
        let _ = write!(text, " ({})", visible(&interrupted.why));
    }
    text
}

/// Returns who has claimed a lock: the URL of a CI job, or `user@host`. That is left out of a claim for which there was
/// no room beside the lock.
pub(crate) fn claimant(claim: &Claim) -> String {
    match visible(&claim.by) {
        by if by.is_empty() => "another host".to_owned(),
        by => by,
    }
}

fn grade(fence: Promise) -> &'static str {
    match fence {
        Promise::Stop => "stop",
        Promise::None => "none",
    }
}

/// Returns a holder in one line: user and host, the CI job, the container and the cloud. Facts that the record does not
/// have are left out. `None` if it has none of these.
pub(crate) fn holder(holder: &Holder) -> Option<String> {
    let facts: Vec<String> =
        [who(holder), job(holder), container(holder), cloud(holder)].into_iter().flatten().collect();
    Some(facts.join(", ")).filter(|facts| !facts.is_empty())
}

/// Returns a short name of a holder: the CI job, or else the user and the host; then the container and the cloud. For
/// example, `anna@ci-7, container 3f2a1b9c4d5e`. `None` if the record has none of these.
pub(crate) fn name(holder: &Holder) -> Option<String> {
    let (ci, job) = (visible(&holder.ci), visible(&holder.job));
    let name = match (job.is_empty(), ci.is_empty()) {
        // A URL says the system by its host.
        (false, is_unknown) if is_unknown || job.contains("://") => Some(job),
        (false, _) => Some(format!("{ci} {job}")),
        (true, true) => who(holder),
        (true, false) => Some(who(holder).map_or_else(|| ci.clone(), |who| format!("{who} ({ci})"))),
    };
    let facts: Vec<String> = [name, container(holder), cloud(holder)].into_iter().flatten().collect();
    Some(facts.join(", ")).filter(|facts| !facts.is_empty())
}

/// Returns `user@host`, or one of the two. `None` if the record has neither.
pub(crate) fn who(holder: &Holder) -> Option<String> {
    let (user, host) = (visible(&holder.user), visible(&holder.host));
    match (user.is_empty(), host.is_empty()) {
        (true, true) => None,
        (false, false) => Some(format!("{user}@{host}")),
        _ => Some(user + &host),
    }
}

/// Returns the CI system, the URL of the job and its attempt. `None` if the record has none of these.
pub(crate) fn job(holder: &Holder) -> Option<String> {
    let attempt = if holder.attempt.is_empty() { String::new() } else { format!("attempt {}", holder.attempt) };
    let facts = [&holder.ci, &holder.job, &attempt].into_iter().filter(|fact| !fact.is_empty());
    let facts: Vec<String> = facts.map(|fact| visible(fact)).collect();
    Some(facts.join(" ")).filter(|facts| !facts.is_empty())
}

/// Returns the container. `None` if the record has none.
pub(crate) fn container(holder: &Holder) -> Option<String> {
    let container = visible(&holder.container);
    (!container.is_empty()).then(|| format!("container {container}"))
}

/// Returns the cloud's instance, task or pod. `None` if the record has none.
pub(crate) fn cloud(holder: &Holder) -> Option<String> {
    Some(visible(&holder.cloud)).filter(|cloud| !cloud.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::notice::{Announcement, HostEnd, Notice};
    use crate::lease::observed::tests::lease;
    use crate::lease::record::NotBelieved;

    fn of_ci() -> ObservedLease {
        let mut lease = lease("id", 40, None, Promise::Stop);
        if let Ok(record) = &mut lease.record {
            record.holder.user = "runner".into();
            record.holder.host = "fv-7".into();
            record.holder.job = "https://ci/7".into();
        }
        lease
    }

    #[test]
    fn a_length_is_shown_as_it_is_set() {
        for (seconds, expected) in [(60, "1 min"), (300, "5 min"), (3600, "60 min"), (90, "1 min 30 s"), (2, "2 s")] {
            assert_eq!(length(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn a_lease_in_one_line_says_how_old_it_is_and_who_holds_it() {
        for (lease, expected) in [
            (of_ci(), Some("lease of 5 min, renewed 40 s ago, grade stop, held by runner@fv-7, https://ci/7")),
            (
                ObservedLease { date: None, ..of_ci() },
                Some("lease of 5 min, grade stop, held by runner@fv-7, https://ci/7"),
            ),
            (lease("id", 400, None, Promise::None), Some("lease of 5 min, renewed 6 min 40 s ago, grade none")),
            (lease("id", -60, None, Promise::None), None),
            (ObservedLease { record: Err(NotBelieved::Malformed), ..of_ci() }, None),
        ] {
            assert_eq!(of_holder(&lease).as_deref(), expected);
        }
    }

    #[test]
    fn a_lease_says_why_its_run_was_interrupted() {
        let notice = |at| Notice { end: HostEnd::Terminated, announcement: Announcement::SpotInterruption, at };
        let strange = Interruption { host: "\u{1b}[2J".into(), why: String::new(), ..Interruption::default() };
        for (interrupted, expected) in [
            (
                notice(Some(1_790_000_120)).into(),
                "its host is to be terminated at 2026-09-21T14:15:20Z (EC2 spot interruption)",
            ),
            (notice(None).into(), "its host is to be terminated (EC2 spot interruption)"),
            (notice(Some(i64::MAX)).into(), "its host is to be terminated (EC2 spot interruption)"),
            (Interruption::default(), "its host is about to end"),
            (strange, "its host is to be \\u{1b}[2J"),
        ] {
            let mut lease = of_ci();
            lease.record.as_mut().unwrap().interrupted = Some(interrupted);
            let shown = of_holder(&lease).unwrap();
            let end = format!("held by runner@fv-7, https://ci/7, interrupted: {expected}");
            assert!(shown.ends_with(&end), "{shown}");
        }
    }

    #[test]
    fn a_holder_is_one_line_without_what_is_not_known() {
        let all = Holder {
            user: "runner".into(),
            host: "fv-7".into(),
            ci: "GitHub Actions".into(),
            job: "https://github.com/o/r/actions/runs/1".into(),
            attempt: "2".into(),
            container: "c0ffee".into(),
            cloud: "i-0abc".into(),
            machine: "not shown".into(),
            boot: "not shown".into(),
        };
        assert_eq!(
            holder(&all).as_deref(),
            Some(
                "runner@fv-7, GitHub Actions https://github.com/o/r/actions/runs/1 attempt 2, container c0ffee, i-0abc"
            )
        );
        assert_eq!(holder(&Holder { host: "h".into(), ..Holder::default() }).as_deref(), Some("h"));
        assert_eq!(holder(&Holder { user: "u".into(), ..Holder::default() }).as_deref(), Some("u"));
        assert_eq!(holder(&Holder { boot: "b".into(), ..Holder::default() }), None);
    }

    #[test]
    fn the_name_of_a_holder_is_its_ci_job_or_else_its_user_and_host() {
        let of = |[user, host, container, ci, job, cloud]: [&str; 6]| Holder {
            user: user.into(),
            host: host.into(),
            container: container.into(),
            ci: ci.into(),
            job: job.into(),
            cloud: cloud.into(),
            attempt: "2".into(),
            ..Holder::default()
        };
        for (facts, expected) in [
            (["", "", "", "", "", ""], None),
            (["anna", "ci-7", "", "", "", ""], Some("anna@ci-7")),
            (["anna", "", "", "", "", ""], Some("anna")),
            (["", "ci-7", "", "", "", ""], Some("ci-7")),
            (["anna", "ci-7", "3f2a1b9c4d5e", "", "", ""], Some("anna@ci-7, container 3f2a1b9c4d5e")),
            (["anna", "ci-7", "", "Atlantis", "", ""], Some("anna@ci-7 (Atlantis)")),
            (["", "", "", "Atlantis", "", ""], Some("Atlantis")),
            (["runner", "fv-az1", "", "GitHub Actions", "https://github.com/a/b", ""], Some("https://github.com/a/b")),
            (["", "", "", "Spacelift", "infra/01H", "Azure"], Some("Spacelift infra/01H, Azure")),
            (["", "", "", "", "infra/01H", ""], Some("infra/01H")),
            (["a", "b", "", "", "", "pod prod/x, Amazon EC2 i-1"], Some("a@b, pod prod/x, Amazon EC2 i-1")),
            // A record that somebody else has written.
            (["a\u{1b}[2J", "b\nc", "", "", "", ""], Some("a\\u{1b}[2J@b\\u{a}c")),
        ] {
            assert_eq!(name(&of(facts)).as_deref(), expected, "{facts:?}");
        }
    }

    #[test]
    fn a_strangers_text_is_made_visible() {
        let evil = || "\u{1b}]0;x\u{7}\n\u{202e}".repeat(100);
        let all = Holder {
            user: evil(),
            host: evil(),
            ci: evil(),
            job: evil(),
            attempt: evil(),
            container: evil(),
            cloud: evil(),
            machine: evil(),
            boot: evil(),
        };
        let shown = holder(&all).unwrap();
        assert!(!shown.chars().any(char::is_control) && !shown.contains('\u{202e}'), "{shown:?}");
        assert!(shown.len() < 16_384, "{}", shown.len());
    }
}
