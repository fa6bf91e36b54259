"""What tf costs, as paired differences against bare terraform in one run.

Every pair runs the two one after the other, and the next pair the other way round, so that what the machine does
meanwhile meets both alike. Reported are medians of the differences, and quartiles.
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


def pairs(work, bare, wrapped, count, environment=None):
    bares, differences, round = [], [], 0
    while len(differences) < count:
        round += 1
        order = [bare, wrapped] if round % 2 == 0 else [wrapped, bare]
        times = {}
        for command in order:
            times[command is wrapped], code = once(work, command, environment)
            # The loopback cloud loses an answer now and then; such a pair measures something else.
            if code != 0:
                work.cloud.unlock(work.key)
                times = None
                break
        if times is None:
            if round > 2 * count + 20:
                sys.exit(f"{wrapped} or {bare} fails again and again")
            continue
        bares.append(times[False])
        differences.append(times[True] - times[False])
    quartiles = statistics.quantiles(differences, n=4)
    return statistics.median(bares), quartiles


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
    line("a command that cannot lock (exec)", *pairs(work, [str(stub), "version"], [program, "version"], count, environment), "aim: +1")
    line("a command that can (supervised)", *pairs(work, [str(stub), "plan"], [program, "plan"], count, environment), "aim: +2")
    for other in ("tini", "dumb-init", "timeout"):
        path = shutil.which(other)
        if path:
            arguments = {"tini": ["-s", "--"], "dumb-init": ["--"], "timeout": ["60"]}[other]
            line(f"  beside it: {other}", *pairs(work, [str(stub)], [path, *arguments, str(stub)], count // 2, environment))
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
    print(f"from the death of the tree to both halves gone: median {statistics.median(released):.0f} ms, "
          f"worst {max(released):.0f} ms   aim: 100")
    print(f"locks left after {len(gone)} kills: {sum(gone)}")
    print(f"memory of tf and its guardian while terraform runs (PSS): {statistics.median(memory) / 1024:.1f} MiB   aim: 8")
    print(f"size of the binary: {tf.stat().st_size / 1e6:.1f} MB")


main()
