//! `TFW_WITNESS`: a command of the user that may know what has become of the host of a lock's holder.
//!
//! It is asked about a holder that neither the journal nor a fresh lease settles. Only `tf locks` asks it, and never a
//! run of terraform: the command may take 20 s.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::evidence::{Evidence, Judgement, Verdict};
use crate::console::visible;
use crate::json;
use crate::lease::observed::ObservedLease;
use crate::lease::record::Holder;
use crate::sys::shell_command::{self, Answered, MAX_OUTPUT_BYTES};
use crate::terraform::lock_info::LockInfo;

/// The variable with the command, which is passed to `/bin/sh -c`.
const WITNESS: &str = "TFW_WITNESS";

/// The variables that the command does not get. A `tf` that it starts belongs to no run, and asks no witness.
const NOT_PASSED: [&str; 4] = [WITNESS, "TFW_ON_EVENT", "TFW_RUN", "TFW_CHAIN"];

/// How long the command may run before it is killed.
const WITNESS_TIMEOUT: Duration = Duration::from_secs(20);

/// The maximum number of commands that run at the same time, whichever part of a scan has started them.
pub(crate) const MAX_AT_ONCE: usize = 4;

/// The commands that may still be started now.
static AT_ONCE: Semaphore = Semaphore::const_new(MAX_AT_ONCE);

/// After so many questions in a row that were not answered in time, the command is not asked for [`PAUSE`]. An audit of
/// many locks would take hours.
const MAX_TIMEOUTS: u32 = 3;

/// How long a command that gave no answers is not asked. `tf locks --watch` may run for days, and the command may answer
/// again.
const PAUSE: Duration = Duration::from_mins(5);

/// The questions that were not answered in time.
#[derive(Clone, Copy, Debug)]
struct Timeouts {
    /// How many, since the last answer.
    count: u32,
    /// When the last one was given up. `None` if there is none.
    last: Option<Instant>,
}

static TIMEOUTS: Mutex<Timeouts> = Mutex::new(Timeouts::NONE);

impl Timeouts {
    const NONE: Self = Self { count: 0, last: None };

    fn may_ask(self, now: Instant) -> bool {
        self.count < MAX_TIMEOUTS || self.last.is_none_or(|last| now.duration_since(last) >= PAUSE)
    }

    /// Returns what is known after another question, which was answered or not.
    fn after(self, is_answered: bool, now: Instant) -> Self {
        if is_answered { Self::NONE } else { Self { count: self.count.saturating_add(1), last: Some(now) } }
    }
}

/// Locks [`TIMEOUTS`] or [`ANSWERS`], which no panic leaves half-changed.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the command has answered, or why it has not. For a person, if it has not.
type Answer = Result<WitnessAnswer, String>;

/// The answers that may be used again, by question, and when each was given.
#[derive(Debug, Default)]
struct Answers(HashMap<String, (Instant, Answer)>);

static ANSWERS: LazyLock<Mutex<Answers>> = LazyLock::new(Mutex::default);

impl Answers {
    /// Returns the answer to `question` if it was given less than `age` ago. Forgets all that are older.
    fn of(&mut self, question: &str, age: Duration, now: Instant) -> Option<Answer> {
        self.0.retain(|_, (given, _)| now.duration_since(*given) < age);
        self.0.get(question).map(|(_, answer)| answer.clone())
    }
}

/// The question, which the command gets as one line of JSON. It contains nothing that the stored lock does not contain.
#[derive(Serialize)]
struct Question<'a> {
    lock: Lock<'a>,
    /// `None` if the lock has no lease record that is believed, or if that record says nothing about the holder.
    holder: Option<&'a Holder>,
}

/// The fields that terraform has written.
#[derive(Serialize)]
struct Lock<'a> {
    id: &'a str,
    path: &'a str,
    operation: &'a str,
    who: &'a str,
    version: &'a str,
    created: &'a str,
}

/// What a witness says about a holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WitnessVerdict {
    Dead,
    Alive,
    Unknown,
}

impl WitnessVerdict {
    /// Returns the verdict as the witness writes it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Dead => "dead",
            Self::Alive => "alive",
            Self::Unknown => "unknown",
        }
    }
}

/// The answer of a witness.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct WitnessAnswer {
    verdict: WitnessVerdict,
    #[serde(default)]
    reason: String,
}

/// Returns the command in `TFW_WITNESS`. `None` if it is not set or empty.
fn named() -> Option<OsString> {
    std::env::var_os(WITNESS).filter(|command| !command.is_empty())
}

/// Asks the witness about the holder of `lock`, and returns the judgement with its answer. Returns `judgement`
/// unchanged if there is no witness, or if the holder is settled. An answer to the same question that was given less than
/// `age` ago is used again, if this process has asked with an `age` then too. With zero, the witness is asked in any case.
pub(crate) async fn ask(
    judgement: Judgement,
    lock: &LockInfo,
    lease: Option<&ObservedLease>,
    age: Duration,
) -> Judgement {
    let Some(command) = named().filter(|_| !judgement.is_settled) else { return judgement };
    let holder = identity(lease);
    let question = question(lock, holder);
    if let Some(answer) = locked(&ANSWERS).of(&question, age, Instant::now()) {
        return with_answer(judgement, holder.is_some(), &answer);
    }
    // The semaphore is never closed, so this cannot fail.
    let _permit = AT_ONCE.acquire().await;
    let may_ask = locked(&TIMEOUTS).may_ask(Instant::now());
    let answer = if may_ask {
        let answer = answer_of(&command, &question).await;
        let mut timeouts = locked(&TIMEOUTS);
        *timeouts = timeouts.after(answer.is_some(), Instant::now());
        drop(timeouts);
        let answer = answer.unwrap_or_else(no_answer_in_time);
        if !age.is_zero() {
            locked(&ANSWERS).0.insert(question, (Instant::now(), answer.clone()));
        }
        answer
    } else {
        Err(format!("it was not asked, because it gave no answer within {} s before", WITNESS_TIMEOUT.as_secs()))
    };
    with_answer(judgement, holder.is_some(), &answer)
}

/// Returns who holds the lock, by the record that travelled with it. `None` if there is no such record, or if it names
/// no job, machine or container that a witness could look up.
fn identity(lease: Option<&ObservedLease>) -> Option<&Holder> {
    let holder = &lease?.shown_record()?.holder;
    let Holder { user: _, host: _, machine, boot, container, ci: _, job, attempt: _, cloud } = holder;
    [machine, boot, container, job, cloud].into_iter().any(|fact| !fact.is_empty()).then_some(holder)
}

fn question(lock: &LockInfo, holder: Option<&Holder>) -> String {
    let lock = Lock {
        id: &lock.id,
        path: &lock.path,
        operation: &lock.operation,
        who: &lock.who,
        version: &lock.version,
        created: &lock.created,
    };
    // A question contains only texts, so this cannot fail.
    json::to_string(&Question { lock, holder }).unwrap_or_default() + "\n"
}

/// Reads the answer of a command that has exited.
///
/// # Errors
/// Why it is no answer, fit for a terminal.
fn read(answered: &Answered) -> Answer {
    if !answered.status.success() {
        let stderr = String::from_utf8_lossy(&answered.stderr);
        let said = stderr.lines().map(str::trim).rfind(|line| !line.is_empty());
        let said = said.map_or_else(String::new, |said| format!(": {}", visible(said)));
        return Err(format!("it failed ({}){said}", answered.status));
    }
    if answered.stdout.len() >= MAX_OUTPUT_BYTES {
        return Err("its answer is longer than 64 KiB".to_owned());
    }
    let text = String::from_utf8_lossy(&answered.stdout);
    // Serde reads an array as an answer too.
    let is_object = text.trim_start().starts_with('{');
    let answer = serde_json::from_str(&text).ok().filter(|_| is_object);
    answer.ok_or_else(|| match text.trim() {
        "" => "it printed no answer".to_owned(),
        other => format!("its answer is not {{\"verdict\": \"dead\", \"alive\" or \"unknown\"}}: {}", visible(other)),
    })
}

/// Returns the verdict after the answer of a witness. `before` is the verdict without it.
///
/// A death is proven only for a holder whose identity travelled with the lock. For any other holder, the witness cannot
/// know which machine it was asked about.
fn weigh(before: Verdict, has_identity: bool, answer: WitnessVerdict) -> Verdict {
    match answer {
        WitnessVerdict::Dead if has_identity => Verdict::Dead,
        WitnessVerdict::Dead => Verdict::LikelyDead,
        WitnessVerdict::Alive => Verdict::Alive,
        WitnessVerdict::Unknown => before,
    }
}

/// Returns a judgement with the answer of a witness, or with the reason why it has none.
fn with_answer(judgement: Judgement, has_identity: bool, answer: &Answer) -> Judgement {
    let Judgement { verdict: before, reason: mut why, mut evidence, is_settled } = judgement;
    let (said, answer) = match answer {
        Ok(WitnessAnswer { verdict, reason }) => {
            let word = verdict.word();
            let reason = Some(visible(reason.trim())).filter(|reason| !reason.is_empty());
            let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
            (format!("{WITNESS} says {word}{reason}"), *verdict)
        }
        Err(failure) => (format!("{WITNESS} gave no answer: {failure}"), WitnessVerdict::Unknown),
    };
    let verdict = weigh(before, has_identity, answer);
    let proves = match (answer, verdict) {
        (WitnessVerdict::Unknown, _) => "nothing",
        (_, Verdict::Alive) => "that the holder is alive",
        (_, Verdict::Dead) => "that the holder is dead",
        _ => "that the holder is likely dead, and no more: the lock has no record of the machine of its holder",
    };
    evidence.push(Evidence { seen: said.clone(), proves });
    why = if answer == WitnessVerdict::Unknown { format!("{why}; {said}") } else { said };
    Judgement { verdict, reason: why, evidence, is_settled }
}

/// Asks the witness about a lock that does not exist. `None` if there is no witness. Otherwise returns what it has
/// answered, or why it has not.
pub(crate) async fn try_out() -> Option<Result<WitnessVerdict, String>> {
    let command = named()?;
    let lock = LockInfo {
        id: "00000000-0000-0000-0000-000000000000".to_owned(),
        operation: "OperationTypeApply".to_owned(),
        who: "nobody@no-such-host".to_owned(),
        version: "1.11.4".to_owned(),
        created: Timestamp::now().to_string(),
        path: "no-such-bucket/terraform.tfstate".to_owned(),
    };
    let answer = answer_of(&command, &question(&lock, None)).await;
    Some(answer.unwrap_or_else(no_answer_in_time).map(|answer| answer.verdict))
}

/// Runs the command with a question. `None` if it was killed because it gave no answer in time.
async fn answer_of(command: &OsStr, question: &str) -> Option<Answer> {
    let asked = shell_command::answer(command, question.as_bytes(), &NOT_PASSED);
    Some(match tokio::time::timeout(WITNESS_TIMEOUT, asked).await.ok()? {
        Ok(answered) => read(&answered),
        Err(error) => Err(format!("it could not be started: {error}")),
    })
}

fn no_answer_in_time() -> Answer {
    Err(format!("it gave no answer within {} s and was killed", WITNESS_TIMEOUT.as_secs()))
}

/// Returns whether there is a witness to ask.
pub(crate) fn is_set() -> bool {
    named().is_some()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;
    use crate::holder::evidence::NOT_YET;
    use crate::lease::observed::tests::lease;
    use crate::lease::record::{NotBelieved, Promise};

    const ANSWERS: [WitnessVerdict; 3] = [WitnessVerdict::Dead, WitnessVerdict::Alive, WitnessVerdict::Unknown];

    #[test]
    fn a_command_that_gives_no_answers_has_a_pause_and_is_asked_again_after_it() {
        let begin = Instant::now();
        let mut timeouts = Timeouts::NONE;
        for count in 0..MAX_TIMEOUTS + 2 {
            assert_eq!(timeouts.may_ask(begin), count < MAX_TIMEOUTS, "{count}");
            assert!(timeouts.may_ask(begin + PAUSE), "{count}");
            timeouts = timeouts.after(false, begin);
        }
        assert!(timeouts.after(true, begin).may_ask(begin));
        // The pause begins again with each question that is not answered.
        let later = timeouts.after(false, begin + PAUSE);
        assert!(!later.may_ask(begin + PAUSE) && later.may_ask(begin + 2 * PAUSE));
    }

    fn answered(code: i32, stdout: &[u8], stderr: &str) -> Answered {
        Answered { status: ExitStatus::from_raw(code << 8), stdout: stdout.to_vec(), stderr: stderr.into() }
    }

    #[test]
    fn a_witness_proves_a_death_only_of_a_holder_whose_identity_travelled_with_the_lock() {
        for before in Verdict::ALL {
            for has_identity in [false, true] {
                for answer in ANSWERS {
                    let expected = match (answer, has_identity) {
                        (WitnessVerdict::Dead, true) => Verdict::Dead,
                        (WitnessVerdict::Dead, false) => Verdict::LikelyDead,
                        (WitnessVerdict::Alive, _) => Verdict::Alive,
                        (WitnessVerdict::Unknown, _) => before,
                    };
                    assert_eq!(weigh(before, has_identity, answer), expected, "{before:?} {has_identity} {answer:?}");
                }
            }
        }
    }

    #[test]
    fn an_answer_is_a_json_object_of_a_command_that_succeeded() {
        for (text, verdict, reason) in [
            (r#"{"verdict": "dead", "reason": "terminated"}"#, WitnessVerdict::Dead, "terminated"),
            ("\n{\"verdict\":\"alive\"}\n", WitnessVerdict::Alive, ""),
            (r#"{"reason":"","more":[1],"verdict":"unknown"}"#, WitnessVerdict::Unknown, ""),
        ] {
            let expected = WitnessAnswer { verdict, reason: reason.to_owned() };
            assert_eq!(read(&answered(0, text.as_bytes(), "ignored")), Ok(expected), "{text}");
        }
        for (code, stdout, stderr, expected) in [
            (0, &b""[..], "", "it printed no answer"),
            (0, b"dead", "", "its answer is not"),
            (0, br#"["dead","terminated"]"#, "", "its answer is not"),
            (0, br#"{"verdict":"Dead"}"#, "", "its answer is not"),
            (0, br#"{"verdict":"dead","reason":7}"#, "", "its answer is not"),
            (0, br#"{"verdict":"unknown","verdict":"dead"}"#, "", "its answer is not"),
            (0, br#"{"verdict":"dead"} {"verdict":"dead"}"#, "", "its answer is not"),
            (0, b"\x1b[2J\xff", "", "\\u{1b}[2J"),
            (1, br#"{"verdict":"dead"}"#, "first\n\x1b[31mno access\n\n", "(exit status: 1): \\u{1b}[31mno access"),
            (127, b"", "/bin/sh: 1: x: not found\n", "x: not found"),
        ] {
            let failure = read(&answered(code, stdout, stderr)).unwrap_err();
            assert!(failure.contains(expected) && !failure.contains('\u{1b}'), "{failure}");
        }
        let long = format!("{{\"verdict\":\"dead\",\"reason\":\"{}\"}}", "x".repeat(MAX_OUTPUT_BYTES));
        let failure = read(&answered(0, &long.as_bytes()[..MAX_OUTPUT_BYTES], "")).unwrap_err();
        assert_eq!(failure, "its answer is longer than 64 KiB");
    }

    #[test]
    fn an_answer_is_used_again_only_for_the_same_question_and_while_it_is_young() {
        let (age, begun) = (Duration::from_mins(1), Instant::now());
        let after = |seconds| begun + Duration::from_secs(seconds);
        let answer: Answer = Ok(WitnessAnswer { verdict: WitnessVerdict::Dead, reason: String::new() });
        let mut answers = Answers::default();
        answers.0.insert("of a lock".to_owned(), (begun, answer.clone()));
        assert_eq!(answers.of("of a lock", age, after(59)), Some(answer));
        assert_eq!(answers.of("of another lock", age, after(59)), None);
        assert_eq!(answers.of("of a lock", age, after(60)), None);
        assert!(answers.0.is_empty(), "a watch may run for days");
        answers.0.insert("of a lock".to_owned(), (begun, Err("it failed".to_owned())));
        assert_eq!(answers.of("of a lock", Duration::ZERO, begun), None);
    }

    #[test]
    fn a_reason_is_shown_harmlessly_and_one_that_proves_nothing_is_added_to_the_others() {
        let before = || Judgement { reason: "another host".into(), ..NOT_YET.clone() };
        let said = |verdict| Ok(WitnessAnswer { verdict, reason: "\u{1b}[31mgone\u{202e} ".into() });
        let dead = with_answer(before(), true, &said(WitnessVerdict::Dead));
        assert_eq!((dead.verdict, dead.evidence[0].proves), (Verdict::Dead, "that the holder is dead"));
        assert!(dead.reason.starts_with("TFW_WITNESS says dead: ") && dead.reason.contains("gone"), "{}", dead.reason);
        assert!(!dead.reason.contains(['\u{1b}', '\u{202e}']), "{}", dead.reason);
        let likely = with_answer(before(), false, &said(WitnessVerdict::Dead));
        assert_eq!(likely.verdict, Verdict::LikelyDead);
        assert!(likely.evidence[0].proves.contains("no more"), "{:?}", likely.evidence);
        let unknown = with_answer(before(), true, &said(WitnessVerdict::Unknown));
        assert!(unknown.reason.starts_with("another host; TFW_WITNESS says unknown: "), "{}", unknown.reason);
        let failed = with_answer(before(), true, &Err("it failed".into()));
        assert_eq!((failed.verdict, failed.evidence[0].proves), (Verdict::Unknown, "nothing"));
        assert_eq!(failed.reason, "another host; TFW_WITNESS gave no answer: it failed");
    }

    #[test]
    fn only_a_record_that_is_believed_and_names_a_machine_is_an_identity() {
        let with = |change: &dyn Fn(&mut Holder)| {
            let mut lease = lease("a", 900, None, Promise::Stop);
            let holder = &mut lease.record.as_mut().unwrap().holder;
            *holder = Holder { user: "anna".into(), host: "vm".into(), ci: "Jenkins".into(), ..Holder::default() };
            change(holder);
            lease
        };
        assert_eq!(identity(None), None);
        assert_eq!(identity(Some(&with(&|_| ()))), None);
        for change in [
            |holder: &mut Holder| holder.machine = "m".into(),
            |holder: &mut Holder| holder.boot = "b".into(),
            |holder: &mut Holder| holder.container = "c".into(),
            |holder: &mut Holder| holder.job = "j".into(),
            |holder: &mut Holder| holder.cloud = "i".into(),
        ] {
            let mut lease = with(&change);
            assert!(identity(Some(&lease)).is_some(), "{lease:?}");
            lease.record = Err(NotBelieved::AnotherLock);
            assert_eq!(identity(Some(&lease)), None);
        }
    }

    #[test]
    fn a_question_contains_the_lock_and_the_holder_and_nothing_else() {
        let lock = LockInfo {
            id: "ID-7".into(),
            who: "anna@vm \u{1b}".into(),
            path: "b/k".into(),
            operation: "OperationTypeApply".into(),
            version: "1.9".into(),
            created: "2026-01-01T00:00:00Z".into(),
        };
        let holder = Holder { cloud: "Amazon EC2 i-0123".into(), ..Holder::default() };
        let fields = r#""id":"ID-7","path":"b/k","operation":"OperationTypeApply","who":"anna@vm \u001b","version":"1.9","created":"2026-01-01T00:00:00Z""#;
        assert_eq!(question(&lock, None), format!("{{\"lock\":{{{fields}}},\"holder\":null}}\n"));
        let expected = format!("{{\"lock\":{{{fields}}},\"holder\":{{\"cloud\":\"Amazon EC2 i-0123\"}}}}\n");
        assert_eq!(question(&lock, Some(&holder)), expected);
    }
}
