"""What package/check-image does: package/check_image.py IMAGE BUSYBOX"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))
from cloud import Cloud, configuration, provisioner

IMAGE, BUSYBOX = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
CONFIG = json.loads((IMAGE / "config.json").read_text())
TERRAFORM = shutil.which("terraform")
APPLY = ["apply", "-auto-approve", "-no-color"]
failed = 0
passed = 0
running = []


def check(what, holds, story=""):
    global failed, passed
    print(("ok      " if holds else "FAILED  ") + what, flush=True)
    if holds:
        passed += 1
    else:
        failed += 1
        print(story, flush=True)


def until(what, condition, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    sys.exit(f"waited in vain for {what}")


def comes_true(condition):
    """Whether it does in the end."""
    end = time.monotonic() + 30
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds


def status_of(pid):
    with contextlib.suppress(OSError):
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {}


def children(pid):
    numbers = [int(entry.name) for entry in pathlib.Path("/proc").iterdir() if entry.name.isdigit()]
    found = {number: status_of(number) for number in numbers}
    return {number: status for number, status in found.items() if status.get("PPid") == str(pid)}


class Container:
    """One run of the image. `work` is mounted writable, everything else is read-only but for what `volumes` says."""

    def __init__(self, work, arguments, environment=None, volumes=()):
        self.place = pathlib.Path(tempfile.mkdtemp(prefix="tf-container-"))
        self.place.chmod(0o755)
        # The image itself stays as it is: an engine gives each container a root of its own.
        root = self.place / "root"
        shutil.copytree(IMAGE / "root", root, symlinks=True, copy_function=copy_with_owner)
        for path in [IMAGE / "root", *(IMAGE / "root").rglob("*")]:
            status, to = path.stat(), root / path.relative_to(IMAGE / "root")
            os.chown(to, status.st_uid, status.st_gid)
            os.chmod(to, status.st_mode)
        mounts = [
            [str(work), CONFIG["workdir"], False],
            [TERRAFORM, "/usr/bin/terraform", True],
            [str(BUSYBOX), "/bin/sh", True],
            ["tmpfs", "/tmp", False],
            *volumes,
        ]
        self.out, self.err = self.place / "out", self.place / "err"
        config = {
            "root": str(root), "mounts": mounts, "workdir": CONFIG["workdir"], "user": CONFIG["user"],
            "env": {**CONFIG["env"], **(environment or {})}, "command": CONFIG["entrypoint"] + arguments,
            "pid_file": str(self.place / "pid"),
        }
        (self.place / "config.json").write_text(json.dumps(config))
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            command = [sys.executable, HERE / "contain.py", self.place / "config.json"]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        running.append(self)

    @property
    def pid(self):
        """Of process 1, as it is outside."""
        path = self.place / "pid"
        return int(until("process 1", lambda: path.exists() and path.read_text()))

    def terraform(self):
        # Its own process is the only one of that name: the guardian and the provisioner have others.
        def look():
            return [pid for pid, status in children(self.pid).items() if status["Name"] == "terraform"]

        return until("terraform", look)[0]

    def wait(self):
        code = self.process.wait(timeout=90)
        running.remove(self)
        story = f"exit code {code}\n--- stdout\n{self.out.read_text()}--- stderr\n{self.err.read_text()}"
        shutil.rmtree(self.place, ignore_errors=True)
        return code, story


def copy_with_owner(source, target):
    shutil.copyfile(source, target)


class Work:
    """A working directory that belongs to the image's user, as a mounted one does."""

    def __init__(self, cloud, command):
        self.cloud = cloud
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="tf-image-"))
        text = configuration("prod.tfstate", provisioner(command))
        (self.directory / "main.tf").write_text(text)
        for path in (self.directory, self.directory / "main.tf"):
            os.chown(path, *CONFIG["user"])
        self.environment = {
            "CHECKPOINT_DISABLE": "1", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{cloud.port}", "NO_COLOR": "1",
        }
        code, story = self.container(["init", "-no-color"]).wait()
        if code != 0:
            sys.exit(f"init fails: {story}")

    def container(self, arguments, environment=None, volumes=()):
        return Container(self.directory, arguments, {**self.environment, **(environment or {})}, volumes)

    def began(self):
        until("the provisioner", lambda: (self.directory / "began").exists())

    def locks(self):
        return list(self.cloud.locks())

    def remove(self):
        self.cloud.unlock()
        self.cloud.ask("DELETE", "/bucket/prod.tfstate")
        self.cloud.dynamodb("DeleteItem", {"TableName": "locks", "Key": {"LockID": {"S": "bucket/prod.tfstate-md5"}}})
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def working(cloud, command):
    work = Work(cloud, command)
    try:
        yield work
    finally:
        work.remove()


WAITS = "touch began; i=0; while test $i -lt 600 && ! test -e go; do sleep 0.1; i=$((i+1)); done"


def completes(cloud):
    with working(cloud, "true") as work:
        code, story = work.container(["plan", "-detailed-exitcode", "-no-color"]).wait()
        check("plan -detailed-exitcode ends with terraform's 2", code == 2, story)
        run = work.container(APPLY)
        code, story = run.wait()
        check("apply completes, with 0", code == 0 and "Apply complete! Resources: 1 added" in story, story)
        check("tf says nothing in it", story.endswith("--- stderr\n"), story)
        check("no lock is left", not work.locks())
        code, story = work.container(["no-such-command"]).wait()
        check("a wrong command ends with terraform's 1", code == 1, story)


def runs_as_the_user_that_the_image_says(cloud):
    with working(cloud, WAITS) as work:
        run = work.container(APPLY)
        work.began()
        status = status_of(run.pid)
        holds = (
            status["NSpid"].split()[-1] == "1" and status["Uid"].split() == [str(CONFIG["user"][0])] * 4
            and int(status["CapEff"], 16) == 0 and status["NoNewPrivs"] == "1"
        )
        check("it is process 1, of the image's user, without a capability", holds, str(status))
        who = [info["Who"] for _, info in work.locks()]
        check(f"the lock names {set(who)}", who and all(name.endswith("@tf-pod") for name in who), str(work.locks()))
        (work.directory / "go").touch()
        code, story = run.wait()
        check("and ends with 0", code == 0, story)


def is_stopped(cloud):
    with working(cloud, WAITS) as work:
        run = work.container(APPLY, {"TFW_STOP_TIMEOUT": "25s"})
        work.began()
        check("locked while it applies", len(work.locks()) == 2)
        begun = time.monotonic()
        # The second at once, because terraform needs a tenth of a second to stop.
        os.kill(run.pid, signal.SIGTERM)
        os.kill(run.pid, signal.SIGINT)
        code, story = run.wait()
        took = time.monotonic() - begun
        once = story.count("Interrupt received.") == 1 and "Two interrupts" not in story
        check(f"SIGTERM and SIGINT to process 1 are one interrupt, and it ends within {took:.1f} s", once and took < 20, story)
        check(f"with terraform's own code, {code}", code == 1, story)
        check("no lock is left", not work.locks())


def is_stopped_in_the_end(cloud):
    # A terraform that cannot stop, because it is not there any more to hear it: stopped by SIGSTOP.
    with working(cloud, WAITS) as work:
        run = work.container(APPLY, {"TFW_STOP_TIMEOUT": "2s"})
        work.began()
        os.kill(run.terraform(), signal.SIGSTOP)
        begun = time.monotonic()
        os.kill(run.pid, signal.SIGTERM)
        code, story = run.wait()
        took = time.monotonic() - begun
        check(f"one that does not stop is killed when TFW_STOP_TIMEOUT is over, and it ends after {took:.1f} s",
              "TFW_STOP_TIMEOUT" in story and 2 <= took < 15, story)
        check(f"code {code}, no lock is left", not work.locks(), story)


def terraform_is_killed(cloud):
    with working(cloud, WAITS) as work:
        run = work.container(APPLY)
        work.began()
        os.kill(run.terraform(), signal.SIGKILL)
        code, story = run.wait()
        check("a killed terraform's lock is given back", not work.locks() and "released the lock" in story, story)
        check(f"with 128 and the signal: {code}", code == 137, story)
        print("        " + "\n        ".join(line for line in story.splitlines() if line.startswith("tf:")))


def orphans_are_reaped(cloud):
    # Each is left by its parent at once, and so comes to process 1, where it ends.
    orphan = "(while ! test -e end; do sleep 0.1; done >/dev/null 2>&1 &)"
    orphans = f"for i in 1 2 3 4 5 6 7 8 9 10 11 12; do {orphan}; done; {WAITS}"
    with working(cloud, orphans) as work:
        run = work.container(APPLY)
        work.began()
        # A zombie has its name still, so whoever is not counted any more was taken away.
        count = lambda: sum(status["Name"] in ("busybox", "sleep", "sh") for status in children(run.pid).values())
        check("twelve orphans come to process 1", comes_true(lambda: count() == 12), str(children(run.pid)))
        (work.directory / "end").touch()
        check("when they have ended, no zombie is left", comes_true(lambda: count() == 0), str(children(run.pid)))
        # Those of somebody who comes in from outside, as `kubectl exec` does.
        line = "for i in 1 2 3 4 5 6 7 8; do (sleep 0.1 >/dev/null 2>&1 &); done"
        enter = ["nsenter", "--target", str(run.pid), "--user", "--pid", "--mount", "--root", "/bin/sh", "-c", line]
        subprocess.run(enter, check=True)
        check("nor of eight strange ones", comes_true(lambda: count() == 0), str(children(run.pid)))
        (work.directory / "go").touch()
        code, story = run.wait()
        check("and the run ends with 0", code == 0 and not work.locks(), story)


def everything_is_killed(cloud):
    for with_volume in (False, True):
        with working(cloud, WAITS) as work, tempfile.TemporaryDirectory() as state:
            os.chown(state, *CONFIG["user"])
            volumes = [[state, "/home/tf", False]] if with_volume else []
            print("        with a volume that outlives the container for the home" if with_volume else
                  "        with nothing that outlives the container but the working directory")
            run = work.container(APPLY, volumes=volumes)
            work.began()
            os.kill(run.pid, signal.SIGKILL)
            code, story = run.wait()
            check(f"SIGKILL of process 1 ends everything, with {code}, and the lock stays", code == 137 and len(work.locks()) == 2, story)
            code, story = work.container(["plan", "-no-color"], volumes=volumes).wait()
            refused = code == 1 and "Error acquiring the state lock" in story and len(work.locks()) == 2
            # The kernel may give the next namespace the number of the dead one. It does so only when nobody of that one
            # lives, so tf takes a recorded run of the same number for its own, which it sees is dead.
            given_back = with_volume and code == 0 and "released the lock that an earlier run left" in story and not work.locks()
            what = "gives the lock back: its namespace has the number of the dead one" if given_back else "is refused, and the lock stays"
            check(f"the next container {what}", refused or given_back, story)
            print("        " + "\n        ".join(line for line in story.splitlines() if line.startswith("tf:")))
            code, story = work.container(["locks"], volumes=volumes).wait()
            print(f"        tf locks, exit code {code}:")
            print("        " + "\n        ".join(story.splitlines()[2:]))


def main():
    if not TERRAFORM:
        sys.exit("terraform is missing")
    cloud = Cloud()
    try:
        for case in (completes, runs_as_the_user_that_the_image_says, is_stopped, is_stopped_in_the_end, terraform_is_killed,
                     orphans_are_reaped, everything_is_killed):
            print(f"== {case.__name__.replace('_', ' ')}", flush=True)
            case(cloud)
    finally:
        # Where this ends early, nothing runs on: with its first process a container is gone.
        for container in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(container.pid, signal.SIGKILL)
        cloud.stop()
    print(f"\n{passed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
