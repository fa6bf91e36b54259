"""Runs the recipes of shell/ci with the programs that run such files, and looks at the lock each time.

    run.py [WORD...]    only the checks whose names contain every WORD

Each job runs to its end, is cancelled, times out, and is killed, once with bare terraform and once with `tf`.
The scheduled audit of shell/audit/github runs too.
"""

import functools
import pathlib
import signal
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "support"))
import audit  # noqa: E402
from around import BOTH, Place, Report, all_at_once, begin, check, kill  # noqa: E402
from recipes import ALL, archive  # noqa: E402

ENDS = {
    "INT to {}": lambda run: run.send(signal.SIGINT),
    "TERM to {}": lambda run: run.send(signal.SIGTERM),
    "^C at the terminal of {}": lambda run: run.press_interrupt(),
    "KILL of {}": lambda run: run.send(signal.SIGKILL),
    "{} times out": lambda run: None,
}


class Job:
    """A recipe in a place, with bare terraform or with `tf`."""

    def __init__(self, cloud, recipe, report, bare):
        self.recipe, self.report, self.bare = recipe, report, bare
        timeout = "-timeout" if recipe.timeout else ""
        self.place = Place(cloud, f"{recipe.program}-{recipe.job}-{'bare' if bare else 'tf'}{timeout}")

    def started(self, terminal=False):
        self.place.clean()
        run = self.place.start(self.recipe.command(self.place), terminal=terminal)
        self.place.wait_until_began(run)
        return run

    def checks(self, release):
        name, run = self.recipe.name, self.report.run
        self.recipe.prepare(self.place, self.bare, release)
        for end, bare in self.recipe.ends.items():
            title = f"{name}, {end.format(self.recipe.program)}"
            if self.bare and bare:
                run(f"{title}: bare terraform {bare}", functools.partial(self.end_of_bare, end, bare))
            if not self.bare:
                run(f"{title}: with tf, the lock is released", functools.partial(self.end, end))
        if self.recipe.timeout:
            return
        if self.bare:
            run(f"{name}, KILL of everything: bare terraform leaves its lock, and the next job is refused",
                self.kill_everything_bare)
            return
        run(f"{name}, to its end: the job succeeds, runs terraform below tf, and leaves no lock", self.to_its_end)
        run(f"{name}, KILL of terraform: tf releases the lock, and the job fails", self.kill_terraform)
        run(f"{name}, KILL of tf: its guardian stops terraform, and no lock is left when the job ends", self.kill_tf)
        run(f"{name}, KILL of the whole run: the last step releases the lock", self.kill_run)
        run(f"{name}, KILL of everything: the next job releases the lock and works", self.kill_everything)

    # ---- bare terraform

    def end_of_bare(self, end, expected):
        return self.place.end_of_bare(self.started(terminal=end.startswith("^C")), ENDS[end], expected)

    def kill_everything_bare(self):
        run = self.started()
        try:
            kill(self.place.processes())
            run.wait()
            self.place.wait_until_quiet()
            check(self.place.locks() == BOTH, "bare terraform leaves its lock", self.place.locks())
            end = self.place.run(self.recipe.command(self.place))
            check(end.returncode != 0 and "Error acquiring the state lock" in end.stdout + end.stderr,
                  "the next job is refused", end.stdout + end.stderr)
        finally:
            run.close()

    # ---- tf

    def end(self, end):
        run = self.started(terminal=end.startswith("^C"))
        try:
            if "times out" in end:
                run.wait()
            begun = time.monotonic()
            ENDS[end](run)
            self.place.wait_until_unlocked()
            seconds = time.monotonic() - begun
            code = run.wait()
            self.place.wait_until_quiet()
            log = self.place.log.read_text(errors="replace")
            check("Two interrupts" not in log, "terraform gets one interrupt", log)
            last = "the last step ran" if self.recipe.last_step_ran(log) else "the last step did not run"
            return f"unlocked after {seconds:.1f} s, exit code {code}, {last}"
        finally:
            run.close()

    def to_its_end(self):
        self.place.clean()
        self.place.go.touch()
        end = self.place.run(self.recipe.command(self.place), check=True)
        check("started terraform" in self.place.trace.read_text(), "tf ran terraform", self.place.dump())
        status, _ = self.place.cloud.ask("GET", f"/bucket/{self.place.key}")
        check(status == 200, "the state is saved", self.place.dump())
        check(self.recipe.last_step_ran(end.stdout + end.stderr), "the last step ran", self.place.dump())
        check(not self.place.locks(), "no lock is left", self.place.locks())

    def kill_terraform(self):
        run = self.started()
        try:
            kill([self.place.find("is_terraform")])
            code = run.wait()
            self.place.wait_until_unlocked()
            check(code != 0, "the job fails", self.place.dump())
            log = self.place.log.read_text(errors="replace")
            check("released the lock" in log, "tf says which lock it released", log)
        finally:
            run.close()

    def kill_tf(self):
        run = self.started()
        try:
            kill([self.place.find("is_tf")])
            code = run.wait()
            # Without a last step that waits for the guardian, the lock could still be held here.
            check(not self.place.locks(), "the lock is released when the job ends", self.place.dump())
            return f"exit code {code}"
        finally:
            run.close()

    def kill_run(self):
        """Kills tf, its helpers, terraform and the provisioner. The executor and the shell of the step go on."""
        run = self.started()
        try:
            guardian, tf = self.place.find("is_guardian"), self.place.find("is_tf")
            # Listed before the first kill: the last step runs tf too, and begins at once.
            helpers = [process for process in self.place.processes() if process.is_ours]
            kill([guardian, tf, *self.place.below(tf), *helpers])
            code = run.wait()
            log = self.place.log.read_text(errors="replace")
            check("released the lock that an earlier run left" in log, "the last step says what it released", log)
            check(not self.place.locks(), "the lock is released when the job ends", self.place.locks())
            return f"exit code {code}"
        finally:
            run.close()

    def kill_everything(self):
        run = self.started()
        try:
            # The guardian first: it has no time to notice the other deaths.
            kill([self.place.find("is_guardian")])
            kill(self.place.processes())
            run.wait()
            self.place.wait_until_quiet()
            check(self.place.locks() == BOTH, "the lock stays until the next job", self.place.locks())
            self.place.go.touch()
            self.place.run(self.recipe.command(self.place), check=True)
            check(not self.place.locks(), "the next job leaves no lock", self.place.locks())
        finally:
            run.close()


def main():
    report = Report(sys.argv[1:])
    cloud = begin()

    def all_of(recipe, bare, release):
        job = Job(cloud, recipe, report, bare)
        try:
            job.checks(release)
        finally:
            job.place.remove()

    try:
        release = archive(Place(cloud, "release").root)
        jobs = [functools.partial(all_of, recipe(), bare, release) for recipe in ALL for bare in (True, False)]
        jobs.append(functools.partial(audit.checks, cloud, report, release))
        all_at_once(jobs, threads=5)
    finally:
        for place in list(Place.existing):
            place.remove()
        cloud.stop()
    report.finish()


main()
