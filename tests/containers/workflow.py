"""GitHub's recipe, which act runs in containers of the Docker Engine."""

import contextlib
import os
import re
import subprocess
import sys

from machine import ROOT, STATE_TIMEOUT, Container, Failed, has_old_freezer, wait_until

sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "tests/executors")]
from cloud import configuration, provisioner
from recipes import GitHub, archive


class Workflow:
    """The files of shell/ci/github in a repository of their own. `job` is staging or production.

    act runs outside the machine of the engines, and creates a container there for each job. `seen` is the only
    directory that a container shares with this process. It has the same path in both. `timeout` is that of the step, in
    minutes.
    """

    def __init__(self, test, job, bare=False, timeout=None):
        self.test, self.act = test, None
        self.root = test.directory("workflow")
        self.work, self.seen, home = self.root / "work", self.root / "seen", self.root / "home"
        for directory in (self.work, self.seen, home):
            directory.mkdir()
        self.log = self.root / "log"
        self.environment = {
            **test.world.environment, "PATH": os.environ["PATH"], "HOME": str(home), "TFW_CLOCK": "steady",
            "DOCKER_HOST": f"unix:///proc/{test.world.machine.pid}/root/run/docker.sock",
        }
        # act names a container after its workflow and its job, and removes an older one of that name.
        edits = {"name: terraform\n": f"name: {test.key}\n", "TFW_LEASE: 5m\n": "TFW_LEASE: 1m\n"}
        self.recipe = GitHub(job, {}, timeout=timeout, edits=edits)
        self.recipe.prepare(self, bare, archive(self.seen, test.world.tf))
        test.containers.append(self)

    def configuration(self):
        command = f"touch {self.seen}/began; while ! test -e {self.seen}/go; do sleep 0.1; done"
        return configuration(self.test.key, provisioner(command))

    def start(self):
        """Starts act in the background."""
        source = "/share" / self.seen.relative_to(self.test.world.machine.share)
        # The same cgroup namespace as in Container.
        namespace = " --cgroupns host" if has_old_freezer() else ""
        words = [
            *self.recipe.command(self, "runner"), "--network", "host", "--container-daemon-socket", "-",
            "--container-options", f"--volume {source}:{self.seen}{namespace}",
            # The cache server needs another interface than loopback.
            "--no-cache-server",
        ]
        with open(self.log, "wb") as log:
            # In a session of its own, so that a ^C does not end it before its container is looked at.
            self.act = subprocess.Popen(
                [str(word) for word in words], cwd=self.work, env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True)

    def began(self):
        """Starts act, and waits until terraform applies. Returns the container of the job."""
        def has_begun():
            if self.act.poll() is not None:
                raise Failed(f"act ended before terraform applied\n{self.story()}")
            return (self.seen / "began").exists()

        self.start()
        wait_until("the provisioner", has_begun, self.story)
        self.test.began(self, self.seen)
        return self.container()

    def container(self):
        names = self.test.engine.do("ps", "--all", "--quiet", "--filter", f"volume={self.seen}")[1].split()
        if len(names) != 1:
            raise Failed(f"the workflow has not one container, but {names}\n{self.story()}")
        return Container.existing(self.test.engine, names[0])

    def go(self):
        """Lets the provisioner end, also that of the next run."""
        (self.seen / "go").touch()

    def wait(self, seconds=STATE_TIMEOUT):
        wait_until("the end of act", lambda: self.act.poll() is not None, self.story, seconds)
        return self.act.returncode

    def text(self):
        """Both outputs, as of a container. act writes those of its steps into one, each line with a title."""
        return "", re.sub(r"^\[[^]]*\]   \| ", "", self.log.read_text(errors="replace"), flags=re.M)

    def story(self):
        return f"act: exit code {self.act.poll()}\n{self.text()[1]}"

    def last_step_ran(self):
        return self.recipe.last_step_ran(self.log.read_text(errors="replace"))

    def remove(self):
        if self.act:
            self.act.kill()
            self.act.wait()
            with contextlib.suppress(Failed):
                self.container().remove()
