//! Checks the fence of a lease with real processes: `make fence`.
//!
//! This program includes the modules of `tf` that make the fence. It starts itself as a process that stands for `tf`
//! (the holder) and forks the real fuse, and as a terraform that counts as fast as it can. So a test sees whether
//! terraform has executed a single instruction too many. The holder has one thread and obeys commands.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, clippy::disallowed_macros, reason = "this is not tf")]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is not tf")]

macro_rules! modules {
    ($($name:ident $path:literal)*) => {
        $(#[allow(dead_code, unreachable_pub, unused_imports, unused_macros, clippy::allow_attributes)] #[path = $path] mod $name;)*
    };
}

modules! {
    cgroup "support/cgroup.rs"
    crash_point "../src/crash_point.rs"
    fence "../src/supervise/fence.rs"
    fuse "../src/supervise/fuse.rs"
    sys "../src/sys/mod.rs"
    trace "../src/trace.rs"
}

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fence::Fence;
use libtest_mimic::{Arguments, Failed, Trial};
use nix::poll::PollFlags;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use sys::detached::{self, Parent};
use sys::group_signal_watcher::GroupSignalWatcher;
use sys::process::{Process, ProcessHandle};
use sys::spawn::{Image, Setup, spawn};
use sys::wait::Ended;
use sys::{boot_clock, poll, process};

/// How long a state may take to come. A test fails after that.
const TIMEOUT: Duration = Duration::from_secs(20);

/// How often the keeper sends a deadline, and how far ahead it is.
const BEAT: Duration = Duration::from_millis(50);
const WORKING_TIME: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let text = |place: usize| arguments.get(place).and_then(|word| word.to_str());
    match (text(1), text(2)) {
        (Some("holder"), Some(directory)) => hold(Path::new(directory), &arguments[3..]),
        (Some("terraform"), Some(directory)) => work_as_terraform(Path::new(directory)),
        (Some("daemon"), Some(counter)) => count(Path::new(counter), || false),
        _ => {
            let mut arguments = Arguments::from_args();
            arguments.test_threads.get_or_insert(2);
            return libtest_mimic::run(&arguments, trials()).exit_code();
        }
    }
    ExitCode::SUCCESS
}

/// Writes a growing number to the file at `path` until `is_over` returns true.
fn count(path: &Path, is_over: impl Fn() -> bool) {
    let file = fs::File::create(path).unwrap();
    let mut number = 0_u64;
    while !number.is_multiple_of(512) || !is_over() {
        number += 1;
        file.write_all_at(&number.to_le_bytes(), 0).unwrap();
    }
}

/// Counts until the file `stop` exists. If the file `with-daemon` exists, starts a process in its own group that counts
/// on.
#[expect(clippy::zombie_processes, reason = "the daemon outlives this process")]
fn work_as_terraform(directory: &Path) {
    if directory.join("with-daemon").exists() {
        let own = std::env::current_exe().unwrap();
        let daemon = Command::new(own).arg("daemon").arg(directory.join("daemon")).spawn().unwrap();
        fs::write(directory.join("daemon-pid"), daemon.id().to_string()).unwrap();
    }
    count(&directory.join("work"), || directory.join("stop").exists());
}

/// The process that stands for `tf`.
struct HolderProcess {
    fence: Fence,
    terraform: Pid,
    /// The end of the leash that `tf` and the guardian hold, and the keeper's end.
    leash: (UnixStream, UnixStream),
    guardian: UnixStream,
    watcher: Option<GroupSignalWatcher>,
}

/// Makes close_range(2) fail in this process and in all that it starts, as before Linux 5.9.
#[expect(unsafe_code, reason = "no crate that the tests have wraps seccomp(2)")]
fn forbid_close_range() {
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let refusal = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::ENOSYS).unwrap();
    let mut filter = [
        // The number of the system call is the first field of struct seccomp_data (seccomp(2)).
        statement(0x20, 0),
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: u32::try_from(libc::SYS_close_range).unwrap() },
        statement(0x06, refusal),
        statement(0x06, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: u16::try_from(filter.len()).unwrap(), filter: filter.as_mut_ptr() };
    // SAFETY: the program is complete, and the kernel copies it. The last call closes a descriptor that is not open.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
        assert_eq!(libc::syscall(libc::SYS_close_range, i32::MAX, i32::MAX, 0), -1);
    }
    assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS));
}

/// Starts everything as `tf` does, and obeys commands from stdin.
fn hold(directory: &Path, options: &[OsString]) {
    let has = |option: &str| options.iter().any(|word| word == option);
    if has("old-kernel") {
        forbid_close_range();
    }
    let mut fence = Fence::prepare(|_| false).unwrap();
    let leash = UnixStream::pair().unwrap();
    let (guardian, its_end) = UnixStream::pair().unwrap();
    let mut keep = fence.guardian_descriptors().to_vec();
    keep.extend([leash.0.as_raw_fd(), its_end.as_raw_fd()]);
    let guardian_pid =
        detached::run(c"t-guardian", Parent::Us, &keep, || guard(&mut fence, &its_end, &leash.0)).unwrap().unwrap();
    drop(its_end);
    let [fuse, spare] = fence.fork_fuse(Parent::Us).unwrap().map(Option::unwrap);
    process::become_subreaper();

    let inherited = fence.inheritable_read_ends().unwrap();
    let own = std::env::current_exe().unwrap();
    let words = [OsStr::new("terraform"), OsStr::new("terraform"), directory.as_os_str()];
    let image = Image::new(&own, words, std::env::vars_os()).unwrap();
    let ignored: &[Signal] = if has("nohup") { &[Signal::SIGHUP] } else { &[] };
    let mask = SigSet::empty();
    let setup = Setup { own_group: true, redirect: [None, None], mask: &mask, ignored, announce: None };
    let terraform = spawn(&image, &setup).unwrap();
    drop(inherited);
    (&guardian).write_all(&terraform.as_raw().to_ne_bytes()).unwrap();

    let mut holder = HolderProcess { fence, terraform, leash, guardian, watcher: None };
    reply(&format!("{guardian_pid} {fuse} {terraform} {spare}"));
    for line in io::stdin().lock().lines() {
        reply(&holder.obey(&line.unwrap()));
    }
}

fn reply(text: &str) {
    println!("{text}");
}

impl HolderProcess {
    fn obey(&mut self, command: &str) -> String {
        let (fence, group) = (&mut self.fence, self.terraform);
        let told = |result: io::Result<()>| result.map_or_else(|error| error.to_string(), |()| "ok".to_owned());
        match command.split_once(' ').unwrap_or((command, "")) {
            ("arm", _) => told(fence.arm(group)),
            ("deadline", milliseconds) => {
                let ahead = Duration::from_millis(milliseconds.parse().unwrap());
                fuse::send_deadline(fence.keeper_end(), boot_clock::now() + ahead).unwrap();
                poll::wait(&[(fence.keeper_end().as_fd(), PollFlags::POLLIN)], Some(TIMEOUT));
                let answer = fuse::receive_answer(fence.keeper_end()).unwrap().unwrap();
                let deadline = answer.deadline.map_or_else(|| "cannot".to_owned(), |at| at.as_nanos().to_string());
                format!("{} {deadline}", answer.fuse)
            }
            ("is_blown", _) => fence.is_blown().to_string(),
            ("continue", _) => fence::continue_group(Some(fence), group).to_string(),
            ("rearm", _) => fence.rearm().unwrap().map_or(0, Pid::as_raw).to_string(),
            ("spare", _) => fence.fork_spare(Parent::Us).unwrap().unwrap().to_string(),
            ("give", _) => told(fence.give_kill_pipe()),
            ("end", _) => {
                fence.end(Some(group), || {}).wait();
                // The guardian may have been killed.
                let _ = (&self.guardian).write_all(b"o");
                (&self.leash.0).write_all(b"o").unwrap();
                "ok".to_owned()
            }
            ("keeper", _) => self.start_keeper().to_string(),
            ("watcher", _) => {
                self.watcher = None;
                match GroupSignalWatcher::place(group) {
                    Ok(watcher) => self.watcher.insert(watcher).pid().to_string(),
                    Err(error) => format!("{:?}", error.kind()),
                }
            }
            ("pipes", _) => {
                let name = |pipe: &sys::hangup_pipe::HangupPipe| {
                    fs::read_link(format!("/proc/self/fd/{}", pipe.as_fd().as_raw_fd())).unwrap().display().to_string()
                };
                format!("{} {}", name(fence.stop_pipe()), name(fence.kill_pipe()))
            }
            other => panic!("unknown command {other:?}"),
        }
    }

    fn start_keeper(&mut self) -> Pid {
        let (fence, leash, terraform) = (&self.fence, &self.leash.1, self.terraform);
        let mut keep = fence.guardian_descriptors().to_vec();
        keep.push(leash.as_raw_fd());
        let pid = detached::run(c"t-keeper", Parent::Us, &keep, || renew(fence, leash, terraform)).unwrap().unwrap();
        // The keeper of `tf` is another program, which never has a write end. This one has closed its copies now.
        (&self.leash.0).read_exact(&mut [0]).unwrap();
        pid
    }
}

/// The guardian: when `tf` is dead, waits for terraform's end, and takes the fence down.
fn guard(fence: &mut Fence, link: &UnixStream, leash: &UnixStream) {
    fence.become_guardians();
    let mut pid = [0; 4];
    let mut link = link;
    if link.read_exact(&mut pid).is_err() {
        return;
    }
    let terraform = Pid::from_raw(i32::from_ne_bytes(pid));
    let process = ProcessHandle::open(terraform).unwrap();
    if link.read(&mut [0]).unwrap_or(0) > 0 {
        return;
    }
    poll::wait(&[(process.as_fd(), PollFlags::POLLIN)], None);
    fence.end(None, || {}).wait();
    let mut leash = leash;
    let _ = leash.write_all(b"o");
}

/// The keeper: sends a deadline at each beat as long as the stop pipe has not hung up. It ends when it is told so, or
/// when terraform has ended and nobody is left to tell it.
fn renew(fence: &Fence, leash: &UnixStream, terraform: Pid) {
    let process = ProcessHandle::open(terraform).unwrap();
    let mut leash = leash;
    leash.write_all(b"b").unwrap();
    let mut is_alone = false;
    loop {
        if !fence.stop_pipe().has_hung_up()
            && fuse::send_deadline(fence.keeper_end(), boot_clock::now() + WORKING_TIME).is_err()
        {
            return;
        }
        let awaited = if is_alone { process.as_fd() } else { leash.as_fd() };
        if poll::wait(&[(awaited, PollFlags::POLLIN)], Some(BEAT)) == [true] {
            if is_alone {
                let _ = fuse::send_over(fence.keeper_end());
                return;
            }
            if leash.read(&mut [0]).unwrap_or(0) > 0 {
                return;
            }
            is_alone = true;
        }
        while fuse::receive_answer(fence.keeper_end()).is_ok_and(|answer| answer.is_some()) {}
    }
}

/// A process that a test watches and may kill. No other process is meant, whatever becomes of its pid.
struct Watched {
    pid: Pid,
    process: ProcessHandle,
}

impl Watched {
    fn new(pid: &str) -> Self {
        let pid = Pid::from_raw(pid.trim().parse().unwrap());
        Self { pid, process: ProcessHandle::open(pid).unwrap() }
    }

    fn kill(&self) {
        let _ = self.process.signal(Signal::SIGKILL);
    }

    fn is_dead(&self) -> bool {
        poll::ready_now(self.process.as_fd(), PollFlags::POLLIN)
    }

    fn is_stopped(&self) -> bool {
        Process::look_up(self.pid).is_some_and(|found| found.state == 'T')
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.process.signal(Signal::SIGKILL);
    }
}

/// A holder with its guardian, its fuse and its terraform.
struct Run {
    directory: tempfile::TempDir,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    tf: Watched,
    guardian: Watched,
    fuse: Watched,
    terraform: Watched,
    spare: Option<Watched>,
}

impl Run {
    fn start(options: &[&str]) -> Self {
        Self::start_as(options, None)
    }

    /// Starts a holder. `options` may contain `nohup`, `daemon` and `old-kernel`. `wrapper` is a shell script that
    /// executes its arguments.
    fn start_as(options: &[&str], wrapper: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        if options.contains(&"daemon") {
            fs::write(directory.path().join("with-daemon"), "").unwrap();
        }
        let own = std::env::current_exe().unwrap();
        let mut command = if let Some(script) = wrapper {
            let mut shell = Command::new("sh");
            shell.arg("-c").arg(script).arg("sh").arg(own);
            shell
        } else {
            Command::new(own)
        };
        command.arg("holder").arg(directory.path()).args(options);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let line = line(&mut output);
        let mut pids = line.split(' ').map(Watched::new);
        let tf = Watched::new(&child.id().to_string());
        let mut next = || pids.next().unwrap();
        let (guardian, fuse, terraform, spare) = (next(), next(), next(), Some(next()));
        let run = Self { directory, child, input, output, tf, guardian, fuse, terraform, spare };
        run.wait_until_it_works();
        run
    }

    /// Starts a holder whose fence is armed, and whose fuse has a deadline far ahead.
    fn armed(options: &[&str]) -> Self {
        let mut run = Self::start(options);
        assert_eq!(run.tell("arm"), "ok");
        run.set_deadline(600_000);
        run
    }

    /// Has the holder execute `command`, and returns its reply.
    fn tell(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").unwrap();
        line(&mut self.output)
    }

    /// Sends the fuse a deadline so many milliseconds ahead. Returns the deadline of the answer. `None` if the fuse has
    /// no timer.
    fn set_deadline(&mut self, milliseconds: u64) -> Option<Duration> {
        let answer = self.tell(&format!("deadline {milliseconds}"));
        answer.split_once(' ').unwrap().1.parse().ok().map(Duration::from_nanos)
    }

    fn counted(&self, name: &str) -> u64 {
        let bytes = fs::read(self.directory.path().join(name)).unwrap_or_default();
        bytes.try_into().map_or(0, u64::from_le_bytes)
    }

    fn work(&self) -> u64 {
        self.counted("work")
    }

    /// Waits until terraform has counted on.
    fn wait_until_it_works(&self) {
        let before = self.work();
        wait_for("terraform to work", || self.work() > before);
    }

    /// Waits until terraform is stopped. Returns what it has counted to.
    fn wait_until_stopped(&self) -> u64 {
        wait_for("terraform to be stopped", || self.terraform.is_stopped());
        self.work()
    }

    /// Kills the fuse and waits until terraform is stopped. Returns what terraform has counted to.
    fn blow(&mut self) -> u64 {
        self.fuse.kill();
        let work = self.wait_until_stopped();
        assert_eq!(self.tell("is_blown"), "true");
        work
    }

    /// Puts the spare fuse into use.
    fn rearm(&mut self) {
        assert_eq!(self.tell("rearm"), "0");
        self.fuse = self.spare.take().unwrap();
    }

    fn fork_spare(&mut self) {
        let pid = self.tell("spare");
        self.spare = Some(Watched::new(&pid));
    }

    /// Waits until terraform is dead. It must have been killed.
    fn wait_until_killed(&self) {
        wait_for("terraform to be dead", || self.terraform.is_dead());
        let end = self.terraform.process.end_of(self.terraform.pid);
        assert!(matches!(end, None | Some(Ended::Killed(Signal::SIGKILL))), "{end:?}");
    }

    /// Lets terraform end by itself.
    fn let_terraform_end(&self) {
        fs::write(self.directory.path().join("stop"), "").unwrap();
        wait_for("terraform to end", || self.terraform.is_dead());
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.tf.kill();
        let _ = self.child.wait();
        if let Ok(pid) = fs::read_to_string(self.directory.path().join("daemon-pid")) {
            let _ = kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL);
        }
    }
}

fn line(output: &mut impl BufRead) -> String {
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert!(line.ends_with('\n'), "the holder died");
    line.trim_end().to_owned()
}

fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + TIMEOUT;
    while !is_so() {
        assert!(Instant::now() < until, "waited in vain for {what}");
        poll::wait(&[], Some(Duration::from_millis(1)));
    }
}

fn trials() -> Vec<Trial> {
    let trial = |name: &str, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok::<(), Failed>(())
        })
    };
    let mut trials = vec![
        trial("the_death_of_the_fuse_stops_terraform_and_a_new_fuse_does_so_again", stopped_again),
        trial("terraform_is_stopped_at_the_latest_deadline", at_its_deadline),
        trial("a_stopped_terraform_without_tf_is_dead_before_it_runs_again", dead_before_it_runs),
        trial("without_tf_a_new_fuse_does_not_keep_a_stopped_terraform", between_rearm_and_give),
        trial("after_the_kill_pipe_was_given_the_new_fuse_holds_terraform_alone", after_give),
        trial("a_fuse_that_was_killed_with_its_spare_is_replaced", killed_with_its_spare),
        trial("the_write_ends_are_where_they_belong", where_the_write_ends_are),
        trial("a_watcher_that_is_stopped_while_it_joins_does_not_hang_tf", stopped_watcher),
        trial("a_daemon_outlives_the_fence", daemon_outlives),
        trial("a_stopped_daemon_goes_on_after_the_fence", stopped_daemon_goes_on),
        trial("a_suspended_group_is_not_continued_past_a_dead_fuse", suspended_group),
        trial("a_group_is_continued_as_long_as_the_fuse_lives", continued_while_it_lives),
        trial("an_unarmed_fence_signals_nobody", unarmed),
        trial("a_fence_whose_fuse_is_gone_cannot_be_armed", armed_too_late),
        trial("a_fuse_without_a_timer_says_so", no_timer),
        trial("a_fuse_without_a_deadline_does_not_stay_behind", no_orphan),
        trial("a_frozen_terraform_is_stopped_before_it_runs_again", frozen),
    ];
    for subset in 1..16_u8 {
        for is_reversed in [false, true] {
            let victims: Vec<&'static str> =
                (0..4).filter(|place| subset & (1 << place) != 0).map(|place| NAMES[place]).collect();
            let order = if is_reversed { " reversed" } else { "" };
            trials.push(Trial::test(format!("killed: {}{order}", victims.join(" ")), move || {
                killed(&victims, is_reversed);
                Ok(())
            }));
        }
    }
    trials
}

fn stopped_again() {
    let mut run = Run::armed(&[]);
    for _ in 0..100 {
        let work = run.blow();
        assert_eq!(run.tell("continue"), "false");
        run.rearm();
        assert_eq!(run.tell("is_blown"), "false");
        assert!(run.set_deadline(600_000).is_some());
        assert_eq!(run.tell("give"), "ok");
        assert!(run.terraform.is_stopped());
        assert_eq!(run.work(), work);
        assert_eq!(run.tell("continue"), "true");
        run.fork_spare();
        run.wait_until_it_works();
    }
    run.let_terraform_end();
    assert_eq!(run.tell("end"), "ok");
    assert!(run.fuse.is_dead() && run.spare.as_ref().unwrap().is_dead());
}

fn at_its_deadline() {
    let mut run = Run::start(&[]);
    assert_eq!(run.tell("arm"), "ok");
    let first = run.set_deadline(1000).unwrap();
    let second = run.set_deadline(1500).unwrap();
    assert!(second > first);
    // An earlier one changes nothing.
    assert_eq!(run.set_deadline(50), Some(second));
    run.wait_until_stopped();
    assert!(run.fuse.is_dead() && boot_clock::now() >= second);
    assert_eq!(run.tell("is_blown"), "true");
}

fn dead_before_it_runs() {
    for round in 0..100 {
        // The signal of an orphaned group that is stopped, SIGHUP, is ignored in half of the rounds.
        let mut run = Run::armed(if round % 2 == 0 { &["nohup"] } else { &[] });
        let work = run.blow();
        run.tf.kill();
        run.wait_until_killed();
        assert_eq!(run.work(), work, "round {round}");
    }
}

fn between_rearm_and_give() {
    for round in 0..50 {
        let mut run = Run::armed(&["nohup"]);
        let work = run.blow();
        run.rearm();
        if round % 2 == 0 {
            run.set_deadline(600_000);
        }
        run.tf.kill();
        run.wait_until_killed();
        assert_eq!(run.work(), work, "round {round}");
        // The guardian ends the new fuse.
        wait_for("the fuse to exit", || run.fuse.is_dead());
    }
}

fn after_give() {
    for round in 0..20 {
        let mut run = Run::armed(&["nohup"]);
        run.blow();
        run.rearm();
        run.set_deadline(600_000);
        // The fuse has not received the packet when `tf` dies, if it is stopped.
        if round % 2 == 0 {
            run.fuse.process.signal(Signal::SIGSTOP).unwrap();
        }
        assert_eq!(run.tell("give"), "ok");
        assert_eq!(run.tell("continue"), "true");
        run.wait_until_it_works();
        run.tf.kill();
        wait_for("tf to be dead", || run.tf.is_dead());
        run.wait_until_it_works();
        run.fuse.kill();
        run.wait_until_killed();
    }
}

fn killed_with_its_spare() {
    let mut run = Run::armed(&[]);
    for _ in 0..10 {
        if let Some(spare) = run.spare.take() {
            spare.kill();
            wait_for("the spare fuse to be dead", || spare.is_dead());
        }
        let work = run.blow();
        let pid = run.tell("rearm");
        run.fuse = Watched::new(&pid);
        assert_eq!((run.tell("give"), run.work()), ("ok".to_owned(), work));
        assert_eq!(run.tell("continue"), "true");
        run.wait_until_it_works();
    }
}

/// Returns the processes that have the write end of `pipe`, and those that have its read end.
fn holders(pipe: &str) -> [BTreeSet<i32>; 2] {
    let mut holders = [BTreeSet::new(), BTreeSet::new()];
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        for descriptor in fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten() {
            if fs::read_link(descriptor.path()).is_ok_and(|link| link.to_str() == Some(pipe)) {
                let information = entry.path().join("fdinfo").join(descriptor.file_name());
                let text = fs::read_to_string(information).unwrap_or_default();
                let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0").trim();
                let is_writer = i32::from_str_radix(flags, 8).unwrap() & libc::O_ACCMODE == libc::O_WRONLY;
                holders[usize::from(!is_writer)].insert(pid);
            }
        }
    }
    holders
}

fn where_the_write_ends_are() {
    write_ends(&["daemon"]);
    write_ends(&["daemon", "old-kernel"]);
}

fn write_ends(options: &[&str]) {
    let mut run = Run::start(options);
    // The watcher in terraform's group holds no end of a pipe.
    let _watcher = Watched::new(&run.tell("watcher"));
    let keeper = Watched::new(&run.tell("keeper"));
    let pipes = run.tell("pipes");
    let (stop, kill) = pipes.split_once(' ').unwrap();
    let daemon: i32 = fs::read_to_string(run.directory.path().join("daemon-pid")).unwrap().parse().unwrap();
    let set = |processes: &[&Watched]| processes.iter().map(|process| process.pid.as_raw()).collect::<BTreeSet<_>>();
    let readers = |run: &Run| {
        let mut readers = set(&[&run.tf, &run.guardian, &run.fuse, &run.terraform, &keeper]);
        readers.extend(run.spare.iter().map(|spare| spare.pid.as_raw()));
        readers.insert(daemon);
        readers
    };
    assert_eq!(holders(kill)[0], set(&[&run.fuse, &run.tf]));
    // A process that was just forked closes what it does not need after the fork has returned.
    wait_for("all to begin", || holders(kill)[1] == readers(&run));
    assert_eq!(holders(stop), [set(&[&run.fuse]), readers(&run)]);
    assert_eq!(run.tell("arm"), "ok");
    run.blow();
    run.rearm();
    assert_eq!(holders(kill), [set(&[&run.tf]), readers(&run)]);
    wait_for("the stop pipe to arrive", || holders(stop)[0] == set(&[&run.fuse]));
    assert_eq!(run.tell("give"), "ok");
    wait_for("the kill pipe to arrive", || holders(kill) == [set(&[&run.fuse, &run.tf]), readers(&run)]);
    assert_eq!(holders(stop), [set(&[&run.fuse]), readers(&run)]);
}

fn stopped_watcher() {
    let mut run = Run::start(&[]);
    let group = run.terraform.pid;
    let is_over = Arc::new(AtomicBool::new(false));
    let stops = std::thread::spawn({
        let is_over = is_over.clone();
        move || {
            while !is_over.load(Ordering::SeqCst) {
                let _ = nix::sys::signal::killpg(group, Signal::SIGSTOP);
            }
        }
    });
    // A watcher that is stopped after it has reported that it has joined does no harm.
    let until = Instant::now() + TIMEOUT;
    while run.tell("watcher") != "TimedOut" {
        assert!(Instant::now() < until, "no watcher was stopped while it joined");
    }
    is_over.store(true, Ordering::SeqCst);
    stops.join().unwrap();
    assert!(!Process::below(run.tf.pid).iter().any(|process| process.group == group && process.pid != group));
}

fn wait_until_daemon_works(run: &Run) {
    let before = run.counted("daemon");
    wait_for("the daemon to work", || run.counted("daemon") > before);
}

fn daemon_outlives() {
    for has_guardian_only in [false, true] {
        let mut run = Run::armed(&["daemon"]);
        wait_until_daemon_works(&run);
        if has_guardian_only {
            run.tf.kill();
            run.let_terraform_end();
        } else {
            run.let_terraform_end();
            assert_eq!(run.tell("end"), "ok");
            assert!(run.fuse.is_dead());
            run.tf.kill();
        }
        for process in [&run.tf, &run.fuse, &run.guardian] {
            wait_for("all of tf to be gone", || process.is_dead());
        }
        wait_until_daemon_works(&run);
    }
}

fn stopped_daemon_goes_on() {
    for is_rearmed in [false, true] {
        let mut run = Run::armed(&["daemon"]);
        wait_until_daemon_works(&run);
        run.blow();
        if is_rearmed {
            run.rearm();
        }
        run.terraform.kill();
        wait_for("terraform to be dead", || run.terraform.is_dead());
        let daemon = Watched::new(&fs::read_to_string(run.directory.path().join("daemon-pid")).unwrap());
        wait_for("the daemon to be stopped", || daemon.is_stopped());
        assert_eq!(run.tell("end"), "ok");
        wait_until_daemon_works(&run);
        run.fuse.kill();
        run.tf.kill();
        wait_for("tf to be dead", || run.tf.is_dead());
        wait_until_daemon_works(&run);
    }
}

fn suspended_group() {
    let mut run = Run::armed(&[]);
    for _ in 0..20 {
        nix::sys::signal::killpg(run.terraform.pid, Signal::SIGTSTP).unwrap();
        let work = run.wait_until_stopped();
        run.fuse.kill();
        wait_for("the fuse to be dead", || run.fuse.is_dead());
        assert_eq!(run.tell("continue"), "false");
        assert!(run.terraform.is_stopped());
        assert_eq!(run.work(), work);
        run.rearm();
        assert_eq!(run.tell("give"), "ok");
        assert_eq!(run.tell("continue"), "true");
        run.fork_spare();
        run.wait_until_it_works();
    }
    // The signal is SIGSTOP again, so this stops terraform and does not kill it.
    run.blow();
}

fn continued_while_it_lives() {
    let mut run = Run::armed(&[]);
    for _ in 0..20 {
        nix::sys::signal::killpg(run.terraform.pid, Signal::SIGTSTP).unwrap();
        run.wait_until_stopped();
        assert_eq!(run.tell("continue"), "true");
        run.wait_until_it_works();
    }
}

fn unarmed() {
    let mut run = Run::start(&[]);
    run.set_deadline(600_000);
    run.fuse.kill();
    wait_for("the fuse to be dead", || run.fuse.is_dead());
    assert_eq!(run.tell("is_blown"), "false");
    assert_eq!(run.tell("continue"), "true");
    run.wait_until_it_works();
    run.tf.kill();
    wait_for("tf to be dead", || run.tf.is_dead());
    run.wait_until_it_works();
}

fn armed_too_late() {
    let mut run = Run::start(&[]);
    run.fuse.kill();
    wait_for("the fuse to be dead", || run.fuse.is_dead());
    assert_ne!(run.tell("arm"), "ok");
    run.wait_until_it_works();
    run.tf.kill();
    wait_for("tf to be dead", || run.tf.is_dead());
    run.wait_until_it_works();
}

fn no_timer() {
    let mut run = Run::start_as(&[], Some("exec prlimit --sigpending=0 \"$@\""));
    assert_eq!(run.tell("arm"), "ok");
    assert_eq!(run.set_deadline(1), None);
    run.wait_until_it_works();
    run.let_terraform_end();
    assert_eq!(run.tell("end"), "ok");
    assert!(run.fuse.is_dead());
}

fn no_orphan() {
    for is_armed in [false, true] {
        let mut run = Run::start(&[]);
        if is_armed {
            assert_eq!(run.tell("arm"), "ok");
        }
        // With the guardian first, nobody ends the fuse.
        run.guardian.kill();
        wait_for("the guardian to be dead", || run.guardian.is_dead());
        run.tf.kill();
        wait_for("the fuse to exit", || run.fuse.is_dead());
        run.wait_until_it_works();
    }
}

/// The processes of which every subset is killed.
const NAMES: [&str; 4] = ["tf", "guardian", "keeper", "fuse"];

/// Kills `victims` in this order or the reversed one, and checks what becomes of terraform and of the others.
fn killed(victims: &[&str], is_reversed: bool) {
    let mut run = Run::start(&["nohup"]);
    assert_eq!(run.tell("arm"), "ok");
    run.set_deadline(2000);
    let keeper = Watched::new(&run.tell("keeper"));
    run.wait_until_it_works();
    let dies = |name: &str| victims.contains(&name);
    let begun = boot_clock::now();
    let mut order = victims.to_vec();
    if is_reversed {
        order.reverse();
    }
    for name in order {
        match name {
            "tf" => run.tf.kill(),
            "guardian" => run.guardian.kill(),
            "keeper" => keeper.kill(),
            _ => run.fuse.kill(),
        }
    }
    let all_gone = |run: &Run| {
        for process in [&run.fuse, &keeper] {
            wait_for("the fuse and the keeper to be gone", || process.is_dead());
        }
        if dies("tf") {
            wait_for("the guardian to be gone", || run.guardian.is_dead());
        }
    };
    match (dies("tf"), dies("keeper"), dies("fuse")) {
        // Killed at once.
        (true, _, true) => {
            run.wait_until_killed();
            all_gone(&run);
        }
        // Killed at the deadline.
        (true, true, false) => {
            run.wait_until_it_works();
            run.wait_until_killed();
            assert!(boot_clock::now() + 2 * BEAT >= begun + WORKING_TIME);
            all_gone(&run);
        }
        // Terraform works on until it ends.
        (true, false, false) => {
            wait_for("two leases to pass", || boot_clock::now() > begun + 2 * WORKING_TIME);
            run.wait_until_it_works();
            assert!(!run.fuse.is_dead());
            run.let_terraform_end();
            all_gone(&run);
        }
        // Stopped, at once or at the deadline.
        (false, ..) if dies("fuse") || dies("keeper") => {
            let work = run.wait_until_stopped();
            assert_eq!(run.tell("is_blown"), "true");
            run.rearm();
            assert_eq!((run.tell("give"), run.work()), ("ok".to_owned(), work));
            if dies("keeper") {
                run.set_deadline(600_000);
            }
            assert_eq!(run.tell("continue"), "true");
            run.wait_until_it_works();
            run.let_terraform_end();
            assert_eq!(run.tell("end"), "ok");
            all_gone(&run);
        }
        // Only the guardian: nothing changes.
        (false, ..) => {
            wait_for("two leases to pass", || boot_clock::now() > begun + 2 * WORKING_TIME);
            run.wait_until_it_works();
            run.let_terraform_end();
            assert_eq!(run.tell("end"), "ok");
            all_gone(&run);
        }
    }
}

fn frozen() {
    let cgroup = match cgroup::Cgroup::create(&format!("tf-fence-{}", std::process::id())) {
        Ok(cgroup) => cgroup,
        Err(reason) => return eprintln!("not tested: {reason}"),
    };
    let script = format!("{} && exec \"$@\"", cgroup.enter());
    for round in 0..30 {
        let mut run = Run::start_as(&["nohup"], Some(&script));
        assert_eq!(run.tell("arm"), "ok");
        let has_deadline = round % 10 < 2;
        run.set_deadline(if has_deadline { 2000 } else { 600_000 });
        cgroup.freeze(true);
        if !has_deadline {
            run.fuse.kill();
        }
        wait_for("the fuse to be dead", || run.fuse.is_dead());
        let work = run.work();
        // Without `tf`, it is killed instead.
        if round % 2 == 1 {
            run.tf.kill();
            wait_for("tf to be dead", || run.tf.is_dead());
        }
        cgroup.freeze(false);
        if round % 2 == 1 {
            run.wait_until_killed();
        } else {
            assert_eq!(run.wait_until_stopped(), work);
            assert_eq!(run.tell("is_blown"), "true");
        }
        assert_eq!(run.work(), work, "round {round}");
    }
}
