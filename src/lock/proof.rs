//! Decides whether a stored lock is the one that a dead run took.
//!
//! The log alone proves nothing, because others can write lines into it: Terraform's core logs the error text of an API
//! without escaping it, and every provisioner can append to the file. So the stored lock must agree with the log in
//! every field, its `Who` must be this user on this host, its time must be consistent with the log, and the log must
//! not contradict itself. If any of these conditions fails, the lock is not released.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::terraform::lock_info::{self, LockInfo, is_lock_id};
use crate::terraform::log::{LockIdentity, Log, RecordedLock, UnnamedLock};
use crate::terraform::version::Version;
use crate::time::{saturating_add, saturating_sub};

/// What is known about the run whose log recorded a lock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Run {
    /// `user@host` at the start of the run, in the form in which terraform writes it into a lock. Empty if it is not
    /// known.
    pub(crate) who: String,
    /// `user@host` when the lock is judged. It can differ from `who`, because DHCP, a VPN or a restart can change the
    /// host name. Terraform writes the host name at the time when it takes the lock.
    #[serde(default)]
    pub(crate) who_now: String,
    /// When terraform was started, by this host's clock.
    pub(crate) started: Timestamp,
    /// Whether the times in the run's log go backwards ([`Log::disordered`]).
    pub(crate) disordered: bool,
    /// Whether terraform was started with `-lock=false`.
    pub(crate) locking_disabled: bool,
    /// Whether the run's log names more locks than terraform takes ([`Log::excessive`]).
    #[serde(default)]
    pub(crate) excessive: bool,
    /// The program and its version, as the run's log names them. `None` if the log's first record was not read.
    #[serde(default)]
    pub(crate) program: Option<Version>,
}

impl Run {
    /// Combines the facts in `log` with the other facts about a run that this user started on this host at `started`.
    /// `who` is `user@host` at that time. It is empty if it is not known, as in a record of an earlier version.
    pub(crate) fn recorded(who: &str, started: Timestamp, log: &Log) -> Self {
        Self {
            who: who.to_owned(),
            who_now: lock_info::who(),
            started,
            disordered: log.disordered,
            locking_disabled: log.locking_disabled,
            excessive: log.excessive,
            program: log.program.clone(),
        }
    }

    /// Whether `who` is this user on this host. The names at the start of the run and the current names are both
    /// accepted.
    pub(crate) fn is_of(&self, who: &str) -> bool {
        !who.is_empty() && (who == self.who || who == self.who_now)
    }

    /// Whether `who` is any user on this host. The host name at the start of the run and the current one are both
    /// accepted.
    pub(crate) fn is_on_its_host(&self, who: &str) -> bool {
        host(who).is_some_and(|its| [&self.who, &self.who_now].into_iter().any(|ours| host(ours) == Some(its)))
    }
}

/// Returns the host of `user@host`. The user name may contain an `@`. `None` if `who` contains no host.
fn host(who: &str) -> Option<&str> {
    who.rsplit_once('@').map(|(_, host)| host).filter(|host| !host.is_empty())
}

/// Whether a stored lock belongs to the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Match {
    /// It is the lock that the run took.
    Ours,
    /// It belongs to another run: it has another ID or, if the log does not name the run's lock, another text, `Who` or
    /// version, or a `Created` before the request.
    Anothers,
    /// It may be the lock that the run took, but a condition fails. The text names that condition. `tf` reports the
    /// text and does not release the lock.
    Doubt(&'static str),
}

/// The log's times are truncated to milliseconds, so a lock's `Created` may appear to be up to 1 ms later than the
/// record that logs the lock.
const TIMESTAMP_ROUNDING_WINDOW: SignedDuration = SignedDuration::from_millis(1);

/// Decides whether `stored`, the lock that exists now, is the lock that the log of `run` recorded.
pub(crate) fn judge(recorded: &RecordedLock, stored: &LockInfo, run: &Run) -> Match {
    if stored.id != recorded.id {
        return Match::Anothers;
    }
    let created = stored.created();
    let conditions = [
        (!recorded.contradicted, "the log of the run contradicts itself"),
        (!run.excessive, "the log of the run contains more locks than terraform takes"),
        (!run.disordered, "the times in the log of the run go backwards, so the clock may have been set"),
        (
            !run.locking_disabled || recorded.operation == "init",
            "the run was started with -lock=false, but its log contains a lock",
        ),
        (stored.operation == recorded.operation, "the lock's Operation is not the one in the log"),
        (stored.who == recorded.who, "the lock's Who is not the one in the log"),
        (stored.version == recorded.version, "the lock's Version is not the one in the log"),
        (stored.path == recorded.path, "the lock's Path is not the one in the log"),
        (stored.path == format!("{}/{}", recorded.bucket, recorded.key), "the lock's Path is not where it is stored"),
        (run.is_of(&stored.who), "the lock's Who is not this user on this host"),
        (created.is_some(), "the lock's Created is not a time"),
        (created.is_none_or(|created| created >= run.started), "the lock was created before this run began"),
        (
            created.is_none_or(|created| created <= saturating_add(recorded.progress.asked, TIMESTAMP_ROUNDING_WINDOW)),
            "the lock was created after this run requested its lock",
        ),
    ];
    match conditions.iter().find(|(holds, _)| !holds) {
        Some((_, reason)) => Match::Doubt(reason),
        None => Match::Ours,
    }
}

/// The longest accepted time between a lock's `Created` and the log record of its request. If the record says that
/// terraform is going to request the lock, `Created` is later than the record. If the record is the put request itself,
/// `Created` is earlier. The real difference is microseconds, or milliseconds on a busy machine. On an even slower
/// machine, the run's own lock is judged as [`Match::Doubt`].
const CREATION_WINDOW: SignedDuration = SignedDuration::from_millis(10);

/// A lock that is granted within this time after its request was granted at the first attempt, because terraform
/// retries after 1 s at the earliest (statemgr.LockWithContext).
const ANSWER_WINDOW: SignedDuration = SignedDuration::from_millis(900);

/// Decides whether the lock that exists now is the run's lock, if the run's log does not name that lock. `text` is the
/// stored text, and `stored` is the lock parsed from it. `died` is true if terraform ended abnormally.
///
/// If the log has a checksum and it matches, terraform wrote exactly `text`, with `If-None-Match`, so no other lock was
/// there.
///
/// Without a checksum, the log shows two facts: terraform was granted the lock of this state, so no other run held it
/// at that time, and terraform did not finish. The stored lock is then this run's lock, with two exceptions: this run
/// released its lock before it died and another run took it at once, or a person removed this run's lock by force. In
/// both cases the other run's lock was created later than this run's, or at the same moment. So the accepted time of
/// creation is narrow ([`CREATION_WINDOW`]), and the result is [`Match::Doubt`] if any condition below fails, for
/// example if this run had to wait for its lock. One case is not detected: a run with the same user name, host name and
/// version that created its lock within the same few milliseconds and waited for this run's lock.
pub(crate) fn judge_unnamed(unnamed: &UnnamedLock, stored: &LockInfo, text: &str, run: &Run, died: bool) -> Match {
    let created = stored.created();
    let Some(program) = &run.program else {
        return Match::Doubt("the log of the run does not contain terraform's version");
    };
    let (checksum, path) = match &unnamed.identity {
        LockIdentity::Object { bucket, key, checksum } => (checksum.as_ref(), Some(format!("{bucket}/{key}"))),
        LockIdentity::Workspace(_) => (None, None),
    };
    if let Some(checksum) = checksum
        && aws_smithy_types::base64::encode(Sha256::digest(text)) != *checksum
    {
        return Match::Anothers;
    }
    let known = checksum.is_some();
    let before = |length| saturating_sub(unnamed.progress.asked, length);
    let after = |length| saturating_add(unnamed.progress.asked, length);
    // A run that only requested the lock may have been refused. The stored lock is then another run's lock, which
    // caused the refusal.
    if unnamed.is_only_asked_for()
        && (!run.is_of(&stored.who)
            || stored.version != program.in_locks()
            || created.is_some_and(|created| created < before(TIMESTAMP_ROUNDING_WINDOW)))
    {
        return Match::Anothers;
    }
    let (earliest, latest) = match (&unnamed.identity, known) {
        (LockIdentity::Object { .. }, true) => (run.started, after(TIMESTAMP_ROUNDING_WINDOW)),
        (LockIdentity::Object { .. }, false) => (before(CREATION_WINDOW), after(TIMESTAMP_ROUNDING_WINDOW)),
        (LockIdentity::Workspace(_), _) => (before(TIMESTAMP_ROUNDING_WINDOW), after(CREATION_WINDOW)),
    };
    let waited = unnamed.progress.held.is_none_or(|granted| granted > after(ANSWER_WINDOW));
    let conditions = [
        (!run.excessive, "the log of the run contains more locks than terraform takes"),
        (!run.disordered, "the times in the log of the run go backwards, so the clock may have been set"),
        (!run.locking_disabled, "the run was started with -lock=false"),
        (run.is_of(&stored.who), "the lock's Who is not this user on this host"),
        (stored.version == program.in_locks(), "the lock's Version is not the one in the log"),
        (path.is_none_or(|path| stored.path == path), "the lock's Path is not the one in the log"),
        // In Google Cloud Storage, the lock's ID is a generation number.
        (is_lock_id(&stored.id) || stored.id.parse::<u64>().is_ok(), "the lock's ID is not a terraform lock ID"),
        (created.is_some(), "the lock's Created is not a time"),
        (created.is_none_or(|created| created >= run.started), "the lock was created before this run began"),
        (known || died, "the log does not contain the lock's ID, and terraform exited by itself"),
        (known || unnamed.progress.held.is_some(), "the log does not say that the run got the lock"),
        (known || !waited, "the run had to wait for its lock, and the log does not contain the lock's ID"),
        (created.is_none_or(|created| created >= earliest), "the lock was created before this run requested a lock"),
        (created.is_none_or(|created| created <= latest), "the lock was created after this run requested its lock"),
    ];
    match conditions.iter().find(|(holds, _)| !holds) {
        Some((_, reason)) => Match::Doubt(reason),
        None => Match::Ours,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::Log;
    use crate::terraform::log::tests::{ID, lock_line};
    use crate::terraform::logged_lock::{Phase, Progress};

    fn recorded() -> RecordedLock {
        let mut log = Log::default();
        log.read(lock_line(7, "Attempting to lock remote state (DynamoDB only)...", ID, "r").as_bytes());
        log.named().next().unwrap().clone()
    }

    fn stored() -> LockInfo {
        LockInfo {
            id: ID.into(),
            operation: "OperationTypeApply".into(),
            who: "root@vm".into(),
            version: "1.11.4".into(),
            created: "2026-11-23T01:46:07.5931Z".into(),
            path: "bkt/dir/prod.tfstate".into(),
        }
    }

    fn run() -> Run {
        Run {
            who: "root@vm".into(),
            who_now: "root@vm".into(),
            started: "2026-11-23T01:46:07Z".parse().unwrap(),
            disordered: false,
            locking_disabled: false,
            excessive: false,
            program: Version::of_record("OpenTofu version", "1.11.4 dev"),
        }
    }

    #[test]
    fn the_lock_that_agrees_in_everything_is_ours() {
        assert_eq!(judge(&recorded(), &stored(), &run()), Match::Ours);
    }

    /// Returns a lock without an ID. It was granted for a workspace or, if `text` is given, it was put as an object
    /// with that text.
    fn unnamed(text: Option<&str>) -> UnnamedLock {
        let at = |time: &str| time.parse().unwrap();
        let identity = match text {
            Some(text) => LockIdentity::Object {
                bucket: "bkt".into(),
                key: "dir/prod.tfstate".into(),
                checksum: Some(aws_smithy_types::base64::encode(Sha256::digest(text))),
            },
            None => LockIdentity::Workspace("default".into()),
        };
        let mut progress = Progress::asked(at("2026-11-23T01:46:07.594Z"));
        progress.grant(at("2026-11-23T01:46:07.597Z"));
        UnnamedLock { identity, progress }
    }

    #[test]
    fn a_lock_that_the_log_does_not_name_is_known_by_its_text_or_by_its_moment() {
        let judge = |unnamed: &UnnamedLock, lock: &LockInfo, died| judge_unnamed(unnamed, lock, "text", &run(), died);
        let in_time = LockInfo { created: "2026-11-23T01:46:07.5941Z".into(), ..stored() };
        for died in [false, true] {
            assert_eq!(judge(&unnamed(Some("text")), &in_time, died), Match::Ours, "{died}");
            assert_eq!(judge(&unnamed(Some("another")), &in_time, died), Match::Anothers, "{died}");
        }
        assert_eq!(judge(&unnamed(None), &in_time, true), Match::Ours);
        assert!(matches!(judge(&unnamed(None), &in_time, false), Match::Doubt(_)));
    }

    /// The times are untrusted: others can write a lock, and a provisioner can write to the log.
    #[test]
    fn no_time_panics() {
        for time in [Timestamp::MIN, Timestamp::MAX] {
            let lock = LockInfo { created: time.to_string(), ..stored() };
            let mut recorded = recorded();
            recorded.progress.asked = time;
            let _ = judge(&recorded, &lock, &Run { started: time, ..run() });
            for text in [None, Some("text")] {
                let progress = Progress { asked: time, held: Some(time), phase: Phase::Open };
                let unnamed = UnnamedLock { progress, ..unnamed(text) };
                let _ = judge_unnamed(&unnamed, &lock, "text", &Run { started: time, ..run() }, true);
            }
        }
    }

    /// Terraform creates the lock after the local backend logs that it requests one, and before the request is sent.
    #[test]
    fn a_lock_without_a_name_was_made_on_the_side_of_the_record_where_terraform_makes_it() {
        let workspace = unnamed(None);
        let identity = LockIdentity::Object { bucket: "bkt".into(), key: "dir/prod.tfstate".into(), checksum: None };
        let object = UnnamedLock { identity, ..workspace.clone() };
        for (created, by_request, by_words) in [
            ("2026-11-23T01:46:07.580Z", false, false),
            ("2026-11-23T01:46:07.589Z", true, false),
            ("2026-11-23T01:46:07.594Z", true, true),
            ("2026-11-23T01:46:07.599Z", false, true),
            ("2026-11-23T01:46:07.609Z", false, false),
        ] {
            let lock = LockInfo { created: created.into(), ..stored() };
            let ours = |unnamed| judge_unnamed(unnamed, &lock, "text", &run(), true) == Match::Ours;
            assert_eq!((ours(&object), ours(&workspace)), (by_request, by_words), "{created}");
        }
    }

    #[test]
    fn any_one_thing_that_does_not_fit_a_lock_without_a_name_is_a_doubt() {
        type Case = (&'static str, fn(&mut UnnamedLock, &mut LockInfo, &mut Run));
        let always: &[Case] = &[
            ("who", |_, lock, _| lock.who = "anna@vm".into()),
            ("version", |_, lock, _| lock.version = "1.6.2".into()),
            ("another program", |_, _, run| run.program = Version::of_record("OpenTofu version", "1.6.2")),
            ("no program", |_, _, run| run.program = None),
            ("no ID", |_, lock, _| lock.id = "x".into()),
            ("created is no time", |_, lock, _| lock.created = "yesterday".into()),
            ("created later", |_, lock, _| lock.created = "2026-11-23T01:46:07.9Z".into()),
            ("disordered", |_, _, run| run.disordered = true),
            ("excessive", |_, _, run| run.excessive = true),
            ("told to take no lock", |_, _, run| run.locking_disabled = true),
            ("started later", |_, _, run| run.started = "2026-11-23T01:46:08Z".parse().unwrap()),
        ];
        let by_moment: &[Case] = &[
            ("created earlier", |_, lock, _| lock.created = "2026-11-23T01:46:07.5Z".into()),
            ("created in the time in which it waited", |unnamed, lock, _| {
                unnamed.progress.held = Some("2026-11-23T01:46:08.4Z".parse().unwrap());
                lock.created = "2026-11-23T01:46:07.7Z".into();
            }),
            ("not granted", |unnamed, _, _| unnamed.progress.held = None),
            ("waited", |unnamed, _, _| unnamed.progress.held = Some("2026-11-23T01:46:09Z".parse().unwrap())),
        ];
        for (text, changes) in [(Some("text"), vec![always]), (None, vec![always, by_moment])] {
            for (name, change) in changes.into_iter().flatten() {
                let (mut unnamed, mut run) = (unnamed(text), run());
                let mut lock = LockInfo { created: "2026-11-23T01:46:07.5941Z".into(), ..stored() };
                change(&mut unnamed, &mut lock, &mut run);
                let verdict = judge_unnamed(&unnamed, &lock, "text", &run, true);
                assert!(matches!(verdict, Match::Doubt(_)), "{name} {text:?}: {verdict:?}");
            }
        }
    }

    #[test]
    fn a_lock_without_a_name_that_was_granted_at_the_second_attempt_is_a_doubt() {
        let in_time = LockInfo { created: "2026-11-23T01:46:07.5941Z".into(), ..stored() };
        for (granted, ours) in [("2026-11-23T01:46:08.494Z", true), ("2026-11-23T01:46:08.495Z", false)] {
            let mut unnamed = unnamed(None);
            unnamed.progress.held = Some(granted.parse().unwrap());
            assert_eq!(judge_unnamed(&unnamed, &in_time, "text", &run(), true) == Match::Ours, ours, "{granted}");
        }
    }

    /// The log shows nothing but the request if OpenTofu up to 1.10 is killed between its lock request and its next log
    /// record.
    #[test]
    fn a_lock_without_a_name_that_was_only_asked_for_is_a_doubt_at_most() {
        let mut asked_for = unnamed(None);
        asked_for.progress.held = None;
        for (created, who, version, doubt) in [
            ("2026-11-23T01:46:07.580Z", "root@vm", "1.11.4", false),
            ("2026-11-23T01:46:07.592Z", "root@vm", "1.11.4", false),
            ("2026-11-23T01:46:07.593Z", "root@vm", "1.11.4", true),
            ("2026-11-23T01:46:07.594Z", "root@vm", "1.11.4", true),
            ("2026-11-23T01:46:07.600Z", "root@vm", "1.11.4", true),
            // On a busy machine, the run's own lock is created later. The lock of another run that took it in the
            // meantime is also created later.
            ("2026-11-23T01:46:09.000Z", "root@vm", "1.11.4", true),
            ("yesterday", "root@vm", "1.11.4", true),
            ("2026-11-23T01:46:07.594Z", "anna@vm", "1.11.4", false),
            ("2026-11-23T01:46:07.594Z", "root@vm", "1.6.2", false),
        ] {
            let lock = LockInfo { created: created.into(), who: who.into(), version: version.into(), ..stored() };
            for died in [false, true] {
                let verdict = judge_unnamed(&asked_for, &lock, "text", &run(), died);
                assert_eq!(matches!(verdict, Match::Doubt(_)), doubt, "{created} {who} {version}: {verdict:?}");
                assert_eq!(verdict == Match::Anothers, !doubt, "{created} {who} {version}");
            }
        }
    }

    /// DHCP, a VPN or a restart can change the host name. Terraform writes the name at the moment it takes the lock.
    #[test]
    fn a_lock_under_the_hosts_name_of_the_start_or_of_now_is_ours() {
        for (start, now, ours) in [
            ("root@vm", "root@vm", true),
            ("root@vm", "root@renamed", true),
            ("root@old", "root@vm", true),
            ("", "root@vm", true),
            ("root@vm", "", true),
            ("root@old", "root@renamed", false),
            ("", "root@renamed", false),
            ("", "", false),
        ] {
            let run = Run { who: start.into(), who_now: now.into(), ..run() };
            assert_eq!(judge(&recorded(), &stored(), &run) == Match::Ours, ours, "{start:?} {now:?}");
            let in_time = LockInfo { created: "2026-11-23T01:46:07.5941Z".into(), ..stored() };
            let unnamed = judge_unnamed(&unnamed(Some("text")), &in_time, "text", &run, true);
            assert_eq!(unnamed == Match::Ours, ours, "{start:?} {now:?}");
        }
        let nobody = LockInfo { who: String::new(), ..stored() };
        let run = Run { who: String::new(), who_now: String::new(), ..run() };
        let mut recorded = recorded();
        recorded.who = String::new();
        assert!(matches!(judge(&recorded, &nobody, &run), Match::Doubt(_)));
    }

    #[test]
    fn another_user_of_this_host_is_on_its_host() {
        let run = Run { who: "root@vm".into(), who_now: "root@renamed".into(), ..run() };
        for (who, here) in [
            ("anna@vm", true),
            ("anna@example.org@vm", true),
            ("anna@renamed", true),
            ("anna@other", false),
            ("anna@", false),
            ("vm", false),
            ("", false),
        ] {
            assert_eq!(run.is_on_its_host(who), here, "{who:?}");
        }
    }

    #[test]
    fn another_id_is_anothers_whatever_else_agrees() {
        let other = LockInfo { id: "11111111-d70c-4132-39e0-d2abba1b3077".into(), ..stored() };
        assert_eq!(judge(&recorded(), &other, &run()), Match::Anothers);
    }

    #[test]
    fn any_one_thing_that_does_not_fit_is_a_doubt() {
        type Case = (&'static str, fn(&mut RecordedLock, &mut LockInfo, &mut Run));
        let changes: &[Case] = &[
            ("operation", |_, lock, _| lock.operation = "init".into()),
            ("who", |_, lock, _| lock.who = "anna@vm".into()),
            ("version", |_, lock, _| lock.version = "1.5.7".into()),
            ("path", |_, lock, _| lock.path = "bkt/other".into()),
            ("no path", |_, lock, _| lock.path = String::new()),
            ("created before", |_, lock, _| lock.created = "2026-11-23T01:46:06.9Z".into()),
            ("created after", |_, lock, _| lock.created = "2026-11-23T01:46:07.6Z".into()),
            ("created is no time", |_, lock, _| lock.created = "yesterday".into()),
            ("recorded operation", |recorded, _, _| recorded.operation = "init".into()),
            ("recorded who", |recorded, _, _| recorded.who = "anna@vm".into()),
            ("recorded version", |recorded, _, _| recorded.version = String::new()),
            ("recorded path", |recorded, _, _| recorded.path = "bkt/other".into()),
            ("recorded bucket", |recorded, _, _| recorded.bucket = "other".into()),
            ("recorded key", |recorded, _, _| recorded.key = "other".into()),
            ("contradicted", |recorded, _, _| recorded.contradicted = true),
            ("disordered", |_, _, run| run.disordered = true),
            ("excessive", |_, _, run| run.excessive = true),
            ("told to take no lock", |_, _, run| run.locking_disabled = true),
            ("another host", |_, _, run| (run.who, run.who_now) = ("root@other".into(), String::new())),
            ("another host, and another name of it", |_, _, run| {
                (run.who, run.who_now) = ("root@other".into(), "root@third".into());
            }),
            ("started later", |_, _, run| run.started = "2026-11-23T01:46:08Z".parse().unwrap()),
        ];
        for (name, change) in changes {
            let (mut recorded, mut lock, mut run) = (recorded(), stored(), run());
            change(&mut recorded, &mut lock, &mut run);
            assert!(matches!(judge(&recorded, &lock, &run), Match::Doubt(_)), "{name}");
        }
    }
}
