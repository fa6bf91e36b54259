"""A lock that is left, and one that is not: real terraform, killed in the middle of an apply."""

import os
import pathlib
import shutil
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from cloud import HERE, WAITS, Cloud, Work, provisioner

COLOUR = sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(code, text):
    return f"\033[{code}m{text}\033[0m" if COLOUR else text


def say(text=""):
    print(text, flush=True)


def show(cloud):
    locks = list(cloud.locks())
    if not locks:
        say(paint("1;32", "  the lock table: empty"))
    for where, info in locks:
        say(paint("1;31", f"  locked in {where:8}  {info['Operation']}  {info['Who']}  ID {info['ID']}"))
    return locks


def scene(cloud, program):
    work = Work(cloud, provisioner(WAITS), programs=[("tf", HERE / "target/debug/tf")])
    try:
        say(paint("1", f"$ {program} apply -auto-approve"))
        run = work.start([program, "apply", "-auto-approve"])
        work.wait_for("began")
        say()
        show(cloud)
        terraform = work.terraform()
        say(paint("1", f"$ kill -9 {terraform}    # the out-of-memory killer, a cancelled job, a closed laptop"))
        os.kill(terraform, signal.SIGKILL)
        run.wait()
        (work.directory / "go").touch()
        say()
        return show(cloud), work
    except BaseException:
        work.remove()
        raise


def main():
    if not shutil.which("terraform"):
        sys.exit("terraform is missing: put Terraform 1.11 or later on PATH (https://developer.hashicorp.com/terraform/install)")
    cloud = Cloud()
    try:
        say(paint("1;36", "── bare terraform ──"))
        left, work = scene(cloud, "terraform")
        if not left:
            sys.exit("bare terraform left no lock: nothing to show")
        say(paint("1", "$ terraform plan    # a colleague, minutes later"))
        refused = work.run(["terraform", "plan", "-no-color"], capture_output=True, text=True)
        for line in refused.stderr.splitlines():
            if "ConditionalCheckFailed" in line or "PreconditionFailed" in line or "Error acquiring" in line:
                say(paint("31", f"  {line.strip('│╷╵ ')}"))
        work.remove()
        cloud.unlock()
        say()
        say(paint("1;36", "── tf ──"))
        left, work = scene(cloud, "tf")
        say(paint("1", "$ terraform plan    # a colleague, at once"))
        planned = work.run(["terraform", "plan", "-no-color"], capture_output=True, text=True)
        work.remove()
        if left or planned.returncode:
            sys.exit("the lock was left")
        say(paint("32", "  " + next(line for line in planned.stdout.splitlines() if line.startswith(("Plan:", "No changes")))))
    finally:
        cloud.stop()


main()
