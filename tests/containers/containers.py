"""Runs tf in containers of real engines, and looks at its lock: tests/containers/run

Each test has a state of its own in a bucket and a table on loopback, and runs with each engine, or, if it is about
GitHub's recipe, with Docker. The names of the tests are the promises of README.md, docs/ci.md and docs/lease.md.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback

import yaml

sys.dont_write_bytecode = True
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "demo"))
import images
from cloud import Cloud, configuration, provisioner
from machine import ENGINES, ROOT, STATE_TIMEOUT, USER, Container, Engine, Failed, Machine, has_old_freezer, wait_until
from workflow import Workflow

APPLY = ["apply", "-auto-approve", "-no-color"]
PLAN = ["plan", "-no-color"]
REFUSED = "Error acquiring the state lock"
# The shortest lease that a release build accepts.
LEASE = {"TFW_LEASE": "1m", "TFW_CLOCK": "steady"}
# A lock can be taken 60 s after its last renewal, plus 10 s, plus a wait of at most 90 s. The rest is for a busy machine.
TAKEOVER_TIMEOUT = 300
WAITS = "touch began; while ! test -e go; do sleep 0.1; done"


def loopback_up():
    """Sets the loopback interface of the network namespace up. It is the only one there."""
    set_flags, up, running = 0x8914, 0x1, 0x40  # SIOCSIFFLAGS, IFF_UP, IFF_RUNNING (linux/sockios.h, linux/if.h)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, set_flags, struct.pack("16sh14x", b"lo", up | running))


class Report:
    """Prints the checks of a test together, because several tests run at once."""

    printing = threading.Lock()
    passed = failed = 0
    # Whether the machine of the engines is being removed, so that the tests fail.
    is_over = False

    def __init__(self, title):
        self.lines = [f"== {title}"]
        self.begun = time.monotonic()
        self.results = []

    def check(self, what, holds, state=""):
        """Records whether a promise holds. `state` says what was seen, or returns it; it is printed after a failure."""
        self.results.append(bool(holds))
        self.lines.append(("ok      " if holds else "FAILED  ") + what)
        if not holds:
            self.say(state() if callable(state) else state)

    def say(self, text):
        self.lines += ["        " + line for line in str(text).splitlines()]

    def end(self):
        with Report.printing:
            Report.passed += self.results.count(True)
            Report.failed += self.results.count(False)
            self.lines[0] += f" ({time.monotonic() - self.begun:.0f} s)"
            if not Report.is_over:
                print("\n".join(self.lines), flush=True)


class World:
    """What all tests share: the cloud, the machine of the engines, and the tf that is tested."""

    def __init__(self, cloud, port, machine, tf):
        self.cloud, self.port, self.machine, self.tf = cloud, port, machine, tf
        self.environment = {
            "CHECKPOINT_DISABLE": "1", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "NO_COLOR": "1",
        }


class Test:
    """One test with one engine: its state, its directories and its containers."""

    count = 0

    def __init__(self, world, engine, function):
        self.world, self.engine = world, engine
        self.name = function.__name__
        with Report.printing:
            Test.count += 1
            self.key = f"state-{Test.count}"
        self.report = Report(f"{engine.name}: {self.name.replace('_', ' ')}")
        self.check, self.say = self.report.check, self.report.say
        self.containers = []

    def directory(self, name):
        """An empty directory on the machine that belongs to the image's user."""
        path = self.world.machine.share / f"{self.key}-{name}"
        path.mkdir()
        os.chown(path, USER, USER)
        return path

    def work(self, name="work", command=WAITS):
        """A working directory of the test's state, initialised in a container."""
        path = self.directory(name)
        (path / "main.tf").write_text(configuration(self.key, provisioner(command)))
        init = self.start(path, ["init", "-no-color"])
        if init.wait() != 0:
            raise Failed(f"init: {init.story()}")
        init.remove()
        return path

    def start(self, work, arguments, **more):
        environment = {**self.world.environment, **more.pop("environment", {})}
        image = "tf-with-terraform" if self.engine.is_docker else "localhost/tf-with-terraform"
        container = Container(self.engine, image, arguments, work, environment=environment, **more)
        self.containers.append(container)
        return container

    def began(self, container, work):
        """Waits until terraform applies, and checks that it has the lock."""
        wait_until("the provisioner", (work / "began").exists, container.story)
        self.ids = [info["ID"] for _, info in self.locks()]
        self.check("the state is locked while terraform applies", len(self.ids) == 2, self.locks_text)

    def renewed(self, key=None):
        """Waits for the first renewal of the lease on the lock of this state, or of the test's."""
        def item():
            key_of_item = {"LockID": {"S": f"bucket/{key or self.key}"}}
            request = {"TableName": "locks", "Key": key_of_item, "ConsistentRead": True}
            return self.world.cloud.dynamodb("GetItem", request)["Item"]

        wait_until("the first renewal", lambda: "tf" in item(), lambda: json.dumps(item(), indent=1))

    def is_same_lock(self):
        return [info["ID"] for _, info in self.locks()] == self.ids

    def locks(self):
        """Both parts of the lock, in the table and in the bucket."""
        return list(self.world.cloud.locks(self.key))

    def locks_text(self):
        return json.dumps(self.locks(), indent=1)

    def state(self):
        status, body = self.world.cloud.ask("GET", f"/bucket/{self.key}")
        return body.decode() if status == 200 else None

    def is_free(self, container, what="no lock is left"):
        self.check(what, not self.locks(), lambda: f"{self.locks_text()}\n{container.story()}")

    def stays(self, container, what):
        self.check(what, self.is_same_lock(), lambda: f"{self.locks_text()}\n{container.story()}")

    def is_refused(self, container, what):
        """Waits for a run that the lock has to refuse, and checks that the lock is the same as before."""
        code = container.wait(TAKEOVER_TIMEOUT)
        err = container.text()[1]
        self.check(what, code == 1 and REFUSED in err and "released the lock" not in err and self.is_same_lock(), container.story)
        self.messages(container)

    def messages(self, container):
        self.say("\n".join(line for line in container.text()[1].splitlines() if line.startswith("tf:")))

    def lease(self):
        """What `tf locks` says of the lease of the lock, in a container of its own."""
        work = self.world.machine.share / f"{self.key}-other"
        asked = self.start(work, ["locks", "list", "--json"], environment=LEASE, options=["--hostname", "looks"])
        asked.wait()
        out, _ = asked.text()
        asked.remove()
        return out

    def until_lapsed(self):
        """Waits until the lease has lapsed, as `tf locks` sees it from another container."""
        seen = [""]

        def lapsed():
            seen[0] = self.lease()
            return '"lapsed"' in seen[0]

        wait_until("the end of the lease", lapsed, lambda: seen[0], TAKEOVER_TIMEOUT, 2)

    def releases_first(self, run, what):
        """Checks that a run has released the lock before terraform printed anything."""
        code = run.wait(TAKEOVER_TIMEOUT)
        lines = run.lines()
        released = [moment for moment, kind, line in lines if kind == "err" and "released the lock" in line]
        started = [moment for moment, kind, line in lines if kind == "out"]
        self.check(what, code == 0 and released and started and released[0] <= started[0], run.story)
        self.messages(run)

    def end(self):
        for container in self.containers:
            container.remove()


# The tests.

def a_container_promises_to_stop_terraform_in_time(test):
    work = test.work()

    def check(what, grade, options=()):
        doctor = test.start(work, ["locks", "doctor"], environment=LEASE, options=options)
        doctor.wait()
        out, _ = doctor.text()
        test.check(what, grade in out, doctor.story)
        test.say("\n".join(line for line in out.splitlines() if "grade" in line))

    check("so says tf locks doctor, with TFW_LEASE=1m and TFW_CLOCK=steady", "grade stop")
    if has_old_freezer():
        test.say("this machine has the freezer of cgroup v1 too, so the containers are in its cgroup namespace")
        check("in a cgroup namespace of its own, it makes no promise", "grade none", ["--cgroupns", "private"])


def an_image_of_our_dockerfile_runs_terraform(test):
    look = "id -u >user; tr '\\0' ' ' </proc/1/cmdline >first; grep CapEff /proc/1/status >capabilities"
    work = test.work(command=f"{look}; touch /file 2>/dev/null || touch read-only")
    run = test.start(work, [*PLAN, "-detailed-exitcode"])
    test.check("plan -detailed-exitcode ends with terraform's 2", run.wait() == 2, run.story)
    run = test.start(work, APPLY, options=["--read-only", "--tmpfs", "/tmp"])
    code = run.wait()
    test.check("apply completes, with 0", code == 0 and "Resources: 1 added" in run.text()[0], run.story)
    test.check("tf prints nothing in it", run.text()[1] == "", run.story)
    found = {path.name: path.read_text().strip() for path in work.iterdir() if path.is_file()}
    test.check(f"the user is {USER}, without a capability",
               (found.get("user"), found.get("capabilities", "").split()[-1:]) == (str(USER), ["0" * 16]), found)
    test.check("tf is process 1", found.get("first", "").startswith("/usr/bin/tf apply"), found)
    test.check("the root is read-only", "read-only" in found, run.story)
    test.is_free(run)


def a_stop_is_one_interrupt_and_the_lock_is_released(test):
    apply = "tf apply -auto-approve -no-color"
    for what, more in {
        "tf as process 1": {"arguments": APPLY},
        "tf as process 1, read-only root": {"arguments": APPLY, "options": ["--read-only", "--tmpfs", "/tmp"]},
        "--init": {"arguments": APPLY, "options": ["--init"]},
        "sh -c 'exec tf'": {"arguments": ["-c", f"exec {apply}"], "entrypoint": "/bin/sh"},
    }.items():
        work = test.work(what.replace(" ", "-").replace("'", ""))
        run = test.start(work, **more)
        test.began(run, work)
        begun = time.monotonic()
        test.engine.do("stop", "--time", "30", run.name)
        took = time.monotonic() - begun
        out, err = run.text()
        once = (out + err).count("Interrupt received.") == 1 and "Two interrupts" not in out + err
        test.check(f"{what}: one interrupt, terraform's own exit code 1, after {took:.1f} s", once and run.wait() == 1, run.story)
        test.is_free(run, f"{what}: no lock is left")


def with_a_shell_in_front_of_tf_a_stop_kills_and_the_lock_stays(test):
    work = test.work()
    run = test.start(work, ["-c", "tf apply -auto-approve -no-color; true"], entrypoint="/bin/sh")
    test.began(run, work)
    test.engine.do("stop", "--time", "2", run.name)
    code = run.wait()
    test.check("the shell as process 1 ignores the TERM, and the container is killed", code == 137, run.story)
    test.stays(run, "the lock stays, as docs/ci.md says: use exec")


def a_term_and_an_int_are_one_interrupt(test):
    work = test.work()
    run = test.start(work, APPLY)
    test.began(run, work)
    first = run.first_process()
    os.kill(first, signal.SIGTERM)
    os.kill(first, signal.SIGINT)
    code = run.wait()
    text = "".join(run.text())
    test.check("one interrupt", text.count("Interrupt received.") == 1 and "Two interrupts" not in text, run.story)
    test.check("terraform's own exit code, 1", code == 1, run.story)
    test.is_free(run)


def a_terraform_that_does_not_stop_is_killed_at_the_stop_timeout(test):
    work = test.work()
    run = test.start(work, APPLY, environment={"TFW_STOP_TIMEOUT": "2s"})
    test.began(run, work)
    # It cannot stop, because it does not run.
    os.kill(run.terraform(), signal.SIGSTOP)
    test.engine.do("stop", "--time", "60", run.name)
    test.check("it is killed, and tf says why", "TFW_STOP_TIMEOUT" in run.text()[1], run.story)
    test.is_free(run)


def a_stop_kills_a_terraform_that_does_not_end_in_time_and_the_lock_stays(test):
    work = test.work()
    run = test.start(work, APPLY)
    test.began(run, work)
    # It cannot stop, because it does not run.
    os.kill(run.terraform(), signal.SIGSTOP)
    test.engine.do("stop", "--time", "2", run.name)
    test.check("the engine kills the container", run.wait() == 137, run.story)
    test.stays(run, "the lock stays, as docs/ci.md says: set TFW_STOP_TIMEOUT")


def a_killed_terraform_leaves_no_lock(test):
    work = test.work()
    # Nothing in the container can be written but its working directory, so there is no journal either.
    read_only = ["--read-only"] if test.engine.is_docker else ["--read-only", "--read-only-tmpfs=false"]
    run = test.start(work, APPLY, options=read_only)
    test.began(run, work)
    os.kill(run.terraform(), signal.SIGKILL)
    code = run.wait()
    test.check("tf ends with 137, and says that it has released the lock",
               code == 137 and "released the lock" in run.text()[1], run.story)
    test.is_free(run)
    test.messages(run)


def out_of_memory(test):
    """The kernel's OOM killer ends terraform, in a control group of 400 MB around the whole container."""
    work = test.work(command="touch began; while ! test -e go; do sleep 0.1; done; x=x; while :; do x=$x$x; done")
    old = pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    options = ["--memory", "400m"] if not old.exists() else []
    run = test.start(work, APPLY, options=options)
    test.began(run, work)
    if old.exists():
        group = old.parent / test.world.machine.group / test.key
        group.mkdir(parents=True)
        (group / "memory.limit_in_bytes").write_text("400000000")

        def moved():
            inside = set(map(int, (group / "cgroup.procs").read_text().split()))
            outside = set(run.processes()) - inside
            for pid in outside:
                # The shell runs `sleep` again and again.
                with contextlib.suppress(ProcessLookupError):
                    (group / "cgroup.procs").write_text(str(pid))
            return not outside

        wait_until("all processes in the group", moved, run.story)
        test.say("the memory controller is that of cgroup v1, which these engines do not use, so the test has made the group")
    # The kernel would otherwise end the shell that takes the memory.
    terraform = run.terraform()
    pathlib.Path(f"/proc/{terraform}/oom_score_adj").write_text("1000")
    (work / "go").touch()
    code = run.wait()
    if old.exists():
        events = (group / "memory.oom_control").read_text()
        test.check("the kernel's OOM killer has acted", "oom_kill 0" not in events and "oom_kill " in events, events)
    err = run.text()[1]
    test.check("terraform is killed, and tf says so", code == 137 and "terraform was killed by SIGKILL" in err, run.story)
    test.is_free(run)
    test.messages(run)


def a_killed_tf_leaves_no_lock_as_long_as_its_container_runs(test):
    work = test.work()
    script = "tf apply -auto-approve -no-color; while ! test -e end; do sleep 0.1; done"
    run = test.start(work, ["-c", script], entrypoint="/bin/sh")
    test.began(run, work)
    shell = run.first_process()
    os.kill(int(pathlib.Path(f"/proc/{shell}/task/{shell}/children").read_text()), signal.SIGKILL)
    # The guardian has terraform stop, which releases the lock itself, or the guardian releases it.
    wait_until("the end of terraform", lambda: "terraform" not in run.processes().values(), run.story)
    wait_until("the release of the lock", lambda: not test.locks(), test.locks_text)
    test.check("terraform ends, and no lock is left", True)
    (work / "end").touch()
    run.wait()


def a_killed_tf_that_is_the_command_of_its_container_leaves_its_lock(test):
    work = test.work()
    run = test.start(work, APPLY, options=["--init"])
    test.began(run, work)
    init = run.first_process()
    os.kill(int(pathlib.Path(f"/proc/{init}/task/{init}/children").read_text()), signal.SIGKILL)
    test.check("the container ends with tf, and its guardian with it", run.wait() == 137, run.story)
    test.stays(run, "the lock stays, as after a kill of the container")


def what_a_killed_container_leaves_is_released_by_the_next_tf_on_the_host(test):
    machine_id = pathlib.Path("/etc/machine-id")
    if not machine_id.exists():
        test.say("left out: this machine has no /etc/machine-id")
        return
    work, volume = test.work(), test.directory("volume")
    copy = test.world.machine.share / f"{test.key}-id"
    shutil.copy(machine_id, copy)
    # Only root can see in which container a process of root is, so this run belongs to root.
    os.chown(volume, 0, 0)
    run = test.start(work, APPLY, options=["--user", "0:0"], environment={"TFW_STATE_DIR": "/state"},
                     volumes=[(volume, "/state", "rw"), (copy, "/etc/machine-id", "ro")])
    test.began(run, work)
    run.do("kill")
    test.check("everything in the container is killed", run.wait() == 137, run.story)
    test.stays(run, "the lock stays")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(volume), "TFW_STATE_DIR": str(volume), **test.world.environment}
    said = [""]

    def is_recovered():
        recover = subprocess.run([test.world.tf, "locks", "recover"], env=environment, cwd="/", stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=STATE_TIMEOUT)
        said[0] = f"exit code {recover.returncode}\n{recover.stdout}"
        # A container of another test may have got the number of the old pid namespace. Then tf cannot tell its processes
        # from those of the run, and says so.
        return recover.returncode != 2 or "may belong to that run" not in recover.stdout

    wait_until("the end of the containers with the old number", is_recovered, lambda: said[0], TAKEOVER_TIMEOUT, 1)
    test.check("`tf locks recover` on the host, with the container's state directory, releases it",
               said[0].startswith("exit code 0\n") and "released the lock" in said[0] and not test.locks(),
               lambda: f"{said[0]}{test.locks_text()}")
    test.say(said[0])


def without_a_lease_another_container_with_the_same_volume_recovers_nothing(test):
    work, other, volume = test.work(), test.work("other"), test.directory("volume")
    # Each run notes the number of its pid namespace (pid_namespaces(7)).
    more = {"volumes": [(volume, "/home/tf", "rw")], "entrypoint": "/bin/sh"}
    noted = "readlink /proc/self/ns/pid >namespace && exec tf"
    run = test.start(work, ["-c", " ".join([noted, *APPLY])], **more)
    test.began(run, work)
    old = (work / "namespace").read_text()
    run.do("kill")
    run.wait()
    # It takes the number of the pid namespace that is free now.
    test.start(other, ["-c", "while ! test -e go; do sleep 0.1; done"], entrypoint="/bin/sh")
    again = test.start(other, ["-c", " ".join([noted, *PLAN])], **more)
    if is_recovered_by(test, again, "another container", old, other / "namespace"):
        return
    # In case that its lock does not refuse it.
    (work / "go").touch()
    run.do("start")
    is_recovered_by(test, run, "the same container, started again,", old, work / "namespace")


def is_recovered_by(test, run, what, old, noted):
    """Checks that a run is refused. Only if its pid namespace, which it has `noted`, has the number `old` of the dead run,
    it may have released the lock: the exception in README.md. Namespaces come and go on this machine, so it cannot be
    avoided. Returns whether it has."""
    code = run.wait(TAKEOVER_TIMEOUT)
    if noted.read_text() == old and code == 0 and "released the lock that an earlier run left" in run.text()[1]:
        test.is_free(run, f"{what} has the number of the old pid namespace, and releases the lock")
        test.messages(run)
        return True
    test.is_refused(run, f"{what} is refused, and the lock stays")
    return False


def containers_that_share_a_pid_namespace_and_a_volume_recover_each_other(test):
    work, other, volume = test.work(), test.work("other"), test.directory("volume")
    more = {"volumes": [(volume, "/home/tf", "rw")], "options": ["--pid", "host"]}
    run = test.start(work, APPLY, **more)
    test.began(run, work)
    # Nothing of the run may release the lock before it is dead.
    for pid in stopped_processes(run.first_process()):
        os.kill(pid, signal.SIGKILL)
    run.wait()
    test.stays(run, "the lock stays when everything of the run is killed")
    again = test.start(other, PLAN, **more)
    test.releases_first(again, "the next tf releases the lock at once, before terraform starts")
    test.is_free(again)


def stopped_processes(first):
    """Stops a process and everything that it has started, so that nothing acts meanwhile, and returns them, the youngest
    first."""
    found = [first]
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found[::-1]


def bare_terraform_leaves_the_lock_of_a_killed_container(test):
    """What tf is compared with."""
    work, other = test.work(), test.work("other")
    run = test.start(work, APPLY, entrypoint="/usr/bin/terraform")
    test.began(run, work)
    run.do("kill")
    run.wait()
    test.stays(run, "the lock of bare terraform stays")
    again = test.start(other, PLAN, entrypoint="/usr/bin/terraform")
    test.is_refused(again, "the plan of bare terraform in the next container is refused")


def what_a_killed_container_leaves_is_gone_after_one_lease_by_any_other_container(test):
    work, other = test.work(), test.work("other")
    run = test.start(work, APPLY, environment=LEASE, options=["--hostname", "gone"])
    test.began(run, work)
    test.renewed()
    run.do("kill")
    killed = time.monotonic()
    test.check("everything in the container is killed", run.wait() == 137, run.story)
    test.stays(run, "the lock stays")
    early = test.start(other, PLAN, environment=LEASE, options=["--hostname", "other"])
    test.is_refused(early, "before the lease has lapsed, another container is refused")
    test.until_lapsed()
    bare = test.start(other, PLAN, entrypoint="/usr/bin/terraform")
    test.is_refused(bare, "when it has lapsed, bare terraform is still refused")
    run = test.start(other, PLAN, environment=LEASE, options=["--hostname", "other"])
    test.releases_first(run, "then a plan in another container releases the lock before terraform starts")
    test.say(f"{time.monotonic() - killed:.0f} s after the kill")
    test.is_free(run)


def a_container_that_is_started_again_after_a_kill_goes_on_after_one_lease_at_the_latest(test):
    work, volume = test.work(), test.directory("volume")
    run = test.start(work, [*APPLY, "-lock-timeout=5m"], environment=LEASE, volumes=[(volume, "/home/tf", "rw")])
    test.began(run, work)
    test.renewed()
    run.do("kill")
    run.wait()
    test.stays(run, "the lock stays")
    (work / "go").touch()
    run.do("start")
    code = run.wait(TAKEOVER_TIMEOUT)
    out, err = run.text()
    test.check("it waits for the lock, releases it, and applies", code == 0 and "released the lock" in err
               and "Apply complete!" in out, run.story)
    test.is_free(run)
    test.messages(run)


def a_pause_that_is_shorter_than_the_lease_changes_nothing(test):
    work, other = test.work(), test.work("other")
    run = test.start(work, APPLY, environment=LEASE)
    test.began(run, work)
    test.renewed()
    run.do("pause")
    begun = time.monotonic()
    refused = test.start(other, PLAN, environment=LEASE, options=["--hostname", "other"])
    test.is_refused(refused, "while it is paused, another container is refused")
    # A renewal comes every 12 s, and terraform is stopped 48 s after the last one. This delay is what is tested: 40 %.
    time.sleep(max(0, begun + 24 - time.monotonic()))
    run.do("unpause")
    test.say(f"paused for {time.monotonic() - begun:.0f} s")
    (work / "go").touch()
    code = run.wait()
    test.check("then terraform goes on, and the apply completes", code == 0 and "Apply complete!" in run.text()[0], run.story)
    test.is_free(run)
    test.messages(run)


def a_pause_that_is_longer_than_the_lease_keeps_a_lock_that_nobody_takes(test):
    work, _ = test.work(), test.work("other")
    run = test.start(work, APPLY, environment=LEASE)
    test.began(run, work)
    test.renewed()
    run.do("pause")
    test.until_lapsed()
    test.stays(run, "when the lease has lapsed, the lock is still there")
    (work / "go").touch()
    run.do("unpause")
    code = run.wait()
    test.check("then terraform goes on where it stopped, and the apply completes",
               code == 0 and "Apply complete!" in run.text()[0], run.story)
    test.is_free(run)
    test.messages(run)


def a_paused_container_writes_nothing_after_its_lock_was_taken(test):
    work, other = test.work(), test.work("other")
    run = test.start(work, APPLY, environment=LEASE)
    test.began(run, work)
    test.renewed()
    before = test.state()
    run.do("pause")
    test.until_lapsed()
    taker = test.start(other, [*APPLY, "-lock-timeout=5m"], environment=LEASE, options=["--hostname", "other"])
    wait_until("the provisioner of the other container", (other / "began").exists, taker.story, TAKEOVER_TIMEOUT)
    test.check("the other container has released the lock", "released the lock" in taker.text()[1], taker.story)
    test.messages(taker)
    test.ids = [info["ID"] for _, info in test.locks()]
    (work / "go").touch()
    run.do("unpause")
    code = run.wait()
    test.check("terraform is killed, and tf says that another run has the lock",
               code == 137 and "the lock is held by another run now" in run.text()[1], run.story)
    test.messages(run)
    test.check("it has written no state", test.state() == before, test.state)
    test.check("the lock of the other container is the same as before",
               test.is_same_lock() and len(test.ids) == 2, test.locks_text)
    (other / "go").touch()
    test.check("the other container completes its apply", taker.wait() == 0, taker.story)
    test.is_free(taker)


class Job:
    """Our Job for Kubernetes, run by `podman kube play`: shell/ci/kubernetes/job.yaml, with an image, a bucket, credentials
    and a provisioner of this test. The limits are left out, because this machine may have no cgroup v2 with them.
    `environment` replaces variables of the file, `options` are more of apply's, and `state` is another Job's name
    whose state it applies."""

    def __init__(self, test, what, environment=None, options=(), state=None):
        self.test, self.key = test, f"{test.key}-{state or what}"
        self.name = f"{test.key}-{what}"
        self.file = test.world.machine.share / f"{self.name}.yaml"
        account, settings, job = yaml.safe_load_all((ROOT / "shell/ci/kubernetes/job.yaml").read_text())
        settings["data"]["main.tf"] = configuration(self.key, provisioner(WAITS))
        settings["metadata"]["name"] = f"{self.name}-configuration"
        job["metadata"]["name"] = self.name
        pod = job["spec"]["template"]["spec"]
        self.grace = pod["terminationGracePeriodSeconds"]
        for volume in pod["volumes"]:
            if "configMap" in volume:
                volume["configMap"]["name"] = settings["metadata"]["name"]
            # Podman gives the emptyDir of every pod its name in the file, so that two pods would share it.
            volume["name"] = f"{self.name}-{volume['name']}"
        replaced = {**test.world.environment, **(environment or {})}
        variables = [{"name": name, "value": value} for name, value in replaced.items()]
        pod["containers"][0]["command"] += options
        for container in [*pod["initContainers"], *pod["containers"]]:
            del container["resources"]
            mounts = [{**mount, "name": f"{self.name}-{mount['name']}"} for mount in container["volumeMounts"]]
            kept = [variable for variable in container["env"] if variable["name"] not in replaced]
            container.update(image="localhost/tf-with-terraform", env=[*kept, *variables], volumeMounts=mounts)
        self.file.write_text(yaml.safe_dump_all([account, settings, job]))
        test.engine.do("kube", "play", "--network", "host", f"/share/{self.file.name}")
        self.container = Container.existing(test.engine, f"{self.name}-pod-{pod['containers'][0]['name']}")
        wait_until("the lock of the Job", self.locks, self.container.story)

    def locks(self):
        return list(self.test.world.cloud.locks(self.key))

    def began(self):
        wait_until("the provisioner", lambda: self.inside("test -e began"), self.container.story)

    def inside(self, script):
        return self.test.engine.do("exec", self.container.name, "/bin/sh", "-c", script, check=False)[0] == 0

    def down(self):
        self.test.engine.do("kube", "down", "--force", f"/share/{self.file.name}", check=False)


def our_job_for_kubernetes_releases_its_lock_when_its_pod_is_stopped(test):
    if test.engine.is_docker:
        test.say("Docker does not run pods")
        return
    job = Job(test, "completes")
    try:
        job.began()
        job.inside(": >go")
        test.check("the Job completes", job.container.wait() == 0, job.container.story)
        test.check("no lock is left", not job.locks(), job.container.story)
    finally:
        job.down()

    job = Job(test, "is-stopped")
    try:
        job.began()
        seconds = test.engine.inspect(job.container.name, ".Config.StopTimeout")
        test.check("the engine waits as long as the file says", seconds == str(job.grace), seconds)
        begun = time.monotonic()
        job.container.do("stop")
        took = time.monotonic() - begun
        code, text = job.container.wait(), "".join(job.container.text())
        once = text.count("Interrupt received.") == 1 and "Two interrupts" not in text
        test.check(f"one interrupt, terraform's own exit code 1, after {took:.1f} s", code == 1 and once, job.container.story)
        test.check("no lock is left", not job.locks(), job.container.story)
    finally:
        job.down()


def our_job_for_kubernetes_whose_pod_is_killed_leaves_its_lock_to_the_next_one(test):
    """The pod is killed at the end of its grace period, because terraform has not stopped by then."""
    if test.engine.is_docker:
        test.say("Docker does not run pods")
        return
    job = Job(test, "is-killed", LEASE)
    try:
        job.began()
        test.renewed(job.key)
        ids = [info["ID"] for _, info in job.locks()]
        # It cannot stop, because it does not run. TFW_STOP_TIMEOUT would let it be killed in time.
        os.kill(job.container.terraform(), signal.SIGSTOP)
        job.container.do("stop", "--time", "2")
        test.check("everything in the pod is killed", job.container.wait() == 137, job.container.story)
        test.check("the lock stays", ids and [info["ID"] for _, info in job.locks()] == ids, job.locks)
        following = Job(test, "follows", LEASE, ["-lock-timeout=5m"], state="is-killed")
        try:
            wait_until("the provisioner", lambda: following.inside("test -e began"), following.container.story, TAKEOVER_TIMEOUT)
            test.check("the next Job has another lock", [info["ID"] for _, info in job.locks()] != ids, job.locks)
            following.inside(": >go")
            code, (out, err) = following.container.wait(), following.container.text()
            test.check("it released the lock, and completes", code == 0 and "released the lock" in out + err,
                       following.container.story)
            test.check("no lock is left", not job.locks(), following.container.story)
        finally:
            following.down()
    finally:
        job.down()


def with_docker(function):
    """Marks a test that runs with Docker alone, because act knows no other engine."""
    function.needs_docker = True
    return function


@with_docker
def our_workflow_for_github_applies_and_leaves_no_lock(test):
    workflow = Workflow(test, "production")
    container = workflow.began()
    test.check("tf and terraform run in a container of the engine",
               {"tf", "terraform"} <= set(container.processes().values()), container.processes)
    workflow.go()
    code, text = workflow.wait(), workflow.text()[1]
    test.check("both jobs succeed, and the last step runs",
               code == 0 and "Resources: 1 added" in text and workflow.last_step_ran(), workflow.story)
    test.check("the state is saved", test.state(), workflow.story)
    test.is_free(workflow)


def runs_on(test, workflow, number):
    """Sends a signal to act while terraform applies, and checks that terraform runs on and has its lock: act does not end
    the `docker exec` of the step. Returns the container of the job, and terraform's pid."""
    container = workflow.began()
    terraform = container.terraform()
    workflow.act.send_signal(number)
    # A KILL leaves it no exit code.
    expected = -number if number == signal.SIGKILL else 1
    test.check(f"after {number.name}, act ends, and its job fails", workflow.wait() == expected, workflow.story)
    test.check("its last step runs after SIGINT, and not after another signal",
               workflow.last_step_ran() == (number == signal.SIGINT), workflow.story)
    test.check("terraform is running nevertheless", container.terraform() == terraform, container.processes)
    test.stays(workflow, "its lock stays")
    return container, terraform


def is_refused_elsewhere(test, other):
    again = test.start(other, PLAN, environment=LEASE, options=["--hostname", "other"])
    test.is_refused(again, "a run in another container is refused")


@with_docker
def a_workflow_whose_act_is_killed_keeps_its_lock_until_terraform_completes(test):
    other = test.work("other")
    workflow = Workflow(test, "staging")
    runs_on(test, workflow, signal.SIGKILL)
    is_refused_elsewhere(test, other)
    workflow.go()
    wait_until("the release of the lock", lambda: not test.locks(), test.locks_text)
    test.check("terraform completes, its state is saved, and no lock is left", test.state(), test.state)


@with_docker
def a_workflow_whose_act_is_terminated_keeps_its_lock_until_terraform_is_killed(test):
    other = test.work("other")
    workflow = Workflow(test, "production")
    _, terraform = runs_on(test, workflow, signal.SIGTERM)
    is_refused_elsewhere(test, other)
    os.kill(terraform, signal.SIGKILL)
    wait_until("the release of the lock", lambda: not test.locks(), test.locks_text)
    test.check("when terraform is killed, tf, which is still running in the container, releases the lock", True)


@with_docker
def a_workflow_whose_step_times_out_keeps_its_lock_until_terraform_completes(test):
    other = test.work("other")
    workflow = Workflow(test, "production", timeout=1)
    container = workflow.began()
    terraform = container.terraform()
    test.check("after the timeout, act ends, and its job fails", workflow.wait(TAKEOVER_TIMEOUT) == 1, workflow.story)
    test.check("terraform is running nevertheless", container.terraform() == terraform, container.processes)
    test.stays(workflow, "its lock stays")
    is_refused_elsewhere(test, other)
    workflow.go()
    wait_until("the release of the lock", lambda: not test.locks(), test.locks_text)
    test.check("terraform completes, its state is saved, and no lock is left", test.state(), test.state)


def is_released_by_the_next(test, workflow):
    """Checks that the next run of a workflow releases the lock when the lease has lapsed."""
    test.until_lapsed()
    workflow.go()
    workflow.start()
    code, text = workflow.wait(TAKEOVER_TIMEOUT), workflow.text()[1]
    test.check("when it has lapsed, the next run releases the lock, and completes",
               code == 0 and "released the lock" in text and "Resources: 1 added" in text, workflow.story)
    test.messages(workflow)
    test.is_free(workflow)


@with_docker
def what_a_workflow_leaves_whose_container_is_killed_is_released_by_the_next_run_after_one_lease(test):
    test.work("other")
    workflow = Workflow(test, "production")
    container = workflow.began()
    test.renewed()
    container.do("kill")
    killed = time.monotonic()
    test.check("the job fails", workflow.wait() == 1, workflow.story)
    test.stays(workflow, "the lock stays")
    is_released_by_the_next(test, workflow)
    test.say(f"{time.monotonic() - killed:.0f} s after the kill")


@with_docker
def what_a_cancelled_workflow_leaves_is_released_after_one_lease_by_a_run_that_follows(test):
    """The next run removes the container of the cancelled one, because act gives it the same name."""
    test.work("other")
    workflow = Workflow(test, "staging")
    container, _ = runs_on(test, workflow, signal.SIGINT)
    test.renewed()
    workflow.start()
    test.is_refused(workflow, "before the lease has lapsed, the next run is refused")
    test.check("act has removed the container of the cancelled run",
               workflow.container().name != container.name, workflow.story)
    is_released_by_the_next(test, workflow)


@with_docker
def bare_terraform_leaves_the_lock_of_a_cancelled_workflow(test):
    """What tf is compared with."""
    workflow = Workflow(test, "production", bare=True)
    container, _ = runs_on(test, workflow, signal.SIGINT)
    workflow.start()
    test.is_refused(workflow, "the next run of bare terraform is refused")
    test.check("act has removed the container of the cancelled run",
               workflow.container().name != container.name, workflow.story)
    workflow.start()
    test.is_refused(workflow, "the run after it is refused too, although terraform is gone")


# The longest ones first.
TESTS = [
    a_paused_container_writes_nothing_after_its_lock_was_taken,
    what_a_killed_container_leaves_is_gone_after_one_lease_by_any_other_container,
    our_job_for_kubernetes_whose_pod_is_killed_leaves_its_lock_to_the_next_one,
    what_a_cancelled_workflow_leaves_is_released_after_one_lease_by_a_run_that_follows,
    what_a_workflow_leaves_whose_container_is_killed_is_released_by_the_next_run_after_one_lease,
    a_container_that_is_started_again_after_a_kill_goes_on_after_one_lease_at_the_latest,
    a_pause_that_is_longer_than_the_lease_keeps_a_lock_that_nobody_takes,
    a_stop_is_one_interrupt_and_the_lock_is_released,
    our_job_for_kubernetes_releases_its_lock_when_its_pod_is_stopped,
    a_pause_that_is_shorter_than_the_lease_changes_nothing,
    what_a_killed_container_leaves_is_released_by_the_next_tf_on_the_host,
    without_a_lease_another_container_with_the_same_volume_recovers_nothing,
    containers_that_share_a_pid_namespace_and_a_volume_recover_each_other,
    a_container_promises_to_stop_terraform_in_time,
    a_workflow_whose_step_times_out_keeps_its_lock_until_terraform_completes,
    a_workflow_whose_act_is_killed_keeps_its_lock_until_terraform_completes,
    a_workflow_whose_act_is_terminated_keeps_its_lock_until_terraform_is_killed,
    bare_terraform_leaves_the_lock_of_a_cancelled_workflow,
    our_workflow_for_github_applies_and_leaves_no_lock,
    an_image_of_our_dockerfile_runs_terraform,
    with_a_shell_in_front_of_tf_a_stop_kills_and_the_lock_stays,
    a_term_and_an_int_are_one_interrupt,
    a_terraform_that_does_not_stop_is_killed_at_the_stop_timeout,
    a_stop_kills_a_terraform_that_does_not_end_in_time_and_the_lock_stays,
    a_killed_terraform_leaves_no_lock,
    a_killed_tf_leaves_no_lock_as_long_as_its_container_runs,
    a_killed_tf_that_is_the_command_of_its_container_leaves_its_lock,
    out_of_memory,
    bare_terraform_leaves_the_lock_of_a_killed_container,
]


def builds(world, engines):
    """Builds the images with both programs at once, and compares them."""
    report = Report("our Dockerfile, built by Docker and by buildah")
    compiler = images.lay_out(world.machine, world.tf, shutil.which("terraform"))
    report.say(f"the compile step is replaced by a ready binary, because {compiler} and the crates need a network")
    pool = concurrent.futures.ThreadPoolExecutor()
    try:
        built = [pool.submit(build, world.machine, compiler) for build in (images.with_docker, images.with_buildah)]
        for what, future in zip(("docker build", "buildah build"), built):
            failure = future.exception()
            report.check(f"{what} builds the image", failure is None, failure)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if all(future.exception() is None for future in built):
        expected = (f"{USER}:{USER}", ["/usr/bin/tf"], ["HOME=/home/tf", "PATH=/usr/bin"], "/work")
        for program, image in (("docker", "tf"), ("podman", "localhost/tf")):
            found = images.settings(world.machine, program, image)
            report.check(f"the image of {program} has the user, entrypoint, environment and directory of the Dockerfile",
                         found == expected, found)
        first, second = images.files(world.machine, "docker", "tf"), images.files(world.machine, "podman", "localhost/tf")
        report.check(f"both images have the same {len(first)} files, with the same owners and modes",
                     first == second and len(first) > 5, lambda: sorted(first ^ second))
        for engine in engines:
            image = "tf" if engine.is_docker else "localhost/tf"
            code, out, err = engine.do("run", "--rm", "--network", "none", image, "locks", "--help", check=False)
            report.check(f"{engine.name} runs it", code == 0 and "tf locks" in out, f"{code} {out}{err}")
    report.end()
    return all(future.exception() is None for future in built)


def run_test(world, engine, function):
    test = Test(world, engine, function)
    try:
        function(test)
    except Failed as failure:
        test.check("the test comes to its end", False, failure)
    except Exception:
        test.check("the test comes to its end", False, traceback.format_exc())
    finally:
        with contextlib.suppress(Failed):
            test.end()
        test.report.end()


def run_all(world, wanted):
    machine = world.machine
    functions = [function for function in TESTS if wanted in function.__name__]
    if not functions:
        raise Failed(f"no test has {wanted} in its name. The tests:\n" + "\n".join(function.__name__ for function in TESTS))
    machine.configure_podman()
    machine.start_dockerd()
    engines = [
        Engine(machine, "docker", ["docker"]),
        Engine(machine, "podman/crun", ["podman", "--runtime", "crun"]),
        Engine(machine, "podman/runc", ["podman", "--runtime", "runc"]),
    ]
    versions = dict(line.split() for line in (ENGINES / "versions").read_text().splitlines())
    print("Debian trixie: " + ", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    version = subprocess.run(["terraform", "version", "-json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    kernel = f"Linux {os.uname().release}"
    print(f"Terraform {json.loads(version.stdout)['terraform_version']}, {kernel}", flush=True)
    if not builds(world, engines):
        return
    threads = int(os.environ.get("THREADS") or 6)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        tests = [(engine, function) for function in functions for engine in engines
                 if engine.is_docker or not getattr(function, "needs_docker", False)]
        for future in [pool.submit(run_test, world, *test) for test in tests]:
            future.result()
    finally:
        # After a ^C, nothing is waited for.
        pool.shutdown(wait=False, cancel_futures=True)


def main():
    tf, wanted = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else ""
    begun = time.monotonic()
    loopback_up()
    # A signal ends this as a ^C does, so that everything is torn down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    machine = cloud = None
    code = 1
    try:
        cloud = Cloud()
        machine = Machine()
        # The proxy uses a new connection for each request (ARCHITECTURE.md, Testing). It ends with this process.
        command = [sys.executable, ROOT / "chaos/chaos.py", "proxy", str(cloud.port), machine.directory / "requests", "1"]
        proxy = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        run_all(World(cloud, int(proxy.stdout.readline()), machine, tf), wanted)
        code = int(Report.failed > 0)
    except Failed as failure:
        print(f"FAILED  {failure}", flush=True)
    except KeyboardInterrupt:
        print("interrupted: everything is removed", flush=True)
        code = 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Report.is_over = True
        if machine:
            machine.close()
        if cloud:
            cloud.stop()
    if code != 130:
        print(f"\n{Report.passed} passed, {Report.failed} failed, {time.monotonic() - begun:.0f} s", flush=True)
    # The threads of an interrupted run have nothing left to wait for.
    os._exit(code)


main()
