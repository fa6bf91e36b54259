"""What tf costs, as paired differences against bare terraform in one run.

In each round, every command runs once, one after the other, and the next round begins with another one. So what the
machine does meanwhile meets all of them alike. What is reported is the median of the differences, and the quartiles.
"""

import argparse
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "demo"))
from cloud import WAITS, Cloud, Work, provisioner, terraform_below


def once(work, command, environment=None):
    begun = time.perf_counter()
    process = subprocess.run(
        command, cwd=work.directory, env=environment or work.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    return (time.perf_counter() - begun) * 1000, process.returncode


def rounds(work, commands, count, environment=None):
    """Runs every command once a round, in an order that turns by one from round to round.

    Returns, for each command, its milliseconds in each round in which every command ended with 0.
    """
    times = {name: [] for name in commands}
    names = list(commands)
    for attempt in range(2 * count + 20):
        if len(times[names[0]]) == count:
            return times
        turn = attempt % len(names)
        seen = {}
        for name in names[turn:] + names[:turn]:
            seen[name], code = once(work, commands[name], environment)
            if code != 0:
                break
        # The servers on the loopback interface lose an answer now and then; such a round measures something else.
        if code != 0:
            work.cloud.unlock(work.key)
            continue
        for name in names:
            times[name].append(seen[name])
    sys.exit(f"{commands} fail again and again")


def more(times, name):
    """The quartiles of what `name` took more than bare in the same round."""
    return statistics.quantiles([wrapped - bare for wrapped, bare in zip(times[name], times["bare"])], n=4)


def pairs(work, bare, wrapped, count, environment=None):
    times = rounds(work, {"bare": bare, "wrapped": wrapped}, count, environment)
    return statistics.median(times["bare"]), more(times, "wrapped")


def line(name, bare, quartiles, aim=""):
    low, middle, high = quartiles
    print(f"{name:44} {bare:9.2f} {middle:+9.2f}   {low:+.2f} .. {high:+.2f}   {aim}", flush=True)


def resident(pid):
    total = 0
    for name in ("smaps_rollup",):
        text = pathlib.Path(f"/proc/{pid}/{name}").read_text()
        total = int(re.search(r"^Pss:\s+(\d+)", text, re.M).group(1))
    return total


def ours(pid):
    """tf, and its guardian."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    named = lambda child: pathlib.Path(f"/proc/{child}/comm").read_text().strip()
    return [pid] + [int(child) for child in children if named(child) == "tf-guardian"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tf", default=str(HERE / "target/release/tf"))
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    few = 5 if options.quick else 1
    tf = pathlib.Path(options.tf).resolve()
    cloud = Cloud()
    try:
        measure(cloud, tf, few)
    finally:
        cloud.stop()


def measure(cloud, tf, few):
    print(f"{os.uname().sysname} {os.uname().release}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(subprocess.run(["terraform", "version"], capture_output=True, text=True, env={**os.environ, "CHECKPOINT_DISABLE": "1"}).stdout.splitlines()[0])
    print()
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

    released, gone, memory = [], [], []
    work = Work(cloud, provisioner(WAITS), key="killed.tfstate", programs=[("tf", tf)])
    work.environment["TFW_LOG"] = str(work.directory / "trace")
    for _ in range(30 // few):
        work.forget("began", "go", "trace")
        run = work.start(["tf", "apply", "-auto-approve"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        work.wait_for("began")
        memory.append(sum(resident(pid) for pid in ours(run.pid)))
        os.kill(terraform_below(run.pid), signal.SIGKILL)
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


main()
