"""Runs of programs that start terraform, and a look at the state lock after each of them.

`make wrappers` and `make executors` share this. Every wait is for a state or a message. If it does not come, the check
fails and prints the last state that was seen.
"""

import collections
import concurrent.futures
import http.client
import http.server
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "demo"))
from cloud import Cloud, configuration, provisioner  # noqa: E402

TF = pathlib.Path(os.environ.get("TF") or ROOT / "target/debug/tf").resolve()
TERRAFORM = pathlib.Path(shutil.which("terraform") or "/terraform is missing").resolve()
# What bare terraform does with its lock when the program above it is told to stop, or is killed. For the last one, it
# depends on which process is faster.
LEAVES, RELEASES, MAY_LEAVE = "leaves its lock", "releases its lock", "may leave its lock"
# The parts of a lock, as `Cloud.locks` names them.
BOTH = ["DynamoDB", "S3"]
# It is longer than the 30 s for which `tf locks recover` waits for a run that is stopping.
WAIT_TIMEOUT = 90


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes each request on over a connection of its own.

    MiniStack loses about one response in a thousand on a connection that is used again. Terraform then sends its lock
    request again, and is refused by its own lock.
    """

    protocol_version = "HTTP/1.1"
    # A response is sent in one piece.
    wbufsize = -1
    # The last requests of all places, for the dump of a check that failed.
    last = collections.deque(maxlen=40)

    @classmethod
    def start(cls, port):
        """Serves on a port of its own, which it returns, for the server at `port`."""
        handler = type("Handler", (cls,), {"server_at": port})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    def pass_on(self):
        begun, outcome = time.time(), "no response"
        try:
            outcome = self.exchange()
            self.wfile.flush()
        except (OSError, http.client.HTTPException) as error:
            outcome += f", {error!r}"
            self.close_connection = True
        operation = self.headers.get("X-Amz-Target", "").partition(".")[2]
        took = time.time() - begun
        moment = time.strftime("%H:%M:%S", time.gmtime(begun)) + f"{begun % 1:.3f}"[1:]
        self.last.append(f"  {moment} {self.command} {self.path} {operation}: {outcome} after {took:.3f} s")

    def exchange(self):
        """Returns the status that the server sent."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        connection = http.client.HTTPConnection("127.0.0.1", self.server_at, timeout=60)
        connection.request(self.command, self.path, body, {**headers, "Connection": "close"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        # The response to a HEAD has the length of what a GET returns.
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(text)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        self.wfile.write(text)
        return str(answer.status)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def log_message(self, *_):
        pass


class Failed(Exception):
    """A promise that was not kept."""


def wait_for(what, probe, state, seconds=WAIT_TIMEOUT):
    """Returns the first result of `probe` that is true. `state` describes what was seen last."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise Failed(f"waited {seconds} s for {what}; last seen: {state()}")
        time.sleep(0.05)
    return found


def check(holds, promise, seen=""):
    if not holds:
        raise Failed(f"{promise}{f'; seen: {seen}' if seen != '' else ''}")


class Process:
    """A process as it was when it was looked at."""

    def __init__(self, pid):
        self.pid = pid
        directory = pathlib.Path(f"/proc/{pid}")
        self.environment = (directory / "environ").read_bytes().split(b"\0")
        self.arguments = (directory / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
        self.comm = (directory / "comm").read_text().strip()
        self.exe = os.readlink(directory / "exe").removesuffix(" (deleted)")
        stat = (directory / "stat").read_text().rsplit(")", 1)[1].split()
        self.state, self.parent, self.group = stat[0], int(stat[1]), int(stat[2])

    def __str__(self):
        where = f"parent {self.parent}, group {self.group}, {self.state}"
        return f"{self.pid} ({where}) {self.comm}: {self.arguments[:120]}"

    @property
    def is_ours(self):
        """Whether it runs the program `tf`, also as a copy of it that a recipe has unpacked."""
        return pathlib.Path(self.exe).name in (TF.name, "tf")

    @property
    def is_guardian(self):
        return self.is_ours and self.comm == "tf-guardian"

    @property
    def is_tf(self):
        return self.is_ours and not self.comm.startswith("tf-")

    @property
    def is_terraform(self):
        return re.fullmatch(r"terraform(_[\d.]+)?", pathlib.Path(self.exe).name) is not None and not self.is_tf


def kill(processes, number=signal.SIGKILL):
    for process in processes:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            pass


def is_gone(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Place:
    """A directory with a HOME of its own. Its processes are found by that HOME, and not by their parents."""

    existing = []

    def __init__(self, cloud, name):
        self.existing.append(self)
        self.cloud, self.key = cloud, f"{name}.tfstate"
        self.root = pathlib.Path(tempfile.mkdtemp(prefix=f"tf-{name}-"))
        self.home, self.bin, self.work = self.root / "home", self.root / "bin", self.root / "work"
        for directory in (self.home, self.bin, self.work):
            directory.mkdir()
        self.began, self.go = self.root / "began", self.root / "go"
        self.log, self.trace = self.root / "log", self.root / "trace"
        # Nothing of the machine's own terraform, cloud or CI settings.
        kept = {name: os.environ[name] for name in ("LANG", "TERM", "TF_TEST_PLUGINS") if name in os.environ}
        self.environment = {
            **kept, "HOME": str(self.home), "PATH": f"{self.bin}:{TERRAFORM.parent}:/usr/local/bin:/usr/bin:/bin",
            "CHECKPOINT_DISABLE": "1", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{cloud.proxy}", "TFW_LOG": str(self.trace),
        }

    @property
    def waits(self):
        """A provisioner's command that waits until `go` exists, and ends when the place is removed."""
        return f"touch {self.began}; while test -e {self.began} && ! test -e {self.go}; do sleep 0.05; done"

    def configuration(self, command=None):
        """A resource whose provisioner waits, an output, and the lock in both places."""
        return configuration(self.key, f"""
{provisioner(command or self.waits)}
output "answer" {{
  value = 42
}}
""")

    def processes(self):
        mark, found = f"HOME={self.home}".encode(), []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    process = Process(int(name))
                except (OSError, ValueError, IndexError):
                    continue
                if mark in process.environment:
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def find(self, kind):
        """The only process of the kind `is_tf`, `is_guardian` or `is_terraform`."""
        def probe():
            found = [process for process in self.processes() if getattr(process, kind)]
            return found[0] if len(found) == 1 else None
        return wait_for(f"one process: {kind}", probe, self.dump)

    def below(self, process):
        """Every process that has `process` among its parents."""
        processes, found = self.processes(), {process.pid}
        while more := [other for other in processes if other.parent in found and other.pid not in found]:
            found |= {other.pid for other in more}
        return [other for other in processes if other.pid in found and other.pid != process.pid]

    def locks(self):
        """Where the lock is held: DynamoDB, S3, both or neither."""
        return [where for where, _ in self.cloud.locks(self.key)]

    def wait_until_began(self, run=None):
        """Waits until the provisioner waits. Then terraform holds the lock in both places."""
        def probe():
            if run is not None and is_gone(run.pid) and not self.began.exists():
                raise Failed(f"the run ended before its provisioner began\n{self.dump()}")
            return self.began.exists()
        wait_for("the provisioner", probe, self.dump)
        check(self.locks() == BOTH, "terraform holds its lock in both places", self.locks())

    def wait_until_unlocked(self):
        wait_for("the lock to be gone", lambda: not self.locks(), lambda: f"lock in {self.locks()}\n{self.dump()}")

    def wait_until_quiet(self):
        wait_for("the end of every process", lambda: not self.processes(), self.dump)

    def dump(self):
        lines = [f"  {process}" for process in self.processes()] or ["  no process"]
        for name in (self.log, self.trace):
            if name.exists():
                lines += [f"  -- {name.name}", *name.read_text(errors="replace").splitlines()[-40:]]
        lines += ["  -- the last requests", *(line for line in list(Proxy.last) if self.key in line or "POST" in line)]
        return "\n".join(lines)

    def end_of_bare(self, run, end, expected):
        """Ends `run`, of bare terraform, with `end(run)`, and checks what becomes of its lock. Closes the run."""
        try:
            end(run)
            run.wait()
            # A terraform that goes on is let to its end.
            self.go.touch()
            self.wait_until_quiet()
            seen = self.locks()
            wanted = {LEAVES: BOTH, RELEASES: [], MAY_LEAVE: seen}[expected]
            check(seen == wanted, f"bare terraform {expected}", f"{seen}\n{self.dump()}")
            return "lock left" if seen else "lock released"
        finally:
            run.close()

    def clean(self):
        """Ends what is left of a run, and removes its lock and its state."""
        for _ in range(100):
            left = self.processes()
            if not left:
                break
            kill(left)
            time.sleep(0.05)
        self.cloud.unlock(self.key)
        self.cloud.dynamodb("DeleteItem", {
            "TableName": "locks", "Key": {"LockID": {"S": f"bucket/{self.key}-md5"}},
        })
        self.cloud.ask("DELETE", f"/bucket/{self.key}")
        for path in (self.began, self.go, self.log, self.trace):
            path.unlink(missing_ok=True)

    def remove(self):
        self.clean()
        self.existing.remove(self)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, command, check=False):
        """Runs a command to its end, and returns it with its output. With `check`, it must exit with 0."""
        end = subprocess.run(
            [str(word) for word in command], cwd=self.work, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=WAIT_TIMEOUT * 2)
        self.log.write_text(end.stdout + end.stderr)
        if check and end.returncode != 0:
            raise Failed(f"{command} exited with {end.returncode}\n{self.dump()}")
        return end

    def start(self, command, terminal=False):
        return Run(self, [str(word) for word in command], terminal)


class Run:
    """A command that was started in a session of its own, with its output in the place's log.

    With `terminal`, the session has a terminal, and a shell that waits for the command, as at a keyboard. The shell has
    a handler for INT so that it survives a ^C, which goes to the whole foreground group.
    """

    def __init__(self, place, command, terminal):
        self.place, self.master = place, None
        if terminal:
            self.master, slave = os.openpty()
            shell = ["setsid", "--ctty", "sh", "-c", 'trap : INT; "$@"; echo ended with $?', "sh"]
            self.child = subprocess.Popen(
                shell + command, cwd=place.work, env=place.environment, stdin=slave, stdout=slave, stderr=slave)
            os.close(slave)
            self.copying = threading.Thread(target=self.copy, daemon=True)
            self.copying.start()
            self.pid = wait_for("the command below its shell", self.below, place.dump)
        else:
            with open(place.log, "wb") as log:
                self.child = subprocess.Popen(
                    command, cwd=place.work, env=place.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True)
            self.pid = self.child.pid

    def below(self):
        try:
            children = pathlib.Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        except FileNotFoundError:
            return None
        return int(children[0]) if children else None

    def copy(self):
        with open(self.place.log, "wb", buffering=0) as log:
            while True:
                try:
                    log.write(os.read(self.master, 65536))
                except OSError:
                    return

    def press_interrupt(self):
        os.write(self.master, b"\x03")

    def send(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """Waits until the command has exited, and returns its exit code (of the shell, at a terminal)."""
        wait_for("the end of the command", lambda: self.child.poll() is not None, self.place.dump)
        if self.master is not None:
            self.copying.join(timeout=1)
        return self.child.returncode

    def close(self):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        if self.master is not None:
            os.close(self.master)
            self.master = None


class Report:
    """Prints one line for each check. Several threads share it."""

    def __init__(self, only=()):
        self.only, self.passed, self.failed = only, 0, []
        self.mutex, self.begun = threading.Lock(), time.monotonic()

    def wants(self, name):
        return all(word in name for word in self.only)

    def run(self, name, promise, always=False):
        """Runs `promise`, which returns what it saw, in a few words. Returns whether it was kept."""
        if not always and not self.wants(name):
            return True
        begun = time.monotonic()
        try:
            seen = promise()
        except (Failed, OSError, subprocess.SubprocessError, AssertionError) as failure:
            with self.mutex:
                self.failed.append(name)
                print(f"FAILED {name}\n{failure or traceback.format_exc()}", flush=True)
            return False
        else:
            with self.mutex:
                self.passed += 1
                print(f"ok  {name}{f': {seen}' if seen else ''} ({time.monotonic() - begun:.1f} s)", flush=True)
            return True

    def finish(self):
        print(f"\nin {time.monotonic() - self.begun:.0f} s:")
        for name in self.failed:
            print(f"failed: {name}")
        print(f"{self.passed} passed, {len(self.failed)} failed", flush=True)
        sys.exit(1 if self.failed or not self.passed else 0)


def all_at_once(jobs, threads):
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def begin():
    """Starts the loopback cloud, after a check of the two programs."""
    if not TERRAFORM.exists():
        sys.exit("terraform is missing: put Terraform 1.11 or later on PATH")
    if not TF.exists():
        sys.exit(f"{TF} is missing: run `make build`, or set TF")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, give_up)
    cloud = Cloud()
    cloud.proxy = Proxy.start(cloud.port)
    return cloud


def give_up(number, _):
    """Ends what was started, also the server, and exits."""
    for place in list(Place.existing):
        kill(place.processes())
        shutil.rmtree(place.root, ignore_errors=True)
    for cloud in Cloud.existing:
        cloud.stop()
    for thread in os.listdir("/proc/self/task"):
        for child in pathlib.Path(f"/proc/self/task/{thread}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    os._exit(128 + number)
