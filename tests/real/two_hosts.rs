//! The lease of a lock, seen from another host than the holder's. Both hosts are on this machine. Each has its own host
//! name, machine-id, boot ID, home and working directory. Only root can make such hosts, so these tests are listed in
//! tests/left-out.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::answers::deletes_lock;
use super::given_back::{is_dynamodb, takes_file, takes_item, through};
use super::leased::{
    about_to_write, cgroup, lets_go, record, suspended_at, wait_for_renewal_after, wait_until_it_goes_on,
    wait_until_stopped,
};
use super::locks_recover::recover;
use super::taken_over::{LONG_AGO, takeovers};
use super::terminal::{INTERACTIVE, shell_of};
use crate::support::cgroup::Cgroup;
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::{Run, state, terraform_below};
use crate::support::processes::{KillOnDrop, home, kill_all, named, wait_until_all_is_gone, wait_until_gone};
use crate::support::proxy::ProxyAction;
use crate::support::relay::Cable;
use crate::support::system::is_root_on_linux;
use crate::support::test_env::{APPLY, FAKETIME, TEST_HOST, UNSET, WAITS, id_of};
use crate::support::{Ended, Lock, Subject, TestEnv, lease, wait_for};

const PLAN: [&str; 2] = ["plan", "-no-color"];

/// What a host sets up in its own namespaces before it runs a program. $1 is its name, $2 and $3 are the files with its
/// machine-id and its boot ID.
const AS_HOST: &str = "echo \"$1\" > /proc/sys/kernel/hostname && mount --bind \"$2\" /etc/machine-id \
                       && mount --bind \"$3\" /proc/sys/kernel/random/boot_id && shift 3 && exec \"$@\"";

/// The job of the holder, as its record names it.
const JOB: &str = "https://github.example/octo/infra/actions/runs/4711/attempts/2";

struct Host {
    env: TestEnv,
    name: &'static str,
    _kill_on_drop: KillOnDrop,
}

/// Returns the host `holder`, whose runs are jobs of a CI system and have a lease of `lease`. `None` without root.
fn holder(lock: Lock, lease: &str) -> Option<Host> {
    can_make_hosts().then(|| holder_in(TestEnv::new(lock, WAITS), lease))
}

fn can_make_hosts() -> bool {
    is_root_on_linux() && Path::new("/etc/machine-id").exists()
}

/// Does the same as [`holder`] with the directory `env`.
fn holder_in(mut env: TestEnv, lease: &str) -> Host {
    for (name, value) in [
        ("GITHUB_ACTIONS", "true"),
        ("GITHUB_SERVER_URL", "https://github.example"),
        ("GITHUB_REPOSITORY", "octo/infra"),
        ("GITHUB_RUN_ID", "4711"),
        ("GITHUB_RUN_ATTEMPT", "2"),
    ] {
        env.set(name, value);
    }
    Host::new(env, "holder", lease)
}

impl Host {
    fn new(mut env: TestEnv, name: &'static str, lease: &str) -> Self {
        let root = env.directory.parent().unwrap().to_owned();
        let id = format!("{:032x}", name.bytes().fold(7_u128, |sum, byte| sum * 131 + u128::from(byte)));
        fs::write(root.join("machine-id"), format!("{id}\n")).unwrap();
        let boot = [&id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]].join("-");
        fs::write(root.join("boot-id"), format!("{boot}\n")).unwrap();
        fs::create_dir(root.join("runtime")).unwrap();
        env.set(TEST_HOST, &id).set("XDG_RUNTIME_DIR", root.join("runtime"));
        env.set("TFW_LEASE", lease).set("TFW_CLOCK", "steady");
        let kill_on_drop = KillOnDrop(home(&env));
        Self { env, name, _kill_on_drop: kill_on_drop }
    }

    /// Returns another host with its own directory, whose state is the same. Its resource runs `command`.
    fn beside(&self, name: &'static str, command: &str) -> Self {
        let mut env = TestEnv::empty(self.env.lock);
        env.bucket.clone_from(&self.env.bucket);
        env.table.clone_from(&self.env.table);
        env.write_main("", command);
        env.init();
        let lease = self.env.environment.iter().rfind(|(name, _)| name == "TFW_LEASE").unwrap();
        Self::new(env, name, lease.1.to_str().unwrap())
    }

    /// Returns a command that becomes `program` on this host. `before` is the begin of the shell script that sets up
    /// the host.
    fn command_after(&self, before: &str, program: &str, arguments: &[&str]) -> Command {
        let root = self.env.directory.parent().unwrap();
        let mut command = self.env.command("unshare");
        command.args(["-u", "-m", "sh", "-c", &format!("{before}{AS_HOST}"), "sh", self.name]);
        command.args([root.join("machine-id"), root.join("boot-id")]).arg(program).args(arguments);
        command
    }

    /// Starts a program on this host. Its process is the returned one, because everything before it is replaced by it.
    /// `before` as in [`Host::command_after`].
    fn start_after(&self, before: &str, program: &str, arguments: &[&str]) -> Run {
        Run::start(self.command_after(before, program, arguments))
    }

    fn start(&self, subject: Subject, arguments: &[&str]) -> Run {
        self.start_after("", subject.name(), arguments)
    }

    fn run(&self, subject: Subject, arguments: &[&str]) -> Ended {
        self.start(subject, arguments).wait()
    }

    /// Starts an apply, and waits until its lease was renewed.
    #[track_caller]
    fn work(&self) -> Run {
        self.work_after("")
    }

    #[track_caller]
    fn work_after(&self, before: &str) -> Run {
        let run = self.start_after(before, "tf", &APPLY);
        self.env.wait_for_began(&run);
        let first = wait_for_renewal_after(&self.env, &Value::Null);
        assert_eq!(first["fence"], "stop", "{first}\n{}", self.env.trace());
        run
    }

    /// Kills everything that runs on this host.
    fn kill(&self, run: Run) {
        kill_all(&self.env);
        drop(run);
        self.env.assert_locked();
    }

    /// Kills everything that runs on this host, and removes its disk.
    fn vanish(&self, run: Run) {
        self.kill(run);
        self.remove_disk();
    }

    fn remove_disk(&self) {
        let home = self.env.directory.parent().unwrap().join("home");
        for directory in [&home, &self.env.directory] {
            fs::remove_dir_all(directory).unwrap();
        }
    }

    /// Returns the only lock, as `tf locks list --json` shows it here.
    #[track_caller]
    fn listed(&self) -> Value {
        let end = self.run(Subject::Tf, &["locks", "list", "--json"]);
        let listed: Value = serde_json::from_str(&end.out).unwrap_or_else(|_| panic!("{}", self.dump(&end)));
        let locks = listed["locks"].as_array().unwrap();
        assert_eq!(locks.len(), 1, "{}", self.dump(&end));
        locks[0].clone()
    }

    /// Waits until the lease of the only lock has lapsed by the service's own clock.
    #[track_caller]
    fn wait_until_lapsed(&self) -> Value {
        let has_lapsed = || Some(self.listed()).filter(|lock| lock["lease"]["state"] == "lapsed");
        wait_for("the lapse", has_lapsed, || format!("{:?}", record(&self.env)))
    }

    fn dump(&self, end: &Ended) -> String {
        format!("on {}: {}", self.name, self.env.dump(end))
    }
}

fn releases(end: &Ended) -> usize {
    let said = |text: &str| text.lines().filter(|line| line.contains("released the lock")).count();
    said(&end.out) + said(&end.err)
}

/// Asserts that a run was refused by the holder's lock, and that nothing was released.
#[track_caller]
fn assert_refused(host: &Host, end: &Ended) {
    assert_eq!(end.code(), Some(1), "{}", host.dump(end));
    assert!(end.err.contains("Error acquiring the state lock"), "{}", host.dump(end));
    assert!(!end.err.contains("released"), "{}", host.dump(end));
}

fn the_lock_of_a_vanished_host_is_taken_after_its_lease_and_not_before(lock: Lock) {
    let Some(holder) = holder(lock, "15s") else { return };
    let other = holder.beside("other", "true");
    let run = holder.work();
    holder.vanish(run);

    let found = other.listed();
    let lease = &found["lease"];
    assert_eq!((&found["verdict"], &lease["state"]), (&json!("alive"), &json!("fresh")), "{found}");
    let holds = &lease["holder"];
    assert_eq!((&holds["host"], &holds["job"]), (&json!("holder"), &json!(JOB)), "{found}");
    assert_eq!(format!("{}@holder", holds["user"].as_str().unwrap()), found["who"].as_str().unwrap(), "{found}");
    assert!(lease["renewed"].is_string() && lease["age_seconds"].as_u64() < Some(18), "{found}");
    let end = other.run(Subject::Tf, &["locks", "show"]);
    for text in [JOB, "@holder", "lease      15 s, renewed ", "holder is  alive"] {
        assert!(end.out.contains(text), "{text}: {}", other.dump(&end));
    }
    let end = other.run(Subject::Tf, &PLAN);
    assert_refused(&other, &end);
    let (_, after) = end.err.split_once("Error acquiring the state lock").unwrap();
    let (_, after) = after.split_once("tf: ").unwrap_or_else(|| panic!("{}", other.dump(&end)));
    for text in [JOB, "@holder", "lease of 15 s, renewed ", "alive"] {
        assert!(after.contains(text), "{text}: {}", other.dump(&end));
    }

    let found = other.wait_until_lapsed();
    assert_eq!((&found["verdict"], &found["stale"]), (&json!("likely_dead"), &json!(true)), "{found}");
    let end = other.run(Subject::Tf, &PLAN);
    assert_eq!((end.code(), releases(&end)), (Some(0), 1), "{}", other.dump(&end));
    let line = end.err.lines().find(|line| line.contains("released the lock")).unwrap();
    assert!(line.starts_with("tf: ") && line.contains(JOB) && line.contains("15 s lease"), "{line}");
    assert!(end.out.contains("Plan: 1 to add") && !end.err.contains("Error"), "{}", other.dump(&end));
    other.env.assert_unlocked();
}
for_each_lock!(the_lock_of_a_vanished_host_is_taken_after_its_lease_and_not_before);

/// Asserts that another host takes over the lock that `holder` has left, and that its plan works.
#[track_caller]
fn assert_taken_from(holder: &Host) {
    let other = holder.beside("other", "true");
    other.wait_until_lapsed();
    let end = other.run(Subject::Tf, &PLAN);
    assert_eq!((end.code(), releases(&end)), (Some(0), 1), "{}", other.dump(&end));
    assert!(end.out.contains("Plan: 1 to add") && !end.err.contains("Error"), "{}", other.dump(&end));
    other.env.assert_unlocked();
}

/// The part with the record stays as long as the other part, so that the lease of both can lapse.
#[test]
fn a_lock_whose_host_vanishes_after_an_outage_of_one_service_during_the_release_is_taken() {
    let services: [fn(&Message) -> bool; 2] = [|request| is_dynamodb(request, ""), |request| !is_dynamodb(request, "")];
    for is_away in services {
        let Some(mut holder) = holder(Lock::Both, "5s") else { return };
        let begun = Arc::new(AtomicBool::new(false));
        let outage = Arc::clone(&begun);
        let _proxy = through(&mut holder.env, move |request| {
            if outage.load(Ordering::SeqCst) && is_away(request) { ProxyAction::Close } else { ProxyAction::Pass }
        });
        let run = holder.work();
        begun.store(true, Ordering::SeqCst);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("was not released"), "{}", holder.dump(&end));
        wait_until_all_is_gone(&holder.env);
        holder.env.assert_locked();
        holder.remove_disk();
        assert_taken_from(&holder);
    }
}

/// The host vanishes between the two deletes of the release. A bare terraform in between gets no part of the lock.
#[test]
fn a_lock_whose_host_vanishes_with_half_of_it_released_is_taken() {
    let Some(mut holder) = holder(Lock::Both, "5s") else { return };
    let deletes = AtomicUsize::new(0);
    let proxy = through(&mut holder.env, move |request| {
        if is_delete_of_lock(request) && deletes.fetch_add(1, Ordering::SeqCst) > 0 {
            ProxyAction::Hold
        } else {
            ProxyAction::Pass
        }
    });
    let run = holder.work();
    run.kill_terraform();
    proxy.wait_until_held();
    kill_all(&holder.env);
    drop(run);
    holder.remove_disk();
    assert_eq!(holder.env.locks().len(), 1);
    // Terraform takes the free part, is refused the other one, and gives its part back.
    let bare = holder.beside("bare", "true");
    let end = bare.run(Subject::Bare, &PLAN);
    assert_refused(&bare, &end);
    assert_eq!(holder.env.locks().len(), 1, "{}", bare.dump(&end));
    assert_taken_from(&holder);
}

/// Whether this is the delete of `tf` for a part of the lock. The keeper deletes an object of its own too.
fn is_delete_of_lock(request: &Message) -> bool {
    deletes_lock(request) && (is_dynamodb(request, "") || request.start.contains("/prod.tfstate.tflock"))
}

fn a_run_that_waits_for_a_vanished_host_goes_on_by_itself(lock: Lock) {
    let Some(holder) = holder(lock, "4s") else { return };
    let other = holder.beside("other", "true");
    let run = holder.work();
    let mut apply = APPLY.to_vec();
    apply.push("-lock-timeout=5m");
    let waiting = other.start(Subject::Tf, &apply);
    waiting.wait_for_out("Acquiring state lock");
    holder.vanish(run);
    let begun = Instant::now();
    let end = waiting.wait();
    assert_eq!((end.code(), releases(&end)), (Some(0), 1), "{}", other.dump(&end));
    assert!(begun.elapsed() < Duration::from_secs(4 + 30), "{:?}: {}", begun.elapsed(), other.dump(&end));
    assert!(end.out.contains("Apply complete!") && end.err.contains(JOB), "{}", other.dump(&end));
    other.env.assert_unlocked();
    wait_until_all_is_gone(&other.env);
}
for_each_lock!(a_run_that_waits_for_a_vanished_host_goes_on_by_itself);

/// Sets a flag when it is dropped.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Two other hosts want the lock of `holder` until it was renewed for so many seconds by the service's own clock: one
/// of them waits for it, and the other one tries again and again. Asserts that neither of them gets it. Returns the one
/// that waits.
#[track_caller]
fn wanted_for(holder: &Host, seconds: u64) -> (Host, Run) {
    let [waits, tries] = ["waits", "tries"].map(|name| holder.beside(name, "true"));
    let id = id_of(&holder.env.locks()[0]);
    let waiting = waits.start(Subject::Tf, &[&APPLY[..], &["-lock-timeout=10m"]].concat());
    let is_over = AtomicBool::new(false);
    let mut last = record(&holder.env).unwrap();
    let first = last["renewed"].as_u64().unwrap();
    std::thread::scope(|scope| {
        // A failed assertion sets it too, so that the other thread ends.
        let over = SetOnDrop(&is_over);
        let plans = scope.spawn(|| {
            let mut ends = Vec::new();
            while !is_over.load(Ordering::SeqCst) {
                ends.push(tries.run(Subject::Tf, &PLAN));
            }
            ends
        });
        while last["renewed"].as_u64() < Some(first + seconds) {
            last = wait_for_renewal_after(&holder.env, &last);
            assert!(holder.env.locks().iter().all(|lock| id_of(lock) == id), "{:?}", holder.env.locks());
            holder.env.assert_locked();
            assert!(last.get("taken").is_none(), "{last}");
        }
        drop(over);
        let ends = plans.join().unwrap();
        assert!(!ends.is_empty());
        for end in &ends {
            assert_refused(&tries, end);
        }
    });
    (waits, waiting)
}

/// Asserts that the run of [`wanted_for`] that waits goes on after the holder's, and has released nothing.
#[track_caller]
fn assert_had_its_turn(holder: &Host, waits: &Host, waiting: Run) {
    let end = waiting.wait();
    assert!(end.code() == Some(0) || end.met_a_lock_that_went(), "{}", waits.dump(&end));
    assert_eq!(releases(&end), 0, "{}", waits.dump(&end));
    holder.env.assert_unlocked();
    wait_until_all_is_gone(&holder.env);
}

/// It works for ten leases, while another host wants its lock all the time.
fn a_host_that_works_never_loses_its_lock(lock: Lock) {
    let Some(holder) = holder(lock, "3s") else { return };
    let run = holder.work();
    let (waits, waiting) = wanted_for(&holder, 30);
    holder.env.unblock();
    let end = run.wait();
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", holder.dump(&end));
    assert_had_its_turn(&holder, &waits, waiting);
}
for_each_lock!(a_host_that_works_never_loses_its_lock);

/// A person suspends it with ^Z for three leases, while another host wants its lock all the time.
fn a_host_that_is_suspended_never_loses_its_lock(lock: Lock) {
    let Some(holder) = holder(lock, "3s") else { return };
    let mut terminal = shell_of(holder.command_after("", "bash", &INTERACTIVE));
    let terraform = suspended_at(&mut terminal, &holder.env);
    let (waits, waiting) = wanted_for(&holder, 9);
    assert_eq!(state(terraform), Some('T'));
    terminal.type_in("fg; echo status=$?\n");
    wait_until_it_goes_on(&holder.env, terraform);
    holder.env.unblock();
    terminal.wait_for("status=0");
    let screen = terminal.screen();
    assert!(screen.contains("Apply complete!") && !screen.contains("tf: "), "{screen}\n{}", holder.env.trace());
    drop(terminal);
    assert_had_its_turn(&holder, &waits, waiting);
}
for_each_lock!(a_host_that_is_suspended_never_loses_its_lock);

/// Starts an apply on `holder` in `cgroup`, and freezes it for longer than its lease. Its terraform writes its state as
/// soon as it runs again.
#[track_caller]
fn frozen(holder: &Host, cgroup: &Cgroup) -> Run {
    let run = holder.work_after(&format!("{} && ", cgroup.enter()));
    let fuse = named(&holder.env, "tf-fuse");
    cgroup.freeze(true);
    wait_until_gone(&holder.env, fuse);
    run
}

/// Lets the cgroup go on, and asserts that the run in it ends as [`assert_it_ends_after`] says.
#[track_caller]
fn assert_it_ends(holder: &Host, cgroup: &Cgroup, run: Run, how: &[&str]) {
    holder.env.unblock();
    assert_it_ends_after(|| cgroup.freeze(false), holder, run, how);
}

/// Asserts that the run is killed, says `how`, has written nothing, and does not say that it has released the lock.
#[track_caller]
fn assert_it_ends_after(back: impl FnOnce(), holder: &Host, run: Run, how: &[&str]) {
    let state = holder.env.state();
    back();
    let end = run.wait();
    assert_eq!((end.signal(), releases(&end)), (Some(9), 0), "{}", holder.dump(&end));
    for text in how.iter().chain(&["is not in the state", "terraform plan"]) {
        assert!(end.err.contains(text), "{text}: {}", holder.dump(&end));
    }
    assert_eq!(holder.env.state(), state, "{}", holder.dump(&end));
    wait_until_all_is_gone(&holder.env);
}

fn a_frozen_host_whose_lock_another_host_has_used_writes_nothing(lock: Lock) {
    let Some(cgroup) = cgroup(&format!("used-{lock:?}")) else { return };
    let Some(holder) = holder(lock, "3s") else { return };
    let other = holder.beside("other", "true");
    let run = frozen(&holder, &cgroup);
    other.wait_until_lapsed();
    let end = other.run(Subject::Tf, &APPLY);
    assert_eq!((end.code(), releases(&end)), (Some(0), 1), "{}", other.dump(&end));
    other.env.assert_unlocked();
    assert!(other.env.state().unwrap().contains("terraform_data"), "{:?}", other.env.state());
    // Nothing records any more who took it, and when.
    assert_it_ends(&holder, &cgroup, run, &["the lock of this run is gone: somebody has released or deleted it"]);
    other.env.assert_unlocked();
    let end = other.run(Subject::Tf, &PLAN);
    assert!(end.code() == Some(0) && end.out.contains("No changes."), "{}", other.dump(&end));
}
for_each_lock!(a_frozen_host_whose_lock_another_host_has_used_writes_nothing);

fn a_frozen_host_whose_lock_another_host_uses_names_that_host(lock: Lock) {
    let Some(cgroup) = cgroup(&format!("uses-{lock:?}")) else { return };
    let Some(holder) = holder(lock, "3s") else { return };
    let other = holder.beside("other", WAITS);
    let run = frozen(&holder, &cgroup);
    other.wait_until_lapsed();
    let taker = other.work();
    let id = id_of(&other.env.locks()[0]);
    assert_it_ends(&holder, &cgroup, run, &["the lock is held by another run now: ", "@other, since "]);
    other.env.assert_locked();
    assert!(other.env.locks().iter().all(|lock| id_of(lock) == id), "{:?}", other.env.locks());
    other.env.unblock();
    let end = taker.wait();
    assert_eq!((end.code(), releases(&end)), (Some(0), 1), "{}", other.dump(&end));
    other.env.assert_unlocked();
}
for_each_lock!(a_frozen_host_whose_lock_another_host_uses_names_that_host);

/// The taker has claimed the lock, and its delete is still on its way. An object has no claim, because its delete is
/// the decision.
#[test]
fn a_frozen_host_whose_lock_is_claimed_says_by_whom_and_when() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let Some(cgroup) = cgroup(&format!("claimed-{lock:?}")) else { return };
        let Some(holder) = holder(lock, "3s") else { return };
        let mut other = holder.beside("other", "true");
        let proxy = through(&mut other.env, hold_delete);
        let run = frozen(&holder, &cgroup);
        // A plan writes no state, so the state stays as it is, in whatever order the runs work.
        let taker = other.start(Subject::Tf, &[&PLAN[..], &["-lock-timeout=5m"]].concat());
        proxy.wait_until_held();
        let how =
            ["@other has claimed the lock of this run at 20", "the lock is released; ", "@other had claimed it at 20"];
        assert_it_ends(&holder, &cgroup, run, &how);
        proxy.let_go();
        let end = taker.wait();
        assert_eq!((end.code(), releases(&end)), (Some(0), 1), "{}", other.dump(&end));
        other.env.assert_unlocked();
    }
}

/// The network of the holder is away for longer than its lease, from any moment between two renewals on. Terraform
/// begins to write in the outage, or is about to write when it is stopped. Another host takes the lock and writes, and
/// in every other trial holds a lock again. More trials: TF_TEST_TRIALS=20.
fn a_host_that_is_cut_off_while_another_host_uses_its_lock_writes_nothing(lock: Lock) {
    for trial in 0..trials(2) {
        if !can_make_hosts() {
            return;
        }
        let (env, go) = about_to_write(lock);
        let mut holder = holder_in(env, "3s");
        let cable = Cable::to(cloud().port);
        holder.env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", cable.port));
        let other = holder.beside("other", &format!("if test -e wrote; then {WAITS}; fi; touch wrote"));
        let run = holder.work();
        let terraform = terraform_below(run.pid());
        // Renewals are 0.4 s apart, and terraform is stopped after 2.4 s.
        std::thread::sleep(Duration::from_secs_f64(random() * 0.5));
        cable.cut(true);
        match trial % 3 {
            0 => wait_until_stopped(&holder.env, terraform),
            _ => std::thread::sleep(Duration::from_secs_f64(random() * 2.2)),
        }
        let _open = lets_go(&go);
        wait_until_stopped(&holder.env, terraform);
        other.wait_until_lapsed();
        let end = other.run(Subject::Tf, &APPLY);
        assert_eq!((end.code(), releases(&end)), (Some(0), 1), "{trial}: {}", other.dump(&end));
        assert!(other.env.state().unwrap().contains("terraform_data"), "{trial}: {:?}", other.env.state());
        let is_held = trial % 2 == 0;
        let again = is_held.then(|| other.start(Subject::Tf, &[&APPLY[..], &["-replace=terraform_data.a"]].concat()));
        if let Some(again) = &again {
            other.env.wait_for_began(again);
        }
        let locks = other.env.locks();
        let how = if is_held {
            &["the lock is held by another run now: ", "@other, since "][..]
        } else {
            // Nothing records any more who took it, and when.
            &["the lock of this run is gone: somebody has released or deleted it"][..]
        };
        assert_it_ends_after(|| cable.cut(false), &holder, run, how);
        let ids = |locks: &[String]| locks.iter().map(|lock| id_of(lock)).collect::<Vec<_>>();
        assert_eq!(ids(&other.env.locks()), ids(&locks), "{trial}");
        other.env.unblock();
        let end = again.map(Run::wait);
        assert!(end.iter().all(|end| end.code() == Some(0)), "{trial}: {end:?} {}", other.env.trace());
        other.env.assert_unlocked();
    }
}
for_each_lock!(a_host_that_is_cut_off_while_another_host_uses_its_lock_writes_nothing);

/// Two hosts find the same lapsed lease at the same moment. In every other race it has just lapsed, so that both watch
/// it first. More races: TF_TEST_RACES=200.
fn of_two_hosts_that_take_a_lock_one_releases_it_and_says_so(lock: Lock) {
    let Some(one) = holder(lock, "2s") else { return };
    let other = one.beside("other", "true");
    let mut has_given_up = 0;
    for race in 0..races(4) {
        let age = if race % 2 == 0 { LONG_AGO } else { 4 };
        one.env.lock_with_lease(&lease::record(age, 2));
        let before = [&one, &other].map(|host| takeovers(&host.env));
        let plans = [&one, &other].map(|host| host.start(Subject::Tf, &["plan", "-no-color", "-lock-timeout=30s"]));
        let ends = plans.map(Run::wait);
        let both = || format!("{race}: {}{}", one.dump(&ends[0]), other.dump(&ends[1]));
        assert!(ends.iter().all(|end| end.code() == Some(0) || end.met_a_lock_that_went()), "{}", both());
        has_given_up += ends.iter().filter(|end| end.code() != Some(0)).count();
        let said: Vec<_> = ends.iter().map(releases).collect();
        assert_eq!(said.iter().sum::<usize>(), 1, "{}", both());
        let recorded = [takeovers(&one.env) - before[0], takeovers(&other.env) - before[1]];
        assert_eq!(recorded, said[..], "{}", both());
        one.env.assert_unlocked();
    }
    let _ = writeln!(std::io::stderr(), "{lock:?}: {has_given_up} terraforms read the lock when it was being deleted");
}
for_each_lock!(of_two_hosts_that_take_a_lock_one_releases_it_and_says_so);

/// Returns a number between 0 and 1.
pub fn random() -> f64 {
    let mut bytes = [0; 4];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX)
}

/// Returns how many trials to run: `TF_TEST_TRIALS`, or as many as `usual`.
pub fn trials(usual: usize) -> usize {
    number_in("TF_TEST_TRIALS", usual)
}

/// Returns how many races to run: `TF_TEST_RACES`, or as many as `usual`.
pub fn races(usual: usize) -> usize {
    number_in("TF_TEST_RACES", usual)
}

fn number_in(name: &str, usual: usize) -> usize {
    std::env::var(name).map_or(usual, |number| number.parse().unwrap())
}

/// All processes of a run were killed, but its journal is intact. Its host recovers it at a random moment while another
/// host takes over.
fn a_host_that_comes_back_and_a_taker_release_a_lock_once(lock: Lock) {
    for trial in 0..trials(4) {
        let Some(holder) = holder(lock, "3s") else { return };
        let other = holder.beside("other", "true");
        let run = holder.work();
        holder.env.wait_for_trace("journal written");
        holder.kill(run);
        other.wait_until_lapsed();
        let taker = other.start(Subject::Tf, &PLAN);
        taker.wait_for_err("if nothing changes for");
        std::thread::sleep(Duration::from_secs_f64(random() * 1.5));
        let back = holder.run(Subject::Tf, &["locks", "recover"]);
        let end = taker.wait();
        let both = format!("{trial}: {}{}", holder.dump(&back), other.dump(&end));
        assert_eq!((back.code(), end.code()), (Some(0), Some(0)), "{both}");
        // If the host that comes back deletes the lock after the taker has claimed it, and before the taker deletes it,
        // neither of them knows whose delete it was.
        let is_unknown = back.out.contains("@other had claimed it at 20") && end.err.contains("is already released");
        assert_eq!(releases(&back) + releases(&end), usize::from(!is_unknown), "{both}");
        assert!(!back.out.contains("not released") && !end.err.contains("not released"), "{both}");
        holder.env.assert_unlocked();
        let again = recover(&holder.env, &[]);
        assert_eq!((again.code(), again.out.as_str()), (Some(0), ""), "{}", holder.dump(&again));
    }
}
for_each_lock!(a_host_that_comes_back_and_a_taker_release_a_lock_once);

/// The taker has claimed the lock, and its delete is still on its way. The host that comes back knows that its run is
/// dead, so it need not wait for the taker, which may be dead too.
#[test]
fn a_host_that_comes_back_while_its_lock_is_claimed_does_not_hinder_the_taker() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let Some(holder) = holder(lock, "3s") else { return };
        let mut other = holder.beside("other", "true");
        let proxy = through(&mut other.env, hold_delete);
        let run = holder.work();
        holder.env.wait_for_trace("journal written");
        holder.kill(run);
        other.wait_until_lapsed();
        let taker = other.start(Subject::Tf, &PLAN);
        proxy.wait_until_held();
        let back = holder.run(Subject::Tf, &["locks", "recover"]);
        proxy.let_go();
        let end = taker.wait();
        let both = format!("{}{}", holder.dump(&back), other.dump(&end));
        assert_eq!((back.code(), end.code()), (Some(0), Some(0)), "{both}");
        assert_eq!((releases(&back), releases(&end)), (0, 1), "{both}");
        for text in ["the lock that an earlier run left (started ", ") is released; ", "@other had claimed it at 20"] {
            assert!(back.out.contains(text), "{text}: {both}");
        }
        holder.env.assert_unlocked();
        let again = recover(&holder.env, &[]);
        assert_eq!((again.code(), again.out.as_str()), (Some(0), ""), "{}", holder.dump(&again));
    }
}

/// The host that comes back has read the lock, and its delete arrives after the taker's.
fn a_host_whose_delete_comes_second_does_not_say_that_it_has_released_the_lock(lock: Lock) {
    let Some(mut holder) = holder(lock, "3s") else { return };
    let other = holder.beside("other", "true");
    // The recovery uses the endpoint of the dead run.
    let proxy =
        through(&mut holder.env, |request| if deletes_lock(request) { ProxyAction::Hold } else { ProxyAction::Pass });
    let run = holder.work();
    holder.env.wait_for_trace("journal written");
    holder.kill(run);
    other.wait_until_lapsed();
    let back = holder.start(Subject::Tf, &["locks", "recover"]);
    proxy.wait_until_held();
    let end = other.run(Subject::Tf, &PLAN);
    proxy.let_go();
    let back = back.wait();
    let both = format!("{}{}", holder.dump(&back), other.dump(&end));
    assert_eq!((back.code(), end.code()), (Some(0), Some(0)), "{both}");
    assert_eq!((releases(&back), releases(&end)), (0, 1), "{both}");
    holder.env.assert_unlocked();
    let again = recover(&holder.env, &[]);
    assert_eq!((again.code(), again.out.as_str()), (Some(0), ""), "{}", holder.dump(&again));
}
for_each_lock!(a_host_whose_delete_comes_second_does_not_say_that_it_has_released_the_lock);

/// Holds the conditional delete of an item, as a taker sends it.
fn hold_delete(request: &Message) -> ProxyAction {
    let deletes = is_dynamodb(request, ".DeleteItem") && request.text().contains("ConditionExpression");
    if deletes { ProxyAction::Hold } else { ProxyAction::Pass }
}

fn bare_terraform_on_another_host_is_refused_waits_and_unlocks_as_ever(lock: Lock) {
    let Some(holder) = holder(lock, "3s") else { return };
    let other = holder.beside("other", "true");
    let run = holder.work();
    let id = id_of(&other.env.locks()[0]);
    let lease = format!("{JOB} (tf lease 3s)");
    let mentions_it = || other.env.locks().iter().all(|lock| lock.contains(&lease)).then_some(());
    wait_for("the lease in the lock itself", mentions_it, || format!("{:?}", other.env.locks()));
    let end = other.run(Subject::Bare, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", other.dump(&end));
    let info = format!("Info:      {lease}");
    for text in ["Error acquiring the state lock", id.as_str(), "@holder", "OperationTypeApply", info.as_str()] {
        assert!(end.err.contains(text), "{text}: {}", other.dump(&end));
    }
    let last = record(&holder.env).unwrap();
    wait_for_renewal_after(&holder.env, &last);
    // It waits for its turn, works with a lock without a record, and unlocks.
    let waiting = other.start(Subject::Bare, &[&APPLY[..], &["-lock-timeout=5m"]].concat());
    waiting.wait_for_out("Acquiring state lock");
    holder.env.unblock();
    let end = run.wait();
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", holder.dump(&end));
    let end = waiting.wait();
    assert_eq!(end.code(), Some(0), "{}", other.dump(&end));
    assert!(end.out.contains("Apply complete!"), "{}", other.dump(&end));
    other.env.assert_unlocked();
}
for_each_lock!(bare_terraform_on_another_host_is_refused_waits_and_unlocks_as_ever);

/// Asserts that a holder whose lock somebody has deleted says so, and ends without bringing it back.
#[track_caller]
fn assert_not_brought_back(holder: &Host, run: Run) {
    let is_locked = || assert!(holder.env.locks().is_empty(), "{:?}\n{}", holder.env.locks(), holder.env.trace());
    let said = || {
        is_locked();
        run.err().contains("somebody has deleted the lock of this run").then_some(())
    };
    wait_for("the message", said, || format!("{}{}", run.err(), holder.env.trace()));
    holder.env.unblock();
    let end = run.wait();
    is_locked();
    assert_ne!(end.code(), Some(0), "{}", holder.dump(&end));
    wait_until_all_is_gone(&holder.env);
    is_locked();
}

/// At random moments between and during renewals, bare terraform removes the lock. More trials: TF_TEST_TRIALS=100.
fn no_renewal_brings_a_lock_back_that_force_unlock_has_removed(lock: Lock) {
    for _ in 0..trials(10) {
        let Some(holder) = holder(lock, "2s") else { return };
        let run = holder.work();
        let id = id_of(&holder.env.locks()[0]);
        // Renewals are 0.3 s apart.
        std::thread::sleep(Duration::from_secs_f64(random() * 0.8));
        let end = holder.env.run(Subject::Bare, &["force-unlock", "-force", &id]);
        assert_eq!(end.code(), Some(0), "{}", holder.dump(&end));
        assert_not_brought_back(&holder, run);
    }
}
for_each_lock!(no_renewal_brings_a_lock_back_that_force_unlock_has_removed);

/// The renewal arrives after the lock was removed.
fn a_renewal_in_flight_does_not_bring_the_lock_back(lock: Lock) {
    let Some(mut holder) = holder(lock, "4s") else { return };
    let env = &mut holder.env;
    let held = env.directory.join("hold");
    let proxy = through(env, move |request| {
        let renews = takes_item(request) || takes_file(request);
        if renews && held.exists() { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = holder.work();
    let id = id_of(&holder.env.locks()[0]);
    holder.env.write("hold", "");
    proxy.wait_until_held();
    let other = holder.beside("other", "true");
    let end = other.run(Subject::Bare, &["force-unlock", "-force", &id]);
    assert_eq!(end.code(), Some(0), "{}", other.dump(&end));
    holder.env.assert_unlocked();
    proxy.let_go();
    // It may be stopped for a moment, because a renewal was late.
    let is_locked = || assert!(holder.env.locks().is_empty(), "{:?}\n{}", holder.env.locks(), holder.env.trace());
    let is_told = || {
        is_locked();
        let err = run.err();
        ["somebody has deleted the lock", "the lock of this run is gone"]
            .iter()
            .any(|text| err.contains(text))
            .then_some(())
    };
    wait_for("the message", is_told, || format!("{}{}", run.err(), holder.env.trace()));
    holder.env.unblock();
    let end = run.wait();
    assert_ne!(end.code(), Some(0), "{}", holder.dump(&end));
    wait_until_all_is_gone(&holder.env);
    is_locked();
}
for_each_lock!(a_renewal_in_flight_does_not_bring_the_lock_back);

/// No clock but the service's decides: neither the holder's nor the taker's.
fn a_clock_that_is_an_hour_off_changes_nothing(lock: Lock) {
    if !Path::new(FAKETIME).exists() {
        return;
    }
    for (hour, is_holder) in [("+1h", true), ("+1h", false), ("-1h", true), ("-1h", false)] {
        let Some(mut holder) = holder(lock, "3s") else { return };
        let mut other = holder.beside("other", "true");
        let wrong = if is_holder { &mut holder } else { &mut other };
        wrong.env.set("LD_PRELOAD", FAKETIME).set("FAKETIME", hour).set("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        let date = wrong.start_after("", "date", &["+%s"]).wait();
        let ahead = date.out.trim().parse::<i64>().unwrap() - jiff::Timestamp::now().as_second();
        assert!((3500..3700).contains(&ahead.abs()), "{}", wrong.dump(&date));
        let run = holder.work();
        let first = record(&holder.env).unwrap();
        let mut last = first.clone();
        // Two leases.
        while last["renewed"].as_u64() < first["renewed"].as_u64().map(|at| at + 6) {
            last = wait_for_renewal_after(&holder.env, &last);
            assert_eq!(last["fence"], "stop", "{last}");
        }
        let found = other.listed();
        assert_eq!(found["verdict"], "alive", "{found}");
        assert!(found["lease"]["age_seconds"].as_u64() < Some(4), "{found}");
        let end = other.run(Subject::Tf, &PLAN);
        assert_refused(&other, &end);
        // On a busy machine, the service may not answer in time.
        let err = run.err();
        assert!(!err.contains("terraform was stopped") || err.contains("has not answered in time"), "{err}");
        holder.vanish(run);
        let begun = Instant::now();
        let end = other.run(Subject::Tf, &[&PLAN[..], &["-lock-timeout=5m"]].concat());
        assert_eq!((end.code(), releases(&end)), (Some(0), 1), "{}", other.dump(&end));
        assert!(begun.elapsed() < Duration::from_secs(3 + 30), "{:?}", begun.elapsed());
        other.env.assert_unlocked();
    }
}
for_each_lock!(a_clock_that_is_an_hour_off_changes_nothing);

fn without_tfw_lease_nothing_is_written_beside_a_lock_and_nothing_is_taken(lock: Lock) {
    let Some(mut holder) = holder(lock, "3s") else { return };
    let mut other = holder.beside("other", "true");
    other.env.set("TFW_LEASE", UNSET).set("TFW_CLOCK", UNSET);

    // A run without it.
    holder.env.set("TFW_LEASE", UNSET);
    let run = holder.start(Subject::Tf, &APPLY);
    holder.env.wait_for_began(&run);
    holder.env.wait_for_trace("journal written");
    assert_no_record(&holder.env);
    assert!(!holder.env.trace().contains("keeper"), "{}", holder.env.trace());
    holder.env.unblock();
    let end = run.wait();
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", holder.dump(&end));
    holder.env.assert_unlocked();
    fs::remove_file(holder.env.directory.join("began")).unwrap();
    fs::remove_file(holder.env.directory.join("go")).unwrap();
    holder.env.forget_state();

    // A run with it, and then a host that has not set it.
    holder.env.set("TFW_LEASE", "3s");
    let run = holder.work();
    holder.vanish(run);
    let found = other.wait_until_lapsed();
    assert_eq!(found["verdict"], "likely_dead", "{found}");
    let before = (other.env.locks(), record(&other.env));
    let end = other.run(Subject::Tf, &PLAN);
    assert_refused(&other, &end);
    for text in ["likely dead", "its 3 s lease was last renewed ", "tf locks release"] {
        assert!(end.err.contains(text), "{text}: {}", other.dump(&end));
    }
    assert_eq!((other.env.locks(), record(&other.env)), before);
    // It asks, and nobody can answer.
    let end = other.run(Subject::Tf, &["locks", "release"]);
    assert_eq!((end.code(), releases(&end)), (Some(1), 0), "{}", other.dump(&end));
    assert_eq!((other.env.locks(), record(&other.env)), before);
    let end = other.run(Subject::Tf, &["locks", "release", "--yes"]);
    assert_eq!((end.code(), releases(&end)), (Some(0), 1), "{}", other.dump(&end));
    other.env.assert_unlocked();
}
for_each_lock!(without_tfw_lease_nothing_is_written_beside_a_lock_and_nothing_is_taken);

/// Asserts that the lock is as terraform has written it.
#[track_caller]
fn assert_no_record(env: &TestEnv) {
    env.assert_locked();
    if env.lock != Lock::File {
        let key = json!({ "TableName": env.table, "Key": { "LockID": { "S": env.path() } } });
        let item = cloud().dynamodb("GetItem", &key)["Item"].as_object().unwrap().clone();
        assert_eq!(item.keys().collect::<Vec<_>>(), ["Info", "LockID"]);
    }
    for lock in env.locks() {
        let fields: Value = serde_json::from_str(&lock).unwrap();
        let names: Vec<&String> = fields.as_object().unwrap().keys().collect();
        assert_eq!(names, ["Created", "ID", "Info", "Operation", "Path", "Version", "Who"], "{lock}");
        assert_eq!(fields["Info"], "", "{lock}");
    }
}

/// A ^C during the wait for the lock of a vanished host ends the wait on this host, and leaves the lock.
#[test]
fn an_interrupt_leaves_the_lock_of_a_vanished_host() {
    let Some(holder) = holder(Lock::Both, "10s") else { return };
    let other = holder.beside("other", "true");
    let run = holder.work();
    holder.vanish(run);
    let waiting = other.start(Subject::Tf, &[&PLAN[..], &["-lock-timeout=5m"]].concat());
    waiting.wait_for_out("Acquiring state lock");
    waiting.send(Signal::SIGINT);
    let end = waiting.wait();
    assert_eq!((end.code(), releases(&end)), (Some(1), 0), "{}", other.dump(&end));
    other.env.assert_locked();
    wait_until_all_is_gone(&other.env);
}
