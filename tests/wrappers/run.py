"""Runs the tools that people run around terraform, with `tf` in terraform's place, and looks at the lock each time.

    run.py [WORD...]    only the checks whose names contain every WORD

Each tool runs to its end, is told to stop, and is killed, once with bare terraform and once with `tf`.
"""

import functools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "support"))
from around import BOTH, TF, Place, Report, all_at_once, begin, check, is_gone, kill  # noqa: E402
from tools import GOES_ON, TOOLS  # noqa: E402

SIGNALS = {
    "INT to the tool": lambda run: run.send(signal.SIGINT),
    "TERM to the tool": lambda run: run.send(signal.SIGTERM),
    "^C at its terminal": lambda run: run.press_interrupt(),
    "KILL of the tool": lambda run: run.send(signal.SIGKILL),
}


class Bench:
    """One tool in two places, one for bare terraform and one for `tf`."""

    def __init__(self, cloud, tool, report):
        self.tool, self.report = tool, report
        self.bare, self.tf = (Place(cloud, f"{tool.name}-{subject}") for subject in ("bare", "tf"))

    def prepare(self):
        (self.tf.bin / "tf").symlink_to(TF)
        for place in (self.bare, self.tf):
            self.tool.prepare(place)
            place.clean()
        self.bare.environment.update(self.tool.environment("terraform"))
        self.tf.environment.update(self.tool.environment("tf"))

    def start(self, place, **more):
        return place.start(self.tool.command(place, "terraform" if place is self.bare else "tf"), **more)

    def started(self, place, end, settings):
        place.clean()
        self.tool.before_next(place)
        place.environment.pop("CI", None)
        if "CI" in settings:
            place.environment["CI"] = "true"
        run = self.start(place, terminal=end == "^C at its terminal")
        place.wait_until_began(run)
        return run

    def once(self, place):
        """Runs the tool to its end, and returns what it shows."""
        place.clean()
        self.tool.before_next(place)
        place.go.touch()
        end = place.run(self.tool.command(place, "terraform" if place is self.bare else "tf"))
        check(not place.locks(), "a run that ends well leaves no lock", place.locks())
        return end

    # ---- the checks

    def checks(self):
        name, report = self.tool.name, self.report
        report.run(f"{name}, to its end: exit code and output are those of bare terraform", self.same)
        report.run(f"{name}, to its end, by links named terraform: the same", self.same_by_links)
        for end, expected in self.tool.ends.items():
            bare, below = expected
            signal_name, *settings = end.split(", ")
            if bare:
                report.run(f"{name}, {end}: bare terraform {bare}",
                           functools.partial(self.signal_to_bare, signal_name, settings, bare))
            report.run(f"{name}, {end}: with tf, {below}, and its lock is released",
                       functools.partial(self.signal_to_tf, signal_name, settings, below))
        report.run(f"{name}, KILL of terraform: bare terraform leaves its lock, and the next run is refused",
                   self.kill_bare_terraform)
        report.run(f"{name}, KILL of terraform: tf releases its lock", self.kill_terraform)
        report.run(f"{name}, KILL of tf: its guardian stops terraform, and the lock is released", self.kill_tf)
        report.run(f"{name}, KILL of all but the guardian: the guardian releases the lock", self.kill_all)
        report.run(f"{name}, KILL of everything: the next run releases the lock and works", self.kill_everything)

    def same(self):
        bare, tf = self.once(self.bare), self.once(self.tf)
        check(bare.returncode == 0, "bare terraform works", f"{bare.stdout}{bare.stderr}")
        self.compare(bare, tf)
        check("started terraform" in self.tf.trace.read_text(), "tf ran terraform", self.tf.dump())

    def same_by_links(self):
        links = self.tf.root / "links"
        subprocess.run([TF, "locks", "shim", links], check=True, capture_output=True, env=self.tf.environment)
        bare = self.once(self.bare)
        kept = dict(self.tf.environment)
        try:
            self.tf.environment.update(self.tool.environment("terraform"))
            self.tf.environment["PATH"] = f"{links}:{kept['PATH']}"
            self.tf.clean()
            self.tf.go.touch()
            tf = self.tf.run(self.tool.command(self.tf, "terraform"))
        finally:
            self.tf.environment = kept
        self.compare(bare, tf)
        check("started terraform" in self.tf.trace.read_text(), "tf ran terraform", self.tf.dump())

    def compare(self, bare, tf):
        one, other = (
            (end.returncode, *(self.tool.plain(plain(text, place)) for text in (end.stdout, end.stderr)))
            for end, place in ((bare, self.bare), (tf, self.tf)))
        check(one == other, "with tf, exit code and output are those of bare terraform",
              json.dumps([one, other], indent=1).replace("\\n", "\n"))
        check(not self.tf.locks(), "a run that ends well leaves no lock", self.tf.locks())

    def signal_to_bare(self, end, settings, expected):
        return self.bare.end_of_bare(self.started(self.bare, end, settings), SIGNALS[end], expected)

    def signal_to_tf(self, end, settings, expected):
        run = self.started(self.tf, end, settings)
        try:
            terraform = self.tf.find("is_terraform").pid
            begun = time.monotonic()
            SIGNALS[end](run)
            if expected == GOES_ON:
                run.wait()
                held = not is_gone(terraform) and self.tf.locks()
                check(held, "the lock stays while terraform works", self.tf.dump())
                self.tf.go.touch()
                begun = time.monotonic()
            self.tf.wait_until_unlocked()
            seconds = time.monotonic() - begun
            code = run.wait()
            self.tf.wait_until_quiet()
            output = self.tf.log.read_text(errors="replace")
            check("Two interrupts" not in output, "terraform gets one interrupt", output)
            return f"unlocked after {seconds:.1f} s, exit code {code}"
        finally:
            run.close()

    def kill_bare_terraform(self):
        run = self.started(self.bare, "", [])
        try:
            kill([self.bare.find("is_terraform")])
            code = run.wait()
            self.bare.go.touch()
            self.bare.wait_until_quiet()
            check(self.bare.locks() == BOTH, "bare terraform leaves its lock", self.bare.locks())
            self.tool.before_next(self.bare)
            end = self.bare.run(self.tool.command(self.bare, "terraform"))
            check(end.returncode != 0 and "Error acquiring the state lock" in end.stdout + end.stderr,
                  "the next run is refused", end.stdout + end.stderr)
            return f"exit code {code}, then {end.returncode}"
        finally:
            run.close()

    def kill_terraform(self):
        run = self.started(self.tf, "", [])
        try:
            kill([self.tf.find("is_terraform")])
            return self.after_a_kill(run)
        finally:
            run.close()

    def kill_tf(self):
        run = self.started(self.tf, "", [])
        try:
            kill([self.tf.find("is_tf")])
            return self.after_a_kill(run)
        finally:
            run.close()

    def kill_all(self):
        run = self.started(self.tf, "", [])
        try:
            kill([process for process in self.tf.processes() if not process.is_guardian])
            return self.after_a_kill(run)
        finally:
            run.close()

    def after_a_kill(self, run):
        begun = time.monotonic()
        self.tf.wait_until_unlocked()
        seconds = time.monotonic() - begun
        code = run.wait()
        self.tf.wait_until_quiet()
        return f"unlocked after {seconds:.1f} s, exit code {code}"

    def kill_everything(self):
        run = self.started(self.tf, "", [])
        try:
            # The guardian first: it has no time to notice the other deaths.
            kill([self.tf.find("is_guardian")])
            kill(self.tf.processes())
            run.wait()
            self.tf.wait_until_quiet()
            check(self.tf.locks() == BOTH, "the lock stays until the next run", self.tf.locks())
            self.tf.go.touch()
            self.tool.before_next(self.tf)
            end = self.tf.run(self.tool.command(self.tf, "tf"))
            check(end.returncode == 0, "the next run works", f"{end.stdout}{end.stderr}\n{self.tf.dump()}")
            check(not self.tf.locks(), "the next run leaves no lock", self.tf.locks())
        finally:
            run.close()

    def remove(self):
        for place in (self.bare, self.tf):
            place.remove()


def plain(text, place):
    """Output without what differs from run to run: IDs, durations, paths, colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace(str(place.root), "PLACE").replace(place.key, "KEY")
    # Terraform prints these lines if the lock service takes longer than 2 s.
    text = re.sub(r"(Acquir|Releas)ing state lock\. This may take a few moments\.\.\.\n", "", text)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)
    return re.sub(r"(after|for) \d+s|\[\d+s elapsed\]", "after N s", text)


def main():
    report = Report(sys.argv[1:])
    cloud = begin()

    def all_of(tool):
        bench = Bench(cloud, tool, report)
        try:
            if report.run(f"{tool.name}: it is installed", bench.prepare, always=True):
                bench.checks()
        finally:
            bench.remove()

    try:
        chosen = [tool for tool in TOOLS if not sys.argv[1:] or any(word in tool.name for word in sys.argv[1:])]
        all_at_once([functools.partial(all_of, tool) for tool in chosen or TOOLS], threads=4)
    finally:
        cloud.stop()
    report.finish()


main()
