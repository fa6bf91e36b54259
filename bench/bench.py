"""What tf costs, as paired differences against bare terraform in one run.

In each round, every command runs once, one after the other, and the next round begins with another one. So what the
machine does meanwhile meets all of them alike. What is reported is the median of the differences, and the quartiles.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "demo"))
from cloud import WAITS, Cloud, Work, provisioner


@contextlib.contextmanager
def ahead_of_others(is_asked):
    """Runs this process and everything that it starts before the processes of others (SCHED_RR, needs root)."""
    if is_asked:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        if is_asked:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


is_busy = False


class With:
    """A command with variables of its own."""

    started = False

    def __init__(self, command, **variables):
        self.command, self.variables = command, variables

    def until_started(self):
        self.started = True
        return self


def once(work, command, environment=None):
    """Runs a command. Returns the milliseconds until it ended, or, with `With.started`, until it printed something."""
    started = isinstance(command, With) and command.started
    if isinstance(command, With):
        environment = {**(environment or work.environment), **command.variables}
        command = command.command
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=work.directory, env=environment or work.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if started else subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    if started:
        os.read(process.stdout.fileno(), 1)
        spent = (time.perf_counter() - begun) * 1000
        process.communicate()
        return spent, process.returncode
    process.wait()
    return (time.perf_counter() - begun) * 1000, process.returncode


def rounds(work, commands, count, environment=None, code=0):
    """Runs every command once a round, in an order that turns by one from round to round.

    Returns, for each command, its milliseconds in each round in which every command ended with `code`.
    """
    with ahead_of_others(is_busy):
        return rounds_now(work, commands, count, environment, code)


def rounds_now(work, commands, count, environment, expected):
    times = {name: [] for name in commands}
    names = list(commands)
    for attempt in range(2 * count + 20):
        if len(times[names[0]]) == count:
            return times
        turn = attempt % len(names)
        seen = {}
        for name in names[turn:] + names[:turn]:
            seen[name], code = once(work, commands[name], environment)
            if code != expected:
                break
        # The servers on the loopback interface lose an answer now and then; such a round measures something else.
        if code != expected:
            if expected == 0:
                work.cloud.unlock(work.key)
            continue
        for name in names:
            times[name].append(seen[name])
    sys.exit(f"{commands} fail again and again")


def more(times, name, than="bare"):
    """The quartiles of what `name` took more than `than` in the same round."""
    return statistics.quantiles([wrapped - bare for wrapped, bare in zip(times[name], times[than])], n=4)


def pairs(work, bare, wrapped, count, environment=None):
    times = rounds(work, {"bare": bare, "wrapped": wrapped}, count, environment)
    return statistics.median(times["bare"]), more(times, "wrapped")


def line(name, bare, quartiles, aim=""):
    low, middle, high = quartiles
    print(f"{name:44} {bare:9.2f} {middle:+9.2f}   {low:+.2f} .. {high:+.2f}   {aim}", flush=True)


# The most milliseconds that the explanation of a refusal may take.
REFUSED = 150


def refused(cloud, program, few):
    """What the explanation of a refusal adds, in a bucket with the states of 500 workspaces. Returns the milliseconds."""
    work = Work(cloud, provisioner("true"), key="refused.tfstate", programs=[("tf", program)])
    for number in range(500):
        cloud.ask("PUT", f"/bucket/env:/workspace-{number}/{work.key}", b"{}")
    info = {"ID": "22222222-3333-4444-5555-666666666666", "Operation": "OperationTypeApply", "Info": "", "Who": "anna@ci-7",
            "Version": "1.11.4", "Created": "2026-01-02T03:04:05.678Z", "Path": f"bucket/{work.key}"}
    item = {"LockID": {"S": f"bucket/{work.key}"}, "Info": {"S": json.dumps(info)}}
    cloud.dynamodb("PutItem", {"TableName": "locks", "Item": item})
    commands = {"bare": ["terraform", "plan"], "wrapped": [str(work.root / "bin/tf"), "plan"]}
    times = rounds(work, commands, 40 // few, code=1)
    quartiles = more(times, "wrapped")
    line("a refused plan, 500 workspaces", statistics.median(times["bare"]), quartiles, f"limit: +{REFUSED}")
    cloud.unlock(work.key)
    work.remove()
    return quartiles[1]


def resident(pid):
    total = 0
    for name in ("smaps_rollup",):
        text = pathlib.Path(f"/proc/{pid}/{name}").read_text()
        total = int(re.search(r"^Pss:\s+(\d+)", text, re.M).group(1))
    return total


def ours(pid):
    """The pids of tf and of its helpers, by name."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    named = {pathlib.Path(f"/proc/{child}/comm").read_text().strip(): int(child) for child in children}
    return {"tf": pid, **{name: child for name, child in named.items() if name.startswith("tf-")}}


def ran(pid):
    """The seconds for which the threads of a process were on a processor."""
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


class Counter:
    """Passes the bytes between a client and the cloud on, and lists the requests."""

    def __init__(self, cloud):
        self.cloud, self.requests = cloud, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client = self.listener.accept()[0]
            server = socket.create_connection(("127.0.0.1", self.cloud.port))
            threading.Thread(target=self.copy, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self.copy, args=(server, client, False), daemon=True).start()

    def copy(self, source, target, asks):
        try:
            while data := source.recv(1 << 16):
                if asks and (line := re.match(rb"[A-Z]+ \S+ HTTP/1\.1\r\n", data)):
                    operation = re.search(rb"(?i)x-amz-target: *\S+\.(\w+)", data)
                    self.requests.append((operation[1] if operation else line[0]).decode().strip())
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tf", default=str(HERE / "target/release/tf"))
    parser.add_argument("--before", help="an earlier tf, to compare the supervised path with")
    parser.add_argument("--busy", action="store_true", help="this machine has other load: run before it, with SCHED_RR")
    parser.add_argument("--lease", action="store_true", help="only what a lease costs")
    parser.add_argument("--beside", help="another build of the same tf: only how much longer that one takes")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    global is_busy
    is_busy = options.busy
    few = 5 if options.quick else 1
    cloud = Cloud()
    try:
        title()
        with tempfile.TemporaryDirectory() as copies:
            tf, before, other = (copied(program, copies, name) for name, program in
                                 [("tf", options.tf), ("before", options.before), ("other", options.beside)])
            if other:
                beside(cloud, tf, other, few)
                return
            if not options.lease:
                measure(cloud, tf, few)
                print()
            lease(cloud, tf, before, few)
    finally:
        cloud.stop()


def copied(program, directory, name):
    """Copies a program to `directory`, and returns the copy; `None` for `None`.

    How a file lies in the page cache depends on how it was written, and the time to map its pages depends on that: of two
    files with the same content, one took 0.3 ms more to start and 1.7 ms more to supervise. Copies are all written in the
    same way.
    """
    return program and pathlib.Path(shutil.copy(program, pathlib.Path(directory) / name))


def title():
    print(f"{os.uname().sysname} {os.uname().release}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(subprocess.run(["terraform", "version"], capture_output=True, text=True, env={**os.environ, "CHECKPOINT_DISABLE": "1"}).stdout.splitlines()[0])
    print()


def measure(cloud, tf, few):
    print(f"{'milliseconds':44} {'bare':>9} {'more':>9}   quartiles")
    work = Work(cloud, provisioner("true"), programs=[("tf", tf)])
    stub = work.root / "stub"
    shutil.copy("/bin/true", stub)
    environment = dict(work.environment, TFW_TERRAFORM=str(stub))
    program = str(work.root / "bin/tf")
    count = 600 // few
    nothing = [str(stub), "plan"]
    commands = {
        "bare": nothing,
        "a command that cannot lock (exec)": [program, "version"],
        "a command that can (supervised)": [program, "plan"],
    }
    for other, options in {"tini": ["-s", "--"], "dumb-init": ["--"], "timeout": ["60"]}.items():
        path = shutil.which(other)
        if path:
            commands[f"  for comparison: {other}"] = [path, *options, *nothing]
        else:
            print(f"  {other} is not installed, so it is not measured")
    times = rounds(work, commands, count, environment)
    bare = statistics.median(times["bare"])
    aims = {"a command that cannot lock (exec)": "aim: +1", "a command that can (supervised)": "aim: +2"}
    for name in list(commands)[1:]:
        line(name, bare, more(times, name), aims.get(name, ""))
    if "  for comparison: tini" in commands:
        tini = more(times, "  for comparison: tini")[1]
        ratios = [more(times, name)[1] / tini for name in aims]
        print(f"what tini costs, times: exec {ratios[0]:.2f}, supervised {ratios[1]:.2f}   aim: 1 and 2", flush=True)
    bare, quartiles = pairs(work, ["terraform", "plan"], [program, "plan"], 60 // few)
    line("a real plan", bare, quartiles, f"ratio {1 + quartiles[1] / bare:.3f}, aim 1.02")
    work.remove()

    many = Work(cloud, 'resource "terraform_data" "many" {\n  count = 500\n}\n', key="many.tfstate", programs=[("tf", tf)])
    bare, quartiles = pairs(many, ["terraform", "plan"], [str(many.root / "bin/tf"), "plan"], 24 // few)
    line("a plan of 500 resources", bare, quartiles, f"ratio {1 + quartiles[1] / bare:.3f}, aim 1.02")
    many.remove()
    explained = refused(cloud, tf, few)

    released, gone, memory = [], [], []
    work = Work(cloud, provisioner(WAITS), key="killed.tfstate", programs=[("tf", tf)])
    work.environment["TFW_LOG"] = str(work.directory / "trace")
    for _ in range(30 // few):
        work.forget("began", "go", "trace")
        run = work.start(["tf", "apply", "-auto-approve"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        work.wait_for("began")
        memory.append(sum(resident(pid) for pid in ours(run.pid).values()))
        os.kill(work.terraform(), signal.SIGKILL)
        run.wait()
        gone.append(any(cloud.locks("killed.tfstate")))
        stamps = {}
        for entry in (work.directory / "trace").read_text().splitlines():
            stamp, _, text = entry.split(" ", 2)
            seconds = sum(float(part) * 60 ** power for power, part in enumerate(reversed(stamp[11:-1].split(":"))))
            for key in ("terraform ended", "the tree is dead", "deleted"):
                if text.startswith(key):
                    stamps[key] = seconds
        released.append((stamps["deleted"] - stamps["the tree is dead"]) * 1000)
    work.remove()
    print()
    print(f"from the death of terraform's processes until both parts of the lock are deleted: median {statistics.median(released):.0f} ms, "
          f"worst {max(released):.0f} ms   aim: 100")
    print(f"locks left after {len(gone)} kills: {sum(gone)}")
    print(f"memory of tf and its guardian while terraform runs (PSS): {statistics.median(memory) / 1024:.1f} MiB   aim: 8")
    print(f"size of the binary: {tf.stat().st_size / 1e6:.1f} MB")
    if explained > REFUSED:
        sys.exit(f"the explanation of a refusal takes {explained:.0f} ms; the limit is {REFUSED} ms")


def beside(cloud, tf, other, few):
    """What another build of the same tf takes more than `tf`."""
    print(f"{'milliseconds':44} {'tf':>9} {'more':>9}   quartiles")
    work = Work(cloud, provisioner("true"), key="beside.tfstate", programs=[("tf", tf), ("tf-other", other)])
    stub = work.root / "stub"
    shutil.copy("/bin/true", stub)
    environment = dict(work.environment, TFW_TERRAFORM=str(stub))
    program = str(work.root / "bin/tf")
    leased = dict(TFW_LEASE="5m", TFW_CLOCK="steady")
    for name, subcommand, variables in [("exec", "version", {}), ("supervised", "plan", {}),
                                        ("a whole run with TFW_LEASE, with the look", "plan", leased)]:
        commands = {"tf": With([program, subcommand], **variables), "other": With([program + "-other", subcommand], **variables)}
        times = rounds(work, commands, 300 // few, environment)
        line(name, statistics.median(times["tf"]), more(times, "other", "tf"))
    work.remove()


def lease(cloud, tf, before, few):
    """What TFW_LEASE costs."""
    print(f"{'milliseconds':44} {'without':>9} {'more':>9}   quartiles")
    work = Work(cloud, provisioner("true"), key="lease.tfstate", programs=[("tf", tf), ("tf-before", before)][: 2 if before else 1])
    stub = work.root / "stub"
    shutil.copy("/bin/true", stub)
    environment = dict(work.environment, TFW_TERRAFORM=str(stub), TFW_CLOCK="steady")
    program = str(work.root / "bin/tf")
    # `never` leaves out the look at the lock before terraform starts, and nothing else.
    plan = lambda **variables: With([program, "plan"], **variables)
    leased = dict(TFW_LEASE="5m", TFW_RELEASE="never")
    commands = {"unset": plan(), "set": plan(**leased), "unfenced": plan(**leased, TFW_CLOCK="")}
    if before:
        commands["before"] = [program + "-before", "plan"]
    times = rounds(work, commands, 600 // few, environment)
    median = lambda name: statistics.median(times[name])
    if before:
        line("TFW_LEASE unset, against before the lease", median("before"), more(times, "unset", "before"), "limit: 0.1")
    line("set, a whole run without a lock", median("unset"), more(times, "set", "unset"))
    line("  the same on a host without a fence", median("unset"), more(times, "unfenced", "unset"))
    # In the place of terraform, a program that prints a word: the time until terraform starts.
    prints = dict(environment, TFW_TERRAFORM=shutil.which("echo"))
    commands = {name: command.until_started() for name, command in commands.items() if name != "before"}
    times = rounds(work, commands, 600 // few, prints)
    line("set, until terraform starts", median("unset"), more(times, "set", "unset"), "limit: +0.6")
    line("  the same on a host without a fence", median("unset"), more(times, "unfenced", "unset"))
    commands = {"without": plan(**leased).until_started(), "with": plan(TFW_LEASE="5m").until_started()}
    times = rounds(work, commands, 200 // few, prints)
    line("the look before terraform starts", median("without"), more(times, "with", "without"))
    counter = Counter(cloud)
    once(work, plan(TFW_LEASE="5m", AWS_ENDPOINT_URL=counter.url), environment)
    print(f"{'  its requests':44} {' '.join(counter.requests)}")
    commands = {"unset": plan(), "without the look": plan(**leased), "set": plan(TFW_LEASE="5m")}
    for command in commands.values():
        command.variables["TFW_CLOCK"] = "steady"
    times = rounds(work, commands, 60 // few)
    line("a real plan, set, without the look", median("unset"), more(times, "without the look", "unset"))
    line("a real plan, set", median("unset"), more(times, "set", "unset"))
    work.remove()

    work = Work(cloud, provisioner(WAITS), key="held.tfstate", programs=[("tf", tf)])
    work.environment.update(TFW_LEASE="1m", TFW_CLOCK="steady")
    run = work.start(["tf", "apply", "-auto-approve"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    item = lambda: cloud.dynamodb("GetItem", {"TableName": "locks", "Key": {"LockID": {"S": "bucket/held.tfstate"}}})["Item"]
    work.wait_for("began")
    for _ in range(200):
        if "tf" in item():
            break
        time.sleep(0.05)
    else:
        sys.exit("no lease on the lock")
    time.sleep(1)
    processes = ours(run.pid)
    begun, first = time.monotonic(), {name: ran(pid) for name, pid in processes.items()}
    record = item()["tf"]
    time.sleep(60)
    spent = {name: ran(pid) - first[name] for name, pid in processes.items()}
    elapsed = time.monotonic() - begun
    memory = {name: resident(pid) / 1024 for name, pid in processes.items()}
    renewed = record != item()["tf"]
    (work.directory / "go").touch()
    run.wait()
    work.remove()
    print()
    print(f"while the lock is held, with a lease of 1 min (renewed meanwhile: {renewed})")
    print(f"{'':14} {'PSS, MiB':>9} {'ms of processor time in 60 s':>29} {'until then':>11}")
    for name in processes:
        print(f"{name:14} {memory[name]:9.1f} {spent[name] * 1000:29.1f} {first[name] * 1000:11.1f}")
    share = sum(spent.values()) / elapsed
    print(f"{'together':14} {sum(memory.values()):9.1f} {sum(spent.values()) * 1000:29.1f} {sum(first.values()) * 1000:11.1f}")
    print(f"memory: {sum(memory.values()):.1f} MiB, limit: 24; processor: {share:.3%} of a core, limit: 0.2 %")


main()
