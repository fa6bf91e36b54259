//! How CI systems and supervisors stop a job: the signals that they send, the processes that get them, and the time in
//! between. In each case no lock is held in the end, and no process of `tf` is left.
//!
//! The times are those of the runners, so here a delay *is* what is tested. A delay that is only long is shortened, and
//! the test then says so.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getsid};

use super::interrupted_once::slow_to_plan;
use crate::support::cloud::tool;
use crate::support::process::{Run, state, terraform_below, tree};
use crate::support::processes::{
    KillOnDrop, guardian_of, home, is_gone, marked, ours, tf_of, wait_until_all_is_gone, wait_until_gone,
    wait_until_ours_are_gone, wait_until_unlocked,
};
use crate::support::proxy::Proxy;
use crate::support::system::{self, IS_LINUX, is_root_on_linux};
use crate::support::terminal::Terminal;
use crate::support::test_env::{APPLY, WAITS};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

fn apply(subject: Subject) -> String {
    format!("{} {}", subject.name(), APPLY.join(" "))
}

/// A provisioner that survives an interrupt and a TERM.
const STUBBORN: &str = "trap '' INT TERM; touch began; while test -e began && ! test -e go; do sleep 0.02; done";

/// Runs the same with bare terraform and with `tf`, at the same time, because the delays of runners add up.
fn with_both(job: impl Fn(Subject) + Sync) {
    std::thread::scope(|scope| {
        for subject in [Subject::Bare, Subject::Tf] {
            let job = &job;
            scope.spawn(move || job(subject));
        }
    });
}

/// Returns a directory in which terraform holds its lock and does not stop, whatever it gets, until the proxy delivers
/// what terraform reads. (A provisioner that ignores signals would not be enough: terraform kills a provisioner's shell
/// as soon as it is interrupted.)
fn unstoppable(environment: &[(&str, &str)]) -> (TestEnv, Proxy, KillOnDrop) {
    let (mut env, proxy) = slow_to_plan();
    for (name, value) in environment {
        env.set(name, value);
    }
    let kill_on_drop = KillOnDrop(home(&env));
    (env, proxy, kill_on_drop)
}

/// Whether a process exits within the time that a runner allows.
fn ends_within(pid: Pid, time: Duration) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < time {
        if is_gone(pid) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// With `tf`: no process and no lock is left. With bare terraform: every process is dead, and the lock is still held.
#[track_caller]
fn assert_outcome(env: &TestEnv, subject: Subject) {
    match subject {
        Subject::Tf => {
            wait_until_unlocked(env);
            wait_until_ours_are_gone(env);
        }
        Subject::Bare => {
            wait_until_all_is_gone(env);
            env.assert_locked();
        }
    }
}

/// Every process was killed, even the guardian. The next `tf` in the same directory releases the lock, and then works.
#[track_caller]
fn assert_next_gives_back(env: &TestEnv, proxy: &Proxy) {
    wait_until_all_is_gone(env);
    proxy.let_go();
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[track_caller]
fn assert_interrupted_once(env: &TestEnv, end: &Ended) {
    assert_eq!(end.out.matches("Interrupt received.").count(), 1, "{}", env.dump(end));
    assert!(!end.err.contains("Two interrupts"), "{}", env.dump(end));
}

// ---- GitHub Actions

/// Cancels a step as the runner does: it sends signals to the entry process alone, each only if the one before had no
/// effect (actions/runner, ProcessInvoker.cs).
fn cancel_step(entry: Pid) {
    for (signal, time) in [(Signal::SIGINT, 7500), (Signal::SIGTERM, 2500), (Signal::SIGKILL, 0)] {
        kill(entry, signal).unwrap();
        if ends_within(entry, Duration::from_millis(time)) {
            return;
        }
    }
}

/// Cleans up as the runner does at the end of the job (JobExtension.cs): it kills every process that still has the
/// job's mark. The real cleanup comes later than here, because the last steps of the job run before it.
fn clean_up_orphans(env: &TestEnv) {
    for pid in marked(&format!("RUNNER_TRACKING_ID=github_{}", env.bucket)) {
        let _ = kill(pid, Signal::SIGKILL);
    }
}

fn github(env: &mut TestEnv) {
    let id = format!("github_{}", env.bucket);
    env.set("CI", "true").set("GITHUB_ACTIONS", "true").set("RUNNER_TRACKING_ID", id);
}

/// Starts a step's `run:` as the runner does if the step has no `shell:`.
fn step(env: &TestEnv, script: &str) -> Run {
    env.write("step.sh", script);
    let mut command = env.command("bash");
    command.args(["-e", "step.sh"]);
    Run::start(command)
}

#[test]
fn github_actions_cancels_a_step() {
    // At INT, bash waits for its child, and at TERM it dies. Neither terraform nor tf gets a signal.
    with_both(|subject| {
        let (mut env, proxy, _kill_on_drop) = unstoppable(&[]);
        github(&mut env);
        let entry = step(&env, &format!("{}\necho done\n", apply(subject)));
        proxy.wait_until_held();
        cancel_step(entry.pid());
        clean_up_orphans(&env);
        assert_outcome(&env, subject);
        assert!(!entry.out().contains("done"), "{}", entry.out());
    });
}

#[test]
fn github_actions_cancels_a_step_whose_provisioner_still_works() {
    // At the end of the step, terraform has just been told to stop, and may be killed at any point of that.
    let mut env = TestEnv::new(Lock::Both, STUBBORN);
    let _kill_on_drop = KillOnDrop(home(&env));
    github(&mut env);
    let entry = step(&env, &format!("{}\necho done\n", apply(Subject::Tf)));
    env.wait_for_began(&entry);
    cancel_step(entry.pid());
    clean_up_orphans(&env);
    assert_outcome(&env, Subject::Tf);
}

#[test]
fn github_actions_cancels_a_step_that_is_tf_itself() {
    // With exec there is no bash in between: tf gets INT, TERM and KILL, and terraform runs until the end of the job.
    let (mut env, proxy, _kill_on_drop) = unstoppable(&[]);
    github(&mut env);
    let entry = step(&env, &format!("exec {}\n", apply(Subject::Tf)));
    proxy.wait_until_held();
    cancel_step(entry.pid());
    clean_up_orphans(&env);
    assert_outcome(&env, Subject::Tf);
    assert_interrupted_once(&env, &entry.wait());
}

#[test]
fn github_actions_two_signals_to_a_step_that_is_tf_itself_are_one_interrupt() {
    with_both(|subject| {
        let (mut env, proxy, _kill_on_drop) = unstoppable(&[]);
        github(&mut env);
        let entry = step(&env, &format!("exec {}\n", apply(subject)));
        proxy.wait_until_held();
        entry.send(Signal::SIGINT);
        entry.wait_for_out("Interrupt received");
        std::thread::sleep(Duration::from_millis(7500));
        entry.send(Signal::SIGTERM);
        match subject {
            // With the second signal, it exits immediately, while it plans and holds its lock.
            Subject::Bare => entry.wait_for_err("Two interrupts received"),
            Subject::Tf => {
                env.wait_for_trace("got SIGTERM");
                proxy.let_go();
                let end = entry.wait();
                assert_interrupted_once(&env, &end);
                assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
            }
        }
        assert_outcome(&env, subject);
    });
}

// ---- GitLab

/// Starts a job's script as the runner does: bash reads it on stdin, and runs the commands in an eval that must not
/// read stdin.
fn gitlab_job(mut command: Command, script: &str) -> Run {
    command.env("CI", "true").env("GITLAB_CI", "true");
    let mut run = Run::start(command);
    let script = format!("set -eo pipefail\n: | eval $'{script}'\nexit 0\n");
    run.stdin.as_mut().unwrap().write_all(script.as_bytes()).unwrap();
    run
}

#[test]
fn gitlabs_shell_executor_stops_a_group() {
    // The time between the two signals is ten minutes by default, and one second here.
    with_both(|subject| {
        let (env, proxy, _kill_on_drop) = unstoppable(&[]);
        let job = gitlab_job(env.command("bash"), &apply(subject));
        proxy.wait_until_held();
        job.send_to_group(Signal::SIGTERM);
        std::thread::sleep(Duration::from_secs(1));
        job.send_to_group(Signal::SIGKILL);
        if subject == Subject::Tf {
            // Terraform is not hit, because it is in its own group. It was told to stop, and is now able to.
            proxy.let_go();
        }
        assert_outcome(&env, subject);
        if subject == Subject::Tf {
            assert_interrupted_once(&env, &job.wait());
        }
    });
}

#[test]
fn gitlabs_shell_executor_stops_a_group_and_terraform_never_does() {
    let (env, proxy, _kill_on_drop) = unstoppable(&[("TFW_STOP_TIMEOUT", "3s")]);
    let job = gitlab_job(env.command("bash"), &apply(Subject::Tf));
    proxy.wait_until_held();
    job.send_to_group(Signal::SIGTERM);
    env.wait_for_trace("got SIGTERM");
    job.send_to_group(Signal::SIGKILL);
    // The guardian outlives tf, and waits for the rest of TFW_STOP_TIMEOUT.
    assert_outcome(&env, Subject::Tf);
}

// ---- containers

/// Returns process 1 of the PID namespace that `unshare`, started as `run`, has created.
#[track_caller]
fn init_of(run: &Run) -> Pid {
    let is_init = |pid: &Pid| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("NSpid:") && line.split_whitespace().skip(2).any(|pid| pid == "1"))
    };
    wait_for(
        "process 1",
        || tree(run.pid()).into_iter().map(|process| process.0).find(is_init),
        || format!("{:?}\n{}", tree(run.pid()), run.err()),
    )
}

/// Returns a command that runs `program` as process 1 of a container, with a PID namespace and its own /proc.
fn contained(env: &TestEnv, program: &str) -> Command {
    let mut command = env.command("unshare");
    command.args(["--fork", "--pid", "--mount-proc", program]);
    command
}

#[test]
fn gitlabs_docker_executor_stops_a_container() {
    if !is_root_on_linux() {
        return;
    }
    // A script in the container sends TERM to every process except process 1, in descending order of the pids, and
    // waits up to 6 s for each. After 10 s, `docker stop` takes over: TERM to process 1, 10 s, KILL. All times are
    // divided by six here.
    with_both(|subject| {
        let (env, proxy, _kill_on_drop) = unstoppable(&[]);
        let job = gitlab_job(contained(&env, "bash"), &apply(subject));
        proxy.wait_until_held();
        let init = init_of(&job);
        let begun = Instant::now();
        let mut inside = tree(init);
        inside.sort_by_key(|process| std::cmp::Reverse(process.0));
        for (pid, ..) in inside.into_iter().filter(|process| process.0 != init) {
            let left = Duration::from_millis(1700).saturating_sub(begun.elapsed());
            if !left.is_zero() && kill(pid, Signal::SIGTERM).is_ok() {
                // Unlike other runners, it also waits for a zombie.
                let until = Instant::now() + left.min(Duration::from_secs(1));
                while state(pid).is_some() && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
        // bash may have exited by then. It is process 1, so TERM has no effect on it, but its pipeline has failed.
        if kill(init, Signal::SIGTERM).is_ok() && !ends_within(init, Duration::from_millis(1700)) {
            kill(init, Signal::SIGKILL).unwrap();
        }
        match subject {
            Subject::Tf => assert_next_gives_back(&env, &proxy),
            Subject::Bare => assert_outcome(&env, subject),
        }
    });
}

#[test]
fn a_container_that_is_killed_leaves_its_lock_to_the_next_tf() {
    if !is_root_on_linux() {
        return;
    }
    for as_init in [false, true] {
        let (env, proxy, _kill_on_drop) = unstoppable(&[]);
        let mut command = contained(&env, if as_init { "tf" } else { "bash" });
        if as_init {
            command.args(APPLY);
        } else {
            command.args(["-c", &format!("{}; true", apply(Subject::Tf))]);
        }
        let run = Run::start(command);
        proxy.wait_until_held();
        // The kernel kills all other processes with it, even the guardian.
        kill(init_of(&run), Signal::SIGKILL).unwrap();
        run.wait();
        env.assert_locked();
        assert_next_gives_back(&env, &proxy);
    }
}

#[test]
fn kubernetes_kills_a_pod_whose_lock_is_gone_by_then() {
    if !is_root_on_linux() {
        return;
    }
    // The pod has 30 s, of which TFW_STOP_TIMEOUT leaves 25 s to terraform. Here they are 5 s and 2 s.
    with_both(|subject| {
        let (env, proxy, _kill_on_drop) = unstoppable(&[("TFW_STOP_TIMEOUT", "2s")]);
        let mut command = contained(&env, subject.name());
        command.args(APPLY);
        let pod = Run::start(command);
        proxy.wait_until_held();
        let init = init_of(&pod);
        kill(init, Signal::SIGTERM).unwrap();
        let ended = ends_within(init, Duration::from_secs(5));
        if subject == Subject::Tf {
            env.assert_unlocked();
            assert!(ended, "{}", env.trace());
        } else {
            assert!(!ended);
            kill(init, Signal::SIGKILL).unwrap();
        }
        let end = pod.wait();
        assert_outcome(&env, subject);
        if subject == Subject::Tf {
            assert!(end.err.contains("TFW_STOP_TIMEOUT"), "{}", env.dump(&end));
        }
    });
}

#[test]
fn as_process_1_it_hears_every_signal() {
    if !is_root_on_linux() {
        return;
    }
    // The kernel does not deliver a signal to process 1 unless it has a handler. Runtimes send from outside, `kubectl
    // exec` from inside.
    for (signal, becomes) in [
        (Signal::SIGINT, "SIGINT"),
        (Signal::SIGTERM, "SIGINT"),
        (Signal::SIGHUP, "SIGINT"),
        (Signal::SIGUSR1, "SIGUSR1"),
        (Signal::SIGUSR2, "SIGUSR2"),
        (Signal::SIGQUIT, "SIGQUIT"),
    ] {
        for inside in [false, true] {
            let mut env = TestEnv::empty(Lock::DynamoDb);
            let _kill_on_drop = KillOnDrop(home(&env));
            env.count_signals();
            let mut command = contained(&env, "tf");
            command.arg("apply");
            let run = Run::start(command);
            env.wait_for_began(&run);
            let init = init_of(&run);
            if inside {
                let line = format!("kill -{} 1", signal.as_str().trim_start_matches("SIG"));
                assert_eq!(Run::start(entering(&env, init, &line)).wait().code(), Some(0));
            } else {
                kill(init, signal).unwrap();
            }
            wait_for("the signal", || (!env.received_signals().is_empty()).then_some(()), || env.trace());
            env.unblock();
            let end = run.wait();
            assert_eq!(env.received_signals(), [becomes], "{signal} from inside {inside}: {}", env.dump(&end));
            assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        }
    }
}

/// Returns a command that runs a shell line in the namespace of `init`, as `kubectl exec` does.
fn entering(env: &TestEnv, init: Pid, line: &str) -> Command {
    let mut command = env.command("nsenter");
    command.args(["--target", &init.to_string(), "--pid", "--mount", "sh", "-c", line]);
    command
}

#[test]
fn as_process_1_it_takes_strange_zombies_away() {
    if !is_root_on_linux() {
        return;
    }
    let env = TestEnv::new(Lock::Both, WAITS);
    let _kill_on_drop = KillOnDrop(home(&env));
    let mut command = contained(&env, "tf");
    command.args(APPLY);
    let run = Run::start(command);
    env.wait_for_began(&run);
    let init = init_of(&run);
    // Its parent exits immediately, so process 1 adopts it. Its name distinguishes it from terraform's shells.
    env.write("orphan", "while ! test -e orphan-goes; do sleep 0.02; done\n");
    symlink("/bin/sh", env.directory.join("stranger")).unwrap();
    let line = format!("cd {}; ./stranger orphan >/dev/null 2>&1 &", env.directory.display());
    assert_eq!(Run::start(entering(&env, init, &line)).wait().code(), Some(0));
    let orphan = wait_for(
        "the orphan",
        || tree(init).into_iter().find(|process| process.1 == "stranger").map(|process| process.0),
        || format!("{:?}", tree(init)),
    );
    env.write("orphan-goes", "");
    wait_for(
        "process 1 to take it away",
        || state(orphan).is_none().then_some(()),
        || format!("{:?}\n{}", tree(init), env.trace()),
    );
    // Terraform and the processes that it started are still there and exit successfully.
    assert!(!is_gone(terraform_below(init)));
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

// ---- Jenkins

/// Kills as Jenkins does: every process with the mark, each with its descendants, children first. It sends TERM, and
/// then KILL to each process that is still there after 5 s. This deadline is for a whole tree, so the last processes
/// may have no time at all. It lists the processes once, before the first signal (hudson.util.ProcessTree).
fn kill_all(mark: &str) {
    let roots = marked(mark);
    let all: Vec<(Pid, Pid)> = system::processes().into_iter().map(|process| (process.pid, process.parent)).collect();
    for root in roots {
        kill_recursively(root, &all, Instant::now() + Duration::from_secs(5));
    }
}

fn kill_recursively(pid: Pid, all: &[(Pid, Pid)], deadline: Instant) {
    for (child, _) in all.iter().filter(|(_, parent)| *parent == pid) {
        kill_recursively(*child, all, deadline);
    }
    if kill(pid, Signal::SIGTERM).is_err() {
        return;
    }
    let mut pause = Duration::from_millis(10);
    // A zombie counts as well: tf leaves its terraform as one until tf itself exits.
    while state(pid).is_some() {
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
        if Instant::now() >= deadline {
            let _ = kill(pid, Signal::SIGKILL);
            return;
        }
    }
}

/// Sets the marks of Jenkins, except the one that distinguishes a script from the process that started it.
fn jenkins(env: &mut TestEnv) {
    let node = format!("node-{}", env.bucket);
    env.set("BUILD_ID", "7").set("JENKINS_NODE_COOKIE", node).set("JENKINS_SERVER_COOKIE", "dontkill");
    env.set("HUDSON_COOKIE", "a").set("HUDSON_SERVER_COOKIE", "b").set("CI", "true");
}

/// Starts a script as a pipeline's `sh` step does: without a parent, with INT and HUP ignored (durable-task).
fn sh_step(env: &TestEnv, script: &str) {
    env.write("script.sh", script);
    let line = format!(
        "(JENKINS_SERVER_COOKIE=durable-{} sh -xe script.sh > log 2>&1; echo $? > result) >&- 2>&- &",
        env.bucket
    );
    let mut command = env.command("nohup");
    command.args(["sh", "-c", &line]);
    Run::start(command).wait();
}

/// Ends the step, and then the node.
fn abort(env: &TestEnv) {
    kill_all(&format!("JENKINS_SERVER_COOKIE=durable-{}", env.bucket));
    kill_all(&format!("JENKINS_NODE_COOKIE=node-{}", env.bucket));
}

#[test]
fn jenkins_aborts_a_build() {
    with_both(|subject| {
        let (mut env, proxy, _kill_on_drop) = unstoppable(&[]);
        jenkins(&mut env);
        sh_step(&env, &apply(subject));
        proxy.wait_until_held();
        abort(&env);
        assert_outcome(&env, subject);
    });
}

#[test]
fn jenkins_aborts_a_build_whose_provisioner_ignores_term() {
    let mut env = TestEnv::new(Lock::Both, STUBBORN);
    let _kill_on_drop = KillOnDrop(home(&env));
    jenkins(&mut env);
    sh_step(&env, &apply(Subject::Tf));
    env.wait_for_file("began");
    // The provisioner has used up the five seconds: terraform and then tf are killed 10 ms after their TERM.
    abort(&env);
    assert_outcome(&env, Subject::Tf);
}

#[test]
fn no_runner_can_tell_the_guardian() {
    for in_jenkins in [false, true] {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        let _kill_on_drop = KillOnDrop(home(&env));
        if in_jenkins {
            jenkins(&mut env);
        }
        github(&mut env);
        let run = env.start_apply(Subject::Tf);
        let guardian = guardian_of(&env, run.pid());
        let environment = system::environment(guardian).unwrap();
        for name in [
            "RUNNER_TRACKING_ID",
            "JENKINS_NODE_COOKIE",
            "JENKINS_SERVER_COOKIE",
            "HUDSON_COOKIE",
            "HUDSON_SERVER_COOKIE",
            "BUILD_ID",
        ] {
            let found = environment.iter().find(|entry| entry.starts_with(&format!("{name}=")));
            assert_eq!(found, None);
        }
        // Terraform's own environment is unchanged.
        let terraforms = system::environment(terraform_below(run.pid())).unwrap().join("\n");
        assert!(terraforms.contains("RUNNER_TRACKING_ID="), "{terraforms}");
        assert_eq!(terraforms.contains("JENKINS_NODE_COOKIE="), in_jenkins);
        assert_eq!(getsid(Some(guardian)), Ok(guardian));
        // Jenkins kills the descendants of the processes that it knows, whatever is in their environment.
        assert_eq!(tree(run.pid()).iter().any(|process| process.0 == guardian), !in_jenkins);
        if IS_LINUX {
            for number in 0..3 {
                let path = fs::read_link(format!("/proc/{guardian}/fd/{number}")).unwrap();
                assert_eq!(path, PathBuf::from("/dev/null"), "{number}");
            }
            assert_eq!(fs::read_link(format!("/proc/{guardian}/cwd")).unwrap(), PathBuf::from("/"));
        }
        env.unblock();
        let end = run.wait();
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        wait_until_gone(&env, guardian);
        env.assert_unlocked();
    }
}

// ---- Buildkite

#[test]
fn buildkite_cancels_a_job() {
    // The job is on a pseudoterminal whose session leader is its shell. When the shell dies, the terminal is hung up as
    // well.
    with_both(|subject| {
        for script in [apply(subject), format!("{}; echo done", apply(subject))] {
            let (env, proxy, _kill_on_drop) = unstoppable(&[("CI", "true"), ("BUILDKITE", "true")]);
            let mut command = env.command("bash");
            command.args(["-e", "-c", &script]);
            let job = Terminal::start(command);
            proxy.wait_until_held();
            let _ = killpg(job.pid(), Signal::SIGTERM);
            std::thread::sleep(Duration::from_secs(9));
            let _ = killpg(job.pid(), Signal::SIGKILL);
            if subject == Subject::Tf {
                // Terraform is in its own group, and is not hit. It was told to stop, and is now able to.
                proxy.let_go();
            }
            assert_outcome(&env, subject);
        }
    });
}

// ---- timeout(1)

#[test]
fn timeout_kills_what_does_not_stop() {
    for stop_timeout in [None, Some("2s")] {
        with_both(|subject| {
            if subject == Subject::Bare && stop_timeout.is_some() {
                return;
            }
            let (mut env, proxy, _kill_on_drop) = unstoppable(&[]);
            if let Some(time) = stop_timeout {
                env.set("TFW_STOP_TIMEOUT", time);
            }
            let mut command = env.command("timeout");
            command.args(["-k", "1", "2", subject.name()]).args(APPLY);
            let run = Run::start(command);
            proxy.wait_until_held();
            // timeout kills its whole group, and so itself.
            let end = run.wait();
            assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
            if stop_timeout.is_none() && subject == Subject::Tf {
                assert_interrupted_once(&env, &end);
                proxy.let_go();
            }
            assert_outcome(&env, subject);
        });
    }
}

// ---- systemd

/// A control group, such as a unit has.
struct ControlGroup(PathBuf);

impl ControlGroup {
    fn new(env: &TestEnv) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let root = if root.join("pids").exists() { root.join("pids") } else { root.to_owned() };
        let path = root.join(format!("tf-test-{}", env.bucket));
        std::fs::create_dir(&path).expect("no control group can be made: /sys/fs/cgroup is not writable");
        Self(path)
    }

    /// Starts a unit's main process in the control group.
    fn start(&self, env: &TestEnv, subject: Subject) -> Run {
        let mut command = env.command("sh");
        command.args(["-c", &format!("echo $$ > {}/cgroup.procs; exec {}", self.0.display(), apply(subject))]);
        Run::start(command)
    }

    fn members(&self) -> Vec<Pid> {
        let list = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        list.lines().map(|pid| Pid::from_raw(pid.parse().unwrap())).collect()
    }

    /// Sends a signal to each process in the order of the list, as KillMode=control-group does.
    fn send(&self, signal: Signal) {
        for pid in self.members() {
            let _ = kill(pid, signal);
        }
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        self.send(Signal::SIGKILL);
        let begun = Instant::now();
        while std::fs::remove_dir(&self.0).is_err() && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Stops by a service manager itself are in stopped_together.rs, because the origin of its signals is known.
#[test]
fn somebody_else_stops_every_process_of_a_unit() {
    if !is_root_on_linux() {
        return;
    }
    // Terraform then gets two interrupts, this one and the one from tf, and exits within 5 s with its lock held. It has
    // written nothing, so tf releases the lock as soon as all processes are dead. TimeoutStopSec, which is 90 s, is 8 s
    // here.
    with_both(|subject| {
        let (env, proxy, _kill_on_drop) = unstoppable(&[]);
        let unit = ControlGroup::new(&env);
        let run = unit.start(&env, subject);
        proxy.wait_until_held();
        unit.send(Signal::SIGTERM);
        let ended = ends_within(run.pid(), Duration::from_secs(8));
        assert_eq!(ended, subject == Subject::Tf, "{}{}{}", run.out(), run.err(), env.trace());
        unit.send(Signal::SIGKILL);
        assert_outcome(&env, subject);
    });
}

#[test]
fn systemd_kills_a_unit_and_the_next_tf_gives_its_lock_back() {
    if !is_root_on_linux() {
        return;
    }
    for stopped in [false, true] {
        let (env, proxy, _kill_on_drop) = unstoppable(&[]);
        let unit = ControlGroup::new(&env);
        let run = unit.start(&env, Subject::Tf);
        proxy.wait_until_held();
        if stopped {
            unit.send(Signal::SIGTERM);
            run.wait_for_err("Two interrupts received");
        }
        // The guardian is in the control group, and is killed with the others.
        unit.send(Signal::SIGKILL);
        run.wait();
        env.assert_locked();
        assert_next_gives_back(&env, &proxy);
    }
}

#[test]
fn a_killed_session_leaves_no_lock_and_no_worker() {
    // As `pkill -s` does, or a login manager without control groups. The worker is in its own session.
    let env = TestEnv::empty(Lock::Both);
    let _kill_on_drop = KillOnDrop(home(&env));
    env.write("worker", "trap '' TERM INT HUP\nwhile :; do echo work >> work; sleep 0.02; done\n");
    env.write_main("", "setsid bash worker & touch began; wait");
    env.init();
    let run = env.start_apply(Subject::Tf);
    env.wait_for_file("work");
    let session = getsid(Some(run.pid())).unwrap();
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in system::pids().into_iter().filter(|pid| getsid(Some(*pid)) == Ok(session)) {
            let _ = kill(pid, signal);
        }
    }
    run.wait();
    assert_outcome(&env, Subject::Tf);
    let work = env.read("work").len();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(env.read("work").len(), work, "it works on. {}", env.trace());
}

// ---- parents that are programs

/// A parent that starts terraform as terraform-exec does: in its own group, with pipes, and with SIGKILL when the
/// parent dies. When its context is canceled, it sends SIGINT. It dies when it is told to.
const TERRAFORM_EXEC: &str = r#"
import ctypes, os, signal, subprocess, sys, time
def before():
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
child = subprocess.Popen(sys.argv[1:], preexec_fn=before, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
cancelled = False
while not os.path.exists("die"):
    if not cancelled and os.path.exists("cancel"):
        child.send_signal(signal.SIGINT)
        cancelled = True
    time.sleep(0.005)
os.kill(os.getpid(), signal.SIGKILL)
"#;

fn terraform_exec(env: &TestEnv, subject: Subject) -> Run {
    let mut command = env.command(tool("python3"));
    command.args(["-c", TERRAFORM_EXEC, subject.name()]).args(APPLY);
    for name in ["TF_LOG", "TF_LOG_CORE", "TF_LOG_PROVIDER", "TF_LOG_PATH"] {
        command.env(name, "");
    }
    command.env("TF_IN_AUTOMATION", "1").env("CHECKPOINT_DISABLE", "");
    Run::start(command)
}

#[test]
fn terraform_execs_program_cancels_and_dies() {
    for stop_timeout in [None, Some("1s")] {
        with_both(|subject| {
            if subject == Subject::Bare && stop_timeout.is_some() {
                return;
            }
            let (mut env, proxy, _kill_on_drop) = unstoppable(&[]);
            if let Some(time) = stop_timeout {
                env.set("TFW_STOP_TIMEOUT", time);
            }
            let parent = terraform_exec(&env, subject);
            proxy.wait_until_held();
            env.write("cancel", "");
            if subject == Subject::Tf {
                env.wait_for_trace("InterruptGroup");
                let tf = tf_of(&env);
                env.write("die", "");
                wait_until_gone(&env, tf);
                if stop_timeout.is_none() {
                    proxy.let_go();
                }
            } else {
                env.write("die", "");
            }
            parent.wait();
            assert_outcome(&env, subject);
        });
    }
}

#[test]
fn terraform_execs_program_dies_and_terraform_gets_one_interrupt() {
    for cancelled in [false, true] {
        let mut env = TestEnv::empty(Lock::DynamoDb);
        let _kill_on_drop = KillOnDrop(home(&env));
        env.count_signals();
        let parent = terraform_exec(&env, Subject::Tf);
        env.wait_for_began(&parent);
        let tf = tf_of(&env);
        if cancelled {
            env.write("cancel", "");
            wait_for("an interrupt", || (!env.received_signals().is_empty()).then_some(()), || env.trace());
        }
        env.write("die", "");
        parent.wait();
        wait_until_gone(&env, tf);
        wait_for("an interrupt", || (!env.received_signals().is_empty()).then_some(()), || env.trace());
        // Only time can show that there is no second interrupt.
        std::thread::sleep(Duration::from_millis(300));
        env.unblock();
        wait_for("the end of all that is ours", || ours(&env).is_empty().then_some(()), || env.trace());
        assert_eq!(env.received_signals(), ["SIGINT"], "cancelled {cancelled}: {}", env.trace());
    }
}

/// A parent that starts terraform as terragrunt does: in its own group, after asking for its version. It forwards a
/// signal late, because it cannot know whether terraform got it too, and finally kills terraform. The delays are its
/// first arguments.
const TERRAGRUNT: &str = r#"
import os, signal, subprocess, sys, time
delay, patience, terraform = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
assert "Terraform v" in subprocess.check_output([terraform[0], "-version"], text=True)
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append((number, time.monotonic())))
child = subprocess.Popen(terraform)
forwarded = False
while child.poll() is None:
    if got and not forwarded and time.monotonic() - got[0][1] >= delay:
        child.send_signal(got[0][0])
        forwarded = True
    if got and time.monotonic() - got[0][1] >= patience:
        child.kill()
    time.sleep(0.005)
"#;

fn terragrunt(env: &TestEnv, subject: Subject, delay: &str, patience: &str) -> Run {
    let mut command = env.command(tool("python3"));
    command.args(["-c", TERRAGRUNT, delay, patience, subject.name()]).args(APPLY);
    Run::start(command)
}

#[test]
fn terragrunt_is_told_to_stop_and_kills() {
    // It forwards TERM after 15 s, and kills after 30 s. Here they are 1 s and 2 s.
    with_both(|subject| {
        let (env, proxy, _kill_on_drop) = unstoppable(&[("CI", "true")]);
        let run = terragrunt(&env, subject, "1", "2");
        proxy.wait_until_held();
        run.send(Signal::SIGTERM);
        let end = run.wait();
        if subject == Subject::Tf {
            assert_interrupted_once(&env, &end);
            proxy.let_go();
        }
        assert_outcome(&env, subject);
    });
}

#[test]
fn terragrunts_late_second_interrupt_is_none() {
    // The group gets INT. 15 s later (here 1 s), terragrunt sends it once more.
    with_both(|subject| {
        let (env, proxy, _kill_on_drop) = unstoppable(&[]);
        let run = terragrunt(&env, subject, "1", "30");
        proxy.wait_until_held();
        run.send_to_group(Signal::SIGINT);
        run.wait_for_out("Interrupt received");
        match subject {
            Subject::Bare => run.wait_for_err("Two interrupts received"),
            Subject::Tf => {
                let times = || (env.trace().matches("got SIGINT").count() == 2).then_some(());
                wait_for("the second", times, || env.trace());
                proxy.let_go();
            }
        }
        let end = run.wait();
        if subject == Subject::Tf {
            assert_interrupted_once(&env, &end);
        }
        assert_outcome(&env, subject);
    });
}

/// Sets up a directory as hashicorp/setup-terraform does: its wrapper has terraform's name, and the real terraform is
/// beside it. The wrapper must not run: the real one dies at the first interrupt, and leaves terraform without a
/// parent.
fn set_up_as_the_action_does(env: &mut TestEnv) {
    let installed = env.directory.parent().unwrap().join("installed");
    fs::create_dir(&installed).unwrap();
    let wrapper = installed.join("terraform");
    fs::write(&wrapper, "#!/bin/sh\necho the wrapper ran\nexit 99\n").unwrap();
    fs::set_permissions(&wrapper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink(crate::support::test_env::terraform(), installed.join("terraform-bin")).unwrap();
    // `tf` comes before both in PATH, under terraform's name.
    let bin = env.bin();
    fs::remove_file(bin.join("terraform")).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_tf"), bin.join("terraform")).unwrap();
    let path = format!("{}:{}:/usr/bin:/bin", bin.display(), installed.display());
    env.set("PATH", path).set("TERRAFORM_CLI_PATH", installed);
    let output = env.directory.join("github-output");
    env.set("GITHUB_OUTPUT", output).set("CI", "true").set("GITHUB_ACTIONS", "true");
}

/// Returns the outputs of a step, as the runner parses them.
fn outputs(env: &TestEnv) -> std::collections::BTreeMap<String, String> {
    let text = env.read("github-output");
    let mut found = std::collections::BTreeMap::new();
    let mut lines = text.lines();
    while let Some((name, end)) = lines.next().and_then(|line| line.split_once("<<")) {
        let value: Vec<_> = lines.by_ref().take_while(|line| *line != end).collect();
        found.insert(name.to_owned(), value.join("\n"));
    }
    found
}

#[test]
fn in_the_place_of_setup_terraforms_wrapper_its_outputs_are_kept() {
    let mut env = TestEnv::new(Lock::Both, "true");
    set_up_as_the_action_does(&mut env);
    for (arguments, code, step) in [
        (&["plan", "-detailed-exitcode", "-no-color"][..], "2", 0),
        (&["version"], "0", 0),
        (&APPLY, "0", 0),
        (&["plan", "-detailed-exitcode", "-no-color"], "0", 0),
        (&["state", "show", "nothing.here"], "1", 1),
    ] {
        let _ = fs::remove_file(env.directory.join("github-output"));
        let mut command = env.command(env.bin().join("terraform"));
        command.args(arguments);
        let end = Run::start(command).wait();
        let outputs = outputs(&env);
        assert_eq!(end.code(), Some(step), "{arguments:?}: {}", env.dump(&end));
        assert_eq!(outputs["exitcode"], code, "{arguments:?}: {}", env.dump(&end));
        assert_eq!(outputs["stdout"].trim_end(), end.out.trim_end(), "{arguments:?}");
        assert_eq!(outputs["stderr"].trim_end(), end.err.trim_end(), "{arguments:?}");
        assert!(!end.out.contains("the wrapper ran"), "{}", end.out);
    }
    assert!(env.read("github-output").contains("exitcode<<"));
}

#[test]
fn in_the_place_of_setup_terraforms_wrapper_a_cancelled_job_leaves_no_lock() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    set_up_as_the_action_does(&mut env);
    let mut command = env.command(env.bin().join("terraform"));
    command.args(APPLY);
    let run = Run::start(command);
    env.wait_for_began(&run);
    env.assert_locked();
    run.send(Signal::SIGINT);
    run.wait_for_out("Interrupt received");
    run.send(Signal::SIGTERM);
    // Terraform kills the provisioner. If the provisioner could end by itself, terraform might succeed.
    let end = run.wait();
    assert!(!end.out.contains("Two interrupts") && !end.err.contains("Two interrupts"), "{}", env.dump(&end));
    assert_eq!(outputs(&env)["exitcode"], "1", "{}", env.dump(&end));
    env.assert_unlocked();
}
