"""Runs the rounds of chaos.py on three hosts at once for hours, and counts what they leave.

A host is a set of namespaces (UTS, mount, PID) with a host name, a machine-id, a home, a state directory and an empty
/dev/shm of its own. All hosts share one cloud and lock the same three states, so each run competes with runs of its own
host and of the others. Besides the deaths of a round, everything on a host is killed now and then. After each round,
the next `tf` on that host must have released every lock that the host's dead runs left. No host may release a lock of
another host.

Needs root, because only root can create these namespaces.
"""

import argparse
import collections
import json
import os
import pathlib
import queue
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import uuid

sys.dont_write_bytecode = True
import chaos as one_host
from chaos import Chaos, Cloud, HERE, KINDS, Round, Tally, VICTIMS

# A name such as `localhost` does not identify a machine, so each host has a full name.
HOSTS = ["soak-a", "soak-b", "soak-c"]
DOMAIN = "example"

# How long a pending request is stored (docs/proof.md).
PENDING_WINDOW = 20 * 60
# How long a process may take to exit after the last command of a round, and a connection to be closed at the end.
SETTLE_TIMEOUT = 5
# How long a host may take for its last round and for its last checks.
HOST_TIMEOUT = 300
# How many IDs of earlier locks a host remembers. A round takes less than 50 locks.
REMEMBERED_LOCKS = 1000

# What a state directory may contain at the end (docs/security.md).
STATE_FILES = re.compile(r"runs|tombstones|programs\.json|history\.lock|history\.jsonl(\.[1-4])?")
# What a working directory may contain at the end. Terraform writes errored.tfstate if it cannot save the state.
WORK_FILES = re.compile(r"main\.tf|orders\.json|\.terraform|\.terraform\.lock\.hcl|errored\.tfstate")


# What a process uses.

def status_kib(pid, field):
    """A field of /proc/PID/status in KiB. 0 if the process has exited."""
    try:
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.M)
    return int(found.group(1)) if found else 0


def usage(pid):
    """The number of open descriptors and the resident memory in KiB."""
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    # One of them is the list itself.
    return {"descriptors": descriptors - (pid in ("self", os.getpid())), "rss": status_kib(pid, "VmRSS")}


def memory_used(directory):
    """The bytes in use on a tmpfs."""
    space = os.statvfs(directory)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


# One round on one of the hosts.

class SoakRound(Round):
    # The other hosts have the lock most of the time.
    more_of_holder = ["-lock-timeout=20s"]

    def __init__(self, host, number):
        super().__init__(host, number)
        dice = random.Random(f"{host.seed}-{number} soak")
        self.moment_is_of_lock = dice.random() < 0.6
        self.host_is_killed_at = dice.uniform(0, 3) if dice.random() < 0.35 else None
        self.host_was_killed = self.needed_recover = False
        self.usual *= host.load
        self.parts_taken = collections.Counter()
        # By lock ID: who of this round has taken the lock, or which round and who of it.
        self.owners = dict(host.owners)

    def until_the_moment(self, holder):
        """Waits for a moment after the holder's start, or after it has taken its lock."""
        began = holder.started
        if self.moment_is_of_lock:
            parts = len(KINDS[self.plan["kind"]])
            while not holder.ended() and time.monotonic() < holder.started + 45:
                self.look_around()
                if self.parts_taken["holder"] >= parts:
                    break
                time.sleep(one_host.LOOK)
            began = time.monotonic()
        while (left := began + self.plan["moment"] * self.usual - time.monotonic()) > 0:
            self.look_around()
            time.sleep(min(left, one_host.LOOK))

    def note_owner(self, entry, name, who):
        label = f"{name}-{who}"
        self.owners[entry["id"]] = who if name == self.name else label
        self.chaos.remember(entry["id"], label)
        if name == self.name and entry["status"] < 300:
            self.parts_taken[who] += 1

    def look_around(self):
        living = super().look_around()
        for process in living:
            self.chaos.measure_memory(process.pid)
        return living

    def meanwhile(self, since):
        if self.host_is_killed_at is not None and time.monotonic() >= since + self.host_is_killed_at:
            self.host_is_killed_at = None
            self.kill_host()

    def kill_host(self):
        """Kills every process on this host but its process 1 and ourselves."""
        killed = processes()
        for command in self.commands.values():
            command.signalled |= command.dead_since is None
        while processes():
            os.kill(-1, signal.SIGKILL)
            for command in self.commands.values():
                command.ended()
            time.sleep(0.001)
        self.host_was_killed = bool(killed)
        self.say(f"everything on this host is killed: {', '.join(killed) or 'there was nothing'}")

    def stale(self):
        """The locks of this host's runs. A lock of another host may be there."""
        patience = time.monotonic() + 1
        while True:
            locks = self.locks()
            self.read_access_log()
            owners = {where: self.owners.get(lock) for where, lock in locks.items()}
            # Somebody may take a lock between the two reads.
            if None not in owners.values() or time.monotonic() > patience:
                break
        ours = lambda owner: owner is None or owner in self.commands or owner.startswith(f"{self.chaos.name}.")
        return {where: lock for where, lock in locks.items() if ours(owners[where])}

    def judge(self):
        super().judge()
        # The record of a run that was killed before its first log record stays once if the lock is held at that moment.
        if self.chaos.records():
            self.needed_recover = True
            status, text, _ = self.chaos.run_recover()
            self.say(f"a record was left; tf locks recover exited with {status}: {text}")
        for what, details in self.chaos.left():
            self.fail(what, details)


def processes():
    """The processes on this host, except process 1 and ourselves, as texts."""
    found = []
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or int(pid) in (1, os.getpid()):
            continue
        try:
            before, _, after = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        except OSError:
            continue
        if after.split()[0] not in "ZX":
            found.append(f"{before.partition('(')[2]} {pid}")
    return found


# One of the hosts.

class Host(Chaos):
    kept_in = HERE / "target/soak"

    def __init__(self, settings):
        self.name, self.place = settings["name"], settings["place"]
        self.seed, self.bare, self.program = f"{settings['seed']}-{self.name}", False, "tf"
        self.root = pathlib.Path(settings["root"]) / self.name
        self.requests = pathlib.Path(settings["root"]) / "requests"
        self.read_to = self.requests.stat().st_size
        self.usual, self.requests_usual = settings["usual"], settings["requests_usual"]
        self.cloud = Cloud.__new__(Cloud)
        self.cloud.port = settings["cloud"]
        self.control = settings["control"]
        # The usual times were measured when nothing else ran.
        self.load = max(1, len(HOSTS) / os.cpu_count())
        self.owners = collections.OrderedDict()
        self.peak = 0

        self.temporary, self.runtime = self.root / "tmp", self.root / "runtime"
        for directory in (self.temporary, self.runtime):
            directory.mkdir(mode=0o700)
        socket.sethostname(f"{self.name}.{DOMAIN}")
        machine = self.root / "machine-id"
        machine.write_text(f"{random.Random(self.name).getrandbits(128):032x}\n")
        subprocess.run(["mount", "--bind", machine, "/etc/machine-id"], check=True)
        for directory in self.memory():
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0700", "tmpfs", directory], check=True)
        self.environment = dict(
            self.environment_of(pathlib.Path(settings["root"]) / "bin", settings["port"]),
            TMPDIR=str(self.temporary), XDG_RUNTIME_DIR=str(self.runtime),
        )
        for kind in KINDS:
            shutil.copytree(self.root.parent / kind, self.root / kind)

    def name_of(self, number):
        return f"{self.name}.{number}"

    def memory(self):
        return [pathlib.Path("/dev/shm"), self.runtime]

    def set_distance(self, seconds):
        os.write(self.control, f"{self.place} {seconds}\n".encode())

    def reset(self, key):
        """Does nothing: the state, its digest and its lock belong to the other hosts as well."""

    def remember(self, lock, label):
        self.owners[lock] = label
        while len(self.owners) > REMEMBERED_LOCKS:
            self.owners.popitem(last=False)

    def measure_memory(self, pid):
        # The ru_maxrss of a `tf` that was waited for includes its terraform.
        try:
            program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
        except OSError:
            return
        if program == "tf":
            self.peak = max(self.peak, status_kib(pid, "VmHWM"))

    def records(self):
        """The records of runs in the journal."""
        return sorted((self.root / "state/runs").glob("*"))

    def left(self):
        """What no round may leave: (kind of failure, details)."""
        patience = time.monotonic() + SETTLE_TIMEOUT
        while (running := processes()) and time.monotonic() < patience:
            time.sleep(one_host.LOOK)
        if running:
            yield "process", f"still running: {', '.join(running)}"
        for record in self.records():
            yield "record", f"still in the journal: {record.name}"
        for directory in self.memory():
            for file in sorted(directory.iterdir()):
                yield "memory", f"still in memory: {file.name}, {file.stat().st_size} bytes"

    def left_at_the_end(self):
        """What the host may not leave after its last command."""
        yield from self.left()
        expected = {self.root / "state": STATE_FILES}
        for kind in KINDS:
            expected.update({place: WORK_FILES for place in (self.root / kind).iterdir()})
        # Terraform makes ~/.terraform.d.
        expected.update({self.root / "home": re.compile(r"\.terraform\.d$"), self.temporary: re.compile(r"(?!)")})
        for directory, names in expected.items():
            for name in sorted(os.listdir(directory)):
                if not names.fullmatch(name):
                    yield "file", f"still in {directory.relative_to(self.root)}: {name}"
        for path, request in self.pending():
            if request is None:
                yield "file", f"not a pending request: {path.name}"
            # The last command deleted those whose time was over then, some seconds ago.
            elif (age := age_of(request)) > PENDING_WINDOW + SETTLE_TIMEOUT:
                yield "pending", f"pending request {path.name} is {age:.0f} s old"

    def pending(self):
        for path in sorted((self.root / "state/tombstones").glob("*")):
            request = None
            try:
                # Any other name is a file that was not finished.
                if path.name == f"{uuid.UUID(path.stem)}.json":
                    request = json.loads(path.read_text())
            except ValueError:
                pass
            yield path, request

    def forget_state(self):
        super().forget_state()
        for directory in self.memory():
            for file in directory.iterdir():
                file.unlink()

    def forget_locks(self, round):
        """A lock that a failed round has left must not fail the other hosts' rounds."""
        for where in round.stale():
            if where == "S3":
                what = f"DELETE /bucket/{round.key}.tflock"
                self.cloud.ask(*what.split())
            else:
                what = "DeleteItem"
                key = {"LockID": {"S": f"bucket/{round.key}"}}
                self.cloud.dynamodb(what, {"TableName": "locks", "Key": key})
            # The ledger must know that the lock is gone.
            entry = {
                "time": time.time(), "host": self.place, "by": f"{self.name}-removed", "what": what, "key": round.key,
                "md5": False, "id": None, "status": 200,
            }
            with open(self.requests, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def forget_digest(self, round):
        """A digest that does not match the state would fail every later round."""
        if round.digest:
            key = {"LockID": {"S": f"bucket/{round.key}-md5"}}
            self.cloud.dynamodb("DeleteItem", {"TableName": "locks", "Key": key})

    def run_round(self, number):
        round = SoakRound(self, number)
        round.run()
        self.forget_digest(round)
        kept = None
        if round.failures:
            self.kill_all(round.mark)
            self.forget_locks(round)
            kept = self.keep(round)
            self.forget_state()
        else:
            shutil.rmtree(round.directory, ignore_errors=True)
        return {
            "number": number, "who": round.who, "plan": {"how": round.plan["how"]}, "hit": round.hit,
            "standing": round.standing, "continued": round.continued, "digest": round.digest,
            "failures": round.failures, "kept": kept and str(kept), "text": round.describe(),
            "host_was_killed": round.host_was_killed, "needed_recover": round.needed_recover,
            "seconds": time.monotonic() - round.began,
        }

    def run_recover(self):
        """Runs `tf locks recover`. Returns its exit code, its output and its memory in KiB."""
        run = subprocess.Popen(
            ["tf", "locks", "recover"], cwd=self.root / "both/next", env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        text = run.stdout.read().decode(errors="replace")
        _, status, used = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        run.stdout.close()
        return run.returncode, text.strip(), used.ru_maxrss

    def recover(self):
        """The last command: what it says, and what the host has left after it."""
        status, text, memory = self.run_recover()
        self.peak = max(self.peak, memory)
        failures = list(self.left_at_the_end())
        if status != 0:
            failures.append(("recover", f"tf locks recover exited with {status}: {text}"))
        kept = None
        if failures:
            kept = self.kept_in / f"tf-{self.seed}-end"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self.root / "state", kept, symlinks=True)
        return {
            "failures": failures, "said": text, "pending": sum(1 for _ in self.pending()), "peak": self.peak,
            "kept": kept and str(kept), "text": "after the last round",
        }

    def usage(self):
        """What the long-lived processes of this host use, and the memory in its tmpfs."""
        return {
            "processes": {f"{self.name}: process 1": usage(1), f"{self.name}: rounds": usage("self")},
            "tmpfs": sum(memory_used(directory) for directory in self.memory()),
        }


def age_of(request):
    since = one_host.datetime.datetime.fromisoformat(request["since"][:19] + "+00:00")
    return time.time() - since.timestamp()


def be_host(settings):
    """Runs a host in its namespaces. Each line on stdin is an order of the driver, each line on stdout an answer."""
    if worker := os.fork():
        # Process 1 reaps the orphans. The exit of process 1 kills everything else on the host.
        while True:
            pid, status = os.wait()
            if pid == worker:
                os._exit(1 if status else 0)
    orders, answers = sys.stdin, sys.stdout
    host = Host(settings)

    def answer(**what):
        answers.write(json.dumps({"host": host.name, **what}) + "\n")
        answers.flush()

    number = settings["first"]
    for order in orders:
        word, _, seconds = order.strip().partition(" ")
        if word == "rounds":
            until = time.monotonic() + float(seconds)
            while True:
                answer(round=host.run_round(number))
                number += 1
                if time.monotonic() >= until:
                    break
            answer(done=host.usage())
        elif word == "recover":
            answer(end=host.recover(), done=host.usage())
        elif word == "usage":
            answer(done=host.usage())


# All hosts.

class Ledger:
    """Who has which part of which lock, from the changes in the cloud's log."""

    def __init__(self):
        self.parts = {}
        self.taken = self.refused_by_others = self.released_by_tf = 0
        self.failures = []

    def read(self, entry):
        what = entry["what"]
        if file := re.match(r"(PUT|DELETE) /bucket/(\S+?)\.tflock", what):
            part, takes = ("S3", file.group(2)), file.group(1) == "PUT"
        elif what in ("PutItem", "DeleteItem") and not entry["md5"]:
            part, takes = ("DynamoDB", entry["key"]), what == "PutItem"
        else:
            return
        holder = self.parts.get(part)
        is_done = entry["status"] < 300
        if takes and is_done:
            self.taken += 1
            if holder:
                self.fail(entry, f"replaced the lock {holder['id']} of {holder['by']} ({part[0]}, {part[1]})")
            self.parts[part] = entry
        elif takes:
            self.refused_by_others += bool(holder and holder["host"] != entry["host"])
        elif is_done and holder:
            del self.parts[part]
            # Only terraform's requests have the name of the round.
            self.released_by_tf += not re.match(r"soak-|measured", entry["by"])
            if holder["host"] != entry["host"]:
                self.fail(entry, f"deleted the lock {holder['id']} of {holder['by']} ({part[0]}, {part[1]})")

    def fail(self, entry, what):
        self.failures.append(("taken elsewhere", f"{entry['by']} on {HOSTS[entry['host']]} {what} at {entry['time']}"))


class SoakTally(Tally):
    ROWS = [
        *Tally.ROWS,
        ("taken elsewhere", "locks released or replaced by another host"),
        ("recover", "hosts whose last recover did not exit with 0"),
        ("process", "rounds that left a process"),
        ("record", "rounds that left a record in the journal"),
        ("pending", "pending requests older than 20 min"),
        ("memory", "rounds that left a file or bytes in memory"),
        ("file", "other files left"),
        ("descriptor", "long-lived processes with more descriptors"),
    ]

    def __init__(self):
        super().__init__()
        self.hosts_killed = self.needed_recover = 0
        self.titles = {}

    def add_round(self, host, result):
        round = types.SimpleNamespace(**result, describe=lambda: result["text"])
        self.titles[id(round)] = f"{host}, round {result['number']}"
        self.hosts_killed += result["host_was_killed"]
        self.needed_recover += result["needed_recover"]
        self.add(round, result["kept"])

    def add_end(self, title, failures, kept):
        for what, _ in failures:
            self.failures[what] += 1
        if failures:
            round = types.SimpleNamespace(failures=failures, describe=lambda: "after the last round")
            self.titles[id(round)] = title
            self.stories.append((round, kept))


class Soak(Chaos):
    def __init__(self, options):
        super().__init__(options, len(HOSTS))
        self.options = options
        self.hosts = {}
        self.answers = queue.Queue()
        self.tally, self.ledger = SoakTally(), Ledger()

    def start_hosts(self):
        for place, name in enumerate(HOSTS):
            (self.root / name).mkdir()
            settings = {
                "name": name, "place": place, "seed": self.seed, "root": str(self.root), "cloud": self.cloud.port,
                "port": self.ports[place], "control": self.proxy.stdin.fileno(), "usual": self.usual,
                "requests_usual": self.requests_usual, "first": self.options.round,
            }
            host = subprocess.Popen(
                [*UNSHARE, sys.executable, __file__, "host", json.dumps(settings)], pass_fds=[settings["control"]],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )
            self.hosts[name] = host
            threading.Thread(target=self.listen, args=(name, host.stdout), daemon=True).start()

    def listen(self, name, stream):
        for line in stream:
            self.answers.put(json.loads(line))
        self.answers.put({"host": name, "exited": True})

    def order(self, text, seconds=0):
        """Gives all hosts an order, and waits until they have carried it out. Returns what they use then."""
        for host in self.hosts.values():
            host.stdin.write(f"{text}\n")
            host.stdin.flush()
        used = {"processes": {}, "tmpfs": 0}
        waiting = set(self.hosts)
        until = time.monotonic() + seconds + HOST_TIMEOUT
        while waiting:
            try:
                answer = self.answers.get(timeout=max(0, until - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"no answer from {', '.join(sorted(waiting))}") from None
            if "exited" in answer:
                raise RuntimeError(f"{answer['host']} has exited")
            if result := answer.get("round"):
                self.tally.add_round(answer["host"], result)
                if self.options.verbose or result["failures"]:
                    came = ", ".join(sorted({what for what, _ in result["failures"]})) or "well"
                    print(
                        f"{answer['host']} {result['number']:4} {result['seconds']:5.1f} s  {result['text']}: {came}",
                        flush=True,
                    )
            if end := answer.get("end"):
                self.ends.append(end)
                self.tally.add_end(answer["host"], end["failures"], end["kept"])
            if done := answer.get("done"):
                waiting.discard(answer["host"])
                used["processes"].update(done["processes"])
                used["tmpfs"] += done["tmpfs"]
        processes = {"cloud": self.cloud.server.pid, "proxy": self.proxy.pid, "driver": os.getpid()}
        used["processes"].update({name: usage(pid) for name, pid in processes.items()})
        return used

    def run(self):
        seconds = self.options.hours * 3600
        self.ends = []
        self.prepare()
        self.start_hosts()
        # The first round of each host loads what the interpreters load once.
        self.order("rounds 0")
        time.sleep(SETTLE_TIMEOUT)
        before = self.order("usage")
        began = time.monotonic()
        self.order(f"rounds {seconds}", seconds)
        self.elapsed = time.monotonic() - began
        self.order("recover")
        time.sleep(SETTLE_TIMEOUT)
        after = self.order("usage")
        for entry in self.new_requests():
            self.ledger.read(entry)
        failures = list(self.ledger.failures)
        for key in (f"{kind}.tfstate" for kind in KINDS):
            for where, info in self.cloud.locks(key):
                failures.append(("stale", f"{info['ID']} of {info['Who']} ({where}, {key})"))
        for name, was in before["processes"].items():
            grown = after["processes"][name]["descriptors"] - was["descriptors"]
            if grown > 0:
                failures.append(("descriptor", f"{name} has {grown} more than at the beginning"))
        if (grown := after["tmpfs"] - before["tmpfs"]) > 0:
            failures.append(("memory", f"{grown} bytes more in the hosts' tmpfs than at the beginning"))
        kept = None
        if failures:
            kept = Host.kept_in / f"tf-{self.seed}-requests"
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.requests, kept)
        self.tally.add_end("all hosts", failures, kept)
        self.report(before, after)

    def report(self, before, after):
        tally, ledger = self.tally, self.ledger
        print(f"\n{len(HOSTS)} hosts, seed {self.seed}: {tally.rounds} rounds in {self.elapsed:.0f} s\n")
        tally.report_deaths(VICTIMS)
        tally.report_counts([
            ("parts of locks taken", ledger.taken),
            ("  refused by a lock of another host", ledger.refused_by_others),
            ("  released by tf", ledger.released_by_tf),
            ("everything on a host was killed", tally.hosts_killed),
            (f"locks still held {one_host.DEAD_FOR:.0f} s after the processes died", tally.standing),
            ("  the same, where everything was killed", tally.standing_all),
            ("digest mismatches", tally.digests),
            ("pending requests of the last 20 min", sum(end["pending"] for end in self.ends)),
            ("rounds whose record only tf locks recover removed", tally.needed_recover),
            ("locks that only the last recover released", sum(end["said"].count("released") for end in self.ends)),
        ])
        print(f"\n{'long-lived processes':24}{'descriptors':>20}{'memory (RSS), MiB':>24}")
        for name, was in before["processes"].items():
            now = after["processes"][name]
            descriptors = f"{was['descriptors']} -> {now['descriptors']}"
            memory = f"{was['rss'] / 1024:.1f} -> {now['rss'] / 1024:.1f}"
            print(f"{name:24}{descriptors:>20}{memory:>24}")
        print(f"\nbytes in the hosts' tmpfs: {before['tmpfs']} -> {after['tmpfs']}")
        print(f"most memory of one tf process (RSS): {max(end['peak'] for end in self.ends) / 1024:.1f} MiB")
        for round, kept in tally.stories:
            tally.report_story(round, kept, f"seed {self.seed}, {tally.titles[id(round)]}")

    def stop(self):
        for host in self.hosts.values():
            # unshare takes its host with it.
            host.kill()
            host.wait()
            host.stdin.close()
        super().stop()


UNSHARE = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def check_machine():
    """Says what this machine lacks for a soak. None if it lacks nothing."""
    if os.geteuid() != 0:
        return "root is needed: each host is a set of namespaces (UTS, mount, PID)"
    if not os.path.exists("/etc/machine-id"):
        return "/etc/machine-id is missing: each host gets its own in that place"
    tried = subprocess.run([*UNSHARE, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if tried.returncode != 0:
        return f"no namespaces can be created here: {tried.stderr.strip()}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=1, help="start no new round after so long; 0.05 is 3 min (1)")
    parser.add_argument("--round", type=int, default=1, help="the number of each host's first round (1)")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--tf", default=str(HERE / "target/debug/tf"))
    parser.add_argument("--verbose", action="store_true", help="a line for each round")
    options = parser.parse_args()
    options.bare = False
    options.lease = None
    if lack := check_machine():
        sys.exit(f"soak: {lack}")
    # A crash of terraform is intended here.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    soak = None
    try:
        soak = Soak(options)
        soak.run()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit("soak: interrupted")
    except RuntimeError as error:
        sys.exit(f"soak: {error}")
    finally:
        if soak:
            soak.stop()
    sys.exit(1 if soak.tally.failures else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["host"]:
        be_host(json.loads(sys.argv[2]))
    else:
        main()
