//! Whether a lock that stands is the one that our dead run took.
//!
//! The log proposes, the lock must agree. Anybody can put a line into the log: core logs an API's error text raw, and
//! every provisioner can append to the file. So every field must be the same, the holder must be who we are, the times
//! must fit, and nothing in the log may contradict itself. A doubt keeps the lock.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::terraform::lock_info::{self, LockInfo, is_lock_id};
use crate::terraform::log::{LockIdentity, Log, RecordedLock, UnnamedLock};
use crate::terraform::version::Version;
use crate::time::{saturating_add, saturating_sub};

/// What is known about the run that recorded a lock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Run {
    /// `user@host` at its start, as a terraform of ours writes it.
    pub(crate) who: String,
    /// The same when it is judged. A host gets another name by DHCP, a VPN or a restart, and terraform writes the name
    /// that the host has when it takes the lock.
    #[serde(default)]
    pub(crate) who_now: String,
    /// When terraform was started, by this host's clock.
    pub(crate) started: Timestamp,
    /// The times in its log run backwards.
    pub(crate) disordered: bool,
    /// It was told to take no lock (`-lock=false`).
    pub(crate) locking_disabled: bool,
    /// Its log names more locks than terraform takes.
    #[serde(default)]
    pub(crate) excessive: bool,
    /// The program, as its log names it.
    #[serde(default)]
    pub(crate) program: Option<Version>,
}

impl Run {
    /// What `log` tells of a run that this user started on this host at `started`, as `who`. An empty `who` is not known:
    /// a record of an earlier version has none.
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

    /// Whether `who` is this user on this host, by the names of the run's start or by those of now.
    pub(crate) fn is_of(&self, who: &str) -> bool {
        !who.is_empty() && (who == self.who || who == self.who_now)
    }

    /// Whether `who` is any user on this host.
    pub(crate) fn is_on_its_host(&self, who: &str) -> bool {
        host(who).is_some_and(|its| [&self.who, &self.who_now].into_iter().any(|ours| host(ours) == Some(its)))
    }
}

/// The host of `user@host`. The user's name may have an @ in it.
fn host(who: &str) -> Option<&str> {
    who.rsplit_once('@').map(|(_, host)| host).filter(|host| !host.is_empty())
}

/// What a standing lock is to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Match {
    /// The very lock that our run took.
    Ours,
    /// Another ID: somebody else's.
    Anothers,
    /// Our ID, and something that does not fit: which is said, and the lock is kept.
    Doubt(&'static str),
}

/// The log's times are cut to milliseconds, so a lock may seem made up to one after the line that tells of it.
const TIMESTAMP_ROUNDING_WINDOW: SignedDuration = SignedDuration::from_millis(1);

/// Judges the lock that stands, `stored`, by what the log recorded.
pub(crate) fn judge(recorded: &RecordedLock, stored: &LockInfo, run: &Run) -> Match {
    if stored.id != recorded.id {
        return Match::Anothers;
    }
    let created = stored.created();
    let conditions = [
        (!recorded.contradicted, "the log of the run contradicts itself"),
        (!run.excessive, "the log of the run names more locks than terraform takes"),
        (!run.disordered, "the times in the log of the run go backwards: was the clock set?"),
        (
            !run.locking_disabled || recorded.operation == "init",
            "the run was told to take no lock (-lock=false), and its log names one",
        ),
        (stored.operation == recorded.operation, "its Operation is not the one that the log names"),
        (stored.who == recorded.who, "its Who is not the one that the log names"),
        (stored.version == recorded.version, "its Version is not the one that the log names"),
        (stored.path == recorded.path, "its Path is not the one that the log names"),
        (stored.path == format!("{}/{}", recorded.bucket, recorded.key), "its Path is not the place where it stands"),
        (run.is_of(&stored.who), "its Who is not this user on this host"),
        (created.is_some(), "its Created is not a time"),
        (created.is_none_or(|created| created >= run.started), "it was created before this run began"),
        (
            created.is_none_or(|created| created <= saturating_add(recorded.asked, TIMESTAMP_ROUNDING_WINDOW)),
            "it was created after this run asked for it",
        ),
    ];
    match conditions.iter().find(|(holds, _)| !holds) {
        Some((_, reason)) => Match::Doubt(reason),
        None => Match::Ours,
    }
}

/// How long after terraform said that it would ask for a lock the lock was made, or before it was put where the log tells of
/// the request alone. In between are microseconds, on a busy machine milliseconds. On one that is busier its own lock is a
/// doubt.
const CREATION_WINDOW: SignedDuration = SignedDuration::from_millis(10);

/// Whoever has to wait for a lock asks again after a second at the earliest (statemgr.LockWithContext).
const ANSWER_WINDOW: SignedDuration = SignedDuration::from_millis(900);

/// Judges the lock that stands, `text` and what is in it, by a log that does not name the lock that the run had.
///
/// By its checksum it is the very text that terraform has put there, on condition that nothing stood there. Without one,
/// the log says that terraform was given the lock of this state, so that nobody else had it then; and that it did not come
/// to its end. Who stands there now is our run, unless that had given its lock back before it died and another took it at
/// once, or a person forced ours away. Such another made its lock later than we made ours, or in the same moment: so that
/// moment is kept narrow, and a run that had to wait itself, among others, is not judged. What is left is a run of a user
/// and a host of the same names, of the same version, that began within the same few milliseconds and waited for ours.
pub(crate) fn judge_unnamed(unnamed: &UnnamedLock, stored: &LockInfo, text: &str, run: &Run, died: bool) -> Match {
    let created = stored.created();
    let Some(program) = &run.program else { return Match::Doubt("the log of the run does not tell its version") };
    let (checksum, path) = match &unnamed.mark {
        LockIdentity::Object { bucket, key, checksum } => (checksum.as_ref(), Some(format!("{bucket}/{key}"))),
        LockIdentity::Workspace(_) => (None, None),
    };
    if let Some(checksum) = checksum
        && aws_smithy_types::base64::encode(Sha256::digest(text)) != *checksum
    {
        return Match::Anothers;
    }
    let known = checksum.is_some();
    let before = |length| saturating_sub(unnamed.asked, length);
    let after = |length| saturating_add(unnamed.asked, length);
    // A run that only asked may have been refused, and what it sees is then the lock of whoever has refused it.
    if unnamed.is_only_asked_for()
        && (!run.is_of(&stored.who)
            || stored.version != program.in_locks()
            || created.is_some_and(|created| created < before(TIMESTAMP_ROUNDING_WINDOW)))
    {
        return Match::Anothers;
    }
    let (earliest, latest) = match (&unnamed.mark, known) {
        (LockIdentity::Object { .. }, true) => (run.started, after(TIMESTAMP_ROUNDING_WINDOW)),
        (LockIdentity::Object { .. }, false) => (before(CREATION_WINDOW), after(TIMESTAMP_ROUNDING_WINDOW)),
        (LockIdentity::Workspace(_), _) => (before(TIMESTAMP_ROUNDING_WINDOW), after(CREATION_WINDOW)),
    };
    let waited = unnamed.granted.is_none_or(|granted| granted > after(ANSWER_WINDOW));
    let conditions = [
        (!run.excessive, "the log of the run names more locks than terraform takes"),
        (!run.disordered, "the times in the log of the run go backwards: was the clock set?"),
        (!run.locking_disabled, "the run was told to take no lock (-lock=false)"),
        (run.is_of(&stored.who), "its Who is not this user on this host"),
        (stored.version == program.in_locks(), "its Version is not the one that the log names"),
        (path.is_none_or(|path| stored.path == path), "its Path is not the one that the log names"),
        // A generation, in Google Cloud Storage.
        (is_lock_id(&stored.id) || stored.id.parse::<u64>().is_ok(), "its ID is none of terraform's"),
        (created.is_some(), "its Created is not a time"),
        (created.is_none_or(|created| created >= run.started), "it was created before this run began"),
        (known || died, "the log does not name it, and the run ended by itself"),
        (known || unnamed.granted.is_some(), "the log does not say that the run had it"),
        (known || !waited, "the run had to wait for it, and the log does not name it"),
        (created.is_none_or(|created| created >= earliest), "it was created before this run asked for one"),
        (created.is_none_or(|created| created <= latest), "it was created after this run asked for it"),
    ];
    match conditions.iter().find(|(holds, _)| !holds) {
        Some((_, reason)) => Match::Doubt(reason),
        None => Match::Ours,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::{Log, tests::ID, tests::lock_line};

    fn recorded() -> RecordedLock {
        let mut log = Log::default();
        log.read(lock_line(7, "Attempting to lock remote state (DynamoDB only)...", ID, "r").as_bytes());
        log.locks.remove(0)
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

    /// A lock that was had for a workspace, or put as an object whose text `text` is.
    fn unnamed(text: Option<&str>) -> UnnamedLock {
        let at = |time: &str| time.parse().unwrap();
        UnnamedLock {
            mark: match text {
                Some(text) => LockIdentity::Object {
                    bucket: "bkt".into(),
                    key: "dir/prod.tfstate".into(),
                    checksum: Some(aws_smithy_types::base64::encode(Sha256::digest(text))),
                },
                None => LockIdentity::Workspace("default".into()),
            },
            asked: at("2026-11-23T01:46:07.594Z"),
            granted: Some(at("2026-11-23T01:46:07.597Z")),
            unlocking: false,
            uploading: false,
            unlocked: false,
        }
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

    /// Anybody can write a lock, and a provisioner a log.
    #[test]
    fn no_time_panics() {
        for time in [Timestamp::MIN, Timestamp::MAX] {
            let lock = LockInfo { created: time.to_string(), ..stored() };
            let mut recorded = recorded();
            recorded.asked = time;
            let _ = judge(&recorded, &lock, &Run { started: time, ..run() });
            for text in [None, Some("text")] {
                let unnamed = UnnamedLock { asked: time, granted: Some(time), ..unnamed(text) };
                let _ = judge_unnamed(&unnamed, &lock, "text", &Run { started: time, ..run() }, true);
            }
        }
    }

    /// Terraform makes it behind the local backend's words, and before the request.
    #[test]
    fn a_lock_without_a_name_was_made_on_the_side_of_the_record_where_terraform_makes_it() {
        let workspace = unnamed(None);
        let mark = LockIdentity::Object { bucket: "bkt".into(), key: "dir/prod.tfstate".into(), checksum: None };
        let object = UnnamedLock { mark, ..workspace.clone() };
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
                unnamed.granted = Some("2026-11-23T01:46:08.4Z".parse().unwrap());
                lock.created = "2026-11-23T01:46:07.7Z".into();
            }),
            ("not granted", |unnamed, _, _| unnamed.granted = None),
            ("waited", |unnamed, _, _| unnamed.granted = Some("2026-11-23T01:46:09Z".parse().unwrap())),
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

    /// With OpenTofu up to 1.10, killed between its request and its next record.
    #[test]
    fn a_lock_without_a_name_that_was_only_asked_for_is_a_doubt_at_most() {
        let asked_for = UnnamedLock { granted: None, ..unnamed(None) };
        for (created, who, version, doubt) in [
            ("2026-11-23T01:46:07.580Z", "root@vm", "1.11.4", false),
            ("2026-11-23T01:46:07.594Z", "root@vm", "1.11.4", true),
            ("2026-11-23T01:46:07.600Z", "root@vm", "1.11.4", true),
            // On a busy machine it is made later; so is that of whoever took it meanwhile.
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

    /// By DHCP, a VPN or a restart: terraform writes the name of the moment in which it takes the lock.
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
