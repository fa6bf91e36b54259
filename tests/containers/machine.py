"""The machine on which the engines run, the engines, and their containers.

The machine is a mount namespace and a pid namespace. When its first process is killed, every process and every mount in
it is gone.
"""

import contextlib
import datetime
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENGINES = ROOT / "target/tools/containers"
USER = 65532
# The control group of all pods of Podman. It has no option for another one.
PODS = "libpod_parent"
# How long one command of an engine, or one state that a test waits for, may take on a busy machine.
COMMAND_TIMEOUT = 180
STATE_TIMEOUT = 120


class Failed(Exception):
    """A test cannot go on."""


def wait_until(what, condition, state, seconds=STATE_TIMEOUT, interval=0.1):
    """Waits until `condition()` is true and returns its value. After `seconds`, fails with what `state()` returns."""
    end = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        if time.monotonic() > end:
            raise Failed(f"{seconds} s are over, still waiting for {what}. The last state: {state()}")
        time.sleep(interval)


def has_old_freezer():
    """Whether the freezer of this machine is that of cgroup v1, with or without a cgroup v2 beside it."""
    lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    return any("freezer" in line.split(":")[1].split(",") for line in lines)


def hard_limit(kind, most):
    limit = resource.getrlimit(kind)[1]
    return most if limit == resource.RLIM_INFINITY else min(limit, most)


class Machine:
    def __init__(self):
        # Not below this repository, which may belong to a user: a state directory of root has only parents of root.
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="tf-containers-", dir=os.environ.get("TMPDIR", "/var/tmp")))
        # The users of the containers read their directories below it.
        self.directory.chmod(0o755)
        self.share = self.directory / "share"
        self.share.mkdir()
        self.group = f"tf-containers-{os.getpid()}"
        self.had_pods = any((mount / PODS).exists() for mount in mounts_of_cgroups())
        self.daemons = []
        # Not more than this process has, because a container may not have more than its engine.
        self.files = hard_limit(resource.RLIMIT_NOFILE, 65536)
        self.processes = hard_limit(resource.RLIMIT_NPROC, 20000)
        command = [
            "setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "--pid", "--fork",
            "--kill-child", HERE / "enter", self.directory, ENGINES / "root",
        ]
        self.log = open(self.directory / "log", "ab")
        # In a session of its own, so that a ^C does not end it before its containers are looked at.
        self.unshare = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True)

        def first_process():
            with contextlib.suppress(OSError, ValueError, IndexError):
                children = pathlib.Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text()
                pid = int(children.split()[0])
                return pid if pathlib.Path(f"/proc/{pid}/comm").read_text() == "catatonit\n" else None

        def state():
            return f"{self.unshare.poll()}, {self.log_text()}"

        self.pid = wait_until("the machine of the engines", first_process, state, interval=0.02)

    def log_text(self):
        return (self.directory / "log").read_text(errors="replace")[-4000:]

    def command(self, words):
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
            "DOCKER_HOST": "unix:///run/docker.sock", "DOCKER_BUILDKIT": "0", "BUILDAH_FORMAT": "docker",
            "CONTAINERS_CONF": "/share/containers.conf",
        }
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "/usr/bin/env", "-i"]
        return [*enter, *(f"{name}={value}" for name, value in environment.items()), *map(str, words)]

    def run(self, *words, check=True, stdin=subprocess.DEVNULL, timeout=COMMAND_TIMEOUT):
        """Runs a command on the machine, and returns its exit code, stdout and stderr."""
        # In a session of its own, as above.
        process = subprocess.Popen(
            self.command(words), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise Failed(f"{timeout} s are over, still running: {' '.join(map(str, words))}\n{out}{err}") from None
        if check and process.returncode != 0:
            raise Failed(f"exit code {process.returncode}: {' '.join(map(str, words))}\n{out}{err}")
        return process.returncode, out, err

    def output(self, *words, **more):
        return self.run(*words, **more)[1].strip()

    def start_dockerd(self):
        words = [
            "dockerd", "--host", "unix:///run/docker.sock", "--exec-root", "/run/docker", "--pidfile", "/run/docker.pid",
            "--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false",
            "--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{self.group}/docker",
            "--default-ulimit", f"nofile={self.files}:{self.files}",
        ]
        self.daemons.append(subprocess.Popen(
            self.command(words), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True))
        wait_until("dockerd", lambda: self.run("docker", "version", check=False)[0] == 0, self.log_text)

    def configure_podman(self):
        cgroup_namespace = 'cgroupns = "host"\n' if has_old_freezer() else ""
        (self.share / "containers.conf").write_text(
            f'[containers]\npids_limit = 0\n{cgroup_namespace}log_driver = "k8s-file"\n'
            f'default_ulimits = ["nofile={self.files}:{self.files}", "nproc={self.processes}:{self.processes}"]\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n')

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.unshare.wait()
        for daemon in self.daemons:
            daemon.wait()
        self.log.close()
        for mount in mounts_of_cgroups():
            remove_groups(mount / self.group)
            if not self.had_pods:
                remove_groups(mount / PODS)
        # Nothing is mounted below it any more.
        shutil.rmtree(self.directory, ignore_errors=True)


def mounts_of_cgroups():
    lines = [line.split(" ") for line in pathlib.Path("/proc/self/mounts").read_text().splitlines()]
    return [pathlib.Path(line[1]) for line in lines if line[2] in ("cgroup", "cgroup2")]


def remove_groups(group):
    """Removes a control group and those below it, as soon as their processes are gone."""
    if not group.is_dir():
        return
    for path in sorted(group.rglob("*/"), reverse=True):
        if path.is_dir():
            remove_group(path)
    remove_group(group)


def remove_group(group):
    for _ in range(100):
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.05)


class Engine:
    """An engine, as the words with which its commands begin."""

    def __init__(self, machine, name, words):
        self.machine, self.name, self.words = machine, name, words
        self.is_docker = words[0] == "docker"

    def do(self, *arguments, **more):
        return self.machine.run(*self.words, *arguments, **more)

    def inspect(self, name, what):
        return self.do("inspect", "--format", "{{" + what + "}}", name)[1].strip()


class Container:
    """One container. It is started at once, in the background."""

    count = 0
    counting = threading.Lock()

    def __init__(self, engine, image, arguments, directory, options=(), environment=None, volumes=(), entrypoint=None):
        with Container.counting:
            Container.count += 1
            # An engine that knows no container of a name takes the name as the beginning of an ID, which has the letters
            # a to f. "c21" could so remove a container of another test.
            self.name = f"run-{Container.count}"
        self.engine = engine
        mounts = [(directory, "/work", "rw"), *volumes]
        words = ["run", "--detach", "--name", self.name, "--network", "host"]
        if engine.is_docker:
            # In a cgroup namespace, tf cannot know that the freezer of cgroup v1 does not freeze the container, and makes
            # no promise.
            words += ["--cgroupns", "host"] if has_old_freezer() else []
        else:
            words += ["--cgroup-parent", f"/{engine.machine.group}/podman"]
        for name, value in (environment or {}).items():
            words += ["--env", f"{name}={value}"]
        for source, target, mode in mounts:
            source = pathlib.Path(source)
            inside = pathlib.Path("/share") / source.relative_to(engine.machine.share)
            words += ["--volume", f"{inside}:{target}:{mode}"]
        if entrypoint:
            words += ["--entrypoint", entrypoint]
        engine.do(*words, *options, image, *arguments)

    @classmethod
    def existing(cls, engine, name):
        """A container that another program has started."""
        container = cls.__new__(cls)
        container.engine, container.name = engine, name
        return container

    def status(self):
        return self.engine.inspect(self.name, ".State.Status")

    def text(self):
        """Both outputs."""
        _, out, err = self.engine.do("logs", self.name, check=False)
        return out, err

    def lines(self):
        """Every line of both outputs with its time, in the order of time: (time, "out" or "err", text)."""
        _, out, err = self.engine.do("logs", "--timestamps", self.name, check=False)
        found = []
        for kind, text in (("out", out), ("err", err)):
            for line in text.splitlines():
                moment, _, rest = line.partition(" ")
                # Docker writes nanoseconds and Z, Podman an offset.
                parsed = re.fullmatch(r"(\S+?)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)", moment)
                if parsed:
                    whole = datetime.datetime.fromisoformat(parsed[1] + parsed[3].replace("Z", "+00:00")).timestamp()
                    found.append((whole + float(f"0.{parsed[2] or 0}"), kind, rest))
        return sorted(found, key=lambda line: line[0])

    def story(self):
        out, err = self.text()
        code = self.engine.inspect(self.name, ".State.ExitCode")
        return f"{self.status()}, exit code {code}\n--- stdout\n{out}--- stderr\n{err}"

    def wait(self, seconds=STATE_TIMEOUT):
        """Waits for its end, and returns its exit code."""
        ended = ("exited", "stopped", "dead")
        wait_until(f"the end of {self.name}", lambda: self.status() in ended, self.story, seconds, 0.3)
        return int(self.engine.inspect(self.name, ".State.ExitCode"))

    def first_process(self):
        """The pid of its first process, as this machine numbers it. The engine numbers it as its own machine does."""
        pid = self.engine.inspect(self.name, ".State.Pid")
        return next(outer for outer, status in every_process() if status["NSpid"].split()[1:2] == [pid])

    def processes(self):
        """The processes in it: {pid: name}."""
        namespace = os.stat(f"/proc/{self.first_process()}/ns/pid").st_ino
        found = {}
        for pid, status in every_process():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}/ns/pid").st_ino == namespace:
                    found[pid] = status["Name"]
        return found

    def terraform(self):
        # Not by its name: a tf that is started as terraform has the same one, and so has a zombie.
        def runs_terraform(pid):
            with contextlib.suppress(OSError):
                return os.readlink(f"/proc/{pid}/exe").endswith("/terraform")

        found = wait_until("terraform", lambda: list(filter(runs_terraform, self.processes())), self.story)
        return found[0]

    def do(self, command, *options):
        self.engine.do(command, *options, self.name)

    def remove(self):
        self.engine.do("rm", "--force", self.name, check=False)


def every_process():
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                lines = pathlib.Path(f"/proc/{entry}/status").read_text().splitlines()
                yield int(entry), dict(line.split(":\t", 1) for line in lines if ":\t" in line)
