"""Random deaths under random locks, against real terraform, and a count of what they leave behind.

In each round a holder applies, somebody of it is signalled at a random moment, contenders for the same state come and
go, and an ordinary `plan` ends it. What is drawn in a round depends on the seed and the round's number alone, so the
same seed brings the same deaths to tf and to bare terraform.

This file has two more parts to play, each in a process of its own: `proxy`, in front of the loopback cloud, and
`critical`, what the applies provision: a section that no two of them may be in. chaos/soak.py runs the same rounds on
several hosts at once.
"""

import argparse
import collections
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "demo"))
sys.dont_write_bytecode = True
from cloud import Cloud, configuration

KINDS = {"dynamodb": ["DynamoDB"], "lockfile": ["S3"], "both": ["DynamoDB", "S3"]}

# Who is signalled, and what that comes to where there is no tf.
VICTIMS = {
    "tf": "terraform",
    "terraform": "terraform",
    "tf+terraform": "terraform",
    "tf's group": "group",
    "terraform's group": "group",
    "both groups": "group",
    "all": "all",
    "shell": "shell",
}
SIGNALS = ["INT", "TERM", "HUP", "QUIT", "KILL", "two", "STOP+KILL"]
# KILL is what a lock is usually lost by; a shell's death is the least of these.
VICTIM_WEIGHTS = [3, 3, 3, 2, 2, 2, 4, 1]
SIGNAL_WEIGHTS = [2, 2, 2, 2, 5, 3, 2]

REFUSED = "Error acquiring the state lock"
REFUSED_BY = re.compile(r"^\W*ID:\s+([0-9a-f-]{36})", re.M)
# Terraform's own words for a lock that it had and does not find any more.
TAKEN = re.compile(r"failed to retrieve lock info|Error releasing the state lock|lock id .* does not match", re.I)
# A death between the write of the state and that of its digest. Terraform's own, and no lock's fault.
DIGEST = "state data in S3 does not have the expected content"
LOCK_ID = re.compile(rb'ID\\*":\s*\\*"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})')
ITEM_KEY = re.compile(rb'"bucket/([^"\\]+)"')

APPLY = ["apply", "-auto-approve", "-no-color", "-input=false"]

LOOK = 0.03
HUNG_AFTER = 60
STOPPED_FOR = 5
# So long after the last process of a tree has ended, nobody of it can be about to give its lock back.
DEAD_FOR = 1.0
# So long after it, none of its requests is on its way any more.
LANDED = 0.2


# The proxy.

def proxy(upstream, access_log, count=1):
    """Asks the cloud on a connection of its own for each request, and writes down who took and gave back what.

    MiniStack's server loses an answer now and then where a connection is used again. Each of `count` hosts has a port,
    so that each has a distance of its own to the cloud.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=128) for _ in range(count)]
    print(*(listener.getsockname()[1] for listener in listeners), flush=True)
    log = os.open(access_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    proxy.distance = [0] * count
    # Changes of a lock happen in the order in which the log has them.
    proxy.change = threading.Lock()

    def serve(client, host):
        with client:
            try:
                serve_one(client, upstream, log, host)
            except (OSError, ValueError):
                pass

    def accept(listener, host):
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0], host), daemon=True).start()

    for host, listener in enumerate(listeners):
        threading.Thread(target=accept, args=(listener, host), daemon=True).start()
    # Each line gives the distance between a host and the cloud, in seconds. This process exits when its stdin is closed.
    for line in sys.stdin:
        host, seconds = line.split()
        proxy.distance[int(host)] = float(seconds)


def serve_one(client, upstream, log, host):
    stream = client.makefile("rb")
    start = stream.readline()
    headers = {}
    for line in stream:
        name, colon, value = line.partition(b":")
        if not colon:
            break
        headers[name.strip().lower()] = value.strip()
    if headers.pop(b"expect", None):
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get(b"transfer-encoding") == b"chunked":
        body = b""
        while True:
            size = stream.readline()
            chunk = stream.read(int(size.split(b";")[0], 16) + 2)
            body += size + chunk
            if len(chunk) == 2:
                break
    else:
        length = int(headers.get(b"content-length", 0))
        body = stream.read(length)
        # Its sender died within the request: no service acts on half of one.
        if len(body) < length:
            return
    headers[b"connection"] = b"close"
    time.sleep(proxy.distance[host] / 2)
    began = time.time()
    method, path = start.decode().split(" ")[:2]
    operation = headers.get(b"x-amz-target", b"?").decode().split(".")[-1]
    agent = headers.get(b"user-agent", b"").decode()
    by = re.search(r"chaos/(\S+)", agent)
    lock, key = LOCK_ID.search(body), ITEM_KEY.search(body)
    changes = ".tflock" in path and method != "GET" or operation in ("PutItem", "DeleteItem", "UpdateItem")
    with proxy.change if changes else contextlib.nullcontext():
        with socket.create_connection(("127.0.0.1", upstream), timeout=30) as server:
            server.sendall(start + b"".join(b"%s: %s\r\n" % header for header in headers.items()) + b"\r\n" + body)
            answer = b""
            while piece := server.recv(1 << 16):
                answer += piece
        # Written before the response is sent, so that a client that sees a lock can find here who took it.
        os.write(log, (json.dumps({
            "time": round(began, 3),
            "host": host,
            "by": by.group(1) if by else agent.split(" ")[0],
            "what": f"{method} {path}" if method != "POST" else operation,
            "key": key.group(1).decode() if key else None,
            "md5": b"-md5" in body,
            "id": lock.group(1).decode() if lock else None,
            "status": int(answer.split(b" ", 2)[1]),
        }) + "\n").encode())
    time.sleep(proxy.distance[host] / 2)
    head, rest = answer.split(b"\r\n", 1)
    if b"\nconnection: close" not in answer.split(b"\r\n\r\n", 1)[0].lower():
        rest = b"Connection: close\r\n" + rest
    client.sendall(head + b"\r\n" + rest)


# The critical section.

def critical(port, key, flock):
    """Is alone for a while with the state's lock in the table, or says that it was not."""
    orders = json.loads(pathlib.Path("orders.json").read_text())
    cloud = Cloud.__new__(Cloud)
    cloud.port = port
    notes = os.open(orders["notes"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(**what):
        os.write(notes, (json.dumps({"time": round(time.time(), 3), "who": orders["who"], **what}) + "\n").encode())

    with open(flock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            note(overlaps=file.read())
        else:
            file.truncate(0)
            file.write(f"{orders['by']}, pid {os.getpid()}")
            file.flush()
        note(at="begin", locks={where: info["ID"] for where, info in cloud.locks(key)})
        time.sleep(orders["pause"])
        note(at="end", locks={where: info["ID"] for where, info in cloud.locks(key)})


# One round.

Process = collections.namedtuple("Process", "pid parent name state who")


def marked(mark):
    """The living processes whose environment has `mark`, a zombie not being one."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                variables = file.read().split(b"\0")
            who = next((value[len(mark):] for value in variables if value.startswith(mark)), None)
            if who is None:
                continue
            with open(f"/proc/{entry}/stat") as file:
                before, _, after = file.read().rpartition(")")
        except OSError:
            continue
        state, parent = after.split()[:2]
        if state not in "ZX":
            found.append(Process(int(entry), int(parent), before.partition("(")[2], state, who.decode()))
    return found


def draw(seed, number):
    """All that is random in a round, as fractions where it depends on how fast this machine is."""
    dice = random.Random(f"{seed}-{number}")
    kind = dice.choice(list(KINDS))
    who = dice.choices(list(VICTIMS), VICTIM_WEIGHTS)[0]
    how = dice.choices(SIGNALS, SIGNAL_WEIGHTS)[0]
    if how == "two":
        signals = [dice.choice(["INT", "TERM", "HUP", "QUIT", "KILL"]) for _ in range(2)]
        gap = 0.02
    elif how == "STOP+KILL":
        signals, gap = ["STOP", "KILL"], dice.uniform(0.02, 0.3)
    else:
        signals, gap = [how], 0
    plan = {
        "kind": kind, "who": who, "how": how, "signals": signals, "gap": gap, "order": dice.random(),
        "moment": dice.uniform(0, 1.2), "pause": dice.uniform(0, 0.6),
        "shell": dice.random() < 0.3 or who == "shell", "session": dice.random() < 0.3, "ci": dice.random() < 0.3,
        "stdout": dice.choice(["pipe", "file", "null"]),
        "contenders": [], "next_from": dice.choice(["holder", "holder", "next"]),
        # On loopback a request is hardly ever on its way when its sender dies. In the world it is.
        "distance": dice.choice([0, dice.uniform(0, 0.02), dice.uniform(0, 0.08)]),
    }
    for _ in range(dice.choice([0, 1, 1, 2, 2])):
        plan["contenders"].append({
            # From the deaths, or from the moment when nobody of the holder is alive any more.
            "after": dice.choice(["deaths", "deaths", "tree"]), "delay": dice.uniform(0, dice.choice([0.1, 0.4, 1.5])),
            "timeout": dice.choice(["0s", "20s"]), "pause": dice.uniform(0, 0.6),
        })
    return plan


class Command:
    """A terraform, or tf, that was started, and what it said."""

    def __init__(self, round, who, arguments, place, pause=0, shell=False, session=False, ci=False, stdout="file"):
        self.who = who
        self.signalled = False
        self.dead_since = None
        self.looks_dead = False
        self.dead_before = {}
        chaos = round.chaos
        directory = chaos.root / round.plan["kind"] / place
        notes = str(round.directory / "notes")
        (directory / "orders.json").write_text(
            json.dumps({"who": who, "by": f"{round.name}-{who}", "pause": pause, "notes": notes})
        )
        command = [chaos.program, *arguments]
        if shell:
            # With something to do afterwards, or the shell would become the command.
            command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", *command]
        self.output = round.directory / f"{who}.out"
        self.errors = round.directory / f"{who}.err"
        self.pipe = None
        end = None
        if stdout == "pipe":
            # What an apply says fits into a pipe: it is read at the end.
            self.pipe, end = os.pipe()
            os.set_blocking(self.pipe, False)
        elif stdout == "null":
            end = os.open(os.devnull, os.O_WRONLY)
        else:
            end = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        # Never in our own group, which is signalled with its members.
        apart = {"start_new_session": True} if session else {"preexec_fn": os.setpgrp}
        self.environment = dict(
            chaos.environment,
            CHAOS_ROUND=f"{chaos.root}/{round.number}/{who}", TF_APPEND_USER_AGENT=f"chaos/{round.name}-{who}",
            TFW_LOG=str(round.directory / "trace"), **({"CI": "true"} if ci else {}),
        )
        self.started = time.monotonic()
        round.say(f"{who} starts: {' '.join(arguments)} in {place}")
        with open(self.errors, "ab") as errors:
            self.process = subprocess.Popen(
                command, cwd=directory, env=self.environment, stdin=subprocess.DEVNULL, stdout=end, stderr=errors,
                **apart,
            )
        os.close(end)

    def ended(self):
        return self.process.poll() is not None

    def text(self):
        """All that it said."""
        if self.pipe is not None:
            try:
                while piece := os.read(self.pipe, 1 << 16):
                    with open(self.output, "ab") as file:
                        file.write(piece)
            except BlockingIOError:
                pass
        said = self.output.read_text(errors="replace") if self.output.exists() else ""
        return said + self.errors.read_text(errors="replace")

    def close(self):
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None


class Round:
    def __init__(self, chaos, number):
        self.chaos, self.number = chaos, number
        # In the cloud's log.
        self.name = chaos.name_of(number)
        self.plan = draw(chaos.seed, number)
        self.who = VICTIMS[self.plan["who"]] if chaos.bare else self.plan["who"]
        self.key = f"{self.plan['kind']}.tfstate"
        self.directory = chaos.root / f"round-{number}"
        self.directory.mkdir()
        self.mark = f"CHAOS_ROUND={chaos.root}/{number}/".encode()
        kind = self.plan["kind"]
        self.usual = chaos.usual[kind] + self.plan["pause"] + chaos.requests_usual[kind] * self.plan["distance"]
        self.began = time.monotonic()
        self.commands = {}
        self.failures = []
        self.hit = 0
        self.standing = self.continued = 0
        self.digest = False
        self.owners = {}

    def say(self, text):
        # In the story of the round, which is kept if it fails.
        with open(self.directory / "story", "a") as file:
            stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%H:%M:%S.%f")[:-3]
            file.write(f"{stamp} {time.monotonic() - self.began:7.3f} {text}\n")

    def fail(self, what, details):
        self.failures.append((what, details))
        self.say(f"FAILURE: {what}: {details}")

    def start(self, who, arguments, place, **how):
        self.commands[who] = command = Command(self, who, arguments, place, **how)
        return command

    def run(self):
        plan, chaos = self.plan, self.chaos
        chaos.reset(self.key)
        chaos.set_distance(plan["distance"])
        self.say(f"seed {chaos.seed}, round {self.number}, {chaos.program}: {json.dumps(plan)}")
        holder = self.start(
            "holder", [*APPLY, *self.more_of_holder], "holder", pause=plan["pause"],
            shell=plan["shell"], session=plan["session"], ci=plan["ci"], stdout=plan["stdout"],
        )
        self.until_the_moment(holder)
        for place, name in enumerate(plan["signals"]):
            if place:
                time.sleep(plan["gap"])
            self.strike(holder, name)
        self.wait(holder)
        self.next_command()
        self.judge()

    # What is different where others than the round's commands have the same states: chaos/soak.py.

    more_of_holder = ()

    def until_the_moment(self, holder):
        time.sleep(max(0, holder.started + self.plan["moment"] * self.usual - time.monotonic()))

    def meanwhile(self, since):
        """While the round's commands are waited for; `since` is when the deaths began."""

    def stale(self):
        """The locks that must not be there after the next command."""
        return self.locks()

    # Deaths.

    def strike(self, holder, name):
        """Sends a signal to whom it is meant for, in whatever order."""
        number = getattr(signal, f"SIG{name}")
        done = []
        # Whatever is forked while everything is killed must die as well.
        for _ in range(20):
            targets = self.targets(holder)
            if not targets:
                break
            random.Random(self.plan["order"]).shuffle(targets)
            for send, pid, role in targets:
                try:
                    send(pid, number)
                    done.append(f"{role} {pid}")
                except ProcessLookupError:
                    pass
            if self.who != "all" or name != "KILL":
                break
            # The shell is our child, and would be a zombie that somebody has to take away.
            holder.ended()
        self.say(f"SIG{name} to {self.who}: {', '.join(done) or 'nobody is there any more'}")
        if done:
            self.hit += 1
            holder.signalled |= self.who != "shell"

    def targets(self, holder):
        if self.who == "shell":
            return [] if holder.ended() else [(os.kill, holder.process.pid, "shell")]
        if self.who == "all":
            return [(os.kill, process.pid, process.name) for process in marked(self.mark) if process.who == "holder"]
        tf, terraform = self.tf(holder), None
        if self.who not in ("tf", "tf's group"):
            terraform = self.terraform(holder)
        group = lambda pid, role: [(os.killpg, os.getpgid(pid), f"group of {role}")] if pid else []
        alone = lambda pid, role: [(os.kill, pid, role)] if pid else []
        try:
            found = {
                "tf": lambda: alone(tf, "tf"),
                "terraform": lambda: alone(terraform, "terraform"),
                "tf+terraform": lambda: alone(tf, "tf") + alone(terraform, "terraform"),
                "tf's group": lambda: group(tf, "tf"),
                "terraform's group": lambda: group(terraform, "terraform"),
                "both groups": lambda: group(tf, "tf") + group(terraform, "terraform"),
                "group": lambda: group(terraform, "terraform"),
            }[self.who]()
        except ProcessLookupError:
            return []
        assert all(send is os.kill or pid != os.getpgrp() for send, pid, _ in found)
        return found

    def tf(self, holder):
        if holder.ended():
            return None
        if not self.plan["shell"]:
            return holder.process.pid
        processes = marked(self.mark)
        return next((process.pid for process in processes if process.parent == holder.process.pid), None)

    def terraform(self, holder):
        """Waits for it for a moment: under tf it comes a little later."""
        patience = time.monotonic() + 1
        while True:
            found = [process for process in marked(self.mark) if process.who == "holder"]
            for process in found:
                if is_terraform(process.pid):
                    return process.pid
            if not found or holder.signalled or time.monotonic() > patience:
                return None
            time.sleep(0.002)

    # The rest of the round.

    def look_around(self):
        """Who of the round is alive; notes since when nobody of a command is."""
        living = marked(self.mark)
        now = time.monotonic()
        for command in self.commands.values():
            dead = command.ended() and all(process.who != command.who for process in living)
            # In the middle of an exec an environment is empty: once is not enough.
            if not dead:
                command.dead_since = None
            elif command.looks_dead and command.dead_since is None:
                command.dead_since = now
                self.say(f"{command.who} and all that it started have ended ({command.process.returncode})")
            command.looks_dead = dead
        self.read_access_log()
        return living

    def read_access_log(self):
        for entry in self.chaos.new_requests():
            with open(self.directory / "requests", "a") as file:
                file.write(json.dumps(entry) + "\n")
            name, _, who = entry["by"].rpartition("-")
            takes = entry["what"] == "PutItem" and not entry["md5"] or re.match(r"PUT .*\.tflock", entry["what"])
            if takes and entry["id"]:
                self.note_owner(entry, name, who)

    def note_owner(self, entry, name, who):
        if name == self.name:
            self.owners[entry["id"]] = who

    def locks(self):
        return {where: info["ID"] for where, info in self.chaos.cloud.locks(self.key)}

    def wait(self, holder):
        """Starts the contenders, and waits until everybody has ended."""
        deaths = last = time.monotonic()
        pending = list(enumerate(self.plan["contenders"], 1))
        looked = False
        while True:
            living = self.look_around()
            now = time.monotonic()
            dead = holder.dead_since
            if now > deaths + STOPPED_FOR:
                self.go_on(living)
            self.meanwhile(deaths)
            for number, contender in list(pending):
                since = deaths if contender["after"] == "deaths" else dead and dead + DEAD_FOR
                if since is not None and now >= since + contender["delay"]:
                    pending.remove((number, contender))
                    last = now
                    before = {who: now - known.dead_since for who, known in self.commands.items() if known.dead_since}
                    self.start(
                        f"contender{number}", [*APPLY, f"-lock-timeout={contender['timeout']}"],
                        f"contender{number}", pause=contender["pause"],
                    ).dead_before = before
            if dead and not looked and now >= dead + LANDED:
                left = {where: lock for where, lock in self.locks().items() if self.owners.get(lock) == "holder"}
                looked = not left or now >= dead + DEAD_FOR
                if left and looked:
                    self.standing = 1
                    self.say(f"its lock stands {DEAD_FOR:.0f} s after the death of the holder's tree: {left}")
            if looked and not pending and all(command.dead_since for command in self.commands.values()):
                return
            if now > last + HUNG_AFTER:
                self.is_hung(living)
                return
            time.sleep(LOOK)

    def go_on(self, living):
        """What a person does with `fg`. With tf nothing may wait for that: whoever stopped it was killed or is dead."""
        for process in living:
            if process.state == "T":
                self.continued = 1
                if not self.chaos.bare:
                    self.fail("hung", f"{process.name} {process.pid} of {process.who} stands still, and nobody continues it")
                self.say(f"{process.who}: {process.name} {process.pid} is stopped, and is continued")
                try:
                    os.kill(process.pid, signal.SIGCONT)
                except ProcessLookupError:
                    pass

    def is_hung(self, living):
        left = "; ".join(f"{process.who}: {process.name} {process.pid}, state {process.state}" for process in living)
        self.fail("hung", f"after {HUNG_AFTER} s there are still {left or 'children of ours'}")
        for process in living:
            for name in ("status", "stack", "cmdline"):
                try:
                    text = pathlib.Path(f"/proc/{process.pid}/{name}").read_text(errors="replace").replace("\0", " ")
                    with open(self.directory / "hung", "a") as file:
                        file.write(f"--- {process.pid} {name}\n{text}\n")
                except OSError:
                    pass
        self.chaos.kill_all(self.mark)
        for command in self.commands.values():
            command.signalled = True
            command.process.wait()
            command.dead_since = command.dead_since or time.monotonic()

    def next_command(self):
        before = {who: time.monotonic() - command.dead_since for who, command in self.commands.items()}
        command = self.start("next", ["plan", "-no-color", "-input=false"], self.plan["next_from"])
        command.dead_before = before
        while command.dead_since is None:
            living = self.look_around()
            if time.monotonic() > command.started + HUNG_AFTER:
                self.is_hung(living)
                return
            time.sleep(LOOK)

    def judge(self):
        self.read_access_log()
        left = self.stale()
        if left:
            owners = ", ".join(sorted({self.owners.get(lock, "nobody known") for lock in left.values()}))
            self.fail("stale", f"{left} of {owners}")
        notes = self.directory / "notes"
        noted = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        for note in noted:
            if "overlaps" in note:
                self.fail("overlap", f"{note['who']} came while there was {note['overlaps']}")
        for command in self.commands.values():
            self.judge_command(command, [note for note in noted if note["who"] == command.who and "at" in note])
            command.close()

    def judge_command(self, command, sections):
        text = command.text()
        explained = False
        if DIGEST in text:
            self.digest = explained = True
        if words := TAKEN.search(text):
            explained = True
            self.fail("taken", f"{command.who} says: {words.group(0)}")
        if not command.signalled:
            whole = KINDS[self.plan["kind"]]
            for note in sections:
                mine = [lock for lock in note["locks"].values() if self.owners.get(lock) == command.who]
                if sorted(note["locks"]) != whole or len(mine) != len(whole) or len(set(mine)) != 1:
                    self.fail("taken", f"at the {note['at']} of its section {command.who} saw {note['locks']}")
            if len(sections) == 2 and sections[0]["locks"] != sections[1]["locks"]:
                self.fail("taken", f"within its section the lock of {command.who} changed")
        if REFUSED in text:
            explained = True
            by = {self.owners.get(lock, "nobody known") for lock in REFUSED_BY.findall(text)}
            self.say(f"{command.who} was refused by the lock of {', '.join(sorted(by)) or '?'}")
            for who in by:
                if command.dead_before.get(who, 0) > DEAD_FOR:
                    what = "next refused" if command.who == "next" else "refused"
                    self.fail(what, f"{command.who} by the lock of {who}, dead for {command.dead_before[who]:.1f} s")
        signalled = command.signalled or (command.who == "holder" and self.who == "shell")
        if command.process.returncode != 0 and not signalled and not explained:
            self.fail("otherwise", f"{command.who} ended with {command.process.returncode}")

    def describe(self):
        plan = self.plan
        contenders = ", ".join(
            f"{contender['timeout']} {contender['delay']:.1f} s after {contender['after']}"
            for contender in plan["contenders"]
        )
        how = "+".join(plan["signals"]) if plan["how"] == "two" else plan["how"]
        more = [word for word in ("shell", "session", "ci") if plan[word]] + [plan["stdout"]]
        return (
            f"{plan['kind']:8} {self.who:17} {how:9} {'at' if self.hit else 'missed,'} "
            f"{plan['moment'] * self.usual:.2f} s of {self.usual:.2f}, {' '.join(more)}, "
            f"{plan['distance'] * 1000:.0f} ms away; contenders: {contenders or 'none'}"
        )


def is_terraform(pid):
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "terraform"
    except OSError:
        return False


# All rounds.

class Chaos:
    kept_in = HERE / "target/chaos"

    def __init__(self, options, hosts=1):
        self.seed, self.bare, self.lease = options.seed, options.bare, options.lease
        self.program = "terraform" if self.bare else "tf"
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="tf-chaos-")).resolve()
        self.cloud = Cloud()
        self.requests = self.root / "requests"
        self.requests.touch()
        self.read_to = 0
        self.usual, self.requests_usual = {}, {}
        self.proxy = subprocess.Popen(
            [sys.executable, __file__, "proxy", str(self.cloud.port), str(self.requests), str(hosts)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        self.ports = [int(port) for port in self.proxy.stdout.readline().split()]
        (self.root / "bin").mkdir()
        if not self.bare:
            # A copy: it may be built anew while we run.
            shutil.copy2(options.tf, self.root / "tf")
            (self.root / "bin" / "tf").symlink_to(self.root / "tf")
        self.environment = self.environment_of(self.root / "bin", self.ports[0])

    def environment_of(self, programs, port):
        """What commands run with, below `root`, where this makes their home and their state directory."""
        for name in ("home", "state"):
            (self.root / name).mkdir(mode=0o700)
        return {
            "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(self.root / "home"),
            "TERM": os.environ.get("TERM", "dumb"), "CHECKPOINT_DISABLE": "1",
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "TFW_STATE_DIR": str(self.root / "state"),
            **({"TFW_LEASE": self.lease, "TFW_CLOCK": "steady"} if self.lease else {}),
        }

    def name_of(self, number):
        return str(number)

    def prepare(self):
        for kind, halves in KINDS.items():
            first = self.root / kind / "holder"
            first.mkdir(parents=True)
            key = f"{kind}.tfstate"
            # The command becomes our program, so that terraform's end of it is its end. Replaced each time: every apply
            # has its section.
            command = f"exec {sys.executable} -I {__file__} critical {self.cloud.port} {key} {self.root}/{kind}.flock"
            resource = f"""
resource "terraform_data" "critical" {{
  triggers_replace = timestamp()
  provisioner "local-exec" {{
    command = {json.dumps(command)}
  }}
}}
"""
            (first / "main.tf").write_text(configuration(key, resource, halves))
            subprocess.run(
                ["terraform", "init", "-no-color", "-input=false"], cwd=first, env=self.environment, check=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )
            for name in ("contender1", "contender2", "next"):
                shutil.copytree(first, self.root / kind / name)
            self.measure(kind)

    def measure(self, kind):
        """How long an apply takes here that provisions for no time, and how many requests it is."""
        directory = self.root / kind / "holder"
        (directory / "orders.json").write_text(
            json.dumps({"who": "measured", "by": "measured", "pause": 0, "notes": str(self.root / "notes")})
        )
        # The first is a warm-up.
        for _ in range(2):
            self.reset(f"{kind}.tfstate")
            collections.deque(self.new_requests(), maxlen=0)
            began = time.monotonic()
            subprocess.run(
                ["terraform" if self.bare else self.root / "bin/tf", "apply", "-auto-approve", "-no-color"],
                cwd=directory, env=dict(self.environment, CHAOS_ROUND=f"{self.root}/0/measured"), check=True,
                timeout=HUNG_AFTER, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )
            self.usual[kind] = time.monotonic() - began
            self.requests_usual[kind] = len(list(self.new_requests()))

    def set_distance(self, seconds):
        self.proxy.stdin.write(f"0 {seconds}\n".encode())
        self.proxy.stdin.flush()

    def new_requests(self):
        with open(self.requests, "rb") as file:
            file.seek(self.read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.read_to += len(line)
                yield json.loads(line)

    def reset(self, key):
        self.cloud.unlock(key)
        self.cloud.dynamodb("DeleteItem", {"TableName": "locks", "Key": {"LockID": {"S": f"bucket/{key}-md5"}}})
        self.cloud.ask("DELETE", f"/bucket/{key}")

    def kill_all(self, mark):
        for _ in range(50):
            living = marked(mark)
            if not living:
                return
            for process in living:
                try:
                    os.kill(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.01)

    def keep(self, round):
        """What is left of a round, for whoever asks why it failed."""
        place = self.kept_in / f"{self.program}-{self.seed}-{round.number}"
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(round.directory, place)
        state = self.root / "state"
        shutil.copytree(state, place / "state", symlinks=True)
        return place

    def forget_state(self):
        """What a failed round has left must not fail the next one."""
        shutil.rmtree(self.root / "state", ignore_errors=True)
        (self.root / "state").mkdir(mode=0o700)

    def stop(self):
        self.kill_all(f"CHAOS_ROUND={self.root}/".encode())
        self.proxy.stdin.close()
        self.proxy.wait()
        self.cloud.stop()
        shutil.rmtree(self.root, ignore_errors=True)


class Tally:
    """What came of the rounds."""

    ROWS = [
        ("stale", "stale locks after the next command"),
        ("taken", "locks released while their holder was alive"),
        ("overlap", "overlapping critical sections"),
        ("hung", "hung runs"),
        ("refused", "contenders refused by a dead lock"),
        ("next refused", "next commands refused by a dead lock"),
        ("otherwise", "commands that failed otherwise, unsignalled"),
    ]

    def __init__(self):
        self.rounds = self.missed = self.standing = self.standing_all = self.continued = self.digests = 0
        self.deaths = collections.Counter()
        self.failures = collections.Counter()
        self.stories = []

    def add(self, round, kept):
        self.rounds += 1
        if round.hit:
            self.deaths[round.who, round.plan["how"]] += 1
        else:
            self.missed += 1
        if round.who == "all":
            self.standing_all += round.standing
        else:
            self.standing += round.standing
        self.continued += round.continued
        self.digests += round.digest
        # A round fails once in each way, however often it was seen.
        for what in {what for what, _ in round.failures}:
            self.failures[what] += 1
        if kept:
            self.stories.append((round, kept))

    def report(self, chaos, seconds):
        print(f"\n{chaos.program}, seed {chaos.seed}: {self.rounds} rounds in {seconds:.0f} s\n")
        self.report_deaths(VICTIMS.values() if chaos.bare else VICTIMS)
        self.report_counts([
            (f"locks still held {DEAD_FOR:.0f} s after the processes died", self.standing),
            ("  the same, where everything was killed", self.standing_all),
            (f"runs that were stopped for {STOPPED_FOR} s and continued", self.continued),
            ("digest mismatches", self.digests),
        ])
        for round, kept in self.stories:
            self.report_story(round, kept, f"seed {chaos.seed}, round {round.number}")
            print(f"  again: chaos/chaos.py --seed {chaos.seed} --round {round.number}{' --bare' * chaos.bare}")

    def report_deaths(self, whos):
        whos = list(dict.fromkeys(whos))
        print(f"{'deaths':18}" + "".join(f"{how:>10}" for how in SIGNALS) + f"{'together':>10}")
        for who in whos:
            counts = [self.deaths[who, how] for how in SIGNALS]
            print(f"{who:18}" + "".join(f"{count or '-':>10}" for count in counts) + f"{sum(counts) or '-':>10}")
        counts = [sum(self.deaths[who, how] for who in whos) for how in SIGNALS]
        print(f"{'together':18}" + "".join(f"{count or '-':>10}" for count in counts) + f"{sum(counts) or '-':>10}")
        print(f"{'after the exit':18}" + " " * 10 * len(SIGNALS) + f"{self.missed or '-':>10}\n")

    def report_counts(self, information):
        for what, name in self.ROWS:
            print(f"{name:50}{self.failures[what]:6}")
        print("for information")
        for name, count in information:
            print(f"{name:50}{count:6}")

    def report_story(self, round, kept, title):
        print(f"\n{title}: {round.describe()}")
        for what, details in round.failures:
            print(f"  {what}: {details}")
        print(f"  kept in {kept}")


def run(options):
    began = time.monotonic()
    chaos, tally = None, Tally()
    try:
        chaos = Chaos(options)
        chaos.prepare()
        number = options.round or 1
        while True:
            if options.rounds is not None:
                if tally.rounds >= options.rounds:
                    break
            elif time.monotonic() - began >= options.seconds:
                break
            plan = draw(options.seed, number)
            if not {plan["kind"], plan["who"], plan["how"]} >= set(options.only):
                number += 1
                continue
            round = Round(chaos, number)
            round.run()
            kept = None
            if options.keep or (round.failures and not chaos.bare):
                kept = chaos.keep(round)
            if round.failures:
                chaos.kill_all(round.mark)
                chaos.forget_state()
            else:
                shutil.rmtree(round.directory, ignore_errors=True)
            tally.add(round, kept if round.failures else None)
            if options.verbose:
                came = ", ".join(sorted({what for what, _ in round.failures})) or "well"
                print(f"{number:4} {time.monotonic() - round.began:5.1f} s  {round.describe()}: {came}", flush=True)
            number += 1
    except KeyboardInterrupt:
        # Once is enough: what follows takes a second.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted: the round at hand does not count", file=sys.stderr)
    finally:
        if chaos:
            chaos.stop()
    if chaos:
        tally.report(chaos, time.monotonic() - began)
    return 1 if tally.failures and not options.bare else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="start no new round after so long (60)")
    parser.add_argument("--rounds", type=int, help="so many rounds, however long they take")
    parser.add_argument("--round", type=int, help="begin with this round; with nothing else said, run it alone")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--bare", action="store_true", help="terraform without tf, for comparison; never fails")
    parser.add_argument("--lease", metavar="LENGTH", help="run with TFW_LEASE=LENGTH")
    parser.add_argument("--tf", default=str(HERE / "target/debug/tf"))
    parser.add_argument("--keep", action="store_true", help="keep every round, and not only those that failed")
    parser.add_argument("--verbose", action="store_true", help="a line for each round")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD",
        help=f"only rounds with this lock, victim or signal: {', '.join([*KINDS, *VICTIMS, *SIGNALS])}",
    )
    options = parser.parse_args()
    if unknown := set(options.only) - {*KINDS, *VICTIMS, *SIGNALS}:
        parser.error(f"--only does not know {', '.join(sorted(unknown))}")
    if options.round and options.rounds is None:
        options.rounds = 1
    # A crash of terraform's is on purpose here.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(options))


if __name__ == "__main__":
    if sys.argv[1:2] == ["proxy"]:
        proxy(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["critical"]:
        critical(int(sys.argv[2]), *sys.argv[3:])
    else:
        main()
