//! Computes the verdict on a lock's holder. The verdict depends only on the observations ([`Seen`]) and on the lock.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::lease_text;
use crate::console;
use crate::console::length_of_time;
use crate::lease::observed::{Freshness, KnownClaim, KnownLease, ObservedLease};
use crate::lease::record::Promise;
use crate::terraform::lock_info::LockInfo;
use crate::time::saturating_add;

/// The verdict on a lock's holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// It is proven that the holder is running, or the holder has renewed its lease in time, or a witness says so.
    Alive,
    /// Nothing shows whether the holder is running.
    Unknown,
    /// Everything that can be seen indicates that the holder is dead, but nothing proves it.
    LikelyDead,
    /// It is proven that the holder's operation is over.
    Dead,
}

impl Verdict {
    /// All verdicts, ordered from alive to dead.
    pub(crate) const ALL: [Self; 4] = [Self::Alive, Self::Unknown, Self::LikelyDead, Self::Dead];

    /// Returns the verdict as it is shown to a person.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Unknown => "unknown",
            Self::LikelyDead => "likely dead",
            Self::Dead => "dead",
        }
    }

    /// Returns the verdict as the beginning of a sentence, to which the reason is added.
    pub(crate) fn of_the_holder(self) -> &'static str {
        match self {
            Self::Alive => "the holder is alive",
            Self::Unknown => "the holder's state is unknown",
            Self::LikelyDead => "the holder is likely dead",
            Self::Dead => "the holder is dead",
        }
    }

    /// Returns the verdict as it is written in JSON and in metrics.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::LikelyDead => "likely_dead",
            other => other.words(),
        }
    }

    /// Returns whether the lock is stale, which means that its holder is dead or likely dead. A stale lock should be
    /// released.
    pub(crate) fn is_stale(self) -> bool {
        matches!(self, Self::Dead | Self::LikelyDead)
    }
}

/// One observation, and what it proves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Evidence {
    /// The observation.
    pub(crate) seen: String,
    /// What this observation alone proves.
    pub(crate) proves: &'static str,
}

/// What the journal and the pending requests on this host say about a lock's ID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// A run with at least one running process recorded the ID. `tf` and `terraform` are pids. `terraform` is `None` if
    /// the run's record has no pid of a terraform.
    Living { run: String, tf: u32, terraform: Option<i32>, command: String },
    /// A dead run recorded the ID. `tf` is the pid of the run's `tf`. `recovering` is true if the run's guardian or
    /// another `tf` is finishing the run at this moment. `disagrees` says how the stored lock differs from the lock in
    /// the run's log. It is `None` if the two locks agree.
    Dead { run: String, tf: u32, recovering: bool, disagrees: Option<&'static str> },
    /// There is a pending request for the lock. The terraform that sent it is dead. If `had` is true, that terraform
    /// held the lock while the lock's table or bucket was unavailable. Otherwise, no response to its request was seen.
    /// `disagrees` is the same as in [`Claim::Dead`].
    Late { disagrees: Option<&'static str>, had: bool },
    /// A run recorded the ID, but this process cannot determine whether that run is alive. `why` is the reason.
    /// `may_run_here` is true if processes that may belong to that run are running on this host.
    Foreign { why: &'static str, may_run_here: bool },
}

impl Claim {
    /// Whether a process of the run is or may be running on this host, or a process of this host is finishing the run.
    /// That process may be waiting for a write of the dead terraform that this host's kernel has not delivered yet.
    pub(crate) fn runs_here(&self) -> bool {
        matches!(
            self,
            Self::Living { .. } | Self::Foreign { may_run_here: true, .. } | Self::Dead { recovering: true, .. }
        )
    }

    /// Whether a dead run recorded the ID of the lock, but the lock is not proven to be the one that the run took. The
    /// cleanup after that run does not release such a lock.
    pub(crate) fn is_in_doubt(&self) -> bool {
        matches!(self, Self::Dead { disagrees: Some(_), .. } | Self::Late { disagrees: Some(_), .. })
    }
}

/// A process that may be the holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PossibleHolder {
    pub(crate) pid: i32,
    pub(crate) program: String,
    /// When the process started. `None` if that is not known.
    pub(crate) started: Option<Timestamp>,
}

/// Everything that this host can see about one lock.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// `None` if neither the journal nor the pending requests have the lock's ID.
    pub(crate) claim: Option<Claim>,
    /// The lease record beside the lock. `None` if the lock has none.
    pub(crate) lease: Option<ObservedLease>,
    /// `user@host` of this user on this host, as terraform writes it.
    pub(crate) who: String,
    /// Whether this process can see every process of the machine, and not only those of a container.
    pub(crate) sees_all: bool,
    /// Whether a test has declared that no other host has the name of this host.
    pub(crate) is_plain: bool,
    /// Whether the journal has a run that may be running and whose record cannot be read. That run may hold the lock.
    pub(crate) has_unread_run: bool,
    /// Whether `tf` on this host has said that it does not release the lock.
    pub(crate) is_kept: bool,
    /// The running processes that may be a terraform, or that a terraform may have started.
    pub(crate) terraforms: Vec<PossibleHolder>,
    /// When this machine was started. `None` if that is not known.
    pub(crate) boot_time: Option<Timestamp>,
}

/// The tolerance for comparing a lock's `Created` with the boot time or the start time of a process. Terraform reads
/// `Created` from the clock. The kernel computes the boot time and the start time in another way, so the times may
/// differ slightly.
const START_TIME_TOLERANCE: SignedDuration = SignedDuration::from_secs(5);

/// A verdict with its reason and its evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) verdict: Verdict,
    /// The reason, in a few words.
    pub(crate) reason: String,
    /// All observations that were considered.
    pub(crate) evidence: Vec<Evidence>,
    /// Whether no witness is asked about the holder: the journal of this host or a fresh lease has decided, or a
    /// process is running on this host that may be the holder.
    pub(crate) is_settled: bool,
}

/// The judgement of a holder that was not judged yet.
pub(crate) static NOT_YET: Judgement =
    Judgement { verdict: Verdict::Unknown, reason: String::new(), evidence: Vec::new(), is_settled: false };

/// Judges the holder of `lock`.
///
/// The journal of this host decides first, if it can. Then the lease decides: it is evidence on every host, because all
/// its times are the service's. Only then does the likelihood count that this host has. A lease that has lapsed does
/// not decide while a process is running on this host that may be the holder. If none of these settles the question,
/// the caller may ask a witness ([`super::witness`]).
pub(crate) fn judge(lock: &LockInfo, seen: &Seen) -> Judgement {
    let mut evidence = Vec::new();
    let mut note = |seen: String, proves: &'static str| evidence.push(Evidence { seen, proves });
    let lease = seen.lease.as_ref();
    let mut is_settled =
        lease.and_then(|lease| lease.known().ok()).is_some_and(|lease| lease.freshness == Freshness::Fresh);
    let (verdict, reason) = match (by_claim(seen.claim.as_ref(), &mut note), &seen.claim) {
        (Some((verdict, reason)), Some(Claim::Foreign { may_run_here, .. })) => {
            is_settled |= may_run_here;
            by_lease(lease, Likelihood { verdict, reason, may_run_here: *may_run_here }, &mut note)
        }
        (Some(decided), _) => {
            is_settled = true;
            let undecided = Likelihood { verdict: decided.0, reason: String::new(), may_run_here: true };
            by_lease(lease, undecided, &mut note);
            decided
        }
        (None, _) => {
            let mut likelihood = by_likelihood(lock, seen, &mut note);
            if seen.has_unread_run {
                note(
                    "the journal of this host has a run that may be running and whose record cannot be read".into(),
                    "nothing",
                );
                let reason = "a run on this host, whose record cannot be read, may hold the lock".into();
                likelihood = Likelihood { verdict: Verdict::Unknown, reason, may_run_here: true };
            }
            is_settled |= likelihood.may_run_here;
            by_lease(lease, likelihood, &mut note)
        }
    };
    if seen.is_kept {
        evidence.push(Evidence {
            seen: "tf on this host has said that it does not release this lock, so no run here does".to_owned(),
            proves: "nothing about the holder",
        });
    }
    Judgement { verdict, reason, evidence, is_settled }
}

/// Returns whether [`judge`] may look at the processes of this host, for a lock whose `Who` has the host `host`: only if
/// that is the name of this host.
pub(crate) fn depends_on_processes(host: &str, seen: &Seen) -> bool {
    host == host_of(&seen.who)
}

/// What this host shows about a holder, without a proof.
struct Likelihood {
    verdict: Verdict,
    reason: String,
    /// Whether a process is running on this host that may be the holder.
    may_run_here: bool,
}

/// Returns the verdict by the lease. If the lease does not decide, returns the one of `here`, and adds to its reason
/// what the lease shows.
fn by_lease(
    lease: Option<&ObservedLease>,
    here: Likelihood,
    note: &mut impl FnMut(String, &'static str),
) -> (Verdict, String) {
    let undecided = |shown: String| (here.verdict, format!("{}; {shown}", here.reason));
    let lease = match lease.map(ObservedLease::known) {
        None => return (here.verdict, here.reason),
        Some(Err(doubt)) => {
            note(doubt.to_string(), "nothing: the lock is judged as one without a lease");
            return undecided(doubt.to_string());
        }
        Some(Ok(lease)) => lease,
    };
    let length = lease_text::length(lease.length);
    let age = length_of_time(lease.age);
    if lease.freshness == Freshness::Fresh {
        let reason = format!("its lease was renewed {age} ago, by the service's clock");
        note(
            format!("the {length} lease of the lock was renewed {age} ago, by the service's clock"),
            "that the holder is alive",
        );
        let Some(claim) = lease.claim else { return (Verdict::Alive, reason) };
        let (then, proves) = match lease.fence() {
            Promise::Stop => {
                ("the holder stops before its lease lapses", "that the holder stops before its lease lapses")
            }
            Promise::None => ("the holder cannot renew its lease", "nothing"),
        };
        let shown = claimed(claim);
        note(shown.clone(), proves);
        return (Verdict::Alive, format!("{reason}; {shown}; {then}"));
    }
    if !lease.is_same_region {
        let region = console::visible(&lease.record.region);
        let shown = format!("its {length} lease was last renewed {age} ago, but in another region ({region})");
        note(shown.clone(), "nothing: newer renewals may not have arrived in this region yet");
        return undecided(shown);
    }
    let (shown, proves) = lapsed(&lease, &length, &age);
    note(format!("{shown}, by the service's clock"), proves);
    if here.may_run_here { undecided(shown) } else { (Verdict::LikelyDead, shown) }
}

/// Returns who claimed the lock and when, and whether the claim has lapsed.
fn claimed(KnownClaim { claim, age, has_lapsed }: KnownClaim<'_>) -> String {
    let rest = if has_lapsed { ", but has not released it" } else { "" };
    format!("{} claimed the lock {} ago{rest}", lease_text::claimant(claim), length_of_time(age))
}

/// Returns what a lapsed lease shows, and what that proves. `length` and `age` are those of the lease, in words.
fn lapsed(lease: &KnownLease<'_>, length: &str, age: &str) -> (String, &'static str) {
    const NO_PROMISE: &str = "its host does not promise to stop terraform in time";
    match (lease.claim, lease.fence()) {
        (Some(claim), _) => (claimed(claim), "that the holder is likely dead"),
        (None, Promise::Stop) => (
            format!("its {length} lease was last renewed {age} ago"),
            "that the holder is likely dead: its host stops terraform before the lease lapses",
        ),
        (None, Promise::None) => (
            format!("its {length} lease was last renewed {age} ago, but {NO_PROMISE}"),
            "that the holder is likely dead, and no more: terraform may be running without its lease, or its tf has \
             kept the lock on purpose",
        ),
    }
}

fn by_claim(claim: Option<&Claim>, note: &mut impl FnMut(String, &'static str)) -> Option<(Verdict, String)> {
    let disagreement = |why: &str| {
        let reason = format!("a dead run on this host recorded this ID, but {why}");
        (Verdict::Unknown, reason)
    };
    Some(match claim {
        None => {
            note(
                "no run of tf on this host recorded this ID".into(),
                "nothing: the lock may belong to a terraform that was started without tf",
            );
            return None;
        }
        Some(Claim::Living { run, tf, terraform, command }) => {
            let terraform = terraform.map_or_else(String::new, |pid| format!(", terraform pid {pid}"));
            let reason = format!("held by {} on this host (tf pid {tf}{terraform})", console::visible(command));
            note(
                format!("the journal of this host records this lock for run {run}, and a process of that run is alive"),
                "that the holder is alive",
            );
            (Verdict::Alive, reason)
        }
        Some(Claim::Dead { run, disagrees: Some(why), .. }) => {
            note(
                format!("the journal of this host records this ID for run {run}, which is dead, but {why}"),
                "nothing",
            );
            disagreement(why)
        }
        Some(Claim::Dead { run, tf, recovering, disagrees: None }) => {
            note(
                format!("the journal of this host records this lock for run {run}, and every detail matches"),
                "that the lock belongs to that run",
            );
            note(
                "every process of that run has exited, and no process holds the lock file of the run".into(),
                "that the holder is dead",
            );
            let mut reason = format!("the run on this host that took the lock (tf pid {tf}) is dead");
            if *recovering {
                note("another process is cleaning up after that run".into(), "that the lock may be released soon");
                reason.push_str(", and another process is cleaning up after that run now");
            }
            (Verdict::Dead, reason)
        }
        Some(Claim::Late { disagrees: Some(why), .. }) => {
            note(format!("a terraform that died on this host requested a lock with this ID, but {why}"), "nothing");
            disagreement(why)
        }
        Some(Claim::Late { disagrees: None, had: true }) => {
            note(
                "a terraform that died on this host held this lock, whose table or bucket was not available then"
                    .into(),
                "that the holder is dead",
            );
            (Verdict::Dead, "the terraform that held the lock died on this host".into())
        }
        Some(Claim::Late { disagrees: None, had: false }) => {
            note(
                "a terraform that died on this host had requested this lock and got no answer".into(),
                "that the holder is dead",
            );
            (Verdict::Dead, "the terraform that requested the lock died on this host before it got an answer".into())
        }
        Some(Claim::Foreign { why, .. }) => {
            note(format!("the journal of this host has a record of this lock, but {why}"), "nothing");
            (Verdict::Unknown, format!("a run on this host recorded the lock, but {why}"))
        }
    })
}

fn by_likelihood(lock: &LockInfo, seen: &Seen, note: &mut impl FnMut(String, &'static str)) -> Likelihood {
    let no_process = |verdict, reason| Likelihood { verdict, reason, may_run_here: false };
    let ours = host_of(&seen.who);
    let theirs = host_of(&lock.who);
    let shown = console::visible_in_place(theirs);
    if !theirs.is_empty() && !seen.is_plain && names_no_machine(theirs) {
        note(format!("the lock's Who has the host name {shown:?}, which many machines have"), "nothing");
        return no_process(
            Verdict::Unknown,
            format!("the lock's Who does not identify a machine, because many machines have the name {shown:?}"),
        );
    }
    if ours.is_empty() || theirs != ours {
        let no_host = "the lock's Who has no host name";
        let named = if theirs.is_empty() { no_host } else { &format!("the lock's Who has the host name {shown:?}") };
        let proves = if theirs.is_empty() { "nothing" } else { "nothing: the holder can be checked only on that host" };
        note(format!("{named}, and this host is {ours:?}"), proves);
        let reason = if theirs.is_empty() {
            no_host.into()
        } else if ours.is_empty() {
            format!("this host has no name, so tf cannot tell whether it is the lock's host ({shown})")
        } else {
            format!("the lock was taken on another host ({shown})")
        };
        return no_process(Verdict::Unknown, reason);
    }
    note(format!("the lock's Who has the name of this host, {shown}"), "little: two machines may have the same name");
    if !seen.sees_all {
        note(
            "tf is running in a container".into(),
            "nothing: the holder may be outside that container, or in another container with this host name",
        );
        return no_process(
            Verdict::Unknown,
            "the lock's Who has the name of this host, but tf is in a container and cannot see all processes".into(),
        );
    }
    let Some(created) = lock.created() else {
        note("the lock's Created is not a time".into(), "nothing");
        return no_process(Verdict::Unknown, "the lock's Created is not a time".into());
    };
    if let Some(boot_time) =
        seen.boot_time.filter(|boot_time| saturating_add(created, START_TIME_TOLERANCE) < *boot_time)
    {
        note(
            format!("the lock was created before this host was started ({boot_time:.0})"),
            "that the holder is likely dead, if the lock's Who means this host",
        );
        return no_process(Verdict::LikelyDead, "the lock was created before this host was started".into());
    }
    let mut older = seen.terraforms.iter().filter(|process| {
        process.started.is_none_or(|started| started <= saturating_add(created, START_TIME_TOLERANCE))
    });
    if let Some(process) = older.next() {
        let name = console::visible(&process.program);
        note(
            format!("{name} (pid {}) is running on this host and started before the lock was created", process.pid),
            "that the holder may be alive",
        );
        let reason = format!("the holder may be {name} (pid {}) on this host", process.pid);
        return Likelihood { verdict: Verdict::Unknown, reason, may_run_here: true };
    }
    note(
        "no terraform that started before the lock was created is running on this host".into(),
        "that the holder is likely dead",
    );
    if lock.who == seen.who {
        note("the lock's Who is this user on this host".into(), "little");
        return no_process(
            Verdict::LikelyDead,
            "the lock's Who is this user on this host, where no terraform from that time is running".into(),
        );
    }
    note("the lock's Who is another user on this host".into(), "nothing");
    no_process(Verdict::Unknown, "the lock's Who is another user on this host".into())
}

/// Returns the host name in a lock's `Who`: the part after the last `@`. A user name may contain an `@`, but a host
/// name may not. Empty if there is no `@`.
pub(super) fn host_of(who: &str) -> &str {
    who.rsplit_once('@').map_or("", |(_, host)| host)
}

/// Host names of machines that were never given a name: the kernel's default name, and the names that installers,
/// images and tools propose. The names of the loopback address are in [`names_no_machine`].
const DEFAULT_NAMES: [&str; 50] = [
    "(none)",
    "alarm",
    "almalinux",
    "alma",
    "alpine",
    "amazonlinux",
    "amnesia",
    "arch",
    "archiso",
    "archlinux",
    "artix",
    "buildkitsandbox",
    "buildroot",
    "centos",
    "changeme",
    "computer",
    "coreos",
    "cygwin",
    "darkstar",
    "debian",
    "docker-desktop",
    "dietpi",
    "endeavouros",
    "fedora",
    "flatcar",
    "freebsd",
    "garuda",
    "gentoo",
    "guix",
    "host",
    "hostname",
    "kali",
    "linux",
    "linuxkit",
    "livecd",
    "macbook",
    "manjaro",
    "nixos",
    "opensuse",
    "openwrt",
    "oracle",
    "parrot",
    "pop-os",
    "raspberrypi",
    "rocky",
    "ubuntu",
    "ubuntu-server",
    "unknown",
    "vagrant",
    "void",
];

/// Domains that routers and default settings add to a host name. They do not make the name unique.
const DEFAULT_DOMAINS: [&str; 8] =
    ["local", "localdomain", "lan", "home", "internal", "intranet", "fritz.box", "home.arpa"];

/// Returns whether a host name does not identify a machine, because many machines have this name. If so, the holder may
/// be on another machine with the same name, and this host cannot see the processes of that machine.
fn names_no_machine(host: &str) -> bool {
    let host = host.trim().trim_end_matches('.').to_ascii_lowercase();
    let (name, domain) = host.split_once('.').unwrap_or((&host, ""));
    let loopback = name.is_empty()
        || ["localhost", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback"].contains(&name)
        || host.starts_with("127.")
        || host == "::1";
    loopback || (DEFAULT_NAMES.contains(&name) && (domain.is_empty() || DEFAULT_DOMAINS.contains(&domain)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::observed::tests::lease;
    use crate::lease::record::NotBelieved;

    #[test]
    fn a_name_that_many_machines_have_names_none() {
        for host in [
            "",
            " ",
            ".",
            "localhost",
            "LocalHost",
            "localhost.",
            "localhost.localdomain",
            "localhost6.localdomain6",
            "localhost.example.com",
            "ip6-localhost",
            "127.0.0.1",
            "::1",
            "(none)",
            "ubuntu",
            "Ubuntu",
            "debian.lan",
            "raspberrypi.local",
            "fedora.fritz.box",
            "archlinux.localdomain",
            "nixos",
            "linux",
            "vagrant",
        ] {
            assert!(names_no_machine(host), "{host:?}");
            for who in [format!("anna@{host}"), format!("anna@x@{host}")] {
                for created in [MADE, "2020-01-01T00:00:00Z"] {
                    let verdict = judge(&lock(&who, created), &Seen { who: who.clone(), ..seen() }).verdict;
                    assert_eq!(verdict, Verdict::Unknown, "{who:?} {created}");
                }
            }
        }
        for host in
            ["vm", "ci-7", "ubuntu-7", "ubuntu.example.com", "anna-laptop", "ip-10-0-0-7", "localhosts", "1270.x"]
        {
            assert!(!names_no_machine(host), "{host:?}");
            let who = format!("anna@{host}");
            let verdict = judge(&lock(&who, MADE), &Seen { who: who.clone(), ..seen() }).verdict;
            assert_eq!(verdict, Verdict::LikelyDead, "{who:?}");
        }
    }

    #[test]
    fn the_processes_count_only_for_a_lock_that_depends_on_them() {
        let process = PossibleHolder { pid: 7, program: "terraform".into(), started: None };
        let claims = claims().into_iter().map(|(claim, _)| Some(claim)).chain([None]);
        let mut counted = 0;
        for (claim, who, ours) in claims.flat_map(|claim| {
            let hosts = ["anna@vm", "bert@vm", "anna@ci-7", "anna@localhost", "anna", ""];
            hosts.into_iter().flat_map(move |who| hosts.map(|ours| (claim.clone(), who, ours)))
        }) {
            let without = Seen { claim, who: ours.into(), ..seen() };
            let with = Seen { terraforms: vec![process.clone()], ..without.clone() };
            let differs = judge(&lock(who, MADE), &with) != judge(&lock(who, MADE), &without);
            assert!(!differs || depends_on_processes(host_of(who), &without), "{who:?} {without:?}");
            counted += usize::from(differs);
        }
        assert!(counted > 0);
    }

    /// What the journal proves does not depend on the host name.
    #[test]
    fn a_run_of_the_journal_is_judged_whatever_the_host_is_called() {
        for (claim, expected) in claims() {
            let seen = Seen { who: "anna@localhost".into(), claim: Some(claim), ..seen() };
            assert_eq!(judge(&lock("anna@localhost", MADE), &seen).verdict, expected);
        }
    }

    fn lock(who: &str, created: &str) -> LockInfo {
        LockInfo {
            id: "5e75cb05-d70c-4132-39e0-d2abba1b3077".into(),
            operation: "OperationTypeApply".into(),
            who: who.into(),
            version: "1.11.4".into(),
            created: created.into(),
            path: "b/k".into(),
        }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    const MADE: &str = "2026-11-24T10:00:00Z";

    fn seen() -> Seen {
        Seen { who: "anna@vm".into(), sees_all: true, boot_time: Some(at("2026-11-24T08:00:00Z")), ..Seen::default() }
    }

    fn claims() -> Vec<(Claim, Verdict)> {
        let run = || "7-x".to_owned();
        vec![
            (Claim::Living { run: run(), tf: 7, terraform: Some(8), command: "apply".into() }, Verdict::Alive),
            (Claim::Dead { run: run(), tf: 7, recovering: true, disagrees: None }, Verdict::Dead),
            (Claim::Dead { run: run(), tf: 7, recovering: false, disagrees: None }, Verdict::Dead),
            (
                Claim::Dead { run: run(), tf: 7, recovering: false, disagrees: Some("its Who differs") },
                Verdict::Unknown,
            ),
            (Claim::Late { disagrees: None, had: false }, Verdict::Dead),
            (Claim::Late { disagrees: None, had: true }, Verdict::Dead),
            (Claim::Late { disagrees: Some("its Who differs"), had: false }, Verdict::Unknown),
            (Claim::Foreign { why: "it ran on another machine", may_run_here: false }, Verdict::Unknown),
        ]
    }

    /// If the journal or a pending request has the lock's ID, no other observation counts.
    #[test]
    fn only_the_journal_proves_alive_or_dead() {
        for who in ["anna@vm", "bert@vm", "anna@other", "nobody", ""] {
            for sees_all in [false, true] {
                for older in [false, true] {
                    for boot_time in [None, Some(at("2026-11-24T08:00:00Z")), Some(at("2026-11-24T12:00:00Z"))] {
                        for created in [MADE, "yesterday"] {
                            let started = Some(at(if older { "2026-11-24T09:59:59Z" } else { "2026-11-24T10:01:00Z" }));
                            let terraforms = vec![PossibleHolder { pid: 9, program: "terraform".into(), started }];
                            let mut seen = Seen { sees_all, terraforms, boot_time, ..seen() };
                            for (claim, expected) in claims() {
                                seen.claim = Some(claim.clone());
                                assert_eq!(judge(&lock(who, created), &seen).verdict, expected, "{claim:?}");
                            }
                            seen.claim = None;
                            let verdict = judge(&lock(who, created), &seen).verdict;
                            assert!(!matches!(verdict, Verdict::Alive | Verdict::Dead), "{verdict:?}");
                            let from_before = boot_time == Some(at("2026-11-24T12:00:00Z"));
                            let likely = sees_all
                                && created == MADE
                                && ((who.ends_with("@vm") && from_before) || (who == "anna@vm" && !older));
                            assert_eq!(
                                verdict == Verdict::LikelyDead,
                                likely,
                                "{who} {sees_all} {older} {boot_time:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    /// Anyone with write access to the bucket can write a lock with any `Created`.
    #[test]
    fn no_time_of_a_lock_panics() {
        for created in [Timestamp::MIN, Timestamp::MAX] {
            let started = Some(at(MADE));
            let terraforms = vec![PossibleHolder { pid: 9, program: "terraform".into(), started }];
            let judgement = judge(&lock("anna@vm", &created.to_string()), &Seen { terraforms, ..seen() });
            assert_eq!(judgement.verdict == Verdict::LikelyDead, created == Timestamp::MIN, "{judgement:?}");
        }
    }

    #[test]
    fn a_process_of_unknown_age_may_be_the_holder() {
        let terraforms = vec![PossibleHolder { pid: 9, program: "terraform".into(), started: None }];
        let judgement = judge(&lock("anna@vm", MADE), &Seen { terraforms, ..seen() });
        assert_eq!(judgement.verdict, Verdict::Unknown);
        assert!(judgement.reason.contains("pid 9"), "{}", judgement.reason);
    }

    #[test]
    fn every_verdict_has_evidence_and_a_reason_without_a_strangers_raw_text() {
        let judgement = judge(&lock("anna@\u{1b}[31mvm\n", MADE), &seen());
        assert!(judgement.verdict == Verdict::Unknown && !judgement.evidence.is_empty());
        let said = format!("{}{:?}", judgement.reason, judgement.evidence);
        assert!(!said.contains('\u{1b}') && !said.contains('\n'), "{said}");
    }

    #[test]
    fn only_a_dead_or_likely_dead_holder_makes_a_lock_stale() {
        assert_eq!(Verdict::ALL.map(Verdict::is_stale), [false, false, true, true]);
    }

    /// Every lease with everything that this host can see: the journal decides first, then a lease of which something
    /// is known, and a lapsed one only if no process of this host may be the holder.
    #[test]
    fn a_lease_decides_where_the_journal_does_not() {
        let old = PossibleHolder { pid: 9, program: "terraform".into(), started: None };
        let claims = || claims().into_iter().map(|(claim, _)| Some(claim)).chain([None]);
        for (name, lease) in leases() {
            for claim in claims().chain([Some(Claim::Foreign { why: "its processes run", may_run_here: true })]) {
                for who in ["anna@vm", "bert@vm", "anna@other", "anna@localhost", "nobody", ""] {
                    for bits in 0..8_u8 {
                        let has_unread_run = bits & 4 != 0;
                        let terraforms = if bits & 1 != 0 { vec![old.clone()] } else { Vec::new() };
                        let sees_all = bits & 2 != 0;
                        let without = Seen { claim: claim.clone(), sees_all, terraforms, has_unread_run, ..seen() };
                        let with = Seen { lease: Some(lease.clone()), ..without.clone() };
                        let (without, with) = (judge(&lock(who, MADE), &without), judge(&lock(who, MADE), &with));
                        let journal =
                            matches!(claim, Some(Claim::Living { .. } | Claim::Dead { .. } | Claim::Late { .. }));
                        let may_run_here = match claim {
                            Some(Claim::Foreign { may_run_here, .. }) => may_run_here,
                            _ => has_unread_run || (bits & 3 == 3 && who.ends_with("@vm")),
                        };
                        let expected = match name {
                            _ if journal => without.verdict,
                            "fresh" => Verdict::Alive,
                            "lapsed" if !may_run_here => Verdict::LikelyDead,
                            _ => without.verdict,
                        };
                        assert_eq!(with.verdict, expected, "{lease:?} {claim:?} {who} {bits}: {with:?}");
                        assert_eq!(with.is_settled, journal || name == "fresh" || may_run_here, "{with:?}");
                        assert_eq!(without.is_settled, journal || may_run_here, "{without:?}");
                        // What this host shows is listed too, and the lease always is. So is the claim of a lease that
                        // has not lapsed.
                        let is_claimed = lease.record.as_ref().is_ok_and(|record| record.taken.is_some());
                        let more = 1 + usize::from(name == "fresh" && is_claimed);
                        assert_eq!(with.evidence.len(), without.evidence.len() + more, "{with:?}");
                        assert_eq!(with.evidence[..without.evidence.len()], without.evidence[..]);
                        if journal {
                            assert_eq!(with.reason, without.reason);
                        } else if with.verdict == without.verdict && name != "lapsed" {
                            assert!(with.reason.starts_with(&format!("{}; ", without.reason)), "{with:?}");
                        }
                    }
                }
            }
        }
    }

    /// Returns leases of all kinds. The name says what they show.
    fn leases() -> Vec<(&'static str, ObservedLease)> {
        let stop = |age, claimed| lease("id", age, claimed, Promise::Stop);
        let not_believed = [
            NotBelieved::TooLarge,
            NotBelieved::Malformed,
            NotBelieved::Format,
            NotBelieved::AnotherLock,
            NotBelieved::Length,
            NotBelieved::Past,
            NotBelieved::Future,
        ];
        let not_believed =
            not_believed.map(|reason| ("nothing", ObservedLease { record: Err(reason), ..stop(0, None) }));
        let elsewhere = |lease| ObservedLease { region: "elsewhere".to_owned(), ..lease };
        let leases = vec![
            ("fresh", stop(40, None)),
            ("fresh", lease("id", 40, None, Promise::None)),
            ("fresh", elsewhere(stop(40, None))),
            // A person has claimed the lock of a holder that works.
            ("fresh", stop(40, Some(5))),
            ("fresh", stop(200, Some(100))),
            ("lapsed", stop(2820, None)),
            ("lapsed", lease("id", 2820, None, Promise::None)),
            ("lapsed", stop(2820, Some(5))),
            ("lapsed", stop(2820, Some(100))),
            ("nothing", elsewhere(stop(2820, None))),
            ("nothing", elsewhere(stop(2820, Some(5)))),
            ("nothing", stop(-60, None)),
            ("nothing", ObservedLease { date: None, ..stop(2820, None) }),
        ];
        leases.into_iter().chain(not_believed).collect()
    }

    #[test]
    fn a_lease_says_when_it_was_renewed_and_by_whom_it_was_claimed() {
        let host = "the lock was taken on another host (other)";
        for (lease, expected) in [
            (lease("id", 40, None, Promise::Stop), "its lease was renewed 40 s ago, by the service's clock".to_owned()),
            (lease("id", 2820, None, Promise::Stop), "its 5 min lease was last renewed 47 min 0 s ago".to_owned()),
            (
                lease("id", 2820, None, Promise::None),
                "its 5 min lease was last renewed 47 min 0 s ago, but its host does not promise to stop terraform in time"
                    .to_owned(),
            ),
            (
                lease("id", 40, Some(5), Promise::Stop),
                "its lease was renewed 40 s ago, by the service's clock; bert@ci-8 claimed the lock 5 s ago; the \
                 holder stops before its lease lapses"
                    .to_owned(),
            ),
            (
                lease("id", 200, Some(100), Promise::None),
                "its lease was renewed 3 min 20 s ago, by the service's clock; bert@ci-8 claimed the lock 1 min 40 s ago, \
                 but has not released it; the holder cannot renew its lease"
                    .to_owned(),
            ),
            (
                lease("id", 2820, Some(5), Promise::Stop),
                "bert@ci-8 claimed the lock 5 s ago".to_owned(),
            ),
            (
                lease("id", 2820, Some(100), Promise::Stop),
                "bert@ci-8 claimed the lock 1 min 40 s ago, but has not released it"
                    .to_owned(),
            ),
            (
                ObservedLease { record: Err(NotBelieved::TooLarge), ..lease("id", 0, None, Promise::Stop) },
                format!("{host}; its lease record is too large"),
            ),
            (
                ObservedLease { region: "s".to_owned(), ..lease("id", 2820, None, Promise::Stop) },
                format!("{host}; its 5 min lease was last renewed 47 min 0 s ago, but in another region (r)"),
            ),
        ] {
            let seen = Seen { lease: Some(lease), ..seen() };
            assert_eq!(judge(&lock("anna@other", MADE), &seen).reason, expected);
        }
    }

    #[test]
    fn a_lease_shows_no_raw_text_of_a_stranger() {
        for region in ["r", "s"] {
            let mut lease = lease("id", 2820, Some(5), Promise::Stop);
            if let Ok(record) = &mut lease.record {
                record.region = "r\u{1b}[2J".to_owned();
                record.taken.as_mut().unwrap().by = "\u{1b}]0;x\u{7}\n\u{202e}".repeat(50);
            }
            region.clone_into(&mut lease.region);
            if region == "r" {
                "r\u{1b}[2J".clone_into(&mut lease.region);
            }
            let judgement = judge(&lock("anna@other", MADE), &Seen { lease: Some(lease), ..seen() });
            let said = format!(
                "{} {}",
                judgement.reason,
                judgement.evidence.iter().fold(String::new(), |all, one| all + &one.seen)
            );
            assert!(!said.chars().any(char::is_control) && !said.contains('\u{202e}'), "{said:?}");
            assert!(said.len() < 4096, "{}", said.len());
        }
    }

    #[test]
    fn two_hosts_without_a_name_are_not_one_host() {
        for (theirs, ours) in [("anna", "anna"), ("anna", "anna@vm"), ("anna@vm", "anna"), ("anna@", "anna@")] {
            let judgement = judge(&lock(theirs, MADE), &Seen { who: ours.into(), ..seen() });
            assert_eq!(judgement.verdict, Verdict::Unknown, "{theirs} on {ours}");
        }
    }

    /// With another user, only the start of the host can show that the holder is likely dead.
    #[test]
    fn a_lock_is_older_than_the_host_only_beyond_the_tolerance() {
        let made = at(MADE);
        for (seconds, expected) in [(4, Verdict::Unknown), (5, Verdict::Unknown), (6, Verdict::LikelyDead)] {
            let boot_time = Some(made + SignedDuration::from_secs(seconds));
            let judgement = judge(&lock("other@vm", MADE), &Seen { boot_time, ..seen() });
            assert_eq!(judgement.verdict, expected, "started {seconds} s after the lock was made");
        }
    }
}
